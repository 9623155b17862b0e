"""The space that a search covers, as a value: printed with every report and stored with every result."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace
from typing import Any

from mugraph.errors import SettingError
from mugraph.search.abstraction import ABSTRACTIONS, AbstractionName
from mugraph.search.laws import LAWS
from mugraph.settings import Effort

BUDGETS = ("nodes", "entries", "states", "operators")


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen, and the budgets, as counts so that a run is reproducible.

    split         a reduction may be cut over the grid, with a combine
    library       contractions may be library calls
    kernels       the greatest number of kernels of our own (library calls apart)
    passes        the greatest number of loops in sequence in one kernel
    beside        independent kernels may share a launch
    laws          the named laws that add seeds
    symbolic      the size that stands for each symbolic dimension when costs are compared
    sizes         further sizes at which costs are compared; structures are found for ranges between them
    grid          the axes that kernels are cut over (those that all roots of a kernel have); None: any
    loops         the axes that passes may loop over; None: any
    tiles         fixed tile sizes, as (axis, tile)
    ahead         what constant inputs alone determine may be computed once, ahead of the calls
    inside        values that must not be materialised: they stay in a kernel
    nodes         budget of factors in the expressions of the closure
    entries       budget of classes looked at, over all assignments of roles of all kernels
    states        budget of expanded states, over all kernels
    operators     a program of more operators (views and numbers apart) is cut into segments of at most that many
    segments      budget of different segments searched, for each size at which costs are compared
    candidates    budget of the enumerator, which widens the closure with identities found bottom-up; 0: it does not run
    abstraction   what the enumerator is pruned by: "closure", "size" or "off"
    """

    split: bool = True
    library: bool = True
    kernels: int = 8
    passes: int = 2
    beside: bool = True
    laws: tuple[str, ...] = tuple(LAWS)
    symbolic: int = 16
    sizes: tuple[int, ...] = (1, 64, 256)
    grid: tuple[str, ...] | None = None
    loops: tuple[str, ...] | None = None
    tiles: tuple[tuple[str, int], ...] = ()
    ahead: bool = True
    inside: tuple[str, ...] = ()
    nodes: int = 4_000
    entries: int = 1_000_000
    states: int = 32_000
    operators: int = 20
    segments: int = 40
    candidates: int = 0
    abstraction: AbstractionName = "closure"

    def __post_init__(self) -> None:
        if unknown := set(self.laws) - set(LAWS):
            raise SettingError(f"unknown laws {sorted(unknown)}", remedy=f"known: {', '.join(LAWS)}")
        for name in ("symbolic", "kernels", "nodes", "entries", "states", "operators", "segments"):
            if getattr(self, name) < 1:
                raise SettingError(f"SearchSpace.{name} is {getattr(self, name)}", remedy="give at least 1")
        if any(size < 1 for size in self.sizes):
            raise SettingError(f"SearchSpace.sizes is {self.sizes}", remedy="give sizes of at least 1")
        if self.candidates < 0:
            raise SettingError(f"SearchSpace.candidates is {self.candidates}", remedy="give 0 or more")
        if self.abstraction not in ABSTRACTIONS:
            known = ", ".join(ABSTRACTIONS)
            raise SettingError(f"SearchSpace.abstraction is {self.abstraction!r}", remedy=f"give one of {known}")
        if not 0 <= self.passes <= 2:
            raise SettingError(f"SearchSpace.passes is {self.passes}", remedy="give 0, 1 or 2")
        for axis, tile in self.tiles:
            if tile < 1 or tile & (tile - 1):
                raise SettingError(f"the tile of {axis} is {tile}, not a power of two")

    def but(self, **changes: Any) -> SearchSpace:
        """The same space with some fields changed."""
        return replace(self, **changes)

    def under_default_budgets(self) -> SearchSpace:
        """The space with no budget beyond the default one, and without the enumerator: part of this one."""
        least = {f.name: min(getattr(self, f.name), f.default) for f in fields(self) if f.name in BUDGETS}
        return self.but(**least, candidates=0)

    def __str__(self) -> str:
        return "SearchSpace(" + ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self)) + ")"


def space_from(text: str) -> SearchSpace:
    """The space that was printed so.  Raises SettingError for another text.

    >>> space_from(str(SearchSpace(kernels=3))).kernels
    3
    """
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("it is no SearchSpace(...)")
        return SearchSpace(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (SyntaxError, TypeError, ValueError) as error:
        raise SettingError(f"{text[:40]!r} is not the text of a SearchSpace: {error}") from error


def space_of(effort: Effort) -> SearchSpace:
    """The space for an effort: `none` leaves the program as library calls, `quick` is the default space, `full` has
    ten times its budgets and runs the enumerator."""
    match effort:
        case "none":
            return SearchSpace(split=False, laws=(), nodes=1, states=1)
        case "quick":
            return SearchSpace()
        case "full":
            return SearchSpace(nodes=40_000, entries=10_000_000, states=320_000, candidates=20_000)
