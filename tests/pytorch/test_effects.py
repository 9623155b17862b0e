"""What a function changes besides its result happens once a call, as it was written."""

from __future__ import annotations

import functools
import gc
import itertools
import random
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import pytest
import torch
from torch import nn

import mugraph as mg
from mugraph.errors import CaptureError
from mugraph.pytorch import effects
from mugraph.pytorch.effects import ChangesStateError, Effects, undone

pytestmark = pytest.mark.filterwarnings("ignore::mugraph.errors.FallbackWarning")

X = torch.linspace(-1, 1, 40).reshape(5, 8)
HELD: Any = None


class Box:
    h: Any = torch.zeros(8)

    def __init__(self) -> None:
        self.kept: list[Any] = []


class Slotted:
    __slots__ = ("h",)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "base"):
            self.base = torch.arange(8.0)
        self.inner.h = torch.tanh(x + getattr(self.inner, "h", 0)).mean(0)
        return torch.softmax(x, -1) * self.inner.h + self.base


def counting() -> Callable[..., Any]:
    state = {"n": 0}

    def f(x: torch.Tensor) -> torch.Tensor:
        state["n"] += 1
        return torch.softmax(x, -1) * state["n"]

    return f


def nonlocal_counting() -> Callable[..., Any]:
    n = 0

    def f(x: torch.Tensor) -> torch.Tensor:
        nonlocal n
        n += 1
        return torch.softmax(x, -1) * n

    return f


def with_a_global() -> Callable[..., Any]:
    def f(x: torch.Tensor) -> torch.Tensor:
        global HELD
        HELD = torch.tanh(x + (0 if HELD is None else HELD))
        return HELD * 2

    return f


def with_a_class() -> Callable[..., Any]:
    Box.h = torch.zeros(8)

    def f(x: torch.Tensor) -> torch.Tensor:
        Box.h = torch.tanh(x + Box.h).mean(0)
        return Box.h * 2

    return f


def with_an_object() -> Callable[..., Any]:
    box = Box()

    def f(x: torch.Tensor) -> torch.Tensor:
        box.kept.append(torch.tanh(x))
        return torch.stack(box.kept).sum(0)

    return f


def with_a_slot() -> Callable[..., Any]:
    held = Slotted()

    def f(x: torch.Tensor) -> torch.Tensor:
        held.h = torch.tanh(x) + getattr(held, "h", 0)
        return held.h * 2

    return f


def with_a_queue() -> Callable[..., Any]:
    held: deque[Any] = deque(maxlen=2)

    def f(x: torch.Tensor) -> torch.Tensor:
        held.append(torch.tanh(x) * (1 + len(held)))
        return sum(held) * 2

    return f


def with_itself() -> Callable[..., Any]:
    def f(x: torch.Tensor) -> torch.Tensor:
        f.last = torch.tanh(x) + getattr(f, "last", 0)  # type: ignore[attr-defined]
        return f.last * 2  # type: ignore[attr-defined]

    return f


def drawing() -> Callable[..., Any]:
    numbers, own = np.random.default_rng(0), random.Random(0)

    def f(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1) * float(numbers.random()) * own.random() * float(np.random.rand()) * random.random()

    return f


STATEFUL = (
    counting, nonlocal_counting, with_a_global, with_a_class, with_an_object, with_a_slot, with_a_queue, with_itself,
    drawing, Recurrent,
)  # fmt: skip


