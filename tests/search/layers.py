"""Stacks of transformer layers, as one writes them: larger than the search takes whole."""

import math

import mugraph.dsl.functions as mg
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import f16, trace
from mugraph.ir.axes import Dim
from mugraph.ir.graph import Program

T = Dim("T", 1, 4096)
WEIGHTS = ("g", "wq", "wk", "wv", "wo", "h", "wg", "wu", "wd")


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = int(t.shape[-1]) // 2
    return t * cos + mg.concat([-t[..., half:], t[..., :half]], -1) * sin


def attention(q: Tensor, k: Tensor, v: Tensor, d: int) -> Tensor:
    scores = q @ mg.mT(k) / math.sqrt(d)
    scores = mg.where(mg.causal_mask(scores.shape[-2], scores.shape[-1]), scores, float("-inf"))
    return mg.softmax(scores, axis=-1) @ v


def layers(count: int, width: int = 4096, hidden: int = 11008, d: int = 128) -> Program:
    """Layers of Llama: pre-norm attention with rotary embedding, and a gated MLP, each with its residual."""

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (width // d, d)).permute(1, 0, 2)

    def layer(x: Tensor, cos: Tensor, sin: Tensor, *w: Tensor) -> Tensor:
        g, wq, wk, wv, wo, h, wg, wu, wd = w
        y = mg.rms_norm(x, g)
        q, k, v = (heads(y @ m) for m in (wq, wk, wv))
        mixed = attention(rotated(q, cos, sin), rotated(k, cos, sin), v, d)
        x = x + mixed.permute(1, 0, 2).flatten(1) @ wo
        y = mg.rms_norm(x, h)
        return x + (mg.silu(y @ wg) * (y @ wu)) @ wd

    def stack(x: Tensor, cos: Tensor, sin: Tensor, *w: Tensor) -> Tensor:
        for i in range(count):
            x = layer(x, cos, sin, *w[9 * i : 9 * i + 9])
        return x

    square, wide = f16[width, width], f16[width, hidden]
    types = [f16[width], square, square, square, square, f16[width], wide, wide, f16[hidden, width]]
    return named(stack, [f16[T, width], f16[T, d], f16[T, d], *types * count], ["x", "cos", "sin"], count, "layers")


def mlps(count: int, width: int = 512, hidden: int = 1024) -> Program:
    """Small layers: a norm, a gated MLP and a residual."""

    def stack(x: Tensor, *w: Tensor) -> Tensor:
        for i in range(count):
            h, wg, wu, wd = w[4 * i : 4 * i + 4]
            y = mg.rms_norm(x, h)
            x = x + (mg.silu(y @ wg) * (y @ wu)) @ wd
        return x

    wide = f16[width, hidden]
    types = [f16[width], wide, wide, f16[hidden, width]]
    return named(stack, [f16[T, width], *types * count], ["x"], count, "mlps", WEIGHTS[-4:])


def named(
    stack: object, types: list[object], first: list[str], count: int, name: str, weights: tuple[str, ...] = WEIGHTS
) -> Program:
    """Traces a function of any number of weights, which get names."""
    names = [*first, *(f"{w}{i}" for i in range(count) for w in weights)]
    scope = {"stack": stack}
    exec(f"def fn({', '.join(names)}): return stack({', '.join(names)})", scope)
    return trace(scope["fn"], types, name)
