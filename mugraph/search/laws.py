"""From a program to values, and the named laws that add seeds.

The structural laws (sums and products are associative and commutative, Σ is linear, co-factors move through sums,
inv(ab) = inv a · inv b, congruence) are in the normal form of `values` and in the rules of `closure`.  A named law
gives another expression of an output; it counts only if the fingerprint says that it is the same value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Const,
    Contract,
    Elementwise,
    Iota,
    MaskedExp,
    Reduce,
    Rename,
    Reshape,
    Select,
    SizeOf,
    Transpose,
)  # fmt: skip
from mugraph.search import values as v
from mugraph.search.canonical import bases
from mugraph.search.values import Body, Call, Factor, Number, Paren, Term, Value

MOST_FACTORS = 10  # of a term: rule a looks at all their subsets
MOST_TERMS = 64  # of a sum; a longer one has sums as terms
MOST_BITS = 1024  # of a coefficient
MOST_NAMINGS = 120  # of the bound axes of a term: each axis five times, say
IOTA = "#iota"  # the index along an axis: computed where it is used, not loaded


@dataclass(frozen=True)
class Meaning:
    """What a program computes: a value per kernel-level name, the boundaries (results of operators outside the
    calculus, taken as they are) and, for aliases, the axis that each axis stands for."""

    values: Mapping[str, Value]
    boundaries: tuple[Equation, ...]
    base: Mapping[str, str]


def meaning(program: Program) -> Meaning:
    """The value of every equation of the program."""
    found: dict[str, Value] = {i.name: v.load(i.name, (a.name for a in i.tensor.axes)) for i in program.inputs}
    base = bases(program)
    boundaries: list[Equation] = []
    for e in program.equations:
        value = equation_value(e, [found[a] for a in e.args])
        if value is None:
            boundaries.append(e)
            found.update((t.name, v.load(t.name, (a.name for a in t.axes))) for t in e.targets)
        else:
            found[e.target.name] = value
    return Meaning(found, tuple(boundaries), base)


def equation_value(e: Equation, args: list[Value]) -> Value | None:
    """The value of one equation, or None where the operator is outside the calculus, or the value has too many axes."""
    value = _equation_value(e, args)
    return None if value is None or v.width(value) > v.MOST_AXES else value


def _equation_value(e: Equation, args: list[Value]) -> Value | None:
    match e.op:
        case Elementwise(fn, attrs):
            value = _function(fn, dict(attrs), args)
            return value if _is_tractable(value) else v.call(fn, *args, attrs=tuple(sorted(attrs)))
        case Const(value):
            return v.number(value)
        case SizeOf(axis):
            return v.size(axis.name)
        case Contract(axes):
            total = v.total(v.multiply(*args), axes)
            return total if _is_tractable(total) else None
        case Reduce("sum", axes):
            return v.total(args[0], axes)
        case Reduce("mean", axes):
            return v.multiply(v.total(args[0], axes), *(v.size(a, -1) for a in axes))
        case Reduce("max" | "min" as kind, axes):
            return v.reduction(kind, args[0], axes)
        case Compare(relation):
            return v.call("compare", *args, attrs=(relation,))
        case Select():
            return v.call("select", *args)
        case MaskedExp():
            return v.call("masked_exp", *args)
        case Iota(axis):
            return v.load(IOTA, (axis.name,))
        case Cast(dtype):
            return args[0] if dtype.is_float else v.call("cast", args[0], attrs=(dtype.value,))
        case Transpose() | Broadcast():
            return args[0]
        case Reshape():
            same = {t[0] for t in v.free_tokens(args[0])} <= {a.name for a in e.target.axes}
            return args[0] if same else None
        case Rename(pairs):
            return v.rename(args[0], {(old, 0): (new.name, 0) for old, new in pairs})
        case _:
            return None


def _is_tractable(value: Value) -> bool:
    """Whether no term has more factors, or more ways to name its bound axes, than rule a and the key can go through,
    nor a longer coefficient or more axes than are computed with.  What is not is a function of its own, or a
    boundary."""

    def namings(t: Term) -> int:
        return math.prod(map(math.factorial, Counter(axis for axis, _ in t.bound).values()))

    def bits(t: Term) -> int:
        numbers = [f.coefficient for f in t.factors if isinstance(f, Number)]
        return max((max(abs(n.numerator), n.denominator).bit_length() for n in numbers), default=0)

    return v.width(value) <= v.MOST_AXES and all(
        len(t.factors) <= MOST_FACTORS and namings(t) <= MOST_NAMINGS and bits(t) <= MOST_BITS for t in value
    )


def _sum(*values: Value) -> Value:
    """The sum; terms of a long one stay in parentheses."""
    if sum(map(len, values)) > MOST_TERMS:
        return tuple(v.as_term(x) for x in values)
    return v.add(*values)


def _function(fn: str, attrs: Mapping[str, str | Fraction], args: list[Value]) -> Value:
    x = args[0]
    match fn:
        case "add":
            return hoisted(_sum(*args))
        case "sub":
            return hoisted(_sum(x, v.negate(args[1])))
        case "mul":
            return v.multiply(*args)
        case "div":
            return v.multiply(x, v.invert(args[1]))
        case "neg":
            return v.negate(x)
        case "reciprocal":
            return v.invert(x)
        case "square":
            return v.multiply(x, x)
        case "rsqrt":
            return v.invert(v.call("sqrt", x))
        case "pow" if Fraction(attrs["exponent"]).denominator == 1 and 0 < abs(Fraction(attrs["exponent"])) <= 4:
            exponent = int(Fraction(attrs["exponent"]))
            power = v.multiply(*[x] * abs(exponent))
            return power if exponent > 0 else v.invert(power)
        case _:
            return v.call(fn, *args, attrs=tuple(sorted(attrs.items())))


def hoisted(value: Value) -> Value:
    """a·x + a·y as a·(x + y), where `a` lacks an axis of the sum: a row's statistic stays apart from what it scales,
    so that products of such sums need not be multiplied out."""
    if len(value) < 2:
        return value
    free = v.free_tokens(value)
    rests = [list(t.factors) for t in value]
    common: list[Factor] = []
    for f in value[0].factors:
        if isinstance(f, Number) or not v.factor_tokens(f) < free or v.factor_tokens(f) & value[0].bound:
            continue
        if all(f in rest for rest in rests):
            common.append(f)
            for rest in rests:
                rest.remove(f)
    if not common:
        return value
    inner = v.add(*((v.normal_term(t.bound, rest),) for t, rest in zip(value, rests, strict=True)))
    return (v.normal_term((), (*common, Paren(inner))),)


# -- named laws


@dataclass(frozen=True)
class Law:
    """`rewrite` proposes another expression of a value, or None where the law does not apply."""

    name: str
    statement: str
    rewrite: Callable[[Value], Value | None]


def without_max(value: Value, gone: Callable[[Call], bool] = lambda _: True) -> Value | None:
    """Substitutes 0 for every maximum taken over an axis of which `gone` holds; None where there is none."""
    if not any("max" in b.calls for b in v.bodies(value)):
        return None

    def stripped_of(b: Body, args: tuple[Value, ...]) -> Value | None:
        if b.fn != "max":
            return None
        if b.bound:
            return v.number(0) if gone(Call(b.fn, b.attrs, b.bound, args)) else None
        numbers = [f.coefficient for x in args for t in x for f in t.factors if isinstance(f, Number) and not f.sizes]
        alone = all(len(x) == 1 and len(x[0].factors) == 1 for x in args)
        return v.number(max(numbers)) if alone and len(numbers) == len(args) else None  # a maximum kept finite

    stripped = v.rewritten(value, stripped_of)
    return None if stripped == value else stripped


STRIP_MAX = Law("strip-max", "exp(x - max x) / Σ exp(x - max x) = exp x / Σ exp x", without_max)
LAWS: dict[str, Law] = {law.name: law for law in (STRIP_MAX,)}
