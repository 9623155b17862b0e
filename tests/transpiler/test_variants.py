"""Variants of a launch: the order of its blocks, persistent blocks, a prefetch before the wait, tensor descriptors.
Texts, agreement with float64 at odd sizes, bounds, machine code, and errors that must show."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mugraph.codegen.lower import plan_graph
from mugraph.codegen.plan import Machine, Options
from mugraph.errors import CompileError, UnsupportedOpError, VerificationError
from mugraph.ir.axes import Dim
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Pass, Store
from mugraph.ir.ops import Contract, Kernel, Slice
from mugraph.ir.resize import retiled
from mugraph.ir.types import DType, Output, Storage, tensor
from mugraph.runtime.aot import host_part, wanted
from mugraph.runtime.compile import SHARED_LIMITS, Compiler
from mugraph.runtime.dispatch import Host
from mugraph.runtime.interpret import Interpreter
from mugraph.runtime.load import load_module
from mugraph.transpiler.triton import emit
from mugraph.verify.bounds import in_bounds
from tests.blocks import BLOCKS, batched_matmul, gram, kernel_graph, nested_loops, split_matmul
from tests.graphs import ALL, Builder, attention_fused, axis, inp, rmsnorm_linear, rmsnorm_linear_fused
from tests.runtime.test_tune import compiled_with, disassembly
from tests.transpiler.test_triton import check, check_source, draw


def linear(dtype: DType = DType.f16, n: int = 300) -> KernelGraph:
    """Two blocks of rows at B = 17, five of columns."""
    return rmsnorm_linear_fused(dtype, 200, n)


GROUPS = [Options(group=4), Options(group=16)]
PERSISTENT = [Options(persistent=1), Options(persistent=2, group=4), Options(persistent=2, pdl=True)]
PREFETCH = [Options(pdl=True, prefetch=True), Options(pdl=True, prefetch=True, group=4)]
DESCRIBED = [
    Options(descriptors=True),
    Options(descriptors=True, persistent=2, pdl=True),
    Options(descriptors=True, group=4, pdl=True, prefetch=True, combine="last"),
]
VARIANTS = [*GROUPS, *PERSISTENT, *PREFETCH, *DESCRIBED]
QUICK = [GROUPS[0], PERSISTENT[1], PREFETCH[1], DESCRIBED[0]]


def marked(options: Options) -> object:
    """One variant of each kind is compiled, and proved for every block, by default."""
    return pytest.param(options, marks=() if options in QUICK else pytest.mark.full, id=str(options))


def source(graph: KernelGraph, options: Options) -> str:
    return emit(plan_graph(graph, options=options))


# -- texts


def test_the_text_of_grouped_blocks(golden):
    golden(source(linear(), Options(group=4)), "py")


def test_the_text_of_persistent_blocks(golden):
    golden(source(linear(), Options(persistent=2)), "py")


def test_the_text_of_a_prefetch(golden):
    golden(source(linear(), PREFETCH[1]), "py")


def test_the_text_of_descriptors(golden):
    golden(source(linear(n=296), DESCRIBED[0]), "py")


@pytest.mark.parametrize(
    ("name", "described"),
    [
        ("rmsnorm_linear", "X W"),  # not the vector of weights
        ("gqa", "K V"),  # not the queries, which no loop moves
        ("lora", "X W A"),
        ("batched_matmul", "X"),  # rows of W have 20 entries: 40 bytes
        ("gram", "X"),  # one descriptor for both
        ("flattened_sides", "X W"),
        ("split_matmul", "X W"),  # not the parts that the combine reads
        ("paged_sum", ""),  # pages lie where a table says
        ("rope", ""),  # no loop
        ("nested_loops", ""),
    ],
)
def test_descriptors_are_of_what_lies_as_they_want(name: str, described: str):
    text = source(BLOCKS[name]() if name in BLOCKS else ALL[name][1](), DESCRIBED[0])
    assert re.findall(r"tl.make_tensor_descriptor\(\s*(\w+)", text) == described.split()
    assert ("descriptors(" in text) == bool(described)


def sliced(start: int, whole: int, k_size: int) -> KernelGraph:
    """A product of some columns of X."""
    b, m, k, n = axis("b", Dim("B", 1, 4096)), axis("m", whole), axis("k", k_size), axis("n", 24)
    x, w = inp("X", b, m), inp("W", k, n)
    part, target = tensor("part", (b, k), DType.f16), tensor("Y", (b, n), DType.f16)
    s = Builder(block=True)
    loads = (s.load("x", part), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    block = BlockGraph(
        (("b", 16), ("n", 16)), None, (Pass((("k", 32),), loads, s.take()),), (), (), (Store("acc", "Y"),)
    )
    equations = (Equation((part,), Slice("m", k, start), ("X",)), Equation((target,), Kernel((block,)), ("part", "W")))
    return KernelGraph("sliced", (x, w), equations, (Output("Y", Storage(DType.f16)),))


def two_products() -> KernelGraph:
    """Two products of one matrix, as blocks of one launch."""
    b, k, n = axis("b", Dim("B", 1, 4096)), axis("k", 72), axis("n", 24)
    inputs = inp("X", b, k), inp("U", k, n), inp("V", k, n)
    blocks = []
    for name, weight in (("Y", inputs[1]), ("Z", inputs[2])):
        s = Builder(block=True)
        loads = (s.load("x", inputs[0].tensor), s.load("w", weight.tensor))
        s.acc("acc", Contract(("k",)), "x", "w")
        body = (Pass((("k", 32),), loads, s.take()),)
        blocks.append(BlockGraph((("b", 16), ("n", 16)), None, body, (), (), (Store("acc", name),)))
    targets = (tensor("Y", (b, n), DType.f16), tensor("Z", (b, n), DType.f16))
    return kernel_graph("two_products", inputs, tuple(blocks), *targets)


@pytest.mark.parametrize("make", [two_products, lambda: retiled(nested_loops(), {"k": 4})], ids=["blocks", "loops"])
def test_kernels_of_one_launch_and_nested_loops_have_descriptors(
    interpreter: Interpreter, make: Callable[[], KernelGraph]
):
    pytest.importorskip("z3")
    graph = make()
    text = source(graph, DESCRIBED[0])
    assert text.count("make_tensor_descriptor") == (4 if graph.name == "two_products" else 2)
    check(interpreter, graph, {"B": 37}, options=DESCRIBED[0])
    assert in_bounds(text, graph).unknown == ()


def test_one_flag_is_for_all_kernels_of_a_launch():
    """So there are cubins for tensors that are laid out for descriptors, and for others, and none in between."""
    graph = two_products()
    text, signatures = host_part(source(graph, DESCRIBED[0]))
    found = wanted(graph, Host.of(text, list(signatures), "host"))
    assert [constants for _, _, constants in found] == [(("DESCRIPTORS", True),), (("DESCRIPTORS", False),)]
    assert "descriptors(X, U, V)" in text


@pytest.mark.parametrize(
    ("start", "whole", "k_size", "described"),
    [
        (32, 104, 72, True),
        (8, 104, 72, False),  # beyond the slice are other columns, no zeros
        (8, 104, 64, True),
        (4, 104, 64, False),  # 8 bytes
        (8, 108, 64, False),  # rows of 216 bytes
    ],
)
def test_slices_are_described_where_zeros_follow_them(
    interpreter: Interpreter, start: int, whole: int, k_size: int, described: bool
):
    graph = sliced(start, whole, k_size)
    assert ("X_tiles" in source(graph, DESCRIBED[0])) == described
    assert "W_tiles" in source(graph, DESCRIBED[0])
    check(interpreter, graph, {"B": 17}, options=DESCRIBED[0])


def test_descriptors_want_rows_at_multiples_of_16_bytes():
    text, signatures = host_part(source(linear(n=296), DESCRIBED[0]))
    described = Host.of(text, list(signatures), "host").names(lambda *_: None)["descriptors"]
    x, w = torch.zeros(17, 208, dtype=torch.float16), torch.zeros(200, 296, dtype=torch.float16)
    assert described(x, w)
    assert described(x[:, :200], w)
    assert described(x[:, 8:200], w)
    short = torch.zeros(17, 204, dtype=torch.float16)  # rows of 408 bytes
    for wrong in (x[:, 4:], x.t(), x[:, ::2], x[:1].expand(17, 208), short, short.to(torch.int8)):
        assert not described(wrong, w)
        assert not described(w, wrong)
    assert described(short.float(), w)


def test_descriptors_of_an_architecture_without_them_are_refused():
    with pytest.raises(UnsupportedOpError, match="sm_80 has no tensor descriptors"):
        plan_graph(linear(), machine=Machine(80), options=DESCRIBED[0])
    assert plan_graph(linear(), machine=Machine(90), options=DESCRIBED[0])


def test_a_prefetch_is_of_what_is_given_and_large():
    texts = {name: source(make(), PREFETCH[0]) for name, make in BLOCKS.items()}
    assert "acc_parts_ahead" not in texts["split_matmul"]  # partial results were written by the launch before
    assert "W_ahead" in texts["split_matmul"]
    assert "prefetch" not in texts["two_blocks"]  # kernels of one launch
    assert "prefetch" not in texts["paged_sum"]  # where the pages lie is read first


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_are_formatted(options: Options, tmp_path: Path):
    graphs = {**BLOCKS, **{n: f for n, (_, f) in ALL.items()}, "linear": linear}
    texts = {name: source(make(), options) for name, make in graphs.items()}
    assert any(text != emit(plan_graph(graphs[name]())) for name, text in texts.items())
    for name, text in texts.items():
        assert max(map(len, text.splitlines())) <= 120, name
        (tmp_path / f"{name}.py").write_text(text)
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "format", "--isolated", "--line-length=120", "--diff", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_grid_of_one_axis_has_no_groups():
    graph = BLOCKS["softmax_two_pass"]()
    assert source(graph, Options(group=8)) == source(graph, Options())


def test_a_group_is_no_larger_than_its_axis():
    """Of six blocks of heads, grouped by eight, none is empty."""
    text = source(linear(n=128), Options(group=8))
    assert "n_inner = pid % 2" in text
    assert "if n_block" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("group", 3), ("group", True), ("group", "4"), ("persistent", -1), ("persistent", 9), ("persistent", True)],
)
def test_what_is_no_value_of_an_option_is_refused(name: str, value: object):
    with pytest.raises(ValueError, match=f"there is no option {name}"):
        Options().changed(name, value)


@pytest.mark.parametrize("options", [Options(prefetch=True), Options(pdl=True, prefetch=True, persistent=1)])
def test_a_prefetch_without_a_wait_after_it_is_refused(options: Options):
    with pytest.raises(ValueError, match="prefetch goes with pdl"):
        source(linear(), options)


# -- agreement with float64


@pytest.mark.parametrize("b", [1, 17, 35])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_agree_with_float64(interpreter: Interpreter, options: Options, b: int):
    check(interpreter, linear(), {"B": b}, rmsnorm_linear(DType.f16, 200, 300), options=options)


@pytest.mark.parametrize("options", DESCRIBED, ids=str)
def test_described_tiles_with_tails_everywhere_agree_with_float64(interpreter: Interpreter, options: Options):
    graph, program = linear(n=296), rmsnorm_linear(DType.f16, 200, 296)
    for b in (1, 17, 35):
        check(interpreter, graph, {"B": b}, program, options=options)
    for dtype in (DType.bf16, DType.f32):
        check(interpreter, linear(dtype, 296), {"B": 17}, rmsnorm_linear(dtype, 200, 296), options=options)
    attention = attention_fused(s_size=200, d_size=64)
    check(interpreter, attention, {"B": 3}, options=options)
    check(interpreter, gram(), {}, options=options)


def test_tensors_that_lie_otherwise_agree_with_float64_too(interpreter: Interpreter):
    """Rows with room behind them, for descriptors; rows that begin anywhere, for pointers."""
    graph, program = linear(n=296), rmsnorm_linear(DType.f16, 200, 296)
    text, inputs = source(graph, DESCRIBED[0]), draw(program, {"B": 17})
    for columns, first in ((208, 8), (203, 1)):
        wide = torch.full((17, columns), float("nan"), dtype=torch.float16)
        wide[:, first : first + 200] = inputs["X"]
        given = {**inputs, "X": wide[:, first : first + 200]}
        check_source(interpreter, text, program, {"B": 17}, given)


def test_an_error_in_where_a_tile_begins_is_shown(interpreter: Interpreter):
    program = rmsnorm_linear(DType.f16, 200, 296)
    text = source(linear(n=296), DESCRIBED[0])
    for old, new in (("[b_block * 16, k0]", "[k0, b_block * 16]"), ("n_block * 64])", "n_block * 32])")):
        assert text.count(old) == 2
        with pytest.raises(AssertionError, match="relative error"):
            check_source(interpreter, text.replace(old, new), program, {"B": 17}, draw(program, {"B": 17}))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_of_splits_and_batches_agree_with_float64(interpreter: Interpreter, options: Options):
    check(interpreter, split_matmul(parts=3), {"B": 37}, options=options)
    check(interpreter, batched_matmul(), {"B": 90}, options=options)  # the second axis is symbolic: six blocks


# -- bounds


@pytest.mark.parametrize("options", [*map(marked, VARIANTS)])
@pytest.mark.parametrize("name", [*BLOCKS, *ALL])
def test_variants_are_in_bounds_at_all_sizes(name: str, options: Options):
    pytest.importorskip("z3")
    graph = BLOCKS[name]() if name in BLOCKS else ALL[name][1]()
    found = in_bounds(source(graph, options), graph)
    assert found.unknown == ()
    assert found.claims >= 3


GROUP, TILES, FIRST = Options(group=4), Options(persistent=2), PREFETCH[1]
OUTSIDE, TWICE, MISSING = "is out of bounds", "is written twice", "is not written everywhere"
EDITS = [
    (GROUP, "if n_block < 5:", "if n_block < 6:", OUTSIDE),
    (GROUP, "if n_block < 5:", "if n_block < 4:", MISSING),
    (GROUP, "n_outer * 4 + n_inner", "n_outer * 2 + n_inner", TWICE),
    (GROUP, "n_outer * 4 + n_inner", "n_outer * 4 + n_inner + 1", MISSING),
    (GROUP, "n_outer * 4 + n_inner", "n_outer + n_inner * 4", MISSING),
    (GROUP, "triton.cdiv(size_B, 16) * 8", "triton.cdiv(size_B, 16) * 4", MISSING),
    (TILES, "tl.cdiv(size_b, 16) * 5, tl", "tl.cdiv(size_b, 16) * 4, tl", MISSING),
    (TILES, "tl.cdiv(size_b, 16) * 5, tl", "tl.cdiv(size_b, 16) * 6, tl", OUTSIDE),
    (FIRST, "tl.minimum(n_block * 64, 319)", "n_block * 64", OUTSIDE),
    (FIRST, "tl.minimum(tl.arange(0, 128), 199)", "tl.arange(0, 256)", OUTSIDE),
    (TILES, "tl.num_programs(0)", "5", TWICE),
    (TILES, "n_block = tile // tl.cdiv(size_b, 16)", "n_block = 0", "is written twice|is not written everywhere"),
]
UNREADABLE = [
    ("tl.num_programs(0)", "tl.num_programs(1)", "a grid of several dimensions"),
    ("range(tl.program_id(0)", "range(0", "a loop over tiles that is not all"),
    ("range(tl.program_id(0)", "range(tl.program_id(0) + 1", "a loop over tiles that is not all"),
    ("min(triton", "min(0 * triton", "a loop over tiles by what may be no blocks at all"),
    ("    tl.store(Y_at", "tl.store(Y_at", "a kernel that goes on after its tiles"),
    ("b_block = tile %", "b_block = tl.program_id(0) %", "a program id beside the tiles"),
    ("    for tile", "    first = tl.program_id(0) + 1\n    for tile", "a loop over tiles that is not all"),
    ("        x_at = X +", "        X = X + i_b[:, None] * X_b\n        x_at = X +", "later tiles"),
]


@pytest.mark.parametrize(("options", "old", "new", "why"), EDITS)
def test_an_error_in_a_variant_is_shown(options: Options, old: str, new: str, why: str):
    pytest.importorskip("z3")
    graph = linear(n=320)  # whole tiles of columns: no mask hides a wrong block
    text = source(graph, options)
    in_bounds(text, graph)
    assert text.count(old) == 1
    with pytest.raises(VerificationError, match=why):
        in_bounds(text.replace(old, new), graph)


@pytest.mark.parametrize(("old", "new", "why"), UNREADABLE)
def test_tiles_that_may_be_other_blocks_are_unknown(old: str, new: str, why: str):
    pytest.importorskip("z3")
    graph = linear(n=320)
    text = source(graph, TILES)
    assert text.count(old) == 1
    found = in_bounds(text.replace(old, new), graph)
    assert found.claims == 0
    assert why in found.reason


NOT_ITS_OWN = "has not its sizes and strides in order"
WRONG_DESCRIPTORS = [
    ("shape=[size_b, 200]", "shape=[200, size_b]", NOT_ITS_OWN),
    ("shape=[200, 320]", "shape=[201, 320]", NOT_ITS_OWN),
    ("shape=[200, 320]", "shape=[64000]", NOT_ITS_OWN),
    ("strides=[W_k, 1]", "strides=[1, W_k]", NOT_ITS_OWN),
    ("strides=[W_k, 1]", "strides=[W_n, 1]", NOT_ITS_OWN),
    ("strides=[W_k, 1]", "strides=[X_b, 1]", NOT_ITS_OWN),
    ("strides=[W_k, 1]", "strides=[W_k * 2, 1]", NOT_ITS_OWN),
    ("X, shape=[size_b, 200], strides=[X_b, 1]", "W, shape=[size_b, 200], strides=[X_b, 1]", NOT_ITS_OWN),
    ("[b_block * 16, k0]", "[b_block * 16 - 1, k0]", OUTSIDE),
    ("[k0, n_block * 64]", "[k0, n_block * 64 - k0]", OUTSIDE),
    ("X, shape=[size_b, 200], strides=[X_b, 1]", "Y, shape=[size_b, 320], strides=[Y_b, 1]", "read in the launch that"),
    ("mask=in_b[:, None], ", "", OUTSIDE),  # where there are no descriptors
]
UNKNOWN_DESCRIPTORS = [
    ("[b_block * 16, k0]", "[i_b, k0]", "a tile that begins at what is no number"),
    ("[b_block * 16, k0]", "[k0]", "a tile that begins at another number of dimensions"),
    ("(X, shape", "(X + 8 * X_k, shape", "a descriptor of what is no tensor"),
    ("block_shape=[16, 128]", "block_shape=[size_b, 128]", "of unknown tiles"),
]


@pytest.mark.parametrize(("old", "new", "why"), WRONG_DESCRIPTORS)
@pytest.mark.parametrize("options", DESCRIBED[:2], ids=str)
def test_an_error_in_a_descriptor_is_shown(options: Options, old: str, new: str, why: str):
    pytest.importorskip("z3")
    graph = linear(n=320)
    text = source(graph, options)
    assert 1 <= text.count(old) <= 2  # the main loop and the tail
    with pytest.raises(VerificationError, match=why):
        in_bounds(text.replace(old, new), graph)


@pytest.mark.parametrize(("old", "new", "why"), UNKNOWN_DESCRIPTORS)
def test_descriptors_of_anything_else_are_unknown(old: str, new: str, why: str):
    pytest.importorskip("z3")
    graph = linear(n=320)
    text = source(graph, DESCRIBED[0])
    assert text.count(old) in (1, 2)
    found = in_bounds(text.replace(old, new), graph)
    assert found.claims == 0
    assert why in found.reason


# -- machine code


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("options", [*map(marked, VARIANTS)])
def test_variants_compile_without_spills(compiler: Compiler, options: Options, arch: int):
    for graph in (rmsnorm_linear_fused(), linear(n=320)):
        if options.pdl and arch < 90:
            with pytest.raises(CompileError, match=r"griddepcontrol|has tensor descriptors"):
                compiler.resources(source(graph, options), arch)
            continue
        if options.descriptors and arch < 90:
            with pytest.raises(
                CompileError, match=r"has tensor descriptors \(option descriptors\), which sm_80 has not"
            ):
                compiler.resources(source(graph, options), arch)
            continue
        (found,) = compiler.resources(source(graph, options), arch)
        assert found.spills == found.spills_outside == 0
        assert found.wide_loads > 0
        assert 0 < found.shared_bytes <= SHARED_LIMITS[arch]


def test_a_prefetch_comes_before_the_wait_in_machine_code(compiler: Compiler):
    """CCTL.E.PF2 fetches into L2, ACQBULK waits for the launch before, LDG and LDGSTS load."""
    for options in (PREFETCH[0], Options(pdl=True)):
        text = source(rmsnorm_linear_fused(), options)
        parameters, compiled = compiled_with(text, "rmsnorm_linear")
        image = compiler.binary(text, 90, "rmsnorm_linear", parameters, compiled)["image"]
        found = re.findall(r"\b(CCTL\.E\.PF2|ACQBULK|LDG|LDGSTS)\b", disassembly(image).decode())
        assert found.count("CCTL.E.PF2") == (1 if options.prefetch else 0)
        assert found[0] == ("CCTL.E.PF2" if options.prefetch else "ACQBULK")
        wait = found.index("ACQBULK")
        assert {"LDG", "LDGSTS"} & {*found[wait:]}
        assert not {"LDG", "LDGSTS"} & {*found[:wait]}


@pytest.mark.parametrize("arch", [90, 100])
def test_described_tiles_are_copied_by_the_hardware(compiler: Compiler, arch: int):
    """UTMALDG copies a tile.  A descriptor is written (UTMACCTL) after the wait for the launch before, and once, also
    where blocks are persistent: 128 bytes of each block."""
    for options in (*DESCRIBED[:2], PERSISTENT[2]):
        text = source(rmsnorm_linear_fused(), options)
        parameters, compiled = compiled_with(text, "rmsnorm_linear")
        binary = compiler.binary(text, arch, "rmsnorm_linear", parameters, compiled)
        found = re.findall(r"\b(UTMALDG|UTMACCTL|ACQBULK|LDGSTS)\b", disassembly(binary["image"]).decode())
        assert binary["scratch"] == (256 if options.descriptors else 0)
        assert ("UTMALDG" in found, "LDGSTS" in found) == (options.descriptors, not options.descriptors)
        if options.descriptors and options.pdl:
            assert found[0] == "ACQBULK"


def test_rows_that_16_entries_do_not_divide_take_no_spills_with_descriptors(compiler: Compiler):
    """Pointers to rows of 296 entries are known to be aligned to 8 of them only."""
    plain, described = (compiler.resources(source(linear(n=296), o), 90)[0] for o in (Options(), DESCRIBED[0]))
    assert (plain.spills > 0, described.spills) == (True, 0)


# -- a device, where there is one


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_device_computes_every_variant(options: Options):
    if (options.pdl or options.descriptors) and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launches and tensor descriptors need sm_90")
    for graph, sizes in (
        (linear(n=296), (1, 17, 600)),
        (split_matmul(parts=3), (37, 600)),
        (batched_matmul(), (90, 2000)),
    ):
        run = load_module(source(graph, options), graph.name).run
        for b in sizes:
            inputs = draw(graph, {"B": b})
            (wanted,) = reference(graph, {n: t.double().numpy() for n, t in inputs.items()}, {"B": b})
            found = run(*(t.cuda() for t in inputs.values())).double().cpu().numpy()
            assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
