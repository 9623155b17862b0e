"""A module's graph, cut into regions that are programs and the rest, which stays PyTorch code.

    composed = compose(model, args)
    composed.regions                   # each with a program
    composed.text({0})                 # Python: a function of weights and arguments, region 0 replaced by `run_0`

The cut is that of `torch.fx`'s CapabilityBasedPartitioner: greatest sets of operators that have a meaning here.
"""

from __future__ import annotations

import ast
import copy
import operator
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mugraph.dsl.record import Recorder
from mugraph.errors import CaptureError, MugraphError, UnsupportedOpError
from mugraph.ir.graph import Program
from mugraph.pytorch.capture import KEPT, capture
from mugraph.pytorch.ops import IGNORED, meaning_of

VIEWS = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select",
    "alias", "detach", "clone", "split", "split_with_sizes", "chunk", "flatten", "unflatten", "contiguous",
    "lift_fresh_copy", "_to_copy",
}  # fmt: skip
MOST_TRIES = 64  # cuts, each without the operators that failed before


@dataclass(frozen=True)
class Region:
    """A part of the graph as a program.  `operators` names what it computes."""

    name: str
    program: Program
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Composed:
    """A captured module.

    `weights` gives, for each of the first parameters of the function, the attribute of the module that it takes; the
    others are the arguments.  `left` names the operators that are in no region, `reasons` says why.  `result` says what
    the module returns: "one" tensor, a "tuple" or a "list" of tensors.
    """

    graph: Any
    regions: tuple[Region, ...]
    weights: tuple[str, ...]
    left: tuple[str, ...]
    reasons: Mapping[str, str]
    result: str

    def text(self, replaced: Collection[str], name: str = "composed") -> str:
        """The function as Python.  The regions in `replaced` are called as `run_<name>(...)`, which returns a tensor,
        or a tuple; the others are functions beside it, of PyTorch operators.  Raises CaptureError where these make
        tensors on a device of their own."""
        functions = [_function(self.graph, name, replaced)]
        for r in self.regions:
            if r.name not in replaced:
                functions.insert(0, _function(self.graph.get_submodule(r.name), f"run_{r.name}", ()))
        if any("torch.device(" in f for f in functions):
            raise CaptureError("it makes a tensor on a fixed device")
        return "\n\n\n".join(functions)


def compose(model: Any, args: Sequence[Any], name: str) -> Composed:
    """Captures a module called with these tensors and plain values; programs are called `<name>_0`, ...

    Raises CaptureError where torch.export cannot capture it, or the graph is one that a function of tensors cannot
    stand for."""
    exported = _exported(model, args)
    weights = _weights(exported, model)
    refused: dict[str, str] = {}
    for _ in range(MOST_TRIES):
        graph = _cut(exported, refused)
        try:
            regions = tuple(_regions(graph, name))
        except UnsupportedOpError as error:
            found = error.op or ""
            if found in refused or not found:
                raise
            refused[found] = error.message
            continue
        left = tuple(_computing(graph))
        return Composed(graph, regions, weights, left, _reasons(left, refused), _result(exported))
    raise CaptureError(f"{name} has more than {MOST_TRIES} kinds of operators that are not understood")


def graph_text(model: Any, args: Sequence[Any]) -> str:
    """What the module computes, to be compared."""
    return str(_exported(model, args).graph_module.code)


def _exported(model: Any, args: Sequence[Any]) -> Any:
    import torch

    table: Any = torch.export.default_decompositions()
    for key in [k for k in table if str(k).removeprefix("aten.") in KEPT]:
        table.pop(key)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, tuple(args), strict=False).run_decompositions(table)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(f"torch.export cannot capture it: {first}") from error
    for spec in exported.graph_signature.output_specs:
        if spec.kind.name != "USER_OUTPUT":
            raise CaptureError(f"it writes into {spec.target or 'an input'}")
    for node in list(exported.graph.nodes):
        if node.op == "call_function" and str(node.target).removeprefix("aten.").partition(".")[0] in IGNORED:
            exported.graph.erase_node(node)  # an assertion of what the examples are
    return exported


