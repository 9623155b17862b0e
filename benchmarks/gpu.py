"""Everything that needs a GPU, one unit after the other; runs go on where the last one stopped.

    python -m benchmarks.gpu [--minutes 9] [--all] [--out benchmarks/results]

The units: limits of the machine (`mugraph calibrate`); the tests that need a device, by file, those of
`tests/gpu/test_numerics.py` by program; and one for each case of `benchmarks.kernels`.  Each has a process of its own
with a time limit.  What a unit gives is written before the next begins, into `<device>-<date>.json`.  With `--minutes`
it ends after that time (or after the first unit, which has 8 minutes), and the exit code is 75 while units are left
that were not tried: run it again.  Units that failed are tried again after all others.  Without a CUDA device it says
so, writes nothing and succeeds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import Row, document, print_table
from benchmarks.kernels import COLUMNS, NOT_MEASURED, cases, has_device
from benchmarks.programs import FAMILIES
from mugraph.runtime.engine import code_version
from mugraph.runtime.files import write_whole
from mugraph.search.cost import slug

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
REPEATS = 100
LIMIT = 480.0  # seconds for one unit
UNFINISHED = 75  # EX_TEMPFAIL


@dataclass(frozen=True)
class Unit:
    """A command, and how its rows are read from what it prints."""

    name: str
    command: tuple[str, ...]
    read: Callable[[str], list[Row]]


def units(everything: bool) -> Iterator[Unit]:
    python = sys.executable
    yield Unit("limits", (python, "-m", "mugraph", "calibrate", "--json"), lambda text: [json.loads(text)])
    for name, (file, word) in device_tests().items():
        yield Unit(f"tests: {name}", (python, "-m", "pytest", "-q", "-m", "gpu", file, "-k", word), outcome)
    for c in cases(everything):
        request = json.dumps([c.family, c.variant, c.rows, c.dtype, REPEATS])
        yield Unit(f"kernels: {c}", (python, "-m", "benchmarks.gpu", "--case", request), json.loads)


def device_tests() -> dict[str, tuple[str, str]]:
    """Files of tests and a word of the names of those that a unit runs, by unit.  Every test marked `gpu` is in one."""
    numerics, sanitizer = "tests/gpu/test_numerics.py", "tests/gpu/test_sanitizer.py"
    return {
        "launching": ("tests/runtime/test_dispatch.py", ""),
        "variants of launches": ("tests/transpiler/test_variants.py", ""),
        "timing": ("tests/runtime/test_bench.py", ""),
        "streams and threads": ("tests/gpu/test_streams.py", ""),
        "CUDA graphs and batches": ("tests/gpu/test_serving.py", ""),
        "operators": ("tests/gpu/test_operators.py", ""),
        **{f"numerics of {name}": (numerics, f"of-{name}-in") for name in FAMILIES},
        **{f"sanitizer, {word}": (sanitizer, word) for word in ("memcheck", "racecheck", "planted")},
        "a case of the benchmark": ("tests/benchmarks/test_kernels.py", ""),
    }


def outcome(text: str) -> list[Row]:
    """What pytest says at its end."""
    lines = text.strip().splitlines()
    if not lines:
        raise ValueError("pytest printed nothing")
    return [{"text": lines[-1]}]


def run(unit: Unit, device: str, limit: float | None = None) -> list[Row] | None:
    """The rows of a unit: one with the error where it fails or takes longer than LIMIT seconds.  None where a lower
    `limit` ends it, as nothing is known of it then."""
    stamp = {"unit": unit.name, "device": device, "code": code_version()}
    try:
        code, out, err = finished(unit.command, LIMIT if limit is None else min(limit, LIMIT))
        if code:
            last = (err or out).strip().splitlines()[-1:]
            return [stamp | {"error": f"exit code {code}: {' '.join(last)}"[:300]}]
        return [stamp | row for row in unit.read(out)] or [stamp | {"error": "it gave no rows"}]
    except subprocess.TimeoutExpired:
        return None if limit is not None and limit < LIMIT else [stamp | {"error": f"no result within {LIMIT:g} s"}]
    except ValueError as error:
        return [stamp | {"error": f"its output cannot be read: {error}"}]


def finished(command: Sequence[str], limit: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command.  Raises subprocess.TimeoutExpired after `limit` seconds; what it
    started is ended with it, however it ends."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as started:
        try:
            out, err = started.communicate(timeout=limit)
            return started.returncode, out, err
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def recorded(out: Path, device: str) -> dict[Path, list[Row]]:
    """The rows of earlier runs on this device, by file.  A file that cannot be read is set aside, and said so."""
    found: dict[Path, list[Row]] = {}
    for path in sorted(out.glob(f"{slug(device)}-*.json")):
        try:
            found[path] = list(json.loads(path.read_text(encoding="utf-8"))["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            place = path.with_suffix(".damaged")
            path.replace(place)
            print(f"{path.name} cannot be read ({error}); it is now {place.name}", file=sys.stderr)
    return found


def done(rows: Sequence[Row]) -> set[str]:
    """The units that gave results for this very code."""
    return {r["unit"] for r in rows if r.get("code") == code_version() and not r.get("error")}


def merged(before: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Earlier rows, those of the same units replaced."""
    names = {r["unit"] for r in rows}
    return [r for r in before if r["unit"] not in names] + list(rows)


