"""A saved result is checked again from its files: every edit of certificate, graph or source is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mugraph as mg
import mugraph.cli.saved
from mugraph import pipeline
from mugraph.cli.saved import recheck_saved
from mugraph.errors import VerificationError
from mugraph.ir.graph import KernelGraph
from mugraph.ir.serialize import dumps, loads
from mugraph.search.build import baseline
from mugraph.verify.bounds import NO_SOLVER, Bounds
from mugraph.verify.certificate import Certificate, graph_hash
from mugraph.viz.mermaid import draw_mermaid
from mugraph.viz.svg import draw_svg

EDITED = ("certificate.json", "graph.json", "kernel.py")


@mg.program
def gate(x: mg.f32[8, 16], w: mg.f32[16, 8]):
    return mg.silu(x @ w) - mg.sum(x, 1, True)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = pipeline.from_graph(gate, baseline(gate), target="torch")
    return result.save(tmp_path_factory.mktemp("saved") / "gate")


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "gate"))


def with_hashes(place: Path) -> None:
    """The manifest repaired."""
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"] = {n: hashlib.sha256((place / n).read_bytes()).hexdigest() for n in manifest["files"]}
    (place / "manifest.json").write_text(json.dumps(manifest, indent=1))


def flips(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf of a JSON document, with another value of its type."""
    match value:
        case dict():
            for k, v in value.items():
                yield from flips(v, (*path, k))
        case list():
            for i, v in enumerate(value):
                yield from flips(v, (*path, i))
        case bool():
            yield path, not value
        case int() | float():
            yield path, value + 1
        case str():
            yield path, value + "x"
        case None:
            yield path, 1.0


