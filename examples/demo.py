"""The main job, end to end: four naive programs to verified μGraphs and emitted kernels, each checked and written out.

    python -m examples.demo [PROGRAM ...] [--out out/demo]

Kernels are made for the GPU that is here, else for an H100 (cuda:90).  On a GPU they run at their true sizes; without
one, Triton's interpreter runs the emitted source at reduced sizes.  Nothing is taken from a cache.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import mugraph as mg
from examples import attention, gated_mlp, lora, rmsnorm_linear
from mugraph.ir.resize import reduction
from mugraph.runtime.compile import Compiler, Resources
from mugraph.transpiler.target import present_arch

EXAMPLES = {
    "rmsnorm_linear": (rmsnorm_linear, rmsnorm_linear.rmsnorm_linear),
    "gated_mlp": (gated_mlp, gated_mlp.gated_mlp),
    "lora": (lora, lora.lora),
    "gqa": (attention, attention.gqa),
}
ROWS = 16  # the value of b at which costs are predicted, and kernels run on a GPU
WIDTH = 118


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Optimise the example programs.")
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(EXAMPLES)}; all by default")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="where the files go")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.programs) - set(EXAMPLES)):
        parser.error(f"there is no program {', '.join(unknown)}; known: {', '.join(EXAMPLES)}")

    console = Console(width=WIDTH, highlight=False, markup=False, emoji=False)
    started, used = time.perf_counter(), cpu_seconds()
    here = present_arch()
    arch = here or 90
    results: dict[str, mg.Result] = {}
    compiled: dict[str, Future[list[Resources]]] = {}
    with fresh_caches(), Compiler() as compiler, ThreadPoolExecutor(1) as beside:
        for name in options.programs or EXAMPLES:
            results[name] = shown(name, f"cuda:{arch}", here is not None, options.out / name, console)
            compiled[name] = beside.submit(compiler.resources, results[name].source, arch)
        console.rule("in short")
        console.print(summary(results))
        console.print(f"\nCompiled for sm_{arch}:")
        console.print(resources({name: found.result() for name, found in compiled.items()}))
    console.print(f"{time.perf_counter() - started:.1f} s, of which {cpu_seconds() - used:.1f} s on the processor")


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty caches for mugraph and Triton, so that everything is done now."""
    names = ("MUGRAPH_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: f"{folder}/{name.lower()}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def shown(name: str, target: str, on_device: bool, out: Path, console: Console) -> mg.Result:
    """Optimises one program and prints every stage."""
    module, program = EXAMPLES[name]
    console.rule(name)
    console.print(f"The program, as written:\n\n{program}\n")
    result = mg.superoptimize(program, target=target)
    console.print(f"The μGraph found for {target}:\n\n{result.graph}\n")
    console.print(f"{result.report}\n")

    certificate = result.certificate
    tests = sum(d.tests for d in certificate.draws)
    console.print(
        f"Equal to the program (tested): {tests} random tests over finite fields; a wrong graph passes with "
        f"probability δ <= 2^{certificate.delta_log2:.1f}."
    )
    report = result.report
    assert isinstance(report, mg.SearchReport)
    console.print(
        f"Predicted on {report.device} at b = {ROWS}: {1e6 * report.predicted_seconds:.1f} µs, "
        f"{report.percent_of_floor:.0f} % of the floor of {1e6 * report.floor_seconds:.1f} µs.  Not measured."
    )
    show_numerics(result, console)
    if on_device:
        inputs = module.tensors(b=ROWS, device="cuda")
        expected = module.naive(*(t.double() for t in inputs))
        error = (result(*inputs).double() - expected).abs().max().item()
        console.print(f"At the true sizes, b = {ROWS}, on {torch.cuda.get_device_name()}: error {error:.1e}.")
    place = result.save(out)
    console.print(f"Files in {place}: {', '.join(sorted(p.name for p in place.iterdir()))}\n")
    return result


def show_numerics(result: mg.Result, console: Console) -> None:
    """The comparisons of the emitted source with float64, as the certificate has them."""
    sizes, tiles = reduction(result.program, result.graph)
    pairs = ", ".join(f"{a} = {n}" for a, n in sizes.items())
    cut = ", ".join(f"{a} {t}" for a, t in tiles.items())
    for table in result.certificate.numerics:
        how = {
            "interpreted": "No GPU is used: Triton's interpreter ran the kernel",
            "device": "The GPU ran the kernel",
            "torch": "PyTorch ran the program",
        }[table.how]
        console.print(f"{how}, lowered in the same way at reduced sizes, against float64.")
        console.print(f"Sizes: {pairs}; tiles: {cut}.")
        rows = Table(box=None, padding=(0, 2), pad_edge=True)
        for heading in ("output", "inputs", "greatest error", "of the program itself in PyTorch", "share of tolerance"):
            rows.add_column(heading, justify="left" if heading in ("output", "inputs") else "right")
        for row in table.rows:
            rows.add_row(
                f"{row.output}: {row.dtype}",
                ", ".join(f"{n} = {v}" for n, v in row.bindings) + f", {row.draw}",
                f"{row.error:.2e}",
                "overflows" if row.eager_error is None else f"{row.eager_error:.2e}",
                f"{100 * row.ratio:.0f} %" if row.counted else "not counted",
            )
        console.print(rows)


def summary(results: Mapping[str, mg.Result]) -> Table:
    """One line a program."""
    table = Table()
    table.add_column("program", no_wrap=True)
    for heading in (
        "kernels",
        "search and\nverification",
        "δ",
        "predicted",
        "of floor",
        "checked",
        "worst share\nof tolerance",
    ):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        report, certificate = result.report, result.certificate
        assert isinstance(report, mg.SearchReport)
        (numerics,) = certificate.numerics
        table.add_row(
            name,
            str(len(result.graph.kernels())),
            f"{report.total_seconds:.2f} s",
            f"2^{certificate.delta_log2:.0f}",
            f"{1e6 * report.predicted_seconds:.1f} µs",
            f"{report.percent_of_floor:.0f} %",
            numerics.how,
            f"{100 * numerics.worst:.0f} %",
        )
    return table


def resources(found: Mapping[str, Sequence[Resources]]) -> Table:
    """One line a kernel."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("kernel", no_wrap=True)
    for heading in ("registers\na thread", "bytes of shared\nmemory a block", "spills", "matrix\ninstructions"):
        table.add_column(heading, justify="right")
    for kernels in found.values():
        for r in kernels:
            table.add_row(r.kernel, *map(str, (r.registers, r.shared_bytes, r.spills, r.matrix_ops)))
    return table


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
