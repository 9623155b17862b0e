"""A module's graph as Python text: the parts that programs take over, and PyTorch code between them.

    composed = compose(model, args)
    composed.regions                   # each with a program
    composed.text({"part_0"})          # a function of weights and arguments, in which `run_part_0` is called

What is a part is decided in `parts.py`.
"""

from __future__ import annotations

import ast
import functools
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mugraph.errors import CaptureError
from mugraph.ir.graph import Program
from mugraph.pytorch.capture import decompositions
from mugraph.pytorch.effects import undone
from mugraph.pytorch.ops import IGNORED
from mugraph.pytorch.parts import Part, computes, split


@dataclass(frozen=True)
class Region:
    """A part of the graph, by its name there.  `operators` names what it computes."""

    name: str
    part: Part
    operators: tuple[str, ...]

    @property
    def program(self) -> Program:
        return self.part.program


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
        orders = {r.name: r.part for r in self.regions if r.name in replaced}
        functions = [_function(self.graph, name, orders)]
        for r in self.regions:
            if r.name not in replaced:
                functions.insert(0, _function(self.graph.get_submodule(r.name), f"run_{r.name}", {}))
        if any("torch.device(" in f for f in functions):
            raise CaptureError("it makes a tensor on a fixed device")
        return "\n\n\n".join(functions)


def compose(model: Any, args: Sequence[Any], name: str) -> Composed:
    """Captures a module called with these tensors and plain values; programs are named after `name`.

    Raises CaptureError where torch.export cannot capture it, or the graph is one that a function of tensors cannot
    stand for."""
    exported = _exported(model, args)
    weights = _weights(exported, model)
    cut = split(exported.graph_module, name, least=1)
    called = [n.target for n in cut.module.graph.nodes if n.op == "call_module"]
    regions = tuple(Region(n, cut.parts[n], tuple(_computing(cut.module.get_submodule(n)))) for n in called)
    left = tuple(_computing(cut.module))
    reasons = {op: cut.reasons.get(op, "it is alone with views") for op in left}
    return Composed(cut.module, regions, weights, left, reasons, _result(exported))


def graph_text(model: Any, args: Sequence[Any]) -> str:
    """What the module computes, to be compared."""
    return str(_exported(model, args).graph_module.code)


def _exported(model: Any, args: Sequence[Any]) -> Any:
    import torch

    run = model.forward

    @functools.wraps(run)
    def forward(*given: Any, **named: Any) -> Any:
        with undone(model):
            return run(*given, **named)

    model.forward = forward
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(model, tuple(args), strict=False).run_decompositions(decompositions())
    except CaptureError:
        raise
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(f"torch.export cannot capture it: {first}") from error
    finally:
        del model.forward
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


def _computing(graph: Any) -> list[str]:
    return [str(n.target) for n in graph.graph.nodes if computes(n)]


# -- as text


def _function(graph: Any, name: str, replaced: Mapping[str, Part]) -> str:
    """A graph as a Python function of its placeholders, in their order."""
    parameters = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    source = graph.graph.python_code("self").src
    tree = ast.parse(source)
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    lines = [_called(ast.unparse(statement), replaced) for statement in function.body]
    body = [re.sub(r"(?<![\w.])device\(", "torch.device(", line) for line in lines if not line.endswith("= None")]
    body = [re.sub(r"(?<![\w.'])(inf|nan)\b", r"float('\1')", line) for line in body]
    return "\n".join([f"def {name}({', '.join(parameters)}):", *(f"    {line}" for line in body)])


def _called(line: str, replaced: Mapping[str, Part]) -> str:
    """A call of a part as that of a function, whose results are given the strides that they have in the graph."""
    found = re.fullmatch(r"(\w+) = self\.(part_\d+)\((.*)\)", line)
    if found is None:
        return line
    target, part, arguments = found.groups()
    call = f"run_{part}({arguments})"
    orders = replaced[part].orders if part in replaced else ()
    if all(order == tuple(range(len(order))) for order in orders):
        return f"{target} = {call}"
    if replaced[part].single:
        return f"{target} = {call}.permute({orders[0]})"
    return f"{target} = tuple(x.permute(order) for x, order in zip({call}, {orders}))"
