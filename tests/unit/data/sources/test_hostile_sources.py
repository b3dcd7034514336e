"""Sources that lead elsewhere, hang, lie about their end or their size: read what is good, name and count the rest."""

import gzip
import io
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from botocore.exceptions import ClientError, EndpointConnectionError, ReadTimeoutError
from botocore.response import StreamingBody
from huggingface_hub.utils import httpx

from operators.given import given_artifact
from stages.config.curate import CurateConfig
from stages.config.errors import Category, ConfigError, DataError, StageError
from stages.config.resolve import resolve
from stages.data.sources import readers
from stages.data.sources.hub import read_hub
from stages.data.sources.records import BadRecord, SourceDocument
from stages.data.sources.rows import Row, read_rows
from stages.data.sources.streams import Stored, read_whole
from stages.job.stopping import Stopped
from tests.curating import PLAIN, curated, prose, rows_of
from tests.places import SHARED

WORLD = SHARED / "cases" / "world"
LINES = b"".join(json.dumps({"text": f"{number}: {prose(number)}"}).encode() + b"\n" for number in range(60))


def _read(source: Path | str, **settings: Any) -> tuple[list[str], dict[str, int]]:
    config = CurateConfig.model_validate({"documents": (str(source),), **settings})
    texts: list[str] = []
    bad: dict[str, int] = {}
    for unit in readers.plan(config):
        for record in readers.read(unit, config):
            if isinstance(record, BadRecord):
                bad[record.reason] = bad.get(record.reason, 0) + 1
            elif isinstance(record, SourceDocument):
                texts.append(record.text)
    return texts, bad


