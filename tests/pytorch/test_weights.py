"""Weights of modules are constants: what is computed ahead from them follows them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mugraph as mg
from mugraph.search.space import SearchSpace


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))


class Adapted(torch.nn.Module):
    """A linear layer with a low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1)

        self.w, self.a, self.b = weight(256, 128), weight(256, 8), weight(8, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w + (x @ self.a) @ self.b


def rows() -> torch.Tensor:
    return torch.randn((5, 256), generator=torch.Generator().manual_seed(1))


def doubled(model: Adapted) -> None:
    model.w.mul_(2)


def loaded(model: Adapted) -> None:
    model.load_state_dict({name: t * 3 for name, t in model.state_dict().items()})


def assigned(model: Adapted) -> None:
    model.load_state_dict({name: t * 3 for name, t in model.state_dict().items()}, assign=True)


def replaced(model: Adapted) -> None:
    model.a = torch.nn.Parameter(model.a * -1)


def stepped(model: Adapted) -> None:
    with torch.enable_grad():
        model(rows()).square().sum().backward()
    torch.optim.SGD([model.w, model.a, model.b], lr=0.1).step()


def given(model: Adapted) -> None:
    model.b.data = model.b.data + 1


@pytest.mark.parametrize("change", [doubled, loaded, assigned, replaced, stepped, given])
def test_folded_weights_follow_the_module(change: Callable[[Adapted], None]) -> None:
    model, x = Adapted().eval(), rows()
    fast = mg.superoptimize(model, strict=True, space=SearchSpace())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
            before = model(x)
            change(model)
            assert not torch.allclose(before, model(x))
    assert len(fast.result.graph.ahead()) == 1


def test_models_of_one_structure_keep_their_own_weights() -> None:
    one, x = Adapted().eval(), rows()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.w.add_(1)
        fast = [mg.superoptimize(m, strict=True, space=SearchSpace()) for m in (one, other)]
        for _ in range(2):
            for f, m in zip(fast, (one, other), strict=True):
                torch.testing.assert_close(f(x), m(x), rtol=1e-4, atol=1e-4)


def test_weights_that_want_gradients_get_them() -> None:
    model, x = Adapted(), rows()
    fast = mg.superoptimize(model, strict=True, space=SearchSpace())
    with torch.no_grad():
        fast(x)
    fast(x).sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for mine, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)


def test_inference_mode() -> None:
    model, x = Adapted().eval(), rows()
    fast = mg.superoptimize(model, strict=True, space=SearchSpace())
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
        model.w.add_(1)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)


def test_nothing_is_kept_unless_the_space_says_so() -> None:
    """So writes that PyTorch does not count are seen."""
    model, x = Adapted().eval(), rows()
    fast = mg.superoptimize(model, strict=True)
    with torch.no_grad():
        fast(x)
        model.w.data.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
    assert fast.result.graph.ahead() == ()
