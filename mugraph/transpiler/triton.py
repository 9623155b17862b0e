"""Plans as Triton source.

    emit(plan) -> str

The file stands alone: it imports torch and triton, holds one `@triton.jit` kernel per launch, one torch function per
library call, `run(inputs..., out=None)`, and `SIGNATURES`, the table by which the kernels compile ahead of time.
"""

from __future__ import annotations

import keyword
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from mugraph.codegen.lower import divides
from mugraph.codegen.passes import refuse
from mugraph.codegen.plan import (
    Accumulate,
    Action,
    Beside,
    Buffer,
    Call,
    Combined,
    Compute,
    Extent,
    Index,
    Launch,
    Options,
    Piece,
    Plan,
    Read,
    Scope,
    Torch,
    Write,
    equation_text,
)  # fmt: skip
from mugraph.errors import GraphError, UnsupportedOpError
from mugraph.ir.axes import MAX_SIZE, Axis, Dim, Size, dims_of, largest, product, representative
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Iota,
    MaskedExp,
    Reduce,
    Rename,
    Select,
    SizeOf,
)  # fmt: skip
from mugraph.ir.types import GREATEST, TORCH_NAMES, DType, Input, Output, Storage, Tensor
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.divided import OWN_NAMES, WIDTH, call_lines, divided_text, kept_text
from mugraph.transpiler.signature import bindings, size_text
from mugraph.verify.source import COUNTERS, DESCRIPTORS, MULTIPROCESSORS

TL = {
    DType.f64: "tl.float64", DType.f32: "tl.float32", DType.bf16: "tl.bfloat16", DType.f16: "tl.float16",
    DType.f8e4m3: "tl.float8e4nv", DType.f8e5m2: "tl.float8e5", DType.i64: "tl.int64", DType.i32: "tl.int32",
    DType.i16: "tl.int16", DType.i8: "tl.int8", DType.u8: "tl.uint8", DType.bool: "tl.int1",
}  # fmt: skip
POINTER = {
    DType.f64: "*fp64", DType.f32: "*fp32", DType.bf16: "*bf16", DType.f16: "*fp16", DType.f8e4m3: "*fp8e4nv",
    DType.f8e5m2: "*fp8e5", DType.i64: "*i64", DType.i32: "*i32", DType.i16: "*i16", DType.i8: "*i8",
    DType.u8: "*u8", DType.bool: "*i1",
}  # fmt: skip
RELATION = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
NEUTRAL = {"sum": "0.0", "max": 'float("-inf")', "min": 'float("inf")'}


def neutral(kind: str, dtype: DType) -> str:
    """What leaves a sum or an extreme of such numbers as it is."""
    if dtype.is_float or kind not in NEUTRAL:
        return NEUTRAL[kind]
    if kind == "sum":
        return "0"
    low = 0 if dtype in (DType.u8, DType.bool) else -(2 ** (dtype.bits - 1))
    return str(low if kind == "max" else low + 2**dtype.bits - 1)


LINE = 128  # bytes that come into L2 together
LOG2E = 1.4426950408889634
DEEPEST_F8 = 128  # products of f8 that sm_90 sums with 14 bits, before f32 takes the sum
# Functions that take more than an expression, emitted where they are used.
HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """tanh in f32; the quotient cancels near 0, where three terms of the series are exact to rounding."""
    x2 = x * x
    series = x * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.04, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))''',
    "sine": '''@triton.jit
def sine(x, quarter):
    """sin(x + quarter * pi / 2) in f32: quarter turns are taken off in f64, and series are exact to rounding then."""
    wide = x.to(tl.float64)
    quarters = tl.floor(wide * 0.6366197723675814 + 0.5)
    rest = ((wide - quarters * 1.5707963267948966) - quarters * 6.123233995736766e-17).to(tl.float32)
    x2 = rest * rest
    sin = rest * (1.0 - x2 / 6.0 * (1.0 - x2 / 20.0 * (1.0 - x2 / 42.0 * (1.0 - x2 / 72.0))))
    cos = 1.0 - x2 / 2.0 * (1.0 - x2 / 12.0 * (1.0 - x2 / 30.0 * (1.0 - x2 / 56.0 * (1.0 - x2 / 90.0))))
    turn = (quarters.to(tl.int64) + quarter) & 3
    found = tl.where((turn & 1) == 0, sin, cos)
    return tl.where((turn & 2) == 0, found, -found)''',
    "expm1": '''@triton.jit
def expm1(x):
    """exp(x) - 1 in f32; the difference cancels near 0, where a series is exact to rounding."""
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0)))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))
    return tl.where(tl.abs(x) < 0.35, series, tl.exp2(x * LOG2E) - 1.0)''',
    "log1p": '''@triton.jit
def log1p(x):
    """log(1 + x) in f32; the sum rounds near 0, where the series of 2 atanh(x / (x + 2)) is exact to rounding."""
    s = x / (x + 2.0)
    s2 = s * s
    series = 2.0 * s * (1.0 + s2 * (1.0 / 3.0 + s2 * (1.0 / 5.0 + s2 * (1.0 / 7.0 + s2 * (1.0 / 9.0)))))
    return tl.where(tl.abs(x) < 0.375, series, tl.log(1.0 + x))''',
    "gelu": '''@triton.jit
def gelu(x):
    """x times the normal distribution function of x."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))''',
    "gelu_tanh": '''@triton.jit
def gelu_tanh(x):
    """gelu by tanh: 0.5 * (1 + tanh(u)) is the sigmoid of 2 * u."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(-2.0 * u * LOG2E))''',
    "from_e4m3": '''@triton.jit
def from_e4m3(code):
    """Codes of f8e4m3 as f16: the same bits, with an exponent that is 8 too low; 127 is no number."""
    low = code.to(tl.uint16) & 127
    bits = ((code.to(tl.uint16) & 128) << 8) | (low << 7)
    value = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(low == 127, float("nan"), value).to(tl.float16)''',
    "round_even": '''@triton.jit
def round_even(x):
    """The nearest whole number, halves to even: 1.5 * 2**23 leaves no room for a fraction."""
    return tl.where(tl.abs(x) < 4194304.0, (x + 12582912.0) - 12582912.0, x)''',
}
# A kernel that may start before the one before it has ended waits for its results, and lets the next one start.
WAIT = ("if PDL:", "    tl.extra.cuda.gdc_wait()")
PREFETCH = "prefetch.global.L2 [$1]; mov.u32 $0, 0;"
RELEASE = ("if PDL:", "    tl.extra.cuda.gdc_launch_dependents()")
ROW = 128  # bits that the innermost dimension of a descriptor's tile has at least, and that strides are multiples of
MOST_DESCRIBED = 5  # dimensions of a descriptor
RESERVED = {
    *keyword.kwlist,
    *HELPERS,
    *OWN_NAMES,
    "tl",
    "torch",
    "triton",
    "run",
    "out",
    "range",
    "grid",
    "pid",
    "tile",
    "part",
    "counters",
    "_counters",
    "min",
    "multiprocessors",
    "descriptors",
    "descriptors_on",
    "DESCRIPTORS",
    "DOT",
    "PDL",
    "LOG2E",
    "SIGNATURES",
    "float",
}


def emit(plan: Plan) -> str:
    """The plan as a Python file.  Raises UnsupportedOpError, naming the operator, where there is no Triton for it."""
    kernels: dict[str, _Kernel] = {}
    groups: dict[str, _Together] = {}
    texts: list[str] = []
    runs: list[str] = []
    for part, function in ((plan.ahead, "ahead"), (plan, "rest" if plan.ahead else "run")):
        if part is None:
            continue
        own: dict[str, _Kernel] = {}
        together: dict[str, _Together] = {}
        for call in part.calls:
            match call:
                case Launch():
                    own[call.name] = _Kernel(call, part)
                case Beside(name, launches):
                    own |= {x.name: _Kernel(x, part, "pid") for x in launches}
                    together[name] = _Group(call, own)
                case Combined(main, combine):
                    own |= {main.name: _Kernel(main, part, "pid"), combine.name: _Kernel(combine, part, "blocks")}
                    together[call.name] = _Last(call, own)
                case Torch():
                    pass
        texts += [k.text() for k in own.values()] + [g.text() for g in together.values()]
        functions: dict[str, str] = {}
        for call in part.calls:
            if isinstance(call, Torch):
                torch_name = f"{re.sub(r'[^0-9A-Za-z_]', '_', part.name)}_torch_{len(functions)}"
                functions[call.equation.targets[0].name] = torch_name
                texts.append(_torch_function(call.equation, part, torch_name))
        runs.append(_run(part, own, together, functions, function))
        kernels |= own
        groups |= together
    if plan.ahead:
        runs += divided_text("run", [_python(n) for n in plan.parameters], *_names_of(plan.ahead))
    if any(k.persistent for k in kernels.values()):
        texts.append(MULTIPROCESSORS)
    if any(k.described for k in kernels.values()):
        texts.append(DESCRIPTORS)
    parts = [_header(plan, texts), *texts, *runs, _signatures(kernels, groups)]
    return "\n\n\n".join(p for p in parts if p) + "\n"


def function_name(call: Call) -> str:
    """The function of the emitted text that a launch calls."""
    match call:
        case Launch(name):
            return _Namer()("kernel", name)
        case Beside(name, launches):
            return _Namer(set(RESERVED) | {function_name(x) for x in launches})("group", name)
        case Combined(main):
            return _Namer(set(RESERVED) | {function_name(x) for x in call.launches})("group", f"{main.name}_whole")


def launched(plan: Plan) -> dict[str, Call]:
    """The launch of the plan that each function is compiled for."""
    parts = (plan.ahead, plan) if plan.ahead else (plan,)
    return {function_name(c): c for part in parts for c in part.calls if not isinstance(c, Torch)}


def _names_of(plan: Plan) -> tuple[list[str], list[str]]:
    return [_python(n) for n in plan.inputs], [_python(n) for n in plan.outputs]


