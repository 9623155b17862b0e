"""The fuzzer goes on after a failure, shows it as a small program, and can be interrupted."""

import json

import pytest

from benchmarks import fuzz
from mugraph import pipeline
from mugraph.errors import UnsupportedOpError
from mugraph.ir.graph import Program

SHORT = ["--minutes", "0", "--lines", "2", "--seed", "5"]


def test_one_program_at_least_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(SHORT) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 programs from seed 5 on torch: 0 failed, ")
    assert err == ""


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main([*SHORT, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["benchmark"] == "fuzz"
    (row,) = document["rows"]
    assert (row["seed"], row["programs"], row["failed"], row["target"]) == (5, 1, [], "torch")


def test_wrong_code_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.emit
    monkeypatch.setattr(pipeline, "emit", lambda *a: real(*a).replace(".exp()", ".sin()"))
    monkeypatch.setattr(fuzz, "random_recipe", lambda seed, lines: EXP if seed == 6 else SQUARE)
    told: list[str] = []
    row = fuzz.fuzzed(1.0, fuzz.parse_target("torch"), 5, 2, told.append)
    assert row["programs"] > 1
    assert [f["seed"] for f in row["failed"]] == [6]
    assert len(told) == 1
    small, large = row["failed"][0]["failure"].split("\n\nfrom\n\n")
    assert small.count("\n    v") == 1 < large.count("\n    v")
    assert "mg.exp(x0)" in small


EXP = fuzz.Recipe((("x0", "f32", (40,)),), (("v0", "mg.exp(x0)"), ("v1", "mg.square(v0)")), ("v0", "v1"))
SQUARE = fuzz.Recipe((("x0", "f32", (40,)),), (("v0", "mg.square(x0)"),), ("v0",))


def test_an_interrupt_prints_what_was_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(target: object, program: Program) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "searched_and_run", interrupted)
    assert fuzz.main(SHORT) == 0
    out, err = capsys.readouterr()
    assert out.startswith("0 programs from seed 5 on torch: 0 failed")
    assert "interrupted" in err


def test_what_has_no_form_is_searched_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(target: object, program: Program) -> None:
        raise UnsupportedOpError("no form")

    tried: list[Program] = []
    monkeypatch.setattr(fuzz, "runs_as", refused)
    monkeypatch.setattr(fuzz, "checked", tried.append)
    program = SQUARE.program()
    fuzz.searched_and_run(fuzz.parse_target("cuda:90"), program)
    assert tried == [program]


@pytest.mark.parametrize("wrong", [["--minutes", "-1"], ["--minutes", "nan"], ["--lines", "0"], ["--target", "tpu"]])
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fuzz.main(wrong)
    assert capsys.readouterr().out == ""
