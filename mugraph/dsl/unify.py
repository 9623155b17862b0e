"""Axes that are still being found out.

Tracing gives every dimension a variable; operators unify variables, and views split them.

    Var      one unknown axis.  Unified variables share a root.
    Form     what variables of equal structure share: a size, and the parts it is split into.

A split reaches every variable of the form, earlier uses included, so a program that views `hd` as `(h, d)` anywhere
has the atoms `h` and `d` everywhere.  Two variables that occur in one tensor are never unified: that would put one
axis twice into a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mugraph.errors import ShapeError
from mugraph.ir.axes import Dim, Monomial, Size, over, product


@dataclass(eq=False)
class Form:
    """A size and its parts.  `fixed` forms belong to axes that exist already and are never split."""

    size: Size
    fixed: bool = False
    parts: tuple[Form, ...] | None = None
    parent: Form | None = None
    members: list[Var] = field(default_factory=list)


@dataclass(eq=False)
class Var:
    """One unknown axis.  `hints` are wishes for its name, strongest 0; `groups` the tensors that contain it."""

    number: int
    form: Form
    hints: list[tuple[int, str]]
    groups: set[int] = field(default_factory=set)
    parent: Var | None = None
    parts: tuple[Var, ...] | None = None

    def wish(self, *hints: tuple[int, str]) -> None:
        """Adds those that it lacks: only the first of each counts, and aliases of aliases repeat them."""
        self.hints += [h for h in dict.fromkeys(hints) if h not in self.hints]

    @property
    def name(self) -> str:
        """The provisional axis name."""
        return f"v{self.number}"


VarDim = tuple[Var, ...]
VarDims = tuple[VarDim, ...]


class Axes:
    """All variables of one trace."""

    def __init__(self) -> None:
        self.all: list[Var] = []
        self._groups = 0

    # -- making and reading ------------------------------------------------------------------------------------

    def fresh(self, size: Size, *hints: tuple[int, str], fixed: bool = False) -> Var:
        return self._member(Form(size, fixed), hints)

    def alias(self, var: Var) -> Var:
        """A fresh variable of the same structure."""
        root = self.find(var)
        return self._member(self.form(root), root.hints)

    def _member(self, form: Form, hints: Iterable[tuple[int, str]]) -> Var:
        wishes = [*hints, (0, form.size.name.lower())] if isinstance(form.size, Dim) else list(hints)
        var = Var(len(self.all), form, [])
        var.wish(*wishes)
        self.all.append(var)
        form.members.append(var)
        return var

    def find(self, var: Var) -> Var:
        while var.parent is not None:
            var = var.parent
        return var

    def form(self, var: Var) -> Form:
        form = self.find(var).form
        while form.parent is not None:
            form = form.parent
        return form

    def size(self, var: Var) -> Size:
        return self.form(var).size

    def atoms(self, dim: Iterable[Var]) -> tuple[Var, ...]:
        """The parts that are not split further, in row-major order."""
        found: list[Var] = []
        for var in dim:
            root = self.find(var)
            if root.parts is None:
                found.append(root)
            else:
                found += self.atoms(root.parts)
        return tuple(found)

    def extent(self, dim: Iterable[Var]) -> Size:
        return product(self.size(v) for v in dim)

    # -- constraints -------------------------------------------------------------------------------------------

    def together(self, vars: Iterable[Var]) -> None:
        """These variables occur in one tensor: they stay apart."""
        self._groups += 1
        for atom in self.atoms(vars):
            atom.groups.add(self._groups)

    def may_unite(self, a: Var, b: Var) -> bool:
        both_fixed = self.form(a).fixed and self.form(b).fixed
        return self.size(a) == self.size(b) and not both_fixed and a.groups.isdisjoint(b.groups)

    def unite(self, a: Var, b: Var) -> None:
        """Atoms a and b are one axis from now on, in every tensor of the trace."""
        # an axis that exists already gives the class its name
        if self.form(b).fixed:
            a, b = b, a
        b.parent = a
        a.groups |= b.groups
        a.wish(*b.hints)
        self.link(a, b)

    def link(self, a: Var, b: Var) -> None:
        """Atoms a and b have one structure: a split of one splits the other."""
        x, y = self.form(a), b.form
        while y.parent is not None:
            y = y.parent
        if x is y:
            return
        y.parent = x
        x.fixed |= y.fixed
        x.members += y.members

    def split(self, var: Var, sizes: Sequence[Size]) -> None:
        """Cuts the form of an atom into parts; every variable of the form gets parts of its own."""
        form = self.form(var)
        form.parts = tuple(Form(size) for size in sizes)
        for member in form.members:
            if member.parent is None:
                member.parts = tuple(self._member(part, ()) for part in form.parts)
                for part in member.parts:
                    part.groups |= member.groups

    def align(self, a: Iterable[Var], b: Iterable[Var]) -> list[tuple[Var, Var]] | None:
        """Splits both dimensions (of equal extent) until their atoms correspond one to one; None, and nothing split,
        if no common refinement exists."""
        xs, ys = list(a), list(b)
        if refinement([self.size(v) for v in self.atoms(xs)], [self.size(v) for v in self.atoms(ys)]) is None:
            return None
        while True:
            left, right = self.atoms(xs), self.atoms(ys)
            sizes = [self.size(v) for v in left], [self.size(v) for v in right]
            at = next((i for i, (s, t) in enumerate(zip(*sizes, strict=False)) if s != t), None)
            if at is None:
                return list(zip(left, right, strict=True))
            common = refinement(sizes[0][at:], sizes[1][at:])
            if common is None:
                return None
            for atom, cut in zip((left[at], right[at]), (common[0][0], common[1][0]), strict=True):
                if len(cut) > 1:
                    if self.form(atom).fixed:
                        return None
                    self.split(atom, cut)
                    break  # the split may have reached the other side as well

    def cut(self, dim: Iterable[Var], sizes: Sequence[Size]) -> VarDims | None:
        """The atoms of a dimension in groups of these sizes, splitting atoms where needed; None if they do not fit."""
        wanted = [s for s in sizes if s != 1]
        parts = [self.fresh(s) for s in wanted]
        pairs = self.align(dim, parts)
        if pairs is None:
            return None
        own = {b: a for a, b in pairs}
        groups = iter(tuple(own[atom] for atom in self.atoms([part])) for part in parts)
        return tuple(() if s == 1 else next(groups) for s in sizes)


Pieces = list[list[Size]]


def refinement(a: Sequence[Size], b: Sequence[Size]) -> tuple[Pieces, Pieces] | None:
    """The coarsest common refinement of two row-major factorisations of one number: for each factor its pieces.

    >>> refinement([2, 6], [4, 3])
    ([[2], [2, 3]], [[2, 2], [3]])
    >>> refinement([4, 3], [6, 2]) is None
    True
    """
    left: Pieces = [[] for _ in a]
    right: Pieces = [[] for _ in b]
    i = j = 0
    x, y = (a[0] if a else 1), (b[0] if b else 1)
    while i < len(a) and j < len(b):
        piece = _common_head(x, y, last=i == len(a) - 1 or j == len(b) - 1)
        if piece is None:
            return None
        left[i].append(piece)
        right[j].append(piece)
        x, y = over(x, piece), over(y, piece)
        if x == 1:
            i += 1
            x = a[i] if i < len(a) else 1
        if y == 1:
            j += 1
            y = b[j] if j < len(b) else 1
    return (left, right) if i == len(a) and j == len(b) else None


def _common_head(x: Size, y: Size, last: bool) -> Size | None:
    """The next piece of both factors: the smaller, if it divides the larger."""
    if divides(x, y):
        return x
    if divides(y, x):
        return y
    # the last factor of one side is the product of all that is left on the other, as symbols or not
    if last and (isinstance(x, Dim | Monomial) or isinstance(y, Dim | Monomial)):
        return y if isinstance(y, int) else x
    return None


def divides(divisor: Size, size: Size) -> bool:
    """Whether `size / divisor` is whole for every value of the symbols."""
    if isinstance(divisor, int) and isinstance(size, int):
        return size % divisor == 0
    try:
        quotient = over(size, divisor)
    except ShapeError:  # a static quotient that is not whole
        return False
    match quotient:
        case int() | Dim():
            return True
        case Monomial(coefficient, powers):
            return coefficient.denominator == 1 and all(p > 0 for _, p in powers)
