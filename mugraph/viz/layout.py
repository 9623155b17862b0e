"""Where boxes and arrows go: layers from top to bottom.

The classic steps of layered drawing (Sugiyama, Tagawa, Toda 1981): longest-path layers, a way point in every layer
that an arrow passes, ordering by the mean of the neighbours, and coordinates by isotonic regression, which moves
boxes towards their neighbours as far as the gaps between them allow.  Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP_X = 26.0
GAP_Y = 34.0
_WAY = 10.0  # width of a way point
_ROUNDS = 8


@dataclass(frozen=True)
class Size:
    width: float
    height: float


Point = tuple[float, float]


@dataclass
class Layout:
    """Top left corners by key, the vertical extent of each section, and the way points of each arrow."""

    width: float = 0.0
    height: float = 0.0
    corners: dict[str, Point] = field(default_factory=dict)
    sections: list[tuple[float, float]] = field(default_factory=list)
    arrows: list[list[Point]] = field(default_factory=list)


def arrange(
    sections: Sequence[Mapping[str, Size]], arrows: Sequence[tuple[str, str]], head: Sequence[float], foot: float = 0.0
) -> Layout:
    """A layout of the boxes of each section, given by key.  `head` is the room above each section for its title,
    `foot` the room below each.  Arrows lead from earlier keys to later ones."""
    sizes = {key: size for section in sections for key, size in section.items()}
    layer = _layers(sections, arrows)
    sizes, chains = _with_way_points(sizes, layer, arrows)
    rows: list[list[str]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for key in sizes:
        rows[layer[key]].append(key)
    links = [(a, b) for chain in chains for a, b in pairwise(chain)]
    above: dict[str, list[str]] = {key: [] for key in sizes}
    below: dict[str, list[str]] = {key: [] for key in sizes}
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    center = _order_and_place(rows, sizes, above, below)
    layout = Layout()
    y = 0.0
    top: dict[str, float] = {}
    height_of = {key: size.height for key, size in sizes.items()}
    for section, room in zip(sections, head, strict=True):
        start = y
        y += room
        own = sorted({layer[key] for key in section})
        for at in own:
            height = max(sizes[key].height for key in rows[at])
            for key in rows[at]:
                is_way_point = key not in section
                height_of[key] = height if is_way_point else sizes[key].height
                top[key] = y + (height - height_of[key]) / 2
            y += height + (GAP_Y if at != own[-1] else 0.0)
        y += foot
        layout.sections.append((start, y))
        y += GAP_Y * 0.6
    left = min((center[k] - sizes[k].width / 2 for k in sizes), default=0.0)
    layout.width = max((center[k] + sizes[k].width / 2 for k in sizes), default=0.0) - left
    layout.height = max(y - GAP_Y * 0.6, 0.0)
    layout.corners = {k: (center[k] - sizes[k].width / 2 - left, top[k]) for s in sections for k in s}
    layout.arrows = _routes(chains, sizes, {k: c - left for k, c in center.items()}, top, height_of)
    return layout


def _layers(sections: Sequence[Mapping[str, Size]], arrows: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Longest path from the top of the section; boxes without arrows into them go just above their first use."""
    before: dict[str, list[str]] = {}
    after: dict[str, list[str]] = {}
    for a, b in arrows:
        before.setdefault(b, []).append(a)
        after.setdefault(a, []).append(b)
    layer: dict[str, int] = {}
    start = 0
    for section in sections:
        for key in section:
            layer[key] = max([start] + [layer[a] + 1 for a in before.get(key, ()) if a in layer])
        start = max([start - 1] + [layer[key] for key in section]) + 1
    where = {key: n for n, section in enumerate(sections) for key in section}
    for key in layer:
        if key not in before and (users := [layer[b] for b in after.get(key, ()) if where[b] == where[key]]):
            layer[key] = min(users) - 1
    used = {old: new for new, old in enumerate(sorted(set(layer.values())))}
    return {key: used[at] for key, at in layer.items()}


