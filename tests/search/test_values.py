"""The value calculus: which expressions are one class, and what the syntactic key does not see."""

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mugraph.search import values as v
from mugraph.search.values import Call, Fingerprinter, Load, Number, Paren, Term, Value

X, Y = v.load("X", "bk"), v.load("Y", "bk")
W, G, S = v.load("W", "kn"), v.load("G", "k"), v.load("S", "b")
TWO, HALF = v.number(2), v.number(Fraction(1, 2))

PRINTS = Fingerprinter({a: a for a in "bknm"}, {"n": 6}, samples=32)


def same(a: Value, b: Value) -> bool:
    return PRINTS.fingerprint(a) == PRINTS.fingerprint(b)


def exp(x: Value) -> Value:
    return v.call("exp", x)


def sub(a: Value, b: Value) -> Value:
    return v.add(a, v.negate(b))


LAWS: dict[str, tuple[Value, Value]] = {
    # (1) + and · commute and associate; constants fold
    "add-commutes": (v.add(X, Y), v.add(Y, X)),
    "mul-commutes": (v.multiply(X, G), v.multiply(G, X)),
    "add-associates": (v.call("silu", v.add(v.add(X, Y), S)), v.call("silu", v.add(X, v.add(S, Y)))),
    "mul-associates": (v.multiply(v.multiply(X, G), S), v.multiply(X, v.multiply(S, G))),
    "constants-fold": (v.multiply(TWO, v.multiply(X, HALF)), X),
    "twice-is-a-sum": (v.multiply(TWO, X), v.add(X, X)),
    # (2) Σ is linear, sums commute, co-factors move through, Σ_a 1 = |a|
    "sum-of-sums": (v.total(v.add(X, Y), "k"), v.add(v.total(X, "k"), v.total(Y, "k"))),
    "sums-commute": (v.total(v.total(v.multiply(X, W), "k"), "n"), v.total(v.multiply(X, v.total(W, "n")), "k")),
    "cofactor-through-sum": (v.total(v.multiply(X, S), "k"), v.multiply(S, v.total(X, "k"))),
    "scaled-sum": (v.total(v.multiply(TWO, X), "k"), v.multiply(TWO, v.total(X, "k"))),
    "sum-of-one": (v.total(v.number(1), "k"), v.size("k")),
    "sum-of-constant": (v.total(v.multiply(S, HALF), "k"), v.multiply(HALF, v.size("k"), S)),
    "matmul-associates": (
        v.total(v.multiply(v.total(v.multiply(X, W), "k"), v.load("Z", "nm")), "n"),
        v.total(v.multiply(X, v.total(v.multiply(W, v.load("Z", "nm")), "n")), "k"),
    ),
    "static-size": (v.size("n"), v.number(6)),
    "size-cancels": (v.multiply(v.size("k"), v.size("k", -1)), v.number(1)),
    # (3) distribute and factor
    "distributes": (v.multiply(S, v.add(X, Y)), v.add(v.multiply(S, X), v.multiply(S, Y))),
    "contraction-distributes": (
        v.total(v.multiply(v.add(X, Y), W), "k"),
        v.add(v.total(v.multiply(X, W), "k"), v.total(v.multiply(Y, W), "k")),
    ),
    # (4) inverses and exponentials
    "inv-of-product": (v.invert(v.multiply(X, S)), v.multiply(v.invert(X), v.invert(S))),
    "inv-of-sum-times-cofactor": (
        v.call("inv", v.total(v.multiply(X, S), "k")), v.multiply(v.invert(S), v.call("inv", v.total(X, "k")))
    ),
    "inv-of-inv": (v.invert(v.invert(X)), X),
    "exp-of-sum": (exp(v.add(X, S)), v.multiply(exp(X), exp(S))),
    "exp-of-difference": (exp(sub(X, S)), v.multiply(exp(X), v.invert(exp(S)))),
    # (5) congruence
    "congruence": (v.call("silu", v.add(X, Y)), v.call("silu", v.add(Y, X))),
    "max-commutes": (v.call("max", X, Y), v.call("max", Y, X)),
    "max-associates": (v.call("max", X, v.call("max", Y, S)), v.call("max", v.call("max", X, Y), S)),
    "max-idempotent": (v.call("max", X, X), X),
    "relu-is-max-with-zero": (v.call("relu", X), v.call("max", X, v.number(0))),
    "relu-of-max": (v.call("relu", v.reduction("max", W, "k")), v.reduction("max", v.call("relu", W), "k")),
    "max-of-max": (v.reduction("max", v.reduction("max", W, "k"), "n"), v.reduction("max", W, "kn")),
}  # fmt: skip

