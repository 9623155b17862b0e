"""Chooses how the kernels of a μGraph are written and compiled.

    with shared_compilers() as compilers:
        verified, found = Tuner(device("h100"), compilers).tuned(verified, "fit")

    none     as lowered, nothing is compiled
    fit      compiled, and changed only where a kernel spills in a loop or needs more shared memory than there is
    model    more configurations are compiled, and ranked by a model of what the compiler made of them
    measure  the best of these are timed on the device as well

No GPU is needed but for the last.  A *configuration* is a value of `Options` for one kernel.  Registered rules propose
others, from one that was compiled; configurations that spill in loops or do not fit are refused before they run.  What
was chosen is a *trace* of named choices, with which `lower` gives the same plan again.  A rule of one's own:

    @rule
    def two_warps(at: Configuration) -> Iterator[Options]:
        yield replace(at.options, num_warps=2)
"""

from __future__ import annotations

import itertools
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar, get_args

from mugraph.codegen.lower import lower
from mugraph.codegen.plan import (
    ANY,
    KNOWS_DESCRIPTORS,
    MOST_RESIDENT,
    Call,
    Choice,
    Combined,
    Launch,
    Machine,
    Options,
    Plan,
    Read,
    Trace,
    compute_of,
)  # fmt: skip
from mugraph.errors import CompileError, MugraphError, UnsupportedOpError, VerificationError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.ops import Kernel
from mugraph.ir.resize import neighbours, retiled
from mugraph.runtime.compile import Compiler, Resources
from mugraph.runtime.model import digits, occupancy, predicted_seconds, traffic
from mugraph.runtime.timing import Refused, Timer
from mugraph.search.cost import Device
from mugraph.settings import Tune
from mugraph.transpiler.triton import emit, launched
from mugraph.verify.equivalence import Verified, verify

T = TypeVar("T")
U = TypeVar("U")
SCHEMA_VERSION = 1
MOST_FITTED = 16  # configurations of one kernel, to find one that fits
MOST_RANKED = 24  # and to rank them
MOST_PROPOSED = 16  # by one rule at a time
PATIENCE = 60.0  # seconds for one kernel, after which no more are compiled
EXPANDED = 3  # configurations whose neighbours are tried next
FINALISTS = 8  # configurations of one kernel that are timed
REPEATS = (5, 20, 80)  # of each, in rounds of which each drops half
MOST_WARPS, MOST_STAGES = 16, 6
MOST_TILINGS = 4  # of one graph, to fit
TILINGS = 2  # and beside its own, to be fast
NARROW = 2  # rows that may be multiplied and summed
SMALLEST_TILE = 16  # what a matrix multiply wants
TILES = "tiles"  # stands for the kernel in a choice of tiles


@dataclass(frozen=True)
class Configuration:
    """One kernel under some options.  `resources` is None where it does not compile, for the `reason`."""

    call: Call
    plan: Plan
    source: str
    device: Device
    trace: Trace
    resources: Resources | None
    reason: str = ""
    symbolic: int = 16

    @property
    def options(self) -> Options:
        return self.call.options

    @property
    def arch(self) -> int:
        """What it was compiled for."""
        return self.resources.arch if self.resources else self.device.arch

    @property
    def badness(self) -> tuple[int, int]:
        """(0, 0) for what may run; else bytes of shared memory that are too many, and spills that matter."""
        if self.resources is None:  # mostly because Triton refuses to need so much
            return 1 << 30, 0
        return self.resources.excess, self.resources.repeated_spills

    @cached_property
    def seconds(self) -> float:
        """As the model predicts."""
        if self.resources is None:
            return math.inf
        return predicted_seconds(self.call, self.plan, self.resources, self.device, self.symbolic)

    def __str__(self) -> str:
        return f"{self.call.name} ({self.options})"


Rule = Callable[[Configuration], Iterator[Options]]
RULES: list[Rule] = []


def rule(f: Rule) -> Rule:
    """Registers a rule; those registered first propose first."""
    RULES.append(f)
    return f


