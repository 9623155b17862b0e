"""One kernel: which axes play which role, and the cheapest derivation of its roots under those roles.

Roles belong to a kernel, not to a value: an axis is on the grid, looped in pass p, split (looped and on the grid), or
whole in the tile.  An *entry* (class, p) is a value with an open loop axis computed in pass p, or any other value
available before pass p (p = number of passes + 1: in the epilogue).  Closing over a looped axis leads from a pass
q < p; closing over a grid axis is refused unless the axis is split.

The extraction is A* over cuts: a state is the set of open entries; the topologically highest is expanded, so each
class is paid once and sharing is exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mugraph.ir.types import DType
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import VECTOR_WEIGHT, Device, Product, Read, Work
from mugraph.search.laws import IOTA

Entry = tuple[int, int]
INFEASIBLE = 99
LOADED_TILE = 65_536  # elements of a tile that is only loaded: 128 KiB of f16 in shared memory
COMPUTED_TILE = 32_768  # elements of a computed tile: 128 KiB of f32 in registers
BEAM = 8  # states kept per topological level when A* exceeds its budget
SECTOR = 64  # bytes side by side below which reads and writes waste bandwidth


@dataclass(frozen=True)
class Roles:
    """`passes` lists the looped axis of each pass; `split` is (axis, parts) of the last pass."""

    grid: tuple[str, ...]
    passes: tuple[str, ...]
    split: tuple[str, int] | None = None

    @property
    def loops(self) -> frozenset[str]:
        return frozenset(self.passes)


@dataclass(frozen=True)
class Option:
    """One way to get an entry.  `edge` None: load the class from memory (an input, or a materialised value)."""

    cost: float
    edge: Edge | None
    children: tuple[int, ...]
    loop: str | None  # the looped axis that the edge closes


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
    dtypes   class -> element type in memory (inputs); other classes have `dtype`
    innermost  class -> the axis along which its elements lie side by side in memory, where that is known
    """

    closure: Closure
    sizes: Mapping[str, int]
    limits: Mapping[str, int]
    device: Device
    dtype: DType
    memory: dict[int, float]
    bound: dict[int, float]
    dtypes: Mapping[int, DType]
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


