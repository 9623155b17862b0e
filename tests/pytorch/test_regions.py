"""Modules cut into programs and PyTorch code between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mugraph.errors import CaptureError
from mugraph.pytorch.regions import compose, graph_text
from mugraph.runtime.load import load_module


class Wrapped(torch.nn.Module):
    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 6))
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def composed(forward: Callable[..., Any], *args: Any) -> tuple[Any, Wrapped]:
    model = Wrapped(forward)
    found = compose(model, args, "m")
    run = load_module(f"import torch\n\n\n{found.text(())}\n", "composed").composed
    results = run(*(model.get_parameter(w) for w in found.weights), *args)
    expected = model(*args)
    torch.testing.assert_close(list(results), [expected] if found.result == "one" else list(expected))
    return found, model


def test_what_is_understood_is_one_region() -> None:
    found, _ = composed(lambda self, x: torch.relu(x @ self.weight).sum(-1), torch.randn(4, 6))
    (region,) = found.regions
    assert region.operators == ("aten.matmul.default", "aten.relu.default", "aten.sum.dim_IntList")
    assert (found.left, found.weights, found.result) == ((), ("weight",), "one")
    assert found.text({region.name}).count("def ") == 1
    assert "run_part_0(" in found.text({region.name})


def test_what_is_not_understood_lies_between_regions() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.sort(torch.relu(x) @ self.weight, dim=-1).values * 2.0)

    found, _ = composed(forward, torch.randn(4, 6))
    assert [r.operators[-1] for r in found.regions] == ["aten.matmul.default", "aten.tanh.default"]
    assert found.left == ("aten.sort.default",)


def test_an_operator_that_capture_refuses_is_left_out_of_the_next_cut() -> None:
    found, _ = composed(lambda self, x: (torch.relu(x @ self.weight) > 0).to(torch.complex64), torch.randn(4, 6))
    assert found.regions
    assert not any("_to_copy" in name for r in found.regions for name in r.operators)
    assert "complex64" in found.text({r.name for r in found.regions})


def test_views_alone_are_no_region() -> None:
    found, _ = composed(lambda self, x: torch.sort(x.reshape(2, 12).t(), dim=0).values, torch.randn(4, 6))
    assert found.regions == ()


def test_tuples_and_lists_and_plain_values() -> None:
    found, _ = composed(lambda self, x, n: (x * n, torch.exp(x)), torch.randn(4, 6), 3)
    assert found.result == "tuple"
    found, _ = composed(lambda self, x: [torch.exp(x), x.sort().values * float("inf")], torch.rand(4, 6) + 1)
    assert found.result == "list"


def counts(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        self.weight.add_(1)
    return x


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (counts, "it writes into weight"),
        (lambda self, x: x.add_(1), "it writes into"),
        (lambda self, x: {"y": torch.exp(x)}, "it returns a dict"),
        (lambda self, x: x + torch.tensor([1.0, 2, 3, 4, 5, 6]), "no attribute of it"),
        (lambda self, x: x if x.sum() > 0 else -x, "torch.export cannot capture it"),
    ],
)
def test_what_no_function_of_tensors_stands_for_is_refused(forward: Callable[..., Any], why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        compose(Wrapped(forward), [torch.randn(4, 6)], "m")


def test_a_device_of_its_own_is_refused_unless_a_program_stands_for_it() -> None:
    args = [torch.randn(4, 6)]
    found = compose(Wrapped(lambda self, x: x + torch.randn(6, device="cpu")), args, "m")
    with pytest.raises(CaptureError, match="on a fixed device"):
        found.text({r.name for r in found.regions})
    found = compose(Wrapped(lambda self, x: torch.where(torch.ones(6, device="cpu") > 0, x, -x)), args, "m")
    with pytest.raises(CaptureError, match="on a fixed device"):
        found.text(())
    assert "device" not in found.text({r.name for r in found.regions})


def test_graphs_are_compared_as_texts() -> None:
    args = [torch.randn(4, 6)]
    dropout = Wrapped(lambda self, x: torch.nn.functional.dropout(x, training=self.training))
    assert graph_text(dropout.train(), args) != graph_text(dropout.eval(), args)
    plain = Wrapped(lambda self, x: torch.exp(x))
    assert graph_text(plain.train(), args) == graph_text(plain.eval(), args)
