"""The value calculus: what a tensor *is*, whatever computes it.

    Value  = (Term, ...)                              a sum; nothing is expanded, nothing cancels
    Term   = (bound tokens, factors)                  Σ over the bound tokens of a product
    Factor = Load(input, tokens) | Number(coefficient, sizes) | Call(fn, attrs, bound, args) | Paren(Value)
    Token  = (axis, uid)                              uid 0 is free; bound tokens have uids of their own

Two expressions are one *class* iff they agree in Z_p x Z_q on random inputs at tiny sizes, where a sum is an integral
against random weights: Σ_k f = Σ_i w_k[i] f(i).  Every law of sums holds for any weights, and Σ_k 1 is a random
element, so no size coincides with a literal or with another size by accident.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np

from mugraph.ir import fields
from mugraph.ir.fields import P, Q, U, Words

Token = tuple[str, int]


class Load(NamedTuple):
    """An input (or a boundary value) under an index map."""

    name: str
    tokens: tuple[Token, ...]
    kind: Literal["load"] = "load"


class Number(NamedTuple):
    """An exact coefficient: a rational times powers of axis sizes."""

    coefficient: Fraction
    sizes: tuple[tuple[str, int], ...] = ()
    kind: Literal["number"] = "number"


class Call(NamedTuple):
    """An opaque function of values.  `max` and `min` with bound tokens are reductions."""

    fn: str
    attrs: tuple[Any, ...]
    bound: frozenset[Token]
    args: tuple[Value, ...]
    kind: Literal["call"] = "call"


class Paren(NamedTuple):
    """A sum used as a factor."""

    value: Value
    kind: Literal["paren"] = "paren"


Factor = Load | Number | Call | Paren
Print = tuple[tuple[str, ...], bytes]  # the free axes, sorted, and the value at the point: what identifies a class


class Term(NamedTuple):
    bound: frozenset[Token]
    factors: tuple[Factor, ...]


Value = tuple[Term, ...]

ONE = Number(Fraction(1))
NOTHING: frozenset[Token] = frozenset()
SAMPLE: Token = ("", 0)  # the dimension of independent samples, in points only
_uids = itertools.count(1)


# -- structure


def factor_tokens(f: Factor) -> frozenset[Token]:
    """The tokens that are free in a factor."""
    match f:
        case Load(_, index):
            return frozenset(index)
        case Number():
            return NOTHING
        case Call(_, _, bound, args):
            return frozenset().union(*(free_tokens(a) for a in args)) - bound
        case Paren(value):
            return free_tokens(value)


@lru_cache(maxsize=1 << 16)
def free_tokens(value: Value) -> frozenset[Token]:
    return frozenset().union(*(factor_tokens(f) - t.bound for t in value for f in t.factors))


@lru_cache(maxsize=1 << 16)
def weight(value: Value) -> int:
    """The number of factors in the value, nested ones included: what it costs to look at."""
    total_weight = 0
    for f in (f for t in value for f in t.factors):
        match f:
            case Call(_, _, _, args):
                total_weight += 1 + sum(weight(a) for a in args)
            case Paren(inner):
                total_weight += 1 + weight(inner)
            case _:
                total_weight += 1
    return total_weight


def closed_axes(f: Factor) -> frozenset[str]:
    """The axes that are summed or reduced over inside a factor."""
    match f:
        case Load() | Number():
            return frozenset()
        case Call(_, _, bound, args):
            return frozenset(t[0] for t in bound).union(*(_closed_in(a) for a in args))
        case Paren(value):
            return _closed_in(value)


@lru_cache(maxsize=1 << 16)
def _closed_in(value: Value) -> frozenset[str]:
    return frozenset(a for t in value for a, _ in t.bound).union(*(closed_axes(f) for t in value for f in t.factors))


def rename_factor(f: Factor, names: Mapping[Token, Token]) -> Factor:
    match f:
        case Load(name, index):
            return Load(name, tuple(names.get(t, t) for t in index))
        case Number():
            return f
        case Call(fn, attrs, bound, args):
            names = _unbound(names, bound)
            return Call(fn, attrs, bound, tuple(rename(a, names) for a in args))
        case Paren(value):
            return Paren(rename(value, names))


def rename(value: Value, names: Mapping[Token, Token]) -> Value:
    """Renames free tokens.  New names are free ones or fresh, so nothing is captured; a token may be free here and
    bound further in, where the same sum is used twice."""
    names = {old: new for old, new in names.items() if old in free_tokens(value) and old != new}
    if not names:
        return value
    return tuple(
        Term(t.bound, tuple(rename_factor(f, inner) for f in t.factors))
        for t, inner in ((t, _unbound(names, t.bound)) for t in value)
    )


def _unbound(names: Mapping[Token, Token], bound: frozenset[Token]) -> Mapping[Token, Token]:
    return names if bound.isdisjoint(names) else {old: new for old, new in names.items() if old not in bound}


def fresh_tokens(tokens: Iterable[Token]) -> dict[Token, Token]:
    return {t: (t[0], next(_uids)) for t in sorted(tokens)}


def freshened(term: Term) -> Term:
    """The same term with new bound tokens, so that it can stand beside another use of itself."""
    if not term.bound:
        return term
    names = fresh_tokens(term.bound)
    return Term(frozenset(names.values()), tuple(rename_factor(f, names) for f in term.factors))


# -- construction: each keeps the normal form


def number(value: Fraction | int) -> Value:
    return (Term(NOTHING, (Number(Fraction(value)),)),)


def size(axis: str, power: int = 1) -> Value:
    return (Term(NOTHING, (Number(Fraction(1), ((axis, power),)),)),)


def load(name: str, axes: Iterable[str]) -> Value:
    return (Term(NOTHING, (Load(name, tuple((a, 0) for a in axes)),)),)


def normal_term(bound: Iterable[Token], factors: Iterable[Factor]) -> Term:
    """Splices one-term parentheses, folds coefficients into at most one, and replaces Σ_k c by |k|·c."""
    live, flat, coefficient = set(bound), list[Factor](), ONE
    pending = list(factors)
    while pending:
        f = pending.pop(0)
        match f:
            case Paren((only,)):
                only = freshened(only)
                live |= only.bound
                pending = [*only.factors, *pending]
            case Number():
                coefficient = product_of_numbers(coefficient, f)
            case _:
                flat.append(f)
    held = frozenset().union(*(factor_tokens(f) for f in flat))
    for token in sorted(live - held):
        live.discard(token)
        coefficient = product_of_numbers(coefficient, Number(Fraction(1), ((token[0], 1),)))
    if coefficient != ONE or not flat:
        flat.insert(0, coefficient)
    return Term(frozenset(live), tuple(flat))


def product_of_numbers(a: Number, b: Number) -> Number:
    powers: dict[str, int] = defaultdict(int)
    for axis, power in (*a.sizes, *b.sizes):
        powers[axis] += power
    return Number(a.coefficient * b.coefficient, tuple(sorted((x, p) for x, p in powers.items() if p)))


def as_term(value: Value) -> Term:
    """A value as one term: a sum of several goes into parentheses."""
    return value[0] if len(value) == 1 else Term(NOTHING, (Paren(value),))


def multiply(*values: Value) -> Value:
    bound, factors = set[Token](), list[Factor]()
    for value in values:
        term = freshened(as_term(value))
        bound |= term.bound
        factors += term.factors
    return (normal_term(bound, factors),)


def is_zero(term: Term) -> bool:
    return any(isinstance(f, Number) and f.coefficient == 0 for f in term.factors)


def add(*values: Value) -> Value:
    terms = tuple(t for value in values for t in value if not is_zero(t))
    return terms or number(0)


def negate(value: Value) -> Value:
    return tuple(normal_term(t.bound, (Number(Fraction(-1)), *t.factors)) for t in value)


def total(value: Value, axes: Iterable[str]) -> Value:
    """Σ over the axes."""
    names = fresh_tokens((a, 0) for a in axes)
    term = freshened(as_term(value))
    return (normal_term(term.bound | set(names.values()), (rename_factor(f, names) for f in term.factors)),)


def call(fn: str, *args: Value, attrs: tuple[Any, ...] = ()) -> Value:
    return (Term(NOTHING, (Call(fn, attrs, NOTHING, args),)),)


def reduction(fn: str, value: Value, axes: Iterable[str]) -> Value:
    """max or min over the axes."""
    names = fresh_tokens((a, 0) for a in axes)
    return (Term(NOTHING, (Call(fn, (), frozenset(names.values()), (rename(value, names),)),)),)


def invert(value: Value) -> Value:
    """1 / value, with inv(a·b) = inv a · inv b where there is no sum in the way."""
    if len(value) > 1 or value[0].bound:
        return call("inv", value)
    factors: list[Factor] = []
    for f in value[0].factors:
        match f:
            case Number(coefficient, sizes):
                factors.append(Number(1 / coefficient, tuple((a, -p) for a, p in sizes)))
            case Call("inv", _, _, (inner,)):
                factors.append(Paren(inner))
            case _:
                factors.append(Call("inv", (), NOTHING, ((Term(NOTHING, (f,)),),)))
    return (normal_term((), factors),)


# -- a syntactic key, equal for values that differ only in bound names and in order


def key(value: Value) -> tuple[Any, ...]:
    return _value_key(value, {}, 0)


def _value_key(value: Value, names: Mapping[Token, str], depth: int) -> tuple[Any, ...]:
    return tuple(sorted(_term_key(t, names, depth) for t in value))


def _namings(bound: Iterable[Token], depth: int) -> Iterator[dict[Token, str]]:
    """All namings of bound tokens by axis and number; tokens of different axes are never confused."""
    by_axis: dict[str, list[Token]] = defaultdict(list)
    for t in sorted(bound):
        by_axis[t[0]].append(t)
    for orders in itertools.product(*(itertools.permutations(ts) for ts in by_axis.values())):
        yield {t: f"{t[0]}~{depth}.{i}" for order in orders for i, t in enumerate(order)}


def _term_key(term: Term, names: Mapping[Token, str], depth: int) -> tuple[Any, ...]:
    best: tuple[Any, ...] | None = None
    for own in _namings(term.bound, depth):
        inner = {**names, **own}
        candidate = (
            tuple(sorted(own.values())),
            tuple(sorted(_factor_key(f, inner, depth + 1) for f in term.factors)),
        )
        if best is None or candidate < best:
            best = candidate
    assert best is not None
    return best


_COMMUTATIVE = {"max", "min", "and", "or"}


def _factor_key(f: Factor, names: Mapping[Token, str], depth: int) -> tuple[Any, ...]:
    match f:
        case Load(name, index):
            return ("load", name, tuple(names.get(t, f"{t[0]}:{t[1]}") for t in index))
        case Number(coefficient, sizes):
            return ("number", str(coefficient), sizes)
        case Paren(value):
            return ("paren", "", _value_key(value, names, depth))
        case Call(fn, attrs, bound, args):
            candidates = []
            for own in _namings(bound, depth):
                keys = [_value_key(a, {**names, **own}, depth + 1) for a in args]
                candidates.append(tuple(sorted(keys) if fn in _COMMUTATIVE else keys))
            return ("call", f"{fn}{attrs}{sorted(t[0] for t in bound)}", min(candidates))


# -- evaluation in the fields


class Point(NamedTuple):
    """A value at the random inputs: its free tokens and its two components; the second is lost by exp."""

    tokens: tuple[Token, ...]
    p: Words
    q: Words | None


class Fingerprinter:
    """Evaluates values on inputs derived from `key`.

    base:   the axis that an alias stands for (aliases share inputs, sizes and weights)
    static: axes of known size, whose weights add up to it
    samples: independent inputs at once.  One is enough but for maxima, which are one of their operands: each element
            is the same operand by accident half of the time.
    """

    def __init__(self, base: Mapping[str, str], static: Mapping[str, int], key: object = 0, samples: int = 1) -> None:
        self.base, self.static, self.key, self.samples = base, static, key, samples
        aliased = {b for a, b in base.items() if a != b}
        self.wide = {a for a in base if base[a] in aliased}
        self.points: dict[Factor | Value, Point] = {}
        self.omega = np.asarray(fields.order_q_element("search", key), dtype=U)
        self._weights: dict[tuple[str, int], Words] = {}

    def length(self, axis: str) -> int:
        return 3 if axis in self.wide else 2

    def weights(self, axis: str, modulus: int) -> Words:
        axis = self.base.get(axis, axis)
        found = self._weights.get((axis, modulus))
        if found is None:
            found = fields.random_words(("weight", axis, self.key), (self.length(axis),), modulus)
            if axis in self.static:
                rest = int(found[:-1].sum()) % modulus
                found[-1] = (self.static[axis] - rest) % modulus
            self._weights[axis, modulus] = found
        return found

    def fingerprint(self, value: Value) -> Print:
        return print_of(self.value(value))

    def value(self, value: Value) -> Point:
        found = self.points.get(value)
        if found is None:
            found = self.term(value[0])
            for t in value[1:]:
                found = self.join(found, self.term(t), multiply_them=False)
            self.points[value] = found
        return found

    def term(self, term: Term) -> Point:
        point = self.factor(term.factors[0])
        for f in term.factors[1:]:
            point = self.join(point, self.factor(f), multiply_them=True)
        for token in term.bound:
            point = self.integral(point, token)
        return point

    def integral(self, point: Point, token: Token) -> Point:
        at = point.tokens.index(token)
        shape = [1] * len(point.tokens)
        shape[at] = -1

        def weigh(words: Words, modulus: int) -> Words:
            w = self.weights(token[0], modulus).reshape(shape)
            return np.asarray((words * w % U(modulus)).sum(axis=at) % U(modulus), dtype=U)

        rest = point.tokens[:at] + point.tokens[at + 1 :]
        return Point(rest, weigh(point.p, P), None if point.q is None else weigh(point.q, Q))

    def join(self, a: Point, b: Point, multiply_them: bool) -> Point:
        tokens = tuple(dict.fromkeys((*a.tokens, *b.tokens)))
        operation = fields.multiply if multiply_them else fields.add
        p = operation(spread(a, a.p, tokens), spread(b, b.p, tokens), P)
        q = None
        if a.q is not None and b.q is not None:
            q = operation(spread(a, a.q, tokens), spread(b, b.q, tokens), Q)
        return Point(tokens, p, q)

    def factor(self, f: Factor) -> Point:
        found = self.points.get(f)
        if found is None:
            found = self.points[f] = self._factor(f)
        return found

    def _factor(self, f: Factor) -> Point:
        match f:
            case Paren(value):
                return self.value(value)
            case Load(name, index):
                shape = tuple(self.length(t[0]) for t in index)
                if self.samples > 1:
                    index, shape = (SAMPLE, *index), (self.samples, *shape)
                parts = (fields.random_words(("input", name, self.key), shape, m) for m in (P, Q))
                return Point(index, *parts)
            case Number(coefficient, sizes):
                return Point((), self.number(coefficient, sizes, P), self.number(coefficient, sizes, Q))
            case Call("inv", _, _, (arg,)):
                x = self.value(arg)
                return Point(x.tokens, fields.inverse(x.p, P), None if x.q is None else fields.inverse(x.q, Q))
            case Call("exp", _, _, (arg,)):
                x = self.value(arg)
                if x.q is not None:
                    return Point(x.tokens, fields.power(self.omega, x.q, P), None)
                return self.opaque(("exp",), (x,))
            case Call("max" | "min", _, bound, args):
                return self.extreme(f.fn, bound, [self.value(a) for a in args])
            case Call(fn, attrs, bound, args):
                key, points = (fn, attrs, sorted(t[0] for t in bound)), tuple(self.value(a) for a in args)
                return self.opaque(key, points, fn in _COMMUTATIVE or (fn == "compare" and attrs[0] in ("eq", "ne")))

    def number(self, coefficient: Fraction, sizes: tuple[tuple[str, int], ...], modulus: int) -> Words:
        result = fields.rational(coefficient.numerator, coefficient.denominator, modulus)
        for axis, power in sizes:
            count = int(self.weights(axis, modulus).sum()) % modulus
            result = result * pow(count, power, modulus) % modulus
        return np.asarray(result, dtype=U)

    def opaque(self, fn: object, args: tuple[Point, ...], commutes: bool = False) -> Point:
        tokens = tuple(dict.fromkeys(t for a in args for t in a.tokens))
        mixed: Words = np.asarray(0, dtype=U)
        for a in args if commutes else ():
            mixed = mixed + fields.keyed_hash(spread(a, a.p, tokens), (fn, "operand"), 2**61)
        for i, a in enumerate(() if commutes else args):
            mixed = fields.keyed_hash(np.asarray(mixed + spread(a, a.p, tokens) * U(2), dtype=U), (fn, i), 2**62)
        return Point(tokens, fields.keyed_hash(mixed, (fn, "p"), P), fields.keyed_hash(mixed, (fn, "q"), Q))

    def extreme(self, fn: str, bound: frozenset[Token], args: list[Point]) -> Point:
        """max or min under a random order of Z_p: commutative, associative, idempotent."""
        tokens = tuple(dict.fromkeys(t for a in args for t in a.tokens))
        p, q = spread(args[0], args[0].p, tokens), None
        if all(a.q is not None for a in args):
            q = spread(args[0], args[0].q, tokens)
        for other in args[1:]:
            p2 = spread(other, other.p, tokens)
            left = fields.keyed_hash(p, fn, 2**62) >= fields.keyed_hash(p2, fn, 2**62)
            q = None if q is None else np.where(left, q, spread(other, other.q, tokens))
            p = np.where(left, p, p2)
        for token in sorted(bound & set(tokens)):
            at = tokens.index(token)
            best = np.expand_dims(fields.keyed_hash(p, fn, 2**62).argmax(axis=at), at)
            p = np.take_along_axis(p, best, axis=at).squeeze(at)
            q = None if q is None else np.take_along_axis(q, best, axis=at).squeeze(at)
            tokens = tokens[:at] + tokens[at + 1 :]
        return Point(tokens, p, q)


def print_of(point: Point) -> Print:
    order = sorted(range(len(point.tokens)), key=lambda i: point.tokens[i])
    axes = tuple(point.tokens[i][0] for i in order if point.tokens[i] != SAMPLE)
    return axes, point.p.transpose(order).tobytes()


def spread(point: Point, words: Words | None, tokens: tuple[Token, ...]) -> Words:
    """The component with one dimension per token, of size 1 where it lacks the token."""
    assert words is not None
    order = [point.tokens.index(t) for t in tokens if t in point.tokens]
    moved = words.transpose(order) if len(order) > 1 else words
    return moved[tuple(slice(None) if t in point.tokens else None for t in tokens)] if tokens else moved


def text(value: Value) -> str:
    """The value in mathematical notation, for reports."""
    return " + ".join(_term_text(t) for t in value)


def _term_text(term: Term) -> str:
    body = "·".join(_factor_text(f) for f in term.factors)
    return f"Σ{','.join(sorted(t[0] for t in term.bound))} {body}" if term.bound else body


def _factor_text(f: Factor) -> str:
    match f:
        case Load(name, index):
            return f"{name}[{','.join(t[0] for t in index)}]"
        case Number(coefficient, sizes):
            powers = [f"|{a}|" if p == 1 else f"|{a}|^{p}" for a, p in sizes]
            return "·".join(([] if coefficient == 1 and powers else [str(coefficient)]) + powers)
        case Call(fn, _, bound, args):
            over = f"[{','.join(sorted(t[0] for t in bound))}]" if bound else ""
            return f"{fn}{over}({', '.join(text(a) for a in args)})"
        case Paren(value):
            return f"({text(value)})"
