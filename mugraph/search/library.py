"""What library calls can compute: contractions of two values, alone or added to a third, and attention.

A call counts where its operands lie in memory (inputs) or may be put there.  Attention is recognised in the class
graph, so that it is found whatever way the program was written:

    o = (Σ_k e·v) / (Σ_k e)      e = exp(s) or masked_exp(s, mask)      s = scale·Σ_d q·k [+ bias]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mugraph.ir.axes import representative
from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Contract, Gather, Op
from mugraph.ir.types import DType, Tensor
from mugraph.search.closure import Edge
from mugraph.search.cost import Device, Prediction, bytes_of, predict_attention, predict_library, predict_matmul
from mugraph.search.extract import Problem, is_leaf_edge
from mugraph.search.laws import IOTA
from mugraph.search.pieces import is_free

ATTENTION = "scaled_dot_product_attention"
ADDED = "addmm"
MOST = 8  # ways to read one value as attention
FUSED_DEPTH = 256  # the longest heads that the fastest attention kernels take
SLOWER_SHARE = 0.5  # of their rate, where other kernels run: f32, an explicit mask, unequal or long heads


@dataclass(frozen=True)
class Attention:
    """softmax(scale · q k^T [+ bias], over `key`) v; all fields but the axes are classes.  `mask` (True: takes part)
    is a value in memory or one made of indices alone."""

    query: int
    keys: int
    values: int
    key: str
    depth: str
    scale: int | None = None
    bias: int | None = None
    mask: int | None = None


@dataclass(frozen=True)
class Added:
    """A contraction plus a value in memory."""

    product: Edge
    other: int


LibraryCall = Edge | Added | Attention


def operands(p: Problem, call: LibraryCall) -> tuple[int, ...]:
    """The classes that the call reads from memory."""
    match call:
        case Edge():
            return call.children
        case Added():
            return (*call.product.children, call.other)
        case Attention():
            pass
    found = [call.query, call.keys, call.values, call.bias, call.mask]
    return tuple(x for x in found if x is not None and not made_of_indices(p, x))


def called_classes(call: object) -> tuple[int, ...]:
    """All classes that a library call may read."""
    match call:
        case Edge(children=children):
            return children
        case Added(product, other):
            return (*product.children, other)
        case Attention():
            return tuple(
                x for x in (call.query, call.keys, call.values, call.scale, call.bias, call.mask) if x is not None
            )
    return ()


def library_calls(p: Problem, c: int) -> list[tuple[LibraryCall, Prediction]]:
    """The library calls that compute a class, each with its predicted time, the operands' prices not counted."""
    found: list[tuple[LibraryCall, Prediction]] = []
    if c in p.scaled:
        return []
    calls: list[Edge | Added] = [*_contractions(p, c), *_added(p, c)]
    for call in calls:
        if p.is_wide(c) and not all(map(p.is_wide, operands(p, call))):  # a call rounds to the type of its operands
            continue
        moved = p.bytes(c) + sum(p.bytes(x) for x in set(operands(p, call)))
        left, right = (p.axes(x) for x in (call.product if isinstance(call, Added) else call).children)
        found.append((call, contraction(p.sizes, left, right, p.axes(c), moved, p.dtype, p.device)))
    if not p.is_wide(c):
        found += [(a, attention_seconds(p, c, a)) for a in attentions(p, c)]
    return found


def _contractions(p: Problem, c: int) -> list[Edge]:
    """Of matrices, or of a matrix and a vector: one side at least has an axis of its own."""
    products = (e for e in _edges(p, c, "product") if e.closes and readable(p, *e.children))
    return [e for e in products if len({frozenset(p.axes(x)) for x in e.children}) > 1]


def _matmuls(p: Problem, c: int) -> list[Edge]:
    return [e for e in p.closure.classes[c].edges if p.is_matmul(c, e) and readable(p, *e.children)]


def _added(p: Problem, c: int) -> Iterator[Added]:
    """Sums of a contraction over all axes of the class and another value, in one type."""
    for e in _edges(p, c, "add"):
        if len(e.children) == 2:
            for x, other in itertools.permutations(e.children):
                for product in _matmuls(p, x) if set(p.axes(x)) == set(p.axes(c)) and readable(p, other) else ():
                    if {p.dtypes.get(y, p.dtype) for y in (*product.children, other)} == {p.dtype}:
                        yield Added(product, other)


