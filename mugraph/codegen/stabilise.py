"""Scaled numbers: exponentials that are summed become finite for every input.

    stabilise(graph) -> KernelGraph

A value that contains an exponential is carried as v and an exponent m, meaning `v * exp(m)` (and 0 where a mask is
false).  `exp(x)` starts as (1, x).  Products add exponents, reciprocals negate them; equal exponents of opposite sign
cancel.  A sum over an axis that m has brings its terms to a common exponent first:

    sum_s v * exp(m)   ->   (sum_s v * exp(m - m'), m')    with m' = max_s m

Over a looped axis m' is a running maximum and the sum a rescaled accumulator; over a split, the parts' m' are stored
beside the partial sums, and the combine applies the same rule.  What is left at a store is multiplied out.  The rule is
exact for every m', so one mechanism gives the softmax of a tile, the online softmax (Milakov and Gimelshein,
arXiv:1805.02867), its two-pass form and the combine of a split.  The result is verified like any other μGraph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from mugraph.codegen.passes import Names, flatten_threads
from mugraph.ir.axes import Axis
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Load, Monoid, Pass, Split, Step, Store
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import Cast, Const, Contract, Elementwise, Kernel, MaskedExp, Op, Reduce, Select
from mugraph.ir.types import DType, Tensor, tensor

# The maximum over no element: finite, so that differences of two such maxima are 0 and not NaN.
LOWEST = Const(Fraction(-(10**30)))


@dataclass(frozen=True)
class Scaled:
    """`v * exp(sum of sign * term)`, and 0 where `mask` is false.  v is None for 1."""

    v: str | None
    terms: tuple[tuple[int, str], ...] = ()
    mask: str | None = None

    @property
    def plain(self) -> bool:
        return self.v is not None and not self.terms and self.mask is None


def stabilise(graph: KernelGraph) -> KernelGraph:
    """The graph with every summed exponential in scaled form; the same graph where there is none."""
    taken = set(graph.tensors())
    for equation in graph.kernels():
        assert isinstance(equation.op, Kernel)
        taken |= {s.target for b in equation.op.blocks for s in b.stores}
    equations = []
    for equation in graph.equations:
        if isinstance(equation.op, Kernel):
            blocks = tuple(_stabilised(b, taken) for b in equation.op.blocks)
            equation = replace(equation, op=Kernel(blocks))
        equations.append(equation)
    return replace(graph, equations=tuple(equations))


def _stabilised(block: BlockGraph, taken: set[str]) -> BlockGraph:
    flat = unique_names(flatten_threads(block))
    writer = _Writer(flat, {}, taken)
    if not writer.active:
        return block
    result = writer.rewritten()
    if block.combine and writer.exponents:
        combine = unique_names(flatten_threads(block.combine))
        assert block.split
        result = replace(result, combine=_Writer(combine, writer.exponents, taken, block.split).rewritten())
    return result


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


def _is_sum(op: Op) -> bool:
    return isinstance(op, Contract) or (isinstance(op, Reduce) and op.kind in ("sum", "mean"))


def _is_exp(op: Op) -> bool:
    return isinstance(op, MaskedExp) or (isinstance(op, Elementwise) and op.fn == "exp")


def _mask_of(e: Equation) -> str | None:
    return e.args[1] if isinstance(e.op, MaskedExp) else None


class _Facts:
    """What is known of a block graph's values before anything changes."""

    def __init__(self, block: BlockGraph) -> None:
        self.tensors = block.tensors()
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
        wild = {n for n, e in self.steps.items() if _is_exp(e.op) and not self.below_zero(e.args[0], _mask_of(e))}
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

    def bounds(self, m: str, z: str, mask: str | None) -> bool:
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

    def structure(self, name: str) -> str:
        """How the value comes from loads, so that a pass's recomputation is known for what it is."""
        if name in self.sources:
            ld = self.sources[name]
            return f"{ld.source}[{','.join(a.name for a in ld.value.axes)}]"
        e = self.steps[name]
        return f"({e.op!r} {' '.join(map(self.structure, e.args))})"


