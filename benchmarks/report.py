"""The GPU figures of the README and of docs/performance.md, written from what was measured.

    python -m benchmarks.report [--results benchmarks/results] [--root .]

Reads every document of `benchmarks.gpu` in the directory of results, and writes what stands between the two comments
`<!-- kernels:begin -->` and `<!-- kernels:end -->` of both pages anew, and a plot of the ratios, `docs/kernels.png`.
Of several measurements of one case on one device the one in the last file counts.  A case without figures is `not
measured`; where there are none at all, no plot is written or linked.  Nothing is written before all is computed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import Row
from benchmarks.kernels import cases
from mugraph.errors import MugraphError
from mugraph.runtime.files import write_whole

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- kernels:begin -->", "<!-- kernels:end -->"
PLOT = "docs/kernels.png"
WIN, LOSS = 1.02, 0.98
NOT_MEASURED = "not measured"
FIGURES = (
    "mugraph_us", "baseline_us", "ratio", "ratio_low", "ratio_high", "warm_ratio", "percent_of_floor",
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """A case on a device: the row of its best baseline, or why there is none."""

    best: Row | None = None
    error: str = ""

    @property
    def correct(self) -> bool:
        return self.best is not None and self.best["correct"] is True


@dataclass
class Device:
    """What was measured on a device: cases by name, outcomes of its tests by unit, and with what."""

    name: str
    cases: dict[str, Measured] = field(default_factory=dict)
    tests: dict[str, Row] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)


# -- reading


def read(results: Path) -> list[Device]:
    """The devices of all kernel documents, by name.  Raises MugraphError for a file or a row that is damaged."""
    devices: dict[str, Device] = {}
    for path in sorted(results.glob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["benchmark"] != "kernels":
                continue
            rows, environment = list(data["rows"]), dict(data["environment"])
            for name in dict.fromkeys(str(r["device"]) for r in rows):
                device = devices.setdefault(name, Device(name))
                device.sources[path.name] = ", ".join(
                    f"{label} {environment[key]}"
                    for label, key in (("PyTorch", "torch"), ("Triton", "triton"), ("CUDA", "cuda"))
                    if environment.get(key)
                )
                add(device, [r for r in rows if r["device"] == name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MugraphError(
                f"{path} cannot be read: {type(error).__name__}: {error}",
                remedy="restore the file, or remove it and measure again with `python -m benchmarks.gpu`",
            ) from error
    return [devices[name] for name in sorted(devices)]


def add(device: Device, rows: Sequence[Row]) -> None:
    """Takes over the rows of one document.  Raises KeyError or ValueError for a row that is damaged."""
    found: dict[str, list[Row]] = {}
    for r in rows:
        unit = str(r.get("unit", ""))
        if "baseline" in r:
            for key in FIGURES:
                if not (isinstance(r[key], int | float) and math.isfinite(r[key]) and r[key] > 0):
                    raise ValueError(f"{key} is {r[key]!r}")
            found.setdefault(", ".join(str(r[k]) for k in ("program", "variant", "sizes", "dtype")), []).append(r)
        elif unit.startswith("kernels: "):
            device.cases[unit.removeprefix("kernels: ")] = Measured(error=str(r["error"]))
        elif unit.startswith("tests: "):
            if "error" not in r and "text" not in r:
                raise KeyError("text")
            device.tests[unit.removeprefix("tests: ")] = r
    for case, baselines in found.items():
        device.cases[case] = Measured(min(baselines, key=lambda r: float(r["baseline_us"])))


# -- tables


def table(columns: Sequence[str], numbers: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; the columns in `numbers` are set right."""
    right = set(numbers)
    lines = [columns, ["---:" if c in right else "---" for c in columns], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


COLUMNS = (
    "case", "ours, µs", "best baseline", "its µs", "ratio [quartiles]", "warm ratio", "% of floor", "tuning, s",
    "correct",
)  # fmt: skip
SHORT = (*COLUMNS[:3], *COLUMNS[4:5], *COLUMNS[6:7])


def cells(case: str, found: Measured | None) -> dict[str, str]:
    """What the table says of a case, by column."""
    r = found.best if found else None
    if r is None:
        text = f"failed: {found.error}".replace("|", "/") if found else NOT_MEASURED
        return dict.fromkeys(COLUMNS, "") | {"case": case, "ours, µs": text}
    return {
        "case": case,
        "ours, µs": f"{r['mugraph_us']:.1f}",
        "best baseline": str(r["baseline"]),
        "its µs": f"{r['baseline_us']:.1f}",
        "ratio [quartiles]": f"{r['ratio']:.2f} [{r['ratio_low']:.2f}, {r['ratio_high']:.2f}]",
        "warm ratio": f"{r['warm_ratio']:.2f}",
        "% of floor": f"{r['percent_of_floor']:.0f}",
        "tuning, s": "from the cache" if r["tuning_seconds"] is None else f"{r['tuning_seconds']:.0f}",
        "correct": "yes" if r["correct"] is True else "**no**",
    }


def kernel_table(wanted: Sequence[str], found: Mapping[str, Measured], columns: Sequence[str]) -> list[str]:
    rows = [cells(case, found.get(case)) for case in wanted]
    text = {"case", "best baseline", "correct"}
    return table(columns, set(columns) - text, [[row[c] for c in columns] for row in rows])


def geomean(ratios: Sequence[float]) -> float:
    """
    >>> geomean([0.5, 2.0, 8.0])
    2.0
    """
    return round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 12)


