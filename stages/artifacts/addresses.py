"""Addresses: which store a URI names, and under which keys artifacts and runs lie in it."""

import os

from stages.artifacts.folder import FileStore
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, without_logins
from stages.config.graph import Stage
from stages.config.places import bucket_and_key, local_path


def open_store(root_uri: str) -> Store:
    """Open a store by its root; raises ConfigError for what is neither file:///folder nor s3://bucket/prefix."""
    # Not by urlsplit: '?' and '#' may be in names of folders and prefixes, and it would cut them off.
    if root_uri.isprintable() and root_uri.startswith("file://"):
        return FileStore(local_path(root_uri, field="ARTIFACT_STORE"))
    if root_uri.isprintable() and root_uri.startswith("s3://"):
        from stages.artifacts.s3 import S3Store

        bucket, prefix = bucket_and_key(root_uri, field="ARTIFACT_STORE")
        prefix = prefix.strip("/")
        if not {".", ".."}.intersection(prefix.split("/")):
            return S3Store(bucket, prefix)
    raise ConfigError(
        f"ARTIFACT_STORE={without_logins(root_uri)!r} is not a store; allowed: file:///folder or s3://bucket/prefix",
        advice="Set ARTIFACT_STORE to one of these forms.",
    )


def open_default_store(root_uri: str = "") -> Store:
    """Open the store at `root_uri`, by default the one that ARTIFACT_STORE names."""
    return open_store(root_uri or os.environ.get("ARTIFACT_STORE", ""))


def artifact_key(kind: str, fingerprint: str) -> str:
    return f"artifacts/{kind}/{fingerprint}"


def run_key(run_id: str, stage: Stage, name: str) -> str:
    """Key of one of a run's small records: config.json, result.json, failure.json, progress.json."""
    return f"runs/{run_id}/{stage.value}/{name}"


def artifact_uri(store: Store, kind: str, fingerprint: str) -> str:
    return f"{store.root_uri}/{artifact_key(kind, fingerprint)}"


def split_artifact_uri(uri: str) -> tuple[Store, str]:
    """Return the store and the key of `<store root>/artifacts/<kind>/<fingerprint>`."""
    root, _, tail = uri.rpartition("/artifacts/")
    return open_store(root), f"artifacts/{tail.strip('/')}"
