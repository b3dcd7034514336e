"""Damaged files of every format, made from seeds: always documents and counted records, never another end."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.config.places import check_source
from stages.data.sources import readers
from stages.data.sources.records import BadRecord, SourceDocument
from tests.curating import prose

ROWS = [{"text": prose(number), "n": number, "tags": ["a", None]} for number in range(40)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
ODD = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"[" * 3000,
    b'{"a":' * 2000,
    b"9" * 5000,
    b"\\ud800",
    b"\n\n",
    b"NaN",
]


def _parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, compression="zstd")
    return file.getvalue()


def _csv() -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def _arrow(*, has_footer: bool) -> bytes:
    table, file = pa.Table.from_pylist(ROWS), io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    make = pa.ipc.new_file if has_footer else pa.ipc.new_stream
    with make(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=10)
    return file.getvalue()


PLAIN = {"x.txt": prose(1).encode(), "x.jsonl": LINES, "x.json": json.dumps(ROWS).encode(), "x.parquet": _parquet()}
PLAIN |= {"x.csv": _csv(), "x.arrow": _arrow(has_footer=False), "x.feather": _arrow(has_footer=True)}
PACKED = {f"{name}.gz": gzip.compress(data) for name, data in PLAIN.items()}
PACKED |= {f"{name}.zst": zstandard.compress(data) for name, data in PLAIN.items()}


def _damaged(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        at, until = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
        match rng.randrange(6):
            case 0:
                data = data[:at]
            case 1:
                data = data[:at] + data[until:]
            case 2:
                data = data[:at] + rng.choice(ODD) + data[at:]
            case 3:
                data = data[:at] + rng.randbytes(rng.randint(1, 8)) + data[at + 8 :]
            case 4:
                data = data + data[at:until]
            case _:
                data = data[:at] + b"\0" * (until - at) + data[until:]
    return data


@pytest.mark.parametrize("name", [*PLAIN, *PACKED])
def test_damaged_files_give_documents_and_counted_records(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    config = CurateConfig(documents=(str(tmp_path / name),))
    for case in range(60):
        (tmp_path / name).write_bytes(_damaged({**PLAIN, **PACKED}[name], rng))
        readers.snapshot_source(str(tmp_path / name), config)
        for unit in readers.plan(config):
            for record in readers.read(unit, config):
                assert isinstance(record, BadRecord | SourceDocument), case
                assert name in record.id
                json.dumps(record.text if isinstance(record, SourceDocument) else record.sample).encode()


def test_made_up_addresses_are_read_or_refused() -> None:
    rng = random.Random(0)
    parts = ["file:", "s3:", "hf:", "/", "//", "..", ".", "~", "#", "?", "%00", "%2e", "\0", "\n", " ", "@", ":", "etc"]
    parts += ["proc/self/root", "\ud800", "ü", "x" * 300, "models:/a@b", "localhost", "split=train", "[::1]"]
    for _ in range(1500):
        address = "".join(rng.choice(parts) for _ in range(rng.randint(0, 8)))
        try:
            check_source(address, field="documents")
        except ConfigError as error:
            assert error.message.startswith("documents")  # noqa: PT017 - most addresses raise nothing
