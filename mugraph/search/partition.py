"""Which values are materialised, and one kernel for each: a partition by prices.

`price(c)` is the least time until class c is in memory: the cheapest kernel (or library call) for c, in which any
value below c may be a leaf at its own price.  Prices are computed lazily: an unpriced value enters an extraction at
its lower bound, and is solved only if the cheapest derivation wants it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mugraph.search.closure import Edge
from mugraph.search.cost import STAGES, Amount, Prediction, Work, columns, predict_beside, predict_each
from mugraph.search.derive import KernelSearch
from mugraph.search.extract import (
    COMPUTED_TILE,
    Assignment,
    Derivation,
    Loop,
    Outcome,
    Problem,
    Roles,
    Survey,
)  # fmt: skip
from mugraph.search.footprint import Footprint, work_of
from mugraph.search.library import Added, Attention, LibraryCall, library_calls, operands
from mugraph.search.space import SearchSpace

JOINED = 3  # plans of a group whose launches are joined
KEPT = 8  # derivations per kernel that the full model ranks
WHOLE = 128  # a shorter axis is whole in the tile at first
ACCUMULATED = 40_960  # elements of all accumulators together: 160 of the 256 KiB of registers
SPLIT_MARGIN = 1.15  # the model is no surer than this, so a split must promise more for its second launch
BESIDE_MARGIN = 1.05  # nor that two kernels in one launch are better than one kernel for both
MATMUL_TILE, ROW_TILE = 256, 4096  # the longest side of a tile, in a matmul and elsewhere
NEAR = 1.1  # what kernels need that cost no more than that above the cheapest is priced too
SLACK = 4.0  # additive costs that far above the best are not ranked
RUNS = 24  # assignments of roles that are extracted, cheapest bound first
ATTEMPTS = ((WHOLE, (1, 4)), (1, (1, 4, 16, 64)))  # (shortest loop, divisors of the first tiles): until one works

MOST_TILINGS = 65_536  # of one kernel; beyond, every second or third power of two


@dataclass(frozen=True)
class Choice:
    """One launch: a derivation, several side by side, or a library call.  `needs` are classes that must be in
    memory first."""

    roots: tuple[int, ...]
    how: Derivation | tuple[Derivation, ...] | LibraryCall
    prediction: Prediction
    needs: tuple[int, ...]

    @property
    def derivations(self) -> tuple[Derivation, ...]:
        """Those of our own kernels."""
        match self.how:
            case Edge() | Added() | Attention():
                return ()
            case Derivation():
                return (self.how,)
            case several:
                return several


class Tilings(NamedTuple):
    """A kernel, and for each axis the tile sizes at which it is looked at, side by side."""

    derivation: Derivation
    footprint: Footprint
    tiles: Mapping[str, NDArray[np.float64]]

    @property
    def width(self) -> int:
        return len(next(iter(self.tiles.values()), (1,)))


class Partition:
    def __init__(self, problem: Problem, space: SearchSpace, stop: Callable[[], bool] = lambda: False) -> None:
        self.p, self.space, self.stop = problem, space, stop
        self.fixed_tiles = dict(space.tiles)
        self.whole = {a: power_of_two(size) for a, size in problem.sizes.items()}
        self.choices: dict[tuple[int, ...], list[Choice]] = {}
        self._batch: dict[tuple[int, ...], tuple[frozenset[str], frozenset[str]]] = {}
        self._shapes: dict[tuple[int, ...], list[tuple[str, ...]]] = {}
        self._alone: dict[tuple[int, ...], list[Choice]] = {}
        self._derived: dict[tuple[Survey, int, bool], tuple[float, float, Derivation | None]] = {}
        self._tiled: dict[Derivation, Choice | None] = {}  # at their best tiles
        self._works: dict[Derivation, Work] = {}
        self._at_prices: dict[tuple[tuple[int, ...], tuple[tuple[int, float], ...]], list[Choice]] = {}
        self._surveys: dict[tuple[tuple[int, ...], int], Survey | None] = {}
        self.configurations = self.entries = 0
        self.limited = False  # whether the budget of entries left assignments out
        self.seconds = 0.0

    # -- prices

    def solve(self, roots: tuple[int, ...], required: bool = False) -> list[Choice]:
        """The kernels for these roots, cheapest first (all that they need included in the order).  A single root gets
        its price.  Empty if no kernel computes them, or if the budget is spent and they are not `required`."""
        if roots in self.choices:
            return self.choices[roots]
        if self.spent() and not required:
            self.p.truncated += 1
            return []
        slack = 1.0  # the cheapest alone, until all that it needs has its price
        while True:
            found = self.library(roots) + self.kernels(roots, slack)
            found.sort(key=self.rank)
            near = [f for f in found if self.rank(f) <= self.rank(found[0]) * NEAR]
            unpriced = [c for c in dict.fromkeys(x for f in near for x in f.needs) if c not in self.p.memory]
            for c in unpriced:
                self.solve((c,))
            if self.stop() or self.spent() or (not unpriced and slack == SLACK):
                break
            slack = slack if unpriced else SLACK
        found = [f for f in found if all(self.p.memory.get(c, math.inf) < math.inf for c in f.needs)]
        self.choices[roots] = found
        if len(roots) == 1:
            self.p.memory[roots[0]] = self.total(found[0]) if found else math.inf
            self.p.bound.pop(roots[0], None)
        return found

    def plans(self, groups: tuple[tuple[int, ...], ...]) -> list[list[Choice]]:
        """Complete plans, cheapest first."""
        return _plans(self, groups)

    def spent(self) -> bool:
        """Whether the budget of states is used up: what is not priced by now stays inside kernels."""
        return self.p.expanded > self.p.states

    def rank(self, choice: Choice) -> float:
        return _with_margin(choice) + self.before(choice.needs)

    def total(self, choice: Choice) -> float:
        """Seconds of the launch and of all that it needs."""
        return choice.prediction.seconds + self.before(choice.needs)

    def cost(self, plan: Sequence[Choice]) -> float:
        """Seconds of all launches of a plan; a split counts by its margin."""
        return math.fsum(map(_with_margin, plan))  # whatever their order

    def at_prices(self, memory: dict[int, float], roots: tuple[int, ...]) -> list[Choice]:
        """The kernels for these roots where the classes of `memory`, and no others, may be loaded."""
        p = self.p
        key = roots, tuple(memory.items())
        if key not in self._at_prices:
            known = p.memory, p.bound, self._derived
            p.memory, p.bound, self._derived = memory, {}, {}
            try:
                self._at_prices[key] = self.best(self.derivations(roots, False, SLACK))
            finally:
                p.memory, p.bound, self._derived = known
        return self._at_prices[key]

    def before(self, needs: tuple[int, ...]) -> float:
        """Seconds until all of these are in memory, or a lower bound."""
        return sum(self.p.memory.get(c, self.p.bound.get(c, 0.0)) for c in needs)

    def library(self, roots: tuple[int, ...]) -> list[Choice]:
        """What library calls compute of it, from values in memory."""
        if not self.space.library or len(roots) > 1:
            return []
        found = []
        for call, prediction in library_calls(self.p, roots[0]):
            needs = tuple(sorted(x for x in set(operands(self.p, call)) if not self.is_input(x)))
            found.append(Choice(roots, call, prediction, needs))
        return found

    def is_input(self, c: int) -> bool:
        return c in self.p.inputs

    # -- kernels

    def kernels(self, roots: tuple[int, ...], slack: float = SLACK) -> list[Choice]:
        """The best derivations over all roles, ranked by the full model at their best tiles."""
        if roots not in self._alone:
            self._alone[roots] = self.best(self.derivations(roots, True, SLACK))
        found = list(self._alone[roots])
        if found and (self.spent() or min(map(self.rank, found)) <= self.least_seconds(roots)):
            return found
        if self.space.kernels > 1 or self.space.library:
            found += self.best([d for d in self.derivations(roots, False, slack) if self.needs(d)])
        return found

    def least_seconds(self, roots: tuple[int, ...]) -> float:
        """No two launches that compute the roots take less."""
        return max(self.p.least_seconds(r, launches=2) for r in roots)

    def best(self, derivations: list[Derivation]) -> list[Choice]:
        """The few that the full model likes best, each at its best tiles."""
        tiled = self.tiled(derivations)
        self.p.untiled += tiled.count(None)
        return sorted((c for c in tiled if c), key=self.rank)[:KEPT]

    def needs(self, d: Derivation) -> tuple[int, ...]:
        """What the derivation loads beside inputs."""
        return tuple(sorted({s.entry[0] for s in d.loads() if not self.is_input(s.entry[0])}))

    def derivations(self, roots: tuple[int, ...], alone: bool, slack: float) -> list[Derivation]:
        """The derivations whose additive cost is within `slack` of the least, one for each assignment of roles."""
        for least, shrinks in ATTEMPTS:
            survey = self.survey(roots, least, shrinks)
            if survey is None:
                continue
            found: list[Derivation] = []
            upper = math.inf
            outcome = survey.outcome(alone)
            fixed = self.fixed_seconds(survey)
            bounds = outcome.bounds + fixed
            order = np.argsort(bounds, kind="stable")
            self.p.infeasible += int(np.isinf(outcome.bounds).sum())
            usual = zip(survey.assignments, bounds.tolist(), strict=True)
            admitted = {a.roles for a, bound in usual if bound < math.inf and not a.fitted}
            done: set[Roles] = set()
            for rank, n in enumerate(order):
                if math.isinf(bounds[n]) or self.stop() or len(done) >= RUNS:
                    break
                if found and self.spent():
                    self.p.truncated += 1
                    break
                if bounds[n] >= upper:
                    self.p.bounded += int(np.isfinite(bounds[order[rank:]]).sum())
                    break
                a = survey.assignments[n]
                if a.roles in done or (a.fitted and a.roles in admitted):
                    continue
                done.add(a.roles)
                d = self.derivation(outcome, int(n), upper - float(fixed[n]))
                if d is not None:
                    found.append(d)
                    before = self.before(self.needs(d))
                    upper = min(upper, before + (d.cost - before + float(fixed[n])) * slack)
            if found or self.stop():
                return found
        return []

    def derivation(self, outcome: Outcome, n: int, upper: float) -> Derivation | None:
        """The cheapest derivation of one assignment.  Prices only rise, from bounds to what launches take: the
        cheapest at former prices whose own have not changed is the cheapest still."""
        key = outcome.survey, n, outcome.alone
        if key in self._derived:
            before, most, known = self._derived[key]
            if known is None and upper <= most:
                return None
            if known is not None and self.before(self.needs(known)) == before:
                return known if known.cost < upper else None
        d = KernelSearch(outcome, n).run(upper, lambda: self.in_one_pass(outcome, n, upper))
        self._derived[key] = self.before(self.needs(d)) if d else 0.0, upper, d
        return d

    def in_one_pass(self, outcome: Outcome, n: int, upper: float) -> Derivation | None:
        """The cheapest derivation of the same assignment with its first pass only."""
        a = outcome.survey.assignments[n]
        once = replace(a.roles, passes=a.roles.passes[:1])
        for m, other in enumerate(outcome.survey.assignments):
            if other.roles == once and other.tiles == a.tiles:
                return self.derivation(outcome, m, upper)
        return None

    def fixed_seconds(self, survey: Survey) -> NDArray[np.float64]:
        """What each assignment costs whatever is computed: its launch, and a second one for the combine of a split."""
        d = self.p.device
        launch = d.launch_seconds + d.fill_seconds
        return np.where(survey.split != 0, launch + d.launch_seconds, launch)

    def survey(self, roots: tuple[int, ...], least: int, shrinks: tuple[int, ...]) -> Survey | None:
        """All assignments of roles, from several tile sizes; None if there are none, or beyond the budget."""
        if (roots, least) not in self._surveys:
            if self.entries >= self.space.entries:
                self.limited = True
                return None
            members = len(self.p.below_all(roots))
            most = max(1, (self.space.entries - self.entries) // members)
            assignments = list(itertools.islice(self.assignments(roots, least, shrinks), most + 1))
            self.limited |= len(assignments) > most
            assignments = assignments[:most]
            self.configurations += len(assignments)
            self.entries += len(assignments) * members
            self._surveys[roots, least] = Survey(self.p, roots, assignments) if assignments else None
        return self._surveys[roots, least]

    def roles(self, roots: tuple[int, ...], least: int) -> Iterator[Roles]:
        """All assignments of roles, in a fixed order.  Axes no longer than `least` are not looped over."""
        p = self.p
        shared = set.intersection(*(set(p.axes(r)) for r in roots))
        free = [a for a in p.axes(roots[0]) if a in shared and p.limits[a] > 1]
        sequences = self.sequences(roots, least)
        for count in range(len(free), -1, -1):
            for grid in itertools.combinations(free, count):
                if self.space.grid is not None and set(grid) != set(self.space.grid) & set(free):
                    continue
                for passes in sequences:
                    if any(a in grid for loop in passes for a in loop):
                        continue
                    yield Roles(grid, passes)
                    if self.space.split and len(passes) == 1 and len(passes[0]) == 1:
                        for parts in self.split_counts(roots, grid, passes[0][0]):
                            yield Roles(grid, passes, (passes[0][0], parts))

    def sequences(self, roots: tuple[int, ...], least: int) -> list[tuple[Loop, ...]]:
        """The loops that a kernel may run one after the other.  A loop over Y comes after one over X if something
        over Y needs something closed over X; independent loops come in one order only."""
        p = self.p
        below = p.below_all(roots)
        members = [c for c in p.closure.order if c in below]
        closed_below: dict[int, frozenset[str]] = {}
        loops: set[Loop] = set()
        for c in members:
            closed = set[str]()
            for w in p.ways[c]:
                closed |= w.closed.union(*(closed_below[x] for x in w.edge.children))
                long = sorted(a for a in w.closed if p.limits[a] > least and self.may_loop(a))
                loops.update((a,) for a in long)
                loops.update(pair for pair in itertools.combinations(long, 2) if all(p.limits[a] > WHOLE for a in pair))
            closed_below[c] = frozenset(closed)
        needs = {(frozenset(p.axes(c)), closed_below[c]) for c in members}

        def follows(x: Loop, y: Loop) -> bool:
            return any(axes.issuperset(y) and below.issuperset(x) for axes, below in needs)

        singles = sorted(loops, key=lambda loop: (len(loop), loop))
        after = {(x, y) for x in singles for y in singles if follows(x, y) or (x < y and not follows(y, x))}
        found: list[tuple[Loop, ...]] = [()]
        layer: list[tuple[Loop, ...]] = [()]
        for _ in range(self.space.passes):
            layer = [(*s, y) for s in layer for y in singles if all((x, y) in after for x in s)]
            found += layer
        return found

    def may_loop(self, axis: str) -> bool:
        return self.space.loops is None or axis in self.space.loops

    def split_counts(self, roots: tuple[int, ...], grid: tuple[str, ...], axis: str) -> list[int]:
        """Powers of two that bring the blocks near one or two per SM, with at least two tiles in each part."""
        roles = Roles(grid, ((axis,),))
        tiles = self.default_tiles(roots, roles, 1)
        blocks = math.prod(math.ceil(self.p.sizes[a] / tiles[a]) for a in grid)
        wanted = [w for w in (self.p.device.sms / blocks, 2 * self.p.device.sms / blocks) if w >= 2]
        counts = set[int]()
        for tile in {tiles[axis], (tiles if grid else self.fitted(roots, roles, tiles))[axis]}:
            most = self.p.sizes[axis] // (2 * tile)
            counts.update(min(2 ** round(math.log2(w)), 2 ** int(math.log2(most))) for w in wanted if most >= 2)
        return sorted(c for c in counts if c >= 2)

    def assignments(self, roots: tuple[int, ...], least: int, shrinks: tuple[int, ...]) -> Iterator[Assignment]:
        """All roles under which the roots can be stored, each with the tiles that the extraction may start from.  An
        axis that one matmul has on both sides and another on one side only starts as either."""
        _, kept = self.batch_axes(roots)
        for roles in self.roles(roots, least):
            if not self.stored(roots, roles):
                self.p.infeasible += 1
                continue
            starts: list[dict[str, int]] = []
            either = (True, False) if kept.intersection(roles.grid) else (True,)
            for shrink in shrinks:
                for single in either:
                    tiles = self.default_tiles(roots, roles, shrink, single)
                    if tiles not in starts:
                        starts.append(tiles)
            axis, parts = roles.split or ("", 1)
            if parts == 1 or 2 * parts * starts[0][axis] <= self.p.sizes[axis]:
                for tiles in starts:
                    if self.held(roots, tiles):
                        yield Assignment(roles, tiles)
                    else:
                        self.p.infeasible += 1
            if roles.split and not roles.grid and (fitted := self.fitted(roots, roles, starts[0])) not in starts:
                yield Assignment(roles, fitted, fitted=True)

    def stored(self, roots: tuple[int, ...], roles: Roles) -> bool:
        """Whether each root is written in the epilogue, in one pass or, after a split, with all in the combine."""
        places = {roles.loops.intersection(self.p.axes(r)) for r in roots}
        if roles.split:
            return len(places) == 1 and places <= {frozenset(), frozenset(roles.split[:1])}
        return places <= {frozenset(), *map(frozenset, roles.passes)}

    def held(self, roots: tuple[int, ...], tiles: Mapping[str, int]) -> bool:
        """Whether a tile of each root fits a block."""
        p = self.p
        sizes = (math.prod([tiles.get(a, p.limits[a]) for a in p.axes(r)]) for r in roots if r not in p.inputs)
        return all(size <= COMPUTED_TILE for size in sizes)

    def default_tiles(self, roots: tuple[int, ...], roles: Roles, shrink: int, single: bool = True) -> dict[str, int]:
        """Where the extraction starts; the full model moves them.  `single`: an axis that some matmul keeps from both
        sides is cut to single elements."""
        fixed, (never, kept) = self.fixed_tiles, self.batch_axes(roots)
        tiles = {}
        for a in (*roles.grid, *sorted(roles.loops)):
            whole = self.whole[a]
            one = a in never or (single and a in kept)
            size = min(64, whole) if a in roles.loops else 1 if one else max(1, min(64, whole) // shrink)
            tiles[a] = min(fixed.get(a, size), whole)
        return tiles

    def fitted(self, roots: tuple[int, ...], roles: Roles, tiles: dict[str, int]) -> dict[str, int]:
        """The tiles, with no more of a looped axis than fits a tile beside the axes that are whole.  Where all are
        whole or looped, only a split fills the device."""
        p = self.p
        if roots not in self._shapes:
            self._shapes[roots] = sorted({p.axes(c) for r in roots for c in p.below[r]})
        found = dict(tiles)
        for a in sorted(roles.loops - self.fixed_tiles.keys()):
            shapes = [axes for axes in self._shapes[roots] if a in axes]
            beside = max((math.prod([p.limits[x] for x in axes if x not in tiles]) for axes in shapes), default=1)
            while found[a] > 1 and found[a] * beside > COMPUTED_TILE:
                found[a] //= 2
        return found

    def batch_axes(self, roots: tuple[int, ...]) -> tuple[frozenset[str], frozenset[str]]:
        """Axes below the roots that no matmul has on one side only, and axes that one has on both sides and keeps."""
        if roots not in self._batch:
            p = self.p
            below = p.below_all(roots)
            one_sided, kept = set[str](), set[str]()
            for way in (w for c in below for w in p.ways[c] if w.matmul):
                a, b = (set(p.axes(x)) for x in way.edge.children)
                one_sided |= a ^ b
                kept |= (a & b) - way.closed
            never = frozenset(a for c in below for a in p.axes(c) if a not in one_sided)
            self._batch[roots] = never, frozenset(kept)
        return self._batch[roots]

    # -- tiles

    def tiled(self, derivations: Sequence[Derivation]) -> list[Choice | None]:
        """Each kernel at the tile sizes that the full model likes best; None if no tile fits the device."""
        batch: list[Tilings] = []
        waiting = 0
        for d in dict.fromkeys(derivations):
            if d not in self._tiled:
                batch.append(self.tilings(d))
                waiting += batch[-1].width
                if waiting > MOST_TILINGS:
                    self._tile(batch)
                    batch, waiting = [], 0
        self._tile(batch)
        return [self._tiled[d] for d in derivations]

    def _tile(self, batch: Sequence[Tilings]) -> None:
        if not batch:
            return
        excess, seconds, predicted = self.fit(batch)
        seconds = np.where(excess > 0, math.inf, seconds)
        first = 0
        for t in batch:
            here = seconds[first : first + t.width]
            least = float(here.min())
            self._tiled[t.derivation] = None
            if least < math.inf:
                best = int((here <= least * (1 + 1e-9)).argmax())
                d = replace(t.derivation, tiles=tuple((a, int(sizes[best])) for a, sizes in t.tiles.items()))
                self._tiled[t.derivation] = Choice(d.roots, d, predicted(first + best), self.needs(d))
            first += t.width

    def work(self, d: Derivation) -> Work:
        """What a kernel does, at its own tiles."""
        if d not in self._works:
            self._works[d] = work_of(self.p, d)
        return self._works[d]

    def tilings(self, d: Derivation) -> Tilings:
        """All powers of two together, those next to where the extraction started first."""
        fixed, footprint = self.fixed_tiles, Footprint(self.p, d)
        most = {a: min(MATMUL_TILE if a in footprint.multiplied else ROW_TILE, self.p.sizes[a]) for a, _ in d.tiles}
        sides = tuple((start, 0 if a in fixed else power_of_two(most[a])) for a, start in d.tiles)
        return Tilings(d, footprint, dict(zip(most, powers_of_two(sides), strict=True)))

    def fit(self, batch: Sequence[Tilings]) -> tuple[Amount, Amount, Callable[[int], Prediction]]:
        """How far tiles exceed the device, the predicted seconds, and all that is predicted for the n-th: for all
        kernels, side by side."""
        work = columns([t.footprint.work(t.tiles) for t in batch], [t.width for t in batch])
        excess = np.concatenate([t.footprint.excess(t.tiles) + np.zeros(t.width) for t in batch])
        excess = excess + np.maximum(0, STAGES * work.stage + work.resident - self.p.device.shared_bytes_per_block)
        excess = excess + np.maximum(0, work.accumulators - ACCUMULATED)
        return excess, *predict_each(work, self.p.device)


@lru_cache(64)  # the largest takes some MB
def powers_of_two(sides: tuple[tuple[int, int], ...]) -> list[NDArray[np.float64]]:
    """Of some (start, most), all powers of two up to `most` together (0: only the start), those next to the starts
    first."""
    lengths = [most.bit_length() or 1 for _, most in sides]
    step = 1
    while math.prod(-(-n // step) for n in lengths) > MOST_TILINGS:
        step += 1
    each = [
        np.exp2(np.arange(0, n, step)) if most else np.array([float(start)])
        for n, (start, most) in zip(lengths, sides, strict=True)
    ]
    flat = [g.ravel() for g in np.meshgrid(*each, indexing="ij")]
    away = sum((abs(np.log2(g / start)) for g, (start, _) in zip(flat, sides, strict=True)), np.zeros(1))
    order = np.argsort(away, kind="stable")
    return [g[order] for g in flat]


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def partition(
    problem: Problem,
    space: SearchSpace,
    groups: tuple[tuple[int, ...], ...],
    stop: Callable[[], bool],
    make: type[Partition] = Partition,
) -> tuple[list[list[Choice]], Partition]:
    """Complete plans, cheapest first: each a list of launches that together compute the targets, group by group.  When
    told to stop, the best so far.  `make`: how launches are found."""
    run = make(problem, space, stop)
    started = time.perf_counter()
    plans = run.plans(groups)
    run.seconds = time.perf_counter() - started
    return plans, run


def _plans(run: Partition, groups: tuple[tuple[int, ...], ...]) -> list[list[Choice]]:
    """The cheapest plan of every group together, then the second of those that have one, and so on; and the cheapest
    with launches joined."""
    ways = [sorted(_with_variants(run, targets), key=run.cost) for targets in groups]
    most = max(map(len, ways), default=0) if all(ways) else 0
    plans = [[c for way in ways for c in way[min(n, len(way) - 1)]] for n in range(most)]
    if most:
        joined = list[Choice]()
        for way, targets in zip(ways, groups, strict=True):
            apart = way + [joined_up(run, plan, targets) for plan in way[:JOINED]]
            best = min(apart, key=run.cost)
            if run.space.beside:
                together = min((side_by_side(run, plan) for plan in apart), key=run.cost)
                margin = 1.0 if len(together) < len(best) else BESIDE_MARGIN
                best = together if run.cost(together) * margin < run.cost(best) else best
            joined += best
        plans.append(joined)
    unique = dict.fromkeys(tuple(dict.fromkeys(plan)) for plan in plans)
    return sorted(map(list, unique), key=run.cost)


def _with_variants(run: Partition, targets: tuple[int, ...]) -> list[list[Choice]]:
    """The complete plans of a group; and the cheapest with each launch replaced by others for the same values: one for
    each set of values that they need."""
    plans = list(_complete(run, _ways(run, targets)))
    best = min(plans, key=run.cost, default=[])
    for choice in best:
        others: dict[tuple[int, ...], Choice] = {}
        for other in run.choices.get(choice.roots, ()):
            others.setdefault(other.needs, other)
        rest = [c for c in best if c is not choice]
        made = _complete(run, ([*rest, other] for other in others.values() if other.needs != choice.needs))
        plans += (_live(plan, targets) for plan in made)
    return plans


def _complete(run: Partition, ways: Iterable[Sequence[Choice]]) -> Iterator[list[Choice]]:
    """The ways with all that they need; those that would need their own results are passed over."""
    for way in ways:
        try:
            yield _with_needs(run, way)
        except Circular:
            continue


def _ways(run: Partition, targets: tuple[int, ...]) -> list[list[Choice]]:
    """One kernel for all of them, or one launch for each: the cheapest, or the cheapest of our own that are not split:
    they may store parts of one value in place and share a launch."""
    ways = [[c] for c in run.solve(targets, required=True)]
    if len(targets) > 1:
        single = [run.solve((t,), required=True) for t in targets]
        if all(single):
            ways.append([options[0] for options in single])
        own = [next((c for c in options if c.derivations and not _is_split(c)), None) for options in single]
        if all(own) and own not in ways:
            ways.append([c for c in own if c])
    return ways


def _is_split(choice: Choice) -> bool:
    return any(d.roles.split for d in choice.derivations)


def _with_margin(choice: Choice) -> float:
    return choice.prediction.seconds * (SPLIT_MARGIN if _is_split(choice) else 1.0)


class Circular(Exception):
    """Two launches that each need the other."""


def _with_needs(run: Partition, plan: Sequence[Choice]) -> list[Choice]:
    """The plan with the launches that materialise what it needs, in order, each once.  Raises Circular."""
    made = {r: choice for choice in plan for r in choice.roots}
    ordered: list[Choice] = []
    under_way: list[Choice] = []
    done: set[int] = set()

    def visit(choice: Choice) -> None:
        if choice in under_way:
            raise Circular
        under_way.append(choice)
        for c in choice.needs:
            if c in made:
                if c not in done:
                    visit(made[c])
            elif c not in done and (options := run.choices.get((c,))):
                visit(options[0])
        under_way.pop()
        if choice not in ordered:
            ordered.append(choice)
            done.update(choice.roots)

    for choice in plan:
        visit(choice)
    return ordered


# -- joint kernels


def joined_up(run: Partition, plan: list[Choice], targets: tuple[int, ...]) -> list[Choice]:
    """The plan with two launches made one, as long as some pair makes it cheaper.  A price counts a value in full for
    each of its users, and knows nothing of what two kernels both load or compute: this step does."""
    while len(plan) > 1 and not run.stop() and not run.spent():
        trials = []
        for pair in itertools.combinations(plan, 2):
            group = _with_between(plan, pair)
            joint = _joint(run, plan, group, targets)
            if joint is None:
                continue
            try:
                trials.append(_live(_with_needs(run, [c for c in plan if c not in group] + [joint]), targets))
            except Circular:  # what the joint kernel needs is made from one of its results
                continue
        best = min(trials, key=run.cost, default=plan)
        if run.cost(best) >= run.cost(plan) * (1 - 1e-6):
            break
        plan = best
    return plan


def _with_between(plan: list[Choice], pair: tuple[Choice, ...]) -> list[Choice]:
    """The pair, and the launches that need one of it and are needed by the other."""
    roots = {r for c in pair for r in c.roots}
    after = _downstream(plan, roots)
    between = [c for c in plan if c not in pair and after & set(c.roots) and roots & _downstream(plan, set(c.roots))]
    return [*pair, *between]


def _joint(run: Partition, plan: list[Choice], group: list[Choice], targets: tuple[int, ...]) -> Choice | None:
    """The cheapest kernel for what others want of a group, which may load what the rest of the plan has in memory by
    then."""
    rest = [c for c in plan if c not in group]
    made = {r for c in group for r in c.roots}
    roots = tuple(sorted(made & set(targets).union(*(c.needs for c in rest))))
    there = run.p.inputs | {r for c in rest for r in c.roots}
    prices = dict.fromkeys(sorted((there - _downstream(plan, made)) & run.p.below_all(roots)), 0.0)
    found = run.at_prices(prices, roots)
    return min(found, key=run.rank, default=None)


def _downstream(plan: list[Choice], roots: set[int]) -> set[int]:
    """What is computed from the roots, the roots excluded."""
    reached = set(roots)
    for c in plan:
        if reached & set(c.needs):
            reached |= set(c.roots)
    return reached - roots


def side_by_side(run: Partition, plan: list[Choice]) -> list[Choice]:
    """The plan with independent kernels in one launch, as long as some pair makes it cheaper: one launch is saved, and
    the blocks of both fill the device."""
    improved = True
    while improved:
        improved = False
        for a, b in itertools.combinations(plan, 2):
            both = _beside(run, plan, a, b)
            if both is None:
                continue
            trial = _with_needs(run, [both if c is a else c for c in plan if c is not b])
            if run.cost(trial) < run.cost(plan) * (1 - 1e-6):
                plan, improved = trial, True
                break
    return plan


def _beside(run: Partition, plan: list[Choice], a: Choice, b: Choice) -> Choice | None:
    """The two kernels as one launch; None if one needs the other, or if one is split or a library call."""
    how: list[Derivation] = []
    for choice in (a, b):
        match choice.how:
            case Derivation(roles=Roles(split=None)) as d:
                how.append(d)
            case tuple(several) if not isinstance(several, Edge):
                how += several
            case _:
                return None
    if set(b.roots) & _downstream(plan, set(a.roots)):
        return None
    prediction = predict_beside([run.work(d) for d in how], run.p.device)
    return Choice(a.roots + b.roots, tuple(how), prediction, tuple(sorted({*a.needs, *b.needs})))


def resized(run: Partition, plans: Sequence[Sequence[Choice]]) -> list[list[Choice]]:
    """Plans that were found at other sizes, at those of this run: their launches at their best tiles.  Without those
    of which a launch is not in the space there."""
    run.tiled([d for plan in plans for c in plan for d in c.derivations])  # all at once
    found = [[_resized(run, choice) for choice in plan] for plan in plans]
    return [[c for c in plan if c] for plan in found if None not in plan]


def _resized(run: Partition, choice: Choice) -> Choice | None:
    p = run.p
    if not all(c in p.memory or c in p.bound for c in choice.needs):
        return None
    if not choice.derivations:
        calls = library_calls(p, choice.roots[0])
        return next((replace(choice, prediction=seconds) for call, seconds in calls if call == choice.how), None)
    how: list[Derivation] = []
    for d in choice.derivations:
        if d.roles.split and d.roles.split[1] not in run.split_counts(d.roots, d.roles.grid, d.roles.split[0]):
            return None
        if (tiled := run.tiled([d])[0]) is None:
            return None
        if isinstance(choice.how, Derivation):
            return tiled
        how += tiled.derivations
    prediction = predict_beside([run.work(d) for d in how], p.device)
    return replace(choice, how=tuple(how), prediction=prediction)


def _live(plan: list[Choice], targets: tuple[int, ...]) -> list[Choice]:
    """Without launches that nothing needs."""
    wanted = set(targets)
    kept: list[Choice] = []
    for c in reversed(plan):
        if wanted & set(c.roots):
            kept.append(c)
            wanted |= set(c.needs)
    return kept[::-1]
