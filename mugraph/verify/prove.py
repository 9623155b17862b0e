"""The `proved` tier: program and μGraph are equal for all sizes, by equality of index normal forms.

    proof = prove(program, graph)
    proof.proved, proof.laws, proof.reason          # the reason, where it cannot decide

A value is a sum of terms, a term a rational times powers of atoms:

    input[index, ...]      |axis|      exp(term)      f(values)      Σ over bound indices of a product of atoms

Terms are expanded, factors are pushed out of sums that they do not depend on, sums are flattened (Σ_j (Σ_k a) b = Σ_jk
a b) and cut into connected components, exp(a + b) = exp a · exp b, and bound indices are named canonically.  Two values
with the same normal form are equal at every size; others may still be equal, so the answer is then `unknown`, never no.

A block graph is read as what it computes: tiles of an axis partition it, so an accumulator over a looped axis is the
sum (maximum, minimum) over the whole axis; parts of a split partition it too.  What a loop computes from a running
maximum m is a value for an unknown m; a rescaled accumulator is right where its tile is exp(-m) times something
without m.

The module shares no code with the search, and none with the `tested` tier: it does not compute in fields.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mugraph.ir.axes import Axis, Monomial, Size, product
from mugraph.ir.check import check
from mugraph.ir.graph import Accumulator, BlockGraph, Equation, Program, Step, Store, Thread
from mugraph.ir.infer import op_text
from mugraph.ir.ops import (
    Broadcast,
    Cast,
    Compare,
    Concat,
    Const,
    Contract,
    CumSum,
    Elementwise,
    Gather,
    Iota,
    Kernel,
    Library,
    MaskedExp,
    Op,
    Reduce,
    Rename,
    Reshape,
    Select,
    SizeOf,
    Slice,
    Transpose,
)
from mugraph.ir.types import Tensor

MOST_TERMS = 400  # of one value
MOST_BOUND = 7  # indices of one connected sum
MOST_WORK = 200_000  # products of terms in one proof

# An index is a variable (a string), or made of others:
#   ("at", start, step, i)             start + step * i
#   ("join", ((i, size), ...))         the row-major index of digits
#   ("digit", i, (size, ...), n)       digit n of an index
#   ("value", expression)              a gathered place
Index = Any
Atom = tuple[Any, ...]  # its first entry says which
Powers = tuple[tuple[Atom, Fraction], ...]  # sorted by `key`, none zero
Term = tuple[Powers, Fraction]
Expression = tuple[Term, ...]  # sorted by `key`, no coefficient zero

TILES = "the tiles of a looped axis partition it: an accumulator is the sum, maximum or minimum over the whole axis"
PARTS = "the parts of a split axis partition it"
RESCALED = "a rescaled accumulator of exp(-m)·t, for any running m, is exp(-m')·Σ t with the last m'"
LINEAR = "sums are linear: factors move out of sums that they do not depend on, sums of sums flatten and reorder"
RING = "addition and multiplication are those of a field: terms expand, commute and cancel"
EXPONENTS = "exp(a + b) = exp(a)·exp(b), exp(c·a) = exp(a)^c"
LOGARITHM = "log(v·exp(m)) = log(v) + m"
CONGRUENCE = "equal arguments give equal results"
SEMILATTICE = "max and min are associative, commutative and idempotent"
INDICES = "indices of reshapes and slices compose; a sum over all digits of an index is the sum over the index"
SIZES = "static sizes are the numbers that the program declares"


class Undecided(Exception):
    """The normal form is not computed: out of budget, or an operator that it does not cover."""


@dataclass(frozen=True)
class Proof:
    """The laws that it rests on, or why nothing is known."""

    laws: tuple[str, ...]
    reason: str = ""

    @property
    def proved(self) -> bool:
        return not self.reason


def prove(program: Program, graph: Program) -> Proof:
    """Whether the normal forms agree, with sizes as symbols first, then with static sizes as the numbers that they are.
    Raises GraphError or ShapeError for a malformed graph."""
    check(program)
    check(graph)
    reason = "the normal forms differ: a law is missing, or the sizes matter"
    for numbers in (False, True):
        try:
            form = _Form(numbers)
            wanted, given = form.outputs(program), form.outputs(graph)
        except (Undecided, RecursionError) as error:
            reason = str(error) or "the normal form is too long"
            continue
        if wanted == given:
            return Proof(tuple(sorted(form.laws | ({SIZES} if numbers else set()))))
    return Proof((), reason)


def key(value: Any) -> str:
    return repr(value)


@dataclass(frozen=True)
class _Value:
    axes: tuple[Axis, ...]
    form: Expression


ONE: Expression = (((), Fraction(1)),)


def _number(value: Fraction | int) -> Expression:
    return (((), Fraction(value)),) if value else ()


def _atom(atom: Atom, power: int = 1) -> Expression:
    return ((((atom, Fraction(power)),), Fraction(1)),)


def _powers(found: Mapping[Atom, Fraction]) -> Powers:
    return tuple(sorted(((a, p) for a, p in found.items() if p), key=key))


def _gathered(terms: Iterable[Term]) -> Expression:
    """Like terms merged."""
    found: dict[Powers, Fraction] = {}
    for powers, c in terms:
        found[powers] = found.get(powers, Fraction(0)) + c
    result = tuple(sorted(((p, c) for p, c in found.items() if c), key=key))
    if len(result) > MOST_TERMS:
        raise Undecided
    return result


def _variables(value: Any) -> frozenset[str]:
    """Variables that occur anywhere, bound ones of inner sums included."""
    if isinstance(value, str):
        return frozenset((value,)) if value[:1] in "$%" else frozenset()
    if isinstance(value, tuple):
        return frozenset[str]().union(*map(_variables, value))
    return frozenset()


def _height(value: Any) -> int:
    """How deep binders are nested."""
    if not isinstance(value, tuple):
        return 0
    own = 1 if value[:1] in (("sum",), ("lambda",)) else 0
    return own + max(map(_height, value), default=0)


class _Form:
    """Normal forms.  Variables are `$axis` (free), `%..` (bound) and fresh ones, `$#n`."""

    def __init__(self, numbers: bool) -> None:
        self.numbers = numbers
        self.laws: set[str] = {RING}
        self.work = 0
        self.fresh_count = 0

    def fresh(self) -> str:
        self.fresh_count += 1
        return f"$#{self.fresh_count}"

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def plus(self, a: Expression, b: Expression) -> Expression:
        return _gathered((*a, *b))

    def scaled(self, a: Expression, c: Fraction | int) -> Expression:
        return tuple((p, k * c) for p, k in a) if c else ()

    def times(self, a: Expression, b: Expression) -> Expression:
        self.work += len(a) * len(b)
        if self.work > MOST_WORK or len(a) * len(b) > 50 * MOST_TERMS:
            raise Undecided
        return _gathered((self.merged(p, q), c * d) for p, c in a for q, d in b)

    def merged(self, a: Powers, b: Powers) -> Powers:
        found = dict(a)
        for atom, power in b:
            found[atom] = found.get(atom, Fraction(0)) + power
        return _powers(found)

    def power(self, a: Expression, n: int) -> Expression:
        if n < 0:
            return self.power(self.inverse(a), -n)
        result = ONE
        for _ in range(n):
            result = self.times(result, a)
        return result

    def inverse(self, a: Expression) -> Expression:
        """1/a: powers of one term change sign; of several, what they share is taken out first."""
        if not a:
            raise Undecided
        if len(a) == 1:
            ((powers, c),) = a
            return ((tuple((x, -p) for x, p in powers), 1 / c),)
        shared = dict(a[0][0])
        for powers, _ in a[1:]:
            own = dict(powers)
            shared = {x: min(p, own[x]) for x, p in shared.items() if x in own and (p > 0) == (own[x] > 0)}
        out = _powers(shared)
        lead = a[0][1]
        rest = _gathered((self.merged(p, tuple((x, -n) for x, n in out)), c / lead) for p, c in a)
        inside: Atom = ("paren", rest)
        return ((_powers({inside: Fraction(-1), **{x: -p for x, p in out}}), 1 / lead),)

    def exponential(self, a: Expression) -> Expression:
        self.laws.add(EXPONENTS)
        return ((_powers({("exp", powers): c for powers, c in a}), Fraction(1)),) if a else ONE

    def logarithm(self, a: Expression) -> Expression:
        if len(a) != 1:
            return self.call("log", (), [a])
        ((powers, c),) = a
        exponents = [(x, p) for x, p in powers if x[0] == "exp"]
        rest: Expression = ((tuple((x, p) for x, p in powers if x[0] != "exp"), c),)
        if exponents:
            self.laws.add(LOGARITHM)
        result: Expression = _gathered((x[1], p) for x, p in exponents)
        if rest == ONE:
            return result
        ((powers, c),) = rest
        if c == 1 and all(p < 0 for _, p in powers):
            return self.plus(result, self.scaled(self.call("log", (), [self.inverse(rest)]), -1))
        return self.plus(result, self.call("log", (), [rest]))

    def call(self, fn: str, attrs: Any, args: Sequence[Expression]) -> Expression:
        self.laws.add(CONGRUENCE)
        return _atom(("call", fn, attrs, tuple(args)))

    def extreme(self, kind: str, args: Iterable[Expression]) -> Expression:
        self.laws.add(SEMILATTICE)
        found: set[Expression] = set()
        for a in args:
            inner = a[0][0][0][0] if len(a) == 1 and len(a[0][0]) == 1 and a[0][1] == 1 else None
            same = inner is not None and inner[0] == "call" and inner[1] == kind and a[0][0][0][1] == 1
            found |= set(inner[3]) if same and inner is not None else {a}
        return found.pop() if len(found) == 1 else self.call(kind, (), sorted(found, key=key))

    # -- sums ----------------------------------------------------------------------------------------------------

    def size(self, size: Size) -> Expression:
        """A product of symbols.  A static size is a symbol of its own, or a number."""
        if isinstance(size, int):
            return _number(size) if self.numbers or size == 1 else _atom(("size", size))
        if isinstance(size, Monomial):
            result = _number(size.coefficient)
            for d, p in size.powers:
                result = self.times(result, self.power(_atom(("size", d.name)), p))
            return result
        return _atom(("size", size.name))

    def total(self, a: Expression, bound: Mapping[str, Size]) -> Expression:
        """Σ over variables."""
        self.laws.add(LINEAR)
        return _gathered(t for powers, c in a for t in self.summed(powers, c, bound))

    def summed(self, powers: Powers, c: Fraction, bound: Mapping[str, Size]) -> Expression:
        self.work += 1
        open_: dict[str, Size] = dict(bound)
        factors = list(powers)
        inside: dict[Atom, Fraction] = {}
        outside: dict[Atom, Fraction] = {}
        while factors:
            atom, p = factors.pop()
            if not _variables(atom) & open_.keys():
                outside[atom] = outside.get(atom, Fraction(0)) + p
            elif atom[0] == "sum" and p > 0 and p.denominator == 1:
                for _ in range(int(p)):
                    names = {b: self.fresh() for b, _ in atom[1]}
                    open_.update((names[b], size) for b, size in atom[1])
                    factors += [(self.atom_with(x, names), n) for x, n in atom[2]]
            else:
                inside[atom] = inside.get(atom, Fraction(0)) + p
        result: Expression = ((_powers(outside), c),)
        for names_of, part in self.components(_powers(inside), open_):
            result = self.times(result, self.canonical(part, names_of))
        used = frozenset[str]().union(*(_variables(x) for x in inside)) if inside else frozenset[str]()
        for name, size in open_.items():
            if name not in used:
                result = self.times(result, self.size(size))
        return result

    def components(self, powers: Powers, bound: Mapping[str, Size]) -> Iterator[tuple[dict[str, Size], Powers]]:
        """Factors that share bound variables, together."""
        groups: list[tuple[set[str], list[tuple[Atom, Fraction]]]] = []
        for factor in powers:
            names, members = set(_variables(factor[0]) & bound.keys()), [factor]
            apart = []
            for other in groups:
                if other[0] & names:
                    names |= other[0]
                    members += other[1]
                else:
                    apart.append(other)
            groups = [*apart, (names, members)]
        for names, members in groups:
            yield {n: bound[n] for n in sorted(names)}, tuple(sorted(members, key=key))

    def canonical(self, powers: Powers, bound: Mapping[str, Size]) -> Expression:
        """One connected sum as an atom, its variables named by what they do."""
        powers, bound = self.simplified(powers, bound)
        if not bound:
            return ((powers, Fraction(1)),)
        if len(bound) > MOST_BOUND:
            raise Undecided
        height = 1 + _height(powers)
        best: Any = None
        for order in self.orders(powers, bound):
            names = {v: f"%{height}.{i}" for i, v in enumerate(order)}
            body = tuple(sorted(((self.atom_with(a, names), p) for a, p in powers), key=key))
            found = ("sum", tuple((names[v], bound[v]) for v in order), body)
            if best is None or key(found) < key(best):
                best = found
        return _atom(best)

    def orders(self, powers: Powers, bound: Mapping[str, Size]) -> Iterator[tuple[str, ...]]:
        """Orders of the variables that a canonical one is chosen from: told apart by where they occur, if they are."""
        blank = dict.fromkeys(bound, "%")

        def role(v: str) -> str:
            names = {**blank, v: "%!"}
            return key((bound[v], sorted(key((self.atom_with(a, names), p)) for a, p in powers if v in _variables(a))))

        ranked = sorted(bound, key=role)
        groups = [list(g) for _, g in itertools.groupby(ranked, key=role)]
        count = 1
        for g in groups:
            for i in range(2, len(g) + 1):
                count *= i
        if count > 720:
            raise Undecided
        for choice in itertools.product(*(itertools.permutations(g) for g in groups)):
            yield tuple(v for g in choice for v in g)

    def simplified(self, powers: Powers, bound: Mapping[str, Size]) -> tuple[Powers, dict[str, Size]]:
        """Digits that always stand together are one index; an entry is in one part."""
        open_ = dict(bound)
        changed = True
        while changed:
            changed = False
            for v in list(open_):
                using = [(a, p) for a, p in powers if v in _variables(a)]
                if len(using) == 1 and using[0][0][0] == "in" and using[0][1] == 1 and using[0][0][2] == v:
                    self.laws.add(PARTS)
                    powers = tuple(f for f in powers if f != using[0])
                    del open_[v]
                    changed = True
                    break
            if pair := next((x for x in _pairs(powers) if self.joined(powers, open_, *x)), None):
                (v, size_v), (w, size_w) = pair
                new, size = self.fresh(), product((size_v, size_w))
                self.laws.add(INDICES)
                powers = tuple(sorted(((_fused(a, v, w, new, size), p) for a, p in powers), key=key))
                del open_[v], open_[w]
                open_[new] = size
                powers = tuple(sorted(((self.atom_with(a, {}), p) for a, p in powers), key=key))
                changed = True
        return powers, open_

    def joined(self, powers: Powers, bound: Mapping[str, Size], a: tuple[str, Size], b: tuple[str, Size]) -> bool:
        """Whether two bound variables occur as adjacent digits only, each running over all its digit's values."""
        (v, size_v), (w, size_w) = a, b
        if bound.get(v) != size_v or bound.get(w) != size_w:
            return False
        return all(_occurrences(x, v, w) for x, _ in powers)

    # -- substitution --------------------------------------------------------------------------------------------

    def with_(self, a: Expression, names: Mapping[str, Index]) -> Expression:
        """Variables replaced by indices."""
        if not names or not any(_variables(p) & names.keys() for p, _ in a):
            return a
        result: Expression = ()
        for powers, c in a:
            term: Expression = (((), c),)
            for atom, p in powers:
                term = self.times(term, self.atom_power(self.atom_with(atom, names), p))
            result = self.plus(result, term)
        return result

    def atom_power(self, atom: Atom, p: Fraction) -> Expression:
        if atom[0] == "paren" and p > 0:
            return self.power(atom[1], int(p))
        return (((((atom, p),)), Fraction(1)),)

    def atom_with(self, atom: Atom, names: Mapping[str, Index]) -> Atom:
        match atom[0]:
            case "load":
                return ("load", atom[1], tuple(self.index_with(i, names) for i in atom[2]))
            case "index":
                return ("index", self.index_with(atom[1], names))
            case "in":
                return ("in", self.index_with(atom[1], names), self.index_with(atom[2], names), atom[3])
            case "exp":
                return ("exp", self.powers_with(atom[1], names))
            case "paren":
                return ("paren", self.with_(atom[1], names))
            case "call":
                args = tuple(self.with_(x, names) for x in atom[3])
                if atom[1] in ("max", "min"):
                    args = tuple(sorted(set(args), key=key))
                attrs = tuple(self.index_with(x, names) if isinstance(x, str) else x for x in atom[2])
                return ("call", atom[1], attrs, args)
            case "sum" | "lambda":
                if not _variables(atom) & names.keys():
                    return atom
                if atom[0] == "lambda":
                    return ("lambda", atom[1], atom[2], self.with_(atom[3], names))
                again = self.canonical(
                    self.powers_with(atom[2], {**names, **{b: f"$@{b}" for b, _ in atom[1]}}),
                    {f"$@{b}": s for b, s in atom[1]},
                )
                (((found, _),), _) = again[0]
                return found
        return atom

    def powers_with(self, powers: Powers, names: Mapping[str, Index]) -> Powers:
        return tuple(sorted(((self.atom_with(a, names), p) for a, p in powers), key=key))

    def index_with(self, i: Index, names: Mapping[str, Index]) -> Index:
        if isinstance(i, str):
            return names.get(i, i)
        match i[0]:
            case "at":
                return at(i[1], i[2], self.index_with(i[3], names))
            case "join":
                return join([(self.index_with(x, names), s) for x, s in i[1]])
            case "digit":
                return digit(self.index_with(i[1], names), i[2], i[3])
            case "value":
                return ("value", self.with_(i[1], names))
        return i

    # -- graphs --------------------------------------------------------------------------------------------------

    def outputs(self, graph: Program) -> list[Expression]:
        loads = {i.name: self.load(i.name, i.tensor.axes) for i in graph.inputs}
        tensors = graph.tensors()
        values = self.run(graph, loads)
        found = []
        for o in graph.outputs:
            if {a.name for a in values[o.value].axes} - {a.name for a in tensors[o.value].axes}:
                raise Undecided
            found.append(values[o.value].form)
        return found

    def load(self, name: str, axes: Sequence[Axis]) -> _Value:
        return _Value(tuple(axes), _atom(("load", name, tuple(f"${a.name}" for a in axes))))

    def run(self, graph: Program, inputs: Mapping[str, _Value]) -> dict[str, _Value]:
        values = dict(inputs)
        for e in graph.equations:
            args = [values[a] for a in e.args]
            match e.op:
                case Kernel(blocks):
                    found: dict[str, _Value] = {}
                    for block in blocks:
                        found |= self.block(block, dict(zip(e.args, args, strict=True)))
                    results = [found[t.name] for t in e.targets]
                case Library(_, semantics):
                    results = self.library(semantics, args)
                case _:
                    results = [self.apply(e.op, args, e.targets)]
            self.bind(values, e.targets, results)
        return values

    def bind(self, values: dict[str, _Value], targets: Sequence[Tensor], results: Sequence[_Value]) -> None:
        """Values carry their axes in the order that their tensors declare: reshapes and aliases go by it."""
        for t, v in zip(targets, results, strict=True):
            alike = {a.name for a in t.axes} == {a.name for a in v.axes}
            values[t.name] = _Value(t.axes, v.form) if alike else v

    def library(self, inner: Program, args: Sequence[_Value]) -> list[_Value]:
        inputs = {i.name: self.aliased(v, i.tensor.axes) for i, v in zip(inner.inputs, args, strict=True)}
        names = {
            formal.name: actual
            for i, v in zip(inner.inputs, args, strict=True)
            for formal, actual in zip(i.tensor.axes, v.axes, strict=True)
        }
        values = self.run(inner, inputs)
        found = []
        for o in inner.outputs:
            v = values[o.value]
            found.append(self.aliased(v, tuple(names.get(a.name, a) for a in v.axes)))
        return found

    def aliased(self, v: _Value, axes: tuple[Axis, ...]) -> _Value:
        moved = {f"${a.name}": f"${b.name}" for a, b in zip(v.axes, axes, strict=True) if a.name != b.name}
        return _Value(axes, self.with_(v.form, moved))

    # -- block graphs --------------------------------------------------------------------------------------------

    def block(self, block: BlockGraph, args: Mapping[str, _Value]) -> dict[str, _Value]:
        alive: dict[str, _Value] = {}
        part = f"${block.split.part.name}" if block.split else None
        for p in block.passes:
            values = dict(alive)
            self.loads(p.loads, args, values)
            is_split = block.split is not None and p is block.passes[-1]
            self.steps(p.body, values, (block.split.axis, part) if is_split and block.split else None)
            alive.update(values)  # `check` has seen to it that nothing reads what died with an iteration
        self.loads(block.loads, args, alive)
        self.steps(block.epilogue, alive, None)
        stored = {s.target: self.stored(s, alive, block) for s in block.stores}
        return self.block(block.combine, {**args, **stored}) if block.combine else stored

    def stored(self, s: Store, alive: Mapping[str, _Value], block: BlockGraph) -> _Value:
        v = alive[s.value]
        if block.split is None:
            return v
        part = block.split.part
        if s.kind == "partial":
            return _Value((part, *v.axes), v.form)
        return _Value(v.axes, self.closed(v.form, [part]))

    def loads(self, loads: Sequence[Any], args: Mapping[str, _Value], values: dict[str, _Value]) -> None:
        for ld in loads:
            v, own = args[ld.source], ld.value.axes
            alike = {a.name for a in own} == {a.name for a in v.axes}
            values[ld.value.name] = _Value(own, v.form) if alike else self.aliased(v, own)

    def steps(self, steps: Sequence[Step], values: dict[str, _Value], split: tuple[str, str | None] | None) -> None:
        running: dict[str, tuple[Atom, _Value]] = {}  # maxima that are still running: the symbol, and the last value
        for step in steps:
            match step:
                case Equation(targets, op, args):
                    self.bind(values, targets, [self.apply(op, [values[a] for a in args], targets)])
                case Thread(graph):
                    for e in graph.equations:
                        self.bind(values, e.targets, [self.apply(e.op, [values[a] for a in e.args], e.targets)])
                case Accumulator(e, monoid, scale):
                    self.laws.add(TILES)
                    if monoid not in _monoids(e.op):
                        raise Undecided  # tiles are not put together as they are made
                    args_of = [values[a] for a in e.args]
                    if split is not None and split[0] in step.axes:
                        args_of = self.in_part(args_of, split, monoid)
                    v = self.apply(e.op, args_of, e.targets)
                    if monoid == "rescaled":
                        assert scale is not None
                        v = self.rescaled(v, *running[scale])
                    if any(self.holds(v.form, symbol) for symbol, _ in running.values()):
                        raise Undecided
                    self.bind(values, e.targets, [v])
                    if monoid in ("max", "min"):
                        last = values[e.target.name]
                        axes = tuple(f"${a.name}" for a in last.axes)
                        symbol: Atom = ("load", f"running {self.fresh()}", axes)
                        running[e.target.name] = symbol, last
                        values[e.target.name] = _Value(last.axes, _atom(symbol))
        for name, (_, last) in running.items():
            values[name] = last

    def in_part(self, args: list[_Value], split: tuple[str, str | None], monoid: str) -> list[_Value]:
        """The operands of a sum, counted in the present part alone; of a maximum, a value that names the part."""
        axis, part = split
        first = next(i for i, v in enumerate(args) if axis in [a.name for a in v.axes])
        v = args[first]
        if monoid in ("max", "min"):
            form = self.call("of the part", (f"${axis}", part), [v.form])
        else:
            form = self.times(v.form, _atom(("in", f"${axis}", part, axis)))
        return [*args[:first], _Value(v.axes, form), *args[first + 1 :]]

    def holds(self, value: Any, symbol: Atom) -> bool:
        if isinstance(value, tuple):
            return value[:2] == symbol[:2] or any(self.holds(x, symbol) for x in value)
        return False

    def rescaled(self, v: _Value, symbol: Atom, last: _Value) -> _Value:
        """exp(-m)·t for the running m becomes exp(-m')·t for the last one."""
        m = _atom(symbol)
        rest = self.times(v.form, self.exponential(m))
        if self.holds(rest, symbol):
            raise Undecided
        self.laws.add(RESCALED)
        return _Value(v.axes, self.times(rest, self.exponential(self.scaled(last.form, -1))))

    # -- operators -----------------------------------------------------------------------------------------------

    def closed(self, form: Expression, axes: Iterable[Axis]) -> Expression:
        names = {f"${a.name}": self.fresh() for a in axes}
        sizes = {names[f"${a.name}"]: a.size for a in axes}
        return self.total(self.with_(form, names), sizes)

    def apply(self, op: Op, args: Sequence[_Value], targets: Sequence[Tensor]) -> _Value:
        axes = tuple({a.name: a for v in args for a in v.axes}.values())
        forms = [v.form for v in args]
        match op:
            case Elementwise(fn, attrs):
                return _Value(axes, self.function(fn, attrs, forms))
            case Const(value):
                return _Value((), _number(value))
            case SizeOf(axis):
                return _Value((), self.size(axis.size))
            case Iota(axis):
                return _Value((axis,), _atom(("index", f"${axis.name}")))
            case Contract(over):
                form = ONE
                for f in forms:
                    form = self.times(form, f)
                return self.reduced(axes, form, over)
            case Reduce("sum", over):
                return self.reduced(axes, forms[0], over)
            case Reduce("mean", over):
                v = self.reduced(axes, forms[0], over)
                count = product(a.size for a in axes if a.name in over)
                return _Value(v.axes, self.times(v.form, self.inverse(self.size_of_product(count, axes, over))))
            case Reduce(kind, over):
                return self.largest(kind, axes, forms[0], over)
            case Compare(relation):
                return _Value(axes, self.call("compare", (("relation", relation),), forms))
            case Select():
                mask, a, b = forms
                return _Value(axes, self.plus(b, self.times(mask, self.plus(a, self.scaled(b, -1)))))
            case MaskedExp():
                return _Value(axes, self.times(forms[1], self.exponential(forms[0])))
            case Cast(dtype):
                return args[0] if dtype.is_float else _Value(axes, self.call("cast", (("to", dtype.value),), forms))
            case Transpose():
                return args[0]
            case Broadcast(new):
                return _Value((*axes, *new), forms[0])
            case Rename(pairs):
                new_axes = dict(pairs)
                return self.aliased(args[0], tuple(new_axes.get(a.name, a) for a in args[0].axes))
            case Slice(axis, out, start, step):
                self.laws.add(INDICES)
                moved = self.with_(forms[0], {f"${axis}": at(start, step, f"${out.name}")})
                return _Value(tuple(out if a.name == axis else a for a in axes), moved)
            case Reshape(dims):
                return self.reshaped(args[0], tuple(a for d in dims for a in d))
            case Gather(axis):
                index = args[1]
                moved = self.with_(forms[0], {f"${axis}": ("value", index.form)})
                kept = [b for a in args[0].axes for b in (index.axes if a.name == axis else (a,))]
                return _Value(tuple({a.name: a for a in kept}.values()), moved)
            case Concat(parts, out):
                return self.concatenated(args, parts, out)
            case CumSum(axis):
                size = next(a.size for a in axes if a.name == axis)
                inner = self.bound(forms[0], {f"${axis}": size})
                return _Value(axes, self.call("cumsum", (f"${axis}",), [inner]))
        raise Undecided(f"no normal form of {op_text(op)} is known")

    def size_of_product(self, count: Size, axes: Sequence[Axis], over: Sequence[str]) -> Expression:
        if self.numbers:
            return self.size(count)
        result = ONE
        for a in axes:
            if a.name in over:
                result = self.times(result, self.size(a.size))
        return result

    def reduced(self, axes: tuple[Axis, ...], form: Expression, over: Sequence[str]) -> _Value:
        gone = [a for a in axes if a.name in over]
        return _Value(tuple(a for a in axes if a.name not in over), self.closed(form, gone))

    def bound(self, form: Expression, bound: Mapping[str, Size]) -> Expression:
        """An expression with some variables bound, as the argument of an opaque function."""
        names = {v: self.fresh() for v in bound}
        form = self.with_(form, names)
        height = 1 + _height(form)
        order = sorted(bound, key=lambda v: key((bound[v], v)))
        body = self.with_(form, {names[v]: f"%{height}.{i}" for i, v in enumerate(order)})
        return _atom(("lambda", height, tuple(bound[v] for v in order), body))

    def largest(self, kind: str, axes: tuple[Axis, ...], form: Expression, over: Sequence[str]) -> _Value:
        gone = {f"${a.name}": a.size for a in axes if a.name in over}
        self.laws.add(SEMILATTICE)
        kept = tuple(a for a in axes if a.name not in over)
        inner = form[0][0][0][0] if len(form) == 1 and form[0][1] == 1 and len(form[0][0]) == 1 else None
        if inner is not None and inner[:2] == ("call", f"{kind} over") and form[0][0][0][1] == 1:  # of a maximum
            _, height, sizes, body = inner[3][0][0][0][0][0]
            names = {f"%{height}.{i}": self.fresh() for i in range(len(sizes))}
            gone |= {names[f"%{height}.{i}"]: size for i, size in enumerate(sizes)}
            form = self.with_(body, names)
        return _Value(kept, self.call(f"{kind} over", (), [self.bound(form, gone)]))

    def concatenated(self, args: Sequence[_Value], parts: Sequence[str], out: Axis) -> _Value:
        pieces = []
        for v, axis in zip(args, parts, strict=True):
            size = next(a.size for a in v.axes if a.name == axis)
            pieces.append(self.bound(v.form, {f"${axis}": size}))
        axes = tuple(out if a.name == parts[0] else a for a in args[0].axes)
        return _Value(axes, self.call("concat", (f"${out.name}",), pieces))

    def function(self, fn: str, attrs: Any, args: Sequence[Expression]) -> Expression:
        x = args[0]
        match fn:
            case "add":
                return self.plus(*args)
            case "sub":
                return self.plus(x, self.scaled(args[1], -1))
            case "mul" | "and":
                return self.times(*args)
            case "or":
                return self.plus(self.plus(*args), self.scaled(self.times(*args), -1))
            case "not":
                return self.plus(ONE, self.scaled(x, -1))
            case "div":
                return self.times(x, self.inverse(args[1]))
            case "neg":
                return self.scaled(x, -1)
            case "reciprocal":
                return self.inverse(x)
            case "square":
                return self.times(x, x)
            case "rsqrt":
                return self.inverse(self.call("sqrt", (), [x]))
            case "exp":
                return self.exponential(x)
            case "log":
                return self.logarithm(x)
            case "silu":
                return self.times(x, self.call("sigmoid", (), [x]))
            case "max" | "min":
                return self.extreme(fn, args)
            case "relu":
                return self.extreme("max", [x, ()])
            case "pow" if Fraction(dict(attrs)["exponent"]).denominator == 1:
                return self.power(x, int(Fraction(dict(attrs)["exponent"])))
        return self.call(fn, tuple((k, str(v)) for k, v in attrs), args)

    def reshaped(self, v: _Value, after: tuple[Axis, ...]) -> _Value:
        """Old indices as digits of new ones, group by group of adjacent axes with as many entries."""
        if {a.name for a in v.axes} == {a.name for a in after}:
            return v
        self.laws.add(INDICES)
        moved: dict[str, Index] = {}
        for left, right in _regrouped(v.axes, after):
            whole = join([(f"${a.name}", a.size) for a in right])
            sizes = tuple(a.size for a in left)
            moved |= {f"${a.name}": digit(whole, sizes, n) for n, a in enumerate(left)}
        return _Value(after, self.with_(v.form, moved))


