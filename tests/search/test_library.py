"""Library calls: what is recognised and what is not, that the meaning is what the program says, and what is emitted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import mugraph.dsl.functions as mg
from mugraph.codegen.lower import lower
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import bool_, f16, f32, trace
from mugraph.errors import VerificationError
from mugraph.ir.axes import Dim
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Const, Library
from mugraph.ir.parser import parse_program
from mugraph.runtime.load import load_module
from mugraph.search.cost import device
from mugraph.search.driver import search
from mugraph.search.library import (
    ADDED,
    ATTENTION,
    attentions,
    is_causal,
    library_calls,
    operands,
    seconds_of_each,
)  # fmt: skip
from mugraph.search.space import SearchSpace
from mugraph.transpiler import attention as emitted_attention
from mugraph.transpiler.attention import attention_of
from mugraph.transpiler.torch import emit
from mugraph.transpiler.triton import emit as emit_triton
from mugraph.verify.equivalence import verify
from tests.search import programs
from tests.search.test_extract import problem_of

B = Dim("B", 1, 64)
HEADS = [f32[2, B, 8], f32[2, 24, 8], f32[2, 24, 8]]
TWO = [f32[2, 3, B, 8], f32[2, 24, 8], f32[2, 24, 8]]


def grouped(q: Tensor, k: Tensor, v: Tensor, **options: Tensor | bool) -> Tensor:
    return mg.attention(q, k.unsqueeze(1), v.unsqueeze(1), **options)  # type: ignore[arg-type]


PROGRAMS: dict[str, Callable[[], Program]] = {
    "plain": lambda: trace(lambda q, k, v: mg.attention(q, k, v), HEADS, "plain"),
    "scaled": lambda: trace(lambda q, k, v: mg.attention(q, k, v, scale=0.5), HEADS, "scaled"),
    "unscaled": lambda: trace(lambda q, k, v: mg.attention(q, k, v, scale=1), HEADS, "unscaled"),
    "causal": lambda: trace(lambda q, k, v: mg.attention(q, k, v, causal=True), HEADS, "causal"),
    "from_the_row_on": lambda: trace(
        lambda q, k, v: mg.attention(q, k, v, mask=mg.causal_mask(q.shape[-2], k.shape[-2], 3)),
        HEADS,
        "from_the_row_on",
    ),
    "mask": lambda: trace(lambda q, k, v, m: mg.attention(q, k, v, mask=m), [*HEADS, bool_[B, 24]], "mask"),
    "mask_of_heads": lambda: trace(
        lambda q, k, v, m: mg.attention(q, k, v, mask=m), [*HEADS, bool_[2, B, 24]], "mask_of_heads"
    ),
    "mask_of_keys": lambda: trace(
        lambda q, k, v, m: mg.attention(q, k, v, mask=m), [*HEADS, bool_[24]], "mask_of_keys"
    ),
    "bias": lambda: trace(lambda q, k, v, m: mg.attention(q, k, v, mask=m), [*HEADS, f32[B, 24]], "bias"),
    "grouped": lambda: trace(lambda q, k, v: grouped(q, k, v), TWO, "grouped"),
    "grouped_causal": lambda: trace(lambda q, k, v: grouped(q, k, v, causal=True), TWO, "grouped_causal"),
    "grouped_mask": lambda: trace(
        lambda q, k, v, m: grouped(q, k, v, mask=m), [*TWO, bool_[B, 24]], "grouped_mask"
    ),
    "one_head": lambda: trace(lambda q, k, v: mg.attention(q, k, v), [f32[B, 8], f32[24, 8], f32[24, 5]], "one_head"),
    "own_softmax": lambda: trace(_own_softmax, HEADS, "own_softmax"),
    "shared_values": lambda: trace(lambda q, k: mg.attention(q, k, k), HEADS[:2], "shared_values"),
}  # fmt: skip


def _own_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ mg.mT(k) / math.sqrt(8)
    e = mg.exp(s - mg.amax(s, axis=-1, keepdims=True))
    return (e @ v) / mg.sum(e, axis=-1, keepdims=True)


# A device on which nothing but library calls is worth its while.
ONLY_LIBRARY = replace(device(), vector_efficiency=1e-9)


def by_library(program: Program) -> KernelGraph:
    graph = search(program, accept=lambda graph: verify(program, graph), on=ONLY_LIBRARY).graph
    assert isinstance(graph, KernelGraph)
    return graph


def call_of(graph: KernelGraph) -> Library:
    (call,) = (e.op for e in graph.equations if isinstance(e.op, Library))
    return call


def inputs_of(program: Program, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in program.inputs:
        shape = [s if isinstance(s, int) else size for s in i.tensor.shape]
        x = torch.randn(shape, generator=generator)
        found.append(x > -0.5 if i.tensor.dtype.value == "bool" else x)
    return found


def run(text: str, program: Program, values: list[torch.Tensor]) -> torch.Tensor:
    result = load_module(text, program.name).run(*values)
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("name", PROGRAMS)
def test_attention_is_one_call_that_the_verifier_takes_and_pytorch_computes(name: str) -> None:
    program = PROGRAMS[name]()
    graph = by_library(program)
    call = call_of(graph)
    assert call.name == ATTENTION == emitted_attention.ATTENTION
    assert not graph.kernels()
    text = emit(graph)
    assert text.count("torch.nn.functional.scaled_dot_product_attention(") == 1
    assert "exp()" not in text
    assert ("is_causal=True" in text) == (name in ("causal", "grouped_causal"))
    for size in (1, 7, 24):
        values = inputs_of(program, size)
        for mask in (x for x in values if x.dtype is torch.bool):
            mask[..., 0] = True  # each row has a key
        expected = run(emit(program), program, [x.double() if x.is_floating_point() else x for x in values])
        torch.testing.assert_close(run(text, program, values), expected.float(), rtol=1e-4, atol=1e-5)


def test_the_triton_target_calls_it_too() -> None:
    program = PROGRAMS["causal"]()
    text = emit_triton(lower(verify(program, by_library(program))))
    assert "scaled_dot_product_attention(" in text
    assert "is_causal=True" in text
    values = inputs_of(program, 7)
    torch.testing.assert_close(run(text, program, values), run(emit(program), program, values))


OTHERS: dict[str, Callable[[], Program]] = {
    "a softmax over another axis": lambda: trace(
        lambda q, k, v: mg.softmax(q @ mg.mT(k), axis=-2) @ v, HEADS, "other_axis"
    ),
    "weights without their sum": lambda: trace(lambda q, k, v: mg.exp(q @ mg.mT(k)) @ v, HEADS, "no_sum"),
    "the sum of other weights": lambda: trace(
        lambda q, k, v: (mg.exp(q @ mg.mT(k)) @ v) / mg.sum(mg.exp(q @ mg.mT(k) * 2), axis=-1, keepdims=True),
        HEADS,
        "other_sum",
    ),
    "squared weights": lambda: trace(
        lambda q, k, v: mg.softmax(q @ mg.mT(k), axis=-1) * mg.softmax(q @ mg.mT(k), axis=-1) @ v, HEADS, "squared"
    ),
    "a matmul": programs.gated_mlp,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_attention_is_not_recognised(name: str) -> None:
    problem, targets = problem_of(OTHERS[name](), SearchSpace())
    assert attentions(problem, targets[0]) == []


def test_causal_means_keys_up_to_the_row() -> None:
    for name, expected in (("causal", True), ("from_the_row_on", False), ("mask", False), ("plain", False)):
        problem, targets = problem_of(PROGRAMS[name](), SearchSpace())
        (found,) = attentions(problem, targets[0])
        assert is_causal(problem, found) is expected


def test_a_mask_of_indices_is_not_read_from_memory() -> None:
    problem, targets = problem_of(PROGRAMS["causal"](), SearchSpace())
    (found,) = attentions(problem, targets[0])
    assert found.mask is not None
    assert found.mask not in operands(problem, found)
    assert set(operands(problem, found)) == problem.inputs


def test_normalised_queries_and_keys_are_needed_in_memory() -> None:
    problem, targets = problem_of(programs.qk_norm_attention(), SearchSpace())
    (found,) = attentions(problem, targets[0])
    assert {found.query, found.keys} <= problem.bound.keys()


def test_a_call_with_another_scale_is_refused() -> None:
    program = PROGRAMS["scaled"]()
    graph = by_library(program)
    (equation,) = graph.equations
    assert isinstance(equation.op, Library)
    inner = equation.op.semantics
    changed = tuple(replace(e, op=Const(e.op.value * 2)) if isinstance(e.op, Const) else e for e in inner.equations)
    assert changed != inner.equations
    wrong = replace(equation, op=Library(ATTENTION, replace(inner, equations=changed)))
    with pytest.raises(VerificationError):
        verify(program, replace(graph, equations=(wrong,)))


def test_a_meaning_that_does_more_is_written_out() -> None:
    """What goes by the name but is not attention is emitted as its equations."""
    program = PROGRAMS["plain"]()
    graph = by_library(program)
    (equation,) = graph.equations
    assert isinstance(equation.op, Library)
    inner = equation.op.semantics
    parts = attention_of(inner)
    assert parts is not None
    total = next(e for e in inner.equations if e.target.name == inner.equations[-2].args[1])
    again = Equation(inner.equations[-2].targets, inner.equations[-2].op, (total.args[0], total.args[0]))
    odd = replace(inner, equations=(*inner.equations[:-2], again, inner.equations[-1]))
    assert attention_of(odd) is None
    text = emit(replace(graph, equations=(replace(equation, op=Library(ATTENTION, odd)),)))
    assert "scaled_dot_product_attention(" not in text


def test_a_bias_of_another_type_is_added_in_its_own() -> None:
    half = [f16[2, B, 8], f16[2, 24, 8], f16[2, 24, 8], f32[B, 24]]

    def fn(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return mg.softmax((q @ mg.mT(k)).float() + m, axis=-1).half() @ v

    program = trace(fn, half, "wide_bias")
    graph = by_library(program)
    assert call_of(graph).name == ATTENTION
    assert "scaled_dot_product_attention(" not in emit(graph)


def test_contractions_are_calls_where_their_operands_lie_in_memory() -> None:
    problem, targets = problem_of(programs.linear_bias_residual(), SearchSpace())
    products = [
        c for c in problem.closure.order if any(problem.is_matmul(c, e) for e in problem.closure.classes[c].edges)
    ]
    assert targets[0] not in products
    calls = [call for c in products for call, _ in library_calls(problem, c)]
    assert calls
    assert all(x in problem.memory or x in problem.bound for call in calls for x in operands(problem, call))
    problem.memory.clear()
    problem.bound.clear()
    assert not any(library_calls(problem, c) for c in products)


SUMS: dict[str, tuple[Callable[[], Program], str]] = {
    "residual": (
        lambda: trace(lambda x, w, r: r + x @ w, [f16[B, 96], f16[96, 80], f16[B, 80]], "residual"),
        "torch.addmm(R, X, W)",
    ),
    "bias": (
        lambda: trace(lambda x, w, r: x @ w + r, [f32[B, 96], f32[96, 80], f32[80]], "bias"),
        "torch.addmm(R, X, W)",
    ),
    "batched": (
        lambda: trace(lambda x, w, r: x @ w + r, [f32[3, B, 96], f32[3, 96, 80], f32[80]], "batched"),
        "torch.baddbmm(R.reshape(1, 1, 80), X, W)",
    ),
    "transposed": (
        lambda: trace(lambda x, w, r: (x @ w).T + r, [f32[B, 96], f32[96, 80], f32[80, B]], "transposed"),
        "torch.addmm(R, W_2, X_2)",
    ),
    "two_rows": (
        lambda: trace(lambda x, w, r: x @ w + r, [f32[3, B, 96], f32[96, 80], f32[3, B, 80]], "two_rows"),
        "torch.addmm(",
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_a_contraction_plus_a_value_is_one_call(name: str) -> None:
    make, call = SUMS[name]
    program = make()
    graph = by_library(program)
    assert [e.op.name for e in graph.equations if isinstance(e.op, Library)] == [ADDED]
    text = emit(graph)
    assert call.lower() in text.lower()
    assert " + " not in text
    for size in (1, 7, 24):
        values = inputs_of(program, size)
        expected = run(emit(program), program, [x.double() for x in values])
        atol = 5e-2 if values[0].dtype is torch.float16 else 1e-4
        torch.testing.assert_close(run(text, program, values).double(), expected.double(), rtol=1e-2, atol=atol)


def test_a_value_of_another_type_is_added_on_its_own() -> None:
    program = trace(lambda x, w, r: x @ w + r, [f16[B, 96], f16[96, 80], f32[B, 80]], "mixed")
    assert ADDED not in [e.op.name for e in by_library(program).equations if isinstance(e.op, Library)]


def test_a_sum_in_part_of_a_group_is_written_out() -> None:
    """PyTorch's call takes a value over all rows or over none."""
    program = trace(lambda x, w, r: x @ w + r, [f32[3, B, 96], f32[96, 80], f32[B, 80]], "part")
    text = emit(by_library(program))
    assert "addmm(" not in text.replace('library["addmm"](', "")
    assert " + " in text
    values = inputs_of(program, 7)
    torch.testing.assert_close(run(text, program, values), run(emit(program), program, values), rtol=1e-4, atol=1e-4)


def test_single_elements_cost_a_launch_where_an_input_makes_them() -> None:
    program = trace(lambda x, s: mg.exp(x * (2 * s)), [f32[1], f32[()]], "single")
    costs = seconds_of_each(program.equations, program, 64, program.inputs[0].tensor.dtype, device())
    for e, seconds in zip(program.equations, costs, strict=True):
        assert (seconds >= device().launch_seconds) == bool(e.args), str(e)
    found = search(program, accept=lambda g: g)
    assert [s.structure for s in found.report.structures] == ["kernel grid()"]
    assert found.report.predicted_seconds >= found.report.floor_seconds > 0


def test_single_elements_that_depend_on_no_input_are_free() -> None:
    text = """
program numbers
  axes b = 8
  input x: f32[b]
  two: f32[] = 2
  root: f32[] = sqrt(two)
  y: f32[b] = mul(x, root)
  output y
"""
    program = parse_program(text)
    costs = seconds_of_each(program.equations, program, 64, program.inputs[0].tensor.dtype, device())
    assert [seconds > 0 for seconds in costs] == [False, False, True]
