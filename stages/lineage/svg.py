"""A small layered drawing of a directed acyclic graph as SVG; a dozen boxes need no layout engine.

Colours are CSS variables with fallbacks, so the same drawing stands alone (MLflow artifact) and inside a page (report).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape as escape_html

from stages.config.text import one_line

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 176, 56, 40, 40, 12
_LONGEST_TEXT = 1000
_ARC = 34
"""How far an edge that skips layers bends around the boxes between, for each layer."""

_STYLE = """
.lineage{--lg-ink:#1f2328;--lg-soft:#59636e;--lg-line:#8b949e;--lg-source:#fff4d6;--lg-data:#dcefff;--lg-model:#dff5e3;
--lg-record:#eee9fb;font:12px system-ui,sans-serif}
.lineage text{fill:var(--lg-ink)}.lineage .soft{fill:var(--lg-soft);font-size:11px}
.lineage path{fill:none;stroke:var(--lg-line);stroke-width:1.4}
.lineage .long{opacity:.55;stroke-dasharray:4 3}
.lineage marker path{fill:var(--lg-line);stroke:none}
.lineage rect{stroke:var(--lg-line)}.lineage .root{stroke-width:2.6;stroke:var(--lg-ink)}
.lineage .source{fill:var(--lg-source)}.lineage .data{fill:var(--lg-data)}
.lineage .model{fill:var(--lg-model)}.lineage .record{fill:var(--lg-record)}
@media (prefers-color-scheme:dark){.lineage{--lg-ink:#e6edf3;--lg-soft:#a9b4c0;--lg-line:#6e7681;--lg-source:#4a3b12;
--lg-data:#12354f;--lg-model:#173f26;--lg-record:#362b58}}
"""


@dataclass(frozen=True)
class Box:
    """One node of the drawing."""

    id: str
    title: str
    lines: tuple[str, ...] = ()
    tooltip: str = ""
    group: str = "data"
    """`source`, `data`, `model` or `record`: decides the colour."""
    emphasised: bool = False


def draw_graph(boxes: Iterable[Box], edges: Iterable[tuple[str, str, str]]) -> str:
    """Return an SVG with data flowing from top to bottom; `edges` are (source, target, role).

    Edges to the next layer are solid; longer ones are dashed and bend around the boxes between.
    """
    boxes, edges = list(boxes), list(edges)
    layers = _layers([box.id for box in boxes], edges)
    places = _places(layers, edges)
    drawn = [_draw_edge(layers, places, edge) for edge in edges]
    xs = [x for x, _ in places.values()] or [0.0]
    reach = [edge.reach for edge in drawn]
    left = min([min(xs), *reach]) - _MARGIN
    width = max([max(xs) + _WIDTH, *reach]) + _MARGIN - left
    height = max((y for _, y in places.values()), default=0) + _HEIGHT + _MARGIN
    summary = f"Lineage graph with {len(boxes)} nodes: " + ", ".join(dict.fromkeys(box.title for box in boxes))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lineage" viewBox="{left:.0f} 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" role="img" aria-label="{escape(summary)}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="lg-arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
        *(edge.svg for edge in drawn),
        *(_draw_box(box, *places[box.id]) for box in boxes),
        "</svg>",
    ]
    return "\n".join(parts)


def escape(text: str) -> str:
    """Text of unknown origin inside the drawing: XML forbids control characters, and nothing may be obeyed."""
    return escape_html(one_line(text, at_most=_LONGEST_TEXT))


def _layers(names: list[str], edges: list[tuple[str, str, str]]) -> dict[str, int]:
    """Longest path from any start. A cycle is refused where the graph is built, so one here is our own mistake."""
    layers = dict.fromkeys(names, 0)
    for _ in range(len(names) + 1):
        moved = False
        for source, target, _role in edges:
            if layers[target] <= layers[source]:
                layers[target], moved = layers[source] + 1, True
        if not moved:
            return layers
    raise AssertionError(f"the graph of {len(names)} nodes has a cycle")


def _places(layers: dict[str, int], edges: list[tuple[str, str, str]]) -> dict[str, tuple[float, float]]:
    """Rows by layer, centred; within a row boxes are sorted by the mean x of their inputs, so that edges cross less."""
    places: dict[str, tuple[float, float]] = {}
    for layer in sorted(set(layers.values())):
        row = [name for name, place in layers.items() if place == layer]

        def pull(name: str) -> float:
            feeding = [places[source][0] for source, target, _ in edges if target == name and source in places]
            return sum(feeding) / len(feeding) if feeding else 0.0

        row.sort(key=pull)
        left = -(len(row) * _WIDTH + (len(row) - 1) * _GAP_X) / 2
        for position, name in enumerate(row):
            places[name] = (left + position * (_WIDTH + _GAP_X), _MARGIN + layer * (_HEIGHT + _GAP_Y))
    return places


@dataclass(frozen=True)
class _DrawnEdge:
    svg: str
    reach: float
    """The leftmost or rightmost x that it touches."""


def _draw_edge(
    layers: dict[str, int], places: dict[str, tuple[float, float]], edge: tuple[str, str, str]
) -> _DrawnEdge:
    source, target, role = edge
    (x1, y1), (x2, y2) = places[source], places[target]
    span = layers[target] - layers[source]
    title = f"<title>{escape(role)}</title></path>"
    if span == 1:
        x1, x2, y1 = x1 + _WIDTH / 2, x2 + _WIDTH / 2, y1 + _HEIGHT
        middle = (y1 + y2) / 2
        path = f"M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"
        return _DrawnEdge(f'<path d="{path}" marker-end="url(#lg-arrow)">{title}', x1)
    to_right = (x1 + x2) / 2 + _WIDTH / 2 >= -1  # an edge left of the middle bends to the left
    side = _WIDTH if to_right else 0
    x1, x2, y1, y2 = x1 + side, x2 + side, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
    bulge = max(x1, x2) + _ARC * span if to_right else min(x1, x2) - _ARC * span
    path = f"M{x1:.0f} {y1:.0f}C{bulge:.0f} {y1:.0f} {bulge:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
    # A Bezier curve at t = 1/2: each end counts 1/8, each control point 3/8, and both of these are at x = bulge.
    reach = 0.25 * (max(x1, x2) if to_right else min(x1, x2)) + 0.75 * bulge
    return _DrawnEdge(f'<path class="long" d="{path}" marker-end="url(#lg-arrow)">{title}', reach)


def _tooltip(box: Box) -> str:
    return "\n".join(escape(line) for line in (box.tooltip or box.title).split("\n"))


def _draw_box(box: Box, x: float, y: float) -> str:
    root = " root" if box.emphasised else ""
    lines = "".join(
        f'<text class="soft" x="{x + 10:.0f}" y="{y + 36 + 14 * row:.0f}">{escape(line)}</text>'
        for row, line in enumerate(box.lines[:2])
    )
    return (
        f"<g><title>{_tooltip(box)}</title>"
        f'<rect class="{escape(box.group)}{root}" x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<text x="{x + 10:.0f}" y="{y + 20:.0f}" font-weight="600">{escape(box.title)}</text>{lines}</g>'
    )
