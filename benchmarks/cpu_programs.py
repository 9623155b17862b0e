"""The programs of `benchmarks.cpu`, in f32, as a user of PyTorch writes them down naively, at sizes for a CPU.

Those of `FAMILIES` are the families of `benchmarks.programs` at smaller sizes; the others are expressions as they occur
in numerical code.  A program whose weights are constant (`constants`) is written in the DSL as well, as PyTorch has no
word for that.

    PROGRAMS["lora"].function, PROGRAMS["lora"].shapes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import mugraph as mg

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A function of tensors, and the shapes of its arguments in order.  `positive`: the arguments are.  `program`: the
    same in the DSL, which then is what is optimised."""

    function: Callable[..., Any]
    shapes: Mapping[str, Shape]
    positive: bool = False
    program: mg.Program | None = None

    @property
    def sizes(self) -> str:
        return ", ".join(f"{n} {'x'.join(map(str, s))}" for n, s in self.shapes.items())


def case(function: Callable[..., Any], positive: bool = False, program: Any = None, **shapes: Shape) -> Case:
    return Case(function, shapes, positive, program)


# -- the families


def rmsnorm(x, g):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * g


def rmsnorm_linear(x, g, w):
    return rmsnorm(x, g) @ w


def gated_mlp(x, w1, w2):
    return F.silu(x @ w1) * (x @ w2)


def lora(x, w, a, b):
    return x @ w + (x @ a) @ b


def attention(q, k, v):
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def gqa(q, k, v):
    """Eight heads of queries for each of keys and values."""
    return torch.softmax(q @ k.unsqueeze(1).mT * q.shape[-1] ** -0.5, -1) @ v.unsqueeze(1)


def qk_norm_attention(q, k, v):
    def unit(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    return attention(unit(q), unit(k), v)


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True))


def ntrans(x, h, alpha):
    a, c = unit(x), unit(h)
    return unit(c + alpha * (a - c))


def linear_bias_residual(x, w, bias, r):
    return F.silu(x @ w + bias) + r


def layernorm_linear(x, gamma, beta, w, bias):
    return F.gelu(F.layer_norm(x, x.shape[-1:], gamma, beta) @ w + bias)


def rmsnorm_gated_mlp(h, g, wg, wu, wd):
    x = rmsnorm(h, g)
    return h + (F.silu(x @ wg) * (x @ wu)) @ wd


def split_k(x, w):
    return x @ w


def low_rank_chain(a, b, c, d):
    """As written it makes a matrix of rank 16 in full."""
    return a @ b @ c @ d


def two_weights(x, w1, w2):
    return x @ w1 @ w2


@mg.program
def two_weights_program(x: mg.f32[256, 1024], w1: mg.constant(mg.f32[1024, 2048]), w2: mg.constant(mg.f32[2048, 64])):
    return x @ w1 @ w2


def constant_lora(x, w, a, b):
    return x @ w + x @ a @ b


@mg.program
def constant_lora_program(
    x: mg.f32[256, 768],
    w: mg.constant(mg.f32[768, 768]),
    a: mg.constant(mg.f32[768, 64]),
    b: mg.constant(mg.f32[64, 768]),
):
    return x @ w + x @ a @ b


