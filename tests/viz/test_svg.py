"""Pictures: well-formed, nested, nothing overlaps, no text leaves its box."""

import re
import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings

from mugraph.ir.parser import parse_program
from mugraph.viz import draw_mermaid, draw_svg
from mugraph.viz.layout import GAP_X, Size, arrange
from mugraph.viz.svg import FILL
from tests.graphs import ALL, attention_fused, rmsnorm_linear, rmsnorm_linear_fused
from tests.ir.random_graphs import programs

GRAPHS = [make() for pair in ALL.values() for make in pair] + [attention_fused(parts=4)]
SVG = "{http://www.w3.org/2000/svg}"

Rect = tuple[float, float, float, float]  # left, top, right, bottom


def rects(root: ElementTree.Element) -> list[Rect]:
    found = []
    for r in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(r.attrib[k]) for k in ("x", "y", "width", "height"))
        found.append((x, y, x + w, y + h))
    return found


def texts(root: ElementTree.Element) -> list[Rect]:
    found = []
    for t in root.iter(f"{SVG}text"):
        x, y, length = (float(t.attrib[k]) for k in ("x", "y", "textLength"))
        left = x - length / 2 if t.get("text-anchor") == "middle" else x
        found.append((left, y - 10, left + length, y + 3))
    return found


def inside(a: Rect, b: Rect) -> bool:
    return a[0] >= b[0] - 0.2 and a[1] >= b[1] - 0.2 and a[2] <= b[2] + 0.2 and a[3] <= b[3] + 0.2


def disjoint(a: Rect, b: Rect) -> bool:
    return a[2] <= b[0] + 0.2 or b[2] <= a[0] + 0.2 or a[3] <= b[1] + 0.2 or b[3] <= a[1] + 0.2


def check_picture(svg: str) -> None:
    """Boxes are nested or apart, each text lies within the boxes that it touches, all within the page."""
    root = ElementTree.fromstring(svg)
    boxes = rects(root)
    page = (0.0, 0.0, float(root.attrib["width"]), float(root.attrib["height"]))
    for a, b in combinations(boxes, 2):
        assert disjoint(a, b) or inside(a, b) or inside(b, a), f"{a} and {b} overlap"
    for box in boxes:
        assert inside(box, page), f"{box} leaves the page"
    for text in texts(root):
        for box in boxes:
            assert disjoint(text, box) or inside(text, box) or inside(box, text), f"text {text} leaves {box}"


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: f"{type(g).__name__}-{g.name}")
def test_no_box_overlaps_and_no_text_leaves_its_box(graph):
    check_picture(draw_svg(graph))


@settings(max_examples=40)
@given(programs())
def test_any_graph_can_be_drawn(graph):
    check_picture(draw_svg(graph))
    assert draw_mermaid(graph).startswith("flowchart TD")


def test_a_text_that_leaves_its_box_is_refused():
    svg = draw_svg(rmsnorm_linear())
    wide = re.sub(r'textLength="50\.4"', 'textLength="300.0"', svg)
    assert wide != svg
    with pytest.raises(AssertionError, match="leaves"):
        check_picture(wide)


def test_boxes_that_overlap_are_refused():
    svg = draw_svg(rmsnorm_linear())
    first = re.findall(r'<rect x="[\d.]+" y="[\d.]+"', svg)[3]
    with pytest.raises(AssertionError, match="overlap"):
        check_picture(svg.replace(first, '<rect x="-20.0" y="40.0"'))


def test_the_three_levels_have_their_colours():
    svg = draw_svg(rmsnorm_linear_fused())
    assert [FILL[level] for level in ("kernel", "block", "thread")] == ["#e0edd5", "#dbe8f5", "#fdf2d0"]
    for colour in FILL.values():
        assert f'fill="{colour}"' in svg
    assert FILL["block"] not in draw_svg(rmsnorm_linear())


def test_maps_and_roles_stand_on_the_loads():
    svg = draw_svg(rmsnorm_linear_fused())
    for text in ("imap {b: 0, n: -}", "fmap {k: 1}", "b grid, k loop", "omap {b: 0, n: 1}", "loop k: 128", "epilogue"):
        assert f">{text}</text>" in svg


def test_names_are_escaped():
    text = str(rmsnorm_linear()).replace("Y: ", '"<Y> & y": ').replace("output Y", 'output "<Y> & y"')
    svg = draw_svg(parse_program(text))
    check_picture(svg)
    assert "&lt;Y&gt; &amp; y" in svg
    assert "#lt;Y#gt; & y" in draw_mermaid(parse_program(text))


def test_drawing_is_deterministic_and_self_contained():
    graph = attention_fused(parts=4)
    svg = draw_svg(graph)
    assert svg == draw_svg(graph)
    assert re.findall(r'(?:href|src)="', svg) == []


def test_the_mermaid_text(golden):
    golden(draw_mermaid(rmsnorm_linear_fused()), "mmd")


def test_a_notebook_shows_the_picture():
    graph = rmsnorm_linear_fused()
    shown = graph._repr_mimebundle_()
    assert shown == {"text/plain": str(graph), "image/svg+xml": draw_svg(graph)}


def test_the_picture_is_there_once_viz_is_imported():
    script = (
        "from mugraph.ir.graph import RENDERERS; assert not RENDERERS; "
        "import mugraph.viz; assert set(RENDERERS) == {'image/svg+xml'}"
    )
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_arrows_lead_down():
    sizes = {"a": Size(10, 10), "b": Size(30, 10), "c": Size(10, 10)}
    layout = arrange([sizes], [("a", "b"), ("b", "c"), ("a", "c")], head=[0.0])
    assert layout.corners["a"][1] < layout.corners["b"][1] < layout.corners["c"][1]
    for route in layout.arrows:
        assert all(above[1] <= below[1] for above, below in pairwise(route))


def test_an_arrow_past_a_box_runs_beside_it():
    sizes = {"a": Size(10, 10), "b": Size(60, 40), "c": Size(10, 10)}
    layout = arrange([sizes], [("a", "b"), ("b", "c"), ("a", "c")], head=[0.0])
    left, top = layout.corners["b"]
    beside = [x for x, y in layout.arrows[2] if top <= y <= top + 40]
    assert beside
    assert all(x <= left - GAP_X or x >= left + 60 + GAP_X for x in beside)


def test_boxes_of_one_layer_keep_their_gap():
    sizes = {k: Size(20, 10) for k in "abcd"}
    layout = arrange([sizes], [(k, "d") for k in "abc"], head=[0.0])
    xs = sorted(layout.corners[k][0] for k in "abc")
    assert all(b - a >= 20 + GAP_X - 1e-6 for a, b in pairwise(xs))
