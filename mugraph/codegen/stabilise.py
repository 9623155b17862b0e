"""Scaled numbers: exponentials that are summed become finite for every input.

    stabilise(graph, cuts=()) -> KernelGraph

A value that contains an exponential is carried as v and an exponent m, meaning `v * exp(m)` (and 0 where a mask is
false).  `exp(x)` starts as (1, x).  Products add exponents, reciprocals negate them; equal exponents of opposite sign
cancel.  A sum over an axis that m has brings its terms to a common exponent first:

    sum_s v * exp(m)   ->   (sum_s v * exp(m - m'), m')    with m' = max_s m

The part of the exponent that lacks the axis stays outside, so no maximum is taken of what is shifted already, and all
sums over one exponential share m' and the factor exp(m - m').  Where a quotient leaves m - m', as in a softmax, that
factor is multiplied in and the value is plain from there on.

A row of -inf has no finite maximum, but m' is the least finite number there, so that exp(-inf - m') is 0 and no NaN: a
softmax of such a row is 0/0 as in PyTorch, its logarithm of sums -inf, and a looped tile of it adds nothing.  Where the
sum is for a logarithm, +inf is cut to the greatest number too, which gives inf as in PyTorch; in a softmax it gives
NaN, as there.

Over a looped axis m' is a running maximum and the sum a rescaled accumulator; over a split, the parts' m' are stored
beside the partial sums, and the combine applies the same rule.  What is left at a store is multiplied out.  The rule is
exact for every m', so one mechanism gives the softmax of a tile, the online softmax (Milakov and Gimelshein,
arXiv:1805.02867), its two-pass form and the combine of a split.  The result is verified like any other μGraph.

An exponential of a value that holds exponentials itself stays as it is: the verifier knows exp(a + b) = exp(a) * exp(b)
only for exponents without exponentials, and would refuse the shifted form.  A value at which the graph is cut for the
verifier is arbitrary to it, and holds none.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import reduce

from mugraph.codegen.passes import Names, flatten_threads
from mugraph.ir.graph import (
    Accumulator,
    BlockGraph,
    Equation,
    KernelGraph,
    Load,
    Monoid,
    Pass,
    Step,
    Store,
    equations_of,
)
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Const,
    Contract,
    Elementwise,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Reduce,
    Select,
)  # fmt: skip
from mugraph.ir.shift import OPAQUE
from mugraph.ir.types import GREATEST, DType, Tensor, tensor

# The maximum over no element: finite, so that differences of two such maxima are 0 and not NaN.
LOWEST = Const(Fraction(-(10**30)))


Terms = tuple[tuple[int, str], ...]
# An exponent as (sign, structure) of its terms, and where it counts.
Bounded = tuple[Counter[object], str | None]


@dataclass(frozen=True)
class Scaled:
    """`v * exp(sum of sign * term)`, and 0 where `mask` is false.  v is None for 1."""

    v: str | None
    terms: Terms = ()
    mask: str | None = None

    @property
    def plain(self) -> bool:
        return self.v is not None and not self.terms and self.mask is None


def stabilise(graph: KernelGraph, cuts: Sequence[str] = ()) -> KernelGraph:
    """The graph with every summed exponential in scaled form; the same graph where there is none.  The values of `cuts`
    lie in memory as they are."""
    taken = set(graph.tensors())
    for equation in graph.kernels():
        assert isinstance(equation.op, Kernel)
        taken |= {s.target for b in equation.op.blocks for s in b.stores}
    held = holding(graph.equations, cuts=cuts)
    between = _between_kernels(graph) - set(cuts)
    exponents: dict[str, Exponent] = {}
    equations = []
    for equation in graph.equations:
        if isinstance(equation.op, Kernel):
            given = {a: exponents[a] for a in equation.args if a in exponents}
            made: dict[str, Exponent] = {}
            blocks = tuple(_stabilised(b, taken, held, given, between, made) for b in equation.op.blocks)
            args = dict.fromkeys([*equation.args, *(e.target for e in given.values())])
            targets = dict.fromkeys([*equation.targets, *(e.tensor for e in made.values())])
            equation = replace(equation, op=Kernel(blocks), args=tuple(args), targets=tuple(targets))
            exponents |= made
        equations.append(equation)
    return replace(graph, equations=tuple(equations))


@dataclass(frozen=True)
class Exponent:
    """What is stored beside a scaled value: the exponent's target, and the tensor there."""

    target: str
    tensor: Tensor


def _between_kernels(graph: KernelGraph) -> frozenset[str]:
    """Values in memory that only kernels of ours read, under their own axes, so that an exponent may lie beside."""
    outside = {o.value for o in graph.outputs}
    axes = {name: set(t.axes) for name, t in graph.tensors().items()}
    for e in graph.equations:
        if isinstance(e.op, Kernel):
            loads = [ld for b in e.op.blocks for ld in b.all_loads() + (b.combine.all_loads() if b.combine else ())]
            outside |= {ld.source for ld in loads if ld.source in axes and set(ld.value.axes) != axes[ld.source]}
        else:
            outside |= {*e.args, *(t.name for t in e.targets)}
    return frozenset(t.name for e in graph.kernels() for t in e.targets if t.name not in outside)


