"""The answers to why a search did not find, or did not choose, a μGraph: exactly one of them each time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mugraph.search.report import KernelCost, cost_line


@dataclass(frozen=True)
class NotEquivalent:
    """The graph computes something else; `counterexample` says where it differs."""

    counterexample: str

    def __str__(self) -> str:
        return f"not equivalent: {self.counterexample}"


@dataclass(frozen=True)
class Found:
    """The graph is in the list of plans: the `rank`-th of `plans` in the order in which they were tried."""

    rank: int
    plans: int
    seconds: float
    verdict: str
    structure: str

    def __str__(self) -> str:
        return (
            f"found: it is number {self.rank} of {self.plans} in the list ({self.structure}), "
            f"{1e6 * self.seconds:.1f} µs predicted: {self.verdict}."
        )


@dataclass(frozen=True)
class Costlier:
    """The graph is in the space, and takes `by` seconds more than what was chosen, by the model."""

    seconds: float
    best_seconds: float
    kernels: tuple[KernelCost, ...]

    @property
    def by(self) -> float:
        return self.seconds - self.best_seconds

    @property
    def ratio(self) -> float:
        return self.seconds / self.best_seconds if self.best_seconds else math.inf

    def __str__(self) -> str:
        lines = [
            f"costlier: it is in the space, but {1e6 * self.seconds:.1f} µs are predicted for it against "
            f"{1e6 * self.best_seconds:.1f} µs for what was chosen: "
            f"{1e6 * self.by:.1f} µs more, {self.ratio:.2f} times."
        ]
        lines += [f"  {k.name}: {cost_line(k)}" for k in self.kernels]
        return "\n".join(lines)


Cut = Literal["feasibility", "tile", "bound", "budget", "margin"]


@dataclass(frozen=True)
class Pruned:
    """The graph is in the space, but was cut: `by` what, at which limit, and what lifts it."""

    by: Cut
    what: str
    limit: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"pruned by {self.by}: {self.what} ({self.limit}).{f' {self.remedy}.' if self.remedy else ''}"


@dataclass(frozen=True)
class Outside:
    """The space does not hold the graph: which rule, or which field of SearchSpace, leaves out what."""

    restriction: str
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        remedy = self.remedy or "No setting of SearchSpace admits it"
        return f"outside the space ({self.restriction}): {self.what}. {remedy}."


Answer = NotEquivalent | Found | Costlier | Pruned | Outside


def to_dict(answer: Answer) -> dict[str, Any]:
    """The answer as plain data: its kind, its text, and its fields."""
    return {"answer": type(answer).__name__, "text": str(answer), **asdict(answer)}
