"""Checks that nothing has changed since a call, as straight code: one comparison for each thing that was looked at.

`Guards.state` makes a key of all that a function reads, which takes longer than a small function runs.  A call like one
before only has to hold the same objects in the same places, so that is all that is compared.  Where an object is
another, equal or not, the key decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What a checked function returns where something has changed.
CHANGED = object()
_LINE = 12  # comparisons in a line of the code


class Checks:
    """Comparisons, each a Python expression in which `{0}`, `{1}`, .. stand for objects."""

    def __init__(self) -> None:
        self.terms: dict[str, None] = {}
        self.objects: dict[str, Any] = {"CHANGED": CHANGED}
        self._names: dict[int, str] = {}

    def add(self, text: str, *objects: Any) -> None:
        """Something that must hold."""
        self.terms[text.format(*(self.name(x) for x in objects))] = None

    def name(self, x: Any) -> str:
        """What the object is called in the code.  It is kept alive, so that no other one gets its identity."""
        found = self._names.get(id(x))
        if found is None:
            found = self._names[id(x)] = f"c{len(self._names)}"
            self.objects[found] = x
        return found

    def function(
        self, parameters: str, result: str, once: bool, through: tuple[type[Exception], ...] = ()
    ) -> Callable[..., Any]:
        """A function that returns `result`, an expression, where everything holds, else CHANGED: also where what was
        looked at is gone, and where `result` raises, unless it may be computed only once.  Errors in `through` are
        raised."""
        terms = list(self.terms)
        lines = [f"def checked({parameters}):", "    try:"]
        for at in range(0, len(terms), _LINE):
            lines += [f"        if not ({' and '.join(terms[at : at + _LINE])}):", "            return CHANGED"]
        lines += [] if once else [f"        return {result}"]
        lines += [
            f"    except {self.name(through)}:",
            "        raise",
            "    except Exception:",
            "        return CHANGED",
        ]
        space = dict(self.objects)
        exec("\n".join([*lines, *([f"    return {result}"] if once else [])]), space)
        found: Callable[..., Any] = space["checked"]
        return found
