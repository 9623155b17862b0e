"""Graphs as plain PyTorch functions.

`emit` turns a program or a μGraph into the text of a Python file that imports torch alone:

    def run(X, G, W, *, out=None): ...

The schedule of a μGraph says how its kernels are cut, not what they compute, so it is left out: a block graph is read
over whole tensors.  Each axis is one tile, a split has one part, an accumulator is the whole contraction or reduction,
and a running maximum is the final one, which makes a rescaled sum a plain sum.

Named axes become positions here.  Every variable has a layout, its axes in order; transposes, aliases and regrouped
dimensions are other names for the same variable, and an operand is permuted only where an operator needs it.

A program computes in its own element types, as eager PyTorch would.  Inside the kernels of a μGraph everything is f32,
and results are rounded once, at the store.  Contractions of a μGraph take 16-bit operands on a GPU, where tensor cores
add in f32, and f32 operands on a CPU, where 16-bit products are slower and round more.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import assert_never

from mugraph.errors import GraphError, UnsupportedOpError
from mugraph.ir.axes import Axis, Dim, Size, dims_of, times
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Program, equations_of
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
from mugraph.ir.printer import program_lines
from mugraph.ir.shift import shifted
from mugraph.ir.types import GREATEST, TORCH_NAMES, DType, Input, Tensor, promote
from mugraph.transpiler.attention import ADDED, ATTENTION, AttentionParts, attention_of
from mugraph.transpiler.divided import OWN_NAMES, call_lines, divided_text, kept_text
from mugraph.transpiler.signature import bindings, shapes_text, size_text

Layout = tuple[str, ...]

# How each element type is stored: codes of less than 8 bits take a byte each.
TORCH_DTYPES = TORCH_NAMES | {
    DType.i6: "int8", DType.i4: "int8", DType.u4: "uint8", DType.i2: "int8", DType.u2: "uint8", DType.i1: "int8",
}  # fmt: skip

_SHORT_CASTS = {
    DType.f64: "double()", DType.f32: "float()", DType.f16: "half()", DType.bf16: "bfloat16()", DType.i64: "long()",
    DType.bool: "bool()",
}  # fmt: skip

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_METHODS = {
    "reciprocal": "reciprocal", "square": "square", "sqrt": "sqrt", "rsqrt": "rsqrt", "abs": "abs", "exp": "exp",
    "log": "log", "sigmoid": "sigmoid", "relu": "relu", "tanh": "tanh", "round": "round",
    "sin": "sin", "cos": "cos", "erf": "erf", "expm1": "expm1", "log1p": "log1p", "floor": "floor",
}  # fmt: skip
# Functions of integers that have integer values; a sum or product needs the room of i64.
_KEEPS_INTEGERS = ("max", "min", "abs", "relu", "round", "floor")
_WIDENS_INTEGERS = ("add", "sub", "mul", "neg", "square")

_NARROW = '''def narrow(x, dtype):
    """An operand of a product: 16 bits on a GPU, where products add up in f32; f32 elsewhere."""
    return x.to(dtype) if x.is_cuda else x.float()'''


@dataclass(frozen=True)
class Value:
    """A variable (or a literal) of the emitted function.

    `axes` is its layout and `dtype` its element type.  `origin` is the element type of the data it was computed from,
    which its kernel may have widened.
    """

    text: str
    axes: Layout
    dtype: DType
    origin: DType
    number: Fraction | None = None
    literal: bool = False


def emit(graph: Program | KernelGraph, name: str = "run", compiled: bool = False) -> str:
    """The graph as a Python file with one function `name(*inputs, out=None)`.

    It takes tensors in the order of `graph.inputs` and returns a tensor, or a tuple where the graph has several
    outputs.  `out` (a tensor, or a tuple of as many) receives the results.  Shapes are not checked.

    Work that a μGraph does ahead is in a function `ahead` of its constant inputs, whose results are kept (`kept.py`).
    `compiled`: what is done in each call goes through `torch.compile`, at the first call.

    Raises UnsupportedOpError for an input with packed storage, GraphError where the inputs do not determine a size.
    """
    parts = graph.divided() if isinstance(graph, KernelGraph) else None
    each = graph if parts is None else parts[1]
    calls = _Emitter(each, CALLS if compiled else name if parts is None else "rest")
    emitters, wrapper, imports = [calls], list[str](), ""
    if compiled:
        wrapper += _compiled_text(calls, name if parts is None else "rest", dynamic=bool(graph.dims()))
    if parts is not None:
        first = _Emitter(parts[0], "ahead")
        emitters.insert(0, first)
        given = [p for p, i in zip(calls.parameters.values(), each.inputs, strict=True) if i in graph.inputs]
        kept = list(calls.parameters.values())[len(given) :]
        wrapper += divided_text(name, given, [calls.parameters[i] for i in first.parameters], kept)
        imports = kept_text()[0] + "\n\n"
    functions = [e.function() for e in emitters]
    helper = [_NARROW] if any("narrow(" in f for f in functions) else []
    head = f'"""{_plain(graph.name)} as a PyTorch function, emitted by mugraph."""\n\n{imports}import torch'
    return "\n\n\n".join([head, *helper, *functions, *wrapper]) + "\n"


def _compiled_text(calls: _Emitter, name: str, dynamic: bool) -> list[str]:
    """The pieces that make a function `name` of `calls` through torch.compile.  Sizes that may change are compiled for
    as they come."""
    given = list(calls.parameters.values())
    copied = "out.copy_(found)"
    if len(calls.graph.outputs) > 1:
        copied = "tuple(o.copy_(r) for o, r in zip(out, found))"
    lines = [
        *call_lines(f"def {name}", [*given, "*", "out=None"], ":", ""),
        f'    """`{CALLS}` through torch.compile."""',
        *call_lines("found = compiled", given, "", "    "),
        f"    return found if out is None else {copied}",
    ]
    return [
        f"compiled = torch.compile({CALLS}, fullgraph=True, dynamic={None if dynamic else False})",
        "\n".join(lines),
    ]


CALLS = "calls"  # what the function is called that goes through torch.compile


class _Emitter:
    """Writes one function.  `wide` holds inside kernels, where floating values are at least f32."""

    def __init__(self, graph: Program, name: str) -> None:
        self.graph = graph
        self.name = name
        self.is_mugraph = isinstance(graph, KernelGraph)
        self.wide = False
        self.part: str | None = None  # in a combine, the axis that counts the parts: there is one, so no value has it
        self.lines: list[str] = []
        self.taken = {"torch", "out", "narrow", "results", name}
        if name in OWN_NAMES:
            self.taken |= set(OWN_NAMES)
        if name == CALLS:
            self.taken |= {*OWN_NAMES, "compiled", "found", "run"}
        self.parameters = {i.name: self.fresh(i.name) for i in graph.inputs}
        self.dims: dict[Dim, str] = {}
        self.sizes: dict[str, Size] = {a.name: a.size for a in graph.axes().values()}
        self.finite: set[str] = set()  # running maxima that exponentials are shifted by
        self.widened: dict[str, Value] = {}
        self.narrow_copies: dict[tuple[str, DType], str] = {}
        self.views = set(self.parameters.values())  # variables that may share memory with an input
        self.comments = {id(node): line.text.strip() for line in program_lines(graph) for node in line.nodes}
        self.device = f"{next(iter(self.parameters.values()))}.device" if graph.inputs else '"cpu"'

    # -- the function ---------------------------------------------------------------------------------------------

    def function(self) -> str:
        values = {i.name: self.parameter(i) for i in self.graph.inputs}
        self.equations(self.graph.equations, values, self.graph.tensors())
        self.lines += self.returned(values)
        body = [*self.size_lines(), *self.lines]
        tensors = self.graph.tensors()
        outputs = shapes_text([replace(tensors[o.value], dtype=o.storage.dtype) for o in self.graph.outputs])
        inputs = shapes_text([replace(i.tensor, name=self.parameters[i.name]) for i in self.graph.inputs])
        signature = f"def {self.name}({', '.join([*self.parameters.values(), '*', 'out=None'])}):"
        if len(signature) > 120:
            listed = "".join(f"    {p},\n" for p in [*self.parameters.values(), "*", "out=None"])
            signature = f"def {self.name}(\n{listed}):"
        text = "\n".join(f"    {line}".rstrip() for line in body)
        return f'{signature}\n    """{inputs} -> {outputs}"""\n{text}'

    def parameter(self, i: Input) -> Value:
        """The input with one dimension per axis: size-1 dimensions squeezed, products of axes unflattened."""
        if i.storage.packing != 1:
            raise UnsupportedOpError(
                f"input {i.name} packs {i.storage.packing} values into each stored element",
                remedy="declare the stored type and unpack it in the program",
            )
        text = self.parameters[i.name]
        for position, axes in reversed(list(enumerate(i.tensor.dims))):
            if not axes:
                text += f".squeeze({position})"
            elif len(axes) > 1:
                text += f".unflatten({position}, {self.shape(a.name for a in axes)})"
        layout = tuple(a.name for a in i.tensor.axes)
        if text != self.parameters[i.name]:
            text = self.let_view(f"{i.name}_axes", text)
        return Value(text, layout, i.storage.dtype, i.storage.dtype)

    def size_lines(self) -> list[str]:
        """The sizes that the body uses, read from the shapes of inputs."""
        lines: list[str] = []
        wanted = set(self.dims)
        for b in reversed(bindings(self.graph)):
            if b.dim in wanted:
                wanted |= {d for d, _ in b.others}
                for d, _ in b.others:
                    self.dim(d)
                lines.insert(0, f"{self.dim(b.dim)} = {b.text(f'{self.parameters[b.source]}.shape', self.dims)}")
        return lines

    def returned(self, values: Mapping[str, Value]) -> list[str]:
        """Results are dense and never an input itself, except those that overwrite one."""
        tensors = self.graph.tensors()
        results, own = [], []
        for o in self.graph.outputs:
            text, is_view = self.output(values[o.value], tensors[o.value], o.storage.dtype)
            results.append(text)
            if o.alias_of is not None:
                own.append(f"{self.parameters[o.alias_of]}.copy_({text})")
            else:
                own.append(text + (".clone(memory_format=torch.contiguous_format)" if is_view else ".contiguous()"))
        if len(results) == 1:
            return [f"return {own[0]} if out is None else out.copy_({results[0]})"]
        return [
            "if out is None:",
            f"    return {', '.join(own)}",
            f"return tuple(o.copy_(r) for o, r in zip(out, ({', '.join(results)})))",
        ]

    def output(self, v: Value, tensor: Tensor, dtype: DType) -> tuple[str, bool]:
        """The value with the dimensions and the element type of the output; whether it may share an input's memory."""
        v = self.cast(self.spread(v, tuple(a.name for a in tensor.axes), tensor), dtype, tensor)
        text = v.text
        position = len(tensor.axes)
        for axes in reversed(tensor.dims):
            position -= len(axes)
            if len(axes) > 1:
                text += f".flatten({position}, {position + len(axes) - 1})"
        for position, axes in enumerate(tensor.dims):
            if not axes:
                text += f".unsqueeze({position})"
        return text, v.text in self.views

    # -- names, sizes and lines ----------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A Python name like `name` that nothing else has."""
        base = re.sub(r"\W", "_", name)
        if not base.isidentifier() or keyword.iskeyword(base):
            base = f"v_{base}"
        found, count = base, 1
        while found in self.taken:
            count += 1
            found = f"{base}_{count}"
        self.taken.add(found)
        return found

    def let(self, name: str, text: str) -> str:
        """A new variable with this value."""
        variable = self.fresh(name)
        self.lines.append(f"{variable} = {text}")
        return variable

    def let_view(self, name: str, text: str) -> str:
        variable = self.let(name, text)
        self.views.add(variable)
        return variable

    def comment(self, node: object) -> None:
        """The line of the graph's text that shows `node`."""
        if text := self.comments.get(id(node)):
            self.lines.append(f"# {text}")

    def dim(self, dim: Dim) -> str:
        if dim not in self.dims:
            self.dims[dim] = self.fresh(dim.name)
        return self.dims[dim]

    def size(self, axis: str) -> str:
        size = self.sizes[axis]
        for d in dims_of(size):
            self.dim(d)
        return size_text(size, self.dims)

    def shape(self, axes: Iterable[str]) -> str:
        sizes = [self.size(a) for a in axes]
        return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"

    # -- views -----------------------------------------------------------------------------------------------------

    def at(self, v: Value, layout: Sequence[str]) -> str:
        """The variable with its dimensions in the order of `layout`, of size 1 where it lacks an axis.  Leading ones
        of these are left out, as broadcasting adds them."""
        order = [a for a in layout if a in v.axes]
        text = v.text
        if v.literal or not order:
            return text
        if order != list(v.axes):
            places = [v.axes.index(a) for a in order]
            n = len(places)
            swapped = places == [*range(n - 2), n - 1, n - 2]
            text += ".mT" if swapped else f".permute({', '.join(map(str, places))})"
        index = [":" if a in v.axes else "None" for a in layout[layout.index(order[0]) :]]
        if "None" not in index:
            return text
        if index[-1] == "None" and index.count("None") == 1:
            return f"{text}[..., None]"
        while index[-1] == ":":
            index.pop()
        return f"{text}[{', '.join(index)}]"

    def spread(self, v: Value, layout: Layout, target: Tensor) -> Value:
        """The value with all axes of `layout`, in that order; repeated, without a copy, along those that it lacks."""
        if v.literal:
            text = f"torch.full({self.shape(layout)}, {v.text}, dtype={_torch(v.dtype)}, device={self.device})"
            return Value(self.let(target.name, text), layout, v.dtype, v.origin)
        missing = [a for a in layout if a not in v.axes]
        text = self.at(v, layout)
        if missing:
            text += f".expand({', '.join(self.size(a) if a in missing else '-1' for a in layout)})"
        if text == v.text:
            return v
        variable = self.let_view(target.name, text) if v.text in self.views else self.let(target.name, text)
        return replace(v, text=variable, axes=layout)

    def joint_layout(self, values: Sequence[Value], target: Tensor) -> Layout:
        """The layout of an elementwise result: that of an operand with all axes, else the declared one."""
        axes = {a for v in values for a in v.axes}
        for v in values:
            if set(v.axes) == axes:
                return v.axes
        return _ordered(axes, values, target)

    def at_all(self, values: Sequence[Value], target: Tensor) -> tuple[Layout, list[str]]:
        layout = self.joint_layout(values, target)
        return layout, [self.at(v, layout) for v in values]

    # -- element types -----------------------------------------------------------------------------------------------

    def arithmetic(self, v: Value) -> Value:
        """A floating value in a type that computes: at least f32 inside a kernel, never 8 bits."""
        if v.literal or not v.dtype.is_float or v.dtype.bits >= 32 or not (self.wide or v.dtype.bits == 8):
            return v
        return self.single(v)

    def single(self, v: Value) -> Value:
        """The value in f32 at least; one variable for all uses."""
        if v.literal or (v.dtype.is_float and v.dtype.bits >= 32):
            return v
        if v.text not in self.widened:
            variable = self.let(f"{v.text}_f32", f"{v.text}.float()")
            self.widened[v.text] = replace(v, text=variable, dtype=DType.f32)
        wide = self.widened[v.text]
        return replace(v, text=wide.text, dtype=DType.f32, origin=v.origin if v.dtype.is_float else DType.f32)

    def tensor(self, v: Value, target: Tensor) -> Value:
        """A literal as a tensor without dimensions."""
        if not v.literal:
            return v
        dtype = DType.f32 if v.dtype.is_float else v.dtype
        text = f"torch.tensor({v.text}, dtype={_torch(dtype)}, device={self.device})"
        return Value(self.let(target.name, text), (), dtype, v.origin)

    def cast(self, v: Value, dtype: DType, target: Tensor) -> Value:
        if v.literal or _torch(v.dtype) == _torch(dtype):
            return replace(v, dtype=dtype)
        return replace(v, text=self.let(target.name, f"{v.text}.{_to(dtype)}"), dtype=dtype)

    def made(self, target: Tensor, text: str, layout: Layout, values: Sequence[Value], dtype: DType) -> Value:
        """A new variable.  Outside kernels it gets the declared type if both are floating; integers wrap to theirs
        at every step, as what follows may not be linear."""
        origin = _origin(values, dtype)
        if _wraps(target.dtype) and _wraps(dtype) and dtype is not target.dtype:
            text, dtype = f"{_atom(text)}.{_to(target.dtype)}", target.dtype
        if not self.wide and target.dtype.is_float and dtype is not target.dtype:
            text, dtype = f"{_atom(text)}.{_to(target.dtype)}", target.dtype
        return Value(self.let(target.name, text), layout, dtype, origin if self.wide else dtype)

    # -- equations -----------------------------------------------------------------------------------------------------

    def equations(self, equations: Sequence[Equation], values: dict[str, Value], tensors: Mapping[str, Tensor]) -> None:
        for e in equations:
            self.comment(e)
            args = [values[a] for a in e.args]
            match e.op:
                case Kernel(blocks):
                    results = self.kernel(blocks, dict(values), tensors, e.targets)
                case Library():
                    results = self.library(e.op, args, [tensors[a] for a in e.args], e.targets)
                case _:
                    results = self.pure(e, args, [tensors[a] for a in e.args])
            values.update(zip((t.name for t in e.targets), results, strict=True))

    def library(
        self, op: Library, args: Sequence[Value], declared: Sequence[Tensor], targets: Sequence[Tensor]
    ) -> list[Value]:
        """The semantics of the call, written in place.  Parameter axes stand for the arguments' axes, in order."""
        inner = op.semantics
        values: dict[str, Value] = {}
        names: dict[str, str] = {}
        for param, arg, tensor in zip(inner.inputs, args, declared, strict=True):
            formal = dict(zip((a.name for a in tensor.axes), (a.name for a in param.tensor.axes), strict=True))
            names.update((f, a) for a, f in formal.items())
            values[param.name] = replace(arg, axes=tuple(formal[a] for a in arg.axes))
        kept = self.sizes
        self.sizes = {a.name: a.size for a in inner.axes().values()}
        self.sizes |= {f: kept[a] for f, a in names.items()}
        parts = attention_of(inner) if op.name == ATTENTION else None
        called = (
            self.attended(parts, values, inner) if parts else op.name == ADDED and self.product_added(values, inner)
        )
        if not called:
            stable = inner if self.wide else shifted(inner)
            self.equations(stable.equations, values, stable.tensors())
        self.sizes = kept
        found = [values[o.value] for o in inner.outputs]
        return [
            replace(self.cast(v, t.dtype, t), axes=tuple(names.get(a, a) for a in v.axes))
            for v, t in zip(found, targets, strict=True)
        ]

    def attended(self, parts: AttentionParts, values: dict[str, Value], inner: Program) -> bool:
        """Attention as PyTorch's own call, if that computes the same; False, with nothing written, if it may not."""
        tensors = inner.tensors()
        out, q, k, v = (tensors[n] for n in (parts.result, parts.query, parts.keys, parts.values))
        dtype = reduce(promote, [t.dtype for t in (q, k, v)])
        if not dtype.is_float or dtype.bits < 16 or (parts.bias and tensors[parts.bias].dtype is not dtype):
            return False
        count = len(self.lines)
        self.equations(parts.before, values, tensors)
        scale = values[parts.scale] if parts.scale else _literal(Fraction(1), DType.f32)
        if not scale.literal:
            del self.lines[count:]
            return False
        names = {n: tuple(a.name for a in t.axes) for n, t in tensors.items()}
        left = [a for a in names[parts.query] if a != parts.depth]
        (width,) = (a for a in names[parts.values] if a not in left and a != parts.key)
        batch = [a for a in left if a in {*names[parts.keys], *names[parts.values]}]
        rows = [a for a in left if a not in batch]
        masked = parts.mask or parts.bias
        heads = [a for a in rows if masked and a not in names[masked]]  # queries that share keys and a mask
        rows = [a for a in rows if a not in heads]
        if masked and not rows:
            heads, rows = [], heads

        def spread(name: str, layout: Sequence[str], *groups: Sequence[str]) -> str:
            """The value as a tensor with a dimension for each group."""
            value = values[name] if name == parts.mask else self.cast(values[name], dtype, tensors[name])
            value = self.spread(value, tuple(layout), tensors[name])
            return f"{value.text}.reshape({', '.join(self.product_text(g) for g in groups)})"

        depth, key = [parts.depth], [parts.key]
        args = [
            spread(parts.query, [*batch, *heads, *rows, *depth], batch, heads, rows, depth),
            spread(parts.keys, [*batch, *key, *depth], batch, [], key, depth),
            spread(parts.values, [*batch, *key, width], batch, [], key, [width]),
        ]
        if heads:
            args[1:] = [f"{a}.expand(-1, {self.product_text(heads)}, -1, -1)" for a in args[1:]]
        if parts.causal and len(rows) == 1:
            args.append("is_causal=True")
        elif masked:
            own = batch if any(a in names[masked] for a in batch) else []
            held = rows if any(a in names[masked] for a in rows) else []
            args.append(f"attn_mask={spread(masked, [*own, *held, *key], own, [], held, key)}")
        args.append(f"scale={scale.text}")
        text = f"torch.nn.functional.scaled_dot_product_attention({', '.join(args)})"
        layout = (*batch, *heads, *rows, width)
        found = self.let(out.name, f"{text}.reshape{self.shape(layout)}")
        values[parts.result] = Value(found, layout, dtype, dtype)
        return True

    def product_added(self, values: dict[str, Value], inner: Program) -> bool:
        """A contraction plus a value as PyTorch's own call, if that computes the same; False, with nothing written,
        if it may not."""
        match inner.equations:
            case (
                Equation(op=Contract(closed), args=(left, right)) as product,
                Equation(op=Elementwise("add")) as total,
            ):
                other = next((a for a in total.args if a != product.target.name), None)
            case _:
                return False
        tensors = inner.tensors()
        dtype = total.target.dtype
        if self.wide or other is None or any(tensors[n].dtype is not dtype for n in (left, right, other)):
            return False
        names = {n: [a.name for a in tensors[n].axes] for n in (left, right, other)}
        batch = [a for a in names[left] if a in names[right] and a not in closed]
        alone = [a.name for a in total.target.axes if a.name not in batch]
        if alone and alone[0] in names[right]:  # the result's rows come from the left
            left, right = right, left
        rows = [a for a in names[left] if a not in names[right]]
        columns = [a for a in names[right] if a not in names[left]]
        groups = [g for g in (batch, rows, columns) if g or g is not batch]
        there = [[a for a in g if a in names[other]] for g in groups]
        if not dtype.is_float or dtype.bits < 16 or any(x not in ([], g) for x, g in zip(there, groups, strict=True)):
            return False

        def matrix(name: str, *groups: Sequence[str]) -> str:
            """The value as a tensor with a dimension for each group."""
            layout = tuple(a for g in groups for a in g)
            value = self.spread(self.cast(values[name], dtype, tensors[name]), layout, tensors[name])
            if all(len(g) == 1 for g in groups):
                return value.text
            return f"{value.text}.reshape({', '.join(self.product_text(g) for g in groups)})"

        batched = [batch] if batch else []
        args = [
            matrix(other, *(there[1:] if there == [[], columns] else there)),
            matrix(left, *batched, rows, list(closed)),
            matrix(right, *batched, list(closed), columns),
        ]
        layout = (*batch, *rows, *columns)
        text = f"torch.{'baddbmm' if batch else 'addmm'}({', '.join(args)})"
        if any(len(g) != 1 for g in groups):
            text += f".reshape{self.shape(layout)}"
        values[total.target.name] = Value(self.let(total.target.name, text), layout, dtype, dtype)
        return True

    def product_text(self, axes: Sequence[str]) -> str:
        """The product of the axes' sizes."""
        return " * ".join(_paren_sum(self.size(a)) for a in axes) or "1"

    def kernel(
        self,
        blocks: Sequence[BlockGraph],
        values: Mapping[str, Value],
        tensors: Mapping[str, Tensor],
        targets: Sequence[Tensor],
    ) -> list[Value]:
        stored: dict[str, Value] = {}
        declared = {t.name: t for t in targets}
        for block in blocks:
            found = self.block(block, values, tensors, declared)
            if block.split and block.combine:
                inner, part = block.tensors(), (block.split.part,)
                partial = {s.target: Tensor(s.target, (part, *inner[s.value].dims), DType.f32) for s in block.stores}
                self.part = block.split.part.name
                found = self.block(block.combine, {**values, **found}, {**tensors, **partial}, declared)
                self.part = None
            for name, v in found.items():
                stored[name] = self.added(stored[name], v, declared[name]) if name in stored else v
        return [stored[t.name] for t in targets]

    def added(self, a: Value, b: Value, target: Tensor) -> Value:
        """Two atomic stores to one target."""
        return self.made(target, f"{a.text} + {self.at(b, a.axes)}", a.axes, [a, b], a.dtype)

    def block(
        self,
        block: BlockGraph,
        sources: Mapping[str, Value],
        tensors: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
    ) -> dict[str, Value]:
        """What the block graph stores, by target, in the targets' types; partial results as they are."""
        kept = self.sizes
        inner = block.tensors()
        self.sizes = kept | {a.name: a.size for t in inner.values() for a in t.axes}
        self.wide = True
        values: dict[str, Value] = {}
        for load in block.all_loads():
            self.comment(load)
            values[load.value.name] = _aliased(sources[load.source], tensors[load.source], load.value)
        self.finite = {s.scale for s in block.steps() if isinstance(s, Accumulator) and s.scale}
        self.equations(tuple(equations_of(tuple(block.steps()))), values, inner)
        self.wide, self.finite = False, set()
        found: dict[str, Value] = {}
        for store in block.stores:
            v = values[store.value]
            if store.kind != "partial":
                self.comment(store)
                target = targets[store.target]
                v = self.spread(v, _ordered({a.name for a in target.axes}, [v], target), target) if v.literal else v
                v = replace(self.cast(v, target.dtype, target), origin=target.dtype)
            found[store.target] = v
        self.sizes = kept
        return found

    # -- operators -----------------------------------------------------------------------------------------------------

    def pure(self, e: Equation, args: Sequence[Value], declared: Sequence[Tensor]) -> list[Value]:
        match e.op:
            case TopK(axis, out):
                return self.top_k(args[0], axis, out, e.targets)
            case Kernel() | Library():
                raise GraphError(f"{op_text(e.op)} inside a kernel", op=op_text(e.op))
            case _:
                return [self.one(e, args, declared)]

    def one(self, e: Equation, args: Sequence[Value], declared: Sequence[Tensor]) -> Value:
        target = e.target
        match e.op:
            case Elementwise(fn, attrs):
                return self.elementwise(fn, dict(attrs), args, target)
            case Compare(relation):
                return self.compare(relation, args, target)
            case Select():
                return self.select(args, target)
            case MaskedExp():
                x = self.arithmetic(self.tensor(args[0], target))
                layout, (text, mask) = self.at_all([x, self.tensor(args[1], target)], target)
                return self.made(target, f"torch.where({mask}, {text}.exp(), 0.0)", layout, [x], x.dtype)
            case Const(value, dtype):
                return _literal(value, dtype)
            case SizeOf(axis, dtype):
                size = self.sizes.get(axis.name, axis.size)
                if isinstance(size, int):
                    return _literal(Fraction(size), dtype)
                self.sizes.setdefault(axis.name, axis.size)
                return Value(self.size(axis.name), (), dtype, dtype, literal=True)
            case Iota(axis):
                self.sizes.setdefault(axis.name, axis.size)
                text = f"torch.arange({self.size(axis.name)}, device={self.device})"
                return Value(self.let(target.name, text), (axis.name,), DType.i64, DType.i64)
            case Contract(axes):
                return self.contract(args, axes, target)
            case Reduce(kind, axes):
                return self.reduced(kind, args[0], axes, target)
            case CumSum(axis):
                v = self.single(args[0]) if args[0].dtype.is_float else args[0]
                dtype = v.dtype if v.dtype.is_float else DType.i64
                return self.made(target, f"{v.text}.cumsum({v.axes.index(axis)})", v.axes, [v], dtype)
            case Cast(dtype):
                return self.converted(args[0], dtype, target)
            case Quantize(dtype):
                return self.quantized(args, dtype, target)
            case Unpack(axis, out, dtype):
                return self.unpacked(args[0], axis, out, dtype, target)
            case Pack(axis, out, dtype):
                return self.packed(args[0], axis, out, dtype, target)
            case Reshape(dims):
                return self.reshaped(args[0], declared[0], tuple(a.name for d in dims for a in d), target)
            case Transpose():
                return args[0]
            case Rename(pairs):
                self.sizes.update((new.name, self.sizes[old]) for old, new in pairs)
                return _renamed(args[0], {old: new.name for old, new in pairs})
            case Broadcast(added):
                self.sizes.update((a.name, a.size) for a in added if a.name not in self.sizes)
                wanted = {*args[0].axes, *(a.name for a in added)}
                return self.spread(args[0], _ordered(wanted, args, target), target)
            case Slice(axis, out, start, step):
                return self.sliced(args[0], axis, out, start, step, target)
            case Concat(axes, out):
                return self.joined(args, axes, out, target)
            case Gather(axis):
                return self.gathered(args[0], args[1], axis, target)
            case Scatter(axes, out, kind):
                return self.scattered(args[0], args[1], axes, out, kind, target)
            case TopK() | Kernel() | Library():
                raise GraphError(f"{op_text(e.op)} has several results", op=op_text(e.op))
            case _:
                assert_never(e.op)

    def elementwise(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Value], target: Tensor) -> Value:
        if fn in ("and", "or", "not"):
            return self.logical(fn, args, target)
        if fn == "sub" and self.part and args[0] == args[1]:
            return _literal(Fraction(0), DType.f32)  # the one part's maximum is the maximum, minus infinity included
        if all(v.literal for v in args):
            folded = _folded(fn, attrs, args)
            if folded is not None:
                return folded
            args = [self.tensor(args[0], target), *args[1:]]
        if fn == "mul" and any(v.number == 1 for v in args):
            return next(v for v in args if v.number != 1)
        operands = self.operands(fn, args)
        dtype = _result_dtype(operands)
        layout, texts = self.at_all(operands, target)
        return self.made(target, _function(fn, attrs, texts, operands), layout, operands, dtype)

    def operands(self, fn: str, args: Sequence[Value]) -> list[Value]:
        """The operands in types that the function takes: floats, or integers with room for the result."""
        integers = all(not v.dtype.is_float or _is_whole(v) for v in args) and not all(v.dtype.is_float for v in args)
        if not integers or fn not in (*_KEEPS_INTEGERS, *_WIDENS_INTEGERS):
            return [self.arithmetic(v) if v.literal or v.dtype.is_float else self.single(v) for v in args]
        found: list[Value] = []
        for v in args:
            if v.literal:
                found.append(_literal(v.number or Fraction(0), DType.i64))
            elif fn in _WIDENS_INTEGERS and v.dtype is not DType.i64:
                found.append(replace(v, text=self.let(f"{v.text}_i64", f"{v.text}.long()"), dtype=DType.i64))
            else:
                found.append(v)
        return found

    def logical(self, fn: str, args: Sequence[Value], target: Tensor) -> Value:
        layout, texts = self.at_all([self.tensor(v, target) for v in args], target)
        if all(v.dtype is DType.bool and not v.literal for v in args):
            text = f"~{texts[0]}" if fn == "not" else f"{texts[0]} {'&' if fn == 'and' else '|'} {texts[1]}"
        else:
            text = f"torch.logical_{fn}({', '.join(texts)})"
        return Value(self.let(target.name, text), layout, DType.bool, DType.bool)

    def compare(self, relation: str, args: Sequence[Value], target: Tensor) -> Value:
        operands = [self.arithmetic(v) for v in args]  # a number that f16 does not hold is none of its values
        if all(v.literal for v in operands):
            operands = [self.tensor(operands[0], target), *operands[1:]]
        layout, (a, b) = self.at_all(operands, target)
        text = self.let(target.name, f"{a} {_RELATIONS[relation]} {b}")
        return Value(text, layout, DType.bool, DType.bool)

    def select(self, args: Sequence[Value], target: Tensor) -> Value:
        mask = self.tensor(args[0], target)
        a, b = (self.arithmetic(v) for v in args[1:])
        if a.literal and b.literal and a.dtype.is_float and b.dtype.is_float:
            a = self.tensor(a, target)
        layout, (m, x, y) = self.at_all([mask, a, b], target)
        return self.made(target, f"torch.where({m}, {x}, {y})", layout, [a, b], _result_dtype([a, b]))

    def reduced(self, kind: str, v: Value, axes: Sequence[str], target: Tensor) -> Value:
        places = [v.axes.index(a) for a in axes if a in v.axes]
        if not places:
            return v  # over the parts of a split, of which there is one
        v = self.arithmetic(v)
        if kind == "mean" and not v.dtype.is_float:
            v = self.single(v)
        dtype = DType.i64 if kind == "sum" and not v.dtype.is_float else v.dtype
        method = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}[kind]
        kept = tuple(a for a in v.axes if a not in axes)
        text = f"{v.text}.{method}({_places(places, v.axes)})"
        if target.name in self.finite:
            text += f".clamp(min={_number(-GREATEST[dtype])})"
        return self.made(target, text, kept, [v], dtype)

    def top_k(self, v: Value, axis: str, out: Axis, targets: Sequence[Tensor]) -> list[Value]:
        """A stable sort, so that of equal values the first is taken."""
        self.sizes.setdefault(out.name, out.size)
        v = self.arithmetic(v)
        at = v.axes.index(axis)
        order = f"{v.text}.argsort(dim={at}, descending=True, stable=True).narrow({at}, 0, {self.size(out.name)})"
        places = Value(self.let(targets[1].name, order), v.axes, DType.i64, DType.i64)
        best = self.made(targets[0], f"{v.text}.gather({at}, {places.text})", v.axes, [v], v.dtype)
        return [_renamed(best, {axis: out.name}), _renamed(places, {axis: out.name})]

    # -- contractions ------------------------------------------------------------------------------------------------

    def contract(self, args: Sequence[Value], axes: Sequence[str], target: Tensor) -> Value:
        """Scalars last, axes of one operand first, then pairs until one is left."""
        scalars = [v for v in args if v.literal]
        factors = [v for v in args if not v.literal]
        if not factors:
            return reduce(lambda a, b: self.elementwise("mul", {}, [a, b], target), scalars)
        if len(factors) > 1:
            for i, v in enumerate(factors):
                others = {a for j, w in enumerate(factors) if j != i for a in w.axes}
                own = [a for a in axes if a in v.axes and a not in others]
                if own:
                    factors[i] = self.reduced("sum", v, own, target)
        while len(factors) > 2:
            i, j = _next_pair(factors)
            rest = [v for k, v in enumerate(factors) if k not in (i, j)]
            needed = {a for v in rest for a in v.axes} | {a.name for a in target.axes}
            closed = [a for a in axes if a not in needed]
            factors = [self.pair(factors[i], factors[j], closed, target), *rest]
        if len(factors) == 2:
            result = self.pair(factors[0], factors[1], axes, target)
        else:
            result = self.reduced("sum", factors[0], axes, target)
        return reduce(lambda v, c: self.elementwise("mul", {}, [v, c], target), scalars, result)

    def pair(self, a: Value, b: Value, axes: Sequence[str], target: Tensor) -> Value:
        """The contraction of two tensors over those of `axes` that they share."""
        closed = [x for x in axes if x in a.axes and x in b.axes]
        if not closed:
            return self.elementwise("mul", {}, [a, b], target)
        a_alone = [x for x in a.axes if x not in b.axes]
        b_alone = [x for x in b.axes if x not in a.axes]
        if not a.dtype.is_float and not b.dtype.is_float:
            return self.integer_pair(a, b, closed, target)
        if not a_alone and not b_alone:
            return self.dot(self.single(a), self.single(b), closed, target)
        kept = _ordered({*a.axes, *b.axes} - set(closed), [a, b], target)
        if b_alone and (not a_alone or kept.index(b_alone[0]) < kept.index(a_alone[0])):
            a, b, a_alone, b_alone = b, a, b_alone, a_alone
        origin = promote(_origin_of(a), _origin_of(b))
        is_matrix = bool(a_alone and b_alone)
        left, right, suffix, dtype = self.factors(a, b, origin, is_matrix)
        text, layout = self.product(left, right, closed, a_alone, b_alone, kept)
        return self.made(target, f"{_atom(text)}{suffix}" if suffix else text, layout, [a, b], dtype)

    def dot(self, a: Value, b: Value, closed: Sequence[str], target: Tensor) -> Value:
        """Both operands have the same axes: a sum of products, in f32 at least."""
        places = _places([a.axes.index(x) for x in closed], a.axes)
        layout = tuple(x for x in a.axes if x not in closed)
        squares = f"{a.text}.square()" if a == b else f"({a.text} * {self.at(b, a.axes)})"
        return self.made(target, f"{squares}.sum({places})", layout, [a, b], _result_dtype([a, b]))

    def factors(self, a: Value, b: Value, origin: DType, is_matrix: bool) -> tuple[Value, Value, str, DType]:
        """The operands of a product in one type, what turns its result into the result's type, and that type."""
        if self.is_mugraph and is_matrix and origin.is_float and origin.bits < 32:
            dtype = origin if origin.bits == 16 else DType.bf16  # 16 bits hold all 8-bit values
            left, right = (self.narrowed(v, dtype) for v in (a, b))
            return left, right, ".float()", DType.f32
        if self.wide or self.is_mugraph or not is_matrix:
            a, b = self.single(a), self.single(b)
        else:
            a, b = self.arithmetic(a), self.arithmetic(b)
        dtype = promote(a.dtype, b.dtype)
        return self.inline_cast(a, dtype), self.inline_cast(b, dtype), "", dtype

    def narrowed(self, v: Value, dtype: DType) -> Value:
        """The operand of a 16-bit product; one variable for all uses of stored data."""
        if v.text in self.widened:
            return replace(v, text=f"narrow({self.widened[v.text].text}, {_torch(dtype)})")
        text = f"narrow({v.text}, {_torch(dtype)})"
        if v.dtype.bits >= 32:
            return replace(v, text=text)
        if (v.text, dtype) not in self.narrow_copies:
            self.narrow_copies[v.text, dtype] = self.let(f"{v.text}_operand", text)
        return replace(v, text=self.narrow_copies[v.text, dtype])

    def inline_cast(self, v: Value, dtype: DType) -> Value:
        return v if v.dtype is dtype else replace(v, text=f"{v.text}.{_to(dtype)}", dtype=dtype)

    def product(
        self, a: Value, b: Value, closed: Sequence[str], a_alone: Sequence[str], b_alone: Sequence[str], kept: Layout
    ) -> tuple[str, Layout]:
        """`a @ b` where their axes allow it, else an einsum."""
        batch = tuple(x for x in a.axes if x in b.axes and x not in closed)
        if len(closed) == 1 and not batch and len(b_alone) <= 1:
            left, right = (*a_alone, *closed), (*closed, *b_alone)
        elif len(closed) == 1 and batch and len(a_alone) == len(b_alone) == 1:
            left, right = (*batch, *a_alone, *closed), (*batch, *closed, *b_alone)
        else:
            letters = _letters([*a.axes, *b.axes])
            words = ["".join(letters[x] for x in axes) for axes in (a.axes, b.axes, kept)]
            return f'torch.einsum("{words[0]},{words[1]}->{words[2]}", {a.text}, {b.text})', kept
        return f"{self.at(a, left)} @ {self.at(b, right)}", (*batch, *a_alone, *b_alone)

    def integer_pair(self, a: Value, b: Value, closed: Sequence[str], target: Tensor) -> Value:
        """Exact, on every device: f64 holds sums of up to 2**21 products of 16-bit integers, i64 holds the rest."""
        if max(a.dtype.bits, b.dtype.bits) <= 16:
            left, right = (replace(v, text=f"{v.text}.double()", dtype=DType.f64) for v in (a, b))
            a_alone, b_alone = [x for x in a.axes if x not in b.axes], [x for x in b.axes if x not in a.axes]
            kept = _ordered({*a.axes, *b.axes} - set(closed), [a, b], target)
            text, layout = self.product(left, right, closed, a_alone, b_alone, kept)
            if not a_alone and not b_alone:
                letters = _letters([*a.axes, *b.axes])
                words = ["".join(letters[x] for x in axes) for axes in (a.axes, b.axes, kept)]
                text, layout = f'torch.einsum("{words[0]},{words[1]}->{words[2]}", {left.text}, {right.text})', kept
            return self.made(target, f"{_atom(text)}.long()", layout, [], DType.i64)
        whole = self.elementwise("mul", {}, [a, b], target)
        return self.reduced("sum", whole, closed, target)

    # -- conversions -------------------------------------------------------------------------------------------------

    def converted(self, v: Value, dtype: DType, target: Tensor) -> Value:
        if v.literal:
            number = v.number
            if number is None:
                return v if dtype.is_float else self.cast(self.tensor(v, target), dtype, target)
            return _literal(number if dtype.is_float else Fraction(int(number)), dtype)
        if self.wide and dtype.is_float and v.dtype.is_float:
            return replace(v, origin=dtype)  # inside a kernel values are rounded at stores alone
        if self.wide and dtype.is_float:
            return replace(self.single(v), origin=dtype)
        return replace(self.cast(v, dtype, target), origin=dtype)

    def quantized(self, args: Sequence[Value], dtype: DType, target: Tensor) -> Value:
        x, scale = self.single(self.tensor(args[0], target)), self.single(args[1])
        layout, (a, b) = self.at_all([x, scale], target)
        if dtype.is_float:
            limit = f"torch.finfo({_torch(dtype)}).max"
            text = f"({a} / {b}).clamp(-{limit}, {limit}).{_to(dtype)}"
        else:
            low, high = _integer_range(dtype)
            text = f"({a} / {b}).round().clamp({low}, {high}).{_to(dtype)}"
        return Value(self.let(target.name, text), layout, dtype, dtype)

    def unpacked(self, v: Value, axis: str, out: Axis, dtype: DType, target: Tensor) -> Value:
        """Bytes into codes, low bits first; two's complement where they are signed."""
        self.sizes.setdefault(out.name, out.size)
        at, bits = v.axes.index(axis), dtype.bits
        shifts = ", ".join(f"{v.text}.int() >> {s}" for s in range(0, 8, bits))
        codes = f"torch.stack(({shifts}), {at + 1}).flatten({at}, {at + 1}) & {2**bits - 1}"
        if not dtype.value.startswith("u"):
            sign = 2 ** (bits - 1)
            codes = f"(({codes}) ^ {sign}) - {sign}"
        layout = tuple(out.name if a == axis else a for a in v.axes)
        return Value(self.let(target.name, f"({codes}).{_to(dtype)}"), layout, dtype, dtype)

    def packed(self, v: Value, axis: str, out: Axis, dtype: DType, target: Tensor) -> Value:
        """Codes into bytes, low bits first."""
        before = self.sizes[axis]
        self.sizes.setdefault(out.name, out.size)
        count = next((n for n in (8, 4, 2, 1) if times(self.sizes[out.name], n) == before), None)
        if count is None:
            raise GraphError(f"{before} codes do not fill {out.size} bytes", op="pack")
        at, bits = v.axes.index(axis), 8 // count
        codes = f"({v.text}.int() & {2**bits - 1}).unflatten({at}, (-1, {count}))"
        codes = self.let(f"{target.name}_codes", codes)
        fields = " | ".join(f"({codes}.select({at + 1}, {i}) << {i * bits})" for i in range(count))
        layout = tuple(out.name if a == axis else a for a in v.axes)
        return Value(self.let(target.name, f"({fields}).{_to(dtype)}"), layout, dtype, dtype)

    # -- views and indices -------------------------------------------------------------------------------------------

    def reshaped(self, v: Value, declared: Tensor, axes: Layout, target: Tensor) -> Value:
        """Row-major order of the declared dimensions."""
        if set(axes) == set(v.axes):
            return v
        for a in target.axes:
            self.sizes.setdefault(a.name, a.size)
        v = self.tensor(v, target)
        order = tuple(a.name for a in declared.axes)
        text = f"{self.at(v, order)}.reshape({self.shape(axes)})"
        return replace(v, text=self.let_view(target.name, text), axes=axes)

    def sliced(self, v: Value, axis: str, out: Axis, start: int, step: int, target: Tensor) -> Value:
        self.sizes.setdefault(out.name, out.size)
        at, size = v.axes.index(axis), self.sizes[out.name]
        length = self.size(out.name)
        if isinstance(size, int):
            stop = str(start + step * size)
        else:
            stop = (f"{start} + " if start else "") + (length if step == 1 else f"{step} * ({length})")
        places = f"{start or ''}:{stop}" + (f":{step}" if step != 1 else "")
        before = "..., " if at == len(v.axes) - 1 and at else ":, " * at
        variable = self.let(target.name, f"{v.text}[{before}{places}]")
        if v.text in self.views:
            self.views.add(variable)
        return _renamed(replace(v, text=variable), {axis: out.name})

    def joined(self, args: Sequence[Value], axes: Sequence[str], out: Axis, target: Tensor) -> Value:
        self.sizes.setdefault(out.name, out.size)
        pieces = [_renamed(self.arithmetic(v), {a: out.name}) for v, a in zip(args, axes, strict=True)]
        layout = pieces[0].axes
        texts = ", ".join(self.at(v, layout) for v in pieces)
        text = f"torch.cat(({texts}), {layout.index(out.name)})"
        return self.made(target, text, layout, pieces, reduce(promote, (v.dtype for v in pieces)))

    def gathered(self, v: Value, index: Value, axis: str, target: Tensor) -> Value:
        where = self.let(f"{index.text}_i64", f"{index.text}.long()") if _needs_long(index) else index.text
        index = replace(index, text=where)
        shared = [a for a in index.axes if a in v.axes]
        if not shared:
            at = v.axes.index(axis)
            layout = (*v.axes[:at], *index.axes, *v.axes[at + 1 :])
            variable = self.let(target.name, f"{v.text}[{':, ' * at}{index.text}]")
            if index.literal and v.text in self.views:
                self.views.add(variable)
            return replace(v, text=variable, axes=layout)
        own = [a for a in index.axes if a not in v.axes]
        rest = [a for a in v.axes if a != axis and a not in shared]
        total = len(shared) + len(own)
        ranges = []
        for i, a in enumerate(shared):
            line = f"torch.arange({self.size(a)}, device={self.device})"
            ranges.append(line + "".join("[:, None" + ", None" * (total - 2 - i) + "]" for _ in range(i < total - 1)))
        places = ", ".join([*ranges, self.at(index, [*shared, *own])])
        text = f"{self.at(v, [*shared, axis, *rest])}[{places}]"
        return replace(v, text=self.let(target.name, text), axes=(*shared, *own, *rest))

    def scattered(self, v: Value, index: Value, axes: tuple[str, ...], out: Axis, kind: str, target: Tensor) -> Value:
        self.sizes.setdefault(out.name, out.size)
        v = self.arithmetic(v)
        axis = axes[0]
        if len(axes) > 1:
            lead = [a for a in index.axes if a not in axes]
            v, index = self.as_one(v, lead, axes, target), self.as_one(index, lead, axes, target)
        dtype = v.dtype
        if kind == "sum" and not dtype.is_float:
            v, dtype = replace(v, text=f"{v.text}.long()"), DType.i64
        at = v.axes.index(axis)
        places = self.let(f"{index.text}_i64", f"{index.text}.long()") if _needs_long(index) else index.text
        # PyTorch counts negative indices from the end where it reads, not where it adds
        text = f"torch.where({places} < 0, {places} + {self.size(out.name)}, {places})"
        index = replace(index, text=self.let(f"{target.name}_at", text))
        layout = tuple(out.name if a == axis else a for a in v.axes)
        zeros = f"torch.zeros({self.shape(layout)}, dtype={_torch(dtype)}, device={self.device})"
        if index.axes == (axis,):
            method = "index_add" if kind == "sum" else "index_copy"
            return self.made(target, f"{zeros}.{method}({at}, {index.text}, {v.text})", layout, [v], dtype)
        source = self.let(f"{target.name}_rows", v.text) if not v.text.isidentifier() else v.text
        method = "scatter_add" if kind == "sum" else "scatter"
        text = f"{zeros}.{method}({at}, {self.at(index, v.axes)}.expand_as({source}), {source})"
        return self.made(target, text, layout, [v], dtype)

    def as_one(self, v: Value, lead: Sequence[str], axes: tuple[str, ...], target: Tensor) -> Value:
        """The value with these axes as one, the first, in row-major order, behind the leading ones."""
        rest = [a for a in v.axes if a not in (*lead, *axes)]
        text = self.at(v, [*lead, *axes, *rest])
        if not set(axes) <= set(v.axes):
            text += f".expand({', '.join(['-1'] * len(lead) + [self.size(a) for a in axes] + ['-1'] * len(rest))})"
        text += f".flatten({len(lead)}, {len(lead) + len(axes) - 1})"
        return replace(v, text=self.let(f"{target.name}_flat", text), axes=(*lead, axes[0], *rest))


