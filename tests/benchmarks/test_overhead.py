"""The overhead benchmark: its rows, and what it cannot time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.stub import Stub
from mugraph.errors import MugraphError

KEYS = {"case", "ours_us", "compile_us", "bare_us"}


def test_the_document_has_a_row_for_each_program(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--program", "gqa", "--rounds", "3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["benchmark"] == "overhead"
    found = {(row["case"], row["launches"]) for row in document["rows"]}
    assert found == {("gqa", 2), ("gqa, last blocks combine", 1)}
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("ours_us", "bare_us"))


def test_a_program_with_work_ahead_is_refused(stub: Stub) -> None:
    with pytest.raises(MugraphError, match="cannot be timed alone"):
        overhead.main(["--program", "constant_lora", "--rounds", "1"])


@pytest.mark.full
def test_decorated_functions_are_timed_with_nothing_to_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    assert overhead.main(["--decorated", "--rounds", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["reads"] for r in rows] == [0, 3, 9]
    assert all(math.isfinite(r[k]) for r in rows for k in ("ours_us", "compile_us"))
