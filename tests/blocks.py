"""Hand-made μGraphs beyond the four programs: one for each thing that lowering has to get right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

from mugraph.ir.axes import Axis, Dim
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Pass, Split, Store
from mugraph.ir.ops import (
    FUNCTIONS,
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Reduce,
    Rename,
    Scatter,
    Select,
    SizeOf,
    Slice,
)  # fmt: skip
from mugraph.ir.types import DType, Input, Output, Storage, Tensor, tensor
from tests.graphs import Builder, axis, inp, program

B = Dim("B", 1, 4096)
S = Dim("S", 1, 512)


def kernel_graph(name: str, inputs: tuple[Input, ...], blocks: tuple[BlockGraph, ...], *targets: Tensor) -> KernelGraph:
    """One kernel equation over all inputs."""
    equation = Equation(targets, Kernel(blocks), tuple(i.name for i in inputs))
    return KernelGraph(name, inputs, (equation,), tuple(Output(t.name, Storage(t.dtype)) for t in targets))


def softmax_two_pass(dtype: DType = DType.f16, k_size: int = 40, tile: int = 16, shifted: bool = False) -> KernelGraph:
    """Row softmax: the sum in one pass, the quotients stored from the next."""
    b, k = axis("b", B), axis("k", k_size)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    first = (s.load("x", x.tensor),)
    if shifted:
        s.acc("top", Reduce("max", ("k",)), "x", monoid="max")
        s.fn("d", "sub", "x", "top")
        s.fn("p", "exp", "d")
        s.acc("l", Reduce("sum", ("k",)), "p", monoid="rescaled", scale="top")
    else:
        s.fn("p", "exp", "x")
        s.acc("l", Reduce("sum", ("k",)), "p")
    one = Pass((("k", tile),), first, s.take())
    second = (s.load("x", x.tensor),)
    if shifted:
        s.fn("d", "sub", "x", "top")
        s.fn("p", "exp", "d")
    else:
        s.fn("p", "exp", "x")
    s.fn("y", "div", "p", "l")
    two = Pass((("k", tile),), second, s.take())
    block = BlockGraph((("b", 4),), None, (one, two), (), (), (Store("y", "Y"),))
    return kernel_graph("softmax_two_pass", (x,), (block,), tensor("Y", (b, k), dtype))


def softmax_in_tile(dtype: DType = DType.f16, k_size: int | Dim = 21) -> KernelGraph:
    """Row softmax with whole rows in the tile, of static or symbolic length."""
    b, k = axis("b", B), axis("k", k_size)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("p", "exp", "x")
    s.add("l", Reduce("sum", ("k",)), "p")
    s.fn("y", "div", "p", "l")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("softmax_in_tile", (x,), (block,), tensor("Y", (b, k), dtype))


def causal_attention(dtype: DType = DType.f16, s_size: int = 40, d_size: int = 24, online: bool = False) -> KernelGraph:
    """Queries t see keys s <= t; keys in a loop, masked exponentials."""
    h, t, s_ = axis("h", 2), axis("t", B), axis("s", s_size)
    d, e = axis("d", d_size), axis("e", d_size)
    q, k, v = inp("Q", h, t, d, dtype=dtype), inp("K", h, s_, d, dtype=dtype), inp("V", h, s_, e, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("q", q.tensor), s.load("k", k.tensor), s.load("v", v.tensor))
    s.add("z", Contract(("d",)), "q", "k")
    s.add("row", Iota(t))
    s.add("column", Iota(s_))
    s.add("seen", Compare("le"), "column", "row")
    s.add("p", MaskedExp(), "z", "seen")
    s.acc("l", Reduce("sum", ("s",)), "p")
    s.acc("acc", Contract(("s",)), "p", "v")
    body = s.take()
    s.fn("o", "div", "acc", "l")
    block = BlockGraph(
        (("h", 1), ("t", 16)), None, (Pass((("s", 16),), loads, body),), (), s.take(), (Store("o", "O"),)
    )
    return kernel_graph("causal_attention", (q, k, v), (block,), tensor("O", (h, t, e), dtype))


def layernorm_linear(dtype: DType = DType.f16, k_size: int = 40, n_size: int = 24) -> KernelGraph:
    """Mean and variance as sums beside the matmul; weight, bias and GELU in the epilogue; a second store."""
    b, k, n = axis("b", B), axis("k", k_size), axis("n", n_size)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    bias, res = inp("Bias", n, dtype=dtype), inp("R", b, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("sx", Reduce("sum", ("k",)), "x")
    s.acc("sxx", Contract(("k",)), "x", "x")
    s.acc("sw", Reduce("sum", ("k",)), "w")
    s.acc("acc", Contract(("k",)), "x", "w")
    body = s.take()
    late = (s.load("bias", bias.tensor), s.load("res", res.tensor))
    s.add("count", SizeOf(k))
    s.fn("mean", "div", "sx", "count")
    s.fn("mean2", "square", "mean")
    s.fn("ex2", "div", "sxx", "count")
    s.fn("var", "sub", "ex2", "mean2")
    s.add("eps", Const(Fraction(1, 100)))
    s.fn("safe", "add", "var", "eps")
    s.fn("r", "rsqrt", "safe")
    s.fn("mw", "mul", "mean", "sw")
    s.fn("centred", "sub", "acc", "mw")
    s.fn("scaled", "mul", "centred", "r")
    s.fn("biased", "add", "scaled", "bias")
    s.fn("g", "gelu", "biased")
    s.fn("y", "add", "g", "res")
    block = BlockGraph(
        (("b", 4), ("n", 16)), None, (Pass((("k", 16),), loads, body),), late, s.take(),
        (Store("y", "Y"), Store("biased", "H")),
    )  # fmt: skip
    targets = (tensor("Y", (b, n), dtype), tensor("H", (b, n), DType.f32))
    return kernel_graph("layernorm_linear", (x, w, bias, res), (block,), *targets)


def split_matmul(
    dtype: DType = DType.f16, k_size: int = 200, n_size: int = 24, parts: int = 3, atomic: bool = False
) -> KernelGraph:
    """Split-K with partial sums and a combine, or with atomic additions."""
    b, k, n = axis("b", B), axis("k", k_size), axis("n", n_size)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    passes = (Pass((("k", 32),), loads, s.take()),)
    grid, split = (("b", 16), ("n", 16)), Split("k", parts)
    target = tensor("Y", (b, n), DType.f32 if atomic else dtype)
    if atomic:
        block = BlockGraph(grid, split, passes, (), (), (Store("acc", "Y", "atomic"),))
        return kernel_graph("split_atomic", (x, w), (block,), target)
    c = Builder(block=True)
    part = c.load("acc_in", Tensor("acc_parts", ((split.part,), (b,), (n,)), DType.f32))
    c.add("y", Reduce("sum", (split.part.name,)), "acc_in")
    combine = BlockGraph(grid, None, (), (part,), c.take(), (Store("y", "Y"),))
    block = BlockGraph(grid, split, passes, (), (), (Store("acc", "acc_parts", "partial"),), combine)
    return kernel_graph("split_matmul", (x, w), (block,), target)


def matvec(dtype: DType = DType.f16, k_size: int = 72, n_size: int = 24, tile: int = 1) -> KernelGraph:
    """One row a block: multiply and sum, no matrix multiply."""
    b, k, n = axis("b", B), axis("k", k_size), axis("n", n_size)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    body = s.take()
    s.fn("y", "silu", "acc")
    block = BlockGraph(
        (("b", tile), ("n", 8)), None, (Pass((("k", 32),), loads, body),), (), s.take(), (Store("y", "Y"),)
    )
    return kernel_graph("matvec", (x, w), (block,), tensor("Y", (b, n), dtype))


def batched_matmul(dtype: DType = DType.f16) -> KernelGraph:
    """A batch axis inside the tile."""
    h, b, k, n = axis("h", 6), axis("b", B), axis("k", 40), axis("n", 24)
    x, w = inp("X", h, b, k, dtype=dtype), inp("W", h, k, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    block = BlockGraph(
        (("h", 4), ("b", 16)), None, (Pass((("k", 16),), loads, s.take()),), (), (), (Store("acc", "Y"),)
    )
    return kernel_graph("batched_matmul", (x, w), (block,), tensor("Y", (h, b, n), dtype))


def flattened_sides(dtype: DType = DType.f16) -> KernelGraph:
    """Two axes on the M side, one of which is reduced later: they cannot share a tile dimension."""
    g, b, k, n = axis("g", 4), axis("b", B), axis("k", 40), axis("n", 24)
    x, w, c = inp("X", g, b, k, dtype=dtype), inp("W", k, n, dtype=dtype), inp("C", g, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    body = s.take()
    late = (s.load("c", c.tensor),)
    s.add("y", Contract(("g",)), "acc", "c")
    block = BlockGraph(
        (("b", 8), ("n", 16)), None, (Pass((("k", 16),), loads, body),), late, s.take(), (Store("y", "Y"),)
    )
    return kernel_graph("flattened_sides", (x, w, c), (block,), tensor("Y", (b, n), dtype))


def rope(dtype: DType = DType.f16) -> KernelGraph:
    """Rotary embedding: halves of the head dimension by slices, joined again by a concatenation."""
    b, d, half = axis("b", B), axis("d", 24), axis("j", 12)
    x, cos, sin = inp("X", b, d, dtype=dtype), inp("Cos", b, d, dtype=dtype), inp("Sin", b, d, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("cos", cos.tensor), s.load("sin", sin.tensor))
    s.add("low", Slice("d", half, 0), "x")
    s.add("high", Slice("d", half, 12), "x")
    s.add("turned", Concat(("j", "j"), d), "high", "low")
    s.add("at", Iota(d))
    s.add("middle", Const(Fraction(12), DType.i64))
    s.add("first", Compare("lt"), "at", "middle")
    s.fn("minus", "neg", "turned")
    s.add("rotated", Select(), "first", "minus", "turned")
    s.fn("xc", "mul", "x", "cos")
    s.fn("rs", "mul", "rotated", "sin")
    s.fn("y", "add", "xc", "rs")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("rope", (x, cos, sin), (block,), tensor("Y", (b, d), dtype))


def gates(dtype: DType = DType.f16) -> KernelGraph:
    """Both halves of one matrix by slices of a function of it."""
    b, m, n = axis("b", B), axis("m", 40), axis("n", 20)
    x = inp("X", b, m, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("t", "tanh", "x")
    s.add("a", Slice("m", n, 0), "t")
    s.add("c", Slice("m", n, 1, 2), "t")
    s.fn("y", "mul", "a", "c")
    block = BlockGraph((("b", 4), ("n", 8)), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("gates", (x,), (block,), tensor("Y", (b, n), dtype))


def gram(dtype: DType = DType.f16) -> KernelGraph:
    """x @ x.T: one input under two names for its rows."""
    b, c, k = axis("b", 20), axis("c", 20), axis("k", 40)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    left = s.load("x", x.tensor)
    right = Load(Tensor("xt", ((c,), (k,)), dtype), "X")
    s.values["xt"] = right.value
    s.acc("acc", Contract(("k",)), "x", "xt")
    block = BlockGraph(
        (("b", 16), ("c", 16)), None, (Pass((("k", 16),), (left, right), s.take()),), (), (), (Store("acc", "Y"),)
    )
    return kernel_graph("gram", (x,), (block,), tensor("Y", (b, c), dtype))


def heads(dtype: DType = DType.f16) -> KernelGraph:
    """Products of axes in one dimension, in and out, and a bias per head."""
    b, h, d, n = axis("b", B), axis("h", 4), axis("d", 12), axis("n", 20)
    x = Input(Tensor("X", ((b,), (h, d)), dtype), Storage(dtype))
    w, c = inp("W", d, n, dtype=dtype), inp("C", h, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor), s.load("c", c.tensor))
    s.add("xw", Contract(("d",)), "x", "w")
    s.fn("y", "add", "xw", "c")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    target = Tensor("Y", ((b,), (h, n)), dtype)
    return kernel_graph("heads", (x, w, c), (block,), target)


def extremes(dtype: DType = DType.f16) -> KernelGraph:
    """Largest and smallest of negative and positive numbers over an axis with a tail."""
    b, k = axis("b", B), axis("k", 21)
    x, y = inp("X", b, k, dtype=dtype), inp("Z", b, k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("z", y.tensor))
    s.fn("xs", "square", "x")
    s.fn("below", "neg", "xs")
    s.fn("zs", "square", "z")
    s.add("one", Const(Fraction(1)))
    s.fn("above", "add", "zs", "one")
    s.fn("e", "exp", "z")
    s.acc("top", Reduce("max", ("k",)), "below", monoid="max")
    s.acc("low", Reduce("min", ("k",)), "above", monoid="min")
    s.fn("running", "mul", "top", "e")
    s.acc("total", Reduce("sum", ("k",)), "e")
    body = s.take()
    s.fn("part", "add", "top", "low")
    s.fn("y", "add", "part", "total")
    block = BlockGraph((("b", 4),), None, (Pass((("k", 8),), loads, body),), (), s.take(), (Store("y", "Y"),))
    return kernel_graph("extremes", (x, y), (block,), tensor("Y", (b,), dtype))


def functions(dtype: DType = DType.f32) -> KernelGraph:
    """Every elementwise function, each in a store of its own; arguments positive where it matters."""
    b, k = axis("b", B), axis("k", 12)
    x, y = inp("X", b, k, dtype=dtype), inp("Z", b, k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("z", y.tensor))
    s.fn("positive", "abs", "x")
    s.add("half", Const(Fraction(1, 2)))
    s.fn("safe", "add", "positive", "half")
    s.add("mask", Compare("gt"), "x", "z")
    s.add("other", Compare("le"), "z", "half")
    stores, targets = [], []
    for fn, count in FUNCTIONS.items():
        if fn in ("and", "or", "not"):
            s.fn(f"f_{fn}", fn, *("mask", "other")[:count])
        elif fn == "pow":
            s.add("f_pow", Elementwise("pow", (("exponent", Fraction(3, 2)),)), "safe")
            s.add("f_pow3", Elementwise("pow", (("exponent", Fraction(3)),)), "x")
            s.add("f_pow_7", Elementwise("pow", (("exponent", Fraction(-7)),)), "safe")
        else:
            args = ("x", "safe") if fn == "div" else ("x", "z")[:count]
            s.fn(f"f_{fn}", fn, *(("safe",) if fn in ("sqrt", "rsqrt", "log", "log1p", "reciprocal") else args))
    s.add("f_gelu_tanh", Elementwise("gelu", (("approximate", "tanh"),)), "x")
    s.add("f_where", Select(), "mask", "x", "z")
    s.add("f_cast", Cast(DType.i32), "f_round")
    for name in [n for n in s.values if n.startswith("f_")]:
        t = s.values[name]
        stores.append(Store(name, f"Y_{name}"))
        targets.append(tensor(f"Y_{name}", (b, k), t.dtype))
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), tuple(stores))
    return kernel_graph("functions", (x, y), (block,), *targets)


def contractions(dtype: DType = DType.f16) -> KernelGraph:
    """Sums of products of one, two and three operands over one and two axes, one of them looped."""
    b, k, j, n = axis("b", B), axis("k", 21), axis("j", 5), axis("n", 10)
    x, y = inp("X", b, k, j, dtype=dtype), inp("Z", k, j, n, dtype=dtype)
    g, c = inp("G", k, dtype=dtype), inp("C", n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("z", y.tensor), s.load("g", g.tensor))
    s.acc("two", Contract(("k", "j")), "x", "z")
    s.acc("three", Contract(("k", "j")), "x", "z", "g")
    s.acc("one", Contract(("k", "j")), "x")
    s.acc("alone", Contract(("k", "j")), "z", "g")
    body = s.take()
    late = (s.load("c", c.tensor),)
    s.add("inner", Contract(("n",)), "two", "c")
    s.add("mean", Reduce("mean", ("n",)), "three")
    s.fn("a", "add", "inner", "mean")
    s.fn("r", "add", "a", "one")
    s.fn("y", "mul", "r", "alone")
    s.fn("y2", "add", "y", "three")
    block = BlockGraph((("b", 4),), None, (Pass((("k", 8),), loads, body),), late, s.take(), (Store("y2", "Y"),))
    return kernel_graph("contractions", (x, y, g, c), (block,), tensor("Y", (b, n), dtype))


def broadcasts(dtype: DType = DType.f16) -> KernelGraph:
    """A value repeated along a new axis, renamed, and summed along it."""
    b, k, c = axis("b", 20), axis("k", 12), axis("c", 20)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.add("row", Reduce("sum", ("k",)), "x")
    s.add("column", Rename((("b", c),)), "row")
    s.fn("both", "mul", "row", "column")
    s.add("wide", Broadcast((k,)), "both")
    s.add("back", Reduce("sum", ("k",)), "wide")
    block = BlockGraph((), None, (), loads, s.take(), (Store("back", "Y"),))
    return kernel_graph("broadcasts", (x,), (block,), tensor("Y", (b, c), dtype))


def two_blocks(dtype: DType = DType.f16) -> KernelGraph:
    """Two block graphs in one kernel."""
    b, k = axis("b", B), axis("k", 20)
    x = inp("X", b, k, dtype=dtype)
    blocks = []
    for name, fn in (("Y1", "square"), ("Y2", "neg")):
        s = Builder(block=True)
        loads = (s.load("x", x.tensor),)
        s.fn("y", fn, "x")
        blocks.append(BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", name),)))
    targets = (tensor("Y1", (b, k), dtype), tensor("Y2", (b, k), dtype))
    return kernel_graph("two_blocks", (x,), tuple(blocks), *targets)


def library_and_kernel(dtype: DType = DType.f16) -> KernelGraph:
    """A library matmul between a plain equation and a kernel."""
    b, k, n = axis("b", B), axis("k", 20), axis("n", 24)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    plain = Equation((tensor("X2", (b, k), dtype),), Elementwise("relu"), ("X",))
    i, m, j = axis("i", B), axis("m", 20), axis("j", 24)
    u, v = inp("U", i, m, dtype=dtype), inp("V", m, j, dtype=dtype)
    f = Builder({"U": u.tensor, "V": v.tensor})
    f.add("P", Contract(("m",)), "U", "V")
    matmul = program("matmul", (u, v), f, "P")
    call = Equation((tensor("H", (b, n), dtype),), Library("matmul", matmul), ("X2", "W"))
    s = Builder(block=True)
    loads = (s.load("h", tensor("H", (b, n), dtype)),)
    s.add("total", Reduce("max", ("n",)), "h")
    s.fn("y", "mul", "h", "total")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    kernel = Equation((tensor("Y", (b, n), dtype),), Kernel((block,)), ("H",))
    return KernelGraph("library_and_kernel", (x, w), (plain, call, kernel), (Output("Y", Storage(dtype)),))


def prologue(dtype: DType = DType.f16) -> KernelGraph:
    """A pass without a loop before the loop: rows normalised once, then multiplied a tile of columns at a time, each
    stored from inside the loop."""
    b, k, n = axis("b", B), axis("k", 20), axis("n", 40)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    s = Builder(block=True)
    once = (s.load("x", x.tensor),)
    s.add("ss", Contract(("k",)), "x", "x")
    s.fn("r", "rsqrt", "ss")
    s.fn("xn", "mul", "x", "r")
    first = Pass((), once, s.take())
    tiles = (s.load("w", w.tensor),)
    s.add("y", Contract(("k",)), "xn", "w")
    second = Pass((("n", 16),), tiles, s.take())
    block = BlockGraph((("b", 4),), None, (first, second), (), (), (Store("y", "Y"),))
    return kernel_graph("prologue", (x, w), (block,), tensor("Y", (b, n), dtype))


def tiny_tiles(dtype: DType = DType.f16) -> KernelGraph:
    """A matrix multiply whose every side is narrower than 16."""
    b, k, n = axis("b", B), axis("k", 20), axis("n", 10)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.fn("e", "exp", "x")
    s.acc("acc", Contract(("k",)), "e", "w")
    block = BlockGraph((("b", 2), ("n", 4)), None, (Pass((("k", 8),), loads, s.take()),), (), (), (Store("acc", "Y"),))
    return kernel_graph("tiny_tiles", (x, w), (block,), tensor("Y", (b, n), dtype))


def symbolic_loop(dtype: DType = DType.f16) -> KernelGraph:
    """A loop over an axis of symbolic size, and the size itself in the result."""
    b, s_, n = axis("b", B), axis("s", S), axis("n", 20)
    x, w = inp("X", b, s_, dtype=dtype), inp("W", s_, n, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.fn("e", "exp", "x")
    s.acc("acc", Contract(("s",)), "e", "w")
    s.acc("l", Reduce("sum", ("s",)), "e")
    body = s.take()
    s.add("count", SizeOf(Axis("s", S)))
    s.fn("lc", "mul", "l", "count")
    s.fn("y", "div", "acc", "lc")
    block = BlockGraph((("b", 16),), None, (Pass((("s", 16),), loads, body),), (), s.take(), (Store("y", "Y"),))
    return kernel_graph("symbolic_loop", (x, w), (block,), tensor("Y", (b, n), dtype))


def gathered_rows(dtype: DType = DType.f16, t_size: int = 20) -> KernelGraph:
    """Rows of X that an index names, times W; the index lies before the loop."""
    t, b, k, n = axis("t", t_size), axis("b", B), axis("k", 40), axis("n", 24)
    x, at, w = inp("X", t, k, dtype=dtype), inp("At", b, dtype=DType.i32), inp("W", k, n, dtype=dtype)
    s = Builder(block=True)
    first = (s.load("at", at.tensor),)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.add("rows", Gather("t"), "x", "at")
    s.acc("acc", Contract(("k",)), "rows", "w")
    passes = (Pass((), first, ()), Pass((("k", 16),), loads, s.take()))
    block = BlockGraph((("b", 16), ("n", 16)), None, passes, (), (), (Store("acc", "Y"),))
    return kernel_graph("gathered_rows", (x, at, w), (block,), tensor("Y", (b, n), dtype))


def paged_sum(dtype: DType = DType.f16) -> KernelGraph:
    """Queries against keys in pages, two pages an iteration; the table's entries count half pages."""
    page, slot, b, p, d = axis("page", 16), axis("slot", 8), axis("b", B), axis("p", 5), axis("d", 24)
    q, k, table = inp("Q", b, d, dtype=dtype), inp("K", page, slot, d, dtype=dtype), inp("Table", b, p, dtype=DType.i32)
    s = Builder(block=True)
    first = (s.load("q", q.tensor),)
    loads = (s.load("k", k.tensor), s.load("table", table.tensor))
    s.add("two", Const(Fraction(2), DType.i32))
    s.fn("place", "mul", "table", "two")
    s.add("keys", Gather("page"), "k", "place")
    s.acc("acc", Contract(("p", "slot", "d")), "q", "keys")
    passes = (Pass((), first, ()), Pass((("p", 2),), loads, s.take()))
    block = BlockGraph((("b", 2),), None, passes, (), (), (Store("acc", "Y"),))
    return kernel_graph("paged_sum", (q, k, table), (block,), tensor("Y", (b,), dtype))


