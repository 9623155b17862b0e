"""What constant inputs alone determine is computed once, ahead of the calls, where that makes calls cheaper."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import mugraph as mg
from benchmarks.programs import PROGRAMS
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import TensorSpec, constant, f16, f32, trace
from mugraph.ir.axes import Dim
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.ops import Library
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType
from mugraph.pipeline import DELTA, finished
from mugraph.runtime.load import load_module
from mugraph.search.build import baseline
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.transpiler.torch import emit
from mugraph.verify.equivalence import verify
from tests.search.random_programs import programs as random_programs

B = Dim("B", 1, 4096)
Spec = TensorSpec


def program(fn: Callable[..., Tensor], x: Spec, *weights: Spec, constants: str = "all") -> Program:
    """`fn` traced with constant weights: all of them, or those whose place `constants` names."""
    chosen = [constant(w) if constants == "all" or str(i) in constants else w for i, w in enumerate(weights)]
    return trace(fn, [x, *chosen], "program")


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w + (x @ a) @ b


LORA = f16[B, 4096], f16[4096, 4096], f16[4096, 16], f16[16, 4096]
SMALL_LORA = f16[B, 512], f16[512, 256], f16[512, 16], f16[16, 256]
ONE_SIZE = SearchSpace(sizes=())


def found(p: Program, space: SearchSpace = ONE_SIZE) -> Found:
    """What the search finds; every μGraph that it chooses is verified."""
    return search(
        p, accept=lambda graph: verify(p if space.ahead else p.without_constants(), finished(graph)), space=space
    )


def work(graph: KernelGraph) -> tuple[list[Equation], list[Equation]]:
    """The equations that run ahead and those of each call."""
    ahead = list(graph.ahead())
    return ahead, [e for e in graph.equations if e not in ahead]


# -- what is folded


def test_a_low_rank_update_is_folded_into_the_weight() -> None:
    result = found(program(lora, *LORA))
    ahead, calls = work(result.graph)
    assert sorted(a for e in ahead for a in e.args if a in "wab") == ["a", "b", "w"]
    (matmul,) = calls
    assert matmul.args == ("x", ahead[-1].target.name)
    assert {a.name for a in ahead[-1].target.axes} == {a.name for a in result.graph.input("w").tensor.axes}
    assert ahead[-1].target.dtype is DType.f16


def test_its_cost_is_counted_apart() -> None:
    report = found(program(lora, *LORA)).report
    without = found(program(lora, *LORA), ONE_SIZE.but(ahead=False)).report
    assert report.predicted_seconds == pytest.approx(sum(k.seconds for k in report.kernels))
    assert report.predicted_seconds < without.predicted_seconds
    assert report.ahead_seconds == pytest.approx(sum(k.seconds for k in report.ahead))
    assert report.ahead_seconds > 0
    assert without.ahead == ()
    assert "ahead, once" in str(report)
    assert "ahead" not in str(without).replace("ahead=False", "")
    assert report.to_dict()["ahead_seconds"] == report.ahead_seconds
    assert report.floor_seconds <= report.predicted_seconds


def test_factors_whose_product_is_smaller_are_multiplied_ahead() -> None:
    result = found(program(lambda x, u, w: x @ u @ w, f16[B, 4096], f16[4096, 1024], f16[1024, 256]))
    ((product,), (matmul,)) = work(result.graph)
    assert set(product.args) == {"u", "w"}
    assert matmul.args == ("x", product.target.name)


def test_factors_whose_product_takes_more_memory_than_is_allowed_are_not() -> None:
    result = found(program(lambda x, u, w: x @ u @ w, f16[B, 4096], f16[4096, 16], f16[16, 4096]))
    assert work(result.graph)[0] == []


def test_a_scale_is_folded_into_the_weight_where_it_takes_a_launch_away() -> None:
    result = found(program(lambda x, g, w: (x * g) @ w, f16[B, 4096], f16[4096], f16[4096, 4096]))
    ((scaled,), (matmul,)) = work(result.graph)
    assert set(scaled.args) == {"g", "w"}
    assert isinstance(matmul.op, Library)


# -- what is not


def test_a_plan_without_ahead_work_wins_a_tie() -> None:
    """The multiplication by g hides behind the loads of w, so that folding it would save next to nothing."""
    p = program(lambda x, g, w: mg.rms_norm(x, g) @ w, f16[B, 4096], f16[4096], f16[4096, 6144])
    result = found(p)
    assert work(result.graph)[0] == []
    assert result.report.ahead == ()
    assert any(
        "less than the model is sure of" in c.verdict and "ahead" in c.structure for c in result.report.candidates
    )


@pytest.mark.parametrize("constants", ["", "0", "1", "2"])
def test_constants_that_determine_nothing_together_change_nothing(constants: str) -> None:
    p = program(lora, *LORA, constants=constants)
    graph = found(p).graph
    assert work(graph)[0] == []
    assert graph.equations == found(p.without_constants()).graph.equations


def test_the_space_may_forbid_it() -> None:
    result = found(program(lora, *LORA), ONE_SIZE.but(ahead=False))
    assert not any(i.constant for i in result.graph.inputs)
    assert result.graph.equations == found(program(lora, *LORA).without_constants()).graph.equations


def test_a_value_that_must_stay_inside_is_not_kept() -> None:
    p = program(lambda x, u, w: x @ (u @ w), f16[B, 4096], f16[4096, 1024], f16[1024, 256])
    (product,) = (e.target.name for e in p.equations if set(e.args) == {"u", "w"})
    assert len(work(found(p).graph)[0]) == 1
    assert work(found(p, ONE_SIZE.but(inside=(product,))).graph)[0] == []


def test_what_is_divided_later_is_not_kept_in_half_precision() -> None:
    """A weighted row before it is divided by its norm is of another scale than all that the program keeps."""

    def fn(x: Tensor) -> Tensor:
        return mg.layer_norm(x, mg.sum(x * x, 0)).half()

    def kept(p: Program) -> list[str]:
        return [t.name for e in found(p).graph.ahead() for t in e.targets]

    p = trace(fn, [constant(f32[2, 257])], "weighted")
    assert kept(p)
    assert set(kept(p)) <= set(p.tensors())


def test_each_call_gives_its_own_outputs() -> None:
    """An output is new at each call, even one that constants alone determine."""

    def fn(x: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        product = u @ w
        return x @ product, product

    graph = found(program(fn, f16[B, 512], f16[512, 64], f16[64, 256])).graph
    outputs = {o.value for o in graph.outputs}
    assert not any(t.name in outputs for e in graph.ahead() for t in e.targets)


def test_a_value_that_depends_on_the_size_of_an_argument_is_not_fixed() -> None:
    """Another number of rows, another weight."""

    def rows(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return x @ (u @ w * x.shape[0])

    weights = f16[64, 512], f16[512, 64]
    p = program(rows, f16[B, 64], *weights)
    product, scaled = (e.target.name for e in p.equations if e.target.axes and e.target.name != p.outputs[0].value)
    assert p.fixed()[product] == {"u", "w"}
    assert scaled not in p.fixed()
    assert all(set(e.args) == {"u", "w"} for e in found(p).graph.ahead())


def test_names_and_the_order_of_inputs_do_not_matter() -> None:
    p = program(lora, *SMALL_LORA)
    shuffled = replace(p, inputs=tuple(reversed(p.inputs)))
    one, other = found(p), found(shuffled)
    assert one.report == replace(other.report, notes=one.report.notes)  # which name the constants in their order
    assert len(one.graph.ahead()) == len(other.graph.ahead()) == 1


# -- the graph


def graph_of_lora() -> KernelGraph:
    return finished(found(program(lora, *SMALL_LORA)).graph)


def test_ahead_work_is_derived_printed_and_parsed_back() -> None:
    graph = graph_of_lora()
    text = str(graph)
    assert text.count("# ahead") == 1
    assert parse_program(text) == graph
    varying = replace(graph, inputs=tuple(replace(i, constant=i.name != "a" and i.constant) for i in graph.inputs))
    assert varying.ahead() == ()
    assert varying.divided() is None


def test_a_divided_graph_computes_the_same() -> None:
    graph = graph_of_lora()
    parts = graph.divided()
    assert parts is not None
    first, rest = parts
    assert [i.name for i in first.inputs] == ["w", "a", "b"]
    assert [i.name for i in rest.inputs] == ["x", "w", "a", "b", first.outputs[0].value]
    assert first.equations + rest.equations == graph.equations


def test_a_constant_that_the_program_overwrites_fixes_nothing() -> None:
    graph = graph_of_lora()
    (output,) = graph.outputs
    assert replace(graph, outputs=(replace(output, alias_of="w"),)).ahead() == ()


def test_the_pipeline_accepts_what_is_folded(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    p = program(lora, *SMALL_LORA)
    result = mg.superoptimize(p, target="torch")
    assert len(result.graph.ahead()) == 1
    assert "numerics" in result.certificate.tiers
    assert result.certificate.delta_log2 < -40
    assert DELTA == 2.0**-40
    assert any("is computed once from w, a, b" in n for n in result.notes)
    plain = mg.superoptimize(p, target="torch", space=SearchSpace(ahead=False))
    assert "Kept" not in plain.source


# -- any program


def constant_but_x(p: Program) -> Program:
    return replace(p, inputs=tuple(replace(i, constant=i.name != "x") for i in p.inputs))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(random_programs())
def test_random_programs_with_constants_follow_them(p: Program) -> None:
    follows(constant_but_x(p))


@pytest.mark.full
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(random_programs(depth=4))
def test_many_random_programs_with_constants_follow_them(p: Program) -> None:
    follows(constant_but_x(p))


def follows(p: Program) -> None:
    """The result is verified, no costlier than the source, and computes the source before and after an update."""
    result = found(p)
    *_, source = result.report.candidates
    assert result.report.predicted_seconds <= source.seconds * (1 + 1e-9)
    graph = result.accepted.graph  # type: ignore[attr-defined]
    if not graph.ahead():
        return
    run, wanted = load_module(emit(graph), "folded").run, load_module(emit(baseline(p)), "source").run
    generator = torch.Generator().manual_seed(0)
    args = [
        torch.randn([s if isinstance(s, int) else 4 for s in i.tensor.shape], generator=generator) for i in p.inputs
    ]
    for _ in range(3):
        results, expected = run(*args), wanted(*args)
        torch.testing.assert_close(results, expected, rtol=5e-3, atol=5e-3, equal_nan=True)
        for t in args[1:]:
            t.mul_(0.5)


def notes(name: str, **changes: Any) -> str:
    found = search(PROGRAMS[name], accept=lambda graph: graph, space=ONE_SIZE.but(**changes))
    return "\n".join(found.report.notes)


def test_what_is_kept_in_f16_beside_the_program_is_said() -> None:
    assert "materialised0: in memory in f16, though no value of the program" in notes("two_weights")
    assert "f16" not in notes("two_weights", ahead=False)
    assert "f16" not in notes("rope_attention")


def test_differences_that_are_multiplied_out_are_said() -> None:
    assert "Σk (X - Σk X / |k|)·(X - Σk X / |k|) is multiplied out" in notes("layernorm", differences=True)
    assert "multiplied out" not in notes("layernorm")
    assert "multiplied out" not in notes("rmsnorm")
    assert "multiplied out" not in notes("softmax")
