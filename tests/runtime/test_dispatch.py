"""Kernels launched from cubins: what the driver gets, for which arguments, from which thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.stub import Launched, Stub
from mugraph.codegen.lower import plan_graph
from mugraph.codegen.plan import Options
from mugraph.errors import CacheError, CompileError, LaunchError, TargetMismatchError
from mugraph.ir.axes import Axis, Dim, size_value
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Program, Store
from mugraph.ir.ops import Elementwise, Kernel
from mugraph.ir.types import DType, Input, Output, Storage, tensor
from mugraph.runtime import dispatch
from mugraph.runtime.aot import HOST, host_part, made
from mugraph.runtime.artefact import Artefact
from mugraph.runtime.compile import Compiler
from mugraph.runtime.dispatch import Direct, Dispatch, Host, Range, Recorded, Table
from mugraph.runtime.driver import Driver, Launch, Shape, Slot, driver_of
from mugraph.transpiler.torch import TORCH_DTYPES
from mugraph.transpiler.triton import emit
from tests.blocks import BLOCKS, softmax_in_tile
from tests.graphs import attention_fused, gated_mlp_fused, rmsnorm_linear_fused

L = Dim("L", 3, 40)


def scaled_ahead() -> KernelGraph:
    """x * (w + w), the sum ahead, both in kernels."""
    b, n = Axis("b", Dim("B", 1, 64)), Axis("n", 32)
    x, w, double, y = (
        tensor(name, axes, DType.f16) for name, axes in (("x", (b, n)), ("w", (n,)), ("d", (n,)), ("y", (b, n)))
    )

    def kernel(target: Any, fn: str, grid: Any, *sources: Any) -> Equation:
        tiles = [tensor(f"{s.name}_tile", s.axes, s.dtype) for s in sources]
        out = tensor("out_tile", target.axes, DType.f32)
        args = tuple(t.name for t in tiles) * (2 // len(tiles))
        loads = tuple(Load(t, s.name) for t, s in zip(tiles, sources, strict=True))
        block = BlockGraph(
            grid, None, (), loads, (Equation((out,), Elementwise(fn), args),), (Store("out_tile", target.name),)
        )
        return Equation((target,), Kernel((block,)), tuple(s.name for s in sources))

    equations = (kernel(double, "add", (("n", 32),), w), kernel(y, "mul", (("b", 4), ("n", 32)), x, double))
    inputs = (Input(x, Storage(DType.f16)), Input(w, Storage(DType.f16), constant=True))
    return KernelGraph("scaled_ahead", inputs, equations, (Output("y", Storage(DType.f16)),))


PROGRAMS: dict[str, Callable[[], KernelGraph]] = {
    "rmsnorm_linear": lambda: rmsnorm_linear_fused(DType.f16, 256, 128),
    "gated_mlp_bf16": lambda: gated_mlp_fused(DType.bf16, 256, 128),
    "split_attention": lambda: attention_fused(s_size=256, d_size=64, parts=2),
    "split_atomic": BLOCKS["split_atomic"],
    "two_results": BLOCKS["layernorm_linear"],
    "whole_rows": lambda: softmax_in_tile(DType.f16, L),
    "loop_of_any_length": BLOCKS["symbolic_loop"],
    "scaled_ahead": scaled_ahead,
}


@pytest.fixture(autouse=True)
def fresh(stub: Stub) -> None:
    stub.reset(90)


@pytest.fixture(scope="module")
def files(compiler: Compiler) -> Callable[[str], Mapping[str, bytes]]:
    """The artefact of each program for sm_90, made when it is first asked for."""

    @cache
    def found(name: str) -> Mapping[str, bytes]:
        graph = PROGRAMS[name]()
        return made(graph, {HOST: emit(plan_graph(graph))}, [90], compiler=compiler)

    return found


@pytest.fixture
def calls(files: Callable[[str], Mapping[str, bytes]], stub: Stub) -> Callable[[str], Dispatch]:
    """A fresh `Dispatch` of a program on the stub."""

    def found(name: str) -> Dispatch:
        artefact = Artefact(files(name))
        artefact.signature.device = "cpu"  # whose memory stands for that of the device
        return artefact.dispatch(driver=stub.path)

    return found


def drawn(program: Program, size: int = 5) -> list[torch.Tensor]:
    sizes = {d.name: size for d in program.dims()}
    return [
        torch.ones([size_value(s, sizes) for s in i.tensor.shape], dtype=getattr(torch, TORCH_DTYPES[i.storage.dtype]))
        for i in program.inputs
    ]


def outputs(program: Program, size: int = 5) -> tuple[torch.Tensor, ...]:
    sizes, tensors = {d.name: size for d in program.dims()}, program.tensors()
    return tuple(
        torch.empty(
            [size_value(s, sizes) for s in tensors[o.value].shape], dtype=getattr(torch, TORCH_DTYPES[o.storage.dtype])
        )
        for o in program.outputs
    )


def wanted(graph: KernelGraph, tensors: Sequence[torch.Tensor], out: Any) -> list[tuple[str, int, list[Any]]]:
    """Kernel, number of blocks and arguments of each launch, as the host part asks for them when it runs on tensors."""
    text, signatures = host_part(emit(plan_graph(graph)))
    seen: list[tuple[str, int, list[Any]]] = []

    def note(kernel: str, grid: Sequence[int], given: Sequence[Any], named: Mapping[str, Any]) -> None:
        seen.append((kernel, grid[0], list(given)))

    names = Host.of(text, list(signatures), "host").names(note)
    names["run"](*tensors, out=out)
    return seen


def agrees(launch: Launched, blocks: int, arguments: Sequence[Any], kinds: Mapping[str, Any], known: set[int]) -> None:
    """The launch has these arguments, without those that the cubin has as constants, and two null pointers."""
    passed = [a for a, kind in zip(arguments, kinds.values(), strict=True) if isinstance(kind, str)]
    assert launch.grid == (blocks, 1, 1)
    assert len(launch.parameters) == len(passed) + 2
    assert launch.parameters[-2:] == (0, 0)
    for got, value in zip(launch.parameters, passed, strict=False):
        if isinstance(value, int):
            assert got == value
        elif value.data_ptr() in known:
            assert got == value.data_ptr()
        else:  # a workspace, which each run has of its own
            assert got != 0
            assert got % 16 == 0


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_driver_gets_the_arguments_that_the_host_part_passes(
    name: str, calls: Callable[[str], Dispatch], files: Callable[[str], Mapping[str, bytes]], stub: Stub
) -> None:
    graph, call = PROGRAMS[name](), calls(name)
    binaries = {b.kernel: b for b in reversed(Artefact(files(name)).binaries)}  # aligned ones come first
    for size in (5, 17, 5):
        tensors, out = drawn(graph, size), outputs(graph, size)
        given = out[0] if len(out) == 1 else out
        expected = wanted(graph, tensors, given)
        before = len(stub.launches)
        found = call(*tensors, out=given)
        assert found is given if len(out) == 1 else all(a is b for a, b in zip(found, out, strict=True))
        launches = [x for x in stub.launches[before:] if x.name != "memset"]
        assert [x.name for x in launches] == [k for k, _, _ in expected][-len(launches) :]
        known = {t.data_ptr() for t in (*tensors, *out)}
        for launch, (kernel, blocks, arguments) in zip(launches, expected[-len(launches) :], strict=True):
            b = binaries[kernel]
            agrees(launch, blocks, arguments, b.parameters, known)
            assert launch.block == (32 * b.options["num_warps"], 1, 1)
            assert launch.shared == b.shared
            assert not launch.dependent


def test_an_argument_that_is_not_the_one_is_noticed(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    tensors, (out,) = drawn(graph), outputs(graph)
    ((_, blocks, arguments),) = wanted(graph, tensors, out)
    call(*tensors, out=out)
    (launch,) = stub.launches
    (b, *_) = call.loaded(0).binaries
    known = {t.data_ptr() for t in (*tensors, out)}
    agrees(launch, blocks, arguments, b.parameters, known)
    swapped = replace(launch, parameters=(launch.parameters[1], launch.parameters[0], *launch.parameters[2:]))
    short = replace(launch, parameters=launch.parameters[:-1])
    for wrong in (swapped, short, replace(launch, grid=(blocks + 1, 1, 1))):
        with pytest.raises(AssertionError):
            agrees(wrong, blocks, arguments, b.parameters, known)


def test_later_calls_take_the_same_way_with_new_pointers(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("split_attention")
    graph = PROGRAMS["split_attention"]()
    first, second = drawn(graph), drawn(graph)
    a, b = call(*first), call(*second)
    assert a.data_ptr() != b.data_ptr()
    assert (a.shape, a.dtype) == (b.shape, b.dtype) == ((2, 8, 5, 64), torch.float16)
    assert len(call.ready) == 1
    one, two = stub.launches[:2], stub.launches[2:]
    assert [x.name for x in one] == [x.name for x in two]
    assert one[0].parameters[:3] == tuple(t.data_ptr() for t in first)
    assert two[0].parameters[:3] == tuple(t.data_ptr() for t in second)
    assert two[0].parameters[3:6] == two[1].parameters[:3]  # the parts that the combine reads
    assert two[1].parameters[3] == b.data_ptr()


def test_several_sizes_are_prepared_once_each(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    for size in (1, 16, 17, 33, 1, 17):
        call(*drawn(graph, size))
    assert [x.grid[0] for x in stub.launches] == [2, 2, 4, 6, 2, 4]
    assert len(call.ready) == 4
    assert stub.loads == 1


# -- counters of last blocks that combine


@pytest.fixture
def counting(compiler: Compiler, stub: Stub) -> Dispatch:
    graph = PROGRAMS["split_attention"]()
    source = emit(plan_graph(graph, options=Options(combine="last")))
    artefact = Artefact(made(graph, {HOST: source}, [90], compiler=compiler))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    call.hooks = replace(call.hooks, stream=lambda ordinal: stream["now"], capturing=lambda: stream["captured"])
    return call


stream: dict[str, Any] = {"now": 0, "captured": False}


def memory_of(call: Dispatch, stub: Stub, on: int, captured: bool = False, size: int = 5) -> tuple[int, int]:
    """Where the partial results and the counters of a call lie."""
    stream.update(now=on, captured=captured)
    before = len(stub.launches)
    call(*drawn(PROGRAMS["split_attention"](), size))
    (launch,) = stub.launches[before:]
    pointers = [p for p in launch.parameters if p > 1 << 20]  # Q, K, V, three partial results, O, counters
    assert len(pointers) == 8
    return pointers[3], pointers[-1]


def test_launches_on_one_stream_share_their_memory(counting: Dispatch, stub: Stub) -> None:
    first = memory_of(counting, stub, 1)
    assert memory_of(counting, stub, 1) == first
    second = memory_of(counting, stub, 2)
    assert not set(second) & set(first)
    assert memory_of(counting, stub, 1) == first
    (memory,) = counting.memories.values()
    assert all(int(counters.abs().sum()) == 0 for _, counters in memory.of_stream.values())


def test_memory_that_is_too_small_stays_with_those_that_it_is_enough_for(counting: Dispatch, stub: Stub) -> None:
    small = memory_of(counting, stub, 1, size=5)
    large = memory_of(counting, stub, 1, size=900)
    assert small[0] != large[0]
    assert small[1] != large[1]
    assert memory_of(counting, stub, 1, size=7) == large
    assert memory_of(counting, stub, 1, size=5) == small
    (memory,) = counting.memories.values()
    rows = sum(n * 8 * 2 * 900 * 4 for n in (1, 1, 64))
    assert len(memory.of_stream[1][0]) >= 2 * rows // 8


def test_each_captured_launch_has_memory_of_its_own(counting: Dispatch, stub: Stub) -> None:
    plain = memory_of(counting, stub, 1)
    found = [memory_of(counting, stub, 1, captured=True) for _ in range(4)]
    assert len({counters for _, counters in (plain, *found)}) == 5
    assert plain[0] not in {room for room, _ in found}  # a graph has its own, of which it may use the same again
    (memory,) = counting.memories.values()
    assert memory.store is not None
    held = range(memory.store.data_ptr(), memory.store.data_ptr() + 4 * len(memory.store))
    assert all(counters in held for _, counters in found)


def test_warmup_makes_the_store(counting: Dispatch, calls: Callable[[str], Dispatch]) -> None:
    counting.warmup()
    (memory,) = counting.memories.values()
    assert memory.store is not None
    assert calls("split_attention").warmup().memories == {}


def test_a_capture_without_a_store_sets_its_counters_to_zero(counting: Dispatch, stub: Stub) -> None:
    memory_of(counting, stub, 1, captured=True)
    (memory,) = counting.memories.values()
    assert memory.store is None
    assert memory.of_stream == {}
    memory_of(counting, stub, 1)
    memory.used = dispatch.SPARE_COUNTERS
    _, at = memory_of(counting, stub, 1, captured=True)
    assert memory.store is not None
    assert not memory.store.data_ptr() <= at < memory.store.data_ptr() + 4 * len(memory.store)


def test_two_launches_share_no_memory_with_those_of_another_call(calls: Callable[[str], Dispatch]) -> None:
    """Another thread may launch its first between them."""
    call = calls("split_attention")
    call(*drawn(PROGRAMS["split_attention"]()))
    ((p,),) = call.ready.values()
    assert isinstance(p, Recorded)
    assert len(p.steps) == 2
    assert p.shared is None
    assert p.room is not None


# -- alignment


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_pointer_that_16_does_not_divide_takes_the_general_kernel(
    which: int, calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    tensors = drawn(graph)
    call(*tensors)
    crooked = list(tensors)
    t = tensors[which]
    crooked[which] = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    assert crooked[which].data_ptr() % 16 == 2
    call(*crooked)
    call(*tensors)
    call(*crooked)
    aligned, general, again, twice = stub.launches
    assert len(general.parameters) > len(aligned.parameters)  # strides of 1 are no constants there
    assert general.parameters[which] == crooked[which].data_ptr()
    assert len(again.parameters) == len(aligned.parameters)
    assert len(twice.parameters) == len(general.parameters)


def test_a_result_that_16_does_not_divide_takes_the_general_kernel(
    calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    out = torch.empty(5 * 128 + 1, dtype=torch.float16)[1:].view(5, 128)
    assert call(*drawn(graph), out=out) is out
    assert stub.launches[0].parameters[3] == out.data_ptr()
    assert len(stub.launches[0].parameters) == 4 + 2 + 7 + 2


@pytest.mark.parametrize(
    ("change", "general"),
    [
        (lambda x: torch.ones(5, 512, dtype=x.dtype)[:, :256], False),  # rows further apart, by a multiple of 16
        (lambda x: torch.ones(5, 257, dtype=x.dtype)[:, :256], True),
        (lambda x: torch.ones(256, 5, dtype=x.dtype).T, True),
        (lambda x: torch.ones(1, 256, dtype=x.dtype).expand(5, 256), False),  # 16 divides 0
    ],
)
def test_strides_decide_between_the_kernels(
    change: Callable[[torch.Tensor], torch.Tensor], general: bool, calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    x, g, w = drawn(graph)
    other = change(x)
    call(x, g, w)
    call(other, g, w)
    one, two = stub.launches
    assert (len(two.parameters) > len(one.parameters)) == general
    if general:
        assert two.parameters[6:8] == other.stride()


def test_the_stride_of_one_row_does_not_matter(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    _, g, w = drawn(graph)
    row = torch.ones(256, 1, dtype=torch.float16).T
    assert row.stride() == (1, 1)
    call(row, g, w)
    call(torch.ones(1, 256, dtype=torch.float16), g, w)
    assert stub.launches[0].parameters[4:] == stub.launches[1].parameters[4:]


@pytest.mark.parametrize("shape", [(), (5,), (1,), (3, 1, 5), (4, 5, 1), (0, 7), (7, 0), (2, 0, 3), (1, 1, 1)])
def test_dense_strides_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert dispatch.dense_strides(shape) == torch.empty(shape).stride()


def test_a_stride_beyond_31_bits_is_refused(calls: Callable[[str], Dispatch]) -> None:
    binaries = calls("rmsnorm_linear").loaded(0)
    general = binaries.binaries[-1]
    given = [torch.empty(8)] * 4 + [5, 256, 2**31, 1, 1, 128, 1, 128, 1]
    with pytest.raises(LaunchError, match="31 bits"):
        binaries.choose(HOST, "rmsnorm_linear", given, general.options)


# -- what the host part does beside launching


def test_memory_that_atomics_add_to_is_set_to_zero_first(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("split_atomic")
    out = call(*drawn(PROGRAMS["split_atomic"]()))
    clear, launch = stub.launches
    assert (clear.name, clear.parameters) == ("memset", (out.data_ptr(), out.numel() * 4))
    assert launch.parameters[2] == out.data_ptr()


def test_constants_of_a_kernel_follow_the_sizes(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("whole_rows")
    binaries = call.warmup().loaded(0).binaries
    assert sorted({b.constants["LANES_k"] for b in binaries}) == [4, 8, 16, 32, 64]
    for k in range(3, 41):
        call(torch.ones(4, k, dtype=torch.float16))
    assert stub.loads == len(binaries)
    assert len(stub.launches) == 38


def test_a_constant_without_a_cubin_is_refused(calls: Callable[[str], Dispatch]) -> None:
    call = calls("whole_rows")
    loaded = call.loaded(0)
    loaded.binaries = [b for b in loaded.binaries if b.constants["LANES_k"] != 8]
    call(torch.ones(4, 3, dtype=torch.float16))
    with pytest.raises(CompileError, match="no cubin of softmax_in_tile for LANES_k=8"):
        call(torch.ones(4, 7, dtype=torch.float16))


def test_work_ahead_is_launched_once_for_all_sizes(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    graph, call = PROGRAMS["scaled_ahead"](), calls("scaled_ahead")
    x, w = drawn(graph)
    call(x, w)
    call(x, w)
    call(drawn(graph, 9)[0], w)
    ahead, first, second, third = stub.launches
    assert ahead.name != first.name == second.name == third.name
    assert ahead.parameters[0] == w.data_ptr()
    assert ahead.parameters[1] in first.parameters
    assert all(isinstance(p, Recorded) and p.kept for found in call.ready.values() for p in found)
    w.add_(1)
    call(x, w)
    assert [x.name for x in stub.launches[4:]] == [ahead.name, first.name]


def test_torch_calls_between_kernels_run_as_they_stand(compiler: Compiler, stub: Stub) -> None:
    graph = BLOCKS["library_and_kernel"]()
    artefact = Artefact(made(graph, {HOST: emit(plan_graph(graph))}, [90], compiler=compiler))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    tensors = drawn(graph)
    outs = [call(*tensors), call(*tensors), call(*drawn(graph, 9))]
    assert [x.parameters[1] for x in stub.launches] == [out.data_ptr() for out in outs]
    assert [x.grid[0] for x in stub.launches] == [2, 2, 3]
    assert all(isinstance(p, Direct) for found in call.ready.values() for p in found)
    crooked = torch.empty(5 * 24 + 1, dtype=torch.float16)[1:].view(5, 24)
    call(*tensors, out=crooked)
    assert stub.launches[3].parameters[1] == crooked.data_ptr()
    assert len(stub.launches[3].parameters) > len(stub.launches[0].parameters)


def test_nothing_is_launched_for_no_blocks() -> None:
    seen: list[str] = []
    kernel = dispatch.Kernel("k", lambda name, grid, given, named: seen.append(name))
    kernel[(0,)](1)
    kernel[(1,)](1)
    assert seen == ["k"]


# -- checks


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, g, w: (x.float(), g, w), "X is torch.float32"),
        (lambda x, g, w: (x[0], g, w), "X is of 1 dimensions"),
        (lambda x, g, w: (x, g[:-1], w), "G is of shape"),
        (lambda x, g, w: (x, g), "takes X, G, W"),
        (lambda x, g, w: (x, g, w, w), "takes X, G, W"),
        (lambda x, g, w: (x, g, "w"), "W is str"),
        (lambda x, g, w: (x, g, w.to("meta")), "W is on meta"),
        (lambda x, g, w: (x, g, w.to_sparse()), "W is Tensor"),
        (lambda x, g, w: (x[:0], g, w), "X is B = 0"),
        (lambda x, g, w: (x, g, w.requires_grad_()), "W is to be differentiated"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_also_after_a_call_that_did(
    change: Callable[..., tuple[Any, ...]], text: str, calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    call = calls("rmsnorm_linear")
    tensors = drawn(PROGRAMS["rmsnorm_linear"]())
    call(*tensors)
    for _ in range(2):
        with pytest.raises(LaunchError, match=text):
            call(*change(*(t.clone() for t in tensors)))
    assert len(stub.launches) == 1


def test_a_parameter_that_may_have_a_gradient_is_taken_where_none_is_wanted(
    calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    call = calls("rmsnorm_linear")
    x, g, w = drawn(PROGRAMS["rmsnorm_linear"]())
    w = torch.nn.Parameter(w)
    with torch.no_grad():
        call(x, g, w)
        call(x, g, w)
    with pytest.raises(LaunchError, match="W is to be differentiated"):
        call(x, g, w)
    with torch.inference_mode():
        call(x, g, w)
    assert len(stub.launches) == 3


def test_arguments_may_be_named(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("rmsnorm_linear")
    x, g, w = drawn(PROGRAMS["rmsnorm_linear"]())
    call(x, W=w, G=g)
    assert stub.launches[0].parameters[:3] == (x.data_ptr(), g.data_ptr(), w.data_ptr())
    with pytest.raises(LaunchError, match="takes X, G, W"):
        call(x, g, V=w)


def test_out_has_to_fit_and_to_have_its_own_memory(calls: Callable[[str], Dispatch]) -> None:
    call = calls("rmsnorm_linear")
    x, g, w = drawn(PROGRAMS["rmsnorm_linear"]())
    for wrong in (torch.empty(5, 127).half(), torch.empty(5, 128), w[:5], (w, w)):
        with pytest.raises(LaunchError):
            call(x, g, w, out=wrong)


def test_a_lazily_negated_argument_is_copied(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("rmsnorm_linear")
    x, g, w = drawn(PROGRAMS["rmsnorm_linear"]())
    for _ in range(2):
        call(torch._neg_view(x), g, w)
        assert stub.launches[-1].parameters[0] != x.data_ptr()
    call(x, g, w)
    assert stub.launches[-1].parameters[0] == x.data_ptr()


def test_layouts_are_told_apart_without_the_private_guard(
    calls: Callable[[str], Dispatch], stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._C._dynamo import guards

    monkeypatch.delattr(guards, "TensorGuards")
    call = calls("rmsnorm_linear")
    x, g, w = drawn(PROGRAMS["rmsnorm_linear"]())
    call(x, g, w)
    call(x, g, w)
    call(torch.ones(256, 5).half().T, g, w)
    assert len(call.ready[(x.shape,)]) == 2
    one, two, other = stub.launches
    assert one.parameters[:3] == two.parameters[:3]
    assert len(other.parameters) > len(one.parameters)


# -- threads, streams, graphs


def test_threads_with_streams_of_their_own_do_not_mix_arguments(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    local = threading.local()
    call.hooks = replace(call.hooks, stream=lambda ordinal: local.stream)
    given = {i: [drawn(graph, size) for size in (3, 40)] for i in (1, 2, 3, 4)}
    errors: list[BaseException] = []

    def use(i: int) -> None:
        local.stream = i
        try:
            for j in range(100):
                call(*given[i][j % 2])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in given]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert len(stub.launches) == 400
    for launch in stub.launches:
        small, large = given[launch.stream]
        x, g, w = small if launch.parameters[4] == 3 else large
        assert launch.parameters[:3] == (x.data_ptr(), g.data_ptr(), w.data_ptr())
        assert launch.grid == ((2,) if x is small[0] else (6,)) + (1, 1)


def test_threads_that_prepare_and_compute_ahead_at_once_do_not_wait_for_each_other(
    calls: Callable[[str], Dispatch], stub: Stub
) -> None:
    graph, call = PROGRAMS["scaled_ahead"](), calls("scaled_ahead")
    weights = [drawn(graph)[1] for _ in range(4)]

    def use(i: int) -> None:
        for j in range(40):
            call(drawn(graph, 1 + j)[0], weights[(i + j) % 4])

    threads = [threading.Thread(target=use, args=(i,), daemon=True) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=60)
    assert not any(t.is_alive() for t in threads)
    assert len(stub.launches) == 4 * 40 + 4  # and the sum ahead once for each of the weights


def test_a_launch_in_use_is_not_handed_out_again(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    """A call that begins while another is between preparing its arguments and launching gets buffers of its own."""
    graph, call = PROGRAMS["rmsnorm_linear"](), calls("rmsnorm_linear")
    outer, inner = drawn(graph), drawn(graph)
    armed: list[bool] = []

    def stream(ordinal: int) -> int:
        if armed:
            armed.clear()
            call(*inner)
        return 0

    call.hooks = replace(call.hooks, stream=stream)
    call(*outer)
    armed.append(True)
    call(*outer)
    assert [x.parameters[0] for x in stub.launches] == [t[0].data_ptr() for t in (outer, inner, outer)]


def test_nothing_is_loaded_while_a_graph_is_captured(calls: Callable[[str], Dispatch], stub: Stub) -> None:
    call = calls("rmsnorm_linear")
    tensors = drawn(PROGRAMS["rmsnorm_linear"]())
    stub.capture(True)
    with pytest.raises(LaunchError, match="captured") as caught:
        call(*tensors)
    assert "warmup()" in str(caught.value)
    assert stub.loads == 0
    stub.capture(False)
    call.warmup()
    assert stub.loads == 2
    stub.capture(True)
    call(*tensors)
    assert (len(stub.launches), stub.loads) == (1, 2)


def test_a_launch_may_depend_on_the_one_before(stub: Stub, files: Callable[[str], Mapping[str, bytes]]) -> None:
    driver = Driver(stub.path)
    b = Artefact(files("scaled_ahead")).binaries[0]
    function = driver.function(b.image, b.entry, b.shared, 0)
    for dependent in (False, True):
        launch = Launch(driver, function, driver.context(0), Shape((3, 2, 1), 64, 0, dependent), [Slot(1), Slot(0)])
        launch(7, [16, 32])
        found = stub.launches[-1]
        assert (found.grid, found.block, found.dependent, found.stream) == ((3, 2, 1), (64, 1, 1), dependent, 7)
        assert found.parameters[:2] == (32, 16)


@pytest.mark.parametrize("name", ["gated_mlp_bf16", "two_results"])
def test_options_that_a_tuner_chose_reach_the_launch(name: str, compiler: Compiler, stub: Stub) -> None:
    graph = PROGRAMS[name]()
    for options in (Options(num_warps=8, pdl=True), Options(num_warps=4)):
        source = emit(plan_graph(graph, options=options))
        artefact = Artefact(made(graph, {HOST: source}, [90], compiler=compiler))
        artefact.signature.device = "cpu"
        tensors = drawn(graph)
        call = artefact.dispatch(driver=stub.path)
        for _ in range(2):
            call(*tensors)
            found = stub.launches[-1]
            assert (found.block, found.dependent) == ((32 * options.num_warps, 1, 1), options.pdl)


# -- scratch memory of descriptors


DESCRIBED = Options(descriptors=True)


def described(graph: KernelGraph, compiler: Compiler, stub: Stub, options: Options = DESCRIBED) -> Dispatch:
    artefact = Artefact(made(graph, {HOST: emit(plan_graph(graph, options=options))}, [90], compiler=compiler))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    call.hooks = replace(call.hooks, stream=lambda ordinal: stream["now"], capturing=lambda: stream["captured"])
    stream.update(now=1, captured=False)
    return call


def test_descriptors_have_scratch_memory_of_their_launch(compiler: Compiler, stub: Stub) -> None:
    """Two descriptors of 128 bytes for each block."""
    graph = PROGRAMS["rmsnorm_linear"]()
    call = described(graph, compiler, stub)
    assert sorted({(b.constants["DESCRIPTORS"], b.scratch) for b in call.loaded(0).binaries}) == [
        (False, 0),
        (True, 256),
    ]
    for on, captured in ((1, False), (1, False), (2, False), (1, True)):
        stream.update(now=on, captured=captured)
        call(*drawn(graph, 17))
    places = [x.parameters[-2] for x in stub.launches]
    assert [x.parameters[-1] for x in stub.launches] == [0] * 4
    assert all(p > 0 and p % 16 == 0 for p in places)
    assert places[0] == places[1]  # launches on one stream follow each other
    assert len(set(places)) == 3
    (memory,) = call.memories.values()
    assert len(memory.of_stream[1][0]) >= 256 * stub.launches[0].grid[0]


def test_a_tensor_that_descriptors_do_not_describe_takes_pointers(compiler: Compiler, stub: Stub) -> None:
    graph = PROGRAMS["rmsnorm_linear"]()
    call = described(graph, compiler, stub)
    x, *others = drawn(graph)
    crooked = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    odd = torch.empty(5, 260, dtype=x.dtype)[:, :256]
    gamma = torch.empty(257, dtype=x.dtype)[1:]  # which no descriptor describes
    for given in ((x, *others), (crooked, *others), (odd, *others), (x, gamma, *others[1:])):
        call(*given)
    assert [x.parameters[-2] > 0 for x in stub.launches] == [True, False, False, True]


def test_scratch_memory_goes_with_what_is_between_launches(compiler: Compiler, stub: Stub) -> None:
    graph = PROGRAMS["split_attention"]()
    for options in (DESCRIBED, Options(descriptors=True, combine="last")):
        call = described(graph, compiler, stub, options)
        before = len(stub.launches)
        call(*drawn(graph))
        main, *combine = stub.launches[before:]
        assert len(combine) == (options.combine == "apart")
        pointers = [p for p in main.parameters if p > 1 << 20]
        # Q, K, V, three parts and scratch; with the combine O and counters as well
        assert len(set(pointers)) == len(pointers) == (9 if options.combine == "last" else 7)
        assert all(x.parameters[-2:] == (0, 0) for x in combine)


def test_scratch_memory_is_given_where_the_host_part_runs_as_it_stands(compiler: Compiler, stub: Stub) -> None:
    graph = BLOCKS["split_matmul"]()
    call = described(graph, compiler, stub)
    names = call.names(HOST, 0)
    for _ in range(2):
        names["run"](*drawn(graph))
    assert [x.parameters[-2] > 0 for x in stub.launches] == [True, False, True, False]


def test_persistent_kernels_have_a_grid_by_the_device(compiler: Compiler, stub: Stub) -> None:
    """The stub has 4 multiprocessors; there are 8 blocks of rows and 2 of columns at B = 128, fewer at 17."""
    graph = PROGRAMS["rmsnorm_linear"]()
    source = emit(plan_graph(graph, options=Options(persistent=3)))
    artefact = Artefact(made(graph, {HOST: source}, [90], compiler=compiler))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    for size, blocks in ((128, 12), (17, 4), (128, 12)):
        tensors = drawn(graph, size)
        call(*tensors)
        assert stub.launches[-1].grid == (blocks, 1, 1)
        assert all(isinstance(p, Recorded) for found in call.ready.values() for p in found)
        call.names(HOST, 0)["run"](*tensors)  # as where calls of torch come between
        assert stub.launches[-1].grid == (blocks, 1, 1)


def test_shared_memory_beyond_the_usual_is_asked_for(stub: Stub, files: Callable[[str], Mapping[str, bytes]]) -> None:
    driver = Driver(stub.path)
    b = Artefact(files("scaled_ahead")).binaries[0]
    for asked in (100_000, 0):
        function = driver.function(b.image, b.entry, asked, 0)
        launch = Launch(driver, function, driver.context(0), Shape((1, 1, 1), 32, 100_000), [Slot(0), Slot(0)])
        if asked:
            launch(0, [16])
        else:
            with pytest.raises(LaunchError, match="refused"):
                launch(0, [16])
    assert len(stub.launches) == 1


def test_a_library_that_is_no_driver_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent.so"), "libc.so.6"):
        with pytest.raises(TargetMismatchError, match="no CUDA driver") as caught:
            driver_of(name)
        assert "MUGRAPH_DRIVER" in str(caught.value)


# -- tables


def table(*ranges: tuple[int, int, str], dim: str | None = "B") -> Table:
    return Table(dim, tuple(Range(*r) for r in ranges))


def test_a_table_finds_the_file_of_each_size() -> None:
    t = table((1, 16, "a"), (17, 64, "b"), (65, 4096, "a"))
    assert [t.file({"B": b}) for b in (1, 16, 17, 64, 65, 4096)] == ["a", "a", "b", "b", "a", "a"]
    assert t.files == ("a", "b")
    assert Table.from_dict(t.to_dict()) == t
    t.check_covers(1, 4096)
    assert table((0, 0, "a"), dim=None).file({}) == "a"


@pytest.mark.parametrize(
    "ranges",
    [(), ((1, 16, "a"), (18, 64, "b")), ((1, 16, "a"), (16, 64, "b")), ((5, 4, "a"),), ((17, 64, "b"), (1, 16, "a"))],
)
def test_a_table_with_a_gap_or_an_overlap_is_refused(ranges: tuple[tuple[int, int, str], ...]) -> None:
    with pytest.raises(CacheError, match="table of sizes is wrong"):
        table(*ranges)


@pytest.mark.parametrize("limits", [(1, 65), (0, 64), (2, 64), (1, 63)])
def test_a_table_that_does_not_cover_the_sizes_is_refused(limits: tuple[int, int]) -> None:
    t = table((1, 16, "a"), (17, 64, "b"))
    t.check_covers(1, 64)
    with pytest.raises(CacheError, match=r"serves B = 1\.\.64, the program takes"):
        t.check_covers(*limits)


# -- a device, where there is one


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_device_computes_from_cubins_what_triton_computes(name: str, compiler: Compiler) -> None:
    from mugraph.runtime.load import load_module

    major, minor = torch.cuda.get_device_capability()
    graph = PROGRAMS[name]()
    source = emit(plan_graph(graph))
    call = Artefact(made(graph, {HOST: source}, [10 * major + minor], compiler=compiler)).dispatch().warmup()
    run = load_module(source, name).run
    for size in (5, 17):
        tensors = [torch.randn(t.shape).to(t.dtype).cuda() for t in drawn(graph, size)]
        crooked = [torch.empty(t.numel() + 1, dtype=t.dtype, device="cuda")[1:].view(t.shape).copy_(t) for t in tensors]
        expected = run(*tensors)
        torch.testing.assert_close(call(*tensors), expected)
        torch.testing.assert_close(call(*crooked), expected)
        graph_of_calls = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph_of_calls):
            captured = call(*tensors)
        graph_of_calls.replay()
        torch.testing.assert_close(captured, expected)
