"""Captured PyTorch functions compute, in the float64 oracle, what they compute eagerly."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mugraph as mg
from mugraph.errors import CaptureError, FallbackWarning, UnsupportedOpError
from mugraph.ir.axes import Dim
from mugraph.ir.evaluate import reference
from mugraph.ir.ops import Contract, Reshape, SizeOf
from mugraph.pytorch.capture import Captured, capture
from tests.dsl.oracle import check_types

D = torch.float64


def rand(*shape):
    return torch.from_numpy(np.random.default_rng(sum(shape)).standard_normal(shape))


def run(captured: Captured, args, bindings=None):
    """The function's results by the oracle."""
    check_types(captured.program)
    inputs = zip(captured.program.inputs, captured.flatten(args), strict=True)
    arrays = {i.name: value.detach().numpy() for i, value in inputs}
    return captured.unflatten([torch.from_numpy(r.copy()) for r in reference(captured.program, arrays, bindings or {})])


def agrees(fn, *args, dynamic=None, others=()):
    captured = capture(fn, args, dynamic)
    for call, bindings in ((args, None), *others):
        if bindings is None:
            bindings = {
                d.name: args[i].shape[place]
                for i, name in enumerate(dynamic or {})
                for place, d in dynamic[name].items()
            }
        torch.testing.assert_close(run(captured, call, bindings), fn(*call), rtol=1e-9, atol=1e-9, check_dtype=False)
    return captured


def unary(x):
    p = x.abs() + 0.5
    return (
        -x,
        x.abs(),
        x.exp(),
        p.log(),
        p.sqrt(),
        p.rsqrt(),
        p.reciprocal(),
        x.square(),
        x.sigmoid(),
        x.relu(),
        x.tanh(),
        F.silu(x),
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        x**2,
        x**3,
        p**0.5,
        p**-1.5,
        2**x,
        torch.exp2(x),
        x.clamp(-0.5, 0.5),
        x.clamp(min=0.1),
        x.clamp(max=0.1),
        F.relu(x) ** 2,
    )


def binary(x, y, v):
    return (
        x + y,
        x - v,
        x * v,
        x / (y * y + 1),
        1 - x,
        2 / (x * x + 1),
        torch.add(x, y, alpha=2),
        torch.sub(x, y, alpha=3),
        torch.maximum(x, y),
        torch.minimum(x, v),
        torch.where(x > y, x, 0.0),
        torch.where(x < 0, y, v),
        x.masked_fill(y > 0, 1.5),
        (x >= y) & (x != v) | ~(x <= 0),
        torch.logical_not(x > 0),
        x.eq(y),
        x * 0.125 + 1e-6,
        torch.rsub(x, y),
        x.T.contiguous().T + v,
        (x > 0).to(x.dtype) * y,
        (x > y).sum(),
        x.type_as(y),
    )


def reductions(x):
    return (
        x.sum(),
        x.sum(-1),
        x.sum((0, 2), keepdim=True),
        x.mean(),
        x.mean(1),
        x.mean((1, 2), keepdim=True),
        x.amax(-1),
        x.amax((0, 1)),
        x.amin(1, keepdim=True),
        x.max(),
        x.min(),
        x.cumsum(1),
        x.softmax(-1),
        F.softmax(x, dim=1),
        F.log_softmax(x, -1),
        x.logsumexp(-1),
        x.logsumexp((0, 2)),
        x.norm(dim=-1),
        F.normalize(x, dim=-1),
        torch.linalg.vector_norm(x, ord=1, dim=1),
        torch.linalg.vector_norm(x, ord=math.inf, dim=-1),
        x.var(-1),
        x.var((1, 2), unbiased=False, keepdim=True),
        x.std(-1),
        torch.var_mean(x, dim=1),
    )


def norms(x, w, b):
    return (
        F.rms_norm(x, (6,)),
        F.rms_norm(x, (6,), w, 1e-5),
        F.layer_norm(x, (6,)),
        F.layer_norm(x, (6,), w, b, 1e-6),
        F.layer_norm(x, (5, 6)),
        F.rms_norm(x, (5, 6), eps=1e-3),
    )


