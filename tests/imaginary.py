"""A trained stage that does not exist, for tests that what knows stages learns of a new one from the graph alone."""

from dataclasses import replace
from typing import cast

import pytest

from stages.artifacts.addresses import artifact_uri
from stages.artifacts.manifests import publish, read_manifest
from stages.artifacts.store import Store
from stages.config.graph import GRAPH, Stage, StageSpec
from stages.config.request import ArtifactRef


def add_imaginary_stage(monkeypatch: pytest.MonkeyPatch) -> StageSpec:
    """Put a second kind of DPO into the graph for the length of a test."""
    spec = replace(GRAPH[Stage.DPO], kind="ipo-model", role="ipo", label="Imaginary PO")
    monkeypatch.setitem(GRAPH, cast(Stage, "ipo"), spec)
    return spec


def publish_imaginary(store: Store, like: ArtifactRef) -> ArtifactRef:
    """Publish a manifest without files that only differs from another model's in kind and fingerprint."""
    fingerprint = "1b0" + "0" * 61
    manifest = read_manifest(like).model_copy(update={"kind": "ipo-model", "fingerprint": fingerprint, "files": ()})
    publish(store, manifest)
    return manifest.ref(artifact_uri(store, manifest.kind, fingerprint))
