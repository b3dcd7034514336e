"""Rows of Arrow files: with a footer (Feather 2) or as a stream, which is what `save_to_disk` of Hugging Face writes.

Arrow trusts what a message says of itself. So each message is looked at before Arrow unpacks it, both kinds are read as
a stream, and a batch is validated before its values are used.
"""

import io
import struct
from collections.abc import Iterator
from typing import IO, Any, cast

from stages.data.sources.records import BadRecord, Row
from stages.data.sources.streams import (
    MAX_RECORD_BYTES,
    UNPACKED_AT_LEAST,
    UNPACKED_RATIO,
    Blocks,
    Damaged,
    Stored,
    lost,
    open_unpacked,
)

_MAGIC, _OLD_FEATHER, _CONTINUATION = b"ARROW1", b"FEA1", b"\xff\xff\xff\xff"
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3
_BLOCK_BYTES = 1 << 20
_ROWS_AT_ONCE = 256
_VALUE_BYTES = 8
"""What a value takes in memory at least; the nulls of a file take nothing there."""


def read_arrow(stored: Stored) -> Iterator[Row | BadRecord]:
    """Rows of one file; a damaged one gives those before the damage."""
    import pyarrow as pa

    number = 0
    # What breaks while values are decoded has many types: dates beyond Python's years, text that is no UTF-8, ...
    broken = (pa.ArrowException, OSError, ValueError, TypeError, ArithmeticError, LookupError)
    try:
        with open_unpacked(stored) as raw:
            checked = _Checked(raw, stored)
            try:
                stream = io.BufferedReader(Blocks(checked.messages()), _BLOCK_BYTES)
                reader = pa.ipc.open_stream(cast(Any, stream))
                step = 1 if _shares_values(reader.schema) else _ROWS_AT_ONCE
                for batch in reader:
                    batch.validate(full=True)
                    for start in range(0, batch.num_rows, step):
                        for values in batch.slice(start, step).to_pylist():
                            number += 1
                            yield Row(number, values, len(str(values)))
                checked.require_end()
            except broken as error:
                raise Damaged("unreadable_arrow", str(error), position=checked.position) from None
    except Damaged as error:
        yield lost(stored, error, number=number)


def _shares_values(schema: Any) -> bool:
    """Whether rows may name one value many times, so that a few bytes become much text.

    Raises Damaged for lists whose elements may be shared: no writer of data sets makes them.
    """
    import pyarrow as pa

    shares, waiting = False, [entry.type for entry in schema]
    while waiting:
        kind = waiting.pop()
        if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
            raise Damaged("unreadable_arrow", f"columns of type {kind} are not read")
        views = pa.types.is_string_view(kind) or pa.types.is_binary_view(kind)
        shares |= views or pa.types.is_dictionary(kind) or pa.types.is_union(kind)
        if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
            waiting.append(kind.value_type)
        elif isinstance(kind, pa.BaseExtensionType):
            waiting.append(kind.storage_type)
        else:
            waiting += [kind.field(place).type for place in range(kind.num_fields)]
    return shares