def readable(p: Problem, *classes: int) -> bool:
    """Whether all lie in memory, or may be put there, as they are."""
    return all(c not in p.scaled and (c in p.memory or c in p.bound) for c in classes)


def contraction(
    sizes: Mapping[str, int],
    left: tuple[str, ...],
    right: tuple[str, ...],
    out: tuple[str, ...],
    moved: float,
    dtype: DType,
    d: Device,
) -> Prediction:
    """The time of a library contraction of two tensors with these axes.  A side without an axis of its own makes it a
    product of vectors, which bandwidth bounds."""

    def size(axes: set[str]) -> int:
        return math.prod(sizes[a] for a in axes)

    a, b, c = set(left), set(right), set(out)
    if not (a - b and b - a and (a & b) - c):
        return predict_library(moved, 2 * size(a | b), dtype, d)
    return predict_matmul(size(a & b & c), size(a - b), size(b - a), size((a & b) - c), moved, dtype, d)


# -- attention


def attentions(p: Problem, c: int) -> list[Attention]:
    """The ways to read a class as attention, in a fixed order."""
    return list(itertools.islice(dict.fromkeys(_attentions(p, c)), MOST))


def _attentions(p: Problem, c: int) -> Iterator[Attention]:
    for e in _edges(p, c, "product"):
        if e.axes:
            continue
        for weighted, inverse in itertools.permutations(e.children, 2):
            for total in (i.children[0] for i in _edges(p, inverse, "call") if i.fn == "inv"):
                yield from _weighted(p, c, weighted, total)


def _weighted(p: Problem, c: int, weighted: int, total: int) -> Iterator[Attention]:
    """`weighted` as Σ_k e·v and `total` as Σ_k e, with the same e."""
    for s in _edges(p, total, "sum"):
        for e in _edges(p, weighted, "product"):
            if e.axes != s.axes or len(s.axes) != 1 or s.children[0] not in e.children:
                continue
            values = e.children[1] if e.children[0] == s.children[0] else e.children[0]
            for found in _exponential(p, s.children[0], values, s.axes[0]):
                if _fits(p, c, found):
                    yield found


def _exponential(p: Problem, weights: int, values: int, key: str) -> Iterator[Attention]:
    for e in _edges(p, weights, "call"):
        if e.fn not in ("exp", "masked_exp"):
            continue
        mask = e.children[1] if e.fn == "masked_exp" else None
        for scores, bias in _sums(p, e.children[0]):
            for query, keys, depth, scale in _scores(p, scores, key):
                yield Attention(query, keys, values, key, depth, scale, bias, mask)


def _sums(p: Problem, c: int) -> Iterator[tuple[int, int | None]]:
    yield c, None
    for e in _edges(p, c, "add"):
        if len(e.children) == 2:
            yield from itertools.permutations(e.children, 2)


def _scores(p: Problem, c: int, key: str) -> Iterator[tuple[int, int, str, int | None]]:
    """(query, keys, depth, scale) of `c = scale · Σ_depth query·keys`."""
    for e in _edges(p, c, "product"):
        if len(e.axes) == 1:
            for query, keys in itertools.permutations(e.children, 2):
                if key in p.axes(keys) and key not in p.axes(query):
                    yield query, keys, e.axes[0], None
        elif not e.axes:
            for scale, other in itertools.permutations(e.children, 2):
                if not p.axes(scale) and made_of_indices(p, scale):
                    yield from ((q, k, d, scale) for q, k, d, inner in _scores(p, other, key) if inner is None)


def _edges(p: Problem, c: int, kind: str) -> list[Edge]:
    return [e for e in p.closure.classes[c].edges if e.kind == kind]


def _fits(p: Problem, c: int, a: Attention) -> bool:
    """The shapes are those of attention, and what it reads can be read."""
    query, keys, values = (set(p.axes(x)) for x in (a.query, a.keys, a.values))
    rows = query - {a.depth}
    width = values - rows - {a.key}
    around = rows | {a.key}
    return (
        readable(p, *operands(p, a))
        and keys - {a.key, a.depth} <= rows
        and len(width) == 1
        and len(rows - keys - values) >= 1
        and set(p.axes(c)) == rows | width
        and all(set(p.axes(x)) <= around for x in (a.bias, a.mask) if x is not None)
        and (a.bias is None or not made_of_indices(p, a.bias))
        and (a.mask is None or a.mask in p.inputs or made_of_indices(p, a.mask))
    )


