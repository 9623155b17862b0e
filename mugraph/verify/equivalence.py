"""The `tested` tier: a μGraph computes its program, up to a stated error.

    verified = verify(program, graph)          # or VerificationError, with a counterexample

Both are executed on the same random field elements, the μGraph *as a μGraph*: blocks of the grid, loops with tails,
parts of the split, accumulators, the combine.  The number of tests follows from the degrees met on the way, so that
the bound on accepting a wrong graph is at most `delta`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, replace

import numpy as np

from mugraph.errors import GraphError, MugraphError, VerificationError
from mugraph.ir.check import check
from mugraph.ir.evaluate import Named, outputs
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Gather, Scatter
from mugraph.ir.parts import parts
from mugraph.ir.printer import canonical_text
from mugraph.ir.types import Input, Output
from mugraph.verify.certificate import NOT_ATTEMPTED, Certificate, DrawRecord, Tier, graph_hash, versions
from mugraph.verify.formal import EVALUATED, EXP_CUT, FormalAlgebra, TooManyTerms, Value
from mugraph.verify.lawful import LawfulAlgebra
from mugraph.verify.laws import LAWS
from mugraph.verify.normal import Work
from mugraph.verify.prove import prove
from mugraph.verify.sizes import Draw, cut_sizes, draws, literal_sizes

DRAWS = 2
FEWEST_TESTS = 2  # per draw: no single draw of inputs decides
MOST_TESTS = 64
RESAMPLES = 8  # draws of inputs before "divides by zero" is taken for a property of the graph
MOST_ELEMENTS = 2**22  # of a tensor at true sizes

REALS = "values are real numbers: casts between floating types are the identity, rounding is left to the numerics tier"
DEFINED = "nothing is claimed of inputs for which a denominator is 0, or a root or logarithm has no real value"
RANDOM_FUNCTIONS = (
    "sqrt, sigmoid, gelu, tanh, log, abs, ... and max stand for random functions: of them only congruence is used, "
    "that log(v·exp(m)) = log(v) + m and log(1/v) = -log(v), and that max is commutative, associative and idempotent"
)
REGISTERED = "functions of which no more than that is used do not tell that they are equal; these laws are used too: "
DRAWN_SIZES = "established at the sizes drawn; other sizes follow where the graph treats sizes alike"
LEAST_SIZES = "formal sums get too long at sizes that tell all axes apart: some axes have the same size"
DRAWN_INDICES = "gather and scatter are tested at the indices drawn"
FIXED_SIZES = (
    "axes are tested at fixed sizes, the true one where it is written as a literal, in true proportion where axes are "
    "cut: "
)

COMPOSED = (
    "program and graph are compared in {} different parts, between values that both have; that the whole agrees "
    "follows by induction over the parts"
)

_TOKEN = object()


@dataclass(frozen=True)
class Verified:
    """A program, a μGraph that computes it, and the certificate that says so.  Made by `verify` alone: what is
    lowered has passed it."""

    program: Program
    graph: KernelGraph
    certificate: Certificate
    token: InitVar[object] = None

    def __post_init__(self, token: object) -> None:
        if token is not _TOKEN:
            raise VerificationError("only verify() makes a Verified", remedy="call verify(program, graph)")


def verify(
    program: Program, graph: KernelGraph, *, delta: float = 2.0**-40, seed: int = 0, cuts: Sequence[str] = ()
) -> Verified:
    """Raises VerificationError with a counterexample where the graph computes something else, GraphError or ShapeError
    where it is malformed.

    With `cuts`, values that both have, they are compared part by part (`ir.parts`); equal parts are compared once."""
    if not 0 < delta < 1:
        raise VerificationError(f"delta is {delta}", remedy="give a probability between 0 and 1, such as 2**-40")
    check(program)
    check(graph)
    _compare_signatures(program, graph)
    if cuts:
        return Verified(program, graph, _by_parts(program, graph, delta, seed, tuple(cuts)), _TOKEN)
    literal, cut = literal_sizes(program, graph), cut_sizes(program, graph)
    # what is cut at its true proportions is compared at these alone: at others, borders may fall on each other
    first = cut if cut and _fits(program, graph, cut) else {}
    both = first | literal
    choices = [first, both] if both != first and _fits(program, graph, both) else [first]
    certificate = _tested_in_turn(program, graph, delta, seed, choices)
    return Verified(program, graph, certificate, _TOKEN)


def verify_as_given(program: Program, graph: KernelGraph, *, delta: float = 2.0**-40, seed: int = 0) -> Verified:
    """`verify`, for a graph of which nothing else is known: as a whole, and where the tests do not tell that the whole
    is equal, part by part, cut at all values that both have under one name.  Raises what it raises for the whole."""
    try:
        return verify(program, graph, delta=delta, seed=seed)
    except VerificationError as error:
        try:
            return verify(program, graph, delta=delta, seed=seed, cuts=shared_values(program, graph))
        except (GraphError, VerificationError):
            raise error from None


def shared_values(program: Program, graph: Program) -> tuple[str, ...]:
    """The values that both compute under one name and type, outputs apart."""
    apart = {i.name for i in program.inputs} | {o.value for o in program.outputs}
    mine = program.tensors()
    return tuple(n for n, t in graph.tensors().items() if n not in apart and mine.get(n) == t)


def proved(verified: Verified) -> Verified:
    """With the outcome of the symbolic proof for all sizes on the certificate; one that is there stays."""
    if verified.certificate.proof != NOT_ATTEMPTED:
        return verified
    cuts = verified.certificate.cuts
    pairs = _different(verified.program, verified.graph, cuts) if cuts else [(verified.program, verified.graph)]
    work = Work()  # of all parts together
    proofs = [prove(p, g, work) for p, g in pairs]
    reason = next((p.reason for p in proofs if not p.proved), "")
    laws = () if reason else tuple(sorted({law for p in proofs for law in p.laws}))
    certificate = verified.certificate.with_proof(laws, reason)
    return Verified(verified.program, verified.graph, certificate, _TOKEN)


def _different(program: Program, graph: KernelGraph, cuts: tuple[str, ...]) -> list[tuple[Program, KernelGraph]]:
    """The parts between the cuts; one that is another under other names is the same statement."""
    found: dict[str, tuple[Program, KernelGraph]] = {}
    for p, g in parts(program, graph, cuts):
        found.setdefault(f"{canonical_text(p)}\n{canonical_text(g)}", (p, g))
    return list(found.values())


def _by_parts(program: Program, graph: KernelGraph, delta: float, seed: int, cuts: tuple[str, ...]) -> Certificate:
    """One certificate of all parts.  The bounds of the different ones add up."""
    different = _different(program, graph, cuts)
    found = [verify(p, g, delta=delta / len(different), seed=seed).certificate for p, g in different]
    return replace(
        found[0],
        program_hash=graph_hash(program),
        graph_hash=graph_hash(graph),
        delta_log2=math.log2(sum(c.delta for c in found)),
        delta_requested_log2=math.log2(delta),
        draws=tuple(d for c in found for d in c.draws),
        unused_laws=tuple(dict.fromkeys(law for c in found for law in c.unused_laws)),
        assumptions=(*dict.fromkeys(a for c in found for a in c.assumptions), COMPOSED.format(len(different))),
        cuts=cuts,
    )


def recheck(certificate: Certificate, program: Program, graph: KernelGraph) -> Verified:
    """Repeats the verification that a certificate records, and compares.  Raises VerificationError where the
    certificate is about other graphs, or says what does not come out again."""
    for name, recorded, found in (
        ("program", certificate.program_hash, graph_hash(program)),
        ("graph", certificate.graph_hash, graph_hash(graph)),
    ):
        if recorded != found:
            raise VerificationError(f"the certificate is about another {name} than {graph.name}")
    delta = 2.0**certificate.delta_requested_log2
    again = verify(program, graph, delta=delta, seed=certificate.seed, cuts=certificate.cuts)
    if certificate.proof != NOT_ATTEMPTED:
        again = proved(again)
    lowered: tuple[Tier, ...] = () if certificate.bounds else ("bounds",)  # checked where there is a plan
    numerics: tuple[Tier, ...] = ("numerics",) if any(r.passed for r in certificate.numerics) else ()
    reached = (*again.certificate.tiers, *lowered, *numerics)
    if certificate.tiers != reached:
        raise VerificationError(f"the certificate claims {certificate.tiers}, a new run reaches {reached}")
    for field in ("delta_log2", "draws", "unused_laws", "assumptions", "laws", "proof", "program", "graph", "cuts"):
        was, now = getattr(certificate, field), getattr(again.certificate, field)
        if was != now:
            raise VerificationError(f"the certificate says {field} {was}, a new run {now}")
    return again


def _compare_signatures(program: Program, graph: Program) -> None:
    """Both take the same inputs, stored alike and under the same assumptions, and give outputs of the same types,
    stored alike and over the same inputs.  The names of what is given may differ."""
    if program.inputs != graph.inputs:
        wanted, given = _told_apart([[(str(i.tensor), i) for i in g.inputs] for g in (program, graph)])
        raise VerificationError(f"{graph.name} takes ({given}), {program.name} takes ({wanted})")
    sides = [[(g.tensors()[o.value], o) for o in g.outputs] for g in (program, graph)]
    alike = [[(t.dims, t.dtype, o.storage, o.alias_of) for t, o in side] for side in sides]
    if alike[0] != alike[1]:
        wanted, given = _told_apart([[(str(t), o) for t, o in side] for side in sides])
        raise VerificationError(f"{graph.name} gives ({given}), {program.name} gives ({wanted})")


def _told_apart(sides: Sequence[Sequence[tuple[str, Input | Output]]]) -> list[str]:
    """The two lists of tensors, with all that is declared about them where the types alone are the same."""
    short = [", ".join(text for text, _ in side) for side in sides]
    return short if short[0] != short[1] else [", ".join(str(whole) for _, whole in side) for side in sides]


def _fits(program: Program, graph: Program, fixed: Mapping[str, int]) -> bool:
    """Whether no tensor gets too big when these axes have their true sizes."""
    tensors = [*program.tensors().values(), *graph.tensors().values()]
    return all(math.prod(fixed.get(a.name, 5) for a in t.axes) <= MOST_ELEMENTS for t in tensors)


def _items(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(sizes.items()))


def _tested_in_turn(
    program: Program, graph: KernelGraph, delta: float, seed: int, choices: Sequence[Mapping[str, int]]
) -> Certificate:
    """With the first of these fixed sizes at which the two agree; where there is none, again with the registered laws.
    Each attempt might accept a wrong graph, so their bounds add up."""
    attempts = [(fixed, lawful) for lawful in (False, True) for fixed in choices]
    for tried, (fixed, lawful) in enumerate(attempts, 1):
        try:
            found = _tested(program, graph, delta / len(attempts), seed, fixed, lawful)
        except VerificationError:
            if tried == len(attempts):
                raise
            continue
        return replace(found, delta_log2=found.delta_log2 + math.log2(tried), delta_requested_log2=math.log2(delta))
    raise AssertionError("there is an attempt")


def _tested(
    program: Program, graph: KernelGraph, delta: float, seed: int, fixed: Mapping[str, int], lawful: bool
) -> Certificate:
    """At sizes that tell axes apart; where formal sums get too long, at the least sizes with tails; where they still
    do, with `exp` as an arbitrary function."""
    for small in (False, True):
        try:
            return _tests(program, graph, delta, seed, fixed, lawful, small=small)
        except TooManyTerms:
            continue
    return _tests(program, graph, delta, seed, fixed, lawful, cut_exp=True)


def _tests(
    program: Program,
    graph: KernelGraph,
    delta: float,
    seed: int,
    fixed: Mapping[str, int],
    lawful: bool,
    cut_exp: bool = False,
    small: bool = False,
) -> Certificate:
    """Tests every draw of sizes until its bound is small enough."""
    records, cuts, assumptions = [], set[str](), set[str]()
    chosen = draws(program, graph, DRAWS, fixed, small)
    made = LawfulAlgebra if lawful else FormalAlgebra
    for number, draw in enumerate(chosen):
        bound, keys = 1.0, list[str]()
        while bound > delta / len(chosen) or len(keys) < FEWEST_TESTS:
            if len(keys) == MOST_TESTS:
                raise VerificationError(
                    f"{MOST_TESTS} tests bound the error by 2^{math.log2(bound):.1f} only",
                    remedy="ask for a larger delta",
                )
            algebra, key, error = _test(program, graph, draw, f"{seed}/{number}/{len(keys)}", made, cut_exp)
            if error >= 1 and not cut_exp:
                raise TooManyTerms  # of too high a degree: no number of tests would say anything
            keys.append(key)
            bound *= error
            cuts |= algebra.cuts
            assumptions |= algebra.assumptions
        records.append(_record(draw, keys, bound))
    stated = [REALS, DEFINED, RANDOM_FUNCTIONS, DRAWN_SIZES, *sorted(assumptions & {EVALUATED})]
    if lawful:
        stated.append(REGISTERED + "; ".join(str(law) for law in LAWS))
    if any(isinstance(e.op, Gather | Scatter) for e in program.equations):
        stated.append(DRAWN_INDICES)
    if small:
        stated.append(LEAST_SIZES)
    if fixed:
        stated.append(FIXED_SIZES + ", ".join(f"{a}={s}" for a, s in sorted(fixed.items())))
    return Certificate(
        program=program.name,
        graph=graph.name,
        program_hash=graph_hash(program),
        graph_hash=graph_hash(graph),
        tiers=("tested",),
        delta_log2=math.log2(sum(2.0**r.delta_log2 for r in records)),
        delta_requested_log2=math.log2(delta),
        seed=seed,
        draws=tuple(records),
        unused_laws=tuple(sorted(cuts)),
        assumptions=tuple(stated),
        numerics=(),
        versions=versions(),
    )


def _record(draw: Draw, keys: Sequence[str], bound: float) -> DrawRecord:
    sizes, tiles, parts = (tuple(sorted(m.items())) for m in (draw.sizes, draw.tiles, draw.parts))
    return DrawRecord(sizes, tiles, parts, tuple(keys), math.log2(max(bound, 2.0**-1000)))


def _test(
    program: Program, graph: KernelGraph, draw: Draw, key: str, made: type[FormalAlgebra], cut_exp: bool
) -> tuple[FormalAlgebra, str, float]:
    """One comparison on fresh random inputs: the algebra used, the key of the inputs, and the error bound."""
    for attempt in range(RESAMPLES):
        fresh = f"{key}/{attempt}"
        algebra = made(draw.sizes, draw.tiles, draw.parts, key=fresh, starts=draw.starts, cut_exp=cut_exp)
        inputs = {i.name: algebra.random(tuple(a.name for a in i.tensor.axes), i.name) for i in program.inputs}
        wanted = _run(program, inputs, algebra)
        given = _run_graph(graph, inputs, algebra)
        if algebra.zero_division:
            continue
        pairs = list(zip((o.value for o in program.outputs), wanted, given, strict=True))
        for name, a, b in pairs:
            _compare(name, a, b, algebra, draw, fresh)
        return algebra, fresh, max(algebra.error(a, b) for _, a, b in pairs)
    raise VerificationError(
        f"a denominator is zero in {RESAMPLES} draws of random inputs",
        remedy="look for a division by a difference that is always zero",
    )


def _run(graph: Program, inputs: Mapping[str, Value], algebra: FormalAlgebra) -> list[Value]:
    """The outputs, spread over the axes that their tensors declare."""
    tensors = graph.tensors()
    found: list[Value] = []
    named: Mapping[str, Named] = inputs
    for o, v in zip(graph.outputs, outputs(graph, named, algebra), strict=True):
        axes = tuple(a.name for a in tensors[o.value].axes)
        if set(v.axes) - set(axes):
            raise VerificationError(f"{o.value} is over ({', '.join(v.axes)}), not ({', '.join(axes)})")
        whole = algebra.expanded(v, axes)
        assert isinstance(whole, Value)
        found.append(whole)
    return found


def _run_graph(graph: KernelGraph, inputs: Mapping[str, Value], algebra: FormalAlgebra) -> list[Value]:
    try:
        return _run(graph, inputs, algebra)
    except (GraphError, VerificationError):
        raise
    except MugraphError as error:
        raise VerificationError(f"{graph.name} cannot be executed: {error.message}", op=error.op) from error
    except (AssertionError, IndexError, KeyError, ValueError) as error:
        raise VerificationError(f"{graph.name} cannot be executed: {type(error).__name__}: {error}") from error


def _compare(name: str, wanted: Value, given: Value, algebra: FormalAlgebra, draw: Draw, key: str) -> None:
    if other := [a for a in wanted.axes if wanted.size(a) != given.size(a)]:
        raise VerificationError(
            f"{name} has the sizes {wanted.size(other[0])} and {given.size(other[0])} of {other[0]}"
        )
    wrong = algebra.differs(wanted, given)
    if not wrong.any():
        return
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = ", ".join(f"{a}={i}" for a, i in zip(wanted.axes, at, strict=True))
    lined = given.map(lambda p: p, given.axes)
    index = [at[wanted.axes.index(a)] for a in given.axes]
    values = int(algebra.sample(wanted)[at]), int(algebra.sample(lined)[tuple(index)])
    sizes = ", ".join(f"{a}={s}" for a, s in sorted(draw.sizes.items()))
    cut = " (with exp opaque: formal sums exceed the limit of terms)" if EXP_CUT in algebra.cuts else ""
    raise VerificationError(
        f"{name}[{place}] differs{cut}: the program gives {values[0]}, the graph {values[1]} modulo p; "
        f"{int(wrong.sum())} of {wrong.size} elements differ at sizes {sizes}, seed {key}",
        remedy="compare the graph with the program from the inputs on; the same seed gives the same values",
    )
