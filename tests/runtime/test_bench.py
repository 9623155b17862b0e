"""Timings are taken in turns, and their ratios within rounds."""

import math
import time

import pytest
import torch

from mugraph.runtime import bench
from mugraph.runtime.bench import Spread, Timings, interval_of, measure, spread_of


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


def test_every_function_comes_after_every_other_one_in_turn() -> None:
    order: list[str] = []
    measure({name: lambda name=name: order.append(name) for name in "abc"}, 6, device="cpu", min_seconds=0.0)
    rounds = "".join(order[-18:])
    assert [rounds[i : i + 3] for i in range(0, 18, 3)] == ["abc", "cba", "bca", "acb", "cab", "bac"]


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


def test_the_interval_of_a_median_leaves_out_as_many_samples_as_the_binomial_says() -> None:
    """Conover's table: of 6 samples none is left out, of 20 five on each side, of 31 nine."""
    for n, below in ((6, 0), (9, 1), (20, 5), (31, 9)):
        found = interval_of([float(i) for i in range(n)][::-1])
        assert (found.low, found.high) == (below, n - 1 - below)
        chance = 2 * sum(math.comb(n, i) for i in range(below + 1)) / 2**n  # that the median lies outside
        assert chance <= 0.05 < chance + 2 * math.comb(n, below + 1) / 2**n


def test_too_few_samples_have_no_interval() -> None:
    with pytest.raises(ValueError, match="too few"):
        interval_of([1.0] * 5)
