"""Why a μGraph was not found or not chosen: each answer where it is due, and not where it is not."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mugraph as mg
from benchmarks.programs import FAMILIES
from mugraph.errors import GraphError, ParseError, VerificationError
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Program, Store
from mugraph.ir.ops import Kernel, Library, Select
from mugraph.ir.parser import parse_program
from mugraph.ir.shift import shifted
from mugraph.ir.types import DType, Tensor
from mugraph.pipeline import finished
from mugraph.result import read_graph
from mugraph.search.answers import Answer, Costlier, Found, NotEquivalent, Outside, Pruned, to_dict
from mugraph.search.build import baseline, library_equation
from mugraph.search.cost import device
from mugraph.search.driver import Found as Searched
from mugraph.search.driver import search
from mugraph.search.pieces import is_free
from mugraph.search.report import SearchReport, StopReason
from mugraph.search.space import SearchSpace
from mugraph.search.why import why_not
from mugraph.verify.equivalence import verify
from tests.search.recipes import random_recipe

B = mg.Dim("B")
ONE = SearchSpace(sizes=())


def found(program: Program, **space: Any) -> Searched:
    """The same program is searched once in each space."""
    key = (program.name, str(program), ONE.but(**space))
    if key not in SEARCHED:
        SEARCHED[key] = search(program, accept=lambda graph: graph, space=key[-1])
    return SEARCHED[key]


SEARCHED: dict[tuple[str, str, SearchSpace], Searched] = {}


def ask(program: Program, graph: Program | str, checked: bool = True, **space: Any) -> Answer:
    """What is said of a graph, which the verifier has to take first if `checked`."""
    given = parse_program(graph) if isinstance(graph, str) else graph
    report = found(program, **space).report
    return why_not(program, given, report, on=device(), verify=verify if checked else None)


@mg.program
def norm_linear(x: mg.f16[B, 4096], g: mg.f16[4096], w: mg.f16[4096, 4096]):
    return mg.rms_norm(x, g) @ w


@mg.program
def low_rank(x: mg.f16[B, 4096], w: mg.f16[4096, 4096], a: mg.f16[4096, 16], b: mg.f16[16, 4096]):
    return x @ w + (x @ a) @ b


@mg.program
def scores(x: mg.f16[B, 64], w: mg.f16[64, 512]):
    return mg.softmax(x @ w)


NORM_LINEAR = """\
mugraph norm_linear
  dim B
  axes b = B, k = 4096, n = 4096
  input x: f16[b, k]
  input g: f16[k]
  input w: f16[k, n]
  out: f16[b, n] = kernel(x, g, w)
    block
      grid b: 16, n: 32
      loop k: 128
        load x_tile: f16[b, k] = x
        load g_tile: f16[k] = g
        load w_tile: f16[k, n] = w
        t: f32[b, k] = mul(x_tile, g_tile)
        acc: f32[b, n] += contract[k](t, w_tile)
        acc2: f32[b] += contract[k](x_tile, x_tile)
      epilogue
        k_size: f32[] = |k|
        mean: f32[b] = div(acc2, k_size)
        c: f32[] = 1/1000000
        shifted: f32[b] = add(mean, c)
        root: f32[b] = sqrt(shifted)
        out_tile: f32[b, n] = div(acc, root)
      store out_tile -> out
  output out