def _regrouped(before: Sequence[Axis], after: Sequence[Axis]) -> Iterator[tuple[Sequence[Axis], Sequence[Axis]]]:
    i = j = 0
    while i < len(before) or j < len(after):
        ends = itertools.product(range(i, len(before) + 1), range(j, len(after) + 1))
        fits = [
            (m, n) for m, n in ends if (m, n) > (i, j) and m + n > i + j and _count(before[i:m]) == _count(after[j:n])
        ]
        fits = [(m, n) for m, n in fits if m > i and n > j] or fits
        if not fits:
            raise Undecided
        m, n = min(fits, key=sum)
        yield before[i:m], after[j:n]
        i, j = m, n


def _count(axes: Sequence[Axis]) -> Size:
    return product(a.size for a in axes)


# -- indices ------------------------------------------------------------------------------------------------------


def at(start: int, step: int, i: Index) -> Index:
    if start == 0 and step == 1:
        return i
    if isinstance(i, tuple) and i[0] == "at":
        return ("at", start + step * i[1], step * i[2], i[3])
    return ("at", start, step, i)


def join(digits: Sequence[tuple[Index, Size]]) -> Index:
    """The row-major index of digits, of which those that are all digits of one index are that index."""
    flat: list[tuple[Index, Size]] = []
    for i, size in digits:
        if size == 1:
            continue
        flat += i[1] if isinstance(i, tuple) and i[0] == "join" else [(i, size)]
    done = False
    while not done:
        done = True
        for n, (i, _) in enumerate(flat):
            if isinstance(i, tuple) and i[0] == "digit" and i[3] == 0:
                count = len(i[2])
                if [x for x, _ in flat[n : n + count]] == [("digit", i[1], i[2], k) for k in range(count)]:
                    flat[n : n + count] = [(i[1], product(i[2]))]
                    done = False
                    break
    if not flat:
        return ("join", ())
    return flat[0][0] if len(flat) == 1 else ("join", tuple(flat))


