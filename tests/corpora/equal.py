"""Pairs that are equal: laws composed at random, schedules by hand, published graphs.

    python -c "from tests.corpora.equal import equal; print(len(equal()))"

Each pair of `laws` is made by `disguised(program, seed)`: the program with up to five laws used, in random places.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from benchmarks.programs import PROGRAMS
from mugraph.ir.axes import Axis
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.mirage import import_mirage
from mugraph.ir.ops import Cast, Concat, Const, Contract, Elementwise, MaskedExp, Reduce, Reshape, SizeOf, Slice
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType
from tests import graphs
from tests.corpora.pairs import Pair, Spec, rebuilt, sources
from tests.verify.law_pairs import HOLDS
from tests.verify.mirage_files import SMALL
from tests.verify.mutants import SHIFTS, systematic
from tests.verify.variants import EQUAL, pair

WINNERS = Path(__file__).parent / "winners"  # what `mugraph optimize` chose, as it writes graph.txt
SEEDS = 8  # disguises of each program
MOST_LAWS = 5


class Names:
    """New names of values and axes."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.count = 0

    def __call__(self) -> str:
        self.count += 1
        return f"{self.prefix}{self.count}"


Law = Callable[[Program, Equation, Names, random.Random], Iterator[list[Spec]]]


def fn(name: str, f: str, *args: str) -> Spec:
    return Spec(name, Elementwise(f), args)


def maker(p: Program, value: str) -> Equation | None:
    return next((e for e in p.equations if value in [t.name for t in e.targets]), None)


