"""Results as PyTorch operators, here and from `register.py` without mugraph."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import mugraph as mg
from mugraph.errors import LaunchError, UnsupportedOpError, VerificationError
from mugraph.ir.parser import parse_program

B = mg.Dim("b", 1, 64)


@mg.program
def gated(x: mg.f32[B, 24], w1: mg.f32[24, 40], w2: mg.f32[24, 40]):
    return mg.silu(x @ w1) * (x @ w2)


@mg.program
def rows(x: mg.f32[B, 24], at: mg.i64[B], scale: mg.f32[24]):
    """Two outputs, one of them of integers; one input that has no gradient."""
    return mg.sum(x * scale, axis=-1), at + at


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in shapes]


def permuted(shape: tuple[int, ...]) -> torch.Tensor:
    """Dense, and not row-major."""
    return tensors(shape[::-1])[0].permute(*reversed(range(len(shape))))


SHAPES = (5, 24), (24, 40), (24, 40)


def as_written(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x @ w1) * (x @ w2)


@pytest.fixture(scope="module")
def result() -> mg.Result:
    return mg.superoptimize(gated, target="torch")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For a GPU that is not here."""
    return mg.superoptimize(gated, target="cuda:90").save(tmp_path_factory.mktemp("register") / "out")


def loaded(file: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- in this process


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("make", [lambda s: tensors(s)[0], permuted], ids=["contiguous", "permuted"])
def test_opcheck_passes(result: mg.Result, gradients: bool, make: Any) -> None:
    args = tuple(make(s) for s in SHAPES)
    op = result.register(gradients)
    if gradients:
        args = tuple(a.detach().requires_grad_() for a in args)
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
    torch.testing.assert_close(op(*args), as_written(*args), rtol=1e-5, atol=1e-4)


def test_opcheck_passes_with_several_outputs_and_integers() -> None:
    op = mg.superoptimize(rows, target="torch").register(gradients=True)
    x, scale = tensors((5, 24), (24,))
    at = torch.arange(5)
    torch.library.opcheck(op, (x.requires_grad_(), at, scale.requires_grad_()))
    sums, doubled = op(x, at, scale)
    assert (doubled.dtype, doubled.tolist()) == (torch.int64, [0, 2, 4, 6, 8])
    found = torch.autograd.grad(sums.square().sum(), (x, scale))
    expected = torch.autograd.grad((x * scale).sum(-1).square().sum(), (x, scale))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_results_never_share_memory_with_inputs_or_each_other() -> None:
    program = mg.trace(lambda x: (x, x, mg.transpose(x, 0, 1)), {"x": mg.f32[4, 6]}, "same")
    op = mg.superoptimize(program, target="torch").register()
    for x in (torch.randn(4, 6), torch.randn(6, 4).t()):
        torch.library.opcheck(op, (x,))
        found = op(x)
        assert len({t.untyped_storage().data_ptr() for t in (x, *found)}) == 4
        assert all(t.is_contiguous() for t in found)
        assert torch.equal(found[2], x.t())


def test_names_may_be_alike_and_those_that_a_schema_does_not_take_are_replaced() -> None:
    program = mg.trace(lambda grad_y, y: (grad_y * y, y), {"grad_y": mg.f32[4], "y": mg.f32[4]}, "alike")
    op = mg.superoptimize(program, target="torch").register(gradients=True)
    torch.library.opcheck(op, tuple(t.requires_grad_() for t in tensors((4,), (4,))))
    program = mg.trace(lambda α: mg.exp(α), {"α": mg.f32[4]}, "π")
    op = mg.superoptimize(program, target="torch").register()
    x = torch.randn(4)
    torch.testing.assert_close(op(x), x.exp())


BAD = {
    "type": (lambda x, w: (x.double(), w, w), "x is of type torch.float64", "convert it"),
    "rank": (lambda x, w: (x[0], w, w), "x is of 1 dimensions", "give it 2"),
    "size": (lambda x, w: (x, w, w[:, :39]), r"w2 is of shape \(24, 39\)", "dimension 1 must be 40"),
    "range": (lambda x, w: (torch.randn(65, 24), w, w), "x is such that b = 65", r"it must lie in 1\.\.64"),
    "device": (lambda x, w: (x, w, w.to("meta")), "w2 is on meta, x on cpu", "use one device"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_inputs_are_refused(result: mg.Result, case: str) -> None:
    change, problem, remedy = BAD[case]
    with pytest.raises(LaunchError, match=f"(?s)gated: {problem}.*{remedy}"):
        result.register()(*change(*tensors(*SHAPES[:2])))
    torch.compiler.reset()  # sizes are numbers at first
    with pytest.raises(Exception, match=f"gated: {problem}"):  # as tracing raises it
        torch.compile(result.register(), backend="eager", fullgraph=True)(*change(*tensors(*SHAPES[:2])))


def test_compile_keeps_it_whole_for_all_sizes(result: mg.Result) -> None:
    op, counter = result.register(), CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def model(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        return op(x, w1, w2) + 1

    for b in (3, 7, 64):
        args = tensors((b, 24), *SHAPES[1:])
        torch.testing.assert_close(model(*args), as_written(*args) + 1, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1


# -- gradients


def test_gradients_are_those_of_the_reference_also_when_compiled(result: mg.Result) -> None:
    args = [a.requires_grad_() for a in tensors(*SHAPES)]
    op = result.register(gradients=True)
    expected = torch.autograd.grad(as_written(*args).square().sum(), args)
    for f in (op, torch.compile(op, backend="aot_eager", fullgraph=True)):
        found = torch.autograd.grad(f(*args).square().sum(), args)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_without_gradients_differentiating_is_an_error(result: mg.Result) -> None:
    args = [a.requires_grad_() for a in tensors(*SHAPES)]
    out = result.register()(*args)
    with pytest.raises(LaunchError, match=r"(?s)registered without gradients.*gradients=True"):
        out.sum().backward()


def test_given_gradients_are_used_and_checked(result: mg.Result) -> None:
    def ones(grads: Any, inputs: Any) -> list[torch.Tensor]:
        assert len(grads) == 1
        return [torch.ones_like(x) for x in inputs]

    def short(grads: Any, inputs: Any) -> list[torch.Tensor]:
        return [torch.ones_like(x) for x in inputs[1:]]

    args = [a.requires_grad_() for a in tensors(*SHAPES)]
    op = result.register(gradients=ones)
    assert op is result.register(gradients=ones)
    assert all((g == 1).all() for g in torch.autograd.grad(op(*args).sum(), args))
    with pytest.raises(LaunchError, match="return one gradient for each floating input"):
        result.register(gradients=short)(*args).sum().backward()
    short.__name__ = "ones"
    with pytest.raises(LaunchError, match="registered with other gradients"):
        result.register(gradients=short)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # inside torch.func.jvp
@pytest.mark.parametrize("gradients", [False, True])
def test_tangents_are_refused_where_there_are_any(result: mg.Result, gradients: bool) -> None:
    op, (x, w1, w2) = result.register(gradients), tensors(*SHAPES)
    for way in (lambda: torch.func.jvp(lambda y: op(y, w1, w2), (x,), (x,)), lambda: _dual(op, x, w1, w2)):
        with pytest.raises(LaunchError, match=r"(?s)gated has no derivatives in forward mode.*in reverse mode"):
            way()
    _, tangent = torch.func.jvp(lambda y: y * op(x, w1, w2).sum(), (x,), (x,))  # the operator's own inputs have none
    torch.testing.assert_close(tangent, x * as_written(x, w1, w2).sum(), rtol=1e-4, atol=1e-3)


def _dual(op: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    with torch.autograd.forward_ad.dual_level():
        found: torch.Tensor = op(torch.autograd.forward_ad.make_dual(x, x), *others)
        return found


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_tangents_of_gradients_are_refused(result: mg.Result) -> None:
    x, w1, w2 = tensors(*SHAPES)
    out = result.register(gradients=True)(x.requires_grad_(), w1, w2)
    with torch.autograd.forward_ad.dual_level():
        grads = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(LaunchError, match="gated has no derivatives in forward mode"):
            torch.autograd.grad(out, x, grads)


@pytest.mark.parametrize("end", [torch.Tensor.sum, lambda y: y.square().sum()], ids=["sum", "squares"])
def test_gradients_of_gradients_are_refused(result: mg.Result, end: Any) -> None:
    args = [a.requires_grad_() for a in tensors(*SHAPES)]
    (found,) = torch.autograd.grad(end(result.register(gradients=True)(*args)), args[0], create_graph=True)
    (expected,) = torch.autograd.grad(end(as_written(*args)), args[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(LaunchError, match="gated has no gradients of gradients"):
        (found.square().sum() + args[0].square().sum()).backward()


# -- names


def test_equal_code_is_one_operator_and_other_code_another(result: mg.Result, saved: Path) -> None:
    op = result.register()
    assert result.register() is op
    assert mg.superoptimize(gated, target="torch").register() is op
    assert op is not result.register(gradients=True)

    @mg.program
    def gated_(x: mg.f32[B, 24], w1: mg.f32[24, 40], w2: mg.f32[24, 40]):
        return mg.silu(x @ w1) + (x @ w2)

    from dataclasses import replace

    other = mg.superoptimize(replace(gated_, name="gated"), target="torch").register()
    x, w1, w2 = tensors(*SHAPES)
    torch.testing.assert_close(other(x, w1, w2), torch.nn.functional.silu(x @ w1) + x @ w2, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(op(x, w1, w2), as_written(x, w1, w2), rtol=1e-5, atol=1e-4)
    names = {str(o) for o in (op, other, mg.load(saved).register())}
    assert len(names) == 3
    assert all(n.startswith("mugraph.gated_") for n in names)


def test_the_file_defines_the_operator_of_the_result(saved: Path) -> None:
    first, second = loaded(saved / "register.py", "first"), loaded(saved / "register.py", "second")
    assert first.op is second.op is mg.load(saved).register()
    assert first.register(gradients=True) is mg.load(saved).register(gradients=True)


NOTHING = """\
program nothing
  axes a = 4
  c: f32[] = 1/2
  y: f32[a] = broadcast[a](c)
  output y
"""


def test_programs_without_operators_say_why(tmp_path: Path) -> None:
    program = parse_program(NOTHING)
    result = mg.superoptimize(program, target="torch")
    with pytest.raises(UnsupportedOpError, match="it has no inputs"):
        result.register()
    assert not (result.save(tmp_path / "out") / "register.py").exists()


# -- without mugraph

BLOCKED = """
    import sys

    sys.modules["mugraph"] = None  # any import of it fails
    import torch
    import register

    torch.manual_seed(0)
    x, w1, w2 = torch.randn(5, 24), torch.randn(24, 40), torch.randn(24, 40)
    expected = torch.nn.functional.silu(x @ w1) * (x @ w2)
"""


def alone(script: str, folder: Path, **environment: str) -> str:
    """What a fresh process prints that runs the script beside the files of a result, without mugraph."""
    text = textwrap.dedent(BLOCKED) + textwrap.dedent(script)
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(folder)} | environment
    done = subprocess.run([sys.executable, "-c", text], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_file_needs_no_mugraph(saved: Path) -> None:
    script = """
        for args in ((x, w1, w2), (x.t().contiguous().t(), w1.t().contiguous().t(), w2)):
            assert set(torch.library.opcheck(register.op, args).values()) == {"SUCCESS"}
            torch.testing.assert_close(register.op(*args), expected, rtol=1e-5, atol=1e-4)
        try:
            register.op(x.half(), w1, w2)
        except register.LaunchError as error:
            print(error)
        print(register.op)
    """
    printed = alone(script, saved)
    assert "gated: x is of type torch.float16" in printed
    assert printed.splitlines()[-1] == str(mg.load(saved).register()) == alone("print(register.op)", saved).strip()


def test_the_kernel_beside_the_file_is_what_runs(saved: Path) -> None:
    script = """
        torch.testing.assert_close(register.run(x, w1, w2), expected, rtol=1e-4, atol=1e-3)
        print("@triton.jit" in open(register.kernel().__file__).read())
    """
    assert alone(script, saved, TRITON_INTERPRET="1").strip() == "True"


def test_another_kernel_beside_the_file_is_refused(saved: Path, tmp_path: Path) -> None:
    place = shutil.copytree(saved, tmp_path / "copy")
    for change in (lambda f: f.write_text(f.read_text() + "# edited\n"), Path.unlink):
        change(place / "kernel.py")
        with pytest.raises(Exception, match="missing, or not the file that was emitted"):
            loaded(place / "register.py", "edited").kernel()


def test_an_edited_file_is_refused_by_verify(saved: Path, tmp_path: Path) -> None:
    from hashlib import sha256

    from mugraph.cli.saved import recheck_saved

    recheck_saved(saved)
    place = shutil.copytree(saved, tmp_path / "copy")
    file, manifest = place / "register.py", place / "manifest.json"
    file.write_text(file.read_text().replace("return found[0] if", "return found[-1] if"))
    with pytest.raises(VerificationError, match=r"register\.py was edited"):
        recheck_saved(place)
    data = json.loads(manifest.read_text())
    data["files"]["register.py"] = sha256(file.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(data))
    with pytest.raises(VerificationError, match=r"register\.py does not follow"):
        recheck_saved(place)


EXPORTED = """
    class Model(torch.nn.Module):
        def forward(self, x, w1, w2):
            return register.op(x, w1, w2) + 1

    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(Model(), (x, w1, w2), dynamic_shapes=({0: rows}, None, None))
    assert [str(n.target) for n in program.graph.nodes if "mugraph" in str(n.target)] == [str(register.op)]
"""


def test_export_keeps_it_for_all_sizes(saved: Path, tmp_path: Path) -> None:
    script = f"""{EXPORTED}
    torch.testing.assert_close(program.module()(x, w1, w2), expected + 1, rtol=1e-5, atol=1e-4)
    torch.export.save(program, {str(tmp_path / "model.pt2")!r})
    again = torch.export.load({str(tmp_path / "model.pt2")!r})
    torch.testing.assert_close(again.module()(x[:3], w1, w2), expected[:3] + 1, rtol=1e-5, atol=1e-4)
    """
    alone(script, saved)


def test_sizes_that_only_the_run_knows_are_asserted_in_it(result: mg.Result) -> None:
    op = result.register()

    class Chosen(torch.nn.Module):
        def forward(self, x: torch.Tensor, at: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
            return op(x[at.nonzero().squeeze(1)], w1, w2)

    x, w1, w2 = tensors((99, 24), *SHAPES[1:])
    at = torch.arange(99) % 3 == 0
    program = torch.export.export(Chosen(), (x, at, w1, w2)).module()
    torch.testing.assert_close(program(x, at, w1, w2), as_written(x[at], w1, w2), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="<= 64"):
        program(x, at | True, w1, w2)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_aot_inductor_calls_it(saved: Path, tmp_path: Path) -> None:
    script = f"""{EXPORTED}
    package = torch._inductor.aoti_compile_and_package(program, package_path={str(tmp_path / "model.pt2")!r})
    model = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(model(x[:3], w1, w2), expected[:3] + 1, rtol=1e-5, atol=1e-4)
    """
    alone(script, saved, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
