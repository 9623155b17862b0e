"""The programs that the benchmarks run, as they are written down naively, at their true sizes; rows `b` symbolic."""

from __future__ import annotations

import mugraph as mg

B = mg.Dim("B", 1, 8192)


@mg.program
def rmsnorm_linear(X: mg.f16[B, 4096], G: mg.f16[4096], W: mg.constant(mg.f16[4096, 6144])):
    """The QKV projection of LLaMA-2-7B."""
    return mg.rms_norm(X, G) @ W


@mg.program
def gated_mlp(X: mg.f16[B, 4096], W1: mg.constant(mg.f16[4096, 4096]), W2: mg.constant(mg.f16[4096, 4096])):
    return mg.silu(X @ W1) * (X @ W2)


@mg.program
def lora(
    X: mg.f16[B, 4096],
    W: mg.constant(mg.f16[4096, 4096]),
    A: mg.f16[4096, 16],
    Bm: mg.f16[16, 4096],
):
    return X @ W + (X @ A) @ Bm


@mg.program
def gqa(Q: mg.f16[2, 8, B, 128], K: mg.f16[2, 4096, 128], V: mg.f16[2, 4096, 128]):
    """LLaMA-3-70B on four GPUs: 2 KV heads, 8 query heads for each."""
    scores = Q @ K.unsqueeze(1).mT * 128**-0.5
    return mg.softmax(scores) @ V.unsqueeze(1)


@mg.program
def qk_norm_attention(Q: mg.f16[32, B, 128], K: mg.f16[32, 4096, 128], V: mg.f16[32, 4096, 128]):
    """Chameleon-7B: queries and keys are normalised over the head dimension."""
    scores = mg.rms_norm(Q) @ mg.rms_norm(K).mT * 128**-0.5
    return mg.softmax(scores) @ V


def norm(x):
    """x over its L2 norm along the last dimension."""
    return x * mg.rsqrt(mg.sum(mg.square(x), -1, keepdims=True))


@mg.program
def ntrans(x: mg.f16[B, 4096], h: mg.f16[B, 4096], alpha: mg.f16[4096]):
    """A block of nGPT: normalised interpolation."""
    a, c = norm(x), norm(h)
    return norm(c + alpha * (a - c))


CLASSIC = ("rmsnorm_linear", "gated_mlp", "lora", "gqa", "qk_norm_attention", "ntrans")


@mg.program
def linear_bias_residual(
    X: mg.f16[B, 4096], W: mg.constant(mg.f16[4096, 4096]), bias: mg.f16[4096], R: mg.f16[B, 4096]
):
    return mg.silu(X @ W + bias) + R


@mg.program
def layernorm_linear(
    X: mg.f16[B, 4096],
    gamma: mg.f16[4096],
    beta: mg.f16[4096],
    W: mg.constant(mg.f16[4096, 16384]),
    bias: mg.f16[16384],
):
    return mg.gelu(mg.layer_norm(X, gamma, beta) @ W + bias)


@mg.program
def softmax(X: mg.f16[B, 32768]):
    return mg.softmax(X)


@mg.program
def layernorm(X: mg.f16[B, 4096], gamma: mg.f16[4096], beta: mg.f16[4096]):
    return mg.layer_norm(X, gamma, beta)


@mg.program
def rmsnorm(X: mg.f16[B, 4096], G: mg.f16[4096]):
    return mg.rms_norm(X, G)


@mg.program
def split_k(X: mg.f16[B, 14336], W: mg.constant(mg.f16[14336, 4096])):
    return X @ W


@mg.program
def low_rank_chain(A: mg.f16[4096, 16], Bm: mg.f16[16, 4096], C: mg.f16[4096, 64], D: mg.f16[64, B]):
    """As written it makes a 4096 by 4096 matrix of rank 16."""
    return A @ Bm @ C @ D


@mg.program
def rmsnorm_gated_mlp(
    H: mg.f16[B, 4096],
    G: mg.f16[4096],
    Wg: mg.constant(mg.f16[4096, 14336]),
    Wu: mg.constant(mg.f16[4096, 14336]),
    Wd: mg.constant(mg.f16[14336, 4096]),
):
    n = mg.rms_norm(H, G)
    return H + (mg.silu(n @ Wg) * (n @ Wu)) @ Wd


@mg.program
def mha(Q: mg.f16[32, B, 128], K: mg.f16[32, 4096, 128], V: mg.f16[32, 4096, 128]):
    return mg.attention(Q, K, V)


PROGRAMS: dict[str, mg.Program] = {
    p.name: p
    for p in (
        rmsnorm_linear,
        gated_mlp,
        lora,
        gqa,
        qk_norm_attention,
        ntrans,
        linear_bias_residual,
        layernorm_linear,
        softmax,
        layernorm,
        rmsnorm,
        split_k,
        low_rank_chain,
        rmsnorm_gated_mlp,
        mha,
    )
}
