"""What a function changes besides its result, while torch traces it: found, and put back as it was.

torch.export runs a function's own Python with tensors that have no values.  A counter would count that run, and a list,
a cache or an attribute would keep such a tensor.  So all that the function can reach is written down before the run and
compared after it: what it is bound to, what it names, and from there attributes and entries, of classes too.  Objects
of Python's library, of PyTorch and of NumPy are left out, but for containers, modules and random numbers; iterators
cannot be put back.
"""

from __future__ import annotations

import functools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from mugraph.errors import CaptureError
from mugraph.pytorch.guards import codes

# So many objects are looked at.
MOST = 200_000
_ABSENT = object()
_LEAVES = frozenset({int, float, complex, bool, str, bytes, type(None), range, slice, CodeType})
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "torchgen", "numpy", "mugraph", "triton", "sympy"})


class ChangesStateError(CaptureError):
    """The function changes what it reads.  A second run may not, where the first filled a cache."""


@contextmanager
def undone(root: Any) -> Iterator[None]:
    """Undoes what the block changes of all that `root` can reach.  Raises ChangesStateError where there was something
    to undo."""
    effects = Effects(root)
    try:
        yield
    finally:
        changed = effects.undo()
    if changed is not None:
        raise ChangesStateError(
            f"the function changes what it reads: {changed}", remedy="return the new values instead"
        )


