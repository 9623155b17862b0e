"""The whole path: program -> search -> stabilised, verified μGraph -> emitted source -> numeric check -> callable.

This is the one module that knows every stage.  `superoptimize` is defined here.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mugraph import settings
from mugraph.codegen.indirect import access_by_index
from mugraph.codegen.lower import lower, refuse_packed
from mugraph.codegen.plan import Trace
from mugraph.codegen.stabilise import stabilise
from mugraph.errors import (
    CacheWarning,
    CompileError,
    MugraphError,
    SettingError,
    UnsupportedOpError,
    VerificationError,
)
from mugraph.ir.axes import dims_of, representative
from mugraph.ir.check import check
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel
from mugraph.ir.printer import canonical_text
from mugraph.ir.resize import limited, reduction, resized
from mugraph.ir.threads import form_threads
from mugraph.ir.types import DType
from mugraph.result import (
    AS_IT_STANDS,
    CALLS,
    COMPILED,
    FOUND,
    ReportText,
    Result,
    device_is_there,
    device_name,
    read,
    versions,
)
from mugraph.runtime.bench import Spread, random_inputs
from mugraph.runtime.cache import Cache, key_of
from mugraph.runtime.choose import Candidate, choose, machine_text
from mugraph.runtime.compile import shared_compilers
from mugraph.runtime.engine import Engine, EngineName, Job, checked_engine, code_version, completed, engine_of
from mugraph.runtime.load import load_module
from mugraph.runtime.timing import DeviceTimer, Records, Timer
from mugraph.runtime.tune import AS_LOWERED, REPEATS, RULES, Tuned, Tuner, fastest_by_size
from mugraph.search.build import baseline
from mugraph.search.cost import CPU, Device, device
from mugraph.search.driver import search, searched
from mugraph.search.report import Asked, SearchReport, StopReason
from mugraph.search.segments import Done, Task, nestings
from mugraph.search.space import SearchSpace, space_of
from mugraph.search.summary import unsearched
from mugraph.settings import Effort, Tune
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler import triton as triton_code
from mugraph.transpiler.target import Target, parse_target
from mugraph.typed import Probability, fit_arguments
from mugraph.verify.bounds import Bounds, in_bounds
from mugraph.verify.certificate import How, NumericReport
from mugraph.verify.equivalence import Verified, proved, shared_values, verify, verify_as_given
from mugraph.verify.numeric import OFFSET, Checked, numeric_check

if TYPE_CHECKING:
    pass

DELTA = 2.0**-40
TF32_UNIT = 2.0**-10  # an operand keeps 10 bits of its fraction
F8_UNIT = 2.0**-13  # sm_90 sums products of f8 with 14 bits (DeepSeek-V3 technical report, 3.3.2)
MEASURED_DRAWS = ("normal", "wide", "rows")  # equal elements are where sums that were multiplied out cancel
MOST_REFUSED = 3  # plans whose source disagrees with float64, before the program runs as library calls
_log = logging.getLogger("mugraph.pipeline")


# -- the path


def optimize(
    program: Program,
    *,
    target: str | Target | None = None,
    space: SearchSpace | None = None,
    effort: Effort | None = None,
    tune: Tune | None = None,
    budget_seconds: float | None = None,
    delta: Probability = DELTA,
    seed: int | None = None,
    cache: Cache | None = None,
    engine: Engine | EngineName | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Search, stabilise, verify, emit, check; from the cache where it was done before.

    A large program is searched in segments; `engine` says where ("here", "processes", "ray", or one from `engine_of`).
    What is done of them is kept in the cache, so that an interrupted run goes on where it was.  The result is the same
    whatever the engine.

    Ctrl-C (or the end of the budget) stops the search with the best so far; a second Ctrl-C during the search quits.
    Ctrl-C after the search ends the checks: the result then says which tiers it reached.  Only a result that another
    run would find again is kept in the cache.  Where the emitted source disagrees with float64, the next plan is tried
    (of MOST_REFUSED such plans); where none is left, or the search cannot handle the program, it runs as library
    calls.  A note says why.  Products of f32 keep all their bits, unless the target asks otherwise (`cuda:90+tf32`).
    `effort` names a space where none is given: "none" searches nothing, and the program runs as library calls.
    `tune` says how the launch parameters of kernels are chosen (`runtime/tune.py`): "none" as lowered, "fit" (the
    default) so that no kernel spills in a loop, "model" and "measure" so that it is fast.  For the target `torch`,
    "measure" compares what was found with the program as it stands on this CPU, each eagerly and through
    `torch.compile`, at the size `space.symbolic` of symbolic dimensions.  What is not surely faster than the program as
    it stands does not run; `Result.choice` says what was measured.
    Raises GraphError for a malformed program, UnsupportedOpError where the target has no form for an operator or
    storage,
    VerificationError where no candidate passes, UnknownTargetError for an unknown target, SettingError for another
    argument that has a type or a value that it does not take.
    """
    chosen = parse_target(target)
    options = checked_options(
        program=program,
        space=space,
        effort=effort,
        tune=tune,
        budget_seconds=budget_seconds,
        delta=delta,
        seed=seed,
        cache=cache,
        engine=engine,
        say=say,
    )
    return _found(program, chosen, options)


