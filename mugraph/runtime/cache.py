"""Results on disk, found by what they are results of.

An entry is a directory named by its key.  It holds the result's files and `manifest.json`:

    {"schema_version": 1, "key": ..., "files": {name: sha256}, "meta": {...}, "sha256": of all of the above}

It is written to a temporary directory beside it and renamed, so a reader sees a whole entry or none, and several
processes may write the same key at once.  What a reader cannot trust (truncated, edited, another schema version) it
ignores with a CacheWarning, and the next `put` replaces it.  A cache directory that cannot be used gives one
CacheWarning, and everything works without a cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mugraph import settings
from mugraph.errors import CacheWarning

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_KEY = re.compile(r"[0-9a-f]{64}")
_DRAFT = re.compile(r"\.(new|old)-[0-9a-f]{64}-[0-9a-f]{32}")
_ATTEMPTS = 20

_told: set[str] = set()


@dataclass(frozen=True)
class Entry:
    """A result: its key, the directory that holds it, its files by name, and what the writer said about it."""

    key: str
    path: Path
    files: Mapping[str, bytes] = field(repr=False)
    meta: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A file as text.  Raises KeyError if the entry has no such file."""
        return self.files[name].decode()

    @property
    def size(self) -> int:
        """Bytes in the entry's files."""
        return sum(map(len, self.files.values()))


