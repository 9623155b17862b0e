"""Pairs of programs: written differently, equal by some law, and lookalikes that are not equal."""

from __future__ import annotations

from fractions import Fraction

from mugraph.ir.axes import Axis
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import (
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    MaskedExp,
    Op,
    Reduce,
    Rename,
    Reshape,
    Select,
    SizeOf,
    Slice,
)  # fmt: skip
from mugraph.ir.types import DType, Input
from tests.graphs import Builder, axis, inp, program

b, k, n, m = axis("b", 16), axis("k", 64), axis("n", 32), axis("m", 16)
X, Y, Z = inp("X", b, k), inp("Y", b, k), inp("Z", b, k)
W, V = inp("W", k, n), inp("V", k, n)
KEEP = inp("Keep", b, k, dtype=DType.bool)
IDX = inp("Idx", m, dtype=DType.i64)

Step = tuple[str, Op | str, *tuple[str, ...]]
Pair = tuple[list[Input], list[Step], list[Step]]


def build(inputs: list[Input], steps: list[Step]) -> Program:
    """A program from steps (name, function or operator, operands); the last one is the output."""
    s = Builder({i.name: i.tensor for i in inputs})
    for name, op, *args in steps:
        s.add(name, Elementwise(op) if isinstance(op, str) else op, *args)
    return program("p", inputs, s, steps[-1][0])


def pair(inputs: list[Input], left: list[Step], right: list[Step]) -> tuple[Program, KernelGraph]:
    p, q = build(inputs, left), build(inputs, right)
    return p, KernelGraph("g", q.inputs, q.equations, q.outputs)


def const(value: int | Fraction) -> Op:
    return Const(Fraction(value))


def total(*axes: str) -> Op:
    return Reduce("sum", axes)


def largest(*axes: str) -> Op:
    return Reduce("max", axes)


def half(name: str, start: int) -> Step:
    return (name, Slice("k", axis("c", 32), start), "X")


def softmax(shift: Step | None) -> list[Step]:
    if shift is None:
        return [("p", "exp", "X"), ("l", total("k"), "p"), ("o", "div", "p", "l")]
    return [shift, ("z", "sub", "X", "t"), ("p", "exp", "z"), ("l", total("k"), "p"), ("o", "div", "p", "l")]


def logsumexp(shift: Step | None, last: str = "add") -> list[Step]:
    """log Σ exp X over k, or of the shifted exponentials with the shift t put back."""
    if shift is None:
        return [("p", "exp", "X"), ("l", total("k"), "p"), ("o", "log", "l")]
    z: list[Step] = [("z", "sub", "X", "t"), ("p", "exp", "z"), ("l", total("k"), "p"), ("g", "log", "l")]
    return [shift, *z, ("o", last, "g", "t")]


def as_bool(value: str, name: str = "c") -> Step:
    return (name, Cast(DType.bool), value)


