"""Graphs of the three levels.

    Program     = inputs, equations, outputs                         what the user writes; no schedule
    KernelGraph = Program whose equations may be Kernel or Library   what the search returns: a μGraph
    BlockGraph  = grid, split | none, passes [Pass], loads, epilogue [Step], stores, combine: BlockGraph | none
    Pass        = loops (none, one, or a nest of two), loads, body [Step]
    Step        = Equation | Accumulator | Thread(ThreadGraph)
    ThreadGraph = inputs, axis parts, equations, outputs
    Equation    = targets, op, args

A block graph gives each axis a role: on the grid, looped in a pass, split over the grid, or whole in the tile.  The
maps of loads and stores (imap, fmap, omap) follow from the roles, so they are derived, never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Literal, Self

from mugraph.errors import GraphError, Location
from mugraph.ir.axes import Axis, Dim, Size, dims_of
from mugraph.ir.ops import Broadcast, Contract, Kernel, Op, Reduce, Rename, Reshape, Slice, Transpose
from mugraph.ir.types import Input, Output, Storage, Tensor


@dataclass(frozen=True)
class Equation:
    """`targets = op(args)`; args name earlier values.  `where` is the user's line and does not count in equality."""

    targets: tuple[Tensor, ...]
    op: Op
    args: tuple[str, ...]
    where: Location | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.targets:
            raise GraphError("an equation has no result", where=self.where)

    @property
    def target(self) -> Tensor:
        (only,) = self.targets
        return only


Part = Literal["grid", "warp", "lane", "register"]


@dataclass(frozen=True)
class ThreadGraph:
    """A chain that stays in registers: its equations run per element, with each axis laid over `parts`."""

    inputs: tuple[str, ...]
    parts: tuple[tuple[str, Part], ...]
    equations: tuple[Equation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Thread:
    """A thread graph used as a step of a block graph; its outputs are visible to the steps after it."""

    graph: ThreadGraph


Monoid = Literal["sum", "max", "min", "rescaled"]


@dataclass(frozen=True)
class Accumulator:
    """A contraction or reduction over looped axes: its equation reads as over the whole axis and is evaluated a
    tile at a time, `acc = acc (monoid) tile result`.

    `rescaled` is a sum of scaled numbers `v * exp(scale)` where `scale` is the running maximum (a `max` accumulator,
    earlier in the same body): `acc = acc * exp(old scale - new scale) + tile result`.  Steps after a `max`
    accumulator in the same body read its running value.
    """

    equation: Equation
    monoid: Monoid
    scale: str | None = None

    @property
    def target(self) -> Tensor:
        return self.equation.target

    @property
    def axes(self) -> tuple[str, ...]:
        match self.equation.op:
            case Contract(axes) | Reduce(_, axes):
                return axes
            case _:
                return ()


Step = Equation | Accumulator | Thread


@dataclass(frozen=True)
class Load:
    """A tile of the kernel argument (or partial result) `source`, under the tile-level name `value.name`."""

    value: Tensor
    source: str


@dataclass(frozen=True)
class Store:
    """Writes the value to `target`.  A value computed inside a looped pass (not an accumulator) is written in each
    iteration, a tile at a time.  `partial`: one slab per part of the split, in f32, read by the combine.  `atomic`:
    added to a zeroed target."""

    value: str
    target: str
    kind: Literal["write", "partial", "atomic"] = "write"


@dataclass(frozen=True)
class Pass:
    """A loop (or a nest of two) over tiles: (axis, tile) outermost first.

    What a looped pass computes dies with each iteration; its accumulators live on.  A pass without loops runs once,
    and all its values live on (a prologue: tiles loaded once before the loop).
    """

    loops: tuple[tuple[str, int], ...]
    loads: tuple[Load, ...]
    body: tuple[Step, ...]

    @property
    def accumulators(self) -> tuple[Accumulator, ...]:
        return tuple(s for s in self.body if isinstance(s, Accumulator))


@dataclass(frozen=True)
class Split:
    """The looped `axis` is also cut into `parts` over the grid; `part` is the axis that counts the parts."""

    axis: str
    parts: int

    @property
    def part(self) -> Axis:
        return Axis(f"{self.axis}_part", self.parts)


@dataclass(frozen=True)
class BlockGraph:
    """What one thread block does: grid axes with their tiles, passes in order, then the epilogue, then the stores.
    With a split, stores are partial and `combine` computes the results from them."""

    grid: tuple[tuple[str, int], ...]
    split: Split | None
    passes: tuple[Pass, ...]
    loads: tuple[Load, ...]
    epilogue: tuple[Step, ...]
    stores: tuple[Store, ...]
    combine: BlockGraph | None = None

    def steps(self) -> Iterator[Step]:
        """All steps in order, the combine's excluded."""
        for p in self.passes:
            yield from p.body
        yield from self.epilogue

    def all_loads(self) -> tuple[Load, ...]:
        return tuple(ld for p in self.passes for ld in p.loads) + self.loads

    def tensors(self) -> dict[str, Tensor]:
        """Every tile-level value by name, the combine's excluded."""
        found = {ld.value.name: ld.value for ld in self.all_loads()}
        for equation in equations_of(tuple(self.steps())):
            found.update((t.name, t) for t in equation.targets)
        return found

    def tiles(self) -> dict[str, int]:
        """Tile size of each axis that is on the grid or looped; other axes are whole in the tile."""
        return dict(self.grid) | dict(loop for p in self.passes for loop in p.loops)


def equations_of(steps: tuple[Step, ...]) -> Iterator[Equation]:
    """The equations of the steps, those of accumulators and thread graphs included."""
    for step in steps:
        match step:
            case Equation():
                yield step
            case Accumulator(equation):
                yield equation
            case Thread(graph):
                yield from graph.equations


# How a notebook draws a program, by MIME type.  `viz` registers itself here, because imports point one way.
RENDERERS: dict[str, Callable[[Program], str]] = {}


@dataclass(frozen=True)
class Program:
    """A tensor program in equations, each naming earlier values."""

    name: str
    inputs: tuple[Input, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Output, ...]

    def tensors(self) -> dict[str, Tensor]:
        """Every kernel-level value by name."""
        found = {i.name: i.tensor for i in self.inputs}
        for equation in self.equations:
            found.update((t.name, t) for t in equation.targets)
        return found

    def axes(self) -> dict[str, Axis]:
        """Every axis of a kernel-level value, by name, in order of appearance."""
        return {a.name: a for t in self.tensors().values() for a in t.axes}

    def dims(self) -> tuple[Dim, ...]:
        """The symbolic sizes, sorted by name."""
        sizes: list[Size] = [a.size for a in self.axes().values()]
        return tuple(sorted({d for s in sizes for d in dims_of(s)}))

    def input(self, name: str) -> Input:
        return next(i for i in self.inputs if i.name == name)

    def kernels(self) -> tuple[Equation, ...]:
        return tuple(e for e in self.equations if isinstance(e.op, Kernel))

    def without_constants(self) -> Self:
        """The same with all inputs as arguments that may change from call to call."""
        return replace(self, inputs=tuple(replace(i, constant=False) for i in self.inputs))

    def fixed(self) -> dict[str, frozenset[str]]:
        """Values that stay as they are while the constant inputs do, outputs excluded, with the constant inputs that
        they are computed from (none, for literals and indices).  What has a symbolic size is fixed only if the shape of
        such an input gives that size."""
        overwritten = {o.alias_of for o in self.outputs}
        constants = {i.name: i.tensor for i in self.inputs if i.constant and i.name not in overwritten}
        results = {o.value for o in self.outputs}
        found = {name: frozenset((name,)) for name in constants}
        for e in self.equations if constants else ():
            if any(a not in found for a in e.args) or any(t.name in results for t in e.targets):
                continue
            below = frozenset().union(*(found[a] for a in e.args))
            given = {d for n in below for s in constants[n].shape for d in dims_of(s) if len(dims_of(s)) == 1}
            if all(d in given for a in _axes_in((e.targets, e.op)) for d in dims_of(a.size)):
                found |= dict.fromkeys((t.name for t in e.targets), below)
        return found

    def ahead(self) -> tuple[Equation, ...]:
        """The equations that compute on constant inputs alone, views of them apart: their work can be done once, ahead
        of the calls."""
        fixed = self.fixed()
        views = Reshape | Transpose | Broadcast | Slice | Rename
        return tuple(e for e in self.equations if fixed.get(e.targets[0].name) and not isinstance(e.op, views))

    def __str__(self) -> str:
        from mugraph.ir.printer import program_text

        return program_text(self)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self)} | {mime: render(self) for mime, render in RENDERERS.items()}


