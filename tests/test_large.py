"""Large programs through the whole path: the same result wherever segments are searched, and runs that go on."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mugraph.errors import SettingError
from mugraph.pipeline import optimize
from mugraph.result import Result
from mugraph.runtime.cache import Cache
from mugraph.runtime.engine import Here, Job, Stop, engine_of
from mugraph.runtime.engine import Result as Data
from mugraph.search.report import SearchReport
from mugraph.search.space import SearchSpace
from tests.search.layers import mlps

SPACE = SearchSpace(sizes=(), states=500, entries=20_000, operators=8)


class Counting(Here):
    """Counts jobs; sends Ctrl-C after some of them."""

    def __init__(self, interrupt_after: int = 1_000) -> None:
        self.done, self.limit = 0, interrupt_after

    def run(self, jobs: Sequence[Job], stop: Stop) -> Iterator[tuple[int, Data | None]]:
        for number, result in super().run(jobs, stop):
            self.done += 1
            yield number, result
            if self.done == self.limit:
                os.kill(os.getpid(), signal.SIGINT)


def report(result: Result) -> SearchReport:
    assert isinstance(result.report, SearchReport)
    return result.report


def texts(result: Result) -> dict[str, str]:
    """The files, but for times."""
    return {name: text for name, text in result.files().items() if name != "report.json"}


def test_the_result_is_the_same_whatever_the_engine(tmp_path: Path) -> None:
    here = optimize(mlps(1), target="torch", space=SPACE, cache=Cache(tmp_path / "one"))
    with engine_of("processes", workers=2) as two:
        there = optimize(mlps(1), target="torch", space=SPACE, cache=Cache(tmp_path / "two"), engine=two)
    assert here.certificate.tiers == ("tested", "proved", "numerics")
    assert here.certificate.cuts
    assert report(here).segments
    assert report(here) == report(there)
    assert texts(here) == texts(there)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    first, second, third = Counting(interrupt_after=1), Counting(), Counting()
    broken = optimize(mlps(1), target="torch", space=SPACE, cache=cache, engine=first)
    assert broken.interrupted
    assert report(broken).stop.kind == "Interrupted"
    assert len(cache.jobs.ls()) == 1
    assert cache.ls() == []
    whole = optimize(mlps(1), target="torch", space=SPACE, cache=cache, engine=second)
    assert not whole.interrupted
    fresh = optimize(mlps(1), target="torch", space=SPACE, cache=Cache(tmp_path / "other"), engine=third)
    assert second.done == third.done - 1
    assert report(whole) == report(fresh)
    assert texts(whole) == texts(fresh)


@pytest.mark.full
def test_another_program_takes_the_segments_that_it_shares(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    optimize(mlps(2), target="torch", space=SPACE, cache=Cache(tmp_path), engine=first)
    optimize(mlps(3), target="torch", space=SPACE, cache=Cache(tmp_path), engine=second)
    assert first.done > 0
    assert second.done == 0


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(SettingError, match="cluster"):
        optimize(mlps(1), target="torch", space=SPACE, engine="cluster")  # type: ignore[arg-type]
