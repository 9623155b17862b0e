"""Chooses how kernels are compiled, by what the compiler makes of them; no GPU is needed.

    found = tuned(plan, 90)          # Tuned: the plan with its choices, a trace of these, what each kernel needs
    verified, found = tuned_graph(verified, 90)          # may also cut tiles

A *proposal* is other parameters of one kernel.  Registered rules make them, from the parameters that it has and what it
then needs; the first that spills in no loop and fits the shared memory is taken, in the order of the rules: what is
nearest to the lowering's own choice comes first, as that follows the size of its tiles.  A rule of one's own:

    @rule
    def two_warps(p: Parameters, found: Resources) -> Iterator[Parameters]:
        yield replace(p, num_warps=2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mugraph.codegen.lower import lower
from mugraph.codegen.plan import Parameters, Plan
from mugraph.errors import CompileError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.ops import Kernel
from mugraph.ir.resize import resized
from mugraph.runtime.compile import SHARED_LIMITS, Compiler, Resources
from mugraph.transpiler.triton import emit, launched
from mugraph.verify.equivalence import Verified, verify

Rule = Callable[[Parameters, Resources], Iterator[Parameters]]
RULES: list[Rule] = []
MOST_TRIED = 16  # proposals for one kernel
MOST_WARPS, MOST_STAGES = 16, 6
MOST_TILINGS = 4  # of one graph
SMALLEST_TILE = 16  # of a loop: what a matrix multiply wants


def rule(f: Rule) -> Rule:
    """Registers a rule; those registered first propose first."""
    RULES.append(f)
    return f


@dataclass(frozen=True)
class Choice:
    """One parameter of a kernel that is not what the lowering chose."""

    kernel: str
    name: str
    value: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.name} = {self.value}"


Trace = tuple[Choice, ...]


@dataclass(frozen=True)
class Tuned:
    """A plan with its choices.  `resources` are those of its kernels, as chosen; `tried` counts compilations; `notes`
    say which kernels were left with spills, or without compiling."""

    plan: Plan
    trace: Trace
    resources: tuple[Resources, ...]
    tried: int
    notes: tuple[str, ...] = ()


def tuned(plan: Plan, arch: int, compiler: Compiler | None = None) -> Tuned:
    """The plan with parameters under which no kernel spills in a loop, where such are found.  Raises CompileError where
    a kernel does not compile under any that was tried, UnknownTargetError for an unknown architecture."""
    if compiler is None:
        with Compiler() as own:
            return tuned(plan, arch, own)
    source = emit(plan)
    chosen: dict[str, Parameters] = {}
    trace: list[Choice] = []
    resources: list[Resources] = []
    notes: list[str] = []
    tried = 0
    for function, call in launched(plan).items():
        best, found, count = best_for(source, function, call.parameters, arch, compiler)
        tried += count
        resources.append(found)
        if best != call.parameters:
            chosen[call.name] = best
            trace += changes(call.name, call.parameters, best)
        if badness(found) > (0, 0):
            notes.append(f"{function} spills {found.spills} times in loops, whatever was tried")
    return Tuned(plan.with_parameters(chosen), tuple(trace), tuple(resources), tried, tuple(notes))


def tuned_graph(verified: Verified, arch: int, compiler: Compiler | None = None) -> tuple[Verified, Tuned]:
    """`tuned`, and where a kernel still spills in a loop, with the greatest tile of a loop cut in half, a few times: a
    μGraph with other tiles is verified like any other.  The trace has the tiles that were chosen, under "tiles"."""
    if compiler is None:
        with Compiler() as own:
            return tuned_graph(verified, arch, own)
    best = verified, tuned(lower(verified), arch, compiler)
    tiles: dict[str, int] = {}
    at = verified
    for _ in range(MOST_TILINGS):
        loops = loops_of(at.graph)
        if not best[1].notes or not loops:
            break
        axis = max(loops, key=lambda a: loops[a])
        tiles[axis] = loops[axis] // 2
        c = verified.certificate
        graph = resized(at.graph, {}, tiles)
        at = verify(verified.program, graph, delta=2.0**c.delta_requested_log2, seed=c.seed, cuts=c.cuts)
        found = tuned(lower(at), arch, compiler)
        if sum(r.spills for r in found.resources) < sum(r.spills for r in best[1].resources):
            cut = tuple(Choice("tiles", name, tile) for name, tile in tiles.items())
            best = at, replace(found, trace=(*cut, *found.trace))
    return best


def loops_of(graph: KernelGraph) -> dict[str, int]:
    """The loops of all kernels that can be cut further, with their tiles."""
    blocks = [b for e in graph.kernels() if isinstance(e.op, Kernel) for b in e.op.blocks]
    return {axis: tile for b in blocks for p in b.passes for axis, tile in p.loops if tile > SMALLEST_TILE}


def best_for(
    source: str, function: str, start: Parameters, arch: int, compiler: Compiler
) -> tuple[Parameters, Resources, int]:
    """The best parameters of a kernel among the start and what rules propose, what it then needs, and how many were
    tried."""
    seen: dict[Parameters, Resources | CompileError] = {}

    def compiled(p: Parameters) -> Resources | CompileError:
        if p not in seen:
            try:
                (seen[p],) = compiler.resources(source, arch, p.options, only=[function])
            except CompileError as error:
                seen[p] = error
        return seen[p]

    best, found = start, compiled(start)
    waiting = [start]
    while waiting and (isinstance(found, CompileError) or badness(found) > (0, 0)):
        at = waiting.pop(0)
        what = compiled(at)
        known = what if isinstance(what, Resources) else unknown(function, arch)
        for p in (p for f in RULES for p in f(at, known)):
            if p in seen or len(seen) == MOST_TRIED:
                continue
            waiting.append(p)
            answer = compiled(p)
            if isinstance(answer, CompileError):
                continue
            if isinstance(found, CompileError) or badness(answer) < badness(found):
                best, found = p, answer
            if badness(answer) == (0, 0):
                break
    if isinstance(found, CompileError):
        raise found
    if found.spills_outside and best.maxnreg is None:  # outside loops: once, so not a reason to look further
        bounded = replace(best, maxnreg=most_registers(best))
        answer = compiled(bounded)
        if isinstance(answer, Resources) and outside(answer) < outside(found):
            best, found = bounded, answer
    return best, found, len(seen)


def most_registers(p: Parameters) -> int:
    """Of one thread, where one block has a multiprocessor for itself."""
    return min(255, 65536 // (32 * p.num_warps))


def outside(found: Resources) -> tuple[tuple[int, int], int]:
    return badness(found), found.spills_outside


def badness(found: Resources) -> tuple[int, int]:
    """(0, 0) for what may run; else bytes of shared memory that are too many, and spills in loops."""
    return max(0, found.shared_bytes - SHARED_LIMITS[found.arch]), found.spills


def unknown(function: str, arch: int) -> Resources:
    """What stands for a kernel that did not compile: Triton refuses to need so much shared memory."""
    return Resources(function, arch, 0, SHARED_LIMITS[arch] + 1, 0, 0, 0, 0, 0, 0)


def changes(kernel: str, before: Parameters, after: Parameters) -> Iterator[Choice]:
    for name, value in after.options.items():
        if getattr(before, name) != value:
            yield Choice(kernel, name, value)


def retiled(graph: KernelGraph, trace: Trace) -> KernelGraph:
    """The graph with the tiles of a trace."""
    return resized(graph, {}, {c.name: c.value for c in trace if c.kernel == "tiles"})


def replayed(plan: Plan, trace: Trace) -> Plan:
    """The plan of a graph that has the tiles of a trace, with its other choices.  Raises ValueError where it names what
    the plan does not have."""
    calls = {c.name: c for c in launched(plan).values()}
    chosen: dict[str, Parameters] = {}
    for c in (c for c in trace if c.kernel != "tiles"):
        if c.kernel not in calls or c.name not in ("num_warps", "num_stages", "maxnreg"):
            raise ValueError(f"{plan.name} has no {c.name} of {c.kernel}")
        chosen[c.kernel] = replace(chosen.get(c.kernel, calls[c.kernel].parameters), **{c.name: c.value})
    return plan.with_parameters(chosen)


# -- rules


@rule
def fewer_stages(p: Parameters, found: Resources) -> Iterator[Parameters]:
    """Stages fill shared memory."""
    if not found.fits and p.num_stages > 1:
        yield replace(p, num_stages=p.num_stages - 1)


@rule
def other_warps(p: Parameters, found: Resources) -> Iterator[Parameters]:
    """More warps share the values of a tile; fewer may have more registers each (65,536 of a multiprocessor)."""
    limit = most_registers(p)
    more, fewer = 2 * p.num_warps, p.num_warps // 2
    order = (fewer, more) if found.registers >= limit and limit < 255 else (more, fewer)
    for warps in order:
        if found.spills and 1 <= warps <= MOST_WARPS:
            yield replace(p, num_warps=warps)


@rule
def other_stages(p: Parameters, found: Resources) -> Iterator[Parameters]:
    """The addresses of loads that are under way take registers."""
    for stages in (p.num_stages - 1, p.num_stages + 1):
        if found.spills and 1 <= stages <= MOST_STAGES:
            yield replace(p, num_stages=stages)


@rule
def bounded_registers(p: Parameters, found: Resources) -> Iterator[Parameters]:
    """ptxas sometimes takes far fewer registers than there are, and spills: a bound makes it take more."""
    limit = most_registers(p)
    if found.spills and found.registers < limit and p.maxnreg is None:
        yield replace(p, maxnreg=limit)
