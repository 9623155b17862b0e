"""Large programs in segments: where to cut, what each segment costs, and one μGraph of all.

    order       operators by the number of contractions below them, then by level: it depends on no names, and parallel
                branches (the projections before attention) lie side by side.  Intervals of it are convex.
    cuts        borders of levels at which all values in memory may lie there, few bytes of them first
    choice      the shortest path over cuts, where an edge is a segment and costs what its search says.  Segments
                between neighbouring cuts are all searched; a longer one only if it lies on the shortest path when it is
                priced by what it may cost at least.  (Lazy shortest paths: Dellin and Srinivasa, ICAPS 2016.)
    sharing     a segment is searched under canonical names, so that equal ones are one search
    joining     the μGraphs of the segments in order, under the program's own names

Views and numbers are no operators: each segment that needs them has them for itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any

from mugraph.ir.axes import determined, representative
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Cast, Compare, Concat, Contract, Elementwise, Kernel, MaskedExp, Op, Reduce, Select
from mugraph.ir.printer import Names, quoted
from mugraph.ir.rename import renamed
from mugraph.ir.serialize import from_json, to_json
from mugraph.ir.shift import OPAQUE, is_exponential
from mugraph.ir.types import DType, Input, Output, Storage, Tensor
from mugraph.search.canonical import Canonical, canonical, colours
from mugraph.search.cost import Device, bytes_of, floor_seconds, least_kernel_seconds
from mugraph.search.pieces import is_free
from mugraph.search.report import KernelCost, LawStep, SearchReport, SegmentReport, decoded
from mugraph.search.space import SearchSpace

STEM = r"(?<![A-Za-z0-9_])[va]\d{4}"  # a canonical name, or what the name of something made from it begins with
NOT_SEARCHED = "library calls"
MARGIN = 0.02  # of the time of its parts that a longer segment must promise to save; the model is no surer
NAME = "segment"  # of every segment's program: equal segments are equal texts


@dataclass(frozen=True)
class Task:
    """The search of one segment, which depends on nothing else: the program and the space have canonical names."""

    program: Program
    space: SearchSpace
    on: Device

    @cached_property
    def key(self) -> str:
        return f"{self.program}\n{self.space}\n{self.on.digest}"

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON data."""
        return {"program": to_json(self.program), "space": asdict(self.space), "device": asdict(self.on)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Task:
        return Task(from_json(data["program"]), decoded(SearchSpace, data["space"]), Device(**data["device"]))


@dataclass(frozen=True)
class Done:
    """What a task gives."""

    graph: KernelGraph
    report: SearchReport

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON data."""
        return {"graph": to_json(self.graph), "report": asdict(replace(self.report, asked=None))}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Done:
        return Done(from_json(data["graph"]), decoded(SearchReport, data["report"]))


Interval = tuple[int, int]  # of the order: from, to
Solve = Callable[[Sequence[Task], Callable[[], bool]], Sequence[Done | None]]  # None: it was stopped before


@dataclass(frozen=True)
class Segment:
    """The operators from `start` to `stop` of the order, as a program; under canonical names, as a task."""

    start: int
    stop: int
    program: Program
    here: Canonical
    task: Task

    def spelled(self, text: str) -> str:
        """A text about the task in the program's own names."""
        names = {**self.here.names} | {new: axis.name for new, axis in self.here.axes.items()}
        return re.sub(STEM, lambda m: names.get(m[0], m[0]), text)

    def cost(self, k: KernelCost) -> KernelCost:
        """The cost of a launch of the task, with its laws, in the program's own names."""
        steps = (LawStep(*(self.spelled(getattr(s, f.name)) for f in fields(s))) for s in k.steps)
        return replace(k, name=self.spelled(k.name), steps=tuple(steps))


@dataclass
class Partitioned:
    """The segments chosen, each with its result (None: library calls), and predicted seconds; how many different ones
    were searched, and whether a budget ended that."""

    segments: list[tuple[Segment, Done | None, float]]
    searched: Mapping[str, Done]
    truncated: bool

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.segments)


