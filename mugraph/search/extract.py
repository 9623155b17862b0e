"""One kernel: which axes play which role, and the cheapest derivation of its roots under those roles.

Roles belong to a kernel, not to a value: an axis is on the grid, looped in pass p (alone, or in a nest of two), split
(looped and on the grid), or whole in the tile.  An *entry* (class, p) is a value with an open loop axis computed in
pass p, or any other value available before pass p (p = number of passes + 1: in the epilogue).  Closing over the axes
of a loop leads from a pass q < p; a nest is closed as a whole; closing over a grid axis is refused unless the axis is
split.

A `Survey` looks at all assignments of roles at once: which can compute the roots, and a lower bound of what each
costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mugraph.ir.types import DType
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import VECTOR_WEIGHT, Device
from mugraph.search.laws import IOTA

Entry = tuple[int, int]
Loop = tuple[str, ...]  # the axes of one pass: one, or a nest of two
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
INFEASIBLE = 99
LOADED_TILE = 65_536  # elements of a tile that is only loaded: 128 KiB of f16 in shared memory
TIE = 1e-3  # in the smallest tiles each block may repeat a row's work at no cost, in larger ones fewer elements win
COMPUTED_TILE = 32_768  # elements of a computed tile: 128 KiB of f32 in registers


@dataclass(frozen=True)
class Roles:
    """`passes` lists the looped axes of each pass; `split` is (axis, parts) of the last pass."""

    grid: tuple[str, ...]
    passes: tuple[Loop, ...]
    split: tuple[str, int] | None = None

    @cached_property
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
    untiled: int = 0

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
        each = [union(below[x] for x in w.edge.children) for w in p.ways[c]]
        computed[c] = own | (intersection(each) if each else 0)
        below[c] = own if c in loadable else computed[c]
    return Mandatory(computed, below)


def union(masks: Any) -> int:
    result = 0
    for m in masks:
        result |= m
    return result


def intersection(masks: list[int]) -> int:
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
        self._computed: dict[int, list[tuple[Way, Floats, Ints]]] = {}
        self._seconds: dict[tuple[frozenset[str], bool], Floats] = {}
        self._passes: dict[tuple[tuple[str, ...], int, int], Ints] = {}
        self.blocks = self.replication(()) * self.parts
        self.busy: Floats = np.minimum(1.0, self.blocks / p.device.sms)
        self.open = {c: self.loops & self.mask(p.axes(c)) for c in self.order}
        self.splits = int(np.bitwise_or.reduce(self.split)) if len(roles) else 0
        self.rows = np.arange(len(roles), dtype=np.int64) * (self.last + 2) - 1

    def mask(self, axes: Sequence[str]) -> int:
        return union(self.bit.get(a, 0) for a in axes)

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

    def computed(self, c: int) -> list[tuple[Way, Floats, Ints]]:
        """The ways to compute the class, with their seconds and passes."""
        if c not in self._computed:
            self._computed[c] = [
                (way, self.seconds(c, way), self.passes_of(self.p.axes(c), self.mask(way.edge.axes), COMPUTED_TILE))
                for way in self.p.ways[c]
            ]
        return self._computed[c]

    def seconds(self, c: int, way: Way) -> Floats:
        """Seconds of computing the class that way, in each assignment."""
        if not way.edge.children:
            return np.full(len(self.assignments), 1e-12)
        key = (frozenset(way.axes), way.matmul)
        if key not in self._seconds:
            p, volume = self.p, way.volume * (self.replication(way.axes) + TIE)
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

    def column(self, n: int) -> tuple[dict[int, int], dict[int, int], dict[int, float], dict[int, float]]:
        """Of one assignment, by class: its open axes as bits, its least pass, its own cost, that of its path."""
        order = self.survey.order
        whole, real = self._columns
        opened, least = (dict(zip(order, row, strict=True)) for row in whole[:, :, n].tolist())
        local, chain = (dict(zip(order, row, strict=True)) for row in real[:, :, n].tolist())
        return opened, least, local, chain

    @cached_property
    def _columns(self) -> tuple[Ints, Floats]:
        order = self.survey.order
        whole = np.stack([[self.survey.open[c] for c in order], [self.least[c] for c in order]])
        return whole, np.stack([[self.local[c] for c in order], [self.chain[c] for c in order]])

    def _ways(self, c: int) -> Iterator[tuple[Way | None, Floats, Ints]]:
        s, p = self.survey, self.survey.p
        price = p.memory.get(c, p.bound.get(c))
        if price is not None and (c in p.inputs or (c not in s.roots and not self.alone)):
            yield None, s.loaded(c) + price, s.passes_of(p.axes(c), 0, LOADED_TILE)
        yield from s.computed(c)

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
        must = union(self.mandatory.computed[r] for r in s.roots)
        paid = np.zeros(len(s.assignments))
        for c in s.order:
            if must >> s.p.position[c] & 1:
                paid = paid + self.local[c]
        return np.maximum(bound, paid)