def _weights(exported: Any, model: Any) -> tuple[str, ...]:
    found = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            continue
        owner, _, own = (spec.target or "").rpartition(".")
        try:
            getattr(model.get_submodule(owner), own)
        except AttributeError as error:
            raise CaptureError(f"it reads a tensor {spec.target} that is no attribute of it") from error
        found.append(spec.target)
    return tuple(found)


def _result(exported: Any) -> str:
    spec = exported.call_spec.out_spec
    if spec.is_leaf():
        return "one"
    if spec.type in (tuple, list) and all(c.is_leaf() for c in spec.children()):
        return str(spec.type.__name__)
    raise CaptureError(f"it returns a {spec.type.__name__} of more than tensors")


# -- the cut


def _cut(exported: Any, refused: Collection[str]) -> Any:
    """The graph with a submodule for each region that computes something."""
    from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
    from torch.fx.passes.operator_support import OperatorSupportBase

    class Understood(OperatorSupportBase):
        def is_node_supported(self, submodules: Any, node: Any) -> bool:
            return _has_meaning(node) and str(node.target) not in refused

    graph = copy.deepcopy(exported.graph_module)
    partitioner = CapabilityBasedPartitioner(graph, Understood(), allows_single_node_partition=True)
    parts = [p for p in partitioner.propose_partitions() if any(_computes(n) for n in p.nodes)]
    return partitioner.fuse_partitions(parts, prefix="region_")


def _has_meaning(node: Any) -> bool:
    if node.op != "call_function":
        return False
    name = str(node.target)
    if node.target is operator.getitem:
        return _has_meaning(node.args[0])
    return name.startswith("aten.") and name.split(".")[1] not in IGNORED and meaning_of(name, Recorder()) is not None


def _computes(node: Any) -> bool:
    name = str(node.target)
    return node.op == "call_function" and name.startswith("aten.") and name.split(".")[1] not in VIEWS | IGNORED


def _computing(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if _computes(n)]


def _regions(graph: Any, name: str) -> list[Region]:
    import torch

    found: list[Region] = []
    for node in graph.graph.nodes:
        if node.op != "call_module":
            continue
        part = graph.get_submodule(node.target)
        examples = []
        for n in part.graph.nodes:
            if n.op == "placeholder":
                value = n.meta["val"]
                if not isinstance(value, torch.Tensor):
                    raise CaptureError(f"a size is passed between operators, as {n.name}")
                examples.append(torch.empty(value.shape, dtype=value.dtype))
        try:
            captured = capture(part, tuple(examples), name=f"{name}_{len(found)}")
        except UnsupportedOpError:
            raise
        except MugraphError as error:  # of some operator in it: the costliest to describe goes first
            first = _computing(part)[0]
            raise UnsupportedOpError(error.message, op=first) from error
        if len(captured.arguments) != len(examples) or captured.constants:
            raise UnsupportedOpError("a region reads something else than its arguments", op=_computing(part)[0])
        found.append(Region(node.target, captured.program, tuple(_computing(part))))
    return found


def _reasons(left: Sequence[str], refused: Mapping[str, str]) -> dict[str, str]:
    return {name: refused.get(name, "no meaning here") for name in left}


# -- as text


def _function(graph: Any, name: str, replaced: Collection[str]) -> str:
    """A graph as a Python function of its placeholders, in their order."""
    parameters = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    source = graph.graph.python_code("self").src
    tree = ast.parse(source)
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    lines = [ast.unparse(statement) for statement in function.body]
    body = [re.sub(r"self\.(region_\d+)\(", r"run_\1(", line) for line in lines]
    body = [re.sub(r"(?<![\w.])device\(", "torch.device(", line) for line in body if not line.endswith("= None")]
    body = [re.sub(r"(?<![\w.'])(inf|nan)\b", r"float('\1')", line) for line in body]
    return "\n".join([f"def {name}({', '.join(parameters)}):", *(f"    {line}" for line in body)])
