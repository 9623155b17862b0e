"""The `numerics` tier: what was emitted agrees with the program in float64.

`numeric_check` draws inputs, runs a callable that it knows nothing about, and compares.  The tolerance of each element
follows from a running error analysis of the program at its own element types: rounding errors of unit size, taken as
independent, are propagated to first order through the program's equations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mugraph.errors import UnsupportedOpError, VerificationError
from mugraph.ir.axes import size_value
from mugraph.ir.evaluate import ArrayAlgebra, FloatAlgebra, Named, aligned, axis_sizes, evaluate, named, shaped
from mugraph.ir.fields import seed_of
from mugraph.ir.graph import Program
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Concat,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    MaskedExp,
    PureOp,
    Rename,
    Reshape,
    Scatter,
    Select,
    Slice,
    Transpose,
)  # fmt: skip
from mugraph.ir.shift import shifted
from mugraph.ir.types import TORCH_NAMES, DType, Input, Tensor
from mugraph.verify.certificate import How, NumericReport, NumericRow
from mugraph.verify.equivalence import Verified

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]
Runner = Callable[..., Sequence["torch.Tensor"]]
Reference = Callable[[Program, Mapping[str, NDArray[Any]], Mapping[str, int]], list[NDArray[Any]]]

# Half the distance from 1 to the next number, greatest finite number, least positive number.
PRECISION: dict[DType, tuple[float, float, float]] = {
    DType.f64: (2.0**-53, float(np.finfo(np.float64).max), 2.0**-1074),
    DType.f32: (2.0**-24, float(np.finfo(np.float32).max), 2.0**-126),  # devices may flush subnormals
    DType.bf16: (2.0**-8, 3.3895313892515355e38, 2.0**-126),
    DType.f16: (2.0**-11, 65504.0, 2.0**-24),
    DType.f8e4m3: (2.0**-4, 448.0, 2.0**-9),
    DType.f8e5m2: (2.0**-3, 57344.0, 2.0**-16),
}
DEVIATIONS = 8.0  # standard deviations of the propagated error that are allowed
ULPS = 2.0  # of the result, on top
EAGER_FACTOR = 2.0  # of the eager program's own error, where that is more
OFFSET = "offset"
GREATEST_OFFSET = 2.0**10
DRAWS = ("normal", "wide", "zeros", "rows", "outlier", "logits", OFFSET)
FURTHER = ("scaled", "positive", "small", "small positive")  # for outputs that no draw about 0 says anything about


@dataclass(frozen=True)
class Checked:
    """A verified μGraph with a source that agrees with float64: what may be launched."""

    verified: Verified
    source_hash: str
    numerics: NumericReport

    def __post_init__(self) -> None:
        if self.numerics.source_hash != self.source_hash:
            raise VerificationError("the numeric report is about another source")
        if self.numerics.disagrees or not self.numerics.counted:
            raise VerificationError(f"the source does not agree with float64: {self.numerics}")


def numeric_check(
    program: Program,
    run: Runner,
    *,
    bindings: Sequence[Mapping[str, int]],
    how: How,
    target: str = "cpu",
    source_hash: str = "",
    draws: Sequence[str] = DRAWS,
    seed: int = 0,
    device: str = "cpu",
    beyond_eager: bool = False,
    product_unit: float = 0.0,
    reference: Reference | None = None,
) -> NumericReport:
    """Compares `run(inputs, bindings) -> outputs` with the program in float64, for all bindings and draws of inputs.

    Inputs are dense tensors by name, of the declared types.  If `run` takes `out=`, it gets buffers full of NaN.
    Draws whose float64 result leaves the output's type, or where the program at its own types overflows, are in the
    report and do not count; with `beyond_eager` only the former are left out (a stabilised graph has to be finite
    where the program as written is not).  Each product in a contraction may be off by `product_unit` of itself, beyond
    what the types of the operands say.  Where no draw is free of overflow for some output (a logarithm of negative
    numbers, products of products), scaled, positive and small inputs are drawn as well.  Raises VerificationError
    where an input is changed or the number, shape or type of outputs is wrong.  The report says whether all is within
    tolerance.
    """
    rows: list[NumericRow] = []

    def compare(kind: str) -> None:
        for bound in bindings:
            arrays = draw_inputs(program, bound, kind, seed)
            given = _run(program, run, arrays, bound, device)
            rows.extend(_rows(program, arrays, bound, kind, given, reference or exact, beyond_eager, product_unit))

    for kind in _kinds(program, draws):
        compare(kind)
    for kind in FURTHER:
        said = {r.output for r in rows if r.counted and not r.note and r.draw != OFFSET}
        if {o.value for o in program.outputs} <= said:
            break
        compare(kind)
    return NumericReport(how, target, source_hash, tuple(rows))


def _kinds(program: Program, draws: Sequence[str]) -> list[str]:
    """Large logits are drawn for programs that take exponentials."""
    has_exp = any(
        isinstance(e.op, MaskedExp) or (isinstance(e.op, Elementwise) and e.op.fn == "exp") for e in program.equations
    )
    if unknown := set(draws) - {*DRAWS, *FURTHER}:
        raise VerificationError(
            f"there is no draw {', '.join(sorted(unknown))}", remedy=f"known: {', '.join((*DRAWS, *FURTHER))}"
        )
    return [d for d in draws if d != "logits" or has_exp]


def _rows(
    program: Program,
    arrays: Mapping[str, NDArray[Any]],
    bound: Mapping[str, int],
    kind: str,
    given: Sequence[Floats],
    reference: Reference,
    beyond_eager: bool,
    product_unit: float,
) -> list[NumericRow]:
    stable = shifted(program)  # a softmax is not excused for the exponentials that frameworks do not let overflow
    wanted = reference(program, arrays, bound)
    if not all(np.isfinite(w).all() for w in wanted):
        wanted = reference(stable, arrays, bound)
    usual, overflowed = eager(stable, arrays, bound)
    deviations = error_deviations(stable, arrays, bound, product_unit)
    rows = []
    for o, want, got, own, deviation in zip(program.outputs, wanted, given, usual, deviations, strict=True):
        dtype = program.tensors()[o.value].dtype
        unit, greatest, least = _precision(program, dtype)
        note = ""
        if not np.isfinite(want).all() or (np.abs(want) > greatest).any():
            note = f"the float64 result leaves {dtype}"
        elif overflowed:
            note = f"the program overflows at its own types ({dtype})"
        with np.errstate(all="ignore"):
            # elements that nearly vanish are compared at the unit of the greatest: their error is far from normal
            floor = 2 * unit * np.abs(want).max(initial=0.0)
            tolerance = DEVIATIONS * deviation + ULPS * (2 * unit * np.abs(want) + least) + floor
            if dtype.is_float and dtype.bits <= 8:  # many deviations of so few digits would let anything pass
                last = np.maximum(unit * np.abs(want), least)
                before = DEVIATIONS * np.sqrt(np.maximum(deviation**2 - last**2, 0.0))
                tolerance = before + last + unit * before
            eager_error = np.abs(_wrapped(own - want, _signed(dtype)))
            if not overflowed:
                tolerance = tolerance * max(1.0, EAGER_FACTOR * _worst(eager_error, tolerance)[0])
            error = np.abs(_wrapped(got - want, _signed(dtype)))
        ratio, at = _worst(error, tolerance)
        rows.append(
            NumericRow(
                output=o.value,
                dtype=str(dtype),
                bindings=tuple(sorted(bound.items())),
                draw=kind,
                error=float(error.max(initial=0.0)),
                tolerance=float(tolerance.ravel()[at]) if tolerance.size else 0.0,
                ratio=ratio,
                eager_error=None if overflowed else float(eager_error.max(initial=0.0)),
                counted=not note or (beyond_eager and overflowed and not note.startswith("the float64")),
                note=note,
            )
        )
    return rows


def _precision(program: Program, dtype: DType) -> tuple[float, float, float]:
    """PRECISION of a declared type.  In a program that also has narrower floats, f64 values may be computed in f32:
    the least precise type involved bounds what the result can be held to."""
    if dtype is DType.f64 and _accumulator(program) is DType.f32:
        dtype = DType.f32
    return PRECISION.get(dtype, (0.0, math.inf, 0.0))


def _signed(dtype: DType) -> DType:
    """The signed type of as many bits: differences of unsigned numbers have a sign."""
    return DType.i8 if dtype is DType.u8 else dtype


def _wrapped(values: NDArray[Any], dtype: DType) -> NDArray[Any]:
    """Integers modulo 2^bits, in the range of their type; other types, and f64's whole range of i64, as they are."""
    if dtype.is_float or dtype is DType.bool or not 8 <= dtype.bits <= 32:
        return values
    low = 0 if dtype is DType.u8 else -(2 ** (dtype.bits - 1))
    wide = values.astype(np.int64 if values.dtype.kind in "biu" else np.float64)
    with np.errstate(all="ignore"):
        wrapped: NDArray[Any] = np.mod(wide - low, 2**dtype.bits) + low
    return wrapped