def _folder(tmp_path: Path) -> Path:
    """Three documents, and next to them all that is not to be read."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secrets.txt").write_text("password=hunter2 " + prose(1))
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for number in range(3):
        (folder / f"a{number}.txt").write_text(prose(10 + number))
    (folder / "environ.txt").symlink_to("/proc/self/environ")
    (folder / "link.txt").symlink_to(tmp_path / "outside" / "secrets.txt")
    (folder / "relative.txt").symlink_to("../outside/secrets.txt")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "gone.txt").symlink_to("nowhere.txt")
    (folder / "sub" / ".hidden.txt").write_text("password=hunter2 " + prose(2))
    (folder / "unhidden.txt").symlink_to("sub/.hidden.txt")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("password=hunter2 " + prose(3))
    (folder / "notes.pdf").write_bytes(b"%PDF")
    os.mkfifo(folder / "pipe.txt")
    (folder / "null.txt").symlink_to("/dev/null")
    return folder


UNREAD = {
    "broken_link": ["gone.txt"],
    "hidden": [".git/", "sub/.hidden.txt", "unhidden.txt"],
    "link_out_of_source": ["environ.txt", "link.txt", "null.txt", "relative.txt"],
    "linked_folder": ["linked/"],
    "not_a_file": ["pipe.txt"],
    "unknown_suffix": ["notes.pdf"],
}


def test_what_leads_out_of_a_folder_is_named_in_the_ledger_and_not_read(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    outcome, output = curated(tmp_path, documents=(str(folder),), heldout_fraction=0.0, **PLAIN)
    assert len(rows_of(output / "documents" / "train")) == 3
    assert outcome.ledger["documents"]["unread"] == {
        str(folder): {reason: {"files": len(names), "names": names} for reason, names in UNREAD.items()}
    }
    for path in output.rglob("*"):
        data = (
            gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() if path.is_file() else b""
        )
        assert b"hunter2" not in data, path


def test_pairs_do_not_follow_links_either(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [{"instruction": f"What is {number}? {prose(number, 1)}", "output": prose(number)} for number in range(30)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "secret.jsonl").write_text(json.dumps({"instruction": "password?", "output": "hunter2"}) + "\n")
    (folder / "b.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "readme.pdf").write_bytes(b"%PDF")
    (tmp_path / "text.txt").write_text(prose(99))
    settings: dict[str, Any] = {**PLAIN, "instructions": (str(folder),), "heldout_fraction": 0.0}
    outcome, output = curated(tmp_path, documents=(str(tmp_path / "text.txt"),), **settings)
    assert len(rows_of(output / "instructions" / "train.jsonl.gz")) == 30
    account = outcome.ledger["instructions"]["sources"][str(folder)]
    assert account["unread"] == {
        "link_out_of_source": {"files": 1, "names": ["b.jsonl"]},
        "unknown_suffix": {"files": 1, "names": ["readme.pdf"]},
    }


def test_the_account_of_a_source_that_is_read_whole_has_its_old_form(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(prose(99))
    outcome, _ = curated(tmp_path, documents=(str(tmp_path / "text.txt"),), heldout_fraction=0.0, **PLAIN)
    assert "unread" not in outcome.ledger["documents"]


def test_a_folder_that_is_itself_a_link_is_read(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.txt").write_text("mounted elsewhere")
    (tmp_path / "disk" / "again.txt").symlink_to("a.txt")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    assert _read(tmp_path / "data") == (["mounted elsewhere"] * 2, {})


def test_a_file_that_becomes_a_link_after_the_look_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("hunter2")
    for name in ("corpus/a", "corpus/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").write_text("harmless")
    config = CurateConfig(documents=(str(tmp_path / "corpus"),))
    units = readers.plan(config)
    (tmp_path / "corpus/a/x.txt").unlink()
    (tmp_path / "corpus/a/x.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "corpus/b").rename(tmp_path / "aside")
    (tmp_path / "corpus/b").symlink_to(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "x.txt").write_text("hunter2")
    records = [record for unit in units for record in readers.read(unit, config)]
    assert [(record.id, record.reason) for record in records if isinstance(record, BadRecord)] == [
        ("0/a/x.txt", "unreadable_file"),
        ("0/b/x.txt", "unreadable_file"),
    ]
    assert len(records) == 2


def test_a_file_that_becomes_a_pipe_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("harmless")
    config = CurateConfig(documents=(str(tmp_path),))
    unit = readers.plan(config)[0]
    (tmp_path / "x.txt").unlink()
    os.mkfifo(tmp_path / "x.txt")
    records: list[Any] = []
    reading = threading.Thread(target=lambda: records.extend(readers.read(unit, config)), daemon=True)
    reading.start()
    reading.join(timeout=10)
    assert [record.reason for record in records] == ["unreadable_file"]


def test_a_source_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.txt"))
    for name in ("pipe.txt", "s.txt"):
        with pytest.raises(ConfigError, match=r"holds no file that can be read.*not_a_file"):
            readers.plan(CurateConfig(documents=(str(tmp_path / name),)))
    server.close()


def test_a_file_name_that_is_not_utf8_does_not_break_the_ledger(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt")).write_text(prose(1))
    _, output = curated(tmp_path, documents=(str(tmp_path / "in"),), heldout_fraction=0.0, **PLAIN)
    assert [row["path"] for row in rows_of(output / "documents" / "train")] == ["caf\\xe9.txt"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("open")
    (tmp_path / "b.txt").write_text("closed")
    (tmp_path / "b.txt").chmod(0)
    assert _read(tmp_path) == (["open"], {"unreadable_file": 1})


# Compressed streams and their ends


def _zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("kept", [0, 3, 20, 400, -4, -1])
def test_a_zst_that_ends_early_is_as_damaged_as_a_gz(tmp_path: Path, kept: int) -> None:
    for suffix, whole in ((".gz", gzip.compress(LINES)), (".zst", _zst(LINES))):
        (tmp_path / f"x.jsonl{suffix}").write_bytes(whole[:kept])
        texts, bad = _read(tmp_path / f"x.jsonl{suffix}")
        assert bad == {f"truncated_{'gzip' if suffix == '.gz' else 'zstd'}": 1}
        assert len(texts) < 60 or kept < 0
        (tmp_path / f"x.txt{suffix}").write_bytes(whole[:kept])
        assert _read(tmp_path / f"x.txt{suffix}") == ([], bad)


def test_several_zstd_frames_are_one_stream(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    cut = LINES.index(b"\n", len(LINES) // 2) - 7
    whole = skippable + _zst(LINES[:cut]) + skippable + _zst(LINES[cut:]) + skippable
    (tmp_path / "x.jsonl.zst").write_bytes(whole)
    texts, bad = _read(tmp_path)
    assert (len(texts), bad) == (60, {})
    (tmp_path / "x.jsonl.zst").write_bytes(whole[:-3])
    assert _read(tmp_path)[1] == {"truncated_zstd": 1}
    (tmp_path / "x.jsonl.zst").write_bytes(_zst(LINES) + b"garbage after the end")
    assert (len(_read(tmp_path)[0]), _read(tmp_path)[1]) == (60, {"damaged_compression": 1})


@pytest.mark.parametrize(
    "name", ["x.json.zst", "x.json.gz", "x.parquet.gz", "x.parquet.zst", "x.txt.zst", "x.jsonl.gz"]
)
def test_garbage_in_a_compressed_file_is_one_bad_record(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no such format, at all")
    assert _read(tmp_path) == ([], {"damaged_compression": 1})


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_parquet_is_read(tmp_path: Path, suffix: str) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": "columns"}]), tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").unlink()
    (tmp_path / f"x.parquet{suffix}").write_bytes(gzip.compress(data) if suffix == ".gz" else _zst(data))
    assert _read(tmp_path) == (["columns"], {})


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.jsonl.gz", "x.jsonl.zst", "x.json.gz", "x.parquet.zst"])
def test_a_small_file_that_unpacks_to_a_huge_one_is_given_up(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.sources.streams.UNPACKED_AT_LEAST", 2**20, raising=False)
    bomb = b" " * (64 * 2**20)
    (tmp_path / name).write_bytes(gzip.compress(bomb) if name.endswith(".gz") else _zst(bomb))
    assert _read(tmp_path) == ([], {"unpacks_too_large": 1})


@pytest.mark.parametrize("name", ["x.txt", "x.json"])
def test_a_text_that_is_too_large_is_one_bad_record(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MAX_RECORD_BYTES", "MAX_FILE_BYTES"):
        monkeypatch.setattr(f"stages.data.sources.streams.{limit}", 1000, raising=False)
    (tmp_path / name).write_bytes(b'["' + b"a" * 5000 + b'"]')
    assert _read(tmp_path) == ([], {"record_too_large": 1})


def test_a_line_that_is_too_long_does_not_take_the_next_ones_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.sources.streams.MAX_RECORD_BYTES", 1000, raising=False)
    long = json.dumps({"text": "a" * 5000}).encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n' + long + b'\n{"text": "two"}\n' + long)
    assert _read(tmp_path) == (["one", "two"], {"record_too_large": 2})


# Rows that parsers choke on


def test_rows_that_parsers_choke_on_are_counted(tmp_path: Path) -> None:
    deep = "[" * 50_000 + "]" * 50_000
    nested = "[" * 300 + "]" * 300
    lines = [
        '{"text": "first"}',
        '{"text": "big", "number": ' + "9" * 5000 + "}",
        '{"text": "negative", "number": -' + "9" * 5000 + "}",
        '{"text": "x", "deep": ' + deep + "}",
        '{"text": "x", "deep": ' + nested + "}",
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        '{"text": "brackets in words are fine ' + "[" * 500 + '"}',
        '{"text": "lone \\ud800"}',
        '{"text": "x"} {"text": "y"}',
        '{"text": "nan", "score": NaN, "huge": 1e999}',
        '\ufeff{"text": "a mark in the middle"}',
        "\0\0\0",
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts, bad = _read(tmp_path)
    assert texts == ["first", "big", "negative", "brackets in words are fine " + "[" * 500, "nan"]
    assert bad == {"invalid_json": 6, "invalid_utf8": 1}


@pytest.mark.parametrize(
    "text", ["[" * 90_000, "[" * 90_000 + "]" * 90_000, '{"a":' * 90_000, "", "\0", "nul", '[{"text": "x"', "[1, 2"]
)
def test_broken_json_files_are_one_bad_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert _read(tmp_path) == ([], {"invalid_json": 1})


def test_rows_of_a_json_array_survive_a_row_that_is_too_deep(tmp_path: Path) -> None:
    rows = (
        '{"text": "one"}, {"text": "x", "deep": '
        + "[" * 200
        + "]" * 200
        + '}, {"text": "two", "n": '
        + "7" * 5000
        + "}"
    )
    (tmp_path / "x.json").write_text(f"[{rows}, 3]")
    assert _read(tmp_path) == (["one", "two"], {"invalid_json": 1, "not_an_object": 1})


def test_json_lines_under_the_name_of_json_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(LINES + b'{"text": "cut')
    texts, bad = _read(tmp_path)
    assert (len(texts), bad) == (60, {"invalid_json": 1})
    (tmp_path / "x.json").write_text('{"text": "one object"}')
    assert _read(tmp_path) == (["one object"], {})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_counted(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.txt").write_text(prose(1), encoding=encoding)
    texts, bad = _read(tmp_path)
    assert (texts, sum(bad.values())) == ([], 1)
    assert set(bad) <= {"invalid_utf8", "not_text"}
    (tmp_path / "x.txt").unlink()
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding=encoding)
    texts, bad = _read(tmp_path)
    assert texts == []
    assert sum(bad.values()) >= 2


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for name, data in (("a.txt", b"text"), ("b.jsonl", b'{"text": "text"}'), ("c.json", b'[{"text": "text"}]')):
        (tmp_path / name).write_bytes(mark + data)
    assert _read(tmp_path) == (["text"] * 3, {})


def test_broken_parquet_is_a_bad_record(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"text": f"row {number}"} for number in range(5000)]), tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], whole[:4] + b"\xff" * 400 + whole[404:], b"", b"PAR1PAR1"):
        (tmp_path / "x.parquet").write_bytes(damaged)
        texts, bad = _read(tmp_path)
        assert bad == {"unreadable_parquet": 1}
        assert len(texts) < 5000
    dates = pa.table({"text": ["x"], "when": pa.array([2**60], pa.timestamp("ms"))})
    pq.write_table(dates, tmp_path / "x.parquet")
    texts, bad = _read(tmp_path)
    assert bad == {"unreadable_parquet": 1}


# A lost file weighs by its bytes


def test_a_lost_file_counts_by_its_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.json").write_bytes(b"[" + LINES.replace(b"\n", b",\n"))
    with pytest.raises(DataError, match=r"b\.json.*bytes|bytes.*b\.json"):
        curated(tmp_path, documents=(str(folder),), **PLAIN)
    (folder / "b.json").write_bytes(b"[" + LINES[:100])
    curated(tmp_path, name="small", documents=(str(folder),), **PLAIN)
    (folder / "b.json").unlink()
    (folder / "b.jsonl.zst").write_bytes(b"damaged" * 9000)
    with pytest.raises(DataError, match="damaged_compression"):
        curated(tmp_path, name="third", documents=(str(folder),), **PLAIN)


# Line ends


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
@pytest.mark.parametrize("profile", ["docs", "books"])
def test_line_ends_change_neither_verdict_nor_text(tmp_path: Path, ends: str, profile: str) -> None:
    found = {}
    for name, end in (("lf", "\n"), ("other", ends)):
        (tmp_path / name).mkdir()
        text = prose(50, 4).replace(". ", ".\n")
        (tmp_path / name / "page.txt").write_bytes(text.replace("\n", end).encode())
        rows = [{"text": prose(51, 4).replace(". ", f".{end}")}]
        (tmp_path / name / "row.jsonl").write_text(json.dumps(rows[0]) + "\n")
        _, output = curated(
            tmp_path,
            name=f"{name}.out",
            documents=(str(tmp_path / name),),
            profile=profile,
            heldout_fraction=0.0,
            **PLAIN,
        )
        found[name] = [row["text"] for row in rows_of(output / "documents" / "train")]
    assert found["lf"] == found["other"]
    assert len(found["lf"]) >= 1


def test_files_that_are_read_differently_today_have_another_identity(tmp_path: Path) -> None:
    """Curated data made from them before must not be found again as if it had been made today."""
    import hashlib

    def as_before(name: str, data: bytes) -> str:
        return hashlib.sha256(f"{name}\t{len(data)}\t{hashlib.sha256(data).hexdigest()}".encode()).hexdigest()

    for name, data, same in (
        ("a.txt", b"one\ntwo\n", True),
        ("b.txt", b"one\r\ntwo\r\n", False),
        ("c.jsonl", LINES, True),
        ("d.jsonl", b'{"text": "one\\r\\ntwo"}\n', False),
        ("e.jsonl.gz", gzip.compress(LINES), True),
        ("f.jsonl.zst", _zst(LINES), False),
        ("g.json", b'[{"text": "x"}]', True),
        ("h.json", LINES, False),
    ):
        (tmp_path / name).write_bytes(data)
        found = readers.snapshot_source(str(tmp_path / name), CurateConfig())
        assert (found == as_before(name, data)) is same, name


# Places that sources are not read from


CLOSED = [
    "/etc/hosts",
    "//etc/hosts",
    "/etc",
    "file:///etc/hosts",
    "file:////etc/hosts",
    "file:///%65tc/hosts",
    "/proc/self/environ",
    "/proc/self/root/etc/hosts",
    "/tmp/../etc/hosts",
    "/sys/kernel",
    "/dev/stdin",
    "~/.ssh/id_rsa",
    "hf:///etc",
    "hf://../../../../../../etc?split=train",
]


@pytest.mark.parametrize("source", CLOSED)
@pytest.mark.parametrize("field", ["documents", "instructions", "preferences"])
def test_closed_places_are_refused_when_the_run_starts_and_in_the_job(source: str, field: str) -> None:
    with pytest.raises(ConfigError) as told:
        resolve({"recipe": "tiny", field: [source]})
    assert field in told.value.message
    assert "not open to sources" in told.value.message
    assert "ATHANOR_SOURCE_ROOTS" in told.value.advice
    with pytest.raises(ConfigError, match="not open to sources"):
        readers.snapshot_source(source, CurateConfig())


def test_word_lists_and_models_are_sources_too(tmp_path: Path) -> None:
    words = {"curate.toxicity": "word-list", "curate.toxicity_word_list": "/etc/passwd"}
    with pytest.raises(ConfigError, match="toxicity_word_list='/etc/passwd'"):
        resolve({"recipe": "tiny", "overrides": words})
    with pytest.raises(ConfigError, match="base_model='/proc/self'"):
        resolve({"recipe": "tiny", "base_model": "/proc/self"})


def test_a_link_to_a_closed_place_is_closed(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to("/etc")
    with pytest.raises(ConfigError, match="leads to '/etc'"):
        resolve({"recipe": "tiny", "documents": [str(tmp_path / "data")]})


@pytest.mark.parametrize("source", ["", " ", "\t", "file://", "file://host/data", "file://data", "s3://", "hf://"])
def test_an_address_that_names_nothing_is_refused(source: str) -> None:
    """Today's empty path would be the job's working folder."""
    for field in ("documents", "instructions", "preferences"):
        with pytest.raises(ConfigError):
            resolve({"recipe": "tiny", "overrides": {f"curate.{field}": [source]}})
    with pytest.raises(ConfigError):
        readers.snapshot_source(source, CurateConfig())


def test_blank_lines_of_the_form_are_ignored() -> None:
    config = resolve({"recipe": "tiny", "documents": ["installed-docs", "", "  "], "instructions": [" ", "derived"]})
    assert config.curate.documents == ("installed-docs",)
    assert config.curate.instructions == ("derived",)


@pytest.mark.parametrize("source", ["a\0b", "/data/\ud800", "/data/\nx", "/" + "x" * 5000, "s3://bucket/a\nb"])
def test_addresses_that_no_system_call_takes_are_refused_in_a_sentence(source: str) -> None:
    with pytest.raises(ConfigError):
        readers.snapshot_source(source, CurateConfig())
    with pytest.raises(ConfigError):
        readers.plan(CurateConfig(documents=(source,)))


@pytest.mark.parametrize("source", ["s3://key:hunter2@bucket/x", "s3://key@bucket", "s3://key:hunter2/x@bucket/y"])
def test_a_password_in_an_address_is_refused_and_not_repeated(source: str) -> None:
    for ask in (
        lambda: resolve({"recipe": "tiny", "documents": [source]}),
        lambda: readers.snapshot_source(source, CurateConfig()),
    ):
        with pytest.raises(ConfigError) as told:
            ask()
        assert "hunter2" not in str(told.value) + told.value.advice
        assert "bucket" in told.value.message


# Data sets in a local folder, and what their cards may name


def _dataset(folder: Path, *, pattern: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text('{"text": "from the folder"}\n')
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {pattern}\n---\n"
    (folder / "README.md").write_text(card)
    return f"hf://{folder}?split=train"


def test_the_card_of_a_data_set_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "hunter2"}\n')
    assert _read(_dataset(tmp_path / "set", pattern="train.jsonl")) == (["from the folder"], {})
    for pattern in (str(tmp_path / "secret.jsonl"), "../secret.jsonl"):
        with pytest.raises(ConfigError, match="outside"):
            _read(_dataset(tmp_path / "set", pattern=pattern))
    (tmp_path / "set" / "linked.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(ConfigError, match="outside"):
        _read(_dataset(tmp_path / "set", pattern="linked.jsonl"))


@pytest.mark.parametrize("name", ["text", "json", "parquet", "imagefolder"])
def test_a_data_set_named_like_a_format_does_not_read_the_working_folder(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "here"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="names a file format"):
        _read(f"hf://{name}")


# The inputs from the field, when they are there


@pytest.mark.skipif(not WORLD.is_dir(), reason=f"the inputs from the field are not in {WORLD}")
def test_inputs_from_the_field_have_their_right_values(tmp_path: Path) -> None:
    assert _read(WORLD / "01_cut_frame.jsonl.zst")[1] == {"truncated_zstd": 1}
    assert _read(WORLD / "01_cut_frame.txt.zst") == ([], {"truncated_zstd": 1})
    assert _read(WORLD / "02_no_zstd.json.zst") == ([], {"damaged_compression": 1})
    texts, bad = _read(WORLD / "03_integer_of_5000_digits.jsonl")
    assert (len(texts), bad) in ((60, {}), (59, {"invalid_json": 1}))
    assert (len(_read(WORLD / "04_folder_one_file_lost")[0]), _read(WORLD / "04_folder_one_file_lost")[1]) == (500, {})
    assert len(_read(WORLD / "05_rows.parquet.gz")[0]) == 1
    assert len(_read(WORLD / "12_hidden_files")[0]) == 1
    assert len(_read(WORLD / "p1_separators.jsonl")[0]) == 3
    assert len(_read(WORLD / "p5_three_frames.jsonl.zst")[0]) == 30
    whole: dict[str, Any] = {**PLAIN, "heldout_fraction": 0.0}
    for profile in ("docs", "books"):
        found = []
        for ends in ("lf", "crlf"):
            source, name = str(WORLD / "06_line_ends" / ends), f"{profile}-{ends}"
            _, output = curated(tmp_path, name=name, documents=(source,), profile=profile, **whole)
            found.append([row["text"] for row in rows_of(output / "documents" / "train")])
        assert found[0] == found[1]
        assert len(found[0]) == 1
    (tmp_path / "text.txt").write_text(prose(1))
    lines = {**whole, "instructions": (str(WORLD / "04_lines_in_json.json"),)}
    _, output = curated(tmp_path, name="lines", documents=(str(tmp_path / "text.txt"),), **lines)
    assert len(rows_of(output / "instructions" / "train.jsonl.gz")) == 20


# Objects in S3, told by a client that holds them in memory


class _Bucket:
    """What reading asks of boto3's client; bodies are boto3's own."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def get_paginator(self, name: str) -> "_Bucket":
        assert name == "list_objects_v2"
        return self

    def paginate(self, *, Bucket: str, Prefix: str) -> list[dict[str, Any]]:
        found = {key: data for key, data in self.objects.items() if key.startswith(Prefix)}
        return [{"Contents": [{"Key": key, "Size": len(data), "ETag": f'"{key}"'} for key, data in found.items()]}]

    def get_object(self, *, Bucket: str, Key: str) -> dict[str, Any]:
        return {"Body": StreamingBody(io.BytesIO(self.objects[Key]), len(self.objects[Key]))}


