"""The closure: every edge computes its class, the values that good kernels need are there, and budgets are kept."""

from collections.abc import Callable

import pytest

import mugraph as mg
from mugraph.dsl.tensor import Tensor
from mugraph.ir.graph import Program
from mugraph.search import values as v
from mugraph.search.canonical import canonical
from mugraph.search.closure import Closure, close
from mugraph.search.laws import LAWS, meaning
from mugraph.search.values import Fingerprinter
from tests.search.programs import SMALL, centred, gated_mlp, own_softmax, rmsnorm_linear, softmax
from tests.search.small_fields import agree, of_value, wrong_edges


def closure_of(program: Program, budget: int = 20_000, laws: tuple[str, ...] = tuple(LAWS)) -> tuple[Closure, int]:
    """The closure of the program's outputs and of what the laws make of them, and the class of the first output."""
    p = canonical(program).program
    known = meaning(p)
    static = {a.name: a.size for a in p.axes().values() if isinstance(a.size, int)}
    prints = Fingerprinter(known.base, static, samples=8)
    seeds = [known.values[o.value] for o in p.outputs]
    for name in laws:
        other = LAWS[name].rewrite(seeds[0])
        if other is not None and prints.fingerprint(other) == prints.fingerprint(seeds[0]):
            seeds.append(other)
    closure, classes = close(seeds, prints, budget, differences=True)
    return closure, classes[0]


@pytest.mark.parametrize("name", SMALL)
def test_every_edge_computes_its_class_from_earlier_ones(name: str) -> None:
    closure, root = closure_of(SMALL[name]())
    assert not closure.truncated
    assert wrong_edges(closure) == []
    position = {c: i for i, c in enumerate(closure.order)}
    assert position[root] == len(position) - 1 or name == "two_outputs"
    for c in closure.order:
        assert closure.classes[c].edges, v.text(closure.classes[c].value)
        for e in closure.classes[c].edges:
            assert all(position[x] < position[c] for x in e.children)


def planted(closure: Closure, kind: str, change: Callable) -> Closure:  # type: ignore[type-arg]
    """The closure with one edge of the kind changed."""
    for c in reversed(closure.order):
        for e, rule in closure.classes[c].edges.items():
            if e.kind == kind and (new := change(e)) is not None:
                closure.classes[c].edges = {**closure.classes[c].edges, new: rule}
                return closure
    raise AssertionError(f"no edge of kind {kind}")


def test_planted_wrong_edges_are_seen() -> None:
    def fresh() -> Closure:
        return closure_of(rmsnorm_linear(40, 24))[0]

    def other_child(e):  # type: ignore[no-untyped-def]
        return e._replace(children=(e.children[0], e.children[0])) if len(set(e.children)) == 2 else None

    assert wrong_edges(planted(fresh(), "product", lambda e: e._replace(axes=()) if e.axes else None))
    assert wrong_edges(planted(fresh(), "product", other_child))
    assert wrong_edges(planted(fresh(), "add", lambda e: e._replace(kind="product")))
    assert wrong_edges(planted(fresh(), "call", lambda e: e._replace(fn="tanh")))


def test_the_two_evaluators_agree_on_what_is_one_value() -> None:
    """What the fingerprints keep apart, the second evaluator keeps apart as well, class by class."""
    closure, _ = closure_of(gated_mlp(40, 24))
    tables = [of_value(closure.classes[c].value) for c in closure.order]
    assert not any(agree(a, b) for i, a in enumerate(tables) for b in tables[:i])


def texts(closure: Closure) -> set[str]:
    return {v.text(closure.classes[c].value) for c in closure.order}


def test_the_division_moves_past_the_matmul() -> None:
    """rmsnorm_linear: the unnormalised contraction and the sum of squares are both there, over the loop axis."""
    closure, root = closure_of(rmsnorm_linear())
    contractions = [
        closure.classes[c] for c in closure.order for e in closure.classes[c].edges if e.kind == "product" and e.closes
    ]
    axes = {cell.axes for cell in contractions}
    output = closure.classes[root].axes
    assert len(output) == 2
    assert output in axes  # Σ x g w
    assert (output[0],) in axes  # Σ x x


def test_a_low_rank_product_associates_both_ways() -> None:
    closure, root = closure_of(SMALL["chain"]())
    ways = [e for e in closure.classes[root].edges if e.kind == "product" and len(e.axes) == 1]
    assert len({e.axes for e in ways}) == len(ways) == 2


def test_common_factors_are_factored_out() -> None:
    """X@W1 + X@W2 = X@(W1 + W2)."""
    x, w1, w2 = v.load("X", "bk"), v.load("W1", "kn"), v.load("W2", "kn")
    both = v.add(v.total(v.multiply(x, w1), "k"), v.total(v.multiply(x, w2), "k"))
    closure, _ = close([both], Fingerprinter({a: a for a in "bkn"}, {}), 1000)
    assert "(W1[k,n] + W2[k,n])" in texts(closure)
    assert wrong_edges(closure) == []


