"""KernelBench files in, files with a `ModelNew` out."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernelbench.__main__ import modules, row
from mugraph.cli import main
from mugraph.cli.kernelbench import Imported, _check, import_file
from mugraph.errors import CaptureError, SettingError, VerificationError
from mugraph.runtime.load import load_module

FOLDER = Path(__file__).parent.parent / "benchmarks" / "kernelbench"
QUICK = ("swish_chain", "rms_norm_linear", "conv_epilogue", "cross_entropy", "top_k_gate", "batch_norm")
NONE = {"batch_norm", "conv_only", "counted"}  # nothing of them is taken over
PARTS = {"conv_epilogue", "conv_pool_linear", "cross_entropy", "dropout_linear", "top_k_gate"}


def compared(file: Path, found: Imported) -> None:
    """As KernelBench does: seeded weights and inputs, Model beside ModelNew, without gradients."""
    module = load_module(found.text, f"{file.stem}_new")
    with torch.no_grad():
        models = []
        for make in (module.Model, module.ModelNew):
            torch.manual_seed(7)
            models.append(make(*module.get_init_inputs()))
        inputs = module.get_inputs()
        results = []
        for model in models:
            torch.manual_seed(8)
            results.append(model(*inputs))
    assert {k: v.shape for k, v in models[0].state_dict().items()} == {
        k: v.shape for k, v in models[1].state_dict().items()
    }
    assert inspect.signature(module.Model) == inspect.signature(module.ModelNew)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def check(file: Path, target: str) -> None:
    found = import_file(file, target)
    compared(file, found)
    share = 0 if file.stem in NONE else 1
    assert found.share == pytest.approx(share) or file.stem in PARTS
    assert (0 < found.share < 1) == (file.stem in PARTS)
    assert ("@triton.jit" in found.text) == (target != "torch" and share > 0)
    assert str(found).splitlines()[0] in found.text.splitlines()[0]
    assert file.read_text().rstrip() in found.text
    assert file.stem in row(found, 0.0)


@pytest.mark.parametrize("name", QUICK)
def test_a_new_model_is_correct_or_an_honest_copy(name: str) -> None:
    check(FOLDER / f"{name}.py", "torch")


def test_there_are_enough_modules() -> None:
    assert len(modules()) >= 30
    assert {f.stem for f in modules()} >= NONE | PARTS | set(QUICK)


@pytest.mark.full
@pytest.mark.parametrize("target", ["torch", "cuda:90"])
@pytest.mark.parametrize("file", modules(), ids=lambda f: f.stem)
def test_every_module_is_correct_or_an_honest_copy(file: Path, target: str) -> None:
    check(file, target)


CLASHES = """\
from __future__ import annotations

import torch

run, composed, EXPECTED, LOG2E, triton_, what_is_read, copy = 1, 2, 3, 4, 5, 6, 7


def narrow(x):
    return x * composed


class Model(torch.nn.Module):
    def __init__(self, inside: int, outside: int, scale: float = 0.5):
        super().__init__()
        self.scale = scale
        self.layers = torch.nn.Sequential(torch.nn.Linear(inside, outside), torch.nn.SiLU())

    def forward(self, x, y=None):
        return narrow(self.layers(x)) * self.scale + EXPECTED


def get_inputs():
    return [torch.randn(8, 16)]


def get_init_inputs():
    return [16, 24]
