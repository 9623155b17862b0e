"""What an emitted file keeps between calls.  The text below the imports goes into such files as it stands."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch


class Kept:
    """`compute(*constants)`, kept for as long as its constants live and do not change.

    Kept is per set of tensors: the very tensors (the base, of a view) and the memory that they show.  Writes count by
    PyTorch's version counter; after one, `compute` runs again and its results go where the old ones were, so that
    CUDA graphs captured before see them.  Writes that are not counted (through `.data`, NumPy, a pointer, or the
    replay of a CUDA graph) are not seen.  Nothing is kept where a gradient is wanted, for tensors made in inference
    mode (which count no writes), while a CUDA graph is captured, or under torch.compile and functorch.
    """

    plain = (torch.Tensor, torch.nn.Parameter)

    def __init__(self, compute: Callable[..., Any]) -> None:
        self.compute = compute
        self.entries: dict[tuple[object, ...], tuple[list[int], Any, list[object]]] = {}
        self.lock = threading.RLock()

    def __call__(self, *constants: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            return self.compute(*constants)
        place: list[object] = []
        writes: list[int] = []
        wanted = torch.is_grad_enabled()
        try:
            for t in constants:
                if type(t) not in self.plain or (wanted and t.requires_grad):
                    return self.compute(*constants)
                owner = t if t._base is None else t._base
                place += (id(owner), id(t.untyped_storage()), t.data_ptr(), t.shape, t.stride(), t.dtype)
                writes.append(t._version)
        except RuntimeError:  # made in inference mode, or under a transform
            return self.compute(*constants)
        key = tuple(place)
        entry = self.entries.get(key)
        if entry is not None and entry[0] == writes:
            return entry[1]
        if self.capturing(constants):
            return self.compute(*constants)
        with self.lock:
            entry = self.entries.get(key)
            if entry is not None and entry[0] == writes:
                return entry[1]
            with torch.inference_mode(False), torch.no_grad():
                found = self.compute(*constants)
                if entry is not None:
                    for old, new in zip(self.tensors(entry[1]), self.tensors(found), strict=True):
                        old.copy_(new)
                    found = entry[1]
            if constants[0].is_cuda:  # streams that find it need not wait for this one
                torch.cuda.current_stream(constants[0].device).synchronize()
            self.entries[key] = writes, found, self.watched(constants, key)
        return found

    @staticmethod
    def capturing(constants: tuple[torch.Tensor, ...]) -> bool:
        """Whether what is computed now becomes part of a CUDA graph and has no values yet."""
        return constants[0].is_cuda and torch.cuda.is_current_stream_capturing()

    @staticmethod
    def tensors(found: Any) -> tuple[torch.Tensor, ...]:
        return found if isinstance(found, tuple) else (found,)

    def watched(self, constants: tuple[torch.Tensor, ...], key: tuple[object, ...]) -> list[object]:
        """Weak references that drop the entry with the first of its constants: an id may be used again after that."""

        def drop(_: object) -> None:
            self.entries.pop(key, None)

        owners = [t if t._base is None else t._base for t in constants]
        return [weakref.ref(x, drop) for x in (*owners, *(t.untyped_storage() for t in constants))]
