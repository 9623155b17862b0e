"""Work done once, on constant inputs alone, while they stay as they are.

A *fixed* class is computed from constant inputs whatever edge is taken.  `partition` keeps fixed values inside the
kernels that use them.  The foldable ones may lie in memory from the start instead: they are inputs of a second problem,
and a plan for it has the launches that make what it loads of them in front.  These run once, so their cost is counted
apart, and a plan without them wins where it is as cheap; costlier ones are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mugraph.ir.axes import Axis, Dim, dims_of
from mugraph.ir.types import Tensor
from mugraph.search.calls import Calls
from mugraph.search.closure import Edge
from mugraph.search.cost import CPU
from mugraph.search.extract import Problem, is_leaf_edge
from mugraph.search.library import LibraryCall, operands
from mugraph.search.partition import Choice, Partition, partition
from mugraph.search.space import SearchSpace
from mugraph.search.values import Load, Number

MARGIN = 1.02  # the model is no surer than this, and what is kept takes memory, so it must promise more
HURDLE = 1e-7  # seconds that each value kept must save a kernel, for the same reasons
ROOM = 2  # a value kept takes at most that many times the memory of the constant inputs below it
NOT_REAL = frozenset({"compare", "cast", "and", "or", "not"})  # functions whose results are no floating numbers

Classes = frozenset[int]


@dataclass(frozen=True)
class Fixed:
    """`known`: the fixed classes; `computed`: those that are no inputs; `foldable`: those of them that may be kept."""

    known: Classes
    computed: Classes
    foldable: Classes

    def is_ahead(self, choice: Choice) -> bool:
        """Whether the launch works on constant inputs alone."""
        return self.computed.issuperset(choice.roots)

    def calls(self, plan: Sequence[Choice]) -> list[Choice]:
        """The launches of each call."""
        return [c for c in plan if not self.is_ahead(c)]

    def launches(self, plan: Sequence[Choice]) -> list[Choice]:
        """The launches that are done once."""
        return [c for c in plan if self.is_ahead(c)]


def fixed_classes(
    p: Problem,
    constants: Mapping[str, Tensor],
    axes: Mapping[str, Axis],
    outputs: Collection[int],
    foldable: Callable[[int], bool],
) -> Fixed:
    """The fixed classes of the problem, where the values of these names are constant.  Outputs are not among them:
    each call gives new ones.  Foldable are those with axes, of floating numbers, of at most ROOM times the size of the
    constants below, for which `foldable` holds."""
    below: dict[int, frozenset[str]] = {}
    sizes: dict[int, frozenset[Dim]] = {}
    for c in p.closure.order:
        parts = [_below(e, constants, axes, below, sizes) for e in p.closure.classes[c].edges]
        known = [x for x in parts if x is not None]
        if c in outputs or not parts or len(known) < len(parts):
            continue
        below[c] = frozenset().union(*(names for names, _ in known))
        sizes[c] = frozenset().union(*(dims for _, dims in known))
    bytes_of = {str(e.leaf[0]): p.bytes(c) for c in p.inputs for e in p.closure.classes[c].edges if e.leaf}
    computed = set[int]()
    for c, names in below.items():
        given = {d for n in names for s in constants[n].shape for d in dims_of(s) if len(dims_of(s)) == 1}
        if c not in p.inputs and names and sizes[c] <= given:
            computed.add(c)

    def is_real(c: int) -> bool:
        calls = {e.fn for e in p.closure.classes[c].edges if e.kind == "call"}
        return not calls & NOT_REAL and any(constants[n].dtype.is_float for n in below[c])

    kept = {
        c
        for c in computed
        if p.axes(c) and is_real(c) and foldable(c) and p.bytes(c) <= ROOM * sum(bytes_of[n] for n in below[c])
    }
    return Fixed(frozenset(c for c, names in below.items() if names), frozenset(computed), frozenset(kept))


def _below(
    e: Edge,
    constants: Mapping[str, Tensor],
    axes: Mapping[str, Axis],
    below: Mapping[int, frozenset[str]],
    sizes: Mapping[int, frozenset[Dim]],
) -> tuple[frozenset[str], frozenset[Dim]] | None:
    """The constants that an edge computes from, and the symbolic sizes that it needs to know; None if it computes from
    something else."""
    match e.leaf:
        case Load(name) if is_leaf_edge(e):
            return (frozenset((str(name),)), frozenset()) if name in constants else None
        case Load(_, tokens):  # an index
            return frozenset(), frozenset(d for a, _ in tokens for d in dims_of(axes[a].size))
        case Number(_, powers):
            return frozenset(), frozenset(d for a, _ in powers for d in dims_of(axes[a].size))
    if not all(x in below for x in e.children):
        return None
    union: frozenset[str] = frozenset()
    needed: frozenset[Dim] = frozenset()
    for x in e.children:
        union, needed = union | below[x], needed | sizes[x]
    return union, needed


def partition_with_ahead(
    p: Problem,
    fixed: Fixed,
    space: SearchSpace,
    groups: tuple[tuple[int, ...], ...],
    stop: Callable[[], bool],
) -> tuple[list[list[Choice]], Partition]:
    """Complete plans, cheapest first: those of `partition`, which keep fixed values inside kernels, and those that load
    foldable values, with the launches for these in front."""
    once = replace(p, memory=dict(p.memory), bound={c: s for c, s in p.bound.items() if c in fixed.computed})
    for c in fixed.computed - {t for group in groups for t in group}:
        p.bound.pop(c, None)
    second = _with_inputs(p, fixed.foldable)
    make = Calls if p.device.kind == CPU else Partition
    plans, run = partition(p, space, groups, stop, make)
    if not fixed.foldable or stop():
        return plans, run
    ranked = [(run.cost(fixed.calls(plan)), plan) for plan in plans]
    least = min((cost for cost, _ in ranked), default=math.inf)
    first = make(once, space, stop)
    others, folding = partition(second, space, groups, stop, make)
    for plan in others:
        used, cost = sorted(fixed.foldable & loaded(p, plan)), folding.cost(fixed.calls(plan))
        if used and cost < least and (before := _made(first, used)) is not None:
            ranked.append((cost * MARGIN, before + plan))
    for other in (first, folding):
        run.configurations += other.configurations
        run.limited |= other.limited
        for count in ("expanded", "generated", "infeasible", "bounded", "truncated", "untiled"):
            setattr(p, count, getattr(p, count) + getattr(other.p, count))
    return [plan for _, plan in sorted(ranked, key=lambda item: item[0])], run


def _with_inputs(p: Problem, classes: Classes) -> Problem:
    """The problem with these classes as further inputs."""
    found = replace(
        p,
        memory=p.memory | dict.fromkeys(sorted(classes), HURDLE),
        bound={},
        expanded=0,
        generated=0,
        infeasible=0,
        bounded=0,
        truncated=0,
        untiled=0,
    )
    found.inputs |= classes
    for c in p.bound:
        if c not in classes:
            found.bound[c] = found.least_seconds(c)
    return found


def loaded(p: Problem, plan: Sequence[Choice]) -> set[int]:
    """The classes that the launches of a plan load."""
    found = set[int]()
    for c in plan:
        if isinstance(c.how, LibraryCall):
            found |= set(operands(p, c.how))
        found |= {s.entry[0] for d in c.derivations for s in d.loads()}
    return found


def _made(run: Partition, classes: Sequence[int]) -> list[Choice] | None:
    """The launches that make these classes and what they need, in order; None where there is none for some."""
    ordered: list[Choice] = []

    def visit(c: int) -> bool:
        options = run.solve((c,))
        if not options:
            return False
        if options[0] in ordered:
            return True
        if not all(visit(x) for x in options[0].needs):
            return False
        ordered.append(options[0])
        return True

    return ordered if all(visit(c) for c in classes) else None
