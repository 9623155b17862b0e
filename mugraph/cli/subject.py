"""`FILE.py:fn` and `--shapes x=8x4096:f16`, as a program."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import linecache
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mugraph.dsl.trace import TensorSpec, trace
from mugraph.errors import CaptureError, Location, MugraphError, ShapeError
from mugraph.ir.axes import Dim, Size
from mugraph.ir.graph import KernelGraph, Program
from mugraph.ir.types import DType

SHAPE = re.compile(r"(?P<name>[^\W\d]\w*)=(?P<dims>[^:=]*):(?P<dtype>\w+)")
_HOW = "write x=8x4096:f16, or x=Bx4096:f16 with the name of a symbolic size (a name without the letter x)"
_SIGNATURE = "for instance `python -m mugraph optimize model.py:fn`"


def program_of(text: str, shapes: Sequence[str] = (), say: Callable[[str], None] = lambda _: None) -> Program:
    """The program that `FILE.py:fn` names: a Program, or a function, which is traced with `shapes` or else its
    annotations.  A function or module that uses PyTorch is captured by torch.export; what is noted then is said.

    Raises CaptureError for what is not there or no program, ShapeError for bad shapes, and whatever MugraphError the
    file itself raises.  What the file prints goes to stderr.
    """
    specs = parse_shapes(shapes)
    path, name = _parts(text)
    with redirect_stdout(sys.stderr):
        module = loaded(path)
        subject = _named(module, name, path)
        if isinstance(subject, KernelGraph):
            raise CaptureError(f"{name} is a μGraph already", remedy="optimize the program that it was made from")
        if isinstance(subject, Program):
            if specs:
                raise ShapeError(f"{name} is a program with shapes of its own", remedy="leave out --shapes")
            return subject
        if isinstance(subject, type) or not callable(subject):
            raise CaptureError(
                f"{name} in {path} is of type {type(subject).__name__}: no program and no function",
                remedy=_there(module),
            )
        with located(path, name):
            if uses_torch(subject):
                return _captured(subject, name, specs, say)
            return trace(subject, _ordered(subject, name, specs) if specs else None, name.rpartition(".")[2])


# -- shapes


def parse_shapes(texts: Sequence[str]) -> dict[str, TensorSpec]:
    """`x=8x4096:f16` as types of arguments by name.  Raises ShapeError for anything else.

    >>> str(parse_shapes(["x=Bx4096:f16"])["x"])
    'f16[B, 4096]'
    """
    found: dict[str, TensorSpec] = {}
    for text in texts:
        match = SHAPE.fullmatch(text.strip())
        if match is None:
            raise ShapeError(f"{text!r} is no shape", remedy=_HOW)
        if match["name"] in found:
            raise ShapeError(f"the argument {match['name']} has two shapes")
        known = {d.value: d for d in DType}
        if match["dtype"] not in known:
            raise ShapeError(
                f"{text!r}: there is no element type {match['dtype']}", remedy=f"one of {', '.join(known)}"
            )
        sizes = tuple(_size(s, text) for s in match["dims"].split("x")) if match["dims"] else ()
        found[match["name"]] = TensorSpec(known[match["dtype"]], sizes)
    return found


def _size(text: str, whole: str) -> Size:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    if text.isidentifier():
        return Dim(text)
    raise ShapeError(f"{whole!r}: {text!r} is no size", remedy=_HOW)


def _ordered(fn: Callable[..., Any], name: str, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The types in the order of the function's parameters; parameters at the end that have defaults may be left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind in kinds}
    if unknown := sorted(set(specs) - set(known)):
        raise ShapeError(f"{name} has no argument {unknown[0]}", remedy=f"it has {', '.join(known) or 'none'}")
    last = max(list(known).index(n) for n in specs)
    missing = [n for i, (n, p) in enumerate(known.items()) if n not in specs and (i < last or p.default is p.empty)]
    if missing:
        raise ShapeError(f"no shape for the argument {missing[0]} of {name}", remedy=f"add --shapes {missing[0]}=...")
    return {n: specs[n] for n in known if n in specs}


# -- files


def _parts(text: str) -> tuple[Path, str]:
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name:
        raise CaptureError(f"{text!r} names no function in a file", remedy=f"write FILE.py:fn, {_SIGNATURE}")
    path = Path(file)
    if not path.is_file():
        raise CaptureError(f"there is no file {path}", remedy=f"write FILE.py:fn, {_SIGNATURE}")
    return path, name


def loaded(path: Path) -> types.ModuleType:
    """The file as a module, with its directory on the import path as when Python runs it."""
    whole = path.resolve()
    name = f"_mugraph_subject_{hashlib.sha256(str(whole).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, whole)
    if spec is None or spec.loader is None:
        raise CaptureError(f"{path} is no Python file", remedy="give a file that ends in .py")
    module = importlib.util.module_from_spec(spec)
    if str(whole.parent) not in sys.path:
        sys.path.insert(0, str(whole.parent))
    sys.modules[name] = module
    linecache.checkcache(str(whole))
    with located(path, f"{path} as it is loaded"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def located(path: Path, what: str) -> Iterator[None]:
    """An error of the user's code becomes a CaptureError that shows the user's line."""
    try:
        yield
    except MugraphError:
        raise
    except SyntaxError as error:
        shown = Path(error.filename or path).name
        place = f"{shown}:{error.lineno}: {(error.text or '').strip()}"
        raise CaptureError(f"{what}: {type(error).__name__}: {error.msg}", where=place) from error
    except (Exception, SystemExit) as error:
        raise CaptureError(f"{what}: {type(error).__name__}: {error}", where=_line_of(error, path)) from error


def _line_of(error: BaseException, path: Path) -> Location | None:
    """The innermost line of the user's file in the traceback."""
    file, found, step = str(path.resolve()), None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == file:
            found = Location(os.fspath(path), step.tb_lineno, linecache.getline(file, step.tb_lineno).strip())
        step = step.tb_next
    return found


