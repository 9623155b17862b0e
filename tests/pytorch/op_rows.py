"""The ATen operators that mugraph means, as rows of a table: a function, what it is given, and for which types.

A `Draw` makes random arguments: sizes, values, and layouts (dense, permuted, sliced with an offset, repeated with
stride 0) of tensors, of which eager PyTorch sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

Fn = Callable[..., Any]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ALL = (*FLOATS, torch.float64, *INTEGERS, torch.bool)
NUMBERS = (*FLOATS, torch.int64, torch.int32)


@dataclass
class Draw:
    """Random arguments of one element type."""

    dtype: torch.dtype
    seed: int
    random: Random = field(init=False)
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)

    def size(self, least: int = 1) -> int:
        return self.random.choice([n for n in (1, 2, 3, 5, 6, 8) if n >= least])

    def shape(self, rank: int, least: int = 1) -> list[int]:
        return [self.size(least) for _ in range(rank)]

    def values(self, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.bool:
            return torch.rand(shape, generator=self.generator) < 0.5
        if not dtype.is_floating_point:
            low = 0 if dtype is torch.uint8 else -4
            return torch.randint(low, 6, shape, generator=self.generator, dtype=dtype)
        return torch.randn(shape, generator=self.generator).to(dtype)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor in a random layout."""
        own, sizes = dtype or self.dtype, list(shape)
        match self.random.randrange(4):
            case 1 if len(sizes) > 1:  # permuted
                order = self.random.sample(range(len(sizes)), len(sizes))
                dense = self.values([sizes[i] for i in order], own)
                return dense.permute([order.index(i) for i in range(len(sizes))])
            case 2 if sizes:  # a part of something larger, from an offset on
                at, step = self.random.randrange(len(sizes)), self.random.choice((1, 2))
                whole = self.values([s * step + 3 if i == at else s for i, s in enumerate(sizes)], own)
                return whole.narrow(at, 2, sizes[at] * step)[(slice(None),) * at + (slice(None, None, step),)]
            case 3 if sizes:  # repeated
                at = self.random.randrange(len(sizes))
                return self.values([1 if i == at else s for i, s in enumerate(sizes)], own).expand(sizes)
        return self.values(sizes, own)

    def positive(self, *shape: int) -> torch.Tensor:
        x = self.tensor(*shape)
        return x.abs() + 0.5 if x.is_floating_point() else x.abs() + 1

    def index(self, size: int, *shape: int) -> torch.Tensor:
        dtype = self.random.choice((torch.int64, torch.int32))
        return torch.randint(0, size, shape, generator=self.generator, dtype=dtype)

    def bools(self, *shape: int) -> torch.Tensor:
        return self.tensor(*shape, dtype=torch.bool)


Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Row:
    """`fn(*draw(d))` is one call for a type of `dtypes`.  `ops` are the names of ATen operators that it stands for."""

    ops: str
    fn: Fn
    draw: Callable[[Draw], Arguments]
    dtypes: tuple[torch.dtype, ...] = FLOATS


ROWS: dict[str, Row] = {}