def scattered_rows(dtype: DType = DType.f16, looped: bool = False) -> KernelGraph:
    """Rows added to the rows of Y that an index names, several to one; the rows on the grid, or in a loop."""
    b, n, t = axis("b", B), axis("n", 24), axis("t", 20)
    x, at = inp("X", b, n, dtype=dtype), inp("At", b, dtype=DType.i32)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("at", at.tensor))
    s.fn("x2", "add", "x", "x")
    s.add("y", Scatter(("b",), t), "x2", "at")
    store = (Store("y", "Y", "atomic"),)
    if looped:
        block = BlockGraph((("n", 16),), None, (Pass((("b", 4),), loads, s.take()),), (), (), store)
    else:
        block = BlockGraph((("b", 4), ("n", 16)), None, (), loads, s.take(), store)
    return kernel_graph("scattered_rows", (x, at), (block,), tensor("Y", (t, n), DType.f32))


def prefix_sums(dtype: DType = DType.f16) -> KernelGraph:
    """Prefix sums of whole rows in the tile."""
    b, k = axis("b", B), axis("k", 21)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("x2", "add", "x", "x")
    s.add("y", CumSum("k"), "x2")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("prefix_sums", (x,), (block,), tensor("Y", (b, k), dtype))


def nested_loops(dtype: DType = DType.f16, parts: int = 0) -> KernelGraph:
    """A sum over two axes in a nest of two loops, both with tails; the outer one in parts, added atomically."""
    b, k, j, n = axis("b", B), axis("k", 23), axis("j", 40), axis("n", 24)
    x, w = inp("X", b, k, j, dtype=dtype), inp("W", k, j, n, dtype=dtype)
    v = inp("V", k, dtype=dtype)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor), s.load("v", v.tensor))
    s.fn("xv", "mul", "x", "v")
    s.acc("acc", Contract(("k", "j")), "xv", "w")
    passes = (Pass((("k", 3), ("j", 16)), loads, s.take()),)
    grid, split = (("b", 16), ("n", 16)), Split("k", parts) if parts else None
    store = Store("acc", "Y", "atomic" if parts else "write")
    block = BlockGraph(grid, split, passes, (), (), (store,))
    out = tensor("Y", (b, n), DType.f32 if parts else dtype)
    return kernel_graph("nested_loops", (x, w, v), (block,), out)


