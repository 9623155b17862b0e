"""Every function and view of the language computes what torch computes in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import mugraph.dsl.functions as mg
from mugraph.dsl.trace import bool_, f16, f32, i64
from mugraph.ir.axes import Dim
from tests.dsl.oracle import agree

X, Y, V = f32["B", 12], f32["B", 12], f32[12]

CASES = {
    "add": (lambda x, y: x + y, [X, Y]),
    "sub": (lambda x, y: 1 - x - y, [X, V]),
    "mul": (lambda x, y: 2 * x * y, [X, V]),
    "div": (lambda x, y: x / (y * y + 1), [X, Y]),
    "rdiv": (lambda x: 1 / (x * x + 0.5), [X]),
    "neg": (lambda x: -x, [X]),
    "pow2": (lambda x: x**2, [X]),
    "pow3": (lambda x: x**3, [X]),
    "pow-1": (lambda x: (x * x + 1) ** -1, [X]),
    "pow0.5": (lambda x: (x * x) ** 0.5, [X]),
    "pow-0.5": (lambda x: (x * x + 1) ** -0.5, [X]),
    "abs": (lambda x: x.abs(), [X]),
    "exp": (lambda x: x.exp(), [X]),
    "log": (lambda x: (x * x + 1).log(), [X]),
    "sqrt": (lambda x: (x * x).sqrt(), [X]),
    "rsqrt": (lambda x: (x * x + 1).rsqrt(), [X]),
    "sigmoid": (lambda x: x.sigmoid(), [X]),
    "tanh": (lambda x: x.tanh(), [X]),
    "sin": (lambda x: x.sin(), [X]),
    "cos": (lambda x: x.cos(), [X]),
    "erf": (lambda x: x.erf(), [X]),
    "expm1": (lambda x: x.expm1(), [X]),
    "log1p": (lambda x: (x * x).log1p(), [X]),
    "floor": (lambda x: (x * 3).floor(), [X]),
    "relu": (lambda x: x.relu(), [X]),
    "square": (lambda x: x.square(), [X]),
    "sum": (lambda x: x.sum(-1), [X]),
    "sum all": (lambda x: x.sum(), [X]),
    "sum keepdim": (lambda x: x.sum(dim=0, keepdim=True), [X]),
    "sum two": (lambda x: x.sum(dim=(0, 2)), [f32["B", 3, 4]]),
    "sum of one": (lambda x: x.sum(-1), [f32["B", 1]]),
    "mean": (lambda x: x.mean(-1, keepdim=True), [X]),
    "mean two": (lambda x: x.mean(dim=(-1, -2)), [f32["B", 3, 4]]),
    "amax": (lambda x: x.amax(-1), [X]),
    "amin": (lambda x: x.amin(-1, keepdim=True), [X]),
    "cumsum": (lambda x: x.cumsum(1), [X]),
    "softmax": (lambda x: x.softmax(-1), [X]),
    "softmax 0": (lambda x: x.softmax(0), [X]),
    "own softmax": (lambda x: (x - x.amax(-1, keepdim=True)).exp(), [X]),
    "matmul": (lambda x, y: x @ y, [X, f32[12, 7]]),
    "gram": (lambda x: x @ x.T, [X]),
    "gram columns": (lambda x: x.T @ x, [X]),
    "square matrix": (lambda x: x @ x, [f32[4, 4]]),
    "cube": (lambda x: x @ x @ x, [f32[4, 4]]),
    "square matrix, split": (lambda x: (x @ x).unflatten(-1, (2, 2)), [f32[4, 4]]),
    "symmetric": (lambda x: x @ x.T + (x @ x.T).T, [X]),
    "plus its transpose": (lambda x: x + x.T, [f32[6, 6]]),
    "times its transpose": (lambda x: x * x.T + x.T, [f32[6, 6]]),
    "trace of a product": (lambda x, y: ((x @ y) * (y @ x)).sum(), [f32[4, 4], f32[4, 4]]),
    "outer": (lambda x: x[:, None] * x[None, :], [V]),
    "outer sum": (lambda x: x[:, None] + x, [V]),
    "vector vector": (lambda x, y: x @ y, [V, V]),
    "vector matrix": (lambda x, y: x @ y, [V, f32[12, 5]]),
    "matrix vector": (lambda x, y: x @ y, [X, V]),
    "batch": (lambda x, y: x @ y, [f32[3, "B", 4], f32[3, 4, 5]]),
    "batch of one": (lambda x, y: x @ y, [f32[1, "B", 4], f32[3, 4, 5]]),
    "batch missing": (lambda x, y: x @ y, [f32[2, 3, "B", 4], f32[4, 5]]),
    "batch crossed": (lambda x, y: x @ y, [f32[2, 1, "B", 4], f32[3, 4, 5]]),
    "batch vector": (lambda x, y: x @ y, [f32[2, 3, 4], f32[4]]),
    "inner of one": (lambda x, y: x @ y, [f32["B", 1], f32[1, 5]]),
    "row of one": (lambda x, y: x @ y, [f32[1, 4], f32[4, 1]]),
    "transpose": (lambda x: x.transpose(0, 1), [X]),
    "T of a product": (lambda x, y: (x @ y).T, [X, f32[12, 7]]),
    "permute": (lambda x: x.permute(2, 0, 1), [f32["B", 3, 4]]),
    "the input": (lambda x: x, [X]),
    "reshape split": (lambda x: x.reshape(x.shape[0], 3, 4).sum(1), [X]),
    "reshape -1": (lambda x: x.view(-1, 3, 4).amax(-1), [X]),
    "reshape merge": (lambda x: (x + 1).reshape(x.shape[0], -1) * 2, [f32["B", 3, 4]]),
    "reshape all": (lambda x: x.reshape(-1), [f32[3, 4]]),
    "reshape ones": (lambda x: x.reshape(1, 12, 1) + 1, [f32[3, 4]]),
    "reshape refine": (lambda x: x.reshape(4, 3).sum(0), [f32[2, 6]]),
    "reshape boundary": (lambda x: x.reshape(6, 2).sum(0), [f32[4, 3]]),
    "reshape boundary transposed": (lambda x: x.T.reshape(2, 6), [f32[4, 3]]),
    "reshape boundary inside": (lambda x: x.reshape(x.shape[0], 6, 2, 5) + 1, [f32["B", 4, 3, 5]]),
    "flatten transposed": (lambda x: x.T.flatten() * 2, [f32[4, 3]]),
    "fold against fold": (lambda x, y: x.flatten() + y.flatten(), [f32[4, 3], f32[6, 2]]),
    "fold against refined": (lambda x, y: x.flatten() * y.flatten(), [f32[2, 6], f32[4, 3]]),
    "split late": (lambda x: (x @ x.T).sum() + x.reshape(x.shape[0], 3, 4).amax(-1).sum(), [X]),
    "heads": (lambda x, w: (x @ w).view(-1, 3, 4).transpose(0, 1), [X, f32[12, 12]]),
    "heads and back": (
        lambda x: x.view(-1, 3, 4).transpose(0, 1).exp().transpose(0, 1).reshape(-1, 12),
        [X],
    ),
    "unsqueeze": (lambda x: x.unsqueeze(-1) * x.unsqueeze(1), [X]),
    "squeeze": (lambda x: x.squeeze(1) + 1, [f32["B", 1, 4]]),
    "expand": (lambda x: x.expand(5, 12), [f32[1, 12]]),
    "expand sum": (lambda x: x.expand(5, 12).sum(0), [f32[12]]),
    "expand mean": (lambda x: x.unsqueeze(0).expand(5, -1).mean(), [f32[12]]),
    "expand matmul": (lambda x, y: x.expand(4, 12).T @ y, [f32[12], f32[4, 3]]),
    "expand both": (lambda x, y: x.expand(3, 4).T @ y.expand(3, 5), [f32[4], f32[5]]),
    "expand reshape": (lambda x: (x.unsqueeze(1).expand(4, 3, 2).reshape(12, 2) + 1).sum(1), [f32[4, 2]]),
    "expand boundary": (lambda x: x.unsqueeze(1).expand(4, 3).reshape(6, 2), [f32[4]]),
    "slice": (lambda x: x[:, 2:7], [X]),
    "slice step": (lambda x: x[:, 1::3], [X]),
    "slice rows": (lambda x: x[1:] - x[:-1], [f32[7, 3]]),
    "slice one": (lambda x: x[:, 3:4] * x, [X]),
    "slice symbolic": (lambda x: x[1:3] + 1, [f32[Dim("S", 3, 9), 12]]),
    "index": (lambda x: x[:, 3], [X]),
    "index negative": (lambda x: x[..., -1] * 2, [f32["B", 3, 4]]),
    "index none": (lambda x: x[:, None, :, None], [X]),
    "slice then heads": (lambda x: x[:, 4:].reshape(-1, 2, 4).sum(1), [X]),
    "slice then odd heads": (lambda x: x[:, 2:].reshape(-1, 2, 5).sum(1), [X]),
    "heads then slice": (lambda x: x.reshape(-1, 3, 4).flatten(1)[:, 4:] * 1, [X]),
    "heads then odd slice": (lambda x: x.reshape(-1, 3, 4).flatten(1)[:, 3:9] + 0, [X]),
    "heads and odd slice": (lambda x: x[:, 3:9].sum(1) + x.reshape(-1, 3, 4).amax(1).sum(1), [X]),
    "qkv": (
        lambda x, w: [h.reshape(-1, 2, 2).transpose(0, 1) * 1 for h in (x @ w).split(4, 1)],
        [X, f32[12, 12]],
    ),
    "chunk": (lambda x: [c * 2 for c in x.chunk(3, dim=-1)], [X]),
    "unbind": (lambda x: x.unbind(1), [f32["B", 3]]),
    "slice of expanded": (lambda x: (x.expand(6, 12) + 1)[2:4], [f32[12]]),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 0) + 1, [f32[2, 3]]),
    "gqa heads": (
        lambda q, k: q @ k.repeat_interleave(2, dim=0).transpose(-1, -2),
        [f32[4, "L", 3], f32[2, "S", 3]],
    ),
    "compare": (lambda x, y: (x < y) & ~(x >= 0) | (y != 0), [X, Y]),
    "masked_fill": (lambda x, m: x.masked_fill(m, 0.5), [X, bool_["B", 12]]),
    "int and float": (lambda x, n: x * n + n, [X, i64[12]]),
    "int by int": (lambda n, m: (n + 1) / (m + 2), [i64[12], i64[12]]),
    "int sum": (lambda n: n.sum() * 2, [i64["B", 12]]),
    "scalars": (lambda x: x.mean() * x + x.sum(), [X]),
    "rows by index": (lambda x, n: x[n - 2] + 1, [f32[6, 12], i64[5]]),
    "columns by index": (lambda x, n: x[:, n], [X, i64[5]]),
    "columns by index, then rows": (lambda x, n: x[1:, n, None], [f32[6, 12], i64[5]]),
    "index of two dimensions": (lambda x, n: x[:, n], [f32["B", 12, 3], i64[5, 2]]),
    "rows of a permutation": (lambda x, n: x + x[n], [f32[6, 12], i64[6]]),
    "heads by index": (lambda x, n: x.reshape(-1, 3, 4)[:, n] + x.reshape(-1, 3, 4), [X, i64[3]]),
    "merged axes by index": (lambda x, n: x.reshape(6, 4)[n] + x.flatten(0, 1)[n], [f32[2, 3, 4], i64[5]]),
    "pages by index": (lambda q, x, n: q @ x[n].reshape(10, 4).T, [f32["B", 4], f32[7, 2, 4], i64[5]]),
    "rows of a repeated value": (lambda x, n: x.expand(6, 12)[n], [f32[12], i64[5]]),
    "several": (lambda x: (x + 1, x.T, x.sum()), [X]),
    "twice": (lambda x: (x + 1, (x + 1).T), [X]),
    "same twice": (lambda x: ((y := x * 2), y.T, y), [X]),
    "zero dimensions": (lambda x, y: x * y, [f32[()], X]),
    "sharing an axis": (lambda x: (x @ x.T) @ x, [X]),
    "attention on itself": (lambda x: (x @ x.T).softmax(-1) @ x + x, [X]),
    "scores added": (lambda x: x @ x.T + x @ x.T @ (x @ x.T), [f32[4, 6]]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_traced_function_computes_what_torch_does(name):
    fn, specs = CASES[name]
    agree(fn, specs)


PAIRS = {
    "gelu": (lambda x: mg.gelu(x), lambda x: F.gelu(x), [X]),
    "gelu tanh": (lambda x: mg.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), [X]),
    "silu": (mg.silu, F.silu, [X]),
    "maximum": (lambda x, y: mg.maximum(x, y), torch.maximum, [X, Y]),
    "minimum": (lambda x, y: mg.minimum(x, 0.25), lambda x, y: x.clamp(max=0.25), [X, Y]),
    "where": (lambda m, x: mg.where(m, x, 0), lambda m, x: torch.where(m, x, 0.0), [bool_["B", 12], X]),
    "where broadcast": (
        lambda m, x, y: mg.where(m, x, y),
        torch.where,
        [bool_["B", 1], f32[12], f32["B", 12]],
    ),
    "take": (lambda x, n: mg.take(x, n, 1), lambda x, n: x[:, n], [X, i64[5]]),
    "scatter_add": (
        lambda x, n: mg.scatter_add(x, n - 1, 4),
        lambda x, n: torch.zeros(4, 12).index_add(0, (n - 1) % 4, x),
        [f32[6, 12], i64[6]],
    ),
    "scatter_add along columns": (
        lambda x, n: mg.scatter_add(x, n, 9, axis=1) + 1,
        lambda x, n: torch.zeros(5, 9).index_add(1, n, x) + 1,
        [X, i64[12]],
    ),
    "scatter_add of two dimensions": (
        lambda x, y, n: mg.scatter_add(x, n, y.shape[0]) * y,
        lambda x, y, n: torch.zeros(5, 4).index_add(0, n.flatten(), x.flatten(0, 1)) * y,
        [f32[3, 2, 4], f32["B", 4], i64[3, 2]],
    ),
    "scatter_add into heads": (
        lambda x, n: mg.scatter_add(x, n, 6).reshape(2, 3, 4).sum(1),
        lambda x, n: torch.zeros(6, 4).index_add(0, n, x).reshape(2, 3, 4).sum(1),
        [f32[5, 4], i64[5]],
    ),
    "rms_norm": (
        lambda x, g: mg.rms_norm(x, g, eps=1e-5),
        lambda x, g: F.rms_norm(x, (12,), g, 1e-5),
        [X, V],
    ),
    "rms_norm other axis": (
        lambda x, g: mg.rms_norm(x, g, axis=0),
        lambda x, g: F.rms_norm(x.T, (4,), g, 1e-6).T,
        [f32[4, "B"], f32[4]],
    ),
    "layer_norm": (mg.layer_norm, lambda x, w, b: F.layer_norm(x, (12,), w, b), [X, V, V]),
    "layer_norm two": (
        lambda x, w: mg.layer_norm(x, w, axis=(-2, -1)),
        lambda x, w: F.layer_norm(x, (3, 4), w),
        [f32["B", 3, 4], f32[3, 4]],
    ),
    "logsumexp": (lambda x: mg.logsumexp(x), lambda x: x.logsumexp(-1), [X]),
    "linear": (mg.linear, F.linear, [X, f32[7, 12], f32[7]]),
    "concat": (lambda x, y: mg.concat([x, y, x], -1), lambda x, y: torch.cat([x, y, x], -1), [X, f32["B", 5]]),
    "concat rows": (lambda x, y: mg.concat([x, y]), lambda x, y: torch.cat([x, y]), [f32[2, 3], f32[1, 3]]),
    "concat with itself": (lambda x: mg.concat([x, x.T], 1), lambda x: torch.cat([x, x.T], 1), [f32[4, 4]]),
    "concat then heads": (
        lambda x, y: mg.concat([x, y], 1).reshape(-1, 3, 4).sum(1),
        lambda x, y: torch.cat([x, y], 1).reshape(-1, 3, 4).sum(1),
        [f32["B", 4], f32["B", 8]],
    ),
    "concat then odd heads": (
        lambda x, y: mg.concat([x, y], 1).reshape(-1, 3, 4).sum(1),
        lambda x, y: torch.cat([x, y], 1).reshape(-1, 3, 4).sum(1),
        [f32["B", 5], f32["B", 7]],
    ),
    "concat of heads": (
        lambda x, y: mg.concat([x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)], 1),
        lambda x, y: torch.cat([x.transpose(0, 1).flatten(1), y.transpose(0, 1).flatten(1)], 1),
        [f32[2, "B", 4], f32[3, "B", 2]],
    ),
    "stack": (lambda x, y: mg.stack([x, y], 1) * 1, lambda x, y: torch.stack([x, y], 1), [X, Y]),
    "rotary": (
        lambda x, c, s: x * c + mg.concat([-x[..., 6:], x[..., :6]], -1) * s,
        lambda x, c, s: x * c + torch.cat([-x[..., 6:], x[..., :6]], -1) * s,
        [X, Y, Y],
    ),
    "iota": (lambda x: x * mg.iota(x.shape[1]), lambda x: x * torch.arange(12), [X]),
    "iota split": (
        lambda x: (x * mg.iota(x.shape[1])).reshape(-1, 3, 2, 2).sum(-1),
        lambda x: (x * torch.arange(12)).reshape(-1, 3, 2, 2).sum(-1),
        [X],
    ),
    "tril": (mg.tril, torch.tril, [f32["B", 12]]),
    "triu": (lambda x: mg.triu(x, 1), lambda x: torch.triu(x, 1), [f32["B", 12]]),
    "sizes": (
        lambda x: x / x.shape[-1] + x.shape[0] - (x.shape[-1] - 1) * 2,
        lambda x: x / 12 + 5 - 22,
        [X],
    ),
    "size of a product": (
        lambda x: x.reshape(-1, 3, 4).flatten(1) * x.shape[1] ** -0.5,
        lambda x: x / math.sqrt(12),
        [X],
    ),
    "static square root": (lambda x: x / math.sqrt(x.shape[1]), lambda x: x / math.sqrt(12), [X]),
    "attention": (
        mg.attention,
        F.scaled_dot_product_attention,
        [f32[2, 3, "L", 4], f32[2, 3, "S", 4], f32[2, 3, "S", 5]],
    ),
    "causal attention": (
        lambda q, k, v: mg.attention(q, k, v, causal=True, scale=0.5),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5),
        [f32[2, "S", 4], f32[2, "S", 4], f32[2, "S", 4]],
    ),
    "masked softmax": (
        lambda x: mg.softmax(mg.masked_fill(x, mg.iota(x.shape[1]) > 7, -math.inf)),
        lambda x: x.masked_fill(torch.arange(12) > 7, -math.inf).softmax(-1),
        [X],
    ),
    "additive mask": (
        lambda x: mg.softmax(x * 2 + mg.where(mg.iota(x.shape[1]) < 5, 0.0, -math.inf)),
        lambda x: (x * 2 + torch.where(torch.arange(12) < 5, 0.0, -math.inf)).softmax(-1),
        [X],
    ),
    "stable masked softmax": (
        lambda x: _stable(mg.where(mg.causal_mask(x.shape[0], x.shape[1]), x, -math.inf)),
        lambda x: x.masked_fill(torch.ones(5, 12).tril() == 0, -math.inf).softmax(-1),
        [X],
    ),
    "masked views": (
        lambda x: mg.where(mg.iota(x.shape[1]) < 5, x, -math.inf).T[1:].softmax(0),
        lambda x: x.masked_fill(torch.arange(12) >= 5, -math.inf).T[1:].softmax(0),
        [X],
    ),
}


def _stable(x):
    e = mg.exp(x - mg.max(x, -1, keepdims=True))
    return e / mg.sum(e, -1, keepdims=True)


@pytest.mark.parametrize("name", PAIRS)
def test_a_function_of_the_language_computes_what_its_namesake_in_torch_does(name):
    fn, torch_fn, specs = PAIRS[name]
    agree(fn, specs, torch_fn)


EINSUMS = ["ij,jk->ik", "ij,kj->ki", "bij,bjk->bik", "ij,ij->", "ij->ji", "ij->", "i,j->ij", "ij,jk,kl->il", "ij,jk"]
EINSUMS += ["...ij,jk->...ik", "bhqd,bhkd->bhqk", "i,ij,j->"]


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum_computes_what_torch_does(equation):
    sizes = {c: n for n, c in enumerate("ijklbhqd", start=2)}
    terms = equation.split("->")[0].replace("...", "bh").split(",")
    specs = [f32[tuple(sizes[c] for c in term)] for term in terms]
    agree(lambda *xs: mg.einsum(equation, *xs), specs, lambda *xs: torch.einsum(equation, *xs))


def test_einsum_letters_name_the_axes():
    p = agree(lambda x, y: mg.einsum("bhq,bhk->qk", x, y), [f32[2, 3, 4], f32[2, 3, 5]],
              lambda x, y: torch.einsum("bhq,bhk->qk", x, y))  # fmt: skip
    assert [str(i.tensor) for i in p.inputs] == ["arg0: f32[b, h, q]", "arg1: f32[b, h, k]"] or set(p.axes()) == set(
        "bhqk"
    )


SHAPES = st.sampled_from([(4,), (1,), (3, 4), (3, 1), (1, 4), (2, 3, 4), (2, 1, 1), (4, 4), (1, 1), (2, 4, 4)])


STEPS = ["add", "mul", "sub", "matmul", "T", "sum", "max", "exp", "reshape", "unsqueeze", "slice", "expand", "cat"]


@st.composite
def expressions(draw):
    """A random program as a list of steps over a growing pool of tensors; torch decides which steps are legal."""
    shapes = draw(st.lists(SHAPES, min_size=2, max_size=3))
    count = draw(st.integers(2, 7))
    steps = [
        (
            draw(st.sampled_from(STEPS)),
            draw(st.integers(0, 50)),
            draw(st.integers(0, 50)),
            draw(st.integers(0, 50)),
        )
        for _ in range(count)
    ]  # fmt: skip
    return shapes, steps


def _apply(step, pool, cat):
    name, i, j, n = step
    x, y = pool[i % len(pool)], pool[j % len(pool)]
    axis = n % max(len(x.shape), 1)
    match name:
        case "add":
            return x + y
        case "mul":
            return x * y
        case "sub":
            return x - y
        case "matmul":
            return x @ y
        case "T":
            return x.transpose(axis, -1)
        case "sum":
            return x.sum(axis, keepdim=bool(j % 2))
        case "max":
            return x.amax(axis, keepdim=bool(j % 2))
        case "exp":
            return (x * 0.1).exp()
        case "reshape":
            return x.reshape(*[(-1,), (2, -1), (4, -1), (-1, 3), (2, 3, -1), (-1, 4, 2)][n % 6])
        case "unsqueeze":
            return x.unsqueeze(axis)
        case "slice":
            return x[..., n % 3 :: 1 + j % 2]
        case "expand":
            return x.expand(*[(3, 4), (2, 3, 4), (4, 4), (2, 4, 4)][n % 4])
        case "cat":
            return cat([x, y], axis)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(expressions())
def test_random_programs_agree_with_torch(case):
    """A step that torch refuses is refused by the trace as well; all others compute the same."""
    shapes, steps = case
    draw = np.random.default_rng(0)
    pool = [torch.from_numpy(draw.standard_normal(s)) for s in shapes]
    legal = []
    for step in steps:
        try:
            result = _apply(step, pool, torch.cat)
        except (RuntimeError, IndexError):
            continue
        if result.numel() and result.dim() <= 4:
            legal.append(step)
            pool.append(result)

    def run(*xs, cat):
        made = list(xs)
        for step in legal:
            made.append(_apply(step, made, cat))
        return tuple(made[len(xs) :]) or (xs[0] + 0,)

    specs = [f32[s] for s in shapes]
    agree(lambda *xs: run(*xs, cat=mg.concat), specs, lambda *xs: run(*xs, cat=torch.cat))


TORCH = {"f16": torch.float16, "f32": torch.float32, "i64": torch.int64}


def test_half_precision_promotes_as_in_torch():
    cases = [(f16["B", 4], f32["B", 4]), (f16["B", 4], f32[()]), (f16["B", 4], i64[4]), (f32[()], f16[1, 1])]
    for a, b in cases:
        p = agree(lambda x, y: x * y + 1, [a, b])
        e = [torch.ones([1] * len(x.shape), dtype=TORCH[str(x.dtype)]) for x in (a, b)]
        want = str((e[0] * e[1] + 1).dtype).removeprefix("torch.float")
        assert str(p.tensors()[p.outputs[0].value].dtype) == f"f{want}"


def test_the_comparison_with_torch_can_fail():
    with pytest.raises(AssertionError):
        agree(lambda x: x @ x.T, [f32[3, 3]], lambda x: x.T @ x)
    with pytest.raises(AssertionError):
        agree(lambda x: x.sum(-1, keepdims=True), [X], lambda x: x.sum(-1))
