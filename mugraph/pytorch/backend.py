"""`torch.compile(model, backend="mugraph")`.

Dynamo hands over graphs of a model; AOTAutograd turns them into ATen graphs of the forward and the backward pass,
without writes in place.  `parts.split` finds the parts that are programs; each is optimised through the pipeline, and
takes the place of its nodes where that is predicted (or, where it is tuned, measured) to be faster.  All else goes to
Inductor, or runs operator by operator where Inductor cannot compile.

    options={"effort": "full", "budget_seconds": 60}      as for `mg.superoptimize`, and two more:
      rest    "inductor" (the default) or "eager": what compiles the nodes that no part takes over
      parts   "faster" (the default) or "all": whether parts without a predicted gain are replaced too

`reports()` tells about every graph compiled so far.  What fails in here leaves the graph as it was, with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch._dynamo.backends import registry
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing

from mugraph import pipeline, settings
from mugraph.errors import FallbackWarning, InterruptedWarning, MugraphError, SettingError
from mugraph.ir.axes import Dim, Monomial, Size
from mugraph.ir.types import TORCH_NAMES
from mugraph.pytorch.parts import Part, split
from mugraph.result import Result
from mugraph.search.report import SearchReport

Kind = Literal["inference", "forward", "backward"]
Rest = Literal["inductor", "eager"]
Parts = Literal["faster", "all"]

GAIN = 0.9  # of the predicted seconds of library calls, at most, are taken by what replaces them
KEPT = 256  # reports

# What autograd makes of these is basic operators: the bridge and Inductor know them so.
DECOMPOSED = """
    _softmax_backward_data _log_softmax_backward_data native_layer_norm_backward _fused_rms_norm_backward
    threshold_backward silu_backward sigmoid_backward tanh_backward leaky_relu_backward elu_backward
    hardtanh_backward hardswish_backward hardsigmoid_backward softplus_backward log_sigmoid_backward mse_loss_backward
    smooth_l1_loss_backward mse_loss addcmul addcdiv lerp slice_backward select_backward
    embedding_dense_backward nll_loss_forward nll_loss_backward _safe_softmax
"""


# -- what was done -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartReport:
    """What became of a part: `replaced`, or why not.  `nodes` counts its operators."""

    name: str
    nodes: int
    replaced: bool
    verdict: str
    result: Result | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class GraphReport:
    """One graph.  `nodes` counts its operators on tensors, `understood` those in parts, `taken` those that were
    replaced.  `refused` tells for each operator outside all parts how often it is there, why and where; `rest` what
    runs the nodes that were not replaced."""

    kind: Kind
    nodes: int
    understood: int
    parts: tuple[PartReport, ...]
    refused: Mapping[str, str]
    rest: str

    @property
    def taken(self) -> int:
        return sum(p.nodes for p in self.parts if p.replaced)

    @property
    def share(self) -> float:
        """The share of the graph's operators that mugraph runs."""
        return self.taken / self.nodes if self.nodes else 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.kind} graph: {self.nodes} operators, {self.understood} understood, {self.taken} taken over "
            f"({100 * self.share:.0f} %); the others: {self.rest}",
            *(f"  {p.name}, {p.nodes} operators: {p.verdict}" for p in self.parts),
            *(f"  {op} stays with PyTorch, {why}" for op, why in self.refused.items()),
        ]
        return "\n".join(lines)


_reports: deque[GraphReport] = deque(maxlen=KEPT)


def reports() -> tuple[GraphReport, ...]:
    """What was done with the graphs that were compiled, oldest first; the last 256."""
    return tuple(_reports)


# -- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Checked options: those of the pipeline, and the backend's own."""

    pipeline: Mapping[str, Any]
    rest: Rest
    parts: Parts
    inductor: Mapping[str, Any]


def checked_options(given: Mapping[str, Any] | None, mode: str | None) -> Options:
    """Raises SettingError for an option, a value or a mode that there is not."""
    options = dict(given or {})
    rest, parts = options.pop("rest", "inductor"), options.pop("parts", "faster")
    for name, value, valid in (("rest", rest, get_args(Rest)), ("parts", parts, get_args(Parts))):
        if value not in valid:
            raise SettingError(f"option {name}={value!r} is not valid", remedy=", ".join(valid))
    known = [n for n, p in inspect.signature(pipeline.optimize).parameters.items() if p.kind is p.KEYWORD_ONLY]
    if unknown := [n for n in options if n not in known]:
        listed = ", ".join((*known, "rest", "parts"))
        raise SettingError(f"the backend mugraph has no option {unknown[0]!r}", remedy=f"known: {listed}")
    pipeline.checked_options(**options)
    modes: dict[str, dict[str, Any]] = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise SettingError(f"mode={mode!r} is not valid", remedy=f"known: {', '.join(modes)}")
    return Options(options, rest, parts, modes[mode or "default"])


# -- the backend ---------------------------------------------------------------------------------------------------


