"""The commands, each a few lines over the library.  Nothing here imports torch before a command needs it."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec

import typer

from mugraph import __version__, settings
from mugraph.errors import (
    BudgetExceeded,
    CacheError,
    CaptureError,
    CompileError,
    GraphError,
    LaunchError,
    MugraphError,
    NoCandidateError,
    ParseError,
    SettingError,
    ShapeError,
    TargetMismatchError,
    UnknownTargetError,
    UnsupportedOpError,
    VerificationError,
)

if TYPE_CHECKING:
    from mugraph.ir.graph import Program
    from mugraph.result import Result

OK, INTERNAL, USAGE, BASELINE, UNVERIFIED, UNSUPPORTED, NOT_COMPILED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

EXIT_CODES: dict[type[MugraphError], int] = {
    CaptureError: USAGE,
    ShapeError: USAGE,
    ParseError: USAGE,
    GraphError: USAGE,
    SettingError: USAGE,
    UnknownTargetError: USAGE,
    TargetMismatchError: USAGE,
    CacheError: USAGE,
    NoCandidateError: BASELINE,
    BudgetExceeded: BASELINE,
    VerificationError: UNVERIFIED,
    UnsupportedOpError: UNSUPPORTED,
    CompileError: NOT_COMPILED,
    LaunchError: NOT_COMPILED,
}

P = ParamSpec("P")

app = typer.Typer(
    name="mugraph",
    help="A superoptimizer for tensor programs: finds, proves and emits fast GPU kernels.",
    epilog="Exit codes: 0 ok, 1 internal, 2 usage, 3 nothing beats the baseline (it is the artefact), "
    "4 verification failed, 5 unsupported, 6 compile failed, 130 interrupted (the best so far is saved).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help, which is printed without loading rich
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Results on disk.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache_app, name="cache")
import_app = typer.Typer(help="Programs and μGraphs of other projects.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(import_app, name="import")
tuning_app = typer.Typer(help="What --tune measure measured.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tuning_app, name="tuning")

_debug = False


def say(text: str) -> None:
    """Narration, on stderr."""
    print(text, file=sys.stderr, flush=True)


class OutputError(Exception):
    """Stdout cannot be written."""


def put(text: object = "") -> None:
    """Data, on stdout.  Raises OutputError where it cannot be written, BrokenPipeError where nobody reads it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error


def print_document(data: Any) -> None:
    """One JSON document, strict: a number that is not finite becomes null."""
    put(json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False, default=str))


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(k): _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
        case _:
            return value


