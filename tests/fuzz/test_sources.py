"""Whatever lies in a source, every record of it is read or counted under a reason."""

import gzip
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from stages.config.curate import CurateConfig
from stages.config.errors import StageError
from stages.config.sources import Source
from stages.data.curation.ledger import Step
from stages.data.pairs.given import given_instructions, given_preferences
from stages.data.sources import readers
from stages.data.sources.records import BadRecord, SourceDocument
from tests.curating import PLAIN
from tests.fuzz.cases import as_json, cases, confined, damaged_bytes, damaged_values, outcome

_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
]
INSTRUCTIONS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": _TURNS}],
    "alpaca": [{"instruction": "Add.", "input": "2 and 2", "output": "4"}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4", "weight": 1}]}],
    "pairs": [{"prompt": "2 + 2?", "response": "4"}],
}
PREFERENCES: dict[str, list[dict[str, Any]]] = {
    "texts": [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}],
    "turns": [{"chosen": _TURNS, "rejected": [*_TURNS[:2], {"role": "assistant", "content": "5"}]}],
    "transcripts": [{"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go"}],
}
_LINES = b"".join(json.dumps({"text": f"Document {number} has a text."}).encode() + b"\n" for number in range(20))


def _parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": [f"Document {number} has a text." for number in range(20)]}), sink)
    return sink.getvalue()


FILES: dict[str, bytes] = {
    "a.txt": "Ein ganzer Text, naïve façade.\r\nSecond line.\n".encode(),
    "a.jsonl": _LINES,
    "a.json": json.dumps([json.loads(line) for line in _LINES.splitlines()]).encode(),
    "a.parquet": _parquet(),
    "a.txt.gz": gzip.compress(_LINES),
    "a.jsonl.gz": gzip.compress(_LINES),
    "a.jsonl.zst": zstandard.compress(_LINES),
    "a.json.zst": zstandard.compress(b"[" + b",".join(_LINES.splitlines()) + b"]"),
    "a.txt.zst": zstandard.compress(_LINES),
    "a.parquet.gz": gzip.compress(_parquet()),
}


def _config(**settings: Any) -> CurateConfig:
    return CurateConfig.model_validate({**PLAIN, "max_bad_fraction": 1.0, **settings})


def _source(tmp_path: Path, name: str, data: bytes) -> str:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    (folder / name).write_bytes(data)
    return str(folder)


@cases
@given(st.sampled_from(sorted(FILES)), st.data())
def test_every_record_of_a_document_source_is_read_or_counted(tmp_path: Path, name: str, data: st.DataObject) -> None:
    source = _source(tmp_path, name, data.draw(damaged_bytes(FILES[name])))
    config = _config(documents=(source,))

    def read() -> list[object]:
        return [record for unit in readers.plan(config) for record in readers.read(unit, config)]

    with confined(tmp_path):
        records = outcome(read)
    if isinstance(records, StageError):
        return
    for record in records:
        assert isinstance(record, SourceDocument | BadRecord)
        if isinstance(record, SourceDocument):
            record.text.encode()
        else:
            assert record.reason
            assert record.size >= 0
    if os.path.getsize(Path(source) / name):
        assert records, "a file that is not empty vanished without a record"


def _rows(shapes: dict[str, list[dict[str, Any]]]) -> st.SearchStrategy[bytes]:
    """A file of one good row, damaged rows, and another good row."""

    def lines(shape: str) -> st.SearchStrategy[bytes]:
        good = as_json(shapes[shape][0])
        bad = st.one_of(damaged_values(shapes[shape][0]).map(as_json), damaged_bytes(good))
        return st.lists(bad, min_size=1, max_size=3).map(lambda rows: b"\n".join([good, *rows, good]) + b"\n")

    return st.sampled_from(sorted(shapes)).flatmap(lines)


def _account(give: Callable[..., list[dict[str, Any]]], source: str) -> tuple[list[dict[str, Any]], Step]:
    steps: list[Step] = []
    accounts: dict[str, dict[str, Any]] = {}
    rows = give([Source(uri=source)], _config(), steps, accounts)
    return rows, steps[0]


@pytest.mark.parametrize(
    ("give", "shapes"), [(given_instructions, INSTRUCTIONS), (given_preferences, PREFERENCES)], ids=["sft", "pairs"]
)
def test_every_given_row_is_kept_or_counted(
    tmp_path: Path, give: Callable[..., list[dict[str, Any]]], shapes: dict[str, list[dict[str, Any]]]
) -> None:
    @cases
    @given(_rows(shapes))
    def check(data: bytes) -> None:
        source = _source(tmp_path, "rows.jsonl", data)
        with confined(tmp_path):
            made = outcome(lambda: _account(give, source))
        if isinstance(made, StageError):
            return
        rows, step = made
        dropped = sum(amount.documents for amount in step.dropped.values())
        assert step.entered.documents == step.kept.documents + dropped
        assert len(rows) == step.kept.documents
        json.dumps(rows).encode()
        for row in rows:
            json.dumps(row, ensure_ascii=False).encode()

    check()
