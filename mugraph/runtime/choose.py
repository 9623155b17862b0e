"""Which of several forms of a program runs on a CPU: all are measured in the same run, in turns, and one that is not
surely faster than the program as it stands is not taken.

    candidates = [Candidate("as it stands", eager, written=True), Candidate("calls", ours, correct=agrees)]
    choice = choose(candidates, inputs, sizes={"b": 16})
    choice.chosen                              # "calls"
    print(choice)                              # what each took, and why it was not taken

A candidate that raises, or that does not agree with float64, is never chosen.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mugraph.errors import MugraphError
from mugraph.runtime.bench import LEAST_SAMPLES, Timings, interval_of, measure

ROUNDS = 31
SECONDS = 4.0  # that the rounds of all candidates may take together, as long as there are LEAST_SAMPLES of them
MARGIN = 1.02  # what runs must be faster by that much than the program as it stands
HOPELESS = 3.0  # times as slow as the fastest, both at their best: such a candidate is measured no further
FIRST = 5  # rounds from which that is seen

Run = Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """A form of the program.  `run` takes the inputs.  `written`: the program as it stands, which needs no margin.
    `correct` says whether what `run` gives is right; None: it is so by definition."""

    name: str
    run: Run = field(compare=False)
    written: bool = False
    correct: Callable[[Run], bool] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Measured:
    """What became of a candidate.  `seconds`: the median of one call.  `ratio`: how many times as fast as the fastest
    form of the program as it stands, with the 95 % interval of the median; None where it was given up before."""

    name: str
    written: bool
    verdict: str
    seconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.name}: {self.verdict}"
        text = f"{self.name}: {_seconds_text(self.seconds)}"
        if self.ratio is not None:
            text += f", {self.ratio:.2f} [{self.low:.2f}, {self.high:.2f}] times as fast"
        return f"{text}: {self.verdict}"


@dataclass(frozen=True)
class Choice:
    """Which candidate runs, where that was measured and what was measured.  `sizes`: of symbolic dimensions."""

    chosen: str
    machine: str
    sizes: Mapping[str, int]
    rows: tuple[Measured, ...]

    @property
    def written(self) -> bool:
        """Whether the program as it stands runs."""
        return next(r.written for r in self.rows if r.name == self.chosen)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Any) -> Choice:
        """Raises KeyError, TypeError or ValueError for what `to_dict` does not make."""
        rows = tuple(Measured(**row) for row in data["rows"])
        found = Choice(str(data["chosen"]), str(data["machine"]), dict(data["sizes"]), rows)
        times = [x for r in rows for x in (r.seconds, r.ratio, r.low, r.high)]
        if not all(x is None or (type(x) is float and x > 0) for x in times):
            raise ValueError("a time is no number")
        if [r.name for r in rows if r.verdict == "chosen"] != [found.chosen]:
            raise ValueError(f"{found.chosen!r} was not chosen")
        return found

    def __str__(self) -> str:
        at = "".join(f", {name} = {size}" for name, size in self.sizes.items())
        return "\n".join([f"measured on {self.machine}{at}", *(f"  {row}" for row in self.rows)])


def machine_text() -> str:
    """The processor, and the threads that PyTorch uses: what a measurement holds for."""
    import torch

    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return f"{platform.machine()}, {os.cpu_count()} cores"


def choose(
    candidates: Sequence[Candidate],
    inputs: Sequence[Any],
    *,
    sizes: Mapping[str, int] | None = None,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda _: None,
) -> Choice:
    """The fastest candidate on these inputs.  One that is not the program as it stands must be surely faster: the 95 %
    interval of its ratios to the fastest form of that program, taken round by round, lies above MARGIN.

    Raises MugraphError where no form of the program as it stands runs.
    """
    running: dict[str, Candidate] = {}
    verdicts: dict[str, str] = {}
    for c in candidates:
        say(f"measuring {c.name}")
        if fault := _fault(c, inputs):
            verdicts[c.name] = fault
        else:
            running[c.name] = c
    if not any(c.written for c in running.values()):
        raise MugraphError(f"the program as it stands does not run: {verdicts}", remedy="call it by itself to see why")
    first = _timed(running, inputs, FIRST)
    seconds = {n: min(samples) for n, samples in first.samples.items()}
    best_written = min((n for n in running if running[n].written), key=seconds.__getitem__)
    for name in [n for n in running if n != best_written and seconds[n] > HOPELESS * min(seconds.values())]:
        verdicts[name] = "slower by far"
        del running[name]
    count = max(LEAST_SAMPLES, min(rounds, int(SECONDS / sum(seconds[n] for n in running))))
    timings = _timed(running, inputs, count)
    medians = {n: timings.seconds(n).median for n in running}
    base = min((n for n in running if running[n].written), key=medians.__getitem__)
    ratios = {n: interval_of(timings.ratios(base, n)) for n in running}
    sure = [n for n in running if not running[n].written and ratios[n].low > MARGIN]
    chosen = min([base, *sure], key=medians.__getitem__)
    rows = []
    for c in candidates:
        verdict = verdicts.get(c.name) or _verdict(c, chosen, ratios[c.name].median)
        if c.name in running:
            r = ratios[c.name]
            rows.append(Measured(c.name, c.written, verdict, medians[c.name], r.median, r.low, r.high))
        else:
            rows.append(Measured(c.name, c.written, verdict, seconds.get(c.name)))
    return Choice(chosen, machine_text(), dict(sizes or {}), tuple(rows))


def _fault(c: Candidate, inputs: Sequence[Any]) -> str:
    """Why a candidate is out of the question, or nothing."""
    try:
        c.run(*inputs)
        if c.correct is not None and not c.correct(c.run):
            return "wrong: it does not agree with float64"
    except Exception as error:  # whatever a compiler, or a source, may raise
        return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    return ""


def _verdict(c: Candidate, chosen: str, ratio: float) -> str:
    if c.name == chosen:
        return "chosen"
    if not c.written and ratio > 1:
        return "not surely faster, or not the fastest"
    return "slower"


def _timed(candidates: Mapping[str, Candidate], inputs: Sequence[Any], rounds: int) -> Timings:
    def bound(run: Run) -> Callable[[], object]:
        return lambda: run(*inputs)

    return measure({n: bound(c.run) for n, c in candidates.items()}, rounds, device="cpu")


def _seconds_text(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
