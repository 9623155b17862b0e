"""Programs that are deep, or built to blow up the normal form: time and memory stay bounded, and a budget that runs
out is named and leaves the program itself in the closure."""

import tracemalloc
from collections.abc import Callable
from functools import reduce

import pytest

import mugraph as mg
from mugraph.dsl.tensor import Tensor as X
from mugraph.ir.graph import Program
from mugraph.search import closure as closures
from mugraph.search import values as v
from mugraph.search.canonical import canonical, ordered
from mugraph.search.closure import Closure, close
from mugraph.search.driver import search
from mugraph.search.laws import meaning
from mugraph.search.pieces import pieces
from mugraph.search.space import SearchSpace
from mugraph.search.values import Fingerprinter


def closure_of(program: Program, budget: int = SearchSpace().nodes) -> Closure:
    """The closure of all values of the program."""
    p = canonical(pieces(ordered(program))).program
    known = meaning(p)
    closure, _ = close(list(known.values.values()), Fingerprinter(known.base, {}), budget)
    return closure


def added(values: list[X]) -> X:
    return reduce(lambda a, b: a + b, values)


def multiplied(values: list[X]) -> X:
    return reduce(lambda a, b: a * b, values)


def row(x: X) -> X:
    return mg.sum(x, -1, True)


# -- programs that blow up


def products_of_sums(n: int, x: list[X]) -> X:
    """Σ_k of a product of sums of rows times statistics, which multiplied out has n ** 9 terms."""
    factors = [added([x[(7 * i + j) % 6] * row(x[(i + 3 * j) % 6]) * (j + 2) for j in range(n)]) for i in range(9)]
    return row(multiplied(factors))


def sums_of_products_of_sums(n: int, x: list[X]) -> X:
    def product(i: int) -> X:
        left, right = x[i % 6] + x[(i + 1) % 6], x[(i + 2) % 6] + x[(5 * i + 3) % 6] * (i + 1)
        return row(left * right * (x[(i + 3) % 6] + x[(3 * i + 4) % 6]))

    return added([product(i) for i in range(n)]) * x[0]


def exponentials_of_sums(n: int, x: list[X]) -> X:
    y = x[0]
    for i in range(n):
        y = mg.exp(y * x[i % 6] + mg.exp(y - x[(i + 1) % 6]) + row(y))
    return y


def squares_of_sums(n: int, x: list[X]) -> X:
    y = added([mg.exp(x[i % 6] * (i + 1)) for i in range(40)])
    for i in range(n):
        y = y * y + x[i % 6] * row(y)
    return row(y)


def doubled(n: int, x: list[X]) -> X:
    """2 ** n times x, as a sum of that many terms if it were written out."""
    y = x[0]
    for _ in range(n):
        y = y + y
    return y


def squared_constant(n: int, x: list[X]) -> X:
    """A literal of 2 ** n digits if it were multiplied out."""
    c = row(x[0]) * 0 + 3
    for _ in range(n):
        c = c * c
    return x[0] * c


def outer_product(n: int, x: list[X]) -> X:
    """2 ** n elements at two an axis."""
    y = multiplied([x[i % 6][:, 0].reshape(*[64 if i == j else 1 for j in range(n)]) for i in range(n)])
    return mg.sum(mg.exp(y), tuple(range(n)))


BLOWING: dict[str, tuple[Callable[[int, list[X]], X], int, int]] = {
    "products of sums": (products_of_sums, 6, 40),
    "sums of products of sums": (sums_of_products_of_sums, 12, 120),
    "exponentials of sums": (exponentials_of_sums, 20, 300),
    "squares of sums": (squares_of_sums, 6, 60),
    "doubled": (doubled, 80, 400),
    "squared constant": (squared_constant, 40, 400),
    "outer product": (outer_product, 12, 20),
}


def blowing(name: str, n: int) -> Program:
    build, _, _ = BLOWING[name]
    return mg.trace(lambda *x: build(n, list(x)), [mg.f32[64, 128]] * 6, "blowing")


def peak(run: Callable[[], object]) -> float:
    """Megabytes (10^6) that Python held at once."""
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def has_a_way(closure: Closure) -> bool:
    """Every class is computed from leaves."""
    computable: set[int] = set()
    for c in closure.order:
        if any(computable.issuperset(e.children) for e in closure.classes[c].edges):
            computable.add(c)
    return len(computable) == len(closure.order)