def test_a_sum_of_matmuls_is_spliced_into_the_matmul_after_it() -> None:
    """(X@W + X@V)@H has X@((W + V)@H); X@W + Z stays a sum, whose (W + Z)@H there is not."""
    x, w, u, h = v.load("X", "bk"), v.load("W", "kn"), v.load("V", "kn"), v.load("H", "nm")

    def closure_with(other: v.Value) -> Closure:
        inner = v.add(v.total(v.multiply(x, w), "k"), v.total(v.multiply(other, u), "k"))
        return close([v.total(v.multiply(inner, h), "n")], Fingerprinter({a: a for a in "bknm"}, {}), 4_000)[0]

    found = closure_with(x)
    assert "Σn (W[k,n] + V[k,n])·H[n,m]" in texts(found)
    assert found.rules["splice"]
    assert wrong_edges(found) == []
    assert not closure_with(v.load("Z", "bk")).rules["splice"]


def test_a_difference_is_multiplied_out_only_on_request() -> None:
    """Σ (X - mean)·W has no Σ X·W, in which a mean far from 0 takes the digits; Σ (X + A)·W has."""
    x, w, a = v.load("X", "bk"), v.load("W", "kn"), v.load("A", "b")
    mean = v.multiply(v.total(x, "k"), v.size("k", -1))

    def has_product(inner: v.Value, differences: bool = False) -> bool:
        seeds, prints = [v.total(v.multiply(inner, w), "k")], Fingerprinter({b: b for b in "bkn"}, {})
        return "Σk W[k,n]·X[b,k]" in texts(close(seeds, prints, 4_000, differences=differences)[0])

    centred = v.add(x, v.negate(mean))
    assert not has_product(centred)
    assert has_product(centred, differences=True)
    assert not has_product(v.add(v.negate(x), mean))
    assert has_product(v.add(x, a))


def square_residual(x: Tensor, w: Tensor) -> Tensor:
    return x + mg.silu(x @ w)


def test_a_sum_evades_the_axis_that_its_result_is_renamed_to() -> None:
    """x + silu(x @ w) with a square w: Σ_k x[b,k]·w[k,n] with n renamed to k has parts all the same."""
    program = mg.trace(square_residual, [mg.f32[64, 128], mg.f32[128, 128]], "residual")
    closure, root = closure_of(program)
    computable: set[int] = set()
    for c in closure.order:
        if any(computable.issuperset(e.children) for e in closure.classes[c].edges):
            computable.add(c)
    assert root in computable
    b, k, n = ((a, 0) for a in ("b", "k", "n"))
    inner = v.total(v.multiply(v.load("x", "bk"), v.load("w", "kn")), "k")
    (term,) = v.rename(inner, {n: k})
    assert {t[0] for t in term.bound} == {"n"}
    assert v.free_tokens((term,)) == {b, k}
    (kept,) = v.rename(inner, {b: ("c", 0)})
    assert {t[0] for t in kept.bound} == {"k"}


def test_factors_that_no_axis_tells_apart_are_multiplied_one_by_one() -> None:
    """x / y and (x * y) / z over one index: each class has a way down to the inputs."""
    closure, root = closure_of(SMALL["quotient"]())
    assert any(e.kind == "product" and not e.closes for e in closure.classes[root].edges)


def test_a_maximum_is_none_of_its_operands() -> None:
    """Over a few elements max(x, y) is x by accident; the samples tell them apart."""
    x, y = v.load("X", ""), v.load("Y", "")
    pairs = [(v.call("max", x, y), x), (v.call("max", x, y), v.call("min", x, y))]
    pairs.append((v.reduction("max", v.load("Z", "k"), "k"), v.reduction("min", v.load("Z", "k"), "k")))

    def merged(samples: int) -> int:
        return sum(
            prints.fingerprint(a) == prints.fingerprint(b)
            for key in range(40)
            for prints in [Fingerprinter({"k": "k"}, {}, key, samples)]
            for a, b in pairs
        )

    assert merged(1) > 0
    assert merged(32) == 0


# -- what users write in more than one way

X = mg.f32[8, 128]

