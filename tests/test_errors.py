"""Errors render on a few lines, serialise, and find the user's line."""

import inspect
import json
import pickle
import re
import types

import pytest

from mugraph import errors
from mugraph.errors import BudgetExceeded, Location, MugraphError, ShapeError, underline, user_location

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, MugraphError)]


def full(cls: type[MugraphError]) -> MugraphError:
    return cls("sizes differ", op="contract", where=Location("m.py", 12, "y = x @ w"), remedy="transpose w")


def test_an_error_prints_code_op_line_and_remedy():
    assert str(full(ShapeError)) == (
        "MG0004 ShapeError: sizes differ\n  op: contract\n  at: m.py:12: y = x @ w\n  try: transpose w"
    )


def test_what_is_not_known_is_not_printed():
    assert str(ShapeError("sizes differ")) == "MG0004 ShapeError: sizes differ"


def test_codes_are_well_formed_and_distinct():
    codes = [cls.code for cls in CLASSES]
    assert len(set(codes)) == len(codes) >= 15
    assert all(re.fullmatch(r"MG\d{4}", code) for code in codes)


def test_codes_are_stable():
    assert {cls.__name__: cls.code for cls in CLASSES} == {
        "MugraphError": "MG0001",
        "CaptureError": "MG0002",
        "UnsupportedOpError": "MG0003",
        "ShapeError": "MG0004",
        "ParseError": "MG0005",
        "GraphError": "MG0006",
        "VerificationError": "MG0007",
        "NoCandidateError": "MG0008",
        "BudgetExceeded": "MG0009",
        "CompileError": "MG0010",
        "LaunchError": "MG0011",
        "TargetMismatchError": "MG0012",
        "UnknownTargetError": "MG0013",
        "CacheError": "MG0014",
        "SettingError": "MG0015",
    }


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_survives_pickling(cls):
    error = full(cls)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is cls
    assert vars(copy) == vars(error)
    assert str(copy) == str(error)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_becomes_json(cls):
    assert json.loads(json.dumps(full(cls).to_dict())) == {
        "code": cls.code,
        "error": cls.__name__,
        "message": "sizes differ",
        "op": "contract",
        "where": "m.py:12: y = x @ w",
        "remedy": "transpose w",
    }


def test_budget_exceeded_carries_the_best_through_pickling():
    assert pickle.loads(pickle.dumps(BudgetExceeded("time is up", best=["kernel"]))).best == ["kernel"]


def test_user_location_is_the_calling_line():
    here = user_location()  # this line
    assert here.text == "here = user_location()  # this line"
    assert here.file.endswith("test_errors.py")


def test_user_location_skips_frames_of_the_package():
    code = compile("find()", errors._PACKAGE + "ir/made_up.py", "eval")
    inside = types.FunctionType(code, {"find": user_location})
    here = inside()  # not made_up.py
    assert here.text == "here = inside()  # not made_up.py"


def test_user_location_does_not_skip_a_neighbour_of_the_package():
    code = compile("find()", errors._PACKAGE.rstrip("/") + "_extras.py", "eval")
    assert types.FunctionType(code, {"find": user_location})().file.endswith("mugraph_extras.py")


def test_a_location_without_source_prints_its_place():
    assert str(Location("<stdin>", 3)) == "<stdin>:3"


def test_underline_marks_the_line_under_its_indentation():
    assert underline("a\n  b = exp a\nc", 2) == "a\n  b = exp a\n  ^^^^^^^^^\nc"


def test_underline_marks_an_empty_line():
    assert underline("a\n\nc", 2) == "a\n\n^\nc"


@pytest.mark.parametrize("line", [0, 4, -1])
def test_underline_refuses_a_line_outside_the_text(line):
    with pytest.raises(ValueError, match="outside a text of 3 lines"):
        underline("a\nb\nc", line)
