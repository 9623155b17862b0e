"""One evaluator: every operator in float64, and μGraphs executed as μGraphs."""

import math
from dataclasses import replace
from fractions import Fraction as F
from typing import get_args

import numpy as np
import pytest

from mugraph.errors import GraphError, ShapeError, UnsupportedOpError
from mugraph.ir import ops
from mugraph.ir.axes import Axis
from mugraph.ir.evaluate import (
    FieldAlgebra,
    FloatAlgebra,
    Named,
    TypeAlgebra,
    aligned,
    axis_sizes,
    evaluate,
    outputs,
    reference,
)
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.infer import infer, type_of
from mugraph.ir.ops import FUNCTIONS, Elementwise, Kernel, Library, PureOp
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType
from tests import graphs

SIZES = {"rmsnorm_linear": {"k_size": 7, "n_size": 5}, "gated_mlp": {"k_size": 7, "n_size": 5},
         "lora": {"k_size": 7, "n_size": 5, "r_size": 2}, "gqa": {"s_size": 7, "d_size": 3}}  # fmt: skip
TILES = {"b": 2, "k": 3, "n": 2, "s": 2, "g": 3}
CASES = {name: (make(**SIZES[name]), fused(**SIZES[name])) for name, (make, fused) in graphs.ALL.items()}
for online in (True, False):
    for parts in (0, 2, 9):
        fused = graphs.attention_fused(s_size=7, d_size=3, online=online, parts=parts)
        CASES[f"gqa online={online} parts={parts}"] = (CASES["gqa"][0], fused)


def field_outputs(graph: Program, key: int = 0):
    algebra = FieldAlgebra(axis_sizes(graph, {"B": 5}), TILES, key=key)
    inputs = {i.name: algebra.random(tuple(a.name for a in i.tensor.axes), i.name) for i in graph.inputs}
    (result,) = outputs(graph, inputs, algebra)
    return result.parts[0]


def float_outputs(graph: Program, scale: float = 1.0):
    sizes = axis_sizes(graph, {"B": 5})
    algebra = FloatAlgebra(sizes, TILES)
    random = np.random.default_rng(0)
    inputs = {
        i.name: Named(axes, (scale * random.normal(size=[sizes[a] for a in axes]),))
        for i in graph.inputs
        for axes in [tuple(a.name for a in i.tensor.axes)]
    }
    (result,) = outputs(graph, inputs, algebra)
    return result.parts[0]


@pytest.mark.parametrize("name", CASES)
def test_a_mugraph_equals_its_program_in_the_fields(name):
    program, fused = CASES[name]
    for key in range(2):
        assert np.array_equal(field_outputs(program, key), field_outputs(fused, key))


@pytest.mark.parametrize("name", CASES)
def test_a_mugraph_equals_its_program_in_float64(name):
    program, fused = CASES[name]
    np.testing.assert_allclose(float_outputs(fused), float_outputs(program), rtol=1e-10, atol=1e-12)


def test_the_online_softmax_is_finite_where_the_plain_one_is_not():
    program, fused = CASES["gqa online=True parts=2"]
    with np.errstate(all="ignore"):
        assert np.isfinite(float_outputs(fused, scale=100.0)).all()
        assert not np.isfinite(float_outputs(program, scale=100.0)).all()


MUTANTS = [
    ("rmsnorm_linear", "mul(x, g)", "add(x, g)"),
    ("rmsnorm_linear", "contract[k](x, x)", "contract[k](xg, x)"),
    ("rmsnorm_linear", "1/1000000", "1/100000"),
    ("rmsnorm_linear", "|k|", "|n|"),
    ("gated_mlp", "mul(s, u_acc)", "mul(s, h_acc)"),
    ("lora", "contract[r](xa_acc, bm)", "contract[r](xa_acc, bm, bm)"),
    ("gqa online=True parts=0", "sum[s](p) rescaled by m", "sum[s](p)"),
    ("gqa online=True parts=2", "contract[s_part](l_in, f)", "sum[s_part](l_in)"),
]


@pytest.mark.parametrize(("name", "old", "new"), MUTANTS)
def test_a_wrong_mugraph_differs_in_the_fields(name, old, new):
    program, fused = CASES[name]
    text = str(fused)
    assert old in text
    assert not np.array_equal(field_outputs(parse_program(text.replace(old, new))), field_outputs(program))


