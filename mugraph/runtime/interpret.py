"""Emitted files under the Triton interpreter, on a CPU: checks the source, not machine code."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING

from mugraph.runtime.process import Worker
from mugraph.runtime.worker import received, sent

if TYPE_CHECKING:
    import torch


class Interpreter:
    """A worker process that interprets emitted files, many calls to one process."""

    def __init__(self, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._worker = Worker({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})

    def __enter__(self) -> Interpreter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._worker.close()

    def run(self, source: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The outputs of the file's `run` for CPU tensors in the program's order of inputs.

        Outputs and workspaces start as NaN.  Raises WorkerError if the file raises, crashes, or takes longer than
        `timeout` seconds.
        """
        request = {"source": source, "inputs": sent(inputs.values())}
        return received(self._worker.ask("interpret", request, self.timeout))


@lru_cache(maxsize=1)
def _of_process(pid: int) -> tuple[Interpreter, threading.Lock]:
    interpreter = Interpreter()
    atexit.register(interpreter.close)
    return interpreter, threading.Lock()


@contextmanager
def shared_interpreter() -> Iterator[Interpreter]:
    """The interpreter that this process keeps: starting one takes seconds.  One caller has it at a time."""
    interpreter, lock = _of_process(os.getpid())
    with lock:
        yield interpreter
