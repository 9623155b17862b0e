"""What emitted files keep between calls follows its constants: writes, other tensors, freed memory, threads."""

import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from mugraph.codegen.lower import plan_graph
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.graph import BlockGraph, Equation, KernelGraph, Load, Store
from mugraph.ir.ops import Contract, Elementwise, Kernel, Library
from mugraph.ir.types import DType, Input, Output, Storage, tensor
from mugraph.runtime.interpret import Interpreter
from mugraph.runtime.load import load_module
from mugraph.search.build import library_equation
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler import triton as triton_code
from mugraph.transpiler.kept import Kept

# -- the keeper itself


class Counted:
    """w * g, and how often it was computed."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return w * g


@pytest.fixture
def counted() -> Counted:
    return Counted()


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(12.0).reshape(3, 4), torch.full((4,), 2.0)


def test_the_same_constants_are_computed_once(counted: Counted) -> None:
    keep, (w, g) = Kept(counted), weights()
    first = keep(w, g)
    assert keep(w, g) is first
    assert torch.equal(first, w * g)
    assert counted.calls == 1


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.ones(3, 4)),
    "a view": lambda w: w[1].zero_(),
    "a detached view": lambda w: w.detach().mul_(3),
    "item": lambda w: w.__setitem__((0, 0), 9.0),
    "other memory": lambda w: setattr(w, "data", torch.ones(3, 4)),
    "other memory twice": lambda w: [setattr(w, "data", w.data * 2) for _ in range(2)],
    "other strides": lambda w: setattr(w, "data", w.data.T.contiguous().T + 1),
    "out=": lambda w: torch.add(torch.ones(3, 4), 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_constant_is_followed(counted: Counted, name: str) -> None:
    keep, (w, g) = Kept(counted), weights()
    keep(w, g)
    for _ in range(3):  # memory that was freed comes back
        CHANGES[name](w)
        assert torch.equal(keep(w, g), w * g)
        assert torch.equal(keep(w, g), w * g)


def test_an_update_is_written_where_the_old_result_was(counted: Counted) -> None:
    keep, (w, g) = Kept(counted), weights()
    place = keep(w, g).data_ptr()
    w.add_(1)
    assert keep(w, g).data_ptr() == place
    assert len(keep.entries) == 1


def test_sets_of_constants_alternate(counted: Counted) -> None:
    keep = Kept(counted)
    w, g = weights()
    other = w + 1
    for _ in range(3):
        assert torch.equal(keep(w, g), w * g)
        assert torch.equal(keep(other, g), other * g)
    assert counted.calls == 2


def test_a_view_of_the_same_memory_is_its_own_constant(counted: Counted) -> None:
    keep = Kept(counted)
    w, g = torch.arange(16.0).reshape(4, 4), torch.full((4,), 2.0)
    for _ in range(2):
        assert torch.equal(keep(w, g), w * g)
        assert torch.equal(keep(w.T, g), w.T * g)
        assert torch.equal(keep(w.T[1:], g), w.T[1:] * g)
    assert counted.calls == 3


def test_a_fresh_tensor_on_known_memory_is_not_taken_for_the_old_one(counted: Counted) -> None:
    """Each `.data` counts its writes anew."""
    keep, (w, g) = Kept(counted), weights()
    for _ in range(4):
        assert torch.equal(keep(w.data, g), w * g)
        w.add_(1)


def test_what_is_kept_goes_with_its_constants(counted: Counted) -> None:
    keep, (w, g) = Kept(counted), weights()
    gone = weakref.ref(keep(w, g))
    del w
    gc.collect()
    assert gone() is None
    assert keep.entries == {}


def test_many_short_lived_constants_leave_nothing_and_are_never_mistaken(counted: Counted) -> None:
    keep, (_, g) = Kept(counted), weights()
    for i in range(200):
        w = torch.full((3, 4), float(i))
        assert keep(w, g)[0, 0] == 2 * i
    assert len(keep.entries) <= 1
    assert counted.calls == 200


def test_gradients_flow_to_constants_that_want_them(counted: Counted) -> None:
    keep, (w, g) = Kept(counted), weights()
    w.requires_grad_()
    with torch.no_grad():
        kept = keep(w, g)
        assert keep(w, g) is kept
    for _ in range(2):
        w.grad = None
        keep(w, g).sum().backward()
        assert w.grad is not None
        assert torch.equal(w.grad, g.expand(3, 4))
    assert not kept.requires_grad


def test_what_is_kept_in_inference_mode_serves_autograd_later(counted: Counted) -> None:
    keep, (w, g) = Kept(counted), weights()
    with torch.inference_mode():
        keep(w, g)
    x = torch.ones(3, 4, requires_grad=True)
    (x * keep(w, g)).sum().backward()
    assert torch.equal(x.grad, w * g)
    assert counted.calls == 1


def test_tensors_made_in_inference_mode_are_not_kept(counted: Counted) -> None:
    keep = Kept(counted)
    with torch.inference_mode():
        w, g = weights()
        for _ in range(3):
            w.add_(1)
            assert torch.equal(keep(w, g), w * g)
    assert keep.entries == {}


def test_transforms_and_fake_tensors_are_not_kept(counted: Counted) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    keep, (w, g) = Kept(counted), weights()
    assert torch.equal(torch.vmap(lambda row: keep(row, g))(w), w * g)
    assert torch.equal(torch.func.grad(lambda w: keep(w, g).sum())(w), g.expand(3, 4))
    with FakeTensorMode() as mode:
        keep(mode.from_tensor(w), mode.from_tensor(g))
    assert keep.entries == {}


def test_threads_find_one_result() -> None:
    w, g = weights()
    calls, start = [], threading.Barrier(8)

    def slow(w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        calls.append(threading.get_ident())
        threading.Event().wait(0.02)
        return w * g

    keep, results = Kept(slow), []

    def use() -> None:
        start.wait()
        results.append(keep(w, g))

    threads = [threading.Thread(target=use) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 1
    assert all(r is results[0] for r in results)


def test_the_capture_of_a_graph_uses_what_is_kept_and_keeps_nothing(counted: Counted) -> None:
    class Capturing(Kept):
        now = False

        def capturing(self, constants: tuple[torch.Tensor, ...]) -> bool:  # type: ignore[override]
            return self.now

    keep, (w, g) = Capturing(counted), weights()
    keep.now = True
    assert keep(w, g) is not keep(w, g)
    assert keep.entries == {}
    keep.now = False
    kept = keep(w, g)
    keep.now = True
    assert keep(w, g) is kept
    w.add_(1)
    assert torch.equal(keep(w, g), w * g)
    assert not torch.equal(kept, w * g)


def test_an_error_is_not_kept() -> None:
    broken = [True]

    def compute(w: torch.Tensor) -> torch.Tensor:
        if broken[0]:
            raise ValueError("no")
        return w + 1

    keep, (w, _) = Kept(compute), weights()
    with pytest.raises(ValueError, match="no"):
        keep(w)
    broken[0] = False
    assert torch.equal(keep(w), w + 1)


# -- emitted files

b, k, n, d = Axis("b", Dim("B", 1, 64)), Axis("k", 48), Axis("n", 32), Axis("d", 16)
KEPT_IMPORTS = ["import threading", "import weakref", "from collections.abc import Callable", "from typing import Any"]


def folded(dtype: DType = DType.f32, mutated: bool = False) -> KernelGraph:
    """x @ (w + a @ c), with the sum ahead; `mutated` uses w where the sum belongs."""
    x, w, a, c = (
        tensor(name, axes, dtype) for name, axes in (("x", (b, k)), ("w", (k, n)), ("a", (k, d)), ("c", (d, n)))
    )
    tiles = {t.name: tensor(f"{t.name}_tile", t.axes, t.dtype) for t in (w, a, c)}
    product, total = tensor("product", (k, n), DType.f32), tensor("total", (k, n), DType.f32)
    block = BlockGraph(
        grid=(("k", 16), ("n", 16)),
        split=None,
        passes=(),
        loads=tuple(Load(t, name) for name, t in tiles.items()),
        epilogue=(
            Equation((product,), Contract(("d",)), ("a_tile", "c_tile")),
            Equation((total,), Elementwise("add"), ("w_tile", "product")),
        ),
        stores=(Store("total", "rest"),),
    )
    kept, out = tensor("rest", (k, n), dtype), tensor("run", (b, n), dtype)  # names that emitted files use themselves
    tensors = {t.name: t for t in (x, w, a, c, kept, out)}
    sum_ahead = Equation((kept,), Kernel((block,)), ("w", "a", "c"))
    matmul = library_equation(Equation((out,), Contract(("k",)), ("x", "w" if mutated else "rest")), tensors)
    inputs = tuple(Input(t, Storage(dtype), constant=t is not x) for t in (x, w, a, c))
    return KernelGraph("folded", inputs, (sum_ahead, matmul), (Output("run", Storage(dtype)),))


def arguments(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in ((5, 48), (48, 32), (48, 16), (16, 32))]


def expected(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return x @ (w + a @ c)


def test_the_emitted_file_imports_torch_and_the_standard_library_alone() -> None:
    for source in (torch_code.emit(folded()), triton_code.emit(plan_graph(folded(DType.f16)))):
        lines = [line for line in source.splitlines() if line.startswith(("import", "from ")) and ":" not in line]
        assert [line for line in lines if "triton" not in line] == [*KEPT_IMPORTS, "import torch"]
    assert "Kept" not in torch_code.emit(
        replace(folded(), inputs=tuple(replace(i, constant=False) for i in folded().inputs))
    )


def test_the_emitted_file_follows_its_constants() -> None:
    module = load_module(torch_code.emit(folded()), "folded")
    x, w, a, c = arguments()
    torch.testing.assert_close(module.run(x, w, a, c), expected(x, w, a, c))
    (kept,) = (entry[1] for entry in module.keep.entries.values())
    torch.testing.assert_close(module.run(x[:2], w, a, c), expected(x[:2], w, a, c))
    assert [entry[1] for entry in module.keep.entries.values()] == [kept]
    a.mul_(2)
    torch.testing.assert_close(module.run(x, w, a, c), expected(x, w, a, c))
    other = arguments(1)
    for args in ((x, w, a, c), other, (x, w, a, c), other):
        torch.testing.assert_close(module.run(*args), expected(*args))
    out = torch.empty(5, 32)
    assert module.run(*other, out=out) is out
    torch.testing.assert_close(out, expected(*other))


def test_the_emitted_file_runs_in_line_where_gradients_are_wanted() -> None:
    module = load_module(torch_code.emit(folded()), "folded")
    x, w, a, c = arguments()
    a.requires_grad_()
    module.run(x, w, a, c).sum().backward()
    found, a.grad = a.grad, None
    expected(x, w, a, c).sum().backward()
    torch.testing.assert_close(found, a.grad)


def test_a_result_is_never_what_is_kept() -> None:
    """Writing into a result must not change the next one."""
    graph = folded()
    output = tensor("again", (k, n), DType.f32)
    (first, matmul) = graph.equations
    tensors = graph.tensors()
    copy = library_equation(Equation((output,), Elementwise("relu"), ("rest",)), tensors)
    assert isinstance(copy.op, Library)
    both = replace(graph, equations=(first, matmul), outputs=(*graph.outputs, Output("rest", Storage(DType.f32))))
    assert both.divided() is None
    with_copy = replace(
        graph, equations=(first, matmul, copy), outputs=(*graph.outputs, Output("again", Storage(DType.f32)))
    )
    module = load_module(torch_code.emit(with_copy), "copied")
    args = arguments()
    wanted = [t.clone() for t in module.run(*args)]
    for t in module.run(*args):
        t.fill_(-1)
    for t, again in zip(wanted, module.run(*args), strict=True):
        torch.testing.assert_close(again, t)


def test_the_triton_file_computes_the_same(interpreter: Interpreter) -> None:
    source = triton_code.emit(plan_graph(folded()))
    for seed in (0, 1):
        args = arguments(seed)
        (found,) = interpreter.run(source, dict(zip("xwac", args, strict=True)))
        torch.testing.assert_close(found, expected(*args), rtol=1e-4, atol=1e-4)
    wrong = triton_code.emit(plan_graph(folded(mutated=True)))
    (found,) = interpreter.run(wrong, dict(zip("xwac", args, strict=True)))
    assert not torch.allclose(found, expected(*args), rtol=1e-2, atol=1e-2)


def test_the_plan_shows_what_is_ahead() -> None:
    plan = plan_graph(folded())
    assert plan.ahead is not None
    assert plan.ahead.outputs == ("rest",)
    assert plan.parameters == ("x", "w", "a", "c")
    assert plan.inputs == ("x", "w", "a", "c", "rest")
    assert str(plan).startswith("ahead plan folded_ahead(w, a, c) -> rest")
