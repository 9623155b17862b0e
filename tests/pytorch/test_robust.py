"""A decorated function never raises where the original does not, and gives what it gives."""

from __future__ import annotations

import copy
import functools
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import mugraph as mg
from mugraph.errors import CaptureError, FallbackWarning, InterruptedWarning, MugraphError, SettingError
from mugraph.search import setup

S = mg.superoptimize


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "robust"))


def R(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(found: Any, wanted: Any, near: float = 1e-4) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(wanted)
    torch.testing.assert_close(found, wanted, rtol=near, atol=near, equal_nan=True)


def gated(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ w1) * (x @ w2)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.up(self.norm(x)))


# -- functions that are not understood run as they were written


def sorts(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).sort(-1).values * 2


def branches(x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 0:
        return x * 2
    return x - 1


def draws(x: torch.Tensor) -> torch.Tensor:
    return x + 0 * torch.rand_like(x)


def writes(x: torch.Tensor) -> torch.Tensor:
    return x.add_(1) * 2


def appends(x: torch.Tensor, seen: list[int]) -> torch.Tensor:
    seen.append(1)
    return x * 2


@pytest.mark.parametrize("fn", [sorts, branches, draws, lambda x: torch.linalg.inv(x), lambda x: x.view(torch.int32)])
def test_unsupported_functions_run_as_written_with_one_warning(fn: Callable[..., Any]) -> None:
    fast, x = S(fn), R(6, 6)
    with pytest.warns(FallbackWarning, match="runs as it was written"):
        same(fast(x), fn(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fast(-x), fn(-x))
    assert "try:" in fast.report


def test_the_report_names_operator_line_and_remedy() -> None:
    fast = S(sorts)
    with pytest.warns(FallbackWarning):
        fast(R(4, 4))
    assert "aten.sort" in fast.report
    assert "test_robust.py" in fast.report
    assert "x).sort(-1)" in fast.report
    assert "try: keep it outside" in fast.report


def test_writing_into_an_argument_is_done_to_the_argument() -> None:
    fast, x, y = S(writes), R(4, 4), R(4, 4)
    with pytest.warns(FallbackWarning, match="writes into"):
        same(fast(x), writes(y))
    same(x, y)
    fast(x)
    writes(y)
    same(x, y)


def test_writing_into_values_of_its_own_is_understood() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1).relu_()
        y[:, 0] = 0
        z = torch.zeros_like(x)
        z.copy_(y)
        return z.mul_(3)

    def simple(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1)
        y.relu_()
        return y.mul_(x)

    fast, x = S(simple, strict=True), R(4, 4)
    kept = x.clone()
    same(fast(x), simple(x))
    assert torch.equal(x, kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        same(S(fn)(x), fn(x))


# -- arguments


def layouts() -> dict[str, torch.Tensor]:
    base = R(40, 40)
    return {
        "permuted": R(16, 5).T,
        "sliced": base[3:8, 2:18],
        "strided": base[::8, :16],
        "repeated": R(1, 16).expand(5, 16),
        "flipped": base[:5, :16].flip(0),
        "offset": R(100).as_strided((5, 16), (3, 1), 7),
        "negated": torch.imag(torch.complex(R(5, 16), R(5, 16)).conj()),
    }


@pytest.mark.parametrize("layout", layouts())
def test_every_layout_is_taken(layout: str) -> None:
    fast, w1, w2 = S(gated, strict=True), R(16, 8), R(16, 8, seed=1)
    x = layouts()[layout]
    for _ in range(2):
        same(fast(x, w1, w2), gated(x, w1, w2))
        same(fast(x.clone(), w1.T.contiguous().T, w2), gated(x, w1, w2))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_empty_batches_run_the_original(shape: tuple[int, ...]) -> None:
    fast, w = S(gated), R(16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fast(torch.empty(shape), w, w), gated(torch.empty(shape), w, w))
        assert not fast.specialisations
        same(fast(R(3, 16), w, w), gated(R(3, 16), w, w))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Box:
    value: torch.Tensor
    scale: float


def test_nested_results_keep_their_structure() -> None:
    def fn(x: torch.Tensor, *, options: dict[str, Any]) -> Any:
        h = torch.relu(x @ x) * options["scale"]
        return {"h": h, "pair": Pair(h + 1, h * 2), "list": [h.sum(), (x, 3, None)]}

    fast, x = S(fn, strict=True), R(4, 4)
    for scale in (2.0, 3.0, 2.0):
        same(fast(x, options={"scale": scale}), fn(x, options={"scale": scale}))
    assert len(fast.specialisations) == 2


def test_dataclasses_are_taken_and_given() -> None:
    pytree.register_dataclass(Box)

    def fn(box: Box) -> Box:
        return Box(torch.relu(box.value @ box.value) * box.scale, 1.0)

    fast, x = S(fn), R(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found, wanted = fast(Box(x, 2.0)), fn(Box(x, 2.0))
    assert type(found) is Box
    torch.testing.assert_close(found.value, wanted.value)


# -- modes


def test_gradient_modes_may_change_between_calls() -> None:
    fast = S(gated)
    x, w1, w2 = R(5, 16), R(16, 8), R(16, 8, seed=1)
    for wanting in (False, True, False):
        w1.requires_grad_(wanting)
        found, wanted = fast(x, w1, w2), gated(x, w1, w2)
        same(found, wanted)
        assert found.requires_grad is wanted.requires_grad
        with torch.no_grad():
            assert not fast(x, w1, w2).requires_grad
        if wanting:
            (a,) = torch.autograd.grad(found.sum(), w1)
            (b,) = torch.autograd.grad(wanted.sum(), w1)
            same(a, b)


def test_inference_mode_before_and_after() -> None:
    fast, model = S(Small().eval()), Small().eval()
    x = R(3, 8)
    with torch.inference_mode():
        same(fast(x), model(x))
        same(fast(x), model(x))
    same(fast(x), model(x))
    assert fast(x).requires_grad


def test_autocast_is_part_of_the_signature() -> None:
    fast, args = S(gated, strict=True), (R(5, 16), R(16, 8), R(16, 8, seed=1))
    for _ in range(2):
        same(fast(*args), gated(*args))
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                same(fast(*args), gated(*args), near=5e-2)
                with torch.autocast("cpu", enabled=False):
                    same(fast(*args), gated(*args))
    assert len(fast.specialisations) == 3


def test_autocast_that_rounds_on_the_way_runs_the_original() -> None:
    fast, model, x = S(Small().eval()), Small().eval(), R(3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        same(fast(x), model(x), near=5e-2)
        assert fast(x).dtype is model(x).dtype
    with torch.no_grad():
        same(fast(x), model(x))


def test_hooks_that_come_and_go() -> None:
    model = Small().eval()
    fast, x = S(model), R(3, 8)
    with torch.no_grad():
        wanted = model(x)
        same(fast(x), wanted)
        handle = model.up.register_forward_hook(lambda module, given, found: found * 0)
        with pytest.warns(FallbackWarning, match="hooks"):
            same(fast(x), model(x))
        assert not torch.allclose(fast(x), wanted)
        handle.remove()
        same(fast(x), wanted)


@pytest.mark.parametrize("target", ["weight", "flag", "attribute", "submodule", "data", "type"])
def test_what_changes_after_a_call_is_seen_by_the_next(target: str) -> None:
    """The short way of a repeated call looks at all that the long one looks at."""
    model = Small().eval()
    fast, x = S(model), R(3, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for _ in range(3):
            same(fast(x), model(x))
        assert fast._prepared
        match target:
            case "weight":
                model.up.weight = nn.Parameter(R(12, 8, seed=5))
            case "flag":
                model.train()
            case "attribute":
                model.norm.eps = 1.0
            case "submodule":
                model.norm = nn.Identity()
            case "data":
                model.up.weight.data = R(12, 8, seed=6)
            case "type":
                model.double()
                x = x.double()
        for _ in range(3):
            same(fast(x), model(x))


def test_globals_cells_and_code_are_seen_on_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = 2.0

    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * scale * FACTOR

    fast, x = S(fn), R(4, 4)
    for _ in range(3):
        same(fast(x), fn(x))
    assert fast._prepared
    scale = 3.0
    same(fast(x), torch.relu(x) * 9)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    same(fast(x), torch.relu(x) * 15)
    fn.__code__ = (lambda x: x * scale).__code__
    same(fast(x), x * 3)


FACTOR = 3.0


# -- copies, threads, transforms


def test_copies_and_pickles_of_a_used_function_work() -> None:
    fast, x = S(Small().eval()), R(3, 8)
    with torch.no_grad():
        wanted = fast(x)
        fast(x)
        same(copy.deepcopy(fast)(x), wanted)
        same(copy.copy(fast)(x), wanted)
        same(pickle.loads(pickle.dumps(fast))(x), wanted)


def test_threads_share_a_function() -> None:
    fast = S(gated)
    failures: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for i in range(20):
                x, w = R(2 + (n + i) % 5, 8), R(8, 8, seed=n)
                same(fast(x, w, w), gated(x, w, w))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert len(fast.specialisations) <= 3


def test_transforms_run_the_original_after_calls_too() -> None:
    fast, x, w = S(lambda x, w: torch.relu(x @ w)), R(4, 4), R(4, 4, seed=1)
    same(fast(x, w), fast.original(x, w))
    fast(x, w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(torch.vmap(fast, (0, None))(R(3, 4, 4), w), torch.vmap(fast.original, (0, None))(R(3, 4, 4), w))
        same(torch.func.grad(lambda x: fast(x, w).sum())(x), torch.func.grad(lambda x: fast.original(x, w).sum())(x))
        found = torch.func.jvp(lambda x: fast(x, w), (x,), (x,))
        same(found, torch.func.jvp(lambda x: fast.original(x, w), (x,), (x,)))
    same(fast(x, w), fast.original(x, w))


@pytest.mark.full
def test_a_used_function_inside_torch_compile() -> None:
    fast, x, w = S(lambda x, w: torch.relu(x @ w)), R(4, 4), R(4, 4, seed=1)
    fast(x, w)
    fast(x, w)
    same(torch.compile(lambda x: fast(x + 1, w) * 2, backend="eager")(x), fast.original(x + 1, w) * 2)
    same(fast(x, w), fast.original(x, w))


# -- sizes


def test_a_second_size_makes_a_symbol_of_it() -> None:
    fast, w1, w2 = S(gated), R(16, 8), R(16, 8, seed=1)
    for n in (5, 7, 9, 33, 5, 2):
        same(fast(R(n, 16), w1, w2), gated(R(n, 16), w1, w2))
    assert len(fast.specialisations) == 2
    assert [str(d.name) for d in fast.result.program.dims()] == ["s0"]
    same(fast(R(1, 16), w1, w2), gated(R(1, 16), w1, w2))
    assert len(fast.specialisations) == 3


def test_sizes_of_one_broadcast_and_keep_their_signature() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + y) * 2

    fast = S(fn)
    for a, b in ((4, 4), (6, 6), (1, 6), (6, 1), (1, 1), (9, 9)):
        same(fast(R(a, 8), R(b, 8, seed=1)), fn(R(a, 8), R(b, 8, seed=1)))


def test_sizes_that_changed_together_may_come_apart() -> None:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ y.T) * 2

    fast = S(fn)
    for a, b in ((4, 4), (6, 6), (6, 8), (3, 9), (10, 2)):
        same(fast(R(a, 8), R(b, 8, seed=1)), fn(R(a, 8), R(b, 8, seed=1)))
    assert len(fast.specialisations) == 3


def test_sizes_that_a_function_fixes_keep_their_signatures() -> None:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x.view(2, -1)[:, :3]) * x.shape[0]

    fast = S(fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (8, 12, 16):
            same(fast(R(n)), fn(R(n)))
    assert all(s.reason is None for s in fast.specialisations.values())


def test_no_size_becomes_a_symbol_where_that_is_not_wanted() -> None:
    fast = S(gated, dynamic=False)
    w = R(16, 8)
    for n in (5, 7, 9):
        same(fast(R(n, 16), w, w), gated(R(n, 16), w, w))
    assert len(fast.specialisations) == 3


# -- ahead of time


def test_warmup_does_all_that_a_call_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = S(gated, dynamic={"x": {0: mg.Dim("B", 1, 64)}}, strict=True)
    w1, w2 = R(16, 8), R(16, 8, seed=1)
    assert fast.warmup(R(5, 16), w1, w2=w2) is fast
    monkeypatch.setattr(type(fast), "_specialise", None)
    for n in (5, 7, 64, 1):
        same(fast(R(n, 16), w1, w2), gated(R(n, 16), w1, w2))
    with pytest.raises(TypeError, match="missing"):
        fast.warmup(w1)


@pytest.mark.parametrize("given", [(5, 1), (1, 1)])
def test_warmup_prepares_each_size_at_1_and_all(given: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    fn = lambda a, b, c: torch.softmax(a @ b.T, -1) + c  # noqa: E731
    n, m, own = mg.Dim("n", 1, 64), mg.Dim("m", 1, 64), mg.Dim("own", 1, 1)
    fast = S(fn, dynamic={"a": {0: n}, "b": {0: m}, "c": {0: n, 1: own}}, strict=True)
    fast.warmup(R(given[0], 8), R(given[1], 8), c=R(given[0], 1))
    assert len(fast.specialisations) == 4
    assert [d.min for d in fast.result.program.dims()] == [2, 2]
    monkeypatch.setattr(type(fast), "_specialise", None)
    for a, b in ((1, 1), (1, 7), (7, 1), (7, 5), (9, 9), (64, 2)):
        args = R(a, 8), R(b, 8, seed=1), R(a, 1, seed=2)
        same(fast(*args), fn(*args))


def test_warmup_keeps_a_size_that_is_broadcast() -> None:
    rows = mg.Dim("rows", 1, 64)
    fast = S(lambda a, b: torch.relu(a * 2) + b, dynamic={"a": {0: rows}, "b": {0: rows}}, strict=True)
    fast.warmup(R(8, 4), R(1, 4))
    assert [[str(i.tensor.shape[0]) for i in s.result.program.inputs] for s in fast.specialisations.values()] == [
        ["1", "1"],
        ["rows", "1"],
    ]


def test_unknown_options_list_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"known: .*dynamic, strict"):
        S(gated, max_autotune=True)
    with pytest.raises(MugraphError, match="'none' or 'quick' or 'full'"):
        S(gated, effort="maximal")


def test_strict_calls_say_what_is_wrong() -> None:
    with pytest.raises(MugraphError, match="sort"):
        S(sorts, strict=True)(R(4, 4))
    with pytest.raises(MugraphError, match="writes into"):
        S(writes, strict=True)(R(4, 4))


def test_a_warm_cache_needs_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    x, w1, w2 = R(5, 16), R(16, 8), R(16, 8, seed=1)
    S(gated)(x, w1, w2)
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    again = S(gated, strict=True)
    same(again(x, w1, w2), gated(x, w1, w2))
    assert again.result.cached
    with pytest.raises(MugraphError, match="not in the cache"):
        S(lambda x: torch.tanh(x) * 7, strict=True)(x)


PROCESS = """
import torch, mugraph as mg
class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(16), torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)
    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))
torch.manual_seed(0)
fast, x = mg.superoptimize(Layer().eval(), strict=True), torch.randn(3, 16)
with torch.no_grad():
    torch.testing.assert_close(fast(x), fast.original(x), rtol=1e-4, atol=1e-4)
print(fast.result.cached)
"""


@pytest.mark.full
def test_a_second_process_with_a_warm_cache_does_not_search(tmp_path: Path) -> None:
    def printed(**environment: str) -> str:
        own = {**os.environ, "MUGRAPH_CACHE_DIR": str(tmp_path), **environment}
        return subprocess.run(
            [sys.executable, "-c", PROCESS], env=own, check=True, capture_output=True, text=True
        ).stdout

    assert printed() == "False\n"
    assert printed(MUGRAPH_DISALLOW_SEARCH="1") == "True\n"


def test_a_call_that_raises_as_it_was_written_raises_that_alone(caplog: pytest.LogCaptureFixture) -> None:
    fast = mg.superoptimize(lambda x, y: torch.relu(x @ y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            fast(torch.ones(3, 4), torch.ones(3, 4))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_a_branch_on_data_prints_nothing_but_the_warning(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(FallbackWarning, match="data-dependent"):
        mg.superoptimize(lambda x: x + 1 if x.sum() > 0 else x)(torch.ones(3, 4))
    assert capfd.readouterr() == ("", "")


def test_checkpoints_save_and_stop_as_they_do_eagerly() -> None:
    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x @ w, -1) * 2

    x, w = R(5, 8).requires_grad_(), R(8, 6).requires_grad_()
    found = []
    for g in (f, S(f)):
        for _ in range(3):
            checkpoint(g, x, w, use_reentrant=False).square().sum().backward()
            found.append((x.grad, w.grad))
            x.grad = w.grad = None
    for grads in found[1:]:
        same(grads, found[0])


def test_class_methods_have_a_function_for_each_class() -> None:
    class Scaled:
        times = 2

        @classmethod
        @mg.superoptimize
        def run(cls, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x, -1) * cls.times

    class More(Scaled):
        times = 3

    x = R(3, 8)
    for kind in (Scaled, More, Scaled, More):
        same(kind.run(x), torch.softmax(x, -1) * kind.times)
    assert Scaled.run is Scaled.run


def test_a_need_of_a_gradient_is_set_in_the_argument_itself() -> None:
    x = R(3, 8)
    with pytest.warns(FallbackWarning, match="requires_grad_"):
        found = S(lambda x: torch.softmax(x.requires_grad_(), -1) * 2)(x)
    assert x.requires_grad
    assert found.requires_grad


WIDENED = {
    "exp": lambda x: torch.exp(x.double()),
    "product": lambda x: x.double() * x.double(),
    "softmax": lambda x: torch.softmax(x, -1, dtype=torch.float64) * 2,
    "matmul": lambda x: x.double() @ x.double().mT,
    "sum": lambda x: x.sum(-1, dtype=torch.float64) - 1,
    "both": lambda x: (x * 2) * x.double() + 1,
}


@pytest.mark.parametrize("door", ["superoptimize", "compile"])
@pytest.mark.parametrize("name", WIDENED)
@pytest.mark.filterwarnings("ignore::mugraph.errors.FallbackWarning")
def test_what_is_widened_to_f64_is_computed_in_f64(name: str, door: str) -> None:
    f, x = WIDENED[name], R(4, 8) * 100
    options = {"rest": "eager", "parts": "all"}
    fast = S(f) if door == "superoptimize" else torch.compile(f, backend="mugraph", options=options)
    same(fast(x), f(x), 1e-13)


@pytest.mark.full
def test_both_doors_in_several_threads() -> None:
    errors: list[Exception] = []
    models = [nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8)) for _ in range(6)]
    options = {"rest": "eager", "parts": "all"}
    doors = (S, functools.partial(torch.compile, backend="mugraph", options=options))
    fast = [doors[i % 2](model) for i, model in enumerate(models)]

    def run(i: int) -> None:
        try:
            for rows in (3, 4, 5):
                same(fast[i](R(rows, 16)), models[i](R(rows, 16)))
        except Exception as error:
            errors.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []


def test_a_search_that_ctrl_c_ends_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = setup.build

    def build(*given: Any, **named: Any) -> Any:
        monkeypatch.setattr(setup, "build", real)
        signal.raise_signal(signal.SIGINT)
        return real(*given, **named)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    monkeypatch.setattr(setup, "build", build)
    fast, x = S(lambda x: torch.softmax(x.relu() * 3.25, -1) * 7), R(3, 8)
    with pytest.warns(InterruptedWarning, match="best so far"):
        same(fast(x), fast.original(x))
    signal.signal(signal.SIGINT, before)
    assert "interrupted" in fast.report


def test_functions_of_pytorch_as_arguments_are_part_of_the_signature() -> None:
    def layer(x: torch.Tensor, w: torch.Tensor, act: Callable[..., Any] = F.silu) -> torch.Tensor:
        return act(x @ w) * 2

    fast, x, w = S(layer, strict=True), R(4, 8), R(8, 8)
    for act in (F.silu, torch.relu, F.gelu, torch.relu):
        same(fast(x, w, act=act), layer(x, w, act))
    same(fast(x, w), layer(x, w))
    assert len(fast.specialisations) == 3
    with pytest.raises(CaptureError, match="Unsupported input type"):
        fast(x, w, lambda x: x + 1)
