"""Why a search did not find, or did not choose, a μGraph that somebody hands in.

    answer = why_not(program, graph, report, on=device)

Exactly one of: NotEquivalent (it computes something else), Found (it is in the list), Costlier (inside the space, at
another price), Pruned (inside, but cut), Outside (the space does not hold it).  The graph is read as values of the
calculus and compared with the classes, roles, budgets and prices of the same search, done again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from mugraph.errors import GraphError, VerificationError
from mugraph.ir.check import check
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Program
from mugraph.ir.infer import op_text
from mugraph.ir.ops import Cast, Compare, Contract, Elementwise, Kernel, Library, MaskedExp, Reduce, Select
from mugraph.ir.shift import shifted
from mugraph.ir.types import DType
from mugraph.search.ahead import Fixed
from mugraph.search.answers import Answer, Costlier, Cut, Found, NotEquivalent, Outside, Pruned
from mugraph.search.build import library_equation
from mugraph.search.closure import Class, Edge
from mugraph.search.cost import CPU, STAGES, Device, Prediction, predict_beside
from mugraph.search.derive import KernelSearch
from mugraph.search.driver import NARROW, search
from mugraph.search.extract import (
    COMPUTED_TILE,
    LOADED_TILE,
    Assignment,
    Derivation,
    Loop,
    Problem,
    Roles,
    Survey,
)
from mugraph.search.footprint import Footprint
from mugraph.search.library import ADDED, ATTENTION, Added, Attention, equations_seconds, library_calls, operands
from mugraph.search.partition import ACCUMULATED, KEPT, RUNS, SPLIT_MARGIN, WHOLE, Choice, Partition
from mugraph.search.pieces import is_free
from mugraph.search.reading import Flat, Launch, Reading, flattened, operators_of
from mugraph.search.report import SearchReport, Verify
from mugraph.search.segments import is_cut, operators
from mugraph.search.setup import (
    LIBRARY,
    Setup,
    Solved,
    may_be_materialised,
    problem_of,
    set_up,
    structure,
    targets_of,
)
from mugraph.search.space import space_from
from mugraph.search.summary import kernel_cost

ALIKE = 1e-6  # costs that differ by less than that part are equal


class Refused(Exception):
    """Carries the answer to the top."""

    def __init__(self, answer: Pruned | Outside) -> None:
        super().__init__(str(answer))
        self.answer = answer


def why_not(
    program: Program,
    graph: Program,
    report: SearchReport,
    *,
    on: Device,
    verify: Verify | None = None,
) -> Answer:
    """Why the search that wrote the report did not choose the graph.  A graph without kernels and library calls, such
    as the program itself, is taken as library calls, one for each operator.

    `verify` raises VerificationError where the graph does not compute the program; without it, outputs are compared by
    fingerprint.  Raises GraphError or ShapeError for a malformed graph, GraphError for a search for a CPU, which knows
    no other plans than the cheapest.
    """
    if on.kind == CPU:
        raise GraphError("a search for a CPU keeps the cheapest plan alone", remedy="ask a result that was not tuned")
    check(graph)
    given = _stated_like(graph if isinstance(graph, KernelGraph) else _as_calls(graph), program)
    if verify is not None:
        try:
            verify(program, given)
        except VerificationError as error:
            return NotEquivalent(error.message)
    elif (difference := _other_interface(program, given)) is not None:
        return NotEquivalent(difference)
    flat = flattened(given)
    mine = operators_of(program, flat)
    if mine is None:  # as library calls run where a single element would overflow
        mine = operators_of(shifted(program, unsummed=True), flat)
    if mine is not None and _is_no_plan(flat, mine):
        return _last(report)
    if report.stop.kind == "Unsearchable":
        return Outside("calculus", f"there was no search: {' '.join(report.notes)}")
    space = space_from(report.space)
    if NARROW in report.notes:
        space = space.under_default_budgets()
    task, _ = set_up(program, lambda g: g, space, on)
    return _Question(task, report, flat, mine, verify is not None).answer()


def _as_calls(program: Program) -> KernelGraph:
    """The program with a library call for each operator; views, literals and sizes stay as they are."""
    tensors = program.tensors()
    calls = (library_equation(e, tensors) if e.args and not is_free(e) else e for e in program.equations)
    return KernelGraph(program.name, program.inputs, tuple(calls), program.outputs)


def _is_no_plan(flat: Flat, done: Sequence[Sequence[Equation]]) -> bool:
    """Whether the graph is the program as library calls, some of them for operators that no other plan calls the
    library for."""
    inner = Elementwise | Compare | Select | MaskedExp | Reduce
    calls = all(isinstance(x.equation.op, Library) for x in flat.launches)
    return calls and any(isinstance(e.op, inner) for mine in done for e in mine)


def _last(report: SearchReport) -> Found:
    """The program as library calls is the last plan of every list."""
    plans = report.candidates
    return Found(len(plans), len(plans), plans[-1].seconds, plans[-1].verdict, LIBRARY)


def _stated_like(graph: KernelGraph, program: Program) -> KernelGraph:
    """Whether an input is constant is not the graph's to say."""
    constant = {i.name: i.constant for i in program.inputs}
    inputs = tuple(replace(i, constant=constant.get(i.name, i.constant)) for i in graph.inputs)
    return replace(graph, inputs=inputs)


