"""Calls of emitted host functions, without Triton: kernels come from cubins, and each call is prepared once.

The host part of an emitted file (`run`, its torch functions) is executed as it stands, with other things behind the
names that it uses: `kernel[grid](...)` reaches a `Kernel`, `triton` and `tl` are the few functions that `HOST_NAMES`
lists.  There are two ways to run it:

*Recording.*  The tensors are `Place`s: shape, strides and a number, no memory.  What `run` launches and allocates is
written down.  All that is left for a call is to allocate, to put pointers into the launches and to launch: a
`Prepared`.  It holds for tensors of the same shapes, strides and alignment, on one device.

*Directly*, with tensors, where `run` calls torch functions between its kernels and so cannot be recorded.

A `Dispatch` is what is called.  It finds the `Prepared` by the sizes of its arguments; where there is none yet, it
has the arguments checked, asks the `Table` which file serves these sizes, and prepares.

A kernel may have several cubins: an aligned one, which takes for granted that 16 divides pointers and strides, and a
general one.  The first whose assumptions hold is launched.

This text is part of `aot.py` as it stands, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count
from math import prod
from operator import index, itemgetter, mul
from types import CodeType, SimpleNamespace
from typing import Any, TypeAlias

import torch

from mugraph.errors import CacheError, CompileError, LaunchError, TargetMismatchError
from mugraph.runtime.driver import Clear, Driver, Launch, Shape, Slot, picker

ALIGNMENT, ROOM = 16, 256  # bytes: what kernels ask of addresses, and the distances of what lies in one allocation
SPARE_COUNTERS = 65_536  # of a device, for launches in CUDA graphs
MOST_SHARED = 2**24  # bytes that the launches of a stream share
MOST_PREPARED, MOST_LAYOUTS = 16_384, 8  # sizes, and layouts of each, that are kept prepared
COMPILED_BY = ("num_warps", "num_stages", "maxnreg", "launch_pdl")  # arguments of a launch for the compiler


# -- which file serves which sizes


@dataclass(frozen=True)
class Range:
    """The sizes `low..high` are served by the `run` of a file."""

    low: int
    high: int
    file: str


@dataclass(frozen=True)
class Table:
    """Which file serves each value of the symbolic size `dim`; one range for all where `dim` is None.

    Raises CacheError unless the ranges follow each other without gap or overlap."""

    dim: str | None
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        problem = None
        if not self.ranges or (self.dim is None and len(self.ranges) > 1):
            problem = f"it has {len(self.ranges)} ranges for {self.dim or 'no symbolic size'}"
        for before, after in zip(self.ranges, self.ranges[1:], strict=False):
            if after.low != before.high + 1:
                problem = f"{before.high} is followed by {after.low}"
        for r in self.ranges:
            if r.low > r.high:
                problem = f"{r.low}..{r.high} is empty"
        if problem:
            raise CacheError(f"the table of sizes is wrong: {problem}", remedy="make it again")

    def check_covers(self, low: int, high: int) -> None:
        """Raises CacheError unless the table serves `low..high` exactly."""
        found = self.ranges[0].low, self.ranges[-1].high
        if self.dim is not None and found != (low, high):
            raise CacheError(
                f"the table serves {self.dim} = {found[0]}..{found[1]}, the program takes {low}..{high}",
                remedy="make it again",
            )

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.file for r in self.ranges))

    def file(self, sizes: Mapping[str, int]) -> str:
        """The file for these symbolic sizes."""
        if self.dim is None:
            return self.ranges[0].file
        return self.ranges[bisect_right(self.ranges, sizes[self.dim], key=lambda r: r.low) - 1].file

    def to_dict(self) -> dict[str, Any]:
        ranges = [{"from": r.low, "to": r.high, "file": r.file} for r in self.ranges]
        return {"dim": self.dim, "ranges": ranges}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Table:
        return Table(data["dim"], tuple(Range(r["from"], r["to"], r["file"]) for r in data["ranges"]))


# -- kernels


@dataclass(frozen=True)
class Binary:
    """A cubin for `sm_<arch>`, of a kernel that the host part of the file `host` launches.

    `parameters` are those of the kernel in order, each with what the cubin takes for granted: `*fp16` a pointer,
    `*fp16:16` one that 16 divides, `i32` and `i32:16` integers of 32 bits, a number that very value.  `constants` and
    `options` are those that a launch has to ask for.  `shared` is in bytes, `scratch` in bytes of global memory,
    both of one block; `image` is the cubin."""

    host: str
    kernel: str
    arch: int
    entry: str
    parameters: Mapping[str, str | int]
    constants: Mapping[str, int | str]
    options: Mapping[str, int]
    shared: int
    scratch: int
    image: bytes

    def arguments(self, given: Sequence[Any]) -> list[Any] | None:
        """What a launch passes on, of the arguments of `run`; None where they are not what this cubin assumes."""
        passed = []
        for kind, value in zip(self.parameters.values(), given, strict=True):
            if not isinstance(kind, str):
                if value != kind:
                    return None
                continue
            base, _, divisor = kind.partition(":")
            if divisor and (value.data_ptr() if base.startswith("*") else value) % int(divisor):
                return None
            if base == "i32" and not -(2**31) <= value < 2**31:
                return None
            passed.append(value)
        return passed


class Binaries:
    """The cubins for one architecture, loaded on one device when they are first asked for."""

    def __init__(self, driver: Driver, ordinal: int, binaries: Sequence[Binary]) -> None:
        arch = driver.arch(ordinal)
        self.driver, self.ordinal = driver, ordinal
        self.context = driver.context(ordinal)
        self.binaries = [b for b in binaries if b.arch == arch]
        if binaries and not self.binaries:
            there = ", ".join(f"sm_{a}" for a in sorted({b.arch for b in binaries}))
            raise TargetMismatchError(
                f"the kernels are for {there}, the device is {driver.name(ordinal)} (sm_{arch})",
                remedy=f"make them for it: mugraph optimize ... --aot {arch}",
            )
        self.functions: dict[int, Any] = {}
        self.lock = threading.Lock()

    def load(self) -> None:
        """Loads all of them."""
        for b in self.binaries:
            self.function(b, None)

    def function(self, b: Binary, stream: int | None) -> Any:
        """The loaded kernel.  Raises LaunchError where it would have to be loaded while a CUDA graph is captured."""
        if id(b) not in self.functions:
            if stream is not None and self.driver.capturing(stream):
                raise LaunchError(
                    f"{b.kernel} is not loaded, and nothing can be loaded while a CUDA graph is captured",
                    op=b.kernel,
                    remedy="call warmup() before the capture",
                )
            with self.lock:
                if id(b) not in self.functions:
                    self.functions[id(b)] = self.driver.function(b.image, b.entry, b.shared, self.ordinal)
        return self.functions[id(b)]

    def choose(
        self, host: str, kernel: str, given: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[Binary, list[Any]]:
        """The first cubin that a launch can use, and what it is passed."""
        wanted = host, kernel, *parted(named)
        same = [b for b in self.binaries if (b.host, b.kernel, b.options, b.constants) == wanted]
        for b in same:
            if (passed := b.arguments(given)) is not None:
                return b, passed
        if not same:
            asked = ", ".join(f"{k}={v}" for k, v in named.items())
            raise CompileError(f"there is no cubin of {kernel} for {asked}", op=kernel, remedy="make them again")
        raise LaunchError(
            f"{kernel} takes sizes and strides of 31 bits", op=kernel, remedy="pass smaller or denser tensors"
        )

    def launch(
        self, b: Binary, passed: Sequence[Any], grid: Sequence[int], stream: int, scratch: Place | None = None
    ) -> Launch:
        """The launch, ready but for its pointers: that of a Place at its number, those of tensors in their order, and
        scratch memory last."""
        function = self.function(b, stream)
        x, y, z = (*grid, 1, 1)[:3]
        dependent = bool(b.options.get("launch_pdl"))
        shape = Shape((x, y, z), 32 * b.options["num_warps"], b.shared, dependent, b.scratch * x * y * z)
        numbers = count()

        def slot(a: Any) -> Slot:
            return Slot(a.number if isinstance(a, Place) else next(numbers))

        arguments = [a if isinstance(a, int) else slot(a) for a in passed]
        return Launch(self.driver, function, self.context, shape, arguments, slot(scratch) if b.scratch else 0)


def parted(named: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int | str]]:
    """The named arguments of a launch: options of the compiler, and constants of the kernel."""
    options = {k: v for k, v in named.items() if k in COMPILED_BY}
    return options, {k: v for k, v in named.items() if k not in COMPILED_BY}


# -- the host part of an emitted file

OnLaunch: TypeAlias = Callable[[str, Sequence[int], Sequence[Any], Mapping[str, Any]], None]


class Kernel:
    """What a kernel's name stands for: `kernel[grid](*args, **constants)` calls `launch` with all of it."""

    def __init__(self, name: str, launch: OnLaunch) -> None:
        self.name, self.launch = name, launch

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        def call(*given: Any, **named: Any) -> None:
            if 0 not in grid:  # no blocks, nothing to do
                self.launch(self.name, grid, given, named)

        return call


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# What stands for Triton in the host part.  Types are constants of kernels, by name.
HOST_NAMES = {
    "triton": SimpleNamespace(
        cdiv=cdiv, next_power_of_2=next_power_of_2, JITFunction=Kernel, set_allocator=lambda allocate: None
    ),
    "tl": SimpleNamespace(bfloat16="bfloat16", float32="float32"),
}