def mugraph(
    module: Any, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls: from a graph of Dynamo to a function of the same arguments.

    Raises SettingError for options that there are not.  Whatever else goes wrong leaves the graph to PyTorch, with a
    FallbackWarning."""
    from torch._decomp import get_decompositions
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import TorchDynamoException

    checked = checked_options(options, mode)
    _fix_numbers(example_inputs)
    compiler = aot_autograd(
        fw_compiler=functools.partial(_compiled, "forward", checked),
        bw_compiler=functools.partial(_compiled, "backward", checked),
        inference_compiler=functools.partial(_compiled, "inference", checked),
        decompositions=get_decompositions([getattr(torch.ops.aten, name) for name in DECOMPOSED.split()]),
        partition_fn=min_cut_rematerialization_partition,
    )
    try:
        return compiler(module, example_inputs)
    except TorchDynamoException:  # how Dynamo tells itself to start again
        raise
    except Exception as error:
        _warn("a graph", error)
        run: Callable[..., Any] = module.forward
        return run


def _fix_numbers(example_inputs: Sequence[Any]) -> None:
    """Makes Python numbers that Dynamo took for inputs (dynamic=True does so with the eps of a norm) constants of the
    graph, which its next trace finds.  As inputs they are tensors on the CPU, between the tensors of a GPU."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    mode = detect_fake_mode(example_inputs)
    known = getattr(mode.shape_env, "backed_var_to_val", {}) if mode is not None else {}
    free = [str(s) for s in known if symbol_is_type(s, SymT.FLOAT) and not TensorifyState.should_specialize(str(s))]
    for name in free:
        TensorifyState.specialize(name)
    if free:
        raise TensorifyScalarRestartAnalysis


def _compiled(kind: Kind, options: Options, module: Any, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A function for an ATen graph, parts of which are replaced."""
    if kind == "forward" and (metadata := TracingContext.get().fw_metadata) is not None:
        metadata.bw_donated_idxs = []  # nothing here takes memory from what is saved: a backward pass may run twice
    try:
        found = split(module, kind)
        shown = []
        for key, part in found.parts.items():
            report, runner = _replacement(part, getattr(found.module, key), key, options)
            shown.append(report)
            if runner is not None:
                setattr(found.module, key, runner)
        result = found.module if any(p.replaced for p in shown) else module
        nodes, understood, refused = found.nodes, found.understood, found.refused
    except Exception as error:
        _warn(f"the {kind} graph", error)
        result, shown, nodes, understood, refused = module, [], 0, 0, {}
    run, rest = _rest(kind, options, result, example_inputs)
    _reports.append(GraphReport(kind, nodes, understood, tuple(shown), refused, rest))
    boxed: Callable[..., Any] = make_boxed_func(run)
    return boxed


def _replacement(part: Part, original: Any, name: str, options: Options) -> tuple[PartReport, Any]:
    """What became of a part, and the module that takes its place, if one does."""
    try:
        with _outside_tracing():
            result = _optimized(part, original, options)
            gain = _gain(result)
        if result.interrupted:
            warnings.warn(InterruptedWarning(), stacklevel=2)
    except Exception as error:
        _warn(part.program.name, error)
        return PartReport(name, part.nodes, False, f"failed: {error}"), None
    if options.parts == "faster" and gain is None:
        return PartReport(name, part.nodes, False, "no gain over the library calls", result), None
    return PartReport(name, part.nodes, True, f"replaced: {gain or 'as asked'}", result), Runner(part, result, original)


def _optimized(part: Part, original: Any, options: Options) -> Result:
    """The part's result.  On a CPU plans are priced as calls; where it is tuned, it is measured against the part as it
    is."""
    chosen = dict(options.pipeline)
    fakes = [n.meta["val"] for n in original.graph.nodes if n.op == "placeholder"]
    if chosen.get("target") is None and not any(getattr(x, "is_cuda", False) for x in fakes):
        chosen["target"] = "torch"
    if chosen.get("target") != "torch":
        return pipeline.optimize(part.program, **chosen)
    if settings.tune.get(chosen.get("tune")) != "measure":
        return pipeline.optimize_calls(part.program, **chosen)
    if len(part.taken) < len(fakes):  # a call of the part itself would need its sizes too
        return pipeline.optimize(part.program, **chosen)
    compiled = torch.compile(original, dynamic=bool(part.limits))
    digest = hashlib.sha256(str(part.program).encode()).hexdigest()
    return pipeline.optimize_beside(part.program, pipeline.Written(original, compiled, digest), **chosen)


def _gain(result: Result) -> str | None:
    """What is gained, or None: measured where that was done, else predicted, and then by a margin."""
    if result.unchanged:
        return None
    if result.choice is not None:
        return f"measured, {result.choice.chosen}"
    if not isinstance(result.report, SearchReport):
        return None
    calls, ours = result.report.candidates[-1].seconds, result.report.predicted_seconds
    return f"{ours * 1e6:.1f} µs predicted, library calls {calls * 1e6:.1f}" if ours <= GAIN * calls else None


@contextlib.contextmanager
def _outside_tracing() -> Iterator[None]:
    """The pipeline computes with tensors of its own, while a graph is being compiled."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad(), torch._C._DisableAutocast():
        yield


# -- running a part ------------------------------------------------------------------------------------------------


class Runner(torch.nn.Module):
    """A part's result with the arguments of the part.  Sizes outside the program's range, and whatever raises, run the
    part as it was."""

    def __init__(self, part: Part, result: Result, original: Any) -> None:
        super().__init__()
        self.part = part
        self.result = result
        self.original = original
        self.failed = False
        source = f"{result.source}\n{part.taken} {part.orders} {part.limits}\n{original.code}"
        self.key = hashlib.sha256(source.encode()).hexdigest()
        if result.target.kind == "torch":
            self.run = result.executable.run  # the graph's guards have checked what an Executable would check
        else:
            _runners[self.key] = self

    def forward(self, *args: Any) -> Any:
        if self.failed or not all(limit.holds(args) for limit in self.part.limits):
            return self.original(*args)
        try:
            inputs = [args[i] for i in self.part.taken]
            if self.result.target.kind == "torch":
                return self.shaped(self.run(*inputs))
            found = torch.ops.mugraph.part(self.key, inputs)
            return found[0] if self.part.single else tuple(found)
        except Exception as error:
            self.failed = True
            _warn(self.part.program.name, error)
            return self.original(*args)

    def shaped(self, outputs: Any) -> Any:
        """The program's outputs under the strides that the graph has."""
        several = outputs if isinstance(outputs, tuple | list) else (outputs,)
        found = tuple(x.permute(order) for x, order in zip(several, self.part.orders, strict=True))
        return found[0] if self.part.single else found


_runners: MutableMapping[str, Runner] = WeakValueDictionary()

# Kernels are opaque to Inductor.  The key is the digest of all that a part is, because Inductor keeps compiled graphs.
_library: Any = torch.library.Library("mugraph", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
_library.define("part(str key, Tensor[] inputs) -> Tensor[]")


def _launched(key: str, inputs: list[Any]) -> list[Any]:
    runner = _runners[key]
    found = runner.shaped(runner.result(*inputs))
    return [found] if runner.part.single else list(found)


def _imagined(key: str, inputs: list[Any]) -> list[Any]:
    """The results as fake tensors, of the shapes that the program tells."""
    part = _runners[key].part
    sizes = {limit.dim.name: inputs[part.taken.index(limit.argument)].shape[limit.position] for limit in part.limits}
    tensors = part.program.tensors()
    found = []
    for output, order in zip(part.program.outputs, part.orders, strict=True):
        shape = [_size_in(s, sizes) for s in tensors[output.value].shape]
        dtype = getattr(torch, TORCH_NAMES[output.storage.dtype])
        found.append(inputs[0].new_empty(shape, dtype=dtype).permute(order))
    return found


def _size_in(size: Size, sizes: Mapping[str, Any]) -> Any:
    """A size with the symbolic sizes of torch in it."""
    match size:
        case int():
            return size
        case Dim():
            return sizes[size.name]
        case Monomial():
            above = math.prod((sizes[d.name] ** p for d, p in size.powers if p > 0), start=size.coefficient.numerator)
            below = math.prod((sizes[d.name] ** -p for d, p in size.powers if p < 0), start=1)
            return above // (below * size.coefficient.denominator)


_library.impl("part", _launched, "CompositeExplicitAutograd")
torch.library.register_fake("mugraph::part", _imagined, lib=_library)


# -- all else ------------------------------------------------------------------------------------------------------


def _rest(kind: Kind, options: Options, module: Any, inputs: Sequence[Any]) -> tuple[Callable[..., Any], str]:
    """What runs a graph in which parts are replaced, and what that is."""
    if options.rest == "inductor":
        try:
            return _inductor(kind, options, module, inputs), "Inductor"
        except Exception as error:
            _warn("what mugraph leaves of the model", error, "it runs operator by operator")
    return module, "operator by operator"


def _inductor(kind: Kind, options: Options, module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    # CUDA graphs of the forward pass would overwrite what the backward pass reads
    patches = {k: v for k, v in options.inductor.items() if kind == "inference" or k != "triton.cudagraphs"}
    with tracing(TracingContext(detect_fake_mode(inputs))), torch.no_grad():
        compiled: Any = compile_fx(module, list(inputs), config_patches=patches or None)
    return functools.partial(_called, compiled, module)


def _called(compiled: Callable[..., Any], module: Any, *args: Any) -> Any:
    """`module` keeps the runners alive that the compiled code asks for by key."""
    return compiled(*args)


def _warn(what: str, error: Exception, instead: str = "it runs as it was written") -> None:
    """One warning for each thing that goes wrong."""
    text = str(error) if isinstance(error, MugraphError) else f"{type(error).__name__}: {str(error)[:400]}"
    message = f"{what}: {instead}: {text}"
    if message not in _told:
        _told.add(message)
        warnings.warn(FallbackWarning(message), stacklevel=2)


_told: set[str] = set()

# As the entry point of the package does, also where its metadata is not installed.
registry._BACKENDS.setdefault("mugraph", EntryPoint("mugraph", f"{__name__}:mugraph", "torch_dynamo_backends"))
