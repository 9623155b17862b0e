"""Timing that compares like with like: every function in the same run, in turns, as medians with their spread.

    timings = measure({"eager": eager, "ours": ours}, repeats=50)
    timings.ratio("eager", "ours")            # 1.6 [1.5, 1.7]: ours is 1.6 times as fast

Each round takes one sample of each function, in an order that changes: slow phases of the machine meet all of them, and
none always comes after the same other one, which leaves the caches as it likes.  Ratios are taken within rounds.  On a
GPU a sample is one replay of a CUDA graph that holds several calls, as kernels are served, and is timed by events; a
function that cannot be captured is timed as it is.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mugraph.ir.axes import size_value
from mugraph.ir.graph import Program
from mugraph.ir.types import TORCH_NAMES
from mugraph.verify.numeric import index_range

if TYPE_CHECKING:
    import torch

Function = Callable[[], object]
Sampler = Callable[[], float]

CONFIDENCE = 0.95
LEAST_SAMPLES = 6  # 2 · 2^-6 is below 1 - CONFIDENCE
_MOST_CALLS = 1000
GRAPH_CALLS = 20  # of a function in one CUDA graph


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


def spread_of(samples: Sequence[float]) -> Spread:
    """Raises ValueError without samples.

    >>> print(spread_of([1.0, 2.0, 3.0, 4.0, 100.0]))
    3 [2, 4]
    """
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def interval_of(samples: Sequence[float]) -> Spread:
    """The median with an interval that holds the true one in at least 95 of 100 cases, whatever the distribution: the
    order statistics between which a binomial(n, 1/2) falls (Conover, Practical Nonparametric Statistics, section 3.2).
    Raises ValueError for fewer than LEAST_SAMPLES, which are too few for any such interval.

    >>> print(interval_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    3.5 [1, 6]
    """
    n = len(samples)
    if n < LEAST_SAMPLES:
        raise ValueError(f"{n} samples are too few for an interval: {LEAST_SAMPLES} at least")
    below = 0  # samples left out on each side
    outside = 2 * 0.5**n
    while outside + 2 * math.comb(n, below + 1) * 0.5**n <= 1 - CONFIDENCE:
        below += 1
        outside += 2 * math.comb(n, below) * 0.5**n
    ordered = sorted(samples)
    return Spread(statistics.median(ordered), ordered[below], ordered[n - 1 - below])


@dataclass(frozen=True)
class Timings:
    """Seconds of one call: for each function a sample of each round, rounds in the same order."""

    samples: Mapping[str, tuple[float, ...]]

    def seconds(self, name: str) -> Spread:
        return spread_of(self.samples[name])

    def ratio(self, baseline: str, name: str) -> Spread:
        """How many times as fast as the baseline, round by round."""
        return spread_of(self.ratios(baseline, name))

    def ratios(self, baseline: str, name: str) -> list[float]:
        """How many times as fast as the baseline, in each round."""
        pairs = zip(self.samples[baseline], self.samples[name], strict=True)
        return [a / b for a, b in pairs]

    def fastest(self) -> str:
        """The function with the least median; of equal ones the first."""
        return min(self.samples, key=lambda name: self.seconds(name).median)

    def __str__(self) -> str:
        """A line for each function: microseconds, and the ratio to the first."""
        first = next(iter(self.samples))
        width = max(map(len, self.samples))
        lines = []
        for name in self.samples:
            s = self.seconds(name)
            time_text = f"{Spread(s.median * 1e6, s.low * 1e6, s.high * 1e6)} us"
            lines.append(f"{name:<{width}}  {time_text}" + ("" if name == first else f"  {self.ratio(first, name)}x"))
        return "\n".join(lines)


def random_inputs(program: Program, sizes: Mapping[str, int], device: str, seed: int = 0) -> list[torch.Tensor]:
    """Normal draws of deviation 1 in the declared types; constants are scaled as 1/sqrt(k) by their first size.
    Integers index what they gather from."""
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    found = []
    for i in program.inputs:
        shape = [size_value(s, sizes) for s in i.tensor.shape]
        dtype = getattr(torch, TORCH_NAMES[i.storage.dtype])
        if dtype is torch.bool:
            found.append(torch.rand(shape, generator=generator, device=device) < 0.7)
        elif not i.tensor.dtype.is_float:
            low, high = index_range(program, i, sizes)
            found.append(torch.randint(low, high, shape, generator=generator, device=device).to(dtype))
        else:
            scale = shape[0] ** -0.5 if i.constant and shape else 1.0
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32) * scale
            found.append(drawn.to(dtype))
    return found


def rotation(program: Program, sizes: Mapping[str, int], device: str) -> list[list[torch.Tensor]]:
    """Copies of the inputs that together exceed twice the L2 cache, at most one for each captured call."""
    import torch

    first = random_inputs(program, sizes, device)
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    one = sum(t.numel() * t.element_size() for t in first)
    count = min(GRAPH_CALLS, math.ceil(2 * cache / max(one, 1)) + 1)
    return [first, *([t.clone() for t in first] for _ in range(count - 1))]


def rotating(f: Callable[..., object], copies: Sequence[Sequence[torch.Tensor]]) -> Function:
    """`f` on the next copy at each call."""
    turn = 0

    def call() -> object:
        nonlocal turn
        turn += 1
        return f(*copies[turn % len(copies)])

    return call


def measure(
    functions: Mapping[str, Function], repeats: int = 30, *, device: str | None = None, min_seconds: float = 2e-4
) -> Timings:
    """Samples of each function in `repeats` rounds.

    The functions take nothing and do the same work again each time.  `device` is "cpu" or "cuda" (default: cuda where
    it is available).  On a CPU a sample covers as many calls as take `min_seconds` together.
    Raises ValueError for no functions or no rounds.
    """
    if not functions or repeats < 1:
        raise ValueError("measure needs a function and a round")
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    make = _cuda_sampler if device == "cuda" else lambda f: _cpu_sampler(f, min_seconds)
    samplers = {name: make(f) for name, f in functions.items()}
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(repeats):
        start = i // 2 % len(names)
        order = names[start:] + names[:start]
        for name in order[:: -1 if i % 2 else 1]:
            samples[name].append(samplers[name]())
    return Timings({name: tuple(s) for name, s in samples.items()})


def _cpu_sampler(f: Function, min_seconds: float) -> Sampler:
    f()  # what is made at the first call is not what is measured
    once = _timed(f, 1)
    calls = min(max(1, math.ceil(min_seconds / max(once, 1e-9))), _MOST_CALLS)
    return lambda: _timed(f, calls)


def _timed(f: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - start) / calls


def _cuda_sampler(f: Function) -> Sampler:
    import torch

    make_stream: Any = torch.cuda.Stream
    stream = make_stream()
    with torch.cuda.stream(stream):  # warm up where it is captured
        for _ in range(3):
            f()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(GRAPH_CALLS):
                f()
    except RuntimeError:
        torch.cuda.synchronize()
        return lambda: _event_timed(lambda: [f() for _ in range(GRAPH_CALLS)]) / GRAPH_CALLS
    graph.replay()
    return lambda: _event_timed(graph.replay) / GRAPH_CALLS


def _event_timed(f: Function) -> float:
    import torch

    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    f()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
