"""Options of kernels, chosen by what the compiler makes of them, by a model, and by timing."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from benchmarks.programs import PROGRAMS
from mugraph.codegen.lower import lower, plan_graph
from mugraph.codegen.plan import ANY, Combined, Launch, Options
from mugraph.errors import CompileError, MugraphError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.parser import parse_program
from mugraph.ir.resize import neighbours, retiled
from mugraph.ir.types import DType
from mugraph.runtime import tune
from mugraph.runtime.bench import Spread
from mugraph.runtime.compile import Compiler, Resources
from mugraph.runtime.interpret import Interpreter
from mugraph.runtime.model import fetched, traffic
from mugraph.runtime.timing import Refused
from mugraph.runtime.tune import (
    Choice,
    Configuration,
    Tuned,
    Tuner,
    combined,
    fastest_by_size,
    loops_of,
    rule,
    with_tiles,
)
from mugraph.search.cost import device
from mugraph.transpiler.triton import emit, launched
from mugraph.verify.equivalence import Verified, verify
from mugraph.verify.numeric import numeric_check
from tests import graphs
from tests.blocks import BLOCKS, split_matmul

WINNERS = Path(__file__).parents[1] / "corpora/winners"
FINE = Resources("k", 90, 64, 1024, 0, 0, 0, 1, 0, 1, 100)
H100 = device("h100")

Answer = Callable[[str, Mapping[str, int]], Resources]


class Told(Compiler):
    """Answers from a function of the kernel and the compiler options in the source, and remembers what was asked."""

    def __init__(self, answer: Answer):
        super().__init__()
        self.answer = answer
        self.asked: list[dict[str, int]] = []

    def resources(self, source, arch, options=None, only=None):
        found = []
        for kernel in only or re.findall(r'^    "(\w+)": \($', source, re.MULTILINE):
            table = re.search(rf'"{kernel}": \(\n +\{{.*?\n +\}},\n +(\{{.*?\}}),', source, re.DOTALL)
            assert table
            self.asked.append(ast.literal_eval(table.group(1)))
            found.append(replace(self.answer(kernel, self.asked[-1]), kernel=kernel))
        return found


def fitted(before: Verified, answer: Answer | Told, level: tune.Tune = "fit", timer=None) -> tuple[Verified, Tuned]:
    told = answer if isinstance(answer, Told) else Told(answer)
    return Tuner(H100, [told], timer=timer).tuned(before, level)


def rmsnorm_linear() -> Verified:
    program, fused = graphs.ALL["rmsnorm_linear"]
    return verify(program(), fused())


def own(v: Verified) -> Options:
    (launch,) = lower(v).launches()
    return launch.options


def tuned_options(v: Verified, found: Tuned) -> Options:
    (launch,) = lower(v, found.options).launches()
    return launch.options


# -- to fit


def test_what_does_not_spill_stays_as_it_was_lowered():
    told = Told(lambda kernel, o: FINE)
    before = rmsnorm_linear()
    after, found = fitted(before, told)
    assert after == before
    assert (found.trace, found.tried, found.notes) == ((), 1, ())
    assert len(told.asked) == 1


def test_nothing_is_compiled_where_nothing_is_to_be_tuned():
    told = Told(lambda kernel, o: FINE)
    assert fitted(rmsnorm_linear(), told, "none")[1] == Tuned("none")
    assert told.asked == []


def test_spills_go_by_the_nearest_choice_and_the_trace_says_which():
    before = rmsnorm_linear()
    start = own(before).num_warps
    _, found = fitted(before, lambda kernel, o: replace(FINE, spills=9 if o["num_warps"] == start else 0))
    assert found.trace == (Choice("rmsnorm_linear", "num_warps", 2 * start),)
    assert tuned_options(before, found) == replace(own(before), num_warps=2 * start)
    assert f"num_warps={2 * start}" in emit(lower(before, found.options))
    assert found.resources[0].spills == 0


def test_too_much_shared_memory_takes_fewer_stages():
    before = rmsnorm_linear()
    stages = own(before).num_stages
    _, found = fitted(before, lambda k, o: replace(FINE, shared_bytes=240_000 if o["num_stages"] >= stages else 1))
    assert found.trace == (Choice("rmsnorm_linear", "num_stages", stages - 1),)


def test_what_does_not_compile_gives_way():
    def answer(kernel: str, o: Mapping[str, int]) -> Resources:
        if o["num_stages"] > 1:
            raise CompileError("out of shared memory")
        return FINE

    assert Choice("rmsnorm_linear", "num_stages", 1) in fitted(rmsnorm_linear(), answer)[1].trace


def test_what_never_compiles_is_an_error():
    def answer(kernel: str, o: Mapping[str, int]) -> Resources:
        raise CompileError("ptxas refuses")

    with pytest.raises(CompileError, match="ptxas refuses"):
        fitted(rmsnorm_linear(), answer)


def test_where_all_spill_the_least_is_taken_and_a_note_says_so():
    told = Told(lambda kernel, o: replace(FINE, spills=100 - o["num_warps"] - o["num_stages"]))
    found = Tuner(H100, [told]).options(rmsnorm_linear(), "fit")
    assert found.badness[1] == min(100 - o["num_warps"] - o["num_stages"] for o in told.asked)
    assert len(told.asked) <= tune.MOST_FITTED
    assert "spills" in found.notes[0]


def test_spills_outside_loops_get_a_bound_of_registers_if_that_helps():
    before = rmsnorm_linear()
    for left, bound in ((0, 255), (3, None)):
        _, found = fitted(before, lambda k, o, left=left: replace(FINE, spills_outside=left if "maxnreg" in o else 3))
        assert tuned_options(before, found).maxnreg == bound
        assert ("maxnreg=255" in emit(lower(before, found.options))) == (bound is not None)
        assert [*found.notes] == ([] if bound else ["rmsnorm_linear spills 3 times outside loops"])


def test_each_kernel_of_a_plan_has_its_own_choices():
    before = verify_itself(split_matmul(parts=3))
    second = list(launched(lower(before)))[1]
    _, found = fitted(before, lambda k, o: replace(FINE, spills=int(k == second and o["num_warps"] != 8)))
    assert {c.kernel for c in found.trace} == {launched(lower(before))[second].name}
    assert lower(before, found.options).launches()[0] == lower(before).launches()[0]


@pytest.mark.usefixtures("own_tiles")
def test_the_model_prefers_one_launch_for_a_split_and_its_combine():
    before = verify_itself(split_matmul(parts=3))
    _, found = fitted(before, lambda k, o: FINE, "model")
    assert Choice("split_matmul", "combine", "last") in found.trace
    (whole,) = launched(lower(before, found.options)).values()
    assert isinstance(whole, Combined)
    assert Tuned.from_dict(json.loads(json.dumps(found.to_dict()))).trace == found.trace
    worse = Told(lambda k, o: replace(FINE, spills=int(k.endswith("_whole"))))
    _, found = fitted(before, worse, "model")
    assert not any(c.name == "combine" for c in found.trace)


def test_what_has_no_split_has_no_combine_to_choose():
    assert combined(rmsnorm_linear(), ANY) == ()


def test_kernels_of_one_launch_share_their_choices():
    before = verify_itself(BLOCKS["two_blocks"]())
    (function,) = launched(lower(before))
    _, found = fitted(before, lambda k, o: replace(FINE, spills=int(o["num_warps"] != 8)))
    after = lower(before, found.options)
    assert {x.options.num_warps for x in after.launches()} == {8}
    assert function in emit(after)


def verify_itself(graph: KernelGraph) -> Verified:
    """A verified graph, for tests that need no other program."""
    return verify(graph, graph)


def test_a_trace_gives_the_plan_again_and_one_of_another_plan_is_refused():
    before = rmsnorm_linear()
    _, found = fitted(before, lambda kernel, o: replace(FINE, spills=int(o["num_warps"] < 16)))
    assert Tuned.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for wrong in (
        Choice("other", "num_warps", 8),
        Choice("rmsnorm_linear", "colour", 8),
        Choice("rmsnorm_linear", "num_warps", 3),
        Choice("rmsnorm_linear", "num_warps", True),
        Choice("rmsnorm_linear", "num_warps", "8"),
    ):
        with pytest.raises(ValueError, match=r"there is no option|has no kernel"):
            lower(before, (wrong,))


def test_a_rule_of_ones_own_proposes_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "RULES", [])

    @rule
    def one_warp(at: Configuration) -> Iterator[Options]:
        yield replace(at.options, num_warps=1)

    _, found = fitted(rmsnorm_linear(), lambda kernel, o: replace(FINE, spills=int(o["num_warps"] > 1)))
    assert found.trace == (Choice("rmsnorm_linear", "num_warps", 1),)


def endless(at: Configuration) -> Iterator[Options]:
    while True:
        yield at.options


def raising(at: Configuration) -> Iterator[Options]:
    raise KeyError("no such thing")


def three_warps(at: Configuration) -> Iterator[Options]:
    yield replace(at.options, num_warps=3)


def no_options(at: Configuration) -> Iterator[Options]:
    yield 5


def only_prefetch(at: Configuration) -> Iterator[Options]:
    yield replace(at.options, prefetch=True)


@pytest.mark.parametrize("wrong", [raising, three_warps, no_options, only_prefetch])
def test_a_rule_that_fails_is_named(wrong: tune.Rule, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "RULES", [wrong])
    with pytest.raises(MugraphError, match=f"the tuning rule {wrong.__name__} fails"):
        fitted(rmsnorm_linear(), lambda kernel, o: replace(FINE, spills=1))


def test_a_rule_without_end_is_heard_for_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "RULES", [endless])
    assert fitted(rmsnorm_linear(), lambda kernel, o: replace(FINE, spills=1))[1].trace == ()


@pytest.mark.parametrize(
    "change",
    [
        {"tried": float("inf")}, {"tried": -1}, {"timed": True}, {"seconds": "1"}, {"seconds": -1.0}, {"notes": [5]},
        {"schema_version": 2}, {"level": "hard"}, {"choices": [{"kernel": "k"}]}, {"kernels": [{"registers": "many"}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_that_is_none_is_refused(change: dict[str, object]):
    _, found = fitted(rmsnorm_linear(), lambda kernel, o: FINE)
    assert Tuned.from_dict(found.to_dict()) == found
    with pytest.raises((ValueError, KeyError, TypeError)):
        Tuned.from_dict(found.to_dict() | change)


@pytest.mark.parametrize("arch", ["90", "100"])
def test_attention_compiles_without_spills_in_loops(arch: str):
    graph = parse_program((WINNERS / "gqa.txt").read_text())
    assert isinstance(graph, KernelGraph)
    with Compiler() as compiler:
        after, found = Tuner(device(arch), [compiler]).tuned(verify(PROGRAMS["gqa"], graph), "fit")
        again = compiler.resources(emit(lower(after, found.options)), int(arch))
    assert not any("in loops" in note for note in found.notes)
    assert [r.spills for r in again] == [r.spills for r in found.resources] == [0] * len(again)


def test_tiles_are_cut_where_nothing_else_helps():
    """A kernel that spills as long as its source has loops of more than 32."""
    before = rmsnorm_linear()
    assert loops_of(before.graph) == {"k": 128}

    class BySource(Compiler):
        def resources(self, source, arch, options=None, only=None):
            return [replace(FINE, spills=0 if "range(0, size_k, 32)" in source else 7)]

    after, found = Tuner(H100, [BySource()]).tuned(before, "fit")
    assert loops_of(after.graph) == {"k": 32}
    assert found.trace == (Choice("tiles", "k", 32),)
    assert found.notes == ()
    assert found.options == ()
    assert with_tiles(before, {"k": 32}).graph == after.graph


def test_tiles_stay_where_cutting_them_does_not_help():
    before = rmsnorm_linear()
    after, found = fitted(before, lambda kernel, o: replace(FINE, spills=7))
    assert after == before
    assert found.notes


# -- to be fast


@pytest.fixture
def own_tiles(monkeypatch: pytest.MonkeyPatch):
    """The tiles stay as they are."""
    monkeypatch.setattr(tune, "TILINGS", 0)


@pytest.mark.usefixtures("own_tiles")
def test_the_model_prefers_what_hides_latency_and_refuses_what_spills():
    """Here each stage costs shared memory, and the fifth spills."""

    def answer(kernel: str, o: Mapping[str, int]) -> Resources:
        stages = o["num_stages"]
        return replace(FINE, shared_bytes=20_000 * stages, spills=int(stages >= 5), loop_instructions=200)

    before = rmsnorm_linear()
    _, found = fitted(before, answer, "model")
    assert tuned_options(before, found).num_stages in (3, 4)
    assert found.badness[1] == 0
    assert 1 < found.tried <= tune.MOST_RANKED


@pytest.mark.usefixtures("own_tiles")
def test_equal_predictions_keep_the_lowerings_own_choice():
    before = rmsnorm_linear()
    _, found = fitted(before, lambda k, o: replace(FINE, loop_instructions=0), "model")
    assert found.trace == ()


class Clock:
    """Answers from a function of the source, and counts."""

    def __init__(self, answer: Callable[[str], float | Refused]):
        self.answer = answer
        self.asked: list[str] = []

    def seconds(self, source: str, repeats: int) -> Spread | Refused:
        self.asked.append(source)
        found = self.answer(source)
        return found if isinstance(found, Refused) else Spread(found, found, found)


@pytest.mark.usefixtures("own_tiles")
def test_the_clock_has_the_last_word():
    """The device likes two warps, whatever the model says."""
    clock = Clock(lambda source: 1.0 if "num_warps=2" in source else 2.0)
    before = rmsnorm_linear()
    _, found = fitted(before, lambda k, o: replace(FINE, loop_instructions=100), "measure", clock)
    assert Choice("rmsnorm_linear", "num_warps", 2) in found.trace
    assert found.timed > 1


@pytest.mark.usefixtures("own_tiles")
def test_nothing_slower_than_the_lowerings_own_choice_is_taken():
    before = rmsnorm_linear()
    start = emit(lower(before))
    clock = Clock(lambda source: 1.0 if source == start else 2.0)
    _, found = fitted(before, lambda k, o: replace(FINE, loop_instructions=100), "measure", clock)
    assert found.trace == ()


@pytest.mark.usefixtures("own_tiles")
def test_what_spills_is_never_run():
    told = Told(lambda k, o: replace(FINE, loop_instructions=9, spills=int(o["num_warps"] == 8)))
    clock = Clock(lambda source: 1.0)
    fitted(rmsnorm_linear(), told, "measure", clock)
    assert any(o["num_warps"] == 8 for o in told.asked)
    assert not any("num_warps=8" in source for source in clock.asked)


@pytest.mark.usefixtures("own_tiles")
def test_what_hangs_or_runs_out_of_memory_is_refused_with_the_reason():
    def answer(source: str) -> float | Refused:
        return Refused("no answer within 60 s") if "num_warps=2" in source else 1.0

    _, found = fitted(rmsnorm_linear(), lambda k, o: replace(FINE, loop_instructions=9), "measure", Clock(answer))
    assert any("no answer within 60 s" in note for note in found.notes)
    assert found.trace == ()


@pytest.mark.usefixtures("own_tiles")
def test_a_device_that_disappears_leaves_the_best_that_was_timed():
    count = 0

    def answer(source: str) -> float | Refused:
        nonlocal count
        count += 1
        lost = count > tune.FINALISTS + 2  # in the second round
        return Refused("the device was lost", lost=True) if lost else 1.0 if "num_warps=2" in source else 2.0

    before = rmsnorm_linear()
    _, found = fitted(before, lambda k, o: replace(FINE, loop_instructions=9), "measure", Clock(answer))
    assert Choice("rmsnorm_linear", "num_warps", 2) in found.trace
    assert any("the device was lost" in note for note in found.notes)


@pytest.mark.usefixtures("own_tiles")
def test_without_a_device_a_note_says_that_nothing_was_timed():
    _, found = fitted(rmsnorm_linear(), lambda k, o: replace(FINE, loop_instructions=9), "measure")
    assert found.timed == 0
    assert "ranked by a model" in found.notes[0]


def test_other_tiles_are_tried_and_the_clock_decides():
    before = rmsnorm_linear()
    tiles = {"n": 32}
    faster = emit(lower(with_tiles(before, tiles)))
    clock = Clock(lambda source: 1.0 if "n_block * 32" in source else 2.0)
    after, found = fitted(before, lambda k, o: replace(FINE, loop_instructions=100), "measure", clock)
    assert "n_block * 32" in faster
    assert Choice("tiles", "n", 32) in found.trace
    assert with_tiles(before, tiles).graph == after.graph
    assert found.seconds == 1.0


def test_tiles_that_do_not_fit_are_not_tried():
    class Small(Told):
        def resources(self, source, arch, options=None, only=None):
            if "n_block * 64" not in source:
                raise CompileError("out of shared memory")
            return super().resources(source, arch, options, only)

    _, found = Tuner(H100, [Small(lambda k, o: replace(FINE, loop_instructions=100))]).tuned(rmsnorm_linear(), "model")
    assert not any(c.name == "n" for c in found.trace)


def test_neighbours_differ_in_one_tile_and_are_the_program():
    graph = split_matmul(parts=4)
    found = list(neighbours(graph))
    part = next(b.split.part.name for e in graph.kernels() for b in e.op.blocks)
    assert {part: 8} in found
    assert {part: 2} in found
    assert all(len(tiles) == 1 for tiles in found)
    for tiles in found:
        verify(graph, retiled(graph, tiles))
    wrong = replace(graph, outputs=())
    with pytest.raises(MugraphError):
        verify(graph, retiled(wrong, {part: 8}))


# -- by size


def test_the_fastest_of_several_sources_is_found_at_each_size():
    clocks = {1: {"a": 1.0, "b": 1.0}, 8: {"a": 3.0, "b": 2.0}, 64: {"a": Refused("out of memory"), "b": 9.0}}
    found, notes = fastest_by_size(["a", "b"], [1, 8, 64], lambda n: nullcontext(Clock(lambda s: clocks[n][s])))
    assert found == {1: 0, 8: 1, 64: 1}
    assert notes == ["at 64: out of memory"]


def test_a_lost_device_ends_the_comparison_and_keeps_what_was_found():
    lost = Refused("the device was lost", lost=True)
    found, notes = fastest_by_size(
        ["a", "b"], [1, 8, 64], lambda n: nullcontext(Clock(lambda s: lost if (n, s) == (8, "b") else 1.0))
    )
    assert found == {1: 0}
    assert notes == ["at 8: the device was lost"]
    assert fastest_by_size(["a"], [1], lambda n: nullcontext(None)) == ({}, [])


# -- the order of blocks


def at_size(options: Options, symbolic: int, resources: Resources = FINE) -> Configuration:
    """rmsnorm_linear as it would be ranked for that many rows."""
    plan = plan_graph(graphs.ALL["rmsnorm_linear"][1](), options=options)
    ((function, call),) = launched(plan).items()
    return Configuration(call, plan, emit(plan), H100, (), replace(resources, kernel=function), symbolic=symbolic)


def test_groups_of_blocks_are_proposed_where_l2_does_not_hold_all():
    proposed = [o.group for o in tune.proposals(tune.grouped_blocks, at_size(Options(), 4096))]
    assert proposed == [8, 4, 16]
    assert tune.proposals(tune.grouped_blocks, at_size(Options(), 16)) == []  # one block of rows
    assert tune.proposals(tune.grouped_blocks, at_size(Options(group=4), 4096)) == []
    small = replace(at_size(Options(), 4096), device=replace(H100, l2_bytes=1e9))
    assert tune.proposals(tune.grouped_blocks, small) == []


def test_groups_fetch_less_where_waves_reach_beyond_l2():
    few = replace(FINE, shared_bytes=100_000)  # two blocks of an SM: 264 at a time of 256 x 96
    one_axis, grouped = (at_size(Options(group=g), 4096, few) for g in (1, 16))
    fetch = [fetched(c.call, c.plan, 264, 4096) for c in (one_axis, grouped)]
    assert fetch[1] < 0.5 * fetch[0]
    assert grouped.seconds < one_axis.seconds
    everything = fetched(grouped.call, grouped.plan, 256 * 96, 4096)
    assert everything == traffic(grouped.call, grouped.plan, 4096).unique


# -- persistent blocks


def test_persistent_blocks_are_proposed_where_there_are_more_than_run_at_once():
    few = replace(FINE, shared_bytes=100_000)  # two blocks of an SM
    assert [o.persistent for o in tune.proposals(tune.persistent_blocks, at_size(Options(), 4096, few))] == [2]
    assert tune.proposals(tune.persistent_blocks, at_size(Options(), 16, few)) == []  # 96 blocks for 132 SMs
    assert tune.proposals(tune.persistent_blocks, at_size(Options(persistent=1), 4096, few)) == []
    assert [
        o.persistent for o in tune.proposals(tune.persistent_blocks, at_size(Options(persistent=3), 4096, few))
    ] == [2]
    tiny = replace(FINE, registers=16, shared_bytes=0)
    assert [o.persistent for o in tune.proposals(tune.persistent_blocks, at_size(Options(), 4096, tiny))] == [8]
    plan = plan_graph(BLOCKS["two_blocks"]())
    (call,) = launched(plan).values()
    assert tune.proposals(tune.persistent_blocks, replace(at_size(Options(), 4096), call=call)) == []


def test_persistent_blocks_drain_once():
    few = replace(FINE, shared_bytes=100_000)
    plain, persistent, half = (at_size(Options(persistent=n), 4096, few).seconds for n in (0, 2, 1))
    assert persistent < plain
    assert persistent < half


# -- a prefetch


def test_a_prefetch_is_proposed_for_dependent_launches():
    assert tune.proposals(tune.prefetched_weights, at_size(Options(), 16)) == []
    (found,) = tune.proposals(tune.prefetched_weights, at_size(Options(pdl=True), 16))
    assert found.prefetch
    assert tune.proposals(tune.prefetched_weights, at_size(Options(pdl=True, persistent=1), 16)) == []
    large = at_size(found, 4096, replace(FINE, shared_bytes=100_000))
    assert [o.prefetch for o in tune.proposals(tune.persistent_blocks, large)] == [False]


# -- descriptors


def test_descriptors_are_proposed_for_products_in_loops_where_there_are_descriptors():
    (found,) = tune.proposals(tune.described_tiles, at_size(Options(), 16))
    assert found.descriptors
    assert tune.proposals(tune.described_tiles, at_size(found, 16)) == []
    for other in (replace(FINE, arch=80), replace(FINE, loop_instructions=0), replace(FINE, spills=1)):
        assert tune.proposals(tune.described_tiles, at_size(Options(), 16, other)) == []
    (call,) = launched(plan_graph(BLOCKS["softmax_two_pass"]())).values()
    assert tune.proposals(tune.described_tiles, replace(at_size(Options(), 16), call=call)) == []


# -- what options do to the text


CHANGED = [
    Options(dot="never"), Options(swapped=True), Options(unroll=2), Options(evict_first=True),
    Options(keep_statistics=False), Options(pdl=True), Options(descriptors=True),
    Options(swapped=True, unroll=2, evict_first=True, pdl=True),
]  # fmt: skip


@pytest.mark.parametrize("options", CHANGED, ids=str)
@pytest.mark.parametrize("name", ["rmsnorm_linear", "gated_mlp", "gqa"])
def test_each_variant_computes_the_same(name: str, options: Options, interpreter: Interpreter):
    make, fused = graphs.ALL[name]
    sizes = () if name == "gqa" else (DType.f16, 300, 70)  # two tiles and a tail
    program = make(*sizes)
    source = emit(plan_graph(fused(*sizes), options=options))
    order = [i.name for i in program.inputs]

    def run(inputs, bindings, out=None):
        del bindings
        return interpreter.run(source, {n: inputs[n] for n in order})

    report = numeric_check(
        program, run, bindings=[{"B": 5}], how="interpreted", target="triton", source_hash="", draws=("normal",)
    )
    assert report.passed


def test_variants_show_in_the_text():
    graph = graphs.ALL["rmsnorm_linear"][1]()
    texts = {str(o): emit(plan_graph(graph, options=o)) for o in (Options(), *CHANGED)}
    assert len(set(texts.values())) == len(texts)
    assert "tl.dot" not in texts[str(Options(dot="never"))]
    assert "loop_unroll_factor=2" in texts[str(Options(unroll=2))]
    streamed = texts[str(Options(evict_first=True))]
    loads = [line for line in streamed.splitlines() if "tl.load(" in line]
    assert [("w_at" in line) for line in loads if "evict_first" in line] == [True]


@pytest.mark.parametrize("options", CHANGED, ids=str)
def test_each_variant_compiles(options: Options):
    """What a variant asks for is in the machine code."""
    graph = graphs.ALL["rmsnorm_linear"][1]()
    with Compiler() as compiler:
        (found,) = compiler.resources(emit(plan_graph(graph, options=options)), 90)
    assert (found.matrix_ops > 0) == (options.dot == "auto")


@pytest.mark.parametrize("name", ["gqa", "two_blocks"])
def test_dependent_launches_wait_in_machine_code(name: str):
    """ACQBULK waits for the kernel before; nothing of it is there by default."""
    graph = graphs.ALL[name][1]() if name in graphs.ALL else BLOCKS[name]()
    for pdl in (True, False):
        plan = plan_graph(graph, options=Options(pdl=pdl))
        ((function, call),) = launched(plan).items()
        with Compiler() as compiler:
            image = compiler.binary(emit(plan), 90, function, *compiled_with(emit(plan), function))["image"]
        assert (b"ACQBULK" in disassembly(image)) == pdl
        assert call.options.pdl == pdl


def compiled_with(source: str, function: str) -> tuple[dict[str, object], dict[str, object]]:
    """The entry of a function in the table at the end of an emitted file."""
    table = source[source.index("SIGNATURES = {") :].partition("=")[2].replace("tl.bfloat16", "'tl.bfloat16'")
    return ast.literal_eval(table.strip())[function]


def disassembly(image: bytes) -> bytes:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(image)
        return subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, check=True).stdout


def test_launch_strings_name_what_was_chosen():
    before = rmsnorm_linear()
    (launch,) = lower(before, (Choice("rmsnorm_linear", "unroll", 2),)).launches()
    assert isinstance(launch, Launch)
    assert "unroll 2" in str(launch).splitlines()[0]
