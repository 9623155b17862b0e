"""Abstractions prune the bottom-up enumeration: each says which values may lead to a target.

    closure   the value is a class of the closure: exact up to the laws
    size      the value's abstract expression is part of a target's: sums are known by their size only
    off       every value

`size` is the published abstraction of Mirage (Wu et al., OSDI'25, section 4.3), over this calculus.  Its terms are

    E = name | number | add(E, E) | mul(E, E) | inv(E) | fn(E, ...) | max(size, E) | sum(size, E)

An input is its name, whatever its index, and a sum over an axis is `sum` of the axis's size: which axis it was is
forgotten, so `sum(d, q) · k` passes for a part of `sum(d, q · k)`.  The axioms make add and mul commutative and
associative, let mul distribute over add, and let sum(i, .) nest as sum(i·j, .), distribute over add and move out of
a factor of mul; inv goes through mul (the published `div` is `mul` with `inv`).  Nothing cancels: `mul(x, inv(x))`
stays, or else everything would be part of everything.  `x` is *part of* `y` if y can be written, by the axioms, with
x as an operand at any depth.

The published system asks an SMT solver or an e-graph.  Here the axioms have a normal form, and no solver is needed:
an expression is a multiset of monomials, and a monomial is a size with a multiset of atoms (names, numbers, calls of
normal forms).  A context over add, mul and sum is a monomial z with the rest added on, so x is part of y iff, for
some z, x·z is contained in y, in the argument of some atom within y, or in the product of some monomial's inverses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple, Protocol, assert_never

from mugraph.errors import SettingError
from mugraph.search import values as v
from mugraph.search.closure import Edge
from mugraph.search.values import Call, Load, Number, Paren, Print, Value

AbstractionName = Literal["closure", "size", "off"]
ABSTRACTIONS: tuple[AbstractionName, ...] = ("closure", "size", "off")

LARGEST = 4096  # monomials of a target's expression: of a larger one, every value counts as a part


class Monomial(NamedTuple):
    """sum(size, product of atoms).  Atoms are numbered by `Expressions`, in ascending order, repeated."""

    size: int
    atoms: tuple[int, ...]


Expression = tuple[Monomial, ...]  # in ascending order, repeated: a sum


class Abstraction(Protocol):
    """Decides, before a candidate is evaluated, whether it can lead to a target, and what is known of it then.

    `of` gets the operator, what is known of the operands and the free axes of the result; None refuses it.
    `admits` sees the fingerprint of what was not refused.
    """

    def of(self, operator: Edge, operands: Sequence[Expression], axes: tuple[str, ...]) -> Expression | None: ...

    def admits(self, found: Print) -> bool: ...


class Off:
    """Every value may lead to a target."""

    def of(self, operator: Edge, operands: Sequence[Expression], axes: tuple[str, ...]) -> Expression | None:
        return ()

    def admits(self, found: Print) -> bool:
        return True


class InClosure:
    """Only the classes of a closure, by fingerprint."""

    def __init__(self, classes: Iterable[Print]) -> None:
        self.classes = frozenset(classes)
        self.axes = {axes for axes, _ in self.classes}

    def of(self, operator: Edge, operands: Sequence[Expression], axes: tuple[str, ...]) -> Expression | None:
        return () if axes in self.axes else None

    def admits(self, found: Print) -> bool:
        return found in self.classes


class BySize:
    """Only values whose abstract expression is part of that of a target.  sizes: axis -> size."""

    def __init__(self, targets: Iterable[Value], sizes: Mapping[str, int]) -> None:
        self.expressions = Expressions(sizes)
        self._known: dict[Expression, bool] = {}
        self.contexts: list[Expression] | None = None
        with suppress(TooLarge):  # then nothing is pruned
            self.contexts = self.expressions.contexts([self.expressions.of_value(t) for t in targets])
        self.largest = max(map(len, self.contexts), default=0) if self.contexts is not None else LARGEST

    def of(self, operator: Edge, operands: Sequence[Expression], axes: tuple[str, ...]) -> Expression | None:
        if self.contexts is None:
            return ()
        try:
            found = self.expressions.of_edge(operator, operands, self.largest)
        except TooLarge:
            return None  # nothing cancels, so a part has no more monomials than the whole
        known = self._known.get(found)
        if known is None:
            known = self._known[found] = any(is_contained(found, y) for y in self.contexts)
        return found if known else None

    def admits(self, found: Print) -> bool:
        return True


class TooLarge(Exception):
    """An expression has more monomials than are looked at."""


class Expressions:
    """Normal forms of abstract expressions, with atoms numbered in order of their first use."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.atoms: dict[tuple[object, ...], int] = {}
        self.keys: list[tuple[object, ...]] = []

    def atom(self, *key: object) -> int:
        found = self.atoms.setdefault(key, len(self.keys))
        if found == len(self.keys):
            self.keys.append(key)
        return found

    def size(self, axes: Iterable[str]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    # -- one expression from others

    def of_edge(self, e: Edge, operands: Sequence[Expression], most: int = LARGEST) -> Expression:
        """The expression of an operator's result.  Raises TooLarge beyond `most` monomials."""
        match e.kind:
            case "load" | "number":
                assert e.leaf is not None
                return self.of_leaf(e.leaf)
            case "product" | "sum":
                return summed(self.size(e.axes), product(operands, most))
            case "add":
                return added(operands, most)
            case "call" if e.fn == "inv":
                return self.inverse(operands[0], most)
            case "call":
                ordered = sorted(operands) if e.fn in ("max", "min") else operands
                return self._one(self.atom(e.fn, e.attrs, 1, tuple(ordered)))
            case "reduce":
                return self._one(self.atom(e.fn, (), self.size(e.axes), tuple(operands)))
            case _:
                assert_never(e.kind)

    def of_leaf(self, f: Load | Number) -> Expression:
        if isinstance(f, Load):
            return self._one(self.atom("load", f.name))
        atoms = [] if f.coefficient == 1 else [self.atom("number", f.coefficient)]
        for axis, power in f.sizes:
            atoms += [self.atom("size", self.sizes[axis], power > 0)] * abs(power)
        return (Monomial(1, tuple(sorted(atoms))),)

    def inverse(self, x: Expression, most: int) -> Expression:
        """inv of a product is the product of inverses; of a sum it is an atom."""
        if len(x) > 1:
            return self._one(self.atom("inv", (), 1, (x,)))
        only = x[0]
        factors = [self._inverse_of_atom(a) for a in only.atoms]
        if only.size != 1:
            factors.append(self._one(self.atom("inv", (), only.size, ())))
        return product(factors, most)

    def _inverse_of_atom(self, atom: int) -> Expression:
        match self.keys[atom]:
            case ("inv", _, int(size), ()):
                return (Monomial(size, ()),)
            case ("inv", _, _, (tuple(argument),)):
                return argument
            case _:
                return self._one(self.atom("inv", (), 1, (self._one(atom),)))

    def _one(self, atom: int) -> Expression:
        return (Monomial(1, (atom,)),)

    # -- of a whole value

    def of_value(self, value: Value) -> Expression:
        terms = []
        for t in value:
            factors = [self.of_factor(f) for f in t.factors]
            terms.append(summed(self.size(token[0] for token in t.bound), product(factors, LARGEST)))
        return added(terms, LARGEST)

    def of_factor(self, f: v.Factor) -> Expression:
        match f:
            case Load() | Number():
                return self.of_leaf(f)
            case Paren(value):
                return self.of_value(value)
            case Call(fn, attrs, bound, args):
                axes = tuple(sorted(t[0] for t in bound))
                edge = Edge("reduce" if axes else "call", (), axes, fn, attrs)
                return self.of_edge(edge, [self.of_value(a) for a in args])

    # -- what parts may be contained in

    def contexts(self, targets: Iterable[Expression]) -> list[Expression]:
        """The targets, the arguments of atoms within them at any depth, and the denominators of their monomials."""
        found: dict[Expression, None] = {}
        pending = list(targets)
        while pending:
            x = pending.pop()
            if x in found:
                continue
            found[x] = None
            for m in x:
                inverses = []
                for a in m.atoms:
                    pending += self._arguments(a)
                    if self.keys[a][0] == "inv":
                        inverses.append(self._inverse_of_atom(a))
                if len(inverses) > 1:
                    pending.append(product(inverses, LARGEST))
        return list(found)

    def _arguments(self, atom: int) -> list[Expression]:
        key = self.keys[atom]
        return list(key[3]) if len(key) == 4 else []  # type: ignore[call-overload]


def product(operands: Iterable[Expression], most: int) -> Expression:
    result: Expression = (Monomial(1, ()),)
    for x in operands:
        if len(result) * len(x) > most:
            raise TooLarge
        result = tuple(sorted(times(m, n) for m in result for n in x))
    return result


def times(m: Monomial, n: Monomial) -> Monomial:
    return Monomial(m.size * n.size, tuple(sorted(m.atoms + n.atoms)))


def summed(size: int, x: Expression) -> Expression:
    return tuple(sorted(Monomial(size * m.size, m.atoms) for m in x)) if size != 1 else x


def added(operands: Iterable[Expression], most: int) -> Expression:
    result = tuple(sorted(m for x in operands for m in x))
    if len(result) > most:
        raise TooLarge
    return result


def is_contained(x: Expression, y: Expression) -> bool:
    """Some monomial z makes x·z a part of the multiset y."""
    if len(x) > len(y):
        return False
    whole = Counter(y)
    for m in dict.fromkeys(y):
        z = quotient(m, x[0])
        if z is not None and Counter(times(n, z) for n in x) <= whole:
            return True
    return False


def quotient(m: Monomial, n: Monomial) -> Monomial | None:
    """m / n, or None where n does not divide m."""
    rest = Counter(m.atoms)
    rest.subtract(n.atoms)
    if m.size % n.size or any(count < 0 for count in rest.values()):
        return None
    return Monomial(m.size // n.size, tuple(sorted(rest.elements())))


def abstraction(
    name: AbstractionName, classes: Iterable[Print], targets: Iterable[Value], sizes: Mapping[str, int]
) -> Abstraction:
    """The abstraction of a name.

    classes are the fingerprints of a closure, targets the values to lead to, sizes axis -> size.  Raises SettingError
    for an unknown name.
    """
    match name:
        case "closure":
            return InClosure(classes)
        case "size":
            return BySize(targets, sizes)
        case "off":
            return Off()
        case _:
            raise SettingError(f"unknown abstraction {name!r}", remedy=f"known: {', '.join(ABSTRACTIONS)}")
