"""Searches that are cut off: by a count, a clock, or Ctrl-C in any phase.

What comes back is the best so far, verified, with the reason; what was written is whole or absent.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mugraph import pipeline
from mugraph.cli import main
from mugraph.ir.graph import Program
from mugraph.pipeline import finished
from mugraph.result import Result, load
from mugraph.runtime.cache import Cache
from mugraph.search import setup
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import Verified, verify
from tests.search.layers import mlps
from tests.search.programs import SMALL
from tests.search.test_random import QUICK

ROOT = Path(__file__).parent.parent.parent
MODEL = """\
import mugraph as mg


@mg.program
def block(x: mg.f32[mg.Dim("B", 1, 64), 40], g: mg.f32[40], w: mg.f32[40, 24], u: mg.f32[40, 24]):
    return mg.silu(mg.rms_norm(x, g) @ w) * (x @ u), mg.softmax(x @ w)
"""


def verified(program: Program, **options: Any) -> Found:
    found = search(program, accept=lambda graph: verify(program, finished(graph)), **options)
    assert isinstance(found.accepted, Verified)
    assert found.accepted.program == program
    source = found.report.candidates[-1]
    assert found.report.predicted_seconds <= source.seconds * (1 + 1e-9)
    return found


def after(polls: int) -> Callable[[], bool]:
    """False so many times, then true."""
    count = itertools.count()
    return lambda: next(count) >= polls


@pytest.mark.parametrize("name", ["gqa", "layernorm_linear"])
def test_whenever_a_search_is_stopped_the_best_so_far_is_verified(name: str) -> None:
    program = SMALL[name]()
    whole = verified(program, space=QUICK)
    assert str(whole.report.stop) == "Saturated"
    best, reasons = set(), set[str]()
    for polls in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256):
        found = verified(program, space=QUICK, interrupted=after(polls))
        reasons.add(str(found.report.stop))
        best.add(found.report.predicted_seconds)
        assert found.report.predicted_seconds >= whole.report.predicted_seconds * (1 - 1e-9)
    assert "Interrupted" in reasons
    assert len(best) > 1  # more time is of use


@pytest.mark.parametrize(
    ("space", "kind"),
    [
        (QUICK.but(nodes=12), "NodeLimit"),
        (QUICK.but(entries=30), "EntryLimit"),
        (QUICK.but(states=2), "StateLimit"),
    ],
)
def test_budgets_name_themselves_and_the_best_so_far_is_verified(space: SearchSpace, kind: str) -> None:
    for name in ("gqa", "layernorm_linear"):
        assert verified(SMALL[name](), space=space).report.stop.kind == kind


def test_a_time_limit_is_kept() -> None:
    started = time.perf_counter()
    space = QUICK.but(states=10**9, differences=True)
    found = verified(SMALL["layernorm_linear"](), space=space, budget_seconds=0.02)
    assert found.report.stop.kind == "TimeLimit"
    assert found.report.stop.limit == 0.02
    assert time.perf_counter() - started < 5  # verification of what was found, on a busy machine


# -- Ctrl-C, through the command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    yield tmp_path
    signal.signal(signal.SIGINT, before)


COMMAND = ["optimize", "model.py:block", "--target", "torch", "-o", "out", "--json"]


def hits(times: int = 1) -> Callable[..., Any]:
    """Ctrl-C before a function runs for the first time."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        left = [times]

        def hit(*args: Any, **options: Any) -> Any:
            while left[0]:
                left[0] -= 1
                signal.raise_signal(signal.SIGINT)
            return real(*args, **options)

        return hit

    return around


# phase -> the function that Ctrl-C meets on its way in
PHASES: dict[str, tuple[Any, str]] = {
    "closure": (setup, "close"),
    "kernels": (setup, "partition_with_ahead"),
    "choosing": (setup, "build"),
    "verification": (pipeline, "verify"),
    "emission": (pipeline, "emit"),
    "proof": (pipeline, "proved"),
    "bounds": (pipeline, "bounds_tier"),
    "numerics": (pipeline, "numeric_tier"),
    "caching": (Cache, "put"),
    "saving": (Result, "save"),
}


def left_behind(folder: Path) -> list[str]:
    """Drafts and parts of results, anywhere."""
    return [
        str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name.startswith((".out", ".new", ".old", ".mug"))
    ]


