"""Emitted Triton: golden texts, agreement with float64 under the interpreter, and compiled resources."""

import ast
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mugraph.codegen.lower import plan_graph
from mugraph.codegen.plan import Options
from mugraph.codegen.stabilise import stabilise
from mugraph.errors import CompileError, UnsupportedOpError
from mugraph.ir.axes import Dim, size_value
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.resize import recast, resized
from mugraph.ir.types import DType
from mugraph.runtime.compile import SHARED_LIMITS
from mugraph.runtime.interpret import Interpreter
from mugraph.runtime.process import WorkerError
from mugraph.transpiler.triton import emit
from tests.blocks import BLOCKS, batched_matmul, finer_combine, gram, matvec, softmax_in_tile, split_matmul
from tests.graphs import (
    ALL,
    attention,
    attention_fused,
    gated_mlp,
    gated_mlp_fused,
    lora,
    lora_fused,
    rmsnorm_linear,
    rmsnorm_linear_fused,
)

TORCH = {DType.f16: torch.float16, DType.bf16: torch.bfloat16, DType.f32: torch.float32, DType.i32: torch.int32}
# Relative error in the Frobenius norm.  The interpreter truncates where a device rounds f32 to bf16.
TOLERANCE = {DType.f16: 1e-3, DType.bf16: 1e-2, DType.f32: 2e-6}


def draw(graph: Program, bindings: Mapping[str, int], scale: float = 1.0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for i in graph.inputs:
        shape = [size_value(s, bindings) for s in i.tensor.shape]
        found[i.name] = (torch.randn(shape, generator=generator) * scale).to(TORCH[i.tensor.dtype])
    return found


def check_source(
    interpreter: Interpreter,
    source: str,
    program: Program,
    bindings: Mapping[str, int],
    inputs: Mapping[str, torch.Tensor],
) -> None:
    """The source's outputs are those of the program in float64, up to rounding."""
    outputs = interpreter.run(source, inputs)
    expected = reference(program, {n: t.double().numpy() for n, t in inputs.items()}, bindings)
    tolerance = max(TOLERANCE.get(i.tensor.dtype, 0.0) for i in program.inputs)  # indices are exact
    for got, want in zip(outputs, expected, strict=True):
        assert got.shape == want.shape
        error = np.linalg.norm(got.double().numpy() - want) / max(np.linalg.norm(want), 1e-6)
        assert error < tolerance, f"relative error {error:.2e}"


def check(
    interpreter: Interpreter,
    graph: KernelGraph,
    bindings: Mapping[str, int],
    program: Program | None = None,
    scale: float = 1.0,
    options: Options | None = None,
) -> None:
    source = emit(plan_graph(graph, options=options))
    check_source(interpreter, source, program or graph, bindings, draw(graph, bindings, scale))


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_sources_of_the_four_programs(name, golden):
    golden(emit(plan_graph(ALL[name][1]())), "py")


def test_source_of_a_split_with_a_combine(golden):
    golden(emit(plan_graph(attention_fused(parts=8))), "py")


def test_source_of_last_blocks_that_combine(golden):
    golden(emit(plan_graph(attention_fused(parts=8), options=Options(combine="last"))), "py")


EVERYTHING = {**{n: f for n, (_, f) in ALL.items()}, **BLOCKS}


@pytest.fixture(scope="module")
def emitted() -> dict[str, str]:
    return {name: emit(plan_graph(make())) for name, make in EVERYTHING.items()}


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_emitted_file_imports_torch_and_triton_alone(name, emitted):
    tree = ast.parse(emitted[name])
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert modules <= {"torch", "triton", "triton.language"}
    assert not any(isinstance(n, ast.ImportFrom) for n in ast.walk(tree))


def test_emitted_files_are_formatted(emitted, tmp_path):
    for name, source in emitted.items():
        assert max(map(len, source.splitlines())) <= 120, name
        (tmp_path / f"{name}.py").write_text(source)
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "format", "--isolated", "--line-length=120", "--diff", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["X", "Y", "W", "size_B"])
def test_a_program_may_be_named_like_what_it_reads_writes_or_counts(name, interpreter):
    """`def silu(x): return torch.nn.functional.silu(x)` gives such a graph."""
    graph = replace(rmsnorm_linear_fused(DType.f16, 40, 48), name=name)
    check(interpreter, graph, {"B": 5}, rmsnorm_linear(DType.f16, 40, 48))
    split = replace(split_matmul(parts=3), name="Y")
    check(interpreter, split, {"B": 5}, options=Options(combine="last"))


def test_comments_name_every_step_of_the_mugraph():
    graph = rmsnorm_linear_fused()
    source = emit(plan_graph(graph))
    for name in ("x", "g", "w", "xg", "acc", "ss", "k_size", "ms", "e", "mse", "root", "y"):
        assert re.search(rf"# {name}: f\d+\[", source), name


