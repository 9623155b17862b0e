"""A graph under other names: its text under these, read back."""

from __future__ import annotations

from typing import TypeVar

from mugraph.ir.graph import Program
from mugraph.ir.parser import parse_program
from mugraph.ir.printer import Names, text_under

P = TypeVar("P", bound=Program)


def renamed(program: P, names: Names) -> P:
    """The same program or μGraph under the names that `names` gives.  The user's lines are not kept."""
    found = parse_program(text_under(program, names))
    assert isinstance(found, type(program))
    return found