def _worst(error: Floats, tolerance: Floats) -> tuple[float, int]:
    """The greatest error / tolerance, and where; an error that is no number counts as infinite."""
    if not error.size:
        return 0.0, 0
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0, 0.0, error / tolerance)
    ratio = np.where(np.isnan(ratio), math.inf, ratio).ravel()
    at = int(ratio.argmax())
    return float(ratio[at]), at


# -- inputs and outputs -------------------------------------------------------------------------------------------


def draw_inputs(program: Program, bindings: Mapping[str, int], kind: str, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Arrays by input name, with the declared dimensions; floats are representable in the declared type.

    normal, wide: deviation 1 and 3. zeros. rows: constant along the last dimension. outlier: one entry is 64. logits:
    deviation 8. offset: deviation 1 about 1024, or as far from 0 as leaves the type 4 bits. scaled: deviation K^-1/4
    where a contraction sums K products. positive: at least 1/4, as logarithms and roots need. small: deviation 2^-6.
    small positive: at least 2^-8. Integers index what they gather from, from either end, and take all values of 8
    bits; masks are drawn with every row partly true.
    """
    return {i.name: _draw(program, i, bindings, kind, seed) for i in program.inputs}


def _draw(program: Program, i: Input, bindings: Mapping[str, int], kind: str, seed: int) -> NDArray[Any]:
    rng = np.random.default_rng(seed_of("numeric", seed, i.name, kind, sorted(bindings.items())))
    shape = tuple(size_value(s, bindings) for s in i.tensor.shape)
    if i.tensor.dtype is DType.bool:
        mask = np.asarray(rng.random(shape) < 0.7)
        if shape:
            mask[..., :1] = True
        return mask
    if not i.tensor.dtype.is_float:
        return rng.integers(*index_range(program, i, bindings), shape)
    values = np.asarray(rng.standard_normal(shape))
    match kind:
        case "rows" | "outlier" if not shape:
            pass
        case "wide":
            values *= 3.0
        case "zeros":
            values *= 0.0
        case "rows":
            values = np.broadcast_to(values[..., :1], shape).copy()
        case "outlier":
            values.ravel()[:1] = 64.0
        case "logits":
            values *= 8.0
        case "offset":
            values += min(GREATEST_OFFSET, 2.0**-4 / PRECISION[i.tensor.dtype][0])
        case "scaled":
            values *= _summed(program, i.tensor, bindings) ** -0.25
        case "positive":
            values = np.abs(values) + 0.25
        case "small":
            values *= 2.0**-6
        case "small positive":
            values = (np.abs(values) + 0.25) * 2.0**-6
        case _:
            pass
    return rounded(values, i.tensor.dtype)


def _summed(program: Program, tensor: Tensor, bindings: Mapping[str, int]) -> int:
    """The greatest number of products with elements of the tensor that a contraction sums."""
    sizes = {a.name: size_value(a.size, bindings) for a in tensor.axes}
    contracted = [e.op.axes for e in program.equations if isinstance(e.op, Contract)]
    return max((math.prod(sizes.get(a, 1) for a in axes) for axes in contracted), default=1)


def index_range(program: Program, i: Input, bindings: Mapping[str, int]) -> tuple[int, int]:
    """The least value that an integer input takes, and the one beyond the greatest: both ends of the axes that it
    indexes, all of its type for 8 bits, else a few."""
    tensors = program.tensors()
    same, limits = {i.name}, list[int]()  # the input under other types and views
    for e in program.equations:
        match e.op:
            case Gather(axis) if e.args[1] in same:
                limits.append(next(size_value(a.size, bindings) for a in tensors[e.args[0]].axes if a.name == axis))
            case Scatter(_, out) if e.args[1] in same:
                limits.append(size_value(out.size, bindings))
            case Cast() | Transpose() | Reshape() | Broadcast() | Slice() | Rename() | Concat() | Gather() if (
                e.args[0] in same
            ):
                same.add(e.target.name)
            case _:
                pass
    if limits:
        return -min(limits), min(limits)  # negative indices count from the end
    if i.tensor.dtype.bits == 8:
        return (0, 256) if i.tensor.dtype is DType.u8 else (-128, 128)
    return 0, 8


def _run(
    program: Program, run: Runner, arrays: Mapping[str, NDArray[Any]], bindings: Mapping[str, int], device: str
) -> list[Floats]:
    """The runner's outputs in float64.  Raises VerificationError for a changed input or a wrong type."""
    import torch

    tensors = program.tensors()
    inputs = {i.name: torch.from_numpy(arrays[i.name]).to(_torch(i.tensor.dtype)).to(device) for i in program.inputs}
    kept = {name: t.clone() for name, t in inputs.items()}
    shapes = [tuple(size_value(s, bindings) for s in tensors[o.value].shape) for o in program.outputs]
    dtypes = [_torch(tensors[o.value].dtype) for o in program.outputs]
    if "out" in inspect.signature(run).parameters:
        poison = [_poisoned(s, d, device) for s, d in zip(shapes, dtypes, strict=True)]
        given = list(run(inputs, bindings, out=poison))
    else:
        given = list(run(inputs, bindings))
    if len(given) != len(program.outputs):
        raise VerificationError(f"{len(given)} outputs instead of {len(program.outputs)}")
    for o, t, shape, dtype in zip(program.outputs, given, shapes, dtypes, strict=True):
        if tuple(t.shape) != shape or t.dtype != dtype:
            raise VerificationError(f"{o.value} is {t.dtype}{list(t.shape)}, not {dtype}{list(shape)}")
    written = {o.alias_of for o in program.outputs}
    for name, before in kept.items():
        if name not in written and not torch.equal(inputs[name], before):
            raise VerificationError(f"the run changes its input {name}")
    return [t.detach().to("cpu").to(torch.float64).numpy() for t in given]


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    import torch

    if dtype.is_floating_point:
        return torch.full(shape, math.nan, dtype=dtype, device=device)
    return torch.full(shape, 1, dtype=dtype, device=device)


def _torch(dtype: DType) -> torch.dtype:
    import torch

    if dtype not in TORCH_NAMES:
        raise UnsupportedOpError(f"no torch type holds {dtype}", remedy="keep it in i8 or u8")
    found: torch.dtype = getattr(torch, TORCH_NAMES[dtype])
    return found


# -- the program at its own types ---------------------------------------------------------------------------------


def rounded(values: Floats, dtype: DType) -> Floats:
    """The nearest numbers of the element type, in float64; beyond its range they are infinite (f8e4m3: NaN)."""
    with np.errstate(all="ignore"):
        match dtype:
            case DType.f16:
                return values.astype(np.float16).astype(np.float64)
            case DType.f32:
                return values.astype(np.float32).astype(np.float64)
            case DType.bf16:
                single = np.ascontiguousarray(values, dtype=np.float32)
                bits = single.view(np.uint32)
                even = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
                near = even.view(np.float32).astype(np.float64)
                return np.where(np.isfinite(single), near, values).reshape(values.shape)
            case DType.f8e4m3 | DType.f8e5m2:
                import torch

                single_ = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
                return single_.to(_torch(dtype)).to(torch.float64).numpy().reshape(values.shape)
            case _:
                return values


class ExactAlgebra(FloatAlgebra):
    """Float64 without rounding to declared types; integers wrap to theirs."""

    def declared(self, value: Named, tensor: Tensor) -> Named:
        return super().declared(value, tensor).map(lambda p: _wrapped(p, tensor.dtype))


def exact(program: Program, arrays: Mapping[str, NDArray[Any]], bindings: Mapping[str, int]) -> list[Floats]:
    """The outputs of the program in float64."""
    return _evaluated(program, arrays, ExactAlgebra(axis_sizes(program, bindings)), 0)


class EagerAlgebra(ExactAlgebra):
    """The program as a framework runs it: every result rounded to its declared type, sums in float32 (float64 in a
    program whose floats all are)."""

    def __init__(self, sizes: Mapping[str, int], accumulator: DType) -> None:
        super().__init__(sizes)
        self.accumulator: Any = np.float64 if accumulator is DType.f64 else np.float32
        self.overflowed = False

    def declared(self, value: Named, tensor: Tensor) -> Named:
        value = super().declared(value, tensor)
        exact = value.parts[0]
        assert exact is not None
        if not tensor.dtype.is_float:
            return value
        near = rounded(np.asarray(exact, dtype=np.float64), tensor.dtype)
        self.overflowed |= not np.isfinite(near).all()
        return Named(value.axes, (near,))

    def contract(self, args: Sequence[Named], axes: tuple[str, ...]) -> Named:
        letters = {a: i for i, a in enumerate(dict.fromkeys(a for v in args for a in v.axes))}
        kept = tuple(a for a in letters if a not in axes)
        operands: list[Any] = []
        for v in args:
            part = v.parts[0]
            assert part is not None
            operands += [part.astype(self.accumulator), [letters[a] for a in v.axes]]
        with np.errstate(all="ignore"):
            return Named(kept, (np.asarray(np.einsum(*operands, [letters[a] for a in kept], optimize=True)),))

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        with np.errstate(all="ignore"):
            return super().total(kind, v.map(lambda p: p.astype(self.accumulator)) if kind == "sum" else v, axes)


def eager(
    program: Program, arrays: Mapping[str, NDArray[Any]], bindings: Mapping[str, int]
) -> tuple[list[Floats], bool]:
    """The outputs of the program at its own types, and whether some value overflowed on the way."""
    algebra = EagerAlgebra(axis_sizes(program, bindings), _accumulator(program))
    return _evaluated(program, arrays, algebra, 0), algebra.overflowed


def error_deviations(
    program: Program, arrays: Mapping[str, NDArray[Any]], bindings: Mapping[str, int], product_unit: float = 0.0
) -> list[Floats]:
    """The standard deviation of each output element's rounding error, to first order."""
    double = _precision(program, DType.f64)
    algebra = ErrorAlgebra(axis_sizes(program, bindings), _accumulator(program), double, product_unit)
    return _evaluated(program, arrays, algebra, 1)


def _accumulator(program: Program) -> DType:
    used = {t.dtype for t in program.tensors().values() if t.dtype.is_float and t.axes}
    return DType.f64 if used == {DType.f64} else DType.f32


def _evaluated(
    program: Program, arrays: Mapping[str, NDArray[Any]], algebra: ArrayAlgebra, component: int
) -> list[Floats]:
    tensors = program.tensors()
    inputs: dict[str, Named] = {}
    for i in program.inputs:
        v = named(np.asarray(arrays[i.name]), i.tensor, algebra.sizes)
        extra = (np.zeros(v.parts[0].shape),) if component and v.parts[0] is not None else ()
        inputs[i.name] = Named(v.axes, (*v.parts, *extra))
    with np.errstate(all="ignore"):  # what overflows on the way is seen in the results
        values = evaluate(program, inputs, algebra)
    found = []
    for o in program.outputs:
        v = algebra.expanded(values[o.value], [a.name for a in tensors[o.value].axes])
        found.append(np.asarray(shaped(Named(v.axes, (v.parts[component],)), tensors[o.value]), dtype=np.float64))
    return found


class ErrorAlgebra(ArrayAlgebra):
    """Pairs of a float64 value and the standard deviation of its error: errors of the operands, propagated to first
    order as independent, and one rounding to the type of each result.  Sums add the roundings of the accumulator's
    type, sqrt(K) of them for K summands."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        accumulator: DType,
        double: tuple[float, float, float] = PRECISION[DType.f64],
        product_unit: float = 0.0,
    ) -> None:
        super().__init__(sizes)
        self.product_unit = product_unit
        self.unit = PRECISION[accumulator][0]
        self.precision = PRECISION | {DType.f64: double}
        self.exact = FloatAlgebra(sizes)

    def literal(self, value: Fraction) -> Named:
        return Named((), (np.asarray(float(value)), np.asarray(0.0)))

    def identity(self, monoid: str) -> Named:
        start = self.exact.identity(monoid)
        return Named((), (start.parts[0], np.asarray(0.0)))

    def declared(self, value: Named, tensor: Tensor) -> Named:
        value = super().declared(value, tensor)
        x, s = _pair(value)
        x = _wrapped(x, tensor.dtype)
        unit, _, least = self.precision.get(tensor.dtype, (0.0, 0.0, 0.0))
        with np.errstate(all="ignore"):
            return Named(value.axes, (x, np.hypot(s, np.maximum(unit * np.abs(x), least))))

    def function(self, fn: str, attrs: Mapping[str, str | Fraction], args: Sequence[Named]) -> Named:
        def f(*xs: NDArray[Any]) -> NDArray[Any]:
            return _first(self.exact.function(fn, attrs, [Named(v.axes, (x,)) for v, x in zip(args, xs, strict=True)]))

        pairs = [_pair(v) for v in args]
        x, s = pairs[0]
        result = f(*(p[0] for p in pairs))
        with np.errstate(all="ignore"):
            match fn:
                case "add" | "sub":
                    spread = np.hypot(s, pairs[1][1])
                case "mul":
                    spread = np.hypot(x * pairs[1][1], pairs[1][0] * s)
                case "div":
                    spread = np.hypot(s, result * pairs[1][1]) / np.abs(pairs[1][0])
                case "max" | "min":
                    y, t = pairs[1]
                    near = np.abs(x - y) <= DEVIATIONS * (s + t)  # errors may decide which operand is taken
                    spread = np.where(near, np.maximum(s, t), np.where(result == x, s, t))
                case "and" | "or" | "not":
                    spread = np.zeros(result.shape)
                case _:
                    # how far the function moves when its argument moves by one deviation
                    spread = np.fmax(np.abs(f(x + s) - result), np.abs(f(x - s) - result))
            if fn == "gelu":  # x/2 · (1 + erf): the sum rounds at 1, however near to -1 erf is
                spread = np.hypot(spread, self.unit * np.abs(x) / 2)
        return Named(args[0].axes, (result, np.broadcast_to(np.nan_to_num(spread, nan=0.0), result.shape)))

    def total(self, kind: str, v: Named, axes: tuple[str, ...]) -> Named:
        x, s = _pair(v)
        where = tuple(v.axes.index(a) for a in axes)
        result = self.exact.total(kind, Named(v.axes, (x,)), axes)
        if kind != "sum":
            return Named(result.axes, (result.parts[0], s.max(axis=where, initial=0.0)))
        count = math.prod(x.shape[i] for i in where)
        with np.errstate(all="ignore"):
            variance = (s**2).sum(axis=where) + count * self.unit**2 * (x**2).sum(axis=where)
        return Named(result.axes, (result.parts[0], np.sqrt(variance)))

    def contract(self, args: Sequence[Named], axes: tuple[str, ...]) -> Named:
        def contracted(parts: Sequence[NDArray[Any]]) -> Named:
            return self.exact.contract([Named(v.axes, (p,)) for v, p in zip(args, parts, strict=True)], axes)

        pairs = [_pair(v) for v in args]
        result = contracted([x for x, _ in pairs])
        count = math.prod(self.sizes[a] for a in axes)
        with np.errstate(all="ignore"):
            squares = [x.astype(np.float64) ** 2 for x, _ in pairs]
            variance = _first(contracted(squares)) * (count * self.unit**2 + self.product_unit**2)
            for i, (_, s) in enumerate(pairs):
                variance = variance + _first(contracted([*squares[:i], s**2, *squares[i + 1 :]]))
        return Named(result.axes, (result.parts[0], np.sqrt(variance)))

    def opaque(self, op: PureOp, args: Sequence[Named]) -> tuple[Named, ...]:
        results = self.exact.opaque(op, [Named(v.axes, v.parts[:1]) for v in args])
        axes = results[0].axes
        spreads = [_pair(aligned(v, axes))[1] for v in args if set(v.axes) <= set(axes)]
        shape = _first(results[0]).shape
        spread: NDArray[Any]
        match op:
            case Select():
                mask = _first(aligned(args[0], axes)).astype(bool)
                spread = np.where(mask, spreads[1], spreads[2])
            case MaskedExp():
                value = _first(results[0])
                with np.errstate(all="ignore"):  # what is masked is 0 exactly, however far its argument may be off
                    spread = np.where(value == 0, 0.0, value * np.expm1(spreads[0]))
            case CumSum(axis):
                spread = np.sqrt(np.cumsum(spreads[0] ** 2, axis=axes.index(axis)))
            case Cast(dtype) if dtype.is_float:
                spread = spreads[0]
            case Scatter(_, _, "sum"):
                squares = Named(args[0].axes, (_pair(args[0])[1] ** 2,))
                (sums,) = self.exact.opaque(op, [squares, Named(args[1].axes, args[1].parts[:1])])
                spread = np.sqrt(_first(sums))
            case _:
                spread = np.zeros(shape)
        return tuple(Named(r.axes, (r.parts[0], np.broadcast_to(spread, _first(r).shape))) for r in results)


def _pair(v: Named) -> tuple[NDArray[Any], NDArray[Any]]:
    x, s = v.parts
    assert x is not None
    assert s is not None
    return x, s


def _first(v: Named) -> NDArray[Any]:
    part = v.parts[0]
    assert part is not None
    return part
