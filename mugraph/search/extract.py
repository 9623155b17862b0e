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

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from mugraph.ir.types import DType
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import VECTOR_WEIGHT, Device, least_kernel_seconds
from mugraph.search.laws import IOTA

K = TypeVar("K")
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
    """Roles, and the tile size of each axis that is on the grid or looped.  `fitted`: tiles that are looked at only
    where the usual ones admit nothing."""

    roles: Roles
    tiles: Mapping[str, int]
    fitted: bool = False


class Option(NamedTuple):
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

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.roots, self.roles, self.tiles, self.steps))

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
    reduced  classes of another scale than all that the program keeps: not in memory in its type
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
    reduced: frozenset[int] = frozenset()
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

    def below_all(self, roots: Sequence[int]) -> frozenset[int]:
        """The roots, and all that they may be made of."""
        return frozenset().union(*(self.below[r] for r in roots))

    @cached_property
    def alone(self) -> Mandatory:
        """Classes that every derivation from inputs holds."""
        return _mandatory(self, frozenset(self.inputs))

    def least_seconds(self, c: int, launches: int = 1) -> float:
        """No launches that put a class into memory take less, whatever computes it: it moves, and the inputs that it
        cannot do without."""
        must = self.alone.computed[c]
        inputs = sum(self.bytes(x) for x in self.inputs if must >> self.position[x] & 1)
        return launches * least_kernel_seconds(self.device) + (self.bytes(c) + inputs) / self.device.bandwidth

    @cached_property
    def among(self) -> Mandatory:
        """Classes that every derivation holds which may load what could be materialised."""
        return _mandatory(self, frozenset({*self.inputs, *self.memory, *self.bound}))

    def _way(self, c: int, e: Edge) -> Way:
        axes = tuple(sorted(self.joined_axes(c, e.children)))
        volume = math.prod(self.sizes[a] for a in axes)
        return Way(e, axes, frozenset(e.axes), volume, self.is_matmul(c, e))

    def axes(self, c: int) -> tuple[str, ...]:
        return self.closure.classes[c].axes

    def elements(self, c: int) -> int:
        return math.prod(self.sizes[a] for a in self.axes(c))

    def bytes(self, c: int) -> float:
        return self.elements(c) * self.dtypes.get(c, self.dtype).bits / 8

    def is_wide(self, c: int) -> bool:
        """Whether the class lies in memory in a wider type than outputs do."""
        return self.dtypes.get(c, self.dtype).bits > self.dtype.bits

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


class Arithmetic(NamedTuple):
    """What the seconds of a way depend on; `partial`: the class, where it may close split axes (`closed`, as bits) and
    partial results of it are stored."""

    axes: tuple[str, ...] | None  # None: no operands
    matmul: bool
    partial: int | None
    closed: int


class Level(NamedTuple):
    """Ways whose operands all lie on lower levels, by class; rows of the tables of a survey."""

    ways: slice
    places: list[int]  # in the topological order, of the class of each way in turn
    starts: list[int]  # where the ways of each begin
    operands: Ints  # places of the operands of each way; the last place of all where it has fewer
    tables: Ints  # where in `Survey.tables` that of each way begins, for each assignment
    seconds: Ints  # row of `Survey.seconds` of each way


