"""Planted errors are refused, all of them."""

import pytest

from mugraph.errors import GraphError, VerificationError
from mugraph.ir.check import check
from mugraph.verify.equivalence import verify
from tests.verify.mutants import SHIFTS, Mutant, by_hand, systematic

HAND = list(by_hand())
SYSTEMATIC = list(systematic())
WRONG = [m for m in (*HAND, *SYSTEMATIC) if m.name not in SHIFTS]


def test_the_corpus_is_large_and_without_repetition():
    assert len(WRONG) >= 100
    assert len({m.name for m in WRONG}) == len(WRONG)
    assert len({(m.program, m.graph) for m in WRONG}) == len(WRONG)


@pytest.mark.parametrize("mutant", WRONG, ids=lambda m: m.name)
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
