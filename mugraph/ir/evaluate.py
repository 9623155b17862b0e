"""One evaluator, many meanings.

    evaluate(graph, inputs, algebra)

An algebra says what each operator does to its values.  `TypeAlgebra` computes types, `FloatAlgebra` float64 arrays,
`FieldAlgebra` pairs in Z_p x Z_q.  Array algebras also execute a μGraph *as a μGraph*: blocks of the grid, parts of
the split, loops with tails, accumulators, partial stores and the combine.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce
from typing import Any, Generic, TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray

from mugraph.errors import GraphError, ShapeError, UnsupportedOpError
from mugraph.ir import fields
from mugraph.ir.axes import size_value
from mugraph.ir.fields import P, Q, U, Words
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    Load,
    Pass,
    Program,
    Step,
    Store,
    Thread,
    equations_of,
)  # fmt: skip
from mugraph.ir.infer import Type, infer, op_text
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
    Kernel,
    Library,
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
from mugraph.ir.types import Tensor

V = TypeVar("V")


class Algebra(ABC, Generic[V]):
    """What operators mean on values of type V."""

    @abstractmethod
    def apply(self, op: PureOp, args: Sequence[V]) -> tuple[V, ...]:
        """The results of one operator."""

    @abstractmethod
    def launch(self, kernel: Kernel, args: Mapping[str, V], targets: Sequence[Tensor]) -> tuple[V, ...]:
        """The results of a kernel, in the order of `targets`."""

    @abstractmethod
    def call(self, library: Library, args: Sequence[V]) -> tuple[V, ...]:
        """The results of a library call: those of its semantics."""

    def declared(self, value: V, tensor: Tensor) -> V:
        """The value in the order of axes that its tensor declares, where the algebra keeps an order."""
        return value


def evaluate(graph: Program, inputs: Mapping[str, V], algebra: Algebra[V]) -> dict[str, V]:
    """Every kernel-level value of the graph, by name.  Outputs are `graph.outputs[i].value`."""
    values: dict[str, V] = {i.name: inputs[i.name] for i in graph.inputs}
    for equation in graph.equations:
        args = [values[a] for a in equation.args]
        match equation.op:
            case Kernel():
                results = algebra.launch(equation.op, dict(zip(equation.args, args, strict=True)), equation.targets)
            case Library():
                results = algebra.call(equation.op, args)
            case _:
                results = algebra.apply(equation.op, args)
        values.update((t.name, algebra.declared(v, t)) for t, v in zip(equation.targets, results, strict=True))
    return values


def outputs(graph: Program, inputs: Mapping[str, V], algebra: Algebra[V]) -> tuple[V, ...]:
    """The values of the graph's outputs, in order."""
    values = evaluate(graph, inputs, algebra)
    return tuple(values[o.value] for o in graph.outputs)


class TypeAlgebra(Algebra[Type]):
    """Axes and element types."""

    def apply(self, op: PureOp, args: Sequence[Type]) -> tuple[Type, ...]:
        return infer(op, args)

    def launch(self, kernel: Kernel, args: Mapping[str, Type], targets: Sequence[Tensor]) -> tuple[Type, ...]:
        return infer(kernel, list(args.values()))

    def call(self, library: Library, args: Sequence[Type]) -> tuple[Type, ...]:
        return infer(library, args)


@dataclass(frozen=True)
class Named:
    """An array whose leading dimensions are named axes.  An algebra may keep several components of equal leading
    shape (`parts`), each with private trailing dimensions; a component that is lost is None."""

    axes: tuple[str, ...]
    parts: tuple[NDArray[Any] | None, ...]

    def size(self, axis: str) -> int:
        kept = next(p for p in self.parts if p is not None)
        return int(kept.shape[self.axes.index(axis)])

    def map(self, f: Any, axes: tuple[str, ...] | None = None) -> Named:
        return Named(self.axes if axes is None else axes, tuple(None if p is None else f(p) for p in self.parts))


def aligned(v: Named, axes: Sequence[str]) -> Named:
    """The value with leading dimensions in the order of `axes`; absent ones get size 1."""
    if v.axes == tuple(axes):
        return v
    order = [v.axes.index(a) for a in axes if a in v.axes]
    n = len(v.axes)

    def arrange(part: NDArray[Any]) -> NDArray[Any]:
        moved = part.transpose(order + list(range(n, part.ndim)))
        return moved[tuple(slice(None) if a in v.axes else None for a in axes)]

    return v.map(arrange, tuple(axes))