def _with_way_points(
    sizes: dict[str, Size], layer: dict[str, int], arrows: Sequence[tuple[str, str]]
) -> tuple[dict[str, Size], list[list[str]]]:
    """Sizes with a way point in each layer that an arrow passes, and each arrow as a chain of keys."""
    sizes, chains = dict(sizes), []
    for n, (a, b) in enumerate(arrows):
        chain = [a]
        for at in range(layer[a] + 1, layer[b]):
            key = f"way {n} {at}"
            sizes[key], layer[key] = Size(_WAY, 0.0), at
            chain.append(key)
        chains.append([*chain, b])
    return sizes, chains


def _order_and_place(
    rows: list[list[str]], sizes: Mapping[str, Size], above: Mapping[str, list[str]], below: Mapping[str, list[str]]
) -> dict[str, float]:
    """Orders each row by its neighbours and gives every key its centre."""
    center: dict[str, float] = {}
    for row in rows:
        center.update(_packed(row, [0.0] * len(row), sizes))
    for turn in range(_ROUNDS):
        neighbours, order = (above, rows) if turn % 2 == 0 else (below, rows[::-1])
        for row in order:
            wish = {k: _mean([center[n] for n in neighbours[k]], center[k]) for k in row}
            row.sort(key=lambda k, wish=wish: (wish[k], center[k]))  # type: ignore[misc]
            center.update(_packed(row, [wish[k] for k in row], sizes))
    for row in rows:
        wishes = [_mean([center[n] for n in (*above[k], *below[k])], center[k]) for k in row]
        center.update(_packed(row, wishes, sizes))
    return center


def _packed(row: Sequence[str], wishes: Sequence[float], sizes: Mapping[str, Size]) -> dict[str, float]:
    """The centres nearest to the wishes (least squares) that keep the order and the gaps: isotonic regression by
    pooling adjacent violators."""
    offset, offsets = 0.0, []
    for i, key in enumerate(row):
        offset += (sizes[row[i - 1]].width + sizes[key].width) / 2 + GAP_X if i else 0.0
        offsets.append(offset)
    pools: list[tuple[float, int]] = []  # mean, count
    for wish, o in zip(wishes, offsets, strict=True):
        mean, count = wish - o, 1
        while pools and pools[-1][0] >= mean:
            m, c = pools.pop()
            mean, count = (m * c + mean * count) / (c + count), c + count
        pools.append((mean, count))
    means = [mean for mean, count in pools for _ in range(count)]
    return {key: m + o for key, m, o in zip(row, means, offsets, strict=True)}


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _routes(
    chains: Sequence[Sequence[str]],
    sizes: Mapping[str, Size],
    center: Mapping[str, float],
    top: Mapping[str, float],
    height: Mapping[str, float],
) -> list[list[Point]]:
    """Each arrow from the lower edge of its first box to the upper edge of its last, upright beside the boxes of the
    layers between; ends on one edge are spread."""
    leaving: dict[str, list[int]] = {}
    arriving: dict[str, list[int]] = {}
    for n, chain in enumerate(chains):
        leaving.setdefault(chain[0], []).append(n)
        arriving.setdefault(chain[-1], []).append(n)
    start: dict[int, float] = {}
    end: dict[int, float] = {}
    for key, ns in leaving.items():
        start.update(_spread(sorted(ns, key=lambda n: center[chains[n][1]]), center[key], sizes[key].width))
    for key, ns in arriving.items():
        end.update(_spread(sorted(ns, key=lambda n: center[chains[n][-2]]), center[key], sizes[key].width))
    routes = []
    for n, chain in enumerate(chains):
        points = [(start[n], top[chain[0]] + sizes[chain[0]].height)]
        points += [(center[k], y) for k in chain[1:-1] for y in (top[k], top[k] + height[k])]
        routes.append([*points, (end[n], top[chain[-1]])])
    return routes


def _spread(ns: Sequence[int], center: float, width: float) -> dict[int, float]:
    step = min(28.0, width * 0.7 / max(len(ns), 1))
    return {n: center + (i - (len(ns) - 1) / 2) * step for i, n in enumerate(ns)}
