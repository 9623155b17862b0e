"""What emitted Triton text does to memory, read by running it on symbols.

    launches = launches_of(source, graph, z3)      # raises Unreadable where it has no rule for what the text does

The text, which must be one that mugraph emitted, is executed as Python with stand-ins for torch and triton.  Sizes,
program ids, lanes and iterations are unknown integers of z3; a stride is a token of its tensor, so an address is one
index per dimension; whatever was loaded is opaque.  An `if` on an unknown is followed both ways.  The body of a loop
runs twice for one unknown iteration, and must do the same to memory both times: what it does then does not depend on
iterations before.

Blocks may count in a tensor of zeros how many of those that share a result have stored, and the last one goes on.
What it does then is read as a launch of its own, of one block for each result, after the first one.
A persistent kernel loops over tiles from its program id, with the number of programs as the step: (program, iteration)
and tile are one to one, so the tile is what a program id would be.

A tensor descriptor has to be that of a whole tensor.  What it loads is a read of the entries that there are; the
rest of a tile is filled with zeros.  Whether it may be used goes by the layout of tensors: both ways are followed.

A program id, like a lane, is a counter: `n % f` and `n // f` are its low digits and the rest, where f is a product of
factors of its count.  So they are unknowns of their own with known ranges, and indices stay linear.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from types import FunctionType, SimpleNamespace
from typing import Any, Literal

from mugraph.errors import ShapeError, VerificationError
from mugraph.ir.axes import Dim, Monomial, Size, over, times
from mugraph.ir.graph import Program
from mugraph.ir.types import TORCH_NAMES


class Unreadable(Exception):
    """The text does what this module has no rule for."""


@dataclass(eq=False)
class Buffer:
    """A tensor that kernels read or write.  `made`: where its entries come from; those of "empty" only from stores,
    those of "copied" from `source`.  `dtype`: its name in torch, where the text says it."""

    name: str
    shape: tuple[Size, ...]
    made: Literal["given", "empty", "zeroed", "copied", "counters"] = "given"
    dtype: str | None = None
    source: Buffer | None = None


@dataclass(frozen=True)
class Term:
    """`index * coefficient` entries along a dimension; `wide`: the offset is computed in 64 bits."""

    dim: int
    index: Any
    coefficient: Size
    wide: bool


@dataclass(frozen=True)
class Access:
    """A load, store or atomic addition.  `holds`: what is true where it happens, its mask included; `digits`: the
    unknowns that tell apart who does it; `linked`: equations between these and others."""

    where: str
    kind: str
    buffer: Buffer
    terms: tuple[Term, ...]
    holds: tuple[Any, ...]
    digits: tuple[Any, ...]
    linked: tuple[tuple[Any, Any], ...]

    def key(self) -> tuple[object, ...]:
        return self.kind, self.buffer, str(self.terms), str(self.holds)


@dataclass(frozen=True)
class Launch:
    """`result`: in which all blocks that store for one result agree, where the last of these goes on in the next
    launch."""

    name: str
    accesses: tuple[Access, ...]
    result: Any = None


@dataclass
class Reading:
    """All launches in order, the tensors that come back, and what holds of the sizes.  With `out=` given, `run` does
    the same to other tensors, which come back."""

    launches: list[Launch]
    results: tuple[Buffer, ...]
    sizes: Sizes


def launches_of(source: str, graph: Program, z3: Any) -> Reading:
    """Raises Unreadable, and VerificationError where a stride of one tensor moves in another, or `run` does not give
    what the graph gives."""
    readers = []
    for has_out in (False, True):
        reader = _Reader(graph, z3)
        try:
            reader.run(source, has_out)
        except (Unreadable, VerificationError):
            raise
        except Exception as error:  # the stand-ins lack something that the text asks for
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        readers.append(reader)
    first, second = readers
    first.results_fit()
    _same_but_for_results(first, second)
    return Reading(first.launches, first.results, first.sizes)


def _same_but_for_results(first: _Reader, second: _Reader) -> None:
    """Raises VerificationError where `run` with `out=` does anything else, or does not give what is in `out`."""
    alike: dict[Buffer, Buffer] = dict(zip(first.inputs, second.inputs, strict=True))
    for mine, given, back in zip(first.results, second.given, second.results, strict=True):
        if back is not given:
            raise VerificationError("run: with out= given, another tensor comes back")
        kept = given.source if given.made == "copied" else given
        if kept is None or alike.setdefault(mine, kept) is not kept:
            raise VerificationError("run: with out= given, results are mixed up")
    launches = [[(x.name, a) for x in reader.launches for a in x.accesses] for reader in (first, second)]
    if len(launches[0]) != len(launches[1]):
        raise VerificationError("run: with out= given, other kernels are launched")
    for (name, x), (other, y) in zip(*launches, strict=True):
        same = (name, x.kind, str(x.terms), str(x.holds)) == (other, y.kind, str(y.terms), str(y.holds))
        if not same or alike.setdefault(x.buffer, y.buffer) is not y.buffer or not _alike(x.buffer, y.buffer):
            raise VerificationError(f"{name}: with out= given, it does not do the same to {x.buffer.name}")
    if len(set(alike.values())) < len(alike):
        raise VerificationError("run: with out= given, two tensors are one")


def _alike(x: Buffer, y: Buffer) -> bool:
    return x.shape == y.shape and x.made == y.made


# -- sizes


class Sizes:
    """Sizes as integers of z3, with what is known of them."""

    def __init__(self, z3: Any) -> None:
        self.z3 = z3
        self.known: dict[Size | str, Any] = {}
        self.holds: list[Any] = []

    def __call__(self, size: Size) -> Any:
        if isinstance(size, int):
            return self.z3.IntVal(size)
        if size not in self.known:
            self.known[size] = self.z3.Int(str(size))
            match size:
                case Dim(_, low, high):
                    self.holds += [self.known[size] >= low, self.known[size] <= high]
                case Monomial(coefficient, powers):
                    top, bottom = self.z3.IntVal(coefficient.numerator), self.z3.IntVal(coefficient.denominator)
                    for d, p in powers:
                        for _ in range(abs(p)):
                            top, bottom = (top * self(d), bottom) if p > 0 else (top, bottom * self(d))
                    self.holds += [self.known[size] * bottom == top, self.known[size] >= 1]
        return self.known[size]


def _factors(z: Any, z3: Any) -> list[Any]:
    if isinstance(z, int):
        return [z]
    if z3.is_int_value(z):
        return [z.as_long()]
    return [f for c in z.children() for f in _factors(c, z3)] if z3.is_mul(z) else [z]


# -- counters


class Counter:
    """An unknown from 0 to a count - 1, in digits: the lowest first, each with its count."""

    def __init__(self, reader: _Reader, kind: str, count: Any) -> None:
        self.reader, self.kind = reader, kind
        self.root = self  # counters in one place of a tile are one
        self.changes: list[tuple[int, int]] = []  # where digits came to stand, and from where; the same: one became two
        self.reads: list[View] = []  # what was used as a number
        factors = _factors(count, reader.z3)
        static = math.prod(f for f in factors if isinstance(f, int))
        if static < 1:
            raise Unreadable(f"no {kind} at all")
        counts = [*(f for f in factors if not isinstance(f, int)), *([static] if static > 1 else [])]
        self.digits = [(c, self.unknown(c)) for c in counts]

    def unknown(self, count: Any) -> Any:
        return self.reader.unknown(self.kind, count)

    def view(self, start: int, end: int | None) -> View:
        return View(self, start, end, len(self.changes))

    def cut(self, view: View, factor: Any) -> int:
        """The place behind the digits from the start of a view on whose counts make up the factor.  Digits of which
        nothing used the number may change places: (n % f, n // f) is one to one, whichever digits f takes."""
        at = view.start
        if any(p < at for p, _ in self.changes[view.before :]):
            raise Unreadable(f"digits of a {self.kind} number, after those before them changed")
        factors = _factors(factor, self.reader.z3)
        n, symbols = math.prod(f for f in factors if isinstance(f, int)), [f for f in factors if not isinstance(f, int)]
        while n > 1 or symbols:
            here = self.digits[at][0] if at < len(self.digits) else 0
            if isinstance(here, int) and n > 1 and n % max(here, 2) == 0:  # the digits as they stand, if these do
                at, n = at + 1, n // here
            elif found := [s for s in symbols if not isinstance(here, int) and here.eq(s)]:
                symbols = [s for s in symbols if s is not found[0]]
                at += 1
            elif n > 1:  # static weights
                at, n = self.cut_static(at, n), 1
            else:
                at, symbols = self.cut_symbolic(at, symbols[0]), symbols[1:]
        return at

    def cut_static(self, at: int, n: int) -> int:
        while n > 1:
            found = next(
                (i for i in range(at, len(self.digits)) if isinstance(c := self.digits[i][0], int) and c > 1
                 and (c % n == 0 or n % c == 0)), None
            )  # fmt: skip
            if found is None:
                raise Unreadable(f"{self.kind} number divided by {n}")
            self.move(found, at)
            count, digit = self.digits[at]
            if count > n:
                low, high = (n, self.unknown(n)), (count // n, self.unknown(count // n))
                self.reader.linked.append((digit, low[1] + n * high[1]))
                self.reader.digits.remove(str(digit))
                self.digits[at : at + 1] = [low, high]
                self.changes.append((at, at))
                return at + 1
            at, n = at + 1, n // count
        return at

    def cut_symbolic(self, at: int, factor: Any) -> int:
        for i in range(at, len(self.digits)):
            if not isinstance(self.digits[i][0], int) and self.digits[i][0].eq(factor):
                self.move(i, at)
                return at + 1
        raise Unreadable(f"{self.kind} number divided by {factor}")

    def move(self, i: int, at: int) -> None:
        if i == at:
            return
        self.changes.append((at, i))
        if any(v.changed() for v in self.reads):
            raise Unreadable(f"a {self.kind} number is used as it is and in digits that change places")
        self.digits.insert(at, self.digits.pop(i))

    def read(self, view: View) -> None:
        """The number that a view is, is used: its digits stay where they are."""
        if view.changed():
            raise Unreadable(f"a {self.kind} number is used as it is and in digits that changed places")
        self.reads.append(view)

    def value(self, start: int, end: int | None) -> Any:
        found: list[Any] = []
        weight: Any = 1
        for count, digit in self.digits[start:end]:
            found.append(digit * weight if found else digit)
            weight = weight * count
        return sum(found[1:], found[0]) if found else 0


@dataclass(frozen=True)
class View:
    """The digits of a counter from a place to another, or to the last; and how many of its changes came before."""

    counter: Counter
    start: int
    end: int | None
    before: int

    def changed(self) -> bool:
        """Whether digits came to stand elsewhere since, so that these are another number."""
        start, end = self.start, self.end
        for at, i in self.counter.changes[self.before :]:
            if at == i:
                start += at < start
                end = None if end is None else end + (at < end)
            elif i >= start and (end is None or at < end):
                return True
        return False


# -- values


class Opaque:
    """What was loaded, or computed from it; also a dtype.  Whatever is done to it gives such a value."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **named: Any) -> Opaque:
        return self

    def __bool__(self) -> bool:
        raise Unreadable("a branch on what was loaded")

    def _same(self, *_: Any) -> Opaque:
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _same
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rshift__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _same  # type: ignore[assignment]
    __neg__ = __invert__ = __getitem__ = _same
    __hash__ = object.__hash__


OPAQUE = Opaque()


class Wide(Opaque):
    """The dtype of 64-bit integers."""


@dataclass(frozen=True, eq=False)
class Named(Opaque):
    """A dtype of torch."""

    name: str


Lanes = tuple[Counter | None, ...]


@dataclass(frozen=True, eq=False)
class Truth:
    """A comparison.  `z` is None where what was loaded takes part in it."""

    reader: _Reader
    z: Any
    lanes: Lanes = ()

    def _with(self, other: Any, how: Callable[[Any, Any], Any]) -> Truth:
        if isinstance(other, bool):
            other = Truth(self.reader, self.reader.z3.BoolVal(other))
        if not isinstance(other, Truth):
            return Truth(self.reader, None, self.lanes)
        lanes = self.reader.together(self.lanes, other.lanes)
        return Truth(self.reader, None if self.z is None or other.z is None else how(self.z, other.z), lanes)

    def __and__(self, other: Any) -> Truth:
        return self._with(other, self.reader.z3.And)

    def __or__(self, other: Any) -> Truth:
        return self._with(other, self.reader.z3.Or)

    __rand__, __ror__ = __and__, __or__

    def __invert__(self) -> Truth:
        return Truth(self.reader, None if self.z is None else self.reader.z3.Not(self.z), self.lanes)

    def __getitem__(self, places: Any) -> Truth:
        return Truth(self.reader, self.z, _spread(self.lanes, places))

    def __bool__(self) -> bool:
        if self.lanes or self.z is None:
            raise Unreadable("a branch on more than a number")
        return self.reader.decide(self.z)

    def to(self, *_: Any) -> Opaque:
        return OPAQUE

    __mul__ = __rmul__ = __add__ = __radd__ = to


def _spread(lanes: Lanes, places: Any) -> Lanes:
    """The lanes behind an index of `:` and None."""
    places = places if isinstance(places, tuple) else (places,)
    rest = iter(lanes)
    found = tuple(None if p is None else next(rest) for p in places if p is None or p == slice(None))
    if len(found) != len(places):
        raise Unreadable("an index of a tile")
    return (*found, *rest)


@dataclass(frozen=True, eq=False)
class Int:
    """An integer or a tile of them.  `view`: the digits of a counter that it is; `size`: the size of a tensor that it
    is."""

    reader: _Reader
    number: Any
    lanes: Lanes = ()
    view: View | None = None
    size: Size | None = None
    wide: bool = False

    @property
    def z(self) -> Any:
        if self.view is not None:
            self.view.counter.read(self.view)
        return self.number

    def _with(self, other: Any, how: Callable[[Any, Any], Any], size: Size | None = None) -> Any:
        other = self.reader.lifted(other)
        if not isinstance(other, Int):
            return NotImplemented if isinstance(other, (Stride, Pointer, ProgramId)) else OPAQUE
        lanes = self.reader.together(self.lanes, other.lanes)
        return Int(self.reader, how(self.z, other.z), lanes, None, size, self.wide or other.wide)

    def __add__(self, other: Any) -> Any:
        return self if isinstance(other, int) and other == 0 else self._with(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        other = self.reader.lifted(other)
        known = isinstance(other, Int) and self.size is not None and other.size is not None
        return self._with(other, lambda a, b: a * b, times(self.size, other.size) if known else None)  # type: ignore[arg-type]

    __rmul__ = __mul__

    def __neg__(self) -> Any:
        return 0 - self

    def __floordiv__(self, other: Any) -> Any:
        other = self.reader.lifted(other)
        if self.view is not None and self.view.end is None:
            counter = self.view.counter
            return self.reader.viewed(counter, counter.cut(self.view, self.reader.scalar(other)), None, self.lanes)
        if isinstance(other, Int) and self.size is not None and other.size is not None:
            try:
                return self.reader.sized(over(self.size, other.size))
            except ShapeError:
                pass
        return self._with(other, lambda a, b: a / b)

    def __mod__(self, other: Any) -> Any:
        if self.view is not None and self.view.end is None:
            counter, end = self.view.counter, self.view.counter.cut(self.view, self.reader.scalar(other))
            return self.reader.viewed(counter, self.view.start, end, self.lanes)
        return self._with(other, lambda a, b: a % b)

    def __rfloordiv__(self, other: Any) -> Any:
        return self.reader.lifted(other) // self

    def __rmod__(self, other: Any) -> Any:
        return self.reader.lifted(other) % self

    def __truediv__(self, other: Any) -> Any:
        return OPAQUE

    __rtruediv__ = __rpow__ = __truediv__

    def __pow__(self, other: Any) -> Any:
        return self * self ** (other - 1) if isinstance(other, int) and other > 1 else self if other == 1 else OPAQUE

    def _compared(self, other: Any, how: Callable[[Any, Any], Any]) -> Any:
        found = self._with(other, how)
        return Truth(self.reader, found.z, found.lanes) if isinstance(found, Int) else found

    def __lt__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a < b)

    def __le__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a <= b)

    def __gt__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a > b)

    def __ge__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a >= b)

    def __eq__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a == b)

    def __ne__(self, other: Any) -> Any:
        return self._compared(other, lambda a, b: a != b)

    __hash__ = object.__hash__

    def __getitem__(self, places: Any) -> Int:
        return Int(self.reader, self.z, _spread(self.lanes, places), None, None, self.wide)

    def to(self, dtype: Any) -> Any:
        return Int(self.reader, self.z, self.lanes, None, None, True) if isinstance(dtype, Wide) else OPAQUE

    def __bool__(self) -> bool:
        raise Unreadable("a branch on a number")


@dataclass(frozen=True)
class Stride:
    """The stride of a dimension of a tensor, times a coefficient."""

    buffer: Buffer
    dim: int
    coefficient: Size = 1

    def __mul__(self, other: Any) -> Any:
        size = other if isinstance(other, int) else other.size if isinstance(other, Int) and not other.lanes else None
        if size is not None:
            return Stride(self.buffer, self.dim, times(self.coefficient, size))
        return Moved(other, self) if isinstance(other, (int, Int, ProgramId)) else OPAQUE

    def __rmul__(self, other: Any) -> Any:
        return Moved(other, self) if isinstance(other, (int, Int, ProgramId)) else OPAQUE


@dataclass(frozen=True)
class Moved:
    """An index times a stride."""

    index: int | Int | ProgramId
    stride: Stride

    def __mul__(self, other: Any) -> Moved:
        found = self.stride * other
        if not isinstance(found, Stride):
            raise Unreadable("a product of indices")
        return Moved(self.index, found)


@dataclass(frozen=True)
class Pointer:
    reader: _Reader
    buffer: Buffer
    terms: tuple[Term, ...] = ()
    lanes: Lanes = ()

    def __add__(self, other: Any) -> Pointer:
        if self.buffer.made == "counters" and not self.terms:
            other = Moved(other, Stride(self.buffer, 0))
        if not isinstance(other, Moved):
            raise Unreadable("an offset that is no index times a stride")
        s, index = other.stride, self.reader.lifted(other.index)
        if s.buffer is not self.buffer:
            raise VerificationError(
                f"{self.reader.where}: an address of {self.buffer.name} moves by a stride of {s.buffer.name}"
            )
        lanes = self.reader.together(self.lanes, index.lanes)
        return Pointer(self.reader, self.buffer, (*self.terms, Term(s.dim, index.z, s.coefficient, index.wide)), lanes)

    def to(self, dtype: Any, bitcast: bool) -> Pointer:
        """The address as a number, which only assembly takes."""
        return self


@dataclass(frozen=True)
class Descriptor:
    """Of a tensor, for tiles of so many entries along each dimension."""

    reader: _Reader
    buffer: Buffer
    counts: tuple[int, ...]

    def load(self, starts: Sequence[Any]) -> Opaque:
        return self.reader.load_tile(self, starts)


class Tensor:
    """A tensor in `run`."""

    def __init__(self, reader: _Reader, buffer: Buffer) -> None:
        self.reader, self.buffer = reader, buffer
        self.device = self.dtype = OPAQUE
        self.shape = tuple(map(reader.sized, buffer.shape))
        self.strides = tuple(Stride(buffer, n) for n in range(len(buffer.shape)))

    def stride(self, n: int | None = None) -> Any:
        return self.strides if n is None else self.strides[n]

    def view(self, dtype: Any) -> Tensor:
        """The same elements, of another type of as many bytes."""
        return self

    def zero_(self) -> Tensor:
        if self.buffer.made != "empty" or self.buffer in self.reader.used():
            raise VerificationError(f"run: {self.buffer.name} is set to 0 where it may hold something")
        self.buffer.made = "zeroed"
        return self

    def copy_(self, other: Any) -> Tensor:
        if not isinstance(other, Tensor):
            raise Unreadable("a tensor that is copied from what is none")
        if self.buffer in self.reader.used():
            raise VerificationError(f"run: {self.buffer.name} is copied to after a launch")
        self.buffer.made, self.buffer.source = "copied", other.buffer
        return self


# -- program ids


@dataclass(frozen=True)
class Arrival:
    """How many of the blocks of a result had stored before this one."""

    reader: _Reader
    pointer: Pointer

    def __eq__(self, other: object) -> Any:
        return Last(self.reader, self.pointer, other)

    __hash__ = object.__hash__


@dataclass(frozen=True)
class Last:
    """Whether so many had."""

    reader: _Reader
    pointer: Pointer
    others: object

    def __bool__(self) -> bool:
        return self.reader.goes_on(self.pointer, self.others)


class Linear:
    """A sum of unknown numbers of blocks and a static one."""

    def __init__(self, value: Any, z3: Any) -> None:
        self.static, self.parts = 0, {}  # type: int, dict[str, tuple[Any, int]]
        terms = [value]
        while terms:
            t = terms.pop()
            if not isinstance(t, int) and z3.is_add(t):
                terms += t.children()
            elif isinstance(t, int) or z3.is_int_value(t):
                self.static += t if isinstance(t, int) else t.as_long()
            else:
                self.parts[t.sexpr()] = t, self.parts.get(t.sexpr(), (t, 0))[1] + 1

    def minus(self, other: Linear) -> Linear | None:
        """None where it may be negative."""
        found = Linear(self.static - other.static, None)
        for k in {**self.parts, **other.parts}:
            n = self.parts.get(k, (0, 0))[1] - other.parts.get(k, (0, 0))[1]
            if n < 0:
                return None
            if n:
                found.parts[k] = self.parts[k][0], n
        return found if found.static >= 0 else None

    def single(self) -> Any:
        """The count, where it is one number of blocks."""
        if not self.parts:
            return self.static
        ((t, n), *more) = self.parts.values()
        if more or n > 1 or self.static:
            raise Unreadable("blocks of several kernels taken as those of one")
        return t

    @property
    def empty(self) -> bool:
        return not self.parts and not self.static


class ProgramId:
    """Which block this is: of those in a range, that a branch narrows to the blocks of one kernel."""

    def __init__(self, reader: _Reader, count: Any) -> None:
        self.reader = reader
        self.base: Any = 0
        self.count = count
        self.low, self.high = Linear(0, reader.z3), Linear(count, reader.z3)
        self.number: Int | None = None

    def __lt__(self, other: Any) -> Any:
        if not isinstance(other, (int, Int)):
            return OPAQUE
        at = Linear(self.reader.scalar(other), self.reader.z3)
        if self.number is not None or at.minus(self.low) is None or self.high.minus(at) is None:
            return (self - 0) < other  # no border of kernels
        if self.reader.decide(None):
            self.high = at
            return True
        self.base, self.low = other, at
        return False

    def __sub__(self, other: Any) -> Int:
        if self.reader.tiling:
            raise Unreadable("a program id beside the tiles that it stands for")
        at = Linear(self.reader.scalar(other), self.reader.z3).minus(self.low)
        if at is None or not at.empty:
            raise Unreadable("a program id less what is no border of kernels")
        if self.number is None:
            rest = self.high.minus(self.low)
            assert rest is not None
            self.number = self.reader.viewed(Counter(self.reader, "block", rest.single()), 0, None)
        return self.number

    def to(self, dtype: Any) -> Any:
        return (self - 0).to(dtype)

    @property
    def used(self) -> bool:
        """Whether anything but a loop over tiles may depend on it."""
        return self.number is not None or self.reader.decided > self.reader.layouts


class Programs:
    """The number of programs, as the step of a loop over tiles."""


def _as_number(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self - 0, name)(*others)


for _name in ("add", "rsub", "mul", "floordiv", "mod", "truediv", "pow", "radd", "rmul", "rtruediv", "le", "gt", "ge"):
    setattr(ProgramId, f"__{_name}__", _as_number(f"__{_name}__"))


# -- running


class Jit:
    """A kernel, or a function that kernels call."""

    def __init__(self, reader: _Reader, fn: Callable[..., Any]) -> None:
        self.reader, self.fn = reader, fn

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.fn(*args, **named)

    def __getitem__(self, grid: tuple[Any, ...]) -> Callable[..., None]:
        def launch(
            *args: Any,
            num_warps: int = 4,
            num_stages: int = 1,
            maxnreg: Any = None,
            launch_pdl: Any = False,
            **named: Any,
        ) -> None:
            self.reader.launch(self.fn, grid, args, named, bool(launch_pdl))

        return launch


# Functions of emitted files that are not run: what they do is known where they are these.
COUNTERS = '''_counters = {}


def counters(count, device):
    """`count` integers that are 0 between launches, because each launch leaves them so.  Launches on one stream follow
    each other and share them; a captured one, which may be replayed on any stream, has its own."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if key not in _counters or len(_counters[key]) < count:
        _counters[key] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[key]'''
MULTIPROCESSORS = '''def multiprocessors(device):
    """Those of a GPU; a few for the interpreter, so that each block has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3'''
DESCRIPTORS = '''def descriptors(*tensors):
    """Whether descriptors can describe these: rows of neighbours, which begin at multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(-1) == 1
        and all(s > 0 and s * t.dtype.itemsize % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def descriptors_on(device):
    """Lets Triton take the memory that descriptors lie in from torch."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))'''
MOST_PATHS = 256  # through a kernel
MOST_BRANCHES = 64  # on one path
INDICES = ("int32", "int64")  # what is loaded of these types may be an index
IMPORTS = ("collections.abc", "threading", "typing", "weakref")
TORCH_FUNCTION = re.compile(r"\w+_torch_\d+")


class _Reader:
    """The stand-ins, and what one run of a kernel has done so far."""

    def __init__(self, graph: Program, z3: Any) -> None:
        self.graph, self.z3 = graph, z3
        self.sizes = Sizes(z3)
        self.launches: list[Launch] = []
        self.where = "run"
        self.described: list[Any] = []  # whether descriptors can describe some tensors
        self.begin([], 1)

    def begin(self, decisions: list[bool], count: Any) -> None:
        self.decisions, self.decided, self.asked = decisions, 0, 0
        self.names = 0  # what all paths do first, they do by the same names
        self.layouts = 0  # decisions that go by the layout of tensors alone
        self.holds: list[Any] = []
        self.ranges: list[Any] = []  # of unknowns, wherever they come into play
        self.linked: list[tuple[Any, Any]] = []
        self.unknowns: dict[str, Any] = {}
        self.digits: list[str] = []
        self.accesses: list[Access] = []
        self.made: list[Any] = []  # lanes and loops, in the order of the text
        self.next = 0
        self.tiling: Literal["", "inside", "after"] = ""  # a loop over tiles
        self.program = ProgramId(self, count)
        self.depth = 0  # of loops
        self.settled = 0  # accesses before the last barrier
        self.waited = True  # for the launch before
        self.stays: int | None = None  # accesses after which this path, of a block that is not the last, ends
        self.last: tuple[int, Pointer, list[str]] | None = None  # accesses before, the counter, digits of the parts

    def run(self, source: str, has_out: bool) -> None:
        space: dict[str, Any] = {"__builtins__": self.builtins(), "__name__": "emitted"}
        exec(compile(source, "<emitted>", "exec"), space)
        for known in (COUNTERS, MULTIPROCESSORS, DESCRIPTORS):
            _as_known(source, known)
        for name, found in list(space.items()):
            if isinstance(found, FunctionType) and TORCH_FUNCTION.fullmatch(name):
                space[name] = self.torch_function(found)
        space["counters"] = self.counters
        if "multiprocessors" in space:
            space["multiprocessors"] = self.multiprocessors
        if "descriptors" in space:
            space["descriptors"] = self.descriptors
        if "keep" in space:  # what is kept is what is computed
            space["keep"] = space["ahead"]
        inputs = [Tensor(self, Buffer(i.name, i.tensor.shape, dtype=TORCH_NAMES.get(i.tensor.dtype)))
                  for i in self.graph.inputs]  # fmt: skip
        tensors = self.graph.tensors()
        given = [Tensor(self, Buffer("", tensors[o.value].shape, "empty")) for o in self.graph.outputs]
        out = (given[0] if len(given) == 1 else tuple(given)) if has_out else None
        found = space["run"](*inputs, out=out)
        results = found if isinstance(found, tuple) else (found,)
        self.inputs = [t.buffer for t in inputs]
        self.given = [t.buffer for t in given]
        self.results = tuple(t.buffer for t in results)
        if len(self.results) != len(given):
            raise VerificationError(f"run: {len(self.results)} tensors come back, not {len(given)}")

    def results_fit(self) -> None:
        """Raises VerificationError where what comes back is not of the shapes and types of the outputs, is an input,
        or comes back twice."""
        tensors = self.graph.tensors()
        values = [o.value for o in self.graph.outputs]
        names = [i.name for i in self.graph.inputs]
        for value, b in zip(values, self.results, strict=True):
            wanted = TORCH_NAMES.get(tensors[value].dtype)
            if b.shape != tensors[value].shape or b.dtype not in (None, wanted):
                raise VerificationError(f"run: {value} comes back as {b.dtype or 'a tensor'} of {b.shape}")
            if b in self.inputs and value not in names:
                raise VerificationError(f"run: {value} comes back as an input")
        if len(set(self.results)) < len(set(values)):
            raise VerificationError("run: one tensor comes back for two outputs")

    def launch(
        self, fn: Callable[..., Any], grid: tuple[Any, ...], args: Sequence[Any], named: dict[str, Any], early: bool
    ) -> None:
        """`early`: its blocks may start while the launch before still runs."""
        (count,) = grid
        bound = signature(fn).bind(*args, **named)
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor):
                value.buffer.name = value.buffer.name or name
                bound.arguments[name] = Pointer(self, value.buffer)
        found: list[Access] = []
        after: list[tuple[Access, Any]] = []
        decisions: list[bool] = []
        self.where = fn.__name__
        for path in itertools.count():
            if path == MOST_PATHS:
                raise Unreadable(f"more than {MOST_PATHS} paths through a kernel")
            self.begin(decisions, self.scalar(count))
            self.waited = not early
            fn(*bound.args, **bound.kwargs)
            if self.depth or self.tiling == "inside":
                raise Unreadable("a loop that is left before its end")
            self.accesses = [replace(a, holds=(*self.ranges, *a.holds)) for a in self.accesses]
            found += self.ended()
            after += self.after()
            while decisions and not decisions[-1]:
                decisions.pop()
            if not decisions:
                break
            decisions[-1] = False
        results = {str(r): r for _, r in after}
        if len(results) > 1:
            raise Unreadable("several counts of blocks in one kernel")
        self.launches.append(Launch(fn.__name__, tuple(found), *results.values()))
        if after:
            self.launches.append(Launch(f"{fn.__name__}, last blocks", tuple(a for a, _ in after)))

    def ended(self) -> list[Access]:
        """What a path does as one of all blocks; nothing where the path on which it goes on has the same."""
        arrivals = sum(a.kind == "arrive" for a in self.accesses)
        if arrivals > 1 or (arrivals and self.last is None and self.stays is None):
            raise VerificationError(f"{self.where}: a block is counted more than once, or goes on without being asked")
        if self.stays is not None:
            if len(self.accesses) > self.stays:
                raise Unreadable("a block that is not the last goes on too")
            return []
        return self.accesses[: self.last[0]] if self.last else self.accesses

    def after(self) -> list[tuple[Access, Any]]:
        """What the last block of a result does, with the result."""
        if self.last is None:
            return []
        start, counter, _ = self.last
        (at,) = counter.terms
        kept, cleared = [], 0
        for a in self.accesses[start:]:
            if a.buffer is not counter.buffer:
                kept.append((a, at.index))
            elif a.kind == "clear" and len(a.terms) == 1 and a.terms[0].index.eq(at.index):
                cleared += 1
            else:
                raise VerificationError(f"{self.where}: counters are used for something else")
        if cleared != 1:
            raise VerificationError(f"{self.where}: a counter is not set to 0 for the next launch")
        return kept

    def goes_on(self, pointer: Pointer, others: object) -> bool:
        """A branch on being the last of the blocks of a result."""
        (at,) = pointer.terms
        number = (self.program - self.program.base).view
        assert number is not None
        digits = number.counter.digits
        ends = [n for n in range(len(digits) + 1) if at.index.eq(self.viewed(number.counter, 0, n).number)]
        parts = digits[ends[0] :] if ends else []
        if self.depth or self.last or not ends or not all(isinstance(n, int) for n, _ in parts):
            raise Unreadable("a count of blocks that is not that of the parts of a result")
        if others != math.prod(n for n, _ in parts) - 1:
            raise VerificationError(f"{self.where}: {others} other blocks are waited for, of {parts}")
        if self.settled < len([a for a in self.accesses if a.kind != "arrive"]):
            raise VerificationError(f"{self.where}: no barrier between what a block stores and its being counted")
        goes_on = self.decide(None)
        if goes_on:
            self.last = len(self.accesses), pointer, [str(d) for _, d in parts]
        else:
            self.stays = len(self.accesses)
        return goes_on

    def barrier(self) -> None:
        if not self.depth:  # a loop may not run
            self.settled = len(self.accesses)

    def wait(self) -> None:
        """For the end of the launch before, which may still run where launches are dependent by programming."""
        self.waited = self.waited or not self.depth

    # -- values

    def unknown(self, kind: str, count: Any) -> Any:
        self.names += 1
        found = self.z3.Int(f"{kind} {self.names}")
        self.ranges += [found >= 0, found < count] if count is not None else []
        self.unknowns[str(found)] = found
        self.digits.append(str(found))
        return found

    def lifted(self, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return Int(self, self.z3.IntVal(value), size=value if value > 0 else None)
        return value - 0 if isinstance(value, ProgramId) else value

    def scalar(self, value: Any) -> Any:
        """As an integer of z3, or a static one."""
        if isinstance(value, int):
            return value
        if not isinstance(value, Int) or value.lanes:
            raise Unreadable(f"{type(value).__name__} where a number is expected")
        return value.z.as_long() if self.z3.is_int_value(value.z) else value.z

    def sized(self, size: Size) -> Any:
        return size if isinstance(size, int) else Int(self, self.sizes(size), size=size)

    def viewed(self, counter: Counter, start: int, end: int | None, lanes: Lanes = ()) -> Int:
        value = counter.value(start, end)
        return Int(self, self.z3.IntVal(value) if isinstance(value, int) else value, lanes, counter.view(start, end))

    def together(self, a: Lanes, b: Lanes) -> Lanes:
        """The lanes of a tile made of two.  What is in one place is one lane."""
        if not a or not b:
            return a or b
        if len(a) != len(b):
            raise Unreadable("tiles of different ranks")
        for x, y in zip(a, b, strict=True):
            if x and y and x.root is not y.root:
                for c in (x, y):
                    c.read(c.view(0, None))
                self.linked.append((y.value(0, None), x.value(0, None)))
                for c in self.made:
                    if isinstance(c, Counter) and c is not y and c.root is y.root:
                        c.root = x.root
                y.root = x.root
        found = tuple(x or y for x, y in zip(a, b, strict=True))
        roots = [id(x.root) for x in found if x]
        if len(set(roots)) < len(roots):
            raise Unreadable("one range of lanes along two dimensions of a tile")
        return found

    def decide(self, condition: Any) -> bool:
        self.asked += 1
        if self.asked > MOST_BRANCHES:
            raise Unreadable(f"more than {MOST_BRANCHES} branches on one path")
        if condition is not None:  # what was decided stays so
            for found, known in ((True, condition), (False, self.z3.Not(condition))):
                if any(known.eq(h) for h in self.holds):
                    return found
        if self.decided == len(self.decisions):
            self.decisions.append(True)
        found = self.decisions[self.decided]
        self.decided += 1
        if condition is not None:
            self.layouts += any(condition.eq(known) for known in self.described)
            self.holds.append(condition if found else self.z3.Not(condition))
        return found

    def again(self, make: Callable[[], Any]) -> Any:
        """What the text makes here; the same when a loop runs again."""
        if self.next == len(self.made):
            self.made.append(make())
        self.next += 1
        return self.made[self.next - 1]

    def used(self) -> set[Buffer]:
        """What launches so far read or write."""
        return {a.buffer for launch in self.launches for a in launch.accesses}

    # -- the language

    def arange(self, low: int, high: Any) -> Int:
        if low != 0:
            raise Unreadable("a range of lanes that does not begin at 0")
        found = self.again(lambda: Counter(self, "lane", self.scalar(high)))
        return self.viewed(found, 0, None, (found,))

    def loop(self, *limits: Any, **_: Any) -> Iterator[Any]:
        low, high, step = (0, *limits, 1) if len(limits) == 1 else (*limits, 1)[:3]
        if isinstance(step, Programs):
            yield from self.tiles(low, high)
            return
        if not isinstance(step, int) or step < 1:
            raise Unreadable("a loop whose step is no positive number")
        kept, first = len(self.holds), len(self.accesses)
        number = self.again(lambda: self.unknown("iteration", None))
        at = self.lifted(low) + Int(self, number * step)
        self.digits += [] if str(number) in self.digits else [str(number)]
        self.holds += [number >= 0, at.z < self.scalar(high)]
        begun = self.next
        self.depth += 1
        yield at
        before = self.accesses[first:]
        del self.accesses[first:]
        self.next = begun
        yield at
        if [a.key() for a in before] != [a.key() for a in self.accesses[first:]]:
            raise Unreadable("a loop whose later iterations do other things to memory")
        del self.holds[kept:]
        self.digits.remove(str(number))
        self.depth -= 1

    def tiles(self, first: Any, count: Any) -> Iterator[Any]:
        """The loop of a persistent kernel, for an unknown tile."""
        if first is not self.program or self.program.used or self.accesses or self.made or self.tiling:
            raise Unreadable("a loop over tiles that is not all that a kernel does")
        solver = self.z3.Solver()
        solver.set("timeout", 1000)
        solver.add(*self.sizes.holds, self.program.count < 1)
        if solver.check() != self.z3.unsat:
            raise Unreadable("a loop over tiles by what may be no blocks at all")
        self.tiling = "inside"
        found = Counter(self, "tile", self.scalar(count))
        begun = self.next
        yield self.viewed(found, 0, None)
        before, self.accesses = self.accesses, []
        self.next = begun
        yield self.viewed(found, 0, None)
        if [a.key() for a in before] != [a.key() for a in self.accesses]:
            raise Unreadable("a loop whose later tiles do other things to memory")
        self.tiling = "after"

    def access(self, kind: str, pointer: Any, mask: Any = None) -> Opaque:
        if not isinstance(pointer, Pointer):
            raise Unreadable(f"a {kind} at what is no address")
        lanes, on = pointer.lanes, []
        if isinstance(mask, Truth) and mask.z is not None:
            lanes, on = self.together(lanes, mask.lanes), [mask.z]
        elif mask is not None and kind != "read":  # one that is loaded from does no harm
            raise Unreadable("a store with a mask that was loaded")
        if self.tiling == "after":
            raise Unreadable("a kernel that goes on after its tiles")
        if not self.waited:
            raise VerificationError(f"{self.where}: {pointer.buffer.name} is used before the launch before has ended")
        if not self.tiling:
            _ = self.program - self.program.base  # which block it is
        roots = {id(c.root) for c in lanes if c}
        mine = {str(d) for c in self.made if isinstance(c, Counter) and id(c.root) in roots for _, d in c.digits}
        digits = tuple(self.unknowns[d] for d in self.digits if not d.startswith("lane") or d in mine)
        holds = (*self.holds, *on)
        if self.last:  # one block is the last of a result, whichever
            parts = set(self.last[2])
            digits = tuple(d for d in digits if str(d) not in parts)
            if parts & {str(x) for e in (*(t.index for t in pointer.terms), *on) for x in self.atoms(e)}:
                raise Unreadable("what the last block of a result does depends on which one it is")
        found = Access(self.where, kind, pointer.buffer, pointer.terms, holds, digits, tuple(self.linked))
        self.accesses.append(found)
        return OPAQUE

    def load(self, pointer: Any, mask: Any = None, other: Any = None, **_: Any) -> Any:
        found = self.access("read", pointer, mask)
        if pointer.buffer.dtype not in INDICES:
            return found
        # any number, another one in each lane: the claims hold for all of them
        number = self.again(lambda: self.any_number())
        return Int(self, number, pointer.lanes)

    def descriptors(self, *tensors: Tensor) -> Truth:
        """Whether the layout of tensors allows descriptors.  It is one for all blocks, as sizes are."""
        name = f"descriptors {len(self.described)}"
        self.sizes.known[name] = self.z3.Int(name)
        self.described.append(self.sizes.known[name] == 1)
        return Truth(self, self.described[-1])

    def descriptor(
        self, pointer: Any, shape: Sequence[Any], strides: Sequence[Any], block_shape: Sequence[Any]
    ) -> Descriptor:
        if not isinstance(pointer, Pointer) or pointer.terms or not all(type(n) is int for n in block_shape):
            raise Unreadable("a descriptor of what is no tensor, or of unknown tiles")
        b, last = pointer.buffer, len(pointer.buffer.shape) - 1
        if b.dtype in INDICES:
            raise Unreadable("a descriptor of indices")
        sizes = tuple(n if isinstance(n, int) else n.size if isinstance(n, Int) else None for n in shape)
        steps = tuple(Stride(b, last) if n == last and type(s) is int and s == 1 else s for n, s in enumerate(strides))
        if sizes != b.shape or steps != tuple(Stride(b, n) for n in range(last + 1)) or len(block_shape) != last + 1:
            raise VerificationError(f"{self.where}: a descriptor of {b.name} has not its sizes and strides in order")
        return Descriptor(self, b, tuple(block_shape))

    def load_tile(self, d: Descriptor, starts: Sequence[Any]) -> Opaque:
        if len(starts) != len(d.counts):
            raise Unreadable("a tile that begins at another number of dimensions")
        terms, there = [], []
        for n, (start, count) in enumerate(zip(map(self.lifted, starts), d.counts, strict=True)):
            if not isinstance(start, Int) or start.lanes:
                raise Unreadable("a tile that begins at what is no number")
            at = start.z + (self.again(partial(self.unknown, "lane", count)) if count > 1 else 0)
            terms.append(Term(n, at, 1, True))
            there.append(at < self.sizes(d.buffer.shape[n]))
        return self.access("read", Pointer(self, d.buffer, tuple(terms)), Truth(self, self.z3.And(*there)))

    def any_number(self) -> Any:
        self.names += 1
        return self.z3.Int(f"loaded {self.names}")

    def atoms(self, e: Any) -> list[Any]:
        """The unknowns of an expression."""
        return [e] if not e.children() else [x for c in e.children() for x in self.atoms(c)]

    def assembly(self, text: str, constraints: str, args: Sequence[Any], *_: Any) -> Opaque:
        """A prefetch is a load."""
        if not text.startswith("prefetch.global.L2 [$1];"):
            raise Unreadable("assembly that is no prefetch")
        waited, self.waited = self.waited, True  # a hint: what it fetches may be written later
        for pointer in args:
            self.access("read", pointer)
        self.waited = waited
        return OPAQUE

    def store(self, pointer: Any, value: Any, mask: Any = None, **_: Any) -> Opaque:
        clears = isinstance(pointer, Pointer) and pointer.buffer.made == "counters" and type(value) is int and not value
        return self.access("clear" if clears and mask is None and not self.depth else "write", pointer, mask)

    def atomic_add(self, pointer: Any, value: Any, mask: Any = None, sem: Any = None) -> Any:
        if isinstance(pointer, Pointer) and pointer.buffer.made == "counters":
            usual = type(value) is int and value == 1 and sem == "acq_rel" and mask is None and not self.depth
            if not usual or pointer.lanes or len(pointer.terms) != 1:
                raise Unreadable("a count of blocks in another way")
            self.access("arrive", pointer)
            return Arrival(self, pointer)
        return self.access("atomic", pointer, mask)

    def cdiv(self, a: Any, b: Any) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return -(-a // b)
        if not isinstance(b, int):
            raise Unreadable("a division by an unknown number")
        return Int(self, (self.lifted(a).z + (b - 1)) / b)

    def next_power_of_2(self, least: Any) -> Any:
        if isinstance(least, int):
            return 1 << (least - 1).bit_length()
        name = f"power of 2 from {least.z}"
        if name not in self.sizes.known:
            found = self.sizes.known[name] = self.z3.Int(name)
            self.sizes.holds += [found >= least.z, found < 2 * least.z]
        return Int(self, self.sizes.known[name])

    def extreme(self, largest: bool, a: Any, b: Any, *more: Any) -> Any:
        if all(isinstance(x, (int, float)) for x in (a, b, *more)):
            return (builtins.max if largest else builtins.min)(a, b, *more)
        x, y = self.lifted(a), self.lifted(b)
        if more or not (isinstance(x, Int) and isinstance(y, Int)):
            return OPAQUE
        lanes = self.together(x.lanes, y.lanes)
        return Int(self, self.z3.If((x.z >= y.z) if largest else (x.z <= y.z), x.z, y.z), lanes)

    def where_(self, condition: Any, a: Any, b: Any) -> Any:
        known = isinstance(condition, Truth) and condition.z is not None
        if known and all(isinstance(x, (int, Int)) for x in (a, b)):
            x, y = self.lifted(a), self.lifted(b)
            lanes = self.together(condition.lanes, self.together(x.lanes, y.lanes))
            return Int(self, self.z3.If(condition.z, x.z, y.z), lanes)
        return OPAQUE

    def broadcast_to(self, value: Any, shape: Sequence[Any]) -> Any:
        value = self.lifted(value)
        if not isinstance(value, Int) or value.lanes:
            return OPAQUE
        return Int(self, value.z, (None,) * len(shape), None, None, value.wide)

    def cast(self, value: Any, dtype: Any) -> Any:
        value = self.lifted(value)
        return value.to(dtype) if isinstance(value, Int) else OPAQUE

    def program_id(self, axis: int) -> ProgramId:
        if axis != 0:
            raise Unreadable("a grid of several dimensions")
        return self.program

    def num_programs(self, axis: int) -> Programs:
        if axis != 0:
            raise Unreadable("a grid of several dimensions")
        return Programs()

    def multiprocessors(self, device: Any) -> Int:
        """Of any device."""
        name = "multiprocessors"
        if name not in self.sizes.known:
            self.sizes.known[name] = self.z3.Int(name)
            self.sizes.holds.append(self.sizes.known[name] >= 1)
        return Int(self, self.sizes.known[name])

    def empty(self, shape: Sequence[Any], *, dtype: Any = None, **_: Any) -> Tensor:
        sizes = tuple(s if isinstance(s, int) else s.size for s in shape)
        if None in sizes:
            raise Unreadable("a tensor whose sizes are no products of known ones")
        return Tensor(self, Buffer("", sizes, "empty", dtype.name if isinstance(dtype, Named) else None))

    def counters(self, count: Any, device: Any) -> Tensor:
        """A function of the text that gives integers that are 0 between launches."""
        return Tensor(self, Buffer("", (count if isinstance(count, int) else count.size,), "counters"))

    def torch_function(self, fn: FunctionType) -> Callable[..., Any]:
        """A function of torch alone: what it gives has the shapes that its first line says."""
        dims = {d.name: d for d in self.graph.dims()}
        text = (fn.__doc__ or "").rpartition("->")[2]
        shapes = [
            tuple(_size(s, dims) for s in inner.split(", ") if s) for inner in re.findall(r"\w+: \w+\[(.*?)\]", text)
        ]

        def called(*args: Any) -> Any:
            found = tuple(Tensor(self, Buffer("", s)) for s in shapes)
            return found if len(found) > 1 else found[0]

        return called

    def builtins(self) -> dict[str, Any]:
        language = _Stand(
            jit=self.jit, program_id=self.program_id, num_programs=self.num_programs, arange=self.arange,
            range=self.loop, static_range=self.loop, debug_barrier=self.barrier, load=self.load, store=self.store,
            atomic_add=self.atomic_add, inline_asm_elementwise=self.assembly, cdiv=self.cdiv, where=self.where_,
            maximum=lambda a, b: self.extreme(True, a, b), minimum=lambda a, b: self.extreme(False, a, b),
            cast=self.cast, broadcast_to=self.broadcast_to, make_tensor_descriptor=self.descriptor,
            extra=_Stand(cuda=_Stand(gdc_wait=self.wait)), constexpr=lambda x: x, int64=Wide(),
        )  # fmt: skip
        triton = _Stand(
            jit=self.jit, cdiv=self.cdiv, next_power_of_2=self.next_power_of_2, JITFunction=Jit, language=language
        )
        torch = _Stand(empty=self.empty, **{name: Named(name) for name in TORCH_NAMES.values()})
        modules = {"torch": torch, "triton": triton, "triton.language": triton}

        def imported(name: str, *args: Any) -> Any:
            if name not in IMPORTS and name not in modules:
                raise Unreadable(f"import {name}")
            return modules.get(name) or builtins.__import__(name, *args)

        def extreme(largest: bool) -> Callable[..., Any]:
            return lambda *values: self.extreme(largest, *values)

        return vars(builtins) | {
            "__import__": imported, "range": self.loop, "max": extreme(True), "min": extreme(False)
        }  # fmt: skip

    def jit(self, fn: Any = None, **_: Any) -> Any:
        return Jit(self, fn) if fn is not None else lambda fn: Jit(self, fn)


class _Stand(SimpleNamespace):
    """A module: what is not listed gives what is opaque."""

    def __getattr__(self, name: str) -> Any:
        return OPAQUE


def _as_known(source: str, known: str) -> None:
    """Raises Unreadable where a file binds names of a known text otherwise."""

    def bound(statement: ast.stmt) -> str:
        match statement:
            case ast.FunctionDef(name) | ast.Assign([ast.Name(name)]):
                return name
        return ""

    wanted = ast.parse(known).body
    names = {bound(statement) for statement in wanted}
    found = [statement for statement in ast.parse(source).body if bound(statement) in names]
    if found and [*map(ast.dump, found)] != [*map(ast.dump, wanted)]:
        raise Unreadable(f"{bound(wanted[-1])} is not the function that is emitted")


def _size(text: str, dims: Mapping[str, Dim]) -> Size:
    found: Size = 1
    for factor in text.split("*"):
        name, _, power = factor.partition("^")
        for _ in range(int(power or 1)):
            found = times(found, dims[name] if name in dims else int(name))
    return found