NEIGHBOURS: dict[str, tuple[Value, Value]] = {
    "sum-of-shifted": (v.total(v.add(X, S), "k"), v.add(v.total(X, "k"), v.multiply(TWO, S))),
    "sum-of-one-is-no-literal": (v.total(v.number(1), "k"), v.number(2)),
    "other-size": (v.size("k"), v.size("b")),
    "other-static-size": (v.size("n"), v.number(7)),
    "sum-over-other-axis": (v.total(v.multiply(X, W), "k"), v.total(v.multiply(X, W), "n")),
    "sum-of-products": (v.total(v.multiply(X, G), "k"), v.multiply(v.total(X, "k"), v.total(G, "k"))),
    "product-formed-late": (v.total(v.multiply(X, X), "k"), v.multiply(v.total(X, "k"), v.total(X, "k"))),
    "exp-is-not-linear": (v.add(exp(X), exp(Y)), exp(v.add(X, Y))),
    "exp-of-sum-over-axis": (v.total(exp(X), "k"), exp(v.total(X, "k"))),
    "other-attributes": (v.call("gelu", X, attrs=("none",)), v.call("gelu", X, attrs=("tanh",))),
    "other-function": (v.call("silu", X), v.call("gelu", X)),
    "other-input": (X, Y),
    "order-of-arguments": (v.call("compare", X, Y, attrs=("lt",)), v.call("compare", Y, X, attrs=("lt",))),
    "max-is-not-min": (v.call("max", X, Y), v.call("min", X, Y)),
    "max-over-axis-is-no-sum": (v.reduction("max", X, "k"), v.total(X, "k")),
    "max-does-not-distribute": (v.reduction("max", v.multiply(X, S), "k"), v.multiply(S, v.reduction("max", X, "k"))),
    "zero-wins": (v.call("max", v.reduction("max", W, "kn"), v.number(0)), v.reduction("max", W, "kn")),
    "one-of-two-numbers": (v.call("min", v.number(2), v.number(3)), v.number(3)),
    "the-other-of-two-numbers": (v.call("min", v.number(2), v.number(3)), v.number(2)),
    "inv-of-sum": (v.invert(v.add(X, Y)), v.add(v.invert(X), v.invert(Y))),
    "negated": (sub(X, Y), sub(Y, X)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_equal_by_law_is_one_class(name: str) -> None:
    assert same(*LAWS[name])


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbour_is_another_class(name: str) -> None:
    assert not same(*NEIGHBOURS[name])


def test_fingerprints_name_the_free_axes() -> None:
    assert PRINTS.fingerprint(v.total(v.multiply(X, W), "k"))[0] == ("b", "n")


def test_aliased_axes_share_inputs_and_weights_and_are_wider() -> None:
    aliased = Fingerprinter({"b": "b", "c": "b", "k": "k"}, {})
    x, x2 = v.load("X", "bk"), v.load("X", "ck")
    assert aliased.weights("b") is aliased.weights("c")
    assert aliased.weights("b").shape == (2, 3)
    assert aliased.weights("k").shape == (2, 2)
    total = [aliased.value(v.total(y, axes)).p for y, axes in ((x, "bk"), (x2, "ck"))]
    assert total[0] == total[1]
    gram = aliased.value(v.total(v.multiply(x, x2), "k"))
    assert (gram.p == gram.p.T).all()
    outer = aliased.fingerprint(v.multiply(v.load("S", "b"), v.load("T", "c")))
    assert outer != aliased.fingerprint(v.multiply(v.load("T", "b"), v.load("S", "c")))


# -- the syntactic key


@st.composite
def random_values(draw: st.DrawFn, depth: int = 3) -> Value:
    if depth == 0:
        return draw(st.sampled_from([X, Y, W, G, S, TWO, v.size("k")]))
    a = draw(random_values(depth=depth - 1))
    kind = draw(st.sampled_from(["leaf", "add", "mul", "square", "sum", "max", "silu", "inv"]))
    match kind:
        case "add" | "mul":
            b = draw(random_values(depth=depth - 1))
            return v.add(a, b) if kind == "add" else v.multiply(a, b)
        case "square":
            return v.multiply(a, a)
        case "sum":
            return v.total(a, draw(st.sampled_from(["k", "n", "kn"])))
        case "max":
            return v.reduction("max", a, "k")
        case "silu":
            return v.call("silu", a)
        case "inv":
            return v.call("inv", a)
        case _:
            return a


def shuffled(value: Value, order: Callable[[list], list]) -> Value:  # type: ignore[type-arg]
    """The value with new bound names, and terms and factors in another order."""

    def factor(f: v.Factor) -> v.Factor:
        match f:
            case Call(fn, attrs, bound, args):
                names = v.fresh_tokens(bound)
                args = tuple(shuffled(v.rename(a, names), order) for a in args)
                return Call(fn, attrs, frozenset(names.values()), args)
            case Paren(inner):
                return Paren(shuffled(inner, order))
            case Load() | Number():
                return f

    terms = [v.freshened(t) for t in value]
    return tuple(order([Term(t.bound, tuple(order([factor(f) for f in t.factors]))) for t in terms]))


@settings(max_examples=40)
@given(random_values(), st.randoms(use_true_random=False))
def test_key_and_class_ignore_bound_names_and_order(value: Value, random) -> None:  # type: ignore[no-untyped-def]
    other = shuffled(value, lambda xs: random.sample(xs, len(xs)))
    assert v.key(other) == v.key(value)
    assert same(other, value)


@settings(max_examples=30)
@given(random_values(depth=2), random_values(depth=2))
def test_equal_keys_are_one_class(a: Value, b: Value) -> None:
    assert same(a, b) or v.key(a) != v.key(b)


def test_keys_differ_where_values_do() -> None:
    keys = [v.key(x) for pair in NEIGHBOURS.values() for x in pair]
    distinct = {PRINTS.fingerprint(x): v.key(x) for pair in NEIGHBOURS.values() for x in pair}
    assert len(set(keys)) == len(set(distinct.values())) >= len(distinct) > 1
    for (a, b), (c, d) in itertools.combinations(distinct.items(), 2):
        assert (a == c) == (b == d)


def test_bound_tokens_of_different_axes_are_never_confused() -> None:
    square = v.load("Q", "kn")
    assert v.key(v.total(square, "k")) != v.key(v.total(square, "n"))


# -- construction


def test_construction_keeps_the_normal_form() -> None:
    (term,) = v.multiply(TWO, X, v.number(3), v.size("k"), v.size("k", -1))
    assert [f for f in term.factors if isinstance(f, Number)] == [Number(Fraction(6))]
    assert v.add(X, v.number(0)) == X
    assert v.add() == v.number(0)
    assert v.multiply(v.add(X, Y), S)[0].factors[0] == Paren(v.add(X, Y))
    assert v.invert(v.multiply(TWO, X))[0].factors[0] == Number(Fraction(1, 2))


def test_a_square_of_a_sum_binds_two_indices() -> None:
    (term,) = v.multiply(*[v.total(X, "k")] * 2)
    assert len(term.bound) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (v.total(v.multiply(X, W), "k"), "Σk X[b,k]·W[k,n]"),
        (v.multiply(v.total(v.multiply(X, X), "k"), v.size("k", -1)), "Σk |k|^-1·X[b,k]·X[b,k]"),
        (v.reduction("max", v.add(X, TWO), "k"), "max[k](X[b,k] + 2)"),
        (v.multiply(S, v.add(X, Y)), "S[b]·(X[b,k] + Y[b,k])"),
    ],
)
def test_values_print_in_mathematical_notation(value: Value, text: str) -> None:
    assert v.text(value) == text
