"""Element types, tensors and how they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from fractions import Fraction

from mugraph.errors import ShapeError
from mugraph.ir.axes import Axis, Size, product


class DType(Enum):
    """An element type.  The value is its name in program text."""

    f64 = "f64"
    f32 = "f32"
    bf16 = "bf16"
    f16 = "f16"
    f8e4m3 = "f8e4m3"
    f8e5m2 = "f8e5m2"
    i64 = "i64"
    i32 = "i32"
    i16 = "i16"
    i8 = "i8"
    u8 = "u8"
    i6 = "i6"
    i4 = "i4"
    u4 = "u4"
    i2 = "i2"
    u2 = "u2"
    i1 = "i1"
    bool = "bool"

    def __str__(self) -> str:
        return self.value

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def is_float(self) -> bool:  # type: ignore[valid-type]
        return self in _FLOATS


_BITS = {
    DType.f64: 64, DType.f32: 32, DType.bf16: 16, DType.f16: 16, DType.f8e4m3: 8, DType.f8e5m2: 8,
    DType.i64: 64, DType.i32: 32, DType.i16: 16, DType.i8: 8, DType.u8: 8, DType.i6: 6,
    DType.i4: 4, DType.u4: 4, DType.i2: 2, DType.u2: 2, DType.i1: 1, DType.bool: 8,
}  # fmt: skip
# The name of each type in PyTorch, which has no arithmetic below 8 bits.
TORCH_NAMES = {
    DType.f64: "float64", DType.f32: "float32", DType.bf16: "bfloat16", DType.f16: "float16",
    DType.f8e4m3: "float8_e4m3fn", DType.f8e5m2: "float8_e5m2", DType.i64: "int64", DType.i32: "int32",
    DType.i16: "int16", DType.i8: "int8", DType.u8: "uint8", DType.bool: "bool",
}  # fmt: skip
# The greatest finite number of each type.
GREATEST = {
    DType.f64: Fraction(2**1024 - 2**971), DType.f32: Fraction(2**128 - 2**104),
    DType.bf16: Fraction(2**128 - 2**120), DType.f16: Fraction(65_504),
    DType.f8e4m3: Fraction(448), DType.f8e5m2: Fraction(57_344),
}  # fmt: skip
_FLOATS = (DType.f8e5m2, DType.f8e4m3, DType.f16, DType.bf16, DType.f32, DType.f64)
_INTS = (
    DType.bool, DType.i1, DType.u2, DType.i2, DType.u4, DType.i4, DType.i6,
    DType.u8, DType.i8, DType.i16, DType.i32, DType.i64,
)  # fmt: skip


def promote(a: DType, b: DType) -> DType:
    """The type of an elementwise result, as PyTorch promotes: floats over integers, wider over narrower, and f16 with
    bf16 is f32."""
    if a == b:
        return a
    if a.is_float != b.is_float:
        return a if a.is_float else b
    if {a, b} == {DType.f16, DType.bf16} or {a, b} == {DType.f8e4m3, DType.f8e5m2}:
        return DType.f32
    order = _FLOATS if a.is_float else _INTS
    return max(a, b, key=order.index)


Dims = tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class Tensor:
    """A named tensor.  Each dimension is an ordered product of axes; `()` is a dimension of size 1."""

    name: str
    dims: Dims
    dtype: DType

    def __post_init__(self) -> None:
        names = [a.name for a in self.axes]
        if len(set(names)) < len(names):
            raise ShapeError(f"axis {max(names, key=names.count)} occurs twice in {self}")

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(a for d in self.dims for a in d)

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(product(a.size for a in d) for d in self.dims)

    def __str__(self) -> str:
        return f"{self.name}: {type_text(self.dims, self.dtype)}"


def type_text(dims: Dims, dtype: DType) -> str:
    """`f16[b, (h d), 1]`: axes by name, products in parentheses, 1 for a dimension without an axis."""
    texts = ["1" if not d else str(d[0]) if len(d) == 1 else f"({' '.join(map(str, d))})" for d in dims]
    return f"{dtype}[{', '.join(texts)}]"


def tensor(name: str, axes: tuple[Axis, ...], dtype: DType) -> Tensor:
    """A tensor with one axis per dimension."""
    return Tensor(name, tuple((a,) for a in axes), dtype)


@dataclass(frozen=True)
class Storage:
    """How a tensor lies in memory: `packing` values per stored element, strides in elements (None: row-major and
    dense), a divisor of every stride but the last, and the alignment of the base address in bytes."""

    dtype: DType
    packing: int = 1
    strides: tuple[Size, ...] | None = None
    divisibility: int = 1
    alignment: int = 16


@dataclass(frozen=True)
class Input:
    """A program input.  `constant` inputs (weights) may be combined ahead of time; `assumptions` state its domain,
    for instance "no row wholly masked"."""

    tensor: Tensor
    storage: Storage
    constant: bool = False
    assumptions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.tensor.name


@dataclass(frozen=True)
class Output:
    """A program output: the value of that name, how it is stored, and the input it overwrites, if any."""

    value: str
    storage: Storage
    alias_of: str | None = None
