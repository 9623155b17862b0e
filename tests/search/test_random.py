"""Random programs: the search neither crashes nor gives anything unverified, nor anything costlier than the source.

A program that fails is shrunk, and the failure shows it in the language.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import mugraph as mg
from benchmarks.fuzz import QUICK, checked, divides_by_zero, failure_of, runs_as
from mugraph import pipeline
from mugraph.ir.check import check
from mugraph.ir.graph import Program
from mugraph.ir.ops import Contract, Elementwise, Rename
from mugraph.pipeline import emit, finished
from mugraph.search.driver import search
from mugraph.search.report import SearchReport
from mugraph.transpiler.target import parse_target
from mugraph.verify.equivalence import Verified, verify
from tests.search.disguise import Disguise, reassociated
from tests.search.recipes import MOST_LINES, looked_up, random_recipe

SHARDS, EACH = 6, 40
FULL_SHARDS, FULL_EACH = 100, 200


def run(
    seeds: range,
    test: Callable[[Program], None] = checked,
    lines: int = MOST_LINES,
    kinds: tuple[str, ...] = (),
) -> None:
    """Checks the programs of the seeds; fails with the first that fails, shrunk."""
    for seed in seeds:
        tried(seed, test, lines, kinds)


def tried(seed: int, test: Callable[[Program], None], lines: int = MOST_LINES, kinds: tuple[str, ...] = ()) -> None:
    if (failure := failure_of(random_recipe(seed, lines, kinds), test)) is not None:
        pytest.fail(f"seed {seed}: {failure}")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_programs_are_searched_and_verified(shard: int) -> None:
    run(range(shard * EACH, (shard + 1) * EACH), lines=8)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(FULL_SHARDS))
def test_many_random_programs_are_searched_and_verified(shard: int) -> None:
    start = 1_000_000 + shard * FULL_EACH
    run(range(start, start + FULL_EACH))


def looked_up_and_checked(program: Program) -> None:
    checked(looked_up(program, seed=1))


def test_random_programs_over_rows_of_a_table_are_searched_and_verified() -> None:
    run(range(500_000, 500_015), looked_up_and_checked, lines=6)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(10))
def test_many_random_programs_over_rows_of_a_table(shard: int) -> None:
    start = 500_000 + shard * FULL_EACH
    run(range(start, start + FULL_EACH), looked_up_and_checked)


def test_a_program_that_always_divides_by_zero_is_told() -> None:
    assert divides_by_zero(mg.trace(lambda x: x / (x - x), [mg.f32[4]], "none"))
    assert divides_by_zero(mg.trace(lambda x: x / mg.iota(x.shape[0]), [mg.f32[4]], "none"))
    assert not divides_by_zero(mg.trace(lambda x: x / (1 + mg.iota(x.shape[0])), [mg.f32[4]], "some"))


# -- what is emitted


TORCH, TRITON = parse_target("torch"), parse_target("cuda:90")


def has_form_for_triton(program: Program) -> None:
    if divides_by_zero(program):
        return
    verified = search(program, accept=lambda graph: verify(program, finished(graph)), space=QUICK).accepted
    assert isinstance(verified, Verified)
    compile(emit(verified, TRITON), "kernel.py", "exec")


def test_random_programs_agree_with_float64_as_torch_code() -> None:
    run(range(600_000, 600_020), partial(runs_as, TORCH), lines=6)


def test_random_programs_have_a_form_for_triton() -> None:
    run(range(600_020, 600_035), has_form_for_triton, lines=6)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(10))
def test_many_random_programs_agree_with_float64(shard: int) -> None:
    start = 600_000 + 200 * shard
    run(range(start, start + 200), partial(runs_as, TORCH))
    run(range(start, start + 200), has_form_for_triton)
    run(range(start, start + 5), partial(runs_as, TRITON), lines=6)


def test_a_source_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    real = emit
    monkeypatch.setattr(pipeline, "emit", lambda *a: real(*a).replace(".exp()", ".sin()"))
    with pytest.raises(AssertionError):
        runs_as(TORCH, mg.trace(lambda x: mg.exp(x) + 1, [mg.f32[40]], "exponential"))


# -- the same program in other words


def lines(report: SearchReport, names: Mapping[str, str]) -> list[tuple[str, float]]:
    """What was considered, at which cost, with axes renamed; one that comes of another has its name and a number."""

    def renamed(match: re.Match[str]) -> str:
        base, number = re.fullmatch(r"(.*?)((?:_\d+)?)", match[0]).groups()  # type: ignore[union-attr]
        return names.get(match[0]) or names.get(base, base) + number

    return sorted((re.sub(r"[^\W\d]\w*", renamed, c.structure), c.seconds) for c in report.candidates)


def unverified(program: Program) -> SearchReport:
    return search(program, accept=lambda graph: graph, space=QUICK).report


def same_under_other_names(program: Program, seed: int = 1) -> None:
    """Renamed, its inputs permuted and its commutative operands swapped, a program has the same results."""
    disguise = Disguise(program, seed)
    one, other = unverified(program), unverified(disguise.program(program))
    assert str(one.stop) == str(other.stop)
    assert lines(one, disguise.axes) == lines(other, {})


def best_plan(report: SearchReport) -> float:
    """Seconds of the best plan, the program as it stands aside: as library calls, one association may do a scalar less
    than another."""
    return min((c.seconds for c in report.candidates[:-1]), default=0.0)


def squares(program: Program) -> bool:
    """Whether a product of products has a factor twice."""
    factors: dict[str, list[str]] = {}
    for e in program.equations:
        if isinstance(e.op, Elementwise) and e.op.fn == "mul":
            factors[e.target.name] = [f for a in e.args for f in factors.get(a, [a])]
    return any(len(set(found)) < len(found) for found in factors.values())


def same_cost_associated_otherwise(program: Program, seed: int = 1) -> None:
    """For programs in which no value meets itself: under other axes, as in x @ x, or as a factor, as in (x * y) * x,
    where one association may have a product less."""
    other = reassociated(program, seed)
    if other == program or any(isinstance(e.op, Rename) for e in program.equations) or squares(program):
        return
    check(other)
    reports = [unverified(p) for p in (program, other)]
    if all(str(r.stop) == "Saturated" for r in reports):
        assert best_plan(reports[0]) == pytest.approx(best_plan(reports[1]), rel=1e-9)


ASSOCIATIVE = ("term", "matmul")
SEEDS = st.integers(0, 10**6)
# Hypothesis draws the program and its rewriting; a program that fails is shrunk as text.
few = settings(max_examples=25, phases=[Phase.generate])
several = settings(max_examples=80, phases=[Phase.generate])


@few
@given(SEEDS, SEEDS)
def test_other_names_and_orders_give_the_same_results(program: int, rewriting: int) -> None:
    tried(program, partial(same_under_other_names, seed=rewriting), lines=6)


@several
@given(SEEDS, SEEDS)
def test_other_associations_give_the_same_cost(program: int, rewriting: int) -> None:
    tried(program, partial(same_cost_associated_otherwise, seed=rewriting), kinds=ASSOCIATIVE)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(10))
def test_many_programs_in_other_words_give_the_same_results(shard: int) -> None:
    start = 2_000_000 + 1_000 * shard
    run(range(start, start + 200), same_under_other_names)
    run(range(start, start + 1_000), same_cost_associated_otherwise, kinds=ASSOCIATIVE)


def test_associations_are_really_changed() -> None:
    programs = [random_recipe(seed, kinds=ASSOCIATIVE).program() for seed in range(200)]
    changed = [p for p in programs if reassociated(p, 1) != p]
    assert len(changed) > 15
    assert any(
        isinstance(e.op, Contract) for p in changed for e in set(reassociated(p, 1).equations) - set(p.equations)
    )


def test_a_different_program_has_different_lines() -> None:
    one, other = (mg.trace(lambda x, n=n: mg.softmax(x[:, :n]), [mg.f32[8, 16]], "cut") for n in (8, 9))
    assert lines(unverified(one), {}) != lines(unverified(other), {})


def test_a_failure_is_shown_as_a_small_program() -> None:
    def refuses_exponentials(program: Program) -> None:
        assert "exp(" not in str(program)

    with pytest.raises(pytest.fail.Exception) as failure:
        run(range(100), refuses_exponentials)
    small, large = re.split(r"\n\nfrom\n\n|\n\n", str(failure.value))[-2:]
    assert small.count("\n") == 2 <= large.count("\n")
    assert any(name in small for name in ("exp", "softmax", "attention"))


def test_the_same_seed_gives_the_same_program() -> None:
    recipes = [random_recipe(seed) for seed in range(50)]
    assert recipes == [random_recipe(seed) for seed in range(50)]
    assert len({str(r) for r in recipes}) > 45
    assert all(str(r.program()) == str(r.program()) for r in recipes)


def test_the_programs_hold_every_kind_of_operator() -> None:
    text = "\n".join(str(random_recipe(seed)) for seed in range(250))
    for part in (
        "@", ".mT", "mg.amax", "mg.amin", "mg.softmax", "mg.where", "causal_mask", "rms_norm", "layer_norm", " / ",
        "sqrt", ".half()", "return v0, v", "[1,", "[B,", "mg.concat", "unflatten", "permute", "cumsum", "mg.attention",
        "mg.iota", "4096", "1009", "logsumexp", "maximum", "mean", "mg.einsum", "mg.stack", ".chunk(", "mg.tril",
        "None", "masked_fill", " & ", "constant(", "bf16", "1e-30", "14336", "7168", "11008", "3584", "flatten(0",
    ):  # fmt: skip
        assert part in text, part
    operators = [len(random_recipe(seed).program().equations) for seed in range(250)]
    assert max(operators) > MOST_LINES
