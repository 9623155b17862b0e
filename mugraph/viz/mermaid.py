"""A program or μGraph as a Mermaid flowchart, for Markdown pages that draw it."""

from __future__ import annotations

from mugraph.ir.graph import Program
from mugraph.viz.picture import Box, Group, Level, Section, picture, printable
from mugraph.viz.svg import FILL, STROKE

_SHAPE = {
    "value": ("([", "])"),
    "access": ("[/", "/]"),
    "accumulator": ("[[", "]]"),
    "op": ("[", "]"),
    "port": ("(", ")"),
}


def draw_mermaid(program: Program) -> str:
    """The picture as the text of a Mermaid flowchart."""
    root = picture(program)
    numbers: dict[str, str] = {}
    lines = ["flowchart TD"]
    levels: dict[str, Level] = {}
    _write(root, numbers, levels, lines, 1)
    for key, level in levels.items():
        lines.append(f"  style {key} fill:{FILL[level]},stroke:{STROKE[level]}")
    return "\n".join(lines) + "\n"


def _write(item: Box | Group, numbers: dict[str, str], levels: dict[str, Level], lines: list[str], depth: int) -> None:
    """Adds a box, or a group with its content and arrows."""
    pad = "  " * depth
    name = numbers.setdefault(item.key, f"n{len(numbers)}")
    match item:
        case Box(_, kind, label):
            left, right = _SHAPE[kind]
            lines.append(f"{pad}{name}{left}{_quoted(label)}{right}")
        case Group(_, level, title, sections, arrows):
            levels[name] = level
            lines.append(f"{pad}subgraph {name}[{_quoted(title)}]")
            for n, section in enumerate(sections):
                _write_section(section, f"{name}s{n}", numbers, levels, lines, depth + 1)
            lines += [f"{pad}  {numbers[a]} --> {numbers[b]}" for a, b in arrows]
            lines.append(f"{pad}end")


def _write_section(
    section: Section, name: str, numbers: dict[str, str], levels: dict[str, Level], lines: list[str], depth: int
) -> None:
    framed = bool(section.title and section.boxes)
    if framed:
        lines.append(f"{'  ' * depth}subgraph {name}[{_quoted((section.title,))}]")
    for box in section.boxes:
        _write(box, numbers, levels, lines, depth + framed)
    if framed:
        lines.append(f"{'  ' * depth}end")


def _quoted(lines: tuple[str, ...]) -> str:
    """A label; Mermaid reads entities by number."""
    text = "<br/>".join(
        printable(line).replace("#", "#35;").replace('"', "#quot;").replace("<", "#lt;").replace(">", "#gt;")
        for line in lines
    )
    return f'"{text}"'
