"""How an emitted file does work ahead: `ahead` computes on constant inputs, `rest` does what is left for each call,
and `run` keeps what the first gave (`kept.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

WIDTH = 120
OWN_NAMES = ("Any", "Callable", "Kept", "ahead", "keep", "rest", "threading", "weakref")


@cache
def kept_text() -> tuple[str, str]:
    """What `kept.py` imports besides torch, and the class `Kept`."""
    text = files("mugraph.transpiler").joinpath("kept.py").read_text(encoding="utf-8")
    _, _, code = text.split('"""', 2)
    imports, body = code.split("import torch\n", 1)
    return imports.strip(), body.strip()


def divided_text(name: str, parameters: Sequence[str], constants: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The pieces that make a function of parameters from `ahead(constants) -> kept` and `rest(parameters, kept)`."""
    given = call_lines(f"def {name}", [*parameters, "*", "out=None"], ":", "")
    found = call_lines(f"{', '.join(kept)} = keep", constants, "", "    ")
    rest = call_lines("return rest", [*parameters, *kept, "out=out"], "", "    ")
    what = '    """`rest`, with what `ahead` gives kept while the constants stay as they are."""'
    return [kept_text()[1], "keep = Kept(ahead)", "\n".join([*given, what, *found, *rest])]


def call_lines(head: str, args: Sequence[str], tail: str, indent: str) -> list[str]:
    """`head(args)tail`, broken over lines as formatters do."""
    one = f"{indent}{head}({', '.join(args)}){tail}"
    if len(one) <= WIDTH:
        return [one]
    inner = f"{indent}    {', '.join(args)}"
    if len(inner) <= WIDTH:
        return [f"{indent}{head}(", inner, f"{indent}){tail}"]
    return [f"{indent}{head}(", *(f"{indent}    {a}," for a in args), f"{indent}){tail}"]
