"""Normal forms: joined and cut axes, and the limit on work."""

from __future__ import annotations

import time

import pytest

import mugraph as mg
from mugraph.ir.graph import Program
from mugraph.ir.ops import Concat, Contract, Iota, Reduce, Slice
from mugraph.search.build import baseline
from mugraph.verify import normal
from mugraph.verify.normal import PIECES, Forms, Undecided, Work
from mugraph.verify.prove import prove
from tests.graphs import axis, inp
from tests.verify.variants import Pair, Step, W, X, Y, half, k, largest, pair, total

c, e = axis("c", 32), axis("e", 16)
HALVES: list[Step] = [half("x", 0), half("y", 32)]
JOINED: list[Step] = [*HALVES, ("z", Concat(("c", "c"), k), "x", "y")]
ROWS: list[Step] = [("u", Slice("k", c, 0), "W"), ("v", Slice("k", c, 32), "W")]


def part(name: str, start: int, of: str = "X") -> Step:
    return (name, Slice("k", e, start), of)


EQUAL: dict[str, Pair] = {
    "cut and joined": ([X], [("o", "exp", "X")], [*JOINED, ("o", "exp", "z")]),
    "cut, changed and joined": (
        [X],
        [("o", "tanh", "X")],
        [*HALVES, ("f", "tanh", "x"), ("g", "tanh", "y"), ("o", Concat(("c", "c"), k), "f", "g")],
    ),
    "sum of halves": (
        [X],
        [("o", total("k"), "X")],
        [*HALVES, ("s", total("c"), "x"), ("t", total("c"), "y"), ("o", "add", "t", "s")],
    ),
    "product of halves": (
        [X, W],
        [("o", Contract(("k",)), "X", "W")],
        [*HALVES, *ROWS, ("s", Contract(("c",)), "x", "u"), ("t", Contract(("c",)), "y", "v"), ("o", "add", "s", "t")],
    ),
    "maximum of halves": (
        [X],
        [("o", largest("k"), "X")],
        [*HALVES, ("s", largest("c"), "x"), ("t", largest("c"), "y"), ("o", "max", "s", "t")],
    ),
    "softmax of a joint": (
        [X],
        [("p", "exp", "X"), ("l", total("k"), "p"), ("o", "div", "p", "l")],
        [*JOINED, ("p", "exp", "z"), ("l", total("k"), "p"), ("o", "div", "p", "l")],
    ),
    "a slice within a piece": (
        [X],
        [part("o", 40)],
        [*HALVES, ("o", Slice("c", e, 8), "y")],
    ),
    "a slice over a border": (
        [X],
        [part("o", 24)],
        [*JOINED, ("o", Slice("k", e, 24), "z")],
    ),
    "the place in a joint": (
        [X],
        [("i", Iota(k)), ("p", "mul", "X", "i"), ("o", total("k"), "p")],
        [*JOINED, ("i", Iota(k)), ("p", "mul", "z", "i"), ("o", total("k"), "p")],
    ),
}

