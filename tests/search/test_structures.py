"""The structures that a search finds from naive definitions, at the true sizes, with a symbolic number of rows."""

import math
from collections.abc import Callable
from functools import cache

import pytest

from benchmarks.programs import FAMILIES, PROGRAMS
from mugraph.dsl.trace import f16
from mugraph.ir.axes import Axis, representative
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, KernelGraph, Program, equations_of
from mugraph.ir.ops import Contract, Elementwise, Kernel, Library, Reduce
from mugraph.pipeline import finished
from mugraph.search.driver import Found, search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify
from tests.search import programs
from tests.search.disguise import disguised

ONE_LAUNCH = SearchSpace(split=False)


def found(program: Program, space: SearchSpace | None = None) -> Found:
    return search(program, accept=lambda graph: graph, space=space)


@cache
def graph_of(name: str, space: SearchSpace | None = None) -> KernelGraph:
    program: Callable[[], Program] = getattr(programs, name)
    return found(program(), space).graph


def only_block(graph: KernelGraph) -> BlockGraph:
    """The block graph of a μGraph that is one kernel."""
    (equation,) = graph.equations
    assert isinstance(equation.op, Kernel)
    (block,) = equation.op.blocks
    return block


def only_loop(block: BlockGraph):  # type: ignore[no-untyped-def]
    (looped,) = (p for p in block.passes if p.loops)
    return looped


def sources(loads) -> list[str]:  # type: ignore[no-untyped-def]
    return sorted(ld.source for ld in loads)


def functions(steps) -> list[str]:  # type: ignore[no-untyped-def]
    return [e.op.fn for e in equations_of(tuple(steps)) if isinstance(e.op, Elementwise)]


# -- the four programs


def test_rmsnorm_linear_divides_after_the_matmul() -> None:
    block = only_block(graph_of("rmsnorm_linear"))
    loop = only_loop(block)
    assert [a for a, _ in block.grid] == ["b", "n"]
    assert loop.loops[0][0] == "k"
    assert sorted(len(a.target.axes) for a in loop.accumulators) == [1, 2]
    assert all(a.monoid == "sum" for a in loop.accumulators)
    assert sources(block.all_loads()) == ["g", "w", "x"]
    assert functions(loop.body) == ["mul"]
    assert functions(block.epilogue)[-1] == "div"


@pytest.mark.parametrize("n", [4096, 11008, 14336])
def test_gated_mlp_loads_x_once(n: int) -> None:
    block = only_block(found(programs.gated_mlp(n=n)).graph)
    loop = only_loop(block)
    assert len(loop.accumulators) == 2
    assert sources(block.all_loads()) == ["w1", "w2", "x"]
    assert sorted(functions(block.epilogue)) == ["mul", "silu"]
    assert functions(loop.body) == []


def test_lora_multiplies_by_b_in_the_epilogue() -> None:
    block = only_block(graph_of("lora"))
    loop = only_loop(block)
    assert len(loop.accumulators) == 2
    assert sources(loop.loads) == ["a", "w", "x"]
    assert sources(block.loads) == ["b"]
    low_rank = next(a.target.name for a in loop.accumulators if a.equation.target.axes[-1].size == 16)
    (contraction,) = (e for e in equations_of(block.epilogue) if isinstance(e.op, Contract))
    assert low_rank in contraction.args
    assert functions(block.epilogue) == ["add"]


@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_attention_in_one_launch_is_one_pass_over_the_keys(name: str) -> None:
    graph = graph_of(name, ONE_LAUNCH.but(kernels=1, symbolic=1024))
    block = only_block(graph)
    loop = only_loop(block)
    keys = {a.name: a.size for p in (graph,) for a in p.axes().values()}
    assert keys[loop.loops[0][0]] == 4096
    assert block.split is None
    assert [a.monoid for a in loop.accumulators] == ["sum", "sum"]
    assert sources(block.all_loads()) == ["k", "q", "v"]
    assert functions(block.epilogue) == ["div"]
    stable = only_loop(only_block(finished(graph)))
    assert sorted(a.monoid for a in stable.accumulators) == ["max", "rescaled", "rescaled"]
    (maximum,) = (a for a in stable.accumulators if a.monoid == "max")
    assert {a.scale for a in stable.accumulators if a.monoid == "rescaled"} == {maximum.target.name}


