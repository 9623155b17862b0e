"""The GPU figures of the docs: they are what was measured, and `not measured` where nothing was."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from benchmarks.kernels import Case, cases
from mugraph.errors import MugraphError

ROOT = Path(__file__).parent.parent.parent
PNG = b"\x89PNG\r\n\x1a\n"
FIRST, SECOND = list(cases())[:2]
PAGE = f"# A page\n\nabove\n\n{report.BEGIN}\nold\n{report.END}\n\nbelow\n"


def row(
    case: Case = FIRST, baseline: str = "eager", us: float = 20.0, ours: float = 10.0, **more: Any
) -> dict[str, Any]:
    return {
        "unit": f"kernels: {case}",
        "program": case.family,
        "variant": case.variant,
        "sizes": " ".join(f"{n}={s}" for n, s in case.sizes.items()),
        "dtype": case.dtype,
        "device": "A Device",
        "mugraph_us": ours,
        "baseline": baseline,
        "baseline_us": us,
        "ratio": us / ours,
        "ratio_low": us / ours - 0.1,
        "ratio_high": us / ours + 0.1,
        "warm_ratio": 1.5,
        "percent_of_floor": 80.0,
        "tuning_seconds": 33.0,
        "correct": True,
        **more,
    }


def document(rows: list[dict[str, Any]], benchmark: str = "kernels") -> str:
    environment = {"torch": "9.9", "triton": "8.8", "cuda": None}
    return json.dumps({"benchmark": benchmark, "schema_version": 1, "environment": environment, "rows": rows})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    for page in ("README.md", "docs/performance.md"):
        (tmp_path / page).write_text(PAGE)
    return tmp_path


def measured(root: Path, *rows: dict[str, Any], name: str = "a-device-2030-01-01") -> None:
    (root / "results" / f"{name}.json").write_text(document(list(rows)))


def written(root: Path) -> tuple[str, str]:
    found = report.pages(root / "results", root)
    return found[root / "README.md"], found[root / "docs" / "performance.md"]


def run(root: Path) -> int:
    return report.main(["--results", str(root / "results"), "--root", str(root)])


def line(page: str, case: object) -> str:
    (found,) = [x for x in page.splitlines() if x.startswith(f"| {case} |")]
    return found


def test_the_committed_pages_are_what_the_command_writes() -> None:
    for path, text in report.pages(ROOT / "benchmarks" / "results", ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"run `python -m benchmarks.report`: {path.name}"
        assert (ROOT / report.PLOT).exists() == ("kernels.png" in text)


def test_without_results_every_case_is_not_measured_and_there_is_no_plot(root: Path) -> None:
    (root / "results" / "cpu.json").write_text(document([{"program": "a"}], "cpu"))
    assert run(root) == 0
    for page in ("README.md", "docs/performance.md"):
        text = (root / page).read_text()
        assert text.startswith("# A page\n\nabove\n\n")
        assert text.endswith(f"{report.END}\n\nbelow\n")
        assert "old" not in text
        assert all("| not measured |" in line(text, c) for c in cases())
        assert "The 336 further cases of `--all`: not measured." in text
        assert "png" not in text
    assert not (root / report.PLOT).exists()


def test_the_best_baseline_is_the_fastest(root: Path) -> None:
    measured(root, row(us=20.0), row(baseline="published", us=15.0), row(baseline="torch.compile", us=18.0))
    short, full = written(root)
    assert line(short, FIRST) == f"| {FIRST} | 10.0 | published | 1.50 [1.40, 1.60] | 80 |"
    assert line(full, FIRST) == f"| {FIRST} | 10.0 | published | 15.0 | 1.50 [1.40, 1.60] | 1.50 | 80 | 33 | yes |"
    assert "| not measured |" in line(short, SECOND)
    assert "### A Device" in full
    assert "From a-device-2030-01-01.json (PyTorch 9.9, Triton 8.8)." in full


def test_the_summary_counts_wins_losses_and_what_is_below_one(root: Path) -> None:
    measured(root, row(us=20.0), row(SECOND, us=5.0))
    _, full = written(root)
    assert "2 of the 18 cases of the classic six were measured and are correct; geomean 1.00 over" in full
    assert f"1 below 1.0 ({SECOND}); 1 won (ratio above 1.02), 1 lost (below 0.98)." in full


def test_a_wrong_kernel_has_no_part_in_the_mean_and_is_named(root: Path) -> None:
    measured(root, row(us=20.0), row(SECOND, us=900.0, correct=False))
    short, full = written(root)
    assert "1 of the 18 cases" in short
    assert "geomean 2.00" in short
    assert f"**wrong: {SECOND}**" in short
    assert line(full, SECOND).endswith("| **no** |")


def test_a_case_that_failed_says_why(root: Path) -> None:
    measured(root, row(), {"unit": f"kernels: {SECOND}", "device": "A Device", "error": "no result | within 480 s"})
    assert "| failed: no result / within 480 s |" in line(written(root)[0], SECOND)


def test_the_last_file_counts(root: Path) -> None:
    measured(root, row(us=20.0), row(baseline="published", us=12.0), row(SECOND))
    measured(root, row(us=30.0), name="a-device-2030-01-02")
    _, full = written(root)
    assert "| eager | 30.0 | 3.00 " in line(full, FIRST)
    assert "| eager | 20.0 | 2.00 " in line(full, SECOND)


def test_devices_have_tables_of_their_own(root: Path) -> None:
    measured(root, row())
    measured(root, row(us=40.0, device="B Device"), name="b-device-2030-01-01")
    short, _ = written(root)
    assert short.index("### A Device") < short.index("| 2.00 [") < short.index("### B Device") < short.index("| 4.00 [")


def test_other_cases_are_on_the_long_page_and_counted_where_they_lack(root: Path) -> None:
    other = next(c for c in cases(True) if c not in list(cases()))
    measured(root, row(other), row(Case("rmsnorm_linear", "4096 x 6144", 4000)), {**row(), "tuning_seconds": None})
    short, full = written(root)
    assert f"| {other} |" not in short
    assert "10.0" in line(full, other)
    assert "10.0" in line(full, Case("rmsnorm_linear", "4096 x 6144", 4000))
    assert "| from the cache |" in line(full, FIRST)
    assert "The 335 further cases of `--all`: not measured." in full


def test_tests_on_the_device_are_counted(root: Path) -> None:
    unit = {"device": "A Device", "text": "5 passed"}
    measured(root, row(), {"unit": "limits", **unit}, {"unit": "tests: streams", **unit})
    assert "Tests on the device: 1 of 1 parts passed." in written(root)[1]
    measured(
        root, row(), {"unit": "tests: a", **unit}, {"unit": "tests: b", "device": "A Device", "error": "exit code 1"}
    )
    assert "Tests on the device: 1 of 2 parts passed; failed: b (exit code 1)." in written(root)[1]
    measured(root, row(), {"unit": "tests: a", **unit}, {"unit": "tests: b", "device": "A Device", "text": "2 skipped"})
    assert "Tests on the device: 1 of 2 parts passed; skipped: b." in written(root)[1]
    measured(root, row())
    assert "Tests on the device: not measured." in written(root)[1]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"benchmark": "kernels"}',
        document([{"unit": "limits"}]),
        document([{"unit": "tests: a", "device": "A Device"}]),
        document([row(ratio=None)]),
        document([row(ratio=0.0)]),
        document([row(mugraph_us="fast")]),
        document([{k: v for k, v in row().items() if k != "warm_ratio"}]),
    ],
)
def test_damaged_results_are_an_error_and_nothing_is_written(
    root: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "results" / "a.json").write_text(text)
    assert run(root) == 1
    assert "a.json cannot be read" in capsys.readouterr().err
    assert (root / "README.md").read_text() == PAGE
    assert sorted(p.name for p in root.rglob("*") if p.is_file()) == ["README.md", "a.json", "performance.md"]


@pytest.mark.parametrize(
    "page",
    ["nothing", report.BEGIN, f"{report.END} {report.BEGIN}", f"{report.BEGIN}{report.END}{report.BEGIN}{report.END}"],
)
def test_a_page_without_a_place_is_refused(root: Path, page: str) -> None:
    (root / "docs" / "performance.md").write_text(page)
    with pytest.raises(MugraphError, match="no place for the figures"):
        report.pages(root / "results", root)
    assert run(root) == 1
    assert (root / "README.md").read_text() == PAGE


def test_a_page_that_is_not_there_is_an_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "README.md").unlink()
    assert run(root) == 1
    assert "name the repository: --root" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(root, row())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert run(root) == 1
    assert "pip install 'mugraph[plots]'" in capsys.readouterr().err
    assert (root / "README.md").read_text() == PAGE


def test_the_plot_is_a_png_that_both_pages_link(root: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib of the extra `plots` is not installed")
    measured(root, row(), row(SECOND, us=5.0), row(Case("ntrans", "4096", 64), us=15.0))
    measured(root, row(us=40.0, device="B Device"), row(SECOND, correct=False, device="B Device"), name="b-device")
    assert run(root) == 0
    assert (root / report.PLOT).read_bytes().startswith(PNG)
    assert f"]({report.PLOT})" in (root / "README.md").read_text()
    assert "](kernels.png)" in (root / "docs" / "performance.md").read_text()
    shutil.copy(root / "README.md", root / "before.md")
    assert run(root) == 0  # again: the same
    assert (root / "before.md").read_text() == (root / "README.md").read_text()


def test_only_wrong_cases_still_give_a_plot(root: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib of the extra `plots` is not installed")
    measured(root, row(correct=False))
    assert run(root) == 0
    assert (root / report.PLOT).read_bytes().startswith(PNG)
    assert "0 of the 18 cases" in (root / "README.md").read_text()
