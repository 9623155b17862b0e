"""Emitted modules load from real files, and executables refuse what does not fit, by parameter and with a remedy."""

import inspect
import logging
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from mugraph.errors import CompileError, LaunchError
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Cast, Contract, Elementwise, Reduce
from mugraph.ir.types import DType, Output, Storage, tensor
from mugraph.runtime.load import Executable, load_module
from mugraph.transpiler.torch import emit
from tests import graphs

B = Dim("B", 2, 64)
b, k, n = Axis("b", B), Axis("k", 12), Axis("n", 5)


# -- modules ---------------------------------------------------------------------------------------------------------


def test_a_module_has_a_source_file_that_can_be_inspected() -> None:
    module = load_module("def run(x):\n    return x / 0\n", "kernel")
    assert inspect.getsource(module.run) == "def run(x):\n    return x / 0\n"
    with pytest.raises(ZeroDivisionError) as caught:
        module.run(1)
    assert "return x / 0" in "".join(traceback.format_tb(caught.value.__traceback__))


def test_the_same_source_is_loaded_once_and_others_do_not_meet() -> None:
    first = load_module("x = []", "kernel")
    assert load_module("x = []", "kernel") is first
    other = load_module("x = 1", "kernel")
    assert (first.x, other.x) == ([], 1)


def test_classes_of_a_module_can_be_pickled() -> None:
    module = load_module("class C:\n    pass\n", "pickled")
    assert isinstance(pickle.loads(pickle.dumps(module.C())), module.C)


def test_a_directory_keeps_the_file(tmp_path: Path) -> None:
    module = load_module("x = 1\n", "my-kernel", tmp_path)
    assert module.__file__ == str(tmp_path / "my_kernel.py")
    assert (tmp_path / "my_kernel.py").read_text() == "x = 1\n"
    load_module("x = 2\n", "my-kernel", tmp_path)
    assert (tmp_path / "my_kernel.py").read_text() == "x = 2\n"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["my_kernel.py"]


def test_a_directory_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    module = load_module("x = 3\n", "kernel", tmp_path / "file" / "entry")
    assert module.x == 3


def test_source_that_does_not_load_is_a_compile_error() -> None:
    for source in ("def run(:\n", "import no_such_module_at_all\n", "1 / 0\n"):
        with pytest.raises(CompileError, match="does not load"):
            load_module(source, "broken")
    assert not any(name.startswith("mugraph_emitted_broken") for name in sys.modules)


def test_files_of_a_process_are_removed_at_its_end() -> None:
    code = "from mugraph.runtime.load import load_module; print(load_module('x = 1', 'm').__file__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    path = Path(done.stdout.strip())
    assert path.name == "m.py"
    assert not path.parent.parent.exists()


# -- executables -------------------------------------------------------------------------------------------------------


def linear(dtype: DType = DType.f32) -> Program:
    """Y = X @ W + C, S = its row sums."""
    x, w = graphs.inp("X", b, k, dtype=dtype), graphs.inp("W", k, n, dtype=dtype)
    c = graphs.inp("C", b, n, dtype=dtype)
    s = graphs.Builder({i.name: i.tensor for i in (x, w, c)})
    s.add("p", Contract(("k",)), "X", "W")
    s.fn("Y", "add", "p", "C")
    return graphs.program("linear", (x, w, c), s, "Y")


def executable(program: Program, **options: Any) -> Executable:
    return Executable(program, load_module(emit(program), program.name).run, **options)


@pytest.fixture
def call() -> Executable:
    return executable(linear())


