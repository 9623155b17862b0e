"""Calls on a device from several streams and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from benchmarks.checks import in_threads, listed
from tests.gpu.results import call_of, drawn, every_program, every_way

pytestmark = pytest.mark.gpu
SLEEP = 200_000_000  # clock cycles, about 0.1 s

Call = Callable[..., Any]


def after_late_inputs(call: Call, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The results of a call on a stream of its own whose inputs arrive on that stream after the call was made."""
    late = [torch.zeros_like(t) for t in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        for place, t in zip(late, inputs, strict=True):
            place.copy_(t)
        found = listed(call(*late))
    torch.cuda.synchronize()
    return found


@every_way
@every_program
def test_kernels_run_on_the_current_stream(name: str, way: str) -> None:
    result, call = call_of(name, way)
    inputs = drawn(result, 17)
    expected = listed(call(*inputs))
    torch.testing.assert_close(after_late_inputs(call, inputs), expected)


def test_a_call_on_another_stream_is_noticed() -> None:
    result, call = call_of("gated_mlp", "cubins")

    def elsewhere(*inputs: torch.Tensor) -> Any:
        with torch.cuda.stream(torch.cuda.default_stream()):
            return call(*inputs)

    inputs = drawn(result, 17)
    expected = listed(call(*inputs))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(after_late_inputs(elsewhere, inputs), expected)


@every_way
@every_program
def test_two_threads_with_two_streams_compute_what_one_does(name: str, way: str) -> None:
    result, call = call_of(name, way)
    in_threads(call, [drawn(result, 5, 1), drawn(result, 17, 2)], 50, lambda: torch.cuda.stream(torch.cuda.Stream()))


@every_way
def test_fresh_threads_without_a_stream_compute_what_one_does(way: str) -> None:
    result, call = call_of("gqa", way)
    in_threads(call, [drawn(result, 5, 1), drawn(result, 17, 2)], 50, nullcontext)
