"""A tuned result runs what was measured to be fastest, and says so wherever it is read from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from mugraph import pipeline
from mugraph.cli import main
from mugraph.cli.saved import recheck_saved
from mugraph.errors import FallbackWarning, VerificationError
from mugraph.result import AS_IT_STANDS, CALLS, COMPILED, FOUND
from mugraph.runtime.cache import Cache
from mugraph.runtime.choose import Candidate, Choice, Measured

N = 96


@mg.program
def chain(a: mg.f32[N, 4], b: mg.f32[4, N], c: mg.f32[N, 4]):
    return a @ b @ c


@mg.program
def column_sums(a: mg.f32[512, 512], b: mg.f32[512, 512]):
    return mg.sum(a @ b, 0)


@mg.program
def folded(x: mg.f32[N, N], w: mg.constant(mg.f32[N, 2 * N]), u: mg.constant(mg.f32[2 * N, 4])):
    return x @ w @ u


def inputs(program: mg.Program) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(i.tensor.shape, generator=generator) for i in program.inputs]


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Candidate]]:
    """Takes the candidate of that name without measuring; the list receives what there was."""

    def take(name: str) -> list[Candidate]:
        seen: list[Candidate] = []

        def choose(candidates: Sequence[Candidate], inputs: Sequence[Any], **_: Any) -> Choice:
            del inputs
            assert name in {c.name for c in candidates}
            seen.extend(candidates)
            rows = tuple(Measured(c.name, c.written, "chosen" if c.name == name else "slower") for c in candidates)
            return Choice(name, "a test", {}, rows)

        monkeypatch.setattr(pipeline, "choose", choose)
        return seen

    return take


def test_both_searches_and_the_program_as_it_stands_are_measured(offered: Any, tmp_path: Path) -> None:
    seen = offered(CALLS)
    result = mg.superoptimize(column_sums, target="torch", tune="measure", cache=Cache(tmp_path))
    names = [AS_IT_STANDS, FOUND, CALLS]
    assert [c.name for c in seen] == [n + form for n in names for form in ("", COMPILED)]
    assert [c.written for c in seen] == [True, True, False, False, False, False]
    for c in seen:
        if not c.name.endswith(COMPILED):
            assert c.correct is not None
            assert c.correct(c.run)
            assert not c.correct(lambda a, b: (a @ b).sum(1))
    assert result.choice is not None
    assert not result.unchanged
    assert "the calls found: chosen" in str(result)


@pytest.mark.parametrize(
    ("name", "program"),
    [
        (AS_IT_STANDS, folded),
        (AS_IT_STANDS + COMPILED, folded),
        (FOUND, column_sums),
        (FOUND + COMPILED, folded),
        (CALLS, column_sums),
        (CALLS + COMPILED, column_sums),
    ],
)
def test_a_choice_survives_the_cache_and_a_directory(
    name: str, program: mg.Program, offered: Any, tmp_path: Path
) -> None:
    offered(name)
    cache = Cache(tmp_path / "cache")
    made = mg.superoptimize(program, target="torch", tune="measure", cache=cache)
    again = mg.superoptimize(program, target="torch", tune="measure", cache=cache)
    assert again.cached
    made.save(tmp_path / "out")
    loaded = mg.load(tmp_path / "out")
    for result in (made, again, loaded):
        assert result.choice == made.choice
        assert result.source == made.source
        assert result.unchanged == name.startswith(AS_IT_STANDS)
        assert result.compiled == name.endswith(COMPILED) == ("torch.compile(calls" in result.source)
    assert recheck_saved(tmp_path / "out").result.choice == made.choice


def test_a_compiled_source_must_follow_from_the_graph_too(offered: Any, tmp_path: Path) -> None:
    offered(FOUND + COMPILED)
    mg.superoptimize(chain, target="torch", tune="measure", cache=Cache(tmp_path / "cache")).save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    choice = json.loads((tmp_path / "out" / "choice.json").read_text()) | {"chosen": FOUND}
    text = json.dumps(choice)
    (tmp_path / "out" / "choice.json").write_text(text)
    manifest["files"]["choice.json"] = pipeline._hash(text)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=r"kernel\.py|was not chosen"):
        recheck_saved(tmp_path / "out")


def test_a_tuned_result_is_kept_apart_from_one_that_is_not(offered: Any, tmp_path: Path) -> None:
    offered(CALLS)
    cache = Cache(tmp_path)
    assert mg.superoptimize(column_sums, target="torch", cache=cache).choice is None
    tuned = mg.superoptimize(column_sums, target="torch", tune="measure", cache=cache)
    assert not tuned.cached
    assert tuned.choice is not None
    assert mg.superoptimize(column_sums, target="torch", cache=cache).choice is None


def test_the_search_for_a_cpu_is_what_explains_its_calls(offered: Any, tmp_path: Path) -> None:
    offered(CALLS)
    made = mg.superoptimize(column_sums, target="torch", tune="measure", cache=Cache(tmp_path / "cache"))
    made.save(tmp_path / "out")
    for result in (made, mg.load(tmp_path / "out")):
        assert "CPU" in result.explain()


def test_what_goes_through_torch_compile_computes_the_same(tmp_path: Path, offered: Any) -> None:
    for program, name in ((column_sums, CALLS), (folded, FOUND)):
        offered(name + COMPILED)
        result = mg.superoptimize(program, target="torch", tune="measure", cache=Cache(tmp_path))
        given = inputs(program)
        reference = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
        expected = reference(*given)
        out = torch.full_like(expected, float("nan"))
        assert result(*given, out=out) is out
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result(*given), expected, rtol=1e-3, atol=1e-3)


def test_what_is_measured_decides(tmp_path: Path) -> None:
    """Measured in truth: whatever is taken is right, and the report has all rows."""
    result = mg.superoptimize(chain, target="torch", tune="measure", cache=Cache(tmp_path))
    given = inputs(chain)
    torch.testing.assert_close(result(*given), given[0] @ (given[1] @ given[2]), rtol=1e-3, atol=1e-3)
    assert result.choice is not None
    assert [r.verdict for r in result.choice.rows].count("chosen") == 1
    assert "measured on" in str(result)


def test_ctrl_c_while_measuring_leaves_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> Choice:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "choose", stopped)
    cache = Cache(tmp_path)
    result = mg.superoptimize(chain, target="torch", tune="measure", cache=cache)
    assert result.interrupted
    assert result.choice is None
    assert "interrupted before it was measured" in result.notes
    assert not cache.ls(), "only what another run would find again is kept"


def test_a_variance_that_is_multiplied_out_is_refused(offered: Any, tmp_path: Path) -> None:
    """Of equal elements it is zero, which squares less squared sums are not."""

    @mg.program
    def variance(x: mg.f32[256, 1000]):
        return mg.mean(mg.square(x - mg.mean(x, -1, True)), -1)

    seen = offered(AS_IT_STANDS)
    mg.superoptimize(variance, target="torch", tune="measure", cache=Cache(tmp_path))
    eager = [c for c in seen if not c.name.endswith(COMPILED)]
    assert [c.correct(c.run) for c in eager if c.correct] == [True] + [False] * (len(eager) - 1)
    assert len(eager) > 1


def test_the_command_line_tunes(
    offered: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "sums.py"
    file.write_text(
        "import mugraph as mg\n\n\n@mg.program\ndef sums(a: mg.f32[512, 512], b: mg.f32[512, 512]):\n"
        "    return mg.sum(a @ b, 0)\n"
    )
    offered(CALLS)
    assert main(["optimize", f"{file}:sums", "--target", "torch", "--tune", "measure", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["choice"]["chosen"] == CALLS
    assert data["beats_baseline"]
    offered(AS_IT_STANDS)
    monkeypatch.setenv("MUGRAPH_FORCE_SEARCH", "1")
    assert main(["optimize", f"{file}:sums", "--target", "torch", "--tune", "measure", "--json"]) == 3
    assert not json.loads(capsys.readouterr().out)["beats_baseline"]
    assert main(["optimize", f"{file}:sums", "--target", "torch", "--tune", "hard"]) == 2


# -- PyTorch functions


def test_a_function_is_measured_as_it_was_written(offered: Any, tmp_path: Path) -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b).sum(0)

    seen = offered(CALLS)
    fast = mg.superoptimize(f, target="torch", tune="measure", strict=True, cache=Cache(tmp_path))
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    torch.testing.assert_close(fast(a, b), f(a, b), rtol=1e-3, atol=1e-2)
    assert torch.equal(seen[0].run(a, b), f(a, b))
    assert [c.correct is None for c in seen] == [c.written for c in seen], "what is written is right by definition"
    assert not fast.result.unchanged


def test_the_original_runs_through_torch_compile_where_that_is_the_choice(
    offered: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[object] = []

    def fake(f: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return lambda *args: compiled.append(f) or f(*args)  # type: ignore[func-returns-value]

    monkeypatch.setattr(torch, "compile", fake)

    def f(a: torch.Tensor) -> torch.Tensor:
        return torch.exp(a) + 1

    offered(AS_IT_STANDS + COMPILED)
    fast = mg.superoptimize(f, target="torch", tune="measure", strict=True, cache=Cache(tmp_path))
    a = torch.randn(4, 4)
    for _ in range(3):
        torch.testing.assert_close(fast(a), f(a))
    assert compiled == [f, f, f]


def test_what_cannot_be_captured_still_gets_its_faster_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mugraph.runtime import choose as module

    chosen = {"eager": 0, "compiled": 0}
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args: chosen.update(compiled=1) or f(*args))

    def choose(candidates: Sequence[Candidate], inputs: Sequence[Any], **_: Any) -> Choice:
        del inputs
        assert [c.name for c in candidates] == ["eager", "compiled"]
        return Choice("compiled", "a test", {}, tuple(Measured(c.name, True, "") for c in candidates))

    monkeypatch.setattr(module, "choose", choose)
    fast = mg.superoptimize(torch.linalg.matrix_exp, target="torch", tune="measure", cache=Cache(tmp_path))
    with pytest.warns(FallbackWarning):
        fast(torch.eye(3))
    assert chosen["compiled"] == 1