def _in_s3(objects: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = _Bucket(objects)
    for module in ("storage", "streams"):
        monkeypatch.setattr(f"stages.data.sources.{module}.s3_client", lambda: bucket, raising=False)


def test_hidden_objects_are_passed_over_as_in_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("a.jsonl", "._a.jsonl", ".hidden/b.txt", ".ipynb_checkpoints/a-checkpoint.jsonl")
    _in_s3({f"corpus/{name}": b'{"text": "one"}\n' for name in names}, monkeypatch)
    assert _read("s3://bucket/corpus") == (["one"], {})
    found = readers.survey(CurateConfig(documents=("s3://bucket/corpus",)))
    assert [(entry.reason, entry.name) for entry in found.unread["s3://bucket/corpus"]] == [
        ("hidden", name) for name in names[1:]
    ]


def test_lines_of_an_object_are_not_read_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(json.dumps({"text": "word " * 20 + str(number)}).encode() + b"\n" for number in range(6000))
    _in_s3({"x.jsonl": lines, "y.jsonl.gz": gzip.compress(lines), "z.parquet": b"", "v.txt": b"v"}, monkeypatch)
    config = CurateConfig(documents=("s3://bucket/x.jsonl",))
    reads = 0
    whole = StreamingBody.read

    def counted(self: StreamingBody, amt: int | None = None) -> bytes:
        nonlocal reads
        reads += 1
        return whole(self, amt)

    monkeypatch.setattr(StreamingBody, "read", counted)
    records = [record for unit in readers.plan(config) for record in readers.read(unit, config)]
    assert len(records) == 6000
    assert reads < 10
    assert _read("s3://bucket/y.jsonl.gz")[1] == {}
    assert _read("s3://bucket/z.parquet")[1] == {"unreadable_parquet": 1}
    assert _read("s3://bucket/v.txt") == (["v"], {})


@pytest.mark.parametrize("name", ["", "Bad Bucket", "\u00fc", "x:y", "."])
def test_what_is_no_bucket_is_refused_before_anything_is_sent(name: str) -> None:
    with pytest.raises(ConfigError):
        readers.plan(CurateConfig(documents=(f"s3://{name}",)))


def test_a_word_list_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "a.txt").write_text(prose(1))
    settings: dict[str, Any] = {**PLAIN, "toxicity": "word-list", "toxicity_word_list": str(tmp_path / "words.txt.gz")}
    with pytest.raises(
        DataError, match=r"toxicity_word_list='.*words\.txt\.gz' cannot be read \(damaged_compression\)"
    ):
        curated(tmp_path, documents=(str(tmp_path / "a.txt"),), **settings)


