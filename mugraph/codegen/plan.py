"""Kernel plans: what a target has to write down, with every decision taken.

    Plan      = inputs, outputs, calls [Launch | Beside | Combined | Torch], buffers [Buffer]
    Combined  = a split launch whose last blocks also run the combine, as one kernel
    Launch    = one kernel: grid axes in program-id order, split part, lanes (tile dimensions) in canonical order,
                scopes [Scope], stores, options
    Scope     = extents (how each axis is covered), loop axis | none, before [Action], body [Action]
    Action    = Read | Compute | Accumulate | Write

A *lane dimension* is one axis, or several flattened (query heads and tokens make one side of a matmul).  Every tile of
a launch has its dimensions in the launch's canonical order, so tiles meet by inserting dimensions of size 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, assert_never

from mugraph.ir.axes import Axis, largest
from mugraph.ir.graph import Equation, Monoid
from mugraph.ir.printer import op_head
from mugraph.ir.types import DType, Tensor

Role = Literal["grid", "loop", "whole"]
Form = Literal["pointwise", "sum", "dot", "relabel", "scan"]
Space = Literal["input", "output", "global", "workspace", "zeroed", "counters"]
Precision = Literal["ieee", "tf32"]


MOST_LAUNCHED = 2**14  # lanes that a launch computes, as far as its kernel is made to fit


@dataclass(frozen=True)
class Extent:
    """How one axis is covered in a scope: `tile` entries at a time, held in `lanes` tile elements.

    `lanes` is a power of two and at least `tile`.  `at_launch`: the axis is whole and of symbolic size, so `lanes` is
    only representative and the launch computes it, at least `least`.  `tail`: the last tile may be incomplete.
    """

    axis: Axis
    role: Role
    tile: int
    lanes: int
    tail: bool
    at_launch: bool = False
    least: int = 1

    @property
    def most_lanes(self) -> int:
        """What registers and warps are chosen for: the greatest number of lanes, within reason."""
        if not self.at_launch:
            return self.lanes
        return max(self.lanes, min(1 << (largest(self.axis.size) - 1).bit_length(), MOST_LAUNCHED))

    @property
    def padded(self) -> bool:
        """Whether even a full tile has elements beyond it."""
        return self.lanes > self.tile

    @property
    def masked(self) -> bool:
        return self.tail or self.padded or self.at_launch

    def __str__(self) -> str:
        lanes = f"≥{self.least}" if self.at_launch else str(self.lanes)
        notes = "".join(f", {n}" for n, on in (("padded", self.padded), ("tail", self.tail)) if on)
        return f"{self.axis}: {self.role} {self.tile} in {lanes} lanes{notes}"


@dataclass(frozen=True)
class Index:
    """A position along an axis of a source: `start + step * axis`, or the constant `start`.

    With `value`, a tile of integers, that stands in the place of the axis: an index along the axis `within`, negative
    ones from its end.  What is out of its range is not loaded (but 0), and not stored.
    """

    axis: str | None
    start: int = 0
    step: int = 1
    value: str | None = None
    within: Axis | None = None

    def __str__(self) -> str:
        if self.axis is None and self.value is None:
            return str(self.start)
        name = self.axis or f"{self.value}[..]"
        scaled = name if self.step == 1 else f"{self.step}*{name}"
        return f"{self.start} + {scaled}" if self.start else scaled


@dataclass(frozen=True)
class Piece:
    """A read of `source` at `index`, one per axis of the source in its order.  A piece of a concatenation is valid
    where `joined` lies in `low .. low + length - 1` only."""

    source: str
    index: tuple[Index, ...]
    joined: str | None = None
    low: int = 0
    length: int = 0


@dataclass(frozen=True)
class Read:
    """A tile of one source, or of several that are concatenated."""

    value: Tensor
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        texts = (f"{p.source}[{', '.join(map(str, p.index))}]" for p in self.pieces)
        return f"{self.value} = load {' ++ '.join(texts)}"


@dataclass(frozen=True)
class Compute:
    """One equation.

    `guards[i]`: axes whose elements beyond the tensor must be made neutral in operand i before they meet a sum or a
    matrix multiply; the product of all operands where there is one entry only.  `operand` is the element type of
    `dot` operands; sums are always f32.
    """

    equation: Equation
    form: Form
    guards: tuple[tuple[str, ...], ...] = ()
    operand: DType = DType.f32

    def __str__(self) -> str:
        details = "" if self.form == "pointwise" else f"   ({self.form}{self._details()})"
        return f"{equation_text(self.equation)}{details}"

    def _details(self) -> str:
        typed = f" in {self.operand}" if self.form == "dot" else ""
        named = sorted({a for g in self.guards for a in g})
        return typed + (f", masks {', '.join(named)}" if named else "")


@dataclass(frozen=True)
class Accumulate:
    """`compute` over the tile, joined to the accumulator.  `deferred`: elements are kept apart over the loop and
    reduced once after it.  `scale` names the running maximum of a rescaled sum; `faded`: this is such a maximum."""

    compute: Compute
    monoid: Monoid
    scale: str | None = None
    deferred: bool = False
    faded: bool = False

    def __str__(self) -> str:
        kind = f"{self.monoid} by {self.scale}" if self.scale else self.monoid
        return f"{self.compute}   [{kind}{', reduced after the loop' if self.deferred else ''}]"


@dataclass(frozen=True)
class Write:
    """Stores the value to the axes of `target` that bear its names; a partial value into the slab of its part.
    `index`: the place along each axis of a target of which the value is a part, or into which it is scattered."""

    value: Tensor
    target: str
    kind: Literal["write", "partial", "atomic"]
    index: tuple[Index, ...] = ()

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.index))}]" if self.index else ""
        return f"{self.kind} {self.value.name} -> {self.target}{at}"


Action = Read | Compute | Accumulate | Write


@dataclass(frozen=True)
class Scope:
    """A pass or the epilogue.  `before` runs once, `body` per tile of the loop, which may be inside an `outer` one;
    without a loop, `body` is empty."""

    extents: tuple[Extent, ...]
    loop: str | None
    before: tuple[Action, ...]
    body: tuple[Action, ...]
    outer: str | None = None

    def extent(self, axis: str) -> Extent:
        return next(e for e in self.extents if e.axis.name == axis)

    def actions(self) -> Iterator[Action]:
        yield from self.before
        yield from self.body


@dataclass(frozen=True)
class Options:
    """How one launch is written and compiled.  A tuner chooses them; None: as the sizes of its tiles suggest.

    num_warps        warps of a block
    num_stages       tiles of a loop whose loads are under way
    maxnreg          registers of a thread, at most
    dot              matrix-multiply instructions ("auto"), or multiply-and-sum throughout ("never")
    swapped          operands of matrix multiplies change sides: transpose(W) transpose(X)
    keep_statistics  small sums over the loop axis stay as tiles, and are reduced once after the loop
    unroll           iterations of a loop that are written out as one
    pdl              programmatic dependent launch (sm_90 and later): blocks may start while the kernel before still
                     runs, and wait for its end before they touch memory
    evict_first      the largest source, of which each part is read by few blocks, is the first to leave the caches
    combine          the parts of a split become results in a launch of its own ("apart"), or in the block that is the
                     last to store its part ("last")
    group            blocks of the second grid axis that program ids walk before the next block of the first, so that
                     blocks which run together share what they load in L2 (1: one axis after the other)
    persistent       blocks that each multiprocessor gets, which loop over what would else be all blocks (0: one block
                     for each); kernels that share a launch have all of theirs
    prefetch         with pdl, and unless persistent: the first tile of the largest source is fetched into L2 before the
                     wait, as a hint; kernels that share a launch fetch nothing
    descriptors      tiles that loops read are copied by the hardware (TMA, sm_90 and later), by descriptors which each
                     block makes; those that do not lie so in memory, and all where a tensor does not, by pointers
    """

    num_warps: int | None = None
    num_stages: int | None = None
    maxnreg: int | None = None
    dot: Literal["auto", "never"] = "auto"
    swapped: bool = False
    keep_statistics: bool = True
    unroll: int = 1
    evict_first: bool = False
    pdl: bool = False
    combine: Literal["apart", "last"] = "apart"
    group: int = 1
    persistent: int = 0
    prefetch: bool = False
    descriptors: bool = False

    def __str__(self) -> str:
        parts = [f"warps {self.num_warps}", f"stages {self.num_stages}"]
        parts += [] if self.maxnreg is None else [f"at most {self.maxnreg} registers"]
        given = [(f.name, getattr(self, f.name)) for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in given)])

    @property
    def compiled(self) -> dict[str, int]:
        """Those that are options of Triton's compiler."""
        values = {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}
        values |= {"launch_pdl": True} if self.pdl else {}
        return {name: value for name, value in values.items() if value is not None}

    def check(self) -> Options:
        """Raises ValueError where options do not go together."""
        if self.prefetch and (not self.pdl or self.persistent):
            raise ValueError("prefetch goes with pdl, and with blocks that are not persistent")
        return self

    def changed(self, name: str, value: object) -> Options:
        """With another value of one of them.  Raises ValueError where there is no such option, or it has no such
        value.

        >>> print(Options(4, 2).changed("unroll", 2))
        warps 4, stages 2, unroll 2
        """
        valid = VALID.get(name)
        if valid is None or type(value) is not type(valid[0]) or value not in valid:
            raise ValueError(f"there is no option {name} = {value!r}")
        return replace(self, **{name: value})  # type: ignore[arg-type]


