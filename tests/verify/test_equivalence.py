"""What is equal is accepted with a bound, what is not is refused with a counterexample."""

from dataclasses import replace
from fractions import Fraction

import pytest

from mugraph.errors import GraphError, VerificationError
from mugraph.ir import evaluate, fields
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Pass, Program, Store
from mugraph.ir.ops import Const, Contract, Elementwise, Kernel, Library
from mugraph.ir.parser import parse_program
from mugraph.ir.threads import form_threads
from mugraph.ir.types import DType, Storage
from mugraph.verify import equivalence, formal
from mugraph.verify.equivalence import Verified, recheck, shared_values, verify, verify_as_given
from mugraph.verify.formal import EVALUATED, EXP_CUT, LOG_OF_FRACTION, NESTED_EXP
from tests import graphs
from tests.graphs import axis, inp
from tests.verify.mutants import block_of, with_block
from tests.verify.variants import EQUAL, UNEQUAL, X, Y, build, pair

GRAPHS = {name: (program(), fused()) for name, (program, fused) in graphs.ALL.items()} | {
    "gqa_plain": (graphs.attention(), graphs.attention_fused(online=False)),
    "gqa_split": (graphs.attention(), graphs.attention_fused(parts=4)),
    "gqa_split_plain": (graphs.attention(), graphs.attention_fused(online=False, parts=3)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_right_graph_is_accepted_with_the_bound_asked_for(name: str):
    verified = verify(*GRAPHS[name])
    certificate = verified.certificate
    assert certificate.delta <= 2.0**-40
    assert all(d.tests >= 2 for d in certificate.draws)
    assert certificate.unused_laws == ()


@pytest.mark.parametrize("name", ["rmsnorm_linear", "gqa_split"])
def test_a_graph_with_threads_is_accepted(name: str):
    program, graph = GRAPHS[name]
    verify(program, with_block(graph, form_threads(block_of(graph))))


def library_and_kernel(semantics: Program) -> KernelGraph:
    """`lora` in two launches: a library call for X·A, and a kernel of which its result is an argument."""
    p = graphs.lora()
    xa, args = p.tensors()["xa"], ("X", "W", "xa", "Bm")
    low = Equation((xa,), Library("matmul", semantics), ("X", "A"))
    b = graphs.Builder(block=True)
    loads = tuple(b.load(name.lower(), p.tensors()[name]) for name in args)
    b.acc("xw_acc", Contract(("k",)), "x", "w")
    body = b.take()
    b.add("low", Contract(("r",)), "xa", "bm")
    b.fn("y", "add", "xw_acc", "low")
    passes = (Pass((("k", 64),), loads[:2], body),)
    block = BlockGraph((("b", 16), ("n", 64)), None, passes, loads[2:], b.take(), (Store("y", "Y"),))
    return KernelGraph(p.name, p.inputs, (low, Equation((p.tensors()["Y"],), Kernel((block,)), args)), p.outputs)


def matmul(*axes: str) -> Program:
    """U[i, j]·V[j, l], contracted over the axes."""
    i, j, l = axis("i", graphs.B), axis("j", 4096), axis("l", 16)
    return build([inp("U", i, j), inp("V", j, l)], [("T", Contract(axes), "U", "V")])


def test_a_library_call_and_a_kernel_are_accepted():
    verify(graphs.lora(), library_and_kernel(matmul("j")))


def test_a_library_call_of_another_meaning_is_refused():
    wrong = build(
        list(matmul("j").inputs),
        [("S", Contract(("j",)), "U", "V"), ("T", "neg", "S")],
    )
    with pytest.raises(VerificationError, match="differ"):
        verify(graphs.lora(), library_and_kernel(wrong))


@pytest.mark.parametrize("name", EQUAL)
def test_equal_by_a_law_is_accepted(name: str):
    assert verify(*pair(*EQUAL[name])).certificate.delta <= 2.0**-40


@pytest.mark.parametrize("name", UNEQUAL)
def test_a_lookalike_is_refused(name: str):
    with pytest.raises(VerificationError, match="differ"):
        verify(*pair(*UNEQUAL[name]))


def test_every_tile_is_full_somewhere_and_has_a_tail():
    for draw in verify(*GRAPHS["gqa"]).certificate.draws:
        sizes, tiles = dict(draw.sizes), dict(draw.tiles)
        for name, tile in tiles.items():
            assert sizes[name] > tile
            assert tile == 1 or sizes[name] % tile


def test_no_two_axes_have_the_same_sizes_in_all_draws():
    draws = [dict(d.sizes) for d in verify(*GRAPHS["gqa"]).certificate.draws]
    columns = [tuple(d[a] for d in draws) for a in ("h", "g", "b", "s")]
    assert len(set(columns)) == len(columns)


def test_a_counterexample_names_output_index_sizes_seed_and_both_values():
    with pytest.raises(VerificationError) as caught:
        verify(*pair(*UNEQUAL["other-half"]))
    assert "o[b=0, c=0] differs: the program gives " in caught.value.message
    assert "at sizes b=" in caught.value.message
    assert "seed 0/0/0/0" in caught.value.message


def test_the_same_seed_gives_the_same_certificate_and_another_seed_other_keys():
    program, graph = GRAPHS["lora"]
    first, again, other = (verify(program, graph, seed=s).certificate for s in (1, 1, 2))
    assert first == again
    assert first.draws != other.draws


def test_a_smaller_delta_takes_more_tests():
    program, graph = GRAPHS["gqa_plain"]
    few, many = (verify(program, graph, delta=2.0**-d).certificate for d in (40, 80))
    assert many.delta <= 2.0**-80
    assert sum(d.tests for d in many.draws) > sum(d.tests for d in few.draws)


def test_an_unreachable_delta_is_refused(monkeypatch):
    monkeypatch.setattr(equivalence, "MOST_TESTS", 2)
    with pytest.raises(VerificationError, match="2 tests bound the error"):
        verify(*GRAPHS["gqa_plain"], delta=2.0**-80)


def test_a_delta_that_is_no_probability_is_refused():
    with pytest.raises(VerificationError, match="delta is 0"):
        verify(*GRAPHS["lora"], delta=0)


def test_only_verify_makes_a_verified():
    verified = verify(*GRAPHS["lora"])
    with pytest.raises(VerificationError, match="only verify"):
        Verified(verified.program, verified.graph, verified.certificate)
    with pytest.raises((VerificationError, ValueError)):
        replace(verified, graph=GRAPHS["gqa"][1])


def test_other_inputs_and_outputs_are_refused():
    program, graph = GRAPHS["lora"]
    with pytest.raises(VerificationError, match="takes"):
        verify(program, replace(graph, inputs=graph.inputs[::-1]))
    with pytest.raises(VerificationError, match="takes"):
        verify(program, graphs.lora_fused(dtype=DType.bf16))
    with pytest.raises(VerificationError, match="gives"):
        verify(replace(program, outputs=program.outputs * 2), graph)


def test_other_storage_and_other_assumptions_are_refused():
    program, graph = GRAPHS["lora"]
    first, *rest = graph.inputs
    out = graph.outputs[0]
    for other in (
        replace(first, storage=Storage(DType.i8)),
        replace(first, storage=replace(first.storage, strides=(3, 1))),
        replace(first, constant=not first.constant),
        replace(first, assumptions=("no row wholly masked",)),
    ):
        with pytest.raises(VerificationError, match="takes"):
            verify(program, replace(graph, inputs=(other, *rest)))
    with pytest.raises(VerificationError, match=r"gives .*Storage\(dtype=<DType.i32"):
        verify(program, replace(graph, outputs=(replace(out, storage=Storage(DType.i32)),)))


def test_a_vector_stored_in_another_way_is_refused():
    x = inp("X", axis("n", 16))
    steps = [("o", "exp", "X")]
    program, graph = pair([x], steps, steps)
    verify(program, graph)
    with pytest.raises(VerificationError, match="takes"):
        verify(program, replace(graph, inputs=(replace(x, storage=Storage(DType.i8, strides=(3,))),)))


def test_outputs_may_have_other_names():
    verify(*pair([X], [("o", "exp", "X")], [("another", "exp", "X")]))


def test_a_logarithm_of_a_quotient_of_sums_is_recorded_and_that_of_a_sum_proved():
    certificate = verify(*pair(*EQUAL["logarithm-of-a-quotient-of-sums"])).certificate
    assert certificate.unused_laws == (LOG_OF_FRACTION,)
    assert EVALUATED in certificate.assumptions
    certificate = verify(*pair(*EQUAL["logarithm-of-shifted-sum"])).certificate
    assert certificate.unused_laws == ()
    assert EVALUATED not in certificate.assumptions


def test_a_malformed_graph_is_refused():
    program, graph = GRAPHS["lora"]
    with pytest.raises(GraphError):
        verify(program, replace(graph, outputs=()))


def test_a_denominator_that_is_always_zero_is_refused():
    steps = [("d", "sub", "X", "X"), ("o", "div", "X", "d")]
    with pytest.raises(VerificationError, match="denominator is zero"):
        verify(*pair([X], steps, steps))


def test_a_denominator_that_is_zero_by_chance_is_drawn_again(monkeypatch):
    drawn = formal.FormalAlgebra.random

    def first_is_zero(self, axes, key):
        value = drawn(self, axes, key)
        return value.map(lambda p: p * 0) if self.key == "0/0/0/0" else value

    monkeypatch.setattr(formal.FormalAlgebra, "random", first_is_zero)
    steps = [("o", "div", "X", "Y")]
    keys = verify(*pair([X, Y], steps, steps)).certificate.draws[0].keys
    assert keys[0] == "0/0/0/1"


def test_too_many_terms_cut_the_exponential_and_the_certificate_says_so(monkeypatch):
    defaults = formal.FormalAlgebra.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "max_terms", 2)
    inputs, steps, _ = EQUAL["softmax-shift"]
    assert verify(*pair(inputs, steps, steps)).certificate.unused_laws == (EXP_CUT,)
    with pytest.raises(VerificationError, match="with exp opaque"):
        verify(*pair(*EQUAL["exp-of-sum"]))


def test_sums_that_are_too_long_are_compared_at_smaller_sizes_first(monkeypatch):
    inputs, steps, _ = EQUAL["softmax-shift"]
    usual = verify(*pair(inputs, steps, steps)).certificate
    monkeypatch.setitem(formal.FormalAlgebra.__init__.__kwdefaults__, "max_terms", 24)
    small = verify(*pair(inputs, steps, steps)).certificate
    assert EXP_CUT not in small.unused_laws
    assert equivalence.LEAST_SIZES in small.assumptions
    assert equivalence.LEAST_SIZES not in usual.assumptions
    assert max(s for d in small.draws for _, s in d.sizes) < max(s for d in usual.draws for _, s in d.sizes)


def test_nested_exponentials_and_functions_of_exponentials_are_recorded():
    certificate = verify(*pair(*EQUAL["exponential-of-exponential"])).certificate
    assert certificate.unused_laws == (NESTED_EXP,)
    assert EVALUATED in certificate.assumptions
    assert EVALUATED not in verify(*pair(*EQUAL["exp-of-sum"])).certificate.assumptions


def test_a_literal_that_is_a_true_size_is_tested_at_that_size():
    certificate = verify(*pair(*EQUAL["literal-is-the-size"])).certificate
    assert all(dict(d.sizes)["k"] == 64 for d in certificate.draws)
    assert any("k=64" in a for a in certificate.assumptions)


def test_a_certificate_can_be_checked_again_and_is_about_one_pair_of_graphs():
    program, graph = GRAPHS["lora"]
    certificate = verify(program, graph).certificate
    assert recheck(certificate, program, graph).certificate == certificate
    with pytest.raises(VerificationError, match="another graph"):
        recheck(certificate, program, graphs.lora_fused(k_size=2048))
    with pytest.raises(VerificationError, match="says delta_log2"):
        recheck(replace(certificate, delta_log2=-60.0), program, graph)


# -- a weaker verifier --------------------------------------------------------------------------------------------


def scaled(factor: int) -> tuple[Program, KernelGraph]:
    """A contraction, and the same times a literal."""
    steps = [("o", Contract(("k",)), "X", "Y")]
    wrong = [("s", Contract(("k",)), "X", "Y"), ("c", Const(Fraction(factor))), ("o", "mul", "s", "c")]
    return pair([X, Y], steps, wrong)


def test_small_primes_accept_what_large_primes_refuse(monkeypatch):
    p, q = 227, 113
    wrong = scaled(1 + p * q)
    with pytest.raises(VerificationError):
        verify(*wrong)
    for module in (formal, fields, evaluate):
        monkeypatch.setattr(module, "P", p)
        monkeypatch.setattr(module, "Q", q)
    monkeypatch.setattr(equivalence, "FEWEST_TESTS", 1)
    verify(*wrong, delta=0.5)


def test_a_verifier_whose_comparison_always_holds_accepts_errors(monkeypatch):
    monkeypatch.setattr(formal.FormalAlgebra, "differs", lambda self, a, b: formal.np.zeros(a.lead, dtype=bool))
    verify(*scaled(2))


# -- sizes at which what is wrong looks right


def texts(program: str, graph: str) -> tuple[Program, KernelGraph]:
    """Two programs as text, the second taken as a graph."""
    p, g = (parse_program(f"program p\n{text}") for text in (program, graph))
    return p, KernelGraph(g.name, g.inputs, g.equations, g.outputs)


SUM_LESS_ONE = """  axes i = 64
  input x: f32[i]
  s: f32[] = sum[i](x)
  d: f32[i] = sub(s, x)
  o: f32[] = contract[i](d, d)
  output o
"""
SQUARES = "  axes i = 64\n  input x: f32[i]\n  o: f32[] = contract[i](x, x)\n  output o\n"
SOFTMAX = """  axes i = 64
  input x: f32[i]
  y: f32[i] = {}(x)
  e: f32[i] = exp(y)
  s: f32[] = sum[i](e)
  p: f32[i] = div(e, s)
  o: f32[] = max[i](p)
  output o
"""
EVERY_SECOND = """  axes i = 8, o = 2
  input x: f32[i]
  y: f32[o] = slice[i -> o, start=2, step=2](x)
  output y
"""
THIRD_ROW = """  axes i = 8, d = 4, o = 2, z = 1
  input x: f32[i]
  r: f32[d, o] = reshape[d, o](x)
  s: f32[z, o] = slice[d -> z, start=2](r)
  y: f32[o] = sum[z](s)
  output y
"""
NINTH = "  axes i = 16, z = 1\n  input x: f32[i]\n  v: f32[z] = slice[i -> z, start=9](x)\n  output v\n"
FIFTH = """  axes i = 16, p = 15, a = 31, z = 1
  input x: f32[i]
  q: f32[p] = slice[i -> p, start=0](x)
  c: f32[a] = concat[p, i -> a](q, x)
  v: f32[z] = slice[a -> z, start={}](c)
  output v
"""


NEGATED = SOFTMAX.replace("{}(x)", "neg(m)").replace("  y:", "  m: f32[i] = neg(x)\n  y:")


@pytest.mark.parametrize(
    ("program", "graph"),
    [
        pytest.param(SUM_LESS_ONE, SQUARES, id="equal for two entries"),
        pytest.param(SOFTMAX.format("neg"), NEGATED, id="equal for two entries, with exponentials"),
        pytest.param(EVERY_SECOND, THIRD_ROW, id="a stride and a row"),
        pytest.param(NINTH, FIFTH.format(5), id="places of a joint"),
    ],
)
def test_what_is_equal_at_the_smallest_sizes_alone_is_refused(program: str, graph: str):
    with pytest.raises(VerificationError, match="differs"):
        verify(*texts(program, graph))
    verify(*texts(graph, graph))


def test_a_place_of_a_joint_is_found_again():
    verify(*texts(NINTH, FIFTH.format(9)))
    verify(*texts(NINTH, FIFTH.format(24)))


TRANSPOSED = """  axes i = 24, k = {}, l = {}
  input x: f32[i]
  y: f32[k, l] = reshape[k, l](x)
  t: f32[l, k] = transpose(y)
  o: f32[i] = reshape[i](t)
  output o
"""


def test_a_name_stands_for_one_size_in_both():
    with pytest.raises(VerificationError, match="axis k has the size 4 in one place and 6 in another"):
        verify(*texts(TRANSPOSED.format(4, 6), TRANSPOSED.format(6, 4)))
    other = TRANSPOSED.replace("k", "m").replace("l", "n").format(6, 4)
    with pytest.raises(VerificationError, match="differs"):
        verify(*texts(TRANSPOSED.format(4, 6), other))


# -- as it is given


def nested() -> Program:
    """Two softmaxes, one of the other, between products."""
    return parse_program("""program nested
  axes i = 8, k = 16, l = 24
  input x: f32[i, k]
  input w: f32[k, l]
  e: f32[i, k] = exp(x)
  s: f32[i] = sum[k](e)
  p: f32[i, k] = div(e, s)
  y: f32[i, l] = contract[k](p, w)
  f: f32[i, l] = exp(y)
  t: f32[i] = sum[l](f)
  q: f32[i, l] = div(f, t)
  output q
""")


SHIFTED = """  m: f32[i] = max[l](y)
  d: f32[i, l] = sub(y, m)
  g: f32[i, l] = exp(d)
"""


def test_where_the_whole_cannot_be_compared_its_parts_are():
    program = nested()
    text = str(program).replace("  f: f32[i, l] = exp(y)\n", SHIFTED)
    text = text.replace("  t: f32[i] = sum[l](f)", "  u: f32[i] = sum[l](g)").replace("div(f, t)", "div(g, u)")
    _, shifted = texts(str(program).split("\n", 1)[1], text.split("\n", 1)[1])
    shifted = replace(shifted, name=program.name)
    with pytest.raises(VerificationError):
        verify(program, shifted)
    certificate = verify_as_given(program, shifted).certificate
    assert certificate.cuts == shared_values(program, shifted)
    assert "y" in certificate.cuts
    recheck(certificate, program, shifted)
    wrong = replace(shifted, equations=tuple(
        replace(e, op=Elementwise("mul")) if e.target.name == "d" else e for e in shifted.equations
    ))  # fmt: skip
    with pytest.raises(VerificationError):
        verify_as_given(program, wrong)
