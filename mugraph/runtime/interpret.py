"""Emitted files under the Triton interpreter, on a CPU: checks the source, not machine code."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from mugraph.runtime.process import Worker

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
        outputs: list[torch.Tensor] = self._worker.ask(
            "interpret", {"source": source, "inputs": list(inputs.values())}, self.timeout
        )
        return outputs


def interpret(source: str, inputs: Mapping[str, torch.Tensor], timeout: float = 120.0) -> list[torch.Tensor]:
    """One call in a process of its own; see `Interpreter.run`."""
    with Interpreter(timeout) as interpreter:
        return interpreter.run(source, inputs)
