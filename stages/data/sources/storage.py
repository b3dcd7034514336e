"""Outside data in a file, a folder or an s3:// prefix, as a sorted list of objects that open as byte streams.

Names are relative to what the user gave, so nothing that is published depends on the machine.
"""

import gzip
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast
from urllib.parse import unquote, urlsplit

from stages.artifacts.s3_client import s3_client
from stages.config.errors import ConfigError


@dataclass(frozen=True)
class Stored:
    """One object: where it is, its name relative to the source, its size, and S3's etag."""

    uri: str
    name: str
    size: int
    etag: str = ""


def list_objects(uri: str) -> list[Stored]:
    """The objects of a source, sorted by name; raises ConfigError when there is nothing at `uri`."""
    found = _list_s3(uri) if uri.startswith("s3://") else _list_folder(uri)
    return sorted(found, key=lambda entry: entry.name)


def _list_folder(uri: str) -> list[Stored]:
    root = local_path(uri)
    if not root.exists():
        raise ConfigError(
            f"source {uri!r} does not exist where curate runs",
            advice="Give an existing file or folder, an s3:// prefix, hf://name, or 'installed-docs'.",
        )
    if root.is_file():
        return [Stored(str(root), root.name, root.stat().st_size)]
    paths = (path for path in root.rglob("*") if path.is_file())
    found = [Stored(str(path), path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    return [entry for entry in found if not any(part.startswith(".") for part in entry.name.split("/"))]


def local_path(uri: str) -> Path:
    """A plain path or a file:// URI as a path."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file://") else Path(uri).expanduser()


def _list_s3(uri: str) -> list[Stored]:
    from botocore.exceptions import ClientError

    bucket, key = _bucket_and_key(uri)
    found: list[Stored] = []
    try:
        for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(key)
                if name and not name.startswith("/") and key and not key.endswith("/"):
                    continue  # a prefix also matches its neighbours: s3://b/part-2 when s3://b/part is asked for
                if not entry["Key"].endswith("/"):
                    relative = name.strip("/") or entry["Key"].rsplit("/", 1)[-1]
                    etag = entry["ETag"].strip('"')
                    found.append(Stored(f"s3://{bucket}/{entry['Key']}", relative, entry["Size"], etag))
    except ClientError as error:
        raise ConfigError(
            f"source {uri!r} cannot be listed: {error}", advice="Check bucket, credentials and AWS_ENDPOINT_URL."
        ) from error
    if not found:
        raise ConfigError(f"source {uri!r} holds no object", advice="Check the prefix; it must hold at least one file.")
    return found


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")  # not urlsplit: '?' and '#' may be in a key
    return bucket, key.lstrip("/")


def open_raw(uri: str) -> IO[bytes]:
    """The object's bytes as stored."""
    if uri.startswith("s3://"):
        bucket, key = _bucket_and_key(uri)
        return cast(IO[bytes], s3_client().get_object(Bucket=bucket, Key=key)["Body"])
    return local_path(uri).open("rb")


def open_seekable(uri: str) -> IO[bytes]:
    """The object's bytes with random access; S3 objects are read into memory."""
    with open_raw(uri) as raw:
        return io.BytesIO(raw.read()) if uri.startswith("s3://") else open_raw(uri)


def open_decompressed(uri: str) -> IO[bytes]:
    """The object's bytes, without .gz or .zst."""
    raw = open_raw(uri)
    if uri.endswith(".gz"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if uri.endswith(".zst"):
        import zstandard

        return cast(IO[bytes], io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)))
    return raw


def read_blocks(uri: str) -> Iterator[bytes]:
    with open_raw(uri) as raw:
        while block := raw.read(1 << 20):
            yield block


def identity(entry: Stored) -> str:
    """What makes two objects the same: name, size and content (S3's etag stands for content)."""
    if entry.etag:
        return f"{entry.name}\t{entry.size}\t{entry.etag}"
    digest = hashlib.sha256()
    for block in read_blocks(entry.uri):
        digest.update(block)
    return f"{entry.name}\t{entry.size}\t{digest.hexdigest()}"
