"""The command line: `mugraph optimize | why-not | verify | show | cache | env | calibrate`.

Data goes to stdout, narration and errors to stderr.  Exit codes: 0 ok, 1 internal (or stdout cannot be written),
2 usage, 3 nothing beats the baseline (which is then the artefact), 4 verification failed, 5 unsupported, 6 compile
failed, 130 interrupted (the best so far is saved).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.  `argv` is without the program's name; default: that of the
    process."""
    try:
        from mugraph.cli.commands import app, with_shapes_apart

        arguments = list(sys.argv[1:] if argv is None else argv)
        app(args=with_shapes_apart(arguments), prog_name="mugraph")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except KeyboardInterrupt:
        print("interrupted: nothing was saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        code = 0
    except OSError as error:  # what prints help and usage
        return _unwritten(error)
    else:
        code = 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, had enough
        _drop_stdout()
    except OSError as error:
        if code != 1:
            return _unwritten(error)
        _drop_stdout()
    return code


def _unwritten(error: OSError) -> int:
    _drop_stdout()
    print(f"cannot write to stdout: {error.strerror or error}", file=sys.stderr)
    return 1


def _drop_stdout() -> None:
    """What is still in the buffer goes nowhere, and the end of the process does not trip over it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
