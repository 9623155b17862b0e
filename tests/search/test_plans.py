"""Plans of several launches: joint kernels, launches side by side, values between kernels, ranges of sizes."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import benchmarks.programs as bench
import mugraph.dsl.functions as mg
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.trace import f16, f32, trace
from mugraph.errors import SettingError
from mugraph.ir.axes import Dim
from mugraph.ir.graph import BlockGraph, KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.pipeline import finished, optimize
from mugraph.search.cost import Work, beside, device, predict, predict_beside
from mugraph.search.driver import Found, search
from mugraph.search.partition import resized
from mugraph.search.setup import set_up, structure
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify
from tests.search import programs

ONE_SIZE = SearchSpace(sizes=())
OURS = ONE_SIZE.but(library=False)


def verified(program: Program, space: SearchSpace = ONE_SIZE) -> Found:
    return search(program, accept=lambda graph: verify(program, finished(graph)), space=space)


def blocks(graph: KernelGraph) -> list[BlockGraph]:
    return [b for e in graph.kernels() if isinstance(e.op, Kernel) for b in e.op.blocks]


# -- several outputs, several kernels


@pytest.mark.parametrize(
    ("program", "most"),
    [
        (bench.rmsnorm_bwd, 2),
        (bench.lora_bwd, 3),
        (bench.attention_bwd, 3),
        (bench.gated_mlp_bwd, 4),
        (bench.swiglu_bwd, 3),
        (bench.prenorm_attention, 3),
        (bench.rmsnorm_gated_mlp, 2),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_gradient_costs_at_most_a_kernel(program: Callable[[], Program], most: int) -> None:
    found = verified(program())
    assert 0 < len(found.graph.kernels()) <= most
    assert found.report.refused == 0


def test_one_kernel_may_have_several_outputs() -> None:
    """The row statistic of a norm's gradient is written beside the gradient, for the kernel that sums over rows."""
    graph = verified(bench.rmsnorm_bwd(), ONE_SIZE.but(beside=False)).graph
    assert max(len(e.targets) for e in graph.kernels()) == 2


def test_gradients_that_need_nothing_of_each_other_share_a_launch() -> None:
    """Computing the row statistic twice costs less than a launch."""
    found = verified(bench.rmsnorm_bwd())
    assert [len(b.stores) for b in blocks(found.graph)] == [1, 1]
    assert len(found.graph.kernels()) == 1
    assert (
        found.report.predicted_seconds
        < verified(bench.rmsnorm_bwd(), ONE_SIZE.but(beside=False)).report.floor_seconds + 4e-6
    )


def test_a_launch_of_two_kernels_takes_as_long_as_either() -> None:
    """The sum of all elements in one block would take a millisecond, however many blocks stand beside it."""
    program = trace(lambda x: (mg.sum(x * x, -1), mg.sum(x * x)), [f32[4096, 4096]], "sums")
    found = verified(program)
    least = verified(trace(lambda x: mg.sum(x * x), [f32[4096, 4096]], "total")).report.predicted_seconds
    assert least <= found.report.predicted_seconds < 2.5 * least
    assert all(c.seconds >= least for c in found.report.candidates)


def test_predictions_side_by_side() -> None:
    d = device()
    small = Work(blocks=132, trips=1, reads=(), written=1e3, writing=1.0, stage=0, resident=0, partial=0.0, products=(),
                 vector=1e3, accumulators=0, depth=1)  # fmt: skip
    slow = replace(small, blocks=1, vector=1e9)
    one, other, both = predict(small, d), predict(slow, d), predict_beside([small, slow], d)
    assert both.seconds >= other.seconds > one.seconds
    assert predict(beside([small, slow]), d).seconds < other.seconds


@pytest.mark.parametrize("shape", [(16_777_216,), (4096, 4096), (8, 1024, 1024), (4096, 11_008), (3, 7919)])
def test_a_sum_of_all_elements_is_split(shape: tuple[int, ...]) -> None:
    report = verified(trace(lambda x: mg.sum(x * x), [f32[shape]], "total")).report
    assert report.predicted_seconds < max(2.1 * report.floor_seconds, 7e-6)