@pytest.mark.parametrize("taken", [("out", "pid", "torch"), ("not", "or", "lambda")])
def test_names_that_clash_stay_apart(interpreter, taken):
    graph = matvec(k_size=20, n_size=10)
    names = dict(zip(("X", "W", "Y"), taken, strict=True))

    def tensor(t):
        return replace(t, name=names.get(t.name, t.name))

    (kernel,) = graph.equations
    block = kernel.op.blocks[0]
    passes = tuple(
        replace(p, loads=tuple(replace(ld, source=names[ld.source]) for ld in p.loads)) for p in block.passes
    )
    block = replace(block, passes=passes, stores=tuple(replace(s, target=names[s.target]) for s in block.stores))
    renamed = replace(
        graph,
        inputs=tuple(replace(i, tensor=tensor(i.tensor)) for i in graph.inputs),
        equations=(
            replace(
                kernel,
                targets=tuple(map(tensor, kernel.targets)),
                args=taken[:2],
                op=replace(kernel.op, blocks=(block,)),
            ),
        ),
        outputs=tuple(replace(o, value=taken[2]) for o in graph.outputs),
    )
    check(interpreter, renamed, {"B": 3})


def test_offsets_beyond_31_bits_are_64_bit():
    large = resized(rmsnorm_linear_fused(), {"k": 2**20}, {})
    source = emit(plan_graph(large))
    assert "i_b.to(tl.int64)[:, None] * X_b" in source
    assert "int64" not in emit(plan_graph(rmsnorm_linear_fused()))


# -- agreement with float64 ----------------------------------------------------------------------------------------

# Two tiles and a tail along each tiled axis, or whole axes that are no powers of two.
SMALL = {
    "rmsnorm_linear": (lambda t: rmsnorm_linear(t, 200, 100), lambda t: rmsnorm_linear_fused(t, 200, 100)),
    "gated_mlp": (lambda t: gated_mlp(t, 150, 100), lambda t: gated_mlp_fused(t, 150, 100)),
    "lora": (lambda t: lora(t, 200, 100, 5), lambda t: lora_fused(t, 200, 100, 5)),
    "gqa": (lambda t: attention(t, 150, 20), lambda t: attention_fused(t, 150, 20)),
    "gqa_plain": (lambda t: attention(t, 150, 20), lambda t: stabilise(attention_fused(t, 150, 20, online=False))),
    "gqa_split": (lambda t: attention(t, 150, 20), lambda t: attention_fused(t, 150, 20, parts=2)),
    "gqa_plain_split": (
        lambda t: attention(t, 150, 20),
        lambda t: stabilise(attention_fused(t, 150, 20, online=False, parts=2)),
    ),
    "gqa_empty_parts": (lambda t: attention(t, 100, 20), lambda t: attention_fused(t, 100, 20, parts=5)),
}
CASES = [(n, t, b) for n in SMALL for t in (DType.f16, DType.bf16, DType.f32) for b in (1, 7, 16, 33)]
DEFAULT = {(n, t, 7) for n, t, _ in CASES if n in ("rmsnorm_linear", "gated_mlp", "lora")}
DEFAULT |= {(n, DType.f16, b) for n in ("rmsnorm_linear", "gated_mlp", "lora") for b in (1, 16, 33)}
DEFAULT |= {("gqa", t, 1) for _, t, _ in CASES} | {("gqa", DType.f16, 7)}
DEFAULT |= {(n, DType.f16, 1) for n in SMALL}


def marked(case):
    return pytest.param(*case, marks=() if case in DEFAULT else pytest.mark.full, id="-".join(map(str, case)))


@pytest.mark.parametrize(("name", "dtype", "b"), list(map(marked, CASES)))
def test_the_four_programs_agree_with_float64(interpreter, name, dtype, b):
    program, graph = SMALL[name]
    tiles = {"b": 8} if b > 1 else {}
    check(interpreter, resized(graph(dtype), {}, tiles), {"B": b}, program(dtype))


BLOCK_CASES = [(n, t, b) for n in BLOCKS for t in (DType.f16, DType.bf16, DType.f32) for b in (1, 7, 33)]


def block_marked(case):
    quick = case[1:] == (DType.f16, 7)
    return pytest.param(*case, marks=() if quick else pytest.mark.full, id="-".join(map(str, case)))


@pytest.mark.parametrize(("name", "dtype", "b"), list(map(block_marked, BLOCK_CASES)))
def test_blocks_agree_with_float64(interpreter, name, dtype, b):
    if name == "functions" and dtype is not DType.f32:
        dtype = DType.f32
    graph = BLOCKS[name](dtype)
    program = graph
    if name in ("causal_attention", "softmax_symbolic"):
        graph = stabilise(graph)
    check(interpreter, graph, {"B": b, "S": 37}, program, scale=0.3 if name == "causal_attention" else 1.0)