def narrow(v: Named, axis: str, start: int, length: int, step: int = 1) -> Named:
    """`length` entries of the axis from `start`; fewer at the end of the axis."""
    if start == 0 and step == 1 and length == v.size(axis):
        return v
    index = (slice(None),) * v.axes.index(axis) + (slice(start, start + step * length, step),)
    return v.map(lambda part: part[index])


def renamed(v: Named, names: Mapping[str, str]) -> Named:
    return replace(v, axes=tuple(names.get(a, a) for a in v.axes))


def union_axes(args: Sequence[Named]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(a for v in args for a in v.axes))


class ArrayAlgebra(Algebra[Named]):
    """Shared by all algebras over arrays: views and the execution of block graphs.

    `sizes` gives each axis its size.  `tiles` overrides the tile sizes of block graphs (so that a check at tiny sizes
    still runs full tiles and a tail), `parts` the number of parts of a split.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        tiles: Mapping[str, int] | None = None,
        parts: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes = dict(sizes)
        self.tiles = dict(tiles or {})
        self.parts = dict(parts or {})
        self.here: Mapping[str, tuple[int, int]] = {}  # start and length of the tile that is being computed

    # -- what an algebra must say

    @abstractmethod
    def literal(self, value: Fraction) -> Named: ...

    @abstractmethod
    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Named:
        """An elementwise function; operands have the same axes in the same order, or size 1 where they lack one."""

    @abstractmethod
    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        """Reduction over leading axes: sum, max or min."""

    @abstractmethod
    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        """Operators without algebraic structure: Compare, Select, MaskedExp, Iota, casts to integers, ..."""

    @abstractmethod
    def identity(self, monoid: str) -> Named:
        """The value an accumulator starts from, as a scalar."""

    def rescale(self, old: Named, new: Named) -> Named:
        """`exp(old - new)` for two running maxima."""
        return self.elementwise("exp", self.elementwise("sub", old, new))

    def contract(self, args: Sequence[Named], axes: tuple[str, ...]) -> Named:
        return self.total("sum", reduce(lambda a, b: self.elementwise("mul", a, b), args), axes)

    # -- operators

    def declared(self, value: Named, tensor: Tensor) -> Named:
        # reshapes and aliases go by position, so a value carries its axes as declared
        axes = tuple(a.name for a in tensor.axes)
        return aligned(value, axes) if set(axes) == set(value.axes) and axes != value.axes else value

    def elementwise(self, fn: str, *args: Named, attrs: Mapping[str, str | Fraction] | None = None) -> Named:
        axes = union_axes(args)
        return self.function(fn, attrs or {}, [aligned(v, axes) for v in args])

    def expanded(self, v: Named, axes: Sequence[str]) -> Named:
        """The value repeated along the axes that it lacks."""
        missing = [a for a in axes if a not in v.axes]
        if not missing:
            return v
        counts = [self.sizes[a] for a in missing]
        k = len(missing)

        def repeat(part: NDArray[Any]) -> NDArray[Any]:
            return np.broadcast_to(part[(None,) * k], (*counts, *part.shape))

        return v.map(repeat, (*missing, *v.axes))

    def apply(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        match op:
            case Elementwise(fn, attrs):
                return (self.elementwise(fn, *args, attrs=dict(attrs)),)
            case Const(value):
                return (self.literal(value),)
            case SizeOf(axis):
                return (self.literal(Fraction(self.sizes[axis.name])),)
            case Contract(axes):
                return (self.contract(args, axes),)
            case Reduce("mean", axes):
                count = math.prod(args[0].size(a) for a in axes)
                return (self.elementwise("mul", self.total("sum", args[0], axes), self.literal(Fraction(1, count))),)
            case Reduce(kind, axes):
                return (self.total(kind, args[0], axes),)
            case Transpose():
                return (args[0],)
            case Rename(pairs):
                return (renamed(args[0], {old: new.name for old, new in pairs}),)
            case Broadcast(axes):
                return (self.expanded(args[0], [a.name for a in axes]),)
            case Reshape(dims):
                return (self.reshaped(args[0], tuple(a.name for d in dims for a in d)),)
            case Slice(axis, out, start, step):
                return (renamed(narrow(args[0], axis, start, self.sizes[out.name], step), {axis: out.name}),)
            case Concat(axes, out):
                pieces = [renamed(v, {a: out.name}) for v, a in zip(args, axes, strict=True)]
                return (self.joined(pieces, out.name),)
            case Gather(axis):
                return (self.gathered(args[0], args[1], axis),)
            case (
                Compare() | Select() | MaskedExp() | Iota() | CumSum() | TopK()
                | Cast() | Quantize() | Unpack() | Pack() | Scatter()
            ):  # fmt: skip
                return self.opaque(op, args)
            case _:
                assert_never(op)

    def reshaped(self, v: Named, axes: tuple[str, ...]) -> Named:
        """Row-major reinterpretation.  The operand's axes are taken in the order its value carries them."""
        if set(axes) == set(v.axes):
            return v
        shape = tuple(v.size(a) if a in v.axes else self.sizes[a] for a in axes)  # tiles are smaller than axes
        n = len(v.axes)
        return v.map(lambda part: part.reshape(shape + part.shape[n:]), axes)

    def joined(self, pieces: Sequence[Named], axis: str) -> Named:
        axes = pieces[0].axes
        lined = [aligned(v, axes) for v in pieces]
        columns = list(zip(*(v.parts for v in lined), strict=True))
        at = axes.index(axis)
        return Named(axes, tuple(None if any(p is None for p in c) else np.concatenate(c, axis=at) for c in columns))

    def gathered(self, v: Named, index: Named, axis: str) -> Named:
        """Index values are taken modulo the axis, so any field element is an index."""
        places = index.parts[0]
        assert places is not None
        where = np.asarray(places).astype(np.int64) % v.size(axis)
        shared = [a for a in index.axes if a in v.axes]
        own = [a for a in index.axes if a not in v.axes]
        rest = [a for a in v.axes if a != axis and a not in shared]
        at = aligned(Named(index.axes, (where,)), [*shared, *own]).parts[0]
        lined = aligned(v, [*shared, axis, *rest])
        grids = np.ix_(*[range(v.size(a)) for a in shared]) if shared else ()
        index_tuple = (*tuple(g.reshape(g.shape + (1,) * len(own)) for g in grids), at)
        return lined.map(lambda part: part[index_tuple], (*shared, *own, *rest))

    def call(self, library: Library, args: Sequence[Named]) -> tuple[Named, ...]:
        inner, names = library.semantics, dict[str, str]()
        inputs = {}
        for param, arg in zip(inner.inputs, args, strict=True):
            formal = tuple(a.name for a in param.tensor.axes)
            names.update(zip(formal, arg.axes, strict=True))
            inputs[param.name] = replace(arg, axes=formal)
        sizes = {formal: self.sizes[actual] for formal, actual in names.items()}
        saved, self.sizes = self.sizes, self.sizes | sizes
        try:
            return tuple(renamed(v, names) for v in outputs(inner, inputs, self))
        finally:
            self.sizes = saved

    # -- block graphs

    def launch(self, kernel: Kernel, args: Mapping[str, Named], targets: Sequence[Tensor]) -> tuple[Named, ...]:
        found: dict[str, Named] = {}
        for block in kernel.blocks:
            written = self.run(block, args)
            if block.combine:
                written = self.run(block.combine, {**args, **written})
            found.update(written)
        return tuple(found[t.name] for t in targets)

    def tile(self, axis: str, declared: int) -> int:
        return min(self.tiles.get(axis, declared), self.sizes[axis])

    def run(self, block: BlockGraph, args: Mapping[str, Named]) -> dict[str, Named]:
        """What the block graph stores, over all blocks of the grid.  Raises GraphError where an element is written
        twice or never."""
        results: dict[str, Named] = {}
        written: dict[str, NDArray[np.int64]] = {}
        parts = 1
        if block.split:
            parts = self.parts.get(block.split.axis, block.split.parts)
            self.sizes[block.split.part.name] = parts
        grid = [(a, self.tile(a, t)) for a, t in block.grid]
        for starts in itertools.product(*(range(0, self.sizes[a], t) for a, t in grid)):
            at = {a: (s, t) for (a, t), s in zip(grid, starts, strict=True)}
            for part in range(parts):
                for store, v, place in self.run_block(block, args, at, part, parts):
                    if store.kind == "partial":
                        assert block.split
                        name = block.split.part.name
                        v, place = v.map(lambda p: p[None], (name, *v.axes)), {**place, name: (part, 1)}
                    self.place(store.target, v, place, results, written, store.kind == "atomic")
        for target, count in written.items():
            if (count == 0).any():
                raise GraphError(f"{int((count == 0).sum())} elements of {target} are never written", op="store")
        return results

    def place(
        self,
        target: str,
        v: Named,
        at: Mapping[str, tuple[int, int]],
        results: dict[str, Named],
        written: dict[str, NDArray[np.int64]],
        atomic: bool,
    ) -> None:
        shape = tuple(self.sizes[a] for a in v.axes)
        if target not in results:
            n = len(v.axes)
            results[target] = v.map(lambda p: np.zeros(shape + p.shape[n:], dtype=p.dtype))
            written[target] = np.zeros(shape, dtype=np.int64)
        whole = results[target]
        v = aligned(v, whole.axes)
        index = tuple(slice(at[a][0], at[a][0] + at[a][1]) if a in at else slice(None) for a in whole.axes)
        if atomic:
            old = whole.map(lambda p: p[index])
            v = aligned(self.elementwise("add", old, v), whole.axes)
        elif written[target][index].any():
            raise GraphError(f"two blocks write the same elements of {target}", op="store")
        written[target][index] += 1
        self.write(whole, index, v, target, results)

    def write(self, whole: Named, index: Any, v: Named, target: str, results: dict[str, Named]) -> None:
        """Puts a tile into the whole; a component that any tile lost is lost."""
        kept: list[NDArray[Any] | None] = []
        for old, new in zip(whole.parts, v.parts, strict=True):
            if old is None or new is None:
                kept.append(None)
            else:
                old[index] = new
                kept.append(old)
        results[target] = Named(whole.axes, tuple(kept))

    def run_block(
        self, block: BlockGraph, args: Mapping[str, Named], at: Mapping[str, tuple[int, int]], part: int, parts: int
    ) -> Iterator[tuple[Store, Named, dict[str, tuple[int, int]]]]:
        """What one block stores, and where."""
        alive: dict[str, Named] = {}
        for p in block.passes:
            self.here = at
            if not p.loops:
                alive.update({ld.value.name: self.load(ld, args, at) for ld in p.loads})
                self.steps(p.body, alive, alive, True)
                continue
            for accumulator in p.accumulators:
                alive[accumulator.target.name] = self.start(accumulator, at)
            dying = {t.name for e in equations_of(p.body) for t in e.targets} - {a.target.name for a in p.accumulators}
            first = True
            for place in self.iterations(p, block, part, parts):
                self.here = {**at, **place}
                inside = dict(alive)
                inside.update({ld.value.name: self.load(ld, args, self.here) for ld in p.loads})
                self.steps(p.body, inside, alive, first)
                yield from ((s, inside[s.value], {**at, **place}) for s in block.stores if s.value in dying)
                first = False
        self.here = at
        alive.update({ld.value.name: self.load(ld, args, at) for ld in block.loads})
        self.steps(block.epilogue, alive, alive, True)
        yield from ((s, alive[s.value], dict(at)) for s in block.stores if s.value in alive)

    def iterations(self, p: Pass, block: BlockGraph, part: int, parts: int) -> Iterator[dict[str, tuple[int, int]]]:
        """Start and length of the tile of each looped axis.  A split axis is cut into parts of whole tiles."""
        ranges = []
        for axis, declared in p.loops:
            size, tile = self.sizes[axis], self.tile(axis, declared)
            low, high = 0, size
            if block.split and block.split.axis == axis and p is block.passes[-1]:
                chunk = math.ceil(math.ceil(size / tile) / parts) * tile
                low, high = part * chunk, min((part + 1) * chunk, size)
            ranges.append([(axis, (start, min(tile, high - start))) for start in range(low, high, tile)])
        for places in itertools.product(*ranges):
            yield dict(places)

    def load(self, ld: Load, args: Mapping[str, Named], at: Mapping[str, tuple[int, int]]) -> Named:
        source = args[ld.source]
        v = source
        if (own := tuple(a.name for a in ld.value.axes)) and set(own) != set(source.axes):
            v = replace(source, axes=own)  # an alias: axes correspond by position
        v = self.declared(v, ld.value)
        for axis, (start, length) in at.items():
            if axis in v.axes:
                v = narrow(v, axis, start, length)
        return v

    def start(self, accumulator: Accumulator, at: Mapping[str, tuple[int, int]]) -> Named:
        """The identity of the monoid, in the shape of the accumulator's tile."""
        scalar = self.identity("sum" if accumulator.monoid == "rescaled" else accumulator.monoid)
        axes = tuple(a.name for a in accumulator.target.axes)
        shape = tuple(min(at[a][1], self.sizes[a] - at[a][0]) if a in at else self.sizes[a] for a in axes)
        return scalar.map(lambda p: np.broadcast_to(p, shape + p.shape).copy(), axes)

    def steps(self, steps: Sequence[Step], values: dict[str, Named], alive: dict[str, Named], first: bool) -> None:
        """Runs the steps over `values`.  Accumulators update `alive`, and their running value in `values`."""
        before: dict[str, Named] = {}
        for step in steps:
            match step:
                case Equation(targets, op, args):
                    self.bind(targets, op, args, values)
                case Thread(graph):
                    for e in graph.equations:
                        self.bind(e.targets, e.op, e.args, values)
                case Accumulator(equation, monoid, scale):
                    name = equation.target.name
                    before[name] = old = alive[name]
                    self.bind(equation.targets, equation.op, equation.args, values)
                    new = values[name]
                    if monoid == "rescaled":
                        assert scale is not None
                        if not first:
                            factor = self.rescale(before[scale], values[scale])
                            new = self.elementwise("add", self.elementwise("mul", old, factor), new)
                    elif not first:
                        new = self.elementwise("add" if monoid == "sum" else monoid, old, new)
                    alive[name] = values[name] = aligned(new, old.axes)
                case _:
                    assert_never(step)

    def bind(self, targets: Sequence[Tensor], op: Any, args: Sequence[str], values: dict[str, Named]) -> None:
        """Adds the results of one tile-level operator to `values`."""
        if isinstance(op, Kernel | Library):
            raise GraphError(f"{op_text(op)} inside a block graph", op=op_text(op))
        results = self.apply(op, [values[a] for a in args])
        if isinstance(op, Iota | Slice | Broadcast):
            results = tuple(self.in_tile(v, union_axes([values[a] for a in args])) for v in results)
        values.update((t.name, self.declared(v, t)) for t, v in zip(targets, results, strict=True))

    def in_tile(self, v: Named, known: tuple[str, ...]) -> Named:
        """The part in the present tile of axes that the operator itself brings; its operands are tiles already."""
        for axis, (start, length) in self.here.items():
            if axis in v.axes and axis not in known:
                v = narrow(v, axis, start, length)
        return v


