"""Gather and scatter by index tensors: in hand-written kernels, and where a search leaves them beside its kernels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mugraph as mg
from benchmarks.programs import moe_ffn, paged_attention
from mugraph.codegen.indirect import access_by_index
from mugraph.codegen.lower import plan_graph
from mugraph.errors import GraphError, VerificationError
from mugraph.ir.check import check
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Program, Store
from mugraph.ir.ops import Gather, Kernel, Library, Scatter
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType, Output, Storage, tensor
from mugraph.result import Result
from mugraph.transpiler.triton import emit
from mugraph.verify.bounds import in_bounds
from mugraph.verify.equivalence import verify
from mugraph.verify.prove import prove
from tests.blocks import gathered_rows, kernel_graph, paged_sum, prefix_sums, scattered_rows
from tests.graphs import Builder, axis, inp

ALL_TIERS = {"tested", "proved", "bounds", "numerics"}


def meaning(graph: KernelGraph) -> Program:
    """The kernels' steps as a program: what a block graph means without its schedule."""
    (kernel,) = graph.equations
    assert isinstance(kernel.op, Kernel)
    (block,) = kernel.op.blocks
    steps = [e for s in block.steps() for e in (getattr(s, "equation", s),)]
    names = {ld.value.name: ld.source for ld in block.all_loads()} | {s.value: s.target for s in block.stores}
    outputs = {t.name: t for t in kernel.targets}
    equations = []
    for e in steps:
        name = names.get(e.target.name, e.target.name)
        dtype = outputs[name].dtype if name in outputs else e.target.dtype
        target = replace(outputs.get(name, e.target), name=name, dtype=dtype)
        equations.append(replace(e, targets=(target,), args=tuple(names.get(a, a) for a in e.args)))
    return Program(graph.name, graph.inputs, tuple(equations), graph.outputs)


# -- block graphs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gathered_rows, paged_sum, scattered_rows, prefix_sums])
def test_a_kernel_by_index_is_verified_and_proved(make):
    graph = make(DType.f32)
    program = meaning(graph)
    verify(program, graph)
    assert prove(program, graph).proved


def test_a_scatter_in_a_loop_is_verified():
    graph = scattered_rows(DType.f32, looped=True)
    verify(meaning(graph), graph)


def changed(graph: KernelGraph, old: str, new: str) -> KernelGraph:
    text = str(graph)
    assert old in text
    found = parse_program(text.replace(old, new))
    assert isinstance(found, KernelGraph)
    return found


def two_indices() -> KernelGraph:
    """Rows of one table by one index, times rows of another by another."""
    t, b, k = axis("t", 20), axis("b", 9), axis("k", 8)
    x, i, j = inp("X", t, k, dtype=DType.f32), inp("I", b, dtype=DType.i32), inp("J", b, dtype=DType.i32)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("i", i.tensor), s.load("j", j.tensor))
    s.add("one", Gather("t"), "x", "i")
    s.add("other", Gather("t"), "x", "j")
    s.fn("y", "sub", "one", "other")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    return kernel_graph("two_indices", (x, i, j), (block,), tensor("Y", (b, k), DType.f32))


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (two_indices, "gather[t](x, j)", "gather[t](x, i)"),
        (lambda: scattered_rows(DType.f32), "scatter[b -> t](x2, at)", "scatter[b -> t](x, at)"),
        (lambda: scattered_rows(DType.f32), "add(x, x)", "mul(x, x)"),
    ],
)
def test_another_index_or_another_value_is_refused(make, old, new):
    graph = make()
    program = meaning(graph)
    verify(program, graph)
    wrong = changed(graph, old, new)
    with pytest.raises(VerificationError):
        verify(program, wrong)
    assert not prove(program, wrong).proved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("store atomic y -> Y", "store y -> Y", "store it atomically"),
        ("scatter[b -> t](x2, at)", "scatter[b -> t, write](x2, at)", "closes the grid axis b"),
    ],
)
def test_a_part_of_a_scatter_is_added_or_refused(old, new, message):
    with pytest.raises(GraphError, match=message):
        check(changed(scattered_rows(DType.f32), old, new))