# -- the order


@dataclass(frozen=True)
class Line:
    """The operators of a program in a line, views and numbers apart.

    operators   equations in order
    groups      how many operators come before each border of levels
    free        what is no operator, by the name of its result
    """

    program: Program
    operators: tuple[Equation, ...]
    groups: tuple[int, ...]
    free: Mapping[str, Equation]

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.program.tensors()

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Where in the order a computed value comes from."""
        return {t.name: i for i, e in enumerate(self.operators) for t in e.targets}

    def reads(self, e: Equation) -> dict[str, None]:
        """The values of operators that an equation needs, through views."""
        return _reads(e, self.free, self.position)

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """The last operator that needs each computed value."""
        return {name: i for i, e in enumerate(self.operators) for name in self.reads(e)}

    def live(self, cut: int) -> list[str]:
        """Computed values that lie in memory between the operators before a cut and those after it."""
        return self._lives[cut]

    @cached_property
    def _lives(self) -> Sequence[list[str]]:
        found: list[list[str]] = [[] for _ in range(len(self.operators) + 1)]
        for name, last in self.last_use.items():
            for cut in range(self.position[name] + 1, last + 1):
                found[cut].append(name)
        return found


def operators(program: Program) -> int:
    """How many equations are neither views nor numbers."""
    return len(program.equations) - len(_free(program))


def is_cut(program: Program, space: SearchSpace) -> bool:
    """Whether the program is searched in segments: where it has too many operators, or summed exponentials of values
    that hold exponentials, as in two attentions one after the other.  Only what lies in memory between these can be
    shifted so that nothing overflows."""
    return operators(program) > space.operators or bool(nestings(program))


def nestings(program: Program) -> list[tuple[str, str]]:
    """Pairs of exponentials: of a value that holds the first, which is summed over later, the second."""
    summed: set[str] = set()  # values that sums are made of
    for e in reversed(program.equations):
        if isinstance(e.op, Contract) or (isinstance(e.op, Reduce) and e.op.kind in ("sum", "mean")):
            summed.update(e.args)
        elif summed.isdisjoint(t.name for t in e.targets):
            continue
        elif is_free(e) or isinstance(e.op, Cast | Select | Concat):
            summed.update(e.args)
        elif isinstance(e.op, Elementwise) and e.op.fn in ("add", "sub", "neg", "mul", "square", "div"):
            summed.update(e.args[:1] if e.op.fn == "div" else e.args)
    below: dict[str, dict[str, None]] = {i.name: {} for i in program.inputs}
    found: list[tuple[str, str]] = []
    for e in program.equations:
        held = {x: None for a in e.args for x in below[a]}
        if is_exponential(e.op):
            found += [(x, e.target.name) for x in below[e.args[0]] if e.target.name in summed]
            held = {e.target.name: None}
        elif isinstance(e.op, Compare) or (isinstance(e.op, Elementwise) and e.op.fn in OPAQUE):
            held = {}
        below.update((t.name, held) for t in e.targets)
    return found


def _free(program: Program) -> dict[str, Equation]:
    """Views, and what is computed from no input at all (numbers, indices, masks of them), outputs excluded."""
    found: dict[str, Equation] = {}
    given = {o.value for o in program.outputs}
    nothing: set[str] = set()  # values that need no input
    for e in program.equations:
        if len(e.targets) != 1 or e.target.name in given:
            continue
        if nothing.issuperset(e.args):
            nothing.add(e.target.name)
            found[e.target.name] = e
        elif is_free(e):
            found[e.target.name] = e
    return found


def _reads(e: Equation, free: Mapping[str, Equation], known: Mapping[str, object]) -> dict[str, None]:
    found: dict[str, None] = {}
    for a in e.args:
        if a in free:
            found |= _reads(free[a], free, known)
        elif a in known:
            found[a] = None
    return found


def line(program: Program, sizes: Mapping[str, int]) -> Line:
    """The operators by contractions below, level and colour.  One moves down the line towards its first use where that
    keeps no more bytes in memory: what weights alone determine is computed where it is needed."""
    free, tensors = _free(program), program.tensors()
    equations = [e for e in program.equations if e.targets[0].name not in free]
    made = {t.name: e for e in equations for t in e.targets}
    reads = {id(e): list(_reads(e, free, made)) for e in equations}
    depth: dict[int, int] = {}
    level: dict[int, int] = {}
    users: dict[int, list[Equation]] = {id(e): [] for e in equations}
    for e in equations:
        below = [made[n] for n in reads[id(e)]]
        level[id(e)] = max((level[id(b)] for b in below), default=0) + 1
        depth[id(e)] = max((depth[id(b)] for b in below), default=0) + isinstance(e.op, Contract)
        for b in {id(b): b for b in below}.values():
            users[id(b)].append(e)

    given = {o.value for o in program.outputs}
    for e in reversed(equations):
        if not users[id(e)] or any(t.name in given for t in e.targets):
            continue
        later = min(depth[id(u)] - isinstance(u.op, Contract) for u in users[id(e)])
        kept = [n for n in reads[id(e)] if all(depth[id(u)] < later for u in users[id(made[n])] if u is not e)]
        shared = any(len(users[id(made[n])]) > 1 for n in kept)
        saved, more = bytes_of(e.targets, sizes), bytes_of((tensors[n] for n in kept), sizes)
        if more < saved or (more == saved and not shared):
            depth[id(e)] = later
    groups: dict[tuple[int, int], list[Equation]] = {}
    for e in equations:
        groups.setdefault((depth[id(e)], level[id(e)]), []).append(e)
    shade = colours(replace(program, outputs=()))  # whatever the order of outputs
    ordered: list[Equation] = []
    borders, place = [0], dict[str, int]()
    for _, group in sorted(groups.items()):
        # of interchangeable operators, those come first whose operands do
        group.sort(key=lambda e: (shade[e.targets[0].name], sorted(place[n] for n in reads[id(e)])))
        for e in group:
            place |= dict.fromkeys((t.name for t in e.targets), len(ordered))
            ordered.append(e)
        borders.append(len(ordered))
    return Line(program, tuple(ordered), tuple(borders), free)


# -- the cuts


def unsafe(program: Program) -> tuple[set[str], set[str]]:
    """Values that memory would ruin: exponentials that are normalised later, which overflow (within one segment they
    are shifted by their maximum), and in 16 bits exponents, whose rounding is a relative error of the exponential (the
    rule of `setup.may_be_materialised`, by equations)."""
    tensors = program.tensors()
    degree: dict[str, float] = {i.name: 0 for i in program.inputs}
    for e in program.equations:
        found = _degree(e, [degree[a] for a in e.args])
        degree.update((t.name, found) for t in e.targets)
    overflowing: set[str] = set()
    exponents: set[str] = set()
    for e in reversed(program.equations):
        made = {t.name for t in e.targets}
        if not made.isdisjoint(overflowing) or (_cancels(e.op) and not any(degree[n] for n in made)):
            overflowing.update(a for a in e.args if degree[a])
        if isinstance(e.op, MaskedExp) or e.op == Elementwise("exp"):
            exponents.add(e.args[0])
        if exponents.isdisjoint(made):
            continue
        scales = isinstance(e.op, Elementwise) and e.op.fn in ("add", "sub", "mul", "div", "neg")
        if scales or isinstance(e.op, Cast | Select | Concat) or is_free(e):
            exponents.update(a for a in e.args if len(tensors[a].axes) == len(e.target.axes))
    narrow = {n for n, t in tensors.items() if t.dtype.is_float and t.dtype.bits < 32}
    return overflowing, exponents & narrow


def _cancels(op: Op) -> bool:
    """Whether the factors of exponentials may cancel in it, or come out of it."""
    return isinstance(op, Contract) or op in (Elementwise("div"), Elementwise("mul"), Elementwise("log"))


def _degree(e: Equation, args: list[float]) -> float:
    """How many exponentials more than it divides by a value carries."""
    match e.op:
        case MaskedExp() | Elementwise("exp"):
            return 1
        case Elementwise("mul") | Contract():
            return sum(args)
        case Elementwise("div"):
            return args[0] - args[1]
        case Elementwise("reciprocal"):
            return -args[0]
        case Elementwise("square"):
            return 2 * args[0]
        case Elementwise("add" | "sub" | "max" | "min" | "neg" | "abs") | Concat() | Reduce() | Cast():
            return max(args, default=0)
        case Select():
            return max(args[1:])
        case _:
            return max(args, default=0) if is_free(e) else 0


def cuts(whole: Line, most: int, sizes: Mapping[str, int], inside: Iterable[str] = ()) -> list[int]:
    """Places where segments may begin: borders at which few bytes lie in memory (less than at the border before and no
    more than at the one after) or a contraction ends; more of them where segments of `most` operators would not fit
    between these.  Exponents are cut only where a segment would else have twice as many: at worst they are rounded as
    where every operator runs alone."""
    overflowing, exponents = unsafe(whole.program)
    never = overflowing.union(inside)
    takes = {n: bytes_of([whole.tensors[n]], sizes) for n in whole.last_use}

    def bytes_at(cut: int, rounded: bool = False) -> float:
        live = whole.live(cut)
        if not never.isdisjoint(live) or not (rounded or exponents.isdisjoint(live)):
            return math.inf
        return math.fsum(takes[n] for n in live)

    borders: Sequence[int] = whole.groups
    weight = {b: bytes_at(b) for b in borders}
    ends = {
        b
        for before, b in pairwise(borders)
        if weight[b] < math.inf and any(isinstance(e.op, Contract) for e in whole.operators[before:b])
    }
    kept = {0, *ends, len(whole.operators)}
    for _ in range(2):  # the least of their neighbours, then of these
        least = [
            b for a, b, c in zip(borders, borders[1:], borders[2:], strict=False) if weight[a] > weight[b] <= weight[c]
        ]
        borders = sorted({0, *least, *kept})
    kept |= {b for b in least if weight[b] < math.inf}
    for choice, limit in (
        ([b for b in whole.groups if weight[b] < math.inf], most),
        ([i for i in range(len(whole.operators)) if bytes_at(i) < math.inf], most),
        ([i for i in range(len(whole.operators)) if bytes_at(i, rounded=True) < math.inf], 2 * most),
    ):
        marks = sorted(kept)
        for low, high in pairwise(marks):
            if high - low > limit:
                kept.update(c for c in choice if low < c < high)
    marks = [0]
    for mark in sorted(kept)[1:]:  # an interval whose inputs do not give a symbolic size is no program: it goes on
        if mark == len(whole.operators) or _has_sizes(extract(whole, marks[-1], mark)):
            marks.append(mark)
    while len(marks) > 2 and not _has_sizes(extract(whole, *marks[-2:])):
        del marks[-2]
    return marks


def _has_sizes(program: Program) -> bool:
    """Whether the inputs' shapes determine all symbolic sizes."""
    return set(program.dims()) <= determined(size for i in program.inputs for size in i.tensor.shape)