class FloatAlgebra(ArrayAlgebra):
    """float64 arrays (and bool, int64 where the operator says so): the numeric oracle."""

    def literal(self, value: Fraction) -> Named:
        return Named((), (np.asarray(float(value)),))

    def value(self, axes: tuple[str, ...], array: NDArray[Any]) -> Named:
        return Named(axes, (array,))

    def identity(self, monoid: str) -> Named:
        return Named((), (np.asarray({"sum": 0.0, "max": -math.inf, "min": math.inf}[monoid]),))

    def rescale(self, old: Named, new: Named) -> Named:
        axes = union_axes([old, new])
        a, b = (_only(aligned(v, axes)) for v in (old, new))
        with np.errstate(invalid="ignore"):
            return Named(axes, (np.where(np.isneginf(a), 0.0, np.exp(a - b)),))  # exp(-inf - -inf) := 0

    def contract(self, args: Sequence[Named], axes: tuple[str, ...]) -> Named:
        letters = {a: i for i, a in enumerate(union_axes(args))}
        kept = tuple(a for a in letters if a not in axes)
        operands: list[Any] = []
        for v in args:
            operands += [_only(v).astype(np.float64), [letters[a] for a in v.axes]]
        return Named(kept, (np.asarray(np.einsum(*operands, [letters[a] for a in kept], optimize=True)),))

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        where = tuple(v.axes.index(a) for a in axes)
        f: Any = {"sum": np.sum, "max": np.max, "min": np.min}[kind]
        return v.map(lambda p: np.asarray(f(p, axis=where)), tuple(a for a in v.axes if a not in axes))

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Named:
        with np.errstate(all="ignore"):
            return Named(args[0].axes, (np.asarray(_FLOAT[fn](*(_only(v) for v in args), **attrs)),))

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        axes = union_axes(args)
        xs = [_only(aligned(v, axes)) for v in args]
        match op:
            case Compare(relation):
                f: Any = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
                     "gt": np.greater, "ge": np.greater_equal}[relation]  # fmt: skip
                return (Named(axes, (f(xs[0], xs[1]),)),)
            case Select():
                return (Named(axes, (np.where(*xs),)),)
            case MaskedExp():
                with np.errstate(all="ignore"):
                    return (Named(axes, (np.where(xs[1], np.exp(xs[0]), 0.0),)),)
            case Iota(axis):
                return (Named((axis.name,), (np.arange(self.sizes[axis.name]),)),)
            case CumSum(axis):
                return (args[0].map(lambda p: np.cumsum(p, axis=args[0].axes.index(axis))),)
            case TopK(axis, out):
                at = args[0].axes.index(axis)
                order = np.argsort(-_only(args[0]), axis=at, kind="stable").take(range(self.sizes[out.name]), axis=at)
                values = np.take_along_axis(_only(args[0]), order, axis=at)
                names = tuple(out.name if a == axis else a for a in args[0].axes)
                return Named(names, (values,)), Named(names, (order,))
            case Cast(dtype):
                if dtype.is_float:
                    return (args[0].map(lambda p: p.astype(np.float64)),)
                return (args[0].map(lambda p: p.astype(bool if dtype.value == "bool" else np.int64)),)
            case Quantize(dtype):
                low, high = _integer_range(dtype.value, dtype.bits)
                return (Named(axes, (np.clip(np.round(xs[0] / xs[1]), low, high),)),)
            case Unpack(axis, out, dtype):
                return (_unpacked(args[0], axis, out.name, dtype.bits, dtype.value.startswith("i")),)
            case Pack(axis, out, _):
                return (_packed(args[0], axis, out.name, args[0].size(axis) // self.sizes[out.name]),)
            case Scatter(closed, out, kind):
                return (_scattered(args[0], args[1], closed, out.name, self.sizes[out.name], kind),)
            case _:
                raise UnsupportedOpError(f"{op_text(op)} has no float64 meaning", op=op_text(op))


def _only(v: Named) -> NDArray[Any]:
    (part,) = v.parts
    assert part is not None
    return part


def _pow(x: NDArray[Any], exponent: str | Fraction) -> Any:
    return np.power(x, float(exponent))


def _gelu(x: NDArray[Any], approximate: str | Fraction = "none") -> Any:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2)))