@dataclass(frozen=True)
class Tuned:
    """What was chosen.  `trace` has the tiles that were cut, under the name "tiles", and the options of kernels that
    are not what lowering chooses; `tried` counts configurations that were compiled, `timed` those that ran.  `seconds`:
    of one call, predicted from what was compiled, or measured."""

    level: Tune
    trace: Trace = ()
    resources: tuple[Resources, ...] = ()
    tried: int = 0
    timed: int = 0
    notes: tuple[str, ...] = ()
    seconds: float = math.inf

    @property
    def options(self) -> Trace:
        """The choices that `lower` takes."""
        return tuple(c for c in self.trace if c.kernel != TILES)

    @property
    def badness(self) -> tuple[int, int]:
        """Of all kernels: bytes of shared memory that are too many, and spills that matter."""
        return sum(r.excess for r in self.resources), sum(r.repeated_spills for r in self.resources)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "level": self.level,
            "choices": [asdict(c) for c in self.trace],
            "kernels": [asdict(r) for r in self.resources],
            "tried": self.tried,
            "timed": self.timed,
            "seconds": self.seconds if math.isfinite(self.seconds) else None,
            "notes": list(self.notes),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Tuned:
        """Raises ValueError, KeyError or TypeError for what `to_dict` did not make."""
        if data["schema_version"] != SCHEMA_VERSION or data["level"] not in get_args(Tune):
            raise ValueError("it is no record of choices")
        counts, seconds, notes = [data["tried"], data["timed"]], data["seconds"], data["notes"]
        kernels = [asdict(r) for r in (Resources(**r) for r in data["kernels"])]
        counts += [v for k in kernels for name, v in k.items() if name != "kernel"]
        if not all(type(n) is int and 0 <= n < 1 << 31 for n in counts):
            raise ValueError("a count is no number")
        if not (seconds is None or (type(seconds) is float and 0 < seconds < math.inf)):
            raise ValueError("its time is no number")
        if not all(isinstance(x, str) for x in [*notes, *(k["kernel"] for k in kernels)]):
            raise ValueError("a note is no text")
        return Tuned(
            level=data["level"],
            trace=tuple(Choice(**c) for c in data["choices"]),
            resources=tuple(Resources(**k) for k in kernels),
            tried=counts[0],
            timed=counts[1],
            notes=tuple(notes),
            seconds=math.inf if seconds is None else seconds,
        )


AS_LOWERED = Tuned("none")


