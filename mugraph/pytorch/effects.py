"""What a function changes besides its result, while torch traces it: found, and put back as it was.

torch.export runs a function's own Python with tensors that have no values.  A counter would count that run, and a list,
a cache or an attribute would keep such a tensor.  So all that the function can reach is written down before the run and
compared after it: what it is bound to, what it names, and from there attributes and entries, of classes too.  Objects
of Python's library, of PyTorch and of NumPy are left out, but for those that hold something; iterators cannot be put
back.  Everything is read and written by the methods of the basic types, so that no code of the user's runs.
"""

from __future__ import annotations

import functools
import gc
import operator
import random
import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

from mugraph.errors import CaptureError
from mugraph.pytorch.guards import codes

# So many objects are looked at, and arrays of so many bytes.
MOST = 1_000_000
MOST_BYTES = 2**20
_ABSENT = object()
_LEAVES = frozenset({int, float, complex, bool, str, bytes, type(None), range, slice, CodeType})
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "torchgen", "numpy", "mugraph", "triton", "sympy"})
# Where the classes are whose objects hold others, though they are not the user's.
_HOLDING = ("types", "collections", "weakref", "_thread", "torch.optim")


class ChangesStateError(CaptureError):
    """The function changes what it reads.  A second run may not, where the first filled a cache."""


