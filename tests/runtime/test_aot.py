"""What `--aot` writes runs without triton and without mugraph, and is refused where it was changed or does not fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import mugraph.result
from benchmarks.programs import PROGRAMS
from benchmarks.stub import Stub
from mugraph import pipeline
from mugraph.codegen.lower import plan_graph
from mugraph.errors import (
    CacheError,
    CompileError,
    LaunchError,
    MugraphError,
    SettingError,
    TargetMismatchError,
    TargetWarning,
    UnknownTargetError,
)
from mugraph.ir.axes import Axis, Dim
from mugraph.ir.ops import Contract
from mugraph.ir.resize import resized
from mugraph.ir.types import DType, Input, Storage, tensor
from mugraph.result import Result, load
from mugraph.runtime.aot import HOST, host_part, loader_text, made, turning_points, whole_range
from mugraph.runtime.artefact import INDEX, Artefact, digest, sealed
from mugraph.runtime.bench import Spread
from mugraph.runtime.cache import Cache
from mugraph.runtime.compile import Compiler
from mugraph.runtime.dispatch import Direct, Range, Recorded, Table
from mugraph.runtime.load import Executable
from mugraph.runtime.timing import Refused
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.target import Target
from mugraph.transpiler.triton import emit
from mugraph.verify.certificate import Certificate
from tests.graphs import Builder, rmsnorm_linear, rmsnorm_linear_fused
from tests.graphs import program as program_of
from tests.runtime.test_dispatch import drawn

GRAPH = rmsnorm_linear_fused(DType.f16, 256, 128)
PROGRAM = rmsnorm_linear(DType.f16, 256, 128)
SOURCE = emit(plan_graph(GRAPH))
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def files() -> Files:
    return made(PROGRAM, {HOST: SOURCE}, [80, 90])


def arguments(size: int = 5) -> list[torch.Tensor]:
    return [torch.ones(s, dtype=torch.float16) for s in ((size, 256), (256,), (256, 128))]


def write(files: Mapping[str, bytes], place: Path) -> Path:
    place.mkdir(exist_ok=True)
    for name, content in files.items():
        (place / name).write_bytes(content)
    return place


def edited(files: Files, change: Callable[[dict[str, Any]], Any], seal: bool = True) -> Files:
    """The files with another index."""
    index = json.loads(files[INDEX])
    change(index)
    return files | {INDEX: json.dumps(sealed(index) if seal else index).encode()}


# -- what is written


def test_there_is_an_aligned_and_a_general_cubin_for_each_architecture(files: Files) -> None:
    binaries = Artefact(files).binaries
    assert [(b.arch, b.parameters["X"], b.parameters["X_k"]) for b in binaries] == [
        (80, "*fp16:16", 1), (80, "*fp16", "i32"), (90, "*fp16:16", 1), (90, "*fp16", "i32"),
    ]  # fmt: skip


def test_a_cubin_holds_the_entry_that_the_index_names(files: Files, tmp_path: Path) -> None:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cubin = tmp_path / "k.cubin"
    for b in Artefact(files).binaries:
        cubin.write_bytes(b.image)
        text = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
        assert re.findall(r"\.global\s+(\w+)$", text, re.M) == [b.entry]
        assert re.search(rf"(sm_|EF_CUDA_SM){b.arch}\D", text)


def test_the_index_says_what_the_kernels_need_and_what_made_them(files: Files) -> None:
    index = json.loads(files[INDEX])
    assert index["schema_version"] == 2
    assert set(index["files"]) == set(files) - {INDEX, "aot.py"}
    assert all(index["files"][name] == digest(files[name]) for name in index["files"])
    assert index["versions"]["triton"]
    assert index["timed"] is None
    for b in index["binaries"]:
        assert b["ptxas"]
        assert b["shared"] > 0
        assert b["scratch"] == 0
        assert b["options"]["num_warps"] in (1, 2, 4, 8, 16)


def test_the_host_part_is_the_emitted_text_without_its_kernels() -> None:
    text, signatures = host_part(SOURCE)
    assert list(signatures) == ["rmsnorm_linear"]
    assert "@triton.jit" not in text
    assert "import" not in text
    run = SOURCE[SOURCE.index("def run(") : SOURCE.index("\n\n\n# How each kernel")]
    assert run in text


def test_the_loader_reads_as_one_module_and_imports_torch_and_the_standard_library_alone() -> None:
    text = loader_text()
    compile(text, "aot.py", "exec")
    imports = {line.split()[1].partition(".")[0] for line in text.splitlines() if re.match(r"(import|from) \w", line)}
    assert imports <= {*sys.stdlib_module_names, "torch"}
    assert not re.search(r"^(from|import) mugraph", text, re.M)
    for tool in (["check", "--select", "E,F,W,I,B,UP"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *tool, "--line-length", "120", "--isolated", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


def test_sizes_are_tried_on_both_sides_of_every_power_of_two() -> None:
    found = [s["a"] for s in turning_points([Dim("a", 3, 20)])]
    assert found == [3, 4, 5, 8, 9, 16, 17, 20]
    both = list(turning_points([Dim("a", 1, 4), Dim("b", 1, 2)]))
    assert len(both) == 5 * 2 - 2
    many = list(turning_points([Dim(n, 1, 2**20) for n in "abc"]))
    assert len(many) < 300
    assert {"a": 1, "b": 1, "c": 1} in many
    assert {"a": 2**20, "b": 2**20, "c": 513} in many


# -- alone


ALONE = """
import sys
for name in ("triton", "mugraph"):
    sys.modules[name] = None  # an import raises
