"""The benchmark of a first call: a second process finds everything in the cache."""

import json

import pytest

from benchmarks import start


@pytest.mark.full
def test_a_second_process_neither_searches_nor_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    assert start.main(["--hidden", "64", "--repeats", "1", "--json"]) == 0
    empty, full = json.loads(capsys.readouterr().out)["rows"]
    assert (empty["cache"], empty["cached"]) == ("empty", False)
    assert (full["cache"], full["cached"]) == ("full", True)
    for row in (empty, full):
        assert row["first_call_s"] == pytest.approx(row["export_s"] + row["mugraph_s"])
        assert min(row["export_s"], row["mugraph_s"]) > 0
