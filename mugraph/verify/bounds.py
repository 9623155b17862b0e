"""The `bounds` tier: no load or store outside its tensor, no entry written twice, none left out, for all sizes.

    outcome = in_bounds(source, graph)      # Bounds, or VerificationError with sizes and a block

What is checked is the emitted text (`source.py` reads it).  Each claim is one query to z3 for a counterexample over
integers.  An offset within a dimension is a sum of indices times coefficients, one for each axis that the dimension
holds, and each index is held to its own range.  z3 is optional, a query has a time limit, and there is text that cannot
be read: the outcome then says `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations_with_replacement
from typing import Any

from mugraph.errors import ShapeError, VerificationError
from mugraph.ir.axes import MAX_SIZE, Size, dims_of, over, product, size_value, times
from mugraph.ir.graph import Program
from mugraph.verify.source import Access, Buffer, Launch, Reading, Unreadable, launches_of

SECONDS = 2.0  # of one query
NO_SOLVER = "z3 is not installed"


@dataclass(frozen=True)
class Bounds:
    """How many claims hold, and why others are unknown."""

    claims: int
    unknown: tuple[str, ...]

    @property
    def reason(self) -> str:
        return "; ".join(dict.fromkeys(self.unknown))


def in_bounds(source: str, graph: Program, seconds: float = SECONDS) -> Bounds:
    """Raises VerificationError with a counterexample where a claim about an emitted file fails."""
    if find_spec("z3") is None:
        return Bounds(0, (NO_SOLVER,))
    import z3

    try:
        reading = launches_of(source, graph, z3)
        claims = list(_Claims(z3, reading).all())
    except Unreadable as error:
        return Bounds(0, (f"the source cannot be read: {error}",))
    proved, unknown = 0, []
    for claim in claims:
        if not claim.constraints:
            unknown.append(f"{claim.where}: {claim.text}")
            continue
        solver = z3.Solver()
        solver.set("timeout", int(1000 * seconds))
        solver.add(*reading.sizes.holds, *claim.constraints)
        found = solver.check()
        if found == z3.sat:
            model = solver.model()
            unknowns = (*reading.sizes.known.values(), *claim.shown)
            at = ", ".join(f"{x}={model.eval(x, model_completion=True)}" for x in unknowns)
            raise VerificationError(f"{claim.where}: {claim.text} at {at}")
        if found == z3.unsat:
            proved += 1
        else:
            unknown.append(f"{claim.where}: not decided in {seconds:g} s")
    return Bounds(proved, tuple(unknown))


@dataclass(frozen=True)
class Claim:
    """What would be wrong, and what holds where it is; without constraints, why there is no claim.  `shown`: what a
    counterexample consists of."""

    where: str
    text: str
    constraints: Sequence[Any] = ()
    shown: Sequence[Any] = ()


@dataclass(frozen=True)
class Place:
    """One index of a dimension, and its range."""

    index: Any
    count: Any


class _Claims:
    def __init__(self, z3: Any, reading: Reading) -> None:
        self.z3, self.reading, self.sizes = z3, reading, reading.sizes

    def all(self) -> Iterator[Claim]:
        stores: dict[Buffer, list[Access]] = {}
        for launch, following in zip(self.reading.launches, [*self.reading.launches[1:], None], strict=True):
            if launch.result is not None and following:
                yield from self.of_one_result(launch, following)
            written = {a.buffer for a in launch.accesses if a.kind in ("write", "atomic")}
            for a in launch.accesses:
                yield from self.inside(a)
                if a.kind in ("arrive", "clear"):
                    continue
                if a.kind == "read" and a.buffer in written:
                    yield Claim(a.where, f"{a.buffer.name} is read in the launch that writes it", [True])
            reads = [a.buffer for a in launch.accesses if a.kind == "read" and a.buffer not in written]
            adds = [a.buffer for a in launch.accesses if a.kind == "atomic"]  # to what is there
            for b in dict.fromkeys([*reads, *adds]):
                if b.made == "empty":
                    yield from self.everywhere(launch.name, b, stores.pop(b, []))
                    b.made = "given"
            for b in written:
                mine = [a for a in launch.accesses if a.buffer is b and a.kind != "read"]
                stores.setdefault(b, []).extend(mine)
                for x, y in combinations_with_replacement(mine, 2):
                    if (x.kind, y.kind) != ("atomic", "atomic"):
                        yield self.twice(x, y)
        for b in self.reading.results:
            if b.made == "empty":
                yield from self.everywhere("run", b, stores.get(b, []))

    # -- places

    def places(self, a: Access) -> list[Place]:
        """The indices of an access, those of a dimension in the order of their coefficients."""
        found: list[Place] = []
        for n, size in enumerate(a.buffer.shape):
            terms = [t for t in a.terms if t.dim == n]
            coefficients = {t.coefficient for t in terms}
            whole = sum((t.index * self.sizes(t.coefficient) for t in terms), self.z3.IntVal(0))
            if coefficients <= {1}:
                found.append(Place(whole, self.sizes(size)))
                continue
            try:
                found += self.factors(terms, coefficients, size)
            except ShapeError:
                found.append(Place(whole, self.sizes(size)))
        return found

    def factors(self, terms: Sequence[Any], coefficients: set[Size], size: Size) -> list[Place]:
        """Σ index·c lies in its dimension, and determines each index, if the index of c is below c'/c, c' the next."""
        inner = sorted(coefficients | {1}, key=lambda c: (len(dims_of(c)), c if isinstance(c, int) else 0, str(c)))
        found = []
        for c, above in zip(inner, [*inner[1:], size], strict=True):
            index = sum((t.index for t in terms if t.coefficient == c), self.z3.IntVal(0))
            found.append(Place(index, self.sizes(over(above, c))))
        return found

    @staticmethod
    def holds(a: Access) -> list[Any]:
        return [*a.holds, *(x == y for x, y in a.linked)]

    # -- claims

    def inside(self, a: Access) -> Iterator[Claim]:
        for place in self.places(a):
            outside = self.z3.Or(place.index < 0, place.index >= place.count)
            text = f"{a.kind} of {a.buffer.name} is out of bounds: index {place.index} of {place.count}"
            yield Claim(a.where, text, [*self.holds(a), outside], a.digits)
        for t in a.terms:
            reach = product([*a.buffer.shape[t.dim + 1 :], *([t.coefficient] if a.buffer.shape else [])])
            if not t.wide and self.largest(times(reach, a.buffer.shape[t.dim])) > MAX_SIZE and not self.near(t, reach):
                yield Claim(a.where, f"an offset in {a.buffer.name} may exceed 31 bits", [True])

    def near(self, t: Any, reach: Size) -> bool:
        return bool(self.z3.is_int_value(t.index)) and t.index.as_long() * self.largest(reach) <= MAX_SIZE

    def largest(self, size: Size) -> int:
        bounds = {d.name: d.max for d in dims_of(size)}
        return size_value(size, bounds)

    def twice(self, x: Access, y: Access) -> Claim:
        """Two blocks, iterations or lanes that write one entry."""
        other = [(d, self.z3.Int(f"another {d}")) for d in self.unknowns(y)]
        mine, theirs = self.places(x), self.places(y)
        same = [p.index == self.z3.substitute(q.index, *other) for p, q in zip(mine, theirs, strict=True)]
        differ = [d != self.z3.substitute(d, *other) for d in x.digits] if x is y else []
        constraints = [*self.holds(x), *(self.z3.substitute(h, *other) for h in self.holds(y)), *same]
        if differ or x is not y:
            constraints += [self.z3.Or(differ)] if differ else []
        else:
            constraints.append(self.z3.BoolVal(False))  # one block, one lane
        return Claim(x.where, f"{x.buffer.name} is written twice", constraints, [*x.digits, *(o for _, o in other)])

    def of_one_result(self, launch: Launch, following: Launch) -> Iterator[Claim]:
        """The last block of a result, which goes on in the launch that follows, reads what was stored for another, or
        writes what blocks of other results, still under way, read or write."""
        for x in launch.accesses:
            for y in following.accesses:
                if y.kind != "read" and x.buffer is y.buffer:
                    yield Claim(y.where, f"{x.buffer.name} is written while other blocks use it", [True])
                if x.kind == "write" and y.kind == "read" and x.buffer is y.buffer:
                    other = [(d, self.z3.Int(f"another {d}")) for d in self.unknowns(y)]
                    pairs = zip(self.places(x), self.places(y), strict=True)
                    same = [p.index == self.z3.substitute(q.index, *other) for p, q in pairs]
                    holds = [*self.holds(x), *(self.z3.substitute(h, *other) for h in self.holds(y)), *same]
                    differ = launch.result != self.z3.substitute(launch.result, *other)
                    text = f"{x.buffer.name} is read before it is written by all blocks"
                    yield Claim(y.where, text, [*holds, differ], [*x.digits, *(o for _, o in other)])

    def unknowns(self, a: Access) -> list[Any]:
        """All unknowns but sizes."""
        sizes = {str(s) for s in self.sizes.known.values()}
        found: dict[str, Any] = {}
        todo, seen = [*self.holds(a), *(t.index for t in a.terms)], set()
        while todo:
            e = todo.pop()
            if e.get_id() in seen:
                continue
            seen.add(e.get_id())
            if self.z3.is_const(e) and e.decl().kind() == self.z3.Z3_OP_UNINTERPRETED and str(e) not in sizes:
                found[str(e)] = e
            todo += e.children()
        return list(found.values())

    def everywhere(self, where: str, b: Buffer, stores: Sequence[Access]) -> Iterator[Claim]:
        """An entry that no store writes.  For each store, the digits that would write it are those of the entry."""
        if not stores:
            yield Claim(where, f"{b.name or 'a tensor'} is never written", [True])
            return
        all_places = [self.places(s) for s in stores]
        counts = [[str(p.count) for p in places] for places in all_places]
        if any(c != counts[0] for c in counts):
            yield Claim(where, f"{b.name} is written in several ways")
            return
        entry = [self.z3.Int(f"entry {n}") for n in range(len(counts[0]))]
        constraints = [c for x, p in zip(entry, all_places[0], strict=True) for c in (x >= 0, x < p.count)]
        for s, places in zip(stores, all_places, strict=True):
            found = self.solved(s, places, entry)
            if found is None:
                yield Claim(where, f"which entries of {b.name} are written is not known")
                return
            hits = [*self.holds(s), *(p.index == x for p, x in zip(places, entry, strict=True))]
            constraints.append(self.z3.Not(self.z3.substitute(self.z3.And(*hits), *found)))
        yield Claim(where, f"{b.name} is not written everywhere", constraints, entry)

    def solved(self, a: Access, places: Sequence[Place], entry: Sequence[Any]) -> list[tuple[Any, Any]] | None:
        """Values of the digits at which the access is that of an entry, if there are any; None if not found."""
        z3 = self.z3
        free = {str(d): d for d in self.unknowns(a)}
        found: dict[str, tuple[Any, Any]] = {}
        for place, x in zip(places, entry, strict=True):
            mine = [d for d in self.unknowns_of(place.index) if str(d) in free]
            zero = [(d, z3.IntVal(0)) for d in mine]
            start = z3.simplify(z3.substitute(place.index, *zero)) if mine else place.index
            steps = []
            for d in mine:
                others = [(o, v) for o, v in zero if o is not d]
                one = z3.substitute(place.index, *others, (d, z3.IntVal(1)))
                step = z3.simplify(one - start, som=True)
                if not z3.is_int_value(step) or step.as_long() < 1 or str(d) in found:
                    return None
                steps.append((step.as_long(), d))
            steps.sort(key=lambda s: s[0])
            for n, (step, d) in enumerate(steps):
                value = (x - start) / step
                if n + 1 < len(steps):
                    value = value % (steps[n + 1][0] // step)
                found[str(d)] = d, value
        sums = {str(d) for p, q in a.linked for d in (p, q) if z3.is_const(d)}  # of others, which come first
        while True:
            for p, q in a.linked:
                for one, other in ((p, q), (q, p)):
                    given = all(str(d) in found for d in self.unknowns_of(other) if str(d) in free)
                    if given and z3.is_const(one) and str(one) in free and str(one) not in found:
                        found[str(one)] = one, z3.substitute(other, *found.values())
                        break
                else:
                    continue
                break
            else:
                left = next((d for name, d in free.items() if name not in found and name not in sums), None)
                if left is None:
                    break
                found[str(left)] = left, z3.IntVal(0)
        for name, d in free.items():
            found.setdefault(name, (d, z3.IntVal(0)))
        return list(found.values())

    def unknowns_of(self, e: Any) -> list[Any]:
        return self.unknowns(Access("", "", Buffer("", ()), (), (e,), (), ()))
