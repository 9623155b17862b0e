"""What goes wrong, said usefully: one base, one class per mistake, each with a stable code.

An error says what is wrong, in which op, on which line of the user's program, and what to do about it:

    MG0004 ShapeError: the inner axes of `@` have sizes 64 and 128
      op: contract
      at: model.py:12: y = x @ w
      try: transpose one operand
"""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = [
    "BudgetExceeded",
    "CacheError",
    "CacheWarning",
    "CaptureError",
    "CompileError",
    "FallbackWarning",
    "GraphError",
    "InterruptedWarning",
    "LaunchError",
    "Location",
    "MugraphError",
    "MugraphWarning",
    "NoCandidateError",
    "ParseError",
    "SettingError",
    "ShapeError",
    "TargetMismatchError",
    "TargetWarning",
    "UnknownTargetError",
    "UnsupportedOpError",
    "VerificationError",
    "underline",
    "user_location",
]

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@dataclass(frozen=True)
class Location:
    """A line of the user's source, as `file.py:12: y = x @ w`."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return f"{place}: {self.text}" if self.text else place


def user_location() -> Location | None:
    """The innermost line on the call stack that is not mugraph's own; None if there is none."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE):
        if frame.f_back is None:
            return None
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(path, line, frame.f_globals).strip()
    return Location(_relative_to_cwd(path), line, text)


def _relative_to_cwd(path: str) -> str:
    return path.removeprefix(os.getcwd() + os.sep)


def underline(text: str, line: int) -> str:
    """`text` with its line number `line` (from 1) underlined.

    >>> print(underline("a = load X\\n  b = exp a\\nstore b", 2))
    a = load X
      b = exp a
      ^^^^^^^^^
    store b
    """
    lines = text.splitlines()
    if not 1 <= line <= len(lines):
        raise ValueError(f"line {line} is outside a text of {len(lines)} lines")
    wrong = lines[line - 1].rstrip()
    body = wrong.lstrip()
    indent = wrong[: len(wrong) - len(body)]
    return "\n".join([*lines[:line], indent + "^" * max(len(body), 1), *lines[line:]])


class MugraphError(Exception):
    """The base of every error that mugraph raises on purpose.

    `op` names the operator, `where` the user's line, `remedy` what to try.
    """

    code: ClassVar[str] = "MG0001"

    def __init__(
        self,
        message: str,
        *,
        op: str | None = None,
        where: str | Location | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.op = op
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        lines = [f"{self.code} {type(self).__name__}: {self.message}"]
        lines += [f"  {label}: {text}" for label, text in self._details() if text is not None]
        return "\n".join(lines)

    def _details(self) -> list[tuple[str, str | None]]:
        return [("op", self.op), ("at", self.where), ("try", self.remedy)]

    def to_dict(self) -> dict[str, Any]:
        """The error as a JSON-ready dictionary; the keys are always present."""
        return {
            "code": self.code,
            "error": type(self).__name__,
            "message": self.message,
            "op": self.op,
            "where": self.where,
            "remedy": self.remedy,
        }


class CaptureError(MugraphError):
    """A Python or PyTorch function cannot be turned into a program."""

    code = "MG0002"


class UnsupportedOpError(MugraphError):
    """The program uses an operator that mugraph does not understand."""

    code = "MG0003"


class ShapeError(MugraphError):
    """Shapes, axes or dtypes of a program do not fit together."""

    code = "MG0004"


class ParseError(MugraphError):
    """Program text or JSON is not well formed."""

    code = "MG0005"


class GraphError(MugraphError):
    """A graph breaks a rule of the IR."""

    code = "MG0006"


class VerificationError(MugraphError):
    """A graph does not compute what its program says."""

    code = "MG0007"


class NoCandidateError(MugraphError):
    """The search space holds nothing that fits the constraints."""

    code = "MG0008"


class BudgetExceeded(MugraphError):
    """The time or node budget ended; `best` is the best result so far, or None."""

    code = "MG0009"

    def __init__(
        self,
        message: str,
        *,
        best: Any = None,
        op: str | None = None,
        where: str | Location | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, op=op, where=where, remedy=remedy)
        self.best = best


class CompileError(MugraphError):
    """An emitted kernel does not compile."""

    code = "MG0010"


class LaunchError(MugraphError):
    """A kernel was called with an argument of the wrong shape, dtype, device or stride."""

    code = "MG0011"


class TargetMismatchError(MugraphError):
    """An artefact was built for another architecture or schema than the one at hand."""

    code = "MG0012"


class UnknownTargetError(MugraphError):
    """The named target does not exist."""

    code = "MG0013"


class CacheError(MugraphError):
    """The cache directory cannot be used."""

    code = "MG0014"


class SettingError(MugraphError):
    """A setting has a value that it does not take."""

    code = "MG0015"


class MugraphWarning(UserWarning):
    """The base of every warning that mugraph gives."""


class FallbackWarning(MugraphWarning):
    """The original function runs instead; the message says why."""


class InterruptedWarning(MugraphWarning):
    """Ctrl-C ended a search: the best so far runs."""

    def __init__(self) -> None:
        super().__init__("the search was interrupted and the best so far runs; another Ctrl-C ends the program")


class CacheWarning(MugraphWarning):
    """A cache entry was ignored or could not be written."""


class TargetWarning(MugraphWarning):
    """Kernels run elsewhere than they were timed."""
