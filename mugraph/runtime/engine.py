"""Where pure jobs run: here, in other processes, or on a Ray cluster.

    job = Job("module:function", request)                 request and result are JSON data, nothing else matters
    with engine_of("processes", workers=2) as engine:
        results = completed(engine, jobs, store, stop)

A result depends on the job alone, so it does not matter where it was computed, and it is kept under a hash of the job
and of mugraph's own code.  What a run had done when it was interrupted is there for the next one.  A worker that is
lost costs its job one attempt; after the last one the job runs here, where an error shows itself.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

from mugraph.errors import MugraphError, SettingError
from mugraph.runtime.cache import Cache
from mugraph.runtime.process import Worker, WorkerError

ATTEMPTS = 2  # of a job by workers, before it runs here
PATIENCE = 3600.0  # seconds for one job, before its worker counts as lost
POLL = 0.1  # seconds between two looks at whether to stop

EngineName = Literal["here", "processes", "ray"]
Result = dict[str, Any]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class Job:
    """A call of `function(request, stop)` in `module`, which returns JSON data, or None if it has no result.  What the
    function gives depends on the request alone, unless `stop` ends it: then the result says `"whole": false`."""

    run: str
    request: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """64 hexadecimal digits that name the result."""
        text = json.dumps([code_version(), self.run, self.request], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@lru_cache
def code_version() -> str:
    """A digest of mugraph's source files: other code, other results."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def compute(run: str, request: Mapping[str, Any], stop: Stop = lambda: False) -> Result | None:
    """Does a job, in this process."""
    module, _, function = run.partition(":")
    result: Result | None = getattr(importlib.import_module(module), function)(request, stop)
    return result


