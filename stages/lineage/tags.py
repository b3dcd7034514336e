"""The lineage tags that every MLflow run, model and model version carries, copied from the manifest."""

import re
from collections.abc import Iterable, Mapping

from stages.config.graph import spec_of_kind
from stages.config.request import ArtifactRef, InputEntry, Manifest, SourceEntry, SourceKind


def is_dataset(kind: str) -> bool:
    """Whether MLflow shows artifacts of this kind as datasets; the other inputs of a stage are models or records."""
    spec = spec_of_kind(kind)
    return spec is not None and spec.dataset


def is_model(kind: str) -> bool:
    """Whether artifacts of this kind are models that Athanor trained."""
    spec = spec_of_kind(kind)
    return spec is not None and spec.trains


def lineage_tags(manifest: Manifest, uri: str) -> dict[str, str]:
    """Return the tags that runs, LoggedModels and model versions carry, copied from the manifest.

    `lineage.parent.<role>` is the fingerprint of an input model, `lineage.dataset.<role>` the digest of input data.
    """
    tags = {
        **input_tags({entry.role: entry for entry in manifest.inputs}, manifest.sources),
        "lineage.stage": manifest.stage.value,
        "lineage.kind": manifest.kind,
        "lineage.fingerprint": manifest.fingerprint,
        "lineage.digest": manifest.digest,
        "artifact.uri": uri,
        "git.commit": str(manifest.execution.get("git_commit", "")),
        "ray.submission_id": str(manifest.execution.get("submission_id", "")),
    }
    return {key: value for key, value in tags.items() if value}


def input_tags(inputs: Mapping[str, InputEntry | ArtifactRef], sources: Iterable[SourceEntry]) -> dict[str, str]:
    """Return the tags for the edges into a stage."""
    tags: dict[str, str] = {}
    for role, entry in inputs.items():
        if is_dataset(entry.kind):
            tags[f"lineage.dataset.{role}"] = entry.digest
        else:
            tags[f"lineage.parent.{role}"] = entry.fingerprint
    for source in sources:
        relation = "parent" if source.kind is SourceKind.MODEL else "dataset"
        tags[f"lineage.{relation}.source.{slug(source.uri)}"] = source.digest
    return tags


def slug(text: str) -> str:
    """Return `text` with everything that MLflow refuses in tag keys replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-")[:120] or "source"
