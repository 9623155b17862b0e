"""μGraphs as the Mirage project publishes them, in our IR.

    graphs = parse_mirage(text)                     the file's graphs, as lists of operators
    graph = import_mirage(graphs[0], program)       the first one, over the program's inputs and outputs

The format is positional: tensors are shapes, blocks and loops are counted, tiles meet by the position of their
dimensions.  Here a dimension of D entries that G blocks and R iterations cut becomes the product of three axes, (block,
iteration, place in the tile), of which the block axis is on the grid and the iteration is looped, a single entry at a
time.  Kernel-level reshapes lead from a tensor's own axes to such products and back.

An error names the operator by its place, as `3.5 tb_matmul_op`: the sixth block operator of the graph's fourth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mugraph.errors import GraphError, MugraphError, ParseError, ShapeError, UnsupportedOpError
from mugraph.ir.axes import Axis, Size, dims_of, size_value
from mugraph.ir.check import check
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Load, Pass, Program, Step, Store
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Contract,
    Elementwise,
    Kernel,
    Op,
    Reduce,
    Rename,
    Reshape,
    SizeOf,
    Transpose,
)
from mugraph.ir.resize import resized
from mugraph.ir.types import Dims, DType, Input, Output, Storage, Tensor, tensor

Shape = tuple[int, ...]
Operator = Mapping[str, Any]

UNARY = {"exp", "square", "sqrt", "silu", "gelu", "relu"}
BINARY = {"add", "mul", "div", "sub"}
GRID = ("x", "y", "z")
IDENTITY = Cast(DType.f32)  # of a tile, whose floats are f32
_HOW = "the format is described in docs/verification.md"


def parse_mirage(text: str) -> list[list[Operator]]:
    """The graphs of a file.  Raises ParseError where it is not a list of lists of operators, or one such list."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ParseError(f"not JSON: {error}", remedy=_HOW) from None
    if isinstance(data, list) and data and all(isinstance(o, dict) for o in data):
        data = [data]
    if not isinstance(data, list) or not data:
        raise ParseError("the file holds no list of graphs", remedy=_HOW)
    for i, graph in enumerate(data):
        if not isinstance(graph, list) or not all(isinstance(o, dict) and "op_type" in o for o in graph):
            raise ParseError(f"graph {i} is no list of operators with an op_type", remedy=_HOW)
    return data


def import_mirage(
    operators: Sequence[Operator], program: Program | None = None, name: str = "mirage", dtype: DType = DType.f16
) -> KernelGraph:
    """One graph of a file.  With a program, inputs and outputs are taken from it, in order, at the graph's own sizes
    (see `bound_to`); else they are named I0, I1, ... with elements of `dtype`.

    Raises ParseError for a malformed operator, UnsupportedOpError for an unknown one, ShapeError for tiles that do not
    fit, GraphError for blocks or iterations that leave a tensor, meet in one place, or leave places out.
    """
    try:
        return _Importer(operators, program, name, dtype).graph()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ParseError(f"an operator lacks a field: {type(error).__name__}: {error}", remedy=_HOW) from None


def bound_to(program: Program, operators: Sequence[Operator]) -> Program:
    """The program at the sizes of a graph's inputs: its symbolic sizes bound.  Raises ShapeError where they differ."""
    shapes = [_shape(o["output_tensors"][0]) for o in operators if o["op_type"] == "kn_input_op"]
    if len(shapes) != len(program.inputs):
        raise ShapeError(f"the graph takes {len(shapes)} inputs, {program.name} takes {len(program.inputs)}")
    bindings: dict[str, int] = {}
    for given, i in zip(shapes, program.inputs, strict=True):
        wanted = i.tensor.shape
        if len(given) == len(wanted):
            bindings |= {str(d): n for d, n in zip(wanted, given, strict=True) if dims_of(d) == (d,)}
        try:
            fits = given == tuple(size_value(d, bindings) for d in wanted)
        except ShapeError:
            fits = False
        if not fits:
            raise ShapeError(f"the graph takes {list(given)} for {i.tensor}", remedy="give the program these sizes")
    found = resized(program, {a.name: size_value(a.size, bindings) for a in program.axes().values()}, {})
    return found


def _shape(t: Operator) -> Shape:
    return tuple(int(n) for n in t["dim"][: t["num_dims"]])


