"""Pictures of programs and μGraphs.  Importing this package lets notebooks draw them."""

from mugraph.ir.graph import RENDERERS
from mugraph.viz.mermaid import draw_mermaid
from mugraph.viz.svg import draw_svg

__all__ = ["draw_mermaid", "draw_svg"]

RENDERERS["image/svg+xml"] = draw_svg
