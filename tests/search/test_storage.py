"""What may lie in memory between launches, and in which type."""

from collections.abc import Callable

import pytest
import torch

import mugraph as mg
from mugraph.codegen.stabilise import stabilise
from mugraph.dsl.tensor import Tensor
from mugraph.ir.graph import KernelGraph
from mugraph.ir.ops import Kernel, Library
from mugraph.ir.types import DType
from mugraph.pipeline import finished, optimize
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify
from mugraph.verify.numeric import numeric_check

B = mg.Dim("B", 1, 4096)
AT_16 = SearchSpace(sizes=())


def found(fn: Callable[..., object], *types: object, space: SearchSpace = AT_16) -> Found:
    program = mg.trace(fn, list(types), "p")
    return search(program, accept=lambda graph: verify(program, finished(graph)), space=space)


def maxima(graph: KernelGraph) -> int:
    return str(graph).count("= max[") + str(graph).count("max= max[")


# -- exponentials


def test_exponentials_in_the_combine_of_a_split_are_shifted() -> None:
    graph = found(lambda x, w: mg.softmax(x @ w), mg.f32[B, 4096], mg.f32[4096, 64]).graph
    (kernel,) = graph.kernels()
    assert isinstance(kernel.op, Kernel)
    assert kernel.op.blocks[0].combine
    assert maxima(graph) == 0
    assert maxima(stabilise(graph)) == 1


