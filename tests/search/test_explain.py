"""The laws that lead to a result, and reports as data."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import mugraph as mg
from mugraph.errors import ParseError, SettingError
from mugraph.ir.graph import Program
from mugraph.ir.parser import parse_program
from mugraph.search.cost import device
from mugraph.search.driver import Found, search
from mugraph.search.explain import RULES
from mugraph.search.report import WIDTH, LawStep, SearchReport
from mugraph.search.setup import set_up
from mugraph.search.space import SearchSpace, space_from
from tests.search import programs
from tests.search.programs import SMALL

PAGE = Path(__file__).parent.parent.parent / "docs" / "search.md"
ONE = SearchSpace(sizes=())
B = mg.Dim("B")


def found(program: Program, space: SearchSpace = ONE) -> Found:
    return search(program, accept=lambda graph: graph, space=space)


def steps(report: SearchReport) -> Iterator[LawStep]:
    for kernel in (*report.ahead, *report.kernels):
        yield from kernel.steps


def laws(report: SearchReport) -> set[str]:
    return {law for s in steps(report) for law in s.law.split(", ")}


@mg.program
def weighted(x: mg.f16[B, 4096], v: mg.f16[4096, 64]):
    e = mg.exp(x - mg.amax(x, -1, True))
    return (e / mg.sum(e, -1, True)) @ v


# -- the laws


def test_an_explanation_fills_a_screen_and_says_what_it_costs() -> None:
    report = found(programs.rmsnorm_linear()).report
    lines = report.explain().splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= WIDTH + 40  # the line of costs
    assert lines[0].startswith("rmsnorm_linear: 1 launch, ")
    assert "% of floor" in lines[0]
    assert lines[1].endswith("as written")
    (kernel,) = report.kernels
    assert f"bound by {kernel.bound}" in lines[3]
    assert f"{kernel.percent_of_floor:.0f} % of its floor" in lines[3]
    assert 0 < kernel.floor_seconds <= kernel.seconds


@pytest.mark.parametrize("name", SMALL)
def test_every_piece_is_an_input_a_number_or_taken_apart(name: str) -> None:
    program = SMALL[name]()
    report = found(program).report
    known = {i.name for i in program.inputs} | {s.name for s in steps(report)}
    for s in steps(report):
        pieces = set(re.findall(r"\b[tm]\d+\b", s.made))
        assert pieces <= known, f"{s} of\n{report.explain()}"
        assert s.name not in pieces
        assert set(s.law.split(", ")) <= RULES.keys()


def test_rules_have_the_names_of_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for rule in RULES:
        assert f"*{rule}*" in page, rule
    for name in SMALL:
        task, _ = set_up(SMALL[name](), lambda g: g, ONE, device())
        assert {r for c in task.closure.classes for r in c.edges.values()} - {"load", "number"} <= RULES.keys()


def test_a_named_law_is_named_where_it_is_used() -> None:
    report = found(weighted).report
    (written,) = report.written
    ((law, formula),) = written.laws
    assert law == "strip-max"
    assert "max" in written.formula
    assert "max" not in formula
    assert "strip-max" in report.explain()
    without = found(weighted, ONE.but(laws=())).report
    assert without.written[0].laws == ()
    assert "strip-max" not in without.explain()
    assert any("max" in s.made for s in steps(without))


def test_a_sum_multiplied_out_and_a_factor_taken_out_are_named() -> None:
    assert "distribute" in laws(found(programs.layernorm_linear()).report)
    assert not {"distribute", "factor"} & laws(found(programs.rmsnorm_linear()).report)

    @mg.program
    def adapted(x: mg.f16[B, 4096], w: mg.constant(mg.f16[4096, 4096]), u: mg.constant(mg.f16[4096, 4096])):
        return x @ w + x @ u

    report = found(adapted).report
    assert "factor" in laws(report)
    assert report.ahead
    assert "ahead, once: " in report.explain()


def test_library_calls_and_launches_in_sequence_are_explained() -> None:
    report = found(programs.gqa(), ONE.but(kernels=1, split=False)).report
    chosen = report.explain()
    assert all(k.steps for k in report.kernels), chosen

    @mg.program
    def attention(q: mg.f16[32, 1024, 64], k: mg.f16[32, 1024, 64], v: mg.f16[32, 1024, 64]):
        return mg.softmax(q @ k.mT) @ v

    report = found(attention, ONE.but(grid=(), loops=())).report  # our own kernels get no tiles that fit
    (kernel,) = report.kernels
    assert kernel.name.startswith("library attention")
    assert kernel.steps[0].law == "attention"
    assert kernel.steps[0].made == "attention(q, k, v)"


def test_when_nothing_beats_the_program_that_is_said() -> None:
    report = found(programs.rmsnorm_linear(), ONE.but(grid=(), loops=(), library=False)).report  # no tile fits
    assert not report.kernels
    assert "as it is written, as library calls" in report.explain()


def test_names_of_intermediate_values_do_not_matter() -> None:
    for program in (weighted, programs.layernorm_linear(), programs.rmsnorm_linear()):
        text = str(program)
        inner = {e.target.name for e in program.equations} - {o.value for o in program.outputs}
        for name in inner:
            text = re.sub(rf"\b{name}\b(?!\()", f"other_{name}", text)
        other = parse_program(text)
        assert inner.isdisjoint(e.target.name for e in other.equations)
        assert found(other).report.explain() == found(program).report.explain()


def test_two_indices_of_one_axis_are_told_apart() -> None:
    report = found(programs.layernorm_linear(), ONE.but(differences=True)).report
    formulas = [s.formula for s in steps(report)]
    assert any("Σk,k'" in f for f in formulas)
    assert all("Σk,k " not in f for f in formulas)


# -- the report as data


REPORTED = ["rmsnorm_linear", "gqa", "layernorm_linear", "two_outputs"]


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_is_the_same_after_a_round_trip(name: str) -> None:
    report = found(SMALL[name](), SearchSpace()).report
    again = SearchReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert (again.seconds, again.memory) == (report.seconds, report.memory)
    assert str(again) == str(report)
    assert again.explain() == report.explain()


def test_spaces_and_limits_are_kept() -> None:
    space = ONE.but(tiles=(("b", 16),), grid=("b",), nodes=7, candidates=10)
    report = found(programs.rmsnorm_linear(), space).report
    again = SearchReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert space_from(again.space) == space
    assert again.stop == report.stop
    assert (report.stop.kind, report.stop.limit) == ("NodeLimit", 7)


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_schema_version_is_refused(version: object) -> None:
    data = found(programs.rmsnorm_linear()).report.to_dict()
    with pytest.raises(ParseError, match="schema version"):
        SearchReport.from_dict({**data, "schema_version": version})


@pytest.mark.parametrize(
    "broken",
    [{"kernels": [1]}, {"candidates": [{"odd": 1}]}, {"notes": 3}],
)
def test_what_is_no_report_is_refused(broken: dict[str, object]) -> None:
    data = found(programs.rmsnorm_linear()).report.to_dict()
    assert SearchReport.from_dict(data)
    with pytest.raises(ParseError, match="no report"):
        SearchReport.from_dict({**data, **broken})
    with pytest.raises(ParseError, match="no report"):
        SearchReport.from_dict({"schema_version": 1})
    for text in ("none", "SearchSpace(colour='red')", "SearchSpace(3)", "SearchSpace(kernels=-1)"):
        with pytest.raises(SettingError):
            space_from(text)


def test_what_was_pruned_is_counted_by_reason() -> None:
    plain = found(programs.rmsnorm_linear()).report
    assert plain.pruned.keys() == {"infeasible", "bound", "tile"}
    widened = found(programs.rmsnorm_linear(), ONE.but(candidates=300)).report
    assert widened.pruned["abstraction"] > 0
    assert "abstraction" in str(widened)
    tight = found(SMALL["lora"](), ONE.but(tiles=(("k", 4096), ("n", 4096)))).report
    assert tight.pruned["tile"] + tight.pruned["infeasible"] > 0


def test_memory_is_measured_where_it_is_wanted() -> None:
    program = programs.rmsnorm_linear()
    plain = found(program).report
    assert plain.memory is None
    assert "memory: not measured" in str(plain)
    measured = search(program, accept=lambda g: g, space=ONE, memory=True).report
    assert measured.memory is not None
    assert measured.memory.keys() == measured.seconds.keys()
    assert all(0 < size < 2**30 for size in measured.memory.values())
    assert "MiB" in str(measured)
    assert measured == replace(plain, seconds={})
