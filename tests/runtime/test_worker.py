"""Workers answer, and an error, a crash or a hang in one is an error here and nothing worse."""

import time

import pytest
import torch

from mugraph.errors import CompileError, UnknownTargetError
from mugraph.runtime.compile import Compiler, resources
from mugraph.runtime.interpret import Interpreter, shared_interpreter
from mugraph.runtime.process import Worker, WorkerError

DOUBLE = "import torch\n\n\ndef run(X):\n    return X * 2, torch.empty(2)\n"
RAISES = "def run(X):\n    raise ValueError('no such thing')\n"
DIES = "import os\n\n\ndef run(X):\n    print('last words')\n    os._exit(3)\n"
HANGS = "import time\n\n\ndef run(X):\n    time.sleep(60)\n"


@pytest.fixture(scope="module")
def interpreter():
    with Interpreter() as worker:
        worker.run(DOUBLE, {"X": torch.ones(1)})
        yield worker


def test_outputs_come_back_and_unwritten_memory_is_nan(interpreter):
    doubled, empty = interpreter.run(DOUBLE, {"X": torch.arange(3.0)})
    assert doubled.tolist() == [0.0, 2.0, 4.0]
    assert empty.isnan().all()


def test_one_process_serves_many_calls(interpreter):
    pid = "import os\nimport torch\n\n\ndef run(X):\n    return torch.tensor([os.getpid()])\n"
    first, second = (interpreter.run(pid, {"X": torch.ones(1)})[0].item() for _ in range(2))
    assert first == second


def test_an_error_is_told_and_the_worker_lives_on(interpreter):
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        interpreter.run(RAISES, {"X": torch.ones(1)})
    assert interpreter.run(DOUBLE, {"X": torch.ones(1)})[0].tolist() == [2.0]


def test_a_crash_is_told_with_its_last_words_and_a_new_worker_starts():
    with Interpreter() as worker:
        with pytest.raises(WorkerError, match=r"died with status 3\n(?s:.*)last words"):
            worker.run(DIES, {"X": torch.ones(1)})
        assert worker.run(DOUBLE, {"X": torch.ones(1)})[0].tolist() == [2.0]


def test_a_worker_that_dies_before_it_reads_is_a_worker_error(monkeypatch):
    with Worker() as worker:
        process = worker._started()
        process.kill()
        process.wait()
        monkeypatch.setattr(worker, "_started", lambda: process)  # killed between the look and the request
        with pytest.raises(WorkerError, match="died with status -9"):
            worker.ask("job", {}, 60.0)


def test_a_hang_ends_at_the_limit(interpreter):
    interpreter.timeout = 1.0
    began = time.monotonic()
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        interpreter.run(HANGS, {"X": torch.ones(1)})
    assert time.monotonic() - began < 20
    interpreter.timeout = 120.0


def test_a_process_keeps_one_interpreter():
    with shared_interpreter() as first:
        assert first.run(DOUBLE, {"X": torch.ones(1)})[0].tolist() == [2.0]
    with shared_interpreter() as second:
        assert second is first


def test_an_unknown_architecture_is_refused_with_the_known_ones():
    with pytest.raises(UnknownTargetError, match="sm_42") as error:
        resources(DOUBLE, 42)
    assert error.value.remedy is not None
    assert "90" in error.value.remedy


def test_a_file_that_is_no_python_is_a_compile_error():
    with Compiler() as compiler, pytest.raises(CompileError, match="SyntaxError"):
        compiler.resources("def run(:\n", 90)


def test_closing_twice_is_harmless():
    worker = Worker()
    worker.close()
    worker.close()
