"""Random small programs in the DSL: sums, products, quotients, functions, reductions and matmuls of a few inputs."""

import re
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

import mugraph.dsl.functions as mg
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import f32, trace
from mugraph.ir.axes import Dim
from mugraph.ir.graph import Program

K = 6
SPECS = {"x": f32[Dim("B", 1, 64), K], "y": f32[Dim("B", 1, 64), K], "g": f32[K], "w": f32[K, K], "u": f32[K, K]}
Expression = Callable[[dict[str, Tensor]], Tensor]

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": mg.silu,
    "exp": mg.exp,
    "square": mg.square,
    "neg": mg.neg,
    "halve": lambda x: x * 0.5,
    "shift": lambda x: x + 1,
    "sum": lambda x: mg.sum(x, axis=-1, keepdims=True),
    "mean": lambda x: mg.mean(x, axis=-1, keepdims=True),
    "amax": lambda x: mg.amax(x, axis=-1, keepdims=True),
    "softmax": lambda x: mg.softmax(x, axis=-1),
}  # fmt: skip
# The verifier takes the exponential of an exponential for an arbitrary function, so its stabilised form is refused.
EXPONENTIAL = re.compile(r"exp|softmax")
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (1 + b * b),
    "max": mg.maximum,
}


@st.composite
def expressions(draw: st.DrawFn, depth: int) -> tuple[str, Expression]:
    """An expression of shape [B, K] or [B, 1], with its text."""
    kind = draw(st.sampled_from(["leaf", "unary", "binary", "matmul"])) if depth else "leaf"
    if kind == "leaf":
        name = draw(st.sampled_from(["x", "y"]))
        return name, lambda t: t[name]
    inner, a = draw(expressions(depth - 1))
    if kind == "unary":
        fn = draw(
            st.sampled_from(sorted(UNARY if not EXPONENTIAL.search(inner) else UNARY.keys() - {"exp", "softmax"}))
        )
        return f"{fn}({inner})", lambda t: UNARY[fn](a(t))
    if kind == "matmul":
        name = draw(st.sampled_from(["w", "u"]))
        return f"({inner}) @ {name}", lambda t: (a(t) + t["g"]) @ t[name]
    other, b = draw(expressions(depth - 1))
    fn = draw(st.sampled_from(sorted(BINARY)))
    return f"{fn}({inner}, {other})", lambda t: BINARY[fn](a(t), b(t))


@st.composite
def programs(draw: st.DrawFn, depth: int = 3, outputs: int = 2) -> Program:
    """A program of one or more outputs; its name tells what it computes."""
    chosen = draw(st.lists(expressions(depth), min_size=1, max_size=outputs))

    def fn(x: Tensor, y: Tensor, g: Tensor, w: Tensor, u: Tensor) -> Any:
        arguments = {"x": x, "y": y, "g": g, "w": w, "u": u}
        return [e(arguments) for _, e in chosen]

    return trace(fn, SPECS, "; ".join(text for text, _ in chosen))