@dataclass(frozen=True)
class _Tile:
    """A block-level value: its name, the tile's shape, the class of each dimension, and whether loops are over."""

    name: str
    shape: Shape
    nodes: tuple[object, ...]
    after: bool


class _Classes:
    """Dimensions of tiles that go by one axis: union-find, never two dimensions of one tile together."""

    def __init__(self) -> None:
        self._parent: dict[object, object] = {}
        self._tiles: list[tuple[object, ...]] = []

    def of(self, node: object) -> object:
        while (up := self._parent.get(node, node)) != node:
            node = up
        return node

    def tile(self, nodes: tuple[object, ...]) -> tuple[object, ...]:
        self._tiles.append(nodes)
        return nodes

    def unite(self, a: object, b: object) -> None:
        x, y = self.of(a), self.of(b)
        together = [{self.of(n) for n in tile} for tile in self._tiles]
        if x != y and not any({x, y} <= classes for classes in together):
            self._parent[y] = x


class _Importer:
    def __init__(self, operators: Sequence[Operator], program: Program | None, name: str, dtype: DType) -> None:
        self.operators = operators
        self.program = program
        self.name = name
        self.dtype = dtype
        self.names = {a.name for a in program.axes().values()} | set(program.tensors()) if program else set[str]()
        self.values: dict[object, Tensor] = {}  # by guid; a dimension of one entry has no axis
        self.tensors: dict[str, Tensor] = {}
        self.equations: list[Equation] = []
        self.inputs: list[Input] = []
        self.outputs: list[Output] = []

    def graph(self) -> KernelGraph:
        if self.program is not None:
            self.program = bound_to(self.program, self.operators)
        for i, o in enumerate(self.operators):
            place = f"{i} {o['op_type']}"
            try:
                self.kernel_level(o, place)
            except MugraphError as error:
                if error.op is None:
                    error.op = place
                raise
        if self.program is not None and len(self.outputs) != len(self.program.outputs):
            raise ShapeError(f"the graph gives {len(self.outputs)} outputs, not {len(self.program.outputs)}")
        found = KernelGraph(self.name, tuple(self.inputs), tuple(self.equations), tuple(self.outputs))
        check(found)
        return found

    # -- names and equations -------------------------------------------------------------------------------------

    def fresh(self, base: str) -> str:
        name, n = base, 0
        while name in self.names:
            n += 1
            name = f"{base}_{n}"
        self.names.add(name)
        return name

    def axis(self, base: str, size: int) -> Axis:
        return Axis(self.fresh(base), size)

    def add(self, op: Op, args: Sequence[Tensor], dims: Dims, base: str = "t") -> Tensor:
        (found,) = infer(op, [type_of(a) for a in args])
        t = Tensor(self.fresh(base), dims, found.dtype)
        self.equations.append(Equation((t,), op, tuple(a.name for a in args)))
        return t

    def under(self, t: Tensor, dims: Dims) -> Tensor:
        """The same elements under other axes."""
        if t.dims == dims:
            return t
        if {a.name for a in t.axes} == {a.name for d in dims for a in d}:  # a reshape only regroups these
            away = tuple(tuple(self.axis("u", _int(a.size)) for a in d) for d in t.dims)
            t = self.add(Reshape(away), [t], away, f"{t.name}_u")
        return self.add(Reshape(dims), [t], dims, f"{t.name}_v")

    # -- kernel level --------------------------------------------------------------------------------------------

    def kernel_level(self, o: Operator, place: str) -> None:
        kind = o["op_type"]
        if kind == "kn_input_op":
            self.input(o["output_tensors"][0])
            return
        args = [self.value(t) for t in o["input_tensors"]]
        if kind == "kn_output_op":
            self.output(args[0])
            return
        if kind == "kn_customized_op":
            _Block(self, o, place).add()
            return
        declared = o["output_tensors"][0]
        result = self.apply(kind.removeprefix("kn_").removesuffix("_op"), args, declared, kind)
        self.define(declared, result)

    def value(self, t: Operator) -> Tensor:
        if t["guid"] not in self.values:
            raise ParseError(f"tensor {t['guid']} is used before it is defined")
        found = self.values[t["guid"]]
        if _shape(t) != found.shape:
            raise ShapeError(f"tensor {t['guid']} is {list(found.shape)}, used as {list(_shape(t))}")
        return found

    def define(self, declared: Operator, t: Tensor) -> None:
        if declared["guid"] in self.values:
            raise ParseError(f"tensor {declared['guid']} is defined twice")
        if _shape(declared) != t.shape:
            raise ShapeError(f"the result is {list(t.shape)}, declared as {list(_shape(declared))}")
        self.values[declared["guid"]] = t

    def input(self, declared: Operator) -> None:
        shape, n = _shape(declared), len(self.inputs)
        if self.program is not None:
            given = self.program.inputs[n]
        else:
            name = self.fresh(f"I{n}")
            dims = tuple((self.axis(f"i{n}_{d}", size),) if size > 1 else () for d, size in enumerate(shape))
            given = Input(Tensor(name, dims, self.dtype), Storage(self.dtype))
        self.inputs.append(given)
        self.define(declared, given.tensor)

    def output(self, t: Tensor) -> None:
        if self.program is None:
            self.outputs.append(Output(t.name, Storage(t.dtype)))
            return
        if len(self.outputs) == len(self.program.outputs):
            raise ShapeError(f"the graph gives more than {len(self.outputs)} outputs")
        wanted = self.program.outputs[len(self.outputs)]
        like = self.program.tensors()[wanted.value]
        if t.shape != like.shape:
            raise ShapeError(f"output {len(self.outputs)} is {list(t.shape)}, the program's is {list(like.shape)}")
        t = self.under(t, like.dims)
        if t.dtype is not like.dtype:
            t = self.add(Cast(like.dtype), [t], t.dims)
        self.outputs.append(replace(wanted, value=t.name))

    def apply(self, kind: str, args: Sequence[Tensor], declared: Operator, op: str) -> Tensor:
        if kind in UNARY and len(args) == 1:
            return self.add(Elementwise(kind), args, args[0].dims)
        if kind in BINARY and len(args) == 2:
            return self.elementwise(kind, *args)
        if kind == "matmul" and len(args) == 2:
            return self.matmul(*args)
        if kind == "rms_norm" and len(args) == 1:
            return self.rms_norm(args[0])
        if kind.startswith("reduction_") and kind[10:].isdecimal() and len(args) == 1:
            return self.reduction(args[0], int(kind[10:]), _shape(declared))
        raise UnsupportedOpError(f"no {op} with {len(args)} operands is known here", op=op)

    def elementwise(self, fn: str, a: Tensor, b: Tensor) -> Tensor:
        _broadcast(fn, a.shape, b.shape)
        taken = {x.name for x in a.axes}
        like = tuple(() if not y else x or self.apart(y, taken) for x, y in zip(a.dims, b.dims, strict=True))
        b = self.under(b, like)
        return self.add(Elementwise(fn), [a, b], tuple(x or y for x, y in zip(a.dims, like, strict=True)))

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        _fits(a.shape, b.shape)
        last = self.apart(b.dims[-1], {x.name for x in a.axes})
        b = self.under(b, (*a.dims[:-2], a.dims[-1], last))
        op = Contract(tuple(x.name for x in a.dims[-1])) if a.dims[-1] else Elementwise("mul")
        return self.add(op, [a, b], (*a.dims[:-1], last))

    def apart(self, dim: tuple[Axis, ...], taken: set[str]) -> tuple[Axis, ...]:
        """The dimension under axes that are not taken."""
        return tuple(self.axis("n", _int(x.size)) if x.name in taken else x for x in dim)

    def rms_norm(self, a: Tensor) -> Tensor:
        square = self.add(Elementwise("square"), [a], a.dims)
        over, kept = tuple(x.name for x in a.dims[-1]), (*a.dims[:-1], ())
        mean = self.add(Reduce("mean", over), [square], kept) if over else square
        root = self.add(Elementwise("sqrt"), [mean], kept)
        return self.add(Elementwise("div"), [a, root], a.dims)

    def reduction(self, a: Tensor, d: int, shape: Shape) -> Tensor:
        if d >= len(a.dims) or len(shape) != len(a.dims) or shape[d] != 1:
            raise UnsupportedOpError(f"a reduction of {list(a.shape)} along {d} to {list(shape)}")
        if not a.dims[d]:
            return a
        over = tuple(x.name for x in a.dims[d])
        return self.add(Reduce("sum", over), [a], (*a.dims[:d], (), *a.dims[d + 1 :]))


