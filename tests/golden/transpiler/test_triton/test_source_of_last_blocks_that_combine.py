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

_counters = {}


def counters(count, device):
    """`count` integers that are 0 between launches, because each launch leaves them so.  Launches on one stream follow
    each other and share them; a captured one, which may be replayed on any stream, has its own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[key]


@triton.jit(do_not_specialize=["size_b"])
def gqa(
    pid,
    Q,
    K,
    V,
    m_parts,
    l_parts,
    acc_parts,
    size_b,
    size_s,
    Q_h,
    Q_g,
    Q_b,
    Q_d,
    K_h,
    K_s,
    K_d,
    V_h,
    V_s,
    V_e,
    m_parts_s_part,
    m_parts_h,
    m_parts_g,
    m_parts_b,
    l_parts_s_part,
    l_parts_h,
    l_parts_g,
    l_parts_b,
    acc_parts_s_part,
    acc_parts_h,
    acc_parts_g,
    acc_parts_b,
    acc_parts_e,
):
    """One block: 8 of g, 2 of b, 1 of h, one of 8 parts of s."""
    b_block = pid % tl.cdiv(size_b, 2)
    pid = pid // tl.cdiv(size_b, 2)
    h_block = pid % 2
    part = pid // 2

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
    chunk_s = tl.cdiv(tl.cdiv(size_s, 64), 8) * 64
    low_s = part * chunk_s
    high_s = tl.maximum(low_s, tl.minimum(low_s + chunk_s, size_s))
    for s0 in range(low_s, high_s, 64):
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

    m_parts_at = m_parts + i_h * m_parts_h + i_g * m_parts_g + i_b * m_parts_b + part * m_parts_s_part
    tl.store(m_parts_at, m, mask=in_b)  # partial m -> m_parts
    l_parts_at = l_parts + i_h * l_parts_h + i_g * l_parts_g + i_b * l_parts_b + part * l_parts_s_part
    tl.store(l_parts_at, l, mask=in_b)  # partial l -> l_parts
    acc_parts_at = acc_parts + i_h * acc_parts_h + i_g[:, None] * acc_parts_g + i_b[:, None] * acc_parts_b
    acc_parts_at = acc_parts_at + i_e[None, :] * acc_parts_e + part * acc_parts_s_part
    tl.store(acc_parts_at, acc, mask=in_b[:, None])  # partial acc -> acc_parts


@triton.jit(do_not_specialize=["size_b"])
def gqa_combine(
    h_block,
    b_block,
    m_parts,
    l_parts,
    acc_parts,
    O,
    size_b,
    m_parts_s_part,
    m_parts_h,
    m_parts_g,
    m_parts_b,
    l_parts_s_part,
    l_parts_h,
    l_parts_g,
    l_parts_b,
    acc_parts_s_part,
    acc_parts_h,
    acc_parts_g,
    acc_parts_b,
    acc_parts_e,
    O_h,
    O_g,
    O_b,
    O_e,
):
    """One block: 1 of h, 8 of g, 2 of b."""
    i_s_part = tl.arange(0, 8)
    i_h = h_block
    at_gb = tl.arange(0, 16)  # g and b as one dimension
    i_g = at_gb // 2
    i_b = b_block * 2 + at_gb % 2
    in_b = i_b < size_b
    i_e = tl.arange(0, 128)
    m_in_at = m_parts + i_s_part[:, None] * m_parts_s_part + i_h * m_parts_h + i_g[None, :] * m_parts_g
    m_in_at = m_in_at + i_b[None, :] * m_parts_b
    # m_in: f32[s_part, h, g, b] = load m_parts[s_part, h, g, b]
    m_in = tl.load(m_in_at, mask=in_b[None, :], other=0.0, cache_modifier=".cg")
    l_in_at = l_parts + i_s_part[:, None] * l_parts_s_part + i_h * l_parts_h + i_g[None, :] * l_parts_g
    l_in_at = l_in_at + i_b[None, :] * l_parts_b
    # l_in: f32[s_part, h, g, b] = load l_parts[s_part, h, g, b]
    l_in = tl.load(l_in_at, mask=in_b[None, :], other=0.0, cache_modifier=".cg")
    acc_in_at = acc_parts + i_s_part[:, None, None] * acc_parts_s_part + i_h * acc_parts_h
    acc_in_at = acc_in_at + i_g[None, :, None] * acc_parts_g + i_b[None, :, None] * acc_parts_b
    acc_in_at = acc_in_at + i_e[None, None, :] * acc_parts_e
    # acc_in: f32[s_part, h, g, b, e] = load acc_parts[s_part, h, g, b, e]
    acc_in = tl.load(acc_in_at, mask=in_b[None, :, None], other=0.0, cache_modifier=".cg")
    m_all = tl.max(m_in, axis=0)  # m_all: f32[h, g, b] = max[s_part] m_in
    dm = m_in - m_all[None, :]  # dm: f32[s_part, h, g, b] = sub m_in, m_all
    f = tl.exp2(dm * LOG2E)  # f: f32[s_part, h, g, b] = exp dm
    l_all = tl.sum(l_in * f, axis=0)  # l_all: f32[h, g, b] = contract[s_part] l_in, f
    acc_all = tl.sum(acc_in * f[:, :, None], axis=0)  # acc_all: f32[h, g, b, e] = contract[s_part] acc_in, f
    o = acc_all * (1.0 / l_all)[:, None]  # o: f32[h, g, b, e] = div acc_all, l_all
    O_at = O + i_h * O_h + i_g[:, None] * O_g + i_b[:, None] * O_b + i_e[None, :] * O_e
    tl.store(O_at, o.to(tl.float16), mask=in_b[:, None])  # write o -> O


@triton.jit(do_not_specialize=["size_b"])
def gqa_whole(
    Q,
    K,
    V,
    m_parts,
    l_parts,
    acc_parts,
    size_b,
    size_s,
    Q_h,
    Q_g,
    Q_b,
    Q_d,
    K_h,
    K_s,
    K_d,
    V_h,
    V_s,
    V_e,
    m_parts_s_part,
    m_parts_h,
    m_parts_g,
    m_parts_b,
    l_parts_s_part,
    l_parts_h,
    l_parts_g,
    l_parts_b,
    acc_parts_s_part,
    acc_parts_h,
    acc_parts_g,
    acc_parts_b,
    acc_parts_e,
    O,
    O_h,
    O_g,
    O_b,
    O_e,
    arrivals,
):
    """A block of gqa; the last one of a result runs gqa_combine for it."""
    pid = tl.program_id(0)
    gqa(
        pid,
        Q,
        K,
        V,
        m_parts,
        l_parts,
        acc_parts,
        size_b,
        size_s,
        Q_h,
        Q_g,
        Q_b,
        Q_d,
        K_h,
        K_s,
        K_d,
        V_h,
        V_s,
        V_e,
        m_parts_s_part,
        m_parts_h,
        m_parts_g,
        m_parts_b,
        l_parts_s_part,
        l_parts_h,
        l_parts_g,
        l_parts_b,
        acc_parts_s_part,
        acc_parts_h,
        acc_parts_g,
        acc_parts_b,
        acc_parts_e,
    )
    result = pid % (tl.cdiv(size_b, 2) * 2)
    tl.debug_barrier()  # all threads have stored
    if tl.atomic_add(arrivals + result, 1, sem="acq_rel") == 7:
        b_block = pid % tl.cdiv(size_b, 2)
        others = pid // tl.cdiv(size_b, 2)
        h_block = others % 2
        gqa_combine(
            h_block,
            b_block,
            m_parts,
            l_parts,
            acc_parts,
            O,
            size_b,
            m_parts_s_part,
            m_parts_h,
            m_parts_g,
            m_parts_b,
            l_parts_s_part,
            l_parts_h,
            l_parts_g,
            l_parts_b,
            acc_parts_s_part,
            acc_parts_h,
            acc_parts_g,
            acc_parts_b,
            acc_parts_e,
            O_h,
            O_g,
            O_b,
            O_e,
        )
        tl.store(arrivals + result, 0)  # for the next launch


def run(Q, K, V, *, out=None):
    """O, written into `out` if given."""
    size_B = Q.shape[2]
    if out is None:
        O = torch.empty((2, 8, size_B, 128), dtype=torch.float16, device=Q.device)
    else:
        O = out
    m_parts = torch.empty((8, 2, 8, size_B), dtype=torch.float32, device=Q.device)
    l_parts = torch.empty((8, 2, 8, size_B), dtype=torch.float32, device=Q.device)
    acc_parts = torch.empty((8, 2, 8, size_B, 128), dtype=torch.float32, device=Q.device)
    gqa_arrivals = counters(2 * size_B, Q.device)
    gqa_whole[(triton.cdiv(size_B, 2) * 16,)](
        Q,
        K,
        V,
        m_parts,
        l_parts,
        acc_parts,
        size_B,
        4096,
        Q.stride(0),
        Q.stride(1),
        Q.stride(2),
        Q.stride(3),
        K.stride(0),
        K.stride(1),
        K.stride(2),
        V.stride(0),
        V.stride(1),
        V.stride(2),
        m_parts.stride(0),
        m_parts.stride(1),
        m_parts.stride(2),
        m_parts.stride(3),
        l_parts.stride(0),
        l_parts.stride(1),
        l_parts.stride(2),
        l_parts.stride(3),
        acc_parts.stride(0),
        acc_parts.stride(1),
        acc_parts.stride(2),
        acc_parts.stride(3),
        acc_parts.stride(4),
        O,
        O.stride(0),
        O.stride(1),
        O.stride(2),
        O.stride(3),
        gqa_arrivals,
        num_warps=4,
        num_stages=3,
    )
    return O


# How each kernel compiles ahead of time: types (`:16`: divisible by 16) or constants, and launch options.
SIGNATURES = {
    "gqa_whole": (
        {
            "Q": "*fp16:16",
            "K": "*fp16:16",
            "V": "*fp16:16",
            "m_parts": "*fp32:16",
            "l_parts": "*fp32:16",
            "acc_parts": "*fp32:16",
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
            "m_parts_s_part": "i32:16",
            "m_parts_h": "i32",
            "m_parts_g": "i32",
            "m_parts_b": 1,
            "l_parts_s_part": "i32:16",
            "l_parts_h": "i32",
            "l_parts_g": "i32",
            "l_parts_b": 1,
            "acc_parts_s_part": "i32:16",
            "acc_parts_h": "i32:16",
            "acc_parts_g": "i32:16",
            "acc_parts_b": "i32:16",
            "acc_parts_e": 1,
            "O": "*fp16:16",
            "O_h": "i32:16",
            "O_g": "i32:16",
            "O_b": "i32:16",
            "O_e": 1,
            "arrivals": "*i32:16",
        },
        {"num_warps": 4, "num_stages": 3},
    ),
}