def made_of_indices(p: Problem, c: int) -> bool:
    """Whether a value is made of indices, sizes and numbers alone: a causal mask, a scale.  A class without edges is
    made of what no kernel can say."""
    ways = [p.closure.classes[x].edges for x in p.below[c]]
    return all(ways) and not any(is_leaf_edge(e) for edges in ways for e in edges)


def is_causal(p: Problem, a: Attention) -> bool:
    """Whether the mask lets row i see the keys 0 .. i."""
    if a.mask is None:
        return False
    for e in _edges(p, a.mask, "call"):
        left, right = (_index(p, x) for x in e.children) if e.fn == "compare" else (None, None)
        if (e.attrs == ("le",) and left == a.key and right) or (e.attrs == ("ge",) and right == a.key and left):
            return True
    return False


def _index(p: Problem, c: int) -> str | None:
    """The axis whose index the class is."""
    leaves = (e.leaf for e in _edges(p, c, "load"))
    return next((leaf.tokens[0][0] for leaf in leaves if leaf is not None and leaf[0] == IOTA), None)  # type: ignore[union-attr]


def attention_seconds(p: Problem, c: int, a: Attention) -> Prediction:
    """The predicted time.  Queries that share keys and values are rows of one call."""

    def size(axes: set[str]) -> int:
        return math.prod(p.sizes[x] for x in axes)

    query, keys, values = (set(p.axes(x)) for x in (a.query, a.keys, a.values))
    rows = query - keys - values - {a.depth}
    causal = is_causal(p, a)
    depth, width = p.sizes[a.depth], size(values - (query - {a.depth}) - {a.key})
    plain = (causal or a.mask is None) and a.bias is None
    fused = plain and p.dtype.bits == 16 and depth == width <= FUSED_DEPTH
    moved = p.bytes(c) + sum(p.bytes(x) for x in set(operands(p, a)))
    return predict_attention(
        size(query - rows - {a.depth}), size(rows), p.sizes[a.key], depth, width, moved, p.dtype, p.device,
        causal, 1.0 if fused else SLOWER_SHARE,
    )  # fmt: skip


# -- equations as library calls


def equations_seconds(
    equations: Sequence[Equation], program: Program, symbolic: int, dtype: DType, on: Device
) -> float:
    """Equations of the program as library calls, one launch each; views are free, unless they are given back, and so
    are single elements that depend on no input."""
    return sum(seconds_of_each(equations, program, symbolic, dtype, on), 0.0) if equations else 0.0


def seconds_of_each(
    equations: Sequence[Equation], program: Program, symbolic: int, dtype: DType, on: Device
) -> list[float]:
    """What each of the equations takes as a library call."""
    tensors, found = program.tensors(), list[float]()
    given = {o.value for o in program.outputs}
    computed = {i.name for i in program.inputs}
    for e in program.equations:
        computed.update(t.name for t in e.targets if t.axes or not computed.isdisjoint(e.args))
    sizes = {a.name: representative(a.size, symbolic) for a in program.axes().values()}
    for e in equations:
        found.append(0.0)
        if not e.args or (is_free(e) and e.target.name not in given):
            continue
        read = [tensors[a] for a in dict.fromkeys(e.args)]
        if isinstance(e.op, Gather):  # of its operand, only what the index names
            read = [e.target, *read[1:]]
        involved = [*e.targets, *read]
        if computed.isdisjoint(t.name for t in involved):
            continue
        moved = bytes_of(involved, sizes)
        if isinstance(e.op, Contract) and len(e.args) == 2:
            left, right = (tuple(a.name for a in tensors[x].axes) for x in e.args)
            out = tuple(a.name for a in e.target.axes)
            found[-1] = contraction(sizes, left, right, out, moved, dtype, on).seconds
        else:
            found[-1] = predict_library(moved, operations_of(sizes, e.op, involved), dtype, on).seconds
    return found


def operations_of(sizes: Mapping[str, int], op: Op, tensors: Sequence[Tensor]) -> float:
    """A contraction multiplies and adds over all axes together; others do one operation for each element of the
    largest tensor."""
    over = [{a.name for a in t.axes} for t in tensors]
    if isinstance(op, Contract):
        return 2.0 * math.prod(sizes[a] for a in set().union(*over))
    return float(max(math.prod(sizes[a] for a in axes) for axes in over))
