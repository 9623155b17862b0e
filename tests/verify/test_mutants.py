"""Planted errors are refused, all of them: by hand, and one of each systematic kind; the others are marked `full`."""

import re
from typing import Any

import pytest

from mugraph.errors import GraphError, VerificationError
from mugraph.ir.check import check
from mugraph.verify.equivalence import verify
from tests.verify.mutants import SHIFTS, Mutant, by_hand, systematic

HAND = list(by_hand())
SYSTEMATIC = list(systematic())
KEPT = (
    "becomes|reads|for|left|out|not|accumulated|operands|swapped|and|are|monoid|"
    "mul|add|sub|div|max|min|sum|mean|sqrt|exp|silu|rescaled"
)
WRONG = [m for m in (*HAND, *SYSTEMATIC) if m.name not in SHIFTS]


def kind(mutant: Mutant) -> str:
    """What is changed, without the names of values and the numbers."""
    change = mutant.name.split(": ", 2)[-1]
    return re.sub(rf"\b(?!({KEPT})\b)[\w/]+", "_", change)


def sampled() -> list[Any]:
    """All that are made by hand, the first of each systematic kind, and the rest for the full run."""
    kinds = {kind(m): m for m in reversed(SYSTEMATIC) if m in WRONG}
    first = {m.name for m in (*HAND, *kinds.values())}
    return [pytest.param(m, id=m.name, marks=() if m.name in first else pytest.mark.full) for m in WRONG]


def test_the_corpus_is_large_and_without_repetition():
    assert len(WRONG) >= 100
    assert len({m.name for m in WRONG}) == len(WRONG)
    assert len({(m.program, m.graph) for m in WRONG}) == len(WRONG)


def test_the_sample_has_every_kind():
    fast = {p.id for p in sampled() if not p.marks}
    assert {kind(m) for m in SYSTEMATIC if m.name in fast} == {kind(m) for m in SYSTEMATIC if m in WRONG}
    assert 20 <= len({kind(m) for m in SYSTEMATIC}) < len(SYSTEMATIC) // 2


@pytest.mark.parametrize("mutant", sampled())
def test_a_planted_error_is_refused(mutant: Mutant):
    with pytest.raises((VerificationError, GraphError)):
        verify(mutant.program, mutant.graph)


def test_most_planted_errors_are_refused_for_their_values():
    """They are well-formed graphs that compute something else: a check of form alone accepts them."""
    formed = []
    for m in WRONG:
        try:
            check(m.graph)
        except GraphError:
            continue
        formed.append(m)
    assert len(formed) >= 80


def test_every_shift_is_in_the_corpus():
    assert {m.name for m in SYSTEMATIC} >= SHIFTS


@pytest.mark.parametrize("name", ["gqa: m: reads qk for z", "gqa_split: dm: sub becomes add"])
def test_another_shift_of_a_softmax_is_accepted(name: str):
    mutant = next(m for m in SYSTEMATIC if m.name == name)
    verify(mutant.program, mutant.graph)
