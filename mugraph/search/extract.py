"""One kernel: which axes play which role, and the cheapest derivation of its roots under those roles.

Roles belong to a kernel, not to a value: an axis is on the grid, looped in pass p (alone, or in a nest of two), split
(looped and on the grid), or whole in the tile.  An *entry* (class, p) is a value with an open loop axis computed in
pass p, or any other value available before pass p (p = number of passes + 1: in the epilogue).  Closing over the axes
of a loop leads from a pass q < p; a nest is closed as a whole; closing over a grid axis is refused unless the axis is
split.

A `Survey` looks at all assignments of roles at once: which can compute the roots, and a lower bound of what each
costs.  The extraction of one assignment is A* over cuts: a state is the set of open entries; the topologically highest
is expanded, so each class is paid once and sharing is exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mugraph.ir.types import DType
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import VECTOR_WEIGHT, Device, Product, Read, Work
from mugraph.search.laws import IOTA

Entry = tuple[int, int]
Loop = tuple[str, ...]  # the axes of one pass: one, or a nest of two
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
INFEASIBLE = 99
LOADED_TILE = 65_536  # elements of a tile that is only loaded: 128 KiB of f16 in shared memory
COMPUTED_TILE = 32_768  # elements of a computed tile: 128 KiB of f32 in registers
SHARE = 16  # one extraction may use that part of the budget of states
BEAM = 8  # states kept per topological level when A* exceeds its budget
SECTOR = 64  # bytes side by side below which reads and writes waste bandwidth


@dataclass(frozen=True)
class Roles:
    """`passes` lists the looped axes of each pass; `split` is (axis, parts) of the last pass."""

    grid: tuple[str, ...]
    passes: tuple[Loop, ...]
    split: tuple[str, int] | None = None

    @property
    def loops(self) -> frozenset[str]:
        return frozenset(a for loop in self.passes for a in loop)


class Assignment(NamedTuple):
    """Roles, and the tile size of each axis that is on the grid or looped."""

    roles: Roles
    tiles: Mapping[str, int]


@dataclass(frozen=True)
class Option:
    """One way to get an entry.  `edge` None: load the class from memory (an input, or a materialised value)."""

    cost: float
    edge: Edge | None
    children: tuple[int, ...]
    loop: Loop | None  # the looped axes that the edge closes


@dataclass(frozen=True)
class Step:
    """An entry of the solution and how it is computed."""

    entry: Entry
    option: Option
    children: tuple[Entry, ...]


@dataclass(frozen=True)
class Derivation:
    """A kernel: roots, roles, tile sizes, and its steps from the roots down."""

    roots: tuple[int, ...]
    roles: Roles
    tiles: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]
    cost: float

    def loads(self) -> list[Step]:
        return [s for s in self.steps if s.option.edge is None]


class Way(NamedTuple):
    """An edge with what does not depend on roles: axes of result and operands together, closed axes, volume."""

    edge: Edge
    axes: tuple[str, ...]
    closed: frozenset[str]
    volume: int
    matmul: bool


@dataclass
class Problem:
    """What every kernel of a program shares: the closure, sizes, and the classes that lie in memory.

    sizes    axis -> size that costs are compared at; limits: axis -> its greatest admissible size
    memory   class -> seconds until it is in memory (0 for inputs), for classes that may be loaded
    bound    class -> lower bound of that time, for classes that could be materialised but are not priced yet
    dtypes   class -> element type in memory, where it is not `dtype`
    scaled   classes that lie in memory with an exponent beside them: only kernels of ours read and write them
    innermost  class -> the axis along which its elements lie side by side in memory, where that is known
    """

    closure: Closure
    sizes: Mapping[str, int]
    limits: Mapping[str, int]
    device: Device
    dtype: DType
    memory: dict[int, float]
    bound: dict[int, float]
    dtypes: dict[int, DType]
    scaled: set[int]
    states: int
    innermost: Mapping[int, str]
    expanded: int = 0
    generated: int = 0
    infeasible: int = 0
    bounded: int = 0
    truncated: int = 0

    def __post_init__(self) -> None:
        self.position = {c: i for i, c in enumerate(self.closure.order)}
        self.below: dict[int, frozenset[int]] = {}
        for c in self.closure.order:
            found = {c}
            for e in self.closure.classes[c].edges:
                for x in e.children:
                    found |= self.below[x]
            self.below[c] = frozenset(found)
        cells = self.closure.classes
        self.inputs = {c for c in self.closure.order if any(is_leaf_edge(e) for e in cells[c].edges)}
        self.ways = {c: [self._way(c, e) for e in cells[c].edges if not is_leaf_edge(e)] for c in self.closure.order}

    @cached_property
    def alone(self) -> Mandatory:
        """Classes that every derivation from inputs holds."""
        return _mandatory(self, frozenset(self.inputs))

    def least_bytes(self, c: int) -> float:
        """Bytes that move before a class is in memory, whatever computes it: itself, and inputs that it cannot do
        without."""
        must = self.alone.computed[c]
        inputs = sum(self.bytes(x) for x in self.inputs if must >> self.position[x] & 1)
        return self.bytes(c) + inputs

    @cached_property
    def among(self) -> Mandatory:
        """Classes that every derivation holds which may load what could be materialised."""
        return _mandatory(self, frozenset({*self.inputs, *self.memory, *self.bound}))

    def _way(self, c: int, e: Edge) -> Way:
        axes = self.joined_axes(c, e.children)
        volume = math.prod(self.sizes[a] for a in axes)
        return Way(e, axes, frozenset(e.axes), volume, self.is_matmul(c, e))

    def axes(self, c: int) -> tuple[str, ...]:
        return self.closure.classes[c].axes

    def elements(self, c: int) -> int:
        return math.prod(self.sizes[a] for a in self.axes(c))

    def bytes(self, c: int) -> float:
        return self.elements(c) * self.dtypes.get(c, self.dtype).bits / 8

    def joined_axes(self, c: int, children: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for x in (c, *children) for a in self.axes(x)))

    def is_matmul(self, c: int, edge: Edge) -> bool:
        """A contraction whose two sides both bring an axis of their own: work for tensor cores."""
        if edge.kind != "product" or not edge.closes:
            return False
        a, b = (set(self.axes(x)) for x in edge.children)
        return bool(a - b) and bool(b - a)


def is_leaf_edge(edge: Edge) -> bool:
    """A load of an input, or of the result of an operator outside the calculus.  An index is computed, not loaded."""
    return edge.kind == "load" and edge.leaf is not None and edge.leaf[0] != IOTA


class Mandatory(NamedTuple):
    """Classes that every derivation holds, as bits by topological position: `computed[c]` where c itself must be
    computed (it is a root), `below[c]` where c may be loaded too."""

    computed: Mapping[int, int]
    below: Mapping[int, int]


def _mandatory(p: Problem, loadable: frozenset[int]) -> Mandatory:
    computed: dict[int, int] = {}
    below: dict[int, int] = {}
    for c in p.closure.order:
        own = 1 << p.position[c]
        each = [_union(below[x] for x in w.edge.children) for w in p.ways[c]]
        computed[c] = own | (_intersection(each) if each else 0)
        below[c] = own if c in loadable else computed[c]
    return Mandatory(computed, below)


def _union(masks: Any) -> int:
    result = 0
    for m in masks:
        result |= m
    return result


def _intersection(masks: list[int]) -> int:
    result = masks[0]
    for m in masks[1:]:
        result &= m
    return result


class Survey:
    """All assignments of roles to a kernel for `roots`, side by side: every array has one element for each."""

    def __init__(self, problem: Problem, roots: tuple[int, ...], assignments: Sequence[Assignment]) -> None:
        self.p, self.roots, self.assignments = problem, roots, assignments
        p, roles = problem, [a.roles for a in assignments]
        members = frozenset().union(*(p.below[r] for r in roots))
        self.order = [c for c in p.closure.order if c in members]
        self.played = sorted({a for r in roles for a in (*r.grid, *r.loops)})
        self.bit = {a: 1 << i for i, a in enumerate(self.played)}
        self.last = max((len(r.passes) for r in roles), default=0)
        self.count = np.array([len(r.passes) for r in roles], dtype=np.int64)
        self.grid = np.array([self.mask(r.grid) for r in roles], dtype=np.int64)
        self.passes = [
            np.array([self.mask(r.passes[q]) if q < len(r.passes) else 0 for r in roles], dtype=np.int64)
            for q in range(self.last)
        ]
        self.loops: Ints = np.bitwise_or.reduce(self.passes) if self.passes else np.zeros(len(roles), dtype=np.int64)
        self.split = np.array([self.mask(r.split[:1]) if r.split else 0 for r in roles], dtype=np.int64)
        self.parts = np.array([r.split[1] if r.split else 1 for r in roles], dtype=np.float64)
        self.width = {a: np.array([x.tiles.get(a, p.limits[a]) for x in assignments], float) for a in self.played}
        self.copies = {
            a: np.array([math.ceil(p.sizes[a] / x.tiles[a]) if a in x.roles.grid else 1 for x in assignments], float)
            for a in self.played
        }
        self._copies: dict[int, Floats] = {}
        self._elements: dict[tuple[str, ...], Floats] = {}
        self._costs: dict[tuple[int, Edge], Floats] = {}
        self._seconds: dict[tuple[frozenset[str], bool], Floats] = {}
        self._passes: dict[tuple[tuple[str, ...], int, int], Ints] = {}
        self.blocks = self.replication(()) * self.parts
        self.busy: Floats = np.minimum(1.0, self.blocks / p.device.sms)
        self.open = {c: self.loops & self.mask(p.axes(c)) for c in self.order}
        self.splits = int(np.bitwise_or.reduce(self.split)) if len(roles) else 0
        self.rows = np.arange(len(roles), dtype=np.int64) * (self.last + 2) - 1

    def mask(self, axes: Sequence[str]) -> int:
        return _union(self.bit.get(a, 0) for a in axes)

    def replication(self, axes: Sequence[str]) -> Floats:
        """How many blocks repeat something that lacks some grid axes."""
        key = self.mask(axes)
        if key not in self._copies:
            result = np.ones(len(self.assignments))
            for a in self.played:
                if not self.bit[a] & key:
                    result = result * self.copies[a]
            self._copies[key] = result
        return self._copies[key]

    def elements_of(self, axes: tuple[str, ...]) -> Floats:
        """The size of a tile over the axes."""
        if axes not in self._elements:
            whole = math.prod(self.p.limits[a] for a in axes if a not in self.bit)
            result = np.full(len(self.assignments), float(whole))
            for a in axes:
                if a in self.bit:
                    result = result * self.width[a]
            self._elements[axes] = result
        return self._elements[axes]

    def _held(self, opened: Ints) -> Bools:
        """The open axes lie in one pass."""
        found: Bools = opened == 0
        for q in range(self.last):
            found = found | (opened & ~self.passes[q] == 0)
        return found

    def seconds(self, c: int, way: Way) -> Floats:
        """Seconds of computing the class that way, in each assignment."""
        if (c, way.edge) not in self._costs:
            self._costs[c, way.edge] = self._cost(c, way)
        return self._costs[c, way.edge]

    def _cost(self, c: int, way: Way) -> Floats:
        if not way.edge.children:
            return np.full(len(self.assignments), 1e-12)
        key = (frozenset(way.axes), way.matmul)
        if key not in self._seconds:
            p, volume = self.p, way.volume * self.replication(way.axes)
            rate = p.device.matmul_rate(p.dtype) / 2 if way.matmul else p.device.vector_flops / VECTOR_WEIGHT
            self._seconds[key] = volume / rate / self.busy + 1e-11
        closed = self.mask(way.edge.axes)
        if not closed & self.splits:
            return self._seconds[key]
        partial = 2 * self.parts * self._repeated(c) * self.p.elements(c) * 4 / self.p.device.l2_bytes_per_second
        return self._seconds[key] + np.where(self.split & closed != 0, partial, 0.0)

    def passes_of(self, axes: tuple[str, ...], closed: int, limit: int) -> Ints:
        """A table, one row for each assignment, one column for each pass q before which the operands are there (then
        one for operands that never are): the least pass of a value over `axes` that closes `closed`.  A tile has at
        most `limit` elements."""
        key = (axes, closed, limit)
        if key not in self._passes:
            opened: Ints = self.loops & self.mask(axes)
            loop: Ints = self.loops & closed
            admitted = (self.grid & closed == 0) & (self.elements_of(axes) <= limit) & self._held(opened)
            admitted &= (opened == 0) | (loop == 0)
            columns = []
            for q in range(1, self.last + 2):
                start = np.full(len(self.assignments), q, dtype=np.int64)
                closing = self.first_pass(loop, start, whole=True)
                after = np.where(closing < INFEASIBLE, closing + 1, INFEASIBLE)
                at = np.where(opened != 0, self.first_pass(opened, start), np.where(loop != 0, after, start))
                columns.append(np.where(admitted, at, INFEASIBLE))
            columns.append(np.full(len(self.assignments), INFEASIBLE, dtype=np.int64))
            self._passes[key] = np.stack(columns, axis=1).ravel()
        return self._passes[key]

    def _repeated(self, c: int) -> Floats:
        """How often a partial result is stored: along a grid axis that it lacks, once for each element."""
        result = np.ones(len(self.assignments))
        for a in self.played:
            if a not in self.p.axes(c):
                result = result * np.where(self.grid & self.bit[a] != 0, self.p.sizes[a], 1)
        return result

    def loaded(self, c: int) -> Floats:
        """Seconds to load the class into all blocks that want it."""
        d, size = self.p.device, self.p.bytes(c)
        seconds = size / d.bandwidth + size * (self.replication(self.p.axes(c)) - 1) / d.l2_bytes_per_second
        return np.asarray(seconds / np.minimum(1.0, 2 * self.busy))

    def first_pass(self, axes: Ints, start: Ints, whole: bool = False) -> Ints:
        """The first pass from `start` on that loops over the axes (over nothing else, if `whole`)."""
        found = np.full(len(self.assignments), INFEASIBLE, dtype=np.int64)
        if not whole:
            found = np.where(self.combined(axes) & (start <= self.count + 1), self.count + 1, found)
        for q in range(self.last, 0, -1):
            here = self.passes[q - 1]
            there = here == axes if whole else axes & ~here == 0
            found = np.where(there & (q <= self.count) & (start <= q), q, found)
        return found

    def combined(self, axes: Ints) -> Bools:
        """Whether a value with these open axes can be computed in the combine, which has the split axis on its grid."""
        return np.asarray((self.split != 0) & (axes == self.split))

    def outcome(self, alone: bool) -> Outcome:
        """Feasibility and bounds of all assignments; `alone`: kernels that load inputs only."""
        return Outcome(self, alone)


class Outcome:
    """For each class: its least pass, the cost of its cheapest path (`chain`) and of itself (`local`), and the ways
    to get it.  `bounds` are lower bounds of the cost of the kernel, infinite where no derivation exists."""

    def __init__(self, survey: Survey, alone: bool) -> None:
        s, p = survey, survey.p
        self.survey, self.alone = survey, alone
        self.mandatory = p.alone if alone else p.among
        self.least: dict[int, Ints] = {}
        self.chain: dict[int, Floats] = {}
        self.local: dict[int, Floats] = {}
        self.ways: dict[int, list[tuple[Floats, Ints, Way | None]]] = {}
        none = np.full(len(s.assignments), math.inf)
        start = np.ones(len(s.assignments), dtype=np.int64)
        for c in s.order:
            least, chain, local = np.full_like(start, INFEASIBLE), none, none
            self.ways[c] = []
            for way, seconds, table in self._ways(c):
                need, below = start, np.zeros(len(s.assignments))
                for x in way.edge.children if way else ():
                    need = np.maximum(need, self.least[x])
                    below = np.maximum(below, self.chain[x])
                at = table[s.rows + np.minimum(need, s.last + 2)]
                feasible = at < INFEASIBLE
                if not feasible.any():
                    continue
                seconds = np.where(feasible, seconds, math.inf)
                local = np.minimum(local, seconds)
                chain = np.minimum(chain, seconds + below)
                least = np.minimum(least, at)
                self.ways[c].append((seconds, at, way))
            self.least[c], self.chain[c], self.local[c] = least, chain, local
        self.starts = {r: self._start(r) for r in s.roots}
        self.bounds = self._bounds()

    def _ways(self, c: int) -> Iterator[tuple[Way | None, Floats, Ints]]:
        s, p = self.survey, self.survey.p
        price = p.memory.get(c, p.bound.get(c))
        if price is not None and (c in p.inputs or (c not in s.roots and not self.alone)):
            yield None, s.loaded(c) + price, s.passes_of(p.axes(c), 0, LOADED_TILE)
        for way in p.ways[c]:
            table = s.passes_of(p.axes(c), s.mask(way.edge.axes), COMPUTED_TILE)
            yield way, s.seconds(c, way), table

    def _start(self, r: int) -> Ints:
        """The pass in which a root is written: the epilogue (or combine), or the last loop over its open axes."""
        s = self.survey
        at = s.count + 1
        for q in range(1, s.last + 1):
            here = (q <= s.count) & (s.open[r] == s.passes[q - 1]) & (s.split == 0)
            at = np.where((s.open[r] != 0) & here, q, at)
        held = (s.open[r] == 0) | (at <= s.count) | s.combined(s.open[r])
        for other in s.roots:  # every block of a combine writes every root
            held = held & ((s.split == 0) | (s.open[r] == s.open[other]))
        return np.where(held & (self.least[r] <= at), at, INFEASIBLE)

    def _bounds(self) -> Floats:
        s = self.survey
        bound = np.zeros(len(s.assignments))
        for r in s.roots:
            bound = np.maximum(bound, self.chain[r])
            bound = np.where(self.starts[r] < INFEASIBLE, bound, math.inf)
        must = _union(self.mandatory.computed[r] for r in s.roots)
        paid = np.zeros(len(s.assignments))
        for c in s.order:
            if must >> s.p.position[c] & 1:
                paid = paid + self.local[c]
        return np.maximum(bound, paid)


class KernelSearch:
    """The cheapest derivation under one assignment of an outcome."""

    def __init__(self, outcome: Outcome, n: int) -> None:
        s = outcome.survey
        self.p, self.roots, self.order = s.p, s.roots, s.order
        self.roles, self.tiles = s.assignments[n]
        self.last = len(self.roles.passes)
        self.passes = [int(q[n]) for q in s.passes[: self.last]]
        self.split = int(s.split[n])
        self.open = {c: int(s.open[c][n]) for c in s.order}
        self.least = {c: int(outcome.least[c][n]) for c in s.order}
        self.local = {c: float(outcome.local[c][n]) for c in s.order}
        self.chain = {c: float(outcome.chain[c][n]) for c in s.order}
        self.starts = {r: int(at[n]) for r, at in outcome.starts.items()}
        self.mandatory = outcome.mandatory
        self.by_position = [self.local.get(c, 0.0) for c in self.p.closure.order]
        self._outcome, self._n = outcome, n
        self._options: dict[int, list[Option]] = {}
        self._paid: dict[int, float] = {}

    def options(self, c: int) -> list[Option]:
        """The feasible ways to get a class, without those that a cheaper one makes useless."""
        if c not in self._options:
            self._options[c] = undominated(self.all_options(c))
        return self._options[c]

    def all_options(self, c: int) -> list[Option]:
        s, n = self._outcome.survey, self._n
        found = []
        for seconds, at, way in self._outcome.ways[c]:
            if at[n] >= INFEASIBLE:
                continue
            if way is None:
                found.append(Option(float(seconds[n]), None, (), None))
            else:
                closed = tuple(a for a in way.edge.axes if int(s.loops[n]) & s.bit.get(a, 0))
                found.append(Option(float(seconds[n]), way.edge, way.edge.children, closed or None))
        return found

    def start(self) -> frozenset[Entry] | None:
        """The roots as entries, or None if some root cannot be computed under these roles."""
        if any(at >= INFEASIBLE for at in self.starts.values()):
            return None
        return frozenset(self.starts.items())

    # -- extraction

    def bound(self, state: frozenset[Entry]) -> float:
        """No completion of a state costs less: it pays the longest cheapest path below an open entry, and every class
        that each derivation of an open entry holds (all of them are still to be paid: the highest go first)."""
        if not state:
            return 0.0
        computed, below = self.mandatory
        must = _union(computed[c] if c in self.starts else below[c] for c, _ in state)
        paid = self._paid.get(must)
        if paid is None:
            paid = self._paid[must] = math.fsum(self.by_position[i] for i in _bits(must))
        return max(max(self.chain[c] for c, _ in state), paid)

    def run(self, upper: float) -> Derivation | None:
        """The cheapest derivation with cost below `upper`, or None."""
        p = self.p
        start = self.start()
        if start is None:
            p.infeasible += 1
            return None

        def highest(state: frozenset[Entry]) -> int:
            return max((p.position[c] for c, _ in state), default=-1)

        queue: list[tuple[float, int, int, float, frozenset[Entry], tuple[object, ...]]]
        queue = [(self.bound(start), 0, 0, 0.0, start, ())]
        best = {start: 0.0}
        ticket = expanded = 0
        while queue:
            f, _, _, cost, state, trail = heapq.heappop(queue)
            if f >= upper:
                p.bounded += 1
                return None
            if cost > best.get(state, math.inf):
                continue
            expanded += 1
            p.expanded += 1
            if not state:
                return self.derivation(cost, trail)
            if expanded > p.states // SHARE or p.expanded > p.states:
                p.truncated += 1
                return self.beam(start)
            for step, successor in self.successors(state):
                total = cost + step.option.cost
                if total < best.get(successor, math.inf):
                    best[successor] = total
                    ticket += 1
                    p.generated += 1
                    entry = (total + self.bound(successor), highest(successor), ticket, total, successor, (trail, step))
                    heapq.heappush(queue, entry)
        p.infeasible += 1
        return None

    def derivation(self, cost: float, trail: tuple[object, ...]) -> Derivation | None:
        steps = tuple(_unroll(trail))
        if self.roles.split and not any(self.roles.split[0] in _closed(s) for s in steps):
            return None  # the split axis must be closed in this kernel
        used = {s.entry[1] for s in steps if self.open[s.entry[0]]}
        if not used.issuperset(range(1, self.last + 1)):
            return None  # a loop without a body
        return Derivation(self.roots, self.roles, tuple(sorted(self.tiles.items())), steps, cost)

    def beam(self, start: frozenset[Entry]) -> Derivation | None:
        """What A* does, a topological level at a time, keeping the BEAM most promising states of each level."""
        levels: dict[int, dict[frozenset[Entry], tuple[float, tuple[object, ...]]]] = {}

        def level_of(state: frozenset[Entry]) -> int:
            return max((self.p.position[c] for c, _ in state), default=-1)

        levels[level_of(start)] = {start: (0.0, ())}
        while levels and max(levels) >= 0:
            level = levels.pop(max(levels))
            kept = sorted(level.items(), key=lambda item: item[1][0] + self.bound(item[0]))[:BEAM]
            for state, (cost, trail) in kept:
                self.p.expanded += 1
                for step, successor in self.successors(state):
                    total = cost + step.option.cost
                    there = levels.setdefault(level_of(successor), {})
                    if successor not in there or total < there[successor][0]:
                        there[successor] = (total, (trail, step))
        if -1 not in levels:
            return None
        cost, trail = levels[-1][frozenset()]
        return self.derivation(cost, trail)

    def successors(self, state: frozenset[Entry]) -> Iterator[tuple[Step, frozenset[Entry]]]:
        c, at = entry = max(state, key=lambda e: (self.p.position[e[0]], e[1]))
        rest = state - {entry}
        for option in self.options(c):
            for children in self._placements(c, at, option):
                yield Step(entry, option, children), _merged(rest, children, self.open)

    def _placements(self, c: int, at: int, option: Option) -> Iterator[tuple[Entry, ...]]:
        """The passes in which the children may be computed."""
        if self.open[c] or option.loop is None:  # open children in the same pass, others before it
            if all(self.least[x] <= at for x in option.children):
                yield tuple((x, at) for x in option.children)
            return
        for q, loop in enumerate(self.roles.passes[: at - 1], 1):
            if set(loop) != set(option.loop) or any(self.least[x] > q for x in option.children):
                continue
            if self.roles.split and self.roles.split[0] in loop and q != self.last:
                continue
            yield tuple((x, q) for x in option.children)


def kernel_search(
    problem: Problem, roots: tuple[int, ...], roles: Roles, tiles: Mapping[str, int], alone: bool = False
) -> KernelSearch:
    """The search for one assignment of roles.  `alone`: the kernel loads inputs only."""
    return KernelSearch(Survey(problem, roots, [Assignment(roles, tiles)]).outcome(alone), 0)


def undominated(options: list[Option]) -> list[Option]:
    """Without options that need at least the children of a cheaper one that closes the same axis."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.cost, len(o.children))):
        if not any(k.loop == o.loop and k.edge is not None and set(k.children) <= set(o.children) for k in kept):
            kept.append(o)
    return kept