def products(x, y, a, b, v):
    return (
        x @ y,
        torch.mm(x, y),
        F.linear(x, y.T),
        F.linear(x, y.T, v),
        torch.addmm(v, x, y),
        torch.addmm(v, x, y, beta=2, alpha=3),
        a @ b,
        torch.bmm(a, b),
        torch.baddbmm(b[:, :1], a, b),
        a @ b[0],
        a @ b[0, :, 0],
        x @ x.T,
        torch.einsum("bij,bjk->bik", a, b),
        torch.einsum("bij,bjk,k->i", a, b, b[0, 0]),
        torch.dot(x[0], x[1]),
        torch.mv(x, x[0]),
        torch.matmul(a.unsqueeze(1), b),
        torch.einsum("...ij,...jk->...ik", a, b),
    )


def views(x, y):
    q, k, r = x.split(4, -1)
    h, t = x.chunk(2, -1)
    s, u = x.split([3, 9], -1)
    return (
        x.view(2, 5, 3, 4),
        x.reshape(-1, 6) * 1,
        x.permute(2, 0, 1),
        x.transpose(0, 1) + 1,
        y.t(),
        y.T,
        x.unsqueeze(1),
        x[:, :1].squeeze(1),
        x[:, :1].expand(2, 5, 12),
        x[:1].squeeze(),
        x.flatten(1),
        x.flatten(),
        x.unflatten(-1, (3, 4)),
        q * k + r,
        torch.cat([t, h], -1),
        torch.cat([-t, h, x], -1),
        s.sum(1),
        u.amax(1),
        torch.stack([q, k], 1),
        x[:, 1:4],
        x[..., ::3],
        x[0],
        x[:, -1],
        x[None, :, 2],
        x.unbind(0)[1],
        x.narrow(2, 3, 4),
        x.repeat_interleave(3, dim=1),
        x.mT,
        x.movedim(0, 1),
        torch.tril(x),
        torch.triu(x, 1),
        x.clone(),
        x.contiguous(),
        x.swapaxes(1, 2),
        x.select(1, 2),
        x.squeeze(0),
        x.view_as(x),
    )


def fresh(x):
    n = x.shape[-1]
    return (
        x * torch.arange(n),
        x + torch.ones(n, dtype=x.dtype),
        x * torch.full((5, n), 2.0, dtype=x.dtype),
        torch.zeros_like(x) + x,
        torch.full_like(x, 3.0),
        x * torch.arange(1, n + 1),
        x * torch.arange(0, 2 * n, 2),
        torch.tensor(2.0, dtype=D) * x,
        x.masked_fill(torch.ones(5, n, dtype=torch.bool).triu(1), -math.inf).softmax(-1),
        torch.ones_like(x) - x,
        (x + torch.full((5, n), -math.inf, dtype=x.dtype).triu(1)).softmax(-1),
        x.int().double() * 0 + x,
        x.int() * 2,
    )


def attentions(q, k, v, mask):
    kv = k[:, :2], v[:, :2]
    return (
        F.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(q, k, v, scale=0.3),
        F.scaled_dot_product_attention(q, *kv, enable_gqa=True),
        F.scaled_dot_product_attention(q, k, v, is_causal=True),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask * 0.5),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask.abs() >= 0),
    )


def by_index(x, w, at, pairs):
    return (
        x[at],
        x[:, at - 3],
        x[at][:, None] * 2,
        x[pairs].sum(1),
        x.index_select(1, at),
        F.embedding(pairs, w),
        x.index_add(0, at, w[:3], alpha=2),
        torch.zeros(6, 5, dtype=x.dtype).index_add(1, at, x[:, :3]),
    )


FAMILIES = {
    "by index": (by_index, rand(6, 5), rand(6, 5), torch.tensor([3, 0, 3]), torch.tensor([[1, 5], [2, 2], [0, 4]])),
    "unary": (unary, rand(3, 4)),
    "binary": (binary, rand(3, 4), rand(3, 4) + 0.1, rand(4)),
    "reductions": (reductions, rand(3, 4, 5)),
    "norms": (norms, rand(4, 5, 6), rand(6), rand(6) + 1),
    "products": (products, rand(4, 4), rand(4, 5), rand(2, 3, 4), rand(2, 4, 5), rand(5)),
    "views": (views, rand(2, 5, 12), rand(3, 4)),
    "fresh": (fresh, rand(5, 6)),
    "attentions": (attentions, rand(2, 4, 5, 6), rand(2, 4, 7, 6), rand(2, 4, 7, 3), rand(5, 7)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_operators_computes_what_it_does_eagerly(family):
    fn, *args = FAMILIES[family]
    agrees(fn, *args)


B = Dim("B", 1, 256)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: (x * 3).to(torch.float8_e4m3fn).float(),
        lambda x: x - x.bfloat16().float(),
        lambda x: x - x.bfloat16(),
        lambda x: (x * 1e5).half().float(),
    ],
)
def test_rounding_that_a_function_asks_for_is_kept(fn):
    """The algebra has no rounding, so the function runs as it was written."""
    x = torch.tensor([[300.0, 1.26, 1e-4]])
    with pytest.warns(FallbackWarning, match="is rounded from f32"):
        found = mg.superoptimize(fn, target="torch")(x)
    assert torch.equal(found, fn(x))


