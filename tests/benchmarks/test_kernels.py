"""What the GPU benchmarks compare, as far as a CPU can tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mugraph as mg
from benchmarks import gpu, kernels
from benchmarks.programs import CLASSIC, PROGRAMS
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
    given = kernels.baselines()[name](*tensors)
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    torch.testing.assert_close(given, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))
    other = kernels.baselines()[name](*(t.flip(-1) if i == 0 else t for i, t in enumerate(tensors)))
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


def test_rows_of_the_same_measurement_are_replaced() -> None:
    def row(program: str, ratio: float) -> dict[str, object]:
        return {"program": program, "sizes": "B=1", "dtype": "f16", "baseline": "eager", "ratio": ratio}

    assert gpu.merged([row("a", 1.0), row("b", 2.0)], [row("b", 3.0)]) == [row("a", 1.0), row("b", 3.0)]


def test_a_result_file_holds_the_rows_of_all_pieces(tmp_path: Path) -> None:
    row = {"program": "a", "sizes": "B=1", "dtype": "f16", "baseline": "eager", "device": "A Device (80)", "ratio": 2.0}
    gpu.write([row], tmp_path)
    path = gpu.write([row | {"program": "b"}], tmp_path)
    assert path.name.startswith("a-device-80-")
    assert [r["program"] for r in json.loads(path.read_text())["rows"]] == ["a", "b"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("arguments", [[], ["--piece", "1"]])
def test_without_a_device_nothing_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "has_device", lambda: False)
    assert gpu.main([*arguments, "--out", str(tmp_path / "results")]) == 0
    assert capsys.readouterr().out == "not measured: no CUDA device\n"
    assert not (tmp_path / "results").exists()


def test_without_a_device_the_document_has_no_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_device", lambda: False)
    assert kernels.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.gpu
def test_a_program_is_measured_on_the_device() -> None:
    rows = kernels.measured(PROGRAMS["ntrans"], 1, repeats=3)
    assert [r["baseline"] for r in rows] == ["eager", "torch.compile"]
    assert all(r["correct"] and r["ratio"] > 0 for r in rows)
