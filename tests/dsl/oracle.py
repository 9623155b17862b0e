"""Runs one function twice: traced and evaluated by the float64 oracle, and in torch float64."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mugraph.dsl.trace import TensorSpec, trace
from mugraph.ir.axes import size_value
from mugraph.ir.check import check
from mugraph.ir.evaluate import TypeAlgebra, evaluate, reference
from mugraph.ir.graph import Program
from mugraph.ir.infer import Type, type_of
from mugraph.ir.parser import parse_program

SIZES = {"B": 5, "S": 6, "L": 3}


def arrays_for(p: Program, bindings: Mapping[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    arrays = {}
    for i in p.inputs:
        shape = tuple(size_value(s, bindings) for s in i.tensor.shape)
        if i.tensor.dtype.is_float:
            arrays[i.name] = draw.standard_normal(shape)
        else:
            arrays[i.name] = draw.integers(0, 2, shape).astype(bool if i.tensor.dtype.value == "bool" else np.int64)
    return arrays


def check_types(p: Program) -> None:
    """Every declared type has the axes that inference finds, and its element type."""
    inputs: dict[str, Type] = {i.name: type_of(i.tensor) for i in p.inputs}
    found = evaluate(p, inputs, TypeAlgebra())
    for name, t in p.tensors().items():
        assert set(found[name].axes) == set(t.axes), f"{t} has the axes {found[name].axes}"
        assert found[name].dtype is t.dtype, f"{t} is inferred as {found[name].dtype}"


def agree(fn: Callable[..., Any], specs: Sequence[TensorSpec], torch_fn: Callable[..., Any] | None = None) -> Program:
    """Traces fn, checks types, and compares with torch; returns the program."""
    p = trace(fn, specs)
    check(p)
    check_types(p)
    assert parse_program(str(p)) == p
    arrays = arrays_for(p, SIZES)
    torch.set_default_dtype(torch.float64)
    try:
        expected = (torch_fn or fn)(*(torch.from_numpy(a) for a in arrays.values()))
    finally:
        torch.set_default_dtype(torch.float32)
    expected = expected if isinstance(expected, tuple | list) else (expected,)
    results = reference(p, arrays, SIZES)
    assert len(results) == len(expected)
    for r, e in zip(results, expected, strict=True):
        assert r.shape == tuple(e.shape)
        np.testing.assert_allclose(r, e.numpy(), rtol=1e-9, atol=1e-9)
    return p