# -- what the execution of a block graph refuses ---------------------------------------------------------------------


def first_block(graph: KernelGraph, **changes):
    (equation,) = graph.equations
    (block,) = equation.op.blocks
    return replace(graph, equations=(replace(equation, op=Kernel((replace(block, **changes),))),))


def test_two_blocks_that_write_one_element_are_refused():
    text = str(CASES["rmsnorm_linear"][1]).replace("store y -> Y omap{b: 0, n: 1}", "store root -> Y")
    with pytest.raises(GraphError, match="two blocks write the same elements of Y"):
        field_outputs(parse_program(text))


def test_a_kernel_inside_a_block_graph_is_refused():
    graph = CASES["rmsnorm_linear"][1]
    block = graph.equations[0].op.blocks[0]
    nested = replace(block.epilogue[-1], op=Kernel(()))
    with pytest.raises(GraphError, match="kernel inside a block graph"):
        field_outputs(first_block(graph, epilogue=(*block.epilogue[:-1], nested)))


def test_an_array_of_another_shape_is_refused():
    p = CASES["lora"][0]
    arrays = {i.name: np.zeros((5, 5)) for i in p.inputs}
    with pytest.raises(ShapeError):
        reference(p, arrays, {"B": 5})


def test_a_missing_size_is_refused():
    with pytest.raises(ShapeError, match="the size B has no value"):
        axis_sizes(CASES["lora"][0], {})


# -- operators in float64 --------------------------------------------------------------------------------------------

K, T, N2, KK, J = Axis("k", 4), Axis("t", 2), Axis("n", 2), Axis("kk", 8), Axis("j", 3)
X = np.array([[0.5, -1.5, 2.0, 0.25], [1.0, 3.0, -2.0, 0.75]])
POSITIVE = np.abs(X) + 0.5
I64 = np.array([[2, 0, 1, 1], [3, 3, 0, 2]])
MASK = np.array([[True, False, True, False], [False, True, True, True]])
BYTES = np.array([[0x21, 0xF3, 0x00, 0x7F], [0x10, 0x99, 0x0E, 0xC4]])


def value(array, axes=("n", "k")):
    return Named(axes[: np.ndim(array)], (np.asarray(array),))


def apply(op, *args):
    sizes = {a.name: a.size for a in (K, T, N2, KK, J)} | {"m": 4, "k2": 4}
    return FloatAlgebra(sizes).apply(op, args)


def low_high(codes):
    signed = [[c & 15, c >> 4] for c in codes.ravel()]
    return (np.array([[v - 16 if v > 7 else v for v in pair] for pair in signed])).reshape(2, 8)


FUNCTION_VALUES = {
    "add": X + POSITIVE, "sub": X - POSITIVE, "mul": X * POSITIVE, "div": X / POSITIVE,
    "max": np.maximum(X, POSITIVE), "min": np.minimum(X, POSITIVE),
    "neg": -X, "reciprocal": 1 / POSITIVE, "square": X * X, "sqrt": POSITIVE**0.5, "rsqrt": POSITIVE**-0.5,
    "abs": abs(X), "pow": POSITIVE**1.5, "exp": np.exp(X), "log": np.log(POSITIVE),
    "sigmoid": 1 / (1 + np.exp(-X)), "silu": X / (1 + np.exp(-X)), "relu": np.where(X > 0, X, 0), "tanh": np.tanh(X),
    "gelu": X * 0.5 * (1 + np.vectorize(math.erf)(X / 2**0.5)), "round": np.array([[0, -2, 2, 0], [1, 3, -2, 1]]),
    "sin": np.sin(X), "cos": np.cos(X), "erf": np.vectorize(math.erf)(X), "floor": X // 1,
    "expm1": np.exp(X) - 1, "log1p": np.log(1 + POSITIVE),
    "and": MASK & (BYTES > 64), "or": MASK | (BYTES > 64), "not": ~MASK,
}  # fmt: skip
NEEDS_POSITIVE = {"reciprocal", "sqrt", "rsqrt", "pow", "log", "log1p"}


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_functions(fn):
    attrs = (("exponent", F(3, 2)),) if fn == "pow" else ()
    if fn in ("and", "or", "not"):
        args = [value(MASK), value(BYTES > 64)][: FUNCTIONS[fn]]
    else:
        args = [value(POSITIVE if fn in NEEDS_POSITIVE else X), value(POSITIVE)][: FUNCTIONS[fn]]
    (result,) = apply(Elementwise(fn, attrs), *args)
    np.testing.assert_allclose(result.parts[0], FUNCTION_VALUES[fn], rtol=1e-12)


