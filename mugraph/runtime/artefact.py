"""What `--aot` writes: cubins, the host part of the emitted file, and `index.json`, which says what they are.

    Artefact.read("out/aot").dispatch()      # a `Dispatch`: call it with tensors

What does not fit is refused before anything is loaded: a missing, truncated or edited file (CacheError), another
schema version or another architecture (TargetMismatchError), at a call an argument of another type, rank or size
(LaunchError).  Another driver, or another device of the architecture than the kernels were timed on, gives a warning.

This text is part of `aot.py` as it stands, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mugraph.errors import CacheError, LaunchError, TargetMismatchError, TargetWarning
from mugraph.runtime.dispatch import Admit, Binaries, Binary, Dispatch, Host, Table
from mugraph.runtime.driver import DRIVER, Driver, driver_of

INDEX = "index.json"
INDEX_VERSION = 2
AGAIN = "make it again: mugraph optimize ... --aot"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sealed(index: Mapping[str, Any]) -> dict[str, Any]:
    """The index with the hash of all that it says."""
    body = {k: v for k, v in index.items() if k != "sha256"}
    return {**body, "sha256": digest(json.dumps(body, sort_keys=True).encode())}


class Signature:
    """What a program takes and gives, as the index has it: sizes are numbers, or expressions of symbolic sizes."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.name: str = data["name"]
        self.inputs: Sequence[Mapping[str, Any]] = data["inputs"]
        self.outputs: Sequence[Mapping[str, Any]] = data["outputs"]
        self.sizes: Sequence[Mapping[str, Any]] = data["sizes"]
        self.names = [i["name"] for i in self.inputs]
        self.sources = sorted({self.names.index(s["input"]) for s in self.sizes})
        texts = {str(e) for t in (*self.inputs, *self.outputs) for e in t["shape"]} | {s["value"] for s in self.sizes}
        self.expressions = {text: compile(text, INDEX, "eval") for text in texts}
        self.device = "cuda"

    def value(self, expression: int | str, known: Mapping[str, int], shape: Sequence[int] = ()) -> Any:
        """An expression of symbolic sizes, each as `size_` and its name, and of the shape of an input."""
        names = {"__builtins__": {}, "round": round, "shape": shape, **{f"size_{n}": v for n, v in known.items()}}
        return eval(self.expressions[str(expression)], names)

    def admit(
        self, args: tuple[Any, ...], out: Any, named: Mapping[str, Any]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], dict[str, int]]:
        """The tensors of a call, those of `out`, and the symbolic sizes.  Raises LaunchError for what does not fit."""
        if len(args) + len(named) != len(self.names) or set(named) != set(self.names[len(args) :]):
            raise LaunchError(f"{self.name} takes {', '.join(self.names)}", op=self.name, remedy="pass each once")
        tensors = [*args, *(named[n] for n in self.names[len(args) :])]
        for i, t in zip(self.inputs, tensors, strict=True):
            self.check_type(i, t, tensors[0])
        given = dict(zip(self.names, tensors, strict=True))
        sizes: dict[str, int] = {}
        for s in self.sizes:
            sizes[s["name"]] = found = self.value(s["value"], sizes, given[s["input"]].shape)
            if not s["min"] <= found <= s["max"]:
                self.refuse(s["input"], f"{s['name']} = {found}", f"{s['min']}..{s['max']}")
        for i, t in zip(self.inputs, tensors, strict=True):
            self.check_shape(i, t, sizes)
        outs = tuple(out) if isinstance(out, tuple | list) else () if out is None else (out,)
        if outs:
            self.check_out(outs, tensors, sizes)
        return [t.resolve_neg() for t in tensors], outs, sizes

    def check_type(self, wanted: Mapping[str, Any], t: Any, first: Any) -> None:
        name, dtype, rank = wanted["name"], getattr(torch, wanted["dtype"]), len(wanted["shape"])
        if not isinstance(t, torch.Tensor) or t.layout is not torch.strided:
            self.refuse(name, type(t).__name__, "a dense tensor")
        if t.dtype is not dtype:
            self.refuse(name, str(t.dtype), str(dtype))
        if t.dim() != rank:
            self.refuse(name, f"of {t.dim()} dimensions", f"of {rank}")
        if t.device != first.device or t.device.type != self.device:
            self.refuse(name, f"on {t.device}", f"on the {self.device} device that all are on")
        if t.requires_grad and torch.is_grad_enabled():
            self.refuse(name, "to be differentiated", "detached, as kernels have no gradient")

    def check_shape(self, wanted: Mapping[str, Any], t: torch.Tensor, sizes: Mapping[str, int]) -> None:
        shape = tuple(self.value(s, sizes) for s in wanted["shape"])
        if tuple(t.shape) != shape:
            self.refuse(wanted["name"], f"of shape {tuple(t.shape)}", f"of shape {shape}")

    def check_out(self, given: Sequence[Any], tensors: Sequence[Any], sizes: Mapping[str, int]) -> None:
        if len(given) != len(self.outputs):
            self.refuse("out", f"{len(given)} tensors", str(len(self.outputs)))
        memory = {t.untyped_storage().data_ptr() for t in tensors}
        for o, t in zip(self.outputs, given, strict=True):
            self.check_type(o, t, tensors[0])
            self.check_shape(o, t, sizes)
            if t.numel() and t.untyped_storage().data_ptr() in memory:
                self.refuse(o["name"], "in the memory of another tensor", "in memory of its own")
            memory.add(t.untyped_storage().data_ptr())

    def refuse(self, name: str, found: str, wanted: str) -> None:
        raise LaunchError(f"{self.name}: {name} is {found}", op=self.name, remedy=f"it must be {wanted}")


