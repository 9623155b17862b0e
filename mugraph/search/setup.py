"""A program and its closure at one size: targets, what may lie in memory, costs, and the plan that is accepted."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from mugraph.errors import GraphError, SettingError, ShapeError, VerificationError
from mugraph.ir.axes import Axis, dims_of, representative, size_value
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Const, Elementwise, Gather, Reduce
from mugraph.ir.shift import is_exponential, shifted
from mugraph.ir.types import DType
from mugraph.search import values as v
from mugraph.search.ahead import MARGIN, Fixed, fixed_classes, partition_with_ahead
from mugraph.search.build import Context, Unbuildable, baseline, build
from mugraph.search.canonical import Canonical, canonical, ordered
from mugraph.search.closure import Closure, Edge, close
from mugraph.search.cost import CPU, Device
from mugraph.search.enumerate import Enumeration, widen
from mugraph.search.explain import Laws
from mugraph.search.extract import Derivation, Problem, Roles, is_leaf_edge
from mugraph.search.formula import Notation
from mugraph.search.laws import LAWS, Meaning, meaning
from mugraph.search.library import Added, Attention, called_classes, equations_seconds
from mugraph.search.partition import Choice, Partition, resized
from mugraph.search.pieces import is_free, joints, pieces
from mugraph.search.report import (
    CandidateReport,
)
from mugraph.search.segments import unsafe
from mugraph.search.space import SearchSpace

Accept = Callable[[KernelGraph], object]
SAMPLES = 32  # two different maxima are taken for one with probability 2^-32
OTHERS = 2  # a further size gets that part of the budget of states
LIBRARY = "the program as library calls"
UNFIT = "would keep in 16 bits what does not fit there"


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
class Chosen:
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
        outputs = [o.value for o in self.program.outputs]
        inside = joints(self.boundaries, made, outputs) | self.loaded_by_index(plan, outputs)
        return [e for e in self.boundaries if not is_free(e) and e.targets[0].name not in inside]

    def loaded_by_index(self, plan: Sequence[Choice], outputs: Sequence[str]) -> set[str]:
        """Gathers that our own kernels alone read: they load from the source itself."""
        read = {x for c in plan if not c.derivations for x in called_classes(c.how)}
        edges = (e for c in read for e in self.closure.classes[c].edges if is_leaf_edge(e))
        copied = {self.here.names[e.leaf.name] for e in edges if isinstance(e.leaf, v.Load)} | {*outputs}
        copied |= {a for e in self.boundaries for a in e.args}
        tensors = self.cut.tensors()
        gathers = [e for e in self.boundaries if isinstance(e.op, Gather) and e.op.keeps_rows(tensors[e.args[0]])]
        return {e.target.name for e in gathers} - copied

    def called_seconds(self, plan: Sequence[Choice], symbolic: int, dtype: DType) -> float:
        """What each call of the program spends on them."""
        called = [e for e in self.called(plan) if not self.is_fixed(e)]
        return equations_seconds(called, self.cut, symbolic, dtype, self.on)

    def notation(self) -> Notation:
        """How the explanations write its values."""
        inputs = {i.name: tuple(a.name for a in i.tensor.axes) for i in self.here.program.inputs}
        return Notation(self.here.axes, self.here.names, inputs, self.known.boundaries)

    def laws(self, plan: Sequence[Choice]) -> Laws:
        _, wanted = targets_of(self.here, self.known, self.seeds)
        return Laws(self.closure, self.notation(), plan, wanted, [o.value for o in self.program.outputs])

    def solve(self, symbolic: int, known: Sequence[Sequence[Choice]] = ()) -> Solved:
        """All plans where every symbolic dimension has this size, clipped to its range.  `known`: plans at other
        sizes, which are plans here too."""
        states = self.space.states if symbolic == self.space.symbolic else max(1, self.space.states // OTHERS)
        space = self.space.but(symbolic=symbolic, states=states)
        problem = problem_of(self.here.program, self.closure, self.seeds, space, self.on)
        targets, _ = targets_of(self.here, self.known, self.seeds)
        fixed = self.fixed(problem, targets)
        plans, run = partition_with_ahead(problem, fixed, space, targets, self.stop)
        known = () if self.on.kind == CPU else known  # calls have no tiles
        others = resized(run, [plan for plan in known if plan and not fixed.launches(plan)])
        plans = others + [plan for plan in plans if plan not in others]  # of equal ones the known: fewer structures
        if others or self.boundaries:  # what a plan computes of them itself is no call

            def cost(plan: list[Choice]) -> float:
                margin = MARGIN if fixed.launches(plan) else 1.0
                return margin * run.cost(fixed.calls(plan)) + self.called_seconds(plan, symbolic, problem.dtype)

            plans.sort(key=cost)
        return Solved(
            symbolic,
            problem,
            run,
            fixed,
            plans,
            equations_seconds(self.equations, self.program, symbolic, problem.dtype, self.on),
            self.fits,
        )

    @cached_property
    def equations(self) -> tuple[Equation, ...]:
        """The program's equations, whatever the order of commutative operands."""
        return ordered(self.program).equations

    @cached_property
    def fits(self) -> bool:
        """Whether what the program keeps in memory as library calls fits there: its exponentials are shifted by their
        maximum, or as wide as the program says, or never normalised."""
        whole = self.program
        kept = {e.targets[0].name: e for e in shifted(whole).equations}
        left = {n for n in unsafe(whole)[0] if is_exponential(kept[n].op) and kept[n] in whole.equations}
        return all(whole.tensors()[n].dtype.bits >= 32 for n in left)

    def is_fixed(self, e: Equation) -> bool:
        """Whether the equation works on constant inputs alone."""
        return bool(self.cut.fixed().get(e.targets[0].name))

    def fixed(self, problem: Problem, targets: tuple[tuple[int, ...], ...]) -> Fixed:
        """What depends on constant inputs alone; what must be in memory anyway is not folded."""
        program, forced = self.here.program, {t for group in targets for t in group}
        lasting, inside = self.cut.fixed(), {self.seeds[n] for n in self.space.inside}
        constants = {n: t for n, t in program.tensors().items() if lasting.get(self.here.names[n])}
        outputs = {self.seeds[o.value] for o in program.outputs}

        exponents, kept = _exponents(problem), forced | inside | problem.scaled | problem.reduced

        def foldable(c: int) -> bool:
            return c not in kept and may_be_materialised(problem, c, exponents)

        return fixed_classes(problem, constants, self.here.axes, outputs, foldable)

    def choose(self, at: Solved, known: Sequence[Structure] = ()) -> Chosen:
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
        best: Chosen | None = None
        refused = 0
        for plan in at.plans:
            seconds = sum(c.prediction.seconds for c in at.fixed.calls(plan))
            called = self.called_seconds(plan, at.symbolic, at.problem.dtype)
            seconds += called
            cost = at.run.cost(at.fixed.calls(plan)) + called  # a split by its margin
            text = structure(plan, self.here.axes, at.fixed)
            kernels = sum(bool(c.derivations) for c in at.fixed.calls(plan))
            if kernels > self.space.kernels:
                tried.append(CandidateReport(text, seconds, f"has {kernels} kernels"))
            elif best is not None or (at.fits and not self.replaces_calls and cost > at.base_seconds):
                cheaper = seconds < (best.seconds if best else at.base_seconds)
                verdict = "cheaper, but by less than the model is sure of" if cheaper else "costlier"
                tried.append(CandidateReport(text, seconds, verdict))
            else:
                try:
                    if text in accepted:
                        graph, result = accepted[text].graph, accepted[text].accepted
                    else:
                        graph = build(context, plan, wanted)
                        result = self.accept(graph)
                    best = Chosen(graph, result, seconds, plan, text, tried, refused)
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
            best = Chosen(graph, result, at.base_seconds, [], LIBRARY, tried, refused)
        tried.append(CandidateReport(LIBRARY, at.base_seconds, verdict))
        return best


