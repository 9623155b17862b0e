"""From chosen derivations to a μGraph: each launch becomes a `Kernel` or `Library` equation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import reduce

from mugraph.ir.axes import Axis, representative
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Pass,
    Program,
    Split,
    Step,
    Store,
    equations_of,
)  # fmt: skip
from mugraph.ir.infer import infer, op_text, type_of
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Const,
    Contract,
    Elementwise,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Reduce,
    Rename,
    Select,
    SizeOf,
    Transpose,
)  # fmt: skip
from mugraph.ir.types import DType, Input, Output, Storage, Tensor, tensor
from mugraph.search import values as v
from mugraph.search.closure import Closure, Edge
from mugraph.search.extract import Derivation, Entry, is_leaf_edge
from mugraph.search.extract import Step as Chosen
from mugraph.search.library import ADDED, ATTENTION, Added, Attention, LibraryCall
from mugraph.search.partition import Choice
from mugraph.search.pieces import is_free, joints
from mugraph.search.values import Number

COMBINE_TILE = 4096  # elements of a partial result, all parts together, in one block of the combine

MATERIALISED = "materialised"  # what values in memory are called that are none of the program's


class Unbuildable(Exception):
    """A derivation that the block graph cannot hold; the plan is passed over, with the reason in the report."""


@dataclass(frozen=True)
class Context:
    """What building needs to know: the program; its closure, under canonical names; the way back to the program's
    axes and values; the names of classes at kernel level, and the tensors there (both grow); the element type of
    values that are materialised, and of those that have another; and the operators outside the calculus."""

    program: Program
    closure: Closure
    axes: Mapping[str, Axis]
    inputs: Mapping[str, str]
    names: dict[int, str]
    tensors: dict[str, Tensor]
    dtype: DType
    dtypes: Mapping[int, DType]
    boundaries: tuple[Equation, ...]
    partials: set[str] = field(default_factory=set)  # names of partial results, one name space for all launches
    aliases: list[Equation] = field(default_factory=list)  # inputs under axes that no load of them can say

    def alias(self, name: str, axes: tuple[Axis, ...]) -> Tensor:
        """The kernel-level tensor under other axes, itself if they are its own: a view, taken once."""
        stored = self.tensors[name]
        pairs = tuple((a.name, b) for a, b in zip(stored.axes, axes, strict=True) if a != b)
        if not pairs:
            return stored
        op = Rename(pairs)
        known = next((e.target for e in self.aliases if e.op == op and e.args == (name,)), None)
        if known is not None:
            return known
        left = iter(axes)
        dims = tuple(tuple(next(left) for _ in d) for d in stored.dims)
        fresh = next(n for i in itertools.count(2) if (n := f"{name}_{i}") not in self.tensors)
        self.tensors[fresh] = Tensor(fresh, dims, stored.dtype)
        self.aliases.append(Equation((self.tensors[fresh],), op, (name,)))
        return self.tensors[fresh]

    def axis_names(self, axes: Iterable[str]) -> tuple[str, ...]:
        return tuple(self.axes[a].name for a in axes)

    def axis_order(self) -> dict[str, int]:
        """Output axes first, in the order of the output, then the others in program order."""
        tensors = self.program.tensors()
        order = [a.name for o in self.program.outputs for a in tensors[o.value].axes] + list(self.program.axes())
        return {a: i for i, a in enumerate(dict.fromkeys(order))}

    def class_axes(self, c: int) -> tuple[Axis, ...]:
        """The axes of a class in kernel order."""
        order = self.axis_order()
        return tuple(sorted((self.axes[a] for a in self.closure.axes(c)), key=lambda a: order[a.name]))


class Section:
    """Steps under construction, with what they may use."""

    def __init__(self) -> None:
        self.loads: list[Load] = []
        self.steps: list[Step] = []


class BlockBuilder:
    """One block graph from one derivation."""

    def __init__(self, context: Context, d: Derivation, targets: Mapping[int, Sequence[str]]) -> None:
        self.context, self.d, self.targets = context, d, targets
        self.order = context.axis_order()
        self.position = {c: i for i, c in enumerate(context.closure.order)}
        self.last = len(d.roles.passes)
        self.chosen = {s.entry: s for s in d.steps}
        self.values: dict[str, Tensor] = {}
        self.names: dict[tuple[Entry, bool], str] = {}
        self.kernel_level = {context.names[c] for c in targets} | {i.name for i in context.program.inputs}
        self.kernel_level |= {t.name for e in context.boundaries for t in e.targets}
        self.used = self.kernel_level | context.partials
        self.before = [Section() for _ in range(self.last + 1)]  # before pass q (index q - 1); the last: epilogue
        self.inside = [Section() for _ in range(self.last)]
        self.after = Section()
        self.partial: list[tuple[Entry, Store, Tensor]] = []

    # -- names and equations

    def fresh(self, wanted: str) -> str:
        name, n = wanted, 2
        while name in self.used:
            name, n = f"{wanted}{n}", n + 1
        self.used.add(name)
        return name

    def emit(self, section: Section, wanted: str, op: Op, *args: str) -> str:
        name = self.fresh(wanted)
        section.steps.append(self.equation(name, op, *args))
        return name

    def equation(self, name: str, op: Op, *args: str) -> Equation:
        """An equation with its inferred type: floats are at least f32, axes in kernel order."""
        (t,) = infer(op, [type_of(self.values[a]) for a in args])
        dtype = DType.f32 if t.dtype.is_float and t.dtype.bits < 32 else t.dtype
        axes = tuple(sorted(t.axes, key=lambda a: self.order.get(a.name, len(self.order))))
        self.values[name] = tensor(name, axes, dtype)
        return Equation((self.values[name],), op, args)

    def scalar(self, section: Section, number: Number) -> str:
        """A coefficient: an exact literal times and over axis sizes."""
        parts: list[tuple[str, str]] = []
        if number.coefficient != 1 or not any(p > 0 for _, p in number.sizes):
            parts.append(("mul", self.emit(section, "c", Const(number.coefficient))))
        for axis, power in sorted(number.sizes, key=lambda s: -s[1]):
            size = self.emit(section, f"{self.context.axes[axis]}_size", SizeOf(self.context.axes[axis]))
            parts += [("mul" if power > 0 else "div", size)] * abs(power)
        result = parts[0][1]
        for fn, name in parts[1:]:
            result = self.emit(section, "c", Elementwise(fn), result, name)
        return result

    # -- the block graph

    def build(self) -> BlockGraph:
        split_axis = self.d.roles.split[0] if self.d.roles.split else None
        for step in sorted(self.d.steps, key=lambda s: (self.position[s.entry[0]], s.entry[1])):
            edge = step.option.edge
            if edge is not None and edge.kind == "number":
                continue  # written where it is used
            if split_axis is None:
                self.place(step, self.section_of(step))
            elif split_axis in (edge.axes if edge else ()):
                self.place(step, self.inside[self.last - 1])
                self.store_partial(step)
            elif step.entry[1] > self.last:
                pass  # above the split: the combine computes it
            else:
                self.place(step, self.section_of(step))
        roles = self.d.roles
        tiles = {self.context.axes[a].name: t for a, t in self.d.tiles}
        grid = tuple((a, tiles[a]) for a in sorted(self.context.axis_names(roles.grid), key=self.order.__getitem__))
        split = self.split()
        combine = self.combine(grid, split) if split else None
        epilogue = self.before[self.last]
        stores = tuple(s for _, s, _ in self.partial) if split else self.stores(epilogue)
        passes: list[Pass] = []
        for q in range(self.last):
            if self.before[q].loads or self.before[q].steps:
                passes.append(Pass((), self.loads(self.before[q]), tuple(self.before[q].steps)))
            loops = tuple((a, tiles[a]) for a in self.context.axis_names(roles.passes[q]))
            passes.append(Pass(loops, self.loads(self.inside[q]), tuple(self.inside[q].steps)))
        return BlockGraph(grid, split, tuple(passes), self.loads(epilogue), tuple(epilogue.steps), stores, combine)

    def split(self) -> Split | None:
        roles = self.d.roles
        return Split(self.context.axes[roles.split[0]].name, roles.split[1]) if roles.split else None

    def loads(self, section: Section) -> tuple[Load, ...]:
        """In the order of the program's inputs, partial results last."""
        known = {name: i for i, name in enumerate(self.context.tensors)}
        return tuple(sorted(section.loads, key=lambda ld: known.get(ld.source, len(known))))

    def section_of(self, step: Chosen) -> Section:
        c, at = step.entry
        if step.option.loop is not None:
            return self.inside[step.children[0][1] - 1]
        if any(a in self.d.roles.loops for a in self.context.closure.axes(c)):
            return self.inside[at - 1]
        return self.before[at - 1]

    def stores(self, section: Section, combining: bool = False) -> tuple[Store, ...]:
        found = []
        for root in self.d.roots:
            last = max((e for e in self.chosen if e[0] == root), key=lambda e: e[1])
            name = self.name_of(last, section, combining)
            home = section if combining else self.home_of(last)
            if self.chosen[last].option.edge is None and last[1] <= self.last:
                name = self.emit(home, name, Transpose(), name)  # a loop stores what it computes
            for target in self.targets[root]:
                have = {a.name for a in self.values[name].axes}
                missing = tuple(a for a in self.context.tensors[target].axes if a.name not in have)
                value = self.emit(home, "wide", Broadcast(missing), name) if missing else name
                found.append(Store(value, target))
        return tuple(found)

    def home_of(self, entry: Entry) -> Section:
        """Where a value is at hand when it is stored: in the loop whose iterations have tiles of it, or at the end."""
        c, at = entry
        looped = self.chosen[entry].option.loop is None and at <= self.last
        if looped and any(a in self.d.roles.loops for a in self.context.closure.axes(c)):
            return self.inside[at - 1]
        return self.before[self.last]

    def name_of(self, entry: Entry, section: Section, combining: bool = False) -> str:
        """The tile-level name of an operand; coefficients are written here."""
        c, _ = entry
        step = self.chosen.get(entry) or min(
            (s for s in self.d.steps if s.entry[0] == c), key=lambda s: s.entry[1]
        )  # a value outside loops is computed once, before its earliest use
        edge = step.option.edge
        if edge is not None and edge.kind == "number":
            assert isinstance(edge.leaf, Number)
            return self.scalar(section, edge.leaf)
        key = (step.entry, combining)
        if key not in self.names:
            if not combining:
                raise Unbuildable(f"a value of class {c} is used before it is computed")
            self.place(step, section, combining=True)
        return self.names[key]

    def wanted(self, c: int) -> str:
        return self.tile_name(self.context.names[c]) if c in self.context.names else ""

    def tile_name(self, name: str) -> str:
        """A tile of X is x; a tile of x is x_tile."""
        lower = name.lower()
        return lower if lower not in self.kernel_level else f"{lower}_tile"

    def place(self, step: Chosen, section: Section, combining: bool = False) -> None:
        """Adds the load, equation or accumulator of a step to a section."""
        c, _ = step.entry
        edge = step.option.edge
        key = (step.entry, combining)
        if edge is None:
            self.names[key] = self.load(section, c)
            return
        if combining and step.option.loop is not None:
            raise Unbuildable("the combine needs a value that is accumulated in the loop")
        wanted = self.wanted(c)
        number = self.number_child(edge)
        if number is not None and step.option.loop is None:
            other = self.name_of(step.children[1 - number[0]], section, combining)
            self.names[key] = self.scaled(section, number[1], other, wanted)
            return
        args = tuple(self.name_of(x, section, combining) for x in step.children)
        kept = self.context.axis_names(self.context.closure.axes(c))
        if edge.kind == "product" and edge.closes:
            args = tuple(
                sorted(args, key=lambda a: [self.order[x.name] for x in self.values[a].axes if x.name in kept])
            )
        if step.option.loop is not None:
            op = self.closing_op(edge)
            name = self.fresh(wanted or "acc")
            monoid = edge.fn if edge.kind == "reduce" else "sum"
            section.steps.append(Accumulator(self.equation(name, op, *args), monoid))  # type: ignore[arg-type]
            self.names[key] = name
        else:
            self.names[key] = self.compute(section, edge, args, wanted)

    def load(self, section: Section, c: int) -> str:
        """A tile of an input (under the axes of this use, if it is an alias) or of a materialised value."""
        leaf = next((e.leaf for e in self.context.closure.classes[c].edges if is_leaf_edge(e)), None)
        stored = self.context.tensors[self.context.names[c] if leaf is None else self.context.inputs[str(leaf[0])]]
        dims = stored.dims
        if isinstance(leaf, v.Load):
            axes = iter([self.context.axes[a] for a, _ in leaf.tokens])
            dims = tuple(tuple(next(axes) for _ in d) for d in stored.dims)
            used = tuple(x for d in dims for x in d)
            if used != stored.axes and set(used) == set(stored.axes):  # a load cannot say that: an alias can
                stored = self.context.alias(stored.name, used)
                self.kernel_level.add(stored.name)
                dims = stored.dims
        name = self.fresh(self.tile_name(stored.name))
        self.values[name] = Tensor(name, dims, stored.dtype)
        section.loads.append(Load(self.values[name], stored.name))
        return name

    def closing_op(self, edge: Edge) -> Op:
        axes = self.context.axis_names(edge.axes)
        if edge.kind == "product":
            return Contract(axes)
        return Reduce("sum" if edge.kind == "sum" else edge.fn, axes)  # type: ignore[arg-type]

    def compute(self, section: Section, edge: Edge, args: tuple[str, ...], wanted: str) -> str:
        """The equations of one edge."""
        match edge.kind:
            case "product" if not edge.axes:
                return self.emit(section, wanted or "t", Elementwise("mul"), *args)
            case "product" | "sum" | "reduce":
                return self.emit(section, wanted or "t", self.closing_op(edge), *args)
            case "add":
                result = args[0]
                for i, other in enumerate(args[1:], 2):
                    result = self.emit(
                        section, (wanted if i == len(args) else "") or "t", Elementwise("add"), result, other
                    )
                return result
            case "call":
                return self.emit(section, wanted or edge.fn[:4], call_op(edge), *args)
            case "load":
                assert isinstance(edge.leaf, v.Load)
                return self.emit(section, wanted or "i", Iota(self.context.axes[edge.leaf.tokens[0][0]]))
            case "number":
                raise AssertionError("coefficients are written where they are used")

    def number_child(self, edge: Edge) -> tuple[int, Number] | None:
        """The operand of a product that is a coefficient, by position."""
        if edge.kind == "product" and not edge.axes:
            for i, x in enumerate(edge.children):
                for e in self.context.closure.classes[x].edges:
                    if e.kind == "number" and isinstance(e.leaf, Number):
                        return i, e.leaf
        return None

    def scaled(self, section: Section, number: Number, other: str, wanted: str) -> str:
        """`number * other`; a coefficient -1 is a negation, 1 / |k| a division."""
        if number == Number(Fraction(-1)):
            return self.emit(section, wanted or "t", Elementwise("neg"), other)
        if number.coefficient == 1 and all(p < 0 for _, p in number.sizes):
            size = self.scalar(section, Number(Fraction(1), tuple((a, -p) for a, p in number.sizes)))
            return self.emit(section, wanted or "t", Elementwise("div"), other, size)
        return self.emit(section, wanted or "t", Elementwise("mul"), other, self.scalar(section, number))

    # -- splits

    def store_partial(self, step: Chosen) -> None:
        name = self.names[step.entry, False]
        split = self.split()
        assert split is not None
        target = self.fresh(f"{name}_parts")
        self.context.partials.add(target)
        has = {a.name for a in self.values[name].axes}
        missing = tuple(self.context.axes[a] for a in self.d.roles.grid if self.context.axes[a].name not in has)
        if missing:  # each block writes its own copy
            name = self.emit(self.before[self.last], f"{name}_wide", Broadcast(missing), name)
        inner = self.values[name]
        stored = Tensor(target, ((split.part,), *inner.dims), inner.dtype)
        self.partial.append((step.entry, Store(name, target, "partial"), stored))

    def combine_grid(
        self, grid: tuple[tuple[str, int], ...], split: Split, apart: Sequence[Axis]
    ) -> tuple[tuple[str, int], ...]:
        """Smaller tiles than the loop's, because a block of the combine holds all parts at once.  Where these do not
        do, axes along which the combine computes each entry apart are cut too."""
        tiles = dict(grid)
        left = [a for a in apart if a.name not in tiles and representative(a.size) > 1]

        def elements() -> int:
            held = []
            for _, _, stored in self.partial:
                sizes = [tiles.get(a.name, representative(a.size)) for a in stored.axes if a.name != split.part.name]
                held.append(split.parts * math.prod(sizes))
            return max(held, default=0)

        while elements() > COMBINE_TILE:
            if all(t == 1 for t in tiles.values()):
                if not left:
                    break
                axis = left.pop(0)
                tiles[axis.name] = 2 ** (representative(axis.size) - 1).bit_length()
            widest = max(tiles, key=lambda a: tiles[a])
            tiles[widest] //= 2
        return tuple(tiles.items())

    def combine(self, grid: tuple[tuple[str, int], ...], split: Split) -> BlockGraph:
        """Loads the partial results, closes the part axis by the same monoid, and computes what lies above."""
        section = self.after
        for entry, _, stored in self.partial:
            edge = self.chosen[entry].option.edge
            assert edge is not None
            loaded = self.fresh(stored.name.removesuffix("s"))
            self.values[loaded] = Tensor(loaded, stored.dims, stored.dtype)
            section.loads.append(Load(self.values[loaded], stored.name))
            kind = edge.fn if edge.kind == "reduce" else "sum"
            whole = self.emit(section, f"{self.names[entry, False]}_all", Reduce(kind, (split.part.name,)), loaded)  # type: ignore[arg-type]
            self.names[entry, True] = whole
            for other in self.chosen:
                if other[0] == entry[0]:
                    self.names[other, True] = whole
        for step in sorted(self.d.steps, key=lambda s: (self.position[s.entry[0]], s.entry[1])):
            edge = step.option.edge
            number = edge is not None and edge.kind == "number"
            if step.entry[1] > self.last and not number and (step.entry, True) not in self.names:
                self.place(step, section, combining=True)
        stores = self.stores(section, combining=True)
        written = {a.name for s in stores for a in self.values[s.value].axes}
        if split.axis in written:
            grid = (*grid, (split.axis, {self.context.axes[a].name: t for a, t in self.d.tiles}[split.axis]))
        reduced = {
            a for e in equations_of(tuple(section.steps)) if isinstance(e.op, Reduce | Contract) for a in e.op.axes
        }
        held = [stored.axes for _, _, stored in self.partial] + [self.values[s.value].axes for s in stores]
        apart = [a for a in held[0] if a.name not in reduced and all(a in axes for axes in held)]
        grid = self.combine_grid(grid, split, apart)
        return BlockGraph(grid, None, (), self.loads(section), tuple(section.steps), stores)


