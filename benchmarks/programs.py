"""The programs that the benchmarks run, as they are written down naively, at their true sizes; rows `b` symbolic.

A *family* has one or more variants (another form of the program, or other static sizes) and the numbers of rows that
matter for it: each variant is searched once, with `b` symbolic, and gets the best structure for each range of rows.

    FAMILIES["gated_mlp"].variants["N 11008"]      a Program
    PROGRAMS["gated_mlp"]                          the first variant
"""

from collections.abc import Callable
from dataclasses import dataclass

import mugraph as mg
from mugraph.search.space import SearchSpace

B = mg.Dim("B", 1, 8192)
FEW = (1, 2, 8, 16, 64)
DECODE = (1, 8, 16)
SEVERAL = (1, 16, 64, 256, 1024)
MANY = (1, 16, 256, 1024, 8192)


@dataclass(frozen=True)
class Family:
    """Variants of a program by name, and the values of `b` at which costs are compared."""

    variants: dict[str, mg.Program]
    rows: tuple[int, ...]

    def space(self) -> SearchSpace:
        """The default space at the family's own sizes; 16 rows, or the nearest, stand for `b` in the report."""
        first = min(self.rows, key=lambda n: abs(n - 16))
        return SearchSpace(symbolic=first, sizes=tuple(n for n in self.rows if n != first))


# -- the classic six


def rmsnorm_linear(k: int = 4096, n: int = 6144) -> mg.Program:
    """The QKV projection of LLaMA-2-7B."""

    @mg.program
    def rmsnorm_linear(X: mg.f16[B, k], G: mg.f16[k], W: mg.constant(mg.f16[k, n])):
        return mg.rms_norm(X, G) @ W

    return rmsnorm_linear


def gated_mlp(k: int = 4096, n: int = 4096) -> mg.Program:
    @mg.program
    def gated_mlp(X: mg.f16[B, k], W1: mg.constant(mg.f16[k, n]), W2: mg.constant(mg.f16[k, n])):
        return mg.silu(X @ W1) * (X @ W2)

    return gated_mlp


def lora(k: int = 4096, n: int = 4096, r: int = 16, b: int | mg.Dim = B) -> mg.Program:
    @mg.program
    def lora(X: mg.f16[b, k], W: mg.constant(mg.f16[k, n]), A: mg.f16[k, r], Bm: mg.f16[r, n]):
        return X @ W + (X @ A) @ Bm

    return lora


def gqa(keys: int = 4096, heads: int = 2, group: int = 8, d: int = 128) -> mg.Program:
    """LLaMA-3-70B on four GPUs: 2 KV heads, 8 query heads for each."""

    @mg.program
    def gqa(Q: mg.f16[heads, group, B, d], K: mg.f16[heads, keys, d], V: mg.f16[heads, keys, d]):
        scores = Q @ K.unsqueeze(1).mT * d**-0.5
        return mg.softmax(scores) @ V.unsqueeze(1)

    return gqa


@mg.program
def gqa_script(Q: mg.f16[2 * B, 256, 64], K: mg.f16[2 * B, 64, 4096], V: mg.f16[2 * B, 4096, 64]):
    """The sizes of the published script: b sequences, 256 rows for each KV head."""
    return mg.softmax(Q @ K * 64**-0.5) @ V


def qk_norm_attention(keys: int = 4096, heads: int = 32, d: int = 128) -> mg.Program:
    """Chameleon-7B: queries and keys are normalised over the head dimension."""

    @mg.program
    def qk_norm_attention(Q: mg.f16[heads, B, d], K: mg.f16[heads, keys, d], V: mg.f16[heads, keys, d]):
        scores = mg.rms_norm(Q) @ mg.rms_norm(K).mT * d**-0.5
        return mg.softmax(scores) @ V

    return qk_norm_attention


def norm(x):
    """x over its L2 norm along the last dimension."""
    return x * mg.rsqrt(mg.sum(mg.square(x), -1, keepdims=True))


def ntrans(k: int = 4096) -> mg.Program:
    """A block of nGPT: normalised interpolation."""

    @mg.program
    def ntrans(x: mg.f16[B, k], h: mg.f16[B, k], alpha: mg.f16[k]):
        a, c = norm(x), norm(h)
        return norm(c + alpha * (a - c))

    return ntrans


# -- linear layers


def linear_bias_residual(activation: Callable[..., object] | None, k: int = 4096, n: int = 4096) -> mg.Program:
    @mg.program
    def linear_bias_residual(X: mg.f16[B, k], W: mg.constant(mg.f16[k, n]), bias: mg.f16[n], R: mg.f16[B, n]):
        y = X @ W + bias
        return (y if activation is None else activation(y)) + R

    return linear_bias_residual