def _other_interface(program: Program, graph: KernelGraph) -> str | None:
    mine, given = ([str(i.tensor) for i in g.inputs] for g in (program, graph))
    if mine != given:
        return f"{graph.name} takes ({', '.join(given)}), {program.name} takes ({', '.join(mine)})"
    mine, given = ([str(g.tensors()[o.value].dims) for o in g.outputs] for g in (program, graph))
    if mine != given:
        return f"{graph.name} gives other outputs than {program.name}"
    return None


def outside(restriction: str, what: str, remedy: str = "") -> Refused:
    return Refused(Outside(restriction, what, remedy))


def pruned(by: Cut, what: str, limit: str, remedy: str = "") -> Refused:
    return Refused(Pruned(by, what, limit, remedy))


class Signature(NamedTuple):
    """What tells one launch from another: the same in a plan and in the graph that is built from it."""

    makes: tuple[int, ...]
    reads: tuple[int, ...]
    kind: str
    blocks: tuple[str, ...] = ()


class Priced(NamedTuple):
    """A launch of the graph at its price."""

    name: str
    prediction: Prediction
    rank: float  # seconds as plans are ranked by: with the margin of a split
    ahead: bool


class _Question:
    def __init__(
        self,
        task: Setup,
        report: SearchReport,
        flat: Flat,
        done: Sequence[Sequence[Equation]] | None,
        verified: bool,
    ) -> None:
        self.task, self.report, self.verified = task, report, verified
        self.flat, self.operators = flat, done
        self.space, self.given = task.space, space_from(report.space)
        self.segmented = is_cut(task.program, self.space)
        self.problem = problem_of(task.here.program, task.closure, task.seeds, task.space, task.on)
        targets, self.wanted = targets_of(task.here, task.known, task.seeds)
        self.fixed: Fixed = task.fixed(self.problem, targets)

    @cached_property
    def read(self) -> Reading:
        return Reading(self.task, self.flat)

    @cached_property
    def axes(self) -> dict[str, str]:
        """The graph's names of axes by canonical ones."""
        return {a: x for x, a in self.read.axes.items()}

    # -- the order of the questions

    def answer(self) -> Answer:
        if self.as_operators and all(isinstance(x.equation.op, Library) for x in self.flat.launches):
            with suppress(Refused):
                return self._listed() or _last(self.report)
            return _last(self.report)
        differs = self._other_outputs()
        if differs is not None:
            return differs
        try:
            listed = self._listed()
            if listed is not None:
                return listed
            self._counts()
            priced = [self._priced(x) for x in self.flat.launches]
        except Refused as refused:
            return self._for_lack_of_nodes(refused.answer)
        return self._compared(priced)

    def _for_lack_of_nodes(self, answer: Pruned | Outside) -> Pruned | Outside:
        """What is missing from a closure that was cut off may be missing for that reason."""
        match answer:
            case Outside("closure" | "loops" | "library" | "materialisation", what) | Pruned("feasibility", what):
                if self.task.closure.truncated:
                    what = f"{what}, in a closure that was cut off"
                    return Pruned("budget", what, f"SearchSpace.nodes = {self.space.nodes}", "Give more nodes")
        return answer

    def _other_outputs(self) -> Answer | None:
        """The outputs by fingerprint.  What the verifier has taken is equal by laws that the calculus does not have."""
        for o, name in zip(self.task.program.outputs, self.flat.outputs, strict=True):
            for mine, given in zip(self.read.cells(o.value), self.read.cells(name), strict=False):
                a, b = (self.read.class_of(self.read.values[x]) for x in (mine, given))
                if a != b or a is None:
                    if not self.verified:
                        return NotEquivalent(f"the output {o.value} is another value: {self._text(given)}")
                    return Outside(
                        "closure",
                        f"the output {o.value} is {self._text(given)}, which only the verifier knows to be the same",
                        CANDIDATES,
                    )
        return None

    # -- what is in the list

    @cached_property
    def solved(self) -> Solved:
        return self.task.solve(self.space.symbolic)

    def _listed(self) -> Found | None:
        """The plan of the list that has the same launches."""
        given, plans = self.signatures(), self.report.candidates
        if self.segmented:
            flat = flattened(search(self.task.program, accept=lambda g: g, space=self.given, on=self.task.on).graph)
            joined = _Question(self.task, self.report, flat, None, True).signatures()
            first = plans[0]
            return Found(1, len(plans), first.seconds, first.verdict, first.structure) if joined == given else None
        for n, (plan, c) in enumerate(zip(self.solved.plans, plans[:-1], strict=False)):
            if sorted(map(self._of, plan)) == given and not c.verdict.startswith("has "):
                return Found(n + 1, len(plans), c.seconds, c.verdict, c.structure)
        return None

    def signatures(self) -> list[Signature]:
        return sorted(s for s in map(self._signature, self.flat.launches) if s is not None)

    def _of(self, c: Choice) -> Signature:
        """The signature of a launch of a plan."""
        makes = tuple(sorted(c.roots))
        match c.how:
            case Edge() as e:
                return Signature(makes, _several(e.children), "contraction", tuple(sorted(e.axes)))
            case Attention():
                return Signature(makes, _several(operands(self.problem, c.how)), "attention")
            case Added(product):
                reads = _several(operands(self.problem, c.how))
                return Signature(makes, reads, "added", tuple(sorted(product.axes)))
            case _:
                reads = _several(s.entry[0] for d in c.derivations for s in d.loads())
                return Signature(
                    makes,
                    reads,
                    "kernel",
                    tuple(sorted(_cut(Assignment(d.roles, dict(d.tiles))) for d in c.derivations)),
                )

    def _signature(self, x: Launch) -> Signature | None:
        """The signature of a launch of the graph; None for an operator that runs as it does in every plan."""
        if isinstance(x.equation.op, Library) and self._is_boundary(x):
            return None
        makes, reads = self._classes(x.makes), self._classes(x.reads)
        match x.equation.op:
            case Kernel(blocks):
                cuts = [_cut(self._roles(b)) for b in blocks]
                return Signature(_several(makes), _several(reads), "kernel", tuple(sorted(cuts)))
            case Library(name, semantics):
                if name == ADDED:
                    (closed,) = (e.op.axes for e in semantics.equations if isinstance(e.op, Contract))
                    axes = tuple(sorted(self.read.axes.get(a, a) for a in closed))
                    return Signature(_several(makes), _several(reads), "added", axes)
                if name == ATTENTION:
                    return Signature(_several(makes), _several(reads), "attention")
                contracted = _contracted(semantics)
                if contracted is not None:
                    axes = tuple(sorted(self.read.axes.get(a, a) for a in contracted))
                    return Signature(_several(makes), _several(reads), "contraction", axes)
                return Signature(_several(makes), _several(reads), f"library {name}")
            case _:
                raise AssertionError("no launch")

    def _classes(self, names: Sequence[str]) -> list[int]:
        """The classes of values in memory.  Raises Refused where one has none."""
        found = []
        for cell, c in self.read.classes_of(names):
            if c is None:
                raise Refused(self._no_class(cell))
            found.append(c)
        return found

    def _no_class(self, name: str) -> Outside | Pruned:
        odd = self.read.odd.get(name)
        if odd is not None:
            return Outside("operators", f"{op_text(odd.op)} is no operator of the program as it is written")
        return Outside("closure", f"no rule leads to the value {self._text(name)}", CANDIDATES)

    def _text(self, name: str) -> str:
        text = self.task.notation().text(self.read.values[name])
        return text if len(text) <= MOST_TEXT else text[: MOST_TEXT - 1] + "…"

    # -- what the space leaves out

    def _counts(self) -> None:
        """Kernels, launches side by side, work done ahead."""
        kernels = [x for x in self.flat.launches if isinstance(x.equation.op, Kernel) and not self._ahead(x)]
        if len(kernels) > self.space.kernels and not self.as_operators:
            raise outside(
                "kernels",
                f"it has {len(kernels)} kernels, and SearchSpace.kernels is {self.space.kernels}",
                f"Give SearchSpace(kernels={len(kernels)})",
            )

    def _ahead(self, x: Launch) -> bool:
        classes = [c for _, c in self.read.classes_of(x.makes)]
        return bool(classes) and all(c in self.fixed.computed for c in classes)

    @cached_property
    def as_operators(self) -> bool:
        """Whether each launch does an operator of the program as it is written, and library calls perhaps several: the
        program is in every space."""
        if self.operators is None:
            return False
        pairs = zip(self.flat.launches, self.operators, strict=True)
        return all(isinstance(x.equation.op, Library) or sum(not is_free(e) and bool(e.args) for e in mine) <= 1
                   for x, mine in pairs)  # fmt: skip

    def _is_boundary(self, x: Launch) -> bool:
        """An operator outside the calculus: a library call in every plan."""
        return all(n in self._boundary_values for n in self._names(x.makes))

    def _names(self, names: Sequence[str]) -> list[str]:
        found = []
        for n in names:
            value = self.read.values[n]
            load = value[0].factors[0] if len(value) == 1 else None
            found.append(str(getattr(load, "name", "")))
        return found

    @cached_property
    def _boundary_values(self) -> frozenset[str]:
        return frozenset(t.name for b in self.task.known.boundaries for t in b.targets)

    # -- prices

    def _priced(self, x: Launch) -> Priced:
        """The price of a launch.  Raises Refused where the space does not hold it."""
        ahead = self._ahead(x)
        if ahead and not self.space.ahead:
            raise outside("ahead", "it does work ahead", "Give SearchSpace(ahead=True)")
        for name, t in () if self.as_operators else zip(x.makes, x.equation.targets, strict=True):
            for c in self._classes((name,)):
                self._may_lie_in_memory(c, t.dtype)
        match x.equation.op:
            case Kernel(blocks):
                return self._kernel(x, blocks, ahead)
            case Library():
                return self._library(x, ahead)
            case _:
                raise AssertionError("no launch")

    def _may_lie_in_memory(self, c: int, dtype: DType) -> None:
        p = self.problem
        narrow = c in p.scaled and dtype.bits < 32
        if c in self.wanted or (not narrow and self._may_be_there(c)):
            return
        text = self.task.notation().text(self.task.closure.classes[c].value)
        if c in {self.task.seeds[n] for n in self.space.inside}:
            raise outside("inside", f"{text} must not be materialised", "Take it out of SearchSpace.inside")
        if narrow or not may_be_materialised(p, c):
            what = "would lie in memory in 16 bits, which ruins it: it is, or makes up, the argument of an exponential"
            raise outside("materialisation", f"{text} {what}", "Store it in f32, or declare the program in f32")
        room = sum(p.bytes(x) for x in {*p.inputs, *self.wanted})
        if p.bytes(c) > room:
            raise outside(
                "materialisation",
                f"{text} takes {p.bytes(c):.3g} bytes in memory, more than inputs and outputs together ({room:.3g})",
            )
        raise outside(
            "materialisation",
            f"{text} is no value of the program, and no result of a contraction, "
            "a reduction or a function, and only these lie in memory",
        )

    def _may_be_there(self, c: int) -> bool:
        p = self.problem
        return c in p.memory or c in p.bound or c in self.fixed.foldable or c in self.fixed.computed

    def _library(self, x: Launch, ahead: bool) -> Priced:
        op = x.equation.op
        assert isinstance(op, Library)
        if self.as_operators or self._is_boundary(x):
            seconds = equations_seconds(
                op.semantics.equations, op.semantics, self.space.symbolic, self.problem.dtype, self.problem.device
            )
            return Priced(f"library {op.name}", Prediction(seconds, (("library", seconds),), 0.0, 0.0), seconds, ahead)
        if not self.space.library:
            raise outside("library", f"it calls the library for {op.name}", "Give SearchSpace(library=True)")
        wanted = self._signature(x)
        p = self._with(self._classes(x.reads), {})
        for c in self._classes(x.makes):
            for call, prediction in library_calls(p, c):
                if self._of(Choice((c,), call, prediction, ())) == wanted:
                    return Priced(
                        structure([Choice((c,), call, prediction, ())], self.task.here.axes),
                        prediction,
                        prediction.seconds,
                        ahead,
                    )
        raise outside(
            "library",
            f"{op.name} is no library call that the search knows: it knows contractions of "
            "two values, attention, and the program's own operators",
        )

    def _kernel(self, x: Launch, blocks: Sequence[BlockGraph], ahead: bool) -> Priced:
        if len(blocks) > 1 and not self.space.beside:
            raise outside("beside", "independent kernels share a launch", "Give SearchSpace(beside=True)")
        reads = self._classes(x.reads)
        made: list[Derivation] = []
        for block in blocks:
            roots = self._roots(x, block)
            assignment = self._roles(block)
            try:
                self._admitted(roots, assignment)
                made.append(self._derivation(roots, reads, assignment))
            except Refused:
                if not self.as_operators:
                    raise
                seconds = self._as_library(x)
                name = f"kernel {op_text(x.equation.op)}"
                return Priced(name, Prediction(seconds, (("library", seconds),), 0.0, 0.0), seconds, ahead)
        p = self._with(reads, {})
        works = [Footprint(p, d).work(dict(d.tiles)) for d in made]
        found = predict_beside(works, p.device)
        how = made[0] if len(made) == 1 else tuple(made)
        name = structure([Choice(tuple(r for d in made for r in d.roots), how, found, ())], self.task.here.axes)
        margin = SPLIT_MARGIN if any(d.roles.split for d in made) else 1.0
        return Priced(name, found, found.seconds * margin, ahead)

    def _as_library(self, x: Launch) -> float:
        """What the program's own operator costs as a library call."""
        assert self.operators is not None
        mine = self.operators[self.flat.launches.index(x)]
        return equations_seconds(mine, self.task.program, self.space.symbolic, self.problem.dtype, self.problem.device)

    def _roots(self, x: Launch, block: BlockGraph) -> tuple[int, ...]:
        final = block.combine or block
        stored = {s.target for s in final.stores}
        names = [n for n, t in zip(x.makes, x.equation.targets, strict=True) if t.name in stored]
        return tuple(sorted(set(self._classes(names))))

    # -- one kernel

    def _roles(self, block: BlockGraph) -> Assignment:
        """The roles that a block graph gives to axes, under canonical names."""

        def name(axis: str) -> str:
            return self.read.axes.get(axis, axis)

        loops = tuple(tuple(name(a) for a, _ in p.loops) for p in block.passes if p.loops)
        split = (name(block.split.axis), block.split.parts) if block.split else None
        grid = tuple(sorted(name(a) for a, _ in block.grid))
        return Assignment(Roles(grid, loops, split), {name(a): t for a, t in block.tiles().items()})

    def _shown(self, axes: Collection[str]) -> str:
        return ", ".join(sorted(self.axes.get(a, a) for a in axes))

    def _admitted(self, roots: tuple[int, ...], given: Assignment) -> None:
        """Raises Refused where the space has no such roles."""
        p, space, roles = self.problem, self.space, given.roles
        if unknown := [a for a in given.tiles if a not in p.sizes]:
            raise outside("axes", f"{self._shown(unknown)} is no axis of the program")
        if len(roles.passes) > space.passes:
            remedy = f"Give SearchSpace(passes={len(roles.passes)})" if len(roles.passes) <= 2 else ""
            what = f"a kernel loops {len(roles.passes)} times in sequence, and SearchSpace.passes is {space.passes}"
            raise outside("passes", what, remedy)
        shared = set.intersection(*(set(p.axes(r)) for r in roots)) if roots else set[str]()
        if lacking := [a for a in roles.grid if a not in shared]:
            raise outside(
                "grid", f"the axis {self._shown(lacking)} is on the grid, and the kernel's results do not all have it"
            )
        free = {a for a in shared if p.limits[a] > 1}
        if space.grid is not None and set(roles.grid) & free != set(space.grid) & free:
            raise outside(
                "grid",
                f"the grid is over ({self._shown(roles.grid)}), and SearchSpace.grid is ({self._shown(space.grid)})",
                "Change SearchSpace.grid",
            )
        if roles.split and not space.split:
            raise outside(
                "split", f"{self._shown(roles.split[:1])} is split over the grid", "Give SearchSpace(split=True)"
            )
        if space.loops is not None and (others := roles.loops - set(space.loops)):
            raise outside(
                "loops",
                f"a pass loops over {self._shown(others)}, and SearchSpace.loops is ({self._shown(space.loops)})",
                "Change SearchSpace.loops",
            )
        self._tiles(given)
        run = Partition(p, space)
        sequences = run.sequences(roots, 1)
        if roles.passes and _unordered(roles.passes) not in {_unordered(s) for s in sequences}:
            loops = " then ".join("·".join(self.axes.get(a, a) for a in loop) for loop in roles.passes)
            raise outside(
                "loops",
                f"the search has no loops over {loops}: it loops over axes that are summed or "
                f"reduced over, in nests of two where both are longer than {WHOLE}, and in an order that "
                "the values need",
            )
        if roles.split:
            if len(roles.passes) != 1 or len(roles.passes[0]) != 1:
                raise outside("split", "a split kernel loops over more than the axis that is split")
            counts = run.split_counts(roots, roles.grid, roles.split[0])
            if roles.split[1] not in counts:
                known = " or ".join(map(str, counts)) or "none"
                raise outside(
                    "split",
                    f"{self._shown(roles.split[:1])} is split into {roles.split[1]} parts, and "
                    f"the search tries {known} with this grid, which fills the device once or twice",
                )

    def _tiles(self, given: Assignment) -> None:
        for a, tile in given.tiles.items():
            fixed = dict(self.space.tiles).get(a)
            if fixed is not None and tile != min(fixed, _power(self.problem.sizes[a])):
                raise outside(
                    "tiles",
                    f"the tile of {self._shown([a])} is {tile}, and SearchSpace.tiles fixes {fixed}",
                    "Change SearchSpace.tiles",
                )
            if tile & (tile - 1):
                raise outside("tiles", f"the tile of {self._shown([a])} is {tile}, and the search tries powers of two")

    def _with(self, loaded: Collection[int], edges: Mapping[int, Mapping[Edge, str]]) -> Problem:
        """The problem in which these classes, and no others beside the inputs, lie in memory; `edges` restricts what is
        computed."""
        memory = dict.fromkeys([*self.problem.inputs, *loaded], 0.0)
        closure = self.task.closure
        if edges:
            cells = list(closure.classes)
            for c, kept in edges.items():
                cells[c] = Class(cells[c].value, cells[c].axes, dict(kept))
            closure = replace(closure, classes=cells)
        scaled = {c for c in loaded if c in self.problem.scaled}
        return replace(self.problem, closure=closure, memory=memory, bound={}, scaled=scaled)

    def _derivation(self, roots: tuple[int, ...], reads: Collection[int], given: Assignment) -> Derivation:
        """The kernel's own way, or the cheapest that computes the same under its roles.  Raises Refused."""
        loaded = [c for c in reads if c not in self.problem.inputs]
        computed = self.read.computed()
        cells = self.task.closure.classes
        only_loaded: dict[int, dict[Edge, str]] = {c: {} for c in loaded if c not in roots}
        own = {
            c: {e: r for e, r in cells[c].edges.items() if computed.issuperset(e.children)}
            for c in self.task.closure.order
            if c not in only_loaded
        }
        found = self._cheapest(roots, loaded, given, {**own, **only_loaded})
        if found is None:
            odd = self.read.unknown()
            found = self._cheapest(roots, loaded, given, only_loaded)
            if found is not None and odd:
                text = self.task.notation().text(odd[0])
                raise outside("closure", f"no rule leads to the value {text}", CANDIDATES)
        if found is None:
            raise Refused(self._infeasible(roots, loaded, given))
        self._fits(self._with(loaded, {}), found)
        return found

    def _cheapest(
        self,
        roots: tuple[int, ...],
        loaded: Sequence[int],
        given: Assignment,
        edges: Mapping[int, Mapping[Edge, str]],
    ) -> Derivation | None:
        p = self._with(loaded, edges)
        outcome = Survey(p, roots, [given]).outcome(alone=False)
        if math.isinf(outcome.bounds[0]):
            return None
        return KernelSearch(outcome, 0).run(math.inf)

    def _infeasible(self, roots: tuple[int, ...], loaded: Sequence[int], given: Assignment) -> Pruned | Outside:
        """Under these roles nothing computes the roots at these tiles; perhaps at the least tiles."""
        least = Assignment(given.roles, dict.fromkeys(given.tiles, 1))
        if self._cheapest(roots, loaded, least, {}) is not None:
            return Pruned("tile", "a tile of the kernel is larger than a block can hold", _room(self.problem))
        whole = [a for c in roots for a in self.problem.axes(c) if a not in given.tiles]
        shown = f"; whole in a tile: {self._shown(set(whole))}" if whole else ""
        return Pruned(
            "feasibility",
            f"no derivation computes the results under these roles{shown}",
            "an axis on the grid is not summed over, what a loop computes is closed in it, and tiles fit a block",
        )

    def _fits(self, p: Problem, d: Derivation) -> None:
        """Raises Refused where the tiles exceed the device."""
        tiles = dict(d.tiles)
        footprint = Footprint(p, d)
        work = footprint.work(tiles)
        shared, room = STAGES * work.stage + work.resident, p.device.shared_bytes_per_block
        if footprint.excess(tiles) > 0:
            raise pruned("tile", "a tile has more elements than a block can hold", _room(p), SMALLER)
        if shared > room:
            raise pruned(
                "feasibility",
                f"the loads of {STAGES} iterations take {shared / 1024:.0f} KiB of shared memory",
                f"{room / 1024:.0f} KiB on {p.device.name}",
                SMALLER,
            )
        if work.accumulators > ACCUMULATED:
            raise pruned(
                "feasibility",
                f"accumulators take {4 * work.accumulators / 1024:.0f} KiB of registers",
                f"{4 * ACCUMULATED // 1024} KiB",
                SMALLER,
            )

    # -- the comparison

    def _compared(self, priced: Sequence[Priced]) -> Answer:
        calls = [x for x in priced if not x.ahead]
        seconds, best = sum(x.prediction.seconds for x in calls), self.report.predicted_seconds
        kernels = tuple(kernel_cost(x.name, x.prediction, self.problem) for x in calls)
        if seconds >= best * (1 - ALIKE):
            return Costlier(seconds, best, kernels)
        gain = f"{1e6 * seconds:.1f} µs are predicted for it, less than the {1e6 * best:.1f} µs of what was chosen"
        if sum(x.rank for x in calls) >= best * (1 - ALIKE):
            return Pruned(
                "margin",
                f"{gain}, but by less than the model is sure of",
                f"a split must win by a factor of {SPLIT_MARGIN}",
            )
        if self.segmented:
            many, gain = operators(self.task.program), f"{gain}, but the program is searched in segments"
            if many <= self.space.operators:
                limit = "a summed exponential of a value that holds exponentials begins another segment"
                return Pruned(
                    "margin", gain, limit, "Give the value between them as an output, so that it lies in memory"
                )
            limit = f"SearchSpace.operators = {self.space.operators}"
            return Pruned("budget", gain, limit, f"Give SearchSpace(operators={many})")
        if self.report.stop.kind != "Saturated":
            field = {"NodeLimit": "nodes", "EntryLimit": "entries", "StateLimit": "states"}.get(self.report.stop.kind)
            remedy = f"Give SearchSpace({field}=...) a greater budget" if field else "Give more time"
            return Pruned("budget", f"{gain}, but the search stopped before", str(self.report.stop), remedy)
        return Pruned(
            "bound",
            f"{gain}, but no kernel or plan was kept that leads to it: of each kernel the derivations "
            "of least additive cost are ranked",
            f"{KEPT} derivations for each kernel, of {RUNS} assignments of roles",
            "Fix its roles with SearchSpace.grid, loops or tiles",
        )


CANDIDATES = (
    'SearchSpace(candidates=20000, abstraction="off") finds identities that need cancellation, where they take no more '
    "operators than the shortest way known"
)
SMALLER = "Smaller tiles fit"
MOST_TEXT = 240


def _cut(a: Assignment) -> str:
    """How a kernel is cut, as a text that is the same for equal roles and tiles."""
    return str((sorted(a.roles.grid), a.roles.passes, a.roles.split, sorted(a.tiles.items())))


def _several(classes: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(classes)))


def _contracted(semantics: Program) -> tuple[str, ...] | None:
    """The axes that a library call contracts, if it is one contraction of two values, stored in whatever type."""
    match semantics.equations:
        case (Equation(op=Contract(axes), args=(_, _)), *rest) if all(isinstance(e.op, Cast) for e in rest):
            return axes
        case _:
            return None


def _unordered(passes: Sequence[Loop]) -> tuple[frozenset[str], ...]:
    return tuple(map(frozenset, passes))


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _room(p: Problem) -> str:
    return f"{LOADED_TILE} elements of a tile that is loaded, {COMPUTED_TILE} of one that is computed"
