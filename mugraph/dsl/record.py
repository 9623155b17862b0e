"""The recorder: operators as they are traced, and the equations they become once every axis is known.

A recorded step holds an ordinary operator whose axes have provisional names (one per variable of `unify`).  `resolve`
replaces each name by its atoms, so a split found late reaches the steps before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import CodeType, FrameType
from typing import Literal, assert_never

from mugraph.dsl.unify import Axes, Var, VarDims, divides
from mugraph.errors import Location, ShapeError, user_location
from mugraph.ir.axes import Axis, over, product
from mugraph.ir.graph import Equation
from mugraph.ir.infer import Type, infer
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    MaskedExp,
    Pack,
    PureOp,
    Quantize,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    TopK,
    Transpose,
    Unpack,
)  # fmt: skip
from mugraph.ir.types import Dims, DType, Tensor

# Names for axes that nobody named, in the order they are given out.
LETTERS = "kndehpqrtuvwxyzacfgijlmos"

# How strong a wish for an axis name is: a name the user gave (a second axis of that name becomes `b2`), an einsum
# letter, the role in a matmul.
FIRM, LETTER, ROLE = STRENGTHS = (0, 1, 2)


@dataclass(eq=False)
class Value:
    """A recorded value: its axes in the order of its dimensions, its element type, and the name it should get."""

    number: int
    vars: tuple[Var, ...]
    dtype: DType
    hint: str = ""


@dataclass(eq=False)
class Recorded:
    """`target = op(args)`, with provisional axis names in `op`."""

    target: Value
    op: PureOp
    args: tuple[Value, ...]
    where: Location | None


@dataclass(eq=False)
class Recorder:
    """Everything one trace knows.  `code` is the traced function, whose local names become value names; in a block
    graph (`block`) every float is f32.  `natural` lists inputs whose numbers must not be negative."""

    code: CodeType | None = None
    block: bool = False
    axes: Axes = field(default_factory=Axes)
    steps: list[Recorded] = field(default_factory=list)
    frame: FrameType | None = None
    where: Location | None = None
    observer: Callable[[Recorded], None] | None = None
    natural: list[Value] = field(default_factory=list)
    _values: int = 0
    _aliases: dict[tuple[int, tuple[tuple[int, int], ...]], Value] = field(default_factory=dict)

    def value(self, vars: Iterable[Var], dtype: DType, hint: str = "") -> Value:
        self._values += 1
        return Value(self._values, tuple(vars), dtype, hint)

    def location(self) -> Location | None:
        return self.where or user_location()

    def record(self, op: PureOp, args: Sequence[Value], vars: Iterable[Var], dtype: DType) -> Value:
        if self.block and dtype.is_float:
            dtype = DType.f32
        target = self.value(vars, dtype)
        step = Recorded(target, op, tuple(args), self.location())
        self.steps.append(step)
        if self.code is not None and self.frame is None:
            self.frame = self._traced_frame()
        if self.observer is not None:
            self.observer(step)
        return target

    def _traced_frame(self) -> FrameType | None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        return frame

    # -- questions about values --------------------------------------------------------------------------------

    def atoms(self, value: Value) -> tuple[Var, ...]:
        return self.axes.atoms(value.vars)

    def is_given(self, value: Value) -> bool:
        """Whether it is an input: those have the first numbers."""
        return not self.steps or value.number < self.steps[0].target.number

    def lacking(self, value: Value, vars: Iterable[Var]) -> tuple[Var, ...]:
        """The atoms along which the value is only repeated."""
        own = set(self.atoms(value))
        return tuple(v for v in self.axes.atoms(vars) if v not in own)

    # -- steps that views need ---------------------------------------------------------------------------------

    def axis(self, var: Var) -> Axis:
        return Axis(var.name, self.axes.size(var))

    def renamed(self, value: Value, pairs: Mapping[Var, Var]) -> Value:
        """The value under other axes; one use of an alias is shared by the next."""
        own = self.atoms(value)
        moved = [(old, new) for old, new in pairs.items() if old in own]
        if not moved:
            return value
        key = value.number, tuple(sorted((old.number, new.number) for old, new in moved))
        if key not in self._aliases:
            op = Rename(tuple((old.name, self.axis(new)) for old, new in moved))
            self._aliases[key] = self.record(op, (value,), (dict(moved).get(v, v) for v in own), value.dtype)
        return self._aliases[key]

    def spread(self, value: Value, vars: Iterable[Var]) -> Value:
        """The value repeated along those of `vars` that it lacks."""
        missing = self.lacking(value, vars)
        if not missing:
            return value
        op = Broadcast(tuple(self.axis(v) for v in missing))
        return self.record(op, (value,), (*missing, *self.atoms(value)), value.dtype)

    def reshaped(self, value: Value, source: VarDims, target: VarDims) -> Value:
        """The boundary between dimensions that have no common refinement."""
        order = self.axes.atoms(v for d in source for v in d)
        value = self.spread(value, order)
        if self.atoms(value) != order:
            value = self.record(Transpose(), (value,), order, value.dtype)
        op = Reshape(tuple(tuple(self.axis(v) for v in d) for d in target))
        return self.record(op, (value,), (v for d in target for v in d), value.dtype)

    # -- after the trace ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Carries splits through slices and concatenations: `x[:, 64:]` with its result viewed as `(h, d)` cuts the
        sliced axis into heads too, where bounds fall between heads."""
        moved = True
        while moved:
            before = sum(v.parts is not None for v in self.axes.all)
            for step in self.steps:
                match step.op:
                    case Slice(axis, out, start, 1):
                        self._share_tail([(self._var(axis), start), (self._var(out.name), 0)])
                    case Concat(axes, out):
                        self._share_tail([(self._var(a), 0) for a in (*axes, out.name)])
                    case _:
                        pass
            moved = sum(v.parts is not None for v in self.axes.all) > before

    def _share_tail(self, ranges: list[tuple[Var, int]]) -> None:
        tails = [self.axes.atoms([v])[1:] for v, _ in ranges]
        longest = max(tails, key=len)
        tail = self.axes.extent(longest)
        if not longest or not all(divides(tail, self.axes.size(v)) for v, _ in ranges):
            return
        if any(start and not (isinstance(tail, int) and start % tail == 0) for _, start in ranges):
            return
        for var, _ in ranges:
            head = over(self.axes.size(var), tail)
            sizes = [head, *(self.axes.size(v) for v in longest)]
            if len(self.axes.atoms([var])) == 1 and head != 1 and not self.axes.form(var).fixed:
                self.axes.split(self.axes.find(var), sizes)

    def _var(self, name: str) -> Var:
        return self.axes.all[int(name[1:])]


