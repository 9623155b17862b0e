"""ATen operators that autograd leaves in a graph: fused operators that also return what their backward needs, and the
backward of attention, which has no decomposition.

Importing this module adds the rows to `ops.ATEN`.  A result that has no meaning here is None; a node whose graph uses
it stays with PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from mugraph.dsl import functions as mg
from mugraph.dsl import tensor as t
from mugraph.dsl.tensor import Tensor
from mugraph.errors import UnsupportedOpError
from mugraph.ir.types import DType
from mugraph.pytorch.ops import ATEN, EPSILON, aten


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    found = t.matmul(q, k.mT) * (q.shape[-1] ** Fraction(-1, 2) if scale is None else scale)
    if not causal:
        return found
    return t.where(mg.causal_mask(found.shape[-2], found.shape[-1]), found, -math.inf)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """The result, and of each row the logarithm of the sum of its exponentials where no row can be masked wholly."""
    out = ATEN["scaled_dot_product_attention"](q, k, v, mask, dropout, causal, scale=scale)
    sums = mg.logsumexp(_scores(t.cast(q, DType.f32), t.cast(k, DType.f32), causal, scale), -1)
    return out, sums if mask is None else None


@aten("_scaled_dot_product_flash_attention_for_cpu")
def _flash_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return _attention(q, k, v, attn_mask, dropout, causal, scale)


@aten("_scaled_dot_product_flash_attention")
def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False,
    *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (*_attention(q, k, v, None, dropout, causal, scale), *[None] * 7)


@aten("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sums: bool, dropout: float = 0.0, causal: bool = False,
    *_: Any, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    return (_attention(q, k, v, bias, dropout, causal, scale)[0], *[None] * 8)  # their sums are padded


@aten("_scaled_dot_product_flash_attention_for_cpu_backward")
def _flash_on_cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, dropout: float, causal: bool,
    *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Dao et al., FlashAttention (2022), appendix B.4: D = Σ dO·O, dS = P·(dP - D)."""
    if dropout or attn_mask is not None:
        raise UnsupportedOpError("the backward of attention with a mask or dropout")
    kept = [t.cast(x, DType.f32) for x in (grad, q, k, v, out)] if q.dtype is not DType.f64 else [grad, q, k, v, out]
    do, fq, fk, fv, o = kept
    weights = mg.exp(_scores(fq, fk, causal, scale) - sums.unsqueeze(-1))
    slope = weights * (t.matmul(do, fv.mT) - mg.sum(do * o, -1, True))
    slope = slope * (q.shape[-1] ** Fraction(-1, 2) if scale is None else scale)
    found = t.matmul(slope, fk), t.matmul(slope.mT, fq), t.matmul(weights.mT, do)
    return tuple(t.cast(x, q.dtype) for x in found)  # type: ignore[return-value]


@aten("_fused_rms_norm")
def _fused_rms_norm(x: Tensor, shape: Sequence[Any], weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    exact = EPSILON.get(x.dtype, Fraction(1, 2**23)) if eps is None else eps
    axis = tuple(range(-len(shape), 0))
    wide = x if x.dtype is DType.f64 else t.cast(x, DType.f32)
    return mg.rms_norm(x, weight, exact, axis), mg.rsqrt(mg.mean(mg.square(wide), axis, True) + exact)


@aten("gelu_backward")
def _gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """Of gelu(x) = x Φ(x): Φ(x) + x exp(-x²/2) / sqrt(2π); of its approximation x s(2u), s the sigmoid and
    u = sqrt(2/π) (x + 0.044715 x³): s + x s (1 - s) 2u'."""
    wide = x if x.dtype is DType.f64 else t.cast(x, DType.f32)
    if approximate != "tanh":
        normal = (mg.erf(wide * math.sqrt(0.5)) + 1) * 0.5
        return t.cast(grad * (normal + wide * mg.exp(wide * wide * -0.5) * (1 / math.sqrt(2 * math.pi))), x.dtype)
    factor = 2 * math.sqrt(2 / math.pi)
    square = wide * wide
    s = mg.sigmoid(wide * (square * 0.044715 + 1) * factor)
    slope = s + wide * s * (1 - s) * (square * (3 * 0.044715) + 1) * factor
    return t.cast(grad * slope, x.dtype)
