"""RMSNorm, then a linear layer, as one kernel (the QKV projection of LLaMA-2-7B; any number of rows).

As written, the norm needs a pass over x before the product can begin.  Found instead: both sums run in one loop over k,
and the division by the root happens once, after it, because it does not depend on k.

Run it with `python -m examples.rmsnorm_linear`.
"""

import torch

import mugraph as mg

B = mg.Dim("b", 1, 4096)


@mg.program
def rmsnorm_linear(x: mg.f16[B, 4096], g: mg.f16[4096], w: mg.constant(mg.f16[4096, 6144])):
    return mg.rms_norm(x, g, eps=1e-6) @ w


def naive(x: torch.Tensor, g: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), g, eps=1e-6) @ w


def tensors(b: int, device: str = "cpu") -> list[torch.Tensor]:
    """x [b, 4096], g [4096], w [4096, 6144]: f16, with results of unit size."""
    torch.manual_seed(0)
    shapes = (b, 4096), (4096,), (4096, 6144)
    x, g, w = (torch.randn(shape, device=device) for shape in shapes)
    return [x.half(), g.half(), (w / 64).half()]


def main() -> None:
    result = mg.superoptimize(rmsnorm_linear)
    (kernel,) = result.graph.kernels()
    (block,) = kernel.op.blocks
    (loop,) = block.passes
    assert len(loop.accumulators) == 2, "the sum of squares and the product share one loop"

    inputs = tensors(b=4, device="cpu" if result.target.kind == "torch" else "cuda")
    expected = naive(*(t.double() for t in inputs))
    error = (result(*inputs).double() - expected).abs().max().item()
    assert error < 8e-3, "two units in the last place of f16 at the largest result, which is below 8"
    print(f"rmsnorm_linear for {result.target}: one kernel, one loop, two accumulators; error {error:.1e} (f16)")


if __name__ == "__main__":
    main()
