"""The PyTorch target: emitted functions agree with the float64 oracle, op by op and graph by graph."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mugraph.errors import GraphError, UnsupportedOpError
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Pass, Program, Store, Thread, ThreadGraph
from mugraph.ir.infer import Type, infer, type_of
from mugraph.ir.ops import (
    FUNCTIONS,
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Pack,
    Quantize,
    Reduce,
    Rename,
    Reshape,
    Scatter,
    Select,
    SizeOf,
    Slice,
    TopK,
    Transpose,
    Unpack,
)  # fmt: skip
from mugraph.ir.types import DType, Input, Output, Storage, Tensor, tensor
from mugraph.transpiler.torch import TORCH_DTYPES, emit
from tests import graphs

B = Dim("B", 1, 4096)
b, k, n, h = Axis("b", B), Axis("k", 12), Axis("n", 5), Axis("h", 3)

# Relative to the largest magnitude of the result: a few roundings of each type, more for chains of 16-bit operators.
TOLERANCES = {DType.f64: 1e-12, DType.f32: 5e-6, DType.f16: 4e-3, DType.bf16: 3e-2}


def run_of(source: str) -> Callable[..., Any]:
    space: dict[str, Any] = {}
    exec(compile(source, "emitted", "exec"), space)
    return space["run"]  # type: ignore[no-any-return]


def torch_dtype(dtype: DType) -> torch.dtype:
    found = getattr(torch, TORCH_DTYPES[dtype])
    assert isinstance(found, torch.dtype)
    return found


def draw(i: Input, sizes: Mapping[str, int], rng: np.random.Generator) -> torch.Tensor:
    """Random data for an input; integers in 0..2, which any index accepts."""
    shape = [math.prod(sizes[a.name] for a in d) for d in i.tensor.dims]
    dtype = i.tensor.dtype
    if dtype.is_float:
        return torch.from_numpy(rng.standard_normal(shape)).to(torch_dtype(dtype))
    high = 2 if dtype is DType.bool else 3 if dtype is not DType.u8 else 256
    return torch.from_numpy(rng.integers(0, high, shape)).to(torch_dtype(dtype))


def oracle(graph: Program, tensors: Sequence[torch.Tensor], **dims: int) -> list[np.ndarray[Any, Any]]:
    arrays = {
        i.name: (t.double() if t.dtype.is_floating_point else t).numpy()
        for i, t in zip(graph.inputs, tensors, strict=True)
    }
    return reference(graph, arrays, dims)


def inputs_of(graph: Program, seed: int = 0, **dims: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(seed)
    sizes = {a.name: dims.get(a.size.name, 0) if isinstance(a.size, Dim) else a.size for a in graph.axes().values()}
    return [draw(i, sizes, rng) for i in graph.inputs]  # type: ignore[arg-type]


def errors(graph: Program, tensors: Sequence[torch.Tensor], results: Any, **dims: int) -> list[float]:
    """Largest error of each output, relative to the output's largest magnitude; shape and type must be as declared."""
    found = []
    listed = results if isinstance(results, tuple) else (results,)
    for o, actual, expected in zip(graph.outputs, listed, oracle(graph, tensors, **dims), strict=True):
        assert tuple(actual.shape) == expected.shape
        assert actual.dtype == torch_dtype(o.storage.dtype)
        assert actual.is_contiguous()
        scale = max(float(np.abs(expected).max()), 1e-30)
        difference = np.abs(actual.double().numpy() - expected.astype(np.float64))
        assert not np.isnan(difference).any()
        found.append(float(difference.max()) / scale)
    return found


def check(graph: Program, tensors: Sequence[torch.Tensor], tolerance: float, **dims: int) -> Any:
    results = run_of(emit(graph))(*tensors)
    assert max(errors(graph, tensors, results, **dims)) <= tolerance, emit(graph)
    return results


# -- whole graphs --------------------------------------------------------------------------------------------------

