"""A gated MLP, silu(x @ w1) * (x @ w2), as one kernel that reads x once.

Run it with `python -m examples.gated_mlp`.
"""

import torch

import mugraph as mg

B = mg.Dim("b", 1, 4096)
Weight = mg.constant(mg.f16[4096, 4096])


@mg.program
def gated_mlp(x: mg.f16[B, 4096], w1: Weight, w2: Weight):
    return mg.silu(x @ w1) * (x @ w2)


def naive(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ w1) * (x @ w2)


def tensors(b: int, device: str = "cpu") -> list[torch.Tensor]:
    """x [b, 4096], w1 and w2 [4096, 4096]: f16, with products of unit size."""
    torch.manual_seed(0)
    x = torch.randn(b, 4096, device=device).half()
    w1, w2 = ((torch.randn(4096, 4096, device=device) / 64).half() for _ in range(2))
    return [x, w1, w2]


def main() -> None:
    result = mg.superoptimize(gated_mlp)
    (kernel,) = result.graph.kernels()
    (block,) = kernel.op.blocks
    (loop,) = block.passes
    assert [ld.source for ld in loop.loads].count("x") == 1, "both products use the same tiles of x"

    inputs = tensors(b=4, device="cpu" if result.target.kind == "torch" else "cuda")
    expected = naive(*(t.double() for t in inputs))
    error = (result(*inputs).double() - expected).abs().max().item()
    assert error < 1.6e-2, "two units in the last place of f16 at the largest result, which is below 16"
    print(f"gated_mlp for {result.target}: one kernel, x loaded once; error {error:.1e} (f16)")


if __name__ == "__main__":
    main()
