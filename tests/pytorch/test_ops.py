"""Every ATen operator that mugraph means computes what it does eagerly, types and shapes included; others are refused
by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

import mugraph as mg
from mugraph import pipeline
from mugraph.errors import CaptureError, FallbackWarning, ShapeError, UnsupportedOpError
from mugraph.pytorch.capture import Captured, capture
from mugraph.runtime.load import load_module
from mugraph.search.build import baseline
from mugraph.transpiler import torch as torch_code
from tests.pytorch.op_rows import ROWS, Draw, Row

# How far two results of one type may lie apart: eager PyTorch rounds after every operator, mugraph once a kernel.
NEAR = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def same(found: Any, wanted: Any, dtype: torch.dtype) -> None:
    found, wanted = pytree.tree_leaves(found), pytree.tree_leaves(wanted)
    assert len(found) == len(wanted)
    for x, y in zip(found, wanted, strict=True):
        near = max(NEAR.get(y.dtype, 0), NEAR.get(dtype, 0)) if y.dtype.is_floating_point else 0
        torch.testing.assert_close(x, y, rtol=near, atol=near, equal_nan=True)


def called(captured: Captured, run: Any, args: tuple[Any, ...]) -> Any:
    found = run(*captured.flatten(args))
    return captured.unflatten(found if isinstance(found, tuple) else (found,))


def drawn(row: Row, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], Any] | None:
    """Arguments and the eager results; None where PyTorch takes no such types."""
    args = row.draw(Draw(dtype, seed))
    try:
        return args, row.fn(*args)
    except RuntimeError:
        return None


# PyTorch itself warns where weights have another type than what they scale.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.mark.parametrize("name", ROWS)
def test_an_operator_computes_what_it_does_eagerly(name: str) -> None:
    """One draw, of a type that goes by the row's place, as library calls."""
    row, place = ROWS[name], list(ROWS).index(name)
    draws = ((d, drawn(row, d, place)) for d in row.dtypes[place % len(row.dtypes) :] + row.dtypes)
    dtype, found = next((d, f) for d, f in draws if f is not None)
    args, wanted = found
    captured = capture(row.fn, args)
    run = load_module(torch_code.emit(baseline(captured.program)), "op").run
    same(called(captured, run, args), wanted, dtype)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ROWS)
def test_an_operator_is_optimised_to_what_it_does_eagerly(name: str, seed: int) -> None:
    """All types that PyTorch takes, searched, verified and run."""
    row, count = ROWS[name], 0
    for dtype in row.dtypes:
        if (found := drawn(row, dtype, 100 * seed + 7)) is None:
            continue
        args, wanted = found
        captured = capture(row.fn, args)
        same(called(captured, pipeline.optimize(captured.program, target="torch"), args), wanted, dtype)
        count += 1
    assert count


MEANT = """
    linear matmul mm bmm addmm einsum baddbmm add sub mul div neg pow square sqrt rsqrt reciprocal exp exp2 log sigmoid
    silu gelu relu tanh abs clamp maximum minimum mean sum amax softmax _softmax _safe_softmax logsumexp rms_norm
    layer_norm native_layer_norm group_norm linalg_vector_norm var_mean scaled_dot_product_attention view reshape
    permute transpose t unsqueeze squeeze expand flatten cat stack chunk split slice select repeat_interleave clone
    contiguous to _to_copy where masked_fill full ones arange triu eq le ge logical_and logical_not any index_select
    gather embedding
"""


def test_the_table_covers_the_operators_that_are_meant() -> None:
    covered = {op for row in ROWS.values() for op in row.ops.split()}
    assert not set(MEANT.split()) - covered


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
N = torch.arange(6)
MASK = X > 0

