"""What the kernels chosen for every program need on each architecture, compiled without a GPU.

    python -m benchmarks.resources [--program NAME ...] [--dtype f16 bf16 f32] [--arch 80 90 100] [--json]

Each row is a program in one element type on one architecture: the registers and the shared memory of its most
demanding kernel, spills inside and outside loops, and whether matrix instructions and loads of 16 bytes occur; `tuned`
says which choices are not those that the lowering chose first.  `ok`: it compiles, fits the shared memory of a
block, and spills in no loop.  Rows are kept as they come, so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import FAMILIES
from mugraph.errors import CompileError, MugraphError
from mugraph.ir.graph import Program
from mugraph.ir.parser import parse_program
from mugraph.ir.resize import recast
from mugraph.ir.types import DType
from mugraph.pipeline import finished
from mugraph.runtime.cache import Cache
from mugraph.runtime.compile import SHARED_LIMITS, Compiler
from mugraph.runtime.engine import Job, completed, engine_of
from mugraph.runtime.tune import Tuner
from mugraph.search.cost import device
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.settings import Tune
from mugraph.verify.equivalence import verify

DTYPES = ("f16", "bf16", "f32")
COLUMNS = (
    "program", "dtype", "arch", "kernels", "registers", "spills", "spills_outside", "shared_bytes", "tensor_core",
    "wide_loads", "ok", "error", "tuned",
)  # fmt: skip


def in_dtype(program: Program, dtype: str) -> Program:
    """The program with another type in place of f16."""
    return recast(program, {DType.f16: DType(dtype)})


def measure(request: Mapping[str, Any], stop: Callable[[], bool] = lambda: False) -> Row:
    """The rows of a program in one element type, as `{"rows": [...]}`."""
    program = in_dtype(parse_program(request["program"]), request["dtype"])
    rows = [{"program": request["name"], "dtype": request["dtype"], "arch": arch} for arch in request["arches"]]
    with Compiler() as compiler:
        return {"rows": [{**row, **resources_of(program, row["arch"], request["tune"], compiler)} for row in rows]}


def resources_of(program: Program, arch: int, tune: Tune, compiler: Compiler) -> Row:
    """The figures of what is chosen for a program on an architecture; None each where nothing is compiled."""
    found: Row = dict.fromkeys(COLUMNS[3:])
    try:
        space, on = SearchSpace(sizes=()), device(str(arch))
        chosen = search(program, accept=lambda g: verify(program, finished(g)), space=space, on=on)
        if not chosen.graph.kernels():
            return found | {"kernels": 0, "ok": True, "error": None}
        tuner = Tuner(on, [compiler])
        _, choices = tuner.tuned(verify(program, finished(chosen.graph)), tune)
        kernels = choices.resources
    except (CompileError, MugraphError) as error:
        return found | {"ok": False, "error": error.message.splitlines()[-1][:200]}
    shared = max(k.shared_bytes for k in kernels)
    fits = not any(k.excess for k in kernels)
    spills = sum(k.spills for k in kernels)
    return {
        "kernels": len(kernels),
        "registers": max(k.registers for k in kernels),
        "spills": spills,
        "spills_outside": sum(k.spills_outside for k in kernels),
        "shared_bytes": shared,
        "tensor_core": any(k.matrix_ops for k in kernels),
        "wide_loads": sum(k.wide_loads for k in kernels),
        "ok": spills == 0 and fits,
        "error": None if fits else "more shared memory than a block has",
        "tuned": "; ".join(map(str, choices.trace)) or None,
    }


def rows_of(
    names: Sequence[str], dtypes: Sequence[str], arches: Sequence[int], tune: Tune = "fit", store: Cache | None = None
) -> list[Row]:
    jobs = []
    for name in names:
        program = next(iter(FAMILIES[name].variants.values()))
        for dtype in dtypes:
            request = {"name": name, "program": str(program), "dtype": dtype, "arches": list(arches), "tune": tune}
            jobs.append(Job("benchmarks.resources:measure", request))
    with engine_of("processes", os.cpu_count()) as engine:
        return [row for result in completed(engine, jobs, store) if result for row in result["rows"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--program", action="append", choices=sorted(FAMILIES), help="default: all; repeat for several")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--arch", nargs="+", type=int, choices=sorted(SHARED_LIMITS), default=(80, 90, 100))
    parser.add_argument("--tune", choices=("fit", "model"), default="fit", help="default: fit")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    rows = rows_of(options.program or list(FAMILIES), options.dtype, options.arch, options.tune, Cache())
    if options.json:
        print_document(document("resources", rows))
    else:
        print_table("what the chosen kernels need", rows, COLUMNS)
        print(f"{sum(r['ok'] for r in rows)} of {len(rows)} compile without spills in loops")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