EQUAL: dict[str, Pair] = {
    "distribute": (
        [X, W, V],
        [("s", "add", "W", "V"), ("o", Contract(("k",)), "X", "s")],
        [("p", Contract(("k",)), "X", "W"), ("q", Contract(("k",)), "X", "V"), ("o", "add", "p", "q")],
    ),
    "factor-out-of-sum": (
        [X, Y],
        [("r", total("k"), "Y"), ("p", "mul", "X", "r"), ("o", total("k"), "p")],
        [("r", total("k"), "Y"), ("s", total("k"), "X"), ("o", "mul", "r", "s")],
    ),
    "exp-of-sum": (
        [X, Y],
        [("s", "add", "X", "Y"), ("o", "exp", "s")],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("o", "mul", "p", "q")],
    ),
    "exp-of-difference": (
        [X, Y],
        [("s", "sub", "X", "Y"), ("o", "exp", "s")],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("o", "div", "p", "q")],
    ),
    "softmax-shift": ([X], softmax(None), softmax(("t", largest("k"), "X"))),
    "softmax-any-shift": ([X], softmax(("t", total("k"), "X")), softmax(("t", largest("k"), "X"))),
    "fractions-of-exponentials": (
        [X, Y],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("r", "div", "X", "p"), ("s", "div", "Y", "q"), ("o", "add", "r", "s")],
        [
            ("p", "exp", "X"),
            ("q", "exp", "Y"),
            ("r", "mul", "X", "q"),
            ("s", "mul", "Y", "p"),
            ("t", "add", "r", "s"),
            ("u", "add", "X", "Y"),
            ("v", "exp", "u"),
            ("o", "div", "t", "v"),
        ],
    ),
    "sum-of-unlike-fractions": (
        [X, Y],
        [("p", "exp", "X"), ("c", const(1),), ("d", "add", "p", "c"), ("f", "div", "Y", "d"), ("o", total("k"), "f")],
        [("p", "exp", "X"), ("c", const(1)), ("d", "add", "c", "p"), ("r", "reciprocal", "d"),
         ("o", Contract(("k",)), "r", "Y")],
    ),
    "function-of-exponentials": (
        [X, Y],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("s", "mul", "p", "q"), ("o", "sqrt", "s")],
        [("s", "add", "X", "Y"), ("p", "exp", "s"), ("o", "sqrt", "p")],
    ),
    "exponential-of-exponential": (
        [X, Y],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("s", "mul", "p", "q"), ("o", "exp", "s")],
        [("s", "add", "X", "Y"), ("p", "exp", "s"), ("o", "exp", "p")],
    ),
    "logarithm-of-shifted-sum": ([X], logsumexp(None), logsumexp(("t", largest("k"), "X"))),
    "logarithm-of-a-sum-with-any-shift": ([X, Y], logsumexp(None), logsumexp(("t", total("k"), "Y"))),
    "logarithm-of-two-shifted-sums": (
        [X],
        logsumexp(("t", total("k"), "X")),
        logsumexp(("t", largest("k"), "X")),
    ),
    "logarithm-of-a-sum-plus-a-term": (
        [X, Y],
        [*logsumexp(None)[:-1], ("g", "log", "l"), ("o", "add", "g", "Y")],
        [("s", "exp", "X"), ("l", total("k"), "s"), ("e", "exp", "Y"), ("v", "mul", "l", "e"), ("o", "log", "v")],
    ),
    "logarithm-of-a-scaled-sum": (
        [X, Y],
        [("p", "exp", "X"), ("l", Contract(("k",)), "p", "Y"), ("o", "log", "l")],
        [("t", largest("k"), "X"), ("z", "sub", "X", "t"), ("p", "exp", "z"), ("l", Contract(("k",)), "Y", "p"),
         ("g", "log", "l"), ("o", "add", "t", "g")],
    ),
    "logarithm-of-a-sum-over-an-exponential": (
        [X, Y],
        [*logsumexp(None)[:-1], ("g", "log", "l"), ("o", "sub", "g", "Y")],
        [*logsumexp(None)[:-1], ("e", "exp", "Y"), ("v", "div", "l", "e"), ("o", "log", "v")],
    ),
    "logarithm-of-softmax": (
        [X],
        [*softmax(None)[:-1], ("s", "div", "p", "l"), ("o", "log", "s")],
        [*logsumexp(("t", largest("k"), "X"))[:-1], ("o", "sub", "z", "g")],
    ),
    "logarithm-of-a-quotient-of-sums": (
        [X, Y],
        [*logsumexp(None)[:-1], ("q", "exp", "Y"), ("r", total("k"), "q"), ("s", "div", "l", "r"), ("o", "log", "s")],
        [("t", largest("k"), "Y"), ("x", "sub", "X", "t"), ("y", "sub", "Y", "t"), ("p", "exp", "x"), ("q", "exp", "y"),
         ("l", total("k"), "p"), ("r", total("k"), "q"), ("s", "div", "l", "r"), ("o", "log", "s")],
    ),
    "logarithm-of-a-logarithm": (
        [X],
        [*logsumexp(None)[:-1], ("g", "log", "l"), ("e", "exp", "g"), ("s", "add", "e", "l"), ("o", "log", "s")],
        [*logsumexp(("t", largest("k"), "X"))[:-1], ("h", "add", "g", "t"), ("e", "exp", "h"), ("q", "exp", "X"),
         ("r", total("k"), "q"), ("s", "add", "r", "e"), ("o", "log", "s")],
    ),
    "quotient-of-a-multiple": (
        [X, Y, Z],
        [("p", "mul", "X", "Y"), ("q", "mul", "Z", "X"), ("s", "add", "p", "q"), ("t", "add", "Y", "Z"),
         ("o", "div", "s", "t")],
        [("r", "add", "X", "Y"), ("o", "sub", "r", "Y")],
    ),
    "root-reciprocal": (
        [X],
        [("s", "rsqrt", "X"), ("o", "mul", "X", "s")],
        [("s", "sqrt", "X"), ("o", "div", "X", "s")],
    ),
    "silu-is-x-sigmoid": ([X], [("o", "silu", "X")], [("s", "sigmoid", "X"), ("o", "mul", "X", "s")]),
    "max-associates": (
        [X, Y, Z],
        [("s", "max", "X", "Y"), ("o", "max", "s", "Z")],
        [("s", "max", "Z", "X"), ("t", "max", "Y", "Y"), ("o", "max", "t", "s")],
    ),
    "max-over-two-axes": ([X], [("s", largest("k"), "X"), ("o", largest("b"), "s")], [("o", largest("b", "k"), "X")]),
    "relu-twice": ([X], [("o", "relu", "X")], [("s", "relu", "X"), ("o", "relu", "s")]),
    "mean-is-sum-over-size": (
        [X],
        [("o", Reduce("mean", ("k",)), "X")],
        [("s", total("k"), "X"), ("c", SizeOf(k)), ("o", "div", "s", "c")],
    ),
    "literal-is-the-size": (
        [X],
        [("o", Reduce("mean", ("k",)), "X")],
        [("s", total("k"), "X"), ("c", const(64)), ("o", "div", "s", "c")],
    ),
    "variance": (
        [X],
        [("u", Reduce("mean", ("k",)), "X"), ("d", "sub", "X", "u"), ("q", "square", "d"),
         ("o", Reduce("mean", ("k",)), "q")],
        [("u", Reduce("mean", ("k",)), "X"), ("q", "square", "X"), ("v", Reduce("mean", ("k",)), "q"),
         ("w", "square", "u"), ("o", "sub", "v", "w")],
    ),
    "casts-are-identities": ([X], [("o", "exp", "X")], [("c", Cast(DType.f32), "X"), ("e", "exp", "c"),
                                                         ("o", Cast(DType.f16), "e")]),
    "truth-of-a-comparison-as-a-number": (
        [X, Y, Z],
        [("c", Compare("lt"), "X", "Y"), ("z", const(0)), ("o", Select(), "c", "Z", "z")],
        [("c", Compare("lt"), "X", "Y"), ("m", Cast(DType.f16), "c"), ("o", "mul", "m", "Z")],
    ),
    "rotated-halves": (
        [X],
        [half("x", 0), half("y", 32), ("s", "mul", "x", "y"), ("t", "neg", "s"),
         ("o", Concat(("c", "c"), k), "s", "t")],
        [half("x", 0), half("y", 32), ("u", "neg", "x"), ("t", "mul", "u", "y"), ("s", "mul", "y", "x"),
         ("o", Concat(("c", "c"), k), "s", "t")],
    ),
    "regrouped-heads": (
        [X],
        [("h", Reshape(((b,), (axis("h", 4),), (axis("d", 16),))), "X"), ("o", total("h", "d"), "h")],
        [("o", total("k"), "X")],
    ),
    "gram-by-an-alias": (
        [X],
        [("y", Rename((("b", Axis("b2", 16)),)), "X"), ("o", Contract(("k",)), "X", "y")],
        [("y", Rename((("b", Axis("b2", 16)),)), "X"), ("p", "mul", "X", "y"), ("o", total("k"), "p")],
    ),
    "gather-commutes": (
        [X, IDX],
        [("s", "exp", "X"), ("o", Gather("k"), "s", "Idx")],
        [("s", Gather("k"), "X", "Idx"), ("o", "exp", "s")],
    ),
    "masked-exponential": (
        [X, Y, KEEP],
        [("s", "add", "X", "Y"), ("o", MaskedExp(), "s", "Keep")],
        [("s", MaskedExp(), "X", "Keep"), ("p", "exp", "Y"), ("o", "mul", "s", "p")],
    ),
    "select-of-sums": (
        [X, Y, Z],
        [("c", Compare("lt"), "X", "Y"), ("p", "add", "X", "Z"), ("q", "add", "Y", "Z"),
         ("o", Select(), "c", "p", "q")],
        [("c", Compare("lt"), "X", "Y"), ("s", Select(), "c", "X", "Y"), ("o", "add", "s", "Z")],
    ),
    "prefix-sums-are-linear": (
        [X, Y],
        [("s", "add", "X", "Y"), ("o", CumSum("k"), "s")],
        [("p", CumSum("k"), "X"), ("q", CumSum("k"), "Y"), ("o", "add", "p", "q")],
    ),
    "positions": (
        [X],
        [("i", Iota(k)), ("s", "mul", "X", "i"), ("o", total("k"), "s")],
        [("i", Iota(k)), ("o", Contract(("k",)), "i", "X")],
    ),
}  # fmt: skip