@dataclass(frozen=True)
class Tuner:
    """Compiles and ranks configurations for one device.

    compilers  work side by side
    machine    what is compiled for; its architecture is the description's where it has none
    timer      runs configurations where there is a device; without one, the level "measure" is "model", and a note
               says so
    symbolic   the value of symbolic sizes that the model counts with
    """

    device: Device
    compilers: Sequence[Compiler]
    machine: Machine = ANY
    timer: Timer | None = None
    symbolic: int = 16

    def tuned(self, verified: Verified, level: Tune) -> tuple[Verified, Tuned]:
        """The μGraph with its choices, which may be other tiles as well: such a graph is verified like any other.

        Raises CompileError where a kernel does not compile under any options that were tried, UnknownTargetError for
        an architecture that cannot be compiled for."""
        if level == "none" or not verified.graph.kernels():
            return verified, Tuned(level)
        found = [self.cut(verified, level)]
        for tiles in self.tilings(verified, level) if level != "fit" else ():
            at = with_tiles(verified, tiles)
            found.append((at, tiled(self.options(at, level), tiles)))
        if level != "fit" and (whole := combined(found[0][0], self.machine)):
            tiles = {c.name: int(c.value) for c in found[0][1].trace if c.kernel == TILES}
            found.append((found[0][0], tiled(self.options(found[0][0], level, whole), tiles)))
        best = min(found, key=lambda x: (x[1].badness, x[1].seconds))
        return best[0], replace(best[1], tried=sum(t.tried for _, t in found), timed=sum(t.timed for _, t in found))

    def cut(self, verified: Verified, level: Tune) -> tuple[Verified, Tuned]:
        """The options of each kernel.  Where one spills or does not fit whatever these are, the greatest tile of a loop
        is cut in half, a few times."""
        best = verified, self.options(verified, level)
        tiles: dict[str, int] = {}
        for _ in range(MOST_TILINGS):
            loops = loops_of(verified.graph) | tiles
            axis = max(loops, key=lambda a: loops[a], default="")
            if best[1].badness == (0, 0) or not axis or loops[axis] <= SMALLEST_TILE:
                break
            tiles[axis] = loops[axis] // 2
            at = with_tiles(verified, tiles)
            found = self.options(at, level)
            if found.badness < best[1].badness:
                best = at, tiled(found, tiles)
        return best

    def tilings(self, verified: Verified, level: Tune) -> list[dict[str, int]]:
        """Other tiles and numbers of parts, as the model orders them: each axis' tile doubled or halved, under
        the options that lowering then chooses.  Where nothing will be timed, only those that the model finds better."""
        tiles = [{}, *neighbours(verified.graph)]
        seconds = self.each(lambda compiler, t: self.lowered_seconds(compiler, verified, t), tiles)
        most = seconds[0] if level == "model" or self.timer is None else math.inf
        order = sorted(range(1, len(tiles)), key=lambda i: seconds[i])
        return [tiles[i] for i in order[:TILINGS] if seconds[i] < most]

    def each(self, f: Callable[[Compiler, T], U], items: Sequence[T]) -> list[U]:
        """`f` of each item, side by side, each call with a compiler of its own."""
        free: queue.SimpleQueue[Compiler] = queue.SimpleQueue()
        for compiler in self.compilers:
            free.put(compiler)

        def one(item: T) -> U:
            compiler = free.get()
            try:
                return f(compiler, item)
            finally:
                free.put(compiler)

        with ThreadPoolExecutor(len(self.compilers)) as pool:
            return list(pool.map(one, items))

    def lowered_seconds(self, compiler: Compiler, verified: Verified, tiles: dict[str, int]) -> float:
        """What the model predicts for the graph with these tiles as lowered; infinite where it may not run."""
        try:
            plan = lower(with_tiles(verified, tiles) if tiles else verified, machine=self.machine)
            found = compiler.resources(emit(plan), self.arch)
        except (CompileError, UnsupportedOpError, VerificationError):
            return math.inf
        total = 0.0
        for call, needs in zip(launched(plan).values(), found, strict=True):
            total += predicted_seconds(call, plan, needs, self.device, self.symbolic)
            if needs.excess or needs.repeated_spills:
                return math.inf
        return total

    @property
    def arch(self) -> int:
        """What is compiled for."""
        return self.machine.arch or self.device.arch

    def options(self, verified: Verified, level: Tune, given: Trace = ()) -> Tuned:
        """The options of each kernel, tiles as they are, beside those that are given."""
        trace: list[Choice] = list(given)
        resources: list[Resources] = []
        notes: list[str] = []
        tried = timed = 0
        seconds = 0.0
        if level == "measure" and self.timer is None:
            notes.append("there is no device to time kernels on: they are ranked by a model of what the compiler made")
        for call in launched(lower(verified, given, self.machine)).values():
            seen = self.explored(verified, call.name, level, given)
            tried += len(seen)
            best = min(seen, key=lambda c: (c.badness, c.seconds if level != "fit" else 0))
            if best.resources is None:
                raise CompileError(best.reason, op=best.call.name)
            if level == "measure" and self.timer is not None:
                best, count, lost = fastest(self.timer, [c for c in seen if c.badness == (0, 0)] or [best])
                timed += count
                notes += lost
            best = self.fewer_registers(verified, seen[0], best)
            assert best.resources is not None
            seconds += best.seconds
            trace += best.trace[len(given) :]
            resources.append(best.resources)
            if best.resources.excess:
                notes.append(f"{best.call.name} needs {best.resources.shared_bytes} bytes of shared memory")
            if best.resources.spills:
                notes.append(f"{best.call.name} spills {best.resources.spills} times in loops, whatever was tried")
            elif best.resources.spills_outside:
                notes.append(f"{best.call.name} spills {best.resources.spills_outside} times outside loops")
        if level == "measure" and self.timer is not None:
            whole = self.timer.seconds(emit(lower(verified, tuple(trace), self.machine)), REPEATS[-1])
            seconds = math.inf if isinstance(whole, Refused) else whole.median
        return Tuned(level, tuple(trace), tuple(resources), tried, timed, tuple(notes), seconds)

    def explored(self, verified: Verified, kernel: str, level: Tune, given: Trace) -> list[Configuration]:
        """The configurations of a kernel that were compiled, the lowering's own first.  To fit, no more than are needed
        to find one; else the neighbours of the best, and theirs, up to a limit."""
        most = MOST_FITTED if level == "fit" else MOST_RANKED
        (start,) = self.compiled(verified, kernel, [given])
        seen, expanded = [start], set[int]()
        known = {start.options}
        deadline = time.monotonic() + PATIENCE
        while (
            len(seen) < most
            and time.monotonic() < deadline
            and not (level == "fit" and any(c.badness == (0, 0) for c in seen))
        ):
            order = sorted(range(len(seen)), key=lambda i: (seen[i].badness, seen[i].seconds))
            if level == "fit":  # the nearest first, as the lowering's own choice follows the size of its tiles
                order = list(range(len(seen)))
            at = [i for i in order if i not in expanded][: 1 if level == "fit" else EXPANDED]
            if not at:
                break
            expanded.update(at)
            proposed = dict.fromkeys(o for i in at for f in RULES for o in proposals(f, seen[i]) if o not in known)
            known.update(proposed)
            for batch in batches(list(proposed)[: most - len(seen)], len(self.compilers)):
                seen += self.compiled(
                    verified, kernel, [(*given, *differences(kernel, start.options, o)) for o in batch]
                )
                if time.monotonic() > deadline or (level == "fit" and any(c.badness == (0, 0) for c in seen)):
                    break
        return seen

    def compiled(self, verified: Verified, kernel: str, traces: Sequence[Trace]) -> list[Configuration]:
        """The kernel under the choices of each trace, compiled side by side; an empty one: the lowering's own."""

        def one(compiler: Compiler, trace: Trace) -> Configuration:
            plan = lower(verified, trace, self.machine)
            function, call = call_of(plan, kernel)
            source = emit(plan)
            found, reason = None, ""
            try:
                (found,) = compiler.resources(source, self.arch, only=[function])
            except CompileError as error:
                reason = error.message
            return Configuration(call, plan, source, self.device, trace, found, reason, self.symbolic)

        return self.each(one, traces)

    def fewer_registers(self, verified: Verified, own: Configuration, best: Configuration) -> Configuration:
        """With a bound on registers, if that takes away spills outside loops, which happen once.  ptxas spills some
        below what it may take."""
        assert best.resources is not None
        if not best.resources.spills_outside or best.options.maxnreg is not None or best.badness > (0, 0):
            return best
        bounded = replace(best.options, maxnreg=most_registers(best.options))
        trace = (*own.trace, *differences(best.call.name, own.options, bounded))
        (found,) = self.compiled(verified, best.call.name, [trace])
        fewer = found.resources and found.resources.spills_outside < best.resources.spills_outside
        return found if fewer and found.badness == (0, 0) else best


