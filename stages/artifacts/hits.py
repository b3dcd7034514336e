"""Which artifact answers a request, and where it will lie if it has to be built.

A fingerprint covers the fingerprints of inputs, not their content. Usually one follows from the other, but an input
may have been built twice: after damage, on a GPU that rounds differently. So a hit must also have been made from the
content that is asked for. Otherwise it stays where it is, because registered models may descend from it, and the
request is answered under a second fingerprint, which covers the content of the inputs too.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.artifacts.addresses import artifact_key
from stages.artifacts.manifests import find_intact, fingerprint, is_doubted
from stages.artifacts.store import Store
from stages.config.base import Config
from stages.config.errors import BadManifestError
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, Manifest

logger = logging.getLogger("athanor")


@dataclass(frozen=True)
class Found:
    """The answer to a request."""

    fingerprint: str
    """Under which it lies, or is to be built."""
    manifest: Manifest | None = None
    """None when it must be built."""


def other_content(manifest: Manifest, inputs: Mapping[str, ArtifactRef]) -> list[str]:
    """Say which inputs an artifact was made from with other content than these: `model: aaaa -> bbbb`.

    The empty digest of an input that is only planned contradicts nothing.
    """
    before = {entry.role: entry.digest for entry in manifest.inputs}
    return [
        f"content of {role}: {before.get(role, 'absent')[:12]} -> {ref.digest[:12]}"
        for role, ref in inputs.items()
        if ref.digest and before.get(role) != ref.digest
    ]


def find_hit(
    store: Store,
    stage: Stage,
    config: Config,
    *,
    inputs: Mapping[str, ArtifactRef],
    sources: Mapping[str, str] | None = None,
    unless_doubted: bool = False,
) -> Found:
    """Look for the artifact that this stage makes from these inputs; a damaged one is named and discarded.

    With `unless_doubted`, an artifact that a reader reported as damaged counts as missing: all of it must be read.
    """
    kind = GRAPH[stage].kind

    def intact(identity: str) -> Manifest | None:
        return None if unless_doubted and is_doubted(store, kind, identity) else find_intact(store, kind, identity)

    asked: dict[str, Any] = {"inputs": inputs, "sources": sources, "store_uri": store.root_uri}
    identity = fingerprint(stage, config, **asked)
    manifest = intact(identity)
    if manifest is None or not (differs := other_content(manifest, inputs)):
        return Found(identity, manifest)
    second = fingerprint(stage, config, **asked, with_content=True)
    logger.warning(
        "%s is no hit, it was made from something else (%s). It stays as it is; this run uses %s.",
        artifact_key(kind, identity),
        "; ".join(differs),
        artifact_key(kind, second),
    )
    again = intact(second)
    if again is not None and (differs := other_content(again, inputs)):
        key = artifact_key(kind, second)
        raise BadManifestError(
            f"{store.root_uri}/{key} was made from other inputs than its fingerprint covers ({'; '.join(differs)})",
            advice=f"Something forged it. Delete {key}; its stage will build it again.",
        )
    return Found(second, again)
