"""The cache returns what was put, whole or not at all, whoever writes at the same time."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from mugraph.errors import CacheWarning
from mugraph.runtime import cache as module
from mugraph.runtime.cache import MANIFEST, SCHEMA_VERSION, Cache, key_of

FILES: dict[str, str | bytes] = {"kernel.py": "x = 1\n", "kernel.cubin": b"\x00\xff"}
META = {"name": "p", "sizes": [1, 2]}
KEY = key_of("program p", {"effort": "quick"}, "cuda:90", {"mugraph": "0.1"})


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "some" / "cache")


def test_what_was_put_is_found(cache: Cache) -> None:
    assert cache.get(KEY) is None
    written = cache.put(KEY, FILES, META)
    found = cache.get(KEY)
    assert found == written
    assert found is not None
    assert found.text("kernel.py") == "x = 1\n"
    assert found.files == {"kernel.py": b"x = 1\n", "kernel.cubin": b"\x00\xff"}
    assert found.meta == META
    assert found.size == 8
    assert (found.path / "kernel.py").read_text() == "x = 1\n"


def test_the_directory_is_a_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "set"))
    assert Cache().path == tmp_path / "set"


def test_entries_are_listed_and_cleared(cache: Cache) -> None:
    assert cache.ls() == []
    assert cache.clear() == 0
    keys = sorted(key_of(name, {}, "torch", {}) for name in "abc")
    for key in keys:
        cache.put(key, FILES, META)
    (cache.path / "README").write_text("the user's own")
    abandoned = cache.path / f".new-{KEY}-{'0' * 32}"
    abandoned.mkdir()
    assert [e.key for e in cache.ls()] == keys
    assert cache.clear() == 3
    assert cache.ls() == []
    assert [p.name for p in cache.path.iterdir()] == ["README"]


def test_a_second_put_replaces_the_first(cache: Cache) -> None:
    cache.put(KEY, FILES, META)
    cache.put(KEY, {"kernel.py": "x = 2\n"}, META)
    found = cache.get(KEY)
    assert found is not None
    assert found.files == {"kernel.py": b"x = 2\n"}
    assert sorted(p.name for p in found.path.iterdir()) == ["kernel.py", MANIFEST]
    assert [p.name for p in cache.path.iterdir()] == [KEY]


def edit(path: Path, **changes: object) -> None:
    (path / MANIFEST).write_text(json.dumps(json.loads((path / MANIFEST).read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file truncated": (lambda p: (p / "kernel.py").write_text("x ="), "kernel.py was changed or cut short"),
    "file edited": (lambda p: (p / "kernel.py").write_text("x = 7\n"), "kernel.py was changed or cut short"),
    "file missing": (lambda p: (p / "kernel.py").unlink(), "kernel.py is missing"),
    "manifest truncated": (
        lambda p: (p / MANIFEST).write_bytes((p / MANIFEST).read_bytes()[:-20]),
        "not JSON",
    ),
    "manifest empty": (lambda p: (p / MANIFEST).write_text(""), "not JSON"),
    "manifest binary": (lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "manifest a list": (lambda p: (p / MANIFEST).write_text("[]"), "not an object"),
    "manifest missing": (lambda p: (p / MANIFEST).unlink(), "manifest.json is missing"),
    "meta edited": (lambda p: edit(p, meta={"name": "q"}), "manifest.json was changed"),
    "files outside": (lambda p: edit(p, files={"../../secret": "0"}), "manifest.json was changed"),
    "other schema": (lambda p: edit(p, schema_version=SCHEMA_VERSION + 1), "schema version is 2, not 1"),
    "no schema": (lambda p: (p / MANIFEST).write_text("{}"), "schema version is None, not 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_ignored_with_a_warning_and_rewritten(name: str, cache: Cache) -> None:
    damage, reason = DAMAGE[name]
    cache.put(KEY, FILES, META)
    damage(cache.path / KEY)
    with pytest.warns(CacheWarning, match=reason):
        assert cache.get(KEY) is None
    assert cache.ls() == []
    written = cache.put(KEY, FILES, META)
    assert written is not None
    assert cache.get(KEY) == written


def test_an_entry_under_another_name_is_not_trusted(cache: Cache) -> None:
    other = key_of("program q", {}, "torch", {})
    cache.put(other, FILES, META)
    shutil.move(cache.path / other, cache.path / KEY)
    with pytest.warns(CacheWarning, match="was changed"):
        assert cache.get(KEY) is None


def test_a_file_in_the_place_of_an_entry_is_replaced(cache: Cache) -> None:
    cache.path.mkdir(parents=True)
    (cache.path / KEY).write_text("not an entry")
    assert cache.get(KEY) is None
    assert cache.put(KEY, FILES, META) is not None
    assert cache.get(KEY) is not None


def test_an_unusable_directory_gives_one_warning_and_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told", set())
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    assert cache.get(KEY) is None
    with pytest.warns(CacheWarning, match="cannot be written .*going on without a cache") as caught:
        assert cache.put(KEY, FILES, META) is None
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.put(KEY, FILES, META) is None
        assert cache.get(KEY) is None
        assert Cache(tmp_path / "file" / "cache").put(KEY, FILES, META) is None
        assert cache.ls() == []
        assert cache.clear() == 0


def test_a_full_disk_leaves_nothing_behind(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told", set())
    cache.put(KEY, FILES, META)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(CacheWarning, match="No space left on device"):
        assert cache.put(KEY, {"kernel.py": "x = 2"}, META) is None
    monkeypatch.undo()
    assert [p.name for p in cache.path.iterdir()] == [KEY]
    assert cache.get(KEY) is not None


def test_every_part_counts_in_the_key() -> None:
    parts: list[tuple[str, dict[str, object], str, dict[str, str]]] = [
        ("p", {"effort": "quick"}, "cuda:90", {"mugraph": "0.1"}),
        ("q", {"effort": "quick"}, "cuda:90", {"mugraph": "0.1"}),
        ("p", {"effort": "full"}, "cuda:90", {"mugraph": "0.1"}),
        ("p", {"effort": "quick"}, "cuda:80", {"mugraph": "0.1"}),
        ("p", {"effort": "quick"}, "cuda:90", {"mugraph": "0.2"}),
        ("p", {}, "cuda:90", {"effort": "quick", "mugraph": "0.1"}),
    ]
    assert len({key_of(*p) for p in parts}) == len(parts)


def test_the_order_of_settings_does_not_count_in_the_key() -> None:
    assert key_of("p", {"a": 1, "b": 2}, "torch", {}) == key_of("p", {"b": 2, "a": 1}, "torch", {})


@pytest.mark.parametrize("key", ["", "../x", "a" * 63, "A" * 64])
def test_a_wrong_key_is_refused(cache: Cache, key: str) -> None:
    with pytest.raises(ValueError, match="hexadecimal"):
        cache.get(key)


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc/x", MANIFEST])
def test_a_wrong_file_name_is_refused(cache: Cache, name: str) -> None:
    with pytest.raises(ValueError, match="plain name"):
        cache.put(KEY, {name: ""}, META)


WRITER = """
import sys, warnings
from mugraph.runtime.cache import Cache
warnings.simplefilter("error")
path, key, text = sys.argv[1:]
cache = Cache(path)
print("ready", flush=True)
sys.stdin.readline()
for i in range(150):
    assert cache.put(key, {"kernel.py": text * 1000, "turn": str(i)}, {"i": i}) is not None
    entry = cache.get(key)
    if entry is not None:
        assert entry.text("kernel.py") in ("a" * 1000, "b" * 1000)
        assert entry.text("turn") == str(entry.meta["i"])
"""


def test_two_processes_write_one_key_at_once(cache: Cache) -> None:
    """They write different contents over and over, and read what the other wrote: always a whole entry."""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(cache.path), KEY, text],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for text in "ab"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, problems = writer.communicate(timeout=60)
        assert writer.returncode == 0, problems
    assert cache.get(KEY) is not None
    assert [p.name for p in cache.path.iterdir()] == [KEY]
