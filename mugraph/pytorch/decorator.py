"""`@mg.superoptimize` on PyTorch functions and modules.

The first call with new shapes captures and optimises; later calls with the same element types, devices and shapes (or
with sizes inside a declared range) run the result.  What is not understood runs as it was written, with one warning.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mugraph import pipeline
from mugraph.errors import CaptureError, FallbackWarning, LaunchError, MugraphError, VerificationError
from mugraph.ir.axes import Dim
from mugraph.pipeline import Result

Dynamic = Mapping[str, Mapping[int, Dim]]


@dataclass(frozen=True)
class Specialisation:
    """What runs for one signature: a captured program and its result, or the reason for a fallback."""

    captured: Any
    result: Result | None
    reason: MugraphError | None

    @property
    def report(self) -> str:
        return str(self.reason) if self.result is None else str(self.result)


class OptimizedFunction:
    """A PyTorch function or module, superoptimised per signature.

    `specialisations` maps each signature met so far to what runs for it; `report` tells about all of them;
    `original` is the function as it was written.
    """

    def __init__(
        self, original: Callable[..., Any], *, dynamic: Dynamic | None = None, strict: bool = False, **options: Any
    ) -> None:
        self.original = original
        self.dynamic = dict(dynamic or {})
        self.strict = strict
        self.options = options
        self.specialisations: dict[object, Specialisation] = {}
        self._attribute = getattr(original, "__name__", "")
        self._lock = threading.Lock()
        self._signature = inspect.signature(getattr(original, "forward", original))
        if unknown := sorted(set(self.dynamic) - set(self._signature.parameters)):
            raise CaptureError(
                f"dynamic names {unknown[0]!r}, which is no argument",
                remedy=f"known: {', '.join(self._signature.parameters)}",
            )
        functools.update_wrapper(self, original, updated=())

    def __get__(self, instance: object, owner: type | None = None) -> OptimizedFunction:
        """As a method: one optimised function for each instance, whose attributes are constants to it."""
        if instance is None:
            return self
        bound = types.MethodType(self.original, instance)
        method = OptimizedFunction(bound, dynamic=self.dynamic, strict=self.strict, **self.options)
        instance.__dict__[self._attribute] = method  # found first from now on, and gone with the instance
        return method

    def __set_name__(self, owner: type, name: str) -> None:
        self._attribute = name

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

    def __call__(self, *args: Any, **named: Any) -> Any:
        try:
            bound = self._signature.bind(*args, **named)
        except TypeError:
            return self.original(*args, **named)  # raises what Python says
        bound.apply_defaults()
        if bound.kwargs:  # keyword-only arguments: outside what torch.export is given here
            return self._outside("keyword-only arguments", args, named)
        leaves = _leaves(bound.args)
        key = self._key(bound.arguments, leaves)
        chosen = self.specialisations.get(key)
        if chosen is None:
            with self._lock:
                chosen = self.specialisations.get(key)
                if chosen is None:
                    chosen = self.specialisations[key] = self._specialise(bound.args, leaves)
        if chosen.result is None or chosen.result.unchanged:
            return self.original(*args, **named)  # never slower: PyTorch's own way is what runs
        if _wants_gradients(leaves, chosen.captured) and chosen.result.target.kind != "torch":
            return self._outside("gradients through emitted kernels", args, named)
        outputs = chosen.result(*chosen.captured.flatten(bound.args))
        return chosen.captured.unflatten(outputs if isinstance(outputs, tuple) else (outputs,))

    def _key(self, arguments: Mapping[str, Any], leaves: list[Any]) -> object:
        """Types, devices and sizes; sizes declared dynamic count as one while they are in range."""
        import torch

        free: dict[int, Mapping[int, Dim]] = {}
        for name, sizes in self.dynamic.items():
            if isinstance(arguments.get(name), torch.Tensor):
                free[id(arguments[name])] = sizes
        parts: list[object] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                sizes = free.get(id(leaf), {})
                shape = tuple(
                    d.name if (d := sizes.get(i)) is not None and d.min <= n <= d.max else n
                    for i, n in enumerate(leaf.shape)
                )
                parts.append((leaf.dtype, leaf.device.type, shape))
            else:
                parts.append((type(leaf), repr(leaf)))
        mode = self.original.training if isinstance(self.original, torch.nn.Module) else None
        return (mode, *parts)

    def _specialise(self, args: tuple[Any, ...], leaves: list[Any]) -> Specialisation:
        from mugraph.pytorch.capture import capture

        options = dict(self.options)
        if "target" not in options and not any(getattr(x, "is_cuda", False) for x in leaves):
            options["target"] = "torch"
        try:
            captured = capture(self.original, self._examples(args), self._dynamic_here(args))
            return Specialisation(captured, pipeline.optimize(captured.program, **options), None)
        except VerificationError:
            raise  # a wrong result is a defect of mugraph, not something to fall back from in silence
        except MugraphError as error:
            if self.strict:
                raise
            self._warn(error)
            return Specialisation(None, None, error)

    def _dynamic_here(self, args: tuple[Any, ...]) -> Dynamic:
        """The declared dynamic sizes that these arguments are in range of."""
        import torch

        found: dict[str, dict[int, Dim]] = {}
        for name, x in zip(self._signature.parameters, args, strict=False):
            if isinstance(x, torch.Tensor):
                inside = {i: d for i, d in self.dynamic.get(name, {}).items() if d.min <= x.shape[i] <= d.max}
                if inside:
                    found[name] = inside
        return found

    def _examples(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, with at least 2 along dynamic sizes: torch.export takes 1 for a constant."""
        dynamic = self._dynamic_here(args)
        examples = list(args)
        for n, name in enumerate(self._signature.parameters):
            if name in dynamic:
                x = args[n]
                shape = [max(2, s) if i in dynamic[name] else s for i, s in enumerate(x.shape)]
                examples[n] = x if shape == list(x.shape) else x.new_zeros(shape)
        return tuple(examples)

    def _outside(self, what: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        error = LaunchError(
            f"{what} are not supported", remedy="call it under torch.no_grad(), or with positional arguments"
        )
        if self.strict:
            raise error
        self._warn(error)
        return self.original(*args, **named)

    def _warn(self, error: MugraphError) -> None:
        name = getattr(self.original, "__name__", type(self.original).__name__)
        warnings.warn(FallbackWarning(f"{name} runs as it was written: {error}"), stacklevel=4)


def _leaves(args: tuple[Any, ...]) -> list[Any]:
    from torch.utils import _pytree as pytree

    found: list[Any] = pytree.tree_leaves(args)
    return found


def _wants_gradients(leaves: list[Any], captured: Any) -> bool:
    import torch

    if not torch.is_grad_enabled():
        return False
    tensors = (*leaves, *captured.constants.values())
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


pipeline.FRONTENDS.append(OptimizedFunction)
