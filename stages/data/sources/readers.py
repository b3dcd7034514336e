"""One interface to every kind of document source: `plan` cuts sources into units, `read` yields the records of one.

The units depend on the sources alone, never on the number of processes, so the result does not either.
"""

import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass

from stages.artifacts.manifests import MANIFEST
from stages.config.curate import INSTALLED_DOCS, CurateConfig
from stages.config.errors import ConfigError
from stages.data.sources import installed_docs
from stages.data.sources.records import BadRecord, Record, SourceDocument, is_drawn
from stages.data.sources.rows import ROW_SUFFIXES, Row, parse_hub, plain_name, read_hub, read_line_bytes, read_rows
from stages.data.sources.storage import Stored, identity, list_objects

TEXT_SUFFIXES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Unit:
    """A share of one source that one process reads at once."""

    source: str
    number: int
    """Position of the source in the config; keeps ids apart when two sources hold the same file name."""
    package: installed_docs.PackageFiles | None = None
    stored: Stored | None = None


def plan(config: CurateConfig) -> list[Unit]:
    """All units of all document sources, in a fixed order; raises ConfigError for a source that is not there."""
    units: list[Unit] = []
    for number, source in enumerate(config.documents):
        if source == INSTALLED_DOCS:
            units += [Unit(source, number, package=part) for part in installed_docs.plan(config)]
        elif source.startswith("hf://"):
            parse_hub(source)
            units.append(Unit(source, number))
        else:
            units += [
                Unit(source, number, stored=entry) for entry in data_files(source, (*TEXT_SUFFIXES, *ROW_SUFFIXES))
            ]
    return units


def data_files(source: str, suffixes: tuple[str, ...]) -> list[Stored]:
    """The files of a source that have one of these suffixes (before .gz or .zst), without an artifact's manifest."""
    files = [entry for entry in list_objects(source) if plain_name(entry.name).endswith(suffixes)]
    if "/artifacts/" in source:
        files = [entry for entry in files if entry.name != MANIFEST]
    if not files:
        raise ConfigError(
            f"source {source!r} holds no file that can be read",
            advice=f"Allowed are {' '.join(suffixes)}, also with .gz or .zst.",
        )
    return files


def read(unit: Unit, config: CurateConfig) -> Iterator[Record]:
    """The records of one unit, in a fixed order."""
    if unit.package is not None:
        yield from installed_docs.read(unit.package, config)
    elif unit.stored is not None and plain_name(unit.stored.name).endswith(TEXT_SUFFIXES):
        yield from _read_text(unit, unit.stored, config)
    elif unit.stored is not None:
        rows = read_rows(unit.stored.uri, unit.stored.name)
        yield from _documents(unit, unit.stored.name, rows, config.text_field, config)
    else:
        field = parse_hub(unit.source).text or config.text_field
        yield from _documents(unit, "", read_hub(unit.source), field, config)


def _read_text(unit: Unit, stored: Stored, config: CurateConfig) -> Iterator[Record]:
    """A whole text file is one document; one that is damaged or not UTF-8 is dropped, because half a text misleads."""
    key = f"{unit.number}/{stored.name}"
    parts: list[bytes] = []
    for _, line in read_line_bytes(stored.uri, stored.name):
        if isinstance(line, BadRecord):
            yield BadRecord(key, line.reason, sum(map(len, parts)), line.sample)
            return
        parts.append(line)
    data = b"".join(parts)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield BadRecord(key, "invalid_utf8", len(data), str(error))
        return
    yield _document(unit, key, stored.name, text, size=len(data), config=config)


def _documents(
    unit: Unit, name: str, rows: Iterator[Row | BadRecord], field: str, config: CurateConfig
) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, BadRecord):
            yield BadRecord(f"{unit.number}/{row.id}", row.reason, row.size, row.sample)
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
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", key)
    return SourceDocument(key, text, unit.source, unit.source, path, heldout=heldout)


def snapshot_source(uri: str, config: CurateConfig) -> str:
    """The identity of an outside source, as a hex digest, computed where the data is.

    Installed docs are identified by their distributions' versions, files by name, size and sha256,
    S3 objects by key, size and etag, hub datasets by name and revision.
    """
    if uri == INSTALLED_DOCS:
        lines = [package.group for package in installed_docs.chosen_packages(config)]
        lines.append(f"python=={platform.python_version()}")
    elif uri.startswith("hf://"):
        lines = [str(parse_hub(uri))]
    else:
        lines = [identity(entry) for entry in list_objects(uri)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
