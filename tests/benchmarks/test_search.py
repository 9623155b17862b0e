"""The search benchmark prints one document with the keys that tools rely on."""

from __future__ import annotations

import json

import pytest

from benchmarks import search
from benchmarks.programs import CLASSIC, FAMILIES, PROGRAMS, B, Family
from mugraph.ir.check import check
from tests import graphs

KEYS = {
    "program", "abstraction", "seconds_median", "seconds_min", "seconds_max", "states", "classes", "derivations",
    "pruned", "deduplicated", "structures", "kernels", "launches", "peak_mb", "stop_reason", "seconds_to_first",
    }  # fmt: skip
MORE = {"variants", "verify_seconds", "pace_ms"}


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--program", "logsumexp", "--repeats", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"benchmark", "schema_version", "environment", "rows"}
    assert (document["benchmark"], document["schema_version"]) == ("search", 1)
    assert document["environment"]["cpu_count"] >= 1
    (row,) = document["rows"]
    assert set(row) == KEYS | MORE
    assert 0 < row["seconds_min"] <= row["seconds_median"] <= row["seconds_max"]
    assert (row["program"], row["variants"], row["stop_reason"]) == ("logsumexp", 7, "Saturated")
    assert 1 == row["kernels"] <= row["launches"] <= 2
    assert 0 < row["seconds_to_first"] < row["seconds_max"]
    assert 20 < row["peak_mb"] < 500
    assert row["pace_ms"] > 0


def test_without_json_it_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--program", "split_k", "--repeats", "1"]) == 0
    out, err = capsys.readouterr()
    assert "split_k" in out
    assert "stop_reason" in out
    assert "together: " in out
    assert err == "split_k ...\n"


def test_the_ablation_has_a_row_for_each_abstraction(capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(["--ablation", "--program", "gated_mlp", "--limit", "600", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["abstraction"] for r in rows] == ["closure", "size", "off"]
    assert all(set(r) >= KEYS and r["met"] <= r["wanted"] for r in rows)
    closure, size, off = rows
    assert closure["to_outputs"] <= closure["to_plan"] < size["to_plan"] <= 600
    assert (closure["stop_reason"], off["stop_reason"]) == ("Found", "NodeLimit")
    assert off["to_outputs"] is None
    assert off["pruned"] == 0 < closure["pruned"]


QUICK = ("softmax", "gqa", "rmsnorm_gated_mlp")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
def test_there_is_an_ablation_of_each_program(name: str) -> None:
    rows = search.ablation(PROGRAMS[name], limit=1, repeats=1)
    assert [r["met"] <= r["wanted"] for r in rows] == [True] * 3


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


def test_the_peak_is_of_the_process_alone() -> None:
    held = bytearray(200_000_000)
    assert search.peak_bytes() > len(held)
    assert search.peak_mb("split_k") * 1e6 < len(held)


def test_the_programs_are_sound() -> None:
    assert set(CLASSIC) <= set(PROGRAMS) == set(FAMILIES)
    for name, family in FAMILIES.items():
        assert PROGRAMS[name] in family.variants.values()
        for program in family.variants.values():
            check(program)
            assert program.dims() in ((B,), ())
        assert any(p.dims() for p in family.variants.values()) or family.rows == (16,)


@pytest.mark.parametrize(("rows", "first"), [((1, 64, 1024), 1), ((1, 8, 16), 16), ((16,), 16)])
def test_the_rows_of_a_family_are_the_sizes_of_its_space(rows: tuple[int, ...], first: int) -> None:
    space = Family({}, rows).space()
    assert (space.symbolic, {space.symbolic, *space.sizes}) == (first, set(rows))
