"""Random programs through all of mugraph: searched, verified, emitted, and run against float64.

    python -m benchmarks.fuzz [--minutes 5] [--target torch|cuda:90] [--seed N] [--lines 12] [--json]

A program fails if anything but a clear refusal comes of it: an error, a result that is not verified or that the model
takes for costlier than the source, or code that disagrees with float64.  Each failure is shrunk, and printed as DSL
text; `--seed N` begins with the same programs again.  For a CUDA target the kernels run on the device if it is there,
under Triton's interpreter if not.  The exit status is 1 if any program failed.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from unittest.mock import patch

import numpy as np

from benchmarks.environment import Row, document, print_document
from mugraph import pipeline
from mugraph.errors import MugraphError, UnsupportedOpError, VerificationError
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.shift import is_exponential
from mugraph.pipeline import finished, numeric_tier
from mugraph.search.build import baseline
from mugraph.search.driver import search
from mugraph.search.report import SearchReport
from mugraph.search.setup import LIBRARY
from mugraph.search.space import SearchSpace
from mugraph.transpiler.target import Target, parse_target
from mugraph.verify.equivalence import Verified, verify
from mugraph.verify.formal import FormalAlgebra
from tests.search.recipes import MOST_LINES, Recipe, random_recipe, shrunk

# One size, and budgets that keep a program within a fraction of a second.
QUICK = SearchSpace(sizes=(), states=1_000, entries=50_000)


def checked(program: Program) -> None:
    """The search verifies what it finds, and it is no costlier than the source by the model.  Raises AssertionError,
    or whatever the search raises."""
    try:
        result = search(program, accept=lambda graph: verify(program, finished(graph)), space=QUICK)
    except (VerificationError, ZeroDivisionError):
        if divides_by_zero(program):  # whatever its inputs are: there is nothing to search for
            return
        raise
    assert isinstance(result.accepted, Verified)
    assert result.accepted.program == program
    no_costlier_than_the_source(result.report)


def no_costlier_than_the_source(report: SearchReport) -> None:
    source = report.candidates[-1]
    assert source.structure == LIBRARY
    if not source.verdict.startswith("would keep in 16 bits"):
        assert report.predicted_seconds <= source.seconds * (1 + 1e-9), "costlier than the source"


def runs_as(target: Target, program: Program) -> None:
    """The emitted source agrees with float64; where exponentials are nested, that of some plan does, library calls at
    the last.  Raises AssertionError, VerificationError; UnsupportedOpError where there is no form."""
    if divides_by_zero(program):
        return
    nested = has_nested_exponentials(program)

    def accept(graph: KernelGraph) -> Verified:
        verified = verify(program, finished(graph))
        report = numeric_tier(verified, target, pipeline.emit(verified, target), seed=0)
        assert nested or not report.disagrees, str(report)
        if report.disagrees:
            raise VerificationError(str(report))
        return verified

    no_costlier_than_the_source(search(program, accept=accept, space=QUICK).report)


def divides_by_zero(program: Program) -> bool:
    """Whether the program has no value in the fields."""
    with patch.object(FormalAlgebra, "differs", lambda self, a, b: np.zeros(a.lead, dtype=bool)):
        try:
            verify(program, baseline(program))
        except VerificationError as error:
            return "denominator is zero" in error.message
    return False


def has_nested_exponentials(program: Program) -> bool:
    """Whether an exponential is taken of what another is part of: kernels compute it as written, without a shift."""
    carries = set[str]()
    for e in program.equations:
        inside = not carries.isdisjoint(e.args)
        if inside and is_exponential(e.op):
            return True
        if inside or is_exponential(e.op):
            carries.update(t.name for t in e.targets)
    return False


FAILURES = (AssertionError, ArithmeticError, LookupError, MugraphError, RecursionError, TypeError, ValueError)


def failure_of(recipe: Recipe, test: Callable[[Program], None]) -> str | None:
    """What is wrong with a program that fails the test, and the smallest like it; None for one that passes."""
    try:
        test(recipe.program())
    except FAILURES as error:
        kind = type(error)
        smallest = shrunk(recipe, partial(raises, test, kind))
        return f"{kind.__name__}: {error}\n\n{smallest}\n\nfrom\n\n{recipe}"
    return None


def raises(test: Callable[[Program], None], kind: type[Exception], program: Program) -> bool:
    try:
        test(program)
    except Exception as error:
        return type(error) is kind
    return False


def searched_and_run(target: Target, program: Program) -> None:
    """All checks; what the target has no form for, is searched and verified."""
    try:
        runs_as(target, program)
    except UnsupportedOpError:
        checked(program)


def fuzzed(seconds: float, target: Target, seed: int, lines: int, tell: Callable[[str], None]) -> Row:
    """Programs of the seeds from `seed` on, until the time is over or the user interrupts; one at least."""
    started, count = time.perf_counter(), 0
    failed: list[Row] = []
    longest, slowest = 0.0, seed
    try:
        while not count or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            recipe = random_recipe(seed + count, lines)
            if (failure := failure_of(recipe, partial(searched_and_run, target))) is not None:
                failed.append({"seed": seed + count, "failure": failure})
                tell(f"seed {seed + count}: {failure}\n")
            if (took := time.perf_counter() - before) > longest:
                longest, slowest = took, seed + count
            count += 1
    except KeyboardInterrupt:
        tell("interrupted: what was tried until then follows")
    spent = time.perf_counter() - started
    return {
        "target": str(target), "seed": seed, "programs": count, "failed": failed, "seconds": spent,
        "longest_seconds": longest, "slowest_seed": slowest,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description="random programs against float64")
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default 5)")
    parser.add_argument("--target", default="torch", help="torch (default), or cuda:ARCH for Triton")
    parser.add_argument("--seed", type=int, help="of the first program (default: a new one)")
    parser.add_argument("--lines", type=int, default=MOST_LINES, help=f"at most so many (default {MOST_LINES})")
    parser.add_argument("--json", action="store_true", help="exactly one JSON document on stdout")
    options = parser.parse_args(arguments)
    if not 0 <= options.minutes < float("inf") or options.lines < 1:
        parser.error("--minutes is a finite number that is not negative, --lines at least 1")
    try:
        target = parse_target(options.target)
    except MugraphError as error:
        parser.error(error.message)
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    row = fuzzed(
        60 * options.minutes, target, seed, options.lines, lambda text: print(text, file=sys.stderr, flush=True)
    )
    if options.json:
        print_document(document("fuzz", [row]))
    else:
        print(
            f"{row['programs']} programs from seed {seed} on {row['target']}: {len(row['failed'])} failed, "
            f"{row['seconds']:.0f} s (the slowest {row['longest_seconds']:.1f} s, seed {row['slowest_seed']})"
        )
    return 1 if row["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
