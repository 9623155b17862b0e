"""Small sizes at which a program and a μGraph are compared.

Every tiled axis gets full tiles and a tail, every split an odd share, and no two axes have the same sizes in all draws.
Sizes that belong together (aliases, reshapes, slices, concatenations) are chosen so that they fit: starts of slices
move with them, between the same neighbours as at the true sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mugraph.errors import VerificationError
from mugraph.ir.axes import Axis, product
from mugraph.ir.graph import BlockGraph, Equation, Program, equations_of
from mugraph.ir.ops import (
    Concat,
    Const,
    Contract,
    Kernel,
    Library,
    Pack,
    Reduce,
    Rename,
    Reshape,
    SizeOf,
    Slice,
    TopK,
    Unpack,
)
from mugraph.ir.printer import kernel_level_axes
from mugraph.ir.types import Tensor

TILE = 2
WHOLE_SIZES = (2, 3, 4)
TILED_SIZES = (3, 5, 7)  # at a tile of 2: full tiles and a tail
PARTS = (2, 3)
LARGEST = 64  # of a size that follows from others
STEPS = 3_000  # of the search for sizes that fit
MOST_TRUE = 64  # the longest axis that is compared at its true proportions


@dataclass(frozen=True)
class Draw:
    """Sizes by axis, tile sizes by tiled axis, parts by split axis, and where slices start, by (axis, true start)."""

    sizes: Mapping[str, int]
    tiles: Mapping[str, int]
    parts: Mapping[str, int]
    starts: Mapping[tuple[str, int], int]


@dataclass(frozen=True)
class _Product:
    """factor * Π left = Π right"""

    factor: int
    left: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True)
class _Sum:
    """Σ parts = whole"""

    parts: tuple[str, ...]
    whole: str


@dataclass(frozen=True)
class _AtLeast:
    """greater >= factor * less + offset"""

    greater: str
    factor: int
    less: str
    offset: int


_Constraint = _Product | _Sum | _AtLeast
Candidates = Callable[[str, Mapping[str, int]], list[int]]


@dataclass
class _Facts:
    """What the two graphs say about their axes."""

    axes: dict[str, Axis] = field(default_factory=dict)
    tiles: dict[str, int] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)  # split axis -> the axis that counts its parts
    ties: list[tuple[str, str]] = field(default_factory=list)
    constraints: list[_Constraint] = field(default_factory=list)
    sliced: list[tuple[Axis, Slice]] = field(default_factory=list)
    joins: list[tuple[tuple[Axis, ...], Axis]] = field(default_factory=list)
    looped: set[str] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)
    reduced: set[str] = field(default_factory=set)
    literals: set[int] = field(default_factory=set)

    def add(self, axes: Iterable[Axis]) -> None:
        """Sizes go by name: raises VerificationError for a name of two sizes."""
        for a in axes:
            known = self.axes.setdefault(a.name, a)
            if known.size != a.size:
                raise VerificationError(
                    f"axis {a.name} has the size {known.size} in one place and {a.size} in another",
                    remedy="give axes of different sizes different names",
                )


def draws(
    program: Program, graph: Program, count: int = 2, fixed: Mapping[str, int] | None = None, small: bool = False
) -> tuple[Draw, ...]:
    """`count` draws of sizes for both graphs; `fixed` sizes stay as they are.  `small`: the least sizes that have a
    tail in every tiled axis, whether or not two axes have the same.  Raises VerificationError if no sizes fit."""
    facts = _Facts()
    for g in (program, graph):
        _collect(g, facts)
    # a single place that is cut out of an axis, or joined into one, has no other size
    places = [op.out for _, op in facts.sliced] + [a for parts, _ in facts.joins for a in parts]
    known = {a.name: 1 for a in places if a.size == 1} | dict(fixed or {})
    found: list[Draw] = []
    for i in range(count):
        found.append(_draw(facts, [] if small else found, i, known, small))
    return tuple(found)


def literal_sizes(program: Program, graph: Program) -> dict[str, int]:
    """True sizes of static axes that are counted (mean, SizeOf) and whose size is also written as a literal."""
    facts = _Facts()
    for g in (program, graph):
        _collect(g, facts)
    sizes = {a: facts.axes[a].size for a in facts.counted if a in facts.axes}
    return {a: s for a, s in sizes.items() if isinstance(s, int) and s in facts.literals}


def cut_sizes(program: Program, graph: Program) -> dict[str, int]:
    """Sizes at which slices of slices, steps and joints fall on each other as at the true sizes: those, divided by
    what all that belong together have in common.  Only axes that are cut, and that get no longer than MOST_TRUE."""
    facts = _Facts()
    for g in (program, graph):
        _collect(g, facts)
    links = [*facts.ties, *((axis.name, op.out.name) for axis, op in facts.sliced)]
    links += [(a.name, whole.name) for parts, whole in facts.joins for a in parts]
    products = [(*c.left, *c.right) for c in facts.constraints if isinstance(c, _Product)]
    links += [pair for names in products for pair in itertools.pairwise(names)]
    linked = _Classes(links)
    cut = {linked.of(axis.name) for axis, _ in facts.sliced} | {linked.of(whole.name) for _, whole in facts.joins}
    whole = {linked.of(axis.name) for axis, op in facts.sliced if op.step > 1}
    whole |= {linked.of(names[0]) for names in products if len(names) > 2}
    found: dict[str, int] = {}
    for root in cut:
        sizes = {n: a.size for n, a in facts.axes.items() if linked.of(n) == root}
        static = {n: s for n, s in sizes.items() if isinstance(s, int)}
        starts = [op.start for axis, op in facts.sliced if linked.of(axis.name) == root]
        shared = 1 if root in whole else math.gcd(*static.values(), *starts)
        least = min(static.values(), default=1)
        shared = max(n for n in range(1, shared + 1) if shared % n == 0 and (least // n >= 2 or n == 1))
        if max(static.values(), default=0) // shared <= MOST_TRUE:
            found.update((n, s // shared) for n, s in static.items())
    return found


# -- what the graphs say ------------------------------------------------------------------------------------------


def _collect(graph: Program, facts: _Facts) -> None:
    tensors = graph.tensors()
    for t in tensors.values():
        facts.add(t.axes)
    for equation in graph.equations:
        match equation.op:
            case Kernel(blocks):
                for block in blocks:
                    _collect_block(block, tensors, facts)
            case Library(_, semantics):
                bound = {a.name for i in semantics.inputs for a in i.tensor.axes}
                facts.add(a for a in kernel_level_axes(semantics) if a.name not in bound)
                if bound <= {a.name for n in equation.args for a in tensors[n].axes}:  # it speaks of the caller's axes
                    for inner in semantics.equations:
                        _collect_equation(inner, semantics.tensors(), facts)
            case _:
                _collect_equation(equation, tensors, facts)


def _collect_block(block: BlockGraph, outer: Mapping[str, Tensor], facts: _Facts) -> None:
    inner = block.tensors()
    for t in inner.values():
        facts.add(t.axes)
    for axis, tile in block.tiles().items():
        facts.tiles[axis] = max(tile, facts.tiles.get(axis, 1))
    facts.looped.update(axis for p in block.passes for axis, _ in p.loops)
    if block.split:
        facts.splits[block.split.axis] = block.split.part.name
        facts.axes[block.split.part.name] = block.split.part
    for ld in block.all_loads():
        source = outer.get(ld.source)
        if source is not None and len(source.axes) == len(ld.value.axes):
            pairs = zip(ld.value.axes, source.axes, strict=True)
            if {a.name for a in ld.value.axes} != {a.name for a in source.axes}:
                facts.ties += [(a.name, b.name) for a, b in pairs]
    for equation in equations_of(tuple(block.steps())):
        _collect_equation(equation, inner, facts)
    if block.combine:
        _collect_block(block.combine, outer, facts)


def _collect_equation(equation: Equation, tensors: Mapping[str, Tensor], facts: _Facts) -> None:
    def axis_of(value: str, name: str) -> Axis:
        return next((a for a in tensors[value].axes if a.name == name), Axis(name, 1))

    args = equation.args
    match equation.op:
        case Const(value):
            facts.literals |= {abs(value.numerator), value.denominator}
        case SizeOf(axis):
            facts.add([axis])
            facts.counted.add(axis.name)
        case Reduce(kind, axes):
            facts.reduced.update(axes)
            facts.counted.update(axes if kind == "mean" else ())
        case Contract(axes):
            facts.reduced.update(axes)
        case Rename(pairs):
            facts.ties += [(old, new.name) for old, new in pairs]
        case Reshape(dims) if args and args[0] in tensors:
            before, after = tensors[args[0]].axes, tuple(a for d in dims for a in d)
            if {a.name for a in before} != {a.name for a in after}:
                for left, right in _regrouped(before, after):
                    if len(left) == len(right) == 1:
                        facts.ties.append((left[0], right[0]))
                    else:
                        facts.constraints.append(_Product(1, left, right))
        case Slice(axis) if args and args[0] in tensors:
            facts.sliced.append((axis_of(args[0], axis), equation.op))
        case Concat(axes, out):
            facts.joins.append((tuple(axis_of(v, a) for v, a in zip(args, axes, strict=False) if v in tensors), out))
        case TopK(axis, out):
            facts.constraints.append(_AtLeast(axis, 1, out.name, 0))
        case Unpack(axis, out, dtype):
            facts.constraints.append(_Product(max(8 // dtype.bits, 1), (axis,), (out.name,)))
        case Pack(axis, out, dtype):
            facts.constraints.append(_Product(max(8 // dtype.bits, 1), (out.name,), (axis,)))
        case _:
            pass


def _regrouped(before: Sequence[Axis], after: Sequence[Axis]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """A row-major reshape as the smallest groups of adjacent axes with equally many elements at the true sizes."""
    groups: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    start, ends = (0, 0), itertools.product(range(1, len(before) + 1), range(1, len(after) + 1))
    for i, j in sorted(ends, key=sum):
        if i > start[0] and j > start[1]:
            left, right = before[start[0] : i], after[start[1] : j]
            if product(a.size for a in left) == product(a.size for a in right):
                groups.append((tuple(a.name for a in left), tuple(a.name for a in right)))
                start = i, j
    rest = tuple(a.name for a in before[start[0] :]), tuple(a.name for a in after[start[1] :])
    if rest == ((), ()):
        return groups
    if not groups:
        return [rest]
    left_names, right_names = groups[-1]
    return [*groups[:-1], (left_names + rest[0], right_names + rest[1])]


# -- sizes that fit -----------------------------------------------------------------------------------------------


class _Classes:
    """Axes that have the same size: union-find."""

    def __init__(self, ties: Sequence[tuple[str, str]]) -> None:
        self._parent: dict[str, str] = {}
        for a, b in ties:
            self._parent[self.of(a)] = self.of(b)

    def of(self, axis: str) -> str:
        while (up := self._parent.get(axis, axis)) != axis:
            axis = up
        return axis


def _draw(facts: _Facts, earlier: Sequence[Draw], number: int, fixed: dict[str, int], small: bool = False) -> Draw:
    same = _Classes(facts.ties)
    parts = {a: PARTS[number % len(PARTS)] for a in facts.splits}
    known = {same.of(a): s for a, s in fixed.items()}
    known.update((same.of(part), parts[a]) for a, part in facts.splits.items())
    constraints = [_renamed(c, same) for c in facts.constraints]
    segments, cuts = _segments(facts, same, constraints, known)
    tiled = {same.of(a) for a, tile in facts.tiles.items() if tile > 1}
    variables = list(dict.fromkeys([*segments, *(same.of(a) for a in facts.axes)]))
    sides = [side for c in constraints if isinstance(c, _Product) for side in ((c.left, c.right), (c.right, c.left))]
    products = {one[0] for one, many in sides if len(one) == 1 and len(many) > 1}
    variables.sort(key=lambda v: v in products)  # their sizes follow
    history = {v: tuple(d.sizes[v] for d in earlier if v in d.sizes) for v in variables}

    bound_up = {name for c in constraints for name in _names(c)}
    looped = {same.of(a) for a in (*facts.looped, *facts.counted)}
    varied = looped | bound_up | {same.of(a) for a in facts.reduced}  # some laws hold for sums of two entries alone
    crowded = len(bound_up) > len(WHOLE_SIZES) ** 2  # small sizes cannot tell all of these apart

    def candidates(v: str, taken: Mapping[str, int]) -> list[int]:
        wanted = TILED_SIZES if v in tiled else (1, 2) if v in segments else WHOLE_SIZES
        sizes = range(1, 17) if v in bound_up else wanted
        if small:
            return sorted(sizes, key=lambda s: (s not in wanted, s))
        if not earlier:
            # a loop takes two full tiles and a tail where the grid does with one
            return sorted(sizes, key=lambda s: (s not in wanted, v in looped and s == wanted[0], s))
        used = set() if crowded else {(*history[o], s) for o, s in taken.items() if o in history}
        return sorted(
            sizes, key=lambda s: (v in varied and s in history[v], (*history[v], s) in used, s not in wanted, s)
        )

    # an axis of size 1 hides its place among others
    whole = {v: 2 for v in variables if v not in segments}
    inner = [*segments[::-1], *(v for v in variables if v not in segments)]
    orders = variables, inner, variables[::-1]  # where the longest come first, they may leave what is cut out no room
    tries = (_solve(order, constraints, known, candidates, least) for order in orders for least in (whole, {}))
    assigned = next((found for found in tries if found is not None), None)
    if assigned is None:
        raise VerificationError(
            "no small sizes fit the graph's slices, reshapes and concatenations",
            remedy="verify with fixed sizes for the axes involved",
        )
    sizes = {a: assigned[same.of(a)] for a in facts.axes}
    tiles = {a: _tile(tile, sizes[a], same.of(a) in known, a in facts.looped) for a, tile in facts.tiles.items()}
    starts = {
        (axis, start): sum(assigned[s] for s in before)
        for (root, start), before in cuts.items()
        for axis in facts.axes
        if same.of(axis) == root
    }
    return Draw(sizes, tiles, parts, starts)


def _tile(declared: int, size: int, is_fixed: bool, is_looped: bool) -> int:
    """Small enough for several tiles and a tail.  An axis that is on the grid alone is cut into two blocks, as
    blocks do not see each other; one of a fixed size is not cut into more than a few."""
    if declared > 1 and is_fixed:
        return max(TILE, 2 * size // 5)
    return min(declared, TILE if is_looped else max(TILE, (size + 1) // 2))


def _renamed(c: _Constraint, same: _Classes) -> _Constraint:
    match c:
        case _Product(factor, left, right):
            return _Product(factor, tuple(map(same.of, left)), tuple(map(same.of, right)))
        case _Sum(parts, whole):
            return _Sum(tuple(map(same.of, parts)), same.of(whole))
        case _AtLeast(greater, factor, less, offset):
            return _AtLeast(same.of(greater), factor, same.of(less), offset)


def _segments(
    facts: _Facts, same: _Classes, constraints: list[_Constraint], known: dict[str, int]
) -> tuple[list[str], dict[tuple[str, int], tuple[str, ...]]]:
    """Cuts each sliced or joined axis of a static size at every border: new variables for the pieces, constraints for
    what they add up to, and per (class, true start) the pieces before it."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}  # class -> (start, end, class of the piece)
    totals: dict[str, int] = {}
    for axis, op in facts.sliced:
        root, out = same.of(axis.name), same.of(op.out.name)
        if op.step == 1 and isinstance(axis.size, int) and isinstance(op.out.size, int):
            ranges.setdefault(root, []).append((op.start, op.start + op.out.size, out))
            totals[root] = axis.size
        elif op.start < op.step and axis.size == op.step * op.out.size:
            constraints.append(_Product(op.step, (out,), (root,)))
        elif isinstance(axis.size, int) and isinstance(op.out.size, int):
            end = op.start + op.step * (op.out.size - 1) + 1
            span = f"{root}[{op.start}:{end}:{op.step}]"
            ranges.setdefault(root, []).append((op.start, end, span))
            totals[root] = axis.size
            constraints.append(_AtLeast(span, op.step, out, 1 - op.step))
        else:
            constraints.append(_AtLeast(root, op.step, out, op.start + 1 - op.step))
    for pieces, whole in facts.joins:
        ends = list(itertools.accumulate(a.size if isinstance(a.size, int) else math.nan for a in pieces))
        if ends and isinstance(whole.size, int) and ends[-1] == whole.size:
            starts = [0, *map(int, ends[:-1])]
            spans = [(s, int(e), same.of(a.name)) for s, e, a in zip(starts, ends, pieces, strict=True)]
            ranges.setdefault(same.of(whole.name), []).extend(spans)
            totals[same.of(whole.name)] = whole.size
        else:
            constraints.append(_Sum(tuple(same.of(a.name) for a in pieces), same.of(whole.name)))
    variables: list[str] = []
    cuts: dict[tuple[str, int], tuple[str, ...]] = {}
    borders_of = _borders(ranges, totals)
    for root, spans in ranges.items():
        borders = borders_of[root]
        names = [f"{root}[{s}:{e}]" for s, e in itertools.pairwise(borders)]
        if root in known:  # in proportion
            lengths = [(e - s) * known[root] // totals[root] for s, e in itertools.pairwise(borders)]
            known.update(zip(names, lengths, strict=True))
        variables += names
        constraints.append(_Sum(tuple(names), root))
        for start, end, piece in spans:
            inside = tuple(names[borders.index(start) : borders.index(end)])
            constraints.append(_Sum(inside, piece))
            cuts[root, start] = tuple(names[: borders.index(start)])
            for name, (s, e) in zip(inside, itertools.pairwise(borders[borders.index(start) :]), strict=False):
                if piece in borders_of:  # cut itself, at the same places
                    constraints.append(_Sum((f"{piece}[{s - start}:{e - start}]",), name))
    return variables, cuts


def _borders(ranges: Mapping[str, Sequence[tuple[int, int, str]]], totals: Mapping[str, int]) -> dict[str, list[int]]:
    """Per class the places where it is cut: by what is taken out of it, or by what it is taken out of."""
    found = {root: {0, totals[root]}.union(*((s, e) for s, e, _ in spans)) for root, spans in ranges.items()}
    pairs = [(root, s, e, piece) for root, spans in ranges.items() for s, e, piece in spans if piece in found]
    changed = True
    while changed:
        before = sum(map(len, found.values()))
        for root, start, end, piece in pairs:
            found[root] |= {b + start for b in found[piece] if b <= end - start}
            found[piece] |= {b - start for b in found[root] if start <= b <= end}
        changed = sum(map(len, found.values())) > before
    return {root: sorted(borders) for root, borders in found.items()}


def _names(c: _Constraint) -> tuple[str, ...]:
    match c:
        case _Product(_, left, right):
            return left + right
        case _Sum(parts, whole):
            return (*parts, whole)
        case _AtLeast(greater, _, less, _):
            return greater, less


def _solve(
    variables: Sequence[str],
    constraints: Sequence[_Constraint],
    known: Mapping[str, int],
    candidates: Candidates,
    least: Mapping[str, int],
) -> dict[str, int] | None:
    """Values for all variables under the constraints, none below its least: depth first, propagating what follows."""
    steps = itertools.count()

    def search(taken: dict[str, int]) -> dict[str, int] | None:
        if next(steps) > STEPS:
            return None
        closed = _closed(taken, constraints, least)
        if closed is None or any(s < least.get(v, 1) for v, s in closed.items() if v not in known):
            return None
        v = next((v for v in variables if v not in closed), None)
        if v is None:
            return closed
        for size in candidates(v, closed):
            if found := search({**closed, v: size}):
                return found
        return None

    return search(dict(known))


def _closed(
    taken: dict[str, int], constraints: Sequence[_Constraint], least: Mapping[str, int]
) -> dict[str, int] | None:
    """The assignment with what follows from it; None if it breaks a constraint."""
    values = dict(taken)
    changed = True
    while changed:
        changed = False
        for c in constraints:
            new = _consequence(c, values, least)
            if new is None or any(not 1 <= s <= max(LARGEST, *taken.values(), 1) for s in new.values()):
                return None
            values.update(new)
            changed |= bool(new)
    return values


def _consequence(c: _Constraint, values: Mapping[str, int], least: Mapping[str, int]) -> dict[str, int] | None:
    """The one value that follows from a constraint, nothing, or None where it is broken."""
    match c:
        case _AtLeast(greater, factor, less, offset):
            known = greater in values and less in values
            return None if known and values[greater] < factor * values[less] + offset else {}
        case _Sum(parts, whole):
            open_parts = [p for p in parts if p not in values]
            total = sum(values[p] for p in parts if p in values)
            if not open_parts:
                return _equal(whole, total, values)
            if len(open_parts) == 1 and whole in values:
                return {open_parts[0]: values[whole] - total}
            return None if whole in values and values[whole] < total + len(open_parts) else {}
        case _Product(factor, left, right):
            open_left, open_right = ([a for a in side if a not in values] for side in (left, right))
            x = factor * math.prod(values[a] for a in left if a in values)
            y = math.prod(values[a] for a in right if a in values)
            if not open_left and not open_right:
                return {} if x == y else None
            if len(open_left) + len(open_right) > 1:
                for names, mine, other in ((open_left, x, y), (open_right, y, x)):
                    room = mine * math.prod(least.get(a, 1) for a in names)
                    if len(names) == len(open_left) + len(open_right) and (other % mine or room > other):
                        return None  # the other side is known, and too small for what is open here
                return {}
            name, top, bottom = (open_left[0], y, x) if open_left else (open_right[0], x, y)
            return {name: top // bottom} if top % bottom == 0 else None


def _equal(name: str, value: int, values: Mapping[str, int]) -> dict[str, int] | None:
    if name in values:
        return {} if values[name] == value else None
    return {name: value}
