"""From a verified μGraph to a plan.

    lower(verified, trace) -> Plan

Per block graph: resolve views to index maps of loads, cover each axis, flatten axes that always go together, choose a
form for each contraction, order tile dimensions so that matrix multiplies need no transposes, find where elements
beyond a tensor must be made neutral.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import TYPE_CHECKING

from mugraph.codegen.passes import Names, Observer, names_of, prepare, refuse
from mugraph.codegen.plan import (
    ANY,
    KNOWS_DESCRIPTORS,
    Accumulate,
    Action,
    Beside,
    Buffer,
    Call,
    Combined,
    Compute,
    Extent,
    Form,
    Index,
    Launch,
    Machine,
    Options,
    Piece,
    Plan,
    Read,
    Role,
    Scope,
    Torch,
    Trace,
    Write,
    compute_of,
)  # fmt: skip
from mugraph.errors import UnsupportedOpError
from mugraph.ir.axes import Axis, Monomial, Size, largest, product, representative
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Load, Monoid, Program, Step, Store
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
    MaskedExp,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    Transpose,
)  # fmt: skip
from mugraph.ir.types import DType, Tensor, promote, tensor

if TYPE_CHECKING:
    from mugraph.verify.equivalence import Verified

SMALLEST_DOT = 16  # tl.dot wants at least 16 lanes on each side
DEEPEST_I8 = (2**31 - 1) // 2**14  # products of two i8 that i32 holds the sum of; the instructions saturate beyond
MOST_LANES = 2**20  # Triton's limit on the elements of a tile
KEPT_LANES = 4096  # a statistic kept apart over a loop: 32 registers a thread at 4 warps
KEPT_REGISTERS = 112  # values a thread holds beside its addresses
KNOWS_E4M3 = 89  # the first compute capability with loads of f8e4m3
STAGE_BYTES = 98304  # shared memory that the stages of a loop may fill


OptionsOf = Callable[[str], Options]


def lower(verified: Verified, trace: Trace = (), machine: Machine = ANY, observer: Observer | None = None) -> Plan:
    """The plan of a verified μGraph.  `trace` has choices for some of its kernels.  Raises UnsupportedOpError, with the
    operator's name, where there is no form or the machine does not have what an option asks for, and ValueError for a
    choice that there is not."""
    return plan_graph(verified.graph, trace, machine, observer)


def plan_graph(
    graph: KernelGraph,
    trace: Trace = (),
    machine: Machine = ANY,
    observer: Observer | None = None,
    options: Options | None = None,
) -> Plan:
    """The plan of a μGraph.  What calls this answers for the graph's being right; `lower` takes verified ones only.
    `options`: of kernels of which the trace says nothing else."""
    chosen: dict[str, Options] = {}
    for c in trace:
        chosen[c.kernel] = chosen.get(c.kernel, options or Options()).changed(c.name, c.value)
    met: set[str] = set()

    def options_of(kernel: str) -> Options:
        met.add(kernel)
        found = chosen.get(kernel, options or Options()).check()
        if found.descriptors and machine.arch is not None and machine.arch < KNOWS_DESCRIPTORS:
            text = f"sm_{machine.arch} has no tensor descriptors, which {kernel} has as an option"
            raise UnsupportedOpError(text, op=kernel, remedy="leave out the option descriptors")
        return found

    if parts := graph.divided():
        first, rest = (_plan(part, options_of, machine, observer) for part in parts)
        plan = replace(rest, ahead=first)
    else:
        plan = _plan(graph, options_of, machine, observer)
    if unknown := chosen.keys() - met:
        raise ValueError(f"{graph.name} has no kernel {min(unknown)}")
    return plan


def _plan(graph: KernelGraph, options_of: OptionsOf, machine: Machine, observer: Observer | None) -> Plan:
    inputs = tuple(i.name for i in graph.inputs)
    outputs = tuple(o.value for o in graph.outputs)
    refuse_packed(graph)
    for o in graph.outputs:
        if o.alias_of is not None:
            raise UnsupportedOpError(
                f"output {o.value} overwrites {o.alias_of}", op="store", remedy="copy it after the call"
            )
    buffers = {i.name: Buffer(i.tensor, "input") for i in graph.inputs}
    everything = graph.tensors()
    joints, parts = kernel_level_joints(graph)
    views = kernel_level_views(graph, parts)
    resolved = joints | _only_loaded(graph, views, joints) - set(parts)
    equations = [e for e in graph.equations if e.targets[0].name not in resolved]
    own = own_name(graph)
    calls: list[Call | Torch] = []
    for t in (everything[name] for e in graph.equations for name in (t.name for t in e.targets)):
        if t.name not in parts and (t.name not in resolved or t.name in joints):
            buffers[t.name] = Buffer(t, "output" if t.name in outputs else "global")
    for equation in equations:
        if not isinstance(equation.op, Kernel):
            calls.append(Torch(equation))
            continue
        base = f"{own}_{len(calls)}" if len(equations) > 1 else own
        mains: list[Launch] = []
        combines: list[Launch] = []
        options = options_of(base)
        split = sum(block.combine is not None for block in equation.op.blocks)
        combining = options_of(f"{base}_combine") if split else options
        for number, block in enumerate(equation.op.blocks):
            name = f"{base}_{number}" if len(equation.op.blocks) > 1 else base
            for store in block.stores:
                if store.kind == "partial":
                    assert block.split
                    value = _stored(block, store.value)
                    slab = Tensor(store.target, ((block.split.part,), *value.dims), DType.f32)
                    buffers[store.target] = Buffer(slab, "workspace")
                elif store.kind == "atomic":
                    whole = parts[store.target][0] if store.target in parts else store.target
                    buffers[whole] = replace(buffers[whole], space="zeroed")
            tensors = everything | {n: b.tensor for n, b in buffers.items()}
            mains.append(_Planner(prepare(block, observer), name, tensors, options, machine, views).plan())
            if block.combine:
                combine = prepare(block.combine, observer)
                label = f"{name if split > 1 else base}_combine"
                combines.append(_Planner(combine, label, tensors, combining, machine, views).plan())
        if options.combine == "last" and len(mains) == len(combines) == 1 and refines(combines[0], mains[0]):
            arrivals = counters_of(mains[0])
            buffers[arrivals.tensor.name] = arrivals
            # the results that a block counts for go by its program id alone
            plain = replace(mains[0], options=replace(mains[0].options, group=1, persistent=0, prefetch=False))
            calls.append(Combined(plain, combines[0], arrivals.tensor.name))
            continue
        for label, launches in ((base, mains), (f"{base}_combine", combines)):
            if launches:
                calls.append(launches[0] if len(launches) == 1 else Beside(label, tuple(launches)))
    decoded = (DType.f8e4m3,) if machine.arch is not None and machine.arch < KNOWS_E4M3 else ()
    return Plan(graph.name, tuple(buffers.values()), tuple(calls), inputs, outputs, None, machine.precision, decoded)


def own_name(graph: KernelGraph) -> str:
    """A name for the graph's kernels that hides no value of it in the emitted host function."""
    taken = {re.sub(r"\W", "_", t) for t in graph.tensors()} | {f"size_{d.name}" for d in graph.dims()}
    name = graph.name
    while any(re.fullmatch(rf"{re.escape(name)}(_\d+)*(_combine|_whole)?(_\d+)*", t) for t in taken):
        name = f"{name}_kernel"
    return name


