"""What tests and benchmarks on a device check, as functions that take the device: on a CPU they are tested themselves.

Two comparisons.  At reduced sizes `reduced_report` is the numeric tier, with its tolerances from an error analysis.
At true sizes that analysis takes minutes on a host, so `compare` computes the program in float64 on the device, and
asks for no more than twice the error of the program as written, in its own types on the same device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from mugraph.ir.axes import size_value
from mugraph.ir.graph import Program
from mugraph.ir.resize import recast, reduction, resized
from mugraph.ir.types import DType
from mugraph.pipeline import Result, emit, product_unit
from mugraph.runtime.load import Executable, load_module
from mugraph.transpiler import torch as torch_code
from mugraph.verify.certificate import NumericReport
from mugraph.verify.equivalence import verify
from mugraph.verify.numeric import numeric_check

SIZES = (1, 5, 17, 61)  # odd, two of them no multiple of anything; 61 is more than a tile of 16 or 32 rows
GUARD = 64  # elements on either side of a result
MARK = 77  # what they hold
# Without rows of equal elements: their rounding errors have one sign, and the analysis takes errors as independent.
DRAWS = ("normal", "wide", "zeros", "outlier", "logits")

Call = Callable[..., Any]


# -- memory as callers may have it


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same values one element past an aligned address, rows one element further apart than they are long.  What
    lies between is NaN in tensors of floats."""
    pitch = (*t.shape[:-1], t.shape[-1] + 1) if t.dim() else ()
    between = math.nan if t.is_floating_point() else 0
    room = torch.full((math.prod(pitch) + 1,), between, dtype=t.dtype, device=t.device)
    view = room[1:].view(pitch)
    return (view[..., :-1] if t.dim() else view).copy_(t)


def turned(t: torch.Tensor) -> torch.Tensor:
    """The same values with the last two dimensions in the other order in memory, shifted."""
    return shifted(t.mT).mT if t.dim() > 1 else shifted(t)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda t: t,
    "shifted": shifted,
    "turned": turned,
}