def command(body: Callable[P, int | None]) -> Callable[P, None]:
    """Turns what a command returns or raises into an exit code, and an error into its text on stderr; with `--json`
    the error is the document."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                code = body(*args, **kwargs) or OK
            except MugraphError as error:
                code = exit_code(error)
                if wants_traceback():
                    traceback.print_exc()
                say(str(error))
                if kwargs.get("as_json"):
                    print_document({"error": error.to_dict(), "exit_code": code})
            except KeyboardInterrupt:
                code = INTERRUPTED
                say("interrupted: nothing was saved")
            except OutputError as error:
                code = INTERNAL
                say(str(error))
            except BrokenPipeError:
                code = OK  # the reader had enough; `main` closes the stream
            except Exception:
                code = INTERNAL
                traceback.print_exc()
                say("an error inside mugraph; please report it with the lines above")
        raise typer.Exit(code)

    return run


def exit_code(error: MugraphError) -> int:
    return next((EXIT_CODES[c] for c in type(error).__mro__ if c in EXIT_CODES), INTERNAL)


def wants_traceback() -> bool:
    """With --debug, or MUGRAPH_LOGS with a `+` somewhere."""
    try:
        return _debug or logging.DEBUG in settings.logs.get().values()
    except SettingError:
        return _debug


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    say(f"{category.__name__}: {message}")


def with_shapes_apart(arguments: Sequence[str]) -> list[str]:
    """`--shapes x=... w=...` -> `--shapes x=... --shapes w=...`."""
    found: list[str] = []
    in_shapes = False
    for text in arguments:
        is_shape = re.fullmatch(r"[^\W\d]\w*=[^:=/]*:\w+", text) is not None
        if in_shapes and is_shape and found[-1] != "--shapes":
            found.append("--shapes")
        in_shapes = text == "--shapes" or (in_shapes and is_shape)
        found.append(text)
    return found


def _version(wanted: bool) -> None:
    if wanted:
        put(f"mugraph {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


# -- optimize


Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON document on stdout.")]


@app.command()
@command
def optimize(
    subject: Annotated[str, typer.Argument(metavar="FILE.py:FN", help="A program, or a function and its file.")],
    shapes: Annotated[
        list[str] | None,
        typer.Option(help="Types of the arguments, x=8x4096:f16 or x=Bx4096:f16 (repeat, or list several)."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="torch, triton, cuda or cuda:90 (default: this machine).")] = None,
    effort: Annotated[str | None, typer.Option(help="How hard to search: none, quick, full.")] = None,
    tune: Annotated[str | None, typer.Option(help="How hard kernels are tuned: none, fit, model, measure.")] = None,
    budget: Annotated[float | None, typer.Option(metavar="SECONDS", help="Stop with the best so far.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every draw.")] = None,
    split: Annotated[bool, typer.Option("--split/--no-split", help="Reductions may be cut over the grid.")] = True,
    engine: Annotated[
        str | None, typer.Option(help="Where segments of a large program are searched: here, processes, ray.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="How many processes search.")] = None,
    address: Annotated[str | None, typer.Option(help="The Ray cluster, host:port or auto (default: one here).")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory to write.")] = None,
    aot: Annotated[
        str | None,
        typer.Option(
            metavar="80,90",
            help="Also write cubins for these architectures, and a loader that needs no compiler, to DIR/aot.",
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="1,64,256", help="With --aot: search at these sizes too; each range has its own kernels."),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print the laws that lead to each kernel, and what it costs.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Find, verify and emit a faster program."""
    settings.configure_logging()
    from dataclasses import replace

    from mugraph import pipeline
    from mugraph.cli.subject import program_of
    from mugraph.result import AOT, check_writable
    from mugraph.runtime.engine import engine_of
    from mugraph.search.space import space_of
    from mugraph.transpiler.target import parse_target

    if out is not None:
        check_writable(out)
    arches = parse_arches(aot, out)
    others = parse_numbers("--sizes", sizes, "1,64,256")
    if others and not arches:
        raise SettingError("--sizes is about what --aot writes", remedy="give --aot 90, say")
    space = space_of(settings.effort.get(effort)).but(**({} if split else {"split": False}))
    chosen = parse_target(target)
    if arches and chosen.kind == "torch":
        raise SettingError("--aot compiles kernels, and the target is torch", remedy="give --target cuda:90, say")
    program = program_of(subject, shapes or [], say)
    if others and len(program.dims()) != 1:
        raise SettingError(f"{program.name} has {len(program.dims())} symbolic sizes", remedy="leave out --sizes")
    with engine_of(engine, workers, address) as running:
        result = pipeline.optimize(
            program,
            target=chosen,
            space=space,
            tune=settings.tune.get(tune),
            budget_seconds=budget,
            seed=seed,
            engine=running,
            say=say,
        )
    if result.cached:
        say(f"found in the cache: {result.directory}")
    if out is not None:
        with pipeline.interruptible() as interrupted:  # what was found is written, whatever comes
            result = replace(result, directory=result.save(out))
            if arches:  # compiling may fail, and must not cost what was found
                ranges = pipeline.by_size(result, others, arches) if others else None
                result = replace(result, directory=result.save(out, arches, ranges))
        result = replace(result, interrupted=result.interrupted or interrupted())
        say(f"wrote {', '.join(sorted(result.files()))} and manifest.json to {out}")
        if arches:
            say(f"wrote cubins for {', '.join(f'sm_{a}' for a in arches)} and aot.py to {out / AOT}")
    if as_json:
        print_document(summary(result) | ({"explanation": result.explain()} if explain else {}))
    else:
        put(result.explain() if explain else result)
    code = outcome(result)
    if code == BASELINE:
        why = "nothing beats the program as it stands" if space.kernels else "nothing was searched"
        say(f"{why}: what was emitted is the program as library calls")
    if code == INTERRUPTED:
        say("interrupted: this is the best so far" + ("" if out else ", and it was not saved"))
    say(how_to_use(result, " --shapes ".join([subject, *(shapes or [])]), out))
    return code


def parse_arches(text: str | None, out: Path | None) -> list[int]:
    """`80,90` as numbers.  Raises SettingError, UnknownTargetError."""
    from mugraph.runtime.compile import SHARED_LIMITS, check_arch

    found = parse_numbers("--aot", text, ",".join(map(str, SHARED_LIMITS)))
    if found and out is None:
        raise SettingError("--aot writes files", remedy="name a directory with -o")
    for arch in found:
        check_arch(arch)
    return found


