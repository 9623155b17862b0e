"""Element types from the text of a program to the signature of a kernel, and the matrix multiplies that have them."""

from dataclasses import replace

import pytest
import torch

import mugraph as mg
from mugraph.codegen.lower import DEEPEST_I8, plan_graph
from mugraph.codegen.plan import Machine
from mugraph.errors import UnsupportedOpError
from mugraph.ir.axes import Axis
from mugraph.ir.graph import BlockGraph, KernelGraph, Pass, Store
from mugraph.ir.ops import Cast, Contract, Reduce
from mugraph.ir.parser import parse_program
from mugraph.ir.printer import canonical_text
from mugraph.ir.serialize import dumps, loads
from mugraph.ir.types import TORCH_NAMES, DType, Storage, tensor
from mugraph.pipeline import from_graph
from mugraph.runtime.cache import key_of
from mugraph.transpiler.triton import POINTER, emit
from tests.blocks import kernel_graph
from tests.graphs import Builder, axis, inp

STORED = [d for d in DType if d.bits >= 8]
PACKED = [d for d in DType if d.bits < 8]


def copied(dtype: DType) -> KernelGraph:
    """y = x, in tiles."""
    b, k = axis("b", 5), axis("k", 40)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    block = BlockGraph((("b", 2), ("k", 16)), None, (), (s.load("x", x.tensor),), (), (Store("x", "Y"),))
    return kernel_graph("copied", (x,), (block,), tensor("Y", (b, k), dtype))


def matmul(
    dtype: DType, result: DType, widened: DType | None = None, m: int = 64, k_size: int = 256, sums: DType | None = None
) -> KernelGraph:
    """Y = X W, a 64 by 64 tile a block, both operands widened first if asked for."""
    b, k, n = axis("b", m), axis("k", k_size), axis("n", 64)
    x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=sums or dtype)
    s = Builder(block=True)
    loads_ = (s.load("x", x.tensor), s.load("w", w.tensor))
    names = ["x", "w"]
    if widened:
        names = [s.add(f"{a}_wide", Cast(widened), a) for a in names]
    s.acc("acc", Contract(("k",)), *names)
    passes = (Pass((("k", 64),), loads_, s.take()),)
    block = BlockGraph((("b", 64), ("n", 64)), None, passes, (), (), (Store("acc", "Y"),))
    return kernel_graph("matmul", (x, w), (block,), tensor("Y", (b, n), result))


def drawn(dtype: DType, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, TORCH_NAMES[dtype])
    if dtype.is_float:
        return torch.randn(shape, generator=generator).to(kind)
    low, high = (0, 2) if dtype is DType.bool else (0, 256) if dtype is DType.u8 else (-128, 128)
    return torch.randint(low, high, shape, generator=generator).to(kind)


