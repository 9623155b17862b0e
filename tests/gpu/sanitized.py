"""Small programs once, in odd memory: what runs below compute-sanitizer.

    python -m tests.gpu.sanitized [--target cuda] [--past N]

Without PyTorch's cache of memory (PYTORCH_NO_CUDA_MEMORY_CACHING=1) each tensor is an allocation that the sanitizer
knows the ends of.  `--past N` runs one kernel alone, which stores 32 numbers N elements into a tensor of 32: what the
sanitizer has to find for N > 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

import mugraph as mg
from benchmarks.checks import LAYOUTS, compare, sizes_of
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.ir.graph import Program
from mugraph.ir.resize import resized
from mugraph.runtime.bench import random_inputs

SMALL = 72  # what axes of 256 and more become: no multiple of a tile


@triton.jit
def store_past(x, n):
    places = n + tl.arange(0, 32)
    tl.store(x + places, places.to(tl.float32))


def programs() -> Iterator[Program]:
    """The classic six, and a split reduction, with short axes."""
    for name in (*CLASSIC, "split_k", "layernorm"):
        p = PROGRAMS[name]
        long = [a.name for a in p.axes().values() if isinstance(a.size, int) and a.size >= 256]
        yield resized(p, dict.fromkeys(long, SMALL), {})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitized", description="run small programs once")
    parser.add_argument("--target", default="cuda", help="what for (default: cuda)")
    parser.add_argument("--past", type=int, help="run the planted store alone")
    options = parser.parse_args(argv)
    device = "cuda" if options.target == "cuda" else "cpu"
    if options.past is not None:
        x = torch.zeros(32, device=device)
        store_past[(1,)](x, options.past)
        print(f"stored {float(x.sum()):g}")
        return 0
    for program in programs():
        result = mg.optimize(program, target=options.target)
        for size in (1, 17):
            inputs = random_inputs(program, sizes_of(program, size), device)
            assert compare({"a call": result}, program, inputs, list(LAYOUTS))
        print(program.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
