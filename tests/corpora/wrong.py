"""Pairs that are not equal: one planted error each.

    python -c "from tests.corpora.wrong import wrong; print(len(wrong()))"

Program-level errors are planted in every program of `benchmarks.programs`; float64 has the last word on whether one
changes the result (a softmax with another shift does not).  Errors of schedules, and of published graphs, come from
`tests.verify.mutants` and `tests.verify.planted`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction

from mugraph.errors import MugraphError
from mugraph.ir.axes import Axis
from mugraph.ir.graph import Equation, Program
from mugraph.ir.mirage import import_mirage
from mugraph.ir.ops import Compare, Const, Contract, Elementwise, Iota, MaskedExp, Reduce, SizeOf, Slice
from tests.corpora.pairs import Pair, Spec, judged, rebuilt, sources
from tests.verify.law_pairs import BROKEN
from tests.verify.mirage_files import SMALL, Graph
from tests.verify.mutants import SHIFTS, by_hand, systematic
from tests.verify.planted import planted
from tests.verify.variants import UNEQUAL, Step, W, X, Y, const, pair
from tests.verify.variants import Pair as Written

MOST_OF_A_KIND = 4  # errors of one kind in one program

Mutation = Callable[[Program, int, Equation], Iterator[list[Spec]]]


def fn(name: str, f: str, *args: str) -> Spec:
    return Spec(name, Elementwise(f), args)


def wrong_axis(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    values = p.tensors()
    if isinstance(e.op, Reduce):
        for a in values[e.args[0]].axes:
            if a.name not in e.op.axes:
                yield [Spec("w", Reduce(e.op.kind, (a.name,)), e.args)]


def swapped_inputs(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """An input of the same shape is read instead."""
    values, inputs = p.tensors(), {j.name for j in p.inputs}
    for n, a in enumerate(e.args):
        for b in inputs:
            alike = len(values[a].dims) == len(values[b].dims) and set(values[a].axes) == set(values[b].axes)
            if alike and a in inputs and b != a and values[a].dtype is values[b].dtype:
                yield [Spec("w", e.op, (*e.args[:n], b, *e.args[n + 1 :]))]


def swapped_operands(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Elementwise) and e.op.fn in ("sub", "div"):
        yield [Spec("w", e.op, e.args[::-1])]


def dropped_row(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """The first, or the last, place along a summed axis is left out."""
    values = p.tensors()
    if not isinstance(e.op, Contract | Reduce):
        return
    for name, start in itertools.product(e.op.axes, (0, 1)):
        steps, args = [], []
        for a in e.args:
            axis = next((x for x in values[a].axes if x.name == name), None)
            if axis is None:
                args.append(a)
                continue
            if not isinstance(axis.size, int) or axis.size < 2:
                return
            steps.append(Spec(f"{a}_cut", Slice(name, Axis(f"{name}_cut", axis.size - 1), start), (a,)))
            args.append(f"{a}_cut")
        op = replace(e.op, axes=tuple(f"{x}_cut" if x == name else x for x in e.op.axes))
        yield [*dict.fromkeys(steps), Spec("w", op, tuple(args))]


def missing_size(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Reduce) and e.op.kind == "mean":
        yield [Spec("w", Reduce("sum", e.op.axes), e.args)]
    if isinstance(e.op, Reduce) and e.op.kind == "sum":
        yield [Spec("w", Reduce("mean", e.op.axes), e.args)]


def one_row_for_all(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """n times one row for the sum of all."""
    values = p.tensors()
    if isinstance(e.op, Reduce) and e.op.kind == "sum" and len(e.op.axes) == 1:
        axis = next(a for a in values[e.args[0]].axes if a.name == e.op.axes[0])
        one = Axis(f"{axis.name}_one", 1)
        yield [
            Spec("w_row", Slice(axis.name, one, 0), e.args),
            Spec("w_all", Reduce("sum", (one.name,)), ("w_row",)),
            Spec("w_n", SizeOf(axis), ()),
            fn("w", "mul", "w_all", "w_n"),
        ]


def other_reduction(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Reduce):
        for kind in [k for k in ("sum", "max", "min") if k != e.op.kind]:
            yield [Spec("w", Reduce(kind, e.op.axes), e.args)]  # type: ignore[arg-type]


def dropped_operand(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """A factor, a term or a function is left out."""
    values = p.tensors()
    if isinstance(e.op, Elementwise | MaskedExp):
        for a in e.args[:2]:
            if set(values[a].axes) == set(e.targets[0].axes) and values[a].dtype is not None:
                yield [Spec("w_one", Const(Fraction(1)), ()), fn("w", "mul", a, "w_one")]


def eps_elsewhere(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """sqrt(x) + eps for sqrt(x + eps)."""
    makers = {t.name: m for m in p.equations for t in m.targets}
    if isinstance(e.op, Elementwise) and e.op.fn in ("sqrt", "rsqrt"):
        inner = makers.get(e.args[0])
        if inner is not None and inner.op == Elementwise("add"):
            x, eps = inner.args
            root = [fn("w_r", "sqrt", x), fn("w_s", "add", "w_r", eps)]
            yield [*root, fn("w", "reciprocal", "w_s")] if e.op.fn == "rsqrt" else root


def other_constant(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Const):
        for value in (2 * e.op.value, e.op.value + 1, e.op.value / 10, -e.op.value):
            yield [Spec("w", replace(e.op, value=value), ())]


def other_relation(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """Off by one: < for <=, and so on."""
    near = {"le": ("lt", "ge"), "lt": ("le",), "ge": ("gt", "le"), "gt": ("ge",), "eq": ("ne", "le"), "ne": ("eq",)}
    if isinstance(e.op, Compare):
        for relation in near[e.op.relation]:
            yield [Spec("w", Compare(relation), e.args)]  # type: ignore[arg-type]


def shifted_positions(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Iota):
        one = Spec("w_one", Const(Fraction(1), p.tensors()[e.targets[0].name].dtype), ())
        yield [Spec("w_i", e.op, ()), one, fn("w", "add", "w_i", "w_one")]


def mask_dropped(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, MaskedExp):
        yield [fn("w_e", "exp", e.args[0]), Spec("w", Elementwise("mul"), ("w_e", "w_e"))]
        yield [fn("w", "exp", e.args[0])]


OTHER_FUNCTIONS = {
    "silu": ("sigmoid", "gelu", "relu"),
    "sigmoid": ("tanh", "silu"),
    "exp": ("square", "sigmoid"),
    "sqrt": ("rsqrt", "abs"),
    "rsqrt": ("sqrt", "reciprocal"),
    "square": ("abs", "neg"),
    "relu": ("abs", "silu"),
    "gelu": ("relu", "silu"),
    "log": ("sqrt", "log1p"),
    "sin": ("cos",),
    "erf": ("tanh",),
    "expm1": ("exp",),
    "floor": ("round",),
    "mul": ("add", "max"),
    "add": ("sub", "mul"),
    "sub": ("add",),
    "div": ("mul",),
}


def other_function(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Elementwise):
        for f in OTHER_FUNCTIONS.get(e.op.fn, ()):
            attrs = (("approximate", "none"),) if f == "gelu" else ()
            yield [Spec("w", Elementwise(f, attrs), e.args)]
        if e.op.fn == "silu":
            yield [fn("w_e", "exp", *e.args), fn("w", "mul", "w_e", *e.args)]
        if e.op.fn == "gelu":
            other = "tanh" if dict(e.op.attrs)["approximate"] == "none" else "none"
            yield [Spec("w", Elementwise("gelu", (("approximate", other),)), e.args)]


def sum_before_product(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """(Σ a)·b for Σ a·b."""
    values = p.tensors()
    if isinstance(e.op, Contract) and len(e.args) == 2:
        for a, b in (e.args, e.args[::-1]):
            own = tuple(x for x in e.op.axes if x in {y.name for y in values[a].axes})
            other = tuple(x for x in e.op.axes if x in {y.name for y in values[b].axes})
            if own and other:
                yield [
                    Spec("w_a", Reduce("sum", own), (a,)),
                    Spec("w_b", Reduce("sum", other), (b,)),
                    fn("w", "mul", "w_a", "w_b"),
                ]


def stale_value(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    """An earlier value of the same type is read."""
    values = p.tensors()
    earlier = [i.name for i in p.inputs] + [t.name for m in p.equations[:i] for t in m.targets]
    for n, a in enumerate(e.args):
        for b in earlier:
            if b != a and b not in e.args and values[b].axes == values[a].axes and values[b].dtype is values[a].dtype:
                yield [Spec("w", e.op, (*e.args[:n], b, *e.args[n + 1 :]))]


def counted_twice(p: Program, i: int, e: Equation) -> Iterator[list[Spec]]:
    if isinstance(e.op, Contract | Reduce):
        yield [Spec("w_s", e.op, e.args), fn("w", "add", "w_s", "w_s")]


MUTATIONS: tuple[Mutation, ...] = (
    wrong_axis,
    swapped_inputs,
    swapped_operands,
    dropped_row,
    missing_size,
    one_row_for_all,
    other_reduction,
    dropped_operand,
    eps_elsewhere,
    other_constant,
    other_relation,
    shifted_positions,
    mask_dropped,
    other_function,
    sum_before_product,
    stale_value,
    counted_twice,
)


# -- pairs that are written down


def clamp(low: int, high: int, first: str = "max") -> list[Step]:
    second = "min" if first == "max" else "max"
    return [("lo", const(low)), ("hi", const(high)), ("s", first, "X", "lo"), ("o", second, "s", "hi")]


WRITTEN: dict[str, Written] = {
    "(A/B)@C against (A@C)/B for full B": (
        [X, Y, W],
        [("q", "div", "X", "Y"), ("o", Contract(("k",)), "q", "W")],
        [("p", Contract(("k",)), "X", "W"), ("l", Reduce("sum", ("k",)), "Y"), ("o", "div", "p", "l")],
    ),
    "upper bound of a clamp": ([X], clamp(-1, 6), clamp(-1, 5)),
    "lower bound of a clamp": ([X], clamp(-1, 6), clamp(0, 6)),
    "bounds of a clamp exchanged": ([X], clamp(-1, 6), clamp(6, -1)),
    "clamp by min, then max": ([X], clamp(-1, 6), clamp(-1, 6, "min")),
    "x·exp(x) for silu": ([X], [("o", "silu", "X")], [("e", "exp", "X"), ("o", "mul", "X", "e")]),
}


Maker = Callable[[], "Pair | None"]


def planted_in(source: str, program: Program, mutate: Mutation, i: int, n: int) -> Pair | None:
    """The n-th error of a kind in one equation; None where it does not fit, or changes no number."""
    e = program.equations[i]
    specs = next(itertools.islice(mutate(program, i, e), n, None), None)
    graph = rebuilt(program, {i: specs}) if specs is not None else None
    if graph is None or judged(program, graph) is not False:
        return None
    name = f"{source}: {mutate.__name__} {n} at {e.targets[0].name}"
    return Pair(name, mutate.__name__, program, graph, "tests.corpora.wrong", n)


def imported(name: str, kind: str, n: int, program: Program, operators: Graph) -> Pair | None:
    try:
        graph = import_mirage(operators, program)
    except MugraphError:
        return None  # refused before there is a graph to verify
    return Pair(f"published: {name}: {kind} {n}", "published", program, graph, "tests.verify.planted", n)


def makers() -> Iterator[Maker]:
    """What makes each pair, in a fixed order."""
    for source, program in sources().items():
        for mutate in MUTATIONS:
            places = [(i, n) for i, e in enumerate(program.equations) for n, _ in enumerate(mutate(program, i, e))]
            for i, n in places[:MOST_OF_A_KIND]:
                yield functools.partial(planted_in, source, program, mutate, i, n)
    for name, steps in (WRITTEN | UNEQUAL | {name: steps for name, (_, steps) in BROKEN.items()}).items():
        written = Pair(name, "neighbour of a law", *pair(*steps), "tests.verify.variants", 0)
        yield functools.partial(lambda p: p, written)
    for m in (*by_hand(), *systematic()):
        if m.name not in SHIFTS:
            scheduled = Pair(f"schedule: {m.name}", "schedule", m.program, m.graph, "tests.verify.mutants", 0)
            yield functools.partial(lambda p: p, scheduled)
    for name, (program, operators) in SMALL.items():
        for n, (kind, other) in enumerate(planted(operators)):
            yield functools.partial(imported, name, kind, n, program, other)


@functools.cache
def wrong(every: int = 1) -> tuple[Pair, ...]:
    """The pairs of each `every`-th maker, none twice."""
    found = [p for make in itertools.islice(makers(), 0, None, every) if (p := make()) is not None]
    first = {(p.program, p.graph): p for p in reversed(found)}
    return tuple(p for p in found if first[p.program, p.graph] is p)


@functools.cache
def wrong_of_every_kind(every: int) -> tuple[Pair, ...]:
    """The pairs of each `every`-th maker, and one more for each mutation that is not among them."""
    found = list(wrong(every))
    kinds = {p.kind for p in found}
    for make in makers():
        mutation = make.args[2].__name__ if isinstance(make, functools.partial) and make.func is planted_in else ""
        if mutation and mutation not in kinds and (pair := make()) is not None:
            found.append(pair)
            kinds.add(mutation)
    return tuple(found)
