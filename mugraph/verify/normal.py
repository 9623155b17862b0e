"""Normal forms of values with indices, for the `proved` tier.

A value is a sum of terms, a term a rational times powers of atoms:

    input[index, ...]      |axis|      exp(term)      f(values)      Σ over bound indices of a product of atoms

Terms are expanded, factors are pushed out of sums that they do not depend on, sums are flattened (Σ_j (Σ_k a) b = Σ_jk
a b) and cut into connected components, exp(a + b) = exp a · exp b, and bound indices are named canonically.

Everything is a `Node`, made once: equal nodes of one `Forms` are one object (hash-consing, Ershov 1958), so equality is
identity, and the order of their making is the order in which factors and terms are kept.  A value that occurs often is
rewritten once.  Every step counts as work, of which there is a limited amount.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mugraph.ir.axes import Monomial, Size, product

MOST_TERMS = 400  # of one value
MOST_BOUND = 7  # indices of one connected sum
MOST_DEPTH = 300  # of nodes in nodes
MOST_ORDERS = 720  # of bound indices that cannot be told apart
MOST_WORK = 200_000  # nodes made or looked at, factors multiplied; about 1.4 s where a step is dear

LINEAR = "sums are linear: factors move out of sums that they do not depend on, sums of sums flatten and reorder"
RING = "addition and multiplication are those of a field: terms expand, commute and cancel"
EXPONENTS = "exp(a + b) = exp(a)·exp(b), exp(c·a) = exp(a)^c"
LOGARITHM = "log(v·exp(m)) = log(v) + m"
CONGRUENCE = "equal arguments give equal results"
SEMILATTICE = "max and min are associative, commutative and idempotent"
INDICES = "indices of reshapes and slices compose; a sum over all digits of an index is the sum over the index"
PARTS = "the parts of a split axis partition it"
PIECES = "the pieces of a joined axis partition it: a sum over the axis is the sum over its pieces"

Number = int | Fraction  # whole numbers as int
Factor = tuple["Node", Number]


class Undecided(Exception):
    """The normal form is not computed: out of budget, or an operator that it does not cover."""


class Work:
    """How many more steps may be done.  Raises Undecided where there are none."""

    def __init__(self, most: int = MOST_WORK) -> None:
        self.most = self.left = most

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise Undecided(f"the normal forms take more than {self.most} steps")


class Node:
    """An index, an atom, a product of powers of atoms, or a sum of products, by `kind`:

        at(start, step, i)    join((i, size), ...)    digit(i, sizes, n)    value(sum)                   indices
        rest(i, sizes, n)    shift(i, sizes)
        load(name, i, ...)    index(i)    in(i, part, axis)    size(size)    exp(product)    paren(sum)
        piece(i, sizes, n)
        call(fn, attrs, args)    sum(bound, product)    lambda(height, sizes, sum)                        atoms
        product((atom, power), ...)    terms((product, coefficient), ...)

    Of an axis that is joined from pieces of these sizes, piece is 1 where i is in the n-th and 0 elsewhere, rest is the
    place in that piece, and shift the place in the axis that follows those sizes.

    An index may also be a variable, a string: `$axis` (free), `%height.n` (bound) or `$#n` (fresh).  `variables` are
    the free ones, and CUT where there are pieces; `height` says how deep binders are nested."""

    __slots__ = ("depth", "height", "kind", "parts", "serial", "variables")

    def __init__(self, kind: str, parts: tuple[Any, ...], serial: int) -> None:
        self.kind, self.parts, self.serial = kind, parts, serial
        variables, height, depth = _open(parts)
        if depth == MOST_DEPTH:
            raise Undecided(f"values nest more than {MOST_DEPTH} nodes deep")
        if kind == "sum":
            variables -= {v for v, _ in parts[0]}
            height += 1
        elif kind == "lambda":
            variables -= set(bound_names(parts[0], len(parts[1])))
            height += 1
        elif kind in ("piece", "rest"):
            variables |= {CUT}
        self.variables, self.height, self.depth = variables, height, depth + 1


Index = Node | str
CUT = "&"
_NO_VARIABLES: frozenset[str] = frozenset()


def _open(value: Any) -> tuple[frozenset[str], int, int]:
    """Variables, and nesting of binders and of nodes, of what a node is made of."""
    if isinstance(value, Node):
        return value.variables, value.height, value.depth
    if isinstance(value, str):
        return (frozenset((value,)) if value[:1] in ("$", "%") else _NO_VARIABLES), 0, 0
    variables, height, depth = _NO_VARIABLES, 0, 0
    if isinstance(value, tuple):
        for x in value:
            own, binders, nodes = _open(x)
            if own and not own <= variables:
                variables = own | variables if variables else own
            height, depth = max(height, binders), max(depth, nodes)
    return variables, height, depth


def _span(i: Index, how: Rewriting) -> Span:
    """What is known of an index that is given by digits, or was."""
    start, step, inner = i.parts if isinstance(i, Node) and i.kind == "at" else (0, 1, i)
    if i in how.lengths:
        return Span(inner, start, step, how.lengths[i])
    if isinstance(inner, Node) and inner.kind == "join":
        return Span(inner, start, step, product(s for _, s in inner.parts))
    return Span(i, None, 1, 1)


def bound_names(height: int, count: int) -> list[str]:
    return [f"%{height}.{i}" for i in range(count)]


def children(value: Any) -> Iterator[Node]:
    """The nodes that a node is made of."""
    for x in value.parts if isinstance(value, Node) else value:
        if isinstance(x, Node):
            yield x
        elif isinstance(x, tuple):
            yield from children(x)


def simplest(x: Number) -> Number:
    return x.numerator if x.denominator == 1 else x


def serial_of(pair: tuple[Node, Any]) -> int:
    return pair[0].serial


@dataclass(frozen=True)
class Span:
    """What an index that is replaced runs over: `start + step · i` for i below a length, where these are known; the
    n-th piece of an axis that is joined from pieces of these sizes."""

    index: Index
    start: int | None
    step: int
    length: Size
    sizes: tuple[Size, ...] = ()
    n: int = 0

    def piece(self, sizes: tuple[Size, ...], n: int) -> tuple[int, tuple[int, ...], int] | bool | None:
        """Of an axis joined from pieces of these sizes, what the span sees of the n-th: all of itself (True), nothing
        (False), or, where it runs over several, where it starts in the n-th, the lengths of what it sees of each, and
        which of these is the n-th.  None where this is not known."""
        if sizes == self.sizes:
            return n == self.n
        numbers = [s for s in sizes if isinstance(s, int)]
        if self.start is None or not isinstance(self.length, int) or len(numbers) < len(sizes):
            return None
        last = self.start + self.step * (self.length - 1)
        ends = list(itertools.accumulate(numbers))
        low, high = ends[n] - numbers[n], ends[n]
        if low <= self.start and last < high:
            return True
        if last < low or self.start >= high:
            return False
        if self.step != 1:
            return None
        seen = [min(last + 1, e) - max(self.start, e - k) for k, e in zip(numbers, ends, strict=True)]
        return max(self.start - low, 0), tuple(k for k in seen if k > 0), sum(k > 0 for k in seen[:n])


class Rewriting:
    """Variables to be replaced by indices, some of them with what these run over; of two that are fused, (v, w), the
    digits (v, w) by one of the given size.  Remembers what became of each node."""

    def __init__(
        self,
        names: Mapping[str, Index],
        fused: tuple[str, str, str, Size] | None = None,
        spans: Mapping[str, Span] | None = None,
    ) -> None:
        self.names = dict(names)
        self.fused = fused
        self.spans = spans or {}
        self.keys = frozenset(self.names) | frozenset(fused[:2] if fused else ())
        self.taken = self.keys.union(*(_open(i)[0] for i in self.names.values()))
        self.done: dict[Node, Any] = {}
        self.lengths: dict[Index, Size] = {}  # of indices that stand where there were digits


class Forms:
    """Normal forms, and the laws that they took.  An axis that has `borders`, by its variable, is a joint of pieces of
    these sizes, and so is what is summed over it; `inputs` have their axes as variables."""

    def __init__(
        self,
        numbers: bool,
        work: Work,
        borders: Mapping[str, tuple[int, ...]],
        inputs: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.numbers = numbers
        self.borders = dict(borders)
        self.inputs = inputs or {}
        self.work = work
        self.laws: set[str] = {RING}
        self.fresh_count = 0
        self.nodes: dict[tuple[str, tuple[Any, ...]], Node] = {}
        self.colours: dict[Any, int] = {}
        self.empty = self.node("product", ())
        self.zero = self.node("terms", ())
        self.one = self.number(1)

    def node(self, kind: str, parts: tuple[Any, ...]) -> Node:
        found = self.nodes.get((kind, parts))
        if found is None:
            self.work.spend(1 + len(parts))
            found = self.nodes[kind, parts] = Node(kind, parts, len(self.nodes))
        return found

    def fresh(self) -> str:
        self.fresh_count += 1
        return f"$#{self.fresh_count}"

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def number(self, value: Number) -> Node:
        return self.node("terms", ((self.empty, simplest(value)),) if value else ())

    def product(self, found: Mapping[Node, Number]) -> Node:
        return self.node("product", tuple(sorted(((a, simplest(p)) for a, p in found.items() if p), key=serial_of)))

    def power_of(self, atom: Node, p: Number = 1, c: Number = 1) -> Node:
        """c · atom^p, as a value."""
        return self.node("terms", ((self.node("product", ((atom, p),)), c),))

    def atom(self, kind: str, *parts: Any) -> Node:
        """An atom as a value."""
        return self.power_of(self.node(kind, parts))

    def term(self, factors: Node, c: Number = 1) -> Node:
        return self.node("terms", ((factors, simplest(c)),) if c else ())

    def gathered(self, terms: Iterable[tuple[Node, Number]]) -> Node:
        """Like terms merged."""
        found: dict[Node, Number] = {}
        for factors, c in terms:
            found[factors] = found[factors] + c if factors in found else c
        self.work.spend(len(found))
        kept = tuple(sorted(((p, simplest(c)) for p, c in found.items() if c), key=serial_of))
        if len(kept) > MOST_TERMS:
            raise Undecided(f"a value has more than {MOST_TERMS} terms")
        return self.node("terms", kept)

    def plus(self, *values: Node) -> Node:
        return self.gathered(t for v in values for t in v.parts)

    def scaled(self, a: Node, c: Number) -> Node:
        return a if c == 1 else self.node("terms", tuple((p, simplest(k * c)) for p, k in a.parts) if c else ())

    def minus(self, a: Node, b: Node) -> Node:
        return self.plus(a, self.scaled(b, -1))

    def times(self, *values: Node) -> Node:
        result = self.one
        for v in values:
            if result is self.one or v is self.one:
                result = v if result is self.one else result
                continue
            if len(result.parts) * len(v.parts) > 50 * MOST_TERMS:
                raise Undecided(f"a product has more than {50 * MOST_TERMS} terms")
            result = self.gathered((self.merged(p, q), c * d) for p, c in result.parts for q, d in v.parts)
        return result

    def merged(self, a: Node, b: Node) -> Node:
        self.work.spend(1 + len(a.parts) + len(b.parts))
        if not a.parts or not b.parts:
            return b if not a.parts else a
        found: dict[Node, Number] = dict(a.parts)
        for atom, p in b.parts:
            found[atom] = found[atom] + p if atom in found else p
        return self.product(found)

    def power(self, a: Node, n: int) -> Node:
        return self.power(self.inverse(a), -n) if n < 0 else self.times(*[a] * n)

    def inverse(self, a: Node) -> Node:
        """1/a: powers of one term change sign; of several, what they share is taken out first."""
        if not a.parts:
            raise Undecided("something is divided by zero")
        if len(a.parts) == 1:
            ((factors, c),) = a.parts
            sums = [(x.parts[0], -p) for x, p in factors.parts if x.kind == "paren"]
            rest = self.product({x: -p for x, p in factors.parts if x.kind != "paren"})
            return self.times(self.term(rest, Fraction(1) / c), *(self.power(v, int(p)) for v, p in sums))
        shared: dict[Node, Number] = dict(a.parts[0][0].parts)
        for factors, _ in a.parts[1:]:
            own: dict[Node, Number] = dict(factors.parts)
            shared = {x: min(p, own[x]) for x, p in shared.items() if x in own and (p > 0) == (own[x] > 0)}
        lead = a.parts[0][1]
        out = self.product({x: -p for x, p in shared.items()})
        rest = self.gathered((self.merged(p, out), Fraction(c) / lead) for p, c in a.parts)
        inside = self.node("paren", (rest,))
        return self.term(self.merged(out, self.node("product", ((inside, -1),))), Fraction(1) / lead)

    def exponential(self, a: Node) -> Node:
        self.laws.add(EXPONENTS)
        return self.term(self.product({self.node("exp", (factors,)): c for factors, c in a.parts}))

    def call(self, fn: str, attrs: tuple[Any, ...], args: Sequence[Node]) -> Node:
        self.laws.add(CONGRUENCE)
        return self.atom("call", fn, attrs, tuple(args))

    def alone(self, a: Node, kind: str = "call") -> Node | None:
        """The atom that a value consists of."""
        if len(a.parts) == 1 and a.parts[0][1] == 1 and len(a.parts[0][0].parts) == 1:
            atom, p = a.parts[0][0].parts[0]
            return atom if p == 1 and atom.kind == kind else None
        return None

    def called(self, fn: str, attrs: tuple[Any, ...], args: Sequence[Node]) -> Node:
        """A function of arguments in normal form."""
        return self.call(fn, attrs, args)

    # -- sums ----------------------------------------------------------------------------------------------------

    def size(self, size: Size) -> Node:
        """A product of symbols.  A static size is a symbol of its own, or a number."""
        if isinstance(size, int):
            return self.number(size) if self.numbers or size == 1 else self.atom("size", size)
        if isinstance(size, Monomial):
            symbols = [self.power(self.atom("size", d.name), p) for d, p in size.powers]
            return self.times(self.number(size.coefficient), *symbols)
        return self.atom("size", size.name)

    def total(self, a: Node, bound: Mapping[str, Size]) -> Node:
        """Σ over variables."""
        self.laws.add(LINEAR)
        return self.gathered(t for factors, c in a.parts for t in self.summed(factors, c, bound).parts)

    def summed(self, factors: Node, c: Number, bound: Mapping[str, Size]) -> Node:
        self.work.spend(1 + len(factors.parts))
        if found := self.cut(factors, bound):
            return self.plus(*(self.total(v, sizes) for v, sizes in self.pieces(self.term(factors, c), bound, *found)))
        open_: dict[str, Size] = dict(bound)
        waiting: list[Factor] = list(factors.parts)
        inside: dict[Node, Number] = {}
        outside: dict[Node, Number] = {}
        while waiting:
            atom, p = waiting.pop()
            if atom.variables.isdisjoint(open_):
                outside[atom] = outside.get(atom, 0) + p
            elif atom.kind == "sum" and p > 0 and p.denominator == 1:
                for _ in range(int(p)):
                    names = {b: self.fresh() for b, _ in atom.parts[0]}
                    open_.update((names[b], size) for b, size in atom.parts[0])
                    body, k = self.renamed_term(atom.parts[1], names)
                    waiting += body.parts
                    c *= k
            else:
                inside[atom] = inside.get(atom, 0) + p
        result = self.term(self.product(outside), c)
        used: set[str] = set()
        for names_of, part in self.components(self.product(inside), open_):
            used |= names_of.keys()
            result = self.times(result, self.canonical(part, names_of))
        return self.times(result, *(self.size(size) for name, size in open_.items() if name not in used))

    def cut(self, value: Node, bound: Iterable[str]) -> tuple[str, tuple[Size, ...]] | None:
        """A variable over an axis that is joined from pieces, and their sizes."""
        for v in bound:
            if v in self.borders and v in value.variables:
                return v, self.borders[v]
        if CUT not in value.variables:
            return None
        for at in self.below(value, (CUT,)):
            if at.kind in ("piece", "rest") and at.parts[0] in bound:
                return at.parts[:2]
        return None

    def pieces(
        self, value: Node, bound: Mapping[str, Size], v: str, sizes: tuple[Size, ...]
    ) -> Iterator[tuple[Node, dict[str, Size]]]:
        """A value for each of the pieces of a bound variable, with the variables that are then bound."""
        self.laws.add(PIECES)
        others = {w: size for w, size in bound.items() if w != v}
        for n, size in enumerate(sizes):
            new = self.fresh()
            yield self.in_piece(value, v, sizes, n, new), {**others, new: size}

    def cut_out(self, value: Node, v: str, span: Span) -> Node:
        """A value at the places of a span of a variable, whose start is known."""
        place = self.at(span.start or 0, span.step, span.index)
        return self.rewritten(value, Rewriting({v: place}, None, {v: span}))

    def in_piece(self, value: Node, v: str, sizes: tuple[Size, ...], n: int, new: str) -> Node:
        before = [s for s in sizes[:n] if isinstance(s, int)]
        start = sum(before) if len(before) == n else None
        place = self.node("shift", (new, sizes[:n])) if start is None else self.at(start, 1, new)
        span = Span(new, start, 1, sizes[n], sizes, n)
        return self.rewritten(value, Rewriting({v: place}, None, {v: span}))

    def components(self, factors: Node, bound: Mapping[str, Size]) -> Iterator[tuple[dict[str, Size], Node]]:
        """Factors that share bound variables, together."""
        groups: list[tuple[set[str], list[Factor]]] = []
        for factor in factors.parts:
            names, members = {v for v in factor[0].variables if v in bound}, [factor]
            apart = []
            for other in groups:
                if other[0] & names:
                    names |= other[0]
                    members += other[1]
                else:
                    apart.append(other)
            groups = [*apart, (names, members)]
        for names, members in groups:
            yield {n: s for n, s in bound.items() if n in names}, self.product(dict(members))

    def canonical(self, factors: Node, bound: Mapping[str, Size]) -> Node:
        """One connected sum as an atom, its variables named by what they do."""
        factors, bound = self.simplified(factors, bound)
        if self.cut(factors, bound):  # digits of a joined axis became one index
            return self.total(self.term(factors), bound)
        if not bound:
            return self.term(factors)
        if len(bound) > MOST_BOUND:
            raise Undecided(f"a sum is over more than {MOST_BOUND} indices that belong together")
        height = 1 + factors.height
        found: list[tuple[Node, Number]] = []
        for order in self.orders(factors.parts, bound):
            names = dict(zip(order, bound_names(height, len(order)), strict=True))
            body, c = self.renamed_term(factors, names)
            # c is not 1 where a denominator has another leading term under these names
            found.append((self.node("sum", (tuple((names[v], bound[v]) for v in order), body)), c))
        chosen, c = min(found, key=serial_of)
        return self.power_of(chosen, 1, c)

    def orders(self, pieces: Sequence[tuple[Node, Number]], bound: Mapping[str, Size]) -> Iterator[tuple[str, ...]]:
        """Orders of the variables of a product or sum that a canonical one is chosen from: told apart by where they
        occur, if they are.  Colours are refined until no more of them differ (Weisfeiler and Leman 1968)."""
        if len(bound) == 1:
            yield tuple(bound)
            return
        colours = {v: self.coloured("bound", str(size)) for v, size in bound.items()}
        while True:
            finer = {}
            for v in bound:
                marked = {**colours, v: self.coloured("this", colours[v])}
                done: dict[Node, int] = {}
                own = sorted(self.coloured(self.colour(a, marked, done), p) for a, p in pieces if v in a.variables)
                finer[v] = self.coloured("variable", colours[v], *own)
            stable = len(set(finer.values())) == len(set(colours.values()))
            colours = finer
            if stable or len(set(colours.values())) == len(bound):
                break
        ranked = sorted(bound, key=colours.__getitem__)
        groups = [list(g) for _, g in itertools.groupby(ranked, key=colours.__getitem__)]
        count = 1
        for g in groups:
            for i in range(2, len(g) + 1):
                count *= i
        if count > MOST_ORDERS:
            raise Undecided(f"indices of a sum can be ordered in more than {MOST_ORDERS} ways")
        for choice in itertools.product(*(itertools.permutations(g) for g in groups)):
            yield tuple(v for g in choice for v in g)

    def coloured(self, *parts: Any) -> int:
        """A number for each description."""
        return self.colours.setdefault(parts, len(self.colours))

    def colour(self, value: Any, colours: Mapping[str, int], done: dict[Node, int]) -> int:
        """What a node is, up to the order of factors and terms and the names of bound variables, which are known by
        their colours."""
        if isinstance(value, str):
            return colours[value] if value in colours else self.coloured("name", value)
        if not isinstance(value, Node):
            if isinstance(value, tuple):
                return self.coloured("tuple", *[self.colour(x, colours, done) for x in value])
            return self.coloured("constant", type(value).__name__, value)
        if value.variables.isdisjoint(colours):
            return self.coloured("node", value.serial)
        if value in done:
            return done[value]
        self.work.spend(1)
        if value.kind == "sum":
            own = {v: self.coloured("bound", str(size)) for v, size in value.parts[0]}
            found = self.coloured("sum", self.colour(value.parts[1], {**colours, **own}, {}), *sorted(own.values()))
        elif value.kind in ("product", "terms") or (value.kind == "call" and value.parts[0] == "max"):
            members = value.parts[2] if value.kind == "call" else value.parts
            found = self.coloured(value.kind, *sorted(self.colour(x, colours, done) for x in members))
        else:
            found = self.coloured(value.kind, *[self.colour(x, colours, done) for x in value.parts])
        done[value] = found
        return found

    def simplified(self, factors: Node, bound: Mapping[str, Size]) -> tuple[Node, dict[str, Size]]:
        """Digits that always stand together are one index; an entry is in one part."""
        open_ = dict(bound)
        changed = True
        while changed:
            changed = False
            for v in list(open_):
                using = [(a, p) for a, p in factors.parts if v in a.variables]
                if len(using) == 1 and using[0][0].kind == "in" and using[0][1] == 1 and using[0][0].parts[1] == v:
                    self.laws.add(PARTS)
                    factors = self.node("product", tuple(f for f in factors.parts if f != using[0]))
                    del open_[v]
                    changed = True
            if len(open_) < 2:
                continue
            if pair := next((x for x in self.adjacent(factors, open_) if self.together(factors, *x)), None):
                v, w = pair
                new, size = self.fresh(), product((open_[v], open_[w]))
                self.laws.add(INDICES)
                rewritten = self.rewritten(self.term(factors), Rewriting({}, (v, w, new, size)))
                if len(rewritten.parts) != 1 or rewritten.parts[0][1] != 1:
                    raise Undecided("a sum over digits is no sum over their index")
                factors = rewritten.parts[0][0]
                del open_[v], open_[w]
                open_[new] = size
                self.border(factors, new, size)
                changed = True
        return factors, open_

    def border(self, factors: Node, v: str, size: Size) -> None:
        """A variable that indexes axes of inputs has their borders."""
        ends: set[int] = set()
        for at in self.below(factors, (v,)) if isinstance(size, int) and self.borders else ():
            if at.kind != "load":
                continue
            for i, axis in zip(at.parts[1:], self.inputs.get(at.parts[0], ()), strict=False):
                start, step, inner = i.parts if isinstance(i, Node) and i.kind == "at" else (0, 1, i)
                if inner == v and step == 1:
                    ends.update(e - start for e in itertools.accumulate(self.borders.get(axis, ())))
        if isinstance(size, int) and (inside := sorted(e for e in ends if 0 < e < size)):
            self.borders[v] = tuple(b - a for a, b in itertools.pairwise([0, *inside, size]))

    def below(self, root: Node, names: Iterable[str]) -> Iterator[Node]:
        """The nodes in which some of the variables are free, each once."""
        wanted = frozenset(names)
        waiting, seen = [root], {root}
        while waiting:
            at = waiting.pop()
            self.work.spend(1)
            yield at
            for x in children(at):
                if x not in seen and not x.variables.isdisjoint(wanted):
                    seen.add(x)
                    waiting.append(x)

    def adjacent(self, factors: Node, bound: Mapping[str, Size]) -> list[tuple[str, str]]:
        """Bound variables that are adjacent digits somewhere, each running over all its digit's values."""
        found: dict[tuple[str, str], None] = {}
        for at in self.below(factors, bound):
            if at.kind == "join":
                for (v, s), (w, t) in itertools.pairwise(at.parts):
                    if isinstance(v, str) and isinstance(w, str) and bound.get(v) == s and bound.get(w) == t:
                        found[v, w] = None
        return list(found)

    def together(self, factors: Node, v: str, w: str) -> bool:
        """Whether v and w occur nowhere but as adjacent digits, in this order."""
        for at in self.below(factors, (v, w)):
            if at.kind == "join":
                digits = [i for i, _ in at.parts]
                places = [n for n, i in enumerate(digits) if i == v]
                if digits.count(w) != len(places) or any(digits[n + 1 : n + 2] != [w] for n in places):
                    return False
            elif any(x in (v, w) for x in _strings(at.parts)):
                return False
        return True

    # -- substitution --------------------------------------------------------------------------------------------

    def renamed_term(self, factors: Node, names: Mapping[str, str]) -> tuple[Node, Number]:
        """A product with variables under other names, which leaves it one."""
        found = self.with_(self.term(factors), names).parts
        if len(found) != 1:
            raise Undecided("a term is another one under other names of its indices")
        body, c = found[0]
        return body, c

    def with_(self, a: Node, names: Mapping[str, Index]) -> Node:
        """A value with variables replaced by indices."""
        return self.rewritten(a, Rewriting({v: i for v, i in names.items() if v != i}))

    def rewritten(self, a: Node, how: Rewriting) -> Node:
        """A value or an argument of a function, rewritten and normal again."""
        if a.variables.isdisjoint(how.keys):
            return a
        if a in how.done:
            found: Node = how.done[a]
            return found
        self.work.spend(1)
        terms: list[tuple[Node, Number]] = []
        for factors, c in a.parts:
            terms += [(p, c * k) for p, k in self.product_rewritten(factors, how).parts]
        result = how.done[a] = self.gathered(terms)
        return result

    def product_rewritten(self, factors: Node, how: Rewriting) -> Node:
        if factors in how.done:
            found: Node = how.done[factors]
            return found
        self.work.spend(1 + len(factors.parts))
        same: dict[Node, Number] = {}
        others: list[Node] = []
        for atom, p in factors.parts:
            if atom.variables.isdisjoint(how.keys):
                same[atom] = same.get(atom, 0) + p
                continue
            changed = self.atom_rewritten(atom, how)
            if (
                len(changed.parts) == 1
                and changed.parts[0][1] == 1
                and all(x.kind != "paren" for x, _ in changed.parts[0][0].parts)
            ):
                for x, n in changed.parts[0][0].parts:
                    same[x] = same.get(x, 0) + n * p
            elif p.denominator == 1:
                others.append(self.power(changed, int(p)))
            else:
                raise Undecided("a root of a sum")
        result = how.done[factors] = self.times(self.term(self.product(same)), *others)
        return result

    def atom_rewritten(self, atom: Node, how: Rewriting) -> Node:
        if atom in how.done:
            found: Node = how.done[atom]
            return found
        self.work.spend(1 + len(atom.parts))
        result = how.done[atom] = self.atom_again(atom, how)
        return result

    def atom_again(self, atom: Node, how: Rewriting) -> Node:
        match atom.kind, atom.parts:
            case "load", (name, *indices):
                return self.atom("load", name, *(self.index_rewritten(i, how) for i in indices))
            case "index", (i,):
                return self.place(self.index_rewritten(i, how))
            case "in", (i, part, axis):
                return self.atom("in", self.index_rewritten(i, how), self.index_rewritten(part, how), axis)
            case "piece", (i, sizes, n):
                place = self.index_rewritten(i, how)
                seen = (how.spans.get(i) or _span(place, how)).piece(sizes, n)
                if seen is None or (i not in how.spans and not isinstance(seen, bool)):
                    return self.atom("piece", place, sizes, n)
                if isinstance(seen, bool):
                    return self.one if seen else self.zero
                return self.atom("piece", how.spans[i].index, seen[1], seen[2])
            case "exp", (factors,):
                return self.exponential(self.product_rewritten(factors, how))
            case "paren", (a,):
                return self.rewritten(a, how)
            case "call", (fn, attrs, args):
                found = [self.rewritten(x, how) for x in args]
                return self.called(fn, tuple(how.names.get(x, x) if isinstance(x, str) else x for x in attrs), found)
            case "lambda", (height, sizes, body):
                names, inner = self.apart(bound_names(height, len(sizes)), how)
                return self.bound(self.rewritten(body, inner), dict(zip(names, sizes, strict=True)))
            case "sum", (bound, body):
                names, inner = self.apart([v for v, _ in bound], how)
                sizes = [size for _, size in bound]
                return self.total(self.product_rewritten(body, inner), dict(zip(names, sizes, strict=True)))
        raise AssertionError(atom.kind)

    def place(self, i: Index) -> Node:
        """An index as a value."""
        if isinstance(i, Node) and i.kind == "at":
            start, step, inner = i.parts
            return self.plus(self.number(start), self.scaled(self.place(inner), step))
        if isinstance(i, Node) and i.kind == "shift":
            return self.plus(self.place(i.parts[0]), *map(self.size, i.parts[1]))
        return self.atom("index", i)

    def apart(self, names: list[str], how: Rewriting) -> tuple[list[str], Rewriting]:
        """The names of bound variables under a rewriting that leaves them alone: others, where it speaks of them."""
        if how.taken.isdisjoint(names):
            return names, how
        others = {v: self.fresh() for v in names}
        return list(others.values()), Rewriting({**how.names, **others}, how.fused, how.spans)

    def index_rewritten(self, i: Index, how: Rewriting) -> Index:
        if isinstance(i, str):
            return how.names.get(i, i)
        if i.variables.isdisjoint(how.keys):
            return i
        if i in how.done:
            found: Index = how.done[i]
            return found
        result = how.done[i] = self.index_again(i, how)
        return result

    def index_again(self, i: Node, how: Rewriting) -> Index:
        match i.kind, i.parts:
            case "at", (start, step, inner):
                return self.at(start, step, self.index_rewritten(inner, how))
            case "join", digits:
                if how.fused:
                    v, w, new, size = how.fused
                    digits = tuple((new, size) if x == v else (x, s) for x, s in digits if x != w)
                return self.cut_digits(digits, how)
            case "digit", (whole, sizes, n):
                return self.digit(self.index_rewritten(whole, how), sizes, n)
            case "shift", (place, sizes):
                return self.node("shift", (self.index_rewritten(place, how), sizes))
            case "rest", (whole, sizes, n):
                span = how.spans.get(whole)
                if span is None:
                    place = self.index_rewritten(whole, how)
                    span = _span(place, how)
                    if span.piece(sizes, n) is True:
                        return self.at(-sum(s for s in sizes[:n] if isinstance(s, int)), 1, place)
                    return self.node("rest", (place, sizes, n))
                seen = span.piece(sizes, n)
                if seen is None or seen is False:  # where it is in no such piece, nothing looks at it
                    return self.node("rest", (self.index_rewritten(whole, how), sizes, n))
                if seen is True:
                    low = sum(s for s in sizes[:n] if isinstance(s, int))
                    return (
                        span.index if sizes == span.sizes else self.at((span.start or 0) - low, span.step, span.index)
                    )
                return self.at(seen[0], 1, self.node("rest", (span.index, seen[1], seen[2])))
            case "value", (a,):
                return self.node("value", (self.rewritten(a, how),))
        raise AssertionError(i.kind)

    def cut_digits(self, digits: tuple[tuple[Index, Size], ...], how: Rewriting) -> Index:
        """Digits rewritten.  The size of the first is nobody's stride: it is that of the span that is left of it, whose
        start stands before all."""
        (first, size), *rest = digits
        span = how.spans.get(first) if isinstance(first, str) else None
        others = [(self.index_rewritten(x, how), s) for x, s in rest]
        stride = product(s for _, s in rest)
        if span is None or span.start is None or span.step != 1 or not isinstance(stride, int):
            return self.join([(self.index_rewritten(first, how), size), *others])
        place = self.at(span.start * stride, 1, self.join([(span.index, span.length), *others]))
        how.lengths[place] = product((span.length, stride))
        return place

    def bound(self, form: Node, bound: Mapping[str, Size]) -> Node:
        """A value with some variables bound, as the argument of an opaque function."""
        height = 1 + form.height
        found: list[Node] = []
        for order in self.orders(form.parts, bound):
            body = self.with_(form, dict(zip(order, bound_names(height, len(order)), strict=True)))
            found.append(self.node("lambda", (height, tuple(bound[v] for v in order), body)))
        return self.power_of(min(found, key=lambda a: a.serial))

    # -- indices -------------------------------------------------------------------------------------------------

    def at(self, start: int, step: int, i: Index) -> Index:
        """start + step · i"""
        if isinstance(i, Node) and i.kind == "at":
            start, step, i = start + step * i.parts[0], step * i.parts[1], i.parts[2]
        return i if (start, step) == (0, 1) else self.node("at", (start, step, i))

    def join(self, digits: Iterable[tuple[Index, Size]]) -> Index:
        """The row-major index of digits, of which those that are all digits of one index are that index."""
        flat: list[tuple[Index, Size]] = []
        for i, size in digits:
            if size != 1:
                inner = isinstance(i, Node) and i.kind == "join" and product(s for _, s in i.parts) == size
                flat += i.parts if isinstance(i, Node) and inner else [(i, size)]
        n = 0
        while n < len(flat):
            i = flat[n][0]
            if isinstance(i, Node) and i.kind == "digit" and i.parts[2] == 0:
                whole, sizes, _ = i.parts
                row = [self.node("digit", (whole, sizes, k)) for k in range(len(sizes))]
                if [x for x, _ in flat[n : n + len(row)]] == row:
                    flat[n : n + len(row)] = [(whole, product(sizes))]
                    n = 0  # which may be a digit itself
                    continue
            n += 1
        return flat[0][0] if len(flat) == 1 else self.node("join", tuple(flat))

    def digit(self, i: Index, sizes: tuple[Size, ...], n: int) -> Index:
        """Digit n of an index in these sizes: of an index that is given by digits itself, those that it consists of."""
        if sizes[n] == 1:
            return self.node("join", ())
        kept = tuple(s for s in sizes if s != 1)
        n -= sum(s == 1 for s in sizes[:n])
        if len(kept) == 1:
            return i
        if isinstance(i, Node) and i.kind == "join":
            rest = list(i.parts)
            found: list[list[tuple[Index, Size]]] = []
            for size in reversed(kept):
                taken: list[tuple[Index, Size]] = []
                while rest and product(s for _, s in taken) != size:
                    taken.insert(0, rest.pop())
                found.insert(0, taken)
                if product(s for _, s in taken) != size:
                    return self.node("digit", (i, kept, n))
            if not rest:
                return self.join(found[n])
        return self.node("digit", (i, kept, n))


def _strings(value: Any) -> Iterator[str]:
    """The variables that a node is made of, those in its nodes aside."""
    for x in value:
        if isinstance(x, str):
            yield x
        elif isinstance(x, tuple):
            yield from _strings(x)