def row(
    name: str, ops: str, fn: Fn, draw: Callable[[Draw], Arguments], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    assert name not in ROWS
    ROWS[name] = Row(ops, fn, draw, dtypes)


def one(d: Draw) -> Arguments:
    return (d.tensor(*d.shape(d.random.choice((1, 2, 3)))),)


def square(d: Draw) -> Arguments:
    return (d.tensor(*d.shape(2, 2)),)


def cube(d: Draw) -> Arguments:
    return (d.tensor(*d.shape(3, 2)),)


def positive(d: Draw) -> Arguments:
    return (d.positive(*d.shape(2)),)


def two(d: Draw) -> Arguments:
    """Two tensors that broadcast."""
    shape = d.shape(3)
    other = [s if d.random.random() < 0.7 else 1 for s in shape][d.random.choice((0, 0, 1, 2)) :]
    return d.tensor(*shape), d.tensor(*other)


# -- products

row("mm", "mm", torch.mm, lambda d: (d.tensor(d.size(), 5), d.tensor(5, d.size())), NUMBERS)
row("mv", "mv", torch.mv, lambda d: (d.tensor(d.size(), 5), d.tensor(5)), NUMBERS)
row("matmul of vectors", "matmul dot", lambda x, y: x @ y, lambda d: (d.tensor(6), d.tensor(6)), NUMBERS)
row("matmul broadcast", "matmul", torch.matmul, lambda d: (d.tensor(3, 1, d.size(), 4), d.tensor(2, 4, 5)), NUMBERS)
row("matmul by a vector", "matmul", torch.matmul, lambda d: (d.tensor(3, d.size(), 4), d.tensor(4)))
row("matmul of itself", "matmul", lambda x: x @ x.mT, lambda d: (d.tensor(2, d.size(), 4),))
row("bmm", "bmm", torch.bmm, lambda d: (d.tensor(3, d.size(), 4), d.tensor(3, 4, d.size())), NUMBERS)
row(
    "linear",
    "linear",
    lambda x, w, b: (F.linear(x, w), F.linear(x, w, b)),
    lambda d: (d.tensor(*d.shape(d.random.choice((1, 2))), 4), d.tensor(5, 4), d.tensor(5)),
)
row(
    "addmm",
    "addmm",
    lambda c, x, y: (torch.addmm(c, x, y), torch.addmm(c, x, y, beta=3, alpha=2)),
    lambda d: (d.tensor(d.random.choice((1, 4)), 5), d.tensor(4, 3), d.tensor(3, 5)),
    NUMBERS,
)
row(
    "addmm without its first",
    "addmm",
    lambda c, x, y: torch.addmm(c, x, y, beta=0),
    lambda d: (d.tensor(5) * math.nan, d.tensor(4, 3), d.tensor(3, 5)),
)
row(
    "baddbmm",
    "baddbmm",
    lambda c, x, y: (torch.baddbmm(c, x, y), torch.baddbmm(c, x, y, beta=0.5, alpha=2.0)),
    lambda d: (d.tensor(2, d.random.choice((1, 4)), 5), d.tensor(2, 4, 3), d.tensor(2, 3, 5)),
)
row(
    "einsum",
    "einsum",
    lambda x, y: (
        torch.einsum("bij,bjk->bik", x, y),
        torch.einsum("bij,bjk->ki", x, y),
        torch.einsum("bij->j", x),
        torch.einsum("...ij,...jk", x, y),
    ),
    lambda d: (d.tensor(2, d.size(), 4), d.tensor(2, 4, d.size())),
)

# -- elementwise

for _name in ("neg", "square", "abs"):
    row(_name, _name, getattr(torch, _name), one, tuple(t for t in ALL if t is not torch.bool))
row("relu", "relu", torch.relu, one, tuple(t for t in ALL if t is not torch.bool))
for _name in ("exp", "exp2", "sigmoid", "tanh", "sin", "cos", "erf", "expm1"):
    row(_name, _name, getattr(torch, _name), one, ALL)
for _name in ("sqrt", "rsqrt", "log", "log1p", "reciprocal"):
    row(_name, _name, getattr(torch, _name), positive, tuple(t for t in ALL if t is not torch.bool))
row("log of what has none", "log sqrt", lambda x: (x.log(), x.sqrt()), one)
row("large angles", "sin cos", lambda x: ((x * 1e4).sin(), (x * 1e4).cos()), one, (torch.float32, torch.float64))
for _fn in (torch.floor, torch.ceil, torch.trunc, torch.round, torch.sign):
    row(_fn.__name__, _fn.__name__, _fn, one, tuple(t for t in ALL if t is not torch.bool))
row("sign of bools", "sign", torch.sign, one, (torch.bool,))
row(
    "what is no number",
    "isnan isinf sign",
    lambda x: ((x / x).isnan(), (1 / x).isinf(), (x / x).sign(), x.isnan(), x.isinf()),
    lambda d: (d.tensor(4, 6).round(),),
)
row("isnan of integers", "isnan isinf", lambda x: (x.isnan(), x.isinf()), one, INTEGERS)
row("leaky relu", "leaky_relu", lambda x: (F.leaky_relu(x), F.leaky_relu(x, 0.3), F.leaky_relu(x, -1.0)), one)
row("elu", "elu", lambda x: (F.elu(x), F.elu(x, 0.5), F.selu(x), F.celu(x, 0.7)), one)
row("softplus", "softplus log1p", lambda x: (F.softplus(x), F.softplus(x, 2.0, 1.0), F.mish(x), F.logsigmoid(x)), one)
row("silu", "silu", F.silu, one)
row("gelu", "gelu", F.gelu, one)
row("gelu by tanh", "gelu", lambda x: F.gelu(x, approximate="tanh"), one)
row("hardtanh", "hardtanh", lambda x: (F.hardtanh(x * 3), F.relu6(x * 3), F.hardtanh(x, -0.5, 0.25)), one)
for _name in ("add", "mul", "maximum", "minimum", "div"):
    row(_name, _name, getattr(torch, _name), two, ALL)
row("sub", "sub", torch.sub, two, tuple(t for t in ALL if t is not torch.bool))
row(
    "add and sub with alpha",
    "add sub rsub",
    lambda x, y: (torch.add(x, y, alpha=2), torch.sub(x, y, alpha=3), torch.rsub(x, y, alpha=2)),
    two,
    NUMBERS,
)
row(
    "arithmetic with numbers",
    "add sub mul div rsub",
    lambda x: (x + 1, x + 1.5, 2 - x, x - 0.5, x * 3, x * 0.25, x / 3, x + True),
    one,
    tuple(t for t in ALL if t is not torch.bool),
)
row("a number over a tensor", "reciprocal div", lambda x: (1 / x, 2.5 / x), positive, NUMBERS)
row("bools with numbers", "add mul", lambda x: (x + 1, x * 2.5, x + 0.5, x * True, x + True), one, (torch.bool,))


def mixed(d: Draw) -> Arguments:
    """A tensor of each of two types, and a scalar tensor of a third."""
    shape = d.shape(2)
    others = d.random.sample(ALL, 2)
    return d.tensor(*shape), d.tensor(*shape, dtype=others[0]), d.tensor(dtype=others[1])


row("types that differ", "add mul", lambda x, y, s: (x + y, x * s, s + y, s * s, (x + s) * y), mixed, ALL)
row("types that differ, divided", "div", lambda x, y, s: (x / (y * y + 1.0), s / (x * x + 1.0)), mixed, ALL)
row(
    "types that differ, chosen from",
    "where maximum minimum",
    lambda x, y, s: (torch.where(x > s, x, y), torch.maximum(x, y), torch.minimum(y, s), torch.where(y > s, 1.5, x)),
    mixed,
    ALL,
)
row(
    "types that differ, compared",
    "eq ne lt le gt ge",
    lambda x, y, s: (x == y, x <= s, y >= s, x != y, s > 1, y < 1.5, x == 2),
    mixed,
    ALL,
)
row("pow", "pow", lambda x: (x**2, x**3, x**1, x**0), one, NUMBERS)
row(
    "pow of positive numbers",
    "pow",
    lambda x: (x**0.5, x**-0.5, x**1.5, x ** (2.0), x**-1.0),
    positive,
    (*FLOATS, torch.int64),
)
row("a number to the power", "pow", lambda x: (2**x, 0.5**x, 3.0**x, 1**x), one)
row("clamp", "clamp", lambda x: (x.clamp(-1, 1), x.clamp(min=0), x.clamp(max=1), x.clamp(2, -2)), one, NUMBERS)
row("clamp by floats", "clamp", lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.1), x.clamp(max=0.3)), one, NUMBERS)
row("clamp by tensors", "clamp", lambda x, y: (x.clamp(y, y + 1), x.clamp(min=y), x.clamp(max=y)), two, NUMBERS)
row(
    "comparisons",
    "eq ne lt le gt ge",
    lambda x, y: (x == y, x != y, x < y, x <= y, x > y, x >= y, x == 1, x < 0.5, x >= 2),
    two,
    ALL,
)


