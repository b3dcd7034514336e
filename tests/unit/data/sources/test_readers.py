"""Sources of every format, whole and damaged."""

import gzip
import json
import shutil
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stages.config.curate import CurateConfig
from stages.config.errors import ConfigError
from stages.data.sources.readers import plan, read, snapshot_source
from stages.data.sources.records import BadRecord, SourceDocument


def _texts(source: Path, **settings: object) -> tuple[list[str], dict[str, int]]:
    config = CurateConfig.model_validate({"documents": (str(source),), **settings})
    records = [record for unit in plan(config) for record in read(unit, config)]
    bad: dict[str, int] = {}
    for record in records:
        if isinstance(record, BadRecord):
            bad[record.reason] = bad.get(record.reason, 0) + 1
    return [record.text for record in records if isinstance(record, SourceDocument)], bad


def _lines(count: int) -> bytes:
    return b"".join(json.dumps({"text": f"document {number}"}).encode() + b"\n" for number in range(count))


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    rows = [{"text": f"document {number}"} for number in range(3)]
    (tmp_path / "a.jsonl").write_bytes(_lines(3))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(_lines(3)))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(_lines(3)))
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet"):
        assert _texts(tmp_path / name) == (["document 0", "document 1", "document 2"], {}), name
    (tmp_path / "f.txt").write_text("plain")
    (tmp_path / "g.md.gz").write_bytes(gzip.compress(b"# packed"))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert _texts(tmp_path)[0][-2:] == ["plain", "# packed"]


def test_ids_and_paths_are_relative_to_the_source(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.jsonl").write_bytes(_lines(1))
    config = CurateConfig(documents=(str(tmp_path),))
    record = next(read(plan(config)[0], config))
    assert isinstance(record, SourceDocument)
    assert (record.id, record.path, record.group) == ("0/sub/a.jsonl:1", "sub/a.jsonl", str(tmp_path))


def test_truncated_gzip_keeps_the_lines_before_the_cut(tmp_path: Path) -> None:
    rows = b"".join(
        json.dumps({"text": f"{number * 7919 % 10007} is a number"}).encode() + b"\n" for number in range(999)
    )
    whole = gzip.compress(rows)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    texts, bad = _texts(tmp_path)
    assert 0 < len(texts) < 999
    assert texts[0] == "0 is a number"
    assert bad == {"truncated_gzip": 1}


def test_each_kind_of_bad_line_is_counted_by_its_reason(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b'{"text": "caf\xe9"}',
        b'{"text": "cut',
        b'{"body": "no text"}',
        b'{"text": 7}',
        b'["text"]',
        b'{"text": "  "}',
        b'{"text": "lone \\ud800 surrogate"}',
        b"",
        b'{"text": "last"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    texts, bad = _texts(tmp_path)
    assert texts == ["good", "last"]
    assert bad == {"invalid_utf8": 2, "invalid_json": 1, "missing_text": 2, "not_an_object": 1, "empty_text": 1}


def test_damaged_files_are_one_bad_record_each(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet at all")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "d.jsonl.zst").write_bytes(b"no zstd at all")
    (tmp_path / "e.json").write_text("[1, 2")
    texts, bad = _texts(tmp_path)
    assert texts == []
    assert bad == {"unreadable_parquet": 1, "invalid_utf8": 1, "damaged_compression": 2, "invalid_json": 1}


def test_another_text_field_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"content": "here"}\n')
    assert _texts(tmp_path, text_field="content") == (["here"], {})


def test_hub_datasets_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "from the hub"}\n')
    config = CurateConfig(documents=(f"hf://{tmp_path}?split=train&text=body",))
    records = [record for unit in plan(config) for record in read(unit, config)]
    assert [record.text for record in records if isinstance(record, SourceDocument)] == ["from the hub"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/place", "'/no/such/place' does not exist"),
        ("hf://", "names no dataset"),
        ("hf://name?splt=train", "unknown \\['splt'\\]"),
    ],
)
def test_a_source_that_is_not_there_is_named(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(CurateConfig(documents=(source,)))


def test_a_folder_without_readable_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"1")
    with pytest.raises(ConfigError, match="holds no file that can be read"):
        plan(CurateConfig(documents=(str(tmp_path),)))


def test_snapshot_changes_with_content_and_not_with_place(tmp_path: Path) -> None:
    config = CurateConfig()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("text")
    before = snapshot_source(str(tmp_path / "one"), config)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert snapshot_source(str(tmp_path / "two"), config) == before
    (tmp_path / "two" / "a.txt").write_text("texT")
    assert snapshot_source(str(tmp_path / "two"), config) != before


def test_snapshot_of_installed_docs_is_quick_and_depends_on_the_choice() -> None:
    started = time.monotonic()
    numpy = snapshot_source("installed-docs", CurateConfig(packages=("numpy",)))
    both = snapshot_source("installed-docs", CurateConfig(packages=("numpy", "click")))
    assert time.monotonic() - started < 1.5
    assert numpy != both
    assert numpy == snapshot_source("installed-docs", CurateConfig(packages=("NumPy",)))


@pytest.mark.integration
def test_an_s3_prefix_is_read_like_the_folder_it_came_from(tmp_path: Path, s3_store: str) -> None:
    from stages.artifacts.s3_client import s3_client

    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_lines(3)))
    (tmp_path / "b #1.txt").write_text("plain")
    pq.write_table(pa.Table.from_pylist([{"text": "columns"}]), tmp_path / "c.parquet")
    bucket, _, root = s3_store.removeprefix("s3://").partition("/")
    prefix = f"{root}/corpus" if root else "corpus"
    for path in tmp_path.iterdir():
        s3_client().upload_file(str(path), bucket, f"{prefix}/{path.name}")
    s3_client().put_object(Bucket=bucket, Key=f"{prefix}-2/other.txt", Body=b"a neighbour")
    for hidden in ("._a.jsonl", ".hidden/b.txt", ".ipynb_checkpoints/a-checkpoint.jsonl"):
        s3_client().put_object(Bucket=bucket, Key=f"{prefix}/{hidden}", Body=b'{"text": "no source"}')
    uri = f"s3://{bucket}/{prefix}"
    expected = ["document 0", "document 1", "document 2", "plain", "columns"]
    for source in (uri, f"{uri}/"):
        config = CurateConfig(documents=(source,))
        records = [record for unit in plan(config) for record in read(unit, config)]
        assert [record.text for record in records if isinstance(record, SourceDocument)] == expected
        assert [record.path for record in records if isinstance(record, SourceDocument)][3] == "b #1.txt"
    before = snapshot_source(uri, CurateConfig())
    assert before == snapshot_source(uri, CurateConfig())
    s3_client().put_object(Bucket=bucket, Key=f"{prefix}/b #1.txt", Body=b"plaiN")
    assert snapshot_source(uri, CurateConfig()) != before
    for missing in (f"s3://{bucket}/{prefix}/nothing", "s3://no-such-bucket-here/x"):
        with pytest.raises(ConfigError, match="source 's3://"):
            plan(CurateConfig(documents=(missing,)))
