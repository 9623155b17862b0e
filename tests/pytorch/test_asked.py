"""What a function asks of its arguments and surroundings, and gradients of its own, against eager PyTorch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mugraph as mg
from mugraph.errors import FallbackWarning

pytestmark = pytest.mark.filterwarnings("ignore::mugraph.errors.FallbackWarning", "ignore::DeprecationWarning")


def _same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


X, W = torch.linspace(-2, 2, 32).reshape(4, 8), torch.linspace(-1, 3, 64).reshape(8, 8).cos()


def test_a_returned_size_is_a_number() -> None:
    fast = mg.superoptimize(lambda x: ((x @ W).relu(), x.shape[0]))
    for n in (4, 5, 6):
        found, size = fast(torch.ones(n, 8))
        assert (type(size), size) == (int, n)
        _same(found, (torch.ones(n, 8) @ W).relu())


class _Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return g * 7


def _hooked(x: torch.Tensor) -> torch.Tensor:
    y = x @ W[:4, :4]
    if y.numel():
        y.register_hook(lambda g: g * 3)
    return y.relu()


OWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "autograd function": lambda x: _Steep.apply(x @ W[:4, :4]),
    "hook": _hooked,
    "hardtanh": lambda x: F.hardtanh(x) @ W[:4, :4],
    "relu6": lambda x: F.relu6(x) @ W[:4, :4],
    "hardswish": lambda x: F.hardswish(x * 3) @ W[:4, :4],
    "norm": lambda x: x.norm(dim=-1, keepdim=True) * W[:4, :4],
    "std": lambda x: x.std(-1) * W[:4, :4],
    "softplus": lambda x: F.softplus(x * 30 + 1) * 2,
    "elu": lambda x: F.elu(x * 30 + 1) + F.selu(x * 30 + 1) + F.celu(x * 30 + 1),
    "mish": lambda x: F.mish(x * 30) * 2,
    "log sigmoid": lambda x: F.logsigmoid(x * 20) * 2,
    "sign": lambda x: x.sign() * 2,
    "a branch": lambda x: torch.where(x > 0, x, torch.expm1(x)) * 2,
}


QUICK = ("autograd function", "hook", "relu6", "softplus", "sign")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in OWN])
def test_a_gradient_of_its_own(name: str) -> None:
    x = torch.tensor([[0.0, 1, -1, 0.5], [0, 0, 0, 0], [6, 3, -1, 2], [1, 1, 1, 1]], requires_grad=True)
    f = OWN[name]
    fast = mg.superoptimize(f)
    for _ in range(2):
        _same(torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(f(x).sum(), x))


def test_the_row_that_stands_for_padding_has_no_gradient() -> None:
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=0), nn.Linear(8, 8), nn.SiLU())
    mg.superoptimize(model)(torch.tensor([0, 1, 2, 0])).sum().backward()
    assert not model[0].weight.grad[0].any()
    assert model[0].weight.grad[1].any()


ASKED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gradient": lambda x: (x @ W).relu() * (2 if x.requires_grad else 3),
    "leaf": lambda x: (x @ W).relu() * (2 if x.is_leaf else 3),
    "contiguous": lambda x: (x @ W).relu() * (2 if x.is_contiguous() else 3),
    "stride": lambda x: (x @ W).relu() * x.stride(0),
    "default type": lambda x: (x @ W).relu() + torch.ones(8),
}


@pytest.fixture(params=["as it is", "needs a gradient", "no leaf", "transposed", "f64"])
def given(request: Any) -> Iterator[torch.Tensor]:
    before = torch.get_default_dtype()
    if request.param == "f64":
        torch.set_default_dtype(torch.float64)
    grown = X.clone().requires_grad_()
    forms = {"needs a gradient": grown, "no leaf": grown * 1, "transposed": X.reshape(8, 4).t()}
    yield forms.get(request.param, X)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("name", ASKED)
def test_what_a_function_asks(name: str, given: torch.Tensor) -> None:
    fast = mg.superoptimize(ASKED[name])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    fast(X)
    torch.set_default_dtype(before)
    _same(fast(given), ASKED[name](given))


def test_which_arguments_are_one_object_and_which_are_parameters() -> None:
    def same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.relu(a) * (2 if a is b else torch.sigmoid(b))

    def weighted(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w + (1 if isinstance(w, torch.nn.Parameter) else 2)

    fast, other = mg.superoptimize(same, strict=True), X.flip(0)
    for a, b in ((X, other), (X, X), (other, X), (other, other), (X[:3], other[:3]), 2 * [X[:2]]):
        for _ in range(2):
            _same(fast(a, b), same(a, b))
    fast, w = mg.superoptimize(weighted, strict=True), torch.nn.Parameter(torch.eye(8), requires_grad=False)
    for weight in (w, w.data, w, w.data):
        _same(fast(X, weight), weighted(X, weight))


def test_sparse_tensors_run_the_original() -> None:
    fast, sparse = mg.superoptimize(lambda x: x * 2), X.relu().to_sparse()
    _same(fast(X), X * 2)
    with pytest.warns(FallbackWarning, match="sparse"):
        _same(fast(sparse).to_dense(), X.relu() * 2)


def test_values_of_tensors_outside() -> None:
    scale = torch.tensor([2.0, 1.0])
    for f in (lambda x: x.relu() * scale.tolist()[0], lambda x: x.relu() * (2 if scale.sum().item() > 0 else 3)):
        scale.fill_(2)
        fast = mg.superoptimize(f)
        _same(fast(X), f(X))
        scale.fill_(-3)
        _same(fast(X), f(X))


def test_random_numbers_of_python_are_drawn_in_every_call() -> None:
    fast = mg.superoptimize(lambda x: x.relu() * random.random())
    assert not torch.equal(fast(X), fast(X))


def test_a_changed_container() -> None:
    def keeping(d: dict[str, torch.Tensor]) -> torch.Tensor:
        d["y"] = (d["x"] @ W).relu()
        return d["y"]

    fast = mg.superoptimize(keeping)
    for _ in range(2):
        d = {"x": X}
        fast(d)
        assert list(d) == ["x", "y"]


class _Scaled(nn.Module):
    scales: Any = (1.0, 2.0)
    table = torch.tensor(2.0)
    factor: float

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ W).relu() * self.scales[1] * self.table * self.factor


def test_attributes_of_classes_and_of_what_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _Scaled()
    fast = mg.superoptimize(model)
    fast(X)
    for name, value in {"scales": (1.0, 5.0), "table": torch.tensor(9.0)}.items():
        monkeypatch.setattr(_Scaled, name, value)
        _same(fast(X), model(X))
    fast.factor = 4.0  # in the module
    assert model.factor == 4.0
    _same(fast(X), model(X))

    class Called:
        k = 2.0

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ W).relu() * self.k

    called = Called()
    fast = mg.superoptimize(called)
    fast(X)
    called.k = 5.0
    _same(fast(X), called(X))


def test_what_raises_as_it_was_written_runs_once() -> None:
    def raising(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        if x.sum() > 0:
            raise ValueError("positive")
        return x

    fast = mg.superoptimize(raising)
    with pytest.warns(FallbackWarning):
        fast(torch.full((3,), -5.0))
    fast(torch.full((3,), -5.0))
    x = torch.ones(3)
    with pytest.raises(ValueError, match="positive"):
        fast(x)
    assert x.tolist() == [2, 2, 2]


def test_a_lazy_module() -> None:
    model = nn.LazyLinear(4)
    fast = mg.superoptimize(model)
    for _ in range(3):
        _same(fast(X), model(X))


def test_a_module_with_an_optimised_method_is_exported() -> None:
    class Layer(nn.Module):
        @mg.superoptimize
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ W).relu()

    _same(torch.export.export(Layer(), (X,)).module()(X), (X @ W).relu())


@pytest.mark.parametrize("asked", [torch.is_grad_enabled, torch.compiler.is_compiling], ids=lambda f: f.__name__)
def test_questions_about_the_state_of_pytorch_run_the_original(asked: Callable[[], bool]) -> None:
    name = asked.__name__

    def branching(x: torch.Tensor) -> torch.Tensor:
        state = torch.is_grad_enabled() if name == "is_grad_enabled" else torch.compiler.is_compiling()
        return (x @ W).relu() * (2 if state else 3)

    fast = mg.superoptimize(branching)
    with pytest.warns(FallbackWarning, match=name):
        _same(fast(X), branching(X))
    with torch.no_grad():
        _same(fast(X), branching(X))
    assert getattr(torch if name == "is_grad_enabled" else torch.compiler, name) is asked


def test_results_and_operators_keep_their_types_under_autocast() -> None:
    rows = mg.Dim("B", 1, 8)

    @mg.program
    def product(x: mg.f32[rows, 8], w: mg.f32[8, 8]) -> Any:
        return mg.relu(x @ w)

    result = mg.superoptimize(product, target="torch")
    x, w = torch.randn(4, 8), torch.randn(8, 8)
    wanted = (x @ w).relu()
    with torch.autocast("cpu", torch.bfloat16):
        for call in (result, result.register()):
            assert call(x, w).dtype is torch.float32
            torch.testing.assert_close(call(x, w), wanted)
