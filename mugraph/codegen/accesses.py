"""Loads and stores of a plan, as the `bounds` tier checks them."""

from __future__ import annotations

from collections.abc import Iterator

from mugraph.codegen.plan import Extent, Index, Launch, Piece, Plan, Read, Scope, Write
from mugraph.ir.types import Tensor
from mugraph.verify.bounds import Access, Cover, Place


def accesses(plan: Plan) -> tuple[Access, ...]:
    """Those of all launches, what is done ahead included."""
    found = [a for launch in plan.launches() for a in _of_launch(plan, launch)]
    return (*(accesses(plan.ahead) if plan.ahead else ()), *found)


def _of_launch(plan: Plan, launch: Launch) -> Iterator[Access]:
    for scope in launch.scopes:
        covers = {e.axis.name: _cover(e, launch) for e in scope.extents}
        grid = tuple(covers[a] for a in launch.grid if a in covers)
        for action in scope.actions():
            match action:
                case Read(_, pieces):
                    yield from (_read(plan, launch, scope, covers, grid, p) for p in pieces)
                case Write():
                    yield _write(plan, launch, covers, grid, action)
                case _:
                    pass


def _cover(e: Extent, launch: Launch) -> Cover:
    parts = launch.split[1] if launch.split and launch.split[0] == e.axis.name and e.role == "loop" else 1
    return Cover(e.axis.name, e.axis.size, e.role, e.tile, None if e.at_launch else e.lanes, e.masked, parts)


def _place(index: Index, tensor: Tensor, n: int, covers: dict[str, Cover]) -> Place:
    cover = covers.get(index.axis) if index.axis is not None else None
    return Place(tensor.axes[n].size, cover, index.start, index.step)


def _read(
    plan: Plan, launch: Launch, scope: Scope, covers: dict[str, Cover], grid: tuple[Cover, ...], piece: Piece
) -> Access:
    tensor = plan.buffer(piece.source).tensor
    places = tuple(_place(i, tensor, n, covers) for n, i in enumerate(piece.index))
    limits = ((covers[piece.joined], piece.low, piece.length),) if piece.joined is not None else ()
    return Access(f"{launch.name}: load", piece.source, "read", places, grid, limits)


def _write(plan: Plan, launch: Launch, covers: dict[str, Cover], grid: tuple[Cover, ...], w: Write) -> Access:
    tensor = plan.buffer(w.target).tensor
    own = {a.name for a in w.value.axes}
    places = []
    for n, axis in enumerate(tensor.axes):
        if w.index:
            places.append(_place(w.index[n], tensor, n, covers))
        elif axis.name in own:
            places.append(Place(axis.size, covers[axis.name]))
        else:
            places.append(Place(axis.size, None, part=launch.split[1] if launch.split else 1))
    return Access(f"{launch.name}: store", w.target, w.kind, tuple(places), grid)