@dataclass(frozen=True)
class Host:
    """The host part of an emitted file, and the names of its kernels."""

    code: CodeType
    kernels: tuple[str, ...]

    @staticmethod
    def of(text: str, kernels: Sequence[str], name: str) -> Host:
        return Host(compile(text, name, "exec"), tuple(kernels))

    def names(self, launch: OnLaunch, **others: Any) -> dict[str, Any]:
        """What the file defines, where kernels are launched by `launch`.  `others`: what its functions see under these
        names when they are called."""
        found = {**HOST_NAMES, "torch": torch, **{k: Kernel(k, launch) for k in self.kernels}}
        exec(self.code, found)
        found.update(others)
        return found


# -- recording


class Unrecordable(TypeError):
    """The host part does more than to allocate and to launch.  A TypeError, as operators of a Place raise one too."""


class Place:
    """What `run` sees of a tensor while it is recorded.  `aligned`: its address is divisible by 16.  `number`: where
    its pointer is among those of a call, once the recording is complete."""

    __slots__ = ("aligned", "device", "dtype", "number", "recorder", "shape", "strides")

    def __init__(
        self, recorder: Recorder, shape: Sequence[int], strides: Sequence[int], dtype: Any, aligned: bool
    ) -> None:
        self.recorder, self.shape, self.strides, self.dtype = recorder, tuple(shape), tuple(strides), dtype
        self.aligned, self.device, self.number = aligned, recorder, -1

    def stride(self, at: int | None = None) -> Any:
        return self.strides if at is None else self.strides[at]

    def data_ptr(self) -> int:
        """An address that is divisible as that of the tensor is."""
        return 0 if self.aligned else 1

    @property
    def size(self) -> int:
        """In bytes."""
        return int(self.dtype.itemsize) * prod(self.shape)

    def zero_(self) -> Place:
        binaries = self.recorder.binaries
        self.recorder.steps.append(lambda: Clear(binaries.driver, binaries.context, self.number, self.size))
        return self

    def __getattr__(self, name: str) -> Any:
        raise Unrecordable(name)


