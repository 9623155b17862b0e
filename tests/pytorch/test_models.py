"""Models from `transformers` with random weights under `torch.compile(model, backend="mugraph")`, in f32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.models import MODELS, logits, main
from mugraph.pytorch.backend import reports

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mugraph[dev]'")

ALL = {"rest": "eager", "parts": "all"}  # every part runs, whatever is gained
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}  # f32, sums of at most 64 products, two layers
# Of the operators of the graph, at least so many are taken over where every part is.
SHARES = {
    "llama": 0.7, "qwen3": 0.7, "gemma": 0.7, "gpt2": 0.65, "bert": 0.75, "vit": 0.75, "mixtral": 0.6, "mamba": 0.2,
}  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("fresh_backend"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def share() -> float:
    return sum(r.taken for r in reports()) / sum(r.nodes for r in reports())


@torch.no_grad()
def test_one_layer_of_llama_agrees_with_eager_at_all_sizes_and_most_of_it_is_taken_over() -> None:
    model = MODELS["llama"].make(num_hidden_layers=1)
    fast = torch.compile(model, backend="mugraph", dynamic=True, options=ALL)
    for batch, length in ((2, 7), (3, 11), (5, 2)):
        inputs = MODELS["llama"].inputs(batch, length)
        torch.testing.assert_close(logits(fast, inputs), logits(model, inputs), **TOLERANCE)
    assert len(reports()) == 1
    assert share() > 0.6


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_agrees_with_eager_and_is_not_searched_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS[name].make()
    for _ in range(2):
        torch._dynamo.reset()
        fast = torch.compile(model, backend="mugraph", dynamic=True, options=ALL)
        for batch, length in ((2, 7), (3, 11)):
            inputs = MODELS[name].inputs(batch, length)
            torch.testing.assert_close(logits(fast, inputs), logits(model, inputs), **TOLERANCE)
        monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    assert share() >= SHARES[name]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_agrees_with_eager_under_autocast(name: str, dtype: torch.dtype) -> None:
    """Eager rounds where a part does not, so both are compared with f32: the part may be off by a little more."""
    model = MODELS[name].make()
    fast = torch.compile(model, backend="mugraph", dynamic=True, options=ALL)
    for batch, length in ((2, 7), (3, 11)):
        inputs = MODELS[name].inputs(batch, length)
        exact = logits(model, inputs)
        with torch.autocast("cpu", dtype):
            found, eager = logits(fast, inputs).float(), logits(model, inputs).float()
        assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max() + 1e-3 * exact.abs().max()
    assert share() > 0


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, m in MODELS.items() if m.generates])
@torch.no_grad()
def test_generated_tokens_are_those_of_eager(name: str) -> None:
    model = MODELS[name].make()
    inputs = MODELS[name].inputs(2, 5)
    wanted = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model.forward = torch.compile(model.forward, backend="mugraph", dynamic=True, options=ALL)
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(found, wanted)
    assert share() > 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "bert"])
@torch.no_grad()
def test_with_its_defaults_a_model_agrees_with_eager(name: str) -> None:
    model = MODELS[name].make()
    fast = torch.compile(model, backend="mugraph", dynamic=True)
    for batch, length in ((2, 7), (3, 11)):
        inputs = MODELS[name].inputs(batch, length)
        torch.testing.assert_close(logits(fast, inputs), logits(model, inputs), **TOLERANCE)
    assert {r.rest for r in reports()} == {"Inductor"}


@pytest.mark.full
def test_gradients_of_a_model_are_those_of_eager() -> None:
    model = MODELS["llama"].make(num_hidden_layers=1)
    inputs = MODELS["llama"].inputs(2, 7)
    fast = torch.compile(model, backend="mugraph", options=ALL)
    weights = list(model.parameters())
    mine, theirs = (torch.autograd.grad(logits(m, inputs).square().mean(), weights) for m in (fast, model))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    assert {r.kind for r in reports() if r.taken} == {"forward", "backward"}


@pytest.mark.full
def test_the_benchmark_prints_a_row_for_each_model(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # put back afterwards
    main(["vit", "--rest", "eager"])
    assert "vit" in capsys.readouterr().out


def test_an_unknown_model_is_refused_and_the_known_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lama"])
    assert "known: llama, qwen3" in capsys.readouterr().err
