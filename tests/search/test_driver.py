"""The search end to end: what it does with refusals, limits, operators that it does not know, and odd programs."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings

import mugraph.dsl.functions as mg
from mugraph.dsl.trace import bf16, f16, f32, i64, trace
from mugraph.errors import VerificationError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.ir.types import Output
from mugraph.pipeline import finished
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify
from tests.search import programs
from tests.search.programs import SMALL, B
from tests.search.random_programs import programs as random_programs

X = f32[B, 48]


def verified(program: Program, space: SearchSpace | None = None, **limits: Any) -> Found:
    """The search with the verifier behind it, as the pipeline runs it; nothing may be refused."""
    found = search(program, accept=lambda graph: verify(program, finished(graph)), space=space, **limits)
    assert found.report.refused == 0, str(found.report)
    return found


def is_baseline(graph: KernelGraph) -> bool:
    return all(isinstance(e.op, Library) for e in graph.equations)


class Refusing:
    """Takes a μGraph only after it has refused some."""

    def __init__(self, refusals: int) -> None:
        self.left, self.seen = refusals, list[KernelGraph]()

    def __call__(self, graph: KernelGraph) -> KernelGraph:
        self.seen.append(graph)
        if len(self.seen) <= self.left:
            raise VerificationError(f"refused number {len(self.seen)}")
        return graph


# -- refusals


def test_what_accept_makes_of_the_graph_is_handed_back() -> None:
    accept = Refusing(0)
    found = search(SMALL["lora"](), accept=accept)
    assert found.accepted is found.graph
    assert accept.seen == [found.graph]
    assert (found.report.verified, found.report.refused) == (1, 0)


def test_a_refused_plan_gives_way_to_the_next() -> None:
    space = SearchSpace(sizes=())
    first = search(programs.gqa(), accept=lambda graph: graph, space=space)
    accept = Refusing(2)
    found = search(programs.gqa(), accept=accept, space=space)
    assert found.report.refused == 2
    assert len(accept.seen) == 3
    assert found.graph == accept.seen[-1] != first.graph
    assert found.report.predicted_seconds >= first.report.predicted_seconds
    verdicts = [c.verdict for c in found.report.candidates]
    assert verdicts[:3] == ["refused: refused number 1", "refused: refused number 2", "chosen"]


def test_when_all_plans_are_refused_the_program_runs_as_it_stands() -> None:
    *kernels, library = search(programs.gqa(), accept=lambda g: g).report.candidates
    plans = sum(c.seconds <= library.seconds for c in kernels)
    accept = Refusing(plans)
    found = search(programs.gqa(), accept=accept)
    assert is_baseline(found.graph)
    assert found.report.refused == plans
    assert any("nothing beats the program" in note for note in found.report.notes)


def test_when_the_program_itself_is_refused_the_error_comes_out() -> None:
    with pytest.raises(VerificationError):
        search(SMALL["lora"](), accept=Refusing(1000))


def test_garbage_is_collected_as_usual_after_searches_that_overlap_or_fail() -> None:
    usual = gc.get_threshold()
    seen = list[tuple[int, int, int]]()

    def nested(graph: KernelGraph) -> None:
        seen.append(gc.get_threshold())
        search(SMALL["softmax"](), accept=lambda graph: seen.append(gc.get_threshold()))
        seen.append(gc.get_threshold())
        raise OverflowError

    with pytest.raises(OverflowError):
        search(SMALL["softmax"](), accept=nested)
    assert len(seen) > 2
    assert set(seen) == {tuple(map(max, usual, (50_000, 20, 100)))}
    assert gc.get_threshold() == usual


def test_who_wants_no_garbage_collection_gets_none() -> None:
    usual = gc.get_threshold()
    gc.set_threshold(0)
    try:
        seen = set[int]()
        search(SMALL["softmax"](), accept=lambda graph: seen.add(gc.get_threshold()[0]))
        assert seen == {0}
        assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*usual)


def test_other_errors_of_accept_are_not_swallowed() -> None:
    def broken(graph: KernelGraph) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(SMALL["lora"](), accept=broken)


# -- limits


def after(polls: int) -> Callable[[], bool]:
    count = iter(range(1_000_000))
    return lambda: next(count) >= polls


def test_interrupted_at_once_the_program_runs_as_it_stands() -> None:
    found = verified(programs.layernorm_linear(), interrupted=lambda: True)
    assert is_baseline(found.graph)
    assert str(found.report.stop) == "Interrupted"


def test_interrupted_later_the_best_so_far_is_kept() -> None:
    found = verified(programs.qk_norm_attention(), interrupted=after(10))
    assert found.graph.kernels()
    assert str(found.report.stop) == "Interrupted"
    whole = search(programs.qk_norm_attention(), accept=lambda g: g)
    assert str(whole.report.stop) == "Saturated"
    assert found.report.predicted_seconds >= whole.report.predicted_seconds


def test_a_tiny_budget_is_a_time_limit() -> None:
    found = verified(programs.rmsnorm_linear(), budget_seconds=1e-9)
    assert found.report.stop.kind == "TimeLimit"
    assert found.report.stop.limit == 1e-9
    assert is_baseline(found.graph)


@pytest.mark.parametrize(
    ("space", "kind"), [(SearchSpace(nodes=8), "NodeLimit"), (SearchSpace(states=1), "StateLimit")]
)
def test_budgets_of_the_space_are_reported(space: SearchSpace, kind: str) -> None:
    found = verified(SMALL["rmsnorm_linear"](), space)
    assert found.report.stop.kind == kind
    assert str(found.report.stop).startswith(f"{kind}(")


# -- operators outside the calculus


def last_row(x):  # type: ignore[no-untyped-def]
    return mg.silu(x)[:, 8:24] * 2


def halves(x):  # type: ignore[no-untyped-def]
    a, b = mg.chunk(x, 2, 1)
    return mg.concat([a * mg.sigmoid(b), mg.silu(b) + 1], 1)


OUTSIDE = {
    "slice": (last_row, [X]),
    "concat": (halves, [X]),
    "cumsum": (lambda x: mg.exp(mg.cumsum(x * 2 + 1, axis=1)) / 3, [X]),
    "iota": (lambda x: x * mg.iota(x.shape[1]), [X]),
    "causal": (lambda x: mg.where(mg.causal_mask(x.shape[0], x.shape[1]), x, 0.0) @ x, [f32[48, 48]]),
    "reshape": (lambda x, y: mg.reshape(x * 2, 6, 4) + y, [f32[4, 6], f32[6, 4]]),
    "integers": (lambda x, i: x * (i + 1), [X, i64[48]]),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_calculus_does_not_have_runs_as_a_library_call(name: str) -> None:
    fn, specs = OUTSIDE[name]
    found = verified(trace(fn, specs, name))
    assert found.graph.equations
    outside = [n for n in found.report.notes if "outside the calculus" in n]
    libraries = [e for e in found.graph.equations if isinstance(e.op, Library)]
    assert len(libraries) >= len(outside)


def test_kernels_stand_before_and_behind_a_boundary() -> None:
    def fn(x, w, u):  # type: ignore[no-untyped-def]
        return mg.silu(mg.cumsum(mg.silu(x @ w) * 2, axis=1) @ u)

    found = verified(trace(fn, [f32[B, 4096], f32[4096, 4096], f32[4096, 4096]], "sandwich"))
    kinds = [type(e.op) for e in found.graph.equations]
    assert Library in kinds
    assert any("is outside the calculus: the search takes it as given" in note for note in found.report.notes)
    at = [i for i, e in enumerate(found.graph.equations) if isinstance(e.op, Library) and e.op.name == "cumsum"]
    assert len(at) == 1
    assert 0 < at[0] < len(kinds) - 1


# -- odd programs


def same_twice(program: Program) -> Program:
    return replace(program, outputs=program.outputs * 2)


def with_input_as_output(program: Program) -> Program:
    first = program.inputs[0]
    return replace(program, outputs=(*program.outputs, Output(first.name, first.storage)))


ODD: dict[str, Callable[[], Program]] = {
    "several outputs": lambda: trace(lambda x, y: (x + y, x * y, mg.exp(x)), [X, X]),
    "an output of another": lambda: trace(lambda x: (mg.exp(x), mg.sum(mg.exp(x), axis=-1)), [X]),
    "the same output twice": lambda: same_twice(trace(lambda x: mg.silu(x) * 2, [X])),
    "equal outputs": lambda: trace(lambda x, y: (x + y, y + x), [X, X]),
    "an input as output": lambda: with_input_as_output(trace(lambda x: mg.silu(x) * 2, [X])),
    "only an input": lambda: trace(lambda x: x, [X]),
    "an unused input": lambda: trace(lambda x, y: mg.silu(x) * 2, [X, X]),
    "scalars": lambda: trace(lambda x, y: mg.exp(x) * y / (1 + x * x), [f32[()], f32[()]]),
    "everything summed": lambda: trace(lambda x: mg.sum(x * x) / 3, [X]),
    "only a constant": lambda: trace(lambda x: x * 0 + 2, [X]),
    "a repeated value": lambda: trace(lambda x: (x * 2).expand(6, 5), [f32[6, 1]]),
    "a reduction of repeats": lambda: trace(lambda x: mg.amax(x.expand(6, 5), axis=-1), [f32[6, 1]]),
    "one element": lambda: trace(lambda x, y: mg.exp(x @ y) + 1, [f32[1, 1], f32[1, 1]]),
    "quotients": SMALL["quotient"],
    "extremes": SMALL["extremes"],
    "cancels": lambda: trace(lambda x: x / x + mg.exp(x), [X]),
    "zero": lambda: trace(lambda x: x - x + mg.exp(x), [X]),
    "two means of one size": lambda: trace(
        lambda x, g, w: mg.mean((mg.mean(x, 1, True) + g) @ w, 1), [f32[B, 6], f32[6], f32[6, 6]]
    ),
    "a mean by hand": lambda: trace(lambda x: mg.sum(x, axis=-1) / 48 + mg.mean(x, axis=-1), [X]),
    "gram": SMALL["gram"],
    "gram twice": lambda: trace(lambda x: mg.exp(x @ mg.mT(x)) @ x, [X]),
    "cancelled exponentials": lambda: trace(
        lambda x: (mg.softmax(x, 0), mg.sum(mg.softmax(x, 0), -1), mg.mean(mg.softmax(x, 0), -1)), [f32[1, 48]]
    ),
    "a contraction under four names": lambda: trace(
        lambda x: (mg.minimum(x.mT @ x, x.mT @ x), x.mT @ x, (x.mT @ x).half(), (x.mT @ x).mT), [f32[4096, 64]]
    ),
    "an output from a concatenated one": lambda: trace(
        lambda x, y: (mg.concat([x, y], 0), (mg.amin(x, 1) / y) @ x.mT - x), [f32[48, 48]] * 2
    ),
    "attention over a square of its queries": lambda: trace(lambda x: mg.attention(x, x @ mg.sqrt(x), x), [f32[8, 8]]),
    "an input's view beside a sum over it": lambda: trace(
        lambda x: (mg.gelu(x.unflatten(-1, (2, 2048))), x.unflatten(-1, (2, 2048)), mg.logsumexp(x)), [f16[4096]]
    ),
    "a high power": lambda: trace(lambda x: mg.pow(mg.pow(mg.sum(x * x, -1), 3), 3), [X]),
    "a high power of a product": lambda: trace(lambda x, y: mg.pow(mg.pow(x / y, 3), 3), [X, X]),
    "a long contraction": lambda: trace(lambda x, y: (x * x / y * x * x / y) @ mg.mT(x * x / y * x * x / y), [X, X]),
    "every second of the far end": lambda: trace(lambda x: (x @ mg.mT(x))[:, 30:47:2] * 2, [f32[48, 6]]),
    "a cut of a cut": lambda: trace(lambda x: (x[2:12] * mg.sum(x[2:12]))[4:7], [f32[48]]),
    "a masked softmax of joined halves": lambda: trace(
        lambda x, m: mg.softmax(mg.where(mg.concat([m, m], 1) > 0, mg.concat([x, x * 3], 1), float("-inf"))), [X, X]
    ),
    "a library matmul in a narrower type": lambda: trace(
        lambda x, y: (mg.gelu(mg.cumsum(x, -1)) @ mg.mT(y)).half(), [bf16[1009, 1009], bf16[1009, 1009]]
    ),
    "the greater of two equal softmaxes": lambda: trace(lambda x: mg.maximum(mg.softmax(x), mg.softmax(x)) * 2, [X]),
    "joined scalars of a narrower type": lambda: trace(
        lambda x, y: (mg.sigmoid(y) + 1) @ mg.concat([mg.sigmoid(y) * x / 3 / x.shape[-1], y], 1) * x,
        [f16[1], f16[1, 1]],
    ),
    "deep": lambda: trace(lambda x: mg.silu(mg.exp(mg.silu(mg.exp(mg.silu(x) * 2) + 1) * 2) + 1), [X]),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_programs_are_searched_and_verified(name: str) -> None:
    program = ODD[name]()
    found = verified(program)
    assert [o.value for o in found.graph.outputs] == [o.value for o in program.outputs]
    assert found.graph.inputs == program.inputs


@pytest.mark.parametrize("name", ["quotients", "extremes", "several outputs", "gram twice"])
def test_elementwise_programs_are_one_kernel(name: str) -> None:
    found = verified(ODD[name](), SearchSpace(library=False))
    assert [type(e.op) for e in found.graph.equations] == [Kernel]


@settings(max_examples=15)
@given(random_programs())
def test_random_programs_are_searched_and_verified(program: Program) -> None:
    verified(program)


@pytest.mark.full
@settings(max_examples=400)
@given(random_programs(depth=4))
def test_many_random_programs_are_searched_and_verified(program: Program) -> None:
    verified(program)


# -- the report


@pytest.mark.parametrize("name", ["rmsnorm_linear", "gqa", "layernorm_linear", "chain", "two_outputs"])
def test_two_runs_give_equal_reports_and_graphs(name: str) -> None:
    a, b = (search(SMALL[name](), accept=lambda g: g) for _ in range(2))
    assert a.graph == b.graph
    assert a.report == b.report
    assert a.report.seconds.keys() == b.report.seconds.keys() == {"closure", "kernels", "verification"}


@pytest.mark.parametrize("size", [B, 128])
def test_an_input_beside_what_is_made_of_it_may_stand_first_or_last(size: Any) -> None:
    """x and x @ x.T cannot have the same axes: in either order x is the one that gets others."""

    def squared(v: Any) -> Any:
        return v @ v

    first = verified(trace(lambda x: squared(x + x @ x.mT), [f32[size, size]], "p"))
    last = verified(trace(lambda x: squared(x @ x.mT + x), [f32[size, size]], "p"))
    assert first.report.predicted_seconds == last.report.predicted_seconds
    assert [c.seconds for c in first.report.candidates] == [c.seconds for c in last.report.candidates]


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (lambda a: mg.relu(mg.max(a * 0.25)), [(100, 100)]),
        (lambda a, w: (mg.softmax(a @ w), mg.relu(mg.max(a @ w))), [(100, 100), (100, 7)]),
        (lambda x: mg.minimum(mg.mean(mg.softmax(x), axis=-1) * 2, mg.mean(mg.softmax(x), axis=-1)), [(13, 7, 5)]),
    ],
)
def test_zero_and_other_numbers_beside_the_maximum_of_many_are_kept(fn: Any, shapes: list[tuple[int, ...]]) -> None:
    assert any(verified(trace(fn, [f32[s] for s in shapes], "p")).graph.kernels())


def test_the_report_says_what_was_done() -> None:
    report = search(programs.rmsnorm_linear(), accept=lambda g: g).report
    text = str(report)
    assert text.startswith("search of rmsnorm_linear: Saturated")
    for part in ("classes, edges", "role assignments", "pruned:", "seeds: source", "predicted on H100", "of floor"):
        assert part in text
    data = report.to_dict()
    assert data["stop"] == "Saturated"
    assert data["classes"] == report.classes > 0
    assert sum(c.verdict == "chosen" for c in report.candidates) == 1


def test_results_that_need_no_input_are_found() -> None:
    for make in (lambda x: mg.sum(x * 0 + 2, -1), lambda x: mg.softmax(x * 0 + 1, -1)):
        for spec in (f32[5, 7], f32[B, 7]):
            program = trace(make, [spec], "constants")
            assert search(program, accept=lambda g, p=program: verify(p, g)).accepted


def test_elementwise_programs_get_tiles_that_read_whole_sectors() -> None:
    program = trace(lambda x, y: mg.silu(x) * y, [f16[B, 4096]] * 2, "gate")
    (kernel,) = search(program, accept=lambda g: g).graph.kernels()
    tiles = dict(kernel.op.blocks[0].grid)
    assert tiles.get(program.tensors()["x"].axes[-1].name, 4096) * 2 >= 64
