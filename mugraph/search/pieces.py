"""Slices, concatenations and regrouped axes as index maps, so that the calculus sees none of them.

    pieces(program) -> a program with the same inputs and outputs, in which views are taken of inputs only

A slice of an elementwise result is the same function of slices; a slice of a sum is the sum of slices.  So a view
moves down until it meets an input, where it is free: the same memory under an offset and other strides.  An axis that
comes out of a concatenation is a disjoint union of *cells*.  A value along it is a family of values, one a cell; a sum
over it is the sum of the sums over its cells, a maximum the greatest of the cells' maxima.  Families are joined again
(one concatenation) only where an output, or the operand of an operator outside the calculus, needs the whole.

Demand goes from results to operands, as a `Region` per axis:

    index = start + Σ stride_i · axis_i

A view that no regions express (windows cut across a regrouped axis) stays an equation of its own: a boundary.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mugraph.errors import ShapeError
from mugraph.ir.axes import Axis, Monomial, Size, over, product
from mugraph.ir.graph import Equation, Program
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    Elementwise,
    Iota,
    MaskedExp,
    Op,
    Reduce,
    Rename,
    Reshape,
    Select,
    SizeOf,
    Slice,
    Transpose,
)  # fmt: skip
from mugraph.ir.types import DType, Tensor, tensor

MOST_CELLS = 16  # pieces of one axis; more would blow up the program
DEEPEST = 40  # pieces of pieces that are taken by recursion; deeper ones are taken first, then all is tried again


@dataclass(frozen=True)
class Region:
    """Where along an axis a piece lies: `start + Σ stride · axis`.  Without digits it is a single place."""

    start: int
    digits: tuple[tuple[Axis, int], ...]

    def inside(self, start: int, step: int) -> Region:
        """The same places, seen from an axis of which this one is `start + step * index`."""
        return Region(start + step * self.start, tuple((a, s * step) for a, s in self.digits))

    def last(self) -> int:
        """The greatest index.  Raises Stuck where a size is symbolic."""
        return self.start + sum(stride * (_static(a.size) - 1) for a, stride in self.digits)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(a for a, _ in self.digits)


Demand = Mapping[str, Region]
Cuts = Mapping[str, tuple[int, ...]]  # axis -> the places where it is cut, ascending


class Stuck(Exception):
    """No regions say this view; its equation becomes a boundary."""

    def __init__(self, equation: Equation | None = None) -> None:
        super().__init__()
        self.equation = equation


def pieces(program: Program) -> Program:
    """The program over cells, with views of inputs only; the program itself where there is nothing to cut."""
    tensors = program.tensors()
    if not any(_is_view(e, tensors) for e in program.equations):
        return program
    outside: set[str] = set()
    while True:
        try:
            return _Pieces(program, frozenset(outside)).run()
        except Stuck as stuck:
            if stuck.equation is None:
                raise
            outside.add(stuck.equation.targets[0].name)


def is_free(e: Equation) -> bool:
    """Whether the equation only gives memory another shape, offset or strides."""
    return isinstance(e.op, Slice | Reshape | Rename | Transpose | Broadcast)


def joints(equations: Sequence[Equation], made: Iterable[str], outputs: Iterable[str]) -> set[str]:
    """Results of concatenations whose parts kernels make (`made`), for nothing else: the parts are stored in place."""
    stored, results, found = set(made), set(outputs), set[str]()
    uses = Counter(a for e in equations for a in e.args)
    for e in equations:
        if isinstance(e.op, Concat) and all(a in stored and a not in results and uses[a] == 1 for a in e.args):
            found.add(e.target.name)
            stored.add(e.target.name)
    return found


def _is_view(e: Equation, tensors: Mapping[str, Tensor]) -> bool:
    match e.op:
        case Slice() | Concat():
            return True
        case Reshape():
            return {a.name for a in e.target.axes} != {a.name for a in tensors[e.args[0]].axes}
        case _:
            return False


def _static(size: Size) -> int:
    if not isinstance(size, int):
        raise Stuck
    return size


class Deeper(Exception):
    """A piece lies too deep for recursion: of a value that is computed, for a demand, or else the whole value."""

    def __init__(self, name: str, demand: Demand | None) -> None:
        super().__init__()
        self.name, self.demand = name, demand


# -- where axes are cut


def _cuts(program: Program, outside: frozenset[str]) -> dict[str, Cuts]:
    """Per value, where its axes are cut: at the joints of the concatenations that it is made of."""
    tensors = program.tensors()
    found: dict[str, Cuts] = {i.name: {} for i in program.inputs}
    for e in program.equations:
        args = [found[a] for a in e.args]
        cut: dict[str, set[int]] = {}
        if is_calculable(e, outside):
            try:
                for own, arg in zip(args, e.args, strict=True):
                    for axis, places in _moved_cuts(e, tensors[arg], own):
                        cut.setdefault(axis, set()).update(places)
            except Stuck:
                raise Stuck(e) from None
            if isinstance(e.op, Concat):
                low = 0
                inner = cut.setdefault(e.op.out.name, set())
                for own, arg, axis in zip(args, e.args, e.op.axes, strict=True):
                    inner.update((low, *(low + c for c in own.get(axis, ()))))
                    low += _static(_axis(tensors[arg], axis).size)
                inner.discard(0)
        if any(len(places) >= MOST_CELLS for places in cut.values()):
            raise Stuck(e)
        held = {a.name for t in e.targets for a in t.axes}
        whole = {a: tuple(sorted(places)) for a, places in cut.items() if a in held and places}
        found.update((t.name, whole) for t in e.targets)
    return found


def _moved_cuts(e: Equation, arg: Tensor, own: Cuts) -> Iterable[tuple[str, Iterable[int]]]:
    """An operand's cuts along the axes of the result."""
    match e.op:
        case Slice(axis, out, start, step):
            inner = {-(-(c - start) // step) for c in own.get(axis, ())}
            yield out.name, [c for c in inner if isinstance(out.size, int) and 0 < c < out.size]
            yield from ((a, c) for a, c in own.items() if a != axis)
        case Concat(axes):
            yield from ((a, c) for a, c in own.items() if a not in axes)
        case Rename(pairs):
            new = {old: axis.name for old, axis in pairs}
            yield from ((new.get(a, a), c) for a, c in own.items())
        case Reshape(dims):
            for before, after in _segments(arg.axes, [a for d in dims for a in d]):
                for i, a in enumerate(before):
                    if own.get(a.name):
                        if i or not after:
                            raise Stuck
                        inner_before = math.prod(_static(x.size) for x in before[1:])
                        inner_after = math.prod(_static(x.size) for x in after[1:])
                        places = [c * inner_before for c in own[a.name]]
                        if any(c % inner_after for c in places):
                            raise Stuck
                        yield after[0].name, [c // inner_after for c in places]
        case _:
            yield from own.items()


def _segments(before: Sequence[Axis], after: Sequence[Axis]) -> list[tuple[list[Axis], list[Axis]]]:
    """The shortest runs of axes of equal size on both sides of a reshape, in order.  Axes that both sides have (a mere
    regrouping) stand for themselves."""
    if {a.name for a in before} == {a.name for a in after}:
        return [([a], [a]) for a in before]
    found: list[tuple[list[Axis], list[Axis]]] = []
    left, right = [a for a in before if a.size != 1], [a for a in after if a.size != 1]
    while left or right:
        if not left or not right:
            raise Stuck
        x, y = [left.pop(0)], [right.pop(0)]
        while (a := _size(x)) != (b := _size(y)):
            shorter, rest = (x, left) if _divides(a, b) else (y, right) if _divides(b, a) else ([], [])
            if not rest:
                raise Stuck
            shorter.append(rest.pop(0))
        found.append((x, y))
    found += [([a], []) for a in before if a.size == 1]
    return found + [([], [a]) for a in after if a.size == 1]


def _size(axes: Iterable[Axis]) -> Size:
    return product(a.size for a in axes)


def _divides(a: Size, b: Size) -> bool:
    try:
        quotient = over(b, a)
    except ShapeError:
        return False
    if not isinstance(quotient, Monomial):
        return True
    return quotient.coefficient.denominator == 1 and all(p > 0 for _, p in quotient.powers)


def is_calculable(e: Equation, outside: frozenset[str]) -> bool:
    """Whether views move through the equation."""
    return e.targets[0].name not in outside and isinstance(
        e.op,
        Elementwise | Compare | Select | MaskedExp | Const | SizeOf | Iota | Contract | Reduce | Cast
        | Reshape | Transpose | Broadcast | Slice | Concat | Rename,
    )  # fmt: skip


def _axis(t: Tensor, name: str) -> Axis:
    return next(a for a in t.axes if a.name == name)


# -- one name for cells of one size


class _Names:
    """Which axis the cells of an axis run along.  Cells of one size share it, with each other and with the axes of
    the parts that they come from, so that a half that is used twice is one view; unless some value holds both."""

    def __init__(self, program: Program) -> None:
        self.used = set(program.axes()) | {d.name for d in program.dims()}
        self.together: set[frozenset[str]] = set()
        tensors = program.tensors()
        for e in program.equations:
            views = isinstance(e.op, Slice | Concat | Rename | Reshape)
            args = [[a.name for a in tensors[n].axes] for n in e.args]
            results = [[a.name for a in t.axes] for t in e.targets]
            for names in [*args, *results] if views else [[*itertools.chain(*args, *results)]]:
                self.together.update(frozenset(p) for p in itertools.combinations(dict.fromkeys(names), 2))
        self.kin: dict[tuple[str, Size], tuple[frozenset[str], Axis]] = {}
        for e in program.equations:
            if isinstance(e.op, Concat):
                for arg, axis in zip(e.args, e.op.axes, strict=True):
                    self.unite(e.op.out.name, _axis(tensors[arg], axis))
            if isinstance(e.op, Slice) and e.op.step == 1:
                self.unite(e.op.axis, e.op.out)

    def of(self, axis: str, size: Size) -> tuple[frozenset[str], Axis] | None:
        return self.kin.get((axis, size))

    def unite(self, whole: str, part: Axis) -> None:
        """Cells of `whole` of the size of `part` run along `part`'s axis from here on."""
        mine = self.of(whole, part.size) or (frozenset((whole,)), part)
        theirs = self.of(part.name, part.size) or (frozenset((part.name,)), part)
        if mine[0] & theirs[0] or any(frozenset((a, b)) in self.together for a in mine[0] for b in theirs[0]):
            return
        members = mine[0] | theirs[0]
        for a in members:
            self.kin[a, part.size] = (members, mine[1])

    def cell(self, axis: Axis, size: int) -> Axis:
        """The axis of a cell; the whole axis is its own cell, under the name that its kin agreed on."""
        known = self.of(axis.name, size)
        if known is None:
            known = (frozenset((axis.name,)), axis if size == axis.size else Axis(self.fresh(axis.name), size))
            self.kin[axis.name, size] = known
        return known[1]

    def fresh(self, base: str) -> str:
        name = next(n for i in itertools.count(1) if (n := f"{base}_{i}") not in self.used)
        self.used.add(name)
        return name


# -- the program over cells


class _Pieces:
    def __init__(self, program: Program, outside: frozenset[str]) -> None:
        self.program, self.outside = program, outside
        self.tensors = program.tensors()
        self.cuts = _cuts(program, outside)
        self.names = _Names(program)
        self.tiled = _tiled(program)
        self.defined = {t.name: e for e in program.equations for t in e.targets}
        self.sources = {i.name for i in program.inputs}
        self.values = {i.name: i.tensor for i in program.inputs}
        self.equations: list[Equation] = []
        self.memo: dict[object, str] = {}
        self.cells_of: dict[object, list[Region]] = {}
        self.depth = 0
        self.used = set(self.tensors)

    def run(self) -> Program:
        for o in self.program.outputs:
            self.settle(o.value)
        p = self.program
        used = {o.value for o in p.outputs}
        kept: list[Equation] = []
        for e in reversed(self.equations):
            if not used.isdisjoint(t.name for t in e.targets):
                kept.append(e)
                used.update(e.args)
        return Program(p.name, p.inputs, tuple(reversed(kept)), p.outputs)

    def settle(self, output: str) -> None:
        """Emits an output, however deep it lies."""
        pending: list[tuple[str, Demand | None]] = [(output, None)]
        while pending:
            name, demand = pending[-1]
            try:
                if demand is None:
                    self.whole(name)
                else:
                    self.piece(name, demand)
                pending.pop()
            except Deeper as deeper:
                pending.append((deeper.name, deeper.demand))

    # -- emission

    def emit(self, e: Equation | None, op: Op, args: Sequence[str], wish: str, target: Tensor | None = None) -> str:
        """Adds an equation, or finds the same one.  `target`: the type that the result must have."""
        key = (op, tuple(args), target)
        if key in self.memo:
            return self.memo[key]
        if target is None:
            (t,) = infer(op, [type_of(self.values[a]) for a in args])
            target = tensor(self.fresh(wish), t.axes, t.dtype)
        self.memo[key] = target.name
        self.values[target.name] = target
        self.equations.append(Equation((target,), op, tuple(args), e.where if e else None))
        return target.name

    def fresh(self, wish: str) -> str:
        name, n = wish, 2
        while name in self.used:
            name, n = f"{wish}_{n}", n + 1
        self.used.add(name)
        return name

    def whole(self, name: str) -> str:
        """The value under its own name and axes; its cells are joined."""
        if name in self.values:
            return name
        e = self.defined[name]
        if not is_calculable(e, self.outside):
            self.boundary(e)
            return name
        own = self.tensors[name]
        try:
            self.joined(e, own, [a for a in own.axes if self.cuts[name].get(a.name)], {}, own)
        except Stuck as stuck:
            raise stuck if stuck.equation else Stuck(e) from None
        return name

    def joined(self, e: Equation, own: Tensor, cut: Sequence[Axis], demand: Demand, target: Tensor | None) -> str:
        """The value, its cells along the axes `cut` joined one axis after the other."""
        if not cut:
            found = self.piece(own.name, demand)
            if target is not None and found != target.name:
                last = next((x for x in self.equations if x.targets[0].name == found and is_free(x)), None)
                in_order = last is not None and (not isinstance(last.op, Reshape) or last.target.axes == target.axes)
                op, args = (last.op, last.args) if last and in_order else (Transpose(), (found,))
                found = self.emit(e, op, args, own.name, target)
            return found
        axis, parts, along = cut[0], list[str](), list[str]()
        for region in self.cells(axis, self.cuts[own.name][axis.name]):
            part = self.joined(e, own, cut[1:], {**demand, axis.name: region}, None)
            if not region.digits:
                unit = self.names.cell(axis, 1)
                part = self.emit(e, Broadcast((unit,)), [part], own.name)
            parts.append(part)
            along.append(region.axes[0].name if region.digits else unit.name)
        return self.emit(e, Concat(tuple(along), axis), parts, own.name, target)

    def boundary(self, e: Equation) -> None:
        """An operator outside the calculus, on whole operands."""
        args = tuple(self.whole(a) if self.cuts[a] else self.piece(a, {}) for a in e.args)
        self.equations.append(replace(e, args=args))
        self.values.update((t.name, t) for t in e.targets)
        self.sources.update(t.name for t in e.targets)

    def cells(self, axis: Axis, cuts: Sequence[int]) -> list[Region]:
        """The pieces of an axis between its cuts."""
        if not cuts:
            return [Region(0, ((axis, 1),))]
        borders = [0, *cuts, _static(axis.size)]
        found = []
        for low, high in itertools.pairwise(borders):
            size = high - low
            found.append(Region(low, ((self.names.cell(axis, size), 1),) if size > 1 else ()))
        return found

    # -- one piece

    def piece(self, name: str, demand: Demand) -> str:
        """The part of a value that the demand names, along the demand's axes."""
        own = self.tensors[name]
        full = {a.name: demand.get(a.name, Region(0, ((a, 1),))) for a in own.axes}
        key = (name, tuple(full[a.name] for a in own.axes))
        if key in self.memo:
            return self.memo[key]
        changed = {a.name: full[a.name] for a in own.axes if full[a.name] != Region(0, ((a, 1),))}
        e = self.defined.get(name)
        computed = e is not None and is_calculable(e, self.outside)
        if self.depth >= DEEPEST and e is not None and (computed or name not in self.values):
            raise Deeper(name, demand if computed else None)
        self.depth += 1
        try:
            if e is not None and computed:
                found = self.same(e, self.computed(e, full, not changed))
            else:
                self.whole(name)
                found = self.view(name, changed)
        except Stuck as stuck:
            raise stuck if stuck.equation or not computed else Stuck(e) from None
        finally:
            self.depth -= 1
        self.memo[key] = found
        return found

    def view(self, name: str, changed: Demand) -> str:
        """A view of an input, or of the result of a boundary."""
        if not changed:
            return name
        current, later = name, list[tuple[str, Axis]]()

        def held() -> set[str]:
            return {a.name for a in self.values[current].axes}

        for at, region in changed.items():
            axis = _axis(self.values[name], at)
            digits = []
            for a, stride in region.digits:
                if a.name in held():  # under a name of its own until all axes are placed
                    spare = Axis(self.names.fresh(a.name), a.size)
                    later.append((spare.name, a))
                    a = spare
                digits.append((a, stride))
            region = Region(region.start, tuple(digits))
            (only, stride), *more = region.digits or ((axis, 1),)
            if region.digits and not more and only.size == axis.size and (region.start, stride) == (0, 1):
                later = [(axis.name, b) if a == only.name else (a, b) for a, b in later]
                if (axis.name, only) not in later and not any(a == axis.name for a, _ in later):
                    later.append((axis.name, only))
                continue
            current = self.cut(current, axis, region)
        if later:
            current = self.emit(None, Rename(tuple(later)), [current], name)
        return current

    def cut(self, current: str, axis: Axis, region: Region) -> str:
        """One axis of a view cut down to a region."""
        digits = sorted(region.digits, key=lambda d: -d[1])
        start = region.start
        if not digits:
            unit = axis
            if axis.size != 1:
                unit = Axis(self.names.fresh(axis.name), 1)
                current = self.emit(None, Slice(axis.name, unit, start), [current], current)
            return self.regrouped(current, unit, ())
        if len(digits) == 1:
            return self.emit(None, Slice(axis.name, digits[0][0], start, digits[0][1]), [current], current)
        inner = [(_static(a.size), s) for a, s in digits[1:]]
        if all(s == n * t for (_, s), (n, t) in zip(digits[:-1], inner, strict=True)):
            size = _size(a for a, _ in digits)
            run = axis
            if size != axis.size or start or digits[-1][1] != 1:
                run = Axis(self.names.fresh(axis.name), size)
                current = self.emit(None, Slice(axis.name, run, start, digits[-1][1]), [current], current)
            return self.regrouped(current, run, tuple(a for a, _ in digits))
        # each digit cut out of a digit of its own
        total, radices, rest = _static(axis.size), list[int](), start
        for (_, s), bound in zip(digits, [total, *(s for _, s in digits[:-1])], strict=True):
            if bound % s:
                raise Stuck
            radices.append(bound // s)
        if digits[-1][1] != 1:
            radices.append(digits[-1][1])
        split = tuple(Axis(self.names.fresh(axis.name), r) for r in radices)
        current = self.regrouped(current, axis, split)
        for i, own in enumerate(split):
            at, rest = divmod(rest, math.prod(radices[i + 1 :]))
            wanted = Region(at, ((digits[i][0], 1),) if i < len(digits) else ())
            if wanted.last() >= radices[i]:
                raise Stuck
            current = self.cut(current, own, wanted)
        return current

    def regrouped(self, current: str, axis: Axis, new: tuple[Axis, ...]) -> str:
        axes = [(b,) for a in self.values[current].axes for b in (new if a.name == axis.name else (a,))]
        return self.emit(None, Reshape(tuple(axes)), [current], current)

    # -- pieces of computed values

    def computed(self, e: Equation, full: dict[str, Region], unchanged: bool) -> str:
        target, wish = e.target if unchanged else None, e.target.name
        match e.op:
            case Const() | SizeOf():
                return self.emit(e, e.op, (), wish, target)
            case Iota(axis):
                return self.index(e, full[axis.name], target)
            case Elementwise() | Compare() | Select() | MaskedExp() | Cast() | Transpose():
                args = [self.of(a, full) for a in e.args]
                return self.emit(e, e.op, args, wish, target)
            case Broadcast(axes):
                new = tuple(b for a in axes for b in full[a.name].axes)
                inner = self.of(e.args[0], full)
                return self.emit(e, Broadcast(new), [inner], wish, target) if new else inner
            case Contract(axes):
                return self.total(e, axes, full, target)
            case Reduce("mean", axes):
                if self.is_whole(e, axes, full):
                    return self.total(e, axes, full, target)
                result = self.total(replace(e, op=Reduce("sum", axes)), axes, full, None)
                for i, a in enumerate(axes):
                    size = self.emit(e, SizeOf(_axis(self.tensors[e.args[0]], a)), (), f"{a}_size")
                    last = target if i == len(axes) - 1 else None
                    result = self.emit(e, Elementwise("div"), [result, size], wish, last)
                return result
            case Reduce(_, axes):
                return self.total(e, axes, full, target)
            case Slice(axis, out, start, step):
                moved = {axis: full[out.name].inside(start, step)}
                return self.of(e.args[0], {**full, **moved})
            case Rename(pairs):
                return self.renamed(e, pairs, full, target)
            case Reshape(dims):
                return self.reshaped(e, [a for d in dims for a in d], full, target)
            case Concat(axes, out):
                return self.picked(e, axes, full, full[out.name], target)
            case _:
                raise AssertionError(e.op)

    def of(self, arg: str, full: Demand) -> str:
        return self.piece(arg, {a.name: full[a.name] for a in self.tensors[arg].axes if a.name in full})

    def same(self, e: Equation, found: str) -> str:
        """A piece in the element type of the whole: without an axis of size 1 it may be a scalar, which counts less."""
        if self.values[found].dtype is e.target.dtype:
            return found
        return self.emit(e, Cast(e.target.dtype), [found], e.target.name)

    def index(self, e: Equation, region: Region, target: Tensor | None) -> str:
        """start + Σ stride · index."""
        if target is not None:
            return self.emit(e, e.op, (), e.target.name, target)

        def literal(value: int) -> str:
            return self.emit(e, Const(Fraction(value), DType.i64), (), "c")

        result = None
        for axis, stride in region.digits:
            own = self.emit(e, Iota(axis), (), e.target.name)
            if stride != 1:
                own = self.emit(e, Elementwise("mul"), [own, literal(stride)], e.target.name)
            result = own if result is None else self.emit(e, Elementwise("add"), [result, own], e.target.name)
        if result is None:
            return literal(region.start)
        for start in self.before(e, region.start) or ([literal(region.start)] if region.start else []):
            result = self.emit(e, Elementwise("add"), [result, start], "i")
        return result

    def before(self, e: Equation, start: int) -> list[str]:
        """The sizes of what is joined before a place of the axis that the equation counts, where it is the start of a
        joined part: other sizes then mean the same place.  Empty where it is none."""
        assert isinstance(e.op, Iota)
        for joined in self.program.equations:
            if not isinstance(joined.op, Concat) or joined.op.out.name != e.op.axis.name:
                continue
            parts = [_axis(self.tensors[x], a) for x, a in zip(joined.args, joined.op.axes, strict=True)]
            for n in range(1, len(parts)):
                if all(isinstance(a.size, int) for a in parts[:n]) and sum(_static(a.size) for a in parts[:n]) == start:
                    return [self.emit(e, SizeOf(a, DType.i64), (), f"{a.name}_size") for a in parts[:n]]
        return []

    def closed_cells(self, e: Equation, axis: str, taken: set[str]) -> list[Region]:
        """The cells of an axis that the equation closes, under names that its result does not have."""
        args = [a for a in e.args if any(x.name == axis for x in self.tensors[a].axes)]
        whole = _axis(self.tensors[args[0]], axis)
        if whole.size == 1:
            return [Region(0, ())]
        key = (e.target.name, axis, frozenset(taken))
        if key in self.cells_of:
            return self.cells_of[key]
        cuts = sorted({c for a in args for c in self.cuts[a].get(axis, ())} | set(self.tiled.get(axis, ())))
        found = []
        for region in self.cells(whole, cuts):
            digits = tuple(
                (Axis(self.names.fresh(a.name), a.size) if a.name in taken else a, s) for a, s in region.digits
            )
            found.append(Region(region.start, digits))
        self.cells_of[key] = found
        return found

    def is_whole(self, e: Equation, axes: Sequence[str], full: Mapping[str, Region]) -> bool:
        taken = {a.name for r in full.values() for a in r.axes}
        return all(len(self.closed_cells(e, a, taken)) == 1 for a in axes)

    def total(self, e: Equation, axes: Sequence[str], full: dict[str, Region], target: Tensor | None) -> str:
        """A contraction or reduction, cell by cell."""
        taken = {a.name for r in full.values() for a in r.axes}
        terms = []
        combinations = list(itertools.product(*(self.closed_cells(e, a, taken) for a in axes)))
        for regions in combinations:
            inner = {**full, **dict(zip(axes, regions, strict=True))}
            args = [self.of(a, inner) for a in e.args]
            closed = tuple(a.name for r in regions for a in r.axes)
            final = target if len(combinations) == 1 else None
            terms.append(self.closing(e, closed, args, final))
        fn = e.op.kind if isinstance(e.op, Reduce) and e.op.kind in ("max", "min") else "add"
        result = terms[0]
        for i, term in enumerate(terms[1:], 2):
            last = target if i == len(terms) else None
            result = self.emit(e, Elementwise(fn), [result, term], e.target.name, last)
        return result

    def closing(self, e: Equation, closed: tuple[str, ...], args: list[str], target: Tensor | None) -> str:
        wish = e.target.name
        if closed:
            op: Op = Reduce(e.op.kind, closed) if isinstance(e.op, Reduce) else Contract(closed)
            return self.emit(e, op, args, wish, target)
        result = args[0]
        for i, other in enumerate(args[1:], 2):
            last = target if i == len(args) else None
            result = self.emit(e, Elementwise("mul"), [result, other], wish, last)
        return result

    def renamed(
        self, e: Equation, pairs: Sequence[tuple[str, Axis]], full: dict[str, Region], target: Tensor | None
    ) -> str:
        """An alias stays one where its axis is whole; else the region moves down."""
        new = dict(pairs)
        kept = {old: axis for old, axis in pairs if full[axis.name] == Region(0, ((axis, 1),))}
        arg = self.tensors[e.args[0]]
        demand = {a.name: full[new[a.name].name if a.name in new else a.name] for a in arg.axes}
        own = {a.name: Region(0, ((a, 1),)) for a in arg.axes if a.name in kept}
        names = [a.name for region in {**demand, **own}.values() for a in region.axes]
        if len(set(names)) < len(names) or not kept:
            return self.piece(arg.name, demand)
        inner = self.piece(arg.name, {**demand, **own})
        return self.emit(e, Rename(tuple(kept.items())), [inner], e.target.name, target)

    def reshaped(self, e: Equation, after: Sequence[Axis], full: dict[str, Region], target: Tensor | None) -> str:
        arg = self.tensors[e.args[0]]
        demand: dict[str, Region] = {}
        units: list[Axis] = []
        for old, new in _segments(arg.axes, after):
            if not old:
                units += full[new[0].name].axes
            elif not new:
                demand[old[0].name] = Region(0, ())
            elif len(old) == 1:
                demand[old[0].name] = _split_region(new, full)
            elif len(new) == 1:
                demand |= _merged_region(old, full[new[0].name])
            else:
                raise Stuck
        found = self.piece(arg.name, demand)
        if units:
            return self.emit(e, Broadcast(tuple(units)), [found], e.target.name)
        return found

    def picked(
        self, e: Equation, axes: Sequence[str], full: dict[str, Region], region: Region, target: Tensor | None
    ) -> str:
        """The operand of a concatenation that holds the region."""
        low = 0
        for arg, axis in zip(e.args, axes, strict=True):
            size = _static(_axis(self.tensors[arg], axis).size)
            if low <= region.start and region.last() < low + size:
                moved = Region(region.start - low, region.digits)
                others = {a: r for a, r in full.items() if a != e.op.out.name}  # type: ignore[union-attr]
                return self.of(arg, {**others, axis: moved})
            low += size
        raise Stuck


def _split_region(new: Sequence[Axis], full: Mapping[str, Region]) -> Region:
    """The region of an axis that is the product of the axes `new`."""
    start, digits, weight = 0, list[tuple[Axis, int]](), 1
    for i, a in enumerate(reversed(new)):
        inner = full[a.name].inside(0, weight)
        start, digits = start + inner.start, [*inner.digits, *digits]
        if i < len(new) - 1:
            weight *= _static(a.size)
    return Region(start, tuple(digits))


def _merged_region(old: Sequence[Axis], region: Region) -> dict[str, Region]:
    """The regions of the axes whose product is cut to `region`: each digit must lie within one of them."""
    weights = [math.prod(_static(a.size) for a in old[i + 1 :]) for i in range(len(old))]
    starts, rest = list[int](), region.start
    for w in weights:
        at, rest = divmod(rest, w)
        starts.append(at)
    digits: list[list[tuple[Axis, int]]] = [[] for _ in old]
    for axis, stride in region.digits:
        i = next(i for i, w in enumerate(weights) if w <= stride)
        if stride % weights[i]:
            raise Stuck
        digits[i].append((axis, stride // weights[i]))
    found = {a.name: Region(s, tuple(d)) for a, s, d in zip(old, starts, digits, strict=True)}
    for a in old[1:]:
        if found[a.name].last() >= _static(a.size):
            raise Stuck
    return found


def _tiled(program: Program) -> dict[str, tuple[int, ...]]:
    """Axes that slices of one size tile: sums over them go by the same pieces, which are then loaded once."""
    ranges: dict[str, set[tuple[int, int]]] = {}
    sizes = program.axes()
    for e in program.equations:
        if isinstance(e.op, Slice) and e.op.step == 1 and isinstance(e.op.out.size, int):
            ranges.setdefault(e.op.axis, set()).add((e.op.start, e.op.start + e.op.out.size))
    found = {}
    for axis, spans in ranges.items():
        ordered = sorted(spans)
        contiguous = all(a[1] == b[0] for a, b in itertools.pairwise(ordered))
        same = len({high - low for low, high in ordered}) == 1 and 1 < len(ordered) <= MOST_CELLS
        if contiguous and same and ordered[0][0] == 0 and ordered[-1][1] == sizes[axis].size and ordered[0][1] > 1:
            found[axis] = tuple(low for low, _ in ordered[1:])
    return found
