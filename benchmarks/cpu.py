"""The torch target against eager PyTorch and `torch.compile` on a CPU, in f32, all in one run.

    python -m benchmarks.cpu [--program NAME ...] [--seconds 3] [--threads N] [--json | --markdown]
        [--out FILE]

A row is one program (`benchmarks.cpu_programs`).  It is optimised through the front door (`mg.superoptimize`, with
tuning), and then called beside the function as it was written, eagerly and through
`torch.compile(fullgraph=True, dynamic=False)`.  The three take turns; ratios are taken round by round, and their
medians have a 95 % interval.  A ratio above 1 says that ours is faster; `slower` says that the interval of the ratio to
torch.compile lies wholly below 0.95.

`algebraic_gain` is decided before anything is measured, by the graphs alone: what the search for a CPU finds needs at
most 0.9 times the floating-point operations of the program as written, or at most 0.9 times the bytes that contractions
and reductions read and write (no compiler fuses these away).  `runs` says what the measurement chose.

`correct`: at these sizes the results agree with float64; those of our source for several draws of inputs.  With
`--out`, rows are kept in a file as they come, and rows of this machine that it has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import mugraph as mg
from benchmarks.cpu_programs import PROGRAMS, Case
from benchmarks.environment import SCHEMA_VERSION, Row, document, print_document, print_table
from mugraph.errors import FallbackWarning
from mugraph.ir.axes import size_value
from mugraph.ir.graph import BlockGraph, Equation, Program, equations_of
from mugraph.ir.ops import Const, Contract, Elementwise, Kernel, Library, Reduce, SizeOf
from mugraph.pipeline import finished
from mugraph.result import Result
from mugraph.runtime.bench import LEAST_SAMPLES, interval_of, measure
from mugraph.runtime.choose import machine_text
from mugraph.search.cost import device
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.verify.numeric import numeric_check

COLUMNS = (
    "program", "sizes", "algebraic_gain", "runs", "ours_ms", "eager_ms", "compile_ms", "ratio_eager", "ratio_compile",
    "low", "high", "slower", "correct",
)  # fmt: skip
DRAWS = ("normal", "wide", "rows")
GAIN = 0.9  # of the operations or bytes of the program as written, at most
SLOWER = 0.95  # the whole interval lies below
MOST_ROUNDS = 60
SECONDS = 3.0  # of one program's rounds

Function = Callable[..., Any]


# -- the stated rule for algebraic gains


def has_gain(program: Program) -> bool:
    """Whether the algebra that the search for a CPU finds saves operations or bytes, by the rule above."""
    found = search(program, accept=lambda graph: graph, space=SearchSpace(sizes=()), on=device("cpu")).graph
    parts = found.divided()  # what is done once, ahead, does not count
    before, after = amounts(program), amounts(finished(parts[1] if parts else found))
    return any(a <= GAIN * b for a, b in zip(after, before, strict=True))


def amounts(graph: Program) -> tuple[float, float]:
    """Floating-point operations of a graph, and the bytes that its contractions and reductions read and write; both at
    least 1.  A contraction multiplies and adds over all its axes, other operators do one operation an element."""
    operations = moved = 1.0
    for e, tensors in steps(graph, graph.tensors()):
        sizes = {a.name: size_value(a.size, {}) for t in tensors.values() for a in t.axes}
        involved = [tensors[a] for a in e.args] + list(e.targets)
        over = math.prod(sizes[a] for a in {a.name for t in involved for a in t.axes})
        match e.op:
            case Contract():
                operations += (2 if e.op.axes else 1) * over
            case Reduce() | Elementwise():
                operations += over
        if isinstance(e.op, Contract | Reduce):
            moved += sum(math.prod(sizes[a.name] for a in t.axes) * t.dtype.bits / 8 for t in involved)
    return operations, moved


def steps(graph: Program | BlockGraph, tensors: Mapping[str, Any]) -> Iterable[tuple[Equation, Mapping[str, Any]]]:
    """All operators that compute, with the tensors that they are over; kernels and calls as what they are made of."""
    equations = equations_of(tuple(graph.steps())) if isinstance(graph, BlockGraph) else graph.equations
    for e in equations:
        match e.op:
            case Kernel(blocks):
                for b in blocks:
                    yield from steps(b, b.tensors())
            case Library(_, inner):
                yield from steps(inner, inner.tensors())
            case Const() | SizeOf():
                pass
            case _ if e.args:
                yield e, tensors


# -- one program


def inputs_of(case: Case, seed: int = 0) -> list[torch.Tensor]:
    """Normal draws; weights of a contraction would make results grow, so all are scaled as 1/sqrt(k) by their last
    dimension but one, where they have two."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator) for shape in case.shapes.values()]
    return [t.abs() + 0.1 for t in drawn] if case.positive else drawn


