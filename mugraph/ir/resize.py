"""The same graph at other sizes: what checks run instead of the true sizes, where these are too long to execute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from mugraph.ir.axes import Axis, Dim, dims_of, representative
from mugraph.ir.graph import BlockGraph, KernelGraph, Pass, Program, Split
from mugraph.ir.ops import Concat, Kernel, Pack, Rename, Reshape, Slice, TopK, Unpack
from mugraph.ir.types import DType

T = TypeVar("T")


def resized(value: T, sizes: Mapping[str, int], tiles: Mapping[str, int]) -> T:
    """A graph (or any part of one) with the sizes of the named axes replaced, and tiles of the named grid and loop
    axes no greater than those given.  The size of a split's part axis is the number of its parts.

    >>> from mugraph.ir.types import tensor, DType
    >>> str(resized(tensor("x", (Axis("k", 4096),), DType.f16), {"k": 80}, {}).axes[0].size)
    '80'
    """
    result: T = _walked(value, lambda x: _resize_one(x, sizes, tiles))
    return result


def limited(value: T, dim: str, low: int, high: int) -> T:
    """A program (or any part of one) whose symbolic size of that name lies between `low` and `high`."""
    result: T = _walked(value, lambda x: Dim(dim, low, high) if isinstance(x, Dim) and x.name == dim else x)
    return result


def retiled(graph: KernelGraph, tiles: Mapping[str, int]) -> KernelGraph:
    """A μGraph with other tiles of the named grid and loop axes, and other numbers of parts, by the names of part axes.
    Tiles of combines, which may be cut finer, are no greater than those given."""
    parts = {b.split.part.name for b in _blocks(graph) if b.split}
    graph = resized(graph, {a: n for a, n in tiles.items() if a in parts}, {})

    def change(x: Any) -> Any:
        if not isinstance(x, Kernel):
            return x
        return Kernel(tuple(_retiled(b, tiles) for b in x.blocks))

    result: KernelGraph = _walked(graph, change)
    return result


def _retiled(block: BlockGraph, tiles: Mapping[str, int]) -> BlockGraph:
    def changed(axes: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
        return tuple((a, tiles.get(a, t)) for a, t in axes)

    passes = tuple(replace(p, loops=changed(p.loops)) for p in block.passes)
    combine = block.combine and resized(block.combine, {}, tiles)
    return replace(block, grid=changed(block.grid), passes=passes, combine=combine)


def neighbours(graph: KernelGraph) -> Iterator[dict[str, int]]:
    """What `retiled` takes for graphs whose tiles or parts differ in one axis, by a factor of two."""
    found: dict[str, tuple[int, int]] = {}
    for block in _blocks(graph):
        sizes = {a.name: a for t in block.tensors().values() for a in t.axes}
        for a, t in (*block.grid, *(x for p in block.passes for x in p.loops)):
            found[a] = t, representative(sizes[a].size, MOST_REPRESENTED)
        if block.split:
            found[block.split.part.name] = block.split.parts, MOST_PARTS_TRIED
    for axis, (now, most) in found.items():
        for other in (2 * now, now // 2):
            if 1 <= other < 2 * most:
                yield {axis: other}


def _blocks(graph: KernelGraph) -> Iterator[BlockGraph]:
    for e in graph.kernels():
        assert isinstance(e.op, Kernel)
        yield from e.op.blocks


MOST_REPRESENTED = 128  # of a symbolic size, for which tiles are tried
MOST_PARTS_TRIED = 64


def recast(value: T, dtypes: Mapping[DType, DType]) -> T:
    """A graph with element types replaced: the same program in bf16, say."""
    result: T = _walked(value, lambda x: dtypes.get(x, x) if isinstance(x, DType) else x)
    return result


def _resize_one(x: Any, sizes: Mapping[str, int], tiles: Mapping[str, int]) -> Any:
    match x:
        case Axis(name, _) if name in sizes:
            return Axis(name, sizes[name])
        case BlockGraph():
            return replace(x, grid=tuple((a, min(t, tiles.get(a, t))) for a, t in x.grid))
        case Split() if x.part.name in sizes:
            return replace(x, parts=sizes[x.part.name])
        case Pass():
            return replace(x, loops=tuple((a, min(t, tiles.get(a, t))) for a, t in x.loops))
        case _:
            return x


def _walked(value: Any, change: Any) -> Any:
    """The value with `change` applied to every part, inner parts first."""
    if isinstance(value, tuple):
        return tuple(_walked(x, change) for x in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _walked(getattr(value, f.name), change) for f in fields(value) if f.init}
        value = replace(value, **parts)
    return change(value)


MOST_TILE = 32
MOST_PARTS = 4


def reduction(program: Program, graph: Program) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes and tiles at which every tiled axis of static size has two tiles and a tail, splits have few parts, one of
    them empty, and long whole axes shrink.

    Axes that views cut or join keep their sizes; an axis and what stands for it under another name have one.
    """
    tiles: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for e in graph.kernels():
        assert isinstance(e.op, Kernel)
        for block in e.op.blocks:
            if block.split:
                sizes[block.split.part.name] = min(block.split.parts, MOST_PARTS)
            for a, t in block.tiles().items():
                tiles[a] = min(MOST_TILE, max(t, tiles.get(a, 1)))
    fixed = {a for g in (program, graph) for a in _cut_axes(g)}
    for group in _aliases(program.axes(), (program, graph)):
        size = program.axes()[group[0]].size
        if not fixed.isdisjoint(group) or not isinstance(size, int):
            continue
        widest = max((tiles.get(a, 0) for a in group), default=0)
        if widest:
            sizes |= dict.fromkeys(group, min(size, 2 * widest + max(1, widest // 2 - 1)))
        elif size > 64:
            sizes |= dict.fromkeys(group, 48)
    return sizes, tiles


def _aliases(axes: Mapping[str, Axis], graphs: Sequence[Program]) -> list[list[str]]:
    """The axes in groups: those that stand for each other, by a renaming or by a load under other axes."""
    group = {a: [a] for a in axes}

    def unite(old: str, new: str) -> None:
        one, other = group.setdefault(old, [old]), group.setdefault(new, [new])
        if one is not other:
            one[:] = sorted({*one, *other}, key=lambda a: (a not in axes, a))  # the program's own first
            group.update(dict.fromkeys(one, one))

    for graph in graphs:
        tensors = graph.tensors()
        for e in graph.equations:
            if isinstance(e.op, Rename):
                for old, new in e.op.axes:
                    unite(old, new.name)
            for block in e.op.blocks if isinstance(e.op, Kernel) else ():
                for ld in block.all_loads():
                    if ld.source in tensors:
                        for a, b in zip(tensors[ld.source].axes, ld.value.axes, strict=False):
                            unite(a.name, b.name)
    return list({id(group[a]): group[a] for a in axes}.values())


def _cut_axes(program: Program) -> set[str]:
    """Axes whose size is tied to other axes or to numbers in operators."""
    found: set[str] = set()
    tensors = program.tensors()
    for e in program.equations:
        match e.op:
            case Slice(axis, out):
                found |= {axis, out.name}
            case Concat(axes, out):
                found |= {*axes, out.name}
            case Reshape() | TopK() | Pack() | Unpack():
                found |= {a.name for n in (*e.args, *(t.name for t in e.targets)) for a in tensors[n].axes}
    found |= {a.name for t in tensors.values() for a in t.axes if dims_of(a.size)}
    return found
