"""A wider space never gives a costlier result than a narrower one.

Tiers (none, quick, full) keep that by construction.  Between other spaces it holds for small programs, and to LEEWAY
for benchmark programs of which the whole wider space was covered: additive costs choose one derivation for each
assignment of roles, and launches are joined two at a time, in the order of what each saves; more choices may lead that
astray.
"""

from functools import partial
from typing import Any

import pytest

from benchmarks.programs import PROGRAMS
from mugraph.ir.graph import Program
from mugraph.search import driver
from mugraph.search.driver import Found, search
from mugraph.search.partition import SPLIT_MARGIN
from mugraph.search.setup import UNFIT, Accept
from mugraph.search.space import SearchSpace, space_of
from tests.search import programs
from tests.search.programs import SMALL
from tests.search.test_random import QUICK, divides_by_zero, run

WIDE = QUICK.but(states=4_000, entries=200_000)
LEEWAY = 0.05
# Pairs of a narrower and a wider space; the first two are the tiers that a user names.
WIDER: dict[str, tuple[SearchSpace, SearchSpace]] = {
    "effort none, quick": (space_of("none").but(sizes=()), SearchSpace(sizes=())),
    "quick, full": (WIDE, WIDE.but(nodes=40_000, entries=2_000_000, states=40_000, candidates=500)),
    "one kernel, several": (WIDE.but(kernels=1), WIDE),
    "three kernels, several": (WIDE.but(kernels=3), WIDE),
    "no pass, one": (WIDE.but(passes=0), WIDE.but(passes=1)),
    "one pass, two": (WIDE.but(passes=1), WIDE),
    "no split, split": (WIDE.but(split=False), WIDE),
    "no library, library": (WIDE.but(library=False), WIDE),
    "no launch for two, launches for two": (WIDE.but(beside=False), WIDE),
    "no laws, laws": (WIDE.but(laws=()), WIDE),
    "nothing ahead, work ahead": (WIDE.but(ahead=False), WIDE),
    "few nodes, many": (WIDE.but(nodes=60), WIDE),
    "few entries, many": (WIDE.but(entries=2_000), WIDE),
    "few states, more": (WIDE.but(states=20), WIDE.but(states=200)),
    "more states, many": (WIDE.but(states=200), WIDE),
}


def cost(program: Program, space: SearchSpace) -> float:
    """What the search makes least: predicted seconds, those of a split by its margin."""
    report = search(program, accept=lambda graph: graph, space=space).report
    split = sum(k.seconds for k in report.kernels if " split(" in k.name)
    return report.predicted_seconds + (SPLIT_MARGIN - 1) * split


def never_worse(program: Program, pair: str, leeway: float = 1e-7) -> None:
    if divides_by_zero(program):
        return
    if search(program, accept=lambda graph: graph, space=WIDER[pair][1]).report.candidates[-1].verdict == UNFIT:
        return  # kernels are taken at any price
    narrow, wide = (cost(program, space) for space in WIDER[pair])
    assert wide <= narrow * (1 + leeway), f"{1e6 * narrow:.2f} µs, in the wider space {1e6 * wide:.2f}"


@pytest.mark.parametrize("name", ["lora", "gqa", "chain", "two_outputs", "own_softmax"])
def test_small_programs_cost_no_more_in_a_wider_space(name: str) -> None:
    for pair in WIDER:
        never_worse(SMALL[name](), pair)


def test_a_space_that_is_not_wider_may_cost_more() -> None:
    """What the comparison would not let pass."""
    program = programs.rmsnorm_linear()
    assert cost(program, WIDE) < cost(program, WIDE.but(library=False, kernels=1, passes=0))


def test_a_narrower_result_is_kept_where_the_wider_search_has_a_worse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    program, wide = programs.rmsnorm_linear(), SearchSpace(sizes=(), nodes=40_000, candidates=50)
    real = driver._whole

    def crippled(program: Program, accept: Accept, space: SearchSpace, *rest: Any, **options: Any) -> Found:
        space = space.but(passes=0, library=False) if space.candidates else space
        return real(program, accept, space, *rest, **options)

    quick = search(program, accept=lambda g: g, space=SearchSpace(sizes=())).report
    monkeypatch.setattr(driver, "_whole", crippled)
    full = search(program, accept=lambda g: g, space=wide).report
    assert full.predicted_seconds == quick.predicted_seconds
    assert full.space != quick.space
    assert "found under the default budgets" in full.notes[-1]


TIERS = ("effort none, quick", "quick, full")


def test_tiers_of_random_programs() -> None:
    for pair in TIERS:
        run(range(5_000_000, 5_000_010), partial(never_worse, pair=pair), lines=6)


@pytest.mark.full
@pytest.mark.parametrize("name", PROGRAMS)
def test_benchmark_programs_cost_no_more_in_a_wider_space(name: str) -> None:
    for pair in WIDER:
        if pair in TIERS:
            never_worse(PROGRAMS[name], pair)
        elif search(PROGRAMS[name], accept=lambda g: g, space=WIDER[pair][1]).report.stop.kind == "Saturated":
            never_worse(PROGRAMS[name], pair, LEEWAY)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(10))
@pytest.mark.parametrize("pair", TIERS)
def test_tiers_of_many_random_programs(pair: str, shard: int) -> None:
    start = 5_000_000 + 100 * shard
    run(range(start, start + 100), partial(never_worse, pair=pair))