def test_the_job_asks_again_where_a_model_lies(tmp_path: Path) -> None:
    from stages.models.given import base_model_dir, snapshot_base_model

    (tmp_path / "model").symlink_to("/etc")
    for address in ("/etc", "file:///etc", str(tmp_path / "model"), "file:///etc/artifacts/sft-model/f"):
        with pytest.raises(ConfigError, match=r"base_model=.*not open to sources"):
            snapshot_base_model(address)
        with pytest.raises(ConfigError, match=r"base_model=.*not open to sources"):
            base_model_dir(address, tmp_path / "cache")


def test_artifacts_by_address_lie_in_open_places() -> None:
    with pytest.raises(ConfigError, match=r"previous_data=.*not open to sources"):
        resolve({"recipe": "tiny", "previous_data": "file:///var/log/artifacts/curated/f"})
    with pytest.raises(ConfigError, match=r"model=.*not open to sources"):
        given_artifact("file:///proc/1/root/etc/artifacts/sft-model/f", field="model")


IMAGE_CARD = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n  - {name: image, dtype: image}\n---\n"


def test_a_row_of_a_data_set_opens_no_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "closed").write_text("no image: opening it would fail")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "README.md").write_text(IMAGE_CARD)
    image = {"path": str(tmp_path / "closed"), "bytes": None}
    (folder / "train.jsonl").write_text(json.dumps({"text": "a", "image": image}) + "\n")
    (row,) = read_hub(f"hf://{folder}")
    assert isinstance(row, Row)
    assert row.values == {"text": "a", "image": image}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("set.py", "raise SystemExit"),
        ("README.md", "---\n{bad: [yaml\n---\n"),
        ("README.md", "---\ndataset_info:\n  features:\n  - 5\n---\n"),
        ("README.md", "---\nconfigs:\n- data_files:\n  - {split: train, path: ['train.txt', null]}\n---\n"),
        ("dataset_infos.json", "[]"),
        ("train.tar", "no archive"),
        ("train.h5", "no file of that format"),
    ],
)
def test_a_data_set_that_cannot_be_loaded_is_the_fault_of_the_one_who_gave_it(
    tmp_path: Path, name: str, content: str
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    if not name.startswith("train"):
        (folder / "train.txt").write_text("text\n")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        list(read_hub(f"hf://{folder}"))


def test_a_damaged_file_of_a_data_set_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "train.txt.gz").write_text("not packed")
    (row,) = read_hub(f"hf://{tmp_path}")
    assert isinstance(row, BadRecord)
    assert row.reason == "unreadable_row"


