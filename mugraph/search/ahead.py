"""Work done once, on constant inputs alone, while they stay as they are.

A *fixed* class is computed from constant inputs by every edge that it has.  Of these, the foldable ones may lie in
memory from the start: they are inputs of a second problem, whose plans are compared with those of the first.  A plan
that loads some has the launches that make them in front; these run once, so their cost is counted apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mugraph.ir.axes import Axis, Dim, dims_of
from mugraph.ir.types import Tensor
from mugraph.search import values as v
from mugraph.search.closure import Closure, Edge
from mugraph.search.extract import Derivation, Problem, is_leaf_edge
from mugraph.search.partition import Choice, Partition, with_needs
from mugraph.search.space import SearchSpace

MARGIN = 1.02  # the model is no surer than this, so plans must promise more for the memory that kept values take
HURDLE = 1e-7  # seconds that each kept value must save a kernel, for the same reason
ROOM = 2  # a kept value takes at most that many times the memory of the constant inputs below it

NOT_REAL = {"compare", "cast", "and", "or", "not"}  # calls whose results are not of the program's floating type


@dataclass(frozen=True)
class Fixed:
    """`below`: the constant inputs (canonical names) below each fixed class; `foldable`: those that may be kept."""

    below: Mapping[int, frozenset[str]]
    foldable: frozenset[int]

    def launches(self, plan: Sequence[Choice]) -> list[Choice]:
        """The launches of a plan that are done ahead."""
        return [c for c in plan if all(r in self.below for r in c.roots)]

    def calls(self, plan: Sequence[Choice]) -> list[Choice]:
        """The launches of a plan that each call makes."""
        return [c for c in plan if not all(r in self.below for r in c.roots)]


def fixed_classes(
    p: Problem,
    constants: Mapping[str, Tensor],
    axes: Mapping[str, Axis],
    outputs: frozenset[int],
    kept_out: frozenset[int],
) -> Fixed:
    """The fixed classes of a problem, outputs excluded, under the constant values of these (canonical) names.  Foldable
    are those with axes whose values are of the floating type, that may be materialised there, and that take no more
    than ROOM times the memory of their inputs; none of `kept_out`."""
    below: dict[int, frozenset[str]] = {}
    sizes: dict[int, frozenset[Dim]] = {}
    for c in p.closure.order:
        edges = p.closure.classes[c].edges
        parts = [_of_edge(e, constants, axes, below, sizes) for e in edges]
        if c in outputs or not parts or any(x is None for x in parts):
            continue
        names = frozenset().union(*(x[0] for x in parts if x))
        wanted = frozenset().union(*(x[1] for x in parts if x))
        given = {d for n in names for s in constants[n].shape for d in dims_of(s) if len(dims_of(s)) == 1}
        if wanted <= given or not names:
            below[c], sizes[c] = names, wanted
    made = {c: names for c, names in below.items() if names and c not in p.inputs}
    leaf = {str(e.leaf[0]): c for c in p.inputs for e in p.closure.classes[c].edges if is_leaf_edge(e) and e.leaf}
    foldable = {
        c
        for c, names in made.items()
        if p.axes(c)
        and c not in kept_out
        and c in p.foldable
        and not any(e.kind == "call" and e.fn in NOT_REAL for e in p.closure.classes[c].edges)
        and any(constants[n].dtype.is_float for n in names)
        and p.bytes(c) <= ROOM * sum(p.bytes(leaf[n]) for n in names)
    }
    return Fixed(made, frozenset(foldable))
