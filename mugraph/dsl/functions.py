"""The functions of the language, named and meant as in PyTorch.  They work on traced tensors of programs and of block
graphs alike."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mugraph.dsl import tensor as t
from mugraph.dsl.tensor import Axis, Number, SizeValue, Tensor, cast, einsum, matmul, where
from mugraph.errors import ShapeError, UnsupportedOpError, user_location
from mugraph.ir.axes import Dim
from mugraph.ir.types import DType

__all__ = [
    "abs",
    "add",
    "amax",
    "amin",
    "arange",
    "attention",
    "cast",
    "causal_mask",
    "chunk",
    "concat",
    "cos",
    "cumsum",
    "div",
    "einsum",
    "erf",
    "exp",
    "expand",
    "expm1",
    "floor",
    "gelu",
    "iota",
    "layer_norm",
    "linear",
    "log",
    "log1p",
    "logsumexp",
    "mT",
    "masked_fill",
    "matmul",
    "max",
    "maximum",
    "mean",
    "min",
    "minimum",
    "mul",
    "neg",
    "permute",
    "pow",
    "reciprocal",
    "relu",
    "repeat_interleave",
    "reshape",
    "rms_norm",
    "rsqrt",
    "scatter_add",
    "sigmoid",
    "silu",
    "sin",
    "softmax",
    "split",
    "sqrt",
    "square",
    "squeeze",
    "stack",
    "sub",
    "sum",
    "take",
    "tanh",
    "transpose",
    "tril",
    "triu",
    "unsqueeze",
    "where",
]  # fmt: skip


# -- elementwise -------------------------------------------------------------------------------------------------


def add(a: Any, b: Any) -> Tensor:
    return t.elementwise("add", a, b)


def sub(a: Any, b: Any) -> Tensor:
    return t.elementwise("sub", a, b)


def mul(a: Any, b: Any) -> Tensor:
    return t.elementwise("mul", a, b)


def div(a: Any, b: Any) -> Tensor:
    return t.elementwise("div", a, b)


def maximum(a: Any, b: Any) -> Tensor:
    """The greater of two tensors, element by element."""
    return t.elementwise("max", a, b)


def minimum(a: Any, b: Any) -> Tensor:
    """The lesser of two tensors, element by element."""
    return t.elementwise("min", a, b)


def neg(x: Any) -> Tensor:
    return t.elementwise("neg", x)


def abs(x: Any) -> Tensor:
    return t.elementwise("abs", x)


def square(x: Any) -> Tensor:
    return t.elementwise("square", x)


def reciprocal(x: Any) -> Tensor:
    return t.elementwise("reciprocal", x)


def exp(x: Any) -> Tensor:
    return t.elementwise("exp", x)


def log(x: Any) -> Tensor:
    return t.elementwise("log", x)


def sqrt(x: Any) -> Tensor:
    return t.elementwise("sqrt", x)


def rsqrt(x: Any) -> Tensor:
    return t.elementwise("rsqrt", x)


def sigmoid(x: Any) -> Tensor:
    return t.elementwise("sigmoid", x)


def silu(x: Any) -> Tensor:
    return t.elementwise("silu", x)


def relu(x: Any) -> Tensor:
    return t.elementwise("relu", x)


def tanh(x: Any) -> Tensor:
    return t.elementwise("tanh", x)


def sin(x: Any) -> Tensor:
    return t.elementwise("sin", x)


def cos(x: Any) -> Tensor:
    return t.elementwise("cos", x)


def erf(x: Any) -> Tensor:
    """2/sqrt(π) times the integral of exp(-t²) from 0 to x."""
    return t.elementwise("erf", x)


def expm1(x: Any) -> Tensor:
    """exp(x) - 1, exact near 0."""
    return t.elementwise("expm1", x)


def log1p(x: Any) -> Tensor:
    """log(1 + x), exact near 0."""
    return t.elementwise("log1p", x)


def floor(x: Any) -> Tensor:
    """The greatest whole number that is not above x."""
    return t.elementwise("floor", x)


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """x Φ(x); `approximate` is "none" (by erf) or "tanh"."""
    if approximate not in ("none", "tanh"):
        raise UnsupportedOpError(f"gelu has no approximation {approximate!r}", op="gelu", remedy='use "none" or "tanh"')
    return t.elementwise("gelu", x, attrs=(("approximate", approximate),))


def pow(x: Any, exponent: Number) -> Tensor:
    """x to the power of a number."""
    return t.power(x, exponent)


def masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """`value` where the mask holds, else x.  Minus infinity is kept as a mask until exp, softmax or max."""
    return where(mask, value, x)


# -- reductions --------------------------------------------------------------------------------------------------


def sum(x: Tensor, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
    """The sum over one dimension, several, or all."""
    return x.sum(axis, keepdims, dim=dim, keepdim=keepdim)


def mean(x: Tensor, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
    """The mean over one dimension, several, or all."""
    return x.mean(axis, keepdims, dim=dim, keepdim=keepdim)


def max(x: Tensor, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
    """The greatest value (values alone, as torch.amax) over one dimension, several, or all."""
    return x.amax(axis, keepdims, dim=dim, keepdim=keepdim)


def min(x: Tensor, axis: Axis = None, keepdims: bool = False, *, dim: Axis = None, keepdim: bool = False) -> Tensor:
    """The least value (values alone, as torch.amin) over one dimension, several, or all."""
    return x.amin(axis, keepdims, dim=dim, keepdim=keepdim)


amax, amin = max, min


def cumsum(x: Tensor, axis: int = -1) -> Tensor:
    """Inclusive prefix sums along one dimension."""
    return t.cumulated(x, axis)


def take(x: Tensor, index: Tensor, axis: int = 0) -> Tensor:
    """x[index] along one dimension, in whose place come the index's.  The index holds integers from -n to n - 1, where
    n is the size of the dimension; negative ones count from the end, as in PyTorch.  Kernels read 0 for others."""
    return t.taken(x, index, axis)


def scatter_add(x: Tensor, index: Tensor, size: int | Dim | SizeValue, axis: int = 0) -> Tensor:
    """Zeros with `size` entries along one dimension, to which x is added at the places that the index names.

    The index's dimensions are those of x from `axis` on, in whose place comes the new one.  It holds integers from
    -size to size - 1; negative ones count from the end.  Kernels leave out what has another index."""
    return t.scattered(x, index, size, axis)


def logsumexp(x: Tensor, axis: Axis = -1, keepdims: bool = False) -> Tensor:
    """log Σ exp(x), as written: the maximum is subtracted when the program is lowered."""
    return log(sum(exp(x), axis, keepdims))


def softmax(x: Tensor, axis: int = -1, *, dim: int | None = None) -> Tensor:
    """exp(x) / Σ exp(x) over the reals; the maximum is subtracted when the program is lowered."""
    return t.softmax(x, axis if dim is None else dim)


# -- normalisation -----------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Any = None, eps: Number = 1e-6, axis: int | Sequence[int] = -1) -> Tensor:
    """x / sqrt(mean(x²) + eps) over `axis`, times `weight`, whose shape is that of the normalised dimensions."""
    scaled = x * rsqrt(mean(square(x), axis, True) + eps)
    return scaled if weight is None else scaled * _along(weight, x, axis)


def layer_norm(
    x: Tensor, weight: Any = None, bias: Any = None, eps: Number = 1e-5, axis: int | Sequence[int] = -1
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over `axis`, times `weight`, plus `bias`."""
    centred = x - mean(x, axis, True)
    result = centred * rsqrt(mean(square(centred), axis, True) + eps)
    if weight is not None:
        result = result * _along(weight, x, axis)
    return result if bias is None else result + _along(bias, x, axis)