class _Breaking:
    """A data set that gives one row and then meets an error, such as SIGTERM's or an outage."""

    features = None

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.config = SimpleNamespace(data_files=None)

    def as_streaming_dataset(self, *, split: str) -> "_Breaking":
        return self

    def __iter__(self) -> Iterator[dict[str, str]]:
        yield {"text": "first"}
        raise self.error


def test_a_stop_while_a_data_set_is_read_stays_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise Stopped("the job was asked to stop (SIGTERM)")

    monkeypatch.setattr("datasets.load_dataset_builder", stopped)
    with pytest.raises(Stopped):
        list(read_hub("hf://org/set"))
    monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: _Breaking(Stopped("SIGTERM")))
    with pytest.raises(Stopped):
        list(read_hub("hf://org/set"))


@pytest.mark.parametrize("kind", ["ConnectError", "ReadTimeout", "RemoteProtocolError"])
def test_an_outage_of_the_hub_is_retried_and_ends_no_data_set(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = getattr(httpx, kind)("the hub is away")

    def away(*_: Any, **__: Any) -> None:
        raise outage

    for loading in (away, lambda *_, **__: _Breaking(outage)):
        monkeypatch.setattr("datasets.load_dataset_builder", loading)
        with pytest.raises(StageError, match="the hub is away") as caught:
            list(read_hub("hf://org/set"))
        assert caught.value.category is Category.INFRASTRUCTURE


def test_a_hub_that_is_switched_off_is_the_fault_of_the_one_who_did_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hugging Face Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", off)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        list(read_hub("hf://org/set"))


class _BrokenBody:
    """A body that gives one line and then breaks off."""

    def __init__(self) -> None:
        self.blocks = [b'{"text": "one"}\n']

    def read(self, amt: int | None = None) -> bytes:
        if self.blocks:
            return self.blocks.pop()
        raise ReadTimeoutError(endpoint_url="https://store")


@pytest.mark.parametrize(
    "answer",
    [
        ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject"),
        ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"),
        EndpointConnectionError(endpoint_url="https://store"),
        None,
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.json", "x.parquet"])
def test_an_object_that_s3_does_not_give_is_told_in_words(
    name: str, answer: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def get_object(self, **_: Any) -> dict[str, Any]:
            if answer:
                raise answer
            return {"Body": _BrokenBody()}

    monkeypatch.setattr("stages.data.sources.streams.s3_client", Refusing)
    with pytest.raises(StageError, match=f"s3://bucket/{name}") as caught:
        read_whole(Stored(f"s3://bucket/{name}", name, 100), 1000)
    assert caught.value.advice
    if name != "x.txt":
        with pytest.raises(StageError, match=f"s3://bucket/{name}"):
            list(read_rows(Stored(f"s3://bucket/{name}", name, 100)))