def summary(found: Mapping[str, Measured]) -> str:
    """How the classic six at b = 1, 8 and 16 do against the best baseline of each."""
    classic = [str(c) for c in cases()]
    right = {c: found[c].best for c in classic if c in found and found[c].correct}
    ratios = {c: float(r["ratio"]) for c, r in right.items() if r is not None}
    wrong = [c for c in classic if c in found and found[c].best and not found[c].correct]
    parts = [f"{len(ratios)} of the {len(classic)} cases of the classic six were measured and are correct"]
    if ratios:
        below = [c for c, r in ratios.items() if r < 1.0]
        parts.append(f"geomean {geomean(list(ratios.values())):.2f} over the best baseline")
        parts.append(f"{len(below)} below 1.0" + (f" ({'; '.join(below)})" if below else ""))
        won, lost = sum(r > WIN for r in ratios.values()), sum(r < LOSS for r in ratios.values())
        parts.append(f"{won} won (ratio above {WIN}), {lost} lost (below {LOSS})")
    if wrong:
        parts.append(f"**wrong: {'; '.join(wrong)}**")
    return f"{'; '.join(parts)}."


def tests_line(device: Device) -> str:
    """What the tests on the device gave.  A part that skipped all its tests (no sanitizer there, say) did not pass."""
    failed = [f"{name} ({r['error']})" for name, r in device.tests.items() if r.get("error")]
    skipped = [name for name, r in device.tests.items() if not r.get("error") and " passed" not in str(r["text"])]
    passed = len(device.tests) - len(failed) - len(skipped)
    parts = [f"{passed} of {len(device.tests)} parts passed" if device.tests else NOT_MEASURED]
    parts += [f"failed: {'; '.join(failed)}"] if failed else []
    parts += [f"skipped: {'; '.join(skipped)}"] if skipped else []
    return f"Tests on the device: {'; '.join(parts)}."


def block(devices: Sequence[Device], short: bool, plot: str) -> str:
    """What stands between the comments: of the README (`short`) the classic six, of the other page all cases."""
    classic, every = [str(c) for c in cases()], [str(c) for c in cases(True)]
    columns = SHORT if short else COLUMNS
    if not any(d.cases for d in devices):
        more = f"The {len(every) - len(classic)} further cases of `--all`: {NOT_MEASURED}."
        return "\n".join(
            [f"No kernel was timed on a GPU: {NOT_MEASURED}.", "", *kernel_table(classic, {}, columns), "", more]
        )
    lines = [f"![ratios to the best baseline, by case]({plot})"]
    for d in devices:
        listed = [c for c in every if c in classic or c in d.cases] + [c for c in d.cases if c not in every]
        rest = len([c for c in every if c not in listed])
        lines += ["", f"### {d.name}", "", summary(d.cases), ""]
        lines += kernel_table(classic if short else listed, d.cases, columns)
        if not short:
            lines += ["", f"The {rest} further cases of `--all`: {NOT_MEASURED}.", ""] if rest else [""]
            lines += [tests_line(d), f"From {', '.join(f'{n} ({s})' for n, s in d.sources.items())}."]
    return "\n".join(lines)


# -- the plot


def plot(devices: Sequence[Device]) -> bytes:
    """A PNG: the ratio to the best baseline of each correct case, with quartiles.  Raises MugraphError without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MugraphError(
            "the plot needs matplotlib, which is not installed", remedy="pip install 'mugraph[plots]'"
        ) from error
    order = [str(c) for c in cases(True)]
    shown = {d.name: {c: m.best for c, m in d.cases.items() if m.best is not None and m.correct} for d in devices}
    names = sorted(
        {c for rows in shown.values() for c in rows}, key=lambda c: (order.index(c) if c in order else 999, c)
    )
    figure = Figure(figsize=(9, 1.5 + 0.22 * max(len(names), 4)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for device, rows in shown.items():
        place = [names.index(c) for c in rows]
        ratios = [float(r["ratio"]) for r in rows.values()]
        spread = [
            [max(0.0, float(r["ratio"]) - float(r["ratio_low"])) for r in rows.values()],
            [max(0.0, float(r["ratio_high"]) - float(r["ratio"])) for r in rows.values()],
        ]
        axes.errorbar(ratios, place, xerr=spread, fmt="o", markersize=4, linewidth=1, label=device)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time of the best baseline / time of mugraph (right of 1: mugraph is faster)")
    if shown:
        figure.legend(loc="outside upper right", fontsize=7)
    place_of_bytes = io.BytesIO()
    figure.savefig(place_of_bytes, format="png", dpi=110)
    return place_of_bytes.getvalue()


# -- pages


def replaced(page: str, text: str, name: str) -> str:
    """The page with the text between its two comments.  Raises MugraphError where these are not there once each, in
    order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or page.count(BEGIN) != 1 or page.count(END) != 1:
        raise MugraphError(
            f"{name} has no place for the figures",
            remedy=f"put the lines {BEGIN} and {END} into it, once each and in this order",
        )
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def pages(results: Path, root: Path) -> dict[Path, str]:
    """The pages as they are to be, by path.  Raises MugraphError."""
    devices = read(results)
    found = {}
    for name, short, place in (("README.md", True, PLOT), ("docs/performance.md", False, Path(PLOT).name)):
        try:
            page = (root / name).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise MugraphError(f"cannot read {root / name}: {error}", remedy="name the repository: --root") from error
        found[root / name] = replaced(page, block(devices, short, place), name)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="write the GPU figures of the docs"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="the documents")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    options = parser.parse_args(argv)
    try:
        files: dict[Path, Any] = {**pages(options.results, options.root)}
        devices = [d for d in read(options.results) if d.cases]
        if devices:
            files[options.root / PLOT] = plot(devices)
        for path, data in files.items():
            write_whole(path, data)
    except (MugraphError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {', '.join(str(p.relative_to(options.root)) for p in files)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
