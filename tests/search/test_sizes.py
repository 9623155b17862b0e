"""Every benchmark program at sizes that are no power of two: odd multiples of large ones, primes, and 1."""

import zlib
from collections.abc import Iterable

import pytest

from benchmarks.programs import FAMILIES
from mugraph.ir.check import check
from mugraph.ir.graph import Program
from mugraph.ir.ops import Concat, Rename, Reshape, Slice
from mugraph.ir.resize import resized
from mugraph.pipeline import finished
from mugraph.search.driver import search
from mugraph.search.space import SearchSpace
from mugraph.verify.equivalence import Verified, verify

SIZES = (1, 7, 997, 3584, 7168, 11008, 14336)
AT_16 = SearchSpace(sizes=())
VARIANTS = {f"{name}, {v}": p for name, family in FAMILIES.items() for v, p in family.variants.items()}


def resizable(program: Program) -> list[frozenset[str]]:
    """Static axes that may have any size, those of one size by an alias together."""
    tied: dict[str, str] = {a: a for a in program.axes()}

    def root(a: str) -> str:
        return a if tied[a] == a else root(tied[a])

    fixed: set[str] = set()
    tensors = program.tensors()
    for e in program.equations:
        if isinstance(e.op, Rename):
            for old, new in e.op.axes:
                tied[root(new.name)] = root(old)
        elif isinstance(e.op, Reshape | Slice | Concat) or len(e.targets) > 1:
            fixed |= {a.name for n in (*e.args, *(t.name for t in e.targets)) for a in tensors[n].axes}
    groups: dict[str, set[str]] = {}
    for name, axis in program.axes().items():
        if isinstance(axis.size, int):
            groups.setdefault(root(name), set()).add(name)
    return [frozenset(g) for g in groups.values() if not g & fixed]


def with_size(program: Program, axes: Iterable[str], size: int) -> Program:
    found: Program = resized(program, dict.fromkeys(axes, size), {})
    check(found)
    return found


def searched(program: Program) -> None:
    result = search(program, accept=lambda graph: verify(program, finished(graph)), space=AT_16)
    assert isinstance(result.accepted, Verified)
    assert result.accepted.program == program
    assert result.report.refused == 0, str(result.report)
    source = result.report.candidates[-1]
    if not source.verdict.startswith("would keep in 16 bits"):
        assert result.report.predicted_seconds <= source.seconds * (1 + 1e-9)


def chosen(name: str) -> list[tuple[frozenset[str], int]]:
    """For each axis that may have any size, one size, by the name of the program."""
    groups = resizable(VARIANTS[name])
    return [(g, SIZES[zlib.crc32(f"{name}{i}".encode()) % len(SIZES)]) for i, g in enumerate(groups)]


LONG = ("mla", "prenorm_attention", "attention_bwd", "moe_ffn")
SOME = [n for i, n in enumerate(VARIANTS) if i % 4 == 0 and resizable(VARIANTS[n]) and not n.startswith(LONG)]


@pytest.mark.parametrize("name", SOME)
def test_some_programs_at_some_sizes(name: str) -> None:
    program = VARIANTS[name]
    for axes, size in chosen(name)[:1]:
        searched(with_size(program, axes, size))


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
def test_every_program_at_every_size(name: str, size: int) -> None:
    program = VARIANTS[name]
    for axes in resizable(program):
        searched(with_size(program, axes, size))


def test_most_programs_have_axes_of_any_size() -> None:
    free = [n for n, p in VARIANTS.items() if resizable(p)]
    assert len(free) > 0.6 * len(VARIANTS)
    assert len({s for n in SOME for _, s in chosen(n)}) > 4


def test_a_size_is_really_changed() -> None:
    program = VARIANTS["gated_mlp, N 4096"]
    axes = resizable(program)
    assert len(axes) == 2
    changed = with_size(program, axes[0], 997)
    assert changed != program
    assert 997 in [a.size for a in changed.axes().values()]