class _Checked:
    """The messages of a file, each handed on after its claims were compared with what the file may unpack to."""

    def __init__(self, raw: IO[bytes], stored: Stored) -> None:
        self._raw, self._next = raw, b""
        self._allowed = max(UNPACKED_AT_LEAST, UNPACKED_RATIO * stored.size)
        self._has_footer, self._ended = False, False
        self._claimed = 0
        self.position = 0

    def messages(self) -> Iterator[bytes]:
        """The bytes of a stream, message by message, up to its mark of the end or the end of the file."""
        head = self._read(len(_MAGIC))
        if head.startswith(_OLD_FEATHER):
            raise Damaged("unreadable_arrow", "Feather of version 1; write the table again as version 2")
        self._has_footer = head == _MAGIC
        if self._has_footer:
            self._read(2)
        else:
            self._put_back(head)
        while mark := self._read(4):
            size_bytes = self._exactly(4) if mark == _CONTINUATION else mark  # streams before Arrow 0.15 have no mark
            if len(size_bytes) < 4:
                raise self._cut()
            (size,) = struct.unpack("<i", size_bytes)
            if size == 0:
                self._ended = True
                yield _CONTINUATION + bytes(4)
                return
            if not 0 < size <= MAX_RECORD_BYTES:
                raise Damaged("unreadable_arrow", f"a message has a header of {size} bytes", position=self.position)
            header = self._exactly(size)
            body = self._body(header)
            yield _CONTINUATION + size_bytes + header
            if body:
                yield body

    def require_end(self) -> None:
        """Raise Damaged unless the file ends as its kind does: one that was cut between two messages looks whole."""
        tail = b""
        while part := self._read(_BLOCK_BYTES):
            tail = (tail + part)[-len(_MAGIC) :]
        if not self._ended or (self._has_footer and tail != _MAGIC):
            raise self._cut()

    def _body(self, header: bytes) -> bytes:
        try:
            message = _Table(header, struct.unpack_from("<I", header)[0])
            size, kind = message.number(3, "<q"), message.number(1, "<B")
            if not 0 <= size <= self._allowed:
                raise self._bomb(size)
            body = self._exactly(size)
            if kind in (_DICTIONARY, _BATCH):
                batch = message.table(2)
                self._compare(batch.table(1) if kind == _DICTIONARY else batch, body)
            elif kind != _SCHEMA:
                raise Damaged("unreadable_arrow", f"a message of kind {kind}", position=self.position)
        except struct.error as error:
            raise Damaged("unreadable_arrow", f"a header that is none: {error}", position=self.position) from None
        return body

    def _compare(self, batch: "_Table", body: bytes) -> None:
        """Raise Damaged when all batches so far unpack to more than the file may."""
        is_compressed = batch.has(3)
        for offset, length in batch.pairs(2):
            unpacked = length
            if is_compressed and length >= 8:
                (unpacked,) = struct.unpack_from("<q", body, offset)  # -1: this one is stored as it is
            self._claimed += max(length, unpacked)
        self._claimed += sum(_VALUE_BYTES * max(0, count) for count, _ in batch.pairs(1))
        if self._claimed > self._allowed:
            raise self._bomb(self._claimed)

    def _bomb(self, size: int) -> Damaged:
        return Damaged("unpacks_too_large", f"its rows unpack to {size} bytes", position=self.position)

    def _cut(self) -> Damaged:
        return Damaged("truncated_arrow", f"the file ends early, after {self.position} bytes", position=self.position)

    def _put_back(self, data: bytes) -> None:
        self._next = data

    def _exactly(self, size: int) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise self._cut()
        return data

    def _read(self, size: int) -> bytes:
        """Up to `size` bytes, block by block: a buffer of a size that is only claimed is never set aside."""
        parts, self._next = [self._next[:size]], self._next[size:]
        size -= len(parts[0])
        while size and (part := self._raw.read(min(size, _BLOCK_BYTES))):
            parts.append(part)
            size -= len(part)
            self.position += len(part)
        return b"".join(parts)


class _Table:
    """A table of a FlatBuffer, as far as it is needed to see sizes; struct.error for places outside of it.

    Fields are known by their number in Arrow's Message.fbs: Message (1 kind, 2 header, 3 body length), RecordBatch
    (1 nodes, 2 buffers, 3 compression), DictionaryBatch (1 data).
    """

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._unpacked("<i", at)
        self._size = self._unpacked("<H", self._fields)

    def has(self, field: int) -> bool:
        return bool(self._place(field))

    def number(self, field: int, form: str) -> int:
        place = self._place(field)
        return self._unpacked(form, place) if place else 0

    def table(self, field: int) -> "_Table":
        place = self._place(field)
        if not place:
            raise struct.error(f"field {field} is missing")
        return _Table(self._data, place + self._unpacked("<I", place))

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """The entries of a vector whose entries are two long integers."""
        place = self._place(field)
        if not place:
            return iter(())
        start = place + self._unpacked("<I", place)
        count = self._unpacked("<I", start)
        data = self._data[start + 4 : start + 4 + 16 * count]
        if len(data) < 16 * count:
            raise struct.error(f"field {field} is cut")
        return struct.iter_unpack("<qq", data)

    def _place(self, field: int) -> int:
        slot = 4 + 2 * field
        if slot + 2 > self._size:
            return 0
        offset = self._unpacked("<H", self._fields + slot)
        return self._at + offset if offset else 0

    def _unpacked(self, form: str, place: int) -> int:
        if place < 0:
            raise struct.error("a place before the beginning")
        return struct.unpack_from(form, self._data, place)[0]
