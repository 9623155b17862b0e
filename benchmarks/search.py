"""How long a search takes and what it goes through, for each program.

    python -m benchmarks.search [--program NAME ...] [--repeats 5] [--json]
    python -m benchmarks.search --ablation [--limit 20000] [--program NAME ...] [--json]

A row is a program with all its variants, each searched once for all its numbers of rows.  The search alone is timed,
with candidates accepted unverified; the verification of what it finds is a column of its own.  Seconds and counts are
sums over the variants; `kernels` and `launches` are the most that any of them takes at the size that stands for its
rows; `stop_reason` is the first that is not Saturated.  `seconds_to_first` is the time until each variant has its first
complete μGraph.  `pace_ms` is the median of a fixed loop of Python, run before each search: seconds compare only where
the pace does.  `peak_mb` is the resident memory (10^6 bytes) of a fresh process that searches all variants once,
Python and libraries included.

The ablation shows what each abstraction is worth on the same space: the enumerator builds values bottom-up from the
same leaves with the same operators, under one limit of candidates, until it has the outputs and every value of the
best plan that the search knows (`to_outputs`, `to_plan`: candidates until then; `met`: how many of those values).
`states` are candidates, `classes` the values kept, `derivations` the ways to compute them.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import FAMILIES, PROGRAMS, Family
from mugraph.ir.axes import representative
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.pipeline import finished
from mugraph.search.abstraction import ABSTRACTIONS, AbstractionName, abstraction
from mugraph.search.canonical import canonical
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import device
from mugraph.search.driver import Found, search
from mugraph.search.enumerate import Enumerator, alphabet_of
from mugraph.search.extract import Problem
from mugraph.search.laws import Meaning, meaning
from mugraph.search.library import Added, Attention, operands
from mugraph.search.partition import Choice, partition
from mugraph.search.setup import closure_of, fingerprinter, problem_of, rewritten, targets_of
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify

COLUMNS = (
    "program", "variants", "seconds_median", "seconds_min", "seconds_max", "seconds_to_first", "pace_ms", "states",
    "classes", "derivations", "pruned", "structures", "kernels", "launches", "peak_mb", "verify_seconds", "stop_reason",
)  # fmt: skip

ABLATION_COLUMNS = (
    "program", "abstraction", "seconds_median", "states", "classes", "derivations", "pruned", "deduplicated", "met",
    "wanted", "to_outputs", "to_plan", "stop_reason",
)  # fmt: skip
LIMIT = 20_000
PACE = 200_000  # rounds of the loop
ROOT = Path(__file__).parent.parent


def measured(name: str, repeats: int) -> Row:
    """One row.  The counts are the same in every run."""
    family = FAMILIES[name]
    samples: list[float] = []
    firsts: list[float] = []
    paces: list[float] = []
    for _ in range(repeats):
        paces.append(pace_ms())
        gc.collect()
        start = time.perf_counter()
        runs = [run(program, family) for program in family.variants.values()]
        samples.append(time.perf_counter() - start)
        firsts.append(sum(first for _, first in runs))
    found = [f for f, _ in runs]
    verify_seconds = sum(verification(program) for program in family.variants.values())
    reports = [f.report for f in found]
    stops = [str(r.stop) for r in reports]
    return {
        "program": name,
        "variants": len(found),
        "abstraction": "closure",
        "seconds_median": statistics.median(samples),
        "seconds_min": min(samples),
        "seconds_max": max(samples),
        "states": sum(r.states for r in reports),
        "classes": sum(r.classes for r in reports),
        "derivations": sum(sum(r.edges.values()) for r in reports),
        "pruned": sum(sum(r.pruned.values()) for r in reports),
        "deduplicated": sum(r.deduplicated for r in reports),
        "structures": sum(len(f.structures) for f in found),
        "kernels": max(len(f.graph.kernels()) for f in found),
        "launches": max(launches(f.graph) for f in found),
        "peak_mb": peak_mb(name),
        "stop_reason": next((s for s in stops if s != "Saturated"), "Saturated"),
        "seconds_to_first": statistics.median(firsts),
        "pace_ms": statistics.median(paces),
        "verify_seconds": verify_seconds,
    }


def pace_ms() -> float:
    """Milliseconds that a fixed loop takes now."""
    start, total = time.perf_counter(), 0
    for n in range(PACE):
        total += n * n
    return 1e3 * (time.perf_counter() - start)


def verification(program: Program) -> float:
    """Seconds that the verifier takes in one more search, on what it refuses too."""
    spent = 0.0

    def accept(graph: KernelGraph) -> object:
        nonlocal spent
        start = time.perf_counter()
        try:
            return verify(program, finished(graph))
        finally:
            spent += time.perf_counter() - start

    search(program, accept=accept, space=SearchSpace(sizes=()))
    return spent


def run(program: Program, family: Family) -> tuple[Found, float]:
    """What is found, and the seconds until the first complete μGraph."""
    start, first = time.perf_counter(), []

    def accept(graph: KernelGraph) -> KernelGraph:
        first.append(time.perf_counter() - start)
        return graph

    return search(program, accept=accept, space=family.space()), first[0]


def launches(graph: KernelGraph) -> int:
    """Kernels, their combines, and library calls."""
    blocks = [b for e in graph.equations if isinstance(e.op, Kernel) for b in e.op.blocks]
    calls = sum(isinstance(e.op, Library) for e in graph.equations)
    return len(graph.kernels()) + sum(b.combine is not None for b in blocks) + calls


def peak_mb(name: str) -> float:
    """Megabytes (10^6) at the peak of a fresh process that searches all variants once."""
    command = [sys.executable, "-c", f"from benchmarks.search import report_peak; report_peak({name!r})"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return float(text) / 1e6


def report_peak(name: str) -> None:
    """Searches all variants of a program and prints the most bytes that this process has held."""
    family = FAMILIES[name]
    for program in family.variants.values():
        run(program, family)
    print(peak_bytes())


def peak_bytes() -> int:
    """The most resident memory of this process; on Linux without that of the process it was forked from."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ablation(program: Program, limit: int, repeats: int) -> list[Row]:
    """One row for each abstraction, on one space."""
    space = SearchSpace()
    here = canonical(program)
    known = meaning(here.program)
    closure, seeds = closure_of(here.program, known, space)
    problem = problem_of(here.program, closure, seeds, space, device())
    groups, wanted = targets_of(here, known, seeds)
    plans, _ = partition(problem, space, groups, lambda: False)
    plan = sorted({*wanted, *(classes_of(plans[0], problem) if plans else ())})
    return [
        ablation_row(program.name, name, here.program, known, closure, plan, set(wanted), limit, repeats)
        for name in ABSTRACTIONS
    ]


