"""Graphs as text: `str(program)`.

The grammar of the text stands at the top of `parser.py`; `parse_program(str(g)) == g`.  Imap, fmap and omap are
derived from the roles of the axes, printed beside each load and store, and compared when the text is read back.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import assert_never

from mugraph.ir.axes import MAX_SIZE, Axis, Dim, Monomial, Size, dims_of
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Map,
    Pass,
    Program,
    Step,
    Store,
    Thread,
    access_map,
    equations_of,
)
from mugraph.ir.infer import op_text
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Pack,
    Quantize,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    TopK,
    Transpose,
    Unpack,
)  # fmt: skip
from mugraph.ir.types import Dims, DType, Storage, Tensor

NAME = r"[^\W\d]\w*(?:\.\w+)*"
ASSIGN = {"sum": "+=", "rescaled": "+=", "max": "max=", "min": "min="}
_AXES_A_LINE = 8


@dataclass(frozen=True)
class Line:
    """A line of program text and the parts of the graph that it shows."""

    text: str
    nodes: tuple[object, ...]


def program_text(program: Program) -> str:
    """The program as text; `parse_program` reads it back."""
    return "\n".join(line.text for line in program_lines(program))


def block_text(block: BlockGraph) -> str:
    """A block graph as text, with the sizes of all its axes."""
    printer = _Printer(Names())
    printer.block(block, {})
    return "\n".join(line.text for line in printer.lines)


def program_lines(program: Program) -> list[Line]:
    """The lines of the program's text, each with what it shows: errors find their line here."""
    printer = _Printer(Names())
    printer.program(program)
    return printer.lines


def op_head(op: Op) -> str:
    """The operator with its attributes and without its operands: `contract[k]`, `|k|`, `1/8`."""
    return _Printer(Names()).op(op)


def canonical_text(program: Program) -> str:
    """The program's text with programs, values, axes, symbolic sizes and inputs named by order of appearance.
    Programs that differ in names alone have one canonical text: it keys the cache."""
    return text_under(program, _Positional())


def text_under(program: Program, names: Names) -> str:
    """The program's text under other names."""
    printer = _Printer(names)
    printer.program(program)
    return "\n".join(line.text for line in printer.lines)


def load_maps(block: BlockGraph, load: Load, loops: tuple[tuple[str, int], ...]) -> Map:
    """imap and fmap of a load: which dimension of its source each grid axis and each loop axis cuts."""
    return access_map(block, load.value, loops)


def store_map(block: BlockGraph, store: Store) -> Map:
    """omap of a store, and the fmap of one that runs inside a loop.  A partial store has one more dimension in
    front, which the parts of the split cut."""
    value = block.tensors().get(store.value) or Tensor(store.value, (), DType.f32)
    maps = access_map(block, value, _loops_around(block, store.value))
    grid = maps.grid[: len(block.grid)]
    if store.kind != "partial" or block.split is None:
        return Map(grid, maps.loops)
    shifted = tuple((a, None if p is None else p + 1) for a, p in grid)
    return Map((*shifted, (block.split.axis, 0)), maps.loops)


def _loops_around(block: BlockGraph, value: str) -> tuple[tuple[str, int], ...]:
    """The loops in whose every iteration the value is stored: those of its pass, unless it is an accumulator."""
    for p in block.passes:
        inside = {t.name for e in equations_of(p.body) for t in e.targets} - {a.target.name for a in p.accumulators}
        if value in inside:
            return p.loops
    return ()


def map_text(entries: tuple[tuple[str, int | None], ...]) -> str:
    """`{b: 0, n: -}`: the dimension that an axis cuts, or `-` where every block (or iteration) sees the whole."""
    return "{" + ", ".join(f"{quoted(a)}: {'-' if p is None else p}" for a, p in entries) + "}"


def quoted(name: str) -> str:
    """A name as it stands in program text: bare if it looks like a (dotted) identifier, else a JSON string."""
    return name if re.fullmatch(NAME, name) else json.dumps(name)


def op_axes(op: Op) -> tuple[Axis, ...]:
    """The axes that an operator carries with it, other than by name."""
    match op:
        case SizeOf(axis) | Iota(axis):
            return (axis,)
        case TopK(_, out) | Unpack(_, out) | Pack(_, out) | Slice(_, out) | Concat(_, out) | Scatter(_, out):
            return (out,)
        case Reshape(dims):
            return tuple(a for d in dims for a in d)
        case Broadcast(axes):
            return axes
        case Rename(pairs):
            return tuple(a for _, a in pairs)
        case _:
            return ()