def optimize_beside(program: Program, written: Written, **options: Any) -> Result:
    """`optimize`, with what its author wrote measured as the program as it stands."""
    checked = checked_options(program=program, **options)
    return _found(program, parse_target(options.get("target")), checked, written)


def optimize_calls(program: Program, **options: Any) -> Result:
    """`optimize` for the target `torch`, as a CPU runs it: plans are calls of PyTorch, and the cheapest ones are found
    by the prices of a CPU.  The result is `unchanged` where these are the calls of the program as it stands."""
    checked = checked_options(program=program, **options)
    return _found(program, parse_target("torch"), checked, on=device(CPU))


def _found(
    program: Program,
    chosen: Target,
    options: Mapping[str, Any],
    written: Written | None = None,
    on: Device | None = None,
) -> Result:
    """`optimize` with its checked options; `on`: the device that plans are priced for."""
    check(program)
    on = on or device(device_name(chosen))
    cache, engine, say = options.get("cache"), options.get("engine"), options.get("say") or (lambda _: None)
    refuse_packed(program)
    space, budget, number, delta = (options[n] for n in ("space", "budget_seconds", "seed", "delta"))
    level: Tune = options["tune"] if chosen.kind == "triton" else "none"
    measuring = options["tune"] == "measure" and chosen.kind == "torch"
    program = program if space.ahead else program.without_constants()
    store = cache if cache is not None else Cache()
    key = key_of(
        f"{canonical_text(program)}\n{program}",
        {
            "space": str(space),
            "delta": delta,
            "seed": number,
            "device": on.digest,
            "tune": [level, *(f"{f.__module__}.{f.__qualname__}" for f in RULES)],
        }
        | ({"measured on": f"{machine_text()} {written.digest if written else ''}"} if measuring else {}),
        str(chosen),
        dict(versions()) | {"code": code_version()},
    )
    if not settings.skip_cache.get() and not settings.force_search.get():
        found = _from_cache(store, key, chosen)
        if found is not None:
            return found
    if settings.disallow_search.get():
        raise MugraphError(
            f"{program.name} is not in the cache, and MUGRAPH_DISALLOW_SEARCH forbids a search",
            remedy="optimize it ahead of time with the same cache directory",
        )
    jobs = None if settings.skip_cache.get() or settings.force_search.get() else store.jobs
    with engine_of(engine) if engine is None or isinstance(engine, str) else nullcontext(engine) as running:
        result = _optimized(program, chosen, on, space, level, budget, delta, number, running, jobs, say)
        if measuring and not result.interrupted:
            try:
                calls = _optimized(
                    program, chosen, device(CPU), space, level, budget, delta, number, running, jobs, say
                )
                result = _measured(result, calls, space, delta, number, written, say)
            except KeyboardInterrupt:
                result = replace(result, interrupted=True, notes=(*result.notes, "interrupted before it was measured"))
    report = result.report
    reproducible = not isinstance(report, SearchReport) or report.stop.reproducible
    if not settings.skip_cache.get() and reproducible and not result.interrupted:
        with interruptible() as interrupted:  # what was found is kept, whatever comes
            entry = store.put(key, result.files(), {"notes": list(result.notes), "target": str(chosen)})
        result = replace(result, directory=entry.path if entry else None, interrupted=interrupted())
    if settings.print_output_code.get():
        say(result.source)
    return result


