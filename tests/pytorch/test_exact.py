"""Numbers that eager PyTorch computes well are computed well: data far from 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import mugraph as mg

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
