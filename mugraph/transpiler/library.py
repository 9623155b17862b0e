"""Kernel-level equations as torch statements: the meaning of library calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from mugraph.codegen.passes import refuse
from mugraph.codegen.plan import Plan
from mugraph.ir.axes import Axis, Size
from mugraph.ir.graph import Equation
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Const,
    Contract,
    Elementwise,
    Library,
    MaskedExp,
    Reduce,
    Rename,
    Reshape,
    Select,
    SizeOf,
    Slice,
    Transpose,
)  # fmt: skip
from mugraph.ir.types import Dims, DType, Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
RELATION = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|"}
UNARY = {
    "neg": "-{}", "reciprocal": "1 / {}", "square": "torch.square({})", "sqrt": "torch.sqrt({})",
    "rsqrt": "torch.rsqrt({})", "abs": "torch.abs({})", "exp": "torch.exp({})", "log": "torch.log({})",
    "sigmoid": "torch.sigmoid({})", "silu": "torch.nn.functional.silu({})", "relu": "torch.relu({})",
    "tanh": "torch.tanh({})", "round": "torch.round({})", "not": "~{}",
}  # fmt: skip


@dataclass(frozen=True)
class _Value:
    """A Python expression for a tensor with one dimension per axis, in this order."""

    text: str
    axes: tuple[str, ...]


def torch_lines(
    equation: Equation, plan: Plan, python: Callable[[str], str], size_text: Callable[[Size], str]
) -> list[str]:
    """Statements that compute the equation's targets from variables named by `python`."""
    from mugraph.transpiler.triton import TORCH

    writer = _Writer({}, size_text, TORCH)
    for arg in equation.args:
        writer.values[arg] = writer.split(python(arg), plan.buffer(arg).tensor)
    if isinstance(equation.op, Library):
        inner = writer.call(equation, [writer.values[a] for a in equation.args])
    else:
        writer.run(equation)
        inner = [writer.values[t.name] for t in equation.targets]
    for target, value in zip(equation.targets, inner, strict=True):
        writer.lines.append(f"{python(target.name)} = {writer.merge(value, target)}")
    return writer.lines


