"""What a gate judges an artifact by: manifests and small files, read by `stages.artifacts.evidence`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stages.config.request import Manifest

DEFECT = "This is a defect, not a matter of settings: keep the artifact and report it."
REBUILD = "Clear the stage that made it, which builds it again, and see who may write to the store."


@dataclass(frozen=True)
class Evidence:
    """What is recorded about an artifact and about what it was made from."""

    manifest: Manifest
    inputs: Mapping[str, Manifest] = field(default_factory=dict)
    """By role: the manifests that lie now where the artifact's own manifest says that its inputs were."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """By role: why there is no manifest any more that could be believed."""
    first_row: Mapping[str, Any] | None = None
    """Metrics of the first step, for a training."""
    report: Mapping[str, Any] | None = None
    """metrics.json of an evaluation."""
    meta: Mapping[str, Any] | None = None
    """meta.json of tokens."""