def call_op(edge: Edge) -> Op:
    """The operator of an opaque call."""
    attrs = edge.attrs
    match edge.fn:
        case "inv":
            return Elementwise("reciprocal")
        case "compare":
            return Compare(attrs[0])  # type: ignore[arg-type]
        case "select":
            return Select()
        case "masked_exp":
            return MaskedExp()
        case "cast":
            return Cast(DType(attrs[0]))
        case _:
            return Elementwise(edge.fn, attrs)  # type: ignore[arg-type]


# -- tidying


def tidied(block: BlockGraph) -> BlockGraph:
    """a * (1/b) -> a / b and a + (-b) -> a - b, where the inner value has no other use; then unused steps go."""
    combine = tidied(block.combine) if block.combine else None
    passes = []
    uses = _uses(block)
    for p in block.passes:
        passes.append(Pass(p.loops, p.loads, _merged(p.body, uses)))
    epilogue = _merged(block.epilogue, uses)
    return BlockGraph(block.grid, block.split, tuple(passes), block.loads, epilogue, block.stores, combine)


def _uses(block: BlockGraph) -> dict[str, int]:
    count: dict[str, int] = {}
    for s in block.steps():
        equation = s.equation if isinstance(s, Accumulator) else s
        assert isinstance(equation, Equation)
        for a in equation.args:
            count[a] = count.get(a, 0) + 1
    for store in block.stores:
        count[store.value] = count.get(store.value, 0) + 1
    return count


