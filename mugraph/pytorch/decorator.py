"""`@mg.superoptimize` on PyTorch functions and modules.

The first call with new shapes captures and optimises; later calls with the same element types, devices and shapes (or
with sizes inside a declared range) run the result.  What is not understood runs as it was written, with one warning.

What the function reads besides its arguments is looked up at every call: weights are the live tensors, and another
training flag, plain attribute, closure cell or global number gives another specialisation (`mugraph.pytorch.guards`
lists what is looked at).  Attributes of other objects, what is inside long containers, and effects other than the
result are not followed.  Results are new tensors also where PyTorch would return a view of an argument.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

from mugraph import pipeline, settings
from mugraph.errors import (
    CaptureError,
    FallbackWarning,
    InterruptedWarning,
    LaunchError,
    MugraphError,
    SettingError,
    VerificationError,
    user_location,
)
from mugraph.ir.axes import Dim
from mugraph.pytorch.calls import (
    ANY,
    autocast,
    has_negative,
    is_dynamo_running,
    is_empty,
    is_traced,
    leaf_key,
    outside_state,
    steering,
    transforms,
    uncast,
    unhooked,
    wants_gradients,
)
from mugraph.pytorch.checks import CHANGED, Checks
from mugraph.pytorch.effects import ChangesStateError
from mugraph.pytorch.guards import INTERNAL
from mugraph.pytorch.sizes import Changing, Dims, combinations, from_least, that_hold
from mugraph.result import Result
from mugraph.search.space import space_of

Dynamic = Mapping[str, Mapping[int, Dim]]

# So many specialisations are made; later signatures run as written.  An attribute that counts calls makes one a call.
LIMIT = 64
# A function that so often changed what it reads is not traced again.
MOST_CHANGES = 4
# So many signatures have a short way at a time, and each gets a new one so often.
MOST_READY = 8
MOST_PREPARED = 100
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass
class Specialisation:
    """What runs for one signature: a captured program and its result, or the reason for a fallback.

    `live` gives for each weight of the program its place among the tensors that the guards list, or the tensor itself.
    `compiled`: the original runs through torch.compile, as that was measured to be faster.
    `folds` says that something is computed ahead from weights, which only pays while these stay as they are.
    `prepared` counts how often a shorter way to it was made.  `untold` is a reason that is told after the first call:
    not where the original raises an error of its own.  `again`: the trace changed what the function reads, so that
    once the original has run, which may have filled what is kept from then on, this is `stale` and made anew.
    """

    captured: Any
    result: Result | None
    reason: Exception | None
    live: tuple[Any, ...] = ()
    kept: list[object] = field(default_factory=list, repr=False)
    compiled: bool = False
    prepared: int = 0
    untold: Exception | None = None
    again: bool = False
    stale: bool = False

    @cached_property
    def folds(self) -> bool:
        return self.result is not None and bool(self.result.graph.ahead())

    @property
    def report(self) -> str:
        return str(self.reason) if self.result is None else str(self.result)


@dataclass(frozen=True)
class _Call:
    """The arguments of one call: those by position and those by name only, and all their leaves."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    leaves: list[Any]
    spec: Any

    def filled(self, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other leaves."""
        from torch.utils import _pytree as pytree

        if isinstance(self.spec, int):
            return tuple(leaves), {}
        args, named = pytree.tree_unflatten(leaves, self.spec)
        return args, named


class OptimizedFunction:
    """A PyTorch function or module, superoptimised per signature.

    `specialisations` maps each signature met so far to what runs for it; `report` tells about all of them;
    `original` is the function as it was written.  Other attributes are those of the original, so that
    `fast.parameters()` or `fast.eval()` work on an optimised module.  Copies and pickles start without specialisations.

    Raises, when it is made, SettingError, CaptureError or UnknownTargetError for options that cannot be meant.  A call
    raises what the original raises; with `strict` also the MugraphError that says why it is not optimised.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        *,
        dynamic: Dynamic | Literal[False] | None = None,
        strict: bool = False,
        **options: Any,
    ) -> None:
        if inspect.isclass(original):
            raise SettingError(f"{original.__name__} is a class", remedy="give an instance of it, or a function")
        _check_options(options)
        if not isinstance(strict, bool):
            raise SettingError(f"strict is {strict!r}", remedy="True or False")
        self.original = original
        self.strict = strict
        self.options = options
        self._asked = {"dynamic": dynamic, "strict": strict, **options}
        self.specialisations: dict[object, Specialisation] = {}
        self._attribute = getattr(original, "__name__", "")
        self._lock = threading.RLock()
        self._guards: Any = None
        self._told: set[str] = set()
        self._changes = 0  # how often a trace changed what the function reads
        self._of_classes: WeakKeyDictionary[type, OptimizedFunction] = WeakKeyDictionary()
        self._prepared: tuple[tuple[Specialisation, Callable[..., Any]], ...] = ()
        from mugraph.pytorch.capture import signature_of

        self._signature = signature_of(original)
        kinds = [p.kind for p in self._signature.parameters.values()]
        self._positional = len(kinds) if all(k in _BY_POSITION for k in kinds) else -1  # how many there are, if alone
        self.dynamic = _checked_dynamic(dynamic or None, self._signature)
        self._symbols = {name: from_least(sizes) for name, sizes in self.dynamic.items()}
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self._is_automatic = dynamic is None and not any(k in several for k in kinds)
        self._changing: dict[object, Changing] = {}
        functools.update_wrapper(self, original, updated=())

    # -- as an attribute, a copy, a module ------------------------------------------------------------------------

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """As a method: one optimised function for each instance."""
        if instance is None or not isinstance(self.original, types.FunctionType):
            return self
        bound = types.MethodType(self.original, instance)
        if isinstance(instance, type):  # a class method
            if instance not in self._of_classes:
                self._of_classes[instance] = OptimizedFunction(bound, **self._asked)
            return self._of_classes[instance]
        if not hasattr(instance, "__dict__"):
            return bound  # nowhere to keep what is optimised for this instance
        method = OptimizedFunction(bound, **self._asked)
        instance.__dict__[self._attribute] = method  # found first from now on, and gone with the instance
        return method

    def __set_name__(self, owner: type, name: str) -> None:
        self._attribute = name

    def __getattr__(self, name: str) -> Any:
        if name == "original" or (name.startswith("__") and name.endswith("__") and name != "__code__"):
            raise AttributeError(name)
        return self._given(name)

    def _given(self, name: str) -> Any:
        """An attribute of the original."""
        found = getattr(self.original, name)
        if isinstance(found, types.MethodType) and found.__self__ is self.original:
            return functools.partial(_delegated, self, found)
        return found

    def __setattr__(self, name: str, value: object) -> None:
        """An attribute of a module is set in the module, where it is looked up too."""
        own = self.__dict__
        if name == "__class__":  # as parametrisations do
            raise TypeError("the class of an optimised module stays; change the module before it is optimised")
        if "_changing" in own and name in own and not name.startswith("_"):
            raise AttributeError(f"{name} is the optimised function's own; set it in .original")
        if name in own or not hasattr(own.get("original"), "_parameters") or hasattr(OptimizedFunction, name):
            object.__setattr__(self, name, value)
        elif "_changing" not in own or name.startswith("__"):
            object.__setattr__(self, name, value)  # while this is made
        else:
            setattr(self.original, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            object.__delattr__(self, name)
        else:
            delattr(self.original, name)

    def __reduce__(self) -> Any:
        """By name where it stands in its module or object under its own name; else the original and the options."""
        original = self.original
        if isinstance(original, types.MethodType):
            name, owner = original.__name__, original.__self__
            if getattr(owner, "__dict__", {}).get(name) is self:
                return getattr, (owner, name)
        qualname = getattr(original, "__qualname__", "")
        found: Any = sys.modules.get(getattr(original, "__module__", None) or "")
        for part in qualname.split("."):
            found = getattr(found, part, None)
        if found is self:
            return qualname
        return _made, (original, self._asked)

    # -- what is there --------------------------------------------------------------------------------------------

    @property
    def report(self) -> str:
        """What runs for each signature, and why."""
        return "\n\n".join(s.report for s in self.specialisations.values()) or "not called yet"

    @property
    def result(self) -> Result:
        """The result of the last signature that was optimised.  Raises CaptureError if there is none."""
        found = [s.result for s in self.specialisations.values() if s.result is not None]
        if not found:
            raise CaptureError("nothing is optimised yet", remedy="call the function once, or read .report")
        return found[-1]

    def warmup(self, *args: Any, **named: Any) -> OptimizedFunction:
        """Searches and compiles for calls with such arguments, at all sizes that are declared as dynamic, 1 included,
        so that no later call does; without arguments, compiles for all signatures met so far.  Returns this function.

        Their values do not matter.  Raises TypeError for arguments that the function does not take; with `strict` also
        the MugraphError that says why such calls are not optimised."""
        if args or named:
            call = self._bound(args, named)
            if call is None:
                self._signature.bind(*args, **named)
            elif not is_traced(call.leaves) and not is_empty(call.leaves) and not outside_state(call.leaves):
                for like in self._at_all_sizes(call):
                    self._known(like, self._guard().state())
        for known in list(self.specialisations.values()):
            if not known.again:
                self._tell(known)
            if known.result is not None and not known.result.unchanged:
                known.result.warmup()
        return self

    # -- calls ----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self._prepared and not named and not is_dynamo_running():
            for _, prepared in self._prepared:
                if (found := prepared(args)) is not CHANGED:
                    return found
        return _entry()(self, *args, **named)

    def _call(self, *args: Any, **named: Any) -> Any:
        call = self._bound(args, named)
        if call is not None and is_traced(call.leaves):
            return self._in_trace(*args, **named)
        if call is None or is_empty(call.leaves):
            return self.original(*args, **named)  # Python says what is wrong, or nothing to compute
        if outside := outside_state(call.leaves):
            return self._outside(*outside, args, named)
        state = self._guard().state()
        if state.hooked:
            return self._outside("modules with hooks", "remove the hooks", args, named)
        if is_traced(state.tensors):
            return self.original(*args, **named)
        known = self._known(call, state)
        if known is None and self._changes >= MOST_CHANGES:
            return self.original(*args, **named)  # which was told
        if known is None:
            return self._outside(f"more than {LIMIT} signatures", "declare sizes as dynamic", args, named)
        chosen, sizes = known
        found = self._run(chosen, call.leaves, args, named, state)
        chosen.stale = chosen.again
        if chosen.stale:
            return found
        self._tell(chosen)
        if chosen.prepared < MOST_PREPARED and not named and len(args) == self._positional:
            self._prepare(chosen, args, sizes)
        return found

    def _in_trace(self, *args: Any, **named: Any) -> Any:
        """What torch traces of a call."""
        return self.original(*args, **named)

    def _guard(self) -> Any:
        if self._guards is None:
            from mugraph.pytorch.guards import Guards

            self._guards = Guards(self.original, OptimizedFunction)
        return self._guards

    def _known(self, call: _Call, state: Any) -> tuple[Specialisation, Dims] | None:
        """What runs for a signature, made where it is new, and the symbolic sizes; None where there are too many."""
        import torch

        tensors = list(self._tensors(call))
        declared = {place: self._symbols[name] for place, name, _ in tensors if name in self._symbols}
        given = [(place, x) for place, _, x in tensors]
        frozen = (autocast(), torch.get_default_dtype(), state.frozen())
        changing = None
        if self._is_automatic:
            ranks = {place: dict.fromkeys(range(x.ndim), ANY) for place, x in given}
            changing = self._changing.setdefault((call.spec, leaf_key(call.leaves, ranks), frozen), Changing())
            declared = changing.dims
        sizes = that_hold(given, declared)
        key = (call.spec, leaf_key(call.leaves, sizes), frozen)
        if (chosen := self.specialisations.get(key)) is not None and not chosen.stale:
            return chosen, sizes
        with self._lock:
            sizes = that_hold(
                given, declared if changing is None else changing.dims
            )  # another thread may have been here
            key = (call.spec, leaf_key(call.leaves, sizes), frozen)
            if (chosen := self.specialisations.get(key)) is not None:
                if chosen.stale:
                    self._changes -= 1
                    self.specialisations[key] = chosen = self._specialise(call, sizes, state, last=True)
                return chosen, sizes
            if len(self.specialisations) >= LIMIT or self._changes >= MOST_CHANGES:
                return None
            if changing is not None and (grown := changing.grown(given)) != changing.dims:
                wider = that_hold(given, grown)
                found = self._specialise(call, wider, state, quiet=True)
                if found.reason is None:
                    changing.dims = grown
                    self.specialisations[call.spec, leaf_key(call.leaves, wider), frozen] = found
                    return found, wider
                if not isinstance(found.reason, ChangesStateError):
                    changing.fix(grown)  # the program holds for the size it was captured with alone
            chosen = self.specialisations[key] = self._specialise(call, sizes, state)
        return chosen, sizes

    def _tensors(self, call: _Call) -> Iterator[tuple[int, str, Any]]:
        """The arguments that are tensors: the numbers of their leaves, their names, and they."""
        import torch
        from torch.utils import _pytree as pytree

        place = 0
        for name, x in (*zip(self._signature.parameters, call.args, strict=False), *call.named.items()):
            if isinstance(x, torch.Tensor):
                yield place, name, x
                place += 1
            else:
                place += len(pytree.tree_leaves(x))

    def _at_all_sizes(self, call: _Call) -> Iterator[_Call]:
        """Such calls, of tensors of zeros where a size is another, that together have every signature that declared
        sizes give it."""
        tensors = [(place, x) for place, _, x in self._tensors(call)]
        held = that_hold(tensors, {p: self.dynamic[name] for p, name, _ in self._tensors(call) if name in self.dynamic})
        for values in combinations(tensors, held):
            leaves = list(call.leaves)
            made: dict[tuple[int, tuple[int, ...]], Any] = {}
            for place, own in held.items():
                x = leaves[place]
                shape = tuple(values[own[i].name] if i in own else n for i, n in enumerate(x.shape))
                if shape != x.shape:
                    leaves[place] = made.setdefault((id(x), shape), x.new_zeros(shape))
            args, named = call.filled(leaves)
            yield _Call(args, named, leaves, call.spec) if made else call

    def _prepare(self, chosen: Specialisation, args: tuple[Any, ...], sizes: Dims) -> None:
        """Makes the next call like this one short: a function that compares all that was looked at, object by object,
        and runs what was chosen.  Not for calls that need a gradient, or where indices are to be checked."""
        import torch

        result, captured = chosen.result, chosen.captured
        is_written = result is None or result.unchanged
        if transforms() is not None or (not is_written and captured.natural):
            return
        chosen.prepared += 1
        checks = Checks()
        checks.add(f"{{0}}() is None and len(args) == {len(args)}", torch._C._get_tracing_state)
        first: dict[str, str] = {}  # where the value of a symbolic size is
        for i, x in enumerate(args):
            if type(x) is not torch.Tensor or x.layout is not torch.strided or x.is_neg() or x.is_meta:
                return
            checks.add(f"type(x{i} := args[{i}]) is {{0}}", torch.Tensor)
            if i not in sizes:
                checks.add(f"x{i}.shape == {{0}}", x.shape)
            else:
                checks.add(f"len(s{i} := x{i}.shape) == {x.ndim}")
                for at, n in enumerate(x.shape):
                    if (d := sizes[i].get(at)) is None:
                        checks.add(f"s{i}[{at}] == {n}")
                    elif (known := first.setdefault(d.name, f"s{i}[{at}]")) == f"s{i}[{at}]":
                        checks.add(f"{d.min} <= s{i}[{at}] <= {d.max}")
                    else:
                        checks.add(f"s{i}[{at}] == {known}")
            checks.add(f"x{i}.dtype is {{0}}", x.dtype)
            checks.add(f"x{i}.is_cpu" if x.is_cpu else f"x{i}.device == {{0}}", x.device)
            checks.add(f"x{i}.layout is {{0}}", torch.strided)
            checks.add(f"not x{i}.is_neg()")
            for j in range(i):
                checks.add(f"x{i} is {'' if x is args[j] else 'not '}x{j}")
        checks.add("not {0}()", torch._C._is_any_autocast_enabled)
        checks.add("{0}() is None", torch._C._functorch.peek_interpreter_stack)
        checks.add("{0}() is {1}", torch.get_default_dtype, torch.get_default_dtype())
        state = self._guards.state(checks)
        key = (len(args), leaf_key(args, sizes), (autocast(), torch.get_default_dtype(), state.frozen()))
        if chosen is not self.specialisations.get(key) or state.hooked or autocast() is not None:
            return
        if is_written:
            run, inputs = self._compiled if chosen.compiled else self.original, ["*args"]
        else:
            run, inputs = self._optimised_call(chosen, state, checks, len(args))
        text = f"{checks.name(run)}({', '.join(inputs)})"
        if not is_written and not captured.is_plain:
            text = f"{checks.name(_unflattened)}({checks.name(captured)}, {text})"
        others = tuple(known for known in self._prepared if known[0] is not chosen)
        prepared = checks.function("args", text, once=is_written, through=steering())
        self._prepared = ((chosen, prepared), *others[: MOST_READY - 1])

    def _optimised_call(
        self, chosen: Specialisation, state: Any, checks: Checks, count: int
    ) -> tuple[Callable[..., Any], list[str]]:
        """The function that is called, and its arguments as they are called in the code of the checks."""
        import torch

        result, captured = chosen.result, chosen.captured
        assert result is not None
        weights = [state.tensors[x] if isinstance(x, int) else x for x in chosen.live]
        if result.target.kind != "torch" or captured.detaches or chosen.folds:
            wanting = " or ".join(["False", *(f"x{i}.requires_grad" for i in range(count))])
            if any(x.requires_grad for x in weights):
                wanting = "True"
            checks.add(f"not ({{0}}() and ({wanting}))", torch.is_grad_enabled)
        run = result.executable.run if result.target.kind == "torch" else result
        return run, [*(f"x{i}" for i in captured.arguments), *(checks.name(x) for x in weights)]

    def _run(
        self, chosen: Specialisation, leaves: Sequence[Any], args: tuple[Any, ...], named: dict[str, Any], state: Any
    ) -> Any:
        """What runs for a signature, on the leaves of the arguments."""
        if chosen.result is None or chosen.result.unchanged:  # never slower: PyTorch's own way is what runs
            return self._compiled(*args, **named) if chosen.compiled else self.original(*args, **named)
        weights = [state.tensors[x] if isinstance(x, int) else x for x in chosen.live]
        inputs = [*(leaves[i] for i in chosen.captured.arguments), *weights]
        if chosen.captured.natural and has_negative(inputs[i] for i in chosen.captured.natural):
            return self.original(*args, **named)  # whose error it is to raise
        if wants_gradients(weights) and chosen.folds:
            return self._trained(*args, **named)  # the weights are about to change
        if wants_gradients(inputs) and (chosen.result.target.kind != "torch" or chosen.captured.detaches):
            return self._trained(*args, **named)  # no autograd formula, or gradients that stop in places
        try:
            outputs = chosen.result(*inputs)
        except steering():
            raise
        except Exception as error:
            if self.strict:
                raise
            self._warn(error)
            for key, known in list(self.specialisations.items()):
                if known is chosen:
                    _strip(error)
                    self.specialisations[key] = Specialisation(None, None, error, kept=state.kept)
            return self.original(*args, **named)
        return _unflattened(chosen.captured, outputs)

    def _bound(self, args: tuple[Any, ...], named: dict[str, Any]) -> _Call | None:
        """The arguments in the order of the signature, or None where they do not fit it."""
        import torch

        if not named and len(args) == self._positional and all(type(x) is torch.Tensor for x in args):
            return _Call(args, named, list(args), len(args))
        from torch.utils import _pytree as pytree

        try:
            bound = self._signature.bind(*args, **named)
        except TypeError:
            return None
        bound.apply_defaults()
        args, named = bound.args, bound.kwargs
        if not named and all(isinstance(x, torch.Tensor) for x in args):
            return _Call(args, named, list(args), len(args))
        leaves, spec = pytree.tree_flatten((args, named))
        return _Call(args, named, leaves, spec)

    def _specialise(
        self, call: _Call, sizes: Dims, state: Any, quiet: bool = False, last: bool = False
    ) -> Specialisation:
        """What runs for a signature.  With `quiet` a failure is neither raised nor told, with `last` a change of what
        the function reads is final."""
        from mugraph.pytorch.capture import capture

        options = dict(self.options)
        if options.get("target") is None and not any(getattr(x, "is_cuda", False) for x in call.leaves):
            options["target"] = "torch"
        try:
            self._check_ranks(call)
            args, named, dynamic = self._examples(call, sizes)
            with unhooked():
                captured = capture(
                    self.original,
                    args,
                    dynamic,
                    example_kwargs=named,
                    live=state.tensors,
                    modules=state.modules,
                )
            if options.get("space") is None:  # weights may be written in ways that PyTorch does not count
                space = space_of(settings.effort.get(options.pop("effort", None)))
                options["space"] = space.but(ahead=False)
            with uncast(), unhooked():
                result = self._optimized(call, captured, options)
            if result.interrupted:
                warnings.warn(InterruptedWarning(), stacklevel=_user_level())
        except Exception as error:  # whatever goes wrong here would not go wrong in the original
            if quiet:
                _strip(error)
                return Specialisation(None, None, error)
            again = isinstance(error, ChangesStateError)
            self._changes += again
            again = again and not last and self._changes < MOST_CHANGES
            if self.strict and not again:
                raise
            faster = self._is_faster_compiled(call)
            _strip(error)
            return Specialisation(None, None, error, kept=state.kept, compiled=faster, untold=error, again=again)
        places = {id(x): i for i, x in reversed(list(enumerate(state.tensors)))}
        live = tuple(places.get(id(x), x) for x in captured.constants.values())
        return Specialisation(captured, result, None, live, state.kept, result.unchanged and result.compiled)

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        """The original through torch.compile."""
        import torch

        found: Callable[..., Any] = torch.compile(self.original, dynamic=None if self.dynamic else False)
        return found

    @cached_property
    def _trained(self) -> Callable[..., Any]:
        """The original where gradients are wanted: its forward and its backward pass are optimised apart."""
        import torch

        from mugraph.pytorch.backend import mugraph

        found: Callable[..., Any] = torch.compile(
            self.original,
            backend=functools.partial(mugraph, options=self.options),
            dynamic=None if self.dynamic else False,
        )
        return found

    def _optimized(self, call: _Call, captured: Any, options: dict[str, Any]) -> Result:
        """The result for a captured program; where it is tuned, the original is measured as the program as it
        stands."""
        if settings.tune.get(options.get("tune")) != "measure":
            return pipeline.optimize(captured.program, **options)

        def taking(run: Callable[..., Any]) -> Callable[..., Any]:
            def on(*inputs: Any) -> Any:
                leaves = list(call.leaves)
                for place, x in zip(captured.arguments, inputs, strict=False):  # weights are the live ones
                    leaves[place] = x
                args, named = call.filled(leaves)
                return run(*args, **named)

            return on

        written = pipeline.Written(taking(self.original), taking(self._compiled), _code_digest(self.original))
        return pipeline.optimize_beside(captured.program, written, **options)

    def _is_faster_compiled(self, call: _Call) -> bool:
        """For a call that could not be captured: whether the original is faster through torch.compile, where that is to
        be measured."""
        if settings.tune.get(self.options.get("tune")) != "measure" or any(
            getattr(x, "is_cuda", False) for x in call.leaves
        ):
            return False
        import torch

        from mugraph.runtime.choose import Candidate, choose

        forms = {"eager": self.original, "compiled": self._compiled}
        candidates = [
            Candidate(name, functools.partial(_called, f, call.named), written=True) for name, f in forms.items()
        ]
        try:
            with torch.no_grad():
                return choose(candidates, call.args).chosen == "compiled"
        except MugraphError:
            return False  # the call itself will say why

    def _check_ranks(self, call: _Call) -> None:
        for name, x in (*zip(self._signature.parameters, call.args, strict=False), *call.named.items()):
            rank = getattr(x, "ndim", 0)
            for i in self.dynamic.get(name, {}):
                if i >= rank:
                    raise CaptureError(f"dynamic names dimension {i} of {name}, which has {rank} dimensions")

    def _examples(self, call: _Call, sizes: Dims) -> tuple[tuple[Any, ...], dict[str, Any], Dynamic]:
        """The arguments, and dynamic sizes by the names of arguments."""
        names = {place: name for place, name, _ in self._tensors(call)}
        return call.args, call.named, {names[place]: own for place, own in sizes.items()}

    def _outside(self, what: str, remedy: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        if self.strict:
            raise LaunchError(f"{what} are not supported", remedy=remedy)
        if what not in self._told:
            self._told.add(what)
            self._warn(LaunchError(f"{what} are not supported", remedy=remedy))
        return self.original(*args, **named)

    def _tell(self, chosen: Specialisation) -> None:
        if (reason := chosen.untold) is not None:
            chosen.untold = None
            self._warn(reason)

    def _warn(self, error: Exception) -> None:
        name = getattr(self.original, "__name__", type(self.original).__name__)
        text = str(error) if isinstance(error, MugraphError) else f"{type(error).__name__}: {error}"
        if isinstance(error, VerificationError):
            text = f"a check refused the result: {text}"
        warnings.warn(FallbackWarning(f"{name} runs as it was written: {text}"), stacklevel=_user_level())


def _strip(error: BaseException | None) -> None:
    """Leaves an error without what keeps its frames, and the arguments in them, alive."""
    while error is not None:
        behind = error.__cause__ or error.__context__
        error.__cause__ = error.__context__ = error.__traceback__ = None
        error = behind


def _unflattened(captured: Any, outputs: Any) -> Any:
    return captured.unflatten(outputs if isinstance(outputs, tuple) else (outputs,))


def _called(f: Callable[..., Any], named: Mapping[str, Any], *args: Any) -> Any:
    return f(*args, **named)


def _code_digest(f: Callable[..., Any]) -> str:
    """What tells one function's code from another's, as far as its own lines go; the numbers measured for one are not
    those of the other."""
    code = getattr(inspect.unwrap(getattr(f, "forward", f)), "__code__", None)
    if code is None:
        return f"{type(f).__module__}.{type(f).__qualname__}"
    constants = [c.co_code.hex() if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    text = f"{code.co_code.hex()} {code.co_names} {constants}"
    return hashlib.sha256(text.encode()).hexdigest()


def optimized(original: Callable[..., Any], **options: Any) -> OptimizedFunction:
    """The optimised function for a function or a module; that for a module is a module too.  What is optimised already
    is optimised again with these options, from how it was written."""
    if isinstance(original, OptimizedFunction):
        original = original.original
    if "torch" in sys.modules:  # else there is no module
        import torch

        if isinstance(original, torch.nn.Module):
            kind: Any = type(original)
            made: OptimizedFunction = _module_class(kind)(original, **options)
            made.__dict__.update({name: x for name, x in vars(original).items() if name in INTERNAL and x is not None})
            return made
    return OptimizedFunction(original, **options)


def _made(original: Any, options: Mapping[str, Any]) -> OptimizedFunction:
    return optimized(original, **options)


class _Given:
    """An attribute of a module's class, as the module has it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: OptimizedFunction | None, owner: type | None = None) -> Any:
        return self if instance is None else instance._given(self.name)


# What copying and pickling ask for, which is answered for the optimised module and not for the module in it.
_COPIED = {"__init__", "__new__", "__getstate__", "__setstate__", "__reduce_ex__", "__deepcopy__", "__copy__"}


@functools.cache
def _module_class(kind: Any) -> Any:
    """The class of optimised modules of one class.

    They are instances of `nn.Module`, so that they stand wherever modules do.  What PyTorch gives every module works on
    the tables of the original, which their attributes are; what the module's own class gives is asked of the original,
    its length and its items too.
    """
    import torch

    found = {name: x for base in reversed(kind.__mro__) if base not in torch.nn.Module.__mro__
             for name, x in vars(base).items()}  # fmt: skip
    own = {*vars(OptimizedFunction), *_COPIED}
    given = [
        name
        for name, x in found.items()
        if name not in own and (not name.startswith("__") or isinstance(x, types.FunctionType))
    ]

    def in_trace(self: Any, *args: Any, **named: Any) -> Any:
        """The call of a module by the name that torch.fx knows it by, and as torch.fx patches it."""
        return torch.nn.Module.__call__(self, *args, **named)

    members = {**{name: _Given(name) for name in given}, "_in_trace": in_trace}
    return type(f"Optimized{kind.__name__}", (OptimizedFunction, torch.nn.Module), members)


def _delegated(wrapper: OptimizedFunction, method: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What a method of the original gives; the wrapper where it gives the original itself, as `.eval()` does."""
    found = method(*args, **named)
    return wrapper if found is wrapper.original else found


def _user_level() -> int:
    """The stack level, as `warnings.warn` in the caller counts it, of the innermost line that is the user's."""
    place = user_location()
    frame, level = sys._getframe(1), 1
    while place is not None and frame.f_back is not None:
        inside = frame.f_globals.get("__name__", "").partition(".")[0]
        if inside not in ("mugraph", "torch"):
            break
        frame, level = frame.f_back, level + 1
    return level


# -- options


def _check_options(options: Mapping[str, Any]) -> None:
    known = [n for n, p in inspect.signature(pipeline.optimize).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := [n for n in options if n not in known]:
        listed = ", ".join((*known, "dynamic", "strict"))
        raise SettingError(f"superoptimize has no option {unknown[0]!r}", remedy=f"known: {listed}")
    pipeline.checked_options(**options)


def _checked_dynamic(dynamic: Any, signature: inspect.Signature) -> dict[str, dict[int, Dim]]:
    """`dynamic` with plain dictionaries.  Raises CaptureError where it does not fit the signature."""
    form = 'give {"x": {0: mg.Dim("rows", 1, 256)}}'
    if not isinstance(dynamic, Mapping | None):
        raise CaptureError(f"dynamic is {dynamic!r}", remedy=form)
    single = [n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    found: dict[str, dict[int, Dim]] = {}
    for name, sizes in (dynamic or {}).items():
        if name not in single:
            raise CaptureError(f"dynamic names {name!r}, which is no argument", remedy=f"known: {', '.join(single)}")
        if not isinstance(sizes, Mapping):
            raise CaptureError(f"dynamic gives {sizes!r} for {name}", remedy=form)
        for i, d in sizes.items():
            if type(i) is not int or i < 0:
                raise CaptureError(f"dynamic names dimension {i!r} of {name}", remedy="dimensions count from 0")
            if not isinstance(d, Dim):
                raise CaptureError(f"dynamic gives {d!r} for dimension {i} of {name}", remedy=form)
        found[name] = dict(sizes)
    return found


# -- calls that torch.compile leaves alone


@functools.cache
def _undynamoed() -> Any:
    """`OptimizedFunction._call`, which torch.compile leaves alone."""
    import torch

    return torch.compiler.disable(OptimizedFunction._call)  # type: ignore[no-untyped-call, unused-ignore]


def _entry() -> Any:
    """How a call goes on.  Without TorchDynamo loaded, which takes seconds, nothing can be compiling."""
    return _undynamoed() if "torch._dynamo" in sys.modules else OptimizedFunction._call


OptimizedFunction.__call__._torchdynamo_disable = True  # type: ignore[attr-defined]
_entry._torchdynamo_disable = True  # type: ignore[attr-defined]


pipeline.FRONTENDS.append(optimized)