# -- every type ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DType, ids=str)
def test_a_type_and_its_storage_survive_text_and_json(dtype):
    stored = Storage(dtype, packing=8 // dtype.bits if dtype.bits < 8 else 1, strides=(40, 1), divisibility=8)
    graph = copied(dtype)
    graph = replace(graph, inputs=(replace(graph.inputs[0], storage=stored),))
    assert parse_program(str(graph)) == graph
    assert loads(dumps(graph)) == graph


def test_no_two_types_share_a_key():
    keys = {key_of(canonical_text(copied(d)), {}, "cuda:90", {}) for d in DType}
    assert len(keys) == len(DType)
    packed = replace(copied(DType.u8).inputs[0], storage=Storage(DType.u8, packing=2))
    plain = copied(DType.u8)
    assert canonical_text(replace(plain, inputs=(packed,))) != canonical_text(plain)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_type_reaches_the_plan_the_signature_and_the_result(dtype, interpreter):
    plan = plan_graph(copied(dtype))
    assert [b.tensor.dtype for b in plan.buffers] == [dtype, dtype]
    source = emit(plan)
    assert source.count(f'"{POINTER[dtype]}:16"') == 2
    assert f"dtype=torch.{TORCH_NAMES[dtype]}" in source
    x = drawn(dtype, 5, 40)
    (y,) = interpreter.run(source, {"X": x})
    assert y.dtype is x.dtype
    assert torch.equal(y.double(), x.double())


@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_a_type_below_a_byte_is_refused_by_its_name(dtype):
    with pytest.raises(UnsupportedOpError, match=rf"input X is {dtype},"):
        plan_graph(copied(dtype))
    inside = matmul(DType.i8, DType.i8, dtype)
    with pytest.raises(UnsupportedOpError, match=rf"x_wide is {dtype},"):
        plan_graph(inside)

    @mg.program
    def scaled(x: getattr(mg, str(dtype))[4, 8], y: mg.f16[4, 8]):
        return mg.cast(x, mg.f16) * y

    for target in ("torch", "cuda:90"):
        with pytest.raises(UnsupportedOpError, match=rf"input x is {dtype},"):
            mg.optimize(scaled, target=target)


def test_packed_storage_is_refused_by_its_type():
    graph = copied(DType.u8)
    packed = replace(graph.inputs[0], storage=Storage(DType.i4, packing=2))
    with pytest.raises(UnsupportedOpError, match="input X packs 2 values of i4"):
        plan_graph(replace(graph, inputs=(packed,)))


# -- integers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_i8_is_multiplied_by_matrix_instructions_into_i32(compiler, arch):
    source = emit(plan_graph(matmul(DType.i8, DType.i32, DType.i32)))
    assert "acc = acc + tl.dot(x, w)" in source  # no version of Triton takes another form
    (found,) = compiler.resources(source, arch)
    assert found.matrix_ops > 0
    assert found.spills == 0


@pytest.mark.parametrize("m", [1, 33])
def test_i8_products_are_exact_at_the_ends_of_the_type(interpreter, m):
    graph = matmul(DType.i8, DType.i32, DType.i32, m=m, k_size=200)
    x, w = drawn(DType.i8, m, 200), drawn(DType.i8, 200, 64, seed=1)
    x[0], w[:, 0] = -128, -128
    (y,) = interpreter.run(emit(plan_graph(graph)), {"X": x, "W": w})
    assert torch.equal(y, x.int() @ w.int())


def test_i8_sums_that_may_leave_i32_are_not_left_to_instructions_that_saturate():
    fits, leaves = (matmul(DType.i8, DType.i32, DType.i32, k_size=k) for k in (DEEPEST_I8, DEEPEST_I8 + 1))
    assert "tl.dot" in emit(plan_graph(fits))
    assert "tl.dot" not in emit(plan_graph(leaves))


@pytest.mark.parametrize("dtype", [DType.u8, DType.i16])
def test_integers_without_instructions_are_multiplied_in_the_type_of_their_sum(interpreter, dtype):
    graph = matmul(dtype, DType.i32, DType.i32, m=3, k_size=200)
    source = emit(plan_graph(graph))
    assert "tl.dot" not in source
    x, w = drawn(dtype, 3, 200), drawn(dtype, 200, 64, seed=1)
    (y,) = interpreter.run(source, {"X": x, "W": w})
    assert torch.equal(y, x.int() @ w.int())


@pytest.mark.parametrize("kind", ["sum", "max", "min"])
@pytest.mark.parametrize("dtype", [DType.i32, DType.i64])
def test_integers_are_accumulated_as_integers(interpreter, kind, dtype):
    b, k = axis("b", 3), axis("k", 40)
    x = inp("X", b, k, dtype=dtype)
    s = Builder(block=True)
    first = (s.load("x", x.tensor),)
    s.acc("acc", Reduce(kind, ("k",)), "x", monoid=kind)
    block = BlockGraph((("b", 2),), None, (Pass((("k", 16),), first, s.take()),), (), (), (Store("acc", "Y"),))
    graph = kernel_graph("reduced", (x,), (block,), tensor("Y", (b,), dtype))
    values = drawn(dtype, 3, 40) * 40_000 + 2**24 + 1  # f32 does not tell these from their neighbours
    values[1] -= 2**25
    (y,) = interpreter.run(emit(plan_graph(graph)), {"X": values})
    wanted = values.sum(1) if kind == "sum" else getattr(values, f"a{kind}")(1)
    assert torch.equal(y.long(), wanted)


def test_an_integer_matmul_passes_all_tiers():
    @mg.program
    def matmul_i8(x: mg.i8[20, 64], w: mg.i8[64, 32]):
        return mg.cast(x, mg.i32) @ mg.cast(w, mg.i32)

    result = mg.optimize(matmul_i8, target="cuda:90")
    assert result.graph.kernels()
    assert {"tested", "proved", "bounds", "numerics"} <= set(result.certificate.tiers)


def test_a_large_integer_matmul_is_priced_at_the_rate_of_8_bits():
    """Else it would be left to torch, which has no instructions for it."""
    rows = mg.Dim("b", 1, 8192)

    @mg.program
    def matmul_i8(x: mg.i8[rows, 4096], w: mg.i8[4096, 4096]):
        return mg.cast(x, mg.i32) @ mg.cast(w, mg.i32)

    @mg.program
    def matmul_i16(x: mg.i16[rows, 4096], w: mg.i16[4096, 4096]):
        return mg.cast(x, mg.i32) @ mg.cast(w, mg.i32)

    space = mg.SearchSpace(symbolic=4096)
    found = [mg.optimize(p, target="cuda:90", tune="none", space=space) for p in (matmul_i8, matmul_i16)]
    bytes_, words = (r.report for r in found)
    assert found[0].has_kernels
    assert bytes_.predicted_seconds < words.predicted_seconds / 4  # i16 has no matrix instructions
    assert all(k.seconds >= k.floor_seconds for r in (bytes_, words) for k in r.kernels)


# -- floats of 8 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [DType.f8e4m3, DType.f8e5m2], ids=str)
def test_floats_of_8_bits_are_multiplied_as_they_are_where_the_architecture_has_them(compiler, dtype):
    source = emit(plan_graph(matmul(dtype, DType.f16, DType.f32), machine=Machine(arch=90)))
    assert "tl.dot(x, w, acc, max_num_imprecise_acc=64)" in source
    for arch in (90, 100):
        (found,) = compiler.resources(source, arch)
        assert found.matrix_ops > 0


@pytest.mark.parametrize("arch", [None, 80])
@pytest.mark.parametrize("dtype", [DType.f8e4m3, DType.f8e5m2], ids=str)
def test_floats_of_8_bits_agree_with_their_products_in_f64(interpreter, compiler, dtype, arch):
    source = emit(plan_graph(matmul(dtype, DType.f16, DType.f32, m=20), machine=Machine(arch=arch)))
    x, w = drawn(dtype, 20, 256), drawn(dtype, 256, 64, seed=1)
    (y,) = interpreter.run(source, {"X": x, "W": w})
    assert torch.allclose(y.double(), x.double() @ w.double(), rtol=2**-10, atol=2**-10)
    if arch:
        (found,) = compiler.resources(source, arch)
        assert found.matrix_ops > 0


def test_two_kinds_of_8_bit_floats_are_multiplied_as_f16(interpreter):
    source = emit(plan_graph(matmul(DType.f8e4m3, DType.f32, sums=DType.f8e5m2, m=20)))
    assert ".to(tl.float16)" in source
    x, w = drawn(DType.f8e4m3, 20, 256), drawn(DType.f8e5m2, 256, 64, seed=1)
    (y,) = interpreter.run(source, {"X": x, "W": w})
    assert torch.allclose(y.double(), x.double() @ w.double(), rtol=1e-5, atol=1e-4)


def test_every_code_of_e4m3_is_decoded_for_architectures_without_it(interpreter):
    b, k = Axis("b", 16), Axis("k", 16)
    x = inp("X", b, k, dtype=DType.f8e4m3)
    s = Builder(block=True)
    block = BlockGraph((), None, (), (s.load("x", x.tensor),), (), (Store("x", "Y"),))
    graph = kernel_graph("decoded", (x,), (block,), tensor("Y", (b, k), DType.f32))
    source = emit(plan_graph(graph, machine=Machine(arch=80)))
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16).view(torch.float8_e4m3fn)
    (y,) = interpreter.run(source, {"X": codes})
    assert torch.equal(y.nan_to_num(777.0), codes.float().nan_to_num(777.0))
    assert "from_e4m3" not in emit(plan_graph(graph, machine=Machine(arch=89)))


