"""Gathers that kernels load, and scatters of what they store, become accesses by index.

    g = gather[t](x, i)                      load x: [t', k]; load i: [r]
    y = kernel(g, ...)              ->       g_tile = gather[t'](x, i)              in the kernel, y = kernel(x, i, ...)
      load g_tile: [r, k] = g

    v = kernel(...)                          load i: [r]
      store v_tile -> v             ->       s_tile = scatter[r -> t](v_tile, i)    in the kernel, s = kernel(..., i)
    s = scatter[r -> t](v, i)                store atomic s_tile -> s

A row that is gathered is as contiguous as before, so the load costs no more than that of the copy, which is neither
written nor read.  Where the gathered axis is the innermost, the copy stays.  Scattered sums are added by atomics, in
no fixed order, as PyTorch adds them; floats narrower than f32, whose sum would be rounded by each addition, stay apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mugraph.codegen.passes import Names, names_of
from mugraph.ir.axes import Axis
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Pass, Store
from mugraph.ir.ops import Gather, Kernel, Library, Op, Scatter
from mugraph.ir.types import DType, Tensor


def access_by_index(graph: KernelGraph, kept: Collection[str] = ()) -> KernelGraph:
    """The graph with gathers and scatters inside its kernels, where they can be; its meaning is the same.  The values
    `kept` stay values of the graph."""
    whole = {o.value for o in graph.outputs} | set(kept)
    for e in graph.equations:
        match _single(e):
            case Gather() as op if e.target.name not in whole:
                graph = _gathered(graph, e, op)
            case Scatter(kind="sum") as op if e.args[0] not in whole:
                graph = _scattered(graph, e, op)
            case _:
                pass
    return graph


def _single(e: Equation) -> Op:
    """The operator of an equation, or that which a library call stands for."""
    if not isinstance(e.op, Library) or len(e.op.semantics.equations) != 1:
        return e.op
    inner = e.op.semantics
    (only,) = inner.equations
    same = [i.name for i in inner.inputs] == [*only.args] and [i.tensor for i in inner.inputs] == [
        replace(i.tensor, name=n) for i, n in zip(inner.inputs, e.args, strict=True)
    ]
    return only.op if same and only.target == e.target else e.op


@dataclass(frozen=True)
class _Indexed:
    """A gather at the kernel level: the source and its axis, and the index."""

    source: Tensor
    axis: str
    index: Tensor


# -- loads -------------------------------------------------------------------------------------------------------------


def _gathered(graph: KernelGraph, e: Equation, op: Gather) -> KernelGraph:
    tensors = graph.tensors()
    source, index = (tensors[a] for a in e.args)
    users = [u for u in graph.equations if e.target.name in u.args]
    loads = [ld for u in users for b in _blocks(u) for ld in b.all_loads() if ld.source == e.target.name]
    if (
        not users
        or not all(isinstance(u.op, Kernel) for u in users)
        or any(ld.value.axes != e.target.axes for ld in loads)
        or not op.keeps_rows(source)
    ):
        return graph
    found = _Indexed(source, op.axis, index)
    equations = []
    for u in graph.equations:
        if u is e:
            continue
        if isinstance(u.op, Kernel) and e.target.name in u.args:
            blocks = tuple(_by_index(b, e.target.name, found, graph.axes()) for b in u.op.blocks)
            args = dict.fromkeys(x for a in u.args for x in (e.args if a == e.target.name else (a,)))
            u = replace(u, op=Kernel(blocks), args=tuple(args))
        equations.append(u)
    return replace(graph, equations=tuple(equations))


def _blocks(e: Equation) -> Iterator[BlockGraph]:
    for b in e.op.blocks if isinstance(e.op, Kernel) else ():
        yield b
        if b.combine:
            yield b.combine


def _by_index(block: BlockGraph, name: str, found: _Indexed, axes: Collection[str]) -> BlockGraph:
    """The block graph with its loads of `name` as gathers, along an axis that is none of `axes`."""
    if block.combine:
        block = replace(block, combine=_by_index(block.combine, name, found, axes))
    names = names_of(block)
    names.taken |= {*axes, *(a.name for t in block.tensors().values() for a in t.axes)}

    def replaced(loads: tuple[Load, ...]) -> tuple[tuple[Load, ...], tuple[Equation, ...]]:
        new: tuple[Load, ...] = ()
        steps: list[Equation] = []
        for ld in loads:
            if ld.source != name:
                new = (*new, ld)
                continue
            old = next(a for a in found.source.axes if a.name == found.axis)
            whole = Axis(names.fresh(f"{old.name}_all"), old.size)
            dims = tuple(tuple(whole if a == old else a for a in d) for d in found.source.dims)
            x = Tensor(names.fresh(f"{found.source.name}_tile"), dims, found.source.dtype)
            new = (*new, Load(x, found.source.name))
            at, new = _index(new, found.index, names)
            dtype = DType.f32 if ld.value.dtype.is_float else ld.value.dtype
            steps.append(Equation((replace(ld.value, dtype=dtype),), Gather(whole.name), (x.name, at)))
        return new, tuple(steps)

    passes = []
    for p in block.passes:
        loads, steps = replaced(p.loads)
        passes.append(Pass(p.loops, loads, (*steps, *p.body)))
    loads, steps = replaced(block.loads)
    return replace(block, passes=tuple(passes), loads=loads, epilogue=(*steps, *block.epilogue))


def _index(loads: tuple[Load, ...], index: Tensor, names: Names) -> tuple[str, tuple[Load, ...]]:
    """The name under which the index is loaded, and the loads with one of it."""
    for ld in loads:
        if ld.source == index.name and ld.value.dims == index.dims:
            return ld.value.name, loads
    name = names.fresh(f"{index.name}_tile")
    return name, (*loads, Load(replace(index, name=name), index.name))


# -- stores ------------------------------------------------------------------------------------------------------------


def _scattered(graph: KernelGraph, e: Equation, op: Scatter) -> KernelGraph:
    tensors = graph.tensors()
    value, index = e.args
    makers = [(n, u) for n, u in enumerate(graph.equations) if value in [t.name for t in u.targets]]
    before = {i.name for i in graph.inputs}
    for n, maker in makers:
        before |= {t.name for u in graph.equations[:n] for t in u.targets}
        block = next((b for b in _blocks(maker) for s in b.stores if s.target == value), None)
        users = [u for u in graph.equations if value in u.args]
        if (
            block is None
            or not isinstance(maker.op, Kernel)
            or users != [e]
            or index not in before
            or tensors[value].dtype not in (DType.f32, DType.i32)
            or (new := _added(block, e, op, tensors[index])) is None
        ):
            return graph
        blocks = tuple(new if b is block else b for b in maker.op.blocks)
        targets = tuple(e.target if t.name == value else t for t in maker.targets)
        args = tuple(dict.fromkeys((*maker.args, index)))
        merged = replace(maker, op=Kernel(blocks), targets=targets, args=args)
        equations = tuple(merged if u is maker else u for u in graph.equations if u is not e)
        return replace(graph, equations=equations)
    return graph


def _added(block: BlockGraph, e: Equation, op: Scatter, index: Tensor) -> BlockGraph | None:
    """The block graph with what it stores added at indices; None where it is no plain store of a finished value."""
    store = next(s for s in block.stores if s.target == e.args[0])
    tensors = block.tensors()
    dying = {t.name for p in block.passes if p.loops for s in p.body for t in _made(s)}
    alive = {a.target.name for p in block.passes for a in p.accumulators}
    known = {a.name for t in tensors.values() for a in t.axes}
    if (
        store.kind != "write"
        or block.split
        or block.combine
        or (store.value in dying and store.value not in alive)
        or op.out.name in known
        or not set(op.axes) <= {a.name for a in tensors[store.value].axes}
    ):
        return None
    value, names = tensors[store.value], names_of(block)
    name = names.fresh(f"{value.name}_added")
    at, loads = _index(block.loads, index, names)
    dims = ((op.out,), *(d for d in ((a,) for a in value.axes) if d[0].name not in op.axes))
    step = Equation((Tensor(name, dims, value.dtype),), op, (store.value, at))
    stores = tuple(Store(name, e.target.name, "atomic") if s is store else s for s in block.stores)
    return replace(block, loads=loads, epilogue=(*block.epilogue, step), stores=stores)


def _made(step: object) -> tuple[Tensor, ...]:
    return step.targets if isinstance(step, Equation) else ()
