"""Attention for decoding with grouped queries (LLaMA-3-70B on 4 GPUs): 2 KV heads, 8 query heads each, 4096 keys.

The program is softmax as the textbook writes it.  What comes out keeps a running maximum m, a running denominator l and
a running sum acc in one loop over the keys.  With few rows a GPU would idle, so the keys are also cut over the grid,
and a combine, derived from the same rule, merges the parts.

Run it with `python -m examples.attention`.
"""

import torch

import mugraph as mg

B = mg.Dim("b", 1, 4096)
Q = mg.f16["h=2", "g=8", B, "d=128"]
K = mg.f16["h=2", "s=4096", "d=128"]
V = mg.f16["h=2", "s=4096", "e=128"]


@mg.program
def gqa(q: Q, k: K, v: V):
    scores = q @ k.unsqueeze(1).mT / q.shape[-1] ** 0.5
    return mg.softmax(scores, axis=-1) @ v.unsqueeze(1)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.unsqueeze(1).mT / q.shape[-1] ** 0.5
    return torch.softmax(scores, dim=-1) @ v.unsqueeze(1)


def tensors(b: int, device: str = "cpu") -> list[torch.Tensor]:
    """q [2, 8, b, 128], k and v [2, 4096, 128]: f16.  Queries are large, so that plain exponentials overflow f16."""
    torch.manual_seed(0)
    shapes = (2, 8, b, 128), (2, 4096, 128), (2, 4096, 128)
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    return [(8 * q).half(), k.half(), v.half()]


def main() -> None:
    whole = mg.superoptimize(gqa, space=mg.SearchSpace(split=False, kernels=1, symbolic=1024))
    (kernel,) = whole.graph.kernels()
    (block,) = kernel.op.blocks
    (loop,) = (p for p in block.passes if p.loops)
    assert [a.monoid for a in loop.accumulators] == ["max", "rescaled", "rescaled"], "m, l and acc"

    result = mg.superoptimize(gqa)
    (kernel,) = result.graph.kernels()
    (block,) = kernel.op.blocks
    inputs = tensors(b=4, device="cpu" if result.target.kind == "torch" else "cuda")
    expected = naive(*(t.double() for t in inputs))
    for found in (whole, result):
        error = (found(*inputs).double() - expected).abs().max().item()
        assert error < 4e-3, "two units in the last place of f16 at the largest result, which is below 4"
    parts = f"keys cut into {block.split.parts} parts" if block.split else "keys in one part"
    print(f"gqa for {result.target}: one kernel, online softmax, {parts}; error {error:.1e} (f16)")


if __name__ == "__main__":
    main()
