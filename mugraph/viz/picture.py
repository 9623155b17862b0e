"""What a picture shows, before any layout: boxes in boxes, joined by arrows.

    Box     = key, kind, label lines | Group
    Group   = title, sections [(title, boxes)], arrows (key, key)

One picture of a graph serves every drawing: SVG and Mermaid differ in layout only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from typing import Literal

from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Program,
    Step,
    Store,
    Thread,
    ThreadGraph,
)
from mugraph.ir.ops import Const, Kernel, Library, SizeOf
from mugraph.ir.printer import load_maps, map_text, op_head, store_map
from mugraph.ir.threads import form_threads
from mugraph.ir.types import type_text

Kind = Literal["op", "value", "access", "accumulator", "port"]
Level = Literal["kernel", "launch", "block", "thread"]


@dataclass(frozen=True)
class Box:
    """A leaf: the first line of the label is its heading."""

    key: str
    kind: Kind
    label: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Boxes that stand together, such as those of one loop; '' as title draws no frame."""

    title: str
    boxes: tuple[Box | Group, ...]


@dataclass(frozen=True)
class Group:
    """A box that holds a graph of its own.  Arrows lead from key to key and go down the sections."""

    key: str
    level: Level
    title: tuple[str, ...]
    sections: tuple[Section, ...]
    arrows: tuple[tuple[str, str], ...]


def picture(program: Program) -> Group:
    """The program, with every kernel, block and thread graph inside it."""
    boxes: list[Box | Group] = []
    made: dict[str, str] = {}
    arrows: list[tuple[str, str]] = []
    for n, i in enumerate(program.inputs):
        boxes.append(
            Box(f"in {n}", "value", (i.name, type_text(i.tensor.dims, i.tensor.dtype), *["constant"] * i.constant))
        )
        made[i.name] = f"in {n}"
    ahead = {id(e) for e in program.ahead()} if isinstance(program, KernelGraph) else set()
    for n, e in enumerate(program.equations):
        key = f"eq {n}"
        notes = ("ahead",) * (id(e) in ahead)
        boxes.append(_launch(key, e.op, notes) if isinstance(e.op, Kernel) else _operator(key, e, notes))
        arrows += _arrows(e.args, made, key)
        made.update((t.name, key) for t in e.targets)
    for n, o in enumerate(program.outputs):
        alias = [f"into {o.alias_of}"] if o.alias_of else []
        types = [type_text(t.dims, t.dtype) for t in [program.tensors().get(o.value)] if t]
        boxes.append(Box(f"out {n}", "value", (o.value, *types, *alias)))
        arrows += _arrows([o.value], made, f"out {n}")
    kind = "μGraph" if isinstance(program, KernelGraph) else "program"
    return Group("program", "kernel", (f"{kind} {program.name}",), (Section("", tuple(boxes)),), tuple(arrows))


def _launch(key: str, kernel: Kernel, notes: tuple[str, ...]) -> Group:
    """One launch: its block graphs, each followed by its combine."""
    boxes: list[Box | Group] = []
    arrows = []
    for n, block in enumerate(kernel.blocks):
        boxes.append(_block(f"{key} block {n}", "block", _formed(block)))
        if block.combine:
            boxes.append(_block(f"{key} combine {n}", "combine", _formed(block.combine)))
            arrows.append((f"{key} block {n}", f"{key} combine {n}"))
    return Group(key, "launch", ("kernel", *notes), (Section("", tuple(boxes)),), tuple(arrows))


def _formed(block: BlockGraph) -> BlockGraph:
    """The block with thread graphs, so that the picture has all three levels even before they are formed."""
    return block if any(isinstance(s, Thread) for s in block.steps()) else form_threads(block)


