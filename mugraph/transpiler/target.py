"""What code is emitted for: PyTorch functions, or Triton kernels for a GPU architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mugraph.codegen.plan import Machine, Precision
from mugraph.errors import UnknownTargetError

Kind = Literal["torch", "triton"]

# Compute capabilities, as `major * 10 + minor`, that Triton makes tensor-core code for.
ARCHES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
VALID = f"torch, triton, cuda, {', '.join(f'cuda:{a}' for a in ARCHES)}; '+tf32' behind all but torch"
TF32 = "+tf32"


@dataclass(frozen=True)
class Target:
    """`torch`: plain PyTorch, on any device.  `triton`: Triton kernels for compute capability `arch`; without one,
    their source alone, which the interpreter runs.  `precision`: matrix multiplies of kernels take all bits of their
    f32 operands, or, asked for by `+tf32`, 10 bits of the fraction.

    >>> parse_target("cuda:90")
    Target(kind='triton', arch=90, precision='ieee')
    >>> str(parse_target("cuda:90+tf32"))
    'cuda:90+tf32'
    """

    kind: Kind
    arch: int | None = None
    precision: Precision = "ieee"

    def __str__(self) -> str:
        name = self.kind if self.arch is None else f"cuda:{self.arch}"
        return name if self.precision == "ieee" else name + TF32

    @property
    def machine(self) -> Machine:
        """What plans for the target are for."""
        return Machine(self.arch, self.precision)


def parse_target(target: str | Target | None = None) -> Target:
    """The target of that name; None is `default_target()`.

    `torch` | `triton` (for the present device, else for none) | `cuda` (the present device) | `cuda:90`; all but
    `torch` with `+tf32`, for matrix multiplies of f32 operands in tf32.
    Raises UnknownTargetError for another name, and for `cuda` where there is no device.
    """
    if isinstance(target, str) and target.endswith(TF32) and target != f"torch{TF32}":
        return replace(parse_target(target.removesuffix(TF32)), precision="tf32")
    match target:
        case None:
            return default_target()
        case Target():
            return target
        case "torch":
            return Target("torch")
        case "triton":
            return Target("triton", present_arch())
        case "cuda":
            return _present_device()
    name, _, arch = target.partition(":") if isinstance(target, str) else ("", "", "")
    if name == "cuda" and arch in map(str, ARCHES):
        return Target("triton", int(arch))
    raise UnknownTargetError(f"there is no target {target!r}", remedy=f"give one of {VALID}")


def default_target() -> Target:
    """The present CUDA device if there is one, else PyTorch.  Imports torch."""
    arch = present_arch()
    return Target("torch") if arch is None else Target("triton", arch)


def present_arch() -> int | None:
    """The compute capability of the current CUDA device; None without one, or if Triton has no tensor cores for it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    arch = 10 * major + minor
    return arch if arch in ARCHES else None


def _present_device() -> Target:
    arch = present_arch()
    if arch is None:
        raise UnknownTargetError(
            "the target 'cuda' stands for the present device, and there is no usable CUDA device",
            remedy=f"name the architecture, or use torch; give one of {VALID}",
        )
    return Target("triton", arch)
