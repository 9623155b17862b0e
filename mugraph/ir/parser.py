"""Program text read back: `parse_program(str(g)) == g`.

One statement a line; indentation nests; `#` starts a comment.  `x*` is a list with commas, `[x]` an optional part.

    program   = ("program" | "mugraph") name  {dim | axes | input | equation | output}
    dim       = "dim" NAME [":" INT ".." INT]                         without limits: 1 .. 2**31 - 1
    axes      = "axes" (name "=" size)*                               in a block: the axes that are the block's own
    input     = "input" target ["constant"] [storage] {"assume" STRING}
    output    = "output" name [storage] ["alias" name]
    storage   = "storage(" dtype ["," "packing" INT] ["," "strides" "(" size* ")"] ["," "divisibility" INT]
                ["," "alignment" INT] ")"                             without: the tensor's dtype, dense, row-major
    equation  = target* "=" call                                      kernel: {block} below; library: a program below
    target    = name ":" dtype "[" dim* "]"                           dim = name | "(" name name ... ")" | "1"
    block     = "block"  {axes} ["grid" tile*] ["split" name "into" INT] {pass} [epilogue] {store} [combine]
    combine   = "combine"  as block
    pass      = ("loop" tile* | "once")  {load | step}                tile = name ":" INT
    epilogue  = "epilogue"  {load | step}
    load      = "load" target "=" name ["imap" map] ["fmap" map]      map = "{" (name ":" (INT | "-"))* "}"
    store     = "store" ["partial" | "atomic"] name "->" name ["omap" map] ["fmap" map]
    step      = equation | accumulator | thread
    accumulator = target ("+=" | "max=" | "min=") call ["rescaled" "by" name]
    thread    = "thread" "(" name* ")" "->" "(" name* ")" ["over" (name ":" part)*]  {equation}
    call      = RATIONAL ["as" dtype] | "|" name "|" ["as" dtype]     without dtype: the target's
              | op ["[" attributes "]"] "(" name* ")"
    size      = INT | RATIONAL "*" ... NAME ["^" INT] "*" ...
    name      = identifiers with dots | a JSON string

Maps are derived; where the text states one, it must be the derived one.  Attributes per operator: see `_operator`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NoReturn, TypeVar, get_args

from mugraph.errors import MugraphError, ParseError, underline
from mugraph.ir.axes import MAX_SIZE, Axis, Dim, Monomial, Size, over, times
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Monoid,
    Part,
    Pass,
    Program,
    Split,
    Step,
    Store,
    Thread,
    ThreadGraph,
)
from mugraph.ir.ops import (
    FUNCTIONS,
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
    ReduceKind,
    Relation,
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
from mugraph.ir.printer import NAME, load_maps, map_text, store_map
from mugraph.ir.types import Dims, DType, Input, Output, Storage, Tensor

_TOKEN = re.compile(
    rf"""\s*(?:(?P<comment>\#.*) | (?P<string>"(?:[^"\\]|\\.)*") | (?P<name>{NAME})
    | (?P<int>-?\d+) | (?P<sign>->|\.\.|\+=|[-=:,()\[\]{{}}|/*^]))""",
    re.VERBOSE,
)
_MONOID: dict[str, Monoid] = {"+=": "sum", "max=": "max", "min=": "min"}

T = TypeVar("T")


def parse_program(text: str) -> Program | KernelGraph:
    """The program that `text` describes; the inverse of `str(program)`.  Raises ParseError with the line underlined.

    The graph is read, not checked: see `check`.
    """
    roots = _lines(text)
    if not roots:
        raise ParseError("the text holds no program", remedy="start it with `program NAME` or `mugraph NAME`")
    if len(roots) > 1:
        roots[1].fail("a second program; the text of one program is indented below its first line")
    return _Program(roots[0]).read()


@dataclass
class _Line:
    """A line: its tokens, read from the front, and the lines indented below it."""

    text: str
    number: int
    indent: int
    tokens: list[tuple[str, str]]
    below: list[_Line] = field(default_factory=list)
    at: int = 0

    def fail(self, message: str, remedy: str | None = None) -> NoReturn:
        raise ParseError(f"line {self.number}: {message}\n{underline(self.text, self.number)}", remedy=remedy)

    def peek(self, ahead: int = 0) -> str:
        """The coming token's text, or '' at the end of the line."""
        return self.tokens[self.at + ahead][1] if self.at + ahead < len(self.tokens) else ""

    def kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self, *kinds: str) -> str:
        if self.kind() not in kinds:
            self.fail(f"expected {' or '.join(kinds)}, found {self.peek() or 'the end of the line'!r}")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def accept(self, token: str) -> bool:
        """Whether the coming token is this sign or bare word (never a string); it is then read."""
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            self.fail(f"expected {token!r}, found {self.peek() or 'the end of the line'!r}")

    def end(self) -> None:
        if self.at < len(self.tokens):
            self.fail(f"unexpected {self.peek()!r}")

    def leaf(self) -> None:
        self.end()
        if self.below:
            self.below[0].fail("nothing can be nested here")

    def name(self) -> str:
        text = self.take("name", "string")
        return json.loads(text) if text.startswith('"') else text

    def integer(self) -> int:
        return int(self.take("int"))

    def rational(self) -> Fraction:
        top = self.integer()
        return Fraction(top, self.integer() if self.accept("/") else 1)

    def word(self, known: tuple[str, ...], what: str) -> str:
        found = self.name()
        if found not in known:
            self.fail(f"there is no {what} {found!r}", f"known: {', '.join(known)}")
        return found

    def dtype(self) -> DType:
        return DType(self.word(tuple(d.value for d in DType), "dtype"))

    def series(self, close: str, item: Callable[[], T]) -> tuple[T, ...]:
        """Items with commas between them, up to the token `close` ('' is the end of the line)."""
        found: list[T] = []
        while self.peek() != close:
            if found:
                self.expect(",")
            found.append(item())
        if close:
            self.expect(close)
        return tuple(found)

    def names(self, open: str, close: str) -> tuple[str, ...]:
        self.expect(open)
        return self.series(close, self.name)

    def pair(self, second: Callable[[], T]) -> tuple[str, T]:
        name = self.name()
        self.expect(":")
        return name, second()

    def starts_equation(self) -> bool:
        return self.peek(1) == ":"


def _lines(text: str) -> list[_Line]:
    """The lines of the text, nested by indentation; blank lines and comments left out."""
    roots: list[_Line] = []
    open_lines: list[_Line] = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = _Line(text, number, len(raw) - len(raw.lstrip()), [])
        at = 0
        while raw[at:].strip():
            match = _TOKEN.match(raw, at)
            if match is None:
                line.fail(f"unreadable at {raw[at:].strip()[:20]!r}")
            at = match.end()
            kind = str(match.lastgroup)
            if kind != "comment":
                line.tokens.append((kind, match.group(kind)))
        if not line.tokens:
            continue
        while open_lines and open_lines[-1].indent >= line.indent:
            open_lines.pop()
        siblings = open_lines[-1].below if open_lines else roots
        if siblings and siblings[0].indent != line.indent:
            line.fail("this indentation matches no line above")
        siblings.append(line)
        open_lines.append(line)
    return roots


class _Program:
    """Reads one program: its symbols and axes, then its statements in order."""

    def __init__(self, root: _Line) -> None:
        self.root = root
        self.dims: dict[str, Dim] = {}
        self.axes: dict[str, Axis] = {}
        self.values: dict[str, Tensor] = {}

    def read(self) -> Program:
        kind = KernelGraph if self.root.word(("program", "mugraph"), "kind of graph") == "mugraph" else Program
        name = self.root.name()
        self.root.end()
        inputs: list[Input] = []
        equations: list[Equation] = []
        outputs: list[Output] = []
        for line in self.root.below:
            if line.starts_equation():
                equations.append(self.located(line, lambda line: self.equation(line, self.axes)))
                self.values.update((t.name, t) for t in equations[-1].targets)
            elif line.accept("dim"):
                self.located(line, self.dim)
            elif line.accept("axes"):
                self.located(line, lambda line: self.declare(line, self.axes))
            elif line.accept("input"):
                inputs.append(self.located(line, self.input))
                self.values[inputs[-1].name] = inputs[-1].tensor
            elif line.accept("output"):
                outputs.append(self.located(line, self.output))
            else:
                line.fail(f"unexpected {line.peek()!r}", "one of: dim, axes, input, output, name: type = ...")
        return kind(name, tuple(inputs), tuple(equations), tuple(outputs))

    def located(self, line: _Line, read: Callable[[_Line], T]) -> T:
        """Reads the line; whatever the IR refuses while it is built is an error of this line."""
        try:
            return read(line)
        except ParseError:
            raise
        except MugraphError as error:
            line.fail(error.message, error.remedy)

    # -- declarations --------------------------------------------------------------------------------------------

    def dim(self, line: _Line) -> None:
        name, low, high = line.name(), 1, MAX_SIZE
        if line.accept(":"):
            low = line.integer()
            line.expect("..")
            high = line.integer()
        line.leaf()
        if name in self.dims:
            line.fail(f"the symbol {name} is declared twice")
        self.dims[name] = Dim(name, low, high)

    def declare(self, line: _Line, axes: dict[str, Axis]) -> None:
        def one() -> None:
            name = line.name()
            line.expect("=")
            axes[name] = Axis(name, self.size(line))

        line.series("", one)
        line.leaf()

    def size(self, line: _Line) -> Size:
        result: Size = 1
        while True:
            if line.kind() == "int":
                result = times(result, Monomial(line.rational(), ()))
            else:
                name = line.name()
                if name not in self.dims:
                    line.fail(f"there is no symbolic size {name}", f"declare it: dim {name}: 1..4096")
                power = line.integer() if line.accept("^") else 1
                for _ in range(abs(power)):
                    result = times(result, self.dims[name]) if power > 0 else over(result, self.dims[name])
            if not line.accept("*"):
                return result

    def input(self, line: _Line) -> Input:
        tensor = self.target(line, self.axes)
        constant = line.accept("constant")
        storage = self.storage(line, tensor.dtype)
        assumptions = []
        while line.accept("assume"):
            assumptions.append(str(json.loads(line.take("string"))))
        line.leaf()
        return Input(tensor, storage, constant, tuple(assumptions))

    def output(self, line: _Line) -> Output:
        value = line.name()
        storage = self.storage(line, self.values[value].dtype if value in self.values else None)
        alias = line.name() if line.accept("alias") else None
        line.leaf()
        return Output(value, storage, alias)

    def storage(self, line: _Line, dtype: DType | None) -> Storage:
        if not line.accept("storage"):
            if dtype is None:
                line.fail("the output has no value of that name, and no storage clause")
            return Storage(dtype)
        line.expect("(")
        stored = line.dtype()
        facts: dict[str, Any] = {}
        while line.accept(","):
            word = line.word(("packing", "strides", "divisibility", "alignment"), "fact of storage")
            if word == "strides":
                line.expect("(")
                facts[word] = line.series(")", lambda: self.size(line))
            else:
                facts[word] = line.integer()
        line.expect(")")
        return Storage(stored, **facts)

    # -- equations -----------------------------------------------------------------------------------------------

    def axis(self, line: _Line, axes: Mapping[str, Axis]) -> Axis:
        name = line.name()
        if name not in axes:
            line.fail(f"there is no axis {name}", f"declare it: axes {name} = 64")
        return axes[name]

    def dimension(self, line: _Line, axes: Mapping[str, Axis]) -> tuple[Axis, ...]:
        if line.accept("1"):
            return ()
        if not line.accept("("):
            return (self.axis(line, axes),)
        found = []
        while not line.accept(")"):
            found.append(self.axis(line, axes))
        return tuple(found)

    def dimensions(self, line: _Line, axes: Mapping[str, Axis]) -> Dims:
        return line.series("]", lambda: self.dimension(line, axes))

    def target(self, line: _Line, axes: Mapping[str, Axis]) -> Tensor:
        name = line.name()
        line.expect(":")
        dtype = line.dtype()
        line.expect("[")
        return Tensor(name, self.dimensions(line, axes), dtype)

    def targets(self, line: _Line, axes: Mapping[str, Axis]) -> tuple[Tensor, ...]:
        found = [self.target(line, axes)]
        while line.accept(","):
            found.append(self.target(line, axes))
        return tuple(found)

    def equation(self, line: _Line, axes: dict[str, Axis]) -> Equation:
        targets = self.targets(line, axes)
        line.expect("=")
        return self.right_side(line, targets, axes)

    def right_side(self, line: _Line, targets: tuple[Tensor, ...], axes: dict[str, Axis]) -> Equation:
        op, args = self.call(line, targets[0].dtype, axes)
        if isinstance(op, Kernel | Library):
            line.end()
        else:
            line.leaf()
        return Equation(targets, op, args)

    def call(self, line: _Line, dtype: DType, axes: dict[str, Axis]) -> tuple[Op, tuple[str, ...]]:
        if line.kind() == "int":
            value = line.rational()
            return Const(value, line.dtype() if line.accept("as") else dtype), ()
        if line.accept("|"):
            axis = self.axis(line, axes)
            line.expect("|")
            return SizeOf(axis, line.dtype() if line.accept("as") else dtype), ()
        head = line.take("name")
        if head == "kernel":
            args = line.names("(", ")")
            return Kernel(tuple(_Block(self, child, axes).read("block") for child in line.below)), args
        bracketed = line.accept("[")
        op = self.operator(line, head, bracketed, axes)
        return op, line.names("(", ")")

    def operator(self, line: _Line, head: str, bracketed: bool, axes: Mapping[str, Axis]) -> Op:
        """The operator `head`, its attributes read up to the closing bracket."""
        is_reduction = head in get_args(ReduceKind) and bracketed and line.peek(1) != "="
        if head in FUNCTIONS and not is_reduction:
            return Elementwise(head, line.series("]", lambda: self.attribute(line)) if bracketed else ())
        if head in get_args(Relation):
            op: Op = Compare(head)  # type: ignore[arg-type]
        elif head in _PLAIN:
            op = _PLAIN[head]()
        elif not bracketed:
            line.fail(f"there is no operator {head!r} without attributes")
        elif is_reduction:
            return Reduce(head, line.series("]", line.name))  # type: ignore[arg-type]
        else:
            return self.attributed(line, head, axes)
        if bracketed:
            line.fail(f"{head} takes no attributes")
        return op

    def attribute(self, line: _Line) -> tuple[str, str | Fraction]:
        key = line.name()
        line.expect("=")
        return key, line.rational() if line.kind() == "int" else line.name()

    def attributed(self, line: _Line, head: str, axes: Mapping[str, Axis]) -> Op:
        op: Op
        match head:
            case "contract":
                return Contract(line.series("]", line.name))
            case "reshape":
                return Reshape(self.dimensions(line, axes))
            case "broadcast":
                return Broadcast(line.series("]", lambda: self.axis(line, axes)))
            case "rename":
                return Rename(line.series("]", lambda: self.arrow(line, axes)))
            case "library":
                name = str(json.loads(line.take("string")))
                if len(line.below) != 1:
                    line.fail("a library call has its meaning below it", "indent one program below this line")
                op = Library(name, _Program(line.below[0]).read())
            case "iota":
                op = Iota(self.axis(line, axes))
            case "cumsum":
                op = CumSum(line.name())
            case "gather":
                op = Gather(line.name())
            case "cast":
                op = Cast(line.dtype())
            case "quantize":
                op = Quantize(line.dtype())
            case "topk":
                op = TopK(*self.arrow(line, axes))
            case "unpack" | "pack":
                old, new = self.arrow(line, axes)
                line.expect(",")
                op = (Unpack if head == "unpack" else Pack)(old, new, line.dtype())
            case "slice":
                old, new = self.arrow(line, axes)
                line.expect(",")
                facts = dict([self.fact(line, "start")] + ([self.fact(line, "step")] if line.accept(",") else []))
                op = Slice(old, new, **facts)
            case "concat":
                op = Concat(*self.arrows(line, axes))
            case "scatter":
                closed, new = self.arrows(line, axes)
                kind = line.word(("sum", "write"), "kind of scatter") if line.accept(",") else "sum"
                op = Scatter(closed, new, kind)  # type: ignore[arg-type]
            case _:
                line.fail(f"there is no operator {head!r}")
        line.expect("]")
        return op

    def arrow(self, line: _Line, axes: Mapping[str, Axis]) -> tuple[str, Axis]:
        old = line.name()
        line.expect("->")
        return old, self.axis(line, axes)

    def arrows(self, line: _Line, axes: Mapping[str, Axis]) -> tuple[tuple[str, ...], Axis]:
        joined = [line.name()]
        while line.accept(","):
            joined.append(line.name())
        line.expect("->")
        return tuple(joined), self.axis(line, axes)

    def fact(self, line: _Line, key: str) -> tuple[str, int]:
        line.expect(key)
        line.expect("=")
        return key, line.integer()


_PLAIN: dict[str, Callable[[], Op]] = {"select": Select, "maskedexp": MaskedExp, "transpose": Transpose}


class _Block:
    """Reads one block graph, or a combine."""

    def __init__(self, program: _Program, root: _Line, axes: Mapping[str, Axis]) -> None:
        self.program = program
        self.root = root
        self.axes = dict(axes)
        self.stated: list[tuple[_Line, object, tuple[tuple[str, int], ...], dict[str, str]]] = []

    def read(self, keyword: str) -> BlockGraph:
        self.root.expect(keyword)
        self.root.end()
        grid: tuple[tuple[str, int], ...] = ()
        split: Split | None = None
        passes: list[Pass] = []
        loads: tuple[Load, ...] = ()
        epilogue: tuple[Step, ...] = ()
        stores: list[Store] = []
        combine: BlockGraph | None = None
        for line in self.root.below:
            if line.accept("axes"):
                self.program.located(line, lambda line: self.program.declare(line, self.axes))
            elif line.accept("grid"):
                grid = line.series("", lambda line=line: line.pair(line.integer))  # type: ignore[misc]
                line.leaf()
            elif line.accept("split"):
                split = self.split(line)
            elif line.accept("loop"):
                loops = line.series("", lambda line=line: line.pair(line.integer))  # type: ignore[misc]
                passes.append(Pass(loops, *self.body(line, loops)))
            elif line.accept("once"):
                passes.append(Pass((), *self.body(line, ())))
            elif line.accept("epilogue"):
                loads, epilogue = self.body(line, ())
            elif line.accept("store"):
                stores.append(self.store(line))
            elif line.peek() == "combine":
                combine = _Block(self.program, line, self.axes).read("combine")
            else:
                line.fail(
                    f"unexpected {line.peek()!r} in a block",
                    "one of: axes, grid, split, loop, once, epilogue, store, combine",
                )
        block = BlockGraph(grid, split, tuple(passes), loads, epilogue, tuple(stores), combine)
        self.compare_maps(block)
        return block

    def split(self, line: _Line) -> Split:
        axis = line.name()
        line.expect("into")
        split = Split(axis, line.integer())
        line.leaf()
        self.axes[split.part.name] = split.part
        return split

    def body(self, line: _Line, loops: tuple[tuple[str, int], ...]) -> tuple[tuple[Load, ...], tuple[Step, ...]]:
        line.end()
        loads: list[Load] = []
        steps: list[Step] = []
        for child in line.below:
            if not child.starts_equation() and child.accept("load"):
                loads.append(self.program.located(child, lambda child: self.load(child, loops)))
            else:
                steps.append(self.program.located(child, self.step))
        return tuple(loads), tuple(steps)

    def load(self, line: _Line, loops: tuple[tuple[str, int], ...]) -> Load:
        value = self.program.target(line, self.axes)
        line.expect("=")
        load = Load(value, line.name())
        self.state(line, load, loops, ("imap", "fmap"))
        return load

    def store(self, line: _Line) -> Store:
        kind: Any = "write"
        if line.peek(1) != "->":
            kind = line.word(("partial", "atomic"), "kind of store")
        value = line.name()
        line.expect("->")
        store = Store(value, line.name(), kind)
        self.state(line, store, (), ("omap", "fmap"))
        return store

    def state(self, line: _Line, node: object, loops: tuple[tuple[str, int], ...], kinds: tuple[str, ...]) -> None:
        """Reads the maps that the line states, to be compared once the block is known."""
        stated = {kind: self.map(line) for kind in kinds if line.accept(kind)}
        line.leaf()
        self.stated.append((line, node, loops, stated))

    def map(self, line: _Line) -> str:
        line.expect("{")
        entries = line.series("}", lambda: line.pair(lambda: None if line.accept("-") else line.integer()))
        return map_text(entries)

    def compare_maps(self, block: BlockGraph) -> None:
        for line, node, loops, stated in self.stated:
            if isinstance(node, Load):
                maps = load_maps(block, node, loops)
                derived = {"imap": map_text(maps.grid), "fmap": map_text(maps.loops)}
            else:
                assert isinstance(node, Store)
                maps = store_map(block, node)
                derived = {"omap": map_text(maps.grid), "fmap": map_text(maps.loops)}
            for kind, text in stated.items():
                if text != derived[kind]:
                    line.fail(f"the {kind} is {derived[kind]}, not {text}", f"leave the {kind} out, or correct it")

    def step(self, line: _Line) -> Step:
        if line.peek() == "thread" and not line.starts_equation():
            return self.thread(line)
        if not line.starts_equation():
            line.fail(f"unexpected {line.peek()!r}", "one of: load, thread, name: type = ..., name: type += ...")
        targets = self.program.targets(line, self.axes)
        sign = line.take("sign", "name")
        if sign in ("max", "min") and line.accept("="):
            sign += "="
        if sign not in ("=", *_MONOID):
            line.fail(f"expected an assignment, found {sign!r}", f"one of: =, {', '.join(_MONOID)}")
        if sign == "=":
            return self.program.right_side(line, targets, self.axes)
        equation = Equation(targets, *self.program.call(line, targets[0].dtype, self.axes))
        monoid, scale = _MONOID[sign], None
        if line.accept("rescaled"):
            line.expect("by")
            monoid, scale = "rescaled", line.name()
        line.leaf()
        return Accumulator(equation, monoid, scale)

    def thread(self, line: _Line) -> Thread:
        line.expect("thread")
        inputs = line.names("(", ")")
        line.expect("->")
        outputs = line.names("(", ")")
        parts: tuple[tuple[str, Any], ...] = ()
        if line.accept("over"):
            parts = line.series("", lambda: line.pair(lambda: line.word(get_args(Part), "part")))
        line.end()
        equations = tuple(
            self.program.located(child, lambda child: self.program.equation(child, self.axes)) for child in line.below
        )
        return Thread(ThreadGraph(inputs, parts, equations, outputs))