_FUSIONS = {("mul", "reciprocal"): "div", ("add", "neg"): "sub"}


def _merged(steps: tuple[Step, ...], uses: Mapping[str, int]) -> tuple[Step, ...]:
    inner = {
        s.target.name: s
        for s in steps
        if isinstance(s, Equation) and isinstance(s.op, Elementwise) and len(s.args) == 1
    }
    gone: set[str] = set()
    result: list[Step] = []
    for s in steps:
        if isinstance(s, Equation) and isinstance(s.op, Elementwise) and s.op.fn in ("mul", "add"):
            for i in (1, 0):
                found = inner.get(s.args[i])
                if found is None or uses.get(found.target.name) != 1 or found.target.name in gone:
                    continue
                assert isinstance(found.op, Elementwise)
                fused = _FUSIONS.get((s.op.fn, found.op.fn))
                if fused:
                    s = Equation(s.targets, Elementwise(fused), (s.args[1 - i], found.args[0]))
                    gone.add(found.target.name)
                    break
        result.append(s)
    return tuple(s for s in result if not (isinstance(s, Equation) and s.target.name in gone))


# -- kernel level


def build(context: Context, plan: Sequence[Choice], roots: Mapping[int, Sequence[str]]) -> KernelGraph:
    """The μGraph of a plan.  `roots` gives the kernel-level names that each target class must have.  Operators outside
    the calculus run as library calls, as soon as their operands are there."""
    program = context.program
    context = replace(context, names=dict(context.names), tensors=dict(context.tensors), partials=set(), aliases=[])
    ready = {i.name for i in program.inputs}
    equations: list[Equation] = []
    waiting = list(context.boundaries)
    made = {t for c in plan if c.derivations for r in c.roots for t in roots.get(r, ())}
    joined = joints(context.boundaries, made, (o.value for o in program.outputs))

    def run_boundaries() -> None:
        for b in list(waiting):
            if all(a in ready for a in b.args):
                free = is_free(b) or b.targets[0].name in joined
                equations.append(b if free else library_equation(b, context.tensors))
                ready.update(t.name for t in b.targets)
                waiting.remove(b)

    for n, choice in enumerate(plan):
        run_boundaries()
        targets: dict[int, Sequence[str]] = {}
        for root in choice.roots:
            unnamed = f"{MATERIALISED}{n}" if len(choice.roots) == 1 else f"{MATERIALISED}{n}_{len(targets)}"
            targets[root] = roots.get(root) or [context.names.get(root, unnamed)]
            context.names[root] = targets[root][0]
            if root not in roots:
                name = targets[root][0]
                context.tensors[name] = tensor(name, context.class_axes(root), context.dtypes.get(root, context.dtype))
        launch = launch_equation(context, choice, targets)
        equations += [e for e in context.aliases if e not in equations]
        equations.append(launch)
        if isinstance(choice.how, LibraryCall):
            equations += copies(context, targets[choice.roots[0]])
        ready.update(t for ts in targets.values() for t in ts)
    run_boundaries()
    return KernelGraph(program.name, program.inputs, _needed(equations, program), program.outputs)


