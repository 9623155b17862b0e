"""The structures that were published as the best for the classic programs, written by hand as μGraphs.

    PUBLISHED["gated_mlp"](program)        a KernelGraph, which `mg.from_graph` verifies, lowers and checks

One kernel each for RMSNorm and linear, gated MLP, LoRA and nTrans (Wu et al., Mirage, OSDI 2025, section 8); attention
by query groups with the keys cut over the grid and a kernel that combines the parts, with the norms of queries and keys
inside where the program has them (the same, figures of GQA and QKNorm).  Tiles are those of the papers' scripts where
they state them, else as large as a block holds.
"""

from __future__ import annotations

from collections.abc import Callable

import mugraph as mg


def rmsnorm_linear(program: mg.Program) -> mg.KernelGraph:
    """Both reductions in one loop, the division after it."""
    with mg.block(program, grid={"b": 16, "n": 64}) as block:
        with block.loop("k", tile=64) as loop:
            x, g, w = loop.load("X"), loop.load("G"), loop.load("W")
            product = loop.accumulate((x * g) @ w)
            squares = loop.accumulate(mg.sum(x * x, axis=-1, keepdims=True))
        block.store(product / mg.sqrt(squares / block.size("k") + 1e-6), "out")
    return block.graph()


def gated_mlp(program: mg.Program) -> mg.KernelGraph:
    """Two products in one loop over shared rows."""
    with mg.block(program, grid={"b": 16, "n": 64}) as block:
        with block.loop("k", tile=64) as loop:
            x, w1, w2 = loop.load("X"), loop.load("W1"), loop.load("W2")
            gate, up = loop.accumulate(x @ w1), loop.accumulate(x @ w2)
        block.store(mg.silu(gate) * up, "out")
    return block.graph()


def lora(program: mg.Program) -> mg.KernelGraph:
    """The wide and the narrow product in one loop, the second narrow one after it."""
    with mg.block(program, grid={"b": 16, "n": 64}) as block:
        with block.loop("k", tile=64) as loop:
            x, w, a = loop.load("X"), loop.load("W"), loop.load("A")
            wide, narrow = loop.accumulate(x @ w), loop.accumulate(x @ a)
        block.store(wide + narrow @ block.load("Bm"), "out")
    return block.graph()


def attention(
    program: mg.Program, grid: dict[str, int], keys: str, parts: int, normed: Callable[[mg.Tensor], mg.Tensor]
) -> mg.KernelGraph:
    """The keys cut over the grid; a second kernel adds the parts up and divides.  `normed`: what is done to queries and
    keys before they meet."""
    with mg.block(program, grid=grid, split={keys: parts}) as block:
        with block.loop(keys, tile=64) as loop:
            q, k, v = loop.load("Q"), loop.load("K"), loop.load("V")
            group = len(q.shape) - len(k.shape)  # query heads that share one of keys and values
            k, v = (x.unsqueeze(1) if group else x for x in (normed(k), v))
            p = mg.exp(normed(q) @ k.mT * 128**-0.5)
            total = loop.accumulate(mg.sum(p, axis=-1, keepdims=True))
            weighted = loop.accumulate(p @ v)
        with block.combine() as c:
            c.store(mg.sum(c.load(weighted), axis=0) / mg.sum(c.load(total), axis=0), "out")
    return block.graph()


def gqa(program: mg.Program) -> mg.KernelGraph:
    return attention(program, {"d": 1, "b": 2}, "n", 16, lambda x: x)


def qk_norm_attention(program: mg.Program) -> mg.KernelGraph:
    """The norms are taken tile by tile, where the queries and keys are loaded."""
    heads, rows, keys = (program.inputs[i].tensor.axes[j].name for i, j in ((0, 0), (0, 1), (1, 1)))
    return attention(program, {heads: 1, rows: 16}, keys, 4, mg.rms_norm)


def ntrans(program: mg.Program) -> mg.KernelGraph:
    """One kernel, a block a row."""

    def norm(x: mg.Tensor) -> mg.Tensor:
        return x * mg.rsqrt(mg.sum(mg.square(x), -1, keepdims=True))

    with mg.block(program, grid={"b": 1}) as block:
        x, h, alpha = block.load("x"), block.load("h"), block.load("alpha")
        a, c = norm(x), norm(h)
        block.store(norm(c + alpha * (a - c)), "out")
    return block.graph()


PUBLISHED: dict[str, Callable[[mg.Program], mg.KernelGraph]] = {
    "rmsnorm_linear": rmsnorm_linear,
    "gated_mlp": gated_mlp,
    "lora": lora,
    "gqa": gqa,
    "qk_norm_attention": qk_norm_attention,
    "ntrans": ntrans,
}
