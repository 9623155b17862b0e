"""Extraction: exact by comparison with an enumeration of all derivations, admissible in its bound, and never beaten by
its own beam."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings

from mugraph.ir.graph import Program
from mugraph.search import derive, setup
from mugraph.search.canonical import canonical
from mugraph.search.cost import device
from mugraph.search.derive import KernelSearch, Merged, kernel_search
from mugraph.search.extract import INFEASIBLE, Derivation, Entry, Option, Problem, Roles
from mugraph.search.laws import meaning
from mugraph.search.partition import Partition
from mugraph.search.space import SearchSpace
from tests.search.programs import SMALL
from tests.search.random_programs import programs

State = frozenset[Entry]


def problem_of(program: Program, space: SearchSpace) -> tuple[Problem, tuple[int, ...]]:
    """What extraction works on, and the classes of the outputs."""
    here = canonical(program)
    known = meaning(here.program)
    closure, seeds = setup.closure_of(here.program, known, space)
    groups, _ = setup.targets_of(here, known, seeds)
    return setup.problem_of(here.program, closure, seeds, space, device()), tuple(t for group in groups for t in group)


def kernels_of(program: Program, space: SearchSpace, every: int = 1) -> list[KernelSearch]:
    """One extraction for each assignment of roles to a kernel for the first output; of many, each `every`-th."""
    problem, targets = problem_of(program, space)
    run = Partition(problem, space)
    roots = targets[:1]
    chosen = list(run.roles(roots, 1))[::every] if targets else []
    return [kernel_search(problem, roots, r, run.default_tiles(roots, r, 1)) for r in chosen]


class Enumeration:
    """The least cost of completing a state, over *all* derivations: every option of every class, in every pass.

    The rules are written anew: an open value is computed in the pass of its user, another before it; closing over
    the looped axis leads to an earlier pass over that axis; what is not open is computed once, as early as needed.
    """

    def __init__(self, kernel: KernelSearch, options: Mapping[int, list[Option]]) -> None:
        self.kernel, self.options = kernel, options
        self.known: dict[State, float] = {frozenset(): 0.0}

    def open(self, c: int) -> bool:
        return bool(set(self.kernel.p.axes(c)) & self.kernel.roles.loops)

    def may_be(self, entry: Entry) -> bool:
        c, at = entry
        if not self.open(c):
            return True
        loops = set(self.kernel.p.axes(c)) & self.kernel.roles.loops
        if at == self.kernel.last + 1:  # in the combine, which has the split axis on its grid
            return self.kernel.roles.split is not None and loops == {self.kernel.roles.split[0]}
        return at <= self.kernel.last and loops <= set(self.kernel.roles.passes[at - 1])

    def children(self, entry: Entry, option: Option) -> list[tuple[Entry, ...]]:
        c, at = entry
        if option.loop is None or self.open(c):
            return [tuple((x, at) for x in option.children)]
        passes = [q for q in range(1, at) if set(self.kernel.roles.passes[q - 1]) == set(option.loop)]
        if self.kernel.roles.split:
            passes = [q for q in passes if q == self.kernel.last]
        return [tuple((x, q) for x in option.children) for q in passes]

    def cost(self, state: State) -> float:
        if state not in self.known:
            entry = max(state, key=lambda e: (self.kernel.p.position[e[0]], e[1]))
            best = math.inf
            if self.may_be(entry):
                for option in self.options[entry[0]]:
                    for children in self.children(entry, option):
                        best = min(best, option.cost + self.cost(self.joined(state - {entry}, children)))
            self.known[state] = best
        return self.known[state]

    def joined(self, state: State, children: tuple[Entry, ...]) -> State:
        merged = set(state)
        for c, at in children:
            if not self.open(c):
                earlier = [q for x, q in merged if x == c]
                merged -= {(c, q) for q in earlier}
                at = min([at, *earlier])
            merged.add((c, at))
        return frozenset(merged)


def all_options(kernel: KernelSearch) -> dict[int, list[Option]]:
    """The options with none dropped as dominated."""
    return {c: kernel.all_options(c) for c in kernel.order}


def check_derivation(d: Derivation) -> None:
    """Every step has its children among the steps, each entry is computed once, and the cost is what the steps pay."""
    entries = [s.entry for s in d.steps]
    assert len(set(entries)) == len(entries)
    classes = {c for c, _ in entries}
    assert all(x in classes for s in d.steps for x in s.option.children)
    assert set(d.roots) <= classes
    assert math.isclose(d.cost, sum(s.option.cost for s in d.steps))


def check_passes(kernel: KernelSearch, d: Derivation) -> None:
    """Operands of an open value lie in its pass, and what a loop closes is asked for after it; each loop is used."""
    opened, passes = kernel.open, d.roles.passes
    at: dict[int, set[int]] = {}
    for c, q in (s.entry for s in d.steps):
        at.setdefault(c, set()).add(q)
    for s in d.steps:
        c, asked = s.entry
        closes = s.option.loop is not None and not opened[c]
        assert not opened[c] or set(kernel.p.axes(c)) & d.roles.loops <= set(passes[asked - 1])
        for x, q in s.children:
            assert q < asked and set(passes[q - 1]) == set(s.option.loop or ()) if closes else q == asked
            assert q in at[x] if opened[x] else min(at[x]) <= q
    assert {q for c in at for q in at[c] if opened[c]} == set(range(1, len(passes) + 1))


EXACT = ["gated_mlp", "lora", "mha", "softmax", "own_softmax", "linear_bias_residual", "rmsnorm_linear", "quotient"]


@pytest.mark.parametrize("name", EXACT)
def test_a_star_is_as_cheap_as_the_cheapest_of_all_derivations(name: str) -> None:
    kernels = kernels_of(SMALL[name](), SearchSpace(states=100_000))
    feasible = 0
    for kernel in kernels:
        start = kernel.start()
        exhaustive = Enumeration(kernel, all_options(kernel))
        cheapest = exhaustive.cost(start) if start is not None else math.inf
        rejected = kernel.p.infeasible
        derivation = kernel.run(math.inf)
        if derivation is not None:
            feasible += 1
            check_derivation(derivation)
            if not kernel.roles.split:
                check_passes(kernel, derivation)
            assert math.isclose(derivation.cost, cheapest, rel_tol=1e-12)
        elif kernel.p.infeasible > rejected:
            assert start is None or cheapest == math.inf
        else:  # the cheapest leaves a loop empty: other roles hold it
            assert kernel.roles.passes
            if len(kernel.roles.passes) == 2:
                assert kernel.extract(math.inf).cost == pytest.approx(cheapest)  # type: ignore[union-attr]
                assert kernel.filled(kernel.extract(math.inf)) is None
    assert feasible > 0


def test_the_enumeration_sees_a_search_that_drops_an_option() -> None:
    """A search without its loads finds costlier derivations, or none; the comparison above would tell."""
    differs = 0
    for kernel in kernels_of(SMALL["lora"](), SearchSpace()):
        start = kernel.start()
        if start is None:
            continue
        cheapest = Enumeration(kernel, all_options(kernel)).cost(start)
        for c in kernel.order:
            if len(kernel.options(c)) > 1:
                kernel.options(c).pop(0)
        derivation = kernel.run(math.inf)
        differs += derivation is not None and not math.isclose(derivation.cost, cheapest)
    assert differs > 0


@pytest.mark.parametrize("name", ["lora", "mha", "layernorm_linear", "qk_norm_attention"])
def test_the_beam_is_never_cheaper_than_a_star(name: str) -> None:
    program = SMALL[name]()
    exact = kernels_of(program, SearchSpace(states=100_000), every=7)
    beamed = kernels_of(program, SearchSpace(states=1), every=7)
    compared = 0
    for a, b in zip(exact, beamed, strict=True):
        x, y = a.run(math.inf), b.run(math.inf)
        if x is not None and y is not None:
            compared += 1
            check_derivation(y)
            assert y.cost >= x.cost * (1 - 1e-12)
    assert compared > 0
    assert beamed[0].p.truncated > 0
    assert exact[0].p.truncated == 0


@settings(max_examples=15)
@given(programs(depth=2, outputs=1))
def test_the_bound_is_admissible(program: Program) -> None:
    for kernel in kernels_of(program, SearchSpace(passes=1), every=5):
        start = kernel.start()
        if start is None:
            continue
        exhaustive = Enumeration(kernel, all_options(kernel))
        exhaustive.cost(start)
        assert all(
            kernel.bound(kernel.encoded(state)) <= cost * (1 + 1e-12) for state, cost in exhaustive.known.items()
        )


def in_two_passes(name: str) -> list[KernelSearch]:
    """The searches with two passes over one axis."""
    found = [k for k in kernels_of(SMALL[name](), SearchSpace()) if len(k.roles.passes) == 2 and k.start()]
    assert found
    return [k for k in found if k.roles.passes[0] == k.roles.passes[1]]


def test_merged_passes_cost_no_more_and_tell_where_one_will_do() -> None:
    for kernel in in_two_passes("own_softmax"):  # the row is loaded twice
        merged, found = Merged(kernel).extract(math.inf), kernel.run(math.inf)
        assert merged is not None
        assert found is not None
        assert not kernel.one_will_do(merged)
        assert merged.cost < found.cost
    for kernel in in_two_passes("rmsnorm_linear"):  # the sum of squares is needed after the product only
        merged, found = Merged(kernel).extract(math.inf), kernel.extract(math.inf)
        assert merged is not None
        assert found is not None
        assert kernel.one_will_do(merged)
        assert merged.cost == pytest.approx(found.cost)
        assert kernel.run(math.inf) is None


def test_hard_searches_seek_only_what_saves_enough_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel, *_) = in_two_passes("own_softmax")
    exact = kernel.run(math.inf)
    assert exact is not None
    little, much = (replace(exact, cost=exact.cost * more) for more in (1.05, 1.2))
    assert kernel.run(math.inf, lambda: little) == exact  # easy
    monkeypatch.setattr(derive, "EASY", 1)
    assert kernel.run(math.inf, lambda: little) is None
    assert kernel.run(math.inf, lambda: much) == exact


def test_an_upper_limit_prunes_what_costs_more() -> None:
    kernel = next(k for k in kernels_of(SMALL["lora"](), SearchSpace()) if k.run(math.inf))
    cost = kernel.run(math.inf).cost  # type: ignore[union-attr]
    assert kernel.run(cost * 1.01) is not None
    before = kernel.p.bounded
    assert kernel.run(cost * 0.99) is None
    assert kernel.p.bounded == before + 1


def test_a_reduction_over_a_grid_axis_is_refused() -> None:
    problem, roots = problem_of(SMALL["chain"](), SearchSpace())
    root_axes = problem.axes(roots[0])
    inner = next(a for c in problem.closure.order for a in problem.axes(c) if a not in root_axes)
    kernel = kernel_search(problem, roots, Roles((root_axes[0], inner), ()), {root_axes[0]: 16, inner: 8}, alone=True)
    assert kernel.least[roots[0]] == INFEASIBLE
    assert kernel.run(math.inf) is None
