"""Library calls' meanings with their exponentials shifted: the same value, and finite where the program is."""

from collections.abc import Callable

import pytest
import torch

import mugraph as mg
from mugraph.dsl.trace import TensorSpec, trace
from mugraph.ir.check import check
from mugraph.ir.graph import Program
from mugraph.ir.ops import Reduce
from mugraph.ir.shift import shifted
from mugraph.pipeline import optimize
from mugraph.runtime.load import load_module
from mugraph.search.build import baseline
from mugraph.transpiler.torch import emit
from mugraph.verify.equivalence import verify

ROWS = mg.Dim("B", 1, 64)
X = mg.f32[ROWS, 33]
M = mg.bool_[ROWS, 33]


def maxima(program: Program) -> int:
    return sum(isinstance(e.op, Reduce) and e.op.kind == "max" for e in program.equations)


SHIFTED: dict[str, tuple[Callable[..., object], list[TensorSpec]]] = {
    "softmax": (lambda x: mg.softmax(x * 3), [X]),
    "logsumexp": (lambda x: mg.logsumexp(x), [X]),
    "softmax of a softmax": (lambda x: mg.softmax(mg.softmax(x) * 100), [X]),
    "attention": (lambda q, k, v: mg.attention(q, k, v), [mg.f32[ROWS, 16], mg.f32[33, 16], mg.f32[33, 16]]),
    "masked": (lambda x, m: mg.softmax(mg.where(m, x, float("-inf"))), [X, M]),
    "the maximum of the row": (lambda x: mg.amax(mg.exp(x), -1) / mg.exp(x).sum(-1), [X]),
}

# The verifier takes a maximum of exponentials for a value of its own.
OPAQUE = {"softmax of a softmax", "the maximum of the row"}


@pytest.mark.parametrize("name", SHIFTED)
def test_the_shift_leaves_the_value_and_keeps_it_finite(name: str) -> None:
    fn, types = SHIFTED[name]
    program = trace(fn, types, "p")
    stable = shifted(program)
    check(stable)
    assert maxima(stable) > maxima(program)
    if name not in OPAQUE:
        verify(program, stable)

    torch.manual_seed(0)
    values = [torch.randn(*(7 if i == 0 and t.shape[0] == ROWS else d for i, d in enumerate(t.shape))) for t in types]
    values = [v * 60 if i == 0 else v for i, v in enumerate(values)]
    if name == "masked":
        values[1] = values[1] > 0
        values[1][:, 0] = True
    found = load_module(emit(baseline(program)), "p").run(*values)
    # float64 reaches exp(709), so the program as written is its own reference.
    wanted = load_module(emit(program), "p").run(*[v.double() if v.is_floating_point() else v for v in values])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


UNSUMMED: dict[str, tuple[Callable[..., object], list[TensorSpec]]] = {
    "softmax of one": (lambda x: mg.softmax(x), [mg.f32[ROWS, 1]]),
    "logsumexp of one": (lambda x: mg.logsumexp(x), [mg.f32[ROWS, 1]]),
    "log-softmax of one": (lambda x: mg.log(mg.softmax(x)), [mg.f32[ROWS, 1]]),
    "masked": (lambda x, m: mg.softmax(mg.where(m, x, float("-inf"))), [mg.f32[ROWS, 1], mg.bool_[ROWS, 1]]),
    "one key": (lambda q, k, v: mg.attention(q, k, v), [mg.f32[ROWS, 16], mg.f32[1, 16], mg.f32[1, 16]]),
    "a mean": (lambda x: mg.logsumexp(mg.mean(x, axis=0, keepdims=True), axis=0), [mg.f32[ROWS]]),
}


def test_a_nested_exponential_that_no_sum_closes_is_left_alone() -> None:
    program = trace(lambda x: mg.logsumexp(mg.exp(x)), [mg.f32[ROWS, 1]], "p")
    assert shifted(program, unsummed=True) == program != shifted(program)


@pytest.mark.parametrize("name", UNSUMMED)
@pytest.mark.parametrize("scale", [300.0, -300.0])
def test_a_sum_over_one_element_is_shifted_by_it(name: str, scale: float) -> None:
    fn, types = UNSUMMED[name]
    program = trace(fn, types, "p")
    stable = shifted(program, unsummed=True)
    assert stable != program
    check(stable)
    verify(program, stable)
    assert shifted(trace(SHIFTED["softmax"][0], [X], "p"), unsummed=True) == trace(SHIFTED["softmax"][0], [X], "p")

    torch.manual_seed(0)
    values = [torch.rand(*(7 if d == ROWS else d for d in t.shape)) + 0.5 for t in types]
    scale /= 16 if name == "one key" else 1  # float64 reaches exp(709)
    values = [v > 0 if name == "masked" and i == 1 else v * scale if i == 0 else v for i, v in enumerate(values)]
    wanted = load_module(emit(program), "p").run(*[v.double() if v.is_floating_point() else v for v in values])
    for graph in (stable, baseline(program), optimize(program, target="torch").graph):
        found = load_module(emit(graph), "p").run(*values)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: mg.exp(x) / (1 + mg.exp(x)),  # 1 has no factor
        lambda x: mg.exp(x).sum(-1),  # the output would carry it
        lambda x: mg.exp(x) / (mg.exp(x) * mg.exp(x)).sum(-1, keepdim=True),  # degree 1 over degree 2
        lambda x: mg.tanh(mg.exp(x)) / mg.exp(x).sum(-1, keepdim=True),  # tanh is not homogeneous
        lambda x: mg.exp(x) / mg.exp(x[:, :1]),  # two exponentials, of other arguments
    ],
)
def test_what_would_feel_the_shift_is_left_alone(fn: Callable[..., object]) -> None:
    program = trace(fn, [X], "p")
    assert shifted(program) == program


def test_an_alias_of_the_rows_has_another_maximum() -> None:
    """e[i] / e[j] of one exponential under two names: the maxima of rows i and j do not cancel."""

    def quotient(x):
        e = mg.exp(x)
        return (e @ e.mT) / (e.sum(-1, keepdim=True) * e.sum(-1, keepdim=True))

    program = trace(quotient, [mg.f32[9, 33]], "p")
    assert shifted(program) == program