def _block(key: str, word: str, block: BlockGraph) -> Group:
    made: dict[str, str] = {}
    arrows: list[tuple[str, str]] = []
    keys = (f"{key} {n}" for n in count())

    def place(loads: Iterable[Load], steps: Iterable[Step], loops: tuple[tuple[str, int], ...]) -> list[Box | Group]:
        boxes: list[Box | Group] = []
        for ld in loads:
            made[ld.value.name] = next(keys)
            boxes.append(_load(made[ld.value.name], block, ld, loops))
        for step in steps:
            targets, args = _ends(step)
            at = next(keys)
            boxes.append(_step(at, step))
            arrows.extend(_arrows(args, made, at))
            made.update((t, at) for t in targets)
        return boxes

    sections = []
    for p in block.passes:
        title = f"loop {_tiles(p.loops)}" if p.loops else "once"
        sections.append(Section(title, tuple(place(p.loads, p.body, p.loops))))
    last = place(block.loads, block.epilogue, ())
    for s in block.stores:
        at = next(keys)
        last.append(_store(at, block, s))
        arrows += _arrows([s.value], made, at)
    sections.append(Section("epilogue" if sections else "", tuple(last)))
    facts = [f"grid {_tiles(block.grid)}"] if block.grid else []
    facts += [f"split {block.split.axis} into {block.split.parts}"] if block.split else []
    return Group(key, "block", (word, *facts), tuple(sections), tuple(arrows))


def _ends(step: Step) -> tuple[list[str], list[str]]:
    """The names that a step defines, and those that it reads."""
    match step:
        case Thread(graph):
            return list(graph.outputs), list(graph.inputs)
        case Accumulator(e, _, scale):
            return [e.target.name], [*e.args, *([scale] if scale else [])]
        case Equation():
            return [t.name for t in step.targets], list(step.args)


def _step(key: str, step: Step) -> Box | Group:
    match step:
        case Thread(graph):
            return _thread(key, graph)
        case Accumulator(e, monoid, scale):
            how = f"rescaled by {scale}" if scale else f"accumulate {monoid}"
            return Box(key, "accumulator", (op_head(e.op), str(e.target), how))
        case Equation():
            return _operator(key, step)


def _thread(key: str, graph: ThreadGraph) -> Group:
    made = {name: f"{key} in {n}" for n, name in enumerate(graph.inputs)}
    boxes: list[Box | Group] = [Box(at, "port", (name,)) for name, at in made.items()]
    arrows: list[tuple[str, str]] = []
    for n, e in enumerate(graph.equations):
        at = f"{key} {n}"
        boxes.append(_operator(at, e))
        arrows += _arrows(e.args, made, at)
        made.update((t.name, at) for t in e.targets)
    parts = ", ".join(f"{a}: {part}" for a, part in graph.parts)
    return Group(key, "thread", ("thread", *([parts] if parts else [])), (Section("", tuple(boxes)),), tuple(arrows))


def _operator(key: str, e: Equation, notes: tuple[str, ...] = ()) -> Box:
    targets = tuple(t.name if isinstance(e.op, Const | SizeOf) else str(t) for t in e.targets)
    meaning = (e.op.semantics.name,) if isinstance(e.op, Library) else ()
    return Box(key, "op", (op_head(e.op), *meaning, *targets, *notes))


def _load(key: str, block: BlockGraph, load: Load, loops: tuple[tuple[str, int], ...]) -> Box:
    maps = load_maps(block, load, loops)
    grid, looped = dict(block.grid), dict(loops)
    roles = ", ".join(
        f"{a} {'grid' if a.name in grid else 'loop' if a.name in looped else 'whole'}" for a in load.value.axes
    )
    lines = [f"imap {map_text(maps.grid)}"] if maps.grid else []
    lines += [f"fmap {map_text(maps.loops)}"] if loops else []
    lines += [roles] if roles else []
    return Box(key, "access", (f"load {load.source}", str(load.value), *lines))


def _store(key: str, block: BlockGraph, store: Store) -> Box:
    maps = store_map(block, store)
    kind = "" if store.kind == "write" else f"{store.kind} "
    lines = [f"omap {map_text(maps.grid)}"] if maps.grid else []
    lines += [f"fmap {map_text(maps.loops)}"] if maps.loops else []
    return Box(key, "access", (f"store {kind}{store.target}", *lines))


def _tiles(tiles: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{a}: {t}" for a, t in tiles)


def printable(text: str) -> str:
    """The text without control characters, which neither XML nor Mermaid can hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _arrows(args: Iterable[str], made: dict[str, str], to: str) -> list[tuple[str, str]]:
    return [(made[a], to) for a in dict.fromkeys(args) if a in made]
