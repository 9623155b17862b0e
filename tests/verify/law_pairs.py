"""Pairs of programs that are equal by a registered law, and neighbours that its condition leaves out."""

from __future__ import annotations

from fractions import Fraction

from mugraph.ir.ops import Cast, Contract, Elementwise, Iota, Reduce
from mugraph.ir.types import DType
from mugraph.verify import laws
from mugraph.verify.laws import Law
from tests.verify.variants import Pair, Step, X, Y, Z, const, k, largest, logsumexp, softmax, total

C = ("c", const(Fraction(1, 3)))
INDEX: list[Step] = [("i", Iota(k)), ("f", Cast(DType.f32), "i")]
MINUS_D = ("d", const(Fraction(-1, 3)))
MINUS = ("c", const(Fraction(-1, 3)))


def positive(name: str = "y") -> list[Step]:
    """Something that is not negative, over k."""
    return [("s", "square", "Y"), ("e", "exp", "Y"), (name, "add", "s", "e")]


HOLDS: dict[str, tuple[Law, Pair]] = {
    "a maximum moves with a shift": (
        laws.SHIFT,
        ([X, Y], [("t", total("k"), "Y"), ("z", "add", "X", "t"), ("o", largest("k"), "z")],
                 [("t", total("k"), "Y"), ("m", largest("k"), "X"), ("o", "add", "m", "t")]),
    ),
    "a maximum of two moves with a shift": (
        laws.SHIFT,
        ([X, Y, Z], [("x", "sub", "X", "Z"), ("y", "sub", "Y", "Z"), ("o", "max", "x", "y")],
                    [("m", "max", "X", "Y"), ("o", "sub", "m", "Z")]),
    ),
    "relu of a difference": (
        laws.SHIFT,
        ([X, Y], [("z", "sub", "X", "Y"), ("o", "relu", "z")], [("m", "max", "X", "Y"), ("o", "sub", "m", "Y")]),
    ),
    "the largest of what was made to have the largest 0": (
        laws.SHIFT,
        ([X], [("t", largest("k"), "X"), ("z", "sub", "X", "t"), ("o", largest("k"), "z")],
              [("t", largest("k"), "X"), ("o", "sub", "t", "t")]),
    ),
    "a positive number leaves relu": (
        laws.SCALE,
        ([X], [C, ("z", "mul", "X", "c"), ("o", "relu", "z")], [C, ("r", "relu", "X"), ("o", "mul", "c", "r")]),
    ),
    "a positive value leaves relu": (
        laws.SCALE,
        ([X, Y], [("g", "sigmoid", "Y"), ("z", "mul", "X", "g"), ("o", "relu", "z")],
                 [("g", "sigmoid", "Y"), ("r", "relu", "X"), ("o", "mul", "g", "r")]),
    ),
    "the scale of logits leaves their maximum": (
        laws.SCALE,
        ([X], [C, ("z", "mul", "c", "X"), ("o", largest("k"), "z")],
              [C, ("m", largest("k"), "X"), ("o", "mul", "c", "m")]),
    ),
    "the norm of a row leaves its maximum": (
        laws.SCALE,
        ([X], [("q", "square", "X"), ("t", total("k"), "q"), ("r", "rsqrt", "t"), ("z", "mul", "X", "r"),
               ("o", largest("k"), "z")],
              [("q", "square", "X"), ("t", total("k"), "q"), ("r", "rsqrt", "t"), ("m", largest("k"), "X"),
               ("o", "mul", "m", "r")]),
    ),
    "an index leaves relu": (
        laws.SCALE,
        ([X], [*INDEX, ("z", "mul", "X", "f"), ("o", "relu", "z")],
              [*INDEX, ("r", "relu", "X"), ("o", "mul", "r", "f")]),
    ),
    "a negative scale of a minimum": (
        laws.MIN,
        ([X], [C, MINUS_D, ("z", "mul", "X", "c"), ("m", Reduce("min", ("k",)), "z"), ("o", "mul", "m", "d")],
              [C, MINUS_D, ("z", "mul", "X", "d"), ("m", largest("k"), "z"), ("o", "mul", "m", "c")]),
    ),
    "a minimum is a maximum of negatives": (
        laws.MIN,
        ([X, Y], [("o", "min", "X", "Y")],
                 [("x", "neg", "X"), ("y", "neg", "Y"), ("m", "max", "x", "y"), ("o", "neg", "m")]),
    ),
    "a largest negative is a smallest": (
        laws.MIN,
        ([X, Y, Z], [("m", "min", "X", "Y"), ("o", "min", "m", "Z")],
                    [("x", "neg", "X"), ("y", "neg", "Y"), ("m", "max", "x", "y"), ("n", "neg", "m"),
                     ("o", "min", "Z", "n")]),
    ),
    "relu of what is not negative": (
        laws.RELU,
        ([X], [("s", "square", "X"), ("o", "relu", "s")], [("o", "square", "X")]),
    ),
    "a root twice": (
        laws.ROOT,
        ([Y], [*positive(), ("r", "sqrt", "y"), ("o", "mul", "r", "r")], [*positive("o")]),
    ),
    "an inverse root thrice": (
        laws.ROOT,
        ([X, Y], [*positive(), ("r", "rsqrt", "y"), ("p", "mul", "X", "r"), ("q", "mul", "r", "r"),
                  ("o", "mul", "p", "q")],
                 [*positive(), ("r", "sqrt", "y"), ("d", "mul", "y", "r"), ("o", "div", "X", "d")]),
    ),
    "what is over its root": (
        laws.ROOT,
        ([Y], [*positive(), ("r", "sqrt", "y"), ("o", "div", "y", "r")], [*positive(), ("o", "sqrt", "y")]),
    ),
    "the root of a sum of squares": (
        laws.ROOT,
        ([X, Y], [("q", "square", "X"), ("t", total("k"), "q"), ("r", "rsqrt", "t"), ("z", "mul", "Y", "r"),
                  ("w", "square", "z"), ("o", total("k"), "w")],
                 [("q", "square", "X"), ("t", total("k"), "q"), ("w", "square", "Y"), ("u", total("k"), "w"),
                  ("o", "div", "u", "t")]),
    ),
    "the root of a variance": (
        laws.ROOT,
        ([X, Y], [("t", total("k"), "X"), ("d", "sub", "Y", "t"), ("q", "square", "d"), ("v", total("k"), "q"),
                  ("r", "rsqrt", "v"), ("z", "mul", "r", "r"), ("o", "mul", "t", "z")],
                 [("t", total("k"), "X"), ("d", "sub", "Y", "t"), ("q", "square", "d"), ("v", total("k"), "q"),
                  ("o", "div", "t", "v")]),
    ),
    "relu squared": (
        laws.RELU_SQUARED,
        ([X, Y], [("r", "relu", "X"), ("p", "mul", "r", "Y"), ("o", "mul", "p", "r")],
                 [("r", "relu", "X"), ("p", "mul", "X", "Y"), ("o", "mul", "p", "r")]),
    ),
    "relu cubed": (
        laws.RELU_SQUARED,
        ([X], [("r", "relu", "X"), ("p", "mul", "r", "r"), ("o", "mul", "p", "r")],
              [("r", "relu", "X"), ("s", "square", "X"), ("o", "mul", "r", "s")]),
    ),
    "a scaled relu squared": (
        laws.RELU_SQUARED,
        ([X], [C, ("z", "mul", "X", "c"), ("r", "relu", "z"), ("o", "mul", "r", "r")],
              [C, ("r", "relu", "X"), ("d", "mul", "c", "c"), ("p", "mul", "X", "d"), ("o", "mul", "p", "r")]),
    ),
    "a maximum by an absolute value": (
        laws.ABS,
        ([X, Y], [("m", "max", "X", "Y"), ("o", "add", "m", "m")],
                 [("d", "sub", "X", "Y"), ("a", "abs", "d"), ("s", "add", "X", "Y"), ("o", "add", "a", "s")]),
    ),
    "an absolute value by relu": (
        laws.ABS,
        ([X], [("o", "abs", "X")], [("n", "neg", "X"), ("r", "relu", "X"), ("q", "relu", "n"), ("o", "add", "r", "q")]),
    ),
    "the root of a square": (
        laws.ROOT_OF_SQUARE,
        ([X], [("s", "square", "X"), ("o", "sqrt", "s")], [("n", "neg", "X"), ("o", "abs", "n")]),
    ),
    "a square leaves its root": (
        laws.ROOT_OF_MULTIPLE,
        ([X, Y], [("g", "sigmoid", "Y"), ("h", "square", "g"), ("s", "square", "X"), ("p", "mul", "h", "s"),
                  ("o", "sqrt", "p")],
                 [("g", "sigmoid", "Y"), ("s", "square", "X"), ("r", "sqrt", "s"), ("o", "mul", "g", "r")]),
    ),
    "a positive factor leaves an absolute value": (
        laws.ABS,
        ([X], [C, ("z", "mul", "X", "c"), ("o", "abs", "z")], [C, ("a", "abs", "X"), ("o", "mul", "a", "c")]),
    ),
    "an absolute value of what is not negative": (
        laws.ABS,
        ([X], [("s", "exp", "X"), ("q", "square", "X"), ("o", "abs", "q")], [("o", "square", "X")]),
    ),
    "an absolute value of what is not positive": (
        laws.ABS,
        ([X], [("e", "exp", "X"), ("n", "neg", "e"), ("o", "abs", "n")], [("e", "exp", "X"), ("o", "relu", "e")]),
    ),
    "absolute values of opposites": (laws.ABS, ([X], [("z", "neg", "X"), ("o", "abs", "z")],
                                                            [("o", "abs", "X")])),
    "absolute values of differences": (
        laws.ABS,
        ([X, Y], [("z", "sub", "X", "Y"), ("o", "abs", "z")], [("z", "sub", "Y", "X"), ("o", "abs", "z")]),
    ),
    "an absolute value squared": (laws.ABS, ([X], [("a", "abs", "X"), ("o", "square", "a")],
                                                     [("o", "square", "X")])),
    "softmax by its logarithm": (
        laws.EXP_OF_LOG,
        ([X], softmax(None), [*logsumexp(None)[:-1], ("g", "log", "l"), ("z", "sub", "X", "g"), ("o", "exp", "z")]),
    ),
    "softmax by its shifted logarithm": (
        laws.EXP_OF_LOG,
        ([X], softmax(None), [*logsumexp(("t", largest("k"), "X")), ("y", "sub", "X", "o"), ("e", "exp", "y")]),
    ),
    "a logarithm in an exponent": (
        laws.EXP_OF_LOG,
        ([X, Y], [("g", "sigmoid", "Y"), ("l", "log", "g"), ("z", "add", "X", "l"), ("o", "exp", "z")],
                 [("g", "sigmoid", "Y"), ("e", "exp", "X"), ("o", "mul", "e", "g")]),
    ),
    "the logarithm of an exponential": (
        laws.LOG_OF_EXP,
        ([X, Y], [("e", "exp", "X"), ("l", "log", "e"), ("o", "mul", "l", "Y")], [("o", "mul", "X", "Y")]),
    ),
}  # fmt: skip