def good(rows: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(rows)
    return [torch.randn(rows, 12), torch.randn(12, 5), torch.randn(rows, 5)]


def expected(args: list[torch.Tensor]) -> torch.Tensor:
    return args[0] @ args[1] + args[2]


def test_arguments_go_by_position_and_by_name(call: Executable) -> None:
    x, w, c = good()
    result = call(x, w, c)
    torch.testing.assert_close(result, expected([x, w, c]))
    assert torch.equal(call(x, C=c, W=w), result)
    assert torch.equal(call(W=w, C=c, X=x), result)
    assert call.check(x, w, c) == {"B": 7}
    assert call.notes == ()


def test_it_says_what_it_takes(call: Executable) -> None:
    assert call.signature == "X: f32[B, 12], W: f32[12, 5], C: f32[B, 5] -> Y: f32[B, 5]"
    assert repr(call) == f"Executable(linear: {call.signature})"
    with pytest.raises(AttributeError):
        call.other = 1  # type: ignore[attr-defined]


Change = Callable[[list[torch.Tensor]], list[Any]]

# What is wrong, the arguments, what the message says, what the remedy says.
WRONG: dict[str, tuple[Change, str, str]] = {
    "number": (lambda a: [1.0, *a[1:]], r"X must be f32\[B, 12\], but float is not a tensor", "torch.Tensor"),
    "none": (lambda a: [a[0], None, a[2]], r"W must be f32\[12, 5\], but NoneType is not a tensor", "torch.Tensor"),
    "dtype": (lambda a: [a[0].half(), *a[1:]], r"X must be .*, but it is f16\[7, 12\]", "X.to(torch.float32)"),
    "complex": (lambda a: [a[0].cfloat().conj(), *a[1:]], r"it is complex64\[7, 12\]", "X.to(torch.float32)"),
    "sparse": (lambda a: [a[0].to_sparse(), *a[1:]], "layout torch.sparse_coo", "X.to_dense()"),
    "rank": (lambda a: [a[0][None], *a[1:]], r"it is f32\[1, 7, 12\]", "2 dimensions, not 3"),
    "rank 0": (lambda a: [a[0][0, 0], *a[1:]], r"it is f32\[\]", "2 dimensions, not 0"),
    "static": (lambda a: [a[0], a[1][:, :4], a[2]], r"W must be f32\[12, 5\], but it is f32\[12, 4\]", "dimension 1"),
    "transposed": (lambda a: [a[0], a[1].T, a[2]], r"it is f32\[5, 12\]", "dimension 0 must have size 12"),
    "inconsistent": (
        lambda a: [a[0], a[1], a[2][:3]], r"C must be f32\[B, 5\], but it is f32\[3, 5\], with B = 7 from X",
        "dimension 0 must be B = 7",
    ),
    "below range": (lambda a: [a[0][:1], a[1], a[2][:1]], "so B = 1", "B must lie in 2..64"),
    "empty": (lambda a: [a[0][:0], a[1], a[2][:0]], r"it is f32\[0, 12\], so B = 0", "B must lie in 2..64"),
    "above range": (lambda a: [a[0].repeat(10, 1), a[1], a[2].repeat(10, 1)], "so B = 70", "B must lie in 2..64"),
    "device": (lambda a: [a[0].to("meta"), *a[1:]], "it is on meta", "move it to cpu or cuda"),
    "devices": (lambda a: [a[0], a[1].to("meta"), a[2]], "it is on meta, X on cpu", "one device"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused(name: str, call: Executable) -> None:
    change, message, remedy = WRONG[name]
    with pytest.raises(LaunchError, match=message) as caught:
        call(*change(good()))
    assert remedy in str(caught.value.remedy)
    assert caught.value.op == "linear"


def test_nothing_runs_when_an_argument_is_refused() -> None:
    calls: list[object] = []
    call = Executable(linear(), lambda *a, **_: calls.append(a))
    for change, _, _ in WRONG.values():
        with pytest.raises(LaunchError):
            call(*change(good()))
    assert calls == []
    call(*good())
    assert len(calls) == 1


def test_the_number_and_the_names_of_arguments_are_checked(call: Executable) -> None:
    x, w, c = good()
    for args, named, message in [
        ((x, w), {}, "lacks C"),
        ((), {}, "lacks X, W, C"),
        ((x, w, c, c), {}, "takes 3 tensors, not 4"),
        ((x, w), {"c": c}, "no parameter 'c'"),
        ((x, w, c), {"W": w}, "got W twice"),
    ]:
        with pytest.raises(LaunchError, match=message) as caught:
            call(*args, **named)
        assert "linear(X: f32[B, 12], W: f32[12, 5], C: f32[B, 5])" in str(caught.value.remedy)


def test_any_strides_are_accepted_without_a_copy(call: Executable) -> None:
    x, w, c = good()
    for strided in (
        [x.T.contiguous().T, w.T.contiguous().T, c],
        [torch.stack((x, x), -1)[..., 1], w, c],
        [x[:1].expand(7, 12), w[:, :1].expand(12, 5), c],
    ):
        torch.testing.assert_close(call(*strided), expected(strided))
    assert call.notes == ()


def test_what_cannot_be_read_is_copied_and_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    call = executable(linear(), dense=("W",))
    x, w, c = good()
    negated = torch._neg_view(x)
    with caplog.at_level(logging.WARNING, "mugraph.runtime"):
        for _ in range(3):
            torch.testing.assert_close(call(negated, w.T.contiguous().T, c), expected([-x, w, c]))
    assert call.notes == (
        "X is copied before each call: it is a lazily negated view",
        "W is copied before each call: its strides (1, 12) are not row-major",
    )
    assert len(caplog.records) == 2


def test_dense_inputs_arrive_dense() -> None:
    seen: list[bool] = []
    call = Executable(linear(), lambda x, w, c, out: seen.append(w.is_contiguous()), dense=("W",))
    x, w, c = good()
    call(x, w, c)
    call(x, w.T.contiguous().T, c)
    assert seen == [True, True]
    assert len(call.notes) == 1


def test_gradients_are_refused_unless_the_function_has_them() -> None:
    x, w, c = good()
    x.requires_grad_()
    kernel = executable(linear())
    with pytest.raises(LaunchError, match=r"X must be .* requires a gradient") as caught:
        kernel(x, w, c)
    assert "torch.no_grad()" in str(caught.value.remedy)
    with torch.no_grad():
        kernel(x, w, c)
    kernel(x.detach(), w, c)
    executable(linear(), differentiable=True)(x, w, c).sum().backward()
    torch.testing.assert_close(x.grad, w.sum(1).expand(7, 12))


def test_out_receives_the_result(call: Executable) -> None:
    args = good()
    for out in (torch.full((7, 5), torch.nan), torch.full((5, 7), torch.nan).T):
        assert call(*args, out=out) is out
        torch.testing.assert_close(out, expected(args))


def test_a_wrong_out_is_refused(call: Executable) -> None:
    x, w, c = good()
    for out, message, remedy in [
        (torch.empty(5, 7), r"out Y must be f32\[B, 5\], but it is f32\[5, 7\]", "torch.empty((7, 5), "),
        (torch.empty(7, 5).half(), r"it is f16\[7, 5\]", "dtype=torch.float32"),
        (torch.empty(7, 5, device="meta"), "it is on meta", "put it on cpu"),
        (torch.empty(1, 5).expand(7, 5), "overlap", "its own memory"),
        (c, "shares memory with C", "its own memory"),
        ((torch.empty(7, 5), torch.empty(7)), "tuple is not a tensor", "torch.Tensor"),
        (3, "int is not a tensor", "torch.Tensor"),
    ]:  # fmt: skip
        with pytest.raises(LaunchError, match=message) as caught:
            call(x, w, c, out=out)
        assert remedy in str(caught.value.remedy)
    torch.testing.assert_close(c, good()[2])


def test_out_and_gradients_do_not_go_together() -> None:
    x, w, c = good()
    call = executable(linear(), differentiable=True)
    out = torch.empty(7, 5)
    with pytest.raises(LaunchError, match="autograd cannot follow"):
        call(x.requires_grad_(), w, c, out=out)
    with torch.no_grad():
        call(x, w, c, out=out)


def two_results() -> Program:
    x = graphs.inp("X", b, k, dtype=DType.f32)
    s = graphs.Builder({"X": x.tensor})
    s.fn("Y", "exp", "X")
    s.add("S", Reduce("sum", ("k",)), "X")
    s.add("H", Cast(DType.f16), "S")
    return graphs.program("two", (x,), s, "Y", "H")


def test_several_results_are_a_tuple() -> None:
    call = executable(two_results())
    (x, *_) = good()
    y, h = call(x)
    torch.testing.assert_close(y, x.exp())
    assert h.dtype is torch.float16
    out = (torch.empty(7, 12), torch.empty(7, dtype=torch.float16))
    assert all(a is b for a, b in zip(call(x, out=out), out, strict=True))
    torch.testing.assert_close(out[1], h)
    with pytest.raises(LaunchError, match="out has 1 tensors, not 2"):
        call(x, out=out[0])
    both = torch.empty(7, 12)
    with pytest.raises(LaunchError, match="shares memory with out Y"):
        executable(same_twice())(x, out=(both, both))


def same_twice() -> Program:
    x = graphs.inp("X", b, k, dtype=DType.f32)
    s = graphs.Builder({"X": x.tensor})
    s.fn("Y", "exp", "X")
    s.fn("Z", "neg", "X")
    return graphs.program("same", (x,), s, "Y", "Z")


def overwriting() -> Program:
    x = graphs.inp("X", b, k, dtype=DType.f32)
    y = tensor("Y", (b, k), DType.f32)
    equation = Equation((y,), Elementwise("pow", (("exponent", Fraction(2)),)), ("X",))
    return Program("overwriting", (x,), (equation,), (Output("Y", Storage(DType.f32), alias_of="X"),))


def test_an_input_that_is_written_needs_its_own_memory() -> None:
    call = executable(overwriting())
    (x, *_) = good()
    before = x.clone()
    assert call(x) is x
    torch.testing.assert_close(x, before**2)
    with pytest.raises(LaunchError, match="overlap"):
        call(x[:1].expand(7, 12))
    with pytest.raises(LaunchError, match="lazily negated view, and the result is written into it"):
        call(torch._neg_view(x))


def test_products_of_sizes_are_checked() -> None:
    x = graphs.inp("X", Axis("bc", B * 3), dtype=DType.f32)
    y = graphs.inp("Y", Axis("bb", B * B), dtype=DType.f32)
    s = graphs.Builder({i.name: i.tensor for i in (x, y)})
    s.fn("Z", "neg", "X")
    call = executable(graphs.program("products", (x, y), s, "Z"))
    assert call.check(torch.zeros(12), torch.zeros(16)) == {"B": 4}
    with pytest.raises(LaunchError, match=r"X must be f32\[3\*B\]") as caught:
        call(torch.zeros(13), torch.zeros(16))
    assert "must be 3*B" in str(caught.value.remedy)
    with pytest.raises(LaunchError, match="with B = 4 from X") as caught:
        call(torch.zeros(12), torch.zeros(15))
    assert "B^2 = 16" in str(caught.value.remedy)


def test_a_target_may_run_on_some_devices_only() -> None:
    call = executable(linear(), devices=("cuda",))
    with pytest.raises(LaunchError, match="it is on cpu") as caught:
        call(*good())
    assert "move it to cuda" in str(caught.value.remedy)
