"""Rows from JSONL, JSON, Parquet, CSV, TSV and Arrow, compressed or not.

A row that cannot be read becomes a BadRecord with its reason; reading continues after it wherever the format allows.
"""

import io
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from stages.data.sources import streams
from stages.data.sources.arrow import read_arrow
from stages.data.sources.delimited import read_delimited
from stages.data.sources.records import BadRecord, Row
from stages.data.sources.storage import ARROW, DELIMITED
from stages.data.sources.streams import (
    SAMPLE_BYTES,
    Damaged,
    Stored,
    TooLong,
    lost,
    open_raw,
    plain_name,
    read_whole,
)

_MAX_DEPTH = 100
"""Deeper rows may be read here and then break what shows them: Python's own limit counts from where it stands."""
_MAX_DIGITS = 4300
"""Python refuses to read longer integers, because that takes time by the square of their length."""
_LINES_LOOKED_AT = 10


def read_rows(stored: Stored) -> Iterator[Row | BadRecord]:
    """Rows of one file, by its suffix."""
    kind = plain_name(stored.name)
    if kind.endswith(".parquet"):
        yield from _read_parquet(stored)
    elif kind.endswith(ARROW):
        yield from read_arrow(stored)
    elif kind.endswith(DELIMITED):
        yield from read_delimited(stored)
    elif kind.endswith(".json"):
        yield from _read_json(stored)
    else:
        yield from _read_json_lines(stored)


def _read_json_lines(stored: Stored) -> Iterator[Row | BadRecord]:
    number = 0
    try:
        for line in streams.read_lines(stored):
            number += 1
            if isinstance(line, TooLong):
                yield _too_long(f"{stored.name}:{number}", line)
            elif line.strip():
                yield parse_row(line, number, f"{stored.name}:{number}")
    except Damaged as error:
        yield lost(stored, error, number=number)


def _too_long(identity: str, line: TooLong) -> BadRecord:
    why = f"more than {streams.MAX_RECORD_BYTES} bytes in one line"
    return BadRecord(identity, "record_too_large", line.size, why)


def parse_row(line: bytes, number: int, identity: str) -> Row | BadRecord:
    """One JSON object, or a BadRecord that says why it is not one."""
    try:
        values = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError:
        return BadRecord(identity, "invalid_utf8", len(line), repr(line[:SAMPLE_BYTES]))
    except (ValueError, RecursionError):
        return BadRecord(identity, "invalid_json", len(line), _shown(line))
    if not isinstance(values, dict):
        return BadRecord(identity, "not_an_object", len(line), _shown(line))
    if line.count(b"[") + line.count(b"{") > _MAX_DEPTH and is_too_deep(values):
        return BadRecord(identity, "invalid_json", len(line), f"nested deeper than {_MAX_DEPTH}: {_shown(line)}")
    return Row(number, values, len(line))


def _shown(line: bytes) -> str:
    return line[:SAMPLE_BYTES].decode("utf-8", "replace")


def parse_json(text: str | bytes) -> Any:
    """As json.loads, but an integer that Python does not read becomes a floating-point number."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < _MAX_DIGITS else float(digits))


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested deeper than what shows them can bear."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for entry in level:
            below += entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ()
        level = [entry for entry in below if isinstance(entry, dict | list)]
        if not level:
            return False
    return True


def _read_json(stored: Stored) -> Iterator[Row | BadRecord]:
    """A .json file: one array of objects, one object, or JSON lines under the wrong name."""
    try:
        data = read_whole(stored, streams.MAX_FILE_BYTES)
    except Damaged as error:
        yield lost(stored, error, number=0)
        return
    try:
        rows = parse_json(data)
    except UnicodeDecodeError as error:
        yield lost(stored, Damaged("invalid_utf8", str(error)), number=0)
        return
    except (ValueError, RecursionError) as error:
        lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
        if _are_rows(lines[:_LINES_LOOKED_AT]):
            for number, line in lines:
                yield parse_row(line, number, f"{stored.name}:{number}")
        else:
            yield lost(stored, Damaged("invalid_json", str(error)), number=0)
        return
    yield from _rows_of(rows if isinstance(rows, list) else [rows], stored.name)


def _are_rows(lines: list[tuple[int, bytes]]) -> bool:
    """Whether most of some lines are objects of their own; those of a damaged array end in commas."""
    return sum(isinstance(parse_row(line, number, ""), Row) for number, line in lines) * 2 > len(lines)


def _rows_of(rows: Iterable[Any], name: str) -> Iterator[Row | BadRecord]:
    for number, values in enumerate(rows, 1):
        if is_too_deep(values):
            yield BadRecord(f"{name}:{number}", "invalid_json", 0, f"nested deeper than {_MAX_DEPTH}")
            continue
        size = len(json.dumps(values))
        if isinstance(values, dict):
            yield Row(number, values, size)
        else:
            yield BadRecord(f"{name}:{number}", "not_an_object", size, str(values)[:SAMPLE_BYTES])


def _read_parquet(stored: Stored) -> Iterator[Row | BadRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, total = 0, 0
    # What breaks while values are decoded has many types: dates beyond Python's years, text that is no UTF-8, ...
    broken = (pa.ArrowException, OSError, ValueError, TypeError, ArithmeticError, LookupError)
    try:
        with _open_seekable(stored) as stream:
            try:
                table = pq.ParquetFile(stream)
                total = table.metadata.num_rows
                _refuse_bomb(table, stored)
                for batch in table.iter_batches():
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(number, values, len(str(values)))
            except broken as error:
                raise Damaged("unreadable_parquet", str(error)) from None
    except Damaged as error:
        size = stored.size * max(0, total - number) // total if number and total else stored.size
        yield BadRecord(f"{stored.name}:{number + 1}", error.reason, size, str(error)[:SAMPLE_BYTES], lost=size)


def _open_seekable(stored: Stored) -> IO[bytes]:
    """The object's bytes, unpacked, with random access; S3 objects and compressed files are read into memory."""
    if stored.name != plain_name(stored.name):
        return io.BytesIO(read_whole(stored, streams.MAX_FILE_BYTES))
    raw = open_raw(stored)
    if not stored.uri.startswith("s3://"):
        return raw
    with raw:
        return io.BytesIO(raw.read())


def _refuse_bomb(table: Any, stored: Stored) -> None:
    """By what the file says of itself; a dictionary of few large values that is named many times is not noticed."""
    groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
    largest = max((group.total_byte_size for group in groups), default=0)
    if largest > max(streams.UNPACKED_AT_LEAST, streams.UNPACKED_RATIO * stored.size):
        raise Damaged("unpacks_too_large", f"a group of rows unpacks to {largest} bytes")