BROKEN: dict[str, tuple[Law, Pair]] = {
    "a shift that changes along the axis": (
        laws.SHIFT,
        ([X, Y], [("z", "add", "X", "Y"), ("o", largest("k"), "z")],
                 [("t", largest("k"), "Y"), ("m", largest("k"), "X"), ("o", "add", "m", "t")]),
    ),
    "one of two is shifted": (
        laws.SHIFT,
        ([X, Y, Z], [("x", "sub", "X", "Z"), ("o", "max", "x", "Y")], [("m", "max", "X", "Y"), ("o", "sub", "m", "Z")]),
    ),
    "relu of a difference without the shift": (
        laws.SHIFT,
        ([X, Y], [("z", "sub", "X", "Y"), ("o", "relu", "z")], [("o", "max", "X", "Y")]),
    ),
    "a negative number does not leave relu": (
        laws.SCALE,
        ([X], [MINUS, ("z", "mul", "X", "c"), ("o", "relu", "z")], [MINUS, ("r", "relu", "X"), ("o", "mul", "c", "r")]),
    ),
    "a value of any sign does not leave relu": (
        laws.SCALE,
        ([X, Y], [("z", "mul", "X", "Y"), ("o", "relu", "z")], [("r", "relu", "X"), ("o", "mul", "Y", "r")]),
    ),
    "a negative scale of logits": (
        laws.SCALE,
        ([X], [MINUS, ("z", "mul", "c", "X"), ("o", largest("k"), "z")],
              [MINUS, ("m", largest("k"), "X"), ("o", "mul", "c", "m")]),
    ),
    "a scale that changes along the axis": (
        laws.SCALE,
        ([X, Y], [("g", "sigmoid", "Y"), ("z", "mul", "X", "g"), ("o", largest("k"), "z")],
                 [("g", "sigmoid", "Y"), ("s", largest("k"), "g"), ("m", largest("k"), "X"), ("o", "mul", "s", "m")]),
    ),
    "a constant is scaled too": (
        laws.SCALE,
        ([X], [C, ("d", const(1)), ("z", "mul", "X", "c"), ("o", "max", "z", "d")],
              [C, ("d", const(1)), ("m", "max", "X", "d"), ("o", "mul", "c", "m")]),
    ),
    "a minimum is no negative maximum": (
        laws.MIN,
        ([X, Y], [("o", "min", "X", "Y")], [("m", "max", "X", "Y"), ("o", "neg", "m")]),
    ),
    "a minimum of negatives": (
        laws.MIN,
        ([X, Y], [("x", "neg", "X"), ("y", "neg", "Y"), ("o", "min", "x", "y")],
                 [("m", "min", "X", "Y"), ("o", "neg", "m")]),
    ),
    "relu of any sign": (laws.RELU, ([X], [("o", "relu", "X")], [("t", "neg", "X"), ("o", "neg", "t")])),
    "relu of a power of three": (
        laws.RELU,
        ([X], [("s", Elementwise("pow", (("exponent", Fraction(3)),)), "X"), ("o", "relu", "s")],
              [("o", Elementwise("pow", (("exponent", Fraction(3)),)), "X")]),
    ),
    "a root of any sign twice": (
        laws.ROOT,
        ([X], [("r", "sqrt", "X"), ("o", "mul", "r", "r")], [("z", "neg", "X"), ("o", "neg", "z")]),
    ),
    "a root of a difference of squares": (
        laws.ROOT,
        ([X, Y], [("x", "square", "X"), ("y", "square", "Y"), ("d", "sub", "x", "y"), ("r", "sqrt", "d"),
                  ("o", "mul", "r", "r")],
                 [("x", "square", "X"), ("y", "square", "Y"), ("o", "sub", "x", "y")]),
    ),
    "roots of two values": (
        laws.ROOT,
        ([X, Y], [("x", "exp", "X"), ("y", "square", "Y"), ("z", "square", "X"), ("r", "sqrt", "z"), ("s", "sqrt", "y"),
                  ("o", "mul", "r", "s")],
                 [("o", "square", "Y")]),
    ),
    "relu times another": (
        laws.RELU_SQUARED,
        ([X, Y], [("r", "relu", "X"), ("q", "relu", "Y"), ("o", "mul", "r", "q")],
                 [("r", "relu", "X"), ("o", "mul", "r", "Y")]),
    ),
    "the inverse of relu": (
        laws.RELU_SQUARED,
        ([X], [("r", "relu", "X"), ("o", "reciprocal", "r")], [("z", "neg", "X"), ("r", "reciprocal", "z"),
                                                              ("o", "neg", "r")]),
    ),
    "the root of a square of any sign": (laws.ROOT_OF_SQUARE, ([X], [("s", "square", "X"), ("o", "sqrt", "s")],
                                                               [("z", "neg", "X"), ("o", "neg", "z")])),
    "a factor leaves its root whole": (
        laws.ROOT_OF_MULTIPLE,
        ([X, Y], [("g", "sigmoid", "Y"), ("s", "square", "X"), ("p", "mul", "g", "s"), ("o", "sqrt", "p")],
                 [("g", "sigmoid", "Y"), ("s", "square", "X"), ("r", "sqrt", "s"), ("o", "mul", "g", "r")]),
    ),
    "a factor of any sign leaves an absolute value": (
        laws.ABS,
        ([X, Y], [("z", "mul", "X", "Y"), ("o", "abs", "z")], [("a", "abs", "X"), ("o", "mul", "a", "Y")]),
    ),
    "a negative number leaves an absolute value": (
        laws.ABS,
        ([X], [MINUS, ("z", "mul", "X", "c"), ("o", "abs", "z")], [MINUS, ("a", "abs", "X"), ("o", "mul", "a", "c")]),
    ),
    "an absolute value of a sum": (
        laws.ABS,
        ([X], [("t", Contract(("k",)), "X"), ("o", "abs", "t")], [("o", Contract(("k",)), "X")]),
    ),
    "an absolute value of a sum of cubes": (
        laws.ABS,
        ([X], [("t", Contract(("k",)), "X", "X", "X"), ("o", "abs", "t")], [("o", Contract(("k",)), "X", "X", "X")]),
    ),
    "the negative of an absolute value": (
        laws.ABS,
        ([X], [("z", "neg", "X"), ("o", "abs", "z")], [("z", "abs", "X"), ("o", "neg", "z")]),
    ),
    "an absolute value thrice": (
        laws.ABS,
        ([X], [("a", "abs", "X"), ("b", "square", "a"), ("o", "mul", "a", "b")],
              [("b", "square", "X"), ("o", "mul", "X", "b")]),
    ),
    "an exponential of a logarithm of any sign": (
        laws.EXP_OF_LOG,
        ([X], [("l", "log", "X"), ("o", "exp", "l")], [("z", "neg", "X"), ("o", "neg", "z")]),
    ),
    "an exponential of twice a logarithm": (
        laws.EXP_OF_LOG,
        ([X], [("g", "sigmoid", "X"), ("l", "log", "g"), ("d", "add", "l", "l"), ("o", "exp", "d")],
              [("o", "sigmoid", "X")]),
    ),
    "softmax by a logarithm of another sum": (
        laws.EXP_OF_LOG,
        ([X, Y], softmax(None),
         [("p", "exp", "Y"), ("l", total("k"), "p"), ("g", "log", "l"), ("z", "sub", "X", "g"), ("o", "exp", "z")]),
    ),
    "the logarithm of two exponentials": (
        laws.LOG_OF_EXP,
        ([X], [("e", "exp", "X"), ("f", "add", "e", "e"), ("o", "log", "f")], [("z", "neg", "X"), ("o", "neg", "z")]),
    ),
}  # fmt: skip