def flipped(data: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = data.copy()
    copy[path[0]] = flipped(data[path[0]], path[1:], new)
    return copy


def refused(place: Path) -> str:
    with pytest.raises(VerificationError) as error:
        recheck_saved(place)
    return error.value.message


@mg.program
def overflowing(x: mg.f16[8, 16]):
    return mg.logsumexp(x * 1e6 + 1e6, -1)


def test_what_was_not_compared_is_not_called_verified(tmp_path: Path):
    """The float64 result leaves f16 for all inputs drawn."""
    result = pipeline.from_graph(overflowing, baseline(overflowing), target="torch")
    assert "numerics" not in result.certificate.tiers
    assert any("the float64 result leaves f16" in note for note in result.notes)
    assert "NOT COMPARED" in str(result.certificate)
    found = recheck_saved(result.save(tmp_path / "overflowing"), strict=True)
    assert "is verified, but its numbers are not\n" in str(found)
    assert "not compared: " in str(found)
    assert "the float64 result leaves f16" in str(found)
    assert "numerics: repeated, no comparison could be made" in found.checks


def test_the_original_is_verified_from_its_files(original: Path):
    found = recheck_saved(original)
    assert not found.not_compared
    assert str(found).splitlines()[0].endswith("is verified")
    assert any("tested" in c for c in found.checks)
    assert any("proved" in c for c in found.checks)


@pytest.mark.parametrize("name", EDITED)
def test_every_flip_of_one_field_is_refused(saved: Path, name: str):
    """By the hashes of the manifest."""
    file = saved / name
    text = file.read_text()
    if name == "kernel.py":
        edits = [text.replace(line, f"{line} # edited", 1) for line in text.splitlines() if line.strip()]
    else:
        data = json.loads(text)
        edits = [json.dumps(flipped(data, path, new)) for path, new in flips(data)]
    assert len(edits) >= 10
    for edit in edits:
        file.write_text(edit)
        assert "edited" in refused(saved)


# What a run cannot derive again: the numeric check, unless --strict repeats it, and versions; and the δ that was asked
# for, as every one that the stated δ meets leads to the same tests.
RECORDED = {"numerics", "versions", "delta_requested_log2"}


def test_every_flip_in_a_certificate_is_refused_with_hashes_repaired(saved: Path):
    file = saved / "certificate.json"
    data = json.loads(file.read_text())
    derived = [(path, new) for path, new in flips(data) if path[0] not in RECORDED]
    assert {path[0] for path, _ in derived} >= {"tiers", "delta_log2", "draws", "laws", "assumptions", "seed"}
    for path, new in derived:
        file.write_text(json.dumps(flipped(data, path, new), indent=1))
        with_hashes(saved)
        with pytest.raises(VerificationError):
            pytest.fail(f"{path} as {new}: {recheck_saved(saved)}")


def test_a_flipped_graph_is_refused_with_a_counterexample(saved: Path):
    """The wrong graph, with every file derived from it, and its hash in certificate and manifest."""
    graph = loads((saved / "graph.json").read_text())
    assert isinstance(graph, KernelGraph)
    wrong = loads(dumps(graph).replace('"silu"', '"gelu"').replace('"fn": "gelu"', '"fn": "sigmoid"'))
    assert wrong != graph
    certificate = Certificate.from_json((saved / "certificate.json").read_text())
    certificate = replace(certificate, graph_hash=graph_hash(wrong))
    files = {
        "graph.json": dumps(wrong, indent=1),
        "graph.txt": f"{wrong}\n",
        "graph.svg": draw_svg(wrong),
        "graph.mmd": draw_mermaid(wrong),
        "certificate.json": certificate.to_json(),
    }
    for name, text in files.items():
        (saved / name).write_text(text)
    with_hashes(saved)
    assert "differs: the program gives" in refused(saved)


def test_an_edited_source_is_refused_since_lowering_gives_another(saved: Path):
    source = (saved / "kernel.py").read_text()
    text = source.replace("silu", "sigmoid")
    assert text != source
    (saved / "kernel.py").write_text(text)
    with_hashes(saved)
    assert "is not what this version emits" in refused(saved)


Change = Callable[[Certificate], Certificate]


@pytest.mark.parametrize(
    "change",
    [
        lambda c: replace(c, delta_log2=c.delta_log2 - 10),
        lambda c: replace(c, draws=tuple(replace(d, delta_log2=d.delta_log2 - 5) for d in c.draws)),
        lambda c: replace(c, draws=c.draws[:1]),
        lambda c: replace(c, tiers=("proved", "tested", "numerics")),
        lambda c: replace(c, laws=c.laws[1:]),
        lambda c: replace(c, assumptions=()),
        lambda c: replace(c, delta_requested_log2=-400.0),
        lambda c: replace(c, seed=1),
    ],
    ids=["delta", "delta of a draw", "a draw less", "tiers", "a law less", "no assumptions", "asked for more", "seed"],
)
def test_a_better_certificate_than_deserved_is_refused(saved: Path, change: Change):
    file = saved / "certificate.json"
    file.write_text(change(Certificate.from_json(file.read_text())).to_json())
    with_hashes(saved)
    refused(saved)


def test_numerics_claimed_without_a_comparison_are_refused(saved: Path):
    file = saved / "certificate.json"
    file.write_text(replace(Certificate.from_json(file.read_text()), numerics=()).to_json())
    with_hashes(saved)
    assert "claims" in refused(saved)


def with_certificate(place: Path, change: Change) -> Path:
    file = place / "certificate.json"
    file.write_text(change(Certificate.from_json(file.read_text())).to_json())
    with_hashes(place)
    return place


def numerics_changed(**fields: Any) -> Change:
    """The first row of the first table with other fields."""

    def change(c: Certificate) -> Certificate:
        table = c.numerics[0]
        first = next(i for i, r in enumerate(table.rows) if r.counted and r.ratio > 0.01)
        rows = [replace(r, **fields) if i == first else r for i, r in enumerate(table.rows)]
        return replace(c, numerics=(replace(table, rows=tuple(rows)), *c.numerics[1:]))

    return change


def test_strict_repeats_the_numeric_check(saved: Path):
    assert "numerics: repeated" in str(recheck_saved(saved, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        numerics_changed(error=0.0, ratio=0.0),
        numerics_changed(tolerance=1e9),
        numerics_changed(draw="others"),
        lambda c: replace(c, numerics=(replace(c.numerics[0], target="a device"),)),
        lambda c: replace(c, numerics=(replace(c.numerics[0], rows=c.numerics[0].rows[1:]),)),
        lambda c: replace(c, numerics=(replace(c.numerics[0], how="device"),)),
    ],
    ids=["no error", "a wide tolerance", "another draw", "another target", "a row less", "on a device"],
)
def test_better_numerics_than_come_out_again_are_refused_when_strict(saved: Path, change: Change):
    with_certificate(saved, change)
    with pytest.raises(VerificationError, match="on record"):
        recheck_saved(saved, strict=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [("error", "nan"), ("tolerance", -1.0), ("ratio", "nan"), ("bindings", [["b", "x"]]), ("how", "guessed")],
)
def test_numerics_that_are_none_are_no_certificate(saved: Path, field: str, value: Any):
    file = saved / "certificate.json"
    data = json.loads(file.read_text())
    table = data["numerics"][0]
    (table if field == "how" else next(r for r in table["rows"] if r["counted"]))[field] = value
    file.write_text(json.dumps(data))
    with_hashes(saved)
    assert "not a certificate" in refused(saved)


def test_claims_that_cannot_be_checked_here_are_not_repeated(saved: Path, monkeypatch: pytest.MonkeyPatch):
    def change(c: Certificate) -> Certificate:
        return replace(c, tiers=("tested", "proved", "bounds", "numerics"), claims=99999, bounds="")

    with_certificate(saved, change)
    monkeypatch.setattr(mugraph.cli.saved, "bounds_tier", lambda *_: Bounds(0, (NO_SOLVER,)))
    found = recheck_saved(saved)
    assert not any("hold again" in c for c in found.checks)
    assert any("99999 claims on record, 0 checked here: z3 is not installed" in n for n in found.not_repeated)
    with pytest.raises(VerificationError, match="0 checked here"):
        recheck_saved(saved, strict=True)


def test_an_equation_without_a_result_is_refused(saved: Path):
    graph = json.loads((saved / "graph.json").read_text())
    graph["value"]["equations"][0]["targets"] = []
    (saved / "graph.json").write_text(json.dumps(graph))
    with_hashes(saved)
    assert "an equation has no result" in refused(saved)
