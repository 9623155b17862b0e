"""Which sizes of a function's arguments are symbolic: those that are declared, and those that were seen to change.

A size that differs between two calls which are alike otherwise is taken for a symbol from then on, as TorchDynamo does,
unless one of the two is 0 or 1: these broadcast, so they keep signatures of their own, where sizes are declared too.
Sizes that changed together, from the same number to the same number, share a symbol until a call in which they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from mugraph.ir.axes import Dim

Place = tuple[int, int]  # the number of an argument's leaf, and of a dimension of it
Dims = dict[int, dict[int, Dim]]  # by these numbers
LEAST = 2


def from_least(declared: Mapping[int, Dim]) -> dict[int, Dim]:
    """The declared sizes where they are symbols: from 2 on."""
    return {i: replace(d, min=max(LEAST, d.min)) for i, d in declared.items() if d.max >= LEAST}


def that_hold(tensors: Iterable[tuple[int, Any]], declared: Mapping[int, Mapping[int, Dim]]) -> Dims:
    """The symbolic sizes that hold for these tensors: in range, and equal where they have the same name."""
    found: Dims = {}
    values: dict[str, int] = {}
    for place, x in tensors:
        inside = {
            i: d
            for i, d in declared.get(place, {}).items()
            if i < x.ndim and d.min <= x.shape[i] <= d.max and values.setdefault(d.name, x.shape[i]) == x.shape[i]
        }
        if inside:
            found[place] = inside
    return found


def combinations(tensors: Iterable[tuple[int, Any]], held: Mapping[int, Mapping[int, Dim]]) -> list[dict[str, int]]:
    """Values of the declared sizes that hold for these tensors, by name, that together have every kind of signature:
    each at 1 where it may be 1, all at 1, and at last all at 2 or more."""
    given = [(x.shape[i], d) for place, x in tensors for i, d in held.get(place, {}).items()]
    usual = {d.name: max(n, min(LEAST, d.max)) for n, d in given}
    single = {d.name: 1 for _, d in given if d.min == 1 < d.max}
    apart = [{**usual, name: 1} for name in single] if len(single) > 1 else []
    return [*apart, *([{**usual, **single}] if single else []), usual]


@dataclass
class Changing:
    """The sizes of calls that are alike but for sizes: `first` those of the first call, `dims` those that are symbolic
    by now, `fixed` those that cannot be."""

    first: dict[int, tuple[int, ...]] = field(default_factory=dict)
    dims: Dims = field(default_factory=dict)
    fixed: set[Place] = field(default_factory=set)

    def grown(self, tensors: Sequence[tuple[int, Any]]) -> Dims:
        """The symbolic sizes, with those that these tensors show to change, or to be others than they are taken for."""
        found: Dims = {}
        symbols: dict[tuple[object, int], Dim] = {}  # by what it was before, a symbol or a number, and what it is now
        used = {d.name for own in self.dims.values() for d in own.values()}
        kept: set[str] = set()
        for place, x in tensors:
            before = self.first.setdefault(place, tuple(x.shape))
            for i, (a, b) in enumerate(zip(before, x.shape, strict=True)):
                known = self.dims.get(place, {}).get(i)
                if known is None and (a == b or min(a, b) < LEAST or (place, i) in self.fixed):
                    continue
                if known is not None and (b < LEAST or known.name not in kept):
                    symbols.setdefault((known.name, b), known)
                    kept.add(known.name)
                origin = a if known is None else known.name
                if (origin, b) not in symbols:
                    name = next(f"s{n}" for n in count() if f"s{n}" not in used)
                    used.add(name)
                    symbols[origin, b] = Dim(name, LEAST)
                found.setdefault(place, {})[i] = symbols[origin, b]
        return found

    def fix(self, dims: Mapping[int, Mapping[int, Dim]]) -> None:
        """Takes these sizes, all or the new ones among them, for fixed from now on."""
        self.fixed |= {(p, i) for p, own in dims.items() for i in own if i not in self.dims.get(p, {})}
