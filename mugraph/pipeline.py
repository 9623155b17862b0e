"""The whole path: program -> search -> stabilised, verified μGraph -> emitted source -> numeric check -> callable.

This is the one module that knows every stage.  `superoptimize` is defined here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mugraph import __version__, settings
from mugraph.codegen.indirect import access_by_index
from mugraph.codegen.lower import lower, refuse_packed
from mugraph.codegen.plan import Trace
from mugraph.codegen.stabilise import stabilise
from mugraph.errors import (
    CacheError,
    CacheWarning,
    CompileError,
    GraphError,
    MugraphError,
    ParseError,
    SettingError,
    TargetMismatchError,
    UnsupportedOpError,
    VerificationError,
)
from mugraph.ir.axes import dims_of, representative
from mugraph.ir.check import check
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.ops import Kernel, Library
from mugraph.ir.parser import parse_program
from mugraph.ir.printer import canonical_text
from mugraph.ir.resize import reduction, resized
from mugraph.ir.serialize import dumps, loads
from mugraph.ir.threads import form_threads
from mugraph.runtime.bench import Spread
from mugraph.runtime.cache import Cache, key_of
from mugraph.runtime.choose import Candidate, Choice, choose, machine_text
from mugraph.runtime.compile import shared_compilers
from mugraph.runtime.engine import Engine, EngineName, Job, checked_engine, completed, engine_of
from mugraph.runtime.load import Executable, load_module
from mugraph.runtime.timing import DeviceTimer, Records, Timer
from mugraph.runtime.tune import AS_LOWERED, REPEATS, RULES, Tuned, Tuner
from mugraph.search.answers import Answer
from mugraph.search.build import baseline
from mugraph.search.cost import CPU, Device, device
from mugraph.search.driver import search, searched
from mugraph.search.report import Asked, SearchReport, StopReason
from mugraph.search.segments import Done, Task, nestings
from mugraph.search.space import SearchSpace, space_of
from mugraph.search.summary import unsearched
from mugraph.settings import Effort, Tune
from mugraph.transpiler import torch as torch_code
from mugraph.transpiler import triton as triton_code
from mugraph.transpiler.target import Target, parse_target
from mugraph.typed import Probability, fit_arguments
from mugraph.verify.bounds import Bounds, in_bounds
from mugraph.verify.certificate import Certificate, How, NumericReport
from mugraph.verify.equivalence import Verified, proved, shared_values, verify, verify_as_given
from mugraph.verify.numeric import Checked, draw_inputs, numeric_check
from mugraph.viz.mermaid import draw_mermaid
from mugraph.viz.svg import draw_svg

if TYPE_CHECKING:
    from mugraph.runtime.artefact import Artefact
    from mugraph.runtime.dispatch import Dispatch

SCHEMA_VERSION = 2
AOT = "aot"  # the folder of a saved result that runs without a compiler
DELTA = 2.0**-40
AS_IT_STANDS, FOUND, CALLS = "the program as it stands", "the kernels found", "the calls found"  # what is measured
COMPILED = ", compiled"
TF32_UNIT = 2.0**-10  # an operand keeps 10 bits of its fraction
F8_UNIT = 2.0**-13  # sm_90 sums products of f8 with 14 bits (DeepSeek-V3 technical report, 3.3.2)
MEASURED_DRAWS = ("normal", "wide", "rows")  # equal elements are where sums that were multiplied out cancel
MOST_REFUSED = 3  # plans whose source disagrees with float64, before the program runs as library calls
_log = logging.getLogger("mugraph.pipeline")


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
        if self.target.kind == "triton" and not _device_is_there(self.target):
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
        key = key_of(self.source, {"sizes": str(self.program.dims())}, f"cuda:{arch}", dict(_versions()))
        entry = store.get(key) if store is not None else None
        if entry is not None:
            return Artefact(entry.files, str(entry.path))
        if settings.disallow_search.get():
            raise _not_compiled(self, f"compiling them for sm_{arch}")
        files = self.aot([arch])
        if store is not None:
            store.put(key, files, {"program": self.program.name, "arch": arch})
        return Artefact(files)

    def aot(self, arches: Sequence[int], sizes: Sequence[int] = ()) -> dict[str, bytes]:
        """Files that run the program on these architectures without a compiler, by name: cubins, an index, the host
        part of the source, and `aot.py`, which loads them.  With `sizes`, each range of sizes has what `by_size` finds
        for it, and its certificate is among the files.  Raises CompileError, UnknownTargetError, and as `by_size`."""
        from mugraph.runtime.aot import HOST, made
        from mugraph.runtime.dispatch import Range, Table

        if not sizes:
            return made(self.program, {HOST: self.source}, arches)
        found = {f"host_{low}.py": (low, high, r) for (low, high), r in self.by_size(sizes).items()}
        table = Table(self.program.dims()[0].name, tuple(Range(low, high, n) for n, (low, high, _) in found.items()))
        files = made(self.program, {n: r.source for n, (_, _, r) in found.items()}, arches, table=table)
        proofs = {f"certificate_{low}.json": r.certificate.to_json().encode() for low, _, r in found.values()}
        return files | proofs

    def by_size(self, sizes: Sequence[int]) -> dict[tuple[int, int], Result]:
        """The results for ranges of the symbolic size, by their first and last size.

        Structures are searched for at these sizes and at the one that this result is for; each then serves the sizes
        next to its own, by the model of the device.  The program as library calls is among the candidates.  Raises
        SettingError unless the program has one symbolic size, VerificationError where a source disagrees with
        float64, MugraphError where MUGRAPH_DISALLOW_SEARCH is set."""
        program, target, c = self.program, self.target, self.certificate
        if len(program.dims()) != 1:
            raise SettingError(
                f"{program.name} has {len(program.dims())} symbolic sizes", remedy="ranges are of one: leave out sizes"
            )
        if settings.disallow_search.get():
            raise MugraphError(
                f"MUGRAPH_DISALLOW_SEARCH forbids a search for other sizes of {program.name}", remedy="leave out sizes"
            )
        (dim,) = program.dims()

        def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> tuple[Verified, str]:
            return accepted(program, graph, target, 2.0**c.delta_requested_log2, c.seed, cuts)

        space = SearchSpace(sizes=tuple(sizes))
        found = search(program, accept=accept, accept_cut=accept, space=space, on=device(_device_name(target)))
        results = {}
        for s in found.structures:
            low, high = max(s.low, dim.min), min(s.high or dim.max, dim.max)
            if low <= high:
                assert isinstance(s.accepted, tuple)
                verified, source = s.accepted
                report = ReportText({"text": f"{dim} = {low}..{high}: {s.text}, {1e6 * s.seconds:.1f} µs at {s.at}"})
                tuning = partial(tuned, target=target, level=self.tuning.level, symbolic=s.at)
                results[low, high] = _checked(verified, source, target, c.seed, report, tuning=tuning)
        return results

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
            "program.json": dumps(self.program, indent=1),
            "graph.json": dumps(self.graph, indent=1),
            "graph.txt": f"{self.graph}\n",
            "graph.svg": draw_svg(self.graph),
            "graph.mmd": draw_mermaid(self.graph),
            "certificate.json": self.certificate.to_json(),
            "tuning.json": json.dumps(self.tuning.to_dict(), indent=1),
            "report.json": json.dumps(_plain(self.report), indent=1),
        }

    def save(self, directory: str | Path, aot: Sequence[int] = (), sizes: Sequence[int] = ()) -> Path:
        """Writes the files and a manifest with their hashes, and under `aot/` what `aot` gives for these architectures
        and sizes.  The directory appears whole or not at all; one that is there is replaced only if it was written by
        `save`.  Raises CacheError where it cannot be written, and what `aot` raises."""
        place = check_writable(directory)
        files = {name: text.encode() for name, text in self.files().items()}
        if aot:
            files |= {f"{AOT}/{name}": content for name, content in self.aot(aot, sizes).items()}
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "program": self.program.name,
            "target": str(self.target),
            "notes": list(self.notes),
            "versions": dict(_versions()),
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
        contents = {name: (place / name).read_bytes() for name in manifest["files"]}
        files = {name: content.decode() for name, content in contents.items() if not name.startswith(f"{AOT}/")}
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CacheError(f"{place} is no saved result: {error}", remedy="run mugraph optimize again") from error
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != manifest["files"][name]:
            raise CacheError(f"{place / name} was edited", remedy="run mugraph optimize again")
    try:
        found = _read(files, parse_target(manifest["target"]), tuple(manifest.get("notes", ())))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"{place} is no saved result: {error!r}", remedy="run mugraph optimize again") from error
    return replace(found, directory=place)


def _read(files: Mapping[str, str], target: Target, notes: tuple[str, ...]) -> Result:
    program, data = loads(files["program.json"]), json.loads(files["report.json"])
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise ValueError("report.json is no report")
    report: SearchReport | ReportText = ReportText(data)
    choice = Choice.from_dict(json.loads(files["choice.json"])) if "choice.json" in files else None
    if "candidates" in data:
        on = device(_device_name(target) if choice is None or choice.chosen.startswith(FOUND) else CPU)
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


# -- the path


def optimize(
    program: Program,
    *,
    target: str | Target | None = None,
    space: SearchSpace | None = None,
    effort: Effort | None = None,
    tune: Tune | None = None,
    budget_seconds: float | None = None,
    delta: Probability = DELTA,
    seed: int | None = None,
    cache: Cache | None = None,
    engine: Engine | EngineName | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Result:
    """Search, stabilise, verify, emit, check; from the cache where it was done before.

    A large program is searched in segments; `engine` says where ("here", "processes", "ray", or one from `engine_of`).
    What is done of them is kept in the cache, so that an interrupted run goes on where it was.  The result is the same
    whatever the engine.

    Ctrl-C (or the end of the budget) stops the search with the best so far; a second Ctrl-C during the search quits.
    Ctrl-C after the search ends the checks: the result then says which tiers it reached.  Only a result that another
    run would find again is kept in the cache.  Where the emitted source disagrees with float64, the next plan is tried
    (of MOST_REFUSED such plans); where none is left, or the search cannot handle the program, it runs as library
    calls.  A note says why.  Products of f32 keep all their bits, unless the target asks otherwise (`cuda:90+tf32`).
    `effort` names a space where none is given: "none" searches nothing, and the program runs as library calls.
    `tune` says how the launch parameters of kernels are chosen (`runtime/tune.py`): "none" as lowered, "fit" (the
    default) so that no kernel spills in a loop, "model" and "measure" so that it is fast.  For the target `torch`,
    "measure" compares what was found with the program as it stands on this CPU, each eagerly and through
    `torch.compile`, at the size `space.symbolic` of symbolic dimensions.  What is not surely faster than the program as
    it stands does not run; `Result.choice` says what was measured.
    Raises GraphError for a malformed program, UnsupportedOpError where the target has no form for an operator or
    storage,
    VerificationError where no candidate passes, UnknownTargetError for an unknown target, SettingError for another
    argument that has a type or a value that it does not take.
    """
    chosen = parse_target(target)
    options = checked_options(
        program=program,
        space=space,
        effort=effort,
        tune=tune,
        budget_seconds=budget_seconds,
        delta=delta,
        seed=seed,
        cache=cache,
        engine=engine,
        say=say,
    )
    return _found(program, chosen, options)


def optimize_beside(program: Program, written: Written, **options: Any) -> Result:
    """`optimize`, with what its author wrote measured as the program as it stands."""
    checked = checked_options(program=program, **options)
    return _found(program, parse_target(options.get("target")), checked, written)


def _found(program: Program, chosen: Target, options: Mapping[str, Any], written: Written | None = None) -> Result:
    """`optimize` with its checked options."""
    check(program)
    cache, engine, say = options.get("cache"), options.get("engine"), options.get("say") or (lambda _: None)
    refuse_packed(program)
    space, budget, number, delta = (options[n] for n in ("space", "budget_seconds", "seed", "delta"))
    level: Tune = options["tune"] if chosen.kind == "triton" else "none"
    measuring = options["tune"] == "measure" and chosen.kind == "torch"
    program = program if space.ahead else program.without_constants()
    store = cache if cache is not None else Cache()
    key = key_of(
        f"{canonical_text(program)}\n{program}",
        {
            "space": str(space),
            "delta": delta,
            "seed": number,
            "device": device(_device_name(chosen)).digest,
            "tune": [level, *(f"{f.__module__}.{f.__qualname__}" for f in RULES)],
        }
        | ({"measured on": f"{machine_text()} {written.digest if written else ''}"} if measuring else {}),
        str(chosen),
        dict(_versions()),
    )
    if not settings.skip_cache.get() and not settings.force_search.get():
        found = _from_cache(store, key, chosen)
        if found is not None:
            return found
    if settings.disallow_search.get():
        raise MugraphError(
            f"{program.name} is not in the cache, and MUGRAPH_DISALLOW_SEARCH forbids a search",
            remedy="optimize it ahead of time with the same cache directory",
        )
    jobs = None if settings.skip_cache.get() or settings.force_search.get() else store.jobs
    with engine_of(engine) if engine is None or isinstance(engine, str) else nullcontext(engine) as running:
        search_on = device(_device_name(chosen))
        result = _optimized(program, chosen, search_on, space, level, budget, delta, number, running, jobs, say)
        if measuring and not result.interrupted:
            try:
                calls = _optimized(
                    program, chosen, device(CPU), space, level, budget, delta, number, running, jobs, say
                )
                result = _measured(result, calls, space, delta, number, written, say)
            except KeyboardInterrupt:
                result = replace(result, interrupted=True, notes=(*result.notes, "interrupted before it was measured"))
    report = result.report
    reproducible = not isinstance(report, SearchReport) or report.stop.reproducible
    if not settings.skip_cache.get() and reproducible and not result.interrupted:
        with interruptible() as interrupted:  # what was found is kept, whatever comes
            entry = store.put(key, result.files(), {"notes": list(result.notes), "target": str(chosen)})
        result = replace(result, directory=entry.path if entry else None, interrupted=interrupted())
    if settings.print_output_code.get():
        say(result.source)
    return result


def checked_options(**given: Any) -> dict[str, Any]:
    """Arguments of `optimize` by name, as it takes them: `space`, `budget_seconds` and `seed` where they are not given
    as well.  Raises UnknownTargetError, SettingError, and MugraphError for an engine that is not installed."""
    target = given.get("target")
    if target not in (None, "cuda", "triton"):  # these ask for the device that is there
        parse_target(target)
    found = fit_arguments(optimize, given | dict.fromkeys(("target", "tune", "budget_seconds", "seed") & given.keys()))
    if isinstance(engine := given.get("engine"), str):
        checked_engine(engine)
    if given.get("space") is not None and given.get("effort") is not None:
        raise SettingError("both space and effort are given", remedy="give one: an effort is the name of a space")
    return (
        {"delta": DELTA}
        | found
        | {
            "target": target,
            "tune": settings.tune.get(given.get("tune")),
            "space": given.get("space") or space_of(settings.effort.get(given.get("effort"))),
            "budget_seconds": settings.budget_seconds.get(given.get("budget_seconds")),
            "seed": settings.seed.get(given.get("seed")),
        }
    )


def _from_cache(store: Cache, key: str, target: Target) -> Result | None:
    entry = store.get(key)
    if entry is None:
        return None
    try:
        files = {name: entry.text(name) for name in entry.files}
        found = _read(files, target, tuple(entry.meta.get("notes", ())))
    except (MugraphError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        import warnings

        warnings.warn(CacheWarning(f"the cache entry {entry.path} cannot be read: {error}"), stacklevel=3)
        return None
    return replace(found, cached=True, directory=entry.path)


def _optimized(
    program: Program,
    target: Target,
    on: Device,
    space: SearchSpace,
    level: Tune,
    budget: float,
    delta: float,
    seed: int,
    engine: Engine,
    jobs: Cache | None,
    say: Callable[[str], None],
) -> Result:
    started = time.perf_counter()

    def tell(text: str) -> None:
        say(f"[{time.perf_counter() - started:.1f}s] {text}")
        _log.info(text)

    refused: dict[str, VerificationError] = {}  # graphs whose source disagrees with float64

    def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> tuple[Verified, str]:
        if error := refused.get(str(graph)):
            raise error
        if len(refused) >= MOST_REFUSED and graph.kernels():
            raise VerificationError(f"not tried after {MOST_REFUSED} plans that disagree with float64")
        return accepted(program, graph, target, delta, seed, cuts)

    def solve(tasks: Sequence[Task], stop: Callable[[], bool]) -> list[Done | None]:
        tell(f"searching {len(tasks)} segments")
        options = {"target": str(target), "delta": delta, "seed": seed}
        wanted = [Job("mugraph.pipeline:search_segment", t.to_dict() | options) for t in tasks]
        results = completed(engine, wanted, jobs, stop)
        return [Done.from_dict(r) if r and r.get("graph") else None for r in results]

    left = budget
    while True:
        with interruptible() as interrupted:
            tell(f"searching {program.name} for {target}")  # from here on Ctrl-C leaves the best so far
            try:
                found = search(
                    program,
                    accept=accept,
                    space=space.but(sizes=()),  # one structure serves all sizes: the one for `symbolic`
                    on=on,
                    budget_seconds=left,
                    interrupted=interrupted,
                    accept_cut=accept,
                    solve=solve,
                )
            except (RecursionError, ZeroDivisionError) as error:
                why = _unsearchable(error)
                tell(f"no search: {why}")
                graph: KernelGraph = baseline(program)
                verified, source = accept(graph)
                report = unsearched(program, space_of("none"), on, StopReason("Unsearchable"), why)
                notes: tuple[str, ...] = (f"{why}: it runs as library calls",)
            else:
                assert isinstance(found.accepted, tuple)
                graph, (verified, source) = found.graph, found.accepted
                report = replace(found.report, asked=Asked(program, on, verify_as_given))
                notes = report.notes
                tell(f"found: {found.report.predicted_seconds * 1e6:.1f} µs predicted; verified, error <= {delta:.1e}")
            stopped = interrupted() or report.stop.kind == "Interrupted"
        if refused:
            notes = (*notes, f"{len(refused)} cheaper plans were refused: {next(iter(refused.values())).message}")
        try:
            tuning = partial(tuned, target=target, level=level, symbolic=space.symbolic)
            result = _checked(verified, source, target, seed, report, notes, tell, stopped, tuning)
            return never_slower(result, level, space, delta, seed)
        except VerificationError as error:
            if report.candidates[-1].verdict == "chosen":  # the program as it stands
                raise
            tell(f"refused: {error.message}")
            refused[str(graph)] = error
            left = max(0.0, budget - (time.perf_counter() - started))


# -- what is measured


@dataclass(frozen=True)
class Written:
    """A program as its author wrote it in PyTorch: two forms of it, as functions of the program's inputs, and what
    tells it from others that mean the same."""

    eager: Callable[..., Any]
    compiled: Callable[..., Any]
    digest: str


def _measured(
    found: Result,
    calls: Result,
    space: SearchSpace,
    delta: float,
    seed: int,
    written: Written | None,
    say: Callable[[str], None],
) -> Result:
    """The one of two results, or of the program as it stands, that is fastest on this CPU, eagerly or compiled."""
    program = found.program
    stands = _as_it_stands(found, space, delta, seed)
    sizes = {d.name: min(max(space.symbolic, d.min), d.max) for d in program.dims()}
    results = {AS_IT_STANDS: stands, FOUND: found, CALLS: calls}
    candidates: list[Candidate] = []
    sources = set[str]()
    for name, result in results.items():
        text = _code(result.source)
        if text in sources:
            continue
        sources.add(text)
        for form in ("", COMPILED):
            run: Callable[..., Any]
            correct: Callable[[Callable[..., Any]], bool] | None
            if name == AS_IT_STANDS and written is not None:
                run, correct = (written.compiled if form else written.eager), None
            else:
                run = _loaded(result, bool(form))
                correct = functools.partial(_agrees, program, sizes, seed, bool(result.graph.kernels()))
            candidates.append(Candidate(name + form, run, name == AS_IT_STANDS, correct))
    import torch

    with torch.no_grad():
        inputs = torch_inputs(program, sizes, seed)
        choice = choose(candidates, inputs, sizes=sizes, say=say)
    say(f"chosen: {choice.chosen}")
    best = results[choice.chosen.removesuffix(COMPILED)]
    best = replace(best, report=calls.report) if best is stands else best
    if choice.chosen.endswith(COMPILED):
        best = _compiled(best)
    return replace(best, choice=choice)


def never_slower(found: Result, level: Tune, space: SearchSpace, delta: float, seed: int) -> Result:
    """The result, or the program as library calls where these were measured to be as fast on the device."""
    if not found.graph.kernels() or found.interrupted:
        return found
    with _timer(found.program, found.target, level, space.symbolic) as timer:
        if timer is None:
            return found
        stands = _as_it_stands(found, space, delta, seed)
        ours, theirs = (timer.seconds(r.source, REPEATS[-1]) for r in (found, stands))
    if not isinstance(theirs, Spread) or (isinstance(ours, Spread) and ours.median < theirs.median):
        return found
    times = f"{ours} against {theirs} seconds" if isinstance(ours, Spread) else f"the kernels: {ours.reason}"
    return replace(stands, notes=(*stands.notes, f"library calls were measured faster: {times}"))


def _as_it_stands(found: Result, space: SearchSpace, delta: float, seed: int) -> Result:
    """The program as library calls, as a result."""
    program, target = found.program, found.target

    def accept(graph: KernelGraph, cuts: tuple[str, ...] = ()) -> object:
        return accepted(program, graph, target, delta, seed, cuts)

    whole = search(program, accept=accept, accept_cut=accept, space=space.but(kernels=0, sizes=()), on=device(CPU))
    assert isinstance(whole.accepted, tuple)
    verified, source = whole.accepted
    return _checked(verified, source, target, seed, whole.report)


def _compiled(result: Result) -> Result:
    """The result with its source through `torch.compile`.  Its numbers were compared with float64 when it was
    measured, and those of the eager source before."""
    source = torch_code.emit(result.graph, compiled=True)
    certificate = result.certificate
    numerics = tuple(replace(n, source_hash=_hash(source)) for n in certificate.numerics)
    return replace(result, source=source, certificate=replace(certificate, numerics=numerics))


def _loaded(result: Result, compiled: bool) -> Callable[..., Any]:
    source = torch_code.emit(result.graph, compiled=True) if compiled else result.source
    run: Callable[..., Any] = load_module(source, f"{result.program.name}_{result.target}").run
    return run


def _code(source: str) -> str:
    """A source without its comments."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith("#"))