SMALL: dict[str, tuple[Callable[..., Program], dict[str, int]]] = {
    "rmsnorm_linear": (graphs.rmsnorm_linear, {"k_size": 199, "n_size": 33}),
    "rmsnorm_linear_fused": (graphs.rmsnorm_linear_fused, {"k_size": 199, "n_size": 33}),
    "gated_mlp": (graphs.gated_mlp, {"k_size": 77, "n_size": 31}),
    "gated_mlp_fused": (graphs.gated_mlp_fused, {"k_size": 77, "n_size": 31}),
    "lora": (graphs.lora, {"k_size": 77, "n_size": 31, "r_size": 3}),
    "lora_fused": (graphs.lora_fused, {"k_size": 77, "n_size": 31, "r_size": 3}),
    "attention": (graphs.attention, {"s_size": 67, "d_size": 16}),
    "attention_fused": (graphs.attention_fused, {"s_size": 67, "d_size": 16}),
    "attention_plain": (graphs.attention_fused, {"s_size": 67, "d_size": 16, "online": False}),
    "attention_split": (graphs.attention_fused, {"s_size": 67, "d_size": 16, "parts": 3}),
    "attention_plain_split": (graphs.attention_fused, {"s_size": 67, "d_size": 16, "online": False, "parts": 2}),
}


@pytest.mark.parametrize("dtype", [DType.f32, DType.f16, DType.bf16, DType.f64], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_emitted_graphs_agree_with_float64(name: str, dtype: DType) -> None:
    make, sizes = SMALL[name]
    graph = make(dtype=dtype, **sizes)
    for rows in (1, 7):
        tensors = inputs_of(graph, seed=rows, B=rows)
        check(graph, tensors, TOLERANCES[dtype], B=rows)


@pytest.mark.parametrize("dtype", [DType.f16, DType.bf16], ids=str)
@pytest.mark.parametrize("name", ["rmsnorm_linear", "gated_mlp", "lora", "attention"])
def test_mugraphs_in_16_bits_are_at_least_as_exact_as_eager_programs(name: str, dtype: DType) -> None:
    make, sizes = SMALL[name]
    program, fused = make(dtype=dtype, **sizes), SMALL[f"{name}_fused"][0](dtype=dtype, **sizes)
    tensors = inputs_of(program, B=9)
    (eager,) = errors(program, tensors, run_of(emit(program))(*tensors), B=9)
    (ours,) = errors(fused, tensors, run_of(emit(fused))(*tensors), B=9)
    assert ours <= eager


@pytest.mark.parametrize("name", ["rmsnorm_linear_fused", "attention_split", "lora"])
def test_inputs_may_have_any_strides(name: str) -> None:
    make, sizes = SMALL[name]
    graph = make(dtype=DType.f32, **sizes)
    tensors = inputs_of(graph, B=7)
    transposed = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in tensors]
    spaced = [torch.stack((t, t), -1)[..., 0] for t in tensors]
    repeated = [t[:1].expand(t.shape) for t in tensors]
    assert not any(t.is_contiguous() for t in spaced)
    for strided in (transposed, spaced, repeated):
        check(graph, strided, TOLERANCES[DType.f32], B=7)


def test_a_wrong_graph_does_not_agree() -> None:
    program, fused = graphs.rmsnorm_linear(DType.f32, 64, 16), graphs.rmsnorm_linear_fused(DType.f32, 64, 16)
    tensors = inputs_of(program, B=5)
    wrong = emit(fused).replace("acc / root", "acc * root")
    assert wrong != emit(fused)
    assert max(errors(program, tensors, run_of(wrong)(*tensors), B=5)) > 1e-2


def test_a_f16_product_that_overflows_before_its_division_stays_finite() -> None:
    fused = graphs.rmsnorm_linear_fused(DType.f16, 64, 16)
    tensors = [300 * inputs_of(fused, B=3)[0], *inputs_of(fused, B=3)[1:]]
    tensors[2] = tensors[2] * 40
    check(fused, tensors, TOLERANCES[DType.f16], B=3)


def test_large_logits_stay_finite() -> None:
    fused = graphs.attention_fused(DType.f16, 67, 16)
    tensors = [200 * inputs_of(fused, B=3)[0], *inputs_of(fused, B=3)[1:]]
    check(fused, tensors, TOLERANCES[DType.f16], B=3)


def test_the_emitted_file_is_readable(golden: Callable[[str, str], None]) -> None:
    golden(emit(graphs.rmsnorm_linear_fused()), "py")


def test_the_emitted_reference_is_readable(golden: Callable[[str, str], None]) -> None:
    golden(emit(graphs.rmsnorm_linear(), "reference"), "py")


