"""Every knob of mugraph: an explicit argument, else the environment, else the default.

    seconds = budget_seconds.get(argument)      # argument may be None

A value is read when it is asked for, and a bad one raises `SettingError` with the values that are valid.
`settings_table()` lists all of them; `configure_logging()` acts on `MUGRAPH_LOGS`.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast, get_args

from mugraph.errors import SettingError

T = TypeVar("T")

Effort = Literal["none", "quick", "full"]
Tune = Literal["none", "fit", "model", "measure"]

LOG_TOPICS = (
    "all",
    "ir",
    "dsl",
    "search",
    "verify",
    "codegen",
    "transpiler",
    "runtime",
    "pipeline",
    "pytorch",
)


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One knob. `parse` turns text or a Python value into a T, or raises ValueError; `valid` says what it takes."""

    name: str
    env: str
    default: Callable[[], T]
    parse: Callable[[object], T]
    valid: str
    help: str

    def get(self, argument: T | str | None = None) -> T:
        """The value: `argument` unless None, else the environment unless empty, else the default."""
        if argument is not None:
            return self._checked(argument, f"argument {self.name}={argument!r}")
        text = os.environ.get(self.env, "").strip()
        if text:
            return self._checked(text, f"environment variable {self.env}={text!r}")
        return self.default()

    def _checked(self, value: object, source: str) -> T:
        try:
            return self.parse(value)
        except ValueError:
            raise SettingError(f"{source} is not valid", remedy=self.valid) from None


def _flag(value: object) -> bool:
    return _FLAGS[_member(_FLAGS, str(value).lower())]


_FLAGS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def _presence(value: object) -> bool:
    """Any text counts as yes: the NO_COLOR convention."""
    return value if isinstance(value, bool) else True


def _effort(value: object) -> Effort:
    return cast(Effort, _member(get_args(Effort), str(value)))


def _tune(value: object) -> Tune:
    return cast(Tune, _member(get_args(Tune), str(value)))


def _member(valid: Mapping[str, object] | tuple[str, ...], text: str) -> str:
    if text not in valid:
        raise ValueError(text)
    return text


def _seconds(value: object) -> float:
    seconds = float(str(value))
    if not seconds > 0:
        raise ValueError(value)
    return seconds


def _natural(value: object) -> int:
    number = int(str(value))
    if number < 0:
        raise ValueError(value)
    return number


def _path(value: object) -> Path:
    if not str(value):
        raise ValueError(value)
    return Path(str(value)).expanduser()


_LEVELS = {"+": logging.DEBUG, "-": logging.ERROR}


def _log_levels(value: object) -> dict[str, int]:
    """`"+search,verify"` -> `{"search": DEBUG, "verify": INFO}`."""
    if isinstance(value, Mapping):
        return {_member(LOG_TOPICS, str(topic)): _natural(level) for topic, level in value.items()}
    words = [word.strip() for word in str(value).split(",")]
    return {_member(LOG_TOPICS, word.lstrip("+-")): _LEVELS.get(word[:1], logging.INFO) for word in words if word}


def _default_cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("mugraph", appauthor=False)


_YES_NO = "1, true, yes, on, 0, false, no, off"


def _switch(name: str, default: bool, help: str) -> Setting[bool]:
    return Setting(name, f"MUGRAPH_{name.upper()}", lambda: default, _flag, _YES_NO, help)


effort: Setting[Effort] = Setting(
    "effort", "MUGRAPH_EFFORT", lambda: "quick", _effort, "none, quick, full", "how hard to search"
)
tune: Setting[Tune] = Setting(
    "tune", "MUGRAPH_TUNE", lambda: "fit", _tune, "none, fit, model, measure", "how hard to tune kernels"
)
budget_seconds: Setting[float] = Setting(
    "budget_seconds",
    "MUGRAPH_BUDGET_SECONDS",
    lambda: math.inf,
    _seconds,
    "a number of seconds above 0, or inf",
    "when to stop and keep the best so far",
)
cache_dir: Setting[Path] = Setting(
    "cache_dir", "MUGRAPH_CACHE_DIR", _default_cache_dir, _path, "a directory", "where results are kept"
)
skip_cache = _switch("skip_cache", False, "neither read nor write the cache")
force_search = _switch("force_search", False, "search again even where the cache has a result")
disallow_search = _switch("disallow_search", False, "never search, only use the cache (for serving)")
print_output_code = _switch("print_output_code", False, "print the emitted source to stderr")
print_repro = _switch("print_repro", False, "print a script that repeats the run to stderr")
logs: Setting[dict[str, int]] = Setting(
    "logs",
    "MUGRAPH_LOGS",
    dict,
    _log_levels,
    f"comma-separated topics, each with + for more or - for errors only: {', '.join(LOG_TOPICS)}",
    "what to log to stderr",
)
progress_bar = _switch("progress_bar", True, "show progress on stderr")
seed: Setting[int] = Setting("seed", "MUGRAPH_SEED", lambda: 0, _natural, "an integer from 0", "seed of every draw")
debug_dir: Setting[Path | None] = Setting(
    "debug_dir", "MUGRAPH_DEBUG_DIR", lambda: None, _path, "a directory", "where every stage leaves its graph"
)
interpret = _switch("interpret", False, "run emitted kernels under the Triton interpreter")
calibration = _switch("calibration", True, "predict with what `mugraph calibrate` measured, where it did")
driver: Setting[str] = Setting(
    "driver", "MUGRAPH_DRIVER", lambda: "libcuda.so.1", str, "a library's name or path", "the CUDA driver's library"
)
no_color: Setting[bool] = Setting(
    "no_color", "NO_COLOR", lambda: False, _presence, "any text", "write plain text on terminals"
)

SETTINGS: tuple[Setting[object], ...] = cast(
    "tuple[Setting[object], ...]",
    (
        effort,
        tune,
        budget_seconds,
        cache_dir,
        skip_cache,
        force_search,
        disallow_search,
        print_output_code,
        print_repro,
        logs,
        progress_bar,
        seed,
        debug_dir,
        interpret,
        calibration,
        driver,
        no_color,
    ),
)


def settings_table() -> str:
    """All settings as aligned text: name, environment variable, default, what it does, what it takes."""
    header = ("setting", "environment", "default", "what it does", "valid values")
    rows = [header, *((s.name, s.env, _shown(s.default()), s.help, s.valid) for s in SETTINGS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _shown(value: object) -> str:
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        return str("~" / value.relative_to(Path.home()))
    if isinstance(value, bool):
        return str(int(value))
    return "-" if value is None or value == {} else str(value)


def configure_logging(argument: str | dict[str, int] | None = None) -> None:
    """Set the levels of the `mugraph.<topic>` loggers from `logs` and write them to stderr.

    Asked for nothing, it leaves logging to the application. Calling it again replaces the former set-up.
    """
    levels = logs.get(argument)
    root = logging.getLogger("mugraph")
    for handler in [h for h in root.handlers if h.get_name() == "mugraph"]:
        root.removeHandler(handler)
    for topic in LOG_TOPICS:
        _logger(topic).setLevel(levels.get(topic, logging.NOTSET))
    root.propagate = not levels
    if levels:
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name("mugraph")
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        root.addHandler(handler)


def _logger(topic: str) -> logging.Logger:
    return logging.getLogger("mugraph" if topic == "all" else f"mugraph.{topic}")