def _agrees(program: Program, sizes: Mapping[str, int], seed: int, stable: bool, run: Callable[..., Any]) -> bool:
    """Whether a function of the program's inputs agrees with float64 at these sizes."""

    def on(inputs: Mapping[str, Any], bindings: Mapping[str, int]) -> Sequence[Any]:
        del bindings
        given = run(*(inputs[i.name] for i in program.inputs))
        return given if isinstance(given, tuple | list) else (given,)

    report = numeric_check(
        program, on, bindings=[sizes], how="torch", draws=MEASURED_DRAWS, seed=seed, beyond_eager=stable
    )
    return not report.disagrees


def torch_inputs(program: Program, sizes: Mapping[str, int], seed: int = 0) -> list[Any]:
    """Random inputs of the program as tensors on the CPU, in order."""
    import torch

    arrays = draw_inputs(program, sizes, "normal", seed)
    types = {i.name: getattr(torch, torch_code.TORCH_DTYPES[i.storage.dtype]) for i in program.inputs}
    return [torch.from_numpy(arrays[i.name]).to(types[i.name]) for i in program.inputs]


def accepted(
    program: Program, graph: KernelGraph, target: Target, delta: float, seed: int, cuts: tuple[str, ...] = ()
) -> tuple[Verified, str]:
    """The μGraph verified, and its source.  Raises VerificationError where it computes something else, or has no form
    on the target."""
    verified = verify(program, finished(graph, cuts), delta=delta, seed=seed, cuts=cuts)
    try:
        return verified, emit(verified, target)
    except UnsupportedOpError as error:  # this candidate has no form on the target; another may
        raise VerificationError(f"not lowered: {error.message}") from error