sys.path.insert(0, sys.argv[1])
import torch
import aot
call = aot.load(driver=sys.argv[2])
call.admit.__self__.device = "cpu"
x, g, w = (torch.ones(s, dtype=torch.float16) for s in ((5, 256), (256,), (256, 128)))
assert call.warmup()(x, g, w).shape == (5, 128)
assert call(x, g, W=w).dtype is torch.float16
try:
    call(x.float(), g, w)
except aot.LaunchError as error:
    print(error)
"""


def alone(place: Path, stub: Stub, script: str = ALONE) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", script, str(place), stub.path]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_artefact_runs_without_triton_and_without_mugraph(files: Files, stub: Stub, tmp_path: Path) -> None:
    done = alone(write(files, tmp_path / "aot"), stub)
    assert done.returncode == 0, done.stderr
    assert "X is torch.float32" in done.stdout
    assert "it must be torch.float16" in done.stdout


def test_the_artefact_alone_refuses_what_was_changed(files: Files, stub: Stub, tmp_path: Path) -> None:
    name = next(n for n in files if n.endswith(".cubin"))
    done = alone(write(files | {name: files[name][:-1]}, tmp_path / "aot"), stub)
    assert done.returncode == 1
    assert re.search(r"CacheError: .*was edited or cut short\n  try: make it again", done.stderr)


# -- what does not fit


@pytest.mark.parametrize("kind", [".cubin", "host.py"])
@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: c[:100] + b"?" + c[101:], lambda c: b""])
def test_a_changed_file_is_refused(files: Files, kind: str, change: Callable[[bytes], bytes]) -> None:
    name = next(n for n in files if n.endswith(kind))
    with pytest.raises(CacheError, match=f"{re.escape(name)} was edited or cut short") as caught:
        Artefact(files | {name: change(files[name])})
    assert "--aot" in str(caught.value)


@pytest.mark.parametrize("name", [INDEX, "host.py", "rmsnorm_linear.sm_90.2.cubin"])
def test_a_missing_file_is_refused(files: Files, name: str, tmp_path: Path) -> None:
    place = write(files, tmp_path / "aot")
    Artefact.read(place)
    (place / name).unlink()
    with pytest.raises(CacheError, match="is no artefact"):
        Artefact.read(place)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"schema_version": 2}', b"\xff"])
def test_an_index_that_is_none_is_refused(files: Files, text: bytes) -> None:
    with pytest.raises(CacheError, match=r"is no artefact|was edited"):
        Artefact(files | {INDEX: text})


def test_an_edited_index_is_refused(files: Files) -> None:
    with pytest.raises(CacheError, match=r"index\.json was edited"):
        Artefact(edited(files, lambda i: i["binaries"][0].update(shared=0), seal=False))


def test_another_schema_version_is_refused(files: Files) -> None:
    with pytest.raises(TargetMismatchError, match="schema version 1, not 2"):
        Artefact(edited(files, lambda i: i.update(schema_version=1)))


def test_a_table_in_the_index_has_to_cover_the_sizes(files: Files) -> None:
    with pytest.raises(CacheError, match=r"serves B = 1\.\.4095"):
        Artefact(edited(files, lambda i: i["table"]["ranges"][0].update(to=4095)))


def test_another_architecture_is_refused(files: Files, stub: Stub) -> None:
    call = Artefact(files).dispatch(driver=stub.path)
    stub.reset(100)
    with pytest.raises(TargetMismatchError, match=r"for sm_80, sm_90, the device is Stub device \(sm_100\)") as caught:
        call.warmup()
    assert "--aot 100" in str(caught.value)


def test_a_cubin_that_the_driver_refuses_is_an_error_with_a_remedy(files: Files, stub: Stub) -> None:
    name = "rmsnorm_linear.sm_90.2.cubin"
    broken = files | {name: b"no cubin"}
    stub.reset(90)
    with pytest.raises(CompileError, match="invalid image"):
        Artefact(edited(broken, lambda i: i["files"].update({name: digest(b"no cubin")}))).dispatch(
            driver=stub.path
        ).warmup()
    with pytest.raises(CompileError, match="holds no other"):
        Artefact(edited(files, lambda i: i["binaries"][2].update(entry="other"))).dispatch(driver=stub.path).warmup()
    stub.refuse(209)
    with pytest.raises(TargetMismatchError, match="no binary for this GPU"):
        Artefact(files).dispatch(driver=stub.path).warmup()


def test_another_device_or_driver_than_it_was_timed_with_gives_a_warning(files: Files, stub: Stub) -> None:
    stub.reset(90)
    for timed, text in (
        ({"device": "Another", "driver": 13000}, "timed on Another, this is Stub device"),
        ({"device": "Stub device", "driver": 12080}, "driver version 12080, this is 13000"),
    ):
        with pytest.warns(TargetWarning, match=text):
            Artefact(edited(files, lambda i, t=timed: i.update(timed=t))).dispatch(driver=stub.path).warmup()
    for known in ({"device": "Stub device", "driver": 13000}, None):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Artefact(edited(files, lambda i, t=known: i.update(timed=t))).dispatch(driver=stub.path).warmup()


def test_an_architecture_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UnknownTargetError, match="sm_70"):
        made(PROGRAM, {HOST: SOURCE}, [70])


class TooLarge(Compiler):
    def binary(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"image": b"", "entry": "k", "shared": 300_000, "ptxas": "13"}


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CompileError, match="300000 bytes of shared memory"):
        made(PROGRAM, {HOST: SOURCE}, [90], compiler=TooLarge())


# -- ranges of sizes


LIBRARY = "library.py"


def test_ranges_are_served_by_kernels_and_by_the_library(stub: Stub) -> None:
    stub.reset(90)
    table = Table("B", (Range(1, 16, HOST), Range(17, 4096, LIBRARY)))
    artefact = Artefact(made(PROGRAM, {HOST: SOURCE, LIBRARY: torch_code.emit(PROGRAM)}, [90], table=table))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    call(*arguments(16))
    assert len(stub.launches) == 1
    out = call(*arguments(17))
    assert len(stub.launches) == 1
    torch.testing.assert_close(out, torch.full((17, 128), 256.0, dtype=torch.float16))
    into = torch.empty_like(out)
    assert call(*arguments(17), out=into) is into
    torch.testing.assert_close(into, out)
    assert [type(p) for found in call.ready.values() for p in found] == [Recorded, Direct]


def test_ranges_may_have_kernels_of_the_same_name(stub: Stub) -> None:
    stub.reset(90)
    finer = emit(plan_graph(resized(GRAPH, {}, {"n": 32})))
    table = Table("B", (Range(1, 16, "few.py"), Range(17, 4096, "many.py")))
    artefact = Artefact(made(PROGRAM, {"many.py": SOURCE, "few.py": finer}, [90], table=table))
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path).warmup()
    assert stub.loads == 4
    call(*arguments(16))
    call(*arguments(17))
    assert [x.grid[0] for x in stub.launches] == [128 // 32, 2 * 128 // 64]
    assert len({b.image for b in artefact.binaries}) == 4
    few, many = stub.launches
    assert (few.name, few.shared) != (many.name, many.shared)


def test_a_table_that_names_an_absent_file_or_leaves_sizes_out_is_refused() -> None:
    with pytest.raises(CacheError, match=r"names library\.py"):
        made(PROGRAM, {HOST: SOURCE}, [90], table=Table("B", (Range(1, 4096, LIBRARY),)))
    with pytest.raises(CacheError, match=r"serves B = 1\.\.16"):
        made(PROGRAM, {HOST: SOURCE}, [90], table=Table("B", (Range(1, 16, HOST),)))
    assert whole_range(PROGRAM, HOST) == Table("B", (Range(1, 4096, HOST),))


# -- results


@pytest.fixture
def device(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A machine whose device is the stub: tensors of the CPU pass for its memory."""
    stub.reset(90)
    monkeypatch.setenv("MUGRAPH_DRIVER", stub.path)
    monkeypatch.setattr(mugraph.result, "device_is_there", lambda target: True)

    def executable(program: Any, run: Any, **options: Any) -> Executable:
        return Executable(program, run, **options | {"devices": ("cpu",)})

    monkeypatch.setattr(mugraph.result, "Executable", executable)
    return stub


