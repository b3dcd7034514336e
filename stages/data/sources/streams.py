"""The bytes of one object: opened where they lie and nowhere else, unpacked within bounds, cut into lines.

A stream that is damaged, ends early or unpacks to too much raises Damaged, whose reason becomes a counted record.
"""

import errno
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from stages.artifacts.s3_client import ABSENT, error_code, in_words, s3_client
from stages.config.places import bucket_and_key
from stages.data.sources.records import BadRecord

MAX_RECORD_BYTES = 128 * 2**20
"""The largest row of JSON lines, and the largest text file: each is one record in memory."""
MAX_FILE_BYTES = 2**30
"""The largest file that is read as a whole: .json, and Parquet that is compressed once more."""
UNPACKED_AT_LEAST, UNPACKED_RATIO = 2**30, 200
"""What a compressed file may unpack to: so many times its size, or this much. Text seldom shrinks below a twentieth."""
SAMPLE_BYTES = 200
"""How much of a bad record is shown."""
_BLOCK_BYTES = 1 << 20
# One call unpacks all that it is fed: deflate makes at most 1032 bytes of one, zstd 128 kB of four.
_GZIP_FED, _ZSTD_FED = 1 << 16, 1 << 11
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_CHANGED = frozenset({errno.ELOOP, errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EISDIR})
"""What opening says to a file that we may not read, or that is no longer what it was when its folder was listed."""


@dataclass(frozen=True)
class Stored:
    """One object: where it is, its name relative to the source, its size, and S3's etag."""

    uri: str
    """An s3:// address, or the real path of a file, which no link is part of."""
    name: str
    size: int
    etag: str = ""


class Damaged(Exception):
    """Why an object cannot be read to its end, and from which byte on."""

    def __init__(self, reason: str, detail: str, *, position: int = 0) -> None:
        super().__init__(detail)
        self.reason, self.position = reason, position


def lost(stored: Stored, error: Damaged, *, number: int) -> BadRecord:
    """The record that stands for a damaged file, or for what follows its row `number`."""
    # How much was behind the point where a cut stream ends is unknown; what lies behind a damaged place is lost.
    size = max(0, stored.size - error.position) if number else stored.size
    identity = f"{stored.name}:{number + 1}" if number else stored.name
    return BadRecord(identity, error.reason, size, str(error)[:SAMPLE_BYTES], lost=size)


def plain_name(name: str) -> str:
    """A file name without the suffix of its compression."""
    return name.removesuffix(".gz").removesuffix(".zst")


def open_raw(stored: Stored) -> IO[bytes]:
    """The object's bytes as stored; raises Damaged for a file that may not be read or has become something else."""
    if stored.uri.startswith("s3://"):
        return cast(IO[bytes], io.BufferedReader(Blocks(_object_blocks(stored)), _BLOCK_BYTES))
    try:
        handle = _open_without_links(stored.uri)
    except OSError as error:
        if error.errno not in _CHANGED:
            raise
        raise Damaged("unreadable_file", f"{stored.name}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged("unreadable_file", f"{stored.name}: it is no longer a file")
    return open(handle, "rb", buffering=_BLOCK_BYTES)


def _object_blocks(stored: Stored) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = bucket_and_key(stored.uri)
    try:
        body = s3_client().get_object(Bucket=bucket, Key=key)["Body"]
        while block := body.read(_BLOCK_BYTES):
            yield block
    except (ClientError, BotoCoreError) as error:
        if error_code(error) in ABSENT:
            raise Damaged("unreadable_file", f"{stored.name}: it is no longer there") from None
        raise in_words(error, stored.uri) from error


def _open_without_links(place: str) -> int:
    """Open folder by folder, following no link: a name that is exchanged after the check leads nowhere."""
    *folders, name = place.strip("/").split("/")
    at = os.open("/", _FOLDER)
    try:
        for folder in folders:
            below = os.open(folder, _FOLDER, dir_fd=at)
            os.close(at)
            at = below
        return os.open(name, _FILE, dir_fd=at)
    finally:
        os.close(at)


class Blocks(io.RawIOBase):
    """Blocks of bytes as a file, so that a BufferedReader finds the lines in them."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        super().__init__()
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if not (block := next(self._blocks, b"")):
                return 0
            self._rest = memoryview(block)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def open_unpacked(stored: Stored) -> IO[bytes]:
    """The object's bytes without .gz or .zst."""
    raw = open_raw(stored)
    if stored.name.endswith(".gz"):
        blocks = _unpacked(raw, stored, _new_gzip, fed=_GZIP_FED, kind="gzip")
    elif stored.name.endswith(".zst"):
        blocks = _unpacked(raw, stored, _new_zstd, fed=_ZSTD_FED, kind="zstd")
    else:
        return raw
    return cast(IO[bytes], io.BufferedReader(Blocks(block for block in blocks if block), _BLOCK_BYTES))


def _new_gzip() -> Any:
    return zlib.decompressobj(wbits=31)  # 31: with gzip's header and checksum


def _new_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _unpacked(raw: IO[bytes], stored: Stored, new: Callable[[], Any], *, fed: int, kind: str) -> Iterator[bytes]:
    """Unpack one frame after another. Every frame must reach its own end: zstandard's own reader takes a cut one for
    whole."""
    import zstandard

    allowed = max(UNPACKED_AT_LEAST, UNPACKED_RATIO * stored.size)
    frame, read, made, frames = None, 0, 0, 0
    with raw:
        while block := raw.read(fed):
            read += len(block)
            while block := block if frame or not frames else block.lstrip(b"\0"):  # zeros may pad the end
                if frame is None:
                    frame, frames = new(), frames + 1
                try:
                    data = frame.decompress(block)
                except (zlib.error, zstandard.ZstdError) as error:
                    raise Damaged("damaged_compression", str(error), position=read) from None
                made += len(data)
                if made > allowed:
                    why = f"{stored.size} bytes unpack to more than {allowed}"
                    raise Damaged("unpacks_too_large", why, position=read)
                yield data
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None or not frames:
        raise Damaged(f"truncated_{kind}", f"the stream ends early, after {read} bytes", position=read)


def read_whole(stored: Stored, limit: int) -> bytes:
    """All bytes, unpacked; raises Damaged when there are more than `limit`."""
    parts: list[bytes] = []
    size = 0
    with open_unpacked(stored) as stream:
        while part := stream.read(_BLOCK_BYTES):
            size += len(part)
            if size > limit:
                raise Damaged("record_too_large", f"more than {limit} bytes in one record")
            parts.append(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line of more than MAX_RECORD_BYTES, which was passed over."""

    size: int


def read_lines(stored: Stored) -> Iterator[bytes | TooLong]:
    """Lines with their ends; raises Damaged in place of the line that a damaged stream does not finish."""
    with open_unpacked(stored) as stream:
        while line := stream.readline(MAX_RECORD_BYTES + 1):
            if len(line) <= MAX_RECORD_BYTES:
                yield line
                continue
            size, part = len(line), line
            while part and not part.endswith(b"\n"):
                part = stream.readline(_BLOCK_BYTES)
                size += len(part)
            yield TooLong(size)
