"""Planted errors: wrong variants of a right μGraph, made systematically and by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

from mugraph.ir.axes import Axis
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Load, Program, Step, Store
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import Const, Elementwise, Kernel, Reduce, SizeOf
from mugraph.ir.types import DType, Tensor, tensor
from tests import graphs


@dataclass(frozen=True)
class Mutant:
    name: str
    program: Program
    graph: KernelGraph


# A place in a block graph: of the combine or not, the pass (None: epilogue), and the step.
Place = tuple[bool, int | None, int]


def block_of(graph: KernelGraph) -> BlockGraph:
    (equation,) = graph.kernels()
    assert isinstance(equation.op, Kernel)
    return equation.op.blocks[0]


def with_block(graph: KernelGraph, block: BlockGraph) -> KernelGraph:
    (equation,) = graph.kernels()
    return replace(graph, equations=(replace(equation, op=Kernel((block,))),))


def places(block: BlockGraph, inner: bool = False) -> Iterator[Place]:
    for i, p in enumerate(block.passes):
        yield from ((inner, i, j) for j in range(len(p.body)))
    yield from ((inner, None, j) for j in range(len(block.epilogue)))
    if block.combine:
        yield from places(block.combine, True)


def section(block: BlockGraph, place: Place) -> tuple[Step, ...]:
    inner, i, _ = place
    home = block.combine if inner else block
    assert home
    return home.epilogue if i is None else home.passes[i].body


def with_section(block: BlockGraph, place: Place, steps: tuple[Step, ...]) -> BlockGraph:
    inner, i, j = place
    if inner:
        assert block.combine
        return replace(block, combine=with_section(block.combine, (False, i, j), steps))
    if i is None:
        return replace(block, epilogue=steps)
    passes = list(block.passes)
    passes[i] = replace(passes[i], body=steps)
    return replace(block, passes=tuple(passes))


def with_step(block: BlockGraph, place: Place, step: Step) -> BlockGraph:
    steps = section(block, place)
    return with_section(block, place, (*steps[: place[2]], step, *steps[place[2] + 1 :]))


def without_step(block: BlockGraph, place: Place, instead: str) -> BlockGraph:
    """The step removed; what read its target reads `instead`."""
    steps = section(block, place)
    gone = equation_of(steps[place[2]]).target.name
    block = with_section(block, place, (*steps[: place[2]], *steps[place[2] + 1 :]))

    def reads(e: Equation) -> Equation:
        return replace(e, args=tuple(instead if a == gone else a for a in e.args))

    for p in places(block):
        block = with_step(block, p, on_equation(section(block, p)[p[2]], reads))
    home = block.combine if place[0] else block
    assert home
    stores = tuple(replace(s, value=instead if s.value == gone else s.value) for s in home.stores)
    home = replace(home, stores=stores)
    return replace(block, combine=home) if place[0] else home


def equation_of(step: Step) -> Equation:
    assert isinstance(step, Equation | Accumulator)
    return step.equation if isinstance(step, Accumulator) else step


def on_equation(step: Step, f: Callable[[Equation], Equation]) -> Step:
    e = f(equation_of(step))
    return replace(step, equation=e) if isinstance(step, Accumulator) else e


# -- systematic mutations ----------------------------------------------------------------------------------------

OTHER_FUNCTIONS = {
    "mul": ("add", "max"),
    "add": ("sub", "mul"),
    "sub": ("add",),
    "div": ("mul",),
    "silu": ("sigmoid", "gelu"),
    "exp": ("square", "sigmoid"),
    "sqrt": ("abs", "rsqrt"),
}
OTHER_MONOIDS = {"sum": "max", "max": "min", "rescaled": "sum"}


def mutations(graph: KernelGraph, combine_only: bool = False) -> Iterator[tuple[str, KernelGraph]]:
    """Every single systematic change of one step or load."""
    block = block_of(graph)
    for place in places(block):
        if combine_only and not place[0]:
            continue
        step = section(block, place)[place[2]]
        values = (block.combine if place[0] and block.combine else block).tensors()
        for name, changed in step_mutations(step, values):
            yield f"{equation_of(step).target.name}: {name}", with_block(graph, with_step(block, place, changed))
        e = equation_of(step)
        for arg in dict.fromkeys(e.args):
            same_axes = set(values[arg].axes) == set(e.target.axes)
            if same_axes and (len(e.args) > 1 or isinstance(e.op, Elementwise)):
                yield f"{e.target.name}: left out for {arg}", with_block(graph, without_step(block, place, arg))
    yield from load_mutations(graph)


def step_mutations(step: Step, values: dict[str, Tensor]) -> Iterator[tuple[str, Step]]:
    e = equation_of(step)
    match e.op:
        case Elementwise(fn):
            for other in OTHER_FUNCTIONS.get(fn, ()):
                yield f"{fn} becomes {other}", on_equation(step, lambda e, o=other: replace(e, op=Elementwise(o)))
            if fn in ("sub", "div"):
                yield "operands swapped", on_equation(step, lambda e: replace(e, args=e.args[::-1]))
        case Const(value, dtype):
            for other in (2 * value, value + 1, Fraction(0)):
                yield f"{value} becomes {other}", on_equation(step, lambda e, o=other: replace(e, op=Const(o, dtype)))
        case SizeOf(axis):
            axes = {a for t in values.values() for a in t.axes} - {axis}
            for other in sorted(axes, key=str):
                yield f"|{axis}| becomes |{other}|", on_equation(step, lambda e, o=other: replace(e, op=SizeOf(o)))
        case Reduce(kind, axes):
            for other in {"sum": ("mean",), "max": ("min", "sum")}.get(kind, ()):
                yield f"{kind} becomes {other}", on_equation(step, lambda e, o=other: replace(e, op=Reduce(o, axes)))
    for i, arg in enumerate(e.args):
        for other, t in itertools.takewhile(lambda item: item[0] != e.target.name, values.items()):
            if other not in e.args and t.axes == values[arg].axes and t.dtype == values[arg].dtype:
                args = (*e.args[:i], other, *e.args[i + 1 :])
                yield f"reads {other} for {arg}", on_equation(step, lambda e, a=args: replace(e, args=a))
    if isinstance(step, Accumulator):
        yield "not accumulated", e
        other = OTHER_MONOIDS[step.monoid]
        yield f"monoid {step.monoid} becomes {other}", Accumulator(e, other, None)  # type: ignore[arg-type]


def load_mutations(graph: KernelGraph) -> Iterator[tuple[str, KernelGraph]]:
    """Two loads of equal type read each other's source."""
    block = block_of(graph)
    for home in (block, block.combine):
        for a in home.all_loads() if home else ():
            for b in home.all_loads() if home else ():
                if a.value.name < b.value.name and a.value.dims == b.value.dims and a.value.dtype == b.value.dtype:
                    changed = swapped_loads(home, a, b)  # type: ignore[arg-type]
                    whole = changed if home is block else replace(block, combine=changed)
                    yield f"{a.source} and {b.source} are swapped", with_block(graph, whole)


