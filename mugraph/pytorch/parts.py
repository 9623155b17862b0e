"""The parts of an ATen graph that programs can take over.

    found = split(graph_module)          # a copy in which each part is a submodule
    found.parts["part_0"].program        # what it computes
    found.refused                        # why other nodes stay with PyTorch

A node may belong to a part if the bridge gives it a meaning as it is called here: with these element types, sizes and
arguments.  That is tried node by node, then for each part as a whole; what fails then leaves the part.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mugraph.dsl import tensor as t
from mugraph.dsl.tensor import SizeValue, Tensor
from mugraph.dsl.trace import TensorSpec
from mugraph.errors import CaptureError, MugraphError, UnsupportedOpError
from mugraph.ir.axes import MAX_SIZE, Dim, Size
from mugraph.ir.graph import Program
from mugraph.ir.types import DType
from mugraph.pytorch import autograd_ops as _autograd_ops  # noqa: F401  (adds its rows)
from mugraph.pytorch.capture import Interpreter, user_line
from mugraph.pytorch.ops import dtype_of, meaning_of

# What moves no element, and what makes a tensor from nothing: a part of these alone computes nothing.
VIEWS = {
    "view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "split", "split_with_sizes", "unbind", "detach", "alias", "clone", "lift_fresh_copy", "getitem",
}  # fmt: skip
MADE = {
    "full", "ones", "zeros", "full_like", "ones_like", "zeros_like", "scalar_tensor", "arange", "new_ones", "new_zeros",
    "new_full",
}  # fmt: skip
LEAST = 2  # operators that compute: one alone is a library call already
ROUNDS = 32  # in which nodes leave parts, before the graph stays as it is


@dataclass(frozen=True)
class Limit:
    """A symbolic size, and the argument and dimension that it is read from."""

    dim: Dim
    argument: int
    position: int

    def holds(self, args: Sequence[Any]) -> bool:
        return bool(self.dim.min <= args[self.argument].shape[self.position] <= self.dim.max)


@dataclass(frozen=True)
class Part:
    """A part as a program.  `taken` numbers the arguments that are its inputs, in order (others are sizes).  `orders`
    gives for each result the permutation that turns the program's output, which is row-major, into it: strides are
    those of the graph.  `single` says that the part returns its one result itself.  `nodes` counts its operators."""

    program: Program
    taken: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    limits: tuple[Limit, ...]
    single: bool
    nodes: int


@dataclass(frozen=True)
class Split:
    """A graph whose parts are submodules: `parts` by the name of the submodule; for each operator outside all parts
    why it is (`reasons`), and with that how often and where (`refused`)."""

    module: Any
    parts: Mapping[str, Part]
    reasons: Mapping[str, str]
    refused: Mapping[str, str]
    nodes: int

    @property
    def understood(self) -> int:
        return sum(p.nodes for p in self.parts.values())


class _Refused(Exception):
    """A node that does not belong to its part."""

    def __init__(self, node: Any, error: Exception) -> None:
        super().__init__(node, error)
        self.node = node
        self.error = error


class _Fragment(Interpreter):
    """Runs a few nodes of a graph; what comes from outside is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, SizeValue] = {}
        self.limits: list[tuple[Dim, Any, int]] = []

    def tensor(self, node: Any, fake: Any, name: str) -> None:
        """The node's value as an input."""
        import torch

        if type(fake) is not torch.Tensor and not _is_plain_fake(fake):
            raise UnsupportedOpError(f"{type(fake).__name__} is no plain tensor")
        if fake.layout is not torch.strided or fake.is_neg() or fake.is_conj():
            raise UnsupportedOpError(f"a tensor with the layout {fake.layout}, or lazily negated")
        self.device = fake.device.type
        shape = [self._dimension(size, node, i) for i, size in enumerate(fake.shape)]
        x = self.tracing.input(name, TensorSpec(dtype_of(fake.dtype), tuple(shape)))
        self.values[node] = x
        for i, size in enumerate(fake.shape):
            if (expr := _expression(size)) is not None:
                self.sizes.setdefault(str(expr), t.dim_size(x, i))

    def declare(self, inputs: Iterable[tuple[Any, Any]]) -> None:
        """Names the symbolic sizes that are dimensions of these inputs, so that products of them are known as such."""
        for node, fake in inputs:
            for i, size in enumerate(fake.shape):
                expr = _expression(size)
                if expr is not None and expr.is_Symbol:
                    self._named(size, node, i)

    def _named(self, size: Any, node: Any, position: int) -> Dim:
        key = str(_expression(size))
        if key not in self.symbols:
            self.symbols[key] = Dim(f"s{len(self.symbols)}", *_range(size))
            self.limits.append((self.symbols[key], node, position))
        return self.symbols[key]

    def _dimension(self, size: Any, node: Any, position: int) -> Size:
        """A size of an input; one that is no product of known sizes gets a name of its own."""
        try:
            return self.size(size)
        except MugraphError:
            return self._named(size, node, position)

    def number(self, size: Any) -> Any:
        """A torch size that is an argument: an int, or a size of the program."""
        expr = _expression(size)
        return int(size) if expr is None else self._number(expr)

    def _number(self, expr: Any) -> Any:
        if expr.is_Integer:
            return int(expr)
        if str(expr) in self.sizes:
            return self.sizes[str(expr)]
        if expr.is_Mul or expr.is_Add:
            first, *others = (self._number(a) for a in expr.args)
            for x in others:
                first = first * x if expr.is_Mul else first + x
            return first
        raise CaptureError(f"the size {expr} is no size of an input of this part")

    def compute(self, node: Any) -> None:
        """The node's value.  Raises MugraphError where it has no meaning here, or another type than in torch."""
        if _is_getitem(node):
            self.values[node] = self.values[node.args[0]][node.args[1]]
        else:
            self.call(node)
        if self.tracing.recorder.natural:
            raise UnsupportedOpError("its indices must not be negative, and a part does not check them")
        found = self.values[node]
        if isinstance(found, Tensor):
            self.names[found.value] = re.sub(r"\W", "_", _base(node))


