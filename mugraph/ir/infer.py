"""The one authority on types: which axes, and which element type, an operator's result has.

`infer` looks at axes as a set.  The order of dimensions, and which axes share one, is the declared type's own
business; `check` demands that a declared type has exactly the inferred axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import assert_never

from mugraph.errors import ShapeError, UnsupportedOpError
from mugraph.ir.axes import Axis, product
from mugraph.ir.ops import (
    FUNCTIONS,
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Pack,
    Quantize,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    TopK,
    Transpose,
    Unpack,
)  # fmt: skip
from mugraph.ir.types import DType, Tensor, promote


@dataclass(frozen=True)
class Type:
    """Axes in order of first appearance, and the element type."""

    axes: tuple[Axis, ...]
    dtype: DType


def type_of(tensor: Tensor) -> Type:
    return Type(tensor.axes, tensor.dtype)


def infer(op: Op, args: Sequence[Type]) -> tuple[Type, ...]:
    """The result types of `op(args)`.  Raises ShapeError, with the op's name, where the operands do not fit."""
    match op:
        case Elementwise(fn, attrs):
            if fn not in FUNCTIONS:
                raise UnsupportedOpError(f"there is no function {fn!r}", remedy=f"known: {', '.join(FUNCTIONS)}")
            _count(op, args, FUNCTIONS[fn])
            if fn == "pow" and not any(k == "exponent" for k, _ in attrs):
                raise ShapeError("pow needs the attribute exponent", op="pow")
            return (Type(_union(op, args), _promoted(args)),)
        case Compare():
            _count(op, args, 2)
            return (Type(_union(op, args), DType.bool),)
        case Select():
            _count(op, args, 3)
            _need_mask(op, args[0])
            return (Type(_union(op, args), _promoted(args[1:])),)
        case MaskedExp():
            _count(op, args, 2)
            _need_mask(op, args[1])
            return (Type(_union(op, args), args[0].dtype),)
        case Const(_, dtype) | SizeOf(_, dtype):
            _count(op, args, 0)
            return (Type((), dtype),)
        case Iota(axis):
            _count(op, args, 0)
            return (Type((axis,), DType.i64),)
        case Contract(axes):
            if not args:
                raise ShapeError("a contraction needs an operand", op="contract")
            union = _union(op, args)
            _need_axes(op, union, axes)
            return (Type(tuple(a for a in union if a.name not in axes), _promoted(args)),)
        case Reduce(_, axes):
            _count(op, args, 1)
            _need_axes(op, args[0].axes, axes)
            return (Type(tuple(a for a in args[0].axes if a.name not in axes), args[0].dtype),)
        case CumSum(axis):
            _count(op, args, 1)
            _need_axes(op, args[0].axes, (axis,))
            return (args[0],)
        case TopK(axis, out):
            _count(op, args, 1)
            axes = _replaced(op, args[0].axes, axis, (out,))
            return Type(axes, args[0].dtype), Type(axes, DType.i64)
        case Cast(dtype):
            _count(op, args, 1)
            return (Type(args[0].axes, dtype),)
        case Quantize(dtype):
            _count(op, args, 2)
            return (Type(_union(op, args), dtype),)
        case Unpack(axis, out, dtype) | Pack(axis, out, dtype):
            _count(op, args, 1)
            return (Type(_replaced(op, args[0].axes, axis, (out,)), dtype),)
        case Reshape(dims):
            _count(op, args, 1)
            axes = tuple(a for d in dims for a in d)
            before, after = product(a.size for a in args[0].axes), product(a.size for a in axes)
            if before != after:
                raise ShapeError(f"reshape from {before} to {after} elements", op="reshape")
            return (Type(axes, args[0].dtype),)
        case Transpose():
            _count(op, args, 1)
            return (args[0],)
        case Broadcast(axes):
            _count(op, args, 1)
            if clash := {a.name for a in axes} & {a.name for a in args[0].axes}:
                raise ShapeError(f"broadcast along axes that are already there: {sorted(clash)}", op="broadcast")
            return (Type(args[0].axes + axes, args[0].dtype),)
        case Slice(axis, out, start, step):
            _count(op, args, 1)
            size = _axis(op, args[0].axes, axis).size
            if start < 0 or step < 1:
                raise ShapeError(f"slice needs start >= 0 and step >= 1, not {start} and {step}", op="slice")
            if isinstance(size, int) and isinstance(out.size, int) and start + step * (out.size - 1) >= size:
                end = start + step * out.size
                raise ShapeError(f"slice {start}:{end}:{step} leaves the axis {axis}={size}", op="slice")
            return (Type(_replaced(op, args[0].axes, axis, (out,)), args[0].dtype),)
        case Concat(axes, out):
            _count(op, args, len(axes))
            results = [_replaced(op, t.axes, axis, (out,)) for t, axis in zip(args, axes, strict=True)]
            if any(set(r) != set(results[0]) for r in results):
                raise ShapeError("concatenated operands differ in their other axes", op="concat")
            return (Type(results[0], _promoted(args)),)
        case Rename(pairs):
            _count(op, args, 1)
            _need_axes(op, args[0].axes, tuple(old for old, _ in pairs))
            new = dict(pairs)
            for old, axis in pairs:
                if _axis(op, args[0].axes, old).size != axis.size:
                    raise ShapeError(f"alias of {old} by {axis} of another size", op="rename")
            return (Type(tuple(new.get(a.name, a) for a in args[0].axes), args[0].dtype),)
        case Gather(axis):
            _count(op, args, 2)
            _need_index(op, args[1])
            added = tuple(a for a in args[1].axes if a not in args[0].axes)
            return (Type(_replaced(op, args[0].axes, axis, added), args[0].dtype),)
        case Scatter(closed, out):
            _count(op, args, 2)
            _need_index(op, args[1])
            if not closed:
                raise ShapeError("scatter along no axis", op="scatter")
            _need_axes(op, _union(op, args), closed)
            if gone := {a.name for a in args[1].axes} - {a.name for a in args[0].axes} - set(closed):
                raise ShapeError(f"scatter index has axes that its operand lacks: {sorted(gone)}", op="scatter")
            _need_axes(op, args[0].axes, closed)
            replaced = _replaced(op, args[0].axes, closed[0], (out,))
            return (Type(tuple(a for a in replaced if a.name not in closed[1:]), args[0].dtype),)
        case Library(_, semantics):
            _count(op, args, len(semantics.inputs))
            return _call(semantics.name, [i.tensor for i in semantics.inputs],
                         [semantics.tensors()[o.value] for o in semantics.outputs], args)  # fmt: skip
        case Kernel(blocks):
            return tuple(
                Type(final.tensors()[s.value].axes, final.tensors()[s.value].dtype)
                for block in blocks
                for final in (block.combine or block,)
                for s in final.stores
            )
        case _:
            assert_never(op)