@dataclass
class Effects:
    """All that `root`, a function, method, module or object, can reach, as it is now."""

    root: Any
    _states: list[_State] = field(default_factory=list)
    _caches: list[tuple[Any, int]] = field(default_factory=list)
    _seen: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        left = [("", self.root)]
        if "numpy.random" in sys.modules:
            left.append(("NumPy's random numbers", sys.modules["numpy.random"].mtrand._rand))
        self._binding("Python's random numbers", random.getstate, random.setstate)
        while left and len(self._seen) < MOST:
            label, x = left.pop()
            if type(x) in _LEAVES or id(x) in self._seen:
                continue
            self._seen[id(x)] = x
            left += self._inside(label, x)

    def undo(self) -> str | None:
        """Puts everything back as it was.  Returns what had changed, or None."""
        found = None
        for state in self._states:
            now = state.read()
            if not state.same(now, state.before):
                state.write(state.before)
                found = found or state.label
        for cache, misses in self._caches:  # what a cache keeps is made again
            if cache.cache_info().misses != misses:
                cache.cache_clear()
        return found

    # -- what is written down --------------------------------------------------------------------------------------

    def _binding(
        self,
        label: str,
        read: Callable[[], Any],
        write: Callable[[Any], Any],
        same: Callable[[Any, Any], bool] = lambda a, b: a == b,
    ) -> Any:
        before = read()
        self._states.append(_State(label, read, write, same, before))
        return before

    def _entries(self, label: str, x: dict[Any, Any]) -> None:
        def write(items: Any) -> None:
            x.clear()
            x.update(items)

        self._binding(label, lambda: list(x.items()), write, _same_items)

    def _sequence(self, label: str, x: Any) -> None:
        def write(items: Any) -> None:
            x.clear()
            (x.update if isinstance(x, set) else x.extend)(items)

        self._binding(label, lambda: list(x), write, _same_objects)

    def _attribute(self, label: str, x: Any, name: str) -> Any:
        """An attribute that is kept in a slot or in a class."""

        def read() -> Any:
            own = vars(x) if isinstance(x, type | ModuleType) else None
            if own is not None:
                return own.get(name, _ABSENT)
            try:
                return object.__getattribute__(x, name)
            except AttributeError:
                return _ABSENT

        def write(value: Any) -> None:
            delattr(x, name) if value is _ABSENT else setattr(x, name, value)

        return self._binding(label, read, write, operator.is_)

    # -- the walk --------------------------------------------------------------------------------------------------

    def _inside(self, label: str, x: Any) -> Iterator[tuple[str, Any]]:
        """Writes down what can be changed of an object, and gives what it holds."""
        kind = type(x)
        if isinstance(x, dict):
            self._entries(label, x)
            yield from [(label, v) for v in x.values() if type(v) not in _LEAVES]
        elif isinstance(x, list | deque | set):
            self._sequence(label, x)
            yield from [(label, v) for v in x if type(v) not in _LEAVES]
        elif isinstance(x, tuple | frozenset):
            yield from [(label, v) for v in x]
        elif kind is FunctionType:
            yield from self._function(x)
        elif kind is MethodType:
            yield from (("", x.__func__), ("", x.__self__))
        elif isinstance(x, partial):
            yield from (("", x.func), ("", x.args), ("", x.keywords))
        elif isinstance(x, staticmethod | classmethod):
            yield "", x.__func__
        elif isinstance(x, property | functools.cached_property):
            yield from (("", getattr(x, name, None)) for name in ("fget", "func"))
        elif isinstance(x, functools._lru_cache_wrapper):
            self._caches.append((x, x.cache_info().misses))
            yield "", x.__wrapped__
        elif isinstance(x, random.Random):
            self._binding(label, x.getstate, x.setstate)
        elif kind.__module__.startswith("numpy.random"):
            self._numbers(label, x)
        elif isinstance(x, type):
            yield from self._class(x)
        elif not isinstance(x, ModuleType | CellType):
            yield from self._object(label, x)

    def _numbers(self, label: str, x: Any) -> None:
        """A generator of random numbers of NumPy."""
        bits = getattr(x, "bit_generator", None) or getattr(x, "_bit_generator", None)
        if bits is not None:
            self._binding(label, lambda: bits.state, lambda v: setattr(bits, "state", v), lambda a, b: str(a) == str(b))

    def _function(self, fn: FunctionType) -> Iterator[tuple[str, Any]]:
        if _is_foreign(fn.__module__):
            return
        self._entries(f"an attribute of {fn.__name__}", fn.__dict__)
        yield from (("", v) for v in fn.__dict__.values())
        yield from (("a default", v) for v in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()))
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            yield name, self._binding(name, partial(_content, cell), partial(_fill, cell), operator.is_)
        space = fn.__globals__
        names = {n for code in codes(fn.__code__) for n in code.co_names}
        for name in names:
            found = self._binding(name, partial(space.get, name, _ABSENT), partial(_put, space, name), operator.is_)
            if isinstance(found, ModuleType) and not _is_foreign(found.__name__):
                for own in names & vars(found).keys():
                    yield f"{name}.{own}", self._attribute(f"{name}.{own}", found, own)
            elif found is not _ABSENT:
                yield name, found

    def _class(self, kind: type) -> Iterator[tuple[str, Any]]:
        for base in kind.__mro__:
            if _is_foreign(base.__module__):
                continue
            own = dict(vars(base))

            def write(before: Any, base: type = base) -> None:
                for name in vars(base).keys() - dict(before).keys():
                    delattr(base, name)
                for name, v in before:
                    if vars(base).get(name, _ABSENT) is not v:
                        setattr(base, name, v)

            self._binding(f"the class {base.__name__}", partial(_members, base), write, _same_items)
            yield from ((f"{base.__name__}.{name}", v) for name, v in own.items())

    def _object(self, label: str, x: Any) -> Iterator[tuple[str, Any]]:
        import torch

        if isinstance(x, torch.Tensor):
            if type(x) in (torch.Tensor, torch.nn.Parameter):
                self._binding(label, lambda: x.requires_grad, lambda v: setattr(x, "requires_grad", v))
            return
        kind = type(x)
        if hasattr(x, "original") and _is_foreign(kind.__module__):  # an optimised function
            yield label, x.original
        if _is_foreign(kind.__module__) and not isinstance(x, torch.nn.Module):
            return
        label = f"an attribute of {kind.__name__}"
        own = getattr(x, "__dict__", None)
        if isinstance(own, dict):
            self._entries(label, own)
            yield from ((f"{kind.__name__}.{name}", v) for name, v in own.items())
        for base in kind.__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else tuple(slots):
                if name not in ("__dict__", "__weakref__") and not name.startswith("__"):
                    yield name, self._attribute(label, x, name)
        yield "", kind


@dataclass(frozen=True)
class _State:
    """Something that can change: how it is read and written, when two of its states are the same, and the first."""

    label: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    before: Any


def _members(kind: type) -> list[tuple[str, Any]]:
    return list(vars(kind).items())


def _put(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        del space[name]
    else:
        space[name] = value


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _same_items(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] is y[1] for x, y in zip(a, b, strict=True))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _ABSENT


def _fill(cell: CellType, value: Any) -> None:
    if value is _ABSENT:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN
