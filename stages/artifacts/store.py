"""Object storage behind one small interface: `file://` for one machine, `s3://` for any S3-compatible server.

Surprising on purpose: a file in a `file://` store appears under its name only when it is complete (write aside, fsync,
rename), and `put_if_absent` has exactly one winner where the server can: `make doctor` tells. What is half-written lies
under a hidden name, as a multipart upload does on a server. `stages.artifacts.s3` has the other kind of store.
"""

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from stages.config.errors import ConfigError

_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{32}")


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


class FileStore:
    """A folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.root_uri = root.as_uri()

    def _path(self, key: str) -> Path:
        path = (self.root / check_key(key, self.root_uri)).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ConfigError(
                f"key={key!r} leaves the store {self.root_uri} through a link",
                advice="Put the files themselves into the store.",
            )
        return path

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int | None:
        path = self._path(key)
        return path.stat().st_size if path.is_file() else None

    def read_bytes(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def write_bytes(self, key: str, data: bytes) -> None:
        aside = self._write_aside(key, data)
        os.replace(aside, self._path(key))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        aside = self._write_aside(key, data)
        try:
            os.link(aside, self._path(key))
        except FileExistsError:
            return False
        finally:
            aside.unlink()
        return True

    def _write_aside(self, key: str, data: bytes) -> Path:
        aside = self._aside(key)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return aside

    def _aside(self, key: str) -> Path:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def upload(self, path: Path, key: str) -> None:
        aside = self._aside(key)
        shutil.copyfile(path, aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, self._path(key))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path(key), path)

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix.rstrip("/"))
        if not folder.is_dir():
            return
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield path.relative_to(self.root.resolve()).as_posix()

    def listing(self) -> Iterator[Listed]:
        root = self.root.resolve()
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if name.startswith("."):
                    continue
                try:
                    found = path.stat()
                except FileNotFoundError:
                    continue  # removed while we were looking
                modified = datetime.fromtimestamp(found.st_mtime, UTC)
                yield Listed(path.relative_to(root).as_posix(), found.st_size, str(found.st_mtime_ns), modified)

    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def clock(self) -> datetime:
        # not this machine's clock: the folder may be another's, which stamps its files by its own
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as file:
            return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)

    def unfinished(self) -> Iterator[Unfinished]:
        for path in self.root.resolve().rglob(".*.*"):
            name = _ASIDE.fullmatch(path.name)
            if name is None:
                continue
            try:
                started = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            except FileNotFoundError:
                continue  # finished while we were looking
            key = path.with_name(name["name"]).relative_to(self.root.resolve()).as_posix()
            yield Unfinished(key, started, path.name)

    def discard(self, upload: Unfinished) -> None:
        self._path(upload.key).with_name(upload.id).unlink(missing_ok=True)
