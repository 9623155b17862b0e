"""The value calculus: what a tensor *is*, whatever computes it.

    Value  = (Term, ...)                              a sum; nothing is expanded, nothing cancels
    Term   = (bound tokens, factors)                  Σ over the bound tokens of a product
    Factor = Load(input, tokens) | Number(coefficient, sizes) | Call(fn, attrs, bound, args) | Paren(Value)
    Token  = (axis, uid)                              uid 0 is free; bound tokens have uids of their own

A call or a sum in parentheses is a `Body` at tokens, as a load is an input at tokens: what it is made of stands there
once, under names of its own.  So renaming touches one level, and a value of a program of any depth is a graph in which
everything is shared.  A body has a digest (Merkle, 1987) that does not depend on bound names nor on the order of terms
and factors: it is compared, looked up and evaluated once.

Two expressions are one *class* iff they agree in Z_p x Z_q on random inputs at tiny sizes, where a sum is an integral
against random weights: Σ_k f = Σ_i w_k[i] f(i).  Every law of sums holds for any weights, and Σ_k 1 is a random
element, so no size coincides with a literal or with another size by accident.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from mugraph.ir import fields
from mugraph.ir.fields import P, Q, U, Words

Token = tuple[str, int]
Tokens = tuple[Token, ...]


class Load(NamedTuple):
    """An input (or a boundary value) under an index map."""

    name: str
    tokens: Tokens
    kind: Literal["load"] = "load"

    @property
    def free(self) -> frozenset[Token]:
        return frozenset(self.tokens)


class Number(NamedTuple):
    """An exact coefficient: a rational times powers of axis sizes."""

    coefficient: Fraction
    sizes: tuple[tuple[str, int], ...] = ()
    kind: Literal["number"] = "number"

    @property
    def free(self) -> frozenset[Token]:
        return NOTHING


class Body:
    """A function of values, or (fn "") a sum, over parameters: its free tokens.

    digest      the same for bodies that differ in names of tokens and order alone, where parameters correspond
    symmetries  the orders of the parameters that give the same body; the first is the order that they have
    places      for each parameter the first that a symmetry puts in its place
    closed      the axes that are summed or reduced over inside
    calls       the names of the functions inside, its own included
    degree      how many exponentials it carries more than it divides by
    width       the most axes that evaluation meets inside at once
    """

    calls: frozenset[str]
    __slots__ = (
        "args",
        "attrs",
        "bound",
        "calls",
        "closed",
        "degree",
        "digest",
        "fn",
        "params",
        "places",
        "symmetries",
        "width",
    )

    def __init__(self, fn: str, attrs: tuple[Any, ...], bound: frozenset[Token], args: tuple[Value, ...]) -> None:
        self.fn, self.attrs, self.bound, self.args = fn, attrs, bound, args
        free = frozenset().union(*map(free_tokens, args))
        best: str | None = None
        orders: list[Tokens] = []
        for order in _orders(_places(free - bound, args, fn in COMMUTATIVE)):
            names = {t: f"{i}" for i, t in enumerate(order)}
            found = self._digest(names, free & bound)
            if best is None or found < best:
                best, orders = found, [order]
            elif found == best:
                orders.append(order)
        assert best is not None
        self.digest, self.params = best, orders[0]
        self.symmetries = tuple(tuple(map(self.params.index, order)) for order in orders)
        self.places = tuple(map(min, zip(*self.symmetries, strict=True)))
        terms = [t for x in args for t in x]
        closing = [bound, *(t.bound for t in terms)]
        self.closed = frozenset(axis for tokens in closing for axis, _ in tokens).union(
            *(closed_axes(f) for t in terms for f in t.factors)
        )
        self.calls = frozenset((fn,)).union(*(b.calls for b in self.parts()))
        self.degree = int(fn in ("exp", "masked_exp"))
        if fn in ("", "inv"):
            most = max(sum(map(degree, t.factors)) for t in terms)
            self.degree = -most if fn else most
        self.width = max(len(free), *map(width, args))

    def parts(self) -> Iterator[Body]:
        """The bodies that it is made of, one level down."""
        return (b for x in self.args for b in bodies(x))

    def _digest(self, names: dict[Token, str], bound: Iterable[Token]) -> str:
        """The least over all ways to name the bound tokens."""
        keys = []
        for own in _namings(bound, self.args, "!"):
            args = [value_key(x, names | own) for x in self.args]
            keys.append(sorted(args) if self.fn in COMMUTATIVE else args)
        text = repr((self.fn, self.attrs, sorted(t[0] for t in self.bound), list(names.values()), min(keys)))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Applied:
    """A body at tokens, one for each parameter.  Equal if the bodies are, up to their symmetries."""

    __slots__ = ("_opened", "body", "free", "tokens")

    def __init__(self, body: Body, tokens: Tokens) -> None:
        self.body = body
        if len(body.symmetries) > 1:
            tokens = min(tuple(tokens[i] for i in order) for order in body.symmetries)
        self.tokens, self.free = tokens, frozenset(tokens)
        self._opened: tuple[frozenset[Token], tuple[Value, ...]] | None = None

    def at(self, tokens: Tokens) -> Any:
        """The same body at other tokens."""
        other = object.__new__(type(self))
        Applied.__init__(other, self.body, tokens)
        return other

    def opened(self) -> tuple[frozenset[Token], tuple[Value, ...]]:
        """The bound tokens and the arguments under the tokens of this use."""
        if self._opened is None:
            body, names = self.body, {p: t for p, t in zip(self.body.params, self.tokens, strict=True) if p != t}
            bound, args = body.bound, body.args
            if names:
                if not bound.isdisjoint(names.values()):
                    own = fresh_tokens(bound)
                    bound, names = frozenset(own.values()), names | own
                args = tuple(rename(x, names) for x in args)
            self._opened = bound, args
        return self._opened

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Applied) and self.body.digest == other.body.digest and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash((self.body.digest, self.tokens))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.body.fn}#{self.body.digest[:6]}{list(self.tokens)})"


class Call(Applied):
    """An opaque function of values.  `max` and `min` with bound tokens are reductions."""

    __slots__ = ()
    __match_args__ = ("fn", "attrs", "bound", "args")

    def __init__(self, fn: str, attrs: tuple[Any, ...], bound: frozenset[Token], args: tuple[Value, ...]) -> None:
        body = Body(fn, attrs, bound, args)
        super().__init__(body, body.params)

    @property
    def fn(self) -> str:
        return self.body.fn

    @property
    def attrs(self) -> tuple[Any, ...]:
        return self.body.attrs

    @property
    def bound(self) -> frozenset[Token]:
        return self.opened()[0]

    @property
    def args(self) -> tuple[Value, ...]:
        return self.opened()[1]


class Paren(Applied):
    """A sum used as a factor."""

    __slots__ = ()
    __match_args__ = ("value",)

    def __init__(self, value: Value) -> None:
        body = Body("", (), NOTHING, (value,))
        super().__init__(body, body.params)

    @property
    def value(self) -> Value:
        return self.opened()[1][0]


Factor = Load | Number | Call | Paren
Print = tuple[tuple[str, ...], bytes]  # the free axes, sorted, and the value at the point: what identifies a class


class Term(NamedTuple):
    bound: frozenset[Token]
    factors: tuple[Factor, ...]


Value = tuple[Term, ...]

MOST_AXES = 10  # of a value, and of what is multiplied on the way to it: its points have 2 elements or 3 an axis
COMMUTATIVE = frozenset({"max", "min", "and", "or"})
ONE = Number(Fraction(1))
NOTHING: frozenset[Token] = frozenset()
SAMPLE: Token = ("", 0)  # the dimension of independent samples, in points only
MOST_ORDERS = 720  # of tokens; beyond, bodies that differ in order and names may not be told to be the same
_uids = itertools.count(1)


# -- structure


def factor_tokens(f: Factor) -> frozenset[Token]:
    """The tokens that are free in a factor."""
    return f.free


def bodies(value: Value) -> Iterator[Body]:
    """The bodies at the top of a value."""
    return (f.body for t in value for f in t.factors if isinstance(f, Applied))


def free_tokens(value: Value) -> frozenset[Token]:
    if len(value) == 1:
        return _held(value[0].factors) - value[0].bound
    return frozenset().union(*[_held(t.factors) - t.bound for t in value])


def _held(factors: Iterable[Factor]) -> frozenset[Token]:
    return frozenset().union(*[f.free for f in factors])


def weight(value: Value) -> int:
    """The number of factors, those within calls and parentheses not counted: what it costs to look at."""
    return sum(len(t.factors) for t in value)


def width(value: Value) -> int:
    """The most axes that evaluation meets at once."""
    inside = [b.width for b in bodies(value)]
    return max(len(free_tokens(value)), *inside, *map(_term_width, value))


def _term_width(term: Term) -> int:
    held = len(_held(term.factors))
    return held if held <= MOST_AXES else max(n for _, _, n in elimination(term))


def elimination(term: Term) -> list[tuple[Factor, Iterable[Token], int]]:
    """The factors in an order to multiply them in, the bound tokens that are summed over after each, and the number of
    tokens before that.  Of many tokens, the factor that brings the fewest comes next."""
    if len(term.factors) == 1:
        return [(term.factors[0], term.bound, len(term.factors[0].free))]
    left = [(f, f.free) for f in term.factors]
    greedy = len(frozenset().union(*(ts for _, ts in left))) > MOST_AXES
    found: list[tuple[Factor, Iterable[Token], int]] = []
    held: frozenset[Token] = NOTHING
    while left:
        at = min(range(len(left)), key=lambda i: len(held | left[i][1])) if greedy else 0
        f, tokens = left.pop(at)
        held |= tokens
        done = held & term.bound
        done = done.difference(*(ts for _, ts in left)) if done else done
        found.append((f, done, len(held)))
        held -= done
    return found


def closed_axes(f: Factor) -> frozenset[str]:
    """The axes that are summed or reduced over inside a factor."""
    return f.body.closed if isinstance(f, Applied) else frozenset()


def degree(f: Factor) -> int:
    """How many exponentials a factor carries more than it divides by."""
    return f.body.degree if isinstance(f, Applied) else 0


def rename_factor(f: Factor, names: Mapping[Token, Token]) -> Factor:
    if isinstance(f, Number) or names.keys().isdisjoint(f.tokens):
        return f
    tokens = tuple([names.get(t, t) for t in f.tokens])
    return Load(f.name, tokens) if isinstance(f, Load) else f.at(tokens)


def rename(value: Value, names: Mapping[Token, Token]) -> Value:
    """Renames free tokens."""
    free = free_tokens(value)
    names = {old: new for old, new in names.items() if old in free and old != new}
    return tuple(_renamed_term(t, names) for t in value) if names else value


def _renamed_term(t: Term, names: Mapping[Token, Token]) -> Term:
    """A token may be free in one term and bound in another.  What a new name would capture is freshened.  Where the
    new name is of another axis (an alias), sums over that axis go over one that is free no more: Σ_k x[b,k]·w[k,n]
    with k for n is Σ_n x[b,n]·w[n,k], so that no part has one axis twice."""
    if not t.bound.isdisjoint(names):
        names = {old: new for old, new in names.items() if old not in t.bound}
    own: dict[Token, Token] = {}
    exchanged = {new[0]: old[0] for old, new in names.items() if old[0] != new[0]}
    if exchanged:
        left = {names.get(token, token)[0] for token in _held(t.factors) - t.bound}
        for b in sorted(t.bound):
            if b[0] in left and b[0] in exchanged:
                own[b] = (_spare(b[0], exchanged[b[0]], left), next(_uids))
    if not t.bound.isdisjoint(names.values()):
        own = fresh_tokens(t.bound - own.keys()) | own
    inner = {**names, **own}
    return Term(frozenset(own.get(b, b) for b in t.bound), tuple(rename_factor(f, inner) for f in t.factors))


def _spare(axis: str, alias: str, taken: Collection[str]) -> str:
    """An alias of the axis that is not taken, or the axis.  Aliases share the name before "_": then it is the first
    that is not taken, so that all sums which must evade an axis go over the same one."""
    group = axis.partition("_")[0]
    if alias.partition("_")[0] == group:
        names = itertools.chain([group], (f"{group}_{i}" for i in itertools.count(1)))
        alias = next(name for name in names if name == alias or name not in taken)
    return axis if alias in taken else alias


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
    pending = list(reversed(tuple(factors)))
    while pending:
        f = pending.pop()
        if isinstance(f, Number):
            coefficient = product_of_numbers(coefficient, f)
        elif isinstance(f, Paren) and len(f.body.args[0]) == 1:
            only = freshened(f.value[0])
            live |= only.bound
            pending += reversed(only.factors)
        else:
            flat.append(f)
    for token in sorted(live - _held(flat)):
        live.discard(token)
        coefficient = product_of_numbers(coefficient, Number(Fraction(1), ((token[0], 1),)))
    if not flat or (coefficient is not ONE and coefficient != ONE):
        flat.insert(0, coefficient)
    return Term(frozenset(live), tuple(flat))


def product_of_numbers(a: Number, b: Number) -> Number:
    if a is ONE:
        return b
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


def is_negative(term: Term) -> bool:
    return any(isinstance(f, Number) and f.coefficient < 0 for f in term.factors)


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


def rewritten(value: Value, rule: Callable[[Body, tuple[Value, ...]], Value | None]) -> Value:
    """The value with `rule` applied to every call and reduction in it, innermost first.  The rule gets a body and its
    arguments, which are rewritten already, and gives the value that takes its place, or None for the same call."""
    known: dict[str, tuple[Tokens, Value] | None] = {}  # over its parameters; None: as it was
    pending = list(bodies(value))
    while pending:
        top = pending[-1]
        inside = [] if top.digest in known else [b for b in top.parts() if b.digest not in known]
        pending += inside
        if not inside:
            pending.pop()
            if top.digest not in known:
                args = tuple(_replaced(x, known) for x in top.args)
                new = rule(top, args) if top.fn else args[0]
                if new is None and args != top.args:
                    new = (Term(NOTHING, (Call(top.fn, top.attrs, top.bound, args),)),)
                same = new is None or (not top.fn and args == top.args)
                known[top.digest] = None if new is None or same else (top.params, new)
    return _replaced(value, known)


def _replaced(value: Value, known: Mapping[str, tuple[Tokens, Value] | None]) -> Value:
    """The value with other values in place of its bodies."""
    if not any(known[b.digest] for b in bodies(value)):
        return value

    def factor(f: Factor) -> Factor:
        new = known[f.body.digest] if isinstance(f, Applied) else None
        return f if new is None else Paren(rename(new[1], dict(zip(new[0], f.tokens, strict=True))))  # type: ignore[union-attr]

    return add(*((normal_term(t.bound, map(factor, t.factors)),) for t in value))


# -- a syntactic key, equal for values that differ only in bound names and in order

Key = tuple[Any, ...]


def key(value: Value) -> Key:
    return value_key(value, {t: f"{t[0]}:{t[1]}" for t in free_tokens(value)})


def value_key(value: Value, names: Mapping[Token, str]) -> Key:
    """The key where free tokens have these names."""
    return tuple(sorted(term_key(t, names) for t in value)) if len(value) > 1 else (term_key(value[0], names),)


def term_key(term: Term, names: Mapping[Token, str]) -> Key:
    """The least over all ways to name the bound tokens: these names, and the keys of the factors, in order."""
    if not term.bound:
        return (), tuple(sorted([factor_key(f, names) for f in term.factors]))
    found = []
    for own in _namings(term.bound, ((Term(NOTHING, term.factors),),)):
        inner = {**names, **own}
        found.append((tuple(sorted(own.values())), tuple(sorted([factor_key(f, inner) for f in term.factors]))))
    return min(found) if len(found) > 1 else found[0]


def factor_key(f: Factor, names: Mapping[Token, str]) -> tuple[str, ...]:
    """What it is, then the names of its tokens."""
    if isinstance(f, Load):
        return (f"load {f.name}", *[names[t] for t in f.tokens])
    if isinstance(f, Number):
        return (f"number {f.coefficient} {f.sizes}",)
    if len(f.body.symmetries) == 1:
        return (f.body.digest, *[names[t] for t in f.tokens])
    return (f.body.digest, *min(tuple(names[f.tokens[i]] for i in order) for order in f.body.symmetries))


def _namings(bound: Iterable[Token], args: Iterable[Value], mark: str = "~") -> Iterator[dict[Token, str]]:
    """All namings of bound tokens by axis and number; tokens of different axes are never confused."""
    axes: dict[Token, Any] = {t: t[0] for t in bound}
    if len(set(axes.values())) < len(axes):
        axes = {t: (t[0], places) for t, places in _places(bound, args, True).items()}
    for order in _orders(axes):
        yield {t: f"{t[0]}{mark}{i}" for i, t in enumerate(order)}


def _places(tokens: Iterable[Token], args: Iterable[Value], unordered: bool) -> dict[Token, Any]:
    """Where each token stands: what must be the same for tokens that a symmetry exchanges."""
    found: dict[Token, Any] = {t: [] for t in tokens}
    for i, x in enumerate(args):
        for term in x:
            for f in term.factors:
                if isinstance(f, Number):
                    continue
                name, places = (f.name, None) if isinstance(f, Load) else (f.body.digest, f.body.places)
                for at, t in enumerate(f.tokens):
                    if t in found and t not in term.bound:
                        found[t].append((0 if unordered else i, name, places[at] if places else at))
    for places in found.values():
        places.sort()
    return found


def _orders(ranks: Mapping[Token, Any]) -> Sequence[Tokens]:
    """All orders of tokens in which their ranks ascend; of too many, one."""
    ordered = sorted(ranks, key=lambda t: (ranks[t], t))
    groups = [list(group) for _, group in itertools.groupby(ordered, key=ranks.__getitem__)]
    if len(groups) == len(ordered) or math.prod(math.factorial(len(g)) for g in groups) > MOST_ORDERS:
        return (tuple(ordered),)
    return [tuple(itertools.chain(*order)) for order in itertools.product(*map(itertools.permutations, groups))]


# -- evaluation in the fields


class Point(NamedTuple):
    """A value at the random inputs: its free tokens, and an array over (field, *tokens) of its components in Z_p and
    in Z_q; the second is lost by exp."""

    tokens: Tokens
    words: Words

    @property
    def p(self) -> Words:
        return np.asarray(self.words[0])

    @property
    def q(self) -> Words | None:
        return np.asarray(self.words[1]) if len(self.words) == 2 else None


class Fingerprinter:
    """Evaluates values on inputs derived from `key`.

    base:   the axis that an alias stands for (aliases share inputs, sizes and weights)
    static: axes of known size, whose weights add up to it
    samples: independent inputs at once.  One is enough but for maxima, which are one of their operands: each element
            is the same operand by accident half of the time.  Axes are longer then: of two elements, a maximum
            taken off four times is always the same as one taken off twice.
    """

    def __init__(self, base: Mapping[str, str], static: Mapping[str, int], key: object = 0, samples: int = 1) -> None:
        self.base, self.static, self.key, self.samples = base, static, key, samples
        aliased = {b for a, b in base.items() if a != b}
        self.wide = {a for a in base if base[a] in aliased}
        self.omega = np.asarray(fields.order_q_element("search", key), dtype=U)
        self._bodies: dict[tuple[str, tuple[int, ...]], Words] = {}  # by digest and sizes; dimensions as parameters
        self._loads: dict[tuple[str, tuple[str, ...]], Words] = {}
        self._weights: dict[str, Words] = {}
        self.words = 0  # that what is kept takes

    def length(self, axis: str) -> int:
        return 3 if axis in self.wide or self.samples > 1 else 2

    def weights(self, axis: str) -> Words:
        """An array over (field, index)."""
        axis = self.base.get(axis, axis)
        found = self._weights.get(axis)
        if found is None:
            rows = [fields.random_words(("weight", axis, self.key), (self.length(axis),), m) for m in (P, Q)]
            for row, modulus in zip(rows, (P, Q), strict=True):
                if axis in self.static:
                    rest = int(row[:-1].sum()) % modulus
                    row[-1] = (self.static[axis] - rest) % modulus
            found = self._weights[axis] = np.stack(rows)
        return found

    def fingerprint(self, value: Value) -> Print:
        found = print_of(self.value(value))
        self.words += len(found[1]) // 8
        return found

    def value(self, value: Value) -> Point:
        found = self.term(value[0])
        for t in value[1:]:
            found = self.join(found, self.term(t), multiply_them=False)
        return found

    def term(self, term: Term) -> Point:
        point: Point | None = None
        for f, closed, _ in elimination(term):
            point = self.factor(f) if point is None else self.join(point, self.factor(f), multiply_them=True)
            for token in closed:
                point = self.integral(point, token)
        assert point is not None
        return point

    def integral(self, point: Point, token: Token) -> Point:
        at, words = point.tokens.index(token), point.words
        shape = [len(words)] + [1] * len(point.tokens)
        shape[at + 1] = -1
        # at most three products of words below 2**31 fit 64 bits
        found = (words * self.weights(token[0])[: len(words)].reshape(shape)).sum(axis=at + 1)
        return Point(point.tokens[:at] + point.tokens[at + 1 :], found % _moduli(found))

    def join(self, a: Point, b: Point, multiply_them: bool) -> Point:
        tokens = a.tokens if a.tokens == b.tokens else tuple(dict.fromkeys((*a.tokens, *b.tokens)))
        x, y = spread(a, tokens), spread(b, tokens)
        if len(x) != len(y):
            x, y = x[:1], y[:1]
        found = x * y if multiply_them else x + y
        return Point(tokens, found % _moduli(found))

    def factor(self, f: Factor) -> Point:
        match f:
            case Load(name, index):
                axes = tuple(t[0] for t in index)
                words = self._loads.get((name, axes))
                if words is None:
                    words = self._loads[name, axes] = self._random(name, tuple(map(self.length, axes)))
                return Point((SAMPLE, *index) if self.samples > 1 else index, words)
            case Number(coefficient, sizes):
                return Point((), self.number(coefficient, sizes))
            case Call(body=body, tokens=tokens) | Paren(body=body, tokens=tokens):
                words = self.body(body)
                sampled = words.ndim > len(tokens) + 1
                return Point((SAMPLE, *tokens) if sampled else tokens, words)

    def _random(self, name: str, shape: tuple[int, ...]) -> Words:
        # beyond MOST_AXES it is constant: then no value is compared, only the name
        shape = shape[:MOST_AXES] + (1,) * len(shape[MOST_AXES:])
        if self.samples > 1:
            shape = (self.samples, *shape)
        return np.stack([fields.random_words(("input", name, self.key), shape, m) for m in (P, Q)])

    def body(self, body: Body) -> Words:
        """The body, with dimensions as parameters.  What is inside comes first, without recursion."""
        pending = [body]
        while pending:
            top = pending[-1]
            known = self._at(top) in self._bodies
            inside = [] if known else [b for b in top.parts() if self._at(b) not in self._bodies]
            pending += inside
            if not inside:
                pending.pop()
                if not known:
                    found = self.called(top.fn, top.attrs, top.bound, [self.value(x) for x in top.args])
                    order = top.params if SAMPLE not in found.tokens else (SAMPLE, *top.params)
                    self._bodies[self._at(top)] = spread(found, order)
                    self.words += found.words.size
        return self._bodies[self._at(body)]

    def _at(self, body: Body) -> tuple[str, tuple[int, ...]]:
        return body.digest, tuple([self.length(axis) for axis, _ in body.params])

    def called(self, fn: str, attrs: tuple[Any, ...], bound: frozenset[Token], args: Sequence[Point]) -> Point:
        """The function at points; "" is a value in parentheses."""
        x = args[0]
        match fn:
            case "":
                return x
            case "inv":
                return Point(x.tokens, _inverse(x.words))
            case "exp" if len(x.words) == 2:
                return Point(x.tokens, fields.power(self.omega, x.words[1:], P))
            case "exp":
                return self.opaque(("exp",), args)
            case "max" | "min":
                return self.extreme(fn, bound, args)
            case "relu":
                return self.extreme("max", NOTHING, [x, Point((), np.zeros((2,), dtype=U))])
            case "silu":
                return self.join(x, self.called("sigmoid", (), NOTHING, args), multiply_them=True)
            case "and" | "or":
                return self.opaque(fn, args, ordered=False)
            case _:
                return self.opaque((fn, attrs, sorted(t[0] for t in bound)), args)

    def number(self, coefficient: Fraction, sizes: tuple[tuple[str, int], ...]) -> Words:
        found = []
        for i, modulus in enumerate((P, Q)):
            result = fields.rational(coefficient.numerator, coefficient.denominator, modulus)
            for axis, power in sizes:
                count = int(self.weights(axis)[i].sum()) % modulus
                result = result * pow(count, power, modulus) % modulus
            found.append(result)
        return np.array(found, dtype=U)

    def opaque(self, fn: object, args: Sequence[Point], ordered: bool = True) -> Point:
        tokens = tuple(dict.fromkeys(t for a in args for t in a.tokens))
        mixed: Words = np.zeros((1,), dtype=U)
        if not ordered:
            each = (fields.keyed_hash(spread(a, tokens)[:1], (fn, "each"), 2**62) for a in args)
            args = [Point(tokens, sum(each, mixed))]
        for i, a in enumerate(args):
            x = spread(a, tokens)[:1]
            mixed = fields.keyed_hash(np.asarray(x * U(2) if i == 0 else mixed + x * U(2)), (fn, i), 2**62)
        return Point(tokens, np.concatenate([fields.keyed_hash(mixed, (fn, k), m) for k, m in (("p", P), ("q", Q))]))

    def extreme(self, fn: str, bound: frozenset[Token], args: Sequence[Point]) -> Point:
        """max or min under a random order of Z_p in each sample: commutative, associative, idempotent.  Zero comes last
        in half of them: among many elements it would hardly ever win."""
        tokens = tuple(dict.fromkeys([SAMPLE, *(t for a in args for t in a.tokens)]))
        kept = min(len(a.words) for a in args)
        salts = fields.random_words(("order", fn, self.key), (self.samples,), P)

        def rank(words: Words) -> Words:
            salt = salts.reshape(-1, *[1] * (words.ndim - 2))
            found: Words = fields.keyed_hash(words[:1] ^ salt, fn, 2**62)
            return np.where((words[:1] == 0) & (salt % U(2) == 0), U(2**62), found)

        words = spread(args[0], tokens)[:kept]
        words = np.broadcast_to(words, (kept, self.samples, *words.shape[2:]))
        for other in args[1:]:
            words2 = spread(other, tokens)[:kept]
            words = np.where(rank(words) >= rank(words2), words, words2)
        for token in sorted(bound & set(tokens)):
            at = tokens.index(token) + 1
            best = np.expand_dims(rank(words).argmax(axis=at), at)
            words = np.concatenate([np.take_along_axis(w[None], best, axis=at) for w in words]).squeeze(at)
            tokens = tokens[: at - 1] + tokens[at:]
        return Point(tokens, words)


_MODULI = [np.array([P, Q], dtype=U).reshape(2, *[1] * n) for n in range(32)]


def _moduli(words: Words) -> Words:
    """The moduli of an array over (field, ...)."""
    found = _MODULI[words.ndim - 1]
    return found if len(words) == 2 else found[:1]


FEW_WORDS = 128  # below, one inverse after the other is faster than all at once


def _inverse(words: Words) -> Words:
    """1 / word; 0 for 0."""
    if words.size > FEW_WORDS:
        return np.stack([fields.inverse(row, m) for row, m in zip(words, (P, Q), strict=False)])
    rows = [[pow(x, -1, m) if x else 0 for x in row.ravel().tolist()] for row, m in zip(words, (P, Q), strict=False)]
    return np.array(rows, dtype=U).reshape(words.shape)


def print_of(point: Point) -> Print:
    order = sorted(range(len(point.tokens)), key=lambda i: point.tokens[i])
    axes = tuple(point.tokens[i][0] for i in order if point.tokens[i] != SAMPLE)
    return axes, point.words[0].transpose(order).tobytes()


def spread(point: Point, tokens: Tokens) -> Words:
    """The components with one dimension per token, of size 1 where the point lacks the token."""
    own, words = point.tokens, point.words
    if own == tokens:
        return words
    order = [own.index(t) + 1 for t in tokens if t in own]
    if order != sorted(order):
        words = words.transpose(0, *order)
    if len(own) == len(tokens):
        return words
    return words[(slice(None), *(slice(None) if t in own else None for t in tokens))]


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