def _header(plan: Plan, functions: list[str]) -> str:
    kernels = [f for f in functions if f.startswith("@triton.jit")]
    what = "with Triton kernels" if kernels else "with torch"
    lines = [f'"""{plan.name} {what}.', ""]
    lines += [f"from {plan.buffer(n).tensor}" for n in plan.parameters]
    lines += [f"to {plan.buffer(n).tensor}" for n in plan.outputs]
    lines += ['"""', "", *([kept_text()[0], ""] if plan.ahead else []), "import torch"]
    if kernels:
        lines += ["import triton", "import triton.language as tl"]
    if any(word in k for k in kernels for word in ("LOG2E", "tanh(", "gelu_tanh(", "expm1(")):
        lines += ["", f"LOG2E = tl.constexpr({LOG2E})  # exp(x) = exp2(x * LOG2E)"]
    if any(b.space == "counters" for part in (plan, plan.ahead) if part for b in part.buffers):
        lines += ["", COUNTERS]
    for name, text in HELPERS.items():
        if any(f" {name}(" in k or f"({name}(" in k for k in kernels):
            lines += ["", "", text]
    return "\n".join(lines)


# -- text --------------------------------------------------------------------------------------------------------


@dataclass
class _Namer:
    """Python identifiers, one per key, as close to the wish as is free."""

    taken: set[str] = field(default_factory=lambda: set(RESERVED))
    names: dict[object, str] = field(default_factory=dict)

    def __call__(self, key: object, wish: str) -> str:
        if key not in self.names:
            base = re.sub(r"\W", "_", wish)
            base = base if base.isidentifier() else f"v{base}"
            name, i = base, 1
            while name in self.taken:
                name, i = f"{base}_{i}", i + 1
            self.taken.add(name)
            self.names[key] = name
        return self.names[key]


def _literal(value: Fraction) -> str:
    return repr(float(value)).replace("e+", "e")


def _paren(text: str) -> str:
    """The text as an operand: in parentheses unless it is a name, a call, or in parentheses already."""
    if re.fullmatch(r"[\w.]+(\[[^\]]*\]|\([^()]*\))?", text) or (text.startswith("(") and _closes_last(text)):
        return text
    return f"({text})"


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i == len(text) - 1
    return False


def _function(fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[str], integer: bool) -> str:
    """An elementwise function of f32 operands as Triton text."""
    x = args[0]
    y = args[1] if len(args) > 1 else ""
    match fn:
        case "add" | "sub" | "mul" | "div":
            sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[fn]
            return f"{x} {sign} {y}"
        case "max":
            return f"tl.maximum({x}, {y})"
        case "min":
            return f"tl.minimum({x}, {y})"
        case "and":
            return f"{x} & {y}"
        case "or":
            return f"{x} | {y}"
        case "not":
            return f"{x} == 0"
        case "neg":
            return f"-{x}"
        case "reciprocal":
            return f"1.0 / {x}"
        case "square":
            return f"{x} * {x}"
        case "sqrt" | "rsqrt" | "abs" | "log" | "erf" | "floor":
            return f"tl.{fn}({x})"
        case "exp":
            return f"tl.exp2({x} * LOG2E)"
        case "sigmoid":
            return f"1.0 / (1.0 + tl.exp2(-{x} * LOG2E))"
        case "silu":
            return f"{x} / (1.0 + tl.exp2(-{x} * LOG2E))"
        case "relu":
            return f"tl.maximum({x}, {'0' if integer else '0.0'})"
        case "tanh" | "expm1" | "log1p":
            return f"{fn}({x})"
        case "sin" | "cos":
            return f"sine({x}, {int(fn == 'cos')})"
        case "gelu":
            return f"{'gelu_tanh' if attrs.get('approximate', 'none') == 'tanh' else 'gelu'}({x})"
        case "round":
            return f"round_even({x})"
        case "pow":
            return _power(x, Fraction(attrs["exponent"]))
    raise UnsupportedOpError(f"no Triton for the function {fn}", op=fn, remedy="keep it outside the kernel")


def _power(x: str, exponent: Fraction) -> str:
    if exponent.denominator == 1 and 1 <= abs(exponent) <= 4:
        text = " * ".join([x] * abs(int(exponent)))
        return text if exponent > 0 else f"1.0 / ({text})"
    if exponent == 0:
        return f"{x} * 0.0 + 1.0"
    if abs(exponent) == Fraction(1, 2):
        return f"tl.sqrt({x})" if exponent > 0 else f"tl.rsqrt({x})"
    if exponent.denominator == 1:
        # the sign of an odd power; exp2 and log2 take the magnitude
        magnitude = f"tl.exp2({float(exponent)} * tl.log2(tl.abs({x})))"
        return magnitude if exponent % 2 == 0 else f"tl.where({x} < 0.0, -1.0, 1.0) * {magnitude}"
    return f"tl.exp2({float(exponent)} * tl.log2({x}))"


# -- one kernel --------------------------------------------------------------------------------------------------

Lane = tuple[str, ...]


@dataclass(frozen=True)
class Edge:
    """What a descriptor copies along an axis: how many entries, the dimension of the tile that they make, if any, and
    where they begin, as text."""

    count: int
    lane: Lane | None
    start: str


