"""Functions in normal forms: the registered laws (`verify.laws`) of maxima, roots, absolute values and logarithms.

A maximum is c·max(x_1, ...) + t: what its arguments share as terms is t, as factors that are not negative c, and a
minimum is the negative of a maximum.  A square root of what is not negative is an atom `root`, of which powers are 0 or
1, as the square of a root is its argument.  |x| is 2·max(x, 0) - x, and max(x, 0)^2 is x·max(x, 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from mugraph.ir.axes import Size
from mugraph.verify import laws
from mugraph.verify.laws import Law
from mugraph.verify.normal import (
    LOGARITHM,
    SEMILATTICE,
    Factor,
    Forms,
    Node,
    Number,
    Rewriting,
    Undecided,
    bound_names,
)

MOST_ARGUMENTS = 64  # of a maximum
NOT_NEGATIVE = ("root", "sqrt", "sigmoid", "compare")  # functions


class Functions(Forms):
    """Normal forms with the registered laws."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.known: set[Node] = set()  # values that are not negative, by how they were made
        self.powers = False  # whether there are roots or maxima with 0
        super().__init__(*args, **named)

    def use(self, law: Law) -> None:
        self.laws.add(str(law))

    # -- signs ---------------------------------------------------------------------------------------------------

    def nonneg(self, a: Node) -> bool:
        """Whether a value is seen not to be negative."""
        if a in self.known:
            return True
        self.work.spend(1 + len(a.parts))
        found = all(c > 0 and self.product_nonneg(p) for p, c in a.parts)
        if found:
            self.known.add(a)
        return found

    def product_nonneg(self, factors: Node) -> bool:
        return all(self.factor_nonneg(x, p) for x, p in factors.parts)

    def factor_nonneg(self, atom: Node, p: Number) -> bool:
        if p.denominator == 1 and p % 2 == 0:
            return True
        match atom.kind, atom.parts:
            case (("exp" | "size" | "index" | "in" | "piece"), _):
                return True
            case "paren", (a,):
                return self.nonneg(a)
            case "sum", (_, body):
                return self.product_nonneg(body)
            case "call", ("max", _, args):
                return any(self.nonneg(a) for a in args)
            case "call", (fn, _, _):
                return fn in NOT_NEGATIVE
        return False

    def rewritten(self, a: Node, how: Rewriting) -> Node:
        result = super().rewritten(a, how)
        if a in self.known:
            self.known.add(result)
        return result

    # -- factors in common ---------------------------------------------------------------------------------------

    def taken_out(self, values: Sequence[Node], bound: Iterable[str] = ()) -> tuple[Node, Number]:
        """The factors that all terms of some values share and that are not negative and free of the bound variables:
        a product of atoms, and a number."""
        names = frozenset(bound)
        terms = [t for v in values for t in v.parts]
        shared: dict[Node, Number] = dict(terms[0][0].parts)
        for factors, _ in terms[1:]:
            own: dict[Node, Number] = dict(factors.parts)
            shared = {x: _nearer_zero(p, own[x]) for x, p in shared.items() if x in own and (p > 0) == (own[x] > 0)}
        kept = {}
        for x, p in shared.items():
            if x.variables.isdisjoint(names):
                kept[x] = p if self.factor_nonneg(x, p) else 2 * int(p / 2)
        numerators = math.gcd(*(abs(Fraction(c).numerator) for _, c in terms))
        denominators = math.lcm(*(Fraction(c).denominator for _, c in terms))
        return self.product(kept), Fraction(numerators, denominators)

    def over_factor(self, a: Node, factors: Node, c: Number) -> Node:
        """a / (c · factors), for factors that all its terms have."""
        return self.gathered((self.over_product(p, factors), Fraction(k) / c) for p, k in a.parts)

    def over_product(self, factors: Node, under: Node) -> Node:
        return self.merged(factors, self.product({x: -p for x, p in under.parts}))

    # -- powers --------------------------------------------------------------------------------------------------

    def times(self, *values: Node) -> Node:
        result = super().times(*values)
        return self.cancelled(self.settled(result) if self.powers else result)

    def plus(self, *values: Node) -> Node:
        return self.cancelled(super().plus(*values))

    def cancelled(self, a: Node) -> Node:
        """m·x/(x + y) + m·y/(x + y) as m."""
        if len(a.parts) < 2:
            return a
        below = dict.fromkeys(x for factors, _ in a.parts for x, p in factors.parts if x.kind == "paren" and p < 0)
        for x in below:
            ((first, _), *_) = terms = x.parts[0].parts
            found = dict(a.parts)
            for factors, c in a.parts:
                self.work.spend(len(terms))
                if factors not in found or x not in dict(factors.parts):
                    continue
                rest = self.over_product(factors, first)  # m / (x + y), if this is the first of the terms
                others = [self.merged(rest, p) for p, _ in terms]
                if all(found.get(p) == c * k for p, (_, k) in zip(others, terms, strict=True)):
                    for p in others:
                        del found[p]
                    whole = self.product(_plus_one(rest, x))
                    return self.plus(self.gathered(found.items()), self.term(whole, c))
        return a

    def inverse(self, a: Node) -> Node:
        result = super().inverse(a)
        return self.settled(result) if self.powers else result

    def settled(self, a: Node) -> Node:
        """With roots and max(x, 0) to powers that do not say more: root(x)^2 = x, max(x, 0)^2 = x·max(x, 0)."""
        if not any(_says_more(x, p) for factors, _ in a.parts for x, p in factors.parts):
            return a
        return self.plus(*(self.term_settled(factors, c) for factors, c in a.parts))

    def term_settled(self, factors: Node, c: Number) -> Node:
        found: dict[Node, Number] = {}
        values = []
        for x, p in factors.parts:
            if not _says_more(x, p):
                found[x] = found.get(x, 0) + p
            elif x.parts[0] == "max":
                self.use(laws.RELU_SQUARED)
                found[x] = found.get(x, 0) + 1
                values.append(self.power(self.plus(*x.parts[2]), int(p) - 1))
            else:
                self.use(laws.ROOT)
                whole = int(p // 2)
                found[x] = found.get(x, 0) + (p - 2 * whole)
                # the argument as a product: of a sum, its inverse has the sum as one atom
                a, sign = x.parts[2][0], 1
                if len(a.parts) > 1:
                    a, sign = self.inverse(a), -1
                ((under, k),) = a.parts
                for y, q in under.parts:
                    found[y] = found.get(y, 0) + q * whole * sign
                c = c * Fraction(k) ** (whole * sign)
        values += [self.power(x.parts[0], int(p)) for x, p in found.items() if x.kind == "paren" and p > 0]
        rest = self.product({x: p for x, p in found.items() if x.kind != "paren" or p <= 0})
        return self.times(self.term(rest, c), *values)

    # -- functions -----------------------------------------------------------------------------------------------

    def called(self, fn: str, attrs: tuple[Any, ...], args: Sequence[Node]) -> Node:
        """A function of arguments in normal form."""
        match fn:
            case "max":
                return self.largest_of(args)
            case "max over":
                inner = self.alone(args[0], "lambda")
                assert inner is not None
                body, sizes = self.opened(inner)
                return self.largest_over(body, sizes)
            case "log":
                return self.logarithm(args[0])
            case "root":
                self.known.add(args[0])  # whatever its variables are replaced by
                return self.root(args[0])
            case "sqrt":
                return self.root(args[0])
        return self.call(fn, attrs, args)

    def opened(self, inner: Node) -> tuple[Node, dict[str, Size]]:
        """The body of a lambda, with fresh names for its variables."""
        height, sizes, body = inner.parts
        names = {v: self.fresh() for v in bound_names(height, len(sizes))}
        return self.with_(body, names), {names[v]: size for v, size in zip(names, sizes, strict=True)}

    def root(self, a: Node) -> Node:
        if not a.parts or not self.nonneg(a):
            return self.call("sqrt", (), [a]) if a.parts else a
        shared, content = self.taken_out([a])
        halves: dict[Node, Number] = {}
        values = []
        for x, p in shared.parts:
            half = Fraction(p) / 2 if x.kind == "exp" else Fraction(int(p / 2))
            if self.factor_nonneg(x, 1):
                halves[x] = half
            elif half:
                self.use(laws.ROOT_OF_SQUARE)
                values.append(self.power(self.absolute(self.power_of(x)), int(half)))
        number = _root_of(Fraction(content))
        c: Number = number if number is not None else 1
        out = self.product(halves)
        squares = {x: 2 * p for x, p in out.parts}
        squares |= {x: 2 * int(p / 2) for x, p in shared.parts if not self.factor_nonneg(x, 1)}
        inside = self.over_factor(a, self.product(squares), Fraction(c) ** 2)
        if halves or c != 1:
            self.use(laws.ROOT_OF_MULTIPLE)
        self.known.add(inside)
        whole = self.term(out, c)
        if inside is self.one:
            return self.times(whole, *values)
        self.powers = True
        return self.times(whole, *values, self.call("root", (), [inside]))

    def absolute(self, a: Node) -> Node:
        self.use(laws.ABS)
        found = a if self.nonneg(a) else self.minus(self.scaled(self.largest_of([a, self.zero]), 2), a)
        self.known.add(found)
        return found

    def exponential(self, a: Node) -> Node:
        """exp(a), where exp(c·log x) = x^c for a whole number c."""
        logs, rest = [], []
        for factors, c in a.parts:
            atom, p = factors.parts[0] if len(factors.parts) == 1 else (self.empty, 0)
            is_log = atom.kind == "call" and atom.parts[0] == "log" and p == 1 and c.denominator == 1
            if is_log and self.nonneg(atom.parts[2][0]):
                self.use(laws.EXP_OF_LOG)
                logs.append(self.power(atom.parts[2][0], int(c)))
            else:
                rest.append((factors, c))
        return self.times(super().exponential(self.gathered(rest) if logs else a), *logs)

    def logarithm(self, a: Node) -> Node:
        if len(a.parts) != 1:
            return self.call("log", (), [a])
        ((factors, c),) = a.parts
        exponents: list[Factor] = [(x.parts[0], p) for x, p in factors.parts if x.kind == "exp"]
        own = self.node("product", tuple(f for f in factors.parts if f[0].kind != "exp"))
        if exponents:
            self.laws.add(LOGARITHM)
        result, rest = self.gathered(exponents), self.term(own, c)
        if rest is self.one:
            self.use(laws.LOG_OF_EXP)
            return result
        if c == 1 and all(p < 0 for _, p in own.parts):
            return self.minus(result, self.call("log", (), [self.inverse(rest)]))
        return self.plus(result, self.call("log", (), [rest]))

    # -- maxima --------------------------------------------------------------------------------------------------

    def extreme(self, kind: str, args: Sequence[Node]) -> Node:
        if kind == "max":
            return self.largest_of(args)
        self.use(laws.MIN)
        return self.scaled(self.largest_of([self.scaled(a, -1) for a in args]), -1)

    def extreme_over(self, kind: str, a: Node, bound: Mapping[str, Size]) -> Node:
        if kind == "max":
            return self.largest_over(a, bound)
        self.use(laws.MIN)
        return self.scaled(self.largest_over(self.scaled(a, -1), bound), -1)

    def largest_of(self, args: Sequence[Node]) -> Node:
        self.laws.add(SEMILATTICE)
        found = tuple(dict.fromkeys(args))
        shift = self.zero
        while True:
            least = self.least_shared(found)
            shift, found = self.plus(shift, least), tuple(self.minus(a, least) for a in found)
            if least.parts:
                self.use(laws.SHIFT)
            flat = self.undominated(dict.fromkeys(b for a in found for b in self.arguments(a)))
            self.work.spend(len(flat))
            if flat == found:
                break
            if len(flat) > MOST_ARGUMENTS:
                raise Undecided(f"a maximum is over more than {MOST_ARGUMENTS} values")
            found = flat
        if len(found) == 1:
            return self.plus(shift, found[0])
        shared, c = self.taken_out([a for a in found if a.parts])
        if shared.parts or c != 1:
            self.use(laws.SCALE)
        inner = [self.over_factor(a, shared, c) for a in found]
        self.powers |= len(inner) == 2 and self.zero in inner
        atom = self.call("max", (), sorted(inner, key=lambda a: a.serial))
        return self.plus(shift, self.times(self.term(shared, c), atom))

    def least_shared(self, args: Sequence[Node]) -> Node:
        """Each term with the least of its coefficients: a shift of all arguments moves these alike."""
        columns: dict[Node, list[Number]] = {}
        for a in args:
            for p, c in a.parts:
                columns.setdefault(p, []).append(c)
        least = ((p, min(cs) if len(cs) == len(args) else min(0, *cs)) for p, cs in columns.items())
        return self.gathered((p, c) for p, c in least if c)

    def arguments(self, a: Node) -> list[Node]:
        """max(x, y) + t as x + t, y + t."""
        inner = [(p, x.parts[2]) for p, c in a.parts if c == 1 and (x := _maximum(p, "max"))]
        if len(inner) != 1:
            return [a]
        if len(a.parts) > 1:
            self.use(laws.SHIFT)
        rest = self.gathered(t for t in a.parts if t[0] is not inner[0][0])
        return [self.plus(x, rest) for x in inner[0][1]]

    def undominated(self, args: Iterable[Node]) -> tuple[Node, ...]:
        """Without those that are not greater than another: x, where there is x + c and c is not negative."""
        kept: list[Node] = []
        for a in args:
            if any(self.nonneg(self.minus(b, a)) for b in kept):
                self.use(laws.RELU)
                continue
            below = [b for b in kept if self.nonneg(self.minus(a, b))]
            if below:
                self.use(laws.RELU)
            kept = [b for b in kept if b not in below] + [a]
        return tuple(kept)

    def largest_over(self, a: Node, bound: Mapping[str, Size]) -> Node:
        """max over variables: what does not depend on them stays outside."""
        self.laws.add(SEMILATTICE)
        if found := self.cut(a, bound):
            return self.largest_of([self.largest_over(v, sizes) for v, sizes in self.pieces(a, bound, *found)])
        names = frozenset(bound)
        shift = self.gathered(t for t in a.parts if t[0].variables.isdisjoint(names))
        a = self.gathered(t for t in a.parts if not t[0].variables.isdisjoint(names))
        if not a.parts:
            return shift
        if shift.parts:
            self.use(laws.SHIFT)
        shared, c = self.taken_out([a], names)
        if shared.parts or c != 1:
            self.use(laws.SCALE)
        return self.plus(shift, self.times(self.term(shared, c), self.over(self.over_factor(a, shared, c), bound)))

    def over(self, a: Node, bound: Mapping[str, Size]) -> Node:
        inner = [(p, x) for p, k in a.parts if k == 1 and (x := _maximum(p, "max over"))]
        if len(inner) == 1:  # of a maximum plus a rest
            p, x = inner[0]
            within = self.alone(x.parts[2][0], "lambda")
            assert within is not None
            body, sizes = self.opened(within)
            rest = self.gathered(t for t in a.parts if t[0] is not p)
            if rest.parts:
                self.use(laws.SHIFT)
            return self.largest_over(self.plus(body, rest), {**bound, **sizes})
        several = self.arguments(a)
        if len(several) > 1:
            return self.largest_of([self.largest_over(b, bound) for b in several])
        return self.call("max over", (), [self.bound(a, {v: s for v, s in bound.items() if v in a.variables})])


def _maximum(factors: Node, kind: str) -> Node | None:
    """The maximum that a product consists of."""
    if len(factors.parts) != 1:
        return None
    atom, p = factors.parts[0]
    return atom if p == 1 and atom.kind == "call" and atom.parts[0] == kind else None


def _plus_one(factors: Node, atom: Node) -> dict[Node, Number]:
    """The powers of a product times an atom."""
    found = dict(factors.parts)
    found[atom] = found.get(atom, 0) + 1
    return found


def _says_more(atom: Node, p: Number) -> bool:
    """Whether a root has another power than 0 or 1, or a maximum of two with 0 a whole one above 1."""
    match atom.kind, atom.parts:
        case "call", ("root", _, _):
            return p not in (0, 1)
        case "call", ("max", _, (a, b)):
            return p > 1 and p.denominator == 1 and not (a.parts and b.parts)
    return False


def _nearer_zero(p: Number, q: Number) -> Number:
    return p if abs(Fraction(p)) <= abs(Fraction(q)) else q


def _root_of(c: Fraction) -> Fraction | None:
    """The square root, where it is rational."""
    n, d = math.isqrt(c.numerator), math.isqrt(c.denominator)
    return Fraction(n, d) if (n * n, d * d) == (c.numerator, c.denominator) else None