KNOWS_DESCRIPTORS = 90  # the first compute capability with tensor descriptors
MOST_RESIDENT = 8  # persistent blocks of a multiprocessor
# The values that a choice may have.
VALID: dict[str, Sequence[object]] = {
    "num_warps": (1, 2, 4, 8, 16, 32),
    "num_stages": range(1, 17),
    "maxnreg": range(16, 256),
    "dot": ("auto", "never"),
    "swapped": (False, True),
    "keep_statistics": (False, True),
    "unroll": (1, 2, 4, 8),
    "evict_first": (False, True),
    "pdl": (False, True),
    "combine": ("apart", "last"),
    "group": (1, 4, 8, 16),
    "persistent": range(MOST_RESIDENT + 1),
    "prefetch": (False, True),
    "descriptors": (False, True),
}


@dataclass(frozen=True)
class Choice:
    """An option of one kernel that is not what its lowering chooses by itself."""

    kernel: str
    name: str
    value: int | str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.name} = {self.value}"


Trace = tuple[Choice, ...]


@dataclass(frozen=True)
class Machine:
    """What a plan is for.  `arch`: the compute capability, None for any.  `precision`: what matrix multiplies make of
    f32 operands."""

    arch: int | None = None
    precision: Precision = "ieee"


ANY = Machine()


