"""Passes on block graphs keep what these compute, and plans decide as described."""

from dataclasses import replace

import numpy as np
import pytest

from mugraph.codegen.lower import lower, plan_graph, power_of_two
from mugraph.codegen.passes import PASSES, prepare
from mugraph.codegen.plan import Accumulate, Compute, Launch, Options, Plan
from mugraph.errors import UnsupportedOpError
from mugraph.ir.axes import Dim
from mugraph.ir.evaluate import FloatAlgebra, axis_sizes, outputs
from mugraph.ir.graph import Accumulator, BlockGraph, KernelGraph, Pass, Store, Thread, ThreadGraph, equations_of
from mugraph.ir.ops import Contract, Elementwise, Kernel, Reduce, Unpack
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType, tensor
from mugraph.verify.equivalence import verify
from tests.blocks import BLOCKS, B, contractions, kernel_graph, tiny_tiles
from tests.graphs import ALL, Builder, attention_fused, axis, inp, lora_fused, rmsnorm_linear, rmsnorm_linear_fused


def values(graph: KernelGraph) -> list[np.ndarray]:
    sizes = axis_sizes(graph, {"B": 3, "S": 5})
    algebra = FloatAlgebra(sizes)
    rng = np.random.default_rng(0)
    inputs = {}
    for i in graph.inputs:
        axes = tuple(a.name for a in i.tensor.axes)
        inputs[i.name] = algebra.value(axes, rng.standard_normal([sizes[a] for a in axes]))
    return [v.parts[0] for v in outputs(graph, inputs, algebra)]


def with_blocks(graph: KernelGraph, change) -> KernelGraph:
    def each(e):
        if not isinstance(e.op, Kernel):
            return e
        blocks = (replace(b, combine=change(b.combine)) if b.combine else b for b in map(change, e.op.blocks))
        return replace(e, op=Kernel(tuple(blocks)))

    return replace(graph, equations=tuple(map(each, graph.equations)))


def block_of(graph: KernelGraph) -> BlockGraph:
    (equation,) = graph.kernels()
    assert isinstance(equation.op, Kernel)
    return equation.op.blocks[0]


def with_thread(graph: KernelGraph) -> KernelGraph:
    """The epilogue as one thread graph."""

    def change(block: BlockGraph) -> BlockGraph:
        made = tuple(e.target.name for e in equations_of(block.epilogue))
        inputs = tuple({a for e in equations_of(block.epilogue) for a in e.args} - set(made))
        thread = Thread(ThreadGraph(inputs, (), tuple(equations_of(block.epilogue)), made))
        return replace(block, epilogue=(thread,))

    return with_blocks(graph, change)


GRAPHS = {
    **{n: BLOCKS[n]() for n in ("contractions", "layernorm_linear", "prologue", "broadcasts", "split_matmul")},
    "threads": with_thread(rmsnorm_linear_fused(DType.f16, 7, 5)),
    "attention": attention_fused(DType.f16, 10, 3, parts=2),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_passes_keep_the_values(name):
    graph = GRAPHS[name]
    for x, y in zip(values(graph), values(with_blocks(graph, prepare)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-9)


def test_the_observer_sees_every_pass():
    seen = []
    prepare(block_of(contractions()), lambda name, block: seen.append(name))
    assert seen == [name for name, _ in PASSES]


def test_contractions_are_left_with_two_operands_that_share_the_summed_axes():
    block = prepare(block_of(contractions()))
    tensors = block.tensors()
    for e in equations_of(tuple(block.steps())):
        if isinstance(e.op, Contract):
            assert len(e.args) == 2
            assert all(set(e.op.axes) <= {a.name for a in tensors[x].axes} for x in e.args)


def test_a_mean_that_is_accumulated_is_refused():
    b, k = axis("b", B), axis("k", 7)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.acc("y", Reduce("mean", ("k",)), "x")
    block = BlockGraph((("b", 2),), None, (Pass((("k", 2),), loads, s.take()),), (), (), (Store("y", "Y"),))
    with pytest.raises(UnsupportedOpError, match="mean"):
        prepare(block)


# -- plans ---------------------------------------------------------------------------------------------------------


def launch_of(plan: Plan) -> Launch:
    return plan.launches()[0]


def computes(launch: Launch) -> dict[str, Compute | Accumulate]:
    return {
        (a.compute if isinstance(a, Accumulate) else a).equation.target.name: a
        for s in launch.scopes
        for a in s.actions()
        if isinstance(a, Compute | Accumulate)
    }


@pytest.mark.parametrize("name", ALL)
def test_plans_of_the_four_programs(name, golden):
    golden(str(plan_graph(ALL[name][1]())) + "\n", "txt")


def test_only_what_was_verified_is_lowered():
    program, graph = rmsnorm_linear(), rmsnorm_linear_fused()
    assert lower(verify(program, graph)) == plan_graph(graph)


def test_query_heads_and_tokens_share_a_tile_dimension():
    launch = launch_of(plan_graph(attention_fused()))
    assert ("g", "b") in launch.lanes


def test_rows_and_columns_of_a_matmul_do_not():
    launch = launch_of(plan_graph(rmsnorm_linear_fused()))
    assert launch.lanes == (("b",), ("k",), ("n",))


def test_the_narrow_dot_comes_first():
    body = [a for a in launch_of(plan_graph(lora_fused())).scopes[0].body if isinstance(a, Accumulate)]
    assert [a.compute.equation.target.name for a in body] == ["xa_acc", "xw_acc"]


def test_a_row_statistic_is_reduced_after_the_loop():
    plan = computes(launch_of(plan_graph(rmsnorm_linear_fused())))
    assert plan["ss"].deferred
    assert not plan["acc"].deferred
    eager = computes(launch_of(plan_graph(rmsnorm_linear_fused(), options=Options(keep_statistics=False))))
    assert not eager["ss"].deferred


def test_sides_of_a_dot_are_padded_to_16():
    scope = launch_of(plan_graph(tiny_tiles())).scopes[0]
    assert {e.axis.name: (e.tile, e.lanes) for e in scope.extents} == {"b": (2, 16), "k": (8, 16), "n": (4, 16)}


def test_without_dots_nothing_is_padded():
    scope = launch_of(plan_graph(tiny_tiles(), options=Options(dot="never"))).scopes[0]
    assert {e.axis.name: (e.tile, e.lanes) for e in scope.extents} == {"b": (2, 2), "k": (8, 8), "n": (4, 4)}


def test_padding_reaches_no_sum():
    """exp(0) = 1 beyond the tensor: the exponential is guarded, the loaded operand is 0 already."""
    acc = computes(launch_of(plan_graph(tiny_tiles())))["acc"]
    assert acc.compute.guards == (("k",), ())


def test_the_program_multiplies_in_its_own_type():
    for dtype, expected in ((DType.f16, DType.f16), (DType.bf16, DType.bf16), (DType.f32, DType.f32)):
        plan = computes(launch_of(plan_graph(attention_fused(dtype))))
        assert plan["acc"].compute.operand is expected


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32)])
def test_power_of_two(n, expected):
    assert power_of_two(n) == expected