"""


def norm_linear_tiles(b: int = 16, n: int = 32, k: int = 128) -> str:
    return NORM_LINEAR.replace("b: 16, n: 32", f"b: {b}, n: {n}").replace("loop k: 128", f"loop k: {k}")


# -- found


def per_operator(program: Program, kernels: bool = False) -> KernelGraph:
    """A library call, or a kernel, for each operator of the program."""
    tensors = program.tensors()

    def one(e: Equation) -> Equation:
        if not kernels or is_free(e) or not e.args or len(e.targets) > 1 or not e.target.axes:
            return library_equation(e, tensors)
        args = tuple(dict.fromkeys(e.args))
        loads = tuple(Load(replace(tensors[a], name=f"{a}_tile"), a) for a in args)
        dtype = DType.f32 if e.target.dtype.is_float else e.target.dtype
        t = Tensor(f"{e.target.name}_tile", e.target.dims, dtype)
        step = Equation((t,), e.op, tuple(f"{a}_tile" for a in e.args))
        block = BlockGraph((), None, (), loads, (step,), (Store(t.name, e.target.name),))
        return Equation(e.targets, Kernel((block,)), args)

    return KernelGraph(program.name, program.inputs, tuple(map(one, program.equations)), program.outputs)


SOURCES: dict[str, Program] = {
    f"{family}, {name}": p for family, f in FAMILIES.items() for name, p in f.variants.items()
}


def test_the_programs_themselves_are_in_every_space() -> None:
    report = found(scores, nodes=1, states=1).report  # what it says of the list is not what is asked for
    for name, program in SOURCES.items():
        for graph in (program, per_operator(program)):
            assert isinstance(why_not(program, graph, report, on=device()), Found), name


@pytest.mark.full
@pytest.mark.parametrize("name", SOURCES)
def test_the_program_itself_is_in_the_default_space(name: str) -> None:
    program = SOURCES[name]
    report = found(program).report
    for graph in (program, per_operator(program)):
        assert isinstance(why_not(program, graph, report, on=device()), Found)


def test_the_library_calls_of_a_single_element_are_shifted_and_found() -> None:
    """They run with the exponential shifted, which no operator of the program as it is written is."""
    program = mg.trace(lambda x: mg.log(mg.exp(x)), [mg.f16[1]], "log_exp")
    report = found(program).report
    for graph in (baseline(program), baseline(shifted(program, unsummed=True))):
        answer = why_not(program, graph, report, on=device())
        assert isinstance(answer, Found), str(answer)
        assert answer.rank == answer.plans
    other = mg.trace(lambda x: mg.log(mg.exp(x) * 2), [mg.f16[1]], "log_exp")
    assert isinstance(why_not(program, baseline(other), report, on=device()), NotEquivalent)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10_000))
def test_random_programs_and_their_results_are_found(seed: int) -> None:
    program = random_recipe(seed, lines=7).program()
    searched = found(program, states=500)
    masked = any(isinstance(e.op, Select) for e in program.equations)
    for graph in (searched.graph, finished(searched.graph)):
        answer = why_not(program, graph, searched.report, on=device())
        if masked and graph is not searched.graph and isinstance(answer, NotEquivalent):
            # a mask that became part of a masked exponential: a law that only the verifier has
            answer = why_not(program, graph, searched.report, on=device(), verify=verify)
            assert isinstance(answer, Outside), str(answer)
            assert "only the verifier knows" in answer.what
            continue
        assert isinstance(answer, Found), str(answer)
        assert answer.verdict == "chosen"
    last = why_not(program, program, searched.report, on=device())
    assert isinstance(last, Found), str(last)


@pytest.mark.full
@pytest.mark.parametrize("start", range(0, 1_000, 100))
def test_many_random_programs_and_their_results_are_found(start: int) -> None:
    for seed in range(start, start + 100):
        test_random_programs_and_their_results_are_found.hypothesis.inner_test(seed)  # type: ignore[attr-defined]


def test_a_contraction_that_is_stored_in_another_type_is_found() -> None:
    program = mg.trace(lambda x, w: (x @ w).to(mg.bf16), [mg.f32[16, 4096], mg.f32[4096, 64]], "narrowed")
    searched = found(program, split=False)
    (launch,) = searched.graph.equations
    assert isinstance(launch.op, Library)
    answer = why_not(program, searched.graph, searched.report, on=device())
    assert isinstance(answer, Found), str(answer)
    assert answer.verdict == "chosen"
    last = why_not(program, program, searched.report, on=device())
    assert isinstance(last, Found), str(last)
    assert last.rank > answer.rank


def test_operators_as_kernels_are_the_program_too() -> None:
    program = norm_linear
    for answer in (
        ask(program, per_operator(program, kernels=True)),
        ask(program, per_operator(program, True), kernels=1),
    ):
        assert isinstance(answer, Found | Costlier), str(answer)


def test_every_plan_of_the_list_is_found_at_its_place() -> None:
    plans: list[KernelGraph] = []

    def refuse(graph: KernelGraph) -> None:
        plans.append(graph)
        if graph.kernels():
            raise VerificationError("to see them all")

    search(low_rank, accept=refuse, space=ONE)
    report = found(low_rank).report
    ranks = []
    for graph in plans:
        answer = why_not(low_rank, graph, report, on=device())
        assert isinstance(answer, Found)
        assert answer.structure == report.candidates[answer.rank - 1].structure
        ranks.append(answer.rank)
    assert len(ranks) > 4
    assert ranks == sorted(set(ranks))


def test_names_of_intermediate_values_do_not_matter() -> None:
    graph = found(norm_linear).graph
    text = str(graph)
    for name in set(re.findall(r"\b[a-z]\w*(?=: f32)", text)):
        text = re.sub(rf"\b{name}\b(?!\()", f"other_{name}", text)
    assert text != str(graph)
    first = ask(norm_linear, text)
    assert isinstance(first, Found)
    assert first.rank == 1
    assert first.verdict == "chosen"
    assert str(first).startswith("found: it is number 1 of ")


def test_an_alias_may_have_any_name() -> None:
    @mg.program
    def gram(x: mg.f32[B, 64]):
        return x @ x.mT

    graph = found(gram).graph
    assert isinstance(ask(gram, graph), Found)


# -- costlier


def test_other_tiles_are_costlier() -> None:
    report = found(norm_linear).report
    answer = ask(norm_linear, norm_linear_tiles(n=8))
    assert isinstance(answer, Costlier)
    assert answer.best_seconds == report.predicted_seconds < answer.seconds
    assert answer.by == pytest.approx(answer.seconds - answer.best_seconds)
    assert answer.ratio == pytest.approx(answer.seconds / answer.best_seconds)
    (kernel,) = answer.kernels
    assert kernel.bound in str(answer)
    assert "of its floor" in str(answer)
    assert kernel.name == "kernel grid(b,n) loop(k)"
    assert to_dict(answer)["answer"] == "Costlier"


def test_the_price_of_a_graph_is_that_of_the_search() -> None:
    """What a space with fixed tiles chooses is costlier in a wider one, at the price that it had."""
    fixed = found(low_rank, tiles=(("n", 64), ("k", 128)), library=False, split=False)
    assert fixed.graph.kernels()
    answer = ask(low_rank, fixed.graph, library=False, split=False)
    assert isinstance(answer, Costlier)
    assert answer.seconds == pytest.approx(fixed.report.predicted_seconds, rel=1e-12)
    assert [k.terms for k in answer.kernels] == [k.terms for k in fixed.report.kernels]


# -- outside


@pytest.mark.parametrize(
    ("space", "restriction", "remedy"),
    [
        ({"passes": 0}, "passes", "passes=1"),
        ({"grid": ("b",)}, "grid", "Change SearchSpace.grid"),
        ({"loops": ()}, "loops", "Change SearchSpace.loops"),
        ({"tiles": (("n", 16),)}, "tiles", "Change SearchSpace.tiles"),
    ],
)
def test_what_a_restricted_space_leaves_out(space: dict[str, Any], restriction: str, remedy: str) -> None:
    answer = ask(norm_linear, NORM_LINEAR, **space)
    assert isinstance(answer, Outside)
    assert answer.restriction == restriction
    assert remedy in str(answer)
    assert not isinstance(ask(norm_linear, NORM_LINEAR), Outside)


def test_kernels_library_calls_and_splits_may_be_left_out() -> None:
    graphs: dict[str, KernelGraph] = {}

    def refuse(graph: KernelGraph) -> None:
        names = [type(e.op).__name__ for e in graph.equations]
        block = graph.kernels()[0].op.blocks[0] if graph.kernels() else None  # type: ignore[union-attr]
        key = "split" if block and block.split else "library" if "Library" in names else "kernels"
        graphs.setdefault(key, graph)
        if graph.kernels():
            raise VerificationError("to see them all")

    search(low_rank, accept=refuse, space=ONE)
    search(low_rank, accept=refuse, space=ONE.but(library=False, split=False))
    assert graphs.keys() == {"split", "library", "kernels"}
    for key, space in (("split", {"split": False}), ("library", {"library": False})):
        answer = ask(low_rank, graphs[key], **space)
        assert isinstance(answer, Outside), str(answer)
        assert answer.restriction == key
        assert f"{key}=True" in answer.remedy
        assert isinstance(ask(low_rank, graphs[key]), Found)


TWO_KERNELS = """\
mugraph scores
  dim B
  axes b = B, k = 64, n = 512
  input x: f16[b, k]
  input w: f16[k, n]
  s: f16[b, n] = kernel(x, w)
    block
      grid b: 16, n: 32
      loop k: 32
        load x_tile: f16[b, k] = x
        load w_tile: f16[k, n] = w
        acc: f32[b, n] += contract[k](x_tile, w_tile)
      store acc -> s
  out: f16[b, n] = kernel(s)
    block
      grid b: 1
      epilogue
        load s_tile: f16[b, n] = s
        e: f32[b, n] = exp(s_tile)
        total: f32[b] = sum[n](e)
        out_tile: f32[b, n] = div(e, total)
      store out_tile -> out
  output out
