"""The registered laws: what both tiers know of functions beyond that equal arguments give equal results.

Each holds for real numbers under its condition.  That a value is not negative is known of literals, sizes and indices
that are not, of even powers, exponentials, absolute values, sigmoids, square roots and truth values, and of sums,
products, quotients and maxima of such values.  Laws that a proof used are on its certificate; the `tested` tier uses
these where arbitrary functions would not do, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """An equation, and when it holds."""

    equation: str
    condition: str = ""

    def __str__(self) -> str:
        return f"{self.equation} where {self.condition}" if self.condition else self.equation


SHIFT = Law("max(x + c) = max(x) + c")
SCALE = Law("max(c·x) = c·max(x)", "c >= 0")
MIN = Law("min(x) = -max(-x)")
RELU = Law("max(x, 0) = x", "x >= 0")
RELU_SQUARED = Law("max(x, 0)·max(x, 0) = x·max(x, 0)")
ABS = Law("|x| = max(x, -x)")
ROOT = Law("sqrt(x)·sqrt(x) = x", "x >= 0")
ROOT_OF_SQUARE = Law("sqrt(x·x) = |x|")
ROOT_OF_MULTIPLE = Law("sqrt(c·c·x) = c·sqrt(x)", "c >= 0 and x >= 0")
EXP_OF_LOG = Law("exp(log(x) + y) = x·exp(y)", "x >= 0")
LOG_OF_EXP = Law("log(exp(x)) = x")

LAWS = (
    SHIFT, SCALE, MIN, RELU, RELU_SQUARED, ABS, ROOT, ROOT_OF_SQUARE, ROOT_OF_MULTIPLE, EXP_OF_LOG, LOG_OF_EXP,
)  # fmt: skip
