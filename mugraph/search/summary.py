"""What a search reports: counts, costs, and the least that the program can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mugraph.ir.axes import representative
from mugraph.ir.graph import Program
from mugraph.ir.ops import Contract, Gather, Slice
from mugraph.ir.types import Tensor
from mugraph.search.ahead import Fixed, loaded
from mugraph.search.cost import Device, Prediction, bytes_of, floor_seconds
from mugraph.search.enumerate import Enumeration
from mugraph.search.extract import Problem
from mugraph.search.library import operations_of
from mugraph.search.partition import Choice
from mugraph.search.report import (
    Asked,
    CandidateReport,
    KernelCost,
    LawStep,
    SearchReport,
    SegmentReport,
    StopReason,
    StructureReport,
)
from mugraph.search.segments import (
    Partitioned,
    least_seconds,
)
from mugraph.search.setup import (
    LIBRARY,
    Chosen,
    Setup,
    Solved,
    Structure,
    Watch,
    structure,
)
from mugraph.search.space import SearchSpace

LIMITS = ("Interrupted", "TimeLimit", "MemoryLimit", "NodeLimit", "EntryLimit", "StateLimit", "Saturated")  # by weight
UNBEATEN = "nothing beats the program as it stands: it runs as library calls"


@dataclass
class Joined:
    """The μGraph of a large program at one size, and what became of it and of the library calls."""

    structure: Structure
    segments: tuple[SegmentReport, ...]
    candidates: tuple[CandidateReport, ...]


def report_of(
    task: Setup,
    space: SearchSpace,
    solved: Sequence[Solved],
    watch: Watch,
    best: Chosen,
    ranges: Sequence[Structure],
    notes: Sequence[str],
    enumeration: Enumeration | None,
) -> SearchReport:
    """The report: counts over all sizes, costs at the size that stands for symbolic dimensions."""
    closure, axes, problem = task.closure, task.here.axes, solved[0].problem
    stop = StopReason("Saturated")
    if watch.stopped:
        stop = StopReason(watch.stopped, watch.budget if watch.stopped == "TimeLimit" else None)
    elif closure.limit:
        stop = closure.limit
    elif any(at.run.limited for at in solved):
        stop = StopReason("EntryLimit", space.entries)
    elif any(at.problem.truncated for at in solved):
        stop = StopReason("StateLimit", space.states)

    laws = task.laws(best.plan)

    def costs(plan: Sequence[Choice]) -> tuple[KernelCost, ...]:
        return tuple(kernel_cost(structure([c], axes), c.prediction, problem, laws.steps(c)) for c in plan)

    fixed = solved[0].fixed
    return SearchReport(
        program=task.program.name,
        device=task.on.label,
        space=str(space),
        stop=stop,
        classes=len(closure.order),
        edges=dict(closure.rules),
        deduplicated=closure.deduplicated,
        configurations=sum(at.run.configurations for at in solved),
        states=sum(at.problem.expanded for at in solved),
        pruned={
            "infeasible": sum(at.problem.infeasible for at in solved),
            "bound": sum(at.problem.bounded for at in solved),
            "tile": sum(at.problem.untiled for at in solved),
            **({"abstraction": enumeration.pruned} if enumeration else {}),
        },
        verified=len(ranges),
        refused=best.refused,
        seeds=("source", *space.laws),
        kernels=costs(fixed.calls(best.plan)),
        ahead=costs(fixed.launches(best.plan)),
        candidates=tuple(best.tried),
        structures=tuple(StructureReport(s.low, s.high, s.at, s.text, s.seconds) for s in ranges),
        predicted_seconds=best.seconds,
        floor_seconds=_floor(task.here.program, best.plan, problem, fixed),
        written=tuple(laws.written(task.here.program, task.known, task.seeds, space.laws)),
        notes=tuple(notes),
        seconds=watch.phases,
        memory=watch.memory,
        asked=Asked(task.program, task.on),
    )


def report_of_segments(
    program: Program,
    space: SearchSpace,
    on: Device,
    solved: Sequence[Partitioned],
    best: Joined,
    watch: Watch,
    ranges: Sequence[Structure],
) -> SearchReport:
    """Counts of all searches made, and costs of the segments chosen at the size that stands for symbolic dimensions."""
    runs = [done.report for run in solved for done in run.searched.values()]
    stop = min((r.stop for r in runs), key=lambda s: LIMITS.index(s.kind), default=StopReason("Saturated"))
    if watch.stopped:
        stop = StopReason(watch.stopped, watch.budget if watch.stopped == "TimeLimit" else None)
    elif any(run.truncated for run in solved):
        stop = StopReason("SegmentLimit", space.segments)
    edges, pruned = Counter[str](), Counter[str]()
    for r in runs:
        edges.update(r.edges)
        pruned.update(r.pruned)
    chosen = [(s, done.report) for s, done, _ in solved[0].segments if done] if best.segments else []
    sizes = {a.name: representative(a.size, space.symbolic) for a in program.axes().values()}
    notes = [s.spelled(n) for s, r in chosen for n in r.notes if n != UNBEATEN]
    if not best.segments:
        notes.append(UNBEATEN)
    return SearchReport(
        program=program.name,
        device=on.label,
        space=str(space),
        stop=stop,
        classes=sum(r.classes for r in runs),
        edges=dict(edges),
        deduplicated=sum(r.deduplicated for r in runs),
        configurations=sum(r.configurations for r in runs),
        states=sum(r.states for r in runs),
        pruned=dict(pruned),
        verified=len(ranges),
        refused=sum(r.refused for r in runs),
        seeds=("source", *space.laws),
        kernels=tuple(s.cost(k) for s, r in chosen for k in r.kernels),
        ahead=tuple(s.cost(k) for s, r in chosen for k in r.ahead),
        candidates=best.candidates,
        structures=tuple(StructureReport(s.low, s.high, s.at, s.text, s.seconds) for s in ranges),
        predicted_seconds=best.structure.seconds,
        floor_seconds=min(least_seconds(program, sizes, on), best.structure.seconds),
        notes=tuple(dict.fromkeys(notes)),
        segments=best.segments,
        seconds=watch.phases,
        memory=watch.memory,
        asked=Asked(program, on),
    )


def unsearched(
    program: Program, space: SearchSpace, on: Device, stop: StopReason, why: str, seconds: float = 0.0
) -> SearchReport:
    """The report of a program that is not searched: the program as library calls is all there is.  `seconds` are
    predicted for it (0: none are)."""
    return SearchReport(
        program=program.name,
        device=on.label,
        space=str(space),
        stop=stop,
        classes=0,
        edges={},
        deduplicated=0,
        configurations=0,
        states=0,
        pruned={},
        verified=1,
        refused=0,
        seeds=(),
        kernels=(),
        candidates=(CandidateReport(LIBRARY, seconds, "chosen"),),
        predicted_seconds=seconds,
        floor_seconds=0.0,
        notes=(why,),
        asked=Asked(program, on),
    )


def kernel_cost(name: str, found: Prediction, p: Problem, steps: tuple[LawStep, ...] = ()) -> KernelCost:
    """The prediction for a launch, with the laws that it follows from, as the report has it."""
    types = [p.dtype, *(t for t in p.dtypes.values() if t.is_float or t.bits == 8)]
    floor = floor_seconds(found.unique_bytes, found.flops, max(types, key=p.device.matmul_rate), p.device)
    return KernelCost(name, found.seconds, found.bound, dict(found.terms), floor, steps)


def _floor(program: Program, plan: list[Choice], p: Problem, fixed: Fixed) -> float:
    """Inputs (of those that are only sliced or looked up, what is taken) and outputs moved once, or the contractions'
    operations (the source's or the plan's, whichever are fewer) at the sheet rate.  Where work is done ahead, what
    each call reads of the constants and their results."""
    tensors = program.tensors()
    calls = fixed.calls(plan)
    read = [i.name for i in program.inputs]
    moved = bytes_of([tensors[o.value] for o in program.outputs], p.sizes)
    if len(calls) < len(plan):
        read = [name for name in read if not program.fixed().get(name)]
        moved += sum(p.bytes(c) for c in loaded(p, calls) & fixed.known)
    moved += sum(_least_read(program, name, tensors, p.sizes) for name in read)
    source = 0.0
    for e in program.equations:
        if isinstance(e.op, Contract):
            source += operations_of(p.sizes, e.op, [tensors[n] for n in (*e.args, e.target.name)])
    planned = sum(c.prediction.flops for c in calls) if plan else source
    # an 8-bit input may be multiplied at the rate of 8 bits
    dtypes = [p.dtype] + [i.tensor.dtype for i in program.inputs if i.tensor.dtype.is_float or i.tensor.dtype.bits == 8]
    fastest = max(dtypes, key=p.device.matmul_rate)
    return floor_seconds(moved, min(source, planned), fastest, p.device)


def _least_read(program: Program, name: str, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> float:
    """Bytes of a value that no kernel can do without."""
    whole = bytes_of([tensors[name]], sizes)
    if any(o.value == name for o in program.outputs):
        return whole
    parts = 0.0
    for e in program.equations:
        if name in e.args:
            taken = isinstance(e.op, Slice) or (isinstance(e.op, Gather) and name not in e.args[1:])
            parts += _least_read(program, e.target.name, tensors, sizes) if taken else whole
    return min(parts, whole)
