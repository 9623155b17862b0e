"""An optimised module stands where modules stand."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import mugraph as mg

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)).eval()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.times = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.times

    def named_twice(self) -> str:
        return f"{self.times} {self.times}"

    def extra_repr(self) -> str:
        return f"times={self.times}"


def test_it_is_a_module_with_the_length_and_the_items_of_its_own() -> None:
    fast = mg.superoptimize(layers(), strict=True)
    assert isinstance(fast, nn.Module)
    assert len(fast) == 3
    assert fast[2] is fast.original[2]
    assert list(fast) == list(fast.original)
    scaled = mg.superoptimize(Scaled())
    assert scaled.named_twice() == "3 3"
    assert "times=3" in repr(scaled)
    with pytest.raises(TypeError):
        len(scaled)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = scaled.nothing_like_it


def test_attributes_are_those_of_the_module() -> None:
    fast = mg.superoptimize(Scaled(), strict=True)
    before = fast(X)
    fast.times = 6
    assert fast.original.times == 6
    torch.testing.assert_close(fast(X), 2 * before)
    fast.inner = nn.Identity()
    torch.testing.assert_close(fast(X), 6 * X)
    del fast.times
    assert not hasattr(fast.original, "times")


def test_a_model_takes_an_optimised_part() -> None:
    model = nn.Sequential(layers(), nn.LayerNorm(8))
    names, expected = list(model.state_dict()), model(X)
    model[0] = mg.superoptimize(model[0], strict=True)
    torch.testing.assert_close(model(X), expected)
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    assert len(model[0].specialisations) == 1

    model.load_state_dict({name: 2 * x for name, x in model.state_dict().items()})
    torch.testing.assert_close(model(X), nn.Sequential(model[0].original, model[1])(X))
    model.train()
    assert model[0].training
    assert model[0].original[0].training
    assert model.double()(X.double()).dtype is torch.float64


def test_copies_and_pickles_of_a_model_with_an_optimised_part() -> None:
    model = nn.Sequential(mg.superoptimize(layers(), strict=True), nn.LayerNorm(8)).eval()
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert other[0].original is not model[0].original
        torch.testing.assert_close(other(X), expected)
        with torch.no_grad():
            other[0][0].weight.zero_()
        assert not torch.allclose(other(X), expected)
    torch.testing.assert_close(model(X), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["compile", "mugraph", "export", "fx", "jit", "functional_call", "superoptimize"])
def test_a_model_with_an_optimised_part_is_traced(how: str) -> None:
    model = nn.Sequential(mg.superoptimize(layers()), nn.LayerNorm(8)).eval()
    expected = nn.Sequential(model[0].original, model[1])(X)
    model(X)
    match how:
        case "compile":
            found = torch.compile(model, backend="eager")
        case "mugraph":
            found = torch.compile(model, backend="mugraph", options={"rest": "eager", "parts": "all"})
        case "export":
            found = torch.export.export(model, (X,)).module()
        case "fx":
            found = torch.fx.symbolic_trace(model)
        case "jit":
            found = torch.jit.trace(model, (X,))
            torch.testing.assert_close(found(X[:3]), expected[:3])
        case "functional_call":
            found = lambda x: torch.func.functional_call(model, dict(model.named_parameters()), (x,))  # noqa: E731
        case _:
            found = mg.superoptimize(model, strict=True)
    torch.testing.assert_close(found(X), expected)


def test_gradients_and_hooks_of_an_optimised_part() -> None:
    model = nn.Sequential(mg.superoptimize(layers()), nn.LayerNorm(8))
    model(X).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.Sequential(model[0].original, model[1])(X).square().sum().backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()])

    plain = model[0](X)
    handle = model[0].register_forward_hook(lambda module, given, result: result + 1)
    with pytest.warns(mg.FallbackWarning, match="hooks"):
        torch.testing.assert_close(model[0](X), plain + 1)
    handle.remove()
    torch.testing.assert_close(model[0](X), plain)


def test_what_is_optimised_is_optimised_from_how_it_was_written() -> None:
    first = mg.superoptimize(layers())
    second = mg.superoptimize(first, effort="none")
    assert second.original is first.original
    assert second.options == {"effort": "none"}


@pytest.mark.filterwarnings("ignore::mugraph.errors.FallbackWarning")  # pruning is a hook
def test_what_torch_registers_on_it_is_the_modules() -> None:
    fast = mg.superoptimize(layers())
    fast.register_buffer("scale", torch.ones(8))
    fast.register_parameter("shift", nn.Parameter(torch.zeros(8)))
    assert fast.original.scale is fast.scale
    assert {"scale", "shift"} < fast.original.state_dict().keys()
    linear = mg.superoptimize(nn.Linear(8, 8))
    prune.l1_unstructured(linear, "weight", 0.5)
    torch.testing.assert_close(linear(X), linear.original(X))


def test_what_is_its_own_is_not_set_and_its_class_stays() -> None:
    fast = mg.superoptimize(layers())
    with pytest.raises(AttributeError, match="own"):
        fast.options = 4
    with pytest.raises(TypeError, match="before it is optimised"):
        torch.nn.utils.parametrizations.weight_norm(mg.superoptimize(nn.Linear(8, 8)))