def near(d: Draw) -> Arguments:
    """Values that are numbers such as 0.1, rounded to the type."""
    return (torch.tensor([0.1, 0.2, 0.3, -0.7, 1 / 3], dtype=d.dtype),)


row(
    "comparisons with what the type rounds",
    "eq ne lt le gt ge",
    lambda x: (x == 0.1, x >= 0.2, x > 0.3, x <= -0.7, x < 1 / 3, x != 0.1, x >= 0.1),
    near,
    (*FLOATS, torch.float64),
)
row(
    "logical",
    "logical_and logical_or logical_not",
    lambda x, y: (torch.logical_and(x, y), torch.logical_or(x, y), torch.logical_not(x)),
    two,
    ALL,
)
row("bitwise of bools", "bitwise_and bitwise_or bitwise_not", lambda x, y: (x & y, x | y, ~x), two, (torch.bool,))
row(
    "where",
    "where",
    lambda c, x, y: (torch.where(c, x, y), torch.where(c, x, 2), torch.where(c, 0.5, y)),
    lambda d: (d.bools(3, 4), d.tensor(3, 4), d.tensor(d.random.choice((1, 3)), 4)),
    ALL,
)
row(
    "masked_fill",
    "masked_fill",
    lambda x, m: (x.masked_fill(m, 1), x.masked_fill(m, True), x.masked_fill(m, torch.tensor(1))),
    lambda d: (d.tensor(3, d.size()), d.bools(3, 1)),
    ALL,
)
row(
    "masked_fill by floats",
    "masked_fill",
    lambda x, m: (x.masked_fill(m, 1.5), x.masked_fill(m, -0.1)),
    lambda d: (d.tensor(3, d.size()), d.bools(2, 3, 1)),
)
row(
    "masked to minus infinity",
    "masked_fill softmax",
    lambda x, m: (x.masked_fill(m, -math.inf).softmax(-1), x.masked_fill(m, -math.inf).exp()),
    lambda d: (d.tensor(4, d.size()), d.bools(4, 1)),
)