def _closed(step: Step) -> tuple[str, ...]:
    return step.option.edge.axes if step.option.edge else ()


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _merged(rest: frozenset[Entry], children: tuple[Entry, ...], opened: Mapping[int, int]) -> frozenset[Entry]:
    """Adds the children.  A value outside loops is needed once, before the earliest pass that asks for it."""
    earliest: dict[int, int] = {}
    looped: set[Entry] = set()
    for c, at in (*rest, *children):
        if opened[c]:
            looped.add((c, at))
        else:
            earliest[c] = min(at, earliest.get(c, INFEASIBLE))
    return frozenset(looped) | frozenset(earliest.items())


def _unroll(trail: tuple[object, ...]) -> list[Step]:
    steps: list[Step] = []
    while trail:
        trail, step = trail  # type: ignore[assignment]
        steps.append(step)  # type: ignore[arg-type]
    return steps[::-1]


def work_of(p: Problem, d: Derivation) -> Work:
    """The loads, products and other operations of a kernel, for the cost model."""
    return Footprint(p, d).work(dict(d.tiles))


class _Loaded(NamedTuple):
    source: int
    bytes: float
    width: float  # bytes of an element
    axes: tuple[str, ...]
    cuts: tuple[bool, ...]  # by grid axis
    run: str | None  # the axis along which elements lie side by side
    looped: bool
    combining: bool