def _named(module: types.ModuleType, name: str, path: Path) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise CaptureError(f"{path} has no {name}", remedy=_there(module))
        found = getattr(found, part)
    return found


def _there(module: types.ModuleType) -> str:
    """The names in the file that could be meant, programs first."""
    mine = {n: v for n, v in vars(module).items() if not n.startswith("_")}
    programs = [n for n, v in mine.items() if isinstance(v, Program)]
    functions = [
        n
        for n, v in mine.items()
        if callable(v) and getattr(v, "__module__", None) == module.__name__ and n not in programs
    ]
    return f"the file has {', '.join([*programs, *functions]) or 'no program and no function'}"


# -- PyTorch


def uses_torch(fn: Any, seen: set[int] | None = None) -> bool:
    """Whether it is a torch module, or its code, or that of functions of its file that it names, refers to torch."""
    if "torch" not in sys.modules:
        return False
    import torch

    if isinstance(fn, torch.nn.Module):
        return True
    fn, seen = inspect.unwrap(fn), seen or set()
    if not isinstance(fn, types.FunctionType) or id(fn) in seen:
        return False
    seen.add(id(fn))
    scope = inspect.getclosurevars(fn)
    for value in (*scope.globals.values(), *scope.nonlocals.values()):
        home = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "") or ""
        if home.partition(".")[0] == "torch" or isinstance(value, torch.nn.Module | torch.Tensor):
            return True
        if home == fn.__module__ and uses_torch(value, seen):
            return True
    return False


def _captured(fn: Any, name: str, specs: Mapping[str, TensorSpec], say: Callable[[str], None]) -> Program:
    """A function of torch tensors, by torch.export on examples of these shapes.  Weights become inputs."""
    import torch

    from mugraph.pytorch.capture import capture
    from mugraph.transpiler.torch import TORCH_DTYPES

    if not specs:
        raise ShapeError(f"{name} uses PyTorch, which has no shapes in its text", remedy=f"give --shapes: {_HOW}")
    fn = fn if isinstance(fn, torch.nn.Module) else inspect.unwrap(fn)
    ordered = _ordered(fn.forward if isinstance(fn, torch.nn.Module) else fn, name, specs)
    examples = []
    for n, spec in ordered.items():
        if spec.dtype not in TORCH_DTYPES:
            raise ShapeError(f"PyTorch has no tensors of {spec.dtype}, which {n} is")
        shape = [s if isinstance(s, int) else 4 for s in spec.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, TORCH_DTYPES[spec.dtype])))
    dynamic = {n: {i: s for i, s in enumerate(spec.shape) if isinstance(s, Dim)} for n, spec in ordered.items()}
    captured = capture(fn, tuple(examples), {n: d for n, d in dynamic.items() if d}, name.rpartition(".")[2])
    for note in captured.notes:
        say(f"note: {note}")
    return captured.program
