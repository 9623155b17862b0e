"""Block graphs written by hand.

    with mg.block(program, grid={"b": 16, "n": 64}) as blk:
        with blk.loop("k", tile=128) as p:
            x, g, w = p.load("X"), p.load("G"), p.load("W")
            acc = p.accumulate((x * g) @ w)
            ss = p.accumulate(mg.sum(x * x, axis=-1, keepdims=True))
        y = acc / mg.sqrt(ss / blk.size("k") + 1e-6)
        blk.store(y, "Y")
    graph = blk.graph()

Axes have the names they have in the program.  What stands in a loop is one of its passes; what stands before, between
and after the loops runs once.  An accumulator reads as over its whole axis.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, cast

from mugraph.dsl.record import Naming, Recorded, Recorder, Resolver, Value
from mugraph.dsl.tensor import SizeValue, Tensor, dim_size
from mugraph.dsl.trace import free_name, local_names
from mugraph.dsl.unify import Var, VarDims
from mugraph.errors import GraphError, Location
from mugraph.ir.axes import Axis, Size
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Monoid,
    Pass,
    Program,
    Split,
    Step,
    Store,
)
from mugraph.ir.ops import Contract, Iota, Kernel, Reduce
from mugraph.ir.types import DType, Input
from mugraph.ir.types import Tensor as Declared

StoreKind = Literal["write", "partial", "atomic"]


@dataclass(eq=False)
class Scope:
    """One pass, or the steps that stand outside loops: what is loaded, computed and accumulated there."""

    loops: tuple[tuple[str, int], ...] = ()
    loads: list[tuple[Value, str, VarDims]] = field(default_factory=list)
    steps: list[Recorded] = field(default_factory=list)
    accumulators: dict[Value, tuple[Monoid, Value | None]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.loads or self.steps)


@dataclass(frozen=True, eq=False)
class StoreRequest:
    value: Tensor
    target: str
    kind: StoreKind


class BlockBuilder:
    """Records one block graph: use it in a `with` statement, then take `graph()` or `block_graph()`."""

    def __init__(
        self,
        sources: Mapping[str, Declared],
        grid: Mapping[str, int],
        split: Mapping[str, int] | None = None,
        program: Program | None = None,
        axes: Mapping[str, Axis] | None = None,
    ) -> None:
        self.recorder = Recorder(block=True, observer=lambda step: self.scopes[-1].steps.append(step))
        self.program = program
        self.sources = dict(sources)
        self.sizes: dict[str, Size] = {a.name: a.size for t in sources.values() for a in t.axes}
        self.sizes.update((a.name, a.size) for a in (axes or {}).values())
        self.scopes = [Scope()]
        self.grid = tuple(grid.items())
        self.split = None if split is None else Split(*_single(split, "split"))
        self.stores: list[StoreRequest] = []
        self.partials: dict[Value, str] = {}
        self._vars: dict[str, Var] = {}
        self._names: dict[Value, str] = {}
        self._combine: BlockBuilder | None = None
        self._main: BlockBuilder | None = None
        self._in_loop = False
        for axis, tile in (*self.grid, *((self.split.axis, self.split.parts) for _ in [0] if self.split)):
            self._known(axis)
            if tile < 1:
                raise GraphError(f"the tile of {axis} is {tile}", where=self._here(), remedy="give at least 1")

    # -- scopes ------------------------------------------------------------------------------------------------

    def __enter__(self) -> BlockBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._take_names(2)

    @contextmanager
    def loop(self, axis: str | None = None, tile: int = 64, **axes: int) -> Iterator[BlockBuilder]:
        """A pass over tiles of an axis; as keywords, a nest: `blk.loop(m=64, k=32)`, outermost first."""
        loops = tuple(axes.items()) if axis is None else ((axis, tile), *axes.items())
        for name, size in loops:
            self._known(name)
            if size < 1 or name in dict(self.grid):
                raise GraphError(
                    f"{name} cannot be looped in tiles of {size}",
                    where=self._here(),
                    remedy="loop over an axis that is not on the grid, in tiles of at least 1",
                )
        if self._in_loop or not 1 <= len(loops) <= 2:
            raise GraphError(
                "a pass has one loop or a nest of two",
                where=self._here(),
                remedy="write a nest as blk.loop(m=64, k=32)",
            )
        self._enter(Scope(loops))
        self._in_loop = True
        yield self
        self._in_loop = False
        self._take_names(3)
        self._enter(Scope())

    def _enter(self, scope: Scope) -> None:
        self.scopes.append(scope)
        self.recorder._aliases.clear()  # what was renamed in a loop dies with it

    def _take_names(self, depth: int) -> None:
        for value, name in local_names(sys._getframe(depth).f_locals).items():
            self._names.setdefault(value, name)

    @contextmanager
    def combine(self) -> Iterator[BlockBuilder]:
        """The block graph that computes the results from the parts of the split: `c.load(acc)` is the accumulator's
        partial results, with the axis of the parts in front."""
        if self.split is None:
            raise GraphError("a combine needs a split", where=self._here(), remedy='give split={"k": 4}')
        part = self.split.part
        axes = {name: Axis(name, size) for name, size in self.sizes.items()} | {part.name: part}
        inner = BlockBuilder(self.sources, dict(self.grid), None, self.program, axes)
        inner._main = self
        yield inner
        inner._take_names(3)
        self._combine = inner

    # -- leaves ------------------------------------------------------------------------------------------------

    def load(self, source: str | Tensor, axes: Sequence[str] | None = None) -> Tensor:
        """A tile of a kernel argument, by name; `axes` renames its axes, in order: an alias.  In a combine, also the
        partial results of an accumulator."""
        if isinstance(source, Tensor):
            return self._load_partial(source)
        if source not in self.sources:
            raise GraphError(
                f"there is nothing to load under the name {source!r}",
                op="load",
                where=self._here(),
                remedy=f"known: {', '.join(self.sources)}",
            )
        declared = self.sources[source]
        names = [a.name for a in declared.axes] if axes is None else list(axes)
        if len(names) != len(declared.axes):
            raise GraphError(f"{declared} has {len(declared.axes)} axes", op="load", where=self._here())
        for name, axis in zip(names, declared.axes, strict=True):
            if self.sizes.setdefault(name, axis.size) != axis.size:
                raise GraphError(f"{name} has another size than {axis}", op="load", where=self._here())
        given = iter(names)
        dims = tuple(tuple(self._var(next(given)) for _ in d) for d in declared.dims)
        return self._loaded(source, dims, declared.dtype, source.lower())

    def _load_partial(self, source: Tensor) -> Tensor:
        main = self._main
        if main is None or main.split is None or source.recorder is not main.recorder:
            raise GraphError("partial results are loaded in a combine", op="load", where=self._here())
        names = [[main.axis_name(v) for v in main.recorder.axes.atoms(d)] for d in source.dims]
        dims = ((self._var(main.split.part.name),), *(tuple(map(self._var, d)) for d in names))
        target = main.partials.setdefault(source.value, f"partial{len(main.partials)}")
        stored = self._loaded(target, tuple(d for d in dims if d), DType.f32, "")
        return Tensor(self.recorder, stored.value, dims)  # dimensions of size 1 are not stored

    def _loaded(self, source: str, dims: VarDims, dtype: DType, name: str) -> Tensor:
        value = self.recorder.value((v for d in dims for v in d), dtype, name)
        self.scopes[-1].loads.append((value, source, dims))
        return Tensor(self.recorder, value, dims)

    def size(self, axis: str) -> SizeValue:
        """|axis| as a number."""
        self._known(axis)
        value = self.recorder.value((self._var(axis),), DType.i64)
        return dim_size(Tensor(self.recorder, value, ((self._var(axis),),)), 0)

    def index(self, axis: str) -> Tensor:
        """The index along an axis, as i64 [axis]."""
        self._known(axis)
        var = self._var(axis)
        value = self.recorder.record(Iota(self.recorder.axis(var)), (), (var,), DType.i64)
        return Tensor(self.recorder, value, ((var,),))

    # -- accumulators and stores -------------------------------------------------------------------------------

    def accumulate(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Makes the contraction or reduction that computed x an accumulator of this pass.  Its monoid is that of the
        operator; with `scale`, a maximum accumulated before, it is a sum of numbers scaled by exp(scale)."""
        scope = self.scopes[-1]
        step = next((s for s in scope.steps if s.target is x.value), None)
        if not self._in_loop or step is None:
            raise GraphError("what is accumulated is computed in the same loop", op="accumulate", where=self._here())
        match step.op:
            case Contract(axes):
                kind = "sum"
            case Reduce(kind, axes) if kind != "mean":
                pass
            case _:
                raise GraphError(
                    "only a contraction, sum, max or min accumulates",
                    op="accumulate",
                    where=step.where,
                    remedy='accumulate the sum and divide by blk.size("k") after the loop',
                )
        summed = {self.axis_name(v) for name in axes for v in self.recorder.axes.atoms([self.recorder._var(name)])}
        kept = {self.axis_name(v) for v in self.recorder.atoms(x.value)}
        looped = {name for name, _ in scope.loops}
        if not summed & looped or kept & looped:
            raise GraphError(
                f"an accumulator of this pass reduces over {', '.join(sorted(looped))}",
                op="accumulate",
                where=step.where,
            )
        monoid = cast(Monoid, "rescaled" if scale is not None else kind)
        if scale is not None and (kind != "sum" or scope.accumulators.get(scale.value, ("", None))[0] != "max"):
            raise GraphError(
                "a rescaled sum needs a maximum accumulated before it in the same pass",
                op="accumulate",
                where=step.where,
                remedy="m = p.accumulate(mg.max(z, axis=-1, keepdims=True))",
            )
        scope.accumulators[x.value] = monoid, None if scale is None else scale.value
        return x

    def store(self, x: Tensor, target: str, kind: StoreKind = "write") -> None:
        """Writes x to a result of the program.  `atomic` adds it to a zeroed result."""
        wanted = self.program.tensors().get(target) if self.program else None
        if self.program and target not in {o.value for o in self.program.outputs}:
            known = ", ".join(o.value for o in self.program.outputs)
            raise GraphError(f"{target} is no output", op="store", where=self._here(), remedy=f"known: {known}")
        value = self.recorder.spread(x.value, [v for d in x.dims for v in d])
        x = Tensor(self.recorder, value, x.dims)
        have = {self.axis_name(v) for v in self.recorder.atoms(value)}
        if wanted is not None and have != {a.name for a in wanted.axes}:
            raise GraphError(
                f"{target} has the axes {[a.name for a in wanted.axes]}, the stored value {sorted(have)}",
                op="store",
                where=self._here(),
            )
        self.stores.append(StoreRequest(x, target, kind))

    # -- axes --------------------------------------------------------------------------------------------------

    def _known(self, axis: str) -> None:
        if axis not in self.sizes:
            raise GraphError(
                f"there is no axis {axis}", where=self._here(), remedy=f"known: {', '.join(sorted(self.sizes))}"
            )

    def _var(self, axis: str) -> Var:
        if axis not in self._vars:
            self._vars[axis] = self.recorder.axes.fresh(self.sizes[axis], (0, axis), fixed=True)
        return self._vars[axis]

    def axis_name(self, var: Var) -> str:
        """The name of a program's axis; a provisional one for axes made here."""
        find = self.recorder.axes.find
        return next((name for name, own in self._vars.items() if find(own) is find(var)), var.name)

    def _here(self) -> Location | None:
        return self.recorder.location()

    # -- results -----------------------------------------------------------------------------------------------

    def block_graph(self) -> BlockGraph:
        """The block graph.  Raises GraphError where a value of a loop is used after it, or nothing is stored."""
        if self._combine is None:
            return self._built({}, None)
        inner = self._combine
        names = self._value_names()
        targets = {target: f"{names[value]}_parts" for value, target in self.partials.items()}
        requests = [StoreRequest(Tensor(self.recorder, v, ()), targets[t], "partial") for v, t in self.partials.items()]
        if self.stores:
            raise GraphError("with a combine, the results are stored there", op="store")
        self.stores, saved = requests, self.stores
        try:
            return self._built(names, inner._built(inner._value_names(targets), None, targets))
        finally:
            self.stores = saved

    def graph(self, name: str | None = None) -> KernelGraph:
        """The program as one kernel over all its inputs: this block graph."""
        if self.program is None:
            raise GraphError("a kernel graph needs the program", remedy="call mg.block(program, ...), or block_graph()")
        block = self.block_graph()
        tensors = self.program.tensors()
        targets = tuple(tensors[s.target] for s in (block.combine or block).stores)
        missing = {o.value for o in self.program.outputs} - {t.name for t in targets}
        if missing:
            raise GraphError(f"{', '.join(sorted(missing))} is never stored", op="store", remedy="add blk.store(...)")
        equation = Equation(targets, Kernel((block,)), tuple(i.name for i in self.program.inputs))
        return KernelGraph(name or self.program.name, self.program.inputs, (equation,), self.program.outputs)

    def _value_names(self, sources: Mapping[str, str] | None = None) -> dict[Value, str]:
        names: dict[Value, str] = {}
        taken: set[str] = set()

        def give(value: Value, base: str) -> None:
            names[value] = free_name(base, taken)
            taken.add(names[value])

        for scope in self.scopes:
            for value, source, _ in scope.loads:
                renamed = (sources or {}).get(source, source)
                give(value, self._names.get(value) or value.hint or renamed.replace("_parts", "_in"))
        steps = [s for scope in self.scopes for s in scope.steps]
        for step in steps:
            if step.target in self._names:
                give(step.target, self._names[step.target])
        count = 0
        for step in steps:
            if step.target not in names:
                while f"t{count}" in taken:
                    count += 1
                give(step.target, f"t{count}")
        return names

    def _built(
        self, names: dict[Value, str], combine: BlockGraph | None, sources: Mapping[str, str] | None = None
    ) -> BlockGraph:
        names = names or self._value_names()
        if not self.stores:
            raise GraphError("the block graph stores nothing", op="store", remedy="add blk.store(...)")
        naming = Naming(self.recorder.axes)
        naming.name(self._vars.values())
        self._check_scopes(names)
        resolver = Resolver(self.recorder, naming, names)
        built = [self._pass(scope, resolver, sources or {}) for scope in self.scopes]
        last = built.pop()
        passes = tuple(p for p, scope in zip(built, self.scopes, strict=False) if not scope.empty)
        stores = tuple(Store(names[s.value.value], s.target, s.kind) for s in self.stores)
        return BlockGraph(self.grid, self.split, passes, last.loads, last.body, stores, combine)

    def _pass(self, scope: Scope, resolver: Resolver, sources: Mapping[str, str]) -> Pass:
        loads = []
        for value, source, dims in scope.loads:
            declared = Declared(resolver.names[value], resolver.dims(dims), value.dtype)
            resolver.declare(declared)
            loads.append(Load(declared, sources.get(source, source)))
        body: list[Step] = []
        for step in scope.steps:
            *before, last = resolver.equations([step], {})
            body += before
            if step.target in scope.accumulators:
                monoid, scale = scope.accumulators[step.target]
                body.append(Accumulator(last, monoid, None if scale is None else resolver.names[scale]))
            else:
                body.append(last)
        return Pass(scope.loops, tuple(loads), tuple(body))

    def _check_scopes(self, names: Mapping[Value, str]) -> None:
        """What a looped pass computes dies with it, but for its accumulators."""
        alive: set[Value] = set()
        for scope in self.scopes:
            here = alive | {value for value, _, _ in scope.loads}
            for step in scope.steps:
                for arg in step.args:
                    if arg not in here:
                        raise GraphError(
                            f"{names.get(arg, 'a value')} is computed in a loop and dies with it",
                            where=step.where,
                            remedy="accumulate it, or compute it again after the loop",
                        )
                here.add(step.target)
            alive = alive | set(scope.accumulators) if scope.loops else here


def block(
    source: Program | Sequence[Input | Declared], grid: Mapping[str, int], split: Mapping[str, int] | None = None
) -> BlockBuilder:
    """A block graph to be written by hand, over a program's values or over given tensors.

    `grid` maps axes to tile sizes, `split` one looped axis to its number of parts.  Axes that are neither on the grid
    nor looped are whole in the tile.
    """
    if isinstance(source, Program):
        return BlockBuilder(source.tensors(), grid, split, source)
    tensors = [x.tensor if isinstance(x, Input) else x for x in source]
    return BlockBuilder({t.name: t for t in tensors}, grid, split)


def _single(mapping: Mapping[str, int], what: str) -> tuple[str, int]:
    if len(mapping) != 1:
        raise GraphError(f"a {what} names one axis, not {len(mapping)}")
    ((axis, value),) = mapping.items()
    return axis, value
