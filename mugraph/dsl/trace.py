"""From a Python function to a `Program`.

    B = mg.Dim("B", 1, 4096)

    @mg.program
    def f(x: mg.f16[B, 4096], w: mg.constant(mg.f16[4096, 6144])):
        return mg.rms_norm(x) @ w

The function runs once, on traced tensors.  The name `f` is then a `Program`, a value.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mugraph.dsl.record import Naming, Recorded, Recorder, Resolver, Value
from mugraph.dsl.tensor import Tensor
from mugraph.dsl.unify import Var, VarDims
from mugraph.errors import CaptureError, Location, ShapeError, UnsupportedOpError
from mugraph.ir.axes import Dim, Monomial, Size, dims_of
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Cast, Reshape, Transpose
from mugraph.ir.types import DType, Input, Output, Storage
from mugraph.ir.types import Tensor as Declared


@dataclass(frozen=True)
class TensorSpec:
    """The annotation of an argument: element type and shape.  `constant` marks a weight.  A dimension may be named:
    `mg.f16["b", "k=4096"]`."""

    dtype: DType
    shape: tuple[Size, ...]
    constant: bool = False
    names: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        text = f"{self.dtype}[{', '.join(map(str, self.shape))}]"
        return f"constant({text})" if self.constant else text


@dataclass(frozen=True)
class ElementType:
    """`mg.f16`: an element type, which a shape in brackets makes an annotation."""

    dtype: DType

    def __getitem__(self, shape: Any) -> TensorSpec:
        sizes = shape if isinstance(shape, tuple) else (shape,)
        pairs = [_dimension(s) for s in sizes]
        return TensorSpec(self.dtype, tuple(s for s, _ in pairs), names=tuple(n for _, n in pairs))

    def __str__(self) -> str:
        return str(self.dtype)


def _dimension(size: Any) -> tuple[Size, str | None]:
    """A size and the name of its axis.  Raises ShapeError for anything below 1."""
    name = None
    if isinstance(size, str):
        if match := re.fullmatch(r"\s*([^\W\d]\w*)\s*=\s*(-?\d+)\s*", size):
            name, size = match[1], int(match[2])
        else:
            size = Dim(size)
    if hasattr(size, "__index__") and not isinstance(size, bool):
        size = int(size)
    if not isinstance(size, int | Dim | Monomial) or isinstance(size, bool):
        raise ShapeError(f"{size!r} is no size", remedy="use an int, a Dim or the name of a symbolic size")
    if isinstance(size, int) and size < 1:
        raise ShapeError(f"an axis of size {size}", remedy="every dimension has at least one element")
    return size, name


f64, f32, bf16, f16 = map(ElementType, (DType.f64, DType.f32, DType.bf16, DType.f16))
f8e4m3, f8e5m2 = map(ElementType, (DType.f8e4m3, DType.f8e5m2))
i64, i32, i16, i8, u8 = map(ElementType, (DType.i64, DType.i32, DType.i16, DType.i8, DType.u8))
i6, i4, u4, i2, u2, i1 = map(ElementType, (DType.i6, DType.i4, DType.u4, DType.i2, DType.u2, DType.i1))
bool_ = ElementType(DType.bool)


def constant(spec: TensorSpec) -> TensorSpec:
    """Marks an argument as a weight: what weights alone determine may be computed once, ahead of the calls, and again
    after a write that PyTorch counts (not one through `.data` or NumPy) or for another tensor."""
    return replace(_as_spec(spec, "constant"), constant=True)


def _as_spec(annotation: Any, name: str) -> TensorSpec:
    match annotation:
        case TensorSpec():
            return annotation
        case ElementType(dtype):
            return TensorSpec(dtype, ())
        case _:
            raise CaptureError(
                f"{name} is annotated {annotation!r}, which is no tensor type",
                remedy='annotate it, for instance mg.f16["B", 4096]',
            )


def program(fn: Callable[..., Any]) -> Program:
    """Decorator: the program that an annotated function writes down.

    Raises CaptureError for an argument without a type and for results that are no tensors, ShapeError where shapes
    do not fit, UnsupportedOpError for what the language does not have; each names the user's line.
    """
    return trace(fn, _annotations(fn))


def trace(
    fn: Callable[..., Any],
    specs: Sequence[TensorSpec] | Mapping[str, TensorSpec] | None = None,
    name: str | None = None,
) -> Program:
    """The program that `fn` writes down when it is called with tensors of these types, in the order of its
    parameters, or by name; without `specs`, by its annotations."""
    if specs is None:
        specs = _annotations(fn)
    if not isinstance(specs, Mapping):
        specs = dict(zip(_parameter_names(fn, len(specs)), specs, strict=True))
    recorder = Recorder(code=getattr(inspect.unwrap(fn), "__code__", None))
    tracing = Tracing(recorder)
    arguments = [tracing.input(n, _as_spec(s, n)) for n, s in specs.items()]
    results = fn(*arguments)
    label = str(name or getattr(fn, "__name__", "program"))
    return tracing.finish(label, results, _definition(fn), frame_names(recorder))


def _parameter_names(fn: Callable[..., Any], count: int) -> list[str]:
    names: list[str] = []
    for p in inspect.signature(fn).parameters.values():
        if p.kind is p.VAR_POSITIONAL:
            names += [f"{p.name}{i}" for i in range(count - len(names))]
        elif p.kind is not p.VAR_KEYWORD and len(names) < count:
            names.append(p.name)
    if len(names) != count:
        raise CaptureError(f"{fn!r} takes {len(names)} arguments, not {count}", where=_definition(fn))
    return names


def _definition(fn: Callable[..., Any]) -> Location | None:
    code = getattr(inspect.unwrap(fn), "__code__", None)
    return code and source_line(code.co_filename, code.co_firstlineno)


def source_line(path: str, line: int) -> Location:
    """A place in a user's file, relative to the working directory."""
    return Location(path.removeprefix(os.getcwd() + os.sep), line, linecache.getline(path, line).strip())