def _needed(equations: Sequence[Equation], program: Program) -> tuple[Equation, ...]:
    """Without views that nothing reads."""
    used = {o.value for o in program.outputs}
    kept: list[Equation] = []
    for e in reversed(equations):
        if not is_free(e) or any(t.name in used for t in e.targets):
            kept.append(e)
            used.update(e.args)
    return tuple(reversed(kept))


def launch_equation(context: Context, choice: Choice, targets: Mapping[int, Sequence[str]]) -> Equation:
    calls = isinstance(choice.how, LibraryCall)
    out = tuple(context.tensors[t] for r in choice.roots for t in targets[r][: 1 if calls else None])
    if isinstance(choice.how, Edge):
        return contraction_equation(context, choice.how, out)
    if isinstance(choice.how, Added):
        return added_equation(context, choice.how, out)
    if isinstance(choice.how, Attention):
        return attention_equation(context, choice.how, out)
    blocks = tuple(
        tidied(BlockBuilder(context, d, {r: targets[r] for r in d.roots}).build()) for d in choice.derivations
    )
    partial = {s.target for b in blocks for s in b.stores if s.kind == "partial"}
    loads = [ld for b in blocks for ld in b.all_loads() + (b.combine.all_loads() if b.combine else ())]
    args = tuple(dict.fromkeys(ld.source for ld in loads if ld.source not in partial))
    return Equation(out, Kernel(blocks), args)


