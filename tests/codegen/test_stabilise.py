"""Stabilise keeps what a μGraph computes, in the fields and in float64, and makes it finite."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from mugraph.codegen.stabilise import stabilise, unique_names
from mugraph.ir.axes import Dim
from mugraph.ir.evaluate import FieldAlgebra, FloatAlgebra, aligned, axis_sizes, outputs
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Pass, Store, equations_of
from mugraph.ir.ops import Const, Contract, Elementwise, Kernel, MaskedExp, Reduce, Select
from mugraph.ir.types import DType, tensor
from tests.blocks import B, causal_attention, kernel_graph, layernorm_linear, softmax_in_tile, softmax_two_pass
from tests.graphs import Builder, attention_fused, axis, inp, lora_fused, rmsnorm_linear_fused

BINDINGS = {"B": 3, "S": 5}


def algebra_sizes(*graphs: KernelGraph) -> dict[str, int]:
    return {a: n for g in graphs for a, n in axis_sizes(g, BINDINGS).items()}


def check_same(graph: KernelGraph, other: KernelGraph, scale: float = 1.0) -> None:
    """Equal values in Z_p, and in float64 at tiles of 2."""
    sizes = algebra_sizes(graph, other)
    tiles = dict.fromkeys(sizes, 2)
    field = FieldAlgebra(sizes, tiles, key="stabilise")
    inputs = {i.name: field.random(tuple(a.name for a in i.tensor.axes), i.name) for i in graph.inputs}
    for x, y in zip(outputs(graph, inputs, field), outputs(other, inputs, field), strict=True):
        assert (x.parts[0] == aligned(y, x.axes).parts[0]).all(), "differs in the field"
    floats = FloatAlgebra(sizes, tiles)
    rng = np.random.default_rng(0)
    values = {}
    for i in graph.inputs:
        axes = tuple(a.name for a in i.tensor.axes)
        values[i.name] = floats.value(axes, scale * rng.standard_normal([sizes[a] for a in axes]))
    for x, y in zip(outputs(graph, values, floats), outputs(other, values, floats), strict=True):
        np.testing.assert_allclose(aligned(y, x.axes).parts[0], x.parts[0], rtol=1e-9, atol=1e-12)


def blocks_of(graph: KernelGraph) -> list[BlockGraph]:
    (equation,) = graph.kernels()
    assert isinstance(equation.op, Kernel)
    return list(equation.op.blocks)


def one_block(graph: KernelGraph) -> BlockGraph:
    (block,) = blocks_of(graph)
    return block


def logits(graph: KernelGraph, size: float) -> list[np.ndarray]:
    """Outputs in f32 arithmetic's range: float64 values, with exp overflowing where f32 does."""

    class Narrow(FloatAlgebra):
        def function(self, fn, attrs, args):
            v = super().function(fn, attrs, args)
            return v.map(lambda p: p.astype(np.float32).astype(np.float64)) if fn == "exp" else v

        def opaque(self, op, args):
            vs = super().opaque(op, args)
            return (
                tuple(v.map(lambda p: p.astype(np.float32).astype(np.float64)) for v in vs)
                if isinstance(op, MaskedExp)
                else vs
            )

    algebra = Narrow(algebra_sizes(graph), {"s": 4, "t": 2})
    rng = np.random.default_rng(1)
    values = {}
    for i in graph.inputs:
        axes = tuple(a.name for a in i.tensor.axes)
        shape = [algebra.sizes[a] for a in axes]
        values[i.name] = algebra.value(axes, size * np.where(rng.random(shape) < 0.5, -1.0, 1.0))
    with np.errstate(all="ignore"):
        return [v.parts[0] for v in outputs(graph, values, algebra)]


