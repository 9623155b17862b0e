"""Traced tensors: positional semantics exactly as PyTorch has them, recorded over named axes.

A `Tensor` is a recorded value seen through dimensions.  Each dimension is an ordered product of axis variables, so
transposing, splitting, merging and expanding dimensions record nothing.  A dimension whose variables the value lacks
is only repeated (`expand`).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce as fold
from types import EllipsisType
from typing import Any, NoReturn

from mugraph.dsl.record import LETTER, ROLE, Recorder, Value, literal
from mugraph.dsl.unify import Var, VarDim, VarDims, divides
from mugraph.errors import CaptureError, ShapeError, UnsupportedOpError
from mugraph.ir.axes import Dim, Monomial, Size, dims_of, over, product, times
from mugraph.ir.ops import (
    COMMUTATIVE,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    MaskedExp,
    PureOp,
    Reduce,
    ReduceKind,
    Relation,
    Scatter,
    Select,
    SizeOf,
    Slice,
)
from mugraph.ir.types import DType, promote

Number = int | float | Fraction

DEFAULT_FLOAT = DType.f32
DEFAULT_INT = DType.i64

# Functions whose result is a float even for integers.
FLOAT_FUNCTIONS = {"div", "reciprocal", "sqrt", "rsqrt", "exp", "log", "sigmoid", "silu", "gelu", "tanh"} | {
    "sin", "cos", "erf", "expm1", "log1p",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class SizeValue:
    """A size as a number of the program: `x.shape[-1]` in arithmetic is |axis|, never an int.

    `size` is None where the expression is no product (`x.shape[0] + y.shape[0]` with symbolic sizes).
    """

    recorder: Recorder
    size: Size | None
    build: Callable[[DType], Tensor]

    def tensor(self, dtype: DType = DEFAULT_FLOAT) -> Tensor:
        return self.build(dtype)

    def _joined(self, fn: str, other: int | SizeValue, size: Size | None, swapped: bool = False) -> SizeValue:
        def build(dtype: DType) -> Tensor:
            a: Any = self.tensor(dtype)
            b: Any = other.tensor(dtype) if isinstance(other, SizeValue) else other
            return elementwise(fn, b, a) if swapped else elementwise(fn, a, b)

        return SizeValue(self.recorder, size, build)

    def _fold(self, other: int | SizeValue, f: Callable[[int, int], int]) -> Size | None:
        a, b = self.size, _plain(other)
        return f(a, b) if isinstance(a, int) and isinstance(b, int) else None

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, int | SizeValue):
            return self.tensor() * other if isinstance(other, float) else NotImplemented
        a, b = self.size, _plain(other)
        return self._joined("mul", other, None if a is None or b is None else times(a, b))

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, int | SizeValue):
            return self.tensor() + other if isinstance(other, float) else NotImplemented
        return self._joined("add", other, self._fold(other, lambda a, b: a + b))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, int | SizeValue):
            return self.tensor() - other if isinstance(other, float) else NotImplemented
        return self._joined("sub", other, self._fold(other, lambda a, b: a - b))

    def __rsub__(self, other: Any) -> Any:
        if not isinstance(other, int):
            return other - self.tensor() if isinstance(other, float) else NotImplemented
        return self._joined("sub", other, self._fold(other, lambda a, b: b - a), swapped=True)

    def __floordiv__(self, other: int | SizeValue) -> SizeValue | int:
        a, b = self.size, _plain(other)
        if a is None or b is None:
            raise CaptureError("this size has no symbolic quotient", where=self.recorder.location())
        if divides(b, a) or not (isinstance(a, int) and isinstance(b, int)):
            return self._joined("div", other, over(a, b))
        return a // b

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return NotImplemented
        return elementwise("div", self.tensor(), other)

    def __rtruediv__(self, other: Any) -> Any:
        return elementwise("div", other, self.tensor())

    def __pow__(self, exponent: Number) -> Tensor:
        return power(self.tensor(), exponent)

    def __neg__(self) -> Tensor:
        return elementwise("neg", self.tensor())

    def _static(self, what: str) -> int:
        if not isinstance(self.size, int):
            raise CaptureError(
                f"the symbolic size {self.size} has no {what} while tracing",
                where=self.recorder.location(),
                remedy="use it in tensor arithmetic or in shapes; mg.sqrt takes it where math.sqrt does not",
            )
        return self.size

    def __index__(self) -> int:
        return self._static("int value")

    __int__ = __index__

    def __float__(self) -> float:
        return float(self._static("float value"))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SizeValue):
            return self.size == other.size
        return self.size == other

    def __hash__(self) -> int:
        return hash(self.size)

    def __lt__(self, other: int | SizeValue) -> bool:
        return self._static("order") < int(other)

    def __le__(self, other: int | SizeValue) -> bool:
        return self._static("order") <= int(other)

    def __gt__(self, other: int | SizeValue) -> bool:
        return self._static("order") > int(other)

    def __ge__(self, other: int | SizeValue) -> bool:
        return self._static("order") >= int(other)

    def __str__(self) -> str:
        return str(self.size)

    __repr__ = __str__


def _plain(size: int | SizeValue | Dim | Size) -> Size | None:
    return size.size if isinstance(size, SizeValue) else size


class Tensor:
    """A tensor of the program being traced; operators and methods are PyTorch's.

    `masked` (bool, or None) marks a tensor that stands for `where(masked, self, -inf)`: what `masked_fill(m, -inf)`
    returns.  It may be shifted, scaled by a positive number, reduced by max and exponentiated.
    """

    __array_ufunc__ = None  # numpy scalars leave `scalar * tensor` to the tensor

    def __init__(self, recorder: Recorder, value: Value, dims: VarDims, masked: Tensor | None = None) -> None:
        self.recorder = recorder
        self.value = value
        self.dims = dims
        self.masked = masked
        recorder.axes.together(v for d in dims for v in d)

    # -- what it is --------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> DType:
        return self.value.dtype

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def dim(self) -> int:
        return self.ndim

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The shape as plain sizes."""
        return tuple(self.recorder.axes.extent(d) for d in self.dims)

    @property
    def shape(self) -> tuple[SizeValue, ...]:
        return tuple(self.size(i) for i in range(self.ndim))

    def size(self, axis: int | None = None) -> Any:
        if axis is None:
            return self.shape
        return dim_size(self, normal_axis(self, axis))

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}[{', '.join(map(str, self.sizes))}])"

    def __bool__(self) -> bool:
        raise CaptureError(
            "a traced tensor has no truth value: the program must not branch on data",
            where=self.recorder.location(),
            remedy="use mg.where(condition, a, b)",
        )

    def __len__(self) -> int:
        if not self.dims:
            raise ShapeError("a scalar has no length", where=self.recorder.location())
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def _no_number(self, kind: str) -> NoReturn:
        raise CaptureError(
            f"a traced tensor has no {kind} value",
            where=self.recorder.location(),
            remedy="keep it in tensor arithmetic",
        )

    def __float__(self) -> float:
        self._no_number("float")

    def __int__(self) -> int:
        self._no_number("int")

    def __index__(self) -> int:
        self._no_number("index")

    def item(self) -> NoReturn:
        self._no_number("Python")

    # -- arithmetic --------------------------------------------------------------------------------------------

    def __add__(self, other: Any) -> Tensor:
        return elementwise("add", self, other)

    def __radd__(self, other: Any) -> Tensor:
        return elementwise("add", other, self)

    def __sub__(self, other: Any) -> Tensor:
        return elementwise("sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return elementwise("sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return elementwise("mul", self, other)

    def __rmul__(self, other: Any) -> Tensor:
        return elementwise("mul", other, self)

    def __truediv__(self, other: Any) -> Tensor:
        return elementwise("div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return elementwise("div", other, self)

    def __neg__(self) -> Tensor:
        return elementwise("neg", self)

    def __pow__(self, exponent: Any) -> Tensor:
        return power(self, exponent)

    def __matmul__(self, other: Any) -> Tensor:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return matmul(other, self)

    def __lt__(self, other: Any) -> Tensor:
        return compare("lt", self, other)

    def __le__(self, other: Any) -> Tensor:
        return compare("le", self, other)

    def __gt__(self, other: Any) -> Tensor:
        return compare("gt", self, other)

    def __ge__(self, other: Any) -> Tensor:
        return compare("ge", self, other)

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return compare("eq", self, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return compare("ne", self, other)

    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Tensor:
        return logical("and", self, other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Tensor:
        return logical("or", self, other)

    __ror__ = __or__

    def __invert__(self) -> Tensor:
        return logical("not", self)

    add, sub, mul, div, neg, pow, matmul = __add__, __sub__, __mul__, __truediv__, __neg__, __pow__, __matmul__

    def exp(self) -> Tensor:
        return elementwise("exp", self)

    def log(self) -> Tensor:
        return elementwise("log", self)

    def sqrt(self) -> Tensor:
        return elementwise("sqrt", self)

    def rsqrt(self) -> Tensor:
        return elementwise("rsqrt", self)

    def reciprocal(self) -> Tensor:
        return elementwise("reciprocal", self)

    def square(self) -> Tensor:
        return elementwise("square", self)

    def abs(self) -> Tensor:
        return elementwise("abs", self)

    def sigmoid(self) -> Tensor:
        return elementwise("sigmoid", self)

    def tanh(self) -> Tensor:
        return elementwise("tanh", self)

    def sin(self) -> Tensor:
        return elementwise("sin", self)

    def cos(self) -> Tensor:
        return elementwise("cos", self)

    def erf(self) -> Tensor:
        return elementwise("erf", self)

    def expm1(self) -> Tensor:
        return elementwise("expm1", self)

    def log1p(self) -> Tensor:
        return elementwise("log1p", self)

    def floor(self) -> Tensor:
        return elementwise("floor", self)

    def relu(self) -> Tensor:
        return elementwise("relu", self)

    def sum(self, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
        return reduced("sum", self, _either(axis, dim), keepdims or keepdim)

    def mean(self, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
        return reduced("mean", self, _either(axis, dim), keepdims or keepdim)

    def amax(self, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
        return reduced("max", self, _either(axis, dim), keepdims or keepdim)

    def amin(self, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
        return reduced("min", self, _either(axis, dim), keepdims or keepdim)

    def softmax(self, axis: int | None = None, *, dim: int | None = None) -> Tensor:
        return softmax(self, axis if dim is None and axis is not None else -1 if dim is None else dim)

    def cumsum(self, axis: int | None = None, *, dim: int | None = None) -> Tensor:
        return cumulated(self, axis if dim is None and axis is not None else -1 if dim is None else dim)

    def masked_fill(self, mask: Tensor, value: Any) -> Tensor:
        return where(mask, value, self)

    def to(self, dtype: Any) -> Tensor:
        return cast(self, dtype)

    def float(self) -> Tensor:
        return cast(self, DType.f32)

    def half(self) -> Tensor:
        return cast(self, DType.f16)

    # -- views -------------------------------------------------------------------------------------------------

    def seen(self, dims: VarDims) -> Tensor:
        """The same value through other dimensions."""
        masked = None if self.masked is None else self.masked.seen(dims)  # a mask has the dimensions of what it masks
        return Tensor(self.recorder, self.value, dims, masked)

    @property
    def T(self) -> Tensor:
        return self.seen(self.dims[::-1])

    @property
    def mT(self) -> Tensor:
        return self.transpose(-2, -1)

    def t(self) -> Tensor:
        return self.T

    def transpose(self, dim0: int, dim1: int) -> Tensor:
        order = list(range(max(self.ndim, 1)))
        i, j = normal_axis(self, dim0), normal_axis(self, dim1)
        order[i], order[j] = order[j], order[i]
        return self.permute(*order[: self.ndim])

    def permute(self, *order: Any) -> Tensor:
        places = [normal_axis(self, i) for i in _unpacked(order)]
        if sorted(places) != list(range(self.ndim)):
            raise ShapeError(f"{places} does not permute {self.ndim} dimensions", op="permute", where=self._where())
        return self.seen(tuple(self.dims[i] for i in places))

    def reshape(self, *shape: Any) -> Tensor:
        return reshape(self, _unpacked(shape))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tensor:
        if not self.dims:
            return self.seen(((),))
        i, j = normal_axis(self, start_dim), normal_axis(self, end_dim)
        merged = tuple(v for d in self.dims[i : j + 1] for v in d)
        return self.seen((*self.dims[:i], merged, *self.dims[j + 1 :]))

    def unflatten(self, dim: int, sizes: Sequence[Any]) -> Tensor:
        i = normal_axis(self, dim)
        return reshape(self, (*self.sizes[:i], *sizes, *self.sizes[i + 1 :]))

    def unsqueeze(self, dim: int) -> Tensor:
        i = normal_axis(self, dim, extra=1)
        return self.seen((*self.dims[:i], (), *self.dims[i:]))

    def squeeze(self, *dims: Any) -> Tensor:
        chosen = {normal_axis(self, i) for i in _unpacked(dims)} if dims else set(range(self.ndim))
        return self.seen(tuple(d for i, d in enumerate(self.dims) if i not in chosen or self.sizes[i] != 1))

    def expand(self, *shape: Any) -> Tensor:
        return expand(self, _unpacked(shape))

    def expand_as(self, other: Tensor) -> Tensor:
        return expand(self, other.shape)

    def repeat_interleave(self, repeats: int, dim: int) -> Tensor:
        i = normal_axis(self, dim)
        group = (self.recorder.axes.fresh(repeats),) if repeats != 1 else ()
        return self.seen((*self.dims[:i], (*self.dims[i], *group), *self.dims[i + 1 :]))

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        return sliced(self, normal_axis(self, dim), start, start + length, 1)

    def split(self, size: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
        i = normal_axis(self, dim)
        if isinstance(size, int):
            whole = int(self.shape[i])
            lengths = [min(size, whole - at) for at in range(0, whole, size)]
        else:
            lengths = list(size)
            if sum(lengths) != self.shape[i]:
                raise ShapeError(f"split into {lengths} of a dimension of {self.shape[i]}", where=self._where())
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        return tuple(self.narrow(i, at, n) for at, n in zip(starts, lengths, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
        return self.split(-(-int(self.shape[normal_axis(self, dim)]) // chunks), dim)

    def unbind(self, dim: int = 0) -> tuple[Tensor, ...]:
        i = normal_axis(self, dim)
        return tuple(sliced(self, i, n, n + 1, 1).squeeze(i) for n in range(int(self.shape[i])))

    def contiguous(self) -> Tensor:
        return self

    def clone(self) -> Tensor:
        return self

    def type_as(self, other: Tensor) -> Tensor:
        return cast(self, other.dtype)

    def __getitem__(self, index: Any) -> Tensor:
        return indexed(self, index if isinstance(index, tuple) else (index,))

    def _where(self) -> Any:
        return self.recorder.location()


Axis = int | Sequence[int] | None


def _either(axis: Axis, dim: Axis) -> Axis:
    return axis if dim is None else dim


def _unpacked(args: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else tuple(args)


def normal_axis(x: Tensor, axis: Any, extra: int = 0) -> int:
    """A dimension's number from 0.  Raises ShapeError outside -ndim .. ndim - 1."""
    n = max(x.ndim + extra, 1)  # as in torch, a scalar has the dimensions 0 and -1
    if not isinstance(axis, numbers.Integral):
        raise ShapeError(f"a dimension is an int, not {axis!r}", where=x.recorder.location())
    if not -n <= int(axis) < n:
        raise ShapeError(f"there is no dimension {axis} in {x!r}", where=x.recorder.location())
    return int(axis) % n


def dim_size(x: Tensor, i: int) -> SizeValue:
    recorder, dim = x.recorder, x.dims[i]

    def build(dtype: DType) -> Tensor:
        atoms = recorder.axes.atoms(dim)
        if not atoms:
            return constant(recorder, 1, dtype)
        sizes = [Tensor(recorder, recorder.record(SizeOf(recorder.axis(v), dtype), (), (), dtype), ()) for v in atoms]
        return fold(lambda a, b: elementwise("mul", a, b), sizes)

    return SizeValue(recorder, recorder.axes.extent(dim), build)


def constant(recorder: Recorder, value: Number, dtype: DType) -> Tensor:
    if isinstance(value, float) and not math.isfinite(value):
        raise UnsupportedOpError(
            f"the literal {value} is no rational number",
            where=recorder.location(),
            remedy="minus infinity is understood in mg.where and masked_fill, before exp, softmax or max",
        )
    return Tensor(recorder, recorder.record(Const(literal(value), dtype), (), (), dtype), ())


# -- element types -----------------------------------------------------------------------------------------------


def _category(dtype: DType) -> int:
    return 2 if dtype.is_float else 0 if dtype is DType.bool else 1


def _number_dtype(x: Any) -> DType:
    if isinstance(x, bool):
        return DType.bool
    return DEFAULT_FLOAT if isinstance(x, float | Fraction) else DEFAULT_INT


def result_type(xs: Sequence[Any]) -> DType:
    """PyTorch's promotion: tensors with dimensions, then scalars, then numbers; a later group counts only where its
    category (bool < integer < float) is higher."""
    shaped = [x.dtype for x in xs if isinstance(x, Tensor) and x.ndim]
    scalars = [x.dtype for x in xs if isinstance(x, Tensor) and not x.ndim]
    plain = [_number_dtype(x) for x in xs if not isinstance(x, Tensor)]
    result: DType | None = None
    for group in (shaped, scalars, plain):
        if group:
            found = fold(promote, group)
            if result is None or _category(found) > _category(result):
                result = found
    assert result is not None
    return result


def as_dtype(dtype: Any) -> DType:
    found = getattr(dtype, "dtype", dtype)
    if not isinstance(found, DType):
        raise CaptureError(
            f"{dtype!r} is no element type", remedy=f"use one of mg.{', mg.'.join(d.value for d in DType)}"
        )
    return found


def cast(x: Tensor, dtype: Any) -> Tensor:
    wanted = as_dtype(dtype)
    same = x.dtype is wanted or (x.recorder.block and x.dtype.is_float and wanted.is_float)
    if same:
        return x
    return Tensor(x.recorder, cast_value(x.recorder, x.value, wanted), x.dims, x.masked)


def cast_value(recorder: Recorder, value: Value, dtype: DType) -> Value:
    if value.dtype is dtype or (recorder.block and value.dtype.is_float and dtype.is_float):
        return value
    return recorder.record(Cast(dtype), (value,), value.vars, dtype)


def _agreeing(recorder: Recorder, values: Sequence[Value], dtype: DType) -> list[Value]:
    """The operands, cast where the types inferred over axes would not come to `dtype`.  (Inference lets tensors with
    axes decide; PyTorch counts dimensions, those of size 1 included.)"""
    deciding = [v.dtype for v in values if v.vars] or [v.dtype for v in values]
    if fold(promote, deciding) is dtype:
        return list(values)
    return [cast_value(recorder, v, dtype) for v in values]


# -- meeting -----------------------------------------------------------------------------------------------------


def recorder_of(xs: Sequence[Any], op: str) -> Recorder:
    found = list(dict.fromkeys(x.recorder for x in xs if isinstance(x, Tensor | SizeValue)))
    if len(found) > 1:
        raise CaptureError("tensors of two traces meet", op=op, where=found[0].location())
    if not found:
        raise CaptureError(f"{op} needs a traced tensor among its operands", op=op)
    for x in xs:
        if not isinstance(x, Tensor | SizeValue | numbers.Real):
            raise CaptureError(
                f"{op} takes tensors and numbers, not {type(x).__name__}",
                op=op,
                where=found[0].location(),
                remedy="make arrays inputs of the program: an argument annotated mg.constant(...)",
            )
    return found[0]


def lifted(recorder: Recorder, xs: Sequence[Any], dtype: DType) -> list[Tensor]:
    """Operands as tensors; numbers become literals, sizes |axis|."""
    some_axes = any(isinstance(x, Tensor) and x.value.vars for x in xs)
    own = DType.f32 if dtype.is_float and some_axes else dtype

    def one(x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return x
        if isinstance(x, SizeValue):
            return x.tensor(own)
        number = x if isinstance(x, int | float | Fraction) else int(x) if isinstance(x, numbers.Integral) else float(x)
        return constant(recorder, number, own)

    return [one(x) for x in xs]


@dataclass
class Meeting:
    """Operands over common axes: `slots` gives each label its variables."""

    values: list[Value]
    slots: dict[Hashable, VarDim]

    def dims(self, labels: Sequence[Hashable]) -> VarDims:
        return tuple(self.slots[label] for label in labels)


def meet(
    op: str, xs: Sequence[Tensor], labels: Sequence[Sequence[Hashable]], exact: Sequence[Hashable] = ()
) -> Meeting:
    """Unifies the dimensions that share a label.  Dimensions of size 1 repeat, except under the labels `exact`.

    A dimension that cannot be unified, because its axis or the other one is in the same tensor already, makes this
    use of its tensor an alias: the value under other axes.
    """
    recorder = xs[0].recorder
    axes = recorder.axes
    slots: dict[Hashable, VarDim] = {}
    renames: list[dict[Var, Var]] = []
    operands = list(xs)
    for n, (x, names) in enumerate(zip(xs, labels, strict=True)):
        pairs: list[tuple[Var, Var]] = []
        for position, (label, dim) in enumerate(zip(names, x.dims, strict=True)):
            first = label not in slots
            slot = slots.setdefault(label, ())
            if label in exact and not first and axes.extent(slot) != axes.extent(dim):
                _mismatch(op, xs, recorder)
            if not axes.atoms(dim):
                continue
            if not axes.atoms(slot):
                taken = {v for d in slots.values() for v in axes.atoms(d)}
                slots[label] = tuple(axes.alias(v) if v in taken else v for v in axes.atoms(dim))
                pairs += zip(axes.atoms(dim), slots[label], strict=True)
                continue
            if axes.extent(slot) != axes.extent(dim):
                _mismatch(op, xs, recorder)
            together = axes.align(slot, dim)
            if together is None:
                operands[n] = _refolded(operands[n], position, slot)
                together = axes.align(slot, operands[n].dims[position])
                assert together is not None
            for kept, own in together:
                others = {v for key, d in slots.items() if key != label for v in axes.atoms(d)}
                if kept is not own and own not in others and axes.may_unite(kept, own):
                    axes.unite(kept, own)
                else:
                    axes.link(kept, own)  # a split of one, found later, splits the other
                    pairs.append((own, kept))
        renames.append(_moves(recorder, pairs))
    axes.together(v for d in slots.values() for v in d)
    values = [recorder.renamed(x.value, moves) for x, moves in zip(operands, renames, strict=True)]
    return Meeting(values, {label: axes.atoms(d) for label, d in slots.items()})


def _moves(recorder: Recorder, pairs: Sequence[tuple[Var, Var]]) -> dict[Var, Var]:
    """Renames by atom, as the axes are now; those that came to nothing left out."""
    atoms = recorder.axes.atoms
    flat = [(a, b) for own, kept in pairs for a, b in zip(atoms([own]), atoms([kept]), strict=True)]
    return {a: b for a, b in flat if a is not b}


def _refolded(x: Tensor, position: int, slot: VarDim) -> Tensor:
    """x with the dimension's axes replaced by fresh ones of the slot's structure, by a reshape boundary."""
    recorder = x.recorder
    target = tuple(recorder.axes.alias(v) for v in recorder.axes.atoms(slot))
    dims = (*x.dims[:position], target, *x.dims[position + 1 :])
    return Tensor(recorder, recorder.reshaped(x.value, x.dims, dims), dims)


def _mismatch(op: str, xs: Sequence[Tensor], recorder: Recorder) -> NoReturn:
    shapes = " and ".join(f"[{', '.join(map(str, x.sizes))}]" for x in xs)
    raise ShapeError(
        f"{op} of shapes {shapes} does not fit",
        op=op,
        where=recorder.location(),
        remedy="transpose, reshape or unsqueeze an operand",
    )


# -- elementwise -------------------------------------------------------------------------------------------------


def _right_aligned(xs: Sequence[Tensor]) -> tuple[list[range], int]:
    n = max(x.ndim for x in xs)
    return [range(n - x.ndim, n) for x in xs], n


def _each(op: PureOp, name: str, xs: Sequence[Tensor], dtype: DType, agree: int | None = 0) -> Tensor:
    """One elementwise operator; operands from number `agree` on are brought to `dtype`."""
    recorder = xs[0].recorder
    if any(x.masked is not None for x in xs):
        raise UnsupportedOpError(
            f"{name} of a value masked to minus infinity",
            op=name,
            where=recorder.location(),
            remedy="such a value may be shifted, scaled by a positive number, reduced by max and exponentiated",
        )
    labels, n = _right_aligned(xs)
    order = list(range(len(xs)))
    if isinstance(op, Elementwise) and op.fn in COMMUTATIVE:
        # whichever stands first, an input goes under the axes of what is computed
        order.sort(key=lambda i: recorder.is_given(xs[i].value))
    met = meet(name, [xs[i] for i in order], [labels[i] for i in order])
    values = [met.values[order.index(i)] for i in range(len(xs))]
    if agree is not None:
        values = [*values[:agree], *_agreeing(recorder, values[agree:], dtype)]
    dims = met.dims(range(n))
    own = {v for value in values for v in recorder.atoms(value)}
    return Tensor(recorder, recorder.record(op, values, (v for d in dims for v in d if v in own), dtype), dims)


def elementwise(fn: str, *xs: Any, attrs: tuple[tuple[str, str | Fraction], ...] = ()) -> Tensor:
    """`fn` element by element, with PyTorch's broadcasting and promotion."""
    recorder = recorder_of(xs, fn)
    dtype = result_type(xs)
    if fn in FLOAT_FUNCTIONS and not dtype.is_float:
        dtype = DEFAULT_FLOAT
    if fn == "div" and isinstance(xs[1], numbers.Real) and xs[1] == 0:
        raise UnsupportedOpError(
            "division by the constant 0",
            op=fn,
            where=recorder.location(),
            remedy="divide by a number that is not zero, or by a tensor",
        )
    if fn in ("sub", "neg") and dtype is DType.bool:
        raise UnsupportedOpError(f"{fn} of bool tensors", op=fn, where=recorder.location(), remedy="use ~ or a cast")
    if any(isinstance(x, Tensor) and x.masked is not None for x in xs):
        return _masked_elementwise(fn, lifted(recorder, xs, dtype), xs)
    operands = lifted(recorder, xs, dtype)
    return _each(Elementwise(fn, attrs), fn, operands, dtype)


def _masked_elementwise(fn: str, xs: Sequence[Tensor], given: Sequence[Any]) -> Tensor:
    """Shifts, positive scales and exp of values masked to minus infinity."""
    masks = [x.masked for x in xs if x.masked is not None]
    bare = [Tensor(x.recorder, x.value, x.dims) for x in xs]
    positive = all(
        x.masked is not None or (isinstance(g, int | float | Fraction) and g > 0) or isinstance(g, SizeValue)
        for x, g in zip(xs, given, strict=True)
    )
    if fn == "exp":
        return _each(MaskedExp(), "exp", [*bare, *masks], xs[0].dtype, None)
    shifts = fn == "add" or (fn == "sub" and xs[1].masked is None)
    scales = len(masks) == 1 and (fn == "mul" or (fn == "div" and xs[0].masked is not None)) and positive
    if not (shifts or scales):
        raise UnsupportedOpError(
            f"{fn} of a value masked to minus infinity",
            op=fn,
            where=xs[0].recorder.location(),
            remedy="such a value may be shifted, scaled by a positive number, reduced by max and exponentiated",
        )
    result = elementwise(fn, *bare)
    return _masked(result, fold(lambda a, b: logical("and", a, b), masks))


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask holds, else minus infinity; the mask gets the dimensions of x."""
    labels, n = _right_aligned([x, mask])
    met = meet("where", [x, mask], labels)
    dims = met.dims(range(n))
    return Tensor(x.recorder, met.values[0], dims, Tensor(x.recorder, met.values[1], dims))


def power(x: Any, exponent: Any) -> Tensor:
    if not isinstance(exponent, numbers.Real):
        raise UnsupportedOpError(
            "pow takes a number as exponent",
            op="pow",
            where=recorder_of((x, exponent), "pow").location(),
            remedy="write exp(exponent * log(base))",
        )
    exact = literal(exponent if isinstance(exponent, int | float | Fraction) else float(exponent))
    special = {
        Fraction(2): "square",
        Fraction(1, 2): "sqrt",
        Fraction(-1, 2): "rsqrt",
        Fraction(-1): "reciprocal",
    }
    if exact == 1:
        return cast(x, result_type([x, exponent]))
    if exact in special:
        return elementwise(special[exact], x)
    dtype = result_type([x, exponent])
    return _each(Elementwise("pow", (("exponent", exact),)), "pow", [x], dtype)


def compare(relation: Relation, a: Any, b: Any) -> Tensor:
    recorder = recorder_of((a, b), relation)
    return _each(Compare(relation), relation, lifted(recorder, (a, b), result_type((a, b))), DType.bool, None)


def logical(fn: str, *xs: Any) -> Tensor:
    recorder = recorder_of(xs, fn)
    operands = lifted(recorder, xs, DType.bool)
    if any(x.dtype is not DType.bool for x in operands):
        raise UnsupportedOpError(f"{fn} of {result_type(xs)} tensors", op=fn, where=recorder.location(),
                                 remedy="compare first: the operands must be bool")  # fmt: skip
    return _each(Elementwise(fn), fn, operands, DType.bool, None)


def where(condition: Any, a: Any, b: Any) -> Tensor:
    """a where the condition holds, else b; either may be minus infinity."""
    recorder = recorder_of((condition, a, b), "where")
    if not isinstance(condition, Tensor) or condition.dtype is not DType.bool:
        raise ShapeError("the condition of where is a bool tensor", op="where", where=recorder.location())
    if _is_minus_infinity(a) and _is_minus_infinity(b):
        raise UnsupportedOpError("where with two infinities", op="where", where=recorder.location())
    if _is_minus_infinity(a):
        return where(~condition, b, a)
    if _is_minus_infinity(b) and (not isinstance(a, Tensor) or a.masked is None):
        dtype = result_type((a, b))
        (kept,) = lifted(recorder, (a,), dtype)
        return _masked(cast(kept, dtype), condition)
    if any(isinstance(x, Tensor) and x.masked is not None for x in (a, b)) or _is_minus_infinity(b):
        return _masked_where(recorder, condition, a, b)
    dtype = result_type((a, b))
    return _each(Select(), "where", [condition, *lifted(recorder, (a, b), dtype)], dtype, 1)


def _masked_where(recorder: Recorder, condition: Tensor, a: Any, b: Any) -> Tensor:
    """where(c, (x, mx), (y, my)) = (where(c, x, y), (c & mx) | (~c & my)), an unmasked operand having m = true."""

    def mask(x: Any) -> Tensor | bool:
        if _is_minus_infinity(x):
            return False
        return x.masked if isinstance(x, Tensor) and x.masked is not None else True

    def bare(x: Any) -> Any:
        if _is_minus_infinity(x):
            return 0
        return Tensor(recorder, x.value, x.dims) if isinstance(x, Tensor) else x

    result = where(condition, bare(a), bare(b))
    kept = (condition & mask(a)) | (~condition & mask(b))
    return _masked(result, kept)


def _is_minus_infinity(x: Any) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, numbers.Integral) and float(x) == -math.inf


# -- contraction -------------------------------------------------------------------------------------------------


def contracted(op: str, xs: Sequence[Tensor], labels: Sequence[Sequence[Hashable]], out: Sequence[Hashable],
               exact: Sequence[Hashable] = ()) -> Tensor:  # fmt: skip
    """Σ over the labels that are not in `out` of the product of the operands."""
    recorder = xs[0].recorder
    if any(x.masked is not None for x in xs):
        raise UnsupportedOpError(f"{op} of a value masked to minus infinity", op=op, where=recorder.location())
    met = meet(op, xs, labels, exact)
    summed = [v for label, d in met.slots.items() if label not in out for v in d]
    dims = met.dims(out)
    values = list(met.values)
    carried = {v for value in values for v in recorder.atoms(value)}
    values[0] = recorder.spread(values[0], [v for v in summed if v not in carried])
    dtype = result_type(xs)
    values = _agreeing(recorder, values, dtype)
    kept = [v for d in dims for v in d if v in carried]
    if summed:
        names = tuple(v.name for v in summed)
        op_: PureOp = Reduce("sum", names) if len(values) == 1 else Contract(names)
        return Tensor(recorder, recorder.record(op_, values, kept, dtype), dims)
    product_ = values[0]
    for value in values[1:]:
        have = {*recorder.atoms(product_), *recorder.atoms(value)}
        product_ = recorder.record(Elementwise("mul"), (product_, value), [v for v in kept if v in have], dtype)
    return Tensor(recorder, product_, dims)


def matmul(a: Any, b: Any) -> Tensor:
    """PyTorch's matmul: vectors, matrices, and batches that broadcast."""
    recorder = recorder_of((a, b), "matmul")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.ndim or not b.ndim:
        raise ShapeError("matmul takes two tensors of one or more dimensions", op="matmul", where=recorder.location())
    if a.dtype is not b.dtype and not recorder.block:
        raise ShapeError(
            f"matmul of {a.dtype} and {b.dtype}", op="matmul", where=recorder.location(), remedy="cast one operand"
        )
    batch = max(a.ndim, b.ndim) - 2
    left: list[Hashable] = [*range(batch - (a.ndim - 2), batch), "row", "inner"] if a.ndim > 1 else ["inner"]
    right: list[Hashable] = [*range(batch - (b.ndim - 2), batch), "inner", "column"] if b.ndim > 1 else ["inner"]
    out: list[Hashable] = [*range(max(batch, 0))]
    out += ["row"] if a.ndim > 1 else []
    out += ["column"] if b.ndim > 1 else []
    _hint(a, left.index("inner"), "k")
    if b.ndim > 1:
        _hint(b, b.ndim - 1, "n")
    if a.ndim > 1:
        _hint(a, a.ndim - 2, "m")
    return contracted("matmul", (a, b), (left, right), out, exact=("inner",))


def _hint(x: Tensor, i: int, name: str, strength: int = ROLE) -> None:
    atoms = x.recorder.axes.atoms(x.dims[i])
    if len(atoms) == 1:
        atoms[0].wish((strength, name))


def einsum(equation: str, *xs: Tensor) -> Tensor:
    """Explicit and implicit forms, with an ellipsis; a letter may not repeat within one operand."""
    recorder = recorder_of(xs, "einsum")
    labels, out = _einsum_labels(recorder, equation, xs)
    for term, x in zip(labels, xs, strict=True):
        for i, label in enumerate(term):
            if isinstance(label, str):
                _hint(x, i, label.lower(), LETTER)
    return contracted("einsum", xs, labels, out)


def _einsum_labels(
    recorder: Recorder, equation: str, xs: Sequence[Tensor]
) -> tuple[list[list[Hashable]], list[Hashable]]:
    def wrong(reason: str) -> NoReturn:
        raise ShapeError(f"einsum {equation!r}: {reason}", op="einsum", where=recorder.location())

    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(xs):
        wrong(f"{len(terms)} terms for {len(xs)} operands")
    spread = max([x.ndim - len(t.replace("...", "")) for t, x in zip(terms, xs, strict=True) if "..." in t], default=0)
    labels: list[list[Hashable]] = []
    for term, x in zip(terms, xs, strict=True):
        letters = term.replace("...", "")
        if len(set(letters)) < len(letters):
            raise UnsupportedOpError(
                f"einsum {equation!r} takes a diagonal",
                op="einsum",
                where=recorder.location(),
                remedy="mask with mg.where(mg.iota(n)[:, None] == mg.iota(n), x, 0) and sum",
            )
        extra = x.ndim - len(letters)
        if extra < 0 or (extra and "..." not in term):
            wrong(f"{term!r} does not name {x.ndim} dimensions")
        head, _, tail = term.partition("...")
        labels.append([*head, *range(spread - extra, spread), *tail])
    if arrow:
        head, dots, tail = right.partition("...")
        out: list[Hashable] = [*head, *(range(spread) if dots else ()), *tail]
    else:
        letters = "".join(terms).replace(".", "")
        out = [*range(spread), *sorted(c for c in set(letters) if letters.count(c) == 1)]
    known = {label for term in labels for label in term}
    if missing := [c for c in out if c not in known]:
        wrong(f"the output names {missing[0]!r}, which no operand has")
    if len(set(out)) < len(out):
        wrong("the output names a letter twice")
    return labels, out


# -- reductions --------------------------------------------------------------------------------------------------


def _axes(x: Tensor, axis: Axis) -> list[int]:
    if axis is None:
        return list(range(x.ndim))
    places = [normal_axis(x, i) for i in (axis if isinstance(axis, tuple | list) else (axis,))]
    if len(set(places)) < len(places):
        raise ShapeError(f"a dimension is named twice in {axis}", where=x.recorder.location())
    return places[: x.ndim] or list(range(x.ndim))


# The least finite number of each type: where a maximum starts if everything is masked.
LOWEST = {
    DType.f16: Fraction(-65504),
    DType.bf16: -(2 - Fraction(1, 2**7)) * 2**127,
    DType.f32: -(2 - Fraction(1, 2**23)) * 2**127,
    DType.f64: -(2 - Fraction(1, 2**23)) * 2**127,
}


def reduced(kind: ReduceKind, x: Tensor, axis: Axis, keepdims: bool) -> Tensor:
    recorder = x.recorder
    if x.masked is not None:
        if kind != "max":
            raise UnsupportedOpError(f"{kind} of a value masked to minus infinity", op=kind, where=recorder.location())
        x = where(x.masked, Tensor(recorder, x.value, x.dims), LOWEST[x.dtype])
    if kind == "mean" and not x.dtype.is_float:
        raise UnsupportedOpError(f"mean of {x.dtype}", op="mean", where=recorder.location(), remedy="cast to a float")
    if kind == "sum" and not x.dtype.is_float:
        x = cast(x, DEFAULT_INT)
    places = _axes(x, axis)
    gone = [v for i in places for v in recorder.axes.atoms(x.dims[i])]
    dims = tuple(() if i in places else d for i, d in enumerate(x.dims) if keepdims or i not in places)
    if not gone:
        return x.seen(dims)
    value = recorder.spread(x.value, gone)
    kept = [v for v in recorder.atoms(value) if v not in gone]
    op = Reduce(kind, tuple(v.name for v in gone))
    return Tensor(recorder, recorder.record(op, (value,), kept, x.dtype), dims)


def cumulated(x: Tensor, axis: int) -> Tensor:
    recorder, i = x.recorder, normal_axis(x, axis)
    if not x.dims:
        return x
    atoms = recorder.axes.atoms(x.dims[i])
    if x.masked is not None:
        raise UnsupportedOpError("cumsum of a value masked to minus infinity", op="cumsum", where=recorder.location())
    if not atoms:
        return x
    if len(atoms) > 1:
        x = _merged_dim(x, i)
        atoms = recorder.axes.atoms(x.dims[i])
    value = recorder.spread(x.value if x.dtype.is_float else cast(x, DEFAULT_INT).value, atoms)
    return Tensor(
        recorder, recorder.record(CumSum(atoms[0].name), (value,), recorder.atoms(value), value.dtype), x.dims
    )


def softmax(x: Tensor, axis: int) -> Tensor:
    e = elementwise("exp", x)
    return e / reduced("sum", e, axis, True)


# -- views -------------------------------------------------------------------------------------------------------


def plain_size(recorder: Recorder, size: Any) -> Size:
    """A size from what a user writes: an int, a Dim, a size of a shape."""
    found: Any = _plain(size)
    if isinstance(found, Dim | Monomial):
        return found
    if isinstance(found, numbers.Integral):
        return int(found)
    raise ShapeError(f"{size} is no size", where=recorder.location())


def _merged_dim(x: Tensor, i: int) -> Tensor:
    """x with dimension i as one axis, by a reshape boundary."""
    whole = (x.recorder.axes.fresh(x.recorder.axes.extent(x.dims[i])),)
    dims = (*x.dims[:i], whole, *x.dims[i + 1 :])
    return Tensor(x.recorder, x.recorder.reshaped(x.value, x.dims, dims), dims, x.masked)


def reshape(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """The same elements in row-major order under another shape, one size of which may be -1."""
    recorder = x.recorder
    total = product(x.sizes)
    sizes = [plain_size(recorder, s) for s in shape]
    if sizes.count(-1) > 1:
        raise ShapeError("reshape infers one size at most", op="reshape", where=recorder.location())
    try:
        sizes = [over(total, product(t for t in sizes if t != -1)) if s == -1 else s for s in sizes]
    except (ShapeError, ZeroDivisionError):
        sizes = [0]
    if product(sizes) != total or any(isinstance(s, int) and s < 1 for s in sizes):
        old, new = ", ".join(map(str, x.sizes)), ", ".join(map(str, shape))
        raise ShapeError(f"reshape of [{old}] to [{new}]", op="reshape", where=recorder.location())
    cut = recorder.axes.cut([v for d in x.dims for v in d], sizes)
    if cut is not None:
        return x.seen(cut)
    if x.masked is not None:
        raise UnsupportedOpError("this reshape of a masked value", op="reshape", where=recorder.location(),
                                 remedy="mask after the reshape")  # fmt: skip
    dims = _boundary_dims(x, sizes)
    return Tensor(recorder, recorder.reshaped(x.value, x.dims, dims), dims)


def _boundary_dims(x: Tensor, sizes: Sequence[Size]) -> VarDims:
    """Fresh axes between the leading and the trailing dimensions that stay as they are."""
    old, n = x.sizes, min(len(x.sizes), len(sizes))
    lead = next((i for i in range(n) if old[i] != sizes[i]), n)
    tail = next((i for i in range(n - lead) if old[-1 - i] != sizes[-1 - i]), n - lead)
    middle = sizes[lead : len(sizes) - tail]
    fresh = tuple((x.recorder.axes.fresh(s),) if s != 1 else () for s in middle)
    return (*x.dims[:lead], *fresh, *x.dims[len(old) - tail :])


def expand(x: Tensor, shape: Sequence[Any]) -> Tensor:
    """Dimensions of size 1, and new leading ones, repeated; records nothing."""
    recorder = x.recorder
    sizes = [plain_size(recorder, s) for s in shape]
    extra = len(sizes) - x.ndim
    if extra < 0:
        raise ShapeError(f"expand of {x!r} to {len(sizes)} dimensions", op="expand", where=recorder.location())
    dims: list[VarDim] = []
    for size, dim in zip(sizes, ((),) * extra + x.dims, strict=True):
        own = recorder.axes.extent(dim)
        if size in (-1, own):
            dims.append(dim)
        elif own == 1:
            dims.append((recorder.axes.fresh(size),))
        else:
            raise ShapeError(
                f"expand of {x!r} to [{', '.join(map(str, sizes))}]", op="expand", where=recorder.location()
            )
    mask = None if x.masked is None else expand(x.masked, shape)
    return Tensor(recorder, x.value, tuple(dims), mask)


def sliced(x: Tensor, i: int, start: int, stop: int | None, step: int) -> Tensor:
    """x[start:stop:step] along dimension i."""
    recorder, size = x.recorder, x.sizes[i]

    def wrong(reason: str, remedy: str | None = None) -> NoReturn:
        raise ShapeError(
            f"slice of a dimension of {size}: {reason}", op="slice", where=recorder.location(), remedy=remedy
        )

    if step < 1:
        wrong("the step must be positive")
    if start == 0 and step == 1 and (stop is None or stop == size):
        return x
    if isinstance(size, int):
        start, stop, _ = slice(start, stop, step).indices(size)
    else:
        least = min(d.min for d in dims_of(size))
        if stop is None or start < 0 or stop < 0 or not (isinstance(size, Dim) and stop <= least):
            wrong(
                "a symbolic size is cut only at bounds that every admissible size has",
                f"give 0 <= start < stop <= {least}, or a larger least size",
            )
    count = len(range(start, stop, step))
    if not count:
        wrong("nothing is left", "a dimension has at least one element")
    if count == 1:
        step = 1  # the step of a single element says nothing
    if x.masked is not None:
        bare = Tensor(recorder, x.value, x.dims)
        mask = sliced(x.masked, i, start, stop, step)
        return Tensor(recorder, (kept := sliced(bare, i, start, stop, step)).value, kept.dims, mask)
    return _cut_dim(x, i, start, count, step)


def _cut_dim(x: Tensor, i: int, start: int, count: int, step: int) -> Tensor:
    recorder = x.recorder
    axes = recorder.axes
    atoms = axes.atoms(x.dims[i])
    if len(atoms) == len(recorder.lacking(x.value, atoms)):  # only repeated: repeated less often
        cut = (axes.fresh(count),) if count > 1 else ()
        return x.seen((*x.dims[:i], cut, *x.dims[i + 1 :]))
    value = recorder.spread(x.value, atoms)
    tail = axes.extent(atoms[1:])
    if len(atoms) == 1:
        rest: VarDim = ()
    elif step == 1 and isinstance(tail, int) and start % tail == 0 and count % tail == 0:
        start, count, rest = start // tail, count // tail, atoms[1:]
    else:
        x = _merged_dim(Tensor(recorder, value, x.dims), i)
        value, atoms, rest = x.value, x.dims[i], ()
    out = axes.fresh(count)
    kept = [out if v is atoms[0] else v for v in recorder.atoms(value)]
    op = Slice(atoms[0].name, recorder.axis(out), start, step)
    cut_value = recorder.record(op, (value,), kept, x.dtype)
    if count == 1:  # the sum over one element
        cut_value = recorder.record(
            Reduce("sum", (out.name,)), (cut_value,), [v for v in kept if v is not out], x.dtype
        )
        return Tensor(recorder, cut_value, (*x.dims[:i], rest, *x.dims[i + 1 :]))
    return Tensor(recorder, cut_value, (*x.dims[:i], (out, *rest), *x.dims[i + 1 :]))


def indexed(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """Integers, slices, None, one Ellipsis, and one tensor of integers."""
    where_ = x.recorder.location()
    if any(isinstance(k, list) for k in index):
        raise UnsupportedOpError("indexing by a list", op="index", where=where_, remedy="give a tensor of integers")
    if sum(isinstance(k, Tensor) for k in index) > 1:
        raise UnsupportedOpError("an index of several tensors", op="index", where=where_, remedy="index by one of them")
    used = sum(k is not None and not isinstance(k, EllipsisType) for k in index)
    if used > x.ndim:
        raise ShapeError(f"{used} indices for {x!r}", op="index", where=where_)
    if sum(isinstance(k, EllipsisType) for k in index) > 1:
        raise ShapeError("an index has one ellipsis at most", op="index", where=where_)
    if not any(isinstance(k, EllipsisType) for k in index):
        index = (*index, ...)
    at = 0
    for k in index:
        match k:
            case None:
                x = x.unsqueeze(at)
                at += 1
            case EllipsisType():
                at += x.ndim - at - _consumed_after(index)
            case slice():
                start = 0 if k.start is None else int(k.start)
                stop = None if k.stop is None else k.stop
                whole = isinstance(stop, SizeValue) and stop.size == x.sizes[at]
                x = sliced(
                    x, at, start, None if stop is None or whole else int(stop), 1 if k.step is None else int(k.step)
                )
                at += 1
            case Tensor():
                x = taken(x, k, at)
                at += k.ndim
            case _ if isinstance(k, numbers.Integral | SizeValue):
                x = _picked(x, at, int(k))
            case _:
                raise UnsupportedOpError(f"an index of type {type(k).__name__}", op="index", where=where_)
    return x


def _consumed_after(index: tuple[Any, ...]) -> int:
    after = index[next(i for i, k in enumerate(index) if isinstance(k, EllipsisType)) + 1 :]
    return sum(k is not None for k in after)


def _picked(x: Tensor, i: int, k: int) -> Tensor:
    size = x.sizes[i]
    if isinstance(size, int):
        if not -size <= k < size:
            raise ShapeError(f"index {k} of a dimension of {size}", op="index", where=x.recorder.location())
        k %= size
    x = sliced(x, i, k, k + 1, 1)
    return x.seen((*x.dims[:i], *x.dims[i + 1 :]))


def _need_index(x: Tensor, index: Tensor, op: str) -> None:
    if x.masked is not None:
        raise UnsupportedOpError(f"{op} of a value masked to minus infinity", op=op, where=x.recorder.location())
    if index.dtype.is_float or index.dtype is DType.bool:
        raise ShapeError(f"an index of {index.dtype}", op=op, where=x.recorder.location(), remedy="give integers")


def taken(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x[.., index, ..]: the index's dimensions in the place of one of x."""
    recorder = recorder_of([x, index], "index")
    _need_index(x, index, "index")
    i = normal_axis(x, axis)
    x = _one_axis(x, i)
    labels = [[("x", n) for n in range(x.ndim)], [("index", n) for n in range(index.ndim)]]
    met = meet("index", [x, index], labels)
    (source,) = recorder.axes.atoms(met.slots["x", i])
    value, places = recorder.spread(met.values[0], [source]), recorder.atoms(met.values[1])
    kept = [w for v in recorder.atoms(value) for w in (places if v is source else (v,))]
    found = recorder.record(Gather(source.name), (value, met.values[1]), kept, x.dtype)
    dims = met.dims([*labels[0][:i], *labels[1], *labels[0][i + 1 :]])
    return Tensor(recorder, found, dims)


def picked(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """x at the index's entries along one dimension, both alike in the others (`torch.gather`): result[i, j] =
    x[index[i, j], j] for axis 0.  Where the index is smaller in another dimension, the first entries of x count."""
    recorder = recorder_of([x, index], "gather")
    _need_index(x, index, "gather")
    i = normal_axis(x, axis)
    if x.ndim != index.ndim or not x.ndim:
        _mismatch("gather", [x, index], recorder)
    for n, (own, wanted) in enumerate(zip(x.sizes, index.sizes, strict=True)):
        if n != i and own != wanted:
            x = sliced(x, n, 0, int(index.shape[n]), 1)
    x = _one_axis(x, i)
    labels: list[list[Hashable]] = [[("x" if n == i else n) for n in range(x.ndim)], list(range(x.ndim))]
    met = meet("gather", [x, index], labels)
    (source,) = recorder.axes.atoms(met.slots["x"])
    value, places = recorder.spread(met.values[0], [source]), recorder.atoms(met.values[1])
    own_places = [v for v in places if v not in recorder.atoms(value)]
    kept = [w for v in recorder.atoms(value) for w in (own_places if v is source else (v,))]
    found = recorder.record(Gather(source.name), (value, met.values[1]), kept, x.dtype)
    return Tensor(recorder, found, met.dims(labels[1]))


def scattered(x: Tensor, index: Tensor, size: Any, axis: int) -> Tensor:
    """Zeros with `size` entries along one dimension, to which x is added at the places that the index names.  The
    index's dimensions are those of x from `axis` on, in whose place comes the new one."""
    recorder = recorder_of([x, index], "scatter_add")
    _need_index(x, index, "scatter_add")
    i = normal_axis(x, axis)
    end = i + index.ndim
    if index.ndim < 1 or index.sizes != x.sizes[i:end]:
        raise ShapeError(
            f"scatter_add of {x!r} by {index!r}", op="scatter_add", where=recorder.location(),
            remedy="give one index for each entry along the dimensions from `axis` on",
        )  # fmt: skip
    labels = list(range(x.ndim))
    met = meet("scatter_add", [_one_axis(x, i), index], [labels, labels[i:end]])
    closed = recorder.axes.atoms(v for d in met.dims(labels[i:end]) for v in d)
    value = recorder.spread(met.values[0], closed)
    out = recorder.axes.fresh(plain_size(recorder, size))
    kept = [v for v in recorder.atoms(value) if v not in closed]
    recorder.axes.together([*kept, *closed, out])
    op = Scatter(tuple(v.name for v in closed), recorder.axis(out))
    found = recorder.record(op, (value, met.values[1]), [out, *kept], x.dtype)
    return Tensor(recorder, found, (*met.dims(labels[:i]), (out,), *met.dims(labels[end:])))


def concatenated(xs: Sequence[Tensor], axis: int) -> Tensor:
    recorder = recorder_of(xs, "concat")
    if any(x.masked is not None for x in xs):
        raise UnsupportedOpError("concat of masked values", op="concat", where=recorder.location())
    i = normal_axis(xs[0], axis)
    if any(x.ndim != xs[0].ndim for x in xs):
        _mismatch("concat", xs, recorder)
    if any(not isinstance(x.sizes[i], int) for x in xs):
        raise UnsupportedOpError(
            "concat along a symbolic size", op="concat", where=recorder.location(), remedy="give that size a number"
        )
    if len(xs) == 1:
        return xs[0]
    dtype = fold(promote, [x.dtype for x in xs])
    others = [xs[0].sizes[:i], xs[0].sizes[i + 1 :]]
    if any([x.sizes[:i], x.sizes[i + 1 :]] != others for x in xs):
        _mismatch("concat", xs, recorder)
    whole = [_one_axis(cast(x, dtype), i) for x in xs]
    labels = [[*range(i), ("cat", x.sizes[i]), *range(i + 1, x.ndim)] for x in whole]
    met = meet("concat", whole, labels)
    pieces = [(met.slots["cat", x.sizes[i]])[0] for x in whole]
    out = recorder.axes.fresh(sum(int(x.shape[i]) for x in whole))
    rest = met.dims([*range(i), *range(i + 1, xs[0].ndim)])
    carried = {v for value in met.values for v in recorder.atoms(value)}
    shared = [v for d in rest for v in d if v in carried]
    values = [recorder.spread(v, [*shared, p]) for v, p in zip(met.values, pieces, strict=True)]
    op = Concat(tuple(p.name for p in pieces), recorder.axis(out))
    dims = (*rest[:i], (out,), *rest[i:])
    return Tensor(
        recorder, recorder.record(op, values, [v for d in dims for v in d if v is out or v in carried], dtype), dims
    )


def _one_axis(x: Tensor, i: int) -> Tensor:
    """x with dimension i as exactly one axis, one of size 1 included."""
    recorder = x.recorder
    atoms = recorder.axes.atoms(x.dims[i])
    if len(atoms) > 1:
        return _merged_dim(x, i)
    if atoms:
        return x
    unit = recorder.axes.fresh(1)
    return Tensor(recorder, x.value, (*x.dims[:i], (unit,), *x.dims[i + 1 :]))


def iota(recorder: Recorder, size: Size) -> Tensor:
    if size == 1:
        return constant(recorder, 0, DType.i64).seen(((),))
    axis = recorder.axes.fresh(size)
    return Tensor(recorder, recorder.record(Iota(recorder.axis(axis)), (), (axis,), DType.i64), ((axis,),))
