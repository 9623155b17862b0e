"""Programs as values: inputs, axes, names, literals, and the errors a user meets."""

from __future__ import annotations

import inspect
from fractions import Fraction
from types import SimpleNamespace

import pytest

from mugraph.dsl import functions, trace
from mugraph.dsl.unify import Axes
from mugraph.errors import CaptureError, MugraphError, ShapeError, UnsupportedOpError
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.graph import Program
from mugraph.ir.infer import op_text
from mugraph.ir.ops import Const, Contract, MaskedExp, Rename, Reshape, SizeOf
from tests import graphs
from tests.dsl.oracle import check_types

mg = SimpleNamespace(
    **{n: getattr(functions, n) for n in functions.__all__},
    **{n: getattr(trace, n) for n in ("f16", "f32", "i64", "bool_", "constant", "program", "trace")},
    Dim=Dim,
)
B = Dim("B", 1, 4096)
f16, f32 = trace.f16, trace.f32


def types(p: Program) -> list[str]:
    return [str(t) for t in p.tensors().values()]


def test_a_decorated_function_is_a_program():
    @mg.program
    def rmsnorm_linear(x: mg.f16[B, 4096], g: mg.f16[4096], w: mg.constant(mg.f16[4096, 6144])):
        n = mg.rms_norm(x, g)
        return n @ w

    p = rmsnorm_linear
    assert isinstance(p, Program)
    assert p.name == "rmsnorm_linear"
    assert [str(i.tensor) for i in p.inputs] == ["x: f16[b, k]", "g: f16[k]", "w: f16[k, n]"]
    assert [i.constant for i in p.inputs] == [False, False, True]
    assert [op_text(e.op) for e in p.equations] == [op_text(e.op) for e in graphs.rmsnorm_linear().equations]
    assert [e.target.name for e in p.equations][-2:] == ["n", "out"]
    assert "return n @ w" in str(p.equations[-1].where)


def test_annotations_see_the_scope_of_the_definition():
    inner, Local = 8, Dim("L", 2, 64)

    @mg.program
    def f(x: mg.f16[Local, inner], y: mg.f16["M", inner, "h=3"]):  # noqa: F722, F821, UP037
        return x.sum() + y.sum()

    assert types(f)[:2] == ["x: f16[l, k]", "y: f16[m, n, h]"]
    assert f.dims() == (Local, Dim("M"))


def test_the_function_form_takes_types_in_order_or_by_name():
    def f(a, *rest):
        return a + rest[0] * rest[1]

    p = trace.trace(f, [f16[4], f32[4], f32[4]], "named")
    assert (p.name, [i.name for i in p.inputs]) == ("named", ["a", "rest0", "rest1"])
    q = trace.trace(lambda y, x: x @ y, {"y": f16[4], "x": f16["B", 4]})
    assert types(q)[:2] == ["y: f16[k]", "x: f16[b, k]"]


def test_one_size_names_two_axes_where_they_are_not_unified():
    p = trace.trace(lambda x, y: x @ y.T, [f16[B, 4], f16[B, 4]])
    assert types(p) == ["x: f16[b, k]", "y: f16[b2, k]", "out: f16[b, b2]"]


def test_use_of_a_tensor_against_itself_is_an_alias():
    p = trace.trace(lambda x: x @ x.T, [f16[B, 4]])
    (rename, contract) = p.equations
    assert rename.op == Rename((("b", Axis("b2", B)),))
    assert contract.op == Contract(("k",))
    assert contract.args == ("x", rename.target.name)


def test_a_late_view_splits_axes_everywhere():
    def f(x, w, v):
        h = x @ w
        return h + v, h.view(-1, 4, 16).sum(1)

    p = trace.trace(f, [f16[B, 8], f16[8, 64], f16[64]])
    assert types(p)[:4] == ["x: f16[b, k]", "w: f16[k, (n d)]", "v: f16[(n d)]", "h: f16[b, n, d]"]
    assert not any(isinstance(e.op, Reshape) for e in p.equations)


def test_only_dimensions_without_a_common_refinement_leave_a_boundary():
    p = trace.trace(lambda x: x.reshape(6, 2) * 2, [f16[4, 3]])
    assert isinstance(p.equations[0].op, Reshape)
    q = trace.trace(lambda x: x.reshape(2, 6) * 2, [f16[4, 3]])
    assert types(q)[0] == "x: f16[(k n), d]"


def test_symbolic_dimensions_split_and_merge():
    S = Dim("S", 1, 64)
    p = trace.trace(lambda x: x.reshape(x.shape[0] * 4, 8).reshape(-1, 4, 2, 4).sum(-1), [f16[S, 4, 8]])
    assert types(p) == ["x: f16[s, k, (n d)]", "out: f16[s, k, n]"]
    with pytest.raises(ShapeError, match="reshape"):
        trace.trace(lambda x: x.reshape(x.shape[0] * 2, 8), [f16[S, 4, 8]])


