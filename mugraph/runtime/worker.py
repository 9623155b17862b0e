"""The process behind `Worker`: runs emitted files under the Triton interpreter, or compiles them for a GPU that need
not be there.  Start it as `python -m mugraph.runtime.worker`."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import signal
import struct
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from mugraph.runtime.sass import read_code

ALIGNED = 256  # bytes that all memory between launches is aligned to
HEADER = struct.Struct("<Q")
_MODULES: dict[str, ModuleType] = {}
_FILES = tempfile.TemporaryDirectory(prefix="mugraph-")


def load(source: str) -> ModuleType:
    """The emitted file as a module.  Triton reads its kernels' source from disk."""
    if source not in _MODULES:
        name = f"emitted_{len(_MODULES)}"
        path = Path(_FILES.name) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _MODULES[source] = module
    return _MODULES[source]


def sent(tensors: Iterable[Any]) -> list[tuple[str, Any]]:
    """Tensors as they go to another process, which cannot read the pickles of floats of 8 bits."""
    import torch

    names = [(t, str(t.dtype).removeprefix("torch.")) for t in tensors]
    return [(name, t.view(torch.uint8) if name.startswith("float8") else t) for t, name in names]


def received(tensors: Iterable[tuple[str, Any]]) -> list[Any]:
    """What `sent` was given."""
    import torch

    return [t if str(t.dtype).endswith(f".{name}") else t.view(getattr(torch, name)) for name, t in tensors]


def interpret(source: str, inputs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The outputs of `run(*inputs)`.  Memory that `run` allocates starts as NaN, so what is never written shows."""
    import torch

    module = load(source)
    allocate = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        t = allocate(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    torch.empty = poisoned
    try:
        result = module.run(*received(inputs))
    finally:
        torch.empty = allocate
    return sent(result if isinstance(result, tuple) else [result])


def compile_kernels(
    source: str, arch: int, options: dict[str, Any], only: list[str] | None = None
) -> list[dict[str, Any]]:
    """What ptxas gives each kernel of the file, or some of them, for `sm_<arch>`."""
    import triton

    module = load(source)
    found = []
    for name in module.SIGNATURES if only is None else only:
        parameters, defaults = module.SIGNATURES[name]
        compiled = compiled_kernel(module, name, parameters, arch, {**defaults, **options})
        binary = Path(_FILES.name) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        found.append(
            {
                "kernel": name,
                "shared_bytes": compiled.metadata.shared,
                **read_usage(tools, binary),
                **read_code(disassembled(tools, binary)),
            }
        )
    return found


def compile_binary(
    source: str, arch: int, kernel: str, parameters: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """One kernel of the file as a cubin for `sm_<arch>`: its bytes, the name of its entry and what a launch needs."""
    import triton.language as tl
    from triton.backends.nvidia.compiler import get_ptxas

    given = {n: getattr(tl, k[3:]) if isinstance(k, str) and k.startswith("tl.") else k for n, k in parameters.items()}
    compiled = compiled_kernel(load(source), kernel, given, arch, options)
    m = compiled.metadata
    align = m.global_scratch_align
    if getattr(m, "profile_scratch_size", 0) or align > ALIGNED:
        raise ValueError(f"{kernel} wants scratch memory that a launch without Triton does not give it")
    needs = {"shared": m.shared, "scratch": -(-m.global_scratch_size // align) * align}
    return {"image": compiled.asm["cubin"], "entry": m.name, "ptxas": str(get_ptxas(arch).version), **needs}


def compiled_kernel(
    module: ModuleType, name: str, parameters: dict[str, Any], arch: int, options: dict[str, Any]
) -> Any:
    """A kernel as Triton compiles it; `parameters` are those of `SIGNATURES`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mugraph.codegen.plan import KNOWS_DESCRIPTORS

    if arch < KNOWS_DESCRIPTORS and any(n.startswith("DESCRIPTORS") and k is True for n, k in parameters.items()):
        raise ValueError(f"{name} has tensor descriptors (option descriptors), which sm_{arch} has not")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    facts: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (parameter, kind) in enumerate(parameters.items()):
        if not isinstance(kind, str):
            signature[parameter], constants[parameter] = "constexpr", kind
            continue
        base, _, divisor = kind.partition(":")
        signature[parameter] = base
        if divisor:
            facts[(i,)] = [["tt.divisibility", int(divisor)]]
    code = ASTSource(fn=getattr(module, name), signature=signature, constexprs=constants, attrs=facts)
    target = GPUTarget("cuda", arch, 32)
    return triton.compile(code, target=target, options={"enable_fp_fusion": True, **options})


def read_usage(tools: Path, binary: Path) -> dict[str, int]:
    text = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", binary], capture_output=True, text=True, check=True
    ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", text)}
    return {"registers": usage["REG"], "stack_bytes": usage["STACK"]}


def disassembled(tools: Path, binary: Path) -> str:
    return subprocess.run([tools / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout


def time_file(source: str, program: str, sizes: dict[str, int], device: str, repeats: int) -> dict[str, float]:
    """The time of one call of the file's `run`, in seconds: the median and the quartiles."""
    from mugraph.ir.parser import parse_program
    from mugraph.runtime.bench import measure, rotating, rotation

    module = load(source)
    copies = rotation(parse_program(program), sizes, device)
    run = rotating(module.run, copies)
    timings = measure({"run": run}, repeats, device=device)
    return asdict(timings.seconds("run"))


def probe(device: str) -> bool:
    """Whether the device computes."""
    import torch

    return bool(torch.ones(4, device=device).sum().item() == 4)


def job(run: str, request: dict[str, Any]) -> Any:
    """A job of an engine.  The process that asks decides when to stop: Ctrl-C, which all get, is not for this one."""
    from mugraph.runtime.engine import compute

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return compute(run, request)


KINDS: dict[str, Callable[..., Any]] = {
    "interpret": interpret,
    "compile": compile_kernels,
    "binary": compile_binary,
    "time": time_file,
    "probe": probe,
    "job": job,
}


def serve() -> None:
    """Answers requests until the input ends.  What kernels print goes to stderr."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while header := requests.read(HEADER.size):
        kind, request = pickle.loads(requests.read(*HEADER.unpack(header)))
        try:
            answer = (True, KINDS[kind](**request))
        except Exception as error:
            lines = traceback.format_exception_only(error)
            at = traceback.extract_tb(error.__traceback__)[-1]
            answer = (False, f"{''.join(lines).strip()} ({Path(at.filename).name}:{at.lineno} {at.line})")
        body = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
        answers.write(HEADER.pack(len(body)) + body)
        answers.flush()


if __name__ == "__main__":
    serve()
