"""gated_mlp with Triton kernels.

from X: f16[b, k]
from W1: f16[k, n]
from W2: f16[k, n]
to Y: f16[b, n]
"""

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)


@triton.jit(do_not_specialize=["size_b"])
def gated_mlp(X, W1, W2, Y, size_b, size_k, X_b, X_k, W1_k, W1_n, W2_k, W2_n, Y_b, Y_n):
    """One block: 16 of b, 64 of n."""
    pid = tl.program_id(0)
    b_block = pid % tl.cdiv(size_b, 16)
    n_block = pid // tl.cdiv(size_b, 16)

    i_b = b_block * 16 + tl.arange(0, 16)
    in_b = i_b < size_b
    i_k = tl.arange(0, 64)
    i_n = n_block * 64 + tl.arange(0, 64)
    x_at = X + i_b[:, None] * X_b + i_k[None, :] * X_k
    w1_at = W1 + i_k[:, None] * W1_k + i_n[None, :] * W1_n
    w2_at = W2 + i_k[:, None] * W2_k + i_n[None, :] * W2_n
    h_acc = tl.zeros((16, 64), tl.float32)
    u_acc = tl.zeros((16, 64), tl.float32)
    for k0 in range(0, size_k, 64):
        x = tl.load(x_at + k0 * X_k, mask=in_b[:, None], other=0.0)  # x: f16[b, k] = load X[b, k]
        w1 = tl.load(w1_at + k0 * W1_k)  # w1: f16[k, n] = load W1[k, n]
        w2 = tl.load(w2_at + k0 * W2_k)  # w2: f16[k, n] = load W2[k, n]
        h_acc = tl.dot(x, w1, h_acc)  # h_acc: f32[b, n] = contract[k] x, w1
        u_acc = tl.dot(x, w2, u_acc)  # u_acc: f32[b, n] = contract[k] x, w2

    s = h_acc / (1.0 + tl.exp2(-h_acc * LOG2E))  # s: f32[b, n] = silu h_acc
    y = s * u_acc  # y: f32[b, n] = mul s, u_acc
    Y_at = Y + i_b[:, None] * Y_b + i_n[None, :] * Y_n
    tl.store(Y_at, y.to(tl.float16), mask=in_b[:, None])  # write y -> Y


def run(X, W1, W2, *, out=None):
    """Y, written into `out` if given."""
    size_B = X.shape[0]
    if out is None:
        Y = torch.empty((size_B, 4096), dtype=torch.float16, device=X.device)
    else:
        Y = out
    gated_mlp[(triton.cdiv(size_B, 16) * 64,)](
        X, W1, W2, Y, size_B, 4096, *X.stride(), *W1.stride(), *W2.stride(), *Y.stride(), num_warps=4, num_stages=4
    )
    return Y


# How each kernel compiles ahead of time: types (`:16`: divisible by 16) or constants, and launch options.
SIGNATURES = {
    "gated_mlp": (
        {
            "X": "*fp16:16",
            "W1": "*fp16:16",
            "W2": "*fp16:16",
            "Y": "*fp16:16",
            "size_b": "i32",
            "size_k": "i32:16",
            "X_b": "i32:16",
            "X_k": 1,
            "W1_k": "i32:16",
            "W1_n": 1,
            "W2_k": "i32:16",
            "W2_n": 1,
            "Y_b": "i32:16",
            "Y_n": 1,
        },
        {"num_warps": 4, "num_stages": 4},
    ),
}
