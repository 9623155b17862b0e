"""The closure: every value that can occur in a program equal to the target by the laws, and how each is computed.

Starting from the seeds, each value is decomposed top-down; the parts are looked up by fingerprint, so that equal
values meet in one class.  One decomposition is one edge `class <- op(children)` of an acyclic AND-OR graph.  Rules,
for a term Σ_b Π F (numbers as in docs/design.md, "Search"):

    a  split F in two, contracting over the bound axes that both sides share
    b  close one axis of a single factor
    c  distribute a sum factor, other than a difference, where that frees a term of some bound axis
    d  factor a common factor out of a sum
    e  arguments of functions
    f  the coefficient once
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from mugraph.search import values as v
from mugraph.search.report import StopReason
from mugraph.search.values import Call, Factor, Fingerprinter, Key, Load, Number, Paren, Term, Token, Value

MOST_ALIKE = 4  # factors with the same indices of which each is split off in turn; of more, the last one
MOST_TERMS = 4  # of a sum that is shared out in all ways; of more, all terms at once and what sums there are
MOST_PAIRS = 1_000_000  # of a sum and a part of it that are looked at
MOST_WORDS = 1 << 23  # 64-bit words that the values of the closure may take: 64 MiB

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


class Factors:
    """The factors of a term as bits, and its tokens as bits: what rule a asks of all their subsets."""

    def __init__(self, term: Term) -> None:
        self.term, self.whole = term, (1 << len(term.factors)) - 1
        tokens = [v.factor_tokens(f) for f in term.factors]
        self.tokens = sorted(frozenset().union(*tokens))
        bit = {t: 1 << i for i, t in enumerate(self.tokens)}
        self.bound = sum(bit[t] for t in term.bound)
        self.held = [sum(bit[t] for t in ts) for ts in tokens]
        self.union = [0]
        for h in self.held:
            self.union += [u | h for u in self.union]
        alike = [[t for t in self.tokens if t[0] == axis] for axis in {t[0] for t in self.tokens}]
        self.alike = [bit[s] | bit[t] for ts in alike for s, t in itertools.combinations(ts, 2)]
        self.plain = {t: t[0] for t in self.tokens}
        self.keys = [v.factor_key(f, self.plain) for f in term.factors]

    def members(self, side: int) -> list[int]:
        return [i for i in range(len(self.held)) if side >> i & 1]

    def own(self, side: int) -> int:
        """The bound tokens that only this side holds."""
        return self.bound & ~self.union[self.whole ^ side]

    def is_closed(self, side: int) -> bool:
        """Index-closed: all factors within the side's tokens are in it.  Holder-closed: each factor holds a bound
        token that only this side holds."""
        union, own, held = self.union[side], self.own(side), self.held
        indices = holders = True
        for i in range(len(held)):
            if side >> i & 1:
                holders = holders and held[i] & own != 0
            else:
                indices = indices and held[i] & ~union != 0
        return indices or holders

    def names(self, side: int) -> tuple[str, ...]:
        """What the factors of a side are, whatever their tokens: equal for equal sides."""
        return tuple(sorted(self.keys[i][0] for i in self.members(side)))

    def key(self, side: int) -> Key | None:
        """The key of a side as a value; None if it has one axis free twice."""
        own = self.own(side)
        free = self.union[side] & ~own
        if any(free & pair == pair for pair in self.alike):
            return None
        if own:
            return v.value_key((self.side(side),), self.plain)
        return (((), tuple(sorted(self.keys[i] for i in self.members(side)))),)

    def side(self, side: int) -> Term:
        own = self.own(side)
        bound = frozenset(t for i, t in enumerate(self.tokens) if own >> i & 1)
        return Term(bound, tuple(self.term.factors[i] for i in self.members(side)))

    def closes(self, side: int) -> tuple[str, ...]:
        """The axes that the product of a side with the others closes."""
        both = self.union[side] & self.union[self.whole ^ side] & self.bound
        return tuple(sorted(t[0] for i, t in enumerate(self.tokens) if both >> i & 1))


Sum = frozenset[tuple[int, int]]  # terms by number, each with how many of the same came before


@dataclass
class Closure:
    """The class graph.  `order` lists classes children first.  limit: the budget that ran out, if one did."""

    classes: list[Class]
    order: list[int]
    rules: Counter[str]
    deduplicated: int
    expressions: int
    limit: StopReason | None = None

    @property
    def truncated(self) -> bool:
        return self.limit is not None

    def axes(self, c: int) -> tuple[str, ...]:
        return self.classes[c].axes


class Builder:
    """budget: factors of all expressions.  When it is spent, or MOST_WORDS are, only what is there is linked, and what
    has no other way to be computed is taken apart one factor at a time: so the program itself is always in the graph.
    differences: whether rule c takes them too.
    """

    def __init__(
        self,
        fingerprinter: Fingerprinter,
        budget: int,
        stop: Callable[[], bool] = lambda: False,
        differences: bool = False,
    ) -> None:
        self.prints, self.budget, self.stop, self.differences = fingerprinter, budget, stop, differences
        self.classes: list[Class] = []
        self.by_print: dict[tuple[tuple[str, ...], bytes], int] = {}
        self.by_key: dict[Key, int] = {}
        self.products: set[tuple[str, ...]] = set()  # what the factors of the products among them are
        self.numbered: dict[Key, int] = {}
        self.sums: dict[Sum, int] = {}
        self.work: deque[tuple[int, Value]] = deque()
        self.shared: list[tuple[int, Factors, list[int]]] = []  # splits that count if both sides exist anyway
        self.alike: list[tuple[int, Factors]] = []
        self.factored: dict[str, tuple[v.Tokens, list[Value]]] = {}
        self.rules: Counter[str] = Counter()
        self.deduplicated = 0
        self.limit: StopReason | None = None
        self.weight = 0

    # -- classes and edges

    def plain_key(self, value: Value) -> Key | None:
        """The key with free tokens named by their axes; None if one axis would be free twice."""
        names = {t: t[0] for t in v.free_tokens(value)}
        return v.value_key(value, names) if len(set(names.values())) == len(names) else None

    def plain(self, value: Value) -> Value:
        return v.rename(value, {t: (t[0], 0) for t in v.free_tokens(value)})

    def class_of(self, value: Value, needed: bool = False) -> int | None:
        return self.class_at(self.plain_key(value), lambda: value, needed)

    def class_at(self, key: Key | None, value: Callable[[], Value], needed: bool = False) -> int | None:
        """The class of the value that has this key, made where there is none; None where there is no key, where the
        value has too many axes, or where a budget is spent and the value is not needed."""
        if key is None:
            return None
        known = self.by_key.get(key)
        if known is not None or (self.limit and not needed):
            return known
        new = value()
        return self._new_expression(self.plain(new), key) if needed or v.width(new) <= v.MOST_AXES else None

    def _new_expression(self, value: Value, key: Key) -> int:
        axes, _ = fingerprint = self.prints.fingerprint(value)
        c = self.by_print.get(fingerprint)
        if c is None:
            c = self.by_print[fingerprint] = len(self.classes)
            self.classes.append(Class(value, axes))
        else:
            self.deduplicated += 1
        self.note(c, value, key)
        self.work.append((c, value))
        return c

    def note(self, c: int, value: Value, key: Key) -> None:
        """Files an expression of the class."""
        self.by_key[key] = c
        if len(value) == 1:
            self.products.add(tuple(sorted(name for name, *_ in key[0][1])))
        else:
            self.sums[self.sum(key)] = c
        self.weight += v.weight(value)
        if self.weight > self.budget:
            self.limit = self.limit or StopReason("NodeLimit", self.budget)
        elif self.prints.words > MOST_WORDS:
            self.limit = self.limit or StopReason("MemoryLimit", MOST_WORDS)

    def sum(self, keys: Iterable[Key]) -> Sum:
        seen: Counter[int] = Counter()
        found = []
        for key in keys:
            number = self.numbered.setdefault(key, len(self.numbered))
            found.append((number, seen[number]))
            seen[number] += 1
        return frozenset(found)

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
        steps = 0
        while self.work:
            while self.work:
                steps += 1
                if steps % 8 == 0 and self.stop():
                    return  # what is not expanded has no edges
                c, value = self.work.popleft()
                if len(value) == 1:
                    self.expand_term(c, value[0])
                else:
                    self.expand_sum(c, value)
            for owner, factors, sides in self.shared:
                for left in sides:
                    self.share(owner, factors, left)
            self.split_alike()
        self.share_sums()

    def expand_sum(self, c: int, value: Value) -> None:
        plain = {t: t[0] for t in v.free_tokens(value)}
        keys = [v.term_key(t, plain) for t in value]
        if len(value) <= MOST_TERMS:
            for size in range(1, len(value) // 2 + 1):
                for chosen in itertools.combinations(range(len(value)), size):
                    if 2 * size == len(value) and 0 not in chosen:
                        continue
                    rest = tuple(i for i in range(len(value)) if i not in chosen)
                    self.edge(c, "add", "add", [self.part(value, keys, chosen), self.part(value, keys, rest)])
        if len(value) > MOST_TERMS or self.limit:
            self.edge(c, "add", "add", [self.part(value, keys, (i,), needed=True) for i in range(len(value))])
        for together, others in [] if self.limit else factorings(value):
            if others:
                self.edge(c, "factor", "add", [self.class_of((together,)), self.class_of(tuple(others))])
            elif self.is_new(c, (together,)):
                self.expand_term(c, together)

    def part(self, value: Value, keys: list[Key], chosen: tuple[int, ...], needed: bool = False) -> int | None:
        """The class of some terms of a sum."""
        return self.class_at(tuple(sorted(keys[i] for i in chosen)), lambda: tuple(value[i] for i in chosen), needed)

    def share_sums(self) -> None:
        """Sums of many terms, as what other sums there are and the rest."""
        known = list(self.sums.items())
        large = [(terms, c) for terms, c in known if len(terms) > MOST_TERMS]
        if len(large) * len(known) > MOST_PAIRS:
            large = []
        single = {number: self.by_key.get((key,)) for key, number in self.numbered.items()}
        for whole, c in large:
            for part, d in known:
                if part < whole:
                    left = sorted(number for number, _ in whole - part)
                    seen: Counter[int] = Counter()
                    for i, number in enumerate(left):
                        seen[number] += 1
                        left[i] = (number, seen[number] - 1)  # type: ignore[call-overload]
                    rest = single[left[0][0]] if len(left) == 1 else self.sums.get(frozenset(left))  # type: ignore[index,arg-type]
                    self.edge(c, "add", "add", [d, rest])

    def is_new(self, c: int, value: Value) -> bool:
        """Notes another expression of the class; False if it was there, or if a budget is spent."""
        key = self.plain_key(value)
        if key is None or key in self.by_key or self.limit or v.width(value) > v.MOST_AXES:
            return False
        self.note(c, value, key)
        return True

    def expand_term(self, c: int, term: Term) -> None:
        bound, factors = term
        first = factors[0]
        if isinstance(first, Number):
            if len(factors) == 1:
                self.edge(c, "number", "number", [], leaf=first)
            else:
                number = self.class_of((Term(v.NOTHING, (first,)),), needed=True)
                rest = self.class_of((Term(bound, factors[1:]),), needed=True)
                self.edge(c, "coefficient", "product", [number, rest])
            return
        if len(factors) == 1:
            self.expand_factor(c, bound, first)
        else:
            self.split(c, term)
            self.distribute(c, term)
            self.splice(c, term)

    def expand_factor(self, c: int, bound: frozenset[Token], f: Factor) -> None:
        if bound:
            for group in self.closing_groups(bound):
                inner = self.class_of((Term(bound - group, (f,)),), needed=group == bound)
                self.edge(c, "close", "sum", [inner], axes=tuple(sorted(t[0] for t in group)))
            self.distribute(c, Term(bound, (f,)))
            self.splice(c, Term(bound, (f,)))
            return
        match f:
            case Load():
                self.edge(c, "load", "load", [], leaf=f)
            case Call(fn, _, over, (arg,)) if over:
                inner = self.class_of(arg, needed=True)
                self.edge(c, "close", "reduce", [inner], axes=tuple(sorted(t[0] for t in over)), fn=fn)
            case Call(fn, attrs, _, args):
                self.edge(c, "argument", "call", [self.class_of(a, needed=True) for a in args], fn=fn, attrs=attrs)
            case Paren(value):
                if self.is_new(c, value) or (self.limit and not self.classes[c].edges):
                    self.work.append((c, value))
            case Number():
                self.edge(c, "number", "number", [], leaf=f)

    def closing_groups(self, bound: frozenset[Token]) -> list[frozenset[Token]]:
        """All bound tokens at once, and each alone: the others are then closed later."""
        return [bound] + ([frozenset([t]) for t in sorted(bound)] if len(bound) > 1 else [])

    def split(self, c: int, term: Term) -> None:
        """Rule a.  Factor 0 stays on the right, so that each partition is seen once."""
        factors = Factors(term)
        apart, open_sides = False, list[int]()
        for left in range(2, factors.whole, 2):
            if self.limit:
                self.share(c, factors, left)
            elif factors.is_closed(left) or factors.is_closed(factors.whole ^ left):
                apart |= self.add_split(c, factors, left, "split")
            else:
                open_sides.append(left)
        if open_sides:
            self.shared.append((c, factors, open_sides))
        if not apart:
            self.alike.append((c, factors))

    def split_alike(self) -> None:
        """Factors that indices do not tell apart (x / y, element by element), of which no share is known, are split
        off one at a time.  So are those that no split within the budget tells apart."""
        alike, self.alike = self.alike, []
        for c, factors in alike:
            n = len(factors.held)
            if not self.classes[c].edges:
                for i in range(n if 2 < n <= MOST_ALIKE and not self.limit else 1):
                    self.add_split(c, factors, 1 << (n - 1 - i), "split", needed=True)
            for i in range(n):
                if not self.classes[c].edges:
                    self.add_split(c, factors, 1 << i, "split", needed=True)

    def share(self, owner: int, factors: Factors, left: int) -> None:
        sides = (left, factors.whole ^ left)
        if all(factors.names(side) in self.products for side in sides):
            keys = [factors.key(side) for side in sides]
            children = [None if key is None else self.by_key.get(key) for key in keys]
            self.edge(owner, "share", "product", children, axes=factors.closes(left))

    def add_split(self, c: int, factors: Factors, left: int, rule: str, needed: bool = False) -> bool:
        """Adds the edge; False if a side has no class."""
        children: list[int | None] = []
        for side in (left, factors.whole ^ left):
            new = self.class_at(factors.key(side), lambda side=side: (factors.side(side),), needed)  # type: ignore[misc]
            if new is None:
                return False
            children.append(new)
        self.edge(c, rule, "product", children, axes=factors.closes(left))
        return True

    def splice(self, c: int, term: Term) -> None:
        """A sum that rule d makes one product joins the product around it, where that frees a factor of an axis that
        is closed there, or brings another to close."""
        for i, f in enumerate(term.factors):
            closed = v.factor_tokens(f) & term.bound
            if not isinstance(f, Paren) or not closed or self.limit:
                continue
            for bound, factors in self.products_of(f):
                if bound or any(closed - v.factor_tokens(g) for g in factors if not isinstance(g, Number)):
                    whole = v.normal_term(term.bound | bound, (*term.factors[:i], *factors, *term.factors[i + 1 :]))
                    if self.is_new(c, (whole,)):
                        self.rules["splice"] += 1
                        self.expand_term(c, whole)

    def products_of(self, f: Paren) -> list[Term]:
        """The products that rule d makes of a sum."""
        known = self.factored.get(f.body.digest)
        if known is None:
            (terms,) = f.body.args
            found: list[Value] = [(together,) for together, _ in factorings(terms, least=len(terms))]
            known = self.factored[f.body.digest] = f.body.params, found
        return [v.freshened(v.rename(x, dict(zip(known[0], f.tokens, strict=True)))[0]) for x in known[1]]

    def distribute(self, c: int, term: Term) -> None:
        """Rule c."""
        for i, f in enumerate(term.factors):
            if not isinstance(f, Paren) or self.limit or not worth_distributing(f.value, term.bound):
                continue
            if is_difference(f.value) and not self.differences:
                continue
            others = term.factors[:i] + term.factors[i + 1 :]
            terms = []
            for t in f.value:
                t = v.freshened(t)
                terms.append(v.freshened(v.normal_term(term.bound | t.bound, others + t.factors)))
            if self.is_new(c, tuple(terms)):
                self.rules["distribute"] += 1
                self.expand_sum(c, tuple(terms))


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


def is_difference(value: Value) -> bool:
    """Whether terms have coefficients of both signs.  What these have in common vanishes when it is subtracted, and is
    rounded away where products with it are summed first: Σ (x - m)·w by Σ x·w - m·Σ w, for a mean m far from 0."""
    return len({v.is_negative(t) for t in value}) > 1


def factorings(value: Value, least: int = 2) -> list[tuple[Term, list[Term]]]:
    """Rule d: groups of at least so many terms that share a factor, as (factor · (rest of each), terms outside).

    Bound tokens of the shared factor are matched, so Σ_k a·x + Σ_k b·x becomes Σ_k (a + b)·x.
    """
    found: list[tuple[Term, list[Term]]] = []
    seen: set[tuple[int, int]] = set()  # where a factor stands that a group shares
    names = [[_name(f) for f in t.factors] for t in value]
    for i, term in enumerate(value):
        for at, f in enumerate(term.factors):
            name = names[i][at]
            if (i, at) in seen or not name or sum(name in others for others in names) < least:
                continue
            group: list[tuple[int, int, dict[Token, Token]]] = [(i, at, {})]
            for j, other in enumerate(value):
                if j == i or name not in names[j]:
                    continue
                for at2, g in enumerate(other.factors):
                    matching = match_tokens(f, g, term.bound, other.bound) if names[j][at2] == name else None
                    if matching is not None:
                        group.append((j, at2, matching))
                        break
            if len(group) < least:
                continue
            seen.update((j, at2) for j, at2, _ in group)
            shared = v.factor_tokens(f) & term.bound
            quotients = tuple(_quotient(value[j], at2, matching, shared) for j, at2, matching in group)
            inside = {j for j, _, _ in group}
            rest = [t for j, t in enumerate(value) if j not in inside]
            found.append((v.normal_term(shared, (f, Paren(quotients))), rest))
    return found


def _name(f: Factor) -> str:
    """What a factor is, whatever its tokens; empty for a number."""
    match f:
        case Load(name):
            return name
        case Call() | Paren():
            return f.body.digest
        case Number():
            return ""


def _quotient(term: Term, at: int, matching: dict[Token, Token], shared: frozenset[Token]) -> Term:
    """The term without a factor, whose bound tokens are matched with the shared ones; its others are fresh."""
    names = v.fresh_tokens(t for t in term.bound if t not in matching and t not in shared) | matching
    bound = frozenset(names.get(t, t) for t in term.bound) - shared
    return v.normal_term(bound, [v.rename_factor(f, names) for k, f in enumerate(term.factors) if k != at])


def match_tokens(
    f: Factor, g: Factor, bound_f: frozenset[Token], bound_g: frozenset[Token]
) -> dict[Token, Token] | None:
    """A map of g's bound tokens to f's that makes the factors equal, or None."""
    if isinstance(f, Number) or isinstance(g, Number) or _name(f) != _name(g):
        return None
    orders = [range(len(f.tokens))] if isinstance(f, Load) else f.body.symmetries
    for order in orders:
        pairs = [(f.tokens[i], b) for i, b in zip(order, g.tokens, strict=True)]
        if all(a[0] == b[0] if b in bound_g and a in bound_f else a == b for a, b in pairs):
            return {b: a for a, b in pairs if b in bound_g}
    return None


def close(
    seeds: list[Value],
    fingerprinter: Fingerprinter,
    budget: int,
    stop: Callable[[], bool] = lambda: False,
    differences: bool = False,
) -> tuple[Closure, list[int]]:
    """The closure of the seeds, and the class of each seed.  `stop` is asked between expansions."""
    builder = Builder(fingerprinter, budget, stop, differences)
    roots = [builder.class_of(s, needed=True) for s in seeds]
    builder.run()
    found = [r for r in roots if r is not None]
    assert len(found) == len(seeds), "a seed has one axis free twice, or too many axes"
    order = topological(builder.classes, found)
    expressions = len(builder.by_key)
    return Closure(builder.classes, order, builder.rules, builder.deduplicated, expressions, builder.limit), found


def topological(classes: list[Class], roots: list[int]) -> list[int]:
    """Children before parents.  Where values are made of each other (x²·1/x is x, x·x is x²), edges that would close a
    cycle are removed."""
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
    if any(position[x] > position[c] for c in order for e in classes[c].edges for x in e.children):
        order = _grounded(classes, order)
        position = {c: i for i, c in enumerate(order)}
    for c in order:
        cell = classes[c]
        cell.edges = {e: r for e, r in cell.edges.items() if all(position[x] < position[c] for x in e.children)}
    return order


def _grounded(classes: list[Class], members: list[int]) -> list[int]:
    """An order in which each class has some edge to earlier ones, if it can be computed at all: first those all of
    whose edges lead there, else the lightest some edge of which does."""
    missing = {(c, e): set(e.children) for c in members for e in classes[c].edges}
    left = {c: len(classes[c].edges) for c in members}  # edges with something missing
    users: dict[int, list[tuple[int, Edge]]] = {c: [] for c in members}
    for c, e in missing:
        for x in set(e.children):
            users[x].append((c, e))
    weight = {c: (v.weight(classes[c].value), c) for c in members}
    whole, some, rest = list[tuple[int, int]](), list[tuple[int, int]](), sorted(weight.values())[::-1]

    def led(c: int) -> None:
        left[c] -= 1
        heapq.heappush(some if left[c] else whole, weight[c])

    for (c, _), children in missing.items():
        if not children:
            led(c)
    order: dict[int, None] = {}
    while len(order) < len(members):
        _, c = heapq.heappop(whole) if whole else heapq.heappop(some) if some else rest.pop()
        if c in order:
            continue
        order[c] = None
        for user, e in users[c]:
            missing[user, e].discard(c)
            if not missing[user, e]:
                led(user)
    return list(order)
