"""Hand-written block graphs: the same structure as the shared μGraphs, the same results as their programs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import mugraph.dsl.functions as mg
from mugraph.dsl.block import BlockBuilder, block
from mugraph.errors import GraphError
from mugraph.ir.check import check
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Program
from mugraph.ir.ops import Kernel
from mugraph.pipeline import finished
from mugraph.verify.equivalence import verify
from tests import graphs


def structure(graph: KernelGraph) -> KernelGraph:
    """The graph with tile-level values numbered in order of appearance."""
    (equation,) = graph.kernels()
    assert isinstance(equation.op, Kernel)
    blocks = tuple(numbered(b) for b in equation.op.blocks)
    return replace(graph, name="", equations=(replace(equation, op=Kernel(blocks)),))


def numbered(b: BlockGraph, outer: dict[str, str] | None = None) -> BlockGraph:
    names: dict[str, str] = {}
    targets = outer or {}

    def name(old: str) -> str:
        return names.setdefault(old, f"v{len(names)}")

    def equation(e: Equation) -> Equation:
        args = tuple(name(a) for a in e.args)
        return Equation(tuple(replace(t, name=name(t.name)) for t in e.targets), e.op, args)

    def steps(body: Any) -> Any:
        return tuple(
            replace(s, equation=equation(s.equation), scale=s.scale and name(s.scale))
            if isinstance(s, Accumulator)
            else equation(s)
            for s in body
        )

    def loads(found: Any) -> Any:
        return tuple(
            replace(ld, value=replace(ld.value, name=name(ld.value.name)), source=targets.get(ld.source, ld.source))
            for ld in found
        )

    passes = tuple(replace(p, loads=loads(p.loads), body=steps(p.body)) for p in b.passes)
    late, epilogue = loads(b.loads), steps(b.epilogue)
    parts = {s.target: f"part of {name(s.value)}" for s in b.stores if s.kind == "partial"}
    stores = tuple(replace(s, value=name(s.value), target=parts.get(s.target, s.target)) for s in b.stores)
    combine = b.combine and numbered(b.combine, parts)
    return replace(b, passes=passes, loads=late, epilogue=epilogue, stores=stores, combine=combine)


def rmsnorm_linear(p: Program) -> BlockBuilder:
    with block(p, grid={"b": 16, "n": 64}) as blk:
        with blk.loop("k", tile=128) as loop:
            x, g, w = loop.load("X"), loop.load("G"), loop.load("W")
            acc = loop.accumulate((x * g) @ w)
            ss = loop.accumulate(mg.einsum("bk,bk->b", x, x))
        y = acc / mg.sqrt(ss / blk.size("k") + 1e-6).unsqueeze(-1)
        blk.store(y, "Y")
    return blk


def gated_mlp(p: Program) -> BlockBuilder:
    with block(p, grid={"b": 16, "n": 64}) as blk:
        with blk.loop("k", tile=64) as loop:
            x, w1, w2 = loop.load("X"), loop.load("W1"), loop.load("W2")
            h = loop.accumulate(x @ w1)
            u = loop.accumulate(x @ w2)
        blk.store(mg.silu(h) * u, "Y")
    return blk


def lora(p: Program) -> BlockBuilder:
    with block(p, grid={"b": 16, "n": 64}) as blk:
        with blk.loop("k", tile=128) as loop:
            x, w, a = loop.load("X"), loop.load("W"), loop.load("A")
            xa = loop.accumulate(x @ a)
            xw = loop.accumulate(x @ w)
        blk.store(xw + xa @ blk.load("Bm"), "Y")
    return blk


GRID = {"h": 1, "g": 8, "b": 2}


def keys_pass(blk: BlockBuilder, online: bool) -> tuple[Any, ...]:
    with blk.loop("s", tile=64) as loop:
        q, k, v = loop.load("Q"), loop.load("K"), loop.load("V")
        z = mg.einsum("hgbd,hsd->hgbs", q, k) * 0.125
        m = loop.accumulate(mg.max(z, axis=-1)) if online else None
        p = mg.exp(z - m.unsqueeze(-1)) if online else mg.exp(z)
        l = loop.accumulate(mg.sum(p, axis=-1), scale=m)
        acc = loop.accumulate(mg.einsum("hgbs,hse->hgbe", p, v), scale=m)
    return m, l, acc


def attention(p: Program, online: bool = True) -> BlockBuilder:
    with block(p, grid=GRID) as blk:
        _, l, acc = keys_pass(blk, online)
        blk.store(acc / l.unsqueeze(-1), "O")
    return blk


def split_attention(p: Program) -> BlockBuilder:
    with block(p, grid=GRID, split={"s": 3}) as blk:
        m, l, acc = keys_pass(blk, True)
        with blk.combine() as c:
            m, l, acc = c.load(m), c.load(l), c.load(acc)
            f = mg.exp(m - mg.max(m, axis=0))
            whole = mg.einsum("phgb,phgb->hgb", l, f)
            o = mg.einsum("phgbe,phgb->hgbe", acc, f)
            c.store(o / whole.unsqueeze(-1), "O")
    return blk


SMALL = {"k_size": 10, "n_size": 9}
HAND: dict[str, tuple[Callable[..., BlockBuilder], Callable[[], Program], Callable[[], KernelGraph]]] = {
    "rmsnorm_linear": (
        rmsnorm_linear,
        lambda: graphs.rmsnorm_linear(**SMALL),
        lambda: graphs.rmsnorm_linear_fused(**SMALL),
    ),
    "gated_mlp": (gated_mlp, lambda: graphs.gated_mlp(**SMALL), lambda: graphs.gated_mlp_fused(**SMALL)),
    "lora": (lora, lambda: graphs.lora(**SMALL, r_size=3), lambda: graphs.lora_fused(**SMALL, r_size=3)),
    "attention": (
        attention,
        lambda: graphs.attention(s_size=130, d_size=4),
        lambda: graphs.attention_fused(s_size=130, d_size=4),
    ),
    "plain attention": (
        lambda p: attention(p, online=False),
        lambda: graphs.attention(s_size=130, d_size=4),
        lambda: graphs.attention_fused(s_size=130, d_size=4, online=False),
    ),
    "split attention": (
        split_attention,
        lambda: graphs.attention(s_size=200, d_size=4),
        lambda: graphs.attention_fused(s_size=200, d_size=4, parts=3),
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_a_block_graph_written_by_hand_is_the_shared_one(name):
    build, program, expected = HAND[name]
    assert structure(build(program()).graph()) == structure(expected())


def test_structures_differ_where_graphs_do():
    p = graphs.gated_mlp(**SMALL)
    other = graphs.gated_mlp_fused(**SMALL)
    assert structure(rmsnorm_linear(graphs.rmsnorm_linear(**SMALL)).graph()) != structure(other)
    swapped = gated_mlp(p).graph()
    (equation,) = swapped.kernels()
    (b,) = equation.op.blocks
    broken = replace(b, passes=(replace(b.passes[0], body=b.passes[0].body[::-1]),))
    assert structure(replace(swapped, equations=(replace(equation, op=Kernel((broken,))),))) != structure(other)


def test_a_part_that_keeps_a_dimension_of_size_one_is_loaded_with_it():
    p = HAND["split attention"][1]()
    with block(p, grid=GRID, split={"s": 3}) as blk:
        m, l, acc = keys_pass(blk, True)
        with blk.combine() as c:
            m, l, acc = c.load(m.unsqueeze(-1)), c.load(l.unsqueeze(-1)), c.load(acc)
            f = mg.exp(m - mg.max(m, axis=0))
            c.store(mg.sum(acc * f, axis=0) / mg.sum(l * f, axis=0), "O")
    verify(p, finished(blk.graph()))


def test_values_are_called_as_the_variables_that_hold_them():
    (b,) = split_attention(HAND["split attention"][1]()).graph().kernels()[0].op.blocks
    assert [a.target.name for a in b.passes[0].accumulators] == ["m", "l", "acc"]
    assert [s.target for s in b.stores] == ["m_parts", "l_parts", "acc_parts"]
    assert b.combine is not None
    assert {"f", "whole", "o"} < set(b.combine.tensors())


def agrees(p: Program, graph: KernelGraph, rows: int = 19) -> None:
    check(graph)
    draw = np.random.default_rng(0)
    sizes = {"B": rows}
    arrays = {
        i.name: draw.standard_normal([s if isinstance(s, int) else sizes[str(s)] for s in i.tensor.shape])
        for i in p.inputs
    }
    for got, want in zip(reference(graph, arrays, sizes), reference(p, arrays, sizes), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", HAND)
def test_a_block_graph_written_by_hand_computes_its_program(name):
    build, program, _ = HAND[name]
    agrees(program(), build(program()).graph())


def layernorm() -> Program:
    b, k = graphs.axis("b", graphs.B), graphs.axis("k", 10)
    x = graphs.inp("X", b, k)
    s = graphs.Builder({"X": x.tensor})
    s.add("mu", graphs.Reduce("mean", ("k",)), "X")
    s.fn("c", "sub", "X", "mu")
    s.fn("c2", "square", "c")
    s.add("var", graphs.Reduce("mean", ("k",)), "c2")
    s.fn("r", "rsqrt", "var")
    s.fn("Y", "mul", "c", "r")
    return graphs.program("layernorm", (x,), s, "Y")


def test_several_passes_with_steps_between_them_and_stores_inside_a_loop():
    p = layernorm()
    with block(p, grid={"b": 4}) as blk:
        with blk.loop("k", tile=4) as first:
            total = first.accumulate(mg.sum(first.load("X"), axis=-1, keepdims=True))
        mu = total / blk.size("k")
        with blk.loop("k", tile=4) as second:
            c = second.load("X") - mu
            squares = second.accumulate(mg.sum(c * c, axis=-1, keepdims=True))
        r = mg.rsqrt(squares / blk.size("k"))
        with blk.loop("k", tile=4) as third:
            y = (third.load("X") - mu) * r
            third.store(y, "Y")
    graph = blk.graph()
    (b,) = graph.kernels()[0].op.blocks
    assert [p.loops for p in b.passes] == [(("k", 4),), (), (("k", 4),), (), (("k", 4),)]
    agrees(p, graph)


def test_a_tensor_may_be_loaded_under_other_axes():
    b, k = graphs.axis("b", graphs.B), graphs.axis("k", 10)
    x = graphs.inp("X", b, k)
    with block([x], grid={"b": 4}) as blk:
        with blk.loop("k", tile=4) as loop:
            rows, columns = loop.load("X"), loop.load("X", axes=("c", "k"))
            gram = loop.accumulate(rows @ columns.T)
        blk.store(gram, "Y")
    b_graph = blk.block_graph()
    assert [a.name for a in b_graph.tensors()["gram"].axes] == ["b", "c"]


BAD: dict[str, Callable[[BlockBuilder], Any]] = {
    "there is no axis q": lambda blk: blk.size("q"),
    "nothing to load under the name 'Q'": lambda blk: blk.load("Q"),
    "partial results are loaded in a combine": lambda blk: blk.load(blk.load("X")),
    "Z is no output": lambda blk: blk.store(blk.load("X"), "Z"),
    "Y has the axes": lambda blk: blk.store(blk.load("X"), "Y"),
    "computed in the same loop": lambda blk: blk.accumulate(blk.load("X").sum(-1)),
    "a combine needs a split": lambda blk: blk.combine().__enter__(),
    "b cannot be looped": lambda blk: blk.loop("b", tile=4).__enter__(),
    "cannot be looped in tiles of 0": lambda blk: blk.loop("k", tile=0).__enter__(),
    "one loop or a nest of two": lambda blk: [blk.loop("k", tile=4).__enter__(), blk.loop("n2", tile=4).__enter__()],
    "stores nothing": lambda blk: blk.graph(),
}


@pytest.mark.parametrize("message", BAD)
def test_a_mistake_in_a_block_graph_is_named(message):
    blk = block(graphs.rmsnorm_linear(**SMALL), grid={"b": 4})
    blk.sizes["n2"] = 9
    with pytest.raises(GraphError, match=message):
        BAD[message](blk)


def test_a_value_of_a_loop_dies_with_it():
    with block(graphs.rmsnorm_linear(**SMALL), grid={"b": 4, "n": 4}) as blk:
        with blk.loop("k", tile=4) as loop:
            x = loop.load("X")
            tile = (x * x).sum(-1, keepdim=True)
            acc = loop.accumulate(x @ loop.load("W"))
        blk.store(acc * tile, "Y")
    with pytest.raises(GraphError, match="tile is computed in a loop and dies with it"):
        blk.graph()


def accumulated(f: Callable[[Any, Any], Any]) -> None:
    with block(graphs.rmsnorm_linear(**SMALL), grid={"b": 4, "n": 4}) as blk, blk.loop("k", tile=4) as loop:
        f(loop, loop.load("X"))


@pytest.mark.parametrize(
    ("message", "f"),
    [
        ("only a contraction, sum, max or min", lambda p, x: p.accumulate(x * x)),
        ("only a contraction, sum, max or min", lambda p, x: p.accumulate(x.mean(-1))),
        ("reduces over k", lambda p, x: p.accumulate(x.sum(0))),
        ("needs a maximum accumulated before", lambda p, x: p.accumulate(x.sum(1), scale=p.accumulate(x.sum(1)))),
    ],
)
def test_what_cannot_be_accumulated_is_refused(message, f):
    with pytest.raises(GraphError, match=message):
        accumulated(f)
