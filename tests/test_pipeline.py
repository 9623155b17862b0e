"""The whole path on real programs: found structures, emitted sources, checks, the cache, and bad input."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph as mg
from mugraph import pipeline
from mugraph.cli.saved import recheck_saved
from mugraph.errors import (
    CacheError,
    CacheWarning,
    CompileError,
    LaunchError,
    MugraphError,
    SettingError,
    TargetMismatchError,
    UnknownTargetError,
    VerificationError,
)
from mugraph.ir.evaluate import reference
from mugraph.ir.resize import recast, reduction, resized
from mugraph.ir.types import DType
from mugraph.result import Result
from mugraph.runtime.bench import Spread
from mugraph.runtime.cache import Cache
from mugraph.runtime.compile import SHARED_LIMITS, Compiler, Resources
from mugraph.runtime.interpret import Interpreter, shared_interpreter
from mugraph.runtime.timing import Refused
from mugraph.search.driver import search
from mugraph.transpiler.target import parse_target
from mugraph.verify.equivalence import Verified, recheck, verify
from mugraph.verify.numeric import numeric_check
from tests import graphs

TORCH_TYPES = {DType.f16: torch.float16, DType.bf16: torch.bfloat16, DType.f32: torch.float32}
PROGRAMS = {name: make for name, (make, _) in graphs.ALL.items()}


def small(name: str, dtype: DType = DType.f32) -> mg.Program:
    """The program at sizes that take no time."""
    sizes = {"rmsnorm_linear": (24, 40), "gated_mlp": (24, 40), "lora": (24, 40, 4), "gqa": (40, 16)}[name]
    return PROGRAMS[name](dtype, *sizes)


def arguments(program: mg.Program, b: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in program.inputs:
        shape = [b if not isinstance(s, int) else s for s in i.tensor.shape]
        found.append(torch.randn(shape, generator=generator).to(TORCH_TYPES[i.tensor.dtype]))
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Verified]:
    """What the search finds for each program at its true sizes, in f16, stabilised and verified."""
    graphs_found = {}
    for name, make in PROGRAMS.items():
        program = make()
        result = search(program, accept=lambda g, p=program: verify(p, pipeline.finished(g)))
        assert isinstance(result.accepted, Verified)
        graphs_found[name] = result.accepted
    return graphs_found


@pytest.mark.parametrize("name", PROGRAMS)
def test_result_agrees_with_float64(name: str, tmp_path: Path) -> None:
    program = small(name)
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    for b in (1, 7):
        args = arguments(program, b)
        (wanted,) = reference(program, {i.name: a.numpy() for i, a in zip(program.inputs, args, strict=True)}, {"B": b})
        torch.testing.assert_close(result(*args), torch.from_numpy(wanted).float(), rtol=1e-4, atol=1e-4)


B = mg.Dim("B", 1, 64)


@mg.program
def logsumexp(x: mg.f32[B, 48]):
    return mg.logsumexp(x)


@mg.program
def attention_and_logsumexp(q: mg.f32[B, 16], k: mg.f32[40, 16], v: mg.f32[40, 16]):
    scores = q @ k.mT
    return mg.softmax(scores) @ v, mg.logsumexp(scores)


@mg.program
def cross_entropy(x: mg.f32[B, 48], wanted: mg.f32[B, 48]):
    return -(wanted * (x - mg.logsumexp(x, -1, True))).sum(-1)


@mg.program
def log_of_softmax(x: mg.f32[B, 48], wanted: mg.f32[B, 48]):
    return -(wanted * mg.log(mg.softmax(x))).sum(-1)


@pytest.mark.parametrize(
    "program", [logsumexp, attention_and_logsumexp, cross_entropy, log_of_softmax], ids=lambda p: p.name
)
def test_a_stabilised_logarithm_is_verified_and_finite_for_large_inputs(program: mg.Program, tmp_path: Path) -> None:
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    assert len(result.graph.kernels()) == 1
    assert result.certificate.unused_laws == ()
    args = [100 * a for a in arguments(program, 5)]
    found = result(*args)
    for y in found if isinstance(found, tuple) else (found,):
        assert torch.isfinite(y).all()


def reduced_source(v: Verified, dtype: DType, target: str) -> tuple[mg.Program, str]:
    """The same μGraph in another element type at sizes of two tiles and a tail, lowered for the target."""
    sizes, tiles = reduction(v.program, v.graph)
    program, graph = (
        recast(resized(g, sizes, tiles), {DType.f16: dtype}) for g in (v.program, v.graph)
    )  # fmt: skip
    return program, pipeline.emit(verify(program, graph, delta=2.0**-20), parse_target(target))


def check_interpreted(v: Verified, dtype: DType, rows: list[int], interpreter: Interpreter) -> None:
    program, source = reduced_source(v, dtype, "cuda:90")
    order = [i.name for i in program.inputs]
    report = numeric_check(
        program,
        lambda inputs, bindings: interpreter.run(source, {n: inputs[n] for n in order}),
        bindings=[{"B": b} for b in rows],
        how="interpreted",
        draws=("normal", "logits"),
        beyond_eager=True,
    )
    assert report.passed, report
    assert any(r.counted for r in report.rows)


@pytest.mark.parametrize("name", PROGRAMS)
def test_found_kernels_pass_the_interpreter(name: str, found: dict[str, Verified]) -> None:
    with shared_interpreter() as interpreter:
        check_interpreted(found[name], DType.bf16, [7], interpreter)


@pytest.mark.full
@pytest.mark.parametrize("dtype", list(TORCH_TYPES), ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_found_kernels_pass_the_interpreter_everywhere(name: str, dtype: DType, found: dict[str, Verified]) -> None:
    with Interpreter(timeout=600) as interpreter:
        check_interpreted(found[name], dtype, [1, 7, 16, 33], interpreter)


def test_a_wrong_kernel_fails_the_interpreter(found: dict[str, Verified]) -> None:
    program, source = reduced_source(found["gated_mlp"], DType.f32, "cuda:90")
    broken = source.replace("tl.sigmoid", "tl.exp") if "tl.sigmoid" in source else source.replace("1.0 + ", "2.0 + ")
    assert broken != source
    order = [i.name for i in program.inputs]
    with shared_interpreter() as interpreter:
        report = numeric_check(
            program,
            lambda inputs, bindings: interpreter.run(broken, {n: inputs[n] for n in order}),
            bindings=[{"B": 7}],
            how="interpreted",
            draws=("normal",),
        )
    assert not report.passed


def test_found_kernels_compile_for_three_architectures(found: dict[str, Verified]) -> None:
    with Compiler() as compiler:
        for v in found.values():
            source = pipeline.emit(v, parse_target("cuda:90"))
            for arch in (80, 90, 100):
                kernels = compiler.resources(source, arch)
                assert kernels
                for k in kernels:
                    assert 16 <= k.registers <= 255
                    assert 0 <= k.shared_bytes <= SHARED_LIMITS[arch]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [DType.bf16, DType.f32], ids=str)
@pytest.mark.parametrize("name", PROGRAMS)
def test_found_kernels_compile_in_every_type(name: str, dtype: DType) -> None:
    program = PROGRAMS[name](dtype)
    result = search(program, accept=lambda g: verify(program, pipeline.finished(g)))
    assert isinstance(result.accepted, Verified)
    source = pipeline.emit(result.accepted, parse_target("cuda:90"))
    with Compiler() as compiler:
        for arch in (80, 90, 100):
            for k in compiler.resources(source, arch):
                assert k.registers >= 16
                assert k.shared_bytes <= SHARED_LIMITS[arch]


# -- the cache


def test_second_run_comes_from_the_cache(tmp_path: Path) -> None:
    program, cache = small("lora"), Cache(tmp_path)
    first = mg.superoptimize(program, target="torch", cache=cache)
    second = mg.superoptimize(program, target="torch", cache=cache)
    assert (first.cached, second.cached) == (False, True)
    assert (first.graph, first.source, first.certificate) == (second.graph, second.source, second.certificate)
    assert str(first.report) == str(second.report)
    args = arguments(program, 3)
    torch.testing.assert_close(first(*args), second(*args))


@pytest.mark.parametrize("damage", ["truncated", "edited", "schema"])
def test_damaged_cache_entries_are_rewritten_with_a_warning(damage: str, tmp_path: Path) -> None:
    program, cache = small("lora"), Cache(tmp_path)
    first = mg.superoptimize(program, target="torch", cache=cache)
    assert first.directory
    manifest, graph = first.directory / "manifest.json", first.directory / "graph.json"
    match damage:
        case "truncated":
            graph.write_text(graph.read_text()[:50])
        case "edited":
            graph.write_text(graph.read_text().replace('"k"', '"kk"'))
        case _:
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema_version": 99}))
    with pytest.warns(CacheWarning):
        again = mg.superoptimize(program, target="torch", cache=cache)
    assert not again.cached
    assert mg.superoptimize(program, target="torch", cache=cache).cached


def test_unwritable_cache_directory_costs_a_warning_only(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("not a directory")
    with pytest.warns(CacheWarning):
        result = mg.superoptimize(small("lora"), target="torch", cache=Cache(place))
    assert not result.cached
    assert place.read_text() == "not a directory"


def test_disallowed_search_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, cache = small("lora"), Cache(tmp_path)
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    with pytest.raises(MugraphError, match="ahead of time"):
        mg.superoptimize(program, target="torch", cache=cache)
    monkeypatch.delenv("MUGRAPH_DISALLOW_SEARCH")
    mg.superoptimize(program, target="torch", cache=cache)
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    assert mg.superoptimize(program, target="torch", cache=cache).cached


# -- saving


def test_saved_result_loads_and_verifies_again(tmp_path: Path) -> None:
    result = mg.superoptimize(small("gqa"), target="torch", cache=Cache(tmp_path / "cache"))
    place = result.save(tmp_path / "out")
    back = mg.load(place)
    assert (back.program, back.graph, back.source) == (result.program, result.graph, result.source)
    recheck(back.certificate, back.program, back.graph)
    args = arguments(result.program, 2)
    torch.testing.assert_close(back(*args), result(*args))
    namespace: dict[str, object] = {}
    exec(compile((place / "kernel.py").read_text(), "kernel.py", "exec"), namespace)  # stands alone
    torch.testing.assert_close(namespace["run"](*args), result(*args))  # type: ignore[operator]


def test_save_replaces_its_own_directories_and_no_others(tmp_path: Path) -> None:
    result = mg.superoptimize(small("lora"), target="torch", cache=Cache(tmp_path / "cache"))
    place = result.save(tmp_path / "out")
    assert result.save(place) == place
    other = tmp_path / "other"
    other.mkdir()
    (other / "keep.txt").write_text("mine")
    with pytest.raises(CacheError, match="not empty"):
        result.save(other)
    assert [p.name for p in other.iterdir()] == ["keep.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "other", "out"]


@pytest.mark.parametrize("name", ["graph.json", "kernel.py", "certificate.json", "manifest.json"])
def test_edited_files_are_refused(name: str, tmp_path: Path) -> None:
    result = mg.superoptimize(small("lora"), target="torch", cache=Cache(tmp_path / "cache"))
    path = result.save(tmp_path / "out") / name
    path.write_text(path.read_text()[:-2])
    with pytest.raises(CacheError):
        mg.load(tmp_path / "out")


# -- bad input and interruptions


def test_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UnknownTargetError, match="cuda:90"):
        mg.superoptimize(small("lora"), target="tpu")


def test_other_things_are_refused() -> None:
    with pytest.raises(MugraphError, match="int"):
        mg.superoptimize(3)


def test_launch_errors_name_the_parameter(tmp_path: Path) -> None:
    program = small("lora")
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    x, *rest = arguments(program, 3)
    with pytest.raises(LaunchError, match="X"):
        result(x[:, :5], *rest)
    with pytest.raises(LaunchError, match="X"):
        result(x.half(), *rest)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(result(strided, *rest), result(x, *rest))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_result_for_an_absent_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = small("lora")
    result = mg.superoptimize(program, target="cuda:90", cache=Cache(tmp_path))
    assert result.certificate.numerics[0].how == "interpreted"
    args = arguments(program, 3)
    with pytest.raises(TargetMismatchError, match="MUGRAPH_INTERPRET"):
        result(*args)
    monkeypatch.setenv("MUGRAPH_INTERPRET", "1")
    torch.testing.assert_close(
        result(*args), mg.superoptimize(program, target="torch", cache=Cache(tmp_path))(*args), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("wrong", [1, 99])
def test_after_a_source_that_disagrees_the_next_plan_is_tried(
    wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, given = small("rmsnorm_linear"), list[Verified]()
    real = pipeline.Checked

    def disagreeing(verified: Verified, *rest: object) -> object:
        if verified.graph.kernels():
            given.append(verified)
            if len(given) <= wrong:
                raise VerificationError("the source does not agree with float64")
        return real(verified, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "Checked", disagreeing)
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    texts = [str(v.graph) for v in given]
    assert len(texts) == len(set(texts))
    assert 2 <= len(texts) <= min(wrong + 1, pipeline.MOST_REFUSED)
    assert bool(result.graph.kernels()) == (wrong == 1) == (str(result.graph) == texts[-1])
    assert any("plans were refused: the source does not agree" in note for note in result.notes)
    verdicts = [c.verdict for c in result.report.candidates]
    assert verdicts.count("chosen") == 1
    assert verdicts.count("refused: the source does not agree with float64") == min(wrong, len(texts))
    assert result.unchanged == (wrong == 99)


def test_after_library_calls_in_another_order_that_disagree_the_next_plan_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = mg.trace(lambda x, v, w: x @ v @ w, [mg.f32[512, 512], mg.f32[512, 512], mg.f32[512, 1]], "chain")
    real, given = pipeline.Checked, list[Verified]()

    def disagreeing(verified: Verified, *rest: object) -> object:
        given.append(verified)
        if len(given) == 1:
            raise VerificationError("the source does not agree with float64")
        return real(verified, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "Checked", disagreeing)
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    first, second = given
    assert not first.graph.kernels()
    assert len(first.graph.equations) == 2
    assert str(second.graph) == str(result.graph) != str(first.graph)


def test_ctrl_c_gives_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = small("gqa")
    real = pipeline.search

    def interrupted_search(*args: object, **options: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "search", interrupted_search)
    before = signal.getsignal(signal.SIGINT)
    result = mg.superoptimize(program, target="torch", cache=Cache(tmp_path))
    assert signal.getsignal(signal.SIGINT) is before
    assert result.report.stop.kind == "Interrupted"
    assert not list(Cache(tmp_path).ls())  # not kept: another run would find more
    args = arguments(program, 2)
    (wanted,) = reference(program, {i.name: a.numpy() for i, a in zip(program.inputs, args, strict=True)}, {"B": 2})
    torch.testing.assert_close(result(*args), torch.from_numpy(wanted).float(), rtol=1e-4, atol=1e-4)


def test_second_ctrl_c_quits() -> None:
    with pipeline.interruptible() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_threads_may_optimise(tmp_path: Path) -> None:
    program, results = small("lora"), []
    threads = [
        threading.Thread(
            target=lambda: results.append(mg.superoptimize(program, target="torch", cache=Cache(tmp_path)))
        )
        for _ in range(2)
    ]  # fmt: skip
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results[0].source == results[1].source


def test_superoptimize_is_one_callable() -> None:
    code = "import mugraph as mg; a = mg.superoptimize; import mugraph.pipeline; assert a is mg.superoptimize; print(a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function superoptimize" in done.stdout


def test_a_report_on_another_source_is_refused(found: dict[str, Verified]) -> None:
    v = found["lora"]
    program = small("lora")
    assert replace(v.certificate, graph_hash="0") != v.certificate
    with pytest.raises(MugraphError):
        recheck(v.certificate, program, v.graph)


# -- tuning


def tuned_result(tmp_path: Path, **options: Any) -> Result:
    return mg.superoptimize(small("rmsnorm_linear"), target="cuda:90", cache=Cache(tmp_path), **options)


def told(monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], Resources]) -> None:
    """Compilers answer from the source."""
    monkeypatch.setattr(Compiler, "resources", lambda self, source, arch, options=None, only=None: [answer(source)])


FINE = Resources("k", 90, 64, 1024, 0, 0, 0, 1, 0, 1, 100)


def test_a_kernel_that_spills_is_emitted_with_other_options_and_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tuned_result(tmp_path, tune="none")
    told(monkeypatch, lambda source: replace(FINE, spills=int("num_warps=16" not in source)))
    found = tuned_result(tmp_path, tune="fit")
    assert not found.cached  # another level, another key
    assert "num_warps=16" in found.source
    assert "num_warps=16" not in plain.source
    assert any(c.value == 16 for c in found.tuning.trace)
    assert "tuned:" in str(found)
    assert tuned_result(tmp_path, tune="fit").tuning == found.tuning  # from the cache
    place = found.save(tmp_path / "out")
    assert mg.load(place).tuning == found.tuning
    assert recheck_saved(place, True, lambda text: None).result.source == found.source


def test_choices_that_were_edited_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, lambda source: FINE)
    place = tuned_result(tmp_path, tune="fit").save(tmp_path / "out")
    data = json.loads((place / "tuning.json").read_text())
    kernel = small("rmsnorm_linear").name
    for choice in (
        {"kernel": kernel, "name": "num_warps", "value": 16},  # not what kernel.py has
        {"kernel": kernel, "name": "colour", "value": 16},
        {"kernel": "another", "name": "num_warps", "value": 16},
    ):
        (place / "tuning.json").write_text(json.dumps(data | {"choices": [choice]}))
        manifest = json.loads((place / "manifest.json").read_text())
        manifest["files"]["tuning.json"] = hashlib.sha256((place / "tuning.json").read_bytes()).hexdigest()
        (place / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(VerificationError):
            recheck_saved(place, False, lambda text: None)
    (place / "tuning.json").write_text(json.dumps(data | {"level": "unheard of"}))
    manifest["files"]["tuning.json"] = hashlib.sha256((place / "tuning.json").read_bytes()).hexdigest()
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CacheError, match="no saved result"):
        mg.load(place)


def test_kernels_that_do_not_compile_give_way_to_library_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(source: str) -> Resources:
        raise CompileError("ptxas refuses")

    told(monkeypatch, answer)
    found = tuned_result(tmp_path, tune="fit")
    assert "triton.jit" not in found.source
    assert any("not compiled: ptxas refuses" in note for note in found.notes)


def test_without_triton_nothing_is_compiled_and_a_note_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tuned_result(tmp_path, tune="none").graph
    program = small("rmsnorm_linear")
    monkeypatch.setattr(pipeline, "find_spec", lambda name: None)
    _, found = pipeline.tuned(verify(program, graph), parse_target("cuda:90"), "fit")
    assert "Triton is not installed" in found.notes[0]


def test_a_level_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="none, fit, model, measure"):
        tuned_result(tmp_path, tune="hard")


def test_interrupted_tuning_leaves_the_kernel_as_it_was_lowered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(source: str) -> Resources:
        raise KeyboardInterrupt

    plain = tuned_result(tmp_path, tune="none")
    told(monkeypatch, answer)
    found = tuned_result(tmp_path, tune="fit")
    assert found.interrupted
    assert found.source == plain.source
    assert "numerics" not in found.certificate.tiers


class Clock:
    """Says how long files take, by whether they hold kernels."""

    def __init__(self, kernels: float | None, calls: float | None) -> None:
        self.times = {True: kernels, False: calls}

    def seconds(self, source: str, repeats: int) -> Spread | Refused:
        found = self.times["triton.jit" in source]
        return Refused("it hangs") if found is None else Spread(found, found, found)


@pytest.mark.parametrize(
    ("kernels", "calls", "ours"), [(1e-6, 2e-6, True), (2e-6, 1e-6, False), (None, 1e-6, False), (1e-6, None, True)]
)
def test_what_was_measured_slower_than_library_calls_does_not_run(
    kernels: float | None, calls: float | None, ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, lambda source: FINE)
    monkeypatch.setattr(pipeline, "_timer", lambda *given: nullcontext(Clock(kernels, calls)))
    found = tuned_result(tmp_path, tune="measure")
    assert bool(found.graph.kernels()) == ours == (not found.unchanged)
    assert any("measured faster" in note for note in found.notes) == (not ours)
    assert {"tested", "proved", "numerics"} <= set(found.certificate.tiers)
    assert tuned_result(tmp_path, tune="measure").source == found.source  # from the cache
