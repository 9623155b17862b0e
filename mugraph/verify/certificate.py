"""What was established about a μGraph, in a form that can be printed, stored and checked again.

A certificate names the program and the graph by the hashes of their canonical texts, the tiers reached, the bound on
the error and where it comes from, the laws that were not used, and the assumptions.  Nothing in it is implied.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy

from mugraph import __version__
from mugraph.errors import ParseError, TargetMismatchError
from mugraph.ir.graph import Program
from mugraph.ir.serialize import canonical_text

SCHEMA_VERSION = 2

Tier = Literal["tested", "proved", "bounds", "numerics"]
How = Literal["interpreted", "device", "torch"]
EXCUSED = ", and so does the source"  # ends the note of a row that `NumericReport.as_written` leaves out
NOT_ATTEMPTED = "not attempted"  # by the search, which verifies many graphs; the one that is chosen is proved
Pairs = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class DrawRecord:
    """One draw of sizes: the sizes of all axes, tiles and parts of the μGraph's axes, how many independent random
    tests passed, with which keys, and log2 of the bound on accepting a wrong graph at these sizes."""

    sizes: Pairs
    tiles: Pairs
    parts: Pairs
    keys: tuple[str, ...]
    delta_log2: float

    @property
    def tests(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class NumericRow:
    """One numeric comparison with float64.  Errors are absolute maxima over an output; `tolerance` is the allowed
    error at the element where error / tolerance is greatest.  `note` says why a draw does not count."""

    output: str
    dtype: str
    bindings: Pairs
    draw: str
    error: float
    tolerance: float
    ratio: float
    eager_error: float | None
    counted: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.counted or self.ratio <= 1.0

    @property
    def overflowed(self) -> bool:
        """Whether the program as written overflows at its own types here: it then has no error of its own."""
        return self.eager_error is None

    @property
    def excused(self) -> bool:
        """Whether the source is out of tolerance where the program as written overflows."""
        return self.note.endswith(EXCUSED)


@dataclass(frozen=True)
class NumericReport:
    """Numeric comparisons of one source, and how it ran: under the interpreter, on the device, or as torch code."""

    how: How
    target: str
    source_hash: str
    rows: tuple[NumericRow, ...]

    @property
    def counted(self) -> tuple[NumericRow, ...]:
        return tuple(r for r in self.rows if r.counted)

    @property
    def worst(self) -> float:
        """The greatest error, as a share of its tolerance."""
        return max((r.ratio for r in self.counted), default=0.0)

    @property
    def disagrees(self) -> bool:
        """Whether some comparison that counts is out of tolerance."""
        return not all(r.passed for r in self.rows)

    @property
    def passed(self) -> bool:
        """Whether some comparison counts and all that count are within the tolerance."""
        return bool(self.counted) and not self.disagrees

    @property
    def reasons(self) -> str:
        """Why comparisons do not count, each reason once."""
        return "; ".join(dict.fromkeys(r.note for r in self.rows if not r.counted and r.note))

    def better_than(self, other: NumericReport) -> bool:
        """Whether it makes other comparisons than another run of the same check, or claims much smaller errors."""
        if self.target != other.target or len(self.rows) != len(other.rows):
            return True
        for mine, its in zip(self.rows, other.rows, strict=True):
            same = [getattr(mine, f) == getattr(its, f) for f in ("output", "dtype", "bindings", "draw", "counted")]
            if not all(same) or not (math.isclose(mine.tolerance, its.tolerance, rel_tol=0.01) or not its.counted):
                return True
            if its.counted and its.ratio > 0.01 and (mine.error < its.error / 4 or mine.ratio < its.ratio / 4):
                return True
        return False

    @property
    def not_compared(self) -> tuple[str, ...]:
        """The outputs for which no comparison counts, each with the reasons."""
        missing = dict.fromkeys(r.output for r in self.rows)
        for row in self.counted:
            missing.pop(row.output, None)
        why = {o: dict.fromkeys(r.note for r in self.rows if r.output == o and r.note) for o in missing}
        return tuple(f"{o}, as for every input drawn {' or '.join(reasons)}" for o, reasons in why.items())

    def as_written(self) -> NumericReport:
        """The report that holds the source to no more than the program itself: draws where the program as written
        overflows at its own types do not count where the source is wrong too."""

        def excused(row: NumericRow) -> NumericRow:
            if row.passed or not row.overflowed:
                return row
            return dataclasses.replace(row, counted=False, note=f"{row.note}{EXCUSED}")

        return dataclasses.replace(self, rows=tuple(excused(r) for r in self.rows))

    def __str__(self) -> str:
        head = f"numerics, {self.how} on {self.target}: {len(self.counted)} comparisons with float64"
        left_out = len(self.rows) - len(self.counted)
        worst = f", error at most {self.worst:.2f} of the tolerance" if self.counted else ""
        missing = f"; NOT COMPARED: {'; '.join(self.not_compared)}" if self.not_compared else ""
        return f"{head}, {left_out} excluded{worst}{missing}"


@dataclass(frozen=True)
class Certificate:
    """The record of a verification.  `delta_log2` is log2 of the bound on accepting a wrong graph over all draws;
    `cuts` names the values between which program and graph were compared part by part, if they were.
    `laws` are those that a proof for all sizes rests on; `proof` is empty where there is one, and else says why not.
    `claims` counts what holds of the loads and stores of our kernels; `bounds` says why more is not known."""

    program: str
    graph: str
    program_hash: str
    graph_hash: str
    tiers: tuple[Tier, ...]
    delta_log2: float
    delta_requested_log2: float
    seed: int
    draws: tuple[DrawRecord, ...]
    unused_laws: tuple[str, ...]
    assumptions: tuple[str, ...]
    numerics: tuple[NumericReport, ...]
    versions: tuple[tuple[str, str], ...]
    cuts: tuple[str, ...] = ()
    laws: tuple[str, ...] = ()
    proof: str = NOT_ATTEMPTED
    claims: int = 0
    bounds: str = NOT_ATTEMPTED
    schema_version: int = SCHEMA_VERSION

    @property
    def delta(self) -> float:
        return math.exp2(self.delta_log2)

    def with_proof(self, laws: tuple[str, ...], reason: str) -> Certificate:
        """The certificate with the outcome of the symbolic proof.  No reason against it: the tier is reached."""
        reached: tuple[Tier, ...] = () if reason else ("proved",)
        return dataclasses.replace(self, tiers=(*self.tiers, *reached), laws=laws, proof=reason)

    def with_bounds(self, claims: int, reason: str) -> Certificate:
        """The certificate with the outcome of the check of loads and stores.  No reason against it: the tier is
        reached."""
        reached: tuple[Tier, ...] = () if reason else ("bounds",)
        return dataclasses.replace(self, tiers=(*self.tiers, *reached), claims=claims, bounds=reason)

    def with_numerics(self, table: NumericReport) -> Certificate:
        """The certificate with one more table of numeric comparisons.  The tier is reached if some count and pass."""
        reached: tuple[Tier, ...] = ("numerics",) if table.passed else ()
        tiers: tuple[Tier, ...] = tuple(dict.fromkeys((*self.tiers, *reached)))
        return dataclasses.replace(self, numerics=(*self.numerics, table), tiers=tiers)

    def to_json(self) -> str:
        """Strict JSON: numbers that are not finite become strings."""
        return json.dumps(_strict(asdict(self)), indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Certificate:
        """Raises ParseError where the text is no certificate, TargetMismatchError for another schema version."""
        return _read(text)

    def __str__(self) -> str:
        lines = [
            f"{self.graph} computes {self.program}: {', '.join(self.tiers)}",
            f"  program {self.program_hash[:16]}, graph {self.graph_hash[:16]}",
            f"  tested: error ≤ 2^{self.delta_log2:.1f} (asked for 2^{self.delta_requested_log2:g}) at these sizes, "
            "under the assumptions below",
        ]
        for d in self.draws:
            split = f", parts {_pairs_text(d.parts)}" if d.parts else ""
            head = f"    sizes {_pairs_text(d.sizes)}, tiles {_pairs_text(d.tiles) or '-'}{split}"
            lines.append(f"{head}: {d.tests} tests, 2^{d.delta_log2:.1f}")
        lines.append(f"  all sizes: unknown, {self.proof}" if self.proof else "  all sizes: proved, by these laws")
        lines += [f"    {law}" for law in self.laws]
        if self.bounds != NOT_ATTEMPTED or self.claims:
            rest = f"; unknown: {self.bounds}" if self.bounds else ", none fails"
            lines.append(f"  loads and stores: {self.claims} claims hold for all sizes{rest}")
        lines += [f"  law not used: {law}" for law in self.unused_laws]
        lines += [f"  assumes: {a}" for a in self.assumptions]
        lines += [f"  {report}" for report in self.numerics]
        return "\n".join(lines)


def graph_hash(graph: Program) -> str:
    """Hash of the canonical text: the same for graphs that differ in names alone."""
    return hashlib.sha256(canonical_text(graph).encode()).hexdigest()


def versions() -> tuple[tuple[str, str], ...]:
    return (("mugraph", __version__), ("numpy", numpy.__version__), ("python", platform.python_version()))


def _pairs_text(pairs: Pairs) -> str:
    return " ".join(f"{name}={value}" for name, value in pairs)


def _strict(value: Any) -> Any:
    match value:
        case dict():
            return {k: _strict(v) for k, v in value.items()}
        case list() | tuple():
            return [_strict(v) for v in value]
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def _read(text: str) -> Certificate:
    try:
        data = json.loads(text)
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ParseError(f"not a certificate: {error}", remedy="write it with Certificate.to_json") from None
    if version != SCHEMA_VERSION:
        raise TargetMismatchError(
            f"the certificate has schema version {version!r}, not {SCHEMA_VERSION}", remedy="verify the graph again"
        )
    try:
        data["draws"] = [DrawRecord(**_decoded(d, DrawRecord)) for d in data["draws"]]
        tables = []
        for table in data["numerics"]:
            table["rows"] = rows = [NumericRow(**_decoded(r, NumericRow)) for r in table["rows"]]
            if any(r.counted and not (r.error >= 0 and r.ratio >= 0 and r.tolerance >= 0) for r in rows):
                raise ValueError("a comparison that counts has no error or no tolerance")
            tables.append(NumericReport(**_decoded(table, NumericReport)))
        data["numerics"] = tables
        return Certificate(**_decoded(data, Certificate))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ParseError(f"not a certificate: {error}", remedy="write it with Certificate.to_json") from None


def _decoded(data: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
    """Fields from JSON: arrays become tuples, spelled-out numbers numbers again.  Raises ValueError for a field of
    another type than declared."""
    result: dict[str, Any] = {}
    kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for name, value in data.items():
        kind = kinds.get(name, "")
        value = _tupled(value)
        if kind.startswith("float") and isinstance(value, str):
            value = float(value)
        if kind in _PRIMITIVE and not isinstance(value, _PRIMITIVE[kind]):
            raise ValueError(f"{name} is {value!r}, not {kind}")
        if kind == "How" and value not in get_args(How):
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(get_args(How))}")
        if kind == "Pairs" and not all(isinstance(p, tuple) and list(map(type, p)) == [str, int] for p in value):
            raise ValueError(f"{name} is {value!r}, not a list of names and numbers")
        if (kind.startswith("tuple") or kind == "Pairs") and not isinstance(value, tuple):
            raise ValueError(f"{name} is {value!r}, not a list")
        result[name] = value
    return result


_PRIMITIVE: dict[str, type[Any] | tuple[type[Any], ...]] = {
    "str": str,
    "int": int,
    "bool": bool,
    "float": (int, float),
    "float | None": (int, float, type(None)),
}


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, list) else value
