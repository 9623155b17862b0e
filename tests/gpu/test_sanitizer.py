"""compute-sanitizer finds nothing in the kernels of small programs, and finds what is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOUND = 9  # the exit code for what the sanitizer finds
SECONDS = 200  # for one run of the script, two of which are in one test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH"),
]


def ran(tool: str | None, *more: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-m", "tests.gpu.sanitized", *more]
    sanitizer = ["compute-sanitizer", "--tool", tool or "", "--error-exitcode", str(FOUND), "--report-api-errors", "no"]
    return subprocess.run(
        [*(sanitizer if tool else ()), *script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    before = ran(None)  # searches and compiles, so that the sanitizer watches kernels alone
    assert before.returncode == 0, before.stderr[-2000:]
    done = ran(tool)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_a_planted_store_outside_a_tensor_is_found() -> None:
    assert ran("memcheck", "--past", "0").returncode == 0
    done = ran("memcheck", "--past", "64")
    assert done.returncode == FOUND, (done.stdout + done.stderr)[-4000:]
    assert "Invalid __global__ write" in done.stdout + done.stderr
