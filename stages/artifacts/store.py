"""Object storage behind one small interface: `file://` for one machine, `s3://` for any S3-compatible server.

Surprising on purpose: a file in a `file://` store appears under its name only when it is complete (write aside, fsync,
rename), and `put_if_absent` has exactly one winner where the server can: `make doctor` tells. What is half-written lies
under a hidden name, as a multipart upload does on a server. `stages.artifacts.s3` has the other kind of store.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from stages.config.errors import ConfigError


@dataclass(frozen=True)
class Listed:
    """What a listing says of an object; `version` changes with its content (etag, or time of change in ns)."""

    key: str
    size: int
    version: str
    modified: datetime
    """By the store's clock."""


@dataclass(frozen=True)
class Unfinished:
    """An object that somebody began to write and has not finished, or never will."""

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
        """Write unless the key exists; True for the one writer that made it, whose data must be like no other's."""
        ...

    def upload(self, path: Path, key: str) -> None: ...
    def download(self, key: str, path: Path) -> None: ...
    def list(self, prefix: str) -> Iterator[str]:
        """Yield the keys below a folder-like prefix, sorted."""
        ...

    def listing(self) -> Iterator[Listed]:
        """Yield everything in the store, in no order; without an error when there is nothing."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object of this name and everything below it."""
        ...

    def local_path(self, key: str) -> Path | None:
        """The object's own file, when the store is a local folder."""
        ...

    def clock(self) -> datetime:
        """The present by the clock that `Listed.modified` is read from; a server's may differ from ours."""
        ...

    def unfinished(self) -> Iterator[Unfinished]:
        """Yield what is half-written, in no order."""
        ...

    def discard(self, upload: Unfinished) -> None:
        """Remove what is half-written; nothing happens when it is gone."""
        ...


def check_key(key: str, root_uri: str) -> str:
    """Return a key as it is; raises ConfigError for one that is empty, absolute, or names another place than it says.

    Keys are put together from records that others may have written, such as the files that a manifest names.
    """
    if any(part in ("", ".", "..") for part in key.split("/")) or "\0" in key:
        raise ConfigError(
            f"key={key!r} leaves the store {root_uri}",
            advice="Use relative keys without empty parts, '.' and '..'; who wrote this one wanted something else.",
        )
    return key


def read_json(store: Store, key: str) -> Any:
    return json.loads(store.read_bytes(key))


def write_json(store: Store, key: str, value: Any) -> None:
    store.write_bytes(key, json.dumps(value, indent=1, ensure_ascii=False).encode())