def swapped_loads(block: BlockGraph, a: Load, b: Load) -> BlockGraph:
    def other(ld: Load) -> Load:
        return replace(ld, source={a.source: b.source, b.source: a.source}.get(ld.source, ld.source))

    passes = tuple(replace(p, loads=tuple(map(other, p.loads))) for p in block.passes)
    return replace(block, passes=passes, loads=tuple(map(other, block.loads)))


# -- mutations by hand -------------------------------------------------------------------------------------------


def eps_after_root(graph: KernelGraph) -> KernelGraph:
    """sqrt(mean) + eps instead of sqrt(mean + eps)."""
    block = block_of(graph)
    steps = {equation_of(s).target.name: s for s in block.epilogue}
    root = replace(equation_of(steps["root"]), args=("ms",))
    late = replace(equation_of(steps["mse"]), args=("root", "e"))
    y = replace(equation_of(steps["y"]), args=("acc", "mse"))
    return with_block(graph, replace(block, epilogue=(steps["k_size"], steps["ms"], steps["e"], root, late, y)))


def mean_over_rows(graph: KernelGraph) -> KernelGraph:
    """The sum of squares is squared again: Σ(x·x·x) instead of Σ(x·x)."""
    block = block_of(graph)
    p = block.passes[0]
    ss = p.body[-1]
    cubed = on_equation(ss, lambda e: replace(e, args=("x", "x", "x")))
    return with_block(graph, replace(block, passes=(replace(p, body=(*p.body[:-1], cubed)),)))


def epilogue_in_loop(graph: KernelGraph, names: tuple[str, ...]) -> KernelGraph:
    """Steps of the epilogue run inside the loop, on running values."""
    block = block_of(graph)
    moved = tuple(s for s in block.epilogue if equation_of(s).target.name in names)
    rest = tuple(s for s in block.epilogue if s not in moved)
    p = block.passes[0]
    return with_block(graph, replace(block, passes=(replace(p, body=p.body + moved),), epilogue=rest))


