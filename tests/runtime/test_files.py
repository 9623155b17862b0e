"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mugraph.runtime.files import write_whole


def test_texts_and_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    write_whole(tmp_path / "a" / "text", "µ\n")
    write_whole(tmp_path / "a" / "bytes", b"\x89\r\n")
    assert (tmp_path / "a" / "text").read_bytes() == "µ\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x89\r\n"


def test_what_cannot_be_written_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "\ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