def digit(i: Index, sizes: tuple[Size, ...], n: int) -> Index:
    """Digit n of an index in these sizes: of an index that is given by digits itself, those that it consists of."""
    if sizes[n] == 1:
        return ("join", ())
    kept = tuple(s for s in sizes if s != 1)
    n -= sum(s == 1 for s in sizes[:n])
    if len(kept) == 1:
        return i
    if isinstance(i, tuple) and i[0] == "join":
        rest = list(i[1])
        found: list[list[tuple[Index, Size]]] = []
        for size in reversed(kept):
            taken: list[tuple[Index, Size]] = []
            while rest and product(s for _, s in taken) != size:
                taken.insert(0, rest.pop())
            found.insert(0, taken)
            if product(s for _, s in taken) != size:
                return ("digit", i, kept, n)
        if not rest:
            return join(found[n])
    return ("digit", i, kept, n)


def _pairs(powers: Powers) -> Iterator[tuple[tuple[str, Size], tuple[str, Size]]]:
    """Adjacent digits that are variables."""
    for i in _joins(powers):
        for a, b in itertools.pairwise(i[1]):
            if isinstance(a[0], str) and isinstance(b[0], str):
                yield a, b


def _joins(value: Any) -> Iterator[Index]:
    if isinstance(value, tuple):
        if value[:1] == ("join",):
            yield value
        for x in value:
            yield from _joins(x)