class _Writer:
    def __init__(self, values: dict[str, _Value], size_text: Callable[[Size], str], torch: dict[DType, str]) -> None:
        self.values = values
        self.lines: list[str] = []
        self.size_text = size_text
        self.torch = torch
        self.sizes: dict[str, Size] = {}
        self.dtypes: dict[str, DType] = {}
        self.count = 0

    def shape(self, sizes: Sequence[Size]) -> str:
        return f"({', '.join(map(self.size_text, sizes))}{',' if len(sizes) == 1 else ''})"

    def note(self, axes: Sequence[Axis]) -> None:
        self.sizes.update((a.name, a.size) for a in axes)

    def split(self, text: str, t: Tensor) -> _Value:
        self.note(t.axes)
        axes = tuple(a.name for a in t.axes)
        plain = all(len(d) == 1 for d in t.dims)
        return _Value(text if plain else f"{text}.reshape({self.shape([a.size for a in t.axes])})", axes)

    def merge(self, v: _Value, t: Tensor) -> str:
        order = [a.name for a in t.axes]
        text = self.arranged(v, order)
        if any(a not in v.axes for a in order):
            text = f"{text}.expand({self.shape([a.size for a in t.axes])})"
        if any(len(d) != 1 for d in t.dims):
            text = f"{text}.reshape({self.shape(t.shape)})"
        return f"{text}.to({self.torch[t.dtype]})"

    def arranged(self, v: _Value, order: Sequence[str]) -> str:
        """The value with its axes in this order; absent ones get size 1."""
        kept = [a for a in order if a in v.axes]
        text = v.text
        if kept != list(v.axes):
            text = f"{text}.permute({', '.join(str(v.axes.index(a)) for a in kept)})"
        if len(kept) < len(order) and kept:
            text += f"[{', '.join(':' if a in kept else 'None' for a in order)}]"
        return text

    def call(self, equation: Equation, args: Sequence[_Value]) -> list[_Value]:
        assert isinstance(equation.op, Library)
        program = equation.op.semantics
        outer = self.values
        self.values = {}
        back: dict[str, str] = {}
        for param, arg in zip(program.inputs, args, strict=True):
            # parameter axes stand for the arguments', in order
            formal = tuple(a.name for a in param.tensor.axes)
            back.update(zip(formal, arg.axes, strict=True))
            self.values[param.name] = _Value(arg.text, formal)
            self.dtypes[param.name] = param.tensor.dtype
        self.sizes |= {formal: self.sizes[actual] for formal, actual in back.items()}
        for e in program.equations:
            self.run(e)
        results = [self.values[o.value] for o in program.outputs]
        self.values = outer
        return [_Value(v.text, tuple(back.get(a, a) for a in v.axes)) for v in results]

    def run(self, e: Equation) -> None:
        """One statement under a fresh name."""
        self.note([a for t in e.targets for a in t.axes])
        args = [self.values[a] for a in e.args]
        axes = tuple(dict.fromkeys(a for v in args for a in v.axes))
        xs = [self.arranged(v, axes) for v in args]
        result = _Value(self.text(e, args, xs), self.result_axes(e, args, axes))
        self.count += 1
        name = f"t{self.count}"
        self.lines.append(f"{name} = {result.text}")
        self.values[e.target.name] = _Value(name, result.axes)

    def result_axes(self, e: Equation, args: Sequence[_Value], axes: tuple[str, ...]) -> tuple[str, ...]:
        match e.op:
            case Contract(closed) | Reduce(_, closed):
                return tuple(a for a in axes if a not in closed)
            case Rename(pairs):
                new = {old: a.name for old, a in pairs}
                return tuple(new.get(a, a) for a in axes)
            case Slice(axis, out):
                return tuple(out.name if a == axis else a for a in axes)
            case Reshape(dims):
                return tuple(a.name for d in dims for a in d)
            case _:
                return axes

    def text(self, e: Equation, args: Sequence[_Value], xs: Sequence[str]) -> str:
        axes = args[0].axes if args else ()
        match e.op:
            case Const(value):
                return repr(float(value) if value.denominator != 1 else int(value))
            case SizeOf(axis):
                return self.size_text(self.sizes.get(axis.name, axis.size))
            case Contract(closed):
                return self.einsum(args, closed)
            case Reduce(kind, closed):
                where = ", ".join(str(axes.index(a)) for a in closed)
                name = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[kind]
                return f"torch.{name}({xs[0]}, dim=({where},))"
            case Elementwise(fn) if fn in BINARY:
                return f"{xs[0]} {BINARY[fn]} {xs[1]}"
            case Elementwise("max" | "min" as fn):
                clamp = {"max": "maximum", "min": "minimum"}[fn]
                return f"torch.{clamp}({xs[0]}, torch.as_tensor({xs[1]}, dtype={xs[0]}.dtype, device={xs[0]}.device))"
            case Elementwise("pow", attrs):
                return f"{xs[0]} ** {float(Fraction(dict(attrs)['exponent']))}"
            case Elementwise("gelu", attrs):
                return f'torch.nn.functional.gelu({xs[0]}, approximate="{dict(attrs).get("approximate", "none")}")'
            case Elementwise(fn) if fn in UNARY:
                return UNARY[fn].format(f"({xs[0]})" if fn in ("neg", "reciprocal", "not") else xs[0])
            case Compare(relation):
                return f"{xs[0]} {RELATION[relation]} {xs[1]}"
            case Select():
                return f"torch.where({', '.join(xs)})"
            case MaskedExp():
                return f"torch.where({xs[1]}, torch.exp({xs[0]}), 0.0)"
            case Cast(dtype):
                return f"{xs[0]}.to({self.torch[dtype]})"
            case Transpose() | Rename() | Broadcast():
                return xs[0]
            case Reshape(dims):
                return self.reshaped(args[0], dims)
            case Slice(axis, out, start, step):
                at = ", ".join(
                    f"{start} : {start} + {step} * {self.size_text(out.size)} : {step}" if a == axis else ":" for a in axes
                )
                return f"{xs[0]}[{at}]"
            case _:
                raise refuse(e.op, "has no torch text", e)

    def reshaped(self, v: _Value, dims: Dims) -> str:
        axes = [a for d in dims for a in d]
        if {a.name for a in axes} == set(v.axes):
            return self.arranged(v, [a.name for a in axes])
        return f"{v.text}.reshape({self.shape([a.size for a in axes])})"

    def einsum(self, args: Sequence[_Value], closed: Sequence[str]) -> str:
        axes = list(dict.fromkeys(a for v in args for a in v.axes))
        letter = {a: LETTERS[i] for i, a in enumerate(axes)}
        kept = [a for a in axes if a not in closed]
        operands = ",".join("".join(letter[a] for a in v.axes) for v in args)
        result = "".join(letter[a] for a in kept)
        if operands == "ab,bc" and result == "ac":
            return f"torch.matmul({args[0].text}, {args[1].text})"
        return f'torch.einsum("{operands}->{result}", {", ".join(v.text for v in args)})'
