"""Rows of CSV and TSV: every value is text. A record that breaks the rules of quoting is counted, the next one is read.

An opening quote that nobody closes swallows what follows it; the lines that went with it count as lost.
"""

import codecs
import csv
from collections.abc import Iterator

from stages.data.sources.records import BadRecord, Row
from stages.data.sources.streams import (
    MAX_RECORD_BYTES,
    SAMPLE_BYTES,
    Damaged,
    Stored,
    TooLong,
    lost,
    plain_name,
    read_lines,
)

_SEPARATORS = (",", ";", "\t", "|")
"""Tried on the header of a .csv file; the one that makes the most columns counts. Spreadsheets in many languages write
semicolons."""


class _TooLarge(Exception):
    """A record of more than MAX_RECORD_BYTES."""


class _Lines:
    """Lines as text, with the place and the size of the record that they are part of."""

    def __init__(self, stored: Stored) -> None:
        self._lines = read_lines(stored)
        self.number, self.start, self.size = 0, 1, 0

    def begin(self) -> None:
        """The next line begins a record."""
        self.start, self.size = self.number + 1, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.size += line.size if isinstance(line, TooLong) else len(line)
        if isinstance(line, TooLong) or self.size > MAX_RECORD_BYTES:
            raise _TooLarge(f"more than {MAX_RECORD_BYTES} bytes in one record")
        if self.number == 1:
            if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise Damaged("invalid_utf8", "the file is UTF-16; save it as UTF-8")
            line = line.removeprefix(codecs.BOM_UTF8)
        # Bytes that are no UTF-8 stay apart, so that only their own record is lost.
        return line.decode("utf-8", "surrogateescape")


def read_delimited(stored: Stored) -> Iterator[Row | BadRecord]:
    """Rows of one file. The first line names the columns; a row's number is that of its first line."""
    lines = _Lines(stored)
    rows = 0
    try:
        for row in _records(lines, stored):
            yield row
            rows = lines.number
    except Damaged as error:
        yield lost(stored, error, number=rows)


def _records(lines: _Lines, stored: Stored) -> Iterator[Row | BadRecord]:
    csv.field_size_limit(MAX_RECORD_BYTES)  # for the whole process: the default refuses texts of 128 kB
    separators = ("\t",) if plain_name(stored.name).endswith(".tsv") else _SEPARATORS
    names, separator = _header(lines, separators)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    while names:
        lines.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _TooLarge as error:
            yield _bad(stored, lines, "record_too_large", str(error))
        except csv.Error as error:
            yield _bad(stored, lines, "invalid_csv", f"lines {lines.start} to {lines.number}: {error}")
        else:
            if cells:  # else a blank line
                yield _row(stored, lines, names, cells)


def _header(lines: _Lines, separators: tuple[str, ...]) -> tuple[list[str], str]:
    """Names of the columns and what separates them; no names when the file is empty.

    Raises Damaged for a header that does not give every column a name of its own.
    """
    try:
        line = next((line for line in lines if line.strip()), "")
        line.encode()
    except _TooLarge as error:
        raise Damaged("invalid_header", str(error)) from None
    except UnicodeEncodeError:
        raise Damaged("invalid_utf8", "the header is not UTF-8; save the file as UTF-8") from None
    found: list[tuple[list[str], str]] = []
    for separator in separators if line else ():
        try:
            found.append((next(csv.reader([line], delimiter=separator, strict=True)), separator))
        except csv.Error:
            continue  # its quotes do not fit this separator
    if line and not found:
        raise Damaged("invalid_header", f"the first line cannot be split into columns: {line[:SAMPLE_BYTES]}")
    # The first of the longest: a comma in doubt.
    names, separator = max(found, key=lambda split: len(split[0]), default=([], ","))
    # Tables that were written with their index have a first column without a name.
    names = [name.strip() or f"column {place}" for place, name in enumerate(names, 1)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise Damaged("invalid_header", f"more than one column is named {', '.join(map(repr, repeated))}")
    return names, separator


def _row(stored: Stored, lines: _Lines, names: list[str], cells: list[str]) -> Row | BadRecord:
    if len(cells) != len(names):
        return _bad(stored, lines, "wrong_columns", f"{len(cells)} columns instead of {len(names)}: {cells[0]}")
    try:
        for cell in cells:
            cell.encode()
    except UnicodeEncodeError:
        return _bad(stored, lines, "invalid_utf8", "not UTF-8; save the file as UTF-8")
    return Row(lines.start, dict(zip(names, cells, strict=True)), lines.size)


def _bad(stored: Stored, lines: _Lines, reason: str, why: str) -> BadRecord:
    # What a quote has swallowed counts by its bytes, too: it may be the rest of the file.
    swallowed = lines.size if lines.number > lines.start else 0
    why = why.encode("utf-8", "replace").decode()[:SAMPLE_BYTES]
    return BadRecord(f"{stored.name}:{lines.start}", reason, lines.size, why, lost=swallowed)
