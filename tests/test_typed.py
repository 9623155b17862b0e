"""Arguments against their annotations: what is taken, what is converted, and what is refused with which words."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pytest

import mugraph as mg
from mugraph import pipeline
from mugraph.errors import GraphError, MugraphError, ParseError, SettingError, UnknownTargetError
from mugraph.ir.graph import Program
from mugraph.runtime import engine
from mugraph.runtime.cache import Cache
from mugraph.runtime.engine import Here
from mugraph.search.report import SearchReport
from mugraph.search.space import SearchSpace, space_from
from mugraph.typed import Limits, Positive, Probability, fit_arguments, fitted, words

Pairs = tuple[tuple[str, int], ...]


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (int, np.int64(3), 3),
        (float, 3, 3),
        (float, np.float32(0.5), 0.5),
        (Probability, 2.0**-40, 2.0**-40),
        (bool, False, False),
        (str | None, None, None),
        (tuple[int, ...], [1, 2], (1, 2)),
        (tuple[int, ...] | None, [], ()),
        (Pairs, {"b": 16}, (("b", 16),)),
        (Pairs, [["b", 16]], (("b", 16),)),
        (tuple[str, int], ["a", 1], ("a", 1)),
        (Literal["a", "b"], "b", "b"),
        (Mapping[str, int], {"a": 1}, {"a": 1}),
        (Annotated[int, Limits(least=0, most=2)], 2, 2),
        (Any, ..., ...),
    ],
)
def test_what_can_be_meant_is_taken(hint: Any, value: object, expected: object) -> None:
    found = fitted(hint, value, "x")
    assert found == expected
    assert type(found) in (type(expected), float)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "3"),
        (int, 3.0),
        (int, True),
        (int, None),
        (float, "0.5"),
        (float, float("nan")),
        (float, True),
        (Probability, 1),
        (Probability, 0),
        (Positive, 0),
        (bool, 1),
        (bool, "no"),
        (str | None, 3),
        (tuple[int, ...], 5),
        (tuple[int, ...], (1, "a")),
        (tuple[str, ...], "ab"),
        (tuple[str, ...], {"a": 1}),
        (Pairs, (16,)),
        (Pairs, (("b", 16, 3),)),
        (Pairs, {"b": 2.0}),
        (Literal["a", "b"], "c"),
        (Literal["a", "b"], ["a"]),
        (Literal[1], True),
        (Mapping[str, int], [("a", 1)]),
        (Callable[[str], None], "print"),
        (Annotated[int, Limits(least=0, most=2)], 3),
    ],
)
def test_what_cannot_be_meant_is_refused_in_words(hint: Any, value: object) -> None:
    with pytest.raises(SettingError) as error:
        fitted(hint, value, "this one")
    assert str(error.value.message).startswith(f"this one is {value!r}, not {words(hint)}")
    assert error.value.remedy == f"give {words(hint)}"


def test_long_values_are_shown_in_part() -> None:
    with pytest.raises(SettingError) as error:
        fitted(int, "a" * 1000, "x")
    assert len(error.value.message) < 120


# -- the space


@pytest.mark.parametrize(
    ("field", "bad", "good"),
    [
        ("states", "many", 10),
        ("states", None, 10),
        ("states", 1.5, 10),
        ("symbolic", 1.5, 8),
        ("passes", 1.5, 1),
        ("kernels", True, 0),
        ("split", "no", False),
        ("library", 0, False),
        ("sizes", 5, [1, 5]),
        ("sizes", ("a",), ()),
        ("sizes", (0,), (1,)),
        ("tiles", (16,), {"b": 16}),
        ("tiles", {"b": 48}, {"b": 64}),
        ("tiles", (("b", 2.0),), (("b", 2),)),
        ("laws", None, []),
        ("laws", "strip-max", ["strip-max"]),
        ("laws", [["strip-max"]], ("strip-max",)),
        ("grid", "b", ["b"]),
        ("inside", None, ["b"]),
        ("abstraction", 3, "off"),
    ],
)
def test_fields_of_the_space_have_their_types(field: str, bad: Any, good: Any) -> None:
    with pytest.raises(SettingError, match=rf"SearchSpace\.{field} is .*, not ") as error:
        SearchSpace(**{field: bad})
    assert repr(bad) in error.value.message
    assert error.value.remedy
    space = SearchSpace(**{field: good})
    assert hash(space) == hash(space_from(str(space)))
    assert space == SearchSpace().but(**{field: good})


def test_a_mapping_of_tiles_is_a_tuple_of_pairs() -> None:
    assert SearchSpace(tiles={"b": 16, "n": 32}) == SearchSpace(tiles=(("b", 16), ("n", 32)))  # type: ignore[arg-type]


# -- the front door


@pytest.fixture
def small(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A program whose result is in the cache already: nothing is taken unchecked from there."""
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    program = mg.trace(lambda x: x + 1, {"x": mg.f32[4]}, name="small")
    pipeline.optimize(program, target="torch", effort="none")
    monkeypatch.setenv("MUGRAPH_EFFORT", "none")
    assert pipeline.optimize(program, target="torch").cached
    return program