@contextmanager
def undone(root: Any) -> Iterator[None]:
    """Undoes what the block changes of all that `root` can reach.  Raises ChangesStateError where there was something
    to undo, CaptureError where `root` reaches more than is looked at."""
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
    _caches: list[tuple[Any, Any]] = field(default_factory=list)
    _seen: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        left = deque([("", self.root)])
        self._random("Python's random numbers", random.getstate, random.setstate)
        if "numpy.random" in sys.modules:
            left.append(("NumPy's random numbers", sys.modules["numpy.random"].mtrand._rand))
        while left:
            label, x = left.popleft()
            if type(x) in _LEAVES or id(x) in self._seen:
                continue
            if len(self._seen) >= MOST:
                raise CaptureError(f"the function reaches more than {MOST:,} objects", remedy="give it less to hold")
            self._seen[id(x)] = x
            left += self._inside(label, x)

    def undo(self) -> str | None:
        """Puts everything back as it was.  Returns what had changed, or None."""
        found = None
        for state in self._states:
            now = state.read()
            if not state.same(now, state.before):
                found = found or state.label
                try:
                    state.write(state.before)
                except Exception:  # what is immutable to Python too; the others are put back
                    found = f"{state.label}, which cannot be put back"
        for cache, before in self._caches:  # single entries cannot be taken out
            if cache.cache_info().misses == before.misses:
                continue
            found = found or f"the cache of {getattr(cache, '__name__', 'a function')}"
            if before.currsize == 0 or any(map(_is_fake, _values(cache))):
                cache.cache_clear()
        return found

    # -- what is written down --------------------------------------------------------------------------------------

    def _binding(
        self,
        label: str,
        read: Callable[[], Any],
        write: Callable[[Any], Any],
        same: Callable[[Any, Any], bool] = operator.eq,
    ) -> Any:
        before = read()
        self._states.append(_State(label, read, write, same, before))
        return before

    def _random(self, label: str, read: Callable[[], Any], write: Callable[[Any], Any]) -> None:
        """The state of random numbers, which are not drawn twice where another thread may have drawn them."""

        def put_back(state: Any) -> None:
            if all(t.daemon for t in threading.enumerate() if t is not threading.current_thread()):
                write(state)

        self._binding(label, read, put_back, lambda a, b: str(a) == str(b))

    def _entries(self, label: str, x: Any) -> None:
        kind: Any = OrderedDict if issubclass(type(x), OrderedDict) else dict

        def write(items: Any) -> None:
            kind.clear(x)
            for key, value in items:
                kind.__setitem__(x, key, value)

        self._binding(label, lambda: list(kind.items(x)), write, _same_items)

    def _sequence(self, label: str, x: Any) -> None:
        kind: Any = next(base for base in (list, deque, set) if issubclass(type(x), base))

        def write(items: Any) -> None:
            kind.clear(x)
            (kind.update if kind is set else kind.extend)(x, items)

        self._binding(label, lambda: list(kind.__iter__(x)), write, _same_objects)

    # -- the walk --------------------------------------------------------------------------------------------------

    def _inside(self, label: str, x: Any) -> Iterator[tuple[str, Any]]:
        """Writes down what can be changed of an object, and gives what it holds."""
        kind: Any = type(x)
        if issubclass(kind, dict):
            self._entries(label, x)
            yield from [(label, v) for v in dict.values(x) if type(v) not in _LEAVES]
        elif issubclass(kind, list | deque | set):
            self._sequence(label, x)
            yield from [(label, v) for v in self._states[-1].before if type(v) not in _LEAVES]
        elif issubclass(kind, tuple | frozenset):
            base: Any = tuple if issubclass(kind, tuple) else frozenset
            yield from [(label, v) for v in base.__iter__(x) if type(v) not in _LEAVES]
        elif kind is FunctionType:
            yield from self._function(x)
        elif kind is MethodType:
            yield from (("", x.__func__), ("", x.__self__))
        elif kind is BuiltinFunctionType:
            if not isinstance(x.__self__, ModuleType | None):  # `kept.append`
                yield label, x.__self__
        elif kind is partial:
            yield from (("", x.func), ("", x.args), ("", x.keywords))
        elif kind in (staticmethod, classmethod):
            yield "", x.__func__
        elif kind in (property, functools.cached_property):
            yield from (("", getattr(x, name, None)) for name in ("fget", "func"))
        elif kind is functools._lru_cache_wrapper:
            self._caches.append((x, x.cache_info()))
            yield "", x.__wrapped__
            yield from ((label, v) for v in _values(x))
        elif kind is random.Random:
            self._random(label, x.getstate, x.setstate)
        elif kind.__name__ == "Generator" and kind.__module__.startswith("torch"):
            self._random(label, partial(_seeded, x), partial(_seed, x))
        elif kind.__module__.startswith("numpy.random"):
            self._numbers(label, x)
        elif kind in (bytearray, array) or (kind.__module__ == "numpy" and kind.__name__ == "ndarray"):
            self._array(label, x)
        elif kind is ContextVar:
            yield label, self._binding(label, partial(_got, x), partial(_set, x), operator.is_)
        elif issubclass(kind, type):
            yield from self._class(x)
        elif issubclass(kind, ModuleType):
            return
        elif kind is not CellType:
            yield from self._object(label, x)

    def _array(self, label: str, x: Any) -> None:
        if isinstance(x, bytearray | array):
            self._binding(label, lambda: x[:], partial(x.__setitem__, slice(None)))
        elif x.nbytes <= MOST_BYTES and x.flags.writeable and not x.dtype.hasobject:
            self._binding(label, x.copy, partial(x.__setitem__, ...), lambda a, b: a.tobytes() == b.tobytes())

    def _numbers(self, label: str, x: Any) -> None:
        """A generator of random numbers of NumPy."""
        bits = getattr(x, "bit_generator", None) or getattr(x, "_bit_generator", None)
        if bits is not None:
            self._random(label, lambda: bits.state, lambda v: setattr(bits, "state", v))

    def _function(self, fn: FunctionType) -> Iterator[tuple[str, Any]]:
        if _is_foreign(fn.__module__):
            return
        self._entries(f"an attribute of {fn.__name__}", fn.__dict__)
        yield from (("", v) for v in fn.__dict__.values())
        yield from (("a default", v) for v in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()))
        space = fn.__globals__
        names = {n for code in codes(fn.__code__) for n in code.co_names}
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            found = self._binding(name, partial(_content, cell), partial(_fill, cell), operator.is_)
            yield from self._named(name, found, names)
        if "globals" in names:
            self._entries("a global", space)
        for name in names:
            found = self._binding(name, partial(space.get, name, _ABSENT), partial(_put, space, name), operator.is_)
            yield from self._named(name, sys.modules.get(name) if found is _ABSENT else found, names)

    def _named(self, name: str, x: Any, names: set[str]) -> Iterator[tuple[str, Any]]:
        """What code with these names reaches by one of them: of a module what the code names too."""
        if not isinstance(x, ModuleType):
            yield name, x
        elif not _is_foreign(x.__name__):
            space = vars(x)
            for own in names & space.keys():
                inner = self._binding(
                    f"{name}.{own}", partial(space.get, own, _ABSENT), partial(_put, space, own), operator.is_
                )
                if inner is not x:
                    yield from self._named(f"{name}.{own}", inner, names - {own})

    def _class(self, kind: type) -> Iterator[tuple[str, Any]]:
        for base in type.mro(kind) if kind is not type else ():
            if _is_foreign(base.__module__):
                continue
            own = dict(vars(base))

            def write(before: Any, base: type = base) -> None:
                for name in vars(base).keys() - dict(before).keys():
                    type.__delattr__(base, name)
                for name, v in before:
                    if vars(base).get(name, _ABSENT) is not v:
                        type.__setattr__(base, name, v)

            self._binding(f"the class {base.__name__}", partial(_members, base), write, _same_items)
            yield from ((f"{base.__name__}.{name}", v) for name, v in own.items())
        yield "", type(kind)

    def _object(self, label: str, x: Any) -> Iterator[tuple[str, Any]]:
        import torch

        kind = type(x)
        is_tensor = issubclass(kind, torch.Tensor)
        if is_tensor and kind not in (torch.Tensor, torch.nn.Parameter):
            return
        if kind.__module__.startswith("mugraph"):  # an optimised function
            yield label, _dictionary(x).get("original")
            return
        if is_tensor:
            self._binding(label, lambda: x.requires_grad, lambda v: setattr(x, "requires_grad", v))
        elif (
            _is_foreign(kind.__module__)
            and not kind.__module__.startswith(_HOLDING)
            and not issubclass(kind, torch.nn.Module)
        ):
            return
        label = f"an attribute of {kind.__name__}"
        own = _dictionary(x)
        self._entries(label, own)
        yield from ((f"{kind.__name__}.{name}", v) for name, v in own.items())
        for base in kind.__mro__:
            for name, slot in vars(base).items():
                if type(slot) is MemberDescriptorType and not _is_foreign(base.__module__):
                    yield name, self._binding(label, partial(_read, slot, x), partial(_write, slot, x), operator.is_)
        yield "", kind


