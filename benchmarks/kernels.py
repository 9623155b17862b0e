"""The emitted kernels against PyTorch, on a CUDA device: checked against float64 and timed, in the same run.

    python -m benchmarks.kernels [--program NAME ...] [--rows 1 8 16] [--repeats 100] [--json]

Every function is captured in a CUDA graph of 20 calls that rotate over copies of the inputs which together exceed
twice the L2 cache; the warm ratio is taken with one copy.  `percent_of_floor` divides the device description's floor
by the measured time.  Without a CUDA device nothing is measured, and that is what is printed.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.ir.graph import Program
from mugraph.pipeline import Result, optimize
from mugraph.search.space import SearchSpace
from mugraph.transpiler.target import parse_target
from mugraph.verify.numeric import numeric_check

if TYPE_CHECKING:
    import torch

ROWS = (1, 8, 16)
DRAWS = ("normal", "wide", "rows", "outlier", "logits")
COLUMNS = (
    "program", "sizes", "mugraph_us", "baseline", "baseline_us", "ratio", "warm_ratio", "percent_of_floor",
    "tuning_seconds", "correct",
)  # fmt: skip
NOT_MEASURED = "not measured: no CUDA device"

Function = Callable[..., Any]


# -- what a PyTorch user writes


def baselines() -> dict[str, Function]:
    """The classic programs with PyTorch's own fused functions, by name; arguments as the program's inputs."""
    import torch
    import torch.nn.functional as F

    def unit(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True))

    def gqa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        h, g, b, d = q.shape
        rows = F.scaled_dot_product_attention(q.reshape(1, h, g * b, d), k[None], v[None])
        return rows.reshape(h, g, b, d)

    def qk_norm_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        d = (q.shape[-1],)
        q, k = F.rms_norm(q, d, eps=1e-6), F.rms_norm(k, d, eps=1e-6)
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    def ntrans(x: torch.Tensor, h: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        a, c = unit(x), unit(h)
        return unit(c + alpha * (a - c))

    return {
        "rmsnorm_linear": lambda x, g, w: F.rms_norm(x, (x.shape[-1],), g, 1e-6) @ w,
        "gated_mlp": lambda x, w1, w2: F.silu(x @ w1) * (x @ w2),
        "lora": lambda x, w, a, bm: x @ w + (x @ a) @ bm,
        "gqa": gqa,
        "qk_norm_attention": qk_norm_attention,
        "ntrans": ntrans,
    }


# -- one program at one size


def measured(program: Program, b: int, repeats: int) -> list[Row]:
    """A row for eager PyTorch and one for torch.compile.  Needs a CUDA device."""
    import torch

    from mugraph.runtime.bench import measure, rotating, rotation

    sizes = {d.name: b for d in program.dims()}
    started = time.perf_counter()
    result = optimize(program, target=parse_target("cuda"), space=SearchSpace(symbolic=b))
    tuning = None if result.cached else time.perf_counter() - started
    correct = agrees(result, sizes)
    eager = baselines()[program.name]
    torch._dynamo.reset()
    compiled = torch.compile(eager, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    functions: dict[str, Function] = {"mugraph": result.executable, "eager": eager, "torch.compile": compiled}
    copies = rotation(program, sizes, "cuda")
    with torch.no_grad():
        cold = measure({n: rotating(f, copies) for n, f in functions.items()}, repeats, device="cuda")
        warm = measure({n: rotating(f, copies[:1]) for n, f in functions.items()}, repeats, device="cuda")
    ours = cold.seconds("mugraph").median
    floor = float(result.report.to_dict()["floor_seconds"])
    return [
        {
            "program": program.name,
            "sizes": " ".join(f"{n}={s}" for n, s in sizes.items()),
            "dtype": str(program.inputs[0].tensor.dtype),
            "device": torch.cuda.get_device_name(),
            "mugraph_us": ours * 1e6,
            "baseline": name,
            "baseline_us": cold.seconds(name).median * 1e6,
            "ratio": cold.ratio(name, "mugraph").median,
            "ratio_low": cold.ratio(name, "mugraph").low,
            "ratio_high": cold.ratio(name, "mugraph").high,
            "warm_ratio": warm.ratio(name, "mugraph").median,
            "percent_of_floor": 100 * floor / ours,
            "tuning_seconds": tuning,
            "correct": correct,
            "copies": len(copies),
        }
        for name in ("eager", "torch.compile")
    ]


def agrees(result: Result, sizes: Mapping[str, int], device: str = "cuda") -> bool:
    """Whether the emitted file agrees with float64 at these sizes, outputs filled with NaN before each run."""
    order = [i.name for i in result.program.inputs]

    def run(inputs: Mapping[str, Any], bindings: Mapping[str, int], out: Sequence[Any]) -> Sequence[Any]:
        del bindings
        given = result.executable(*(inputs[n] for n in order), out=out[0] if len(out) == 1 else tuple(out))
        return given if isinstance(given, tuple) else (given,)

    digest = hashlib.sha256(result.source.encode()).hexdigest()
    return numeric_check(
        result.program,
        run,
        bindings=[sizes],
        how="device" if device == "cuda" else "torch",
        target=str(result.target),
        source_hash=digest,
        draws=DRAWS,
        device=device,
        beyond_eager=bool(result.graph.kernels()),
    ).passed


# -- the command


def has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def rows_of(names: Sequence[str], sizes: Sequence[int], repeats: int) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        for b in sizes:
            print(f"{name}, b = {b} ...", file=sys.stderr, flush=True)
            rows += measured(PROGRAMS[name], b, repeats)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="time the emitted kernels")
    parser.add_argument("--program", action="append", choices=CLASSIC, help="default: all; repeat for several")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="values of b")
    parser.add_argument("--repeats", type=int, default=100, help="rounds (default 100)")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    options = parser.parse_args(argv)
    there = has_device()
    rows = rows_of(options.program or CLASSIC, options.rows, options.repeats) if there else []
    if not there:
        print(NOT_MEASURED, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print_document(document("kernels", rows, device=True))
    elif there:
        print_table("kernels", rows, COLUMNS)
    return 0 if all(r["correct"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