class Cache:
    """A content-addressed store in a directory, which is made when first written to.

    >>> import tempfile
    >>> cache = Cache(tempfile.mkdtemp())
    >>> key = key_of("program p ...", {"effort": "quick"}, "cuda:90", {"mugraph": "0.1"})
    >>> entry = cache.put(key, {"kernel.py": "x = 1"}, {"name": "p"})
    >>> cache.get(key).text("kernel.py")
    'x = 1'
    """

    def __init__(self, path: Path | str | None = None) -> None:
        """`path`, else the setting `cache_dir`."""
        self.path = Path(path).expanduser() if path is not None else settings.cache_dir.get()

    def get(self, key: str) -> Entry | None:
        """The entry of that key, or None.  An entry that cannot be trusted is ignored with a CacheWarning."""
        return self._read(_checked_key(key), warn=True)

    def put(self, key: str, files: Mapping[str, str | bytes], meta: Mapping[str, Any] | None = None) -> Entry | None:
        """Writes the entry, in place of another one of that key.  None, after a CacheWarning, if it cannot be written.

        Raises ValueError for a key that is not from `key_of` and for a file name that is not a plain name.
        """
        place = self.path / _checked_key(key)
        contents = {_checked_name(n): c.encode() if isinstance(c, str) else bytes(c) for n, c in files.items()}
        manifest = _manifest(key, contents, dict(meta or {}))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            draft = self._beside("new", key)
            try:
                draft.mkdir()
                for name, content in contents.items():
                    (draft / name).write_bytes(content)
                (draft / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
                self._publish(draft, place, key)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            self._unusable("written", error)
            return None
        return Entry(key, place, contents, manifest["meta"])

    def ls(self) -> list[Entry]:
        """All entries that can be trusted, by key."""
        found = (self._read(key, warn=False) for key in self._keys())
        return [e for e in found if e is not None]

    @property
    def jobs(self) -> Cache:
        """The results of jobs (`runtime.engine`), which go with the others."""
        return Cache(self.path / "jobs")

    @property
    def binaries(self) -> Cache:
        """Compiled kernels (`runtime.aot`)."""
        return Cache(self.path / "binaries")

    def clear(self) -> int:
        """Removes all entries, broken ones and abandoned drafts included; how many.  Other files are left alone."""
        count = 0
        for part in (self.jobs, self.binaries):
            if part.path.is_dir():
                part.clear()
        for path in self._children():
            if _KEY.fullmatch(path.name) or _DRAFT.fullmatch(path.name):
                count += bool(_KEY.fullmatch(path.name))
                shutil.rmtree(path, ignore_errors=True)
        return count

    # -- inside ------------------------------------------------------------------------------------------------------

    def _read(self, key: str, *, warn: bool) -> Entry | None:
        place = self.path / key
        problem = "it changes all the time"
        try:
            for _ in range(_ATTEMPTS):
                before = _identity(place)
                if before is None:
                    return None
                try:
                    return _entry(key, place)
                except FileNotFoundError as error:
                    problem = f"{Path(error.filename).name} is missing"
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    problem = str(error)
                if _identity(place) == before:
                    break  # else another process replaced the entry while it was read
        except OSError as error:
            self._unusable("read", error)
            return None
        if warn:
            warnings.warn(f"the cache entry {place} is ignored: {problem}", CacheWarning, stacklevel=3)
        return None

    def _publish(self, draft: Path, place: Path, key: str) -> None:
        """Renames the draft to its place.  A directory there is moved away first, unless it is the same entry."""
        for _ in range(_ATTEMPTS):
            try:
                draft.rename(place)
                return
            except OSError:
                if not place.exists():
                    if draft.exists() and not self.path.is_dir():
                        raise
                    continue  # another process moved it away between the two steps
            if place.is_dir() and _same(place, draft) and self._read(key, warn=False):
                return
            old = self._beside("old", key)
            try:
                place.rename(old)
            except FileNotFoundError:
                continue
            _remove(old)
        raise OSError(f"{place} cannot be replaced")

    def _beside(self, word: str, key: str) -> Path:
        return self.path / f".{word}-{key}-{uuid.uuid4().hex}"

    def _children(self) -> list[Path]:
        try:
            return sorted(self.path.iterdir())
        except OSError:
            return []

    def _keys(self) -> Iterator[str]:
        return (p.name for p in self._children() if _KEY.fullmatch(p.name))

    def _unusable(self, verb: str, error: OSError) -> None:
        """One warning for each directory and process."""
        if str(self.path) not in _told:
            _told.add(str(self.path))
            reason = error.strerror or str(error)
            message = f"the cache directory {self.path} cannot be {verb} ({reason}); going on without a cache"
            warnings.warn(f"{message}; set MUGRAPH_CACHE_DIR to a directory of yours", CacheWarning, stacklevel=3)


def key_of(program: str, options: Mapping[str, Any], target: str, versions: Mapping[str, str]) -> str:
    """64 hexadecimal digits that name the result of compiling this program.

    `program` is its canonical text (`mugraph.ir.printer.canonical_text`), `options` the settings that change the
    result, `target` what it is compiled for, `versions` those of mugraph and of every tool that has a part in it.
    """
    parts = [SCHEMA_VERSION, program, dict(options), target, dict(versions)]
    return _digest(_canonical(parts))


def _manifest(key: str, contents: Mapping[str, bytes], meta: dict[str, Any]) -> dict[str, Any]:
    # the round trip through JSON makes what is returned now equal to what is read later
    body = {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "files": {name: _digest(content) for name, content in contents.items()},
        "meta": json.loads(json.dumps(meta)),
    }
    return {**body, "sha256": _digest(_canonical(body))}


def _trusted(text: bytes, key: str) -> dict[str, Any]:
    """The manifest.  Raises ValueError if it is damaged, of another schema version or another key."""
    try:
        manifest = json.loads(text)
    except ValueError:
        raise ValueError(f"{MANIFEST} is not JSON; it was cut short or edited") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} is not an object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {manifest.get('schema_version')}, not {SCHEMA_VERSION}")
    body = {name: manifest.get(name) for name in ("schema_version", "key", "files", "meta")}
    if manifest.get("sha256") != _digest(_canonical(body)) or body["key"] != key:
        raise ValueError(f"{MANIFEST} was changed")
    return manifest


def _entry(key: str, place: Path) -> Entry:
    """Reads and checks an entry.  Raises FileNotFoundError, or ValueError that says what is wrong with it."""
    manifest = _trusted((place / MANIFEST).read_bytes(), key)
    files = {name: (place / name).read_bytes() for name in manifest["files"]}
    for name, content in files.items():
        if _digest(content) != manifest["files"][name]:
            raise ValueError(f"{name} was changed or cut short")
    return Entry(key, place, files, manifest["meta"])


def _identity(place: Path) -> tuple[int, int] | None:
    """Differs between a directory and the one that replaces it; None where there is no directory."""
    try:
        status = place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (status.st_ino, status.st_mtime_ns) if stat.S_ISDIR(status.st_mode) else None


def _same(a: Path, b: Path) -> bool:
    try:
        return (a / MANIFEST).read_bytes() == (b / MANIFEST).read_bytes()
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _checked_key(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"a key is 64 hexadecimal digits, not {key!r}")
    return key


def _checked_name(name: str) -> str:
    if name in ("", ".", "..", MANIFEST) or os.path.basename(name) != name or "\\" in name or "\0" in name:
        raise ValueError(f"a file of a cache entry has a plain name other than {MANIFEST}, not {name!r}")
    return name
