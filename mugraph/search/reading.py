"""A μGraph read as values: what each launch computes, in the calculus and under the names of a search.

    flat = flattened(graph)        its meaning as plain equations, and its launches
    read = Reading(task, graph)    the class of each value, where the closure has one

A block graph means its equations over whole axes: loads are aliases, an accumulator is its contraction or reduction,
and a partial result is the value whose parts it holds, so closing over the parts is the identity.  A value that is
stabilised, exp(x - max x), is read as exp(x) where the closure knows only that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from mugraph.ir.axes import Axis
from mugraph.ir.graph import BlockGraph, Equation, Load, Program, equations_of
from mugraph.ir.ops import Concat, Contract, Elementwise, Kernel, Library, Reduce, Rename, Transpose
from mugraph.ir.types import Output, Storage, Tensor
from mugraph.search import values as v
from mugraph.search.canonical import is_commutative, ordered, renamed_op
from mugraph.search.extract import is_leaf_edge
from mugraph.search.laws import equation_value, without_max
from mugraph.search.pieces import pieces
from mugraph.search.setup import SAMPLES, Setup, takes_extremes, written_sizes
from mugraph.search.values import Value


@dataclass(frozen=True)
class Launch:
    """A kernel or library call of a graph: the values that it makes and those that it reads, by their names in the
    flattened graph, and its equations there."""

    equation: Equation
    makes: tuple[str, ...]
    reads: tuple[str, ...]
    means: tuple[Equation, ...]


@dataclass(frozen=True)
class Flat:
    """The equations that a graph means, and its launches in order; views between launches are equations only."""

    equations: tuple[Equation, ...]
    launches: tuple[Launch, ...]
    outputs: tuple[str, ...]


def flattened(graph: Program) -> Flat:
    """The graph as plain equations, under names that no program has."""
    writer = _Flat(graph)
    for e in graph.equations:
        writer.kernel_level(e)
    return Flat(tuple(writer.equations), tuple(writer.launches), tuple(writer.names[o.value] for o in graph.outputs))


class _Flat:
    def __init__(self, graph: Program) -> None:
        self.names = {i.name: i.name for i in graph.inputs}
        self.tensors = graph.tensors()
        self.equations: list[Equation] = []
        self.launches: list[Launch] = []
        self.read: dict[str, None] = {}
        self.first = 0
        self.count = itertools.count()

    def fresh(self, name: str) -> str:
        return f"#{next(self.count)}.{name}"

    def emit(self, e: Equation, names: dict[str, str], args: Sequence[str]) -> None:
        targets = tuple(replace(t, name=self.fresh(t.name)) for t in e.targets)
        self.equations.append(Equation(targets, e.op, tuple(args)))
        names.update((t.name, new.name) for t, new in zip(e.targets, targets, strict=True))

    def kernel_level(self, e: Equation) -> None:
        self.first = len(self.equations)
        args = [self.names[a] for a in e.args]
        match e.op:
            case Kernel(blocks):
                self.read, stored = {}, dict[str, str]()
                scope = dict(zip(e.args, args, strict=True))
                for block in blocks:
                    self.block(block, scope, stored)
                for t in e.targets:
                    self.emit(Equation((t,), Transpose(), ()), self.names, [stored[t.name]])
                self.launched(e, tuple(self.read))
            case Library(_, semantics):
                self.inlined(e, semantics, args)
                self.launched(e, tuple(dict.fromkeys(args)))
            case _:
                self.emit(e, self.names, args)

    def launched(self, e: Equation, reads: tuple[str, ...]) -> None:
        means = tuple(self.equations[self.first :])
        self.launches.append(Launch(e, tuple(self.names[t.name] for t in e.targets), reads, means))

    def inlined(self, e: Equation, inner: Program, args: Sequence[str]) -> None:
        """A library call's meaning; the axes of its parameters are those of the arguments."""
        axes: dict[str, Axis] = {}
        for i, a in zip(inner.inputs, e.args, strict=True):
            axes.update(zip((x.name for x in i.tensor.axes), self.tensors[a].axes, strict=True))
        axes = {n: axes.get(n, a) for n, a in (inner.axes() | _own_axes(inner.equations)).items()}
        names = {i.name: a for i, a in zip(inner.inputs, args, strict=True)}
        for x in inner.equations:
            targets = tuple(_with_axes(t, axes) for t in x.targets)
            self.emit(Equation(targets, renamed_op(x.op, axes), x.args), names, [names[a] for a in x.args])
        for t, o in zip(e.targets, inner.outputs, strict=True):
            self.emit(Equation((t,), Transpose(), ()), self.names, [names[o.value]])

    def block(self, block: BlockGraph, sources: Mapping[str, str], stored: dict[str, str], part: str = "") -> None:
        """The equations of a block graph; `stored` takes what it writes.  `part`: the axis that counts the parts of
        what a combine loads."""
        alive: dict[str, str] = {}
        written = {s.value for s in block.stores}
        kept: dict[str, str] = {}
        for p in block.passes:
            self.loads(p.loads, sources, alive, part)
            self.steps(equations_of(p.body), alive, part)
            if p.loops:
                results = {t.name for e in equations_of(p.body) for t in e.targets} | {x.value.name for x in p.loads}
                kept |= {n: alive[n] for n in results & written if n not in kept}
        self.loads(block.loads, sources, alive, part)
        self.steps(equations_of(block.epilogue), alive, part)
        made = {s.target: kept.get(s.value) or alive[s.value] for s in block.stores}
        later = {t.name for e in equations_of(block.epilogue) for t in e.targets}
        made |= {s.target: alive[s.value] for s in block.stores if s.value in later}
        stored |= made
        if block.combine and block.split:
            self.block(block.combine, {**sources, **made}, stored, block.split.part.name)

    def loads(self, loads: Iterable[Load], sources: Mapping[str, str], alive: dict[str, str], part: str) -> None:
        for ld in loads:
            source = self.tensors.get(ld.source)
            new = ld.value.axes
            if source is None:  # partial results keep their axes
                alive[ld.value.name] = sources[ld.source]
                continue
            if source.axes == new:
                alive[ld.value.name] = sources[ld.source]
            else:
                pairs = tuple((a.name, b) for a, b in zip(source.axes, new, strict=True) if a != b)
                self.emit(Equation((ld.value,), Rename(pairs), ()), alive, [sources[ld.source]])
            self.read[alive[ld.value.name]] = None

    def steps(self, equations: Iterable[Equation], alive: dict[str, str], part: str) -> None:
        for e in equations:
            args = [alive[a] for a in e.args]
            targets = tuple(
                Tensor(t.name, tuple(tuple(a for a in d if a.name != part) for d in t.dims), t.dtype) for t in e.targets
            )
            op = e.op
            if isinstance(op, Reduce | Contract) and part in op.axes:
                op = replace(op, axes=tuple(a for a in op.axes if a != part))
                if not op.axes and isinstance(op, Reduce):
                    op = Transpose()
            self.emit(Equation(targets, op, e.args), alive, args)


