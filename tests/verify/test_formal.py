"""Formal sums, sets of a maximum, and the bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mugraph.ir.fields import P, Q, U
from mugraph.verify.formal import (
    LOG_OF_FRACTION,
    Bound,
    FormalAlgebra,
    TooManyTerms,
    Value,
    exponent_of,
    merged,
    sum_negated,
    sum_plus,
    sum_product,
    sums_equal,
)

LIMIT = 10**6
terms = st.lists(
    st.tuples(st.integers(0, P - 1), st.sampled_from([0, 1, 2, Q, P * Q - 1, P * Q // 2])), min_size=1, max_size=5
)
sums = terms.map(lambda ts: tuple(np.array([column], dtype=U) for column in zip(*ts, strict=True)))


def as_dict(s) -> dict[int, int]:
    found: dict[int, int] = {}
    for c, e in zip(s[0][0].tolist(), s[1][0].tolist(), strict=True):
        found[e] = (found.get(e, 0) + c) % P
    return {e: c for e, c in found.items() if c}


@settings(max_examples=40)
@given(sums)
def test_merging_keeps_the_sum_and_leaves_each_exponent_once(s):
    c, e = merged(*s)
    assert as_dict((c, e)) == as_dict(s)
    assert np.count_nonzero(c) == len(as_dict(s))


@settings(max_examples=40)
@given(sums, sums)
def test_sums_and_products_are_those_of_the_group_ring(a, b):
    x, y = as_dict(a), as_dict(b)
    plus = {e: (x.get(e, 0) + y.get(e, 0)) % P for e in x.keys() | y.keys()}
    times: dict[int, int] = {}
    for e, c in x.items():
        for f, d in y.items():
            times[(e + f) % (P * Q)] = (times.get((e + f) % (P * Q), 0) + c * d) % P
    assert as_dict(sum_plus(a, b, LIMIT)) == {e: c for e, c in plus.items() if c}
    assert as_dict(sum_product(a, b, LIMIT)) == {e: c for e, c in times.items() if c}
    assert sums_equal(a, b, LIMIT).all() == (x == y)
    assert not as_dict(sum_plus(a, sum_negated(a), LIMIT))


def shares(algebra: FormalAlgebra, x: Value, swap: bool = False) -> Value:
    """exp(x) / Σ exp(x) along the last axis, plus the same of the rows in the other order where `swap`."""
    e = algebra.elementwise("exp", x)
    ratio = algebra.elementwise("div", e, algebra.total("sum", e, ("k",)))
    other = algebra.elementwise("reciprocal", algebra.total("sum", e, ("k",)))
    found = algebra.elementwise("add", *((other, ratio) if swap else (ratio, other)))
    assert isinstance(found, Value)
    return found


def test_fractions_are_compared_a_few_elements_at_a_time():
    """Each element has room for its products; all together would not."""
    algebra = FormalAlgebra({"b": 5, "k": 3})
    x, y = (algebra.random(("b", "k"), name) for name in "xy")
    a, b, c = shares(algebra, x), shares(algebra, x, swap=True), shares(algebra, y)
    assert a.denominator is not None
    crossed = a.numerator[0].shape[-1] * a.denominator[0].shape[-1]
    algebra.max_terms = 2 * crossed
    assert algebra._crosswise_equal(a, b).all()
    wrong = algebra._crosswise_equal(a, c)
    assert wrong.shape == (5, 3)
    assert not wrong.any()
    algebra.max_terms = crossed - 1
    with pytest.raises(TooManyTerms):
        algebra._crosswise_equal(a, b)


def test_a_sum_beyond_the_limit_is_refused():
    wide = np.ones((4, 4), dtype=U), np.arange(16, dtype=U).reshape(4, 4)
    sum_product(wide, wide, 64)
    with pytest.raises(TooManyTerms):
        sum_product(wide, wide, 63)


@pytest.fixture
def algebra() -> FormalAlgebra:
    return FormalAlgebra({"i": 3, "j": 4}, key="test")


def f(algebra: FormalAlgebra, fn: str, *args: Value) -> Value:
    result = algebra.elementwise(fn, *args)
    assert isinstance(result, Value)
    return result


def equal(algebra: FormalAlgebra, a: Value, b: Value) -> bool:
    return not algebra.differs(a, b).any()


def test_exponentials_turn_sums_into_products_and_nothing_else(algebra):
    a, b = algebra.random(("i",), "a"), algebra.random(("i",), "b")
    left = f(algebra, "exp", f(algebra, "add", a, b))
    assert equal(algebra, left, f(algebra, "mul", f(algebra, "exp", a), f(algebra, "exp", b)))
    assert not equal(algebra, left, f(algebra, "add", f(algebra, "exp", a), f(algebra, "exp", b)))
    assert not equal(algebra, left, f(algebra, "exp", a))


def test_an_exponent_keeps_both_parts_of_a_value(algebra):
    a, b = algebra.random(("i",), "a"), algebra.random(("i",), "b")
    e, g, s = (exponent_of(v.parts[0], v.parts[1]) for v in (a, b, f(algebra, "add", a, b)))
    assert (e % U(P) == a.parts[0]).all()
    assert (e % U(Q) == a.parts[1]).all()
    assert ((e + g) % U(P * Q) == s).all()
    assert e.max() < P * Q < 2**62


def test_a_logarithm_moves_with_a_shift_of_the_exponents_in_both_parts(algebra):
    a, b, c = (algebra.random(("i", "j"), n) for n in "abc")
    row = algebra.total("max", b, ("j",))
    v = algebra.total("sum", f(algebra, "mul", c, f(algebra, "exp", a)), ("j",))
    log = f(algebra, "log", v)
    shifted = f(algebra, "log", f(algebra, "mul", f(algebra, "exp", row), v))
    assert equal(algebra, shifted, f(algebra, "add", log, row))
    assert algebra.differs(shifted, log).all()
    assert equal(algebra, f(algebra, "log", f(algebra, "reciprocal", v)), f(algebra, "neg", log))
    assert not algebra.cuts
    assert not algebra.assumptions
    assert not algebra.zero_division


def test_a_logarithm_is_no_homomorphism(algebra):
    a, b = (algebra.total("sum", f(algebra, "exp", algebra.random(("i", "j"), n)), ("j",)) for n in "ab")
    product = f(algebra, "log", f(algebra, "mul", a, b))
    assert algebra.differs(product, f(algebra, "add", f(algebra, "log", a), f(algebra, "log", b))).all()
    assert algebra.differs(f(algebra, "log", f(algebra, "add", a, a)), f(algebra, "log", a)).all()
    one = f(algebra, "log", f(algebra, "mul", algebra.random(("i",), "c"), f(algebra, "exp", algebra.random((), "d"))))
    assert len(set(one.parts[0].tolist())) == len(one.parts[0])


def test_a_logarithm_chooses_its_form_element_by_element(algebra):
    """Whether a denominator has one term or several is a matter of the element, not of what lies beside it."""
    p, q, y = (f(algebra, "exp", algebra.random(("i",), n)) for n in "pqy")
    several = algebra.total("sum", f(algebra, "exp", algebra.random(("i", "j"), "a")), ("j",))
    fractions = [f(algebra, "div", f(algebra, "add", p, q), y), f(algebra, "div", p, several)]
    fractions.append(f(algebra, "div", f(algebra, "add", p, q), several))
    apart = algebra.joined([f(algebra, "log", v) for v in fractions], "i")
    together = f(algebra, "log", algebra.joined(fractions, "i"))
    assert equal(algebra, together, apart)
    assert algebra.cuts == {LOG_OF_FRACTION}


def test_a_logarithm_adds_the_arguments_that_only_seem_to_be_shifts():
    algebra = FormalAlgebra({"i": 2, "j": 3}, key=0)
    e = f(algebra, "exp", algebra.random(("i", "j"), "a"))
    v = algebra.total("sum", e, ("j",))
    before = algebra.error(v, v)
    log = f(algebra, "log", v)
    once = algebra.error(v, v)
    f(algebra, "log", algebra.total("sum", f(algebra, "mul", e, algebra.random(("i", "j"), "b")), ("j",)))
    assert before < once < algebra.error(v, v) < 2.0**-20
    assert log.bound == Bound(1, 0)
    quotient = f(algebra, "exp", f(algebra, "div", algebra.random(("i",), "c"), algebra.random(("i",), "d")))
    assert f(algebra, "log", quotient).bound == Bound(3, 2)


def test_equal_fractions_give_equal_keys_and_different_ones_different_keys(algebra):
    a, b, c = (algebra.random(("i",), n) for n in "abc")
    ea, eb = f(algebra, "exp", a), f(algebra, "exp", b)
    one = f(algebra, "div", f(algebra, "add", ea, eb), ea)
    top = f(algebra, "add", f(algebra, "mul", ea, c), f(algebra, "mul", c, eb))
    same = f(algebra, "div", top, f(algebra, "mul", c, ea))
    other = f(algebra, "div", f(algebra, "add", ea, eb), eb)
    assert equal(algebra, one, same)
    assert equal(algebra, f(algebra, "sqrt", one), f(algebra, "sqrt", same))
    assert not equal(algebra, f(algebra, "sqrt", one), f(algebra, "sqrt", other))


def test_a_maximum_knows_its_elements_however_they_are_grouped(algebra):
    a = algebra.random(("i", "j"), "a")
    rows = [algebra.total("max", a, ("j",)), algebra.total("max", a, ("i", "j"))]
    assert equal(algebra, rows[1], algebra.total("max", rows[0], ("i",)))
    assert not equal(algebra, rows[1], algebra.total("min", a, ("i", "j")))
    assert not equal(algebra, rows[0], algebra.total("max", f(algebra, "add", a, a), ("j",)))
    assert equal(algebra, f(algebra, "max", a, a), a)
    assert equal(algebra, f(algebra, "max", algebra.expanded(algebra.identity("max"), ("i", "j")), a), a)


def test_a_maximum_of_one_exponential_is_it(algebra):
    """However it comes to be one element: equal operands, one entry, or equal entries along an axis."""
    e = f(algebra, "exp", algebra.random(("i",), "a"))
    quotient = f(algebra, "div", e, algebra.expanded(algebra.total("sum", e, ("i",)), ("i",)))
    other = f(algebra, "exp", algebra.random(("i",), "b"))
    for v in (e, quotient):
        assert equal(algebra, f(algebra, "max", v, v), v)
        assert equal(algebra, algebra.total("max", algebra.expanded(v, ("i", "j")), ("j",)), v)
        assert equal(algebra, f(algebra, "max", algebra.expanded(algebra.identity("max"), ("i",)), v), v)
        larger = f(algebra, "max", v, other)
        assert algebra.differs(larger, v).all()
        assert algebra.differs(larger, other).all()
        assert equal(algebra, f(algebra, "max", larger, v), larger)


def test_a_maximum_is_none_of_its_elements(algebra):
    """Under a random order of the field it is one of them, and then a test accepts that with probability 1/2."""
    a, b = algebra.random(("i",), "a"), algebra.random(("i",), "b")
    larger = f(algebra, "max", a, b)
    assert algebra.differs(larger, a).all()
    assert algebra.differs(larger, b).all()


def test_a_zero_denominator_is_noticed(algebra):
    a = algebra.random(("i",), "a")
    zero = f(algebra, "sub", a, a)
    assert not algebra.zero_division
    f(algebra, "div", a, zero)
    assert algebra.zero_division


def test_a_formal_zero_denominator_is_noticed(algebra):
    a = f(algebra, "exp", algebra.random(("i",), "a"))
    assert not algebra.zero_division
    f(algebra, "div", a, f(algebra, "sub", a, a))
    assert algebra.zero_division


def test_bounds_follow_the_degrees(algebra):
    a, b = algebra.random(("i", "j"), "a"), algebra.random(("i", "j"), "b")
    assert f(algebra, "mul", a, b).bound == Bound(2, 0)
    assert f(algebra, "div", a, b).bound == Bound(1, 1)
    assert algebra.total("sum", f(algebra, "div", a, b), ("j",)).bound == Bound(4, 4)
    e = f(algebra, "exp", f(algebra, "mul", a, b))
    assert e.bound == Bound(exponent_top=2)
    assert algebra.total("sum", e, ("j",)).bound == Bound(exponent_top=2, terms=4)


def test_the_error_grows_with_the_degree_and_holds_for_a_small_experiment():
    algebra = FormalAlgebra({"i": 2}, key=0)
    a = algebra.random(("i",), "a")
    squared = f(algebra, "square", a)
    assert 0 < algebra.error(a, a) < algebra.error(squared, squared) < 2.0**-40
    e = f(algebra, "exp", a)
    several = algebra.total("sum", e, ("i",))
    weighted = f(algebra, "mul", e, a)
    assert algebra.error(e, e) < algebra.error(several, several) < 2.0**-55
    assert algebra.error(several, several) < algebra.error(weighted, weighted) < 2.0**-25  # coefficients live in Z_p


def test_an_opaque_function_adds_its_collisions():
    algebra = FormalAlgebra({"i": 2}, key=0)
    a = algebra.random(("i",), "a")
    before = algebra.error(a, a)
    f(algebra, "sqrt", a)
    assert algebra.error(a, a) > before