# -- reductions and norms

row("sum", "sum", lambda x: (x.sum(), x.sum(1), x.sum((0, -1), keepdim=True), x.sum(dim=[])), cube, ALL)
row("sum in a type", "sum", lambda x: (x.sum(-1, dtype=torch.float32), x.sum(dtype=torch.float64)), cube, ALL)
row("mean", "mean", lambda x: (x.mean(), x.mean(1), x.mean((0, -1), keepdim=True)), cube)
row("mean in a type", "mean", lambda x: x.mean(-1, dtype=torch.float32), cube, ALL)
row(
    "amax and amin",
    "amax amin",
    lambda x: (x.amax(), x.amax(1), x.amin((0, -1), keepdim=True), x.max(), x.min()),
    cube,
    ALL,
)
row("any and all", "any all", lambda x: (x.any(), x.any(1), x.any(-1, keepdim=True), x.all(), x.all(0)), cube, ALL)
row("of a scalar", "sum mean amax", lambda x: (x.sum(), x.mean(), x.amax(), x.sum(-1), x * 2), lambda d: (d.tensor(),))
row("softmax", "softmax", lambda x: (x.softmax(-1), x.softmax(0), F.softmax(x * 20, 1)), cube)
row("softmax in a type", "softmax", lambda x: x.softmax(-1, dtype=torch.float32), cube, ALL)
row("_softmax", "_softmax", lambda x: torch._softmax(x, -1, False), cube)
row("_safe_softmax", "_safe_softmax", lambda x: torch._safe_softmax(x, -1), cube)
row(
    "_safe_softmax of empty rows",
    "_safe_softmax",
    lambda x, m: torch._safe_softmax(x.masked_fill(m, -math.inf), -1),
    lambda d: (d.tensor(4, 5), d.bools(4, 1)),
)
row(
    "_safe_softmax of infinite data",
    "_safe_softmax",
    lambda x: torch._safe_softmax(x, -1),
    lambda d: (d.tensor(4, 5).masked_fill(d.bools(4, 1), -math.inf),),
)
row("log_softmax", "log_softmax", lambda x: (x.log_softmax(-1), F.log_softmax(x, 0)), cube)
row("logsumexp", "logsumexp", lambda x: (x.logsumexp(-1), x.logsumexp((0, 1), keepdim=True)), cube)
row(
    "large logits",
    "softmax logsumexp",
    lambda x: (x.softmax(-1), x.logsumexp(-1)),
    lambda d: (d.tensor(*d.shape(3, 2)) * 200,),
)
row("cumsum", "cumsum", lambda x: x.cumsum(1), cube, (torch.float32, torch.int32))


