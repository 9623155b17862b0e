"""The cheapest derivation of one kernel under one assignment of roles: A* over cuts.

A state is the set of open entries, as bits in topological order; the highest is expanded, so each entry is paid once
and sharing is exact.  A value outside loops is needed once, before the earliest pass that asks for it.

Two lower bounds guide the search.  The cheap one pays the longest of the cheapest paths below an open entry, and every
class that each derivation of an open entry holds.  Searches that remain hard get landmarks.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from typing import NamedTuple

from mugraph.search.extract import (
    INFEASIBLE,
    Assignment,
    Derivation,
    Entry,
    Option,
    Priced,
    Problem,
    Roles,
    Step,
    Survey,
    intersection,
    union,
)  # fmt: skip

SHARE, LEAST = 24, 128  # one extraction may use that part of the budget of states, or as many
BEAM = 2  # states kept per topological level when A* exceeds its budget
EASY = 48  # states after which A* begins again with landmarks, and with a tolerance
SAVED = 0.1  # of the cost of one pass, at least, by a second over the same axes that is hard to find
TOLERANCE = 1e-3  # of a cost, which is less than the model is sure of
MOST_CUTS = 64
NEGLIGIBLE = 1e-4  # of the cost, below which no more cuts are sought

Trail = tuple[object, ...]  # the moves to a state: those before the last, its entry, the last


class Move(NamedTuple):
    """One way to get an entry, the `place`-th: the option, its operands as entries and as bits, and what is still to be
    paid for them."""

    place: int
    option: Option
    children: tuple[Entry, ...]
    bits: int
    closed: tuple[int, ...]  # where the bits of each operand begin that lies outside loops
    unpaid: Unpaid


class Unpaid(NamedTuple):
    """Of some entries: the classes that every derivation of them holds, as bits, and the longest of their cheapest
    paths."""

    classes: int
    chain: float


class _Exhausted(Exception):
    """A* came to the end of its states."""


class KernelSearch:
    """The cheapest derivation under assignment `n` of an outcome."""

    def __init__(self, outcome: Priced, n: int) -> None:
        s = outcome.survey
        self.p, self.roots, self.order = s.p, s.roots, s.order
        self.roles, self.tiles = s.assignments[n].roles, s.assignments[n].tiles
        self.last = len(self.roles.passes)
        self.stride = self.last + 2
        self.open, self.least, self.local, self.chain = outcome.column(n)
        self.starts = {r: int(at[n]) for r, at in outcome.starts.items()}
        self.mandatory = outcome.mandatory
        self._ways = outcome.ways(n)
        self._options: dict[int, list[Option]] = {}
        self._moves: dict[Entry, list[Move]] = {}
        self._paid: dict[int, float] = {}

    def options(self, c: int) -> list[Option]:
        """The feasible ways to get a class, without those that a cheaper one makes useless."""
        if c not in self._options:
            self._options[c] = undominated(self.all_options(c))
        return self._options[c]

    def all_options(self, c: int) -> list[Option]:
        found, loops = [], self.roles.loops
        for seconds, way in self._ways(c):
            if way is None:
                found.append(Option(seconds, None, (), None))
            else:
                edge = way.edge
                closed = tuple([a for a in edge.axes if a in loops]) if edge.axes else ()
                found.append(Option(seconds, edge, edge.children, closed or None))
        return found

    def start(self) -> frozenset[Entry] | None:
        """The roots as entries, or None if some root cannot be computed under these roles."""
        if any(at >= INFEASIBLE for at in self.starts.values()):
            return None
        return frozenset(self.starts.items())

    # -- states

    def bit(self, entry: Entry) -> int:
        return self.p.position[entry[0]] * self.stride + entry[1]

    def encoded(self, state: Iterable[Entry]) -> int:
        return sum(1 << self.bit(entry) for entry in state)

    def entry(self, bit: int) -> Entry:
        place, at = divmod(bit, self.stride)
        return self.p.closure.order[place], at

    def moves(self, entry: Entry) -> list[Move]:
        """The options of an entry, in each place that their operands may have."""
        found = self._moves.get(entry)
        if found is None:
            found = self._moves[entry] = []
            for option in self.options(entry[0]):
                for at in self._placements(entry, option):
                    found.append(self._move(len(found), option, at))
        return found

    def _move(self, place: int, option: Option, at: int) -> Move:
        position, stride, held, opened = self.p.position, self.stride, self._held, self.open
        bits, must, longest = 0, 0, 0.0
        closed = []  # operands outside loops, which states hold once
        for c in option.children:
            base = position[c] * stride
            bits |= 1 << base + at
            classes, chain = held[position[c]]
            must |= classes
            if chain > longest:
                longest = chain
            if not opened[c] and self.last:
                closed.append(base)
        children = tuple([(c, at) for c in option.children])
        return Move(place, option, children, bits, tuple(closed), Unpaid(must, longest))

    def _placements(self, entry: Entry, option: Option) -> list[int]:
        """The passes in which the children may be computed."""
        c, at = entry
        need = max([self.least[x] for x in option.children], default=0)
        if self.open[c] or option.loop is None:  # open children in the same pass, others before it
            return [at] if need <= at else []
        return [
            q
            for q, loop in enumerate(self.roles.passes[: at - 1], 1)
            if need <= q
            and set(loop) == set(option.loop)
            and (q == self.last or not self.roles.split or self.roles.split[0] not in loop)
        ]

    def successors(self, state: int) -> list[tuple[Move, int]]:
        highest = state.bit_length() - 1
        rest = state ^ 1 << highest
        one_class = (1 << self.stride) - 1
        found = []
        for move in self.moves(self.entry(highest)):
            successor = rest | move.bits
            for base in move.closed:
                later = successor >> base & one_class
                if later & later - 1:
                    successor ^= (later & later - 1) << base  # the earliest pass remains
            found.append((move, successor))
        return found

    def bound(self, state: int) -> float:
        """No completion of a state costs less than this."""
        classes, chain = self.unpaid(state)
        return max(chain, self.paid(classes))

    def unpaid(self, state: int) -> Unpaid:
        held, stride = self._held, self.stride
        must, longest = 0, 0.0
        while state:
            place = (state.bit_length() - 1) // stride
            state &= (1 << place * stride) - 1
            classes, chain = held[place]
            must |= classes
            if chain > longest:
                longest = chain
        return Unpaid(must, longest)

    def paid(self, classes: int) -> float:
        """What classes cost at least.  All that each derivation of open entries holds is still to be paid: the highest
        go first."""
        paid = self._paid.get(classes)
        if paid is None:
            local, rest, each = self._local, classes, []
            while rest:
                low = rest & -rest
                each.append(local[low.bit_length() - 1])
                rest ^= low
            paid = self._paid[classes] = math.fsum(each)
        return paid

    @cached_property
    def _held(self) -> dict[int, tuple[int, float]]:
        """By place in topological order: the classes that every derivation of a class holds, and its cheapest path."""
        computed, below = self.mandatory
        position = self.p.position
        return {position[c]: (computed[c] if c in self.starts else below[c], self.chain[c]) for c in self.order}

    @cached_property
    def _local(self) -> dict[int, float]:
        return {self.p.position[c]: self.local[c] for c in self.order}

    # -- extraction

    def run(self, upper: float, once: Callable[[], Derivation | None] = lambda: None) -> Derivation | None:
        """The cheapest derivation with cost below `upper`; None if there is none, or if it leaves a loop empty.

        Several passes over the same axes are taken for one first: nothing costs less, and mostly one will do for what
        comes out.  What is hard to find is sought only if it saves enough of what `once` finds, with one pass."""
        if self.start() is None:
            self.p.infeasible += 1
            return None
        if self.last < 2 or len(set(self.roles.passes)) > 1:
            return self.filled(self.extract(upper))

        @cache
        def worth_it() -> float:
            found = once()
            return found.cost * (1 - SAVED) if found else upper

        merged = Merged(self).extract(upper, worth_it)
        if merged is None or self.one_will_do(merged):
            return None
        return self.filled(self.extract(upper, worth_it))

    def filled(self, found: Derivation | None) -> Derivation | None:
        """A derivation that closes its split axis and leaves no loop empty, or None."""
        if found is None:
            return None
        closed = {a for s in found.steps if s.option.edge for a in s.option.edge.axes}
        if self.roles.split and self.roles.split[0] not in closed:
            return None
        used = {s.entry[1] for s in found.steps if self.open[s.entry[0]]}
        return found if used.issuperset(range(1, self.last + 1)) else None

    def extract(self, upper: float, worth_it: Callable[[], float] | None = None) -> Derivation | None:
        """The cheapest derivation with cost below `upper`, or None.  Hard searches begin again with landmarks and below
        what is worth it; then with costs that differ by less than TOLERANCE taken for equal; beyond the budget, a
        beam."""
        p = self.p
        start, landmarks = self.encoded(self.starts.items()), None
        for most, tolerance in ((EASY, 0.0), (max(LEAST, p.states // SHARE), TOLERANCE)):
            try:
                return self.cheapest(start, upper, landmarks, min(most, p.states - p.expanded), tolerance)
            except _Exhausted:
                upper = min(upper, worth_it()) if worth_it else upper
                landmarks = landmarks or Landmarks(self, upper)
        p.truncated += 1
        found = self.beam(start)
        return found if found and found.cost < upper else None

    def cheapest(
        self, start: int, upper: float, landmarks: Landmarks | None, most: int, tolerance: float
    ) -> Derivation | None:
        """A* over states.  Raises _Exhausted after `most` of them."""
        p, tickets = self.p, itertools.count()
        best = {start: 0.0}
        # rank, highest entry, ticket, cost, state, landmarks that are left, trail
        queue: list[tuple[float, int, int, float, int, int, Trail]] = []
        bound, all_left = self.bound(start), 0
        if landmarks is not None:
            bound, all_left = max(bound, landmarks.seconds(landmarks.all)), landmarks.all
        expanded, bounded = 0, int(bound >= upper)
        if not bounded:
            queue.append((bound, start.bit_length(), next(tickets), 0.0, start, all_left, ()))
        while queue:
            _, length, _, cost, state, unmet, trail = heapq.heappop(queue)
            if cost > best[state]:
                continue
            if not state:
                return self.derivation(cost, trail)
            if expanded >= most:
                raise _Exhausted
            expanded += 1
            p.expanded += 1
            highest = self.entry(length - 1)
            others, chain = self.unpaid(state ^ 1 << length - 1)
            paid = self.paid(others)
            for move, successor in self.successors(state):
                total = cost + move.option.cost
                if total >= best.get(successor, math.inf):
                    continue
                best[successor] = total
                p.generated += 1
                # an operand that the state has already, at another pass, is in both
                classes, deepest = move.unpaid
                rest = paid + self.paid(classes & ~others)
                if rest < chain:
                    rest = chain
                if rest < deepest:
                    rest = deepest
                left = 0
                if landmarks is not None:
                    left = landmarks.left(unmet, highest, move)
                    rest = max(rest, landmarks.seconds(left))
                f = rank = total + rest
                if f >= upper:
                    bounded = 1
                    continue
                if tolerance and f > 0:
                    rank = math.ceil(math.log(f) / tolerance)
                further = (trail, highest, move)
                heapq.heappush(queue, (rank, successor.bit_length(), next(tickets), total, successor, left, further))
        p.bounded += bounded
        p.infeasible += 1 - bounded
        return None

    def one_will_do(self, merged: Derivation) -> bool:
        """Whether no value over the loop needs another that it closes."""
        after = set[int]()
        for step in reversed(merged.steps):
            c = step.entry[0]
            if not after.isdisjoint(step.option.children):
                if self.open[c]:
                    return False
                after.add(c)
            elif step.option.loop and not self.open[c]:
                after.add(c)
        return True

    def derivation(self, cost: float, trail: Trail) -> Derivation:
        steps: list[Step] = []
        while trail:
            trail, entry, move = trail  # type: ignore[assignment]
            steps.append(Step(entry, move.option, move.children))  # type: ignore[attr-defined, arg-type]
        return Derivation(self.roots, self.roles, tuple(sorted(self.tiles.items())), tuple(steps[::-1]), cost)

    def beam(self, start: int) -> Derivation | None:
        """What A* does, a topological level at a time, keeping the BEAM most promising states of each level."""
        levels: dict[int, dict[int, tuple[float, Trail]]] = {start.bit_length(): {start: (0.0, ())}}
        while top := max(levels):
            kept = sorted(levels.pop(top).items(), key=lambda item: item[1][0] + self.bound(item[0]))[:BEAM]
            for state, (cost, trail) in kept:
                self.p.expanded += 1
                highest = self.entry(top - 1)
                for move, successor in self.successors(state):
                    total = cost + move.option.cost
                    there = levels.setdefault(successor.bit_length(), {})
                    if successor not in there or total < there[successor][0]:
                        there[successor] = (total, (trail, highest, move))
            if not levels:
                return None
        cost, trail = levels[0][0]
        return self.derivation(cost, trail)


class Merged(KernelSearch):
    """The search with all passes taken for one, in which each value is paid once, and is there whenever it is needed:
    no derivation costs less."""

    def __init__(self, search: KernelSearch) -> None:
        vars(self).update(vars(search), last=0, stride=1, starts=dict.fromkeys(search.starts, 0), _moves={})

    def _placements(self, entry: Entry, option: Option) -> list[int]:
        return [0]


class Landmarks:
    """Sets of moves of which every derivation takes at least one, with seconds that add up: a lower bound near the
    cost itself.  Of a state, those count that no move on the way to it has met.

    Source: LM-cut, Helmert and Domshlak, Landmarks, Critical Paths and Abstractions (ICAPS 2009), section 4.  Entries
    are facts, moves are actions, and a derivation that pays each entry once is a plan without deletes.
    """

    def __init__(self, search: KernelSearch, upper: float) -> None:
        """Enough of them to exceed `upper`, or as many as are worth their time."""
        self.search = search
        self._earliest: dict[Entry, Entry] = {}
        self.cost = [0.0]  # by move; the first: a closed value is there later too
        self.ways: dict[Entry, list[tuple[int, tuple[Entry, ...]]]] = {}  # entry -> moves and their operands
        self.start = [self.earliest(entry) for entry in search.starts.items()]
        waiting = list(self.start)
        while waiting:
            entry = waiting.pop()
            if entry not in self.ways:
                self.ways[entry] = self._ways(entry)
                waiting += (x for _, below in self.ways[entry] for x in below)
        self.order = sorted(self.ways, key=search.bit)
        number = {entry: n for n, entry in enumerate(self.order)}
        self._below = [[(m, [number[x] for x in below]) for m, below in self.ways[entry]] for entry in self.order]
        self._roots = [number[entry] for entry in self.start]
        self._users: list[list[int]] = [[] for _ in self.order]
        self._owner = [0] * len(self.cost)
        for n, ways in enumerate(self._below):
            for m, below in ways:
                self._owner[m] = n
                for x in below:
                    self._users[x].append(n)
        self._chain = [math.inf] * len(self.order)  # of each entry, its cheapest path at the costs that are left
        self._stale = bytearray(b"\1") * len(self.order)
        self.meets = [0] * len(self.cost)
        self.gains: list[float] = []
        self._mandatory()
        least = sum(search.chain[r] for r in search.starts) * NEGLIGIBLE
        cuts = 0
        while cuts < MOST_CUTS and sum(self.gains) < upper and (cut := self._cut(least)):
            self._gain(cut)
            cuts += 1
        self.all = (1 << len(self.gains)) - 1
        self._seconds: dict[int, float] = {}

    def _ways(self, entry: Entry) -> list[tuple[int, tuple[Entry, ...]]]:
        c, at = entry
        found = []
        for move in self.search.moves(entry):
            found.append((len(self.cost), tuple(map(self.earliest, move.children))))
            self.cost.append(move.option.cost)
        if not self.search.open[c] and self.search.least[c] < at:
            found.append((0, (self.earliest((c, at - 1)),)))
        return found

    def earliest(self, entry: Entry) -> Entry:
        """A closed value at the earliest pass where it can be had in the same ways."""
        found = self._earliest.get(entry)
        if found is None:
            c, at = found = entry
            if not self.search.open[c] and self.search.least[c] < at and self._alike(entry, (c, at - 1)):
                found = self.earliest((c, at - 1))
            self._earliest[entry] = found
        return found

    def _alike(self, a: Entry, b: Entry) -> bool:
        x, y = self.search.moves(a), self.search.moves(b)
        return len(x) == len(y) and all(
            m.option is n.option and list(map(self.earliest, m.children)) == list(map(self.earliest, n.children))
            for m, n in zip(x, y, strict=True)
        )

    def _mandatory(self) -> None:
        """All moves of an entry that every derivation holds; all of a class that is held at some pass or other."""
        held: list[int] = []
        every = (1 << len(self.order)) - 1  # of an entry that has no move: it is in no derivation
        for n, ways in enumerate(self._below):
            held.append(
                (intersection([union(held[x] for x in below) for _, below in ways]) if ways else every) | 1 << n
            )
        must = union(held[n] for n in self._roots)
        for n, ways in enumerate(self._below):
            if must >> n & 1:
                self._gain([m for m, _ in ways])
        computed, position = self.search.mandatory.computed, self.search.p.position
        must = union(computed[r] for r in self.search.starts)
        for c, entries in itertools.groupby(self.order, key=lambda entry: entry[0]):
            if must >> position[c] & 1:
                self._gain([m for entry in entries for m, _ in self.ways[entry] if m])

    def _gain(self, moves: list[int]) -> None:
        """A landmark: every derivation takes one of the moves."""
        gain = min(self.cost[m] for m in moves)
        if gain <= 0:
            return
        for m in moves:
            self.cost[m] -= gain
            self.meets[m] |= 1 << len(self.gains)
            self._stale[self._owner[m]] = 1
        self.gains.append(gain)

    def _cut(self, least: float) -> list[int]:
        """The moves that lead into the zone from which free moves reach the dearest root; none if it is free."""
        cost, chain, stale = self.cost, self._chain, self._stale
        entry = stale.find(1)
        while entry >= 0:
            stale[entry] = 0
            found = math.inf
            for m, below in self._below[entry]:
                dearest = cost[m]
                if below:
                    dearest += max([chain[x] for x in below])
                if dearest < found:
                    found = dearest
            if found != chain[entry]:
                chain[entry] = found
                for user in self._users[entry]:
                    stale[user] = 1
            entry = stale.find(1, entry)
        top = max(self._roots, key=chain.__getitem__)
        if chain[top] <= least:
            return []
        zone = {top}
        border: list[tuple[int, int]] = []
        for entry in range(top, -1, -1):
            if entry not in zone:
                continue
            for m, below in self._below[entry]:
                supporter = max(below, key=chain.__getitem__) if below else -1
                if below and chain[supporter] == math.inf:
                    continue
                if below and cost[m] <= least:
                    zone.add(supporter)
                else:
                    border.append((m, supporter))
        return [m for m, supporter in border if supporter not in zone]

    def left(self, unmet: int, entry: Entry, move: Move) -> int:
        """The landmarks that are left to meet after a move."""
        number, _ = self.ways[self.earliest(entry)][move.place]
        return unmet & ~self.meets[number]

    def seconds(self, unmet: int) -> float:
        found = self._seconds.get(unmet)
        if found is None:
            found = self._seconds[unmet] = math.fsum(self.gains[i] for i in bits(unmet))
        return found


def kernel_search(
    problem: Problem, roots: tuple[int, ...], roles: Roles, tiles: Mapping[str, int], alone: bool = False
) -> KernelSearch:
    """The search for one assignment of roles.  `alone`: the kernel loads inputs only."""
    return KernelSearch(Survey(problem, roots, [Assignment(roles, tiles)]).outcome(alone), 0)


def undominated(options: list[Option]) -> list[Option]:
    """Without options that need at least the children of a cheaper one that closes the same axis."""
    if len(options) < 2:
        return options
    kept: list[Option] = []
    for o in sorted(options, key=lambda o: (o.cost, len(o.children))):
        if not any(k.loop == o.loop and k.edge is not None and set(k.children) <= set(o.children) for k in kept):
            kept.append(o)
    return kept


def bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
