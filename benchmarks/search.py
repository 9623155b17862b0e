"""How long a search takes and what it goes through, for each program.

    python -m benchmarks.search [--program NAME ...] [--repeats 5] [--json]
    python -m benchmarks.search --ablation [--limit 20000] [--program NAME ...] [--json]

The search alone is timed, with candidates accepted unverified; the verification of what it finds is a column of its
own.  Memory is that of Python objects and arrays, from one more run.

The ablation shows what each abstraction is worth on the same space: the enumerator builds values bottom-up from the
same leaves with the same operators, under one limit of candidates, until it has the outputs and every value of the
best plan that the search knows (`to_outputs`, `to_plan`: candidates until then; `met`: how many of those values).
`states` are candidates, `classes` the values kept, `derivations` the ways to compute them.
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
from mugraph.ir.axes import representative
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.pipeline import finished
from mugraph.search.abstraction import ABSTRACTIONS, AbstractionName, abstraction
from mugraph.search.canonical import canonical
from mugraph.search.closure import Closure, Edge
from mugraph.search.cost import device
from mugraph.search.driver import Found, _closure, _fingerprinter, _problem, _rewritten, _targets, search
from mugraph.search.enumerate import Enumerator, alphabet_of
from mugraph.search.laws import Meaning, meaning
from mugraph.search.partition import Choice, partition
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import verify

COLUMNS = (
    "program", "seconds_median", "seconds_min", "seconds_max", "states", "classes", "derivations", "pruned",
    "deduplicated", "structures", "kernels", "launches", "peak_mb", "verify_seconds", "stop_reason",
)  # fmt: skip

ABLATION_COLUMNS = (
    "program", "abstraction", "seconds_median", "states", "classes", "derivations", "pruned", "deduplicated", "met",
    "wanted", "to_outputs", "to_plan", "stop_reason",
)  # fmt: skip
LIMIT = 20_000


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


def ablation(program: Program, limit: int, repeats: int) -> list[Row]:
    """One row for each abstraction, on one space."""
    space = SearchSpace()
    here = canonical(program)
    known = meaning(here.program)
    closure, seeds = _closure(here.program, known, space)
    problem = _problem(here.program, closure, seeds, space, device())
    groups, wanted = _targets(here, known, seeds)
    plans, _ = partition(problem, space, groups, lambda: False)
    plan = sorted({*wanted, *(classes_of(plans[0]) if plans else ())})
    return [
        ablation_row(program.name, name, here.program, known, closure, plan, set(wanted), limit, repeats)
        for name in ABSTRACTIONS
    ]


def classes_of(plan: Sequence[Choice]) -> set[int]:
    """Every class that the plan computes or loads."""
    found: set[int] = set()
    for c in plan:
        found |= {*c.roots, *c.how.children} if isinstance(c.how, Edge) else {s.entry[0] for s in c.how.steps}
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
    prints = _fingerprinter(program, known)
    classes = {prints.fingerprint(closure.classes[c].value): c for c in closure.order}
    targets = [*known.values.values(), *_rewritten(program, known, SearchSpace(), prints)]
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
            rows.append(measured(PROGRAMS[name], repeats))
    if options.json:
        print_document(document("search", rows))
    elif options.ablation:
        print_table(f"abstractions, at most {options.limit} candidates each", rows, ABLATION_COLUMNS)
    else:
        print_table(f"search, {repeats} runs each", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
