"""A second evaluator of values and of edges, for tests: exact integers modulo P and Q in plain Python, true sums over
three elements an axis, and functions that are fixed random polynomials.  It shares nothing with the search's own
fingerprints but the two primes."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from mugraph.ir.fields import P, Q
from mugraph.search.closure import Closure, Edge
from mugraph.search.values import Call, Factor, Load, Number, Paren, Term, Token, Value

SIZE = 3
ROOT = pow(12345, 2, P)  # of order Q: P = 2 Q + 1
Pair = tuple[int, int | None]


@dataclass
class Table:
    """A function of the indices of its tokens."""

    tokens: tuple[Token, ...]
    at: dict[tuple[int, ...], Pair]

    def __getitem__(self, index: Mapping[Token, int]) -> Pair:
        return self.at[tuple(index[t] for t in self.tokens)]

    def plain(self) -> dict[tuple[tuple[str, int], ...], Pair]:
        """Entries by axis name, whatever the order of tokens."""
        names = [t[0] for t in self.tokens]
        return {tuple(sorted(zip(names, index, strict=True))): pair for index, pair in self.at.items()}


def table(tokens: Iterable[Token], entry: Callable[[Mapping[Token, int]], Pair]) -> Table:
    tokens = tuple(dict.fromkeys(tokens))
    indices = list(product(range(SIZE), repeat=len(tokens)))
    return Table(tokens, {i: entry(dict(zip(tokens, i, strict=True))) for i in indices})


def times(a: Pair, b: Pair) -> Pair:
    return a[0] * b[0] % P, None if a[1] is None or b[1] is None else a[1] * b[1] % Q


def plus(a: Pair, b: Pair) -> Pair:
    return (a[0] + b[0]) % P, None if a[1] is None or b[1] is None else (a[1] + b[1]) % Q


def noise(*key: object) -> random.Random:
    return random.Random(repr(key))


def polynomial(key: object, args: tuple[Pair, ...]) -> Pair:
    """A fixed random polynomial of the Z_p parts: what an opaque function is replaced by."""
    r, x = noise("fn", key), 0
    for p, _ in args:
        x = (x * r.randrange(P) + (p + r.randrange(P)) ** 7 * r.randrange(P)) % P
    return pow(x + r.randrange(P), 5, P), pow(x + r.randrange(P), 5, Q)


def function(fn: str, attrs: object, args: tuple[Pair, ...]) -> Pair:
    p, q = args[0]
    if fn == "inv":
        return pow(p, -1, P), None if q is None else pow(q, -1, Q)
    if fn == "exp" and q is not None:
        return pow(ROOT, q, P), None
    if fn in ("max", "min"):
        return extreme(fn, args)
    return polynomial((fn, attrs), args)


def extreme(fn: str, args: Iterable[Pair]) -> Pair:
    return max(args, key=lambda pair: noise(fn, pair[0]).random())


def number(f: Number) -> Pair:
    p, q = (f.coefficient.numerator * pow(f.coefficient.denominator, -1, m) for m in (P, Q))
    for _, power in f.sizes:
        p, q = p * pow(SIZE, power, P), q * pow(SIZE, power, Q)
    return p % P, q % Q


def closed(t: Table, bound: Iterable[Token], combine: Callable[[list[Pair]], Pair]) -> Table:
    gone = set(bound) & set(t.tokens)
    kept = tuple(x for x in t.tokens if x not in gone)
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for index, pair in t.at.items():
        groups.setdefault(tuple(i for i, x in zip(index, t.tokens, strict=True) if x in kept), []).append(pair)
    return Table(kept, {index: combine(pairs) for index, pairs in groups.items()})


def summed(pairs: list[Pair]) -> Pair:
    total: Pair = (0, 0)
    for pair in pairs:
        total = plus(total, pair)
    return total


def joined(tables: list[Table], operation: Callable[[Pair, Pair], Pair]) -> Table:
    result = tables[0]
    for other in tables[1:]:
        left = result
        result = table((*left.tokens, *other.tokens), lambda i, a=left, b=other: operation(a[i], b[i]))  # type: ignore[misc]
    return result


def of_value(value: Value) -> Table:
    return joined([of_term(t) for t in value], plus)


def of_term(term: Term) -> Table:
    return closed(joined([of_factor(f) for f in term.factors], times), term.bound, summed)


def of_factor(f: Factor) -> Table:
    match f:
        case Load(name, index):
            return loaded(name, index)
        case Number():
            return Table((), {(): number(f)})
        case Paren(value):
            return of_value(value)
        case Call(fn, attrs, bound, args):
            return called(fn, attrs, [of_value(a) for a in args], bound)


def loaded(name: str, index: tuple[Token, ...]) -> Table:
    def entry(at: Mapping[Token, int]) -> Pair:
        r = noise("input", name, [at[t] for t in index])
        return r.randrange(1, P), r.randrange(1, Q)

    return table(index, entry)


def called(fn: str, attrs: object, args: list[Table], bound: Iterable[Token] = ()) -> Table:
    if set(bound):
        (only,) = args
        return closed(only, bound, lambda pairs: extreme(fn, pairs))
    tokens = [t for a in args for t in a.tokens]
    return table(tokens, lambda i: function(fn, attrs, tuple(a[i] for a in args)))


def of_edge(edge: Edge, children: list[Table]) -> Table:
    """What the edge makes of its children."""
    over = [(a, 0) for a in edge.axes]
    match edge.kind:
        case "load":
            assert isinstance(edge.leaf, Load)
            return loaded(edge.leaf.name, edge.leaf.tokens)
        case "number":
            assert isinstance(edge.leaf, Number)
            return Table((), {(): number(edge.leaf)})
        case "product":
            return closed(joined(children, times), over, summed)
        case "sum":
            return closed(children[0], over, summed)
        case "add":
            return joined(children, plus)
        case "reduce":
            return closed(children[0], over, lambda pairs: extreme(edge.fn, pairs))
        case "call":
            return called(edge.fn, edge.attrs, children)


def agree(a: Table, b: Table) -> bool:
    x, y = a.plain(), b.plain()
    return x.keys() == y.keys() and all(
        x[i][0] == y[i][0] and (x[i][1] is None or y[i][1] is None or x[i][1] == y[i][1]) for i in x
    )


def wrong_edges(closure: Closure) -> list[tuple[int, Edge]]:
    """The edges that do not compute their class."""
    tables = {c: of_value(closure.classes[c].value) for c in closure.order}
    return [
        (c, e)
        for c in closure.order
        for e in closure.classes[c].edges
        if not agree(of_edge(e, [tables[x] for x in e.children]), tables[c])
    ]