def kernel_level_axes(program: Program) -> Iterator[Axis]:
    """Every occurrence of an axis outside the program's kernels and library calls, in order."""
    for i in program.inputs:
        yield from i.tensor.axes
    for e in program.equations:
        yield from op_axes(e.op)
        for t in e.targets:
            yield from t.axes


def block_level_axes(block: BlockGraph) -> Iterator[Axis]:
    """Every occurrence of an axis in the block graph, the combine's excluded."""
    for load in block.all_loads():
        yield from load.value.axes
    for e in equations_of(tuple(block.steps())):
        yield from op_axes(e.op)
        for t in e.targets:
            yield from t.axes


def all_dims(program: Program) -> Iterator[Dim]:
    """Every occurrence of a symbolic size, library calls excluded, in order."""
    for a in kernel_level_axes(program):
        yield from dims_of(a.size)
    for storage in [i.storage for i in program.inputs] + [o.storage for o in program.outputs]:
        for stride in storage.strides or ():
            yield from dims_of(stride)
    for e in program.equations:
        for block in e.op.blocks if isinstance(e.op, Kernel) else ():
            for b in (block, block.combine):
                for a in block_level_axes(b) if b else ():
                    yield from dims_of(a.size)


class Names:
    """How names are printed: as they are."""

    def program(self, name: str) -> str:
        return quoted(name)

    def value(self, name: str) -> str:
        return quoted(name)

    def axis(self, name: str) -> str:
        return quoted(name)

    def dim(self, name: str) -> str:
        return name

    def split(self, axis: str, part: str) -> None:
        """Tells that `part` counts the parts of `axis`."""

    def inner(self) -> Names:
        """The names inside a block graph, whose values are its own."""
        return self

    def nested(self) -> Names:
        """The names inside a library call, which shares nothing with its caller."""
        return self


class _Positional(Names):
    """Names by order of appearance: v0, v1, ... for values, a0, ... for axes, D0, ... for symbolic sizes."""

    def __init__(self, outer: _Positional | None = None) -> None:
        self._values: dict[str, str] = {}
        self._axes: dict[str, str] = outer._axes if outer else {}
        self._dims: dict[str, str] = outer._dims if outer else {}

    def program(self, name: str) -> str:
        return "p"

    def value(self, name: str) -> str:
        return self._values.setdefault(name, f"v{len(self._values)}")

    def axis(self, name: str) -> str:
        return self._axes.setdefault(name, f"a{len(self._axes)}")

    def dim(self, name: str) -> str:
        return self._dims.setdefault(name, f"D{len(self._dims)}")

    def split(self, axis: str, part: str) -> None:
        self._axes[part] = f"{self.axis(axis)}_part"

    def inner(self) -> Names:
        return _Positional(self)

    def nested(self) -> Names:
        return _Positional()


