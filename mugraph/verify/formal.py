"""The algebra of the `tested` tier: Z_p x Z_q, with exponentials as formal sums.

A value without exponentials is *plain*: a pair in Z_p x Z_q.  A value with exponentials is *formal*: a fraction of two
formal sums `Σ c·[e]`, c in Z_p and e in Z_pq, that is, a fraction over the group ring Z_p[Z_pq].  `exp` takes a plain
x to `1·[x]`, x read as an element of Z_pq, so `exp a · exp b = exp(a + b)` holds and nothing else does.  Fractions are
compared by cross-multiplication, coefficient by coefficient.  `log` takes a formal sum to a plain value such that
`log(v · exp m) = log v + m` and `log(1 / v) = -log v` hold and nothing else does.

Every value carries degree bounds, from which `FormalAlgebra.error` computes how likely two different values are taken
for equal (Schwartz 1980, Zippel 1979; the pair of fields is that of Mirage, OSDI'25, section 5).  The derivation is in
docs/verification.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from mugraph.errors import UnsupportedOpError
from mugraph.ir import fields
from mugraph.ir.evaluate import ArrayAlgebra, Named, aligned, narrow
from mugraph.ir.fields import P, Q, U, Words
from mugraph.ir.infer import op_text
from mugraph.ir.ops import (
    Cast,
    Compare,
    CumSum,
    Iota,
    MaskedExp,
    Pack,
    PureOp,
    Quantize,
    Scatter,
    Select,
    Slice,
    TopK,
    Unpack,
)  # fmt: skip

MAX_TERMS = 10**6
EXP_CUT = "exp(a + b) = exp(a)·exp(b): formal sums exceed the limit of terms, so exp is opaque"
NESTED_EXP = "exp(a + b) = exp(a)·exp(b) where a, b hold exponentials themselves"
LOG_OF_FRACTION = "log(v·exp(m)) = log(v) + m where v is a quotient of two sums of exponentials"
EVALUATED = (
    "an opaque function of a value with exponentials is keyed by that value at two random elements of order q; "
    "no bound is proved for this step"
)

# The components of a value: the plain pair, the two formal sums as (coefficients, exponents), and the elements that
# a maximum or minimum was taken over.  Formal sums and elements have one private trailing dimension.
_P, _Q, _NC, _NE, _DC, _DE, _SET = range(7)
_NOTHING = U(2**64 - 1)  # fills up sets of elements

Sum = tuple[Words, Words]


class TooManyTerms(Exception):
    """A formal sum grows beyond the limit of terms."""


@dataclass(frozen=True)
class Bound:
    """Upper bounds, as polynomials in the random draws: degrees of the numerator's and denominator's coefficients
    (`top`, `bottom`), degrees of the exponents' numerators and denominators, and the number of terms of both sums."""

    top: int = 0
    bottom: int = 0
    exponent_top: int = 0
    exponent_bottom: int = 0
    terms: int = 1
    below: int = 1

    def exponents(self, other: Bound) -> tuple[int, int]:
        """Bounds of a sum of two exponents."""
        top = max(self.exponent_top + other.exponent_bottom, other.exponent_top + self.exponent_bottom)
        return top, self.exponent_bottom + other.exponent_bottom

    def times(self, other: Bound) -> Bound:
        terms, below = self.terms * other.terms, self.below * other.below
        return Bound(self.top + other.top, self.bottom + other.bottom, *self.exponents(other), terms, below)

    def inverted(self) -> Bound:
        return replace(self, top=self.bottom, bottom=self.top, terms=self.below, below=self.terms)

    def plus(self, other: Bound, *, formal: bool = False, crossed: bool = False) -> Bound:
        """Bounds of a sum.  `crossed`: each numerator was multiplied with the other's formal denominator."""
        top = max(self.top + other.bottom, other.top + self.bottom)
        bottom = self.bottom + other.bottom
        if crossed:
            terms = self.terms * other.below + other.terms * self.below
            return Bound(top, bottom, *self.exponents(other), terms, self.below * other.below)
        exponent_top = max(self.exponent_top, other.exponent_top)
        exponent_bottom = max(self.exponent_bottom, other.exponent_bottom)
        terms = self.terms + other.terms if formal else 1
        return Bound(top, bottom, exponent_top, exponent_bottom, terms, max(self.below, other.below))

    def total(self, count: int, *, formal: bool) -> Bound:
        """Bounds of a sum of `count` values of this bound over one formal denominator."""
        top = self.top + (count - 1) * self.bottom
        return replace(self, top=top, bottom=count * self.bottom, terms=count * self.terms if formal else 1)

    def either(self, other: Bound) -> Bound:
        """Bounds that hold for both."""
        return Bound(
            max(self.top, other.top),
            max(self.bottom, other.bottom),
            max(self.exponent_top, other.exponent_top),
            max(self.exponent_bottom, other.exponent_bottom),
            max(self.terms, other.terms),
            max(self.below, other.below),
        )

    @property
    def difference(self) -> int:
        """Degree of what vanishes where two values of this bound agree: exact for plain values, and for values with
        exponentials what two random points would give if they were independent of everything."""
        return self.top + self.bottom + (self.terms + self.below) * (self.exponent_top + self.exponent_bottom)


OPAQUE = Bound(1, 0)


