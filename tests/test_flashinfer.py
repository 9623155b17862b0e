"""FlashInfer-Trace: definitions in, solutions out, and saved results as both."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from mugraph.cli import main
from mugraph.cli.flashinfer import import_file, parse_definition, program_of
from mugraph.cli.saved import recheck_saved
from mugraph.errors import CacheError, CompileError, ParseError, UnsupportedOpError
from mugraph.runtime.load import load_module

NORM = {
    "name": "rmsnorm_d64",
    "op_type": "rmsnorm",
    "tags": ["status:draft"],
    "axes": {"batch_size": {"type": "var"}, "hidden_size": {"type": "const", "value": 64}},
    "inputs": {
        "input": {"shape": ["batch_size", "hidden_size"], "dtype": "float32"},
        "weight": {"shape": ["hidden_size"], "dtype": "float32"},
        "eps": {"shape": None, "dtype": "float32"},
    },
    "outputs": {"output": {"shape": ["batch_size", "hidden_size"], "dtype": "float32"}},
    "reference": """\
import torch


@torch.no_grad()
def run(input, weight, eps):
    batch_size, hidden_size = input.shape
    assert hidden_size == 64
    return input * torch.rsqrt(input.pow(2).mean(-1, keepdim=True) + eps) * weight
""",
}
GEMM = {
    "name": "gemm-n32",
    "op_type": "gemm",
    "axes": {"M": {"type": "var"}, "N": {"type": "const", "value": 32}, "K": {"type": "const", "value": 48}},
    "inputs": {"A": {"shape": ["M", "K"], "dtype": "float16"}, "B": {"shape": ["N", "K"], "dtype": "float16"}},
    "outputs": {"C": {"shape": ["M", "N"], "dtype": "float16"}, "top": {"shape": ["M"], "dtype": "float16"}},
    "reference": "def run(A, B):\n    C = A @ B.T\n    return C, C.amax(-1)\n",
}


def written(place: Path, data: Any) -> Path:
    file = place / "given.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def checked(solution: dict[str, Any], definition: dict[str, Any]) -> str:
    """What the schema asks of a solution; the text of its entry."""
    assert solution["definition"] == definition["name"]
    assert all(isinstance(solution[key], str) and solution[key] for key in ("name", "author"))
    spec, sources = solution["spec"], {s["path"]: s["content"] for s in solution["sources"]}
    assert spec["language"] in ("python", "triton", "cuda", "cpp")
    assert isinstance(spec["destination_passing_style"], bool)
    assert all(isinstance(h, str) for h in [*spec["target_hardware"], *spec["dependencies"]])
    assert spec["target_hardware"]
    file, _, function = spec["entry_point"].partition("::")
    assert function == "run"
    compile(sources[file], file, "exec")
    text: str = sources[file]
    return text


def norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def test_a_definition_becomes_a_solution_that_runs_in_both_styles(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = import_file(written(tmp_path, NORM), out, "torch")
    assert json.loads((out / "definition.json").read_text()) == NORM
    run = load_module(checked(json.loads((out / "solution.json").read_text()), NORM), "solution").run
    for rows in (1, 7):
        x, w = torch.randn(rows, 64), torch.rand(64)
        given = torch.empty(rows, 64)
        torch.testing.assert_close(run(x, w, 1e-5), norm(x, w, 1e-5), rtol=1e-5, atol=1e-5)
        assert run(x, w, 1e-2, given) is None
        torch.testing.assert_close(given, norm(x, w, 1e-2), rtol=1e-5, atol=1e-5)
    assert recheck_saved(out / "result").result.program == result.program


def test_a_reference_that_is_another_for_one_row_gives_a_solution_from_2_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = copy.deepcopy(NORM)
    data["reference"] = data["reference"].replace(  # type: ignore[attr-defined]
        "    assert hidden_size == 64\n", "    if batch_size == 1:\n        return input * 0.5 * weight\n"
    )
    out = tmp_path / "out"
    code = main(["import", "flashinfer-trace", str(written(tmp_path, data)), "-o", str(out), "--target", "torch"])
    assert code == 0
    assert "note: batch_size begins at 2: at 1 the function computes something else" in capsys.readouterr().err
    solution = json.loads((out / "solution.json").read_text())
    assert solution["description"].endswith("batch_size from 2 on")
    run = load_module(checked(solution, data), "solution").run
    x, w = torch.randn(7, 64), torch.rand(64)
    torch.testing.assert_close(run(x, w, 1e-5), norm(x, w, 1e-5), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="for batch_size from 2 on"):
        run(x[:1], w, 1e-5)


def test_a_solution_for_a_gpu_needs_no_mugraph(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_file(written(tmp_path, GEMM), out, "cuda:90")
    solution = json.loads((out / "solution.json").read_text())
    assert (solution["spec"]["language"], solution["spec"]["target_hardware"]) == ("triton", ["NVIDIA_H100"])
    (tmp_path / "main.py").write_text(checked(solution, GEMM))
    script = """