# -- segments as programs


def extract(whole: Line, start: int, stop: int) -> Program:
    """The operators of an interval as a program: what comes from outside is an input, what is needed outside, or is an
    output of the program, an output."""
    chosen = whole.operators[start:stop]
    tensors = whole.tensors
    own = {t.name for e in chosen for t in e.targets}
    views: dict[str, Equation] = {}

    def need(name: str) -> None:
        if name in whole.free and name not in views:
            for a in whole.free[name].args:
                need(a)
            views[name] = whole.free[name]

    equations: list[Equation] = []
    for e in chosen:
        before = len(views)
        for a in e.args:
            need(a)
        equations += [*list(views.values())[before:], e]
    read = dict.fromkeys(a for e in equations for a in e.args if a not in own and a not in views)
    lasting = whole.program.fixed()
    given = {i.name: replace(i, constant=i.constant and i.name in lasting) for i in whole.program.inputs}
    inputs = tuple(given.get(n) or Input(tensors[n], Storage(tensors[n].dtype)) for n in read)
    finals = {o.value: o for o in whole.program.outputs}
    outputs = []
    for e in chosen:
        for t in e.targets:
            if t.name in finals:
                outputs.append(replace(finals[t.name], alias_of=None))
            elif whole.last_use.get(t.name, -1) >= stop:
                outputs.append(Output(t.name, Storage(t.dtype)))
    return Program(NAME, inputs, tuple(equations), tuple(outputs))


