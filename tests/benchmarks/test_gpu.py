"""The queue of everything that needs a GPU: it goes on where it stopped, and loses nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Unit

ROOT = Path(__file__).parent.parent.parent
DEVICE = "A Device (80)"
ROW = {"program": "a", "ratio": 2.0, "correct": True}


def unit(name: str, code: str) -> Unit:
    return Unit(name, (sys.executable, "-c", code), json.loads)


def gives(rows: object) -> str:
    return f"print({json.dumps(json.dumps(rows))})"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Unit]]:
    found: list[Unit] = []
    monkeypatch.setattr(gpu, "has_device", lambda: True)
    monkeypatch.setattr(gpu, "device_name", lambda: DEVICE)
    monkeypatch.setattr(gpu, "units", lambda everything: iter(found))
    monkeypatch.setattr(gpu, "print_table", lambda *given: None)
    return found


def rows_in(out: Path) -> list[dict[str, object]]:
    (path,) = out.glob("*.json")
    assert path.name.startswith("a-device-80-")
    return json.loads(path.read_text())["rows"]


def run(out: Path, *more: str) -> int:
    return gpu.main(["--out", str(out), *more])


def test_units_run_once_and_failed_ones_again(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", gives([ROW])), unit("two", "import sys; sys.exit('out of memory')")]
    assert run(tmp_path) == 1
    assert [(r["unit"], r.get("error")) for r in rows_in(tmp_path)] == [
        ("one", None), ("two", "exit code 1: out of memory"),
    ]  # fmt: skip
    queue[:] = [unit("one", "raise SystemExit('never run again')"), unit("two", gives([ROW, ROW]))]
    assert run(tmp_path) == 0
    assert [(r["unit"], r.get("error")) for r in rows_in(tmp_path)] == [("one", None), ("two", None), ("two", None)]


def test_a_unit_that_hangs_is_ended_and_the_next_runs(
    queue: list[Unit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    queue += [unit("one", "import time; time.sleep(60)"), unit("two", gives([ROW]))]
    assert run(tmp_path) == 1
    assert [r.get("error") for r in rows_in(tmp_path)] == ["no result within 2 s", None]


def test_output_that_is_no_json_is_an_error_of_the_unit(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", "print('not a document')")]
    assert run(tmp_path) == 1
    assert "cannot be read" in str(rows_in(tmp_path)[0]["error"])


def test_a_unit_without_rows_is_an_error(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", gives([]))]
    assert run(tmp_path) == 1
    assert rows_in(tmp_path)[0]["error"] == "it gave no rows"


def test_a_wrong_kernel_fails_the_run(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", gives([ROW | {"correct": False}]))]
    assert run(tmp_path) == 1


def test_the_time_is_kept_and_the_rest_is_left_for_the_next_run(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", gives([ROW])), unit("two", gives([ROW]))]
    assert run(tmp_path, "--minutes", "0") == gpu.UNFINISHED
    assert not list(tmp_path.iterdir())
    assert run(tmp_path, "--minutes", "1") == 0
    assert len(rows_in(tmp_path)) == 2


def test_a_unit_that_the_time_cuts_off_is_left(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", gives([ROW])), unit("two", "import time; time.sleep(60)")]
    assert run(tmp_path, "--minutes", "0.02") == gpu.UNFINISHED
    assert [r["unit"] for r in rows_in(tmp_path)] == ["one"]


def test_the_first_unit_has_its_time_so_that_each_run_gets_on(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", f"import time; time.sleep(2); {gives([ROW])}"), unit("two", gives([ROW]))]
    assert run(tmp_path, "--minutes", "0.02") == gpu.UNFINISHED
    assert [r["unit"] for r in rows_in(tmp_path)] == ["one"]


def test_what_failed_is_tried_after_all_others_and_asks_for_no_more_runs(queue: list[Unit], tmp_path: Path) -> None:
    queue += [unit("one", "raise SystemExit('wrong')"), unit("two", "raise SystemExit('wrong')")]
    assert run(tmp_path) == 1
    queue += [unit("three", gives([ROW]))]
    queue[:2] = [unit(n, "import time; time.sleep(60)") for n in ("one", "two")]
    assert run(tmp_path, "--minutes", "0.02") == 1
    assert [(r["unit"], bool(r.get("error"))) for r in rows_in(tmp_path)] == [
        ("one", True), ("two", True), ("three", False),
    ]  # fmt: skip


def test_what_a_unit_started_ends_with_it(queue: list[Unit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    child = "import subprocess, sys, time, pathlib; p = subprocess.Popen(['sleep', '60']); "
    monkeypatch.setattr(gpu, "LIMIT", 2.0)
    queue += [unit("one", f"{child} pathlib.Path({str(note)!r}).write_text(str(p.pid)); time.sleep(60)")]
    assert run(tmp_path / "results") == 1
    pid = int(note.read_text())
    for _ in range(50):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} goes on")


def test_a_damaged_file_is_set_aside(queue: list[Unit], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queue += [unit("one", gives([ROW]))]
    assert run(tmp_path) == 0
    (path,) = tmp_path.glob("*.json")
    path.write_text(path.read_text()[:40])
    assert run(tmp_path) == 0
    assert "cannot be read" in capsys.readouterr().err
    assert len(rows_in(tmp_path)) == 1
    assert path.with_suffix(".damaged").is_file()


def test_rows_of_other_code_are_measured_again(
    queue: list[Unit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue += [unit("one", gives([ROW]))]
    monkeypatch.setattr(gpu, "code_version", lambda: "before")
    assert run(tmp_path) == 0
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "has_device", lambda: True)
    assert gpu.done(rows_in(tmp_path)) == set()


def test_without_a_device_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "has_device", lambda: False)
    assert run(tmp_path / "results") == 0
    assert capsys.readouterr().out == "not measured: no CUDA device\n"
    assert not (tmp_path / "results").exists()


def test_there_is_a_unit_for_each_case() -> None:
    names = [u.name for u in gpu.units(False)]
    assert names[0] == "limits"
    assert len(set(names)) == len(names)
    assert len([n for n in names if n.startswith("kernels: ")]) == 18
    assert len([n for n in names if n.startswith("tests: ")]) == len(gpu.device_tests())


def test_every_device_test_is_in_one_unit() -> None:
    marked = {
        str(f.relative_to(ROOT)) for f in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in f.read_text()
    }
    units = list(gpu.device_tests().values())
    assert {file for file, _ in units} == marked - {"tests/benchmarks/test_gpu.py"}
    files = sorted(marked)
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *files],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    assert len(tests) > 300
    for test in tests:
        file, _, name = test.partition("::")
        assert len([u for u in units if u[0] == file and u[1] in name]) == 1, test
    for file, word in units:
        assert any(test.startswith(f"{file}::") and word in test for test in tests), (file, word)


def test_what_pytest_says_last_is_the_row_of_a_unit() -> None:
    assert gpu.outcome(".....\n5 passed in 0.1s\n") == [{"text": "5 passed in 0.1s"}]
    with pytest.raises(ValueError, match="printed nothing"):
        gpu.outcome("\n")