@dataclass(frozen=True)
class _State:
    """Something that can change: how it is read and written, when two of its states are the same, and the first."""

    label: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    same: Callable[[Any, Any], bool]
    before: Any


def _dictionary(x: Any) -> dict[str, Any]:
    try:
        found = x.__dict__ if issubclass(type(x), threading.local) else object.__getattribute__(x, "__dict__")
    except AttributeError:
        return {}
    return found if type(found) is dict else {}


def _values(cache: Any) -> list[Any]:
    """What functools.lru_cache keeps: it refers to its results, or to a dictionary of them where it has no limit."""
    found: list[Any] = []
    for x in gc.get_referents(cache):
        found += [x] if type(x) is not dict else [v for v in x.values() if type(v).__module__ != "functools"]
    return found


def _is_fake(x: Any) -> bool:
    """Whether it is a tensor without values, or holds one."""
    from torch._subclasses.fake_tensor import FakeTensor

    held = x if isinstance(x, tuple | list) else [*x.values()] if type(x) is dict else [*_dictionary(x).values()]
    return any(isinstance(y, FakeTensor) for y in (x, *held))


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _same_items(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x[0] is y[0] and x[1] is y[1] for x, y in zip(a, b, strict=True))


def _members(kind: type) -> list[tuple[str, Any]]:
    return list(vars(kind).items())


def _put(space: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        del space[name]
    else:
        space[name] = value


def _read(slot: MemberDescriptorType, x: Any) -> Any:
    try:
        return slot.__get__(x)
    except AttributeError:
        return _ABSENT


def _write(slot: MemberDescriptorType, x: Any, value: Any) -> None:
    if value is _ABSENT:
        slot.__delete__(x)
    else:
        slot.__set__(x, value)


def _got(variable: ContextVar[Any]) -> Any:
    try:
        return variable.get()
    except LookupError:
        return _ABSENT


def _set(variable: ContextVar[Any], value: Any) -> None:
    if value is _ABSENT:
        raise ValueError("a context variable cannot be taken back")
    variable.set(value)


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


def _seeded(generator: Any) -> Any:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():  # they would give a tensor without values
        return generator.get_state().tolist()


def _seed(generator: Any, state: Any) -> None:
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        generator.set_state(torch.tensor(state, dtype=torch.uint8))


def _is_foreign(module: str | None) -> bool:
    return (module or "").partition(".")[0] in _FOREIGN
