"""Lineage has one author, the manifest: its tags for MLflow, and ancestors and descendants by walking manifests.

`python -m stages.lineage ancestors|descendants <artifact uri | models:/name@alias | digest or uri of raw data>`.
MLflow holds copies of these edges for people to browse; what a takedown must reach is answered from the store, which
also knows artifacts that were never registered.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

from stages.artifacts.manifests import MANIFEST, artifact_uri, read_manifest
from stages.artifacts.store import Store, open_store
from stages.config.errors import ConfigError, StageError
from stages.config.graph import GRAPH, Stage
from stages.config.pipeline import BASE_MODEL
from stages.config.request import ArtifactRef, InputEntry, Manifest
from stages.lineage.svg import Box, draw_graph

DATASET_KINDS = frozenset({"curated", "tokens", "evaluation"})
"""Kinds that MLflow shows as datasets; the other inputs of a stage are models or records."""
MODEL_KINDS: dict[str, Stage] = {spec.kind: spec.stage for spec in GRAPH.values() if spec.trains}
SOURCE_KIND = "raw data"
GIVEN_KIND = "given model"
_MIN_DIGEST_PREFIX = 8


@dataclass(frozen=True)
class Node:
    """An artifact, or something from outside: raw data or a given base model."""

    id: str
    """Fingerprint of an artifact, `<kind> <digest>` of an outside source."""
    kind: str
    uri: str
    digest: str
    stage: str = ""
    created_at: str = ""
    mlflow_run_id: str | None = None
    mlflow_model_id: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Edge:
    """`source` went into `target` in this role."""

    source: str
    target: str
    role: str


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which data flows, and the edges between them."""

    roots: tuple[str, ...]
    """Nodes that were asked about."""
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def lineage_tags(manifest: Manifest, uri: str) -> dict[str, str]:
    """Return the tags that runs, LoggedModels and model versions carry, copied from the manifest.

    `lineage.parent.<role>` is the fingerprint of an input model, `lineage.dataset.<role>` the digest of input data.
    """
    tags = {
        **input_tags({entry.role: entry for entry in manifest.inputs}, manifest.sources, stage=manifest.stage),
        "lineage.stage": manifest.stage.value,
        "lineage.kind": manifest.kind,
        "lineage.fingerprint": manifest.fingerprint,
        "lineage.digest": manifest.digest,
        "artifact.uri": uri,
        "git.commit": str(manifest.execution.get("git_commit", "")),
        "ray.submission_id": str(manifest.execution.get("submission_id", "")),
    }
    return {key: value for key, value in tags.items() if value}


def input_tags(
    inputs: Mapping[str, InputEntry | ArtifactRef], sources: Mapping[str, str], *, stage: Stage
) -> dict[str, str]:
    """Return the tags for the edges into a stage."""
    tags: dict[str, str] = {}
    for role, entry in inputs.items():
        if entry.kind in DATASET_KINDS:
            tags[f"lineage.dataset.{role}"] = entry.digest
        else:
            tags[f"lineage.parent.{role}"] = entry.fingerprint
    relation = "dataset" if stage is Stage.CURATE else "parent"
    for uri, digest in sources.items():
        tags[f"lineage.{relation}.source.{slug(uri)}"] = digest
    return tags


def started_from(manifest: Manifest) -> str:
    """Return the fingerprint of the model that the run of this one was given to start from, "" for none."""
    while True:
        inputs = {entry.role: entry for entry in manifest.inputs}
        if BASE_MODEL in inputs:
            return inputs[BASE_MODEL].fingerprint
        if "model" not in inputs:
            return ""
        manifest = _read(inputs["model"].uri)


