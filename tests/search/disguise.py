"""The same program in other words: inputs permuted, everything renamed, operands of sums and products swapped."""

from dataclasses import fields, replace
from random import Random
from typing import Any

from mugraph.ir.axes import Axis, Dim, Monomial, Size
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Contract, Elementwise, Op
from mugraph.ir.types import Tensor

COMMUTATIVE = ("add", "mul", "max", "min")


class Disguise:
    """New names, handed out in a random order so that no alphabetical order survives."""

    def __init__(self, program: Program, seed: int) -> None:
        self.random = Random(seed)
        self.values = self._names("val", program.tensors())
        self.dims = self._names("D", [d.name for d in program.dims()])
        axes = {a.name: a for a in program.axes().values()}
        for e in program.equations:
            axes.update((a.name, a) for f in fields(e.op) for a in _axes_in(getattr(e.op, f.name)))
        self.axes = self._names("ax", axes)

    def _names(self, prefix: str, old: Any) -> dict[str, str]:
        numbers = list(range(10, 10 + len(old)))
        self.random.shuffle(numbers)
        return {name: f"{prefix}{n}" for name, n in zip(old, numbers, strict=True)}

    def size(self, size: Size) -> Size:
        match size:
            case int():
                return size
            case Dim(name, low, high):
                return Dim(self.dims[name], low, high)
            case Monomial(coefficient, powers):
                moved = tuple(sorted((Dim(self.dims[d.name], d.min, d.max), p) for d, p in powers))
                return Monomial(coefficient, moved)

    def axis(self, a: Axis) -> Axis:
        return Axis(self.axes[a.name], self.size(a.size))

    def tensor(self, t: Tensor) -> Tensor:
        return Tensor(self.values[t.name], tuple(tuple(map(self.axis, d)) for d in t.dims), t.dtype)

    def op(self, op: Op) -> Op:
        def moved(value: Any, named: bool) -> Any:
            if isinstance(value, Axis):
                return self.axis(value)
            if isinstance(value, tuple):
                return tuple(moved(x, named) for x in value)
            return self.axes[value] if named and isinstance(value, str) else value

        changed: Op = replace(
            op, **{f.name: moved(getattr(op, f.name), f.name in ("axis", "axes")) for f in fields(op)}
        )
        return changed

    def equation(self, e: Equation) -> Equation:
        args = [self.values[a] for a in e.args]
        swaps = isinstance(e.op, Contract) or (isinstance(e.op, Elementwise) and e.op.fn in COMMUTATIVE)
        if swaps and self.random.random() < 0.7:
            args.reverse()
        return Equation(tuple(map(self.tensor, e.targets)), self.op(e.op), tuple(args))

    def program(self, p: Program) -> Program:
        inputs = [replace(i, tensor=self.tensor(i.tensor)) for i in p.inputs]
        self.random.shuffle(inputs)
        outputs = tuple(replace(o, value=self.values[o.value]) for o in p.outputs)
        return Program("disguised", tuple(inputs), tuple(map(self.equation, p.equations)), outputs)


def _axes_in(value: Any) -> list[Axis]:
    if isinstance(value, Axis):
        return [value]
    return [a for x in value for a in _axes_in(x)] if isinstance(value, tuple) else []


def disguised(program: Program, seed: int) -> Program:
    return Disguise(program, seed).program(program)