"""


@pytest.fixture
def clashes(tmp_path: Path) -> Path:
    file = tmp_path / "1_Names that clash.py"
    file.write_text(CLASHES)
    return file


def test_names_of_the_file_stay_what_they_are(clashes: Path) -> None:
    for target in ("torch", "cuda:90"):
        found = import_file(clashes, target)
        assert found.share == 1
        compared(clashes, found)
    namespace: dict[str, object] = {"__name__": "names"}
    exec(compile(import_file(clashes, "torch").text, "new.py", "exec"), namespace)
    assert [namespace[n] for n in ("run", "composed", "EXPECTED", "LOG2E", "what_is_read", "copy")] == [
        1,
        2,
        3,
        4,
        6,
        7,
    ]


def test_whatever_it_was_not_made_for_goes_through_the_model(clashes: Path) -> None:
    module = load_module(import_file(clashes, "torch").text, "made_for")
    calls: list[tuple[int, ...]] = []
    forward = module.Model.forward
    module.Model.forward = lambda self, x, y=None: calls.append(tuple(x.shape)) or forward(self, x, y)
    new = module.ModelNew(16, 24)
    x = torch.randn(8, 16)
    with torch.no_grad():
        new(x)
        assert calls == []
        new(x[:4])
        new(x, y=None)
        new.double()(x.double())
        other = module.ModelNew(16, 24, 0.25)
        torch.testing.assert_close(other(x), forward(other, x))
        assert len(calls) == 4
    module.ModelNew(16, 24)(x).sum().backward()
    assert len(calls) == 5


def test_a_mode_that_matters_is_looked_at() -> None:
    text = import_file(FOLDER / "dropout_linear.py", "torch").text
    module = load_module(text, "dropout")
    new, x = module.ModelNew(256).eval(), torch.randn(64, 256)
    with torch.no_grad():
        torch.testing.assert_close(new(x), torch.relu(new.linear(x)) + x)
    assert "self.training" not in import_file(FOLDER / "linear_gelu.py", "torch").text


STATE = """\
import torch


class Model(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.cell, self.hidden, self.calls = torch.nn.Linear(2 * n, n), torch.zeros(4, n), [0]

    def forward(self, x):
        found = torch.tanh(self.cell(torch.cat([x, self.hidden], 1)))
        KEPT
        return found


def get_inputs():
    return [torch.randn(4, 8)]


def get_init_inputs():
    return [8]
"""


@pytest.mark.parametrize(
    ("kept", "name"),
    [
        ("self.hidden = found", "hidden"),
        ("self.hidden.copy_(found)", "hidden"),
        ("self.calls[0] += 1", "calls"),
        ("self.cell.last = found", "cell.last"),
    ],
)
def test_a_model_that_keeps_state_stays_as_it_is(kept: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / "state.py"
    file.write_text(STATE.replace("KEPT", kept))
    found = import_file(file, "torch")
    assert (found.taken, found.left) == (0, {"all": f"it keeps state from call to call in {name}"})
    file.write_text(STATE.replace("KEPT", "pass"))
    assert import_file(file, "torch").share == 1


ATTRIBUTES = """\
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rest = torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
        self.scale, self.shift, self.act, self.by, self.many = 2.0, torch.ones(8), "relu", {"k": 3.0}, [torch.ones(8)]
        self.function = torch.abs

    def forward(self, x):
        y = self.function(self.rest(self.first(x)) * self.scale + self.shift)
        return (torch.relu(y) if self.act == "relu" else torch.tanh(y)) * self.by["k"]


def get_inputs():
    return [torch.randn(4, 8)]


def get_init_inputs():
    return []
"""

CHANGES = {
    "number": lambda m: setattr(m, "scale", 5.0),
    "tensor": lambda m: setattr(m, "shift", torch.zeros(8)),
    "text": lambda m: setattr(m, "act", "tanh"),
    "dict": lambda m: m.by.update(k=7.0),
    "function": lambda m: setattr(m, "function", torch.neg),
    "module": lambda m: m.rest.__setitem__(1, torch.nn.Tanh()),
    "number of a module": lambda m: setattr(m.rest[1], "approximate", "tanh"),
    "hook": lambda m: m.first.register_forward_hook(lambda mod, given, found: found * 10),
    "hook before": lambda m: m.rest.register_forward_pre_hook(lambda mod, given: (given[0] * 10,)),
    "forward": lambda m: setattr(m.first, "forward", torch.exp),
}


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_changed_after_a_model_is_made_counts(copied: bool, tmp_path: Path) -> None:
    file = tmp_path / "attributes.py"
    file.write_text(ATTRIBUTES)
    found = import_file(file, "torch")
    assert found.share == 1
    module, x = load_module(found.text, "attributes"), torch.randn(4, 8)
    for name, change in CHANGES.items():
        models = []
        for make in (module.Model, module.ModelNew):
            torch.manual_seed(0)
            models.append(copy.deepcopy(make()) if copied else make())
        with torch.no_grad():
            before = models[1](x)
            for model in models:
                change(model)
            results = [model(x) for model in models]
        assert not torch.equal(before, results[0]), name
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    calls: list[int] = []
    forward = module.Model.forward
    module.Model.forward = lambda self, x: calls.append(1) or forward(self, x)
    new = copy.deepcopy(module.ModelNew()) if copied else module.ModelNew()
    with torch.no_grad():
        new.eval()(x)
        assert not calls
        new.scale = 3.0
        new(x)
        assert len(calls) == 1


def test_a_new_model_that_differs_is_refused(clashes: Path) -> None:
    module = load_module(CLASHES, "clashes")
    given = (module.Model, [16, 24], [[torch.randn(8, 16)], [torch.randn(8, 16)]], torch.float32)
    for change, why in (
        ("return super().forward(x) + 1e-3", "does not compute what Model does"),
        ("return super().forward(x)", "calls the forward of Model"),
    ):
        new = f"\n\nclass ModelNew(Model):\n    def forward(self, x):\n        {change}\n"
        if "1e-3" in change:
            new = new.replace("super().forward(x)", "narrow(self.layers(x)) * self.scale + EXPECTED")
        with pytest.raises(VerificationError, match=why):
            _check("clashes", CLASHES + new, *given)
    kept = "        found = narrow(self.layers(x)) * self.scale + EXPECTED\n"
    kept += "        self.first = getattr(self, 'first', found)\n        return self.first\n"
    with pytest.raises(VerificationError, match="does not compute what Model does"):  # from the second call on
        _check("clashes", f"{CLASHES}\n\nclass ModelNew(Model):\n    def forward(self, x):\n{kept}", *given)
    start = "\n\nclass ModelNew(Model):\n    def __init__(self, *args):\n        torch.rand(1)\n"
    with pytest.raises(VerificationError, match=r"layers\.0\.weight of ModelNew is not that of Model"):
        _check("clashes", CLASHES + start + "        super().__init__(*args)\n", *given)


def test_the_new_file_needs_no_mugraph(tmp_path: Path) -> None:
    found = import_file(FOLDER / "conv_epilogue.py", "cuda:90")
    (tmp_path / "new.py").write_text(found.text)
    script = """
import sys
sys.modules["mugraph"] = None
import new, torch
x = torch.randn(2, 8, 14, 14)
bias = torch.randn(8, 1, 1)
torch.testing.assert_close(new.run_part_0(x, bias), torch.tanh(torch.relu(x + bias) * 0.5), rtol=1e-5, atol=1e-5)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)


