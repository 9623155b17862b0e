"""Naive programs in the DSL, as users write them, with a symbolic number of rows; and small versions of them."""

import math
from collections.abc import Callable

import mugraph.dsl.functions as mg
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import ElementType, f16, f32, trace
from mugraph.ir.axes import Dim
from mugraph.ir.graph import Program

B = Dim("B", 1, 4096)


def rmsnorm_linear(k: int = 4096, n: int = 6144) -> Program:
    def fn(x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        return mg.rms_norm(x, g) @ w

    return trace(fn, [f16[B, k], f16[k], f16[k, n]], "rmsnorm_linear")


def gated_mlp(k: int = 4096, n: int = 4096) -> Program:
    def fn(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return mg.silu(x @ w1) * (x @ w2)

    return trace(fn, [f16[B, k], f16[k, n], f16[k, n]], "gated_mlp")


def lora(k: int = 4096, n: int = 4096, r: int = 16) -> Program:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ w + (x @ a) @ b

    return trace(fn, [f16[B, k], f16[k, n], f16[k, r], f16[r, n]], "lora")


def gqa(keys: int = 4096, d: int = 128, heads: int = 2, group: int = 8) -> Program:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = mg.softmax(q @ mg.mT(k).unsqueeze(1) / math.sqrt(d), axis=-1)
        return p @ v.unsqueeze(1)

    return trace(fn, [f16[heads, group, B, d], f16[heads, keys, d], f16[heads, keys, d]], "gqa")


def mha(keys: int = 4096, d: int = 128, heads: int = 32) -> Program:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mg.softmax(q @ mg.mT(k) * 0.125, axis=-1) @ v

    return trace(fn, [f16[heads, B, d], f16[heads, keys, d], f16[heads, keys, d]], "mha")


def qk_norm_attention(keys: int = 1024, d: int = 128, heads: int = 32) -> Program:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mg.softmax(mg.rms_norm(q) @ mg.mT(mg.rms_norm(k)), axis=-1) @ v

    return trace(fn, [f16[heads, B, d], f16[heads, keys, d], f16[heads, keys, d]], "qk_norm_attention")


def ntrans(k: int = 4096) -> Program:
    def norm(t: Tensor) -> Tensor:
        return t / mg.sqrt(mg.sum(t * t, axis=-1, keepdims=True))

    def fn(x: Tensor, h: Tensor, alpha: Tensor) -> Tensor:
        x, h = norm(x), norm(h)
        return norm(h + alpha * (x - h))

    return trace(fn, [f16[B, k], f16[B, k], f16[k]], "ntrans")


def layernorm_linear(k: int = 4096, n: int = 16384) -> Program:
    def fn(x: Tensor, g: Tensor, b: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return mg.gelu(mg.layer_norm(x, g, b) @ w + c)

    return trace(fn, [f16[B, k], f16[k], f16[k], f16[k, n], f16[n]], "layernorm_linear")


def linear_bias_residual(k: int = 4096, n: int = 4096) -> Program:
    def fn(x: Tensor, w: Tensor, bias: Tensor, r: Tensor) -> Tensor:
        return mg.silu(x @ w + bias) + r

    return trace(fn, [f16[B, k], f16[k, n], f16[n], f16[B, n]], "linear_bias_residual")


def softmax(k: int = 1000, dtype: ElementType = f32) -> Program:
    return trace(lambda x: mg.softmax(x, axis=-1), [dtype[B, k]], "softmax")


def own_softmax(k: int = 1000) -> Program:
    def fn(x: Tensor) -> Tensor:
        e = mg.exp(x - mg.amax(x, axis=-1, keepdims=True))
        return e / mg.sum(e, axis=-1, keepdims=True)

    return trace(fn, [f32[B, k]], "own_softmax")


def centred(k: int = 1000) -> Program:
    return trace(lambda x: x - mg.amax(x, axis=-1, keepdims=True), [f32[B, k]], "centred")


def chain() -> Program:
    return trace(lambda a, b, c: a @ b @ c, [f32[B, 48], f32[48, 8], f32[8, 40]], "chain")


def two_outputs() -> Program:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y, mg.sum(y, axis=-1)

    return trace(fn, [f32[B, 48], f32[48, 40]], "two_outputs")


def quotient(k: int = 1000) -> Program:
    """Factors that no axis tells apart."""
    return trace(lambda x, y, z: mg.exp(x) * y / (z * z + 1), [f32[B, k]] * 3, "quotient")


def extremes(k: int = 1000) -> Program:
    return trace(lambda x, y: mg.maximum(x, y) * mg.minimum(x, y) + x, [f32[B, k]] * 2, "extremes")


def gram() -> Program:
    return trace(lambda x: x @ mg.mT(x), [f32[B, 24]], "gram")


# The programs at sizes of a few elements, for tests that look at every value or try every derivation.
SMALL: dict[str, Callable[[], Program]] = {
    "rmsnorm_linear": lambda: rmsnorm_linear(40, 24),
    "gated_mlp": lambda: gated_mlp(40, 24),
    "lora": lambda: lora(40, 24, 4),
    "gqa": lambda: gqa(40, 8, 2, 3),
    "mha": lambda: mha(40, 8, 2),
    "qk_norm_attention": lambda: qk_norm_attention(40, 8, 2),
    "ntrans": lambda: ntrans(40),
    "layernorm_linear": lambda: layernorm_linear(40, 24),
    "linear_bias_residual": lambda: linear_bias_residual(40, 24),
    "softmax": softmax,
    "own_softmax": own_softmax,
    "centred": centred,
    "chain": chain,
    "two_outputs": two_outputs,
    "quotient": quotient,
    "extremes": extremes,
    "gram": gram,
}  # fmt: skip
