"""The program under names that depend only on its equations, so that a search gives the same result whatever names
and whatever order of inputs the user chose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from mugraph.ir.axes import Axis
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import PureOp
from mugraph.ir.types import Tensor


@dataclass(frozen=True)
class Canonical:
    """The renamed program, and the way back: canonical axis name -> axis, canonical value name -> name."""

    program: Program
    axes: Mapping[str, Axis]
    names: Mapping[str, str]


def canonical(program: Program) -> Canonical:
    """Inputs, values and axes named in order of their first use in the equations.  Unused inputs are dropped."""
    tensors = program.tensors()
    used = dict.fromkeys([n for e in program.equations for n in (*e.args, *(t.name for t in e.targets))])
    used.update(dict.fromkeys(o.value for o in program.outputs))
    names = {name: f"v{i:04d}" for i, name in enumerate(used)}
    axes: dict[str, Axis] = {}
    for name in used:
        for a in tensors[name].axes:
            axes.setdefault(a.name, Axis(f"a{len(axes):04d}", a.size))
    for a in (a for e in program.equations for a in _op_axes(e.op)):
        axes.setdefault(a.name, Axis(f"a{len(axes):04d}", a.size))
    originals = program.axes() | {a.name: a for e in program.equations for a in _op_axes(e.op)}

    def of_tensor(t: Tensor) -> Tensor:
        return Tensor(names[t.name], tuple(tuple(axes[a.name] for a in d) for d in t.dims), t.dtype)

    inputs = sorted((i for i in program.inputs if i.name in names), key=lambda i: names[i.name])
    renamed = Program(
        "canonical",
        tuple(replace(i, tensor=of_tensor(i.tensor)) for i in inputs),
        tuple(
            Equation(
                tuple(map(of_tensor, e.targets)), _renamed_op(e.op, axes), tuple(names[a] for a in e.args), e.where
            )
            for e in program.equations
        ),
        tuple(replace(o, value=names[o.value], alias_of=None) for o in program.outputs),
    )
    back = {new: old for old, new in names.items()}
    return Canonical(renamed, {axes[a].name: originals[a] for a in axes}, back)


def _op_axes(op: Any) -> list[Axis]:
    """The axes that an operator brings itself (a counter, a new axis of a view)."""
    return [a for f in fields(op) for a in _axes_in(getattr(op, f.name))]


def _axes_in(value: Any) -> list[Axis]:
    if isinstance(value, Axis):
        return [value]
    return [a for x in value for a in _axes_in(x)] if isinstance(value, tuple) else []


def _renamed_op(op: Any, axes: Mapping[str, Axis]) -> PureOp:
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
