"""Loads and stores of emitted text lie in their tensors, write every entry, and none twice; an error planted in the
text is shown with sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.codegen.lower import lower, plan_graph
from mugraph.codegen.plan import Options
from mugraph.errors import VerificationError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.parser import parse_program
from mugraph.ir.resize import resized
from mugraph.ir.types import DType
from mugraph.pipeline import emit, finished
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.transpiler import triton
from mugraph.transpiler.target import parse_target
from mugraph.verify import bounds
from mugraph.verify.bounds import NO_SOLVER, Bounds, in_bounds
from mugraph.verify.equivalence import Verified, verify
from tests import graphs
from tests.blocks import BLOCKS, finer_combine, split_matmul

WINNERS = Path(__file__).parents[1] / "corpora/winners"
H100 = parse_target("cuda:90")

pytest.importorskip("z3", reason="z3-solver is not installed")


def source_of(name: str) -> tuple[str, Program]:
    """A schedule by hand as a source."""
    program, fused = graphs.ALL[name]
    return triton.emit(lower(verify(program(), fused()))), program()


def winner(name: str) -> tuple[str, Program]:
    """What is chosen for a program, as a source."""
    graph = parse_program((WINNERS / f"{name}.txt").read_text())
    assert isinstance(graph, KernelGraph)
    return emit(verify(PROGRAMS[name], graph), H100), PROGRAMS[name]


def holds(found: Bounds, least: int = 5) -> None:
    assert found.unknown == ()
    assert found.claims >= least


@pytest.mark.parametrize("name", graphs.ALL)
def test_schedules_by_hand_are_in_bounds(name: str):
    holds(in_bounds(*source_of(name)), 8)


@pytest.mark.parametrize("name", CLASSIC)
def test_what_is_chosen_for_the_classic_programs_is_in_bounds(name: str):
    holds(in_bounds(*winner(name)), 8)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dot", ["auto", "never"])
def test_every_form_of_block_is_in_bounds(name: str, dot: str):
    graph = BLOCKS[name]()
    holds(in_bounds(triton.emit(plan_graph(graph, options=Options(dot=dot))), graph), 3)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_any_number_of_parts_is_in_bounds(parts: int):
    graph = split_matmul(parts=parts)
    holds(in_bounds(triton.emit(plan_graph(graph)), graph))


def test_kernels_that_share_a_launch_are_in_bounds():
    program = PROGRAMS["prenorm_attention"]
    found = search(program, accept=lambda g: verify(program, finished(g)), space=SearchSpace(sizes=()))
    assert isinstance(found.accepted, Verified)
    source = emit(found.accepted, H100)
    assert "if pid < blocks_0:" in source
    holds(in_bounds(source, program), 40)


# -- planted errors

OUTSIDE, TWICE, MISSING = "is out of bounds", "is written twice", "is not written everywhere"
STORE = "tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])"
LOAD = "x = tl.load(x_at + k0 * X_k, mask=in_b[:, None], other=0.0)"
LANES, BLOCKS_N = "i_n = n_block * 64 + tl.arange(0, 64)", "triton.cdiv(size_B, 16) * 96"
EDITS = [
    ("rmsnorm_linear", LOAD, "x = tl.load(x_at + k0 * X_k)", OUTSIDE),
    ("rmsnorm_linear", STORE, "tl.store(Y_at, y.to(tl.float16))", OUTSIDE),
    ("rmsnorm_linear", "in_b = i_b < size_b", "in_b = i_b <= size_b", OUTSIDE),
    ("rmsnorm_linear", "in_b = i_b < size_b", "in_b = i_b + 1 < size_b", MISSING),
    ("rmsnorm_linear", "range(0, size_k, 128)", "range(0, size_k + 1, 128)", OUTSIDE),
    ("rmsnorm_linear", LANES, "i_n = n_block * 64 + tl.arange(0, 128)", OUTSIDE),
    ("rmsnorm_linear", LANES, "i_n = n_block * 32 + tl.arange(0, 64)", TWICE),
    ("rmsnorm_linear", LANES, "i_n = n_block * 64 + tl.arange(0, 32)", MISSING),
    ("rmsnorm_linear", BLOCKS_N, "triton.cdiv(size_B, 16) * 95", MISSING),
    ("rmsnorm_linear", BLOCKS_N, "triton.cdiv(size_B, 16) * 97", OUTSIDE),
    ("rmsnorm_linear", "Y + i_b[:, None] * Y_b + i_n[None, :] * Y_n", "Y + i_n[None, :] * Y_n", TWICE),
    ("rmsnorm_linear", "i_b[:, None] * Y_b + i_n[None, :] * Y_n", "i_b[:, None] * Y_n + i_n[None, :] * Y_b", OUTSIDE),
    ("rmsnorm_linear", "i_b[:, None] * Y_b", "i_b[:, None] * X_b", "an address of Y moves by a stride of X"),
    ("rmsnorm_linear", "*W.stride(), *Y.stride()", "*Y.stride(), *W.stride()", "moves by a stride of"),
    ("rmsnorm_linear", "torch.empty((size_B, 6144)", "torch.empty((size_B, 6143)", "Y comes back as"),
    ("rmsnorm_linear", "dtype=torch.float16", "dtype=torch.float32", "Y comes back as float32"),
    ("rmsnorm_linear", "tl.store(Y_at", "tl.atomic_add(Y_at", "Y is never written"),
    ("rmsnorm_linear", STORE, f"{STORE}\n    tl.atomic_add(Y_at, y, mask=in_b[:, None])", "Y is never written|twice"),
    ("rmsnorm_linear", "    return Y\n", "    return X\n", "Y comes back as"),
    ("rmsnorm_linear", "    return Y\n", "    return Y, Y\n", "2 tensors come back, not 1"),
    ("rmsnorm_linear", "Y = out", "Y = X", "with out= given, another tensor comes back"),
    ("rmsnorm_linear", "Y = out", "Y = torch.empty((1, 1))", "with out= given, another tensor comes back"),
    ("rmsnorm_linear", "Y = out", "Y, X = out, out", "with out= given"),
    ("gqa", "i_g = at_gb // 2", "i_g = at_gb % 8", TWICE),
    ("gqa", "s0 * K_s", "s0 * K_d", OUTSIDE),
    ("gqa", "float16), mask=in_b[:, None])", "float16), mask=in_b[:, None] & (i_g < 7)[:, None])", MISSING),
]


@pytest.mark.parametrize(("name", "old", "new", "why"), EDITS)
def test_an_error_in_the_text_is_shown(name: str, old: str, new: str, why: str):
    source, program = source_of(name)
    assert source.count(old) == 1
    with pytest.raises(VerificationError, match=why):
        in_bounds(source.replace(old, new), program)


def test_two_results_in_one_tensor_are_shown():
    graph = BLOCKS["two_blocks"]()
    source = triton.emit(plan_graph(graph))
    assert "out[0]" in source
    with pytest.raises(VerificationError, match="with out= given"):
        in_bounds(source.replace("out[0]", "out[1]"), graph)


def test_a_dropped_mask_is_shown_with_the_size_and_the_block():
    source, program = source_of("rmsnorm_linear")
    with pytest.raises(
        VerificationError, match=r"rmsnorm_linear: write of Y is out of bounds.* at B=\d+, block \d+=\d+"
    ):
        in_bounds(source.replace("y.to(tl.float16), mask=in_b[:, None]", "y.to(tl.float16)"), program)


def split() -> tuple[str, Program]:
    graph = split_matmul(parts=3)
    return triton.emit(plan_graph(graph)), graph


def test_parts_that_share_their_place_are_a_race():
    source, program = split()
    (line,) = [x for x in source.splitlines() if "part * acc_parts" in x and "_at" in x]
    with pytest.raises(VerificationError, match="acc_parts is written twice"):
        in_bounds(source.replace(line, line.rsplit(" + part * ", 1)[0]), program)


def test_a_launch_that_is_left_out_leaves_its_results_out():
    source, program = split()
    calls = [n for n, x in enumerate(source.splitlines()) if "[(" in x]
    lines = source.splitlines()
    without_second = "\n".join(lines[: calls[1]] + [x for x in lines[calls[1] :] if "return" in x][:1])
    with pytest.raises(VerificationError, match="is never written"):
        in_bounds(without_second, program)
    without_first = "\n".join(lines[: calls[0]] + lines[calls[1] :])
    with pytest.raises(VerificationError, match="acc_parts is never written"):
        in_bounds(without_first, program)


def test_offsets_beyond_31_bits_must_be_64_bit():
    large = resized(graphs.rmsnorm_linear_fused(), {"k": 2**20}, {})
    source = triton.emit(plan_graph(large))
    holds(in_bounds(source, large))
    with pytest.raises(VerificationError, match="may exceed 31 bits"):
        in_bounds(source.replace(".to(tl.int64)", ""), large)


# -- what is not known


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("i_n[None, :] * Y_n", "tl.load(G)[None, :] * Y_n", "an offset that is no index times a stride"),
        (
            "tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])",
            "tl.store(Y_at, y, mask=y > 0)",
            "mask that was loaded",
        ),
        ("n_block = pid // tl.cdiv(size_b, 16)", "n_block = pid // 7", "block number divided by"),
        ("k0 * X_k", "acc * X_k", "an offset that is no index times a stride"),
        ("import torch\n", "import torch\nimport socket\n", "import socket"),
        ("    return Y\n", "    return torch.empty_like(Y)\n", "a branch on what was loaded"),
        ("(triton.cdiv(size_B, 16) * 96,)", "(0,)", "no block at all"),
        (
            "    tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])",
            "    while pid > 3:\n        tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])",
            "branches on one path",
        ),
    ],
)
def test_text_that_cannot_be_read_is_unknown(old: str, new: str, why: str):
    source, program = source_of("rmsnorm_linear")
    assert old in source
    found = in_bounds(source.replace(old, new, 1), program)
    assert found.claims == 0
    assert why in found.reason


B_BLOCK, N_BLOCK = "b_block = pid % tl.cdiv(size_b, 16)", "n_block = pid // tl.cdiv(size_b, 16)"
DIGITS = [  # of a block number that is 96 times as many as there are blocks of rows
    ("b_block = pid // 96", "n_block = pid % 96", ""),
    ("n_block = pid % 96", "b_block = pid // 96", ""),
    (  # the last digits are split after those of rows came to stand before them
        "low = pid % 8; high = pid // 8; b_block = high % tl.cdiv(size_b, 16); high = high // tl.cdiv(size_b, 16)",
        "n_block = high % 4 * 8 + high // 4 * 32 + low",
        "",
    ),
    ("b_block = pid // 96", "n_block = pid % 96 + 0 * pid", "digits that changed places"),
    ("other = pid + 1", "b_block = pid // 96; n_block = pid % 96", "digits that change places"),
    ("b_block = pid // 96; other = pid % tl.cdiv(size_b, 16)", "n_block = pid % 96", "digits that changed places"),
    ("b_block = pid // 96; other = pid // tl.cdiv(size_b, 16)", "n_block = other % 96", "digits that changed places"),
]


@pytest.mark.parametrize(("first", "second", "why"), DIGITS)
def test_digits_change_places_where_nothing_uses_the_number(first: str, second: str, why: str):
    source, program = source_of("rmsnorm_linear")
    assert B_BLOCK in source
    assert N_BLOCK in source
    found = in_bounds(source.replace(B_BLOCK, first).replace(N_BLOCK, second), program)
    assert why in found.reason
    assert (found.claims == 0) == bool(why)


def test_a_loop_that_moves_a_pointer_is_unknown():
    source, program = source_of("rmsnorm_linear")
    moving = source.replace("x = tl.load(x_at + k0 * X_k,", "x_at = x_at + 128 * X_k\n        x = tl.load(x_at,")
    assert "later iterations" in in_bounds(moving, program).reason


def test_without_a_solver_the_outcome_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "find_spec", lambda name: None)
    found = in_bounds(*source_of("lora"))
    assert (found.claims, found.reason) == (0, NO_SOLVER)


def test_a_query_without_time_is_unknown():
    source, program = source_of("rmsnorm_linear")
    cubes = source.replace("in_b = i_b < size_b", "in_b = i_b * i_b * i_b < size_b * size_b * size_b")
    assert "not decided in 0.001 s" in in_bounds(cubes, program, seconds=0.001).reason


# -- the last block of a result combines its parts


def combined_source() -> tuple[str, KernelGraph]:
    graph = graphs.attention_fused(parts=8)
    return triton.emit(plan_graph(graph, options=Options(combine="last"))), graph


COUNT = 'tl.atomic_add(arrivals + result, 1, sem="acq_rel")'
EARLY = COUNT.replace("result", "pid % (tl.cdiv(size_b, 2) * 2)")


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_last_blocks_that_combine_are_in_bounds(parts: int):
    graph = split_matmul(parts=parts)
    source = triton.emit(plan_graph(graph, options=Options(combine="last")))
    assert "tl.atomic_add(arrivals" in source
    holds(in_bounds(source, graph), 20)


def test_last_blocks_of_an_attention_are_in_bounds():
    holds(in_bounds(*combined_source()), 50)


@pytest.mark.full
def test_a_combine_that_is_cut_finer_is_in_bounds():
    graph = finer_combine(graphs.attention_fused(DType.f16, 150, 20, parts=2))
    source = triton.emit(plan_graph(graph, options=Options(combine="last")))
    holds(in_bounds(source, graph), 50)
    old = "range(b_block * 2, tl.minimum(b_block * 2 + 2, size_b))"
    assert old in source
    for new in ("range(b_block * 2, b_block * 2 + 2)", "range(b_block * 2, tl.minimum(b_block * 2 + 1, size_b))"):
        with pytest.raises(VerificationError):
            in_bounds(source.replace(old, new), graph)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("    tl.debug_barrier()  # all threads have stored\n", "", "no barrier"),
        ('"acq_rel") == 7', '"acq_rel") == 6', "6 other blocks are waited for"),
        ("result = pid % (tl.cdiv(size_b, 2) * 2)", "result = pid % tl.cdiv(size_b, 2)", "7 other blocks"),
        ("        tl.store(arrivals + result, 0)  # for the next launch\n", "", "not set to 0"),
        ("tl.store(arrivals + result, 0)", "tl.store(arrivals + result, 1)", "something else"),
        ("tl.store(arrivals + result, 0)", "tl.store(arrivals, 0)", "something else"),
        ("h_block = others % 2", "h_block = 1 - others % 2", "before it is written by all blocks"),
        ("b_block = pid % tl.cdiv(size_b, 2)\n        others", "b_block = 0\n        others", "written"),
        ("counters(2 * size_B, Q.device)", "counters(size_B, Q.device)", "out of bounds"),
        ("    if tl.atomic_add(", f"    {COUNT}\n    if tl.atomic_add(", "counted more than once"),
        ("    pid = tl.program_id(0)\n", f"    pid = tl.program_id(0)\n    {EARLY}\n", "counted more than once"),
        ("    tl.debug_barrier()", "    for _ in range(0, size_b - 1):\n        tl.debug_barrier()", "no barrier"),
    ],
)
def test_a_wrong_count_of_blocks_is_refused(old: str, new: str, message: str):
    source, graph = combined_source()
    assert source.count(old) == 1
    with pytest.raises(VerificationError, match=message):
        in_bounds(source.replace(old, new), graph)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('sem="acq_rel"', 'sem="relaxed"', "in another way"),
        ("arrivals + result, 1,", "arrivals + result, 2,", "in another way"),
        ('sem="acq_rel"', 'sem="acq_rel", scope="cta"', "scope"),
        ("torch.zeros(count", "torch.empty(count", "counters is not the function that is emitted"),
        (" or len(_counters[key]) < count", "", "counters is not the function that is emitted"),
        ("_counters = {}\n", "_counters = dict.fromkeys((), 1)\n", "counters is not the function that is emitted"),
    ],
)
def test_another_way_of_counting_blocks_is_not_known(old: str, new: str, why: str):
    source, graph = combined_source()
    assert old in source
    assert why in in_bounds(source.replace(old, new), graph).reason


@pytest.mark.parametrize("leave", ["break", "return"])
def test_a_loop_that_is_left_is_unknown(leave: str):
    graph = BLOCKS["softmax_two_pass"]()
    source = triton.emit(plan_graph(graph))
    lines = source.splitlines()
    last = max(n for n, line in enumerate(lines) if line.startswith("        tl.store("))
    counter = next(line.split()[1] for line in reversed(lines[:last]) if line.startswith("    for "))
    lines[last + 1 : last + 1] = [f"        if {counter} > 100:", f"            {leave}"]
    assert in_bounds("\n".join(lines), graph).reason.endswith("a loop that is left before its end")


# -- what `run` does around launches


def test_a_result_that_is_set_to_0_after_its_launch_is_shown():
    for graph, cleared in ((BLOCKS["split_atomic"](), True), (BLOCKS["split_matmul"](), False)):
        source = triton.emit(plan_graph(graph))
        source = source.replace("    Y.zero_()\n", "") if cleared else source
        with pytest.raises(VerificationError, match="Y is set to 0 where it may hold something"):
            in_bounds(source.replace("    return Y", "    Y.zero_()\n    return Y"), graph)


@pytest.mark.parametrize("instead", ["pass", "tl.extra.cuda.gdc_launch_dependents()"])
def test_a_launch_that_starts_early_waits_before_it_touches_memory(instead: str):
    graph = split_matmul(parts=3)
    for options in (Options(pdl=True), Options(pdl=True, combine="last"), Options(pdl=True, prefetch=True)):
        source = triton.emit(plan_graph(graph, options=options))
        holds(in_bounds(source, graph))
        with pytest.raises(VerificationError, match="is used before the launch before has ended"):
            in_bounds(source.replace("tl.extra.cuda.gdc_wait()", instead, 1), graph)