def test_gelu_by_tanh():
    (result,) = apply(Elementwise("gelu", (("approximate", "tanh"),)), value(X))
    expected = 0.5 * X * (1 + np.tanh((2 / np.pi) ** 0.5 * (X + 0.044715 * X**3)))
    np.testing.assert_allclose(result.parts[0], expected, rtol=1e-12)


OPERATORS = {
    "Elementwise": (ops.Elementwise("neg"), [value(X)], [-X]),
    "Compare": (ops.Compare("lt"), [value(X), value(POSITIVE)], [X < POSITIVE]),
    "Select": (ops.Select(), [value(MASK), value(X), value(POSITIVE)], [np.where(MASK, X, POSITIVE)]),
    "MaskedExp": (ops.MaskedExp(), [value(X), value(MASK)], [np.where(MASK, np.exp(X), 0)]),
    "Const": (ops.Const(F(1, 8)), [], [0.125]),
    "SizeOf": (ops.SizeOf(K), [], [4.0]),
    "Iota": (ops.Iota(K), [], [[0, 1, 2, 3]]),
    "Contract": (ops.Contract(("k",)), [value(X), value(X)], [(X * X).sum(1)]),
    "Reduce": (ops.Reduce("mean", ("k",)), [value(X)], [X.mean(1)]),
    "CumSum": (ops.CumSum("k"), [value(X)], [X.cumsum(1)]),
    "TopK": (ops.TopK("k", T), [value(X)], [[[2.0, 0.5], [3.0, 1.0]], [[2, 0], [1, 0]]]),
    "Cast": (ops.Cast(DType.i32), [value(X)], [[[0, -1, 2, 0], [1, 3, -2, 0]]]),
    "Quantize": (ops.Quantize(DType.i8), [value(X * 100), value(0.5)], [np.clip(np.round(X * 200), -128, 127)]),
    "Unpack": (ops.Unpack("k", KK, DType.i4), [value(BYTES)], [low_high(BYTES)]),
    "Pack": (ops.Pack("kk", K, DType.u8), [value(low_high(BYTES), ("n", "kk"))], [BYTES]),
    "Reshape": (ops.Reshape(((KK,),)), [value(X)], [X.reshape(8)]),
    "Transpose": (ops.Transpose(), [value(X)], [X]),
    "Broadcast": (ops.Broadcast((J,)), [value(X)], [np.broadcast_to(X, (3, 2, 4))]),
    "Slice": (ops.Slice("k", T, 1, 2), [value(X)], [X[:, 1::2]]),
    "Concat": (ops.Concat(("k", "k2"), KK), [value(X), value(POSITIVE, ("n", "k2"))], [np.hstack([X, POSITIVE])]),
    "Rename": (ops.Rename((("k", Axis("m", 4)),)), [value(X)], [X]),
    "Gather": (ops.Gather("k"), [value(X), value(I64)], None),
    "Scatter": (ops.Scatter(("k",), Axis("m", 4)), [value(X), value(I64)], None),
}


def test_every_operator_is_tested():
    assert set(OPERATORS) == {op.__name__ for op in get_args(PureOp)}


@pytest.mark.parametrize("name", [n for n, (_, _, expected) in OPERATORS.items() if expected is not None])
def test_operators(name):
    op, args, expected = OPERATORS[name]
    results = apply(op, *args)
    assert len(results) == len(expected)
    for result, want in zip(results, expected, strict=True):
        got = result.parts[0]
        np.testing.assert_allclose(got, np.reshape(want, got.shape), rtol=1e-12)


@pytest.mark.parametrize("relation", ["eq", "ne", "lt", "le", "gt", "ge"])
def test_comparisons(relation):
    (result,) = apply(ops.Compare(relation), value(X), value(np.abs(X)))
    assert np.array_equal(result.parts[0], getattr(np.ndarray, f"__{relation}__")(X, np.abs(X)))