@pytest.mark.parametrize("make", STATEFUL, ids=lambda make: make.__name__)
def test_state_is_what_it_would_be(make: Callable[[], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread()])  # whatever other tests have left
    results = []
    for wrap in (lambda f: f, mg.superoptimize):
        global HELD
        HELD = None
        random.seed(0)
        np.random.seed(0)
        f = wrap(make())
        results.append([f(x) for x in (X, X * 2, X, X * 3, X)])
    assert all(type(x) is torch.Tensor for x in results[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_what_the_first_call_fills_is_read_by_an_optimised_second() -> None:
    memo: dict[str, Any] = {}

    @functools.lru_cache
    def table(n: int) -> torch.Tensor:
        return torch.arange(float(n))

    def f(x: torch.Tensor) -> torch.Tensor:
        if "k" not in memo:
            memo["k"] = torch.arange(8.0)
        return torch.softmax(x, -1) * memo["k"] + table(8)

    fast = mg.superoptimize(f)
    for _ in range(3):
        torch.testing.assert_close(fast(X), f(X))
    assert type(memo["k"]) is type(table(8)) is torch.Tensor
    assert fast.result is not None


def test_numbers_that_another_thread_may_have_drawn_are_not_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "enumerate", lambda: [threading.current_thread(), threading.Thread()])
    random.seed(0)
    first = random.random()
    random.seed(0)
    with pytest.raises(ChangesStateError, match="random numbers"), undone(drawing):
        random.random()
    assert random.random() != first


def test_the_reason_names_what_is_changed() -> None:
    fast = mg.superoptimize(with_a_class())
    for _ in range(2):
        fast(X)
    assert "changes what it reads: the class Box" in fast.report


def test_what_changes_nothing_is_let_through_and_what_raises_is_undone_too() -> None:
    held: list[int] = []

    def f() -> None:
        held.append(1)
        raise ValueError

    with undone(counting):
        pass
    with pytest.raises(ValueError), undone(f):
        f()
    assert held == []
    with pytest.raises(ChangesStateError, match="held"), undone(f):
        held.append(1)
    assert held == []


def test_a_walk_goes_through_circles_and_leaves_iterators_alone() -> None:
    ring: list[Any] = [itertools.count()]
    ring.append(ring)
    reached = Effects(lambda: ring)
    ring.pop()
    assert reached.undo() == "ring"
    assert len(ring) == 2


def a_counter() -> Callable[..., Any]:
    counts: Counter[str] = Counter()

    def f(x: torch.Tensor) -> torch.Tensor:
        counts["a"] += 1
        return torch.softmax(x, -1) * counts["a"]

    return f


def a_buffer() -> Callable[..., Any]:
    buffer = torch.zeros(8)

    def f(x: torch.Tensor) -> torch.Tensor:
        buffer.add_(1)
        return torch.softmax(x, -1) * buffer

    return f


def new_data() -> Callable[..., Any]:
    w = torch.ones(8)

    def f(x: torch.Tensor) -> torch.Tensor:
        w.data = w.data + 1
        return torch.softmax(x, -1) * w

    return f


def on_a_tensor() -> Callable[..., Any]:
    w = torch.ones(8)

    def f(x: torch.Tensor) -> torch.Tensor:
        if not hasattr(w, "twice"):
            w.twice = w.detach() * 2  # type: ignore[attr-defined]
        return torch.softmax(x, -1) * w.twice  # type: ignore[attr-defined]

    return f


def a_weak_table() -> Callable[..., Any]:
    table: WeakKeyDictionary[nn.Module, torch.Tensor] = WeakKeyDictionary()
    key = nn.Identity()

    def f(x: torch.Tensor) -> torch.Tensor:
        if key not in table:
            table[key] = torch.arange(8.0)
        return torch.softmax(x, -1) * table[key]

    return f


@dataclass(frozen=True, slots=True)
class Frozen:
    n: int = 0


def a_frozen_slot() -> Callable[..., Any]:
    held = Frozen()

    def f(x: torch.Tensor) -> torch.Tensor:
        object.__setattr__(held, "n", held.n + 1)
        return torch.softmax(x, -1) * held.n

    return f


def a_cached_singleton() -> Callable[..., Any]:
    @functools.cache
    def single() -> SimpleNamespace:
        return SimpleNamespace(n=0)

    def f(x: torch.Tensor) -> torch.Tensor:
        single().n += 1
        return torch.softmax(x, -1) * single().n

    return f


def bound_append() -> Callable[..., Any]:
    kept: list[torch.Tensor] = []
    push = kept.append

    def f(x: torch.Tensor) -> torch.Tensor:
        push(torch.softmax(x, -1))
        return kept[-1] * len(kept)

    return f


def arrays() -> Callable[..., Any]:
    numbers, codes, whole = np.zeros(3), bytearray(3), array("i", [0])

    def f(x: torch.Tensor) -> torch.Tensor:
        numbers[0] += 1
        codes[0] += 1
        whole[0] += 1
        return torch.softmax(x, -1) * (float(numbers[0]) + codes[0] + whole[0])

    return f


def a_context() -> Callable[..., Any]:
    counter = ContextVar(f"counter{random.random()}", default=0)

    def f(x: torch.Tensor) -> torch.Tensor:
        counter.set(counter.get() + 1)
        return torch.softmax(x, -1) * counter.get()

    return f


def seeding() -> Callable[..., Any]:
    torch.manual_seed(0)

    def f(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(torch.initial_seed() + 1)
        return torch.softmax(x, -1) * torch.rand(8)

    return f


HOLDERS = (
    a_counter, a_buffer, new_data, on_a_tensor, a_weak_table, a_frozen_slot, a_cached_singleton, bound_append, arrays,
    a_context, seeding,
)  # fmt: skip


@pytest.mark.parametrize("make", HOLDERS, ids=lambda make: make.__name__)
def test_state_is_what_it_would_be_wherever_it_is_held(make: Callable[[], Callable[..., Any]]) -> None:
    results = []
    for wrap in (lambda f: f, mg.superoptimize):
        f = wrap(make())
        results.append([f(x).clone() for x in (X, X * 2, X, X * 3, X)])
    assert all(type(x) is torch.Tensor for x in results[1])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_a_cache_of_the_user_keeps_what_it_had() -> None:
    @functools.cache
    def named(name: str) -> SimpleNamespace:
        return SimpleNamespace(n=0)

    named("a").n = 5
    mg.superoptimize(lambda x: torch.softmax(x, -1) * (2 + named("b").n))(X)
    assert named("a").n == 5


def test_more_than_is_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "MOST", 10)
    held = [[i] for i in range(100)]
    with pytest.raises(CaptureError, match="reaches more than 10 objects"), undone(lambda: held):
        pass


def test_a_function_that_is_not_optimised_keeps_no_arguments() -> None:
    fast, x = mg.superoptimize(lambda x: torch.sort(x)[0]), X.clone()
    seen = ref(x)
    fast(x)
    del x
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("warm", [False, True])
def test_a_cache_that_each_size_fills_is_no_obstacle(warm: bool) -> None:
    @functools.lru_cache
    def table(rows: int) -> torch.Tensor:
        return torch.arange(float(rows))[:, None]

    fast = mg.superoptimize(lambda x: torch.softmax(x, -1) * table(x.shape[0]), dynamic=False, strict=True)
    for rows in range(2, 8):
        x = X[:1].expand(rows, 8).contiguous()
        if warm:
            fast.warmup(x)
        for _ in range(2):
            torch.testing.assert_close(fast(x), fast.original(x))
    assert {s.reason for s in fast.specialisations.values()} == {None}


def test_what_keeps_changing_does_not_take_away_what_is_optimised() -> None:
    counts = {"n": 0}

    def f(x: torch.Tensor, counted: bool) -> torch.Tensor:
        if counted:
            counts["n"] += 1
        return torch.softmax(x, -1) * 2

    fast = mg.superoptimize(f)
    fast(X, False)
    kept = fast.result
    for _ in range(8):
        fast(X, True)
    assert counts["n"] == 8
    counts["n"] = 0
    fast(X, False)
    assert fast.result is kept
