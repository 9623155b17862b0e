"""Jobs for the tests of engines.  What they leave on disk tells how often they ran."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Stop = Callable[[], bool]


def squared(request: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    """x²; each run adds a line to the file `log`, if there is one."""
    if request.get("log"):
        with open(request["log"], "a", encoding="utf-8") as log:
            log.write(f"{request['x']} {os.getpid()}\n")
    return {"square": request["x"] ** 2, "numbers": [0.1, request["x"] / 3]}


def slow(request: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    """x² after a while."""
    time.sleep(request["seconds"])
    return squared(request, stop)


def fragile(request: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    """x², but a process other than `home` dies in the first `deaths` runs."""
    marks = Path(request["marks"])
    if os.getpid() != request["home"] and len(list(marks.iterdir())) < request["deaths"]:
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return squared(request, stop)


def wrong(request: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    raise ValueError(f"no square of {request['x']}")


def nothing(request: Mapping[str, Any], stop: Stop) -> None:
    return None


def cut_short(request: Mapping[str, Any], stop: Stop) -> dict[str, Any]:
    """A result that is not whole where it was stopped."""
    return squared(request, stop) | {"whole": not stop()}