def test_the_emitted_attention_is_readable(golden: Callable[[str, str], None]) -> None:
    golden(emit(graphs.attention_fused(parts=2)), "py")


def test_the_emitted_file_imports_torch_alone() -> None:
    for make, sizes in SMALL.values():
        imports = [line for line in emit(make(**sizes)).splitlines() if line.startswith(("import", "from"))]
        assert imports == ["import torch"]


def test_emitted_functions_have_gradients() -> None:
    fused, program = graphs.gated_mlp_fused(DType.f32, 12, 5), graphs.gated_mlp(DType.f32, 12, 5)
    grads = []
    for graph in (fused, program):
        tensors = [t.requires_grad_() for t in inputs_of(graph, B=3)]
        run_of(emit(graph))(*tensors).sum().backward()
        grads.append([t.grad for t in tensors])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


# -- one operator at a time ------------------------------------------------------------------------------------------


def storage(dtype: DType) -> Storage:
    return Storage(dtype)


def typed(name: str, t: Type) -> Tensor:
    return tensor(name, t.axes, t.dtype)


def one_op(op: Op, *inputs: Input) -> Program:
    """A program of one operator over its inputs."""
    results = [typed(f"y{i}", t) for i, t in enumerate(infer(op, [type_of(i.tensor) for i in inputs]))]
    equation = Equation(tuple(results), op, tuple(i.name for i in inputs))
    own = tuple(dict.fromkeys(inputs))
    return Program("one", own, (equation,), tuple(Output(r.name, Storage(r.dtype)) for r in results))


def in_kernel(program: Program) -> KernelGraph:
    """The same equations inside a block graph, in f32."""
    loads = tuple(Load(Tensor(f"{i.name}_tile", i.tensor.dims, i.tensor.dtype), i.name) for i in program.inputs)
    tiles = {i.name: f"{i.name}_tile" for i in program.inputs}
    declared = program.tensors()
    steps = tuple(
        Equation(
            tuple(Tensor(f"{t.name}_tile", t.dims, DType.f32 if t.dtype.is_float else t.dtype) for t in e.targets),
            e.op,
            tuple(tiles.get(a, f"{a}_tile") for a in e.args),
        )
        for e in program.equations
    )
    stores = tuple(Store(f"{o.value}_tile", o.value) for o in program.outputs)
    block = BlockGraph((), None, (Pass((), loads, steps),), (), (), stores)
    targets = tuple(declared[o.value] for o in program.outputs)
    kernel = Equation(targets, Kernel((block,)), tuple(i.name for i in program.inputs))
    return KernelGraph(program.name, program.inputs, (kernel,), program.outputs)


def inp(name: str, *axes: Axis, dtype: DType = DType.f32) -> Input:
    return graphs.inp(name, *axes, dtype=dtype)


X, G, W, Z = inp("X", b, k), inp("G", k), inp("W", k, n), inp("Z", b, k)
MASK, INDEX = inp("M", b, k, dtype=DType.bool), inp("I", b, dtype=DType.i64)
k2, c = Axis("k2", 12), Axis("c", 4)