BAD = {
    "syntax": ("def f(:", "SyntaxError"),
    "raises": ("raise OSError('no')", "OSError: no"),
    "no model": ("import torch\n", "has no Model, get_inputs, get_init_inputs"),
    "no module": (CLASHES.replace("class Model(torch.nn.Module)", "class Model(object)"), "Model"),
    "constructor": (CLASHES.replace("return [16, 24]", "return [16]"), "missing 1 required positional argument"),
    "a tensor": (CLASHES.replace("[torch.randn(8, 16)]", "torch.randn(8, 16)"), "returns a Tensor"),
    "a number": (CLASHES.replace("return [16, 24]", "return 16"), "get_init_inputs of"),
    "inputs": (CLASHES.replace("torch.randn(8, 16)", "torch.randn(8, 15)"), "cannot be multiplied"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_error_and_write_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, problem = BAD[case]
    (tmp_path / "bad.py").write_text(text)
    out = tmp_path / "new.py"
    out.write_text("as it was")
    assert main(["import", "kernelbench", str(tmp_path / "bad.py"), "-o", str(out)]) == 2
    printed = capsys.readouterr()
    assert problem in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert out.read_text() == "as it was"


def test_the_command_says_what_was_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, code in (("conv_epilogue", 0), ("conv_only", 3)):
        out = tmp_path / "new.py"
        assert main(["import", "kernelbench", str(FOLDER / f"{name}.py"), "-o", str(out), "--target", "torch"]) == code
        assert capsys.readouterr().out.splitlines()[0] in out.read_text()
    file = tmp_path / "given.py"
    file.write_text(CLASHES)
    assert main(["import", "kernelbench", str(file), "-o", str(file)]) == 2
    assert file.read_text() == CLASHES
    with pytest.raises(CaptureError, match="cannot read"):
        import_file(tmp_path / "absent.py")
    with pytest.raises(SettingError, match="f32, f16, bf16"):
        import_file(FOLDER / "conv_only.py", dtype="f64")


def test_half_precision_is_what_is_asked_for() -> None:
    found = import_file(FOLDER / "linear_gelu.py", "torch", "bf16")
    assert "torch.bfloat16" in found.text
    assert found.share == 1
