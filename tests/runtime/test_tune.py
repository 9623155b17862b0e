"""Parameters of kernels, chosen by what the compiler makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.programs import PROGRAMS
from mugraph.codegen.lower import lower, plan_graph
from mugraph.codegen.plan import Parameters, Plan
from mugraph.errors import CompileError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.parser import parse_program
from mugraph.runtime import tune
from mugraph.runtime.compile import Compiler, Resources
from mugraph.runtime.tune import Choice, loops_of, replayed, retiled, rule, tuned, tuned_graph
from mugraph.transpiler.triton import emit, launched
from mugraph.verify.equivalence import verify
from tests import graphs
from tests.blocks import BLOCKS, split_matmul
from tests.graphs import rmsnorm_linear_fused

WINNERS = Path(__file__).parents[1] / "corpora/winners"
FINE = Resources("k", 90, 64, 1024, 0, 0, 0, 1, 0, 1)

Answer = Callable[[str, dict[str, int]], Resources]


class Told(Compiler):
    """Answers from a function of kernel and options, and remembers what was asked."""

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = answer
        self.asked: list[tuple[str, dict[str, int]]] = []

    def resources(self, source, arch, options=None, only=None):
        (kernel,) = only
        self.asked.append((kernel, dict(options)))
        return [self.answer(kernel, dict(options))]


def plan() -> Plan:
    return plan_graph(rmsnorm_linear_fused())


def only(p: Plan) -> Parameters:
    (launch,) = p.launches()
    return launch.parameters


def test_what_does_not_spill_stays_as_it_was_lowered():
    told = Told(lambda kernel, o: FINE)
    found = tuned(plan(), 90, told)
    assert (found.plan, found.trace, found.tried, found.notes) == (plan(), (), 1, ())
    assert len(told.asked) == 1


def test_spills_go_by_the_nearest_choice_and_the_trace_says_which():
    start = only(plan()).num_warps
    found = tuned(plan(), 90, Told(lambda kernel, o: replace(FINE, spills=9 if o["num_warps"] == start else 0)))
    assert found.trace == (Choice("rmsnorm_linear", "num_warps", 2 * start),)
    assert only(found.plan) == replace(only(plan()), num_warps=2 * start)
    assert f"num_warps={2 * start}" in emit(found.plan)
    assert found.resources[0].spills == 0


def test_too_much_shared_memory_takes_fewer_stages():
    def answer(kernel: str, o: dict[str, int]) -> Resources:
        return replace(FINE, shared_bytes=100_000 * o["num_stages"])

    found = tuned(plan().with_parameters({"rmsnorm_linear": Parameters(4, 4)}), 90, Told(answer))
    assert found.trace == (Choice("rmsnorm_linear", "num_stages", 2),)


def test_what_does_not_compile_gives_way():
    def answer(kernel: str, o: dict[str, int]) -> Resources:
        if o["num_stages"] > 1:
            raise CompileError("out of shared memory")
        return FINE

    assert Choice("rmsnorm_linear", "num_stages", 1) in tuned(plan(), 90, Told(answer)).trace


def test_what_never_compiles_is_an_error():
    def answer(kernel: str, o: dict[str, int]) -> Resources:
        raise CompileError("ptxas refuses")

    with pytest.raises(CompileError, match="ptxas refuses"):
        tuned(plan(), 90, Told(answer))


def test_where_all_spill_the_least_is_taken_and_a_note_says_so():
    told = Told(lambda kernel, o: replace(FINE, spills=100 - o["num_warps"] - o["num_stages"]))
    found = tuned(plan(), 90, told)
    assert found.resources[0].spills == min(100 - o["num_warps"] - o["num_stages"] for _, o in told.asked)
    assert len(told.asked) <= tune.MOST_TRIED
    assert "spills" in found.notes[0]


def test_spills_outside_loops_get_a_bound_of_registers_if_that_helps():
    for left, bound in ((0, 255), (3, None)):
        told = Told(lambda kernel, o, left=left: replace(FINE, spills_outside=left if "maxnreg" in o else 3))
        found = tuned(plan().with_parameters({"rmsnorm_linear": Parameters(4, 2)}), 90, told)
        assert only(found.plan).maxnreg == bound
        assert ("maxnreg=255" in emit(found.plan)) == (bound is not None)


def test_each_kernel_of_a_plan_has_its_own_choices():
    graph = split_matmul(parts=3)
    before = plan_graph(graph)
    second = list(launched(before))[1]
    found = tuned(before, 90, Told(lambda k, o: replace(FINE, spills=int(k == second and o["num_warps"] != 8))))
    assert {c.kernel for c in found.trace} == {launched(before)[second].name}
    assert found.plan.launches()[0] == before.launches()[0]


def test_kernels_of_one_launch_share_their_choices():
    before = plan_graph(BLOCKS["two_blocks"]())
    (function,) = launched(before)
    after = tuned(before, 90, Told(lambda k, o: replace(FINE, spills=int(o["num_warps"] != 8)))).plan
    assert {x.parameters.num_warps for x in after.launches()} == {8}
    assert function in emit(after)


def test_a_trace_gives_the_plan_again_and_one_of_another_plan_is_refused():
    found = tuned(plan(), 90, Told(lambda kernel, o: replace(FINE, spills=int(o["num_warps"] < 16))))
    assert replayed(plan(), found.trace) == found.plan
    for wrong in (Choice("other", "num_warps", 8), Choice("rmsnorm_linear", "colour", 8)):
        with pytest.raises(ValueError, match="rmsnorm_linear has no"):
            replayed(plan(), (wrong,))


def test_a_rule_of_ones_own_proposes_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "RULES", [])

    @rule
    def one_warp(p: Parameters, found: Resources) -> Iterator[Parameters]:
        yield replace(p, num_warps=1)

    found = tuned(plan(), 90, Told(lambda kernel, o: replace(FINE, spills=int(o["num_warps"] > 1))))
    assert found.trace == (Choice("rmsnorm_linear", "num_warps", 1),)


@pytest.mark.parametrize("arch", [90, 100])
def test_attention_compiles_without_spills_in_loops(arch: int):
    graph = parse_program((WINNERS / "gqa.txt").read_text())
    assert isinstance(graph, KernelGraph)
    before = lower(verify(PROGRAMS["gqa"], graph))
    with Compiler() as compiler:
        found = tuned(before, arch, compiler)
        again = compiler.resources(emit(found.plan), arch)
    assert found.notes == ()
    assert [r.spills for r in again] == [r.spills for r in found.resources] == [0] * len(again)


def test_tiles_are_cut_where_nothing_else_helps():
    """A kernel that spills as long as its source has loops of more than 32."""
    program, fused = graphs.ALL["rmsnorm_linear"]
    before = verify(program(), fused())
    assert loops_of(before.graph) == {"k": 128}

    class BySource(Compiler):
        def resources(self, source, arch, options=None, only=None):
            return [replace(FINE, spills=0 if "range(0, size_k, 32)" in source else 7)]

    after, found = tuned_graph(before, 90, BySource())
    assert loops_of(after.graph) == {"k": 32}
    assert found.trace == (Choice("tiles", "k", 32),)
    assert found.notes == ()
    again = verify(program(), retiled(before.graph, found.trace))
    assert again.graph == after.graph
    assert replayed(lower(again), found.trace) == found.plan


def test_tiles_stay_where_cutting_them_does_not_help():
    program, fused = graphs.ALL["rmsnorm_linear"]
    before = verify(program(), fused())
    after, found = tuned_graph(before, 90, Told(lambda kernel, o: replace(FINE, spills=7)))
    assert after == before
    assert found.notes