def test_parts_of_unequal_length_are_joined_at_the_price_of_their_bytes() -> None:
    program = trace(
        lambda x, q, k: mg.concat([x @ q, x @ k], 1), [f16[16, 512], f16[512, 2048], f16[512, 256]], "projections"
    )
    found, ours = verified(program).report, verified(program, OURS).report
    assert found.predicted_seconds <= ours.predicted_seconds
    assert found.candidates[-1].seconds < 5e-5  # a cross product of the parts would take more


def test_a_value_that_two_others_are_made_of_is_found() -> None:
    """x³/x is x², of which x³ is made: what is made of what has an end at the inputs."""
    program = trace(lambda x, y, z: (mg.pow(x * y, 3) / x + z) ** 3, [f32[2], f32[2, 2], f32[2]], "powers")
    found = verified(program)
    assert found.report.stop.kind == "Saturated"
    assert len(found.graph.kernels()) == 1


# -- side by side


def two_matmuls() -> Program:
    def fn(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return mg.silu(x @ u), mg.relu(x @ v)

    return trace(fn, [f16[Dim("B", 1, 64), 512], f16[512, 256], f16[512, 1024]], "two_matmuls")


def test_independent_kernels_share_a_launch() -> None:
    together = verified(two_matmuls(), OURS)
    (launch,) = together.graph.kernels()
    assert isinstance(launch.op, Kernel)
    assert len(launch.op.blocks) == 2
    apart = verified(two_matmuls(), OURS.but(beside=False))
    assert len(apart.graph.kernels()) == 2
    assert together.report.predicted_seconds < apart.report.predicted_seconds


def test_a_kernel_is_never_beside_one_that_it_needs() -> None:
    program = trace(
        lambda x, u, v: mg.softmax(mg.softmax(x @ u) @ v), [f32[8, 256], f32[256, 256], f32[256, 256]], "chain"
    )
    for e in verified(program, OURS).graph.kernels():
        assert not set(e.args) & {t.name for t in e.targets}


def test_launches_side_by_side_compute_what_they_should() -> None:
    result = optimize(two_matmuls(), target="cuda:90", space=OURS)
    assert result.source.count("@triton.jit") == 3
    assert result.source.count("[(") == 1
    assert "numerics" in result.certificate.tiers


# -- splits


def test_partial_results_have_every_grid_axis() -> None:
    """The sum of exponentials lacks the axis of the values: each block stores its own copy."""
    found = verified(programs.mha(), OURS.but(grid=("b", "d", "e")))
    (block,) = blocks(found.graph)
    assert block.split is not None
    assert {a for a, _ in block.grid} == {"b", "d", "e"}
    assert found.report.refused == 0


def test_the_combine_goes_over_the_split_axis() -> None:
    """A softmax over a long row: parts of the sum, then the quotient, a tile of the row in each block."""
    found = verified(programs.softmax(128_256, f16), OURS)
    (block,) = blocks(found.graph)
    assert block.combine is not None
    assert "k" in dict(block.combine.grid)
    assert [s.kind for s in block.combine.stores] == ["write"]


# -- sums of exponentials between kernels


def test_a_sum_of_exponentials_lies_in_memory_with_its_exponent() -> None:
    program = programs.softmax(40_000, f16)
    space = OURS.but(split=False, passes=1, symbolic=4096)
    found = verified(program, space)
    first, second = finished(found.graph).kernels()
    assert [t.name.endswith("_exponent") for t in first.targets] == [False, True]
    assert first.targets[1].name in second.args
    x = (torch.randn((3, 40_000), generator=torch.Generator().manual_seed(0)) * 300).half()
    torch.testing.assert_close(optimize(program, target="torch", space=space)(x), torch.softmax(x, -1))


def test_library_calls_never_read_what_has_an_exponent() -> None:
    for program in (programs.softmax(128_000, f16), bench.attention_bwd()):
        graph = finished(verified(program).graph)
        scaled = {t.name.removesuffix("_exponent") for e in graph.kernels() for t in e.targets if "_exponent" in t.name}
        read = {a for e in graph.equations if isinstance(e.op, Library) for a in e.args}
        assert not scaled & read


# -- nests


def test_two_long_axes_are_closed_in_a_nest() -> None:
    program = trace(lambda x, y: mg.sum(mg.sum(x * y, axis=-1), axis=-1), [f32[264, 5000, 6000]] * 2, "inner")
    found = verified(program, OURS.but(split=False, kernels=1))
    (block,) = blocks(found.graph)
    assert any(len(p.loops) == 2 for p in block.passes)


# -- ranges


def test_structures_differ_by_size() -> None:
    found = search(bench.rmsnorm_linear(), accept=lambda graph: graph)
    first, last = found.structures[0], found.structures[-1]
    assert first.low == 1
    assert last.high is None
    for a, b in zip(found.structures[:-1], found.structures[1:], strict=True):
        assert b.low == (a.high or 0) + 1
        assert a.text != b.text
    assert len(first.graph.equations) == 1
    assert any(isinstance(e.op, Library) for e in last.graph.equations)
    assert len(found.report.structures) == len(found.structures)


def test_a_static_program_has_one_structure() -> None:
    program = trace(lambda x, w: x @ w, [f16[64, 128], f16[128, 64]], "static")
    (only,) = search(program, accept=lambda graph: graph).structures
    assert (only.low, only.high) == (1, None)


def test_every_structure_is_accepted_first() -> None:
    seen: list[KernelGraph] = []
    found = search(bench.rmsnorm_linear(), accept=seen.append)
    assert [s.graph for s in sorted(found.structures, key=lambda s: s.at != 16)] == seen


# -- what the space restricts


def test_a_kernel_loops_only_where_it_may() -> None:
    found = verified(programs.lora(), OURS.but(loops=()))
    assert not any(p.loops for b in blocks(found.graph) for p in b.passes)


def test_a_value_that_must_stay_inside_is_not_materialised() -> None:
    def stored(space: SearchSpace) -> set[str]:
        return {t.name for e in verified(bench.rmsnorm_gated_mlp(), space).graph.equations for t in e.targets}

    inner = next(iter(sorted(stored(ONE_SIZE) & {e.target.name for e in bench.rmsnorm_gated_mlp().equations[:-1]})))
    assert inner not in stored(ONE_SIZE.but(inside=(inner,)))


@pytest.mark.parametrize("which", ["input", "output"])
def test_an_input_or_output_cannot_stay_inside(which: str) -> None:
    program = programs.lora()
    name = program.inputs[0].name if which == "input" else program.outputs[0].value
    with pytest.raises(SettingError, match=f"{name}.*lies in memory"):
        verified(program, ONE_SIZE.but(inside=(name,)))


@pytest.mark.parametrize("setting", ["grid", "loops", "inside"])
def test_names_that_the_program_lacks_are_refused(setting: str) -> None:
    with pytest.raises(SettingError, match="nowhere"):
        verified(programs.lora(), ONE_SIZE.but(**{setting: ("nowhere",)}))


# -- plans at other sizes


def test_a_plan_of_one_size_is_a_plan_at_another() -> None:
    program = bench.rmsnorm_bwd()
    task, _ = set_up(program, lambda graph: graph, SearchSpace(), device())
    plan = task.choose(task.solve(16)).plan
    other = task.solve(64, [plan])
    (again,) = resized(other.run, [plan])
    assert structure(again, task.here.axes) == structure(plan, task.here.axes)
    assert again in other.plans
    assert other.run.cost(other.plans[0]) <= other.run.cost(again)


def test_a_plan_that_another_size_does_not_admit_is_none_there() -> None:
    split = bench.gqa()
    task, _ = set_up(split, lambda graph: graph, SearchSpace(), device())
    at = task.solve(16)
    plan = next(p for p in at.plans if any(d.roles.split for c in p for d in c.derivations))
    assert resized(at.run, [plan]) != []
    (choice,) = [c for c in plan if any(d.roles.split for d in c.derivations)][:1]
    d = choice.derivations[0]
    assert d.roles.split is not None
    odd = replace(choice, how=replace(d, roles=replace(d.roles, split=(d.roles.split[0], 3))))
    assert resized(at.run, [[odd]]) == []
    assert resized(at.run, [[odd], plan]) == resized(at.run, [plan])
