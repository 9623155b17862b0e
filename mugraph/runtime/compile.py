"""Compiles emitted files for a GPU architecture, without a GPU, and reads what the kernels need."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType
from typing import Any

from mugraph.errors import CompileError, UnknownTargetError
from mugraph.runtime.process import Worker, WorkerError

# Shared memory that one block may use, in bytes, by compute capability (CUDA programming guide, technical
# specifications per compute capability: 163, 99 and 227 KB).
SHARED_LIMITS = {
    80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 110: 232_448,
    120: 101_376, 121: 101_376,
}  # fmt: skip

MOST_COMPILERS = 8


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on `sm_<arch>`: registers per thread, shared memory per block and stack per thread in
    bytes; counts of instructions: spills in loops and outside, global loads of 16 bytes and of less, matrix
    multiplies, one iteration of the main loop (0: there is no loop)."""

    kernel: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spills: int
    spills_outside: int
    wide_loads: int
    narrow_loads: int
    matrix_ops: int
    loop_instructions: int = 0

    @property
    def repeated_spills(self) -> int:
        """Spills in loops; of a kernel without a loop, all of whose work is done once, every one."""
        return self.spills if self.loop_instructions else self.spills + self.spills_outside

    @property
    def excess(self) -> int:
        """Bytes of shared memory that a block needs and does not have."""
        return max(0, self.shared_bytes - SHARED_LIMITS[self.arch])


class Compiler:
    """A worker process that compiles emitted files, many calls to one process."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._worker = Worker()

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._worker.close()

    def resources(
        self, source: str, arch: int, options: Mapping[str, Any] | None = None, only: Sequence[str] | None = None
    ) -> list[Resources]:
        """Each kernel of the file, or these alone, compiled for `sm_<arch>`; `options` (num_warps, num_stages, maxnreg)
        override the file's.  Raises CompileError where Triton or ptxas refuses or takes longer than `timeout` seconds,
        UnknownTargetError for an architecture without a table entry."""
        check_arch(arch)
        names = None if only is None else list(only)
        request = {"source": source, "arch": arch, "options": dict(options or {}), "only": names}
        return [Resources(arch=arch, **kernel) for kernel in self._ask("compile", arch, request)]

    def binary(
        self, source: str, arch: int, kernel: str, parameters: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One kernel of the file as a cubin for `sm_<arch>`: `image`, `entry` (its name there), `shared` and
        `scratch` (bytes of a block, in shared and in global memory).
        `parameters` are in the terms of `SIGNATURES`, types as `tl.bfloat16`.  Raises as `resources`."""
        check_arch(arch)
        request = {"source": source, "arch": arch, "kernel": kernel}
        return dict(self._ask("binary", arch, {**request, "parameters": dict(parameters), "options": dict(options)}))

    def _ask(self, kind: str, arch: int, request: Mapping[str, Any]) -> Any:
        try:
            return self._worker.ask(kind, request, self.timeout)
        except WorkerError as error:
            raise CompileError(error.message, op=f"sm_{arch}") from error


def check_arch(arch: int) -> None:
    """Raises UnknownTargetError for an architecture without a table entry."""
    if arch not in SHARED_LIMITS:
        known = ", ".join(map(str, SHARED_LIMITS))
        raise UnknownTargetError(f"there is no architecture sm_{arch}", remedy=f"known: {known}")


def resources(
    source: str, arch: int, options: Mapping[str, Any] | None = None, timeout: float = 60.0
) -> list[Resources]:
    """One compilation in a process of its own; see `Compiler.resources`."""
    with Compiler(timeout) as compiler:
        return compiler.resources(source, arch, options)


@lru_cache(maxsize=1)
def _of_process(pid: int) -> tuple[tuple[Compiler, ...], threading.Lock]:
    compilers = tuple(Compiler() for _ in range(min(os.cpu_count() or 1, MOST_COMPILERS)))
    for compiler in compilers:
        atexit.register(compiler.close)
    return compilers, threading.Lock()


@contextmanager
def shared_compilers() -> Iterator[tuple[Compiler, ...]]:
    """The compilers that this process keeps: starting one takes seconds, and it starts with its first request.  One
    caller has them at a time."""
    compilers, lock = _of_process(os.getpid())
    with lock:
        yield compilers