@dataclass(frozen=True)
class Launch:
    """One kernel launch.  `grid` is in program-id order, fastest first; `split` is (axis, parts): the slowest."""

    name: str
    grid: tuple[str, ...]
    split: tuple[str, int] | None
    lanes: tuple[tuple[str, ...], ...]
    scopes: tuple[Scope, ...]
    options: Options

    @property
    def launches(self) -> tuple[Launch, ...]:
        return (self,)

    def extent(self, axis: str) -> Extent:
        """How a grid axis is covered, in all scopes alike."""
        return next(e for s in self.scopes for e in s.extents if e.axis.name == axis and e.role == "grid")

    def parallel(self) -> tuple[Extent, ...]:
        """The grid axes that are not one block at all sizes, in program-id order."""
        extents = map(self.extent, self.grid)
        return tuple(e for e in extents if not isinstance(e.axis.size, int) or e.axis.size > e.tile)

    def grouped(self) -> tuple[str, int]:
        """The grid axis of which blocks go together, the second one, and how many; none: ("", 1)."""
        axes = self.parallel()
        if len(axes) < 2:
            return "", 1
        second, group = axes[1], self.options.group
        if isinstance(second.axis.size, int):
            group = min(group, -(-second.axis.size // second.tile))
        return (second.axis.name, group) if group > 1 else ("", 1)

    def sources(self) -> tuple[str, ...]:
        """Buffers read, in order of first use."""
        reads = (a for s in self.scopes for a in s.actions() if isinstance(a, Read))
        return tuple(dict.fromkeys(p.source for r in reads for p in r.pieces))

    def writes(self) -> tuple[Write, ...]:
        return tuple(a for s in self.scopes for a in s.actions() if isinstance(a, Write))

    def __str__(self) -> str:
        lines = [f"launch {self.name}  ({self.options})"]
        lines.append(
            f"  program id: {', '.join(self.grid) or 'one block'}"
            + (f", {self.split[1]} parts of {self.split[0]}" if self.split else "")
        )
        lines.append(f"  tile dimensions: {', '.join('·'.join(lane) for lane in self.lanes)}")
        for scope in self.scopes:
            loops = ", ".join(a for a in (scope.outer, scope.loop) if a)
            lines.append(f"  loop {loops}" if loops else "  scope")
            lines += [f"    {e}" for e in scope.extents]
            lines += [f"    {a}" for a in scope.before]
            lines += [f"    for {loops}:"] if scope.body else []
            lines += [f"      {a}" for a in scope.body]
        return "\n".join(lines)


@dataclass(frozen=True)
class Beside:
    """Launches that do not depend on each other, run as one: the program ids of the first, then of the second, ..."""

    name: str
    launches: tuple[Launch, ...]

    @property
    def options(self) -> Options:
        """Of the one kernel that they are: what the most demanding of them needs."""
        each = [x.options for x in self.launches]
        warps, stages = max(o.num_warps or 1 for o in each), max(o.num_stages or 1 for o in each)
        bounds = [o.maxnreg for o in each if o.maxnreg is not None]
        return replace(each[0], num_warps=warps, num_stages=stages, maxnreg=min(bounds, default=None))

    def __str__(self) -> str:
        return "\n".join(
            [f"one launch {self.name} of", *(f"  {line}" for x in self.launches for line in str(x).splitlines())]
        )


@dataclass(frozen=True)
class Combined:
    """A split launch and its combine as one.  Blocks count in `arrivals` how many parts of their result are stored;
    the one that stores the last of them runs the blocks of the combine that make this result."""

    main: Launch
    combine: Launch
    arrivals: str

    @property
    def name(self) -> str:
        return self.main.name

    @property
    def launches(self) -> tuple[Launch, ...]:
        return self.main, self.combine

    @property
    def options(self) -> Options:
        return self.main.options

    def __str__(self) -> str:
        head = f"one launch {self.name}, counting in {self.arrivals}, of"
        return "\n".join([head, *(f"  {line}" for x in self.launches for line in str(x).splitlines())])


Call = Launch | Beside | Combined


@dataclass(frozen=True)
class Torch:
    """Kernel-level equations that run as calls of torch: a library call's semantics, or a plain equation."""

    equation: Equation

    def __str__(self) -> str:
        return f"torch {equation_text(self.equation)}"


@dataclass(frozen=True)
class Buffer:
    """A kernel-level tensor in global memory.  Workspaces hold partial results in f32; `zeroed` ones start from 0 and
    are added to by atomics; counters are 0 between launches, because each launch leaves them so."""

    tensor: Tensor
    space: Space

    def __str__(self) -> str:
        return f"{self.space} {self.tensor}"


@dataclass(frozen=True)
class Plan:
    """Everything that a call of the program does, in order.

    ahead       what is done once, on constant inputs alone; its outputs are the last inputs of this plan
    precision   what matrix multiplies make of f32 operands: all of their bits ("ieee"), or 10 of the fraction ("tf32")
    decoded     element types that the architecture has no loads for: they are read as bytes
    """

    name: str
    buffers: tuple[Buffer, ...]
    calls: tuple[Call | Torch, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ahead: Plan | None = None
    precision: Precision = "ieee"
    decoded: tuple[DType, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the caller gives."""
        return self.inputs[: len(self.inputs) - len(self.ahead.outputs)] if self.ahead else self.inputs

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.tensor.name == name)

    def launches(self) -> tuple[Launch, ...]:
        """All launches, also those that run as one with others."""
        return tuple(launch for c in self.calls if not isinstance(c, Torch) for launch in c.launches)

    def __str__(self) -> str:
        lines = [f"ahead {self.ahead}"] if self.ahead else []
        lines += [f"plan {self.name}({', '.join(self.inputs)}) -> {', '.join(self.outputs)}"]
        lines += ["  f32 operands as tf32"] if self.precision == "tf32" else []
        lines += [f"  {b}" for b in self.buffers]
        lines += [f"  {line}" for c in self.calls for line in str(c).splitlines()]
        return "\n".join(lines)


def equation_text(equation: Equation) -> str:
    """`acc: f32[b, n] = contract[k] xg, w`."""
    targets = ", ".join(map(str, equation.targets))
    return f"{targets} = {op_head(equation.op)} {', '.join(equation.args)}".rstrip()


def compute_of(action: Action) -> Compute | None:
    """The computation inside an action, if it has one."""
    match action:
        case Compute():
            return action
        case Accumulate(compute):
            return compute
        case Read() | Write():
            return None
        case _:
            assert_never(action)
