"""The registered laws: each holds in both tiers, and neighbours that break its condition are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mugraph.errors import VerificationError
from mugraph.verify.equivalence import REGISTERED, verify
from mugraph.verify.laws import LAWS
from mugraph.verify.prove import prove
from tests.verify.law_pairs import BROKEN, HOLDS
from tests.verify.variants import pair

DOCS = Path(__file__).parents[2] / "docs/verification.md"


def test_each_law_has_an_instance_and_a_neighbour():
    assert {law for law, _ in HOLDS.values()} == {law for law, _ in BROKEN.values()} == set(LAWS)


def test_the_docs_list_each_law():
    text = DOCS.read_text().replace("\\|", "|")
    missing = [law for law in LAWS if f"| {law.equation} | {law.condition}".rstrip() not in text]
    assert missing == []


@pytest.mark.parametrize("name", HOLDS)
def test_a_law_is_used_and_the_certificate_says_so(name: str):
    law, steps = HOLDS[name]
    certificate = verify(*pair(*steps)).certificate
    assert certificate.delta_log2 <= -40
    assert any(a.startswith(REGISTERED) and str(law) in a for a in certificate.assumptions)


@pytest.mark.parametrize("name", HOLDS)
def test_a_law_is_proved(name: str):
    law, steps = HOLDS[name]
    proof = prove(*pair(*steps))
    assert proof.proved, proof.reason
    assert str(law) in proof.laws


@pytest.mark.parametrize("name", BROKEN)
def test_its_neighbour_is_refused(name: str):
    _, steps = BROKEN[name]
    with pytest.raises(VerificationError, match="differs"):
        verify(*pair(*steps))
    assert not prove(*pair(*steps)).proved