def search_segment(request: Mapping[str, Any], stop: Callable[[], bool]) -> dict[str, Any]:
    """A job: the search of one segment of a large program."""
    task = Task.from_dict(request)
    target = parse_target(request["target"])
    done = searched(task, lambda graph: accepted(task.program, graph, target, request["delta"], request["seed"]), stop)
    if done is None:
        return {"graph": None}
    return done.to_dict() | {"whole": done.report.stop.reproducible}


def _unsearchable(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "the values of the program nest too deeply for the search"
    return "the program divides by the constant zero, which the search has no law for"


def from_graph(
    program: Program,
    graph: KernelGraph,
    *,
    target: str | Target | None = None,
    tune: Tune | None = None,
    delta: Probability = DELTA,
    seed: int | None = None,
) -> Result:
    """A μGraph that was written by hand, or read from a file, as a result: stabilised, verified, lowered and checked
    like one that was found.

    Raises VerificationError where the graph does not compute the program or the emitted source disagrees with float64,
    GraphError for a malformed graph, UnsupportedOpError where the target has no form for an operator.
    """
    chosen, number = parse_target(target), settings.seed.get(seed)
    fit_arguments(from_graph, {"program": program, "graph": graph, "delta": delta})
    refuse_packed(program)
    stable = finished(graph, shared_values(program, graph) if nestings(program) else ())
    verified = verify_as_given(program, stable, delta=delta, seed=number)
    report = ReportText({"text": f"{graph.name}: a given graph, no search"})
    tuning = partial(tuned, target=chosen, level=settings.tune.get(tune))
    return _checked(verified, emit(verified, chosen), chosen, number, report, tuning=tuning)


def _checked(
    verified: Verified,
    source: str,
    target: Target,
    seed: int,
    report: SearchReport | ReportText,
    notes: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
    stopped: bool = False,
    tuning: Callable[[Verified], tuple[Verified, Tuned]] = lambda verified: (verified, AS_LOWERED),
) -> Result:
    """The last stage: a verified graph with its source, tuned, unless the source disagrees with float64.

    The certificate reaches the tier `numerics` if some comparison counts.  A Ctrl-C ends the checks, and the result
    has what was established before: where the search was `stopped` by one, that the graph computes the program."""
    certificate, interrupted, found = verified.certificate, stopped, AS_LOWERED
    try:
        if stopped:
            raise KeyboardInterrupt
        verified, found = tuning(verified)
        if found.trace:
            source = emit(verified, target, found.options)
            tell(f"tuned: {', '.join(map(str, found.trace))}")
        notes = (*notes, *found.notes)
        verified = proved(verified)
        certificate = verified.certificate
        bounds = bounds_tier(verified, target, source)
        if bounds is not None:
            certificate = certificate.with_bounds(bounds.claims, bounds.reason)
        numerics = numeric_tier(verified, target, source, seed, found.options)
    except KeyboardInterrupt:
        interrupted = True
        notes = (*notes, "interrupted before the source was compared with float64")
    else:
        if numerics.disagrees or numerics.counted:
            Checked(verified, _hash(source), numerics)  # refuses a source that disagrees with float64
            tell(f"numeric check passed: {len(numerics.rows)} comparisons with float64 ({numerics.how})")
        certificate = certificate.with_numerics(numerics)
        notes = (*notes, *_numeric_notes(numerics, target))
    return Result(
        program=verified.program,
        graph=verified.graph,
        source=source,
        certificate=certificate,
        report=report,
        target=target,
        tuning=found,
        notes=tuple(notes),
        interrupted=interrupted,
    )


def _numeric_notes(numerics: NumericReport, target: Target) -> Iterator[str]:
    if not numerics.counted:
        yield f"the source was not compared with float64, as no input drawn has a result: {numerics.reasons}"
        return
    if any(r.excused for r in numerics.rows):
        yield "for inputs where the program as written overflows its types, the result is not exact either"
    if numerics.how != "torch" and target.precision == "tf32":
        yield "matrix multiplies of f32 operands keep 10 bits of their fraction (tf32), as the target asks"
    if numerics.how == "interpreted":
        yield "the kernels were checked under Triton's interpreter at reduced sizes, not on a device"


def finished(graph: KernelGraph, cuts: Sequence[str] = ()) -> KernelGraph:
    """The μGraph as it is verified (part by part where it is cut) and lowered: exponentials stabilised, gathers and
    scatters in the kernels that they are for, thread graphs formed."""
    stable = access_by_index(stabilise(graph, cuts), cuts)
    equations = []
    for e in stable.equations:
        if isinstance(e.op, Kernel):
            e = replace(e, op=Kernel(tuple(form_threads(b) for b in e.op.blocks)))
        equations.append(e)
    return replace(stable, equations=tuple(equations))


def emit(verified: Verified, target: Target, trace: Trace = (), compiled: bool = False) -> str:
    """The source of a verified μGraph for a target, with the options of a trace.  A graph without kernels of ours is
    torch code everywhere; `compiled`: such that goes through `torch.compile`.  Raises ValueError for a choice that
    there is not."""
    if target.kind == "torch" or not verified.graph.kernels():
        return torch_code.emit(verified.graph, compiled=compiled)
    return triton_code.emit(lower(verified, trace, target.machine))


def tuned(verified: Verified, target: Target, level: Tune, symbolic: int = 16) -> tuple[Verified, Tuned]:
    """A verified μGraph with choices of how its kernels are compiled.  Raises VerificationError where one of them does
    not compile for the target."""
    if target.kind == "torch" or level == "none" or not verified.graph.kernels():
        return verified, AS_LOWERED
    if settings.disallow_search.get():
        return verified, Tuned("none", notes=("the kernels were not compiled: MUGRAPH_DISALLOW_SEARCH forbids it",))
    if find_spec("triton") is None:
        return verified, Tuned("none", notes=("the kernels were not compiled, as Triton is not installed",))
    with shared_compilers() as compilers, _timer(verified.program, target, level, symbolic) as timer:
        tuner = Tuner(device(_device_name(target)), compilers, target.machine, timer, symbolic)
        try:
            return tuner.tuned(verified, level)
        except CompileError as error:
            raise VerificationError(f"not compiled: {error.message}") from error


@contextmanager
def _timer(program: Program, target: Target, level: Tune, symbolic: int) -> Iterator[Timer | None]:
    """What times kernels on the device, where that is asked for and it is there."""
    if level != "measure" or not _device_is_there(target):
        yield None
        return
    import torch

    sizes = {d.name: representative(d, symbolic) for d in program.dims()}
    with DeviceTimer(program, sizes, records=Records.of(torch.cuda.get_device_name())) as timer:
        yield timer


def bounds_tier(verified: Verified, target: Target, source: str) -> Bounds | None:
    """What is known of the loads and stores of our kernels; None where there are none.  Raises VerificationError with a
    counterexample."""
    if target.kind == "torch" or not verified.graph.kernels():
        return None
    return in_bounds(source, verified.program)


def numeric_tier(verified: Verified, target: Target, source: str, seed: int, trace: Trace = ()) -> NumericReport:
    """The same μGraph at reduced sizes (two tiles and a tail along each tiled axis), lowered the same way, against
    float64: on the device if it is there, under the interpreter if not, as torch code for the torch target.  Where the
    program as written overflows, the source may too (exponentials that are summed and then squared, say)."""
    sizes, tiles = reduction(verified.program, verified.graph)
    program = resized(verified.program, sizes, {})
    graph = resized(verified.graph, sizes, tiles)
    small = verify(program, graph, delta=2.0**-20, seed=seed, cuts=verified.certificate.cuts)
    text = emit(small, target, trace)
    stable = any(isinstance(e.op, Kernel) for e in graph.equations)
    with runner(text, target, program) as (run, how):
        report = numeric_check(
            program,
            run,
            bindings=sample_bindings(program, tiles),
            how=how,
            target=f"{target}, reduced sizes",
            source_hash=_hash(source),
            draws=("normal", "wide", "outlier", "logits") if how != "interpreted" else ("normal", "logits"),
            seed=seed,
            device="cuda" if how == "device" else "cpu",
            beyond_eager=stable,
            product_unit=product_unit(program, target) if how != "torch" else 0.0,
        )
    return report.as_written()


def product_unit(program: Program, target: Target) -> float:
    """The relative error of each product in a matrix multiply that instructions may make beyond their operands' own."""
    if target.precision == "tf32":
        return TF32_UNIT
    return F8_UNIT if any(i.tensor.dtype.is_float and i.tensor.dtype.bits == 8 for i in program.inputs) else 0.0


Run = Callable[..., Sequence[Any]]


@contextmanager
def runner(source: str, target: Target, program: Program) -> Iterator[tuple[Run, How]]:
    """A function that runs emitted source on tensors by name, and how it runs them."""
    order = [i.name for i in program.inputs]
    kernels = "triton.jit" in source
    if target.kind == "torch" or not kernels or _device_is_there(target):
        module = load_module(source, f"{program.name}_check")

        def run(inputs: Mapping[str, Any], bindings: Mapping[str, int], out: Sequence[Any]) -> Sequence[Any]:
            del bindings
            given = module.run(*(inputs[n] for n in order), out=out[0] if len(out) == 1 else tuple(out))
            return given if isinstance(given, tuple) else (given,)

        yield run, "device" if kernels and target.kind != "torch" else "torch"
        return
    from mugraph.runtime.interpret import shared_interpreter

    with shared_interpreter() as interpreter:

        def interpret(inputs: Mapping[str, Any], bindings: Mapping[str, int]) -> Sequence[Any]:
            del bindings
            return interpreter.run(source, {n: inputs[n] for n in order})

        yield interpret, "interpreted"


def sample_bindings(program: Program, tiles: Mapping[str, int]) -> list[dict[str, int]]:
    """Values of the symbolic sizes: one tile and a part, and the least admissible."""
    found = []
    for wanted in (lambda tile: tile + max(1, tile // 2 - 1), lambda tile: 1):
        bound: dict[str, int] = {}
        for axis in program.axes().values():
            for d in dims_of(axis.size):
                value = wanted(min(tiles.get(axis.name, 4), 32))
                bound[d.name] = max(bound.get(d.name, 1), min(max(value, d.min), d.max))
        if bound not in found:
            found.append(bound)
    return found


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C sets a flag, the second raises KeyboardInterrupt.  Only the main thread gets signals."""
    hit = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield hit.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if hit.is_set():
            raise KeyboardInterrupt
        hit.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield hit.is_set
    finally:
        signal.signal(signal.SIGINT, before)


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


def _device_is_there(target: Target) -> bool:
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


def _device_name(target: Target) -> str:
    """The description that costs are predicted with: that of the target's generation, H100 where there is none."""
    if target.arch is None:
        return "h100"
    return "80" if target.arch < 90 else "90" if target.arch < 100 else "100"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = [("mugraph", __version__)]
    for name in ("torch", "triton", "numpy"):
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "absent"))
    return tuple(found)


# -- the front door

# How a PyTorch function or module is captured and wrapped; `mugraph.pytorch` puts itself here.
FRONTENDS: list[Callable[..., Any]] = []


def superoptimize(subject: Any = None, **options: Any) -> Any:
    """Finds faster kernels for a program and returns something to call.

    A `Program` (what `@mg.program` makes) gives a `Result` at once.  A PyTorch function or module gives a function
    that is optimised at its first call for the shapes it gets, and falls back to the original, with one warning, where
    something in it is not understood.  Without a subject, returns a decorator: `@mg.superoptimize(target="cuda:90")`.

    Options: target ("torch", "cuda", "cuda:90", ...), space (SearchSpace) or effort ("none", "quick",
    "full"), budget_seconds, delta, seed, cache, engine (where segments of large programs are searched: "here",
    "processes", "ray"); for PyTorch functions also dynamic ({"x": {0: mg.Dim("B", 1, 256)}})
    and strict (raise instead of falling back).
    """
    if subject is None:
        return lambda later: superoptimize(later, **options)
    if isinstance(subject, Program):
        checked_options(**options)
        return optimize(subject, **options)
    if callable(subject):
        for frontend in FRONTENDS:
            return frontend(subject, **options)
    raise MugraphError(
        f"superoptimize takes a program or a PyTorch function, not {type(subject).__name__}",
        remedy="make a program with @mg.program, or give a function of tensors or an nn.Module",
    )
