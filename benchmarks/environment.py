"""What every benchmark prints beside its rows: the machine, the versions, and the one shape of a document."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

SCHEMA_VERSION = 1
Row = dict[str, Any]


def environment(device: bool = False) -> dict[str, Any]:
    """Versions by package (None where it is not installed), the platform, and with `device` the CUDA device."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for name in ("mugraph", "torch", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found |= {"platform": platform.platform(), "machine": platform.machine(), "cpu_count": os.cpu_count()}
    return found | (cuda_device() if device else {})


def cuda_device() -> dict[str, Any]:
    """Name, memory, multiprocessors and driver-side CUDA version of the current device; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    p = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability(0)
    return {
        "device": p.name,
        "arch": 10 * major + minor,
        "memory_bytes": p.total_memory,
        "multiprocessors": p.multi_processor_count,
        "clock_khz": getattr(p, "clock_rate", None),
        "cuda": torch.version.cuda,
    }


def document(benchmark: str, rows: Sequence[Row], device: bool = False, **more: Any) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "schema_version": SCHEMA_VERSION,
        "environment": environment(device),
        **more,
        "rows": list(rows),
    }


def print_document(data: dict[str, Any]) -> None:
    json.dump(data, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def print_table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """The columns of the rows, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for c in columns:
        number = any(isinstance(r[c], int | float) for r in rows)
        table.add_column(c, justify="right" if number else "left", overflow="fold")
    for r in rows:
        table.add_row(*(_shown(r[c]) for c in columns))
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 20 * len(columns)))
    console.print(table)


def _shown(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        case _:
            return str(value)
