"""A wider space never gives a costlier result than a narrower one."""


from mugraph.ir.graph import Program
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from tests.search.test_random import QUICK

WIDE = QUICK.but(states=4_000, entries=200_000)
# Pairs of a narrower and a wider space; the first two are the tiers that a user names.
WIDER: dict[str, tuple[SearchSpace, SearchSpace]] = {
    "effort none, quick": (SearchSpace(split=False, laws=(), nodes=1, states=1, sizes=()), SearchSpace(sizes=())),
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


def seconds(program: Program, space: SearchSpace) -> float:
    return search(program, accept=lambda graph: graph, space=space).report.predicted_seconds


def never_worse(program: Program, pair: str) -> None:
    narrow, wide = (seconds(program, space) for space in WIDER[pair])
    assert wide <= narrow * (1 + 1e-9), f"{1e6 * narrow:.2f} µs, in the wider space {1e6 * wide:.2f}"
