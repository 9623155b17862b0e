"""The examples run and assert what they say; the demo shows every stage."""

import importlib
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import mugraph as mg
from examples import demo
from mugraph.errors import VerificationError

ROOT = Path(__file__).parent.parent
NAMES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem not in ("__init__", "demo", "llama"))


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, capsys):
    importlib.import_module(f"examples.{name}").main()
    assert re.search(r"one kernel|error <=", capsys.readouterr().out)


def test_the_language_model_writes_the_same_tokens(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'mugraph[dev]'")
    from examples import llama

    llama.main(["--tokens", "4", "--rest", "eager", "--parts", "all"])
    assert re.search(r"[1-9]\d* of \d+ operators taken over", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["rmsnorm_linear", "gated_mlp", "lora", "attention", "hand_written_block"])
def test_a_result_that_is_slightly_off_fails_the_example(name, monkeypatch):
    call = mg.Result.__call__
    monkeypatch.setattr(mg.Result, "__call__", lambda *args: call(*args) + 2.0**-4)
    with pytest.raises(AssertionError):
        importlib.import_module(f"examples.{name}").main()


@pytest.mark.parametrize("name", ["rmsnorm_linear", "gated_mlp", "lora", "attention"])
def test_another_structure_fails_the_example(name, monkeypatch):
    module = importlib.import_module(f"examples.{name}")
    program = getattr(module, "gqa" if name == "attention" else name)
    plain = mg.KernelGraph(program.name, program.inputs, program.equations, program.outputs)
    monkeypatch.setattr(mg, "superoptimize", lambda *_, **__: mg.from_graph(program, plain, target="torch"))
    # plain exponentials overflow f16: attention as it is written is refused before the example looks at it
    with pytest.raises((ValueError, VerificationError), match=r"not enough values|does not agree with float64"):
        module.main()


def test_the_demo_shows_and_writes_every_stage(tmp_path, capsys):
    demo.main(["lora", "--out", str(tmp_path)])
    text = capsys.readouterr().out
    for expected in (
        r"^program lora$",
        r"^mugraph lora$",
        r"imap\{b: 0, n: -\} fmap\{k: 1\}",
        r"omap\{b: 0, n: 1\}",
        r"^search of lora: Saturated",
        r"probability δ <= 2\^-\d",
        r"^Predicted on .+ at b = 16: [\d.]+ µs, \d+ % of the floor",
        r"against float64",
        r"│ lora +│ +1 │",
        r"^Compiled for sm_\d+:$",
        r"^ +lora +\d+ +\d+ +\d+ +[1-9]\d* +$",
        r"[\d.]+ s on the processor$",
    ):
        assert re.search(expected, text, re.MULTILINE), expected
    place = tmp_path / "lora"
    assert ElementTree.parse(place / "graph.svg").getroot().tag.endswith("svg")
    assert "triton.jit" in (place / "kernel.py").read_text()
    assert json.loads((place / "manifest.json").read_text())["program"] == "lora"
    loaded = mg.load(place)
    assert loaded.graph.kernels()
    assert str(loaded.graph) in text


def test_the_demo_names_its_programs(capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["lorry"])
    assert stopped.value.code == 2
    assert "known: rmsnorm_linear, gated_mlp, lora, gqa" in capsys.readouterr().err


@pytest.mark.full
def test_the_whole_demo_takes_under_a_minute_and_says_the_same_twice(tmp_path):
    texts = []
    for _ in range(2):
        command = [sys.executable, "-m", "examples.demo", "--out", str(tmp_path / "out")]
        texts.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    spent = re.search(r"([\d.]+) s, of which ([\d.]+) s on the processor", texts[0])
    assert spent is not None
    assert float(spent[2]) < 60
    first, second = (re.sub(r"\d+(\.\d+)? m?s\b", "# s", text) for text in texts)
    assert first == second
