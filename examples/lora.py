"""A linear layer with a low-rank adapter, x @ w + (x @ a) @ b, as one kernel.

x @ w and x @ a accumulate in one loop over k; the small product with b follows in the epilogue, which loads b.

Run it with `python -m examples.lora`.
"""

import torch

import mugraph as mg

B = mg.Dim("b", 1, 4096)
Down = mg.f16["k=4096", "r=16"]  # axes may be named, which makes the printed μGraph easier to read
Up = mg.f16["r=16", "n=4096"]


@mg.program
def lora(x: mg.f16[B, 4096], w: mg.constant(mg.f16[4096, 4096]), a: Down, b: Up):
    return x @ w + (x @ a) @ b


def naive(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return x @ w + (x @ a) @ b


def tensors(b: int, device: str = "cpu") -> list[torch.Tensor]:
    """x [b, 4096], w [4096, 4096], a [4096, 16], b [16, 4096]: f16, with products of unit size."""
    torch.manual_seed(0)
    x = torch.randn(b, 4096, device=device).half()
    shapes = (4096, 4096), (4096, 16), (16, 4096)
    return [x, *((torch.randn(shape, device=device) / shape[0] ** 0.5).half() for shape in shapes)]


def main() -> None:
    result = mg.superoptimize(lora)
    (kernel,) = result.graph.kernels()
    (block,) = kernel.op.blocks
    (loop,) = block.passes
    assert len(loop.accumulators) == 2, "x @ w and x @ a share one loop"
    assert [ld.source for ld in (block.combine or block).loads if ld.source == "b"], "b is loaded after the loop"

    inputs = tensors(b=4, device="cpu" if result.target.kind == "torch" else "cuda")
    expected = naive(*(t.double() for t in inputs))
    error = (result(*inputs).double() - expected).abs().max().item()
    assert error < 8e-3, "two units in the last place of f16 at the largest result, which is below 8"
    print(f"lora for {result.target}: one kernel, (x @ a) @ b in the epilogue; error {error:.1e} (f16)")


if __name__ == "__main__":
    main()