def test_literals_are_exact_and_sizes_are_symbols():
    def f(x):
        return x / x.shape[-1] + 1e-6 + 4096 * 0.1

    p = trace.trace(f, [f16[B, 4096]])
    assert [e.op.value for e in p.equations if isinstance(e.op, Const)] == [Fraction(1, 10**6), Fraction("409.6")]
    assert [e.op.axis.name for e in p.equations if isinstance(e.op, SizeOf)] == ["k"]


def test_minus_infinity_becomes_a_masked_exponential():
    p = trace.trace(lambda x: mg.softmax(mg.where(x > 0, x, float("-inf"))), [f32[B, 8]])
    assert sum(isinstance(e.op, MaskedExp) for e in p.equations) == 1


def test_what_is_not_used_is_not_in_the_program():
    def f(x):
        _ = x.exp() * 3
        return x + x

    assert len(trace.trace(f, [f32[8]]).equations) == 1


def test_names_are_the_same_in_every_process_and_unique():
    def f(x, y):
        x = x * 2
        t0 = x + y
        return t0 * (x - y)

    p = trace.trace(f, [f32[8], f32[8]])
    names = [t.name for t in p.tensors().values()]
    assert len(set(names)) == len(names) == 6 + 1
    assert names[:2] == ["x", "y"]
    assert {"x2", "t0", "out"} < set(names)
    assert p == trace.trace(f, [f32[8], f32[8]])


def test_types_hold_for_the_classic_programs():
    def gated_mlp(x, w1, w2):
        return mg.silu(x @ w1) * (x @ w2)

    def lora(x, w, a, b):
        return x @ w + (x @ a) @ b

    def gqa(q, k, v):
        return mg.attention(q, k.unsqueeze(1), v.unsqueeze(1))

    p = trace.trace(gated_mlp, [f16[B, 4096], f16[4096, 14336], f16[4096, 14336]])
    assert types(p)[:3] == ["x: f16[b, k]", "w1: f16[k, n]", "w2: f16[k, n]"]
    q = trace.trace(lora, [f16[B, 4096], f16[4096, 4096], f16[4096, 16], f16[16, 4096]])
    assert types(q)[:4] == ["x: f16[b, k]", "w: f16[k, n]", "a: f16[k, d]", "b: f16[d, n]"]
    r = trace.trace(gqa, [f16[2, 8, B, 128], f16[2, 4096, 128], f16[2, 4096, 128]])
    assert len(r.axes()) == 6
    for program in (p, q, r):
        check_types(program)


# -- mistakes ----------------------------------------------------------------------------------------------------

SHAPES = {
    "an index of bool": lambda x, y: y[y > 0],
    "an index of f16": lambda x, y: mg.take(y, y),
    "scatter_add of": lambda x, y: mg.scatter_add(y, mg.iota(y.shape[1]), 9),
    r"matmul of shapes \[B, 8\] and \[9, 4\]": lambda x, y: x @ y.reshape(9, 4),
    r"add of shapes \[B, 8\] and \[4, 9\]": lambda x, y: x + y,
    r"mul of shapes \[B, 8\] and \[36\]": lambda x, y: x * y.flatten(),
    "reshape of": lambda x, y: y.reshape(5, -1),
    "reshape infers one size": lambda x, y: y.reshape(-1, -1),
    "expand of": lambda x, y: y.expand(5, 9),
    "no dimension 2": lambda x, y: x.sum(2),
    "does not permute": lambda x, y: x.permute(0, 0),
    "nothing is left": lambda x, y: y[:, 9:],
    "index 4 of a dimension of 4": lambda x, y: y[4],
    "a symbolic size is cut": lambda x, y: x[2:],
    "einsum 'ij,jk'": lambda x, y: mg.einsum("ij,jk", x),
    "names 'k', which no operand has": lambda x, y: mg.einsum("ij->k", x),
    "concat of shapes": lambda x, y: mg.concat([x, y], 1),
    "matmul of f16 and f32": lambda x, y: x @ mg.cast(y, f32).reshape(-1)[:8],
    "split into": lambda x, y: y.split([1, 2], 0),
    "the condition of where": lambda x, y: mg.where(x, x, x),
}


@pytest.mark.parametrize("match", SHAPES)
def test_shapes_that_do_not_fit_are_named_with_the_line(match):
    with pytest.raises(ShapeError, match=match) as caught:
        trace.trace(SHAPES[match], [f16[B, 8], f16[4, 9]])
    assert "test_trace.py" in caught.value.where


UNSUPPORTED = {
    "a diagonal": lambda x, y: mg.einsum("ii->i", y @ y.T),
    "indexing by a list": lambda x, y: y[[0, 1]],
    "an index of several tensors": lambda x, y: y[mg.iota(y.shape[0]), mg.iota(y.shape[0])],
    "a number as exponent": lambda x, y: x**x,
    "no rational number": lambda x, y: x + float("inf"),
    "an output holds minus infinity": lambda x, y: mg.where(x > 0, x, float("-inf")),
    "mean of bool": lambda x, y: (x > 0).mean(),
    "gelu has no approximation": lambda x, y: mg.gelu(x, "fast"),
    "concat along a symbolic size": lambda x, y: mg.concat([x, x]),
    "and of f16 tensors": lambda x, y: x & x,
}


