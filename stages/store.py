"""Object storage behind one small interface: `file://` for one machine, `s3://` for any S3-compatible server.

Surprising on purpose: a file in a `file://` store appears under its name only when it is complete (write aside, fsync,
rename), and `put_if_absent` has exactly one winner. boto3 is imported on the first use of an `s3://` store.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from stages.config.errors import ConfigError


@dataclass(frozen=True)
class Listed:
    """What a listing says of an object; `version` changes with its content (etag, or time of change in ns)."""

    key: str
    size: int
    version: str


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
        """Write unless the key exists; True for the one writer that made it."""
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


def open_store(root_uri: str) -> Store:
    """Open a store by its root; raises ConfigError for a scheme that is neither `file` nor `s3`."""
    parts = urlsplit(root_uri)
    match parts.scheme:
        case "file":
            return FileStore(Path(unquote(parts.path)))
        case "s3" if parts.netloc:
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
                yield Listed(path.relative_to(root).as_posix(), found.st_size, str(found.st_mtime_ns))

    def delete(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def local_path(self, key: str) -> Path | None:
        return self._path(key)


class S3Store:
    """A prefix of a bucket; endpoint and credentials come from the standard AWS variables."""

    def __init__(self, bucket: str, prefix: str) -> None:
        import boto3
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import ClientError

        self.bucket, self.prefix = bucket, prefix
        self.root_uri = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._client_error = ClientError
        # Path-style addresses and checksums only where required: what every S3-compatible server understands.
        self._s3 = boto3.client(
            "s3",
            config=BotoConfig(
                retries={"max_attempts": 8, "mode": "adaptive"},
                s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
                request_checksum_calculation=os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),
                response_checksum_validation=os.environ.get("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required"),
            ),
        )

    def _key(self, key: str) -> str:
        checked = check_key(key, self.root_uri)
        return f"{self.prefix}/{checked}" if self.prefix else checked

    def exists(self, key: str) -> bool:
        return self.size(key) is not None

    def size(self, key: str) -> int | None:
        try:
            return self._s3.head_object(Bucket=self.bucket, Key=self._key(key))["ContentLength"]
        except self._client_error as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                return None
            raise

    def read_bytes(self, key: str) -> bytes:
        try:
            return self._s3.get_object(Bucket=self.bucket, Key=self._key(key))["Body"].read()
        except self._client_error as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                raise FileNotFoundError(f"{self.root_uri}/{key}") from error
            raise

    def write_bytes(self, key: str, data: bytes) -> None:
        self._s3.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        try:
            self._s3.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, IfNoneMatch="*")
        except self._client_error as error:
            if error.response["Error"]["Code"] in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def upload(self, path: Path, key: str) -> None:
        self._s3.upload_file(str(path), self.bucket, self._key(key))

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as aside:
            try:
                self._s3.download_fileobj(self.bucket, self._key(key), aside)
            except self._client_error as error:
                os.unlink(aside.name)
                if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
                    raise FileNotFoundError(f"{self.root_uri}/{key}") from error
                raise
        os.replace(aside.name, path)

    def list(self, prefix: str) -> Iterator[str]:
        folder = self._key(prefix.rstrip("/")) + "/"
        cut = len(self.prefix) + 1 if self.prefix else 0
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
            for entry in page.get("Contents", ()):
                yield entry["Key"][cut:]

    def listing(self) -> Iterator[Listed]:
        folder = f"{self.prefix}/" if self.prefix else ""
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=folder):
            for entry in page.get("Contents", ()):
                if not entry["Key"].endswith("/"):
                    yield Listed(entry["Key"][len(folder) :], entry["Size"], entry["ETag"])

    def delete(self, key: str) -> None:
        check_key(key, self.root_uri)
        for name in (key, *self.list(key)):
            self._s3.delete_object(Bucket=self.bucket, Key=self._key(name))

    def local_path(self, key: str) -> Path | None:
        return None