def write(rows: Sequence[Row], out: Path, device: str) -> Path:
    """Today's file with these rows in it, written whole or not at all."""
    path = out / f"{slug(device)}-{time.strftime('%Y-%m-%d')}.json"
    before = recorded(out, device).get(path, [])
    data = document("kernels", merged(before, rows), device=True, command="python -m benchmarks.gpu", clocks=clocks())
    write_whole(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
    return path


def clocks() -> dict[str, Any] | None:
    """Clocks and driver as nvidia-smi reports them; None where it is not installed."""
    query = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return dict(zip(query, map(str.strip, lines[0].split(",")), strict=False)) if lines else None


def device_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def case(request: str) -> int:
    """One case, in a process of its own: its rows as JSON on stdout, whatever else is printed going to stderr."""
    from contextlib import redirect_stdout

    from benchmarks.kernels import Case, measured

    family, variant, rows, dtype, repeats = json.loads(request)
    with redirect_stdout(sys.stderr):
        found = measured(Case(family, variant, rows, dtype), repeats)
    print(json.dumps(found))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="all work that needs a GPU")
    parser.add_argument("--minutes", type=float, help="end after so many (default: go on to the end)")
    parser.add_argument("--all", action="store_true", help="every variant of every program, not the classic six alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results are written")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.case:
        return case(options.case)
    if not has_device():
        print(NOT_MEASURED)
        return 0
    started, device = time.monotonic(), device_name()
    failed = False
    rows = [r for found in recorded(options.out, device).values() for r in found]
    tried, known = {r["unit"] for r in rows if r.get("code") == code_version()}, done(rows)
    waiting = sorted((u for u in units(options.all) if u.name not in known), key=lambda u: u.name in tried)
    for number, unit in enumerate(waiting):
        left = None if options.minutes is None else 60 * options.minutes - (time.monotonic() - started)
        given = None
        if left is None or left > 0:
            print(f"{unit.name} ...", file=sys.stderr, flush=True)
            given = run(unit, device, left if number else None)  # the first has its time: each run gets on
        if given is None:
            print(f"{len(waiting) - number} units are left: run it again", file=sys.stderr)
            return 1 if unit.name in tried else UNFINISHED  # those that failed before come last
        write(given, options.out, device)
        failed |= any(r.get("error") or r.get("correct") is False for r in given)
        print_table(unit.name, given, COLUMNS if "ratio" in given[0] else tuple(given[0]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