UNEQUAL: dict[str, Pair] = {
    "joined the other way round": ([X], [("o", "exp", "X")], [*HALVES, ("z", Concat(("c", "c"), k), "y", "x"),
                                                              ("o", "exp", "z")]),
    "one half twice": (
        [X],
        [("o", total("k"), "X")],
        [*HALVES, ("s", total("c"), "x"), ("o", "add", "s", "s")],
    ),
    "halves of the factors exchanged": (
        [X, W],
        [("o", Contract(("k",)), "X", "W")],
        [*HALVES, *ROWS, ("s", Contract(("c",)), "x", "v"), ("t", Contract(("c",)), "y", "u"), ("o", "add", "s", "t")],
    ),
    "one place further": ([X], [part("o", 40)], [*HALVES, ("o", Slice("c", e, 9), "y")]),
    "over a border, one place further": ([X], [part("o", 24)], [*JOINED, ("o", Slice("k", e, 25), "z")]),
    "the place in a piece": (
        [X],
        [("i", Iota(k)), ("p", "mul", "X", "i"), ("o", total("k"), "p")],
        [
            *HALVES, ("i", Iota(c)), ("p", "mul", "x", "i"), ("q", "mul", "y", "i"), ("s", "add", "p", "q"),
            ("o", total("c"), "s"),
        ],
    ),
    "a joint of other values": (
        [X, Y],
        [("o", total("k"), "X")],
        [half("x", 0), ("y", Slice("k", c, 32), "Y"), ("z", Concat(("c", "c"), k), "x", "y"), ("o", total("k"), "z")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EQUAL)
def test_pieces_of_an_axis_are_put_together(name: str):
    proof = prove(*pair(*EQUAL[name]))
    assert proof.proved, proof.reason


@pytest.mark.parametrize("name", UNEQUAL)
def test_other_pieces_are_not(name: str):
    assert not prove(*pair(*UNEQUAL[name])).proved


def test_a_proof_by_pieces_says_so():
    assert PIECES in prove(*pair(*EQUAL["sum of halves"])).laws


# -- work


def test_equal_nodes_are_one():
    forms = Forms(False, Work(), {})
    x, y = forms.atom("load", "X", "$i"), forms.atom("load", "Y", "$i")
    assert forms.times(forms.plus(x, y), y) is forms.plus(forms.times(y, y), forms.times(y, x))
    assert forms.total(forms.atom("load", "X", "$j"), {"$j": 3}) is forms.total(
        forms.atom("load", "X", "$k"), {"$k": 3}
    )
    assert forms.total(x, {"$i": 3}) is not forms.total(x, {"$i": 4})


def deep(layers: int) -> Program:
    def nested(x: mg.f16[16, 48], w: mg.f16[48, 48]):
        y = x @ w
        for _ in range(layers):
            y = y + mg.tanh(y)
        return mg.softmax(y * 8) @ w

    return mg.program(nested)


def test_what_occurs_often_is_read_once():
    """Written out, the value has 2^30 terms; in nodes it has hundreds."""
    program, work = deep(30), Work()
    assert prove(program, baseline(program), work).proved
    assert work.most - work.left < 20_000


def squares(layers: int) -> Program:
    def squared(x: mg.f16[16, 48], w: mg.f16[48, 48]):
        y = x
        for _ in range(layers):
            y = mg.tanh(y @ w) @ mg.sigmoid(y.mT @ y)
        return y

    return mg.program(squared)


@pytest.mark.parametrize("program", [deep(100), squares(12)], ids=["deep", "broad"])
def test_the_work_is_limited_and_the_reason_says_how(program: Program):
    started = time.process_time()
    proof = prove(program, baseline(program))
    assert not proof.proved
    assert str(normal.MOST_DEPTH) in proof.reason or str(normal.MOST_WORK) in proof.reason
    assert time.process_time() - started < 10  # seconds, a multiple of what it takes


def test_a_limit_of_work_is_kept_over_several_proofs():
    program = deep(3)
    work = Work(1_000)
    assert prove(program, baseline(program), work).proved
    reason = prove(program, baseline(program), work).reason
    assert reason == "the normal forms take more than 1000 steps"
    with pytest.raises(Undecided):
        work.spend(1)


def test_a_program_with_too_many_terms_is_undecided():
    @mg.program
    def many(x: mg.f16[16, 48], w: mg.f16[48, 48]):
        y = x @ w
        for _ in range(8):
            y = y * (y + x)
        return y

    assert "terms" in prove(many, baseline(many)).reason


def test_sums_are_named_by_what_their_indices_do():
    """Σ_ij X[i] Y[i, j] and the same with the names exchanged, in any order of making."""
    i, j = axis("i", 16), axis("j", 16)
    x, y = inp("X", i), inp("Y", i, j)
    one = pair([x, y], [("p", "mul", "X", "Y"), ("o", Reduce("sum", ("i", "j")), "p")],
               [("r", Reduce("sum", ("j",)), "Y"), ("o", Contract(("i",)), "r", "X")])  # fmt: skip
    assert prove(*one).proved