import sys
sys.modules["mugraph"] = None
import main, torch
a, b = torch.randn(5, 48).half(), torch.randn(32, 48).half()
expected = (a.double() @ b.double().T).half()
given = torch.empty(5, 32).half(), torch.empty(5).half()
main.run(a, b, *given)
for c, top in (main.run(a, b), given):
    torch.testing.assert_close(c, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(top, expected.amax(-1), rtol=1e-2, atol=1e-2)
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", [NORM, GEMM], ids=["norm", "gemm"])
def test_what_is_exported_is_imported_again(given: dict[str, Any], tmp_path: Path) -> None:
    result = import_file(written(tmp_path, given), None, "torch")
    place = result.save(tmp_path / "saved")
    assert main(["export", str(place), "--to", "flashinfer-trace", "-o", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "definition.json").read_text()
    again = program_of(parse_definition(text))
    checked(json.loads((tmp_path / "out" / "solution.json").read_text()), json.loads(text))
    shapes = [[(str(i.tensor.shape), i.tensor.dtype) for i in p.inputs] for p in (result.program, again)]
    assert shapes[0] == shapes[1]
    found = mg.superoptimize(again, target="torch")
    examples = [torch.rand([s if isinstance(s, int) else 3 for s in i.tensor.shape]) for i in again.inputs]
    examples = [e.to(torch.float16 if given is GEMM else torch.float32) for e in examples]
    torch.testing.assert_close(found(*examples), result(*examples), rtol=1e-2, atol=1e-2)


def test_sizes_that_are_products_are_axes_of_their_own(tmp_path: Path) -> None:
    b = mg.Dim("b", 1, 64)
    program = mg.trace(lambda x, y: mg.reshape(x, (b * 4,)) + y, {"x": mg.f32[b, 4], "y": mg.f32[b * 4]}, "flat")
    mg.superoptimize(program, target="torch").save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), "--to", "flashinfer-trace", "-o", str(tmp_path / "out")]) == 0
    definition = parse_definition((tmp_path / "out" / "definition.json").read_text())
    x, y = definition.inputs
    assert x.shape is not None
    assert y.shape is not None
    assert definition.axes[y.shape[0]] is None
    assert y.shape[0] not in x.shape


