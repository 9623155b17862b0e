"""What prunes never prunes the best: bounds are below what they bound, and branch-and-bound over all assignments of
roles finds what an enumeration of all derivations of all assignments finds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings

from mugraph.ir.graph import Program
from mugraph.search.cost import device
from mugraph.search.derive import KernelSearch
from mugraph.search.driver import search
from mugraph.search.extract import Roles, Survey
from mugraph.search.partition import ATTEMPTS, SLACK, Partition, partition
from mugraph.search.space import SearchSpace
from tests.search import programs
from tests.search.programs import SMALL
from tests.search.random_programs import programs as random_programs
from tests.search.test_extract import Enumeration, all_options, problem_of

WIDE = SearchSpace(states=1_000_000, entries=10_000_000)
EXACT = ["gated_mlp", "lora", "mha", "softmax", "own_softmax", "linear_bias_residual", "quotient", "chain"]


def everything(run: Partition, roots: tuple[int, ...], alone: bool = True) -> tuple[Survey, list[float]]:
    """All assignments of the first attempt that has any, and the least additive cost of each by enumeration (infinite
    where there is no derivation)."""
    for least, shrinks in ATTEMPTS:
        survey = run.survey(roots, least, shrinks)
        assert survey is not None
        outcome = survey.outcome(alone)
        costs = []
        for n in range(len(survey.assignments)):
            kernel = KernelSearch(outcome, n)
            start = kernel.start()
            costs.append(math.inf if start is None else Enumeration(kernel, all_options(kernel)).cost(start))
        if any(map(math.isfinite, costs)):
            return survey, costs
    raise AssertionError("no assignment has a derivation")


@pytest.mark.parametrize("name", EXACT)
def test_the_bound_of_an_assignment_is_below_all_its_derivations(name: str) -> None:
    problem, targets = problem_of(SMALL[name](), WIDE)
    survey, costs = everything(Partition(problem, WIDE), targets[:1])
    bounds = survey.outcome(True).bounds
    assert len(bounds) == len(costs) >= 3
    assert all(bound <= cost * (1 + 1e-12) for bound, cost in zip(bounds, costs, strict=True))


@pytest.mark.parametrize("name", EXACT)
def test_branch_and_bound_finds_the_least_of_all_assignments(name: str) -> None:
    problem, targets = problem_of(SMALL[name](), WIDE)
    run = Partition(problem, WIDE)
    survey, costs = everything(run, targets[:1])
    fixed = dict(zip((a.roles for a in survey.assignments), run.fixed_seconds(survey), strict=True))
    least = min(c + fixed[a.roles] for c, a in zip(costs, survey.assignments, strict=True))
    found = run.derivations(targets[:1], True, SLACK)
    assert min(d.cost + fixed[d.roles] for d in found) == pytest.approx(least, rel=1e-9)
    assert problem.truncated == 0


@pytest.mark.parametrize("name", [*EXACT, "two_outputs", "rmsnorm_linear"])
def test_what_cannot_store_the_roots_has_no_derivation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assignments that are left out before the survey are those that the survey finds infeasible."""

    def feasible() -> list[tuple[Roles, tuple[tuple[str, int], ...], float]]:
        problem, targets = problem_of(SMALL[name](), WIDE)
        found = []
        for roots in {targets, *((t,) for t in targets)}:
            for least, shrinks in ATTEMPTS:
                if survey := Partition(problem, WIDE).survey(roots, least, shrinks):
                    bounds = survey.outcome(False).bounds.tolist()
                    each = zip(survey.assignments, bounds, strict=True)
                    found += [(a.roles, tuple(sorted(a.tiles.items())), b) for a, b in each if b < math.inf]
        return sorted(found, key=str)

    filtered = feasible()
    monkeypatch.setattr(Partition, "stored", lambda *_: True)
    monkeypatch.setattr(Partition, "held", lambda *_: True)
    assert filtered == feasible()
    assert filtered


def test_a_bound_that_is_too_high_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above tells when the bounds of the cheapest assignments exceed what they bound."""
    problem, targets = problem_of(SMALL["lora"](), WIDE)
    run = Partition(problem, WIDE)
    survey, costs = everything(run, targets[:1])
    outcome = survey.outcome(True)
    best = costs.index(min(costs))
    spoilt = outcome.bounds.copy()
    spoilt[best] *= 10 * SLACK
    assert not all(bound <= cost for bound, cost in zip(spoilt, costs, strict=True))


FOUND = ["gated_mlp", "lora", "mha", "softmax", "linear_bias_residual", "rmsnorm_linear", "chain"]


@pytest.mark.parametrize("name", FOUND)
def test_the_full_model_prefers_no_assignment_that_was_pruned(name: str) -> None:
    """The additive costs choose which derivations the full model ranks: what they leave out is no better."""
    problem, targets = problem_of(SMALL[name](), WIDE)
    run = Partition(problem, WIDE)
    ranked = run.kernels(targets[:1])
    survey, costs = everything(run, targets[:1])
    outcome = survey.outcome(True)
    found = [KernelSearch(outcome, n).run(math.inf) for n, cost in enumerate(costs) if math.isfinite(cost)]
    tiled = run.tiled([d for d in found if d is not None])
    best = min(c.prediction.seconds for c in tiled if c is not None)
    assert min(c.prediction.seconds for c in ranked if not c.needs) <= best * 1.02


@pytest.mark.parametrize("name", ["lora", "qk_norm_attention", "rmsnorm_linear", "layernorm_linear"])
def test_no_value_is_in_memory_before_its_lower_bound(name: str) -> None:
    program = getattr(programs, name)()
    problem, targets = problem_of(program, SearchSpace())
    bounds = dict(problem.bound)
    partition(problem, SearchSpace(), (targets,), lambda: False)
    priced = {c: t for c, t in problem.memory.items() if c in bounds and math.isfinite(t)}
    assert priced
    assert all(bounds[c] <= t * (1 + 1e-12) for c, t in priced.items())


@settings(max_examples=15)
@given(random_programs(depth=2))
def test_no_candidate_is_below_the_floor(program: Program) -> None:
    for d in (device(), replace(device(), launch_seconds=1e-12, fill_seconds=1e-12, block_seconds=1e-12)):
        report = search(program, accept=lambda graph: None, on=d, space=SearchSpace(kernels=2)).report
        assert all(c.seconds >= report.floor_seconds * (1 - 1e-9) for c in report.candidates)
