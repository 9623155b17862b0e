"""Gradients and training under `torch.compile(model, backend="mugraph")`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

import mugraph as mg
from mugraph.pytorch import backend
from mugraph.pytorch.backend import GraphReport, reports

ALL = {"rest": "eager", "parts": "all"}  # every part runs, whatever is gained
pytestmark = pytest.mark.usefixtures("fresh_backend")


def compiled(model: Any, options: dict[str, Any] = ALL, **named: Any) -> Any:
    return torch.compile(model, backend="mugraph", options=options, **named)


def report_of(kind: str) -> GraphReport:
    return next(r for r in reversed(reports()) if r.kind == kind)


class Lora(nn.Module):
    """A frozen linear layer with a low-rank addition that is trained."""

    def __init__(self, width: int = 24, rank: int = 2) -> None:
        super().__init__()
        self.full = nn.Linear(width, width)
        self.full.requires_grad_(False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.full(x) + self.up(self.down(x)))


class Block(nn.Module):
    """A small pre-norm transformer block."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 24)
    )


def trained(model: nn.Module, run: Callable[..., Any], batches: Sequence[torch.Tensor]) -> list[float]:
    """The losses of one step of gradient descent for each batch."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(weights, lr=0.05), []
    for x in batches:
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), torch.sin(3 * x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("make", "shape"), [(perceptron, (8, 24)), (Lora, (8, 24)), (Block, (2, 5, 16))], ids=["mlp", "lora", "transformer"]
)
def test_fifty_steps_agree_with_eager(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make()
    other = copy.deepcopy(model)
    batches = [torch.randn(shape)] * 50
    mine, theirs = trained(model, compiled(model), batches), trained(other, other, batches)
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=1e-4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert theirs[-1] < theirs[0]
    assert report_of("forward").taken
    assert report_of("backward").taken


def test_training_with_inductor_for_the_rest() -> None:
    model = Block()
    other = copy.deepcopy(model)
    batches = [torch.randn(2, 5, 16) for _ in range(3)]
    mine = trained(model, compiled(model, {"parts": "all"}), batches)
    torch.testing.assert_close(mine, trained(other, other, batches), rtol=1e-3, atol=1e-4)
    assert report_of("backward").rest == "Inductor"
    assert report_of("backward").taken


@pytest.mark.parametrize(
    ("make", "shape"), [(perceptron, (3, 24)), (Lora, (3, 24)), (Block, (2, 3, 16))], ids=["mlp", "lora", "transformer"]
)
def test_gradients_are_those_of_finite_differences(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    model = make().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(compiled(model), (x,), nondet_tol=1e-12)
    assert report_of("backward").taken


def test_a_wrong_gradient_fails_the_check() -> None:
    model = Lora().double()
    fast = compiled(model)
    forward = backend.Runner.forward

    def doubled(self: backend.Runner, *args: Any) -> Any:
        found = forward(self, *args)
        return found * 2 if isinstance(found, torch.Tensor) else tuple(2 * y for y in found)

    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    fast(x).sum().backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.Runner, "forward", doubled)
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(fast, (x,))


def test_no_gradient_of_a_frozen_weight_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: dict[str, Any] = {}

    def noted(module: Any, name: str) -> Any:
        graphs[name] = copy.deepcopy(module.graph)
        return split(module, name)

    split = backend.split
    monkeypatch.setattr(backend, "split", noted)

    def gradients(model: Lora) -> list[tuple[int, ...]]:
        torch._dynamo.reset()
        compiled(model)(torch.randn(8, 24)).sum().backward()
        (results,) = (n.args[0] for n in graphs["backward"].nodes if n.op == "output")
        return [tuple(r.meta["val"].shape) for r in results if r is not None]

    model = Lora()
    assert (24, 24) not in gradients(model)
    assert model.full.weight.grad is None
    model.full.requires_grad_(True)
    assert (24, 24) in gradients(model)


def test_arguments_with_and_without_gradients() -> None:
    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(x @ w + b)
        return y * 2, (y * y).sum(-1).detach()

    fast = compiled(f)
    for wants in ((True, False, False), (False, True, True), (True, True, True), (False, False, False)):
        args = [torch.randn(s).requires_grad_(g) for s, g in zip(((5, 8), (8, 8), (8,)), wants, strict=True)]
        mine, theirs = fast(*args), f(*args)
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert [y.requires_grad for y in mine] == [y.requires_grad for y in theirs]
        if any(wants):
            inputs = [a for a in args if a.requires_grad]
            found, wanted = (torch.autograd.grad(y[0].square().sum(), inputs) for y in (mine, theirs))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_gradients_of_dynamic_sizes() -> None:
    model = Block()
    fast = compiled(model, dynamic=True)
    for shape in ((2, 3, 16), (3, 7, 16), (1, 4, 16)):
        x = torch.randn(shape)
        mine, theirs = (torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (fast, model))
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    assert report_of("backward").taken


def test_training_and_evaluation_take_turns() -> None:
    model = perceptron()
    fast, x = compiled(model), torch.randn(4, 24)
    for _ in range(2):
        fast(x).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert {"forward", "backward", "inference"} == {r.kind for r in reports()}


def test_hooks_on_weights_see_their_gradients() -> None:
    model, seen = Lora(), []
    model.up.weight.register_hook(lambda g: seen.append(g.clone()))
    model.up.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    compiled(model)(torch.randn(4, 24)).sum().backward()
    torch.testing.assert_close(seen[0], seen[1])


def test_backward_twice_is_refused_as_in_eager() -> None:
    loss = compiled(perceptron())(torch.randn(4, 24)).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_saved_tensor_that_was_written_is_refused_as_in_eager() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w)

    x, w = torch.randn(4, 8), torch.randn(8, 8, requires_grad=True)
    loss = compiled(f)(x, w).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_is_kept_when_asked_for_also_where_it_was_not_before() -> None:
    model, x = perceptron(), torch.randn(4, 24, requires_grad=True)
    fast = compiled(model)
    fast(x).sum().backward()
    loss = fast(x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(loss, x))


def test_parts_of_the_backward_seen_before_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(Lora())(torch.randn(8, 24)).sum().backward()
    torch._dynamo.reset()
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    compiled(Lora())(torch.randn(8, 24)).sum().backward()
    assert report_of("backward").taken
    assert all(p.result.cached for p in report_of("backward").parts)


# -- the decorator ---------------------------------------------------------------------------------------------------


def test_a_function_for_a_gpu_is_trained_through_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_INTERPRET", "1")

    @mg.superoptimize(target="cuda:90")
    def gated(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ w1) * (x @ w2)

    args = [torch.randn(s, requires_grad=True) for s in ((5, 16), (16, 8), (16, 8))]
    mine = torch.autograd.grad(gated(*args).square().sum(), args)
    theirs = torch.autograd.grad(gated.original(*args).square().sum(), args)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert report_of("forward").taken


def test_gradients_that_a_function_stops_stay_stopped() -> None:
    @mg.superoptimize
    def half(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ w) * torch.sigmoid((x @ w).detach())

    args = [torch.randn(s, requires_grad=True) for s in ((5, 8), (8, 8))]
    mine = torch.autograd.grad(half(*args).sum(), args)
    torch.testing.assert_close(mine, torch.autograd.grad(half.original(*args).sum(), args), rtol=1e-4, atol=1e-5)
    assert {"forward", "backward"} <= {r.kind for r in reports()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_group_norm_of_two_types_has_its_gradients(dtype: torch.dtype) -> None:
    def f(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.group_norm(x, 2, w, b))

    found = []
    for g in (f, torch.compile(f, backend="mugraph", options={"rest": "eager", "parts": "all"})):
        args = (torch.linspace(-1, 1, 256).reshape(2, 8, 16).to(dtype), torch.ones(8), torch.zeros(8))
        given = [x.requires_grad_() for x in args]
        g(*given).float().square().sum().backward()
        found.append([x.grad for x in given])
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)
