"""Thread graphs: what stays in registers.

    form_threads(block)      each maximal run of elementwise steps -> one thread graph
    flatten_threads(block)   the inverse

Before → after, in an epilogue:

    ms: f32[b] = div(ss, k_size)              thread(ss, k_size, acc) -> (y) over b: lane, n: register
    root: f32[b] = sqrt(ms)                     ms: f32[b] = div(ss, k_size)
    y: f32[b, n] = div(acc, root)               ...

A run ends at a contraction, a reduction or an accumulator, where threads exchange values.  The order of steps stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from mugraph.ir.graph import Accumulator, BlockGraph, Equation, Part, Step, Thread, ThreadGraph, equations_of
from mugraph.ir.ops import POINTWISE
from mugraph.ir.types import Tensor


def form_threads(block: BlockGraph) -> BlockGraph:
    """The block graph with its elementwise steps gathered into thread graphs; its meaning is the same.

    Grid axes with tile 1 belong to the grid; of the others the innermost is laid over lanes, the next over warps, the
    rest over registers.
    """
    flat = flatten_threads(block)
    uses = [a for e in equations_of(tuple(flat.steps())) for a in e.args] + [s.value for s in flat.stores]
    count = {name: uses.count(name) for name in uses}

    def gather(body: Sequence[Step]) -> tuple[Step, ...]:
        found: list[Step] = []
        for elementwise, run in groupby(body, key=_is_elementwise):
            steps = list(run)
            found += [_thread([*equations_of(tuple(steps))], flat, count)] if elementwise else steps
        return tuple(found)

    return replace(
        flat,
        passes=tuple(replace(p, body=gather(p.body)) for p in flat.passes),
        epilogue=gather(flat.epilogue),
        combine=form_threads(flat.combine) if flat.combine else None,
    )


def flatten_threads(block: BlockGraph) -> BlockGraph:
    """The block graph with the equations of its thread graphs as steps of its own."""
    return replace(
        block,
        passes=tuple(replace(p, body=tuple(_flat(p.body))) for p in block.passes),
        epilogue=tuple(_flat(block.epilogue)),
        combine=flatten_threads(block.combine) if block.combine else None,
    )


def _flat(steps: Sequence[Step]) -> Iterator[Step]:
    for step in steps:
        match step:
            case Thread(graph):
                yield from graph.equations
            case Equation() | Accumulator():
                yield step


def _is_elementwise(step: Step) -> bool:
    return isinstance(step, Equation) and isinstance(step.op, POINTWISE)


def _thread(run: Sequence[Equation], block: BlockGraph, uses: dict[str, int]) -> Thread:
    """One thread graph of the run.  A value that is used outside the run is an output."""
    inside = [a for e in run for a in e.args]
    targets = [t for e in run for t in e.targets]
    made = {t.name for t in targets}
    inputs = tuple(dict.fromkeys(a for a in inside if a not in made))
    outputs = tuple(t.name for t in targets if uses.get(t.name, 0) > inside.count(t.name))
    tensors = block.tensors()
    return Thread(
        ThreadGraph(inputs, _parts([tensors[i] for i in inputs if i in tensors] + targets, block), tuple(run), outputs)
    )


def _parts(values: Sequence[Tensor], block: BlockGraph) -> tuple[tuple[str, Part], ...]:
    """Each axis of the values, with where it lies; the widest value gives the order."""
    widest_first = sorted(values, key=lambda t: -len(t.axes))
    axes = list(dict.fromkeys(a.name for t in widest_first for a in t.axes))
    alone = {a for a, tile in block.grid if tile == 1}
    spread: dict[str, Part] = dict(zip([a for a in reversed(axes) if a not in alone], ("lane", "warp"), strict=False))
    return tuple((a, "grid" if a in alone else spread.get(a, "register")) for a in axes)