def test_a_result_of_e4m3_is_refused_for_architectures_without_it():
    with pytest.raises(UnsupportedOpError, match="Y is f8e4m3"):
        emit(plan_graph(copied(DType.f8e4m3), machine=Machine(arch=80)))


# -- tf32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [80, 90])
def test_f32_keeps_its_bits_unless_tf32_is_asked_for(compiler, arch):
    graph = matmul(DType.f32, DType.f32)
    exact, short = (emit(plan_graph(graph, machine=Machine(precision=p))) for p in ("ieee", "tf32"))
    assert compiler.resources(exact, arch)[0].matrix_ops == 0
    assert compiler.resources(short, arch)[0].matrix_ops > 0


def test_tf32_is_part_of_the_target_of_the_key_and_of_what_is_said():
    @mg.program
    def matmul_f32(x: mg.f32[20, 64], w: mg.f32[64, 32]):
        return x @ w

    exact, short = (mg.optimize(matmul_f32, target=t) for t in ("cuda:90", "cuda:90+tf32"))
    again = mg.optimize(matmul_f32, target="cuda:90+tf32")
    assert again.cached
    assert again.source == short.source
    assert 'input_precision="tf32"' in short.source
    assert 'input_precision="ieee"' in exact.source
    assert any("tf32" in n for n in short.notes)
    assert not any("tf32" in n for n in exact.notes)
    rows = [r.certificate.numerics[0].rows[0] for r in (exact, short)]
    assert rows[1].tolerance > 16 * rows[0].tolerance
    assert "tf32" in short.certificate.numerics[0].target


def test_rounding_to_tf32_is_within_its_tolerance_and_not_within_that_of_f32():
    from mugraph.pipeline import product_unit
    from mugraph.transpiler.target import parse_target
    from mugraph.verify.numeric import numeric_check

    @mg.program
    def matmul_f32(X: mg.f32[20, 256], W: mg.f32[256, 64]):
        return X @ W

    def short(inputs, bindings):
        x, w = (((t.view(torch.int32)) & ~0x1FFF).view(torch.float32) for t in inputs.values())
        return [x @ w]

    for target, passes in (("cuda:90+tf32", True), ("cuda:90", False)):
        unit = product_unit(matmul_f32, parse_target(target))
        report = numeric_check(matmul_f32, short, bindings=[{}], how="torch", draws=("normal",), product_unit=unit)
        assert report.passed == passes


def test_a_given_graph_may_ask_for_tf32():
    @mg.program
    def matmul_f32(x: mg.f32[20, 64], w: mg.f32[64, 32]):
        return x @ w

    found = mg.optimize(matmul_f32, target="cuda:90")
    assert 'input_precision="tf32"' in from_graph(matmul_f32, found.graph, target="cuda:90+tf32").source