class KernelSearch:
    """The cheapest derivation of `roots` under `roles` with the given tiles.  `alone`: it loads inputs only."""

    def __init__(
        self, problem: Problem, roots: tuple[int, ...], roles: Roles, tiles: Mapping[str, int], alone: bool = False
    ) -> None:
        self.p, self.roots, self.roles, self.tiles = problem, roots, roles, dict(tiles)
        self.alone = alone
        self.grid = frozenset(roles.grid)
        self.last = len(roles.passes)
        self.blocks = math.prod(math.ceil(problem.sizes[a] / tiles[a]) for a in roles.grid)
        self.blocks *= roles.split[1] if roles.split else 1
        self.busy = min(1.0, self.blocks / problem.device.sms)
        members = frozenset().union(*(problem.below[r] for r in roots))
        self.order = [c for c in problem.closure.order if c in members]
        self.loops = roles.loops
        self.width = {a: tiles.get(a, limit) for a, limit in problem.limits.items()}
        self.copies = [(a, math.ceil(problem.sizes[a] / tiles[a])) for a in roles.grid]
        self.loop_of = {c: self._loop_of(c) for c in self.order}
        self.options: dict[int, list[Option]] = {}
        self.least: dict[int, int] = {}
        for c in self.order:
            self.options[c] = self._options(c)
            self.least[c] = min((self._least(c, o) for o in self.options[c]), default=INFEASIBLE)
            self.options[c] = [o for o in self.options[c] if self._least(c, o) < INFEASIBLE]

    def _loop_of(self, c: int) -> str | None:
        """The looped axis that is open in the class; "" if two are, which no pass of one loop can hold."""
        loops = [a for a in self.p.axes(c) if a in self.loops]
        return None if not loops else loops[0] if len(loops) == 1 else ""

    def tile_elements(self, c: int) -> int:
        return math.prod([self.width[a] for a in self.p.axes(c)])

    def replication(self, axes: Sequence[str]) -> int:
        """How many blocks repeat something that lacks some grid axes."""
        return math.prod([n for a, n in self.copies if a not in axes])

    def _options(self, c: int) -> list[Option]:
        p = self.p
        if self.loop_of[c] == "":
            return []
        found: list[Option] = []
        tile = self.tile_elements(c)
        price = p.memory.get(c, p.bound.get(c))
        loadable = c in p.inputs or (price is not None and c not in self.roots and not self.alone)
        if price is not None and loadable and tile <= LOADED_TILE:
            found.append(Option(self._load_seconds(c) + price, None, (), None))
        if tile > COMPUTED_TILE:
            return found
        for way in p.ways[c]:
            loops = way.closed & self.loops
            if len(loops) > 1 or way.closed & self.grid:
                continue
            found.append(Option(self._compute_seconds(c, way), way.edge, way.edge.children, next(iter(loops), None)))
        return undominated(found)

    def _load_seconds(self, c: int) -> float:
        d, size = self.p.device, self.p.bytes(c)
        share = min(1.0, 2 * self.busy)
        return (size / d.bandwidth + size * (self.replication(self.p.axes(c)) - 1) / d.l2_bytes_per_second) / share

    def _compute_seconds(self, c: int, way: Way) -> float:
        if not way.edge.children:
            return 1e-12
        p, volume = self.p, way.volume * self.replication(way.axes)
        if way.matmul:
            seconds = 2 * volume / p.device.matmul_rate(p.dtype)
        else:
            seconds = VECTOR_WEIGHT * volume / p.device.vector_flops
        seconds /= self.busy
        if self.roles.split and self.roles.split[0] in way.closed:
            seconds += 2 * self.roles.split[1] * p.elements(c) * 4 / p.device.l2_bytes_per_second
        return seconds + 1e-11

    # -- feasibility: the least pass of each class

    def _pass_over(self, axis: str, start: int) -> int:
        """The first pass from `start` on that loops over the axis."""
        return next((q for q in range(start, self.last + 1) if self.roles.passes[q - 1] == axis), INFEASIBLE)

    def _least(self, c: int, o: Option) -> int:
        least = max([self.least[x] for x in o.children], default=1)
        if least >= INFEASIBLE:
            return INFEASIBLE
        loop = self.loop_of[c]
        open_children = {self.loop_of[x] for x in o.children} - {None}
        if loop is not None:
            return self._pass_over(loop, least) if open_children <= {loop} else INFEASIBLE
        if o.loop is not None:
            q = self._pass_over(o.loop, least)
            return q + 1 if q < INFEASIBLE and open_children <= {o.loop} else INFEASIBLE
        return INFEASIBLE if open_children else least

    def start(self) -> frozenset[Entry] | None:
        """The roots as entries, or None if some root cannot be computed under these roles."""
        entries: list[Entry] = []
        for r in self.roots:
            loop = self.loop_of[r]
            if loop is None:
                at = self.last + 1 if self.least[r] <= self.last + 1 else INFEASIBLE
            elif self.roles.split or not loop:
                at = INFEASIBLE
            else:
                at = max((q for q in range(1, self.last + 1) if self.roles.passes[q - 1] == loop), default=INFEASIBLE)
                at = at if self.least[r] <= at else INFEASIBLE
            if at == INFEASIBLE:
                return None
            entries.append((r, at))
        return frozenset(entries)

    # -- extraction

    def lower_bound(self) -> Callable[[frozenset[Entry]], float]:
        """No completion of a state costs less: every open entry is still to be paid, and so is the longest cheapest
        path below one."""
        local: dict[int, float] = {}
        chain: dict[int, float] = {}
        for c in self.order:
            local[c] = min((o.cost for o in self.options[c]), default=math.inf)
            chain[c] = min(
                (o.cost + max((chain[x] for x in o.children), default=0.0) for o in self.options[c]), default=math.inf
            )

        def bound(state: frozenset[Entry]) -> float:
            return max(max(chain[c] for c, _ in state), sum(local[c] for c, _ in state)) if state else 0.0

        return bound

    def run(self, upper: float) -> Derivation | None:
        """The cheapest derivation with cost below `upper`, or None."""
        p = self.p
        start = self.start()
        if start is None:
            p.infeasible += 1
            return None
        bound = self.lower_bound()

        def highest(state: frozenset[Entry]) -> int:
            return max((p.position[c] for c, _ in state), default=-1)

        queue: list[tuple[float, int, int, float, frozenset[Entry], tuple[object, ...]]]
        queue = [(bound(start), 0, 0, 0.0, start, ())]
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
            if expanded > p.states:
                p.truncated += 1
                return self.beam(start, bound)
            for step, successor in self.successors(state):
                total = cost + step.option.cost
                if total < best.get(successor, math.inf):
                    best[successor] = total
                    ticket += 1
                    p.generated += 1
                    entry = (total + bound(successor), highest(successor), ticket, total, successor, (trail, step))
                    heapq.heappush(queue, entry)
        p.infeasible += 1
        return None

    def derivation(self, cost: float, trail: tuple[object, ...]) -> Derivation | None:
        steps = tuple(_unroll(trail))
        if self.roles.split and not any(self.roles.split[0] in _closed(s) for s in steps):
            return None  # the split axis must be closed in this kernel
        used = {s.entry[1] for s in steps if self.loop_of[s.entry[0]] is not None}
        if len(used) < self.last:
            return None  # a loop without a body
        return Derivation(self.roots, self.roles, tuple(sorted(self.tiles.items())), steps, cost)

    def beam(self, start: frozenset[Entry], bound: Callable[[frozenset[Entry]], float]) -> Derivation | None:
        """What A* does, a topological level at a time, keeping the BEAM most promising states of each level."""
        levels: dict[int, dict[frozenset[Entry], tuple[float, tuple[object, ...]]]] = {}

        def level_of(state: frozenset[Entry]) -> int:
            return max((self.p.position[c] for c, _ in state), default=-1)

        levels[level_of(start)] = {start: (0.0, ())}
        while levels and max(levels) >= 0:
            level = levels.pop(max(levels))
            kept = sorted(level.items(), key=lambda item: item[1][0] + bound(item[0]))[:BEAM]
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
        for option in self.options[c]:
            for children in self._placements(c, at, option):
                yield Step(entry, option, children), _merged(rest, children, self.loop_of)

    def _placements(self, c: int, at: int, option: Option) -> Iterator[tuple[Entry, ...]]:
        """The passes in which the children may be computed."""
        if self.loop_of[c] is not None:  # in the loop: open children in the same pass, others before it
            children = tuple((x, at) for x in option.children)
            if all(self.least[x] <= at for x in option.children):
                yield children
            return
        if option.loop is None:
            if all(self.least[x] <= at for x in option.children):
                yield tuple((x, at) for x in option.children)
            return
        for q in range(1, at):
            if self.roles.passes[q - 1] != option.loop or any(self.least[x] > q for x in option.children):
                continue
            if self.roles.split and self.roles.split[0] == option.loop and q != self.last:
                continue
            yield tuple((x, q) for x in option.children)