BLOCKS: dict[str, Callable[..., KernelGraph]] = {
    "nested_loops": nested_loops,
    "nested_loops_in_parts": lambda dtype=DType.f16: nested_loops(dtype, parts=3),
    "gathered_rows": gathered_rows,
    "paged_sum": paged_sum,
    "scattered_rows": scattered_rows,
    "scattered_rows_in_a_loop": lambda dtype=DType.f16: scattered_rows(dtype, looped=True),
    "prefix_sums": prefix_sums,
    "softmax_two_pass": softmax_two_pass,
    "softmax_two_pass_shifted": lambda dtype=DType.f16: softmax_two_pass(dtype, shifted=True),
    "softmax_in_tile": softmax_in_tile,
    "softmax_symbolic": lambda dtype=DType.f16: softmax_in_tile(dtype, S),
    "causal_attention": causal_attention,
    "layernorm_linear": layernorm_linear,
    "split_matmul": split_matmul,
    "split_matmul_empty_parts": lambda dtype=DType.f16: split_matmul(dtype, 40, parts=8),
    "split_atomic": lambda dtype=DType.f16: split_matmul(dtype, atomic=True),
    "matvec": matvec,
    "batched_matmul": batched_matmul,
    "flattened_sides": flattened_sides,
    "rope": rope,
    "gates": gates,
    "gram": gram,
    "heads": heads,
    "extremes": extremes,
    "contractions": contractions,
    "broadcasts": broadcasts,
    "two_blocks": two_blocks,
    "library_and_kernel": library_and_kernel,
    "prologue": prologue,
    "tiny_tiles": tiny_tiles,
    "symbolic_loop": symbolic_loop,
    "functions": functions,
}


def finer_combine(graph: KernelGraph) -> KernelGraph:
    """With one token and 8 columns in a block of the combine."""
    (e,) = graph.equations
    (block,) = e.op.blocks
    tiles = {a: 1 if a == "b" else t for a, t in block.combine.grid}
    combine = replace(block.combine, grid=(*tiles.items(), ("e", 8)))
    return replace(graph, equations=(replace(e, op=replace(e.op, blocks=(replace(block, combine=combine),))),))
