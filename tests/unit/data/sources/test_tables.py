"""CSV, TSV, Arrow and saved datasets as rows: whole, damaged, and made to unpack to more than they may."""

import gzip
import json
import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pytest

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError, DataError
from stages.data.sources.readers import data_files, plan, read, snapshot_source
from stages.data.sources.records import BadRecord, Row, SourceDocument
from stages.data.sources.rows import read_rows
from stages.data.sources.storage import ROW_SUFFIXES
from stages.data.sources.streams import Stored

ROWS = [{"text": f"document {number}", "tags": ["a", None], "n": number} for number in range(1000)]


def rows(path: Path) -> tuple[list[dict[str, Any]], list[BadRecord]]:
    found = list(read_rows(Stored(str(path), path.name, path.stat().st_size)))
    assert sum(record.size for record in found if isinstance(record, BadRecord)) <= path.stat().st_size
    return [row.values for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, BadRecord)]


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def stream_of(table: pa.Table, *, chunk: int = 100) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("comma.csv", 'prompt,response\n"a, b","say ""hi""\nand more"\nc,\n'),
        ("crlf.csv", 'prompt,response\r\n"a, b","say ""hi""\nand more"\r\nc,\r\n'),
        ("mark.csv", '\ufeffprompt,response\n"a, b","say ""hi""\nand more"\nc,\n'),
        ("semicolon.csv", 'prompt;response\na, b;"say ""hi""\nand more"\n\nc;\n'),
        ("tabs.tsv", 'prompt\tresponse\na, b\t"say ""hi""\nand more"\nc\t\n'),
    ],
)
def test_delimited_text_is_read_with_its_quotes_and_line_ends(tmp_path: Path, name: str, text: str) -> None:
    expected = [{"prompt": "a, b", "response": 'say "hi"\nand more'}, {"prompt": "c", "response": ""}]
    assert rows(written(tmp_path / name, text)) == (expected, [])
    assert rows(written(tmp_path / f"{name}.gz", gzip.compress(text.encode()))) == (expected, [])


def test_a_row_is_named_by_its_first_line_and_the_index_of_a_table_is_no_field_of_ours(tmp_path: Path) -> None:
    path = written(tmp_path / "a.csv", ',text\n0,"one\ntwo"\n1,three\n')
    found = list(read_rows(Stored(str(path), path.name, path.stat().st_size)))
    assert [(row.number, row.values) for row in found if isinstance(row, Row)] == [
        (2, {"column 1": "0", "text": "one\ntwo"}),
        (4, {"column 1": "1", "text": "three"}),
    ]


def test_each_kind_of_bad_record_of_a_csv_is_counted_and_the_next_one_is_read(tmp_path: Path) -> None:
    lines = [b"a,b", b"1,2", b"1,2,3", b"caf\xe9,2", b'"x"y,2', b"only", b"3,4", b'"never closed,5', b"6,7"]
    found, bad = rows(written(tmp_path / "a.csv", b"\n".join(lines) + b"\n"))
    assert found == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    assert [(record.id, record.reason) for record in bad] == [
        ("a.csv:3", "wrong_columns"),
        ("a.csv:4", "invalid_utf8"),
        ("a.csv:5", "invalid_csv"),
        ("a.csv:6", "wrong_columns"),
        ("a.csv:8", "invalid_csv"),
    ]
    assert [record.lost for record in bad] == [0, 0, 0, 0, len(b'"never closed,5\n6,7\n')], "what the quote swallowed"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("prompt,response\na,b\n".encode("utf-16"), "invalid_utf8"),
        (b"caf\xe9,b\n1,2\n", "invalid_utf8"),
        (b"a,a\n1,2\n", "invalid_header"),
        (b'"open,b\n1,2\n', "invalid_header"),
    ],
)
def test_a_csv_whose_header_cannot_be_read_is_one_bad_record(tmp_path: Path, data: bytes, reason: str) -> None:
    found, bad = rows(written(tmp_path / "a.csv", data))
    assert (found, [record.reason for record in bad]) == ([], [reason])
    assert bad[0].lost == len(data)
    assert rows(written(tmp_path / "empty.csv", b"")) == ([], [])


def test_a_record_that_outgrows_memory_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("streams", "delimited"):
        monkeypatch.setattr(f"stages.data.sources.{module}.MAX_RECORD_BYTES", 100)
    long = "x" * 60
    text = f'a,b\n1,2\n"{long}\n{long}\n",2\n3,{long * 3}\n4,5\n'
    found, bad = rows(written(tmp_path / "a.csv", text))
    assert {record.reason for record in bad} >= {"record_too_large"}
    assert (found[0], found[-1]) == ({"a": "1", "b": "2"}, {"a": "4", "b": "5"})