class Recorder:
    """What stands for torch while `run` is recorded: allocations and launches are written down.  Steps are made when
    all Places have their numbers."""

    def __init__(self, binaries: Binaries, host: str, stream: int) -> None:
        self.binaries, self.host, self.stream = binaries, host, stream
        self.allocated: list[Place] = []
        self.counted: list[Place] = []
        self.steps: list[Callable[[], Launch | Clear]] = []

    def place(self, t: torch.Tensor, aligned: bool) -> Place:
        """Where a dimension has one element, its stride is never used: it may be what the aligned kernel wants."""
        dense = dense_strides(t.shape)
        strides = [d if n <= 1 else s for n, s, d in zip(t.shape, t.stride(), dense, strict=True)]
        return Place(self, t.shape, strides, t.dtype, aligned)

    def counters(self, count: int, device: Any) -> Place:
        self.counted.append(Place(self, (count,), (1,), torch.int32, True))
        return self.counted[-1]

    def empty(self, shape: Sequence[int], *, dtype: Any, device: Any) -> Place:
        self.allocated.append(Place(self, shape, dense_strides(shape), dtype, True))
        return self.allocated[-1]

    def launch(self, kernel: str, grid: Sequence[int], given: Sequence[Any], named: Mapping[str, Any]) -> None:
        b, passed = self.binaries.choose(self.host, kernel, given, named)
        scratch = self.empty((b.scratch * prod(grid),), dtype=torch.uint8, device=None) if b.scratch else None
        self.steps.append(partial(self.binaries.launch, b, passed, grid, self.stream, scratch))

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if not isinstance(found, torch.dtype):
            raise Unrecordable(name)
        return found


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor of that shape, in elements."""
    inner = accumulate((max(n, 1) for n in reversed(shape[1:])), mul, initial=1)
    return tuple(inner)[::-1] if shape else ()


Layout: TypeAlias = Callable[..., bool]


def layout_of(tensors: Sequence[torch.Tensor]) -> Layout:
    """A test whether other tensors have the types, shapes, strides, devices and lazy flags of these."""
    try:
        from torch._C._dynamo.guards import TensorGuards  # one call, in C++

        guard: Layout = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        if guard(*tensors):
            return guard
    except Exception:
        pass  # it is no public function, so it may change in any way

    def looks(t: torch.Tensor) -> tuple[Any, ...]:
        return type(t), t.dtype, t.shape, t.stride(), t.get_device(), t.is_neg(), t.requires_grad

    wanted = [looks(t) for t in tensors]
    return lambda *given: [looks(t) for t in given] == wanted


data_ptr = torch.Tensor.data_ptr


Alignment: TypeAlias = tuple[bool, ...] | None


def alignment_of(pointers: Sequence[int]) -> Alignment:
    """Which of the pointers 16 divides; None where it divides all."""
    low = 0
    for p in pointers:
        low |= p
    return tuple(p % ALIGNMENT == 0 for p in pointers) if low % ALIGNMENT else None


@dataclass(frozen=True)
class Torch:
    """What calls ask PyTorch for: the current stream of a device as the driver's handle, the current device, memory."""

    stream: Callable[[int], int]
    current: Callable[[], int]
    empty: Callable[..., torch.Tensor] = torch.empty
    capturing: Callable[[], bool] = bool  # the current stream, into a CUDA graph