class _Kernel:
    """Writes one launch as a `@triton.jit` function, and collects the parameters that it turns out to need."""

    def __init__(self, launch: Launch, plan: Plan, given: Literal["", "pid", "blocks"] = "") -> None:
        """`given`: what another kernel calls this one with, its program id or the numbers of its block."""
        self.launch, self.plan, self.given_by = launch, plan, given
        self.persistent = 0 if given else launch.options.persistent
        self.name_of = _Namer()
        self.fn = self.name_of("kernel", launch.name)
        self.buffers: list[Buffer] = []
        self.sizes: dict[str, Axis] = {}
        self.lane_params: dict[str, Extent] = {}
        self.widen = False
        self.described: list[str] = []  # sources of which descriptors copy tiles
        self.lines: list[str] = []
        self.indent = "    "
        self.scope: Scope = launch.scopes[0]
        self.tail = False
        self.offsets: dict[str, str] = {}  # of the loops around, by axis
        self.defined: set[str] = set()
        self.var: dict[str, str] = {}
        self.wide: dict[str, str] = {}
        self.literals: set[str] = set()
        self.placed: set[tuple[str, str]] = set()
        self.axes: dict[str, Axis] = {}
        for scope in launch.scopes:
            self.axes |= {e.axis.name: e.axis for e in scope.extents}
        for name in dict.fromkeys([*launch.sources(), *(w.target for w in launch.writes())]):
            self.buffers.append(plan.buffer(name))
            self.name_of(("buffer", name), name)
        for buffer in self.buffers:
            for at, dim in enumerate(buffer.tensor.dims):
                wish = f"{buffer.tensor.name}_{'_'.join(a.name for a in dim) or at}"
                self.name_of(("stride", buffer.tensor.name, at), wish)
        self.body()

    # -- parameters ----------------------------------------------------------------------------------------------

    def pointer(self, buffer: str) -> str:
        return self.name_of(("buffer", buffer), buffer)

    def size(self, axis: Axis, runtime: bool = False) -> str:
        """The axis's true size: a literal where static (unless it bounds a loop), else a parameter."""
        if isinstance(axis.size, int) and not runtime:
            return str(axis.size)
        self.sizes.setdefault(axis.name, axis)
        return self.name_of(("size", axis.name), f"size_{axis.name}")

    def stride(self, buffer: str, axis: str) -> str:
        """The distance of neighbours along the axis, in elements: the stride of its dimension times the axes inside."""
        t = self.plan.buffer(buffer).tensor
        at = next(i for i, d in enumerate(t.dims) if any(a.name == axis for a in d))
        dim = t.dims[at]
        param = self.name_of(("stride", buffer, at), "")
        inner = dim[[a.name for a in dim].index(axis) + 1 :]
        return " * ".join([param, *(self.size(a) for a in inner)])

    def far(self, buffer: str, axis: str) -> bool:
        """Whether offsets along the axis may exceed 31 bits, in a dense layout at the largest admissible sizes."""
        axes = self.plan.buffer(buffer).tensor.axes
        inner = axes[[a.name for a in axes].index(axis) :]
        return math.prod(largest(a.size) for a in inner) > MAX_SIZE

    # -- tile dimensions -----------------------------------------------------------------------------------------

    def many(self, axis: str) -> bool:
        e = next((e for e in self.scope.extents if e.axis.name == axis), None)
        return e is not None and (e.lanes > 1 or e.at_launch)

    def lanes_of(self, axes: Iterable[str]) -> tuple[Lane, ...]:
        wanted = {a for a in axes if self.many(a)}
        return tuple(lane for lane in self.launch.lanes if wanted & set(lane))

    def lane_text(self, lane: Lane) -> str:
        """The number of elements of a tile dimension, as text."""
        (first, *rest) = [self.scope.extent(a) for a in lane]
        if first.at_launch:
            name = self.name_of(("lanes", first.axis.name), f"LANES_{first.axis.name}")
            self.lane_params[name] = first
            return name
        return str(math.prod(e.lanes for e in (first, *rest)))

    def shape(self, lanes: Sequence[Lane]) -> str:
        return f"({', '.join(map(self.lane_text, lanes))}{',' if len(lanes) == 1 else ''})"

    def spread(self, text: str, have: Sequence[Lane], want: Sequence[Lane]) -> str:
        """`text` with dimensions of size 1 where it lacks a dimension of `want`."""
        if not have or list(have) == list(want):
            return text
        return f"{_paren(text)}[{', '.join(':' if lane in have else 'None' for lane in want)}]"

    def axes_of(self, value: Tensor | str) -> tuple[str, ...]:
        t = value if isinstance(value, Tensor) else self.tensors[value]
        return tuple(a.name for a in t.axes)

    # -- statements ----------------------------------------------------------------------------------------------

    def put(self, text: str, note: str = "") -> None:
        line = self.indent + text
        if note and len(line) + len(note) + 4 > WIDTH:
            self.lines.append(f"{self.indent}# {note}")
            note = ""
        self.lines.append(line + (f"  # {note}" if note else ""))

    def put_call(self, head: str, args: Sequence[str], tail: str = "", note: str = "") -> None:
        lines = call_lines(head, args, tail, self.indent)
        if len(lines) == 1:
            self.put(lines[0].strip(), note)
        else:
            self.lines += ([f"{self.indent}# {note}"] if note else []) + lines

    def body(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        for scope in self.launch.scopes:
            for action in scope.actions():
                match action:
                    case Read(value) | Write(value):
                        self.tensors[value.name] = value
                    case Compute(e) | Accumulate(Compute(e)):
                        self.tensors[e.target.name] = e.target
        pdl = self.launch.options.pdl and not self.given_by
        prefetched = self.largest_read() if pdl and self.launch.options.prefetch else None
        guard = self.program_ids() if prefetched else ""
        if pdl:
            self.put(WAIT[0])
            if prefetched:
                self.prefetch(*prefetched)
            self.put(WAIT[1])
        self.describe()
        if not prefetched:
            guard = self.program_ids()
        if guard:
            self.put(guard)
            self.indent += "    "
        for number, scope in enumerate(self.launch.scopes):
            self.scope, self.number = scope, number
            if scope.before or scope.body:
                self.write_scope()
            if pdl and scope.loop and number == self.last_loop():
                self.lines += [f"{self.indent}{line}" for line in RELEASE]

    def program_ids(self) -> str:
        """The program id taken apart: the first grid axis runs fastest, the part of a split slowest.  Returns the head
        of the branch that the rest is in, if any."""
        if self.given_by == "blocks":
            return ""
        digits = [(self.block_name(a), self.blocks(a)) for a in self.cut_axes()]
        axis, group = self.launch.grouped()
        if axis:
            inner, outer = (self.name_of((x, axis), f"{axis}_{x}") for x in ("inner", "outer"))
            digits[:2] = [(inner, str(group)), digits[0], (outer, self.blocks(axis, group))]
        digits += [("part", str(self.launch.split[1]))] if self.launch.split else []
        pid = "pid"
        if self.persistent:
            pid = "tile"
            tiles = " * ".join(_paren(count) for _, count in digits if count != "1") or "1"
            self.put(f"for tile in tl.range(tl.program_id(0), {tiles}, tl.num_programs(0)):")
            self.indent += "    "
        if not digits:
            return ""
        *lower, (last, _) = digits
        if not lower:
            self.put(f"{last} = {pid if self.given_by or self.persistent else 'tl.program_id(0)'}")
            return ""
        if not self.given_by and not self.persistent:
            self.put("pid = tl.program_id(0)")
        for i, (name, blocks) in enumerate(lower):
            count = _paren(blocks)
            self.put(f"{name} = {pid} % {count}")
            self.put(f"{'pid' if i < len(lower) - 1 else last} = {pid} // {count}")
            pid = "pid"
        if not axis:
            return ""
        name = self.block_name(axis)
        self.put(f"{name} = {outer} * {group} + {inner}")
        if isinstance(self.launch.extent(axis).axis.size, int) and int(self.blocks(axis)) % group == 0:
            return ""
        return f"if {name} < {self.blocks(axis)}:"  # the last group is not full: blocks beyond the axis do nothing

    def cut_axes(self) -> list[str]:
        return [e.axis.name for e in self.launch.parallel()]

    def block_name(self, axis: str) -> str:
        return self.name_of(("block", axis), f"{axis}_block")

    def largest_read(self) -> tuple[int, Piece] | None:
        """The first read of the largest source, in its scope, if that is an input and nothing has to be read before to
        know its place."""
        for number, scope in enumerate(self.launch.scopes):
            for action in scope.actions():
                for p in action.pieces if isinstance(action, Read) else ():
                    given = self.plan.buffer(p.source).space == "input" and self.is_largest(p.source)
                    if given and p.joined is None and all(i.value is None for i in p.index):
                        return number, p
        return None

    def prefetch(self, number: int, piece: Piece) -> None:
        """A hint that the first tile of a source will be read: one address of each line, in a dense layout.  Nothing
        that was not written yet is used, so this may come before the wait."""
        self.scope, self.number, self.indent = self.launch.scopes[number], number, self.indent + "    "
        tensor = self.plan.buffer(piece.source).tensor
        found: list[tuple[str, int, str]] = []  # positions, how many of them, their stride
        for axis, i in zip(tensor.axes, piece.index, strict=True):
            stride, far = self.stride(piece.source, axis.name), self.far(piece.source, axis.name)
            if i.start:
                found.append((f"tl.cast({i.start}, tl.int64)" if far else str(i.start), 1, stride))
            if i.axis is None:
                continue
            e = self.scope.extent(i.axis)
            apart = max(1, LINE * 8 // tensor.dtype.bits // abs(i.step)) if axis is tensor.axes[-1] else 1
            count = 1 if e.at_launch else max(1, e.lanes // apart)
            if text := self.first_positions(e, count, apart):
                wide = f"tl.cast({text}, tl.int64)" if far else text
                found.append((wide, count, stride if i.step == 1 else f"{i.step} * {stride}"))
        rank = sum(count > 1 for _, count, _ in found)
        terms, at = [self.pointer(piece.source)], 0
        for text, count, stride in found:
            place = ", ".join(":" if n == at else "None" for n in range(rank))
            spread = f"[{place}]" if count > 1 and rank > 1 else ""
            whole = text.startswith(("tl.minimum(", "tl.cast(")) or not (spread or " + " in text)
            terms.append(f"{text if whole else _paren(text)}{spread} * {stride}")
            at += count > 1
        name = self.name_of("ahead", f"{piece.source}_ahead")
        self.sum(name, terms)
        self.put(f"{name} = {name}.to(tl.int64, bitcast=True)")
        self.put_call("tl.inline_asm_elementwise", [f'"{PREFETCH}"', '"=r,l"', f"[{name}]", "tl.int32", "False", "1"])
        self.indent = self.indent[4:]

    def first_positions(self, e: Extent, count: int, apart: int) -> str:
        """So many positions of the first tile along an axis, within the axis; empty for 0."""
        name, bounded = e.axis.name, e.masked or e.axis.name == self.launch.grouped()[0]
        texts = []
        if e.role == "grid" and self.blocks(name) != "1":
            block = self.block_name(name)
            texts.append(block if e.tile == 1 else f"{block} * {e.tile}")
        if self.launch.split and self.launch.split[0] == name and self.number == self.last_loop():
            parts, bounded = self.launch.split[1], True
            texts.append(f"part * tl.cdiv(tl.cdiv({self.size(e.axis, runtime=True)}, {e.tile}), {parts}) * {e.tile}")
        if count > 1:
            texts.append(f"tl.arange(0, {count})" + (f" * {apart}" if apart > 1 else ""))
        text = " + ".join(texts)
        if not (text and bounded):
            return text
        last = str(e.axis.size - 1) if isinstance(e.axis.size, int) else f"{self.size(e.axis)} - 1"
        return f"tl.minimum({text}, {last})"

    def blocks(self, axis: str, together: int = 1) -> str:
        """How many blocks a grid axis has, or groups of so many."""
        e = self.launch.extent(axis)
        tile = e.tile * together
        if isinstance(e.axis.size, int):
            return str(-(-e.axis.size // tile))
        return self.size(e.axis) if tile == 1 else f"tl.cdiv({self.size(e.axis)}, {tile})"

    def write_scope(self) -> None:
        scope = self.scope
        if not (self.lines and self.lines[-1].endswith(":")):
            self.lines.append("")
        self.tail, self.offsets = False, {}
        for e in scope.extents:
            self.define_index(e)
        for action in scope.before:
            self.act(action)
        if scope.loop is None:
            return
        for action in scope.body:
            if isinstance(action, Read):
                for i in range(len(action.pieces)):
                    self.define_pointers(action, i)
            if isinstance(action, Accumulate):
                self.start(action)
        if scope.outer:
            self.around(scope.extent(scope.outer), scope.extent(scope.loop))
        else:
            self.loops(scope.extent(scope.loop))
        for action in scope.body:
            if isinstance(action, Accumulate) and action.deferred:
                self.finish(action)

    def around(self, outer: Extent, inner: Extent) -> None:
        """The outer loop of a nest, with masks throughout."""
        low, high = self.limits(outer)
        at = self.name_of(("at", outer.axis.name, self.number), f"{outer.axis.name}0")
        self.loop(f"for {at} in range({low}, {high}, {outer.tile}):", at, outer, outer.tail, lambda: self.loops(inner))

    def limits(self, e: Extent) -> tuple[str, str]:
        """Where the loop over an axis begins and ends, for the part of a split that the block has."""
        axis, tile = e.axis, e.tile
        low, high = "0", self.size(axis, runtime=True)
        if self.launch.split and self.launch.split[0] == axis.name and self.number == self.last_loop():
            parts = self.launch.split[1]
            chunk, low, high = (self.name_of((x, axis.name), f"{x}_{axis.name}") for x in ("chunk", "low", "high"))
            size = self.size(axis, runtime=True)
            # a multiple of the tile, written so that the compiler sees it
            self.put(f"{chunk} = tl.cdiv(tl.cdiv({size}, {tile}), {parts}) * {tile}")
            self.put(f"{low} = part * {chunk}")
            self.put(f"{high} = tl.maximum({low}, tl.minimum({low} + {chunk}, {size}))")
        return low, high

    def loops(self, e: Extent) -> None:
        """Full tiles without masks along the loop axis, then what is left with masks."""
        axis, tile = e.axis, e.tile
        at = self.name_of(("at", axis.name, self.number), f"{axis.name}0")
        low, high = self.limits(e)
        if not e.tail:
            self.loop(self.head(at, low, high, tile), at, e, False, self.acts)
            return
        full = self.name_of(("full", axis.name, self.number), f"full_{axis.name}")
        begin = "" if low == "0" else f"{low} + "
        length = high if low == "0" else f"({high} - {low})"
        self.put(f"{full} = {begin}{length} // {tile} * {tile}")
        if not isinstance(axis.size, int) or axis.size >= tile:
            self.loop(self.head(at, low, full, tile), at, e, False, self.acts)
        self.loop(f"for {at} in tl.range({full}, {high}, {tile}, num_stages=1):", at, e, True, self.acts)

    def head(self, at: str, low: str, high: str, tile: int) -> str:
        unroll = self.launch.options.unroll
        if unroll == 1:
            return f"for {at} in range({low}, {high}, {tile}):"
        return f"for {at} in tl.range({low}, {high}, {tile}, loop_unroll_factor={unroll}):"

    def last_loop(self) -> int:
        return max(i for i, s in enumerate(self.launch.scopes) if s.loop)

    def loop(self, head: str, at: str, e: Extent, tail: bool, body: Callable[[], None]) -> None:
        self.put(head)
        outer, self.indent = self.indent, self.indent + "    "
        wide, literals, placed = dict(self.wide), set(self.literals), set(self.placed)
        before, offsets = self.tail, dict(self.offsets)
        self.offsets[e.axis.name] = at
        if e.axis.name == self.scope.loop:
            self.tail = tail
        if tail:
            name = self.mask_name(e)
            local = f" & ({self.local(e)} < {e.tile})" if e.padded else ""
            many = self.many(e.axis.name)
            inside = f"{at} + {self.index_name(e)} < {self.size(e.axis, runtime=True)}" if many else ""
            if inside:
                self.put(f"{name} = ({inside}){local}" if local else f"{name} = {inside}")
        body()
        self.indent, self.wide, self.literals, self.placed = outer, wide, literals, placed
        self.tail, self.offsets = before, offsets

    def acts(self) -> None:
        for action in self.scope.body:
            self.act(action)

    def in_tail(self, e: Extent) -> bool:
        """Whether the present tile of a looped axis may be incomplete: that of an outer loop always may."""
        return self.tail if e.axis.name == self.scope.loop else e.tail

    # -- positions and masks -------------------------------------------------------------------------------------

    def index_name(self, e: Extent) -> str:
        return self.name_of(("index", e), f"i_{e.axis.name}")

    def mask_name(self, e: Extent) -> str:
        return self.name_of(("mask", e, e.role == "loop" and self.in_tail(e)), f"in_{e.axis.name}")

    def lane(self, axis: str) -> Lane:
        return next(lane for lane in self.launch.lanes if axis in lane)

    def local(self, e: Extent) -> str:
        """The position within the tile, as a vector over the axis's dimension."""
        lane = self.lane(e.axis.name)
        if len(lane) == 1:
            return f"tl.arange(0, {self.lane_text(lane)})" if e.role == "grid" else self.index_name(e)
        at = self.name_of(("lane", lane), f"at_{''.join(lane)}")
        i = lane.index(e.axis.name)
        inner = math.prod(self.scope.extent(a).lanes for a in lane[i + 1 :])
        text = f"{at} // {inner}" if inner > 1 else at
        return f"{text} % {e.lanes}" if i else text

    def define_index(self, e: Extent) -> None:
        axis = e.axis.name
        index = self.index_name(e)
        if index in self.defined:
            return
        self.defined.add(index)
        single = e.role == "grid" and self.blocks(axis) == "1"
        block = self.block_name(axis) if e.role == "grid" and not single else ""
        if not self.many(axis):
            if e.role == "grid":
                self.put(f"{index} = {'0' if single else block}")
            return
        lane = self.lane(axis)
        if len(lane) > 1:
            at = self.name_of(("lane", lane), f"at_{''.join(lane)}")
            if at not in self.defined:
                self.defined.add(at)
                self.put(f"{at} = tl.arange(0, {self.lane_text(lane)})", f"{' and '.join(lane)} as one dimension")
        if e.role == "grid":
            local = self.local(e)
            self.put(f"{index} = {local}" if single else f"{index} = {block} * {e.tile} + {local}")
        else:
            text = f"tl.arange(0, {self.lane_text(lane)})" if len(lane) == 1 else self.local(e)
            self.put(f"{index} = {text}")
        if not e.masked or (e.role == "loop" and not e.padded):
            return
        if e.role == "loop":
            self.put(f"{self.mask_name(e)} = {self.local(e)} < {e.tile}")
        elif e.role == "whole":
            self.put(f"{self.mask_name(e)} = {index} < {self.size(e.axis)}")
        else:
            tests = [f"{index} < {self.size(e.axis)}"] if e.tail else []
            tests += [f"{self.local(e)} < {e.tile}"] if e.padded else []
            self.put(f"{self.mask_name(e)} = " + (tests[0] if len(tests) == 1 else " & ".join(f"({t})" for t in tests)))

    def masked(self, axis: str) -> bool:
        """Whether elements of the present tile lie beyond the axis."""
        if not self.many(axis):
            return False
        e = self.scope.extent(axis)
        return e.padded or (self.in_tail(e) if e.role == "loop" else e.masked)

    def mask(self, axes: Iterable[str], want: Sequence[Lane], extra: Sequence[str] = ()) -> str:
        """The conjunction of the masks of these axes over the dimensions `want`; empty if there is none."""
        tests = [
            self.spread(self.mask_name(self.scope.extent(a)), (self.lane(a),), want) for a in axes if self.masked(a)
        ]
        return " & ".join([*tests, *extra])

    # -- memory --------------------------------------------------------------------------------------------------

    def terms(
        self, buffer: str, index: Iterable[tuple[str, Index]], want: Sequence[Lane]
    ) -> tuple[list[str], list[str]]:
        """Offsets that stay through the loop, and those that move with it."""
        fixed: list[str] = []
        moving: list[str] = []
        for axis, i in index:
            stride = self.stride(buffer, axis) if i.axis or i.value or i.start else ""
            far = self.far(buffer, axis)
            if i.start:
                start = str(i.start) if i.start >= 0 else f"({i.start})"
                fixed.append(f"tl.cast({start}, tl.int64) * {stride}" if far else f"{start} * {stride}")
            scaled = stride if i.step == 1 else f"{i.step} * {stride}"
            moves = self.moves(i)
            if i.value is not None and not (moves and not self.offsets):  # what moves is not there before the loop
                place = self.spread(self.place(i) + (".to(tl.int64)" if far else ""), self.lanes_along(i), want)
                (moving if moves else fixed).append(f"{place} * {scaled}")
            if i.axis is None:
                continue
            e = self.scope.extent(i.axis)
            if self.many(i.axis):
                name = self.index_name(e) + (".to(tl.int64)" if far else "")
                fixed.append(f"{self.spread(name, (self.lane(i.axis),), want)} * {scaled}")
            elif e.role == "grid":
                fixed.append(f"{self.index_name(e)}{'.to(tl.int64)' if far else ''} * {scaled}")
            if e.role == "loop":
                at = self.name_of(("at", i.axis, self.number), f"{i.axis}0")
                moving.append(f"tl.cast({at}, tl.int64) * {scaled}" if far else f"{at} * {scaled}")
        return fixed, moving

    def lanes_along(self, i: Index) -> tuple[Lane, ...]:
        assert i.value is not None
        return self.lanes_of(self.axes_of(i.value))

    def moves(self, i: Index) -> bool:
        """Whether an index by a value is another one in each iteration."""
        return i.value in {_made(a) for a in self.scope.body if not isinstance(a, Write)}

    def place(self, i: Index) -> str:
        """The position that a value names, negative ones counted from the end of its axis."""
        assert i.value is not None
        assert i.within is not None
        key = i.value, i.within.name
        place = self.name_of(("place", key), f"{i.value}_{i.within.name}")
        if key not in self.placed:
            self.placed.add(key)
            index, size = self.var[i.value], self.size(i.within)
            self.put(f"{place} = tl.where({index} < 0, {index} + {size}, {index})")
            if self.lanes_along(i):
                self.put(f"{self.within(i)} = ({place} >= 0) & ({place} < {size})")
        return place

    def within(self, i: Index) -> str:
        assert i.within is not None
        return self.name_of(("within", i.value, i.within.name), f"in_{i.value}_{i.within.name}")

    def indexed(self, index: Iterable[Index], want: Sequence[Lane]) -> list[str]:
        """Masks of what values name within the axes that they are indices along."""
        tests = []
        for i in index:
            if i.value is None or i.within is None:
                continue
            place, have = self.place(i), self.lanes_along(i)
            if have:
                tests.append(self.spread(self.within(i), have, want))
                continue
            if want:  # a comparison of numbers is no mask of a tile to the interpreter
                place = f"tl.broadcast_to({place}, ({'1,' if len(want) == 1 else ', '.join('1' for _ in want)}))"
            tests += [f"({place} >= 0)", f"({place} < {self.size(i.within)})"]
        return tests

    def define_pointers(self, read: Read, number: int) -> str:
        piece = read.pieces[number]
        name = self.name_of(("at", self.number, read.value.name, number), f"{read.value.name}_at")
        if name in self.defined:
            return name
        self.defined.add(name)
        axes = [a.name for a in self.plan.buffer(piece.source).tensor.axes]
        want = self.lanes_of(self.axes_of(read.value))
        fixed, _ = self.terms(piece.source, zip(axes, piece.index, strict=True), want)
        self.sum(name, [self.pointer(piece.source), *fixed])
        return name

    def sum(self, name: str, terms: Sequence[str], sign: str = "+") -> None:
        """`name = a + b + ...`, over several statements if one is too long."""
        line = ""
        for t in terms:
            candidate = f"{line} {sign} {t}" if line else t
            if line and len(self.indent) + len(name) + 3 + len(candidate) > WIDTH:
                self.put(f"{name} = {line}")
                candidate = f"{name} {sign} {t}"
            line = candidate
        self.put(f"{name} = {line}")

    def argument(self, mask: str, value: str) -> str:
        """A mask as an argument: by a name where it takes more than a line."""
        if len(self.indent) + len(f"    mask={mask},") <= WIDTH:
            return f"mask={mask}"
        name = self.name_of(("mask of", value), f"in_{value}")
        self.sum(name, mask.split(" & "), "&")
        return f"mask={name}"

    def read(self, read: Read) -> None:
        value = read.value
        own = self.axes_of(value)
        want = self.lanes_of(own)
        var = self.name_of(("value", value.name), value.name)
        texts: list[str] = []
        coded = value.dtype in self.plan.decoded
        for number, piece in enumerate(read.pieces):
            at = self.define_pointers(read, number)
            axes = [a.name for a in self.plan.buffer(piece.source).tensor.axes]
            _, moving = self.terms(piece.source, zip(axes, piece.index, strict=True), want)
            along = {a for i in piece.index for a in (self.axes_of(i.value) if i.value else (i.axis,))}
            used = [a for a in own if a in along]
            mask = self.mask(used, want, self.piece_mask(piece, want) + self.indexed(piece.index, want))
            args = [" + ".join([at, *moving])]
            if mask:
                args += [
                    self.argument(mask, value.name),
                    "other=0.0" if value.dtype.is_float and not coded else "other=0",
                ]
            if self.given_by == "blocks" and self.plan.buffer(piece.source).space == "workspace":
                args.append('cache_modifier=".cg"')  # other multiprocessors wrote it: from the cache that all share
            if self.launch.options.evict_first and self.is_largest(piece.source):
                args.append('eviction_policy="evict_first"')
            texts.append(f"tl.load({', '.join(args)})")
        note = str(read)
        if box := self.box(read) if read in self.scope.body else None:
            self.put("if DESCRIPTORS:")
            self.indent += "    "
            self.copy(read, box, var)
            self.indent = self.indent[4:]
            self.put("else:")
            self.indent += "    "
            self.put_call(f"{var} = tl.load", _split_args(texts[0]))
            self.indent = self.indent[4:]
        elif len(texts) == 1:
            self.put_call(f"{var} = tl.load", _split_args(texts[0]), note=note)
        else:
            # each piece where it is valid; a choice, because bf16 has no arithmetic under the interpreter
            text = ""
            for i, (piece, t) in enumerate(zip(read.pieces, texts, strict=True)):
                part = self.name_of(("part", value.name, i), f"{value.name}_{i}")
                self.put_call(f"{part} = tl.load", _split_args(t))
                text = f"tl.where({' & '.join(self.piece_mask(piece, want))}, {part}, {text})" if text else part
            self.put(f"{var} = {text}", note)
        if coded:
            self.put(f"{var} = from_e4m3({var})")
            self.tensors[value.name] = replace(value, dtype=DType.f16)
        self.var[value.name] = var
        if value.dtype.is_float and value.dtype is not DType.f32 and self.is_arithmetic(value.name):
            self.wide[value.name] = self.name_of(("wide", value.name), f"{value.name}_f32")
            self.put(f"{self.wide[value.name]} = {var}.to(tl.float32)")

    def is_largest(self, source: str) -> bool:
        """Whether no source of the launch is larger, at representative sizes: weights, or keys and values."""
        sizes = {s: math.prod(map(representative, self.plan.buffer(s).tensor.shape)) for s in self.launch.sources()}
        return sizes[source] == max(sizes.values())

    def piece_mask(self, piece: Piece, want: Sequence[Lane]) -> list[str]:
        if piece.joined is None:
            return []
        e = self.scope.extent(piece.joined)
        offset = self.offsets.get(e.axis.name, "")
        at = f"{offset} + " if e.role == "loop" and offset else ""
        if not self.many(piece.joined):
            i = offset if e.role == "loop" else self.index_name(e) if e.role == "grid" else "0"
        else:
            i = at + self.index_name(e)
        lane = (self.lane(piece.joined),) if self.many(piece.joined) else ()
        tests = [f"({i} >= {piece.low})"] if piece.low else []
        tests.append(f"({i} < {piece.low + piece.length})")
        return [self.spread(t, lane, want) for t in tests]

    def is_arithmetic(self, value: str) -> bool:
        """Whether the value is used other than as an operand of matrix multiplies in its own type."""
        for scope in self.launch.scopes:
            for action in scope.actions():
                match action:
                    case Compute(e, form, _, operand) | Accumulate(Compute(e, form, _, operand)):
                        if value in e.args and (form != "dot" or operand is not self.tensors[value].dtype):
                            return True
                    case Write(v):
                        if v.name == value:
                            return True
        return False

    def write(self, w: Write) -> None:
        buffer = self.plan.buffer(w.target).tensor
        if buffer.dtype in self.plan.decoded:
            raise UnsupportedOpError(
                f"{w.target} is {buffer.dtype}, which the architecture does not store",
                op="store", remedy="give it another type, or an architecture from sm_89 on",
            )  # fmt: skip
        own = self.axes_of(w.value)
        want = self.lanes_of(own)
        axes = [a.name for a in buffer.axes]
        places = w.index or tuple(map(Index, axes))
        index = [(a, i) for a, i in zip(axes, places, strict=True) if w.kind != "partial" or a != axes[0]]
        fixed, moving = self.terms(w.target, index, want)
        if w.kind == "partial":
            moving.append(f"part * {self.stride(w.target, axes[0])}")
        value = self.wide.get(w.value.name, self.var[w.value.name])
        once = [
            self.spread(f"({self.local(self.scope.extent(a))} == 0)", (lane,), want)
            for lane in want
            for a in lane
            if a not in own
        ]
        mask = self.mask(own, want, once + self.indexed(w.index, want))
        at = self.name_of(("to", self.number, w.target, w.value.name), f"{w.target}_at")
        self.sum(at, [self.pointer(w.target), *fixed, *moving])
        if buffer.dtype.is_float and w.kind != "atomic" and buffer.dtype is not DType.f32:
            value = f"{value}.to({TL[buffer.dtype]})" if w.value.name not in self.literals else value
        head = "tl.atomic_add" if w.kind == "atomic" else "tl.store"
        self.put_call(head, [at, value, *([self.argument(mask, w.value.name)] if mask else [])], note=str(w))

    # -- descriptors ---------------------------------------------------------------------------------------------

    def describe(self) -> None:
        """Makes the descriptors of tiles that loops read."""
        made: set[str] = set()
        for number, scope in enumerate(self.launch.scopes):
            self.number, self.scope = number, scope
            for read in scope.body:
                if not isinstance(read, Read) or not (box := self.box(read)):
                    continue
                name, source = self.descriptor(read, box), read.pieces[0].source
                if name in made:
                    continue
                if not made:
                    self.put("if DESCRIPTORS:")
                self.indent += "    "
                axes = self.plan.buffer(source).tensor.axes
                shape = ", ".join(map(self.size, axes))
                strides = ", ".join([*(self.stride(source, a.name) for a in axes[:-1]), "1"])
                counts = ", ".join(str(s.count) for s in box)
                args = [self.pointer(source), f"shape=[{shape}]", f"strides=[{strides}]", f"block_shape=[{counts}]"]
                self.put_call(f"{name} = tl.make_tensor_descriptor", args)
                self.indent = self.indent[4:]
                made.add(name)
                self.described += [] if source in self.described else [source]

    def descriptor(self, read: Read, box: Sequence[Edge]) -> str:
        source = read.pieces[0].source
        return self.name_of(("tiles", source, *(s.count for s in box)), f"{source}_tiles")

    def box(self, read: Read) -> tuple[Edge, ...] | None:
        """How a descriptor copies the tile that a read takes, in the order of its source; None where pointers have to.
        Beyond the source are zeros, as masks would have them."""
        if not self.launch.options.descriptors or self.given_by == "blocks":  # what other blocks wrote takes a fence
            return None
        (piece, *more), source = read.pieces, self.plan.buffer(read.pieces[0].source).tensor
        axes, bits = source.axes, source.dtype.bits
        copied = source.dtype in (DType.i8, DType.u8) or (source.dtype.is_float and bits <= 32)
        if more or piece.joined or not copied or source.dtype in self.plan.decoded:
            return None
        if not 2 <= len(source.dims) <= MOST_DESCRIBED or len(axes) > len(source.dims):
            return None
        rows = (product(source.shape[n:]) for n in range(1, len(axes)))
        if any(isinstance(n, int) and n * bits % ROW for n in rows):
            return None
        names = [i.axis for i in piece.index if i.axis]
        moves = any(self.scope.extent(n).role == "loop" for n in names)
        edges = [self.edge(a, i) for a, i in zip(axes, piece.index, strict=True)]
        found = tuple(e for e in edges if e)
        if not moves or len(set(names)) < len(names) or len(found) < len(edges):
            return None
        return found if found[-1].count * bits % ROW == piece.index[-1].start * bits % ROW == 0 else None

    def edge(self, axis: Axis, i: Index) -> Edge | None:
        """What a descriptor copies along an axis of a source."""
        if i.value is not None or i.step != 1 or i.start < 0:
            return None
        if i.axis is None:
            return Edge(1, None, str(i.start))
        e, lane = self.scope.extent(i.axis), self.lane(i.axis) if self.many(i.axis) else None
        size = e.axis.size
        ends = size == axis.size if i.start == 0 or not isinstance(size, int) else i.start + size == axis.size
        if e.padded or e.at_launch or (lane and len(lane) > 1) or (e.tail and not ends):
            return None
        at = ""
        if e.role == "loop":
            at = self.name_of(("at", i.axis, self.number), f"{i.axis}0")
        elif e.role == "grid" and self.blocks(i.axis) != "1":
            at = self.block_name(i.axis) + (f" * {e.tile}" if e.tile > 1 else "")
        start = [str(i.start)] if i.start or not at else []
        return Edge(e.lanes, lane, " + ".join([*([at] if at else []), *start]))

    def copy(self, read: Read, box: Sequence[Edge], var: str) -> None:
        """The tile by its descriptor, in the dimensions that tiles have."""
        starts = ", ".join(s.start for s in box)
        self.put_call(f"{var} = {self.descriptor(read, box)}.load", [f"[{starts}]"], note=str(read))
        have = [s.lane for s in box if s.lane]
        if len(have) < len(box):
            self.put(f"{var} = tl.reshape({var}, {self.shape(have)})")
        want = self.lanes_of(self.axes_of(read.value))
        if (text := self.permuted(var, have, want)) != var:
            self.put(f"{var} = {text}")

    # -- computation ---------------------------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        match action:
            case Read():
                self.read(action)
            case Write():
                self.write(action)
            case Compute():
                self.compute(action)
            case Accumulate():
                self.accumulate(action)

    def operand(self, value: str, want: Sequence[Lane]) -> str:
        """An f32 (or integer, or bool) operand over the dimensions `want`."""
        text = self.wide.get(value, self.var[value])
        return text if value in self.literals else self.spread(text, self.lanes_of(self.axes_of(value)), want)

    def compute(self, c: Compute) -> None:
        e = c.equation
        name = e.target.name
        var = self.name_of(("value", name), name)
        text = self.text_of(c)
        self.put(f"{var} = {text}", equation_text(e))
        self.var[name] = var
        self.wide.pop(name, None)

    def text_of(self, c: Compute) -> str:
        match c.form:
            case "dot":
                return self.dot(c, None)
            case "sum":
                return self.reduced(c)
            case "relabel":
                return self.relabelled(c.equation)
            case "scan":
                return self.scanned(c.equation)
            case "pointwise":
                return self.pointwise(c.equation)

    def pointwise(self, e: Equation) -> str:
        want = self.lanes_of(self.axes_of(e.target))
        args = [self.operand(a, want) for a in e.args]
        literal = bool(e.args) and all(a in self.literals for a in e.args)
        integer = not e.target.dtype.is_float
        match e.op:
            case Const(value):
                self.literals.add(e.target.name)
                return _literal(value) if not integer else str(int(value))
            case SizeOf(axis):
                if isinstance(axis.size, int):
                    self.literals.add(e.target.name)
                    return str(axis.size) if integer else _literal(Fraction(axis.size))
                return f"{self.size(axis)}.to({TL[e.target.dtype] if integer else 'tl.float32'})"
            case Iota(axis):
                return self.position(axis.name)
            case Elementwise("div") if not integer and not literal and self.cheaper(e.args[1], want):
                inverse = self.wide.get(e.args[1], self.var[e.args[1]])
                have = self.lanes_of(self.axes_of(e.args[1]))
                return f"{args[0]} * {self.spread(f'1.0 / {inverse}', have, want) if have else f'(1.0 / {inverse})'}"
            case Elementwise(fn, attrs):
                if literal and len(args) == 1:
                    args = [f"tl.full([], {args[0]}, tl.float32)"]
                return _function(fn, dict(attrs), args, integer)
            case Compare(relation):
                return f"{args[0]} {RELATION[relation]} {args[1]}"
            case Select():
                return f"tl.where({', '.join(args)})"
            case MaskedExp():
                return f"tl.where({args[1]}, tl.exp2({args[0]} * LOG2E), 0.0)"
            case Cast(dtype):
                if dtype is DType.bool:
                    return f"{args[0]} != 0"
                return f"{args[0]}.to({TL[e.target.dtype]})"
            case _:
                raise refuse(e.op, "has no Triton text", e)

    def position(self, axis: str) -> str:
        e = self.scope.extent(axis)
        if not self.many(axis):
            return self.offsets[axis] if e.role == "loop" else self.index_name(e) if e.role == "grid" else "0"
        return f"{self.offsets[axis]} + {self.index_name(e)}" if e.role == "loop" else self.index_name(e)

    def cheaper(self, denominator: str, want: Sequence[Lane]) -> bool:
        """One reciprocal per row instead of a division per element."""
        return denominator not in self.literals and len(self.lanes_of(self.axes_of(denominator))) < len(want)

    def scanned(self, e: Equation) -> str:
        assert isinstance(e.op, CumSum)
        want = self.lanes_of(self.axes_of(e.target))
        text = self.operand(e.args[0], want)
        if not self.many(e.op.axis):
            return text
        return f"tl.cumsum({text}, axis={want.index(self.lane(e.op.axis))})"

    def relabelled(self, e: Equation) -> str:
        (arg,) = e.args
        have = self.lanes_of(self.axes_of(arg))
        want = self.lanes_of(self.axes_of(e.target))
        text = self.wide.get(arg, self.var[arg])
        match e.op:
            case Broadcast():
                return f"tl.broadcast_to({self.spread(text, have, want)}, {self.shape(want)})" if want else text
            case Rename(pairs):
                new = {old: axis.name for old, axis in pairs}
                moved = [self.lane(new.get(lane[0], lane[0])) for lane in have]
                if [self.lane_text(a) for a in have] != [self.lane_text(b) for b in moved]:
                    raise refuse(e.op, "between axes that are cut differently", e)
                return self.permuted(text, moved, want)
            case _:
                raise refuse(e.op, "has no Triton text", e)

    def permuted(self, text: str, have: Sequence[Lane], want: Sequence[Lane]) -> str:
        if list(have) == list(want):
            return text
        order = [list(have).index(lane) for lane in want]
        return f"tl.trans({text})" if order == [1, 0] else f"tl.permute({text}, {tuple(order)})"

    def product(self, c: Compute, neutral: str) -> tuple[str, tuple[Lane, ...]]:
        """The product of the operands over all their dimensions, with elements beyond the tensor made neutral."""
        e = c.equation
        want = self.lanes_of(a for x in e.args for a in self.axes_of(x))
        args = [self.operand(a, want) for a in e.args]
        if len(args) > 1 and not e.target.dtype.is_float:  # products are formed in the type of their sum
            dtype = TL[e.target.dtype]
            args = [x if self.tensors[a].dtype is e.target.dtype else f"{_paren(x)}.to({dtype})"
                    for a, x in zip(e.args, args, strict=True)]  # fmt: skip
        text = " * ".join(map(_paren, args)) if len(args) > 1 else args[0]
        if mask := self.mask(c.guards[0] if c.guards else (), want):
            text = f"tl.where({mask}, {text}, {neutral})"
        return text, want

    def reduced(self, c: Compute) -> str:
        kind = c.equation.op.kind if isinstance(c.equation.op, Reduce) else "sum"
        text, lanes = self.product(c, neutral(kind, c.equation.target.dtype))
        return self.reduce(text, lanes, c.equation, kind)

    def reduce(self, text: str, lanes: tuple[Lane, ...], e: Equation, kind: str) -> str:
        assert isinstance(e.op, Contract | Reduce)
        for i in reversed(range(len(lanes))):
            if set(lanes[i]) & set(e.op.axes):
                text = f"tl.{kind}({text}, axis={i})"
        return text

    def dot(self, c: Compute, accumulator: str | None) -> str:
        e = c.equation
        assert isinstance(e.op, Contract)
        left, right = (self.lanes_of(self.axes_of(a)) for a in e.args)
        closed = set(e.op.axes)
        k = [n for n in left if n in right and set(n) & closed]
        batch = [n for n in left if n in right and n not in k]
        m = [n for n in left if n not in right]
        n = [n for n in right if n not in left]
        sides = [(0, left, m), (1, right, n)]
        if self.launch.lanes.index(m[0]) > self.launch.lanes.index(n[0]):
            sides.reverse()
        (first, have_a, m), (second, have_b, n) = sides
        a = self.side(c, first, have_a, batch, m, k)
        b = self.side(c, second, have_b, batch, k, n)
        result = [*batch, *m, *n]
        want = self.lanes_of(self.axes_of(e.target))
        plain = max(len(batch), len(m), len(n)) <= 1 and result == list(want)
        whole = plain and c.operand is not DType.i8  # an i32 accumulator is no argument to all versions of Triton
        args = [a, b, *([accumulator] if accumulator and whole else [])]
        if c.operand is DType.f32:
            args.append(f'input_precision="{self.plan.precision}"')
        if c.operand.is_float and c.operand.bits == 8:
            depth = min(math.prod(self.scope.extent(a).lanes for lane in k for a in lane), DEEPEST_F8)
            args.append(f"max_num_imprecise_acc={depth}")
        text = f"tl.dot({', '.join(args)})"
        if max(len(batch), len(m), len(n)) > 1:
            text = f"tl.reshape({text}, {self.shape(result)})"
        text = self.permuted(text, result, want)
        return text if whole or not accumulator else f"{accumulator} + {text}"

    def side(
        self, c: Compute, number: int, have: Sequence[Lane], batch: list[Lane], rows: list[Lane], columns: list[Lane]
    ) -> str:
        """An operand of a matrix multiply as [batch, rows, columns], in the multiply's element type."""
        value = c.equation.args[number]
        dtype = self.tensors[value].dtype
        text = self.var[value] if dtype is c.operand else self.wide.get(value, self.var[value])
        if mask := self.mask(c.guards[number] if c.guards else (), have):
            text = f"tl.where({mask}, {text}, {neutral('sum', dtype)})"
        if c.operand is DType.bf16:
            # the interpreter would multiply the codes of bf16 numbers: there, DOT is f32
            self.widen = True
            text = f"{_paren(text)}.to(DOT)"
        elif dtype is not c.operand:
            text = f"{_paren(text)}.to({TL[c.operand]})"
        want = [*batch, *rows, *columns]
        text = self.permuted(text, have, want)
        if max(len(batch), len(rows), len(columns)) > 1:
            groups = [g for g in (batch, rows, columns) if g]
            text = f"tl.reshape({text}, ({', '.join(' * '.join(map(self.lane_text, g)) for g in groups)}))"
        return text

    # -- accumulators --------------------------------------------------------------------------------------------

    def start(self, a: Accumulate) -> None:
        e = a.compute.equation
        name = e.target.name
        if a.deferred:
            lanes = self.lanes_of(x for v in e.args for x in self.axes_of(v))
            var = self.name_of(("tile", name), f"{name}_tile")
        else:
            lanes = self.lanes_of(self.axes_of(e.target))
            var = self.name_of(("value", name), name)
        start = neutral("sum" if a.monoid == "rescaled" else a.monoid, e.target.dtype)
        if a.faded:  # finite, so that no difference of two such maxima is NaN
            start = _literal(-GREATEST[DType.f32])
        dtype = "tl.float32" if e.target.dtype.is_float else TL[e.target.dtype]
        shape = self.shape(lanes) if lanes else "[]"
        text = (
            f"tl.zeros({shape}, {dtype})" if start in ("0", "0.0") and lanes else f"tl.full({shape}, {start}, {dtype})"
        )
        self.put(f"{var} = {text}")
        self.var[name] = var

    def accumulate(self, a: Accumulate) -> None:
        c = a.compute
        e = c.equation
        name = e.target.name
        note = equation_text(e)
        if a.deferred:
            var = self.name_of(("tile", name), f"{name}_tile")
            text, _ = self.product(c, neutral(a.monoid, e.target.dtype))
            self.put(f"{var} = {self.joined(var, text, a.monoid)}", note)
            return
        var = self.name_of(("value", name), name)
        old = var
        if a.monoid == "rescaled":
            assert a.scale
            want = self.lanes_of(self.axes_of(e.target))
            fade = self.name_of(("fade", a.scale), f"{a.scale}_fade")
            old = f"{var} * {self.spread(fade, self.lanes_of(self.axes_of(a.scale)), want)}"
        if c.form == "dot" and a.monoid in ("sum", "rescaled"):
            self.put(f"{var} = {self.dot(c, old)}", note)
            return
        text = self.text_of(c)
        if a.faded:
            before = self.name_of(("old", name), f"{name}_old")
            fade = self.name_of(("fade", name), f"{name}_fade")
            self.put(f"{before} = {var}")
            self.put(f"{var} = {self.joined(before, text, a.monoid)}", note)
            # what was summed under the old maximum, under the new one
            self.put(f"{fade} = tl.exp2(({before} - {var}) * LOG2E)")
            return
        self.put(f"{var} = {self.joined(old, text, a.monoid)}", note)

    def joined(self, old: str, text: str, monoid: str) -> str:
        match monoid:
            case "max":
                return f"tl.maximum({old}, {text})"
            case "min":
                return f"tl.minimum({old}, {text})"
            case _:
                return f"{old} + {text}"

    def finish(self, a: Accumulate) -> None:
        e = a.compute.equation
        name = e.target.name
        lanes = self.lanes_of(x for v in e.args for x in self.axes_of(v))
        kind = "sum" if a.monoid == "rescaled" else a.monoid
        var = self.name_of(("value", name), name)
        self.put(f"{var} = {self.reduce(self.var[name], lanes, e, kind)}")
        self.var[name] = var

    # -- the whole -----------------------------------------------------------------------------------------------

    def parameters(self) -> list[str]:
        names = [self.pointer(b.tensor.name) for b in self.buffers]
        names += [self.name_of(("size", a), "") for a in self.sizes]
        names += [
            self.name_of(("stride", b.tensor.name, i), "") for b in self.buffers for i in range(len(b.tensor.dims))
        ]
        names += [f"{n}: tl.constexpr" for n in self.lane_params]
        return names + [f"{n}: tl.constexpr" for n, _, _ in self.flags()]

    def flags(self) -> list[tuple[str, str, str]]:
        """Constants that `run` chooses, by the interpreter or the layout of tensors: the name, the value when compiled
        ahead, and the text in `run`."""
        compiled = f"isinstance({self.fn}, triton.JITFunction)"
        found = [("DOT", "tl.bfloat16", f"tl.bfloat16 if {compiled} else tl.float32")] if self.widen else []
        found += [("PDL", "True", compiled)] if self.launch.options.pdl and not self.given_by else []
        tensors = ", ".join(map(_python, self.described))
        return found + ([("DESCRIPTORS", "True", f"descriptors({tensors})")] if tensors else [])

    def symbolic(self) -> list[str]:
        return [self.name_of(("size", n), "") for n, a in self.sizes.items() if not isinstance(a.size, int)]

    def text(self) -> str:
        fixed = ", ".join(f'"{n}"' for n in self.symbolic())
        lines = [f"@triton.jit(do_not_specialize=[{fixed}])" if fixed else "@triton.jit"]
        lines += call_lines(f"def {self.fn}", [*self.place_names(), *self.parameters()], ":", "")
        lines.append(f'    """{self.summary()}"""')
        body = "\n".join(self.lines).strip("\n").splitlines()
        return "\n".join(lines + (body if body else ["    pass"]))

    def place_names(self) -> list[str]:
        """What the kernel that calls this one says about its place."""
        match self.given_by:
            case "":
                return []
            case "pid":
                return ["pid"]
            case "blocks":
                return [self.block_name(a) for a in self.cut_axes()]

    def summary(self) -> str:
        cut = [f"{self.launch.extent(a).tile} of {a}" for a in self.launch.grid]
        cut += [f"one of {self.launch.split[1]} parts of {self.launch.split[0]}"] if self.launch.split else []
        return f"One block: {', '.join(cut)}." if cut else "One block."

    def grid(self) -> str:
        """How many blocks are launched, in `run`."""
        if not self.persistent:
            return self.tiles()
        device = f"{_python(self.plan.inputs[0])}.device"
        most = (
            f"multiprocessors({device})" if self.persistent == 1 else f"{self.persistent} * multiprocessors({device})"
        )
        return f"min({self.tiles()}, {most})"

    def tiles(self) -> str:
        counts: list[str] = []
        grouped, group = self.launch.grouped()
        static = self.launch.split[1] if self.launch.split else 1
        for axis in self.launch.grid:
            e, together = self.launch.extent(axis), group if axis == grouped else 1
            tile = e.tile * together
            static *= together
            if isinstance(e.axis.size, int):
                static *= -(-e.axis.size // tile)
            else:
                size = _size_text(e.axis.size)
                counts.append(size if tile == 1 else f"triton.cdiv({size}, {tile})")
        if static > 1 or not counts:
            counts.append(str(static))
        return " * ".join(counts)

    def given(self, b: Buffer) -> str:
        """A tensor as an argument in `run`."""
        return _python(b.tensor.name) + (".view(torch.uint8)" if b.tensor.dtype in self.plan.decoded else "")

    def arguments(self) -> list[str]:
        args = [self.given(b) for b in self.buffers]
        args += [_size_text(a.size) for a in self.sizes.values()]
        args += [f"*{_python(b.tensor.name)}.stride()" for b in self.buffers if b.tensor.dims]
        for name, e in self.lane_params.items():
            size = _size_text(e.axis.size)
            text = f"max({size}, {e.least})" if e.least > 1 else size
            args.append(f"{name}=triton.next_power_of_2({text})")
        args += [f"{name}={text}" for name, _, text in self.flags()]
        return [*args, *_keywords(self.launch.options)]

    def bound(self) -> list[tuple[str, str, str]]:
        """Each parameter with its annotation and its argument in `run`, in order."""
        found = [(self.pointer(b.tensor.name), "", self.given(b)) for b in self.buffers]
        found += [(self.name_of(("size", n), ""), "", _size_text(a.size)) for n, a in self.sizes.items()]
        for b in self.buffers:
            for at in range(len(b.tensor.dims)):
                name = self.name_of(("stride", b.tensor.name, at), "")
                found.append((name, "", f"{_python(b.tensor.name)}.stride({at})"))
        keywords = dict(a.split("=", 1) for a in self.arguments() if re.match(r"\w+=", a))
        return found + [
            (n, ": tl.constexpr", keywords[n]) for n in (*self.lane_params, *(name for name, _, _ in self.flags()))
        ]

    def signature(self) -> list[tuple[str, str]]:
        """How the kernel compiles ahead of time for dense tensors with aligned bases: per parameter its type, `:16`
        where it is divisible by 16, or its constant value."""
        coded = self.plan.decoded
        types = [DType.u8 if b.tensor.dtype in coded else b.tensor.dtype for b in self.buffers]
        names = [self.pointer(b.tensor.name) for b in self.buffers]
        found = [(n, f'"{POINTER[t]}:16"') for n, t in zip(names, types, strict=True)]
        for name, axis in self.sizes.items():
            found.append((self.name_of(("size", name), ""), _int_type(axis.size, isinstance(axis.size, int))))
        for b in self.buffers:
            for at in range(len(b.tensor.dims)):
                param = self.name_of(("stride", b.tensor.name, at), "")
                found.append((param, _int_type(product(b.tensor.shape[at + 1 :]), True)))
        found += [(n, str(e.most_lanes)) for n, e in self.lane_params.items()]
        return found + [(name, value) for name, value, _ in self.flags()]


def _made(action: Action) -> str:
    """The name that an action gives to its result."""
    match action:
        case Compute(e) | Accumulate(Compute(e)):
            return e.target.name
        case Read(value) | Write(value):
            return value.name


def _keywords(options: Options) -> list[str]:
    return [f"{name}={value}" for name, value in options.compiled.items()]


class _Together(ABC):
    """Several launches as one kernel, which calls the functions of these."""

    def __init__(self, call: Beside | Combined, kernels: Mapping[str, _Kernel]) -> None:
        self.kernels = [kernels[launch.name] for launch in call.launches]
        self.fn = function_name(call)
        self.compiled = call.options
        self.parameters: dict[str, tuple[str, str, str]] = {}  # name -> annotation, argument, signature
        self.calls: list[list[str]] = []
        described = list(dict.fromkeys(name for k in self.kernels for name in k.described))
        for k in self.kernels:
            k.described = described if k.described else []  # one flag for all of them
            types = dict(k.signature())
            self.calls.append([self.parameter(n, note, arg, types[n]) for n, note, arg in k.bound()])
        if self.compiled.pdl:
            self.parameter("PDL", ": tl.constexpr", f"isinstance({self.fn}, triton.JITFunction)", "True")

    def parameter(self, name: str, note: str, argument: str, signature: str) -> str:
        """A parameter of the group for one of a kernel: shared where name and argument are the same."""
        own, i = name, 1
        while own in self.parameters and own != "DOT" and self.parameters[own][1] != argument:
            own, i = f"{name}_{i}", i + 1
        self.parameters.setdefault(own, (note, argument, signature))
        return own

    @abstractmethod
    def more(self) -> list[tuple[str, str, str]]:
        """Parameters of its own: names, what `run` gives, and types."""

    @abstractmethod
    def summary(self) -> str:
        """The docstring."""

    @abstractmethod
    def body(self) -> list[str]:
        """What follows the program id."""

    @abstractmethod
    def grid(self) -> str:
        """How many blocks are launched, in `run`."""

    def counted(self) -> list[str]:
        """Lines of `run` before the launch."""
        return []

    def text(self) -> str:
        sizes = {self.calls[i][k.parameters().index(n)] for i, k in enumerate(self.kernels) for n in k.symbolic()}
        fixed = ", ".join(f'"{n}"' for n in [*sorted(sizes), *(n for n, _, t in self.more() if t == '"i32"')])
        lines = [f"@triton.jit(do_not_specialize=[{fixed}])" if fixed else "@triton.jit"]
        names = [n for n, (note, _, _) in self.parameters.items() if not note] + [n for n, _, _ in self.more()]
        names += [f"{n}{note}" for n, (note, _, _) in self.parameters.items() if note]
        lines += call_lines(f"def {self.fn}", names, ":", "")
        lines.append(f'    """{self.summary()}"""')
        lines += [f"    {line}" for line in WAIT] if self.compiled.pdl else []
        return "\n".join([*lines, "    pid = tl.program_id(0)", *self.body()])

    def launch(self) -> list[str]:
        args = [a for note, a, _ in self.parameters.values() if not note] + [a for _, a, _ in self.more()]
        args += [f"{n}={a}" for n, (note, a, _) in self.parameters.items() if note]
        args += _keywords(self.compiled)
        return self.counted() + call_lines(f"{self.fn}[({self.grid()},)]", args, "", "    ")

    def signature(self) -> list[tuple[str, str]]:
        plain = [(n, t) for n, (note, _, t) in self.parameters.items() if not note]
        constant = [(n, t) for n, (note, _, t) in self.parameters.items() if note]
        return plain + [(n, t) for n, _, t in self.more()] + constant


class _Group(_Together):
    """Launches that do not depend on each other: a program id belongs to one of them."""

    def counts(self) -> list[str]:
        return [f"blocks_{i}" for i in range(len(self.kernels))]

    def more(self) -> list[tuple[str, str, str]]:
        return [(n, n, '"i32"') for n in self.counts()[:-1]]

    def summary(self) -> str:
        return f"The blocks of {', '.join(k.fn for k in self.kernels)}, one after the other."

    def body(self) -> list[str]:
        lines: list[str] = []
        for i, k in enumerate(self.kernels):
            before = " + ".join(self.counts()[:i])
            here = " + ".join(self.counts()[: i + 1])
            last = i == len(self.kernels) - 1
            lines.append("    else:" if last else f"    {'if' if i == 0 else 'elif'} pid < {here}:")
            start = f"pid - {_paren(before)}" if before else "pid"
            lines += call_lines(k.fn, [start, *self.calls[i]], "", "        ")
        return lines

    def counted(self) -> list[str]:
        return [f"    {n} = {k.grid()}" for n, k in zip(self.counts(), self.kernels, strict=True)]

    def grid(self) -> str:
        return " + ".join(self.counts())


class _Last(_Together):
    """A split launch whose last blocks run the combine (Triton's threads all reach a barrier before one of them counts,
    with acquire and release, so what the others counted for is there)."""

    def __init__(self, call: Combined, kernels: Mapping[str, _Kernel]) -> None:
        super().__init__(call, kernels)
        self.main, self.combine = self.kernels
        name_of = _Namer(set(RESERVED) | set(self.parameters) | {k.fn for k in self.kernels})
        self.arrivals = name_of("arrivals", "arrivals")
        self.result, self.rest = name_of("result", "result"), name_of("others", "others")
        self.block = {a: name_of(a, f"{a}_block") for a in call.main.grid}
        self.inner = {a: name_of((a, "inner"), f"{a}_inner") for a in call.combine.grid}
        self.buffer = call.arrivals
        self.parts = call.main.split[1] if call.main.split else 1

    def more(self) -> list[tuple[str, str, str]]:
        return [(self.arrivals, _python(self.buffer), '"*i32:16"')]

    def summary(self) -> str:
        return f"A block of {self.main.fn}; the last one of a result runs {self.combine.fn} for it."

    def grid(self) -> str:
        return self.main.grid()

    def body(self) -> list[str]:
        lines = call_lines(self.main.fn, ["pid", *self.calls[0]], "", "    ")
        names = self.main.cut_axes()
        counts = [self.main.blocks(a) for a in names]
        last = f'tl.atomic_add({self.arrivals} + {self.result}, 1, sem="acq_rel") == {self.parts - 1}'
        lines += [
            f"    {self.result} = pid % {_paren(' * '.join(map(_paren, counts)))}"
            if names
            else f"    {self.result} = 0",
            "    tl.debug_barrier()  # all threads have stored",
            f"    if {last}:",
        ]
        at = "pid"
        for i, (axis, count) in enumerate(zip(names, counts, strict=True)):
            lines.append(f"        {self.block[axis]} = {at} % {_paren(count)}")
            if i + 1 < len(names):
                lines.append(f"        {self.rest} = {at} // {_paren(count)}")
            at = self.rest
        indent = "        "
        places: list[str] = []
        for axis in self.combine.cut_axes():
            outer = self.block.get(axis) if axis in names else None
            ratio = self.main.launch.extent(axis).tile // self.combine.launch.extent(axis).tile if outer else 0
            if outer and ratio == 1:
                places.append(outer)
                continue
            count, name = self.translated(self.combine.blocks(axis)), self.inner[axis]
            limits = f"{outer} * {ratio}, tl.minimum({outer} * {ratio} + {ratio}, {count})" if outer else f"0, {count}"
            lines.append(f"{indent}for {name} in range({limits}):")
            indent += "    "
            places.append(name)
        lines += call_lines(self.combine.fn, [*places, *self.calls[1]], "", indent)
        lines.append(f"        tl.store({self.arrivals} + {self.result}, 0)  # for the next launch")
        return lines

    def translated(self, text: str) -> str:
        """With the names that sizes have among the parameters of the whole."""
        own = dict(zip(self.combine.parameters(), self.calls[1], strict=False))
        return re.sub(r"\b[A-Za-z_]\w*\b", lambda m: own.get(m[0], m[0]), text)


def _split_args(call: str) -> list[str]:
    """The arguments of a `tl.load(...)` text."""
    inner = call[len("tl.load(") : -1]
    pieces: list[str] = []
    depth = start = 0
    for i, letter in enumerate(inner):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            pieces.append(inner[start:i].strip())
            start = i + 1
    return [*pieces, inner[start:].strip()]


def _int_type(size: Size, specialised: bool) -> str:
    if not specialised:
        return '"i32"'
    if size == 1:
        return "1"
    return '"i32:16"' if divides(16, size) else '"i32"'


# -- the launcher ------------------------------------------------------------------------------------------------


def _python(name: str) -> str:
    """The Python variable of a kernel-level value in `run`."""
    base = re.sub(r"\W", "_", name)
    base = base if base.isidentifier() else f"v{base}"
    return f"{base}_" if base in RESERVED else base


def _size_text(size: Size) -> str:
    """A size in `run`, where each symbolic one has a variable."""
    text = size_text(size, {d: f"size_{d.name}" for d in dims_of(size)})
    return f"({text})" if " " in text else text


def _run(
    plan: Plan, kernels: Mapping[str, _Kernel], groups: Mapping[str, _Together], functions: Mapping[str, str], name: str
) -> str:
    inputs = [_python(n) for n in plan.inputs]
    result = ", ".join(map(_python, plan.outputs))
    lines = call_lines(f"def {name}", [*inputs, "*", "out=None"], ":", "")
    what = result if len(plan.outputs) == 1 else "The outputs in order"
    lines.append(f'    """{what}, written into `out` if given."""')
    lines += _sizes(plan)
    lines += _allocations(plan)
    lines += [f"    descriptors_on({inputs[0]}.device)"] if any(k.described for k in kernels.values()) else []
    for call in plan.calls:
        match call:
            case Launch(name):
                k = kernels[name]
                lines += call_lines(f"{k.fn}[({k.grid()},)]", k.arguments(), "", "    ")
            case Beside() | Combined():
                lines += groups[call.name].launch()
            case Torch(equation):
                targets = ", ".join(_python(t.name) for t in equation.targets)
                args = [_python(a) for a in _operands(equation, plan)]
                lines += call_lines(f"{targets} = {functions[equation.targets[0].name]}", args, "", "    ")
    made = _made_by_torch(plan)
    for i, name in enumerate(plan.outputs):
        if name in made:
            lines += ["    if out is not None:", f"        {_python(name)} = {_given(plan, i)}.copy_({_python(name)})"]
    if len(result) > WIDTH - 12:
        return "\n".join([*lines, "    return (", *(f"        {_python(n)}," for n in plan.outputs), "    )"])
    return "\n".join([*lines, f"    return {result}"])


def _allocations(plan: Plan) -> list[str]:
    """Outputs, taken from `out` if given; values between launches; workspaces."""
    made = _made_by_torch(plan) | set(plan.inputs)
    device = f"{_python(plan.inputs[0])}.device"
    lines: list[str] = []

    def allocated(b: Buffer, indent: str) -> list[str]:
        if b.space == "counters":
            return [f"{indent}{_python(b.tensor.name)} = counters({_shape(b.tensor)[1:-2]}, {device})"]
        args = [_shape(b.tensor), f"dtype=torch.{TORCH_NAMES[b.tensor.dtype]}", f"device={device}"]
        return call_lines(f"{_python(b.tensor.name)} = torch.empty", args, "", indent)

    outputs = [plan.buffer(name) for name in plan.outputs]
    fresh = [(i, b) for i, b in enumerate(outputs) if b.tensor.name not in made]
    if fresh:
        lines.append("    if out is None:")
        for _, b in fresh:
            lines += allocated(b, "        ")
        lines.append("    else:")
        lines += [f"        {_python(b.tensor.name)} = {_given(plan, i)}" for i, b in fresh]
    for b in plan.buffers:
        if b.tensor.name not in made and b.tensor.name not in plan.outputs:
            lines += allocated(b, "    ")
    return lines + [f"    {_python(b.tensor.name)}.zero_()" for b in plan.buffers if b.space == "zeroed"]


def _given(plan: Plan, output: int) -> str:
    return "out" if len(plan.outputs) == 1 else f"out[{output}]"


def _made_by_torch(plan: Plan) -> set[str]:
    return {t.name for c in plan.calls if isinstance(c, Torch) for t in c.equation.targets}


def _shape(t: Tensor) -> str:
    sizes = [size_text(s, {d: f"size_{d.name}" for d in dims_of(s)}) for s in t.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _sizes(plan: Plan) -> list[str]:
    """Symbolic sizes from the shapes of inputs."""
    inputs = tuple(Input(plan.buffer(n).tensor, Storage(plan.buffer(n).tensor.dtype)) for n in plan.inputs)
    found = bindings(Program(plan.name, inputs, (), ()))
    names = {b.dim: f"size_{b.dim.name}" for b in found}
    known = {d.name for d in names}
    wanted = {d.name for b in plan.buffers for s in b.tensor.shape for d in dims_of(s)}
    if missing := sorted(wanted - known):
        raise UnsupportedOpError(f"no input's shape gives the size {missing[0]}", op="sizeof")
    return [f"    {names[b.dim]} = {b.text(f'{_python(b.source)}.shape', names)}" for b in found]


def _input(plan: Plan, name: str) -> Input:
    t = plan.buffer(name).tensor
    return Input(t, Storage(t.dtype))


def _operands(equation: Equation, plan: Plan) -> tuple[str, ...]:
    """The arguments of an equation, and what gives the sizes of its results that these do not."""

    def sizes(names: Iterable[str]) -> set[Dim]:
        try:
            return {b.dim for b in bindings(Program(plan.name, tuple(_input(plan, n) for n in names), (), ()))}
        except GraphError:  # some are not determined
            return set()

    found = equation.args
    for d in (d for t in equation.targets for a in t.axes for d in dims_of(a.size)):
        if d not in sizes(found):
            found += tuple(n for n in plan.inputs if d in sizes((n,)))[:1]
    return found


def _torch_function(equation: Equation, plan: Plan, name: str) -> str:
    """A library call's meaning, or a plain equation, as a function of torch."""
    unique = tuple(_input(plan, a) for a in dict.fromkeys(_operands(equation, plan)))
    outputs = tuple(Output(t.name, Storage(t.dtype)) for t in equation.targets)
    text = torch_code.emit(Program(name, unique, (equation,), outputs), name)
    return text.split("import torch\n", 1)[1].strip()


def _signatures(kernels: Mapping[str, _Kernel], groups: Mapping[str, _Together]) -> str:
    if not kernels:
        return ""
    lines = [
        "# How each kernel compiles ahead of time: types (`:16`: divisible by 16) or constants, and launch options."
    ]
    lines.append("SIGNATURES = {")
    found = [(k.fn, k.signature(), k.launch.options) for k in kernels.values() if not k.given_by]
    found += [(g.fn, g.signature(), g.compiled) for g in groups.values()]
    for fn, parameters, options in found:
        compiled = ", ".join(f'"{name}": {value}' for name, value in options.compiled.items())
        lines += [f'    "{fn}": (', "        {"]
        lines += [f'            "{name}": {text},' for name, text in parameters]
        lines += ["        },", f"        {{{compiled}}},", "    ),"]
    return "\n".join([*lines, "}"])