@pytest.mark.parametrize("dtype", [DType.f32, DType.bf16, DType.f16], ids=str)
def test_large_logits_stay_finite(dtype: DType) -> None:
    t = {DType.f32: mg.f32, DType.bf16: mg.bf16, DType.f16: mg.f16}[dtype]
    program = mg.trace(lambda x, w, r: mg.softmax(x @ w) @ r, [t[B, 512], t[512, 512], t[512, 256]], "p")
    result = optimize(program, target="torch", space=AT_16)
    assert not result.unchanged
    torch.manual_seed(0)
    x, w, r = torch.randn(7, 512) * 3, torch.randn(512, 512), torch.randn(512, 256)
    own = [
        v.to(getattr(torch, {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[str(dtype)])) for v in (x, w, r)
    ]
    wide = [v.double() for v in own]
    wanted = torch.softmax(wide[0] @ wide[1], -1) @ wide[2]
    eager = torch.softmax(own[0] @ own[1], -1) @ own[2]
    error = (result(*own).double() - wanted).abs().max()
    assert error <= 2 * (eager.double() - wanted).abs().max()


def test_exponents_lie_in_memory_in_32_bits() -> None:
    result = found(lambda x, w, r: mg.softmax(x @ w) @ r, mg.bf16[B, 4096], mg.bf16[4096, 4096], mg.bf16[4096, 512])
    assert result.report.predicted_seconds < result.report.candidates[-1].seconds
    exponents = [t for e in result.graph.kernels() for t in e.targets if len(t.axes) == 2 and t.dtype is DType.f32]
    assert exponents


def test_a_softmax_that_overflows_is_refused_by_the_numeric_check() -> None:
    program = mg.trace(lambda x: mg.softmax(x), [mg.f32[4, 33]], "p")

    def run(inputs, bindings, shift):  # type: ignore[no-untyped-def]
        x = inputs["x"]
        e = torch.exp(x - x.amax(-1, keepdim=True) * shift)
        return [e / e.sum(-1, keepdim=True)]

    for shift, passes in ((1, True), (0, False)):
        report = numeric_check(
            program,
            lambda inputs, bindings, shift=shift: run(inputs, bindings, shift),  # type: ignore[misc]
            bindings=[{}],
            how="torch",
            draws=["outlier"],
            beyond_eager=False,
        )
        assert report.passed
        large = mg.trace(lambda x: mg.softmax(x * 4), [mg.f32[4, 33]], "p")
        report = numeric_check(
            large,
            lambda inputs, bindings, shift=shift: run({"x": inputs["x"] * 4}, bindings, shift),  # type: ignore[misc]
            bindings=[{}],
            how="torch",
            draws=["outlier"],
        )
        assert report.passed == passes


# -- products that the program divides first


@pytest.mark.parametrize(
    "fn", [lambda x, w: mg.rms_norm(x) @ w, lambda x, w: (x * 0.001) @ w], ids=["divided", "times a small number"]
)
def test_a_product_that_is_scaled_down_later_does_not_lie_in_f16(fn: Callable[..., object]) -> None:
    space = SearchSpace(symbolic=1024, sizes=())
    half = found(fn, mg.f16[B, 768], mg.f16[768, 256], space=space).graph
    assert not any(isinstance(e.op, Library) and e.op.name != "p" for e in half.equations)
    program = mg.trace(fn, [mg.f16[B, 768], mg.f16[768, 256]], "p")
    x, w = (torch.randn(300, 768) * 3000).half(), torch.randn(768, 256).half()
    assert optimize(program, target="torch", space=space)(x, w).isfinite().all()


# -- where a value is stored from


STORED: dict[str, tuple[Callable[..., object], list[object]]] = {
    "repeated in a loop": (
        lambda x, w: (w @ (x.mT @ w).mT @ x).repeat_interleave(2, -1),
        [mg.f32[4096, 4096], mg.f32[4096, 2]],
    ),
    "an input beside what is repeated of it": (
        lambda x: (x.repeat_interleave(2, -1), mg.sum(x, 0, True) @ mg.sum(x, 0, True).mT),
        [mg.f32[2, 257]],
    ),
    "an input beside a split": (
        lambda w, x: (mg.maximum(x, x), mg.sum((x @ w.mT) / (x @ w.mT), -1)),
        [mg.f32[14336, 2], mg.f32[mg.Dim("B", 1, 64), 2]],
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_what_is_stored_is_at_hand_there(name: str) -> None:
    fn, types = STORED[name]
    result = found(fn, *types, space=SearchSpace(sizes=(), states=1_000))
    assert result.report.refused == 0
    assert result.graph.kernels()


def test_bounds_that_are_infinite_end_a_branch() -> None:
    def deep(x, rows, columns):  # type: ignore[no-untyped-def]
        normed = mg.layer_norm(columns)
        v = normed @ columns.mT @ normed
        return mg.maximum(mg.attention(v, v, rows).unsqueeze(-1), x)

    size = mg.Dim("B", 1, 64)
    result = found(
        deep,
        mg.f32[3584],
        mg.f32[3584, 3],
        mg.f32[3584, size],
        space=SearchSpace(sizes=(), states=1_000, entries=50_000),
    )
    assert result.report.predicted_seconds <= result.report.candidates[-1].seconds


def test_what_becomes_an_exponent_element_by_element_lies_in_memory_in_f32() -> None:
    types = (mg.bf16[16, 1024], mg.bf16[1024, 512])
    for capped in (lambda z: mg.minimum(mg.maximum(z, -20.0), 20.0), lambda z: 30 * mg.tanh(z / 30), mg.relu):
        graph = found(lambda x, w, capped=capped: mg.softmax(capped(x @ w)), *types).graph
        between = [t for e in graph.equations[:-1] for t in e.targets]
        assert all(t.dtype is DType.f32 for t in between)
    narrow = found(lambda x, w: mg.relu(mg.rms_norm(x @ w)) @ w.mT, *types).graph
    assert any(t.dtype is DType.bf16 for e in narrow.equations[:-1] for t in e.targets)


@pytest.mark.parametrize(("through", "kept"), [(lambda h: h, "f32"), (lambda h: h.half().float(), "f16")])
def test_what_a_program_keeps_in_f32_lies_there_in_f32(through: Callable[[Tensor], Tensor], kept: str) -> None:
    """Although it gives back f16; what it keeps in f16 lies in f16."""

    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (through(mg.gelu(x @ w)) @ v.float()).half()

    program = mg.trace(fn, [mg.f32[mg.Dim("B"), 4096], mg.f32[4096, 4096], mg.f16[4096, 4096]], "mixed")
    graph = search(program, accept=lambda g: verify(program, finished(g)), space=SearchSpace(sizes=())).graph
    hidden = [t for e in graph.equations for t in e.targets if t.name not in {o.value for o in graph.outputs}]
    assert {t.dtype.value for t in hidden} >= {kept}
    if kept == "f32":
        assert {t.dtype.value for t in hidden} == {"f32"}
