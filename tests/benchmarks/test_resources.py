"""The resources of chosen kernels, compiled without a GPU."""

from __future__ import annotations

import json

import pytest

import benchmarks.resources
from benchmarks.environment import Row
from benchmarks.programs import PROGRAMS
from benchmarks.resources import COLUMNS, in_dtype, main, resources_of
from mugraph.errors import CompileError
from mugraph.ir.types import DType
from mugraph.runtime.cache import Cache
from mugraph.runtime.compile import Compiler, Resources


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_a_program_in_another_type_has_no_f16_left(dtype: str):
    found = in_dtype(PROGRAMS["lora"], dtype)
    assert {t.dtype for t in found.tensors().values()} == {DType(dtype)}


def test_there_is_a_row_for_each_architecture_and_it_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks.resources, "Cache", lambda: Cache(tmp_path))
    given = ["--program", "rmsnorm", "--dtype", "f16", "--arch", "80", "90", "--json"]
    assert main(given) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["benchmark"] == "resources"
    assert [(r["arch"], r["dtype"], r["ok"]) for r in first["rows"]] == [(80, "f16", True), (90, "f16", True)]
    assert set(first["rows"][0]) == set(COLUMNS)
    monkeypatch.setattr(benchmarks.resources, "measure", None)
    assert main(given) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == first["rows"]


class Answers(Compiler):
    """Gives a fixed answer instead of compiling."""

    def __init__(self, answer: Resources | CompileError):
        super().__init__()
        self.answer = answer

    def resources(self, source, arch, options=None, only=None):
        if isinstance(self.answer, CompileError):
            raise self.answer
        return [self.answer]


FINE = {"registers": 64, "shared_bytes": 1024, "stack_bytes": 0, "spills": 0, "spills_outside": 0, "wide_loads": 1,
        "narrow_loads": 0, "matrix_ops": 0}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "ok"),
    [({}, True), ({"spills_outside": 2}, True), ({"spills": 1}, False), ({"shared_bytes": 240_000}, False)],
)
def test_spills_in_loops_and_too_much_shared_memory_are_not_ok(change: dict[str, int], ok: bool):
    row: Row = resources_of(PROGRAMS["rmsnorm"], 90, "fit", Answers(Resources("k", 90, **FINE | change)))
    assert row["ok"] is ok


def test_what_does_not_compile_says_why():
    row = resources_of(PROGRAMS["rmsnorm"], 90, "fit", Answers(CompileError("ptxas refuses")))
    assert (row["ok"], row["error"]) == (False, "ptxas refuses")
