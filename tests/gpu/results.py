"""Results as the tests on a device call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import mugraph as mg
from benchmarks.checks import sizes_of
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.pipeline import Result, emit
from mugraph.runtime.bench import random_inputs
from mugraph.runtime.tune import combined
from mugraph.verify.equivalence import verify

LAST = "last blocks combine"
# with splits, combined apart and by the last blocks, and with work ahead
NAMES = (*CLASSIC, "split_k", "constant_lora", "two_weights", "layernorm", f"gqa, {LAST}", f"mla, {LAST}")
every_program = pytest.mark.parametrize("name", NAMES)
every_way = pytest.mark.parametrize("way", ["Triton", "cubins"])


def call_of(name: str, way: str) -> tuple[Result, Callable[..., Any]]:
    """A result, and how it is called: launched by Triton, or from cubins after `warmup`."""
    name, _, variant = name.partition(", ")
    result = mg.optimize(PROGRAMS[name], target="cuda", tune="fit")
    if variant == LAST and result.has_kernels:
        result = combined_by_last_blocks(result)
    return result, result.executable if way == "Triton" else result.warmup()


def combined_by_last_blocks(result: Result) -> Result:
    verified = verify(result.program, result.graph, cuts=result.certificate.cuts)
    trace = (*result.tuning.options, *combined(verified, result.target.machine))
    source = emit(verified, result.target, trace)
    assert "tl.atomic_add(arrivals" in source
    return replace(result, source=source, tuning=replace(result.tuning, trace=trace))


def drawn(result: Result, size: int, seed: int = 0) -> list[torch.Tensor]:
    return random_inputs(result.program, sizes_of(result.program, size), "cuda", seed)
