"""A program or μGraph as SVG: kernel, block and thread boxes in each other, arrows along the data flow.

The text is set in a monospaced face and every line states its length, so no label leaves its box in any font.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise
from textwrap import wrap
from typing import assert_never

from mugraph.ir.graph import Program
from mugraph.viz.layout import Layout, Point, Size, arrange
from mugraph.viz.picture import Box, Group, Kind, Level, picture, printable

FILL: dict[Level, str] = {"kernel": "#e0edd5", "launch": "#d3e5c4", "block": "#dbe8f5", "thread": "#fdf2d0"}
STROKE: dict[Level, str] = {"kernel": "#8fb573", "launch": "#8fb573", "block": "#7ea6d1", "thread": "#d8b95a"}
_BOX: dict[Kind, str] = {
    "op": 'fill="#ffffff" stroke="#6b7280"',
    "value": 'fill="#f6faf2" stroke="#5f8a3e" stroke-width="1.4"',
    "access": 'fill="#f1f6fc" stroke="#4a7ab0" stroke-dasharray="4 2"',
    "accumulator": 'fill="#ffffff" stroke="#1f4e86" stroke-width="2.2"',
    "port": 'fill="none" stroke="none"',
}
_SIZE = 12.0
_ADVANCE = 0.6 * _SIZE  # of one character
_LINE = 15.0
_PAD = 8.0
_ROOM = 14.0  # between a group's frame and its content
_COLUMNS = 36
_FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def draw_svg(program: Program) -> str:
    """The picture as one self-contained SVG document."""
    drawn = _drawn(picture(program))
    width, height = drawn.size.width + 8, drawn.size.height + 8
    body: list[str] = []
    _paint(drawn, 4.0, 4.0, body)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{_FONT}" font-size="{_SIZE:g}">',
            '<defs><marker id="mugraph-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0.8 L8,4 L0,7.2 z" fill="#4b5563"/></marker></defs>',
            *body,
            "</svg>",
            "",
        ]
    )


@dataclass
class _Drawn:
    """A box or group with its size, its wrapped label, and what it holds."""

    item: Box | Group
    size: Size
    label: list[str]
    layout: Layout | None = None
    inner: dict[str, _Drawn] | None = None


def _drawn(item: Box | Group) -> _Drawn:
    match item:
        case Box(_, kind, label):
            lines = _wrapped(label, _COLUMNS)
            pad = 0.0 if kind == "port" else _PAD
            width = max(map(len, lines)) * _ADVANCE + 2 * pad
            return _Drawn(item, Size(width, len(lines) * _LINE + pad), lines)
        case Group():
            return _drawn_group(item)
        case _:
            assert_never(item)


def _drawn_group(group: Group) -> _Drawn:
    inner = {b.key: _drawn(b) for section in group.sections for b in section.boxes}
    sections = [s for s in group.sections if s.boxes]
    layout = arrange(
        [{b.key: inner[b.key].size for b in s.boxes} for s in sections],
        group.arrows,
        head=[_LINE + _PAD if s.title else 0.0 for s in sections],
        foot=_PAD if any(s.title for s in sections) else 0.0,
    )
    title_width = max([len(s.title) for s in sections] + [24]) * _ADVANCE
    width = max(layout.width, title_width) + 2 * _ROOM
    columns = max(_COLUMNS, int(width / _ADVANCE) - 2)
    label = _wrapped(group.title, columns)
    width = max(width, max(map(len, label)) * _ADVANCE + 2 * _ROOM)
    height = len(label) * _LINE + _PAD + layout.height + _ROOM + _PAD
    return _Drawn(group, Size(width, height), label, layout, inner)


def _wrapped(lines: tuple[str, ...], columns: int) -> list[str]:
    return [piece for line in lines for piece in wrap(printable(line), columns, subsequent_indent=" ") or [""]]


def _paint(drawn: _Drawn, x: float, y: float, out: list[str]) -> None:
    match drawn.item:
        case Box(_, kind, _):
            _rect(x, y, drawn.size, _BOX[kind], 12.0 if kind == "value" else 4.0, out)
            for i, line in enumerate(drawn.label):
                at = y + (0 if kind == "port" else _PAD / 2) + (i + 0.8) * _LINE
                _text(line, x + drawn.size.width / 2, at, out, heading=i == 0, middle=True)
        case Group():
            _paint_group(drawn, drawn.item, x, y, out)


def _paint_group(drawn: _Drawn, group: Group, x: float, y: float, out: list[str]) -> None:
    assert drawn.layout is not None
    assert drawn.inner is not None
    style = f'fill="{FILL[group.level]}" stroke="{STROKE[group.level]}"'
    _rect(x, y, drawn.size, style, 8.0, out)
    for i, line in enumerate(drawn.label):
        _text(line, x + _ROOM, y + _PAD / 2 + (i + 0.8) * _LINE, out, heading=i == 0)
    left = x + (drawn.size.width - drawn.layout.width) / 2
    top = y + len(drawn.label) * _LINE + 2 * _PAD
    sections = [s for s in group.sections if s.boxes]
    for section, (start, end) in zip(sections, drawn.layout.sections, strict=True):
        if section.title:
            frame = Size(drawn.size.width - _ROOM, end - start)
            _rect(x + _ROOM / 2, top + start, frame, 'fill="#ffffff" fill-opacity="0.35" stroke="#a9c3df"', 6.0, out)
            _text(section.title, x + _ROOM, top + start + _LINE, out, heading=True)
    for route in drawn.layout.arrows:
        _arrow([(left + px, top + py) for px, py in route], out)
    for key, (px, py) in drawn.layout.corners.items():
        _paint(drawn.inner[key], left + px, top + py, out)


def _rect(x: float, y: float, size: Size, style: str, radius: float, out: list[str]) -> None:
    out.append(
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{size.width:.1f}" height="{size.height:.1f}" rx="{radius:g}" {style}/>'
    )


def _text(text: str, x: float, y: float, out: list[str], heading: bool = False, middle: bool = False) -> None:
    anchor = ' text-anchor="middle"' if middle else ""
    weight = ' font-weight="bold"' if heading else ""
    out.append(
        f'<text x="{x:.1f}" y="{y:.1f}" textLength="{len(text) * _ADVANCE:.1f}" lengthAdjust="spacingAndGlyphs" '
        f'fill="#1f2937"{anchor}{weight} xml:space="preserve">{escape(printable(text), quote=False)}</text>'
    )


def _arrow(points: list[Point], out: list[str]) -> None:
    """A smooth curve through the points, vertical at each."""
    path = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        bend = (y1 - y0) / 2
        path.append(f"C{x0:.1f},{y0 + bend:.1f} {x1:.1f},{y1 - bend:.1f} {x1:.1f},{y1:.1f}")
    out.append(
        f'<path d="{" ".join(path)}" fill="none" stroke="#4b5563" stroke-width="1.1" marker-end="url(#mugraph-arrow)"/>'
    )
