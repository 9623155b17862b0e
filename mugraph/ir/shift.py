"""Exponentials of a library call's meaning, shifted by the maximum of their arguments, so that none overflows.

    Σ_k e·v / Σ_k e,  e = exp(s)    becomes the same with    e = exp(s - max_k s)

A value has *degree* d if it carries exp(-d·m) as a factor when every e is multiplied by exp(-m); m varies along those
axes of s that no sum of such a value closes.  Where all outputs have degree 0 the shift changes nothing; a logarithm
adds d·m back.  What kernels do for themselves (`codegen.stabilise`), this does for equations that run as they stand.

A sum over an axis of size 1 is no sum: there m is s itself.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Const,
    Contract,
    Elementwise,
    MaskedExp,
    Op,
    Reduce,
    Reshape,
    Select,
    Transpose,
)
from mugraph.ir.types import GREATEST, DType, Tensor

LOWEST = Fraction(-(10**38))  # under a mask; f16 reaches to -65,504
LOWEST_F16 = Fraction(-65_504)

# The verifier takes these for arbitrary functions: whatever goes in, what comes out holds no exponential to it.
OPAQUE = (
    "sigmoid", "tanh", "gelu", "abs", "round", "floor", "sqrt", "rsqrt", "log", "log1p", "expm1", "sin", "cos", "erf",
)  # fmt: skip


def shifted(program: Program, unsummed: bool = False) -> Program:
    """The same program, each exponential shifted that can be; with `unsummed` only those that no sum closes, and where
    the verifier knows that this changes nothing: under a logarithm not if the argument holds an exponential."""
    for op, args in dict.fromkeys((e.op, e.args) for e in program.equations if is_exponential(e.op)):
        program = _shifted(program, [e for e in program.equations if (e.op, e.args) == (op, args)], unsummed)
    return program


def is_exponential(op: Op) -> bool:
    return isinstance(op, MaskedExp) or op == Elementwise("exp")


def _shifted(program: Program, same: list[Equation], unsummed: bool) -> Program:
    """`same`: the equations of one exponential."""
    e = same[0]
    degrees = _degrees(program, {q.target.name for q in same})
    if degrees is None:
        return program
    summed = {
        a for q in program.equations if isinstance(q.op, Reduce | Contract) and _any(degrees, q) for a in q.op.axes
    }
    closed = tuple(a.name for a in e.target.axes if a.name in summed)
    kept = {a.name for a in e.target.axes} - summed
    logs = [q for q in program.equations if q.op == Elementwise("log") and degrees.get(q.args[0])]
    if unsummed and (closed or (logs and _is_nested(program, e))):
        return program
    if not _carried(program, degrees, kept):
        return program
    writer = _Writer(program)
    counted = argument = e.args[0]
    if isinstance(e.op, MaskedExp):
        lowest = LOWEST_F16 if e.target.dtype is DType.f16 else LOWEST
        low = writer.add(Const(lowest, e.target.dtype), (), e.target.dtype, ())
        counted = writer.add(Select(), (e.args[1], argument, low), e.target.dtype, e.target.dims)
    dims = tuple(d for d in (tuple(a for a in d if a.name in kept) for d in e.target.dims) if d)
    most = counted
    if closed:  # of a row of -inf the least finite number, so that exp(-inf - m) is 0 and no NaN
        if logs and not _meets(program, logs, closed):  # and of +inf the greatest, so that the logarithm is inf
            greatest = writer.add(Const(GREATEST[e.target.dtype], e.target.dtype), (), e.target.dtype, ())
            counted = writer.add(Elementwise("min"), (counted, greatest), e.target.dtype, e.target.dims)
        least = writer.add(Const(-GREATEST[e.target.dtype], e.target.dtype), (), e.target.dtype, ())
        top = writer.add(Reduce("max", closed), (counted,), e.target.dtype, dims)
        most = writer.add(Elementwise("max"), (top, least), e.target.dtype, dims)
    below = writer.add(Elementwise("sub"), (argument, most), e.target.dtype, e.target.dims)
    found: list[Equation] = []
    for q in program.equations:
        if q in same:
            found += [*writer.take(), replace(q, args=(below, *q.args[1:]))]
        elif q in logs:
            inner = writer.add(q.op, q.args, q.target.dtype, q.target.dims)
            times = writer.add(Const(Fraction(degrees[q.args[0]]), q.target.dtype), (), q.target.dtype, ())
            back = writer.add(Elementwise("mul"), (most, times), q.target.dtype, dims)
            found += [*writer.take(), Equation(q.targets, Elementwise("add"), (inner, back))]
        else:
            found.append(q)
    return replace(program, equations=tuple(found))


def _meets(program: Program, made: list[Equation], axes: tuple[str, ...]) -> bool:
    """Whether something that is made of these results has one of the axes."""
    after = {q.target.name for q in made}
    for q in program.equations:
        if after & set(q.args):
            after |= {t.name for t in q.targets}
            if any(a.name in axes for t in q.targets for a in t.axes):
                return True
    return False


def _is_nested(program: Program, e: Equation) -> bool:
    """Whether the argument of an exponential is made of exponentials."""
    wanted = set(e.args)
    for q in reversed(program.equations):
        if wanted & {t.name for t in q.targets}:
            if is_exponential(q.op):
                return True
            wanted |= set(q.args)
    return False


def _any(degrees: dict[str, int], e: Equation) -> bool:
    return any(degrees.get(a) for a in e.args)


def _carried(program: Program, degrees: dict[str, int], kept: set[str]) -> bool:
    """Whether the factor of each value that has one varies along the same axes: no view renames or cuts one."""
    return all(kept <= {a.name for a in q.target.axes} for q in program.equations if _any(degrees, q))


def _degrees(program: Program, names: set[str]) -> dict[str, int] | None:
    """The degree of each value in the exponential `names`; None where some operator would feel the shift."""
    degree: dict[str, int] = {i.name: 0 for i in program.inputs}
    for e in program.equations:
        args = [degree[a] for a in e.args]
        if e.targets[0].name in names:
            found: int | None = 1 if not any(args) else None  # an exponential of itself is not shifted
        elif not any(args):
            found = 0
        else:
            found = _degree(e.op, args)
        if found is None:
            return None
        degree.update((t.name, found) for t in e.targets)
    return None if any(degree[o.value] for o in program.outputs) else degree


def _degree(op: Op, args: list[int]) -> int | None:
    match op:
        case Elementwise("mul") | Contract():
            return sum(args)
        case Elementwise("div"):
            return args[0] - args[1]
        case Elementwise("reciprocal" | "neg") | Reduce() | Cast() | Transpose() | Broadcast() | Reshape():
            return -args[0] if op == Elementwise("reciprocal") else args[0]
        case Elementwise("add" | "sub" | "max" | "min"):
            return args[0] if len(set(args)) == 1 else None
        case Elementwise("log"):
            return 0
        case _:
            return None


class _Writer:
    """New equations under names of their own."""

    def __init__(self, program: Program) -> None:
        self.used = set(program.tensors())
        self.equations: list[Equation] = []

    def add(self, op: Op, args: tuple[str, ...], dtype: DType, dims: tuple[tuple[object, ...], ...]) -> str:
        name = next(n for i in itertools.count() if (n := f"shift{i}") not in self.used)
        self.used.add(name)
        self.equations.append(Equation((Tensor(name, dims, dtype),), op, args))  # type: ignore[arg-type]
        return name

    def take(self) -> list[Equation]:
        taken, self.equations = self.equations, []
        return taken
