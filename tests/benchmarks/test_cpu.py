"""The CPU benchmark: its document, and that it tells slower and wrong from right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from benchmarks import cpu
from benchmarks.cpu_programs import PROGRAMS, case
from mugraph.pytorch.capture import capture

KEYS = {"program", "sizes", "algebraic_gain", "ratio_eager", "ratio_compile", "slower", "correct"}


def column_sums(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a @ b).sum(0)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.relu(a @ b)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two small programs, nothing compiled, a cache of their own."""
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    programs = {
        "column_sums": case(column_sums, a=(64, 64), b=(64, 64)),
        "product": case(product, a=(16, 16), b=(16, 16)),
        "trace": case(lambda a: torch.trace(a @ a), a=(16, 16)),
    }
    monkeypatch.setattr(cpu, "PROGRAMS", programs)


@pytest.mark.usefixtures("tiny")
def test_the_document_has_the_one_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    assert cpu.main(["--json", "--seconds", "0.01", "--out", str(out)]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["benchmark"], data["schema_version"]) == ("cpu", 1)
    assert data["environment"]["threads"] == torch.get_num_threads()
    assert [r["program"] for r in data["rows"]] == ["column_sums", "product", "trace"]
    assert all(r.keys() >= KEYS for r in data["rows"])
    assert [r["algebraic_gain"] for r in data["rows"]] == [True, False, False]
    assert all(r["correct"] for r in data["rows"])
    assert data["rows"][-1]["runs"] == "as it stands: not captured"
    assert json.loads(out.read_text()) == data


@pytest.mark.usefixtures("tiny")
def test_rows_that_the_file_has_are_not_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "cpu.json"
    cpu.main(["--program", "product", "--seconds", "0.01", "--out", str(out)])
    measured: list[str] = []
    row = json.loads(out.read_text())["rows"][0]
    monkeypatch.setattr(cpu, "measured", lambda name, _: measured.append(name) or row | {"program": name})
    cpu.main(["--program", "product", "--program", "trace", "--seconds", "0.01", "--out", str(out)])
    assert measured == ["trace"]
    monkeypatch.setattr(cpu, "machine_text", lambda: "another machine")
    cpu.main(["--program", "product", "--seconds", "0.01", "--out", str(out)])
    assert measured == ["trace", "product"]
    capsys.readouterr()


@pytest.mark.usefixtures("tiny")
def test_wrong_results_are_flagged_and_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cpu.optimised

    def wrong(given: Any) -> Any:
        """Its last column is not written."""
        fast, found = right(given)
        first = found

        def result() -> Any:
            result = first()
            run = result.executable.run
            if not hasattr(run, "spoiled"):

                def spoiled(*args: Any, out: Any = None) -> Any:
                    out[:-1] = run(*args)[:-1]
                    return out

                spoiled.spoiled = True  # type: ignore[attr-defined]
                result.executable.run = spoiled
            return result

        return fast, result

    monkeypatch.setattr(cpu, "optimised", wrong)
    monkeypatch.setattr("mugraph.result.Result.unchanged", False)
    assert cpu.main(["--program", "column_sums", "--json", "--seconds", "0.01"]) == 1
    assert json.loads(capsys.readouterr().out)["rows"][0]["correct"] is False


def test_what_is_not_captured_is_compared_with_float64_too() -> None:
    given = case(column_sums, a=(64, 64), b=(64, 64))
    assert cpu.close_to_double(column_sums, given)
    assert not cpu.close_to_double(lambda a, b: column_sums(a, b) * (1 + 1e-3), given)


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ([0.9] * 20, True),
        ([0.94] * 14 + [1.5] * 2, True),
        ([0.9] * 10 + [1.0] * 10, False),  # the interval reaches beyond 0.95
        ([0.96] * 20, False),
        ([2.0] * 20, False),
    ],
)
def test_slower_means_that_the_whole_interval_lies_below(ratios: list[float], slower: bool) -> None:
    row = cpu.row("p", "", None, ratios, True)
    assert row["slower"] is slower
    assert row["low"] <= row["ratio_compile"] <= row["high"]


def gain(function: Callable[..., Any], *shapes: tuple[int, ...]) -> bool:
    return cpu.has_gain(capture(function, tuple(torch.randn(s) for s in shapes)).program)


def test_a_gain_is_decided_by_the_graphs() -> None:
    assert gain(column_sums, (64, 64), (64, 64))
    assert gain(
        lambda x, y: (x.unsqueeze(2) * y.unsqueeze(1)).sum(0), (32, 64), (32, 64)
    )  # the same operations, less moved
    assert not gain(product, (64, 64), (64, 64))
    assert not gain(lambda a: torch.softmax(a, -1), (64, 64))  # nor where only the maximum is taken elsewhere


def test_what_constants_allow_ahead_is_a_gain() -> None:
    @mg.program
    def folded(x: mg.f32[64, 64], w: mg.constant(mg.f32[64, 64]), u: mg.constant(mg.f32[64, 4])):
        return x @ w @ u

    assert cpu.has_gain(folded)


def test_the_amounts_of_a_program_are_those_of_its_operators() -> None:
    @mg.program
    def program(a: mg.f32[8, 16], b: mg.f32[16, 4]):
        return mg.sum(mg.exp(a @ b), 1)

    operations, moved = cpu.amounts(program)
    assert operations == 1 + 2 * 8 * 16 * 4 + 8 * 4 + 8 * 4
    assert moved == 1 + 4 * (8 * 16 + 16 * 4 + 8 * 4) + 4 * (8 * 4 + 8)


def test_there_are_enough_programs_and_the_dsl_says_the_same() -> None:
    assert len(PROGRAMS) >= 30
    for name, given in PROGRAMS.items():
        if given.program is not None:
            shapes = {i.name: i.tensor.shape for i in given.program.inputs}
            assert shapes == given.shapes, name