@pytest.mark.parametrize("name", ["batched_matmul", "flattened_sides", "tiny_tiles", "contractions"])
def test_multiply_and_sum_agrees_too(interpreter, name):
    check(interpreter, BLOCKS[name](), {"B": 5}, options=Options(dot="never", keep_statistics=False))


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_any_number_of_parts_agrees(interpreter, parts):
    check(interpreter, split_matmul(parts=parts), {"B": 5})


LAST = Options(combine="last")


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_last_blocks_combine_any_number_of_parts(interpreter, parts):
    for size in (1, 5, 33):
        check(interpreter, split_matmul(parts=parts), {"B": size}, options=LAST)


@pytest.mark.parametrize("name", ["gqa_split", "gqa_plain_split", "gqa_empty_parts"])
@pytest.mark.parametrize("dtype", [DType.f16, DType.bf16, DType.f32])
def test_last_blocks_combine_attentions(interpreter, name, dtype):
    program, graph = SMALL[name]
    check(interpreter, graph(dtype), {"B": 7}, program(dtype), options=LAST)


def test_a_combine_that_is_cut_finer_runs_in_a_loop(interpreter):
    graph = finer_combine(attention_fused(DType.f16, 150, 20, parts=2))
    source = emit(plan_graph(graph, options=LAST))
    assert "for b_inner in range(b_block * 2, tl.minimum(b_block * 2 + 2, size_b)):" in source
    assert "for e_inner in range(0, 3):" in source
    for size in (1, 2, 7):
        check(interpreter, graph, {"B": size}, attention(DType.f16, 150, 20), options=LAST)


def test_counters_are_left_as_they_were(interpreter):
    """Two calls that share them, as two launches on one stream do."""
    graph = split_matmul(parts=3)
    source = emit(plan_graph(graph, options=LAST))
    again = "\n\nzeros = torch.zeros(64, dtype=torch.int32)\ncounters = lambda count, device: zeros\ninner = run\n\n\n"
    again += "def run(*inputs):\n    inner(*[torch.zeros_like(t) for t in inputs])\n    return inner(*inputs)\n"
    check_source(interpreter, source + again, graph, {"B": 5}, draw(graph, {"B": 5}))
    kept = source.replace("tl.store(arrivals + result, 0)", "tl.store(arrivals + result, 1)") + again
    with pytest.raises(AssertionError):
        check_source(interpreter, kept, graph, {"B": 5}, draw(graph, {"B": 5}))


def test_large_logits_stay_finite(interpreter):
    graph = stabilise(attention_fused(DType.f16, 100, 32, online=False, parts=2))
    source = emit(plan_graph(graph))
    inputs = draw(graph, {"B": 3}, scale=12.0)
    largest = float(torch.einsum("hgbd,hsd->hgbs", inputs["Q"].float(), inputs["K"].float()).abs().max()) / 8
    assert 300 < largest < 700  # beyond f32's exponentials, within those of the float64 reference
    check_source(interpreter, source, attention(DType.f16, 100, 32), {"B": 3}, inputs)


def test_any_strides_are_taken(interpreter):
    graph = rmsnorm_linear_fused(DType.f16, 70, 50)
    inputs = draw(graph, {"B": 5})
    inputs["X"] = torch.randn(70, 10).half().t()[::2]
    inputs["W"] = torch.randn(50, 70).half().t()
    inputs["G"] = torch.randn(140).half()[::2]
    check_source(interpreter, emit(plan_graph(graph)), rmsnorm_linear(DType.f16, 70, 50), {"B": 5}, inputs)


def test_results_go_into_out(interpreter):
    graph = matvec(k_size=20, n_size=10)
    source = emit(plan_graph(graph))
    source += "\n\ninner = run\n\n\ndef run(X, W):\n    Y = torch.zeros(10, 3, dtype=torch.float16).t()\n    assert inner(X, W, out=Y) is Y\n    return Y\n"  # noqa: E501
    check_source(interpreter, source, graph, {"B": 3}, draw(graph, {"B": 3}))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rmsnorm_linear", "mask=in_b[:, None] & in_k[None, :], other=0.0", "mask=in_b[:, None], other=0.0"),
        ("rmsnorm_linear", "4096.0", "4095.0"),
        ("gated_mlp", "full_k = size_k // 64 * 64", "full_k = size_k"),
        ("lora", "xw_acc + low", "xw_acc"),
        ("gqa", "l * m_fade", "l"),
        ("gqa", "tl.where(in_s[None, :], p, 0.0)", "p"),
        ("gqa", "i_g = at_gb // 2", "i_g = at_gb % 8"),
    ],
)
def test_a_wrong_source_is_refused(interpreter, name, old, new):
    program, graph = SMALL[name]
    source = emit(plan_graph(graph(DType.f16)))
    old = old.replace("4096.0", "200.0")
    assert old in source
    wrong = source.replace(old, new.replace("4095.0", "150.0"))
    bindings = {"B": 7}
    inputs = draw(program(DType.f16), bindings)
    if "other" in old:
        # what lies beyond a row is the next row: NaN there shows that it was read
        inputs["W"] = torch.full((400, 100), float("nan")).half()[:200].copy_(inputs["W"])
    with pytest.raises((AssertionError, WorkerError)):
        check_source(interpreter, wrong, program(DType.f16), bindings, inputs)


