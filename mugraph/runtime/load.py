"""Emitted files as callables that check what they are given.

`load_module` imports emitted source from a real file, which Triton's source inspection and tracebacks read.
`Executable` stands before the `run` function of such a module: it compares the arguments with the program's signature
and refuses what does not fit, with the parameter, what was expected, what came and what to do.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mugraph.errors import CompileError, LaunchError, ShapeError
from mugraph.ir.axes import Dim, Size, size_value
from mugraph.ir.graph import Program
from mugraph.ir.types import DType
from mugraph.runtime.files import write_whole
from mugraph.transpiler.signature import Binding, bindings, shape_text
from mugraph.transpiler.torch import TORCH_DTYPES

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("mugraph.runtime")
_PREFIX = "mugraph_emitted"


def load_module(source: str, name: str, directory: Path | str | None = None) -> ModuleType:
    """The module that `source` defines, from the file `<name>.py` in `directory`.

    Without a directory, or where it cannot be written, the file goes to a directory of this process that is removed
    at exit.  The same source under the same name and directory is loaded once.
    Raises CompileError if the source does not load.
    """
    stem = re.sub(r"\W", "_", name) or "module"
    digest = hashlib.sha256(f"{directory}\0{name}\0{source}".encode()).hexdigest()[:16]
    full_name = f"{_PREFIX}_{stem}_{digest}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    path = _written(source, stem, digest, directory)
    spec = importlib.util.spec_from_file_location(full_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full_name] = module  # before it runs, as an import does: dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[full_name]
        raise CompileError(
            f"the emitted module {name} does not load: {type(error).__name__}: {error}",
            where=str(path),
            remedy="if the file was edited, emit it again",
        ) from error
    return module


def _written(source: str, stem: str, digest: str, directory: Path | str | None) -> Path:
    if directory is not None:
        path = Path(directory) / f"{stem}.py"
        try:
            if path.read_text(encoding="utf-8") == source:
                return path
        except (OSError, ValueError):
            pass  # absent or unreadable: write it
        try:
            write_whole(path, source)
        except OSError:
            pass  # the process's own directory serves as well
        else:
            return path
    path = _process_directory() / digest / f"{stem}.py"
    write_whole(path, source)
    return path


_directory: Path | None = None


def _process_directory() -> Path:
    """A directory for emitted files that are kept nowhere else.  A forked child uses its parent's."""
    global _directory
    if _directory is None or not _directory.is_dir():
        _directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-"))
        atexit.register(_remove_own, _directory, os.getpid())
    return _directory


def _remove_own(directory: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True)
class _Parameter:
    """What one input must be.  `statics` are (position, size) of its dimensions of known size, `products` those whose
    size follows from symbolic sizes that other dimensions determine."""

    name: str
    text: str
    dtype: torch.dtype
    rank: int
    statics: tuple[tuple[int, int], ...]
    products: tuple[tuple[int, Size], ...]
    dense: bool
    overwritten: bool


@dataclass(frozen=True)
class _Result:
    """What one output is."""

    name: str
    text: str
    dtype: torch.dtype
    shape: tuple[Size, ...]


