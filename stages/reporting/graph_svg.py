"""A small layered drawing of a directed acyclic graph as SVG; a dozen boxes need no layout engine.

Colours are CSS variables with fallbacks, so the same drawing stands alone (MLflow artifact) and inside a page (report).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 168, 58, 58, 22, 12

_STYLE = """
.lineage{--lg-ink:#1f2328;--lg-soft:#59636e;--lg-line:#8b949e;--lg-source:#fff4d6;--lg-data:#dcefff;--lg-model:#dff5e3;
--lg-record:#eee9fb;font:12px system-ui,sans-serif}
.lineage text{fill:var(--lg-ink)}.lineage .soft{fill:var(--lg-soft);font-size:11px}
.lineage .role{fill:var(--lg-soft);font-size:10px;text-anchor:middle}
.lineage path{fill:none;stroke:var(--lg-line);stroke-width:1.3}.lineage marker path{fill:var(--lg-line);stroke:none}
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
    """Return an SVG with data flowing from left to right; `edges` are (source, target, role).

    An edge between boxes that another path already connects through a middle box is drawn too: it is lineage.
    """
    boxes, edges = list(boxes), list(edges)
    layers = _layers([box.id for box in boxes], edges)
    places = _places(layers, edges)
    width = max((x for x, _ in places.values()), default=0) + _WIDTH + _MARGIN
    height = max((y for _, y in places.values()), default=0) + _HEIGHT + _MARGIN
    summary = f"Lineage graph with {len(boxes)} nodes: " + ", ".join(dict.fromkeys(box.title for box in boxes))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lineage" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="{escape(summary)}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="lg-arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>',
        *(_draw_edge(places, source, target, role) for source, target, role in edges),
        *(_draw_box(box, *places[box.id]) for box in boxes),
        "</svg>",
    ]
    return "\n".join(parts)


def _layers(names: list[str], edges: list[tuple[str, str, str]]) -> dict[str, int]:
    """Longest path from any start; raises ValueError on a cycle, which lineage by fingerprints cannot have."""
    layers = dict.fromkeys(names, 0)
    for _ in range(len(names) + 1):
        moved = False
        for source, target, _role in edges:
            if layers[target] <= layers[source]:
                layers[target], moved = layers[source] + 1, True
        if not moved:
            return layers
    raise ValueError(f"the graph of {len(names)} nodes has a cycle")


def _places(layers: dict[str, int], edges: list[tuple[str, str, str]]) -> dict[str, tuple[float, float]]:
    """Columns by layer; within a column boxes follow the mean height of what feeds them, so that edges cross little."""
    places: dict[str, tuple[float, float]] = {}
    tallest = max((list(layers.values()).count(layer) for layer in layers.values()), default=1)
    for layer in sorted(set(layers.values())):
        column = [name for name, place in layers.items() if place == layer]

        def pull(name: str) -> float:
            feeding = [places[source][1] for source, target, _ in edges if target == name and source in places]
            return sum(feeding) / len(feeding) if feeding else 0.0

        column.sort(key=pull)
        offset = (tallest - len(column)) * (_HEIGHT + _GAP_Y) / 2
        for row, name in enumerate(column):
            places[name] = (_MARGIN + layer * (_WIDTH + _GAP_X), _MARGIN + offset + row * (_HEIGHT + _GAP_Y))
    return places


def _draw_edge(places: dict[str, tuple[float, float]], source: str, target: str, role: str) -> str:
    x1, y1 = places[source][0] + _WIDTH, places[source][1] + _HEIGHT / 2
    x2, y2 = places[target][0], places[target][1] + _HEIGHT / 2
    bend = max((x2 - x1) / 2, 24)
    # A long edge at one height would run through the boxes between its ends: lead it around below them.
    spans = round((x2 - x1) / (_WIDTH + _GAP_X))
    sag = 0.62 * (_HEIGHT + _GAP_Y) * (1 if spans >= 1 and abs(y1 - y2) < _HEIGHT else 0)
    path = f"M{x1:.0f} {y1:.0f}C{x1 + bend:.0f} {y1 + sag:.0f} {x2 - bend:.0f} {y2 + sag:.0f} {x2:.0f} {y2:.0f}"
    return f'<path d="{path}" marker-end="url(#lg-arrow)"><title>{escape(role)}</title></path>'


def _draw_box(box: Box, x: float, y: float) -> str:
    root = " root" if box.emphasised else ""
    lines = "".join(
        f'<text class="soft" x="{x + 10:.0f}" y="{y + 36 + 14 * row:.0f}">{escape(line)}</text>'
        for row, line in enumerate(box.lines[:2])
    )
    return (
        f"<g><title>{escape(box.tooltip or box.title)}</title>"
        f'<rect class="{escape(box.group)}{root}" x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<text x="{x + 10:.0f}" y="{y + 20:.0f}" font-weight="600">{escape(box.title)}</text>{lines}</g>'
    )