def copies(context: Context, names: Sequence[str]) -> list[Equation]:
    """A library call gives one tensor; the other names of its value are views or casts of it."""
    first = context.tensors[names[0]]
    found = []
    for other in (context.tensors[n] for n in names[1:]):
        if other.dtype is first.dtype:
            found.append(Equation((other,), Transpose(), (first.name,)))
        else:
            found.append(library_equation(Equation((other,), Cast(other.dtype), (first.name,)), context.tensors))
    return found


def source_name(context: Context, c: int) -> str:
    """The kernel-level tensor that holds a class."""
    leaf = next((e.leaf for e in context.closure.classes[c].edges if is_leaf_edge(e)), None)
    name = context.names[c] if leaf is None else context.inputs[str(leaf[0])]
    if isinstance(leaf, v.Load):
        return context.alias(name, tuple(context.axes[a] for a, _ in leaf.tokens)).name
    return name


def attention_equation(context: Context, a: Attention, out: tuple[Tensor, ...]) -> Equation:
    """Attention as a library call.  Its meaning is a program in the form that `transpiler.attention` knows: what the
    scale and the mask need, then scores, weights, their sum, their quotient, and the product with the values."""
    writer = _Meaning(context)
    scale = None if a.scale is None else writer.value(a.scale)
    bias = None if a.bias is None else writer.operand(a.bias)
    mask = None if a.mask is None else writer.value(a.mask)
    query, keys, values = (writer.operand(x) for x in (a.query, a.keys, a.values))
    (key, depth) = context.axis_names((a.key, a.depth))
    scores = writer.emit(Contract((depth,)), query, keys)
    if scale is not None:
        scores = writer.emit(Elementwise("mul"), scores, scale)
    if bias is not None:
        scores = writer.emit(Elementwise("add"), scores, bias)
    weights = writer.emit(MaskedExp(), scores, mask) if mask else writer.emit(Elementwise("exp"), scores)
    total = writer.emit(Reduce("sum", (key,)), weights)
    share = writer.emit(Elementwise("div"), weights, total)
    writer.emit(Contract((key,)), share, values)
    return writer.call(ATTENTION, out)


