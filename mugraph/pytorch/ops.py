"""ATen operators in terms of the language.

One row per operator: its meaning on traced tensors.  A row serves every overload that has no row of its own, and
takes the operator's arguments as its schema orders them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from mugraph.dsl import functions as mg
from mugraph.dsl import tensor as t
from mugraph.dsl.record import Recorder
from mugraph.dsl.tensor import SizeValue, Tensor
from mugraph.errors import UnsupportedOpError
from mugraph.ir.types import TORCH_NAMES, DType

TORCH_DTYPES = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}

Meaning = Callable[..., Any]
ATEN: dict[str, Meaning] = {}


def aten(*names: str) -> Callable[[Meaning], Meaning]:
    """Adds a row, under an operator's name or an overload's (`sum.dim_IntList`)."""

    def add(meaning: Meaning) -> Meaning:
        ATEN.update((name, meaning) for name in names)
        return meaning

    return add


def dtype_of(dtype: Any) -> DType:
    """The element type of a torch.dtype.  Raises UnsupportedOpError for complex and quantised ones."""
    if str(dtype) not in TORCH_DTYPES:
        raise UnsupportedOpError(f"tensors of {dtype} are not supported", remedy=f"known: {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[str(dtype)]


def _refuse(reason: str, remedy: str) -> None:
    raise UnsupportedOpError(reason, remedy=remedy)


def _cast(x: Any, dtype: Any) -> Any:
    return x if dtype is None or not isinstance(x, Tensor) else t.cast(x, dtype_of(dtype))


# -- elementwise -------------------------------------------------------------------------------------------------

for _name in ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "sigmoid", "relu", "tanh"):
    ATEN[_name] = getattr(mg, _name)
for _relation in ("eq", "ne", "lt", "le", "gt", "ge"):
    ATEN[_relation] = lambda a, b, _r=_relation: t.compare(_r, a, b)
for _name, _fn in {"and": "and", "or": "or"}.items():
    ATEN[f"logical_{_name}"] = ATEN[f"bitwise_{_name}"] = lambda a, b, _f=_fn: t.logical(_f, a, b)
ATEN["logical_not"] = ATEN["bitwise_not"] = lambda x: t.logical("not", x)
ATEN["silu"] = mg.silu
ATEN["gelu"] = lambda x, *, approximate="none": mg.gelu(x, approximate)
ATEN["mul"], ATEN["maximum"], ATEN["minimum"] = mg.mul, mg.maximum, mg.minimum
ATEN["where"] = t.where
ATEN["masked_fill"] = mg.masked_fill


@aten("add")
def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return a + (b if alpha == 1 else b * alpha)


@aten("sub")
def _sub(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    return a - (b if alpha == 1 else b * alpha)


@aten("rsub")
def _rsub(a: Any, b: Any, alpha: Any = 1) -> Any:
    return b - (a if alpha == 1 else a * alpha)


@aten("div")
def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        _refuse(f"division rounded by {rounding_mode}", "divide without rounding")
    return a / b


@aten("pow")
def _pow(x: Any, exponent: Any) -> Any:
    if isinstance(x, Tensor) and isinstance(exponent, Tensor):
        _refuse("pow with a tensor as exponent", "write exp(exponent * log(base))")
    if isinstance(exponent, Tensor):
        return mg.exp(exponent * math.log(x))
    return mg.pow(x, exponent)


@aten("exp2")
def _exp2(x: Any) -> Any:
    return mg.exp(x * math.log(2))


@aten("clamp", "hardtanh")
def _clamp(x: Any, least: Any = None, most: Any = None) -> Any:
    x = x if least is None else mg.maximum(x, least)
    return x if most is None else mg.minimum(x, most)


ATEN["clamp_min"] = mg.maximum
ATEN["clamp_max"] = mg.minimum


# -- products ----------------------------------------------------------------------------------------------------

for _name in ("matmul", "mm", "bmm", "mv", "dot"):
    ATEN[_name] = t.matmul
ATEN["linear"] = mg.linear
ATEN["einsum"] = lambda equation, xs, *, path=None: t.einsum(equation, *xs)


@aten("addmm", "baddbmm", "addmv")
def _addmm(bias: Any, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = t.matmul(a, b)
    return mg.add(bias if beta == 1 else bias * beta, product if alpha == 1 else product * alpha)


@aten("scaled_dot_product_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout:
        _refuse("attention with dropout", "capture the module in eval mode")
    if enable_gqa and q.ndim > 2:
        group = int(q.shape[-3]) // int(k.shape[-3])
        k, v = (x.repeat_interleave(group, -3) if group > 1 else x for x in (k, v))
    if mask is None:
        return mg.attention(q, k, v, scale, causal=is_causal)
    if is_causal:
        _refuse("attention with a mask that is also causal", "give one of both")
    return _masked_attention(q, k, v, mask, scale)


def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention under a mask; a row that the mask leaves empty gives 0, where softmax has no value.

    Such a row takes part as a whole and its result is dropped, so that every softmax has something to sum.
    """
    scores = t.matmul(q, k.mT) * (q.shape[-1] ** Fraction(-1, 2) if scale is None else scale)
    if mask.masked is not None:
        keep, mask = mask.masked, Tensor(mask.recorder, mask.value, mask.dims)
        scores = scores + mask
    elif mask.dtype is DType.bool:
        keep = mask
    else:
        keep = t.logical("not", t.compare("lt", mask, t.LOWEST[mask.dtype]))  # less than all numbers: minus infinity
        scores = scores + t.where(keep, mask, 0)
    some = t.compare("gt", mg.sum(t.where(keep, 1.0, 0.0), -1, True), 0)
    full = t.logical("or", keep, t.logical("not", some))
    found = t.matmul(mg.softmax(t.where(full, scores, -math.inf), -1), v)
    return t.where(some, found, 0)


