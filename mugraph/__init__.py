"""mugraph: a superoptimizer for tensor programs.

The front door.  Names are loaded when they are used, so that importing mugraph is quick and brings in neither torch
nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "mugraph.ir.axes": "Dim",
    "mugraph.ir.graph": "KernelGraph Program",
    "mugraph.dsl.block": "block",
    "mugraph.dsl.trace": """
    program trace constant TensorSpec
    f64 f32 bf16 f16 f8e4m3 f8e5m2 i64 i32 i16 i8 u8 i6 i4 u4 i2 u2 i1 bool_
    """,
    "mugraph.dsl.functions": """
    abs add amax amin arange attention cast causal_mask chunk concat cos cumsum div einsum erf exp expand expm1 floor
    gelu iota layer_norm linear log log1p logsumexp mT masked_fill matmul max maximum mean min minimum mul neg permute
    pow reciprocal relu repeat_interleave reshape rms_norm rsqrt scatter_add sigmoid silu sin softmax split sqrt square
    squeeze stack sub sum take tanh transpose tril triu unsqueeze where
    """,
    "mugraph.search.space": "SearchSpace",
    "mugraph.search.report": "SearchReport",
    "mugraph.verify.equivalence": "Verified",
    "mugraph.pipeline": "by_size from_graph optimize superoptimize",
    "mugraph.result": "Result load",
    "mugraph.errors": "FallbackWarning MugraphError",
}
_MODULES = {name: home for home, names in _HOMES.items() for name in names.split()}
# Modules that add themselves to others: pictures for notebooks, PyTorch functions for superoptimize.
_REGISTERED = {"mugraph.ir.graph": "mugraph.viz", "mugraph.pipeline": "mugraph.pytorch.decorator"}

__all__ = sorted(["__version__", *_MODULES])


def __getattr__(name: str) -> Any:
    home = _MODULES.get(name)
    if home is None:
        raise AttributeError(f"module 'mugraph' has no attribute {name!r}")
    for needed in ("mugraph.ir.graph", home):
        if needed in _REGISTERED:
            import_module(_REGISTERED[needed])
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