@pytest.fixture(scope="module")
def result() -> Result:
    return pipeline.from_graph(PROGRAM, GRAPH, target=Target("triton", 90))


def fresh(result: Result) -> Result:
    return pipeline.replace(result)


def test_ranges_of_sizes_have_structures_of_their_own(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.reset(90)
    program = PROGRAMS["low_rank_chain"]
    result = pipeline.optimize(program, target="cuda:90")
    files = result.aot([90], pipeline.by_size(result, (1, 64, 1024)))
    artefact = Artefact(files)
    ranges = artefact.table.ranges
    assert len(ranges) > 1
    assert (ranges[0].low, ranges[-1].high) == (program.dims()[0].min, program.dims()[0].max)
    texts = {r.file: files[r.file] for r in ranges}
    assert len(set(texts.values())) == len(ranges)
    assert host_part(result.source)[0].encode() == texts[artefact.table.file({"B": 16})]
    for r in ranges:
        certificate = Certificate.from_json(files[f"certificate_{r.low}.json"].decode())
        assert certificate.tiers[0] == "tested"
        assert any(report.counted for report in certificate.numerics)
    artefact.signature.device = "cpu"
    call = artefact.dispatch(driver=stub.path)
    launched = {}
    for r in ranges:
        before = len(stub.launches)
        call(*drawn(program, min(r.high, 2000)))
        launched[r.file] = [x.name for x in stub.launches[before:]]
    assert len(set(map(str, launched.values()))) == len(ranges)
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    with pytest.raises(MugraphError, match="forbids a search for other sizes"):
        pipeline.by_size(result, (1, 64))


def test_what_is_fastest_at_a_size_serves_the_sizes_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up clock: the program's own matmuls win at 64, the second structure elsewhere."""
    program = PROGRAMS["low_rank_chain"]
    result = pipeline.optimize(program, target="cuda:90", tune="none")
    ranges = pipeline.by_size(result, (1, 1024))
    (first, second), asked = list(ranges.values())[:2], []

    class Clock:
        def __init__(self, size: int) -> None:
            self.size = size

        def seconds(self, source: str, repeats: int) -> Spread | Refused:
            asked.append(self.size)
            if source == first.source:
                return Refused("it hangs")
            best = "@triton.jit" not in source if self.size == 64 else source == second.source
            return Spread(*[1.0 if best else 2.0] * 3)

    monkeypatch.setattr(pipeline, "_timer", lambda program, target, level, n: nullcontext(Clock(n)))
    found = pipeline._fastest_ranges(result, ranges, (1, 16, 64), ())
    (dim,) = program.dims()
    assert list(found) == [(dim.min, 16), (17, 64), (65, dim.max)]
    assert [r.has_kernels for r in found.values()] == [True, False, True]
    assert found[dim.min, 16].source == found[65, dim.max].source == second.source
    assert all("it hangs" in " ".join(r.notes) for r in found.values())
    assert {1, 16, 64, dim.max} <= set(asked)
    monkeypatch.setattr(pipeline, "_timer", lambda program, target, level, n: nullcontext(None))
    assert [r.source for r in pipeline._fastest_ranges(result, ranges, (1, 64), ()).values()] == [
        r.source for r in ranges.values()
    ]


def test_ranges_are_of_one_symbolic_size() -> None:
    x, y = (tensor(n, (Axis(n, Dim(n.upper(), 1, 8)),), DType.f32) for n in "ab")
    b = Builder({"a": x, "b": y})
    b.add("c", Contract(()), "a", "b")
    outer = program_of("outer", [Input(t, Storage(DType.f32)) for t in (x, y)], b, "c")
    with pytest.raises(SettingError, match="has 2 symbolic sizes"):
        pipeline.by_size(pipeline.optimize(outer, target="torch"), (1, 4))


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the compiler was asked")

    monkeypatch.setattr(Compiler, "binary", refuse)


def test_a_result_is_saved_with_cubins_and_runs_from_them(
    result: Result, device: Stub, tmp_path: Path, no_compiler: None, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Result, "aot", lambda self, *given: files)
    place = result.save(tmp_path / "out", [80, 90])
    assert {p.name for p in (place / "aot").iterdir()} == set(files)
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    again = load(place)
    x, g, w = arguments()
    assert again(x, g, w).shape == (5, 128)
    assert again(x, G=g, W=w).shape == (5, 128)
    assert [launch.parameters[0] for launch in device.launches] == [x.data_ptr()] * 2
    with pytest.raises(LaunchError, match="X must be"):
        again(x.float(), g, w)


def test_an_edited_cubin_beside_a_result_is_refused(
    result: Result, tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Result, "aot", lambda self, *given: files)
    place = result.save(tmp_path / "out", [90])
    load(place)
    cubin = next((place / "aot").glob("*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"cubin was edited"):
        load(place)


def test_nothing_is_written_where_a_kernel_does_not_compile(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CompileError("ptxas refuses")

    monkeypatch.setattr(Compiler, "binary", refuse)
    with pytest.raises(CompileError, match="ptxas refuses"):
        result.save(tmp_path / "out", [90])
    assert not list(tmp_path.iterdir())


def test_a_warm_result_does_not_compile_again(
    result: Result, device: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    first = fresh(result)
    assert first.warmup() is first
    assert device.loads == 2
    request.getfixturevalue("no_compiler")
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    second = fresh(result).warmup()
    assert device.loads == 4
    second(*arguments())
    assert (len(device.launches), device.loads) == (1, 4)
    assert Cache().clear() == 0  # results
    assert not list(Cache().binaries.path.iterdir())


def test_a_serving_process_compiles_nothing(
    result: Result, device: Stub, tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUGRAPH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MUGRAPH_DISALLOW_SEARCH", "1")
    cold = fresh(result)
    for attempt in (cold.warmup, lambda: cold(*arguments()), lambda: cold.executable):
        with pytest.raises(MugraphError, match="not compiled, and MUGRAPH_DISALLOW_SEARCH forbids") as caught:
            attempt()
        assert "--aot" in str(caught.value)


def test_a_result_for_another_architecture_is_refused(result: Result, device: Stub) -> None:
    device.reset(100)
    with pytest.raises(TargetMismatchError, match="for cuda:90, the device is sm_100"):
        fresh(result).warmup()


def test_a_result_of_torch_code_needs_no_warmup() -> None:
    found = pipeline.from_graph(PROGRAM, GRAPH, target="torch")
    assert found.warmup() is found
