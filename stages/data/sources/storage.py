"""Outside data in a file, a folder or an s3:// prefix: a sorted list of its objects, and what is not read of it.

Names are relative to what the user gave, so nothing that is published depends on the machine. A folder is read within
itself: links that lead out of it, devices, pipes and hidden files are named, never opened.
"""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stages.artifacts.s3_client import in_words, is_transient, s3_client
from stages.config.errors import ConfigError
from stages.config.places import Places, bucket_and_key, check_source, is_within, local_path, open_place, places
from stages.data.sources.streams import Damaged, Stored, open_raw, plain_name

TEXT_SUFFIXES = (".txt", ".md", ".rst")
JSON_LINES = (".jsonl", ".ndjson")
DELIMITED = (".csv", ".tsv")
ARROW = (".arrow", ".feather")
ROW_SUFFIXES = (*JSON_LINES, ".json", ".parquet", *DELIMITED, *ARROW)
_NAMES_SHOWN = 20


@dataclass(frozen=True)
class Unread:
    """An object of a source that is not read, and the reason; a folder's name ends in `/`."""

    reason: str
    name: str


@dataclass(frozen=True)
class Listing:
    """The objects of a source, sorted by name."""

    files: tuple[Stored, ...]
    unread: tuple[Unread, ...] = ()


def unread_by_reason(unread: Iterable[Unread]) -> dict[str, dict[str, Any]]:
    """How many were not read for each reason, and the names of the first ones."""
    found: dict[str, list[str]] = {}
    for entry in unread:
        found.setdefault(entry.reason, []).append(entry.name)
    return {
        reason: {"files": len(names), "names": sorted(names)[:_NAMES_SHOWN]} for reason, names in sorted(found.items())
    }


def list_objects(uri: str, *, field: str = "source") -> Listing:
    """The objects of a source; raises ConfigError when there is nothing at `uri` or the place is closed to sources."""
    check_source(uri, field=field)
    found = list(_list_s3(uri, field) if uri.startswith("s3://") else _list_local(uri, field))
    return Listing(
        tuple(sorted((entry for entry in found if isinstance(entry, Stored)), key=lambda entry: entry.name)),
        tuple(entry for entry in found if isinstance(entry, Unread)),
    )


def _list_local(uri: str, field: str) -> Iterator[Stored | Unread]:
    path = local_path(uri, field=field)
    root = open_place(path, uri, field=field)
    try:
        found = os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{field} {uri!r} does not exist where curate runs",
            advice="Give an existing file or folder, an s3:// prefix, hf://name, or 'installed-docs'.",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{field} {uri!r} cannot be read where curate runs: {error.strerror}",
            advice="Let the workers' account read it, or give another source.",
        ) from None
    if stat.S_ISDIR(found.st_mode):
        yield from _walk(root, places())
    else:
        yield _classified(root, path.name or os.path.basename(root), os.path.dirname(root), places())


def _walk(root: str, known: Places) -> Iterator[Stored | Unread]:
    closed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=closed.append):
        for name in list(folders):
            path = os.path.join(folder, name)
            if reason := _folder_reason(path, known):
                folders.remove(name)
                yield Unread(reason, f"{_relative(path, root)}/")
        for name in names:
            path = os.path.join(folder, name)
            yield _classified(path, _relative(path, root), root, known)
    for error in closed:
        yield Unread("unreadable_folder", f"{_relative(str(error.filename), root)}/")


def _folder_reason(path: str, known: Places) -> str:
    """Why a folder is not read, empty when it is. Links to folders inside of the source would give its files twice."""
    if os.path.basename(path).startswith("."):
        return "hidden"
    if os.path.islink(path):
        return "linked_folder"
    return "" if known.admit(path) else "closed_folder"


def _relative(path: str, root: str) -> str:
    """As UTF-8, which names of files need not be: every ledger and every row holds the name."""
    return os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")


def _classified(path: str, name: str, root: str, known: Places) -> Stored | Unread:
    """A file with its real place, or why it is not read."""
    if _is_hidden(name):
        return Unread("hidden", name)
    place = path
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            place = os.path.realpath(path)
            if not is_within(place, root) or not known.admit(place):
                return Unread("link_out_of_source", name)
            if _is_hidden(_relative(place, root)):
                return Unread("hidden", name)
            found = os.lstat(place)
    except OSError:
        return Unread("broken_link" if os.path.islink(path) else "unreadable_file", name)
    return Stored(place, name, found.st_size) if stat.S_ISREG(found.st_mode) else Unread("not_a_file", name)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _list_s3(uri: str, field: str) -> Iterator[Stored | Unread]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = bucket_and_key(uri, field=field)
    found: list[Stored | Unread] = []
    try:
        for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(key)
                if name and not name.startswith("/") and key and not key.endswith("/"):
                    continue  # a prefix also matches its neighbours: s3://b/part-2 when s3://b/part is asked for
                if not entry["Key"].endswith("/"):
                    relative = name.strip("/") or entry["Key"].rsplit("/", 1)[-1]
                    stored = Stored(f"s3://{bucket}/{entry['Key']}", relative, entry["Size"], entry["ETag"].strip('"'))
                    found.append(Unread("hidden", relative) if _is_hidden(relative) else stored)
    except (BotoCoreError, ClientError) as error:
        if is_transient(error):
            raise in_words(error, uri) from error
        raise ConfigError(
            f"{field} {uri!r} cannot be listed: {error}", advice="Check bucket, credentials and AWS_ENDPOINT_URL."
        ) from error
    if not found:
        raise ConfigError(
            f"{field} {uri!r} holds no object", advice="Check the prefix; it must hold at least one file."
        )
    return iter(found)


def is_raters_table(source: str, entry: Stored) -> bool:
    """Whether this is the table of answers in an artifact of raters' preferences, whose pairs lie next to it."""
    return "/artifacts/" in source and entry.name == "answers.csv"


def identity(entry: Stored, source: str = "") -> str:
    """What makes two objects the same: name, size and content (S3's etag stands for content)."""
    name = plain_name(entry.name)
    # Some objects were read differently before; data made from them then must not be found again.
    otherwise = entry.name.endswith(".zst") or (entry.name != name and name.endswith(".parquet"))
    otherwise |= name.endswith((*DELIMITED, *ARROW)) and not is_raters_table(source, entry)
    line_end = b"\r" if entry.name.endswith(TEXT_SUFFIXES) else b"\\r"
    digest = hashlib.sha256()
    content, first = entry.etag, b""
    if not content:
        try:
            for block in read_blocks(entry):
                first = first or block.lstrip()[:1]
                otherwise |= line_end in block and entry.name.endswith((*TEXT_SUFFIXES, *JSON_LINES, ".json"))
                digest.update(block)
            content = digest.hexdigest()
        except Damaged as error:
            content = error.reason
    otherwise |= first == b"{" and entry.name.endswith(".json")
    return f"{entry.name}\t{entry.size}\t{content}" + ("\tread=2" if otherwise else "")


def read_blocks(entry: Stored) -> Iterator[bytes]:
    with open_raw(entry) as raw:
        while block := raw.read(1 << 20):
            yield block
