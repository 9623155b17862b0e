"""Is a graph well formed?

    check(program)      raises GraphError or ShapeError with the offending line of the printed graph underlined

Types are computed anew by `infer` and compared.  The roles that a block graph gives to its axes must be consistent:
then no step mixes tiles of different extents, no two blocks write one element, and what a loop computes leaves it
through accumulators or through stores of its own tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, assert_never

from mugraph.errors import GraphError, Location, MugraphError, ShapeError, underline
from mugraph.ir.axes import Axis, Dim, Monomial, dims_of
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Pass,
    Program,
    Split,
    Step,
    Store,
    Thread,
    ThreadGraph,
)
from mugraph.ir.infer import Type, infer, op_text, type_of
from mugraph.ir.ops import (
    POINTWISE,
    Broadcast,
    Contract,
    CumSum,
    Gather,
    Iota,
    Kernel,
    Library,
    Reduce,
    Reshape,
    Scatter,
    Slice,
)  # fmt: skip
from mugraph.ir.printer import Line, block_level_axes, kernel_level_axes, program_lines
from mugraph.ir.types import DType, Output, Tensor

_SHOWN_WHOLE = 60  # lines of a graph that an error shows whole; of a longer one it shows the surroundings
_AROUND = 12


def check(program: Program) -> None:
    """Raises GraphError, or ShapeError for types, where the program or μGraph breaks a rule of the IR."""
    _Checker(program_lines(program)).program(program)


class _Checker:
    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    # -- errors --------------------------------------------------------------------------------------------------

    def fail(
        self,
        node: object,
        message: str,
        remedy: str | None = None,
        error: type[MugraphError] = GraphError,
        op: str | None = None,
        where: Location | None = None,
    ) -> NoReturn:
        raise error(f"{message}\n{self.shown(node)}", op=op, where=where or _where(node), remedy=remedy)

    def shown(self, node: object) -> str:
        """The printed graph with the line of `node` underlined."""
        texts = [line.text for line in self.lines]
        at = next((i for i, line in enumerate(self.lines) if any(_same(node, n) for n in line.nodes)), 0)
        if len(texts) <= _SHOWN_WHOLE:
            return underline("\n".join(texts), at + 1)
        start = max(0, at - _AROUND)
        return underline("\n".join(texts[start : at + _AROUND]), at - start + 1)

    # -- kernel level --------------------------------------------------------------------------------------------

    def program(self, p: Program) -> None:
        if not p.outputs:
            self.fail(p, f"{p.name} has no output", "return a value")
        self.axes(p)
        values: dict[str, Tensor] = {}
        for i in p.inputs:
            self.define(i, [i.tensor], values)
            if i.storage.strides is not None and len(i.storage.strides) != len(i.tensor.dims):
                self.fail(i, f"{i.name} has {len(i.tensor.dims)} dimensions and {len(i.storage.strides)} strides")
        for e in p.equations:
            for a in e.args:
                if a not in values:
                    self.fail(e, f"{a} is used before it is defined", f"known here: {', '.join(values)}")
            match e.op:
                case Kernel() | Library() if not isinstance(p, KernelGraph):
                    self.fail(e, f"a program holds no {op_text(e.op)}", "make it a KernelGraph")
                case Kernel(blocks):
                    self.kernel(e, blocks, {a: values[a] for a in e.args})
                case Library(_, semantics):
                    self.program(semantics)
                    self.types(e, values)
                case _:
                    self.types(e, values)
            self.define(e, e.targets, values)
        for o in p.outputs:
            self.output(o, p, values)

    def axes(self, p: Program) -> None:
        """One name is one axis, of a positive size, in the program, all its blocks and, but for the axes of their
        inputs, its library calls."""
        found: dict[str, Axis] = {}
        self.sizes(p, kernel_level_axes(p), found)
        for e in p.equations:
            if isinstance(e.op, Library):
                bound = {a.name for i in e.op.semantics.inputs for a in i.tensor.axes}
                self.sizes(e, [a for a in kernel_level_axes(e.op.semantics) if a.name not in bound], found)
            for block in e.op.blocks if isinstance(e.op, Kernel) else ():
                self.sizes(block, block_level_axes(block), found)
                if block.combine:
                    self.sizes(block.combine, block_level_axes(block.combine), found, block.split)

    def sizes(self, node: object, axes: Iterable[Axis], found: dict[str, Axis], split: Split | None = None) -> None:
        symbols: dict[str, Dim] = {d.name: d for a in found.values() for d in dims_of(a.size)}
        for a in axes:
            coefficient = a.size.coefficient if isinstance(a.size, Monomial) else a.size
            if not isinstance(coefficient, Dim) and coefficient <= 0:
                self.fail(a, f"axis {a} has the size {a.size}", "every axis needs a size of at least 1", ShapeError)
            known = split.part if split and a.name == split.part.name else found.setdefault(a.name, a)
            if known != a:
                self.fail(node, f"axis {a} has the sizes {known.size} and {a.size}", "rename one", ShapeError)
            for d in dims_of(a.size):
                if symbols.setdefault(d.name, d) != d:
                    self.fail(node, f"the symbolic size {d} has two ranges", "rename one", ShapeError)

    def define(self, node: object, targets: Sequence[Tensor], values: dict[str, Tensor]) -> None:
        for t in targets:
            if t.name in values:
                self.fail(node, f"{t.name} is defined twice", "rename one")
            values[t.name] = t

    def output(self, o: Output, p: Program, values: Mapping[str, Tensor]) -> None:
        if o.value not in values:
            self.fail(o, f"the output {o.value} is not defined", f"known: {', '.join(values)}")
        if o.alias_of is None:
            return
        target = next((i.tensor for i in p.inputs if i.name == o.alias_of), None)
        if target is None:
            self.fail(o, f"{o.alias_of}, which {o.value} overwrites, is no input")
        value = values[o.value]
        if target.shape != value.shape or target.dtype is not value.dtype:
            self.fail(o, f"{value} cannot overwrite {target}", error=ShapeError)

    def inferred(self, e: Equation, values: Mapping[str, Tensor]) -> tuple[Type, ...]:
        try:
            return infer(e.op, [type_of(values[a]) for a in e.args])
        except MugraphError as error:
            self.fail(e, error.message, error.remedy, type(error), error.op)

    def types(self, e: Equation, values: Mapping[str, Tensor], tile: bool = False) -> None:
        """The declared types are those that `infer` computes; floats of a tile are f32."""
        expected = self.inferred(e, values)
        if len(expected) != len(e.targets):
            self.fail(e, f"{op_text(e.op)} has {len(expected)} results, not {len(e.targets)}", error=ShapeError)
        for t, want in zip(e.targets, expected, strict=True):
            dtype = DType.f32 if tile and want.dtype.is_float else want.dtype
            if set(t.axes) != set(want.axes):
                message = f"{t.name} has the axes {_listed(t.axes)}; {op_text(e.op)} gives {_listed(want.axes)}"
                self.fail(e, message, error=ShapeError, op=op_text(e.op))
            if t.dtype is not dtype:
                message = f"{t.name} is {t.dtype}; {op_text(e.op)} gives {dtype}"
                self.fail(e, message, error=ShapeError, op=op_text(e.op))
            if isinstance(e.op, Reshape) and not tile and t.axes != tuple(a for d in e.op.dims for a in d):
                self.fail(e, f"{t} has its axes in another order than its reshape", error=ShapeError, op="reshape")

    def kernel(self, e: Equation, blocks: Sequence[BlockGraph], args: Mapping[str, Tensor]) -> None:
        stored: dict[str, Tensor] = {}
        for block in blocks:
            for target, value in _Block(self, block, args).check().items():
                if target in stored:
                    self.fail(block, f"two block graphs store {target}")
                stored[target] = value
        if set(stored) != {t.name for t in e.targets}:
            wanted = ", ".join(t.name for t in e.targets)
            self.fail(e, f"the kernel defines {wanted}; its blocks store {', '.join(stored) or 'nothing'}")
        for t in e.targets:
            value = stored[t.name]
            if set(t.axes) != set(value.axes):
                self.fail(e, f"{t.name} has the axes {_listed(t.axes)}; stored is {value}", error=ShapeError)
            if t.dtype is not value.dtype and not (t.dtype.is_float and value.dtype.is_float):
                self.fail(e, f"{t.name} is {t.dtype}; stored is {value}", error=ShapeError)


class _Block:
    """Checks one block graph, in which `sources` may be loaded."""

    def __init__(
        self, checker: _Checker, block: BlockGraph, sources: Mapping[str, Tensor], is_combine: bool = False
    ) -> None:
        self.fail = checker.fail
        self.checker = checker
        self.block = block
        self.sources = sources
        self.is_combine = is_combine
        self.grid = [a for a, _ in block.grid]
        self.looped = {a for p in block.passes for a, _ in p.loops}
        self.all: dict[str, Tensor] = {}  # every value of the block so far
        self.alive: dict[str, Tensor] = {}  # those that outlive the pass
        self.loops_of: dict[str, tuple[str, ...]] = {}  # loops of a value that dies with each iteration
        self.hidden: set[str] = set()  # values inside thread graphs
        self.scattered: dict[str, set[str]] = {}  # what a block scatters of tiled axes: a part of a sum, and the axes
        self.running: dict[str, set[str]] = {}  # value -> running maxima that it depends on

    def check(self) -> dict[str, Tensor]:
        """What the block stores in the end, by target."""
        self.roles()
        for p in self.block.passes:
            self.looped_pass(p)
        for load in self.block.loads:
            self.load(load, self.alive, ())
        self.steps(self.block.epilogue, self.alive, ())
        stored = self.stores()
        if self.block.combine is None:
            return stored
        partials = {
            target: Tensor(target, ((self.block.split.part,), *value.dims), DType.f32)
            for target, value in stored.items()
            if self.block.split
        }
        if clash := sorted(partials.keys() & self.sources.keys()):
            self.fail(self.block, f"the partial result {clash[0]} has the name of an argument", "rename one")
        return _Block(self.checker, self.block.combine, {**self.sources, **partials}, is_combine=True).check()

    def roles(self) -> None:
        """Each axis has one role."""
        b = self.block
        for tiles, node in [(b.grid, b.grid)] + [(p.loops, p) for p in b.passes]:
            names = [a for a, _ in tiles]
            if len(set(names)) < len(names):
                self.fail(node, f"axis {max(names, key=names.count)} is named twice")
            for a, tile in tiles:
                if tile < 1:
                    self.fail(node, f"the tile of {a} is {tile}", "a tile holds at least 1 entry")
        for p in b.passes:
            if len(p.loops) > 2:
                self.fail(p, "a nest of more than two loops")
            if both := [a for a, _ in p.loops if a in self.grid]:
                self.fail(p, f"axis {both[0]} is on the grid and looped at once", "choose one, or split the loop")
        if b.combine and not b.split:
            self.fail(b.combine, "a combine without a split", "split a looped axis, or drop the combine")
        if self.is_combine and b.split:
            self.fail(b.split, "a split inside a combine")
        if b.split:
            if not b.passes or b.split.axis not in [a for a, _ in b.passes[-1].loops]:
                self.fail(b.split, f"the split axis {b.split.axis} is not looped in the last pass")
            if b.split.parts < 1:
                self.fail(b.split, f"a split into {b.split.parts} parts")

    # -- values --------------------------------------------------------------------------------------------------

    def looped_pass(self, p: Pass) -> None:
        loops = tuple(a for a, _ in p.loops)
        visible = dict(self.alive)
        for load in p.loads:
            self.load(load, visible, loops)
        self.steps(p.body, visible, loops)
        lasting = {s.target.name for s in p.accumulators}
        for name, t in visible.items():
            if not loops or name in lasting:
                self.alive[name] = t
            elif name not in self.alive:
                self.loops_of[name] = loops

    def load(self, load: Load, visible: dict[str, Tensor], loops: tuple[str, ...]) -> None:
        value, source = load.value, self.sources.get(load.source)
        if source is None:
            self.fail(load, f"{load.source} is no argument", f"loadable here: {', '.join(self.sources)}")
        if [[a.size for a in d] for d in value.dims] != [[a.size for a in d] for d in source.dims]:
            self.fail(load, f"the load of {source} has other dimensions: {value}", error=ShapeError)
        if value.axes != source.axes and set(value.axes) == set(source.axes):
            message = f"{value} permutes the axes of {source}"
            self.fail(load, message, "keep their order, or alias by fresh axes", ShapeError)
        if value.dtype is not source.dtype:
            self.fail(load, f"{value} is not of its source's type {source.dtype}", error=ShapeError)
        self.define(load, value, visible, loops)

    def define(self, node: object, t: Tensor, visible: dict[str, Tensor], loops: tuple[str, ...]) -> None:
        if t.name in self.all:
            self.fail(node, f"{t.name} is defined twice", "rename one")
        if other := sorted(self.looped.intersection(a.name for a in t.axes) - set(loops)):
            self.fail(node, f"{t.name} holds the whole axis {other[0]}, which another pass loops over")
        self.all[t.name] = visible[t.name] = t

    def used(self, node: object, names: Iterable[str], visible: Mapping[str, Tensor]) -> None:
        for name in names:
            if name in self.hidden and name not in visible:
                self.fail(node, f"{name} stays inside its thread graph", "make it an output of the thread graph")
            if name in self.loops_of and name not in visible:
                loop = ", ".join(self.loops_of[name])
                self.fail(node, f"{name} dies with each iteration of the loop over {loop}", "use an accumulator")
            if name not in visible:
                self.fail(node, f"{name} is used before it is defined", f"known here: {', '.join(visible)}")

    # -- steps ---------------------------------------------------------------------------------------------------

    def steps(self, steps: Sequence[Step], visible: dict[str, Tensor], loops: tuple[str, ...]) -> None:
        maxima: dict[str, Tensor] = {}  # running maxima of this pass
        unfinished: set[str] = set()  # its other accumulators, which nothing in the pass may read
        for step in steps:
            match step:
                case Equation():
                    self.equation(step, visible, loops, unfinished)
                case Thread(graph):
                    self.thread(step, graph, visible, loops, unfinished)
                case Accumulator():
                    self.accumulator(step, visible, loops, maxima, unfinished)
                case _:
                    assert_never(step)
        for name in maxima:
            del self.running[name]  # after its pass a maximum is final

    def equation(
        self, e: Equation, visible: dict[str, Tensor], loops: tuple[str, ...], unfinished: Iterable[str]
    ) -> None:
        self.read(e, e, visible, unfinished)
        self.checker.types(e, visible, tile=True)
        tiled = self.looped.union(self.grid)
        closed = sorted(_closed(e, visible) & tiled)
        if isinstance(e.op, Scatter) and e.op.kind == "sum" and set(closed) <= set(e.op.axes):
            self.scattered[e.target.name] = set(closed)
        elif closed:
            if closed[0] in self.grid:
                self.fail(e, f"{op_text(e.op)} closes the grid axis {closed[0]}", "loop over it, and split the loop")
            self.fail(e, f"{op_text(e.op)} closes the looped axis {closed[0]} outside an accumulator")
        before = {a.name for name in e.args for a in visible[name].axes}
        opened = sorted(({a.name for t in e.targets for a in t.axes} - before) & tiled)
        if opened and not isinstance(e.op, Iota | Slice | Broadcast):  # these are computed a tile at a time
            self.fail(e, f"{op_text(e.op)} makes the axis {opened[0]}, of which a block sees one tile only")
        maxima = set[str]().union(*(self.running.get(a, ()) for a in e.args))
        for t in e.targets:
            self.define(e, t, visible, loops)
            if maxima:
                self.running[t.name] = maxima

    def read(self, node: object, e: Equation, visible: Mapping[str, Tensor], unfinished: Iterable[str]) -> None:
        """The operands are there, and none is an accumulator that this pass has not finished."""
        if isinstance(e.op, Kernel | Library):
            self.fail(node, f"{op_text(e.op)} inside a block graph")
        self.used(node, e.args, visible)
        if part := [a for a in e.args if self.scattered.get(a)]:
            self.fail(node, f"{part[0]} is what one block scatters, not the sum over all", "store it atomically")
        if early := [a for a in e.args if a in unfinished]:
            self.fail(node, f"{early[0]} is read before its loop is done", "read it in a later pass or the epilogue")

    def accumulator(
        self,
        step: Accumulator,
        visible: dict[str, Tensor],
        loops: tuple[str, ...],
        maxima: dict[str, Tensor],
        unfinished: set[str],
    ) -> None:
        e, name = step.equation, step.target.name
        self.read(step, e, visible, unfinished)
        self.checker.types(e, visible, tile=True)
        kind = _monoid(e)
        if kind is None or kind != ("sum" if step.monoid == "rescaled" else step.monoid):
            self.fail(step, f"{step.monoid} does not accumulate {op_text(e.op)}")
        if not loops:
            self.fail(step, f"{name} accumulates outside a loop", "write `=`")
        if missed := [a for a in loops if a not in step.axes]:
            self.fail(step, f"{name} does not close the loop over {missed[0]}: each iteration would count again")
        if other := sorted(set(step.axes) & self.looped.union(self.grid) - set(loops)):
            self.fail(step, f"{name} closes the axis {other[0]}, which its pass does not loop over")
        read = set[str]().union(*(self.running.get(a, ()) for a in e.args))
        if step.monoid == "rescaled":
            if step.scale not in maxima:
                self.fail(step, f"{step.scale} is no running maximum before {name} in its pass")
            if wide := set(maxima[step.scale].axes) - set(step.target.axes):
                self.fail(step, f"{name} lacks the axis {min(a.name for a in wide)} of its scale {step.scale}")
            read -= {step.scale}
        elif step.scale is not None:
            self.fail(step, f"{name} has a scale but is not rescaled")
        if read:
            self.fail(step, f"{name} depends on the running maximum {min(read)}", f"rescale it by {min(read)}")
        self.define(step, step.target, visible, loops)
        if step.monoid == "max":
            maxima[name] = step.target
            self.running[name] = {name}
        else:
            unfinished.add(name)

    def thread(
        self,
        step: Thread,
        graph: ThreadGraph,
        visible: dict[str, Tensor],
        loops: tuple[str, ...],
        unfinished: Iterable[str],
    ) -> None:
        self.used(step, graph.inputs, visible)
        inside = {name: visible[name] for name in graph.inputs}
        for e in graph.equations:
            if not isinstance(e.op, POINTWISE):
                self.fail(e, f"{op_text(e.op)} is not computed element by element", "take it out of the thread graph")
            self.equation(e, inside, loops, unfinished)
        made = [t.name for e in graph.equations for t in e.targets]
        if idle := set(graph.inputs) - {a for e in graph.equations for a in e.args}:
            self.fail(step, f"the thread graph does not read its input {min(idle)}")
        if absent := [o for o in graph.outputs if o not in made]:
            self.fail(step, f"the thread graph does not compute its output {absent[0]}")
        axes = {a.name for t in inside.values() for a in t.axes}
        if axes != {a for a, _ in graph.parts}:
            self.fail(step, f"the thread graph has the axes {', '.join(sorted(axes))}; its parts name others")
        if wrong := [a for a, part in graph.parts if part == "grid" and a not in self.grid]:
            self.fail(step, f"axis {wrong[0]} is not on the grid")
        visible.update((o, inside[o]) for o in graph.outputs)
        self.hidden.update(name for name in made if name not in graph.outputs)

    # -- stores --------------------------------------------------------------------------------------------------

    def stores(self) -> dict[str, Tensor]:
        stored: dict[str, Tensor] = {}
        for s in self.block.stores:
            value = self.alive.get(s.value) or (self.all[s.value] if s.value in self.loops_of else None)
            if value is None:
                self.fail(s, f"{s.value} is not there to be stored", f"known: {', '.join(self.alive)}")
            if s.target in stored:
                self.fail(s, f"{s.target} is stored twice")
            self.race(s, value)
            self.kind(s)
            stored[s.target] = value
        return stored

    def race(self, s: Store, value: Tensor) -> None:
        """No two blocks, and no two iterations, write one element."""
        names = {a.name for a in value.axes}
        if part := self.scattered.get(s.value):
            if s.kind != "atomic":
                self.fail(s, f"a race: all blocks along {min(part)} write to {s.target}", "store it atomically")
            names |= part
        if absent := [a for a in self.grid if a not in names]:
            self.fail(s, f"a race: all blocks along {absent[0]} write the same elements of {s.target}")
        if s.value not in self.loops_of:
            return
        if absent := [a for a in self.loops_of[s.value] if a not in names]:
            self.fail(s, f"a race: all iterations over {absent[0]} write the same elements of {s.target}")
        if s.value in self.running:
            self.fail(s, f"{s.value} depends on a running maximum, which is not final")
        if s.kind == "partial":
            self.fail(s, f"{s.value} is a tile of the loop, not a partial result")

    def kind(self, s: Store) -> None:
        split, combine = self.block.split, self.block.combine
        if s.kind == "partial" and not (split and combine):
            self.fail(s, "a partial store needs a split and a combine")
        if s.kind == "write" and split:
            self.fail(s, f"a race: all parts of the split write {s.target}", "store it as partial, or atomically")
        if s.kind == "atomic" and combine:
            self.fail(s, "an atomic store beside a combine", "store it as partial")
        if s.kind != "write" and self.is_combine:
            self.fail(s, f"a combine stores results, not {s.kind} ones")


def _closed(e: Equation, values: Mapping[str, Tensor]) -> set[str]:
    """The axes that an operator closes, or looks along: a block must see them whole."""
    before = {a.name for name in e.args for a in values[name].axes}
    along = {e.op.axis} if isinstance(e.op, CumSum | Gather) else set()
    return before - {a.name for t in e.targets for a in t.axes} | along


def _monoid(e: Equation) -> str | None:
    """The monoid in which tile results of the equation add up to its result; None: in none."""
    match e.op:
        case Contract() | Reduce("sum"):
            return "sum"
        case Reduce("max"):
            return "max"
        case Reduce("min"):
            return "min"
        case _:
            return None


def _same(node: object, other: object) -> bool:
    return node is other or (isinstance(node, Axis | Dim) and node == other)


def _where(node: object) -> Location | None:
    if isinstance(node, Accumulator):
        return node.equation.where
    return node.where if isinstance(node, Equation) else None


def _listed(axes: Iterable[Axis]) -> str:
    return "[" + ", ".join(map(str, axes)) + "]"