class Survey:
    """All assignments of roles to a kernel for `roots`, side by side: the last axis of every array is over them.
    What does not depend on prices."""

    def __init__(self, problem: Problem, roots: tuple[int, ...], assignments: Sequence[Assignment]) -> None:
        self.p, self.roots, self.assignments = problem, roots, assignments
        p, roles = problem, [a.roles for a in assignments]
        members = p.below_all(roots)
        self.order = [c for c in p.closure.order if c in members]
        self.place = {c: i for i, c in enumerate(self.order)}
        self.played = sorted({a for r in roles for a in (*r.grid, *r.loops)})
        self.bit = {a: 1 << i for i, a in enumerate(self.played)}
        self._masks: dict[tuple[str, ...], int] = {}
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
        self.blocks = self.replication(()) * self.parts
        self.busy: Floats = np.minimum(1.0, self.blocks / p.device.sms)
        self.open: Ints = np.array([self.mask(p.axes(c)) for c in self.order])[:, None] & self.loops
        self.splits = int(np.bitwise_or.reduce(self.split)) if len(roles) else 0
        loads = _Rows[tuple[tuple[str, ...], float]]()
        each = [loads.row((p.axes(c), p.bytes(c))) for c in self.order]
        self.loading = np.stack([self._loaded(*key) for key in loads])[each]
        passes = _Rows[tuple[tuple[str, ...], int, int]]()
        self._loads = [passes.row((p.axes(c), 0, LOADED_TILE)) for c in self.order]
        self.ways: dict[int, tuple[int, list[Way]]] = {}  # class -> its first row, its ways
        self.levels = self._levels(passes)
        self.tables = self._tables(list(passes))
        self.loadable = self.tables[self._loads, 0]

    def mask(self, axes: tuple[str, ...]) -> int:
        found = self._masks.get(axes)
        if found is None:
            found = self._masks[axes] = union(self.bit.get(a, 0) for a in axes)
        return found

    def replication(self, axes: tuple[str, ...]) -> Floats:
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

    def _levels(self, passes: _Rows[tuple[tuple[str, ...], int, int]]) -> list[Level]:
        """The ways of all classes, those that need nothing of each other together."""
        p = self.p
        height: dict[int, int] = {}
        for c in self.order:
            height[c] = 1 + max((height[x] for w in p.ways[c] for x in w.edge.children), default=-1)
        seconds, found = _Rows[Arithmetic](), list[Level]()
        first, none, every = 0, len(self.order), np.arange(len(self.assignments))
        for _, group in itertools.groupby(sorted(self.order, key=height.__getitem__), key=height.__getitem__):
            classes = [c for c in group if p.ways[c]]
            rows = [(c, w) for c in classes for w in p.ways[c]]
            if not rows:
                continue
            starts = list(itertools.accumulate((len(p.ways[c]) for c in classes[:-1]), initial=0))
            self.ways.update((c, (first + at, p.ways[c])) for c, at in zip(classes, starts, strict=True))
            widest = max(1, *(len(w.edge.children) for _, w in rows))
            below = [[self.place[x] for x in w.edge.children] for _, w in rows]
            found.append(
                Level(
                    slice(first, first + len(rows)),
                    [self.place[c] for c in classes],
                    starts,
                    np.array([x + [none] * (widest - len(x)) for x in below], dtype=np.int64).T,
                    np.array([[passes.row((p.axes(c), self.mask(w.edge.axes), COMPUTED_TILE))] for c, w in rows])
                    * ((self.last + 2) * len(every))
                    + every,
                    np.array([seconds.row(self._work(c, w)) for c, w in rows]),
                )
            )
            first += len(rows)
        self.seconds = np.stack([self._seconds(work) for work in seconds]) if found else np.empty((0, 0))
        return found

    def _work(self, c: int, way: Way) -> Arithmetic:
        """What the seconds of a way depend on."""
        if not way.edge.children:
            return Arithmetic(None, False, None, 0)
        closed = self.mask(way.edge.axes) & self.splits
        return Arithmetic(way.axes, way.matmul, c if closed else None, closed)

    def _seconds(self, work: Arithmetic) -> Floats:
        """Seconds of computing a class, in each assignment."""
        p = self.p
        if work.axes is None:
            return np.full(len(self.assignments), 1e-12)
        volume = math.prod(p.sizes[a] for a in work.axes) * (self.replication(work.axes) + TIE)
        rate = p.device.matmul_rate(p.dtype) / 2 if work.matmul else p.device.vector_flops / VECTOR_WEIGHT
        seconds: Floats = volume / rate / self.busy + 1e-11
        if (c := work.partial) is None:
            return seconds
        stored = 2 * self.parts * self._repeated(c) * p.elements(c) * 4 / p.device.l2_bytes_per_second
        return seconds + np.where(self.split & work.closed != 0, stored, 0.0)

    def _tables(self, keys: Sequence[tuple[tuple[str, ...], int, int]]) -> NDArray[np.int8]:
        """For each (axes, closed axes, limit), each pass q before which the operands are there (the last: they never
        are), and each assignment: the least pass of a value over `axes` that closes `closed`.  A tile has at most
        `limit` elements."""
        closed: Ints = np.array([closed for _, closed, _ in keys])[:, None]
        limits = np.array([limit for _, _, limit in keys])[:, None]
        opened: Ints = np.array([self.mask(axes) for axes, _, _ in keys])[:, None] & self.loops
        loop: Ints = self.loops & closed
        admitted = (self.grid & closed == 0) & (np.stack([self.elements_of(axes) for axes, _, _ in keys]) <= limits)
        admitted &= self._held(opened) & ((opened == 0) | (loop == 0))
        table = np.full((len(keys), self.last + 2, len(self.assignments)), INFEASIBLE, dtype=np.int8)
        for q in range(1, self.last + 2):
            closing = self.first_pass(loop, q, whole=True)
            after = np.where(closing < INFEASIBLE, closing + 1, INFEASIBLE)
            at = np.where(opened != 0, self.first_pass(opened, q), np.where(loop != 0, after, q))
            table[:, q - 1] = np.where(admitted, at, INFEASIBLE)
        return table

    def _held(self, opened: Ints) -> Bools:
        """The open axes lie in one pass."""
        found: Bools = opened == 0
        for q in range(self.last):
            found = found | (opened & ~self.passes[q] == 0)
        return found

    def first_pass(self, axes: Ints, start: int, whole: bool = False) -> Ints:
        """The first pass from `start` on that loops over the axes (over nothing else, if `whole`)."""
        found = np.full(axes.shape, INFEASIBLE, dtype=np.int64)
        if not whole:
            found = np.where(self.combined(axes) & (start <= self.count + 1), self.count + 1, found)
        for q in range(self.last, start - 1, -1):
            here = self.passes[q - 1]
            there = here == axes if whole else axes & ~here == 0
            found = np.where(there & (q <= self.count), q, found)
        return found

    def combined(self, axes: Ints) -> Bools:
        """Whether a value with these open axes can be computed in the combine, which has the split axis on its grid."""
        return np.asarray((self.split != 0) & (axes == self.split))

    def _repeated(self, c: int) -> Floats:
        """How often a partial result is stored: along a grid axis that it lacks, once for each element."""
        result = np.ones(len(self.assignments))
        for a in self.played:
            if a not in self.p.axes(c):
                result = result * np.where(self.grid & self.bit[a] != 0, self.p.sizes[a], 1)
        return result

    def _loaded(self, axes: tuple[str, ...], size: float) -> Floats:
        """Seconds to load so many bytes over the axes into all blocks that want them."""
        d = self.p.device
        seconds = size / d.bandwidth + size * (self.replication(axes) - 1) / d.l2_bytes_per_second
        return np.asarray(seconds / np.minimum(1.0, 2 * self.busy))

    def outcome(self, alone: bool) -> Outcome:
        """Feasibility and bounds of all assignments; `alone`: kernels that load inputs only."""
        return Outcome(self, alone)


