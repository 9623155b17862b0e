"""All formula trees over given leaves and operators that compute a target: what the closure is measured against.

A tree is made of loads, constants, functions, additions and contractions (a product, and any held axes closed), each
leaf, function and addition used exactly as often as given.  Trees meet by value modulo a prime, with three elements
an axis and plain sums.  Nothing cancels: constants are taken positive, and the reciprocal is a random power, which
goes through products as the reciprocal does, but `x · inv(x)` is nothing special.  Shares nothing with the search but
the data types of values.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mugraph.search.values import Call, Factor, Load, Number, Paren, Term, Token, Value

PRIME = 2**31 - 1
SIZE = 3
ADD = "+"

Words = npt.NDArray[np.int64]
Key = tuple[tuple[Token, ...], bytes]
Supply = tuple[int, ...]  # how many of each leaf, function and ADD
Node = tuple[Supply, Key]


@dataclass(frozen=True, eq=False)
class Array:
    """Entries modulo PRIME, one dimension a token, in ascending order of tokens."""

    tokens: tuple[Token, ...]
    words: Words

    @property
    def key(self) -> Key:
        return self.tokens, np.ascontiguousarray(self.words).tobytes()


# -- evaluation


def joined(a: Array, b: Array, operation: Callable[[Words, Words], Words]) -> Array:
    tokens = tuple(sorted({*a.tokens, *b.tokens}))
    left, right = (x.words[tuple(slice(None) if t in x.tokens else None for t in tokens)] for x in (a, b))
    return Array(tokens, operation(left, right) % PRIME)


def times(a: Array, b: Array) -> Array:
    return joined(a, b, np.multiply)


def plus(a: Array, b: Array) -> Array:
    return joined(a, b, np.add)


def summed(x: Array, over: Iterable[Token]) -> Array:
    gone = set(over)
    at = tuple(i for i, t in enumerate(x.tokens) if t in gone)
    return Array(tuple(t for t in x.tokens if t not in gone), x.words.sum(axis=at) % PRIME if at else x.words)


def function(fn: str, x: Array) -> Array:
    """A random power in place of the reciprocal, a random polynomial of degree 7 in place of an opaque function."""
    r = random.Random(f"function {fn}")
    if fn == "inv":
        exponent = r.randrange(PRIME)
        return each(x, lambda n: pow(n, exponent, PRIME))
    a, b, c = (r.randrange(1, PRIME) for _ in range(3))
    return each(x, lambda n: a * pow(n + b, 7, PRIME) + c)


def each(x: Array, entry: Callable[[int], int]) -> Array:
    flat = [entry(int(n)) % PRIME for n in x.words.ravel()]
    return Array(x.tokens, np.array(flat, dtype=np.int64).reshape(x.words.shape))


def loaded(f: Load) -> Array:
    r = random.Random(f"input {f.name}")
    words = np.array([r.randrange(1, PRIME) for _ in range(SIZE ** len(f.tokens))], dtype=np.int64)
    order = sorted(range(len(f.tokens)), key=lambda i: f.tokens[i])
    shaped = words.reshape((SIZE,) * len(f.tokens))
    return Array(tuple(f.tokens[i] for i in order), shaped.transpose(order) if order else shaped)


def of_value(value: Value) -> Array:
    terms = [of_term(t) for t in value]
    return _fold(terms, plus)


def of_term(term: Term) -> Array:
    return summed(_fold([of_factor(f) for f in term.factors], times), term.bound)


def of_factor(f: Factor) -> Array:
    match f:
        case Load():
            return loaded(f)
        case Number(coefficient, sizes):
            number = coefficient.numerator * pow(coefficient.denominator, -1, PRIME)
            for _, power in sizes:
                number *= pow(SIZE, power, PRIME)
            return Array((), np.array(number % PRIME, dtype=np.int64))
        case Paren(value):
            return of_value(value)
        case Call(fn, _, _, (arg,)):
            return function(fn, of_value(arg))
        case _:
            raise AssertionError(f"not in these tests: {f}")


def _fold(arrays: list[Array], operation: Callable[[Array, Array], Array]) -> Array:
    result = arrays[0]
    for other in arrays[1:]:
        result = operation(result, other)
    return result


# -- enumeration


@dataclass
class Entry:
    array: Array
    ways: list[tuple[Node, ...]] = field(default_factory=list)  # operands, () for a leaf


class Trees:
    """The trees of a target.  leaves, functions and the number of additions are what each tree is made of; closable
    are the axes that may be closed."""

    def __init__(
        self,
        target: Array,
        leaves: Iterable[Load | Number],
        functions: Iterable[str] = (),
        additions: int = 0,
        closable: str = "",
    ) -> None:
        self.target = target
        supply = Counter[Load | Number | str]([*leaves, *functions])
        supply[ADD] = additions
        self.kinds = list(supply)
        self.whole: Supply = tuple(supply.values())
        self.closable = [(a, 0) for a in closable]
        self.tables: dict[Supply, dict[Key, Entry]] = {}
        for s in sorted(itertools.product(*(range(n + 1) for n in self.whole)), key=lambda s: (sum(s), s)):
            self.tables[s] = {}
            self.fill(s)

    @property
    def tried(self) -> int:
        return sum(map(len, self.tables.values()))

    def fill(self, s: Supply) -> None:
        if sum(s) == 1 and not isinstance(leaf := self.kinds[s.index(1)], str):
            self.put(s, of_factor(leaf), ())
        for i, kind in enumerate(self.kinds):
            if isinstance(kind, str) and kind != ADD and s[i]:
                rest = _less(s, i)
                for key, entry in self.tables[rest].items():
                    self.put(s, function(kind, entry.array), ((rest, key),))
        self.binary(s, s, adding=False)
        at = self.kinds.index(ADD)
        if s[at]:
            self.binary(s, _less(s, at), adding=True)
        pending = list(self.tables[s])
        while pending:
            key = pending.pop()
            for axes in self.subsets(s, self.tables[s][key].array):
                new = summed(self.tables[s][key].array, axes)
                if axes and self.put(s, new, ((s, key),)):
                    pending.append(new.key)

    def binary(self, s: Supply, operands: Supply, adding: bool) -> None:
        for a in itertools.product(*(range(n + 1) for n in operands)):
            b = tuple(n - m for n, m in zip(operands, a, strict=True))
            if a > b or not any(a) or not any(b):
                continue
            for (ka, x), (kb, y) in itertools.product(self.tables[a].items(), self.tables[b].items()):
                ways = ((a, ka), (b, kb))
                if adding:
                    self.put(s, plus(x.array, y.array), ways)
                    continue
                product = times(x.array, y.array)
                for axes in self.subsets(s, product):
                    self.put(s, summed(product, axes), ways)

    def subsets(self, s: Supply, x: Array) -> Iterator[tuple[Token, ...]]:
        """The axes that may be closed next: of whole trees, those that the target lacks."""
        held = [t for t in self.closable if t in x.tokens]
        if s == self.whole:
            held = [t for t in held if t not in self.target.tokens]
            if {*x.tokens}.difference(held) == {*self.target.tokens}:
                yield tuple(held)
            return
        for n in range(len(held) + 1):
            yield from itertools.combinations(held, n)

    def put(self, s: Supply, array: Array, way: tuple[Node, ...]) -> bool:
        """True if the value is new."""
        entry = self.tables[s].get(array.key)
        if new := entry is None:
            entry = self.tables[s][array.key] = Entry(array)
        entry.ways.append(way)
        return new

    # -- questions

    @property
    def compute_it(self) -> bool:
        return self.target.key in self.tables[self.whole]

    def missing(self, known: set[Key], exempt: Callable[[Array], bool]) -> list[Array]:
        """Values of trees of the target that are not known, where a tree ends at a value that is exempt."""
        found: dict[Key, Array] = {}
        seen: set[Node] = set()
        pending = [(self.whole, self.target.key)]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            for way in self.entry(node).ways:
                unknown = [self.entry(x).array for x in way if x[1] not in known]
                if any(exempt(x) for x in unknown):
                    continue
                found.update((x.key, x) for x in unknown)
                pending += way
        return list(found.values())

    def on_a_path(self) -> set[Key]:
        """Every value of every tree of the target."""
        seen: set[Node] = set()
        pending = [(self.whole, self.target.key)]
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending += [x for way in self.entry(node).ways for x in way]
        return {key for _, key in seen}

    def entry(self, node: Node) -> Entry:
        supply, key = node
        return self.tables[supply][key]


def _less(s: Supply, i: int) -> Supply:
    return (*s[:i], s[i] - 1, *s[i + 1 :])