def _annotations(fn: Callable[..., Any]) -> dict[str, TensorSpec]:
    """The annotation of every parameter; those that are text (as under `from __future__ import annotations`) are read
    in the scope of the definition."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mugraph."):
        frame = frame.f_back
    closure = inspect.getclosurevars(fn)
    scope = {**getattr(fn, "__globals__", {}), **frame.f_locals, **closure.nonlocals}
    found = {}
    for p in inspect.signature(fn).parameters.values():
        if p.annotation is p.empty:
            raise CaptureError(
                f"the argument {p.name} has no type",
                where=_definition(fn),
                remedy=f'annotate it, for instance {p.name}: mg.f16["B", 4096]',
            )
        annotation = p.annotation
        if isinstance(annotation, str):
            try:
                annotation = eval(annotation, scope)
            except NameError as error:
                raise CaptureError(f"the type of {p.name} is not known: {error}", where=_definition(fn)) from error
        try:
            found[p.name] = _as_spec(annotation, f"the argument {p.name}")
        except CaptureError as error:
            raise CaptureError(error.message, where=_definition(fn), remedy=error.remedy) from None
    return found


class Tracing:
    """One program being written: its inputs, and at the end the program."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.inputs: list[tuple[str, Tensor, bool]] = []
        self._dims: dict[str, Dim] = {}

    def input(self, name: str, spec: TensorSpec) -> Tensor:
        """A new input.  Every dimension but static ones gets an axis of its own."""
        names = spec.names or (None,) * len(spec.shape)
        dims = tuple(self._axis(size, axis) for size, axis in zip(spec.shape, names, strict=True))
        value = self.recorder.value((v for d in dims for v in d), spec.dtype, name)
        x = Tensor(self.recorder, value, dims)
        self.inputs.append((name, x, spec.constant))
        return x

    def _axis(self, size: Size, name: str | None) -> tuple[Var, ...]:
        if isinstance(size, int) and size < 1:
            raise ShapeError(f"an axis of size {size}", remedy="every dimension has at least one element")
        for dim in dims_of(size):
            known = self._dims.setdefault(dim.name, dim)
            if known != dim and Dim(dim.name) in (known, dim):  # a size given by its name alone
                if isinstance(size, Dim) and size == Dim(dim.name):
                    size = known
                else:
                    raise ShapeError(
                        f"the size {dim.name} is used by name before its Dim is", remedy="use the Dim first"
                    )
            elif known != dim:
                raise ShapeError(f"two sizes are called {dim.name}, with different ranges")
        if size == 1:
            return ()
        return (self.recorder.axes.fresh(size, *([(0, name)] if name else [])),)

    def finish(
        self, name: str, results: Any, where: Location | None, names: Mapping[Value, str] | None = None
    ) -> Program:
        """The program whose outputs are `results`: a tensor, or a tuple or list of tensors."""
        outputs = self._checked(results, where)
        recorder = self.recorder
        recorder.settle()
        steps = self._needed(outputs)
        self._check_casts(steps)
        names = self._value_names(steps, outputs, names or {})
        naming = Naming(recorder.axes)
        naming.name(self._axis_order(steps, outputs))
        resolver = Resolver(recorder, naming, names)
        inputs = []
        for label, x, is_constant in self.inputs:
            declared = Declared(label, resolver.dims(x.dims), x.dtype)
            resolver.declare(declared)
            inputs.append(Input(declared, Storage(x.dtype), is_constant))
        layouts = self._layouts(outputs)
        equations = list(resolver.equations(steps, layouts))
        finals = []
        for n, x in enumerate(outputs):
            final = names[x.value]
            if layouts.get(x.value) is not x.dims:
                equation = self._shown(resolver, x, "out" if len(outputs) == 1 else f"out{n}")
                equations.append(equation)
                final = equation.target.name
            finals.append(Output(final, Storage(x.dtype)))
        return Program(name, tuple(inputs), tuple(equations), tuple(finals))

    def _check_casts(self, steps: Sequence[Recorded]) -> None:
        """Refuses to round to a type that no input has and to go on in a wider one, and to compute in f64 with what is
        narrower: casts between floats are the identity in the algebra, and here the rounding, or its lack, is what is
        asked for."""
        given = {x.dtype for _, x, _ in self.inputs}
        used = {a for step in steps for a in step.args}
        rounded: dict[Value, DType] = {}
        for step in steps:
            floats = [a for a in (*step.args, step.target) if a.dtype.is_float]
            widest = max((a.dtype.bits for a in floats), default=0)
            narrower = any(a.dtype.is_float and a.dtype.bits < 64 and a.vars for a in step.args)
            if widest == 64 and narrower and (step.target in used or step.target.dtype is not DType.f64):
                raise UnsupportedOpError(
                    "a value of a narrower type is computed with in f64",
                    op="cast",
                    where=step.where,
                    remedy="do it outside the program",
                )
            if isinstance(step.op, Cast) and len(floats) == 2 and step.target.dtype.bits < widest:
                if step.target.dtype not in given:
                    rounded[step.target] = step.args[0].dtype
                continue
            for a in step.args:
                if a in rounded and a.dtype.bits < widest:
                    raise UnsupportedOpError(
                        f"a value is rounded from {rounded[a]} to {a.dtype}, and goes on in a wider type",
                        op="cast",
                        where=step.where,
                        remedy="leave out the rounding, which would not be kept, or do it outside the program",
                    )

    def _checked(self, results: Any, where: Location | None) -> list[Tensor]:
        outputs = list(results) if isinstance(results, tuple | list) else [] if results is None else [results]
        if not outputs:
            raise CaptureError("the program has no outputs", where=where, remedy="return a tensor")
        for x in outputs:
            if not isinstance(x, Tensor):
                raise CaptureError(f"the program returns {type(x).__name__}, not a tensor", where=where)
            if x.recorder is not self.recorder:
                raise CaptureError("the program returns a tensor of another trace", where=where)
            if x.masked is not None:
                raise UnsupportedOpError(
                    "an output holds minus infinity", where=where, remedy="return exp or softmax of it"
                )
        return [self._materialised(x) for x in outputs]

    def _materialised(self, x: Tensor) -> Tensor:
        """An output with all its axes in its value: repeated ones stored."""
        value = self.recorder.spread(x.value, [v for d in x.dims for v in d])
        return Tensor(self.recorder, value, x.dims)

    def _needed(self, outputs: Sequence[Tensor]) -> list[Recorded]:
        alive = {x.value for x in outputs}
        kept = []
        for step in reversed(self.recorder.steps):
            if step.target in alive:
                kept.append(step)
                alive.update(step.args)
        return kept[::-1]

    def _layouts(self, outputs: Sequence[Tensor]) -> dict[Value, VarDims]:
        """The dimensions of the values that are outputs as they are; the first use of a value decides."""
        inputs = {x.value: x.dims for _, x, _ in self.inputs}
        layouts: dict[Value, VarDims] = {}
        for x in outputs:
            if x.value not in inputs:
                layouts.setdefault(x.value, x.dims)
        return layouts

    def _shown(self, resolver: Resolver, x: Tensor, name: str) -> Equation:
        """The equation for an output that shows an input, or another output's value, under other dimensions."""
        held = resolver.tensors[resolver.names[x.value]]
        dims = resolver.dims(x.dims)
        op = Transpose() if sorted(dims) == sorted(held.dims) else Reshape(dims)
        taken = {*resolver.names.values(), *resolver.tensors}
        return Equation((Declared(free_name(name, taken), dims, x.dtype),), op, (held.name,), None)

    def _axis_order(self, steps: Sequence[Recorded], outputs: Sequence[Tensor]) -> Iterator[Var]:
        for _, x, _ in self.inputs:
            yield from (v for d in x.dims for v in d)
        for step in steps:
            yield from step.target.vars
        for x in outputs:
            yield from (v for d in x.dims for v in d)

    def _value_names(
        self, steps: Sequence[Recorded], outputs: Sequence[Tensor], wishes: Mapping[Value, str]
    ) -> dict[Value, str]:
        names = {x.value: label for label, x, _ in self.inputs}
        taken = set(names.values())

        def give(value: Value, base: str) -> None:
            names[value] = free_name(base, taken)
            taken.add(names[value])

        for step in steps:
            if step.target in wishes:
                give(step.target, wishes[step.target])
        for n, x in enumerate(outputs):
            if x.value not in names:
                give(x.value, "out" if len(outputs) == 1 else f"out{n}")
        count = 0
        for step in steps:
            if step.target not in names:
                while f"t{count}" in taken:
                    count += 1
                give(step.target, f"t{count}")
        return names


def free_name(base: str, taken: set[str]) -> str:
    """`base`, or `base2`, `base3`, .. where it is taken."""
    return base if base not in taken else next(n for i in range(2, len(taken) + 3) if (n := f"{base}{i}") not in taken)


def frame_names(recorder: Recorder) -> dict[Value, str]:
    """The local names that the traced function gave its values; of several, the first."""
    frame, recorder.frame = recorder.frame, None
    if frame is None:
        return {}
    return local_names(frame.f_locals)


def local_names(scope: Mapping[str, Any]) -> dict[Value, str]:
    found: dict[Value, str] = {}
    for name, x in scope.items():
        if isinstance(x, Tensor) and not name.startswith("_"):
            found.setdefault(x.value, name)
    return found
