"""What the first call of a decorated Llama layer takes in a fresh process, with an empty cache and with a full one.

    python -m benchmarks.start [--hidden 1024] [--repeats 3] [--json]

The second process may neither search nor compile (MUGRAPH_DISALLOW_SEARCH=1).  `export_s` is the time inside
`torch.export` and its decompositions, `mugraph_s` all else of the first call, in which the layer also runs once.  f32,
on the CPU, the least of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from benchmarks.environment import Row, document, print_document, print_table

COLUMNS = ("cache", "first_call_s", "export_s", "mugraph_s", "cached")
HEADS, TOKENS = 8, 16


def layer(hidden: int) -> tuple[Any, tuple[Any, ...]]:
    """A decoder layer with grouped queries, rotary positions and SwiGLU, and its arguments for some tokens."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    width = hidden // HEADS

    def rotated(x: Any, cos: Any, sin: Any) -> Any:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.after = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
            self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
            self.k, self.v = (nn.Linear(hidden, hidden // 2, bias=False) for _ in range(2))
            self.gate, self.up = (nn.Linear(hidden, 4 * hidden, bias=False) for _ in range(2))
            self.down = nn.Linear(4 * hidden, hidden, bias=False)

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            h = self.before(x)
            q, k, v = (f(h).unflatten(-1, (-1, width)).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(
                rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=True
            )
            x = x + self.o(mixed.transpose(1, 2).flatten(2))
            h = self.after(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    torch.manual_seed(0)
    return Layer().eval(), (torch.randn(1, TOKENS, hidden), torch.randn(TOKENS, width), torch.randn(TOKENS, width))


def first_call(hidden: int) -> Row:
    """In this process.  Raises AssertionError where the layer is not taken over, or gives something else."""
    import torch
    from torch.export import ExportedProgram

    import mugraph as mg

    spent = 0.0

    def timed(f: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return f(*args, **named)
            finally:
                spent += time.perf_counter() - start

        return run

    module, inputs = layer(hidden)
    with torch.no_grad():
        wanted = module(*inputs)
        torch.export.export = timed(torch.export.export)
        setattr(ExportedProgram, "run_decompositions", timed(ExportedProgram.run_decompositions))  # noqa: B010
        fast = mg.superoptimize(module, strict=True)
        start = time.perf_counter()
        timed(import_module)("torch._dynamo.convert_frame")  # which torch.export loads, and mugraph asks for its lock
        found = fast(*inputs)
        whole = time.perf_counter() - start
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    return {
        "first_call_s": whole, "export_s": spent, "mugraph_s": whole - spent, "cached": bool(fast.result.cached)
    }  # fmt: skip


def measured(hidden: int, repeats: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="mugraph-") as place:
        for cache, count in (("empty", 1), ("full", repeats)):
            own = {**os.environ, "MUGRAPH_CACHE_DIR": place}
            own |= {"MUGRAPH_DISALLOW_SEARCH": "1"} if cache == "full" else {}
            command = [sys.executable, "-m", "benchmarks.start", "--child", "--hidden", str(hidden)]
            found = []
            for _ in range(count):
                done = subprocess.run(command, env=own, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout))
            rows.append({"cache": cache, **min(found, key=lambda r: r["mugraph_s"])})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=1024, help="features of a token, a multiple of 16")
    parser.add_argument("--repeats", type=int, default=3, help="processes with a full cache")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(first_call(options.hidden)))
        return 0
    rows = measured(options.hidden, options.repeats)
    if options.json:
        print_document(document("start", rows))
    else:
        print_table("seconds of the first call of a Llama layer, in a fresh process", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
