"""How long a search takes and what it goes through, for each program.

    python -m benchmarks.search [--program NAME ...] [--repeats 5] [--json]

The search alone is timed, with candidates accepted unverified; the verification of what it finds is a column of its
own.  Memory is that of Python objects and arrays, from one more run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import Sequence

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import PROGRAMS
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.pipeline import finished
from mugraph.search.driver import Found, search
from mugraph.verify.equivalence import verify

COLUMNS = (
    "program", "seconds_median", "seconds_min", "seconds_max", "states", "classes", "derivations", "pruned",
    "deduplicated", "structures", "kernels", "launches", "peak_mb", "verify_seconds", "stop_reason",
)  # fmt: skip


def measured(program: Program, repeats: int) -> Row:
    """One row.  The counts are the same in every run; `seconds_to_first` is null where nothing is compiled."""
    samples: list[float] = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        found = run(program)
        samples.append(time.perf_counter() - start)
    report, graph = found.report, found.graph
    start = time.perf_counter()
    verify(program, finished(graph))
    verify_seconds = time.perf_counter() - start
    return {
        "program": program.name,
        "abstraction": "closure",
        "seconds_median": statistics.median(samples),
        "seconds_min": min(samples),
        "seconds_max": max(samples),
        "states": report.states,
        "classes": report.classes,
        "derivations": sum(report.edges.values()),
        "pruned": sum(report.pruned.values()),
        "deduplicated": report.deduplicated,
        "structures": len(report.candidates),
        "kernels": len(graph.kernels()),
        "launches": launches(graph),
        "peak_mb": peak_mb(program),
        "stop_reason": str(report.stop),
        "seconds_to_first": None,
        "verify_seconds": verify_seconds,
    }


def run(program: Program) -> Found:
    return search(program, accept=lambda graph: graph)


def launches(graph: KernelGraph) -> int:
    """Kernels, their combines, and library calls."""
    blocks = [b for e in graph.equations if isinstance(e.op, Kernel) for b in e.op.blocks]
    calls = sum(isinstance(e.op, Library) for e in graph.equations)
    return len(graph.kernels()) + sum(b.combine is not None for b in blocks) + calls


def peak_mb(program: Program) -> float:
    """Megabytes (10^6) at the peak of one more run."""
    tracemalloc.start()
    try:
        run(program)
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description="time the search")
    parser.add_argument("--program", action="append", choices=sorted(PROGRAMS), help="default: all; repeat for several")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats is at least 1")
    rows = []
    for name in options.program or PROGRAMS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(measured(PROGRAMS[name], options.repeats))
    if options.json:
        print_document(document("search", rows))
    else:
        print_table(f"search, {options.repeats} runs each", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