_erf = np.vectorize(math.erf, otypes=[np.float64])


_FLOAT: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "reciprocal": lambda x: 1.0 / x,
    "square": np.square,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "abs": np.abs,
    "pow": _pow,
    "exp": np.exp,
    "log": np.log,
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "round": np.round,
    "sin": np.sin,
    "cos": np.cos,
    "erf": _erf,
    "expm1": np.expm1,
    "log1p": np.log1p,
    "floor": np.floor,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
}


def _integer_range(name: str, bits: int) -> tuple[int, int]:
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _unpacked(v: Named, axis: str, out: str, bits: int, signed: bool) -> Named:
    at = v.axes.index(axis)
    codes = _only(v).astype(np.int64)
    width = 8  # storage elements of sub-byte types are bytes
    fields_ = [(codes >> shift) & (2**bits - 1) for shift in range(0, width, bits)]
    stacked = np.stack(fields_, axis=at + 1)
    shape = (*codes.shape[:at], codes.shape[at] * len(fields_), *codes.shape[at + 1 :])
    values = stacked.reshape(shape)
    if signed:
        values = np.where(values >= 2 ** (bits - 1), values - 2**bits, values)
    return Named(tuple(out if a == axis else a for a in v.axes), (values,))


def _packed(v: Named, axis: str, out: str, count: int) -> Named:
    at, bits = v.axes.index(axis), 8 // count
    codes = _only(v).astype(np.int64) & (2**bits - 1)
    shape = (*codes.shape[:at], codes.shape[at] // count, count, *codes.shape[at + 1 :])
    shifts = np.arange(0, 8, bits).reshape((count,) + (1,) * (codes.ndim - at - 1))
    return Named(tuple(out if a == axis else a for a in v.axes), ((codes.reshape(shape) << shifts).sum(axis=at + 1),))


def _scattered(v: Named, index: Named, closed: tuple[str, ...], out: str, size: int, kind: str) -> Named:
    rest = [a for a in v.axes if a not in closed and a not in index.axes]
    lead = [a for a in index.axes if a not in closed]
    lined, at = aligned(v, [*lead, *closed, *rest]), aligned(index, [*lead, *closed]).parts[0]
    assert at is not None
    shape = tuple(v.size(a) for a in (*lead, *closed))
    where = np.broadcast_to(at, shape).reshape(*shape[: len(lead)], -1).astype(np.int64) % size
    lined = lined.map(lambda p: p.reshape(*where.shape, *p.shape[len(shape) :]), (*lead, closed[0], *rest))
    grids = np.ix_(*[range(v.size(a)) for a in lead]) if lead else ()
    place = (*tuple(g.reshape(*g.shape, 1) for g in grids), where)

    def scatter(part: NDArray[Any]) -> NDArray[Any]:
        result = np.zeros((*part.shape[: len(lead)], size, *part.shape[len(lead) + 1 :]), dtype=part.dtype)
        if kind == "sum":
            np.add.at(result, place, part)
        else:
            result[place] = part
        return result

    return lined.map(scatter, (*lead, out, *rest))


class FieldAlgebra(ArrayAlgebra):
    """Pairs in Z_p x Z_q.  exp takes the Z_q part to Z_p and loses it; functions without laws are keyed hashes of the
    Z_p part.  `zero_division` tells that some denominator was zero: the caller draws new inputs."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        tiles: Mapping[str, int] | None = None,
        parts: Mapping[str, int] | None = None,
        key: object = 0,
    ) -> None:
        super().__init__(sizes, tiles, parts)
        self.key = key
        self.omega = np.asarray(fields.order_q_element(key), dtype=U)
        self.zero_division = False

    def random(self, axes: tuple[str, ...], key: object) -> Named:
        """A fresh random value; the two parts are independent."""
        shape = tuple(self.sizes[a] for a in axes)
        return Named(axes, tuple(fields.random_words((self.key, key, m), shape, m) for m in (P, Q)))

    def literal(self, value: Fraction) -> Named:
        words = [fields.rational(value.numerator, value.denominator, m) for m in (P, Q)]
        return Named((), tuple(np.asarray(w, dtype=U) for w in words))

    def identity(self, monoid: str) -> Named:
        return self.literal(Fraction(0))  # scaled numbers are exact for every scale, so a maximum may start anywhere

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        if kind in ("max", "min"):
            return reduce(lambda acc, axis: self._extreme_along(kind, acc, axis), axes, v)
        where = tuple(v.axes.index(a) for a in axes)
        kept = tuple(a for a in v.axes if a not in axes)
        parts = (None if p is None else p.sum(axis=where) % U(m) for p, m in zip(v.parts, (P, Q), strict=True))
        return Named(kept, tuple(parts))

    def _extreme_along(self, kind: str, v: Named, axis: str) -> Named:
        pieces = [narrow(v, axis, i, 1) for i in range(v.size(axis))]
        best = reduce(lambda a, b: self._extreme(kind, a, b), pieces)
        at = v.axes.index(axis)
        return best.map(lambda p: np.take(p, 0, axis=at), tuple(a for a in v.axes if a != axis))

    def _extreme(self, kind: str, a: Named, b: Named) -> Named:
        # the maximum under a random order: commutative, associative, idempotent, and nothing else
        pa, pb = a.parts[0], b.parts[0]
        assert pa is not None
        assert pb is not None
        left = fields.keyed_hash(pa, (self.key, kind), 2**62) >= fields.keyed_hash(pb, (self.key, kind), 2**62)
        parts = (
            None if x is None or y is None else np.where(left, x, y) for x, y in zip(a.parts, b.parts, strict=True)
        )
        return Named(a.axes, tuple(parts))

    def hashed(self, key: object, *args: Named) -> Named:
        """An opaque function of the operands' Z_p parts."""
        mixed: Words = np.asarray(0, dtype=U)
        for i, v in enumerate(args):
            p = v.parts[0]
            assert p is not None
            mixed = fields.keyed_hash(np.asarray(mixed + p * U(2), dtype=U), (self.key, key, i), 2**62)
        return Named(args[0].axes, tuple(fields.keyed_hash(mixed, (self.key, key, m), m) for m in (P, Q)))

    def _each(self, f: Any, *args: Named) -> Named:
        columns = zip((P, Q), *(v.parts for v in args), strict=True)
        return Named(args[0].axes, tuple(None if any(x is None for x in xs) else f(*xs, m) for m, *xs in columns))

    def _inverse(self, v: Named) -> Named:
        p = v.parts[0]
        assert p is not None
        if (p == 0).any():
            self.zero_division = True
        q = v.parts[1]
        if q is not None and (q == 0).any():
            self.zero_division = True
        return self._each(fields.inverse, v)

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Named:
        x = args[0]
        match fn:
            case "add":
                return self._each(fields.add, *args)
            case "sub":
                return self._each(fields.subtract, *args)
            case "mul" | "and":
                return self._each(fields.multiply, *args)
            case "div":
                return self._each(fields.multiply, x, self._inverse(args[1]))
            case "neg":
                return self._each(lambda a, m: (U(m) - a) % U(m), x)
            case "reciprocal":
                return self._inverse(x)
            case "square":
                return self._each(fields.multiply, x, x)
            case "rsqrt":
                return self._inverse(self.hashed(("sqrt",), x))
            case "pow":
                exponent = Fraction(attrs["exponent"])
                if exponent.denominator != 1:
                    return self.hashed(("pow", exponent), x)
                base = x if exponent >= 0 else self._inverse(x)
                return self._each(lambda a, m: fields.power(a, abs(int(exponent)), m), base)
            case "max" | "min":
                return self._extreme(fn, *np_broadcast(x, args[1]))
            case "relu":
                return self._extreme("max", *np_broadcast(x, self.literal(Fraction(0))))
            case "exp":
                exponent_part = x.parts[1]
                if exponent_part is None:
                    return self.hashed("exp", x)  # an exponential of an exponential: opaque
                return Named(x.axes, (fields.power(self.omega, exponent_part, P), None))
            case "or":
                return self._each(lambda a, b, m: (a + b + (U(m) - a * b % U(m))) % U(m), *args)
            case "not":
                return self._each(lambda a, m: (U(1) + U(m) - a) % U(m), x)
            case _:  # an arbitrary function
                return self.hashed((fn, *sorted(attrs.items())), x)

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        axes = union_axes(args)
        xs = [aligned(v, axes) for v in args]
        match op:
            case Compare(relation):
                return (self.hashed(("compare", relation), *np_broadcast(*xs)),)
            case Select():
                mask, a, b = xs
                return (self.elementwise("add", b, self.elementwise("mul", mask, self.elementwise("sub", a, b))),)
            case MaskedExp():
                return (self.elementwise("mul", xs[1], self.elementwise("exp", xs[0])),)
            case Iota(axis):
                count = np.arange(self.sizes[axis.name], dtype=U)
                return (Named((axis.name,), (count, count)),)
            case CumSum(axis):
                at = args[0].axes.index(axis)
                return (self._each(lambda a, m: np.cumsum(a, axis=at) % U(m), args[0]),)
            case Cast(dtype):
                return (args[0] if dtype.is_float else self.hashed(("cast", dtype.value), args[0]),)
            case Quantize(dtype):
                return (self.hashed(("quantize", dtype.value), self.elementwise("div", xs[0], xs[1])),)
            case Scatter(closed, out, "sum"):
                result = _scattered(args[0], args[1], closed, out.name, self.sizes[out.name], "sum")
                return (self._each(lambda a, m: a % U(m), result),)
            case _:
                raise UnsupportedOpError(f"{op_text(op)} has no meaning in the fields yet", op=op_text(op))


def np_broadcast(*args: Named) -> list[Named]:
    """Operands repeated to one shape, so that they can be chosen between."""
    columns = list(zip(*(v.parts for v in args), strict=True))
    axes = max((v.axes for v in args), key=len)
    spread: list[list[NDArray[Any] | None]] = [[] for _ in args]
    for column in columns:
        present = [p for p in column if p is not None]
        shape = np.broadcast_shapes(*(p.shape for p in present))
        for out, p in zip(spread, column, strict=True):
            out.append(None if p is None else np.broadcast_to(p, shape))
    return [Named(axes, tuple(parts)) for parts in spread]


def axis_sizes(graph: Program, bindings: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis of the graph, block level included, with symbolic sizes bound by Dim name."""
    found = {a.name: size_value(a.size, bindings) for a in graph.axes().values()}
    for equation in graph.kernels():
        assert isinstance(equation.op, Kernel)
        for block in equation.op.blocks:
            for b in (block, block.combine):
                if b is not None:
                    for t in b.tensors().values():
                        found.update((a.name, size_value(a.size, bindings)) for a in t.axes)
            if block.split:
                found[block.split.part.name] = block.split.parts
    return found


def shaped(v: Named, target: Tensor) -> NDArray[Any]:
    """The first component with the dimensions of `target`: products of axes merged, size-1 dimensions inserted."""
    part = aligned(v, [a.name for a in target.axes]).parts[0]
    if part is None:
        raise ShapeError(f"{target.name} has no value")
    sizes = dict(zip((a.name for a in target.axes), part.shape, strict=False))
    return part.reshape([math.prod(sizes[a.name] for a in d) for d in target.dims])


def named(array: NDArray[Any], target: Tensor, sizes: Mapping[str, int]) -> Named:
    """An array with the dimensions of `target` as a value: the inverse of `shaped`."""
    shape = tuple(sizes[a.name] for a in target.axes)
    if math.prod(shape) != array.size:
        raise ShapeError(f"{target} takes {shape}, not {array.shape}")
    return Named(tuple(a.name for a in target.axes), (array.reshape(shape),))


def reference(graph: Program, arrays: Mapping[str, NDArray[Any]], bindings: Mapping[str, int]) -> list[NDArray[Any]]:
    """The graph's outputs in float64, from arrays by input name."""
    algebra = FloatAlgebra(axis_sizes(graph, bindings))
    inputs = {i.name: named(np.asarray(arrays[i.name]), i.tensor, algebra.sizes) for i in graph.inputs}
    tensors = graph.tensors()
    values = evaluate(graph, inputs, algebra)
    return [
        shaped(algebra.expanded(values[o.value], [a.name for a in tensors[o.value].axes]), tensors[o.value])
        for o in graph.outputs
    ]
