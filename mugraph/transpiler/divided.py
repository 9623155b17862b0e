"""How an emitted file does work ahead: `ahead` computes on constant inputs, `rest` does what is left for each call,
and `run` keeps what the first gave (`kept.py`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

OWN_NAMES = ("Any", "Callable", "Kept", "ahead", "keep", "rest", "threading", "weakref")


@cache
def kept_text() -> tuple[str, str]:
    """What `kept.py` imports besides torch, and the class `Kept`."""
    text = files("mugraph.transpiler").joinpath("kept.py").read_text(encoding="utf-8")
    _, imports, body = re.split(r"(?<=\"\"\"\n\n)(.*?)\n\nimport torch\n", text, maxsplit=1, flags=re.DOTALL)
    return imports, body.strip()


def divided_text(parameters: Sequence[str], constants: Sequence[str], kept: Sequence[str]) -> list[str]:
    """The pieces that make `run(parameters)` of `ahead(constants) -> kept` and `rest(parameters, kept)`."""
    given, found = ", ".join(parameters), ", ".join(kept)
    run = f'''def run({given}, *, out=None):
    """`rest`, with what `ahead` gives kept while the constants stay as they are."""
    {found} = keep({", ".join(constants)})
    return rest({", ".join([*parameters, *kept])}, out=out)'''
    return [kept_text()[1], "keep = Kept(ahead)", run]
