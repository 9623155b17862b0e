"""The second engine: values bottom-up, by increasing number of operators.

From the loads, the constants and the sizes of axes, each level applies the program's operators (products with the
closing of shared axes, sums, additions, the functions and reductions that occur) to what the levels below have kept.
A value is kept once, by its fingerprint (observational equivalence), and only if the abstraction lets it through.
Constants fold: they are not multiplied, added or inverted among themselves.

The closure goes down from the target by laws and meets no identity that needs cancellation.  The enumeration knows no
law at all: whatever agrees with a known class is another way to compute it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import assert_never

from mugraph.search import values as v
from mugraph.search.abstraction import Abstraction, AbstractionName, Expression, abstraction
from mugraph.search.closure import Class, Closure, Edge, topological
from mugraph.search.values import Fingerprinter, Load, Number, Point, Print, Term, Value

COMMUTATIVE = {"max", "min", "and", "or"}


@dataclass(frozen=True)
class Alphabet:
    """What the enumeration starts from and applies.

    leaves      loads and constants, as edges
    functions   edges without children, each with its number of operands
    reductions  the kinds of `reduce` (max, min)
    closable    the axes that are summed or reduced somewhere
    """

    leaves: tuple[Edge, ...]
    functions: tuple[tuple[Edge, int], ...]
    reductions: tuple[str, ...]
    closable: frozenset[str]


def alphabet_of(closure: Closure) -> Alphabet:
    """The loads, constants, functions and closed axes of the closure's edges, and the sizes of the closed axes."""
    edges = [e for c in closure.order for e in closure.classes[c].edges]
    closable = frozenset(a for e in edges for a in e.axes)
    leaves = dict.fromkeys(e for e in edges if e.leaf is not None)
    sizes = (Number(v.ONE.coefficient, ((a, 1),)) for a in sorted(closable))
    leaves.update(dict.fromkeys(Edge("number", (), leaf=n) for n in sizes))
    functions = {(e._replace(children=()), len(e.children)): None for e in edges if e.kind == "call"}
    reductions = dict.fromkeys(e.fn for e in edges if e.kind == "reduce")
    return Alphabet(tuple(leaves), tuple(functions), tuple(reductions), closable)


@dataclass(eq=False)
class Kept:
    """A value of the enumeration.  `ways` are the edges that compute it from others, by index, each with the number
    of operators of the whole formula; the first has the fewest and is the one that found it."""

    point: Point
    expression: Expression
    operators: int
    value: Value
    ways: dict[Edge, int] = field(default_factory=dict)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        return tuple(sorted(t[0] for t in self.point.tokens if t != v.SAMPLE))

    @cached_property
    def constant(self) -> bool:
        return all(isinstance(f, Number) for t in self.value for f in t.factors)


@dataclass(frozen=True)
class Enumeration:
    """What an enumeration went through.

    candidates    operators applied; kept, pruned (by the abstraction) and deduplicated (by fingerprint) make them up
    found         target -> candidates when it was met
    stop          Found: all targets; Saturated: the whole space; NodeLimit: the budget; TimeLimit: told to stop
    edges, classes  what `widen` added to a closure
    """

    candidates: int
    kept: int
    pruned: int
    deduplicated: int
    found: Mapping[int, int]
    stop: str
    edges: int = 0
    classes: int = 0

    def __str__(self) -> str:
        return (
            f"{self.stop} after {self.candidates} candidates, {self.kept} kept, {self.pruned} pruned, "
            f"{self.deduplicated} deduplicated; {self.edges} edges and {self.classes} classes added"
        )


class Exhausted(Exception):
    """The enumeration ends; the argument says why."""