def _along(weight: Any, x: Tensor, axis: int | Sequence[int]) -> Any:
    """The weight with a dimension of size 1 for every dimension of x that is not normalised."""
    if not isinstance(weight, Tensor):
        return weight
    places = sorted(t.normal_axis(x, i) for i in (axis if isinstance(axis, Sequence) else (axis,)))
    if weight.ndim != len(places):
        raise ShapeError(
            f"a weight of {weight.ndim} dimensions for {len(places)} normalised ones",
            op="norm",
            where=x.recorder.location(),
        )
    dims = iter(weight.dims)
    return weight.seen(tuple(next(dims) if i in places else () for i in range(places[0], x.ndim)))


# -- products ----------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, weight [out, in]."""
    y = matmul(x, weight.T)
    return y if bias is None else y + bias


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: Any = None, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """softmax(q k^T · scale) v over the last two dimensions; leading ones broadcast.

    q [..., L, D], k [..., S, D], v [..., S, E].  `scale` defaults to 1/sqrt(D).  `mask` is bool (True: takes part) or
    is added to the scores; `causal` lets row i see the columns 0 .. i.
    """
    scores = matmul(q, k.mT)
    scores = scores * (q.shape[-1] ** Fraction(-1, 2) if scale is None else scale)
    if causal:
        scores = where(causal_mask(scores.shape[-2], scores.shape[-1]), scores, float("-inf"))
    if mask is not None:
        bool_mask = mask.masked is None and mask.dtype is DType.bool
        scores = where(mask, scores, float("-inf")) if bool_mask else scores + mask
    return matmul(softmax(scores, -1), v)


