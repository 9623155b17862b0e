"""Proofs for all sizes: what is proved is equal, what is not equal is never proved."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

import mugraph as mg
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.errors import GraphError, VerificationError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.parser import parse_program
from mugraph.search import laws
from mugraph.search.driver import search
from mugraph.search.space import space_of
from mugraph.verify.certificate import Certificate
from mugraph.verify.equivalence import proved, recheck, verify
from mugraph.verify.normal import PARTS
from mugraph.verify.prove import RESCALED, SIZES, prove
from tests import graphs
from tests.corpora.equal import equal
from tests.corpora.wrong import wrong
from tests.verify.mirage_files import SMALL
from tests.verify.mutants import by_hand, systematic
from tests.verify.variants import EQUAL, UNEQUAL, pair

WINNERS = Path(__file__).parents[1] / "corpora/winners"


def winner(name: str) -> KernelGraph:
    """What the search chose for an H100 (effort quick, seed 0, 16 rows), as `mugraph optimize` writes graph.txt."""
    graph = parse_program((WINNERS / f"{name}.txt").read_text())
    assert isinstance(graph, KernelGraph)
    return graph


@pytest.mark.parametrize("name", [*CLASSIC, "rope_attention", "prenorm_attention"])
def test_what_is_chosen_is_proved(name: str):
    proof = prove(PROGRAMS[name], winner(name))
    assert proof.proved, proof.reason
    assert SIZES not in proof.laws


def test_the_proof_of_a_split_online_softmax_names_its_laws():
    assert {PARTS, RESCALED} <= set(prove(PROGRAMS["gqa"], winner("gqa")).laws)


@pytest.mark.parametrize("name", graphs.ALL)
def test_schedules_by_hand_are_proved(name: str):
    program, fused = graphs.ALL[name]
    assert prove(program(), fused()).proved


UNDECIDED_LAWS = {  # equal, and not decided
    "prefix-sums-are-linear": "a prefix sum is an opaque function",
}


@pytest.mark.parametrize("name", EQUAL)
def test_a_law_is_proved_or_known_to_be_missing(name: str):
    assert prove(*pair(*EQUAL[name])).proved != (name in UNDECIDED_LAWS)


@pytest.mark.parametrize("name", UNEQUAL)
def test_the_neighbour_of_a_law_is_not_proved(name: str):
    assert not prove(*pair(*UNEQUAL[name])).proved


def test_planted_errors_are_not_proved():
    for m in (*by_hand(), *systematic())[::5]:
        try:
            proof = prove(m.program, m.graph)
        except mg.MugraphError:
            continue  # malformed
        if proof.proved:
            verify(m.program, m.graph)  # a shift: right


@pytest.mark.parametrize("every", [170, pytest.param(1, marks=pytest.mark.full)])
def test_no_wrong_pair_is_proved(every: int):
    def is_proved(program: mg.Program, graph: KernelGraph) -> bool:
        try:
            return prove(program, graph).proved
        except GraphError:
            return False  # malformed

    assert [p.name for p in wrong(every) if is_proved(p.program, p.graph)] == []


def test_equal_pairs_are_proved_for_the_most_part():
    pairs = equal(11)
    unknown = [p.name for p in pairs if not prove(p.program, p.graph).proved]
    assert len(unknown) <= len(pairs) // 16, unknown


def test_published_graphs_are_proved_with_their_sizes():
    from mugraph.ir.mirage import import_mirage

    for name in ("rms", "mlp", "attention", "attention, two loops"):
        program, operators = SMALL[name]
        assert prove(program, import_mirage(operators, program)).proved, name


# -- independence of the search


def collected(program: mg.Program) -> list[KernelGraph]:
    """What the search would hand to the verifier, none refused."""
    found: list[KernelGraph] = []

    def accept(graph: KernelGraph) -> KernelGraph:
        found.append(graph)
        raise VerificationError("collected")

    with suppress(mg.MugraphError):
        search(program, accept=accept, space=space_of("quick"))
    return found


@mg.program
def difference(X: mg.f16[16, 64], W: mg.f16[64, 32], Y: mg.f16[16, 32]):
    return X @ W - Y


def test_a_broken_law_of_the_search_is_caught(monkeypatch: pytest.MonkeyPatch):
    """The search takes a − b for a + b: all that it proposes is wrong, and nothing of it is proved."""
    right = collected(difference)
    assert right
    assert all(prove(difference, g).proved for g in right)

    def broken(fn, attrs, args):
        return meant("add" if fn == "sub" else fn, attrs, args)

    meant = laws._function
    monkeypatch.setattr(laws, "_function", broken)
    wrong_graphs = [g for g in collected(difference) if "add" in str(g)]
    assert wrong_graphs
    for graph in wrong_graphs:
        assert not prove(difference, graph).proved
        with pytest.raises(VerificationError):
            verify(difference, graph)


# -- on the certificate


def test_the_certificate_says_what_was_proved():
    verified = proved(verify(graphs.lora(), graphs.lora_fused()))
    c = verified.certificate
    assert c.tiers == ("tested", "proved")
    assert c.laws
    assert Certificate.from_json(c.to_json()) == c
    assert "all sizes: proved" in str(c)
    recheck(c, verified.program, verified.graph)


def test_the_certificate_says_why_nothing_is_proved():
    c = proved(verify(*pair(*EQUAL["prefix-sums-are-linear"]))).certificate
    assert c.tiers == ("tested",)
    assert "normal forms differ" in c.proof
    assert "all sizes: unknown" in str(c)


def test_a_raised_tier_is_refused():
    verified = proved(verify(*pair(*EQUAL["prefix-sums-are-linear"])))
    raised = replace(verified.certificate, tiers=("tested", "proved"), proof="")
    with pytest.raises(VerificationError):
        recheck(raised, verified.program, verified.graph)


def digits(outer: str, inner: str) -> mg.Program:
    """Row sums over 12 columns as 3 times 4: by `outer` over the first digit, then by `inner` over the second."""
    axes = "k = 12, o = 3, i = 4, o1 = 1, o2 = 2, i1 = 1, i3 = 3"
    head = f"program sums\n  axes b = 2, {axes}\n  input x: f32[b, k]\n"
    return parse_program(f"{head}  y: f32[b, o, i] = reshape[b, o, i](x)\n{outer}{inner}  output z\n")


FIRST = (
    "  u: f32[b, o1, i] = slice[o -> o1, start=0](y)\n"
    "  v: f32[b, o2, i] = slice[o -> o2, start={}](y)\n"
    "  p: f32[b, i] = sum[o1](u)\n  q: f32[b, i] = sum[o2](v)\n  s: f32[b, i] = add(p, q)\n"
)
SECOND = (
    "  c: f32[b, i1] = slice[i -> i1, start=0](s)\n  d: f32[b, i3] = slice[i -> i3, start={}](s)\n"
    "  e: f32[b] = sum[i1](c)\n  f: f32[b] = sum[i3](d)\n  z: f32[b] = add(e, f)\n"
)
AT_FIVE = (
    "program sums\n  axes b = 2, k = 12, k5 = 5, k7 = 7\n  input x: f32[b, k]\n"
    "  u: f32[b, k5] = slice[k -> k5, start=0](x)\n  v: f32[b, k7] = slice[k -> k7, start={}](x)\n"
    "  p: f32[b] = sum[k5](u)\n  q: f32[b] = sum[k7](v)\n  z: f32[b] = add(p, q)\n  output z\n"
)
WHOLE = "program sums\n  axes b = 2, k = 12\n  input x: f32[b, k]\n  z: f32[b] = sum[k](x)\n  output z\n"


@pytest.mark.parametrize(("outer", "inner", "equal"), [(1, 1, True), (0, 1, False), (1, 0, False)])
def test_sums_over_pieces_of_digits_are_sums_over_the_axis(outer: int, inner: int, equal: bool):
    cut = digits(FIRST.format(outer), SECOND.format(inner))
    assert prove(parse_program(WHOLE), cut).proved == equal
    assert prove(parse_program(AT_FIVE.format(5)), cut).proved == equal


def test_an_axis_of_a_call_may_have_the_name_of_a_longer_one():
    """Sums over 8 of 12 columns, as a library call whose own axis is called k too."""
    whole = parse_program(WHOLE)
    part = parse_program("""mugraph sums
  axes b = 2, k = 12, c = 8
  input x: f32[b, k]
  y: f32[b, c] = slice[k -> c, start=0](x)
  z: f32[b] = library["sum"](y)
    program sum
      axes b = 2, k = 8, k1 = 4, k2 = 4
      input y: f32[b, k]
      u: f32[b, k1] = slice[k -> k1, start=0](y)
      v: f32[b, k2] = slice[k -> k2, start=4](y)
      p: f32[b] = sum[k1](u)
      q: f32[b] = sum[k2](v)
      z: f32[b] = add(p, q)
      output z
  output z
""")
    with pytest.raises(VerificationError):
        verify(whole, part)
    assert not prove(whole, part).proved


def test_axes_of_size_one_are_digits_of_nothing():
    one = "program one\n  axes b = 2, k = 1, n = 1\n  input x: f32[b]\n"
    there_and_back = "  y: f32[b, k, n] = reshape[b, k, n](x)\n  z: f32[b] = reshape[b](y)\n  output z\n"
    assert prove(parse_program(one + there_and_back), parse_program(one + "  z: f32[b] = neg(x)\n  output z\n")).reason
    assert prove(parse_program(one + there_and_back), parse_program(one + there_and_back)).proved


def test_a_piece_in_the_wrong_place_is_no_sum_over_digits():
    cut = digits(FIRST.format(1), SECOND.format(1))
    assert not prove(parse_program(AT_FIVE.format(4)), cut).proved
