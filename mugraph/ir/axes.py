"""Sizes and axes.

    Size = int | Dim | Monomial          Monomial = coefficient * Dim ** power * ...
    Axis = (name, Size)

An axis is a named index.  Two tensors that share an axis name share that index, so shapes never have to be
matched by position once a program is traced.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from mugraph.errors import ShapeError

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True, order=True)
class Dim:
    """A symbolic size with an admissible range, `min <= name <= max`."""

    name: str
    min: int = 1
    max: int = MAX_SIZE

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ShapeError(f"a Dim is named by an identifier, not {self.name!r}")
        if not 1 <= self.min <= self.max <= MAX_SIZE:
            raise ShapeError(
                f"Dim {self.name} has the empty or invalid range {self.min}..{self.max}",
                remedy=f"give 1 <= min <= max <= {MAX_SIZE}",
            )

    def __mul__(self, other: Size) -> Size:
        return times(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Size) -> Size:
        return over(self, other)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Monomial:
    """`coefficient * Π dim**power`: what products and quotients of sizes come to.  Powers are sorted, never zero."""

    coefficient: Fraction
    powers: tuple[tuple[Dim, int], ...]

    def __mul__(self, other: Size) -> Size:
        return times(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Size) -> Size:
        return over(self, other)

    def __str__(self) -> str:
        head = [] if self.coefficient == 1 else [str(self.coefficient)]
        return "*".join(head + [d.name if p == 1 else f"{d.name}^{p}" for d, p in self.powers])


Size = int | Dim | Monomial


def _monomial(size: Size) -> Monomial:
    match size:
        case int():
            return Monomial(Fraction(size), ())
        case Dim():
            return Monomial(Fraction(1), ((size, 1),))
        case Monomial():
            return size


def _simplest(coefficient: Fraction, powers: Mapping[Dim, int]) -> Size:
    kept = tuple(sorted((d, p) for d, p in powers.items() if p))
    if not kept and coefficient.denominator == 1:
        return int(coefficient)
    if coefficient == 1 and len(kept) == 1 and kept[0][1] == 1:
        return kept[0][0]
    return Monomial(coefficient, kept)


def _combine(a: Size, b: Size, sign: int) -> Size:
    x, y = _monomial(a), _monomial(b)
    powers = dict(x.powers)
    for dim, power in y.powers:
        powers[dim] = powers.get(dim, 0) + sign * power
    return _simplest(x.coefficient * y.coefficient**sign, powers)


def times(a: Size, b: Size) -> Size:
    """`a * b`, in simplest form."""
    return _combine(a, b, 1)


def over(a: Size, b: Size) -> Size:
    """`a / b`, in simplest form.  A static quotient must be whole; a symbolic one is checked when it gets a value."""
    result = _combine(a, b, -1)
    if isinstance(result, Monomial) and not result.powers:
        raise ShapeError(f"{b} does not divide {a}")
    return result


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = times(result, size)
    return result


def dims_of(size: Size) -> tuple[Dim, ...]:
    """The symbols in a size."""
    return tuple(d for d, _ in _monomial(size).powers)


def determined(sizes: Iterable[Size]) -> set[Dim]:
    """The symbols of which the values of these sizes give those: each from a size whose other symbols are known.

    >>> b, s = Dim("B"), Dim("S")
    >>> sorted(d.name for d in determined([b * s, s * 4])), determined([b * s])
    (['B', 'S'], set())
    """
    found: set[Dim] = set()
    powers = [_monomial(size).powers for size in sizes]
    while more := {d for p in powers for d, n in p if n > 0 and {o for o, _ in p} - found == {d}}:
        found |= more
    return found


def size_value(size: Size, bindings: Mapping[str, int]) -> int:
    """The size as an int, given values by Dim name.  Raises ShapeError if one is missing or the result is not whole."""
    m = _monomial(size)
    value = m.coefficient
    for dim, power in m.powers:
        if dim.name not in bindings:
            raise ShapeError(f"the size {dim.name} has no value", remedy=f"bind it: {{'{dim.name}': 16}}")
        value *= Fraction(bindings[dim.name]) ** power
    if value.denominator != 1:
        raise ShapeError(f"the size {size} is {value} at {dict(bindings)}, not a whole number")
    return int(value)


def largest(size: Size) -> int:
    """The greatest value that a size may take."""
    m = _monomial(size)
    value = m.coefficient
    for dim, power in m.powers:
        value *= Fraction(dim.max if power > 0 else dim.min) ** power
    return math.ceil(value)


@dataclass(frozen=True, order=True)
class Axis:
    """A named index that runs over `range(size)`."""

    name: str
    size: Size

    def __str__(self) -> str:
        return self.name


def representative(size: Size, symbolic: int = 16) -> int:
    """A concrete size for costing: symbols take `symbolic`, clipped to their range."""
    return size_value(size, {d.name: min(max(symbolic, d.min), d.max) for d in dims_of(size)})
