"""What a call costs on the host beside its kernels: checks, the choice of kernels, arguments, launches.

    python -m benchmarks.overhead [--program NAME ...] [--rounds N] [--json]

Each row is a program as mugraph launches it from cubins, called with tensors of 5 rows.  `bare_us` is the loader alone,
called with ready pointers; `ours_us` is a whole call, without the allocation of results and workspaces (they are ready
tensors, and handing these out is taken off again).  `compile_us` is the program under torch.compile, allocation
included, where there is a device; else null.  All are the least of many short rounds that take turns.

Without a CUDA device the driver is a stub, built with gcc, that takes launches and does nothing.  What is measured is
then Python and ctypes; a driver adds its own time to both figures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import Row, document, print_document, print_table
from benchmarks.programs import CLASSIC, PROGRAMS
from benchmarks.stub import Stub
from mugraph.errors import MugraphError
from mugraph.ir.axes import size_value
from mugraph.ir.graph import Program
from mugraph.pipeline import emit, finished
from mugraph.runtime.aot import HOST, made
from mugraph.runtime.artefact import Artefact
from mugraph.runtime.compile import Compiler
from mugraph.runtime.dispatch import Dispatch, Recorded
from mugraph.runtime.driver import DRIVER, driver_of
from mugraph.runtime.load import load_module
from mugraph.runtime.tune import combined
from mugraph.search.cost import device
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.target import Target
from mugraph.transpiler.torch import TORCH_DTYPES
from mugraph.verify.equivalence import Verified, verify

COLUMNS = ("case", "tensors", "launches", "ours_us", "bare_us", "added_us", "compile_us", "driver")
SIZE = 5  # of each symbolic size
CALLS = 200  # in a round


def measured(name: str, rounds: int, library: str, compiler: Compiler) -> Iterator[Row]:
    """The rows of a program, launched through this driver library: a second one where the combine of a split may be
    left to the last blocks."""
    program = PROGRAMS[name]
    arch = driver_of(library).arch(0)
    found = search(
        program, accept=lambda g: verify(program, finished(g)), space=SearchSpace(sizes=()), on=device(str(arch))
    )
    assert isinstance(found.accepted, Verified)
    target = Target("triton", arch)
    traces = {name: (), f"{name}, last blocks combine": combined(found.accepted, target.machine)}
    for case, trace in traces.items():
        if trace or case == name:
            yield measure(case, program, emit(found.accepted, target, trace), rounds, library, compiler)


def measure(case: str, program: Program, source: str, rounds: int, library: str, compiler: Compiler) -> Row:
    import torch

    on_device = torch.cuda.is_available()
    arch = driver_of(library).arch(0)
    artefact = Artefact(made(program, {HOST: source}, [arch], compiler=compiler))
    artefact.signature.device = "cuda" if on_device else "cpu"
    dispatch, tensors = artefact.dispatch(driver=library).warmup(), arguments(program, artefact.signature.device)
    with torch.no_grad():
        timed = functions(dispatch, tensors)
        if on_device:
            reference = load_module(torch_code.emit(program), f"{program.name}_reference").run
            timed["compile"] = partial(torch.compile(reference, fullgraph=True, dynamic=False), *tensors)
        best = least(timed, rounds, torch.cuda.synchronize if on_device else lambda: None)
    ours = best["ours"] - best["allocation"]
    return {
        "case": case,
        "tensors": len(tensors),
        "launches": len(prepared(dispatch).steps),
        "ours_us": ours,
        "bare_us": best["bare"],
        "added_us": ours - best["bare"],
        "compile_us": best.get("compile"),
        "driver": "libcuda" if on_device else "stub",
    }


def arguments(program: Program, where: str) -> list[Any]:
    import torch

    sizes = {d.name: min(max(SIZE, d.min), d.max) for d in program.dims()}
    shapes = [[size_value(s, sizes) for s in i.tensor.shape] for i in program.inputs]
    types = [getattr(torch, TORCH_DTYPES[i.storage.dtype]) for i in program.inputs]
    return [torch.zeros(s, dtype=d, device=where) for s, d in zip(shapes, types, strict=True)]


def functions(dispatch: Dispatch, tensors: Sequence[Any]) -> dict[str, Callable[[], Any]]:
    """`ours`: the call, with ready tensors where it allocates; `allocation`: what handing these out takes; `bare`: its
    launches with ready pointers."""
    import torch

    memory: dict[Any, Any] = {}

    def ready(shape: Any, **options: Any) -> Any:
        if shape not in memory:
            memory[shape] = torch.empty(shape, **options)
        return memory[shape]

    dispatch.hooks = replace(dispatch.hooks, empty=ready)
    dispatch(*tensors)
    p = prepared(dispatch)
    allocations = [*p.allocations, *([p.room] if p.room is not None else [])]
    pointers = [t.data_ptr() for t in (*tensors, *(a() for a in p.allocations))]
    if p.room is not None:
        pointers += [p.room().data_ptr() + offset for offset in p.offsets]
    if p.shared is not None:
        pointers += p.shared(0)

    def allocation() -> None:
        for a in allocations:
            a()

    def bare() -> None:
        for step in p.steps:
            step(0, pointers)

    return {"ours": partial(dispatch, *tensors), "allocation": allocation, "bare": bare}


def prepared(dispatch: Dispatch) -> Recorded:
    """The one call that is prepared.  Raises MugraphError where it runs as it stands, or has work ahead."""
    ((p,),) = dispatch.ready.values()
    if not isinstance(p, Recorded) or p.kept is not None:
        raise MugraphError("torch runs a part of this program: its launches cannot be timed alone")
    return p


def least(timed: Mapping[str, Callable[[], Any]], rounds: int, wait: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of one call of each function: the least of `rounds`, which take turns."""
    timers = {name: timeit.Timer(f) for name, f in timed.items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(rounds):
        for name, timer in timers.items():
            best[name] = min(best[name], 1e6 * timer.timeit(CALLS) / CALLS)
            wait()
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--program", action="append", choices=sorted(PROGRAMS), help="default: the classic six")
    parser.add_argument("--rounds", type=int, default=300, help="how many rounds the least is taken of")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="mugraph-") as place, Compiler() as compiler:
        if torch.cuda.is_available():
            library = DRIVER
        else:
            stub = Stub(Path(place))
            stub.reset(90)
            stub.record(False)
            library = stub.path
        rows = [r for n in options.program or CLASSIC for r in measured(n, options.rounds, library, compiler)]
    if options.json:
        print_document(document("overhead", rows, device=True))
    else:
        print_table("microseconds of a call on the host", rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