def undominated(options: list[Option]) -> list[Option]:
    """Without options that need at least the children of a cheaper one that closes the same axis."""
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.cost, len(o.children))):
        if not any(k.loop == o.loop and k.edge is not None and set(k.children) <= set(o.children) for k in kept):
            kept.append(o)
    return kept


def _closed(step: Step) -> tuple[str, ...]:
    return step.option.edge.axes if step.option.edge else ()


def _merged(rest: frozenset[Entry], children: tuple[Entry, ...], loop_of: Mapping[int, str | None]) -> frozenset[Entry]:
    """Adds the children.  A value outside loops is needed once, before the earliest pass that asks for it."""
    earliest: dict[int, int] = {}
    looped: set[Entry] = set()
    for c, at in (*rest, *children):
        if loop_of[c] is not None:
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
    tiles = dict(d.tiles)
    grid, loops = d.roles.grid, d.roles.loops
    parts = d.roles.split[1] if d.roles.split else 1

    def blocks_along(a: str) -> int:
        return math.ceil(p.sizes[a] / tiles[a])

    def tile_elements(axes: Iterable[str]) -> int:
        return math.prod(min(tiles.get(a, p.sizes[a]), p.sizes[a]) for a in axes)

    def replication(axes: Sequence[str]) -> int:
        return math.prod(blocks_along(a) for a in grid if a not in axes)

    def waste(c: int) -> float:
        """Bytes that move for each byte that is wanted: short runs waste the rest of a sector."""
        axis = p.innermost.get(c)
        if axis is None or tiles.get(axis, p.sizes[axis]) >= p.sizes[axis]:
            return 1.0  # whole rows lie side by side too
        run = tiles[axis] * p.dtypes.get(c, p.dtype).bits / 8
        return max(1.0, SECTOR / run)

    written = sum(p.bytes(r) for r in d.roots)
    writing = sum(p.bytes(r) * waste(r) for r in d.roots) / written if written else 1.0
    stage = resident = partial = vector = accumulators = 0.0
    reads: list[Read] = []
    products: list[Product] = []
    depth, loaded = 1, set[int]()
    for s in d.steps:
        c, _ = s.entry
        axes = p.axes(c)
        looped = any(a in loops for a in axes)
        if s.option.edge is None:
            cuts = (*(a in axes for a in grid), *([looped] if parts > 1 else []))
            reads.append(Read(p.bytes(c), cuts, waste(c), c in loaded))
            loaded.add(c)
            bytes_in_tile = tile_elements(axes) * p.dtypes.get(c, p.dtype).bits / 8
            if looped:
                stage += bytes_in_tile
            else:
                resident += bytes_in_tile
            continue
        if not s.option.edge.children:
            continue
        joined = p.joined_axes(c, s.option.children)
        padded = math.prod(math.ceil(p.sizes[a] / tiles.get(a, 1)) * tiles.get(a, 1) for a in joined)
        volume = float(padded * replication(joined))
        if p.is_matmul(c, s.option.edge):
            left, right = (set(p.axes(x)) for x in s.option.children)
            dtype = product_dtype(p, s.option.children)
            products.append(Product(volume, tile_elements(left - right), tile_elements(right - left), dtype))
            depth += max(1, tile_elements(s.option.edge.axes) // 16)
        else:
            vector += VECTOR_WEIGHT * volume
        if s.option.loop is not None:
            accumulators += tile_elements(axes)
            if d.roles.split:
                partial += 2 * parts * p.elements(c) * 4
        elif not looped:
            accumulators = max(accumulators, tile_elements(axes))
    trips = sum(math.ceil(blocks_along(a) / parts) for a in d.roles.passes)
    blocks = (*(blocks_along(a) for a in grid), *([parts] if parts > 1 else []))
    return Work(
        blocks, trips, tuple(reads), written, writing, stage, resident, partial, tuple(products), vector, accumulators, depth
    )  # fmt: skip


def product_dtype(p: Problem, operands: Sequence[int]) -> DType:
    """The type that a product multiplies in: the widest of its floating operands, 16 bits at least."""
    types = [p.dtypes.get(x, p.dtype) for x in operands]
    wide = [t for t in types if t.is_float and t.bits >= 16]
    return max(wide, key=lambda t: t.bits) if wide else DType.f16
