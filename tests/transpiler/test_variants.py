"""Variants of a launch: the order of its blocks, persistent blocks, a prefetch before the wait.  Texts, agreement with
float64 at odd sizes, bounds, machine code, and errors that must show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mugraph.codegen.lower import plan_graph
from mugraph.codegen.plan import Options
from mugraph.errors import CompileError, VerificationError
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import KernelGraph
from mugraph.ir.types import DType
from mugraph.runtime.compile import SHARED_LIMITS, Compiler
from mugraph.runtime.interpret import Interpreter
from mugraph.runtime.load import load_module
from mugraph.transpiler.triton import emit
from mugraph.verify.bounds import in_bounds
from tests.blocks import BLOCKS, batched_matmul, split_matmul
from tests.graphs import ALL, rmsnorm_linear, rmsnorm_linear_fused
from tests.runtime.test_tune import compiled_with, disassembly
from tests.transpiler.test_triton import check, draw


def linear(dtype: DType = DType.f16, n: int = 300) -> KernelGraph:
    """Two blocks of rows at B = 17, five of columns."""
    return rmsnorm_linear_fused(dtype, 200, n)


GROUPS = [Options(group=4), Options(group=16)]
PERSISTENT = [Options(persistent=1), Options(persistent=2, group=4), Options(persistent=2, pdl=True)]
PREFETCH = [Options(pdl=True, prefetch=True), Options(pdl=True, prefetch=True, group=4)]
VARIANTS = [*GROUPS, *PERSISTENT, *PREFETCH]
QUICK = [GROUPS[0], PERSISTENT[1], PREFETCH[1]]


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


# -- machine code


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("options", [*map(marked, VARIANTS)])
def test_variants_compile_without_spills(compiler: Compiler, options: Options, arch: int):
    for graph in (rmsnorm_linear_fused(), linear(n=320)):
        if options.pdl and arch < 90:
            with pytest.raises(CompileError, match="griddepcontrol"):
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


# -- a device, where there is one


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_device_computes_every_variant(options: Options):
    if options.pdl and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    for graph, sizes in ((linear(), (1, 17, 600)), (split_matmul(parts=3), (37, 600)), (batched_matmul(), (90, 2000))):
        run = load_module(source(graph, options), graph.name).run
        for b in sizes:
            inputs = draw(graph, {"B": b})
            (wanted,) = reference(graph, {n: t.double().numpy() for n, t in inputs.items()}, {"B": b})
            found = run(*(t.cuda() for t in inputs.values())).double().cpu().numpy()
            assert np.linalg.norm(found - wanted) < 1e-3 * np.linalg.norm(wanted)
