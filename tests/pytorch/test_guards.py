"""Optimised PyTorch functions follow the state they read (weights, flags, closures, hooks), and never break a call."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mugraph as mg
from mugraph import pipeline
from mugraph.errors import (
    CaptureError,
    FallbackWarning,
    LaunchError,
    SettingError,
    UnknownTargetError,
    VerificationError,
)
from mugraph.pytorch import decorator
from mugraph.result import Result

S = mg.superoptimize


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "guards"))


def R(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def silent(fn: Any, *args: Any, **named: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fn(*args, **named)


# -- arguments


def test_the_same_tensor_twice_is_another_signature() -> None:
    fast = S(lambda a, b: torch.relu(a @ b) * 2)
    u, v = R(16, 16), R(16, 16, seed=1)
    same(fast(u, u), fast.original(u, u))
    same(fast(u, v), fast.original(u, v))
    assert not torch.allclose(fast(u, u), fast(u, v))
    assert len(fast.specialisations) == 2
    assert len(fast.result.program.inputs) == 2


@pytest.mark.full
def test_overlapping_views_and_weights_given_as_arguments_are_arguments() -> None:
    w = R(16, 16)
    fast = S(lambda a, b: torch.relu(a @ b) @ w)
    base = R(20, 16)
    same(fast(base[:16], base[4:]), fast.original(base[:16], base[4:]))
    same(fast(w, w), fast.original(w, w))
    u, v = R(16, 16, seed=1), R(16, 16, seed=2)
    same(fast(u, v), fast.original(u, v))
    assert len(fast.specialisations) == 1


@pytest.mark.full
def test_dynamic_goes_by_argument() -> None:
    n, m = mg.Dim("n", 1, 64), mg.Dim("m", 1, 64)
    fast = S(lambda a, b: torch.relu(a @ b.T), dynamic={"a": {0: n}, "b": {0: m}})
    u = R(8, 16)
    same(fast(u, u), fast.original(u, u))
    for b in (5, 8):  # not the same object: another signature
        same(fast(u, R(b, 16)), fast.original(u, R(b, 16)))
    assert len(fast.specialisations) == 2
    rows = S(lambda a, b: a * 2 + b, dynamic={"a": {0: n}, "b": {0: n}})
    same(rows(R(8, 4), R(8, 4)), rows.original(R(8, 4), R(8, 4)))
    same(rows(R(8, 4), R(1, 4)), rows.original(R(8, 4), R(1, 4)))  # one name, two sizes: broadcast, another signature
    assert len(rows.specialisations) == 2


def test_another_structure_of_the_same_leaves_is_another_signature() -> None:
    def total(xs: Any, scale: Any = 2) -> Any:
        parts = list(xs.values()) if isinstance(xs, dict) else list(xs)
        return torch.relu(parts[0] @ parts[1]) * scale

    fast = S(total)
    a, b = R(4, 4), R(4, 4, seed=1)
    for args in (({"a": a, "b": b},), ({"c": a, "d": b},), ([a, b],), ((a, b),), ((a, b), 3), ((a, b), 3.0)):
        same(silent(fast, *args), total(*args))
    assert len(fast.specialisations) == 6


def test_keyword_only_arguments() -> None:
    def shifted(x: Any, *, y: Any = None, scale: float = 2.0) -> Any:
        return torch.relu(x) * scale + (0 if y is None else y @ x)

    fast = S(shifted, strict=True)
    x, y = R(4, 4), R(4, 4, seed=1)
    for named in ({}, {"y": y}, {"y": x}, {"scale": 3.0}, {"y": y, "scale": 3.0}):
        same(silent(fast, x, **named), shifted(x, **named))
    assert len(fast.specialisations) == 5
    assert fast.result.program.inputs[1].name == "y"
    with pytest.raises(TypeError, match="unexpected"):
        fast(x, z=1)


# -- gradients


def gradients(fn: Any, x: torch.Tensor, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(fn(x).square().sum(), parameters))


@pytest.mark.parametrize("training", [True, False])
def test_parameters_get_their_gradients(training: bool) -> None:
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).train(training)
    fast = S(net, strict=True)
    x = R(3, 16)
    assert fast(x).requires_grad
    assert fast.result.target.kind == "torch"
    assert not fast.result.unchanged
    same(gradients(fast, x, list(net.parameters())), gradients(net, x, list(net.parameters())))
    with torch.no_grad():
        assert not fast(x).requires_grad


def test_closed_over_parameters_get_their_gradients() -> None:
    w, s = nn.Parameter(R(16, 4)), nn.Parameter(torch.tensor(2.0))
    net = nn.Linear(4, 4)
    fast = S(lambda x: torch.relu(net(x @ w)) * s, strict=True)
    wanted = [w, s, net.weight]
    same(gradients(fast, R(3, 16), wanted), gradients(fast.original, R(3, 16), wanted))


def test_gradients_that_are_stopped_stay_so() -> None:
    def straight_through(x: torch.Tensor) -> torch.Tensor:
        return x + (torch.relu(x) * 2 - x).detach()

    def constant_scale(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.rsqrt(x.square().mean(-1, keepdim=True))
        return x * scale

    for fn in (straight_through, constant_scale):
        x = R(4, 8).requires_grad_()
        fast = S(fn)
        with torch.no_grad():
            silent(fast, x)
        for _ in range(2):
            same(torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(fn(x).sum(), x))


# -- state


def test_weights_are_those_of_the_call() -> None:
    net, x = nn.Linear(16, 4), R(3, 16)
    net.register_buffer("shift", R(4))
    fast = S(lambda x: torch.relu(net(x)) + net.shift)
    whole = S(net)
    other = {k: v + 1 for k, v in net.state_dict().items()}

    def check(count: int) -> None:
        for f in (fast, whole):
            same(f(x), f.original(x))
            assert len(f.specialisations) == count, f

    check(1)
    net.weight.data = R(4, 16, seed=5)
    check(1)
    net.load_state_dict(other, assign=True)
    net.weight.requires_grad_()
    net.bias.requires_grad_()
    check(1)
    net.weight = nn.Parameter(R(4, 16, seed=6))
    net.shift = R(4, seed=7)
    check(1)
    net.weight = nn.Parameter(R(4, 16, seed=6), requires_grad=False)
    check(2)
    net.double()
    x = x.double()
    check(3)


def test_weights_that_were_tied_may_come_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Any) -> Any:
            return torch.relu(self.b(self.a(x)))

    net, x = Tied(), R(3, 4)
    fast = S(net)
    same(fast(x), net(x))
    net.b.weight = nn.Parameter(R(4, 4))
    same(fast(x), net(x))
    assert len(fast.specialisations) == 2


class Scaled(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.scale = 3.0
        self.act = "relu"
        self.drop = nn.Dropout(0.5)
        self.table = [1.0, 2.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(self.inner(x)) * self.scale * self.factor * self.table[1]
        return torch.relu(y) if self.act == "relu" else torch.sigmoid(y)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "scale", 5.0),
        lambda m: setattr(m, "act", "sigmoid"),
        lambda m: setattr(m, "inner", nn.Linear(8, 8)),
        lambda m: m.table.__setitem__(1, 7.0),
        lambda m: setattr(m, "factor", 4.0),
    ],
    ids=["number", "string", "submodule", "list", "class attribute"],
)
def test_attributes_of_modules_are_followed(change: Any) -> None:
    net, x = Scaled().eval(), R(3, 8)
    fast = S(net, strict=True)
    before = fast(x)
    same(before, net(x))
    change(net)
    same(fast(x), net(x))
    assert not torch.allclose(before, net(x))
    assert len(fast.specialisations) == 2
    fast(x)
    assert len(fast.specialisations) == 2


def test_the_training_flag_of_a_submodule_is_followed() -> None:
    net, x = Scaled().eval(), R(3, 8)
    fast = S(net)
    same(fast(x), net(x))
    net.drop.train()
    with pytest.warns(FallbackWarning, match="dropout"):
        assert not torch.allclose(fast(x), fast(x))


def test_hooks_run() -> None:
    net, x, seen = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), R(3, 8), []
    fast = S(net)
    fast(x)
    handle = net[0].register_forward_hook(lambda m, args, y: seen.append(1) or y * 2)
    with pytest.warns(FallbackWarning, match="hooks"):
        same(fast(x), net(x))
    silent(fast, x)
    assert len(seen) == 3
    handle.remove()
    same(silent(fast, x), net(x))
    assert len(seen) == 3


FACTOR = 2.0
WEIGHT = R(8, 8)


def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ WEIGHT) * FACTOR


def test_globals_and_closure_cells_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    offset, w = 1.0, R(8, 8, seed=1)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        return next(helper(y @ w) + offset for y in (x,))

    fast, x = S(shifted, strict=True), R(3, 8)
    same(fast(x), shifted(x))
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    same(fast(x), shifted(x))
    offset = 5.0
    same(fast(x), shifted(x))
    assert len(fast.specialisations) == 3
    monkeypatch.setitem(globals(), "WEIGHT", R(8, 8, seed=9))  # a tensor: passed as it is now
    w = R(8, 8, seed=4)
    same(fast(x), shifted(x))
    assert len(fast.specialisations) == 3


@pytest.mark.full
def test_attributes_of_a_methods_object_are_followed() -> None:
    class Model:
        shift = 1.0

        def __init__(self) -> None:
            self.scale, self.w, self.net = 2.0, R(8, 8), nn.Linear(8, 8)

        @S(strict=True)
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.net(x @ self.w)) * self.scale + self.shift

    model, x = Model(), R(3, 8)

    def wanted() -> torch.Tensor:
        return torch.relu(model.net(x @ model.w)) * model.scale + model.shift

    same(model.forward(x), wanted())
    model.w = R(8, 8, seed=3)
    same(model.forward(x), wanted())
    assert len(model.forward.specialisations) == 1
    model.scale = 4.0
    same(model.forward(x), wanted())
    model.shift = 7.0
    same(model.forward(x), wanted())
    assert len(model.forward.specialisations) == 3


def test_a_function_that_changes_what_it_reads_runs_itself() -> None:
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return torch.relu(x) * self.calls

    fast, x = S(Counter()), R(3, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(7):
            fast.original.calls += 100
            before = fast.original.calls
            same(fast(x), torch.relu(x) * fast.original.calls)
            assert fast.original.calls > before
    assert {"changes what it reads" in str(c.message) for c in caught} == {True}
    assert len(fast.specialisations) == decorator.MOST_CHANGES


# -- never raises what the original would not


@pytest.mark.parametrize("error", [VerificationError("no"), RecursionError("deep"), ZeroDivisionError("0")])
def test_errors_of_optimisation_fall_back(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "optimize", broken)
    fast, x = S(lambda x: torch.relu(x) * 2), R(3, 4)
    text = "a check refused" if isinstance(error, VerificationError) else type(error).__name__
    with pytest.warns(FallbackWarning, match=text):
        same(fast(x), torch.relu(x) * 2)
    silent(fast, x)
    assert fast.report
    with pytest.raises(type(error)):
        S(lambda x: torch.relu(x) * 2, strict=True)(x)


def test_errors_of_a_launch_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, x = S(lambda x, w: torch.relu(x @ w) * 2), R(4, 4)

    def broken(*_: Any, **__: Any) -> None:
        raise LaunchError("does not fit")

    monkeypatch.setattr(Result, "__call__", broken)
    with pytest.warns(FallbackWarning, match="does not fit"):
        same(fast(x, x), fast.original(x, x))
    silent(fast, x, x)


def test_abstract_tensors_and_transforms_run_the_original() -> None:
    fast, x = S(lambda x, w: torch.relu(x @ w)), R(4, 4)
    assert silent(fast, x.to("meta"), x.to("meta")).is_meta
    assert not fast.specialisations
    with pytest.warns(FallbackWarning, match=r"torch\.func"):
        found = torch.func.vmap(fast, in_dims=(0, None))(R(3, 4, 4), x)
    same(found, fast.original(R(3, 4, 4), x))
    outer = S(lambda x: fast(x, x) * 2, strict=True)
    same(outer(x), torch.relu(x @ x) * 2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"foo": 3}, SettingError),
        ({"target": "cuda:1"}, UnknownTargetError),
        ({"target": "tpu"}, UnknownTargetError),
        ({"target": 3}, UnknownTargetError),
        ({"budget_seconds": -1}, SettingError),
        ({"seed": "x"}, SettingError),
        ({"space": 3}, SettingError),
        ({"dynamic": ["x"]}, CaptureError),
        ({"dynamic": {"x": mg.Dim("n")}}, CaptureError),
        ({"dynamic": {"x": {0: "n"}}}, CaptureError),
        ({"dynamic": {"x": {-1: mg.Dim("n")}}}, CaptureError),
        ({"dynamic": {"y": {0: mg.Dim("n")}}}, CaptureError),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        S(lambda x: x, **options)


def test_options_that_can_be_meant_are_taken() -> None:
    S(lambda x: x, target="cuda:90", budget_seconds=3, seed=1, dynamic={"x": {0: mg.Dim("n")}}, space=mg.SearchSpace())
    with pytest.raises(SettingError, match="Linear is a class"):
        S(nn.Linear)
    fast = S(lambda x: torch.relu(x) * 2, dynamic={"x": {5: mg.Dim("n")}})
    with pytest.warns(FallbackWarning, match="dimension 5 of x, which has 2"):
        fast(R(2, 3))


# -- copies, modules, torch.compile


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    @S(strict=True)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(x)) * 2


@S
def decorated(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ x) * 2


@pytest.mark.full
@pytest.mark.parametrize("again", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))], ids=["copy", "pickle"])
def test_copies_and_pickles(again: Any) -> None:
    x = R(8, 8)
    holder = Holder()
    for fast, weights in ((S(nn.Linear(8, 8)), True), (S(helper, seed=1), False), (decorated, False), (holder, True)):
        same(fast(x), fast(x))
        other = again(fast)
        same(other(x), fast(x))
        if weights:
            with torch.no_grad():
                next(other.parameters()).add_(1)
            assert not torch.allclose(other(x), fast(x))
        if fast is not decorated and fast is not holder:
            assert other.options == fast.options
    assert again(holder).forward.original.__self__ is not holder


def test_a_module_keeps_its_attributes() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    fast = S(net)
    assert list(fast.parameters()) == list(net.parameters())
    assert fast.state_dict().keys() == net.state_dict().keys()
    assert fast.eval() is fast
    assert not fast.training
    assert fast.train().training
    x = R(3, 8)
    same(fast.to(torch.float64)(x.double()), net(x.double()))
    with pytest.raises(AttributeError):
        fast.nothing  # noqa: B018


@pytest.mark.full
def test_torch_compile_leaves_it_alone() -> None:
    fast = S(lambda x, w: torch.relu(x @ w) * 2)
    x = R(8, 8)
    same(torch.compile(fast, backend="eager")(x, x), fast.original(x, x))
    same(torch.compile(lambda x: fast(x + 1, x) * 2, backend="eager")(x), fast.original(x + 1, x) * 2)
    assert len(fast.specialisations) == 1
    assert fast.result.graph.kernels()


def test_built_in_functions_and_class_attributes() -> None:
    class Model:
        act = S(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    x = R(3, 8)
    same(Model().act(x), Model.act.original(x))
    same(S(torch.sigmoid)(x), torch.sigmoid(x))


# -- attention


def test_rows_that_a_mask_leaves_empty_are_zero() -> None:
    q, k, v = R(2, 5, 8), R(2, 7, 8), R(2, 7, 8, seed=1)
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[2] = False

    def attend(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    fast = S(attend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for m in (mask, torch.zeros(5, 7).masked_fill(~mask, -torch.inf)):
            found = fast(q, k, v, m)
            same(found, attend(q, k, v, m))
            assert not found[:, 2].any()
    plain = S(lambda x, m: x.masked_fill(~m, -torch.inf).softmax(-1))
    assert plain(R(5, 7), mask)[2].isnan().all()


def test_a_method_that_is_replaced_in_its_class_is_seen() -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, -1) * 2

    fast, x = S(nn.Sequential(Layer())), R(3, 8)
    for _ in range(2):
        same(fast(x), torch.softmax(x, -1) * 2)
    Layer.forward = lambda self, x: torch.softmax(x, -1) * 5  # type: ignore[method-assign]
    same(fast(x), torch.softmax(x, -1) * 5)
