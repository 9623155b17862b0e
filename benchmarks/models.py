"""Models from `transformers` under `torch.compile(model, backend="mugraph")`: small, with random weights, in f32.

    python -m benchmarks.models [MODEL ...] [--rest eager] [--parts all]

Prints for each the share of the graph that is understood and that is taken over, the first call with an empty cache and
with a full one (both beside the first call of PyTorch's `aot_eager`, which is what tracing alone takes), and the time
of a call beside eager's, in turns.  All on the CPU.  Needs no network.
"""

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mugraph.runtime.bench import measure

VOCABULARY = 97
LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROUNDS = 31


@dataclass(frozen=True)
class Model:
    """A class of `transformers`, and the fields of its configuration.  `text` says that it takes token numbers."""

    name: str
    config: dict[str, Any]
    text: bool = True
    generates: bool = True

    def make(self, **changed: Any) -> torch.nn.Module:
        transformers = importlib.import_module("transformers")
        torch.manual_seed(0)
        model_class = getattr(transformers, self.name)
        found: torch.nn.Module = model_class(model_class.config_class(**self.config | changed)).eval()
        return found

    def inputs(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Arguments by name; a model of pictures has no length."""
        generator = torch.Generator().manual_seed(batch * 1000 + length)
        if not self.text:
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
        return {"input_ids": torch.randint(1, VOCABULARY, (batch, length), generator=generator)}


MODELS = {
    "llama": Model("LlamaForCausalLM", LLAMA),
    "qwen3": Model("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma": Model("GemmaForCausalLM", LLAMA | {"head_dim": 8}),
    "gpt2": Model(
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
        | {"bos_token_id": 0, "eos_token_id": 0},
    ),
    "bert": Model("BertModel", ENCODER | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}, generates=False),
    "vit": Model("ViTModel", ENCODER | {"image_size": 32, "patch_size": 8}, text=False, generates=False),
    "mixtral": Model("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": Model(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8, "time_step_rank": 4},
    ),
}


def logits(run: Callable[..., Any], inputs: dict[str, torch.Tensor], cached: bool = False) -> torch.Tensor:
    """What a model gives; `cached`: with keys and values kept, as models that generate do by themselves."""
    found = run(**inputs) if cached or "pixel_values" in inputs else run(**inputs, use_cache=False)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def first_call(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **how: Any) -> tuple[Callable[..., Any], float]:
    """A freshly compiled model, and the seconds of its first call."""
    torch._dynamo.reset()
    run = torch.compile(model, dynamic=True, **how)
    start = time.perf_counter()
    logits(run, inputs)
    return run, time.perf_counter() - start


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that PyTorch uses")
    parser.add_argument("--rest", default="inductor", choices=["inductor", "eager"])
    parser.add_argument("--parts", default="faster", choices=["faster", "all"])
    given = parser.parse_args(arguments)
    if unknown := [m for m in given.models if m not in MODELS]:
        parser.error(f"there is no model {unknown[0]}; known: {', '.join(MODELS)}")
    torch.set_num_threads(given.threads)
    from mugraph.pytorch.backend import reports

    names = ("model", "operators", "understood", "taken over", "tracing", "cold", "warm", "eager call", "our call")
    table = Table(*names)
    for name in given.models or MODELS:
        model = MODELS[name].make()
        inputs = MODELS[name].inputs(2, 16)
        _, tracing = first_call(model, inputs, backend="aot_eager")
        how = {"backend": "mugraph", "options": {"rest": given.rest, "parts": given.parts}}
        with tempfile.TemporaryDirectory() as kept:
            os.environ |= {"MUGRAPH_CACHE_DIR": f"{kept}/mugraph", "TORCHINDUCTOR_CACHE_DIR": f"{kept}/inductor"}
            before = len(reports())
            _, cold = first_call(model, inputs, **how)
            met = reports()[before:]
            run, warm = first_call(model, inputs, **how)
            assert torch.allclose(logits(run, inputs), logits(model, inputs), rtol=1e-3, atol=1e-4), name
            nodes = sum(r.nodes for r in met)
            understood, taken = (sum(getattr(r, what) for r in met) for what in ("understood", "taken"))
            shares = (f"{100 * x / max(nodes, 1):.0f} %" for x in (understood, taken))
            times = (f"{s:.1f} s" for s in (tracing, cold, warm))
            forms = {"eager": model, "ours": run}
            timings = measure({n: partial(logits, r, inputs) for n, r in forms.items()}, ROUNDS, device="cpu")
            calls = (f"{1e3 * timings.seconds(n).median:.2f} ms" for n in forms)
            table.add_row(name, str(nodes), *shares, *times, *calls)
    Console(width=118).print(table)


if __name__ == "__main__":
    import mugraph.pytorch.backend  # noqa: F401  (registers the backend where the package is not installed)

    main()