def unequal(x: torch.Tensor, d: Draw) -> torch.Tensor:
    """Of equal numbers the variance is what rounding leaves."""
    return d.values(list(x.shape), d.dtype).mT.contiguous().mT if 0 in x.stride() else x


def norm(d: Draw) -> Arguments:
    return unequal(d.tensor(*d.shape(2), 6), d), d.tensor(6), d.tensor(6)


def large(d: Draw) -> Arguments:
    """Rows whose squares, and whose sums, a 16-bit float does not hold."""
    return d.values([3, 64], d.dtype) * 900 + 700, d.tensor(64), d.tensor(64)


for _name, _given in (("", norm), (" of large numbers", large)):
    row(
        f"rms_norm{_name}",
        "rms_norm",
        lambda x, w, b: (F.rms_norm(x, w.shape), F.rms_norm(x, w.shape, w, 1e-3), F.rms_norm(x, x.shape[-2:])),
        _given,
    )
    row(
        f"layer_norm{_name}",
        "layer_norm",
        lambda x, w, b: (
            F.layer_norm(x, w.shape),
            F.layer_norm(x, w.shape, w, b, 1e-2),
            F.layer_norm(x, x.shape[-2:], eps=1e-3),
        ),
        _given,
    )
    row(
        f"native_layer_norm{_name}",
        "native_layer_norm",
        lambda x, w, b: torch.native_layer_norm(x, w.shape, w, b, 1e-3),
        _given,
    )
    row(
        f"var_mean{_name}",
        "var_mean var",
        lambda x, w, b: (
            *torch.var_mean(x, -1),
            *torch.var_mean(x, (0, -1), correction=0, keepdim=True),
            x.std(-1),
            x.var(-1, correction=0.5),
            *torch.var_mean(x),
        ),
        _given,
    )
    row(
        f"linalg_vector_norm{_name}",
        "linalg_vector_norm",
        lambda x, w, b: (
            torch.linalg.vector_norm(x, dim=-1),
            x.norm(),
            torch.linalg.vector_norm(x, 1, (0, 1)),
            torch.linalg.vector_norm(x, math.inf, 0, keepdim=True),
            torch.linalg.vector_norm(x, -math.inf, -1),
            torch.linalg.vector_norm(x, 0, -1),
        ),
        _given,
    )
row(
    "norms in f32",
    "linalg_vector_norm",
    lambda x, w, b: (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), torch.linalg.vector_norm(x, 3, -1)),
    norm,
)
row(
    "norm with f32 weights",
    "rms_norm",
    lambda x, w: F.rms_norm(x, w.shape, w, 1e-3),
    lambda d: (d.tensor(3, 6), d.tensor(6, dtype=torch.float32)),
)
row(
    "rms_norm of llama",
    "rms_norm to mul",
    lambda x, w: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype),
    lambda d: (d.tensor(3, 6), d.tensor(6)),
)
row(
    "group_norm",
    "group_norm native_group_norm",
    lambda x, w, b: (F.group_norm(x, 2), F.group_norm(x, 3, w, b, 1e-3), F.group_norm(x[:, :, 0], 6, w)),
    lambda d: (unequal(d.tensor(d.size(), 6, d.size(2), 4), d), d.tensor(6), d.tensor(6)),
)

