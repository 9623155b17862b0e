"""A saved result, checked again in a fresh process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mugraph.errors import CacheError, MugraphError, VerificationError
from mugraph.ir.resize import retiled
from mugraph.pipeline import bounds_tier, emit, numeric_tier
from mugraph.result import AOT, Result, load
from mugraph.runtime.tune import TILES
from mugraph.verify.bounds import Bounds
from mugraph.verify.certificate import NOT_ATTEMPTED, Certificate, graph_hash
from mugraph.verify.equivalence import Verified, recheck
from mugraph.verify.numeric import OFFSET, Checked

# What `Result.files` makes of the two graphs and the source alone.
DERIVED = ("reference.py", "register.py", "program.json", "graph.json", "graph.txt", "graph.svg", "graph.mmd")


@dataclass(frozen=True)
class Rechecked:
    """What was established again, and what the files say that was not."""

    result: Result
    checks: tuple[str, ...]
    not_repeated: tuple[str, ...]

    def __str__(self) -> str:
        head = f"{self.result.directory}: {self.result.program.name} for {self.result.target} is verified"
        if self.not_compared:
            head += ", but its numbers are not" if self.nothing_compared else ", but not all of its numbers are"
        lines = [head, *(f"  {c}" for c in self.checks), *(f"  not compared: {n}" for n in self.not_compared)]
        return "\n".join([*lines, *(f"  not repeated: {n}" for n in self.not_repeated)])

    @property
    def nothing_compared(self) -> bool:
        """Whether no output of the source was compared with float64."""
        return not any(report.counted for report in self.result.certificate.numerics)

    @property
    def not_compared(self) -> tuple[str, ...]:
        """The outputs that were not compared with float64, and why."""
        reports = self.result.certificate.numerics
        if not reports:
            return ("the source with float64, as the check was not made or interrupted",)
        return tuple(dict.fromkeys(text for report in reports for text in report.not_compared))


def recheck_saved(directory: Path, strict: bool = False, say: Callable[[str], None] = lambda _: None) -> Rechecked:
    """Repeats the proof that the certificate records, emits the source again and compares it and the derived files.
    With `strict` the numeric check is repeated too, the way it was recorded.

    Raises CacheError where the directory holds no result, VerificationError for whatever does not come out again.
    """
    if not (directory / "manifest.json").is_file():
        raise CacheError(f"{directory} holds no manifest.json", remedy="name a directory that mugraph optimize wrote")
    try:
        result = load(directory)
    except MugraphError as error:
        raise VerificationError(f"refused: {error.message}", remedy=error.remedy) from error
    certificate = result.certificate
    say(f"read {directory}: every file has the hash in the manifest")
    verified = recheck(certificate, result.program, result.graph)
    tests = sum(d.tests for d in certificate.draws)
    say(f"the graph computes the program: {tests} tests repeated")
    _same_files(result, verified, directory)
    bounds = bounds_tier(verified, result.target, result.source)
    bounds_hold = _same_bounds(certificate, bounds)
    say("the source and the derived files come out the same again")
    checks = [
        f"files: {len(result.files())} with the hashes of the manifest",
        f"tested: {tests} tests repeated with their keys, error <= 2^{certificate.delta_log2:.1f}",
        f"all sizes: {'unknown, ' + certificate.proof if certificate.proof else 'proved again'}",
        *([f"loads and stores: {certificate.claims} claims hold again"] if certificate.claims and bounds_hold else []),
        "kernel.py: emitted again from the graph, the same text",
    ]
    missing = ["report.json: the search's counts and prices are taken as recorded"]
    if result.tuning.level != "none":
        missing.append("tuning.json: registers, shared memory, spills and times are taken as recorded")
    if result.choice:
        missing.append("choice.json: times are taken as recorded")
    if result.notes:
        missing.append("manifest.json: notes and versions are taken as recorded")
    if (directory / AOT).is_dir():
        missing.append(f"{AOT}: cubins and host parts have the hashes of the manifest, and are not made again")
    if not bounds_hold:
        assert bounds is not None
        why = f"loads and stores: {certificate.claims} claims on record, {bounds.claims} checked here: {bounds.reason}"
        if strict:
            raise VerificationError(why, remedy="verify where z3 is installed (mugraph[verify]), or without --strict")
        missing.append(why)
    if strict:
        _numerics_again(result, verified)
        counted = any(report.counted for report in certificate.numerics)
        checks.append(f"numerics: repeated, {'within the tolerance' if counted else 'no comparison could be made'}")
    else:
        missing += [f"{report} (--strict repeats it)" for report in certificate.numerics]
    return Rechecked(result, tuple(checks), tuple(missing))


def _same_bounds(certificate: Certificate, found: Bounds | None) -> bool:
    """Whether what is claimed comes out again.  A solver that is absent here, or slower, may know less; it may not
    know otherwise."""
    claimed = certificate.claims, certificate.bounds
    reached = (found.claims, found.reason) if found is not None else (0, NOT_ATTEMPTED)
    if claimed in ((0, NOT_ATTEMPTED), reached):
        return True
    if found is None or not found.unknown or found.claims > certificate.claims:
        raise VerificationError(f"the certificate claims {claimed} of loads and stores, a new run finds {reached}")
    return False


def _same_files(result: Result, verified: Verified, directory: Path) -> None:
    tiles = {c.name: c.value for c in result.tuning.trace if c.kernel == TILES and isinstance(c.value, int)}
    if retiled(verified.graph, tiles) != verified.graph:
        raise VerificationError(f"{directory / 'tuning.json'}: the graph has other tiles than {tiles}")
    try:
        source = emit(verified, result.target, result.tuning.options, result.compiled)
    except ValueError as error:
        raise VerificationError(f"{directory / 'tuning.json'}: {error}") from error
    if source != result.source:
        raise VerificationError(
            f"{directory / 'kernel.py'} is not what this version emits from the graph for {result.target}",
            remedy="run mugraph optimize again",
        )
    files = result.files()
    for name in DERIVED:
        path = directory / name
        found = path.read_text(encoding="utf-8") if path.is_file() else None
        if found != files.get(name):
            raise VerificationError(f"{path} does not follow from the graphs", remedy="run mugraph optimize again")
    _about_this_source(result.certificate, source)


def _about_this_source(certificate: Certificate, source: str) -> None:
    digest = hashlib.sha256(source.encode()).hexdigest()
    for report in certificate.numerics:
        if report.source_hash != digest:
            raise VerificationError("the certificate's numeric check is about another source")
        if report.disagrees:
            raise VerificationError(f"the recorded numeric check did not pass: {report}")


def _numerics_again(result: Result, verified: Verified) -> None:
    """Raises VerificationError where no check is recorded, or it cannot be repeated in the same way, or fails."""
    if not result.certificate.numerics:
        raise VerificationError(f"{graph_hash(result.graph)[:16]} has no numeric check on record")
    for report in result.certificate.numerics:
        seed, trace = result.certificate.seed, result.tuning.options
        offset = any(r.draw == OFFSET for r in report.rows)
        again = numeric_tier(verified, result.target, result.source, seed, trace, offset)
        if again.how != report.how:
            raise VerificationError(
                f"the numeric check ran on record as {report.how}, here it runs as {again.how}",
                remedy="verify on a machine with the target's device, or without --strict",
            )
        if report.better_than(again):
            raise VerificationError(f"the numeric check on record does not come out again: {report}; here {again}")
        if again.counted or report.counted:
            Checked(verified, report.source_hash, again)