def accumulated_in_epilogue(graph: KernelGraph, name: str) -> KernelGraph:
    """A sum over the looped axis that runs once, after the loop."""
    block = block_of(graph)
    p = block.passes[0]
    moved = tuple(equation_of(s) for s in p.body if equation_of(s).target.name == name)
    body = tuple(s for s in p.body if equation_of(s).target.name != name)
    return with_block(graph, replace(block, passes=(replace(p, body=body),), epilogue=moved + block.epilogue))


def off_grid(graph: KernelGraph, axis: str) -> KernelGraph:
    block = block_of(graph)
    return with_block(graph, replace(block, grid=tuple(g for g in block.grid if g[0] != axis)))


def on_grid(graph: KernelGraph, axis: str) -> KernelGraph:
    """A looped axis is also cut over the grid, and each block stores its share as if it were the whole."""
    block = block_of(graph)
    return with_block(graph, replace(block, grid=(*block.grid, (axis, 1))))


def no_loop(graph: KernelGraph) -> KernelGraph:
    """The loop's body runs once, on the whole axis; what it accumulates is right, what it says is not a loop."""
    block = block_of(graph)
    p = block.passes[0]
    return with_block(graph, replace(block, passes=(replace(p, loops=()),)))


def atomic_store(graph: KernelGraph) -> KernelGraph:
    """Blocks of a second axis all add the same result."""
    block = block_of(graph)
    stores = tuple(replace(s, kind="atomic") for s in block.stores)
    return with_block(graph, replace(block, stores=stores, grid=(*block.grid, ("k", 16))))


def result_doubled(graph: KernelGraph) -> KernelGraph:
    """The result is added to itself."""
    block = block_of(graph)
    (store,) = block.stores
    value = block.tensors()[store.value]
    twice = tensor("twice", value.axes, value.dtype)
    extra = Equation((twice,), Elementwise("add"), (store.value, store.value))
    return with_block(graph, replace(block, epilogue=(*block.epilogue, extra), stores=(replace(store, value="twice"),)))


def counted_twice(graph: KernelGraph, name: str) -> KernelGraph:
    """An accumulator adds every tile twice."""
    block = block_of(graph)
    for place in places(block):
        step = section(block, place)[place[2]]
        if isinstance(step, Accumulator) and step.target.name == name:
            e = step.equation
            operand = block.tensors()[e.args[0]]
            twice = tensor("twice", operand.axes, DType.f32)
            double = Equation((twice,), Elementwise("add"), (e.args[0], e.args[0]))
            steps = section(block, place)
            changed = replace(step, equation=replace(e, args=("twice", *e.args[1:])))
            return with_block(
                graph, with_section(block, place, (*steps[: place[2]], double, changed, *steps[place[2] + 1 :]))
            )
    raise LookupError(name)


def silu_as_exponential(graph: KernelGraph) -> KernelGraph:
    """x·exp(x) instead of silu(x)."""
    block = block_of(graph)
    s = equation_of(block.epilogue[0])
    e = tensor("ex", s.target.axes, DType.f32)
    steps = (Equation((e,), Elementwise("exp"), s.args), Equation(s.targets, Elementwise("mul"), ("h_acc", "ex")))
    return with_block(graph, replace(block, epilogue=steps + block.epilogue[1:]))


def other_gate(graph: KernelGraph) -> KernelGraph:
    """silu on both branches."""
    block = block_of(graph)
    u = block.tensors()["u_acc"]
    extra = Equation((tensor("su", u.axes, DType.f32),), Elementwise("silu"), ("u_acc",))
    y = replace(equation_of(block.epilogue[1]), args=("s", "su"))
    return with_block(graph, replace(block, epilogue=(block.epilogue[0], extra, y)))


def contracted_early(graph: KernelGraph) -> KernelGraph:
    """(Σ_k q)·k instead of Σ_k q·k: sums over the wrong scope."""
    block = block_of(graph)
    p = block.passes[0]
    qk = equation_of(p.body[0])
    q, k = (block.tensors()[a] for a in qk.args)
    steps = []
    for name, t in (("qs", q), ("ks", k)):
        axes = tuple(a for a in t.axes if a.name != "d")
        steps.append(Equation((tensor(name, axes, DType.f32),), Reduce("sum", ("d",)), (t.name,)))
    steps.append(Equation(qk.targets, Elementwise("mul"), ("qs", "ks")))
    return with_block(graph, replace(block, passes=(replace(p, body=(*steps, *p.body[1:])),)))