def single(op, name: str, *axes_out) -> KernelGraph:
    b, k = axis("b", B), axis("k", 8)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.add("y", op, "x")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph(name, (x,), (block,), tensor("Y", (b, k), DType.f16))


def test_an_operator_without_a_form_is_named():
    halved = Unpack("k", axis("codes", 16), DType.u8)
    with pytest.raises(UnsupportedOpError, match="unpack") as error:
        plan_graph(single(halved, "codes"))
    assert error.value.op == "unpack"
    assert plan_graph(single(Elementwise("relu"), "relu")).launches()


def test_a_nest_of_loops_is_one_scope():
    b, k, j = axis("b", B), axis("k", 8), axis("j", 8)
    x = inp("X", b, k, j)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.acc("y", Reduce("sum", ("k", "j")), "x")
    block = BlockGraph((("b", 4),), None, (Pass((("k", 4), ("j", 4)), loads, s.take()),), (), (), (Store("y", "Y"),))
    plan = plan_graph(kernel_graph("nest", (x,), (block,), tensor("Y", (b,), DType.f16)))
    (launch,) = plan.launches()
    assert (launch.scopes[0].outer, launch.scopes[0].loop) == ("k", "j")
    assert "for k, j:" in str(plan)


def test_a_tile_beyond_tritons_limit_is_refused():
    b, k = axis("b", Dim("B", 1, 8)), axis("k", 2**21)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.add("y", Reduce("sum", ("k",)), "x")
    block = BlockGraph((("b", 1),), None, (), loads, s.take(), (Store("y", "Y"),))
    with pytest.raises(UnsupportedOpError, match="a tile of 2097152 elements"):
        plan_graph(kernel_graph("wide", (x,), (block,), tensor("Y", (b,), DType.f16)))


def test_an_output_that_overwrites_an_input_is_refused():
    graph = rmsnorm_linear_fused()
    outputs = (replace(graph.outputs[0], alias_of="X"),)
    with pytest.raises(UnsupportedOpError, match="overwrites X"):
        plan_graph(replace(graph, outputs=outputs))


def test_accumulators_stay_accumulators():
    block = prepare(block_of(contractions()))
    names = [s.target.name for p in block.passes for s in p.body if isinstance(s, Accumulator)]
    assert names == ["two", "three", "one", "alone"]


def test_two_products_that_want_opposite_orders_of_dimensions_are_lowered():
    """c before d before a in one, so in the other a before e before c may only be c before e before a."""
    graph = parse_program("""mugraph two
  axes a = 32, c = 48, d = 16, e = 64
  input x: f16[c, d]
  input y: f16[d, a]
  input p: f16[a, e]
  input q: f16[e, c]
  u: f16[c, a], v: f16[a, c] = kernel(x, y, p, q)
    block
      epilogue
        load x_tile: f16[c, d] = x imap{}
        load y_tile: f16[d, a] = y imap{}
        load p_tile: f16[a, e] = p imap{}
        load q_tile: f16[e, c] = q imap{}
        u_tile: f32[c, a] = contract[d](x_tile, y_tile)
        v_tile: f32[a, c] = contract[e](p_tile, q_tile)
      store u_tile -> u omap{}
      store v_tile -> v omap{}
  output u
  output v
""")
    assert isinstance(graph, KernelGraph)
    (launch,) = plan_graph(graph).launches()
    assert [lane for lane in launch.lanes if lane[0] in "cea"] == [("c",), ("e",), ("a",)]
