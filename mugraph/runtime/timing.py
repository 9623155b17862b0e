"""Times emitted files on a device, each in a process that may crash or hang without harm.

    with DeviceTimer(program, sizes) as timer:
        timer.seconds(source, repeats=20)          # Spread, or Refused with the reason

The process that times owns the device.  It is killed where a file takes longer than `limit` seconds, and the next file
gets a fresh one.  After a failure a probe says whether the device is still there.  What was measured is kept in
`Records`, file by file as it comes, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from mugraph import settings
from mugraph.errors import CacheError, CacheWarning
from mugraph.ir.graph import Program
from mugraph.runtime.bench import Spread
from mugraph.runtime.files import write_whole
from mugraph.runtime.process import Worker, WorkerError
from mugraph.search.cost import slug

SCHEMA_VERSION = 1
LIMIT = 60.0  # seconds for one file: it is compiled, run and timed
PROBE_LIMIT = 30.0


@dataclass(frozen=True)
class Refused:
    """Why a file has no time.  `lost`: the device does not answer any more."""

    reason: str
    lost: bool = False


class Timer(Protocol):
    """Says how long an emitted file takes."""

    def seconds(self, source: str, repeats: int) -> Spread | Refused:
        """The median of one call of the file's `run`, with quartiles."""
        ...


@dataclass
class DeviceTimer:
    """A timer for a program at given sizes on this machine's device ("cuda", or "cpu").  Once the device is lost, no
    more is asked of it."""

    program: Program
    sizes: Mapping[str, int]
    device: str = "cuda"
    limit: float = LIMIT
    records: Records | None = None
    lost: Refused | None = None
    _worker: Worker = field(default_factory=Worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()

    def seconds(self, source: str, repeats: int) -> Spread | Refused:
        key = self.key(source, repeats)
        if self.records is not None and (known := self.records.get(key)) is not None:
            return known
        if self.lost is not None:
            return self.lost
        request = {
            "source": source,
            "program": str(self.program),
            "sizes": dict(self.sizes),
            "device": self.device,
            "repeats": repeats,
        }
        found: Spread | Refused
        try:
            found = Spread(**self._worker.ask("time", request, self.limit))
        except WorkerError as error:
            found = Refused(error.message.strip().splitlines()[-1][:200])
            self._worker.close()  # a CUDA context does not survive an error
            if not self.there():
                self.lost = Refused(f"the device was lost: {found.reason}", lost=True)  # says nothing of the file
                return self.lost
        if self.records is not None:
            self.records.put(key, self.program.name, self.sizes, source, found)
        return found

    def there(self) -> bool:
        """Whether the device answers."""
        try:
            return bool(self._worker.ask("probe", {"device": self.device}, PROBE_LIMIT))
        except WorkerError:
            return False

    def key(self, source: str, repeats: int) -> str:
        text = json.dumps([source, str(self.program), sorted(self.sizes.items()), self.device, repeats])
        return hashlib.sha256(text.encode()).hexdigest()


# -- what was measured


@dataclass(frozen=True)
class Records:
    """Measurements on one device, one readable JSON file each, in a directory of its own.

    Each is written whole or not at all, and none is ever changed, so processes may share the directory.  A file that
    cannot be read is set aside with a CacheWarning."""

    device: str
    directory: Path

    @staticmethod
    def of(device: str) -> Records:
        """Where this user's measurements of the device are kept."""
        return Records(slug(device), settings.cache_dir.get() / "tuning" / slug(device))

    def get(self, key: str) -> Spread | Refused | None:
        path = self.directory / f"{key}.json"
        try:
            return measurement(json.loads(path.read_text(encoding="utf-8")), self.device)
        except OSError:
            return None
        except (ValueError, OverflowError, RecursionError) as error:
            self._aside(path, error)
            return None

    def put(self, key: str, program: str, sizes: Mapping[str, int], source: str, found: Spread | Refused) -> None:
        """Keeps a measurement.  One that cannot be written is not kept, with a CacheWarning."""
        row = {
            "schema_version": SCHEMA_VERSION,
            "key": key,
            "device": self.device,
            "program": program,
            "sizes": dict(sizes),
            "source_sha256": hashlib.sha256(source.encode()).hexdigest(),
            **(asdict(found) if isinstance(found, Spread) else {"refused": found.reason}),
        }
        try:
            self._write(key, row)
        except OSError as error:
            warnings.warn(CacheWarning(f"a measurement is not kept: {error}"), stacklevel=3)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All that can be read, by key."""
        for path in sorted(self.directory.glob("[!.]*.json")):
            try:
                row = json.loads(path.read_text(encoding="utf-8"))
                measurement(row, self.device)
                yield row
            except (OSError, ValueError, OverflowError, RecursionError) as error:
                self._aside(path, error)

    def export(self) -> str:
        """One JSON document with everything, to ship."""
        data = {"schema_version": SCHEMA_VERSION, "device": self.device, "rows": list(self.rows())}
        return json.dumps(data, indent=1) + "\n"

    def merge(self, text: str) -> int:
        """Takes over what a document of `export` has and this does not; what is here stays.  Returns how many rows were
        new.  Raises CacheError, and takes over nothing, for another device's or a damaged document."""
        try:
            data = json.loads(text)
            if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"it is no document of schema version {SCHEMA_VERSION}")
            rows: Sequence[Any] = data["rows"]
            if not isinstance(rows, list):
                raise ValueError("its rows are no list")
            if data["device"] != self.device:
                raise ValueError(f"it is about {data['device']}, not {self.device}")
            for row in rows:
                measurement(row, self.device)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise CacheError(f"these are no measurements: {error}", remedy="export them again") from error
        new = {row["key"]: row for row in reversed(rows) if self.get(row["key"]) is None}
        for key, row in new.items():
            try:
                self._write(key, row)
            except OSError as error:
                raise CacheError(
                    f"cannot write {self.directory}: {error.strerror or error}",
                    remedy="set MUGRAPH_CACHE_DIR to a directory of yours",
                ) from error
        return len(new)

    def _write(self, key: str, row: Mapping[str, Any]) -> None:
        write_whole(self.directory / f"{key}.json", json.dumps(row, indent=1) + "\n")

    def _aside(self, path: Path, error: Exception) -> None:
        place = path.with_suffix(".damaged")
        warnings.warn(CacheWarning(f"{path.name} is no measurement: {error}; it is now {place.name}"), stacklevel=4)
        with suppress(OSError):
            path.replace(place)


def measurement(row: Any, device: str) -> Spread | Refused:
    """The measurement in a row.  Raises ValueError with what is wrong."""
    if not isinstance(row, dict) or row.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"it has not schema version {SCHEMA_VERSION}")
    key = row.get("key")
    if not isinstance(key, str) or len(key) != 64 or not set(key) <= set("0123456789abcdef"):
        raise ValueError("its key is no digest")
    if row.get("device") != device:
        raise ValueError(f"it is about {row.get('device')!r}")
    if not isinstance(row.get("program"), str) or not isinstance(row.get("sizes"), dict):
        raise ValueError("it does not say of what program")
    values = [row.get(name) for name in ("median", "low", "high")]
    if isinstance(row.get("refused"), str) and values == [None] * 3:
        return Refused(row["refused"])
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < float("inf") for v in values):
        raise ValueError(f"its times are {values}")
    return Spread(*map(float, values))  # type: ignore[arg-type]
