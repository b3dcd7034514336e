"""One interface to every kind of document source: `plan` cuts sources into units, `read` yields the records of one.

The units depend on the sources alone, never on the number of processes, so the result does not either.
"""

import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from stages.artifacts.manifests import MANIFEST
from stages.config.curate import INSTALLED_DOCS, CurateConfig
from stages.config.errors import ConfigError
from stages.config.places import check_source
from stages.data.sources import installed_docs, streams
from stages.data.sources.hub import parse_hub, read_hub
from stages.data.sources.records import BadRecord, Record, Row, SourceDocument, is_drawn
from stages.data.sources.rows import read_rows
from stages.data.sources.saved import without_descriptions
from stages.data.sources.storage import (
    ROW_SUFFIXES,
    TEXT_SUFFIXES,
    Listing,
    Unread,
    identity,
    is_raters_table,
    list_objects,
    unread_by_reason,
)
from stages.data.sources.streams import Damaged, Stored, lost, plain_name, read_whole

_NUL_SHARE = 100
"""A file with a NUL in so many bytes is no text."""


@dataclass(frozen=True)
class Unit:
    """A share of one source that one process reads at once."""

    source: str
    number: int
    """Position of the source in the config; keeps ids apart when two sources hold the same file name."""
    package: installed_docs.PackageFiles | None = None
    stored: Stored | None = None


@dataclass(frozen=True)
class Survey:
    """What there is to read, in a fixed order, and by source what is there and not read."""

    units: list[Unit]
    unread: dict[str, tuple[Unread, ...]]


def plan(config: CurateConfig) -> list[Unit]:
    """All units of all document sources, in a fixed order; raises ConfigError for a source that is not there."""
    return survey(config).units


def survey(config: CurateConfig) -> Survey:
    """As `plan`, with what is not read."""
    units: list[Unit] = []
    unread: dict[str, tuple[Unread, ...]] = {}
    for number, source in enumerate(config.documents):
        if source == INSTALLED_DOCS:
            units += [Unit(source, number, package=part) for part in installed_docs.plan(config)]
        elif source.startswith("hf://"):
            parse_hub(source)
            check_source(source, field="documents")
            units.append(Unit(source, number))
        else:
            found = data_files(source, (*TEXT_SUFFIXES, *ROW_SUFFIXES))
            units += [Unit(source, number, stored=entry) for entry in found.files]
            if found.unread:
                unread[source] = found.unread
    return Survey(units, unread)


def data_files(source: str, suffixes: tuple[str, ...]) -> Listing:
    """The files of a source that have one of these suffixes (before .gz or .zst), without those that describe it: an
    artifact's manifest, the raters' table next to their pairs, the descriptions of a saved dataset."""
    found = without_descriptions(source, list_objects(source))
    files, unread = [], list(found.unread)
    for entry in found.files:
        if "/artifacts/" in source and entry.name == MANIFEST:
            continue
        if is_raters_table(source, entry):
            unread.append(Unread("raters_table", entry.name))
        elif plain_name(entry.name).endswith(suffixes):
            files.append(entry)
        else:
            unread.append(Unread("unknown_suffix", entry.name))
    if not files:
        passed_over = f"; not read: {unread_by_reason(unread)}" if unread else ""
        raise ConfigError(
            f"source {source!r} holds no file that can be read{passed_over}",
            advice=f"Allowed are {' '.join(suffixes)}, also with .gz or .zst.",
        )
    return Listing(tuple(files), tuple(unread))


def read(unit: Unit, config: CurateConfig) -> Iterator[Record]:
    """The records of one unit, in a fixed order."""
    if unit.package is not None:
        yield from installed_docs.read(unit.package, config)
    elif unit.stored is not None and plain_name(unit.stored.name).endswith(TEXT_SUFFIXES):
        yield from _read_text(unit, unit.stored, config)
    elif unit.stored is not None:
        rows = read_rows(unit.stored)
        yield from _documents(unit, unit.stored.name, rows, config.text_field, config)
    else:
        field = parse_hub(unit.source).text or config.text_field
        yield from _documents(unit, "", read_hub(unit.source), field, config)


def _read_text(unit: Unit, stored: Stored, config: CurateConfig) -> Iterator[Record]:
    """A whole text file is one document; one that is damaged or not UTF-8 is dropped, because half a text misleads."""
    key = f"{unit.number}/{stored.name}"
    try:
        data = read_whole(stored, streams.MAX_RECORD_BYTES)
        text = data.decode("utf-8-sig")
        if data.count(0) * _NUL_SHARE > len(data):
            raise Damaged("not_text", "full of NUL bytes: UTF-16, or no text at all")
    except (Damaged, UnicodeDecodeError) as error:
        damage = error if isinstance(error, Damaged) else Damaged("invalid_utf8", str(error))
        yield dataclasses.replace(lost(stored, damage, number=0), id=key)
        return
    yield _document(unit, key, stored.name, text, size=len(data), config=config)


def _documents(
    unit: Unit, name: str, rows: Iterator[Row | BadRecord], field: str, config: CurateConfig
) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, BadRecord):
            yield dataclasses.replace(row, id=f"{unit.number}/{row.id}")
            continue
        key = f"{unit.number}/{name}:{row.number}"
        text = row.values.get(field)
        if isinstance(text, str):
            yield _document(unit, key, name, text, size=row.size, config=config)
        else:
            yield BadRecord(key, "missing_text", row.size, f"no text in field {field!r}; fields: {sorted(row.values)}")


def _document(unit: Unit, key: str, path: str, text: str, *, size: int, config: CurateConfig) -> Record:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return BadRecord(key, "invalid_utf8", size, "the text holds a lone surrogate")
    if not text.strip():
        return BadRecord(key, "empty_text", size)
    if "\r" in text:  # the filters count lines, and the same page must not depend on where it was written
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", key)
    return SourceDocument(key, text, unit.source, unit.source, path, heldout=heldout)


def snapshot_source(uri: str, config: CurateConfig) -> str:
    """The identity of an outside source, as a hex digest, computed where the data is.

    Installed docs are identified by their distributions' versions, files by name, size and sha256,
    S3 objects by key, size and etag, hub datasets by name and revision.
    """
    if uri != INSTALLED_DOCS:
        return snapshot_rows(uri, field=config.outside_sources.get(uri, "source"))
    lines = [package.group for package in installed_docs.chosen_packages(config)]
    lines.append(f"python=={platform.python_version()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def snapshot_rows(uri: str, *, field: str) -> str:
    """The identity of a source of files or of a hub dataset, whichever stage reads it; `field` names it in errors."""
    if uri.startswith("hf://"):
        check_source(uri, field=field)
        lines = [str(parse_hub(uri))]
    else:
        lines = [identity(entry, uri) for entry in list_objects(uri, field=field).files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
