"""The command line: what it writes where, with which exit code."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import mugraph as mg
from mugraph import pipeline, settings
from mugraph.cli import commands, main
from mugraph.cli.commands import EXIT_CODES, exit_code, with_shapes_apart
from mugraph.cli.subject import parse_shapes, program_of
from mugraph.errors import CompileError, MugraphError, NoCandidateError, ShapeError, VerificationError
from mugraph.ir.axes import Dim
from mugraph.pytorch import capture
from mugraph.pytorch.capture import Captured
from mugraph.runtime.bench import Spread
from mugraph.runtime.timing import Records
from tests import graphs

ROOT = Path(__file__).parent.parent

MODEL = """\
import mugraph as mg

print("a line that the file prints")
N = mg.Dim("N", 1, 64)


@mg.program
def mlp(x: mg.f32[N, 24], w1: mg.f32[24, 40], w2: mg.f32[24, 40]):
    return mg.silu(x @ w1) * (x @ w2)


def annotated(x: mg.f32["n", 32], w: mg.f32[32, 16]):
    return mg.exp(x) @ w


def bare(x, w, scale=2.0):
    return mg.rms_norm(x) @ w * scale


def broken(x):
    return x @ undefined


def unknown(x):
    return mg.gelu(x, approximate="cubic")


number = 3
"""

TORCH_MODEL = """\
import torch
import torch.nn.functional as F


def norm(x):
    return F.rms_norm(x, (64,))


def through_a_helper(x, w):
    return norm(x) @ w


layer = torch.nn.Linear(64, 32)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    (place / "model.py").write_text(MODEL)
    (place / "torch_model.py").write_text(TORCH_MODEL)
    (place / "raises.py").write_text("import mugraph\n\nx = 1 / 0\n")
    (place / "syntax.py").write_text("def f(:\n")
    (place / "leaves.py").write_text("import sys\n\nsys.exit(0)\n")
    return place