def contraction_equation(context: Context, e: Edge, out: tuple[Tensor, ...]) -> Equation:
    """A contraction as a library call, with a cast where the result is stored in another type."""
    op = Contract(context.axis_names(e.axes))
    args = tuple(source_name(context, x) for x in e.children)
    (t,) = infer(op, [type_of(context.tensors[a]) for a in args])
    if t.dtype is out[0].dtype:
        return library_equation(Equation(out, op, args), context.tensors)
    writer = _Meaning(context)
    writer.emit(op, *map(writer.operand, e.children))
    return writer.call(op_text(op), out)


def added_equation(context: Context, a: Added, out: tuple[Tensor, ...]) -> Equation:
    """A contraction plus a value as one library call, in the form that `transpiler.torch` knows."""
    writer = _Meaning(context)
    product = writer.emit(Contract(context.axis_names(a.product.axes)), *map(writer.operand, a.product.children))
    writer.emit(Elementwise("add"), product, writer.operand(a.other))
    return writer.call(ADDED, out)


class _Meaning:
    """Equations of a library call's meaning, and the kernel-level tensors that it reads."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.inputs: list[str] = []
        self.equations: list[Equation] = []
        self.types: dict[str, Tensor] = {}
        self.order = context.axis_order()

    def operand(self, c: int) -> str:
        """A class that lies in memory."""
        name = source_name(self.context, c)
        if name not in self.inputs:
            self.inputs.append(name)
        self.types[name] = self.context.tensors[name]
        return name

    def call(self, name: str, out: tuple[Tensor, ...]) -> Equation:
        """The call that computes the last value."""
        *equations, last = self.equations
        result = last.target
        if result.dtype is out[0].dtype:
            equations.append(replace(last, targets=out[:1]))
        else:
            equations += [last, Equation(out[:1], Cast(out[0].dtype), (result.name,))]
        inputs = tuple(Input(self.context.tensors[n], Storage(self.context.tensors[n].dtype)) for n in self.inputs)
        outputs = tuple(Output(out[0].name, Storage(t.dtype)) for t in out)
        return Equation(out, Library(name, Program(name, inputs, tuple(equations), outputs)), tuple(self.inputs))

    def value(self, c: int) -> str:
        """A class as an operand, or computed from indices, sizes and numbers."""
        edges = self.context.closure.classes[c].edges
        if any(map(is_leaf_edge, edges)):
            return self.operand(c)
        edge = next(iter(edges))
        if isinstance(edge.leaf, Number):
            return self.number(edge.leaf)
        if isinstance(edge.leaf, v.Load):
            return self.emit(Iota(self.context.axes[edge.leaf.tokens[0][0]]))
        args = [self.value(x) for x in edge.children]
        axes = self.context.axis_names(edge.axes)
        match edge.kind:
            case "call":
                return self.emit(call_op(edge), *args)
            case "product" if axes:
                return self.emit(Contract(axes), *args)
            case "product" | "add":
                fn = Elementwise("mul" if edge.kind == "product" else "add")
                return reduce(lambda a, b: self.emit(fn, a, b), args)
            case _:
                return self.emit(Reduce("sum" if edge.kind == "sum" else edge.fn, axes), *args)  # type: ignore[arg-type]

    def number(self, number: Number) -> str:
        result = self.emit(Const(number.coefficient))
        for axis, power in number.sizes:
            fn = Elementwise("mul" if power > 0 else "div")
            for _ in range(abs(power)):
                result = self.emit(fn, result, self.emit(SizeOf(self.context.axes[axis])))
        return result

    def emit(self, op: Op, *args: str) -> str:
        (t,) = infer(op, [type_of(self.types[a]) for a in args])
        used = {*self.types, *self.context.tensors}
        name = next(n for i in itertools.count() if (n := f"s{i}") not in used)
        axes = tuple(sorted(t.axes, key=lambda a: self.order.get(a.name, len(self.order))))
        self.types[name] = tensor(name, axes, t.dtype)
        self.equations.append(Equation((self.types[name],), op, args))
        return name


def library_equation(e: Equation, tensors: Mapping[str, Tensor]) -> Equation:
    """One operator as a library call, whose meaning is a program of that one equation."""
    args = tuple(dict.fromkeys(e.args))
    inner = Program(
        op_text(e.op),
        tuple(Input(tensors[a], Storage(tensors[a].dtype)) for a in args),
        (Equation(e.targets, e.op, e.args),),
        tuple(Output(t.name, Storage(t.dtype)) for t in e.targets),
    )
    return Equation(e.targets, Library(op_text(e.op), inner), args, where=e.where)


def baseline(program: Program) -> KernelGraph:
    """The program as it stands, as one library call."""
    tensors = program.tensors()
    given = {i.name for i in program.inputs}
    computed = [o for o in dict.fromkeys(o.value for o in program.outputs) if o not in given]
    inner = Program(
        program.name, program.inputs, program.equations, tuple(Output(o, Storage(tensors[o].dtype)) for o in computed)
    )
    call = Equation(
        tuple(tensors[o] for o in computed), Library(program.name, inner), tuple(i.name for i in program.inputs)
    )
    return KernelGraph(program.name, program.inputs, (call,) if computed else (), program.outputs)
