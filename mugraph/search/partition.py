"""Which values are materialised, and one kernel for each: a partition by prices.

`price(c)` is the least time until class c is in memory: the cheapest kernel (or library call) for c, in which any
value below c may be a leaf at its own price.  Prices are computed lazily: an unpriced value enters an extraction at
its lower bound, and is solved only if the cheapest derivation wants it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mugraph.search.cost import STAGES, Prediction, predict
from mugraph.search.extract import (
    COMPUTED_TILE,
    LOADED_TILE,
    Derivation,
    KernelSearch,
    Problem,
    Roles,
    work_of,
)  # fmt: skip
from mugraph.search.library import LibraryCall, library_calls, operands
from mugraph.search.space import SearchSpace

KEPT = 6  # derivations per kernel that the full model ranks
WHOLE = 128  # a shorter axis is whole in the tile at first
SPLIT_MARGIN = 1.15  # the model is no surer than this, so a split must promise more for its second launch
SLACK = 2.0  # additive costs that far above the best are not ranked


@dataclass(frozen=True)
class Choice:
    """One launch: a derivation, or a library call.  `needs` are classes that must be in memory first."""

    roots: tuple[int, ...]
    how: Derivation | LibraryCall
    prediction: Prediction
    needs: tuple[int, ...]


class Partition:
    def __init__(self, problem: Problem, space: SearchSpace, stop: Callable[[], bool] = lambda: False) -> None:
        self.p, self.space, self.stop = problem, space, stop
        self.choices: dict[tuple[int, ...], list[Choice]] = {}
        self._batch: dict[tuple[int, ...], frozenset[str]] = {}
        self.configurations = self.entries = 0
        self.seconds = 0.0

    # -- prices

    def solve(self, roots: tuple[int, ...]) -> list[Choice]:
        """The kernels for these roots, cheapest first (all that they need included in the order).  A single root gets
        its price.  Empty if no kernel computes them."""
        if roots in self.choices:
            return self.choices[roots]
        while True:
            found = self.library(roots) + self.kernels(roots)
            found.sort(key=self.rank)
            unpriced = [c for c in found[0].needs if c not in self.p.memory] if found else []
            for c in unpriced:
                self.solve((c,))
            if not unpriced or self.stop():
                break
        found = [f for f in found if all(self.p.memory.get(c, math.inf) < math.inf for c in f.needs)]
        self.choices[roots] = found
        if len(roots) == 1:
            self.p.memory[roots[0]] = self.total(found[0]) if found else math.inf
            self.p.bound.pop(roots[0], None)
        return found

    def rank(self, choice: Choice) -> float:
        split = isinstance(choice.how, Derivation) and choice.how.roles.split is not None
        return self.total(choice) * (SPLIT_MARGIN if split else 1.0)

    def total(self, choice: Choice) -> float:
        """Seconds of the launch and of all that it needs."""
        return choice.prediction.seconds + sum(self.p.memory.get(c, self.p.bound.get(c, 0.0)) for c in choice.needs)

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

    def kernels(self, roots: tuple[int, ...]) -> list[Choice]:
        """The best derivations over all roles, ranked by the full model at their best tiles."""
        alone = self.derivations(roots, alone=True)
        found = [c for c in map(self.ranked, alone) if c is not None]
        if self.space.kernels > 1 or self.space.library:
            found += [c for c in map(self.ranked, self.derivations(roots, alone=False)) if c is not None and c.needs]
        return found

    def derivations(self, roots: tuple[int, ...], alone: bool) -> list[Derivation]:
        """The cheapest few derivations by additive cost."""
        found: list[Derivation] = []
        upper = math.inf
        for shrink in (1, 4, 16, 64):
            for roles in self.roles(roots, WHOLE if shrink == 1 else 1):
                if self.stop() or self.entries >= self.space.entries:
                    break
                self.configurations += 1
                tiles = self.default_tiles(roots, roles, shrink)
                kernel = KernelSearch(self.p, roots, roles, tiles, alone)
                self.entries += len(kernel.order)
                d = kernel.run(upper)
                if d is not None:
                    found.append(d)
                    upper = min(upper, d.cost * SLACK)
            if found or self.stop():
                break
        found.sort(key=lambda d: d.cost)
        return found[:KEPT]

    def roles(self, roots: tuple[int, ...], least: int) -> Iterator[Roles]:
        """All assignments of roles, in a fixed order.  Axes no longer than `least` are not looped over."""
        p = self.p
        shared = set.intersection(*(set(p.axes(r)) for r in roots))
        free = [a for a in p.axes(roots[0]) if a in shared and p.limits[a] > 1]
        below = frozenset().union(*(p.below[r] for r in roots))
        closed = sorted({a for c in below for e in p.closure.classes[c].edges for a in e.axes if p.limits[a] > least})
        sequences: list[tuple[str, ...]] = [()]
        for n in range(1, self.space.passes + 1):
            sequences += itertools.product(closed, repeat=n)
        for count in range(len(free), -1, -1):
            for grid in itertools.combinations(free, count):
                for passes in sequences:
                    if set(passes) & set(grid):
                        continue
                    yield Roles(grid, passes)
                    if self.space.split and len(passes) == 1:
                        for parts in self.split_counts(roots, grid, passes[0]):
                            yield Roles(grid, passes, (passes[0], parts))

    def split_counts(self, roots: tuple[int, ...], grid: tuple[str, ...], axis: str) -> list[int]:
        """Powers of two that bring the blocks near one or two per SM, with at least two tiles in each part."""
        roles = Roles(grid, (axis,))
        tiles = self.default_tiles(roots, roles, 1)
        blocks = math.prod(math.ceil(self.p.sizes[a] / tiles[a]) for a in grid)
        most = self.p.sizes[axis] // (2 * tiles[axis])
        wanted = [self.p.device.sms / blocks, 2 * self.p.device.sms / blocks]
        counts = {min(2 ** round(math.log2(w)), 2 ** int(math.log2(most))) for w in wanted if w >= 2 and most >= 2}
        return sorted(c for c in counts if c >= 2)

    def default_tiles(self, roots: tuple[int, ...], roles: Roles, shrink: int) -> dict[str, int]:
        """Where the extraction starts; the full model moves them."""
        fixed, batch = dict(self.space.tiles), self.batch_axes(roots)
        tiles = {}
        for a in (*roles.grid, *roles.passes):
            whole = power_of_two(self.p.sizes[a])
            size = min(64, whole) if a in roles.passes else 1 if a in batch else max(1, min(64, whole) // shrink)
            tiles[a] = min(fixed.get(a, size), whole)
        return tiles

    def batch_axes(self, roots: tuple[int, ...]) -> frozenset[str]:
        """Axes that no matmul below the roots has on one side only: their tile is 1."""
        if roots not in self._batch:
            p = self.p
            below = frozenset().union(*(p.below[r] for r in roots))
            one_sided: set[str] = set()
            for way in (w for c in below for w in p.ways[c] if w.matmul):
                a, b = (set(p.axes(x)) for x in way.edge.children)
                one_sided |= a ^ b
            self._batch[roots] = frozenset(a for c in below for a in p.axes(c) if a not in one_sided)
        return self._batch[roots]

    # -- tiles

    def ranked(self, d: Derivation) -> Choice | None:
        """The derivation at the tile sizes that the full model likes best (coordinate descent), or None if no tile
        fits the device."""
        fixed = {a for a, _ in self.space.tiles}
        best = dict(d.tiles)
        excess, seconds = self.fit(replace(d, tiles=tuple(sorted(best.items()))))
        improved = True
        while improved:
            improved = False
            for axis in sorted(best):
                for tile in (best[axis] * 2, best[axis] // 2):
                    if axis in fixed or not 1 <= tile <= min(256, power_of_two(self.p.sizes[axis])):
                        continue
                    trial = {**best, axis: tile}
                    score = self.fit(replace(d, tiles=tuple(sorted(trial.items()))))
                    if score < (excess, seconds * (1 - 1e-9)):
                        best, (excess, seconds), improved = trial, score, True
        if excess > 0:
            return None
        d = replace(d, tiles=tuple(sorted(best.items())))
        needs = tuple(sorted({s.entry[0] for s in d.loads() if not self.is_input(s.entry[0])}))
        return Choice(d.roots, d, predict(work_of(self.p, d), self.p.device), needs)

    def fit(self, d: Derivation) -> tuple[float, float]:
        """(how far the tiles exceed the device, predicted seconds)."""
        p, tiles = self.p, dict(d.tiles)
        work = work_of(p, d)
        excess = 0.0
        for s in d.steps:
            if s.option.edge is not None and not s.option.edge.children:
                continue
            elements = math.prod(tiles.get(a, p.limits[a]) for a in p.axes(s.entry[0]))
            excess += max(0.0, elements - (LOADED_TILE if s.option.edge is None else COMPUTED_TILE))
        excess += max(0.0, STAGES * work.stage + work.resident - p.device.shared_bytes_per_block)
        excess += max(0.0, work.accumulators - COMPUTED_TILE)
        return excess, predict(work, p.device).seconds


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def partition(
    problem: Problem, space: SearchSpace, groups: tuple[tuple[int, ...], ...], stop: Callable[[], bool]
) -> tuple[list[list[Choice]], Partition]:
    """Complete plans, cheapest first: each a list of launches that together compute the targets, group by group.  When
    told to stop, the best so far."""
    run = Partition(problem, space, stop)
    started = time.perf_counter()
    plans = _plans(run, groups)
    run.seconds = time.perf_counter() - started
    return plans, run


def _plans(run: Partition, groups: tuple[tuple[int, ...], ...]) -> list[list[Choice]]:
    """The cheapest plan of every group together, then the second of those that have one, and so on."""

    def cost(plan: list[Choice]) -> float:
        return sum(run.rank(replace(c, needs=())) for c in _with_needs(run, plan))

    ways = [sorted(_ways(run, targets), key=cost) for targets in groups]
    most = max(map(len, ways), default=0) if all(ways) else 0
    plans = [[c for way in ways for c in way[min(n, len(way) - 1)]] for n in range(most)]
    return sorted((_with_needs(run, plan) for plan in plans), key=cost)


def _ways(run: Partition, targets: tuple[int, ...]) -> list[list[Choice]]:
    """One kernel for all of them, or one launch for each."""
    ways = [[c] for c in run.solve(targets)]
    if len(targets) > 1:
        single = [run.solve((t,)) for t in targets]
        if all(single):
            ways.append([options[0] for options in single])
    return ways


def _with_needs(run: Partition, plan: list[Choice]) -> list[Choice]:
    """The plan with the launches that materialise what it needs, in order, each once."""
    ordered: list[Choice] = []
    done: set[int] = set()

    def visit(choice: Choice) -> None:
        for c in choice.needs:
            if c not in done and (options := run.choices.get((c,))):
                visit(options[0])
        if choice not in ordered:
            ordered.append(choice)
            done.update(choice.roots)

    for choice in plan:
        visit(choice)
    return ordered