def fastest(timer: Timer, configurations: Sequence[Configuration]) -> tuple[Configuration, int, list[str]]:
    """Successive halving (Jamieson and Talwalkar, 2016): few runs of many, more runs of the better half.  The first
    configuration, which is the lowering's own, stays to the end, so that nothing slower is chosen.  Returns the best,
    how many were timed, and notes on what was refused; where the device is lost, the best of what was timed."""
    first = configurations[0]
    left = [first, *sorted(configurations[1:], key=lambda c: c.seconds)[: FINALISTS - 1]]
    count, notes, best = len(left), [], min(left, key=lambda c: c.seconds)
    for repeats in REPEATS:
        times: dict[int, float] = {}
        for i, c in enumerate(left):
            answer = timer.seconds(c.source, repeats)
            if isinstance(answer, Refused):
                notes.append(f"{c} was refused: {answer.reason}")
                if answer.lost:
                    return best, count, notes
            else:
                times[i] = answer.median
        if not times:
            return best, count, [*notes, f"no configuration of {first.call.name} could be timed"]
        order = sorted(times, key=lambda i: times[i])
        best = left[order[0]]
        kept = order[: max(1, (len(order) + 1) // 2)]
        left = [left[i] for i in kept]
        if first not in left and 0 in times:
            left.append(first)
    return best, count, notes


def fastest_by_size(
    sources: Sequence[str], sizes: Sequence[int], timer_at: Callable[[int], AbstractContextManager[Timer | None]]
) -> tuple[dict[int, int], list[str]]:
    """Which of the sources, by its place, is the fastest at each of these values of a symbolic size, and notes on what
    was refused.  The first one stays unless another is faster.  A size at which none could be timed is left out, and
    where the device is lost all that follow."""
    best: dict[int, int] = {}
    notes: list[str] = []
    for n in sizes:
        times: dict[int, float] = {}
        with timer_at(n) as timer:
            for i, source in enumerate(sources if timer else ()):
                assert timer
                answer = timer.seconds(source, REPEATS[-1])
                if not isinstance(answer, Refused):
                    times[i] = answer.median
                    continue
                notes.append(f"at {n}: {answer.reason}")
                if answer.lost:
                    return best, notes
        if times:
            best[n] = min(times, key=lambda i: (times[i], i))
    return best, notes


def proposals(f: Rule, at: Configuration) -> list[Options]:
    """What a rule proposes, the first few.  Raises MugraphError where it fails, or proposes what is no option."""
    try:
        found = list(itertools.islice(f(at), MOST_PROPOSED))
        for o in found:
            o.check()
            for field in fields(Options):
                value = getattr(o, field.name)
                if value is not None:
                    Options().changed(field.name, value)
    except Exception as error:  # whatever a user's function may raise
        name = getattr(f, "__qualname__", repr(f))
        raise MugraphError(
            f"the tuning rule {name} fails on {at}: {type(error).__name__}: {error}",
            remedy="mend it, or RULES.remove it",
        ) from error
    return found


def combined(verified: Verified, machine: Machine) -> Trace:
    """The choices by which splits are combined by the last blocks, where that is possible."""
    names = [c.name for c in launched(lower(verified, machine=machine)).values()]
    every = tuple(Choice(n, "combine", "last") for n in names if f"{n}_combine" in names)
    merged = launched(lower(verified, every, machine)).values()
    return tuple(c for c in every if any(isinstance(m, Combined) and m.name == c.kernel for m in merged))


def call_of(plan: Plan, kernel: str) -> tuple[str, Call]:
    """The launch of that name, and the function that it calls."""
    return next((f, c) for f, c in launched(plan).items() if c.name == kernel)


def differences(kernel: str, own: Options, wanted: Options) -> Trace:
    values = ((f.name, getattr(wanted, f.name), getattr(own, f.name)) for f in fields(Options))
    return tuple(Choice(kernel, name, new) for name, new, old in values if new != old and new is not None)


def batches(options: Sequence[Options], size: int) -> Iterator[Sequence[Options]]:
    for start in range(0, len(options), size):
        yield options[start : start + size]


def most_registers(o: Options) -> int:
    """Of one thread, where one block has a multiprocessor for itself."""
    return min(255, 65536 // (32 * (o.num_warps or 1)))


def loops_of(graph: KernelGraph) -> dict[str, int]:
    """The loops of all kernels that can be cut further, with their tiles."""
    blocks = [b for e in graph.kernels() if isinstance(e.op, Kernel) for b in e.op.blocks]
    return {axis: tile for b in blocks for p in b.passes for axis, tile in p.loops if tile > SMALLEST_TILE}


def with_tiles(verified: Verified, tiles: Mapping[str, int]) -> Verified:
    """With other tiles.  Raises VerificationError as `verify` does."""
    c = verified.certificate
    graph = retiled(verified.graph, tiles)
    return verify(verified.program, graph, delta=2.0**c.delta_requested_log2, seed=c.seed, cuts=c.cuts)


def tiled(found: Tuned, tiles: Mapping[str, int]) -> Tuned:
    """With the tiles in front of the trace."""
    return replace(found, trace=(*(Choice(TILES, name, tile) for name, tile in tiles.items()), *found.trace))


# -- rules that make a kernel fit


@rule
def fewer_stages(at: Configuration) -> Iterator[Options]:
    """Stages fill shared memory."""
    if at.badness[0] and at.options.num_stages and at.options.num_stages > 1:
        yield replace(at.options, num_stages=at.options.num_stages - 1)


@rule
def no_padding(at: Configuration) -> Iterator[Options]:
    """Operands of matrix multiplies lie in shared memory, padded to 16 rows; those of a multiply-and-sum do not."""
    if at.badness[0] and at.options.dot == "auto" and any(min(sides) < SMALLEST_TILE for sides in products(at)):
        yield replace(at.options, dot="never")


@rule
def warps_for_spills(at: Configuration) -> Iterator[Options]:
    """More warps share the values of a tile; fewer may have more registers each (65,536 of a multiprocessor)."""
    warps, limit = at.options.num_warps or 1, most_registers(at.options)
    if at.badness[1] and at.resources:
        order = (warps // 2, 2 * warps)
        for other in order if at.resources.registers >= limit and limit < 255 else reversed(order):
            if 1 <= other <= MOST_WARPS:
                yield replace(at.options, num_warps=other)


@rule
def stages_for_spills(at: Configuration) -> Iterator[Options]:
    """The addresses of loads that are under way take registers."""
    stages = at.options.num_stages or 1
    for other in (stages - 1, stages + 1):
        if at.badness[1] and 1 <= other <= MOST_STAGES:
            yield replace(at.options, num_stages=other)


@rule
def bounded_registers(at: Configuration) -> Iterator[Options]:
    """ptxas sometimes takes far fewer registers than there are, and spills: a bound makes it take more."""
    limit = most_registers(at.options)
    if at.badness[1] and at.resources and at.resources.registers < limit and at.options.maxnreg is None:
        yield replace(at.options, maxnreg=limit)


# -- rules that make a kernel that fits faster


def loops(at: Configuration) -> bool:
    return bool(at.resources and at.resources.loop_instructions)


def products(at: Configuration) -> Iterator[tuple[int, int]]:
    """The rows and columns of each matrix multiply in a tile, padding aside."""
    for launch in at.call.launches:
        axes: dict[str, set[str]] = {}
        for scope in launch.scopes:
            tiles = {e.axis.name: e.tile for e in scope.extents}
            for action in scope.actions():
                compute = compute_of(action)
                value = compute.equation.target if compute else action.value if isinstance(action, Read) else None
                if value is not None:
                    axes[value.name] = {a.name for a in value.axes}
                if compute and compute.form == "dot":
                    left, right = (axes[a] for a in compute.equation.args)
                    rows, columns = (math.prod(tiles[a] for a in side) for side in (left - right, right - left))
                    yield rows, columns


@rule
def other_stages(at: Configuration) -> Iterator[Options]:
    """More loads under way hide latency; fewer leave room for another block."""
    stages = at.options.num_stages or 1
    for other in (stages + 1, stages - 1):
        if at.badness == (0, 0) and loops(at) and 1 <= other <= MOST_STAGES:
            yield replace(at.options, num_stages=other)


@rule
def other_warps(at: Configuration) -> Iterator[Options]:
    """More warps hide latency; fewer issue fewer instructions for the same tile."""
    warps = at.options.num_warps or 1
    for other in (2 * warps, warps // 2):
        if at.badness == (0, 0) and 1 <= other <= MOST_WARPS:
            yield replace(at.options, num_warps=other)


@rule
def swapped_operands(at: Configuration) -> Iterator[Options]:
    """Instructions of a warp group (sm_90 and later) have 64 rows: the longer side of a product had better be those."""
    if at.badness == (0, 0) and at.arch >= 90 and not at.options.swapped and any(products(at)):
        yield replace(at.options, swapped=True)


@rule
def multiplied_and_summed(at: Configuration) -> Iterator[Options]:
    """A matrix instruction has at least 16 rows: for one or two, multiplying and summing may do with less."""
    narrow = any(min(sides) <= NARROW for sides in products(at))
    if at.badness == (0, 0) and at.options.dot == "auto" and narrow:
        yield replace(at.options, dot="never")


@rule
def unrolled(at: Configuration) -> Iterator[Options]:
    """Two iterations as one: fewer branches, and loads of the second meet the arithmetic of the first."""
    if at.badness == (0, 0) and loops(at) and at.options.unroll == 1:
        yield replace(at.options, unroll=2)


@rule
def streamed(at: Configuration) -> Iterator[Options]:
    """What is read once need not push what is read again out of the caches."""
    if at.badness == (0, 0) and loops(at) and not at.options.evict_first:
        yield replace(at.options, evict_first=True)


@rule
def dependent_launch(at: Configuration) -> Iterator[Options]:
    """The launch of a kernel overlaps with the end of the one before."""
    if at.badness == (0, 0) and at.arch >= 90 and not at.options.pdl:
        yield replace(at.options, pdl=True)


@rule
def grouped_blocks(at: Configuration) -> Iterator[Options]:
    """Blocks that run together share what they load along both axes of the grid.  Where L2 holds all that the kernel
    touches, their order does not matter."""
    touched = sum(traffic(x, at.plan, at.symbolic).unique for x in at.call.launches)
    fixed = at.options.group > 1 or isinstance(at.call, Combined)
    if at.badness == (0, 0) and not fixed and touched > at.device.l2_bytes:
        counts = [[count for _, count in digits(x, at.symbolic)] for x in at.call.launches]
        if any(len(x.parallel()) > 1 and min(c[:2]) > 1 for x, c in zip(at.call.launches, counts, strict=True)):
            for group in (8, 4, 16):
                yield replace(at.options, group=group)


@rule
def persistent_blocks(at: Configuration) -> Iterator[Options]:
    """As many blocks as the device runs at once, where there are more: none has to wait for another to leave.  The loop
    over tiles may take registers, so that fewer fit."""
    if at.badness != (0, 0) or at.resources is None or not isinstance(at.call, Launch):
        return
    held = min(occupancy(at.options.num_warps or 1, at.resources, at.device), MOST_RESIDENT)
    more = traffic(at.call, at.plan, at.symbolic).blocks > at.device.sms * held > 0
    if more and not 0 < at.options.persistent <= held:
        yield replace(at.options, persistent=held, prefetch=False)


@rule
def prefetched_weights(at: Configuration) -> Iterator[Options]:
    """While a dependent launch waits, its first weights may come into L2."""
    o = at.options
    if at.badness == (0, 0) and o.pdl and not (o.prefetch or o.persistent or not isinstance(at.call, Launch)):
        yield replace(o, prefetch=True)


@rule
def described_tiles(at: Configuration) -> Iterator[Options]:
    """One thread copies a tile by its descriptor (sm_90 and later), where each would compute addresses and masks."""
    known = at.arch >= KNOWS_DESCRIPTORS and not at.options.descriptors
    if at.badness == (0, 0) and known and loops(at) and any(products(at)):
        yield replace(at.options, descriptors=True)