def present_torch() -> Torch:
    """The real one.  Without CUDA there is device 0 with its stream 0, and all of these are functions in C as well."""
    stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    current = getattr(torch._C, "_cuda_getDevice", None)
    if stream is None or current is None or not torch.cuda.is_available():
        return Torch(stream=index, current=int)
    return Torch(stream, current, capturing=torch.cuda.is_current_stream_capturing)


class Memory:
    """Memory of a device that launches share: bytes, and counters that are 0 between launches, because each launch
    leaves them so.

    Launches on one stream follow each other, so they may have the same.  A captured launch may be replayed on any
    stream: it takes counters of its own from a store that is made before the first capture, and gives none back; where
    that is used up, the graph sets some to 0 at each replay."""

    def __init__(self, hooks: Torch, device: torch.device) -> None:
        self.hooks, self.device = hooks, device
        self.of_stream: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.store: torch.Tensor | None = None
        self.used = 0
        self.lock = threading.Lock()

    def prepare(self) -> None:
        """Makes the store."""
        if self.store is None:
            self.store = self.counters(SPARE_COUNTERS)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a graph may read them on another stream

    def room(self, size: int) -> torch.Tensor:
        return self.hooks.empty((size,), dtype=torch.uint8, device=self.device)

    def counters(self, count: int) -> torch.Tensor:
        return self.hooks.empty((count,), dtype=torch.int32, device=self.device).zero_()

    def shared(self, stream: int, size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At least so many bytes and counters, the same for all launches on a stream.  What was too small for one
        stays with those that had enough of it."""
        with self.lock:
            self.prepare()
            room, counters = self.of_stream.get(stream, (None, None))
            if room is None or len(room) < size:
                room = self.room(next_power_of_2(max(size, 1)))
            if counters is None or len(counters) < count:
                counters = self.counters(next_power_of_2(max(count, 1)))
            self.of_stream[stream] = room, counters
            return room, counters

    def own(self, size: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For a launch that is captured."""
        with self.lock:
            end = self.used + -(-count // ROOM) * ROOM
            if self.store is None or end > SPARE_COUNTERS:
                counters = self.counters(count)
            else:
                counters, self.used = self.store[self.used : self.used + count], end
            return self.room(size), counters


class Shared:
    """The addresses that a call takes from `memory`, kept by stream: room cut at `offsets`, and `count` counters for
    each of `counting` launches."""

    def __init__(self, memory: Memory, offsets: Sequence[int], size: int, count: int, counting: int) -> None:
        self.memory, self.offsets, self.size, self.count, self.counting = memory, offsets, size, count, counting
        self.of_stream: dict[int, tuple[list[int], Any]] = {}
        self.captured: Any = None

    def __call__(self, stream: int) -> list[int]:
        if self.memory.hooks.capturing():
            self.captured = self.memory.own(self.size, self.count)  # held until the launch is in the graph
            return self.addresses(*self.captured)
        held = self.memory.shared(stream, self.size, self.count)
        self.of_stream[stream] = self.addresses(*held), held
        return self.of_stream[stream][0]

    def addresses(self, room: torch.Tensor, counters: torch.Tensor) -> list[int]:
        return [*(room.data_ptr() + o for o in self.offsets), *[counters.data_ptr()] * self.counting]


@dataclass(eq=False, slots=True)
class Prepared:
    """A call for tensors of one layout and alignment.  `fits` tests the layout; `tracked`: a tensor requires a
    gradient.  Calling it with all tensors (the last ones are those of `out`) and their addresses does the work."""

    fits: Layout
    alignment: Alignment
    tracked: bool
    hooks: Torch
    device: torch.device
    ordinal: int
    inputs: int


@dataclass(eq=False, slots=True)
class Direct(Prepared):
    """The function itself, for want of a recording."""

    function: Callable[..., Any]

    def __call__(self, pointers: list[int], tensors: Sequence[torch.Tensor]) -> Any:
        if self.hooks.current() != self.ordinal:
            with torch.cuda.device(self.ordinal):
                return self(pointers, tensors)
        inputs, out = tensors[: self.inputs], tensors[self.inputs :]
        return self.function(*inputs, out=None if not out else out[0] if len(out) == 1 else out)


@dataclass(eq=False, slots=True)
class Recorded(Prepared):
    """What is left of a call: allocations, and steps that want pointers.

    `kept` gives further tensors, computed ahead; `allocations` one result each; `room` the memory between launches, cut
    at `offsets`; `shared` what launches on a stream share: counters, and that memory where there is one launch, because
    those of two calls may take turns.  `result` picks what is returned among all tensors.  `spare` holds sets of steps
    that no call is using: another thread makes a set of its own."""

    kept: Callable[..., Sequence[torch.Tensor]] | None
    allocations: Sequence[Callable[[], torch.Tensor]]
    room: Callable[[], torch.Tensor] | None
    offsets: Sequence[int]
    shared: Shared | None
    steps: tuple[Launch | Clear, ...]
    result: Callable[[Sequence[torch.Tensor]], Any]
    spare: list[tuple[Launch | Clear, ...]] = field(default_factory=list)

    def __call__(self, pointers: list[int], tensors: Sequence[torch.Tensor]) -> Any:
        hooks, ordinal = self.hooks, self.ordinal
        if hooks.current() != ordinal:
            with torch.cuda.device(ordinal):
                return self(pointers, tensors)
        every = [*tensors]
        if self.kept is not None:
            every += self.kept(*tensors[: self.inputs])
            pointers += map(data_ptr, every[len(tensors) :])
        for allocate in self.allocations:
            t = allocate()
            every.append(t)
            pointers.append(t.data_ptr())
        if self.room is not None:
            room = self.room()  # it lives until all is launched; what comes later on the stream may have it
            pointers += map(room.data_ptr().__add__, self.offsets)
        try:
            steps = self.spare.pop()
        except IndexError:
            steps = tuple(s.copy() for s in self.steps)
        stream = hooks.stream(ordinal)
        if (shared := self.shared) is not None:
            known = None if hooks.capturing() else shared.of_stream.get(stream)
            pointers += shared(stream) if known is None else known[0]
        for step in steps:
            step(stream, pointers)
        self.spare.append(steps)
        return self.result(every)


Admit: TypeAlias = Callable[
    [tuple[Any, ...], Any, Mapping[str, Any]], tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], dict[str, int]]
]


