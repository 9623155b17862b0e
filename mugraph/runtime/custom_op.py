"""A program as a PyTorch operator, which `torch.compile`, `torch.export` and AOTInductor keep whole.

    op = Operator(signature, digest, run, reference).register()      # torch.ops.mugraph.<name>_<digest>

The name tells the operator's code: equal names have equal kernels, so that registering twice is no conflict and other
versions of a program have other names.  On CUDA tensors `run` is called, on a CPU `reference` unless told otherwise.
The rules for shapes run in Python, on symbolic sizes too, as `torch.library.register_fake` asks.

This text is part of `register.py` as it stands, so it imports torch and the standard library alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, ClassVar

import torch

from mugraph.errors import LaunchError

NAMESPACE = "mugraph"
_torch: Any = torch  # for what has no annotations
Gradients = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Operator:
    """What is registered.

    `signature` says what callers see (`aot.signature_of`): sizes are numbers, or expressions of symbolic sizes.
    `digest` is a hash of all code that the operator runs.  `run` and `reference` take the input tensors in order, of
    any strides, and return a row-major tensor for each output.  `reference` is PyTorch code that autograd follows.
    `everywhere`: on a CPU too `run` is called.
    """

    _libraries: ClassVar[list[Any]] = []  # an operator lives as long as its library
    _given: ClassVar[dict[str, Gradients]] = {}
    _lock: ClassVar[Any] = threading.RLock()

    def __init__(
        self,
        signature: Mapping[str, Any],
        digest: str,
        run: Callable[..., Any],
        reference: Callable[..., Any],
        everywhere: bool = False,
    ) -> None:
        self.run, self.reference, self.everywhere = run, reference, everywhere
        self.inputs: Sequence[Mapping[str, Any]] = signature["inputs"]
        self.outputs: Sequence[Mapping[str, Any]] = signature["outputs"]
        self.program = signature["name"]
        self.name = f"{re.sub(r'[^A-Za-z0-9_]', '_', self.program)}_{digest}"
        if not self.name[0].isalpha():
            self.name = f"program_{self.name}"
        self.parameters = [_Parameter(i, signature["sizes"]) for i in self.inputs]
        self.results = [_Parameter(o, signature["sizes"]) for o in self.outputs]
        places = {i["name"]: n for n, i in enumerate(self.inputs)}
        self.sizes = [
            (places[s["input"]], _function(s["value"], signature["sizes"]), s["name"], s["min"], s["max"])
            for s in signature["sizes"]
        ]
        self.learned = [n for n, p in enumerate(self.parameters) if p.dtype.is_floating_point]
        self.graded = [n for n, r in enumerate(self.results) if r.dtype.is_floating_point]

    # -- registration

    def register(self, gradients: bool | Gradients = False) -> Any:
        """The operator `torch.ops.mugraph.<name>`, defined unless it is there.

        Without `gradients`, differentiating it is an error.  With True its gradients are those of the reference,
        computed anew from the inputs, under the name `<name>_with_gradients`.  A function is called with the gradients
        of the floating outputs and all inputs, and returns the gradients of the floating inputs; its name is part of
        the operator's.  Raises LaunchError where two functions would share that name."""
        name = self.name
        if gradients:
            of = "gradients" if gradients is True else re.sub(r"\W", "_", getattr(gradients, "__name__", "given"))
            name = f"{name}_with_{of}"
        with self._lock:
            if hasattr(getattr(torch.ops, NAMESPACE), name):
                if callable(gradients) and self._given.get(name) is not gradients:
                    problem = f"{NAMESPACE}::{name} is registered with other gradients"
                    raise LaunchError(problem, op=self.program, remedy="give the function another name")
            else:
                if callable(gradients):
                    self._given[name] = gradients
                self._define(name, gradients)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def _define(self, name: str, gradients: bool | Gradients) -> None:
        library = _torch.library.Library(NAMESPACE, "FRAGMENT")
        self._libraries.append(library)
        parameters = ", ".join(f"Tensor {n}" for n in self._names())
        library.define(f"{name}({parameters}) -> {_tensors(len(self.outputs))}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, self._checked(self.run if self.everywhere else self.reference), "CPU")
        library.impl(name, self._checked(self.run), "CUDA")
        qualified = f"{NAMESPACE}::{name}"
        torch.library.register_fake(qualified, self.fake, lib=library)
        if gradients and self.learned and self.graded:
            backward = self._define_backward(library, name, gradients)
        else:
            backward = self._refuse_backward
        operator = getattr(getattr(torch.ops, NAMESPACE), name).default
        library.impl(name, self._recorded(operator, backward), "Autograd", with_keyset=True)

    def _recorded(self, operator: Any, backward: Callable[..., Any]) -> Callable[..., Any]:
        """What autograd does with a call.  `torch.library.register_autograd` is not used, because it lets tangents of
        forward-mode differentiation pass for zeros."""

        class Call(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, keys: Any, *tensors: torch.Tensor) -> Any:
                ctx.save_for_backward(*tensors)
                return below(keys, *tensors)

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> Any:
                return None, *backward(ctx, *grads)

        def below(keys: Any, *tensors: torch.Tensor) -> Any:
            with _torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & after, *tensors)

        def call(keys: Any, *tensors: torch.Tensor) -> Any:
            if forward_mode._current_level >= 0:
                self._refuse_tangents(tensors)
            if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
                return record(keys, *tensors)
            return below(keys, *tensors)

        record: Any = Call.apply
        after, forward_mode = _torch._C._after_autograd_keyset, _torch.autograd.forward_ad
        return call

    def _refuse_tangents(self, tensors: Sequence[torch.Tensor]) -> None:
        if any(_torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise LaunchError(
                f"{self.program} has no derivatives in forward mode (torch.func.jvp, torch.autograd.forward_ad)",
                op=self.program,
                remedy="differentiate in reverse mode, or the program as PyTorch code",
            )

    def _define_backward(self, library: Any, name: str, gradients: bool | Gradients) -> Callable[..., Any]:
        """An operator of its own: tracing does not look into it, whatever the reference does."""
        count, backward_name = len(self.graded), f"{name}_backward"
        names = [*(f"grad{n}" for n in self.graded), *(f"input{n}" for n in range(len(self.inputs)))]
        parameters = ", ".join(f"Tensor {n}" for n in names)
        library.define(f"{backward_name}({parameters}) -> {_tensors(len(self.learned))}")
        find = gradients if callable(gradients) else self._reference_gradients

        def real(*tensors: torch.Tensor) -> Any:
            found = list(find(tensors[:count], tensors[count:]))
            wanted = [tensors[count + n] for n in self.learned]
            if [(g.shape, g.dtype) for g in found] != [(x.shape, x.dtype) for x in wanted]:
                got = ", ".join(f"{g.dtype}{list(g.shape)}" for g in found)
                remedy = "return one gradient for each floating input, of its shape and element type"
                raise LaunchError(f"{self.program}: the gradients are {got}", op=self.program, remedy=remedy)
            return _own([g.contiguous() for g in found], tensors)

        def fake(*tensors: torch.Tensor) -> Any:
            found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors[count:]]
            return _one_or_all([found[n] for n in self.learned])

        for device in ("CPU", "CUDA"):
            library.impl(backward_name, real, device)
        torch.library.register_fake(f"{NAMESPACE}::{backward_name}", fake, lib=library)
        call = getattr(getattr(torch.ops, NAMESPACE), backward_name).default

        class Once(torch.autograd.Function):
            """The gradients, whose own are an error."""

            @staticmethod
            def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
                return call(*tensors)

            @staticmethod
            def backward(ctx: Any, *grads: torch.Tensor) -> Any:
                raise LaunchError(
                    f"{self.program} has no gradients of gradients",
                    op=self.program,
                    remedy="differentiate twice through the program as PyTorch code",
                )

        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            tensors = (*(grads[n] for n in self.graded), *ctx.saved_tensors)
            self._refuse_tangents(tensors)
            found = record(*tensors) if torch.is_grad_enabled() else call(*tensors)
            each = iter((found,) if isinstance(found, torch.Tensor) else found)
            return tuple(next(each) if n in self.learned else None for n in range(len(self.inputs)))

        record: Any = Once.apply
        return backward

    def _reference_gradients(
        self, grads: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            fresh = [x.detach().requires_grad_(n in self.learned) for n, x in enumerate(inputs)]
            outputs = self.reference(*fresh)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            pairs = [(outputs[n], g) for n, g in zip(self.graded, grads, strict=True) if outputs[n].requires_grad]
            wanted = [fresh[n] for n in self.learned]
            if not pairs:
                return [torch.zeros_like(x) for x in wanted]
            values, weights = zip(*pairs, strict=True)
            return torch.autograd.grad(values, wanted, weights, allow_unused=True, materialize_grads=True)

    def _refuse_backward(self, ctx: Any, *grads: torch.Tensor) -> Any:
        raise LaunchError(
            f"{self.program} was registered without gradients",
            op=self.program,
            remedy="register it with gradients=True, or call it under torch.no_grad()",
        )

    def _names(self) -> list[str]:
        """Those of the inputs, where a schema takes them."""
        plain = re.compile(r"(?!(None|True|False)$)[A-Za-z]\w*", re.ASCII)
        names = [i["name"] for i in self.inputs]
        return names if all(plain.fullmatch(n) for n in names) else [f"input{n}" for n in range(len(names))]

    # -- calls

    def _checked(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*tensors: torch.Tensor) -> Any:
            self.check(tensors)
            with _own_types():
                found = run(*tensors)
            return _own([found] if isinstance(found, torch.Tensor) else list(found), tensors)

        return call

    def fake(self, *tensors: torch.Tensor) -> Any:
        """What a call returns, as tensors without values.  Raises LaunchError as a call does."""
        sizes = self.check(tensors)
        return _one_or_all(
            [
                torch.empty([f((), sizes) for f in r.shape], dtype=r.dtype, device=tensors[0].device)
                for r in self.results
            ]
        )

    def check(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """The symbolic sizes.  Raises LaunchError for tensors that do not fit; of sizes that tracing does not know yet
        it makes assertions for the run."""
        device = tensors[0].device
        for p, t in zip(self.parameters, tensors, strict=True):
            if t.dtype is not p.dtype:
                self._refuse(p, f"of type {t.dtype}", f"convert it: .to({p.dtype})")
            if t.dim() != len(p.shape):
                self._refuse(p, f"of {t.dim()} dimensions", f"give it {len(p.shape)}")
            if t.device != device:
                self._refuse(p, f"on {t.device}, {self.parameters[0].name} on {device}", "use one device")
        sizes: list[Any] = []
        for place, value, name, low, high in self.sizes:
            found = value(tensors[place].shape, sizes)
            sizes.append(found)
            for holds in (found >= low, found <= high):
                if holds is not True:
                    limits = f"it must lie in {low}..{high}"
                    self._expect(holds, self.parameters[place], f"such that {name} = {found}", limits)
        for p, t in zip(self.parameters, tensors, strict=True):
            shape = t.shape
            for n, value in enumerate(p.shape):
                wanted = value((), sizes)
                if (holds := shape[n] == wanted) is not True:
                    self._expect(holds, p, f"of shape {tuple(shape)}", f"dimension {n} must be {wanted}")
        return sizes

    def _expect(self, holds: Any, of: _Parameter, found: str, remedy: str) -> None:
        if isinstance(holds, bool):
            self._refuse(of, found, remedy)
        _torch._check(holds, lambda: f"{self.program}: {of.name} is {found}; {remedy}")  # of symbolic sizes

    def _refuse(self, of: _Parameter, found: str, remedy: str) -> None:
        raise LaunchError(f"{self.program}: {of.name} is {found}", op=self.program, remedy=remedy)


class _Parameter:
    """A tensor of the signature.  `shape` holds functions of nothing and the symbolic sizes."""

    def __init__(self, data: Mapping[str, Any], sizes: Sequence[Mapping[str, Any]]) -> None:
        self.name: str = data["name"]
        self.dtype: torch.dtype = getattr(torch, data["dtype"])
        self.shape = [_function(s, sizes) for s in data["shape"]]


def _function(text: int | str, sizes: Sequence[Mapping[str, Any]]) -> Callable[[Sequence[Any], Sequence[Any]], Any]:
    """An expression of the symbolic sizes, each as `size_` and its name, and of the shape of an input, as a function of
    that shape and of the values of (the first of) these sizes."""
    names = "".join(f"size_{s['name']}=None, " for s in sizes)
    body = eval(f"lambda shape, {names}: {text}", {"__builtins__": {}, "round": round})
    return lambda shape, known: body(shape, *known)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _own_types() -> AbstractContextManager[Any]:
    """Autocast off: the program says what is rounded, and where."""
    if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
        return nullcontext()
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _one_or_all(found: Sequence[torch.Tensor]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def _own(found: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
    """The results, copied where they lie in memory of an input or of each other, which operators may not return."""
    own: list[torch.Tensor] = []
    for t in found:
        shared = any(_torch._C._is_alias_of(t, other) for other in (*tensors, *own))
        own.append(t.clone() if shared else t)
    return _one_or_all(own)
