"""The laws that lead from a program to the plan that was chosen, read off its derivations.

Each step takes one value apart: `name = made`, by a rule of the closure, where the value is written as a formula.  What
is materialised between launches is m1, m2, ...; other values t1, t2, ... in the order in which they appear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mugraph.ir.graph import Program
from mugraph.search import values as v
from mugraph.search.closure import Closure, Edge
from mugraph.search.extract import Derivation, is_leaf_edge
from mugraph.search.formula import Notation
from mugraph.search.laws import LAWS, Meaning
from mugraph.search.library import Added, Attention
from mugraph.search.partition import Choice
from mugraph.search.report import LawStep, Written

# The rules of the closure by name, with the letters of docs/search.md.
RULES: dict[str, str] = {
    "split": "a: a product of factors is split in two, and contracted over the axes that both hold",
    "share": "a: a split whose sides are computed anyway",
    "close": "b: an axis of one factor is summed, or reduced, over",
    "distribute": "c: a sum is multiplied out",
    "factor": "d: a common factor is taken out of a sum",
    "argument": "e: a function of its arguments",
    "coefficient": "f: a coefficient is split off",
    "add": "a sum is the sum of its parts",
    "enumerate": "found bottom-up, by an identity that the rules do not know",
    "attention": "softmax(scale · q·k) · v is one call of a library",
}


class Laws:
    """Explains the launches of one plan."""

    def __init__(
        self,
        closure: Closure,
        notation: Notation,
        plan: Sequence[Choice],
        targets: Mapping[int, Sequence[str]],
        outputs: Sequence[str],
    ) -> None:
        self.closure, self.notation = closure, notation
        self.position = {c: i for i, c in enumerate(closure.order)}
        self.names: dict[int, str] = {}
        self.computed: set[int] = set()
        materialised = temporary = 0
        for c in closure.order:
            leaf = next((e.leaf for e in closure.classes[c].edges if is_leaf_edge(e) or e.kind == "number"), None)
            if leaf is not None:
                self.names[c] = notation.leaf(leaf)
        for choice in plan:
            for root in choice.roots:
                given = [n for n in targets.get(root, ()) if n in outputs]
                if not given and root not in self.names:
                    materialised += 1
                self.names.setdefault(root, " = ".join(given) or f"m{materialised}")
        for choice in plan:
            self.computed.update(choice.roots)
            for c, _, children in self._taken_apart(choice):
                self.computed.update((c, *children))
                for x in children:
                    if x not in self.names:
                        temporary += 1
                        self.names[x] = f"t{temporary}"

    def steps(self, choice: Choice) -> tuple[LawStep, ...]:
        """The steps of one launch, from its results down."""
        found = []
        for c, edge, children in self._taken_apart(choice):
            cell = self.closure.classes[c]
            if isinstance(edge, Added):
                made = f"{self.notation.edge(edge.product, self.names.__getitem__)} + {self.names[edge.other]}"
                law = "add"
            elif edge is None:
                query, keys, values = (self.names[x] for x in children[:3])
                made, law = f"attention({query}, {keys}, {values})", "attention"
            else:
                made, law = self.notation.edge(edge, self.names.__getitem__), law_of(cell.value, edge, cell.edges[edge])
            found.append(LawStep(self.names[c], law, made, self.notation.text(cell.value)))
        return tuple(dict.fromkeys(found))

    def _taken_apart(self, choice: Choice) -> Iterator[tuple[int, Edge | Added | None, tuple[int, ...]]]:
        """What is computed and how, results first: the class, its edge (none: attention), its parts."""
        match choice.how:
            case Edge():
                yield choice.roots[0], choice.how, choice.how.children
            case Added(product, other):
                yield choice.roots[0], choice.how, (*product.children, other)
            case Attention(query, keys, values, _, _, scale, bias, mask):
                parts = (query, keys, values, scale, bias, mask)
                yield choice.roots[0], None, tuple(x for x in parts if x is not None)
            case _:
                for d in choice.derivations:
                    yield from self._of(d)

    def _of(self, d: Derivation) -> Iterator[tuple[int, Edge | Added | None, tuple[int, ...]]]:
        seen = set[tuple[int, Edge]]()
        for s in sorted(d.steps, key=lambda s: (-self.position[s.entry[0]], s.entry[1])):
            edge = s.option.edge
            if edge is None or edge.kind in ("number", "load") or (s.entry[0], edge) in seen:
                continue
            seen.add((s.entry[0], edge))
            yield s.entry[0], edge, edge.children

    def written(self, program: Program, known: Meaning, seeds: Mapping[str, int], laws: Sequence[str]) -> list[Written]:
        """The outputs as they are written, and the named laws that the plan needs."""
        found = []
        for o in dict.fromkeys(o.value for o in program.outputs):
            value, used = known.values[o], list[tuple[str, str]]()
            for law in laws:
                new = LAWS[law].rewrite(value)
                if new is not None and self._without(value, new, known, seeds):
                    used.append((law, self.notation.text(new)))
            found.append(Written(self.notation.source(o), self.notation.text(value), tuple(used)))
        return found

    def _without(self, old: v.Value, new: v.Value, known: Meaning, seeds: Mapping[str, int]) -> bool:
        """Whether the plan computes nothing that the law takes away."""
        gone = _reductions(old) - _reductions(new)
        classes = {seeds[n] for n, x in known.values.items() if n in seeds and _only(x) in gone}
        return bool(classes) and not classes & self.computed


def _reductions(value: v.Value) -> set[str]:
    """The maxima and minima over axes in a value, by their digests."""
    found, seen, pending = set[str](), set[str](), list(v.bodies(value))
    while pending:
        body = pending.pop()
        if body.digest not in seen:
            seen.add(body.digest)
            if body.fn and body.bound:
                found.add(body.digest)
            pending += body.parts()
    return found


def _only(value: v.Value) -> str | None:
    """The digest of a value that is one call."""
    match value:
        case (v.Term(bound, (v.Call(body=body),)),) if not bound:
            return body.digest
    return None


def law_of(value: v.Value, edge: Edge, rule: str) -> str:
    """The laws of a step: that of the edge, after the one that gives the value the form which the edge takes apart."""
    match value:
        case (v.Term(bound, (v.Paren(inner),)),) if not bound:
            value = inner
    if rule == "add" and len(value) == 1:
        return "distribute"
    if rule not in ("add", "factor", "enumerate") and len(value) > 1:
        return f"factor, {rule}"
    return rule