def set_up(
    program: Program, accept: Accept, space: SearchSpace, on: Device, watch: Watch | None = None
) -> tuple[Setup, Enumeration | None]:
    """The program's closure, and what the enumerator did to it, if it ran."""
    watch = watch or Watch(math.inf, lambda: False)
    program = shifted(program if space.ahead else program.without_constants(), unsummed=True)
    cut = pieces(ordered(program))
    here = canonical(cut)
    known = meaning(here.program)
    closure, seeds = closure_of(here.program, known, space, watch.over)
    watch.lap("closure")
    widened = _widened(here.program, known, closure, space, watch.over)
    if widened:
        watch.lap("enumerator")
    chosen = canonical_space(space, here, program)
    return Setup(program, cut, here, known, closure, seeds, chosen, on, accept, watch.over), widened


def canonical_space(space: SearchSpace, here: Canonical, program: Program) -> SearchSpace:
    """The space with canonical names of axes and values.  Raises SettingError for a name that the program lacks, and
    for an input or output that is to stay inside a kernel."""
    if met := [n for n in space.inside if n in {i.name for i in program.inputs} | {o.value for o in program.outputs}]:
        raise SettingError(
            f"SearchSpace.inside names {met[0]!r}, which lies in memory as an input or output of {program.name}",
            remedy="name values in between only",
        )
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


