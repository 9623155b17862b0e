"""The `bounds` tier: no load or store outside its tensor, no element written twice, none left out, for all sizes.

    outcome = in_bounds(accesses)          # Bounds, or VerificationError with sizes and a block

An access is what a plan says of a load or store: per axis of the tensor an index `start + step * i`, where i runs
over an axis of the kernel as its extent says (blocks of a grid, iterations of a loop, lanes of a tile, a mask).  Each
claim is one query to z3 for a counterexample over integers.  A claim about one axis holds whatever the others are, so
queries are small.  z3 is optional, and a query has a time limit; the outcome then says `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations
from typing import Any, Literal

from mugraph.errors import VerificationError
from mugraph.ir.axes import Dim, Monomial, Size

SECONDS = 2.0  # of one query
NO_SOLVER = "z3 is not installed"


@dataclass(frozen=True)
class Cover:
    """How an axis of the kernel is run over: `tile` entries at a time by blocks or iterations, in `lanes` lanes (None:
    at least as many as the axis has entries).  `masked`: lanes beyond the tile and the axis are off.  `parts`: a loop
    that is cut over the grid as well."""

    axis: str
    size: Size
    role: Literal["grid", "loop", "whole"]
    tile: int
    lanes: int | None
    masked: bool
    parts: int = 1


@dataclass(frozen=True)
class Place:
    """The index along one axis of a tensor, `start + step * cover` or the constant `start`.  `part`: the number of the
    part of a split.  Where `low <= cover < low + length` fails, the access is off (a piece of a concatenation)."""

    size: Size
    cover: Cover | None
    start: int = 0
    step: int = 1
    part: int = 0


@dataclass(frozen=True)
class Access:
    """A load or store of `tensor`; `grid` are all covers on the grid of its launch."""

    where: str
    tensor: str
    kind: Literal["read", "write", "partial", "atomic"]
    places: tuple[Place, ...]
    grid: tuple[Cover, ...]
    limits: tuple[tuple[Cover, int, int], ...] = ()


@dataclass(frozen=True)
class Bounds:
    """How many claims hold, and why others are unknown."""

    claims: int
    unknown: tuple[str, ...]

    @property
    def reason(self) -> str:
        return "; ".join(dict.fromkeys(self.unknown))


def in_bounds(accesses: Sequence[Access], seconds: float = SECONDS) -> Bounds:
    """Raises VerificationError with a counterexample where a claim fails."""
    if find_spec("z3") is None:
        return Bounds(0, (NO_SOLVER,))
    import z3

    proved, unknown = 0, []
    written: dict[str, list[Access]] = {}
    for access in dict.fromkeys(accesses):
        if access.kind != "read":
            written.setdefault(access.tensor, []).append(access)
    groups = [([a], _Claims.of) for a in dict.fromkeys(accesses)] + [(g, _Claims.together) for g in written.values()]
    for group, claims in groups:
        access = group[0]
        for claim, constraints, shown in claims(_Claims(z3), *group):
            solver = z3.Solver()
            solver.set("timeout", int(1000 * seconds))
            solver.add(*constraints)
            found = solver.check()
            if found == z3.sat:
                model = solver.model()
                at = ", ".join(f"{n}={model.eval(x, model_completion=True)}" for n, x in shown.items())
                raise VerificationError(f"{access.where}: {access.tensor} {claim} at {at}", op=access.kind)
            if found == z3.unsat:
                proved += 1
            else:
                unknown.append(f"{access.where}: not decided in {seconds:g} s")
    return Bounds(proved, tuple(unknown))


Claim = tuple[str, list[Any], dict[str, Any]]


class _Claims:
    """Claims about one access, as constraints of which no solution may exist, with what a solution shows."""

    def __init__(self, z3: Any) -> None:
        self.z3 = z3
        self.dims: dict[str, Any] = {}
        self.ranges: list[Any] = []

    def of(self, access: Access) -> Iterable[Claim]:
        for n, place in enumerate(access.places):
            yield self.outside(access, n, place)
        if access.kind in ("write", "partial"):
            yield from self.races(access)
        if access.kind != "read":
            for n, place in enumerate(access.places):
                if place.cover is not None:
                    yield self.left_out(n, place.cover)

    def together(self, *stores: Access) -> Iterable[Claim]:
        """Stores into one tensor: each element is an entry of one of them, and of no two."""
        places = list(zip(*(s.places for s in stores), strict=True))
        index = [self.z3.Int(f"entry {n}") for n in range(len(places))]
        inside = [c for x, (place, *_) in zip(index, places, strict=True) for c in (x >= 0, x < self.size(place.size))]
        shown = {str(x): x for x in index}
        regions = [self.z3.And(*map(self.region, index, s.places)) for s in stores]
        yield self.claim("is not written everywhere,", [*inside, *map(self.z3.Not, regions)], **shown)
        for (a, one), (b, other) in combinations(zip(stores, regions, strict=True), 2):
            if "atomic" not in (a.kind, b.kind):
                yield self.claim("is written twice,", [*inside, one, other], **shown)

    def region(self, x: Any, place: Place) -> Any:
        """Whether an index is that of some entry."""
        if place.part:
            return x < place.part
        if place.cover is None:
            return x == place.start
        first = x - place.start
        return self.z3.And(first >= 0, first % place.step == 0, first < place.step * self.size(place.cover.size))

    def size(self, size: Size) -> Any:
        match size:
            case int():
                return self.z3.IntVal(size)
            case Dim(name, low, high):
                if name not in self.dims:
                    self.dims[name] = self.z3.Int(name)
                    self.ranges += [self.dims[name] >= low, self.dims[name] <= high]
                return self.dims[name]
            case Monomial(coefficient, powers):
                top, bottom = self.z3.IntVal(coefficient.numerator), self.z3.IntVal(coefficient.denominator)
                for d, p in powers:
                    for _ in range(abs(p)):
                        top, bottom = (top * self.size(d), bottom) if p > 0 else (top, bottom * self.size(d))
                whole = self.z3.Int(f"size {size}")
                self.ranges += [whole * bottom == top, whole >= 1]
                return whole

    def run(self, c: Cover, tag: str = "") -> tuple[Any, Any, list[Any], Any, dict[str, Any]]:
        """The entry that a lane sees, the number of the block or iteration, what holds of both, the lane's mask, and
        what to show."""
        size = self.size(c.size)
        lane = self.z3.Int(f"lane of {c.axis}{tag}")
        number = self.z3.Int(f"{'block' if c.role == 'grid' else 'iteration'} of {c.axis}{tag}")
        lanes = size if c.lanes is None else self.z3.IntVal(c.lanes)
        holds = [lane >= 0, number >= 0, lane < lanes if c.lanes is not None else lane >= 0]
        entry = lane if c.role == "whole" else number * c.tile + lane
        if c.role == "whole":
            holds.append(number == 0)
        else:
            holds.append(number * c.tile < size)  # as many blocks or iterations as have an entry
        on = self.z3.BoolVal(True)
        if c.masked or c.lanes is None:
            on = self.z3.And(entry < size, lane < c.tile) if c.role != "whole" else entry < size
        if c.role == "loop" and c.masked:  # full tiles run without a mask
            on = self.z3.And(lane < c.tile, self.z3.Or((number + 1) * c.tile <= size, entry < size))
        return entry, number, holds, on, {str(number): number, str(lane): lane}

    def outside(self, access: Access, n: int, place: Place) -> Claim:
        size = self.size(place.size)
        if place.part:
            part = self.z3.Int("part")
            return self.claim(
                f"is out of bounds in dimension {n}", [part >= 0, part < place.part, part >= size], part=part
            )
        if place.cover is None:
            value = self.z3.IntVal(place.start)
            return self.claim(f"is out of bounds in dimension {n}", [self.z3.Or(value < 0, value >= size)])
        entry, _, holds, on, shown = self.run(place.cover)
        value = place.start + place.step * entry
        limits = [
            self.z3.And(entry >= low, entry < low + length) for c, low, length in access.limits if c == place.cover
        ]
        outside = [*holds, on, *limits, self.z3.Or(value < 0, value >= size)]
        return self.claim(
            f"is out of bounds in dimension {n}, at index {place.start} + {place.step}·entry,", outside, **shown
        )

    def races(self, access: Access) -> Iterable[Claim]:
        """Two blocks write one element: along some axis of the grid they differ, and each index is the same."""
        for c in access.grid:
            own = [p for p in access.places if p.cover == c]
            a, b = self.run(c, ""), self.run(c, " of another")
            same = [p.start + p.step * a[0] == p.start + p.step * b[0] for p in own]
            constraints = [*a[2], *b[2], a[3], b[3], a[1] != b[1], *same]
            yield self.claim("is written twice,", constraints, **a[4], **b[4])
        loops = {p.cover for p in access.places if p.cover is not None and p.cover.role == "loop"}
        for c in sorted(loops, key=lambda c: c.axis):
            a, b = self.run(c, ""), self.run(c, " of another")
            yield self.claim(
                "is written twice,", [*a[2], *b[2], a[3], b[3], a[1] != b[1], a[0] == b[0]], **a[4], **b[4]
            )

    def left_out(self, n: int, c: Cover) -> Claim:
        """An entry of the axis that the block and the lane that should write it do not."""
        x = self.z3.Int("entry")
        entry, number, holds, on, shown = self.run(c)
        at = x if c.role == "whole" else x - number * c.tile
        lane = shown[next(k for k in shown if k.startswith("lane"))]
        chosen = [number == 0] if c.role == "whole" else [number * c.tile <= x, x < (number + 1) * c.tile]
        inside = [x >= 0, x < self.size(c.size), *chosen, lane == at]
        fails = self.z3.Not(self.z3.And(*holds, on, entry == x))
        return self.claim(f"is not written everywhere in dimension {n}", [*inside, fails], entry=x, **shown)

    def claim(self, text: str, constraints: list[Any], **shown: Any) -> Claim:
        return text, [*self.ranges, *constraints], {**self.dims, **shown}


def shown(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{a}={s}" for a, s in sorted(sizes.items()))