def factors() -> KernelGraph:
    """Products, quotients, sums of different exponents, and a plain term beside an exponential, all summed."""
    b, k = axis("b", B), axis("k", 7)
    x, y = inp("X", b, k), inp("Z", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("z", y.tensor))
    s.fn("ex", "exp", "x")
    s.fn("ez", "exp", "z")
    s.fn("both", "mul", "ex", "ez")
    s.fn("ratio", "div", "ex", "ez")
    s.fn("inverse", "reciprocal", "ez")
    s.fn("twice", "square", "ex")
    s.fn("minus", "neg", "twice")
    s.fn("a", "add", "both", "ratio")
    s.fn("c", "sub", "a", "x")
    s.acc("t1", Reduce("sum", ("k",)), "c")
    s.acc("t2", Contract(("k",)), "inverse", "z")
    s.acc("t3", Reduce("sum", ("k",)), "minus")
    body = s.take()
    s.fn("q", "div", "t1", "t2")
    s.fn("y", "div", "q", "t3")
    block = BlockGraph((("b", 2),), None, (Pass((("k", 2),), loads, body),), (), s.take(), (Store("y", "Y"),))
    return kernel_graph("factors", (x, y), (block,), tensor("Y", (b,), DType.f32))


def nested_sums() -> KernelGraph:
    """An exponential summed within the tile, and that sum accumulated over the loop: its exponent has the loop axis."""
    b, k, j = axis("b", B), axis("k", 7), axis("j", 3)
    x = inp("X", b, k, j)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("e", "exp", "x")
    s.add("inner", Reduce("sum", ("j",)), "e")
    s.acc("total", Reduce("sum", ("k",)), "inner")
    s.acc("direct", Reduce("sum", ("k", "j")), "e")
    body = s.take()
    s.fn("y", "div", "total", "direct")
    block = BlockGraph((("b", 2),), None, (Pass((("k", 2),), loads, body),), (), s.take(), (Store("y", "Y"),))
    return kernel_graph("nested_sums", (x,), (block,), tensor("Y", (b,), DType.f32))


