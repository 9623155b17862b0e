"""What a derivation does, for the cost model: its loads, products and other operations, at any tile sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from mugraph.ir.types import DType
from mugraph.search.cost import VECTOR_WEIGHT, Amount, Product, Read, Work
from mugraph.search.extract import COMPUTED_TILE, LOADED_TILE, Derivation, Option, Problem

SECTOR = 64  # bytes side by side below which reads and writes waste bandwidth


def work_of(p: Problem, d: Derivation) -> Work:
    """The loads, products and other operations of a kernel, for the cost model."""
    return Footprint(p, d).work(dict(d.tiles))


class _Loaded(NamedTuple):
    source: int
    bytes: float
    width: float  # bytes of an element
    axes: tuple[str, ...]
    cuts: tuple[bool, ...]  # by grid axis
    run: str | None  # the axis along which elements lie side by side
    looped: bool
    combining: bool


class _Computed(NamedTuple):
    axes: tuple[str, ...]
    joined: tuple[str, ...]
    absent: tuple[str, ...]  # grid axes along which blocks repeat it
    sides: tuple[tuple[str, ...], ...]  # of a product: the axes of either operand alone
    depth: tuple[str, ...]
    dtype: DType
    stored: float  # bytes of partial results
    accumulated: bool
    held: bool  # outside loops


class Footprint:
    """What a derivation does, but for its tile sizes; `work` fills these in, many times over."""

    def __init__(self, p: Problem, d: Derivation) -> None:
        self.sizes, self.grid, self.passes = p.sizes, d.roles.grid, d.roles.passes
        self.parts = d.roles.split[1] if d.roles.split else 1
        self.written = sum(p.bytes(r) for r in d.roots)
        self.roots = [(p.bytes(r), p.innermost.get(r), self.width(p, r)) for r in d.roots]
        self.loads: list[_Loaded] = []
        self.steps: list[_Computed] = []
        self.limits = p.limits
        self.held: set[tuple[tuple[str, ...], int]] = set()  # axes of a tile, and the elements that it may have
        self.multiplied: set[str] = set()  # axes of products
        for s in d.steps:
            c, at = s.entry
            axes = p.axes(c)
            looped = any(a in d.roles.loops for a in axes)
            if s.option.edge is None or s.option.edge.children:
                self.held.add((axes, LOADED_TILE if s.option.edge is None else COMPUTED_TILE))
            if s.option.edge and p.is_matmul(c, s.option.edge):
                self.multiplied.update(p.joined_axes(c, s.option.children))
            if s.option.edge is None:
                combining = self.parts > 1 and at > len(self.passes)  # the combine's own loads
                cuts = tuple(a in axes for a in self.grid)
                source = -1 - c if combining else c
                run = p.innermost.get(c)
                self.loads.append(_Loaded(source, p.bytes(c), self.width(p, c), axes, cuts, run, looped, combining))
            elif s.option.edge.children:
                self.steps.append(self.computed(p, c, s.option, looped))

    @staticmethod
    def width(p: Problem, c: int) -> float:
        return p.dtypes.get(c, p.dtype).bits / 8

    def computed(self, p: Problem, c: int, option: Option, looped: bool) -> _Computed:
        assert option.edge is not None
        axes, joined = p.axes(c), p.joined_axes(c, option.children)
        sides: tuple[tuple[str, ...], ...] = ()
        if p.is_matmul(c, option.edge):
            left, right = (p.axes(x) for x in option.children)
            sides = tuple(a for a in left if a not in right), tuple(a for a in right if a not in left)
        stored = 0.0
        if option.loop is not None and self.parts > 1:
            repeated = math.prod(p.sizes[a] for a in self.grid if a not in axes)  # each block stores its own copy
            stored = 2 * self.parts * repeated * p.elements(c) * 4
        return _Computed(
            axes,
            joined,
            tuple(a for a in self.grid if a not in joined),
            sides,
            option.edge.axes,
            product_dtype(p, option.children),
            stored,
            option.loop is not None,
            not looped,
        )

    def excess(self, tiles: Mapping[str, Amount]) -> Amount:
        """Elements beyond what tiles may have."""
        sizes = self.limits
        over = (math.prod([tiles.get(a, sizes[a]) for a in axes]) - most for axes, most in sorted(self.held))
        return sum(np.maximum(0, x) for x in over)

    def work(self, tiles: Mapping[str, Amount]) -> Work:
        """The work at some tile sizes; with arrays of them, at each."""
        sizes = self.sizes
        along = {a: -(-sizes[a] // t) for a, t in tiles.items()}
        width = {a: np.minimum(t, sizes[a]) for a, t in tiles.items()}

        @cache
        def elements(axes: tuple[str, ...]) -> Amount:
            return math.prod([width[a] if a in width else sizes[a] for a in axes])

        @cache
        def computed(joined: tuple[str, ...], absent: tuple[str, ...]) -> Amount:
            padded = [along[a] * tiles[a] if a in tiles else sizes[a] for a in joined]
            return 1.0 * math.prod([*padded, *(along[a] for a in absent)])

        def waste(run: str | None, element: float) -> Amount:
            """Bytes that move for each byte that is wanted: short runs waste the rest of a sector."""
            if run is None or run not in width:
                return 1.0
            wasted = np.maximum(1.0, SECTOR / (tiles[run] * element))
            return np.where(tiles[run] >= sizes[run], 1.0, wasted)  # whole rows lie side by side too

        stage: Amount = 0.0
        resident, vector, accumulators, partial = stage, stage, stage, 0.0
        blocks = [along[a] for a in self.grid]
        reads: list[Read] = []
        for x in self.loads:
            cut = tuple(zip(blocks, x.cuts, strict=True))
            if not x.combining:
                cut = (*cut, (self.parts, x.looped))
            reads.append(Read(x.source, x.bytes, cut, waste(x.run, x.width)))
            held = elements(x.axes) * x.width
            if x.looped:
                stage = stage + held
            else:
                resident = resident + held
        products: list[Product] = []
        depth: Amount = 1
        for s in self.steps:
            volume = computed(s.joined, s.absent)
            if s.sides:
                products.append(Product(volume, elements(s.sides[0]), elements(s.sides[1]), s.dtype))
                depth = depth + np.maximum(1, elements(s.depth) // 16)
            else:
                vector = vector + VECTOR_WEIGHT * volume
            if s.accumulated:
                accumulators = accumulators + elements(s.axes)
                partial += s.stored
            elif s.held:
                accumulators = np.maximum(accumulators, elements(s.axes))
        wanted = sum(size * waste(run, element) for size, run, element in self.roots)
        return Work(
            blocks=math.prod(blocks) * self.parts,
            trips=sum(np.ceil(math.prod([along[a] for a in loop]) / self.parts) for loop in self.passes),
            reads=tuple(reads),
            written=self.written,
            writing=wanted / self.written if self.written else 1.0,
            stage=stage,
            resident=resident,
            partial=partial,
            products=tuple(products),
            vector=vector,
            accumulators=accumulators,
            depth=depth,
        )


def product_dtype(p: Problem, operands: Sequence[int]) -> DType:
    """The type that a product multiplies in: the widest of its floating operands, 16 bits at least; 8 bits where all
    operands are of one such type and the device has instructions for it."""
    types = [uncast(p, x) for x in operands]
    if len(set(types)) == 1 and types[0].bits == 8 and p.device.on_tensor_cores(types[0]):
        return types[0]
    wide = [t for t in types if t.is_float and t.bits >= 16]
    return max(wide, key=lambda t: t.bits) if wide else DType.f16


def uncast(p: Problem, c: int) -> DType:
    """The type of a class, or that of the narrower integers that it is made of by a cast."""
    own = p.dtypes.get(c, p.dtype)
    given = (e.children[0] for e in p.closure.classes[c].edges if e.kind == "call" and e.fn == "cast")
    narrow = [t for t in (p.dtypes.get(x, p.dtype) for x in given) if not t.is_float]
    return min([own, *narrow], key=lambda t: t.bits)
