"""Timing in a process of its own, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mugraph.errors import CacheError, CacheWarning
from mugraph.runtime.bench import Spread
from mugraph.runtime.timing import DeviceTimer, Records, Refused
from tests import graphs

SOURCE = """import torch


def run(x, w1, w2, *, out=None):
    return torch.nn.functional.silu(x @ w1) * (x @ w2)
"""
KEY = "0" * 64


def records(path: Path, device: str = "cpu") -> Records:
    return Records(device, path / "tuning")


def timer(path: Path, limit: float = 60.0) -> DeviceTimer:
    return DeviceTimer(graphs.gated_mlp(k_size=32, n_size=32), {"B": 3}, "cpu", limit, records(path))


def test_a_file_is_timed_and_the_time_is_kept(tmp_path: Path):
    with timer(tmp_path) as clock:
        found = clock.seconds(SOURCE, 3)
        assert isinstance(found, Spread)
        assert 0 < found.low <= found.median <= found.high < 1
    with timer(tmp_path) as again:
        again._worker.ask = None  # nothing is asked
        assert again.seconds(SOURCE, 3) == found
        with pytest.raises(TypeError):
            again.seconds(SOURCE, 4)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("    while True: pass", "no answer within"),
        ("    raise torch.OutOfMemoryError('CUDA out of memory')", "out of memory"),
        ("    import os; os.abort()", "died"),
    ],
)
def test_what_hangs_fails_or_dies_is_refused_and_the_next_is_timed(tmp_path: Path, line: str, reason: str):
    with timer(tmp_path) as clock:
        clock._worker.ask("probe", {"device": "cpu"}, 60)  # imports torch
        clock.limit = 5
        bad = SOURCE.replace("    return", f"{line}\n    return")
        found = clock.seconds(bad, 1)
        assert isinstance(found, Refused)
        assert reason in found.reason
        assert not found.lost
        clock.limit = 60
        assert isinstance(clock.seconds(SOURCE, 1), Spread)
        assert clock.seconds(bad, 1) == found  # from the records
    assert len(list(records(tmp_path).rows())) == 2


def test_a_device_that_is_gone_is_told_from_a_bad_file_and_nothing_is_kept(tmp_path: Path):
    clock = DeviceTimer(graphs.gated_mlp(), {"B": 3}, "no such device", 60, records(tmp_path))
    with clock:
        found = clock.seconds(SOURCE, 1)
        clock._worker.ask = None  # nothing more is asked
        assert clock.seconds(SOURCE, 2) == found
    assert isinstance(found, Refused)
    assert found.lost
    assert list(records(tmp_path).rows()) == []


def test_measurements_are_shipped_and_merged(tmp_path: Path):
    here, there = records(tmp_path / "here"), records(tmp_path / "there")
    here.put(KEY, "p", {"B": 1}, SOURCE, Spread(2.0, 1.0, 3.0))
    there.put(KEY, "p", {"B": 1}, SOURCE, Spread(9.0, 9.0, 9.0))
    there.put("1" * 64, "p", {"B": 2}, SOURCE, Refused("it hangs"))
    assert here.merge(there.export()) == 1
    assert here.get(KEY) == Spread(2.0, 1.0, 3.0)  # what is here stays
    assert here.get("1" * 64) == Refused("it hangs")
    assert here.merge(there.export()) == 0


def damage(text: str) -> list[str]:
    data = json.loads(text)
    row = data["rows"][0]
    return [
        "",
        "[]",
        text[:-20],
        json.dumps(data | {"device": "another"}),
        json.dumps(data | {"schema_version": 99}),
        json.dumps(data | {"rows": [row, row | {"median": -1.0}]}),
        json.dumps(data | {"rows": [row | {"key": "../../escape"}]}),
        json.dumps(data | {"rows": [row | {"device": "another"}]}),
    ]


def test_a_damaged_document_is_refused_and_nothing_is_taken(tmp_path: Path):
    here, there = records(tmp_path / "here"), records(tmp_path / "there")
    there.put(KEY, "p", {}, SOURCE, Spread(2.0, 1.0, 3.0))
    for text in damage(there.export()):
        with pytest.raises(CacheError):
            here.merge(text)
    assert list(here.rows()) == []


def test_a_damaged_file_is_set_aside_with_a_warning_and_the_rest_stays(tmp_path: Path):
    here = records(tmp_path)
    here.put(KEY, "p", {}, SOURCE, Spread(2.0, 1.0, 3.0))
    here.put("1" * 64, "p", {}, SOURCE, Spread(2.0, 1.0, 3.0))
    path = here.directory / f"{KEY}.json"
    path.write_text(path.read_text()[:30])
    with pytest.warns(CacheWarning, match="is no measurement"):
        assert here.get(KEY) is None
    assert here.get(KEY) is None
    assert path.with_suffix(".damaged").is_file()
    assert len(list(here.rows())) == 1


def test_a_directory_that_cannot_be_written_costs_the_record_alone(tmp_path: Path):
    (tmp_path / "tuning").write_text("a file")
    with pytest.warns(CacheWarning, match="not kept"):
        records(tmp_path).put(KEY, "p", {}, SOURCE, Spread(2.0, 1.0, 3.0))
