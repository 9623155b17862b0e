"""What a call looks at: its arguments and the state of PyTorch that it is made in."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType, FunctionType
from typing import Any

from mugraph.ir.axes import Dim


def is_traced(leaves: Sequence[Any]) -> bool:
    """Whether torch writes down what is done, or there are tensors without values: on the meta device, or what stands
    for them while torch traces."""
    import torch

    if torch._C._get_tracing_state() is not None:
        return True
    for x in leaves:
        if type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
            if x.is_meta:
                return True
        elif isinstance(x, torch.Tensor):
            from torch._subclasses.fake_tensor import FakeTensor

            if x.is_meta or isinstance(x, FakeTensor):
                return True
        elif isinstance(x, torch.fx.Proxy):
            return True
    return False


def is_empty(leaves: Sequence[Any]) -> bool:
    """Whether a tensor has no elements: every dimension of a program has at least one."""
    import torch

    return any(isinstance(x, torch.Tensor) and 0 in x.shape for x in leaves)


def autocast() -> Any:
    """The type that autocast takes on a CPU, or None where it is off.  Its casts are part of what is captured."""
    import torch

    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


def uncast() -> AbstractContextManager[Any]:
    """Autocast off, because captured programs hold its casts already."""
    import torch

    return nullcontext() if autocast() is None else torch.autocast("cpu", enabled=False)


def unhooked() -> AbstractContextManager[Any]:
    """What is saved for a backward pass here is not that of the call: checkpointing counts it."""
    import torch

    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def steering() -> tuple[type[Exception], ...]:
    """Errors that say nothing of what raises them: checkpointing ends a computation by one."""
    from torch.utils import checkpoint

    return (checkpoint._StopRecomputationError,) if hasattr(checkpoint, "_StopRecomputationError") else ()


def outside_state(leaves: Sequence[Any]) -> tuple[str, str] | None:
    """What a captured program does not represent, with a remedy."""
    import torch

    if torch.is_autocast_enabled("cuda"):
        return "calls under autocast on a GPU", "convert the arguments and weights instead"
    if transforms() is not None:
        return "calls under torch.func transforms", "apply the transform to the original function"
    if any(isinstance(x, torch.Tensor) and type(x) not in (torch.Tensor, torch.nn.Parameter) for x in leaves):
        return "subclasses of Tensor", "pass plain tensors"
    if any(isinstance(x, torch.Tensor) and x.layout is not torch.strided for x in leaves):
        return "sparse tensors", "call the original function with them"
    return None


def transforms() -> Any:
    """The innermost torch.func transform, or None."""
    import torch

    return torch._C._functorch.peek_interpreter_stack()


def is_dynamo_running() -> bool:
    """Whether torch.compile looks at every function that is called.  Without TorchDynamo loaded, which takes seconds,
    it cannot."""
    if "torch._dynamo" not in sys.modules:
        return False
    import torch

    # the first is what torch.compile itself sees, the second what a function sees that it left alone
    return torch.compiler.is_dynamo_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None


def leaf_key(leaves: Sequence[Any], free: Mapping[int, Mapping[int, Dim]]) -> tuple[object, ...]:
    """Types, devices and sizes of tensors, and which are one object; sizes that are dynamic count as one.  Other leaves
    by value."""
    import torch

    parts: list[object] = []
    first: dict[int, int] = {}
    for place, x in enumerate(leaves):
        if isinstance(x, torch.Tensor):
            sizes = free.get(place)
            shape = (
                x.shape if sizes is None else tuple(sizes[i].name if i in sizes else n for i, n in enumerate(x.shape))
            )
            parts += (type(x), x.dtype, x.device.type, shape, first.setdefault(id(x), place))
        elif isinstance(x, float):
            parts += (type(x), x.hex())  # tells 0.0 from -0.0, and NaN is itself
        elif isinstance(x, _VALUES):
            parts += (type(x), x)
        elif isinstance(x, torch.dtype | torch.device | torch.layout | torch.memory_format) or is_torch_function(x):
            parts.append(x)
        else:
            parts.append(type(x))  # torch.export refuses it, whatever its value
    return tuple(parts)


def is_torch_function(x: Any) -> bool:
    """Whether it is a function of PyTorch's own (`F.silu`, `torch.relu`), which reads nothing that changes."""
    if not isinstance(x, FunctionType | BuiltinFunctionType):
        return False
    import torch

    known = any(getattr(place, x.__name__, None) is x for place in (torch, torch.nn.functional, torch.special))
    return known or (x.__module__ or "").partition(".")[0] == "torch"


ANY = Dim("any")  # stands for every size where only ranks count
_VALUES = (int, bool, str, bytes, complex, type(None))


def has_negative(indices: Iterable[Any]) -> bool:
    """Whether an index on the CPU is negative.  One on a GPU is checked there, as PyTorch does, without waiting."""
    import torch

    for x in indices:
        if x.is_cuda:
            torch._assert_async((x >= 0).all(), "an index is negative")
        elif x.numel() and x.min() < 0:
            return True
    return False


def wants_gradients(tensors: Sequence[Any]) -> bool:
    import torch

    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
