"""Thread graphs are formed and flattened again, and change no value."""

from dataclasses import replace

import numpy as np
import pytest

from mugraph.errors import GraphError
from mugraph.ir.check import check
from mugraph.ir.evaluate import FieldAlgebra, axis_sizes, outputs
from mugraph.ir.graph import BlockGraph, KernelGraph, Thread
from mugraph.ir.ops import Kernel
from mugraph.ir.parser import parse_program
from mugraph.ir.serialize import dumps, loads
from mugraph.ir.threads import flatten_threads, form_threads
from tests.graphs import attention_fused, gated_mlp_fused, lora_fused, rmsnorm_linear_fused

GRAPHS = {
    "rmsnorm_linear": rmsnorm_linear_fused(k_size=7, n_size=5),
    "gated_mlp": gated_mlp_fused(k_size=7, n_size=5),
    "lora": lora_fused(k_size=7, n_size=5, r_size=2),
    "attention": attention_fused(s_size=7, d_size=3),
    "split attention": attention_fused(s_size=7, d_size=3, parts=2),
}
TILES = {"b": 2, "k": 3, "n": 2, "s": 2, "g": 3}


def mapped(graph: KernelGraph, change) -> KernelGraph:
    (equation,) = graph.equations
    blocks = tuple(change(b) for b in equation.op.blocks)
    return replace(graph, equations=(replace(equation, op=Kernel(blocks)),))


def threads(block: BlockGraph) -> list[Thread]:
    own = [s for s in block.steps() if isinstance(s, Thread)]
    return own + (threads(block.combine) if block.combine else [])


def field_outputs(graph: KernelGraph):
    algebra = FieldAlgebra(axis_sizes(graph, {"B": 5}), TILES)
    inputs = {i.name: algebra.random(tuple(a.name for a in i.tensor.axes), i.name) for i in graph.inputs}
    return outputs(graph, inputs, algebra)


@pytest.mark.parametrize("name", GRAPHS)
def test_thread_graphs_change_no_value(name):
    graph = GRAPHS[name]
    formed = mapped(graph, form_threads)
    check(formed)
    assert formed != graph
    for before, after in zip(field_outputs(graph), field_outputs(formed), strict=True):
        assert before.axes == after.axes
        assert np.array_equal(before.parts[0], after.parts[0])


@pytest.mark.parametrize("name", GRAPHS)
def test_flattening_is_the_inverse(name):
    graph = GRAPHS[name]
    formed = mapped(graph, form_threads)
    assert mapped(formed, flatten_threads) == graph
    assert mapped(formed, form_threads) == formed
    assert parse_program(str(formed)) == formed
    assert loads(dumps(formed)) == formed


def test_a_run_ends_where_threads_exchange_values():
    (equation,) = attention_fused(parts=2).equations
    (block,) = equation.op.blocks
    found = threads(form_threads(block))
    assert [[e.target.name for e in t.graph.equations] for t in found] == [["c", "z"], ["zm", "p"], ["dm", "f"], ["o"]]
    assert found[1].graph.inputs == ("z", "m")
    assert found[1].graph.outputs == ("p",)


def test_axes_are_laid_over_the_grid_lanes_warps_and_registers():
    (equation,) = attention_fused().equations
    found = threads(form_threads(equation.op.blocks[0]))
    assert dict(found[0].graph.parts) == {"h": "grid", "g": "register", "b": "warp", "s": "lane"}


def test_a_value_that_leaves_the_thread_graph_must_be_its_output():
    formed = mapped(GRAPHS["rmsnorm_linear"], form_threads)
    text = str(formed).replace("-> (xg)", "-> ()")
    assert text != str(formed)
    with pytest.raises(GraphError, match="xg stays inside its thread graph"):
        check(parse_program(text))