def segment(whole: Line, start: int, stop: int, space: SearchSpace, on: Device, sizes: Mapping[str, int]) -> Segment:
    """The interval under canonical names.  Its own order is taken anew, so that it does not depend on what is around;
    fields of the space that name what it lacks are left out."""
    part = line(extract(whole, start, stop), sizes)
    program = extract(part, 0, len(part.operators))
    here = canonical(program)
    values = {old: new for new, old in here.names.items()}
    axes = {axis.name: new for new, axis in here.axes.items()}

    def known(names: tuple[str, ...] | None, mapping: Mapping[str, str]) -> tuple[str, ...] | None:
        return None if names is None else tuple(mapping[n] for n in names if n in mapping)

    made = {t.name for e in program.equations for t in e.targets} - {o.value for o in program.outputs}
    own = space.but(
        grid=known(space.grid, axes),
        loops=known(space.loops, axes),
        tiles=tuple((axes[a], t) for a, t in space.tiles if a in axes),
        inside=tuple(values[n] for n in space.inside if n in made),
    )
    return Segment(start, stop, program, here, Task(replace(here.program, name=NAME), own, on))


# -- the choice


def partitioned(
    whole: Line,
    space: SearchSpace,
    on: Device,
    solve: Solve,
    each: Sequence[float],
    stop: Callable[[], bool],
) -> Partitioned:
    """The cheapest way over the cuts.  `each`: what each operator costs as a library call.  A segment whose search is
    not there yet when a budget ends runs as these, so there is always a way."""
    sizes = {a.name: representative(a.size, space.symbolic) for a in whole.program.axes().values()}
    marks = cuts(whole, space.operators, sizes, space.inside)
    at = whole.position
    nested = [(at[x], at[y]) for x, y in nestings(whole.program) if x in at and y in at]
    edges = [
        (low, high)
        for i, low in enumerate(marks)
        for high in marks[i + 1 :]
        if high == marks[i + 1] or (high - low <= space.operators and not any(low <= x and y < high for x, y in nested))
    ]
    run = _Run(whole, space, on, solve, sizes, marks, stop)
    calls = {edge: sum(each[slice(*edge)]) for edge in edges}
    run.search([e for e in edges if e[1] == marks[marks.index(e[0]) + 1]])
    while not run.truncated:
        known = {e: seconds for e in edges if (seconds := run.seconds(e)) is not None}
        price = {e: known[e] if e in known else run.hope(e, known, calls) for e in edges}
        if not run.search(_shortest(marks, price)):
            break
    price = {e: calls[e] if (seconds := run.seconds(e)) is None else seconds for e in edges}
    chosen = [(run.segment(e), run.found(e), price[e]) for e in _shortest(marks, price)]
    return Partitioned(chosen, run.done, run.truncated or bool(run.failed))