@dataclass(frozen=True)
class KernelGraph(Program):
    """A μGraph: kernel level here, block and thread level inside its `Kernel` operators."""

    __str__ = Program.__str__

    def divided(self) -> tuple[KernelGraph, KernelGraph] | None:
        """What is done ahead, as a graph of constant inputs, and the rest, which has the results of the first as its
        last inputs.  None where there is nothing to do ahead."""
        made = {t.name for e in self.ahead() for t in e.targets}
        rest = _needed([e for e in self.equations if e.targets[0].name not in made], [o.value for o in self.outputs])
        used = {a for e in rest for a in e.args}
        tensors = self.tensors()
        kept = [t for n, t in tensors.items() if n in made and n in used]
        if not kept:
            return None
        first = _needed(self.equations, [t.name for t in kept])
        read = {a for e in first for a in e.args}
        inputs = tuple(i for i in self.inputs if i.name in read)
        results = tuple(Output(t.name, Storage(t.dtype)) for t in kept)
        given = tuple(Input(t, Storage(t.dtype)) for t in kept)
        return (
            KernelGraph(f"{self.name}_ahead", inputs, first, results),
            KernelGraph(self.name, self.inputs + given, rest, self.outputs),
        )


def _needed(equations: Sequence[Equation], values: Iterable[str]) -> tuple[Equation, ...]:
    """The equations that the values are computed by."""
    wanted = set(values)
    kept: list[Equation] = []
    for e in reversed(equations):
        if any(t.name in wanted for t in e.targets):
            kept.append(e)
            wanted.update(e.args)
    return tuple(reversed(kept))


def _axes_in(value: object) -> Iterator[Axis]:
    """Every axis that is written in a part of a graph."""
    if isinstance(value, Axis):
        yield value
    elif isinstance(value, tuple):
        for x in value:
            yield from _axes_in(x)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _axes_in(getattr(value, f.name))


@dataclass(frozen=True)
class Map:
    """Where a load or store lies: per grid axis and per loop axis, the dimension of the tensor that it cuts, or None
    when every block (or iteration) sees the whole."""

    grid: tuple[tuple[str, int | None], ...]
    loops: tuple[tuple[str, int | None], ...]


def access_map(block: BlockGraph, dims: Tensor, loops: tuple[tuple[str, int], ...] = ()) -> Map:
    """imap and fmap of a load in a pass with these loops, or omap of a store (no loops)."""

    def position(axis: str) -> int | None:
        return next((i for i, d in enumerate(dims.dims) if any(a.name == axis for a in d)), None)

    grid = block.grid + (((block.split.axis, 0),) if block.split else ())
    return Map(tuple((a, position(a)) for a, _ in grid), tuple((a, position(a)) for a, _ in loops))
