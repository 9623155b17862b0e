"""Timings are taken in turns, and their ratios within rounds."""

import time

import pytest
import torch

from mugraph.runtime import bench
from mugraph.runtime.bench import Spread, Timings, measure, spread_of


def test_a_slower_function_measures_slower() -> None:
    timings = measure({"slow": lambda: time.sleep(2e-3), "fast": lambda: time.sleep(2e-4)}, 7, device="cpu")
    assert timings.ratio("slow", "fast").median > 2
    assert timings.ratio("fast", "slow").median < 0.5
    assert timings.fastest() == "fast"
    assert timings.seconds("slow").low >= 2e-3


def test_ratios_are_paired_within_rounds() -> None:
    """A machine that slows down tenfold half-way changes the times but not the ratios."""
    timings = Timings({"a": (2.0, 2.0, 20.0, 20.0), "b": (1.0, 1.0, 10.0, 10.0)})
    assert timings.ratio("a", "b") == Spread(2.0, 2.0, 2.0)
    assert timings.seconds("a") == Spread(11.0, 2.0, 20.0)


def test_every_function_begins_a_round_in_turn() -> None:
    order: list[str] = []
    measure({name: lambda name=name: order.append(name) for name in "abc"}, 3, device="cpu", min_seconds=0.0)
    assert "".join(order[-9:]) == "abcbcacab"


def test_short_functions_are_called_many_times_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock) * 1e-5)
    timings = measure({"f": lambda: calls.append(1)}, 2, device="cpu", min_seconds=1e-4)
    assert len(calls) == 2 + 2 * 10
    assert timings.samples["f"] == pytest.approx((1e-6, 1e-6))


def test_the_spread_is_the_quartiles() -> None:
    assert spread_of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert spread_of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="no samples"):
        spread_of([])


def test_timings_print_a_line_for_each_function() -> None:
    timings = Timings({"eager": (4e-6, 4e-6), "ours": (2e-6, 2e-6)})
    assert str(timings) == "eager  4 [4, 4] us\nours   2 [2, 2] us  2 [2, 2]x"


def test_there_must_be_something_to_measure() -> None:
    with pytest.raises(ValueError, match="needs a function"):
        measure({}, 3)
    with pytest.raises(ValueError, match="a round"):
        measure({"f": lambda: None}, 0)


@pytest.mark.gpu
def test_a_gpu_is_timed_in_a_graph() -> None:
    small, large = torch.ones(1 << 10, device="cuda"), torch.ones(1 << 28, device="cuda")
    timings = measure({"large": lambda: large.mul_(1.0), "small": lambda: small.mul_(1.0)}, 5)
    assert timings.ratio("large", "small").low > 10
    synchronising = measure({"item": lambda: small[0].item()}, 3)
    assert synchronising.seconds("item").median > 0
