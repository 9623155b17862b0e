"""The parts of an ATen graph that programs can take over, and the operators that autograd leaves."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from mugraph import pipeline
from mugraph.dsl.tensor import cast
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType
from mugraph.pytorch import parts
from mugraph.pytorch.ops import ATEN
from mugraph.pytorch.parts import Split, captured, split


def traced(f: Callable[..., Any], *args: torch.Tensor, symbolic: bool = False) -> Any:
    """A plain ATen graph with fake values, as AOTAutograd makes it."""
    return make_fx(torch.func.functionalize(f), tracing_mode="symbolic" if symbolic else "fake")(*args)


def halves(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = torch.relu(x @ w) * 2
    y = torch.i0(y)  # has no meaning in the language
    return torch.tanh(y @ w) + 1


def check(f: Callable[..., Any], *args: torch.Tensor, tolerance: float = 1e-4) -> Split:
    """Each part's program, found through the pipeline, agrees with the part on random arguments."""
    found = split(traced(f, *args), "test")
    for name, part in found.parts.items():
        module = getattr(found.module, name)
        given = [n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"]
        inputs = [torch.randn(x.shape).to(x.dtype) for x in given]
        wanted = module(*inputs)
        ours = pipeline.optimize_calls(part.program)(*(inputs[i] for i in part.taken))
        ours = ours if isinstance(ours, tuple) else (ours,)
        ours = tuple(x.permute(order) for x, order in zip(ours, part.orders, strict=True))
        torch.testing.assert_close(ours[0] if part.single else ours, wanted, rtol=tolerance, atol=tolerance)
    return found


def test_the_graph_is_cut_at_what_has_no_meaning() -> None:
    found = check(halves, torch.randn(4, 8), torch.randn(8, 8))
    assert [p.nodes for p in found.parts.values()] == [3, 3]
    assert found.understood == 6
    assert found.nodes == 7
    assert "not supported" in found.refused["aten.i0.default"]
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    torch.testing.assert_close(found.module(x, w), halves(x, w))


def test_the_graph_that_is_given_stays_as_it_is() -> None:
    graph = traced(halves, torch.randn(4, 8), torch.randn(8, 8))
    before = str(graph.graph)
    split(graph, "test")
    assert str(graph.graph) == before


def test_names_in_the_graph_do_not_reach_the_program() -> None:
    def renamed(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return halves(first, second)

    args = torch.randn(4, 8), torch.randn(8, 8)
    one, other = (split(traced(f, *args), "test").parts["part_0"].program for f in (halves, renamed))
    assert str(one) == str(other)


def test_parts_do_not_lead_in_circles() -> None:
    def around(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x) * 2
        return torch.tanh(y) * torch.lgamma(y + 1) + torch.exp(y)

    x = torch.randn(4, 8)
    found = check(around, x)
    torch.testing.assert_close(found.module(x), around(x))


def test_symbolic_sizes_keep_their_products() -> None:
    def flat(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        b, n, k = x.shape
        return torch.tanh(torch.relu(torch.exp(x).reshape(b * n, k) @ w).view(b, n, -1))

    x, w = torch.randn(3, 5, 8), torch.randn(8, 6)
    (part,) = split(traced(flat, x, w, symbolic=True), "test").parts.values()
    assert {limit.dim.name for limit in part.limits} == {"s0", "s1", "s2", "s3"}
    args = [torch.zeros(n, 5, 8) for n in (3, 0)]
    three, none = (_ordered(part, x, w) for x in args)
    assert all(limit.holds(three) for limit in part.limits)
    assert not all(limit.holds(none) for limit in part.limits)


def _ordered(part: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as the arguments of a part, told apart by their rank."""
    found = [torch.zeros(())] * (1 + max(part.taken))
    for place, given in zip(part.taken, part.program.inputs, strict=True):
        (found[place],) = (t for t in tensors if t.ndim == len(given.tensor.shape))
    return found


@pytest.mark.parametrize("planted", ["type", "rank", "size"])
def test_a_meaning_that_differs_from_torch_is_refused(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Any) -> Any:
        return {"type": cast(x, DType.f64), "rank": x.unsqueeze(0), "size": x.flatten()[:4].unsqueeze(0)}[planted]

    monkeypatch.setitem(ATEN, "relu", wrong)
    found = split(traced(lambda x: torch.relu(x * 2) + torch.relu(x), torch.randn(2, 8)), "test")
    assert "in PyTorch" in found.refused["aten.relu.default"]


def test_a_result_with_gaps_stays() -> None:
    def gaps(x: torch.Tensor) -> torch.Tensor:
        return (torch.relu(x) * 2).as_strided((2, 4), (8, 2))

    graph = traced(lambda x: (torch.relu(x) * 2)[:, ::2], torch.randn(2, 8))
    with pytest.raises(parts._Refused, match="gaps"):
        captured(graph, "test")
    graph = traced(lambda x: (torch.relu(x) * 2).T, torch.randn(2, 8))
    assert captured(graph, "test").orders == ((1, 0),)
    assert "as_strided" in str(split(traced(gaps, torch.randn(2, 8)), "test").refused)


def test_empty_tensors_and_complex_ones_stay() -> None:
    found = split(traced(lambda x: torch.relu(x) * 2, torch.randn(0, 8)), "test")
    assert not found.parts
    assert "size 0" in str(found.refused)
    found = split(traced(lambda x: torch.exp(x) * 2, torch.randn(2, 8, dtype=torch.complex64)), "test")
    assert not found.parts


def test_inputs_without_dimensions() -> None:
    check(lambda x, s: torch.relu(x * s) + s, torch.randn(2, 8), torch.tensor(3.0))


# -- what autograd leaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_the_sums_of_its_rows(causal: bool) -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, sums = op(q, k, v, 0.0, causal)
        return out * 2, sums * 3

    assert len(check(f, q, k, v).parts) == 1


@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_of_attention(causal: bool) -> None:
    q, k, v, grad = (torch.randn(2, 3, 5, 8) for _ in range(4))
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, sums = op(q, k, v, 0.0, causal)
        return back(grad, q, k, v, out, sums, 0.0, causal)

    assert [p.nodes for p in check(f, q, k, v, grad).parts.values()] == [2]


def test_attention_with_a_mask_gives_no_sums() -> None:
    q, k, v, mask = *(torch.randn(2, 3, 5, 8) for _ in range(3)), torch.randn(5, 5)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, n: int) -> torch.Tensor:
        return torch.relu(op(q, k, v, attn_mask=mask)[n])

    assert check(lambda *args: f(*args, 0), q, k, v, mask).parts
    found = split(traced(lambda *args: f(*args, 1), q, k, v, mask), "test")
    assert not found.parts
    assert "is not understood" in str(found.refused)


def test_the_norm_with_its_statistic() -> None:
    op, x, w = torch.ops.aten._fused_rms_norm.default, torch.randn(4, 8), torch.randn(8)
    graph = torch.fx.Graph()
    given = [graph.placeholder("x"), graph.placeholder("w")]
    norm = graph.call_function(op, (given[0], [8], given[1], 1e-6))  # tracing on a CPU takes it apart
    items = [graph.call_function(operator.getitem, (norm, i)) for i in range(2)]
    graph.output(tuple(items))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, w)]
        results = op(fakes[0], [8], fakes[1], 1e-6)
    for node, fake in zip((*given, norm, *items), (*fakes, results, *results), strict=True):
        node.meta["val"] = fake
    part = captured(torch.fx.GraphModule({}, graph), "test")
    torch.testing.assert_close(pipeline.optimize_calls(part.program)(x, w), op(x, [8], w, 1e-6))


def test_the_backward_of_gelu() -> None:
    def f(x: torch.Tensor, grad: torch.Tensor, form: str) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad, x, approximate=form) * 2

    x, grad = torch.randn(4, 8), torch.randn(4, 8)
    assert check(lambda x, g: f(x, g, "tanh"), x, grad).parts
    assert check(lambda x, g: f(x, g, "none"), x, grad).parts


# -- plans priced for a CPU ------------------------------------------------------------------------------------------


def test_a_plan_for_a_cpu_is_unchanged_where_no_call_is_saved() -> None:
    part = split(traced(lambda x, w: F.relu(x @ w), torch.randn(64, 64), torch.randn(64, 64)), "test").parts["part_0"]
    assert pipeline.optimize_calls(part.program).unchanged
    chain = traced(lambda a, b, v: a @ b @ v, torch.randn(64, 512), torch.randn(512, 512), torch.randn(512, 1))
    found = pipeline.optimize_calls(split(chain, "test").parts["part_0"].program)
    assert not found.unchanged
    assert found.report.device.startswith("CPU")
    again = pipeline.optimize_calls(split(chain, "test").parts["part_0"].program)
    assert again.cached
    assert again.report.asked.on.kind == "cpu"


# Between two norms; some of its values have no move on a CPU.
FEED_FORWARD = """
program feed_forward
  dim s0: 2..2147483647
  dim s1: 2..2147483647
  axes s0 = s0, s1 = s1, k = 32, n = 32, d = 64
  input x0: f32[(s0 s1), k]
  input x1: f32[k, n]
  input x2: f32[s0, s1, n]
  input x3: f32[n]
  input x4: f32[n, d]
  input x5: f32[n, d]
  input x6: f32[d, n]
  input x7: f32[n]
  _unsafe_view: f32[s0, s1, n] = contract[k](x0, x1)
  add: f32[s0, s1, n] = add(x2, _unsafe_view)
  pow: f32[s0, s1, n] = square(add)
  mean: f32[s0, s1] = mean[n](pow)
  t0: f32[] = 1/1000000
  add2: f32[s0, s1] = add(mean, t0)
  rsqrt: f32[s0, s1] = rsqrt(add2)
  mul: f32[s0, s1, n] = mul(add, rsqrt)
  view: f32[s0, s1, n] = mul(x3, mul)
  _unsafe_view2: f32[s0, s1, d] = contract[n](view, x4)
  silu: f32[s0, s1, d] = silu(_unsafe_view2)
  _unsafe_view3: f32[s0, s1, d] = contract[n](view, x5)
  view2: f32[s0, s1, d] = mul(silu, _unsafe_view3)
  _unsafe_view4: f32[s0, s1, n] = contract[d](view2, x6)
  add3: f32[s0, s1, n] = add(add, _unsafe_view4)
  pow2: f32[s0, s1, n] = square(add3)
  mean2: f32[s0, s1] = mean[n](pow2)
  t1: f32[] = 1/1000000
  add4: f32[s0, s1] = add(mean2, t1)
  rsqrt2: f32[s0, s1] = rsqrt(add4)
  mul2: f32[s0, s1, n] = mul(add3, rsqrt2)
  mul3: f32[s0, s1, n] = mul(x7, mul2)
  output mul3
"""


def test_values_without_a_move_are_in_no_plan() -> None:
    assert pipeline.optimize_calls(parse_program(FEED_FORWARD.strip())).certificate.tiers