def _plain(name: str) -> str:
    return re.sub(r"[^\w .-]", "_", name)


def _torch(dtype: DType) -> str:
    return f"torch.{TORCH_DTYPES[dtype]}"


def _to(dtype: DType) -> str:
    return _SHORT_CASTS.get(dtype, f"to({_torch(dtype)})")


def _atom(text: str) -> str:
    """The expression, in parentheses if a method call would bind to a part of it."""
    return text if re.fullmatch(r"[\w.]+(\(.*\))?", text) and " @ " not in text else f"({text})"


def _places(places: Sequence[int], axes: Layout) -> str:
    if len(places) > 1:
        return f"({', '.join(map(str, places))})"
    return "-1" if places[0] == len(axes) - 1 else str(places[0])


def _wraps(dtype: DType) -> bool:
    """Whether torch has integers modulo 2^bits of this type."""
    return not dtype.is_float and dtype is not DType.bool and dtype.bits >= 8


def _number(value: Fraction) -> str:
    return repr(float(value)).replace("e+", "e")


def _literal(value: Fraction, dtype: DType) -> Value:
    text = _number(value) if dtype.is_float else "True" if dtype is DType.bool and value else str(int(value))
    return Value(text, (), dtype, dtype, value, literal=True)


def _is_whole(v: Value) -> bool:
    return v.number is not None and v.number.denominator == 1


