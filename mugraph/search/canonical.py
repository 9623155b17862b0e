"""The program under names that depend only on its equations, so that a search gives the same result whatever names,
order of inputs and order of commutative operands the user chose."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mugraph.ir.axes import Axis, Dim, Monomial, Size
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import COMMUTATIVE, Contract, Elementwise, PureOp, Rename
from mugraph.ir.types import Tensor


def bases(program: Program) -> dict[str, str]:
    """One axis for all that are aliases of each other, the oldest."""
    above = {a: a for a in program.axes()}

    def top(a: str) -> str:
        while above.setdefault(a, a) != a:
            a = above[a]
        return a

    for e in program.equations:
        if isinstance(e.op, Rename):
            for old, new in e.op.axes:
                above[top(new.name)] = top(old)
    return {a: top(a) for a in above}


@dataclass(frozen=True)
class Canonical:
    """The renamed program, and the way back: canonical axis name -> axis, canonical value name -> name."""

    program: Program
    axes: Mapping[str, Axis]
    names: Mapping[str, str]


def canonical(program: Program) -> Canonical:
    """Inputs and values named in order of their first use in the equations, commutative operands in the order of their
    colours.  The axes of outputs come first, in their order, so that the order of blocks does not depend on how the
    program is associated; others by first use.  Aliases of an axis have its name, "_" and a number.  Unused inputs are
    dropped."""
    program = ordered(program)
    tensors = program.tensors()
    used = dict.fromkeys([n for e in program.equations for n in (*e.args, *(t.name for t in e.targets))])
    used.update(dict.fromkeys(o.value for o in program.outputs))
    names = {name: f"v{i:04d}" for i, name in enumerate(used)}
    axes: dict[str, Axis] = {}
    base, groups = bases(program), dict[str, list[str]]()
    brought = [a for e in program.equations for a in _op_axes(e.op)]
    first = [a for o in program.outputs for a in tensors[o.value].axes]
    for a in [*first, *(a for name in used for a in tensors[name].axes), *brought]:
        if a.name not in axes:
            group = groups.setdefault(base.get(a.name, a.name), [f"a{len(groups):04d}"])
            axes[a.name] = Axis(group[-1], a.size)
            group.append(f"{group[0]}_{len(group)}")
    originals = program.axes() | {a.name: a for e in program.equations for a in _op_axes(e.op)}

    def of_tensor(t: Tensor) -> Tensor:
        return Tensor(names[t.name], tuple(tuple(axes[a.name] for a in d) for d in t.dims), t.dtype)

    inputs = sorted((i for i in program.inputs if i.name in names), key=lambda i: names[i.name])
    renamed = Program(
        "canonical",
        tuple(replace(i, tensor=of_tensor(i.tensor)) for i in inputs),
        tuple(
            Equation(tuple(map(of_tensor, e.targets)), renamed_op(e.op, axes), tuple(names[a] for a in e.args), e.where)
            for e in program.equations
        ),
        tuple(replace(o, value=names[o.value], alias_of=None) for o in program.outputs),
    )
    back = {new: old for old, new in names.items()}
    return Canonical(renamed, {axes[a].name: originals[a] for a in axes}, back)


ROUNDS = 4


def is_commutative(op: Any) -> bool:
    """Whether the operands may change places."""
    return isinstance(op, Contract) or (isinstance(op, Elementwise) and op.fn in COMMUTATIVE)


def ordered(program: Program) -> Program:
    """The program with commutative operands in the order of their colours."""
    shade = colours(program)

    def one(e: Equation) -> Equation:
        return replace(e, args=tuple(sorted(e.args, key=shade.__getitem__))) if is_commutative(e.op) else e

    return replace(program, equations=tuple(map(one, program.equations)))


def colours(program: Program) -> dict[str, str]:
    """For each value what it is made of and used for, as a digest without names: colour refinement (Weisfeiler and
    Leman, 1968) over values and axes.  Operands of one colour are interchangeable, or too alike to be told apart in a
    few rounds."""
    tensors = program.tensors()
    axes = program.axes() | {a.name: a for e in program.equations for a in _op_axes(e.op)}
    of_axis = {a: _digest(_nameless(axis.size)) for a, axis in axes.items()}
    given = {i.name: _digest(i.constant, str(i.tensor.dtype)) for i in program.inputs}
    colours: dict[str, str] = {}
    count = 0
    for _ in range(ROUNDS):
        colours = {name: _digest(c, _shape(tensors[name], of_axis)) for name, c in given.items()}
        for e in program.equations:
            args = [colours[a] for a in e.args]
            made = _digest(_op_key(e.op, of_axis), sorted(args) if is_commutative(e.op) else args)
            colours.update((t.name, _digest(made, i, _shape(t, of_axis))) for i, t in enumerate(e.targets))
        if len(set(colours.values())) + len(set(of_axis.values())) == count:
            break
        count = len(set(colours.values())) + len(set(of_axis.values()))
        uses: dict[str, list[str]] = {name: [] for name in tensors}
        for e in reversed(program.equations):
            made = _digest([(colours[t.name], sorted(uses[t.name])) for t in e.targets])
            for i, a in enumerate(e.args):
                uses[a].append(_digest(made, 0 if is_commutative(e.op) else i))
        for i, o in enumerate(program.outputs):
            uses[o.value].append(_digest("output", i))
        given = {name: _digest(colours[name], sorted(uses[name])) for name in given}
        holders: dict[str, list[str]] = {a: [] for a in axes}
        for name, t in tensors.items():
            for i, d in enumerate(t.dims):
                for j, axis in enumerate(d):
                    holders[axis.name].append(_digest(colours[name], sorted(uses[name]), i, j))
        of_axis = {a: _digest(c, sorted(holders[a])) for a, c in of_axis.items()}
    return colours


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _nameless(size: Size) -> object:
    match size:
        case int():
            return size
        case Dim(_, low, high):
            return low, high
        case Monomial(coefficient, powers):
            return coefficient, sorted((d.min, d.max, p) for d, p in powers)


def _shape(t: Tensor, of_axis: Mapping[str, str]) -> list[list[str]]:
    return [[of_axis[a.name] for a in d] for d in t.dims]


def _op_key(op: Any, of_axis: Mapping[str, str]) -> object:
    """The operator with colours for its axes."""

    def key(value: Any, named: bool) -> object:
        if isinstance(value, Axis):
            return of_axis[value.name]
        if isinstance(value, tuple):
            return [key(x, named) for x in value]
        return of_axis[value] if named and isinstance(value, str) else value

    return type(op).__name__, [key(getattr(op, f.name), f.name in ("axis", "axes")) for f in fields(op)]


def _op_axes(op: Any) -> list[Axis]:
    """The axes that an operator brings itself (a counter, a new axis of a view)."""
    return [a for f in fields(op) for a in _axes_in(getattr(op, f.name))]


def _axes_in(value: Any) -> list[Axis]:
    if isinstance(value, Axis):
        return [value]
    return [a for x in value for a in _axes_in(x)] if isinstance(value, tuple) else []


def renamed_op(op: Any, axes: Mapping[str, Axis]) -> PureOp:
    """The operator with its axes renamed: Axis values, and the axis names in fields called `axis` and `axes`."""

    def rename(value: Any, named: bool) -> Any:
        if isinstance(value, Axis):
            return axes[value.name]
        if isinstance(value, tuple):
            return tuple(rename(x, named) for x in value)
        return axes[value].name if named and isinstance(value, str) else value

    changes = {f.name: rename(getattr(op, f.name), f.name in ("axis", "axes")) for f in fields(op)}
    result: PureOp = replace(op, **changes)
    return result