@pytest.mark.parametrize("kind", ["sum", "mean", "max", "min"])
def test_reductions(kind):
    (result,) = apply(ops.Reduce(kind, ("n", "k")), value(X))
    assert result.parts[0] == pytest.approx(getattr(X, kind)())


def test_gather_takes_the_rows_that_the_index_names():
    (result,) = apply(ops.Gather("k"), value(X), Named(("t",), (np.array([3, 1]),)))
    assert np.array_equal(aligned(result, ("n", "t")).parts[0], X[:, [3, 1]])


def test_gather_shares_the_axes_that_operand_and_index_have_in_common():
    (result,) = apply(ops.Gather("k"), value(X), Named(("n", "t"), (I64[:, :2],)))
    assert np.array_equal(aligned(result, ("n", "t")).parts[0], np.take_along_axis(X, I64[:, :2], axis=1))


@pytest.mark.parametrize("kind", ["sum", "write"])
def test_scatter_puts_rows_where_the_index_names(kind):
    rows = np.array([1, 3, 1, 0])
    (result,) = apply(ops.Scatter(("k",), Axis("m", 4), kind), value(X), Named(("k",), (rows,)))
    want = np.zeros((4, 2))
    for i, row in enumerate(rows):
        want[row] = X[:, i] + (want[row] if kind == "sum" else 0)
    assert np.array_equal(aligned(result, ("m", "n")).parts[0], want)


def test_a_library_call_means_its_program():
    p, _ = CASES["gated_mlp"]
    call = Equation((p.tensors()["Y"],), Library("mlp", p), tuple(i.name for i in p.inputs))
    outer = KernelGraph("outer", p.inputs, (call,), p.outputs)
    np.testing.assert_array_equal(float_outputs(outer), float_outputs(p))
    assert np.array_equal(field_outputs(outer), field_outputs(p))


def test_a_library_call_takes_axes_of_the_sizes_of_its_parameters():
    p, _ = CASES["gated_mlp"]
    library = Library("mlp", p)
    types = [type_of(i.tensor) for i in p.inputs]
    assert infer(library, types)
    for i, t in enumerate(types):
        longer = replace(t, axes=tuple(Axis(a.name, 7) for a in t.axes))
        with pytest.raises(ShapeError):
            infer(library, [*types[:i], longer, *types[i + 1 :]])
    consistent = [replace(t, axes=tuple(Axis(a.name, 7) for a in t.axes)) for t in types]
    with pytest.raises(ShapeError, match="its axis"):
        infer(library, consistent)


def test_the_fields_know_nothing_of_the_truth_of_a_number():
    algebra = FieldAlgebra({"k": 4})
    x = algebra.random(("k",), 0)
    (truth,) = algebra.apply(ops.Cast(DType.bool), [x])
    (number,) = algebra.apply(ops.Cast(DType.f32), [truth])
    assert (number.parts[0] != x.parts[0]).all()
    assert np.array_equal(number.parts[0], truth.parts[0])


def test_the_algebra_of_types_computes_the_declared_types():
    for program, _ in CASES.values():
        found = evaluate(program, {i.name: type_of(i.tensor) for i in program.inputs}, TypeAlgebra())
        assert {n: set(t.axes) for n, t in found.items()} == {n: set(t.axes) for n, t in program.tensors().items()}
        assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in program.tensors().items()}


def test_an_operator_without_a_meaning_in_the_fields_is_refused():
    algebra = FieldAlgebra({"k": 4, "t": 2})
    with pytest.raises(UnsupportedOpError, match="topk has no meaning in the fields"):
        algebra.apply(ops.TopK("k", T), [algebra.random(("k",), 0)])


def test_a_reshape_reads_its_operand_in_the_declared_order():
    text = """program p
  axes b = 2, k = 3, n = 4, f = 8
  input X: f64[b, k]
  input W: f64[k, n]
  y: f64[n, b] = contract[k](X, W)
  z: f64[f] = reshape[f](y)
  output z"""
    x, w = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(3, 4)
    (z,) = reference(parse_program(text), {"X": x, "W": w}, {})
    assert np.array_equal(z, (x @ w).T.reshape(-1))
