"""What the corpora are made of, and the judgement by float64 that is independent of the verifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.programs import FAMILIES
from mugraph.errors import MugraphError
from mugraph.ir.check import check
from mugraph.ir.evaluate import FloatAlgebra, Named, outputs
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.infer import infer, op_text, type_of
from mugraph.ir.ops import Op, PureOp, Slice
from mugraph.ir.types import DType, Tensor, tensor
from mugraph.verify.equivalence import verify
from mugraph.verify.sizes import Draw, draws


@dataclass(frozen=True)
class Pair:
    """`kind` is the mutation, or the laws; `generator` with `seed` makes the pair again."""

    name: str
    kind: str
    program: Program
    graph: KernelGraph
    generator: str
    seed: int


@dataclass(frozen=True)
class Spec:
    """An equation before its types are known."""

    name: str
    op: Op
    args: tuple[str, ...]


def sources() -> dict[str, Program]:
    """The programs of all benchmarks, one for each of those that differ in more than sizes."""
    found: dict[str, Program] = {}
    seen: set[tuple[object, ...]] = set()
    for name, family in FAMILIES.items():
        for variant, program in family.variants.items():
            ops = tuple((op_text(e.op), e.args) for e in program.equations)
            if ops not in seen:
                seen.add(ops)
                found[name if name not in found else f"{name}, {variant}"] = program
    return found


def rebuilt(program: Program, changed: Mapping[int, Sequence[Spec]], name: str = "g") -> KernelGraph | None:
    """The program as a μGraph with some equations replaced, types inferred anew.  The last of the new equations takes
    the name of the one that it replaces.  None where the types no longer fit."""
    values = {i.name: i.tensor for i in program.inputs}
    equations: list[Equation] = []

    def add(targets: Sequence[Tensor | str], op: Op, args: tuple[str, ...]) -> None:
        made = []
        for t, found in zip(targets, infer(op, [type_of(values[a]) for a in args]), strict=True):
            if isinstance(t, Tensor) and set(t.axes) == set(found.axes):
                made.append(replace(t, dtype=found.dtype))
            else:
                made.append(tensor(t.name if isinstance(t, Tensor) else t, found.axes, found.dtype))
            values[made[-1].name] = made[-1]
        equations.append(Equation(tuple(made), op, args))

    try:
        for i, e in enumerate(program.equations):
            if i not in changed:
                add(e.targets, e.op, e.args)
                continue
            *before, last = changed[i]
            for spec in before:
                add([spec.name], spec.op, spec.args)
            add(e.targets, last.op, last.args)
        graph = KernelGraph(name, program.inputs, tuple(equations), program.outputs)
        check(graph)
    except (MugraphError, StopIteration, KeyError):
        return None
    declared, found = program.tensors(), graph.tensors()
    same = all(declared[o.value].dims == found[o.value].dims for o in program.outputs)
    return graph if same and all(declared[o.value].dtype is found[o.value].dtype for o in program.outputs) else None


# -- float64


class _Float(FloatAlgebra):
    """At the sizes of a draw."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw.sizes, draw.tiles, draw.parts)
        self.starts = draw.starts

    def apply(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        if isinstance(op, Slice):
            op = replace(op, start=self.starts.get((op.axis, op.start), op.start))
        return super().apply(op, args)


def _inputs(program: Program, draw: Draw, seed: int, positive: bool) -> dict[str, Named]:
    rng = np.random.default_rng(seed)
    found = {}
    for i in program.inputs:
        shape = [draw.sizes[a.name] for a in i.tensor.axes]
        values: Any = rng.normal(size=shape)
        if positive:
            values = np.abs(values) + 0.1
        if i.tensor.dtype is DType.bool:
            values = values > 0
        elif not i.tensor.dtype.is_float:
            values = rng.integers(0, 4, size=shape)
        found[i.name] = Named(tuple(a.name for a in i.tensor.axes), (values,))
    return found


def agree_in_float64(program: Program, graph: KernelGraph, draw: Draw, seed: int) -> bool | None:
    """Whether both give the same numbers; None where the program gives none."""
    for positive in (False, True):
        inputs = _inputs(program, draw, seed, positive)
        wanted, given = [], []
        for side, found in ((program, wanted), (graph, given)):
            algebra = _Float(draw)
            tensors = side.tensors()
            with np.errstate(all="ignore"):
                values = outputs(side, inputs, algebra)
            for o, v in zip(side.outputs, values, strict=True):
                axes = [a.name for a in tensors[o.value].axes]
                whole = algebra.expanded(v, axes)
                part = whole.parts[0]
                assert part is not None
                found.append(np.transpose(part, [whole.axes.index(a) for a in axes]).astype(float))
        if all(np.isfinite(w).all() for w in wanted):
            return all(np.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(wanted, given, strict=True))
    return None


def judged(program: Program, graph: KernelGraph, seed: int = 0) -> bool | None:
    """Whether program and graph agree in float64 on two draws of sizes; None where that cannot be said."""
    try:
        found = [agree_in_float64(program, graph, d, seed + i) for i, d in enumerate(draws(program, graph))]
    except (MugraphError, ValueError, IndexError, KeyError):
        return None
    return None if None in found else all(found)


def accepted(pair: Pair) -> bool:
    """Whether the verifier takes the pair for equal."""
    try:
        verify(pair.program, pair.graph)
    except MugraphError:
        return False
    return True