@pytest.mark.parametrize("match", UNSUPPORTED)
def test_what_the_language_lacks_is_named(match):
    with pytest.raises(UnsupportedOpError, match=match):
        trace.trace(UNSUPPORTED[match], [f16[B, 8], f16[4, 9]])


def test_a_masked_value_cannot_be_used_as_a_number():
    with pytest.raises(UnsupportedOpError, match="masked to minus infinity") as caught:
        trace.trace(lambda x: -mg.where(x > 0, x, float("-inf")), [f16[8]])
    assert "may be shifted" in caught.value.remedy


def branch(x):
    return x if x.sum() > 0 else -x


CAPTURES = {
    "no truth value": branch,
    "no float value": lambda x: float(x.sum()) * x,
    "no outputs": lambda x: None,
    "returns int, not a tensor": lambda x: 3,
    "takes tensors and numbers, not str": lambda x: x + "1",
    "no int value while tracing": lambda x: x.reshape(int(x.shape[0]), 8),
    "is no element type": lambda x: x.to("f16"),
}


@pytest.mark.parametrize("match", CAPTURES)
def test_what_is_no_program_is_refused(match):
    with pytest.raises(CaptureError, match=match):
        trace.trace(CAPTURES[match], [f16[B, 8]])


def test_the_error_of_a_branch_shows_its_line():
    with pytest.raises(CaptureError) as caught:
        trace.trace(branch, [f16[8]])
    assert "return x if x.sum() > 0 else -x" in caught.value.where
    assert "mg.where" in caught.value.remedy


def test_a_tensor_of_another_trace_is_refused():
    kept = []
    trace.trace(lambda x: kept.append(x) or x + 1, [f16[8]])
    with pytest.raises(CaptureError, match="two traces"):
        trace.trace(lambda x: x + kept[0], [f16[8]])
    with pytest.raises(CaptureError, match="another trace"):
        trace.trace(lambda x: kept[0], [f16[8]])


def test_arguments_need_types():
    def bare(x):
        return x

    def wrong(x: int):
        return x

    def unknown(x: mg.f16[nowhere]):  # noqa: F821
        return x

    for fn, match in ((bare, "x has no type"), (wrong, "no tensor type"), (unknown, "nowhere")):
        with pytest.raises(CaptureError, match=match) as caught:
            trace.program(fn)
        assert f":{inspect.getsourcelines(fn)[1]}" in caught.value.where


@pytest.mark.parametrize("size", [0, -1, 2.5, None, True, "k=0"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ShapeError):
        f16[4, size]


def test_two_sizes_of_one_name_must_be_one():
    with pytest.raises(ShapeError, match="different ranges"):
        trace.trace(lambda x, y: x.sum() + y.sum(), [f16[Dim("B", 1, 8)], f16[Dim("B", 1, 9)]])
    p = trace.trace(lambda x, y: x + y, [f16[B], f16["B"]])
    assert p.dims() == (B,)


def test_every_error_is_of_the_project():
    for fn in [*SHAPES.values(), *CAPTURES.values()]:
        with pytest.raises(MugraphError):
            trace.trace(fn, [f16[B, 8], f16[4, 9]][: len(inspect.signature(fn).parameters)])


# -- axes by unification -----------------------------------------------------------------------------------------


def test_a_split_reaches_every_variable_of_its_form():
    axes = Axes()
    a, b, c = axes.fresh(12), axes.fresh(12), axes.fresh(12)
    axes.unite(a, b)
    axes.link(a, c)
    parts = axes.cut([b], [3, 4])
    assert parts is not None
    assert axes.atoms([a]) == axes.atoms([b])
    assert [axes.size(v) for v in axes.atoms([c])] == [3, 4]
    assert set(axes.atoms([c])).isdisjoint(axes.atoms([a]))


def test_variables_of_one_tensor_are_never_united():
    axes = Axes()
    a, b, c = (axes.fresh(12) for _ in range(3))
    axes.together([a, b])
    assert not axes.may_unite(a, b)
    assert axes.may_unite(a, c)
    axes.unite(a, c)
    assert not axes.may_unite(axes.find(c), b)
    axes.split(axes.find(a), [3, 4])
    axes.split(b, [3, 4])
    assert not axes.may_unite(axes.atoms([a])[0], axes.atoms([b])[0])


def test_an_alignment_that_fails_splits_nothing():
    axes = Axes()
    a, b = axes.fresh(12), [axes.fresh(4), axes.fresh(3)]
    other = [axes.fresh(6), axes.fresh(2)]
    assert axes.align(b, other) is None
    assert all(v.parts is None for v in axes.all)
    assert axes.align([a], other) is not None
    assert [axes.size(v) for v in axes.atoms([a])] == [6, 2]


def test_wishes_for_names_do_not_multiply_with_depth() -> None:
    """Each use of y under another name repeats the wishes of the uses before."""

    def deep(y, w):
        for _ in range(100):
            y = functions.tanh(y @ w) @ functions.sigmoid(y.mT @ y)
        return y

    program = trace.trace(deep, [trace.f16[16, 48], trace.f16[48, 48]], "deep")
    assert {"m", "k", "n"} <= set(program.axes())