# -- reductions and normalisations -------------------------------------------------------------------------------


@aten("sum")
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return mg.sum(_cast(x, dtype), None if dim == [] else dim, keepdim)


@aten("mean")
def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return mg.mean(_cast(x, dtype), None if dim == [] else dim, keepdim)


@aten("amax")
def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return mg.max(x, None if dim in ([], ()) else dim, keepdim)


@aten("amin")
def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    return mg.min(x, None if dim in ([], ()) else dim, keepdim)


@aten("max.default")
def _max(x: Tensor) -> Tensor:
    return mg.max(x)


@aten("min.default")
def _min(x: Tensor) -> Tensor:
    return mg.min(x)


@aten("cumsum")
def _cumsum(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    return mg.cumsum(_cast(x, dtype), dim)


@aten("index")
def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    return x[tuple(slice(None) if i is None else i for i in indices)]


@aten("index_select")
def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return mg.take(x, index, dim)


@aten("embedding")
def _embedding(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Tensor:
    return mg.take(weight, indices, 0)


@aten("index_put")
def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """What `index_add` becomes; values are not repeated."""
    given = [(n, i) for n, i in enumerate(indices) if i is not None]
    if not accumulate or len(given) != 1:
        _refuse("writing by an index is not supported", "add by one index tensor: index_add")
    ((axis, index),) = given
    return x + mg.scatter_add(values, index, x.shape[axis], axis)


@aten("softmax", "_softmax")
def _softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    return mg.softmax(x if isinstance(dtype, bool) else _cast(x, dtype), dim)


@aten("_log_softmax", "log_softmax")
def _log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x = x if isinstance(dtype, bool) else _cast(x, dtype)
    return x - mg.logsumexp(x, dim, True)


@aten("logsumexp")
def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    return mg.logsumexp(x, dim, keepdim)


@aten("linalg_vector_norm")
def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = _cast(x, dtype)
    match ord:
        case 1:
            return mg.sum(mg.abs(x), dim, keepdim)
        case 2:
            return mg.sqrt(mg.sum(mg.square(x), dim, keepdim))
        case _ if ord == math.inf:
            return mg.max(mg.abs(x), dim, keepdim)
    raise UnsupportedOpError(f"the vector norm of order {ord}", remedy="use order 1, 2 or inf")


def _moments(x: Tensor, dim: Any, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    places = list(range(x.ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    average = mg.mean(x, places, True)
    squares = mg.square(x - average)
    if not correction:
        variance = mg.mean(squares, places, keepdim)
    else:
        count = math.prod(int(x.shape[i]) for i in places)
        variance = mg.sum(squares, places, keepdim) * Fraction(1, count - correction)
    return variance, average if keepdim else mg.mean(x, places, False)


@aten("var.correction", "var.dim")
def _var(x: Tensor, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None) -> Tensor:
    return _moments(x, dim, int(unbiased) if correction is None else int(correction), keepdim)[0]


@aten("var_mean.correction")
def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _moments(x, dim, 1 if correction is None else int(correction), keepdim)


# The machine epsilon of the type in which torch computes: f32 for the half types.
EPSILON = {DType.f64: Fraction(1, 2**52)}


@aten("rms_norm")
def _rms_norm(x: Tensor, shape: Sequence[Any], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    exact = EPSILON.get(x.dtype, Fraction(1, 2**23)) if eps is None else eps
    return mg.rms_norm(x, weight, exact, tuple(range(-len(shape), 0)))


@aten("layer_norm")
def _layer_norm(
    x: Tensor, shape: Sequence[Any], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Tensor:
    return mg.layer_norm(x, weight, bias, eps, tuple(range(-len(shape), 0)))


@aten("native_layer_norm")
def _native_layer_norm(
    x: Tensor, shape: Sequence[Any], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    axis = tuple(range(-len(shape), 0))
    average = mg.mean(x, axis, True)
    spread = mg.rsqrt(mg.mean(mg.square(x - average), axis, True) + eps)
    return mg.layer_norm(x, weight, bias, eps, axis), average, spread


# -- views -------------------------------------------------------------------------------------------------------

ATEN["view"] = ATEN["reshape"] = ATEN["_unsafe_view"] = lambda x, shape: x.reshape(shape)
ATEN["permute"] = lambda x, dims: x.permute(dims)
ATEN["transpose"] = lambda x, i, j: x.transpose(i, j)
ATEN["t"] = ATEN["numpy_T"] = lambda x: x.T
ATEN["mT"] = lambda x: x.mT
ATEN["unsqueeze"] = lambda x, dim: x.unsqueeze(dim)
ATEN["squeeze"] = lambda x, dims=None: x.squeeze() if dims is None else x.squeeze(dims)
ATEN["expand"] = lambda x, shape, implicit=False: x.expand(shape)
ATEN["flatten"] = lambda x, start=0, end=-1: x.flatten(start, end)
ATEN["unflatten"] = lambda x, dim, sizes: x.unflatten(dim, sizes)
ATEN["repeat_interleave.self_int"] = lambda x, n, dim, output_size=None: x.repeat_interleave(n, dim)
ATEN["cat"] = ATEN["concat"] = lambda xs, dim=0: t.concatenated(xs, dim)
ATEN["stack"] = lambda xs, dim=0: mg.stack(xs, dim)
ATEN["split"] = ATEN["split_with_sizes"] = lambda x, size, dim=0: x.split(size, dim)
ATEN["chunk"] = lambda x, n, dim=0: x.chunk(n, dim)
ATEN["unbind"] = lambda x, dim=0: x.unbind(dim)
ATEN["narrow"] = lambda x, dim, start, length: x.narrow(dim, start, length)
for _name in ("clone", "contiguous", "detach", "alias", "lift_fresh_copy", "lift_fresh"):
    ATEN[_name] = lambda x, *args, **kwargs: x


@aten("dropout")
def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if train and p:
        _refuse("dropout in training mode", "capture the module in eval mode")
    return x


@aten("slice")
def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    i = t.normal_axis(x, dim)
    whole = end is None or (isinstance(end, int) and end >= 2**31) or (isinstance(end, SizeValue) and end == x.sizes[i])
    return t.sliced(x, i, 0 if start is None else int(start), None if whole else int(end), step)


@aten("select")
def _select(x: Tensor, dim: int, index: int) -> Tensor:
    i = t.normal_axis(x, dim)
    return x[(*(slice(None),) * i, index)]


# -- element types -----------------------------------------------------------------------------------------------

ATEN["convert_element_type"] = _cast
ATEN["_to_copy"] = lambda x, *, dtype=None, **_: _cast(x, dtype)
ATEN["to.dtype"] = lambda x, dtype, *args, **_: _cast(x, dtype)
ATEN["to.dtype_layout"] = ATEN["_to_copy"]
ATEN["to.device"] = lambda x, device, dtype, *args, **_: _cast(x, dtype)
ATEN["to.other"] = ATEN["type_as"] = lambda x, other, *args, **_: x.type_as(other)


# -- new tensors: these take the recorder first ------------------------------------------------------------------

FRESH: dict[str, Meaning] = {}


def _fresh(*names: str) -> Callable[[Meaning], Meaning]:
    def add(meaning: Meaning) -> Meaning:
        FRESH.update((name, meaning) for name in names)
        return meaning

    return add


def filled(recorder: Recorder, shape: Sequence[Any], value: Any, dtype: DType | None) -> Any:
    """A tensor of one value; minus infinity is a zero that is masked everywhere."""
    if not shape:
        return value
    own = dtype or (DType.bool if isinstance(value, bool) else DType.i64 if isinstance(value, int) else DType.f32)
    if isinstance(value, float) and value == -math.inf:
        zero = t.constant(recorder, 0, own)
        nowhere = t.constant(recorder, False, DType.bool)
        return t.where(nowhere, zero, value).expand(shape)
    return t.constant(recorder, value, own).expand(shape)


@_fresh("full")
def _full(recorder: Recorder, shape: Sequence[Any], value: Any, *, dtype: Any = None, **_: Any) -> Any:
    return filled(recorder, shape, value, None if dtype is None else dtype_of(dtype))


@_fresh("ones")
def _ones(recorder: Recorder, shape: Sequence[Any], *, dtype: Any = None, value: int = 1, **_: Any) -> Any:
    return filled(recorder, shape, value, DType.f32 if dtype is None else dtype_of(dtype))


FRESH["zeros"] = lambda recorder, shape, **options: _ones(recorder, shape, value=0, **options)


@_fresh("full_like")
def _full_like(recorder: Recorder, x: Tensor, value: Any, *, dtype: Any = None, **_: Any) -> Any:
    return filled(recorder, x.shape, value, x.dtype if dtype is None else dtype_of(dtype))


FRESH["ones_like"] = lambda recorder, x, **options: _full_like(recorder, x, 1, **options)
FRESH["zeros_like"] = lambda recorder, x, **options: _full_like(recorder, x, 0, **options)
FRESH["scalar_tensor"] = lambda recorder, value, **_: value


@_fresh("arange.default", "arange.start", "arange.start_step")
def _arange(recorder: Recorder, *bounds: Any, dtype: Any = None, **_: Any) -> Tensor:
    start, end, step = (0, bounds[0], 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if (start, step) == (0, 1):
        index = t.iota(recorder, t.plain_size(recorder, end))
    else:
        index = t.iota(recorder, len(range(int(start), int(end), int(step)))) * step + start
    return index if dtype is None else t.cast(index, dtype_of(dtype))


ATEN["tril"] = mg.tril
ATEN["triu"] = mg.triu

# Checks of sizes, which the program's own ranges take the place of.
IGNORED = {"_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size"}


def meaning_of(name: str, recorder: Recorder) -> Meaning | None:
    """The row of `aten.name.overload`, if there is one."""
    _, _, full = name.partition(".")
    base = full.partition(".")[0]
    for key in (full, base):
        if key in ATEN:
            return ATEN[key]
        if key in FRESH:
            return lambda *args, _row=FRESH[key], **kwargs: _row(recorder, *args, **kwargs)
    return None
