"""The enumerator and its abstractions: what is pruned, what is found, and what gets into the closure."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import mugraph.dsl.functions as mg
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import f32, trace
from mugraph.errors import SettingError
from mugraph.ir.graph import Program
from mugraph.pipeline import finished
from mugraph.search import values as v
from mugraph.search.abstraction import ABSTRACTIONS, AbstractionName, BySize, Expressions, abstraction, is_contained
from mugraph.search.canonical import canonical
from mugraph.search.closure import Closure, Edge, close
from mugraph.search.driver import search
from mugraph.search.enumerate import Enumeration, Enumerator, Merge, alphabet_of, widen
from mugraph.search.laws import meaning
from mugraph.search.space import SearchSpace, space_of
from mugraph.search.values import Fingerprinter, Value
from mugraph.verify.equivalence import verify
from tests.search.programs import SMALL, B
from tests.search.small_fields import wrong_edges

SIZES = {"m": 16, "k": 8, "n": 4, "d": 2}
X, Y, W, Z = v.load("x", "mk"), v.load("y", "mk"), v.load("w", "kn"), v.load("z", "mn")


def polarised() -> Program:
    """Σ (x + y)² - (x - y)², which is 4 Σ x y."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return mg.sum(mg.square(x + y) - mg.square(x - y), axis=-1)

    return trace(fn, [f32[B, 48], f32[B, 48]], "polarised")


class Case:
    """A closure of values, with what an enumeration of it needs."""

    def __init__(self, *seeds: Value, samples: int = 1) -> None:
        axes = {t[0] for s in seeds for t in _tokens(s)}
        self.prints = Fingerprinter({a: a for a in axes}, {}, samples=samples)
        self.seeds = seeds
        self.closure, self.roots = close(list(seeds), self.prints, 20_000)
        self.sizes = dict.fromkeys(sorted(axes), 16)

    def enumerator(self, pruning: AbstractionName, budget: int = 3_000) -> Enumerator:
        known = [self.prints.fingerprint(self.closure.classes[c].value) for c in self.closure.order]
        chosen = abstraction(pruning, known, self.seeds, self.sizes)
        targets = {self.prints.fingerprint(s): i for i, s in enumerate(self.seeds)}
        return Enumerator(self.prints, alphabet_of(self.closure), chosen, budget, targets=targets)

    def widen(self, pruning: AbstractionName, budget: int = 3_000) -> Enumeration:
        return widen(
            self.closure, self.prints, budget, targets=self.seeds, sizes=self.sizes, pruning=pruning
        )  # fmt: skip


def _tokens(value: Value) -> set[v.Token]:
    found: set[v.Token] = set()
    for t in value:
        for f in t.factors:
            match f:
                case v.Call(_, _, bound, args):
                    found |= bound.union(*map(_tokens, args))
                case v.Paren(inner):
                    found |= _tokens(inner)
                case _:
                    found |= v.factor_tokens(f)
    return found


def of_program(program: Program) -> Case:
    p = canonical(program).program
    known = meaning(p)
    return Case(*dict.fromkeys(known.values.values()), samples=8)


# -- abstract expressions


def expression(value: Value, of: Expressions | None = None) -> object:
    return (of or Expressions(SIZES)).of_value(value)


AXIOMS: dict[str, tuple[Value, Value]] = {
    "add commutes": (v.add(X, Y), v.add(Y, X)),
    "mul commutes": (v.multiply(X, W), v.multiply(W, X)),
    "mul distributes over add": (v.multiply(W, v.add(X, Y)), v.add(v.multiply(X, W), v.multiply(W, Y))),
    "sum distributes over add": (v.total(v.add(X, Y), "k"), v.add(v.total(X, "k"), v.total(Y, "k"))),
    "sum moves out of mul": (v.multiply(v.total(X, "k"), Z), v.total(v.multiply(X, Z), "k")),
    "sums nest": (v.total(v.total(X, "k"), "m"), v.total(X, "mk")),
    "inv goes through mul": (v.invert(v.multiply(X, W)), v.multiply(v.invert(X), v.invert(W))),
    "which axis was summed is forgotten": (v.total(v.load("x", "md"), "d"), v.total(v.load("x", "dn"), "d")),
}
NO_AXIOMS: dict[str, tuple[Value, Value]] = {
    "sums of two sizes": (v.total(X, "k"), v.total(X, "m")),
    "a function of a sum": (v.call("exp", v.add(X, Y)), v.add(v.call("exp", X), v.call("exp", Y))),
    "inv of a sum": (v.invert(v.add(X, Y)), v.add(v.invert(X), v.invert(Y))),
    "what cancels": (v.multiply(X, v.call("inv", X), Y), Y),
    "a difference of equals": (v.add(X, v.negate(X), Y), Y),
    "twice is not once": (v.add(X, X), X),
}