def closure_of(
    program: Program, known: Meaning, space: SearchSpace, stop: Callable[[], bool] = lambda: False
) -> tuple[Closure, dict[str, int]]:
    """The closure of every equation, and of what the named laws make of the outputs."""
    prints = fingerprinter(program, known)
    names = dict.fromkeys([o.value for o in program.outputs] + [a for b in known.boundaries for a in b.args])
    names.update(dict.fromkeys(known.values))
    seeds = [known.values[n] for n in names] + rewritten(program, known, space, prints)
    closure, classes = close(seeds, prints, space.nodes, stop, space.differences)
    return closure, dict(zip(names, classes, strict=False))


def fingerprinter(program: Program, known: Meaning) -> v.Fingerprinter:
    samples = SAMPLES if takes_extremes(program) else 1
    return v.Fingerprinter(known.base, written_sizes(program), samples=samples)


def rewritten(program: Program, known: Meaning, space: SearchSpace, prints: v.Fingerprinter) -> list[v.Value]:
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
    prints = fingerprinter(program, known)
    return widen(
        closure,
        prints,
        space.candidates,
        targets=[*known.values.values(), *rewritten(program, known, space, prints)],
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
    inside, exponents, normalised = {seeds[n] for n in space.inside}, _exponents(problem), _normalised(problem)
    written: dict[int, list[DType]] = {}  # values of the program itself
    for name, c in seeds.items():
        written.setdefault(c, []).append(tensors[name].dtype)
    if dtype is DType.f16:
        problem.reduced = frozenset(_reduced_later(problem) - written.keys())
    for c in closure.order:
        result = c in written or any(e.closes or e.kind == "call" for e in closure.classes[c].edges)
        if c in leaves or c in inside or not result or problem.bytes(c) > room:
            continue
        if c in problem.reduced or not may_be_materialised(problem, c, exponents, normalised):
            if c in targets or not any(e.closes for e in closure.classes[c].edges):
                continue
            problem.scaled.add(c)
            problem.dtypes[c] = DType.f32
        elif dtype.bits < 32 and c not in targets and set(written.get(c, ())) == {DType.f32}:
            problem.dtypes[c] = DType.f32  # as the program keeps it
        problem.bound[c] = problem.least_seconds(c)
    return problem


def _limit(axis: Axis) -> int:
    return size_value(axis.size, {d.name: d.max for d in dims_of(axis.size)})


def may_be_materialised(
    p: Problem, c: int, exponents: Collection[int] | None = None, normalised: Collection[int] | None = None
) -> bool:
    """Not what storage would ruin: an exponential that is not yet normalised overflows, and in 16 bits the rounding of
    an exponent is a relative error of the exponential.  `exponents` and `normalised` are those of the problem, where
    they are known."""
    if p.dtype.bits >= 32:
        return c not in (_normalised(p) if normalised is None else normalised)
    exponents = _exponents(p) if exponents is None else exponents
    return not (c in exponents or exponential_degree(p.closure.classes[c].value))


def exponential_degree(value: v.Value) -> bool:
    """Whether some term carries more exponentials than it divides by."""
    return any(sum(map(v.degree, t.factors)) != 0 for t in value)


def _normalised(p: Problem) -> set[int]:
    """Values that carry exponentials which a later value divides out, or takes the logarithm of."""
    classes = p.closure.classes
    carries = {c for c in p.closure.order if exponential_degree(classes[c].value)}
    found: set[int] = set()
    for c in reversed(p.closure.order):
        for e in classes[c].edges:
            if c in found or (c not in carries and (e.kind == "product" or e.fn == "log")):
                found.update(carries.intersection(e.children))
    return found


def _reduced_later(p: Problem) -> set[int]:
    """Values that a later one divides, or multiplies by a number below 1: where the program does that first, they are
    of another scale than all that it keeps, and may leave a narrow type."""
    classes = p.closure.classes

    def reduces(c: int) -> bool:
        for e in classes[c].edges:
            match e.leaf:
                case v.Number(coefficient, sizes):
                    return abs(coefficient) < 1 or any(power < 0 for _, power in sizes)
            if e.kind == "call" and e.fn == "inv":
                return True
        return False

    found: set[int] = set()
    for c in p.closure.order:
        for e in classes[c].edges:
            if e.kind == "product" and any(map(reduces, e.children)):
                found.update(x for x in e.children if not reduces(x))
    return found


def _exponents(p: Problem) -> set[int]:
    """Arguments of exponentials, and what makes them up element by element."""
    found: set[int] = set()
    for c in reversed(p.closure.order):
        for e in p.closure.classes[c].edges:
            if e.kind == "call" and e.fn in ("exp", "masked_exp"):
                found.add(e.children[0])
            if c in found and (e.kind in ("add", "call") or (e.kind == "product" and not e.axes)):
                found.update(x for x in e.children if p.axes(x) == p.axes(c))
    return found


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
