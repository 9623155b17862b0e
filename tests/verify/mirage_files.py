"""Small graphs in the published format, and the published files where they are there."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mugraph as mg
from mugraph.ir.graph import Program

DATA = Path(__file__).parents[3] / "shared/data/mirage-mugraphs"

Graph = list[dict[str, Any]]


class Writer:
    """Writes one graph: `t = w.kernel_input(2, 4096)`, and so on.  Shapes are declared, as in the published files."""

    def __init__(self) -> None:
        self.graph: Graph = []
        self.guids = itertools.count(100)

    def tensor(self, *shape: int) -> dict[str, Any]:
        return {"guid": next(self.guids), "dim": [*shape, *[0] * (4 - len(shape))], "num_dims": len(shape)}

    def add(self, where: Graph, kind: str, args: list[Any], shape: tuple[int, ...] | None, **fields: Any) -> Any:
        results = [] if shape is None else [self.tensor(*shape)]
        where.append({"op_type": kind, "input_tensors": args, "output_tensors": results, **fields})
        return results[0] if results else None

    def kernel_input(self, *shape: int) -> Any:
        return self.add(self.graph, "kn_input_op", [], shape)

    def op(self, kind: str, shape: tuple[int, ...], *args: Any) -> Any:
        return self.add(self.graph, f"kn_{kind}_op", list(args), shape)

    def output(self, t: Any) -> Graph:
        self.add(self.graph, "kn_output_op", [t], None)
        return self.graph

    def block(self, grid: tuple[int, int, int], loop: int, reduction_dimx: int = 64) -> Block:
        return Block(self, grid, loop, reduction_dimx)


class Block:
    def __init__(self, writer: Writer, grid: tuple[int, int, int], loop: int, reduction_dimx: int) -> None:
        self.writer = writer
        self.fields = {
            "grid_dim": dict(zip("xyz", grid, strict=True)),
            "block_dim": {"x": 128, "y": 1, "z": 1},
            "forloop_range": loop,
            "reduction_dimx": reduction_dimx,
        }
        self.operators: Graph = []
        self.sources: list[Any] = []
        self.targets: list[Any] = []

    def load(self, t: Any, shape: tuple[int, ...], grid: tuple[int, int, int], loop: int = -1) -> Any:
        self.sources.append(t)
        maps = {"dtensor": t, "input_map": dict(zip("xyz", grid, strict=True)), "forloop_dim": loop}
        return self.writer.add(self.operators, "tb_input_op", [], shape, **maps)

    def op(self, kind: str, shape: tuple[int, ...], *args: Any) -> Any:
        return self.writer.add(self.operators, f"tb_{kind}_op", list(args), shape)

    def store(self, t: Any, shape: tuple[int, ...], grid: tuple[int, int, int]) -> Any:
        target = self.writer.tensor(*shape)
        maps = {"dtensor": target, "output_map": dict(zip("xyz", grid, strict=True))}
        self.writer.add(self.operators, "tb_output_op", [t], None, **maps)
        self.targets.append(target)
        return target

    def done(self) -> None:
        bgraph = {**self.fields, "operators": self.operators}
        fields = {"bgraph": bgraph, "input_tensors": self.sources, "output_tensors": self.targets}
        self.writer.graph.append({"op_type": "kn_customized_op", **fields})


# -- programs, at the sizes of the small graphs (rows 4) or of the published files


def rms_program(b: int = 4, k: int = 32, n: int = 24) -> Program:
    @mg.program
    def rms(X: mg.f16[b, k], W: mg.f16[k, n]):
        return X / mg.sqrt(mg.mean(mg.square(X), -1, True)) @ W

    return rms


def mlp_program(b: int = 4, k: int = 32, n: int = 32) -> Program:
    @mg.program
    def mlp(X: mg.f16[b, k], W1: mg.f16[k, n], W2: mg.f16[k, n]):
        return mg.silu(X @ W1) * (X @ W2)

    return mlp


def attention_program(h: int = 2, m: int = 8, d: int = 4, keys: int = 32) -> Program:
    @mg.program
    def attention(Q: mg.f16[h, m, d], K: mg.f16[h, d, keys], V: mg.f16[h, keys, d]):
        E = mg.exp(Q @ K)
        return (E / mg.sum(E, 2, True)) @ V

    return attention


PUBLISHED: dict[str, tuple[Program, int]] = {
    "rmsnorm_bs1.json": (rms_program(2, 4096, 6144), 18),
    "gated_mlp.json": (mlp_program(8, 4096, 4096), 32),
    "gqa_bs1.json": (attention_program(2, 256, 64, 4096), 28),
}


# -- graphs


def rms_graph() -> Graph:
    w = Writer()
    x, weight = w.kernel_input(4, 32), w.kernel_input(32, 24)
    b = w.block((3, 1, 1), 4)
    tx = b.load(x, (4, 8), (-1, -1, -1), 1)
    tw = b.load(weight, (8, 8), (1, -1, -1), 0)
    root = b.op("accum_red_ld_rms", (4, 1), tx)
    total = b.op("forloop_accum_nored", (4, 8), b.op("matmul", (4, 8), tx, tw))
    y = b.store(b.op("div", (4, 8), total, root), (4, 24), (1, -1, -1))
    b.done()
    return w.output(y)


def mlp_graph(fused: bool = True) -> Graph:
    w = Writer()
    x, w1, w2 = w.kernel_input(4, 32), w.kernel_input(32, 32), w.kernel_input(32, 32)
    b = w.block((4, 1, 1), 4)
    tx = b.load(x, (4, 8), (-1, -1, -1), 1)
    sums = []
    for weight in (w1, w2):
        tw = b.load(weight, (8, 8), (1, -1, -1), 0)
        sums.append(b.op("accum_nored", (4, 8), b.op("matmul", (4, 8), tx, tw)))
    gate = b.op("silu", (4, 8), sums[0])
    if fused:
        y = b.store(b.op("mul", (4, 8), gate, sums[1]), (4, 32), (1, -1, -1))
        b.done()
        return w.output(y)
    u, v = (b.store(t, (4, 32), (1, -1, -1)) for t in (gate, sums[1]))
    b.done()
    return w.output(w.op("mul", (4, 32), u, v))


def attention_graph(second_loop: int = 1) -> Graph:
    """Keys over the grid (4 parts) and a loop (2), then a second kernel that adds the parts."""
    w = Writer()
    q, k, v = w.kernel_input(2, 8, 4), w.kernel_input(2, 4, 32), w.kernel_input(2, 32, 4)
    b = w.block((2, 4, 2), 2)
    tq = b.load(q, (1, 4, 4), (0, -1, 1))
    tk = b.load(k, (1, 4, 4), (0, 2, -1), 2)
    tv = b.load(v, (1, 4, 4), (0, 1, -1), 1)
    e = b.op("exp", (1, 4, 4), b.op("matmul", (1, 4, 4), tq, tk))
    total = b.op("accum_red_ld_sum", (1, 4, 1), e)
    values = b.op("accum_nored", (1, 4, 4), b.op("matmul", (1, 4, 4), e, tv))
    parts, shares = b.store(total, (2, 8, 4), (0, 2, 1)), b.store(values, (2, 8, 16), (0, 2, 1))
    b.done()
    c = w.block((2, 2, 1), second_loop, reduction_dimx=4)
    along = 2 if second_loop > 1 else -1
    tp = c.load(parts, (1, 4, 4 // second_loop), (0, 1, -1), along)
    ts = c.load(shares, (1, 4, 16 // second_loop), (0, 1, -1), along)
    low = c.op("accum_red_ld_sum", (1, 4, 1), tp)
    high = c.op("accum_redtox_ld_sum", (1, 4, 4), ts)
    y = c.store(c.op("div", (1, 4, 4), high, low), (2, 8, 4), (0, 1, -1))
    c.done()
    return w.output(y)


SMALL: dict[str, tuple[Program, Graph]] = {
    "rms": (rms_program(), rms_graph()),
    "mlp": (mlp_program(), mlp_graph()),
    "mlp, two kernels": (mlp_program(), mlp_graph(fused=False)),
    "attention": (attention_program(), attention_graph()),
    "attention, two loops": (attention_program(), attention_graph(second_loop=2)),
}