def operators_of(program: Program, flat: Flat) -> list[list[Equation]] | None:
    """For each launch the operators of the program that it does, where all of them do such operators as they are
    written, and nothing else.  Regrouped dimensions and literals are nobody's work."""
    known: dict[object, Equation] = {}
    same = {i.name: i.name for i in program.inputs}

    def key(e: Equation) -> object:
        args = [same[a] for a in e.args]
        return e.op, tuple(sorted(args) if is_commutative(e.op) else args)

    for e in program.equations:
        if isinstance(e.op, Transpose):
            same[e.target.name] = same[e.args[0]]
            continue
        first = known.setdefault(key(e), e)
        same.update((t.name, x.name) for t, x in zip(e.targets, first.targets, strict=True))
    done: dict[str, Equation] = {}
    for e in flat.equations:
        if isinstance(e.op, Transpose):
            same[e.target.name] = same[e.args[0]]
            continue
        found = known.get(key(e))
        if found is None:
            return None
        done[e.targets[0].name] = found
        same.update((t.name, x.name) for t, x in zip(e.targets, found.targets, strict=True))
    if [same[o] for o in flat.outputs] != [same[o.value] for o in program.outputs]:
        return None
    return [[done[e.targets[0].name] for e in x.means if e.targets[0].name in done] for x in flat.launches]