def test_attention_at_decode_size_is_split_with_a_derived_combine() -> None:
    graph = graph_of("gqa")
    block = only_block(graph)
    assert block.split is not None
    assert block.combine is not None
    assert {s.kind for s in block.stores} == {"partial"}
    assert sources(block.combine.all_loads()) == sorted(s.target for s in block.stores)
    closing = [e for e in equations_of(tuple(block.combine.steps())) if isinstance(e.op, Reduce)]
    assert [e.op.axes for e in closing] == [(block.split.part.name,)] * 2
    assert functions(block.combine.steps())[-1] == "div"
    stable = only_block(finished(graph)).combine
    assert stable is not None
    assert "max" in [e.op.kind for e in equations_of(tuple(stable.steps())) if isinstance(e.op, Reduce)]


@pytest.mark.parametrize("name", ["qk_norm_attention", "ntrans", "layernorm_linear", "linear_bias_residual"])
def test_next_programs_are_one_kernel(name: str) -> None:
    only_block(graph_of(name, ONE_LAUNCH))


def test_qk_norm_attention_is_one_pass_over_the_keys() -> None:
    block = only_block(graph_of("qk_norm_attention", ONE_LAUNCH))
    assert sources(block.all_loads()) == ["k", "q", "v"]
    assert len(only_loop(block).accumulators) == 2


def test_layernorm_linear_has_bias_and_gelu_in_the_epilogue() -> None:
    block = only_block(graph_of("layernorm_linear", ONE_LAUNCH))
    assert "c" in sources(block.loads)
    assert functions(block.epilogue)[-1] == "gelu"
    assert "sqrt" in functions(block.epilogue)


def test_linear_bias_residual_loads_both_late() -> None:
    block = only_block(graph_of("linear_bias_residual", ONE_LAUNCH))
    assert sources(block.loads) == ["bias", "r"]
    assert sources(only_loop(block).loads) == ["w", "x"]


def test_a_row_too_long_for_a_tile_is_read_in_two_passes() -> None:
    block = only_block(found(programs.softmax(128_000, f16), ONE_LAUNCH.but(kernels=1, symbolic=4096)).graph)
    assert len([p for p in block.passes if p.loops]) == 2


# -- all programs, at 16 rows


AT_16 = SearchSpace(sizes=())


@cache
def verified(name: str, variant: str = "", space: SearchSpace = AT_16) -> Found:
    """What is found of a benchmark's program, as the pipeline accepts it."""
    program = FAMILIES[name].variants[variant] if variant else PROGRAMS[name]
    result = search(program, accept=lambda graph: verify(program, finished(graph)), space=space)
    assert result.report.refused == 0, str(result.report)
    return result


def launches(graph: KernelGraph) -> list[Equation]:
    """Kernels and library calls: what is not a view."""
    return [e for e in graph.equations if isinstance(e.op, Kernel | Library)]


ONE_KERNEL = (
    ("rmsnorm_linear", ""),
    ("gated_mlp", "N 4096"),
    ("gated_mlp", "N 11008"),
    ("gated_mlp", "N 14336"),
    ("lora", ""),
    ("lora", "published, tiny"),
    ("qk_norm_attention", "4096 keys"),
    ("qk_norm_attention", "1024 keys"),
    ("ntrans", ""),
    ("layernorm_linear", ""),
    ("linear_bias_residual", "SiLU"),
    ("linear_bias_residual", "GELU"),
    ("linear_bias_residual", "ReLU²"),
    ("linear_bias_residual", "none"),
    ("mha", "4096 keys"),
    ("mha", "causal"),
    ("mha", "causal, 4096 keys"),
    ("mqa", "4096 keys"),
    ("mqa", "causal"),
    ("rope_attention", ""),
    ("gqa", "published script"),
    ("cross_entropy", "1009 columns"),
    ("cross_entropy", "128256 columns"),
    ("logsumexp", "131071 columns"),
    ("softmax", "1000 columns"),
    ("softmax", "131071 columns"),
    ("layernorm", "1009 columns"),
    ("rmsnorm", "128256 columns"),
)