"""


def test_what_must_not_be_materialised() -> None:
    answer = ask(scores, TWO_KERNELS)
    assert isinstance(answer, Outside)
    assert answer.restriction == "materialisation"
    assert "Σk x·w" in answer.what
    assert "16 bits" in answer.what
    wide, text = (re.sub("f16", "f32", str(t)) for t in (scores, TWO_KERNELS))
    program = parse_program(wide)
    assert not isinstance(ask(program, text), Outside)
    inside = next(e.target.name for e in program.equations if "contract" in str(e.op).lower())
    answer = ask(program, text, inside=(inside,))
    assert isinstance(answer, Outside)
    assert answer.restriction == "inside"
    answer = ask(program, text, kernels=1)
    assert isinstance(answer, Outside)
    assert answer.restriction == "kernels"
    assert "kernels=2" in answer.remedy


def test_a_value_that_no_rule_leads_to_is_printed() -> None:
    @mg.program
    def dot(x: mg.f32[B, 64], y: mg.f32[B, 64]):
        return mg.sum(x * y, -1) * 4

    text = """\
mugraph dot
  dim B
  axes b = B, k = 64
  input x: f32[b, k]
  input y: f32[b, k]
  out: f32[b] = kernel(x, y)
    block
      grid b: 16
      loop k: 64
        load x_tile: f32[b, k] = x
        load y_tile: f32[b, k] = y
        plus: f32[b, k] = add(x_tile, y_tile)
        minus: f32[b, k] = sub(x_tile, y_tile)
        acc: f32[b] += contract[k](plus, plus)
        acc2: f32[b] += contract[k](minus, minus)
      epilogue
        out_tile: f32[b] = sub(acc, acc2)
      store out_tile -> out
  output out
