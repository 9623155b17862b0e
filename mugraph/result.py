"""A superoptimised program: something to call, to print, to save, to load and to ship.

result = load("out/")            # what Result.save wrote, whole or not at all
result(x, w)                     # checked arguments, then the emitted source
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mugraph import __version__, settings
from mugraph.errors import (
    CacheError,
    GraphError,
    MugraphError,
    ParseError,
    TargetMismatchError,
)
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Library
from mugraph.ir.parser import parse_program
from mugraph.ir.serialize import dumps, loads
from mugraph.runtime.cache import Cache, key_of
from mugraph.runtime.choose import Choice
from mugraph.runtime.load import Executable, load_module
from mugraph.runtime.tune import AS_LOWERED, Tuned
from mugraph.search.answers import Answer
from mugraph.search.cost import CPU, device
from mugraph.search.report import Asked, SearchReport
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler.target import Target, parse_target
from mugraph.verify.certificate import Certificate
from mugraph.verify.equivalence import verify_as_given
from mugraph.viz.mermaid import draw_mermaid
from mugraph.viz.svg import draw_svg

if TYPE_CHECKING:
    from mugraph.runtime.artefact import Artefact
    from mugraph.runtime.dispatch import Dispatch

SCHEMA_VERSION = 2
AS_IT_STANDS, FOUND, CALLS = "the program as it stands", "the kernels found", "the calls found"  # what is measured
COMPILED = ", compiled"
AOT = "aot"  # the folder of a saved result that runs without a compiler


@dataclass(frozen=True)
class Result:
    """A superoptimised program.  Call it with tensors; print it for one screen of what it is.

    graph        the μGraph, all levels
    source       the emitted file, which needs torch (and triton) only
    report       what the search did: a text, and `report_data` as plain data
    certificate  what was established about the graph and the source
    target       what the source is for
    tuning       how kernels were compiled: choices, registers, shared memory, spills
    notes        what the user should know (a fallback, a check that could not be made)
    interrupted  whether Ctrl-C ended the search or the checks: the best so far, with the tiers that were reached
    choice       what was measured of it and of its rivals, where it was tuned
    """

    program: Program
    graph: KernelGraph
    source: str
    certificate: Certificate
    report: SearchReport | ReportText
    target: Target
    tuning: Tuned = AS_LOWERED
    notes: tuple[str, ...] = ()
    cached: bool = False
    directory: Path | None = field(default=None, compare=False)
    interrupted: bool = field(default=False, compare=False)
    choice: Choice | None = None

    @cached_property
    def executable(self) -> Executable:
        """The loaded source behind a check of its arguments; Triton compiles a kernel at its first launch.  Raises
        CompileError if it does not load, MugraphError for kernels where MUGRAPH_DISALLOW_SEARCH is set."""
        if self.has_kernels and settings.disallow_search.get():
            raise _not_compiled(self, "launching them through Triton")
        name = f"{self.program.name}_{self.target}"
        module = load_module(self.source, name)
        if self.target.kind == "torch":
            return Executable(self.program, module.run, differentiable=True)
        return Executable(self.program, module.run, devices=("cuda",))

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        """Runs the emitted source.  `out` receives the results, unless the program has an input of that name, which
        it then is.  Raises LaunchError for arguments that do not fit the program's signature, and
        TargetMismatchError where there is no device of the target.

        Kernels are launched from cubins after `warmup()`, or where they were saved with the result; else Triton
        compiles and launches them."""
        if (ready := self.__dict__.get("dispatch")) is not None:
            return ready(*args, out=out, **named)
        if self.target.kind == "triton" and not device_is_there(self.target):
            if settings.interpret.get():
                return _interpreted(self, args, out, named)
            raise TargetMismatchError(
                f"this result is for {self.target}, and there is no such device here",
                remedy="give target='torch', or set MUGRAPH_INTERPRET=1 to run the kernels under Triton's interpreter",
            )
        if self.has_kernels and (self._saved_binaries is not None or settings.disallow_search.get()):
            return self.dispatch(*args, out=out, **named)
        return self.executable(*args, out=out, **named)

    @property
    def has_kernels(self) -> bool:
        """Whether the source holds kernels of ours."""
        return "@triton.jit" in self.source

    def register(self, gradients: bool | Callable[..., Any] = False) -> Any:
        """The result as a PyTorch operator, `torch.ops.mugraph.<name>_<digest>`, which `torch.compile`, `torch.export`
        and AOTInductor keep whole.  On CUDA tensors this result runs; on a CPU the program as PyTorch code, unless that
        is the target.  A saved result has the same operator in its `register.py`.

        With `gradients` it is differentiable, as `<name>_<digest>_with_gradients`: by the gradients of the program as
        PyTorch code, or by a function of the gradients of the floating outputs and of all inputs, which returns those
        of the floating inputs.  Raises UnsupportedOpError for a program without inputs or one that writes into one."""
        from mugraph.runtime.register import check_operable, operator_of

        check_operable(self.program)
        everywhere = self.target.kind == "torch"
        return operator_of(self.program, self.source, self, everywhere).register(gradients)

    # -- without a compiler

    def warmup(self) -> Result:
        """Compiles all kernels for the present device, at all sizes, and loads them: no later call compiles, loads or
        searches, so it may be captured in a CUDA graph.  What was saved with the result, or is in the cache, is not
        compiled again.  Returns this result.

        Raises TargetMismatchError where there is no such device, CompileError where a kernel does not compile or load,
        and MugraphError where it would have to be compiled and MUGRAPH_DISALLOW_SEARCH is set."""
        if self.has_kernels:
            self.dispatch.warmup(_current_device())
        return self

    @cached_property
    def dispatch(self) -> Dispatch:
        """What launches the kernels from cubins (`runtime.dispatch`), behind a check of the arguments."""
        artefact = self._saved_binaries or self._cached_binaries()
        library = settings.driver.get()
        arguments = Executable(self.program, _no_run, devices=("cuda",))
        return artefact.dispatch(arguments.admit, library)

    @cached_property
    def _saved_binaries(self) -> Artefact | None:
        """The cubins beside a saved result, if there are any for the present device."""
        if self.directory is None or not (self.directory / AOT / "index.json").is_file():
            return None
        from mugraph.runtime.artefact import Artefact

        found = Artefact.read(self.directory / AOT)
        return found if _present_arch(self.target) in found.arches else None

    def _cached_binaries(self) -> Artefact:
        from mugraph.runtime.artefact import Artefact

        arch = _present_arch(self.target)
        store = None if settings.skip_cache.get() else Cache().binaries
        key = key_of(self.source, {"sizes": str(self.program.dims())}, f"cuda:{arch}", dict(versions()))
        entry = store.get(key) if store is not None else None
        if entry is not None:
            return Artefact(entry.files, str(entry.path))
        if settings.disallow_search.get():
            raise _not_compiled(self, f"compiling them for sm_{arch}")
        files = self.aot([arch])
        if store is not None:
            store.put(key, files, {"program": self.program.name, "arch": arch})
        return Artefact(files)

    def aot(self, arches: Sequence[int], ranges: Ranges | None = None) -> dict[str, bytes]:
        """Files that run the program on these architectures without a compiler, by name: cubins, an index, the host
        part of the source, and `aot.py`, which loads them.  With `ranges` (of `by_size`), each range of sizes has its
        own result, whose certificate is among the files.  Raises CompileError, UnknownTargetError."""
        from mugraph.runtime.aot import HOST, made
        from mugraph.runtime.dispatch import Range, Table

        arches = list(dict.fromkeys(arches))
        if settings.disallow_search.get():
            raise _not_compiled(self, "compiling them ahead of time")
        if not ranges:
            return made(self.program, {HOST: self.source}, arches)
        found = {f"host_{low}.py": (low, high, r) for (low, high), r in ranges.items()}
        table = Table(self.program.dims()[0].name, tuple(Range(low, high, n) for n, (low, high, _) in found.items()))
        files = made(self.program, {n: r.source for n, (_, _, r) in found.items()}, arches, table=table)
        proofs = {f"certificate_{low}.json": r.certificate.to_json().encode() for low, _, r in found.values()}
        return files | proofs

    @property
    def unchanged(self) -> bool:
        """Whether nothing was found that beats the program as it stands: by measurement where it was tuned, else by
        the model."""
        if self.choice:
            return self.choice.written
        if isinstance(self.report, SearchReport):
            return self.report.candidates[-1].verdict == "chosen"
        return not self.graph.kernels() and any(
            isinstance(e.op, Library) and e.op.semantics.equations == self.program.equations
            for e in self.graph.equations
        )

    @property
    def compiled(self) -> bool:
        """Whether the source goes through `torch.compile`."""
        return self.choice is not None and self.choice.chosen.endswith(COMPILED)

    def explain(self) -> str:
        """Why this result: the laws that lead from the program to each launch, and what it costs."""
        return self.report.explain()

    def why_not(self, graph: KernelGraph | Program | str | Path) -> Answer:
        """Why the search did not find, or did not choose, a μGraph: a graph, its text, or a file of it (`.txt` or
        `.json`).  Searches again.  Raises ParseError or GraphError for what is no graph."""
        if isinstance(self.report, ReportText):
            raise GraphError(f"{self.program.name} was given as a graph, not searched for", remedy="use mg.optimize")
        return self.report.why_not(read_graph(graph))

    def __str__(self) -> str:
        tiers = ", ".join(self.certificate.tiers)
        where = f"saved in {self.directory}" if self.directory else "not saved: result.save('out/') writes it"
        lines = [
            str(self.graph).rstrip(),
            f"target {self.target}; {tiers}: error <= 2^{self.certificate.delta_log2:.1f}"
            + ("; from the cache" if self.cached else ""),
            str(self.report),
            *(f"tuned: {c}" for c in self.tuning.trace),
            *([str(self.choice)] if self.choice else []),
            *(f"note: {n}" for n in self.notes),
            where,
        ]
        return "\n".join(lines)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        return {"text/plain": str(self), "image/svg+xml": draw_svg(self.graph)}

    def files(self) -> dict[str, str]:
        """Everything that `save` writes, by file name."""
        choice = {"choice.json": json.dumps(self.choice.to_dict(), indent=1)} if self.choice else {}
        return choice | {
            "kernel.py": self.source,
            "reference.py": torch_code.emit(self.program),
            **self._operator_file(),
            "program.json": dumps(self.program, indent=1),
            "graph.json": dumps(self.graph, indent=1),
            "graph.txt": f"{self.graph}\n",
            "graph.svg": draw_svg(self.graph),
            "graph.mmd": draw_mermaid(self.graph),
            "certificate.json": self.certificate.to_json(),
            "tuning.json": json.dumps(self.tuning.to_dict(), indent=1),
            "report.json": json.dumps(_plain(self.report), indent=1),
        }

    def _operator_file(self) -> dict[str, str]:
        from mugraph.runtime.register import problem_of, register_text

        if problem_of(self.program):
            return {}
        return {"register.py": register_text(self.program, self.source, self.target.kind == "torch")}

    def save(self, directory: str | Path, aot: Sequence[int] = (), ranges: Ranges | None = None) -> Path:
        """Writes the files and a manifest with their hashes, and under `aot/` what `aot` gives for these architectures
        and ranges.  The directory appears whole or not at all; one that is there is replaced only if it was written by
        `save`.  Raises CacheError where it cannot be written, and what `aot` raises."""
        place = check_writable(directory)
        files = {name: text.encode() for name, text in self.files().items()}
        if aot:
            files |= {f"{AOT}/{name}": content for name, content in self.aot(aot, ranges).items()}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "program": self.program.name,
            "target": str(self.target),
            "notes": list(self.notes),
            "versions": dict(versions()),
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
        draft = place.parent / f".{place.name}-{uuid.uuid4().hex}"
        old = place.parent / f".{place.name}-old-{uuid.uuid4().hex}"
        try:
            (draft / AOT if aot else draft).mkdir(parents=True)
            for name, content in {**files, "manifest.json": json.dumps(manifest, indent=1).encode()}.items():
                (draft / name).write_bytes(content)
            if place.exists():
                place.rename(old)
            draft.rename(place)
        except OSError as error:
            if old.exists() and not place.exists():
                old.rename(place)
            raise CacheError(f"cannot write {place}: {error}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return place


Ranges = Mapping[tuple[int, int], Result]  # by the first and the last value of the symbolic size


def check_writable(directory: str | Path) -> Path:
    """The directory, if `Result.save` may write it: absent, empty, or written by `save` before.  Raises CacheError."""
    place = Path(directory)
    if place.exists() and not place.is_dir():
        raise CacheError(f"{place} is a file", remedy="name another directory")
    try:
        if place.exists() and not (place / "manifest.json").is_file() and any(place.iterdir()):
            raise CacheError(f"{place} is not empty and holds no manifest.json", remedy="name another directory")
        parent = next(p for p in place.absolute().parents if p.exists())
        Path(tempfile.mkdtemp(prefix=".mugraph-", dir=parent)).rmdir()  # permissions do not tell of every file system
    except OSError as error:
        reason = error.strerror or str(error)
        raise CacheError(f"cannot write {place}: {reason}", remedy="name a directory in a place of yours") from error
    return place


@dataclass(frozen=True)
class ReportText:
    """A report read back from a file: its data, and the text it had."""

    data: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.data)

    def explain(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return str(self.data.get("text", ""))


def read_graph(given: KernelGraph | Program | str | Path) -> KernelGraph | Program:
    """A graph as it is, from its text, or from a file: a saved directory, `.json`, or text.  Raises ParseError."""
    if isinstance(given, Program):
        return given
    if not isinstance(given, str | Path) or not str(given).strip():
        raise ParseError(f"{given!r} is no graph", remedy="give a μGraph, its text or a file of it")
    text, form = str(given), ""
    if isinstance(given, Path) or "\n" not in given:
        path = Path(given)
        path = path / "graph.json" if path.is_dir() else path
        try:
            text, form = path.read_text(encoding="utf-8"), path.suffix
        except (OSError, ValueError) as error:
            raise ParseError(
                f"cannot read {path}: {error}", remedy="give a μGraph, its text or a file of it"
            ) from error
    found = loads(text) if form == ".json" else parse_program(text)
    if not isinstance(found, Program):
        raise ParseError(f"this is a {type(found).__name__}, not a graph")
    return found


def load(directory: str | Path) -> Result:
    """A saved result.  Raises CacheError where a file is missing, edited or of another schema version."""
    place = Path(directory)
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files", {}), dict):
            raise ValueError("its manifest.json is not what Result.save writes")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise CacheError(
                f"{place} has schema version {manifest.get('schema_version')}, this is {SCHEMA_VERSION}",
                remedy="run mugraph optimize again",
            )
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in manifest["files"]):
            raise ValueError("its manifest.json names files outside")
        contents = {name: (place / name).read_bytes() for name in manifest["files"]}
        files = {name: content.decode() for name, content in contents.items() if not name.startswith(f"{AOT}/")}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(f"{place} is no saved result: {error}", remedy="run mugraph optimize again") from error
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
            raise CacheError(f"{place / name} was edited", remedy="run mugraph optimize again")
    try:
        found = read(files, parse_target(manifest["target"]), tuple(manifest.get("notes", ())))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CacheError(f"{place} is no saved result: {error!r}", remedy="run mugraph optimize again") from error
    return replace(found, directory=place)


def read(files: Mapping[str, str], target: Target, notes: tuple[str, ...]) -> Result:
    program, data = loads(files["program.json"]), json.loads(files["report.json"])
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise ValueError("report.json is no report")
    report: SearchReport | ReportText = ReportText(data)
    choice = Choice.from_dict(json.loads(files["choice.json"])) if "choice.json" in files else None
    if "candidates" in data:
        priced_on_cpu = str(data.get("device")).startswith(device(CPU).name)  # a calibration stands behind the name
        on = device(CPU if priced_on_cpu else device_name(target))
        asked = Asked(program, on, verify_as_given)
        report = replace(SearchReport.from_dict(data), asked=asked)
    return Result(
        program=program,
        graph=loads(files["graph.json"]),
        source=files["kernel.py"],
        certificate=Certificate.from_json(files["certificate.json"]),
        report=report,
        target=target,
        tuning=Tuned.from_dict(json.loads(files["tuning.json"])),
        notes=notes,
        choice=choice,
    )


def _plain(report: SearchReport | ReportText) -> dict[str, Any]:
    return {**report.to_dict(), "text": str(report)}


def _interpreted(result: Result, args: Sequence[Any], out: Any, named: Mapping[str, Any]) -> Any:
    from mugraph.runtime.interpret import shared_interpreter

    order = [i.name for i in result.program.inputs]

    def run(*tensors: Any, out: Any = None) -> Any:
        with shared_interpreter() as interpreter:
            outputs = interpreter.run(result.source, dict(zip(order, tensors, strict=True)))
        if out is not None:
            given = out if isinstance(out, tuple | list) else (out,)
            outputs = [place.copy_(o) for place, o in zip(given, outputs, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return Executable(result.program, run)(*args, out=out, **named)  # the same checks as on a device


def device_is_there(target: Target) -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability()
    return target.arch in (None, 10 * major + minor)


def _current_device() -> int:
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def _present_arch(target: Target) -> int:
    """The compute capability of the current device.  Raises TargetMismatchError where it is not the target's."""
    from mugraph.runtime.driver import driver_of

    arch = driver_of(settings.driver.get()).arch(_current_device())
    if target.arch not in (None, arch):
        raise TargetMismatchError(
            f"this result is for {target}, the device is sm_{arch}", remedy=f"optimize it for cuda:{arch}"
        )
    return arch


def _not_compiled(result: Result, what: str) -> MugraphError:
    return MugraphError(
        f"the kernels of {result.program.name} are not compiled, and MUGRAPH_DISALLOW_SEARCH forbids {what}",
        remedy="save them with the result (mugraph optimize ... --aot), or call warmup() once with the same cache",
    )


def _no_run(*tensors: Any, out: Any = None) -> Any:
    raise AssertionError("a dispatch launches by itself")


def device_name(target: Target) -> str:
    """The description that costs are predicted with: that of the target's generation, H100 where there is none."""
    if target.arch is None:
        return "h100"
    return "80" if target.arch < 90 else "90" if target.arch < 100 else "100"


def versions() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = [("mugraph", __version__)]
    for name in ("torch", "triton", "numpy"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "absent"))
    return tuple(found)
