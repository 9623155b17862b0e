"""Runs under budgets of counts are the same to the byte; runs that a clock or Ctrl-C cuts say that they are not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mugraph as mg
from mugraph.search.driver import search
from mugraph.search.report import SearchReport
from mugraph.search.space import SearchSpace
from tests.search import programs
from tests.search.recipes import random_recipe
from tests.search.test_random import QUICK

ROOT = Path(__file__).parent.parent.parent
SEEDS = range(6)
# Each runs out of something: of nothing, of nodes, of entries, of states.
SPACES = (QUICK, QUICK.but(nodes=20), QUICK.but(entries=200), QUICK.but(states=3), QUICK.but(nodes=60, candidates=200))


def without_times(report: SearchReport) -> dict[str, Any]:
    data = report.to_dict()
    del data["seconds"]
    return data


def everything() -> str:
    """Reports and μGraphs of searches that stop for every reason that is no clock."""
    found: list[object] = []
    for space in SPACES:
        for program in [random_recipe(s, lines=6).program() for s in SEEDS] + [programs.SMALL["lora"]()]:
            result = search(program, accept=lambda graph: graph, space=space)
            assert result.report.stop.reproducible
            found.append([str(result.graph), without_times(result.report)])
    return json.dumps(found, indent=1, default=str)


def in_another_process(hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    code = "from tests.search.test_reproducible import everything; print(everything())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_runs_in_other_processes_are_the_same_to_the_byte() -> None:
    one, other = everything(), in_another_process("4711")
    assert one + "\n" == other
    kinds = {row[1]["stop"].split("(")[0] for row in json.loads(one)}
    assert {"Saturated", "NodeLimit", "EntryLimit", "StateLimit"} <= kinds


def test_names_of_inputs_are_in_no_report() -> None:
    def one(x, w, g):  # type: ignore[no-untyped-def]
        return mg.rms_norm(x, g) @ w

    def other(zebra, apple, middle):  # type: ignore[no-untyped-def]
        return mg.rms_norm(zebra, middle) @ apple

    specs = [mg.f16[mg.Dim("B", 1, 64), 256], mg.f16[256, 64], mg.f16[256]]
    found = [search(mg.trace(f, specs, "p"), accept=lambda g: g, space=QUICK).report for f in (one, other)]
    assert without_times(found[0]) == without_times(found[1])
    third = search(mg.trace(lambda x, w, g: mg.rms_norm(x) @ w * g[0], specs, "p"), accept=lambda g: g, space=QUICK)
    assert without_times(third.report) != without_times(found[0])


@pytest.mark.parametrize(
    ("options", "stop"),
    [({"budget_seconds": 1e-9}, "TimeLimit(1e-09)"), ({"interrupted": lambda: True}, "Interrupted")],
)
def test_a_run_that_is_cut_by_time_says_that_it_is_not_reproducible(options: dict[str, Any], stop: str) -> None:
    report = search(programs.lora(), accept=lambda graph: graph, **options).report
    assert not report.stop.reproducible
    assert report.to_dict()["reproducible"] is False
    assert f"{stop} (not reproducible)" in str(report).splitlines()[0]


def test_a_run_that_is_cut_by_a_count_does_not() -> None:
    for space in (SearchSpace(), SearchSpace(nodes=8)):
        report = search(programs.SMALL["lora"](), accept=lambda graph: graph, space=space).report
        assert report.to_dict()["reproducible"] is True
        assert "not reproducible" not in str(report)