BAD = {
    "delta": ["x", 0, 1, float("nan"), None],
    "target": [5, "tpu"],
    "space": [3, "quick"],
    "effort": ["some", 3],
    "cache": ["x", False],
    "budget_seconds": ["x", float("nan"), -1],
    "seed": ["a", -1, 1.5],
    "engine": ["nope", 7, ""],
    "say": [3],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_arguments_are_checked_before_the_cache_is_read(name: str, value: Any, small: Program) -> None:
    for front in (mg.superoptimize, mg.optimize):
        with pytest.raises((SettingError, UnknownTargetError), match=name) as error:
            front(small, **{"target": "torch", name: value})
        assert repr(value) in error.value.message
        assert error.value.remedy


def test_arguments_that_can_be_meant_are_taken(small: Program, tmp_path: Any) -> None:
    for options in (
        {"delta": 2.0**-20, "seed": 3, "budget_seconds": 5},
        {"cache": Cache(tmp_path), "engine": "here"},
        {"engine": Here(), "space": SearchSpace(kernels=0)},
    ):
        assert mg.superoptimize(small, target="torch", **options)


def test_names_and_programs_are_checked(small: Program) -> None:
    with pytest.raises(SettingError, match="no argument 'budget'") as error:
        mg.superoptimize(small, budget=3)
    assert "budget_seconds" in str(error.value.remedy)
    with pytest.raises(SettingError, match="program is 5"):
        pipeline.optimize(5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="graph is 5"):
        pipeline.from_graph(small, 5, target="torch")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="both"):
        pipeline.optimize(small, effort="quick", space=SearchSpace())
    with pytest.raises(SettingError, match="no argument 'y'"):
        fit_arguments(fitted, {"y": 3})


def test_an_engine_that_is_not_installed_is_refused_from_the_cache_too(
    small: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    monkeypatch.setitem(engine.sys.modules, "ray", None)
    with pytest.raises(MugraphError, match="needs Ray"):
        pipeline.optimize(small, target="torch", engine="ray")


# -- effort none


def test_effort_none_searches_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import torch

    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    program = mg.trace(lambda x, w: mg.rms_norm(x) @ w, {"x": mg.f32[8, 64], "w": mg.f32[64, 32]}, name="p")
    for target in ("torch", "cuda:90"):
        none, quick = (pipeline.optimize(program, target=target, effort=e) for e in ("none", "quick"))
        assert isinstance(none.report, SearchReport)
        assert none.unchanged
        assert not none.graph.kernels()
        assert none.report.states == none.report.classes == 0
        assert any("nothing was searched" in n for n in none.notes)
        assert quick.graph.kernels()
        assert none.report.predicted_seconds == pytest.approx(quick.report.candidates[-1].seconds)  # type: ignore[union-attr]
    x, w = torch.randn(8, 64), torch.randn(64, 32)
    result = pipeline.optimize(program, target="torch", effort="none")
    torch.testing.assert_close(result(x, w), torch.nn.functional.rms_norm(x, (64,), eps=1e-6) @ w)
    assert "Give SearchSpace(kernels=" in str(result.why_not(quick.graph))


def test_an_axis_has_one_tile() -> None:
    assert SearchSpace(tiles=(("n", 64), ("m", 32))).tiles == (("n", 64), ("m", 32))
    with pytest.raises(SettingError, match="names n twice"):
        SearchSpace(tiles=(("n", 64), ("n", 32)))


@pytest.mark.parametrize("given", [3, "", None])
def test_what_is_no_graph_is_told_so(given: Any) -> None:
    result = pipeline.optimize(mg.trace(lambda x: x * 2, [mg.f32[4]], "double"), target="torch")
    with pytest.raises(ParseError, match="is no graph"):
        result.why_not(given)
    with pytest.raises(GraphError, match="is no μGraph"):
        result.report.why_not(given)
    with pytest.raises(ParseError, match="no report"):
        SearchReport.from_dict(given)
    assert result.why_not(result.graph)