OPS: dict[str, tuple[Op, tuple[Input, ...]]] = {
    "compare": (Compare("lt"), (X, G)),
    "compare_ge": (Compare("ge"), (X, Z)),
    "compare_ne": (Compare("ne"), (inp("J", b, k, dtype=DType.i32), INDEX)),
    "select": (Select(), (MASK, X, G)),
    "masked_exp": (MaskedExp(), (X, MASK)),
    "masked_exp_row": (MaskedExp(), (X, inp("M", k, dtype=DType.bool))),
    "and": (Elementwise("and"), (MASK, inp("N", k, dtype=DType.bool))),
    "or": (Elementwise("or"), (inp("N", k, dtype=DType.bool), MASK)),
    "not": (Elementwise("not"), (MASK,)),
    "pow": (Elementwise("pow", (("exponent", Fraction(3)),)), (X,)),
    "gelu_tanh": (Elementwise("gelu", (("approximate", "tanh"),)), (X,)),
    "add_broadcasts_both": (Elementwise("add"), (inp("R", b), G)),
    "add_permuted": (Elementwise("add"), (X, inp("T", k, b))),
    "add_three_axes": (Elementwise("add"), (inp("A", h, b, k), inp("C", k, h))),
    "matmul": (Contract(("k",)), (X, W)),
    "matmul_transposed": (Contract(("k",)), (X, inp("W", n, k))),
    "matmul_swapped": (Contract(("k",)), (W, X)),
    "matvec": (Contract(("k",)), (X, G)),
    "vecmat": (Contract(("k",)), (G, W)),
    "dot": (Contract(("k",)), (G, inp("H", k))),
    "rowwise_dot": (Contract(("k",)), (X, Z)),
    "square_sum": (Contract(("k",)), (X, X)),
    "batched": (Contract(("k",)), (inp("A", h, b, k), inp("C", h, k, n))),
    "batched_last": (Contract(("k",)), (inp("A", b, k, h), inp("C", n, h, k))),
    "batched_matvec": (Contract(("k",)), (inp("A", h, b, k), inp("C", h, k))),
    "grouped": (Contract(("k",)), (inp("A", h, c, b, k), inp("C", h, k, n))),
    "two_axes": (Contract(("k", "h")), (inp("A", b, k, h), inp("C", h, k, n))),
    "outer": (Contract(()), (inp("R", b), G)),
    "own_axis_summed": (Contract(("k", "n")), (X, W)),
    "one_operand": (Contract(("k",)), (X,)),
    "three_operands": (Contract(("k",)), (X, G, W)),
    "three_operands_chain": (Contract(("k", "n")), (X, W, inp("V", n, h))),
    "integers": (Contract(("k",)), (inp("A", b, k, dtype=DType.i8), inp("C", k, n, dtype=DType.i8))),
    "integers_wide": (Contract(("k",)), (inp("A", b, k, dtype=DType.i64), inp("C", k, n, dtype=DType.i64))),
    "integers_dot": (Contract(("k",)), (inp("A", b, k, dtype=DType.i8), inp("C", b, k, dtype=DType.i8))),
    "sum": (Reduce("sum", ("k",)), (X,)),
    "sum_first": (Reduce("sum", ("b",)), (X,)),
    "sum_all": (Reduce("sum", ("b", "k")), (X,)),
    "mean": (Reduce("mean", ("b",)), (X,)),
    "max": (Reduce("max", ("k",)), (X,)),
    "min": (Reduce("min", ("b", "k")), (X,)),
    "sum_of_integers": (Reduce("sum", ("k",)), (inp("A", b, k, dtype=DType.i32),)),
    "cumsum": (CumSum("k"), (X,)),
    "cumsum_first": (CumSum("b"), (X,)),
    "topk": (TopK("k", c), (X,)),
    "topk_first": (TopK("k", c), (inp("A", k, b),)),
    "cast_to_half": (Cast(DType.f16), (X,)),
    "cast_to_int": (Cast(DType.i32), (X,)),
    "cast_to_bool": (Cast(DType.bool), (inp("A", b, dtype=DType.i32),)),
    "cast_from_int": (Cast(DType.f32), (INDEX,)),
    "quantize": (Quantize(DType.i4), (X, inp("S", b))),
    "quantize_unsigned": (Quantize(DType.u4), (X, inp("S", k))),
    "unpack_signed": (Unpack("k", Axis("k4", 24), DType.i4), (inp("A", b, k, dtype=DType.u8),)),
    "unpack_unsigned": (Unpack("k", Axis("k4", 48), DType.u2), (inp("A", k, b, dtype=DType.u8),)),
    "pack": (Pack("k", Axis("kp", 6), DType.u8), (inp("A", b, k, dtype=DType.u4),)),
    "pack_crumbs": (Pack("k", Axis("kp", 3), DType.u8), (inp("A", k, b, dtype=DType.i2),)),
    "regroup": (Reshape(((b, k),)), (X,)),
    "reshape": (Reshape(((b,), (Axis("p", 3),), (Axis("q", 4),))), (X,)),
    "transpose": (Transpose(), (X,)),
    "broadcast": (Broadcast((h, n)), (X,)),
    "rename": (Rename((("k", k2),)), (X,)),
    "slice": (Slice("k", Axis("s", 4), 2), (X,)),
    "slice_step": (Slice("k", Axis("s", 6), 1, 2), (inp("A", k, b),)),
    "slice_symbolic": (Slice("b", Axis("s", B), 0), (X,)),
    "concat": (Concat(("k", "n"), Axis("kn", 17)), (X, inp("Y", n, b))),
    "gather": (Gather("k"), (X, inp("I", n, dtype=DType.i64))),
    "gather_i32": (Gather("b"), (X, inp("I", n, h, dtype=DType.i32))),
    "gather_u8": (Gather("n"), (W, inp("I", c, dtype=DType.i8))),
    "gather_shared": (Gather("k"), (X, inp("I", b, n, dtype=DType.i64))),
    "gather_shared_only": (Gather("k"), (X, INDEX)),
    "scatter": (Scatter(("k",), n), (inp("A", k, b), inp("I", k, dtype=DType.i64))),
    "scatter_i32": (Scatter(("k",), n), (X, inp("I", k, dtype=DType.i32))),
    "scatter_shared": (Scatter(("k",), n), (X, inp("I", b, k, dtype=DType.i64))),
}  # fmt: skip
for _fn, _count in FUNCTIONS.items():
    if _fn not in ("pow", "and", "or", "not"):
        OPS[_fn] = (Elementwise(_fn), (X, Z)[:_count])