def optimised(case: Case) -> tuple[Function, Callable[[], Result | None]]:
    """What the front door gives for a case, and its result, if it could be captured, once it was called."""
    if case.program is not None:
        result = mg.superoptimize(case.program, target="torch", tune="measure")
        return result, lambda: result
    fast = mg.superoptimize(case.function, target="torch", tune="measure")

    def found() -> Result | None:
        return next((s.result for s in fast.specialisations.values()), None)

    return fast, found


def measured(name: str, seconds: float = SECONDS, rounds: int = MOST_ROUNDS) -> Row:
    """The row of one program."""
    case = PROGRAMS[name]
    inputs = inputs_of(case)
    torch._dynamo.reset()
    started = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ours, found = optimised(case)
        ours(*inputs)
        tuning = time.perf_counter() - started
        result = found()
        functions = {
            "ours": ours,
            "eager": case.function,
            "compile": torch.compile(case.function, fullgraph=True, dynamic=False),
        }
        calls = {n: bound(f, inputs) for n, f in functions.items()}
        once = sum(measure(calls, 2, device="cpu").seconds(n).median for n in calls)
        count = max(LEAST_SAMPLES, min(rounds, int(seconds / once)))
        timings = measure(calls, count, device="cpu")
        correct = agrees(ours, case, result)
    ratios = timings.ratios("compile", "ours")
    return row(name, case.sizes, result, ratios, correct) | {
        "ours_ms": 1e3 * timings.seconds("ours").median,
        "eager_ms": 1e3 * timings.seconds("eager").median,
        "compile_ms": 1e3 * timings.seconds("compile").median,
        "ratio_eager": timings.ratio("eager", "ours").median,
        "rounds": count,
        "tuning_seconds": tuning,
    }


def row(name: str, sizes: str, result: Result | None, ratios: Sequence[float], correct: bool) -> Row:
    """What a row says of the ratios to torch.compile."""
    spread = interval_of(ratios)
    return {
        "program": name,
        "sizes": sizes,
        "algebraic_gain": result is not None and has_gain(result.program),
        "runs": result.choice.chosen if result is not None and result.choice else "as it stands: not captured",
        "ratio_compile": spread.median,
        "low": spread.low,
        "high": spread.high,
        "slower": spread.high < SLOWER,
        "correct": correct,
    }