def parse_numbers(option: str, text: str | None, example: str) -> list[int]:
    """Different numbers above 0 with commas between, none where there is no text.  Raises SettingError."""
    words = [w.strip() for w in text.split(",")] if text is not None else []
    if not all(w.isdecimal() and int(w) > 0 for w in words) or len(set(words)) < len(words):
        raise SettingError(f"{option} {text} is no list of different numbers", remedy=f"write {option} {example}")
    return [int(w) for w in words]


def summary(result: Result) -> dict[str, Any]:
    """What `optimize --json` prints."""
    report = result.report.to_dict()
    return {
        "schema_version": 1,
        "program": result.program.name,
        "target": str(result.target),
        "predicted_seconds": report["predicted_seconds"],
        "floor_seconds": report["floor_seconds"],
        "percent_of_floor": report["percent_of_floor"],
        "beats_baseline": not is_baseline(result),
        "stop": report["stop"],
        "delta_log2": result.certificate.delta_log2,
        "tiers": list(result.certificate.tiers),
        "interrupted": result.interrupted,
        "files": sorted(result.files()),
        "directory": None if result.directory is None else str(result.directory),
        "cached": result.cached,
        "notes": list(result.notes),
        "choice": result.choice.to_dict() if result.choice else None,
    }


def is_baseline(result: Result) -> bool:
    """Whether the program as it stands runs: it was measured to be as fast, or the search chose it, its last
    candidate."""
    if result.choice:
        return result.unchanged
    return bool(result.report.to_dict()["candidates"][-1]["verdict"] == "chosen")


def outcome(result: Result) -> int:
    if result.interrupted:
        return INTERRUPTED
    return BASELINE if is_baseline(result) else OK


def how_to_use(result: Result, subject: str, out: Path | None) -> str:
    """The line that says how to hard-code the result."""
    arguments = ", ".join(i.name for i in result.program.inputs)
    if out is None:
        tune = " --tune measure" if result.choice else ""
        again = f"mugraph optimize {subject} --target {result.target}{tune} -o DIR"
        return f"keep it: {again}, then mugraph.load('DIR')({arguments})"
    return f"use it: mugraph.load({str(out)!r})({arguments}), or run({arguments}) of {out / 'kernel.py'} alone"


# -- why not


@app.command("why-not")
@command
def why_not(
    subject: Annotated[str, typer.Argument(metavar="PROGRAM", help="FILE.py:FN, or what `optimize -o` wrote.")],
    graph: Annotated[Path, typer.Argument(help="A μGraph: a saved directory, a graph.json or a .txt.")],
    shapes: Annotated[list[str] | None, typer.Option(help="Types of the arguments, as for optimize.")] = None,
    target: Annotated[str | None, typer.Option(help="As for optimize.")] = None,
    effort: Annotated[str | None, typer.Option(help="As for optimize.")] = None,
    as_json: Json = False,
) -> None:
    """Say why the search did not find, or did not choose, a μGraph."""
    settings.configure_logging()
    from mugraph import pipeline
    from mugraph.cli.subject import program_of
    from mugraph.result import load
    from mugraph.search.answers import to_dict
    from mugraph.search.space import space_of

    given = read_graph(graph)
    if Path(subject).is_dir():
        result = load(subject)
    else:
        program, space = program_of(subject, shapes or [], say), space_of(settings.effort.get(effort))
        result = pipeline.optimize(program, target=target, space=space, say=say)
    answer = result.why_not(given)
    if as_json:
        print_document({"schema_version": 1, **to_dict(answer)})
    else:
        put(answer)


# -- verify


@app.command()
@command
def verify(
    directory: Annotated[Path, typer.Argument(help="What `optimize -o` wrote.")],
    strict: Annotated[bool, typer.Option("--strict", help="Repeat the numeric check as well.")] = False,
    as_json: Json = False,
) -> None:
    """Check a saved result again from its files."""
    settings.configure_logging()
    from mugraph.cli.saved import recheck_saved

    started = time.perf_counter()
    found = recheck_saved(directory, strict, lambda text: say(f"[{time.perf_counter() - started:.1f}s] {text}"))
    if as_json:
        print_document(
            {
                "schema_version": 1,
                "verified": True,
                "program": found.result.program.name,
                "target": str(found.result.target),
                "delta_log2": found.result.certificate.delta_log2,
                "checks": found.checks,
                "not_repeated": found.not_repeated,
                "not_compared": found.not_compared,
            }
        )
    else:
        put(found)