def test_nothing_reads_a_part_of_a_scatter():
    b, n, t = axis("b", 8), axis("n", 24), axis("t", 20)
    x, at = inp("X", b, n, dtype=DType.f32), inp("At", b, dtype=DType.i32)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("at", at.tensor))
    s.add("y", Scatter(("b",), t), "x", "at")
    s.fn("z", "square", "y")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("z", "Y", "atomic"),))
    with pytest.raises(GraphError, match="what one block scatters"):
        check(kernel_graph("squared", (x, at), (block,), tensor("Y", (t, n), DType.f32)))


# -- indices -------------------------------------------------------------------------------------------------------


def test_negative_indices_count_from_the_end(interpreter):
    x, at = torch.randn(20, 40).half(), torch.tensor([-1, -20, 0, 19, -3]).int()
    (y,) = interpreter.run(emit(plan_graph(gathered_rows())), {"X": x, "At": at, "W": torch.eye(40, 24).half()})
    assert torch.equal(y, x[at.long()][:, :24])
    (z,) = interpreter.run(emit(plan_graph(scattered_rows(DType.f32))), {"X": torch.ones(5, 24), "At": at})
    wanted = torch.zeros(20)
    wanted[[19, 0, 17]] = torch.tensor([4.0, 4.0, 2.0])
    assert torch.equal(z, wanted[:, None].expand(20, 24))


def test_what_an_index_out_of_range_names_is_neither_read_nor_written(interpreter):
    x = torch.full((60, 40), torch.nan).half()[20:40].fill_(1.0)  # its neighbours in memory are no numbers
    at = torch.tensor([20, -21, 2**31 - 1, -(2**31), 3]).int()
    (y,) = interpreter.run(emit(plan_graph(gathered_rows())), {"X": x, "At": at, "W": torch.eye(40, 24).half()})
    assert torch.equal(y, torch.tensor([0, 0, 0, 0, 1]).half()[:, None].expand(5, 24))
    (z,) = interpreter.run(emit(plan_graph(scattered_rows(DType.f32))), {"X": torch.ones(5, 24), "At": at})
    assert z.sum() == 2 * 24
    assert z[3].sum() == 2 * 24


@pytest.mark.parametrize("make", [gathered_rows, paged_sum, scattered_rows])
def test_loads_and_stores_by_index_are_in_bounds_whatever_the_index(make):
    graph = make()
    found = in_bounds(emit(plan_graph(graph)), graph)
    assert not found.reason
    assert found.claims


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (gathered_rows, "in_b[:, None] & in_k[None, :] & in_at_t[:, None]", "in_b[:, None] & in_k[None, :]"),
        (gathered_rows, "(at_t >= 0) & (at_t < 20)", "(at_t < 20)"),
        (scattered_rows, "& in_at_t[:, None]", ""),
        (paged_sum, "(place_page < 16)", "(place_page < 17)"),
    ],
)
def test_an_access_by_an_unchecked_index_is_refused(make, old, new):
    graph = make()
    source = emit(plan_graph(graph))
    assert old in source
    with pytest.raises(VerificationError):
        in_bounds(source.replace(old, new), graph)


def test_torch_code_counts_negative_indices_from_the_end():
    @mg.program
    def both(x: mg.f32[20, 8], at: mg.i32[12], to: mg.i32[12]):
        return mg.scatter_add(x[at], to, 20)

    result = mg.optimize(both, target="torch")
    x = torch.randn(20, 8)
    at, to = (torch.randint(-20, 20, (12,)).int() for _ in range(2))
    wanted = torch.zeros(20, 8).index_add(0, to.long() % 20, x[at.long() % 20])
    assert torch.allclose(result(x, at, to), wanted, atol=1e-6)


# -- what a search leaves ------------------------------------------------------------------------------------------


def kernel_level(result: Result) -> list[str]:
    """The names of what runs beside the kernels."""
    found = []
    for e in result.graph.equations:
        if isinstance(e.op, Library):
            found.append(e.op.name)
        elif not isinstance(e.op, Kernel):
            found.append(type(e.op).__name__)
    return found


T = mg.Dim("T", 1, 4096)


@mg.program
def rows_linear(X: mg.f16[T, 64], At: mg.i32[40], W: mg.f16[64, 32]):
    return X[At] @ W


@mg.program
def columns_linear(X: mg.f16[T, 64], At: mg.i32[40], W: mg.f16[40, 32]):
    return X[:, At] @ W


