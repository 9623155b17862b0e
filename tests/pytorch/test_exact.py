"""Numbers that eager PyTorch computes well are computed well: data far from 0, and rows with infinities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import mugraph as mg
from mugraph.pipeline import optimize, runner

Function = Callable[..., torch.Tensor]


def far(*shape: int, mean: float = 1000.0, deviation: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * deviation + mean


def covariance(x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(0)
    return centred.t() @ centred / (len(x) - 1)


def normed_linear(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:]) @ torch.linspace(-1, 1, x.shape[-1] * 8, dtype=x.dtype).view(-1, 8)


FAR: dict[str, tuple[Function, torch.Tensor]] = {
    "std": (lambda x: x.std(-1) * 2, far(4, 50, mean=10_000.0)),
    "var": (lambda x: x.var(0), far(64, 8, mean=100.0, deviation=1e-3)),
    "covariance": (covariance, far(200, 8)),
    "layer_norm": (lambda x: F.layer_norm(x, (64,)) * 2, far(16, 64)),
    "group_norm": (lambda x: F.group_norm(x, 4) * 2, far(4, 16, 8)),
    "norm and linear": (normed_linear, far(16, 64)),
    "distances to the mean": (lambda x: (x - x.mean(-1, keepdim=True)).square().sum(-1).sqrt(), far(16, 64)),
    "given mean": (lambda x, m: ((x - m).square().sum(-1), (x - m) @ x.t())[0], far(16, 64)),
}


@pytest.mark.parametrize("name", FAR)
def test_data_far_from_zero_keeps_the_digits_that_eager_keeps(name: str) -> None:
    fn, x = FAR[name]
    args = (x, x.mean(-1, keepdim=True)) if name == "given mean" else (x,)
    fast, wanted = mg.superoptimize(fn), fn(*(a.double() for a in args))
    found, eager = fast(*args).double(), fn(*args).double()
    least = wanted.abs().max() * 1e-4  # a mean that is rounded once; PyTorch's own variance mends it on the way
    assert (found - wanted).abs().max() <= 4 * (eager - wanted).abs().max() + least


# -- infinities: a row that is masked by -inf in the data, in part or wholly, and rows with +inf

INF = math.inf


def rows(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """All -inf; -inf up to the last numbers, which a loop meets in its last tile; -inf in front; one +inf, all +inf,
    both infinities; the least finite number; ordinary numbers."""
    x = torch.randn(8, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0], x[1, : columns - 5], x[2, 0] = -INF, -INF, -INF
    x[3, 3], x[4], x[5, 0], x[5, -1] = INF, INF, INF, -INF
    x[6] = torch.finfo(dtype).min
    return x


ROWS: dict[str, Function] = {
    "logsumexp": lambda x: torch.logsumexp(x, -1) * 2,
    "softmax": lambda x: torch.softmax(x, -1) * 2,
    "logaddexp": lambda x: torch.logaddexp(x[:, ::2], x[:, 1::2]) * 2,
    "sum of two": lambda x: torch.logsumexp(x, -1) + torch.logsumexp(x * 0.5, -1),
}


@pytest.mark.parametrize("effort", ["none", "quick"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_with_infinities_give_what_eager_gives(name: str, dtype: torch.dtype, effort: str) -> None:
    x, near = rows(40, dtype), 1e-4 if dtype.itemsize > 2 else 2e-2
    fast = mg.superoptimize(ROWS[name], effort=effort)
    torch.testing.assert_close(fast(x), ROWS[name](x), rtol=near, atol=near, equal_nan=True)


def test_the_logarithm_of_a_softmax_with_infinities_is_that_of_eager() -> None:
    x = rows(40)[[0, 1, 2, 3, 4, 5, 7]]
    for effort in ("none", "quick"):
        fast = mg.superoptimize(lambda x: torch.log_softmax(x, -1) * 2, effort=effort)
        torch.testing.assert_close(fast(x), fast.original(x), rtol=1e-4, atol=1e-4, equal_nan=True)


K = 1000


@mg.program
def log_sum(x: mg.f32[mg.Dim("B"), K]):
    return mg.logsumexp(x, -1)


@mg.program
def softmax(x: mg.f32[mg.Dim("B"), K]):
    return mg.softmax(x, -1)


@mg.program
def attention(q: mg.f32[mg.Dim("B"), 16], k: mg.f32[K, 16], v: mg.f32[K, 16], bias: mg.f32[mg.Dim("B"), K]):
    return mg.softmax(q @ k.T / 4 + bias, -1) @ v


LOWERED: list[tuple[mg.Program, Function]] = [
    (log_sum, lambda x: torch.logsumexp(x, -1)),
    (softmax, lambda x: torch.softmax(x, -1)),
    (attention, lambda q, k, v, bias: torch.softmax(q @ k.t() / 4 + bias, -1) @ v),
]
SPACES = {
    "tile": mg.SearchSpace(loops=(), split=False, library=False),
    "loop": mg.SearchSpace(split=False, library=False),
    "split": mg.SearchSpace(library=False),
}


@pytest.mark.parametrize("target", ["torch", "cuda:90"])
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(("program", "eager"), LOWERED, ids=lambda p: getattr(p, "name", ""))
def test_kernels_give_what_eager_gives_for_rows_with_infinities(
    program: mg.Program, eager: Function, space: str, target: str
) -> None:
    chosen = SPACES[space]
    if space == "loop":
        axis = next(a.name for a in program.axes().values() if a.size == K)
        chosen = chosen.but(tiles=((axis, 64),))
    result = optimize(program, target=target, space=chosen.but(sizes=()), tune="none")
    names = [i.name for i in program.inputs]
    torch.manual_seed(0)
    args = [torch.randn(8 if n == "q" else K, 16) for n in names[:-1]] + [rows(K)]
    wanted = eager(*args)
    with runner(result.source, result.target, program) as (run, how):
        given = dict(zip(names, args, strict=True))
        found = run(given, {}, [torch.empty_like(wanted)]) if how == "torch" else run(given, {})
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
