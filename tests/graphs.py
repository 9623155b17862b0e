"""Programs and hand-made μGraphs that tests share, built from the IR directly."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from mugraph.ir.axes import Axis, Dim
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Load, Pass, Program, Split, Step, Store
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import Const, Contract, Elementwise, Kernel, Op, Reduce, SizeOf
from mugraph.ir.types import DType, Input, Output, Storage, Tensor, tensor

B = Dim("B", 1, 4096)


def axis(name: str, size: int | Dim) -> Axis:
    return Axis(name, size)


class Builder:
    """Equations with inferred types, each dimension one axis."""

    def __init__(self, values: dict[str, Tensor] | None = None, block: bool = False) -> None:
        self.values: dict[str, Tensor] = dict(values or {})
        self.steps: list[Step] = []
        self.block = block

    def op(self, name: str, op: Op, *args: str) -> Equation:
        (t,) = infer(op, [type_of(self.values[a]) for a in args])
        dtype = DType.f32 if self.block and t.dtype.is_float else t.dtype
        self.values[name] = tensor(name, t.axes, dtype)
        return Equation((self.values[name],), op, args)

    def add(self, name: str, op: Op, *args: str) -> str:
        self.steps.append(self.op(name, op, *args))
        return name

    def fn(self, name: str, fn: str, *args: str) -> str:
        return self.add(name, Elementwise(fn), *args)

    def acc(self, name: str, op: Op, *args: str, monoid: str = "sum", scale: str | None = None) -> str:
        self.steps.append(Accumulator(self.op(name, op, *args), monoid, scale))  # type: ignore[arg-type]
        return name

    def take(self) -> tuple[Step, ...]:
        steps, self.steps = tuple(self.steps), []
        return steps

    def load(self, name: str, source: Tensor) -> Load:
        self.values[name] = Tensor(name, source.dims, source.dtype)
        return Load(self.values[name], source.name)


def inp(name: str, *axes: Axis, dtype: DType = DType.f16, constant: bool = False) -> Input:
    return Input(tensor(name, axes, dtype), Storage(dtype), constant)


def program(name: str, inputs: Sequence[Input], b: Builder, *outputs: str) -> Program:
    return Program(
        name,
        tuple(inputs),
        tuple(b.steps),  # type: ignore[arg-type]
        tuple(Output(o, Storage(b.values[o].dtype)) for o in outputs),
    )


def with_kernel(p: Program, block: BlockGraph, name: str | None = None) -> KernelGraph:
    """The program as one kernel over all its inputs."""
    (out,) = p.outputs
    target = p.tensors()[out.value]
    equation = Equation((target,), Kernel((block,)), tuple(i.name for i in p.inputs))
    return KernelGraph(name or p.name, p.inputs, (equation,), p.outputs)


def rmsnorm_linear(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 6144) -> Program:
    b, k, n = axis("b", B), axis("k", k_size), axis("n", n_size)
    x, g, w = inp("X", b, k, dtype=dtype), inp("G", k, dtype=dtype), inp("W", k, n, dtype=dtype)
    s = Builder({i.name: i.tensor for i in (x, g, w)})
    s.fn("x2", "square", "X")
    s.add("mean", Reduce("mean", ("k",)), "x2")
    s.add("eps", Const(Fraction(1, 10**6)))
    s.fn("shifted", "add", "mean", "eps")
    s.fn("r", "rsqrt", "shifted")
    s.fn("xr", "mul", "X", "r")
    s.fn("xn", "mul", "xr", "G")
    s.add("Y", Contract(("k",)), "xn", "W")
    return program("rmsnorm_linear", (x, g, w), s, "Y")


def rmsnorm_linear_fused(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 6144) -> KernelGraph:
    p = rmsnorm_linear(dtype, k_size, n_size)
    b = Builder(block=True)
    loads = tuple(b.load(i.name.lower(), i.tensor) for i in p.inputs)
    b.fn("xg", "mul", "x", "g")
    b.acc("acc", Contract(("k",)), "xg", "w")
    b.acc("ss", Contract(("k",)), "x", "x")
    body = b.take()
    b.add("k_size", SizeOf(p.axes()["k"]))
    b.fn("ms", "div", "ss", "k_size")
    b.add("e", Const(Fraction(1, 10**6)))
    b.fn("mse", "add", "ms", "e")
    b.fn("root", "sqrt", "mse")
    b.fn("y", "div", "acc", "root")
    block = BlockGraph(
        (("b", 16), ("n", 64)), None, (Pass((("k", 128),), loads, body),), (), b.take(), (Store("y", "Y"),)
    )
    return with_kernel(p, block)


def gated_mlp(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 4096) -> Program:
    b, k, n = axis("b", B), axis("k", k_size), axis("n", n_size)
    x, w1, w2 = inp("X", b, k, dtype=dtype), inp("W1", k, n, dtype=dtype), inp("W2", k, n, dtype=dtype)
    s = Builder({i.name: i.tensor for i in (x, w1, w2)})
    s.add("h", Contract(("k",)), "X", "W1")
    s.fn("a", "silu", "h")
    s.add("u", Contract(("k",)), "X", "W2")
    s.fn("Y", "mul", "a", "u")
    return program("gated_mlp", (x, w1, w2), s, "Y")


def gated_mlp_fused(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 4096) -> KernelGraph:
    p = gated_mlp(dtype, k_size, n_size)
    b = Builder(block=True)
    loads = tuple(b.load(i.name.lower(), i.tensor) for i in p.inputs)
    b.acc("h_acc", Contract(("k",)), "x", "w1")
    b.acc("u_acc", Contract(("k",)), "x", "w2")
    body = b.take()
    b.fn("s", "silu", "h_acc")
    b.fn("y", "mul", "s", "u_acc")
    block = BlockGraph(
        (("b", 16), ("n", 64)), None, (Pass((("k", 64),), loads, body),), (), b.take(), (Store("y", "Y"),)
    )
    return with_kernel(p, block)


def lora(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 4096, r_size: int = 16) -> Program:
    b, k, n, r = axis("b", B), axis("k", k_size), axis("n", n_size), axis("r", r_size)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
    a, bb = inp("A", k, r, dtype=dtype), inp("Bm", r, n, dtype=dtype)
    s = Builder({i.name: i.tensor for i in (x, w, a, bb)})
    s.add("xw", Contract(("k",)), "X", "W")
    s.add("xa", Contract(("k",)), "X", "A")
    s.add("xab", Contract(("r",)), "xa", "Bm")
    s.fn("Y", "add", "xw", "xab")
    return program("lora", (x, w, a, bb), s, "Y")


def lora_fused(dtype: DType = DType.f16, k_size: int = 4096, n_size: int = 4096, r_size: int = 16) -> KernelGraph:
    p = lora(dtype, k_size, n_size, r_size)
    b = Builder(block=True)
    loads = tuple(b.load(i.name.lower(), i.tensor) for i in p.inputs[:3])
    b.acc("xa_acc", Contract(("k",)), "x", "a")
    b.acc("xw_acc", Contract(("k",)), "x", "w")
    body = b.take()
    late = (b.load("bm", p.inputs[3].tensor),)
    b.add("low", Contract(("r",)), "xa_acc", "bm")
    b.fn("y", "add", "xw_acc", "low")
    block = BlockGraph(
        (("b", 16), ("n", 64)), None, (Pass((("k", 128),), loads, body),), late, b.take(), (Store("y", "Y"),)
    )
    return with_kernel(p, block)


def attention(
    dtype: DType = DType.f16, s_size: int = 4096, d_size: int = 128, h_size: int = 2, g_size: int = 8
) -> Program:
    h, g, b = axis("h", h_size), axis("g", g_size), axis("b", B)
    d, s_, e = axis("d", d_size), axis("s", s_size), axis("e", d_size)
    q = inp("Q", h, g, b, d, dtype=dtype)
    k, v = inp("K", h, s_, d, dtype=dtype), inp("V", h, s_, e, dtype=dtype)
    s = Builder({i.name: i.tensor for i in (q, k, v)})
    s.add("qk", Contract(("d",)), "Q", "K")
    s.add("c", Const(Fraction(1, 8)))
    s.fn("z", "mul", "qk", "c")
    s.fn("p", "exp", "z")
    s.add("l", Reduce("sum", ("s",)), "p")
    s.fn("w", "div", "p", "l")
    s.add("O", Contract(("s",)), "w", "V")
    return program("gqa", (q, k, v), s, "O")


def attention_fused(
    dtype: DType = DType.f16, s_size: int = 4096, d_size: int = 128, online: bool = True, parts: int = 0
) -> KernelGraph:
    """One pass over the keys: plain exponentials, or (m, l, acc); split into `parts` with a combine if parts > 0."""
    p = attention(dtype, s_size, d_size)
    b = Builder(block=True)
    loads = tuple(b.load(i.name.lower(), i.tensor) for i in p.inputs)
    b.add("qk", Contract(("d",)), "q", "k")
    b.add("c", Const(Fraction(1, 8)))
    b.fn("z", "mul", "qk", "c")
    monoid, scale = "sum", None
    if online:
        b.acc("m", Reduce("max", ("s",)), "z", monoid="max")
        b.fn("zm", "sub", "z", "m")
        b.fn("p", "exp", "zm")
        monoid, scale = "rescaled", "m"
    else:
        b.fn("p", "exp", "z")
    b.acc("l", Reduce("sum", ("s",)), "p", monoid=monoid, scale=scale)
    b.acc("acc", Contract(("s",)), "p", "v", monoid=monoid, scale=scale)
    body = b.take()
    passes = (Pass((("s", 64),), loads, body),)
    grid = (("h", 1), ("g", 8), ("b", 2))
    if not parts:
        b.fn("o", "div", "acc", "l")
        return with_kernel(p, BlockGraph(grid, None, passes, (), b.take(), (Store("o", "O"),)))
    split = Split("s", parts)
    c = Builder(block=True)
    kept = ["m", "l", "acc"] if online else ["l", "acc"]
    combine_loads = tuple(
        c.load(f"{n}_in", Tensor(f"{n}_parts", ((split.part,), *b.values[n].dims), DType.f32)) for n in kept
    )
    if online:
        c.add("m_all", Reduce("max", ("s_part",)), "m_in")
        c.fn("dm", "sub", "m_in", "m_all")
        c.fn("f", "exp", "dm")
        c.add("l_all", Contract(("s_part",)), "l_in", "f")
        c.add("acc_all", Contract(("s_part",)), "acc_in", "f")
    else:
        c.add("l_all", Reduce("sum", ("s_part",)), "l_in")
        c.add("acc_all", Reduce("sum", ("s_part",)), "acc_in")
    c.fn("o", "div", "acc_all", "l_all")
    combine = BlockGraph(grid, None, (), combine_loads, c.take(), (Store("o", "O"),))
    stores = tuple(Store(n, f"{n}_parts", "partial") for n in kept)
    return with_kernel(p, BlockGraph(grid, split, passes, (), (), stores, combine))


ALL = {
    "rmsnorm_linear": (rmsnorm_linear, rmsnorm_linear_fused),
    "gated_mlp": (gated_mlp, gated_mlp_fused),
    "lora": (lora, lora_fused),
    "gqa": (attention, attention_fused),
}