def checked_options(**given: Any) -> dict[str, Any]:
    """Arguments of `optimize` by name, as it takes them: `space`, `budget_seconds` and `seed` where they are not given
    as well.  Raises UnknownTargetError, SettingError, and MugraphError for an engine that is not installed."""
    target = given.get("target")
    if target not in (None, "cuda", "triton"):  # these ask for the device that is there
        parse_target(target)
    found = fit_arguments(optimize, given | dict.fromkeys(("target", "tune", "budget_seconds", "seed") & given.keys()))
    if isinstance(engine := given.get("engine"), str):
        checked_engine(engine)
    if given.get("space") is not None and given.get("effort") is not None:
        raise SettingError("both space and effort are given", remedy="give one: an effort is the name of a space")
    return (
        {"delta": DELTA}
        | found
        | {
            "target": target,
            "tune": settings.tune.get(given.get("tune")),
            "space": given.get("space") or space_of(settings.effort.get(given.get("effort"))),
            "budget_seconds": settings.budget_seconds.get(given.get("budget_seconds")),
            "seed": settings.seed.get(given.get("seed")),
        }
    )


def _from_cache(store: Cache, key: str, target: Target) -> Result | None:
    entry = store.get(key)
    if entry is None:
        return None
    try:
        files = {name: entry.text(name) for name in entry.files}
        found = read(files, target, tuple(entry.meta.get("notes", ())))
    except (MugraphError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        import warnings

        warnings.warn(CacheWarning(f"the cache entry {entry.path} cannot be read: {error}"), stacklevel=3)
        return None
    return replace(found, cached=True, directory=entry.path)


def _optimized(
    program: Program,
    target: Target,
    on: Device,
    space: SearchSpace,
    level: Tune,
    budget: float,
    delta: float,
    seed: int,
    engine: Engine,
    jobs: Cache | None,
    say: Callable[[str], None],
) -> Result:
    started = time.perf_counter()

    def tell(text: str) -> None:
        say(f"[{time.perf_counter() - started:.1f}s] {text}")
        _log.info(text)

    refused: dict[str, VerificationError] = {}  # graphs whose source disagrees with float64

    def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> tuple[Verified, str]:
        if error := refused.get(str(graph)):
            raise error
        if len(refused) >= MOST_REFUSED and graph.kernels():
            raise VerificationError(f"not tried after {MOST_REFUSED} plans that disagree with float64")
        return accepted(program, graph, target, delta, seed, cuts)

    def solve(tasks: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
        tell(f"searching {len(tasks)} segments")
        options = {"target": str(target), "delta": delta, "seed": seed}
        wanted = [Job("mugraph.pipeline:search_segment", t.to_dict() | options) for t in tasks]
        results = completed(engine, wanted, jobs, stop)
        return [Done.from_dict(r) if r and r.get("graph") else None for r in results]

    left = budget
    while True:
        with interruptible() as interrupted:
            tell(f"searching {program.name} for {target}")  # from here on Ctrl-C leaves the best so far
            try:
                found = search(
                    program,
                    accept=accept,
                    space=space.but(sizes=()),  # one structure serves all sizes: the one for `symbolic`
                    on=on,
                    budget_seconds=left,
                    interrupted=interrupted,
                    accept_cut=accept,
                    solve=solve,
                )
            except (RecursionError, ZeroDivisionError) as error:
                why = _unsearchable(error)
                tell(f"no search: {why}")
                graph: KernelGraph = baseline(program)
                verified, source = accept(graph)
                report = unsearched(program, space_of("none"), on, StopReason("Unsearchable"), why)
                notes: tuple[str, ...] = (f"{why}: it runs as library calls",)
            else:
                assert isinstance(found.accepted, tuple)
                graph, (verified, source) = found.graph, found.accepted
                report = replace(found.report, asked=Asked(program, on, verify_as_given))
                notes = report.notes
                tell(f"found: {found.report.predicted_seconds * 1e6:.1f} µs predicted; verified, error <= {delta:.1e}")
            stopped = interrupted() or report.stop.kind == "Interrupted"
        if refused:
            notes = (*notes, f"{len(refused)} cheaper plans were refused: {next(iter(refused.values())).message}")
        try:
            tuning = partial(tuned, target=target, level=level, symbolic=space.symbolic)
            result = _checked(
                verified, source, target, seed, report, notes, tell, stopped, tuning, offset=not space.differences
            )
            return never_slower(result, level, space, delta, seed)
        except VerificationError as error:
            if report.candidates[-1].verdict == "chosen":  # the program as it stands
                raise
            tell(f"refused: {error.message}")
            refused[str(graph)] = error
            left = max(0.0, budget - (time.perf_counter() - started))


def by_size(result: Result, sizes: Sequence[int], arches: Sequence[int] = ()) -> dict[tuple[int, int], Result]:
    """The results for ranges of the symbolic size, by their first and last size.

    Structures are searched for at these sizes and at the one that the result is for; each then serves the sizes
    next to its own, by the model of the device.  The program as library calls is among the candidates, and serves where
    a kernel does not compile for `arches` at some size of its range.  Where the result was tuned by measurement and the
    device is there, all are timed at these sizes and at the ends of ranges; the fastest at one serves the sizes from
    the one before.  Raises SettingError unless the program has one
    symbolic size, in whose range `sizes` are, VerificationError where a source disagrees with float64, MugraphError
    where MUGRAPH_DISALLOW_SEARCH is set."""
    program, target, c = result.program, result.target, result.certificate
    if len(program.dims()) != 1:
        raise SettingError(
            f"{program.name} has {len(program.dims())} symbolic sizes", remedy="ranges are of one: leave out sizes"
        )
    if settings.disallow_search.get():
        raise MugraphError(
            f"MUGRAPH_DISALLOW_SEARCH forbids a search for other sizes of {program.name}", remedy="leave out sizes"
        )
    (dim,) = program.dims()
    if odd := [n for n in sizes if not dim.min <= n <= dim.max]:
        raise SettingError(f"{dim} is never {odd[0]}", remedy=f"give sizes from {dim.min} to {dim.max}")

    def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> tuple[Verified, str]:
        return accepted(program, graph, target, 2.0**c.delta_requested_log2, c.seed, cuts)

    space = SearchSpace(sizes=tuple(sizes))
    found = search(program, accept=accept, accept_cut=accept, space=space, on=device(device_name(target)))
    results = {}
    for s in found.structures:
        low, high = max(s.low, dim.min), min(s.high or dim.max, dim.max)
        if low <= high:
            assert isinstance(s.accepted, tuple)
            verified, source = s.accepted
            report = ReportText({"text": f"{dim} = {low}..{high}: {s.text}, {1e6 * s.seconds:.1f} µs at {s.at}"})
            tuning = partial(tuned, target=target, level=result.tuning.level, symbolic=s.at)
            found_here = _checked(verified, source, target, c.seed, report, tuning=tuning)
            results[low, high] = _compiling(found_here, (dim.name, low, high), arches)
    if result.tuning.level == "measure" and device_is_there(target):
        results = _fastest_ranges(result, results, sizes, arches)
    return results


def _fastest_ranges(
    result: Result, ranges: Mapping[tuple[int, int], Result], sizes: Sequence[int], arches: Sequence[int]
) -> dict[tuple[int, int], Result]:
    """The results by what was measured; as they were where nothing could be timed up to some size."""
    program, target, c = result.program, result.target, result.certificate
    (dim,) = program.dims()
    stands = _as_it_stands(result, SearchSpace(), 2.0**c.delta_requested_log2, c.seed)
    rivals = list({r.source: r for r in (stands, result, *ranges.values())}.values())
    at = sorted({*sizes, *(high for _, high in ranges)})
    best, notes = fastest_by_size([r.source for r in rivals], at, lambda n: _timer(program, target, "measure", n))
    found: list[tuple[int, int, Result]] = []
    for n in at:
        as_predicted = next(r for (first, last), r in ranges.items() if first <= n <= last)
        chosen = rivals[best[n]] if n in best else as_predicted
        if found and found[-1][2] is chosen:
            found[-1] = found[-1][0], n, chosen
        else:
            found.append((found[-1][1] + 1 if found else dim.min, n, chosen))
    compiling = {(low, high): _compiling(r, (dim.name, low, high), arches) for low, high, r in found}
    return {at: replace(r, notes=tuple(dict.fromkeys((*r.notes, *notes)))) for at, r in compiling.items()}


def _compiling(found: Result, sizes: tuple[str, int, int], arches: Sequence[int]) -> Result:
    """The result, or the program as library calls where a kernel does not compile at all of these sizes."""
    from mugraph.runtime.aot import compiled

    if not arches or not found.has_kernels:
        return found
    with shared_compilers() as compilers:
        try:
            for _ in compiled(limited(found.program, *sizes), found.source, arches, compilers[0]):
                pass
        except CompileError as error:
            c = found.certificate
            stands = _as_it_stands(found, SearchSpace(), 2.0**c.delta_requested_log2, c.seed)
            return replace(stands, notes=(*stands.notes, f"library calls: {error.message}"))
    return found


# -- what is measured


@dataclass(frozen=True)
class Written:
    """A program as its author wrote it in PyTorch: two forms of it, as functions of the program's inputs, and what
    tells it from others that mean the same."""

    eager: Callable[..., Any]
    compiled: Callable[..., Any]
    digest: str


def _measured(
    found: Result,
    calls: Result,
    space: SearchSpace,
    delta: float,
    seed: int,
    written: Written | None,
    say: Callable[[str], None],
) -> Result:
    """The one of two results, or of the program as it stands, that is fastest on this CPU, eagerly or compiled."""
    program = found.program
    stands = _as_it_stands(found, space, delta, seed)
    sizes = {d.name: min(max(space.symbolic, d.min), d.max) for d in program.dims()}
    results = {AS_IT_STANDS: stands, FOUND: found, CALLS: calls}
    candidates: list[Candidate] = []
    sources = set[str]()
    for name, result in results.items():
        text = _code(result.source)
        if text in sources:
            continue
        sources.add(text)
        for form in ("", COMPILED):
            run: Callable[..., Any]
            correct: Callable[[Callable[..., Any]], bool] | None
            if name == AS_IT_STANDS and written is not None:
                run, correct = (written.compiled if form else written.eager), None
            else:
                run = _loaded(result, bool(form))
                correct = functools.partial(_agrees, program, sizes, seed, bool(result.graph.kernels()))
            candidates.append(Candidate(name + form, run, name == AS_IT_STANDS, correct))
    import torch

    with torch.no_grad():
        inputs = random_inputs(program, sizes, "cpu", seed)
        choice = choose(candidates, inputs, sizes=sizes, say=say)
    say(f"chosen: {choice.chosen}")
    best = results[choice.chosen.removesuffix(COMPILED)]
    best = replace(best, report=calls.report) if best is stands else best
    if choice.chosen.endswith(COMPILED):
        best = _compiled(best)
    return replace(best, choice=choice)


def never_slower(found: Result, level: Tune, space: SearchSpace, delta: float, seed: int) -> Result:
    """The result, or the program as library calls where these were measured to be as fast on the device."""
    if not found.graph.kernels() or found.interrupted:
        return found
    with _timer(found.program, found.target, level, space.symbolic) as timer:
        if timer is None:
            return found
        stands = _as_it_stands(found, space, delta, seed)
        ours, theirs = (timer.seconds(r.source, REPEATS[-1]) for r in (found, stands))
    if not isinstance(theirs, Spread) or (isinstance(ours, Spread) and ours.median < theirs.median):
        return found
    times = f"{ours} against {theirs} seconds" if isinstance(ours, Spread) else f"the kernels: {ours.reason}"
    return replace(stands, notes=(*stands.notes, f"library calls were measured faster: {times}"))


def _as_it_stands(found: Result, space: SearchSpace, delta: float, seed: int) -> Result:
    """The program as library calls, as a result."""
    program, target = found.program, found.target

    def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> object:
        return accepted(program, graph, target, delta, seed, cuts)

    whole = search(program, accept=accept, accept_cut=accept, space=space.but(kernels=0, sizes=()), on=device(CPU))
    assert isinstance(whole.accepted, tuple)
    verified, source = whole.accepted
    return _checked(verified, source, target, seed, whole.report)


def _compiled(result: Result) -> Result:
    """The result with its source through `torch.compile`.  Its numbers were compared with float64 when it was
    measured, and those of the eager source before."""
    source = torch_code.emit(result.graph, compiled=True)
    certificate = result.certificate
    numerics = tuple(replace(n, source_hash=_hash(source)) for n in certificate.numerics)
    return replace(result, source=source, certificate=replace(certificate, numerics=numerics))


def _loaded(result: Result, compiled: bool) -> Callable[..., Any]:
    source = torch_code.emit(result.graph, compiled=True) if compiled else result.source
    run: Callable[..., Any] = load_module(source, f"{result.program.name}_{result.target}").run
    return run


def _code(source: str) -> str:
    """A source without its comments."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))


def _agrees(program: Program, sizes: Mapping[str, int], seed: int, stable: bool, run: Callable[..., Any]) -> bool:
    """Whether a function of the program's inputs agrees with float64 at these sizes."""

    def on(inputs: Mapping[str, Any], bindings: Mapping[str, int]) -> Sequence[Any]:
        del bindings
        given = run(*(inputs[i.name] for i in program.inputs))
        return given if isinstance(given, tuple | list) else (given,)

    report = numeric_check(
        program, on, bindings=[sizes], how="torch", draws=MEASURED_DRAWS, seed=seed, beyond_eager=stable
    )
    return not report.disagrees


def accepted(
    program: Program, graph: KernelGraph, target: Target, delta: float, seed: int, cuts: tuple[str, ...] = ()
) -> tuple[Verified, str]:
    """The μGraph verified, and its source.  Raises VerificationError where it computes something else, or has no form
    on the target."""
    verified = verify(program, finished(graph, cuts), delta=delta, seed=seed, cuts=cuts)
    try:
        return verified, emit(verified, target)
    except UnsupportedOpError as error:  # this candidate has no form on the target; another may
        raise VerificationError(f"not lowered: {error.message}") from error


def search_segment(request: Mapping[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
    """A job: the search of one segment of a large program."""
    task = Task.from_dict(request)
    target = parse_target(request["target"])
    done = searched(task, lambda graph: accepted(task.program, graph, target, request["delta"], request["seed"]), stop)
    if done is None:
        return {"graph": None}
    return done.to_dict() | {"whole": done.report.stop.reproducible}


def _unsearchable(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the values of the program nest too deeply for the search"
    return "the program divides by the constant zero, which the search has no law for"


def from_graph(
    program: Program,
    graph: KernelGraph,
    *,
    target: str | Target | None = None,
    tune: Tune | None = None,
    delta: Probability = DELTA,
    seed: int | None = None,
) -> Result:
    """A μGraph that was written by hand, or read from a file, as a result: stabilised, verified, lowered and checked
    like one that was found, but for inputs far from 0: what is multiplied out in it is taken as meant.

    Raises VerificationError where the graph does not compute the program or the emitted source disagrees with float64,
    GraphError for a malformed graph, UnsupportedOpError where the target has no form for an operator.
    """
    chosen, number = parse_target(target), settings.seed.get(seed)
    fit_arguments(from_graph, {"program": program, "graph": graph, "delta": delta})
    refuse_packed(program)
    stable = finished(graph, shared_values(program, graph) if nestings(program) else ())
    verified = verify_as_given(program, stable, delta=delta, seed=number)
    report = ReportText({"text": f"{graph.name}: a given graph, no search"})
    level = settings.tune.get(tune)
    tuning = partial(tuned, target=chosen, level=level)
    return _checked(verified, emit(verified, chosen), chosen, number, report, tuning=tuning, offset=False)


def _checked(
    verified: Verified,
    source: str,
    target: Target,
    seed: int,
    report: SearchReport | ReportText,
    notes: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
    stopped: bool = False,
    tuning: Callable[[Verified], tuple[Verified, Tuned]] = lambda verified: (verified, AS_LOWERED),
    offset: bool = True,
) -> Result:
    """The last stage: a verified graph with its source, tuned, unless the source disagrees with float64; with `offset`,
    for inputs far from 0 too.

    The certificate reaches the tier `numerics` if some comparison counts.  A Ctrl-C ends the checks, and the result
    has what was established before: where the search was `stopped` by one, that the graph computes the program."""
    certificate, interrupted, found = verified.certificate, stopped, AS_LOWERED
    try:
        with interruptible() as hit:  # an import that is cut off leaves a module that nothing can use
            import_module("torch")
        if stopped or hit():
            raise KeyboardInterrupt
        verified, found = tuning(verified)
        if found.trace:
            source = emit(verified, target, found.options)
            tell(f"tuned: {', '.join(map(str, found.trace))}")
        notes = (*notes, *found.notes)
        verified = proved(verified)
        certificate = verified.certificate
        bounds = bounds_tier(verified, target, source)
        if bounds is not None:
            certificate = certificate.with_bounds(bounds.claims, bounds.reason)
        numerics = numeric_tier(verified, target, source, seed, found.options, offset)
    except KeyboardInterrupt:
        interrupted = True
        notes = (*notes, "interrupted before the source was compared with float64")
    else:
        if numerics.disagrees or numerics.counted:
            Checked(verified, _hash(source), numerics)  # refuses a source that disagrees with float64
            tell(f"numeric check passed: {len(numerics.rows)} comparisons with float64 ({numerics.how})")
        certificate = certificate.with_numerics(numerics)
        notes = (*notes, *_numeric_notes(numerics, target))
    return Result(
        program=verified.program,
        graph=verified.graph,
        source=source,
        certificate=certificate,
        report=report,
        target=target,
        tuning=found,
        notes=tuple(notes),
        interrupted=interrupted,
    )


def _numeric_notes(numerics: NumericReport, target: Target) -> Iterator[str]:
    if not numerics.counted:
        yield f"the source was not compared with float64, as no input drawn has a result: {numerics.reasons}"
        return
    if any(r.excused for r in numerics.rows):
        yield "for inputs where the program as written overflows its types, the result is not exact either"
    if numerics.how != "torch" and target.precision == "tf32":
        yield "matrix multiplies of f32 operands keep 10 bits of their fraction (tf32), as the target asks"
    if numerics.how == "interpreted":
        yield "the kernels were checked under Triton's interpreter at reduced sizes, not on a device"


def finished(graph: KernelGraph, cuts: Sequence[str] = ()) -> KernelGraph:
    """The μGraph as it is verified (part by part where it is cut) and lowered: exponentials stabilised, gathers and
    scatters in the kernels that they are for, thread graphs formed."""
    stable = access_by_index(stabilise(graph, cuts), cuts)
    equations = []
    for e in stable.equations:
        if isinstance(e.op, Kernel):
            e = replace(e, op=Kernel(tuple(form_threads(b) for b in e.op.blocks)))
        equations.append(e)
    return replace(stable, equations=tuple(equations))


def emit(verified: Verified, target: Target, trace: Trace = (), compiled: bool = False) -> str:
    """The source of a verified μGraph for a target, with the options of a trace.  A graph without kernels of ours is
    torch code everywhere; `compiled`: such that goes through `torch.compile`.  Raises ValueError for a choice that
    there is not."""
    if target.kind == "torch" or not verified.graph.kernels():
        return torch_code.emit(verified.graph, compiled=compiled)
    return triton_code.emit(lower(verified, trace, target.machine))


def tuned(verified: Verified, target: Target, level: Tune, symbolic: int = 16) -> tuple[Verified, Tuned]:
    """A verified μGraph with choices of how its kernels are compiled.  Raises VerificationError where one of them does
    not compile for the target."""
    if target.kind == "torch" or level == "none" or not verified.graph.kernels():
        return verified, AS_LOWERED
    if settings.disallow_search.get():
        return verified, Tuned("none", notes=("the kernels were not compiled: MUGRAPH_DISALLOW_SEARCH forbids it",))
    if find_spec("triton") is None:
        return verified, Tuned("none", notes=("the kernels were not compiled, as Triton is not installed",))
    with shared_compilers() as compilers, _timer(verified.program, target, level, symbolic) as timer:
        tuner = Tuner(device(device_name(target)), compilers, target.machine, timer, symbolic)
        try:
            return tuner.tuned(verified, level)
        except CompileError as error:
            raise VerificationError(f"not compiled: {error.message}") from error


@contextmanager
def _timer(program: Program, target: Target, level: Tune, symbolic: int) -> Iterator[Timer | None]:
    """What times kernels on the device, where that is asked for and it is there."""
    if level != "measure" or not device_is_there(target):
        yield None
        return
    import torch

    sizes = {d.name: representative(d, symbolic) for d in program.dims()}
    with DeviceTimer(program, sizes, records=Records.of(torch.cuda.get_device_name())) as timer:
        yield timer


def bounds_tier(verified: Verified, target: Target, source: str) -> Bounds | None:
    """What is known of the loads and stores of our kernels; None where there are none.  Raises VerificationError with a
    counterexample."""
    if target.kind == "torch" or not verified.graph.kernels():
        return None
    return in_bounds(source, verified.program)


def numeric_tier(
    verified: Verified, target: Target, source: str, seed: int, trace: Trace = (), offset: bool = True
) -> NumericReport:
    """The same μGraph at reduced sizes (two tiles and a tail along each tiled axis), lowered the same way, against
    float64: on the device if it is there, under the interpreter if not, as torch code for the torch target.  Where the
    program as written overflows, the source may too (exponentials that are summed and then squared, say).  `offset`:
    inputs far from 0 are drawn too, for which a difference that is multiplied out loses the digits that count; not for
    programs in f64, of whose rounding float64 is no judge."""
    offset = offset and not any(i.tensor.dtype is DType.f64 for i in verified.program.inputs)
    sizes, tiles = reduction(verified.program, verified.graph)
    program = resized(verified.program, sizes, {})
    graph = resized(verified.graph, sizes, tiles)
    small = verify(program, graph, delta=2.0**-20, seed=seed, cuts=verified.certificate.cuts)
    text = emit(small, target, trace)
    stable = any(isinstance(e.op, Kernel) for e in graph.equations)
    with runner(text, target, program) as (run, how):
        draws = ("normal", "wide", "outlier", "logits") if how != "interpreted" else ("normal", "logits")
        report = numeric_check(
            program,
            run,
            bindings=sample_bindings(program, tiles),
            how=how,
            target=f"{target}, reduced sizes",
            source_hash=_hash(source),
            draws=(*draws, OFFSET) if offset else draws,
            seed=seed,
            device="cuda" if how == "device" else "cpu",
            beyond_eager=stable,
            product_unit=product_unit(program, target) if how != "torch" else 0.0,
        )
    return report.as_written()


def product_unit(program: Program, target: Target) -> float:
    """The relative error of each product in a matrix multiply that instructions may make beyond their operands' own."""
    if target.precision == "tf32":
        return TF32_UNIT
    return F8_UNIT if any(i.tensor.dtype.is_float and i.tensor.dtype.bits == 8 for i in program.inputs) else 0.0


Run = Callable[..., Sequence[Any]]


@contextmanager
def runner(source: str, target: Target, program: Program) -> Iterator[tuple[Run, How]]:
    """A function that runs emitted source on tensors by name, and how it runs them."""
    order = [i.name for i in program.inputs]
    kernels = "triton.jit" in source
    if target.kind == "torch" or not kernels or device_is_there(target):
        module = load_module(source, f"{program.name}_check")

        def run(inputs: Mapping[str, Any], bindings: Mapping[str, int], out: Sequence[Any]) -> Sequence[Any]:
            del bindings
            given = module.run(*(inputs[n] for n in order), out=out[0] if len(out) == 1 else tuple(out))
            return given if isinstance(given, tuple) else (given,)

        yield run, "device" if kernels and target.kind != "torch" else "torch"
        return
    from mugraph.runtime.interpret import shared_interpreter

    with shared_interpreter() as interpreter:

        def interpret(inputs: Mapping[str, Any], bindings: Mapping[str, int]) -> Sequence[Any]:
            del bindings
            return interpreter.run(source, {n: inputs[n] for n in order})

        yield interpret, "interpreted"


def sample_bindings(program: Program, tiles: Mapping[str, int]) -> list[dict[str, int]]:
    """Values of the symbolic sizes: one tile and a part, and the least admissible."""
    found = []
    for wanted in (lambda tile: tile + max(1, tile // 2 - 1), lambda tile: 1):
        bound: dict[str, int] = {}
        for axis in program.axes().values():
            for d in dims_of(axis.size):
                value = wanted(min(tiles.get(axis.name, 4), 32))
                bound[d.name] = max(bound.get(d.name, 1), min(max(value, d.min), d.max))
        if bound not in found:
            found.append(bound)
    return found


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C sets a flag, the second raises KeyboardInterrupt.  Only the main thread gets signals."""
    hit = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield hit.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if hit.is_set():
            raise KeyboardInterrupt
        hit.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield hit.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# -- the front door

# How a PyTorch function or module is captured and wrapped; `mugraph.pytorch` puts itself here.
FRONTENDS: list[Callable[..., Any]] = []


def superoptimize(subject: Any = None, **options: Any) -> Any:
    """Finds faster kernels for a program and returns something to call.

    A `Program` (what `@mg.program` makes) gives a `Result` at once.  A PyTorch function or module gives a function
    that is optimised at its first call for the shapes it gets, and falls back to the original, with one warning, where
    something in it is not understood.  Without a subject, returns a decorator: `@mg.superoptimize(target="cuda:90")`.

    Options: target ("torch", "cuda", "cuda:90", ...), space (SearchSpace) or effort ("none", "quick",
    "full"), budget_seconds, delta, seed, cache, engine (where segments of large programs are searched: "here",
    "processes", "ray"); for PyTorch functions also dynamic ({"x": {0: mg.Dim("B", 1, 256)}})
    and strict (raise instead of falling back).
    """
    if subject is None:
        return lambda later: superoptimize(later, **options)
    if isinstance(subject, Program):
        checked_options(**options)
        return optimize(subject, **options)
    if callable(subject):
        for frontend in FRONTENDS:
            return frontend(subject, **options)
    raise MugraphError(
        f"superoptimize takes a program or a PyTorch function, not {type(subject).__name__}",
        remedy="make a program with @mg.program, or give a function of tensors or an nn.Module",
    )
