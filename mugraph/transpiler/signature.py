"""What a caller of an emitted function sees: parameters, their shapes, and where each symbolic size comes from.

Every symbolic size is read from the shape of an input.  `bindings` says which one, for emitted text and for checks
at launch alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mugraph.errors import GraphError
from mugraph.ir.axes import Dim, Monomial, Size
from mugraph.ir.graph import Program
from mugraph.ir.types import Tensor

Powers = tuple[tuple[Dim, int], ...]


@dataclass(frozen=True)
class Binding:
    """`dim ** power = shape[position] / (coefficient * Π others)`, where `shape` is the shape of input `source`."""

    dim: Dim
    source: str
    position: int
    power: int = 1
    coefficient: Fraction = Fraction(1)
    others: Powers = ()

    def text(self, shape: str, names: Mapping[Dim, str] | None = None) -> str:
        """The size as a Python expression, given the expression of the input's shape and the names of other sizes.

        >>> Binding(Dim("B"), "X", 0, coefficient=Fraction(2)).text("X.shape")
        'X.shape[0] // 2'
        """
        divisor = size_text(Monomial(self.coefficient, self.others), names)
        quotient = _quotient_text(f"{shape}[{self.position}]", divisor)
        return quotient if self.power == 1 else f"round(({quotient}) ** (1 / {self.power}))"

    def value(self, size: int, known: Mapping[str, int]) -> int | None:
        """The value of the dim where the dimension has this size; None if no whole number gives that size."""
        if self.power == 1 and self.coefficient == 1 and not self.others:
            return size
        rest = self.coefficient
        for dim, power in self.others:
            rest *= Fraction(known[dim.name]) ** power
        found = Fraction(size) / rest
        root = round(float(found) ** (1 / self.power))
        return root if Fraction(root) ** self.power == found else None


def bindings(program: Program) -> tuple[Binding, ...]:
    """Where each symbolic size of the program comes from, in an order in which each needs only earlier ones.

    Plain dimensions come before products, and those before powers.  Raises GraphError if the inputs' shapes do not
    determine a size.
    """
    found: dict[Dim, Binding] = {}
    wanted = set(program.dims())
    while missing := wanted - set(found):
        candidates = [b for b in _candidates(program) if b.dim in missing and {d for d, _ in b.others} <= set(found)]
        if not candidates:
            names = ", ".join(sorted(d.name for d in missing))
            raise GraphError(
                f"the shapes of the inputs of {program.name} do not determine {names}",
                remedy="give an input that has it as a dimension",
            )
        best = min(candidates, key=lambda b: (b.power, len(b.others), b.coefficient != 1))
        found[best.dim] = best
    return tuple(found.values())


def _candidates(program: Program) -> Iterator[Binding]:
    for i in program.inputs:
        for position, size in enumerate(i.tensor.shape):
            coefficient, powers = _parts(size)
            for dim, power in powers:
                if power > 0:
                    others = tuple(p for p in powers if p[0] != dim)
                    yield Binding(dim, i.name, position, power, coefficient, others)


def size_text(size: Size, names: Mapping[Dim, str] | None = None) -> str:
    """A size as a Python expression over the names of its dims: their own unless `names` has others.

    >>> size_text(Dim("B") * 4)
    '4 * B'
    """
    coefficient, powers = _parts(size)
    up = [str(coefficient.numerator)] * (coefficient.numerator != 1) + _factors(powers, 1, names)
    down = [str(coefficient.denominator)] * (coefficient.denominator != 1) + _factors(powers, -1, names)
    return _quotient_text(" * ".join(up) or "1", " * ".join(down) or "1")


def _quotient_text(numerator: str, divisor: str) -> str:
    if divisor == "1":
        return numerator
    return f"{numerator} // ({divisor})" if " " in divisor else f"{numerator} // {divisor}"


def _factors(powers: Powers, sign: int, names: Mapping[Dim, str] | None) -> list[str]:
    found = [((names or {}).get(d, d.name), p * sign) for d, p in powers if p * sign > 0]
    return [name if p == 1 else f"{name}**{p}" for name, p in found]


def _parts(size: Size) -> tuple[Fraction, Powers]:
    match size:
        case int():
            return Fraction(size), ()
        case Dim():
            return Fraction(1), ((size, 1),)
        case Monomial(coefficient, powers):
            return coefficient, powers


def shape_text(tensor: Tensor) -> str:
    """`f16[B, 4096]`: element type and sizes, as the caller sees them."""
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def shapes_text(tensors: Sequence[Tensor]) -> str:
    """`Y: f16[B, 64], Z: f32[B]`"""
    return ", ".join(f"{t.name}: {shape_text(t)}" for t in tensors)
