"""A block graph written by hand: verified, lowered and checked like one that the search finds.

Who knows a good kernel can write it down, tile by tile, and need not trust it: a graph that computes something else is
refused with a counterexample.

Run it with `python -m examples.hand_written_block`.
"""

import torch

import mugraph as mg
from examples.rmsnorm_linear import naive, rmsnorm_linear, tensors


def fused(eps: float = 1e-6) -> mg.KernelGraph:
    """RMSNorm and linear in one loop over k: 16 rows and 64 columns a block, 128 of k at a time."""
    with mg.block(rmsnorm_linear, grid={"b": 16, "n": 64}) as block:
        with block.loop("k", tile=128) as loop:
            x, g, w = loop.load("x"), loop.load("g"), loop.load("w")
            product = loop.accumulate((x * g) @ w)
            squares = loop.accumulate(mg.sum(x * x, axis=-1, keepdims=True))
        block.store(product / mg.sqrt(squares / block.size("k") + eps), "out")
    return block.graph()


def main() -> None:
    result = mg.from_graph(rmsnorm_linear, fused())
    inputs = tensors(b=4, device="cpu" if result.target.kind == "torch" else "cuda")
    expected = naive(*(t.double() for t in inputs))
    assert torch.allclose(result(*inputs).double(), expected, rtol=2e-3, atol=2e-3), "f16 has about 3 digits"
    print(f"hand-written rmsnorm_linear for {result.target}: error <= 2^{result.certificate.delta_log2:.0f}")

    try:
        mg.from_graph(rmsnorm_linear, fused(eps=1e-5))
    except mg.MugraphError as error:
        print(f"with another eps: {error.message.partition(':')[0]}")
    else:
        raise AssertionError("a graph with another eps is not the program")


if __name__ == "__main__":
    main()