# -- attention

SDPA = F.scaled_dot_product_attention


def heads(d: Draw, rows: int = 5, keys: int = 7) -> Arguments:
    return d.tensor(2, 4, rows, 8), d.tensor(2, 4, keys, 8), d.tensor(2, 4, keys, 6)


row(
    "attention",
    "scaled_dot_product_attention",
    lambda q, k, v: (SDPA(q, k, v), SDPA(q, k, v, scale=0.3), SDPA(q[0], k[0], v[0])),
    heads,
)
row(
    "attention, causal",
    "scaled_dot_product_attention",
    lambda q, k, v: SDPA(q, k, v, is_causal=True),
    lambda d: heads(d, d.size(2), d.size(2)),
)
row(
    "attention, grouped",
    "scaled_dot_product_attention",
    lambda q, k, v: (SDPA(q, k, v, enable_gqa=True), SDPA(q, k, v, is_causal=True, enable_gqa=True)),
    lambda d: (d.tensor(2, 6, 5, 8), d.tensor(2, 2, 7, 8), d.tensor(2, 2, 7, 8)),
)
row(
    "attention under a mask",
    "scaled_dot_product_attention",
    lambda q, k, v, m: SDPA(q, k, v, attn_mask=m),
    lambda d: (*heads(d), d.bools(*d.random.choice(((5, 7), (2, 1, 5, 7), (1, 4, 1, 7))))),
)
row(
    "attention under an added mask",
    "scaled_dot_product_attention",
    lambda q, k, v, m: SDPA(q, k, v, attn_mask=m),
    lambda d: (*heads(d), d.tensor(*d.random.choice(((5, 7), (2, 1, 5, 7), (1, 4, 1, 7))))),
)


def with_empty_rows(d: Draw) -> Arguments:
    keep = d.values([5, 7], torch.bool)
    keep[2] = False
    return *heads(d), keep, torch.zeros(5, 7, dtype=d.dtype).masked_fill(~keep, -math.inf)


row(
    "attention with empty rows",
    "scaled_dot_product_attention",
    lambda q, k, v, m, a: (SDPA(q, k, v, attn_mask=m), SDPA(q, k, v, attn_mask=a)),
    with_empty_rows,
)

# -- views, which take every type

row(
    "reshapes",
    "view reshape flatten unflatten _unsafe_view",
    lambda x: (x.contiguous().view(-1), x.reshape(4, -1), x.flatten(1), x.reshape(3, 2, 2, -1), x.unflatten(1, (2, 2))),
    lambda d: (d.tensor(6, 4, d.size()),),
    ALL,
)
row(
    "orders",
    "permute transpose t numpy_T mT",
    lambda x: (x.permute(2, 0, 1), x.transpose(0, -1), x.mT, x[0].t(), x[0, 0].t(), x[0].T),
    cube,
    ALL,
)
row(
    "ones added and dropped",
    "unsqueeze squeeze expand",
    lambda x: (
        x.unsqueeze(1),
        x.unsqueeze(-1).squeeze(-1),
        x[:, :1].squeeze(),
        x[:1].squeeze((0, 1)),
        x.squeeze(0),
        x[:, :1].expand(-1, 5, -1),
        x[:1, 0].expand(2, 3, -1),
    ),
    cube,
    ALL,
)
row(
    "joined",
    "cat stack",
    lambda x, y: (torch.cat([x, y], 1), torch.cat([y, x, y], -2), torch.stack([x, x * x], -1)),
    lambda d: (d.tensor(3, d.size(), 4), d.tensor(3, d.size(), 4)),
    ALL,
)
row(
    "joined types",
    "cat",
    lambda x, y: torch.cat([x, y]),
    lambda d: (d.tensor(3, 4), d.tensor(2, 4, dtype=d.random.choice(ALL))),
    ALL,
)
row(
    "cut",
    "chunk split slice select unbind narrow",
    lambda x: (
        *x.chunk(3, 1),
        *x.split(3, 1),
        *x.split([2, 5], 1),
        x[:, 1:4],
        x[:, ::3],
        x[..., -2:],
        x[0],
        x[:, -2],
        x[:, 2:100],
        x.narrow(1, 2, 3),
        x.unbind(1)[4],
        *x[:, :2].chunk(4, 1),
    ),
    lambda d: (d.tensor(d.size(), 7, d.size(2)),),
    ALL,
)
row(
    "repeated",
    "repeat_interleave repeat",
    lambda x: (x.repeat_interleave(3, dim=1), x.repeat_interleave(2), x.repeat_interleave(1, 0)),
    cube,
    ALL,
)
row("copies", "clone contiguous", lambda x: (x.clone() * 2, x.contiguous() + 1, x.mT.contiguous()), cube, NUMBERS)
row(
    "to another type",
    "to _to_copy",
    lambda x: (x.to(torch.float32), x.int(), x.bool(), x.to(torch.float64), x.long() + 1, x.to(x), x.type_as(x)),
    cube,
    ALL,
)
row("to a narrower type", "to _to_copy", lambda x: (x.half(), x.bfloat16(), x.to(torch.int8)), cube, ALL)

