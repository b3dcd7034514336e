"""All that the report tells, read from the artifacts of a run; whatever a run did not make is simply absent.

Only the small files are read. Fetching a model as a whole would copy gigabytes of weights for one history file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stages.artifacts.addresses import split_artifact_uri
from stages.artifacts.manifests import read_manifest
from stages.config.errors import DamagedArtifactError
from stages.config.request import ArtifactRef, Manifest, RunInfo
from stages.lineage.graph import Graph, ancestors
from stages.lineage.tags import MODEL_KINDS

MODEL_ROLES = ("base", "sft", "reward", "ppo", "dpo")


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
        if role not in inputs:
            return default
        content = read_artifact_file(inputs[role], manifests[role], name)
        return default if content is None else json.loads(content)

    return Story(
        title=title,
        run=run,
        manifests=manifests,
        uris={role: ref.uri for role, ref in inputs.items()},
        histories={role: _history(inputs[role], manifests[role]) for role in MODEL_ROLES if role in inputs},
        evaluation=read("evaluation", "metrics.json", {}),
        samples=read("evaluation", "samples.json", [])[:max_samples],
        promotion=read("promotion", "promotion.json", {}),
        lineage=_whole_lineage(inputs),
    )


def _whole_lineage(inputs: Mapping[str, ArtifactRef]) -> Graph | None:
    """The lineage of everything; its roots are what nothing else was made from."""
    if not inputs:
        return None
    graph = ancestors(ref.uri for ref in inputs.values())
    used = {edge.source for edge in graph.edges}
    return replace(graph, roots=tuple(root for root in graph.roots if root not in used))


def read_artifact_file(ref: ArtifactRef, manifest: Manifest, name: str) -> bytes | None:
    """Return one file of an artifact, None when it has no such file; raises DamagedArtifactError for other content."""
    entry = next((entry for entry in manifest.files if entry.path == name), None)
    if entry is None:
        return None
    store, key = split_artifact_uri(ref.uri)
    content = store.read_bytes(f"{key}/{name}")
    if hashlib.sha256(content).hexdigest() != entry.sha256:
        raise DamagedArtifactError(
            f"{ref.uri}/{name} does not have the content that its manifest records",
            advice=f"Clear the task {manifest.stage.value}; it will be built again.",
        )
    return content


def _history(ref: ArtifactRef, manifest: Manifest) -> list[dict[str, Any]]:
    content = read_artifact_file(ref, manifest, "history.jsonl") if manifest.kind in MODEL_KINDS else None
    return [json.loads(line) for line in (content or b"").splitlines()]
