"""`torch.compile(model, backend="mugraph")`, for inference."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mugraph import pipeline
from mugraph.errors import FallbackWarning, VerificationError
from mugraph.pytorch import backend
from mugraph.pytorch.backend import GraphReport, reports

ALL = {"rest": "eager", "parts": "all"}  # every part runs, whatever is gained
pytestmark = pytest.mark.usefixtures("fresh_backend")


class Lora(nn.Module):
    """A linear layer with a low-rank addition, normalised and gated: there is something to gain on any device."""

    def __init__(self, width: int = 64, rank: int = 4) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.full = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.gate = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return F.silu(self.gate(y)) * (self.full(y) + self.up(self.down(y))) + x


def compiled(model: Any, options: dict[str, Any] = ALL, **named: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compile(model, backend="mugraph", options=options, **named)
    return found


def agree(model: Callable[..., Any], fast: Callable[..., Any], *args: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(fast(*args), model(*args), rtol=tolerance, atol=tolerance)


def last() -> GraphReport:
    return reports()[-1]


# -- the whole way ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_model_gives_the_same_and_the_report_tells_the_share_taken_over() -> None:
    model = Lora().eval()
    agree(model, compiled(model, fullgraph=True), torch.randn(5, 64))
    report = last()
    assert report.kind == "inference"
    assert 0.5 < report.share <= 1
    assert report.taken == sum(p.nodes for p in report.parts if p.replaced)
    assert "replaced" in str(report)


@torch.no_grad()
def test_what_is_left_goes_to_inductor() -> None:
    model = Lora().eval()

    def around(x: torch.Tensor) -> torch.Tensor:
        return torch.i0(model(torch.i0(x)))

    agree(around, compiled(around, {"parts": "all"}), torch.randn(5, 64))
    assert last().rest == "Inductor"
    assert last().taken
    assert "aten.i0.default" in last().refused


@torch.no_grad()
def test_without_a_compiler_for_the_rest_it_runs_operator_by_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(backend, "_inductor", absent)
    model = Lora().eval()
    fast = compiled(model, {"parts": "all"})
    with pytest.warns(FallbackWarning, match="no C"):
        agree(model, fast, torch.randn(5, 64))
    assert last().rest == "operator by operator"
    assert last().taken


@torch.no_grad()
def test_a_part_without_a_predicted_gain_stays_with_pytorch() -> None:
    def plain(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w)

    agree(plain, compiled(plain, {"rest": "eager"}), torch.randn(64, 64), torch.randn(64, 64))
    assert last().understood == 2
    assert last().taken == 0
    assert "no gain" in last().parts[0].verdict


@torch.no_grad()
def test_a_part_with_a_predicted_gain_is_replaced() -> None:
    def chain(a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (a @ b) @ v  # a (b v) is far less work

    agree(chain, compiled(chain, {"rest": "eager"}), torch.randn(64, 512), torch.randn(512, 512), torch.randn(512, 1))
    assert last().share == 1
    assert "µs predicted" in last().parts[0].verdict


@torch.no_grad()
def test_one_operator_is_no_part() -> None:
    agree(torch.softmax, compiled(torch.softmax), torch.randn(5, 64), -1)
    assert last().parts == ()


# -- dynamic sizes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_symbolic_sizes_compile_once() -> None:
    model = Lora().eval()
    fast = compiled(model, dynamic=True)
    for batch, rows in ((2, 3), (7, 5), (64, 9)):
        agree(model, fast, torch.randn(batch, rows, 64))
    assert len(reports()) == 1
    assert {d.name for d in last().parts[0].result.program.dims()} == {"s0", "s1"}


@torch.no_grad()
def test_a_size_outside_the_range_runs_the_part_as_it_was() -> None:
    model = Lora().eval()
    fast = compiled(model, dynamic=True)
    fast(torch.randn(5, 64))
    (runner,) = {id(r): r for r in _runners_of(fast, torch.randn(5, 64))}.values()
    assert runner.part.limits
    ran: list[int] = []
    runner.run = lambda *inputs: ran.append(1)
    assert not all(limit.holds([torch.zeros(0, 64)] * 8) for limit in runner.part.limits)
    arguments = [n.meta["val"] for n in runner.original.graph.nodes if n.op == "placeholder"]
    empty = [_sized(x, 0) for x in arguments]
    runner(*empty)
    assert not ran
    assert not runner.failed


def _runners_of(fast: Callable[..., Any], *args: Any) -> list[backend.Runner]:
    """The runners that a call reaches."""
    met: list[backend.Runner] = []
    forward = backend.Runner.forward

    def noted(self: backend.Runner, *given: Any) -> Any:
        met.append(self)
        return forward(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.Runner, "forward", noted)
        fast(*args)
    return met


def _sized(fake: Any, size: int) -> Any:
    """An argument like the fake one, with `size` for its symbolic sizes."""
    if not isinstance(fake, torch.Tensor):
        return size
    return torch.zeros([s if isinstance(s, int) else size for s in fake.shape], dtype=fake.dtype)


@torch.no_grad()
def test_empty_batches_run() -> None:
    model = Lora().eval()
    for dynamic in (False, True):
        torch._dynamo.reset()
        fast = compiled(model, dynamic=dynamic)
        agree(model, fast, torch.randn(0, 64))
        agree(model, fast, torch.randn(1, 64))


@torch.no_grad()
def test_python_numbers_are_constants_of_the_graph() -> None:
    def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.relu(x * scale) + scale

    fast = compiled(scaled, dynamic=True)
    for scale in (0.5, 2.0, 0.5):
        agree(lambda x: scaled(x, scale), lambda x: fast(x, scale), torch.randn(5, 8))  # noqa: B023
    assert len(reports()) == 2
    assert len(last().parts[0].result.program.inputs) == 1


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"efort": "full"}, "known: target, space, effort"),
        ({"effort": "hard"}, "'none' or 'quick' or 'full'"),
        ({"target": "cuda:1"}, "cuda"),
        ({"budget_seconds": -1}, "above 0"),
        ({"rest": "tvm"}, "inductor, eager"),
        ({"parts": "some"}, "faster, all"),
    ],
)
def test_a_wrong_option_is_refused_and_the_right_ones_are_listed(options: dict[str, Any], told: str) -> None:
    with pytest.raises(Exception, match=told):
        compiled(Lora(), options)(torch.randn(5, 64))


def test_a_wrong_mode_is_refused_and_the_right_ones_are_listed() -> None:
    with pytest.raises(Exception, match="reduce-overhead"):
        torch.compile(Lora(), backend="mugraph", mode="fast")(torch.randn(5, 64))


@torch.no_grad()
def test_options_and_modes_that_there_are_are_taken() -> None:
    model = Lora().eval()
    options = {"effort": "full", "budget_seconds": 60.0, "target": "torch", **ALL}
    agree(model, compiled(model, options), torch.randn(5, 64))
    assert last().taken
    torch._dynamo.reset()
    checked = backend.checked_options({"rest": "eager"}, "reduce-overhead")
    assert checked.inductor == {"triton.cudagraphs": True}


@torch.no_grad()
def test_emitted_kernels_run_in_the_place_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_INTERPRET", "1")

    def gated(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ w1) * (x @ w2)

    args = torch.randn(5, 32), torch.randn(32, 16), torch.randn(32, 16)
    for rest in ("eager", "inductor"):
        torch._dynamo.reset()
        agree(gated, compiled(gated, {"target": "cuda:90", "rest": rest}), *args)
        assert last().share == 1
        assert last().parts[0].result.has_kernels


# -- what is seen again ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_parts_seen_before_are_not_searched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Lora().eval(), torch.randn(5, 64)
    agree(model, compiled(model), x)
    torch._dynamo.reset()
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    other = Lora().eval()  # the same parts, with other weights
    agree(other, compiled(other), x)
    assert last().taken
    assert last().parts[0].result.cached


@torch.no_grad()
def test_where_no_search_is_allowed_the_part_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    model = Lora().eval()
    with pytest.warns(FallbackWarning, match="MUGRAPH_DISALLOW_SEARCH"):
        agree(model, compiled(model), torch.randn(5, 64))
    assert last().taken == 0


@torch.no_grad()
def test_a_part_runs_for_other_weights_and_writes_into_them() -> None:
    model, x = Lora().eval(), torch.randn(5, 64)
    fast = compiled(model)
    agree(model, fast, x)
    model.full.weight.mul_(2.0)
    agree(model, fast, x)


# -- what PyTorch does that is not a plain call ----------------------------------------------------------------------


@torch.no_grad()
def test_graph_breaks_and_branches_on_data() -> None:
    model = Lora().eval()

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y) if y.sum() > 0 else model(-y)

    fast = compiled(broken)
    for _ in range(3):
        agree(broken, fast, torch.randn(5, 64))
    assert len(reports()) >= 2


@torch.no_grad()
def test_writes_in_place_reach_the_argument() -> None:
    def writes(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x.mul_(2).add_(1)
        return torch.relu(x @ w) + x

    x, w = torch.randn(5, 8), torch.randn(8, 8)
    mine, theirs = x.clone(), x.clone()
    torch.testing.assert_close(compiled(writes)(mine, w), writes(theirs, w), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mine, theirs)


@torch.no_grad()
def test_results_keep_their_strides() -> None:
    def turned(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(x @ w) * 2
        return y.mT, y[:, ::2], y.permute(1, 0).reshape(-1), y.expand(3, 5, 8)

    x, w = torch.randn(5, 8), torch.randn(8, 8)
    mine, theirs = compiled(turned)(x, w), turned(x, w)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert [m.stride() for m in mine] == [m.stride() for m in theirs]
    assert last().taken


@torch.no_grad()
@pytest.mark.parametrize("rest", ["eager", "inductor"])
def test_a_view_after_a_part_finds_the_strides_it_needs(rest: str) -> None:
    def turned(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = (torch.relu(x @ w) * 2).mT.contiguous().mT  # memory holds the columns
        return torch.erf(y).mT.view(-1) + torch.erf(y.mT.view(-1))

    agree(turned, compiled(turned, {"rest": rest, "parts": "all"}), torch.randn(5, 8), torch.randn(8, 8))


@torch.no_grad()
def test_arguments_with_any_strides() -> None:
    model = Lora().eval()
    fast = compiled(model)
    for x in (torch.randn(64, 5).mT, torch.randn(1, 64).expand(5, 64), torch.randn(10, 128)[::2, ::2]):
        agree(model, fast, x)


@torch.no_grad()
def test_unsupported_operators_stay_and_the_rest_is_taken() -> None:
    model = Lora().eval()

    def mixed(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        inverse = torch.linalg.inv(y.mT @ y + torch.eye(64))
        return model(torch.fft.fft(y @ inverse).real)

    agree(mixed, compiled(mixed), torch.randn(5, 64), tolerance=1e-2)
    assert last().taken
    assert "test_backend.py" in last().refused["aten.linalg_inv_ex.default"]


@torch.no_grad()
def test_random_numbers_are_those_of_eager() -> None:
    model = Lora().eval()

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return model(x + torch.randn_like(x))

    fast, x = compiled(noisy), torch.randn(5, 64)
    fast(x)
    torch.manual_seed(3)
    mine = fast(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mine, noisy(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_element_types(dtype: torch.dtype) -> None:
    model = Lora().eval().to(dtype)
    agree(model, compiled(model), torch.randn(5, 64, dtype=dtype), tolerance=5e-2 if dtype.itemsize == 2 else 1e-9)
    assert last().taken


@torch.no_grad()
def test_complex_and_integer_tensors_stay_with_pytorch() -> None:
    def complex_(x: torch.Tensor) -> torch.Tensor:
        return (x @ x).abs() + (x * x).real

    agree(complex_, compiled(complex_), torch.randn(4, 4, dtype=torch.complex64))
    assert all("complex" in why or "not supported" in why for why in last().refused.values())


@torch.no_grad()
def test_autocast_is_followed() -> None:
    model = Lora().eval()
    fast = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = fast(torch.ones(5, 64)), model(torch.ones(5, 64))
    assert mine.dtype is theirs.dtype
    torch.testing.assert_close(mine, theirs, rtol=5e-2, atol=5e-2)


@torch.inference_mode()
def test_inference_mode() -> None:
    model = Lora().eval()
    agree(model, compiled(model), torch.randn(5, 64))
    assert last().taken


@torch.no_grad()
def test_hooks_copies_and_pickles_of_the_model() -> None:
    model = Lora().eval()
    handle = model.full.register_forward_hook(lambda module, args, out: out * 2)
    agree(model, compiled(model), torch.randn(5, 64))
    handle.remove()
    x = torch.randn(5, 64)
    fast = torch.compile(model, backend="mugraph", options=ALL)
    agree(model, fast, x)
    agree(model, copy.deepcopy(fast), x)
    again = pickle.loads(pickle.dumps(model))
    agree(model, compiled(again), x)


def test_threads_share_a_compiled_model() -> None:
    model = Lora().eval()
    fast = compiled(model)
    wrong: list[BaseException] = []

    def work(rows: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(3):
                    agree(model, fast, torch.randn(rows, 64))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in (3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- what goes wrong inside ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_part_that_cannot_be_optimised_stays_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **named: Any) -> Any:
        raise VerificationError("planted", op="matmul", where="model.py:3", remedy="keep it outside")

    monkeypatch.setattr(pipeline, "optimize_calls", refused)
    model = Lora().eval()
    fast = compiled(model, dynamic=False)
    with pytest.warns(FallbackWarning, match=r"(?s)planted.*matmul.*model.py:3.*keep it outside"):
        agree(model, fast, torch.randn(5, 64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(model, fast, torch.randn(6, 64))  # another graph, the same reason
    assert "planted" in str(last())


@torch.no_grad()
def test_a_part_that_fails_when_it_runs_gives_the_result_of_the_original() -> None:
    model, x = Lora().eval(), torch.randn(5, 64)
    fast = compiled(model)
    fast(x)
    for runner in _runners_of(fast, x):
        runner.run = _raises
    with pytest.warns(FallbackWarning, match="planted"):
        agree(model, fast, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(model, fast, x)


def _raises(*args: Any) -> Any:
    raise RuntimeError("planted")


@torch.no_grad()
def test_a_fault_in_the_split_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "split", _raises)
    model = Lora().eval()
    with pytest.warns(FallbackWarning, match="planted"):
        agree(model, compiled(model), torch.randn(5, 64))
    assert last().nodes == 0


@torch.no_grad()
def test_errors_of_the_model_are_its_own() -> None:
    model = Lora().eval()
    with pytest.raises(Exception, match=r"size|shape"):
        compiled(model)(torch.randn(5, 63))