class _Rows(dict[K, int]):
    """Different keys, numbered as they come."""

    def row(self, key: K) -> int:
        return self.setdefault(key, len(self))


class Scoped(Protocol):
    """What a derivation is sought among: the roots and the classes below them, children first."""

    @property
    def p(self) -> Problem: ...
    @property
    def roots(self) -> tuple[int, ...]: ...
    @property
    def order(self) -> list[int]: ...
    @property
    def assignments(self) -> Sequence[Assignment]: ...


class Priced(Protocol):
    """The ways to get each class and what they cost, for each assignment of roles."""

    @property
    def survey(self) -> Scoped: ...
    @property
    def mandatory(self) -> Mandatory: ...
    @property
    def starts(self) -> Mapping[int, Ints]: ...
    def column(self, n: int) -> tuple[dict[int, int], dict[int, int], dict[int, float], dict[int, float]]: ...
    def ways(self, n: int) -> Callable[[int], Iterator[tuple[float, Way | None]]]: ...


class Outcome:
    """For each class: its least pass, the cost of its cheapest path (`chain`) and of itself (`local`), and the ways
    to get it.  `bounds` are lower bounds of the cost of the kernel, infinite where no derivation exists."""

    def __init__(self, survey: Survey, alone: bool) -> None:
        s, p = survey, survey.p
        self.survey, self.alone = survey, alone
        self.mandatory = p.alone if alone else p.among
        prices = [self._price(c) for c in s.order]
        n = len(s.assignments)
        may_load = np.isfinite(prices)[:, None] & (s.loadable < INFEASIBLE)
        self.loading: Floats = np.where(may_load, s.loading + np.array(prices)[:, None], math.inf)
        self.local = self.loading.copy()
        # by class, its least pass and the cost of its path; the last row: no operand
        table = np.empty((len(s.order) + 1, 2, n))
        table[:-1, 0], table[:-1, 1] = np.where(may_load, s.loadable, INFEASIBLE), self.loading
        table[-1, 0], table[-1, 1] = 1, 0.0
        ways = s.levels[-1].ways.stop if s.levels else 0
        self.seconds = np.empty((ways, n))
        for level in s.levels:
            found = table[level.operands].max(axis=0)
            need = np.minimum(found[:, 0], s.last + 2).astype(np.intp) - 1
            found[:, 0] = at = s.tables.take(level.tables + need * n)
            self.seconds[level.ways] = seconds = np.where(at < INFEASIBLE, s.seconds[level.seconds], math.inf)
            found[:, 1] += seconds
            table[level.places] = np.minimum(table[level.places], np.minimum.reduceat(found, level.starts, axis=0))
        if s.levels:
            places = [place for level in s.levels for place in level.places]
            starts = [level.ways.start + at for level in s.levels for at in level.starts]
            self.local[places] = np.minimum(self.local[places], np.minimum.reduceat(self.seconds, starts, axis=0))
        self.least, self.chain = table[:-1, 0], table[:-1, 1]
        self.starts = {r: self._start(r) for r in s.roots}
        self.bounds = self._bounds()

    def _price(self, c: int) -> float:
        """Seconds until the class is in memory; infinite where the kernel may not load it."""
        s, p = self.survey, self.survey.p
        if c in p.inputs or (c not in s.roots and not self.alone):
            return p.memory.get(c, p.bound.get(c, math.inf))
        return math.inf

    def column(self, n: int) -> tuple[dict[int, int], dict[int, int], dict[int, float], dict[int, float]]:
        """Of one assignment, by class: its open axes as bits, its least pass, its own cost, that of its path."""
        s = self.survey
        opened, least, local, chain = (
            dict(zip(s.order, table[:, n].tolist(), strict=True))
            for table in (s.open, self.least, self.local, self.chain)
        )
        return opened, least, local, chain

    def ways(self, n: int) -> Callable[[int], Iterator[tuple[float, Way | None]]]:
        """Of one assignment, by class: its feasible ways with their seconds, a load first."""
        s = self.survey
        loading = dict(zip(s.order, self.loading[:, n].tolist(), strict=True))
        times = self.seconds[:, n].tolist()  # infinite where a way is not feasible

        def of(c: int) -> Iterator[tuple[float, Way | None]]:
            if loading[c] < math.inf:
                yield loading[c], None
            first, ways = s.ways.get(c, (0, []))
            yield from ((t, w) for t, w in zip(times[first : first + len(ways)], ways, strict=True) if t < math.inf)

        return of

    def _start(self, r: int) -> Ints:
        """The pass in which a root is written: the epilogue (or combine), or the last loop over its open axes."""
        s = self.survey
        opened = s.open[s.place[r]]
        at = s.count + 1
        for q in range(1, s.last + 1):
            here = (q <= s.count) & (opened == s.passes[q - 1]) & (s.split == 0)
            at = np.where((opened != 0) & here, q, at)
        held = (opened == 0) | (at <= s.count) | s.combined(opened)
        for other in s.roots:  # every block of a combine writes every root
            held = held & ((s.split == 0) | (opened == s.open[s.place[other]]))
        return np.where(held & (self.least[s.place[r]] <= at), at, INFEASIBLE)

    def _bounds(self) -> Floats:
        s = self.survey
        bound = np.zeros(len(s.assignments))
        for r in s.roots:
            bound = np.maximum(bound, self.chain[s.place[r]])
            bound = np.where(self.starts[r] < INFEASIBLE, bound, math.inf)
        must = union(self.mandatory.computed[r] for r in s.roots)
        paid = self.local[[s.place[c] for c in s.order if must >> s.p.position[c] & 1]].sum(axis=0)
        return np.asarray(np.maximum(bound, paid))