POSITIVE = ("sqrt", "rsqrt", "log", "log1p", "quantize", "quantize_unsigned")
UNLIKE_IN_KERNEL = ("cast_to_half",)  # a kernel rounds at its stores alone


def op_inputs(name: str, program: Program) -> list[torch.Tensor]:
    tensors = inputs_of(program, seed=len(name), B=7)
    return [t.abs() + 0.5 for t in tensors] if name in POSITIVE else tensors


@pytest.mark.parametrize("name", OPS)
def test_each_operator_agrees_with_the_oracle(name: str) -> None:
    op, operands = OPS[name]
    program = one_op(op, *operands)
    tensors = op_inputs(name, program)
    tolerance = 1e-3 if name in UNLIKE_IN_KERNEL else 2e-6
    check(program, tensors, tolerance, B=7)
    check(in_kernel(program), tensors, tolerance, B=7)


NARROW = ("matmul", "grouped", "dot", "matvec", "three_operands_chain", "sum_all", "cumsum", "scatter",
          "scatter_shared", "concat", "select", "masked_exp", "gelu", "div")  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype", [DType.f16, DType.bf16, DType.f8e4m3, DType.f8e5m2], ids=str)
def test_operators_take_narrow_floats(name: str, dtype: DType) -> None:
    op, operands = OPS[name]
    narrow = [inp(i.name, *i.tensor.axes, dtype=dtype if i.tensor.dtype.is_float else i.tensor.dtype) for i in operands]
    program = one_op(op, *narrow)
    tensors = op_inputs(name, program)
    tolerance = {16: 2e-2, 8: 0.2}[dtype.bits]
    check(program, tensors, tolerance, B=7)
    check(in_kernel(program), tensors, tolerance, B=7)


def test_every_operator_has_a_case() -> None:
    covered = {type(op) for op, _ in OPS.values()} | {Const, SizeOf, Iota, Library, Kernel}
    from mugraph.ir.ops import PureOp

    assert covered >= set(PureOp.__args__)
    assert {op.fn for op, _ in OPS.values() if isinstance(op, Elementwise)} == set(FUNCTIONS)


def build(inputs: Sequence[Input], equations: Sequence[tuple[str, Op, tuple[str, ...]]], *outputs: str) -> Program:
    """A program from (target, op, args), each dimension one axis."""
    s = graphs.Builder({i.name: i.tensor for i in inputs})
    for name, op, args in equations:
        s.add(name, op, *args)
    return graphs.program("built", inputs, s, *outputs)


def test_literals_sizes_and_counts() -> None:
    size = Axis("b", B)
    program = build(
        [X],
        [
            ("n", SizeOf(size), ()),
            ("third", Const(Fraction(1, 3)), ()),
            ("a", Elementwise("add"), ("n", "third")),
            ("r", Elementwise("rsqrt"), ("a",)),
            ("t", Elementwise("tanh"), ("r",)),
            ("x", Elementwise("mul"), ("X", "t")),
            ("i", Iota(size), ()),
            ("j", Iota(Axis("k", 12)), ()),
            ("m", Compare("le"), ("j", "i")),
            ("zero", Const(Fraction(0)), ()),
            ("y", Select(), ("m", "x", "zero")),
            ("w", Elementwise("max"), ("y", "third")),
            ("v", Elementwise("min"), ("n", "w")),
            ("one", Const(Fraction(1)), ()),
            ("ones", Select(), ("m", "one", "zero")),
        ],
        "v", "ones", "m", "third", "n",
    )  # fmt: skip
    tensors = inputs_of(program, B=7)
    check(program, tensors, 1e-6, B=7)
    check(in_kernel(program), tensors, 1e-6, B=7)


