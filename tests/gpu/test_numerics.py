"""Every program in every element type on a device, at odd sizes, in odd memory, against float64."""

from __future__ import annotations

import pytest
import torch

import mugraph as mg
from benchmarks.checks import LAYOUTS, all_sizes, bytes_of_comparison, compare, reduced_report
from benchmarks.programs import FAMILIES
from benchmarks.resources import DTYPES, in_dtype
from mugraph.pipeline import Result
from mugraph.runtime.bench import random_inputs

pytestmark = pytest.mark.gpu
CASES = {f"of-{name}-in-{dtype}": (name, dtype) for name in FAMILIES for dtype in DTYPES}
every_case = pytest.mark.parametrize(("name", "dtype"), CASES.values(), ids=CASES)


def result_of(name: str, dtype: str) -> Result:
    """What users get on this device."""
    program = in_dtype(next(iter(FAMILIES[name].variants.values())), dtype)
    return mg.optimize(program, target="cuda", tune="fit")


@pytest.fixture(autouse=True)
def all_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the program as written is held to: f32 products by all their bits, sums of f16 and bf16 in f32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False)


@every_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_float64_at_reduced_odd_sizes(name: str, dtype: str, layout: str) -> None:
    report = reduced_report(result_of(name, dtype), layout, "cuda")
    assert report.passed, str(report)


@every_case
def test_it_agrees_with_float64_at_true_sizes(name: str, dtype: str) -> None:
    result = result_of(name, dtype)
    program = result.program
    assert {r.how for r in result.certificate.numerics} == {"device" if result.has_kernels else "torch"}
    calls = {"Triton": result.executable, "cubins": result.warmup()}
    fitting = []
    for sizes in all_sizes(program):
        torch.cuda.empty_cache()
        if bytes_of_comparison(program, sizes) < torch.cuda.mem_get_info()[0]:
            fitting.append(compare(calls, program, random_inputs(program, sizes, "cuda"), list(LAYOUTS)))
    if not fitting:
        pytest.skip("the device has too little memory for the program in float64")
    assert all(fitting)