@pytest.mark.parametrize(("name", "variant"), ONE_KERNEL)
def test_programs_that_are_one_kernel(name: str, variant: str) -> None:
    graph = verified(name, variant).graph
    (launch,) = launches(graph)
    assert isinstance(launch.op, Kernel)
    assert len(launch.op.blocks) == 1


def test_a_program_of_two_large_matmuls_in_sequence_is_no_single_kernel() -> None:
    assert len(launches(verified("rmsnorm_gated_mlp").graph)) > 1


def elements(graph: KernelGraph, rows: int) -> dict[str, int]:
    """The size of every value of the graph, tiles over their whole axes."""
    tensors = dict(graph.tensors())
    for e in launches(graph):
        if isinstance(e.op, Kernel):
            for b in e.op.blocks:
                tensors |= b.tensors() | (b.combine.tensors() if b.combine else {})
    return {n: math.prod(representative(a.size, rows) for a in t.axes) for n, t in tensors.items()}


def test_a_chain_is_multiplied_in_the_cheap_order() -> None:
    found = verified("low_rank_chain")
    assert max(elements(found.graph, 16).values()) <= 4096 * 64
    naive = found.accepted.program.tensors().values()
    assert 4096 * 4096 in [math.prod(representative(a.size, 16) for a in t.axes) for t in naive]


@pytest.mark.parametrize("variant", ["16 heads", "128 heads", "16 heads, absorbed"])
def test_decoding_with_latents_absorbs_the_projections(variant: str) -> None:
    """Neither keys nor values of single heads are made: no value is over heads, keys and the head dimension."""
    found = verified("mla", variant, AT_16.but(symbolic=1))
    axes = {a.size for a in found.accepted.program.axes().values()}
    heads = int(variant.split()[0])
    assert {heads, 4096, 128} <= axes
    assert max(elements(found.graph, 1).values()) <= max(4096 * 512, heads * 512 * 128)
    naive = [t for t in found.accepted.program.tensors().values() if {a.size for a in t.axes} >= {heads, 4096, 128}]
    assert bool(naive) == ("absorbed" not in variant)


def test_constant_weights_are_added_ahead() -> None:
    found = verified("constant_lora")
    ahead, call = launches(found.graph)
    assert set(ahead.args) == {"W", "A", "Bm"}
    assert call.args == ("X", ahead.target.name)
    (only,) = launches(verified("lora").graph)  # its A and Bm change
    assert set(only.args) == {"X", "W", "A", "Bm"}


def test_two_constant_weights_are_multiplied_ahead() -> None:
    ahead, call = launches(verified("two_weights").graph)
    assert set(ahead.args) == {"W1", "W2"}
    assert "X" in call.args


# At most one launch for each gradient, and one for what must be materialised before.
BACKWARD = {
    ("swiglu_bwd", "with the products"): 4,
    ("swiglu_bwd", "14336 columns"): 1,
    ("rmsnorm_bwd", ""): 2,
    ("lora_bwd", ""): 4,
    ("attention_bwd", "log-sum-exp saved"): 3,
}


@pytest.mark.parametrize(("name", "variant"), BACKWARD)
def test_backward_programs_take_a_launch_for_each_gradient(name: str, variant: str) -> None:
    found = verified(name, variant)
    assert len(launches(found.graph)) <= BACKWARD[name, variant]
    assert found.report.predicted_seconds < found.report.candidates[-1].seconds


@pytest.mark.full
def test_attention_backward_with_the_softmax_computed_again_takes_no_more_launches_than_gradients() -> None:
    family = FAMILIES["attention_bwd"]
    found = verified("attention_bwd", "softmax again", family.space().but(sizes=()))
    assert len(launches(found.graph)) <= 3
    assert len(found.graph.kernels()) <= 3
    assert found.report.predicted_seconds < 152.9e-6  # {dQ, statistics} and {dK, dV} in two launches take 153.0 µs
    gradients = {o.value for o in found.graph.outputs}
    assert any(len(gradients.intersection(t.name for t in e.targets)) == 2 for e in found.graph.equations)


# -- the same structure under any names


