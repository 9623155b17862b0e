"""Loads and stores lie in their tensors, write every element, and none twice; a planted error is shown with sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.codegen.accesses import accesses
from mugraph.codegen.lower import lower
from mugraph.errors import VerificationError
from mugraph.ir.axes import Dim
from mugraph.ir.graph import KernelGraph
from mugraph.ir.parser import parse_program
from mugraph.verify import bounds
from mugraph.verify.bounds import NO_SOLVER, Access, Cover, Place, in_bounds
from mugraph.verify.equivalence import verify
from tests import graphs

WINNERS = Path(__file__).parents[1] / "corpora/winners"
B = Dim("B", 1, 4096)

pytest.importorskip("z3", reason="z3-solver is not installed")


def of_graph(name: str) -> tuple[Access, ...]:
    program, fused = graphs.ALL[name]
    return accesses(lower(verify(program(), fused())))


@pytest.mark.parametrize("name", graphs.ALL)
def test_schedules_by_hand_are_in_bounds(name: str):
    found = in_bounds(of_graph(name))
    assert found.claims >= 8
    assert found.unknown == ()


@pytest.mark.parametrize("name", CLASSIC)
def test_what_is_chosen_for_the_classic_programs_is_in_bounds(name: str):
    graph = parse_program((WINNERS / f"{name}.txt").read_text())
    assert isinstance(graph, KernelGraph)
    found = in_bounds(accesses(lower(verify(PROGRAMS[name], graph))))
    assert found.claims >= 8
    assert found.unknown == ()


# -- planted errors

Change = Callable[[Cover], Cover]
CHANGES: dict[str, Change] = {
    "mask dropped": lambda c: replace(c, masked=False),
    "tile larger than its lanes": lambda c: replace(c, lanes=max((c.lanes or 2) // 2, 1)),
}


def changed(found: tuple[Access, ...], change: Change, axis: str) -> tuple[Access, ...]:
    def on(c: Cover) -> Cover:
        return change(c) if c.axis == axis else c

    return tuple(
        replace(
            a,
            places=tuple(replace(p, cover=on(p.cover)) if p.cover else p for p in a.places),
            grid=tuple(map(on, a.grid)),
        )
        for a in found
    )


def test_a_dropped_mask_is_shown_with_the_size_and_the_block():
    with pytest.raises(VerificationError, match=r"out of bounds in dimension 0.* at B=\d+, block of b=\d+") as refused:
        in_bounds(changed(of_graph("rmsnorm_linear"), CHANGES["mask dropped"], "b"))
    assert refused.value.op in ("read", "write")


def test_entries_that_no_lane_holds_are_not_written():
    with pytest.raises(VerificationError, match="is not written everywhere"):
        in_bounds(changed(of_graph("rmsnorm_linear"), CHANGES["tile larger than its lanes"], "n"))


def writes(found: tuple[Access, ...]) -> Iterator[Access]:
    yield from (a for a in found if a.kind == "write")


def test_a_store_that_lacks_a_grid_axis_is_a_race():
    (store,) = writes(of_graph("rmsnorm_linear"))
    fewer = replace(store, places=tuple(p for p in store.places if p.cover is None or p.cover.axis != "b"))
    with pytest.raises(VerificationError, match=r"is written twice.*block of b of another=\d"):
        in_bounds([fewer])


def test_overlapping_tiles_are_a_race():
    """32 lanes without a mask for tiles of 16."""
    cover = Cover("b", 64, "grid", 16, 32, False)
    with pytest.raises(VerificationError, match="is written twice"):
        in_bounds([Access("k: store", "y", "write", (Place(80, cover),), (cover,))])


def test_an_index_off_by_one():
    cover = Cover("b", B, "grid", 16, 16, True)
    right = Access("k: load", "x", "read", (Place(B, cover),), (cover,))
    assert in_bounds([right]).claims == 1
    with pytest.raises(VerificationError, match="out of bounds"):
        in_bounds([replace(right, places=(Place(B, cover, start=1),))])


def pieces(*starts: int, step: int = 1) -> list[Access]:
    """Stores of 8 entries each into 16."""
    cover = Cover("d", 8, "grid", 4, 4, True)
    return [Access("k: store", "y", "write", (Place(16, cover, start, step),), (cover,)) for start in starts]


def test_pieces_of_a_tensor_are_all_of_it():
    assert in_bounds(pieces(0, 8)).claims == 8
    assert in_bounds(pieces(0, 1, step=2)).claims == 8
    with pytest.raises(VerificationError, match=r"is not written everywhere, at entry 0=(8|9|1\d)"):
        in_bounds(pieces(0))
    with pytest.raises(VerificationError, match="is not written everywhere"):
        in_bounds(pieces(0, 0, step=2))
    with pytest.raises(VerificationError, match="is written twice"):
        in_bounds([*pieces(0, 8), *pieces(4)])


# -- what is not known


def test_without_a_solver_the_outcome_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "find_spec", lambda name: None)
    found = in_bounds(of_graph("lora"))
    assert (found.claims, found.reason) == (0, NO_SOLVER)


def test_a_query_without_time_is_unknown():
    cover = Cover("b", Dim("B", 1, 2**31 - 1) * Dim("C", 1, 2**31 - 1), "grid", 48, 64, True)
    access = Access("k: store", "y", "write", (Place(cover.size, cover),), (cover,))
    found = in_bounds([access], seconds=0.001)
    assert found.unknown
    assert "not decided" in found.reason
