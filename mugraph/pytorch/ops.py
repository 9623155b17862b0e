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
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Concat,
    Const,
    Elementwise,
    Gather,
    Iota,
    Reduce,
    Relation,
    Rename,
    Reshape,
    Slice,
)
from mugraph.ir.types import GREATEST, TORCH_NAMES, DType

TORCH_DTYPES = {f"torch.{name}": dtype for dtype, name in TORCH_NAMES.items()}

Meaning = Callable[..., Any]
ATEN: dict[str, Meaning] = {}

# Types in which PyTorch computes norms, softmax and sums in f32.
HALF = (DType.f16, DType.bf16)


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
    """The value in a torch.dtype; a bool tells whether a value is something else than zero."""
    if dtype is None or isinstance(x, SizeValue):
        return x
    wanted = dtype_of(dtype)
    if not isinstance(x, Tensor):
        return bool(x) if wanted is DType.bool else float(x) if wanted.is_float else int(x)
    if wanted is DType.bool:
        return _truth(x)
    if wanted is DType.u8 and x.dtype.is_float:
        _refuse("a cast of a float to uint8 depends on the machine", "cast to int32 first")
    return t.cast(x, wanted)


def _wide(x: Any) -> Any:
    """A 16-bit float in f32, where PyTorch computes in f32 within an operator."""
    return t.cast(x, DType.f32) if isinstance(x, Tensor) and x.dtype in HALF else x


def _truth(x: Tensor) -> Tensor:
    return x if x.dtype is DType.bool else _compared("ne", x, 0)


def _is_bool(*xs: Any) -> bool:
    return t.result_type(xs) is DType.bool


_TURNED: dict[str, Relation] = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


def _compared(relation: Relation, a: Any, b: Any) -> Tensor:
    """A relation of two values.  A number is compared as the tensor's type holds it; infinity is what lies beyond the
    greatest finite number."""
    if not isinstance(a, Tensor):
        return _compared(_TURNED.get(relation, relation), b, a)
    if not isinstance(b, float) or not a.dtype.is_float:
        return t.compare(relation, a, b)
    import torch

    number = torch.tensor(b, dtype=getattr(torch, TORCH_NAMES[a.dtype])).item()
    if math.isfinite(number) or a.dtype not in GREATEST:
        return t.compare(relation, a, number)
    last = GREATEST[a.dtype]
    match relation, number > 0:
        case ("eq" | "ge", True):
            return t.compare("gt", a, last)
        case ("eq" | "le", False) if not math.isnan(number):
            return t.compare("lt", a, -last)
        case ("ne", _) if not math.isnan(number):
            return t.logical("not", _compared("eq", a, number))
        case ("lt", True):
            return t.compare("le", a, last)
        case ("gt", False) if not math.isnan(number):
            return t.compare("ge", a, -last)
    raise UnsupportedOpError(f"{relation} of {number}", remedy="use torch.isnan, or compare with finite numbers")


# -- elementwise -------------------------------------------------------------------------------------------------

for _name in (
    "neg", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "square", "sigmoid", "relu", "tanh",
    "sin", "cos", "erf", "expm1", "log1p",
):  # fmt: skip
    ATEN[_name] = getattr(mg, _name)
for _relation in ("eq", "ne", "lt", "le", "gt", "ge"):
    ATEN[_relation] = lambda a, b, _r=_relation: _compared(_r, a, b)
for _fn in ("and", "or", "not"):
    ATEN[f"logical_{_fn}"] = lambda *xs, _f=_fn: t.logical(_f, *(_truth(x) if isinstance(x, Tensor) else x for x in xs))
    ATEN[f"bitwise_{_fn}"] = lambda *xs, _f=_fn: t.logical(_f, *xs)
ATEN["silu"] = mg.silu
ATEN["gelu"] = lambda x, *, approximate="none": mg.gelu(x, approximate)
ATEN["where"] = t.where


@aten("masked_fill")
def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    """The result has the type of x, whatever the value's."""
    found = mg.masked_fill(x, mask, value)
    return found if found.dtype is x.dtype else _as(x.dtype, found)


