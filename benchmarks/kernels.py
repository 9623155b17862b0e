"""The emitted kernels against PyTorch, on a CUDA device: checked against float64 and timed, in the same run.

    python -m benchmarks.kernels [--program NAME ...] [--rows 1 8 16] [--all] [--repeats 100] [--json]

Without `--all`, the classic six at b = 1, 8 and 16; with it, every variant of every program at all its rows.  Baselines
are the program as it is written, run eagerly and by torch.compile, the same with PyTorch's own fused functions where it
has them, and the published structure (`benchmarks/published.py`) lowered by mugraph.

Every function is captured in a CUDA graph of 20 calls that rotate over copies of the inputs which together exceed
twice the L2 cache; the warm ratio is taken with one copy.  `percent_of_floor` divides by the measured time what no
kernel can do without: bytes that must move, operations, and an empty launch.  Without a CUDA device nothing is
measured, and that is what is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.checks import compare
from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import CLASSIC, FAMILIES
from benchmarks.published import PUBLISHED
from benchmarks.resources import in_dtype
from mugraph.errors import MugraphError
from mugraph.ir.graph import Program
from mugraph.pipeline import from_graph, optimize
from mugraph.result import Result
from mugraph.runtime.bench import random_inputs
from mugraph.runtime.load import load_module
from mugraph.search.cost import DRAIN_SECONDS, device
from mugraph.search.space import SearchSpace
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.target import parse_target

if TYPE_CHECKING:
    import torch

ROWS = (1, 8, 16)
DRAWS, WIDE = 20, 3.0  # of inputs, every other one that much wider
COLUMNS = (
    "program", "variant", "sizes", "dtype", "mugraph_us", "baseline", "baseline_us", "ratio", "warm_ratio",
    "percent_of_floor", "tuning_seconds", "correct",
)  # fmt: skip
NOT_MEASURED = "not measured: no CUDA device"

Function = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One program at one size in one type."""

    family: str
    variant: str
    rows: int
    dtype: str = "f16"

    @property
    def program(self) -> Program:
        return in_dtype(FAMILIES[self.family].variants[self.variant], self.dtype)

    @property
    def sizes(self) -> dict[str, int]:
        return {d.name: min(max(self.rows, d.min), d.max) for d in self.program.dims()}

    def __str__(self) -> str:
        return f"{self.family}, {self.variant}, {' '.join(f'{n}={s}' for n, s in self.sizes.items())}, {self.dtype}"


def cases(everything: bool = False) -> Iterator[Case]:
    """The classic six at their decode sizes first; then, with `everything`, all others, each once."""
    first = [Case(name, next(iter(FAMILIES[name].variants)), b) for name in CLASSIC for b in ROWS]
    yield from first
    for name, family in FAMILIES.items() if everything else ():
        for variant, program in family.variants.items():
            for b in family.rows if program.dims() else family.rows[:1]:
                if (case := Case(name, variant, b)) not in first:
                    yield case


# -- what a PyTorch user writes


def fused() -> dict[str, Function]:
    """Programs with PyTorch's own fused functions, by name; arguments as the program's inputs."""
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


def baselines(case: Case) -> dict[str, Function]:
    """What the case is compared with, by name."""
    import torch

    program = case.program
    naive = load_module(torch_code.emit(program), f"{program.name}_as_written").run
    found: dict[str, Function] = {"eager": naive}
    if case.family in fused() and case.variant == next(iter(FAMILIES[case.family].variants)):
        found["fused functions"] = fused()[case.family]
        try:
            found["published"] = from_graph(program, PUBLISHED[case.family](program), target="cuda").executable
        except MugraphError as error:
            print(f"{case}: published structure: {error.message}", file=sys.stderr)
    for name in ("eager", "fused functions"):
        if name in found:
            torch._dynamo.reset()
            compiled = torch.compile(found[name], mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
            found["torch.compile" if name == "eager" else f"{name}, torch.compile"] = compiled
    return found


# -- one case


def measured(case: Case, repeats: int) -> list[Row]:
    """A row for each baseline.  Needs a CUDA device."""
    import torch

    from mugraph.runtime.bench import measure, rotating, rotation

    program, sizes = case.program, case.sizes
    started = time.perf_counter()
    space = SearchSpace(symbolic=case.rows, sizes=())
    result = optimize(program, target=parse_target("cuda"), space=space, tune="measure")
    tuning = None if result.cached else time.perf_counter() - started
    correct = agrees(result, sizes)
    functions: dict[str, Function] = {"mugraph": result.executable, **baselines(case)}
    copies = rotation(program, sizes, "cuda")
    with torch.no_grad():
        cold = measure({n: rotating(f, copies) for n, f in functions.items()}, repeats, device="cuda")
        warm = measure({n: rotating(f, copies[:1]) for n, f in functions.items()}, repeats, device="cuda")
    ours = cold.seconds("mugraph").median
    return [
        {
            "program": case.family,
            "variant": case.variant,
            "sizes": " ".join(f"{n}={s}" for n, s in sizes.items()),
            "dtype": case.dtype,
            "device": torch.cuda.get_device_name(),
            "mugraph_us": ours * 1e6,
            "baseline": name,
            "baseline_us": cold.seconds(name).median * 1e6,
            "ratio": cold.ratio(name, "mugraph").median,
            "ratio_low": cold.ratio(name, "mugraph").low,
            "ratio_high": cold.ratio(name, "mugraph").high,
            "warm_ratio": warm.ratio(name, "mugraph").median,
            "percent_of_floor": 100 * floor_of(result) / ours,
            "tuning_seconds": tuning,
            "choices": "; ".join(map(str, result.tuning.trace)),
            "correct": correct,
            "copies": len(copies),
        }
        for name in functions
        if name != "mugraph"
    ]


def floor_of(result: Result) -> float:
    """Seconds that no kernel can do without: what the report says, and not less than an empty launch."""
    d = device(str(result.target.arch))
    return max(float(result.report.to_dict()["floor_seconds"]), d.launch_seconds + DRAIN_SECONDS)


def agrees(result: Result, sizes: Mapping[str, int], device: str = "cuda") -> bool:
    """Whether the emitted file agrees with float64 at these sizes: draws of two scales, outputs filled with NaN before
    each run, and nothing written beside them."""
    for seed in range(DRAWS):
        drawn = random_inputs(result.program, sizes, device, seed)
        inputs = [t * WIDE if seed % 2 and t.is_floating_point() else t for t in drawn]
        try:
            compare({"mugraph": result.executable}, result.program, inputs, ["dense"])
        except AssertionError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return False
    return True


# -- the command


def has_device() -> bool:
    import torch

    return torch.cuda.is_available()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description="time the emitted kernels")
    parser.add_argument("--program", action="append", choices=sorted(FAMILIES), help="these alone")
    parser.add_argument("--rows", type=int, nargs="+", help="these values of b alone")
    parser.add_argument("--all", action="store_true", help="every variant of every program")
    parser.add_argument("--repeats", type=int, default=100, help="rounds (default 100)")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    options = parser.parse_args(argv)
    there = has_device()
    rows: list[Row] = []
    for case in cases(options.all or bool(options.program)) if there else ():
        if (options.program and case.family not in options.program) or (options.rows and case.rows not in options.rows):
            continue
        print(f"{case} ...", file=sys.stderr, flush=True)
        rows += measured(case, options.repeats)
    if not there:
        print(NOT_MEASURED, file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print_document(document("kernels", rows, device=True))
    elif there:
        print_table("kernels", rows, COLUMNS)
    return 0 if all(r["correct"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