class Naming:
    """Readable, deterministic axis names: hints first (a Dim's name, an einsum letter, the role in a matmul), then
    letters, in order of appearance."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.names: dict[Var, Axis] = {}
        self.taken: set[str] = set()

    def name(self, vars: Iterable[Var]) -> None:
        """Names these variables; those with hints get theirs before the others get letters."""
        atoms = [v for v in dict.fromkeys(self.axes.atoms(vars)) if v not in self.names]
        for strength in STRENGTHS:
            for atom in atoms:
                for wish, hint in atom.hints:
                    if wish == strength and atom not in self.names:
                        if hint not in self.taken:
                            self._give(atom, hint)
                        elif strength == FIRM:
                            self._give(atom, self._next(hint))
        for atom in atoms:
            if atom not in self.names:
                self._give(atom, self._letter())

    def _give(self, atom: Var, name: str) -> None:
        self.taken.add(name)
        self.names[atom] = Axis(name, self.axes.size(atom))

    def _letter(self) -> str:
        return next((c for c in LETTERS if c not in self.taken), None) or self._next("ax")

    def _next(self, base: str) -> str:
        return next(name for n in range(2, len(self.taken) + 3) if (name := f"{base}{n}") not in self.taken)

    def unused(self, base: str) -> str:
        """A name for an axis that only resolution needs."""
        name = base if base not in self.taken else self._next(base)
        self.taken.add(name)
        return name

    def __getitem__(self, var: Var) -> Axis:
        if var not in self.names:
            self.name([var])
        return self.names[var]


class Resolver:
    """Turns recorded steps into equations over named axes."""

    def __init__(self, recorder: Recorder, naming: Naming, names: Mapping[Value, str]) -> None:
        self.recorder = recorder
        self.axes = recorder.axes
        self.naming = naming
        self.names = dict(names)
        self.tensors: dict[str, Tensor] = {}
        self._temporaries = 0
        self._where: Location | None = None
        self._equations: list[Equation] = []

    def dims(self, dims: VarDims) -> Dims:
        return tuple(tuple(self.naming[v] for v in self.axes.atoms(d)) for d in dims)

    def flat(self, vars: Iterable[Var]) -> Dims:
        return tuple((self.naming[v],) for v in self.axes.atoms(vars))

    def declare(self, tensor: Tensor) -> None:
        self.tensors[tensor.name] = tensor

    def equations(self, steps: Iterable[Recorded], layouts: Mapping[Value, VarDims]) -> Iterator[Equation]:
        """The equations of the steps.  `layouts` gives outputs their dimensions; other values have one axis each."""
        for step in steps:
            dims = layouts.get(step.target)
            final = self.flat(step.target.vars) if dims is None else self.dims(dims)
            target = Tensor(self.names[step.target], final, step.target.dtype)
            self._where, self._equations = step.where, []
            self._resolve(step.op, tuple(self.names[a] for a in step.args), target)
            yield from self._equations

    def _emit(self, target: Tensor, op: PureOp, *args: str) -> str:
        (found,) = infer(op, [Type(self.tensors[a].axes, self.tensors[a].dtype) for a in args])
        if set(found.axes) != set(target.axes):
            raise ShapeError(f"traced {target}, but its axes are {sorted(map(str, found.axes))}", where=self._where)
        self.declare(target)
        self._equations.append(Equation((target,), op, args, self._where))
        return target.name

    def _temporary(self, dims: Dims, dtype: DType, op: PureOp, *args: str) -> str:
        return self._emit(Tensor(self.fresh_name(), dims, dtype), op, *args)

    def fresh_name(self) -> str:
        taken = {*self.names.values(), *self.tensors}
        while (name := f"t{self._temporaries}") in taken:
            self._temporaries += 1
        return name

    def _atoms(self, name: str) -> tuple[Axis, ...]:
        return tuple(self.naming[v] for v in self.axes.atoms([self.recorder._var(name)]))

    def _names(self, provisional: Sequence[str]) -> tuple[str, ...]:
        return tuple(a.name for name in provisional for a in self._atoms(name))

    def _axes_of(self, provisional: Sequence[Axis]) -> tuple[Axis, ...]:
        return tuple(a for axis in provisional for a in self._atoms(axis.name))

    def _resolve(self, op: PureOp, args: tuple[str, ...], target: Tensor) -> None:
        match op:
            case Elementwise() | Compare() | Select() | MaskedExp() | Const() | Cast() | Quantize() | Transpose():
                self._emit(target, op, *args)
            case Contract(axes):
                self._emit(target, Contract(self._names(axes)), *args)
            case Reduce(kind, axes):
                self._emit(target, Reduce(kind, self._names(axes)), *args)
            case Rename(pairs):
                self._emit(target, Rename(tuple(self._renamings(pairs))), *args)
            case Broadcast(axes):
                self._emit(target, Broadcast(self._axes_of(axes)), *args)
            case Reshape(dims):
                self._reshape(target, tuple(self._axes_of(d) for d in dims), args[0])
            case SizeOf(axis, dtype):
                self._size(self._atoms(axis.name), dtype, target)
            case Iota(axis):
                self._index(self._atoms(axis.name), target)
            case Slice(axis, out, start, step):
                self._slice(self._atoms(axis), self._atoms(out.name), start, step, args[0], target)
            case Concat(axes, out):
                self._concat([self._atoms(a) for a in axes], self._atoms(out.name), args, target)
            case CumSum(axis):
                self._prefix_sum(self._atoms(axis), args[0], target)
            case Gather(axis):
                merged, whole = self._as_one(args[0], self._atoms(axis))
                self._emit(target, Gather(whole.name), merged, args[1])
            case Scatter(axes, out, kind):
                self._scatter(self._names(axes), self._atoms(out.name), kind, args, target)
            case TopK() | Unpack() | Pack():
                raise ShapeError(f"{type(op).__name__} is not traced", where=self._where)
            case _:
                assert_never(op)

    def _renamings(self, pairs: Iterable[tuple[str, Axis]]) -> Iterator[tuple[str, Axis]]:
        for old, new in pairs:
            for a, b in zip(self._atoms(old), self._atoms(new.name), strict=True):
                yield a.name, b

    def _size(self, atoms: Sequence[Axis], dtype: DType, target: Tensor) -> None:
        """|hd| -> |h| * |d|"""
        *first, last = atoms
        if not first:
            self._emit(target, SizeOf(last, dtype))
            return
        sizes = [self._temporary((), dtype, SizeOf(a, dtype)) for a in atoms]
        total = sizes[0]
        for size in sizes[1:-1]:
            total = self._temporary((), dtype, Elementwise("mul"), total, size)
        self._emit(target, Elementwise("mul"), total, sizes[-1])

    def _index(self, atoms: Sequence[Axis], target: Tensor) -> None:
        """iota(hd) -> iota(h) * |d| + iota(d)"""
        if len(atoms) == 1:
            self._emit(target, Iota(atoms[0]))
            return
        total, done = self._temporary(((atoms[0],),), DType.i64, Iota(atoms[0])), [atoms[0]]
        for atom in atoms[1:]:
            size = self._temporary((), DType.i64, SizeOf(atom, DType.i64))
            scaled = self._temporary(tuple((a,) for a in done), DType.i64, Elementwise("mul"), total, size)
            own = self._temporary(((atom,),), DType.i64, Iota(atom))
            done.append(atom)
            if atom is atoms[-1]:
                self._emit(target, Elementwise("add"), scaled, own)
            else:
                total = self._temporary(tuple((a,) for a in done), DType.i64, Elementwise("add"), scaled, own)

    def _slice(
        self, atoms: tuple[Axis, ...], out: tuple[Axis, ...], start: int, step: int, arg: str, target: Tensor
    ) -> None:
        tail = product(a.size for a in atoms[1:])
        aligned = [a.size for a in atoms[1:]] == [a.size for a in out[1:]] and step == 1 and bool(out)
        if aligned and (tail == 1 or (isinstance(tail, int) and start % tail == 0)):
            # whole pieces of the leading atom; the others only change their names
            leading = Slice(atoms[0].name, out[0], start // tail if isinstance(tail, int) else start, step)
            self._then_rename(leading, (atoms[0],), (out[0],), dict(zip(atoms[1:], out[1:], strict=True)), arg, target)
            return
        (merged, source), cut = self._as_one(arg, atoms), self._whole(out)
        dims = _substituted(self.tensors[merged].dims, {source: cut})
        self._regrouped(Slice(source.name, cut, start, step), dims, (merged,), cut, out, target)

    def _then_rename(
        self,
        op: PureOp,
        gone: tuple[Axis, ...],
        new: tuple[Axis, ...],
        renames: Mapping[Axis, Axis],
        arg: str,
        target: Tensor,
    ) -> None:
        pairs = tuple((a.name, b) for a, b in renames.items() if a != b)
        if not pairs:
            self._emit(target, op, arg)
            return
        dims = _substituted(self.tensors[arg].dims, dict(zip(gone, new, strict=True)))
        middle = self._temporary(dims, target.dtype, op, arg)
        self._emit(target, Rename(pairs), middle)

    def _concat(
        self, atoms: list[tuple[Axis, ...]], out: tuple[Axis, ...], args: tuple[str, ...], target: Tensor
    ) -> None:
        tails = [[x.size for x in a[1:]] for a in (*atoms, out)]
        if all(tail == tails[-1] for tail in tails):
            pieces = []
            for arg, own in zip(args, atoms, strict=True):
                pairs = {a: b for a, b in zip(own[1:], out[1:], strict=True) if a != b}
                dims = _substituted(self.tensors[arg].dims, pairs)
                op = Rename(tuple((a.name, b) for a, b in pairs.items()))
                pieces.append(self._temporary(dims, self.tensors[arg].dtype, op, arg) if pairs else arg)
            self._emit(target, Concat(tuple(a[0].name for a in atoms), out[0]), *pieces)
            return
        whole = self._whole(out)
        merged = [self._merged(arg, own) for arg, own in zip(args, atoms, strict=True)]
        sources = [
            next(a for a in self.tensors[m].axes if a not in self.tensors[arg].axes or a in own)
            for m, arg, own in zip(merged, args, atoms, strict=True)
        ]
        dims = _substituted(self.tensors[merged[0]].dims, {sources[0]: whole})
        self._regrouped(Concat(tuple(s.name for s in sources), whole), dims, tuple(merged), whole, out, target)

    def _prefix_sum(self, atoms: tuple[Axis, ...], arg: str, target: Tensor) -> None:
        merged, whole = self._as_one(arg, atoms)
        self._regrouped(CumSum(whole.name), self.tensors[merged].dims, (merged,), whole, atoms, target)

    def _scatter(
        self,
        closed: tuple[str, ...],
        out: tuple[Axis, ...],
        kind: Literal["sum", "write"],
        args: tuple[str, ...],
        target: Tensor,
    ) -> None:
        whole = self._whole(out)
        kept = tuple((a,) for a in self.tensors[args[0]].axes if a.name not in closed)
        self._regrouped(Scatter(closed, whole, kind), ((whole,), *kept), args, whole, out, target)

    def _as_one(self, arg: str, atoms: tuple[Axis, ...]) -> tuple[str, Axis]:
        """The argument with these axes as one, and that axis."""
        merged = self._merged(arg, atoms)
        return merged, next(a for a in self.tensors[merged].axes if a not in self.tensors[arg].axes or a in atoms)

    def _whole(self, atoms: tuple[Axis, ...]) -> Axis:
        """One axis for a product of atoms."""
        if len(atoms) == 1:
            return atoms[0]
        return Axis(self.naming.unused("".join(a.name for a in atoms)), product(a.size for a in atoms))

    def _merged(self, arg: str, atoms: tuple[Axis, ...]) -> str:
        """The argument with the product of atoms as one axis: a boundary, used only where bounds cut through atoms."""
        if len(atoms) == 1:
            return arg
        held, whole = self.tensors[arg], self._whole(atoms)
        others = tuple((a,) for a in held.axes if a not in atoms)
        ordered = (*others, *((a,) for a in atoms))
        if tuple(a for d in ordered for a in d) != held.axes:
            arg = self._temporary(ordered, held.dtype, Transpose(), arg)
        dims = (*others, (whole,))
        return self._temporary(dims, held.dtype, Reshape(dims), arg)

    def _regrouped(
        self,
        op: PureOp,
        dims: Dims,
        args: tuple[str, ...],
        whole: Axis,
        out: tuple[Axis, ...],
        target: Tensor,
    ) -> None:
        """`op`, whose result has these dimensions and the axis `whole`, with that axis cut into the atoms `out`."""
        if out == (whole,):
            self._emit(target, op, *args)
            return
        middle = self._temporary(dims, target.dtype, op, *args)
        self._reshape(target, _cut_dims(tuple(a for d in dims for a in d), whole, out), middle)

    def _reshape(self, target: Tensor, dims: Dims, arg: str) -> None:
        """A reshape keeps the order of its axes; a target that has another is a transpose of it."""
        if tuple(a for d in dims for a in d) == target.axes:
            self._emit(target, Reshape(dims), arg)
        else:
            self._emit(target, Transpose(), self._temporary(dims, target.dtype, Reshape(dims), arg))


def _substituted(dims: Dims, new: Mapping[Axis, Axis]) -> Dims:
    return tuple(tuple(new.get(a, a) for a in d) for d in dims)


def _cut_dims(order: Sequence[Axis], whole: Axis, out: tuple[Axis, ...]) -> Dims:
    return tuple((b,) for a in order for b in (out if a == whole else (a,)))


def literal(value: int | float | Fraction) -> Fraction:
    """A number as the decimal the user typed.

    >>> literal(1e-6)
    Fraction(1, 1000000)
    """
    return Fraction(repr(value)) if isinstance(value, float) else Fraction(value)