@dataclass
class _Run:
    """The searches of one partition: what is known of each interval of the order."""

    whole: Line
    space: SearchSpace
    on: Device
    solve: Solve
    sizes: Mapping[str, int]
    marks: Sequence[int]
    stop: Callable[[], bool]
    segments: dict[Interval, Segment] = field(default_factory=dict)
    done: dict[str, Done] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    truncated: bool = False

    def segment(self, edge: Interval) -> Segment:
        if edge not in self.segments:
            self.segments[edge] = segment(self.whole, *edge, self.space, self.on, self.sizes)
        return self.segments[edge]

    def found(self, edge: Interval) -> Done | None:
        return self.done.get(self.segments[edge].task.key) if edge in self.segments else None

    def seconds(self, edge: Interval) -> float | None:
        done = self.found(edge)
        return None if done is None else done.report.predicted_seconds

    def search(self, edges: Sequence[Interval]) -> bool:
        """Searches what is not known of these, one of each kind; whether there was any."""
        wanted = {self.segment(e).task.key: self.segment(e).task for e in edges}
        tasks = [t for key, t in wanted.items() if key not in self.done and key not in self.failed]
        room = self.space.segments - len(self.done) - len(self.failed)
        self.truncated = self.truncated or len(tasks) > room or self.stop()
        tasks = [] if self.stop() else tasks[:room]
        if not tasks:
            return False
        for task, result in zip(tasks, self.solve(tasks, self.stop), strict=True):
            if result is None:
                self.failed.add(task.key)
            else:
                self.done[task.key] = result
        return True

    def hope(self, edge: Interval, known: Mapping[Interval, float], calls: Mapping[Interval, float]) -> float:
        """The least that a segment which was not searched may cost: what its parts cost, less the launches but one, and
        the traffic of what lies in memory between them.  Infinite where that gains too little to be looked for, and
        unless two parts that make it up paid, or of the two segments that are one cut shorter one paid and the other
        may."""
        low, high = (self.marks.index(m) for m in edge)
        if high - low == 1 or (edge in self.segments and self.segment(edge).task.key in self.failed):
            return calls[edge]
        shorter = ((edge[0], self.marks[high - 1]), (self.marks[low + 1], edge[1]))
        paid = [self.paid(e, known, calls) for e in shorter]
        path, seconds = self.apart(edge, known, calls)
        if False in paid or not (any(paid) or (len(path) == 2 and all(self.paid(e, known, calls) for e in path))):
            return math.inf
        launches = sum(max(1, len(done.report.kernels)) if (done := self.found(e)) else 1 for e in path)
        saved = max(0, launches - 1) * least_kernel_seconds(self.on)
        for _, cut in path[:-1]:
            gone = [n for n in self.whole.live(cut) if self.whole.last_use[n] < edge[1]]
            saved += 2 * bytes_of((self.whole.tensors[n] for n in gone), self.sizes) / self.on.bandwidth
        if saved <= MARGIN * seconds:
            return math.inf
        self.segment(edge)  # one like it may have been searched
        exact = self.seconds(edge)
        return max(seconds - saved, least_kernel_seconds(self.on)) if exact is None else exact

    def paid(self, edge: Interval, known: Mapping[Interval, float], calls: Mapping[Interval, float]) -> bool | None:
        """Whether a segment is cheaper than its parts, if it was searched."""
        if self.marks.index(edge[1]) - self.marks.index(edge[0]) == 1:
            return True
        return known[edge] < self.apart(edge, known, calls)[1] if edge in known else None

    def apart(
        self, edge: Interval, known: Mapping[Interval, float], calls: Mapping[Interval, float]
    ) -> tuple[list[Interval], float]:
        """The cheapest way over the parts of a segment, and its time."""
        low, high = edge
        marks = self.marks[self.marks.index(low) : self.marks.index(high) + 1]
        parts = {(a, b): known.get((a, b), calls[a, b]) for a, b in combinations(marks, 2) if (a, b) in calls}
        parts.pop(edge, None)
        path = _shortest(marks, parts)
        return path, sum(parts[e] for e in path)


