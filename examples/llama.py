"""A language model through `torch.compile(model, backend="mugraph")`: it writes the same tokens as without.

The model is a small Llama with random weights, so that nothing is downloaded.  Batch and length are symbolic: one
compiled graph serves all of them.  Needs `transformers`.

Run it with `python -m examples.llama`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mugraph.pytorch.backend import reports

CONFIG = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128,
}  # fmt: skip


@torch.no_grad()
def generated(run: Callable[..., Any], prompt: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """The prompt i64 [batch, length] with `count` more tokens, each the likeliest one, and the tokens in a second."""
    tokens, start = prompt, time.perf_counter()
    for _ in range(count):
        last = run(input_ids=tokens, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], dim=1)
    return tokens, prompt.shape[0] * count / (time.perf_counter() - start)


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.llama")
    parser.add_argument("--tokens", type=int, default=32, help="how many are generated")
    parser.add_argument("--rest", default="inductor", choices=["inductor", "eager"], help="what runs all else")
    parser.add_argument("--parts", default="faster", choices=["faster", "all"], help="what is replaced")
    given = parser.parse_args(arguments)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval().to(device)
    prompt = torch.randint(1, CONFIG["vocab_size"], (2, 8), device=device)
    options = {"rest": given.rest, "parts": given.parts}
    fast = torch.compile(model, backend="mugraph", dynamic=True, options=options)
    for run in (model, fast):
        generated(run, prompt, 2)  # compiles
    wanted, eager = generated(model, prompt, given.tokens)
    found, ours = generated(fast, prompt, given.tokens)
    assert torch.equal(found, wanted), "the same tokens"
    report = reports()[-1]
    print(f"{report.taken} of {report.nodes} operators taken over; the others: {report.rest}")
    print(f"tokens in a second: {eager:.0f} without mugraph, {ours:.0f} with it")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