# -- fresh tensors and indices

row(
    "filled",
    "full ones zeros full_like ones_like zeros_like",
    lambda x: (
        x + torch.full((3, 4), 2),
        x * torch.full((4,), 0.5),
        x + torch.ones(3, 1),
        x + torch.zeros(4),
        torch.full((2, 3), 1.5),
        torch.full((2,), True),
        torch.ones(3, dtype=torch.int32),
        torch.zeros_like(x) + x,
        torch.full_like(x, 2),
        torch.ones_like(x),
    ),
    lambda d: (d.tensor(3, 4),),
    ALL,
)
row(
    "filled scalars",
    "full scalar_tensor",
    lambda x: (x * torch.full((), 2.0), x + torch.full((), 2), x + torch.tensor(1.5), x * torch.tensor(2)),
    lambda d: (d.tensor(3, 4),),
    ALL,
)
row(
    "arange",
    "arange",
    lambda x: (
        x + torch.arange(6),
        x * torch.arange(6, dtype=torch.float32),
        x + torch.arange(1, 7),
        x + torch.arange(0, 12, 2),
        x + torch.arange(6, 0, -1),
        torch.arange(5),
        torch.arange(2.0, 5.0),
        torch.arange(3, dtype=torch.int32),
        torch.arange(4.0),
    ),
    lambda d: (d.tensor(3, 6),),
    NUMBERS,
)
row(
    "triangles",
    "triu tril",
    lambda x: (x.tril(), x.triu(), x.triu(1), x.tril(-1), x.triu(-2), x[0].tril(2)),
    lambda d: (d.tensor(2, 5, d.size(2)),),
    ALL,
)
row(
    "triangle of ones",
    "triu ones masked_fill",
    lambda x: x.masked_fill(torch.ones(5, 6, dtype=torch.bool).triu(1), -math.inf).softmax(-1),
    lambda d: (d.tensor(2, 5, 6),),
)
row(
    "index_select",
    "index_select",
    lambda x, i: (x.index_select(1, i), x.index_select(-1, i[:1])),
    lambda d: (d.tensor(3, 5, 4), d.index(4, 6)),
    ALL,
)
row("embedding", "embedding", lambda w, i: F.embedding(i, w) * 2, lambda d: (d.tensor(6, 4), d.index(6, 3, 2)))
row(
    "index",
    "index",
    lambda x, i, j: (x[i], x[:, j]),
    lambda d: (d.tensor(3, 3, 4), d.index(3, 5).long(), d.index(3, 2, 2).long() - 3),
    ALL,
)
row(
    "gather",
    "gather",
    lambda x, i, j: (x.gather(1, i), x.gather(-1, j)),
    lambda d: (d.tensor(3, 5, 4), d.index(5, 3, 6, 4).long(), d.index(4, 2, 5, 3).long()),
    ALL,
)
