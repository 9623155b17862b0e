"""A PyTorch function, optimised where it stands: one kernel for a gated MLP with its norm.

The function is captured at its first call through torch.export.  `dynamic` makes a size symbolic, so that one result
serves every number of rows from 2 on; a single row has a result of its own.  A function with an operator that is not
understood runs as it was written, with a warning.

Run it with `python -m examples.pytorch_function`.
"""

import warnings

import torch

import mugraph as mg

ROWS = mg.Dim("rows", 1, 256)


@mg.superoptimize(dynamic={"x": {0: ROWS}})
def gated(x: torch.Tensor, weight: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    x = torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)
    return torch.nn.functional.silu(x @ w1) * (x @ w2)


@mg.superoptimize
def sorted_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.sort(x, dim=-1).values


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight, w1, w2 = (torch.randn(shape, device=device) / 16 for shape in ((256,), (256, 512), (256, 512)))
    for rows in (1, 5, 64):
        x = torch.randn(rows, 256, device=device)
        found, wanted = gated(x, weight, w1, w2), gated.original(x, weight, w1, w2)
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5), "f32, sums of 256 products"
    assert len(gated.specialisations) == 2, "one result for a single row, one for all other numbers of rows"
    assert all(len(s.result.graph.kernels()) == 1 for s in gated.specialisations.values())
    print(f"gated: one kernel for 1 row, one for 2 to {ROWS.max} rows, target {gated.result.target}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = torch.randn(4, 8, device=device)
        assert torch.equal(sorted_rows(x), torch.sort(x, dim=-1).values), "the original function runs"
    print(f"sorted_rows: {str(caught[0].message).splitlines()[0]}")


if __name__ == "__main__":
    main()