class Executable:
    """A program's signature before a function that computes it.

    Calling it with tensors, by position or by name, returns a tensor, or a tuple where the program has several
    outputs.  `out` takes a tensor (or a tuple) that receives the results, unless the program has an input of that name,
    which it then is.  Inputs of any strides are accepted.
    Raises LaunchError, before anything runs, for an argument that does not fit.

    `run(*tensors, out=None)` is called with one tensor for each input, in order.  `devices` are the device types on
    which it runs.  `differentiable` says that autograd can follow it.  `dense` names the inputs that it reads as
    row-major memory: others than these are read by their strides.  `notes` tells which copies were made and why.
    """

    __slots__ = (
        "_bindings",
        "_differentiable",
        "_names",
        "_notes",
        "_parameters",
        "_results",
        "devices",
        "program",
        "run",
    )

    def __init__(
        self,
        program: Program,
        run: Callable[..., Any],
        *,
        devices: Collection[str] = ("cpu", "cuda"),
        differentiable: bool = False,
        dense: Collection[str] = (),
    ) -> None:
        self.program = program
        self.run = run
        self.devices = tuple(devices)
        self._differentiable = differentiable
        self._notes: dict[str, None] = {}
        self._bindings = bindings(program)
        self._parameters = _parameters(program, self._bindings, frozenset(dense))
        self._results = _results(program)
        self._names = {p.name: i for i, p in enumerate(self._parameters)}

    @property
    def notes(self) -> tuple[str, ...]:
        """What callers should know about the calls so far: each copy of an argument, once."""
        return tuple(self._notes)

    @property
    def signature(self) -> str:
        """`X: f16[B, 4096], W: f16[4096, 64] -> Y: f16[B, 64]`"""
        inputs = ", ".join(f"{p.name}: {p.text}" for p in self._parameters)
        return f"{inputs} -> {', '.join(f'{r.name}: {r.text}' for r in self._results)}"

    def __repr__(self) -> str:
        return f"Executable({self.program.name}: {self.signature})"

    def __call__(self, *args: Any, out: Any = None, **named: Any) -> Any:
        import torch

        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            # the program says what is rounded, and where
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return self(*args, out=out, **named)
        readable, given, _ = self.admit(args, out, named)
        out = None if not given else given if len(self._results) > 1 else given[0]
        if args and args[0].is_cuda:
            with torch.cuda.device(args[0].device):  # kernels are launched on the current device
                return self.run(*readable, out=out)
        return self.run(*readable, out=out)

    # -- checks ------------------------------------------------------------------------------------------------------

    def admit(
        self, args: tuple[Any, ...], out: Any, named: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Sequence[Any], dict[str, int]]:
        """What kernels can read of the arguments of a call, in order; the tensors of `out`; the symbolic sizes.  Raises
        LaunchError where they do not fit."""
        if out is not None and "out" in self._names:
            named, out = {**named, "out": out}, None
        if named or len(args) != len(self._parameters):
            args = self._bound(args, named)
        sizes = self.check(*args)
        if out is None:
            return self._readable(args), (), sizes
        return self._readable(args), self._check_out(out, args, sizes), sizes

    def check(self, *args: Any) -> dict[str, int]:
        """The symbolic sizes of these arguments, by name.  Raises LaunchError where they do not fit."""
        import torch

        sizes: dict[str, int] = {}
        needs_grad = None
        device = None
        for p, t in zip(self._parameters, args, strict=True):
            if not isinstance(t, torch.Tensor):
                raise self._refusal(p, f"{type(t).__name__} is not a tensor", "pass a torch.Tensor")
            if t.dtype is not p.dtype:
                raise self._refusal(p, f"it is {_shown(t)}", f"convert it: {p.name}.to({p.dtype})")
            if t.layout is not torch.strided:
                raise self._refusal(p, f"it has the layout {t.layout}", f"make it dense: {p.name}.to_dense()")
            shape = t.shape
            if len(shape) != p.rank:
                raise self._refusal(p, f"it is {_shown(t)}", f"give it {p.rank} dimensions, not {len(shape)}")
            for position, size in p.statics:
                if shape[position] != size:
                    raise self._refusal(p, f"it is {_shown(t)}", f"dimension {position} must have size {size}")
            if t.requires_grad:
                needs_grad = needs_grad or p
            if device is None:
                device = t.device
                if device.type not in self.devices:
                    raise self._refusal(p, f"it is on {device}", f"move it to {' or '.join(self.devices)}")
            elif t.device != device:
                first = self._parameters[0].name
                raise self._refusal(p, f"it is on {t.device}, {first} on {device}", "put all arguments on one device")
        if needs_grad is not None and not self._differentiable and torch.is_grad_enabled():
            remedy = f"call it under torch.no_grad(), or pass {needs_grad.name}.detach()"
            raise self._refusal(needs_grad, "it requires a gradient, and this kernel has none", remedy)
        self._bind(args, sizes)
        return sizes

    def _bind(self, args: Sequence[Any], sizes: dict[str, int]) -> None:
        """Gives each symbolic size its value, in range and the same for all dimensions that have it."""
        for b in self._bindings:
            p = self._parameters[self._names[b.source]]
            t = args[self._names[b.source]]
            value = b.value(t.shape[b.position], sizes)
            if value is None:
                raise self._refusal(p, f"it is {_shown(t)}", f"dimension {b.position} must be {_size_of(self, b)}")
            if not b.dim.min <= value <= b.dim.max:
                limits = f"{b.dim.min}..{b.dim.max}"
                raise self._refusal(p, f"it is {_shown(t)}, so {b.dim} = {value}", f"{b.dim} must lie in {limits}")
            sizes[b.dim.name] = value
        for p, t in zip(self._parameters, args, strict=True):
            for position, size in p.products:
                expected = _value(size, sizes)
                if t.shape[position] != expected:
                    known = ", ".join(f"{b.dim} = {sizes[b.dim.name]} from {b.source}" for b in self._bindings)
                    remedy = f"dimension {position} must be {size} = {expected}"
                    raise self._refusal(p, f"it is {_shown(t)}, with {known}", remedy)

    def _check_out(self, out: Any, args: Sequence[Any], sizes: Mapping[str, int]) -> tuple[Any, ...]:
        import torch

        several = len(self._results) > 1
        given = tuple(out) if several and isinstance(out, tuple | list) else (out,)
        if len(given) != len(self._results):
            raise LaunchError(
                f"{self.program.name}: out has {len(given)} tensors, not {len(self._results)}",
                op=self.program.name,
                remedy=f"pass a tuple of ({', '.join(f'{r.name}: {r.text}' for r in self._results)})",
            )
        memory = {t.untyped_storage().data_ptr(): p.name for p, t in zip(self._parameters, args, strict=True)}
        for r, t in zip(self._results, given, strict=True):
            if not isinstance(t, torch.Tensor):
                raise self._out_refusal(r, f"{type(t).__name__} is not a tensor", "pass a torch.Tensor")
            shape = tuple(_value(s, sizes) for s in r.shape)
            if t.dtype is not r.dtype or tuple(t.shape) != shape:
                fitting = f"torch.empty({shape}, dtype={r.dtype}, device={str(t.device)!r})"
                raise self._out_refusal(r, f"it is {_shown(t)}", f"pass {fitting}")
            if args and t.device != args[0].device:
                raise self._out_refusal(r, f"it is on {t.device}", f"put it on {args[0].device}")
            if _overlaps_itself(t):
                raise self._out_refusal(r, f"its strides {t.stride()} overlap", "pass a tensor with its own memory")
            if t.numel() and (other := memory.get(t.untyped_storage().data_ptr())) is not None:
                raise self._out_refusal(r, f"it shares memory with {other}", "pass a tensor with its own memory")
            memory[t.untyped_storage().data_ptr()] = f"out {r.name}"
            if torch.is_grad_enabled() and (t.requires_grad or any(a.requires_grad for a in args)):
                remedy = "call it under torch.no_grad(), or without out"
                raise self._out_refusal(r, "autograd cannot follow a result that is written into a tensor", remedy)
        return given

    def _bound(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments in order, from those by position and those by name."""
        name, wanted = self.program.name, self._parameters
        listed = ", ".join(f"{p.name}: {p.text}" for p in wanted)
        if len(args) > len(wanted):
            problem = f"takes {len(wanted)} tensors, not {len(args) + len(named)}"
        elif unknown := [n for n in named if n not in self._names]:
            problem = f"has no parameter {unknown[0]!r}"
        elif twice := [n for n in named if self._names[n] < len(args)]:
            problem = f"got {twice[0]} twice"
        elif missing := [p.name for p in wanted[len(args) :] if p.name not in named]:
            problem = f"lacks {', '.join(missing)}"
        else:
            return (*args, *(named[p.name] for p in wanted[len(args) :]))
        raise LaunchError(f"{name} {problem}", op=name, remedy=f"call {name}({listed})")

    def _refusal(self, p: _Parameter, problem: str, remedy: str) -> LaunchError:
        message = f"{self.program.name}: {p.name} must be {p.text}, but {problem}"
        return LaunchError(message, op=self.program.name, remedy=remedy)

    def _out_refusal(self, r: _Result, problem: str, remedy: str) -> LaunchError:
        message = f"{self.program.name}: out {r.name} must be {r.text}, but {problem}"
        return LaunchError(message, op=self.program.name, remedy=remedy)

    # -- copies ------------------------------------------------------------------------------------------------------

    def _readable(self, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments as the function can read them; a copy where it cannot read one as it lies."""
        changed: list[Any] | None = None
        for i, (p, t) in enumerate(zip(self._parameters, args, strict=True)):
            if t.is_neg():
                reason = "it is a lazily negated view"
            elif p.dense and not t.is_contiguous():
                reason = f"its strides {tuple(t.stride())} are not row-major"
            elif p.overwritten and _overlaps_itself(t):
                raise self._refusal(p, f"its strides {t.stride()} overlap", "pass a tensor with its own memory")
            else:
                continue
            if p.overwritten:
                raise self._refusal(p, f"{reason}, and the result is written into it", "pass a dense tensor")
            changed = changed or list(args)
            changed[i] = t.resolve_neg().contiguous()
            self._note(f"{p.name} is copied before each call: {reason}")
        return changed or args

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes[text] = None
            _log.warning("%s: %s", self.program.name, text)


def _parameters(program: Program, order: Sequence[Binding], dense: frozenset[str]) -> tuple[_Parameter, ...]:
    import torch

    sources = {(b.source, b.position) for b in order}
    found = []
    for i in program.inputs:
        shape = i.tensor.shape
        found.append(
            _Parameter(
                name=i.name,
                text=shape_text(i.tensor),
                dtype=getattr(torch, TORCH_DTYPES[i.storage.dtype]),
                rank=len(shape),
                statics=tuple((at, s) for at, s in enumerate(shape) if isinstance(s, int)),
                products=tuple(
                    (at, s) for at, s in enumerate(shape) if not isinstance(s, int) and (i.name, at) not in sources
                ),
                dense=i.name in dense,
                overwritten=any(o.alias_of == i.name for o in program.outputs),
            )
        )
    return tuple(found)


def _results(program: Program) -> tuple[_Result, ...]:
    import torch

    tensors = program.tensors()
    return tuple(
        _Result(
            o.value,
            shape_text(tensors[o.value]),
            getattr(torch, TORCH_DTYPES[o.storage.dtype]),
            tensors[o.value].shape,
        )
        for o in program.outputs
    )


def _value(size: Size, sizes: Mapping[str, int]) -> int:
    """The size's value; -1, which no dimension has, if it is not whole."""
    if isinstance(size, int):
        return size
    if isinstance(size, Dim):
        return sizes[size.name]
    try:
        return size_value(size, sizes)
    except ShapeError:
        return -1


def _size_of(executable: Executable, b: Binding) -> str:
    """The symbolic size that a dimension must have."""
    return str(executable.program.input(b.source).tensor.shape[b.position])


_NAMES = {
    name: str(d) for d, name in reversed(TORCH_DTYPES.items()) if d not in (DType.i6, DType.i4, DType.i2, DType.i1)
}


def _shown(t: torch.Tensor) -> str:
    """`f16[8, 4096]`; other element types by their PyTorch name."""
    name = str(t.dtype).removeprefix("torch.")
    return f"{_NAMES.get(name, name)}[{', '.join(map(str, t.shape))}]"


def _overlaps_itself(t: torch.Tensor) -> bool:
    """Whether two elements share memory, as in an expanded tensor; strides that interleave count as overlapping."""
    reach = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False
