"""lora with Triton kernels.

from X: f16[b, k]
from W: f16[k, n]
from A: f16[k, r]
from Bm: f16[r, n]
to Y: f16[b, n]
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["size_b"])
def lora(X, W, A, Bm, Y, size_b, size_k, X_b, X_k, W_k, W_n, A_k, A_r, Bm_r, Bm_n, Y_b, Y_n):
    """One block: 16 of b, 64 of n."""
    pid = tl.program_id(0)
    b_block = pid % tl.cdiv(size_b, 16)
    n_block = pid // tl.cdiv(size_b, 16)

    i_b = b_block * 16 + tl.arange(0, 16)
    in_b = i_b < size_b
    i_k = tl.arange(0, 128)
    i_n = n_block * 64 + tl.arange(0, 64)
    i_r = tl.arange(0, 16)
    x_at = X + i_b[:, None] * X_b + i_k[None, :] * X_k
    w_at = W + i_k[:, None] * W_k + i_n[None, :] * W_n
    a_at = A + i_k[:, None] * A_k + i_r[None, :] * A_r
    xa_acc = tl.zeros((16, 16), tl.float32)
    xw_acc = tl.zeros((16, 64), tl.float32)
    for k0 in range(0, size_k, 128):
        x = tl.load(x_at + k0 * X_k, mask=in_b[:, None], other=0.0)  # x: f16[b, k] = load X[b, k]
        w = tl.load(w_at + k0 * W_k)  # w: f16[k, n] = load W[k, n]
        a = tl.load(a_at + k0 * A_k)  # a: f16[k, r] = load A[k, r]
        xa_acc = tl.dot(x, a, xa_acc)  # xa_acc: f32[b, r] = contract[k] x, a
        xw_acc = tl.dot(x, w, xw_acc)  # xw_acc: f32[b, n] = contract[k] x, w

    bm_at = Bm + i_r[:, None] * Bm_r + i_n[None, :] * Bm_n
    bm = tl.load(bm_at)  # bm: f16[r, n] = load Bm[r, n]
    low = tl.dot(xa_acc.to(tl.float16), bm)  # low: f32[b, n] = contract[r] xa_acc, bm
    y = xw_acc + low  # y: f32[b, n] = add xw_acc, low
    Y_at = Y + i_b[:, None] * Y_b + i_n[None, :] * Y_n
    tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])  # write y -> Y


def run(X, W, A, Bm, *, out=None):
    """Y, written into `out` if given."""
    size_B = X.shape[0]
    if out is None:
        Y = torch.empty((size_B, 4096), dtype=torch.float16, device=X.device)
    else:
        Y = out
    lora[(triton.cdiv(size_B, 16) * 64,)](
        X,
        W,
        A,
        Bm,
        Y,
        size_B,
        4096,
        *X.stride(),
        *W.stride(),
        *A.stride(),
        *Bm.stride(),
        *Y.stride(),
        num_warps=4,
        num_stages=4,
    )
    return Y


# How each kernel compiles ahead of time: types (`:16`: divisible by 16) or constants, and launch options.
SIGNATURES = {
    "lora": (
        {
            "X": "*fp16:16",
            "W": "*fp16:16",
            "A": "*fp16:16",
            "Bm": "*fp16:16",
            "Y": "*fp16:16",
            "size_b": "i32",
            "size_k": "i32:16",
            "X_b": "i32:16",
            "X_k": 1,
            "W_k": "i32:16",
            "W_n": 1,
            "A_k": "i32:16",
            "A_r": 1,
            "Bm_r": "i32:16",
            "Bm_n": 1,
            "Y_b": "i32:16",
            "Y_n": 1,
        },
        {"num_warps": 4, "num_stages": 4},
    ),
}
