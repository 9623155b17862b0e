"""What a search did and why it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def decoded(hint: Any, data: Any) -> Any:
    """JSON data as a value of a declared type: what `asdict` took apart, put together again.

    >>> decoded(StopReason, {"kind": "NodeLimit", "limit": 4000})
    StopReason(kind='NodeLimit', limit=4000)
    """
    args = get_args(hint)
    if data is None:
        return None
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: decoded(hints[f.name], data[f.name]) for f in fields(hint) if f.name in data})
    if get_origin(hint) in (Union, UnionType):
        return decoded(next(h for h in args if h is not NoneType), data)
    if get_origin(hint) is tuple:
        kinds = args[:1] * len(data) if args[-1] is Ellipsis else args
        return tuple(decoded(h, x) for h, x in zip(kinds, data, strict=True))
    if get_origin(hint) is Mapping:
        return {k: decoded(args[1], x) for k, x in data.items()}
    return data


@dataclass(frozen=True)
class StopReason:
    """Saturated: the whole space was covered.  NodeLimit, EntryLimit, StateLimit, SegmentLimit: a budget of the space
    ran out.  MemoryLimit: the values of the closure took that many 64-bit words (`closure.MOST_WORDS`).
    TimeLimit, Interrupted: the best so far was returned (such a run is not reproducible)."""

    kind: str
    limit: float | None = None

    @property
    def reproducible(self) -> bool:
        """Whether another run stops at the same place: budgets are counts, a clock is not."""
        return self.kind not in ("TimeLimit", "Interrupted")

    def __str__(self) -> str:
        return self.kind if self.limit is None else f"{self.kind}({self.limit:g})"


@dataclass(frozen=True)
class KernelCost:
    """The prediction for one launch of the chosen plan.  Seconds; `terms` are the limits that act on it."""

    name: str
    seconds: float
    bound: str
    terms: Mapping[str, float]


@dataclass(frozen=True)
class CandidateReport:
    """One complete plan that was considered."""

    structure: str
    seconds: float
    verdict: str


@dataclass(frozen=True)
class StructureReport:
    """The best structure from one size of the symbolic dimensions to another (None: without end), and its predicted
    seconds at the size `at`."""

    low: int
    high: int | None
    at: int
    structure: str
    seconds: float

    def __str__(self) -> str:
        sizes = f"{self.low} to {self.high}" if self.high is not None else f"{self.low} and more"
        return f"sizes {sizes}: {self.structure} ({1e6 * self.seconds:.1f} µs at {self.at})"


@dataclass(frozen=True)
class SegmentReport:
    """One segment of a large program: its operators (those of the order from `start` on), what it gives, the structure
    that was found, and the segment before it that is the same up to names (None: it was searched for itself)."""

    start: int
    operators: int
    gives: tuple[str, ...]
    program: str
    structure: str
    seconds: float
    stop: str
    shared_with: int | None = None

    def __str__(self) -> str:
        shared = "" if self.shared_with is None else f", as segment {self.shared_with}"
        values = ", ".join(self.gives)
        return f"{values} ({self.operators} operators{shared}): {1e6 * self.seconds:.1f} µs, {self.structure}"


@dataclass(frozen=True)
class SearchReport:
    """Counts and times of one search.

    classes, edges      the closure: values, and ways to compute them (by rule)
    deduplicated        expressions that met in a class which another expression had made
    configurations      assignments of roles that were tried
    states              entry sets that the extraction expanded
    pruned              configurations and extractions cut, by reason
    seconds             wall time by phase (does not count in equality)
    predicted_seconds   of each call of the chosen plan, on the device named; floor_seconds: no kernel is faster
    ahead               what is done once, on constant inputs alone, and not counted in predicted_seconds
    segments            of a program too large to be searched as a whole; counts are then those of the searches made
    """

    program: str
    device: str
    space: str
    stop: StopReason
    classes: int
    edges: Mapping[str, int]
    deduplicated: int
    configurations: int
    states: int
    pruned: Mapping[str, int]
    verified: int
    refused: int
    seeds: tuple[str, ...]
    kernels: tuple[KernelCost, ...]
    candidates: tuple[CandidateReport, ...]
    predicted_seconds: float
    floor_seconds: float
    notes: tuple[str, ...] = ()
    structures: tuple[StructureReport, ...] = ()
    ahead: tuple[KernelCost, ...] = ()
    segments: tuple[SegmentReport, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.floor_seconds / self.predicted_seconds if self.predicted_seconds else 100.0

    @property
    def ahead_seconds(self) -> float:
        """What the work done ahead costs, once for each state of the constant inputs."""
        return sum(k.seconds for k in self.ahead)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "stop": str(self.stop),
            "reproducible": self.stop.reproducible,
            "percent_of_floor": self.percent_of_floor,
            "ahead_seconds": self.ahead_seconds,
        }

    def __str__(self) -> str:
        edges = ", ".join(f"{n} {rule}" for rule, n in sorted(self.edges.items()))
        pruned = ", ".join(f"{n} {reason}" for reason, n in sorted(self.pruned.items())) or "none"
        times = ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in self.seconds.items())
        stop = str(self.stop) if self.stop.reproducible else f"{self.stop} (not reproducible)"
        lines = [
            f"search of {self.program}: {stop}, {1e3 * self.total_seconds:.0f} ms ({times})",
            f"  {self.classes} classes, edges: {edges}; {self.deduplicated} deduplicated",
            f"  {self.configurations} role assignments, {self.states} states; pruned: {pruned}",
            f"  seeds: {', '.join(self.seeds)}; {self.verified} verified, {self.refused} refused",
            f"  predicted on {self.device}: {1e6 * self.predicted_seconds:.1f} µs, "
            f"{self.percent_of_floor:.0f} % of floor ({1e6 * self.floor_seconds:.1f} µs)",
        ]
        lines += [f"    {k.name}: {1e6 * k.seconds:.1f} µs, bound by {k.bound}" for k in self.kernels]
        if self.ahead:
            lines.append(f"  ahead, once while the constants stay as they are: {1e6 * self.ahead_seconds:.1f} µs")
            lines += [f"    {k.name}: {1e6 * k.seconds:.1f} µs, bound by {k.bound}" for k in self.ahead]
        lines += [f"  {c.verdict}: {1e6 * c.seconds:.1f} µs  {c.structure}" for c in self.candidates]
        if self.segments:
            alone = sum(s.shared_with is None for s in self.segments)
            lines.append(f"  {len(self.segments)} segments, {alone} different:")
            lines += [f"    {i}: {s}" for i, s in enumerate(self.segments)]
        if len(self.structures) > 1:
            lines += [f"  {s}" for s in self.structures]
        lines += [f"  note: {n}" for n in self.notes]
        return "\n".join(lines)