@dataclass(frozen=True)
class Value(Named):
    """A plain or formal value with its bounds.  `order` is "max" or "min" where the set of elements is kept; `facts`
    and `sign` are what the registered laws need (`verify.lawful`): 1 is never negative, -1 never positive."""

    bound: Bound = Bound()
    order: str | None = None
    facts: tuple[Fact, ...] = ()
    sign: int = 0

    def map(self, f: Any, axes: tuple[str, ...] | None = None) -> Value:
        parts = tuple([None if p is None else f(p) for p in self.parts])
        facts = tuple([fact.map(f) for fact in self.facts])
        return Value(self.axes if axes is None else axes, parts, self.bound, self.order, facts, self.sign)

    @property
    def nonneg(self) -> bool:
        return self.sign > 0

    @property
    def formal(self) -> bool:
        return self.parts[_P] is None

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        part = self.parts[_NC][..., 0] if self.formal else self.parts[_P]  # type: ignore[index]
        return cast("NDArray[Any]", part).shape

    def words(self, index: int) -> Words:
        part = self.parts[index]
        assert part is not None
        return part

    @property
    def numerator(self) -> Sum:
        if self.formal:
            return self.words(_NC), self.words(_NE)
        p = self.words(_P)[..., None]
        return p, np.zeros_like(p)

    @property
    def denominator(self) -> Sum | None:
        return None if self.parts[_DC] is None else (self.words(_DC), self.words(_DE))


@dataclass(frozen=True)
class Fact:
    """What is known of a value v, by values of the same shape whose names of axes do not matter:

    factor (c):           v is a multiple of c >= 0
    root (r, y):          v is a multiple of r >= 0, and r·r = y
    relu (r, y):          the same, but y / r is no inverse of r
    log (x, l):           v is a sum with the term l = log x, x >= 0
    minus log (x, l):     v is a sum with the term -l
    """

    kind: Literal["factor", "root", "relu", "log", "minus log"]
    of: tuple[Value, ...]

    def map(self, f: Any) -> Fact:
        return Fact(self.kind, tuple([v.map(f) for v in self.of]))


def plain(axes: tuple[str, ...], p: Words, q: Words, bound: Bound) -> Value:
    return Value(axes, (p, q, None, None, None, None, None), bound)


def fraction(axes: tuple[str, ...], top: Sum, bottom: Sum | None, bound: Bound) -> Value:
    """A formal value; all components get the same leading shape."""
    arrays = [*top, *(bottom or ())]
    leads = {a.shape[:-1] for a in arrays}
    spread: list[NDArray[Any] | None] = [*arrays]
    if len(leads) > 1:
        lead = np.broadcast_shapes(*leads)
        spread = [_spread_to(a, lead) for a in arrays]
    spread += [None] * (4 - len(spread))
    return Value(axes, (None, None, *spread, None), bound)


def _spread_to(terms: Words, lead: tuple[int, ...]) -> Words:
    return terms if terms.shape[:-1] == lead else np.broadcast_to(terms, (*lead, terms.shape[-1]))


# -- formal sums --------------------------------------------------------------------------------------------------


def exponent_of(p: Words, q: Words) -> Words:
    """The element of Z_pq that is p in Z_p and q in Z_q."""
    apart = (q + (U(Q) - p % U(Q))) * U(pow(P, -1, Q)) % U(Q)
    return p + U(P) * apart


def merged(c: Words, e: Words) -> Sum:
    """The sum with equal exponents merged and zero terms dropped."""
    if c.shape[-1] == 1:
        return c, np.where(c == 0, U(0), e)
    c, e = _taken(c, e, np.argsort(e, axis=-1))
    again = e[..., 1:] == e[..., :-1]
    if again.any():
        last = np.ones(e.shape, dtype=bool)
        np.logical_not(again, out=last[..., :-1])
        running = np.cumsum(c, axis=-1, dtype=U)  # below 2**31 * terms, which fits
        before = np.zeros_like(running)
        before[..., 1:] = np.maximum.accumulate(np.where(last, running, U(0)), axis=-1)[..., :-1]
        c = np.where(last, (running - before) % U(P), U(0))
    present = c != 0
    width = max(int(np.count_nonzero(present, axis=-1).max(initial=0)), 1)
    if width == c.shape[-1]:
        return c, e
    c, e = _taken(c, e, np.argsort(~present, axis=-1, kind="stable")[..., :width])
    return c, np.where(c == 0, U(0), e)


def _taken(c: Words, e: Words, places: NDArray[np.int64]) -> Sum:
    """Terms of each sum by their places."""
    shape, width = places.shape, c.shape[-1]
    rows = np.arange(places[..., 0].size)[:, None] * width
    flat = places.reshape(-1, shape[-1]) + rows
    return c.reshape(-1)[flat].reshape(shape), e.reshape(-1)[flat].reshape(shape)


def _inverted(c: Words, e: Words) -> Sum:
    """The inverse of one term is one term."""
    return fields.inverse(c, P), (U(P * Q) - e) % U(P * Q)


def _agreement(terms: int, apart: int, degree: int) -> float:
    """Bound on the probability that a formal sum which is not zero as a function is zero: one of its terms meets
    another, in both parts of the exponent, or its coefficient vanishes (docs/verification.md)."""
    return (terms - 1) * (apart / (P - 1)) * (apart / (Q - 1)) + degree / (P - 1)


def sum_product(a: Sum, b: Sum, limit: int) -> Sum:
    lead = np.broadcast_shapes(a[0].shape[:-1], b[0].shape[:-1])
    width = a[0].shape[-1] * b[0].shape[-1]
    _check_room(lead, width, limit)
    c = a[0][..., :, None] * b[0][..., None, :] % U(P)
    e = (a[1][..., :, None] + b[1][..., None, :]) % U(P * Q)  # below 2**62 before the reduction
    c, e = c.reshape(*lead, width), e.reshape(*lead, width)
    return (c, e) if 1 in (a[0].shape[-1], b[0].shape[-1]) else merged(c, e)  # a shift keeps exponents apart


