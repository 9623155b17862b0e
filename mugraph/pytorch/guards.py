"""What a PyTorch function reads besides its arguments, looked at before every call.

A captured program holds for the state it was captured in: training flags, plain attributes, numbers in closures and
globals.  `Guards.state` gives that state as a key, and the tensors the function reads as they are now.  Two states with
the same key list their tensors in the same order, so a place in that list stands for a tensor's name.

Looked at are: for modules every submodule's identity, class, plain attributes (numbers, strings, None, tensors) and
parameters; for functions the closure cells and the globals that the code names, through functions it calls; for methods
the instance's attributes.  Tensors count by element type, shape, device, need of a gradient and which are the same;
tuples, lists and dictionaries of at most 32 entries by what is in them, other objects by identity.  Attributes of such
objects, and what is inside other containers, are not looked at.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mugraph.pytorch.checks import Checks

_PLAIN: frozenset[type] = frozenset({int, bool, str, bytes, complex, type(None)})
_READ = _PLAIN | {float}
_ABSENT = object()

# Longer containers count by identity.
LONG = 32

# Attributes of every nn.Module that PyTorch keeps for itself; parameters, buffers, submodules and hooks have own rules.
INTERNAL = frozenset(
    {
        "_parameters",
        "_buffers",
        "_modules",
        "_non_persistent_buffers_set",
        "_backward_pre_hooks",
        "_backward_hooks",
        "_is_full_backward_hook",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
        "_compiled_call_impl",
        "_is_torch_compile",
    }
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class State:
    """A state of what a function reads.

    `key` compares it, `tensors` are the live ones in the key's order, `kept` holds the objects that count by identity,
    `modules` the modules that were met, `hooked` says that one has hooks.  `checks`, if it is there, collects
    comparisons that hold as long as the key stays.
    """

    key: list[object] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    modules: list[Any] = field(default_factory=list)
    hooked: bool = False
    seen: dict[int, int] = field(default_factory=dict)
    checks: Checks | None = None

    def check(self, text: str, *objects: Any) -> None:
        if self.checks is not None:
            self.checks.add(text, *objects)

    def frozen(self) -> tuple[object, ...]:
        """The key, with the places of tensors that are the same object: two tied weights may come apart."""
        places: dict[int, int] = {}
        first = [places.setdefault(id(x), i) for i, x in enumerate(self.tensors)]
        return (*self.key, None if len(places) == len(first) else tuple(first))


@dataclass(frozen=True)
class _ClassPlan:
    """The functions of a class, the names of attributes that they read, and the classes that are not PyTorch's own."""

    functions: tuple[types.FunctionType, ...]
    attributes: tuple[str, ...]
    bases: tuple[type, ...]
    held: tuple[tuple[type, str, Any], ...]  # where the functions are kept, and as what


