"""The text of a graph shows everything, and canonical text nothing but the structure."""

from dataclasses import replace
from fractions import Fraction

import pytest

from mugraph.ir.axes import Axis, Dim, times
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Const, Elementwise, Kernel, Library, SizeOf, TopK
from mugraph.ir.parser import parse_program
from mugraph.ir.printer import block_text, canonical_text
from mugraph.ir.threads import form_threads
from mugraph.ir.types import DType, Input, Output, Storage, Tensor, tensor
from tests.graphs import attention_fused, gated_mlp, rmsnorm_linear, rmsnorm_linear_fused


def test_the_text_of_a_mugraph(golden):
    golden(str(rmsnorm_linear_fused()) + "\n", "txt")


def test_the_text_of_a_split_mugraph_with_thread_graphs(golden):
    graph = attention_fused(parts=4)
    (equation,) = graph.equations
    threaded = Kernel(tuple(form_threads(b) for b in equation.op.blocks))
    golden(str(replace(graph, equations=(replace(equation, op=threaded),))) + "\n", "txt")


def test_inputs_show_storage_constness_and_assumptions():
    n = Dim("N", 8, 64)
    k, one = Axis("k", times(n, 2)), Axis("h", 4)
    storage = Storage(DType.u8, 2, (times(n, 2), 1), 16, 32)
    x = Input(Tensor("X", ((k, one), ()), DType.u4), storage, True, ("no row wholly masked",))
    p = Program("p", (x,), (), (Output("X", Storage(DType.u4), "X"),))
    assert str(p).splitlines() == [
        "program p",
        "  dim N: 8..64",
        "  axes k = 2*N, h = 4",
        "  input X: u4[(k h), 1] constant storage(u8, packing 2, strides (2*N, 1), divisibility 16, alignment 32) "
        'assume "no row wholly masked"',
        "  output X alias X",
    ]


def test_operators_show_their_attributes():
    k, t = Axis("k", 8), Axis("t", 2)
    x = tensor("x", (k,), DType.f32)
    equations = (
        Equation((tensor("v", (t,), DType.f32), tensor("i", (t,), DType.i64)), TopK("k", t), ("x",)),
        Equation((tensor("c", (), DType.f32),), Const(Fraction(-1, 8)), ()),
        Equation((tensor("c16", (), DType.f16),), Const(Fraction(3), DType.f32), ()),
        Equation((tensor("n", (), DType.f32),), SizeOf(k), ()),
        Equation((x,), Elementwise("pow", (("exponent", Fraction(1, 2)),)), ("x",)),
        Equation((x,), Elementwise("gelu", (("approximate", "tanh"),)), ("x",)),
    )
    p = Program("p", (Input(x, Storage(DType.f32)),), equations, (Output("v", Storage(DType.f32)),))
    assert [line.strip() for line in str(p).splitlines()[3:-1]] == [
        "v: f32[t], i: i64[t] = topk[k -> t](x)",
        "c: f32[] = -1/8",
        "c16: f16[] = 3 as f32",
        "n: f32[] = |k|",
        "x: f32[k] = pow[exponent=1/2](x)",
        "x: f32[k] = gelu[approximate=tanh](x)",
    ]


def test_a_library_call_shows_its_meaning():
    meaning = gated_mlp()
    outer = rmsnorm_linear()
    call = Equation((outer.equations[-1].target,), Library("mm", meaning), ("X", "W"))
    text = str(KernelGraph("g", outer.inputs, (call,), outer.outputs))
    assert 'Y: f16[b, n] = library["mm"](X, W)' in text
    assert "\n".join("    " + line for line in str(meaning).splitlines()) in text


def test_block_text_stands_alone():
    (equation,) = rmsnorm_linear_fused().equations
    lines = block_text(equation.op.blocks[0]).splitlines()
    assert lines[:3] == ["block", "  axes b = B, k = 4096, n = 6144", "  grid b: 16, n: 64"]


def renamed_everywhere(text: str, names: dict[str, str]) -> Program:
    words = text.replace("(", " ( ").replace(")", " ) ").replace("[", " [ ").replace("]", " ] ").replace(",", " , ")
    words = words.replace(":", " : ").replace("|", " | ")
    lines = [" ".join(names.get(w, w) for w in line.split(" ")) for line in words.splitlines()]
    return parse_program("\n".join(lines))


NAMES = {"X": "activations", "W": "weight", "b": "rows", "k": "b", "n": "columns", "B": "Batch", "x2": "W", "Y": "x2"}


def test_programs_equal_up_to_names_have_one_canonical_text():
    p = rmsnorm_linear()
    other = renamed_everywhere(str(p), NAMES)
    assert other != p
    assert canonical_text(other) == canonical_text(p)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mul(xr, G)", "mul(G, xr)"),
        ("k = 4096", "k = 4095"),
        ("1..4096", "1..4097"),
        ("input G: f16[k]", "input G: f16[k] constant"),
        ("mul(X, r)", "add(X, r)"),
        ("contract[k]", "contract[n]"),
    ],
)
def test_programs_that_differ_otherwise_have_other_canonical_texts(old, new):
    text = str(rmsnorm_linear())
    assert old in text
    assert canonical_text(parse_program(text.replace(old, new))) != canonical_text(rmsnorm_linear())


def test_a_tile_value_and_an_argument_of_one_name_are_two_values():
    text = str(rmsnorm_linear_fused())
    shadowing = text.replace("load w:", "load W:").replace("contract[k](xg, w)", "contract[k](xg, W)")
    assert canonical_text(parse_program(shadowing)) == canonical_text(rmsnorm_linear_fused())