def _shortest(marks: Sequence[int], price: Mapping[Interval, float]) -> list[Interval]:
    """The cheapest path from the first mark to the last; of equal ones, that of fewest segments."""
    best: dict[int, tuple[float, int, list[Interval]]] = {marks[0]: (0.0, 0, [])}
    into: dict[int, list[Interval]] = {}
    for edge in price:
        into.setdefault(edge[1], []).append(edge)
    for mark in marks[1:]:
        ways = [(best[e[0]][0] + price[e], best[e[0]][1] + 1, e) for e in into[mark]]
        seconds, count, edge = min(ways)
        best[mark] = (seconds, count, [*best[edge[0]][2], edge])
    return best[marks[-1]][2]


def least_seconds(program: Program, sizes: Mapping[str, int], on: Device) -> float:
    """What the program reads and writes, or its contractions, at the sheet rates."""
    tensors = program.tensors()

    outputs = dict.fromkeys(o.value for o in program.outputs)
    moved = bytes_of([*(i.tensor for i in program.inputs), *(tensors[n] for n in outputs)], sizes)
    flops = 0.0
    for e in program.equations:
        if isinstance(e.op, Contract):
            flops += 2.0 * math.prod(sizes[a] for a in {a.name for n in e.args for a in tensors[n].axes})
    dtypes = [t.dtype for t in tensors.values() if t.dtype.is_float]
    return floor_seconds(moved, flops, max(dtypes, key=on.matmul_rate, default=DType.f32), on)


