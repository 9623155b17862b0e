"""The search benchmark prints one document with the keys that tools rely on."""

from __future__ import annotations

import json

import pytest

from benchmarks import search
from benchmarks.programs import CLASSIC, PROGRAMS
from mugraph.ir.check import check
from tests import graphs

KEYS = {
    "program", "abstraction", "seconds_median", "seconds_min", "seconds_max", "states", "classes", "derivations",
    "pruned", "deduplicated", "structures", "kernels", "launches", "peak_mb", "stop_reason", "seconds_to_first",
    "verify_seconds",
}  # fmt: skip


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--program", "softmax", "--repeats", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"benchmark", "schema_version", "environment", "rows"}
    assert (document["benchmark"], document["schema_version"]) == ("search", 1)
    assert document["environment"]["cpu_count"] >= 1
    (row,) = document["rows"]
    assert set(row) == KEYS
    assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    assert (row["program"], row["kernels"], row["launches"], row["stop_reason"]) == ("softmax", 1, 1, "Saturated")
    assert row["seconds_to_first"] is None


def test_without_json_it_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--program", "rmsnorm", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "rmsnorm" in out
    assert "stop_reason" in out
    assert err == "rmsnorm ...\n"


def test_the_ablation_has_a_row_for_each_abstraction(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--ablation", "--program", "gated_mlp", "--limit", "600", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["abstraction"] for r in rows] == ["closure", "size", "off"]
    assert all(KEYS - {"verify_seconds"} <= set(r) and r["met"] <= r["wanted"] for r in rows)
    closure, size, off = rows
    assert closure["to_outputs"] <= closure["to_plan"] < size["to_plan"] <= 600
    assert (closure["stop_reason"], off["stop_reason"]) == ("Found", "NodeLimit")
    assert off["to_outputs"] is None
    assert off["pruned"] == 0 < closure["pruned"]


def test_the_ablation_without_json_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--ablation", "--program", "softmax", "--limit", "100"]) == 0
    assert "to_plan" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--program", "nothing"], ["--repeats", "0"], ["--ablation", "--limit", "0"]])
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        search.main(wrong)
    assert capsys.readouterr().out == ""


def test_the_combine_of_a_split_is_a_launch() -> None:
    assert search.launches(graphs.attention_fused(parts=4)) == 2
    assert search.launches(graphs.attention_fused()) == 1


def test_the_programs_are_sound_and_have_a_symbolic_size() -> None:
    assert set(CLASSIC) <= set(PROGRAMS)
    for program in PROGRAMS.values():
        check(program)
        assert [d.name for d in program.dims()] == ["B"]
