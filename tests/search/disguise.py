"""The same program in other words: inputs permuted, everything renamed, operands of sums and products swapped."""

from collections import Counter
from dataclasses import fields, replace
from random import Random
from typing import Any

from mugraph.ir.axes import Axis, Dim, Monomial, Size
from mugraph.ir.graph import Equation, Program
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import Contract, Elementwise, Op
from mugraph.ir.types import Tensor, tensor

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


# -- the same program associated otherwise


def reassociated(program: Program, seed: int) -> Program:
    """(a + b) + c as a + (b + c), the same for ·, and (a b) c as a (b c) for contractions, in places chosen at random;
    the program itself where there is none."""
    random = Random(seed)
    for _ in range(3):
        if places := _places(program):
            program = _reassociated(program, *random.choice(places))
    return program


def _places(p: Program) -> list[tuple[Equation, Equation]]:
    """(inner, outer): the inner value is used once, by the outer equation, and both are one associative operator."""
    uses = Counter([a for e in p.equations for a in e.args] + [o.value for o in p.outputs])
    made = {e.target.name: e for e in p.equations if len(e.targets) == 1}
    found = []
    for outer in p.equations:
        for a in outer.args:
            inner = made.get(a)
            if inner and uses[a] == 1 and len(inner.args) == len(outer.args) == 2 and _associate(p, inner, outer):
                found.append((inner, outer))
    return found


def _associate(p: Program, inner: Equation, outer: Equation) -> bool:
    match inner.op, outer.op:
        case Elementwise(f), Elementwise(g):
            return f == g and f in COMMUTATIVE
        case Contract(first), Contract(second):
            tensors = p.tensors()
            other = {a.name for a in tensors[_other(outer, inner)].axes}
            left, right = ({a.name for a in tensors[n].axes} for n in inner.args)
            return not set(first) & other and bool(set(second) & right) and not set(second) & left
    return False


def _other(outer: Equation, inner: Equation) -> str:
    a, b = outer.args
    return b if a == inner.target.name else a


def _reassociated(p: Program, inner: Equation, outer: Equation) -> Program:
    """inner = a ∘ b, outer = inner ∘ c  ->  inner = b ∘ c, outer = a ∘ inner; the steps between come first."""
    tensors = p.tensors()
    (a, b), c = inner.args, _other(outer, inner)
    (made,) = infer(outer.op, [type_of(tensors[n]) for n in (b, c)])
    middle = tensor(inner.target.name, made.axes, made.dtype)
    equations: list[Equation] = []
    for e in p.equations:
        if e is outer:
            equations.append(Equation((middle,), outer.op, (b, c)))
            equations.append(Equation(outer.targets, inner.op, (a, middle.name)))
        elif e is not inner:
            equations.append(e)
    return replace(p, equations=tuple(equations))