def test_integer_arithmetic_has_room() -> None:
    a, i = inp("A", b, k, dtype=DType.i8), inp("C", k, dtype=DType.u8)
    program = build(
        [a, i],
        [
            ("c", Cast(DType.i64), ("C",)),
            ("p", Elementwise("mul"), ("c", "c")),
            ("two", Const(Fraction(2), DType.i64), ()),
            ("q", Elementwise("sub"), ("A", "p")),
            ("r", Elementwise("mul"), ("q", "two")),
            ("s", Elementwise("max"), ("r", "A")),
        ],
        "r", "s",
    )  # fmt: skip
    check(program, inputs_of(program, B=3), 0.0, B=3)


def test_merged_and_unit_dimensions() -> None:
    """Inputs and outputs may merge axes into one dimension and have dimensions of size 1."""
    x = Input(Tensor("X", ((b, h), (), (k,)), DType.f32), Storage(DType.f32))
    out = Tensor("Y", ((k, h), (), (b,), ()), DType.f32)
    program = Program(
        "merged", (x,), (Equation((out,), Elementwise("exp"), ("X",)),), (Output("Y", Storage(DType.f32)),)
    )
    check(program, [torch.randn(21, 1, 12)], 2e-6, B=7)


def test_several_merged_dimensions() -> None:
    x = Input(Tensor("X", ((b, h), (n, k)), DType.f32), Storage(DType.f32))
    out = Tensor("Y", ((n, b), (), (k, h)), DType.f32)
    program = Program(
        "merged_twice", (x,), (Equation((out,), Elementwise("exp"), ("X",)),), (Output("Y", Storage(DType.f32)),)
    )
    check(program, [torch.randn(21, 60)], 2e-6, B=7)


def test_an_alias_meets_itself() -> None:
    """x @ x.T: one value under two row axes, at both levels."""
    other = Axis("b2", B)
    program = build([X], [("X2", Rename((("b", other),)), ("X",)), ("Y", Contract(("k",)), ("X", "X2"))], "Y")
    tensors = inputs_of(program, B=7)
    check(program, tensors, 2e-6, B=7)
    loads = (Load(Tensor("x", ((b,), (k,)), DType.f32), "X"), Load(Tensor("z", ((other,), (k,)), DType.f32), "X"))
    y = Tensor("y", ((b,), (other,)), DType.f32)
    block = BlockGraph(
        (), None, (Pass((), loads, (Equation((y,), Contract(("k",)), ("x", "z")),)),), (), (), (Store("y", "Y"),)
    )
    kernel = Equation((program.tensors()["Y"],), Kernel((block,)), ("X",))
    check(KernelGraph("alias", program.inputs, (kernel,), program.outputs), tensors, 2e-6, B=7)


def test_a_library_call_is_its_semantics_under_the_callers_axes() -> None:
    m, p, q = Axis("m", B), Axis("p", 12), Axis("q", 5)
    semantics = build([inp("A", m, p), inp("C", p, q)], [("D", Contract(("p",)), ("A", "C"))], "D")
    y = tensor("Y", (b, n), DType.f32)
    z = tensor("Z", (b, n), DType.f32)
    for dtype, tolerance in ((DType.f32, 2e-6), (DType.f16, 2e-3)):
        x, w = inp("X", b, k, dtype=dtype), inp("W", k, n, dtype=dtype)
        y, z = tensor("Y", (b, n), dtype), tensor("Z", (b, n), dtype)
        equations = (
            Equation((y,), Library("matmul", semantics), ("X", "W")),
            Equation((z,), Elementwise("silu"), ("Y",)),
        )
        graph = KernelGraph("library", (x, w), equations, (Output("Z", Storage(dtype)),))
        check(graph, inputs_of(graph, B=7), tolerance, B=7)