@pytest.mark.parametrize("name", AXIOMS)
def test_expressions_that_the_axioms_make_equal_have_one_normal_form(name: str) -> None:
    of = Expressions(SIZES)
    left, right = AXIOMS[name]
    assert expression(left, of) == expression(right, of)


@pytest.mark.parametrize("name", NO_AXIOMS)
def test_other_expressions_stay_apart(name: str) -> None:
    of = Expressions(SIZES)
    left, right = NO_AXIOMS[name]
    assert expression(left, of) != expression(right, of)


TARGET = v.multiply(v.total(v.multiply(X, W), "k"), v.invert(v.call("sqrt", v.add(v.total(v.multiply(X, Y), "k"), Z))))
PARTS = {
    "an input": X,
    "a product": v.multiply(X, W),
    "one factor summed, by the published abstraction": v.total(X, "k"),
    "a sum of one input, in a denominator": v.add(v.total(v.multiply(X, Y), "k"), Z),
    "a summand of an argument": v.total(v.multiply(X, Y), "k"),
    "the denominator": v.call("sqrt", v.add(v.total(v.multiply(X, Y), "k"), Z)),
    "a product with the whole denominator": v.multiply(
        W, v.invert(v.call("sqrt", v.add(v.total(v.multiply(X, Y), "k"), Z)))
    ),
    "the target": TARGET,
}
NO_PARTS = {
    "a square": v.multiply(X, X),
    "another function": v.call("exp", X),
    "a sum too many": v.total(v.multiply(X, W), "kn"),
    "a sum that is nowhere": v.add(X, W),
    "a product across an argument": v.multiply(X, W, Y),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_a_target_can_be_written_with_is_a_part(name: str) -> None:
    assert is_part(PARTS[name])


@pytest.mark.parametrize("name", NO_PARTS)
def test_what_it_cannot_be_written_with_is_none(name: str) -> None:
    assert not is_part(NO_PARTS[name])


def is_part(value: Value) -> bool:
    by_size = BySize([TARGET], SIZES)
    assert by_size.contexts is not None
    found = by_size.expressions.of_value(value)
    return any(is_contained(found, y) for y in by_size.contexts)


def test_the_axis_blind_abstraction_takes_a_sum_too_early_for_a_part_and_the_closure_does_not() -> None:
    """(Σ_d q)·k is no part of Σ_d q·k."""
    q, k = v.load("q", "md"), v.load("key", "dn")
    case = Case(v.total(v.multiply(q, k), "d"))
    early = case.prints.fingerprint(v.total(q, "d"))
    met = {}
    for pruning in ABSTRACTIONS:
        enumerator = case.enumerator(pruning, 200)
        enumerator.run()
        met[pruning] = early in enumerator.by_print
    assert met == {"closure": False, "size": True, "off": True}


@pytest.mark.parametrize("name", SMALL)
def test_every_class_is_a_part_by_size(name: str) -> None:
    """The published abstraction is wider than the closure."""
    case = of_program(SMALL[name]())
    by_size = BySize(case.seeds, case.sizes)
    assert by_size.contexts is not None
    for c in case.closure.order:
        found = by_size.expressions.of_value(case.closure.classes[c].value)
        assert any(is_contained(found, y) for y in by_size.contexts), v.text(case.closure.classes[c].value)


def test_a_target_too_large_to_expand_prunes_nothing() -> None:
    wide = v.add(*(v.load(f"x{i}", "m") for i in range(9)))
    assert BySize([v.multiply(*[wide] * 4)], SIZES).contexts is None


def test_an_unknown_abstraction_is_refused() -> None:
    with pytest.raises(SettingError, match="unknown abstraction"):
        abstraction("axes", (), (), {})  # type: ignore[arg-type]


# -- the enumeration


def attention() -> Program:
    """The scale is a function of a constant."""
    return trace(mg.attention, [f32[2, B, 8], f32[2, 40, 8], f32[2, 40, 8]], "attention")


BUILT = {n: SMALL[n] for n in SMALL if n not in ("ntrans", "layernorm_linear")} | {"attention": attention}


@pytest.mark.parametrize("name", BUILT)
def test_the_classes_are_all_built_bottom_up(name: str) -> None:
    """Every class is reached from the leaves by operators between classes: the two engines agree."""
    case = of_program(BUILT[name]())
    enumerator = case.enumerator("closure", 20_000)
    report = enumerator.run()
    assert report.stop == "Saturated"
    known = {case.prints.fingerprint(case.closure.classes[c].value) for c in case.closure.order}
    assert known == set(enumerator.by_print)
    assert set(report.found) == set(range(len(case.seeds)))


@pytest.mark.parametrize("pruning", ABSTRACTIONS)
def test_counts_add_up_and_runs_are_alike(pruning: AbstractionName) -> None:
    case = of_program(SMALL["lora"]())
    first, second = (case.enumerator(pruning, 500).run() for _ in range(2))
    assert first == second
    assert first.candidates == first.kept + first.pruned + first.deduplicated
    assert first.candidates == 500 if first.stop == "NodeLimit" else first.candidates < 500
    assert (first.pruned == 0) == (pruning == "off")


def test_a_tighter_abstraction_meets_the_target_after_fewer_candidates() -> None:
    needed = {}
    case = of_program(SMALL["gated_mlp"]())
    root = case.closure.order[-1]
    at = next(i for i, r in enumerate(case.roots) if r == root)
    for pruning in ABSTRACTIONS:
        needed[pruning] = case.enumerator(pruning, 4_000).run().found.get(at, 10**9)
    assert needed["closure"] < needed["size"] < needed["off"]


def test_an_enumeration_stops_when_told_to() -> None:
    case = of_program(SMALL["lora"]())
    enumerator = case.enumerator("off", 3_000)
    enumerator.stop = lambda: True
    report = enumerator.run()
    assert report.stop == "TimeLimit"
    assert report.candidates < 100


def test_an_enumeration_ends_with_its_targets_where_asked() -> None:
    case = of_program(SMALL["chain"]())
    enumerator = case.enumerator("off", 3_000)
    enumerator.until_found = True
    report = enumerator.run()
    assert report.stop == "Found"
    assert max(report.found.values()) == report.candidates


# -- into the closure


def is_acyclic(closure: Closure) -> bool:
    position = {c: i for i, c in enumerate(closure.order)}
    return all(position[x] < position[c] for c in closure.order for e in closure.classes[c].edges for x in e.children)


@pytest.mark.parametrize("pruning", ABSTRACTIONS)
@pytest.mark.parametrize("name", ["rmsnorm_linear", "lora", "two_outputs", "gram", "quotient"])
def test_a_widened_closure_is_sound(name: str, pruning: AbstractionName) -> None:
    case = of_program(SMALL[name]())
    before = {c: dict(case.closure.classes[c].edges) for c in case.closure.order}
    report = case.widen(pruning, 1_500)
    assert is_acyclic(case.closure)
    assert wrong_edges(case.closure) == []
    assert all(edges.items() <= case.closure.classes[c].edges.items() for c, edges in before.items())
    after = sum(len(case.closure.classes[c].edges) for c in case.closure.order)
    assert after == sum(map(len, before.values())) + report.edges
    assert len(case.closure.order) == len(before) + report.classes
    assert report.edges == 0 or "enumerate" in case.closure.rules


def test_cancellation_is_found_without_an_abstraction_only() -> None:
    """x·x - y·y = (x + y)·(x - y): the law that the closure has not."""
    found = {}
    for pruning in ABSTRACTIONS:
        case = Case(v.add(v.multiply(X, X), v.negate(v.multiply(Y, Y))))
        case.widen(pruning)
        edges = case.closure.classes[case.roots[0]].edges
        ways = [{case.prints.fingerprint(case.closure.classes[x].value) for x in e.children} for e in edges]
        found[pruning] = {case.prints.fingerprint(x) for x in (v.add(X, Y), v.add(X, v.negate(Y)))} in ways
        assert wrong_edges(case.closure) == []
    assert found == {"closure": False, "size": False, "off": True}


def test_a_known_value_gets_a_way_over_the_classes_there_are() -> None:
    """The sum of a product over an axis of its own: over the product, where that is wanted too."""
    product = v.total(v.multiply(X, W), "k")
    case = Case(product, v.total(product, "n"))
    edge = Edge("sum", (case.roots[0],), ("n",))
    before = edge in case.closure.classes[case.roots[1]].edges
    case.widen("closure")
    assert edge in case.closure.classes[case.roots[1]].edges
    assert not before


def merge_of(case: Case) -> tuple[Merge, Callable[[Value], int]]:
    enumerator = case.enumerator("off")
    enumerator.run()
    known = {case.prints.fingerprint(case.closure.classes[c].value): c for c in case.closure.order}

    def kept(value: Value) -> int:
        return enumerator.by_print[case.prints.fingerprint(value)]

    return Merge(case.closure, case.prints, enumerator, known), kept


def test_a_way_that_would_close_a_cycle_is_refused() -> None:
    """x·w = (x·w + z) + (-z) is true, but the sum is computed from x·w."""
    product = v.multiply(X, W)
    case = Case(v.add(product, Z), v.negate(Z))
    merge, kept = merge_of(case)
    c = merge.class_of[kept(product)]
    way = Edge("add", (kept(v.add(product, Z)), kept(v.negate(Z))))
    assert merge.holds(c, way)
    before = dict(case.closure.classes[c].edges)
    merge.take(c, way)
    assert case.closure.classes[c].edges == before


def test_a_way_that_holds_by_accident_is_refused() -> None:
    case = Case(v.add(v.multiply(X, W), Z))
    merge, kept = merge_of(case)
    root = case.roots[0]
    before = dict(case.closure.classes[root].edges)
    merge.take(root, Edge("add", (kept(X), kept(Z))))
    assert case.closure.classes[root].edges == before
    merge.take(root, Edge("add", (kept(Z), kept(v.multiply(X, W)))))
    assert case.closure.classes[root].edges == before, "known in another order"


# -- in the search


def test_the_search_takes_an_identity_that_the_enumerator_finds() -> None:
    program = polarised()

    def kernels(space: SearchSpace) -> str:
        found = search(program, accept=lambda graph: verify(program, finished(graph)), space=space)
        assert bool(space.candidates) == any("enumerator" in n for n in found.report.notes)
        assert bool(space.candidates) == ("enumerator" in found.report.seconds)
        return str(found.graph)

    assert "contract[k]" not in kernels(SearchSpace())
    assert "contract[k]" not in kernels(SearchSpace(candidates=3_000))
    assert "contract[k]" in kernels(SearchSpace(candidates=3_000, abstraction="off"))


def test_full_effort_runs_the_enumerator_and_quick_does_not() -> None:
    assert space_of("full").candidates > 0
    assert space_of("full").abstraction == "closure"
    assert space_of("quick").candidates == 0


def test_a_space_with_an_impossible_enumerator_is_refused() -> None:
    with pytest.raises(SettingError, match="candidates is -1"):
        SearchSpace(candidates=-1)
    with pytest.raises(SettingError, match="abstraction is 'axes'"):
        SearchSpace(abstraction="axes")  # type: ignore[arg-type]