def classes_of(plan: Sequence[Choice], problem: Problem) -> set[int]:
    """Every class that the plan computes or loads."""
    found: set[int] = set()
    for c in plan:
        match c.how:
            case Edge() | Added() | Attention():
                found |= {*c.roots, *operands(problem, c.how)}
            case _:
                found |= {s.entry[0] for d in c.derivations for s in d.steps}
    return found


def ablation_row(
    name: str,
    abstraction_name: AbstractionName,
    program: Program,
    known: Meaning,
    closure: Closure,
    plan: Sequence[int],
    outputs: set[int],
    limit: int,
    repeats: int,
) -> Row:
    prints = fingerprinter(program, known)
    classes = {prints.fingerprint(closure.classes[c].value): c for c in closure.order}
    targets = [*known.values.values(), *rewritten(program, known, SearchSpace(), prints)]
    sizes = {a.name: representative(a.size, SearchSpace().symbolic) for a in program.axes().values()}
    samples: list[float] = []
    for _ in range(repeats):
        enumerator = Enumerator(
            prints,
            alphabet_of(closure),
            abstraction(abstraction_name, classes, targets, sizes),
            limit,
            targets={p: c for p, c in classes.items() if c in plan},
            until_found=True,
        )
        gc.collect()
        start = time.perf_counter()
        report = enumerator.run()
        samples.append(time.perf_counter() - start)
    met = report.found
    return {
        "program": name,
        "abstraction": abstraction_name,
        "seconds_median": statistics.median(samples),
        "seconds_min": min(samples),
        "seconds_max": max(samples),
        "states": report.candidates,
        "classes": report.kept,
        "derivations": sum(len(k.ways) for k in enumerator.kept),
        "pruned": report.pruned,
        "deduplicated": report.deduplicated,
        "structures": None,
        "kernels": None,
        "launches": None,
        "peak_mb": None,
        "stop_reason": report.stop,
        "seconds_to_first": None,
        "wanted": len(plan),
        "met": len(met),
        "to_outputs": max(met[c] for c in outputs) if outputs <= met.keys() else None,
        "to_plan": max(met.values()) if len(met) == len(plan) else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description="time the search")
    parser.add_argument("--program", action="append", choices=sorted(PROGRAMS), help="default: all; repeat for several")
    parser.add_argument("--repeats", type=int, help="timed runs (default 5; of the ablation 1)")
    parser.add_argument("--ablation", action="store_true", help="the enumerator under each abstraction")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"candidates of the ablation (default {LIMIT})")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    options = parser.parse_args(argv)
    repeats = options.repeats if options.repeats is not None else 1 if options.ablation else 5
    if repeats < 1 or options.limit < 1:
        parser.error("--repeats and --limit are at least 1")
    rows: list[Row] = []
    for name in options.program or PROGRAMS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if options.ablation:
            rows += ablation(PROGRAMS[name], options.limit, repeats)
        else:
            rows.append(measured(name, repeats))
    if options.json:
        print_document(document("search", rows))
    elif options.ablation:
        print_table(f"abstractions, at most {options.limit} candidates each", rows, ABLATION_COLUMNS)
    else:
        print_table(f"search, {repeats} runs each", rows, COLUMNS)
        together = [sum(float(r[c]) for r in rows) for c in ("seconds_median", "seconds_min", "verify_seconds")]
        print("together: {:.1f} s (medians), {:.1f} s (minima), verification {:.1f} s".format(*together))
    return 0


if __name__ == "__main__":
    sys.exit(main())
