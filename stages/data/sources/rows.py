"""Rows from JSONL, JSON and Parquet, compressed or not, and from Hugging Face datasets.

A row that cannot be read becomes a BadRecord with its reason; reading continues after it wherever the format allows.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stages.config.errors import ConfigError
from stages.data.sources.records import BadRecord
from stages.data.sources.storage import open_decompressed, open_seekable

JSON_LINES = (".jsonl", ".ndjson")
ROW_SUFFIXES = (*JSON_LINES, ".json", ".parquet")
_SAMPLE_BYTES = 200


@dataclass(frozen=True, slots=True)
class Row:
    """A row with its position, and its length in bytes as read."""

    number: int
    values: dict[str, Any]
    size: int


def plain_name(name: str) -> str:
    """A file name without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".zst")


def read_rows(uri: str, name: str) -> Iterator[Row | BadRecord]:
    """Rows of one file, by its suffix."""
    if plain_name(name).endswith(".parquet"):
        yield from _read_parquet(uri, name)
    elif plain_name(name).endswith(".json"):
        yield from _read_json(uri, name)
    else:
        for number, line in read_line_bytes(uri, name):
            if isinstance(line, BadRecord):
                yield line
            elif line.strip():
                yield parse_row(line, number, f"{name}:{number}")


def read_line_bytes(uri: str, name: str) -> Iterator[tuple[int, bytes | BadRecord]]:
    """Lines with their numbers from 1; a damaged stream ends in one BadRecord instead of its unfinished line."""
    number = 0
    with open_decompressed(uri) as stream:
        while True:
            try:
                line = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error, *_zstd_errors()) as error:
                yield number + 1, BadRecord(f"{name}:{number + 1}", _stream_reason(error), 0, str(error))
                return
            if not line:
                return
            number += 1
            yield number, line


def _zstd_errors() -> tuple[type[Exception], ...]:
    import zstandard

    return (zstandard.ZstdError,)


def _stream_reason(error: Exception) -> str:
    return "truncated_gzip" if isinstance(error, EOFError) else "damaged_compression"


def parse_row(line: bytes, number: int, identity: str) -> Row | BadRecord:
    """One JSON object, or a BadRecord that says why it is not one."""
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return BadRecord(identity, "invalid_utf8", len(line), repr(line[:_SAMPLE_BYTES]))
    except (json.JSONDecodeError, RecursionError):
        return BadRecord(identity, "invalid_json", len(line), line[:_SAMPLE_BYTES].decode("utf-8", "replace"))
    if not isinstance(values, dict):
        return BadRecord(identity, "not_an_object", len(line), line[:_SAMPLE_BYTES].decode("utf-8", "replace"))
    return Row(number, values, len(line))


def _read_json(uri: str, name: str) -> Iterator[Row | BadRecord]:
    """A .json file: one array of objects."""
    try:
        with open_decompressed(uri) as stream:
            data = stream.read()
        rows = json.loads(data)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield BadRecord(name, _stream_reason(error), 0, str(error))
        return
    except UnicodeDecodeError as error:
        yield BadRecord(name, "invalid_utf8", 0, str(error))
        return
    except json.JSONDecodeError as error:
        yield BadRecord(name, "invalid_json", 0, str(error))
        return
    for number, values in enumerate(rows if isinstance(rows, list) else [rows], 1):
        size = len(json.dumps(values))
        if isinstance(values, dict):
            yield Row(number, values, size)
        else:
            yield BadRecord(f"{name}:{number}", "not_an_object", size, str(values)[:_SAMPLE_BYTES])


def _read_parquet(uri: str, name: str) -> Iterator[Row | BadRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with open_seekable(uri) as stream:
            for batch in pq.ParquetFile(stream).iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values, len(str(values)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield BadRecord(f"{name}:{number + 1}", "unreadable_parquet", 0, str(error)[:_SAMPLE_BYTES])


@dataclass(frozen=True)
class HubDataset:
    """What an hf:// address says."""

    name: str
    config: str | None
    split: str
    text: str | None
    revision: str | None


def parse_hub(uri: str) -> HubDataset:
    """Read `hf://name?split=train&config=..&text=..&revision=..`; raises ConfigError for anything else."""
    parts = urlsplit(uri)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    unknown = sorted(set(query) - {"split", "config", "text", "revision"})
    name = f"{parts.netloc}{parts.path}"
    if not name or unknown:
        raise ConfigError(
            f"source {uri!r} is not understood" + (f": unknown {unknown}" if unknown else ": it names no dataset"),
            advice="Write hf://name?split=train&config=..&text=..&revision=..; only these four are known.",
        )
    return HubDataset(name, query.get("config"), query.get("split", "train"), query.get("text"), query.get("revision"))


def read_hub(uri: str) -> Iterator[Row | BadRecord]:
    """Rows of a Hugging Face dataset, streamed."""
    wanted = parse_hub(uri)
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(wanted.name, wanted.config, split=wanted.split, revision=wanted.revision, streaming=True)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"source {uri!r} cannot be loaded: {error}",
            advice="Check name, config and split, and that the machine of the Ray job reaches the hub.",
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(number, dict(values), len(str(values)))