@pytest.fixture(scope="module")
def saved(folder: Path) -> Path:
    """What the real command wrote, run once in a process of its own."""
    run = command(["optimize", "model.py:mlp", "--target", "torch", "-o", "out/", "--json"], folder)
    assert run.returncode == 0, run.stderr
    (folder / "stdout").write_text(run.stdout)
    (folder / "stderr").write_text(run.stderr)
    return folder / "out"


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def command(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    line = [sys.executable, "-m", "mugraph", *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, env=environment, check=False)


def ends(arguments: str, code: int, *texts: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command in this process: its code, all these texts on stderr, no traceback.  Returns stdout."""
    found = main(arguments.split())
    out, err = capsys.readouterr()
    assert found == code, err
    assert "Traceback" not in err
    for text in texts:
        assert text in err
    return out


# -- optimize


def test_optimize_writes_a_directory_that_loads(saved: Path) -> None:
    document = json.loads((saved.parent / "stdout").read_text())
    assert document["program"] == "mlp"
    assert document["target"] == "torch"
    assert document["tiers"] == ["tested", "proved", "numerics"]
    assert document["delta_log2"] <= -40
    assert document["predicted_seconds"] > 0
    assert document["percent_of_floor"] == pytest.approx(
        100 * document["floor_seconds"] / document["predicted_seconds"]
    )
    assert document["beats_baseline"] is True
    assert document["notes"] == []
    assert {*document["files"], "manifest.json"} == {p.name for p in saved.iterdir()}
    loaded = mg.load(saved)
    assert str(loaded.program) == str(program_of(f"{saved.parent / 'model.py'}:mlp"))


def test_optimize_narrates_on_stderr_and_says_at_last_how_to_use_the_result(saved: Path) -> None:
    lines = (saved.parent / "stderr").read_text().splitlines()
    assert lines[0] == "a line that the file prints"
    assert lines[1].startswith("[0.0s] searching mlp for torch")
    assert lines[-1] == "use it: mugraph.load('out')(x, w1, w2), or run(x, w1, w2) of out/kernel.py alone"


def test_a_second_run_comes_from_the_cache_and_prints_the_summary(
    saved: Path, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ends("optimize model.py:mlp --target torch", 0, "found in the cache", "keep it:", capsys=capsys)
    assert out.startswith("mugraph mlp")
    assert "from the cache" in out
    listed = json.loads(ends("cache ls --json", 0, capsys=capsys))
    assert "mlp" in {e["program"] for e in listed["entries"]}
    assert "mlp" in ends("cache ls", 0, "results in", capsys=capsys)


def test_nothing_better_than_the_baseline_has_a_code_of_its_own(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "optimize model.py:annotated --target torch --effort none --json"
    document = json.loads(ends(arguments, 3, "nothing was searched: what was emitted", capsys=capsys))
    assert document["beats_baseline"] is False
    (note,) = document["notes"]
    assert note.startswith("nothing was searched")


def test_cubins_are_written_beside_the_result(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "optimize model.py:bare --shapes x=Bx64:f16 --shapes w=64x32:f16 --target cuda:90 --aot 80,90 -o ahead"
    ends(arguments, 0, "wrote cubins for sm_80, sm_90 and aot.py to ahead/aot", capsys=capsys)
    index = json.loads((inside / "ahead/aot/index.json").read_text())
    assert {b["arch"] for b in index["binaries"]} == {80, 90}
    assert {p.name for p in (inside / "ahead/aot").iterdir()} == {*index["files"], "index.json", "aot.py"}
    assert mg.load(inside / "ahead").directory == inside / "ahead"
    ends("verify ahead", 0, capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("--target cuda:90 --aot 90", "name a directory with -o"),
        ("--target cuda:90 --aot ninety -o never", "--aot ninety is no list"),
        ("--target cuda:90 --aot 90,90 -o never", "--aot 90,90 is no list"),
        ("--target cuda:90 --aot 90 --sizes 0,5 -o never", "--sizes 0,5 is no list"),
        ("--target cuda:90 --sizes 1,5 -o never", "is about what --aot writes"),
        ("--target cuda:90 --aot 70 -o never", "there is no architecture sm_70"),
        ("--target torch --aot 90 -o never", "the target is torch"),
    ],
)
def test_architectures_that_cannot_be_compiled_for_are_refused_before_the_search(
    arguments: str, text: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(f"optimize model.py:mlp {arguments}", 2, text, capsys=capsys) == ""
    assert not (inside / "never").exists()


def test_an_interrupted_search_is_saved_and_has_its_code(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline.search
    monkeypatch.setattr(pipeline, "search", lambda *a, **k: real(*a, **{**k, "interrupted": lambda: True}))
    ends("optimize model.py:annotated --target torch --seed 5 -o early", 130, "best so far", capsys=capsys)
    assert (inside / "early" / "manifest.json").is_file()
    ends("verify early", 0, capsys=capsys)


def test_a_second_interrupt_quits(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "optimize", stopped)
    ends("optimize model.py:mlp --target torch -o never", 130, "nothing was saved", capsys=capsys)
    assert not (inside / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "texts"),
    [
        ("nofile.py:f", 2, ["there is no file nofile.py", "FILE.py:fn"]),
        ("model.py", 2, ["names no function"]),
        ("model.py:nope", 2, ["model.py has no nope", "the file has mlp, annotated, bare, broken, unknown"]),
        ("model.py:number", 2, ["of type int: no program and no function"]),
        ("raises.py:f", 2, ["ZeroDivisionError", "raises.py:3: x = 1 / 0"]),
        ("syntax.py:f", 2, ["SyntaxError", "syntax.py:1: def f(:"]),
        ("leaves.py:f", 2, ["SystemExit", "leaves.py:3: sys.exit(0)"]),
        ("model.py:bare", 2, ["the argument x has no type"]),
        ("model.py:broken --shapes x=4x4:f32", 2, ["NameError", "return x @ undefined"]),
        ("model.py:bare --shapes x=4x32:f32 w=33x16:f32", 2, ["[4, 32] and [33, 16]", "return mg.rms_norm(x) @ w"]),
        ("model.py:bare --shapes x=4x32:f32", 2, ["no shape for the argument w"]),
        ("model.py:bare --shapes x=4x32:f99", 2, ["there is no element type f99"]),
        ("model.py:mlp --shapes x=4x32:f32", 2, ["leave out --shapes"]),
        ("model.py:mlp --effort huge", 2, ["none, quick, full"]),
        ("model.py:mlp --budget 0", 2, ["a number of seconds above 0"]),
        ("torch_model.py:layer", 2, ["give --shapes"]),
        ("model.py:unknown --shapes x=4x64:f32", 5, ["MG0003", "gelu has no approximation 'cubic'"]),
    ],
)
def test_bad_input_gets_a_clear_error(
    arguments: str, code: int, texts: list[str], inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(f"optimize {arguments} --target torch -o bad", code, *texts, capsys=capsys) == ""
    assert not (inside / "bad").exists()


@pytest.mark.parametrize("where", [".", "model.py"])
def test_a_place_that_is_not_ours_is_refused_before_the_search(
    where: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(inside.iterdir())
    ends(f"optimize nofile.py:f -o {where}", 2, "MG0014", "name another directory", capsys=capsys)
    assert sorted(inside.iterdir()) == before


def test_an_unknown_target_lists_the_known_ones(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends("optimize model.py:mlp --target cuda:91", 2, "MG0013", "cuda:90", capsys=capsys)


def test_engines_that_cannot_be_meant_are_refused(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends("optimize model.py:mlp --target torch --engine cluster", 2, "MG0015", "processes", capsys=capsys)
    ends("optimize model.py:mlp --target torch --workers 2", 2, "MG0015", "processes", capsys=capsys)


def test_with_json_an_error_is_the_document(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(ends("optimize nofile.py:f --json", 2, "MG0002", capsys=capsys))
    assert document["exit_code"] == 2
    assert document["error"]["code"] == "MG0002"


def test_an_internal_error_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "environment", lambda: 1 / 0)
    assert main(["env"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "name"), [(["--debug"], None), ([], "+search")])
def test_tracebacks_are_there_when_asked_for(
    arguments: list[str], name: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name:
        monkeypatch.setenv("MUGRAPH_LOGS", name)
    assert main([*arguments, "show", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_every_class_of_error_has_its_code() -> None:
    assert exit_code(VerificationError("x")) == 4
    assert exit_code(CompileError("x")) == 6
    assert exit_code(NoCandidateError("x")) == 3
    assert exit_code(MugraphError("x")) == 1
    assert {c for c in MugraphError.__subclasses__() if c.__module__ == "mugraph.errors"} == set(EXIT_CODES)


# -- shapes and PyTorch


def test_shapes_may_be_static_symbolic_or_scalar() -> None:
    found = parse_shapes(["x=Bx4096:f16", "s=:f32", "m=3:bool"])
    assert [str(s) for s in found.values()] == ["f16[B, 4096]", "f32[]", "bool[3]"]
    assert found["x"].shape[0] == Dim("B")


@pytest.mark.parametrize(
    "text", ["x", "x=", "x=4", "x=4:", "x=4x:f16", "x=0:f16", "x=-1:f16", "4=4:f16", "x=4:f16:f16"]
)
def test_anything_else_is_no_shape(text: str) -> None:
    with pytest.raises(ShapeError):
        parse_shapes([text])


def test_an_argument_has_one_shape() -> None:
    with pytest.raises(ShapeError, match="two shapes"):
        parse_shapes(["x=4:f16", "x=4:f16"])


def test_several_shapes_may_follow_one_option() -> None:
    given = "optimize m.py:f --shapes x=4:f16 w=4x4:f16 --target torch a=1:f16"
    assert with_shapes_apart(given.split()) == (
        ["optimize", "m.py:f", "--shapes", "x=4:f16", "--shapes", "w=4x4:f16", "--target", "torch", "a=1:f16"]
    )


def test_shapes_go_by_name_whatever_their_order(folder: Path) -> None:
    one, other = (program_of(f"{folder}/model.py:bare", s) for s in (SHAPES, SHAPES[::-1]))
    assert one == other
    assert [i.name for i in one.inputs] == ["x", "w"]


SHAPES = ["x=Bx32:f32", "w=32x16:f32"]


def test_pytorch_functions_go_through_capture_with_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples have the shapes that were given, symbolic sizes are dynamic, and helpers are looked into."""
    calls: list[tuple[object, ...]] = []

    def recorded(fn: object, examples: tuple[torch.Tensor, ...], dynamic: object, name: str) -> Captured:
        calls.append(([(*t.shape, t.dtype) for t in examples], dynamic, name))
        return Captured(graphs.lora(), (), {}, {}, (), None, None)

    monkeypatch.setattr(capture, "capture", recorded)
    shapes = ["w=64x16:bf16", "x=Bx64:f32"]
    assert program_of(f"{folder}/torch_model.py:through_a_helper", shapes) == graphs.lora()
    program_of(f"{folder}/torch_model.py:layer", ["input=3x64:f32"])
    assert calls == [
        ([(4, 64, torch.float32), (64, 16, torch.bfloat16)], {"x": {0: Dim("B")}}, "through_a_helper"),
        ([(3, 64, torch.float32)], {}, "layer"),
    ]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "shapes", "inputs"),
    [
        ("through_a_helper", ["x=Bx64:f32", "w=64x16:f32"], ["x", "w"]),
        ("layer", ["input=Bx64:f32"], ["input", "weight", "bias"]),
    ],
)
def test_pytorch_functions_and_modules_are_captured(
    name: str, shapes: list[str], inputs: list[str], folder: Path
) -> None:
    program = program_of(f"{folder}/torch_model.py:{name}", shapes)
    assert [i.name for i in program.inputs] == inputs
    assert [d.name for d in program.dims()] == ["B"]


