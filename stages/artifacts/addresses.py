"""Addresses: which store a URI names, and under which keys artifacts and runs lie in it."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.artifacts.folder import FileStore
from stages.artifacts.store import Store
from stages.config.errors import ConfigError
from stages.config.graph import Stage


def open_store(root_uri: str) -> Store:
    """Open a store by its root; raises ConfigError for a scheme that is neither `file` nor `s3`."""
    parts = urlsplit(root_uri)
    match parts.scheme:
        case "file":
            return FileStore(Path(unquote(parts.path)))
        case "s3" if parts.netloc:
            from stages.artifacts.s3 import S3Store

            return S3Store(parts.netloc, parts.path.strip("/"))
        case _:
            raise ConfigError(
                f"ARTIFACT_STORE={root_uri!r} is not a store; allowed: file:///folder or s3://bucket/prefix",
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