class Artefact:
    """The files of an artefact, by name.  Raises CacheError where one is missing or was changed, TargetMismatchError
    for another schema version."""

    def __init__(self, files: Mapping[str, bytes], where: str = "the artefact") -> None:
        self.files, self.where = files, where
        try:
            self.index: dict[str, Any] = json.loads(files[INDEX])
            if (version := self.index.get("schema_version")) != INDEX_VERSION:
                raise TargetMismatchError(f"{where} has schema version {version}, not {INDEX_VERSION}", remedy=AGAIN)
            if sealed(self.index) != self.index:
                raise CacheError(f"{where}/{INDEX} was edited", remedy=AGAIN)
            for name, wanted in self.index["files"].items():
                if digest(files[name]) != wanted:
                    raise CacheError(f"{where}/{name} was edited or cut short", remedy=AGAIN)
            self.signature = Signature(self.index["program"])
            self.table = Table.from_dict(self.index["table"])
            self.hosts = {
                name: Host.of(files[name].decode(), kernels, f"{where}/{name}")
                for name, kernels in self.index["hosts"].items()
            }
            self.binaries = [self.binary(b) for b in self.index["binaries"]]
        except (KeyError, ValueError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
            raise CacheError(f"{where} is no artefact of mugraph: {error!r}", remedy=AGAIN) from error
        for s in self.signature.sizes:
            if s["name"] == self.table.dim:
                self.table.check_covers(s["min"], s["max"])

    @staticmethod
    def read(directory: Path | str) -> Artefact:
        place = Path(directory)
        try:
            names = [INDEX, *json.loads((place / INDEX).read_bytes())["files"]]
            files = {name: (place / name).read_bytes() for name in names}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{place} is no artefact of mugraph: {error}", remedy=AGAIN) from error
        return Artefact(files, str(place))

    def binary(self, data: Mapping[str, Any]) -> Binary:
        fields = ("host", "kernel", "arch", "entry", "parameters", "constants", "options", "shared", "scratch")
        return Binary(**{f: data[f] for f in fields}, image=self.files[data["file"]])

    @property
    def arches(self) -> tuple[int, ...]:
        return tuple(sorted({b.arch for b in self.binaries}))

    def dispatch(self, admit: Admit | None = None, driver: str = DRIVER) -> Dispatch:
        """What is called with tensors.  `admit` checks them instead of the signature."""

        def of_device(ordinal: int) -> Binaries:
            library = driver_of(driver)
            self.warn(library, ordinal)
            return Binaries(library, ordinal, self.binaries)

        s = self.signature
        return Dispatch(admit or s.admit, self.table, self.hosts, of_device, len(s.names), s.sources)

    def warn(self, driver: Driver, ordinal: int) -> None:
        """Warns of what may make the kernels slower or different, though they run."""
        timed = self.index["timed"]
        if timed is not None and timed["device"] != (name := driver.name(ordinal)):
            warnings.warn(TargetWarning(f"{self.where} was timed on {timed['device']}, this is {name}"), stacklevel=4)
        if timed is not None and timed["driver"] != (version := driver.version()):
            text = f"{self.where} was timed with driver version {timed['driver']}, this is {version}"
            warnings.warn(TargetWarning(text), stacklevel=4)