def _needs_long(index: Value) -> bool:
    return not index.literal and index.dtype is not DType.i64


def _renamed(v: Value, names: Mapping[str, str]) -> Value:
    return replace(v, axes=tuple(names.get(a, a) for a in v.axes))


def _aliased(v: Value, source: Tensor, load: Tensor) -> Value:
    """The value under the axes of the load; other axes than the source's correspond to them by position."""
    before, after = [a.name for a in source.axes], [a.name for a in load.axes]
    return v if set(before) == set(after) else _renamed(v, dict(zip(before, after, strict=True)))


def _ordered(axes: set[str], values: Sequence[Value], target: Tensor) -> Layout:
    """The axes in the declared order of `target`, others behind them as the values have them."""
    known = [a.name for a in target.axes] + [a for v in values for a in v.axes] + sorted(axes)
    return tuple(dict.fromkeys(a for a in known if a in axes))


def _letters(axes: Sequence[str]) -> dict[str, str]:
    """A letter for each axis: its initial if that is free."""
    found: dict[str, str] = {}
    for a in axes:
        if a not in found:
            choices = [c for c in a if c.isascii() and c.isalpha()] + list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOP")
            found[a] = next(c for c in choices if c not in found.values())
    return found


def _next_pair(factors: Sequence[Value]) -> tuple[int, int]:
    """First a factor whose axes another one has: their product is no bigger."""
    for i, v in enumerate(factors):
        for j, w in enumerate(factors):
            if i != j and set(v.axes) <= set(w.axes):
                return i, j
    return 0, 1


def _origin_of(v: Value) -> DType:
    return v.origin if v.origin.is_float else v.dtype if v.dtype.is_float else DType.f32


def _origin(values: Sequence[Value], dtype: DType) -> DType:
    origins = [_origin_of(v) for v in values if v.axes and not v.literal and v.dtype.is_float]
    return reduce(promote, origins) if origins else dtype


def _result_dtype(values: Sequence[Value]) -> DType:
    """The type that PyTorch gives: dimensioned tensors decide, then those without dimensions, then numbers."""
    ranks = [[v.dtype for v in values if v.axes], [v.dtype for v in values if not v.axes and not v.literal]]
    ranks.append([v.dtype for v in values if v.literal])
    first, *rest = [reduce(promote, r) for r in ranks if r]
    for dtype in rest:
        if dtype.is_float and not first.is_float:
            first = DType.f32 if dtype is not DType.f64 else dtype
    return first


def _function(fn: str, attrs: Mapping[str, str | Fraction], texts: Sequence[str], operands: Sequence[Value]) -> str:
    x = texts[0]
    match fn:
        case "add" | "sub" | "mul" | "div":
            if fn == "mul" and operands[0] == operands[1]:
                return f"{x}.square()"
            return f"{x} {_INFIX[fn]} {texts[1]}"
        case "max" | "min":
            for tensor_text, other in ((0, 1), (1, 0)):
                if operands[other].literal:
                    return f"{texts[tensor_text]}.clamp({fn}={texts[other]})".replace(
                        f"clamp({fn}=", "clamp(min=" if fn == "max" else "clamp(max="
                    )
            return f"torch.{fn}imum({x}, {texts[1]})"
        case "neg":
            return f"-{x}"
        case "pow":
            return f"{x}.pow({float(Fraction(attrs['exponent']))!r})"
        case "silu":
            return f"torch.nn.functional.silu({x})"
        case "gelu":
            return f'torch.nn.functional.gelu({x}, approximate="{attrs.get("approximate", "none")}")'
        case _ if fn in _METHODS:
            return f"{x}.{_METHODS[fn]}()"
    raise UnsupportedOpError(f"the PyTorch target has no function {fn!r}", op=fn)


def _folded(fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Value]) -> Value | None:
    """A function of literals as a literal, exactly or as a Python expression; None if it needs a tensor."""
    dtype = args[0].dtype
    numbers = [v.number for v in args if v.number is not None]
    x = args[0].text
    if len(numbers) == len(args):
        exact: dict[str, Callable[..., Fraction | None]] = {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
            "div": lambda a, b: a / b if b else None, "neg": lambda a: -a, "square": lambda a: a * a,
            "reciprocal": lambda a: 1 / a if a else None, "abs": abs, "max": max, "min": min,
            "exp": lambda a: Fraction(1) if a == 0 else None,
        }  # fmt: skip
        value = exact[fn](*numbers) if fn in exact else None
        if value is not None:
            return _literal(value, dtype if dtype.is_float or value.denominator == 1 else DType.f32)
    match fn:
        case "add" | "sub" | "mul" | "div":
            text = f"({x} {_INFIX[fn]} {args[1].text})"
        case "neg":
            text = f"(-{x})"
        case "reciprocal":
            text = f"(1.0 / {x})"
        case "square":
            text = f"({x} ** 2)"
        case "sqrt" | "rsqrt":
            text = f"({x} ** {'0.5' if fn == 'sqrt' else '-0.5'})"
        case "pow":
            text = f"({x} ** {float(Fraction(attrs['exponent']))!r})"
        case "max" | "min":
            text = f"{fn}({x}, {args[1].text})"
        case _:
            return None
    return Value(text, (), dtype if dtype.is_float else DType.f32, dtype, literal=True)


def _integer_range(dtype: DType) -> tuple[int, int]:
    signed = not dtype.value.startswith("u")
    return (-(2 ** (dtype.bits - 1)), 2 ** (dtype.bits - 1) - 1) if signed else (0, 2**dtype.bits - 1)


def _paren_sum(text: str) -> str:
    """A factor of a product of sizes."""
    return text if re.fullmatch(r"\w+", text) else f"({text})"