def grid_extents(launch: Launch) -> dict[str, Extent]:
    return {e.axis.name: e for s in launch.scopes for e in s.extents if e.role == "grid"}


def refines(combine: Launch, main: Launch) -> bool:
    """Whether each block of a combine makes results of one block of a launch's grid, its parts aside."""
    tiles = {a: e.tile for a, e in grid_extents(main).items()}
    fine = {a: e.tile for a, e in grid_extents(combine).items()}
    return all(a in fine and tile % fine[a] == 0 for a, tile in tiles.items())


def counters_of(main: Launch) -> Buffer:
    """One counter for each result of a split launch, or more: a symbolic axis has no more blocks than entries."""
    extents = grid_extents(main)
    sizes = [(extents[a].axis.size, extents[a].tile) for a in main.grid]
    counts = [-(-size // tile) if isinstance(size, int) else size for size, tile in sizes]
    return Buffer(tensor(f"{main.name}_arrivals", (Axis("result", product(counts)),), DType.i32), "counters")


def refuse_packed(graph: Program) -> None:
    """Raises UnsupportedOpError, with its name and type, for what is stored in less than a byte: a value that comes
    from memory or goes there, or a tile of a kernel."""
    stored: list[tuple[str, str, DType]] = []
    for i in graph.inputs:
        if i.storage.packing != 1:
            raise UnsupportedOpError(
                f"input {i.name} packs {i.storage.packing} values of {i.storage.dtype} into each stored element",
                op="load", remedy="unpack it before the program",
            )  # fmt: skip
        stored.append(("load", f"input {i.name}", i.tensor.dtype))
    stored += [("store", f"output {o.value}", graph.tensors()[o.value].dtype) for o in graph.outputs]
    for e in graph.kernels():
        stored += [("store", t.name, t.dtype) for t in e.targets]
        assert isinstance(e.op, Kernel)
        tiles = [t for b in e.op.blocks for x in (b, b.combine) if x for t in x.tensors().values()]
        stored += [("cast", t.name, t.dtype) for t in tiles]
    for op, name, dtype in stored:
        if dtype.bits < 8:
            raise UnsupportedOpError(
                f"{name} is {dtype}, which takes less than a byte", op=op, remedy="keep it in i8 or u8"
            )


def _stored(block: BlockGraph, value: str) -> Tensor:
    return block.tensors()[value]


# A kernel-level view: the tensor whose memory it shows, and the view's place along each of that tensor's axes.
Views = dict[str, tuple[str, "tuple[Index, ...]"]]


def kernel_level_joints(graph: KernelGraph) -> tuple[set[str], Views]:
    """Concatenations of what kernels store, and the operands as views of the results: each kernel stores its part in
    place, so that nothing is copied."""
    tensors = graph.tensors()
    outputs = {o.value for o in graph.outputs}
    outside = Counter(a for e in graph.equations if not isinstance(e.op, Kernel) for a in e.args)
    stored: set[str] = set()
    joints: set[str] = set()
    for e in graph.equations:
        if isinstance(e.op, Kernel):
            stored.update(t.name for t in e.targets)
        elif isinstance(e.op, Concat) and all(
            a in stored and a not in outputs and outside[a] == 1 and tensors[a].dtype is e.target.dtype for a in e.args
        ):
            stored.add(e.target.name)
            joints.add(e.target.name)
    parts: Views = {}
    for e in reversed(graph.equations):
        if isinstance(e.op, Concat) and e.target.name in joints:
            whole, index = parts.get(e.target.name) or (e.target.name, tuple(Index(a.name) for a in e.target.axes))
            low = 0
            for arg, axis in zip(e.args, e.op.axes, strict=True):
                parts[arg] = whole, tuple(_composed(i, {e.op.out.name: Index(axis, low)}) for i in index)
                low += representative(next(a.size for a in tensors[arg].axes if a.name == axis))
    return joints, parts


def kernel_level_views(graph: KernelGraph, parts: Views) -> Views:
    """Equations of the graph that are index maps: a load of such a view is a load of the tensor below it.  `parts`
    are views that kernels store to."""
    tensors, found = graph.tensors(), dict(parts)
    for e in graph.equations:
        moved: dict[str, Index] | None = None
        match e.op:
            case Transpose() | Broadcast():
                moved = {}
            case Slice(axis, out, start, step):
                moved = {axis: Index(out.name, start, step)}
            case Rename(pairs):
                moved = {old: Index(new.name) for old, new in pairs}
            case Reshape(dims):
                moved = _one_to_one(tensors[e.args[0]].axes, [a for d in dims for a in d])
        if moved is not None:
            below, index = found.get(e.args[0]) or (e.args[0], tuple(Index(a.name) for a in tensors[e.args[0]].axes))
            found[e.target.name] = (below, tuple(_composed(i, moved) for i in index))
    return found


def _one_to_one(before: Sequence[Axis], after: Sequence[Axis]) -> dict[str, Index] | None:
    """The index map of a reshape that renames axes one to one, apart from axes of size 1; else None."""
    if {a.name for a in before} == {a.name for a in after}:
        return {}
    left, right = [a for a in before if a.size != 1], [a for a in after if a.size != 1]
    if [a.size for a in left] != [a.size for a in right]:
        return None
    gone = {a.name: Index(None) for a in before if a.size == 1}
    return gone | {a.name: Index(b.name) for a, b in zip(left, right, strict=True)}


def _only_loaded(graph: KernelGraph, views: Views, joints: set[str]) -> set[str]:
    """Views that kernels load and nothing else reads: no tensor need be made of them."""
    made = {o.value for o in graph.outputs}
    for e in reversed(graph.equations):
        if e.targets[0].name in joints:
            continue
        if not isinstance(e.op, Kernel) and (e.targets[0].name not in views or e.targets[0].name in made):
            made.update(e.args)
    return set(views) - made


# -- resolution: unique names, views as index maps, dead values removed ------------------------------------------


@dataclass
class _Raw:
    """A scope before decisions: its loops, outermost first, and its actions in order, whose names are unique."""

    loops: tuple[tuple[str, int], ...]
    items: list[Read | Equation | Accumulator | Write] = field(default_factory=list)


Map = tuple[tuple[str, Index], ...]
POINTWISE = (Elementwise, Compare, Select, MaskedExp, Cast)
ZERO_AT_ZERO = (
    "neg", "square", "sqrt", "abs", "silu", "gelu", "relu", "tanh", "round", "floor", "sin", "erf", "expm1", "log1p",
)  # fmt: skip


class _Resolver:
    """Turns a block graph into scopes.  A view of a load becomes a load under an index map; a view of an elementwise
    result becomes the same function of views; other values may be renamed only."""

    def __init__(self, block: BlockGraph, tensors: dict[str, Tensor], views: Views) -> None:
        self.block = block
        self.sources = tensors
        self.views = views
        self.names: Names = names_of(block)
        self.values: dict[str, Tensor] = {}
        self.defined: dict[str, Read | Equation | Accumulator] = {}
        self.alive: dict[str, str] = {}
        self.scopes: list[_Raw] = []

        self.scattered: dict[str, tuple[str, str, Scatter]] = {}  # what is added, at which indices

    def resolve(self) -> list[_Raw]:
        block = self.block
        stores = list(block.stores)
        for p in block.passes:
            raw = self.open(p.loops)
            inside = dict(self.alive)
            self.loads(p.loads, inside)
            for step in p.body:
                self.step(step, inside)
            if p.loops:
                for a in p.accumulators:
                    self.alive[a.target.name] = inside[a.target.name]
                dying = {t.name for s in p.body if isinstance(s, Equation) for t in s.targets}
                early = [s for s in stores if s.value in dying]
                stores = [s for s in stores if s not in early]
                raw.items += [self.write(inside[s.value], s) for s in early]
            else:
                self.alive = inside
        raw = self.open(())
        self.loads(block.loads, self.alive)
        for step in block.epilogue:
            self.step(step, self.alive)
        raw.items += [self.write(self.alive[s.value], s) for s in stores]
        self.narrow()
        self.sweep()
        return self.scopes

    def open(self, loops: tuple[tuple[str, int], ...]) -> _Raw:
        self.scopes.append(_Raw(loops))
        self.memo: dict[tuple[str, Map], str] = {}
        return self.scopes[-1]

    def loads(self, loads: Iterable[Load], env: dict[str, str]) -> None:
        for load in loads:
            own, theirs = load.value.axes, self.sources[load.source].axes
            same = {a.name for a in own} == {a.name for a in theirs}
            # an alias: axes correspond by position
            index = tuple(Index(a.name) for a in (theirs if same else own))
            source = load.source
            if source in self.views:
                moved = dict(zip((a.name for a in theirs), index, strict=True))
                source, below = self.views[source]
                index = tuple(_composed(i, moved) for i in below)
            env[load.value.name] = self.define(load.value, partial(Read, pieces=(Piece(source, index),)))

    def write(self, value: str, store: Store) -> Write:
        whole, index = self.views.get(store.target, (store.target, ()))
        if value in self.scattered:
            added, at, op = self.scattered[value]
            if index or store.kind != "atomic":
                raise refuse(op, "is added to a whole result by atomic stores alone")
            places = {op.out.name: Index(None, value=at, within=op.out)}
            index = tuple(places.get(a.name, Index(a.name)) for a in self.sources[store.target].axes)
            value = added
        return Write(self.values[value], whole, store.kind, index)

    def define(self, wish: Tensor, make: Callable[[Tensor], Read | Equation | Accumulator]) -> str:
        """Puts an item into the open scope under a unique name."""
        name = wish.name if wish.name not in self.values else self.names.fresh(f"{wish.name}_again")
        self.values[name] = replace(wish, name=name)
        item = make(self.values[name])
        self.defined[name] = item
        self.scopes[-1].items.append(item)
        return name

    def step(self, step: Step, env: dict[str, str]) -> None:
        match step:
            case Equation(_, op, args) if isinstance(op, Reshape | Transpose | Broadcast | Slice | Concat | Rename):
                env[step.target.name] = self.view(step, [env[a] for a in args])
            case Equation(_, Gather(axis), (arg, at)):
                place = Index(None, value=env[at], within=next(a for a in self.values[env[arg]].axes if a.name == axis))
                env[step.target.name] = self.under(env[arg], ((axis, place),), step)
            case Equation(_, Scatter(kind="sum") as op, (arg, at)):
                env[step.target.name] = name = self.names.fresh(step.target.name)
                self.scattered[name] = env[arg], env[at], op
            case Equation(_, op, args):
                if len(step.targets) != 1:
                    raise refuse(op, "has several results", step)
                new = tuple(env[a] for a in args)
                env[step.target.name] = self.define(step.target, lambda t: Equation((t,), op, new, step.where))
            case Accumulator(equation, monoid, scale):
                new = tuple(env[a] for a in equation.args)
                by = env[scale] if scale else None
                env[equation.target.name] = self.define(
                    equation.target, lambda t: Accumulator(replace(equation, targets=(t,), args=new), monoid, by)
                )
            case _:
                raise AssertionError(step)

    def view(self, equation: Equation, args: list[str]) -> str:
        """The value of a view equation, as a name in the open scope."""
        op, target = equation.op, equation.target
        match op:
            case Transpose():
                return args[0]
            case Reshape() if {a.name for a in target.axes} == {a.name for a in self.values[args[0]].axes}:
                return args[0]
            case Reshape(dims):
                return self.under(args[0], self.regrouped(equation, args[0], [a for d in dims for a in d]), equation)
            case Rename(pairs):
                return self.under(args[0], tuple((old, Index(new.name)) for old, new in pairs), equation, target)
            case Slice(axis, out, start, step):
                return self.under(args[0], ((axis, Index(out.name, start, step)),), equation, target)
            case Broadcast():
                return self.define(target, lambda t: Equation((t,), op, tuple(args), equation.where))
            case Concat(axes, out):
                return self.joined(equation, args, axes, out)
            case _:
                raise AssertionError(op)

    def regrouped(self, equation: Equation, arg: str, axes: Sequence[Axis]) -> Map:
        """The index map of a reshape that renames axes one to one, apart from axes of size 1."""
        moved = _one_to_one(self.values[arg].axes, axes)
        if moved is None:
            raise refuse(equation.op, "splits or merges axes inside a kernel", equation)
        return tuple(moved.items())

    def under(self, name: str, index: Map, equation: Equation, target: Tensor | None = None) -> str:
        """The value `name` with its axes replaced by positions along other axes."""
        index = tuple((a, i) for a, i in index if a in {x.name for x in self.values[name].axes})
        if not index:
            return name
        if (name, index) in self.memo:
            return self.memo[name, index]
        sizes = {a.name: a for t in (target or equation.target,) for a in t.axes}
        found = self.memo[name, index] = self._under(name, index, equation, sizes)
        return found

    def _under(self, name: str, index: Map, equation: Equation, sizes: dict[str, Axis]) -> str:
        item, moved = self.defined[name], dict(index)
        old = self.values[name]
        axes: list[Axis] = []
        for a in old.axes:
            at = moved.get(a.name, Index(a.name))
            if at.axis is not None:
                axes.append(sizes.get(at.axis, a))
            elif at.value is not None:
                axes += [b for b in self.values[at.value].axes if b not in old.axes]
        wish = tensor(equation.target.name, tuple(axes), old.dtype)
        match item:
            case Read(_, pieces):
                for p in pieces:
                    at = moved.get(p.joined or "", Index(p.joined))
                    if (at.axis is None and p.joined) or (at.start, at.step) != (0, 1):
                        raise refuse(equation.op, "of a concatenation", equation)
                new = tuple(
                    replace(
                        p,
                        index=tuple(
                            replace(i, value=self.under(i.value, index, equation))
                            if i.value is not None
                            else _composed(i, moved)
                            for i in p.index
                        ),
                        joined=moved[p.joined].axis if p.joined in moved else p.joined,
                    )
                    for p in pieces
                )
                return self.define(wish, lambda t: Read(t, new))
            case Equation(_, op, args) if isinstance(op, POINTWISE):
                inner = tuple(
                    self.under(a, index, replace(equation, targets=(replace(wish, name=f"{wish.name}_{a}"),)), wish)
                    for a in args
                )
                return self.define(wish, lambda t: Equation((t,), op, inner, equation.where))
            case Equation(_, Iota(axis)):
                at = moved[axis.name]
                if at.axis is None or (at.start, at.step) != (0, 1):
                    raise refuse(equation.op, "of an index", equation)
                return self.define(wish, lambda t: Equation((t,), Iota(t.axes[0]), (), equation.where))
        if any((i.start, i.step) != (0, 1) or i.axis is None for _, i in index):
            raise refuse(equation.op, "of a sum", equation)
        pairs = tuple((a, next(x for x in axes if x.name == i.axis)) for a, i in index)
        return self.define(wish, lambda t: Equation((t,), Rename(pairs), (name,), equation.where))

    def joined(self, equation: Equation, args: list[str], axes: Sequence[str], out: Axis) -> str:
        pieces: list[Piece] = []
        low = 0
        for arg, axis in zip(args, axes, strict=True):
            item = self.defined[arg]
            size = next(a.size for a in self.values[arg].axes if a.name == axis)
            same = self.values[arg].dtype is self.values[args[0]].dtype
            if not isinstance(item, Read) or len(item.pieces) > 1 or not isinstance(size, int) or not same:
                raise refuse(equation.op, "of values that are not loads of static size and one type", equation)
            shift = {axis: Index(out.name, -low)}
            moved = tuple(_composed(i, shift) for i in item.pieces[0].index)
            pieces.append(Piece(item.pieces[0].source, moved, out.name, low, size))
            low += size
        loaded = replace(equation.target, dtype=self.values[args[0]].dtype)
        return self.define(loaded, lambda t: Read(t, tuple(pieces)))

    def narrow(self) -> None:
        """Factors of 8 bits that are widened are multiplied as they are: products are formed in the result's type."""

        def bare(arg: str) -> str:
            match self.defined[arg]:
                case Equation(_, Cast(dtype), (below,)) if dtype.is_float == self.values[below].dtype.is_float:
                    return below if self.values[below].dtype.bits == 8 < dtype.bits else arg
            return arg

        for scope in self.scopes:
            for at, item in enumerate(scope.items):
                e = item.equation if isinstance(item, Accumulator) else item
                if not (isinstance(e, Equation) and isinstance(e.op, Contract) and len(e.args) == 2):
                    continue
                args = tuple(map(bare, e.args))
                if self.values[args[0]].dtype is self.values[args[1]].dtype:
                    e = replace(e, args=args)
                    new = replace(item, equation=e) if isinstance(item, Accumulator) else e
                    scope.items[at] = self.defined[e.target.name] = new

    def sweep(self) -> None:
        """Drops what no store needs."""
        needed: set[str] = set()
        for scope in reversed(self.scopes):
            for item in reversed(scope.items):
                match item:
                    case Write(value, index=index):
                        needed |= {value.name, *(i.value for i in index if i.value)}
                    case Read(value, pieces) if value.name in needed:
                        needed |= {i.value for p in pieces for i in p.index if i.value}
                    case Accumulator(equation, _, scale) if equation.target.name in needed:
                        needed |= {*equation.args, *([scale] if scale else [])}
                    case Equation() if item.target.name in needed:
                        needed |= set(item.args)
        for scope in self.scopes:
            scope.items = [i for i in scope.items if isinstance(i, Write) or _name(i) in needed]


def _composed(i: Index, moved: dict[str, Index]) -> Index:
    if i.axis not in moved:
        return i
    at = moved[i.axis]
    return replace(at, start=i.start + i.step * at.start, step=i.step * at.step)


def _name(item: Read | Equation | Accumulator | Write) -> str:
    match item:
        case Equation() | Accumulator():
            return item.target.name
        case Read(value) | Write(value):
            return value.name


# -- decisions ---------------------------------------------------------------------------------------------------


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def divides(tile: int, size: Size) -> bool:
    """Whether the tile divides the size, whatever values its symbols take."""
    match size:
        case int():
            return size % tile == 0
        case Monomial(coefficient, powers) if all(p > 0 for _, p in powers):
            return coefficient.denominator == 1 and coefficient.numerator % tile == 0
        case _:
            return tile == 1


@dataclass(frozen=True)
class _Sides:
    """The axes of a contraction of two operands, by the operands that have them."""

    batch: tuple[str, ...]
    m: tuple[str, ...]
    n: tuple[str, ...]
    k: tuple[str, ...]

    @property
    def swapped(self) -> _Sides:
        return _Sides(self.batch, self.n, self.m, self.k)


class _Planner:
    def __init__(
        self,
        block: BlockGraph,
        name: str,
        tensors: dict[str, Tensor],
        options: Options,
        machine: Machine,
        views: Views,
    ) -> None:
        self.block, self.name, self.options, self.machine = block, name, options, machine
        resolver = _Resolver(block, tensors, views)
        self.raw = resolver.resolve()
        self.values = resolver.values
        self.defined = resolver.defined
        self.sources = tensors
        self.axes = {a.name: a for t in self.values.values() for a in t.axes}
        self.extents = [self.cover(raw) for raw in self.raw]
        self.lanes: list[tuple[str, ...]] = []
        self.zero: dict[str, frozenset[str]] = {}

    # -- axes and tile dimensions --------------------------------------------------------------------------------

    def cover(self, raw: _Raw) -> dict[str, Extent]:
        grid, loops = dict(self.block.grid), dict(raw.loops)
        found: dict[str, Extent] = {}
        for axis in self.axes_in(raw):
            size = axis.size
            tile, role = loops.get(axis.name, grid.get(axis.name)), "loop" if axis.name in loops else "grid"
            if tile is None:
                found[axis.name] = self.whole(axis)
                continue
            if isinstance(size, int):
                tile = min(tile, power_of_two(size))
            kind: Role = "loop" if role == "loop" else "grid"
            found[axis.name] = Extent(axis, kind, tile, power_of_two(tile), not divides(tile, size))
        return found

    def whole(self, axis: Axis) -> Extent:
        size = axis.size
        if isinstance(size, int):
            return Extent(axis, "whole", size, power_of_two(size), False)
        lanes = power_of_two(representative(size))
        return Extent(axis, "whole", lanes, lanes, True, at_launch=True)

    def axes_in(self, raw: _Raw) -> list[Axis]:
        names: dict[str, Axis] = {}
        for item in raw.items:
            used = [_name(item)]
            if isinstance(item, Equation):
                used += item.args
            if isinstance(item, Accumulator):
                used += item.equation.args
            names.update((a.name, a) for n in used for a in self.values[n].axes)
        return list(names.values())

    def equations(self) -> list[tuple[int, Equation]]:
        """Every equation with the number of its scope."""
        return [
            (s, i.equation if isinstance(i, Accumulator) else i)
            for s, raw in enumerate(self.raw)
            for i in raw.items
            if isinstance(i, Equation | Accumulator)
        ]

    def many(self, axis: str, scope: int) -> bool:
        """Whether tiles of the scope have more than one element along the axis."""
        e = self.extents[scope].get(axis)
        return e is not None and (e.lanes > 1 or e.at_launch)

    def names(self, value: str) -> tuple[str, ...]:
        return tuple(a.name for a in self.values[value].axes)

    def appearance(self) -> list[str]:
        """Axes that have a tile dimension, in the order in which sources lay them out."""
        order: dict[str, None] = {}
        for raw in self.raw:
            for item in raw.items:
                if isinstance(item, Read):
                    order |= {a: None for p in item.pieces for i in p.index for a in self.along(i)}
        order |= dict.fromkeys(self.axes)
        return [a for a in order if any(self.many(a, s) for s in range(len(self.raw)))]

    def along(self, i: Index) -> tuple[str, ...]:
        """The axes of a tile along which a position moves."""
        return self.names(i.value) if i.value else (i.axis,) if i.axis else ()

    def flatten(self) -> list[tuple[str, ...]]:
        """Axes that every contraction and reduction treats alike share one tile dimension.

        A value that lacks one of them is held once per element of the dimension; that costs registers, so axes that no
        contraction of two operands has must occur in the same values.
        """
        groups: dict[object, list[str]] = {}
        for axis in self.appearance():
            extents = [e[axis] for e in self.extents if axis in e]
            alone = any(e.role == "loop" or e.at_launch or e != extents[0] for e in extents) or extents[0].padded
            groups.setdefault(axis if alone else self.signature(axis), []).append(axis)
        return [tuple(g) for g in groups.values()]

    def complete(self) -> None:
        """A dimension has the same size in every scope that has one of its axes."""
        for lane in self.lanes:
            known = {a: e[a] for e in self.extents for a in lane if a in e}
            for extents in self.extents:
                if extents.keys() & set(lane):
                    extents.update((a, known[a]) for a in lane if a not in extents)

    def signature(self, axis: str) -> object:
        marks: list[object] = []
        paired = False
        for _, e in self.equations():
            match e.op:
                case Contract(closed) if len(e.args) > 1:
                    sides = tuple(axis in self.names(a) for a in e.args)
                    paired |= any(sides)
                    marks.append((sides, axis in closed))
                case Reduce(_, closed) | Contract(closed):
                    marks.append(axis in closed)
                case Rename(pairs):
                    marks.append([(axis == old, axis == new.name) for old, new in pairs])
                case Broadcast(added):
                    marks.append(axis in {a.name for a in added})
                case CumSum(along):
                    marks.append(axis == along)
                case _:
                    pass
        if not paired:
            marks.append(tuple(axis in self.names(v) for v in self.values))
        joined = {i.joined for raw in self.raw for r in raw.items if isinstance(r, Read) for i in r.pieces}
        return (repr(marks), axis if axis in joined else None)

    def lane_size(self, lane: tuple[str, ...], scope: int) -> int:
        return math.prod(self.extents[scope][a].lanes for a in lane if a in self.extents[scope])

    def lanes_of(self, axes: Iterable[str], scope: int) -> tuple[tuple[str, ...], ...]:
        """The tile dimensions of a value with these axes, in canonical order."""
        wanted = {a for a in axes if self.many(a, scope)}
        return tuple(lane for lane in self.lanes if wanted & set(lane))

    def size_of(self, axes: Iterable[str], scope: int) -> int:
        return math.prod(self.lane_size(lane, scope) for lane in self.lanes_of(axes, scope))

    def most_of(self, axes: Iterable[str], scope: int) -> int:
        """The elements of a tile where lanes that a launch computes are many."""
        extents = self.extents[scope]
        return math.prod(extents[a].most_lanes for lane in self.lanes_of(axes, scope) for a in lane if a in extents)

    # -- contractions --------------------------------------------------------------------------------------------

    def sides(self, e: Equation, scope: int) -> _Sides:
        assert isinstance(e.op, Contract)
        left, right = ([a for a in self.names(x) if self.many(a, scope)] for x in e.args)
        shared = [a for a in left if a in right]
        return _Sides(
            tuple(a for a in shared if a not in e.op.axes),
            tuple(a for a in left if a not in right),
            tuple(a for a in right if a not in left),
            tuple(a for a in shared if a in e.op.axes),
        )

    def is_dot(self, e: Equation, scope: int) -> bool:
        """Matrix multiply wherever both sides and the sum have elements; a single row is multiplied and summed."""
        if self.options.dot == "never" or not isinstance(e.op, Contract) or len(e.args) != 2:
            return False
        s = self.sides(e, scope)
        return bool(s.m and s.n and s.k) and (e.target.dtype.is_float or self.is_integer_dot(e))

    def is_integer_dot(self, e: Equation) -> bool:
        """i8 by i8 into i32, where no sum leaves it."""
        assert isinstance(e.op, Contract)
        depth = math.prod(largest(self.axes[a].size) for a in e.op.axes)
        narrow = all(self.values[a].dtype is DType.i8 for a in e.args)
        return narrow and e.target.dtype is DType.i32 and depth <= DEEPEST_I8

    def pad_dots(self) -> None:
        """Each side of a matrix multiply gets at least 16 lanes (32 along a sum of 8-bit products), by the outermost
        axis of its first dimension."""
        for scope, e in self.equations():
            if self.is_dot(e, scope):
                s = self.sides(e, scope)
                deep = SMALLEST_DOT * 16 // min(self.operand_dtype(e).bits, 16)
                for side, least in ((s.m, SMALLEST_DOT), (s.n, SMALLEST_DOT), (s.k, deep)):
                    lanes = self.lanes_of(side, scope)
                    lacking = least // min(math.prod(self.lane_size(n, scope) for n in lanes), least)
                    first = next(a for a in lanes[0] if a in self.extents[scope])
                    self.widen(first, scope, lacking, least)

    def widen(self, axis: str, scope: int, factor: int, least: int) -> None:
        old = self.extents[scope][axis]
        if old.at_launch:
            new = replace(old, lanes=old.lanes * factor, tile=old.tile * factor, least=max(old.least, least))
        else:
            new = replace(old, lanes=old.lanes * factor)
        for extents in self.extents:
            if extents.get(axis) == old:
                extents[axis] = new

    def order_lanes(self) -> None:
        """Tile dimensions in an order with M before K before N for each matrix multiply, where one exists."""
        after: dict[tuple[str, ...], set[tuple[str, ...]]] = {lane: set() for lane in self.lanes}

        def reaches(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
            return a == b or any(reaches(c, b) for c in after[a])

        for scope, e in self.equations():
            if not self.is_dot(e, scope):
                continue
            sides = self.sides(e, scope)
            for s in (sides.swapped, sides) if self.options.swapped else (sides, sides.swapped):
                batch, m, k, n = (self.lanes_of(x, scope) for x in (s.batch, s.m, s.k, s.n))
                chain = [(a, b) for x, y in ((batch, m), (m, k), (k, n)) for a in x for b in y]
                before = {a: set(b) for a, b in after.items()}
                for a, b in chain:
                    if reaches(b, a):
                        after = before
                        break
                    after[a].add(b)
                else:
                    break
        ordered: list[tuple[str, ...]] = []
        left = list(self.lanes)
        while left:
            first = next(x for x in left if not any(reaches(y, x) for y in left if y != x))
            ordered.append(first)
            left.remove(first)
        self.lanes = ordered

    def operand_dtype(self, e: Equation) -> DType:
        """The type the program multiplies in: that of the loads behind both operands, partial results aside.  Floats of
        8 bits are multiplied as they are if both operands are, and as f16, which holds them, beside other types."""
        given = {self.values[a].dtype for a in e.args}
        if all(d.bits == 8 for d in given):
            known = len(given) == 1 and (DType.f8e4m3 not in given or (self.machine.arch or KNOWS_E4M3) >= KNOWS_E4M3)
            return given.pop() if known else DType.f16
        direct = [self.values[a].dtype for a in e.args if isinstance(self.defined[a], Read) and not self.is_partial(a)]
        narrow = [d for d in direct if d in (DType.f16, DType.bf16)]
        loads = [d for a in e.args for d in self.origins(a, set()) if d.is_float]
        dtype = reduce(promote, loads) if loads else (narrow[0] if narrow else DType.f32)
        return dtype if dtype in (DType.f16, DType.bf16) else DType.f32

    def origins(self, value: str, seen: set[str]) -> list[DType]:
        if value in seen:
            return []
        seen.add(value)
        match self.defined[value]:
            case Read():
                return [] if self.is_partial(value) else [self.values[value].dtype]
            case Equation(_, _, args) | Accumulator(Equation(_, _, args)):
                return [d for a in args for d in self.origins(a, seen)]

    def is_partial(self, value: str) -> bool:
        item = self.defined[value]
        return isinstance(item, Read) and any(
            a.name.endswith("_part") and self.sources[p.source].dims[0] == (a,)
            for p in item.pieces
            for a in self.sources[p.source].axes[:1]
        )

    # -- elements beyond the tensor ------------------------------------------------------------------------------

    def masked(self, axis: str, scope: int) -> bool:
        return axis in self.extents[scope] and self.extents[scope][axis].masked

    def guards(self, e: Equation, form: Form, scope: int) -> tuple[tuple[str, ...], ...]:
        """Where elements beyond the tensor would reach a result that counts."""
        match e.op:
            case Reduce("max" | "min", closed):
                return (tuple(a for a in closed if self.masked(a, scope)),)
            case Reduce(_, closed) | Contract(closed):
                risky = [a for a in closed if self.masked(a, scope)]
            case _:
                return ()
        if form == "dot":
            return tuple(tuple(a for a in risky if a not in self.zero[x]) for x in e.args)
        # 0 times garbage may be NaN, so every operand with the axis must be zero there
        return (tuple(a for a in risky if any(a in self.names(x) and a not in self.zero[x] for x in e.args)),)

    def zero_after(self, e: Equation) -> frozenset[str]:
        """Axes along which elements of the result beyond the tensor are 0."""
        args = [(set(self.names(a)), self.zero[a]) for a in e.args]
        own = set(self.names(e.target.name))
        match e.op:
            case Elementwise("mul" | "and"):
                return frozenset(a for a in own if all(a in z or a not in n for n, z in args))
            case Elementwise("div"):
                (_, zn), (nd, _) = args
                return frozenset(a for a in zn if a not in nd)
            case Elementwise("add" | "sub" | "max" | "min" | "or"):
                return frozenset(a for a in own if all(a in z for _, z in args))
            case Elementwise(fn) if fn in ZERO_AT_ZERO:
                return args[0][1]
            case Cast():
                return args[0][1]
            case MaskedExp():
                return args[1][1]
            case Reduce() | Contract():
                return frozenset(a for a in own if any(a in z for _, z in args))
            case _:
                return frozenset()

    # -- the launch ----------------------------------------------------------------------------------------------

    def plan(self) -> Launch:
        self.lanes = self.flatten()
        self.complete()
        self.pad_dots()
        self.order_lanes()
        scopes = tuple(self.scope(i) for i in range(len(self.raw)))
        split = (self.block.split.axis, self.block.split.parts) if self.block.split else None
        options = replace(self.options, num_warps=self.num_warps(), num_stages=self.num_stages())
        return Launch(self.name, self.grid_order(), split, tuple(self.lanes), scopes, options)

    def scope(self, number: int) -> Scope:
        raw = self.raw[number]
        before: list[Action] = []
        body: list[Action] = []
        loops = [a for a, _ in raw.loops]
        varying: set[str] = set()
        for item in raw.items:
            action = self.action(item, number)
            self.refuse_large(item, number)
            inside = any(self.varies(item, loop, varying) for loop in loops)
            if inside:
                varying.add(_name(item))
            (body if inside else before).append(action)
        extents = tuple(self.extents[number].values())
        outer, inner = (None, None, *loops)[-2:]
        return Scope(extents, inner, tuple(before), tuple(self.ordered(body, number)), outer)

    def varies(self, item: Read | Equation | Accumulator | Write, loop: str, varying: set[str]) -> bool:
        match item:
            case Read(value):
                return loop in {a.name for a in value.axes}
            case Equation(_, _, args):
                return loop in self.names(item.target.name) or bool(varying & set(args))
            case Accumulator() | Write():
                return True

    def action(self, item: Read | Equation | Accumulator | Write, scope: int) -> Action:
        match item:
            case Read(value):
                self.zero[value.name] = frozenset(self.names(value.name))
                return item
            case Write():
                return item
            case Equation():
                return self.compute(item, scope)
            case Accumulator(equation, monoid, scale):
                return self.accumulate(self.compute(equation, scope), monoid, scale, scope)

    def compute(self, e: Equation, scope: int) -> Compute:
        match e.op:
            case Contract():
                form: Form = "dot" if self.is_dot(e, scope) else "sum"
            case Reduce("sum" | "max" | "min"):
                form = "sum"
            case Elementwise() | Compare() | Select() | MaskedExp() | Const() | SizeOf() | Iota() | Cast():
                form = "pointwise"
            case Rename() | Broadcast():
                form = "relabel"
            case CumSum():
                form = "scan"
            case _:
                raise refuse(e.op, "has no form inside a kernel", e)
        guards = self.guards(e, form, scope)
        self.zero[e.target.name] = self.zero_after(e)
        return Compute(e, form, guards, self.operand_dtype(e) if form == "dot" else DType.f32)

    def accumulate(self, c: Compute, monoid: Monoid, scale: str | None, scope: int) -> Accumulate:
        name = c.equation.target.name
        items = self.raw[scope].items
        read = any(
            name in (i.args if isinstance(i, Equation) else i.equation.args if isinstance(i, Accumulator) else ())
            or (isinstance(i, Accumulator) and i.scale == name)
            for i in items
        )
        used = [a for x in c.equation.args for a in self.names(x)]
        closed = c.equation.op.axes if isinstance(c.equation.op, Contract | Reduce) else ()
        varies = any(self.many(a, scope) and not self.extents[scope][a].at_launch for a in closed)
        deferred = (
            self.options.keep_statistics
            and c.form == "sum"
            and monoid != "rescaled"
            and not read
            and varies
            and self.size_of(used, scope) <= KEPT_LANES
        )
        faded = any(isinstance(i, Accumulator) and i.scale == name for i in items)
        return Accumulate(c, monoid, scale, deferred, faded)

    def refuse_large(self, item: Read | Equation | Accumulator | Write, scope: int) -> None:
        e = item.equation if isinstance(item, Accumulator) else item
        used = [*e.args, e.target.name] if isinstance(e, Equation) else [e.value.name]
        axes = [a for x in used for a in self.names(x)]
        dot = isinstance(e, Equation) and self.is_dot(e, scope)
        lanes = max(self.size_of(self.names(x), scope) for x in used) if dot else self.size_of(axes, scope)
        if lanes > MOST_LANES:
            op = e.op if isinstance(e, Equation) else None
            raise UnsupportedOpError(
                f"a tile of {lanes} elements for {used[-1]}",
                op=type(op).__name__.lower() if op else "load",
                remedy="put an axis on the grid or loop over it",
            )

    def ordered(self, body: Sequence[Action], scope: int) -> list[Action]:
        """Loads first, those by computed indices excepted, then steps as they come; of the matrix multiplies that are
        ready, the narrowest first, because the last ones' layout is the one that the loop keeps (measured on a 16-wide
        dot beside a 64-wide one)."""
        computed = {n for a in body if not isinstance(a, Read) for n in _targets(a)}
        left: list[Action] = []
        reads: list[Action] = []
        for a in body:
            late = not isinstance(a, Read) or computed & set(_needs(a))
            (left if late else reads).append(a)
            computed |= set(_targets(a)) if late else set()
        ordered: list[Action] = []
        while left:
            waiting = {n for a in left for n in _targets(a)}
            ready = [a for a in left if not (waiting - set(_targets(a))) & set(_needs(a))]
            plain = [a for a in ready if (c := compute_of(a)) is None or c.form != "dot"]
            chosen = plain[0] if plain else min(ready, key=lambda a: self.width(a, scope))
            left.remove(chosen)
            ordered.append(chosen)
        return reads + ordered

    def width(self, action: Action, scope: int) -> int:
        c = compute_of(action)
        assert c
        return self.size_of(self.sides(c.equation, scope).n, scope)

    def grid_order(self) -> tuple[str, ...]:
        """Blocks that read the same data are neighbours: the axis with the fewest bytes behind it runs fastest."""
        reads = [i for raw in self.raw for i in raw.items if isinstance(i, Read)]

        def weight(axis: str) -> float:
            return sum(
                math.prod(float(representative(a.size)) for a in r.value.axes) * r.value.dtype.bits
                for r in reads
                if axis in self.names(r.value.name)
            )

        return tuple(sorted((a for a, _ in self.block.grid), key=weight))

    def num_warps(self) -> int:
        if self.options.num_warps:
            return self.options.num_warps
        largest = demand = 1
        for number, raw in enumerate(self.raw):
            sizes = [(i, self.most_of(self.names(_name(i)), number)) for i in raw.items]
            kept = sum(n for i, n in sizes if isinstance(i, Accumulator))
            computed = sorted(n for i, n in sizes if isinstance(i, Equation))
            largest = max([largest, *(n for _, n in sizes)])
            demand = max(demand, kept + sum(computed[-2:]))  # operands and result of a step live at once
        if largest <= 1024:
            return 1 if largest <= 512 else 2
        return next((w for w in (4, 8) if demand <= w * 32 * KEPT_REGISTERS), 16)

    def num_stages(self) -> int:
        """As many stages as the loads of a loop's tile fit into shared memory, 2 to 4."""
        if self.options.num_stages:
            return self.options.num_stages
        tiles = [
            sum(
                self.size_of(self.names(i.value.name), s) * i.value.dtype.bits // 8
                for i in raw.items
                if isinstance(i, Read) and raw.loops[-1][0] in self.names(i.value.name)
            )
            for s, raw in enumerate(self.raw)
            if raw.loops
        ]
        return min(max(STAGE_BYTES // max(*tiles, 1), 2), 4) if tiles else 1


def _targets(action: Action) -> tuple[str, ...]:
    c = compute_of(action)
    return (c.equation.target.name,) if c else (action.value.name,) if isinstance(action, Read) else ()


def _needs(action: Action) -> tuple[str, ...]:
    match action:
        case Write(value, index=index):
            return (value.name, *(i.value for i in index if i.value))
        case Accumulate(compute, _, scale):
            return (*compute.equation.args, *((scale,) if scale else ()))
        case Compute(equation):
            return equation.args
        case Read(_, pieces):
            return tuple(i.value for p in pieces for i in p.index if i.value)
