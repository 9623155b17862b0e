"""What the GPU benchmarks compare, as far as a CPU can tell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import mugraph as mg
from benchmarks import kernels
from benchmarks.programs import CLASSIC, FAMILIES, PROGRAMS
from benchmarks.published import PUBLISHED
from mugraph.errors import MugraphError
from mugraph.ir.resize import resized
from mugraph.runtime.bench import random_inputs, rotating
from mugraph.runtime.load import load_module
from mugraph.transpiler import torch as torch_code
from tests import graphs


@pytest.mark.parametrize("name", CLASSIC)
def test_the_baselines_compute_the_programs(name: str) -> None:
    long = {a.name: 64 for a in PROGRAMS[name].axes().values() if isinstance(a.size, int) and a.size >= 1024}
    program = resized(PROGRAMS[name], long, {})
    tensors = random_inputs(program, {"B": 2}, "cpu")
    wanted = load_module(torch_code.emit(program), f"{name}_reference").run(*tensors)
    given = kernels.fused()[name](*tensors)
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    torch.testing.assert_close(given, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    other = kernels.fused()[name](*(t.flip(-1) if i == 0 else t for i, t in enumerate(tensors)))
    assert not torch.allclose(other, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


def test_a_wrong_kernel_is_not_called_correct() -> None:
    program = graphs.gated_mlp(k_size=24, n_size=40)
    result = mg.optimize(program, target="torch")
    assert kernels.agrees(result, {"B": 3}, device="cpu")
    assert "silu" in result.source
    assert not kernels.agrees(replace(result, source=result.source.replace("silu", "tanh")), {"B": 3}, device="cpu")


def test_copies_rotate() -> None:
    seen: list[int] = []
    call = rotating(lambda t: seen.append(int(t)), [[torch.tensor(i)] for i in range(3)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 0, 1]


def test_every_variant_is_met_once_and_the_classic_ones_first() -> None:
    few, everything = list(kernels.cases()), list(kernels.cases(True))
    assert everything[: len(few)] == few
    assert len(few) == 18
    assert len(set(everything)) == len(everything)
    assert {(c.family, c.variant) for c in everything} == {(n, v) for n, f in FAMILIES.items() for v in f.variants}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_structures_are_the_programs(name: str) -> None:
    result = mg.from_graph(PROGRAMS[name], PUBLISHED[name](PROGRAMS[name]), target="cuda:90")
    assert {"tested", "proved", "bounds", "numerics"} <= set(result.certificate.tiers)


def test_a_published_structure_of_another_program_is_refused() -> None:
    other = graphs.gated_mlp()
    swapped = replace(other, inputs=(other.inputs[0], other.inputs[2], other.inputs[1]))
    graph = PUBLISHED["gated_mlp"](replace(PROGRAMS["gated_mlp"]))
    with pytest.raises(MugraphError):
        mg.from_graph(swapped, graph, target="cuda:90")


def test_without_a_device_the_document_has_no_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_device", lambda: False)
    assert kernels.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.gpu
def test_a_program_is_measured_on_the_device() -> None:
    rows = kernels.measured(kernels.Case("ntrans", "4096", 1), repeats=3)
    assert {"eager", "torch.compile", "published"} <= {r["baseline"] for r in rows}
    assert all(r["correct"] and r["ratio"] > 0 for r in rows)
