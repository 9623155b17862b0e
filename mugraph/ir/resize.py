"""The same graph at other sizes: what checks run instead of the true sizes, where these are too long to execute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from mugraph.ir.axes import Axis, dims_of
from mugraph.ir.graph import BlockGraph, Pass, Program, Split
from mugraph.ir.ops import Concat, Gather, Kernel, Pack, Rename, Reshape, Scatter, Slice, TopK, Unpack
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

    Axes that views cut or join, and what stands for them under another name, keep their sizes.
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
    for name, axis in program.axes().items():
        if name in fixed or not isinstance(axis.size, int):
            continue
        if name in tiles:
            sizes[name] = min(axis.size, 2 * tiles[name] + max(1, tiles[name] // 2 - 1))
        elif axis.size > 64:
            sizes[name] = 48
    return sizes, tiles


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
            case Rename(pairs):
                found |= {a for old, new in pairs for a in (old, new.name)}
            case Reshape() | TopK() | Pack() | Unpack() | Gather() | Scatter():
                found |= {a.name for n in (*e.args, *(t.name for t in e.targets)) for a in tensors[n].axes}
    found |= {a.name for t in tensors.values() for a in t.axes if dims_of(a.size)}
    return found
