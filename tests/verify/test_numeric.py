"""The numeric check accepts what rounds as it should, and refuses the rest."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import mugraph as mg
from mugraph.errors import VerificationError
from mugraph.ir.evaluate import reference
from mugraph.ir.graph import Program
from mugraph.ir.shift import shifted
from mugraph.ir.types import DType
from mugraph.verify.certificate import NumericReport
from mugraph.verify.equivalence import verify
from mugraph.verify.numeric import DRAWS, Checked, draw_inputs, eager, numeric_check, rounded
from tests import graphs
from tests.verify.variants import X, Y, build

BINDINGS = [{"B": 1}, {"B": 7}]
PROGRAMS: dict[str, Callable[[DType], Program]] = {
    "rmsnorm_linear": lambda t: graphs.rmsnorm_linear(t, 96, 40),
    "gated_mlp": lambda t: graphs.gated_mlp(t, 96, 40),
    "lora": lambda t: graphs.lora(t, 96, 40, 8),
    "gqa": lambda t: graphs.attention(t, 48, 16, 2, 2),
}
DTYPES = {DType.f16: torch.float16, DType.bf16: torch.bfloat16, DType.f32: torch.float32}


def exact_run(program: Program, change=lambda outputs: outputs):
    """A runner that computes in float64 and rounds once; `change` spoils its outputs."""

    def run(inputs, bindings):
        arrays = {name: t.to(torch.float64).numpy() for name, t in inputs.items()}
        dtypes = [DTYPES[program.tensors()[o.value].dtype] for o in program.outputs]
        found = change([torch.from_numpy(np.asarray(a)) for a in reference(program, arrays, bindings)])
        return [a.to(t) for a, t in zip(found, dtypes, strict=True)]

    return run


def eager_run(program: Program):
    """A runner that rounds every step and shifts exponentials, as a framework does."""

    def run(inputs, bindings):
        arrays = {name: t.to(torch.float64).numpy() for name, t in inputs.items()}
        outputs, _ = eager(shifted(program), arrays, bindings)
        return [torch.from_numpy(a).to(DTYPES[program.tensors()[o.value].dtype])
                for a, o in zip(outputs, program.outputs, strict=True)]  # fmt: skip

    return run


def checked(program: Program, run, **options) -> NumericReport:
    return numeric_check(program, run, bindings=BINDINGS, how="torch", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_and_eager_results_are_within_tolerance(name, dtype):
    program = PROGRAMS[name](dtype)
    assert checked(program, exact_run(shifted(program))).passed
    assert checked(program, eager_run(program)).passed


def relative(by: float):
    return lambda outputs: [a * (1 + by) for a in outputs]


@pytest.mark.parametrize(("dtype", "by"), [(DType.f16, 0.05), (DType.bf16, 0.3), (DType.f32, 1e-5)], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_result_that_is_slightly_wrong_is_refused(name, dtype, by):
    program = PROGRAMS[name](dtype)
    assert not checked(program, exact_run(program, relative(by)), draws=["normal"]).passed


def one_element(value: float):
    def change(outputs):
        spoiled = outputs[0].clone(memory_format=torch.contiguous_format)
        spoiled.view(-1)[-1] = value
        return [spoiled, *outputs[1:]]

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 77.0])
def test_one_wrong_element_is_refused(value):
    program = PROGRAMS["gqa"](DType.f16)
    assert not checked(program, exact_run(program, one_element(value))).passed


def test_a_tail_that_is_not_written_is_refused_by_its_poison():
    program = PROGRAMS["lora"](DType.f16)
    whole = exact_run(program)

    def run(inputs, bindings, out):
        (result,) = whole(inputs, bindings)
        out[0][:, :-1] = result[:, :-1]
        return out

    def complete(inputs, bindings, out):
        out[0].copy_(whole(inputs, bindings)[0])
        return out

    assert not checked(program, run).passed
    assert checked(program, complete).passed


def test_a_changed_input_and_outputs_of_another_type_are_refused():
    program = PROGRAMS["lora"](DType.f16)
    whole = exact_run(program)

    def spoils(inputs, bindings):
        found = whole(inputs, bindings)
        inputs["X"].add_(1)
        return found

    with pytest.raises(VerificationError, match="changes its input X"):
        checked(program, spoils)
    with pytest.raises(VerificationError, match="2 outputs instead of 1"):
        checked(program, lambda i, b: whole(i, b) * 2)
    with pytest.raises(VerificationError, match=r"is torch\.float32"):
        checked(program, lambda i, b: [whole(i, b)[0].float()])
    with pytest.raises(VerificationError, match=r"is torch\.float16"):
        checked(program, lambda i, b: [whole(i, b)[0].T])


def test_draws_beyond_the_type_are_left_out_and_said_so():
    program = build([X, Y], [("e", "exp", "X"), ("f", "exp", "Y"), ("o", "div", "e", "f")])
    report = checked(program, exact_run(program))
    assert {r.draw for r in report.rows} == set(DRAWS)
    left_out = {r.draw: r.note for r in report.rows if not r.counted}
    assert "leaves f16" in left_out["logits"]
    assert report.passed


def test_a_stabilised_graph_is_held_to_what_the_program_as_written_cannot_do():
    B = mg.Dim("B", 1, 8)
    program = mg.trace(lambda x: mg.exp(x * 4) / (1 + mg.exp(x * 4)), [mg.f16[B, 33]], "logistic")
    for beyond in (False, True):
        report = checked(program, exact_run(program), beyond_eager=beyond)
        (logits, *_) = [r for r in report.rows if r.draw == "logits"]
        assert "overflows at its own types" in logits.note
        assert logits.counted == beyond
        assert report.passed
    nan = exact_run(program, lambda outputs: [a * float("nan") for a in outputs])
    assert not checked(program, nan, draws=["logits"], beyond_eager=True).passed


def test_an_unknown_draw_is_refused():
    program = PROGRAMS["lora"](DType.f16)
    with pytest.raises(VerificationError, match="no draw"):
        checked(program, exact_run(program), draws=["cauchy"])


def test_rounding_is_that_of_torch():
    values = np.concatenate([np.random.default_rng(0).standard_normal(2000) * 10.0**e for e in (-9, -3, 0, 3, 6)])
    for dtype, there in DTYPES.items():
        expected = torch.from_numpy(values).to(torch.float32).to(there).to(torch.float64).numpy()
        np.testing.assert_array_equal(rounded(rounded(values, DType.f32), dtype), expected)


def test_a_variance_that_is_multiplied_out_is_refused_far_from_zero():
    @mg.program
    def variance(x: mg.f32[mg.Dim("B"), 64]):
        centred = x - mg.mean(x, -1, True)
        return mg.sum(mg.square(centred), -1) / 64

    def two_passes(inputs, bindings):
        return [inputs["x"].var(-1, correction=0)]

    def multiplied_out(inputs, bindings):
        x = inputs["x"]
        return [(x * x).sum(-1) / 64 - (x.sum(-1) / 64) ** 2]

    near = ("normal", "wide", "outlier")
    assert checked(variance, two_passes).passed
    assert checked(variance, multiplied_out, draws=near).passed
    assert {r.draw for r in checked(variance, multiplied_out, draws=(*near, "offset")).rows if not r.passed} == {
        "offset"
    }


def test_a_maximum_has_the_error_of_the_operand_that_is_taken():
    @mg.program
    def clipped(x: mg.f32[mg.Dim("B"), 8]):
        return mg.maximum(x * 3, -1e30)

    right = numeric_check(clipped, lambda inputs, _: [inputs["x"] * 3], bindings=BINDINGS, how="torch")
    assert right.passed
    assert all(r.tolerance < 1e-2 for r in right.rows)
    assert not checked(clipped, lambda inputs, _: [inputs["x"] * 3 + 1e-2]).passed


def test_draws_are_what_they_say():
    program = graphs.lora(DType.f16, 96, 40)
    zero, rows, outlier = (draw_inputs(program, {"B": 7}, kind)["X"] for kind in ("zeros", "rows", "outlier"))
    assert not zero.any()
    assert (rows == rows[:, :1]).all()
    assert np.ptp(rows) > 0
    assert (outlier == 64).sum() == 1
    wide = draw_inputs(program, {"B": 7}, "wide")["X"]
    assert 2.5 < wide.std() < 3.5
    far = draw_inputs(program, {"B": 7}, "offset")["X"]
    assert 126 < far.mean() < 130  # 4 of the 11 bits of f16 are left below 1
    assert 0.8 < far.std() < 1.2


def test_a_deep_program_is_compared_at_the_scale_of_a_network():
    """Six products of 64 terms leave f16 where every entry is about 1."""

    def deep(x, w):
        for _ in range(6):
            x = x @ w
        return x

    program = mg.trace(deep, [mg.f16[4, 64], mg.f16[64, 64]], "deep")
    good, bad = (
        numeric_check(
            program, exact_run(program, change), bindings=[{}], how="torch", draws=["normal"], beyond_eager=beyond
        )
        for change, beyond in ((relative(0), True), (relative(0.5), False))
    )
    assert [r.draw for r in good.rows if r.counted and not r.note] == ["scaled"]
    assert good.passed
    assert not bad.passed


def test_only_a_source_that_passed_becomes_checked():
    program = graphs.lora()
    verified = verify(program, graphs.lora_fused())
    small = PROGRAMS["lora"](DType.f16)
    good = numeric_check(small, exact_run(small), bindings=BINDINGS, how="torch", source_hash="s")
    bad = numeric_check(small, exact_run(small, relative(0.5)), bindings=BINDINGS, how="torch", source_hash="s")
    assert Checked(verified, "s", good).numerics.passed
    with pytest.raises(VerificationError, match="another source"):
        Checked(verified, "t", good)
    with pytest.raises(VerificationError, match="does not agree"):
        Checked(verified, "s", bad)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_tail_of_gelu_may_have_the_error_of_a_sum_near_one(approximate):
    program = mg.trace(lambda x: mg.gelu(x, approximate=approximate), [mg.f32[4096]], "gelu")

    def off_by(units):
        def run(inputs, bindings):
            x = inputs["x"]
            return [torch.nn.functional.gelu(x, approximate=approximate) + units * 2.0**-24 * x]

        return numeric_check(program, run, bindings=[{}], how="torch")

    assert not off_by(2).disagrees
    assert off_by(40).disagrees


@pytest.mark.parametrize("dtype", [DType.f8e4m3, DType.f8e5m2])
def test_a_result_of_eight_bits_has_to_be_the_nearest(dtype: DType):
    """Eight deviations of so few digits would let zeros pass."""
    torch_dtype = torch.float8_e4m3fn if dtype is DType.f8e4m3 else torch.float8_e5m2

    @mg.program
    def smooth(a: mg.f32[64]):
        return mg.cast(mg.silu(a), getattr(mg, str(dtype)))

    def agrees(f) -> bool:
        def run(inputs, bindings):
            return [f(inputs["a"]).to(torch_dtype)]

        return numeric_check(smooth, run, bindings=[{}], how="torch", draws=("normal",)).passed

    silu = torch.nn.functional.silu
    assert agrees(silu)
    for wrong in (torch.zeros_like, torch.relu, lambda x: 2 * silu(x), lambda x: 1.2 * silu(x)):
        assert not agrees(wrong)