def segment_reports(run: Partitioned) -> tuple[SegmentReport, ...]:
    found: list[SegmentReport] = []
    first: dict[str, int] = {}
    for i, (s, done, seconds) in enumerate(run.segments):
        structure = next(c.structure for c in done.report.candidates if c.verdict == "chosen") if done else NOT_SEARCHED
        found.append(
            SegmentReport(
                start=s.start,
                operators=s.stop - s.start,
                gives=tuple(o.value for o in s.program.outputs),
                program=str(s.program),
                structure=s.spelled(structure),
                seconds=seconds,
                stop=str(done.report.stop) if done else "not searched",
                shared_with=first.get(s.task.key),
            )
        )
        first.setdefault(s.task.key, i)
    return tuple(found)


# -- the whole again


def join(program: Program, parts: Sequence[tuple[Segment, KernelGraph]]) -> KernelGraph:
    """The segments' graphs, one after the other, under the program's names: results of a segment have their own, all
    else gets a name that nothing has."""
    taken = {*program.tensors()}
    axes = {a.name for a in program.axes().values()}
    equations: list[Equation] = []
    for s, graph in parts:
        names = _Back(s, graph, taken, axes)
        equations += renamed(graph, names).equations
    return KernelGraph(program.name, program.inputs, tuple(equations), program.outputs)


@dataclass
class _Back(Names):
    """From canonical names to the program's.  A name that begins with a canonical one (v0003_tile) keeps its end."""

    segment: Segment
    graph: KernelGraph
    taken: set[str]
    axis_names: set[str]
    values: dict[str, str] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        here = self.segment.here
        program = here.program
        fixed = {i.name for i in program.inputs} | {o.value for o in program.outputs}
        self.values = {n: here.names[n] for n in fixed}
        self.axes = {new: axis.name for new, axis in here.axes.items()}
        for e in self.graph.equations:  # what lies in memory has a name of its own in the whole graph
            partial = [s.target for b in e.op.blocks for s in b.stores] if isinstance(e.op, Kernel) else []
            for name in (*(t.name for t in e.targets), *partial):
                if name not in self.values:
                    self.values[name] = self._fresh(name, self.taken)
                    self.taken.add(self.values[name])

    def _fresh(self, name: str, taken: set[str]) -> str:
        here = self.segment.here
        stem = re.match(STEM, name)
        if stem and stem[0] in here.names:
            name = here.names[stem[0]] + name[stem.end() :]
        elif stem and stem[0] in here.axes:
            name = here.axes[stem[0]].name + name[stem.end() :]
        count = 0
        while (found := f"{name}_{count}" if count else name) in taken:
            count += 1
        return found

    def program(self, name: str) -> str:
        return quoted(name)

    def value(self, name: str) -> str:
        if name not in self.values:
            self.values[name] = self._fresh(name, self.taken | set(self.values.values()))
        return quoted(self.values[name])

    def axis(self, name: str) -> str:
        if name not in self.axes:
            self.axes[name] = self._fresh(name, self.axis_names)
            self.axis_names.add(self.axes[name])
        return quoted(self.axes[name])

    def split(self, axis: str, part: str) -> None:
        self.axis(axis)
        self.axes[part] = f"{self.axes[axis]}_part"