"""
    answer = ask(dot, text)
    assert isinstance(answer, Outside)
    assert answer.restriction == "closure"
    assert "x + y" in answer.what
    assert "candidates" in answer.remedy
    assert "outside the space (closure)" in str(answer)


@pytest.mark.full
def test_what_the_enumerator_finds_is_inside_where_it_runs() -> None:
    @mg.program
    def squares(x: mg.f32[B, 64], y: mg.f32[B, 64]):
        return mg.sum(mg.square(x + y) - mg.square(x - y), -1)

    text = """\
mugraph squares
  dim B
  axes b = B, k = 64
  input x: f32[b, k]
  input y: f32[b, k]
  out: f32[b] = kernel(x, y)
    block
      grid b: 16
      loop k: 64
        load x_tile: f32[b, k] = x
        load y_tile: f32[b, k] = y
        twice: f32[b, k] = add(x_tile, x_tile)
        twice2: f32[b, k] = add(y_tile, y_tile)
        acc: f32[b] += contract[k](twice, twice2)
      store acc -> out
  output out
"""
    assert isinstance(ask(squares, text), Outside)
    widened = ask(squares, text, candidates=20_000, abstraction="off")
    assert isinstance(widened, Found | Costlier), str(widened)


# -- pruned


def test_tiles_that_do_not_fit_are_pruned_with_the_limit() -> None:
    answer = ask(norm_linear, norm_linear_tiles(n=256, k=1024))
    assert isinstance(answer, Pruned)
    assert answer.by == "tile"
    assert "65536 elements" in answer.limit
    answer = ask(norm_linear, norm_linear_tiles(n=128, k=512))
    assert isinstance(answer, Pruned)
    assert answer.by == "feasibility"
    assert "shared memory" in answer.what
    assert re.search(r"\d+ KiB on H100", answer.limit)
    assert answer.remedy == "Smaller tiles fit"
    assert isinstance(ask(norm_linear, norm_linear_tiles(n=64, k=128)), Costlier | Found)


def test_a_tile_that_is_no_power_of_two_is_outside() -> None:
    answer = ask(norm_linear, norm_linear_tiles(n=48))
    assert isinstance(answer, Outside)
    assert answer.restriction == "tiles"


def test_a_spent_budget_is_named() -> None:
    answer = ask(norm_linear, NORM_LINEAR, nodes=8)
    assert isinstance(answer, Pruned)
    assert answer.by == "budget"
    assert "nodes" in answer.limit + answer.remedy
    searched = found(norm_linear)
    best = replace(searched.report, predicted_seconds=1.0, stop=StopReason("StateLimit", 7))
    answer = why_not(norm_linear, parse_program(norm_linear_tiles(n=8)), best, on=device())
    assert isinstance(answer, Pruned)
    assert answer.by == "budget"
    assert "states" in answer.remedy
    best = replace(searched.report, predicted_seconds=1.0)
    answer = why_not(norm_linear, parse_program(norm_linear_tiles(n=8)), best, on=device())
    assert isinstance(answer, Pruned)
    assert answer.by == "bound"


# -- not equivalent


def test_another_function_is_not_equivalent() -> None:
    wrong = NORM_LINEAR.replace("1/1000000", "1/1000")
    answer = ask(norm_linear, wrong)
    assert isinstance(answer, NotEquivalent)
    assert "the program gives" in answer.counterexample
    answer = ask(norm_linear, wrong, checked=False)
    assert isinstance(answer, NotEquivalent)
    assert "0.001" in answer.counterexample
    other = NORM_LINEAR.replace("input g", "input h").replace("= g", "= h").replace("(x, g, w)", "(x, h, w)")
    for checked in (True, False):
        answer = ask(norm_linear, other, checked)
        assert isinstance(answer, NotEquivalent)
        assert "takes" in str(answer)


def test_a_malformed_graph_is_an_error() -> None:
    graph = parse_program(NORM_LINEAR.replace("(t, w_tile)", "(t, nothing)"))
    with pytest.raises(GraphError, match="nothing"):
        ask(norm_linear, graph)


# -- where it is asked


def test_reports_and_results_answer(tmp_path: Path) -> None:
    result = mg.optimize(norm_linear, target="torch", space=ONE.but(library=False, split=False))
    assert isinstance(result.report, SearchReport)
    file = tmp_path / "graph.txt"
    file.write_text(NORM_LINEAR)
    parsed = parse_program(NORM_LINEAR)
    answers = [result.why_not(g) for g in (NORM_LINEAR, file, str(file), parsed)] + [result.report.why_not(parsed)]
    assert len(set(map(str, answers))) == 1
    assert isinstance(answers[0], Costlier | Found)
    loaded = mg.load(result.save(tmp_path / "saved"))
    assert str(loaded.why_not(NORM_LINEAR)) == str(answers[0])
    assert isinstance(loaded.why_not(tmp_path / "saved"), Found)
    wrong = result.why_not(NORM_LINEAR.replace("1/1000000", "1/1000"))
    assert isinstance(wrong, NotEquivalent)
    assert "the program gives" in wrong.counterexample
    with pytest.raises(ParseError):
        read_graph(tmp_path / "absent.txt")
    with pytest.raises(ParseError):
        read_graph("no graph\nat all")
    with pytest.raises(GraphError, match="does not hold the program"):
        SearchReport.from_dict(result.report.to_dict()).why_not(parsed)
    handed = mg.from_graph(norm_linear, parsed, target="torch")
    with pytest.raises(GraphError, match="not searched"):
        handed.why_not(parsed)