class _Block:
    """One `kn_customized_op`."""

    def __init__(self, outer: _Importer, o: Operator, place: str) -> None:
        b = o["bgraph"]
        self.outer = outer
        self.o = o
        self.number = place.split()[0]
        self.operators: list[Operator] = b["operators"]
        self.grid = {d: outer.axis(f"{d}{self.number}", int(b["grid_dim"][d])) for d in GRID if b["grid_dim"][d] != 1}
        self.rounds = int(b["forloop_range"])
        if self.rounds < 1 or any(_int(a.size) < 1 for a in self.grid.values()):
            raise ParseError("a grid or a loop is counted by less than 1")
        self.loop = outer.axis(f"i{self.number}", self.rounds) if self.rounds > 1 else None
        self.reduction_dimx = int(b["reduction_dimx"])
        self.classes = _Classes()
        self.tiles: dict[object, _Tile] = {}
        self.axes: dict[object, Axis] = {}  # by class
        self.strided: dict[str, tuple[tuple[Axis, ...], object]] = {}  # loads whose last dimension is (step, place)
        self.inner: dict[str, Tensor] = {}  # values by name
        self.loads: list[Load] = []
        self.before: list[Step] = []  # what every iteration sees the same
        self.body: list[Step] = []
        self.epilogue: list[Step] = []
        self.stores: list[Store] = []
        self.targets: dict[object, Tensor] = {}  # by guid of the kernel-level tensor
        self.sources: dict[str, Tensor] = {}
        self.here = ""

    def add(self) -> None:
        """The kernel, as an equation of the graph."""
        todo = list(map(self.planned, range(len(self.operators)), self.operators))
        for i, (o, emit) in enumerate(zip(self.operators, todo, strict=True)):
            self.here = f"{self.number}.{i} {o['op_type']}"
            self.at(emit)
        passes = []
        if self.loop:
            inside = [ld for ld in self.loads if self.loop in ld.value.axes]
            ahead = [ld for ld in self.loads if ld not in inside]
            passes = [Pass((), tuple(ahead), tuple(self.before))] if ahead else []
            passes += [Pass(((self.loop.name, 1),), tuple(inside), tuple(self.body))] if inside else []
        block = BlockGraph(
            grid=tuple((a.name, 1) for a in self.grid.values()),
            split=None,
            passes=tuple(passes),
            loads=() if self.loop else tuple(self.loads),
            epilogue=tuple(self.epilogue),
            stores=tuple(self.stores),
        )
        declared = self.o["output_tensors"]
        if [t["guid"] for t in declared] != list(self.targets):
            raise GraphError("the block operators write other tensors than the kernel gives")
        results = tuple(self.targets.values())
        self.outer.equations.append(Equation(results, Kernel((block,)), tuple(self.sources)))
        for t, found in zip(declared, results, strict=True):
            self.outer.define(t, found)

    def at(self, f: Callable[[], Any]) -> Any:
        try:
            return f()
        except MugraphError as error:
            if error.op is None or not error.op[:1].isdecimal():
                error.op = self.here
            raise

    # -- first pass: shapes, and which dimensions go by one axis -------------------------------------------------

    def planned(self, i: int, o: Operator) -> Callable[[], None]:
        """What emits the operator, once the classes of all dimensions are known."""
        self.here = f"{self.number}.{i} {o['op_type']}"
        found: Callable[[], None] = self.at(lambda: self.plan(i, o))
        return found

    def plan(self, i: int, o: Operator) -> Callable[[], None]:
        kind = str(o["op_type"]).removeprefix("tb_").removeprefix("forloop_").removesuffix("_op")
        if kind == "input":
            return self.plan_input(i, o)
        args = [self.tile(t) for t in o["input_tensors"]]
        if kind == "output":
            return partial(self.store, o, args[0])
        declared = o["output_tensors"][0]
        if kind.startswith("accum_"):
            return self.plan_accumulator(i, kind.removeprefix("accum_"), args, declared, o["op_type"])
        after = all(a.after for a in args)
        if any(a.after for a in args) and not after and self.loop:
            early = next(a for a in args if not a.after)
            raise GraphError(f"{early.name} is not accumulated: iterations 0 and 1 have two values of it")
        if kind in UNARY and len(args) == 1:
            result = self.made(i, declared, args[0].shape, args[0].nodes, after)
            return partial(self.emit, Elementwise(kind), args, [args[0].nodes], result)
        if kind in BINARY and len(args) == 2:
            return self.plan_binary(i, kind, args, declared, after)
        if kind == "matmul" and len(args) == 2:
            return self.plan_matmul(i, args, declared, after)
        if kind == "rms_norm" and len(args) == 1:
            result = self.made(i, declared, args[0].shape, args[0].nodes, after)
            return partial(self.rms_norm, args[0], result)
        if kind.startswith("reduction_") and kind[10:].isdecimal() and len(args) == 1:
            return self.plan_reduction(i, int(kind[10:]), args[0], declared)
        raise UnsupportedOpError(f"no {o['op_type']} with {len(args)} operands is known here", op=o["op_type"])

    def tile(self, t: Operator) -> _Tile:
        if t["guid"] not in self.tiles:
            raise ParseError(f"tile {t['guid']} is used before it is defined")
        found = self.tiles[t["guid"]]
        if _shape(t) != found.shape:
            raise ShapeError(f"tile {t['guid']} is {list(found.shape)}, used as {list(_shape(t))}")
        return found

    def made(
        self, i: int, declared: Operator, shape: Shape, nodes: Sequence[object] | None, after: bool, base: str = "t"
    ) -> _Tile:
        """A new tile; its dimensions are united with `nodes`, or fresh."""
        if _shape(declared) != shape:
            raise ShapeError(f"the tile is {list(shape)}, declared as {list(_shape(declared))}")
        if declared["guid"] in self.tiles:
            raise ParseError(f"tile {declared['guid']} is defined twice")
        own = tuple((i, d) for d in range(len(shape))) if nodes is None else tuple(nodes)
        self.classes.tile(tuple(n for n, size in zip(own, shape, strict=True) if size > 1))
        found = _Tile(self.outer.fresh(base), shape, own, after)
        self.tiles[declared["guid"]] = found
        return found

    def unite(self, a: _Tile, nodes: Sequence[object]) -> None:
        for x, y, size in zip(a.nodes, nodes, a.shape, strict=True):
            if size > 1:
                self.classes.unite(y, x)

    def plan_input(self, i: int, o: Operator) -> Callable[[], None]:
        source, cuts = self.outer.value(o["dtensor"]), []
        whole = tuple(_int(n) for n in source.shape)
        for d, size in enumerate(whole):
            along = [g for g in self.grid if o["input_map"][g] == d]
            if len(along) > 1:
                raise UnsupportedOpError(f"the grid axes {' and '.join(along)} both cut dimension {d}")
            cut = [self.grid[g] for g in along]
            if self.loop and o["forloop_dim"] == d:
                cut.append(self.loop)
            pieces = math.prod(_int(a.size) for a in cut)
            if size % pieces:
                last = ", ".join(f"{a.name}={_int(a.size) - 1}" for a in cut)
                length = math.ceil(size / pieces)
                raise GraphError(
                    f"{pieces} pieces of dimension {d}, of {size} entries, have {length} each: at {last} "
                    f"entry {pieces * length - 1} is read"
                )
            cuts.append(tuple(cut))
        if (loop := o["forloop_dim"]) is not None and loop >= len(whole):
            raise ShapeError(f"the loop cuts dimension {loop} of a tensor with {len(whole)}")
        if any(o["input_map"][g] >= len(whole) for g in self.grid):
            raise ShapeError(f"the grid cuts a dimension of a tensor with {len(whole)} that it lacks")
        shape = tuple(n // math.prod(_int(a.size) for a in cut) for n, cut in zip(whole, cuts, strict=True))
        result = self.made(i, o["output_tensors"][0], shape, None, False, source.name.lower())
        return partial(self.load, source, cuts, result)

    def plan_binary(
        self, i: int, fn: str, args: Sequence[_Tile], declared: Operator, after: bool
    ) -> Callable[[], None]:
        a, b = args
        _broadcast(fn, a.shape, b.shape)
        shape = tuple(map(max, a.shape, b.shape))
        result = self.made(i, declared, shape, None, after)
        self.unite(a, result.nodes)
        self.unite(b, result.nodes)
        return partial(self.emit, Elementwise(fn), args, [result.nodes, result.nodes], result)

    def plan_matmul(self, i: int, args: Sequence[_Tile], declared: Operator, after: bool) -> Callable[[], None]:
        a, b = args
        _fits(a.shape, b.shape)
        batch = tuple((i, "batch", d) for d in range(len(a.shape) - 2))
        row, inner, column = (i, "row"), (i, "inner"), (i, "column")
        sizes = [(n, s) for n, s in zip((*batch, row, inner, column), (*a.shape, b.shape[-1]), strict=True)]
        self.classes.tile(tuple(n for n, s in sizes if s > 1))
        self.unite(a, (*batch, row, inner))
        self.unite(b, (*batch, inner, column))
        result = self.made(i, declared, (*a.shape[:-1], b.shape[-1]), (*batch, row, column), after)

        def emit() -> None:
            op = Contract((self.axis_of(inner, a.shape[-1]).name,)) if a.shape[-1] > 1 else Elementwise("mul")
            self.emit(op, args, [(*batch, row, inner), (*batch, inner, column)], result)

        return emit

    def plan_reduction(self, i: int, d: int, a: _Tile, declared: Operator) -> Callable[[], None]:
        shape = (*a.shape[:d], 1, *a.shape[d + 1 :])
        if d >= len(a.shape) or _shape(declared) != shape:
            raise UnsupportedOpError(f"a reduction of {list(a.shape)} along {d} to {list(_shape(declared))}")
        result = self.made(i, declared, shape, a.nodes, a.after)
        over = (self.classes.of(a.nodes[d]),) if a.shape[d] > 1 else ()
        return lambda: self.emit(self.summed(over, a), [a], [a.nodes], result)

    def summed(self, nodes: Sequence[object], a: _Tile) -> Op:
        axes = tuple(self.axes[self.classes.of(n)].name for n in nodes)
        return Reduce("sum", axes) if axes else IDENTITY

    def plan_accumulator(
        self, i: int, kind: str, args: Sequence[_Tile], declared: Operator, op: str
    ) -> Callable[[], None]:
        (a,) = args
        if a.after:
            raise GraphError(f"{a.name} is accumulated already: there is one value of it")
        rest, last = a.shape[:-1], a.shape[-1]
        if kind == "nored":
            result = self.made(i, declared, a.shape, a.nodes, True)
            return partial(self.accumulate, a, (), result)
        if kind == "red_ld_sum":
            result = self.made(i, declared, (*rest, 1), a.nodes, True)
            return partial(self.accumulate, a, a.nodes[-1:] if last > 1 else (), result)
        if kind == "red_ld_rms":
            result = self.made(i, declared, (*rest, 1), a.nodes, True)
            return partial(self.root_mean_square, a, result)
        if kind == "redtox_ld_sum":
            width = self.reduction_dimx
            if last % width:
                raise ShapeError(f"the last dimension, {last}, is no multiple of reduction_dimx = {width}")
            place = (a.name, "place")
            result = self.made(i, declared, (*rest, width), (*a.nodes[:-1], place), True)
            steps = (self.outer.axis("s", last // width),) if last > width else ()
            if self.only_strided(a):
                self.strided[a.name] = steps, place
            return partial(self.accumulate_strided, a, steps, result)
        raise UnsupportedOpError(f"no accumulator {op} is known here", op=op)

    def only_strided(self, a: _Tile) -> bool:
        """Whether the tile is loaded, and read by one sum of places alone: it can be loaded as steps of places."""
        (guid,) = [g for g, t in self.tiles.items() if t is a]
        readers = [o for o in self.operators if guid in [t["guid"] for t in o["input_tensors"]]]
        makers = [o for o in self.operators if guid in [t["guid"] for t in o["output_tensors"]]]
        return len(readers) == 1 and all(o["op_type"] == "tb_input_op" for o in makers)

    # -- second pass: steps --------------------------------------------------------------------------------------

    def axis_of(self, node: object, size: int) -> Axis:
        root = self.classes.of(node)
        if root not in self.axes:
            self.axes[root] = self.outer.axis("t", size)
        return self.axes[root]

    def dims(self, nodes: Sequence[object], shape: Shape) -> list[Axis | None]:
        return [self.axis_of(n, s) if s > 1 else None for n, s in zip(nodes, shape, strict=True)]

    def step(self, op: Op, args: Sequence[str], name: str | None = None, after: bool = True) -> str:
        e = self.equation(op, args, name)
        self.home(e.target, after).append(e)
        return e.target.name

    def home(self, t: Tensor, after: bool) -> list[Step]:
        """Where a value is computed: after the loop, in it, or, where it is the same in every iteration, before it."""
        if after or self.loop is None:
            return self.epilogue
        return self.body if self.loop in t.axes else self.before

    def equation(self, op: Op, args: Sequence[str], name: str | None = None) -> Equation:
        (found,) = infer(op, [type_of(self.inner[a]) for a in args])
        t = tensor(name or self.outer.fresh("v"), found.axes, DType.f32)
        self.inner[t.name] = t
        return Equation((t,), op, tuple(args))

    def emit(self, op: Op, args: Sequence[_Tile], nodes: Sequence[Sequence[object]], result: _Tile) -> None:
        """One operator, its operands brought under its own axes first."""
        names = [self.renamed(a, own, result.after) for a, own in zip(args, nodes, strict=True)]
        self.step(op, names, result.name, result.after)

    def renamed(self, a: _Tile, nodes: Sequence[object], after: bool) -> str:
        pairs = zip(self.dims(a.nodes, a.shape), self.dims(nodes, a.shape), strict=True)
        moved = tuple((x.name, y) for x, y in pairs if x is not None and y is not None and x != y)
        return self.step(Rename(moved), [a.name], after=after) if moved else a.name

    def load(self, source: Tensor, cuts: Sequence[tuple[Axis, ...]], result: _Tile) -> None:
        own = self.dims(result.nodes, result.shape)
        dims = tuple((*cut, *([a] if a else [])) for cut, a in zip(cuts, own, strict=True))
        if result.name in self.strided:
            steps, place = self.strided[result.name]
            width = result.shape[-1] // math.prod(_int(a.size) for a in steps)
            dims = (*dims[:-1], (*cuts[-1], *steps, *((self.axis_of(place, width),) if width > 1 else ())))
        source = self.divided(source, dims)
        self.sources[source.name] = source
        value = Tensor(result.name, dims, source.dtype)
        if {a.name for a in value.axes} == {a.name for a in source.axes}:
            value = replace(value, dims=source.dims)
        self.inner[value.name] = value
        self.loads.append(Load(value, source.name))

    def divided(self, source: Tensor, dims: Dims) -> Tensor:
        """The kernel-level tensor with dimensions of these sizes."""
        sizes = [[a.size for a in d] for d in dims]
        if [[a.size for a in d] for d in source.dims] == sizes:
            return source
        known = [e.target for e in self.outer.equations if isinstance(e.op, Reshape) and e.args == (source.name,)]
        for t in known:
            if [[a.size for a in d] for d in t.dims] == sizes:
                return t
        base = source.name.lower()
        new = [tuple(self.outer.axis(f"{base}{d}", _int(a.size)) for a in dim) for d, dim in enumerate(dims)]
        return self.outer.under(source, tuple(new))

    def total(self, name: str, over: Sequence[str], target: str | None) -> str:
        """The sum over the loop and some axes of the tile.  What is the same in every iteration is added as often."""
        if self.loop is None:
            return self.step(Reduce("sum", tuple(over)) if over else IDENTITY, [name], target)
        if self.loop in self.inner[name].axes:
            e = self.equation(Reduce("sum", (self.loop.name, *over)), [name], target)
            self.body.append(Accumulator(e, "sum"))
            return e.target.name
        one = self.step(Reduce("sum", tuple(over)), [name]) if over else name
        return self.step(Elementwise("mul"), [one, self.step(SizeOf(self.loop), [])], target)

    def accumulate(self, a: _Tile, over: Sequence[object], result: _Tile) -> None:
        self.total(a.name, [self.axis_of(n, a.shape[-1]).name for n in over], result.name)

    def root_mean_square(self, a: _Tile, result: _Tile) -> None:
        last = self.dims(a.nodes, a.shape)[-1]
        square = self.step(Elementwise("square"), [a.name], after=False)
        value = self.total(square, [last.name] if last else [], None)
        for axis in (self.loop, last):
            if axis is not None:
                value = self.step(Elementwise("div"), [value, self.step(SizeOf(axis), [])])
        self.step(Elementwise("sqrt"), [value], result.name)

    def rms_norm(self, a: _Tile, result: _Tile) -> None:
        last = self.dims(a.nodes, a.shape)[-1]
        value = self.step(Elementwise("square"), [a.name], after=a.after)
        if last is not None:
            value = self.step(Reduce("mean", (last.name,)), [value], after=a.after)
        root = self.step(Elementwise("sqrt"), [value], after=a.after)
        self.step(Elementwise("div"), [a.name, root], result.name, a.after)

    def accumulate_strided(self, a: _Tile, steps: tuple[Axis, ...], result: _Tile) -> None:
        """out[place] = Σ in[place + step * width] over the steps."""
        value = a.name
        if a.name not in self.strided:
            *_, last = self.dims(a.nodes, a.shape)
            *_, place = self.dims(result.nodes, result.shape)
            if last is not None:
                value = self.step(Transpose(), [value], after=False)
                rest = tuple((b,) for b in self.inner[a.name].axes if b != last)
                self.retyped(value, (*rest, (last,)))  # a reshape goes by the order of axes
                dims = (*rest, *((b,) for b in (*steps, *([place] if place else []))))
                value = self.step(Reshape(dims), [value], after=False)
        self.total(value, [b.name for b in steps], result.name)

    def retyped(self, name: str, dims: Dims) -> None:
        """Gives the value of the last step its axes in this order."""
        steps = self.home(self.inner[name], after=False)
        e = steps[-1]
        assert isinstance(e, Equation)
        self.inner[name] = replace(self.inner[name], dims=dims)
        steps[-1] = replace(e, targets=(self.inner[name],))

    def store(self, o: Operator, a: _Tile) -> None:
        name, cuts = a.name, []
        declared = o["dtensor"]
        if self.loop is not None and not a.after:
            raise GraphError(
                f"{a.name} is not accumulated: iterations 0 and 1 write the same elements of {declared['guid']}"
            )
        for d in range(len(a.shape)):
            cut = [self.grid[g] for g in self.grid if o["output_map"][g] == d]
            if len(cut) > 1:
                raise UnsupportedOpError(f"two grid axes write along dimension {d}")
            cuts.append(tuple(cut))
        for g, axis in self.grid.items():
            if axis not in [x for cut in cuts for x in cut]:
                raise GraphError(
                    f"a race: blocks {g}=0 and {g}=1 write the same elements of tensor {declared['guid']}",
                )
        shape = tuple(s * math.prod(_int(x.size) for x in cut) for s, cut in zip(a.shape, cuts, strict=True))
        if shape != _shape(declared):
            raise GraphError(f"the blocks write {list(shape)}, the tensor is {list(_shape(declared))}")
        if missing := tuple(x for x in self.grid.values() if x not in self.inner[name].axes):
            name = self.step(Broadcast(missing), [name])
        own = self.dims(a.nodes, a.shape)
        dims = tuple((*cut, *([x] if x else [])) for cut, x in zip(cuts, own, strict=True))
        if declared["guid"] in self.targets:
            raise GraphError(f"tensor {declared['guid']} is written twice")
        target = Tensor(self.outer.fresh(f"T{self.number}"), dims, next(iter(self.sources.values())).dtype)
        self.stores.append(Store(name, target.name))
        self.targets[declared["guid"]] = target


def _int(size: Size) -> int:
    assert isinstance(size, int)
    return size


def _broadcast(fn: str, a: Sequence[Size], b: Sequence[Size]) -> None:
    """Dimensions of one entry meet any."""
    if len(a) != len(b) or any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        raise ShapeError(f"{fn} of {list(a)} and {list(b)}")


def _fits(a: Sequence[Size], b: Sequence[Size]) -> None:
    """(.., m, k) times (.., k, n)."""
    if len(a) < 2 or len(a) != len(b) or a[-1] != b[-2] or a[:-2] != b[:-2]:
        raise ShapeError(f"matmul of {list(a)} and {list(b)}")