def op_text(op: Op) -> str:
    """The operator's name in program text and in errors."""
    match op:
        case Elementwise(fn):
            return fn
        case Compare(relation):
            return relation
        case Reduce(kind):
            return kind
        case _:
            return type(op).__name__.lower()


def _promoted(args: Sequence[Type]) -> DType:
    # A scalar operand (no axes) takes the type of the tensors beside it, as a Python number does in PyTorch.
    shaped = [t.dtype for t in args if t.axes] or [t.dtype for t in args]
    return reduce(promote, shaped)


def _count(op: Op, args: Sequence[Type], expected: int) -> None:
    if len(args) != expected:
        raise ShapeError(f"{op_text(op)} takes {expected} operands, not {len(args)}", op=op_text(op))


def _union(op: Op, args: Sequence[Type]) -> tuple[Axis, ...]:
    found: dict[str, Axis] = {}
    for t in args:
        for a in t.axes:
            if found.setdefault(a.name, a).size != a.size:
                raise ShapeError(f"axis {a.name} has sizes {found[a.name].size} and {a.size}", op=op_text(op))
    return tuple(found.values())


def _axis(op: Op, axes: Sequence[Axis], name: str) -> Axis:
    for a in axes:
        if a.name == name:
            return a
    raise ShapeError(f"no axis {name} among [{', '.join(map(str, axes))}]", op=op_text(op))


def _need_axes(op: Op, axes: Sequence[Axis], names: Sequence[str]) -> None:
    for name in names:
        _axis(op, axes, name)
    if len(set(names)) < len(names):
        raise ShapeError(f"an axis is named twice in {list(names)}", op=op_text(op))


def _replaced(op: Op, axes: tuple[Axis, ...], name: str, new: tuple[Axis, ...]) -> tuple[Axis, ...]:
    _axis(op, axes, name)
    return tuple(b for a in axes for b in (new if a.name == name else (a,)))


def _need_mask(op: Op, t: Type) -> None:
    if t.dtype is not DType.bool:
        raise ShapeError(f"the mask of {op_text(op)} is {t.dtype}, not bool", op=op_text(op))


def _need_index(op: Op, t: Type) -> None:
    if t.dtype.is_float or t.dtype is DType.bool:
        raise ShapeError(f"the index of {op_text(op)} is {t.dtype}, not an integer", op=op_text(op))


def _call(name: str, params: list[Tensor], results: list[Tensor], args: Sequence[Type]) -> tuple[Type, ...]:
    """Result types of a call: parameter axes become the arguments' axes of the same sizes, in order."""
    bound: dict[str, Axis] = {}
    for param, arg in zip(params, args, strict=True):
        if len(param.axes) != len(arg.axes):
            raise ShapeError(f"{name} takes {param}, not {len(arg.axes)} axes", op=name)
        for formal, actual in zip(param.axes, arg.axes, strict=True):
            if bound.setdefault(formal.name, actual) != actual:
                raise ShapeError(f"{name}: axis {formal} is both {bound[formal.name]} and {actual}", op=name)
            if formal.size != actual.size:
                raise ShapeError(f"{name} takes {param}: its axis {formal} is not {actual}", op=name)
    return tuple(Type(tuple(bound.get(a.name, a) for a in t.axes), t.dtype) for t in results)
