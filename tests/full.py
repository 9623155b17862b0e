"""The full matrices: `python -m tests.full [--fresh]`.

Runs the tests marked `full`, one file at a time in a process of its own, and records each file in `full_results.json`
as soon as it ends. A file that passed for the same sources is not run again, so an interrupted run goes on where it
stopped; `--fresh` forgets what is recorded. Exits with 1 if a file failed, 2 if the tests cannot be collected.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "full_results.json"
SOURCES = ("mugraph", "tests", "examples", "benchmarks", "pyproject.toml", "constraints.txt")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "full and not gpu"]
NOTHING_COLLECTED = 5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.full", description="Run the full matrices, resumably.")
    parser.add_argument("--fresh", action="store_true", help="forget recorded results and run everything")
    fresh = parser.parse_args().fresh
    groups = collect(ROOT)
    return run(groups, RESULTS, state(ROOT), fresh=fresh)


def run(groups: Counter[str], results: Path, sources: str, *, fresh: bool = False) -> int:
    """Run the groups (file -> number of tests) that have not passed for `sources`; 0 if all pass."""
    recorded = {} if fresh else recorded_groups(results, sources)
    done = {file: entry for file, entry in recorded.items() if file in groups and entry["failed"] == []}
    for file, count in sorted(groups.items()):
        if file in done:
            print(f"passed before  {file}  ({count} tests)", flush=True)
            continue
        done[file] = run_group(file)
        write(results, sources, done)
        print(describe(file, done[file]), flush=True)
    write(results, sources, done)
    failed = [name for entry in done.values() for name in entry["failed"]]
    print(f"{sum(entry['tests'] for entry in done.values())} tests in {len(done)} files, {len(failed)} failed")
    for name in failed:
        print(f"FAILED {name}")
    return 1 if failed else 0


def collect(root: Path) -> Counter[str]:
    """File -> number of its tests that are marked `full`."""
    listing = subprocess.run([*PYTEST, "--collect-only"], cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode not in (0, NOTHING_COLLECTED):
        print(listing.stdout, listing.stderr, sep="\n", file=sys.stderr)
        raise SystemExit(2)
    return Counter(line.partition("::")[0] for line in listing.stdout.splitlines() if "::" in line)


def run_group(file: str, root: Path = ROOT) -> dict[str, Any]:
    """Run one file and return its entry: tests, skipped, names that failed, seconds."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        code = subprocess.run([*PYTEST, "-n", "2", f"--junit-xml={report}", file], cwd=root, check=False).returncode
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [f"{file}::{case.get('name')}" for case in cases if is_failure(case)]
    if code != 0 and not failed:
        failed = [f"{file} (pytest exits with {code})"]
    return {
        "tests": len(cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
        "failed": failed,
        "seconds": round(time.monotonic() - start, 1),
    }


def is_failure(case: ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def describe(file: str, entry: dict[str, Any]) -> str:
    verdict = f"FAILED {len(entry['failed'])}" if entry["failed"] else "passed"
    return f"{verdict}  {file}  ({entry['tests']} tests, {entry['skipped']} skipped, {entry['seconds']} s)"


def state(root: Path) -> str:
    """A hash of all that the results depend on: sources and versions."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for top in SOURCES:
        path = root / top
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts and file != RESULTS:
                digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def recorded_groups(results: Path, sources: str) -> dict[str, Any]:
    """The entries of a former run over the same sources; none if the file is absent, damaged or about others."""
    try:
        former = json.loads(results.read_text(encoding="utf-8"))
        return dict(former["groups"]) if former["sources"] == sources else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(results: Path, sources: str, groups: dict[str, Any]) -> None:
    document = {"sources": sources, "versions": versions(), "groups": dict(sorted(groups.items()))}
    draft = results.with_name(results.name + ".tmp")
    draft.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    draft.replace(results)


if __name__ == "__main__":
    sys.exit(main())