class _Printer:
    def __init__(self, names: Names) -> None:
        self.lines: list[Line] = []
        self.names = names
        self.outer = names  # the names of kernel-level values, as a block's loads and stores use them
        self.depth = 0

    def put(self, text: str, *nodes: object) -> None:
        self.lines.append(Line("  " * self.depth + text, nodes))

    @contextmanager
    def indented(self) -> Iterator[None]:
        self.depth += 1
        yield
        self.depth -= 1

    # -- kernel level --------------------------------------------------------------------------------------------

    def program(self, program: Program) -> None:
        keyword = "mugraph" if isinstance(program, KernelGraph) else "program"
        self.put(f"{keyword} {self.names.program(program.name)}", program)
        scope = {a.name: a for a in reversed(list(kernel_level_axes(program)))}
        values = program.tensors()
        ahead = {id(e) for e in program.ahead()} if isinstance(program, KernelGraph) else set()
        with self.indented():
            for d in {d.name: d for d in all_dims(program)}.values():
                limits = "" if (d.min, d.max) == (1, MAX_SIZE) else f": {d.min}..{d.max}"
                self.put(f"dim {self.names.dim(d.name)}{limits}", d)
            self.axes(list({a.name: scope[a.name] for a in kernel_level_axes(program)}.values()))
            for i in program.inputs:
                words = [f"input {self.typed(i.tensor)}"] + ["constant"] * i.constant
                words += self.storage(i.storage, i.tensor.dtype)
                words += [f"assume {json.dumps(a)}" for a in i.assumptions]
                self.put(" ".join(words), i)
            for e in program.equations:
                self.equation(e, scope, "  # ahead" if id(e) in ahead else "")
            for o in program.outputs:
                words = [f"output {self.names.value(o.value)}"]
                words += self.storage(o.storage, values[o.value].dtype if o.value in values else None)
                words += [f"alias {self.names.value(o.alias_of)}"] if o.alias_of is not None else []
                self.put(" ".join(words), o)

    def axes(self, axes: list[Axis]) -> None:
        for start in range(0, len(axes), _AXES_A_LINE):
            some = axes[start : start + _AXES_A_LINE]
            self.put("axes " + ", ".join(f"{self.names.axis(a.name)} = {self.size(a.size)}" for a in some), *some)

    def equation(self, e: Equation, scope: Mapping[str, Axis], note: str = "") -> None:
        targets = ", ".join(map(self.typed, e.targets))
        self.put(f"{targets} = {self.call(e)}{note}", e)
        with self.indented():
            match e.op:
                case Kernel(blocks):
                    for block in blocks:
                        self.block(block, scope)
                case Library(_, semantics):
                    kept, self.names = self.names, self.names.nested()
                    self.program(semantics)
                    self.names = kept
                case _:
                    pass

    def storage(self, s: Storage, dtype: DType | None) -> list[str]:
        """The storage clause, left out where it says nothing."""
        if dtype is not None and s == Storage(dtype):
            return []
        facts = [str(s.dtype)]
        facts += [f"packing {s.packing}"] if s.packing != 1 else []
        facts += [f"strides ({', '.join(map(self.size, s.strides))})"] if s.strides is not None else []
        facts += [f"divisibility {s.divisibility}"] if s.divisibility != 1 else []
        facts += [f"alignment {s.alignment}"] if s.alignment != 16 else []
        return [f"storage({', '.join(facts)})"]

    # -- block level ---------------------------------------------------------------------------------------------

    def block(self, block: BlockGraph, scope: Mapping[str, Axis], keyword: str = "block") -> None:
        outer, inner = (self.outer, self.names) if keyword == "combine" else (self.names, self.names)
        self.outer, self.names = outer, outer.inner()
        self.put(keyword, block)
        known = dict(scope)
        with self.indented():
            if block.split:
                known[block.split.part.name] = block.split.part
                self.names.split(block.split.axis, block.split.part.name)
            own = {a.name: a for a in block_level_axes(block) if known.get(a.name) != a}
            self.axes(list(own.values()))
            if block.grid:
                self.put(f"grid {self.tiles(block.grid)}", block.grid)
            if block.split:
                self.put(f"split {self.names.axis(block.split.axis)} into {block.split.parts}", block.split)
            for p in block.passes:
                self.loop(block, p)
            if block.loads or block.epilogue:
                self.put("epilogue")
                with self.indented():
                    for load in block.loads:
                        self.load(block, load, ())
                    for step in block.epilogue:
                        self.step(step)
            for store in block.stores:
                kind = "" if store.kind == "write" else f"{store.kind} "
                maps = store_map(block, store)
                fmap = f" fmap{self.map(maps.loops)}" if maps.loops else ""
                stored = f"{self.names.value(store.value)} -> {self.outer.value(store.target)}"
                self.put(f"store {kind}{stored} omap{self.map(maps.grid)}{fmap}", store)
            if block.combine:
                self.block(block.combine, known | own, "combine")
        self.outer, self.names = outer, inner

    def loop(self, block: BlockGraph, p: Pass) -> None:
        self.put(f"loop {self.tiles(p.loops)}" if p.loops else "once", p)
        with self.indented():
            for load in p.loads:
                self.load(block, load, p.loops)
            for step in p.body:
                self.step(step)

    def load(self, block: BlockGraph, load: Load, loops: tuple[tuple[str, int], ...]) -> None:
        maps = load_maps(block, load, loops)
        fmap = f" fmap{self.map(maps.loops)}" if loops else ""
        source = self.outer.value(load.source)
        self.put(f"load {self.typed(load.value)} = {source} imap{self.map(maps.grid)}{fmap}", load)

    def step(self, step: Step) -> None:
        match step:
            case Equation():
                self.put(f"{', '.join(map(self.typed, step.targets))} = {self.call(step)}", step)
            case Accumulator(equation, monoid, scale):
                by = f" rescaled by {self.names.value(str(scale))}" if monoid == "rescaled" else ""
                self.put(f"{self.typed(step.target)} {ASSIGN[monoid]} {self.call(equation)}{by}", step, equation)
            case Thread(graph):
                inputs, outputs = (", ".join(map(self.names.value, v)) for v in (graph.inputs, graph.outputs))
                parts = ", ".join(f"{self.names.axis(a)}: {part}" for a, part in graph.parts)
                self.put(f"thread({inputs}) -> ({outputs})" + (f" over {parts}" if parts else ""), step, graph)
                with self.indented():
                    for e in graph.equations:
                        self.step(e)
            case _:
                assert_never(step)

    def tiles(self, tiles: tuple[tuple[str, int], ...]) -> str:
        return ", ".join(f"{self.names.axis(a)}: {t}" for a, t in tiles)

    def map(self, entries: tuple[tuple[str, int | None], ...]) -> str:
        return "{" + ", ".join(f"{self.names.axis(a)}: {'-' if p is None else p}" for a, p in entries) + "}"

    # -- types, sizes and operators ------------------------------------------------------------------------------

    def size(self, size: Size) -> str:
        match size:
            case int():
                return str(size)
            case Dim(name):
                return self.names.dim(name)
            case Monomial(coefficient, powers):
                head = [] if coefficient == 1 and powers else [str(coefficient)]
                tail = sorted(self.names.dim(d.name) + ("" if p == 1 else f"^{p}") for d, p in powers)
                return "*".join(head + tail)

    def dims(self, dims: Dims) -> str:
        def one(d: tuple[Axis, ...]) -> str:
            names = " ".join(self.names.axis(a.name) for a in d)
            return "1" if not d else names if len(d) == 1 else f"({names})"

        return ", ".join(map(one, dims))

    def typed(self, t: Tensor) -> str:
        return f"{self.names.value(t.name)}: {t.dtype}[{self.dims(t.dims)}]"

    def call(self, e: Equation) -> str:
        """`contract[k](x, w)`.  A literal or a size names its own type only where it is not the target's."""
        match e.op:
            case Const(_, dtype) | SizeOf(_, dtype):
                return self.op(e.op) + ("" if e.targets and e.targets[0].dtype is dtype else f" as {dtype}")
            case _:
                return f"{self.op(e.op)}({', '.join(map(self.names.value, e.args))})"

    def names_of(self, axes: tuple[str, ...]) -> str:
        return ", ".join(map(self.names.axis, axes))

    def op(self, op: Op) -> str:
        """The operator with its attributes, without operands."""
        axis = self.names.axis
        match op:
            case Elementwise(fn, attrs):
                facts = [
                    f"{quoted(key)}={value if isinstance(value, Fraction) else quoted(value)}" for key, value in attrs
                ]
                return fn + (f"[{', '.join(facts)}]" if facts else "")
            case Const(value):
                return str(value)
            case SizeOf(a):
                return f"|{axis(a.name)}|"
            case Iota(a):
                return f"iota[{axis(a.name)}]"
            case Contract(axes):
                return f"contract[{self.names_of(axes)}]"
            case Reduce(kind, axes):
                return f"{kind}[{self.names_of(axes)}]"
            case CumSum(a) | Gather(a):
                return f"{op_text(op)}[{axis(a)}]"
            case TopK(a, out):
                return f"topk[{axis(a)} -> {axis(out.name)}]"
            case Cast(dtype) | Quantize(dtype):
                return f"{op_text(op)}[{dtype}]"
            case Unpack(a, out, dtype) | Pack(a, out, dtype):
                return f"{op_text(op)}[{axis(a)} -> {axis(out.name)}, {dtype}]"
            case Reshape(dims):
                return f"reshape[{self.dims(dims)}]"
            case Broadcast(new):
                return f"broadcast[{self.names_of(tuple(a.name for a in new))}]"
            case Slice(a, out, start, step):
                stride = "" if step == 1 else f", step={step}"
                return f"slice[{axis(a)} -> {axis(out.name)}, start={start}{stride}]"
            case Concat(axes, out):
                return f"concat[{self.names_of(axes)} -> {axis(out.name)}]"
            case Rename(pairs):
                return f"rename[{', '.join(f'{axis(old)} -> {axis(new.name)}' for old, new in pairs)}]"
            case Scatter(axes, out, kind):
                names = ", ".join(map(axis, axes))
                return f"scatter[{names} -> {axis(out.name)}" + ("]" if kind == "sum" else f", {kind}]")
            case Library(name, _):
                return f"library[{json.dumps(name)}]"
            case Compare() | Select() | MaskedExp() | Transpose() | Kernel():
                return op_text(op)
            case _:
                assert_never(op)