def _as(dtype: DType, x: Tensor) -> Tensor:
    return _truth(x) if dtype is DType.bool else t.cast(x, dtype)


# Of bools, the sum and the greater are "or", the product and the lesser "and".


@aten("mul")
def _mul(a: Any, b: Any) -> Any:
    return t.logical("and", a, b) if _is_bool(a, b) else mg.mul(a, b)


@aten("maximum")
def _maximum(a: Any, b: Any) -> Any:
    return t.logical("or", a, b) if _is_bool(a, b) else mg.maximum(a, b)


@aten("minimum")
def _minimum(a: Any, b: Any) -> Any:
    return t.logical("and", a, b) if _is_bool(a, b) else mg.minimum(a, b)


@aten("add")
def _add(a: Any, b: Any, *, alpha: Any = 1) -> Any:
    if any(isinstance(x, Tensor) for x in (a, b)) and _is_bool(a, b):
        if alpha != 1:
            _refuse("a sum of bools with alpha", "cast them first")
        return t.logical("or", a, b)
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
        if not exponent.dtype.is_float or not 0 < x < math.inf:
            _refuse(f"{x} to the power of a tensor of {exponent.dtype}", "use a positive base and a float exponent")
        return mg.exp(exponent * math.log(x))
    dtype = t.result_type([x, exponent])
    if not math.isfinite(exponent) or (exponent < 0 and not dtype.is_float):
        _refuse(f"{dtype} to the power of {exponent}", "use a finite exponent; of integers, one that is not negative")
    if dtype is DType.bool:
        _refuse("a power of bools", "cast them first")
    return mg.pow(_as(dtype, x) if dtype.is_float is not x.dtype.is_float else x, exponent)


@aten("exp2")
def _exp2(x: Any) -> Any:
    return mg.exp(x * math.log(2))


# Numbers that are whole are left as they are.
for _name, _whole in {
    "floor": mg.floor,
    "ceil": lambda x: mg.neg(mg.floor(mg.neg(x))),
    "trunc": lambda x: t.where(x < 0, mg.neg(mg.floor(mg.neg(x))), mg.floor(x)),
    "round": lambda x: t.elementwise("round", x),
}.items():
    ATEN[f"{_name}.default"] = lambda x, _f=_whole: _f(x) if x.dtype.is_float else x


@aten("sign")
def _sign(x: Tensor) -> Tensor:
    """0 of what is no number, as PyTorch has it."""
    return x if x.dtype is DType.bool else t.cast(t.where(x > 0, 1, t.where(x < 0, -1, 0)), x.dtype)


@aten("isnan")
def _isnan(x: Tensor) -> Tensor:
    return t.compare("ne", x, x)


@aten("isinf")
def _isinf(x: Tensor) -> Tensor:
    return _compared("eq", mg.abs(x), math.inf) if x.dtype.is_float else t.compare("ne", x, x)


@aten("leaky_relu")
def _leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    wide = _wide(x)
    return t.cast(t.where(wide > 0, wide, wide * slope), x.dtype)