def test_results_and_arithmetic_in_a_narrow_type_are_no_rounding_on_the_way():
    norms = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for fn, x in ((lambda x: (x * 2).half(), torch.randn(3, 4)), (norms, torch.randn(3, 16).half())):
            torch.testing.assert_close(mg.superoptimize(fn, target="torch")(x), fn(x), rtol=1e-2, atol=1e-2)


def test_a_dynamic_size_becomes_a_symbol():
    def f(x, w):
        h = F.rms_norm(x, (8,)) @ w
        return h.view(x.shape[0], 2, 3).sum(1) / x.shape[0]

    x, w = rand(4, 8), rand(8, 6)
    captured = agrees(f, x, w, dynamic={"x": {0: B}}, others=[((rand(7, 8), w), {"B": 7}), ((rand(1, 8), w), {"B": 1})])
    assert captured.program.dims() == (B,)
    assert any(isinstance(e.op, SizeOf) for e in captured.program.equations)


def _attention(x, w):
    b, s, _ = x.shape
    y = (x @ w).view(b, s, 2, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(b, s, -1) / x.shape[0]


def _when(condition):
    """Something else under a condition on sizes."""

    def f(x, w):
        y = x @ w
        if condition(x):
            y = y.exp()
        return y.relu()

    return f


AT_ONE = {  # the function, and the least of the two sizes of its first argument
    "attention": (_attention, [1, 1]),
    "sizes as numbers": (lambda x, w: (x @ w) * x.shape[0] + x.mean(0), [1, 1]),
    "a reordered copy": (lambda x, w: (x @ w).transpose(0, 1).reshape(-1).exp(), [1, 1]),
    "a branch": (_when(lambda x: x.shape[0] == 1), [2, 1]),
    "a branch on the other": (_when(lambda x: x.shape[1] == 1), [1, 2]),
    "a branch on both": (_when(lambda x: x.shape[0] * x.shape[1] == 1), [2, 2]),
    "squeezed": (lambda x, w: (x @ w).squeeze(0).relu(), [2, 1]),
    "another number": (lambda x, w: x * (3 if x.shape[1] == 1 else 2) + 1, [1, 2]),
    "another constant": (lambda x, w: x * x.new_tensor([1.0] * 7 + [3.0 if x.shape[0] > 1 else 4]) + 1, [2, 1]),
    "refused": (_when(lambda x: 1 // (x.shape[0] - 1) == 5), [2, 1]),
}


@pytest.mark.parametrize("name", AT_ONE)
def test_what_does_not_hold_at_1_begins_at_2(name):
    fn, least = AT_ONE[name]
    sizes = Dim("rows", 1, 256), Dim("columns", 1, 256)
    captured = capture(fn, (rand(4, 5, 8), rand(8, 8)), {"x": dict(enumerate(sizes))})
    found = {d.name: d.min for d in captured.program.dims()}
    assert [found["rows"], found["columns"]] == least
    assert len(captured.notes) == sum(n > 1 for n in least)
    assert all("test_capture.py" in n and " begins at 2: at 1 the function" in n for n in captured.notes)


def test_a_range_from_2_on_is_not_tried_at_1(monkeypatch):
    from mugraph.pytorch import capture as module

    monkeypatch.setattr(module, "_at_one", None)
    fn, _ = AT_ONE["a branch"]
    captured = capture(fn, (rand(4, 5, 8), rand(8, 8)), {"x": {0: Dim("rows", 2, 256)}})
    assert (captured.program.dims()[0].min, captured.notes) == (2, ())


class Block(nn.Module):
    """A pre-norm transformer block with grouped queries, rotary embedding and a gated MLP."""

    def __init__(self, n=16, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.d = heads, groups, n // heads
        self.q, self.o = nn.Linear(n, n, bias=False), nn.Linear(n, n, bias=False)
        self.k, self.v = nn.Linear(n, n // heads * groups), nn.Linear(n, n // heads * groups)
        self.up, self.gate, self.down = nn.Linear(n, 24), nn.Linear(n, 24), nn.Linear(24, n)
        self.norm1, self.norm2 = nn.RMSNorm(n), nn.LayerNorm(n)
        self.register_buffer("cos", rand(9, n // heads))
        self.register_buffer("sin", rand(9, n // heads))

    def rotate(self, x):
        half = self.d // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, x):
        b, s, _ = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, s, -1, self.d).transpose(1, 2) for f in (self.q, self.k, self.v))
        a = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def test_a_transformer_block_is_captured_without_a_reshape_boundary():
    torch.manual_seed(0)
    block = Block().double().eval()
    captured = agrees(block, rand(3, 9, 16), dynamic={"x": {0: B}}, others=[((rand(5, 9, 16),), {"B": 5})])
    p = captured.program
    assert not any(isinstance(e.op, Reshape) for e in p.equations)
    assert sum(isinstance(e.op, Contract) for e in p.equations) == 9
    assert {i.name for i in p.inputs if i.constant} == set(captured.constants) >= {"q_weight", "cos"}


def test_weights_that_a_function_closes_over_are_constants():
    w = rand(4, 3)
    captured = agrees(lambda x: x @ w, rand(2, 4))
    assert [i.constant for i in captured.program.inputs] == [False, True]


def test_structured_arguments_and_results_keep_their_structure():
    def f(pair, scale, table):
        x, y = pair
        return {"sum": x + y * scale, "rest": [table["w"] * 2, None, x]}

    args = ((rand(2, 3), rand(2, 3)), 3, {"w": rand(4)})
    captured = capture(f, args)
    found, expected = run(captured, args), f(*args)
    torch.testing.assert_close(found["sum"], expected["sum"])
    torch.testing.assert_close(found["rest"][0], expected["rest"][0])
    assert found["rest"][1] is None
    with pytest.raises(CaptureError, match="argument 2 is 4, captured was 3"):
        captured.flatten((args[0], 4, args[2]))
    with pytest.raises(CaptureError, match="another structure"):
        captured.flatten((args[0][0], 3, args[2]))


def test_names_come_from_the_function():
    def scale(x, weight):
        return torch.exp(x) * weight

    p = capture(scale, (rand(3), rand(3))).program
    assert (p.name, [i.name for i in p.inputs]) == ("scale", ["x", "weight"])
    assert [e.target.name for e in p.equations] == ["exp", "mul"]
    assert "torch.exp(x) * weight" in str(p.equations[0].where)


def unsupported_sort(x):
    return x.exp().sort(-1).values


def unsupported_masked_output(x):
    return x.masked_fill(x > 0, -math.inf)


def test_an_operator_without_a_meaning_is_named_with_the_line():
    with pytest.raises(UnsupportedOpError) as caught:
        capture(unsupported_sort, (rand(3, 4),))
    error = caught.value
    assert "aten.sort" in error.message
    assert "x.exp().sort(-1).values" in error.where
    assert error.remedy


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda x: x.add_(1), "writes into"),
        (lambda x: F.dropout(x, 0.5), "not supported|dropout"),
        (unsupported_masked_output, "minus infinity"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounded"),
        (lambda x: x[torch.tensor([0, 1]), torch.tensor([0, 1])], "several tensors"),
        (lambda x: x.index_copy(0, torch.tensor([0, 1]), x[1:]), "writing by an index"),
    ],
)
def test_what_cannot_be_expressed_is_refused(fn, match):
    with pytest.raises(UnsupportedOpError, match=match):
        capture(fn, (rand(3, 4),))


def test_what_torch_cannot_export_is_a_capture_error():
    def branch(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"torch\.export cannot capture branch") as caught:
        capture(branch, (rand(3),))
    assert "x.sum() > 0" in caught.value.where
    with pytest.raises(CaptureError, match="no argument y"):
        capture(branch, (rand(3),), {"y": {0: B}})


def test_half_precision_types_are_those_of_torch():
    def f(x, w, m):
        h = F.rms_norm(x, (8,)) @ w
        return h, h.float().softmax(-1).half(), h * m, h.sum(), (h > 0).sum(), h.mean() * m

    args = (torch.ones(4, 8).half(), torch.ones(8, 3).half(), torch.ones(3))
    p = capture(f, args).program
    tensors = p.tensors()
    names = {"f16": torch.float16, "f32": torch.float32, "i64": torch.int64}
    assert [names[str(tensors[o.value].dtype)] for o in p.outputs] == [r.dtype for r in f(*args)]