def bound(f: Function, inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    return lambda: f(*inputs)


def agrees(ours: Function, case: Case, result: Result | None) -> bool:
    """Whether what runs agrees with float64.  Our source is held to the numeric check's tolerance, for several draws,
    and writes into outputs filled with NaN; where the function itself runs, see `close_to_double`."""
    if result is None or (result.unchanged and case.program is None):
        return close_to_double(ours, case)

    def run(inputs: Mapping[str, Any], bindings: Mapping[str, int], out: Sequence[Any]) -> Sequence[Any]:
        del bindings
        given = [inputs[i.name] for i in result.program.inputs]
        found = result.executable(*given, out=out[0] if len(out) == 1 else tuple(out))
        return found if isinstance(found, tuple) else (found,)

    draws = ("positive",) if case.positive else DRAWS
    stable = bool(result.graph.kernels())
    return numeric_check(result.program, run, bindings=[{}], how="torch", draws=draws, beyond_eager=stable).passed


def close_to_double(f: Function, case: Case) -> bool:
    """Whether a function agrees with what was written in float64, to eight times the error of f32 or a part in 10^5."""
    inputs = inputs_of(case, 1)

    def outputs(g: Function, *args: torch.Tensor) -> Sequence[torch.Tensor]:
        found = g(*args)
        return found if isinstance(found, tuple) else (found,)

    exact = outputs(case.function, *(t.double() for t in inputs))
    for want, own, got in zip(exact, outputs(case.function, *inputs), outputs(f, *inputs), strict=True):
        allowed = max(8 * float((own - want).abs().max()), 1e-5 * float(want.abs().max()))
        if not float((got - want).abs().max()) <= allowed:
            return False
    return True


# -- the command


def summary(rows: Sequence[Row]) -> str:
    gains = [r for r in rows if r["algebraic_gain"]]
    rest = [r for r in rows if not r["algebraic_gain"]]
    slower = [r["program"] for r in rows if r["slower"]]
    wrong = [r["program"] for r in rows if not r["correct"]]
    lines = [
        f"{len(gains)} programs with an algebraic gain: {geomean(gains):.2f} times as fast as torch.compile (geomean)"
        if gains
        else "no program with an algebraic gain",
        f"{len(rest)} without: {geomean(rest):.2f}" if rest else "",
        f"slower than torch.compile: {', '.join(slower) or 'none'}; wrong: {', '.join(wrong) or 'none'}",
    ]
    return "\n".join(line for line in lines if line)


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/performance.md."""
    lines = [
        "| program | gain | runs | ours, ms | eager, ms | compiled, ms | to eager | to torch.compile |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        ratio = f"{r['ratio_compile']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" + (" slower" if r["slower"] else "")
        times = " | ".join(f"{r[key]:.2f}" for key in ("ours_ms", "eager_ms", "compile_ms", "ratio_eager"))
        gain = "yes" if r["algebraic_gain"] else ""
        wrong = "" if r["correct"] else " (wrong)"
        lines.append(f"| {r['program']}{wrong} | {gain} | {r['runs']} | {times} | {ratio} |")
    return "\n".join(lines)


def geomean(rows: Sequence[Row]) -> float:
    return statistics.geometric_mean([r["ratio_compile"] for r in rows])


def kept(out: Path | None, machine: str) -> list[Row]:
    """The rows that a file has of this machine."""
    if out is None or not out.exists():
        return []
    data = json.loads(out.read_text(encoding="utf-8"))
    same = data.get("schema_version") == SCHEMA_VERSION and data.get("environment", {}).get("cpu") == machine
    return data["rows"] if same else []


def document_of(rows: Sequence[Row], machine: str, command: Sequence[str]) -> dict[str, Any]:
    found = document("cpu", rows)
    found["environment"] |= {
        "cpu": machine,
        "threads": torch.get_num_threads(),
        "command": " ".join(["python -m benchmarks.cpu", *command]),
    }
    return found


def write(out: Path, data: dict[str, Any]) -> None:
    draft = out.with_name(f".{out.name}")
    draft.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description="time the torch target on this CPU")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="default: all; repeat for several")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of rounds a program (default {SECONDS:g})")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: as many as it takes by itself)")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    parser.add_argument("--markdown", action="store_true", help="the table as docs/performance.md has it")
    parser.add_argument("--out", type=Path, help="a file that keeps the document; rows that it has are not repeated")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    machine = machine_text()
    rows = kept(options.out, machine)
    done = {r["program"] for r in rows}
    command = list(sys.argv[1:] if argv is None else argv)
    for name in options.program or PROGRAMS:
        if name not in done:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(measured(name, options.seconds))
            if options.out:
                write(options.out, document_of(rows, machine, command))
    if options.json:
        print_document(document_of(rows, machine, command))
    elif options.markdown:
        print(markdown(rows), summary(rows), sep="\n\n")
    else:
        print_table(f"the torch target on {machine}", rows, COLUMNS)
        print(summary(rows))
    return 0 if all(r["correct"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