@runtime_checkable
class Engine(Protocol):
    """Runs jobs; a context manager, whose end gives back what it holds."""

    def run(self, jobs: Sequence[Job], stop: Stop) -> Iterator[tuple[int, Result | None]]:
        """The number and the result of each job, in whatever order they come; fewer, once `stop` says so."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def checked_engine(name: str) -> str:
    """The name.  Raises SettingError where there is no such engine, MugraphError where Ray is not installed."""
    if name not in get_args(EngineName):
        raise SettingError(f"there is no engine {name!r}", remedy=f"known: {', '.join(get_args(EngineName))}")
    if name == "ray" and sys.modules.get("ray") is None and find_spec("ray") is None:
        raise SettingError("the engine ray needs Ray", remedy="pip install 'mugraph[ray]'")
    return name


def engine_of(name: str | None = None, workers: int | None = None, address: str | None = None) -> Engine:
    """The engine of that name ("here" where there is none).  Raises SettingError for what does not fit together, and
    MugraphError where Ray is not installed."""
    chosen = checked_engine("here" if name is None else name)
    if workers is not None and (chosen == "here" or workers < 1):
        raise SettingError(f"engine {chosen} with {workers} workers", remedy="give processes or ray, and at least 1")
    if address is not None and chosen != "ray":
        raise SettingError(f"engine {chosen} has no address", remedy="give engine ray")
    if chosen == "processes":
        return Processes(workers or os.cpu_count() or 1)
    return Ray(address, workers) if chosen == "ray" else Here()


def completed(
    engine: Engine, jobs: Sequence[Job], store: Cache | None = None, stop: Stop = lambda: False
) -> list[Result | None]:
    """The results, in the order of the jobs; None for one that has none, or was stopped.  Each is stored as it comes,
    and one that is stored already is not computed; equal jobs are one."""
    found: dict[str, Result | None] = {}
    wanted = {job.key: job for job in jobs}
    for key in wanted if store else ():
        assert store is not None
        if (entry := store.get(key)) is not None:
            found[key] = json.loads(entry.text("result.json"))
    missing = [job for key, job in wanted.items() if key not in found]
    for number, result in engine.run(missing, stop) if missing else ():
        found[missing[number].key] = result
        if store is not None and (result is None or result.get("whole", True)) and not (result is None and stop()):
            store.put(missing[number].key, {"result.json": json.dumps(result)}, {"job": missing[number].run})
    return [found.get(job.key) for job in jobs]


@dataclass
class Here:
    """One job after the other, in this process."""

    def run(self, jobs: Sequence[Job], stop: Stop) -> Iterator[tuple[int, Result | None]]:
        for number, job in enumerate(jobs):
            if stop():
                return
            yield number, compute(job.run, job.request, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


@dataclass
class Processes:
    """Worker processes on this machine, each with a thread here that talks to it."""

    workers: int
    pool: list[Worker] = field(default_factory=list)

    def run(self, jobs: Sequence[Job], stop: Stop) -> Iterator[tuple[int, Result | None]]:
        waiting: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # job, attempts before
        answers: queue.SimpleQueue[tuple[int, int, Result | WorkerError | None]] = queue.SimpleQueue()
        for number in range(len(jobs)):
            waiting.put((number, 0))
        ended = threading.Event()
        while len(self.pool) < min(self.workers, len(jobs)):
            self.pool.append(Worker())

        def attend(worker: Worker) -> None:
            while not ended.is_set():
                try:
                    number, before = waiting.get(timeout=POLL)
                except queue.Empty:
                    continue
                job, answer = jobs[number], None
                try:
                    answer = worker.ask("job", {"run": job.run, "request": dict(job.request)}, PATIENCE)
                except WorkerError as error:
                    answer = error
                answers.put((number, before + 1, answer))

        threads = [threading.Thread(target=attend, args=(w,), daemon=True) for w in self.pool]
        for thread in threads:
            thread.start()
        left = len(jobs)
        try:
            while left and not stop():
                try:
                    number, attempts, answer = answers.get(timeout=POLL)
                except queue.Empty:
                    continue
                if isinstance(answer, WorkerError) and attempts < ATTEMPTS:
                    waiting.put((number, attempts))
                    continue
                left -= 1
                if isinstance(answer, WorkerError):
                    answer = compute(jobs[number].run, jobs[number].request, stop)
                yield number, answer
        finally:
            ended.set()
            while any(thread.is_alive() for thread in threads):
                for worker in self.pool if left else ():
                    worker.kill()  # what is under way is not waited for
                threads[0].join(POLL)
                threads = [t for t in threads if t.is_alive()]

    def close(self) -> None:
        for worker in self.pool:
            worker.close()
        self.pool.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Ray:
    """A Ray cluster: the one at `address`, or one of `workers` processes on this machine.  A cluster's machines need
    mugraph installed, in the same version."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        checked_engine("ray")
        import ray

        self.ray: Any = ray
        self.own = not ray.is_initialized()
        if not self.own and address is not None:
            raise MugraphError("this process is connected to a Ray cluster already", remedy="give no address")
        if self.own and address is not None:
            _reach(address)
        if self.own:
            paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ours = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}} if address is None else None
            local = {"num_cpus": workers, "include_dashboard": False} if address is None else {}
            try:
                ray.init(address=address, runtime_env=ours, log_to_driver=False, logging_level="error", **local)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise MugraphError(
                    f"no Ray cluster at {address}: {error}", remedy="start one: ray start --head"
                ) from None
        self.remote = ray.remote(compute).options(max_retries=ATTEMPTS - 1)

    def run(self, jobs: Sequence[Job], stop: Stop) -> Iterator[tuple[int, Result | None]]:
        ray = self.ray
        left = {self.remote.remote(job.run, dict(job.request)): number for number, job in enumerate(jobs)}
        try:
            while left and not stop():
                ready, _ = ray.wait(list(left), num_returns=1, timeout=POLL)
                for reference in ready:
                    number = left.pop(reference)
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayError:  # lost, or wrong: here it shows which
                        result = compute(jobs[number].run, jobs[number].request, stop)
                    yield number, result
        finally:
            for reference in left:
                ray.cancel(reference, force=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.own:
            self.ray.shutdown()


def _reach(address: str) -> None:
    """Raises MugraphError where nothing listens at `host:port`; Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        remedy = "start one (ray start --head), and give its host:port"
        raise MugraphError(f"no Ray cluster at {address}: {error}", remedy=remedy) from None
