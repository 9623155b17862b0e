"""The `proved` tier: program and μGraph are equal for all sizes, by equality of index normal forms.

    proof = prove(program, graph)
    proof.proved, proof.laws, proof.reason          # the reason, where it cannot decide

Two values with the same normal form (`verify.normal`) are equal at every size; others may still be equal, so the answer
is then `unknown`, never no.

A block graph is read as what it computes: tiles of an axis partition it, so an accumulator over a looped axis is the
sum (maximum, minimum) over the whole axis; parts of a split partition it too.  What a loop computes from a running
maximum m is a value for an unknown m; a rescaled accumulator is right where its tile is exp(-m) times something
without m.

The module shares no code with the search, and none with the `tested` tier: it does not compute in fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mugraph.ir.axes import Axis, Size, product
from mugraph.ir.check import check
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, Program, Step, Store, Thread, equations_of
from mugraph.ir.infer import op_text
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
    Op,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    Transpose,
)
from mugraph.ir.types import Tensor
from mugraph.verify.functions import Functions
from mugraph.verify.normal import (
    INDICES,
    PIECES,
    Index,
    Node,
    Span,
    Undecided,
    Work,
)

TILES = "the tiles of a looped axis partition it: an accumulator is the sum, maximum or minimum over the whole axis"
RESCALED = "a rescaled accumulator of exp(-m)·t, for any running m, is exp(-m')·Σ t with the last m'"
MOST_BORDERS = 40  # of an axis and those in it
SIZES = "static sizes are the numbers that the program declares"


@dataclass(frozen=True)
class Proof:
    """The laws that it rests on, or why nothing is known."""

    laws: tuple[str, ...]
    reason: str = ""

    @property
    def proved(self) -> bool:
        return not self.reason


def prove(program: Program, graph: Program, work: Work | None = None) -> Proof:
    """Whether the normal forms agree, with sizes as symbols first, then with static sizes as the numbers that they are.
    Several proofs may share their `work`.  Raises GraphError or ShapeError for a malformed graph."""
    check(program)
    check(graph)
    work = work or Work()
    borders = _borders(program, graph)
    inputs = {i.name: tuple(f"${a.name}" for a in i.tensor.axes) for i in program.inputs}
    reason = "the normal forms differ: a law is missing, or the sizes matter"
    for numbers in (False, True):
        try:
            form = _Reader(numbers, work, borders, inputs)
            wanted, given = form.outputs(program), form.outputs(graph)
            equal = all(form.agree(a, b) for a, b in zip(wanted, given, strict=True))
        except Undecided as error:
            reason = str(error)
            continue
        except RecursionError:
            reason = "values nest too deeply"
            continue
        if equal:
            return Proof(tuple(sorted(form.laws | ({SIZES} if numbers else set()))))
    return Proof((), reason)


@dataclass(frozen=True)
class _Value:
    axes: tuple[Axis, ...]
    form: Node


class _Reader(Functions):
    """Reads programs and μGraphs as normal forms."""

    # -- graphs --------------------------------------------------------------------------------------------------

    def outputs(self, graph: Program) -> list[Node]:
        loads = {i.name: self.load(i.name, i.tensor.axes) for i in graph.inputs}
        tensors = graph.tensors()
        values = self.run(graph, loads)
        found = []
        for o in graph.outputs:
            if {a.name for a in values[o.value].axes} - {a.name for a in tensors[o.value].axes}:
                raise Undecided(f"{o.value} has axes that are not declared")
            found.append(values[o.value].form)
        return found

    def agree(self, a: Node, b: Node) -> bool:
        """Whether two values are the same, in each piece of the axes that are joined."""
        if a is b:
            return True
        free = [v for v in sorted(a.variables | b.variables) if v.startswith("$")]
        found = self.cut(a, free) or self.cut(b, free)
        if found is None:
            return False
        self.laws.add(PIECES)
        v, sizes = found
        news = [self.fresh() for _ in sizes]
        return all(self.agree(*(self.in_piece(x, v, sizes, n, new) for x in (a, b))) for n, new in enumerate(news))

    def load(self, name: str, axes: Sequence[Axis]) -> _Value:
        return _Value(tuple(axes), self.atom("load", name, *(f"${a.name}" for a in axes)))

    def run(self, graph: Program, inputs: Mapping[str, _Value]) -> dict[str, _Value]:
        values = dict(inputs)
        for e in graph.equations:
            args = [values[a] for a in e.args]
            match e.op:
                case Kernel(blocks):
                    found: dict[str, _Value] = {}
                    for block in blocks:
                        found |= self.block(block, dict(zip(e.args, args, strict=True)))
                    results = [found[t.name] for t in e.targets]
                case Library(_, semantics):
                    results = self.library(semantics, args)
                case _:
                    results = [self.apply(e.op, args, e.targets)]
            self.bind(values, e.targets, results)
        return values

    def bind(self, values: dict[str, _Value], targets: Sequence[Tensor], results: Sequence[_Value]) -> None:
        """Values carry their axes in the order that their tensors declare: reshapes and aliases go by it."""
        for t, v in zip(targets, results, strict=True):
            alike = {a.name for a in t.axes} == {a.name for a in v.axes}
            values[t.name] = _Value(t.axes, v.form) if alike else v

    def library(self, inner: Program, args: Sequence[_Value]) -> list[_Value]:
        inputs = {i.name: self.aliased(v, i.tensor.axes) for i, v in zip(inner.inputs, args, strict=True)}
        names = {
            formal.name: actual
            for i, v in zip(inner.inputs, args, strict=True)
            for formal, actual in zip(i.tensor.axes, v.axes, strict=True)
        }
        values = self.run(inner, inputs)
        found = []
        for o in inner.outputs:
            v = values[o.value]
            found.append(self.aliased(v, tuple(names.get(a.name, a) for a in v.axes)))
        return found

    def aliased(self, v: _Value, axes: tuple[Axis, ...]) -> _Value:
        moved = {f"${a.name}": f"${b.name}" for a, b in zip(v.axes, axes, strict=True) if a.name != b.name}
        return _Value(axes, self.with_(v.form, moved))

    # -- block graphs --------------------------------------------------------------------------------------------

    def block(self, block: BlockGraph, args: Mapping[str, _Value]) -> dict[str, _Value]:
        alive: dict[str, _Value] = {}
        part = f"${block.split.part.name}" if block.split else None
        for p in block.passes:
            values = dict(alive)
            self.loads(p.loads, args, values)
            is_split = block.split is not None and p is block.passes[-1]
            self.steps(p.body, values, (block.split.axis, part) if is_split and block.split else None)
            alive.update(values)  # `check` has seen to it that nothing reads what died with an iteration
        self.loads(block.loads, args, alive)
        self.steps(block.epilogue, alive, None)
        stored = {s.target: self.stored(s, alive, block) for s in block.stores}
        return self.block(block.combine, {**args, **stored}) if block.combine else stored

    def stored(self, s: Store, alive: Mapping[str, _Value], block: BlockGraph) -> _Value:
        v = alive[s.value]
        if block.split is None:
            return v
        part = block.split.part
        if s.kind == "partial":
            return _Value((part, *v.axes), v.form)
        return _Value(v.axes, self.closed(v.form, [part]))

    def loads(self, loads: Sequence[Any], args: Mapping[str, _Value], values: dict[str, _Value]) -> None:
        for ld in loads:
            v, own = args[ld.source], ld.value.axes
            alike = {a.name for a in own} == {a.name for a in v.axes}
            values[ld.value.name] = _Value(own, v.form) if alike else self.aliased(v, own)

    def steps(self, steps: Sequence[Step], values: dict[str, _Value], split: tuple[str, str | None] | None) -> None:
        running: dict[str, tuple[str, _Value]] = {}  # maxima that are still running: the symbol, and the last value
        for step in steps:
            match step:
                case Equation(targets, op, args):
                    self.bind(values, targets, [self.apply(op, [values[a] for a in args], targets)])
                case Thread(graph):
                    for e in graph.equations:
                        self.bind(values, e.targets, [self.apply(e.op, [values[a] for a in e.args], e.targets)])
                case Accumulator(e, monoid, scale):
                    self.laws.add(TILES)
                    if monoid not in _monoids(e.op):
                        raise Undecided("tiles of a loop are not put together as they are made")
                    args_of = [values[a] for a in e.args]
                    if split is not None and split[0] in step.axes:
                        args_of = self.in_part(args_of, split, monoid)
                    v = self.apply(e.op, args_of, e.targets)
                    if monoid == "rescaled":
                        assert scale is not None
                        v = self.rescaled(v, *running[scale])
                    if any(symbol in v.form.variables for symbol, _ in running.values()):
                        raise Undecided("a loop adds up what depends on a running maximum")
                    self.bind(values, e.targets, [v])
                    if monoid in ("max", "min"):
                        last = values[e.target.name]
                        symbol = self.fresh()
                        running[e.target.name] = symbol, last
                        values[e.target.name] = self.load(symbol, last.axes)
        for name, (_, last) in running.items():
            values[name] = last

    def in_part(self, args: list[_Value], split: tuple[str, str | None], monoid: str) -> list[_Value]:
        """The operands of a sum, counted in the present part alone; of a maximum, a value that names the part."""
        axis, part = split
        first = next(i for i, v in enumerate(args) if axis in [a.name for a in v.axes])
        v = args[first]
        if monoid in ("max", "min"):
            form = self.call("of the part", (f"${axis}", part), [v.form])
        else:
            form = self.times(v.form, self.atom("in", f"${axis}", part, axis))
        return [*args[:first], _Value(v.axes, form), *args[first + 1 :]]

    def rescaled(self, v: _Value, symbol: str, last: _Value) -> _Value:
        """exp(-m)·t for the running m becomes exp(-m')·t for the last one."""
        m = self.load(symbol, last.axes).form
        rest = self.times(v.form, self.exponential(m))
        if symbol in rest.variables:
            raise Undecided("a rescaled sum is not scaled by its running maximum")
        self.laws.add(RESCALED)
        return _Value(v.axes, self.times(rest, self.exponential(self.scaled(last.form, -1))))

    # -- operators -----------------------------------------------------------------------------------------------

    def closed(self, form: Node, axes: Iterable[Axis]) -> Node:
        return self.total(form, {f"${a.name}": a.size for a in axes})

    def apply(self, op: Op, args: Sequence[_Value], targets: Sequence[Tensor]) -> _Value:
        v = self.applied(op, args, targets)
        if self.makes_nonneg(op, [a.form for a in args]):
            self.known.add(v.form)  # which its terms may not show: (x - y)^2
        return v

    def makes_nonneg(self, op: Op, args: Sequence[Node]) -> bool:
        """Whether the result is not negative, by what the operator is and what its operands are."""
        match op:
            case Elementwise("square"):
                return True
            case Contract() | Elementwise("mul") if len(set(args)) == 1 and len(args) % 2 == 0:
                return True  # an even power
            case Elementwise("pow", attrs):
                return Fraction(dict(attrs)["exponent"]) % 2 == 0
            case Elementwise("max"):
                return any(map(self.nonneg, args))
            case Elementwise("add" | "mul" | "div" | "reciprocal" | "min") | Contract() | Reduce():
                return all(map(self.nonneg, args))
            case Select():
                return all(map(self.nonneg, args[1:]))
        return False

    def applied(self, op: Op, args: Sequence[_Value], targets: Sequence[Tensor]) -> _Value:
        axes = tuple({a.name: a for v in args for a in v.axes}.values())
        forms = [v.form for v in args]
        match op:
            case Elementwise(fn, attrs):
                return _Value(axes, self.function(fn, attrs, forms))
            case Const(value):
                return _Value((), self.number(value))
            case SizeOf(axis):
                return _Value((), self.size(axis.size))
            case Iota(axis):
                return _Value((axis,), self.atom("index", f"${axis.name}"))
            case Contract(over):
                return self.reduced(axes, self.times(*forms), over)
            case Reduce("sum", over):
                return self.reduced(axes, forms[0], over)
            case Reduce("mean", over):
                v = self.reduced(axes, forms[0], over)
                count = product(a.size for a in axes if a.name in over)
                return _Value(v.axes, self.times(v.form, self.inverse(self.size_of_product(count, axes, over))))
            case Reduce(kind, over):
                gone = {f"${a.name}": a.size for a in axes if a.name in over}
                return _Value(tuple(a for a in axes if a.name not in over), self.extreme_over(kind, forms[0], gone))
            case Compare(relation):
                return _Value(axes, self.call("compare", (("relation", relation),), forms))
            case Select():
                mask, a, b = forms
                return _Value(axes, self.plus(b, self.times(mask, self.minus(a, b))))
            case MaskedExp():
                return _Value(axes, self.times(forms[1], self.exponential(forms[0])))
            case Cast(dtype):
                return args[0] if dtype.is_float else _Value(axes, self.call("cast", (("to", dtype.value),), forms))
            case Transpose():
                return args[0]
            case Broadcast(new):
                return _Value((*axes, *new), forms[0])
            case Rename(pairs):
                new_axes = dict(pairs)
                return self.aliased(args[0], tuple(new_axes.get(a.name, a) for a in args[0].axes))
            case Slice(axis, out, start, step):
                self.laws.add(INDICES)
                moved = self.cut_out(forms[0], f"${axis}", Span(f"${out.name}", start, step, out.size))
                return _Value(tuple(out if a.name == axis else a for a in axes), moved)
            case Reshape(dims):
                return self.reshaped(args[0], tuple(a for d in dims for a in d))
            case Gather(axis):
                index = args[1]
                moved = self.with_(forms[0], {f"${axis}": self.node("value", (index.form,))})
                kept = [b for a in args[0].axes for b in (index.axes if a.name == axis else (a,))]
                return _Value(tuple({a.name: a for a in kept}.values()), moved)
            case Scatter(closed, out, "sum"):
                # y[o] = Σ_r [index[r] names o]·x[r]
                hit = self.call("names", (("size", str(out.size)),), [forms[1], self.atom("index", f"${out.name}")])
                v = self.reduced(axes, self.times(forms[0], hit), closed)
                return _Value((out, *v.axes), v.form)
            case Concat(parts, out):
                return self.concatenated(args, parts, out)
            case CumSum(axis):
                size = next(a.size for a in axes if a.name == axis)
                inner = self.bound(forms[0], {f"${axis}": size})
                return _Value(axes, self.call("cumsum", (f"${axis}",), [inner]))
        raise Undecided(f"no normal form of {op_text(op)} is known")

    def size_of_product(self, count: Size, axes: Sequence[Axis], over: Sequence[str]) -> Node:
        if self.numbers:
            return self.size(count)
        return self.times(*(self.size(a.size) for a in axes if a.name in over))

    def reduced(self, axes: tuple[Axis, ...], form: Node, over: Sequence[str]) -> _Value:
        gone = [a for a in axes if a.name in over]
        return _Value(tuple(a for a in axes if a.name not in over), self.closed(form, gone))

    def concatenated(self, args: Sequence[_Value], parts: Sequence[str], out: Axis) -> _Value:
        """Σ over the pieces of what is in each, where the index is in it."""
        self.laws.add(PIECES)
        sizes = tuple(next(a.size for a in v.axes if a.name == axis) for v, axis in zip(args, parts, strict=True))
        pieces = []
        for n, (v, axis) in enumerate(zip(args, parts, strict=True)):
            inside = self.with_(v.form, {f"${axis}": self.node("rest", (f"${out.name}", sizes, n))})
            pieces.append(self.times(inside, self.atom("piece", f"${out.name}", sizes, n)))
        axes = tuple(out if a.name == parts[0] else a for a in args[0].axes)
        return _Value(axes, self.plus(*pieces))

    def function(self, fn: str, attrs: Any, args: Sequence[Node]) -> Node:
        x = args[0]
        match fn:
            case "add":
                return self.plus(*args)
            case "sub":
                return self.minus(x, args[1])
            case "mul" | "and":
                return self.times(*args)
            case "or":
                return self.minus(self.plus(*args), self.times(*args))
            case "not":
                return self.minus(self.one, x)
            case "div":
                return self.times(x, self.inverse(args[1]))
            case "neg":
                return self.scaled(x, -1)
            case "reciprocal":
                return self.inverse(x)
            case "square":
                return self.times(x, x)
            case "rsqrt":
                return self.inverse(self.root(x))
            case "sqrt":
                return self.root(x)
            case "abs":
                return self.absolute(x)
            case "exp":
                return self.exponential(x)
            case "log":
                return self.logarithm(x)
            case "silu":
                return self.times(x, self.call("sigmoid", (), [x]))
            case "max" | "min":
                return self.extreme(fn, args)
            case "relu":
                return self.extreme("max", [x, self.zero])
            case "pow" if Fraction(dict(attrs)["exponent"]).denominator == 1:
                return self.power(x, int(Fraction(dict(attrs)["exponent"])))
            case "pow" if abs(Fraction(dict(attrs)["exponent"])) == Fraction(1, 2):
                return self.root(x) if Fraction(dict(attrs)["exponent"]) > 0 else self.inverse(self.root(x))
        return self.call(fn, tuple((k, str(v)) for k, v in attrs), args)

    def reshaped(self, v: _Value, after: tuple[Axis, ...]) -> _Value:
        """Old indices as digits of new ones, group by group of adjacent axes with as many entries."""
        if {a.name for a in v.axes} == {a.name for a in after}:
            return v
        self.laws.add(INDICES)
        moved: dict[str, Index] = {}
        for left, right in _regrouped(v.axes, after):
            whole = self.join([(f"${a.name}", a.size) for a in right])
            sizes = tuple(a.size for a in left)
            moved |= {f"${a.name}": self.digit(whole, sizes, n) for n, a in enumerate(left)}
        return _Value(after, self.with_(v.form, moved))


def _borders(*graphs: Program) -> dict[str, tuple[int, ...]]:
    """The pieces of each axis of a static size that slices cut it into, in either graph.  What is cut out of an axis or
    joined into one has the borders of that axis, and the other way round; so have its digits, with their strides.
    A name that stands for axes of several sizes, as it may in programs within each other, has none: borders go by
    name."""
    sizes: dict[str, set[Size]] = {}
    inside: list[tuple[Axis, int, Axis]] = []  # an axis, the place in it where another one starts, that one
    digits: list[tuple[Axis, Axis, Axis]] = []  # an axis, and the two that it is split into
    for g in graphs:
        for a in (a for t in g.tensors().values() for a in t.axes):
            sizes.setdefault(a.name, set()).add(a.size)
        for e, tensors in _pure(g, g.tensors()):
            for a in (a for v in (*e.args, *(t.name for t in e.targets)) for a in tensors[v].axes):
                sizes.setdefault(a.name, set()).add(a.size)
            axes = [{a.name: a for a in tensors[v].axes} for v in e.args]
            match e.op:
                case Slice(axis, out, start, 1):
                    inside.append((axes[0][axis], start, out))
                case Concat(parts, out):
                    start = 0
                    for own, axis in zip(axes, parts, strict=True):
                        if not isinstance(size := own[axis].size, int):
                            break
                        inside.append((out, start, own[axis]))
                        start += size
                case Rename(pairs):
                    inside += [(axes[0][old], 0, new) for old, new in pairs]
                case Reshape(dims):
                    for pair in _regrouped(tensors[e.args[0]].axes, tuple(a for d in dims for a in d)):
                        few, many = sorted(pair, key=len)  # axes of size 1 are digits of nothing
                        digits += _two_by_two(few[0], list(many)) if len(few) == 1 else ()
    linked = [a for x in (*inside, *digits) for a in x if isinstance(a, Axis)]
    ends = {a.name: {0, a.size} for a in linked if isinstance(a.size, int) and len(sizes.get(a.name, ())) <= 1}
    links = [_Inside(ends[x.name], start, ends[y.name]) for x, start, y in inside if {x.name, y.name} <= ends.keys()]
    splits = [_Digits(*(ends[a.name] for a in x)) for x in digits if all(a.name in ends for a in x)]
    changed = True
    while changed:
        spread = [link.spread() for link in links] + [link.spread() for link in splits]
        changed = any(spread)
    found = {f"${name}": [b - a for a, b in itertools.pairwise(sorted(places))] for name, places in ends.items()}
    return {v: tuple(sizes) for v, sizes in found.items() if len(sizes) > 1}


def _two_by_two(whole: Axis, split: list[Axis]) -> Iterator[tuple[Axis, Axis, Axis]]:
    """An axis and its digits as the first and the rest, the rest as its first and its rest, and so on."""
    while len(split) > 1:
        first, *split = split
        rest = split[0] if len(split) == 1 else Axis("/".join(a.name for a in split), _count(split))
        yield whole, first, rest
        whole = rest


@dataclass(frozen=True)
class _Inside:
    """Ends of an axis, and of one that starts at a place in it."""

    whole: set[int]
    start: int
    part: set[int]

    def spread(self) -> bool:
        up = {self.start + e for e in self.part}
        down = {e - self.start for e in self.whole if self.start <= e <= self.start + max(self.part)}
        return _added((self.whole, up), (self.part, down))


@dataclass(frozen=True)
class _Digits:
    """Ends of an axis, and of its two digits.  Where it ends within a value of the first, that value stands alone."""

    whole: set[int]
    first: set[int]
    rest: set[int]

    def spread(self) -> bool:
        stride = max(self.rest)
        up = {n * stride for n in self.first} | {
            n * stride + e for e in self.rest - {0, stride} for n in range(max(self.first))
        }
        first = {n for e in self.whole for n in (e // stride, -(-e // stride))}
        return _added((self.whole, up), (self.first, first), (self.rest, {e % stride for e in self.whole}))


def _added(*sets: tuple[set[int], set[int]]) -> bool:
    """Adds new elements, unless they are too many; whether there were any."""
    if all(new <= old for old, new in sets) or sum(len(old | new) for old, new in sets) > MOST_BORDERS:
        return False
    for old, new in sets:
        old |= new
    return True


def _pure(graph: Program, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Equation, Mapping[str, Tensor]]]:
    """All equations, those of kernels and library calls included, with the tensors that they name."""
    for e in graph.equations:
        match e.op:
            case Kernel(blocks):
                for block in (b for whole in blocks for b in (whole, whole.combine) if b):
                    own = block.tensors()
                    yield from ((x, own) for x in equations_of(tuple(block.steps())))
            case Library(_, semantics):
                yield from _pure(semantics, semantics.tensors())
            case _:
                yield e, tensors


def _regrouped(before: Sequence[Axis], after: Sequence[Axis]) -> Iterator[tuple[Sequence[Axis], Sequence[Axis]]]:
    i = j = 0
    while i < len(before) or j < len(after):
        ends = itertools.product(range(i, len(before) + 1), range(j, len(after) + 1))
        fits = [
            (m, n) for m, n in ends if (m, n) > (i, j) and m + n > i + j and _count(before[i:m]) == _count(after[j:n])
        ]
        fits = [(m, n) for m, n in fits if m > i and n > j] or fits
        if not fits:
            raise Undecided("a reshape whose dimensions do not fit")
        m, n = min(fits, key=sum)
        yield before[i:m], after[j:n]
        i, j = m, n


def _count(axes: Sequence[Axis]) -> Size:
    return product(a.size for a in axes)


def _monoids(op: Op) -> tuple[str, ...]:
    """The monoids in which results of tiles add up to the result of the whole."""
    match op:
        case Contract() | Reduce("sum"):
            return "sum", "rescaled"
        case Reduce("max" | "min" as kind):
            return (kind,)
        case _:
            return ()
