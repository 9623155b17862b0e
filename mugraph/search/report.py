"""What a search did and why it stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from mugraph.errors import GraphError, ParseError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.search.cost import Device
from mugraph.typed import fit

if TYPE_CHECKING:
    from mugraph.search.answers import Answer

SCHEMA_VERSION = 1
WIDTH = 118  # of a line of an explanation


def decoded(hint: Any, data: Any) -> Any:
    """JSON data as a value of a declared type: what `asdict` took apart, put together again.  Raises ValueError,
    TypeError, KeyError or AttributeError for what it cannot have come from.

    >>> decoded(StopReason, {"kind": "NodeLimit", "limit": 4000})
    StopReason(kind='NodeLimit', limit=4000)
    """
    args = get_args(hint)
    if data is None:
        return fit(hint, None)
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: decoded(hints[f.name], data[f.name]) for f in fields(hint) if f.name in data})
    if get_origin(hint) in (Union, UnionType):
        return decoded(next(h for h in args if h is not NoneType), data)
    if get_origin(hint) is tuple and isinstance(data, list | tuple):
        kinds = args[:1] * len(data) if args[-1] is Ellipsis else args
        return tuple(decoded(h, x) for h, x in zip(kinds, data, strict=True))
    if get_origin(hint) is Mapping:
        return {k: decoded(args[1], x) for k, x in data.items()}
    return fit(hint, data)


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
class LawStep:
    """One step from a value to what it is made of: `name` = `made`, by `law`, where the value is `formula`."""

    name: str
    law: str
    made: str
    formula: str


@dataclass(frozen=True)
class Written:
    """An output as the program writes it, and the named laws that give the form that was used, each with it."""

    name: str
    formula: str
    laws: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class KernelCost:
    """The prediction for one launch of the chosen plan.  Seconds; `terms` are the limits that act on it, and no launch
    that reads and writes the same is faster than `floor_seconds`.  `steps` are the laws that it follows from."""

    name: str
    seconds: float
    bound: str
    terms: Mapping[str, float]
    floor_seconds: float = 0.0
    steps: tuple[LawStep, ...] = ()

    @property
    def percent_of_floor(self) -> float:
        return 100 * self.floor_seconds / self.seconds if self.seconds else 100.0


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


Verify = Callable[[Program, KernelGraph], object]


@dataclass(frozen=True)
class Asked:
    """What a search was asked, so that more can be asked about it.  `verify` raises VerificationError."""

    program: Program
    on: Device
    verify: Verify | None = None


@dataclass(frozen=True)
class SearchReport:
    """Counts and times of one search.

    classes, edges      the closure: values, and ways to compute them (by rule)
    deduplicated        expressions that met in a class which another expression had made
    configurations      assignments of roles that were tried
    states              entry sets that the extraction expanded
    pruned              what was cut, by reason: values (abstraction), configurations and extractions (infeasible,
                        bound), derivations that fit the device at no tile sizes (tile)
    seconds             wall time by phase; memory: the most bytes in use in each phase, where it was measured (neither
                        counts in equality)
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
    written: tuple[Written, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    memory: Mapping[str, int] | None = field(default=None, compare=False)
    asked: Asked | None = field(default=None, compare=False, repr=False)

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
        """Plain data for JSON; `from_dict` reads it back."""
        data = asdict(replace(self, asked=None))
        del data["asked"]
        return {
            "schema_version": SCHEMA_VERSION,
            **data,
            "stop": str(self.stop),
            "stop_limit": self.stop.limit,
            "reproducible": self.stop.reproducible,
            "percent_of_floor": self.percent_of_floor,
            "ahead_seconds": self.ahead_seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SearchReport:
        """The report that `to_dict` wrote, but for what it was asked.  Raises ParseError for another schema version,
        or data that is no report."""
        if not isinstance(data, Mapping):
            raise ParseError(f"{type(data).__name__} is no report of a search", remedy="give what to_dict gave")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ParseError(
                f"the report has schema version {data.get('schema_version')!r}, this is {SCHEMA_VERSION}",
                remedy="run the search again",
            )
        try:
            stop = {"kind": data["stop"].partition("(")[0], "limit": data["stop_limit"]}
            found = decoded(cls, {**data, "stop": stop, "asked": None})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ParseError(f"this is no report of a search: {error!r}", remedy="run the search again") from error
        assert isinstance(found, cls)
        return found

    def explain(self) -> str:
        """For each launch the laws that lead from the program to it, what it costs, and which limit binds."""
        lines = [
            f"{self.program}: {len(self.kernels)} launch{'es' * (len(self.kernels) != 1)}, "
            f"{1e6 * self.predicted_seconds:.1f} µs predicted on {self.device}, {self.percent_of_floor:.0f} % of floor"
        ]
        for w in self.written:
            lines.append(_fitted(f"  {w.name} = {w.formula}", "as written"))
            lines += [_fitted(f"  {w.name} = {formula}", law) for law, formula in w.laws]
        if not self.kernels:
            lines.append("it runs as it is written, as library calls: nothing beats that by the model")
        for ahead, costs in ((True, self.ahead), (False, self.kernels)):
            for k in costs:
                lines += [f"{'ahead, once: ' * ahead}{k.name}", f"  {cost_line(k)}", *_step_lines(k.steps)]
        return "\n".join(lines)

    def why_not(self, graph: KernelGraph | Program) -> Answer:
        """Why the search did not find, or did not choose, this μGraph (or the program as it stands).  Searches again.

        Raises GraphError for a report that was read back from data, and for a malformed graph."""
        if not isinstance(graph, Program):
            raise GraphError(f"{type(graph).__name__} is no μGraph", remedy="give a KernelGraph or a Program")
        if self.asked is None:
            raise GraphError("the report does not hold the program that it is about", remedy="ask Result.why_not")
        from mugraph.search.why import why_not

        return why_not(self.asked.program, graph, self, on=self.asked.on, verify=self.asked.verify)

    def __str__(self) -> str:
        edges = ", ".join(f"{n} {rule}" for rule, n in sorted(self.edges.items()))
        pruned = ", ".join(f"{n} {reason}" for reason, n in sorted(self.pruned.items()) if n) or "none"
        times = ", ".join(f"{phase} {1e3 * s:.0f} ms" for phase, s in self.seconds.items())
        stop = str(self.stop) if self.stop.reproducible else f"{self.stop} (not reproducible)"
        lines = [
            f"search of {self.program}: {stop}, {1e3 * self.total_seconds:.0f} ms ({times})",
            f"  memory: {self._memory()}",
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

    def _memory(self) -> str:
        if self.memory is None:
            return "not measured"
        return ", ".join(f"{phase} {size / 2**20:.1f} MiB" for phase, size in self.memory.items())


def cost_line(k: KernelCost) -> str:
    """The time of a launch, the limit that binds, the others that matter, and the percentage of its floor."""
    others = sorted((n for n in k.terms if n != k.bound), key=lambda n: -k.terms[n])
    parts = [f"{n} {1e6 * k.terms[n]:.1f}" for n in others if k.terms[n] >= 0.05 * k.seconds]
    text = f"{1e6 * k.seconds:.1f} µs, bound by {k.bound} {1e6 * k.terms.get(k.bound, 0.0):.1f}"
    return f"{text}{'; ' * bool(parts)}{', '.join(parts)}; {k.percent_of_floor:.0f} % of its floor"


def _step_lines(steps: tuple[LawStep, ...]) -> list[str]:
    made = [f"{s.name} = {s.made}" for s in steps]
    left = min(max(map(len, made), default=0), 48)
    law = max((len(s.law) for s in steps), default=0)
    return [_fitted(f"  {m:<{left}}  {s.law:<{law}}  {s.formula}") for m, s in zip(made, steps, strict=True)]


def _fitted(text: str, remark: str = "") -> str:
    """The text in one line, its end left out where it is too long, and a remark behind it."""
    room = WIDTH - (len(remark) + 4 if remark else 0)
    text = text if len(text) <= room else text[: room - 1] + "…"
    return f"{text}    {remark}" if remark else text
