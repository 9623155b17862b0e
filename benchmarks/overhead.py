"""What a call costs on the host beside its kernels: checks, the choice of kernels, arguments, launches.

    python -m benchmarks.overhead [--program NAME ...] [--rounds N] [--decorated] [--json]

Each row is a program as mugraph launches it from cubins, called with tensors of 5 rows.  `bare_us` is the loader alone,
called with ready pointers; `ours_us` is a whole call, without the allocation of results and workspaces (they are ready
tensors, and handing these out is taken off again).  `compile_us` is the program under torch.compile, allocation
included, where there is a device; else null.  All are the least of many short rounds that take turns.

With `--decorated` the rows are PyTorch functions under `@mg.superoptimize` and under `torch.compile`, on the CPU, each
with nothing left to run: the optimised function, and the compiled graph, hand out a ready result.  What is measured is
then what both do before each call: looking at the arguments and at all that the function reads.  `ours_us` and
`compile_us` are the medians of calls, the median of calling what does nothing taken off; rounds take turns.

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
from statistics import median
from time import perf_counter_ns
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
MEDIAN_ROUNDS = 50  # of 200 calls: 10,000


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


# -- decorated functions


def decorated(rounds: int) -> list[Row]:
    import torch

    torch.manual_seed(0)
    x, w1, w2, angles = torch.randn(4, 32), torch.randn(32, 16), torch.randn(32, 16), torch.randn(4, 8)

    def gated(x: Any, w1: Any, w2: Any) -> Any:
        return torch.nn.functional.silu(x @ w1) * (x @ w2)

    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "function of 3 tensors": (gated, (x, w1, w2)),
        "norm and linear layer": (torch.nn.Sequential(torch.nn.RMSNorm(32), torch.nn.Linear(32, 16)), (x,)),
        "transformer layer": (transformer_layer(), (x[None], angles, angles)),
    }
    with torch.no_grad():
        return [decorated_row(name, fn, args, rounds) for name, (fn, args) in cases.items()]


def decorated_row(name: str, fn: Callable[..., Any], args: tuple[Any, ...], rounds: int) -> Row:
    import torch

    import mugraph as mg

    ready = fn(*args)
    compiled = torch.compile(fn, backend=lambda module, _: lambda *_: (ready,), dynamic=False)
    compiled(*args)
    ours = mg.superoptimize(fn, target="torch", strict=True, dynamic=False).warmup(*args)
    ours.result.executable.run = lambda *_, out=None: ready
    ours(*args)  # makes the short way
    timed = {"ours": ours, "compile": compiled, "nothing": lambda *_: ready}
    if any(f(*args) is not ready for f in timed.values()):
        raise MugraphError(f"{name} computes its result: the time before that cannot be told apart")
    found = medians({n: partial(f, *args) for n, f in timed.items()}, rounds)
    return {
        "case": name,
        "reads": sum(1 for _ in fn.parameters()) if isinstance(fn, torch.nn.Module) else 0,
        "ours_us": found["ours"] - found["nothing"],
        "compile_us": found["compile"] - found["nothing"],
    }


def medians(timed: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Microseconds of one call of each function, the median of `rounds` times CALLS; rounds take turns."""
    taken: dict[str, list[int]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, f in timed.items():
            for _ in range(CALLS):
                started = perf_counter_ns()
                f()
                taken[name].append(perf_counter_ns() - started)
    return {name: median(each) / 1000 for name, each in taken.items()}


def transformer_layer() -> Any:
    """A layer of 10 modules and 9 weights, as language models have them: 4 heads of 8, 2 of them for keys."""
    import torch
    import torch.nn.functional as F

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "up": (32, 64), "gate": (32, 64)}
            self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(32, eps=1e-5) for _ in range(2))
            for name, (a, b) in (sizes | {"down": (64, 32)}).items():
                self.add_module(name, torch.nn.Linear(a, b, bias=False))

        def forward(self, x: Any, cos: Any, sin: Any) -> Any:
            h = self.norms[0](x)
            q, k, v = (f(h).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            a, b = q.chunk(2, -1)
            c, d = k.chunk(2, -1)
            q, k = q * cos + torch.cat([-b, a], -1) * sin, k * cos + torch.cat([-d, c], -1) * sin
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + self.o(seen.transpose(1, 2).flatten(2))
            h = self.norms[1](x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    return Layer().eval()


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
    parser.add_argument("--decorated", action="store_true", help="PyTorch functions instead of programs")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    options = parser.parse_args(arguments)
    if options.decorated:
        rows = decorated(min(options.rounds, MEDIAN_ROUNDS))
        if options.json:
            print_document(document("overhead of decorated functions", rows))
        else:
            print_table("microseconds before each call", rows, ("case", "reads", "ours_us", "compile_us"))
        return 0
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
