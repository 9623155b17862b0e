"""`@mg.superoptimize` on PyTorch functions and modules."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import mugraph as mg
from mugraph.errors import CaptureError, FallbackWarning, UnsupportedOpError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))


def gated(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ w1) * (x @ w2)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def test_function_gives_the_same_and_is_optimised_once_per_signature() -> None:
    fast = mg.superoptimize(gated)
    args = tensors((5, 16), (16, 24), (16, 24))
    torch.testing.assert_close(fast(*args), gated(*args), rtol=1e-5, atol=1e-5)
    assert len(fast.result.graph.kernels()) == 1
    torch.testing.assert_close(fast(args[0], w2=args[2], w1=args[1]), gated(*args), rtol=1e-5, atol=1e-5)
    assert len(fast.specialisations) == 1
    half = [a.half() for a in args]
    torch.testing.assert_close(fast(*half), gated(*half), rtol=2e-2, atol=2e-2)
    assert len(fast.specialisations) == 2
    assert fast.__name__ == "gated"
    assert fast.original is gated


def test_dynamic_sizes_share_one_result_but_for_1() -> None:
    fast = mg.superoptimize(gated, dynamic={"x": {0: mg.Dim("B", 1, 64)}})
    w1, w2 = tensors((16, 24), (16, 24))
    for b, signatures in ((2, 1), (33, 1), (1, 2), (64, 2), (65, 3)):  # 1 and what is out of range have their own
        (x,) = tensors((b, 16))
        torch.testing.assert_close(fast(x, w1, w2), gated(x, w1, w2), rtol=1e-5, atol=1e-5)
        assert len(fast.specialisations) == signatures
    mins = sorted(d.min for s in fast.specialisations.values() for d in s.result.program.dims())
    assert mins == [2]


AT_ONE = {
    "branch": lambda x, w: x * 0.5 if x.shape[0] == 1 else torch.softmax(x, -1) * 2,
    "squeeze": lambda x, w: torch.softmax(x @ w, -1).squeeze(0),
    "other branch": lambda x, w: torch.relu(x) + (0 if x.shape[0] > 1 else x.sum()),
}


@pytest.mark.parametrize("name", AT_ONE)
@pytest.mark.parametrize("order", [(5, 1), (1, 5)])
@pytest.mark.parametrize("least", [1, 2])
def test_a_declared_size_of_1_has_a_signature_of_its_own(name: str, order: tuple[int, ...], least: int) -> None:
    fast = mg.superoptimize(AT_ONE[name], dynamic={"x": {0: mg.Dim("rows", least, 8)}}, strict=True)
    (w,) = tensors((8, 8))
    for n in order * 2:
        (x,) = tensors((n, 8))
        found, wanted = fast(x, w), AT_ONE[name](x, w)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(fast.specialisations) == 2


def test_unknown_dynamic_argument_is_refused() -> None:
    with pytest.raises(CaptureError, match="known: x, w1, w2"):
        mg.superoptimize(gated, dynamic={"y": {0: mg.Dim("B")}})


def test_decorator_forms() -> None:
    @mg.superoptimize
    def plain(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, dim=-1)

    @mg.superoptimize(target="torch")
    def with_options(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, dim=-1)

    (x,) = tensors((3, 40))
    for fn in (plain, with_options):
        torch.testing.assert_close(fn(x * 100), torch.softmax(x * 100, dim=-1), rtol=1e-5, atol=1e-6)


def test_what_is_not_understood_falls_back_with_one_warning() -> None:
    @mg.superoptimize
    def strange(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(x) @ x

    (x,) = tensors((4, 4))
    with pytest.warns(FallbackWarning, match="linalg_inv") as caught:
        found = strange(x)
    torch.testing.assert_close(found, torch.linalg.inv(x) @ x)
    assert "strange" in str(caught[0].message)
    assert "test_decorator.py" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strange(x)
    assert "linalg_inv" in strange.report


def test_strict_raises_instead() -> None:
    fast = mg.superoptimize(lambda x: torch.linalg.inv(x), strict=True)
    with pytest.raises(UnsupportedOpError, match="linalg_inv"):
        fast(tensors((4, 4))[0])


def test_errors_of_the_original_are_its_own() -> None:
    fast = mg.superoptimize(gated)
    with pytest.raises(TypeError, match="missing"):
        fast(tensors((4, 4))[0])
    x, w = tensors((4, 5), (6, 7))
    with pytest.raises(RuntimeError):
        fast(x, w, w)


def test_module_with_weights() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.RMSNorm(16, eps=1e-6)
            self.up = torch.nn.Linear(16, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.gelu(self.up(self.norm(x)))

    torch.manual_seed(0)
    block = Block().eval()
    fast = mg.superoptimize(block)
    (x,) = tensors((5, 16))
    torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        block.up.weight.mul_(2.0)
    torch.testing.assert_close(fast(x), block(x), rtol=1e-4, atol=1e-5)


def test_gradients_flow_on_the_torch_target() -> None:
    x, w1, w2 = (t.requires_grad_() for t in tensors((3, 8), (8, 8), (8, 8)))
    wanted = torch.autograd.grad(gated(x, w1, w2).sum(), (x, w1, w2))
    given = torch.autograd.grad(mg.superoptimize(gated)(x, w1, w2).sum(), (x, w1, w2))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_methods_and_several_outputs() -> None:
    class Model:
        scale = 2.0

        @mg.superoptimize
        def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x * self.scale, (x * x).sum(dim=-1)

    (x,) = tensors((3, 8))
    model = Model()
    first, second = model.both(x)
    assert model.both is model.both
    assert model.both.result.graph.kernels()
    torch.testing.assert_close(first, x * 2)
    torch.testing.assert_close(second, (x * x).sum(dim=-1))
