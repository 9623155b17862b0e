"""Plans for a CPU: one derivation of all targets, as calls of PyTorch on whole tensors.

There are no roles to choose on a CPU: the torch target reads a block graph over whole tensors, one call for each step.
What is left is the algebra: which products are formed in which order, what is factored, distributed, moved past a sum
or computed once.  Each step is priced as a call that reads its operands and writes its result, and the derivation that
costs least together is the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mugraph.search.closure import Edge
from mugraph.search.cost import Prediction, predict_library
from mugraph.search.derive import KernelSearch
from mugraph.search.extract import INFEASIBLE, Assignment, Derivation, Ints, Mandatory, Problem, Roles, Way
from mugraph.search.library import contraction, made_of_indices
from mugraph.search.partition import Choice, Partition
from mugraph.search.values import Number

FREE = 1e-12  # seconds of what is no call: a load, a number
ABSORBED = 1e-7  # seconds of what is written as a part of another call: a negation before a sum, 1/x in a product
MINUS_ONE = Number(Fraction(-1))
WHOLE = Assignment(Roles((), ()), {})


class Calls(Partition):
    """The one plan of a CPU, in the place of kernels."""

    def solve(self, roots: tuple[int, ...], required: bool = False) -> list[Choice]:
        """The cheapest calls for these roots, as one launch; empty where there are none."""
        del required
        if roots not in self.choices:
            found = KernelSearch(Steps(Scope(self.p, roots)), 0).run(math.inf)
            self.choices[roots] = [] if found is None else [Choice(roots, found, self.predicted(found), ())]
        return self.choices[roots]

    def plans(self, groups: tuple[tuple[int, ...], ...]) -> list[list[Choice]]:
        """The cheapest calls for each group; no plan where a group has none."""
        each = [self.solve(group)[:1] for group in groups]
        return [[c for found in each for c in found]] if all(each) else []

    def predicted(self, d: Derivation) -> Prediction:
        """The seconds of all calls, and the operations of the contractions among them."""
        p = self.p
        loaded = {s.entry[0] for s in d.loads()}
        made = {s.entry[0]: s.option.edge for s in d.steps if s.option.edge}
        flops = sum(2.0 * w.volume for c in made for w in p.ways[c] if w.edge == made[c] and w.closed)
        moved = sum(map(p.bytes, loaded | set(d.roots)))
        return Prediction(d.cost, (("calls", d.cost),), moved, flops)


@dataclass(frozen=True, eq=False)
class Scope:
    """The classes below some roots, children first."""

    p: Problem
    roots: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        members = self.p.below_all(self.roots)
        return [c for c in self.p.closure.order if c in members]

    @property
    def assignments(self) -> list[Assignment]:
        return [WHOLE]


class Steps:
    """The ways to compute each class of a scope, with their seconds."""

    def __init__(self, scope: Scope) -> None:
        self.survey, p = scope, scope.p
        self.mandatory: Mandatory = p.alone
        self.starts: Mapping[int, Ints] = {r: np.ones(1, dtype=np.int64) for r in scope.roots}
        self._ways = {c: list(self._priced(c)) for c in scope.order}
        self._local = {c: min((t for t, _ in ways), default=math.inf) for c, ways in self._ways.items()}
        self._chain: dict[int, float] = {}
        for c in scope.order:
            below = ((t, way.edge.children if way else ()) for t, way in self._ways[c])
            paths = (t + max((self._chain[x] for x in children), default=0.0) for t, children in below)
            self._chain[c] = min(paths, default=math.inf)
        if any(math.isinf(self._chain[r]) for r in scope.roots):
            self.starts = {r: np.full(1, INFEASIBLE, dtype=np.int64) for r in scope.roots}

    def _priced(self, c: int) -> Iterator[tuple[float, Way | None]]:
        p = self.survey.p
        if c in p.inputs:
            yield FREE, None
        for way in p.ways[c]:
            yield way_seconds(p, c, way), way

    def column(self, n: int) -> tuple[dict[int, int], dict[int, int], dict[int, float], dict[int, float]]:
        """By class: its open axes, its least pass, its own cost, that of its path."""
        del n
        order = self.survey.order
        return dict.fromkeys(order, 0), dict.fromkeys(order, 1), self._local, self._chain

    def ways(self, n: int) -> Callable[[int], Iterator[tuple[float, Way | None]]]:
        del n
        return lambda c: iter(self._ways[c])


def way_seconds(p: Problem, c: int, way: Way) -> float:
    """Seconds of one step as a call of PyTorch."""
    edge = way.edge
    if not edge.children or (not p.axes(c) and made_of_indices(p, c)):
        return FREE
    if is_absorbed(p, edge):
        return ABSORBED
    tensors = [x for x in dict.fromkeys(edge.children) if p.axes(x) or not made_of_indices(p, x)]
    moved = p.bytes(c) + sum(map(p.bytes, tensors))
    if edge.kind == "product" and edge.closes:
        left, right = (p.axes(x) for x in edge.children)
        if set(left) == set(right):  # a product of tensors of one shape, then its sum
            moved += 2 * p.bytes(edge.children[0])
        return contraction(p.sizes, left, right, p.axes(c), moved, p.dtype, p.device).seconds
    return predict_library(moved, way.volume, p.dtype, p.device).seconds


def is_absorbed(p: Problem, edge: Edge) -> bool:
    """A reciprocal, or a product with -1: the steps around it are written as a quotient or a difference."""
    if edge.kind == "call" and edge.fn == "inv":
        return True
    numbers = (e.leaf for x in edge.children for e in p.closure.classes[x].edges if edge.kind == "product")
    return any(leaf == MINUS_ONE for leaf in numbers)