def size_text(axis: Axis) -> str:
    return str(axis.size) if isinstance(axis.size, int) else "symbolic"


def summary(graph: KernelGraph) -> list[object]:
    """Roles, tiles, passes, accumulators, loads and functions of each launch, with no name in it."""
    axes = graph.axes()
    return [
        block_summary(b, axes) if b else "library"
        for e in graph.equations
        for b in (e.op.blocks if isinstance(e.op, Kernel) else (None,))
    ]


def block_summary(block: BlockGraph | None, axes: dict[str, Axis]) -> object:
    if block is None:
        return None
    sections = [(p.loops, p.loads, p.body) for p in block.passes] + [((), block.loads, block.epilogue)]
    return (
        sorted((size_text(axes[a]), tile) for a, tile in block.grid),
        (size_text(axes[block.split.axis]), block.split.parts) if block.split else None,
        [section_summary(*s, axes) for s in sections],
        block_summary(block.combine, axes),
    )


def section_summary(loops, loads, steps, axes) -> object:  # type: ignore[no-untyped-def]
    accumulators = [
        (type(s.equation.op).__name__, s.monoid, sorted(map(size_text, s.target.axes)))
        for s in steps
        if isinstance(s, Accumulator)
    ]
    others = [type(s.op).__name__ for s in steps if isinstance(s, Equation)]
    return (
        [(size_text(axes[a]), tile) for a, tile in loops],
        sorted(sorted(map(size_text, ld.value.axes)) for ld in loads),
        sorted(accumulators),
        sorted(others) + sorted(functions(steps)),
    )


@pytest.mark.parametrize(
    ("name", "space"),
    [("rmsnorm_linear", None), ("gated_mlp", None), ("lora", None), ("gqa", None), ("gqa", ONE_LAUNCH)],
)
def test_other_names_and_orders_give_the_same_structure(name: str, space: SearchSpace | None) -> None:
    program = getattr(programs, name)()
    expected = summary(graph_of(name, space))
    for seed in range(2):
        other = found(disguised(program, seed), space).graph
        assert {i.name for i in other.inputs}.isdisjoint(i.name for i in program.inputs)
        assert summary(other) == expected


def test_the_summary_tells_structures_apart() -> None:
    all_of_them = [str(summary(graph_of(n))) for n in ("rmsnorm_linear", "gated_mlp", "lora", "gqa")]
    assert len(set(all_of_them)) == 4
    assert summary(graph_of("gqa")) != summary(graph_of("gqa", ONE_LAUNCH))


# -- sizes that are no power of two


ODD_SIZES = (1, 7, 997, 3584, 7168, 11008, 14336)
AT_ODD_SIZES: dict[str, Callable[[int], Program]] = {
    "rmsnorm_linear": lambda n: programs.rmsnorm_linear(n, 37),
    "rmsnorm_linear, wide": lambda n: programs.rmsnorm_linear(1009, n),
    "gated_mlp": lambda n: programs.gated_mlp(n, 101),
    "gated_mlp, wide": lambda n: programs.gated_mlp(13, n),
    "lora": lambda n: programs.lora(n, n, 3),
    "gqa": lambda n: programs.gqa(n, 20, 3, 5),
    "gqa, wide": lambda n: programs.gqa(67, n, 1, 2),
    "qk_norm_attention": lambda n: programs.qk_norm_attention(n, 19, 3),
    "ntrans": programs.ntrans,
}


@pytest.mark.parametrize("n", ODD_SIZES)
@pytest.mark.parametrize("name", AT_ODD_SIZES)
def test_any_static_size_is_searched_and_verified(name: str, n: int) -> None:
    program = AT_ODD_SIZES[name](n)
    result = search(program, accept=lambda graph: verify(program, finished(graph)), space=AT_16.but(library=n > 1000))
    assert result.report.refused == 0, str(result.report)
    assert launches(result.graph)


@pytest.mark.parametrize("keys", [1, 7, 997])
def test_attention_over_any_number_of_keys(keys: int) -> None:
    program = programs.mha(keys, 8, 3)
    result = search(program, accept=lambda graph: verify(program, finished(graph)), space=ONE_LAUNCH.but(library=False))
    assert result.report.refused == 0
    only_block(result.graph)
