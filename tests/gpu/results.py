"""Results as the tests on a device call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mugraph as mg
from benchmarks.checks import sizes_of
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.pipeline import Result
from mugraph.runtime.bench import random_inputs

NAMES = (*CLASSIC, "split_k", "constant_lora", "two_weights", "layernorm")  # with splits, and with work ahead
every_program = pytest.mark.parametrize("name", NAMES)
every_way = pytest.mark.parametrize("way", ["Triton", "cubins"])


def call_of(name: str, way: str) -> tuple[Result, Callable[..., Any]]:
    """A result, and how it is called: launched by Triton, or from cubins after `warmup`."""
    result = mg.optimize(PROGRAMS[name], target="cuda", tune="fit")
    return result, result.executable if way == "Triton" else result.warmup()


def drawn(result: Result, size: int, seed: int = 0) -> list[torch.Tensor]:
    return random_inputs(result.program, sizes_of(result.program, size), "cuda", seed)
