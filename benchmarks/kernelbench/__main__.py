"""`python -m benchmarks.kernelbench [NAME ...] [--target cuda:90]`: what `mugraph import kernelbench` makes of the
modules in this folder.

One line for each: how many of its operators run as something else than they were written, in how many kernels, and
what stayed PyTorch.  A share counts operators, not time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from mugraph.cli.kernelbench import Imported, import_file

FOLDER = Path(__file__).parent


def modules() -> list[Path]:
    return sorted(f for f in FOLDER.glob("*.py") if not f.stem.startswith("__"))


def row(found: Imported, seconds: float) -> str:
    kernels = sum(len(r.graph.kernels()) for r in found.results)
    left = "; ".join(f"{name}: {why}" for name, why in found.left.items()) or "-"
    taken = f"{found.taken} of {found.total}" if found.total else "not cut"
    return f"{found.name:<22} {taken:>9} {100 * found.share:5.0f} % {kernels:>7} {seconds:6.1f} s  {left}"


def rows(names: list[str], target: str) -> Iterator[str]:
    found = []
    for file in modules():
        if names and file.stem not in names:
            continue
        started = time.perf_counter()
        found.append(import_file(file, target))
        yield row(found[-1], time.perf_counter() - started)
    taken, total = sum(f.taken for f in found), sum(f.total for f in found)
    whole, none = sum(f.share == 1 for f in found), sum(not f.taken for f in found)
    yield f"{len(found)} modules: {whole} wholly, {none} not at all; {taken} of {total} operators of those that are cut"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernelbench")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--target", default="cuda:90")
    given = parser.parse_args()
    print(f"{'module':<22} {'operators':>9} {'share':>7} {'kernels':>7} {'time':>8}  stays PyTorch")
    for line in rows(given.names, given.target):
        print(line, flush=True)


if __name__ == "__main__":
    main()
