"""Well-formed graphs pass, and each rule refuses a graph that breaks it, on its line."""

import re
from dataclasses import replace

import pytest

from mugraph.errors import GraphError, Location, MugraphError, ShapeError
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.check import check
from mugraph.ir.graph import Program
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType, Input, Output, Storage, tensor
from tests.graphs import ALL, attention_fused, rmsnorm_linear, rmsnorm_linear_fused

GRAPHS = [make() for pair in ALL.values() for make in pair]
GRAPHS += [attention_fused(parts=4), attention_fused(online=False), attention_fused(online=False, parts=2)]


def without_maps(text: str) -> str:
    return re.sub(r" [iof]map\{.*?\}", "", text)


# Two passes: the statistic of each row, then every tile scaled by it and stored where it lies.
TWO_PASSES = """mugraph scale
  axes b = 64, k = 96
  input X: f16[b, k]
  Y: f16[b, k] = kernel(X)
    block
      grid b: 16
      loop k: 32
        load x1: f16[b, k] = X
        total: f32[b] += sum[k](x1)
      loop k: 32
        load x2: f16[b, k] = X
        y: f32[b, k] = div(x2, total)
      store y -> Y
  output Y"""

LIBRARY = """mugraph outer
  axes b = 8, k = 4, n = 2
  input X: f16[b, k]
  input W: f16[k, n]
  Y: f16[b, n] = library["mm"](X, W)
    program mm
      axes i = 8, j = 4, l = 2
      input A: f16[i, j]
      input B: f16[j, l]
      C: f16[i, l] = contract[j](A, B)
      output C
  output Y"""

PROLOGUE = """mugraph prologue
  axes b = 64, d = 32, s = 96
  input Q: f16[b, d]
  input K: f16[s, d]
  L: f32[b] = kernel(Q, K)
    block
      grid b: 16
      once
        load q: f16[b, d] = Q
        c: f32[] = 1/8
        qc: f32[b, d] = mul(q, c)
      loop s: 32
        load k: f16[s, d] = K
        z: f32[b, s] = contract[d](qc, k)
        thread(z) -> (p) over b: warp, s: lane
          h: f32[b, s] = tanh(z)
          p: f32[b, s] = exp(h)
        l: f32[b] += sum[s](p)
      store l -> L
  output L"""

CAUSAL = """mugraph causal
  axes b = 64, s = 64
  input X: f16[b, s]
  Y: f32[b] = kernel(X)
    block
      grid b: 16
      once
        row: i64[b] = iota[b]()
      loop s: 32
        load x: f16[b, s] = X
        column: i64[s] = iota[s]()
        seen: bool[b, s] = ge(row, column)
        e: f32[b, s] = maskedexp(x, seen)
        y: f32[b] += sum[s](e)
      store y -> Y
  output Y"""

ALIAS = """program alias
  axes b = 8, k = 4, b2 = 8
  input X: f16[b, k]
  x2: f16[b2, k] = rename[b -> b2](X)
  Y: f16[b, b2] = contract[k](X, x2)
  flat: f16[(b b2)] = reshape[(b b2)](Y)
  output flat"""

TEXTS = {
    "program": str(rmsnorm_linear()),
    "kernel": without_maps(str(rmsnorm_linear_fused())),
    "split": without_maps(str(attention_fused(parts=4))),
    "two passes": TWO_PASSES,
    "library": LIBRARY,
    "prologue": PROLOGUE,
    "alias": ALIAS,
    "causal": CAUSAL,
}


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{type(g).__name__}-{g.name}")
def test_the_shared_graphs_are_well_formed(graph):
    check(graph)


@pytest.mark.parametrize("name", TEXTS)
def test_the_graphs_that_are_broken_below_are_well_formed_before(name):
    check(parse_program(TEXTS[name]))


