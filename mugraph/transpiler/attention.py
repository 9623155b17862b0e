"""Attention in the meaning of a library call, so that it is emitted as PyTorch's own call."""

from __future__ import annotations

from dataclasses import dataclass

from mugraph.ir.graph import Equation, Program
from mugraph.ir.ops import Cast, Compare, Contract, Elementwise, Iota, MaskedExp, Reduce

ATTENTION = "scaled_dot_product_attention"
ADDED = "addmm"  # a contraction plus a value


@dataclass(frozen=True)
class AttentionParts:
    """softmax(scale · Σ_depth query·keys [+ bias], over `key`) values, by the names of its parts.  `before` are the
    equations that scale and mask come from; `causal`: the mask lets row i see the keys 0 .. i."""

    query: str
    keys: str
    values: str
    key: str
    depth: str
    result: str
    scale: str | None
    bias: str | None
    mask: str | None
    causal: bool
    before: tuple[Equation, ...]


def attention_of(p: Program) -> AttentionParts | None:
    """The parts of a program that is attention and nothing else, or None.

    Its last equations are: scores = contract(query, keys), then optionally mul(scores, scale) and add(scores, bias),
    then exp(scores) or maskedexp(scores, mask), sum, div, contract(share, values), and perhaps a cast.
    """
    made = {e.target.name: e for e in p.equations if len(e.targets) == 1}
    if not p.equations or len({o.value for o in p.outputs}) != 1 or p.equations[-1].target.name != p.outputs[0].value:
        return None
    last = p.equations[-1]
    result, core = last.target.name, [last]
    if isinstance(last.op, Cast) and last.args[0] in made:
        last = made[last.args[0]]
        core.append(last)
    match last.op:
        case Contract((key,)) if len(last.args) == 2:
            share, values = last.args
        case _:
            return None
    quotient = made.get(share)
    if quotient is None or quotient.op != Elementwise("div"):
        return None
    weights, total = (made.get(a) for a in quotient.args)
    if weights is None or total is None or total.op != Reduce("sum", (key,)) or total.args != (weights.target.name,):
        return None
    core += [quotient, total, weights]
    mask = None
    match weights.op:
        case Elementwise("exp"):
            pass
        case MaskedExp():
            mask = weights.args[1]
        case _:
            return None
    scores, given = made.get(weights.args[0]), {"add": "", "mul": ""}
    for fn in given:
        if scores is not None and scores.op == Elementwise(fn):
            core.append(scores)
            given[fn], scores = scores.args[1], made.get(scores.args[0])
    if scores is None or len(scores.args) != 2:
        return None
    match scores.op:
        case Contract((depth,)):
            query, keys = scores.args
        case _:
            return None
    core.append(scores)
    inner = {e.target.name for e in core}
    before = tuple(e for e in p.equations if e.target.name not in inner)
    outside = [query, keys, values, *given.values(), mask]
    if inner & {*outside, *(a for e in before for a in e.args)}:
        return None
    tensors = p.tensors()
    axes = {name: {a.name for a in tensors[name].axes} for name in (query, keys, values, last.target.name)}
    rows = axes[query] - {depth}
    width = axes[values] - rows - {key}
    plain = (
        len(width) == 1
        and {key, depth} <= axes[keys] <= rows | {key, depth}
        and key in axes[values]
        and key not in axes[query]
        and axes[last.target.name] == rows | width
        and (not given["mul"] or not tensors[given["mul"]].axes)
        and not (given["add"] and mask)
    )
    if not plain:
        return None
    scale, bias = given["mul"] or None, given["add"] or None
    causal = mask is not None and _is_causal(made, mask, key)
    return AttentionParts(query, keys, values, key, depth, result, scale, bias, mask, causal, before)


def _is_causal(made: dict[str, Equation], mask: str, key: str) -> bool:
    e = made.get(mask)
    if e is None or len(e.args) != 2:
        return False
    left, right = (made[a].op if a in made else None for a in e.args)
    match e.op, left, right:
        case (Compare("le"), Iota(a), Iota()) | (Compare("ge"), Iota(), Iota(a)):
            return a.name == key
        case _:
            return False
