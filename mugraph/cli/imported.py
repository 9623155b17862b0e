"""μGraphs that others published, read and verified graph by graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mugraph import pipeline
from mugraph.errors import MugraphError, ParseError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.mirage import bound_to, import_mirage, parse_mirage
from mugraph.verify.equivalence import verify


@dataclass(frozen=True)
class Imported:
    """One graph of the file: what it was read as, and what came of it."""

    number: int
    verdict: str  # "read", where there is no program to compare with; "equal"; "refused"
    graph: KernelGraph | None
    seconds: float
    delta_log2: float | None = None
    error: MugraphError | None = None
    directory: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 3),
            "delta_log2": self.delta_log2,
            "error": self.error.to_dict() if self.error else None,
            "directory": self.directory,
        }

    def __str__(self) -> str:
        match self.verdict:
            case "equal":
                text = f"equal, error <= 2^{self.delta_log2:.1f}"
                return f"graph {self.number}: {text}" + (f", {self.directory}" if self.directory else "")
            case "refused":
                return f"graph {self.number}: refused: " + str(self.error).replace("\n", "\n  ")
            case _:
                return f"graph {self.number}:\n{self.graph}"


def import_file(
    file: Path,
    program: Program | None,
    out: Path | None = None,
    target: str | None = None,
    tell: Callable[[Imported], None] = lambda _: None,
) -> list[Imported]:
    """Every graph of the file, verified against the program if there is one.  With `out`, those that are equal are
    lowered for the target, checked and saved as `out/graph_0`, ..., to be loaded or verified again.

    Raises ParseError where the file cannot be read; what is wrong with one graph is in its `error`."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ParseError(f"cannot read {file}: {error}", remedy="name a file of published graphs") from error
    found = []
    for number, operators in enumerate(parse_mirage(text)):
        started, graph = time.perf_counter(), None
        delta, directory = None, None
        problem: MugraphError | None = None
        try:
            graph = import_mirage(operators, program, f"{file.stem}_{number}".replace("-", "_"))
            if program is not None:
                bound = bound_to(program, operators)
                delta = verify(bound, graph).certificate.delta_log2
                if out is not None:
                    result = pipeline.from_graph(bound, graph, target=target)
                    directory = str(result.save(out / f"graph_{number}"))
        except MugraphError as error:
            problem = error
        verdict = "refused" if problem else "equal" if program is not None else "read"
        seconds = time.perf_counter() - started
        found.append(Imported(number, verdict, graph, seconds, delta, problem, directory))
        tell(found[-1])
    return found