def unsummed() -> KernelGraph:
    b, k = axis("b", B), axis("k", 7)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("e", "exp", "x")
    s.add("one", Const(Fraction(1)))
    s.fn("d", "add", "e", "one")
    s.fn("y", "div", "x", "d")
    block = BlockGraph((("b", 2),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("unsummed", (x,), (block,), tensor("Y", (b, k), DType.f32))


def negative_argument() -> KernelGraph:
    """exp(-x²): at most 1 without a shift."""
    b, k = axis("b", B), axis("k", 7)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.fn("sq", "square", "x")
    s.fn("n", "neg", "sq")
    s.fn("e", "exp", "n")
    s.add("y", Reduce("sum", ("k",)), "e")
    block = BlockGraph((("b", 2),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("negative_argument", (x,), (block,), tensor("Y", (b,), DType.f32))


SCALED = {
    "attention": attention_fused(DType.f16, 10, 3, online=False),
    "attention_split": attention_fused(DType.f16, 10, 3, online=False, parts=2),
    "attention_more_parts_than_tiles": attention_fused(DType.f16, 4, 3, online=False, parts=5),
    "softmax_two_pass": softmax_two_pass(k_size=7, tile=2),
    "softmax_in_tile": softmax_in_tile(k_size=7),
    "softmax_symbolic": softmax_in_tile(k_size=Dim("S", 1, 512)),
    "factors": factors(),
    "nested_sums": nested_sums(),
}
ALREADY = {
    "online": attention_fused(DType.f16, 10, 3, online=True),
    "online_split": attention_fused(DType.f16, 10, 3, online=True, parts=2),
    "two_pass_shifted": softmax_two_pass(k_size=7, tile=2, shifted=True),
    "rmsnorm": rmsnorm_linear_fused(DType.f16, 7, 5),
    "lora": lora_fused(DType.f16, 7, 5, 2),
    "layernorm": layernorm_linear(DType.f16, 7, 5),
    "unsummed": unsummed(),
    "negative_argument": negative_argument(),
}


@pytest.mark.parametrize("name", SCALED)
def test_scaled_numbers_keep_the_value(name):
    stable = stabilise(SCALED[name])
    assert stable != SCALED[name]
    check_same(SCALED[name], stable)


def test_masked_exponentials_keep_the_value():
    # the float64 oracle alone: in the fields a comparison of positions is a hash of them
    graph = causal_attention(DType.f16, 10, 3)
    stable = stabilise(graph)
    assert any(isinstance(e.op, Select) for e in equations_of(tuple(one_block(stable).steps())))
    for x, y in zip(logits(graph, 1.0), logits(stable, 1.0), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5)


@pytest.mark.parametrize("name", ALREADY)
def test_what_needs_no_shift_stays_as_it_is(name):
    assert stabilise(ALREADY[name]) == ALREADY[name]


@pytest.mark.parametrize("name", SCALED)
def test_stabilise_is_idempotent(name):
    stable = stabilise(SCALED[name])
    assert stabilise(stable) == stable


def test_a_masked_exponential_is_shifted_once():
    stable = stabilise(causal_attention(DType.f16, 10, 3))
    assert stabilise(stable) == stable


@pytest.mark.parametrize("graph", [SCALED["attention"], SCALED["attention_split"], causal_attention(DType.f16, 10, 3)])
def test_large_logits_stay_finite(graph):
    assert not np.isfinite(logits(graph, 30.0)[0]).all()
    assert np.isfinite(logits(stabilise(graph), 30.0)[0]).all()


def test_one_running_maximum_serves_all_sums_over_an_exponential():
    block = one_block(stabilise(SCALED["attention"]))
    kinds = [(a.target.name, a.monoid, a.scale) for a in block.passes[0].accumulators]
    assert kinds == [("z_max", "max", None), ("l", "rescaled", "z_max"), ("acc", "rescaled", "z_max")]


def test_a_split_stores_the_exponent_once():
    block = one_block(stabilise(SCALED["attention_split"]))
    assert [(s.value, s.kind) for s in block.stores] == [("z_max", "partial"), ("l", "partial"), ("acc", "partial")]
    assert block.combine is not None
    assert [ld.source for ld in block.combine.loads] == ["z_max_parts", "l_parts", "acc_parts"]


def test_the_second_pass_of_a_softmax_uses_the_first_passs_maximum():
    block = one_block(stabilise(SCALED["softmax_two_pass"]))
    exponents = [e for e in equations_of(block.passes[1].body) if isinstance(e.op, Elementwise) and e.op.fn == "sub"]
    assert [e.args[1] for e in exponents] == [block.passes[0].accumulators[0].target.name]


def broken(graph: KernelGraph, change) -> KernelGraph:
    (equation,) = graph.kernels()
    block = one_block(graph)
    passes = tuple(replace(p, body=tuple(map(change, p.body))) for p in block.passes)
    return replace(graph, equations=(replace(equation, op=Kernel((replace(block, passes=passes),))),))


def test_a_sum_that_is_not_rescaled_is_refused():
    def change(step):
        return replace(step, monoid="sum", scale=None) if isinstance(step, Accumulator) and step.scale else step

    graph = SCALED["attention"]
    with pytest.raises(AssertionError):
        check_same(graph, broken(stabilise(graph), change))


def test_a_factor_under_another_exponent_is_refused():
    def change(step):
        if isinstance(step, Equation) and step.target.name == "z_less":
            return replace(step, args=("z", "qk"))
        return step

    graph = SCALED["attention"]
    with pytest.raises(AssertionError):
        check_same(graph, broken(stabilise(graph), change))


def test_names_of_later_passes_become_unique():
    block = one_block(softmax_two_pass(k_size=7, tile=2))
    names = [e.target.name for e in equations_of(tuple(unique_names(block).steps()))]
    assert len(set(names)) == len(names)
    again = [e.target.name for e in equations_of(tuple(block.steps()))]
    assert len(set(again)) < len(again)
