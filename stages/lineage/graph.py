"""Ancestors and descendants, by walking manifests, which are the one author of lineage.

`python -m stages.lineage ancestors|descendants <artifact uri | models:/name@alias | digest or uri of raw data>`.
MLflow holds copies of these edges for people to browse. What a takedown must reach is answered from the store, which
also has artifacts that were never registered.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from stages.artifacts.addresses import artifact_uri
from stages.artifacts.manifests import MANIFEST, load_manifest, read_manifest
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, DataError
from stages.config.graph import GRAPH
from stages.config.request import BASE_MODEL, Manifest, SourceKind

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
    """Nodes that the question was about."""
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


def started_from(manifest: Manifest) -> str:
    """Return the fingerprint of the model that the run of this one was given to start from, "" for none."""
    seen = {manifest.fingerprint}
    while True:
        inputs = {entry.role: entry for entry in manifest.inputs}
        if BASE_MODEL in inputs:
            return inputs[BASE_MODEL].fingerprint
        if "model" not in inputs:
            return ""
        manifest = _read(inputs["model"].uri)
        if manifest.fingerprint in seen:
            raise _made_from_itself({manifest.fingerprint}, len(seen))
        seen.add(manifest.fingerprint)


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
    return [load_manifest(store, key.removesuffix(f"/{MANIFEST}")) for key in keys]


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
        for source in manifest.sources:
            kind = GIVEN_KIND if source.kind is SourceKind.MODEL else SOURCE_KIND
            node = Node(id=f"{kind} {source.uri} {source.digest}", kind=kind, uri=source.uri, digest=source.digest)
            self.nodes[node.id] = node
            self.edges[Edge(node.id, manifest.fingerprint, source.role)] = None

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
        order = {stage.value: position for position, stage in enumerate(GRAPH)}
        nodes = sorted(kept.values(), key=lambda node: (order.get(node.stage, -1), node.created_at, node.id))
        place = {node.id: position for position, node in enumerate(nodes)}
        edges.sort(key=lambda edge: (place[edge.source], place[edge.target], edge.role))
        _check_no_cycle(edges)
        return Graph(roots=tuple(dict.fromkeys(roots)), nodes=tuple(nodes), edges=tuple(edges))


def _check_no_cycle(edges: Iterable[Edge]) -> None:
    """Raise DataError when something was made from itself, which only a manifest that was changed can say."""
    made_from: dict[str, set[str]] = {}
    for edge in edges:
        made_from.setdefault(edge.target, set()).add(edge.source)
    while made_from:
        ready = [node for node, sources in made_from.items() if not sources & made_from.keys()]
        if not ready:
            raise _made_from_itself(made_from, len(made_from))
        for node in ready:
            del made_from[node]


def _made_from_itself(nodes: Iterable[str], number: int) -> DataError:
    return DataError(
        f"{sorted(nodes)[0]} was made from itself, as the manifests of {number} artifacts say",
        advice="A manifest in the store was changed. Find out which, and build its stage again.",
    )


def _read(uri: str) -> Manifest:
    try:
        return read_manifest(uri)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no artifact at {uri!r} (its manifest is missing)",
            advice="Check the uri; if the artifact was removed, what was made from it can still be listed by digest.",
        ) from None