def _with_axes(t: Tensor, axes: Mapping[str, Axis]) -> Tensor:
    return Tensor(t.name, tuple(tuple(axes[a.name] for a in d) for d in t.dims), t.dtype)


def _own_axes(equations: Iterable[Equation]) -> dict[str, Axis]:
    """The axes that operators bring themselves."""
    return {a.name: a for e in equations for f in fields(e.op) for a in _axes_in(getattr(e.op, f.name))}


def _axes_in(value: object) -> Iterator[Axis]:
    if isinstance(value, Axis):
        yield value
    elif isinstance(value, tuple):
        for x in value:
            yield from _axes_in(x)


class Reading:
    """The values of a flattened graph as classes of a task's closure."""

    def __init__(self, task: Setup, flat: Flat) -> None:
        self.task, self.flat = task, flat
        self.values: dict[str, Value] = {}
        self.helpers: dict[str, list[Value]] = {}
        self.parts: dict[str, tuple[str, ...]] = {}  # joined value -> the cells that it is made of
        self.odd: dict[str, Equation] = {}  # results of operators outside the calculus that the program does not have
        self.axes: dict[str, str] = {axis.name: a for a, axis in task.here.axes.items()}
        self.base = dict(task.known.base)
        self.sizes: dict[str, Axis] = dict(task.here.program.axes())
        joint = self._joint()
        self.equations = {t.name: e for e in joint.equations for t in e.targets}
        self.samples = SAMPLES if takes_extremes(joint) else 1
        self._known: tuple[int, v.Fingerprinter, dict[v.Print, int]] | None = None
        self._classes: dict[Value, int | None] = {}
        self._read(joint)

    def _joint(self) -> Program:
        """The program and the graph side by side, views taken away from both together, so that they are cut alike."""
        source = ordered(self.task.program)
        tensors = {t.name: t for e in self.flat.equations for t in e.targets}
        wanted = [n for x in self.flat.launches for n in (*x.makes, *x.reads) if n in tensors]
        wanted += [n for n in self.flat.outputs if n in tensors]
        outputs = tuple(Output(n, Storage(tensors[n].dtype)) for n in dict.fromkeys(wanted))
        return pieces(
            replace(source, equations=source.equations + self.flat.equations, outputs=source.outputs + outputs)
        )

    # -- values under canonical names

    def _read(self, joint: Program) -> None:
        names = {n: new for new, n in self.task.here.names.items()}
        for i in joint.inputs:
            axes = tuple(self.axis(a) for a in i.tensor.axes)
            self.values[i.name] = v.load(names.get(i.name, f"#{i.name}"), axes)
        for e in joint.equations:
            args = [self.values[a] for a in e.args]
            known = self._boundary(e, args)
            value = None
            if known is None:
                value = equation_value(self._canonical(e), args)
                if value is not None:
                    self.helpers[e.target.name] = _helpers(e, args)
            if value is not None:
                self.values[e.target.name] = value
                continue
            if isinstance(e.op, Concat):
                self.parts[e.target.name] = e.args
            for n, t in enumerate(e.targets):
                if known is None:
                    self.odd[t.name] = e
                    axes = tuple(self.axis(a) for a in t.axes)
                    self.values[t.name] = v.load(f"#{t.name}", axes)
                else:
                    b = known.targets[n]
                    self.axes.update((x.name, y.name) for x, y in zip(_long(t), _long(b), strict=True))
                    self.values[t.name] = v.load(b.name, (a.name for a in b.axes))

    def axis(self, axis: Axis) -> str:
        """The canonical name of an axis; one that the program does not have keeps its own, marked."""
        found = self.axes.get(axis.name)
        if found is None:
            found = self.axes[axis.name] = f"~{axis.name}"
            self.base.setdefault(found, found)
            self.sizes[found] = Axis(found, axis.size)
        return found

    def _canonical(self, e: Equation) -> Equation:
        if isinstance(e.op, Rename):
            for old, new in e.op.axes:
                self._alias(old, new, {self.axes.get(a.name, "") for a in e.target.axes})
        involved = [a for t in e.targets for a in t.axes] + [
            a for f in fields(e.op) for a in _axes_in(getattr(e.op, f.name))
        ]
        axes = {a.name: Axis(self.axis(a), a.size) for a in involved}
        axes |= {n: Axis(c, 1) for n, c in self.axes.items() if n not in axes}
        return Equation(tuple(_with_axes(t, axes) for t in e.targets), renamed_op(e.op, axes), e.args)

    def _alias(self, old: str, new: Axis, taken: set[str]) -> None:
        """An alias that only the graph has is one of the program's, if one is free."""
        if new.name in self.axes:
            return
        base = self.base[self.axes[old]]
        known = [a for a, b in self.base.items() if b == base and a not in taken and a != self.axes[old]]
        used = set(self.axes.values())
        self.axes[new.name] = next((a for a in known if a not in used), f"~{new.name}")
        self.base.setdefault(self.axes[new.name], base)
        self.sizes.setdefault(self.axes[new.name], Axis(self.axes[new.name], new.size))

    def _boundary(self, e: Equation, args: Sequence[Value]) -> Equation | None:
        """The program's own operator outside the calculus that this one is."""
        for b in self.task.known.boundaries:
            if type(b.op) is not type(e.op) or len(b.args) != len(args) or len(b.targets) != len(e.targets):
                continue
            shapes = [[[a.size for a in _long(t)] for t in x.targets] for x in (e, b)]
            mine, theirs = [self.class_of(x) for x in args], [self.task.seeds[y] for y in b.args]
            if isinstance(e.op, Contract):  # its operands change places
                mine, theirs = sorted(mine, key=str), sorted(theirs, key=str)
            if shapes[0] != shapes[1] or mine != theirs:
                continue
            if all(self._alike(getattr(e.op, f.name), getattr(b.op, f.name), f.name) for f in fields(b.op)):
                return b
        return None

    def _alike(self, mine: Any, theirs: Any, field: str) -> bool:
        if isinstance(mine, Axis):
            return bool(mine.size == theirs.size) and self.axes.get(mine.name, theirs.name) == theirs.name
        if isinstance(mine, tuple):
            return len(mine) == len(theirs) and all(self._alike(a, b, field) for a, b in zip(mine, theirs, strict=True))
        if field in ("axis", "axes") and isinstance(mine, str):
            return bool(self.axes.get(mine, mine) == theirs)
        return bool(mine == theirs)

    # -- classes

    def prints(self) -> tuple[v.Fingerprinter, dict[v.Print, int]]:
        """What tells values apart, and the classes by their fingerprints; anew where the graph has brought an axis."""
        if self._known is None or self._known[0] != len(self.base):
            prints = v.Fingerprinter(self.base, written_sizes(self.task.here.program), samples=self.samples)
            closure = self.task.closure
            by_print = {prints.fingerprint(closure.classes[c].value): c for c in reversed(closure.order)}
            self._known = len(self.base), prints, by_print
            self._classes = {}
        return self._known[1:]

    def class_of(self, value: Value) -> int | None:
        """The class of a value, as it is, under other names of aliases, or with its maxima taken away."""
        self.prints()
        if value not in self._classes:
            found = self._as_it_is(value)
            if found is None:
                plain = self._unshifted(value)
                found = None if plain is None else self._as_it_is(plain)
            self._classes[value] = found
        return self._classes[value]

    def _as_it_is(self, value: Value) -> int | None:
        prints, by_print = self.prints()
        tokens = v.free_tokens(value)
        if len({a for a, _ in tokens}) == len(tokens):
            for names in self._namings(sorted(tokens)):
                found = by_print.get(prints.fingerprint(v.rename(value, names)))
                if found is not None:
                    return found
        return None

    def _namings(self, tokens: Sequence[v.Token]) -> Iterator[dict[v.Token, v.Token]]:
        """The value's own axes first, then others with the same base."""
        kin = [[a for a, b in self.base.items() if b == self.base.get(t[0], t[0])] or [t[0]] for t in tokens]
        ordered_kin = [sorted(k, key=lambda a, t=t: (a != t[0], a)) for k, t in zip(kin, tokens, strict=True)]  # type: ignore[misc]
        for chosen in itertools.islice(itertools.product(*ordered_kin), 64):
            if len(set(chosen)) == len(chosen):
                yield {t: (a, 0) for t, a in zip(tokens, chosen, strict=True)}

    def _unshifted(self, value: Value) -> Value | None:
        """Without the maxima that only stabilise: those that the closure does not know."""
        return without_max(value, lambda f: self._as_it_is((v.Term(v.NOTHING, (f,)),)) is None)

    def cells(self, name: str) -> tuple[str, ...]:
        """The values that a name stands for: its cells, where it is joined and has no class as a whole."""
        if name not in self.parts or self.class_of(self.values[name]) is not None:
            return (name,)
        return tuple(cell for part in self.parts[name] for cell in self.cells(part))

    def classes_of(self, names: Iterable[str]) -> list[tuple[str, int | None]]:
        """The values of these names, cell by cell, with their classes; the exponents beside scaled values left out."""
        found = []
        for name in names:
            for cell in self.cells(name):
                c = self.class_of(self.values[cell])
                if c is None and self.is_shift(self.values[cell]):
                    continue
                found.append((cell, c))
        return found

    def is_shift(self, value: Value) -> bool:
        """Whether nothing is left of a value without its maxima: it is the exponent beside a scaled value."""
        stripped = self._unshifted(value)
        return stripped is not None and all(v.is_zero(t) for t in stripped)

    @cached_property
    def own(self) -> list[str]:
        """The values that the graph computes, in order."""
        found = {n for x in self.flat.launches for n in x.makes}
        for name in reversed(self.values):
            if name in found and name in self.equations:
                found.update(self.equations[name].args)
        return [n for n in self.values if n in found]

    def computed(self) -> set[int]:
        """The classes of all values that the graph computes, and of parts of them that one operator hides."""
        found = {self.class_of(x) for n in self.own for x in (self.values[n], *self.helpers.get(n, ()))}
        closure = self.task.closure
        numbers = {c for c in closure.order for e in closure.classes[c].edges if e.kind == "number" or is_leaf_edge(e)}
        return {c for c in found if c is not None} | numbers

    def unknown(self) -> list[Value]:
        """Values that have no class, in the order in which they are computed."""
        values = [self.values[n] for n in self.own]
        return [x for x in values if v.free_tokens(x) and self.class_of(x) is None and not self.is_shift(x)]


def _long(t: Tensor) -> list[Axis]:
    """The axes along which there is more than one element."""
    return [a for a in t.axes if a.size != 1]


def _helpers(e: Equation, args: Sequence[Value]) -> list[Value]:
    """What an operator computes on the way: reciprocals, negations, sums."""
    match e.op:
        case Elementwise("div"):
            return [v.invert(args[1])]
        case Elementwise("sub"):
            return [v.negate(args[1])]
        case Elementwise("rsqrt"):
            return [v.call("sqrt", args[0])]
        case Elementwise("pow"):
            square = v.multiply(args[0], args[0])
            return [square, v.multiply(square, args[0]), v.multiply(square, square)]
        case Reduce("mean", axes):
            return [v.total(args[0], axes)]
        case _:
            return []
