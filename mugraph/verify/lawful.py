"""The algebra of the `tested` tier that knows the registered laws (`verify.laws`).

A value carries what it is made of, as far as laws need it: factors that are not negative, square roots among them,
and a logarithm that is one of its terms.  A law rewrites a value to an equal one while it is computed, under a
condition that follows from how its operands were made; all else is as in `FormalAlgebra`.  So what is accepted is
equal by the laws, and what is refused may still be: factors are found where they are factors of a product, not in an
expanded sum.

A maximum is named such that the name moves with a shift: of n elements x_i with the sum s it is (s + h) / n, where h is
0 for n = 1, |x_1 - x_2| for n = 2, the root of the square, and else a keyed hash of the set of all n·x_i - s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from typing import Any, cast

import numpy as np

from mugraph.ir import fields
from mugraph.ir.evaluate import Named, aligned
from mugraph.ir.fields import P, Q, U, Words
from mugraph.ir.ops import Compare, Iota, MaskedExp, PureOp, Select
from mugraph.verify.formal import _NOTHING, _P, _Q, _SET, Bound, Fact, FormalAlgebra, Value, exponent_of, plain

MOST_FACTORS = 8  # that are remembered of a value


class LawfulAlgebra(FormalAlgebra):
    """`FormalAlgebra` with the registered laws."""

    # -- what is known of values ---------------------------------------------------------------------------------

    def _factors(self, v: Value, like: Value | None = None) -> list[Fact]:
        """Factors of v that are not negative, itself if nothing else is known of it, in the shape of `like`."""
        found = [f for f in v.facts if f.kind not in ("log", "minus log")]
        if not found and v.sign and not v.formal:
            found = [Fact("factor", (v if v.nonneg else super()._negated(v),))]
        return found if like is None else [self._shaped(f, like) for f in found]

    def _shaped(self, f: Fact, like: Value) -> Fact:
        lead = like.lead
        return f.map(lambda p: np.broadcast_to(p, lead + p.shape[len(lead) :]))

    def _known(self, v: Value, facts: Sequence[Fact] = (), sign: int = 0) -> Value:
        return replace(v, facts=tuple(facts[:MOST_FACTORS]), sign=sign)

    def _equal(self, a: Value, b: Value) -> bool:
        """Whether two plain values are equal everywhere.  Equality by accident is accounted for."""
        if a is b:
            return True
        if a.formal or b.formal:
            return False
        if not all((a.words(i) == b.words(i)).all() for i in (_P, _Q)):
            return False
        degree = max(a.bound.top + b.bound.bottom, b.bound.top + a.bound.bottom)
        self._coincidence += max(math.prod(a.lead), 1) * (degree / (P - 1)) * (degree / (Q - 1))
        return True

    def _shared(self, a: Sequence[Fact], b: Sequence[Fact]) -> list[Fact]:
        """The factors of one that the other has too."""
        found, left = [], list(b)
        for f in a:
            same = next((g for g in left if g.kind == f.kind and self._equal(f.of[0], g.of[0])), None)
            if same is not None:
                left = [g for g in left if g is not same]
                found.append(f)
        return found

    def _factor(self, facts: Sequence[Fact], like: Value) -> Value:
        """The product of factors, over the axes of a value."""
        one = self._spread(FormalAlgebra.literal(self, Fraction(1)), like)
        return reduce(super()._times, [replace(f.of[0], axes=like.axes) for f in facts], one)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def literal(self, value: Fraction) -> Value:
        return replace(super().literal(value), sign=1 if value >= 0 else -1)

    def _is_zero(self, v: Value) -> bool:
        """Whether a value is the literal 0."""
        return not v.formal and v.bound == Bound() and not v.words(_P).any() and not v.words(_Q).any()

    def _plus(self, a: Value, b: Value) -> Value:
        v = super()._plus(a, b)
        logs = [self._shaped(f, v) for x in (a, b) for f in x.facts if f.kind in ("log", "minus log")]
        if self._is_zero(a) or self._is_zero(b):
            other = b if self._is_zero(a) else a
            return self._known(v, [*self._factors(other, v), *logs], other.sign)
        shared = self._shared(self._factors(a, v), self._factors(b, v))
        return self._known(v, [*shared, *(logs if len(logs) == 1 else ())], _sign([a, b]))

    def _negated(self, a: Value) -> Value:
        v = super()._negated(a)
        flipped: Mapping[str, Any] = {"log": "minus log", "minus log": "log"}
        v = self._known(v, [Fact(flipped.get(f.kind, f.kind), f.of) for f in self._factors(a) + _logs(a)], -a.sign)
        if a.order is None or a.formal:
            return v
        members = a.words(_SET)  # -max(x) = min(-x)
        negative = np.where(members == _NOTHING, members, (U(P * Q) - members) % U(P * Q))
        return replace(v, parts=(*v.parts[:_SET], negative), order="min" if a.order == "max" else "max")

    def _times(self, a: Value, b: Value) -> Value:
        v = super()._times(a, b)
        squared = self._equal(a, b)
        facts = [*self._factors(a, v), *self._factors(b, v)]
        while pair := self._pair([f for f in facts if f.kind != "factor"]):
            r, s = pair
            square = replace(r.of[1], axes=v.axes)
            twice = super()._times(*(replace(f.of[0], axes=v.axes) for f in pair))
            v = super()._times(v, super()._times(square, self._undone(twice)))
            gone = (s,) if r.kind == "relu" else pair  # relu(x)·relu(x) = x·relu(x)
            facts = [f for f in facts if all(f is not g for g in gone)] + self._factors(square)
        return self._known(v, facts, 1 if squared else a.sign * b.sign)

    def _pair(self, facts: Sequence[Fact]) -> tuple[Fact, Fact] | None:
        """Two of the factors that are equal."""
        pairs = ((f, g) for i, f in enumerate(facts) for g in facts[i + 1 :])
        return next((pair for pair in pairs if self._equal(pair[0].of[0], pair[1].of[0])), None)

    def _undone(self, a: Value) -> Value:
        """1/a for what a value is a multiple of: where a is 0, so is the value, and it does not matter what this is."""
        if a.formal:
            return super()._inverse(a)
        p, q = (fields.inverse(a.words(i), m) for i, m in ((_P, P), (_Q, Q)))
        return plain(a.axes, p, q, a.bound.inverted())

    def _inverse(self, a: Value) -> Value:
        """1/a.  The inverse of a root is that root over its square."""
        v, facts = super()._inverse(a), []
        for f in self._factors(a) if a.facts else ():
            first = replace(f.of[0], axes=v.axes)
            if f.kind == "root":
                square = replace(f.of[1], axes=v.axes)
                under = super()._inverse(square)
                v = super()._times(v, super()._times(super()._times(first, first), under))
                facts += [f] if under.formal else [f, Fact("factor", (under,))]
            elif f.kind == "factor":
                facts.append(Fact("factor", (super()._inverse(first),)))
        return self._known(v, facts, a.sign)

    def _power(self, a: Value, exponent: int) -> Value:
        if 0 < exponent <= MOST_FACTORS:
            return reduce(self._times, [a] * exponent)
        v = super()._power(a, exponent)
        return v if exponent < 0 else self._known(v, (), a.sign if exponent % 2 else 1)

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Value:
        result, own = super().total(kind, v, axes), cast(Value, v)
        return result if kind in ("max", "min") else self._known(result, self._constant(own, axes), own.sign)

    def _constant(self, v: Value, axes: tuple[str, ...]) -> list[Fact]:
        """The factors of v that do not change along some axes, without these axes."""
        found = []
        for f in self._factors(v):
            first = f.map(lambda p: p[tuple(slice(0, 1) if a in axes else slice(None) for a in v.axes)])
            if self._equal(f.of[0], first.of[0]):
                at = tuple(0 if a in axes else slice(None) for a in v.axes)
                found.append(f.map(lambda p, at=at: p[at]))
        return found

    # -- functions -----------------------------------------------------------------------------------------------

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Value:
        v = super().function(fn, attrs, args)
        return replace(v, sign=1) if fn in ("not", "and", "or") else v

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        found = super().opaque(op, args)
        match op:
            case Compare() | Iota():
                return tuple(replace(cast(Value, v), sign=1) for v in found)
            case MaskedExp():  # a mask is a truth value
                return (replace(cast(Value, found[0]), sign=1),)
            case Select():
                return (replace(cast(Value, found[0]), sign=_sign([cast(Value, v) for v in args[1:]])),)
        return found

    def _opaque(self, key: object, *args: Value) -> Value:
        x = args[0]
        match key:
            case "sqrt":
                return self._root(x)
            case "abs":
                return self._absolute(x) if x.sign == 0 else x if x.nonneg else self._negated(x)
        return replace(super()._opaque(key, *args), sign=int(key == "sigmoid"))

    def _root(self, x: Value) -> Value:
        """sqrt(x), of equal factors c·c the factor c."""
        one = self._spread(FormalAlgebra.literal(self, Fraction(1)), x)
        if not x.nonneg:
            return self._known(super()._opaque("sqrt", x), (), sign=1)
        if x.formal:
            return self._with_root(x, one, ())
        facts, out = [f for f in self._factors(x) if f.kind == "factor"], list[Fact]()
        while pair := self._pair(facts):
            facts = [f for f in facts if all(f is not g for g in pair)]
            out.append(pair[0])
        factor = self._factor(out, x)
        inside = super()._times(x, self._undone(super()._times(factor, factor))) if out else x
        if self._equal(inside, one):
            return self._known(factor, out, sign=1)
        return self._with_root(inside, factor, out)

    def _absolute(self, x: Value) -> Value:
        """|x| as the root of x·x, of factors that are not negative the factor."""
        out = [] if x.formal else self._factors(x)
        factor = self._factor(out, x)
        inside = super()._times(x, self._undone(factor)) if out else x
        return self._with_root(super()._times(inside, inside), factor, out)

    def _with_root(self, square: Value, factor: Value, out: Sequence[Fact]) -> Value:
        """sqrt(square)·factor, where the square is not negative."""
        root = super()._opaque("sqrt", square)
        fact = Fact("root", (root, replace(square, sign=1)))
        return self._known(super()._times(root, factor), [fact, *out], sign=1)

    def _exp(self, a: Value) -> Value:
        logs = () if self.cut_exp or a.formal else _logs(a)
        if not logs:
            return self._known(super()._exp(a), (), sign=1)
        (fact,) = logs
        x, log = (replace(v, axes=a.axes) for v in fact.of)
        rest = super()._plus(a, super()._negated(log) if fact.kind == "log" else log)
        shifted = super()._exp(rest)
        return self._known(super()._times(shifted, x if fact.kind == "log" else super()._inverse(x)), (), sign=1)

    def _log(self, a: Value) -> Value:
        v = super()._log(a)
        if a.formal and a.denominator is None:
            c, e = a.numerator
            if c.shape[-1] == 1:
                alone = c[..., 0] == 1
                p, q = (np.where(alone, e[..., 0] % U(m), v.words(i)) for i, m in ((_P, P), (_Q, Q)))
                v = plain(v.axes, p, q, v.bound)
        return self._known(v, [Fact("log", (a, v))] if a.nonneg else ())

    # -- maxima --------------------------------------------------------------------------------------------------

    def _set(self, v: Value, order: str) -> Words:
        """The elements, each as one word of Z_pq."""
        if v.order == order:
            return v.words(_SET)
        x = super()._opaque("element", v) if v.formal else v
        return exponent_of(x.words(_P), x.words(_Q))[..., None]

    def _from_set(self, axes: tuple[str, ...], members: Words, order: str, bound: Bound) -> Value:
        k = members.shape[-1]
        apart = Bound(bound.top + k * bound.bottom, k * bound.bottom)
        n, widest = self._applied.get("extreme", (0, Bound()))
        self._applied["extreme"] = n + members.size, widest.either(apart)
        there = members != _NOTHING
        count = there.sum(axis=-1, dtype=U)
        sums, away = [], []
        for m in (P, Q):
            own = np.where(there, members % U(m), U(0))
            own = own if order == "max" else (U(m) - own) % U(m)
            sums.append(own.sum(axis=-1) % U(m))
            away.append((count[..., None] * own % U(m) + (U(m) - sums[-1])[..., None]) % U(m))
        p, q = (w[..., 0] * w[..., 0] % U(m) for w, m in zip(away, (P, Q), strict=True))
        root = super()._opaque("sqrt", plain(axes, p, q, apart.times(apart)))
        with np.errstate(over="ignore"):  # sums of random words modulo 2**64: the set of elements
            hashed = fields.keyed_hash(exponent_of(*away), (self.key, "away"), 2**62)
            name = np.where(there, hashed, U(0)).sum(axis=-1, dtype=U)
        named = []
        for i, total, m in zip((_P, _Q), sums, (P, Q), strict=True):
            h = np.where(count < 2, U(0), fields.keyed_hash(name, (self.key, "extreme", m), m))
            h = np.where(count == 2, root.words(i), h)
            part = fields.multiply((total + h) % U(m), fields.inverse(np.maximum(count, U(1)), m), m)
            named.append(part if order == "max" else (U(m) - part) % U(m))
        found = Bound(max(apart.top, 1 + apart.bottom), apart.bottom)
        return Value(axes, (*named, None, None, None, None, members), found, order)

    def _extreme(self, order: str, a: Value, b: Value) -> Value:
        result = super()._extreme(order, a, b)
        winner = 1 if order == "max" else -1
        sign = winner if winner in (a.sign, b.sign) else _sign([a, b])
        for x, other in ((a, b), (b, a)):
            if self._is_zero(x) and other.nonneg:
                kept = other if order == "max" else x
                return self._known(super()._plus(kept, super()._times(x, other)), self._factors(kept, result), 1)
            if x.order == order and (x.words(_SET) == _NOTHING).all():  # of nothing yet
                return self._scaled(result, self._factors(other, result), sign)
        mine, its = (self._factors(v, result) for v in (a, b))
        shared = its if self._is_zero(a) else mine if self._is_zero(b) else self._shared(mine, its)
        found = self._scaled(result, shared, sign)
        if order == "min" or found.formal or not (self._is_zero(a) or self._is_zero(b)):
            return found
        # relu(x)·relu(x) = x·relu(x), for x without the factors
        under = self._undone(self._factor(shared, found))
        x = super()._times(b if self._is_zero(a) else a, under)
        r = super()._times(found, under)
        return self._known(found, [Fact("relu", (r, super()._times(x, r))), *shared], 1)

    def _extreme_along(self, order: str, v: Value, axes: tuple[str, ...]) -> Value:
        return self._scaled(super()._extreme_along(order, v, axes), self._constant(v, axes), v.sign)

    def _scaled(self, extreme: Value, factors: Sequence[Fact], sign: int) -> Value:
        """The extreme of what the elements are without common factors, times these."""
        if not factors or extreme.formal:
            return replace(extreme, sign=sign)
        c = self._factor(factors, extreme)
        under = self._undone(c)
        members = extreme.words(_SET)
        p, q = (members % U(m) * under.words(i)[..., None] % U(m) for i, m in ((_P, P), (_Q, Q)))
        divided = np.where(members == _NOTHING, members, exponent_of(p, q))
        bound = extreme.bound.times(under.bound)
        inner = self._from_set(extreme.axes, divided, cast(str, extreme.order), bound)
        result = super()._times(inner, c)
        return replace(self._known(result, factors, sign), parts=(*result.parts[:_SET], members), order=extreme.order)

    # -- stores and joints ---------------------------------------------------------------------------------------

    def joined(self, pieces: Sequence[Named], axis: str) -> Value:
        values = [cast(Value, aligned(v, pieces[0].axes)) for v in pieces]
        result = super().joined(values, axis)
        return self._known(result, self._facts_of(values, lambda vs: self.joined(vs, axis)), _sign(values))

    def blank(self, v: Value, shape: tuple[int, ...]) -> Value:
        def empty(x: Value) -> Value:
            return x.map(lambda p: np.zeros(shape + p.shape[len(shape) :], dtype=p.dtype))

        facts = [Fact(f.kind, tuple(empty(x) for x in f.of)) for f in v.facts]
        return replace(super().blank(v, shape), facts=tuple(facts), sign=v.sign)

    def write(self, whole: Named, index: Any, v: Named, target: str, results: dict[str, Named]) -> None:
        old, new = cast(Value, whole), cast(Value, v)
        super().write(old, index, new, target, results)
        found = cast(Value, results[target])

        def inside(values: Sequence[Value]) -> Value:
            held: dict[str, Named] = {}
            self.write(values[0], index, values[1], "of", held)
            return cast(Value, held["of"])

        results[target] = self._known(found, self._facts_of([old, new], inside), _sign([old, new]))

    def _facts_of(self, values: Sequence[Value], put_together: Any) -> list[Fact]:
        """Facts of what is put together from values, where all have facts of the same kinds."""
        if len({tuple(f.kind for f in v.facts) for v in values}) > 1:
            return []
        found = []
        for facts in zip(*(v.facts for v in values), strict=True):
            columns = zip(*([replace(x, axes=values[0].axes) for x in f.of] for f in facts), strict=True)
            found.append(Fact(facts[0].kind, tuple(put_together(column) for column in columns)))
        return found


def _logs(v: Value) -> list[Fact]:
    return [f for f in v.facts if f.kind in ("log", "minus log")]


def _sign(values: Sequence[Value]) -> int:
    """The sign that all have."""
    signs = {v.sign for v in values}
    return signs.pop() if len(signs) == 1 else 0
