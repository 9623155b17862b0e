"""The search, end to end: canonical names, seeds, closure, kernels, plans, verified results."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from mugraph.errors import GraphError, SettingError, ShapeError, VerificationError
from mugraph.ir.axes import Axis, dims_of, representative, size_value
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Const, Contract, Elementwise, Gather, Op, Reduce, Slice
from mugraph.ir.types import DType, Tensor
from mugraph.search import values as v
from mugraph.search.ahead import Fixed, fixed_classes, loaded, partition_with_ahead
from mugraph.search.build import Context, Unbuildable, baseline, build
from mugraph.search.canonical import Canonical, canonical, ordered
from mugraph.search.closure import Closure, Edge, close
from mugraph.search.cost import Device, Prediction, device, floor_seconds, predict_library
from mugraph.search.enumerate import Enumeration, widen
from mugraph.search.explain import Laws
from mugraph.search.extract import Derivation, Problem, Roles, is_leaf_edge
from mugraph.search.formula import Notation
from mugraph.search.laws import LAWS, Meaning, meaning
from mugraph.search.library import Added, Attention, contraction
from mugraph.search.partition import Choice, Partition
from mugraph.search.pieces import is_free, joints, pieces
from mugraph.search.report import (
    Asked,
    CandidateReport,
    KernelCost,
    LawStep,
    SearchReport,
    SegmentReport,
    StopReason,
    StructureReport,
)
from mugraph.search.segments import (
    Done,
    Partitioned,
    Solve,
    Task,
    cuts,
    join,
    least_seconds,
    line,
    operators,
    partitioned,
    segment,
    segment_reports,
)
from mugraph.search.space import SearchSpace

Accept = Callable[[KernelGraph], object]
AcceptCut = Callable[[KernelGraph, tuple[str, ...]], object]


@dataclass(frozen=True)
class Structure:
    """The best μGraph for a range of sizes: from `low` to `high` (None: without end) for every symbolic dimension,
    within its own bounds.  `seconds` is predicted at the size `at`."""

    low: int
    high: int | None
    at: int
    graph: KernelGraph
    accepted: object
    seconds: float
    text: str


@dataclass(frozen=True)
class Found:
    """The best μGraph at the size that stands for symbolic dimensions, what `accept` made of it, and the report;
    `structures` has the best for each range of sizes, smallest first."""

    graph: KernelGraph
    accepted: object
    report: SearchReport
    structures: tuple[Structure, ...] = ()


class Watch:
    """Wall time by phase, the most bytes in use in each where that is measured, and the budget."""

    def __init__(self, budget_seconds: float, interrupted: Callable[[], bool], memory: bool = False) -> None:
        self.interrupted = interrupted
        self.started = self.mark = time.perf_counter()
        self.budget = budget_seconds
        self.phases: dict[str, float] = {}
        self.memory: dict[str, int] | None = {} if memory else None
        self.stopped: str | None = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Memory is measured inside, if it is wanted."""
        ours = self.memory is not None and not tracemalloc.is_tracing()
        if ours:
            tracemalloc.start()
        try:
            yield
        finally:
            if ours:
                tracemalloc.stop()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.mark
        self.mark = now
        if self.memory is not None:
            self.memory[phase] = max(self.memory.get(phase, 0), tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()

    def over(self) -> bool:
        if self.interrupted():
            self.stopped = "Interrupted"
        elif time.perf_counter() - self.started > self.budget:
            self.stopped = "TimeLimit"
        return self.stopped is not None


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

    A program of more than `space.operators` operators is searched in segments: `solve` searches them (here, one after
    the other, where it is None), and `accept_cut` takes the μGraph and the values at which it was cut (`accept`, where
    it is None).

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
        with watch.measuring():
            if not whole and operators(program) > space.operators:
                accepting = accept_cut or (lambda graph, _: accept(graph))
                return _in_segments(program, space, on, accepting, solve or _one_by_one, watch)
            return _whole(program, accept, space, on, watch, replaces_calls=whole and not space.library)

    narrow = space.under_default_budgets()
    if whole or operators(program) <= narrow.operators:
        narrow = narrow.but(operators=space.operators)
    if narrow == space or (
        not whole and operators(program) > space.operators
    ):  # segments are each searched within both
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
    if operators(program) <= space.operators:
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


def unsearched(
    program: Program, space: SearchSpace, on: Device, stop: StopReason, why: str, seconds: float = 0.0
) -> SearchReport:
    """The report of a program that is not searched: the program as library calls is all there is.  `seconds` are
    predicted for it (0: none are)."""
    return SearchReport(
        program=program.name,
        device=on.label,
        space=str(space),
        stop=stop,
        classes=0,
        edges={},
        deduplicated=0,
        configurations=0,
        states=0,
        pruned={},
        verified=1,
        refused=0,
        seeds=(),
        kernels=(),
        candidates=(CandidateReport(LIBRARY, seconds, "chosen"),),
        predicted_seconds=seconds,
        floor_seconds=0.0,
        notes=(why,),
        asked=Asked(program, on),
    )


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
    solved, structures = [main], [best.structure(space.symbolic)]
    for size in _other_sizes(program, space):
        if watch.over():
            break
        solved.append(task.solve(size))
        watch.lap("kernels")
        structures.append(task.choose(solved[-1], structures).structure(size))
        watch.lap("verification")
    notes = [f"enumerator (abstraction {space.abstraction}): {enumeration}"] if enumeration else []
    notes += [
        f"{e.targets[0].name} is outside the calculus and runs as a library call"
        for e in (task.called(best.plan) if best.plan else ())
    ]
    if not best.plan:
        notes.append(UNBEATEN)
    notes += _kept(best.graph)
    ranges = _ranges(structures)
    report = _report(task, space, solved, watch, best, ranges, notes, enumeration)
    return Found(best.graph, best.accepted, report, ranges)


def set_up(
    program: Program, accept: Accept, space: SearchSpace, on: Device, watch: Watch | None = None
) -> tuple[Setup, Enumeration | None]:
    """The program's closure, and what the enumerator did to it, if it ran."""
    watch = watch or Watch(math.inf, lambda: False)
    program = program if space.ahead else program.without_constants()
    cut = pieces(ordered(program))
    here = canonical(cut)
    known = meaning(here.program)
    closure, seeds = _closure(here.program, known, space, watch.over)
    watch.lap("closure")
    widened = _widened(here.program, known, closure, space, watch.over)
    if widened:
        watch.lap("enumerator")
    chosen = _canonical_space(space, here, program)
    return Setup(program, cut, here, known, closure, seeds, chosen, on, accept, watch.over), widened


# -- large programs


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
    _canonical_space(space, canonical(program), program)  # refuses unknown names
    tensors = program.tensors()
    dtype = tensors[program.outputs[0].value].dtype
    whole = line(program, {a.name: representative(a.size, space.symbolic) for a in program.axes().values()})
    watch.lap("segments")
    solved: list[Partitioned] = []
    chosen: list[_Joined] = []
    for size in (space.symbolic, *_other_sizes(program, space)):
        if solved and watch.over():
            break
        states = space.states if not solved else max(1, space.states // OTHERS)

        def library(equations: Sequence[Equation], size: int = size) -> float:
            return equations_seconds(equations, program, size, dtype, on)

        solved.append(
            partitioned(whole, space.but(symbolic=size, sizes=(), states=states), on, solve, library, watch.over)
        )
        watch.lap("segments")
        chosen.append(_joined(program, size, solved[-1], library(program.equations), accept, space, on))
        watch.lap("verification")
    ranges = _ranges([c.structure for c in chosen])
    report = _report_of_segments(program, space, on, solved, chosen[0], watch, ranges)
    return Found(chosen[0].structure.graph, chosen[0].structure.accepted, report, ranges)


@dataclass
class _Joined:
    """The μGraph of a large program at one size, and what became of it and of the library calls."""

    structure: Structure
    segments: tuple[SegmentReport, ...]
    candidates: tuple[CandidateReport, ...]


def _joined(
    program: Program,
    size: int,
    run: Partitioned,
    base_seconds: float,
    accept: AcceptCut,
    space: SearchSpace,
    on: Device,
) -> _Joined:
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
            return _Joined(made, segments, (CandidateReport(text, run.seconds, "chosen"), rest))
    graph, accepted = as_it_stands(program, accept, space, on)
    made = Structure(size, size, size, graph, accepted, base_seconds, LIBRARY)
    tried = (CandidateReport(text, run.seconds, verdict), CandidateReport(LIBRARY, base_seconds, "chosen"))
    return _Joined(made, (), tried)


@dataclass
class Solved:
    """The plans at one size, cheapest first, and what the program costs as library calls."""

    symbolic: int
    problem: Problem
    run: Partition
    fixed: Fixed
    plans: list[list[Choice]]
    base_seconds: float
    fits: bool


@dataclass
class _Chosen:
    """The plan that was accepted (none: library calls), and what became of the others."""

    graph: KernelGraph
    accepted: object
    seconds: float
    plan: list[Choice]
    text: str
    tried: list[CandidateReport]
    refused: int

    def structure(self, at: int) -> Structure:
        return Structure(at, at, at, self.graph, self.accepted, self.seconds, self.text)


@dataclass
class Setup:
    """A program and its closure: what does not depend on the size at which costs are compared."""

    program: Program
    cut: Program
    here: Canonical
    known: Meaning
    closure: Closure
    seeds: Mapping[str, int]
    space: SearchSpace
    on: Device
    accept: Accept
    stop: Callable[[], bool]
    replaces_calls: bool = False

    @cached_property
    def boundaries(self) -> tuple[Equation, ...]:
        outside = {self.here.names[e.targets[0].name] for e in self.known.boundaries}
        return tuple(e for e in self.cut.equations if e.targets[0].name in outside)

    def called(self, plan: Sequence[Choice]) -> list[Equation]:
        """What runs as library calls beside the plan's launches."""
        _, wanted = targets_of(self.here, self.known, self.seeds)
        made = {t for c in plan if c.derivations for r in c.roots for t in wanted.get(r, ())}
        joined = joints(self.boundaries, made, (o.value for o in self.program.outputs))
        return [e for e in self.boundaries if not is_free(e) and e.targets[0].name not in joined]

    def notation(self) -> Notation:
        """How the explanations write its values."""
        inputs = {i.name: tuple(a.name for a in i.tensor.axes) for i in self.here.program.inputs}
        return Notation(self.here.axes, self.here.names, inputs, self.known.boundaries)

    def laws(self, plan: Sequence[Choice]) -> Laws:
        _, wanted = targets_of(self.here, self.known, self.seeds)
        return Laws(self.closure, self.notation(), plan, wanted, [o.value for o in self.program.outputs])

    def solve(self, symbolic: int) -> Solved:
        """All plans where every symbolic dimension has this size, clipped to its range."""
        states = self.space.states if symbolic == self.space.symbolic else max(1, self.space.states // OTHERS)
        space = self.space.but(symbolic=symbolic, states=states)
        problem = problem_of(self.here.program, self.closure, self.seeds, space, self.on)
        targets, _ = targets_of(self.here, self.known, self.seeds)
        fixed = self.fixed(problem, targets)
        plans, run = partition_with_ahead(problem, fixed, space, targets, self.stop)
        return Solved(
            symbolic,
            problem,
            run,
            fixed,
            plans,
            equations_seconds(self.equations, self.program, symbolic, problem.dtype, self.on),
            self.all_materialised(problem),
        )

    @cached_property
    def equations(self) -> tuple[Equation, ...]:
        """The program's equations, whatever the order of commutative operands."""
        return ordered(self.program).equations

    def all_materialised(self, problem: Problem) -> bool:
        """Whether all that the source materialises may be."""
        exponents = _exponents(problem)
        computed = {self.seeds[n] for n in _computed(self.here.program, self.known)}
        return all(may_be_materialised(problem, c, exponents) for c in computed)

    def is_fixed(self, e: Equation) -> bool:
        """Whether the equation works on constant inputs alone."""
        return bool(self.cut.fixed().get(e.targets[0].name))

    def fixed(self, problem: Problem, targets: tuple[tuple[int, ...], ...]) -> Fixed:
        """What depends on constant inputs alone; what must be in memory anyway is not folded."""
        program, forced = self.here.program, {t for group in targets for t in group}
        lasting, inside = self.cut.fixed(), {self.seeds[n] for n in self.space.inside}
        constants = {n: t for n, t in program.tensors().items() if lasting.get(self.here.names[n])}
        outputs = {self.seeds[o.value] for o in program.outputs}

        exponents, kept = _exponents(problem), forced | inside | problem.scaled

        def foldable(c: int) -> bool:
            return c not in kept and may_be_materialised(problem, c, exponents)

        return fixed_classes(problem, constants, self.here.axes, outputs, foldable)

    def choose(self, at: Solved, known: Sequence[Structure] = ()) -> _Chosen:
        """The cheapest plan that `accept` takes; one of a structure in `known` is that one."""
        _, wanted = targets_of(self.here, self.known, self.seeds)
        context = Context(
            program=self.cut,
            closure=self.closure,
            axes=self.here.axes,
            inputs=self.here.names,
            names=_names(self.here, self.seeds),
            tensors=dict(self.cut.tensors()),
            dtype=at.problem.dtype,
            dtypes=at.problem.dtypes,
            boundaries=self.boundaries,
        )
        accepted = {s.text: s for s in known}
        tried: list[CandidateReport] = []
        best: _Chosen | None = None
        refused = 0
        for plan in at.plans:
            seconds = sum(c.prediction.seconds for c in at.fixed.calls(plan))
            called = [e for e in self.called(plan) if not self.is_fixed(e)]
            seconds += equations_seconds(called, self.cut, at.symbolic, at.problem.dtype, self.on)
            text = structure(plan, self.here.axes, at.fixed)
            kernels = sum(bool(c.derivations) for c in at.fixed.calls(plan))
            if kernels > self.space.kernels:
                tried.append(CandidateReport(text, seconds, f"has {kernels} kernels"))
            elif best is not None or (at.fits and not self.replaces_calls and seconds > at.base_seconds):
                cheaper = best is not None and seconds < best.seconds
                verdict = "cheaper, but by less than the model is sure of" if cheaper else "costlier"
                tried.append(CandidateReport(text, seconds, verdict))
            else:
                try:
                    if text in accepted:
                        graph, result = accepted[text].graph, accepted[text].accepted
                    else:
                        graph = build(context, plan, wanted)
                        result = self.accept(graph)
                    best = _Chosen(graph, result, seconds, plan, text, tried, refused)
                    tried.append(CandidateReport(text, seconds, "chosen"))
                except (VerificationError, GraphError, ShapeError) as error:
                    refused += 1
                    tried.append(CandidateReport(text, seconds, f"refused: {error.message}"))
                except Unbuildable as error:
                    tried.append(CandidateReport(text, seconds, f"passed over: {error}"))
        verdict = "costlier" if at.fits else UNFIT
        if best is None:
            verdict = "chosen"
            if LIBRARY in accepted:
                graph, result = accepted[LIBRARY].graph, accepted[LIBRARY].accepted
            else:
                graph = baseline(self.program)
                result = self.accept(graph)
            best = _Chosen(graph, result, at.base_seconds, [], LIBRARY, tried, refused)
        tried.append(CandidateReport(LIBRARY, at.base_seconds, verdict))
        return best


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


LIBRARY = "the program as library calls"
UNBEATEN = "nothing beats the program as it stands: it runs as library calls"
UNSEARCHED = "nothing was searched, as the space allows no kernels: the program runs as library calls"
NARROW = "found under the default budgets; the wider ones gave nothing as cheap"
UNFIT = "would keep in 16 bits what does not fit there"
LIMITS = ("Interrupted", "TimeLimit", "MemoryLimit", "NodeLimit", "EntryLimit", "StateLimit", "Saturated")  # by weight
OTHERS = 2  # a further size gets that part of the budget of states


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


# -- set-up


def _canonical_space(space: SearchSpace, here: Canonical, program: Program) -> SearchSpace:
    """The space with canonical names of axes and values.  Raises SettingError for a name that the program lacks."""
    axes = {axis.name: a for a, axis in here.axes.items()}
    values = {name: n for n, name in here.names.items()}

    def renamed(field: str, names: tuple[str, ...] | None, known: Mapping[str, str]) -> tuple[str, ...] | None:
        if unknown := sorted(set(names or ()) - set(known)):
            kind = "value" if known is values else "axis"
            raise SettingError(
                f"SearchSpace.{field} names {unknown[0]!r}, which is no {kind} of {program.name}",
                remedy=f"it has: {', '.join(known)}",
            )
        return None if names is None else tuple(known[n] for n in names)

    tiles = renamed("tiles", tuple(a for a, _ in space.tiles), axes) or ()
    return space.but(
        grid=renamed("grid", space.grid, axes),
        loops=renamed("loops", space.loops, axes),
        tiles=tuple((a, t) for a, (_, t) in zip(tiles, space.tiles, strict=True)),
        inside=renamed("inside", space.inside, values) or (),
    )


SAMPLES = 32  # two different maxima are taken for one with probability 2^-32


def written_sizes(program: Program) -> dict[str, int]:
    """Static axes whose size the program also writes as a number (sum / 4096 for a mean).  Only these sizes count
    as known, because two axes of one size are not the same axis.  Numbers of integer type are places, not sizes."""
    values = [e.op.value for e in program.equations if isinstance(e.op, Const) and e.op.dtype.is_float]
    literals = {n for x in values for n in (x.numerator, x.denominator)} - {1}
    return {a.name: a.size for a in program.axes().values() if isinstance(a.size, int) and a.size in literals}


def takes_extremes(program: Program) -> bool:
    return any(
        (isinstance(e.op, Elementwise) and e.op.fn in ("max", "min", "relu"))
        or (isinstance(e.op, Reduce) and e.op.kind in ("max", "min"))
        for e in program.equations
    )


def _closure(
    program: Program, known: Meaning, space: SearchSpace, stop: Callable[[], bool] = lambda: False
) -> tuple[Closure, dict[str, int]]:
    """The closure of every equation, and of what the named laws make of the outputs."""
    prints = _fingerprinter(program, known)
    names = dict.fromkeys([o.value for o in program.outputs] + [a for b in known.boundaries for a in b.args])
    names.update(dict.fromkeys(known.values))
    seeds = [known.values[n] for n in names] + _rewritten(program, known, space, prints)
    closure, classes = close(seeds, prints, space.nodes, stop)
    return closure, dict(zip(names, classes, strict=False))


def _fingerprinter(program: Program, known: Meaning) -> v.Fingerprinter:
    samples = SAMPLES if takes_extremes(program) else 1
    return v.Fingerprinter(known.base, written_sizes(program), samples=samples)


def _rewritten(program: Program, known: Meaning, space: SearchSpace, prints: v.Fingerprinter) -> list[v.Value]:
    """What the named laws make of the outputs, where they hold."""
    outputs = [known.values[o.value] for o in program.outputs]
    pairs = [(value, LAWS[name].rewrite(value)) for name in space.laws for value in outputs]
    return [new for old, new in pairs if new is not None and prints.fingerprint(new) == prints.fingerprint(old)]


def _widened(
    program: Program, known: Meaning, closure: Closure, space: SearchSpace, stop: Callable[[], bool]
) -> Enumeration | None:
    """Runs the enumerator into the closure, in place, where the space asks for it."""
    if not space.candidates:
        return None
    prints = _fingerprinter(program, known)
    return widen(
        closure,
        prints,
        space.candidates,
        targets=[*known.values.values(), *_rewritten(program, known, space, prints)],
        sizes={a.name: representative(a.size, space.symbolic) for a in program.axes().values()},
        pruning=space.abstraction,
        stop=stop,
    )


def targets_of(
    here: Canonical, known: Meaning, seeds: Mapping[str, int]
) -> tuple[tuple[tuple[int, ...], ...], dict[int, list[str]]]:
    """The classes that must be in memory at the end, with the names they go by there; in groups, where the values of
    a group need operators outside the calculus on those of the groups before it."""
    program = here.program
    given = {i.name for i in program.inputs} | {t.name for b in known.boundaries for t in b.targets}
    wanted: dict[int, list[str]] = {}
    groups: dict[int, list[int]] = {}
    levels = _levels(program, known)
    names = dict.fromkeys([o.value for o in program.outputs] + [a for b in known.boundaries for a in b.args])
    for name in sorted((n for n in names if n not in given), key=levels.__getitem__):
        if seeds[name] not in wanted:
            groups.setdefault(levels[name], []).append(seeds[name])
        wanted.setdefault(seeds[name], []).append(here.names[name])
    return tuple(tuple(group) for group in groups.values()), wanted


def _levels(program: Program, known: Meaning) -> dict[str, int]:
    """How many operators outside the calculus lie in sequence below each value; views of what is there are none."""
    given = {i.name for i in program.inputs} | {t.name for e in known.boundaries for t in e.targets}
    outside = {id(e) for e in known.boundaries if not (is_free(e) and given.issuperset(e.args))}
    levels = {i.name: 0 for i in program.inputs}
    for e in program.equations:
        level = max((levels[a] for a in e.args), default=0) + (id(e) in outside)
        levels.update((t.name, level) for t in e.targets)
    return levels


def _names(here: Canonical, seeds: Mapping[str, int]) -> dict[int, str]:
    """The source's own names, for classes that the source computes."""
    found: dict[int, str] = {}
    for name, c in seeds.items():
        found.setdefault(c, here.names[name])
    return found


def _computed(program: Program, known: Meaning) -> list[str]:
    """Values with axes that the source itself would materialise."""
    outside = {t.name for e in known.boundaries for t in e.targets} | {o.value for o in program.outputs}
    return [e.target.name for e in program.equations if len(e.targets) == 1 and e.target.name not in outside]


def problem_of(program: Program, closure: Closure, seeds: Mapping[str, int], space: SearchSpace, on: Device) -> Problem:
    axes = program.axes()
    sizes = {a.name: representative(a.size, space.symbolic) for a in axes.values()}
    limits = {a.name: _limit(a) for a in axes.values()}
    tensors = program.tensors()
    dtype = tensors[program.outputs[0].value].dtype
    dtype = dtype if dtype.is_float else DType.f32
    leaves: dict[int, DType] = {}
    innermost = {seeds[o.value]: tensors[o.value].axes[-1].name for o in program.outputs if tensors[o.value].axes}
    for c in closure.order:
        for e in closure.classes[c].edges:
            if is_leaf_edge(e) and isinstance(e.leaf, v.Load):
                leaves[c] = tensors[e.leaf.name].dtype
                if e.leaf.tokens:
                    innermost[c] = e.leaf.tokens[-1][0]
    memory = dict.fromkeys(leaves, 0.0)
    problem = Problem(closure, sizes, limits, on, dtype, memory, {}, leaves, set(), space.states, innermost)
    targets = {seeds[o.value] for o in program.outputs}
    room = sum(problem.bytes(c) for c in {*leaves, *targets})
    inside, exponents = {seeds[n] for n in space.inside}, _exponents(problem)
    written = set(seeds.values())  # values of the program itself
    for c in closure.order:
        result = c in written or any(e.closes or e.kind == "call" for e in closure.classes[c].edges)
        if c in leaves or c in inside or not result or problem.bytes(c) > room:
            continue
        if not may_be_materialised(problem, c, exponents):
            if c in targets or c in exponents or not any(e.closes for e in closure.classes[c].edges):
                continue
            problem.scaled.add(c)
            problem.dtypes[c] = DType.f32
        problem.bound[c] = on.launch_seconds + problem.least_bytes(c) / on.bandwidth
    return problem


def _limit(axis: Axis) -> int:
    return size_value(axis.size, {d.name: d.max for d in dims_of(axis.size)})


def may_be_materialised(p: Problem, c: int, exponents: Collection[int] | None = None) -> bool:
    """Not what 16-bit storage would ruin: an exponential that is not yet normalised overflows, and the rounding of
    an exponent is a relative error of the exponential.  `exponents` are those of the problem, where they are known."""
    exponents = _exponents(p) if exponents is None else exponents
    return p.dtype.bits >= 32 or not (c in exponents or exponential_degree(p.closure.classes[c].value))


def exponential_degree(value: v.Value) -> bool:
    """Whether some term carries more exponentials than it divides by."""
    return any(sum(map(v.degree, t.factors)) != 0 for t in value)


def _exponents(p: Problem) -> set[int]:
    """Arguments of exponentials, and what makes them up by scaling and adding."""
    found: set[int] = set()
    for c in reversed(p.closure.order):
        for e in p.closure.classes[c].edges:
            if e.kind == "call" and e.fn in ("exp", "masked_exp"):
                found.add(e.children[0])
            if c in found and (e.kind == "add" or (e.kind == "product" and not e.axes)):
                found.update(x for x in e.children if p.axes(x) == p.axes(c))
    return found


# -- costs and the report


def _bytes(sizes: Mapping[str, int], tensors: Sequence[Tensor]) -> float:
    return math.fsum(math.prod(sizes[a.name] for a in t.axes) * t.dtype.bits / 8 for t in tensors)


def _operations(sizes: Mapping[str, int], op: Op, axes: set[str]) -> float:
    return (2.0 if isinstance(op, Contract) else 1.0) * math.prod(sizes[a] for a in axes)


def equations_seconds(
    equations: Sequence[Equation], program: Program, symbolic: int, dtype: DType, on: Device
) -> float:
    """Equations of the program as library calls, one launch each; scalars and views are free, unless they
    are given back."""
    if not equations:
        return 0.0
    tensors, seconds = program.tensors(), 0.0
    given = {o.value for o in program.outputs}
    sizes = {a.name: representative(a.size, symbolic) for a in program.axes().values()}
    for e in equations:
        if not e.args or (is_free(e) and e.target.name not in given):
            continue
        read = [tensors[a] for a in dict.fromkeys(e.args)]
        if isinstance(e.op, Gather):  # of its operand, only what the index names
            read = [e.target, *read[1:]]
        involved = [*e.targets, *read]
        axes = {a.name for t in involved for a in t.axes}
        if axes:
            moved = _bytes(sizes, involved)
            if isinstance(e.op, Contract) and len(e.args) == 2:
                left, right = (tuple(a.name for a in tensors[x].axes) for x in e.args)
                out = tuple(a.name for a in e.target.axes)
                seconds += contraction(sizes, left, right, out, moved, dtype, on).seconds
            else:
                seconds += predict_library(moved, _operations(sizes, e.op, axes), dtype, on).seconds
    return seconds


def _floor(program: Program, plan: list[Choice], p: Problem, fixed: Fixed) -> float:
    """Inputs (of those that are only sliced or looked up, what is taken) and outputs moved once, or the contractions'
    operations (the source's or the plan's, whichever are fewer) at the sheet rate.  Where work is done ahead, what
    each call reads of the constants and their results."""
    tensors = program.tensors()
    calls = fixed.calls(plan)
    read = [i.name for i in program.inputs]
    moved = _bytes(p.sizes, [tensors[o.value] for o in program.outputs])
    if len(calls) < len(plan):
        read = [name for name in read if not program.fixed().get(name)]
        moved += sum(p.bytes(c) for c in loaded(p, calls) & fixed.known)
    moved += sum(_least_read(program, name, tensors, p.sizes) for name in read)
    source = 0.0
    for e in program.equations:
        if isinstance(e.op, Contract):
            source += _operations(p.sizes, e.op, {a.name for n in (*e.args, e.target.name) for a in tensors[n].axes})
    planned = sum(c.prediction.flops for c in calls) if plan else source
    # an 8-bit input may be multiplied at the rate of 8 bits
    dtypes = [p.dtype] + [i.tensor.dtype for i in program.inputs if i.tensor.dtype.is_float or i.tensor.dtype.bits == 8]
    fastest = max(dtypes, key=p.device.matmul_rate)
    return floor_seconds(moved, min(source, planned), fastest, p.device)


def _least_read(program: Program, name: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> float:
    """Bytes of a value that no kernel can do without."""
    whole = _bytes(sizes, [tensors[name]])
    if any(o.value == name for o in program.outputs):
        return whole
    parts = 0.0
    for e in program.equations:
        if name in e.args:
            taken = isinstance(e.op, Slice) or (isinstance(e.op, Gather) and name not in e.args[1:])
            parts += _least_read(program, e.target.name, tensors, sizes) if taken else whole
    return min(parts, whole)


def structure(plan: Sequence[Choice], axes: Mapping[str, Axis], fixed: Fixed | None = None) -> str:
    """One line: what each launch computes and how it is cut; what is done ahead comes first."""
    if fixed and (before := fixed.launches(plan)):
        return f"ahead: {structure(before, axes)}; each call: {structure(fixed.calls(plan), axes)}"
    texts = []

    def named(chosen: tuple[str, ...]) -> str:
        return ",".join(axes[a].name for a in chosen)

    def kernel(roles: Roles) -> str:
        text = f"kernel grid({named(roles.grid)})"
        if roles.passes:
            text += f" loop({','.join('·'.join(axes[a].name for a in loop) for loop in roles.passes)})"
        if roles.split:
            text += f" split({named(roles.split[:1])}/{roles.split[1]})"
        return text

    for c in plan:
        match c.how:
            case Edge():
                texts.append(f"library contraction over {named(c.how.axes)}")
            case Added():
                texts.append(f"library contraction over {named(c.how.product.axes)} added")
            case Attention():
                texts.append(f"library attention over {named((c.how.key,))}")
            case Derivation(roles=roles):
                texts.append(kernel(roles))
            case several:
                texts.append(" beside ".join(kernel(d.roles) for d in several))
    return "; ".join(texts)


def _report_of_segments(
    program: Program,
    space: SearchSpace,
    on: Device,
    solved: Sequence[Partitioned],
    best: _Joined,
    watch: Watch,
    ranges: Sequence[Structure],
) -> SearchReport:
    """Counts of all searches made, and costs of the segments chosen at the size that stands for symbolic dimensions."""
    runs = [done.report for run in solved for done in run.searched.values()]
    stop = min((r.stop for r in runs), key=lambda s: LIMITS.index(s.kind), default=StopReason("Saturated"))
    if watch.stopped:
        stop = StopReason(watch.stopped, watch.budget if watch.stopped == "TimeLimit" else None)
    elif any(run.truncated for run in solved):
        stop = StopReason("SegmentLimit", space.segments)
    edges, pruned = Counter[str](), Counter[str]()
    for r in runs:
        edges.update(r.edges)
        pruned.update(r.pruned)
    chosen = [(s, done.report) for s, done, _ in solved[0].segments if done] if best.segments else []
    sizes = {a.name: representative(a.size, space.symbolic) for a in program.axes().values()}
    notes = [s.spelled(n) for s, r in chosen for n in r.notes if n != UNBEATEN]
    if not best.segments:
        notes.append(UNBEATEN)
    return SearchReport(
        program=program.name,
        device=on.label,
        space=str(space),
        stop=stop,
        classes=sum(r.classes for r in runs),
        edges=dict(edges),
        deduplicated=sum(r.deduplicated for r in runs),
        configurations=sum(r.configurations for r in runs),
        states=sum(r.states for r in runs),
        pruned=dict(pruned),
        verified=len(ranges),
        refused=sum(r.refused for r in runs),
        seeds=("source", *space.laws),
        kernels=tuple(s.cost(k) for s, r in chosen for k in r.kernels),
        ahead=tuple(s.cost(k) for s, r in chosen for k in r.ahead),
        candidates=best.candidates,
        structures=tuple(StructureReport(s.low, s.high, s.at, s.text, s.seconds) for s in ranges),
        predicted_seconds=best.structure.seconds,
        floor_seconds=min(least_seconds(program, sizes, on), best.structure.seconds),
        notes=tuple(dict.fromkeys(notes)),
        segments=best.segments,
        seconds=watch.phases,
        memory=watch.memory,
        asked=Asked(program, on),
    )


def _report(
    task: Setup,
    space: SearchSpace,
    solved: Sequence[Solved],
    watch: Watch,
    best: _Chosen,
    ranges: Sequence[Structure],
    notes: Sequence[str],
    enumeration: Enumeration | None,
) -> SearchReport:
    """The report: counts over all sizes, costs at the size that stands for symbolic dimensions."""
    closure, axes, problem = task.closure, task.here.axes, solved[0].problem
    stop = StopReason("Saturated")
    if watch.stopped:
        stop = StopReason(watch.stopped, watch.budget if watch.stopped == "TimeLimit" else None)
    elif closure.limit:
        stop = closure.limit
    elif any(at.run.limited for at in solved):
        stop = StopReason("EntryLimit", space.entries)
    elif any(at.problem.truncated for at in solved):
        stop = StopReason("StateLimit", space.states)

    laws = task.laws(best.plan)

    def costs(plan: Sequence[Choice]) -> tuple[KernelCost, ...]:
        return tuple(kernel_cost(structure([c], axes), c.prediction, problem, laws.steps(c)) for c in plan)

    fixed = solved[0].fixed
    return SearchReport(
        program=task.program.name,
        device=task.on.label,
        space=str(space),
        stop=stop,
        classes=len(closure.order),
        edges=dict(closure.rules),
        deduplicated=closure.deduplicated,
        configurations=sum(at.run.configurations for at in solved),
        states=sum(at.problem.expanded for at in solved),
        pruned={
            "infeasible": sum(at.problem.infeasible for at in solved),
            "bound": sum(at.problem.bounded for at in solved),
            "tile": sum(at.problem.untiled for at in solved),
            **({"abstraction": enumeration.pruned} if enumeration else {}),
        },
        verified=len(ranges),
        refused=best.refused,
        seeds=("source", *space.laws),
        kernels=costs(fixed.calls(best.plan)),
        ahead=costs(fixed.launches(best.plan)),
        candidates=tuple(best.tried),
        structures=tuple(StructureReport(s.low, s.high, s.at, s.text, s.seconds) for s in ranges),
        predicted_seconds=best.seconds,
        floor_seconds=_floor(task.here.program, best.plan, problem, fixed),
        written=tuple(laws.written(task.here.program, task.known, task.seeds, space.laws)),
        notes=tuple(notes),
        seconds=watch.phases,
        memory=watch.memory,
        asked=Asked(task.program, task.on),
    )


def kernel_cost(name: str, found: Prediction, p: Problem, steps: tuple[LawStep, ...] = ()) -> KernelCost:
    """The prediction for a launch, with the laws that it follows from, as the report has it."""
    floor = floor_seconds(found.unique_bytes, found.flops, p.dtype, p.device)
    return KernelCost(name, found.seconds, found.bound, dict(found.terms), floor, steps)