# -- import


@import_app.command("mirage")
@command
def import_mirage(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Graphs as the Mirage project publishes them, JSON.")],
    program: Annotated[
        str | None, typer.Option(metavar="FILE.py:FN", help="The program that each graph has to equal.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory in which each equal graph is lowered and saved.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="What -o lowers for (default: this machine).")] = None,
    as_json: Json = False,
) -> int:
    """Read published μGraphs, and verify each against a program."""
    settings.configure_logging()
    from mugraph.cli.imported import import_file
    from mugraph.cli.subject import program_of

    if out is not None and program is None:
        raise SettingError("-o saves graphs that equal a program", remedy="name it with --program FILE.py:fn")
    wanted = program_of(program, say=say) if program is not None else None
    found = import_file(file, wanted, out, target, (lambda _: None) if as_json else put)
    count = {v: sum(g.verdict == v for g in found) for v in ("equal", "read", "refused")}
    if as_json:
        print_document({"schema_version": 1, "file": str(file), **count, "graphs": [g.to_dict() for g in found]})
    elif wanted is None:
        say(f"{count['read']} of {len(found)} graphs read; --program FILE.py:fn verifies them")
    else:
        put(f"{count['equal']} of {len(found)} graphs equal {wanted.name}, {count['refused']} refused")
    return UNVERIFIED if count["refused"] else OK


Target = Annotated[str | None, typer.Option(help="As for optimize.")]
Effort = Annotated[str | None, typer.Option(help="As for optimize.")]
Tune = Annotated[str | None, typer.Option(help="As for optimize.")]
Budget = Annotated[float | None, typer.Option(metavar="SECONDS", help="As for optimize, for each region.")]


@import_app.command("kernelbench")
@command
def import_kernelbench(
    file: Annotated[Path, typer.Argument(metavar="FILE.py", help="A file with Model, get_inputs, get_init_inputs.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write (default: stdout).")] = None,
    target: Target = None,
    dtype: Annotated[str, typer.Option(help="f32, f16 or bf16: what weights and inputs are converted to.")] = "f32",
    effort: Effort = None,
    tune: Tune = None,
    budget: Budget = None,
    as_json: Json = False,
) -> int:
    """Write a KernelBench file with a ModelNew beside its Model.  This runs the file.

    ModelNew takes the weights of Model and needs torch and triton only.  What is not understood stays PyTorch; the
    head of the file says what share of the operators was taken over.  It is compared with Model before it is written.
    """
    settings.configure_logging()
    from mugraph.cli.kernelbench import import_file
    from mugraph.cli.texts import write_files

    if out is not None and out.resolve() == file.resolve():
        raise SettingError(f"-o {out} is the file that is read", remedy="name another file")
    options = {"effort": effort, "tune": tune, "budget_seconds": budget}
    found = import_file(file, target, dtype, say, **{k: v for k, v in options.items() if v is not None})
    if out is not None:
        write_files(out.parent, {out.name: found.text})
        say(f"wrote {out}")
    elif not as_json:
        put(found.text.rstrip())
    if as_json:
        print_document({"schema_version": 1, **found.to_dict(), "text": found.text})
    elif out is not None:
        put(found)
    return OK if found.taken else BASELINE


@import_app.command("flashinfer-trace")
@command
def import_flashinfer_trace(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A Definition of FlashInfer-Trace.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory for definition.json, solution.json and result/.")
    ] = None,
    target: Target = None,
    effort: Effort = None,
    tune: Tune = None,
    budget: Budget = None,
    as_json: Json = False,
) -> int:
    """Optimise a FlashInfer-Trace Definition and write a Solution.  This runs its reference.

    Variable axes become symbolic sizes.  DIR/result is what `optimize -o` writes, to be loaded or verified.
    """
    settings.configure_logging()
    from mugraph.cli.flashinfer import import_file
    from mugraph.search.space import space_of

    space = space_of(settings.effort.get(effort))
    options = {"tune": settings.tune.get(tune), "budget_seconds": budget}
    result = import_file(file, out, target, say, space=space, **options)
    if out is not None:
        say(f"wrote definition.json, solution.json and result to {out}")
    if as_json:
        print_document(summary(result))
    else:
        put(result)
    return outcome(result)


# -- export


@app.command()
@command
def export(
    directory: Annotated[Path, typer.Argument(help="What `optimize -o` wrote.")],
    to: Annotated[Literal["torch", "flashinfer-trace"], typer.Option("--to", help="The form.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write.")],
) -> None:
    """Write a saved result for other projects.

    torch: register.py and kernel.py, a PyTorch operator that needs torch and triton only.
    flashinfer-trace: definition.json and solution.json.
    """
    settings.configure_logging()
    from mugraph.cli import flashinfer
    from mugraph.cli.texts import check_place, write_files
    from mugraph.result import load
    from mugraph.runtime.register import check_operable

    result = load(directory)
    if to == "flashinfer-trace":
        flashinfer.export(result, out)
    else:
        check_operable(result.program)
        files, names = result.files(), ("kernel.py", "register.py")
        check_place(out, (*names, "__pycache__"))
        write_files(out, {n: files[n] for n in names})
    say(f"wrote {out}")


# -- show

Format = Literal["text", "svg", "mermaid", "json", "report", "laws"]


@app.command()
@command
def show(
    path: Annotated[Path, typer.Argument(help="A saved directory, a graph.json or a program's .txt.")],
    form: Annotated[Format, typer.Option("--format", help="What to print.")] = "text",
) -> None:
    """Print a graph, its picture, its report, or the laws that lead to it."""
    if form == "report":
        put(report_text(path))
        return
    if form == "laws":
        from mugraph.result import load

        put(load(path if path.is_dir() else path.parent).explain())
        return
    graph = read_graph(path)
    match form:
        case "text":
            put(str(graph).rstrip())
        case "svg":
            from mugraph.viz.svg import draw_svg

            put(draw_svg(graph))
        case "mermaid":
            from mugraph.viz.mermaid import draw_mermaid

            put(draw_mermaid(graph))
        case "json":
            from mugraph.ir.serialize import dumps

            put(dumps(graph, indent=1))


def read_graph(path: Path) -> Program:
    """The graph of a directory, a JSON file or a text.  Raises ParseError or GraphError where it is none."""
    from mugraph.ir.check import check
    from mugraph.ir.graph import Program
    from mugraph.ir.parser import parse_program
    from mugraph.ir.serialize import loads

    file = path / "graph.json" if path.is_dir() else path
    if file.exists() and file.suffix not in (".json", ".txt"):
        raise ParseError(f"{file} is no graph", remedy="name a saved directory, a graph.json or a program's .txt")
    text = _text(file)
    graph = loads(text) if file.suffix == ".json" else parse_program(text)
    if not isinstance(graph, Program):
        raise ParseError(f"{file} holds a {type(graph).__name__}, not a graph")
    check(graph)
    return graph


def report_text(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    file = folder / "report.json"
    try:
        return str(json.loads(_text(file))["text"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ParseError(f"{file} is no report: {error}", remedy="run mugraph optimize again") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ParseError(
            f"cannot read {file}: {reason}", remedy="name a saved directory, a graph.json or a program's .txt"
        ) from error


# -- cache


@cache_app.command("ls")
@command
def cache_ls(as_json: Json = False) -> None:
    """List the results in the cache."""
    from mugraph.runtime.cache import Cache

    check_cache_directory()
    rows = [
        {
            "key": e.key,
            "program": _program_name(e.files),
            "target": e.meta.get("target"),
            "bytes": e.size,
            "written": time.strftime("%Y-%m-%d %H:%M", time.localtime(e.path.stat().st_mtime)),
        }
        for e in Cache().ls()
    ]
    if as_json:
        print_document({"path": str(Cache().path), "entries": rows})
        return
    for r in rows:
        put(f"{str(r['key'])[:12]}  {r['written']}  {r['bytes']:>9}  {r['target']!s:<8}  {r['program']}")
    say(f"{len(rows)} results in {Cache().path}")


def check_cache_directory() -> None:
    """Raises CacheError where the cache's place holds something else; it need not be there."""
    place = settings.cache_dir.get()
    if place.exists() and not place.is_dir():
        raise CacheError(f"{place} is no directory", remedy="set MUGRAPH_CACHE_DIR to a directory of yours")


def _program_name(files: Mapping[str, bytes]) -> str | None:
    try:
        return str(json.loads(files["program.json"])["value"]["name"])
    except (KeyError, ValueError, TypeError):
        return None


@cache_app.command("clear")
@command
def cache_clear() -> None:
    """Remove all results from the cache."""
    from mugraph.runtime.cache import Cache

    check_cache_directory()
    say(f"removed {Cache().clear()} results from {Cache().path}")


@cache_app.command("path")
@command
def cache_path() -> None:
    """Print the cache directory."""
    put(settings.cache_dir.get())


# -- env


@app.command()
@command
def env(as_json: Json = False) -> None:
    """Print versions, devices and settings."""
    data = environment()
    if as_json:
        print_document(data)
        return
    for name, value in data["versions"].items():
        put(f"{name:<10} {value or 'not installed'}")
    put(f"{'platform':<10} {data['platform']}, {data['cpu_count']} CPUs")
    put(f"{'devices':<10} {', '.join(data['devices']) or 'no CUDA device'}")
    put(f"{'cache':<10} {data['cache']}")
    put()
    width = max(len(s["environment"]) for s in data["settings"])
    for s in data["settings"]:
        put(f"{s['environment']:<{width}}  {s['value'] or '-'}  ({s['help']})")


def environment() -> dict[str, Any]:
    """Versions by package (None where it is not installed), devices, and the value of every setting."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {"mugraph": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    rows = [{"name": s.name, "environment": s.env, "value": _value(s), "help": s.help} for s in settings.SETTINGS]
    return {
        "schema_version": 1,
        "versions": versions,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "devices": _devices() if versions["torch"] else [],
        "cache": _value(settings.cache_dir),
        "settings": rows,
    }


def _value(setting: settings.Setting[Any]) -> str:
    try:
        value = setting.get()
    except SettingError as error:
        return f"invalid: {error.message}; {error.remedy}"
    return "" if value is None or value == {} else str(int(value)) if isinstance(value, bool) else str(value)


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append(f"{torch.cuda.get_device_name(i)} (cuda:{major}{minor})")
    return found


# -- calibrate


@app.command()
@command
def calibrate(
    device: Annotated[int, typer.Option(help="Number of the CUDA device.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure this GPU, so that costs are predicted for it."""
    settings.configure_logging()
    from mugraph.runtime.calibrate import calibrate as measure
    from mugraph.runtime.calibrate import present_device, store
    from mugraph.search.cost import sheet_devices

    probe = present_device(device)
    say(f"measuring {probe.name}")
    found, checks = measure(probe, time.strftime("%Y-%m-%d"), lambda text: say(f"  {text}"))
    place = store(found)
    base = sheet_devices()[found.base]
    if as_json:
        print_document(
            {
                "schema_version": 1,
                "device": found.name,
                "base": found.base,
                "calibrated": found.calibrated,
                "file": str(place),
                "figures": {k: getattr(found, k) for k in found.sources},
                "sources": dict(found.sources),
                "checks": [{"what": c.what, "measured": c.measured, "predicted": c.predicted} for c in checks],
            }
        )
        return
    put(f"{found.name}: what differs from {base.name}")
    for key in found.sources:
        before, after = getattr(base, key), getattr(found, key)
        if isinstance(after, int | float) and before != after:
            put(f"  {key:<24} {before:>12.4g} -> {after:.4g}")
    for c in checks:
        put(f"  {c.what:<32} {1e6 * c.measured:10.1f} µs, predicted {1e6 * c.predicted:.1f}")
    say(f"stored in {place}")


# -- tuning

DEVICE = typer.Option("--device", metavar="NAME", help="A device's name (default: the one here).")


@tuning_app.command("export")
@command
def tuning_export(
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Write what was measured on a device into one file."""
    from mugraph.runtime.files import write_whole
    from mugraph.runtime.timing import Records

    records = Records.of(device or present_name())
    try:
        write_whole(file, records.export())
    except OSError as error:
        raise CacheError(f"cannot write {file}: {error}", remedy="name another file") from error
    say(f"wrote {len(list(records.rows()))} measurements on {records.device} to {file}")


@tuning_app.command("merge")
@command
def tuning_merge(
    file: Annotated[Path, typer.Argument(help="What `tuning export` wrote.")],
    device: Annotated[str | None, DEVICE] = None,
) -> None:
    """Take over measurements that are not here; what is here stays."""
    from mugraph.runtime.timing import Records

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot read {file}: {error}", remedy="name a file that tuning export wrote") from error
    say(f"{Records.of(device or present_name()).merge(text)} new measurements")


def present_name() -> str:
    """The CUDA device's name.  Raises UnknownTargetError without one."""
    import torch

    if not torch.cuda.is_available():
        raise UnknownTargetError("there is no CUDA device here", remedy="name one: --device NAME")
    return torch.cuda.get_device_name()
