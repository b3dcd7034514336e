"""The lineage graph as JSON, Markdown and SVG."""

import json
from dataclasses import asdict

from stages.config.graph import spec_of_kind
from stages.config.markdown import code, plain, table
from stages.config.text import one_line, printable
from stages.lineage.graph import GIVEN_KIND, SOURCE_KIND, Edge, Graph, Node
from stages.lineage.svg import Box, draw_graph
from stages.lineage.tags import is_dataset, is_model

_LONGEST_TEXT = 2000


def to_json(graph: Graph) -> str:
    # JSON needs no escape for some characters that terminals obey.
    return printable(json.dumps(asdict(graph), indent=1, ensure_ascii=False))


def to_markdown(graph: Graph) -> str:
    """A table of nodes and where each came from; roles and addresses are what others wrote, kinds are names."""
    incoming: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        incoming.setdefault(edge.target, []).append(edge)
    names = {node.id: f"{plain(node.kind)} {code(_short(node))}" for node in graph.nodes}
    rows = []
    for node in graph.nodes:
        edges = incoming.get(node.id, ())
        origin = ", ".join(f"{plain(edge.role, at_most=_LONGEST_TEXT)}: {names[edge.source]}" for edge in edges)
        mark = "**" if node.id in graph.roots else ""
        rows.append((f"{mark}{names[node.id]}{mark}", code(node.digest), origin or "outside", code(node.uri)))
    return table(("what", "digest", "made from", "where"), rows) + "\n"


def to_svg(graph: Graph) -> str:
    """Draw the graph; colours follow the viewer's light or dark mode."""
    boxes = [
        Box(
            id=node.id,
            title=node.kind,
            lines=tuple(filter(None, (_short(node), _headline(node)))),
            tooltip=f"{one_line(node.uri)}\ndigest {node.digest}",
            group=_group(node),
            emphasised=node.id in graph.roots,
        )
        for node in graph.nodes
    ]
    return draw_graph(boxes, [(edge.source, edge.target, edge.role) for edge in graph.edges])


def _short(node: Node) -> str:
    return node.uri.rsplit("/", 1)[-1][:24] if node.kind in (SOURCE_KIND, GIVEN_KIND) else node.id[:12]


def _group(node: Node) -> str:
    if node.kind in (SOURCE_KIND, GIVEN_KIND):
        return "source"
    return "model" if is_model(node.kind) else "data" if is_dataset(node.kind) else "record"


def _headline(node: Node) -> str:
    spec = spec_of_kind(node.kind)
    return spec.summary(node.metrics, at_most=1) if spec else ""