SAME = {
    "mean": (lambda x, y: mg.mean(x, -1), lambda x, y: mg.sum(x, -1) / 128),
    "rsqrt": (lambda x, y: x / mg.sqrt(y), lambda x, y: x * mg.rsqrt(y)),
    "power": (lambda x, y: x**-2, lambda x, y: 1 / (x * x)),
    "exponentials": (lambda x, y: mg.exp(x) * mg.exp(y), lambda x, y: mg.exp(x + y)),
    "quotient of exponentials": (lambda x, y: mg.exp(x) / mg.exp(y), lambda x, y: mg.exp(x - y)),
    "scaled maximum": (lambda x, y: mg.maximum(x, mg.maximum(y, x)), lambda x, y: mg.maximum(y, x)),
    "rectified": (lambda x, y: mg.relu(x) * y, lambda x, y: mg.maximum(x, 0) * y),
    "swish": (lambda x, y: mg.silu(x) * y, lambda x, y: y * mg.sigmoid(x) * x),
    "and": (lambda x, y: mg.where((x > y) & (y > 0), x, y), lambda x, y: mg.where((y > 0) & (x > y), x, y)),
    "two quotients": (lambda x, y: x / (y * x * y), lambda x, y: 1 / (y * y)),
}

# The last five hold, but the verifier has no law for them: as one class they would be refused later.
DIFFERENT = {
    "mean over another size": (lambda x, y: mg.mean(x, -1), lambda x, y: mg.sum(x, -1) / 64),
    "square root of a square": (lambda x, y: mg.sqrt(x * x), lambda x, y: x),
    "sum of exponentials": (lambda x, y: mg.exp(x) + mg.exp(y), lambda x, y: mg.exp(x + y)),
    "negative scale": (lambda x, y: mg.relu(x * -2), lambda x, y: mg.relu(x) * -2),
    "capped": (lambda x, y: mg.relu(x) * y, lambda x, y: mg.minimum(x, 0) * y),
    "swish of another": (lambda x, y: mg.silu(x), lambda x, y: x * mg.sigmoid(y)),
    "and or or": (lambda x, y: mg.where((x > y) & (y > 0), x, y), lambda x, y: mg.where((x > y) | (y > 0), x, y)),
    "and twice": (lambda x, y: mg.where((x > y) & (x > y), x, y), lambda x, y: mg.where(x > y, x, y)),
    "maximum and minimum": (lambda x, y: mg.maximum(x, y) + mg.minimum(x, y), lambda x, y: x + y),
    "positive scale": (lambda x, y: mg.relu(x * 2), lambda x, y: mg.relu(x) * 2),
    "shifted maximum": (lambda x, y: mg.amax(x + 2, -1), lambda x, y: mg.amax(x, -1) + 2),
    "square of a root": (lambda x, y: mg.sqrt(x) * mg.sqrt(x), lambda x, y: x),
}


def in_one_class(one: Callable[..., Tensor], other: Callable[..., Tensor]) -> bool:
    program = canonical(mg.trace(lambda x, y: (one(x, y), other(x, y)), [X, X], "pair")).program
    known = meaning(program)
    prints = Fingerprinter(known.base, {a.name: a.size for a in program.axes().values() if a.size == 128}, samples=8)
    a, b = (prints.fingerprint(known.values[o.value]) for o in program.outputs)
    return a == b


@pytest.mark.parametrize("name", SAME)
def test_two_ways_to_write_one_thing_are_one_class(name: str) -> None:
    assert in_one_class(*SAME[name])


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_or_cannot_be_confirmed_is_no_one_class(name: str) -> None:
    assert not in_one_class(*DIFFERENT[name])


# -- budgets


def test_the_node_budget_is_reported_and_leaves_a_sound_closure() -> None:
    whole, _ = closure_of(rmsnorm_linear(40, 24))
    cut, root = closure_of(rmsnorm_linear(40, 24), budget=10)
    assert cut.truncated
    assert not whole.truncated
    assert root in cut.order
    assert cut.expressions < whole.expressions
    assert wrong_edges(cut) == []


# -- named laws


def root_merges(program: Program) -> bool:
    p = canonical(program).program
    known = meaning(p)
    prints = Fingerprinter(known.base, {})
    value = known.values[p.outputs[0].value]
    other = LAWS["strip-max"].rewrite(value)
    assert other is not None
    return prints.fingerprint(other) == prints.fingerprint(value)


def test_strip_max_holds_for_a_softmax_with_its_maximum() -> None:
    assert root_merges(own_softmax())
    stripped, root = closure_of(softmax())
    wanted = {v.text(cell.value) for c, cell in enumerate(stripped.classes) if c != root}
    assert wanted <= texts(closure_of(own_softmax())[0])
    assert not wanted <= texts(closure_of(own_softmax(), laws=())[0])


def test_strip_max_is_refused_where_it_does_not_hold() -> None:
    assert not root_merges(centred())
    with_law, without = closure_of(centred())[0], closure_of(centred(), laws=())[0]
    assert texts(with_law) == texts(without)


def test_strip_max_does_not_apply_without_a_maximum() -> None:
    p = canonical(softmax()).program
    assert LAWS["strip-max"].rewrite(meaning(p).values[p.outputs[0].value]) is None
