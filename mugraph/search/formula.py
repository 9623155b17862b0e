"""Values and the ways to compute them in formula notation, for explanations.

Inputs and outputs have their names; other values are called by their place, so that a text depends on no name that the
program gives to an intermediate value.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import assert_never

from mugraph.ir.axes import Axis
from mugraph.ir.graph import Equation
from mugraph.ir.infer import op_text
from mugraph.ir.ops import Slice
from mugraph.search.closure import Edge
from mugraph.search.laws import IOTA
from mugraph.search.values import Call, Factor, Load, Number, Paren, Term, Token, Value

MOST_FACTORS = 60  # of a formula: what is shared inside is written as often as it is used
RELATIONS = {"eq": "=", "ne": "≠", "lt": "<", "le": "≤", "gt": ">", "ge": "≥"}


class Notation:
    """How values of one program are written: `axes` and `names` lead from canonical names to the program's, and
    `boundaries` are the operators outside the calculus, under canonical names."""

    def __init__(
        self,
        axes: Mapping[str, Axis],
        names: Mapping[str, str],
        own: Mapping[str, tuple[str, ...]],
        boundaries: tuple[Equation, ...] = (),
    ) -> None:
        self.axes, self.names, self.own = axes, names, own
        self.made = {t.name: e for e in boundaries for t in e.targets}
        self.room = MOST_FACTORS
        self.primes: dict[Token, str] = {}  # bound indices that run along the axis of another one

    def axis(self, a: str) -> str:
        return self.axes[a].name if a in self.axes else a.lstrip("~")

    def index(self, token: Token) -> str:
        return self.axis(token[0]) + self.primes.get(token, "")

    def over(self, tokens: frozenset[Token]) -> str:
        """The indices that a sum or a reduction binds; of several along one axis, all but the first are primed."""
        for _, alike in itertools.groupby(sorted(tokens), key=lambda t: t[0]):
            for n, token in enumerate(alike):
                if n:
                    self.primes[token] = "'" * n
        return ",".join(sorted(map(self.index, tokens)))

    def source(self, name: str) -> str:
        """An input, or the result of an operator outside the calculus."""
        e = self.made.get(name)
        if e is None:
            return self.names.get(name, name)
        args = ", ".join(self.source(a) for a in e.args)
        if isinstance(e.op, Slice):
            stop = f"{e.op.start}+{self.axis(e.op.out.name)}"
            return f"{args}[{self.axis(e.op.axis)} = {stop if e.op.step == 1 else f'{stop}·{e.op.step}'}]"
        return f"{op_text(e.op)}({args})"

    # -- values

    def text(self, x: Value) -> str:
        """The value as a formula; of a long one the inner parts are left out."""
        self.primes, self.room = {}, MOST_FACTORS
        return self.value(x)

    def value(self, x: Value) -> str:
        first, *rest = (self.term(t) for t in x)
        return first + "".join(f" - {t[1:]}" if t.startswith("-") else f" + {t}" for t in rest)

    def term(self, t: Term) -> str:
        above, below, sign = list[str](), list[str](), ""
        over = self.over(t.bound)
        for f in t.factors:
            if isinstance(f, Number):
                sign = "-" * (f.coefficient < 0)
                up, down = self.number_parts(f)
                above, below = up + above, below + down
            elif isinstance(f, Call) and f.fn == "inv":
                below.append(self.operand(f.args[0]))
            else:
                above.append(self.factor(f))
        body = "·".join(above) or "1"
        body += f" / {below[0] if len(below) == 1 else '(' + '·'.join(below) + ')'}" if below else ""
        return f"{sign}Σ{over} {body}" if over else sign + body

    def operand(self, x: Value) -> str:
        """In parentheses, unless it is one factor."""
        plain = len(x) == 1 and not x[0].bound and len(x[0].factors) == 1 and not isinstance(x[0].factors[0], Number)
        return self.value(x) if plain else f"({self.value(x)})"

    def number_parts(self, n: Number) -> tuple[list[str], list[str]]:
        c, above, below = abs(n.coefficient), list[str](), list[str]()
        decimal = repr(float(c)).replace("e-0", "e-") if c < 10**15 else str(c)
        if c.denominator != 1 and Fraction(decimal) == c:
            above.append(decimal)
        else:
            above += [str(c.numerator)] * (c.numerator != 1)
            below += [str(c.denominator)] * (c.denominator != 1)
        for a, power in n.sizes:
            size = f"|{self.axis(a)}|" + (f"^{abs(power)}" if abs(power) > 1 else "")
            (above if power > 0 else below).append(size)
        return above, below

    def number(self, n: Number) -> str:
        return self.term(Term(frozenset(), (n,)))

    def factor(self, f: Factor) -> str:
        self.room -= 1
        if self.room < 0:
            return "…"
        match f:
            case Load(name, tokens) if name == IOTA:
                return f"index({self.axis(tokens[0][0])})"
            case Load(name, tokens):
                text = self.source(name)
                own = self.own.get(name)
                plain = own is None or (tuple(a for a, _ in tokens) == own and self.primes.keys().isdisjoint(tokens))
                return text if plain else f"{text}[{','.join(map(self.index, tokens))}]"
            case Number():
                return self.number(f)
            case Paren(inner):
                return f"({self.value(inner)})"
            case Call(fn, attrs, bound, args):
                over = self.over(bound)
                return self.call(fn, attrs, over, [self.value(a) for a in args], [*map(_atomic, args)])
            case _:
                assert_never(f)

    def call(self, fn: str, attrs: tuple[object, ...], over: str, args: list[str], atomic: list[bool]) -> str:
        match fn:
            case "inv":
                return f"1 / {args[0]}" if atomic[0] else f"1 / ({args[0]})"
            case "compare":
                return f"({args[0]} {RELATIONS.get(str(attrs[0]), str(attrs[0]))} {args[1]})"
            case "select":
                return f"where({', '.join(args)})"
            case "masked_exp":
                return f"exp({args[0]} where {args[1]})"
            case _:
                extra = [str(a[1] if isinstance(a, tuple) else a) for a in attrs]
                extra = [x for x in extra if x != "none"]
                return f"{fn}{f'[{over}]' if over else ''}({', '.join([*args, *extra])})"

    # -- edges

    def leaf(self, f: Load | Number) -> str:
        return self.text((Term(frozenset(), (f,)),))

    def edge(self, e: Edge, name: Callable[[int], str]) -> str:
        """The operator over the names of its operands."""
        over = ",".join(sorted(map(self.axis, e.axes)))
        args = [name(x) for x in e.children]
        match e.kind:
            case "load" | "number":
                return "" if e.leaf is None else self.leaf(e.leaf)
            case "product":
                body = "·".join(_bracketed(a) for a in sorted(args, key=_literals_first))
                return f"Σ{over} {body}" if e.axes else body
            case "sum":
                return f"Σ{over} {_bracketed(args[0])}"
            case "add":
                return " + ".join(args).replace("+ -", "- ")
            case "reduce":
                return f"{e.fn}[{over}]({args[0]})"
            case "call":
                return self.call(e.fn, e.attrs, "", args, [" " not in a for a in args])
            case _:
                assert_never(e.kind)


def _atomic(x: Value) -> bool:
    return len(x) == 1 and not x[0].bound and len(x[0].factors) == 1


def _literals_first(text: str) -> bool:
    return not (text[0].isdigit() or text[0] in "-|(")


def _bracketed(text: str) -> str:
    return f"({text})" if " " in text and not text.endswith((")", "]")) else text
