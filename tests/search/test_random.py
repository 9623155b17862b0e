"""Random programs: the search neither crashes nor gives anything unverified, nor anything costlier than the source.

A program that fails is shrunk, and the failure shows it in the language.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial

import pytest

import mugraph as mg
from mugraph.errors import MugraphError
from mugraph.ir.check import check
from mugraph.ir.graph import Program
from mugraph.ir.ops import Contract, Rename
from mugraph.pipeline import finished
from mugraph.search.driver import LIBRARY, Found, search
from mugraph.search.report import SearchReport
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import Verified, verify
from tests.search.disguise import Disguise, reassociated
from tests.search.recipes import MOST_LINES, random_recipe, shrunk

# One size, and budgets that keep a program within a fraction of a second.
QUICK = SearchSpace(sizes=(), states=1_000, entries=50_000)

SHARDS, EACH = 8, 40
FULL_SHARDS, FULL_EACH = 100, 200


def found(program: Program) -> Found:
    return search(program, accept=lambda graph: verify(program, finished(graph)), space=QUICK)


def checked(program: Program) -> None:
    """Raises AssertionError, or whatever the search raises."""
    result = found(program)
    report = result.report
    assert isinstance(result.accepted, Verified)
    assert result.accepted.program == program
    source = report.candidates[-1]
    assert source.structure == LIBRARY
    if not source.verdict.startswith("would keep in 16 bits"):
        assert report.predicted_seconds <= source.seconds * (1 + 1e-9), "costlier than the source"


def run(
    seeds: range,
    test: Callable[[Program], None] = checked,
    lines: int = MOST_LINES,
    kinds: tuple[str, ...] = (),
) -> None:
    """Checks the programs of the seeds; fails with the first that fails, shrunk."""
    for seed in seeds:
        recipe = random_recipe(seed, lines, kinds)
        try:
            test(recipe.program())
        except (AssertionError, ArithmeticError, LookupError, MugraphError, TypeError, ValueError) as error:
            kind = type(error)
            smallest = shrunk(recipe, partial(raises, test, kind))
            pytest.fail(f"seed {seed}: {kind.__name__}: {error}\n\n{smallest}\n\nfrom\n\n{recipe}")


def raises(test: Callable[[Program], None], kind: type[Exception], program: Program) -> bool:
    try:
        test(program)
    except Exception as error:
        return type(error) is kind
    return False


@pytest.mark.parametrize("shard", range(SHARDS))
def test_random_programs_are_searched_and_verified(shard: int) -> None:
    run(range(shard * EACH, (shard + 1) * EACH), lines=8)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(FULL_SHARDS))
def test_many_random_programs_are_searched_and_verified(shard: int) -> None:
    start = 1_000_000 + shard * FULL_EACH
    run(range(start, start + FULL_EACH))


# -- the same program in other words


def lines(report: SearchReport, names: Mapping[str, str]) -> list[tuple[str, float]]:
    """What was considered, at which cost, with axes renamed; one that comes of another has its name and a number."""

    def renamed(match: re.Match[str]) -> str:
        base, number = re.fullmatch(r"(.*?)((?:_\d+)?)", match[0]).groups()  # type: ignore[union-attr]
        return names.get(match[0]) or names.get(base, base) + number

    return sorted((re.sub(r"[^\W\d]\w*", renamed, c.structure), c.seconds) for c in report.candidates)


def unverified(program: Program) -> SearchReport:
    return search(program, accept=lambda graph: graph, space=QUICK).report


def same_under_other_names(program: Program) -> None:
    """Renamed, its inputs permuted and its commutative operands swapped, a program has the same results."""
    disguise = Disguise(program, seed=1)
    one, other = unverified(program), unverified(disguise.program(program))
    assert str(one.stop) == str(other.stop)
    assert lines(one, disguise.axes) == lines(other, {})


def same_cost_associated_otherwise(program: Program) -> None:
    """For programs in which no value meets itself under other axes, as in x @ x."""
    other = reassociated(program, seed=1)
    if other == program or any(isinstance(e.op, Rename) for e in program.equations):
        return
    check(other)
    reports = [unverified(p) for p in (program, other)]
    if all(str(r.stop) == "Saturated" for r in reports):
        assert reports[0].predicted_seconds == pytest.approx(reports[1].predicted_seconds, rel=1e-9)


ASSOCIATIVE = ("term", "matmul")


def test_other_names_and_orders_give_the_same_results() -> None:
    run(range(60), same_under_other_names, lines=6)


def test_other_associations_give_the_same_cost() -> None:
    run(range(200), same_cost_associated_otherwise, kinds=ASSOCIATIVE)


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
        "mg.iota", "4096", "1009", "logsumexp", "maximum", "mean",
    ):  # fmt: skip
        assert part in text, part
    operators = [len(random_recipe(seed).program().equations) for seed in range(250)]
    assert max(operators) > MOST_LINES