def refuse(name: str, old: str, new: str, message: str, error: type[MugraphError] = GraphError) -> None:
    """The graph, once `old` becomes `new`, is refused for that reason."""
    assert old in TEXTS[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        check(parse_program(TEXTS[name].replace(old, new, 1)))
    assert type(caught.value) is error
    assert "^^^" in caught.value.message


TYPES = [
    ("program", "x2: f16[b, k]", "x2: f16[b]", "x2 has the axes [b]; square gives [b, k]"),
    ("program", "x2: f16[b, k]", "x2: f32[b, k]", "x2 is f32; square gives f16"),
    ("program", "mean[k](x2)", "mean[n](x2)", "no axis n among [b, k]"),
    ("program", "square(X)", "square(X, X)", "square takes 1 operands, not 2"),
    ("program", "x2: f16[b, k] =", "x2: f16[b, k], x3: f16[b, k] =", "square has 1 results, not 2"),
    ("program", "k = 4096", "k = 0", "axis k has the size 0"),
    ("program", "k = 4096", "k = -1*B", "axis k has the size -1*B"),
    ("kernel", "xg: f32[b, k]", "xg: f16[b, k]", "xg is f16; mul gives f32"),
    ("kernel", "acc: f32[b, n]", "acc: f32[b]", "acc has the axes [b]"),
    ("kernel", "load x: f16[b, k]", "load x: f16[k, b]", "other dimensions"),
    ("kernel", "load x: f16[b, k]", "load x: f16[(b k)]", "other dimensions"),
    ("kernel", "load x: f16[b, k]", "load x: f32[b, k]", "not of its source's type f16"),
    ("kernel", "Y: f16[b, n] =", "Y: f16[b] =", "Y has the axes [b]; stored is y"),
    ("kernel", "Y: f16[b, n] =", "Y: i32[b, n] =", "Y is i32; stored is y"),
    ("library", "C: f16[i, l]", "C: f32[i, l]", "C is f32; contract gives f16"),
    ("library", "Y: f16[b, n]", "Y: f32[b, n]", "Y is f32; library gives f16"),
    ("alias", "flat: f16[(b b2)]", "flat: f16[b2, b]", "its axes in another order than its reshape"),
    ("alias", "b2 = 8", "b2 = 9", "alias of b by b2 of another size"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), TYPES, ids=[t[3][:40] for t in TYPES])
def test_wrong_types_are_refused(name, old, new, message):
    refuse(name, old, new, message, ShapeError)


PROGRAMS = [
    ("program", "\n  output Y", "", "rmsnorm_linear has no output"),
    ("program", "square(X)", "square(r)", "r is used before it is defined"),
    ("program", "xr: f16", "X: f16", "X is defined twice"),
    ("program", "output Y", "output Q storage(f16)", "the output Q is not defined"),
    ("program", "output Y", "output Y alias Q", "Q, which Y overwrites, is no input"),
    ("program", "input X: f16[b, k]", "input X: f16[b, k] storage(f16, strides (1))", "2 dimensions and 1 strides"),
    ("kernel", "mugraph", "program", "a program holds no kernel"),
    ("library", "mugraph", "program", "a program holds no library"),
    (
        "library",
        "program mm",
        "mugraph mm\n      C2: f16[] = kernel()\n        block",
        "defines C2; its blocks store nothing",
    ),
    ("library", "      output C\n", "", "mm has no output"),
    ("kernel", "store y -> Y", "store y -> Z", "the kernel defines Y; its blocks store Z"),
    ("kernel", "      store y -> Y\n", "", "its blocks store nothing"),
    ("kernel", "\n  output Y", "\n    block\n      store y -> Y\n  output Y", "y is not there to be stored"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), PROGRAMS, ids=[t[3][:40] for t in PROGRAMS])
def test_broken_programs_are_refused(name, old, new, message):
    refuse(name, old, new, message)


ROLES = [
    ("kernel", "n: 64", "n: 64, k: 1", "axis k is on the grid and looped at once"),
    ("kernel", "n: 64", "n: 64, b: 1", "axis b is named twice"),
    ("kernel", "n: 64", "n: 0", "the tile of n is 0"),
    ("kernel", "loop k: 128", "loop k: 128, k: 2", "axis k is named twice"),
    ("kernel", "loop k: 128", "loop k: 128, q: 2, r: 3", "more than two loops"),
    ("kernel", "loop k: 128", "split b into 4\n      loop k: 128", "the split axis b is not looped"),
    ("kernel", "loop k: 128", "split k into 0\n      loop k: 128", "a split into 0 parts"),
    ("split", "      split s into 4\n", "      axes s_part = 4\n", "a combine without a split"),
    ("split", "      combine\n", "      combine\n        split s into 4\n", "a split inside a combine"),
    ("two passes", "loop k: 32\n        load x2", "once\n        load x2", "x2 holds the whole axis k"),
    (
        "prologue",
        "load q: f16[b, d] = Q",
        "load q: f16[b, d] = Q\n        load k0: f16[s, d] = K",
        "k0 holds the whole",
    ),
    ("split", "store partial m -> m_parts", "store partial m -> Q", "the partial result Q has the name of an argument"),
]

VALUES = [
    ("kernel", "mul(x, g)", "mul(x, y)", "y is used before it is defined"),
    ("kernel", "ms: f32[b] = div(ss, k_size)", "ms: f32[b] = div(x, k_size)", "x dies with each iteration"),
    ("kernel", "xg: f32", "x: f32", "x is defined twice"),
    ("kernel", "load x: f16[b, k] = X", "load x: f16[b, k] = Z", "Z is no argument"),
    (
        "kernel",
        "acc: f32[b, n] += contract[k](xg, w)",
        "acc: f32[b, n] = contract[k](xg, w)",
        "closes the looped axis k",
    ),
    ("kernel", "root: f32[b] = sqrt(mse)", "root: f32[] = sum[b](mse)", "closes the grid axis b"),
    ("kernel", "root: f32[b] = sqrt(mse)", "root: f32[b] = cumsum[b](mse)", "closes the grid axis b"),
    ("prologue", "contract[d](qc, k)", "concat[d, d, d -> s](qc, qc, qc)", "concat makes the axis s, of which a block"),
    ("kernel", "root: f32[b] = sqrt(mse)", "root: f32[b] = kernel(mse)", "kernel inside a block graph"),
    (
        "kernel",
        "ss: f32[b] += contract[k](x, x)",
        "ss: f32[b, k] += mul(x, acc)",
        "acc is read before its loop is done",
    ),
    ("prologue", "sum[s](p)", "sum[s](h)", "h stays inside its thread graph"),
    ("prologue", "exp(h)", "exp(k)", "k is used before it is defined"),
    ("prologue", "h: f32[b, s] = tanh(z)", "h: f32[b] = sum[s](z)", "sum is not computed element by element"),
    ("prologue", "-> (p)", "-> (p, w)", "does not compute its output w"),
    ("prologue", "thread(z)", "thread(z, qc)", "does not read its input qc"),
    ("prologue", "over b: warp, s: lane", "over b: warp", "its parts name others"),
    ("prologue", "s: lane", "s: grid", "axis s is not on the grid"),
]

ACCUMULATORS = [
    ("kernel", "root: f32[b] = sqrt(mse)", "root: f32[b] += contract[](mse)", "root accumulates outside a loop"),
    (
        "kernel",
        "ss: f32[b] += contract[k](x, x)",
        "ss: f32[b] max= contract[k](x, x)",
        "max does not accumulate contract",
    ),
    ("kernel", "ss: f32[b] += contract[k](x, x)", "ss: f32[b] += mean[k](x)", "sum does not accumulate mean"),
    ("kernel", "ss: f32[b] += contract[k](x, x)", "ss: f32[b, k] += contract[](x)", "does not close the loop over k"),
    ("kernel", "ss: f32[b] += contract[k](x, x)", "ss: f32[] += contract[b, k](x, x)", "ss closes the axis b"),
    ("split", "sum[s](p) rescaled by m", "sum[s](p) rescaled by q", "q is no running maximum before l"),
    ("split", "sum[s](p) rescaled by m", "sum[s](p)", "l depends on the running maximum m"),
    (
        "split",
        "l: f32[h, g, b] += sum[s](p) rescaled by m",
        "l: f32[h, g, b] max= max[s](p)",
        "l depends on the running",
    ),
    ("split", "sum[s](p) rescaled by m", "contract[s](k, k) rescaled by m", "l has the axes"),
]

STORES = [
    ("kernel", "store y -> Y", "store root -> Y", "a race: all blocks along n write the same elements of Y"),
    ("kernel", "store y -> Y", "store x -> Y", "a race: all blocks along n"),
    ("kernel", "store y -> Y", "store z -> Y", "z is not there to be stored"),
    ("kernel", "store y -> Y", "store y -> Y\n      store acc -> Y", "Y is stored twice"),
    ("kernel", "store y -> Y", "store partial y -> Y", "a partial store needs a split and a combine"),
    ("split", "store partial m", "store m", "a race: all parts of the split write m_parts"),
    ("split", "store partial m", "store atomic m", "an atomic store beside a combine"),
    ("split", "store partial m ", "store partial p ", "p depends on a running maximum"),
    ("split", "store partial m ", "store partial qk ", "qk is a tile of the loop, not a partial result"),
    ("split", "store o -> O", "store atomic o -> O", "a combine stores results, not atomic ones"),
    ("split", "= m_parts", "= m", "m is no argument"),
    ("prologue", "store l -> L", "store h -> L", "h is not there to be stored"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), ROLES, ids=[t[3][:40] for t in ROLES])
def test_inconsistent_roles_are_refused(name, old, new, message):
    refuse(name, old, new, message)


@pytest.mark.parametrize(("name", "old", "new", "message"), VALUES, ids=[t[3][:40] for t in VALUES])
def test_values_out_of_reach_are_refused(name, old, new, message):
    refuse(name, old, new, message)


@pytest.mark.parametrize(("name", "old", "new", "message"), ACCUMULATORS, ids=[t[3][:40] for t in ACCUMULATORS])
def test_wrong_accumulators_are_refused(name, old, new, message):
    refuse(name, old, new, message, ShapeError if "has the axes" in message else GraphError)


@pytest.mark.parametrize(("name", "old", "new", "message"), STORES, ids=[t[3][:40] for t in STORES])
def test_wrong_stores_are_refused(name, old, new, message):
    refuse(name, old, new, message)


def test_a_store_that_every_iteration_overwrites_is_refused():
    text = TWO_PASSES.replace("y: f32[b, k] = div(x2, total)", "y: f32[b] = square(total)")
    with pytest.raises(GraphError, match="all iterations over k write the same elements"):
        check(parse_program(text.replace("Y: f16[b, k]", "Y: f16[b]")))


def test_the_line_is_underlined_and_the_users_line_named():
    graph = rmsnorm_linear()
    at = Location("model.py", 7, "r = rsqrt(mean)")
    wrong = replace(graph.equations[4], args=("missing",), where=at)
    with pytest.raises(GraphError) as caught:
        check(replace(graph, equations=(*graph.equations[:4], wrong, *graph.equations[5:])))
    lines = caught.value.message.splitlines()
    marks = next(i for i, line in enumerate(lines) if "^^^" in line)
    assert lines[marks - 1] == "  r: f16[b] = rsqrt(missing)"
    assert caught.value.where == str(at)


def test_a_long_graph_is_shown_around_the_line():
    lines = [f"  v{i + 1}: f32[k] = exp(v{i})" for i in range(200)]
    text = "\n".join(["program long", "  axes k = 4", "  input v0: f32[k]", *lines, "  output v200"])
    check(parse_program(text))
    with pytest.raises(GraphError, match="w is used before") as caught:
        check(parse_program(text.replace("exp(v100)", "exp(w)")))
    shown = caught.value.message.splitlines()
    assert len(shown) < 40
    assert "v101: f32[k] = exp(w)" in shown[next(i for i, line in enumerate(shown) if "^^^" in line) - 1]


def two_inputs(a: Axis, b: Axis) -> Program:
    inputs = tuple(Input(tensor(n, (x,), DType.f32), Storage(DType.f32)) for n, x in (("X", a), ("Y", b)))
    return Program("p", inputs, (), (Output("X", Storage(DType.f32)),))


def test_one_axis_has_one_size():
    check(two_inputs(Axis("k", 4), Axis("k", 4)))
    with pytest.raises(ShapeError, match="axis k has the sizes 4 and 5"):
        check(two_inputs(Axis("k", 4), Axis("k", 5)))


def test_one_symbol_has_one_range():
    check(two_inputs(Axis("k", Dim("N", 1, 8)), Axis("n", Dim("N", 1, 8))))
    with pytest.raises(ShapeError, match="the symbolic size N has two ranges"):
        check(two_inputs(Axis("k", Dim("N", 1, 8)), Axis("n", Dim("N", 1, 9))))


def test_an_output_overwrites_only_what_fits():
    p = two_inputs(Axis("k", 4), Axis("n", 5))
    check(replace(p, outputs=(Output("X", Storage(DType.f32), "X"),)))
    with pytest.raises(ShapeError, match="cannot overwrite"):
        check(replace(p, outputs=(Output("X", Storage(DType.f32), "Y"),)))


def test_a_load_may_rename_axes_but_not_permute_them():
    text = without_maps(str(rmsnorm_linear_fused(k_size=64, n_size=64)))
    check(parse_program(text))
    with pytest.raises(ShapeError, match="permutes the axes"):
        check(parse_program(text.replace("load w: f16[k, n]", "load w: f16[n, k]")))
