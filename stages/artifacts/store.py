"""Object storage behind one small interface: `file://` for one machine, `s3://` for any S3-compatible server.

Surprising on purpose: an object appears under its name only when it is complete. `stages.artifacts.folder` writes under
a hidden name, syncs and renames; `stages.artifacts.s3` relies on the server. `put_if_absent` has exactly one winner on
every server that supports conditional puts; `make doctor` tests it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from stages.config.errors import ConfigError
from stages.config.records import parse_object


@dataclass(frozen=True)
class Listed:
    """One object in a listing; `version` changes with its content (etag, or time of modification in ns)."""

    key: str
    size: int
    version: str
    modified: datetime
    """By the store's clock."""


@dataclass(frozen=True)
class Unfinished:
    """An object whose writing was begun and is not finished, perhaps never will be."""

    key: str
    started: datetime
    id: str


class Store(Protocol):
    """Keys are relative to `root_uri`, with forward slashes."""

    root_uri: str

    def exists(self, key: str) -> bool: ...
    def size(self, key: str) -> int | None:
        """Bytes, or None when there is no such object."""
        ...

    def read_bytes(self, key: str) -> bytes: ...
    def write_bytes(self, key: str, data: bytes) -> None: ...
    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Write unless the key exists; True for the one writer that created it. Data must differ between writers."""
        ...

    def upload(self, path: Path, key: str) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys below a folder-like prefix, sorted."""
        ...

    def listing(self) -> Iterator[Listed]:
        """Yield everything in the store, in no order; nothing, and no error, from an empty or missing store."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object of this name and everything below it."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The object's own file, when the store is a local folder."""
        ...

    def clock(self) -> datetime:
        """The current time by the clock behind `Listed.modified`; a server's clock may differ from ours."""
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """Yield unfinished objects, in no order."""
        ...

    def discard(self, upload: Unfinished) -> None:
        """Remove an unfinished object; nothing happens when it is gone."""
        ...


def is_key(key: str) -> bool:
    """Whether a name can be a key. A bucket may hold other names; what lies there is no object of ours."""
    return "\0" not in key and not any(part in ("", ".", "..") for part in key.split("/"))


def check_key(key: str, root_uri: str) -> str:
    """Return the key unchanged; raises ConfigError for one that is empty, absolute or leads out of the store.

    Keys are built from records that others may have written, such as the file names in a manifest.
    """
    if not is_key(key):
        raise ConfigError(
            f"key={key!r} leaves the store {root_uri}",
            advice="Use relative keys without empty parts, '.' and '..'; this one may have been written to do harm.",
        )
    return key


def read_json(store: Store, key: str) -> dict[str, Any]:
    """Read a JSON object; DataError with its address when it is none."""
    return parse_object(store.read_bytes(key), f"{store.root_uri}/{key}")


def write_json(store: Store, key: str, value: Any) -> None:
    store.write_bytes(key, json.dumps(value, indent=1, ensure_ascii=False).encode())