def wrong_head(graph: KernelGraph, source: str) -> KernelGraph:
    """A load takes its heads from the group axis, which has the same size."""
    block = block_of(graph)
    p = block.passes[0]
    g = next(a for t in graph.tensors().values() for a in t.axes if a.name == "g")
    loads = []
    for ld in p.loads:
        if ld.source == source:
            dims = tuple((Axis("g", g.size),) if d and d[0].name == "h" else d for d in ld.value.dims)
            ld = replace(ld, value=Tensor(ld.value.name, dims, ld.value.dtype))
        loads.append(ld)
    b = graphs.Builder({ld.value.name: ld.value for ld in loads}, block=True)
    body: list[Step] = [on_equation(s, lambda e: b.op(e.target.name, e.op, *e.args)) for s in p.body]
    after = [on_equation(s, lambda e: b.op(e.target.name, e.op, *e.args)) for s in block.epilogue]
    return with_block(
        graph, replace(block, passes=(replace(p, loads=tuple(loads), body=tuple(body)),), epilogue=tuple(after))
    )


def combine_without_factor(graph: KernelGraph, names: tuple[str, ...]) -> KernelGraph:
    """Partial results are added without their scale."""
    block = block_of(graph)
    assert block.combine
    steps = []
    for s in block.combine.epilogue:
        e = equation_of(s)
        if e.target.name in names:
            e = replace(e, op=Reduce("sum", ("s_part",)), args=(e.args[0],))
        steps.append(e)
    return with_block(graph, replace(block, combine=replace(block.combine, epilogue=tuple(steps))))


def combine_scaled_by_sum(graph: KernelGraph) -> KernelGraph:
    """The scale of the parts is added up before it multiplies."""
    block = block_of(graph)
    assert block.combine
    steps = []
    for s in block.combine.epilogue:
        e = equation_of(s)
        if e.target.name == "acc_all":
            loads = block.combine.tensors()
            f = tensor("f_all", loads["m_all"].axes, DType.f32)
            a = tensor("a_sum", e.target.axes, DType.f32)
            steps.append(Equation((f,), Reduce("sum", ("s_part",)), ("f",)))
            steps.append(Equation((a,), Reduce("sum", ("s_part",)), ("acc_in",)))
            e = replace(e, op=Elementwise("mul"), args=("a_sum", "f_all"))
        steps.append(e)
    return with_block(graph, replace(block, combine=replace(block.combine, epilogue=tuple(steps))))


def kept_stores(graph: KernelGraph, change: Callable[[tuple[Store, ...]], tuple[Store, ...]]) -> KernelGraph:
    block = block_of(graph)
    return with_block(graph, replace(block, stores=change(block.stores)))


def rotated(stores: tuple[Store, ...]) -> tuple[Store, ...]:
    """m and l are stored in each other's place."""
    m, l, *rest = stores
    return (replace(m, value=l.value), replace(l, value=m.value), *rest)


def program_level(p: Program, mutate: Callable[[Equation], Equation]) -> KernelGraph:
    """The program itself as a kernel graph, with one equation changed."""
    return KernelGraph(p.name, p.inputs, tuple(map(mutate, p.equations)), p.outputs)


def without_term(e: Equation) -> Equation:
    return replace(e, op=Elementwise("add"), args=("xw", "xw")) if e.op == Elementwise("add") else e


def other_axis(p: Program) -> KernelGraph:
    """The softmax's sum runs over the group instead of the keys, where both exist."""
    values = p.tensors()
    b = graphs.Builder({i.name: i.tensor for i in p.inputs})
    for e in p.equations:
        op = Reduce("sum", ("g",)) if e.target.name == "l" else e.op
        infer(op, [type_of(b.values[a]) for a in e.args])
        b.add(e.target.name, op, *e.args)
    assert set(b.values) == set(values)
    return KernelGraph(p.name, p.inputs, tuple(b.steps), p.outputs)  # type: ignore[arg-type]


