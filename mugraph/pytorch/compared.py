"""Exported graphs as text, to tell whether two of them compute the same.

    lines = described(exported, symbols)       # one for each operator: its name, its operands, shapes of its results

Sizes are written as `symbols` says: one of them may be a number there.  Operators on sizes alone, assertions and copies
that only lay memory out are left out, and views go by the shape of their result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A view whose result is told by its operand and the shape of its result.
RESHAPED = {"view", "_unsafe_view", "reshape", "expand"}
COPIED = {"clone", "alias", "contiguous"}


@dataclass(frozen=True)
class Line:
    """What a node computes, and where the function says so (a stack trace of PyTorch)."""

    text: str
    trace: str | None


def described(exported: Any, symbols: Mapping[str, str | int]) -> list[Line]:
    """`symbols` gives for symbolic sizes, by the names that torch has for them, another name or a number."""
    import torch

    known: dict[Any, str] = {}
    lines: list[Line] = []

    def written(x: Any) -> str:
        if isinstance(x, torch.fx.Node):
            return known[x] if x in known else _size(x.meta.get("val", x.target), symbols)
        if isinstance(x, list | tuple):
            return f"[{', '.join(map(written, x))}]"
        return _size(x, symbols)

    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        value, base = node.meta.get("val"), str(node.target).rpartition("aten.")[2].partition(".")[0]
        if node.op == "placeholder":
            spec = specs[node.name]
            text = f"{spec.kind.name} {spec.target}"
            if spec.kind.name == "CONSTANT_TENSOR":
                text += f" {_digest(exported.constants[spec.target])}"
        elif node.op == "output":
            text = f"output {written(node.args[0])} {exported.call_spec.out_spec}"
        elif not any(isinstance(v, torch.Tensor) for v in (value if isinstance(value, list | tuple) else [value])):
            continue
        elif base in COPIED:
            known[node] = written(node.args[0])
            continue
        elif base in RESHAPED:
            text = f"reshaped({written(node.args[0])})"
        else:
            named = {k: written(v) for k, v in node.kwargs.items()}
            text = f"{node.target}({written(node.args)}, {named})"
        known[node] = f"%{len(lines)}"
        told = node if node.op != "placeholder" else next(iter(node.users), node)  # where an input is used first
        lines.append(Line(f"{text} -> {_shapes(value, symbols)}", told.meta.get("stack_trace")))
    return lines


def difference(one: list[Line], other: list[Line]) -> tuple[Line, Line] | None:
    """The first lines in which two graphs differ; both end with an output."""
    pairs = zip(one, other, strict=False)
    return next(((a, b) for a, b in pairs if a.text != b.text), None)


def _digest(x: Any) -> str:
    import torch

    values = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def _shapes(value: Any, symbols: Mapping[str, str | int]) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_shapes(v, symbols) for v in value)}]"
    if not hasattr(value, "shape"):
        return _size(value, symbols)
    return f"{value.dtype}[{', '.join(_size(s, symbols) for s in value.shape)}]"


def _size(size: Any, symbols: Mapping[str, str | int]) -> str:
    """A size or a number made of sizes; whatever else as it is written."""
    expression = getattr(getattr(size, "node", None), "expr", None)
    if expression is None:
        return repr(size)
    import sympy  # type: ignore[import-untyped, unused-ignore]

    values = {s: symbols[str(s)] for s in expression.free_symbols if str(s) in symbols}
    found = expression.subs({s: v if isinstance(v, int) else sympy.Symbol(v, integer=True) for s, v in values.items()})
    if found.is_number:
        return repr(int(found) if found.is_integer and "Float" not in type(size).__name__ else float(found))
    return str(found)
