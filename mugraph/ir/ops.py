"""The operators.

    Op = Elementwise(fn, attrs) | Compare(relation) | Select | MaskedExp | Const(value) | SizeOf(axis) | Iota(axis)
       | Contract(axes) | Reduce(kind, axes) | CumSum(axis) | TopK(axis, k)
       | Cast(dtype) | Quantize(dtype, scale) | Unpack(axis, bits) | Pack(axis, bits)
       | Reshape(dims) | Transpose | Broadcast(axes) | Slice(axis, start, step) | Concat(axis) | Rename(axes)   views
       | Gather(axis) | Scatter(axes, out, kind)
       | Library(name, semantics: Program) | Kernel(blocks: BlockGraph...)

Operands meet by axis *name*: `Elementwise` ranges over the union of its operands' axes, `Contract(axes)` sums the
product of its operands over `axes`.  Positions of dimensions belong to the tensors, not to the operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from mugraph.ir.axes import Axis
from mugraph.ir.types import Dims, DType, Tensor

if TYPE_CHECKING:
    from mugraph.ir.graph import BlockGraph, Program

# Function names with the number of operands.  One row per function here, one in each algebra.
FUNCTIONS: dict[str, int] = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "max": 2, "min": 2,
    "neg": 1, "reciprocal": 1, "square": 1, "sqrt": 1, "rsqrt": 1, "abs": 1, "pow": 1,
    "exp": 1, "log": 1, "sigmoid": 1, "silu": 1, "gelu": 1, "relu": 1, "tanh": 1, "round": 1,
    "sin": 1, "cos": 1, "erf": 1, "expm1": 1, "log1p": 1, "floor": 1,
    "and": 2, "or": 2, "not": 1,
}  # fmt: skip

ReduceKind = Literal["sum", "mean", "max", "min"]
Relation = Literal["eq", "ne", "lt", "le", "gt", "ge"]


@dataclass(frozen=True)
class Elementwise:
    """`fn` applied element by element.  attrs: `pow` has `exponent`, `gelu` has `approximate` ("none" | "tanh")."""

    fn: str
    attrs: tuple[tuple[str, str | Fraction], ...] = ()


COMMUTATIVE = ("add", "mul", "max", "min")  # to the verifier too: it takes comparisons for functions of their order


@dataclass(frozen=True)
class Compare:
    """Elementwise comparison; the result is bool."""

    relation: Relation


@dataclass(frozen=True)
class Select:
    """`Select(mask, a, b)`: a where mask, else b."""


@dataclass(frozen=True)
class MaskedExp:
    """`MaskedExp(x, mask)`: exp(x) where mask, else 0.  A value masked to minus infinity before exp."""


@dataclass(frozen=True)
class Const:
    """An exact rational literal."""

    value: Fraction
    dtype: DType = DType.f32


@dataclass(frozen=True)
class SizeOf:
    """The size of an axis, as a scalar.  Never an int, so one program serves all sizes."""

    axis: Axis
    dtype: DType = DType.f32


@dataclass(frozen=True)
class Iota:
    """The index along `axis`, as i64."""

    axis: Axis


@dataclass(frozen=True)
class Contract:
    """The sum over `axes` of the product of the operands: matmul, einsum, dot."""

    axes: tuple[str, ...]


@dataclass(frozen=True)
class Reduce:
    """A reduction of one operand over `axes`."""

    kind: ReduceKind
    axes: tuple[str, ...]


@dataclass(frozen=True)
class CumSum:
    """Inclusive prefix sum along `axis`."""

    axis: str


@dataclass(frozen=True)
class TopK:
    """The k greatest values along `axis`, in descending order, along the new axis `out`: values and i64 indices."""

    axis: str
    out: Axis


@dataclass(frozen=True)
class Cast:
    """Another element type.  Between floating types it is the identity of the algebra."""

    dtype: DType


@dataclass(frozen=True)
class Quantize:
    """`clip(round(x / scale), range of dtype)`; operands x and scale."""

    dtype: DType


@dataclass(frozen=True)
class Unpack:
    """Splits each stored element along `axis` into codes of `dtype`; `out` is the longer axis, low bits first."""

    axis: str
    out: Axis
    dtype: DType


@dataclass(frozen=True)
class Pack:
    """Inverse of Unpack: joins codes along `axis` into elements of `dtype` along the shorter axis `out`."""

    axis: str
    out: Axis
    dtype: DType


@dataclass(frozen=True)
class Reshape:
    """The same elements in row-major order under other dimensions.  With the same axes it only regroups them."""

    dims: Dims


@dataclass(frozen=True)
class Transpose:
    """The same axes in another order of dimensions."""


@dataclass(frozen=True)
class Broadcast:
    """Repeats the operand along axes that it lacks."""

    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Slice:
    """`y[out] = x[start + step * out]` along `axis`."""

    axis: str
    out: Axis
    start: int
    step: int = 1


@dataclass(frozen=True)
class Concat:
    """Joins operand i, along its own axis `axes[i]`, into the axis `out`, in order."""

    axes: tuple[str, ...]
    out: Axis


@dataclass(frozen=True)
class Rename:
    """An alias: the same value under other axes, of the same sizes.  Gives `x @ x.T` two different row axes."""

    axes: tuple[tuple[str, Axis], ...]


@dataclass(frozen=True)
class Gather:
    """`Gather(x, index)`: `y[..] = x[.., index[..], ..]` along `axis`; the index's axes take the place of `axis`.

    The indices of gather and scatter are -n .. n - 1 for an axis of size n; negative ones count from its end."""

    axis: str

    def keeps_rows(self, source: Tensor) -> bool:
        """Whether what lies side by side in the source does so in the result: a kernel may load it by index."""
        return self.axis not in [a.name for d in source.dims[-1:] for a in d]


@dataclass(frozen=True)
class Scatter:
    """`Scatter(x, index)`: zeros along the new axis `out`, and x added (or written, the last one in row-major order
    counts) at the places that index names for each entry along `axes`.  Other axes of the index are those of x."""

    axes: tuple[str, ...]
    out: Axis
    kind: Literal["sum", "write"] = "sum"


@dataclass(frozen=True)
class Library:
    """A call of a library kernel, with its meaning as a program over the operands, in order."""

    name: str
    semantics: Program


@dataclass(frozen=True)
class Kernel:
    """One launch of one or more block graphs.  Their loads name the equation's arguments, their stores its targets."""

    blocks: tuple[BlockGraph, ...]


# Operators that a thread applies to its own elements, without a look at others.
POINTWISE = (Elementwise, Compare, Select, MaskedExp, Const, SizeOf, Cast, Quantize)

View = Reshape | Transpose | Broadcast | Slice | Concat | Rename
PureOp = (
    Elementwise | Compare | Select | MaskedExp | Const | SizeOf | Iota | Contract | Reduce | CumSum | TopK
    | Cast | Quantize | Unpack | Pack | Reshape | Transpose | Broadcast | Slice | Concat | Rename | Gather | Scatter
)  # fmt: skip
Op = PureOp | Library | Kernel
