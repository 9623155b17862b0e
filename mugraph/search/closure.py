"""The closure: every value that can occur in a program equal to the target by the laws, and how each is computed.

Starting from the seeds, each value is decomposed top-down; the parts are looked up by fingerprint, so that equal
values meet in one class.  One decomposition is one edge `class <- op(children)` of an acyclic AND-OR graph.  Rules,
for a term Σ_b Π F (numbers as in docs/design.md, "Search"):

    a  split F in two, contracting over the bound axes that both sides share
    b  close one axis of a single factor
    c  distribute a sum factor where that frees a term of some bound axis
    d  factor a common factor out of a sum
    e  arguments of functions
    f  the coefficient once
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mugraph.search import values as v
from mugraph.search.values import Call, Factor, Fingerprinter, Key, Load, Number, Paren, Term, Token, Value

MOST_ALIKE = 4  # factors with the same indices of which each is split off in turn; of more, the last one

EdgeKind = Literal["load", "number", "product", "sum", "add", "call", "reduce"]


class Edge(NamedTuple):
    """One way to compute a class.  `product` and `sum` close `axes`; so does `reduce` (max or min)."""

    kind: EdgeKind
    children: tuple[int, ...]
    axes: tuple[str, ...] = ()
    fn: str = ""
    attrs: tuple[object, ...] = ()
    leaf: Load | Number | None = None

    @property
    def closes(self) -> bool:
        return bool(self.axes)


@dataclass
class Class:
    """A value: its first expression, its free axes, and the edges that compute it (in order of discovery)."""

    value: Value
    axes: tuple[str, ...]
    edges: dict[Edge, str] = field(default_factory=dict)  # edge -> rule


class Split(NamedTuple):
    """A split that is neither index-closed nor holder-closed: it counts only if both sides exist anyway."""

    owner: int
    term: Term
    left: tuple[int, ...]


@dataclass
class Closure:
    """The class graph.  `order` lists classes children first."""

    classes: list[Class]
    order: list[int]
    rules: Counter[str]
    deduplicated: int
    expressions: int
    truncated: bool

    def axes(self, c: int) -> tuple[str, ...]:
        return self.classes[c].axes


class Builder:
    def __init__(self, fingerprinter: Fingerprinter, budget: int, stop: Callable[[], bool] = lambda: False) -> None:
        self.prints, self.budget, self.stop = fingerprinter, budget, stop
        self.classes: list[Class] = []
        self.by_print: dict[tuple[tuple[str, ...], bytes], int] = {}
        self.by_key: dict[object, int] = {}
        self.work: deque[tuple[int, Value]] = deque()
        self.shared: list[Split] = []
        self.alike: list[tuple[int, Term]] = []
        self.rules: Counter[str] = Counter()
        self.deduplicated = 0
        self.truncated = False
        self.weight = 0

    # -- classes and edges

    def plain_key(self, value: Value) -> Key | None:
        """The key with free tokens named by their axes; None if one axis would be free twice."""
        names = {t: t[0] for t in v.free_tokens(value)}
        return v.value_key(value, names) if len(set(names.values())) == len(names) else None

    def plain(self, value: Value) -> Value:
        return v.rename(value, {t: (t[0], 0) for t in v.free_tokens(value)})

    def class_of(self, value: Value) -> int | None:
        syntactic = self.plain_key(value)
        if syntactic is None:
            return None
        known = self.by_key.get(syntactic)
        return self._new_expression(self.plain(value), syntactic) if known is None else known

    def _new_expression(self, value: Value, syntactic: object) -> int:
        axes, bits = fingerprint = self.prints.fingerprint(value)
        del bits
        c = self.by_print.get(fingerprint)
        if c is None:
            c = self.by_print[fingerprint] = len(self.classes)
            self.classes.append(Class(value, axes))
        else:
            self.deduplicated += 1
        self.by_key[syntactic] = c
        self.weight += v.weight(value)
        if self.weight > self.budget:
            self.truncated = True
        else:
            self.work.append((c, value))
        return c

    def existing(self, value: Value) -> int | None:
        syntactic = self.plain_key(value)
        return None if syntactic is None else self.by_key.get(syntactic)

    def edge(self, c: int, rule: str, kind: EdgeKind, children: list[int | None], **fields: object) -> None:
        found = tuple(x for x in children if x is not None)
        if len(found) < len(children) or c in found:
            return
        if kind in ("product", "add"):
            found = tuple(sorted(found))
        new = Edge(kind, found, **fields)  # type: ignore[arg-type]
        if new not in self.classes[c].edges:
            self.classes[c].edges[new] = rule
            self.rules[rule] += 1

    # -- rules

    def run(self) -> None:
        while self.work:
            while self.work and not (len(self.classes) % 16 == 15 and self.stop()):
                c, value = self.work.popleft()
                if len(value) == 1:
                    self.expand_term(c, value[0])
                else:
                    self.expand_sum(c, value)
            if self.work:
                break  # stopped: what is not expanded has no edges
            for s in self.shared:
                self.share(s)
            self.split_alike()

    def expand_sum(self, c: int, value: Value) -> None:
        if len(value) <= 4:
            for size in range(1, len(value) // 2 + 1):
                for chosen in itertools.combinations(range(len(value)), size):
                    if 2 * size == len(value) and 0 not in chosen:
                        continue
                    left = tuple(value[i] for i in chosen)
                    right = tuple(t for i, t in enumerate(value) if i not in chosen)
                    self.edge(c, "add", "add", [self.class_of(left), self.class_of(right)])
        else:
            self.edge(c, "add", "add", [self.class_of((t,)) for t in value])
        for together, rest in factorings(value):
            if rest:
                self.edge(c, "factor", "add", [self.class_of((together,)), self.class_of(tuple(rest))])
            elif self.is_new(c, (together,)):
                self.expand_term(c, together)

    def is_new(self, c: int, value: Value) -> bool:
        """Notes another expression of the class; False if it was there."""
        syntactic = self.plain_key(value)
        if syntactic is None or syntactic in self.by_key:
            return False
        self.by_key[syntactic] = c
        return True

    def expand_term(self, c: int, term: Term) -> None:
        bound, factors = term
        first = factors[0]
        if isinstance(first, Number):
            if len(factors) == 1:
                self.edge(c, "number", "number", [], leaf=first)
            else:
                number = self.class_of((Term(v.NOTHING, (first,)),))
                self.edge(c, "coefficient", "product", [number, self.class_of((Term(bound, factors[1:]),))])
            return
        if len(factors) == 1:
            self.expand_factor(c, bound, first)
        else:
            self.split(c, term)
            self.distribute(c, term)

    def expand_factor(self, c: int, bound: frozenset[Token], f: Factor) -> None:
        if bound:
            for group in self.closing_groups(bound):
                inner = self.class_of((Term(bound - group, (f,)),))
                self.edge(c, "close", "sum", [inner], axes=tuple(sorted(t[0] for t in group)))
            if isinstance(f, Paren):
                self.distribute(c, Term(bound, (f,)))
            return
        match f:
            case Load():
                self.edge(c, "load", "load", [], leaf=f)
            case Call(fn, _, over, (arg,)) if over:
                inner = self.class_of(arg)
                self.edge(c, "close", "reduce", [inner], axes=tuple(sorted(t[0] for t in over)), fn=fn)
            case Call(fn, attrs, _, args):
                self.edge(c, "argument", "call", [self.class_of(a) for a in args], fn=fn, attrs=attrs)
            case Paren(value):
                if self.is_new(c, value):
                    self.work.append((c, value))
            case Number():
                self.edge(c, "number", "number", [], leaf=f)

    def closing_groups(self, bound: frozenset[Token]) -> list[frozenset[Token]]:
        """All bound tokens at once, and each alone: the others are then closed later."""
        return [bound] + ([frozenset([t]) for t in sorted(bound)] if len(bound) > 1 else [])

    def split(self, c: int, term: Term) -> None:
        """Rule a.  Factor 0 stays on the right, so that each partition is seen once."""
        n = len(term.factors)
        tokens = [v.factor_tokens(f) for f in term.factors]
        apart = False
        for mask in range(1, 1 << (n - 1)):
            left = tuple(i for i in range(1, n) if mask >> (i - 1) & 1)
            right = tuple(i for i in range(n) if i not in left)
            if admissible(left, tokens, term.bound) or admissible(right, tokens, term.bound):
                apart |= self.add_split(c, term, left, "split", must_exist=False)
            else:
                self.shared.append(Split(c, term, left))
        if not apart:
            self.alike.append((c, term))

    def split_alike(self) -> None:
        """Factors that indices do not tell apart (x / y, element by element), of which no share is known, are split
        off one at a time."""
        alike, self.alike = self.alike, []
        for c, term in alike:
            n = len(term.factors)
            if not self.classes[c].edges:
                for i in range(n if 2 < n <= MOST_ALIKE else 1):
                    self.add_split(c, term, (n - 1 - i,), "split", must_exist=False)

    def share(self, s: Split) -> None:
        self.add_split(s.owner, s.term, s.left, "share", must_exist=True)

    def add_split(self, c: int, term: Term, left: tuple[int, ...], rule: str, must_exist: bool) -> bool:
        """Adds the edge; False if a side has no class."""
        right = tuple(i for i in range(len(term.factors)) if i not in left)
        held = [frozenset().union(*(v.factor_tokens(term.factors[i]) & term.bound for i in s)) for s in (left, right)]
        both = held[0] & held[1]
        sides = [
            (Term(tokens - both, tuple(term.factors[i] for i in side)),)
            for tokens, side in zip(held, (left, right), strict=True)
        ]
        find = self.existing if must_exist else self.class_of
        children: list[int | None] = []
        for side in sides:
            children.append(find(side))
            if children[-1] is None:
                return False
        self.edge(c, rule, "product", children, axes=tuple(sorted(t[0] for t in both)))
        return True

    def distribute(self, c: int, term: Term) -> None:
        """Rule c."""
        for i, f in enumerate(term.factors):
            if not isinstance(f, Paren) or not worth_distributing(f.value, term.bound):
                continue
            others = term.factors[:i] + term.factors[i + 1 :]
            terms = []
            for t in f.value:
                t = v.freshened(t)
                terms.append(v.freshened(v.normal_term(term.bound | t.bound, others + t.factors)))
            if self.is_new(c, tuple(terms)):
                self.rules["distribute"] += 1
                self.expand_sum(c, tuple(terms))


def admissible(side: tuple[int, ...], tokens: list[frozenset[Token]], bound: frozenset[Token]) -> bool:
    """Index-closed: all factors within the side's tokens are in it.  Holder-closed: each factor holds a token that
    only this side holds."""
    held = frozenset().union(*(tokens[i] for i in side))
    if sum(1 for t in tokens if t <= held) == len(side):
        return True
    inside = set(side)
    closed = [t for t in bound if all(i in inside for i, ts in enumerate(tokens) if t in ts)]
    return all(any(t in tokens[i] for t in closed) for i in side)


def worth_distributing(value: Value, bound: frozenset[Token]) -> bool:
    """Some term, not a mere number, lacks a bound token that the whole sum holds; or some factor of a term lacks one
    and is itself closed over its axis, so that it would need a pass of its own."""
    free = v.free_tokens(value) & bound
    if not free:
        return False
    for t in value:
        if all(isinstance(f, Number) for f in t.factors):
            continue
        if (frozenset().union(*(v.factor_tokens(f) for f in t.factors)) - t.bound) & bound != free:
            return True
        for f in t.factors:
            own = v.factor_tokens(f)
            if not own & t.bound and any(axis in v.closed_axes(f) for axis, _ in free - own):
                return True
    return False


def factorings(value: Value) -> list[tuple[Term, list[Term]]]:
    """Rule d: groups of terms that share a factor, as (factor · (rest of each), terms outside the group).

    Bound tokens of the shared factor are matched, so Σ_k a·x + Σ_k b·x becomes Σ_k (a + b)·x.
    """
    found: list[tuple[Term, list[Term]]] = []
    seen: set[frozenset[tuple[int, int]]] = set()
    for i, term in enumerate(value):
        for at, f in enumerate(term.factors):
            if isinstance(f, Number):
                continue
            group: list[tuple[int, int, dict[Token, Token]]] = [(i, at, {})]
            for j, other in enumerate(value):
                if j == i:
                    continue
                for at2, g in enumerate(other.factors):
                    matching = match_tokens(f, g, term.bound, other.bound)
                    if matching is not None:
                        group.append((j, at2, matching))
                        break
            members = frozenset((j, at2) for j, at2, _ in group)
            if len(group) < 2 or members in seen:
                continue
            seen.add(members)
            shared = v.factor_tokens(f) & term.bound
            quotients = tuple(_quotient(value[j], at2, matching, shared) for j, at2, matching in group)
            rest = [t for j, t in enumerate(value) if j not in {j for j, _, _ in group}]
            found.append((v.normal_term(shared, (f, Paren(quotients))), rest))
    return found


def _quotient(term: Term, at: int, matching: dict[Token, Token], shared: frozenset[Token]) -> Term:
    bound = frozenset(matching.get(t, t) for t in term.bound) - shared
    factors = [v.rename_factor(f, matching) for k, f in enumerate(term.factors) if k != at]
    return v.freshened(v.normal_term(bound, factors))


def match_tokens(
    f: Factor, g: Factor, bound_f: frozenset[Token], bound_g: frozenset[Token]
) -> dict[Token, Token] | None:
    """A map of g's bound tokens to f's that makes the factors equal, or None."""
    if type(f) is not type(g) or isinstance(f, Paren):
        return None
    if isinstance(f, Load) and isinstance(g, Load):
        if f.name != g.name:
            return None
        matching = {b: a for a, b in zip(f.tokens, g.tokens, strict=True) if b in bound_g and a in bound_f}
        return matching if v.rename_factor(g, matching) == f else None
    assert isinstance(f, Call) and isinstance(g, Call)
    if f.body.digest != g.body.digest:
        return None
    for order in f.body.symmetries:
        places = [f.tokens[i] for i in order]
        matching = {b: a for a, b in zip(places, g.tokens, strict=True) if b in bound_g and a in bound_f}
        if v.rename_factor(g, matching) == f:
            return matching
    return None


def close(
    seeds: list[Value], fingerprinter: Fingerprinter, budget: int, stop: Callable[[], bool] = lambda: False
) -> tuple[Closure, list[int]]:
    """The closure of the seeds, and the class of each seed.  `stop` is asked between expansions."""
    builder = Builder(fingerprinter, budget, stop)
    roots = [builder.class_of(s) for s in seeds]
    builder.run()
    found = [r for r in roots if r is not None]
    assert len(found) == len(seeds), "a seed has one axis free twice"
    order = topological(builder.classes, found)
    return (
        Closure(
            builder.classes, order, builder.rules, builder.deduplicated, len(builder.by_key), builder.truncated
        ),
        found,
    )  # fmt: skip


def topological(classes: list[Class], roots: list[int]) -> list[int]:
    """Children before parents.  Edges that would close a cycle (an accident of fingerprints) are removed."""
    state = [0] * len(classes)
    order: list[int] = []
    for root in roots:
        stack: list[tuple[int, bool]] = [(root, False)]
        while stack:
            c, done = stack.pop()
            if done:
                state[c] = 2
                order.append(c)
                continue
            if state[c]:
                continue
            state[c] = 1
            stack.append((c, True))
            stack += [(x, False) for e in classes[c].edges for x in e.children if state[x] == 0]
    position = {c: i for i, c in enumerate(order)}
    for c in order:
        cell = classes[c]
        cell.edges = {e: r for e, r in cell.edges.items() if all(position[x] < position[c] for x in e.children)}
    return order