def by_hand() -> Iterator[Mutant]:
    rms = graphs.rmsnorm_linear(), graphs.rmsnorm_linear_fused()
    yield Mutant("eps after the root", rms[0], eps_after_root(rms[1]))
    yield Mutant("cubes for squares", rms[0], mean_over_rows(rms[1]))
    yield Mutant("division inside the loop", rms[0], epilogue_in_loop(rms[1], ("k_size", "ms", "e", "mse", "root")))
    yield Mutant("sum of squares after the loop", rms[0], accumulated_in_epilogue(rms[1], "ss"))
    yield Mutant("k on the grid", rms[0], on_grid(rms[1], "k"))
    yield Mutant("k on the grid, added atomically", rms[0], atomic_store(rms[1]))
    for name, (program, fused) in graphs.ALL.items():
        yield Mutant(f"{name} doubled", program(), result_doubled(fused()))
    for accumulator in ("acc", "ss"):
        yield Mutant(f"{accumulator} counted twice", rms[0], counted_twice(rms[1], accumulator))

    mlp = graphs.gated_mlp(), graphs.gated_mlp_fused()
    yield Mutant("x·exp(x) for silu", mlp[0], silu_as_exponential(mlp[1]))
    yield Mutant("silu on both branches", mlp[0], other_gate(mlp[1]))
    yield Mutant("silu inside the loop", mlp[0], epilogue_in_loop(mlp[1], ("s",)))

    lora = graphs.lora(), graphs.lora_fused()
    yield Mutant("low-rank term inside the loop", lora[0], counted_twice(lora[1], "xa_acc"))
    yield Mutant("low-rank term dropped", lora[0], program_level(lora[0], without_term))

    plain = graphs.attention(h_size=4, g_size=4), None
    for online in (False, True):
        same_heads = replaced_sizes(graphs.attention_fused(online=online), h=4, g=4)
        for source in ("K", "V"):
            yield Mutant(f"wrong head of {source}, online={online}", plain[0], wrong_head(same_heads, source))
        fused = graphs.attention_fused(online=online)
        yield Mutant(f"scores of sums, online={online}", graphs.attention(), contracted_early(fused))
        yield Mutant(f"keys on the grid, online={online}", graphs.attention(), on_grid(fused, "s"))
        yield Mutant(f"keys counted twice, online={online}", graphs.attention(), counted_twice(fused, "acc"))
    yield Mutant("sum over the group", graphs.attention(), other_axis(graphs.attention()))

    split = graphs.attention_fused(parts=4)
    for names in (("l_all",), ("acc_all",)):
        yield Mutant(f"{names[0]} without its scale", graphs.attention(), combine_without_factor(split, names))
    yield Mutant("both without their scale", graphs.attention(), combine_without_factor(split, ("l_all", "acc_all")))
    yield Mutant("scales added up first", graphs.attention(), combine_scaled_by_sum(split))
    yield Mutant("m and l stored in each other's place", graphs.attention(), kept_stores(split, rotated))
    yield Mutant("a partial result is not stored", graphs.attention(), kept_stores(split, lambda s: s[1:]))


def replaced_sizes(graph: KernelGraph, **sizes: int) -> KernelGraph:
    """The graph with other static sizes, everywhere."""
    from mugraph.ir.serialize import from_json, to_json

    def visit(data: object) -> object:
        if isinstance(data, dict):
            data = {k: visit(v) for k, v in data.items() if k != "maps"}
            if data.get("type") == "Axis" and data["name"] in sizes:
                data["size"] = sizes[data["name"]]
            return data
        return [visit(v) for v in data] if isinstance(data, list) else data

    found = from_json(visit(to_json(graph)))
    assert isinstance(found, KernelGraph)
    return found


def systematic() -> Iterator[Mutant]:
    for name, (program, fused) in graphs.ALL.items():
        for change, mutant in mutations(fused()):
            yield Mutant(f"{name}: {change}", program(), mutant)
    for change, mutant in mutations(graphs.attention_fused(parts=4), combine_only=True):
        yield Mutant(f"gqa_split: {change}", graphs.attention(), mutant)


# What these change cancels: a softmax is the same under every shift, so they are right over the reals.  Whether they
# are right in floating point is for the numerics tier to say.
SHIFTS = {
    "gqa: m: reads qk for z",
    "gqa_split: m_all: max becomes min",
    "gqa_split: m_all: max becomes sum",
    "gqa_split: m_all: reads l_in for m_in",
    "gqa_split: dm: sub becomes add",
    "gqa_split: dm: left out for m_in",
    "gqa_split: f: reads m_in for dm",
}