def test_a_gather_of_rows_is_a_load_by_index():
    result = mg.optimize(rows_linear, target="cuda:90")
    assert kernel_level(result) == []
    assert set(result.certificate.tiers) >= ALL_TIERS
    assert not any("outside the calculus" in n for n in result.notes)


def test_a_gather_along_the_innermost_axis_stays_a_call():
    result = mg.optimize(columns_linear, target="cuda:90")
    assert "gather" in kernel_level(result) or not result.graph.kernels()
    assert {"tested", "numerics"} <= set(result.certificate.tiers)


def test_a_value_that_is_asked_for_stays():
    result = mg.optimize(rows_linear, target="cuda:90")

    @mg.program
    def both(X: mg.f16[T, 64], At: mg.i32[40], W: mg.f16[64, 32]):
        x = X[At]
        return x, x @ W

    given = mg.optimize(both, target="cuda:90")
    names = [t.name for e in given.graph.equations for t in e.targets]
    assert all(o.value in names for o in both.outputs)
    assert access_by_index(result.graph) == result.graph


def test_kept_values_stay_values_of_the_graph():
    t, b, k = axis("t", 20), axis("b", 9), axis("k", 8)
    x, i = inp("X", t, k, dtype=DType.f32), inp("I", b, dtype=DType.i32)
    s = Builder(block=True)
    g = tensor("g", (b, k), DType.f32)
    loads = (s.load("tile", g),)
    s.fn("y", "square", "tile")
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), (Store("y", "Y"),))
    gather = Equation((g,), Gather("t"), ("X", "I"))
    kernel = Equation((tensor("Y", (b, k), DType.f32),), Kernel((block,)), ("g",))
    graph = KernelGraph("squares", (x, i), (gather, kernel), (Output("Y", Storage(DType.f32)),))
    inside = access_by_index(graph)
    assert len(inside.equations) == 1
    assert access_by_index(graph, ("g",)) == graph
    rng = np.random.default_rng(0)
    arrays = {"X": rng.standard_normal((20, 8)), "I": rng.integers(-20, 20, 9)}
    np.testing.assert_allclose(*(reference(found, arrays, {})[0] for found in (graph, inside)))


@pytest.mark.parametrize(
    ("name", "program", "beside"),
    [
        ("moe_ffn", moe_ffn(experts=4, k=48, n=40, groups=3), []),
        ("paged_attention", paged_attention(pages=12, keys=64, heads=2, d=24), []),
    ],
)
def test_experts_and_pages_are_read_in_place_in_all_tiers(compiler, name, program, beside):
    result = mg.optimize(program, target="cuda:90")
    assert kernel_level(result) == beside
    assert set(result.certificate.tiers) >= ALL_TIERS
    assert "tl.where(" in result.source
    assert ("tl.atomic_add" in result.source) == (name == "moe_ffn")
    for arch in (80, 90, 100):
        for found in compiler.resources(result.source, arch):
            assert not found.excess
            assert found.spills == 0


def test_the_experts_agree_with_pytorch(interpreter):
    program = moe_ffn(experts=4, k=48, n=40, groups=3)
    result = mg.optimize(program, target="cuda:90")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 7, (3, 16), generator=generator)
    expert = torch.randint(0, 4, (3,), generator=generator)
    x, w1, w2, w3 = (
        torch.randn(shape, generator=generator).half() / 4 for shape in ((7, 48), (4, 48, 40), (4, 48, 40), (4, 40, 48))
    )
    weight = torch.rand(3, 16, generator=generator)
    inputs = {"X": x, "Rows": rows.int(), "Expert": expert.int(), "Weight": weight, "W1": w1, "W2": w2, "W3": w3}
    (y,) = interpreter.run(result.source, inputs)
    wanted = torch.zeros(7, 48, dtype=torch.float64)
    for g, e in enumerate(expert.tolist()):
        for m, row in enumerate(rows[g].tolist()):
            a, b = x[row].double() @ w1[e].double(), x[row].double() @ w2[e].double()
            wanted[row] += weight[g, m] * ((a * a.sigmoid() * b) @ w3[e].double())
    assert torch.allclose(y.double(), wanted, rtol=1e-2, atol=1e-2)
