"""A driver library without a device: launches are written down, kernels do not run.

It stands in for libcuda where there is no GPU, in tests of the loader and in `benchmarks.overhead`.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mugraph.errors import MugraphError

SOURCE = Path(__file__).parent / "stub_driver.c"
MOST_PARAMETERS = 64


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 256),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("dependent", ctypes.c_uint),
        ("parameter_count", ctypes.c_uint),
        ("stream", ctypes.c_uint64),
        ("parameters", ctypes.c_uint64 * MOST_PARAMETERS),
    )


@dataclass(frozen=True)
class Launched:
    """One launch as the driver got it; `parameters` are the bytes of each argument that the cubin declares, as an
    unsigned number."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    dependent: bool
    stream: int
    parameters: tuple[int, ...]


class Stub:
    """The stub driver, compiled into `directory`.  Raises MugraphError where there is no gcc."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("gcc") is None:
            raise MugraphError("the stub driver needs gcc, which is not here")
        self.path = str(directory / "libstub.so")
        subprocess.run(["gcc", "-O2", "-w", "-shared", "-fPIC", "-o", self.path, SOURCE, "-lpthread"], check=True)
        self.library = ctypes.CDLL(self.path)
        self.library.stub_launch.restype = ctypes.POINTER(_Launch)

    def reset(self, arch: int = 90) -> None:
        """Forgets all launches; the device is one of this architecture, and this thread has not used it yet."""
        self.library.stub_reset(arch)

    def record(self, on: bool) -> None:
        self.library.stub_record(int(on))

    def capture(self, on: bool) -> None:
        """Streams are being captured from here on, or not."""
        self.library.stub_capture(int(on))

    def refuse(self, code: int) -> None:
        """Cubins are refused with this error."""
        self.library.stub_refuse(code)

    @property
    def loads(self) -> int:
        """How many cubins were loaded."""
        return int(self.library.stub_loads())

    @property
    def launches(self) -> list[Launched]:
        found = []
        for i in range(self.library.stub_launches()):
            x = self.library.stub_launch(i).contents
            found.append(
                Launched(
                    x.name.decode(),
                    tuple(x.grid),
                    tuple(x.block),
                    x.shared,
                    bool(x.dependent),
                    x.stream,
                    tuple(x.parameters[: x.parameter_count]),
                )
            )
        return found