def slug(text: str) -> str:
    """Return `text` with everything that MLflow refuses in tag keys replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:120] or "source"


def ancestors(uris: Iterable[str]) -> Graph:
    """Return everything that the artifacts were made from, down to the digests of raw data."""
    graph = _GraphBuilder()
    roots = [graph.add_with_ancestors(uri) for uri in uris]
    return graph.build(roots)


def ancestors_of_unpublished(manifest: Manifest, uri: str) -> Graph:
    """The same for a manifest that is about to be published."""
    graph = _GraphBuilder()
    graph.add_manifest(manifest, uri)
    for entry in manifest.inputs:
        graph.add_with_ancestors(entry.uri)
    return graph.build([manifest.fingerprint])


def descendants(store: Store, target: str) -> Graph:
    """Return everything in the store that was made from `target`: an artifact uri, or uri or digest of raw data.

    Raises ConfigError when nothing in the store was made from it under that name.
    """
    graph = _GraphBuilder()
    for manifest in all_manifests(store):
        graph.add_manifest(manifest, artifact_uri(store, manifest.kind, manifest.fingerprint))
    roots = [node.id for node in graph.nodes.values() if _names(node, target)]
    if not roots:
        raise ConfigError(
            f"{target!r} is neither an artifact nor raw data that an artifact in {store.root_uri} was made from",
            advice="Give an artifact uri, models:/name@alias, the uri of a source as the run had it, or the first "
            f"{_MIN_DIGEST_PREFIX} or more characters of a digest or fingerprint.",
        )
    return graph.build(roots, only=graph.reachable(roots))


def all_manifests(store: Store) -> list[Manifest]:
    """Read every manifest of the store; other objects under artifacts/ are unfinished and do not count."""
    keys = [key for key in store.list("artifacts") if key.endswith(f"/{MANIFEST}") and key.count("/") == 3]
    return [Manifest.model_validate_json(store.read_bytes(key)) for key in keys]


def _names(node: Node, target: str) -> bool:
    if target.rstrip("/") == node.uri.rstrip("/"):
        return True
    is_prefix = len(target) >= _MIN_DIGEST_PREFIX and re.fullmatch(r"[0-9a-f:]+", target.removeprefix("sha256:"))
    wanted = target.removeprefix("sha256:")
    return bool(is_prefix) and (node.digest.removeprefix("sha256:").startswith(wanted) or node.id.startswith(wanted))


class _GraphBuilder:
    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.edges: dict[Edge, None] = {}

    def add_with_ancestors(self, uri: str) -> str:
        """Walk upwards from an artifact; each manifest is read once."""
        first = ""
        waiting, read = [uri], set[str]()
        while waiting:
            uri = waiting.pop()
            if uri in read or uri.rstrip("/").rsplit("/", 1)[-1] in self.nodes:
                first = first or uri.rstrip("/").rsplit("/", 1)[-1]
                continue
            read.add(uri)
            manifest = _read(uri)
            self.add_manifest(manifest, uri)
            first = first or manifest.fingerprint
            waiting.extend(entry.uri for entry in manifest.inputs)
        return first

    def add_manifest(self, manifest: Manifest, uri: str) -> None:
        self.nodes[manifest.fingerprint] = Node(
            id=manifest.fingerprint,
            kind=manifest.kind,
            uri=uri,
            digest=manifest.digest,
            stage=manifest.stage.value,
            created_at=manifest.created_at,
            mlflow_run_id=manifest.mlflow_run_id,
            mlflow_model_id=manifest.mlflow_model_id,
            metrics=manifest.metrics,
        )
        for entry in manifest.inputs:
            self.edges[Edge(entry.fingerprint, manifest.fingerprint, entry.role)] = None
        kind = SOURCE_KIND if manifest.stage is Stage.CURATE else GIVEN_KIND
        for source, digest in manifest.sources.items():
            node = Node(id=f"{kind} {source} {digest}", kind=kind, uri=source, digest=digest)
            self.nodes[node.id] = node
            self.edges[Edge(node.id, manifest.fingerprint, "source")] = None

    def reachable(self, roots: Iterable[str]) -> set[str]:
        """Ids of the roots and everything below them."""
        found, waiting = set[str](), list(roots)
        while waiting:
            if (node := waiting.pop()) not in found:
                found.add(node)
                waiting.extend(edge.target for edge in self.edges if edge.source == node)
        return found

    def build(self, roots: list[str], *, only: set[str] | None = None) -> Graph:
        kept = {name: node for name, node in self.nodes.items() if only is None or name in only}
        edges = [edge for edge in self.edges if edge.source in kept and edge.target in kept]
        order = {stage.value: position for position, stage in enumerate(Stage)}
        nodes = sorted(kept.values(), key=lambda node: (order.get(node.stage, -1), node.created_at, node.id))
        place = {node.id: position for position, node in enumerate(nodes)}
        edges.sort(key=lambda edge: (place[edge.source], place[edge.target], edge.role))
        return Graph(roots=tuple(dict.fromkeys(roots)), nodes=tuple(nodes), edges=tuple(edges))


def _read(uri: str) -> Manifest:
    try:
        return read_manifest(uri)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no artifact at {uri!r} (its manifest is missing)",
            advice="Check the uri; if the artifact was removed, what was made from it can still be listed by digest.",
        ) from None


def to_json(graph: Graph) -> str:
    return json.dumps(asdict(graph), indent=1, ensure_ascii=False)


def to_markdown(graph: Graph) -> str:
    """A table of nodes and, under each, where it came from."""
    incoming: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        incoming.setdefault(edge.target, []).append(edge)
    names = {node.id: f"{node.kind} `{_short(node)}`" for node in graph.nodes}
    lines = ["| what | digest | made from | where |", "|---|---|---|---|"]
    for node in graph.nodes:
        origin = ", ".join(f"{edge.role}: {names[edge.source]}" for edge in incoming.get(node.id, ())) or "outside"
        mark = "**" if node.id in graph.roots else ""
        cells = (f"{mark}{names[node.id]}{mark}", f"`{node.digest}`", origin, node.uri)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def to_svg(graph: Graph) -> str:
    """Draw the graph; colours follow the viewer's light or dark mode."""
    boxes = [
        Box(
            id=node.id,
            title=node.kind,
            lines=(_short(node), *_headline_metric(node)),
            tooltip=f"{node.uri}\ndigest {node.digest}",
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
    return "model" if node.kind in MODEL_KINDS else "data" if node.kind in DATASET_KINDS else "record"


def _headline_metric(node: Node) -> tuple[str, ...]:
    for key in ("eval/perplexity", "reward/accuracy", "dpo/accuracy", "ppo/score", "eval/loss"):
        if key in node.metrics:
            return (f"{key.rsplit('/', 1)[-1]} {node.metrics[key]:.3g}",)
    return ()


def resolve_target(target: str) -> str:
    """Return the artifact uri behind `models:/name@alias` or `models:/name/version`; anything else as it is."""
    if not target.startswith("models:/"):
        return target
    from stages.tracking.client import artifact_uri_of_model  # mlflow takes seconds to import and is needed only here

    return artifact_uri_of_model(target)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.lineage", description="Where an artifact came from, and what came of it."
    )
    parser.add_argument("direction", choices=("ancestors", "descendants"))
    parser.add_argument("target", help="artifact uri, models:/name@alias, or (descendants) uri or digest of raw data")
    parser.add_argument("--format", choices=("markdown", "json", "svg"), default="markdown")
    parser.add_argument("--store", default=os.environ.get("ARTIFACT_STORE", ""), help="root of the object store")
    options = parser.parse_args(arguments)
    render = {"markdown": to_markdown, "json": to_json, "svg": to_svg}[options.format]
    try:
        target = resolve_target(options.target)
        if options.direction == "ancestors":
            graph = ancestors([target])
        else:
            graph = descendants(open_store(options.store or _store_of(target)), target)
    except StageError as error:
        sys.stderr.write(f"error: {error.message}\n{error.advice}\n")
        return 2
    sys.stdout.write(render(graph))
    if options.direction == "descendants" and options.format == "markdown":
        sys.stdout.write(_registered_versions(graph))
    return 0


def _store_of(target: str) -> str:
    root, separator, _ = target.rpartition("/artifacts/")
    if not separator:
        raise ConfigError(
            f"no store to search for {target!r}",
            advice="Set ARTIFACT_STORE or give --store file:///folder or s3://bucket/prefix.",
        )
    return root


def _registered_versions(graph: Graph) -> str:
    """List what is registered in MLflow of these models; a takedown must withdraw them."""
    models = [node for node in graph.nodes if node.kind in MODEL_KINDS]
    if not models or not os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    from stages.tracking.client import registered_versions

    found = registered_versions([node.id for node in models])
    lines = [
        f"- {name} version {version}" + (f" ({', '.join(aliases)})" if aliases else "")
        for name, version, aliases in found
    ]
    return "\nRegistered in MLflow:\n" + ("\n".join(lines) or "- none of them") + "\n"
