"""One μGraph for each thing that a kernel may have: it is verified, lowers, compiles and agrees with float64."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest

import mugraph as mg
from mugraph.codegen.lower import plan_graph
from mugraph.codegen.plan import Plan
from mugraph.codegen.stabilise import stabilise
from mugraph.errors import VerificationError
from mugraph.ir.axes import Dim
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Pass, Program, Store
from mugraph.ir.ops import Cast, Const, Contract, Reduce
from mugraph.ir.parser import parse_program
from mugraph.ir.types import DType, tensor
from mugraph.pipeline import from_graph
from mugraph.search.reading import flattened
from mugraph.transpiler.triton import emit
from tests import blocks
from tests.graphs import Builder, attention, attention_fused, axis, inp, lora, lora_fused

B = Dim("B", 1, 512)
Case = tuple[Program | None, KernelGraph]


@mg.program
def softmax(X: mg.f16["B", 40]):
    e = mg.exp(X)
    return e / mg.sum(e, axis=-1, keepdims=True)


def two_loops() -> KernelGraph:
    """A row's sum in one loop, its quotients in the next."""
    with mg.block(softmax, grid={"b": 4}) as blk:
        with blk.loop("k", tile=16) as p:
            x = p.load("X")
            total = p.accumulate(mg.sum(mg.exp(x), axis=-1, keepdims=True))
        with blk.loop("k", tile=16) as p:
            again = p.load("X")
            blk.store(mg.exp(again) / total, softmax.outputs[0].value)
    return blk.graph()


def several_outputs() -> KernelGraph:
    """The row sums and the row maxima of one load, and the rows themselves, doubled, from one kernel."""
    b, k = axis("b", B), axis("k", 40)
    x = inp("X", b, k)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor),)
    s.add("two", Const(Fraction(2)))
    s.fn("x2", "mul", "x", "two")
    s.add("total", Reduce("sum", ("k",)), "x")
    s.add("top", Reduce("max", ("k",)), "x")
    stores = (Store("x2", "Y"), Store("total", "Total"), Store("top", "Top"))
    block = BlockGraph((("b", 4),), None, (), loads, s.take(), stores)
    targets = (tensor("Y", (b, k), DType.f16), tensor("Total", (b,), DType.f32), tensor("Top", (b,), DType.f16))
    return blocks.kernel_graph("several_outputs", (x,), (block,), *targets)


def grouped_grid() -> KernelGraph:
    """Heads on the grid, in groups that share keys: a batched product whose left side flattens group and rows."""
    h, g, b = axis("h", 4), axis("g", 4), axis("b", B)
    d, t = axis("d", 24), axis("t", 40)
    q, k = inp("Q", h, g, b, d), inp("K", h, t, d)
    s = Builder(block=True)
    loads = (s.load("q", q.tensor), s.load("k", k.tensor))
    s.add("y", Contract(("d",)), "q", "k")
    block = BlockGraph((("h", 2), ("g", 4), ("b", 4), ("t", 16)), None, (), loads, s.take(), (Store("y", "Y"),))
    return blocks.kernel_graph("grouped_grid", (q, k), (block,), tensor("Y", (h, g, b, t), DType.f16))


def symbolic_sizes() -> KernelGraph:
    """Rows, columns and the summed axis all of symbolic size."""
    b, k, n = axis("b", B), axis("k", Dim("K", 1, 256)), axis("n", Dim("N", 1, 256))
    x, w = inp("X", b, k), inp("W", k, n)
    s = Builder(block=True)
    loads = (s.load("x", x.tensor), s.load("w", w.tensor))
    s.acc("acc", Contract(("k",)), "x", "w")
    passes = (Pass((("k", 16),), loads, s.take()),)
    block = BlockGraph((("b", 16), ("n", 16)), None, passes, (), (), (Store("acc", "Y"),))
    return blocks.kernel_graph("symbolic_sizes", (x, w), (block,), tensor("Y", (b, n), DType.f16))