class Enumerator:
    """budget: candidates.  targets: fingerprint -> a number to report it by; with `until_found` the enumeration ends
    when it has met them all."""

    def __init__(
        self,
        prints: Fingerprinter,
        alphabet: Alphabet,
        pruning: Abstraction,
        budget: int,
        *,
        targets: Mapping[Print, int] | None = None,
        until_found: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.prints, self.alphabet, self.pruning, self.budget = prints, alphabet, pruning, budget
        self.targets, self.until_found, self.stop = targets or {}, until_found, stop
        self.kept: list[Kept] = []
        self.levels: list[list[int]] = []
        self.by_print: dict[Print, int] = {}
        self.counts: Counter[str] = Counter()
        self.found: dict[int, int] = {}

    def run(self) -> Enumeration:
        reason = "Saturated"
        try:
            for leaf in self.alphabet.leaves:
                self.offer(leaf, 0)
            largest = max((n for _, n in self.alphabet.functions), default=2)
            level = 1
            while level <= max(2, largest) * (len(self.levels) - 1) + 1:
                for edge in self.applications(level):
                    self.offer(edge, level)
                level += 1
        except Exhausted as why:
            reason = str(why)
        counts = self.counts
        return Enumeration(
            counts["candidates"], len(self.kept), counts["pruned"], counts["deduplicated"], self.found, reason
        )

    # -- candidates

    def applications(self, level: int) -> Iterator[Edge]:
        """Every operator on kept values such that the formula has `level` operators."""
        for i in self.at(level - 1):
            yield from self.on_one(i)
        for low in range((level + 1) // 2):
            for i, j in itertools.product(self.at(low), self.at(level - 1 - low)):
                if low < level - 1 - low or i <= j:
                    yield from self.on_two(i, j)
        yield from self.on_more(level)

    def at(self, level: int) -> list[int]:
        return self.levels[level] if level < len(self.levels) else []

    def on_one(self, i: int) -> Iterator[Edge]:
        for axes in subsets(self.alphabet.closable.intersection(self.kept[i].axes)):
            if axes:
                yield Edge("sum", (i,), axes)
                for fn in self.alphabet.reductions:
                    yield Edge("reduce", (i,), axes, fn)
        for function, operands in self.alphabet.functions:
            if operands == 1 and not (function.fn == "inv" and self.kept[i].constant):
                yield function._replace(children=(i,))

    def on_two(self, i: int, j: int) -> Iterator[Edge]:
        if not (self.kept[i].constant and self.kept[j].constant):
            for axes in subsets(self.alphabet.closable.intersection(self.kept[i].axes, self.kept[j].axes)):
                yield Edge("product", (i, j), axes)
            yield Edge("add", (i, j))
        for function, operands in self.alphabet.functions:
            if operands == 2:
                yield function._replace(children=(i, j))
                if i != j and function.fn not in COMMUTATIVE:
                    yield function._replace(children=(j, i))

    def on_more(self, level: int) -> Iterator[Edge]:
        for function, operands in self.alphabet.functions:
            if operands > 2:
                for levels in compositions(level - 1, operands):
                    for children in itertools.product(*(self.at(n) for n in levels)):
                        yield function._replace(children=children)

    def offer(self, edge: Edge, level: int) -> None:
        """One candidate: pruned, met before, or kept."""
        if self.counts["candidates"] >= self.budget:
            raise Exhausted("NodeLimit")
        if self.counts["candidates"] % 64 == 63 and self.stop():
            raise Exhausted("TimeLimit")
        self.counts["candidates"] += 1
        operands = [self.kept[i] for i in edge.children]
        axes = result_axes(edge, [x.axes for x in operands])
        expression = self.pruning.of(edge, [x.expression for x in operands], axes)
        if expression is None:
            self.counts["pruned"] += 1
            return
        point = apply(self.prints, edge, [(x.value, x.point) for x in operands])
        found = v.print_of(point)
        known = self.by_print.get(found)
        if known is not None:
            self.counts["deduplicated"] += 1
            if known not in edge.children:
                self.kept[known].ways.setdefault(edge, level)
        elif not self.pruning.admits(found):
            self.counts["pruned"] += 1
        else:
            self.keep(Kept(point, expression, level, value_of(edge, [x.value for x in operands]), {edge: level}), found)

    def keep(self, new: Kept, found: Print) -> None:
        index = self.by_print[found] = len(self.kept)
        self.kept.append(new)
        self.levels += [[] for _ in range(new.operators + 1 - len(self.levels))]
        self.levels[new.operators].append(index)
        if found in self.targets:
            self.found[self.targets[found]] = self.counts["candidates"]
            if self.until_found and len(self.found) == len(set(self.targets.values())):
                raise Exhausted("Found")


def subsets(axes: Iterable[str]) -> Iterator[tuple[str, ...]]:
    ordered = sorted(axes)
    for n in range(len(ordered) + 1):
        yield from itertools.combinations(ordered, n)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write the total as a sum of that many natural numbers, in order."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield first, *rest


# -- operators


def result_axes(edge: Edge, operands: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The free axes of an operator's result, sorted."""
    held = {t[0] for t in edge.leaf.tokens} if isinstance(edge.leaf, Load) else set[str]().union(*operands)
    return tuple(sorted(held.difference(edge.axes)))


def value_of(edge: Edge, operands: Sequence[Value]) -> Value:
    """The operator's result as a value."""
    match edge.kind:
        case "load" | "number":
            assert edge.leaf is not None
            return (Term(v.NOTHING, (edge.leaf,)),)
        case "product":
            return v.total(v.multiply(*operands), edge.axes)
        case "sum":
            return v.total(operands[0], edge.axes)
        case "add":
            return v.add(*operands)
        case "reduce":
            return v.reduction(edge.fn, operands[0], edge.axes)
        case "call":
            return v.call(edge.fn, *operands, attrs=edge.attrs)
        case _:
            assert_never(edge.kind)


def apply(prints: Fingerprinter, edge: Edge, operands: Sequence[tuple[Value, Point]]) -> Point:
    """The operator's result in the fields."""
    match edge.kind:
        case "product" | "add":
            point = operands[0][1]
            for _, other in operands[1:]:
                point = prints.join(point, other, multiply_them=edge.kind == "product")
        case "sum":
            point = operands[0][1]
        case "load" | "number":
            assert edge.leaf is not None
            return prints.factor(edge.leaf)
        case "call" | "reduce":
            return prints.called(edge.fn, edge.attrs, frozenset((a, 0) for a in edge.axes), [p for _, p in operands])
        case _:
            assert_never(edge.kind)
    for axis in edge.axes:
        point = prints.integral(point, (axis, 0))
    return point


# -- into the closure


def widen(
    closure: Closure,
    prints: Fingerprinter,
    budget: int,
    *,
    targets: Sequence[Value] = (),
    sizes: Mapping[str, int] | None = None,
    pruning: AbstractionName = "closure",
    stop: Callable[[], bool] = lambda: False,
) -> Enumeration:
    """Adds to the closure, in place, what an enumeration of `budget` candidates finds: other ways to compute its
    classes, and the classes that these need.

    A way counts if its formula has no more operators than the shortest that the closure knows, if it holds for other
    random inputs too, and if it closes no cycle.  targets and sizes (axis -> size) are what `pruning="size"` needs.
    """
    known = {prints.fingerprint(closure.classes[c].value): c for c in closure.order}
    enumerator = Enumerator(
        prints, alphabet_of(closure), abstraction(pruning, known, targets, sizes or {}), budget, stop=stop
    )
    report = enumerator.run()
    merge = Merge(closure, prints, enumerator, known)
    merge.run()
    closure.order = topological(closure.classes, closure.order)
    return Enumeration(
        **{**vars(report), "edges": closure.rules["enumerate"], "classes": merge.classes},
    )


def unordered(e: Edge) -> Edge:
    """The edge with its children in ascending order, where their order does not matter."""
    commutes = e.kind in ("product", "add") or e.fn in COMMUTATIVE
    return e._replace(children=tuple(sorted(e.children))) if commutes else e


class Merge:
    """Takes the ways of an enumeration into a closure, without cycles."""

    def __init__(
        self, closure: Closure, prints: Fingerprinter, enumerator: Enumerator, known: Mapping[Print, int]
    ) -> None:
        self.closure, self.kept = closure, enumerator.kept
        self.again = Fingerprinter(prints.base, prints.static, ("again", prints.key), prints.samples)
        self.class_of = {i: known[p] for p, i in enumerator.by_print.items() if p in known}
        self.classes = 0
        self.below: dict[int, set[int]] = {}
        self.least: dict[int, int] = {}
        for c in closure.order:
            self.note(c)

    def note(self, c: int) -> None:
        """What a class is computed from, itself included, and the operators of its shortest formula."""
        edges = self.closure.classes[c].edges
        self.below[c] = {c}.union(*(self.below[x] for e in edges for x in e.children))
        self.least[c] = min((bool(e.children) + sum(self.least[x] for x in e.children) for e in edges), default=0)

    def run(self) -> None:
        indices = {c: i for i, c in self.class_of.items()}
        for c in (c for c in self.closure.order if c in indices):
            for way, operators in self.kept[indices[c]].ways.items():
                if operators <= self.least[c]:
                    self.take(c, way)

    def take(self, c: int, way: Edge) -> None:
        below = set[int]().union(*(self.reach(x) for x in way.children))
        if c in below or not self.holds(c, way):
            return
        edge = self.among_classes(way)
        if any(unordered(edge) == unordered(e) for e in self.closure.classes[c].edges):
            return
        self.add(c, edge)
        below = set[int]().union(*(self.below[x] for x in edge.children))
        for above in self.below.values():
            if c in above:
                above |= below

    def reach(self, i: int) -> set[int]:
        """The classes that a kept value is computed from."""
        if i in self.class_of:
            return self.below[self.class_of[i]]
        return set[int]().union(*(self.reach(x) for x in self.first(i).children))

    def first(self, i: int) -> Edge:
        return next(iter(self.kept[i].ways))

    def holds(self, c: int, way: Edge) -> bool:
        """The way computes the class for other random inputs too."""
        operands = [self.kept[x].value for x in way.children]
        point = apply(self.again, way, [(x, self.again.value(x)) for x in operands])
        return v.print_of(point) == self.again.fingerprint(self.closure.classes[c].value)

    def among_classes(self, way: Edge) -> Edge:
        edge = way._replace(children=tuple(self.ensure(x) for x in way.children))
        return unordered(edge) if way.kind in ("product", "add") else edge

    def ensure(self, i: int) -> int:
        """The class of a kept value, new where the closure has none."""
        known = self.class_of.get(i)
        if known is None:
            edge = self.among_classes(self.first(i))
            known = self.class_of[i] = len(self.closure.classes)
            self.closure.classes.append(Class(self.kept[i].value, self.kept[i].axes))
            self.classes += 1
            self.add(known, edge)
            self.note(known)
        return known

    def add(self, c: int, edge: Edge) -> None:
        self.closure.classes[c].edges[edge] = "enumerate"
        self.closure.rules["enumerate"] += 1