def relu2(x):
    return mg.square(mg.relu(x))


def layernorm_linear(k: int = 4096, n: int = 16384) -> mg.Program:
    @mg.program
    def layernorm_linear(
        X: mg.f16[B, k], gamma: mg.f16[k], beta: mg.f16[k], W: mg.constant(mg.f16[k, n]), bias: mg.f16[n]
    ):
        return mg.gelu(mg.layer_norm(X, gamma, beta) @ W + bias)

    return layernorm_linear


def rmsnorm_gated_mlp(k: int = 4096, n: int = 14336) -> mg.Program:
    """RMSNorm, gated MLP, down projection and residual."""

    @mg.program
    def rmsnorm_gated_mlp(
        H: mg.f16[B, k],
        G: mg.f16[k],
        Wg: mg.constant(mg.f16[k, n]),
        Wu: mg.constant(mg.f16[k, n]),
        Wd: mg.constant(mg.f16[n, k]),
    ):
        x = mg.rms_norm(H, G)
        return H + (mg.silu(x @ Wg) * (x @ Wu)) @ Wd

    return rmsnorm_gated_mlp


def split_k(k: int = 14336, n: int = 4096) -> mg.Program:
    @mg.program
    def split_k(X: mg.f16[B, k], W: mg.constant(mg.f16[k, n])):
        return X @ W

    return split_k


@mg.program
def low_rank_chain(A: mg.f16[4096, 16], Bm: mg.f16[16, 4096], C: mg.f16[4096, 64], D: mg.f16[64, B]):
    """As written it makes a 4096 by 4096 matrix of rank 16."""
    return A @ Bm @ C @ D


@mg.program
def two_weights(X: mg.f16[B, 4096], W1: mg.constant(mg.f16[4096, 16384]), W2: mg.constant(mg.f16[16384, 64])):
    """W1 @ W2 is smaller than either, and both are constant."""
    return X @ W1 @ W2


@mg.program
def constant_lora(
    X: mg.f16[B, 4096],
    W: mg.constant(mg.f16[4096, 4096]),
    A: mg.constant(mg.f16[4096, 16]),
    Bm: mg.constant(mg.f16[16, 4096]),
):
    """All weights are constant: X @ (W + A @ Bm)."""
    return X @ W + X @ A @ Bm


# -- rows


def softmax(k: int) -> mg.Program:
    @mg.program
    def softmax(X: mg.f16[B, k]):
        return mg.softmax(X)

    return softmax


def logsumexp(k: int) -> mg.Program:
    @mg.program
    def logsumexp(X: mg.f16[B, k]):
        return mg.logsumexp(X)

    return logsumexp


def layernorm(k: int) -> mg.Program:
    @mg.program
    def layernorm(X: mg.f16[B, k], gamma: mg.f16[k], beta: mg.f16[k]):
        return mg.layer_norm(X, gamma, beta)

    return layernorm


def rmsnorm(k: int) -> mg.Program:
    @mg.program
    def rmsnorm(X: mg.f16[B, k], G: mg.f16[k]):
        return mg.rms_norm(X, G)

    return rmsnorm


def cross_entropy(k: int) -> mg.Program:
    @mg.program
    def cross_entropy(X: mg.f16[B, k], target: mg.i64[B]):
        """The loss of each row; the logit of the target is picked by comparison."""
        picked = mg.where(mg.iota(X.shape[1]) == target.unsqueeze(1), X, 0)
        return mg.logsumexp(X) - mg.sum(picked, -1)

    return cross_entropy


# -- attention


def mha(keys: int | mg.Dim = 4096, heads: int = 32, d: int = 128, causal: bool = False) -> mg.Program:
    @mg.program
    def mha(Q: mg.f16[heads, B, d], K: mg.f16[heads, keys, d], V: mg.f16[heads, keys, d]):
        return mg.attention(Q, K, V, causal=causal)

    return mha


def mqa(keys: int | mg.Dim = 4096, heads: int = 32, d: int = 128, causal: bool = False) -> mg.Program:
    """One head of keys and values for all heads of queries."""

    @mg.program
    def mqa(Q: mg.f16[heads, B, d], K: mg.f16[keys, d], V: mg.f16[keys, d]):
        return mg.attention(Q, K, V, causal=causal)

    return mqa


LATENT, ROPE = 512, 64


def mla(heads: int = 128, keys: int = 4096, d: int = 128) -> mg.Program:
    """Multi-head latent attention as it is defined: keys and values of each head are projected from the latents."""

    @mg.program
    def mla(
        Q: mg.f16[heads, B, d],
        Qr: mg.f16[heads, B, ROPE],
        C: mg.f16[keys, LATENT],
        Kr: mg.f16[keys, ROPE],
        Wk: mg.constant(mg.f16[heads, LATENT, d]),
        Wv: mg.constant(mg.f16[heads, LATENT, d]),
    ):
        scores = (Q @ (C @ Wk).mT + Qr @ Kr.mT) * (d + ROPE) ** -0.5
        return mg.softmax(scores) @ (C @ Wv)

    return mla


def mla_absorbed(heads: int = 128, keys: int = 4096, d: int = 128) -> mg.Program:
    """The decode form: queries are projected into the latent space, and the result out of it."""

    @mg.program
    def mla(
        Q: mg.f16[heads, B, d],
        Qr: mg.f16[heads, B, ROPE],
        C: mg.f16[keys, LATENT],
        Kr: mg.f16[keys, ROPE],
        Wk: mg.constant(mg.f16[heads, LATENT, d]),
        Wv: mg.constant(mg.f16[heads, LATENT, d]),
    ):
        scores = ((Q @ Wk.mT) @ C.mT + Qr @ Kr.mT) * (d + ROPE) ** -0.5
        return (mg.softmax(scores) @ C) @ Wv

    return mla


def rotated(x, cos, sin):
    """Rotary embedding over the last dimension, first half against second half."""
    a, b = mg.chunk(x, 2, -1)
    return mg.concat([a * cos - b * sin, b * cos + a * sin], -1)


