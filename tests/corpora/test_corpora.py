"""The verifier on the corpora: nothing wrong is accepted, nothing right is refused."""

from __future__ import annotations

import json

import pytest

import benchmarks.verify
from benchmarks.environment import Row
from benchmarks.verify import main, measured, tiers
from mugraph.verify.equivalence import verify
from tests.corpora.equal import LAWS, equal, equal_by_every_law
from tests.corpora.pairs import Pair, accepted, judged, sources
from tests.corpora.wrong import MUTATIONS, wrong, wrong_of_every_kind

EVERY = 80  # pairs of which the fast tests take one, and one of each kind


@pytest.mark.full
def test_the_corpora_are_large_and_without_repetition():
    for pairs in (wrong(), equal()):
        assert len(pairs) >= 300
        assert len({p.name for p in pairs}) == len(pairs)
        assert len({(p.program, p.graph) for p in pairs}) == len(pairs)


@pytest.mark.full
def test_every_program_mutation_and_law_occurs():
    wrongs = {p.name.split(":")[0] for p in wrong() if p.generator == "tests.corpora.wrong"}
    equals = {p.name.split(":")[0] for p in equal() if p.generator == "tests.corpora.equal"}
    assert wrongs == equals == set(sources())
    assert {p.kind for p in wrong()} >= {m.__name__ for m in MUTATIONS}
    used = {law for p in equal() for law in p.kind.split(", ")}
    assert used >= {law.__name__ for law in LAWS}


def test_the_sample_has_every_mutation_and_law():
    assert {p.kind for p in wrong_of_every_kind(EVERY)} >= {m.__name__ for m in MUTATIONS}
    used = {law for p in equal_by_every_law(EVERY) for law in p.kind.split(", ")}
    assert used >= {law.__name__ for law in LAWS}


@pytest.mark.parametrize("pair", wrong_of_every_kind(EVERY), ids=lambda p: p.name)
def test_a_wrong_pair_is_refused(pair: Pair):
    assert not accepted(pair)


@pytest.mark.parametrize("pair", equal_by_every_law(EVERY), ids=lambda p: p.name)
def test_an_equal_pair_is_accepted(pair: Pair):
    assert accepted(pair)


def test_equal_pairs_are_equal_in_float64():
    """The laws themselves are judged without the verifier."""
    pairs = [p for p in equal_by_every_law(EVERY) if p.generator == "tests.corpora.equal"]
    assert all(judged(p.program, p.graph) for p in pairs)


@pytest.mark.full
def test_all_pairs():
    wrongs, equals = ours(measured())
    assert wrongs["accepted"] == equals["refused"] == 0
    assert wrongs["proved_all_sizes"] == 0
    assert equals["delta_max"] <= 2.0**-40


def ours(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r["rule"] == "mugraph"]


def test_rules_with_small_primes_are_measured_beside(capsys: pytest.CaptureFixture[str]):
    assert main(["--every", "400", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["benchmark"] == "verify"
    assert [(r["corpus"], r["rule"]) for r in found["rows"]] == [
        (corpus, rule) for corpus in ("mutants", "equivalents") for rule in ("mugraph", "published", "released")
    ]
    assert all(r["accepted"] + r["refused"] == r["pairs"] for r in found["rows"])
    wrongs, equals = ours(found["rows"])
    assert wrongs["accepted"] == equals["refused"] == wrongs["proved_all_sizes"] == 0
    assert equals["unknown"] + equals["proved_all_sizes"] == equals["pairs"]


def test_a_verifier_that_accepts_everything_is_shown(monkeypatch: pytest.MonkeyPatch, capsys):
    pair = equal(400)[0]
    right = verify(pair.program, pair.graph)
    monkeypatch.setattr(benchmarks.verify, "verify", lambda *_: right)
    assert main(["--every", "400"]) == 1
    assert "accepted: " in capsys.readouterr().err


def test_the_cost_of_each_tier_is_measured():
    rows = tiers(names=["lora"])
    assert {r["proof"] for r in rows} == {"proved"}
    for r in rows:
        assert r["delta_log2"] <= -40
        assert r["claims"] >= 8
        assert r["unknown"] == ""
        assert 0 < r["tested_ms"] < r["total_ms"]
