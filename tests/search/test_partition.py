"""Roles and prices: what the settings of the space exclude does not come out, and what is invalid is refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings

import mugraph.dsl.functions as mg
from mugraph.dsl.trace import f32, trace
from mugraph.errors import SettingError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel
from mugraph.search import values as v
from mugraph.search.cost import device
from mugraph.search.driver import Found, search
from mugraph.search.extract import Derivation
from mugraph.search.footprint import Footprint
from mugraph.search.partition import Choice, Partition, Tilings, partition, power_of_two
from mugraph.search.setup import exponential_degree, may_be_materialised
from mugraph.search.space import SearchSpace
from tests.search import programs
from tests.search.programs import SMALL
from tests.search.random_programs import programs as random_programs
from tests.search.test_extract import problem_of


def blocks_of(graph: KernelGraph):  # type: ignore[no-untyped-def]
    return [b for e in graph.kernels() if isinstance(e.op, Kernel) for b in e.op.blocks]


def found(program: Program, space: SearchSpace) -> Found:
    return search(program, accept=lambda graph: None, space=space)


def plans_of(program: Program, space: SearchSpace) -> tuple[list[list[Choice]], Partition]:
    problem, targets = problem_of(program, space)
    return partition(problem, space, (targets,), lambda: False)


# -- roles


@settings(max_examples=20)
@given(random_programs(depth=2))
def test_no_axis_has_two_roles(program: Program) -> None:
    space = SearchSpace()
    problem, targets = problem_of(program, space)
    if not targets:
        return
    seen = set()
    for roles in Partition(problem, space).roles(targets, 1):
        assert len(set(roles.grid)) == len(roles.grid)
        assert set(roles.grid).isdisjoint(roles.loops)
        assert len(roles.passes) <= space.passes
        assert roles.split is None or (len(roles.passes) == 1 and roles.passes == ((roles.split[0],),))
        assert all(set(roles.grid) <= set(problem.axes(t)) for t in targets)
        seen.add(roles)
    assert len(seen) == len(list(Partition(problem, space).roles(targets, 1)))


def test_splits_leave_two_tiles_to_each_part() -> None:
    space = SearchSpace()
    problem, targets = problem_of(programs.gqa(), space)
    run = Partition(problem, space)
    splits = [r for r in run.roles(targets, 1) if r.split]
    assert splits
    for roles in splits:
        assert roles.split is not None
        axis, parts = roles.split
        assert parts == power_of_two(parts) >= 2
        tiles = run.default_tiles(targets, roles, 1)
        if not roles.grid:  # the whole result in every block
            tiles = run.fitted(targets, roles, tiles)
        assert parts * 2 * tiles[axis] <= problem.sizes[axis]


# -- settings of the space


PROGRAMS = ["rmsnorm_linear", "gated_mlp", "lora", "gqa"]


def test_one_kernel_of_ours_and_nothing_else() -> None:
    space = SearchSpace(kernels=1, library=False)
    for name in PROGRAMS:
        graph = found(getattr(programs, name)(), space).graph
        assert len(graph.equations) == len(graph.kernels()) == 1


def test_no_library_calls() -> None:
    for name in [*PROGRAMS, "chain"]:
        plans, _ = plans_of(SMALL[name](), SearchSpace(library=False))
        assert plans
        assert all(isinstance(choice.how, Derivation) for plan in plans for choice in plan)


def test_a_contraction_of_inputs_may_be_a_library_call() -> None:
    """Where fixed tiles make our own matmul slow, the library has it, and our kernel the rest."""
    space = SearchSpace(tiles=(("n", 16), ("k", 32)))
    names = [type(e.op).__name__ for e in found(programs.gated_mlp(), space).graph.equations]
    assert names == ["Library", "Library", "Kernel"]
    names = [type(e.op).__name__ for e in found(programs.gated_mlp(), space.but(library=False)).graph.equations]
    assert "Kernel" not in names or "Library" not in names


def test_no_splits() -> None:
    assert any(b.split for b in blocks_of(found(programs.gqa(), SearchSpace()).graph))
    for name in PROGRAMS:
        plans, _ = plans_of(getattr(programs, name)(), SearchSpace(split=False))
        roles = [choice.how.roles for plan in plans for choice in plan if isinstance(choice.how, Derivation)]
        assert roles
        assert all(r.split is None for r in roles)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_no_more_passes_than_allowed(passes: int) -> None:
    plans, _ = plans_of(programs.own_softmax(60_000), SearchSpace(passes=passes, split=False))
    counts = {len(choice.how.roles.passes) for plan in plans for choice in plan if isinstance(choice.how, Derivation)}
    assert max(counts) == passes if plans else passes == 0


def test_fixed_tiles_are_kept_and_others_chosen() -> None:
    free = found(programs.gated_mlp(), SearchSpace()).graph
    fixed = found(programs.gated_mlp(), SearchSpace(tiles=(("n", 32), ("k", 128)))).graph
    (one,), (other,) = blocks_of(free), blocks_of(fixed)
    assert (other.tiles()["n"], other.tiles()["k"]) == (32, 128)
    assert (one.tiles()["n"], one.tiles()["k"]) != (32, 128)
    assert "b" in other.tiles()


def test_tiles_fit_the_device() -> None:
    for name in PROGRAMS:
        plans, run = plans_of(getattr(programs, name)(), SearchSpace())
        for choice in (c for plan in plans for c in plan if isinstance(c.how, Derivation)):
            tiles = {a: np.array([float(size)]) for a, size in choice.how.tiles}
            excess, seconds, _ = run.fit([Tilings(choice.how, Footprint(run.p, choice.how), tiles)])
            assert excess == 0
            assert seconds == choice.prediction.seconds


@pytest.mark.parametrize("name", ["gated_mlp", "lora", "mha", "rmsnorm_linear"])
def test_kernels_that_are_tiled_together_get_the_tiles_of_each_alone(name: str) -> None:
    problem, targets = problem_of(getattr(programs, name)(), SearchSpace())
    run = Partition(problem, SearchSpace())
    several = run.derivations(targets[:1], True, 4.0)
    assert len(several) > 2
    assert run.tiled(several) == [Partition(problem, SearchSpace()).tiled([d])[0] for d in several]
    assert run.tiled([]) == []


def test_plans_materialise_what_they_load_first() -> None:
    for name in ("chain", "lora", "layernorm_linear", "two_outputs"):
        plans, _ = plans_of(SMALL[name](), SearchSpace())
        assert plans
        for plan in plans:
            done: set[int] = set()
            for choice in plan:
                assert set(choice.needs) <= done
                done.update(choice.roots)


def test_a_plan_whose_needs_cannot_be_had_is_no_plan() -> None:
    """Told to stop before a needed value has its kernel, the partition leaves out what needs it."""
    for limit in (0, 3, 30):
        space = SearchSpace()
        problem, targets = problem_of(SMALL["layernorm_linear"](), space)
        polls = iter(range(10_000))
        plans, run = partition(problem, space, (targets,), lambda n=limit, i=polls: next(i) >= n)  # type: ignore[misc]
        for plan in plans:
            made = {r for choice in plan for r in choice.roots}
            assert all(set(choice.needs) <= made for choice in plan)
            assert math.isfinite(sum(map(run.total, plan)))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"laws": ("strip-min",)}, "strip-min"),
        ({"passes": 3}, "passes"),
        ({"passes": -1}, "passes"),
        ({"kernels": -1}, "kernels"),
        ({"nodes": 0}, "nodes"),
        ({"states": 0}, "states"),
        ({"symbolic": 0}, "symbolic"),
        ({"tiles": (("n", 48),)}, "48"),
        ({"tiles": (("n", 0),)}, "0"),
        ({"tiles": (("n", 64), ("k", 8), ("n", 32))}, "tiles names n twice"),
        ({"grid": ("b", "n", "b")}, "grid names b twice"),
        ({"inside": ("t", "t")}, "inside names t twice"),
    ],
)
def test_invalid_spaces_are_refused(bad: dict[str, object], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        SearchSpace(**bad)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=named):
        SearchSpace().but(**bad)


def test_a_space_prints_as_what_made_it() -> None:
    space = SearchSpace(split=False, tiles=(("n", 64),))
    assert eval(str(space), {"SearchSpace": SearchSpace}) == space


# -- what may lie in memory in 16 bits


def materialisable(program: Program) -> set[str]:
    problem, _ = problem_of(program, SearchSpace())
    return {v.text(problem.closure.classes[c].value) for c in problem.closure.order if may_be_materialised(problem, c)}


def test_exponentials_and_exponents_stay_out_of_16_bits() -> None:
    half = materialisable(programs.mha(64, 8, 2))
    assert not any("exp(" in text and "inv(" not in text for text in half)
    assert not any(text.startswith("Σ") and "exp(" not in text for text in half)
    single = materialisable(SMALL["softmax"]())
    assert not any("exp(" in text and "inv(" not in text for text in single)
    bare = materialisable(trace(lambda x: mg.exp(x) @ mg.exp(x).mT, [f32[16, 32]], "bare"))
    assert any("exp(" in text for text in bare)


def test_a_normalised_exponential_may_be_kept() -> None:
    problem, (root,) = problem_of(programs.softmax(64), SearchSpace())
    assert not exponential_degree(problem.closure.classes[root].value)
    inner = {c for e in problem.closure.classes[root].edges for c in e.children}
    assert all(exponential_degree(problem.closure.classes[c].value) for c in inner)


def test_devices_change_the_choice_not_the_values() -> None:
    program = programs.gated_mlp()
    graphs = [search(program, accept=lambda g: None, on=device(name)) for name in ("a100", "h100", "b200")]
    assert len({f.report.classes for f in graphs}) == 1
    assert len({f.report.predicted_seconds for f in graphs}) == 3
