"""How good the verifier is: wrong pairs that it accepts, right pairs that it refuses, and what a check costs.

    python -m benchmarks.verify [--every N] [--json]
    python -m benchmarks.verify --tiers [--json]

The pairs are those of tests/corpora: `wrong` has one planted error each, `equal` are the same programs in other words.
Beside the verifier stand two published rules on the same pairs, at the same sizes: values in Z_p x Z_q with small
primes, exponentials as powers of one root of unity, a single test: `published` p = 227, q = 113 and random inputs,
`released` p = 167, q = 83 and inputs i·100003 + j.  `unknown` and `proved_all_sizes` are of the proof.

`--tiers`: for each program, what is chosen for it, tested, proved for all sizes, and the emitted text checked for
bounds.  `tested_ms` is of one draw of sizes; `total_ms` of all three tiers, without the search and the lowering.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, TypeVar

import numpy as np

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import FAMILIES
from mugraph.errors import MugraphError
from mugraph.ir import fields
from mugraph.ir.check import check
from mugraph.ir.evaluate import ArrayAlgebra, Named, aligned, outputs, union_axes
from mugraph.ir.fields import U
from mugraph.ir.ops import Cast, Iota, MaskedExp, PureOp, Select, Slice
from mugraph.pipeline import bounds_tier, emit, finished
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.transpiler.target import parse_target
from mugraph.verify.equivalence import proved, verify
from mugraph.verify.prove import prove
from mugraph.verify.sizes import draws
from tests.corpora.equal import equal
from tests.corpora.pairs import Pair
from tests.corpora.wrong import wrong

T = TypeVar("T")


class SmallFields(ArrayAlgebra):
    """Pairs in Z_p x Z_q as published: the q part of an exponential is 0, 1/0 is 0, and functions without a table of
    their own (maxima, comparisons, ...) are tables with random entries."""

    def __init__(self, p: int, q: int, sizes: Mapping[str, int], tiles: Mapping[str, int], parts: Mapping[str, int]):
        super().__init__(sizes, tiles, parts)
        self.moduli = p, q
        root = next(x for x in range(2, p) if pow(x, q, p) == 1)
        self.powers = np.array([pow(root, e, p) for e in range(q)], dtype=U)

    def value(self, axes: tuple[str, ...], words: Any) -> Named:
        return Named(axes, tuple(np.asarray(words, dtype=U) % U(m) for m in self.moduli))

    def literal(self, value: Fraction) -> Named:
        parts = []
        for m in self.moduli:
            inverse = pow(value.denominator, -1, m) if value.denominator % m else 0
            parts.append(np.asarray(value.numerator * inverse % m, dtype=U))
        return Named((), tuple(parts))

    def identity(self, monoid: str) -> Named:
        return self.literal(Fraction(0))

    def table(self, key: object, *args: Named) -> Named:
        axes = union_axes(args)
        mixed: Any = np.asarray(0, dtype=U)
        for i, v in enumerate(aligned(a, axes) for a in args):
            for j, part in enumerate(v.parts):
                mixed = fields.keyed_hash(np.asarray(mixed + part * U(2), dtype=U), (key, i, j), 2**62)
        return Named(axes, tuple(fields.keyed_hash(mixed, (key, m), m) for m in self.moduli))

    def each(self, f: Callable[..., Any], *args: Named) -> Named:
        found = (f(*(v.parts[i] for v in args), U(m)) for i, m in enumerate(self.moduli))
        return Named(args[0].axes, tuple(found))

    def inverse(self, v: Named) -> Named:
        return self.each(lambda a, m: fields.power(np.asarray(a, dtype=U), int(m) - 2, int(m)), v)

    def exponential(self, v: Named) -> Named:
        p = self.powers[np.asarray(v.parts[1], dtype=np.int64)]
        return Named(v.axes, (p, np.zeros_like(p)))

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        where = tuple(v.axes.index(a) for a in axes)
        kept = tuple(a for a in v.axes if a not in axes)
        if kind == "sum":
            return Named(kept, tuple(p.sum(axis=where) % U(m) for p, m in zip(v.parts, self.moduli, strict=True)))
        found: Any = {"max": np.max, "min": np.min}[kind]
        return Named(kept, tuple(np.asarray(found(p, axis=where)) for p in v.parts))

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Named:
        x = args[0]
        match fn:
            case "add":
                return self.each(lambda a, b, m: (a + b) % m, *args)
            case "sub":
                return self.each(lambda a, b, m: (a + m - b) % m, *args)
            case "mul" | "and":
                return self.each(lambda a, b, m: a * b % m, *args)
            case "div":
                return self.each(lambda a, b, m: a * b % m, x, self.inverse(args[1]))
            case "neg":
                return self.each(lambda a, m: (m - a) % m, x)
            case "reciprocal":
                return self.inverse(x)
            case "square":
                return self.each(lambda a, m: a * a % m, x)
            case "rsqrt":
                return self.inverse(self.table("sqrt", x))
            case "exp":
                return self.exponential(x)
            case "silu":
                q = Named(x.axes, (x.parts[1], x.parts[1]))
                return self.function("mul", {}, [self.exponential(x), q])
            case "max" | "min":
                return self.each(lambda a, b, m: (np.maximum if fn == "max" else np.minimum)(a, b), *args)
        return self.table((fn, *sorted(attrs.items())), *args)

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        axes = union_axes(args)
        xs = [aligned(v, axes) for v in args]
        match op:
            case Select():
                mask, a, b = xs
                return (self.elementwise("add", b, self.elementwise("mul", mask, self.elementwise("sub", a, b))),)
            case MaskedExp():
                return (self.elementwise("mul", xs[1], self.exponential(xs[0])),)
            case Iota(axis):
                return (self.value((axis.name,), np.arange(self.sizes[axis.name])),)
            case Cast(dtype) if dtype.is_float:
                return (xs[0],)
        return (self.table(repr(op), *xs),)


@dataclass(frozen=True)
class Rule:
    """A rule with small primes: as published, one random test; as released, with inputs i·100003 + j."""

    name: str
    p: int
    q: int
    counted: bool

    def accepts(self, pair: Pair) -> bool:
        try:
            check(pair.graph)
            (draw,) = draws(pair.program, pair.graph, 1)
            found = []
            for side in (pair.program, pair.graph):
                algebra = _Placed(self.p, self.q, draw.sizes, draw.tiles, draw.parts)
                algebra.starts = draw.starts
                inputs = {}
                for n, i in enumerate(pair.program.inputs):
                    axes = tuple(a.name for a in i.tensor.axes)
                    shape = tuple(draw.sizes[a] for a in axes)
                    words = fields.random_words((0, i.name), shape, self.p * self.q)
                    if self.counted:
                        words = (U(n * 100003) + np.arange(math.prod(shape), dtype=U)).reshape(shape)
                    inputs[i.name] = algebra.value(axes, words)
                tensors = side.tensors()
                values = outputs(side, inputs, algebra)
                found.append(
                    [
                        aligned(algebra.expanded(v, [a.name for a in tensors[o.value].axes]),
                                [a.name for a in tensors[o.value].axes])
                        for o, v in zip(side.outputs, values, strict=True)
                    ]
                )  # fmt: skip
        except (MugraphError, AssertionError, IndexError, KeyError, ValueError, TypeError):
            return False
        return all(
            np.array_equal(x, y) for a, b in zip(*found, strict=True) for x, y in zip(a.parts, b.parts, strict=True)
        )


class _Placed(SmallFields):
    """Slices start where they do at the sizes of the draw."""

    starts: Mapping[tuple[str, int], int]

    def apply(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        if isinstance(op, Slice):
            op = Slice(op.axis, op.out, self.starts.get((op.axis, op.start), op.start), op.step)
        return super().apply(op, args)


RULES = (Rule("published", 227, 113, False), Rule("released", 167, 83, True))


def measured(every: int = 1, tell: Callable[[str], None] = lambda _: None) -> list[Row]:
    """A row for each corpus and rule, over each `every`-th pair; what comes out wrong is told.  Times are of one
    process."""
    corpora = {"mutants": wrong(every), "equivalents": equal(every)}
    rows = []
    for corpus, pairs in corpora.items():
        deltas, proofs = [], []

        def ours(pair: Pair, deltas: list[float] = deltas) -> bool:
            try:
                deltas.append(verify(pair.program, pair.graph).certificate.delta)
            except MugraphError:
                return False
            return True

        for name, accepts in (("mugraph", ours), *((r.name, r.accepts) for r in RULES)):
            verdicts, times = zip(*(timed(partial(accepts, p)) for p in pairs), strict=True)
            if name == "mugraph":
                for pair, accepted in zip(pairs, verdicts, strict=True):
                    if accepted != (corpus == "equivalents"):
                        tell(f"{'accepted' if accepted else 'refused'}: {pair.name} ({pair.kind})")
                proofs = [is_proved(p) for p in pairs]
            rows.append(
                {
                    "corpus": corpus,
                    "rule": name,
                    "pairs": len(pairs),
                    "accepted": sum(verdicts),
                    "refused": len(pairs) - sum(verdicts),
                    "unknown": proofs.count(False) if name == "mugraph" else None,
                    "proved_all_sizes": proofs.count(True) if name == "mugraph" else None,
                    "delta_max": max(deltas, default=None) if name == "mugraph" else None,
                    "ms_median": statistics.median(times),
                    "ms_longest": max(times),
                }
            )
    return rows


def is_proved(pair: Pair) -> bool:
    try:
        return prove(pair.program, pair.graph).proved
    except MugraphError:  # malformed
        return False


def tiers(tell: Callable[[str], None] = lambda _: None, names: Sequence[str] = tuple(FAMILIES)) -> list[Row]:
    """A row for each variant of each of these programs; times in milliseconds, of one process."""
    rows = []
    target = parse_target("cuda:90")
    for name in names:
        for variant, program in FAMILIES[name].variants.items():
            tell(f"{name} {variant}")
            found = search(program, accept=lambda g, p=program: verify(p, finished(g)), space=SearchSpace(sizes=()))
            tested, first = timed(lambda p=program, g=found.graph: verify(p, finished(g)))
            proof, second = timed(lambda v=tested: proved(v))
            source = emit(tested, target)
            bounds, third = timed(lambda v=tested, s=source: bounds_tier(v, target, s))
            rows.append(
                {
                    "program": name,
                    "variant": variant,
                    "delta_log2": tested.certificate.delta_log2,
                    "draws": len(tested.certificate.draws),
                    "tested_ms": first / len(tested.certificate.draws),
                    "proof": proof.certificate.proof or "proved",
                    "proved_ms": second,
                    "claims": bounds.claims if bounds else 0,
                    "unknown": bounds.reason if bounds else "no kernels of its own",
                    "bounds_ms": third,
                    "total_ms": first + second + third,
                }
            )
    return rows


def timed(f: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    found = f()
    return found, 1e3 * (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th pair only")
    parser.add_argument("--tiers", action="store_true", help="what each tier costs, by program")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.tiers:
        rows = tiers(tell)
        if options.json:
            print_document(document("tiers", rows))
        else:
            print_table("what is chosen, by tier", rows, list(rows[0]))
            for name in ("tested_ms", "total_ms"):
                values = [r[name] for r in rows]
                print(f"{name}: median {statistics.median(values):.1f}, longest {max(values):.1f}")
        return 0
    rows = measured(options.every, tell)
    if options.json:
        print_document(document("verify", rows))
    else:
        print_table("the corpora, by rule", rows, list(rows[0]))
    failed = [r for r in rows if r["rule"] == "mugraph" and r["accepted" if r["corpus"] == "mutants" else "refused"]]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