def _stabilised(
    block: BlockGraph,
    taken: set[str],
    held: set[str],
    given: Mapping[str, Exponent],
    between: frozenset[str],
    made: dict[str, Exponent],
) -> BlockGraph:
    """The block graph in scaled form.  `given`: the exponents of what it loads; `made` takes those that it stores."""
    flat = unique_names(flatten_threads(block))
    parts_held = held | _stored(block, held)
    combine = unique_names(flatten_threads(block.combine)) if block.combine else None
    logarithm = takes_logarithm([flat, combine] if combine else [flat], parts_held)
    writer = _Writer(flat, given, taken, held, between, logarithm)
    result = without_dead_steps(writer.rewritten()) if writer.active or writer.env else block
    partials = {s.target for s in block.stores if s.kind == "partial"}
    made |= {name: e for name, e in writer.exponents.items() if name not in partials}
    if combine:
        assert block.split
        parts = {
            name: Exponent(e.target, replace(e.tensor, dims=((block.split.part,), *e.tensor.dims)))
            for name, e in writer.exponents.items()
            if name in partials
        }
        combined = _Writer(combine, {**given, **parts}, taken, parts_held, between, logarithm)
        if combined.active or combined.env:
            result = replace(result, combine=without_dead_steps(combined.rewritten()))
            made |= combined.exponents
    return result


def takes_logarithm(blocks: Sequence[BlockGraph], held: set[str]) -> bool:
    """Whether a logarithm of sums of exponentials is taken, and what it is used for lacks the axes of the sums: a
    logarithm of a sum as a result, not the logarithm of a softmax."""
    steps = [[s.equation if isinstance(s, Accumulator) else s for s in b.steps()] for b in blocks]
    closed = {a for part in steps for e in part if isinstance(e, Equation) and _is_sum(e.op) for a in e.op.axes}  # type: ignore[union-attr]
    found = False
    for block, part in zip(blocks, steps, strict=True):
        inner, after = _held_in(block, held), set[str]()
        for e in part:
            assert isinstance(e, Equation)
            if after & set(e.args) or (e.op == Elementwise("log") and e.args[0] in inner):
                after.add(e.target.name)
                found = True
                if closed & {a.name for a in e.target.axes}:
                    return False
    return found


def holding(equations: Iterable[Equation], seeds: Iterable[str] = (), cuts: Iterable[str] = ()) -> set[str]:
    """The values that hold exponentials, if the seeds do and the cuts do not: by dataflow through kernels and library
    calls too."""
    held = set(seeds)
    for e in equations:
        match e.op:
            case MaskedExp() | Elementwise("exp"):
                held.add(e.target.name)
            case Compare():
                pass
            case Elementwise(fn) if fn in OPAQUE:
                pass
            case Library(_, p):
                inner = holding(p.equations, [i.name for i, a in zip(p.inputs, e.args, strict=True) if a in held])
                held |= {t.name for t, o in zip(e.targets, p.outputs, strict=True) if o.value in inner}
            case Kernel(blocks):
                held |= {name for b in blocks for name in _stored(b, held)}
            case _ if held.intersection(e.args):
                held |= {t.name for t in e.targets}
        held.difference_update(cuts)
    return held


def _held_in(block: BlockGraph, held: set[str]) -> set[str]:
    """The tile-level values that hold exponentials, if the sources `held` do."""
    loads = [ld.value.name for ld in block.all_loads() if ld.source in held]
    return holding(equations_of(tuple(block.steps())), loads)


def _stored(block: BlockGraph, held: set[str]) -> set[str]:
    """The targets of stores that hold exponentials, those of the combine included."""
    inner = _held_in(block, held)
    stored = {s.target for s in block.stores if s.value in inner}
    return stored | _stored(block.combine, held | stored) if block.combine else stored


