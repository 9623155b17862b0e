"""The CUDA driver, as far as it takes to load cubins and launch them: ctypes, no compiler.

    driver = Driver()                                   # libcuda.so.1, or another library with these functions
    function = driver.function(image, "kernel", shared, ordinal)
    launch = Launch(driver, function, driver.context(ordinal), Shape(grid, threads, shared), [Slot(0), 4096])
    launch(stream, pointers)

A `Launch` is ready but for its pointers: a call writes these into buffers that it keeps, and calls the driver.  The
driver copies arguments when it is called, also into a CUDA graph, so the buffers may be written again at once.  They
belong to one call at a time: whoever shares a `Launch` between threads hands it out (`dispatch.Prepared`).

This text is part of `aot.py` as it stands, so it imports the standard library alone.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from mugraph.errors import CompileError, LaunchError, TargetMismatchError

DRIVER = "libcuda.so.1"
STATIC_SHARED = 48 * 1024  # bytes; a block that needs more has to ask for it
MAX_DYNAMIC_SHARED, MAJOR, MINOR = 8, 75, 76  # CU_FUNC_ATTRIBUTE_..., CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...
MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
INVALID_CONTEXT = 201
OTHER_DEVICE = (209, 222)  # no binary for this GPU; made for a later driver


class Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number, padding to 8 bytes, and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


class Driver:
    """The driver library of that name.  Raises TargetMismatchError where there is none, or one that is too old."""

    def __init__(self, library: str = DRIVER) -> None:
        try:
            self.library = ctypes.CDLL(library)
            self.launch = self.library.cuLaunchKernelEx
        except (OSError, AttributeError) as error:
            raise TargetMismatchError(
                f"{library} is no CUDA driver that launches kernels: {error}",
                remedy="install an NVIDIA driver (12 or later), or name its library in MUGRAPH_DRIVER",
            ) from error
        self.contexts: dict[int, ctypes.c_void_p] = {}
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Raises LaunchError where the driver's function of that name does not succeed."""
        if code := getattr(self.library, name)(*arguments):
            raise LaunchError(f"{name} failed: {self.reason(code)}")

    def reason(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        return f"{(text.value or b'unknown error').decode()} ({code})"

    def number(self, name: str, *arguments: Any) -> int:
        """What a function of the driver writes into its first argument."""
        found = ctypes.c_int()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def version(self) -> int:
        """1000 * major + 10 * minor, as in 13000."""
        return self.number("cuDriverGetVersion")

    def arch(self, ordinal: int) -> int:
        """The compute capability of a device, 90 for 9.0."""
        return 10 * self.number("cuDeviceGetAttribute", MAJOR, ordinal) + self.number(
            "cuDeviceGetAttribute", MINOR, ordinal
        )

    def multiprocessors(self, ordinal: int) -> int:
        return self.number("cuDeviceGetAttribute", MULTIPROCESSORS, ordinal)

    def name(self, ordinal: int) -> str:
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), ordinal)
        return text.value.decode()

    def context(self, ordinal: int) -> ctypes.c_void_p:
        """The device's primary context, the one that PyTorch uses; it stays as long as the process."""
        if ordinal not in self.contexts:
            found = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(found), ordinal)
            self.contexts[ordinal] = found
        return self.contexts[ordinal]

    def capturing(self, stream: int) -> bool:
        """Whether what is launched on the stream becomes part of a CUDA graph."""
        status = ctypes.c_int()
        self.call("cuStreamIsCapturing", ctypes.c_void_p(stream), ctypes.byref(status))
        return status.value != 0

    def function(self, image: bytes, entry: str, shared: int, ordinal: int) -> ctypes.c_void_p:
        """The kernel of that name in a cubin, which stays loaded as long as the process.  Raises CompileError where the
        driver does not take it, TargetMismatchError where it is for another device or a later driver."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuCtxPushCurrent_v2", self.context(ordinal))
        try:
            code = self.library.cuModuleLoadDataEx(ctypes.byref(module), image, 0, None, None)
            if code in OTHER_DEVICE:
                remedy = "make it again for this device, or install a newer driver"
                raise TargetMismatchError(f"{entry} does not load: {self.reason(code)}", op=entry, remedy=remedy)
            if code:
                remedy = "make it again; the file may be damaged"
                raise CompileError(f"{entry} does not load: {self.reason(code)}", op=entry, remedy=remedy)
            if code := self.library.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()):
                raise CompileError(f"the cubin holds no {entry}: {self.reason(code)}", op=entry, remedy="make it again")
            if shared > STATIC_SHARED:
                self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
        finally:
            self.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        return function


@cache
def driver_of(library: str = DRIVER) -> Driver:
    """One `Driver` for each library and process."""
    return Driver(library)


@dataclass(frozen=True)
class Shape:
    """How a kernel is launched: blocks, threads of a block, bytes of dynamic shared memory; `dependent`: it may start
    before the one before it on the stream ends (programmatic dependent launch); `scratch`: bytes of global memory that
    its blocks use among themselves."""

    grid: tuple[int, int, int]
    threads: int
    shared: int
    dependent: bool = False
    scratch: int = 0


@dataclass(frozen=True)
class Slot:
    """An argument that each call gives: the pointer at this place of those given."""

    place: int


class Launch:
    """One kernel launch.  `arguments` are in the kernel's order: a Slot, or an integer of 32 bits.  `scratch`: the
    pointer to its scratch memory, 0 where it has none."""

    __slots__ = (
        "arguments", "attribute", "config", "config_at", "context", "driver", "function", "launch", "pack", "pick",
        "scratch", "shape", "tables", "values",
    )  # fmt: skip

    def __init__(
        self,
        driver: Driver,
        function: ctypes.c_void_p,
        context: ctypes.c_void_p,
        shape: Shape,
        arguments: Sequence[Slot | int],
        scratch: Slot | int = 0,
    ) -> None:
        self.driver, self.function, self.context, self.launch = driver, function, context, driver.launch
        self.shape, self.arguments, self.scratch = shape, tuple(arguments), scratch
        every = (*arguments, scratch, 0)  # the last of these hidden parameters is for profiles, which are not taken
        places = [a.place for a in every if isinstance(a, Slot)]
        numbers = [a & 0xFFFFFFFF for a in every if not isinstance(a, Slot)]
        self.values = (ctypes.c_uint64 * len(every))(*[0] * len(places), *numbers)  # pointers first
        first = ctypes.addressof(self.values)
        pointer_at, number_at = iter(range(len(places))), iter(range(len(places), len(every)))
        addresses = [first + 8 * next(pointer_at if isinstance(a, Slot) else number_at) for a in every]
        self.tables = (ctypes.c_void_p * len(addresses))(*addresses)
        self.pack = struct.Struct(f"{len(places)}Q").pack_into
        self.pick = picker(places)
        self.attribute = Attribute(id=SERIALIZATION)
        self.attribute.value[0] = 1
        self.config = Config(grid=shape.grid, block=(shape.threads, 1, 1), shared=shape.shared)
        self.config_at = ctypes.byref(self.config)
        if shape.dependent:
            self.config.attributes, self.config.attribute_count = ctypes.addressof(self.attribute), 1

    def __call__(self, stream: int, pointers: Sequence[int]) -> None:
        """Raises LaunchError where the driver refuses."""
        self.pack(self.values, 0, *self.pick(pointers))
        self.config.stream = stream
        if code := self.launch(self.config_at, self.function, self.tables, None):
            self.failed(code)

    def failed(self, code: int) -> None:
        """A thread that has not used the device yet has no context: it gets one, and the launch is repeated."""
        if code == INVALID_CONTEXT:
            self.driver.call("cuCtxSetCurrent", self.context)
            code = self.launch(self.config_at, self.function, self.tables, None)
        if code:
            raise LaunchError(f"a launch of {self.shape} failed: {self.driver.reason(code)}")

    def copy(self) -> Launch:
        return Launch(self.driver, self.function, self.context, self.shape, self.arguments, self.scratch)


class Clear:
    """Sets the `size` bytes at a pointer to zero."""

    __slots__ = ("context", "driver", "place", "size")

    def __init__(self, driver: Driver, context: ctypes.c_void_p, place: int, size: int) -> None:
        self.driver, self.context, self.place, self.size = driver, context, place, size

    def __call__(self, stream: int, pointers: Sequence[int]) -> None:
        at, size, queue = ctypes.c_uint64(pointers[self.place]), ctypes.c_size_t(self.size), ctypes.c_void_p(stream)
        code = self.driver.library.cuMemsetD8Async(at, 0, size, queue)
        if code == INVALID_CONTEXT:
            self.driver.call("cuCtxSetCurrent", self.context)
            code = self.driver.library.cuMemsetD8Async(at, 0, size, queue)
        if code:
            raise LaunchError(f"memory cannot be set to zero: {self.driver.reason(code)}")

    def copy(self) -> Clear:
        return self


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes the elements at these places of a sequence, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda given: tuple(given[i] for i in places)