@pytest.mark.parametrize("compression", ["lz4", "zstd", "uncompressed"])
def test_arrow_files_and_streams_give_the_same_rows(tmp_path: Path, compression: str) -> None:
    table = pa.Table.from_pylist(ROWS)
    feather.write_feather(table, tmp_path / "a.feather", compression=compression, chunksize=100)
    assert rows(tmp_path / "a.feather") == (ROWS, [])
    (tmp_path / "a.feather").rename(tmp_path / "b.arrow")
    assert rows(tmp_path / "b.arrow") == (ROWS, [])
    assert rows(written(tmp_path / "c.arrow", stream_of(table))) == (ROWS, [])
    assert rows(written(tmp_path / "d.arrow.gz", gzip.compress(stream_of(table)))) == (ROWS, [])


def test_dictionaries_are_read_as_their_values(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["x", "y", "x", None]).dictionary_encode()})
    found, bad = rows(written(tmp_path / "a.arrow", stream_of(table)))
    assert ([row["text"] for row in found], bad) == (["x", "y", "x", None], [])


def test_a_cut_arrow_file_keeps_the_rows_before_the_cut_and_is_counted(tmp_path: Path) -> None:
    whole = stream_of(pa.Table.from_pylist(ROWS))
    found, bad = rows(written(tmp_path / "a.arrow", whole[: len(whole) // 2]))
    assert found == ROWS[: len(found)]
    assert 0 < len(found) < 1000
    assert [record.reason for record in bad] == ["truncated_arrow"]
    # Cut between two messages: only the mark of the end is missing.
    found, bad = rows(written(tmp_path / "b.arrow", whole[:-8]))
    assert (len(found), [record.reason for record in bad]) == (1000, ["truncated_arrow"])
    feather.write_feather(pa.Table.from_pylist(ROWS), tmp_path / "c.feather")
    data = (tmp_path / "c.feather").read_bytes()
    found, bad = rows(written(tmp_path / "d.feather", data[:-4]))
    assert (len(found), [record.reason for record in bad]) == (1000, ["truncated_arrow"])


@pytest.mark.parametrize("data", [b"FEA1" + bytes(20), b"no arrow at all", b"ARROW1\0\0" + bytes(3), bytes(40)])
def test_what_is_no_arrow_file_is_one_bad_record(tmp_path: Path, data: bytes) -> None:
    found, bad = rows(written(tmp_path / "a.arrow", data))
    assert (found, len(bad)) == ([], 1)
    assert bad[0].reason in ("unreadable_arrow", "truncated_arrow")


def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.data.sources.arrow.UNPACKED_AT_LEAST", 2**20)


def test_arrow_files_that_unpack_to_too_much_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_limits(monkeypatch)
    nulls = pa.table({"text": pa.nulls(2**20)})
    _, bad = rows(written(tmp_path / "nulls.arrow", stream_of(nulls, chunk=2**20)))
    assert [record.reason for record in bad] == ["unpacks_too_large"]
    zeros = pa.table({"text": pa.array(["a" * 5_000_000])})
    feather.write_feather(zeros, tmp_path / "zeros.feather", compression="zstd")
    assert (tmp_path / "zeros.feather").stat().st_size < 2**12
    _, bad = rows(tmp_path / "zeros.feather")
    assert [record.reason for record in bad] == ["unpacks_too_large"]


def test_a_length_that_is_only_claimed_is_never_set_aside(tmp_path: Path) -> None:
    _, bad = rows(written(tmp_path / "a.arrow", b"\xff\xff\xff\xff" + struct.pack("<i", 2**31 - 1) + bytes(50)))
    assert [record.reason for record in bad] == ["unreadable_arrow"]


def test_documents_come_from_every_kind_of_table(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS[:3])
    written(tmp_path / "a.csv", "text,n\n" + "".join(f"{row['text']},{row['n']}\n" for row in ROWS[:3]))
    written(tmp_path / "b.tsv", "text\tn\n" + "".join(f"{row['text']}\t{row['n']}\n" for row in ROWS[:3]))
    written(tmp_path / "c.arrow", stream_of(table))
    feather.write_feather(table, tmp_path / "d.feather")
    written(tmp_path / "e.json", "".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    for name in ("a.csv", "b.tsv", "c.arrow", "d.feather", "e.json"):
        config = CurateConfig(documents=(str(tmp_path / name),))
        records = [record for unit in plan(config) for record in read(unit, config)]
        texts = [record.text for record in records if isinstance(record, SourceDocument)]
        assert texts == ["document 0", "document 1", "document 2"], name


def saved(folder: Path, count: int = 5, **more: Any) -> Path:
    """What `Dataset.save_to_disk` writes, of two files."""
    folder.mkdir(parents=True)
    names = [f"data-{place:05}-of-00002.arrow" for place in range(2)]
    for place, name in enumerate(names):
        written(folder / name, stream_of(pa.Table.from_pylist(ROWS[place * count : (place + 1) * count])))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", **more}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def test_of_a_saved_dataset_the_files_that_it_lists_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set")
    written(folder / "cache-1.arrow", stream_of(pa.Table.from_pylist(ROWS[:50])))
    for source in (folder, tmp_path):
        found = data_files(str(source), ROW_SUFFIXES)
        assert [entry.name.rpartition("/")[2] for entry in found.files] == [
            "data-00000-of-00002.arrow",
            "data-00001-of-00002.arrow",
        ]
        assert {(entry.reason, entry.name.rpartition("/")[2]) for entry in found.unread} == {
            ("dataset_description", "state.json"),
            ("dataset_description", "dataset_info.json"),
            ("not_in_dataset", "cache-1.arrow"),
        }


def test_what_datasets_itself_has_saved_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS[:20]).save_to_disk(str(tmp_path / "set"), num_shards=2)
    files = data_files(str(tmp_path / "set"), ROW_SUFFIXES).files
    assert [row.values for entry in files for row in read_rows(entry) if isinstance(row, Row)] == ROWS[:20]
    both = datasets.DatasetDict({name: datasets.Dataset.from_list(ROWS[:3]) for name in ("train", "test")})
    both.save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ConfigError, match="with the splits train, test") as refused:
        data_files(str(tmp_path / "both"), ROW_SUFFIXES)
    assert f"{tmp_path}/both/train or {tmp_path}/both/test" in refused.value.advice
    (entry,) = data_files(str(tmp_path / "both" / "train"), ROW_SUFFIXES).files
    assert sum(isinstance(row, Row) for row in read_rows(entry)) == 3


def test_a_dict_with_one_split_needs_no_choice(tmp_path: Path) -> None:
    saved(tmp_path / "set" / "train")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(data_files(str(tmp_path / "set"), ROW_SUFFIXES).files) == 2


def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    os.remove(saved(tmp_path / "cut") / "data-00001-of-00002.arrow")
    with pytest.raises(DataError, match=r"lists data-00001-of-00002.arrow, which is not there"):
        data_files(str(tmp_path / "cut"), ROW_SUFFIXES)
    folder = saved(tmp_path / "chosen", _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match="is a selection of the rows"):
        data_files(str(folder), ROW_SUFFIXES)


def test_a_state_that_is_rows_of_the_user_is_read_as_rows(tmp_path: Path) -> None:
    written(tmp_path / "state.json", json.dumps([{"text": "Ohio"}]))
    assert [entry.name for entry in data_files(str(tmp_path), ROW_SUFFIXES).files] == ["state.json"]


def test_data_made_when_tables_were_passed_over_is_not_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "a.jsonl", '{"text": "x"}\n')
    before = snapshot_source(str(tmp_path), CurateConfig())
    for name in ("b.csv", "b.arrow"):
        written(tmp_path / name, "text\nx\n")
        now = snapshot_source(str(tmp_path), CurateConfig())
        with monkeypatch.context() as patch:
            patch.setattr("stages.data.sources.storage.DELIMITED", ())
            patch.setattr("stages.data.sources.storage.ARROW", ())
            assert snapshot_source(str(tmp_path), CurateConfig()) not in (now, before)
        (tmp_path / name).unlink()


def test_the_answers_next_to_the_pairs_of_raters_are_no_pairs(tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "preferences" / "1"
    folder.mkdir(parents=True)
    written(folder / "preferences.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    written(folder / "answers.csv", "prompt_id,outcome\n1,tie\n")
    written(folder / "manifest.json", "{}")
    found = data_files(str(folder), ROW_SUFFIXES)
    assert [entry.name for entry in found.files] == ["preferences.jsonl"]
    assert [(entry.reason, entry.name) for entry in found.unread] == [("raters_table", "answers.csv")]


def test_a_column_of_lists_that_share_their_elements_is_refused(tmp_path: Path) -> None:
    lists = pa.array([["a"], ["b"]], type=pa.list_view(pa.string()))
    _, bad = rows(written(tmp_path / "a.arrow", stream_of(pa.table({"text": lists}))))
    assert [record.reason for record in bad] == ["unreadable_arrow"]