Calls: TypeAlias = dict[tuple[Any, ...], tuple[Direct | Recorded, ...]]


class Dispatch:
    """An emitted program that is launched from cubins.  Call it with the program's tensors, by position or name; `out`
    receives the results.

    admit     checks the arguments of a call: what kernels can read of them, the tensors of `out`, the symbolic sizes
    table     which file serves which sizes
    hosts     the host part of each file that the table names
    binaries  the cubins for a device, by its ordinal
    inputs    how many tensors a call takes
    sources   positions of the inputs whose shapes determine the symbolic sizes
    """

    def __init__(
        self,
        admit: Admit,
        table: Table,
        hosts: Mapping[str, Host],
        binaries: Callable[[int], Binaries],
        inputs: int,
        sources: Sequence[int],
    ) -> None:
        self.admit, self.table, self.hosts, self.binaries = admit, table, hosts, binaries
        self.inputs, self.sources = inputs, tuple(sources)
        self.hooks = present_torch()
        self.ready: Calls = {}
        self.into: Calls = {}  # those with `out`
        self.last: Direct | Recorded | None = None
        self.on_device: dict[int, Binaries] = {}
        self.memories: dict[torch.device, Memory] = {}
        self.live: dict[tuple[str, int], dict[str, Any]] = {}  # what a file defines, launching on a device
        self.lock = threading.RLock()

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        if out is None and not named and len(args) == self.inputs:
            try:
                pointers = list(map(data_ptr, args))
                low = 0
                for x in pointers:
                    low |= x
                p = self.last  # of an aligned call
                if p is None or low % ALIGNMENT or not p.fits(*args):
                    p = self.known(self.ready, args, alignment_of(pointers))
                    if not low % ALIGNMENT:
                        self.last = p
            except (AttributeError, TypeError, RuntimeError):
                p = None  # no tensor, or one without memory: `admit` says which
            if p is not None and not (p.tracked and torch.is_grad_enabled()):
                return p(pointers, args)
        readable, given, sizes = self.admit(args, out, named)
        tensors = (*readable, *given)
        pointers = list(map(data_ptr, tensors))
        return self.prepared(tensors, pointers, sizes)(pointers, tensors)

    def key(self, tensors: Sequence[torch.Tensor]) -> Any:
        """What a call is found by: the shapes that determine its symbolic sizes."""
        return tuple(tensors[i].shape for i in self.sources)

    def known(self, among: Calls, tensors: Sequence[torch.Tensor], alignment: Alignment) -> Direct | Recorded | None:
        return next(
            (p for p in among.get(self.key(tensors), ()) if p.alignment == alignment and p.fits(*tensors)), None
        )

    # -- preparing

    def warmup(self, ordinal: int = 0) -> Dispatch:
        """Loads every kernel on a device, so that no later call does."""
        self.loaded(ordinal).load()
        if any("counters" in host.code.co_names for host in self.hosts.values()):
            self.memory(torch.device("cuda", ordinal) if torch.cuda.is_available() else torch.device("cpu")).prepare()
        return self

    def loaded(self, ordinal: int) -> Binaries:
        with self.lock:
            if ordinal not in self.on_device:
                self.on_device[ordinal] = self.binaries(ordinal)
            return self.on_device[ordinal]

    def multiprocessors(self, ordinal: int) -> int:
        return self.loaded(ordinal).driver.multiprocessors(ordinal)

    def prepared(
        self, tensors: Sequence[torch.Tensor], pointers: Sequence[int], sizes: Mapping[str, int]
    ) -> Direct | Recorded:
        """The call for tensors of this layout."""
        among = self.ready if len(tensors) == self.inputs else self.into
        alignment = alignment_of(pointers)
        p = self.known(among, tensors, alignment)
        if p is None:
            p = self.prepare(tensors, alignment, sizes)
            with self.lock:  # held for no more than this, as what is prepared may compute ahead, with a lock of its own
                if len(among) >= MOST_PREPARED:
                    among.clear()
                key = self.key(tensors)
                among[key] = (p, *among.get(key, ())[: MOST_LAYOUTS - 1])
        return p

    def prepare(
        self, tensors: Sequence[torch.Tensor], alignment: Alignment, sizes: Mapping[str, int]
    ) -> Direct | Recorded:
        device = tensors[0].device
        ordinal = device.index or 0
        tracked = any(t.requires_grad for t in tensors)
        common = layout_of(tensors), alignment, tracked, self.hooks, device, ordinal, self.inputs
        file = self.table.file(sizes)
        names = self.names(file, ordinal)
        if not self.hosts[file].kernels:
            return Direct(*common, names["run"])
        recorder = Recorder(self.loaded(ordinal), file, self.hooks.stream(ordinal))
        count = self.multiprocessors(ordinal)
        recorded = self.hosts[file].names(
            recorder.launch, torch=recorder, counters=recorder.counters, multiprocessors=lambda device: count
        )
        places = [recorder.place(t, a) for t, a in zip(tensors, alignment or [True] * len(tensors), strict=True)]
        inputs, out = places[: self.inputs], places[self.inputs :]
        run, kept = recorded["run"], None
        if "keep" in names:  # what is computed ahead runs as it stands; what is left for each call is recorded
            kept = kept_by(names, run)
            further = [recorder.place(t, t.data_ptr() % ALIGNMENT == 0) for t in kept(*tensors[: self.inputs])]
            inputs, places = [*inputs, *further], [*places, *further]
            run = recorded["rest"]
        try:
            found = run(*inputs, out=None if not out else out[0] if len(out) == 1 else tuple(out))
        except TypeError:  # Unrecordable, or an operator between Places
            return Direct(*common, names["run"])
        returned = found if isinstance(found, tuple) else (found,)
        results = [a for a in recorder.allocated if a in returned]
        between = [a for a in recorder.allocated if a not in returned]
        for number, place in enumerate((*places, *results, *between, *recorder.counted)):
            place.number = number
        make = [partial(self.hooks.empty, a.shape, dtype=a.dtype, device=device) for a in results]
        *offsets, end = accumulate((-(-a.size // ROOM) * ROOM for a in between), initial=0)
        pick = picker([o.number for o in found]) if isinstance(found, tuple) else itemgetter(found.number)
        steps = tuple(s() for s in recorder.steps)
        count = max((c.shape[0] for c in recorder.counted), default=0)
        shares = len(steps) == 1 and 0 < end <= MOST_SHARED
        shared = room = None
        if shares or count:
            size, cut = (end, offsets) if shares else (0, [])
            shared = Shared(self.memory(device), cut, size, count, len(recorder.counted))
        if end and not shares:
            room = partial(self.hooks.empty, (end,), dtype=torch.uint8, device=device)
        return Recorded(*common, kept, make, room, offsets, shared, steps, pick)

    def memory(self, device: torch.device) -> Memory:
        with self.lock:
            return self.memories.setdefault(device, Memory(self.hooks, device))

    def names(self, file: str, ordinal: int) -> dict[str, Any]:
        """What a file defines, with kernels that are launched on the current stream of a device.  Launches that no call
        is using are kept for the next one with the same grid, numbers and alignment."""
        spare: dict[Any, list[Launch]] = {}

        def launch(kernel: str, grid: Sequence[int], given: Sequence[Any], named: Mapping[str, Any]) -> None:
            pointers = [a.data_ptr() for a in given if not isinstance(a, int)]
            numbers = tuple(a for a in given if isinstance(a, int))
            if len(spare) >= MOST_PREPARED:
                spare.clear()
            ready = spare.setdefault((kernel, grid, numbers, alignment_of(pointers), *named.values()), [])
            stream = self.hooks.stream(ordinal)
            try:
                step = ready.pop()
            except IndexError:
                loaded = self.loaded(ordinal)
                step = loaded.launch(*loaded.choose(file, kernel, given, named), grid, stream)
            scratch = []
            if size := step.shape.scratch:
                scratch.append(self.hooks.empty((size,), dtype=torch.uint8, device=given[0].device))
            step(stream, [*pointers, *map(data_ptr, scratch)])
            ready.append(step)

        with self.lock:  # one for all calls: it may keep what it computes ahead
            if (file, ordinal) not in self.live:
                count = self.multiprocessors(ordinal) if self.hosts[file].kernels else 1
                self.live[file, ordinal] = self.hosts[file].names(launch, multiprocessors=lambda device: count)
            return self.live[file, ordinal]


def kept_by(names: Mapping[str, Any], run: Any) -> Callable[..., Sequence[torch.Tensor]]:
    """What `keep` gives for the constants among the parameters of `run`."""
    parameters = run.__code__.co_varnames[: run.__code__.co_argcount]
    ahead = names["ahead"].__code__
    positions = [parameters.index(n) for n in ahead.co_varnames[: ahead.co_argcount]]
    keep = names["keep"]

    def kept(*inputs: torch.Tensor) -> Sequence[torch.Tensor]:
        found = keep(*(inputs[i] for i in positions))
        return found if isinstance(found, tuple) else (found,)

    return kept
