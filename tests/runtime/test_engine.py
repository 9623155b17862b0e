"""Engines: the same results wherever jobs run, none lost with a worker or by Ctrl-C, none computed twice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mugraph.errors import CacheWarning, MugraphError, SettingError
from mugraph.runtime.cache import Cache
from mugraph.runtime.engine import Engine, Job, Processes, completed, engine_of

ROOT = Path(__file__).parents[2]
JOBS = "tests.runtime.jobs:"


def squares(count: int = 4, log: Path | None = None, function: str = "squared") -> list[Job]:
    return [Job(JOBS + function, {"x": x, "log": str(log) if log else None}) for x in range(count)]


def lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


@pytest.fixture(scope="module")
def two() -> Iterator[Engine]:
    """Two local workers."""
    with engine_of("processes", workers=2) as engine:
        yield engine


# -- the same results


def test_workers_give_what_this_process_gives(two: Engine) -> None:
    with engine_of() as here:
        assert (
            completed(two, squares())
            == completed(here, squares())
            == [{"square": x * x, "numbers": [0.1, x / 3]} for x in range(4)]
        )


def test_several_processes_do_the_work(two: Engine, tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [Job(JOBS + "slow", {"x": x, "seconds": 0.3, "log": str(log)}) for x in range(4)]
    completed(two, jobs)
    processes = {line.split()[1] for line in lines(log)}
    assert len(processes) == 2
    assert str(os.getpid()) not in processes


def test_a_job_without_a_result_has_none(two: Engine) -> None:
    assert completed(two, [Job(JOBS + "nothing", {})]) == [None]


def test_an_error_in_a_job_comes_out_as_it_is(two: Engine) -> None:
    with pytest.raises(ValueError, match="no square of 7"):
        completed(two, [Job(JOBS + "wrong", {"x": 7})])


# -- lost workers


@pytest.mark.parametrize("deaths", [1, 2, 5])
def test_a_lost_worker_loses_no_result(two: Engine, tmp_path: Path, deaths: int) -> None:
    request = {"x": 3, "marks": str(tmp_path), "home": os.getpid(), "deaths": deaths}
    jobs = [*squares(3), Job(JOBS + "fragile", request), *squares(5)]
    assert [r and r["square"] for r in completed(two, jobs)] == [0, 1, 4, 9, 0, 1, 4, 9, 16]
    assert len(list(tmp_path.iterdir())) == min(deaths, 2)  # two attempts by workers, then here


# -- the store


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Cache(tmp_path / "cache")
    with engine_of() as here:
        first = completed(here, squares(3, log), store)
        assert completed(here, squares(4, log), store)[:3] == first
    assert [line.split()[0] for line in lines(log)] == ["0", "1", "2", "3"]


def test_equal_jobs_are_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with engine_of() as here:
        assert len(completed(here, squares(2, log) * 3)) == 6
    assert len(lines(log)) == 2


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Cache(tmp_path / "cache")
    with engine_of() as here:
        first = completed(here, squares(1, log), store)
        (store.path / squares(1, log)[0].key / "result.json").write_text("{}")
        with pytest.warns(CacheWarning):
            assert completed(here, squares(1, log), store) == first
    assert len(lines(log)) == 2


def test_another_request_or_function_is_another_result() -> None:
    keys = {j.key for j in (*squares(3), Job(JOBS + "slow", {"x": 0, "log": None}), Job(JOBS + "squared", {"x": 0}))}
    assert len(keys) == 5


def test_what_was_cut_short_is_not_stored(tmp_path: Path) -> None:
    store = Cache(tmp_path)
    looks = iter([False, True])
    with engine_of() as here:
        completed(here, squares(1, function="cut_short"), store, lambda: next(looks, True))
    assert store.ls() == []


def test_results_of_jobs_go_with_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with engine_of() as here:
        completed(here, squares(2), cache.jobs)
    assert len(cache.jobs.ls()) == 2
    assert cache.ls() == []
    cache.clear()
    assert cache.jobs.ls() == []


# -- stopping


def test_a_stopped_engine_hands_out_what_it_has(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with engine_of("processes", workers=1) as engine:
        jobs = [*squares(1, log), Job(JOBS + "slow", {"x": 9, "seconds": 60.0})]
        started = time.monotonic()
        assert completed(engine, jobs, stop=lambda: bool(lines(log)))[1] is None
        assert time.monotonic() - started < 30


def test_ctrl_c_saves_what_is_done_and_a_second_run_goes_on(tmp_path: Path) -> None:
    log, store = tmp_path / "log", Cache(tmp_path / "cache")
    command = [sys.executable, "-m", "tests.runtime.interrupted", str(store.path), str(log)]
    process = subprocess.Popen([*command, "0.5"], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(store.ls()) < 2:
        assert process.poll() is None, "it ended before it was interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: workers get it too
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    kept = len(store.ls())
    assert "None" in out
    assert 2 <= kept < 6
    done = {line.split()[0] for line in lines(log)}
    log.unlink()
    again = subprocess.run([*command, "0.5"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert again.stdout.splitlines()[-1] == "[0, 1, 4, 9, 16, 25]"
    assert len(lines(log)) == 6 - kept
    assert len(done) >= kept


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cluster"}, "no engine 'cluster'"),
        ({"name": "processes", "workers": 0}, "0 workers"),
        ({"workers": 2}, "2 workers"),
        ({"name": "processes", "address": "auto"}, "no address"),
    ],
)
def test_what_does_not_fit_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        engine_of(**options)


def test_the_error_names_the_extra_where_ray_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MugraphError, match=r"mugraph\[ray\]"):
        engine_of("ray")


def test_the_number_of_workers_is_that_of_the_machine() -> None:
    engine = engine_of("processes")
    assert isinstance(engine, Processes)
    assert engine.workers == os.cpu_count()


# -- Ray


def test_an_address_where_no_cluster_is_is_refused() -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mugraph[ray]'")
    with pytest.raises(MugraphError, match="no Ray cluster"):
        engine_of("ray", address="127.0.0.1:1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Engine]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mugraph[ray]'")
    with engine_of("ray", workers=2) as engine:
        yield engine


def test_ray_gives_what_this_process_gives(cluster: Engine) -> None:
    with engine_of() as here:
        assert completed(cluster, squares()) == completed(here, squares())


@pytest.mark.parametrize("deaths", [1, 5])
def test_ray_loses_no_result_with_a_worker(cluster: Engine, tmp_path: Path, deaths: int) -> None:
    request = {"x": 3, "marks": str(tmp_path), "home": os.getpid(), "deaths": deaths}
    jobs = [*squares(3), Job(JOBS + "fragile", request)]
    assert [r and r["square"] for r in completed(cluster, jobs)] == [0, 1, 4, 9]


def test_an_error_comes_out_of_ray_as_it_is(cluster: Engine) -> None:
    with pytest.raises(ValueError, match="no square of 7"):
        completed(cluster, [Job(JOBS + "wrong", {"x": 7})])


def test_a_second_cluster_is_refused(cluster: Engine) -> None:
    with pytest.raises(MugraphError, match="already"):
        engine_of("ray", address="auto")