def whole_or_absent(folder: Path, *, saved: bool) -> None:
    assert left_behind(folder) == []
    assert (folder / "out").exists() == saved
    if saved:
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        assert {p.name for p in (folder / "out").iterdir()} == {*manifest["files"], "manifest.json"}
        load(folder / "out")
    entries = [p for p in (folder / "cache").glob("*") if p.is_dir()] if (folder / "cache").exists() else []
    assert len(Cache(folder / "cache").ls()) == len(entries)


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_in_each_phase_saves_the_best_so_far(
    phase: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = PHASES[phase]
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(module, name, hits()(getattr(module, name)))
    code = main(COMMAND)
    printed, narrated = capsys.readouterr()
    assert signal.getsignal(signal.SIGINT) is before
    assert code == 130, narrated
    data = json.loads(printed)
    assert data["interrupted"] is True
    assert "interrupted: this is the best so far" in narrated
    whole_or_absent(folder, saved=True)
    cached = list(Cache(folder / "cache").ls())
    assert bool(cached) == (phase in ("caching", "saving"))  # else another run would find or establish more
    if phase in ("closure", "kernels"):
        assert data["stop"] == "Interrupted"
    assert main(["verify", "out"]) == 0


def test_a_ctrl_c_in_the_search_skips_the_checks_after_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("proved", "bounds_tier", "numeric_tier"):
        monkeypatch.setattr(pipeline, name, lambda *_: pytest.fail("a check after Ctrl-C"))
    monkeypatch.setattr(setup, "close", hits()(setup.close))
    assert main(COMMAND) == 130
    data = json.loads(capsys.readouterr()[0])
    assert data["tiers"] == ["tested"]
    assert any("interrupted before" in n for n in data["notes"])


def interrupted_after(delay: float, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Sends Ctrl-C so many seconds into the search of a large program; False where that ended before."""
    sent = list[float]()

    def interrupt() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer, real = threading.Timer(delay, interrupt), pipeline.search

    def search(*args: Any, **options: Any) -> Any:  # from its start on, Ctrl-C is caught
        timer.start()
        try:
            return real(*args, **options)
        finally:
            timer.cancel()
            timer.join()

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "search", search)
        result = pipeline.optimize(mlps(15), target="cuda:90", cache=cache)
    ended = time.perf_counter()
    if not sent:
        return False
    assert ended - sent[0] < 6  # a second or two, on a busy machine
    assert result.interrupted
    assert "tested" in result.certificate.tiers
    assert cache.ls() == []
    return True


@pytest.mark.parametrize("delay", [0.05, 0.8])
def test_ctrl_c_ends_the_search_of_a_large_program_soon(
    delay: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted_after(delay, Cache(tmp_path), monkeypatch)


@pytest.mark.full
def test_ctrl_c_ends_the_search_soon_whenever_it_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From half a second on, by steps of half a second, until the search ends before."""
    delays = itertools.takewhile(
        lambda d: interrupted_after(d, Cache(tmp_path / str(d)), monkeypatch), itertools.count(0.5, 0.5)
    )
    assert len(list(delays)) > 1


@pytest.mark.parametrize("phase", ["closure", "kernels", "verification", "caching", "saving"])
def test_a_second_ctrl_c_quits_and_leaves_nothing(
    phase: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = PHASES[phase]
    monkeypatch.setattr(module, name, hits(2)(getattr(module, name)))
    assert main(COMMAND) == 130
    printed, narrated = capsys.readouterr()
    assert printed == ""
    assert "nothing was saved" in narrated
    whole_or_absent(folder, saved=False)


def test_without_ctrl_c_the_result_is_cached(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    assert json.loads(capsys.readouterr()[0])["interrupted"] is False
    assert len(list(Cache(folder / "cache").ls())) == 1
    whole_or_absent(folder, saved=True)


def optimising(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MUGRAPH_CACHE_DIR": str(folder / "cache")}
    line = [sys.executable, "-m", "mugraph", *COMMAND]
    return subprocess.Popen(
        line, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip


def lines_until(run: subprocess.Popen[str], part: str) -> Iterator[str]:
    """Lines of stderr until one holds a text."""
    assert run.stderr is not None
    for line in run.stderr:
        yield line
        if part in line:
            return


def test_sigint_ends_a_process_cleanly(folder: Path) -> None:
    run = optimising(folder)
    told = list(lines_until(run, "searching"))
    run.send_signal(signal.SIGINT)
    printed, rest = run.communicate(timeout=120)
    assert run.returncode == 130, rest
    assert "Traceback" not in "".join(told) + rest
    assert json.loads(printed)["interrupted"] is True
    whole_or_absent(folder, saved=True)


@pytest.mark.full
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0])
def test_sigint_at_any_time_leaves_nothing_half_written(delay: float, folder: Path) -> None:
    run = optimising(folder)
    time.sleep(delay)
    run.send_signal(signal.SIGINT)
    printed, rest = run.communicate(timeout=300)
    assert run.returncode in (0, 130, -signal.SIGINT), rest  # the last: before the program has begun
    whole_or_absent(folder, saved=bool(printed))