@pytest.mark.parametrize("name", BLOWING)
def test_a_program_that_blows_up_is_bounded(name: str) -> None:
    program = blowing(name, BLOWING[name][1])
    found: list[Closure] = []
    assert peak(lambda: found.append(closure_of(program, budget=1_000))) < 100
    (closure,) = found
    assert has_a_way(closure)
    assert closure.limit is None or str(closure.limit) == "NodeLimit(1000)"
    assert closure.expressions < 1_500


@pytest.mark.full
@pytest.mark.parametrize("name", BLOWING)
def test_a_large_program_that_blows_up_is_searched(name: str) -> None:
    program = blowing(name, BLOWING[name][2])
    space = SearchSpace(sizes=(), nodes=40_000, states=2_000, entries=100_000)
    found = []

    def run() -> None:
        found.append(search(program, accept=lambda graph: graph, space=space, budget_seconds=60))

    assert peak(run) < 500
    stop = found[0].report.stop
    kinds = ("Saturated", "NodeLimit", "MemoryLimit", "EntryLimit", "StateLimit", "SegmentLimit", "TimeLimit")
    assert stop.kind in kinds


def test_a_budget_is_named_and_the_program_is_still_there() -> None:
    program = blowing("products of sums", 4)
    whole, cut = closure_of(program), closure_of(program, budget=20)
    assert whole.limit is None or whole.limit.limit == 4_000
    assert str(cut.limit) == "NodeLimit(20)"
    assert cut.expressions < whole.expressions
    assert has_a_way(cut)


def test_the_words_of_values_are_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "MOST_WORDS", 100)
    program = blowing("exponentials of sums", 3)
    closure = closure_of(program)
    assert str(closure.limit) == "MemoryLimit(100)"
    assert has_a_way(closure)
    found = search(program, accept=lambda graph: graph, space=SearchSpace(sizes=(), states=100, operators=64))
    assert str(found.report.stop) == "MemoryLimit(100)"


def test_a_class_without_a_way_is_seen() -> None:
    closure = closure_of(blowing("exponentials of sums", 2))
    assert has_a_way(closure)
    closure.classes[closure.order[3]].edges.clear()
    assert not has_a_way(closure)


def test_values_over_many_axes_are_evaluated_one_axis_after_the_other() -> None:
    """A chain of ten matrices has eleven axes; the greedy order holds few at once."""
    axes = "abcdefghijkl"
    chain = [v.load(f"m{i}", axes[i : i + 2]) for i in range(11)]
    shuffled = chain[::2] + chain[1::2]
    value = v.total(v.multiply(*shuffled), axes[1:-1])
    assert v.width(value) <= v.MOST_AXES
    wide = v.multiply(*(v.load(f"u{i}", axes[i]) for i in range(12)))
    assert v.width(wide) == 12
    prints = Fingerprinter({a: a for a in axes}, {})
    assert prints.fingerprint(value) == prints.fingerprint(v.total(v.multiply(*chain), axes[1:-1]))


# -- deep programs


def chained(step: Callable[[X, X, int], X]) -> Callable[..., X]:
    def f(x: X, *weights: X) -> X:
        for i, w in enumerate(weights):
            x = step(x, w, i)
        return x

    return f


DEEP: dict[str, Callable[[X, X, int], X]] = {
    "layers": lambda x, w, i: mg.silu(x @ w),
    "residual": lambda x, w, i: x + mg.silu(x @ w),
    "normed": lambda x, w, i: x + mg.silu(mg.rms_norm(x) @ w),
    "used twice": lambda x, w, i: mg.silu(x) * mg.gelu(x),
    "a polynomial": lambda x, w, i: x * w + 1,
    "halves": lambda x, w, i: mg.silu(mg.concat([x[:, 32:], -x[:, :32]], -1) * w),
}


def deep(name: str, levels: int) -> Program:
    return mg.trace(chained(DEEP[name]), [mg.f32[64, 64]] * (levels + 1), "deep")


@pytest.mark.parametrize("name", DEEP)
def test_a_deep_program_has_a_closure_of_its_size(name: str) -> None:
    """150 levels: no recursion over them, and three times the work of 50."""
    short, long = closure_of(deep(name, 50)), closure_of(deep(name, 150))
    assert has_a_way(long)
    assert long.expressions < 3.3 * short.expressions + 10
    assert sum(long.rules.values()) < 3.5 * sum(short.rules.values()) + 10


def test_a_sum_of_many_terms_is_computed_as_the_program_does() -> None:
    """x + f + g + ..: each partial sum that the program has is a way to compute the next."""
    closure = closure_of(deep("residual", 8))
    sums = [c for c in closure.order if len(closure.classes[c].value) > closures.MOST_TERMS]
    assert sums
    for c in sums:
        assert any(e.kind == "add" and len(e.children) == 2 for e in closure.classes[c].edges)