class _Computed(NamedTuple):
    axes: tuple[str, ...]
    joined: tuple[str, ...]
    absent: tuple[str, ...]  # grid axes along which blocks repeat it
    sides: tuple[tuple[str, ...], ...]  # of a product: the axes of either operand alone
    depth: tuple[str, ...]
    dtype: DType
    stored: float  # bytes of partial results
    accumulated: bool
    held: bool  # outside loops


class Footprint:
    """What a derivation does, but for its tile sizes; `work` fills these in, many times over."""

    def __init__(self, p: Problem, d: Derivation) -> None:
        self.sizes, self.grid, self.passes = p.sizes, d.roles.grid, d.roles.passes
        self.parts = d.roles.split[1] if d.roles.split else 1
        self.written = sum(p.bytes(r) for r in d.roots)
        self.roots = [(p.bytes(r), p.innermost.get(r), self.width(p, r)) for r in d.roots]
        self.loads: list[_Loaded] = []
        self.steps: list[_Computed] = []
        for s in d.steps:
            c, at = s.entry
            axes = p.axes(c)
            looped = any(a in d.roles.loops for a in axes)
            if s.option.edge is None:
                combining = self.parts > 1 and at > len(self.passes)  # the combine's own loads
                cuts = tuple(a in axes for a in self.grid)
                source = -1 - c if combining else c
                run = p.innermost.get(c)
                self.loads.append(_Loaded(source, p.bytes(c), self.width(p, c), axes, cuts, run, looped, combining))
            elif s.option.edge.children:
                self.steps.append(self.computed(p, c, s.option, looped))

    @staticmethod
    def width(p: Problem, c: int) -> float:
        return p.dtypes.get(c, p.dtype).bits / 8

    def computed(self, p: Problem, c: int, option: Option, looped: bool) -> _Computed:
        assert option.edge is not None
        axes, joined = p.axes(c), p.joined_axes(c, option.children)
        sides: tuple[tuple[str, ...], ...] = ()
        if p.is_matmul(c, option.edge):
            left, right = (p.axes(x) for x in option.children)
            sides = tuple(a for a in left if a not in right), tuple(a for a in right if a not in left)
        stored = 0.0
        if option.loop is not None and self.parts > 1:
            repeated = math.prod(p.sizes[a] for a in self.grid if a not in axes)  # each block stores its own copy
            stored = 2 * self.parts * repeated * p.elements(c) * 4
        return _Computed(
            axes,
            joined,
            tuple(a for a in self.grid if a not in joined),
            sides,
            option.edge.axes,
            product_dtype(p, option.children),
            stored,
            option.loop is not None,
            not looped,
        )

    def work(self, tiles: Mapping[str, int]) -> Work:
        sizes = self.sizes
        along = {a: -(-sizes[a] // t) for a, t in tiles.items()}
        width = {a: min(t, sizes[a]) for a, t in tiles.items()}

        def elements(axes: tuple[str, ...]) -> int:
            return math.prod([width[a] if a in width else sizes[a] for a in axes])

        def waste(run: str | None, element: float) -> float:
            """Bytes that move for each byte that is wanted: short runs waste the rest of a sector."""
            if run is None or run not in width or tiles[run] >= sizes[run]:
                return 1.0  # whole rows lie side by side too
            return max(1.0, SECTOR / (tiles[run] * element))

        stage = resident = partial = vector = accumulators = 0.0
        blocks = [along[a] for a in self.grid]
        reads: list[Read] = []
        for x in self.loads:
            cut = tuple(zip(blocks, x.cuts, strict=True))
            if not x.combining:
                cut = (*cut, (self.parts, x.looped))
            reads.append(Read(x.source, x.bytes, cut, waste(x.run, x.width)))
            held = elements(x.axes) * x.width
            if x.looped:
                stage += held
            else:
                resident += held
        products: list[Product] = []
        depth = 1
        for s in self.steps:
            volume = math.prod([along[a] * tiles[a] if a in tiles else sizes[a] for a in s.joined])
            volume *= math.prod([along[a] for a in s.absent])
            if s.sides:
                products.append(Product(float(volume), elements(s.sides[0]), elements(s.sides[1]), s.dtype))
                depth += max(1, elements(s.depth) // 16)
            else:
                vector += VECTOR_WEIGHT * volume
            if s.accumulated:
                accumulators += elements(s.axes)
                partial += s.stored
            elif s.held:
                accumulators = max(accumulators, elements(s.axes))
        wanted = sum(size * waste(run, element) for size, run, element in self.roots)
        return Work(
            blocks=math.prod(blocks) * self.parts,
            trips=sum(math.ceil(math.prod([along[a] for a in loop]) / self.parts) for loop in self.passes),
            reads=tuple(reads),
            written=self.written,
            writing=wanted / self.written if self.written else 1.0,
            stage=stage,
            resident=resident,
            partial=partial,
            products=tuple(products),
            vector=vector,
            accumulators=accumulators,
            depth=depth,
        )


def product_dtype(p: Problem, operands: Sequence[int]) -> DType:
    """The type that a product multiplies in: the widest of its floating operands, 16 bits at least."""
    types = [p.dtypes.get(x, p.dtype) for x in operands]
    wide = [t for t in types if t.is_float and t.bits >= 16]
    return max(wide, key=lambda t: t.bits) if wide else DType.f16
