"""Worker processes: interpreting and compiling crash, hang and set global state, so they happen elsewhere.

    with Worker({"TRITON_INTERPRET": "1"}) as worker:
        answer = worker.ask("interpret", {...}, timeout=60.0)

A worker is `python -m mugraph.runtime.worker`: it reads pickled requests from its standard input and answers on its
standard output, each with its length in front.
"""

from __future__ import annotations

import os
import pickle
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mugraph.errors import MugraphError

HEADER = struct.Struct("<Q")
LAST_WORDS = 2000  # characters of a worker's stderr that an error repeats


class WorkerError(MugraphError):
    """A worker process failed: its code raised, it died, or it did not answer in time."""

    code = "MG0016"


class Worker:
    """A process that answers requests one after another.  It starts with the first request, and anew after a crash
    or a timeout."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # what a request left in the buffer has nowhere to go
                        pipe.close()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def kill(self) -> None:
        """Ends the process from another thread than that which asks: its request fails."""
        if (process := self._process) is not None:
            process.kill()

    def ask(self, kind: str, request: Mapping[str, Any], timeout: float) -> Any:
        """The worker's answer.  Raises WorkerError if the request raises there, and if the process dies or takes more
        than `timeout` seconds; then the next request gets a fresh process."""
        process = self._started()
        assert process.stdin is not None
        body = pickle.dumps((kind, dict(request)), protocol=pickle.HIGHEST_PROTOCOL)
        deadline = time.monotonic() + timeout
        try:
            process.stdin.write(HEADER.pack(len(body)) + body)
            process.stdin.flush()
            (size,) = HEADER.unpack(self._read(HEADER.size, deadline))
            ok, answer = pickle.loads(self._read(size, deadline))
        except (BrokenPipeError, EOFError):
            process.wait()
            words, status = self._last_words(), process.returncode
            self.close()
            raise WorkerError(f"the {kind} worker died with status {status}\n{words}".rstrip(), op=kind) from None
        except TimeoutError:
            self.close()
            raise WorkerError(f"no answer within {timeout:g} s", op=kind, remedy="use smaller sizes") from None
        if not ok:
            raise WorkerError(str(answer), op=kind)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            root = str(Path(__file__).parents[2])
            paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            environment |= {"PYTHONPATH": os.pathsep.join(paths), **self.environment}
            # open as long as the process lives
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mugraph.runtime.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
            )
        return self._process

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        chunks = bytearray()
        while len(chunks) < size:
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0.0))
            if not ready:
                raise TimeoutError
            chunk = os.read(fd, min(size - len(chunks), 1 << 20))
            if not chunk:
                raise EOFError
            chunks += chunk
        return bytes(chunks)

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")[-LAST_WORDS:]