def rope_attention(keys: int = 4096, heads: int = 32, d: int = 128) -> mg.Program:
    """Queries and keys are turned by the angles of their positions, then attention."""

    @mg.program
    def rope_attention(
        Q: mg.f16[heads, B, d],
        K: mg.f16[heads, keys, d],
        V: mg.f16[heads, keys, d],
        Cq: mg.f16[B, d // 2],
        Sq: mg.f16[B, d // 2],
        Ck: mg.f16[keys, d // 2],
        Sk: mg.f16[keys, d // 2],
    ):
        return mg.attention(rotated(Q, Cq, Sq), rotated(K, Ck, Sk), V)

    return rope_attention


def prenorm_attention(prefix: int = 1008, new: int = 16, heads: int = 32, d: int = 128, causal: bool = False):
    """RMSNorm, QKV projections, attention over a prefix and the new tokens, output projection."""
    n = heads * d

    @mg.program
    def prenorm_attention(
        X: mg.f16[new, n],
        G: mg.f16[n],
        Wq: mg.constant(mg.f16[n, n]),
        Wk: mg.constant(mg.f16[n, n]),
        Wv: mg.constant(mg.f16[n, n]),
        Wo: mg.constant(mg.f16[n, n]),
        Kp: mg.f16[heads, prefix, d],
        Vp: mg.f16[heads, prefix, d],
    ):
        x = mg.rms_norm(X, G)
        q, k, v = ((x @ w).reshape(new, heads, d).transpose(0, 1) for w in (Wq, Wk, Wv))
        k, v = mg.concat([Kp, k], 1), mg.concat([Vp, v], 1)
        mask = mg.causal_mask(q.shape[1], k.shape[1], prefix) if causal else None
        out = mg.attention(q, k, v, mask=mask)
        return out.transpose(0, 1).reshape(new, n) @ Wo

    return prenorm_attention


# -- backward programs, as autograd defines them: gradients of the outputs and what the forward pass saved, in


def gated_mlp_bwd(k: int = 4096, n: int = 4096) -> mg.Program:
    """y = silu(X @ W1) * (X @ W2).  Saved: X and both products, G and U."""

    @mg.program
    def swiglu_bwd(
        dY: mg.f16[B, n],
        X: mg.f16[B, k],
        G: mg.f16[B, n],
        U: mg.f16[B, n],
        W1: mg.constant(mg.f16[k, n]),
        W2: mg.constant(mg.f16[k, n]),
    ):
        s = mg.sigmoid(G)
        dU = dY * (G * s)
        dG = dY * U * (s * (1 + G * (1 - s)))
        dX = dG @ W1.mT + dU @ W2.mT
        return dX, X.mT @ dG, X.mT @ dU

    return swiglu_bwd


def swiglu_bwd(n: int = 14336) -> mg.Program:
    """y = silu(G) * U.  Saved: G and U."""

    @mg.program
    def swiglu_bwd(dY: mg.f16[B, n], G: mg.f16[B, n], U: mg.f16[B, n]):
        s = mg.sigmoid(G)
        return dY * U * (s * (1 + G * (1 - s))), dY * (G * s)

    return swiglu_bwd


def rmsnorm_bwd(k: int = 4096) -> mg.Program:
    """y = X * R * G with R = rsqrt(mean(X²) + eps).  Saved: X, G and R, in f32."""

    @mg.program
    def rmsnorm_bwd(dY: mg.f16[B, k], X: mg.f16[B, k], G: mg.f16[k], R: mg.f32[B, 1]):
        dN = dY * G  # of the normalised rows
        dR = mg.sum(dN * X, -1, True)
        dX = dN * R - X * (R * R * R * dR / X.shape[1])
        return dX.half(), mg.sum(dY * X * R, 0).half()

    return rmsnorm_bwd


def lora_bwd(k: int = 4096, n: int = 4096, r: int = 16) -> mg.Program:
    """Y = X @ W + (X @ A) @ Bm with W frozen.  Saved: X and H = X @ A."""

    @mg.program
    def lora_bwd(
        dY: mg.f16[B, n],
        X: mg.f16[B, k],
        H: mg.f16[B, r],
        W: mg.constant(mg.f16[k, n]),
        A: mg.f16[k, r],
        Bm: mg.f16[r, n],
    ):
        dH = dY @ Bm.mT
        return dY @ W.mT + dH @ A.mT, X.mT @ dH, H.mT @ dY

    return lora_bwd


def attention_bwd(keys: int = 4096, heads: int = 32, d: int = 128) -> mg.Program:
    """O = softmax(Q Kᵀ · s) V.  Saved: Q, K, V, O and the log-sum-exp of the rows of scores, L, in f32."""

    @mg.program
    def attention_bwd(
        dO: mg.f16[heads, B, d],
        Q: mg.f16[heads, B, d],
        K: mg.f16[heads, keys, d],
        V: mg.f16[heads, keys, d],
        O: mg.f16[heads, B, d],
        L: mg.f32[heads, B, 1],
    ):
        P = mg.exp(Q @ K.mT * d**-0.5 - L)
        dP = dO @ V.mT
        dS = (P * (dP - mg.sum(dO * O, -1, True))).half()
        return (dS @ K) * d**-0.5, (dS.mT @ Q) * d**-0.5, P.half().mT @ dO

    return attention_bwd


def attention_bwd_of_softmax(keys: int = 4096, heads: int = 32, d: int = 128) -> mg.Program:
    """O = P V with P = softmax(Q Kᵀ · s).  Saved: Q, K, V; P is computed again, as written."""

    @mg.program
    def attention_bwd(
        dO: mg.f16[heads, B, d], Q: mg.f16[heads, B, d], K: mg.f16[heads, keys, d], V: mg.f16[heads, keys, d]
    ):
        P = mg.softmax(Q @ K.mT * d**-0.5)
        dP = dO @ V.mT
        dS = P * (dP - mg.sum(dP * P, -1, True))
        return (dS @ K) * d**-0.5, (dS.mT @ Q) * d**-0.5, P.mT @ dO

    return attention_bwd


# -- all of them

CLASSIC = ("rmsnorm_linear", "gated_mlp", "lora", "gqa", "qk_norm_attention", "ntrans")
COLUMNS = (4096, 1000, 1009, 1024, 32768, 128256, 131071)  # 1009 and 131071 are prime


# -- by index


def moe_ffn(experts: int = 8, k: int = 4096, n: int = 14336, groups: int = 16, rows: int = 16) -> mg.Program:
    """The experts of Mixtral 8x7B, after routing: groups of up to 16 tokens that share an expert, as many as 64 tokens
    with two experts each need.  A place in a group that no token takes has weight 0."""

    @mg.program
    def moe_ffn(
        X: mg.f16[B, k],
        Rows: mg.i32[groups, rows],
        Expert: mg.i32[groups],
        Weight: mg.f32[groups, rows],
        W1: mg.f16[experts, k, n],
        W2: mg.f16[experts, k, n],
        W3: mg.f16[experts, n, k],
    ):
        x = X[Rows]
        h = mg.silu(x @ W1[Expert]) * (x @ W2[Expert])
        y = mg.cast(h @ W3[Expert], mg.f32) * Weight[:, :, None]
        return mg.cast(mg.scatter_add(y, Rows, X.shape[0]), mg.f16)

    return moe_ffn


def paged_attention(pages: int = 4096, slots: int = 16, keys: int = 4096, heads: int = 8, group: int = 4, d: int = 128):
    """Decoding with a paged cache, LLaMA-3-8B: the keys of each sequence lie in pages that its table names."""

    @mg.program
    def paged_attention(
        Q: mg.f16[B, heads, group, d],
        K: mg.f16[pages, slots, heads, d],
        V: mg.f16[pages, slots, heads, d],
        Table: mg.i32[B, keys // slots],
    ):
        s = mg.einsum("bhgd,bpthd->bhgpt", Q, K[Table]) * d**-0.5
        e = mg.exp(s - mg.max(s, axis=(-2, -1), keepdims=True))
        return mg.einsum("bhgpt,bpthd->bhgd", e / mg.sum(e, axis=(-2, -1), keepdims=True), V[Table])

    return paged_attention


def by_columns(make: Callable[[int], mg.Program]) -> Family:
    return Family({f"{k} columns": make(k) for k in COLUMNS}, MANY)


def attention_family(make: Callable[..., mg.Program]) -> Family:
    variants = {"4096 keys": make(), "causal": make(keys=B, causal=True), "causal, 4096 keys": make(causal=True)}
    return Family(variants, SEVERAL)


FAMILIES: dict[str, Family] = {
    "rmsnorm_linear": Family({"4096 x 6144": rmsnorm_linear()}, FEW),
    "gated_mlp": Family({f"N {n}": gated_mlp(n=n) for n in (4096, 11008, 14336)}, FEW),
    "lora": Family({"4096": lora(), "published, tiny": lora(k=256, b=16)}, FEW),
    "gqa": Family({f"{n} keys": gqa(n) for n in (4096, 1024, 8192)} | {"published script": gqa_script}, DECODE),
    "qk_norm_attention": Family({f"{n} keys": qk_norm_attention(n) for n in (4096, 1024)}, DECODE),
    "ntrans": Family({"4096": ntrans()}, (1, 8, 64)),
    "rmsnorm_gated_mlp": Family({"4096 / 14336": rmsnorm_gated_mlp()}, SEVERAL),
    "layernorm_linear": Family({"4096 x 16384": layernorm_linear()}, SEVERAL),
    "linear_bias_residual": Family(
        {
            name: linear_bias_residual(fn)
            for name, fn in (("SiLU", mg.silu), ("GELU", mg.gelu), ("ReLU²", relu2), ("none", None))
        },
        SEVERAL,
    ),
    "mha": attention_family(mha),
    "mqa": attention_family(mqa),
    "mla": Family(
        {
            "128 heads": mla(128),
            "16 heads": mla(16),
            "128 heads, absorbed": mla_absorbed(128),
            "16 heads, absorbed": mla_absorbed(16),
        },
        DECODE,
    ),
    "rope_attention": Family({"4096 keys": rope_attention()}, SEVERAL),
    "prenorm_attention": Family(
        {"1008 + 16 tokens": prenorm_attention(), "causal": prenorm_attention(causal=True)}, (16,)
    ),
    "softmax": by_columns(softmax),
    "layernorm": by_columns(layernorm),
    "rmsnorm": by_columns(rmsnorm),
    "cross_entropy": by_columns(cross_entropy),
    "logsumexp": by_columns(logsumexp),
    "low_rank_chain": Family({"A @ B @ C @ D": low_rank_chain}, SEVERAL),
    "two_weights": Family({"4096 x 16384 x 64": two_weights}, SEVERAL),
    "constant_lora": Family({"4096": constant_lora}, FEW),
    "split_k": Family({"14336 x 4096": split_k()}, DECODE),
    "swiglu_bwd": Family({"with the products": gated_mlp_bwd(), "14336 columns": swiglu_bwd()}, MANY),
    "rmsnorm_bwd": Family({"4096": rmsnorm_bwd()}, MANY),
    "lora_bwd": Family({"4096": lora_bwd()}, MANY),
    "moe_ffn": Family({"Mixtral 8x7B": moe_ffn()}, FEW),
    "paged_attention": Family({"4096 keys": paged_attention()}, DECODE),
    "attention_bwd": Family(
        {"log-sum-exp saved": attention_bwd(), "softmax again": attention_bwd_of_softmax()}, (64, 1024, 4096)
    ),
}

PROGRAMS: dict[str, mg.Program] = {name: next(iter(f.variants.values())) for name, f in FAMILIES.items()}