class _Writer:
    """Rewrites one block graph.  `given` maps partial results to the partial exponents stored beside them."""

    def __init__(
        self, block: BlockGraph, given: dict[str, tuple[str, Tensor]], taken: set[str], split: Split | None = None
    ) -> None:
        self.block, self.taken = block, taken
        self.facts = _Facts(block)
        self.exponents: dict[str, tuple[str, Tensor]] = {}  # partial target -> (its exponent's target, the exponent)
        self.names = Names(dict(self.facts.tensors))
        self.env: dict[str, Scaled] = {}
        self.steps: list[Step] = []
        self.memo: dict[object, str] = {}
        self.loop: str | None = None
        self.alive: set[str] = set()
        self.extra_loads = self.given_loads(given, split)
        self.active = self.facts.active(set(self.env))
        for name in self.active:
            del self.names.values[name]

    def given_loads(self, given: dict[str, tuple[str, Tensor]], split: Split | None) -> tuple[Load, ...]:
        """Loads of the partial exponents, one for each that is stored."""
        loads: dict[str, Load] = {}
        for name, ld in self.facts.sources.items():
            if ld.source in given:
                assert split
                source, exponent = given[ld.source]
                if source not in loads:
                    wish = self.names.fresh(f"{exponent.name}_in")
                    t = Tensor(wish, ((split.part,), *exponent.dims), DType.f32)
                    self.names.values[wish] = t
                    loads[source] = Load(t, source)
                self.env[name] = Scaled(name, ((1, loads[source].value.name),))
        return tuple(loads.values())

    # -- the block -----------------------------------------------------------------------------------------------

    def rewritten(self) -> BlockGraph:
        stores = list(self.block.stores)
        passes = []
        self.alive = {ld.value.name for ld in self.extra_loads}
        for p in self.block.passes:
            self.loop = p.loops[0][0] if p.loops else None
            self.open()
            for step in p.body:
                self.step(step)
            if p.loops:
                dying = {s.target.name for s in p.body if isinstance(s, Equation)}
                for i, store in enumerate(stores):
                    if store.value in dying:
                        stores[i] = replace(store, value=self.whole(store.value))
            body = tuple(self.steps)
            passes.append(Pass(p.loops, p.loads, body))
            if p.loops:
                self.alive |= {s.target.name for s in body if isinstance(s, Accumulator)}
            else:
                self.alive |= {ld.value.name for ld in p.loads} | {
                    s.target.name for s in body if isinstance(s, Equation)
                }
        self.loop = None
        self.open()
        for step in self.block.epilogue:
            self.step(step)
        early = {t.name for p in passes if p.loops for s in p.body if isinstance(s, Equation) for t in s.targets}
        final: list[Store] = []
        for store in stores:
            if store.value in early:
                final.append(store)
            elif store.kind == "partial":
                final += self.partial(store)
            else:
                final.append(replace(store, value=self.whole(store.value)))
        return replace(
            self.block,
            passes=tuple(passes),
            loads=self.extra_loads + self.block.loads,
            epilogue=tuple(self.steps),
            stores=tuple(dict.fromkeys(final)),
        )

    def open(self) -> None:
        self.steps, self.memo = [], {}

    def partial(self, store: Store) -> list[Store]:
        """A scaled partial result is stored with its exponent, once for all results that share it."""
        s = self.env.get(store.value, Scaled(store.value))
        if s.plain or s.v is None or s.mask is not None:
            return [replace(store, value=self.whole(store.value))]
        exponent = self.exponent(s)
        known = {t.name: target for target, t in self.exponents.values()}
        target = known.get(exponent) or self.global_name(f"{exponent}_parts")
        self.exponents[store.target] = (target, self.names.values[exponent])
        return [Store(exponent, target, "partial"), replace(store, value=s.v)]

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
        (t,) = infer(op, [type_of(self.names.values[a]) for a in args])
        kept = (
            target
            if {a.name for a in target.axes} == {a.name for a in t.axes}
            else tensor(target.name, t.axes, DType.f32)
        )
        self.names.values[target.name] = kept
        self.steps.append(Equation((kept,), op, args))
        return target.name

    def scaled(self, name: str) -> Scaled:
        return self.env.get(name, Scaled(name))

    def exponent(self, s: Scaled) -> str:
        """The exponent as one value: a signed sum of terms."""
        positive = [t for sign, t in s.terms if sign > 0]
        negative = [t for sign, t in s.terms if sign < 0]
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

    def whole(self, name: str) -> str:
        """The value itself: what is left of its exponent is multiplied out."""
        s = self.scaled(name)
        if s.plain:
            assert s.v
            return s.v
        if not s.terms:
            one = s.v or self.emit("one", Const(Fraction(1)))
            if s.mask is None:
                return one
            return self.emit(name, Select(), s.mask, one, self.emit("zero", Const(Fraction(0))))
        power = self.power(name if s.v is None else f"{name}_scale", self.exponent(s), s.mask)
        return power if s.v is None else self.emit(f"{name}_whole", Elementwise("mul"), power, s.v)

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
            x = self.whole(e.args[0])
            self.env[name] = Scaled(None, ((1, x),), _mask_of(e))
            return
        parts = [self.scaled(a) for a in e.args]
        if all(p.plain for p in parts):
            args = tuple(p.v or "" for p in parts)
            self.steps.append(replace(e, args=args))
            return
        match e.op:
            case Elementwise("mul"):
                self.env[name] = self.multiplied(e, parts)
            case Elementwise("square"):
                self.env[name] = self.multiplied(e, [parts[0], parts[0]])
            case Elementwise("div") if parts[1].mask is None:
                self.env[name] = self.divided(e, *parts)
            case Elementwise("reciprocal") if parts[0].mask is None:
                v = self.put(e.target, e.op, parts[0].v) if parts[0].v else None
                self.env[name] = Scaled(v, _sum((), parts[0].terms, -1))
            case Elementwise("neg"):
                one = parts[0].v or self.emit("one", Const(Fraction(1)))
                self.env[name] = replace(parts[0], v=self.put(e.target, e.op, one))
            case Cast(dtype) if dtype.is_float:
                self.env[name] = parts[0]
            case Elementwise("log") if parts[0].mask is None:
                exponent = self.exponent(parts[0]) if parts[0].terms else None
                log = self.emit(f"{name}_v", e.op, parts[0].v) if parts[0].v else None
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

    def multiplied(self, e: Equation, parts: Sequence[Scaled]) -> Scaled:
        a, b = parts
        values = [p.v for p in parts if p.v]
        v = self.put(e.target, Elementwise("mul"), *values) if len(values) == 2 else values[0] if values else None
        return Scaled(v, _sum(a.terms, b.terms, 1), self.both(a.mask, b.mask))

    def divided(self, e: Equation, a: Scaled, b: Scaled) -> Scaled:
        v = a.v
        if b.v:
            v = (
                self.put(e.target, Elementwise("div"), a.v, b.v)
                if a.v
                else self.put(e.target, Elementwise("reciprocal"), b.v)
            )
        return Scaled(v, _sum(a.terms, b.terms, -1), a.mask)

    def added(self, e: Equation, parts: Sequence[Scaled]) -> None:
        """Both sides under the greater exponent; a plain side has exponent 0."""
        name = e.target.name
        one = [p.v or self.emit("one", Const(Fraction(1))) for p in parts]
        if parts[0].terms == parts[1].terms and parts[0].mask == parts[1].mask:
            self.env[name] = replace(parts[0], v=self.put(e.target, e.op, *one))
            return
        exponents = [self.exponent(p) if p.terms else self.emit("zero", Const(Fraction(0))) for p in parts]
        bounded = [self.lowered(x, p.mask) for x, p in zip(exponents, parts, strict=True)]
        top = self.emit(f"{name}_top", Elementwise("max"), *bounded)
        sides = []
        for p, x in zip(parts, exponents, strict=True):
            factor = self.power(f"{name}_scale", self.emit(f"{x}_less", Elementwise("sub"), x, top), p.mask)
            sides.append(self.emit(f"{name}_side", Elementwise("mul"), factor, p.v) if p.v else factor)
        self.env[name] = Scaled(self.put(e.target, e.op, *sides), ((1, top),))

    def lowered(self, exponent: str, mask: str | None) -> str:
        """The exponent where the mask is true, else lower than any."""
        if mask is None:
            return exponent
        return self.emit(f"{exponent}_seen", Select(), mask, exponent, self.emit("lowest", LOWEST))

    # -- sums ----------------------------------------------------------------------------------------------------

    def summed(self, e: Equation, accumulate: bool) -> None:
        assert isinstance(e.op, Contract | Reduce)
        parts = [self.scaled(a) for a in e.args]
        terms: tuple[tuple[int, str], ...] = ()
        mask: str | None = None
        for p in parts:
            terms, mask = _sum(terms, p.terms, 1), self.both(mask, p.mask)
        axes = {a.name: a for _, t in terms for a in self.names.values[t].axes}
        crossing = tuple(a for a in e.op.axes if a in axes)
        if not terms or not crossing:
            lasting = all(t in self.alive for _, t in terms) or not accumulate
            if mask is not None or not lasting or any(p.v is None for p in parts):
                args = tuple(self.whole(a) for a in e.args)
                terms = ()
            else:
                args = tuple(p.v or "" for p in parts)
            self.close(e, args, accumulate, "sum", None)
            self.env[e.target.name] = Scaled(e.target.name, terms)
            return
        exponent = self.exponent(Scaled(None, terms))
        top = self.maximum(self.lowered(exponent, mask), crossing, accumulate, axes)
        less = self.emit(f"{exponent}_less", Elementwise("sub"), exponent, top)
        wish = next(
            (a for a, p in zip(e.args, parts, strict=True) if p.terms and p.v is None), f"{e.target.name}_scale"
        )
        factor = self.power(wish, less, mask)
        self.close(e, (factor, *(p.v for p in parts if p.v)), accumulate, "rescaled", top)
        self.env[e.target.name] = Scaled(e.target.name, ((1, top),))

    def maximum(self, x: str, closed: tuple[str, ...], accumulate: bool, axes: dict[str, Axis]) -> str:
        """The maximum over the closed axes: running, where the sum is an accumulator."""
        op = Reduce("max", closed)
        if not accumulate:
            return self.emit(f"{x}_max", op, x)
        key = ("running", op, x)
        if key not in self.memo:
            equation = self.names.equation(f"{x}_max", op, x)
            self.steps.append(Accumulator(equation, "max"))
            self.memo[key] = equation.target.name
        return self.memo[key]

    def close(self, e: Equation, args: tuple[str, ...], accumulate: bool, monoid: Monoid, scale: str | None) -> None:
        op = e.op
        assert isinstance(op, Contract | Reduce)
        if isinstance(op, Reduce) and len(args) > 1:
            if op.kind == "sum":
                op = Contract(op.axes)
            else:
                args = (self.emit(f"{e.target.name}_terms", Elementwise("mul"), *args),)
        if isinstance(op, Contract) and len(args) == 1:
            op = Reduce("sum", op.axes)
        equation = replace(e, op=op, args=args)
        self.steps.append(Accumulator(equation, monoid, scale) if accumulate else equation)


def _sum(a: tuple[tuple[int, str], ...], b: tuple[tuple[int, str], ...], sign: int) -> tuple[tuple[int, str], ...]:
    """a + sign * b as signed terms; equal terms of opposite sign cancel."""
    left = list(a)
    for s, term in b:
        if (-s * sign, term) in left:
            left.remove((-s * sign, term))
        else:
            left.append((s * sign, term))
    return tuple(sorted(left, key=lambda t: (-t[0], t[1])))