def test_what_is_never_written_shows(interpreter):
    graph = matvec(k_size=20, n_size=10)
    source = emit(plan_graph(graph))
    lines = [line for line in source.splitlines() if "tl.store" not in line]
    with pytest.raises(AssertionError, match="nan"):
        check_source(interpreter, "\n".join(lines), graph, {"B": 3}, draw(graph, {"B": 3}))


def test_packed_inputs_are_refused():
    graph = recast(gram(), {DType.f16: DType.i4})
    with pytest.raises(UnsupportedOpError, match="input X is i4"):
        plan_graph(graph)


# -- compiled resources --------------------------------------------------------------------------------------------

TRUE_SIZES = {**{n: f for n, (_, f) in ALL.items()}, "gqa_split": lambda: attention_fused(parts=8)}
COMPILED = [(n, a) for n in TRUE_SIZES for a in (80, 90, 100)]


def compiled_marked(case):
    quick = (case[1] == 90 and case[0] != "gqa_split") or case[0] == "gqa"
    return pytest.param(*case, marks=() if quick else pytest.mark.full, id=f"{case[0]}-sm_{case[1]}")


@pytest.mark.parametrize(("name", "arch"), list(map(compiled_marked, COMPILED)))
def test_true_sizes_compile(compiler, name, arch):
    for r in compiler.resources(emit(plan_graph(TRUE_SIZES[name]())), arch):
        assert r.arch == arch
        assert 0 < r.registers <= 255
        assert 0 < r.shared_bytes <= SHARED_LIMITS[arch]
        assert r.spills == r.spills_outside == 0
        assert r.wide_loads > 0
        assert r.matrix_ops > 0 or r.kernel.endswith("_combine") or arch == 100


@pytest.mark.parametrize(
    "arch", [pytest.param(80, marks=pytest.mark.full), 90, pytest.param(100, marks=pytest.mark.full)]
)
def test_last_blocks_that_combine_compile(compiler, arch):
    (r,) = compiler.resources(emit(plan_graph(attention_fused(parts=8), options=LAST)), arch)
    assert r.kernel == "gqa_whole"
    assert r.spills == r.spills_outside == 0
    assert r.matrix_ops > 0 or arch == 100


def test_an_axis_of_any_length_gets_warps_and_is_compiled_for_its_longest(compiler):
    def source(most: int) -> str:
        return emit(plan_graph(softmax_in_tile(DType.f16, Dim("L", 3, most))))

    assert ("num_warps=1," in source(40), '"LANES_k": 64,' in source(40)) == (True, True)
    assert ("num_warps=16," in source(4096), '"LANES_k": 4096,' in source(4096)) == (True, True)
    assert '"LANES_k": 16384,' in source(2**20)
    (enough,) = compiler.resources(source(4096), 90)
    assert enough.repeated_spills == 0
    (one_warp,) = compiler.resources(source(4096), 90, {"num_warps": 1})
    assert one_warp.repeated_spills > 0


def test_more_than_the_shared_memory_shows(compiler):
    (r,) = compiler.resources(emit(plan_graph(rmsnorm_linear_fused(), options=Options(num_stages=16))), 90)
    assert r.shared_bytes > SHARED_LIMITS[90]


@pytest.mark.full
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_compile(compiler, name):
    graph = BLOCKS[name]()
    for r in compiler.resources(emit(plan_graph(graph)), 90):
        assert r.registers > 0


def test_a_source_that_does_not_compile_is_refused(compiler):
    source = emit(plan_graph(softmax_in_tile())).replace("tl.sum(", "tl.no_such_function(")
    with pytest.raises(CompileError, match="no_such_function"):
        compiler.resources(source, 90)


def test_batched_dots_compile_to_matrix_instructions(compiler):
    (r,) = compiler.resources(emit(plan_graph(batched_matmul())), 90)
    assert r.matrix_ops > 0