# -- views -------------------------------------------------------------------------------------------------------


def transpose(x: Tensor, dim0: int = -2, dim1: int = -1) -> Tensor:
    return x.transpose(dim0, dim1)


def permute(x: Tensor, *order: Any) -> Tensor:
    return x.permute(*order)


def mT(x: Tensor) -> Tensor:
    """The last two dimensions exchanged."""
    return x.mT


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """The same elements in row-major order; one size may be -1."""
    return x.reshape(*shape)


def unsqueeze(x: Tensor, dim: int) -> Tensor:
    return x.unsqueeze(dim)


def squeeze(x: Tensor, *dims: Any) -> Tensor:
    return x.squeeze(*dims)


def expand(x: Tensor, *shape: Any) -> Tensor:
    """Dimensions of size 1, and new leading ones, repeated; -1 keeps a size."""
    return x.expand(*shape)


def repeat_interleave(x: Tensor, repeats: int, dim: int) -> Tensor:
    """Each entry along `dim` repeated `repeats` times in place."""
    return x.repeat_interleave(repeats, dim)


def split(x: Tensor, size: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    return x.split(size, dim)


def chunk(x: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return x.chunk(chunks, dim)


def concat(xs: Sequence[Tensor], axis: int = 0, *, dim: int | None = None) -> Tensor:
    """The tensors one after the other along one dimension."""
    return t.concatenated(list(xs), axis if dim is None else dim)


def stack(xs: Sequence[Tensor], axis: int = 0, *, dim: int | None = None) -> Tensor:
    """The tensors along a new dimension."""
    at = axis if dim is None else dim
    return t.concatenated([x.unsqueeze(at) for x in xs], at)


# -- indices and masks -------------------------------------------------------------------------------------------


def iota(size: SizeValue) -> Tensor:
    """0, 1, .., size - 1 as i64 [size]; the size is one of a traced tensor's shape.  Raises ShapeError for others."""
    if not isinstance(size, SizeValue):
        raise ShapeError(
            f"iota of {size!r}", op="iota", where=user_location(), remedy="give a size of a tensor: x.shape[0]"
        )
    return t.iota(size.recorder, t.plain_size(size.recorder, size))


arange = iota


def causal_mask(rows: SizeValue, columns: SizeValue, offset: int = 0) -> Tensor:
    """bool [rows, columns]: column <= row + offset."""
    last = iota(rows).unsqueeze(-1)
    return iota(columns) <= (last + offset if offset else last)


def tril(x: Tensor, diagonal: int = 0) -> Tensor:
    """x on and below a diagonal of the last two dimensions, else 0."""
    return where(causal_mask(x.shape[-2], x.shape[-1], diagonal), x, 0)


def triu(x: Tensor, diagonal: int = 0) -> Tensor:
    """x on and above a diagonal of the last two dimensions, else 0."""
    return where(causal_mask(x.shape[-2], x.shape[-1], diagonal - 1), 0, x)
