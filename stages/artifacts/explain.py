"""Why a stage will run: the field-level difference between what is asked for and the nearest earlier build."""

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stages.artifacts.manifests import MANIFEST, input_identity, load_manifest
from stages.artifacts.store import Store
from stages.config.errors import DamagedArtifactError
from stages.config.graph import GRAPH, Stage
from stages.config.nested import dotted
from stages.config.pipeline import stored_identity
from stages.config.request import Manifest, digests_of

logger = logging.getLogger(__name__)

MAX_BUILDS = 200
"""At most this many manifests of one kind are read; in a larger store the others are ignored."""
NEW = "built anew"
BY_JOB = "identified by the job"


class Builds:
    """The earlier builds of one stage in a store, newest first."""

    def __init__(self, store: Store, stage: Stage) -> None:
        keys = [key for key in store.list(f"artifacts/{GRAPH[stage].kind}") if key.endswith(f"/{MANIFEST}")]
        self.store_uri = store.root_uri
        self.complete = len(keys) <= MAX_BUILDS
        """Whether every build was compared."""
        if not self.complete:
            logger.warning("%s: %d earlier builds, of which %d are compared.", stage.value, len(keys), MAX_BUILDS)
        with ThreadPoolExecutor(max_workers=8) as pool:
            read = pool.map(lambda key: _readable(store, key), keys[:MAX_BUILDS])
            self.manifests = sorted(filter(None, read), key=lambda manifest: manifest.created_at, reverse=True)

    def nearest(self, wanted: Mapping[str, Any]) -> Manifest | None:
        """Return the build that differs in the fewest fields, the newest of those."""
        return min(self.manifests, key=lambda manifest: len(self.differences(manifest, wanted)), default=None)

    def known_sources(self, identity: Mapping[str, Any], uris: tuple[str, ...]) -> Manifest | None:
        """Return the newest build of the same version, config and inputs that read exactly these outside sources."""
        same = {name: value for name, value in identity.items() if not name.startswith("source ")}
        for manifest in self.manifests:
            fields = identity_of(manifest, store_uri=self.store_uri, wanted=identity)
            own = {name: value for name, value in fields.items() if not name.startswith("source ")}
            if own == same and {source.uri for source in manifest.sources} == set(uris):
                return manifest
        return None

    def differences(self, manifest: Manifest, wanted: Mapping[str, Any]) -> list[str]:
        """Say what differs: `optimizer.learning_rate: 0.001 -> 0.0002`; fingerprints and digests are shortened."""
        before, found = identity_of(manifest, store_uri=self.store_uri, wanted=wanted), []
        for name in sorted(before.keys() | wanted.keys()):
            old, new = before.get(name, "absent"), wanted.get(name, "absent")
            if old != new:
                found.append(f"{name}: {_short(name, old)} -> {_short(name, new)}")
        return found


def _readable(store: Store, key: str) -> Manifest | None:
    try:
        return load_manifest(store, key.removesuffix(f"/{MANIFEST}"))
    except FileNotFoundError:
        logger.warning("%s/%s is gone and is ignored.", store.root_uri, key)
    except DamagedArtifactError as error:
        logger.warning("%s. It is ignored.", error.message)
    return None


def identity_fields(
    stage: Stage,
    config: Mapping[str, Any],
    *,
    inputs: Mapping[str, str],
    sources: Mapping[str, str],
    version: int | None = None,
) -> dict[str, Any]:
    """Everything that goes into a fingerprint, as flat names."""
    return {
        "version": GRAPH[stage].version if version is None else version,
        **dotted(stored_identity(stage, config)),
        **{f"input {role}": fingerprint for role, fingerprint in inputs.items()},
        **{f"source {uri}": digest for uri, digest in sources.items()},
    }


def identity_of(manifest: Manifest, *, store_uri: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an earlier build in the store at `store_uri`, to be compared with those of `wanted`."""
    # A store that was moved holds manifests with its earlier addresses: either name of an input is its name.
    inputs = {
        entry.role: asked
        if (asked := wanted.get(f"input {entry.role}")) in (entry.fingerprint, f"content:{entry.digest}")
        else input_identity(entry, store_uri)
        for entry in manifest.inputs
    }
    return identity_fields(
        manifest.stage, manifest.config, inputs=inputs, sources=digests_of(manifest.sources), version=manifest.version
    )


def _short(name: str, value: Any) -> str:
    text = str(value)
    if not name.startswith(("input ", "source ")) or text in ("absent", NEW, BY_JOB):
        return text
    return text.removeprefix("content:")[:12]
