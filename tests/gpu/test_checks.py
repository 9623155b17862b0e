"""The checks of the device tests, on a CPU: what is right passes, what is wrong in one way is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from benchmarks import checks
from benchmarks.checks import LAYOUTS, compare, guarded, in_threads, into_guarded, reduced_report, sizes_of
from mugraph.ir.graph import Program
from mugraph.ir.types import DType
from mugraph.pipeline import Result
from mugraph.runtime.bench import random_inputs
from tests import graphs
from tests.gpu import sanitized

ROOT = Path(__file__).parent.parent.parent
Call = Callable[..., Any]


@pytest.fixture(scope="module")
def result() -> Result:
    return mg.optimize(graphs.gated_mlp(k_size=24, n_size=40), target="torch")


def drawn(program: Program, size: int = 5, seed: int = 0) -> list[torch.Tensor]:
    return random_inputs(program, sizes_of(program, size), "cpu", seed)


@pytest.mark.parametrize("layout", ["shifted", "turned"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0, 3), (5, 8), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.bool])
def test_odd_memory_holds_the_same_values(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = (torch.rand(shape) * 5).to(dtype)
    odd = LAYOUTS[layout](t)
    assert odd.shape == t.shape
    assert torch.equal(odd, t)
    assert odd.storage_offset() == 1
    if len(shape) > 1 and t.numel():
        assert not odd.is_contiguous()
    if layout == "turned" and shape == (5, 8):
        assert odd.stride() == (1, 6)


def test_what_lies_between_odd_rows_is_nan() -> None:
    odd = checks.shifted(torch.ones(3, 4))
    assert torch.as_strided(odd, (16,), (1,), 0).isnan().sum() == 4


def test_a_result_between_guards_starts_as_nan() -> None:
    out, check = guarded(torch.zeros(3, 5))
    assert out.isnan().all()
    assert out.storage_offset() % 2 == 1
    out.zero_()
    check()
    assert guarded(torch.zeros(2, dtype=torch.int32))[0].tolist() == [checks.MARK] * 2


@pytest.mark.parametrize("at", [-1, 15])
def test_a_write_beside_a_result_is_refused(at: int) -> None:
    out, check = guarded(torch.zeros(3, 5))
    torch.as_strided(out, (1,), (1,), out.storage_offset() + at).fill_(0.0)
    with pytest.raises(AssertionError, match="outside the result"):
        check()


def test_a_call_must_use_what_it_is_given_and_keep_its_inputs(result: Result) -> None:
    inputs = drawn(result.program)
    like = [result(*inputs)]
    into_guarded(result, result.program, inputs, like)
    with pytest.raises(AssertionError, match="out= was not used"):
        into_guarded(lambda *given, out: result(*given), result.program, inputs, like)

    def overwrites(*given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result(*given, out=out)
        given[1].zero_()
        return out

    with pytest.raises(AssertionError, match="changes its input"):
        into_guarded(overwrites, result.program, inputs, like)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_right_source_agrees_at_reduced_sizes(result: Result, layout: str) -> None:
    report = reduced_report(result, layout, "cpu")
    assert report.passed
    assert {dict(r.bindings)["B"] for r in report.rows} == set(checks.SIZES)


def test_a_wrong_source_disagrees_at_reduced_sizes(result: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    emit = checks.emit
    monkeypatch.setattr(checks, "emit", lambda *given: emit(*given).replace("silu", "tanh"))
    assert not reduced_report(result, "dense", "cpu").passed


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_a_right_call_is_near_float64(dtype: str) -> None:
    program = graphs.gated_mlp(DType(dtype), k_size=24, n_size=40)
    call = mg.optimize(program, target="torch")
    assert compare({"a call": call}, program, drawn(program), list(LAYOUTS)) == 3


def test_what_overflows_as_written_is_not_compared(result: Result) -> None:
    x, *rest = drawn(result.program)
    x[0, 0] = torch.finfo(x.dtype).max
    assert compare({"a call": result}, result.program, [x, *(8 * t for t in rest)], ["dense"]) == 0


def leaves_out_the_last(call: Call) -> Call:
    def other(*given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        call(*given, out=out)
        out[..., -1] = torch.nan
        return out

    return other


def drops_a_summand(call: Call) -> Call:
    def other(x: torch.Tensor, *rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        short = x.clone()
        short[:, -1] = 0
        return call(short, *rest, out=out)

    return other


def ignores_strides(call: Call) -> Call:
    def other(x: torch.Tensor, *rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return call(torch.as_strided(x, x.shape, (x.shape[1], 1)), *rest, out=out)

    return other


@pytest.mark.parametrize("wrong", [leaves_out_the_last, drops_a_summand, ignores_strides])
def test_a_wrong_call_is_not_near_float64(result: Result, wrong: Callable[[Call], Call]) -> None:
    with pytest.raises(AssertionError, match="off by"):
        compare({"a call": wrong(result)}, result.program, drawn(result.program), ["shifted"])


def test_threads_are_compared_with_a_call_alone(result: Result) -> None:
    in_threads(result, [drawn(result.program, 5, 1), drawn(result.program, 17, 2)], 3, nullcontext)


def test_threads_that_share_a_result_are_refused(result: Result) -> None:
    first, second = drawn(result.program, 5, 1), drawn(result.program, 5, 2)
    shared = torch.empty_like(result(*first))
    with pytest.raises(AssertionError):
        in_threads(lambda *given: result(*given, out=shared), [first, second], 2, nullcontext)


def test_what_a_thread_raises_is_raised(result: Result) -> None:
    inputs = drawn(result.program)
    alone = iter([True, True])  # the calls before the threads

    def fails(*given: torch.Tensor) -> torch.Tensor:
        if next(alone, False):
            return result(*given)
        raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        in_threads(fails, [inputs, inputs], 1, nullcontext)


def test_the_memory_that_a_comparison_needs_grows_with_the_batch() -> None:
    program = graphs.gated_mlp(k_size=24, n_size=40)
    one, two = (checks.bytes_of_comparison(program, {"B": b}) for b in (1, 2))
    assert one > 8 * (24 + 2 * 24 * 40)
    assert two > one


def test_the_script_for_the_sanitizer_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitized.main(["--target", "torch"]) == 0
    assert capsys.readouterr().out.split() == [p.name for p in sanitized.programs()]


def script(*more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu.sanitized", *more],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_planted_store_runs() -> None:
    """Inside its tensor; what is outside is for the sanitizer."""
    done = script("--past", "0", "--target", "torch", TRITON_INTERPRET="1")
    assert done.stdout == f"stored {sum(range(32))}\n", done.stderr


def test_kernels_agree_in_odd_memory_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_INTERPRET", "1")
    program = graphs.gated_mlp(k_size=24, n_size=40)
    result = mg.optimize(program, target="cuda:90")
    assert result.has_kernels
    compare({"a call": result}, program, drawn(program), ["dense", "turned"])
    with pytest.raises(AssertionError, match="off by"):
        compare({"a call": drops_a_summand(result)}, program, drawn(program), ["dense"])


def test_device_tests_say_why_they_are_skipped() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "tests/gpu/test_streams.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a CUDA device" in done.stdout
    assert "passed" not in done.stdout