class Guards:
    """Looks at what `root`, a function, method or module, reads besides its arguments.

    `wrapper` is the class of optimised functions, which count as their `original`.
    """

    def __init__(self, root: Callable[..., Any], wrapper: type[Any]) -> None:
        import torch

        self.root = root
        self._wrapper = wrapper
        self._rules: dict[type, Callable[[Any, State], None]] = {}
        self._tensor = torch.Tensor
        self._lazy = (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer)
        self._held: tuple[type, ...] = (*_READ, tuple, list, dict, torch.Tensor)  # what a class holds for its functions
        self._module_type = torch.nn.Module
        self._module_file: Any = torch.nn.modules.module
        self._classes: dict[type, _ClassPlan] = {}
        self._names: dict[int, tuple[types.CodeType, tuple[str, ...]]] = {}

    def state(self, checks: Checks | None = None) -> State:
        """The present state."""
        found = State(checks=checks)
        if hasattr(self.root, "__dict__") and self._rule(type(self.root)) == self._identity:
            self._owner(self.root, found)  # an object that is called
        else:
            self._value(self.root, found)
        if found.modules:
            found.hooked = found.hooked or bool(self._module_file._has_any_global_hook())
            found.check("not {0}()", self._module_file._has_any_global_hook)
        return found

    def _value(self, x: Any, s: State) -> None:
        kind = type(x)
        if kind in _PLAIN:
            s.key += (kind, x)
            return
        if id(x) in s.seen:
            s.key.append(s.seen[id(x)])
            return
        rule = self._rules.get(kind)
        if rule is None:
            rule = self._rules[kind] = self._rule(kind)
        rule(x, s)

    def _rule(self, kind: type) -> Callable[[Any, State], None]:
        """How values of a class are looked at."""
        if issubclass(kind, self._lazy):
            return self._unmade
        if issubclass(kind, self._tensor):
            return self._live
        if issubclass(kind, self._wrapper):  # before modules, as some are
            return self._optimised
        if issubclass(kind, self._module_type):
            return self._module
        exact: dict[type, Callable[[Any, State], None]] = {
            float: self._float,
            types.FunctionType: self._function,
            types.MethodType: self._method,
            functools.partial: self._partial,
            tuple: self._items,
            list: self._items,
            dict: self._items,
        }
        return exact.get(kind, self._identity)

    def _float(self, x: float, s: State) -> None:
        s.key += (float, x.hex())  # tells 0.0 from -0.0, and NaN is itself

    def _unmade(self, x: Any, s: State) -> None:
        """A parameter without a shape, which a hook of its module makes in the first call."""
        self._identity(x, s)
        s.hooked = True

    def _live(self, x: Any, s: State) -> None:
        s.key += (type(x), x.dtype, x.shape, x.device, x.requires_grad)
        s.tensors.append(x)
        s.check("{0}.requires_grad is {1}", x, x.requires_grad)
        s.check("{0}.dtype is {1}", x, x.dtype)
        s.check("{0}.shape == {1}", x, x.shape)
        s.check("{0}.is_cpu" if x.is_cpu else "{0}.device == {1}", x, x.device)

    def _optimised(self, x: Any, s: State) -> None:
        """An optimised function in another."""
        self._enter(x, s)
        s.check("{0}.original is {1}", x, x.original)
        self._value(x.original, s)

    def _method(self, x: types.MethodType, s: State) -> None:
        self._value(x.__func__, s)
        self._owner(x.__self__, s)

    def _partial(self, x: functools.partial[Any], s: State) -> None:
        self._value(x.func, s)
        self._items(x.args, s)
        self._items(x.keywords, s)

    def _items(self, x: Any, s: State) -> None:
        """What a short container holds; torch.export puts copies of containers in the place of a module's own."""
        if len(x) > LONG:
            self._identity(x, s)
            return
        if not isinstance(x, tuple):  # which cannot hold itself
            s.seen[id(x)] = -len(s.seen) - 1
            s.kept.append(x)
        s.key += (type(x), len(x))
        if isinstance(x, dict):
            s.check("tuple({0}) == {1}", x, tuple(x))
            for k, v in x.items():
                s.check("{0}[{1}] is {2}", x, k, v)
                self._value(k, s)
                self._value(v, s)
            return
        s.check(f"len({{0}}) == {len(x)}", x)
        for i, v in enumerate(x):
            s.check(f"{{0}}[{i}] is {{1}}", x, v)
            self._value(v, s)

    def _identity(self, x: object, s: State) -> None:
        s.key.append(id(x))
        s.kept.append(x)

    def _enter(self, x: object, s: State) -> None:
        s.seen[id(x)] = -len(s.seen) - 1
        self._identity(x, s)

    def _function(self, fn: types.FunctionType, s: State) -> None:
        self._enter(fn, s)
        s.key.append(id(fn.__code__))
        s.kept.append(fn.__code__)
        s.check("{0}.__code__ is {1}", fn, fn.__code__)
        if _is_torch(fn.__module__):
            return
        for cell in fn.__closure__ or ():
            inside = _inside(cell)
            s.check("{0}({1}) is {2}" if inside is _ABSENT else "{1}.cell_contents is {2}", _inside, cell, inside)
            self._value(inside, s)
        s.check("{0}.__defaults__ is {1}", fn, fn.__defaults__)
        s.check("{0}.__kwdefaults__ is {1}", fn, fn.__kwdefaults__)
        for name, v in (fn.__kwdefaults__ or {}).items():
            s.check(f"{{0}}[{name!r}] is {{1}}", fn.__kwdefaults__, v)
        for v in (*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()):
            self._value(v, s)
        space = fn.__globals__
        for name in self._globals_of(fn.__code__):
            v = space.get(name, _ABSENT)
            s.check(f"{name!r} not in {{0}}" if v is _ABSENT else f"{{0}}[{name!r}] is {{1}}", space, v)
            self._value(v, s)

    def _globals_of(self, code: types.CodeType) -> tuple[str, ...]:
        known = self._names.get(id(code))
        if known is None:
            known = self._names[id(code)] = code, tuple(sorted(set(_global_names(code))))
        return known[1]

    def _owner(self, x: Any, s: State) -> None:
        """What a method is bound to: a module, or an object whose attributes count as a module's do."""
        if isinstance(x, self._module_type) or id(x) in s.seen:
            self._value(x, s)
            return
        self._enter(x, s)
        own = getattr(x, "__dict__", {})
        if own:
            s.check("{0}.__dict__ is {1}", x, own)
        s.check("{0}.__class__ is {1}", x, type(x))
        s.check(f"len({{0}}) == {len(own)}", own)
        for name, v in own.items():
            s.key.append(name)
            s.check(f"{{0}}[{name!r}] is {{1}}", own, v)
            self._value(v, s)
        self._class(type(x), own, s)

    def _module(self, m: Any, s: State) -> None:
        self._enter(m, s)
        s.modules.append(m)
        own = m.__dict__
        for table in _HOOKS:
            if own.get(table):
                s.hooked = True
            s.check(f"not {{0}}[{table!r}]" if table in own else f"{table!r} not in {{0}}", own)
        s.key.append(type(m))
        s.check("{0}.__class__ is {1}", m, type(m))
        s.check(f"len({{0}}) == {len(own)}", own)
        for name, v in own.items():
            if name in INTERNAL:
                continue
            s.key.append(name)
            s.check(f"{{0}}[{name!r}] is {{1}}", own, v)
            self._value(v, s)
        for table in ("_parameters", "_buffers", "_modules"):
            held = own[table]
            s.check(f"{{0}}[{table!r}] is {{1}}", own, held)
            if table == "_modules" and len(held) > 1:  # these may be run in their order
                s.check("tuple({0}) == {1}", held, tuple(held))
            else:
                s.check(f"len({{0}}) == {len(held)}" if held else "not {0}", held)
            for name, v in held.items():
                s.key.append(name)
                s.check(f"{{0}}[{name!r}] is {{1}}", held, v)
                self._value(v, s)
        self._class(type(m), own, s)

    def _class(self, kind: type, own: dict[str, Any], s: State) -> None:
        """The functions of a class, and its plain attributes that they read."""
        plan = self._classes.get(kind)
        if plan is None or any(vars(base).get(name) is not v for base, name, v in plan.held):
            plan = self._classes[kind] = _class_plan(kind)
        for base, name, v in plan.held:
            s.check(f"{{0}}.get({name!r}) is {{1}}", vars(base), v)
        for fn in plan.functions:
            self._value(fn, s)
        for base in plan.bases:
            s.check(f"len({{0}}) == {len(vars(base))}", vars(base))
            for name in plan.attributes:
                if name in vars(base):
                    s.check("{0}[{1}] is {2}", vars(base), name, vars(base)[name])
        for name in plan.attributes:
            if name not in own and isinstance(v := getattr(kind, name, _ABSENT), self._held):
                s.check(f"{{0}}.{name} is {{1}}", kind, v)
                s.key.append(name)
                self._value(v, s)


def _inside(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _ABSENT


def _is_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"


def _class_plan(kind: type) -> _ClassPlan:
    functions: list[types.FunctionType] = []
    held: list[tuple[type, str, Any]] = []
    bases = tuple(base for base in kind.__mro__ if base is not object and not _is_torch(base.__module__))
    for base in bases:
        for name, kept in vars(base).items():
            v = kept.fget if isinstance(kept, property) else getattr(kept, "original", getattr(kept, "__func__", kept))
            if isinstance(v, types.FunctionType):
                functions.append(v)
                held.append((base, name, kept))
    names = {n for fn in functions for code in codes(fn.__code__) for n in code.co_names}
    return _ClassPlan(tuple(functions), tuple(sorted(names)), bases, tuple(held))


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and the codes nested in it."""
    yield code
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from codes(c)


def _global_names(code: types.CodeType) -> Iterator[str]:
    for c in codes(code):
        for step in dis.get_instructions(c):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval is not None:
                yield step.argval
