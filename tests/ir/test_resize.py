"""Graphs at the sizes where checks run them."""

import mugraph as mg
from mugraph.ir.check import check
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.resize import reduction, resized
from mugraph.pipeline import finished
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify

SPACE = SearchSpace(sizes=(), states=1_000)


def reduced(program: Program) -> tuple[Program, KernelGraph]:
    graph = finished(search(program, accept=lambda g: g, space=SPACE).graph)
    sizes, tiles = reduction(program, graph)
    small, small_graph = resized(program, sizes, {}), resized(graph, sizes, tiles)
    check(small)
    check(small_graph)
    verify(small, small_graph)
    return small, small_graph


def test_an_axis_and_its_alias_shrink_together() -> None:
    for fn in (lambda x: x @ x.mT, lambda x: mg.attention(x, x, x), lambda x: mg.softmax(x @ x.mT) @ x @ x.mT):
        program = mg.trace(fn, [mg.f32[3584, 40]], "own")
        small, _ = reduced(program)
        sizes = {a.size for a in small.axes().values()}
        assert 3584 not in sizes
        assert max(s for s in sizes if isinstance(s, int)) <= 80


def test_an_axis_that_is_cut_keeps_its_size_and_so_does_its_alias() -> None:
    program = mg.trace(lambda x: (x @ x.mT)[:, 100:200] * 2, [mg.f32[300, 40]], "cut")
    small, _ = reduced(program)
    assert [a.size for a in small.axes().values()].count(300) == 2
