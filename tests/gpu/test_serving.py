"""Calls on a device in CUDA graphs, into given results, and with empty batches."""

from __future__ import annotations

import pytest
import torch

import mugraph as mg
from benchmarks.checks import listed
from mugraph.errors import LaunchError
from tests.gpu.results import call_of, drawn, every_program, every_way

pytestmark = pytest.mark.gpu


@every_way
@every_program
@pytest.mark.parametrize("into", [False, True], ids=["allocates", "out"])
def test_a_captured_call_replays_with_other_inputs(name: str, way: str, into: bool) -> None:
    result, call = call_of(name, way)
    first, second = drawn(result, 17, 1), drawn(result, 17, 2)
    for i, a, b in zip(result.program.inputs, first, second, strict=True):
        if i.constant:  # what is computed ahead of constants is not computed again in a replay
            b.copy_(a)
    wanted = [[t.clone() for t in listed(call(*inputs))] for inputs in (first, second)]
    held = [t.clone() for t in first]
    out = [torch.full_like(t, torch.nan) for t in wanted[0]]
    named = {"out": out[0] if len(out) == 1 else tuple(out)} if into else {}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call(*held, **named)  # Triton compiles at the first call, which a capture forbids
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = listed(call(*held, **named))
    for inputs, expected in zip((first, second, first), (*wanted, wanted[0]), strict=True):
        for place, t in zip(held, inputs, strict=True):
            place.copy_(t)
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(captured, expected)
        if into:
            assert [t.data_ptr() for t in captured] == [t.data_ptr() for t in out]
    torch.testing.assert_close(listed(call(*held)), wanted[0])  # and calls beside the graph go on


@every_program
def test_the_first_call_after_warmup_may_be_captured(name: str) -> None:
    result, call = call_of(name, "cubins")
    inputs = drawn(result, 17)
    for t in inputs:  # cuBLAS, which some of them call, starts at its first product, which a capture forbids
        torch.mm(*(torch.ones(16, 16, dtype=t.dtype, device=t.device) for _ in range(2)))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = listed(call(*inputs))
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, listed(call_of(name, "Triton")[1](*inputs)))
    torch.testing.assert_close(listed(call(*inputs)), captured)


@every_way
def test_an_empty_batch_is_refused_and_nothing_is_lost(way: str) -> None:
    """Symbolic sizes begin at 1."""
    result, call = call_of("gated_mlp", way)
    inputs = drawn(result, 5)
    expected = call(*inputs)
    with pytest.raises(LaunchError, match=r"B must lie in 1\.\."):
        call(inputs[0][:0], *inputs[1:])
    torch.testing.assert_close(call(*inputs), expected)


def take_an_empty_batch(device: str) -> None:
    """A PyTorch function with an empty batch runs as it was written."""

    @mg.superoptimize(dynamic={"x": {0: mg.Dim("rows", 1, 64)}})
    def gated(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x @ w1) * (x @ w2)

    x, w1, w2 = (torch.randn(shape, device=device) for shape in ((5, 64), (64, 96), (64, 96)))
    torch.testing.assert_close(gated(x, w1, w2), gated.original(x, w1, w2), rtol=1e-4, atol=1e-3)
    assert gated(x[:0], w1, w2).shape == (0, 96)
    torch.testing.assert_close(gated(x, w1, w2), gated.original(x, w1, w2), rtol=1e-4, atol=1e-3)


def test_a_pytorch_function_takes_an_empty_batch() -> None:
    take_an_empty_batch("cuda")