def softmax(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def logsumexp(x):
    return torch.logsumexp(x, -1)


def layernorm(x, gamma, beta):
    return F.layer_norm(x, x.shape[-1:], gamma, beta)


def causal_attention(q, k, v):
    n = q.shape[-2]
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return torch.softmax(scores, -1) @ v


def mla(q, qr, c, kr, wk, wv):
    """Latent attention as it is defined: keys and values of each head are projected from the latents."""
    scores = (q @ (c @ wk).mT + qr @ kr.mT) * (q.shape[-1] + qr.shape[-1]) ** -0.5
    return torch.softmax(scores, -1) @ (c @ wv)


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_attention(q, k, v, cq, sq, ck, sk):
    return attention(rotated(q, cq, sq), rotated(k, ck, sk), v)


def swiglu_bwd(dy, g, u):
    s = torch.sigmoid(g)
    return dy * u * (s * (1 + g * (1 - s))), dy * (g * s)


def rmsnorm_bwd(dy, x, g, r):
    dn = dy * g
    dr = (dn * x).sum(-1, keepdim=True)
    return dn * r - x * (r * r * r * dr / x.shape[-1]), (dy * x * r).sum(0)


def lora_bwd(dy, x, h, w, a, b):
    dh = dy @ b.mT
    return dy @ w.mT + dh @ a.mT, x.mT @ dh, h.mT @ dy


def attention_bwd(do, q, k, v, o, lse):
    p = torch.exp(q @ k.mT * q.shape[-1] ** -0.5 - lse)
    ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
    return (ds @ k) * q.shape[-1] ** -0.5, (ds.mT @ q) * q.shape[-1] ** -0.5, p.mT @ do


FAMILIES = {
    "rmsnorm_linear": case(rmsnorm_linear, x=(128, 1024), g=(1024,), w=(1024, 1536)),
    "gated_mlp": case(gated_mlp, x=(128, 1024), w1=(1024, 1024), w2=(1024, 1024)),
    "lora": case(lora, x=(256, 768), w=(768, 768), a=(768, 16), b=(16, 768)),
    "gqa": case(gqa, q=(4, 8, 16, 64), k=(4, 2048, 64), v=(4, 2048, 64)),
    "qk_norm_attention": case(qk_norm_attention, q=(16, 64, 64), k=(16, 1024, 64), v=(16, 1024, 64)),
    "ntrans": case(ntrans, x=(1024, 2048), h=(1024, 2048), alpha=(2048,)),
    "linear_bias_residual": case(linear_bias_residual, x=(256, 1024), w=(1024, 1024), bias=(1024,), r=(256, 1024)),
    "layernorm_linear": case(
        layernorm_linear, x=(128, 512), gamma=(512,), beta=(512,), w=(512, 2048), bias=(2048,)
    ),
    "rmsnorm_gated_mlp": case(
        rmsnorm_gated_mlp, h=(64, 512), g=(512,), wg=(512, 1536), wu=(512, 1536), wd=(1536, 512)
    ),
    "split_k": case(split_k, x=(128, 4096), w=(4096, 512)),
    "low_rank_chain": case(low_rank_chain, a=(1024, 16), b=(16, 1024), c=(1024, 64), d=(64, 128)),
    "two_weights": case(two_weights, program=two_weights_program, x=(256, 1024), w1=(1024, 2048), w2=(2048, 64)),
    "constant_lora": case(
        constant_lora, program=constant_lora_program, x=(256, 768), w=(768, 768), a=(768, 64), b=(64, 768)
    ),
    "softmax": case(softmax, x=(2048, 2000)),
    "logsumexp": case(logsumexp, x=(2048, 2000)),
    "layernorm": case(layernorm, x=(2048, 2048), gamma=(2048,), beta=(2048,)),
    "rmsnorm": case(rmsnorm, x=(2048, 2048), g=(2048,)),
    "causal_attention": case(causal_attention, q=(16, 384, 64), k=(16, 384, 64), v=(16, 384, 64)),
    "mla": case(
        mla, q=(16, 8, 64), qr=(16, 8, 32), c=(1024, 128), kr=(1024, 32), wk=(16, 128, 64), wv=(16, 128, 64)
    ),
    "rope_attention": case(
        rope_attention,
        q=(16, 128, 64), k=(16, 1024, 64), v=(16, 1024, 64), cq=(128, 32), sq=(128, 32), ck=(1024, 32), sk=(1024, 32),
    ),
    "swiglu_bwd": case(swiglu_bwd, dy=(1024, 4096), g=(1024, 4096), u=(1024, 4096)),
    "rmsnorm_bwd": case(rmsnorm_bwd, dy=(1024, 2048), x=(1024, 2048), g=(2048,), r=(1024, 1)),
    "lora_bwd": case(
        lora_bwd, dy=(256, 768), x=(256, 768), h=(256, 16), w=(768, 768), a=(768, 16), b=(16, 768)
    ),
    "attention_bwd": case(
        attention_bwd,
        do=(8, 384, 64), q=(8, 384, 64), k=(8, 384, 64), v=(8, 384, 64), o=(8, 384, 64), lse=(8, 384, 1),
    ),
}  # fmt: skip


# -- expressions


def column_sums(a, b):
    return (a @ b).sum(0)


def total_of_product(a, b):
    return (a @ b).sum()


def mean_of_linear(x, w, bias):
    return (x @ w + bias).mean(0)


def trace_of_product(a, b):
    return torch.trace(a @ b)


def diagonal_of_product(a, b):
    return torch.diagonal(a @ b)


def weighted_by_diagonal(d, a, x):
    return torch.diag(d) @ a @ x


def two_products(a, b, x):
    return a @ x + b @ x


def shared_left(x, w, u):
    return x @ w - x @ u


def product_of_vector(a, b, x):
    return (a @ b) @ x


def matrix_power(a, x):
    return a @ a @ a @ x


def quadratic_form(x, a):
    return (x @ a @ x.mT).sum()


def quadratic_rows(x, a):
    return torch.diagonal(x @ a @ x.mT)


def squared_distances(x, y):
    return (x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1)


def gaussian_kernel(x, y, w):
    return torch.exp(-(x.unsqueeze(1) - y.unsqueeze(0)).square().sum(-1) / 32) @ w


def linear_attention(q, k, v):
    return (q @ k.mT) @ v


def outer_products(x, y):
    """The sum of the outer products of rows."""
    return (x.unsqueeze(2) * y.unsqueeze(1)).sum(0)


def outer_then_product(u, v, w):
    return (u.unsqueeze(1) * v.unsqueeze(0)) @ w


def centred_covariance(x):
    c = x - x.mean(0)
    return c.mT @ c / x.shape[0]


def centred_linear(x, w):
    return (x - x.mean(0)) @ w


def cosine_similarities(x, y):
    return (x / x.norm(dim=-1, keepdim=True)) @ (y / y.norm(dim=-1, keepdim=True)).mT


def scaled_product(x, w, s):
    return (s * x) @ (2 * w) / 3


def weighted_rows(p, x, w):
    return (p.unsqueeze(-1) * (x @ w)).sum(1)


def bilinear(x, w, y):
    return torch.einsum("bi,oij,bj->bo", x, w, y)


def kronecker_product(a, b, x):
    """(A kron B) x without its matrix form used: x as a matrix."""
    n, m = a.shape[1], b.shape[1]
    big = (a[:, None, :, None] * b[None, :, None, :]).reshape(a.shape[0] * b.shape[0], n * m)
    return big @ x


def low_rank_residual(x, u, v):
    return x + x @ (u @ v.mT)


def log_of_softmax(x):
    return torch.log(torch.softmax(x, -1))


def log_of_products(x, y):
    return torch.log(torch.exp(x) * torch.exp(y)).sum(-1)


def roots(x):
    return (torch.sqrt(x) * torch.sqrt(x) + x).sum(-1)


def variance_by_hand(x):
    return ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1)


