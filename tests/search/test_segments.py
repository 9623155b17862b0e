"""Large programs: where they are cut, what is shared, and that the whole is what the parts make of it."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import mugraph.dsl.functions as mg
from benchmarks.fuzz import failure_of
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import f16, f32, trace
from mugraph.errors import GraphError, SettingError, VerificationError
from mugraph.ir.axes import Dim, representative
from mugraph.ir.check import check
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Program, equations_of
from mugraph.ir.ops import CumSum, Elementwise, Gather, Kernel, Library
from mugraph.ir.parts import parts
from mugraph.ir.printer import canonical_text
from mugraph.ir.shift import is_exponential
from mugraph.ir.types import DType
from mugraph.pipeline import emit, finished, from_graph, numeric_tier, optimize
from mugraph.search.answers import Found as Answered
from mugraph.search.cost import device
from mugraph.search.driver import Found, search, searched
from mugraph.search.segments import Done, Line, Task, cuts, is_cut, line, nestings, operators, segment, unsafe
from mugraph.search.setup import LIBRARY
from mugraph.search.space import SearchSpace
from mugraph.transpiler.target import parse_target
from mugraph.verify.equivalence import Verified, recheck, verify
from tests.search.disguise import Disguise
from tests.search.layers import layers, mlps
from tests.search.programs import B, rmsnorm_linear
from tests.search.recipes import looked_up, random_recipe

# Budgets that keep a segment within a fraction of a second, and few operators so that small programs are cut too.
QUICK = SearchSpace(sizes=(), states=500, entries=20_000, operators=8)


def found(program: Program, space: SearchSpace = QUICK, **options: Any) -> Found:
    """The search with the verifier behind it, as the pipeline runs it."""

    def accept(graph: KernelGraph, at: tuple[str, ...] = ()) -> Verified:
        return verify(program, finished(graph, at), cuts=at)

    result = search(program, accept=accept, accept_cut=accept, space=space, **options)
    assert isinstance(result.accepted, Verified)
    assert result.accepted.program == program
    check(result.graph)
    return result


def not_worse(result: Found) -> None:
    source = result.report.candidates[-1]
    assert source.structure == LIBRARY
    if not source.verdict.startswith("would keep in 16 bits"):
        assert result.report.predicted_seconds <= source.seconds * (1 + 1e-9)


def counted(tasks: list[Task]) -> Callable[[Sequence[Task], Callable[[], bool]], list[Done | None]]:
    """Searches segments here, and keeps what it was asked for."""

    def solve(wanted: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
        tasks.extend(wanted)
        return [searched(task, lambda graph: graph, stop) for task in wanted]

    return solve


def ordered(program: Program) -> Line:
    return line(program, sizes(program))


def sizes(program: Program) -> dict[str, int]:
    return {a.name: representative(a.size) for a in program.axes().values()}


def cut_at(program: Program, most: int = 20, **options: Any) -> list[int]:
    return cuts(ordered(program), most, sizes(program), **options)


# -- the whole


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 4])
def test_layers_of_llama_are_cut_where_little_is_in_memory(count: int) -> None:
    result = found(layers(count), SearchSpace(sizes=()))
    report = result.report
    not_worse(result)
    assert 100 * report.floor_seconds / report.predicted_seconds > 70
    assert len(report.segments) == 3 * count
    assert [s.shared_with for s in report.segments[3:]] == [i % 3 for i in range(3 * count - 3)]


@pytest.mark.full
def test_twelve_layers_are_searched_like_four() -> None:
    few, many = list[Task](), list[Task]()
    search(layers(4), accept=lambda g: g, space=SearchSpace(sizes=()), solve=counted(few))
    search(layers(12), accept=lambda g: g, space=SearchSpace(sizes=()), solve=counted(many))
    assert len({t.key for t in many}) <= len({t.key for t in few}) + 2


def test_equal_layers_are_searched_once() -> None:
    few, many = list[Task](), list[Task]()
    first, second = found(mlps(2), solve=counted(few)), found(mlps(4), solve=counted(many))
    assert len({t.key for t in many}) == len(many) == len(few)
    assert second.report.predicted_seconds == pytest.approx(first.report.predicted_seconds * 2)
    shared = [s for s in second.report.segments if s.shared_with is not None]
    assert len(second.report.segments) - len(shared) == len(first.report.segments) / 2
    assert all(second.report.segments[s.shared_with or 0].seconds == s.seconds for s in shared)
    not_worse(second)


def test_the_segments_make_up_the_whole() -> None:
    program = mlps(3)
    result = found(program)
    assert sum(s.operators for s in result.report.segments) == operators(program)
    assert sum(s.seconds for s in result.report.segments) == pytest.approx(result.report.predicted_seconds)
    made = [n for s in result.report.segments for n in s.gives]
    assert {*made} <= {*program.tensors()}
    assert len(made) == len(set(made))
    assert [o.value for o in result.graph.outputs] == [o.value for o in program.outputs]
    assert result.graph.inputs == program.inputs


def test_the_whole_agrees_with_the_program_where_it_is_verified_at_once() -> None:
    program = mlps(2)
    search(program, accept=lambda graph: verify(program, finished(graph)), space=QUICK)


def test_a_program_that_fits_is_not_cut() -> None:
    program = rmsnorm_linear()
    assert operators(program) <= QUICK.operators
    assert found(program).report.segments == ()


def test_the_limit_and_the_segments_are_in_the_report() -> None:
    report = found(mlps(1)).report
    assert "operators=8" in report.space
    assert f"{len(report.segments)} segments" in str(report)
    assert report.to_dict()["segments"][0]["program"].startswith("program segment")


def test_the_explanation_is_in_the_names_of_the_program() -> None:
    text = found(mlps(2)).report.explain()
    assert "wg0" in text
    assert "wg1" in text
    assert not re.search(r"[va]\d{4}", text)


def test_structures_differ_by_size() -> None:
    result = search(mlps(1, 4096, 4096), accept=lambda g: g, space=QUICK.but(sizes=(1024,)))
    assert len(result.structures) == 2
    small, large = result.structures
    assert small.high is not None
    assert large.low == small.high + 1
    assert small.graph != large.graph


# -- where it is cut


def test_the_projections_before_attention_lie_side_by_side() -> None:
    program = layers(1)
    whole = ordered(program)
    at = cut_at(program)
    firsts = [[e.op for e in whole.operators[low:high]] for low, high in pairwise(at)]
    assert sum(type(op).__name__ == "Contract" for op in firsts[0]) == 3


def test_exponents_and_exponentials_are_not_cut_out() -> None:
    def fn(q, k, v):  # type: ignore[no-untyped-def]
        scores = q @ mg.mT(k) * 0.125
        e = mg.exp(scores)
        return (e / mg.sum(e, axis=-1, keepdims=True)) @ v

    program = trace(fn, [f16[B, 64], f16[128, 64], f16[128, 64]], "attention")
    overflowing, exponents = unsafe(program)
    ruined = overflowing | exponents
    assert {e.target.name for e in program.equations if e.op == Elementwise("exp")} <= overflowing
    assert {o.value for o in program.outputs}.isdisjoint(ruined)
    whole = ordered(program)
    assert all(ruined.isdisjoint(whole.live(c)) for c in cut_at(program))
    wide = trace(fn, [f32[B, 64], f32[128, 64], f32[128, 64]], "attention")
    assert unsafe(wide) == (overflowing, set())


def test_an_exponential_that_nothing_normalises_may_be_cut_out() -> None:
    assert unsafe(trace(lambda x: mg.tanh(mg.exp(x) * 2) + 1, [f32[16, 48]], "none"))[0] == set()
    assert unsafe(trace(lambda x: mg.exp(x) * 2 + 1, [f32[16, 48]], "none"))[0] == set()
    assert unsafe(trace(lambda x: mg.log(mg.sum(mg.exp(x), axis=-1)), [f32[16, 48]], "sum"))[0]


def test_exponents_are_cut_out_of_chains_that_are_too_long() -> None:
    def chain(x):  # type: ignore[no-untyped-def]
        for _ in range(30):
            x = x + mg.tanh(x)
        return mg.softmax(x)

    program = trace(chain, [f16[16, 48]], "chain")
    whole, at = ordered(program), cut_at(program)
    overflowing, exponents = unsafe(program)
    assert any(not exponents.isdisjoint(whole.live(c)) for c in at)
    assert all(overflowing.isdisjoint(whole.live(c)) for c in at)


def test_a_chain_is_cut_into_segments_that_are_as_long_as_they_may_be() -> None:
    def chain(x):  # type: ignore[no-untyped-def]
        for _ in range(12):
            x = x + mg.tanh(x)
        return x

    result = search(trace(chain, [f16[16, 48]], "chain"), accept=lambda g: g, space=SearchSpace(sizes=(), operators=6))
    assert [s.operators for s in result.report.segments] == [6, 6, 6, 6]


def test_a_segment_that_no_border_divides_is_searched_whole() -> None:
    program = trace(lambda x: mg.softmax(x), [f16[16, 48]], "rows")
    space = SearchSpace(sizes=(), operators=1)
    tasks: list[Task] = []
    result = search(program, accept=lambda g: g, space=space, solve=counted(tasks))
    assert [s.operators for s in result.report.segments] == [operators(program)]
    assert len(tasks) == 1
    assert tasks[0].space.operators == 1
    assert (done := searched(tasks[0], lambda g: g)) is not None
    assert done.report.segments == ()


def test_values_that_must_stay_inside_are_not_cut_out() -> None:
    program = mlps(1)
    whole = ordered(program)
    free = [n for c in cut_at(program, 4) for n in whole.live(c)]
    kept = cut_at(program, 4, inside=free[:1])
    assert free
    assert all(free[0] not in whole.live(c) for c in kept)
    result = found(program, QUICK.but(inside=(free[0],)))
    assert free[0] not in result.graph.tensors()


def test_work_on_weights_alone_is_done_where_it_is_needed() -> None:
    def fn(x, w0, w1, a, b):  # type: ignore[no-untyped-def]
        y = mg.silu(mg.silu(x @ w0) @ w0)
        return mg.silu(y @ w0) @ (w1 + a @ b)

    program = trace(fn, [f16[B, 512], f16[512, 512], f16[512, 512], f16[512, 16], f16[16, 512]], "adapted")
    names = [e.op for e in ordered(program).operators]
    silus = [i for i, op in enumerate(names) if op == Elementwise("silu")]
    assert silus[1] < names.index(Elementwise("add")) < silus[2]


def test_what_needs_no_input_is_computed_in_each_segment() -> None:
    program = layers(1)
    whole = ordered(program)
    assert any(type(e.op).__name__ == "Compare" for e in whole.free.values())
    assert not any(type(e.op).__name__ in ("Compare", "Iota", "Slice") for e in whole.operators)


def test_segments_are_programs_over_what_came_before() -> None:
    program = layers(2)
    whole = ordered(program)
    known = {i.name for i in program.inputs}
    at = cut_at(program)
    for low, high in pairwise(at):
        s = segment(whole, low, high, SearchSpace(), device(), sizes(program))
        check(s.program)
        check(s.task.program)
        assert {i.name for i in s.program.inputs} <= known
        known |= {o.value for o in s.program.outputs}
    assert {o.value for o in program.outputs} <= known


# -- exponentials of values that hold exponentials


def attentions(count: int, dtype: Callable[..., Any] = f32) -> Program:
    """Cross-attentions one after the other, few enough operators for one segment."""

    def chain(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(count):
            x = x + mg.softmax(x @ mg.mT(k), axis=-1) @ v
        return x

    return trace(chain, [dtype["S", 64], dtype[32, 64], dtype[32, 64]], "attentions")


def steps(graph: KernelGraph) -> list[Equation]:
    """All equations in kernels."""
    found: list[Equation] = []
    for e in graph.kernels():
        assert isinstance(e.op, Kernel)
        found += [q for b in e.op.blocks for c in (b, b.combine) if c for q in equations_of(tuple(c.steps()))]
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_of_several_softmaxes_is_shifted(count: int) -> None:
    program = attentions(count)
    assert bool(nestings(program)) == is_cut(program, SearchSpace()) == (count > 1)
    result = found(program, SearchSpace(sizes=()))
    assert isinstance(result.accepted, Verified)
    made = steps(result.accepted.graph)
    less = {e.target.name for e in made if e.op == Elementwise("sub")}
    exponents = [e.args[0] for e in made if is_exponential(e.op)]
    assert len(exponents) >= count
    assert less.issuperset(exponents)


def test_an_exponential_that_no_sum_closes_is_no_reason_to_cut() -> None:
    def gate(x: Tensor, w: Tensor) -> Tensor:
        y = mg.softmax(x, axis=-1) @ w
        return y / (1 + mg.exp(-y))

    assert not nestings(trace(gate, [f32["S", 64], f32[64, 32]], "gate"))


def test_the_numbers_of_a_chain_of_attentions_are_right() -> None:
    result = optimize(attentions(3, f16), target="torch")
    assert result.report.candidates[0].verdict == "chosen"  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    x, k, v = (4 * torch.randn(n, 64, generator=generator).half() for n in (5, 32, 32))
    wanted = x.double()
    for _ in range(3):
        wanted = wanted + torch.softmax(wanted @ k.double().mT, -1) @ v.double()
    assert (result(x, k, v).double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_a_graph_in_parts_is_found_again_and_taken_as_given() -> None:
    program = attentions(2)
    result = optimize(program, target="torch")
    assert isinstance(result.why_not(program), Answered)
    assert isinstance(result.why_not(result.graph), Answered)
    assert from_graph(program, result.graph, target="torch").source == result.source


# -- sizes that no input of a segment has


def biased(x: Tensor, s: Tensor) -> Tensor:
    place = mg.cast(mg.arange(x.shape[0]), DType.f32)
    return mg.exp(x) - mg.sum(s) * place[:, None]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_every_segment_has_the_sizes_it_needs(most: int) -> None:
    for program in (
        trace(biased, [f32["B", 64], f32[2]], "biased"),
        trace(lambda s, x: biased(x, s), [f32[2], f32["B", 64]], "biased"),
    ):
        not_worse(found(program, QUICK.but(operators=most)))


# -- names and orders


@pytest.mark.parametrize("seed", range(5))
def test_names_do_not_matter_to_the_cuts(seed: int) -> None:
    program = layers(2)
    assert segment_texts(Disguise(program, seed).program(program)) == segment_texts(program)


def test_names_do_not_matter_to_the_result() -> None:
    program = mlps(1)
    other = Disguise(program, 1).program(program)
    one, two = (search(p, accept=lambda g: g, space=QUICK).report for p in (program, other))
    assert [(s.operators, s.seconds, s.shared_with) for s in one.segments] == [
        (s.operators, s.seconds, s.shared_with) for s in two.segments
    ]
    assert one.predicted_seconds == two.predicted_seconds


def test_the_order_of_equations_does_not_matter() -> None:
    program = layers(1)
    assert reordered(program) != program
    assert segment_texts(reordered(program)) == segment_texts(program)


def segment_texts(program: Program) -> list[str]:
    """The segments between neighbouring cuts, with symbolic sizes named alike."""
    whole, at = ordered(program), cut_at(program)
    segments = [segment(whole, *pair, SearchSpace(), device(), sizes(program)) for pair in pairwise(at)]
    return [canonical_text(s.task.program) for s in segments]


def reordered(program: Program) -> Program:
    """Each equation as late as its result is needed."""
    left, later = list(program.equations), list[Equation]()
    while left:
        needed = {a for e in left for a in e.args}
        last = next(e for e in left if needed.isdisjoint(t.name for t in e.targets))
        later.append(last)
        left.remove(last)
    return replace(program, equations=tuple(reversed(later)))


def test_two_runs_give_the_same_report() -> None:
    assert found(mlps(1)).report == found(mlps(1)).report


# -- operators outside the calculus, and what cannot be searched


def test_an_unknown_operator_in_the_middle_is_a_library_call() -> None:
    def fn(x, h, w, v):  # type: ignore[no-untyped-def]
        y = mg.silu(mg.rms_norm(x, h) @ w)
        y = mg.cumsum(y, -1)
        return mg.rms_norm(y) @ v

    program = trace(fn, [f16[B, 256], f16[256], f16[256, 256], f16[256, 256]], "scanned")
    assert operators(program) > QUICK.operators
    result = found(program)
    not_worse(result)
    calls = [e for e in result.graph.equations if isinstance(e.op, Library)]
    assert any(isinstance(e.op, CumSum) for c in calls for e in c.op.semantics.equations)  # type: ignore[union-attr]
    assert any(isinstance(e.op, Kernel) for e in result.graph.equations)


def test_a_lookup_in_front_is_no_error() -> None:
    def fn(y, h, w):  # type: ignore[no-untyped-def]
        return mg.silu(mg.rms_norm(y, h) @ w) + mg.rms_norm(y)

    program = looked_up(trace(fn, [f16[B, 256], f16[256], f16[256, 256]], "embedded"), 0)
    result = found(program, QUICK.but(operators=6))
    not_worse(result)
    calls = [e.op for e in result.graph.equations if isinstance(e.op, Library)]
    assert any(isinstance(e.op, Gather) for c in calls for e in c.semantics.equations)


def test_a_segment_that_cannot_be_searched_runs_as_library_calls() -> None:
    def none(tasks: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
        return [None for _ in tasks]

    result = found(mlps(2), solve=none)
    assert all(s.stop == "not searched" for s in result.report.segments)
    assert all(isinstance(e.op, Library) for e in result.graph.equations)
    assert result.report.stop.kind == "SegmentLimit"
    not_worse(result)


def test_calls_of_several_results_run_beside_kernels() -> None:
    def solve(tasks: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
        return [None if len(t.program.outputs) > 1 else searched(t, lambda graph: graph) for t in tasks]

    def stack(x: Tensor, g: Tensor, w: Tensor, u: Tensor, d: Tensor) -> Tensor:
        for _ in range(2):
            y = mg.rms_norm(x, g)
            x = x + (mg.silu(y @ w) * (y @ u)) @ d
        return x

    wide = f32[64, 96]
    program = trace(stack, [f32[Dim("T", 1, 64), 64], f32[64], wide, wide, f32[96, 64]], "stack")
    result = found(program, QUICK.but(operators=4), solve=solve)
    calls = [e for e in result.graph.equations if isinstance(e.op, Library)]
    assert any(len(e.targets) > 1 for e in calls)
    assert result.graph.kernels()
    assert isinstance(result.accepted, Verified)
    target = parse_target("cuda:90")
    report = numeric_tier(result.accepted, target, emit(result.accepted, target), 0)
    assert report.passed


# -- limits


def test_a_budget_of_segments_is_kept_and_reported() -> None:
    tasks = list[Task]()
    result = found(mlps(2), QUICK.but(segments=2), solve=counted(tasks))
    assert len(tasks) == 2
    assert str(result.report.stop) == "SegmentLimit(2)"
    not_worse(result)


def test_an_interrupted_search_keeps_what_it_has() -> None:
    tasks = list[Task]()
    result = found(mlps(2), solve=counted(tasks), interrupted=lambda: len(tasks) > 0)
    assert result.report.stop.kind == "Interrupted"
    not_worse(result)


@pytest.mark.parametrize("options", [{"interrupted": lambda: True}, {"space": SearchSpace(kernels=0)}])
def test_a_large_program_as_it_stands_is_verified_part_by_part(options: dict[str, Any]) -> None:
    result = found(mlps(15), **({"space": SearchSpace()} | options))
    assert all(isinstance(e.op, Library) for e in result.graph.equations)
    assert len(result.graph.equations) > 1
    assert isinstance(result.accepted, Verified)
    assert result.accepted.certificate.cuts
    assert result.report.candidates[-1].verdict == "chosen"
    not_worse(result)


def test_unknown_names_in_the_space_are_refused() -> None:
    with pytest.raises(SettingError, match="nowhere"):
        found(mlps(2), QUICK.but(grid=("nowhere",)))


def test_the_space_of_a_segment_names_what_the_segment_has() -> None:
    program = mlps(1)
    axis = program.outputs and program.tensors()[program.outputs[0].value].axes[0].name
    result = found(program, QUICK.but(tiles=((axis, 8),), grid=(axis,)))
    blocks = [b for e in result.graph.kernels() for b in e.op.blocks]  # type: ignore[union-attr]
    assert blocks
    assert all(dict(b.grid).get(axis, 8) == 8 for b in blocks)


@pytest.mark.parametrize("field", ["operators", "segments"])
def test_a_limit_is_at_least_one(field: str) -> None:
    with pytest.raises(SettingError, match=field):
        SearchSpace(**{field: 0})


# -- tasks as data


def test_tasks_and_results_survive_the_way_to_another_process() -> None:
    tasks = list[Task]()
    found(mlps(1), solve=counted(tasks))
    task = tasks[0]
    again = Task.from_dict(json.loads(json.dumps(task.to_dict())))
    assert again == task
    done = searched(task, lambda graph: graph)
    assert done is not None
    assert Done.from_dict(json.loads(json.dumps(done.to_dict()))) == done


# -- verification by parts


def by_parts(program: Program, change: Callable[[KernelGraph], KernelGraph] = lambda g: g) -> Verified:
    at: list[tuple[str, ...]] = []
    result = search(program, accept=lambda g: g, accept_cut=lambda g, c: at.append(c), space=QUICK)
    return verify(program, finished(change(result.graph), at[0]), cuts=at[0])


def test_parts_are_verified_once_each_and_again_from_the_certificate() -> None:
    two, three = by_parts(mlps(2)), by_parts(mlps(3))
    assert len(two.certificate.draws) == len(three.certificate.draws)
    assert three.certificate.delta_log2 <= -40
    assert any("part" in a for a in three.certificate.assumptions)
    again = recheck(three.certificate.from_json(three.certificate.to_json()), three.program, three.graph)
    assert again.certificate.cuts == three.certificate.cuts


def swapped(graph: KernelGraph) -> KernelGraph:
    """The gate of the second layer loads the other weight: the same types, another meaning."""
    wrong = {"wg1": "wu1", "wu1": "wg1"}

    def block(b: BlockGraph) -> BlockGraph:
        def load(ld: Load) -> Load:
            return replace(ld, source=wrong.get(ld.source, ld.source))

        passes = tuple(replace(p, loads=tuple(map(load, p.loads))) for p in b.passes)
        return replace(b, passes=passes, loads=tuple(map(load, b.loads)))

    def equation(e: Equation) -> Equation:
        args = tuple(wrong.get(a, a) for a in e.args)
        return replace(e, args=args, op=Kernel(tuple(map(block, e.op.blocks))) if isinstance(e.op, Kernel) else e.op)

    return replace(graph, equations=tuple(map(equation, graph.equations)))


def test_a_wrong_part_is_refused() -> None:
    with pytest.raises(VerificationError, match="differs"):
        by_parts(mlps(2), swapped)


def test_cuts_that_one_side_lacks_are_refused() -> None:
    verified = by_parts(mlps(2))
    with pytest.raises(GraphError, match="nothing"):
        verify(verified.program, verified.graph, cuts=("nothing",))
    inner = next(n for n in verified.program.tensors() if n not in verified.graph.tensors())
    with pytest.raises(GraphError, match=inner):
        verify(verified.program, verified.graph, cuts=(inner,))


def test_every_value_between_parts_is_given_by_one_of_them() -> None:
    verified = by_parts(mlps(3))
    pairs = parts(verified.program, verified.graph, verified.certificate.cuts)
    given = [o.value for p, _ in pairs for o in p.outputs]
    assert sorted(given) == sorted({*verified.certificate.cuts, *(o.value for o in verified.program.outputs)})
    for p, g in pairs:
        assert p.inputs == g.inputs
        check(p)
        check(g)


# -- random programs


EACH = 12


def cut_and_checked(program: Program) -> None:
    not_worse(found(program, QUICK.but(operators=3)))


def run(seeds: range, lines: int) -> None:
    for seed in seeds:
        if (failure := failure_of(random_recipe(seed, lines), cut_and_checked)) is not None:
            pytest.fail(f"seed {seed}: {failure}")


def test_random_programs_are_cut_and_verified() -> None:
    run(range(EACH), 8)


@pytest.mark.full
@pytest.mark.parametrize("shard", range(20))
def test_many_random_programs_are_cut_and_verified(shard: int) -> None:
    run(range(1_000 + shard * 50, 1_050 + shard * 50), 16)
