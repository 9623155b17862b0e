"""Programs at the edge of what the numeric check and the search can handle: a result with a note, or a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from mugraph import pipeline
from mugraph.cli import main
from mugraph.errors import CacheError, UnsupportedOpError, VerificationError
from mugraph.result import Result, check_writable
from mugraph.runtime.cache import Cache
from mugraph.verify.certificate import Certificate, NumericReport
from mugraph.verify.numeric import numeric_check

VECTOR, SQUARE = mg.f32[4], mg.f32[8, 8]


def optimized(fn: Callable[..., Any], target: str = "torch", **inputs: Any) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MUGRAPH_SKIP_CACHE", "1")
        result = mg.superoptimize(mg.trace(fn, inputs, name="edge"), target=target)
    assert isinstance(result, Result)
    return result


PARTIAL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "log": (lambda x: mg.log(x), {"x": VECTOR}),
    "log of a product": (lambda x, w: mg.log(x @ w), {"x": mg.f32[4, 8], "w": mg.f32[8, 4]}),
    "sqrt": (lambda x: x**0.5, {"x": VECTOR}),
    "power": (lambda x: x**1.5, {"x": VECTOR}),
    "rsqrt": (lambda x: mg.rsqrt(x), {"x": VECTOR}),
    "large factor": (lambda x: x * 1e5, {"x": mg.f16[64]}),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_functions_are_compared_where_they_are_defined(name: str) -> None:
    fn, inputs = PARTIAL[name]
    assert "numerics" in optimized(fn, **inputs).certificate.tiers


def test_a_wrong_logarithm_is_refused() -> None:
    program = mg.trace(lambda x: mg.log(x), {"x": VECTOR}, name="edge")
    for factor in (1.0, 1.001):
        report = numeric_check(
            program, lambda i, b, f=factor: [i["x"].log() * f], bindings=[{}], how="torch", draws=("normal",)
        )
        assert {r.draw for r in report.counted} == {"positive"}
        assert report.passed == (factor == 1.0)


def test_a_program_without_any_finite_result_has_no_numeric_tier() -> None:
    result = optimized(lambda x: mg.log(-(x * x) - 1), x=VECTOR)
    assert result.certificate.tiers == ("tested", "proved")
    assert any("not compared with float64" in n for n in result.notes)
    text = result.certificate.to_json()
    assert Certificate.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: mg.rms_norm(mg.exp(x)),
        lambda x: mg.layer_norm(mg.exp(x)),
        lambda x: mg.exp(x) / mg.sqrt(mg.sum(mg.exp(x) * mg.exp(x), -1, keepdims=True)),
    ],
)
def test_sources_are_held_to_no_more_than_the_program_where_it_overflows(fn: Callable[..., Any]) -> None:
    result = optimized(fn, x=SQUARE)
    assert "numerics" in result.certificate.tiers
    x = torch.randn(8, 8)
    assert torch.isfinite(result(x)).all()


def test_softmax_is_held_to_large_logits() -> None:
    result = optimized(lambda q, k: mg.softmax(q @ k, -1), q=mg.f16[8, 16], k=mg.f16[16, 8])
    assert result.graph.kernels()
    rows = [r for t in result.certificate.numerics for r in t.rows]
    assert any(r.draw == "logits" for r in rows)
    assert all(r.counted and not r.excused for r in rows)


def disagreeing(report: NumericReport) -> NumericReport:
    return replace(report, rows=tuple(replace(r, ratio=2.0, counted=True) for r in report.rows))


def test_a_refused_source_gives_way_to_library_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.numeric_tier

    def refuses_kernels(verified: Any, *rest: Any) -> NumericReport:
        report = real(verified, *rest)
        return disagreeing(report) if verified.graph.kernels() else report

    monkeypatch.setattr(pipeline, "numeric_tier", refuses_kernels)
    result = optimized(lambda x: mg.softmax(x), x=SQUARE)
    assert not result.graph.kernels()
    assert any("refused" in n and "does not agree with float64" in n for n in result.notes)
    assert result.report.to_dict()["candidates"][-1]["verdict"] == "chosen"
    x = torch.randn(8, 8)
    torch.testing.assert_close(result(x), x.softmax(-1))
    monkeypatch.setattr(pipeline, "numeric_tier", lambda *given: disagreeing(real(*given)))
    with pytest.raises(VerificationError, match="does not agree"):
        optimized(lambda x: mg.softmax(x), x=SQUARE)


# -- element types


def test_unsigned_numbers_wrap() -> None:
    result = optimized(lambda x: mg.relu(-x) + x, x=mg.u8[4])
    x = torch.arange(4, dtype=torch.uint8)
    torch.testing.assert_close(result(x), (-x).relu() + x)


def test_integers_wrap_before_what_is_not_linear() -> None:
    result = optimized(lambda x, w: mg.relu(x @ w), x=mg.i32[4, 4], w=mg.i32[4, 4])
    x = torch.randint(-(2**30), 2**30, (4, 4), dtype=torch.int32)
    w = torch.randint(-(2**30), 2**30, (4, 4), dtype=torch.int32)
    torch.testing.assert_close(result(x, w), (x @ w).relu())


def test_f64_mixed_with_f32_is_held_to_f32() -> None:
    program = mg.trace(lambda x, y: x + y, {"x": mg.f32[64], "y": mg.f64[64]}, name="edge")
    (single, double) = (
        numeric_check(program, run, bindings=[{}], how="torch")
        for run in (
            lambda i, b: [(i["x"] + i["y"].float()).double()],
            lambda i, b: [(i["x"] + i["y"].half()).double()],
        )
    )
    assert single.passed
    assert not double.passed


# -- small, deep and malformed


@pytest.mark.parametrize("target", ["torch", "cuda:90"])
def test_the_smallest_programs(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_INTERPRET", "1")
    one = optimized(lambda x: x + 1, target, x=mg.f32[1])
    scalar = optimized(lambda x: x * 2, target, x=mg.f32)
    product = optimized(lambda x, y: x @ y, target, x=mg.f32[1, 1], y=mg.f32[1, 1])
    torch.testing.assert_close(one(torch.ones(1)), torch.full((1,), 2.0))
    torch.testing.assert_close(scalar(torch.tensor(3.0)), torch.tensor(6.0))
    torch.testing.assert_close(product(torch.full((1, 1), 2.0), torch.full((1, 1), 3.0)), torch.full((1, 1), 6.0))
    assert str(one)
    assert str(scalar)


def test_a_program_too_deep_for_the_search_runs_as_library_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_deep(*args: Any, **options: Any) -> Any:
        raise RecursionError

    monkeypatch.setattr(pipeline, "search", too_deep)
    result = optimized(lambda x: mg.tanh(x) * 0.9, x=VECTOR)
    assert not result.graph.kernels()
    assert any("nest too deeply" in n for n in result.notes)
    assert "Unsearchable" in str(result)


@pytest.mark.parametrize("zero", [0, 0.0])
def test_division_by_zero_names_the_line(zero: float) -> None:
    with pytest.raises(UnsupportedOpError, match="constant 0") as error:
        mg.trace(lambda x: x / zero, {"x": VECTOR}, name="edge")
    assert error.value.where
    assert "test_edges.py" in error.value.where


def test_an_input_may_be_called_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    result = optimized(lambda out, run: out - run, out=VECTOR, run=VECTOR)
    a, b = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(result(out=a, run=b), a - b)
    torch.testing.assert_close(result(a, b), a - b)
    assert "def run(out_2, run_2, *, out=None)" in result.source
    assert "out_2: f32[4], run_2: f32[4] ->" in result.source


def test_cache_object_is_left_alone_by_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any) -> NumericReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "numeric_tier", interrupted)
    program = mg.trace(lambda x: mg.softmax(x), {"x": SQUARE}, name="edge")
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    assert result.interrupted
    assert result.certificate.tiers == ("tested", "proved")
    assert any("interrupted before" in n for n in result.notes)
    assert not list(Cache(tmp_path).ls())


# -- the command line


def run(arguments: list[str], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MUGRAPH_CACHE_DIR": str(folder / "cache")} | options.pop("environment", {})
    command = [sys.executable, "-m", "mugraph", *arguments]
    where = {"cwd": Path(__file__).parents[1], "env": environment, "stderr": subprocess.PIPE, "text": True}
    return subprocess.run(command, check=False, **where, **options)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        for arguments in (["cache", "path"], ["--help"]):
            done = run(arguments, tmp_path, stdout=full)
            assert (done.returncode, done.stderr) == (1, "cannot write to stdout: No space left on device\n")


def test_places_that_cannot_be_written_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write"):
        check_writable(tmp_path / "file" / "out")
    assert check_writable(tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "file"))
    assert main(["cache", "ls"]) == 2
    assert "is no directory" in capsys.readouterr().err


def test_a_manifest_of_another_form_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("[]")
    assert main(["verify", str(tmp_path)]) == 4
    assert "manifest.json is not what" in capsys.readouterr().err
    assert main(["show", str(tmp_path)]) == 2
    assert "graph.json" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupt_in_the_numeric_check_saves_what_is_verified(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: Any) -> NumericReport:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "numeric_tier", interrupted)
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    text = "import mugraph as mg\n\ndef f(x: mg.f32[8, 8]):\n    return mg.softmax(x)\n"
    (tmp_path / "model.py").write_text(text)
    place = tmp_path / "out"
    assert main(["optimize", f"{tmp_path / 'model.py'}:f", "--target", "torch", "-o", str(place), *options]) == 130
    assert "nothing was saved" not in capsys.readouterr().err
    saved = mg.load(place)
    assert saved.certificate.tiers == ("tested", "proved")
    assert any("interrupted before" in n for n in saved.notes)
