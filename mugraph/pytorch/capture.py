"""From a PyTorch function or module to a `Program`, through `torch.export`.

The exported ATen graph is run on the traced tensors of the language, so both front ends share one meaning of
broadcasting, views and promotion.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from types import FrameType, FunctionType
from typing import Any, cast

from mugraph.dsl import tensor as t
from mugraph.dsl.record import Recorder, Value
from mugraph.dsl.tensor import SizeValue, Tensor
from mugraph.dsl.trace import TensorSpec, Tracing, source_line
from mugraph.errors import CaptureError, Location, MugraphError, UnsupportedOpError
from mugraph.ir.axes import Dim, Monomial, Size, over, times
from mugraph.ir.graph import Program
from mugraph.pytorch.calls import is_torch_function
from mugraph.pytorch.compared import Line, described, difference
from mugraph.pytorch.effects import undone
from mugraph.pytorch.ops import IGNORED, agreeing, dtype_of, meaning_of
from mugraph.pytorch.sizes import LEAST

# Operators that are kept whole: their decompositions would hide what they are.
KEPT = (
    "linear.default", "silu.default", "gelu.default", "rms_norm.default", "layer_norm.default", "softmax.int",
    "_safe_softmax.default", "matmul.default", "scaled_dot_product_attention.default", "einsum.default",
    "log_softmax.int", "logsumexp.default",
)  # fmt: skip

# Arithmetic on sizes, which arrives as Python operators.
SIZE_OPERATORS = {"mul", "add", "sub", "floordiv", "truediv", "neg", "pow", "getitem"}


@dataclass(frozen=True)
class Captured:
    """A program and how a call of the original function maps to it.

    `arguments` gives the number of the flattened argument that each of the program's first inputs takes; the others
    are weights, whose tensors (the very ones that the function reads) are in `constants` by input name.  `static` holds
    the arguments that are no tensors and were fixed.  `results` gives for each flattened result the number of the
    program's output, or a fixed value.  `detaches` says that gradients of the function are not those of the program:
    it stops them somewhere, or gives its own.  Keyword-only arguments come after the others.  `natural` gives the
    numbers of inputs whose values must not be negative: indices of operators that do not count from the end.  `notes`
    says which sizes begin at 2 though they were to begin at 1, and why.
    """

    program: Program
    arguments: tuple[int, ...]
    constants: Mapping[str, Any]
    static: Mapping[int, Any]
    results: tuple[int | tuple[Any], ...]
    in_spec: Any
    out_spec: Any
    detaches: bool = False
    natural: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def flatten(self, args: tuple[Any, ...]) -> list[Any]:
        """The program's inputs, weights included, for a call with these arguments.  Raises CaptureError where the
        structure or a fixed argument differs from the captured one."""
        from torch.utils import _pytree as pytree

        leaves, spec = pytree.tree_flatten(args)
        if spec != self.in_spec:
            raise CaptureError("the arguments have another structure than the captured ones")
        for i, value in self.static.items():
            if leaves[i] != value:
                raise CaptureError(f"argument {i} is {leaves[i]!r}, captured was {value!r}", remedy="capture again")
        return [leaves[i] for i in self.arguments] + list(self.constants.values())

    @cached_property
    def is_plain(self) -> bool:
        """Whether the function returns what the program does: one tensor, or a tuple of them."""
        from torch.utils import _pytree as pytree

        count = len(self.results)
        one = count == 1 and self.out_spec.is_leaf()
        several = count > 1 and self.out_spec == pytree.tree_structure((0,) * count)
        return (one or several) and self.results == tuple(range(count))

    def unflatten(self, outputs: Sequence[Any]) -> Any:
        """The function's result from the program's outputs."""
        from torch.utils import _pytree as pytree

        leaves = [outputs[r] if isinstance(r, int) else r[0] for r in self.results]
        return pytree.tree_unflatten(leaves, self.out_spec)


def capture(
    fn: Callable[..., Any],
    example_args: tuple[Any, ...],
    dynamic: Mapping[str, Mapping[int, Dim]] | None = None,
    name: str | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    live: Sequence[Any] = (),
    modules: Sequence[Any] = (),
) -> Captured:
    """Captures `fn`, a function or a module, called with `example_args` (tensors, pytrees of them, plain values and
    functions of PyTorch's own, which become fixed) and `example_kwargs`, arguments that go by name only.

    The values of the examples do not matter; examples that are the same tensor are one argument.  `live` lists tensors
    that the function reads besides its arguments, so that a constant is one of them and no detached copy; `modules` are
    modules that it reads.

    `dynamic` names symbolic sizes: `{"x": {0: mg.Dim("B", 1, 256)}}`.  Examples need a size of at least 2 there.  What
    is captured holds from 2 on; where a range begins at 1, that it holds at 1 too is found out by capturing again, and
    the range begins at 2 otherwise.
    Raises CaptureError if torch cannot export the function, UnsupportedOpError for an operator without a meaning here.
    """
    keywords = tuple(example_kwargs or ())
    args = _distinct((*example_args, *(example_kwargs or {}).values()))
    names = [*_argument_names(fn, len(example_args)), *keywords]

    def export(args: tuple[Any, ...], dynamic: Mapping[str, Mapping[int, Dim]]) -> tuple[Any, Any, bool]:
        return _exported(fn, args, names, keywords, dynamic, modules)

    exported, shim, detaches = export(args, dynamic or {})
    above, notes = _not_at_one(exported, args, names, dynamic or {}, lambda *given: export(*given)[0])
    fitting = {
        n: {i: replace(d, min=LEAST) if d.name in above else d for i, d in sizes.items()}
        for n, sizes in (dynamic or {}).items()
    }
    return replace(_Export(exported, shim, fn, args, names, fitting, name, live).run(detaches), notes=notes)


MOST_ALONE = 4  # symbolic sizes that are tried at 1, each alone


def _not_at_one(
    exported: Any,
    args: tuple[Any, ...],
    names: Sequence[str],
    dynamic: Mapping[str, Mapping[int, Dim]],
    export: Callable[[tuple[Any, ...], Mapping[str, Mapping[int, Dim]]], Any],
) -> tuple[set[str], tuple[str, ...]]:
    """The symbolic sizes that were to begin at 1 where the function computes something else at 1 than from 2 on, and
    notes that say so.  Each is tried alone, then those that are left together; more than `MOST_ALONE` are not tried."""
    single = list(dict.fromkeys(d.name for sizes in dynamic.values() for d in sizes.values() if d.min < LEAST <= d.max))

    def differs(at: Sequence[str]) -> str | None:
        fewer = {n: {i: d for i, d in sizes.items() if d.name not in at} for n, sizes in dynamic.items()}
        try:
            other = export(_at_one(args, names, dynamic, at), {n: sizes for n, sizes in fewer.items() if sizes})
        except MugraphError as error:
            return f"at 1 the function is not captured: {error.message}" + (f", {error.where}" if error.where else "")
        pair = difference(*(_lines(e, args, names, dynamic, at) for e in (exported, other)))
        if pair is None:
            return None
        where = user_line(pair[1].trace) or user_line(pair[0].trace)
        return "at 1 the function computes something else" + (f", {where}" if where else "")

    found = dict.fromkeys(single[MOST_ALONE:], "too many sizes begin at 1 to try them all")
    found |= {n: why for n in single[:MOST_ALONE] if len(single) > 1 and (why := differs([n])) is not None}
    left = [n for n in single if n not in found]
    if left and (why := differs(left)) is not None:
        found |= dict.fromkeys(left, why)
    return set(found), tuple(f"{n} begins at {LEAST}: {why}" for n, why in found.items())


def _at_one(
    args: tuple[Any, ...], names: Sequence[str], dynamic: Mapping[str, Mapping[int, Dim]], at: Sequence[str]
) -> tuple[Any, ...]:
    """The examples with 1 along these sizes; those that are the same tensor stay so."""
    found: dict[Any, Any] = {}
    examples = []
    for name, x in zip(names, args, strict=True):
        shape = tuple(
            1 if i in dynamic.get(name, {}) and dynamic[name][i].name in at else n
            for i, n in enumerate(getattr(x, "shape", ()))
        )
        same = shape == tuple(getattr(x, "shape", ()))
        examples.append(x if same else found.setdefault((id(x), shape), x.new_empty(shape)))
    return _distinct(tuple(examples))


def _lines(
    exported: Any,
    args: tuple[Any, ...],
    names: Sequence[str],
    dynamic: Mapping[str, Mapping[int, Dim]],
    at: Sequence[str],
) -> list[Line]:
    """The exported graph as text, with the names of symbolic sizes, and with 1 for these."""
    from torch.utils import _pytree as pytree

    user = [s.arg.name for s in exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"]
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    symbols: dict[str, str | int] = {}
    place = 0
    for name, x in zip(names, args, strict=True):
        for i, d in dynamic.get(name, {}).items():
            symbols[str(values[user[place]].shape[i])] = 1 if d.name in at else d.name
        place += len(pytree.tree_leaves(x))
    return described(exported, symbols)


def decompositions() -> Any:
    """PyTorch's table of what operators are made of, without those that have a meaning here as they are."""
    import torch

    table: Any = torch.export.default_decompositions()
    for key in [k for k in table if str(k).removeprefix("aten.") in KEPT]:
        table.pop(key)
    return table


def _distinct(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with tensors without values in the place of tensors, of which those are one that were one."""
    import torch
    from torch.utils import _pytree as pytree

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
            return x
        if id(x) not in made:
            with torch.inference_mode(False):  # autograd, which torch.export runs, refuses tensors made in that mode
                fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                fresh = torch.nn.Parameter(fresh, False) if isinstance(x, torch.nn.Parameter) else fresh
                made[id(x)] = fresh.requires_grad_(x.requires_grad)
        return made[id(x)]

    made: dict[int, Any] = {}
    found: tuple[Any, ...] = pytree.tree_map(own, args)
    return found


def _exported(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    names: Sequence[str],
    keywords: Sequence[str],
    dynamic: Mapping[str, Mapping[int, Dim]],
    modules: Sequence[Any],
) -> tuple[Any, Any, bool]:
    """The exported program, the module that torch.export was given, and whether gradients are stopped in it."""
    import torch
    from torch._dynamo.convert_frame import compile_lock
    from torch.utils import _pytree as pytree

    called = _named_forward(fn)
    functions = {i: x for i, x in enumerate(args) if is_torch_function(x)}  # torch.export takes none
    args = tuple(None if i in functions else x for i, x in enumerate(args))
    reads = _reads()
    positional = len(args) - len(keywords)
    # torch.export writes down the casts of a block in the function; one around the export itself it does not see
    own = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    autocast: Any = nullcontext() if own is None else torch.autocast("cpu", own, cache_enabled=False)

    class Shim(torch.nn.Module):
        """torch.export takes modules only."""

        def __init__(self) -> None:
            super().__init__()
            if isinstance(fn, torch.nn.Module):
                self.inner = fn
            for i, m in enumerate(modules):
                if not any(m is known for known in self.modules()):
                    self.add_module(f"module{i}", m)

        def forward(self, *args: Any) -> Any:
            args = tuple(functions.get(i, x) for i, x in enumerate(args))
            given, structure = pytree.tree_flatten(args)
            with undone(fn), autocast, reads, _refused_questions():
                try:
                    found = called(*args[:positional], **dict(zip(keywords, args[positional:], strict=True)))
                except Exception as error:  # before torch.export tells of it in its own way
                    raise _uncaptured(fn, error) from error
            left, now = pytree.tree_flatten(args)
            if now != structure or any(a is not b for a, b in zip(left, given, strict=True)):
                raise CaptureError("the function changes a container that it is given", remedy="return the new values")
            return found

    if unknown := sorted(set(dynamic) - set(names)):
        raise CaptureError(f"there is no argument {unknown[0]}", remedy=f"known: {', '.join(names)}")
    dims = {
        d.name: torch.export.Dim(d.name, min=d.min, max=d.max) for sizes in dynamic.values() for d in sizes.values()
    }
    shapes = tuple({i: dims[d.name] for i, d in dynamic[n].items()} if n in dynamic else None for n in names)
    shim, shaped = Shim(), {"args": shapes} if dynamic else None
    try:
        with (
            compile_lock,  # torch.compile in another thread changes the same state of PyTorch
            warnings.catch_warnings(),
            _unlogged(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(shim, args, strict=False, dynamic_shapes=shaped)
            detaches = reads.gives_gradients or _detaches(program)
            return program.run_decompositions(decompositions()), shim, detaches
    except Exception as error:
        raise _uncaptured(fn, error) from error


def _uncaptured(fn: Callable[..., Any], error: Exception) -> MugraphError:
    """The error that says why a function cannot be captured."""
    if isinstance(error, MugraphError):
        return error
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CaptureError(
        f"torch.export cannot capture {getattr(fn, '__name__', type(fn).__name__)}: {first}",
        where=_raised_at(error),
        remedy="remove branches on data and in-place writes to inputs; examples need 2 or more in dynamic sizes",
    )


# Where PyTorch writes to its log what it raises too.
_LOGS = ("torch._subclasses.fake_tensor", "torch.export._trace", "torch.fx.experimental.symbolic_shapes")


@contextmanager
def _unlogged() -> Iterator[None]:
    """What this thread's capture raises is not logged as well."""
    mine = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != mine

    for name in _LOGS:
        logging.getLogger(name).addFilter(is_of_others)
    try:
        yield
    finally:
        for name in _LOGS:
            logging.getLogger(name).removeFilter(is_of_others)


# Operators whose gradient PyTorch writes down itself, where that of their parts is another at a border, at zero, or
# where a part that is not chosen overflows.
OWN_GRADIENTS = {
    "hardtanh", "relu6", "hardswish", "hardsigmoid", "linalg_vector_norm", "linalg_norm", "norm", "std", "std_mean",
    "cdist", "cosine_similarity", "pairwise_distance", "softplus", "mish", "elu", "selu", "celu", "log_sigmoid",
    "log_sigmoid_forward", "logit", "hardshrink", "softshrink", "sign", "sgn", "where", "masked_fill", "floor", "ceil",
    "round", "trunc",
}  # fmt: skip


def _detaches(program: Any) -> bool:
    """Whether the gradients of the graph are not those of its values: it detaches some or computes some without
    gradients, or has an operator whose gradient is its own."""
    stops = ("detach", "set_grad_enabled", "inference_mode")
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    nodes = [n for g in graphs for n in g.nodes if n.op == "call_function"]
    return any(any(stop in str(n.target) for stop in stops) or _has_own_gradient(n) for n in nodes)


def _has_own_gradient(node: Any) -> bool:
    """An embedding leaves out the row that stands for padding."""
    base = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
    if base == "embedding":
        return len(node.args) > 2 and node.args[2] != -1
    return base in OWN_GRADIENTS


# What tells calls apart that have one signature, and values that a trace takes for constants.
_LAYOUT = {"is_contiguous", "stride", "storage_offset", "data_ptr"}
_NEED = {"requires_grad", "requires_grad_", "is_leaf", "grad_fn"}
_VALUES = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__"}


def _is_in_autograd_function() -> bool:
    """Whether the forward of a torch.autograd.Function is running."""
    import torch

    applying = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined, unused-ignore]
    step: FrameType | None = sys._getframe(1)
    while step is not None and step.f_code is not applying:
        step = step.f_back
    return step is not None


# Functions of PyTorch that change their first argument, with those whose names end with one underscore.
_WRITES = frozenset({
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
})  # fmt: skip


def _written(name: str, args: Sequence[Any], out: Any) -> tuple[Any, ...]:
    """What a function of PyTorch by this name writes into."""
    changes = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    return (*(args[:1] if changes else ()), out)


def _reads() -> Any:
    """A mode that refuses writes into tensors that are not traced, and what a function asks of tensors and a signature
    does not tell, if its own code asks; and notices gradients that it gives itself: hooks of tensors and autograd
    functions.  Raises CaptureError in the function."""
    import torch
    from torch.overrides import TorchFunctionMode
    from torch.utils import _pytree as pytree

    real = (torch.Tensor, torch.nn.Parameter)  # not what stands for a tensor in the trace

    class Reads(TorchFunctionMode):  # type: ignore[misc, unused-ignore]
        gives_gradients = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, asking = getattr(func, "__name__", ""), sys._getframe(1)
            written = _written(name, args, (kwargs or {}).get("out"))
            if any(type(x) in real for x in pytree.tree_leaves(written)):
                raise CaptureError(
                    f"the function writes into a tensor that it reads ({name})",
                    where=source_line(asking.f_code.co_filename, asking.f_lineno),
                    remedy="return the new value instead",
                )
            if name == "__get__":
                name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name == "register_hook" or _is_in_autograd_function():
                self.gives_gradients = True
            found = func(*args, **(kwargs or {}))
            if name in _LAYOUT | _NEED | _VALUES and _is_user(asking.f_code.co_filename):
                what = "how a tensor lies in memory" if name in _LAYOUT else "whether a tensor needs a gradient"
                raise CaptureError(
                    f"the function asks for {'the value of a tensor' if name in _VALUES else what} ({name})",
                    where=source_line(asking.f_code.co_filename, asking.f_lineno),
                    remedy="ask outside of the function",
                )
            return found

    return Reads()


# What tells calls apart, or a trace from a call, and is no part of a signature.
_STATE = (
    ("torch", "is_grad_enabled"), ("torch", "is_inference_mode_enabled"), ("torch.compiler", "is_compiling"),
    ("torch.compiler", "is_exporting"), ("torch.compiler", "is_dynamo_compiling"), ("torch", "manual_seed"),
    ("torch", "seed"), ("torch", "initial_seed"), ("torch", "get_rng_state"), ("torch", "set_rng_state"),
)  # fmt: skip


@contextmanager
def _refused_questions() -> Iterator[None]:
    """Refuses questions about PyTorch's state, if a function's own code asks.  Raises CaptureError in the function."""
    mine = threading.get_ident()

    def refusing(name: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any, **named: Any) -> Any:
            asking = sys._getframe(1)
            if threading.get_ident() == mine and _is_user(asking.f_code.co_filename):
                raise CaptureError(
                    f"the function asks for PyTorch's state ({name})",
                    where=source_line(asking.f_code.co_filename, asking.f_lineno),
                    remedy="ask outside of the function",
                )
            return ask(*args, **named)

        return asked

    kept = [(sys.modules[module], name, getattr(sys.modules[module], name)) for module, name in _STATE
            if hasattr(sys.modules.get(module), name)]  # fmt: skip
    for module, name, ask in kept:
        setattr(module, name, refusing(name, ask))
    try:
        yield
    finally:
        for module, name, ask in kept:
            setattr(module, name, ask)


def _named_forward(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function under the code name `forward`, because the stack traces of an export keep only such frames."""
    if not isinstance(fn, FunctionType):
        return fn
    code = fn.__code__.replace(co_name="forward")
    copy = FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


def _raised_at(error: BaseException) -> Location | None:
    """The innermost user line of a traceback."""
    found, step = None, error.__traceback__
    while step is not None:
        path = step.tb_frame.f_code.co_filename
        if _is_user(path):
            found = source_line(path, step.tb_lineno)
        step = step.tb_next
    return found


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function or of a module's forward; of a built-in function, which tells none, any arguments."""
    try:
        return inspect.signature(getattr(fn, "forward", fn))
    except ValueError:
        return inspect.signature(lambda *args, **named: None)


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    names: list[str] = []
    for p in signature_of(fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}{i}" for i in range(count - len(names))]
        elif p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and len(names) < count:
            names.append(p.name)
    if len(names) != count:
        raise CaptureError(f"the function takes {len(names)} positional arguments, not {count}")
    return names


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _is_user(path: str) -> bool:
    torch_home = os.path.dirname(os.path.abspath(cast(str, sys.modules["torch"].__file__))) + os.sep
    return not path.startswith((_PACKAGE, torch_home, "torch" + os.sep, "<frozen", "<eval_with_key>"))


def user_line(stack_trace: str | None) -> Location | None:
    """The innermost line of a node's stack trace that is the user's."""
    places = re.findall(r'File "([^"]+)", line (\d+)', stack_trace or "")
    for path, line in reversed(places):
        if _is_user(path):
            return source_line(path, int(line))
    return None


class Interpreter:
    """Runs nodes of an ATen graph on traced tensors.

    `values` holds what each node is so far, `symbols` the symbolic size that each size expression of torch stands for;
    `device` is the type of the device that tensors are on.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.tracing = Tracing(Recorder())
        self.values: dict[Any, Any] = {}
        self.names: dict[Value, str] = {}
        self.symbols: dict[str, Dim] = {}

    # -- sizes -------------------------------------------------------------------------------------------------

    def size(self, size: Any) -> Size:
        """A torch size, int or symbolic, as a Size."""
        expr = getattr(getattr(size, "node", None), "expr", None)
        return int(size) if expr is None else self._expression(expr)

    def _expression(self, expr: Any) -> Size:
        if expr.is_Integer:
            return int(expr)
        if expr.is_Symbol and str(expr) in self.symbols:
            return self.symbols[str(expr)]
        if expr.is_Mul:
            result: Size = 1
            for factor in expr.args:
                inverse = factor.is_Pow and factor.args[1] == -1
                result = over(result, self._expression(factor.args[0])) if inverse else times(
                    result, self._expression(factor)
                )  # fmt: skip
            return result
        raise CaptureError(f"the size {expr} is not understood", remedy="name it in `dynamic`")

    # -- operators ---------------------------------------------------------------------------------------------

    def value(self, arg: Any) -> Any:
        import torch

        if isinstance(arg, torch.fx.Node):
            return self.values[arg]
        if isinstance(arg, list | tuple):
            return [self.value(a) for a in arg]
        return arg

    def call(self, node: Any) -> None:
        name = str(node.target)
        where = user_line(node.meta.get("stack_trace"))
        self.tracing.recorder.where = where
        args = [self.value(a) for a in node.args]
        kwargs = {k: self.value(v) for k, v in node.kwargs.items() if v is not None}
        try:
            result = agreeing(self._applied(name, node, args, kwargs), node.meta.get("val"), self.device)
        except MugraphError as error:
            error.where = error.where or (None if where is None else str(where))
            error.op = error.op or name
            raise
        except TypeError as error:
            raise _unsupported(f"{name} with these arguments", name, where) from error
        self.values[node] = result
        if isinstance(result, Tensor):
            self.names.setdefault(result.value, node.name)

    def _applied(self, name: str, node: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name.startswith(("aten.", "prims.")):
            base = name.split(".")[1]
            if base in IGNORED:
                return None
            if base == "sym_size":
                return t.dim_size(args[0], t.normal_axis(args[0], args[1]))
            meaning = meaning_of(name, self.tracing.recorder)
            if meaning is not None:
                return meaning(*args, **kwargs)
        elif getattr(node.target, "__module__", "") == "_operator":
            if node.target.__name__ in SIZE_OPERATORS:
                return node.target(*args)
            if all(isinstance(a, SizeValue | int | bool) for a in args):
                return None  # a condition on sizes, asserted by the next node
        raise _unsupported(f"the operator {name} is not supported", name, self.tracing.recorder.where)


class _Export(Interpreter):
    """Runs an exported graph on traced tensors."""

    def __init__(
        self,
        exported: Any,
        shim: Any,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        names: Sequence[str],
        dynamic: Mapping[str, Mapping[int, Dim]],
        name: str | None,
        live: Sequence[Any],
    ) -> None:
        from torch.utils import _pytree as pytree

        super().__init__()
        self.exported = exported
        self.shim = shim
        self.live = live
        self.name = name or re.sub(r"\W", "_", getattr(fn, "__name__", type(fn).__name__)).strip("_") or "program"
        self.leaves, self.in_spec = pytree.tree_flatten(args)
        self.device = next((x.device.type for x in self.leaves if hasattr(x, "device")), "cpu")
        self.leaf_names, self.leaf_dims = self._leaf_names(names, args, dynamic)
        self.arguments: list[int] = []
        self.static: dict[int, Any] = {}
        self.constants: dict[str, Any] = {}

    def _leaf_names(
        self, names: Sequence[str], args: tuple[Any, ...], dynamic: Mapping[str, Mapping[int, Dim]]
    ) -> tuple[list[str], list[Mapping[int, Dim]]]:
        from torch.utils import _pytree as pytree

        found: list[str] = []
        dims: list[Mapping[int, Dim]] = []
        for name, arg in zip(names, args, strict=True):
            count = len(pytree.tree_leaves(arg))
            found += [name] if count == 1 else [f"{name}_{i}" for i in range(count)]
            dims += [dynamic.get(name, {})] * count
        return found, dims

    def run(self, detaches: bool) -> Captured:
        signature = self.exported.graph_signature
        self._refuse_mutation(signature)
        kinds = {spec.arg.name: spec for spec in signature.input_specs}
        nodes = list(self.exported.graph.nodes)
        user = [n for n in nodes if n.op == "placeholder" and kinds[n.name].kind.name == "USER_INPUT"]
        for i, node in enumerate(user):
            self._user_input(node, i)
        for node in nodes:
            is_token = node.op == "placeholder" and kinds[node.name].kind.name == "TOKEN"
            if node.op == "placeholder" and node not in self.values and node.users and not is_token:
                self._weight(node, kinds[node.name])
        for node in nodes:
            if node.op == "call_function":
                self.call(node)
        return self._captured(next(n for n in nodes if n.op == "output"), detaches)

    def _refuse_mutation(self, signature: Any) -> None:
        for spec in signature.output_specs:
            if spec.kind.name not in ("USER_OUTPUT", "TOKEN"):  # a token orders effects, whose operators are refused
                raise UnsupportedOpError(
                    f"the function writes into {spec.target or 'an input'}",
                    remedy="return the new value instead of writing in place",
                )

    # -- inputs ------------------------------------------------------------------------------------------------

    def _user_input(self, node: Any, i: int) -> None:
        import torch

        leaf = self.leaves[i]
        if not isinstance(leaf, torch.Tensor):
            self.static[i] = self.values[node] = leaf
            return
        shape = node.meta["val"].shape
        for place, dim in self.leaf_dims[i].items():
            symbol = str(getattr(getattr(shape[place], "node", None), "expr", shape[place]))
            self.symbols.setdefault(symbol, dim)
        sizes = tuple(self.size(s) for s in shape)
        self.values[node] = self.tracing.input(self.leaf_names[i], TensorSpec(dtype_of(leaf.dtype), sizes))
        self.arguments.append(i)

    def _weight(self, node: Any, spec: Any) -> None:
        value, made_inside = self._constant(spec.target)
        if not value.ndim and made_inside:
            self.values[node] = value.item()  # a number that torch lifted
            return
        label = re.sub(r"\W", "_", spec.target.removeprefix("inner."))
        while label in self.constants or label in self.leaf_names:
            label += "_"
        kept = TensorSpec(dtype_of(value.dtype), tuple(value.shape), constant=True)
        self.values[node] = self.tracing.input(label, kept)
        self.constants[label] = value

    def _constant(self, target: str) -> tuple[Any, bool]:
        """The tensor itself that the function reads, and whether it may be one that the function makes."""
        import torch

        owner, _, own = target.rpartition(".")
        try:
            found = getattr(self.shim.get_submodule(owner), own)
        except AttributeError:
            found = None
        if isinstance(found, torch.Tensor):
            return found, False
        tables = (self.exported.state_dict, self.exported.constants)
        value = next(table[target] for table in tables if target in table)
        for x in self.live:
            if x is value:
                return x, False
        for x in self.live:  # torch.export lifts a detached copy of what needs a gradient, on the same memory
            if x.requires_grad and _same_memory(x, value):
                return x, False
        return value, True

    # -- results -----------------------------------------------------------------------------------------------

    def _captured(self, node: Any, detaches: bool) -> Captured:
        outputs: list[Tensor] = []
        results: list[int | tuple[Any]] = []
        for found in self.value(list(node.args[0])):
            if isinstance(found, Tensor):
                results.append(len(outputs))
                outputs.append(found)
            elif isinstance(found, SizeValue | Dim | Monomial):
                raise CaptureError("the function returns a symbolic size", remedy="return tensors only")
            else:
                results.append((found,))
        self.tracing.recorder.where = None
        program = self.tracing.finish(self.name, outputs, None, self.names)
        natural = [n for n, (_, x, _) in enumerate(self.tracing.inputs) if x.value in self.tracing.recorder.natural]
        return Captured(
            program,
            tuple(self.arguments),
            self.constants,
            self.static,
            tuple(results),
            self.in_spec,
            self.exported.call_spec.out_spec,
            detaches,
            tuple(natural),
        )


def _same_memory(a: Any, b: Any) -> bool:
    described = [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return bool(described[0] == described[1])


def _unsupported(message: str, name: str, where: Location | None) -> UnsupportedOpError:
    remedy = "keep it outside the optimised function; the function can be split around it"
    return UnsupportedOpError(message, op=name, where=where, remedy=remedy)