def commuted(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    swaps = isinstance(e.op, Elementwise) and e.op.fn in ("add", "mul", "max", "min")
    if (swaps or isinstance(e.op, Contract)) and len(e.args) > 1:
        yield [Spec("", e.op, e.args[::-1])]


def associated(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """(a + b) + c = a + (b + c), and products."""
    if isinstance(e.op, Elementwise) and e.op.fn in ("add", "mul", "max", "min"):
        inner = maker(p, e.args[0])
        if inner is not None and inner.op == e.op:
            n = new()
            yield [Spec(n, e.op, (inner.args[1], e.args[1])), Spec("", e.op, (inner.args[0], n))]


def distributed(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """(a + b)·c = a·c + b·c, and the same under a sum."""
    if not (e.op == Elementwise("mul") or isinstance(e.op, Contract | Reduce)):
        return
    if isinstance(e.op, Reduce) and e.op.kind not in ("sum", "mean"):
        return
    for i, a in enumerate(e.args):
        inner = maker(p, a)
        axes = {x.name for t in p.tensors().values() if t.name == a for x in t.axes}
        if inner is None or inner.op not in (Elementwise("add"), Elementwise("sub")):
            continue
        if any({x.name for x in p.tensors()[b].axes} != axes for b in inner.args):
            continue  # a term that lacks an axis is not summed over it
        m, n = new(), new()
        yield [
            *(Spec(x, e.op, (*e.args[:i], b, *e.args[i + 1 :])) for x, b in zip((m, n), inner.args, strict=True)),
            Spec("", inner.op, (m, n)),
        ]


def factor_out(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """Σ (a·s)·b = (Σ a·b)·s where s lacks the summed axes, and the same with a quotient."""
    if not isinstance(e.op, Contract) and e.op != Reduce("sum", getattr(e.op, "axes", ())):
        return
    values = p.tensors()
    for i, a in enumerate(e.args):
        inner = maker(p, a)
        if inner is None or inner.op not in (Elementwise("mul"), Elementwise("div")):
            continue
        x, s = inner.args
        if {t.name for t in values[s].axes}.isdisjoint(e.op.axes) and set(values[x].axes) == set(values[a].axes):
            n = new()
            yield [Spec(n, e.op, (*e.args[:i], x, *e.args[i + 1 :])), Spec("", inner.op, (n, s))]


def definition(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """A function in terms of others."""
    n = new()
    match e.op:
        case Elementwise("sub"):
            yield [fn(n, "neg", e.args[1]), fn("", "add", e.args[0], n)]
        case Elementwise("div"):
            yield [fn(n, "reciprocal", e.args[1]), fn("", "mul", e.args[0], n)]
        case Elementwise("square"):
            yield [fn("", "mul", e.args[0], e.args[0])]
        case Elementwise("rsqrt"):
            yield [fn(n, "sqrt", e.args[0]), fn("", "reciprocal", n)]
        case Elementwise("silu"):
            yield [fn(n, "sigmoid", e.args[0]), fn("", "mul", n, e.args[0])]
        case Contract(axes) if len(e.args) == 2:
            yield [fn(n, "mul", *e.args), Spec("", Reduce("sum", axes), (n,))]
        case Reduce("mean", (axis,)):
            size = next(a for t in p.tensors().values() for a in t.axes if a.name == axis)
            m = new()
            yield [
                Spec(n, Reduce("sum", (axis,)), e.args),
                Spec(m, SizeOf(size), ()),
                fn("", "div", n, m),
            ]
        case _:
            return


def exponent(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """exp(a + b) = exp(a)·exp(b), exp(a − b) = exp(a)/exp(b)."""
    inner = maker(p, e.args[0]) if e.args else None
    if inner is None or inner.op not in (Elementwise("add"), Elementwise("sub")):
        return
    whole, (x, y) = {a.name for a in e.targets[0].axes}, inner.args
    first = next((a for a in (x, y) if {b.name for b in p.tensors()[a].axes} == whole), None)
    m, n = new(), new()
    last = fn("", "mul" if inner.op == Elementwise("add") else "div", m, n)
    if e.op == Elementwise("exp"):
        yield [fn(m, "exp", x), fn(n, "exp", y), last]
    elif isinstance(e.op, MaskedExp) and first == x:
        yield [Spec(m, MaskedExp(), (x, e.args[1])), fn(n, "exp", y), last]


def shifted_softmax(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """exp(x) / Σ exp(x) of x − max x."""
    if e.op != Elementwise("div"):
        return
    top, bottom = (maker(p, a) for a in e.args)
    if top is None or bottom is None or top.op != Elementwise("exp") or bottom.args != e.args[:1]:
        return
    if isinstance(bottom.op, Reduce) and bottom.op.kind == "sum":
        m, d, x, t = (new() for _ in range(4))
        yield [
            Spec(m, Reduce(r.choice(("max", "min", "sum")), bottom.op.axes), top.args),  # type: ignore[arg-type]
            fn(d, "sub", top.args[0], m),
            fn(x, "exp", d),
            Spec(t, bottom.op, (x,)),
            fn("", "div", x, t),
        ]


def neutral(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """x + 0, x·1, −(−x), casts and 1/(1/x)."""
    if not e.targets[0].dtype.is_float or len(e.targets) > 1:
        return
    n, m = new(), new()
    same = Spec(n, e.op, e.args)
    choice = r.randrange(4)
    if choice == 0:
        yield [same, Spec(m, Const(Fraction(0)), ()), fn("", "add", n, m)]
    elif choice == 1:
        yield [same, Spec(m, Const(Fraction(1)), ()), fn("", "mul", m, n)]
    elif choice == 2:
        yield [same, fn(m, "neg", n), fn("", "neg", m)]
    else:
        other = DType.f32 if e.targets[0].dtype is not DType.f32 else DType.f64
        yield [same, Spec(m, Cast(other), (n,)), Spec("", Cast(e.targets[0].dtype), (m,))]


def split_reduction(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """A reduction in two steps: of parts, then over the parts."""
    if not isinstance(e.op, Contract | Reduce) or len(e.op.axes) != 1 or len(e.targets) > 1:
        return
    if isinstance(e.op, Reduce) and e.op.kind == "mean":
        return
    values, (name,) = p.tensors(), e.op.axes
    size = next(a.size for x in e.args for a in values[x].axes if a.name == name)
    factors = [f for f in (2, 3, 4, 8, 16) if isinstance(size, int) and size % f == 0 and size > f]
    if not factors or any(name not in [a.name for a in values[x].axes] for x in e.args):
        return
    assert isinstance(size, int)
    parts = r.choice(factors)
    outer, inner = Axis(new(), parts), Axis(new(), size // parts)
    made, specs = [], []
    for x in dict.fromkeys(e.args):
        axes = [b for a in values[x].axes for b in ((outer, inner) if a.name == name else (a,))]
        specs.append(Spec(new(), Reshape(tuple((a,) for a in axes)), (x,)))
        made.append((x, specs[-1].name))
    args = tuple(dict(made)[x] for x in e.args)
    n = new()
    again: Contract | Reduce = (
        Reduce("sum", (outer.name,)) if isinstance(e.op, Contract) else Reduce(e.op.kind, (outer.name,))
    )
    first = Contract((inner.name,)) if isinstance(e.op, Contract) else Reduce(e.op.kind, (inner.name,))
    yield [*specs, Spec(n, first, args), Spec("", again, (n,))]


def cut_reduction(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """A sum as the sum over the first places and the sum over the others."""
    if not (isinstance(e.op, Contract) or (isinstance(e.op, Reduce) and e.op.kind in ("sum", "max", "min"))):
        return
    values = p.tensors()
    if len(e.op.axes) != 1 or any(e.op.axes[0] not in [a.name for a in values[x].axes] for x in e.args):
        return
    name = e.op.axes[0]
    size = next(a.size for x in e.args for a in values[x].axes if a.name == name)
    if not isinstance(size, int) or size < 2:
        return
    specs, halves = [], []
    for start, length in ((0, size // 2), (size // 2, size - size // 2)):
        out, args = Axis(new(), length), []
        for x in e.args:
            specs.append(Spec(new(), Slice(name, out, start), (x,)))
            args.append(specs[-1].name)
        op = Contract((out.name,)) if isinstance(e.op, Contract) else Reduce(e.op.kind, (out.name,))
        halves.append(Spec(new(), op, tuple(args)))
    join = "add" if isinstance(e.op, Contract) or e.op.kind == "sum" else e.op.kind
    yield [*specs, *halves, fn("", join, *(h.name for h in halves))]


def cut_and_joined(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """x as its first half and its second."""
    if len(e.targets) > 1 or isinstance(e.op, Concat | Slice | Reshape):
        return
    axes = [a for a in e.targets[0].axes if isinstance(a.size, int) and a.size > 3]
    if not axes:
        return
    axis = r.choice(axes)
    assert isinstance(axis.size, int)
    half = axis.size // 2
    low, high, n, x, y = Axis(new(), half), Axis(new(), axis.size - half), new(), new(), new()
    yield [
        Spec(n, e.op, e.args),
        Spec(x, Slice(axis.name, low, 0), (n,)),
        Spec(y, Slice(axis.name, high, half), (n,)),
        Spec("", Concat((low.name, high.name), axis), (x, y)),
    ]


def regrouped(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """(x·y)·z over two sums in the other order: A (B C) = (A B) C."""
    if not isinstance(e.op, Contract) or len(e.args) != 2:
        return
    values = p.tensors()
    for a, b in (e.args, e.args[::-1]):
        inner = maker(p, a)
        if inner is None or not isinstance(inner.op, Contract) or len(inner.args) != 2:
            continue
        x, y = inner.args
        for left, right in ((x, y), (y, x)):
            if not {t.name for t in values[left].axes}.isdisjoint(e.op.axes):
                continue
            if not {t.name for t in values[b].axes}.isdisjoint(inner.op.axes):
                continue
            n = new()
            yield [Spec(n, Contract(e.op.axes), (right, b)), Spec("", Contract(inner.op.axes), (left, n))]


def registered(p: Program, e: Equation, new: Names, r: random.Random) -> Iterator[list[Spec]]:
    """The registered laws of functions (`verify.laws`)."""
    c, x, m, n = (new() for _ in range(4))
    number = Spec(c, Const(Fraction(r.choice((2, 5)), 3)), ())
    match e.op:
        case Reduce("max" | "min"):
            yield [number, fn(x, "mul", e.args[0], c), Spec(m, e.op, (x,)), fn("", "div", m, c)]
            yield [number, fn(x, "add", c, e.args[0]), Spec(m, e.op, (x,)), fn("", "sub", m, c)]
        case Elementwise("max" | "min" as kind):
            other = {"max": "min", "min": "max"}[kind]
            yield [fn(x, "neg", e.args[0]), fn(m, "neg", e.args[1]), fn(n, other, x, m), fn("", "neg", n)]
        case Elementwise("relu" | "abs" as kind):
            yield [number, fn(x, "mul", c, e.args[0]), fn(m, kind, x), fn("", "div", m, c)]
        case Elementwise("rsqrt"):  # of sums of squares, in these programs
            yield [fn(m, "rsqrt", e.args[0]), fn(x, "square", m), fn(n, "sqrt", e.args[0]), fn("", "mul", n, x)]
        case Elementwise("div"):
            top = maker(p, e.args[0])
            bottom = maker(p, e.args[1])
            if top and bottom and top.op == Elementwise("exp") and bottom.args == e.args[:1]:
                yield [fn(m, "log", e.args[1]), fn(n, "sub", top.args[0], m), fn("", "exp", n)]


LAWS: tuple[Law, ...] = (
    commuted,
    associated,
    distributed,
    factor_out,
    definition,
    exponent,
    shifted_softmax,
    neutral,
    split_reduction,
    cut_reduction,
    cut_and_joined,
    regrouped,
    registered,
)


def disguised(program: Program, seed: int) -> tuple[KernelGraph, tuple[str, ...]]:
    """The program in other words, and the laws that were used."""
    r, used = random.Random(f"{program.name}/{seed}"), list[str]()
    graph = KernelGraph("g", program.inputs, program.equations, program.outputs)
    new = Names(f"v{seed}_")
    for _ in range(1 + seed % MOST_LAWS):
        laws = list(LAWS)
        r.shuffle(laws)
        for law in laws:
            places = list(enumerate(graph.equations))
            r.shuffle(places)
            found = None
            for i, e in places:
                options = [o for specs in law(graph, e, new, r) if (o := rebuilt(graph, {i: specs}))]
                if options:
                    found = r.choice(options)
                    break
            if found is not None:
                graph = found
                used.append(law.__name__)
                break
    return graph, tuple(used)


@functools.cache
def equal(every: int = 1) -> tuple[Pair, ...]:
    """Each `every`-th pair, in a fixed order, none twice."""
    choices = [(source, program, seed) for source, program in sources().items() for seed in range(SEEDS)]
    found: list[Pair] = []
    seen = set()
    for source, program, seed in choices[::every]:
        graph, used = disguised(program, seed)
        if used and (program, graph) not in seen:
            seen.add((program, graph))
            name = f"{source}: laws {seed}"
            found.append(Pair(name, ", ".join(used), program, graph, "tests.corpora.equal", seed))
    return tuple(found) + tuple(written()[::every])


@functools.cache
def equal_by_every_law(every: int) -> tuple[Pair, ...]:
    """Each `every`-th pair, and one more for each law that is not used in them."""
    found = list(equal(every))
    used = {law for p in found for law in p.kind.split(", ")}
    wanted = {law.__name__ for law in LAWS}
    for (source, program), seed in itertools.product(sources().items(), range(SEEDS)):
        if wanted <= used:
            break
        graph, laws = disguised(program, seed)
        if wanted & set(laws) - used:
            found.append(Pair(f"{source}: laws {seed}", ", ".join(laws), program, graph, "tests.corpora.equal", seed))
            used |= set(laws)
    return tuple(found)


def written() -> list[Pair]:
    """Pairs that are not made from seeds."""
    found: list[Pair] = []
    for name, steps in (EQUAL | {name: steps for name, (_, steps) in HOLDS.items()}).items():
        found.append(Pair(name, "law", *pair(*steps), "tests.verify.variants", 0))
    for name, (make, fused) in graphs.ALL.items():
        found.append(Pair(f"schedule: {name}", "schedule", make(), fused(), "tests.graphs", 0))
    for parts, online in ((1, False), (4, True)):
        graph = graphs.attention_fused(online=online) if parts == 1 else graphs.attention_fused(parts=parts)
        name = f"schedule: attention, {parts} parts, online {online}"
        found.append(Pair(name, "schedule", graphs.attention(), graph, "tests.graphs", 0))
    for file in sorted(WINNERS.glob("*.txt")):
        graph = parse_program(file.read_text())
        assert isinstance(graph, KernelGraph)
        found.append(Pair(f"chosen: {file.stem}", "schedule", PROGRAMS[file.stem], graph, "mugraph optimize", 0))
    for m in systematic():
        if m.name in SHIFTS:
            found.append(Pair(f"shift: {m.name}", "shift", m.program, m.graph, "tests.verify.mutants", 0))
    for name, (program, operators) in SMALL.items():
        graph = import_mirage(operators, program)
        found.append(Pair(f"published: {name}", "published", program, graph, "tests.verify.mirage_files", 0))
    return found
