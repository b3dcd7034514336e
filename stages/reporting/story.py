"""What the report shows, read from the artifacts of a run; what a run did not make is absent.

Only the small files are read. Fetching a model as a whole would copy gigabytes of weights for one history file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stages.artifacts.manifests import read_file, read_manifest
from stages.config.graph import trained_stages
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.lineage.graph import Graph, ancestors
from stages.lineage.tags import is_model


@dataclass(frozen=True)
class Story:
    """Records of one run, by role."""

    title: str
    run: RunInfo
    manifests: dict[str, Manifest]
    uris: dict[str, str]
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    promotion: dict[str, Any] = field(default_factory=dict)
    lineage: Graph | None = None

    def metrics_of(self, role: str) -> dict[str, float]:
        """What `evaluate` measured of a model."""
        return (self.evaluation.get("models") or {}).get(role) or {}


def read_story(inputs: Mapping[str, ArtifactRef], run: RunInfo, *, title: str, max_samples: int) -> Story:
    """Read what the report needs; every file is checked against its manifest."""
    manifests = {role: read_manifest(ref) for role, ref in inputs.items()}

    def read(role: str, name: str, default: Any) -> Any:
        if role not in inputs or not _has(manifests[role], name):
            return default
        return json.loads(read_file(inputs[role], name))

    return Story(
        title=title,
        run=run,
        manifests=manifests,
        uris={role: ref.uri for role, ref in inputs.items()},
        histories={
            spec.role: _history(inputs[spec.role], manifests[spec.role])
            for spec in trained_stages()
            if spec.role in inputs
        },
        evaluation=read("evaluation", "metrics.json", {}),
        samples=read("evaluation", "samples.json", [])[:max_samples],
        promotion=read("promotion", "promotion.json", {}),
        lineage=_whole_lineage(inputs),
    )


def _whole_lineage(inputs: Mapping[str, ArtifactRef]) -> Graph | None:
    """The lineage of everything; its roots are the artifacts that nothing else was made from."""
    if not inputs:
        return None
    graph = ancestors(ref.uri for ref in inputs.values())
    used = {edge.source for edge in graph.edges}
    return replace(graph, roots=tuple(root for root in graph.roots if root not in used))


def _history(ref: ArtifactRef, manifest: Manifest) -> list[dict[str, Any]]:
    if not is_model(manifest.kind) or not _has(manifest, "history.jsonl"):
        return []
    return [json.loads(line) for line in read_file(ref, "history.jsonl").splitlines()]


def _has(manifest: Manifest, name: str) -> bool:
    return any(entry.path == name for entry in manifest.files)
