"""Everything that needs a GPU, in pieces of less than ten minutes each.

    python -m benchmarks.gpu [--piece N] [--out benchmarks/results]

Piece 1 runs the tests that need a device; the others time the emitted kernels of two programs each and put their rows
into `<device>-<date>.json`, in place of earlier rows of the same measurement.  Without a CUDA device it says so,
writes nothing and succeeds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import Row, document
from benchmarks.kernels import COLUMNS, NOT_MEASURED, ROWS, has_device, rows_of
from benchmarks.programs import CLASSIC
from mugraph.runtime.files import write_whole

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAIRS = tuple(CLASSIC[i : i + 2] for i in range(0, len(CLASSIC), 2))
REPEATS = 100


def tests() -> int:
    """Piece 1: `pytest -m gpu`; its exit code."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, check=False).returncode


def kernels(names: Sequence[str], out: Path) -> int:
    """A later piece: rows for these programs, merged into the file of this device and day.  1 if a kernel is wrong."""
    from benchmarks.environment import print_table

    rows = rows_of(names, ROWS, REPEATS)
    print_table("kernels", rows, COLUMNS)
    print(f"wrote {write(rows, out)}")
    return 0 if all(r["correct"] for r in rows) else 1


def write(rows: Sequence[Row], out: Path) -> Path:
    """The file with these rows in it, written whole or not at all."""
    device = re.sub(r"\W+", "-", str(rows[0]["device"])).strip("-").lower()
    path = out / f"{device}-{time.strftime('%Y-%m-%d')}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    data = document("kernels", merged(before, rows), device=True, command="python -m benchmarks.gpu", clocks=clocks())
    write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return path


def merged(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Earlier rows, those of the same program, sizes, element type and baseline replaced."""
    found = {tuple(r[k] for k in ("program", "sizes", "dtype", "baseline")): r for r in (*before, *rows)}
    return list(found.values())


def clocks() -> dict[str, Any] | None:
    """Clocks and driver as nvidia-smi reports them; None where it is not installed."""
    query = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(query, map(str.strip, lines[0].split(",")), strict=False)) if lines else None


def main(argv: Sequence[str] | None = None) -> int:
    pieces = len(PAIRS) + 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="all work that needs a GPU")
    parser.add_argument("--piece", type=int, choices=range(1, pieces + 1), help="default: all, one after the other")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    options = parser.parse_args(argv)
    if not has_device():
        print(NOT_MEASURED)
        return 0
    codes = []
    for piece in [options.piece] if options.piece else range(1, pieces + 1):
        print(f"piece {piece} of {pieces}", file=sys.stderr, flush=True)
        codes.append(tests() if piece == 1 else kernels(PAIRS[piece - 2], options.out))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
