"""gqa with Triton kernels.

from Q: f16[h, g, b, d]
from K: f16[h, s, d]
from V: f16[h, s, e]
to O: f16[h, g, b, e]
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)


@triton.jit(do_not_specialize=["size_b"])
def gqa(Q, K, V, O, size_b, size_s, Q_h, Q_g, Q_b, Q_d, K_h, K_s, K_d, V_h, V_s, V_e, O_h, O_g, O_b, O_e):
    """One block: 8 of g, 2 of b, 1 of h."""
    pid = tl.program_id(0)
    b_block = pid % tl.cdiv(size_b, 2)
    h_block = pid // tl.cdiv(size_b, 2)

    i_h = h_block
    at_gb = tl.arange(0, 16)  # g and b as one dimension
    i_g = at_gb // 2
    i_b = b_block * 2 + at_gb % 2
    in_b = i_b < size_b
    i_d = tl.arange(0, 128)
    i_s = tl.arange(0, 64)
    i_e = tl.arange(0, 128)
    q_at = Q + i_h * Q_h + i_g[:, None] * Q_g + i_b[:, None] * Q_b + i_d[None, :] * Q_d
    q = tl.load(q_at, mask=in_b[:, None], other=0.0)  # q: f16[h, g, b, d] = load Q[h, g, b, d]
    c = 0.125  # c: f32[] = 1/8
    k_at = K + i_h * K_h + i_s[None, :] * K_s + i_d[:, None] * K_d
    v_at = V + i_h * V_h + i_s[:, None] * V_s + i_e[None, :] * V_e
    m = tl.full((16,), -3.4028234663852886e38, tl.float32)
    l = tl.zeros((16,), tl.float32)
    acc = tl.zeros((16, 128), tl.float32)
    for s0 in range(0, size_s, 64):
        k = tl.load(k_at + s0 * K_s)  # k: f16[h, s, d] = load K[h, s, d]
        v = tl.load(v_at + s0 * V_s)  # v: f16[h, s, e] = load V[h, s, e]
        qk = tl.dot(q, k)  # qk: f32[h, g, b, s] = contract[d] q, k
        z = qk * c  # z: f32[h, g, b, s] = mul qk, c
        m_old = m
        m = tl.maximum(m_old, tl.max(z, axis=1))  # m: f32[h, g, b] = max[s] z
        m_fade = tl.exp2((m_old - m) * LOG2E)
        zm = z - m[:, None]  # zm: f32[h, g, b, s] = sub z, m
        p = tl.exp2(zm * LOG2E)  # p: f32[h, g, b, s] = exp zm
        l = l * m_fade + tl.sum(p, axis=1)  # l: f32[h, g, b] = sum[s] p
        acc = tl.dot(p.to(tl.float16), v, acc * m_fade[:, None])  # acc: f32[h, g, b, e] = contract[s] p, v

    o = acc * (1.0 / l)[:, None]  # o: f32[h, g, b, e] = div acc, l
    O_at = O + i_h * O_h + i_g[:, None] * O_g + i_b[:, None] * O_b + i_e[None, :] * O_e
    tl.store(O_at, o.to(tl.float16), mask=in_b[:, None])  # write o -> O


def run(Q, K, V, *, out=None):
    """O, written into `out` if given."""
    size_B = Q.shape[2]
    if out is None:
        O = torch.empty((2, 8, size_B, 128), dtype=torch.float16, device=Q.device)
    else:
        O = out
    gqa[(triton.cdiv(size_B, 2) * 2,)](
        Q, K, V, O, size_B, 4096, *Q.stride(), *K.stride(), *V.stride(), *O.stride(), num_warps=4, num_stages=3
    )
    return O


# How each kernel compiles ahead of time: types (`:16`: divisible by 16) or constants, and launch options.
SIGNATURES = {
    "gqa": (
        {
            "Q": "*fp16:16",
            "K": "*fp16:16",
            "V": "*fp16:16",
            "O": "*fp16:16",
            "size_b": "i32",
            "size_s": "i32:16",
            "Q_h": "i32:16",
            "Q_g": "i32:16",
            "Q_b": "i32:16",
            "Q_d": 1,
            "K_h": "i32:16",
            "K_s": "i32:16",
            "K_d": 1,
            "V_h": "i32:16",
            "V_s": "i32:16",
            "V_e": 1,
            "O_h": "i32:16",
            "O_g": "i32:16",
            "O_b": "i32:16",
            "O_e": 1,
        },
        {"num_warps": 4, "num_stages": 3},
    ),
}