@aten("elu")
def _elu(x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    wide = _wide(x)
    below = mg.expm1(wide if input_scale == 1 else wide * input_scale) * (alpha * scale)
    return t.cast(t.where(wide > 0, wide if scale == 1 else wide * scale, below), x.dtype)


@aten("clamp")
def _clamp(x: Any, least: Any = None, most: Any = None) -> Any:
    x = x if least is None else mg.maximum(x, least)
    return x if most is None else mg.minimum(x, most)


ATEN["hardtanh"] = lambda x, least=-1.0, most=1.0: _clamp(x, least, most)
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
    if beta == 0:  # then PyTorch does not look at it, NaN included
        return product if alpha == 1 else product * alpha
    return mg.add(bias if beta == 1 else bias * beta, product if alpha == 1 else product * alpha)


@aten("scaled_dot_product_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, is_causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout:
        _refuse("attention with dropout", "capture the module in eval mode")
    if len({x.dtype for x in (q, k, v)}) > 1:
        _refuse("attention of several element types", "cast the operands to one")
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


@aten("any")
def _any(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    counted = mg.sum(t.where(_truth(x), 1, 0), None if dim == [] else dim, keepdim)
    return _flag(t.compare("gt", counted, 0), x)


@aten("all")
def _all(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _flag(t.logical("not", _any(t.logical("not", _truth(x)), dim, keepdim)), x)


def _flag(found: Tensor, x: Tensor) -> Tensor:
    """As PyTorch has it, of uint8 the answer is uint8."""
    return t.cast(found, DType.u8) if x.dtype is DType.u8 else found


@aten("sum")
def _sum(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return mg.sum(_cast(x, dtype), None if dim == [] else dim, keepdim)


@aten("mean")
def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    wanted = x.dtype if dtype is None else dtype_of(dtype)
    return t.cast(mg.mean(_wide(_cast(x, dtype)), None if dim == [] else dim, keepdim), wanted)


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


def _from_zero(index: Tensor) -> Tensor:
    """An index that must not be negative, as these operators do not count from the end.  Raises UnsupportedOpError
    unless that shows from the inputs that it is made of, which `Recorder.natural` then names."""
    made = {step.target: step for step in index.recorder.steps}
    pending = [index.value]
    while pending:
        value = pending.pop()
        step = made.get(value)
        if step is None:
            index.recorder.natural.append(value)
            continue
        match step.op:
            case Iota():
                pass
            case Const(number) if number >= 0:
                pass
            case Cast() | Reshape() | Slice() | Concat() | Rename() | Broadcast():
                pending += step.args
            case Reduce("sum" | "max" | "min") | Elementwise("add" | "mul" | "max" | "min"):
                pending += step.args
            case Gather():
                pending.append(step.args[0])
            case _:
                _refuse("an index that is computed, and may be negative", "index by a tensor that is an argument")
    return index


@aten("index_select")
def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    return mg.take(x, _from_zero(index), dim)


@aten("embedding")
def _embedding(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Tensor:
    return mg.take(weight, _from_zero(indices), 0)


@aten("gather")
def _gather(x: Tensor, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Tensor:
    return t.picked(x, _from_zero(index), dim)


@aten("index_put")
def _index_put(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Tensor:
    """What `index_add` becomes; values are not repeated."""
    given = [(n, i) for n, i in enumerate(indices) if i is not None]
    if not accumulate or len(given) != 1:
        _refuse("writing by an index is not supported", "add by one index tensor: index_add")
    ((axis, index),) = given
    return x + mg.scatter_add(values, index, x.shape[axis], axis)


def _softmax_type(x: Tensor, dtype: Any) -> tuple[Tensor, DType]:
    """What softmax is computed of, and the type of its result.  `_softmax` takes a flag: f16 in, f32 out."""
    wanted = (DType.f32 if dtype else x.dtype) if isinstance(dtype, bool) else x.dtype
    if dtype is not None and not isinstance(dtype, bool):
        x, wanted = _cast(x, dtype), dtype_of(dtype)
    if not wanted.is_float:
        _refuse(f"softmax of {wanted}", "cast to a float type")
    return _wide(x), wanted


@aten("softmax", "_softmax")
def _softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x, wanted = _softmax_type(x, dtype)
    return t.cast(mg.softmax(x, dim), wanted)


@aten("_safe_softmax")
def _safe_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """Softmax that is 0 where a whole row is minus infinity.

    Such a row takes part with zeros and its result is dropped, so that every softmax has something to sum."""
    x, wanted = _softmax_type(x, dtype)
    keep = x.masked if x.masked is not None else _compared("gt", x, -math.inf)
    bare = Tensor(x.recorder, x.value, x.dims)
    some = t.compare("gt", mg.sum(t.where(keep, 1.0, 0.0), dim, True), 0)
    whole = bare if x.masked is not None else t.where(keep, bare, 0)
    shown = t.where(t.logical("or", keep, t.logical("not", some)), whole, -math.inf)
    return t.cast(t.where(some, mg.softmax(shown, dim), 0), wanted)


@aten("_log_softmax", "log_softmax")
def _log_softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    x, wanted = _softmax_type(x, dtype)
    return t.cast(x - mg.logsumexp(x, dim, True), wanted)


@aten("logsumexp")
def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    if not x.dtype.is_float:
        _refuse(f"logsumexp of {x.dtype}", "cast to a float type")
    return t.cast(mg.logsumexp(_wide(x), dim, keepdim), x.dtype)


@aten("linalg_vector_norm")
def _vector_norm(x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    wanted = x.dtype if dtype is None else dtype_of(dtype)
    x = mg.abs(_wide(_cast(x, dtype)))
    dim = None if dim == [] else dim
    match ord:
        case 0:
            found = mg.sum(t.where(t.compare("ne", x, 0), 1.0, 0.0), dim, keepdim)
        case 1:
            found = mg.sum(x, dim, keepdim)
        case 2:
            found = mg.sqrt(mg.sum(mg.square(x), dim, keepdim))
        case _ if ord == math.inf:
            found = mg.max(x, dim, keepdim)
        case _ if ord == -math.inf:
            found = mg.min(x, dim, keepdim)
        case _ if ord > 0:
            found = mg.pow(mg.sum(mg.pow(x, ord), dim, keepdim), 1 / ord)
        case _:
            raise UnsupportedOpError(f"the vector norm of order {ord}", remedy="use an order from 0, inf or -inf")
    return t.cast(found, wanted)


def _moments(x: Tensor, dim: Any, correction: Any, keepdim: bool) -> tuple[Tensor, Tensor]:
    if not x.dtype.is_float:
        _refuse(f"the variance of {x.dtype}", "cast to a float type")
    wanted, x = x.dtype, _wide(x)
    places = list(range(x.ndim)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else list(dim)
    average = mg.mean(x, places, True)
    squares = mg.square(x - average)
    if not correction:
        variance = mg.mean(squares, places, keepdim)
    else:
        count = math.prod(int(x.shape[i]) for i in places) - Fraction(correction)
        if count <= 0:
            _refuse("the variance of fewer elements than its correction", "use a smaller correction")
        variance = mg.sum(squares, places, keepdim) * (1 / count)
    return t.cast(variance, wanted), t.cast(average if keepdim else mg.mean(x, places, False), wanted)


@aten("var.correction", "var.dim")
def _var(x: Tensor, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None) -> Tensor:
    return _moments(x, dim, int(unbiased) if correction is None else correction, keepdim)[0]


@aten("var_mean.correction")
def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _moments(x, dim, 1 if correction is None else correction, keepdim)


# The machine epsilon of the type in which torch computes: f32 for the half types.
EPSILON = {DType.f64: Fraction(1, 2**52)}


def _normal(x: Tensor, shape: Sequence[Any]) -> tuple[int, ...]:
    """The dimensions that are normalised.  Raises UnsupportedOpError for numbers that have no norm in PyTorch."""
    if not x.dtype.is_float:
        _refuse(f"a norm of {x.dtype}", "cast to a float type")
    return tuple(range(-len(shape), 0))


@aten("rms_norm")
def _rms_norm(x: Tensor, shape: Sequence[Any], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    exact = EPSILON.get(x.dtype, Fraction(1, 2**23)) if eps is None else eps
    return t.cast(mg.rms_norm(_wide(x), _wide(weight), exact, _normal(x, shape)), x.dtype)


@aten("layer_norm")
def _layer_norm(
    x: Tensor, shape: Sequence[Any], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Tensor:
    return t.cast(mg.layer_norm(_wide(x), _wide(weight), _wide(bias), eps, _normal(x, shape)), x.dtype)


@aten("native_layer_norm")
def _native_layer_norm(
    x: Tensor, shape: Sequence[Any], weight: Any, bias: Any, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    found, average, spread = _centred(x, _normal(x, shape), eps)
    if weight is not None:
        found = found * mg._along(_wide(weight), x, _normal(x, shape))
    if bias is not None:
        found = found + mg._along(_wide(bias), x, _normal(x, shape))
    return t.cast(found, x.dtype), average, spread


def _centred(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x with mean 0 and variance 1 over the axes, its mean, and what it was multiplied by."""
    wide = _wide(x)
    average = mg.mean(wide, axes, True)
    centred = wide - average
    spread = mg.rsqrt(mg.mean(mg.square(centred), axes, True) + eps)
    return centred * spread, t.cast(average, x.dtype), t.cast(spread, x.dtype)


@aten("native_group_norm")
def _native_group_norm(
    x: Tensor, weight: Any, bias: Any, n: Any, channels: Any, rest: Any, groups: int, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [N, C, ..]: every group of C / groups channels has a mean and a variance of its own.  Those of 16-bit tensors,
    whose type the backward's own kernels expect to be this or that, are not given."""
    parts = x.reshape(x.shape[0], groups, int(x.shape[1]) // groups, *x.shape[2:])
    found, average, spread = _centred(parts, tuple(range(2, parts.ndim)), eps)
    found = found.reshape(*x.shape)

    def of_channels(y: Tensor) -> Tensor:
        seen: Tensor = _wide(y)
        return seen.reshape(1, -1, *[1] * (x.ndim - 2))

    if weight is not None:
        found = found * of_channels(weight)
    if bias is not None:
        found = found + of_channels(bias)
    kept = (None, None) if x.dtype in HALF else (y.reshape(x.shape[0], groups) for y in (average, spread))
    return (t.cast(found, x.dtype), *kept)


@aten("group_norm")
def _group_norm(
    x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Tensor:
    found: Tensor = _native_group_norm(x, weight, bias, None, None, None, groups, eps)[0]
    return found


# -- views -------------------------------------------------------------------------------------------------------

ATEN["view.dtype"] = lambda x, dtype: _refuse("bits under another element type", "cast, or view outside")
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


@aten("repeat_interleave.self_int")
def _repeat_interleave(x: Tensor, n: int, dim: int | None = None, output_size: Any = None) -> Tensor:
    return x.flatten().repeat_interleave(n, 0) if dim is None else x.repeat_interleave(n, dim)


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
    if not own.is_float:
        value = bool(value) if own is DType.bool else int(value)
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
    floats = any(isinstance(b, float) for b in bounds)
    if any(isinstance(b, float) and not b.is_integer() for b in bounds):
        _refuse("arange with fractions", "scale an arange of integers")
    whole = [int(b) if isinstance(b, float) else b for b in bounds]
    start, end, step = (0, whole[0], 1) if len(whole) == 1 else (*whole, 1)[:3]
    if (start, step) == (0, 1):
        index = t.iota(recorder, t.plain_size(recorder, end))
    else:
        index = t.iota(recorder, len(range(int(start), int(end), int(step)))) * step + start
    return t.cast(index, dtype_of(dtype) if dtype is not None else DType.f32 if floats else DType.i64)


@aten("tril")
def _tril(x: Tensor, diagonal: int = 0) -> Tensor:
    return _as(x.dtype, mg.tril(x, diagonal))


@aten("triu")
def _triu(x: Tensor, diagonal: int = 0) -> Tensor:
    return _as(x.dtype, mg.triu(x, diagonal))


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


def agreeing(result: Any, wanted: Any, device: str) -> Any:
    """The result of an operator, whose type and shape are those that PyTorch gives (`wanted`: a tensor, a sequence of
    them, or something else, which is not looked at) on this type of device.  Raises UnsupportedOpError where they are
    not."""
    if isinstance(wanted, list | tuple) and isinstance(result, list | tuple):
        return type(result)(agreeing(x, y, device) for x, y in zip(result, wanted, strict=False))
    dtype = getattr(wanted, "dtype", None)
    if not isinstance(result, Tensor) or dtype is None:
        return result
    if dtype_of(dtype) is not result.dtype:
        _refuse(f"the result is {result.dtype} here and {dtype} in PyTorch", "cast the operands to one type")
    if wanted.ndim and wanted.device.type != device:
        _refuse(f"a tensor on {wanted.device} beside others on {device}", "keep the function on one device")
    sizes = list(zip(result.sizes, wanted.shape, strict=False))
    if result.ndim != wanted.ndim or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes):
        _refuse(f"the shape is {list(result.sizes)} here and {list(wanted.shape)} in PyTorch", "reshape the operands")
    return result
