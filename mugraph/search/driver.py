"""The search, end to end: canonical names, seeds, closure, kernels, plans, verified results."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock

from mugraph.errors import GraphError, ShapeError, VerificationError
from mugraph.ir.axes import representative
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.types import DType
from mugraph.search.build import MATERIALISED, baseline
from mugraph.search.canonical import canonical, ordered
from mugraph.search.cost import Device, device
from mugraph.search.library import equations_seconds, seconds_of_each
from mugraph.search.report import (
    CandidateReport,
    SearchReport,
    StopReason,
    StructureReport,
)
from mugraph.search.segments import (
    Done,
    Partitioned,
    Solve,
    Task,
    cuts,
    is_cut,
    join,
    least_seconds,
    line,
    operators,
    partitioned,
    segment,
    segment_reports,
)
from mugraph.search.setup import (
    LIBRARY,
    OTHERS,
    UNFIT,
    Accept,
    Structure,
    Watch,
    canonical_space,
    set_up,
)
from mugraph.search.space import SearchSpace
from mugraph.search.summary import UNBEATEN, Joined, report_of, report_of_segments, unsearched

AcceptCut = Callable[[KernelGraph, tuple[str, ...]], object]


class _Rarely:
    """Garbage collections come rarely, in all threads, while any of them searches: hundreds of thousands of small
    objects live to its end, and each collection would go through them and all else that the process holds."""

    THRESHOLDS = (50_000, 20, 100)

    def __init__(self) -> None:
        self.lock, self.searches, self.usual = Lock(), 0, gc.get_threshold()

    def __enter__(self) -> None:
        with self.lock:
            if not self.searches:
                self.usual = gc.get_threshold()
                if self.usual[0]:  # else the user wants none at all
                    gc.set_threshold(*map(max, self.usual, self.THRESHOLDS))
            self.searches += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.searches -= 1
            if not self.searches:
                gc.set_threshold(*self.usual)


_RARELY = _Rarely()


@dataclass(frozen=True)
class Found:
    """The best μGraph at the size that stands for symbolic dimensions, what `accept` made of it, and the report;
    `structures` has the best for each range of sizes, smallest first."""

    graph: KernelGraph
    accepted: object
    report: SearchReport
    structures: tuple[Structure, ...] = ()


def search(
    program: Program,
    *,
    accept: Accept,
    space: SearchSpace | None = None,
    on: Device | None = None,
    budget_seconds: float = math.inf,
    interrupted: Callable[[], bool] = lambda: False,
    accept_cut: AcceptCut | None = None,
    solve: Solve | None = None,
    memory: bool = False,
    whole: bool = False,
) -> Found:
    """The cheapest μGraph of the program that `accept` takes.

    `accept` verifies a μGraph and returns what it made of it, or raises VerificationError (the next plan is tried).
    The program's own equations as library calls are the last plan, so there is always an answer; when nothing
    beats them by the model, they are it.  Same program, same space, same result, whatever names are used.

    A program of more than `space.operators` operators, or with summed exponentials of values that hold exponentials,
    is searched in segments: `solve` searches them (here, one after the other, where it is None), and `accept_cut` takes
    the μGraph and the values at which it was cut (`accept`, where it is None).

    Budgets beyond the default ones never make a result costlier: where these run out, the space under them is searched
    first, and its result is kept unless the wider one is as cheap.

    Where the space allows no kernels, nothing is searched.

    `whole`: the program is not cut, however many operators it has: it is a segment that no border divides.
    `memory`: the report says what each phase takes at most (in this process), which makes the search much slower.
    """
    space, on = space or SearchSpace(), on or device()
    started = time.perf_counter()
    program = program if space.ahead else program.without_constants()
    if not space.kernels:
        return library_calls(program, accept_cut or (lambda graph, _: accept(graph)), space, on)

    def within(space: SearchSpace, seconds: float) -> Found:
        watch = Watch(seconds, interrupted, memory)
        with _RARELY, watch.measuring():
            if not whole and is_cut(program, space):
                accepting = accept_cut or (lambda graph, _: accept(graph))
                return _in_segments(program, space, on, accepting, solve or _one_by_one, watch)
            return _whole(program, accept, space, on, watch, replaces_calls=whole and not space.library)

    narrow = space.under_default_budgets()
    if whole or operators(program) <= narrow.operators:
        narrow = narrow.but(operators=space.operators)
    if narrow == space or (not whole and is_cut(program, space)):  # segments are each searched within both
        return within(space, budget_seconds)
    first = within(narrow, budget_seconds)
    stop, cut = first.report.stop, not whole and operators(program) > narrow.operators
    if not stop.reproducible or (stop.kind == "Saturated" and not space.candidates and not cut):
        return replace(first, report=replace(first.report, space=str(space)))
    left = max(0.0, budget_seconds - (time.perf_counter() - started))
    return _cheaper(first, within(space, left), budget_seconds)


def _cheaper(narrow: Found, wide: Found, budget_seconds: float) -> Found:
    """The cheaper of two results, with the report on both searches."""
    stop = wide.report.stop
    if stop.kind == "TimeLimit":
        stop = StopReason("TimeLimit", budget_seconds)
    phases = {*narrow.report.seconds, *wide.report.seconds}
    times = {p: narrow.report.seconds.get(p, 0.0) + wide.report.seconds.get(p, 0.0) for p in sorted(phases)}
    most: dict[str, int] | None = None
    if narrow.report.memory is not None and wide.report.memory is not None:
        both = narrow.report.memory, wide.report.memory
        most = {p: max(m.get(p, 0) for m in both) for p in sorted({*both[0], *both[1]})}
    if narrow.report.predicted_seconds >= wide.report.predicted_seconds:
        return replace(wide, report=replace(wide.report, stop=stop, seconds=times, memory=most))
    report = replace(
        narrow.report,
        space=wide.report.space,
        stop=stop,
        seconds=times,
        memory=most,
        notes=(*narrow.report.notes, NARROW),
    )
    return replace(narrow, report=report)


def as_it_stands(program: Program, accept: AcceptCut, space: SearchSpace, on: Device) -> tuple[KernelGraph, object]:
    """The program as library calls, and what `accept` made of that.  A large one is a call for each interval between
    neighbouring cuts: compared as a whole, its values would be of too high a degree for the tests to tell anything."""
    if not is_cut(program, space):
        graph = baseline(program)
        return graph, accept(graph, ())
    sizes = {a.name: representative(a.size, space.symbolic) for a in program.axes().values()}
    whole = line(program, sizes)
    marks = cuts(whole, space.operators, sizes, space.inside)
    parts = [segment(whole, low, high, space, on, sizes) for low, high in pairwise(marks)]
    graph = join(program, [(s, baseline(s.task.program)) for s in parts])
    return graph, accept(graph, tuple(o.value for s in parts for o in s.program.outputs))


def library_calls(program: Program, accept: AcceptCut, space: SearchSpace, on: Device) -> Found:
    """The program as it stands: nothing is searched."""
    graph, accepted = as_it_stands(program, accept, space, on)
    sizes = {a.name: representative(a.size, space.symbolic) for a in program.axes().values()}
    dtype = program.tensors()[program.outputs[0].value].dtype
    seconds = equations_seconds(ordered(program).equations, program, space.symbolic, dtype, on)
    made = Structure(1, None, space.symbolic, graph, accepted, seconds, LIBRARY)
    report = replace(
        unsearched(program, space, on, StopReason("Saturated"), UNSEARCHED, seconds),
        structures=(StructureReport(made.low, made.high, made.at, made.text, seconds),),
        floor_seconds=min(least_seconds(program, sizes, on), seconds),
    )
    return Found(graph, accepted, report, (made,))


def _whole(
    program: Program, accept: Accept, space: SearchSpace, on: Device, watch: Watch, replaces_calls: bool = False
) -> Found:
    """One search of a whole program, within one space.  `replaces_calls`: kernels are taken also where library calls
    cost less, as in a segment of a program for which the space forbids calls."""
    task, enumeration = set_up(program, accept, space, on, watch)
    task.replaces_calls = replaces_calls
    main = task.solve(space.symbolic)
    watch.lap("kernels")
    best = task.choose(main)
    watch.lap("verification")
    solved, structures, plans = [main], [best.structure(space.symbolic)], [best.plan]
    for size in _other_sizes(program, space):
        if watch.over():
            break
        solved.append(task.solve(size, plans))
        watch.lap("kernels")
        chosen = task.choose(solved[-1], structures)
        structures.append(chosen.structure(size))
        plans.append(chosen.plan)
        watch.lap("verification")
    notes = [f"enumerator (abstraction {space.abstraction}): {enumeration}"] if enumeration else []
    notes += [
        f"{e.targets[0].name} is outside the calculus: the search takes it as given"
        for e in (task.called(best.plan) if best.plan else ())
    ]
    if not best.plan:
        notes.append(UNBEATEN)
    notes += _kept(best.graph)
    ranges = _ranges(structures)
    notes += _narrow(program, best.graph)
    report = report_of(task, space, solved, watch, best, ranges, notes, enumeration)
    report = replace(report, notes=(*report.notes, *_cancelling(report)))
    return Found(best.graph, best.accepted, report, ranges)


def _one_by_one(tasks: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
    """Searches segments in this process.  What is wrong with one comes out when all are verified together."""
    found: list[Done | None] = []
    for task in tasks:
        done = None if stop() else searched(task, lambda graph: graph, stop)
        found.append(done)
    return found


def searched(task: Task, accept: Accept, stop: Callable[[], bool] = lambda: False) -> Done | None:
    """The search of one segment: a pure function of the task, unless `stop` ends it.  None where the search cannot
    handle the segment: its values nest too deeply, or it divides by the constant zero."""
    try:
        found = search(task.program, accept=accept, space=task.space, on=task.on, interrupted=stop, whole=True)
    except (RecursionError, ZeroDivisionError):
        return None
    return Done(found.graph, found.report)


def _in_segments(
    program: Program,
    space: SearchSpace,
    on: Device,
    accept: AcceptCut,
    solve: Solve,
    watch: Watch,
) -> Found:
    """The search of a large program: for each size the segments that cost least together, joined, and accepted as a
    whole.  Where they are refused, the program runs as library calls."""
    canonical_space(space, canonical(program), program)  # refuses unknown names
    same = canonical(ordered(program)).program  # whatever the order of operands
    tensors = program.tensors()
    dtype = tensors[program.outputs[0].value].dtype
    whole = line(program, {a.name: representative(a.size, space.symbolic) for a in program.axes().values()})
    watch.lap("segments")
    solved: list[Partitioned] = []
    chosen: list[Joined] = []
    for size in (space.symbolic, *_other_sizes(program, space)):
        if solved and watch.over():
            break
        states = space.states if not solved else max(1, space.states // OTHERS)
        each = seconds_of_each(whole.operators, program, size, dtype, on)
        own = space.but(symbolic=size, sizes=(), states=states)
        solved.append(partitioned(whole, own, on, solve, each, watch.over))
        watch.lap("segments")
        base_seconds = equations_seconds(same.equations, same, size, dtype, on)
        chosen.append(_joined(program, size, solved[-1], base_seconds, accept, space, on))
        watch.lap("verification")
    ranges = _ranges([c.structure for c in chosen])
    report = report_of_segments(program, space, on, solved, chosen[0], watch, ranges)
    return Found(chosen[0].structure.graph, chosen[0].structure.accepted, report, ranges)


def _joined(
    program: Program,
    size: int,
    run: Partitioned,
    base_seconds: float,
    accept: AcceptCut,
    space: SearchSpace,
    on: Device,
) -> Joined:
    segments = segment_reports(run)
    text = " | ".join(s.structure if s.shared_with is None else f"as {s.shared_with}" for s in segments)
    parts = [(s, done.graph if done else baseline(s.task.program)) for s, done, _ in run.segments]
    fits = not any(done and done.report.candidates[-1].verdict == UNFIT for _, done, _ in run.segments)
    verdict = "costlier"
    if run.seconds <= base_seconds or not fits:
        graph = join(program, parts)
        try:
            accepted = accept(graph, tuple(o.value for s, _ in parts for o in s.program.outputs))
        except (VerificationError, GraphError, ShapeError) as error:
            verdict = f"refused: {error.message}"
        else:
            rest = CandidateReport(LIBRARY, base_seconds, "costlier" if fits else UNFIT)
            made = Structure(size, size, size, graph, accepted, run.seconds, text)
            return Joined(made, segments, (CandidateReport(text, run.seconds, "chosen"), rest))
    graph, accepted = as_it_stands(program, accept, space, on)
    made = Structure(size, size, size, graph, accepted, base_seconds, LIBRARY)
    tried = (CandidateReport(text, run.seconds, verdict), CandidateReport(LIBRARY, base_seconds, "chosen"))
    return Joined(made, (), tried)


def _kept(graph: KernelGraph) -> list[str]:
    """What the user should know of values that are kept between calls."""
    parts = graph.divided()
    if parts is None:
        return []
    first, _ = parts
    made, read = " and ".join(o.value for o in first.outputs), ", ".join(i.name for i in first.inputs)
    return [
        f"{made} is computed once from {read} and kept: again after a write that PyTorch counts, not after one through "
        ".data; SearchSpace(ahead=False) keeps nothing"
    ]


def _narrow(program: Program, graph: KernelGraph) -> list[str]:
    """What the user should know of values in f16 that the program does not have."""
    made = [t.name for e in graph.equations for t in e.targets if t.dtype is DType.f16]
    found = [n for n in made if n.startswith(MATERIALISED) and n not in program.tensors()]
    if not found:
        return []
    return [f"{', '.join(found)}: in memory in f16, though no value of the program; may overflow or vanish there"]


def _cancelling(report: SearchReport) -> list[str]:
    """What the user should know of differences that are multiplied out."""
    steps = (s.formula for k in report.kernels for s in k.steps if s.law == "distribute")
    found = [f for f in dict.fromkeys(steps) if " - " in ARGUMENTS.sub("", f)]
    return [f"{f} is multiplied out: digits are lost where the difference is far smaller than its terms" for f in found]


ARGUMENTS = re.compile(r"\w+\([^()]*\)")  # of functions, in a formula
UNSEARCHED = "nothing was searched, as the space allows no kernels: the program runs as library calls"
NARROW = "found under the default budgets; the wider ones gave nothing as cheap"


def _other_sizes(program: Program, space: SearchSpace) -> list[int]:
    """The sizes of the space that give some symbolic dimension another value than the sizes before do."""
    dims = program.dims()
    seen = {tuple(min(max(space.symbolic, d.min), d.max) for d in dims)}
    found = []
    for size in space.sizes:
        values = tuple(min(max(size, d.min), d.max) for d in dims)
        if values not in seen:
            seen.add(values)
            found.append(size)
    return found


def _ranges(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    """Neighbours of one structure become one range; between two structures it changes at the geometric mean."""
    merged: list[list[Structure]] = []
    for s in sorted(structures, key=lambda s: s.at):
        if merged and merged[-1][0].text == s.text:
            merged[-1].append(s)
        else:
            merged.append([s])
    found = []
    for i, group in enumerate(merged):
        low = 1 if i == 0 else math.isqrt(merged[i - 1][-1].at * group[0].at) + 1
        high = None if i == len(merged) - 1 else math.isqrt(group[-1].at * merged[i + 1][0].at)
        first = min(group, key=lambda s: structures.index(s))
        found.append(replace(first, low=low, high=high))
    return tuple(found)