def test_torch_is_exported_as_two_files(tmp_path: Path) -> None:
    result = import_file(written(tmp_path, GEMM), None, "cuda:90")
    place = result.save(tmp_path / "saved")
    assert main(["export", str(place), "--to", "torch", "-o", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["kernel.py", "register.py"]
    script = "import sys; sys.modules['mugraph'] = None; import register; print(register.op)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "out", env=environment, capture_output=True)
    assert done.stdout.decode().strip() == str(result.register())


# -- bad input


def but(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(NORM) | changes


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in NORM.items() if k != key}


def output(**changes: Any) -> dict[str, Any]:
    return but(outputs={"output": NORM["outputs"]["output"] | changes})  # type: ignore[index]


BAD: dict[str, tuple[Any, int, str]] = {
    "no JSON": ("{", 2, "it is no JSON"),
    "a list": ([], 2, "is not an object"),
    **{f"no {k}": (without(k), 2, f"it has no {k}") for k in ("name", "op_type", "axes", "inputs", "outputs")},
    "no reference": (without("reference"), 2, "it has no reference"),
    "axis": (but(axes={"batch_size": {"type": "const", "value": 0}}), 2, "axes.batch_size is not an axis"),
    "tensor": (but(inputs={"x": {"shape": "ab", "dtype": "float32"}}), 2, "inputs.x is not a tensor"),
    "unknown axis": (but(inputs={"x": {"shape": ["no"], "dtype": "float32"}}), 2, "there is no axis no"),
    "element type": (output(dtype="float4_e2m1"), 5, "the element type float4_e2m1 is not supported"),
    "syntax": (but(reference="def run(:"), 2, "its reference is no Python"),
    "no run": (but(reference="x = 1"), 2, "has no function run"),
    "names": (but(reference="def run(x, weight, eps): return x"), 2, "takes x, weight, eps"),
    "in and out": (but(outputs={"input": NORM["outputs"]["output"]}), 2, "input is an input and an output"),  # type: ignore[index]
    "keyword": (but(outputs={"lambda": NORM["outputs"]["output"]}), 2, "'lambda' is no name of an argument"),  # type: ignore[index]
    "raises": (but(reference="def run(input, weight, eps): return input @ input"), 2, "RuntimeError"),
    "shape": (output(shape=["hidden_size"]), 2, "for output, not float32[64]"),
    "result": (but(reference="def run(input, weight, eps): return input, input"), 2, "2 results for 1 outputs"),
    "not understood": (but(reference="def run(input, weight, eps): return input.sort(-1).values"), 5, "sort"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_definition_is_one_clear_error_and_writes_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, code, problem = BAD[case]
    out = tmp_path / "out"
    found = main(["import", "flashinfer-trace", str(written(tmp_path, data)), "-o", str(out), "--target", "torch"])
    printed = capsys.readouterr()
    assert problem in printed.err
    assert "Traceback" not in printed.err
    assert (found, printed.out) == (code, "")
    assert not out.exists()


def test_outputs_that_are_inputs_or_each_other_are_exported_under_names_of_their_own(tmp_path: Path) -> None:
    program = mg.trace(lambda x: (x, x, x + 1), {"x": mg.f32[4]}, "same")
    mg.superoptimize(program, target="torch").save(tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), "--to", "flashinfer-trace", "-o", str(tmp_path / "out")]) == 0
    definition = json.loads((tmp_path / "out" / "definition.json").read_text())
    parse_definition(json.dumps(definition))
    run = load_module(checked(json.loads((tmp_path / "out" / "solution.json").read_text()), definition), "same").run
    x, given = torch.randn(4), [torch.empty(4) for _ in definition["outputs"]]
    run(x, *given)
    assert all(torch.equal(a, b) for a, b in zip(given, (x, x, x + 1), strict=True))


def test_a_solution_that_is_no_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mugraph.cli import flashinfer

    monkeypatch.setattr(flashinfer, "renamed", lambda text, names: text + "\ndef (")
    with pytest.raises(CompileError, match=r"rmsnorm_d64 does not compile"):
        import_file(written(tmp_path, NORM), tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()


def test_places_of_others_are_left_alone(tmp_path: Path) -> None:
    file = written(tmp_path, NORM)
    with pytest.raises(CacheError, match="holds something else"):
        import_file(file, tmp_path, "torch")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["given.json"]
    result = import_file(file, tmp_path / "out", "torch")
    import_file(file, tmp_path / "out", "torch")  # its own place
    saved = str(result.save(tmp_path / "saved"))
    for to in ("torch", "flashinfer-trace"):
        assert main(["export", saved, "--to", to, "-o", str(tmp_path)]) == 2
    with pytest.raises(ParseError, match="cannot read"):
        import_file(tmp_path / "absent.json")


def test_a_definition_with_numbers_out_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="the output output is no tensor"):
        program_of(parse_definition(json.dumps(output(shape=None))))


def test_the_axes_are_read() -> None:
    assert parse_definition(json.dumps(NORM)).axes == {"batch_size": None, "hidden_size": 64}
    assert [str(i.tensor.shape[0]) for i in program_of(parse_definition(json.dumps(GEMM))).inputs] == ["M", "32"]