def _occurrences(value: Any, v: str, w: str) -> bool:
    """Whether v and w occur nowhere but as adjacent digits, in this order."""
    if value in (v, w):
        return False
    if not isinstance(value, tuple):
        return True
    if value[:1] == ("join",):
        digits = [i for i, _ in value[1]]
        places = [n for n, i in enumerate(digits) if i == v]
        if any(n + 1 >= len(digits) or digits[n + 1] != w for n in places):
            return False
        if digits.count(w) != len(places):
            return False
        return all(_occurrences(i, v, w) for i in digits if i not in (v, w))
    return all(_occurrences(x, v, w) for x in value)


def _fused(value: Any, v: str, w: str, new: str, size: Size) -> Any:
    """v and w as one digit."""
    if not isinstance(value, tuple):
        return value
    if value[:1] == ("join",):
        digits: list[tuple[Index, Size]] = []
        for i, s in value[1]:
            if i == w:
                continue
            digits.append((new, size) if i == v else (_fused(i, v, w, new, size), s))
        return join(digits)
    return tuple(_fused(x, v, w, new, size) for x in value)


def _monoids(op: Op) -> tuple[str, ...]:
    """The monoids in which results of tiles add up to the result of the whole."""
    match op:
        case Contract() | Reduce("sum"):
            return "sum", "rescaled"
        case Reduce("max" | "min" as kind):
            return (kind,)
        case _:
            return ()