def _is_plain_fake(fake: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return type(fake) is FakeTensor


def _expression(size: Any) -> Any:
    """The expression of a symbolic size; None for a static one."""
    expr = getattr(getattr(size, "node", None), "expr", None)
    return None if expr is None or expr.is_Integer else expr


def _symbols(fake: Any) -> set[Any]:
    """The symbols in a fake tensor's shape, or in a size."""
    import torch

    sizes = fake.shape if isinstance(fake, torch.Tensor) else [fake]
    return {s for size in sizes if (expr := _expression(size)) is not None for s in expr.free_symbols}


def _range(size: Any) -> tuple[int, int]:
    """The sizes that may come.  A program has no empty tensors, so that it starts at 1."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    upper = int(bounds.upper) if bounds.upper.is_Integer else MAX_SIZE
    return min(max(int(bounds.lower) if bounds.lower.is_Integer else 1, 1), MAX_SIZE), max(1, min(upper, MAX_SIZE))


def _base(node: Any) -> str:
    """`add` of `aten.add.Tensor`."""
    name = str(node.target)
    return name.split(".")[1] if name.count(".") > 1 else getattr(node.target, "__name__", name)


def _is_getitem(node: Any) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _producer(node: Any) -> Any:
    """The operator that an item is taken from; another node itself."""
    while _is_getitem(node):
        node = node.args[0]
    return node


def _tensors(fake: Any) -> list[Any]:
    import torch

    return [x for x in (fake if isinstance(fake, tuple | list) else [fake]) if isinstance(x, torch.Tensor)]


# -- which nodes -------------------------------------------------------------------------------------------------


def _why_not(node: Any) -> str:
    """Why a node cannot be in any part, or nothing."""
    import torch

    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return "no ATen operator"
    fakes = [f for n in (node, *node.all_input_nodes) for f in _tensors(n.meta.get("val"))]
    if not _tensors(node.meta.get("val")):
        return "no tensor"
    if len({f.device for f in fakes}) != 1:
        return "tensors on several devices"
    try:
        _tried(node)
    except MugraphError as error:
        return error.message
    except Exception as error:  # a meaning that does not expect such arguments
        return f"{type(error).__name__}: {error}"
    return ""


def _tried(node: Any) -> None:
    """The meaning of one node, by itself.  Raises where it has none."""
    import torch

    fragment = _Fragment()
    if meaning_of(str(node.target), fragment.tracing.recorder) is None:
        raise UnsupportedOpError(f"the operator {node.target} is not supported")
    inputs = [(n, n.meta.get("val")) for n in node.all_input_nodes]
    if odd := [fake for _, fake in inputs if not isinstance(fake, torch.Tensor | torch.SymInt | int)]:
        raise UnsupportedOpError(f"an argument is {type(odd[0]).__name__}")
    for symbol in sorted({str(s) for _, fake in inputs for s in _symbols(fake)}):  # other nodes of a part may tell them
        fragment.symbols[symbol] = Dim(f"d_{symbol}")
        x = fragment.tracing.input(f"size_{symbol}", TensorSpec(DType.f32, (fragment.symbols[symbol],)))
        fragment.sizes[symbol] = t.dim_size(x, 0)
    for n, (source, fake) in enumerate(inputs):
        if isinstance(fake, torch.Tensor):
            fragment.tensor(source, fake, f"x{n}")
        else:
            fragment.values[source] = fragment.number(fake)
    fake = node.meta["val"]
    if isinstance(fake, torch.Tensor):
        widened = [x for _, x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim]
        if fake.dtype is torch.float64 and any(x.dtype is not fake.dtype for x in widened):
            raise UnsupportedOpError("it widens to f64, in which a program computes only with what it is given in f64")
        fragment.compute(node)
        return
    fragment.call(node)
    found = fragment.values[node]
    for user in node.users:
        if _is_getitem(user) and not user.users:
            continue
        if not _is_getitem(user) or not isinstance(found[user.args[1]], Tensor):
            raise UnsupportedOpError(f"a result of {node.target} is not understood")


# -- one part as a program ---------------------------------------------------------------------------------------


def captured(module: Any, name: str) -> Part:
    """The program of a part, which is a plain ATen graph.  Raises _Refused for the node that does not belong to it,
    MugraphError where the whole is no program."""
    import torch

    fragment = _Fragment()
    nodes = list(module.graph.nodes)
    given = [n for n in nodes if n.op == "placeholder"]
    taken = [i for i, n in enumerate(given) if isinstance(n.meta.get("val"), torch.Tensor)]
    fragment.declare((given[i], given[i].meta["val"]) for i in taken)
    for number, i in enumerate(taken):
        fragment.tensor(given[i], given[i].meta["val"], f"x{number}")
    called = [n for n in nodes if n.op == "call_function"]
    sizes = {n: n.meta.get("val") for n in given if n not in fragment.values}
    for node in called:
        try:
            for source in (n for n in node.all_input_nodes if n in sizes):
                fragment.values[source] = fragment.number(sizes[source])
            fragment.compute(node)
        except Exception as error:
            raise _Refused(node, error) from error
    returned = nodes[-1].args[0]
    single = not isinstance(returned, tuple | list)
    results, orders = [], []
    for node in [returned] if single else returned:
        x = fragment.values[node]
        if not isinstance(x, Tensor) or x.masked is not None:
            raise _Refused(node, CaptureError("a result is a number, or holds minus infinity"))
        order = _stored_order(node.meta["val"])
        if order is None:
            raise _Refused(node, CaptureError("a result with gaps or overlaps between its elements"))
        results.append(x.permute(order) if order != tuple(sorted(order)) else x)
        orders.append(tuple(order.index(i) for i in range(len(order))))
    fragment.tracing.recorder.where = None
    program = fragment.tracing.finish(name, results, None, fragment.names)
    places = {n: i for i, n in enumerate(given)}
    limits = tuple(Limit(dim, places[n], at) for dim, n, at in fragment.limits)
    return Part(program, tuple(taken), tuple(orders), limits, single, sum(not _is_getitem(n) for n in called))


def _stored_order(fake: Any) -> tuple[int, ...] | None:
    """The dimensions in the order in which memory has them, outermost first; None where they are not dense."""
    sizes, strides = [_hint(s) for s in fake.shape], [_hint(s) for s in fake.stride()]
    order = sorted(range(len(sizes)), key=lambda i: -strides[i])
    if all(s == 1 or strides[i] == math.prod(sizes[i + 1 :]) for i, s in enumerate(sizes)):
        order = list(range(len(sizes)))
    reach = 1
    for i in reversed(order):
        if sizes[i] != 1 and strides[i] != reach:
            return None
        reach *= sizes[i]
    return tuple(order)


def _hint(size: Any) -> int:
    """The size in the example, which decides nothing but the order of strides."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return 2 if hint is None else int(hint)


# -- all parts of a graph ----------------------------------------------------------------------------------------


def computes(node: Any) -> bool:
    """Whether a node is an operator that computes something."""
    return node.op == "call_function" and not _is_getitem(node) and _base(node) not in VIEWS | MADE


def split(module: Any, name: str, least: int = LEAST) -> Split:
    """The graph with its parts as submodules `part_0`, `part_1`, ..., each of at least so many operators that compute;
    the module given is left as it is."""
    from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
    from torch.fx.passes.operator_support import OperatorSupportBase
    from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

    nodes = [n for n in module.graph.nodes if n.op == "call_function" and _tensors(n.meta.get("val"))]
    reasons = {n.name: _why_not(n) for n in nodes if not _is_getitem(n)}

    class Support(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: Any) -> bool:
            return reasons.get(_producer(node).name) == ""

    parts: dict[str, Part] = {}
    for _ in range(ROUNDS):
        cut = _copied(module)
        partitioner = CapabilityBasedPartitioner(
            cut, Support(), allows_single_node_partition=True, non_compute_ops=_view_names(nodes)
        )
        proposed = partitioner.propose_partitions()
        partitioner.remove_bookend_non_compute_ops(proposed)
        kept = [p.nodes for p in proposed if sum(map(computes, p.nodes)) >= least]
        cut = fuse_by_partitions(cut, kept, prefix="part_")
        parts, clean = {}, True
        for key, part in [(k, m) for k, m in cut.named_children() if k.startswith("part_")]:
            try:
                parts[key] = captured(part, f"{name}_{key}")
            except _Refused as refusal:
                reasons[_producer(refusal.node).name], clean = _message(refusal.error), False
            except MugraphError as error:
                reasons |= {n.name: error.message for n in _nodes(part)}
                clean = False
        if clean:
            break
    else:
        why = {"the graph": f"its parts still changed after {ROUNDS} rounds"}
        return Split(module, {}, why, why, len(reasons))
    counts = Counter(str(n.target) for n in nodes if reasons.get(n.name))
    why = {str(n.target): reasons[n.name] for n in reversed(nodes) if reasons.get(n.name)}
    where = {str(n.target): user_line(n.meta.get("stack_trace")) for n in reversed(nodes)}
    often = {op: "once" if n == 1 else f"{n} times" for op, n in counts.items()}
    refused = {op: f"{often[op]}: {why[op]}" + (f" at {where[op]}" if where[op] else "") for op in why}
    return Split(cut, parts, why, refused, len(reasons))


def _nodes(module: Any) -> list[Any]:
    return [n for n in module.graph.nodes if n.op == "call_function"]


def _copied(module: Any) -> Any:
    """The module with a graph of its own, over the same tensors and fake values."""
    import torch

    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return torch.fx.GraphModule(module, graph)


def _message(error: Exception) -> str:
    return error.message if isinstance(error, MugraphError) else f"{type(error).__name__}: {error}"


def _view_names(nodes: Sequence[Any]) -> list[str]:
    from torch.fx.node import _get_qualified_name

    return sorted({_get_qualified_name(n.target) for n in nodes if _base(n) in VIEWS and not _is_getitem(n)})