def sum_plus(a: Sum, b: Sum, limit: int) -> Sum:
    lead = np.broadcast_shapes(a[0].shape[:-1], b[0].shape[:-1])
    _check_room(lead, a[0].shape[-1] + b[0].shape[-1], limit)

    def joined(x: Words, y: Words) -> Words:
        return np.concatenate([_spread_to(w, lead) for w in (x, y)], axis=-1)

    return merged(joined(a[0], b[0]), joined(a[1], b[1]))


def sum_negated(a: Sum) -> Sum:
    return (U(P) - a[0]) % U(P), a[1]


def sums_equal(a: Sum, b: Sum, limit: int) -> NDArray[np.bool_]:
    """Where the two sums are equal as elements of the group ring."""
    return np.asarray((sum_plus(a, sum_negated(b), limit)[0] == 0).all(axis=-1))


def _check_room(lead: tuple[int, ...], width: int, limit: int) -> None:
    if math.prod(lead) * width > limit:
        raise TooManyTerms(f"{lead} x {width} terms")


def _padded(part: Words, width: int) -> Words:
    extra = width - part.shape[-1]
    return part if extra <= 0 else np.concatenate([part, np.zeros((*part.shape[:-1], extra), dtype=U)], axis=-1)


class FormalAlgebra(ArrayAlgebra):
    """Plain and formal values, and the record of what a bound on the error needs.

    `zero_division` tells that a denominator was zero: the caller draws new inputs.  `starts` maps the start of a
    slice along an axis, `(axis, start)`, to its place at the sizes of the test.  With `cut_exp`, exp is opaque.
    `cuts` names laws that were not used, `assumptions` steps that rest on more than a proof.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        tiles: Mapping[str, int] | None = None,
        parts: Mapping[str, int] | None = None,
        *,
        key: object = 0,
        starts: Mapping[tuple[str, int], int] | None = None,
        cut_exp: bool = False,
        max_terms: int = MAX_TERMS,
    ) -> None:
        super().__init__(sizes, tiles, parts)
        self.key = key
        self.starts = dict(starts or {})
        self.cut_exp = cut_exp
        self.max_terms = max_terms
        self.zero_division = False
        self.cuts: set[str] = set()
        self.assumptions: set[str] = set()
        self._omegas = [fields.order_q_element(key, i) for i in range(2)]
        self._applied: dict[object, tuple[int, Bound]] = {}  # opaque function -> applications, bound of all arguments
        self._logs = (0, Bound())  # logarithms of formal sums: applications, bound of all arguments
        self._coincidence = 0.0  # probability that denominators came out equal by accident
        self._inverted = 0.0  # probability that some denominator is zero

    def random(self, axes: tuple[str, ...], key: object) -> Value:
        """A fresh random value; the two parts are independent."""
        shape = tuple(self.sizes[a] for a in axes)
        p, q = (fields.random_words((self.key, key, m), shape, m) for m in (P, Q))
        return plain(axes, p, q, OPAQUE)

    def literal(self, value: Fraction) -> Value:
        p, q = (np.asarray(fields.rational(value.numerator, value.denominator, m), dtype=U) for m in (P, Q))
        return plain((), p, q, Bound())

    def identity(self, monoid: str) -> Value:
        if monoid == "sum":
            return self.literal(Fraction(0))
        return self._from_set((), np.full((1,), _NOTHING, dtype=U), monoid, OPAQUE)

    # -- the error of a test -------------------------------------------------------------------------------------

    def error(self, a: Value, b: Value) -> float:
        """Bound on the probability that this run takes two different values for equal, given that it meets no zero
        denominator (docs/verification.md)."""
        x, y = a.bound, b.bound
        degree = max(x.top + y.bottom, y.top + x.bottom)
        if a.formal or b.formal:
            terms = x.terms * y.below + y.terms * x.below
            # every term is compared after cross-multiplication: numerator of one with denominator of the other
            exponent_top, exponent_bottom = x.exponents(y)
            apart = exponent_top + exponent_bottom
            final = _agreement(terms, apart, degree)
        else:
            final = (degree / (P - 1)) * (degree / (Q - 1))
        collisions = sum(
            n * (n - 1) / 2 * (bound.difference / (P - 1)) * (bound.difference / (Q - 1))
            for n, bound in self._applied.values()
        )
        total = final + collisions + self._coincidence + self._same_orbit()
        return min(1.0, total / (1 - self._inverted)) if self._inverted < 1 else 1.0

    def differs(self, a: Value, b: Value) -> NDArray[np.bool_]:
        """Where two values over the same axes are different."""
        b = _value(aligned(b, a.axes))
        if not (a.formal or b.formal):
            return np.asarray((a.words(_P) != b.words(_P)) | (a.words(_Q) != b.words(_Q)))
        if self._alike_but_for_a_unit(a, b):
            return np.zeros(a.lead, dtype=bool)
        return ~self._crosswise_equal(a, b)

    def _crosswise_equal(self, a: Value, b: Value) -> NDArray[np.bool_]:
        """Cross-multiplied, a few elements at a time, as the product of two long sums has many terms."""
        lead = np.broadcast_shapes(a.lead, b.lead)
        count = math.prod(lead)

        def rows(s: Sum) -> Sum:
            c, e = (_spread_to(w, lead).reshape(count, w.shape[-1]) for w in s)
            return c, e

        one = rows(self._spread(self.literal(Fraction(1)), a).numerator)
        (x, under_x), (y, under_y) = (
            (rows(v.numerator), rows(v.denominator) if v.denominator else one) for v in (a, b)
        )
        width = x[0].shape[-1] * under_y[0].shape[-1] + y[0].shape[-1] * under_x[0].shape[-1]
        step = max(1, self.max_terms // width)
        equal = np.ones(count, dtype=bool)
        for low in range(0, count, step):
            part = slice(low, low + step)
            left, right = (
                sum_product((s[0][part], s[1][part]), (t[0][part], t[1][part]), self.max_terms)
                for s, t in ((x, under_y), (y, under_x))
            )
            equal[part] = sums_equal(left, right, self.max_terms)
        return equal.reshape(lead)

    def _alike_but_for_a_unit(self, a: Value, b: Value) -> bool:
        """Whether numerators and denominators agree, each fraction first reduced by an exp(m): they are then equal, and
        a product of two long sums is saved."""
        if a.denominator is None or b.denominator is None or a.lead != b.lead:
            return False
        tops, bottoms = zip(*(self._reduced(v.numerator, v.denominator) for v in (a, b) if v.denominator), strict=True)
        return all(sums_equal(x, y, self.max_terms).all() for x, y in (bottoms, tops))

    def _reduced(self, top: Sum, bottom: Sum) -> tuple[Sum, Sum]:
        """Both sums over exp(m), with the shift m of the denominator."""
        below = merged(*bottom)
        shift, _ = self._shift(below)
        back = (U(P * Q) - exponent_of(*shift))[..., None]
        return (top[0], (top[1] + back) % U(P * Q)), (below[0], (below[1] + back) % U(P * Q))

    def sample(self, v: Value) -> Words:
        """One field value per element, to show: the Z_p part, exponentials at a random element of order q."""
        return self._keys(v)[0]

    def _note_zero(self, zero: NDArray[np.bool_], degree: int) -> None:
        self.zero_division |= bool(zero.any())
        self._inverted += zero.size * degree / (Q - 1)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def _plus(self, a: Value, b: Value) -> Value:
        if not (a.formal or b.formal):
            p = fields.add(a.words(_P), b.words(_P), P)
            q = fields.add(a.words(_Q), b.words(_Q), Q)
            return plain(a.axes, p, q, a.bound.plus(b.bound))
        x, y = a.denominator, b.denominator
        if x is None and y is None:
            top = sum_plus(a.numerator, b.numerator, self.max_terms)
            return fraction(a.axes, top, None, a.bound.plus(b.bound, formal=True))
        if x is not None and y is not None and self._same(x, y, a.bound, b.bound):
            top = sum_plus(a.numerator, b.numerator, self.max_terms)
            return fraction(a.axes, top, x, a.bound.plus(b.bound, formal=True))
        left = a.numerator if y is None else sum_product(a.numerator, y, self.max_terms)
        right = b.numerator if x is None else sum_product(b.numerator, x, self.max_terms)
        top = sum_plus(left, right, self.max_terms)
        return fraction(a.axes, top, self._product(x, y), a.bound.plus(b.bound, formal=True, crossed=True))

    def _product(self, x: Sum | None, y: Sum | None) -> Sum | None:
        """The product of two denominators; None is 1."""
        if x is None or y is None:
            return y if x is None else x
        return sum_product(x, y, self.max_terms)

    def _same(self, x: Sum, y: Sum, a: Bound, b: Bound) -> bool:
        """Whether two denominators are equal everywhere.  Equality by accident is accounted for."""
        if not sums_equal(x, y, self.max_terms).all():
            return False
        count = math.prod(np.broadcast_shapes(x[0].shape[:-1], y[0].shape[:-1]))
        self._coincidence += count * _agreement(a.below + b.below, sum(a.exponents(b)), a.bottom + b.bottom)
        return True

    def _negated(self, a: Value) -> Value:
        if a.formal:
            return fraction(a.axes, sum_negated(a.numerator), a.denominator, a.bound)
        p, q = (U(m) - a.words(i) for i, m in ((_P, P), (_Q, Q)))
        return plain(a.axes, p % U(P), q % U(Q), a.bound)

    def _times(self, a: Value, b: Value) -> Value:
        bound = a.bound.times(b.bound)
        if not (a.formal or b.formal):
            p = fields.multiply(a.words(_P), b.words(_P), P)
            q = fields.multiply(a.words(_Q), b.words(_Q), Q)
            return plain(a.axes, p, q, bound)
        bottom = self._product(a.denominator, b.denominator)
        return fraction(a.axes, sum_product(a.numerator, b.numerator, self.max_terms), bottom, bound)

    def _inverse(self, a: Value) -> Value:
        bound = a.bound.inverted()
        if not a.formal:
            p, q = a.words(_P), a.words(_Q)
            self._note_zero((p == 0) | (q == 0), 2 * a.bound.top)
            return plain(a.axes, fields.inverse(p, P), fields.inverse(q, Q), bound)
        c, e = a.numerator
        apart = a.bound.exponent_top + a.bound.exponent_bottom
        self._note_zero((c == 0).all(axis=-1), a.bound.top + (a.bound.terms - 1) * apart)
        if c.shape[-1] > 1:
            top = a.denominator
            if top is None:
                one = np.ones((*c.shape[:-1], 1), dtype=U)
                top = one, np.zeros_like(one)
            return fraction(a.axes, top, (c, e), bound)
        # the inverse of one term is one term
        single = _inverted(c, e)
        top = single if a.denominator is None else sum_product(single, a.denominator, self.max_terms)
        return fraction(a.axes, top, None, bound)

    def _power(self, a: Value, exponent: int) -> Value:
        if exponent < 0:
            return self._inverse(self._power(a, -exponent))
        if exponent == 0:
            return self._spread(self.literal(Fraction(1)), a)
        if not a.formal:
            p, q = (fields.power(a.words(i), exponent, m) for i, m in ((_P, P), (_Q, Q)))
            return plain(a.axes, p, q, Bound(a.bound.top * exponent, a.bound.bottom * exponent))
        return reduce(self._times, [a] * exponent)

    def _spread(self, scalar: Value, like: Value) -> Value:
        """A scalar repeated to the shape of another value."""
        return scalar.map(lambda p: np.broadcast_to(p, like.lead + p.shape), like.axes)

    def _exp(self, a: Value) -> Value:
        if self.cut_exp:
            self.cuts.add(EXP_CUT)
            return self._opaque("exp", a)
        if a.formal:
            self.cuts.add(NESTED_EXP)
            a = self._opaque("nested", a)
        e = exponent_of(a.words(_P), a.words(_Q))[..., None]
        bound = Bound(exponent_top=a.bound.top, exponent_bottom=a.bound.bottom)
        return fraction(a.axes, (np.ones_like(e), e), None, bound)

    # Multiplication with exp(m) shifts all exponents by m: its orbits are the formal sums up to a shift.  A logarithm
    # is a random value of its orbit plus a weighted mean of the exponents, which moves with the shift.

    def _log(self, a: Value) -> Value:
        """A function of which only this is known: log(v·exp(m)) = log(v) + m and log(1/v) = -log(v), where v is a sum
        of exponentials divided by at most one; elsewhere that equal arguments give equal results."""
        if not a.formal:
            return self._opaque("log", a)
        top, bottom = merged(*a.numerator), a.denominator
        if bottom is None:
            return self._log_of_sum(a.axes, top, a.bound)
        bottom = merged(*bottom)
        up, down = a.bound.exponents(a.bound)
        bound = replace(a.bound.either(a.bound.inverted()), exponent_top=up, exponent_bottom=down)
        left: NDArray[np.bool_] = np.ones(a.lead, dtype=bool)
        found: list[tuple[NDArray[np.bool_], Value]] = []
        for over, under, upright in ((top, bottom, True), (bottom, top, False)):
            here = left & (np.count_nonzero(under[0], axis=-1) == 1)
            if here.any():
                single = _taken(*under, (under[0] != 0).argmax(axis=-1)[..., None])
                quotient = merged(*sum_product(over, _inverted(*single), self.max_terms))
                value = self._log_of_sum(a.axes, quotient, bound)
                found.append((here, value if upright else self._negated(value)))
                left = left & ~here
        if left.any():
            self.cuts.add(LOG_OF_FRACTION)
            found.append((left, self._opaque("log", a)))
        p, q = (np.select([h for h, _ in found], [v.words(i) for _, v in found], U(0)) for i in (_P, _Q))
        return plain(a.axes, p, q, reduce(Bound.either, (v.bound for _, v in found)))

    def _log_of_sum(self, axes: tuple[str, ...], s: Sum, bound: Bound) -> Value:
        """The logarithm of a sum with merged terms.  A sum without terms has no shift."""
        c, e = s
        present = c != 0
        shift, weights = self._shift(s)
        for whole in weights:
            self._note_zero((whole == 0) & present.any(axis=-1), 2)
        modulus = U(P * Q)
        away = (e + (modulus - exponent_of(*shift))[..., None]) % modulus
        named = fields.keyed_hash(c, (self.key, "coefficient"), 2**62)
        with np.errstate(over="ignore"):  # sums of random words modulo 2**64: the multiset of terms
            named = fields.keyed_hash(named + away * U(4), (self.key, "term"), 2**62)
            orbit = np.where(present, named, U(0)).sum(axis=-1, dtype=U)
        p, q = (
            fields.add(fields.keyed_hash(orbit, (self.key, "log", m), m), own, m)
            for m, own in zip((P, Q), shift, strict=True)
        )
        count, widest = self._logs
        self._logs = count + orbit.size, widest.either(bound)
        # a fresh value of the orbit, plus the difference of two exponents met so far
        up, down = self._logs[1].exponent_top, self._logs[1].exponent_bottom
        return plain(axes, p, q, Bound(max(1 + 2 * down, up + down), 2 * down))

    def _shift(self, s: Sum) -> tuple[list[Words], list[Words]]:
        """The weighted mean of the exponents of a sum with merged terms, and the sum of the weights, in both fields."""
        c, e = s
        shift, weights = [], []
        for m in (P, Q):
            own = np.where(c == 0, U(0), fields.keyed_hash(c, (self.key, "weight", m), m))
            weights.append(np.asarray(own.sum(axis=-1) % U(m)))
            moments = (own * (e % U(m)) % U(m)).sum(axis=-1) % U(m)
            shift.append(fields.multiply(moments, fields.inverse(weights[-1], m), m))
        return shift, weights

    def _same_orbit(self) -> float:
        """Bound on the probability that two logarithms take different arguments for shifts of each other: a term of one
        has to meet one of the other's terms, and the shift that this gives has to make the two sums agree."""
        n, widest = self._logs
        apart = 4 * (widest.exponent_top + widest.exponent_bottom)
        return n * (n - 1) / 2 * (1 + widest.terms) * _agreement(2 * widest.terms, apart, widest.top + widest.bottom)

    # -- opaque functions ----------------------------------------------------------------------------------------

    def _keys(self, v: Value) -> tuple[Words, Words]:
        """Two words per element that stand for the value: the plain pair, or two evaluations of the fraction."""
        if not v.formal:
            return v.words(_P), v.words(_Q)
        first, second = (self._at(v, omega) for omega in self._omegas)
        return first, second

    def _at(self, v: Value, omega: int) -> Words:
        """The formal value at `[e] -> omega**(e mod q)`: a ring homomorphism, so equal fractions give equal words."""

        def total(s: Sum) -> Words:
            powers = fields.power(np.asarray(omega, dtype=U), s[1] % U(Q), P)
            return np.asarray((s[0] * powers % U(P)).sum(axis=-1) % U(P))

        top = total(v.numerator)
        if v.denominator is None:
            return top
        bottom = total(v.denominator)
        self.zero_division |= bool((bottom == 0).any())
        return fields.multiply(top, fields.inverse(bottom, P), P)

    def _mixed(self, key: object, *args: Value) -> Words:
        """62 bits per element from the operands, in order."""
        mixed: Words = np.asarray(0, dtype=U)
        for i, v in enumerate(args):
            if v.formal:
                self.assumptions.add(EVALUATED)
            for j, word in enumerate(self._keys(v)):
                mixed = fields.keyed_hash(np.asarray(mixed + word * U(2), dtype=U), (self.key, key, i, j), 2**62)
        return mixed

    def _applied_to(self, key: object, count: int, *args: Value) -> None:
        n, widest = self._applied.get(key, (0, Bound()))
        self._applied[key] = (n + count, reduce(Bound.either, (v.bound for v in args), widest))

    def _opaque(self, key: object, *args: Value) -> Value:
        """A function of which only this is known: equal arguments give equal results."""
        mixed = self._mixed(key, *args)
        self._applied_to(key, mixed.size, *args)
        p, q = (fields.keyed_hash(mixed, (self.key, key, m), m) for m in (P, Q))
        return plain(args[0].axes, p, q, OPAQUE)

    # A maximum is a function of the *set* of its operands: the free semilattice, where max is commutative,
    # associative and idempotent and nothing else.  The maximum of one element is that element.

    def _set(self, v: Value, order: str) -> Words:
        if v.order == order:
            return v.words(_SET)
        self._applied_to(order, math.prod(v.lead), v)
        return self._mixed("element", v)[..., None]

    def _from_set(self, axes: tuple[str, ...], members: Words, order: str, bound: Bound) -> Value:
        name = np.where(members == _NOTHING, U(0), members).sum(axis=-1, dtype=U)
        p, q = (fields.keyed_hash(name, (self.key, order, m), m) for m in (P, Q))
        return Value(axes, (p, q, None, None, None, None, members), bound.either(OPAQUE), order)

    def _extreme(self, order: str, a: Value, b: Value) -> Value:
        lead = np.broadcast_shapes(a.lead, b.lead)
        sets = [_spread_to(self._set(v, order), lead) for v in (a, b)]
        result = self._union(order, a.axes, np.concatenate(sets, axis=-1), a, b)
        return self._single(result, _where(sets[0][..., 0] != _NOTHING, a, b))

    def _extreme_along(self, order: str, v: Value, axes: tuple[str, ...]) -> Value:
        kept = tuple(a for a in v.axes if a not in axes)
        members = self._set(v, order)
        result = self._union(order, kept, self._gathered_terms(members, v.axes, axes, kept), v)
        filled = self._gathered_terms(members[..., :1], v.axes, axes, kept) != _NOTHING
        return self._single(result, _picked(v, axes, kept, filled.argmax(axis=-1)))

    def _union(self, order: str, axes: tuple[str, ...], members: Words, *operands: Value) -> Value:
        """The extreme of the elements along the last dimension, equal ones counted once."""
        members = np.sort(members, axis=-1)
        members[..., 1:][members[..., 1:] == members[..., :-1]] = _NOTHING
        members = np.sort(members, axis=-1)
        counts = (members != _NOTHING).sum(axis=-1)
        members = members[..., : max(int(counts.max(initial=0)), 1)]
        flat = [Bound(v.bound.top, v.bound.bottom) for v in operands]
        return self._from_set(axes, members, order, reduce(Bound.either, flat))

    def _single(self, extreme: Value, own: Value) -> Value:
        """Where only one element is left, its own value."""
        members = extreme.words(_SET)
        alone = (members != _NOTHING).sum(axis=-1) == 1
        if not alone.any():
            return extreme
        found = _where(alone, own, extreme)
        return replace(found, parts=(*found.parts[:_SET], members), order=extreme.order)

    # -- the algebra's interface ---------------------------------------------------------------------------------

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Value:
        v = _value(v)
        if kind in ("max", "min"):
            return self._extreme_along(kind, v, axes)
        count = math.prod(v.size(a) for a in axes)
        kept = tuple(a for a in v.axes if a not in axes)
        if not v.formal:
            where = tuple(v.axes.index(a) for a in axes)
            p, q = (np.asarray(v.words(i).sum(axis=where) % U(m)) for i, m in ((_P, P), (_Q, Q)))
            return plain(kept, p, q, v.bound.total(count, formal=False))
        if v.denominator is not None and not self._constant_along(v, axes):
            return reduce(self._sum_along, axes, v)
        top = merged(*(self._gathered_terms(part, v.axes, axes, kept) for part in v.numerator))
        bottom = None
        if v.denominator is not None:
            bottom = cast(Sum, tuple(_first(part, v.axes, axes) for part in v.denominator))
        return fraction(kept, top, bottom, v.bound.total(count, formal=True))

    def _gathered_terms(
        self, part: Words, axes: tuple[str, ...], gone: tuple[str, ...], kept: tuple[str, ...]
    ) -> Words:
        """The terms of all summands side by side."""
        order = [axes.index(a) for a in (*kept, *gone)]
        moved = part.transpose([*order, part.ndim - 1])
        lead = moved.shape[: len(kept)]
        width = math.prod(moved.shape[len(kept) :])
        _check_room(lead, width, self.max_terms)
        return moved.reshape(*lead, width)

    def _constant_along(self, v: Value, axes: tuple[str, ...]) -> bool:
        assert v.denominator is not None
        repeated = all(part.strides[v.axes.index(a)] == 0 or v.size(a) == 1 for part in v.denominator for a in axes)
        first = cast(Sum, tuple(_first(part, v.axes, axes, keep=True) for part in v.denominator))
        return repeated or self._same(v.denominator, first, v.bound, v.bound)

    def _sum_along(self, v: Value, axis: str) -> Value:
        """The entries along one axis, added pairwise over a common denominator."""
        combined = reduce(self._plus, self._entries(v, axis))
        at = v.axes.index(axis)
        return combined.map(lambda p: np.take(p, 0, axis=at), tuple(a for a in v.axes if a != axis))

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Value:
        xs = [_value(v) for v in args]
        x = xs[0]
        match fn:
            case "add":
                return self._plus(*xs)
            case "sub":
                return self._plus(x, self._negated(xs[1]))
            case "mul" | "and":
                return self._times(*xs)
            case "or":
                return self._plus(self._plus(*xs), self._negated(self._times(*xs)))
            case "not":
                return self._plus(self._spread(self.literal(Fraction(1)), x), self._negated(x))
            case "div":
                return self._times(x, self._inverse(xs[1]))
            case "neg":
                return self._negated(x)
            case "reciprocal":
                return self._inverse(x)
            case "square":
                return self._times(x, x)
            case "sqrt":
                return self._opaque("sqrt", x)
            case "rsqrt":
                return self._inverse(self._opaque("sqrt", x))
            case "pow":
                return self._pow(x, Fraction(attrs["exponent"]))
            case "max" | "min":
                return self._extreme(fn, *xs)
            case "relu":
                return self._extreme("max", x, self._spread(self.literal(Fraction(0)), x))
            case "exp":
                return self._exp(x)
            case "silu":
                return self._times(x, self._opaque("sigmoid", x))
            case "log":
                return self._log(x)
            case _:  # an arbitrary function
                return self._opaque((fn, *sorted(attrs.items())) if attrs else fn, x)

    def _pow(self, x: Value, exponent: Fraction) -> Value:
        if exponent.denominator == 1:
            return self._power(x, int(exponent))
        if exponent < 0:
            return self._inverse(self._pow(x, -exponent))
        return self._opaque("sqrt" if exponent == Fraction(1, 2) else ("pow", exponent), x)

    def apply(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        if isinstance(op, Slice):
            op = replace(op, start=self.starts.get((op.axis, op.start), op.start))
        return super().apply(op, args)

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        axes = tuple(dict.fromkeys(a for v in args for a in v.axes))
        xs = [_value(aligned(v, axes)) for v in args]
        match op:
            case Compare(relation):
                return (self._opaque(("compare", relation), *xs),)
            case Select():
                mask, a, b = xs
                return (self._plus(b, self._times(mask, self._plus(a, self._negated(b)))),)
            case MaskedExp():
                return (self._times(xs[1], self._exp(xs[0])),)
            case Iota(axis):
                places = np.arange(self.sizes[axis.name], dtype=U)
                return (plain((axis.name,), places, places, Bound()),)
            case Cast(dtype):
                return (xs[0] if dtype.is_float else self._opaque(("cast", dtype.value), xs[0]),)
            case Quantize(dtype):
                return (self._opaque(("quantize", dtype.value), self._times(xs[0], self._inverse(xs[1]))),)
            case CumSum(axis):
                pieces = self._entries(xs[0], axis)
                sums = [pieces[0]]
                for piece in pieces[1:]:
                    sums.append(self._plus(sums[-1], piece))
                return (self.joined(sums, axis),)
            case TopK(axis, out):
                row = self._entries(xs[0], axis)
                found = [
                    self.joined([self._opaque((name, i), *row) for i in range(self.sizes[out.name])], axis)
                    for name in ("topk", "topk-index")
                ]
                return tuple(replace(v, axes=tuple(out.name if a == axis else a for a in axes)) for v in found)
            case Unpack(axis, out, dtype):
                count = self.sizes[out.name] // xs[0].size(axis)
                codes = [self._opaque(("unpack", dtype.value, i), xs[0]) for i in range(count)]
                rows = [_value(narrow(c, axis, i, 1)) for i in range(xs[0].size(axis)) for c in codes]
                return (replace(self.joined(rows, axis), axes=tuple(out.name if a == axis else a for a in axes)),)
            case Pack(axis, out, dtype):
                count = xs[0].size(axis) // self.sizes[out.name]
                codes = [_value(narrow(xs[0], axis, i, self.sizes[out.name], count)) for i in range(count)]
                packed = self._opaque(("pack", dtype.value), *codes)
                return (replace(packed, axes=tuple(out.name if a == axis else a for a in axes)),)
            case Scatter():
                return (self._scattered(xs[0], xs[1], op),)
        raise UnsupportedOpError(f"{op_text(op)} has no meaning in the fields", op=op_text(op))

    def _entries(self, v: Value, axis: str) -> list[Value]:
        return [_value(narrow(v, axis, i, 1)) for i in range(v.size(axis))]

    def _scattered(self, v: Value, index: Value, op: Scatter) -> Value:
        """Each place of the new axis, from all entries in order: a sum, or the last one written."""
        size = self.sizes[op.out.name]
        places = plain(index.axes, index.words(_P) % U(size), index.words(_P) % U(size), Bound())
        found: list[tuple[Value, Value]] = [(v, places)]
        for axis in op.axes:
            found = [
                (_value(narrow(entry, axis, i, 1)), _value(narrow(at, axis, i if at.size(axis) > 1 else 0, 1)))
                for entry, at in found
                for i in range(v.size(axis))
            ]
        rows = []
        for place in range(size):
            row = self._spread(self.literal(Fraction(0)), found[0][0])
            for entry, at in found:
                hit = (at.words(_P) == place).astype(U)
                chosen = plain(v.axes, hit, hit, Bound())
                update = entry if op.kind == "sum" else self._plus(entry, self._negated(row))
                row = self._plus(row, self._times(chosen, update))
            rows.append(row)
        joined = self.joined(rows, op.axes[0])
        gone = tuple(joined.axes.index(a) for a in op.axes[1:])
        kept = tuple(op.out.name if a == op.axes[0] else a for a in joined.axes if a not in op.axes[1:])
        return joined.map(lambda p: p.squeeze(gone), kept)

    # -- views and stores of values with private dimensions ------------------------------------------------------

    def joined(self, pieces: Sequence[Named], axis: str) -> Value:
        axes = pieces[0].axes
        at = axes.index(axis)
        lined = _alike([_value(aligned(v, axes)) for v in pieces])
        columns = zip(*(v.parts for v in lined), strict=True)
        parts = tuple(None if c[0] is None else np.concatenate(cast("list[Words]", c), axis=at) for c in columns)
        bound = reduce(Bound.either, (v.bound for v in lined))
        return Value(axes, parts, bound, lined[0].order)

    def place(
        self,
        target: str,
        v: Named,
        at: Mapping[str, tuple[int, int]],
        results: dict[str, Named],
        written: dict[str, NDArray[np.int64]],
        atomic: bool,
    ) -> None:
        if target not in results:
            shape = tuple(self.sizes[a] for a in v.axes)
            results[target] = self.blank(_value(v), shape)
            written[target] = np.zeros(shape, dtype=np.int64)
        super().place(target, v, at, results, written, atomic)

    def blank(self, v: Value, shape: tuple[int, ...]) -> Value:
        """What a result of this shape starts from, whose elements are like those of v."""
        empty = self.identity(v.order or "sum")
        return empty.map(lambda p: np.broadcast_to(p, shape + p.shape).copy(), v.axes)

    def write(self, whole: Named, index: Any, v: Named, target: str, results: dict[str, Named]) -> None:
        old, new = _alike([_value(whole), _value(v)])
        kept: list[NDArray[Any] | None] = []
        for before, part in zip(old.parts, new.parts, strict=True):
            if before is None or part is None:
                kept.append(None)
            else:
                copy = before.copy() if not before.flags.writeable else before
                copy[index] = part
                kept.append(copy)
        results[target] = Value(whole.axes, tuple(kept), old.bound.either(new.bound), old.order)


def _value(v: Named) -> Value:
    assert isinstance(v, Value)
    return v


def _first(part: Words, axes: tuple[str, ...], gone: tuple[str, ...], keep: bool = False) -> Words:
    """The first entry along some axes."""
    return part[tuple((slice(0, 1) if keep else 0) if a in gone else slice(None) for a in axes)]


def _where(mask: NDArray[np.bool_], a: Value, b: Value) -> Value:
    """`a` where the mask, over all axes, is true, else `b`; without the sets of extremes."""
    x, y = _alike([replace(v, order=None, parts=(*v.parts[:_SET], None)) for v in (a, b)])
    parts: list[NDArray[Any] | None] = []
    for i, (p, q) in enumerate(zip(x.parts, y.parts, strict=True)):
        here = mask if i in (_P, _Q) else mask[..., None]
        parts.append(None if p is None or q is None else np.where(here, p, q))
    return Value(a.axes, tuple(parts), a.bound.either(b.bound))


def _picked(v: Value, axes: tuple[str, ...], kept: tuple[str, ...], place: NDArray[np.int64]) -> Value:
    """Of the elements along some axes the one at a place, for each place along the axes that are kept."""
    order = [v.axes.index(a) for a in (*kept, *axes)]

    def one(part: NDArray[Any], private: bool) -> NDArray[Any]:
        moved = part.transpose([*order, part.ndim - 1] if private else order)
        moved = moved.reshape(*place.shape, -1, *moved.shape[len(order) :])
        at = place[..., None, None] if private else place[..., None]
        return np.take_along_axis(moved, at, axis=place.ndim).squeeze(place.ndim)

    parts = tuple(None if p is None else one(p, i not in (_P, _Q)) for i, p in enumerate(v.parts))
    return Value(kept, parts, v.bound)


def _alike(values: list[Value]) -> list[Value]:
    """The values with the same components: formal if one is, sets only if all have them, equal numbers of terms."""
    if any(v.formal for v in values):
        whole = any(v.denominator is not None for v in values)
        shown = [_as_formal(v, whole) for v in values]
    else:
        orders = {v.order for v in values}
        order = orders.pop() if len(orders) == 1 else None
        shown = [v if order else replace(v, order=None, parts=(*v.parts[:_SET], None)) for v in values]
    result = []
    widths = [0, 0]  # of plain parts, which have no private dimension
    for i in range(_NC, 7):
        widths.append(max((v.words(i).shape[-1] for v in shown if v.parts[i] is not None), default=0))
    for v in shown:
        parts = list(v.parts)
        for i in (_NC, _NE, _DC, _DE):
            if parts[i] is not None:
                parts[i] = _padded(v.words(i), widths[i])
        if parts[_SET] is not None:
            members = v.words(_SET)
            extra = np.full((*members.shape[:-1], widths[_SET] - members.shape[-1]), _NOTHING, dtype=U)
            parts[_SET] = np.concatenate([members, extra], axis=-1)
        result.append(replace(v, parts=tuple(parts)))
    return result


def _as_formal(v: Value, whole: bool) -> Value:
    bottom = v.denominator
    if whole and bottom is None:
        one = np.ones((*v.lead, 1), dtype=U)
        bottom = one, np.zeros_like(one)
    return fraction(v.axes, v.numerator, bottom, v.bound)
