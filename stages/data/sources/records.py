"""What travels through curation: documents, unreadable records, symbols. Plain data, JSON lines between processes."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """One text with its provenance. `group` is the package for installed docs, else the source."""

    id: str
    text: str
    source: str
    group: str
    path: str
    symbol: str = ""
    heldout: bool = False
    planted: str = ""
    """Kind of planted document, empty for a real one."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row with its position, and its length in bytes as read."""

    number: int
    values: dict[str, Any]
    size: int


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that could not be read; `size` is its length in bytes as far as it is known."""

    id: str
    reason: str
    size: int
    sample: str = ""
    lost: int = 0
    """Bytes of its file that could not be read, when it stands for more than one record."""


@dataclass(frozen=True, slots=True)
class Symbol:
    """A documented public function or class, the raw material of instruction and preference pairs."""

    id: str
    name: str
    kind: str
    summary: str
    body: str
    group: str
    heldout: bool


Record = SourceDocument | BadRecord | Symbol


def source_of(row: Mapping[str, Any]) -> str:
    """The source of a published instruction or preference row, as it is named under instructions or preferences."""
    return row["group"] if row["origin"] == "given" else row["origin"]


def utf8_size(text: str) -> int:
    """Length in bytes; lone surrogates, which have no UTF-8 form, are counted as three."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    joined = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def is_drawn(fraction: float, *parts: object) -> bool:
    """Whether a thing belongs to the deterministic sample of this size."""
    return stable_hash(*parts) < fraction * 2**64


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write dataclasses or dicts as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row if isinstance(row, dict) else asdict(row)))
            file.write("\n")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
