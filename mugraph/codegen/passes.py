"""Passes from block graph to block graph: the forms that a plan is made of.

Each pass keeps what the block graph computes, so tests evaluate before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mugraph.errors import UnsupportedOpError
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, Pass, Step, Thread
from mugraph.ir.infer import infer, op_text, type_of
from mugraph.ir.ops import Contract, Elementwise, Op, Reduce, SizeOf
from mugraph.ir.types import DType, Tensor, tensor

Observer = Callable[[str, BlockGraph], None]


@dataclass
class Names:
    """Block-level values by name, and fresh names among them."""

    values: dict[str, Tensor]
    taken: set[str] = field(default_factory=set)

    def fresh(self, wish: str) -> str:
        name, i = wish, 1
        while name in self.values or name in self.taken:
            name, i = f"{wish}_{i}", i + 1
        self.taken.add(name)
        return name

    def equation(self, wish: str, op: Op, *args: str) -> Equation:
        """`fresh = op(args)` with its inferred type; block-level floats are f32."""
        (t,) = infer(op, [type_of(self.values[a]) for a in args])
        name = self.fresh(wish)
        self.values[name] = tensor(name, t.axes, DType.f32 if t.dtype.is_float else t.dtype)
        return Equation((self.values[name],), op, args)


def names_of(block: BlockGraph) -> Names:
    return Names(block.tensors())


def map_steps(block: BlockGraph, f: Callable[[Step], Iterator[Step]]) -> BlockGraph:
    """The block graph with each step replaced by those that f gives, the combine's excluded."""

    def each(steps: Sequence[Step]) -> tuple[Step, ...]:
        return tuple(new for step in steps for new in f(step))

    passes = tuple(Pass(p.loops, p.loads, each(p.body)) for p in block.passes)
    return replace(block, passes=passes, epilogue=each(block.epilogue))


def flatten_threads(block: BlockGraph) -> BlockGraph:
    """`thread(...)` -> its equations: a target whose compiler assigns registers has no use for thread graphs."""

    def flat(step: Step) -> Iterator[Step]:
        if isinstance(step, Thread):
            yield from step.graph.equations
        else:
            yield step

    return map_steps(block, flat)


def expand_means(block: BlockGraph) -> BlockGraph:
    """`mean[k] x` -> `(sum[k] x) / |k|`, with the true size."""
    names = names_of(block)

    def expand(step: Step) -> Iterator[Step]:
        equation = step.equation if isinstance(step, Accumulator) else step
        if not (isinstance(equation, Equation) and isinstance(equation.op, Reduce) and equation.op.kind == "mean"):
            yield step
            return
        if isinstance(step, Accumulator):
            raise UnsupportedOpError("a mean cannot be accumulated tile by tile", op="mean", remedy="accumulate a sum")
        axes = {a.name: a for a in names.values[equation.args[0]].axes}
        name = equation.target.name
        total = names.equation(f"{name}_sum", Reduce("sum", equation.op.axes), *equation.args)
        yield total
        last = total.target.name
        for i, axis in enumerate(equation.op.axes):
            size = names.equation(f"{axis}_size", SizeOf(axes[axis]))
            yield size
            if i < len(equation.op.axes) - 1:
                part = names.equation(f"{name}_part", Elementwise("div"), last, size.target.name)
                yield part
                last = part.target.name
            else:
                yield Equation(equation.targets, Elementwise("div"), (last, size.target.name), equation.where)

    return map_steps(block, expand)


def pair_contractions(block: BlockGraph) -> BlockGraph:
    """Contractions with at most two operands, each summed axis in both.

    An axis that one operand alone has is summed there first (a sum is linear); a third operand is multiplied into one
    that has all its axes, or into the one that it shares most with.  One operand left: a plain sum.
    """
    names = names_of(block)

    def pair(step: Step) -> Iterator[Step]:
        equation = step.equation if isinstance(step, Accumulator) else step
        if not (isinstance(equation, Equation) and isinstance(equation.op, Contract)):
            yield step
            return
        *extra, last = _paired(equation, names)
        yield from extra
        yield replace(step, equation=last) if isinstance(step, Accumulator) else last

    return map_steps(block, pair)


def _paired(equation: Equation, names: Names) -> Iterator[Equation]:
    assert isinstance(equation.op, Contract)
    args, closed = list(equation.args), list(equation.op.axes)
    name = equation.target.name

    def axes(arg: str) -> set[str]:
        return {a.name for a in names.values[arg].axes}

    if len(args) > 1:
        for i, arg in enumerate(args):
            others = set().union(*(axes(a) for j, a in enumerate(args) if j != i))
            if own := tuple(a for a in closed if a in axes(arg) and a not in others):
                early = names.equation(f"{name}_{arg}", Reduce("sum", own), arg)
                yield early
                args[i] = early.target.name
                closed = [a for a in closed if a not in own]
    while len(args) > 2:
        i, j = min(
            ((i, j) for i in range(len(args)) for j in range(len(args)) if i != j),
            key=lambda ij: (len(axes(args[ij[0]]) | axes(args[ij[1]])) - len(axes(args[ij[1]])), ij),
        )
        product = names.equation(f"{name}_{args[i]}", Elementwise("mul"), args[j], args[i])
        yield product
        args = [product.target.name if n == j else a for n, a in enumerate(args) if n != i]
    if not closed:
        # every sum was taken early: what is left is a product
        op: Op = Elementwise("mul")
    elif len(args) == 1:
        op = Reduce("sum", tuple(closed))
    else:
        op = Contract(tuple(closed))
    yield Equation(equation.targets, op, tuple(args), equation.where)


PASSES: tuple[tuple[str, Callable[[BlockGraph], BlockGraph]], ...] = (
    ("flatten_threads", flatten_threads),
    ("expand_means", expand_means),
    ("pair_contractions", pair_contractions),
)


def prepare(block: BlockGraph, observer: Observer | None = None) -> BlockGraph:
    """The block graph after all passes; `observer(pass name, result)` is called after each."""
    for name, transform in PASSES:
        block = transform(block)
        if observer:
            observer(name, block)
    return block


def refuse(op: Op, why: str, equation: Equation | None = None) -> UnsupportedOpError:
    """The error for an operator that no Triton statement is known for."""
    where = equation.where if equation else None
    return UnsupportedOpError(f"{op_text(op)}: {why}", op=op_text(op), where=where, remedy="keep it outside the kernel")
