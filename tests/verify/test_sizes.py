"""Sizes fit what the graphs say about their axes, or there are none."""

import pytest

import mugraph as mg
from mugraph.errors import VerificationError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.ops import Concat, Rename, Reshape, Slice, Unpack
from mugraph.ir.types import DType
from mugraph.search.build import baseline
from mugraph.verify.equivalence import verify
from mugraph.verify.sizes import draws, literal_sizes
from tests import graphs
from tests.graphs import axis, inp
from tests.verify.variants import EQUAL, X, b, build, k, pair


def sizes(*steps, inputs=(X,), **fixed: int):
    p = build(list(inputs), list(steps))
    return draws(p, p, fixed=fixed)


def test_static_and_symbolic_axes_become_small():
    for draw in draws(graphs.gated_mlp(), graphs.gated_mlp_fused()):
        assert max(draw.sizes.values()) <= 7


def test_an_alias_has_the_size_of_its_axis():
    for draw in sizes(("o", Rename((("b", axis("b2", 16)),)), "X")):
        assert draw.sizes["b"] == draw.sizes["b2"]


def test_a_reshape_keeps_the_number_of_elements():
    dims = ((b,), (axis("h", 4),), (axis("d", 16),))
    for draw in sizes(("o", Reshape(dims), "X")):
        assert draw.sizes["k"] == draw.sizes["h"] * draw.sizes["d"]
        assert min(draw.sizes["h"], draw.sizes["d"]) > 1


def test_a_reshape_between_two_products_keeps_the_number_of_elements():
    dims = ((axis("c", 8),), (axis("d", 128),))
    for draw in sizes(("o", Reshape(dims), "X")):
        assert draw.sizes["b"] * draw.sizes["k"] == draw.sizes["c"] * draw.sizes["d"]


def test_slices_start_between_the_same_neighbours():
    steps = [
        ("x", Slice("k", axis("c", 16), 0), "X"),
        ("y", Slice("k", axis("d", 32), 16), "X"),
        ("z", Slice("k", axis("e", 40), 24), "X"),
    ]
    for draw in sizes(*steps):
        c, d, e = (draw.sizes[a] for a in "cde")
        assert draw.starts["k", 0] == 0
        assert draw.starts["k", 16] == c
        assert c < draw.starts["k", 24] < c + d
        assert draw.starts["k", 24] + e == draw.sizes["k"]


def test_a_strided_slice_takes_every_second_entry():
    for draw in sizes(("x", Slice("k", axis("c", 32), 1, 2), "X")):
        assert draw.sizes["k"] == 2 * draw.sizes["c"]


def test_a_strided_slice_that_starts_far_away_starts_near_by():
    y, z = axis("y", 10), axis("z", 5)
    far = inp("F", b, axis("f", 4096))
    steps = (("o", Slice("f", y, 3000, 7), "F"), ("p", Slice("f", z, 2990), "F"))
    for draw in sizes(*steps, inputs=(far,)):
        start, before = draw.starts["f", 3000], draw.starts["f", 2990]
        assert before < start
        assert start + 7 * (draw.sizes["y"] - 1) < draw.sizes["f"] <= 64


def test_a_slice_of_a_slice_is_where_one_slice_would_be():
    y, z, w = axis("y", 100), axis("z", 30), axis("w", 30)
    far = inp("F", axis("f", 4096))
    steps = (("o", Slice("f", y, 200), "F"), ("p", Slice("y", z, 40), "o"), ("q", Slice("f", w, 240), "F"))
    for draw in sizes(*steps, inputs=(far,)):
        assert draw.starts["f", 200] + draw.starts["y", 40] == draw.starts["f", 240]
        assert draw.sizes["z"] == draw.sizes["w"]


def test_an_axis_that_is_only_renamed_by_a_reshape_is_cut_at_the_same_places():
    g, y, z = axis("g", 4096), axis("y", 100), axis("z", 100)
    far = inp("F", axis("f", 4096))
    steps = (("o", Reshape(((g,),)), "F"), ("p", Slice("g", y, 300), "o"), ("q", Slice("f", z, 300), "F"))
    for draw in sizes(*steps, inputs=(far,)):
        assert draw.starts["f", 300] == draw.starts["g", 300]


def test_a_concatenation_is_as_long_as_its_parts():
    y = inp("Y", b, axis("d", 32))
    for draw in sizes(("o", Concat(("k", "d"), axis("e", 96)), "X", "Y"), inputs=(X, y)):
        assert draw.sizes["e"] == draw.sizes["k"] + draw.sizes["d"]


def test_unpacked_codes_are_as_many_as_their_type_says():
    packed = inp("X", b, k, dtype=DType.u8)
    for draw in sizes(("o", Unpack("k", axis("c", 128), DType.u4), "X"), inputs=(packed,)):
        assert draw.sizes["c"] == 2 * draw.sizes["k"]


def test_a_fixed_size_stays_and_is_cut_into_a_few_tiles():
    for draw in draws(graphs.lora(), graphs.lora_fused(), fixed={"k": 4096}):
        assert draw.sizes["k"] == 4096
        assert 2 < draw.sizes["k"] / draw.tiles["k"] < 3


def test_sizes_that_contradict_each_other_are_refused():
    p = build([X], [("o", Slice("k", axis("c", 32), 0), "X")])
    with pytest.raises(VerificationError, match="no small sizes fit"):
        draws(p, p, fixed={"k": 2, "c": 40})


def test_a_literal_counts_as_a_size_where_the_size_is_counted():
    assert literal_sizes(*pair(*EQUAL["literal-is-the-size"])) == {"k": 64}
    assert literal_sizes(*pair(*EQUAL["mean-is-sum-over-size"])) == {}


def test_a_split_gets_an_empty_part_in_some_draw():
    """Three parts of a loop over two tiles."""
    found = draws(graphs.attention(), graphs.attention_fused(parts=4))
    assert {d.parts["s"] for d in found} == {2, 3}
    assert any(-(-d.sizes["s"] // d.tiles["s"]) < d.parts["s"] for d in found)


def test_sizes_depend_on_both_graphs():
    p, g = graphs.lora(), graphs.lora_fused()
    plain = KernelGraph(p.name, p.inputs, p.equations, p.outputs)
    assert draws(p, plain)[0].tiles == {}
    assert draws(p, g)[0].tiles == {"b": 2, "n": 2, "k": 2}


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x[6353:8919:2][1149:1173] - 1,
        lambda x: (x[1513:2753:2] @ x[1513:2753:2].mT)[:, 40:282:2],
    ],
)
def test_slices_of_slices_with_steps_fit(fn):
    """The inner slice needs room that the outer one has to leave: sizes of the inner ones are chosen first."""
    program = mg.trace(fn, [mg.f16[11008, 5]], "inner")
    for draw in draws(program, baseline(program)):
        sizes = sorted(draw.sizes.values())
        assert sizes[-1] <= 64
    verify(program, baseline(program))