# -- verify


def test_verify_says_what_it_repeated_and_what_not(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ends(f"verify {saved}", 0, capsys=capsys)
    assert "kernel.py: emitted again from the graph, the same text" in out
    assert "not repeated: numerics" in out
    document = json.loads(ends(f"verify {saved} --strict --json", 0, capsys=capsys))
    assert document["verified"] is True
    assert "numerics: repeated, within the tolerance" in document["checks"]
    assert not any("numerics" in text for text in document["not_repeated"])


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["kernel.py", "graph.json", "certificate.json", "graph.svg", "report.json"])
def test_verify_refuses_one_changed_byte(name: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    assert ends(f"verify {copy}", 4, "MG0007", capsys=capsys) == ""


def rewrite(place: Path, name: str, old: str, new: str) -> None:
    """An edit that also repairs the manifest."""
    text = (place / name).read_text()
    assert old in text
    (place / name).write_text(text.replace(old, new))
    repaired(place)


def repaired(place: Path) -> None:
    """Gives the manifest, if it is still one, the hashes of the files as they are."""
    import hashlib

    try:
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"] = {n: hashlib.sha256((place / n).read_bytes()).hexdigest() for n in manifest["files"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    (place / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("kernel.py", "def run", "# a comment\ndef run", "not what this version emits"),
        ("graph.json", '"silu"', '"gelu"', "about another graph"),
        ("program.json", '"silu"', '"gelu"', "about another program"),
        ("reference.py", "import torch", "import torch  # edited", "does not follow from the graphs"),
        ("certificate.json", '"delta_log2": -', '"delta_log2": -1', "a new run"),
        ("certificate.json", '"source_hash": "', '"source_hash": "0', "another source"),
    ],
)
def test_verify_refuses_an_edit_with_a_repaired_manifest(
    name: str, old: str, new: str, text: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(copy, name, old, new)
    ends(f"verify {copy}", 4, text, capsys=capsys)


def test_verify_needs_a_saved_result(tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends(f"verify {tmp_path}", 2, "holds no manifest.json", capsys=capsys)
    (copy / "manifest.json").write_text('{"schema_version": 2, "files": {}}')
    ends(f"verify {copy}", 4, "no saved result", capsys=capsys)


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "an empty object": lambda text: "{}",
    "null": lambda text: "null",
    "nested too deeply": lambda text: "[" * 100_000,
    "of another version": lambda text: re.sub(r'"schema_version": ?\d+', '"schema_version": 99', text),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["manifest.json", "program.json", "graph.json", "certificate.json", "report.json"])
def test_damaged_files_are_one_clear_error(
    name: str, damage: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / name
    path.write_text(DAMAGES[damage](path.read_text()))
    repaired(copy)
    for arguments, codes in ((f"verify {copy}", (4,)), (f"show {copy} --format report", (0, 2))):
        assert main(arguments.split()) in codes
        narrated = capsys.readouterr().err
        assert "Traceback" not in narrated
        assert "inside mugraph" not in narrated
    with pytest.raises(MugraphError) as error:
        mg.load(copy)
    assert error.value.remedy


@pytest.mark.parametrize("bad", [3, "x", None, [3]])
def test_fields_of_a_report_have_their_types(bad: object, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "report.json"
    sound = json.loads(path.read_text())
    for field in ("space", "edges", "seeds", "kernels", "candidates", "predicted_seconds", "stop_limit", "seconds"):
        refused = not (field == "space" and bad == "x") and not (field == "stop_limit" and bad in (3, None))
        refused = refused and not (field == "predicted_seconds" and bad == 3)
        path.write_text(json.dumps({**sound, field: bad}))
        repaired(copy)
        ends(f"verify {copy}", 4 if refused else 0, *(["no report"] if refused else []), capsys=capsys)


def test_what_is_no_directory_or_no_file_is_refused(
    tmp_path: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "absent"):
        ends(f"verify {place}", 2, "holds no manifest.json", capsys=capsys)
    (copy / "graph.json").unlink()
    (copy / "graph.json").mkdir()
    ends(f"verify {copy}", 4, "no saved result", capsys=capsys)


def test_strict_refuses_a_record_that_cannot_be_repeated(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(copy, "certificate.json", '"how": "torch"', '"how": "device"')
    ends(f"verify {copy}", 0, capsys=capsys)
    ends(f"verify {copy} --strict", 4, "on record as device, here it runs as torch", capsys=capsys)


# -- show, cache, env


def test_show_prints_every_form(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ends(f"show {saved}", 0, capsys=capsys)
    assert text == (saved / "graph.txt").read_text()
    for source in ("graph.json", "graph.txt"):
        assert ends(f"show {saved / source}", 0, capsys=capsys) == text
    assert ends(f"show {saved} --format json", 0, capsys=capsys).strip() == (saved / "graph.json").read_text()
    assert ends(f"show {saved} --format svg", 0, capsys=capsys).startswith("<svg")
    assert ends(f"show {saved} --format mermaid", 0, capsys=capsys).startswith("flowchart")
    assert ends(f"show {saved} --format report", 0, capsys=capsys).startswith("search of mlp: Saturated")
    assert ends(f"show {saved / 'program.json'}", 0, capsys=capsys).startswith("program mlp")


def test_the_laws_are_printed_where_they_are_asked_for(
    saved: Path, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(saved), "--format", "laws"]) == 0
    laws = capsys.readouterr().out
    assert "as written" in laws
    assert "split" in laws
    assert main(["optimize", "model.py:mlp", "--target", "torch", "--explain"]) == 0
    assert capsys.readouterr().out == laws
    assert main(["optimize", "model.py:mlp", "--target", "torch", "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["explanation"] == laws.rstrip("\n")


def test_why_not_answers_in_text_and_as_data(saved: Path, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = str(saved / "graph.txt")
    assert main(["why-not", "model.py:mlp", graph, "--target", "torch"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("found: it is number 1 of ")
    assert main(["why-not", str(saved), str(saved / "program.json")]) == 0
    assert "library calls" in capsys.readouterr().out
    assert main(["why-not", str(saved), graph, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["answer"], answer["rank"], answer["text"] + "\n") == ("Found", 1, text)
    assert main(["why-not", str(saved), "absent.txt"]) == 2
    assert main(["why-not", "model.py:annotated", graph, "--target", "torch"]) == 0
    assert capsys.readouterr().out.startswith("not equivalent: ")


def test_show_refuses_what_is_no_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("[]")
    (tmp_path / "bad.txt").write_text("program p\n  nonsense\n")
    (tmp_path / "wrong.txt").write_text(str(graphs.gated_mlp()).replace("b, n] = mul", "b, k] = mul"))
    ends(f"show {tmp_path}", 2, "cannot read", capsys=capsys)
    ends(f"show {tmp_path} --format report", 2, "is no report", capsys=capsys)
    ends(f"show {tmp_path / 'bad.txt'}", 2, "MG0005", "^^^", capsys=capsys)
    ends(f"show {tmp_path / 'wrong.txt'}", 2, "Y has the axes [b, k]", capsys=capsys)
    ends(f"show {__file__}", 2, "is no graph", capsys=capsys)
    ends(f"show {tmp_path} --format picture", 2, "picture", capsys=capsys)


def test_the_cache_is_shown_and_cleared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mugraph.runtime.cache import Cache

    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    assert ends("cache path", 0, capsys=capsys) == f"{tmp_path / 'cache'}\n"
    Cache().put("0" * 64, {"kernel.py": "x = 1"})
    assert ends("cache ls", 0, "1 results", capsys=capsys).startswith("000000000000  ")
    ends("cache clear", 0, "removed 1 results", capsys=capsys)
    assert ends("cache ls", 0, "0 results", capsys=capsys) == ""


def test_env_tells_versions_devices_and_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUGRAPH_SEED", "many")
    document = json.loads(ends("env --json", 0, capsys=capsys))
    assert document["versions"]["mugraph"] == mg.__version__
    assert [s["name"] for s in document["settings"]] == [s.name for s in settings.SETTINGS]
    values = {s["name"]: s["value"] for s in document["settings"]}
    assert values["effort"] == "quick"
    assert values["seed"].startswith("invalid: environment variable MUGRAPH_SEED='many'")
    assert "MUGRAPH_EFFORT" in ends("env", 0, capsys=capsys)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends("--version", 0, capsys=capsys) == f"mugraph {mg.__version__}\n"
    text = ends("--help", 0, capsys=capsys)
    assert all(word in text for word in ("optimize", "verify", "show", "cache", "env", "130"))
    assert main(["bogus"]) == 2
    assert "bogus" in capsys.readouterr().err


LIGHT = [["--help"], ["--version"], ["cache", "ls"], ["cache", "path"], ["show", "graph.json", "--format", "svg"]]


def test_what_needs_no_torch_does_not_load_it(tmp_path: Path) -> None:
    from mugraph.ir.serialize import dumps

    (tmp_path / "graph.json").write_text(dumps(graphs.gated_mlp_fused()))
    script = (
        "import sys; from mugraph.cli import main\n"
        f"codes = [main(a) for a in {LIGHT!r}]\n"
        "print(codes, sorted({'torch', 'triton', 'z3'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", script]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment, check=True)
    assert run.stderr.splitlines()[-1] == "[0, 0, 0, 0, 0] []"


def test_help_is_quick_and_plain(tmp_path: Path) -> None:
    """Processor time, which other processes of the machine do not lengthen as they do the clock's."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(2):
        before = used()
        run = command(["--help"], tmp_path)
        seconds.append(used() - before)
        assert run.returncode == 0
        assert "\x1b" not in run.stdout
    assert min(seconds) < 0.5


def test_measurements_are_exported_and_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records, file = Records.of("A Device"), tmp_path / "measured.json"
    ends(f"tuning export {file} --device a-device", 0, capsys=capsys)
    assert json.loads(file.read_text())["rows"] == []
    records.put("0" * 64, "p", {"B": 1}, "source", Spread(2.0, 1.0, 3.0))
    ends(f"tuning export {file} --device a-device", 0, "wrote 1 measurements", capsys=capsys)
    shutil.rmtree(records.directory)
    ends(f"tuning merge {file} --device a-device", 0, "1 new measurements", capsys=capsys)
    assert records.get("0" * 64) == Spread(2.0, 1.0, 3.0)
    ends(f"tuning merge {file} --device another", 2, "it is about a-device", capsys=capsys)
    ends(f"tuning merge {tmp_path / 'absent'} --device another", 2, "cannot read", capsys=capsys)
    ends(f"tuning export {file}", 2, "there is no CUDA device", capsys=capsys)