UNEQUAL: dict[str, Pair] = {
    "sum-of-exponentials": (
        [X, Y],
        [("s", "add", "X", "Y"), ("o", "exp", "s")],
        [("p", "exp", "X"), ("q", "exp", "Y"), ("o", "add", "p", "q")],
    ),
    "softmax-of-another-axis": (
        [X],
        softmax(None),
        [("p", "exp", "X"), ("l", total("b"), "p"), ("o", "div", "p", "l")],
    ),
    "softmax-shifted-once": (
        [X],
        softmax(None),
        [("t", largest("k"), "X"), ("z", "sub", "X", "t"), ("p", "exp", "z"), ("q", "exp", "X"), ("l", total("k"), "q"),
         ("o", "div", "p", "l")],
    ),
    "largest-is-not-the-first": ([X, Y], [("o", "max", "X", "Y")], [("z", "sub", "Y", "Y"), ("o", "add", "X", "z")]),
    "largest-leaves-one-out": (
        [X, Y, Z],
        [("s", "max", "X", "Y"), ("o", "max", "s", "Z")],
        [("o", "max", "X", "Z")],
    ),
    "max-is-not-min": ([X, Y], [("o", "max", "X", "Y")], [("o", "min", "X", "Y")]),
    "max-minus-min": (
        [X, Y],
        [("o", "max", "X", "Y")],
        [("s", "min", "X", "Y"), ("d", "sub", "X", "s"), ("o", "add", "d", "X")],
    ),
    "sizes-that-are-equal-today": (
        [X],
        [("s", total("k"), "X"), ("c", SizeOf(k)), ("o", "div", "s", "c")],
        [("s", total("k"), "X"), ("c", SizeOf(b)), ("o", "div", "s", "c")],
    ),
    "sum-of-shifted": (
        [X],
        [("c", const(1)), ("s", "add", "X", "c"), ("o", total("k"), "s")],
        [("c", const(5)), ("s", total("k"), "X"), ("o", "add", "s", "c")],
    ),
    "quotient-of-no-multiple": (
        [X, Y, Z],
        [("p", "mul", "X", "Y"), ("q", "mul", "Z", "Z"), ("s", "add", "p", "q"), ("t", "add", "Y", "Z"),
         ("o", "div", "s", "t")],
        [("r", "add", "X", "Y"), ("o", "sub", "r", "Y")],
    ),
    "other-half": ([X], [half("o", 0)], [half("o", 32)]),
    "halves-in-another-order": (
        [X],
        [half("x", 0), half("y", 32), ("o", Concat(("c", "c"), k), "x", "y")],
        [half("x", 0), half("y", 32), ("o", Concat(("c", "c"), k), "y", "x")],
    ),
    "another-regrouping": (
        [X],
        [("h", Reshape(((b,), (axis("h", 4),), (axis("d", 16),))), "X"), ("o", total("h"), "h")],
        [("h", Reshape(((b,), (axis("d", 16),), (axis("h", 4),))), "X"), ("o", total("h"), "h")],
    ),
    "gathered-too-late": (
        [X, IDX],
        [("s", CumSum("k"), "X"), ("o", Gather("k"), "s", "Idx")],
        [("s", Gather("k"), "X", "Idx"), ("o", CumSum("m"), "s")],
    ),
    "mask-left-out": ([X, KEEP], [("o", MaskedExp(), "X", "Keep")], [("o", "exp", "X")]),
    "mask-before-the-exponential": (
        [X, KEEP],
        [("o", MaskedExp(), "X", "Keep")],
        [("s", "mul", "X", "Keep"), ("o", "exp", "s")],
    ),
    "sides-of-a-selection": (
        [X, Y],
        [("c", Compare("lt"), "X", "Y"), ("o", Select(), "c", "X", "Y")],
        [("c", Compare("lt"), "X", "Y"), ("o", Select(), "c", "Y", "X")],
    ),
    "another-root": ([X], [("o", "sqrt", "X")], [("s", "sqrt", "X"), ("o", "sqrt", "s")]),
    "gelu-by-tanh": (
        [X],
        [("o", Elementwise("gelu", (("approximate", "none"),)), "X")],
        [("o", Elementwise("gelu", (("approximate", "tanh"),)), "X")],
    ),
    "power-of-another-exponent": (
        [X],
        [("o", Elementwise("pow", (("exponent", Fraction(3)),)), "X")],
        [("o", Elementwise("pow", (("exponent", Fraction(-3)),)), "X")],
    ),
    "integers-are-not-reals": ([X], [("o", "exp", "X")], [("c", Cast(DType.i32), "X"), ("d", Cast(DType.f16), "c"),
                                                           ("o", "exp", "d")]),
    "logarithm-shifted-back-twice": (
        [X],
        logsumexp(None),
        [*logsumexp(("t", largest("k"), "X"))[:-1], ("h", "add", "g", "t"), ("o", "add", "h", "t")],
    ),
    "logarithm-shifted-the-other-way": ([X], logsumexp(None), logsumexp(("t", largest("k"), "X"), "sub")),
    "logarithm-not-shifted-back": ([X], logsumexp(None), logsumexp(("t", largest("k"), "X"))[:-1]),
    "logarithm-of-another-sum": (
        [X, Y],
        logsumexp(None),
        [("p", "exp", "Y"), ("l", total("k"), "p"), ("o", "log", "l")],
    ),
    "logarithm-of-twice-the-sum": (
        [X],
        logsumexp(None),
        [*logsumexp(None)[:-1], ("c", const(2)), ("d", "mul", "c", "l"), ("o", "log", "d")],
    ),
    "logarithm-of-a-sum-plus-one": (
        [X],
        logsumexp(("t", largest("k"), "X")),
        [("t", largest("k"), "X"), ("z", "sub", "X", "t"), ("p", "exp", "z"), ("l", total("k"), "p"), ("c", const(1)),
         ("d", "add", "l", "c"), ("g", "log", "d"), ("o", "add", "g", "t")],
    ),
    "logarithm-of-the-inverse": (
        [X],
        [*softmax(None)[:-1], ("s", "div", "p", "l"), ("o", "log", "s")],
        [*softmax(None)[:-1], ("s", "div", "l", "p"), ("o", "log", "s")],
    ),
    "logarithm-is-not-linear": (
        [X],
        [("p", "exp", "X"), ("g", "log", "p"), ("o", total("k"), "g")],
        logsumexp(None),
    ),
    "truth-is-not-a-factor": (
        [X, Y],
        [("z", const(0)), as_bool("X"), ("s", Select(), "c", "Y", "z"), ("o", total("k"), "s")],
        [("o", Contract(("k",)), "X", "Y")],
    ),
    "truth-forgets-the-value": (
        [X],
        [as_bool("X"), ("o", Cast(DType.f32), "c")],
        [("o", Cast(DType.f32), "X")],
    ),
    "truth-of-positions": (
        [X],
        [("i", Iota(k)), as_bool("i"), ("z", const(0)), ("o", Select(), "c", "X", "z")],
        [("i", Iota(k)), ("c", Cast(DType.f16), "i"), ("o", "mul", "c", "X")],
    ),
    "positions-from-one": (
        [X],
        [("i", Iota(k)), ("o", Contract(("k",)), "i", "X")],
        [("i", Iota(k)), ("c", const(1)), ("j", "add", "i", "c"), ("o", Contract(("k",)), "j", "X")],
    ),
}  # fmt: skip