def guarded(like: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """A dense tensor of that shape and type, full of NaN (integers: MARK), one element past an aligned address; and a
    check that nothing was written before or behind it, which raises AssertionError."""
    n = like.numel()
    room = torch.full((n + 2 * GUARD + 1,), MARK, dtype=like.dtype, device=like.device)
    out = room[GUARD + 1 : GUARD + 1 + n].view(like.shape)
    if out.is_floating_point():
        out.fill_(math.nan)
    mark = room[0].clone()

    def check() -> None:
        around = torch.cat((room[: GUARD + 1], room[GUARD + 1 + n :]))
        assert bool((around == mark).all()), "something was written outside the result"

    return out, check


def into_guarded(call: Call, program: Program, inputs: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> Any:
    """The results of `call` with `out=`, as a list.  Raises AssertionError where the call writes outside them, returns
    other tensors than these, or changes an input."""
    room = [guarded(t) for t in like]
    kept = [t.clone() for t in inputs]
    out = [t for t, _ in room]
    given = call(*inputs, out=out[0] if len(out) == 1 else tuple(out))
    found = given if isinstance(given, tuple) else (given,)
    for _, check in room:
        check()
    for mine, returned in zip(out, found, strict=True):
        assert returned.data_ptr() == mine.data_ptr(), "out= was not used"
    written = {o.alias_of for o in program.outputs}
    for i, before, after in zip(program.inputs, kept, inputs, strict=True):
        assert i.name in written or torch.equal(before, after), f"the call changes its input {i.name}"
    return out


# -- values


def sizes_of(program: Program, size: int) -> dict[str, int]:
    """Every symbolic size as near to `size` as its range allows."""
    return {d.name: min(max(size, d.min), d.max) for d in program.dims()}


def all_sizes(program: Program) -> list[dict[str, int]]:
    """The sizes of SIZES, each once."""
    found: list[dict[str, int]] = []
    for size in SIZES:
        if (bound := sizes_of(program, size)) not in found:
            found.append(bound)
    return found


def reduced_report(result: Result, layout: str, device: str) -> NumericReport:
    """The numeric tier for the result's structure at reduced sizes, tensors in a layout and results between guards."""
    sizes, tiles = reduction(result.program, result.graph)
    program = resized(result.program, sizes, {})
    small = verify(program, resized(result.graph, sizes, tiles), delta=2.0**-20, cuts=result.certificate.cuts)
    module = load_module(emit(small, result.target, result.tuning.options), f"{program.name}_reduced")
    call = Executable(program, module.run)
    how = "device" if device == "cuda" and "triton.jit" in result.source else "torch"

    def run(inputs: Mapping[str, Any], bindings: Mapping[str, int], out: Sequence[Any]) -> Sequence[Any]:
        given = [LAYOUTS[layout](inputs[i.name]) for i in program.inputs]
        return into_guarded(call, program, given, out)

    report = numeric_check(
        program,
        run,
        bindings=all_sizes(program),
        how=how,
        target=f"{result.target}, reduced sizes, {layout}",
        draws=DRAWS if layout == "dense" else DRAWS[:1],  # where values lie is one thing, what they are another
        device=device,
        beyond_eager=bool(result.graph.kernels()),
        product_unit=product_unit(program, result.target) if how == "device" else 0.0,
    )
    return report.as_written()


def run_as_written(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The program by PyTorch on these inputs, in its own types."""
    given = load_module(torch_code.emit(program), f"{program.name}_as_written").run(*inputs)
    return given if isinstance(given, tuple) else (given,)


def in_f64(program: Program, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same in float64 throughout: floats of 16 bits and more become f64."""
    wide = recast(program, dict.fromkeys((DType.f16, DType.bf16, DType.f32), DType.f64))
    changed = {i.name for i, j in zip(program.inputs, wide.inputs, strict=True) if i.tensor.dtype != j.tensor.dtype}
    return run_as_written(
        wide, [t.double() if i.name in changed else t for i, t in zip(program.inputs, inputs, strict=True)]
    )


def bytes_of_comparison(program: Program, sizes: Mapping[str, int]) -> int:
    """What `compare` needs at most: every value of the program in float64, in its own type, and three copies of the
    inputs."""
    numbers = sum(math.prod(size_value(s, sizes) for s in t.shape) for t in program.tensors().values())
    return numbers * (8 + 4 * 4)


def tolerance(own: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far a result may be off: twice what the program as written is off, plus 4 units of the greatest element."""
    error = float((own.double() - wanted).abs().max()) if own.numel() else 0.0
    unit = torch.finfo(own.dtype).eps / 2 if own.is_floating_point() else 0.0
    scale = float(wanted.double().abs().max()) if own.numel() else 0.0
    return 2 * error + 4 * unit * scale


def assert_near(given: torch.Tensor, own: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Raises AssertionError where a result is too far from float64, or NaN."""
    error = float((given.double() - wanted).abs().max()) if given.numel() else 0.0
    allowed = tolerance(own, wanted)
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed are {allowed:.3g}"


def compare(calls: Mapping[str, Call], program: Program, inputs: Sequence[torch.Tensor], layouts: Sequence[str]) -> int:
    """Runs each call on the inputs in each layout, and says how many results were compared: those of outputs for which
    the program as written overflows its own types are not.  Raises AssertionError where a result is too far from
    float64."""
    own, wanted = run_as_written(program, inputs), in_f64(program, inputs)
    compared = 0
    for name, call in calls.items():
        for layout in layouts:
            given = into_guarded(call, program, [LAYOUTS[layout](t) for t in inputs], own)
            for o, g, mine, right in zip(program.outputs, given, own, wanted, strict=True):
                if bool(mine.isfinite().all() & right.isfinite().all()):
                    assert_near(g, mine, right, f"{program.name}, {o.value}, {name}, {layout}")
                    compared += 1
    return compared


# -- threads


def in_threads(
    call: Call, drawn: Sequence[Sequence[torch.Tensor]], turns: int, place: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Calls from one thread for each set of inputs, all at once, each in a context that `place` makes (a stream).
    Raises AssertionError where a result differs from that of a call alone, and what a thread raises."""
    alone = [[t.clone() for t in listed(call(*inputs))] for inputs in drawn]
    if drawn[0][0].is_cuda:
        torch.cuda.synchronize()
    start = threading.Barrier(len(drawn))
    found: dict[int, list[list[torch.Tensor]]] = {}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with place():
                start.wait(60)
                found[number] = [listed(call(*drawn[number])) for _ in range(turns)]
                if drawn[number][0].is_cuda:
                    torch.cuda.current_stream().synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(drawn))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if failures:
        raise failures[0]
    for number, expected in enumerate(alone):
        for results in found[number]:
            torch.testing.assert_close(results, expected)


def listed(results: Any) -> list[torch.Tensor]:
    return list(results) if isinstance(results, tuple) else [results]