def without_dead_steps(block: BlockGraph) -> BlockGraph:
    """The block graph less the loads and steps that no store needs.  Names must be unique."""
    needed = {s.value for s in block.stores}

    def kept(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        found: list[Step] = []
        for step in reversed(steps):
            equation = step.equation if isinstance(step, Accumulator) else step
            assert isinstance(equation, Equation)
            if equation.target.name in needed:
                needed.update(equation.args)
                if isinstance(step, Accumulator) and step.scale:
                    needed.add(step.scale)
                found.append(step)
        return tuple(reversed(found))

    def used(loads: tuple[Load, ...]) -> tuple[Load, ...]:
        return tuple(ld for ld in loads if ld.value.name in needed)

    epilogue = kept(block.epilogue)
    bodies = [kept(p.body) for p in reversed(block.passes)][::-1]
    passes = tuple(replace(p, loads=used(p.loads), body=b) for p, b in zip(block.passes, bodies, strict=True))
    return replace(block, passes=passes, loads=used(block.loads), epilogue=epilogue)


def unique_names(block: BlockGraph) -> BlockGraph:
    """The block graph with another name for what a later pass computes under a name that an earlier one uses."""
    taken: set[str] = set()
    passes = []
    alive: dict[str, str] = {}

    def fresh(name: str, env: dict[str, str]) -> str:
        new, i = name, 1
        while new in taken:
            new, i = f"{name}_{i}", i + 1
        taken.add(new)
        env[name] = new
        return new

    def renamed(step: Step, env: dict[str, str]) -> Step:
        equation = step.equation if isinstance(step, Accumulator) else step
        assert isinstance(equation, Equation)
        args = tuple(env[a] for a in equation.args)
        targets = tuple(replace(t, name=fresh(t.name, env)) for t in equation.targets)
        equation = replace(equation, targets=targets, args=args)
        if not isinstance(step, Accumulator):
            return equation
        return replace(step, equation=equation, scale=env[step.scale] if step.scale else None)

    def loaded(loads: tuple[Load, ...], env: dict[str, str]) -> tuple[Load, ...]:
        return tuple(replace(ld, value=replace(ld.value, name=fresh(ld.value.name, env))) for ld in loads)

    stores = {s.value: s for s in block.stores}
    values: dict[str, str] = {}
    for p in block.passes:
        env = dict(alive)
        loads = loaded(p.loads, env)
        body = tuple(renamed(s, env) for s in p.body)
        if p.loops:
            dying = {t.name for s in p.body if isinstance(s, Equation) for t in s.targets}
            dying |= {ld.value.name for ld in p.loads}
            values |= {n: env[n] for n in dying & stores.keys() if n not in values}
            alive |= {a.target.name: env[a.target.name] for a in p.accumulators}
        else:
            alive = env
        passes.append(replace(p, loads=loads, body=body))
    loads = loaded(block.loads, alive)
    epilogue = tuple(renamed(s, alive) for s in block.epilogue)
    kept = tuple(replace(s, value=values.get(s.value) or alive[s.value]) for s in block.stores)
    return replace(block, passes=tuple(passes), loads=loads, epilogue=epilogue, stores=kept)


CHAIN = ("mul", "div", "add", "sub", "neg", "square", "reciprocal")


def _is_chain(op: Op) -> bool:
    """Whether a scaled number goes through the operator without being multiplied out."""
    return isinstance(op, Cast | Select) or (isinstance(op, Elementwise) and op.fn in CHAIN)


def _is_product(op: Op) -> bool:
    if isinstance(op, Elementwise):
        return op.fn in ("mul", "div", "square", "reciprocal")
    return isinstance(op, Cast) and op.dtype.is_float


def _is_sum(op: Op) -> bool:
    return isinstance(op, Contract) or (isinstance(op, Reduce) and op.kind in ("sum", "mean"))


def _is_exp(op: Op) -> bool:
    return isinstance(op, MaskedExp) or (isinstance(op, Elementwise) and op.fn == "exp")


def _mask_of(e: Equation) -> str | None:
    return e.args[1] if isinstance(e.op, MaskedExp) else None


class _Facts:
    """What is known of a block graph's values before anything changes."""

    def __init__(self, block: BlockGraph, held: set[str]) -> None:
        self.tensors = block.tensors()
        self.held = _held_in(block, held)
        self.known: dict[str, int] = {}
        self.numbers: dict[object, int] = {}
        self.sources = {ld.value.name: ld for ld in block.all_loads()}
        self.steps: dict[str, Equation] = {}
        self.accumulators: dict[str, Accumulator] = {}
        for step in block.steps():
            equation = step.equation if isinstance(step, Accumulator) else step
            assert isinstance(equation, Equation)
            self.steps[equation.target.name] = equation
            if isinstance(step, Accumulator):
                self.accumulators[equation.target.name] = step

    def active(self, seeds: set[str]) -> set[str]:
        """The exponentials to scale: those that a sum closes an axis of, and those that meet a scaled factor."""
        wild = {
            n
            for n, e in self.steps.items()
            if _is_exp(e.op) and e.args[0] not in self.held and not self.below_zero(e.args[0], _mask_of(e))
        }
        chosen = {n for n in wild if self.is_summed(n, {a.name for a in self.tensors[self.steps[n].args[0]].axes})}
        while True:
            scaled = set(seeds)
            met: set[str] = set()
            for name, e in self.steps.items():
                through = _is_chain(e.op) or _is_sum(e.op)
                if name in chosen or (through and scaled & set(e.args)):
                    scaled.add(name)
                if through and scaled & set(e.args):
                    met |= {x for a in e.args for x in self.exponentials(a)} & wild
            if met <= chosen:
                return chosen
            chosen |= met

    def exponentials(self, name: str) -> set[str]:
        """The exponentials that the value is a product or sum of."""
        e = self.steps.get(name)
        if e is None or name in self.accumulators:
            return set()
        if _is_exp(e.op):
            return {name}
        return {x for a in e.args for x in self.exponentials(a)} if _is_chain(e.op) else set()

    def is_summed(self, name: str, axes: set[str]) -> bool:
        for user, e in self.steps.items():
            if name in e.args:
                if _is_sum(e.op):
                    assert isinstance(e.op, Contract | Reduce)
                    if set(e.op.axes) & axes:
                        return True
                elif _is_chain(e.op) and self.is_summed(user, axes):
                    return True
        return False

    def below_zero(self, name: str, mask: str | None) -> bool:
        """Whether the value is provably at most 0 where the mask is true: a value less its own maximum, or the
        negation of a square."""
        e = self.steps.get(name)
        match e:
            case Equation(_, Elementwise("sub"), (z, m)):
                return self.bounds(m, self.structure(z), mask)
            case Equation(_, Elementwise("neg"), (x,)):
                return self.above_zero(x)
            case Equation(_, Elementwise("mul" | "div"), (x, y)):
                return (self.above_zero(x) and self.negative(y)) or (self.negative(x) and self.above_zero(y))
            case _:
                return False

    def bounds(self, m: str, z: int, mask: str | None) -> bool:
        """Whether m is at least the value of structure z: a maximum that ranges over it."""
        if self.structure(m) == z:
            return True
        match self.steps.get(m):
            case Equation(_, Reduce("max"), (x,)):
                return self.bounds(x, z, mask)
            case Equation(_, Elementwise("max"), (x, y)):
                return self.bounds(x, z, mask) or self.bounds(y, z, mask)
            case Equation(_, Select(), (seen, x, _)):
                return seen == mask and self.bounds(x, z, mask)
            case _:
                return False

    def above_zero(self, name: str) -> bool:
        match self.steps.get(name):
            case Equation(_, Elementwise("square" | "abs" | "relu" | "sqrt" | "exp" | "sigmoid")):
                return True
            case Equation(_, Elementwise("mul"), (x, y)):
                return x == y or (self.above_zero(x) and self.above_zero(y))
            case Equation(_, Const(value)):
                return value >= 0
            case Equation(_, Reduce(), (x,)):
                return self.above_zero(x)
            case _:
                return False

    def negative(self, name: str) -> bool:
        e = self.steps.get(name)
        return e is not None and isinstance(e.op, Const) and e.op.value <= 0

    def structure(self, name: str) -> int:
        """A number for how the value comes from loads, so that a pass's recomputation is known for what it is."""
        if name not in self.known:
            key: object = name
            if name in self.sources:
                ld = self.sources[name]
                key = (ld.source, frozenset(a.name for a in ld.value.axes))
            elif name in self.steps:
                e, accumulator = self.steps[name], self.accumulators.get(name)
                key = (e.op, accumulator and accumulator.monoid, *map(self.structure, e.args))
            self.known[name] = self.numbers.setdefault(key, len(self.numbers))
        return self.known[name]


class _Writer:
    """Rewrites one block graph. `logarithm`: sums of exponentials are for logarithms. `given` maps what it loads to
    the exponents stored beside; what it stores to a target of `between`, or as a partial result, it stores with its
    exponent."""

    def __init__(
        self,
        block: BlockGraph,
        given: Mapping[str, Exponent],
        taken: set[str],
        held: set[str],
        between: frozenset[str],
        logarithm: bool,
    ) -> None:
        self.block, self.taken, self.between, self.logarithm = block, taken, between, logarithm
        self.facts = _Facts(block, held)
        self.exponents: dict[str, Exponent] = {}  # target -> what is stored beside it
        self.written: dict[str, str] = {}  # exponent -> its target
        self.names = Names(dict(self.facts.tensors))
        self.env: dict[str, Scaled] = {}
        self.steps: list[Step] = []
        self.memo: dict[object, str] = {}
        self.bounds: dict[str, list[Bounded]] = {}  # maximum -> what it is a maximum of
        self.tops: dict[object, str] = {}  # (exponent, mask, closed axes) -> its maximum
        self.origin: dict[tuple[int, str], str] = {}  # term -> the exponential of it
        self.settled: set[str] = set()  # products that exponentials are multiplied in
        self.alive: set[str] = set()
        self.pass_loads = [self.with_exponents(p.loads, given) for p in block.passes]
        self.loads = self.with_exponents(block.loads, given)
        self.active = self.facts.active(set(self.env))
        for name in self.active:
            del self.names.values[name]

    def with_exponents(self, loads: tuple[Load, ...], given: Mapping[str, Exponent]) -> tuple[Load, ...]:
        """The loads, before them those of the exponents of what they load, each once."""
        found: dict[str, Load] = {}
        for ld in loads:
            if ld.source not in given:
                continue
            e = given[ld.source]
            if e.target not in found:
                t = Tensor(self.names.fresh(f"{e.target.removesuffix('_parts')}_in"), e.tensor.dims, DType.f32)
                self.names.values[t.name] = t
                found[e.target] = Load(t, e.target)
            self.env[ld.value.name] = Scaled(ld.value.name, ((1, found[e.target].value.name),))
        return (*found.values(), *loads)

    # -- the block -----------------------------------------------------------------------------------------------

    def rewritten(self) -> BlockGraph:
        stores = list(self.block.stores)
        passes = []
        for p, loads in zip(self.block.passes, self.pass_loads, strict=True):
            self.open()
            for step in p.body:
                self.step(step)
            if p.loops:
                dying = {s.target.name for s in p.body if isinstance(s, Equation)}
                for i, store in enumerate(stores):
                    if store.value in dying:
                        stores[i] = replace(store, value=self.stored(store.value))
            body = tuple(self.steps)
            passes.append(Pass(p.loops, loads, body))
            if p.loops:
                self.alive |= {s.target.name for s in body if isinstance(s, Accumulator)}
            else:
                self.alive |= {ld.value.name for ld in loads} | {s.target.name for s in body if isinstance(s, Equation)}
        self.open()
        for step in self.block.epilogue:
            self.step(step)
        early = {t.name for p in passes if p.loops for s in p.body if isinstance(s, Equation) for t in s.targets}
        final: list[Store] = []
        for store in stores:
            if store.value in early:
                final.append(store)
            elif store.kind == "partial" or (store.kind == "write" and store.target in self.between):
                final += self.beside(store)
            else:
                final.append(replace(store, value=self.stored(store.value)))
        return replace(
            self.block,
            passes=tuple(passes),
            loads=self.loads,
            epilogue=tuple(self.steps),
            stores=tuple(dict.fromkeys(final)),
        )

    def open(self) -> None:
        self.steps, self.memo = [], {}
        self.tops = {key: top for key, top in self.tops.items() if top in self.alive}
        self.bounds = {top: of for top, of in self.bounds.items() if top in self.alive}

    def beside(self, store: Store) -> list[Store]:
        """A scaled result is stored with its exponent, once for all results that share it."""
        s = self.env.get(store.value, Scaled(store.value))
        if s.plain or s.v is None or s.mask is not None:
            return [replace(store, value=self.stored(store.value))]
        exponent = self.whole_over_grid(self.exponent(s.terms), self.facts.tensors[store.value])
        known = {e.tensor.name: e.target for e in self.exponents.values()}
        wish = f"{exponent}_parts" if store.kind == "partial" else f"{store.target}_exponent"
        target = known.get(exponent) or self.global_name(wish)
        held = self.names.values[exponent]
        self.exponents[store.target] = Exponent(
            target, replace(held, name=exponent if store.kind == "partial" else target)
        )
        return [Store(exponent, target, store.kind), replace(store, value=s.v)]

    def whole_over_grid(self, exponent: str, stored: Tensor) -> str:
        """The exponent, repeated along the grid axes that only the value beside it has: each block writes its own."""
        grid = {a for a, _ in self.block.grid}
        has = {a.name for a in self.names.values[exponent].axes}
        missing = tuple(a for a in stored.axes if a.name in grid and a.name not in has)
        return self.emit(f"{exponent}_wide", Broadcast(missing), exponent) if missing else exponent

    def global_name(self, wish: str) -> str:
        name, i = wish, 1
        while name in self.taken:
            name, i = f"{wish}_{i}", i + 1
        self.taken.add(name)
        return name

    # -- emission ------------------------------------------------------------------------------------------------

    def emit(self, wish: str, op: Op, *args: str) -> str:
        """A new equation in the open scope, or the value of an equal one."""
        key = (op, args)
        if key not in self.memo:
            equation = self.names.equation(wish, op, *args)
            self.steps.append(equation)
            self.memo[key] = equation.target.name
        return self.memo[key]

    def put(self, target: Tensor, op: Op, *args: str) -> str:
        """An equation for an old value, under its name."""
        self.steps.append(Equation((self.retyped(target, op, args),), op, args))
        return target.name

    def retyped(self, target: Tensor, op: Op, args: Sequence[str]) -> Tensor:
        """The old value with the axes that it has now: without an exponent it may have fewer."""
        (t,) = infer(op, [type_of(self.names.values[a]) for a in args])
        if {a.name for a in target.axes} != {a.name for a in t.axes}:
            target = tensor(target.name, t.axes, DType.f32)
        self.names.values[target.name] = target
        return target

    def axes(self, name: str) -> set[str]:
        return {a.name for a in self.names.values[name].axes}

    def scaled(self, name: str) -> Scaled:
        return self.env.get(name, Scaled(name))

    def exponent(self, terms: Terms) -> str:
        """The exponent as one value: a signed sum of terms."""
        positive = [t for sign, t in terms if sign > 0]
        negative = [t for sign, t in terms if sign < 0]
        if not positive:
            positive = [self.emit(f"{negative[0]}_neg", Elementwise("neg"), negative.pop(0))]
        total = positive[0]
        for term in positive[1:]:
            total = self.emit("exponent", Elementwise("add"), total, term)
        for term in negative:
            total = self.emit("exponent", Elementwise("sub"), total, term)
        return total

    def power(self, wish: str, exponent: str, mask: str | None) -> str:
        if mask is None:
            return self.emit(wish, Elementwise("exp"), exponent)
        return self.emit(wish, MaskedExp(), exponent, mask)

    def indicator(self, mask: str, value: str | None) -> str:
        """The value where the mask is true, else 0; None for 1."""
        value = value or self.emit("one", Const(Fraction(1)))
        return self.emit(f"{value}_seen", Select(), mask, value, self.emit("zero", Const(Fraction(0))))

    def whole(self, name: str) -> str:
        """The value itself: what is left of its exponent is multiplied out."""
        s = self.scaled(name)
        if s.terms:
            power = self.power(name if s.v is None else f"{name}_scale", self.exponent(s.terms), s.mask)
            return power if s.v is None else self.emit(f"{name}_whole", Elementwise("mul"), power, s.v)
        if s.mask is not None:
            return self.indicator(s.mask, s.v)
        return s.v or self.emit("one", Const(Fraction(1)))

    def stored(self, name: str) -> str:
        """The value itself, over all its axes: what cancelled may have been all that varied along one."""
        value = self.whole(name)
        missing = tuple(a for a in self.facts.tensors[name].axes if a.name not in self.axes(value))
        return self.emit(f"{value}_wide", Broadcast(missing), value) if missing else value

    def both(self, a: str | None, b: str | None) -> str | None:
        """The conjunction of two masks."""
        if a is None or b is None or a == b:
            return a or b
        return self.emit("mask", Elementwise("and"), a, b)

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> None:
        match step:
            case Accumulator(equation, "sum") if any(not self.scaled(a).plain for a in equation.args):
                self.summed(equation, accumulate=True)
            case Accumulator(equation):
                args = tuple(self.whole(a) for a in equation.args)
                self.steps.append(replace(step, equation=replace(equation, args=args)))
            case Equation():
                self.equation(step)
            case _:
                raise AssertionError(step)

    def equation(self, e: Equation) -> None:
        name = e.target.name
        if name in self.active:
            x = self.memo.setdefault(("value", self.facts.structure(e.args[0])), e.args[0])
            self.env[name] = Scaled(None, ((1, x),), _mask_of(e))
            self.origin.setdefault((1, x), name)
            return
        if _is_product(e.op) and self.settled.intersection(e.args):
            self.settled.add(name)
        parts = [self.scaled(a) for a in e.args]
        logarithm = isinstance(e.op, Elementwise) and e.op.fn == "log"
        if all(p.plain for p in parts) and not (logarithm and e.args[0] in self.settled):
            args = tuple(p.v or "" for p in parts)
            self.steps.append(replace(e, args=args))
            return
        match e.op:
            case op if _is_product(op) and (product := self.product(e, parts)):
                self.env[name] = self.settle(e, product)
            case Elementwise("neg"):
                one = parts[0].v or self.emit("one", Const(Fraction(1)))
                self.env[name] = replace(parts[0], v=self.put(e.target, e.op, one))
            case Broadcast() if parts[0].v and parts[0].mask is None:
                self.env[name] = replace(parts[0], v=self.put(e.target, e.op, parts[0].v))
            case Elementwise("log") if (unsettled := self.unsettled(e.args[0])).mask is None:
                log = self.emit(f"{name}_v", e.op, unsettled.v) if unsettled.v else None
                exponent = self.exponent(unsettled.terms) if unsettled.terms else None
                if log and exponent:
                    self.put(e.target, Elementwise("add"), log, exponent)
                else:
                    self.env[name] = Scaled(log or exponent)
            case Elementwise("add" | "sub"):
                self.added(e, parts)
            case Select() if self.is_zero(e.args[2]):
                self.env[name] = replace(parts[1], mask=self.both(parts[0].v, parts[1].mask))
            case Contract() | Reduce("sum" | "mean"):
                self.summed(e, accumulate=False)
            case _:
                args = tuple(self.whole(a) for a in e.args)
                self.steps.append(replace(e, args=args))

    def is_zero(self, name: str) -> bool:
        e = self.facts.steps.get(name)
        return e is not None and isinstance(e.op, Const) and e.op.value == 0

    # -- products ------------------------------------------------------------------------------------------------

    def product(self, e: Equation, parts: Sequence[Scaled]) -> _Product | None:
        """What a product, quotient or cast of scaled numbers is; None for a quotient by 0 where a mask is false."""
        match e.op, parts:
            case Elementwise("square"), (a,):
                return _Product(_values(a, a), (), _sum(a.terms, a.terms, 1), a.mask)
            case Elementwise("mul"), (a, b):
                return _Product(_values(a, b), (), _sum(a.terms, b.terms, 1), self.both(a.mask, b.mask))
            case Elementwise("div"), (a, b) if b.mask is None:
                return _Product(_values(a), _values(b), _sum(a.terms, b.terms, -1), a.mask)
            case Elementwise("reciprocal"), (a,) if a.mask is None:
                return _Product((), _values(a), _sum((), a.terms, -1), None)
            case Cast(), (a,):
                return _Product(_values(a), (), a.terms, a.mask)
            case _:
                return None

    def settle(self, e: Equation, p: _Product) -> Scaled:
        """The product under its old name, with the exponentials that are shifted by their maximum multiplied in."""
        factors, terms, mask = self.shifted(p.terms, p.mask)
        tops = p.tops
        if factors:
            self.settled.add(e.target.name)
            tops = tuple(sorted((*factors, *tops), key=lambda v: len(self.axes(v))))
        return Scaled(self.ratio(tops, p.bottoms, lambda op, *args: self.put(e.target, op, *args)), terms, mask)

    def shifted(self, terms: Terms, mask: str | None) -> tuple[list[str], Terms, str | None]:
        """exp(x - m) for each x in the terms that stands with its negated maximum m, and what is left.  The factors
        are at most 1, and the first is 0 where the mask is false.  Under a greater maximum, as of a sum with another
        exponential, exp(x - top) is exp(x - m) * exp(m - top)."""
        factors: list[str] = []
        tops = [t for sign, t in terms if sign < 0 and t in self.bounds]
        while tops:
            top = tops.pop()
            if found := self.under(top, terms, mask):
                factors.append(self.factor(found, top, None if factors else mask))
                terms = _sum(terms, (*found, (-1, top)), -1)
            elif lower := next((m for m in self.lower(top) if self.under(m, terms, mask)), None):
                found = self.under(lower, terms, mask)
                factors.append(self.factor(found, lower, None if factors else mask))
                terms = _sum(_sum(terms, found, -1), ((1, lower),), 1)
                tops.append(top)
        return factors, terms, None if factors else mask

    def lower(self, top: str) -> Iterator[str]:
        """The maxima that `top` is the greater of."""
        return (m for m in self.bounds if self.under(top, ((1, m),), None))

    def under(self, top: str, terms: Terms, mask: str | None) -> Terms:
        """The terms of an exponent that `top` is a maximum of; none if it is of others, or of fewer elements."""
        for of, where in self.bounds.get(top, ()):
            wanted, found = of.copy(), []
            if where is not None and (mask is None or self.facts.structure(mask) != self.facts.structure(where)):
                continue
            for term in terms:
                if wanted[self.key(term)]:
                    wanted[self.key(term)] -= 1
                    found.append(term)
            if not wanted.total():
                return tuple(found)
        return ()

    def key(self, term: tuple[int, str]) -> object:
        return term[0], self.facts.structure(term[1])

    def factor(self, terms: Terms, top: str, mask: str | None) -> str:
        """exp(exponent - its maximum), named after the exponential it takes the place of."""
        exponent = self.exponent(terms)
        less = self.emit(f"{exponent}_less", Elementwise("sub"), exponent, top)
        wish = self.origin.get(terms[0]) if len(terms) == 1 else None
        return self.power(wish or f"{exponent}_exp", less, mask)

    def ratio(self, tops: Sequence[str], bottoms: Sequence[str], last: Callable[..., str]) -> str | None:
        """Product of the tops over product of the bottoms, None for 1; `last` writes the last operator."""
        operations: list[tuple[str, str | None]] = [("mul", v) for v in tops[1:]]
        operations += [("div" if tops else "reciprocal", v) for v in bottoms]
        value = tops[0] if tops else None
        for i, (fn, operand) in enumerate(operations):
            args = [v for v in (value, operand) if v]
            final = i == len(operations) - 1
            value = last(Elementwise(fn), *args) if final else self.emit(f"{args[0]}_part", Elementwise(fn), *args)
        return value

    def unsettled(self, name: str) -> Scaled:
        """The value with its exponentials in the exponent, whose logarithm is finite where they underflow."""
        if name not in self.settled:
            return self.scaled(name)
        e = self.facts.steps[name]
        p = self.product(e, [self.unsettled(a) for a in e.args])
        if p is None:
            return self.scaled(name)
        v = self.ratio(p.tops, p.bottoms, lambda op, *args: self.emit(f"{name}_v", op, *args))
        return Scaled(v, p.terms, p.mask)

    def added(self, e: Equation, parts: Sequence[Scaled]) -> None:
        """Both sides under the greater exponent; a plain side has exponent 0.  Terms that both have stay outside."""
        a, b = parts
        common = tuple((Counter(a.terms) & Counter(b.terms)).elements())
        if a.terms == b.terms and a.mask == b.mask:
            one = [p.v or self.emit("one", Const(Fraction(1))) for p in parts]
            self.env[e.target.name] = replace(a, v=self.put(e.target, e.op, *one))
            return
        rests = [_sum(p.terms, common, -1) for p in parts]
        top = self.greater(f"{e.target.name}_top", rests, [p.mask for p in parts])
        sides = [self.side(e.target.name, p, rest, top) for p, rest in zip(parts, rests, strict=True)]
        terms = _sum(common, ((1, top),), 1) if top else common
        self.env[e.target.name] = Scaled(self.put(e.target, e.op, *sides), terms)

    def greater(self, wish: str, rests: Sequence[Terms], masks: Sequence[str | None]) -> str | None:
        """The greater of two exponents, None for 0."""
        if not any(rests):
            return None
        for (one, other), mask in zip((rests, rests[::-1]), masks[::-1], strict=True):
            if len(one) == 1 and one[0][0] > 0:
                top = one[0][1]
                if other and self.under(top, other, mask) == other:
                    return top
        exponents = [self.exponent(r) if r else self.emit("zero", Const(Fraction(0))) for r in rests]
        bounded = [self.lowered(x, mask) for x, mask in zip(exponents, masks, strict=True)]
        top = self.from_below(self.emit(wish, Elementwise("max"), *bounded))
        self.bounds[top] = [(Counter(map(self.key, r)), m) for r, m in zip(rests, masks, strict=True) if r]
        return top

    def side(self, name: str, p: Scaled, rest: Terms, top: str | None) -> str:
        """One side of a sum, under the exponent `top`."""
        if top and rest != ((1, top),):
            exponent = self.exponent(rest) if rest else self.emit("zero", Const(Fraction(0)))
            less = self.emit(f"{exponent}_less", Elementwise("sub"), exponent, top)
            factor = self.power(f"{name}_scale", less, p.mask)
            return self.emit(f"{name}_side", Elementwise("mul"), factor, p.v) if p.v else factor
        if p.mask is not None:
            return self.indicator(p.mask, p.v)
        return p.v or self.emit("one", Const(Fraction(1)))

    def lowered(self, exponent: str, mask: str | None) -> str:
        """The exponent where the mask is true, else lower than any."""
        if mask is None:
            return exponent
        return self.emit(f"{exponent}_seen", Select(), mask, exponent, self.emit("lowest", LOWEST))

    # -- sums ----------------------------------------------------------------------------------------------------

    def summed(self, e: Equation, accumulate: bool) -> None:
        """A sum with the exponents that vary over it under their maximum; other exponents stay outside."""
        assert isinstance(e.op, Contract | Reduce)
        parts = [self.scaled(a) for a in e.args]
        mask = reduce(self.both, (p.mask for p in parts))
        sum_of_terms: Terms = reduce(lambda a, b: _sum(a, b, 1), (p.terms for p in parts))
        factors, terms, mask = self.shifted(sum_of_terms, mask)
        factors += _values(*parts)
        closed = set(e.op.axes)
        # what an iteration computes cannot stay outside of a sum over all of them
        varying = tuple(t for t in terms if self.axes(t[1]) & closed or (accumulate and t[1] not in self.alive))
        outside = _sum(terms, varying, -1)
        crossing = tuple(a for a in e.op.axes if any(a in self.axes(t) for _, t in varying))
        monoid: Monoid = "sum"
        scale = None
        if crossing:
            count = math.gcd(*Counter(varying).values())
            base = varying[::count]
            if accumulate and self.tops.get(self.top_key(base, mask, crossing)) not in self.alive:
                count, base = 1, varying  # a running scale is the maximum itself, not a multiple of it
            top = self.maximum(base, mask, crossing, accumulate)
            if accumulate and top not in self.alive:
                monoid, scale = "rescaled", top
            factors = [self.factor(base, top, mask)] * count + factors
            outside = _sum(outside, ((1, top),) * count, 1)
        elif varying:
            factors.insert(0, self.power(f"{e.target.name}_scale", self.exponent(varying), mask))
        elif mask is not None:
            factors.insert(0, self.indicator(mask, None))
        held = {a for f in factors for a in self.axes(f)}
        lacking = {a.name: a for x in e.args for a in self.facts.tensors[x].axes if a.name in closed - held}
        if lacking:  # all that varied has cancelled: sum_k 1 is the size of k
            one = self.emit("one", Const(Fraction(1)))
            factors.append(self.emit("ones", Broadcast(tuple(lacking.values())), one))
        self.close(e, factors, accumulate, monoid, scale)
        self.env[e.target.name] = Scaled(e.target.name, outside)

    def maximum(self, terms: Terms, mask: str | None, closed: tuple[str, ...], accumulate: bool) -> str:
        """The maximum of an exponent over the closed axes, computed once: running, where the sum is an accumulator."""
        key = self.top_key(terms, mask, closed)
        if key not in self.tops:
            x = self.lowered(self.exponent(terms), mask)
            if self.logarithm:
                greatest = self.greatest(x, 1)
                x = self.emit(f"{x}_cut", Elementwise("min"), x, greatest)
            equation = self.names.equation(f"{x}_max", Reduce("max", closed), x)
            top = equation.target.name
            if accumulate:  # a running maximum starts at the least finite number
                self.steps.append(Accumulator(equation, "max"))
            else:
                self.steps.append(equation)
                top = self.from_below(top)
            self.tops[key] = top
            self.bounds[top] = [(Counter(map(self.key, terms)), mask)]
        return self.tops[key]

    def from_below(self, top: str) -> str:
        """The maximum, or the least finite number where it is -inf."""
        return self.emit(f"{top}_finite", Elementwise("max"), top, self.greatest(top, -1))

    def greatest(self, name: str, sign: int) -> str:
        """The greatest finite number of the value's type, or the least."""
        dtype = self.names.values[name].dtype
        return self.emit("greatest" if sign > 0 else "least", Const(sign * GREATEST[dtype], dtype))

    def top_key(self, terms: Terms, mask: str | None, closed: tuple[str, ...]) -> object:
        of = Counter(map(self.key, terms))
        return frozenset(of.items()), mask and self.facts.structure(mask), frozenset(closed)

    def close(self, e: Equation, args: Sequence[str], accumulate: bool, monoid: Monoid, scale: str | None) -> None:
        """The sum of the product of the args in the place of an old sum."""
        op = e.op
        assert isinstance(op, Contract | Reduce)
        if isinstance(op, Reduce) and len(args) > 1:
            if op.kind == "sum":
                op = Contract(op.axes)
            else:
                args = [reduce(lambda a, b: self.emit(f"{e.target.name}_terms", Elementwise("mul"), a, b), args)]
        if isinstance(op, Contract) and len(args) == 1:
            op = Reduce("sum", op.axes)
        equation = replace(e, targets=(self.retyped(e.target, op, args),), op=op, args=tuple(args))
        self.steps.append(Accumulator(equation, monoid, scale) if accumulate else equation)


@dataclass(frozen=True)
class _Product:
    """The tops over the bottoms, times exp(sum of sign * term), and 0 where `mask` is false."""

    tops: tuple[str, ...]
    bottoms: tuple[str, ...]
    terms: Terms
    mask: str | None


def _values(*parts: Scaled) -> tuple[str, ...]:
    return tuple(p.v for p in parts if p.v)


def _sum(a: Terms, b: Terms, sign: int) -> Terms:
    """a + sign * b as signed terms; equal terms of opposite sign cancel."""
    left = list(a)
    for s, term in b:
        if (-s * sign, term) in left:
            left.remove((-s * sign, term))
        else:
            left.append((s * sign, term))
    return tuple(sorted(left, key=lambda t: (-t[0], t[1])))
