"""The bodies of the device tests on a CPU: the target is `torch`, axes are short, and what they ask of torch.cuda is
stood in for.  It shows that the bodies run and that they refuse what is wrong, not that a device does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from benchmarks import checks
from mugraph.errors import LaunchError
from mugraph.ir.graph import Program
from mugraph.ir.resize import resized
from mugraph.pipeline import Result
from mugraph.runtime.bench import random_inputs
from tests.gpu import results, test_numerics, test_operators, test_serving, test_streams

Call = Callable[..., Any]
PROGRAMS = ("gqa", "constant_lora", "two_weights")


class FakeGraph:
    """A CUDA graph that makes its calls again when it is replayed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, Sequence[torch.Tensor], dict[str, Any], Any]] = []

    def replay(self) -> None:
        for call, args, named, place in self.calls:
            for into, t in zip(checks.listed(place), checks.listed(call(*args, **named)), strict=True):
                into.copy_(t)


def short(program: Program) -> Program:
    long = [a.name for a in program.axes().values() if isinstance(a.size, int) and a.size >= 256]
    return resized(program, dict.fromkeys(long, 40), {})


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    optimize = mg.optimize

    def on_cpu(program: Program, target: str, tune: str) -> Result:
        assert (target, tune) == ("cuda", "fit")
        return optimize(short(program), target="torch")

    def drawn(program: Program, sizes: dict[str, int], device: str, seed: int = 0) -> list[torch.Tensor]:
        assert device == "cuda"
        return random_inputs(program, sizes, "cpu", seed)

    capturing: list[FakeGraph] = []

    @contextmanager
    def captured(graph: FakeGraph, stream: object = None) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    def noted(call: Call) -> Call:
        def other(*args: torch.Tensor, **named: Any) -> Any:
            found = call(*args, **named)
            if capturing:
                capturing[0].calls.append((call, args, named, found))
            return found

        return other

    def call_of(name: str, way: str) -> tuple[Result, Call]:
        result, call = results.call_of(name, way)
        return result, noted(call)

    def nothing(*given: object) -> None:
        pass

    monkeypatch.setattr(mg, "optimize", on_cpu)
    for module in (results, test_numerics):
        monkeypatch.setattr(module, "random_inputs", drawn)
    for module in (test_streams, test_serving):
        monkeypatch.setattr(module, "call_of", call_of)
    reduced = checks.reduced_report
    monkeypatch.setattr(test_numerics, "reduced_report", lambda result, layout, _: reduced(result, layout, "cpu"))
    stand_ins: dict[str, Any] = {
        "CUDAGraph": FakeGraph,
        "graph": captured,
        "stream": nullcontext,
        "mem_get_info": lambda: (1 << 30, 1 << 30),
        **dict.fromkeys(("Stream", "synchronize", "default_stream", "_sleep", "empty_cache"), nothing),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("way", ["Triton", "cubins"])
def test_the_bodies_accept_what_is_right(name: str, way: str, tmp_path: Path) -> None:
    test_operators.test_an_operator_is_the_result(name, way, tmp_path)
    test_streams.test_kernels_run_on_the_current_stream(name, way)
    test_streams.test_two_threads_with_two_streams_compute_what_one_does(name, way)
    for into in (False, True):
        test_serving.test_a_captured_call_replays_with_other_inputs(name, way, into)
    test_serving.test_the_first_call_after_warmup_may_be_captured(name)


def test_the_body_for_fresh_threads_runs() -> None:
    test_streams.test_fresh_threads_without_a_stream_compute_what_one_does("cubins")


def test_the_body_for_a_pytorch_function_runs() -> None:
    test_serving.take_an_empty_batch("cpu")


def test_the_body_for_another_stream_wants_a_difference() -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_streams.test_a_call_on_another_stream_is_noticed()


def test_a_replay_that_ignores_its_inputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    once = FakeGraph.replay

    def stale(graph: FakeGraph) -> None:
        if graph.calls:
            once(graph)
        graph.calls.clear()

    monkeypatch.setattr(FakeGraph, "replay", stale)
    with pytest.raises(AssertionError):
        test_serving.test_a_captured_call_replays_with_other_inputs("gqa", "cubins", False)


def test_empty_batches_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    test_serving.test_an_empty_batch_is_refused_and_nothing_is_lost("cubins")
    monkeypatch.setattr(Result, "warmup", lambda self: lambda *given: given[0])
    with pytest.raises(pytest.fail.Exception, match=f"DID NOT RAISE .*{LaunchError.__name__}"):
        test_serving.test_an_empty_batch_is_refused_and_nothing_is_lost("cubins")


@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("name", ["gated_mlp", "cross_entropy", "rmsnorm_bwd"])
def test_the_numeric_bodies_accept_what_is_right(name: str, dtype: str) -> None:
    test_numerics.test_it_agrees_with_float64_at_true_sizes(name, dtype)
    for layout in checks.LAYOUTS:
        test_numerics.test_it_agrees_with_float64_at_reduced_odd_sizes(name, dtype, layout)


def test_the_numeric_bodies_refuse_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    emit = checks.emit
    monkeypatch.setattr(checks, "emit", lambda *given: emit(*given).replace("silu", "tanh"))
    with pytest.raises(AssertionError, match="numerics, torch on torch"):
        test_numerics.test_it_agrees_with_float64_at_reduced_odd_sizes("gated_mlp", "f16", "shifted")
    call = Result.__call__

    def half(self: Result, *given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = call(self, *given, out=out)
        return found.mul_(0.5)

    monkeypatch.setattr(Result, "__call__", half)
    with pytest.raises(AssertionError, match="cubins, dense: off by"):
        test_numerics.test_it_agrees_with_float64_at_true_sizes("gated_mlp", "f16")


def test_a_device_with_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
    with pytest.raises(pytest.skip.Exception, match="too little memory"):
        test_numerics.test_it_agrees_with_float64_at_true_sizes("gated_mlp", "f16")
