"""A program and a μGraph of it, cut at values that both have.

*Composition.*  Let both compute every cut value and every output from inputs and cut values alone, and let each pair
of these computations agree for all arguments.  Then the whole agrees: by induction over the order of the graph's
equations, each cut value is the program's.  So it is enough to compare part by part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mugraph.errors import GraphError
from mugraph.ir.graph import Equation, KernelGraph, Program
from mugraph.ir.types import Input, Output, Storage


def parts(program: Program, graph: KernelGraph, cuts: Sequence[str]) -> list[tuple[Program, KernelGraph]]:
    """Pairs that must agree: of what each group of the graph's equations between cut values gives, the program and the
    graph, over the same inputs.  Raises GraphError where one of them lacks a cut value, where they type it
    differently, or name outputs differently."""
    if [o.value for o in program.outputs] != [o.value for o in graph.outputs]:
        raise GraphError(f"{graph.name} and {program.name} name their outputs differently, so they cannot be cut")
    wanted = dict.fromkeys([*cuts, *(o.value for o in program.outputs)])
    mine, yours = program.tensors(), graph.tensors()
    for name in wanted:
        if name not in mine or mine[name] != yours.get(name):
            raise GraphError(f"{name}, where the graph is cut, is {yours.get(name)}, in the program {mine.get(name)}")
    inputs = {i.name: i for i in program.inputs}
    given = inputs | {n: Input(mine[n], Storage(mine[n].dtype)) for n in wanted if n not in inputs}
    found = []
    for group in _groups(program, graph, [n for n in wanted if n not in inputs], given):
        made = _needed(program, group, given), _needed(graph, group, given)
        read = dict.fromkeys(a for equations in reversed(made) for e in equations for a in e.args)
        both = tuple(given[n] for n in read if n in given and n not in group)
        outputs = tuple(Output(n, Storage(mine[n].dtype)) for n in group)
        found.append(
            (
                Program(program.name, both, made[0], outputs),
                KernelGraph(graph.name, both, made[1], outputs),
            )
        )
    return found


def _groups(program: Program, graph: Program, names: Sequence[str], given: Collection[str]) -> list[list[str]]:
    """The values in groups: two that share an equation of the graph, or one of several results, are in one group."""
    groups: list[tuple[list[str], set[int]]] = []
    for name in names:
        used = {id(e) for e in _needed(graph, [name], given)}
        used |= {id(e) for e in _needed(program, [name], given) if len(e.targets) > 1}
        together = [g for g in groups if g[1] & used]
        groups = [g for g in groups if not g[1] & used]
        groups.append(([*(n for g in together for n in g[0]), name], used.union(*(g[1] for g in together))))
    return [g[0] for g in groups]


def _needed(graph: Program, names: Collection[str], given: Collection[str]) -> tuple[Equation, ...]:
    """The equations that compute these values, each cut value among their arguments taken as given."""
    wanted = set(names)
    kept: list[Equation] = []
    for e in reversed(graph.equations):
        if any(t.name in wanted for t in e.targets):
            kept.append(e)
            wanted.update(a for a in e.args if a not in given)
    return tuple(reversed(kept))