# What it is about, the μGraph (and the program, where it is not the kernel's own meaning), and what its plan shows.
WORDS: dict[str, tuple[Callable[[], Case], Callable[[Plan], bool]]] = {
    "several loops": (
        lambda: (softmax, two_loops()),
        lambda p: sum(s.loop is not None for x in p.launches() for s in x.scopes) == 2,
    ),
    "a nest of loops": (lambda: (None, blocks.nested_loops()), lambda p: any(s.outer for s in p.launches()[0].scopes)),
    "several accumulators": (lambda: (None, blocks.layernorm_linear()), lambda p: str(p).count("[sum") >= 4),
    "several outputs": (lambda: (None, several_outputs()), lambda p: len(p.launches()[0].writes()) == 3),
    "batched grid": (lambda: (None, blocks.batched_matmul()), lambda p: len(p.launches()[0].grid) > 1),
    "grouped grid": (lambda: (None, grouped_grid()), lambda p: any(len(x) > 1 for x in p.launches()[0].lanes)),
    "masks": (lambda: (None, stabilise(blocks.causal_attention())), lambda p: "maskedexp" in str(p)),
    "tails": (lambda: (None, blocks.tiny_tiles()), lambda p: "tail" in str(p)),
    "symbolic sizes": (lambda: (None, symbolic_sizes()), lambda p: True),
    "epilogue loads": (
        lambda: (lora(DType.f16, 256, 64, 16), lora_fused(DType.f16, 256, 64, 16)),
        lambda p: any("load Bm" in str(a) for a in p.launches()[0].scopes[-1].before),
    ),
    "gather": (lambda: (None, blocks.gathered_rows()), lambda p: "At" in str(p) and "[..]" in str(p)),
    "pages": (lambda: (None, blocks.paged_sum()), lambda p: "place[..]" in str(p)),
    "scatter": (lambda: (None, blocks.scattered_rows()), lambda p: "atomic x2 -> Y[at[..], n]" in str(p)),
    "prefix sums": (lambda: (None, blocks.prefix_sums()), lambda p: "(scan)" in str(p)),
    "online softmax": (
        lambda: (attention(DType.f16, 72, 24), attention_fused(DType.f16, 72, 24)),
        lambda p: "[rescaled by m]" in str(p),
    ),
    "split-KV combine": (
        lambda: (attention(DType.f16, 72, 24), attention_fused(DType.f16, 72, 24, parts=2)),
        lambda p: "partial acc" in str(p) and any(x.split for x in p.launches()),
    ),
    "atomics": (lambda: (None, blocks.split_matmul(atomic=True)), lambda p: "atomic" in str(p)),
}


def meaning(graph: KernelGraph) -> Program:
    """What the kernels of a graph compute, as a program of f32: tiles are f32, whatever is loaded."""
    flat = flattened(graph)
    tensors = graph.tensors()
    stored = dict(zip(flat.outputs, (o.value for o in graph.outputs), strict=True))
    names = {t.name: f"v{n}" for n, t in enumerate(t for e in flat.equations for t in e.targets)} | stored
    equations = []
    for i in graph.inputs:
        if i.tensor.dtype.is_float and i.tensor.dtype is not DType.f32:
            wide = replace(i.tensor, name=f"{i.name}_f32", dtype=DType.f32)
            names[i.name] = wide.name
            equations.append(Equation((wide,), Cast(DType.f32), (i.name,)))
    for e in flat.equations:
        (t,) = e.targets
        target, op = replace(t, name=names[t.name]), e.op
        if t.name in stored:  # the order of its axes and its type are those of the output
            target = tensors[stored[t.name]]
            op = Cast(target.dtype) if target.dtype is not DType.f32 else e.op
        equations.append(Equation((target,), op, tuple(names.get(a, a) for a in e.args)))
    return Program(graph.name, graph.inputs, tuple(equations), graph.outputs)


@pytest.mark.parametrize("word", WORDS)
def test_what_has_it_is_verified_lowers_and_agrees_with_float64(word):
    make, shows = WORDS[word]
    program, graph = make()
    assert shows(plan_graph(graph))
    result = from_graph(program or meaning(graph), graph, target="cuda:90")
    assert {"tested", "bounds", "numerics"} <= set(result.certificate.tiers)
    assert result.certificate.numerics[0].how in ("interpreted", "device")


@pytest.mark.parametrize("word", WORDS)
def test_what_has_it_compiles_for_each_architecture(word, compiler):
    source = emit(plan_graph(WORDS[word][0]()[1]))
    for arch in (80, 90, 100):
        for found in compiler.resources(source, arch):
            assert not found.excess
            assert found.spills == 0


@pytest.mark.parametrize("word", [w for w in WORDS if w not in ("tails", "symbolic sizes")])
def test_what_is_shown_is_not_in_every_plan(word):
    """The words are told apart by their plans."""
    shows = WORDS[word][1]
    assert any(not shows(plan_graph(make()[1])) for make, _ in WORDS.values())


def test_a_kernel_of_another_meaning_is_refused():
    program, graph = meaning(blocks.nested_loops()), blocks.nested_loops()
    wrong = parse_program(str(graph).replace("mul(x, v)", "add(x, v)"))
    with pytest.raises(VerificationError):
        from_graph(program, wrong, target="cuda:90")
