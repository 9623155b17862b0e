"""The completeness claim of docs/search.md, on programs small enough to try all formula trees."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import pytest

from mugraph.search import values as v
from mugraph.search.closure import Builder, topological
from mugraph.search.values import Fingerprinter, Load, Number, Term, Value
from tests.search.formula_trees import Array, Key, Trees, of_term, of_value, summed


@dataclass(frozen=True)
class Case:
    """A target, and what its trees are made of: leaves, functions, the number of additions, the axes they close."""

    target: Value
    leaves: tuple[Value, ...]
    functions: tuple[str, ...] = ()
    additions: int = 0
    closable: str = "k"

    def trees(self) -> Trees:
        leaves = [f for (term,) in self.leaves for f in term.factors if isinstance(f, Load | Number)]
        return Trees(of_value(self.target), leaves, self.functions, self.additions, self.closable)


X, G, W, V = v.load("x", "mk"), v.load("g", "k"), v.load("w", "kn"), v.load("v", "kn")
A, B, U = v.load("a", "kr"), v.load("b", "rn"), v.load("u", "m")
Q, K, S = v.load("q", "md"), v.load("key", "kd"), v.load("s", "mk")
Z, Y = v.load("z", "mr"), v.load("y", "m")
CHAIN = tuple(v.load(name, axes) for name, axes in (("c", "mk"), ("d", "kn"), ("e", "nr"), ("f", "rp")))
P = v.load("p", "np")
C = v.number(3)
NORM = v.invert(v.call("sqrt", v.total(v.multiply(X, X), "k")))
E = v.call("exp", S)


def contraction(*values: Value, over: str = "k") -> Value:
    return v.total(v.multiply(*values), over)


LORA = v.add(contraction(X, W), contraction(contraction(X, A), B, over="r"))
CENTRED = v.add(X, U)
CASES = {
    "rmsnorm": Case(contraction(X, W, NORM), (X, X, X, W), ("sqrt", "inv")),
    "rmsnorm with a mean": Case(
        v.multiply(X, v.invert(v.call("sqrt", v.multiply(C, contraction(X, X))))), (X, X, X, C), ("sqrt", "inv")
    ),
    "lora": Case(LORA, (X, X, W, A, B), (), 1, "kr"),
    "lora with one x": Case(LORA, (X, W, A, B), (), 1, "kr"),
    "gated": Case(v.multiply(v.call("silu", contraction(X, W)), contraction(X, V)), (X, X, W, V), ("silu",)),
    "softmax": Case(
        v.multiply(contraction(E, V), v.invert(v.total(E, "k"))), (S, S, V), ("exp", "exp", "inv")
    ),
    "attention numerator": Case(
        contraction(v.call("exp", contraction(Q, K, over="d")), V), (Q, K, V), ("exp",), 0, "kd"
    ),
    "variance": Case(contraction(CENTRED, CENTRED), (X, X, U, U), (), 2),
    "variance, one side distributed": Case(contraction(CENTRED, CENTRED), (X, X, X, U, U, U), (), 3),
    "re-association": Case(contraction(*CHAIN, over="knr"), CHAIN, (), 0, "knr"),
    "bias before a matmul": Case(
        contraction(v.add(contraction(X, A), Y), B, over="r"), (X, A, Y, B), (), 1, "kr"
    ),
    "bias before a matmul, distributed": Case(
        contraction(v.add(contraction(X, A), Y), B, over="r"), (X, A, Y, B, B), (), 1, "kr"
    ),
    "two matmuls of one x": Case(v.add(contraction(X, W), contraction(X, V)), (X, W, V), (), 1),
    "a sum of matmuls before a matmul": Case(
        contraction(v.add(contraction(X, W), contraction(X, V)), P, over="n"), (X, W, V, P), (), 1, "kn"
    ),
    "a residual": Case(v.add(v.call("silu", v.add(contraction(X, A), Z)), Z), (X, A, Z, Z), ("silu",), 2),
}  # fmt: skip


@cache
def trees_of(name: str) -> Trees:
    return CASES[name].trees()


class Recorded(Builder):
    """A closure that remembers the products it met: what the claim excepts is told from them."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.terms: list[Term] = []

    def expand_term(self, c: int, term: Term) -> None:
        self.terms.append(term)
        super().expand_term(c, term)