# What PyTorch computes and mugraph cannot have exactly: refused with the operator's name and a reason.
REFUSED: dict[str, tuple[Any, tuple[Any, ...], str, str]] = {
    "rounded division": (lambda x: torch.div(x, 2, rounding_mode="floor"), (X,), "div", "rounded by floor"),
    "powers by tensors": (lambda x: x.abs() ** x, (X,), "pow", "tensor as exponent"),
    "powers of negative bases": (lambda x: (-2.0) ** x, (X,), "pow", "positive base"),
    "powers of two of integers": (lambda n: 2**n, (N,), "pow", "float exponent"),
    "infinite powers": (lambda x: x**math.inf, (X,), "pow", "finite exponent"),
    "dropout": (lambda x: F.dropout(x, 0.5), (X,), "dropout", "training"),
    "attention with dropout": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.1),
        (X,),
        "scaled_dot_product_attention",
        "dropout",
    ),
    "plus infinity": (lambda x, m: x.masked_fill(m, math.inf), (X, MASK), "where", "no rational number"),
    "NaN": (lambda x: x + math.nan, (X,), "add", "no rational number"),
    "a division by zero": (lambda x: x / 0, (X,), "div", "constant 0"),
    "comparisons of what is masked": (
        lambda x, m: x.masked_fill(m, -math.inf) > 0,
        (X, MASK),
        "gt",
        "masked to minus infinity",
    ),
    "powers of what is masked": (
        lambda x, m: (x.masked_fill(m, -math.inf) ** 3).exp(),
        (X, MASK),
        "pow",
        "masked to minus infinity",
    ),
    "fractions counted": (lambda x: x[0] + torch.arange(0, 0.6, 0.1), (X,), "arange", "fractions"),
    "an index that is computed": (lambda x, i: x.index_select(0, i - 1), (X, N[1:4]), "index_select", "negative"),
    "repeats by a tensor": (
        lambda x, n: x.repeat_interleave(n, output_size=15, dim=1),
        (X, N),
        "repeat_interleave",
        "",
    ),
    "bits under another type": (lambda x: x.view(torch.int32) + 1, (X,), "view", "another element type"),
    "logical operators on bits": (lambda n: n & 1, (N,), "and", "bool"),
    "variance of one element": (lambda x: x[:, :1].var(-1), (X,), "var", "correction"),
    "norms of negative order": (lambda x: torch.linalg.vector_norm(x, -2), (X,), "linalg_vector_norm", "order"),
    "slices that leave nothing": (lambda x: x[:, 3:3].sum(1) + x[:, 0], (X,), "slice", "nothing is left"),
    "floats as unsigned integers": (lambda x: x.to(torch.uint8), (X,), "to", "uint8"),
    "another device": (lambda x: x.to("meta") * 2, (X,), "to", "beside others on cpu"),
    "complex numbers": (lambda x: x * 1j, (X,), "", "complex"),
    "random numbers": (lambda x: x + torch.rand_like(x), (X,), "rand", "not supported"),
    "sorting": (lambda x: x.sort().values, (X,), "sort", "not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_exact_is_refused_by_name(what: str) -> None:
    fn, args, op, reason = REFUSED[what]
    with pytest.raises((UnsupportedOpError, ShapeError, CaptureError)) as caught:
        capture(fn, args)
    assert op in (caught.value.op or "")
    assert reason in str(caught.value)
    assert caught.value.remedy


def test_what_is_refused_runs_as_it_was_written() -> None:
    fn, args, _, _ = REFUSED["rounded division"]
    with pytest.warns(FallbackWarning, match="test_ops.py"):
        found = mg.superoptimize(fn)(*args)
    assert torch.equal(found, fn(*args))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, i: F.embedding(i, w) * 2,
        lambda w, i: w.index_select(0, i) * 2,
        lambda w, i: w.gather(0, i[:, None].expand(2, 6)) * 2,
        lambda w, i: F.embedding(i.view(2, 1).long(), w) * 2,
    ],
)
def test_negative_indices_are_refused_where_they_are_eagerly(fn: Any) -> None:
    fast = mg.superoptimize(fn, strict=True)
    good, bad = torch.tensor([3, 0]), torch.tensor([1, -1])
    torch.testing.assert_close(fast(X, good), fn(X, good))
    assert fast.specialisations
    with pytest.raises((IndexError, RuntimeError)) as wanted:
        fn(X, bad)
    with pytest.raises(wanted.type):
        fast(X, bad)
    beyond = torch.tensor([1, 4])
    with pytest.raises((IndexError, RuntimeError)):
        fast(X, beyond)


def test_negative_indices_count_from_the_end_where_they_do_eagerly() -> None:
    fast = mg.superoptimize(lambda w, i: w[i] * 2, strict=True)
    i = torch.tensor([1, -1])
    torch.testing.assert_close(fast(X, i), X[i] * 2)


def test_positions_that_are_counted_need_no_check() -> None:
    captured = capture(lambda w, x: F.embedding(torch.arange(x.shape[0]) + 1, w) + x, (X, X[:3]))
    assert captured.natural == ()


def test_numbers_are_compared_as_the_type_holds_them() -> None:
    """0.1 in f16 is less than 0.1, and equal to it."""
    x = torch.tensor([0.1], dtype=torch.float16)
    fast = mg.superoptimize(lambda x: torch.where(x >= 0.1, x + 1, x - 1), strict=True)
    assert torch.equal(fast(x), x + 1)
