"""The space that a search covers, as a value: printed with every report and stored with every result."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from mugraph.errors import SettingError
from mugraph.search.abstraction import AbstractionName
from mugraph.search.laws import LAWS
from mugraph.settings import Effort
from mugraph.typed import Limits, Natural, Positive, PowerOfTwo, fit_fields

BUDGETS = ("nodes", "entries", "states", "operators")


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen, and the budgets, as counts so that a run is reproducible.  Every field is checked against its
    annotation (`mugraph.typed`): a list may stand for a tuple, and a mapping for `tiles`.  Raises SettingError.

    split         a reduction may be cut over the grid, with a combine
    library       contractions may be library calls
    kernels       the greatest number of kernels of our own (library calls apart); 0: nothing is searched, the program
                  runs as library calls
    passes        the greatest number of loops in sequence in one kernel
    beside        independent kernels may share a launch
    laws          the named laws that add seeds
    differences   a difference may be multiplied out, Σ (x - m)·w as Σ x·w - m·Σ w: one pass less over x, and what x
                  and m have in common is rounded away
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
    kernels: Natural = 8
    passes: Annotated[int, Limits(least=0, most=2)] = 2
    beside: bool = True
    laws: tuple[str, ...] = tuple(LAWS)
    differences: bool = False
    symbolic: Positive = 16
    sizes: tuple[Positive, ...] = (1, 64, 256)
    grid: tuple[str, ...] | None = None
    loops: tuple[str, ...] | None = None
    tiles: tuple[tuple[str, PowerOfTwo], ...] = ()
    ahead: bool = True
    inside: tuple[str, ...] = ()
    nodes: Positive = 4_000
    entries: Positive = 1_000_000
    states: Positive = 24_000
    operators: Positive = 20
    segments: Positive = 40
    candidates: Natural = 0
    abstraction: AbstractionName = "closure"

    def __post_init__(self) -> None:
        fit_fields(self)
        if unknown := set(self.laws) - set(LAWS):
            raise SettingError(f"unknown laws {sorted(unknown)}", remedy=f"known: {', '.join(LAWS)}")
        given = {field: list(getattr(self, field) or ()) for field in ("laws", "grid", "loops", "inside")}
        for field, names in (given | {"tiles": [axis for axis, _ in self.tiles]}).items():
            if twice := sorted({n for n in names if names.count(n) > 1}):
                raise SettingError(f"SearchSpace.{field} names {', '.join(twice)} twice", remedy="give each name once")

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
    """The space for an effort: `none` searches nothing and leaves the program as library calls, `quick` is the default
    space, `full` has ten times its budgets and runs the enumerator."""
    match effort:
        case "none":
            return SearchSpace(kernels=0, split=False, laws=(), sizes=())
        case "quick":
            return SearchSpace()
        case "full":
            return SearchSpace(nodes=40_000, entries=10_000_000, states=240_000, candidates=20_000)
