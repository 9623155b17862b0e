"""A candidate runs only where it was measured to be surely faster than the program as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from mugraph.errors import MugraphError
from mugraph.runtime import choose as module
from mugraph.runtime.bench import Timings
from mugraph.runtime.choose import Candidate, Choice, choose


def timed(monkeypatch: pytest.MonkeyPatch, times: Mapping[str, Callable[[int], float]]) -> None:
    """Candidates take these milliseconds in each round."""

    def measure(functions: Mapping[str, Any], repeats: int, **_: Any) -> Timings:
        return Timings({n: tuple(1e-3 * times[n](i) for i in range(repeats)) for n in functions})

    monkeypatch.setattr(module, "measure", measure)


def steady(milliseconds: float) -> Callable[[int], float]:
    return lambda _: milliseconds


def nothing(*_: Any) -> None:
    return None


WRITTEN = Candidate("as it stands", nothing, written=True)


def verdict(choice: Choice, name: str) -> str:
    return next(r.verdict for r in choice.rows if r.name == name)


def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(2.0), "ours": steady(1.0), "other": steady(1.5)})
    choice = choose([WRITTEN, Candidate("other", nothing), Candidate("ours", nothing)], [])
    assert choice.chosen == "ours"
    assert not choice.written
    assert next(r.ratio for r in choice.rows if r.name == "ours") == 2.0


def test_a_slower_candidate_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(1.0), "slow": steady(1.2), "hopeless": steady(50.0)})
    choice = choose([Candidate("slow", nothing), Candidate("hopeless", nothing), WRITTEN], [])
    assert choice.chosen == "as it stands"
    assert verdict(choice, "slow") == "slower"
    assert verdict(choice, "hopeless") == "slower by far"


def test_a_candidate_that_is_only_perhaps_faster_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its median is below, but in many rounds it is the slower one."""
    timed(monkeypatch, {"as it stands": steady(1.0), "perhaps": lambda i: 0.95 if i % 5 > 1 else 1.3})
    choice = choose([WRITTEN, Candidate("perhaps", nothing)], [])
    assert choice.chosen == "as it stands"
    assert "not surely" in verdict(choice, "perhaps")


def test_of_the_forms_of_the_program_as_it_stands_the_fastest_needs_no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(1.0), "compiled": steady(0.99), "ours": steady(0.995)})
    candidates = [WRITTEN, Candidate("compiled", nothing, written=True), Candidate("ours", nothing)]
    assert choose(candidates, []).chosen == "compiled"


def test_a_candidate_that_raises_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(2.0), "broken": steady(0.1)})

    def broken() -> None:
        raise RuntimeError("no compiler")

    choice = choose([WRITTEN, Candidate("broken", broken)], [])
    assert choice.chosen == "as it stands"
    assert verdict(choice, "broken") == "failed: RuntimeError: no compiler"


def test_a_candidate_with_wrong_results_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(2.0), "wrong": steady(0.1), "right": steady(1.0)})
    wrong = Candidate("wrong", nothing, correct=lambda _: False)
    right = Candidate("right", nothing, correct=lambda _: True)
    choice = choose([WRITTEN, wrong, right], [])
    assert choice.chosen == "right"
    assert verdict(choice, "wrong").startswith("wrong")


def test_a_form_of_the_program_as_it_stands_that_raises_gives_way_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(1.0)})

    def broken() -> None:
        raise RuntimeError

    compiled = Candidate("compiled", broken, written=True)
    assert choose([compiled, WRITTEN], []).chosen == "as it stands"
    with pytest.raises(MugraphError, match="does not run"):
        choose([compiled, Candidate("ours", nothing)], [])


def test_real_times_decide() -> None:
    import time

    choice = choose([WRITTEN, Candidate("sleeping", lambda: time.sleep(0.002))], [], rounds=6)
    assert choice.chosen == "as it stands"


def test_a_choice_survives_json(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {"as it stands": steady(2.0), "ours": steady(1.0)})
    choice = choose([WRITTEN, Candidate("ours", nothing)], [], sizes={"b": 16})
    assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice
    assert "b = 16" in str(choice)
    assert "2.00 [2.00, 2.00] times as fast: chosen" in str(choice)
    with pytest.raises(ValueError, match="was not chosen"):
        Choice.from_dict(choice.to_dict() | {"chosen": "another"})