def missing(case: Case, trees: Trees, kind: type[Recorded] = Recorded) -> tuple[list[Array], set[Key]]:
    """Values of trees that the claim covers and the closure lacks; and the closure's own values."""
    builder = kind(Fingerprinter({a: a for a in "dkmnpr"}, {}), 20_000)
    root = builder.class_of(case.target)
    assert root is not None
    builder.run()
    assert builder.limit is None
    known = {of_value(builder.classes[c].value).key for c in topological(builder.classes, [root])}
    unclosed = {side.key for term in builder.terms for side in unclosed_sides(term)}

    def exempt(x: Array) -> bool:
        excepted = x.key in unclosed or is_scaled(x, case, known)
        return excepted or any(y.key in known | unclosed for y in later_sums(x, case))

    return trees.missing(known, exempt), known


# -- what the claim excepts


def later_sums(x: Array, case: Case) -> Iterator[Array]:
    """A product formed before its own sum, a sum delayed: some axes are still open that the class has closed."""
    held = [t for t in x.tokens if t[0] in case.closable]
    for n in range(1, len(held) + 1):
        for over in combinations(held, n):
            yield summed(x, over)


def is_scaled(x: Array, case: Case, known: set[Key]) -> bool:
    """Another placement of a constant: a class times or without one of the constants."""
    factors = [of_value(leaf) for leaf in case.leaves if isinstance(leaf[0].factors[0], Number)]
    inverses = [Array((), pow(int(c.words), -1, 2**31 - 1) + 0 * c.words) for c in factors]
    scaled = [Array(x.tokens, x.words * int(c.words) % (2**31 - 1)) for c in (*factors, *inverses)]
    return any(y.key in known or any(z.key in known for z in later_sums(y, case)) for y in scaled)


def unclosed_sides(term: Term) -> Iterator[Array]:
    """Products of some factors of a term, where neither they nor the others are index- or holder-closed."""
    n = len(term.factors)
    for size in range(1, n):
        for side in combinations(range(n), size):
            rest = tuple(i for i in range(n) if i not in side)
            if not is_closed(term, side) and not is_closed(term, rest):
                yield of_side(term, side)


def of_side(term: Term, side: Iterable[int]) -> Array:
    inside = set(side)
    open_ = {t for i, f in enumerate(term.factors) if i not in inside for t in v.factor_tokens(f)}
    product = Term(term.bound - open_, tuple(term.factors[i] for i in sorted(inside)))
    x = of_term(product)
    return of_value(v.rename((product,), {t: (t[0], 0) for t in x.tokens}))


def is_closed(term: Term, side: tuple[int, ...]) -> bool:
    """Index-closed: it has every factor over its own axes.  Holder-closed: each of its factors holds a bound axis
    that no factor outside holds."""
    tokens = [v.factor_tokens(f) for f in term.factors]
    outside = [i for i in range(len(tokens)) if i not in side]
    own = frozenset().union(*(tokens[i] for i in side))
    elsewhere = frozenset().union(*(tokens[i] for i in outside))
    index_closed = not any(tokens[i] <= own for i in outside)
    return index_closed or all(tokens[i] & term.bound - elsewhere for i in side)


# -- the claim


@pytest.mark.parametrize("name", CASES)
def test_every_value_of_every_tree_is_a_class(name: str) -> None:
    case, trees = CASES[name], trees_of(name)
    assert trees.compute_it
    absent, known = missing(case, trees)
    assert not absent, [x.tokens for x in absent]
    assert len(trees.on_a_path() & known) > len(set(case.leaves))


