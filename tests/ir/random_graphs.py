"""Random graphs for round trips: every operator, every clause, strange names.  Well formed for the printer, which
needs one meaning for each axis name in a scope; otherwise anything goes.

A graph is drawn from one seed: hypothesis needs seconds to draw a value of this depth part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Any

from hypothesis import strategies as st

from mugraph.ir import ops
from mugraph.ir.axes import Axis, Dim, over, times
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Pass,
    Program,
    Split,
    Step,
    Store,
    Thread,
    ThreadGraph,
)
from mugraph.ir.types import Dims, DType, Input, Output, Storage, Tensor

B, N = Dim("B", 2, 4096), Dim("N")
SIZES = (1, 4, 4096, B, N, times(B, N), times(times(B, B), 3), over(B, 2), over(over(times(N, 3), 2), B))
WORDS = ("x", "load", "store", "thread", "max", "output", "as", "rescaled", "a.b", "1", "two words", 'q"', "#", "é", "")
LETTERS = 'ab._-1 "\\#:=,([{|\n\u2028é∑\x00'
PARTS: Any = ("grid", "warp", "lane", "register")


class Draw:
    """Draws parts of graphs from a source of randomness."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.one = random.choice

    def many(self, item: Callable[[], Any], most: int, least: int = 0) -> tuple[Any, ...]:
        return tuple(item() for _ in range(self.random.randint(least, most)))

    def maybe(self, item: Callable[[], Any]) -> Any:
        return item() if self.random.random() < 0.5 else None

    def name(self) -> str:
        if self.random.random() < 0.5:
            return self.one(WORDS)
        return "".join(self.many(lambda: self.one(LETTERS), 4))

    def dtype(self) -> DType:
        return self.one(list(DType))

    def number(self) -> int:
        return self.random.randint(1, 128)

    def fraction(self) -> Fraction:
        return Fraction(self.random.randint(-(10**6), 10**6), self.random.randint(1, 10**6))

    def axes(self, prefix: str) -> list[Axis]:
        """Axes of one scope; prefixed, so that an inner scope does not take a name with another meaning."""
        return [Axis(prefix + name, self.one(SIZES)) for name in {self.name() for _ in range(5)}]

    def dims(self, axes: list[Axis]) -> Dims:
        """Dimensions from some of the axes, each used once at most, some of them joined, some without an axis."""
        rest = self.random.sample(axes, self.random.randint(0, len(axes)))
        found: list[tuple[Axis, ...]] = []
        while rest or self.random.random() < 0.2:
            cut = self.random.randint(0, 2)
            found.append(tuple(rest[:cut]))
            rest = rest[cut:]
        return tuple(found)

    def tensor(self, axes: list[Axis]) -> Tensor:
        return Tensor(self.name(), self.dims(axes), self.dtype())

    def storage(self) -> Storage:
        strides = self.maybe(lambda: self.many(lambda: self.one(SIZES), 3))
        return Storage(self.dtype(), self.one((1, 2)), strides, self.one((1, 16)), self.one((16, 4)))

    def op(self, axes: list[Axis]) -> ops.Op:
        def axis() -> Axis:
            return self.one(axes)

        def name() -> str:
            return axis().name

        def attribute() -> tuple[str, str | Fraction]:
            return self.name(), self.one((self.fraction, self.name))()

        makers: list[Callable[[], ops.Op]] = [
            lambda: ops.Elementwise(self.one(list(ops.FUNCTIONS)), self.many(attribute, 2)),
            lambda: ops.Compare(self.one(("eq", "ne", "lt", "le", "gt", "ge"))),
            ops.Select,
            ops.MaskedExp,
            lambda: ops.Iota(axis()),
            lambda: ops.Contract(self.many(name, 3)),
            lambda: ops.Reduce(self.one(("sum", "mean", "max", "min")), self.many(name, 3)),
            lambda: ops.CumSum(name()),
            lambda: ops.TopK(name(), axis()),
            lambda: ops.Cast(self.dtype()),
            lambda: ops.Quantize(self.dtype()),
            lambda: ops.Unpack(name(), axis(), self.dtype()),
            lambda: ops.Pack(name(), axis(), self.dtype()),
            lambda: ops.Reshape(self.dims(axes)),
            ops.Transpose,
            lambda: ops.Broadcast(self.many(axis, 2)),
            lambda: ops.Slice(name(), axis(), self.random.randint(0, 9), self.random.randint(1, 3)),
            lambda: ops.Concat(self.many(name, 3, 1), axis()),
            lambda: ops.Rename(self.many(lambda: (name(), axis()), 2)),
            lambda: ops.Gather(name()),
            lambda: ops.Scatter(self.many(name, 2, 1), axis(), self.one(("sum", "write"))),
        ]
        return self.one(makers)()

    def equation(self, axes: list[Axis], most: int = 2) -> Equation:
        targets = self.many(lambda: self.tensor(axes), most, 1)
        if self.random.random() < 0.2:
            leaf = self.one((ops.Const(self.fraction(), self.dtype()), ops.SizeOf(self.one(axes), self.dtype())))
            return Equation(targets, leaf, ())
        return Equation(targets, self.op(axes), self.many(self.name, 3))

    def step(self, axes: list[Axis]) -> Step:
        match self.random.randint(0, 3):
            case 0:
                return Accumulator(self.equation(axes, 1), self.one(("sum", "max", "min")))
            case 1:
                return Accumulator(self.equation(axes, 1), "rescaled", self.name())
            case 2:
                parts = self.many(lambda: (self.one(axes).name, self.one(PARTS)), 2)
                equations = self.many(lambda: self.equation(axes), 2)
                return Thread(ThreadGraph(self.many(self.name, 2), parts, equations, self.many(self.name, 2)))
            case _:
                return self.equation(axes)

    def block(self, outer: list[Axis], depth: int = 0) -> BlockGraph:
        axes = outer + self.axes(f"inner{depth} ")

        def tiles(most: int) -> tuple[Any, ...]:
            return self.many(lambda: (self.one(axes).name, self.number()), most)

        def loads() -> tuple[Any, ...]:
            return self.many(lambda: Load(self.tensor(axes), self.name()), 2)

        def steps() -> tuple[Any, ...]:
            return self.many(lambda: self.step(axes), 3)

        return BlockGraph(
            tiles(3),
            self.maybe(lambda: Split(self.one(axes).name, self.number())),
            self.many(lambda: Pass(tiles(2), loads(), steps()), 2),
            loads(),
            steps(),
            self.many(lambda: Store(self.name(), self.name(), self.one(("write", "partial", "atomic"))), 2),
            self.maybe(lambda: self.block(axes, 1)) if depth == 0 else None,
        )

    def program(self, depth: int = 0) -> Program:
        axes = self.axes("")

        def call() -> Equation:
            kernel = ops.Kernel(self.many(lambda: self.block(axes), 2))
            op = self.one((kernel, ops.Library(self.name(), self.program(1))))
            return Equation(self.many(lambda: self.tensor(axes), 2, 1), op, self.many(self.name, 2))

        kind = self.one((Program, KernelGraph))
        return kind(
            self.name(),
            self.many(
                lambda: Input(self.tensor(axes), self.storage(), self.one((True, False)), self.many(self.name, 2)),
                3,
            ),
            self.many(lambda: self.equation(axes), 4) + (self.many(call, 2) if depth == 0 else ()),
            self.many(lambda: Output(self.name(), self.storage(), self.maybe(self.name)), 2),
        )


def programs() -> st.SearchStrategy[Program]:
    return st.integers(0, 2**32).map(lambda seed: Draw(Random(seed)).program())