def softmax_temperature(x, w):
    return torch.softmax((x @ w) / 0.7, -1)


def polynomial(x):
    return x**3 + 3 * x**2 + 3 * x + 1


EXPRESSIONS = {
    "column_sums": case(column_sums, a=(512, 512), b=(512, 512)),
    "total_of_product": case(total_of_product, a=(512, 512), b=(512, 512)),
    "mean_of_linear": case(mean_of_linear, x=(512, 768), w=(768, 768), bias=(768,)),
    "trace_of_product": case(trace_of_product, a=(512, 512), b=(512, 512)),
    "diagonal_of_product": case(diagonal_of_product, a=(512, 512), b=(512, 512)),
    "weighted_by_diagonal": case(weighted_by_diagonal, d=(512,), a=(512, 512), x=(512, 64)),
    "two_products": case(two_products, a=(512, 512), b=(512, 512), x=(512, 512)),
    "shared_left": case(shared_left, x=(512, 512), w=(512, 768), u=(512, 768)),
    "product_of_vector": case(product_of_vector, a=(512, 512), b=(512, 512), x=(512, 1)),
    "matrix_power": case(matrix_power, a=(512, 512), x=(512, 16)),
    "quadratic_form": case(quadratic_form, x=(768, 384), a=(384, 384)),
    "quadratic_rows": case(quadratic_rows, x=(768, 384), a=(384, 384)),
    "squared_distances": case(squared_distances, x=(512, 64), y=(512, 64)),
    "gaussian_kernel": case(gaussian_kernel, x=(768, 16), y=(768, 16), w=(768, 8)),
    "linear_attention": case(linear_attention, q=(1024, 64), k=(1024, 64), v=(1024, 64)),
    "outer_products": case(outer_products, x=(512, 128), y=(512, 128)),
    "outer_then_product": case(outer_then_product, u=(1024,), v=(1024,), w=(1024, 64)),
    "centred_covariance": case(centred_covariance, x=(2048, 256)),
    "centred_linear": case(centred_linear, x=(2048, 512), w=(512, 256)),
    "cosine_similarities": case(cosine_similarities, x=(1024, 256), y=(1024, 256)),
    "scaled_product": case(scaled_product, x=(1024, 512), w=(512, 512), s=(1024, 1)),
    "weighted_rows": case(weighted_rows, p=(32, 64), x=(32, 64, 384), w=(384, 384)),
    "bilinear": case(bilinear, x=(1024, 64), w=(64, 64, 64), y=(1024, 64)),
    "kronecker_product": case(kronecker_product, a=(48, 32), b=(48, 64), x=(2048, 16)),
    "low_rank_residual": case(low_rank_residual, x=(256, 768), u=(768, 16), v=(768, 16)),
    "log_of_softmax": case(log_of_softmax, x=(2048, 2000)),
    "log_of_products": case(log_of_products, x=(2048, 2000), y=(2048, 2000)),
    "roots": case(roots, positive=True, x=(4096, 2000)),
    "variance_by_hand": case(variance_by_hand, x=(2048, 2000)),
    "softmax_temperature": case(softmax_temperature, x=(256, 256), w=(256, 1000)),
    "polynomial": case(polynomial, x=(2048, 2000)),
}

PROGRAMS: dict[str, Case] = FAMILIES | EXPRESSIONS