@pytest.mark.full
def test_every_value_of_every_tree_of_a_larger_program_is_a_class() -> None:
    case = Case(contraction(X, G, W, NORM), (X, X, X, G, W), ("sqrt", "inv"))
    trees = case.trees()
    assert trees.compute_it
    assert not missing(case, trees)[0]


# -- the claim on random formulas

LEAVES = (X, W, V, G, U, v.load("h", "np"), v.load("o", "n"))


def random_case(r: random.Random, leaves: int, additions: int, functions: int) -> Case:
    """A formula over so many leaves, with at most so many additions and functions."""
    if leaves == 1:
        leaf = r.choice(LEAVES)
        return Case(leaf, (leaf,), closable="kn")
    if functions and r.random() < 0.2:
        of = random_case(r, leaves, additions, 0)
        return replace(of, target=v.call("silu", of.target), functions=("silu",))
    at = r.randrange(1, leaves)
    a = random_case(r, at, additions, functions)
    b = random_case(r, leaves - at, additions - a.additions, functions - len(a.functions))
    made_of = Case(a.target, a.leaves + b.leaves, a.functions + b.functions, a.additions + b.additions, "kn")
    axes_a, axes_b = ({t[0] for t in v.free_tokens(x.target)} for x in (a, b))
    if made_of.additions < additions and axes_a <= axes_b and r.random() < 0.6:
        return replace(made_of, target=v.add(a.target, b.target), additions=made_of.additions + 1)
    over = "".join(x for x in sorted(axes_a & axes_b & {"k", "n"}) if r.random() < 0.8)
    return replace(made_of, target=contraction(a.target, b.target, over=over))


@pytest.mark.parametrize(("leaves", "seeds"), [(3, range(25)), pytest.param(4, range(40), marks=pytest.mark.full)])
def test_every_value_of_every_tree_of_a_random_formula_is_a_class(leaves: int, seeds: range) -> None:
    for seed in seeds:
        r = random.Random(seed)
        case = random_case(r, leaves, r.randrange(3), 1)
        trees = case.trees()
        assert trees.compute_it
        assert not missing(case, trees)[0], v.text(case.target)


def test_the_trees_meet_values_that_the_claim_excepts() -> None:
    """X·W before its sum lies on the way of trees; it is no class."""
    case, trees = CASES["lora"], trees_of("lora")
    _, known = missing(case, trees)
    before = of_value(v.multiply(X, W)).key
    assert before in trees.on_a_path()
    assert before not in known


def test_nothing_cancels_in_the_trees() -> None:
    """x · inv(x) is not 1: the trees of z do not contain it."""
    assert not Case(Z, (Z, X, X), ("inv",), 0, "").trees().compute_it


# -- a rule less is seen


class WithoutDistribution(Recorded):
    def distribute(self, c: int, term: Term) -> None:
        pass


class WithoutFactoring(Recorded):
    def expand_sum(self, c: int, value: Value) -> None:
        self.edge(c, "add", "add", [self.class_of((t,)) for t in value])


class WithoutSplits(Recorded):
    def split(self, c: int, term: Term) -> None:
        pass


class WithoutSplicing(Recorded):
    def splice(self, c: int, term: Term) -> None:
        pass


class WithoutArguments(Recorded):
    def expand_factor(self, c: int, bound: frozenset[v.Token], f: v.Factor) -> None:
        if not isinstance(f, v.Call):
            super().expand_factor(c, bound, f)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (WithoutDistribution, "variance, one side distributed"),
        (WithoutDistribution, "bias before a matmul, distributed"),
        (WithoutFactoring, "two matmuls of one x"),
        (WithoutFactoring, "lora with one x"),
        (WithoutSplits, "re-association"),
        (WithoutSplicing, "a sum of matmuls before a matmul"),
        (WithoutArguments, "attention numerator"),
    ],
)
def test_a_closure_without_a_rule_is_seen(kind: type[Recorded], name: str) -> None:
    assert missing(CASES[name], trees_of(name), kind)[0]
