"""Plans for a CPU: the algebra that makes calls on whole tensors cheap."""

from __future__ import annotations

import math

import pytest

import mugraph as mg
from mugraph.errors import GraphError
from mugraph.ir.graph import KernelGraph, Program, equations_of
from mugraph.ir.ops import Contract, Kernel
from mugraph.search.cost import CPU, GPU, device, sheet_devices
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify

N, FEW = 256, 8


def found(program: Program, on: str = "cpu", **fields: object) -> Found:
    """The result, verified."""
    space = SearchSpace(sizes=()).but(**fields)
    return search(program, accept=lambda graph: verify(program, graph), space=space, on=device(on))


def contractions(graph: KernelGraph) -> list[int]:
    """The multiply-adds of each contraction of what each call does, over whole tensors."""
    parts = graph.divided()
    volumes = []
    for e in (parts[1] if parts else graph).equations:
        assert isinstance(e.op, Kernel), "the program as it stands"
        for block in e.op.blocks:
            tensors = block.tensors()
            for inner in equations_of(tuple(block.steps())):
                if isinstance(inner.op, Contract):
                    over = {a.name: a.size for n in inner.args for a in tensors[n].axes}
                    volumes.append(math.prod(size for size in over.values() if isinstance(size, int)))
    return sorted(volumes)


@mg.program
def chain(a: mg.f32[N, FEW], b: mg.f32[FEW, N], c: mg.f32[N, FEW]):
    return a @ b @ c


@mg.program
def column_sums(a: mg.f32[N, N], b: mg.f32[N, N]):
    return mg.sum(a @ b, 0)


@mg.program
def factored(a: mg.f32[N, N], b: mg.f32[N, N], x: mg.f32[N, N]):
    return a @ x + b @ x


@mg.program
def folded(x: mg.f32[N, N], w: mg.constant(mg.f32[N, N]), u: mg.constant(mg.f32[N, FEW])):
    return x @ w @ u


@pytest.mark.parametrize(
    ("program", "volumes"),
    [
        (chain, [N * FEW * FEW, N * FEW * FEW]),  # B C first
        (column_sums, [N * N]),  # (Σ a) b
        (factored, [N**3]),  # (a + b) x
        (folded, [N * N * FEW]),  # w u ahead
    ],
    ids=lambda x: x.name if isinstance(x, Program) else "",
)
def test_a_plan_has_the_cheapest_products(program: Program, volumes: list[int]) -> None:
    plan = found(program)
    assert plan.report.candidates[0].verdict == "chosen"
    assert contractions(plan.graph) == volumes


def test_what_cannot_be_improved_stays() -> None:
    @mg.program
    def product(a: mg.f32[N, N], b: mg.f32[N, N]):
        return mg.silu(a @ b)

    assert found(product).report.candidates[-1].verdict == "chosen"


def test_several_outputs_share_what_they_need() -> None:
    @mg.program
    def both(a: mg.f32[N, N], b: mg.f32[N, N], c: mg.f32[N, N]):
        t = mg.exp(a @ b)
        return mg.sum(t @ c, 0), t

    plan = found(both)
    assert contractions(plan.graph) == [N * N, N**3]
    assert len(plan.graph.kernels()) == 1


def test_names_do_not_matter() -> None:
    @mg.program
    def chain_too(second: mg.f32[FEW, N], third: mg.f32[N, FEW], first: mg.f32[N, FEW]):
        return first @ second @ third

    assert contractions(found(chain_too).graph) == contractions(found(chain).graph)


def test_why_not_is_asked_of_searches_for_a_gpu() -> None:
    with pytest.raises(GraphError, match="cheapest plan alone"):
        found(chain).report.why_not(chain)


def test_one_description_is_of_a_cpu() -> None:
    assert device("cpu").kind == CPU
    assert [d.kind for d in sheet_devices().values()].count(GPU) == len(sheet_devices()) - 1