def test_thread_graphs_are_chains_of_equations() -> None:
    t1, t2 = tensor("t1", (b, k), DType.f32), tensor("t2", (b, k), DType.f32)
    chain = ThreadGraph(
        ("x",), (("k", "lane"),),
        (Equation((t1,), Elementwise("exp"), ("x",)), Equation((t2,), Elementwise("neg"), ("t1",))), ("t2",),
    )  # fmt: skip
    loads = (Load(Tensor("x", X.tensor.dims, DType.f32), "X"),)
    block = BlockGraph((("b", 2),), None, (Pass((), loads, (Thread(chain),)),), (), (), (Store("t2", "Y"),))
    y = tensor("Y", (b, k), DType.f32)
    graph = KernelGraph("chain", (X,), (Equation((y,), Kernel((block,)), ("X",)),), (Output("Y", storage(DType.f32)),))
    check(graph, inputs_of(graph, B=7), 2e-6, B=7)


def test_sizes_are_read_from_products_of_dims() -> None:
    c_dim = Dim("C")
    both = Axis("bc", B * c_dim)
    x, y = inp("X", both), inp("Y", Axis("c", c_dim))
    program = build([x, y], [("i", Iota(Axis("b", B)), ()), ("z", Elementwise("add"), ("i", "i"))], "z")
    result = run_of(emit(program))(torch.ones(21), torch.ones(3))
    torch.testing.assert_close(result, 2 * torch.arange(7))


def test_outputs_are_never_the_inputs_themselves() -> None:
    for op in (Transpose(), Slice("k", Axis("s", 4), 2), Broadcast((h,)), Reshape(((b,), (Axis("p", 3),), (c,)))):
        program = one_op(op, X)
        (x,) = inputs_of(program, B=7)
        before = x.clone()
        run_of(emit(program))(x).fill_(7.0)
        torch.testing.assert_close(x, before)


def test_an_output_may_overwrite_an_input() -> None:
    program = build([X], [("Y", Elementwise("neg"), ("X",))], "Y")
    program = Program(program.name, program.inputs, program.equations, (Output("Y", Storage(DType.f32), alias_of="X"),))
    (x,) = inputs_of(program, B=7)
    before = x.clone()
    result = run_of(emit(program))(x)
    assert result.data_ptr() == x.data_ptr()
    torch.testing.assert_close(x, -before)


def test_out_receives_one_or_several_results() -> None:
    one = build([X], [("Y", Elementwise("neg"), ("X",))], "Y")
    two = build([X], [("Y", Elementwise("neg"), ("X",)), ("Z", Reduce("sum", ("k",)), ("X",))], "Y", "Z")
    (x,) = inputs_of(one, B=7)
    out, sums = torch.full((12, 7), torch.nan).T, torch.full((7,), torch.nan)
    assert run_of(emit(one))(x, out=out) is out
    torch.testing.assert_close(out, -x)
    assert all(map(operator.is_, run_of(emit(two))(x, out=(out, sums)), (out, sums)))
    torch.testing.assert_close(sums, x.sum(1))


def test_awkward_names_become_python_names() -> None:
    x = inp("out", Axis("torch", B), k)
    y, w = tensor("lambda", x.tensor.axes, DType.f32), tensor("a.b", x.tensor.axes, DType.f32)
    program = Program(
        "class", (x, inp("B", k)),
        (Equation((y,), Elementwise("add"), ("out", "B")), Equation((w,), Elementwise("exp"), ("lambda",))),
        (Output("a.b", Storage(DType.f32)),),
    )  # fmt: skip
    source = emit(program)
    rows = torch.randn(7, 12), torch.randn(12)
    torch.testing.assert_close(run_of(source)(*rows), (rows[0] + rows[1]).exp())


def test_packed_inputs_are_refused() -> None:
    x = Input(tensor("X", (b, k), DType.u4), Storage(DType.u8, packing=2))
    with pytest.raises(UnsupportedOpError, match="packs 2 values"):
        emit(one_op(Cast(DType.f32), x))


def test_sizes_that_no_input_determines_are_refused() -> None:
    program = build([G], [("Y", Broadcast((b,)), ("G",))], "Y")
    with pytest.raises(GraphError, match="do not determine B"):
        emit(program)
