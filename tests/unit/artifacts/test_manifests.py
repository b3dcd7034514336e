"""Fingerprints cover what decides a result and nothing else; artifacts exist with their manifest or not at all, on a
folder and on two very different S3 servers."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest

from stages.artifacts.addresses import open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.manifests import (
    content_digest,
    fetch,
    find_intact,
    find_manifest,
    fingerprint,
    is_doubted,
    publish,
    read_file,
    upload_files,
    verify,
)
from stages.artifacts.s3 import S3Store
from stages.artifacts.store import Store
from stages.config.errors import ConfigError, DamagedArtifactError
from stages.config.graph import Stage, pipeline_stages
from stages.config.recipes import tiny
from stages.config.request import ArtifactRef, Manifest
from stages.config.train import SFTConfig


def manifest(files: tuple, *, identity: str = "f" * 64) -> Manifest:
    return Manifest(
        kind="tokens",
        stage=Stage.TOKENIZE,
        version=1,
        fingerprint=identity,
        digest=content_digest(files),
        files=files,
        inputs=(),
        config={},
        execution={},
        created_at="2026-01-01T00:00:00+00:00",
    )


def make_artifact(store: Store, tmp_path: Path) -> ArtifactRef:
    folder = tmp_path / "output"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("alpha")
    (folder / "inner" / "b.bin").write_bytes(bytes(range(256)))
    files = upload_files(store, folder, kind="tokens", fingerprint="f" * 64)
    return publish(store, manifest(files))


@pytest.fixture
def store(every_store: str) -> Store:
    return open_store(every_store)


REF = ArtifactRef(kind="tokens", uri=f"file:///x/artifacts/tokens/{'a' * 64}", fingerprint="a" * 64, digest="d" * 64)
SOURCES = {"hf://x": "1"}


def sft(settings: SFTConfig | None = None, *, stage: Stage = Stage.SFT, **asked: Any) -> str:
    return fingerprint(stage, settings or tiny().sft, **{"inputs": {"tokens": REF}, "store_uri": "file:///x", **asked})


def test_the_same_settings_have_the_same_fingerprint() -> None:
    assert sft() == sft()


def test_a_setting_an_input_and_a_source_each_change_the_fingerprint() -> None:
    other = "b" * 64
    other_input = REF.model_copy(update={"fingerprint": other, "uri": f"file:///x/artifacts/tokens/{other}"})
    variants = {
        sft(tiny().sft.model_copy(update={"num_epochs": 3.0})),
        sft(inputs={"tokens": other_input}),
        sft(inputs={"model": REF}),
        sft(sources=SOURCES),
        sft(stage=Stage.DPO),
        sft(with_content=True),
    }
    assert len(variants) == 6
    assert sft() not in variants


def test_where_the_store_lies_does_not_matter() -> None:
    moved = REF.model_copy(update={"uri": f"s3://elsewhere/artifacts/tokens/{'a' * 64}", "mlflow_run_id": "1"})
    assert sft() == sft(inputs={"tokens": moved}, store_uri="s3://elsewhere")


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://elsewhere/artifacts/tokens/{'a' * 64}",
        f"file:///x/runs/r/artifacts/tokens/{'a' * 64}",
        f"file:///x/artifacts/curated/{'a' * 64}",
        f"file:///x/artifacts/tokens/{'b' * 64}",
    ],
)
def test_an_artifact_from_elsewhere_counts_by_its_content_and_not_by_the_fingerprint_that_it_claims(uri: str) -> None:
    claims = REF.model_copy(update={"uri": uri})
    renamed = claims.model_copy(update={"fingerprint": "e" * 64})
    assert sft(inputs={"tokens": claims}) == sft(inputs={"tokens": renamed}) != sft()
    forged = claims.model_copy(update={"digest": "e" * 64})
    assert sft(inputs={"tokens": forged}) != sft(inputs={"tokens": claims})


def test_no_execution_setting_is_in_a_stage_config() -> None:
    """The fingerprint covers the whole stage config, so resources must not be there."""
    execution = set(tiny().execution.pretrain.model_dump())
    for stage in pipeline_stages():
        assert not execution & set(tiny().stage_config(stage).model_dump()), stage


def test_files_without_a_manifest_are_no_artifact(store: Store, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "a.txt").write_text("alpha")
    upload_files(store, tmp_path / "output", kind="tokens", fingerprint="f" * 64)
    assert find_manifest(store, "tokens", "f" * 64) is None


def test_of_what_is_not_wanted_nothing_is_fetched_or_verified(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    damaged = f"artifacts/tokens/{'f' * 64}/inner/b.bin"
    store.delete(damaged)
    store.write_bytes(damaged, b"other")
    folder = fetch(ref, tmp_path / "cache", wanted=lambda path: path == "a.txt")
    assert (folder / "a.txt").read_text() == "alpha"
    assert not (tmp_path / "cache").exists() or not (folder / "inner").exists()
    with pytest.raises(DamagedArtifactError):
        fetch(ref, tmp_path / "cache")


def test_publish_verify_fetch(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    found = find_manifest(store, "tokens", "f" * 64)
    assert found is not None
    verify(store, found, hashes=True)
    assert (fetch(ref, tmp_path / "cache") / "inner" / "b.bin").read_bytes() == bytes(range(256))


def test_a_changed_byte_is_named_when_it_is_read(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    store.write_bytes(f"artifacts/tokens/{'f' * 64}/a.txt", b"alphA")
    with pytest.raises(DamagedArtifactError, match=r"a\.txt does not have the content"):
        fetch(ref, tmp_path / "cache")


def test_a_missing_and_a_short_file_are_named_by_the_cheap_check(store: Store, tmp_path: Path) -> None:
    make_artifact(store, tmp_path)
    found = find_manifest(store, "tokens", "f" * 64)
    assert found is not None
    key = f"artifacts/tokens/{'f' * 64}/a.txt"
    store.write_bytes(key, b"alp")
    with pytest.raises(DamagedArtifactError, match=r"a\.txt has 3 bytes, its manifest says 5"):
        verify(store, found)
    store.delete(key)
    with pytest.raises(DamagedArtifactError, match=r"a\.txt is missing"):
        verify(store, found)


def test_the_first_manifest_wins(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    late = manifest((), identity="f" * 64)
    assert publish(store, late).digest == ref.digest


def test_one_of_many_writers_creates_a_key(store: Store) -> None:
    results = [store.put_if_absent("runs/x/lease", str(i).encode()) for i in range(5)]
    assert results == [True, False, False, False, False]
    assert store.read_bytes("runs/x/lease") == b"0"


def test_keys_cannot_leave_the_store(store: Store) -> None:
    with pytest.raises(ConfigError, match="leaves the store"):
        store.write_bytes("../outside", b"x")


@pytest.mark.parametrize("uri", ["", "relative/path", "http://host/x", "s3://"])
def test_an_unusable_store_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="ARTIFACT_STORE"):
        open_store(uri)


def test_a_manifest_survives_its_json(store: Store, tmp_path: Path) -> None:
    make_artifact(store, tmp_path)
    raw = store.read_bytes(f"artifacts/tokens/{'f' * 64}/manifest.json")
    assert Manifest.model_validate(json.loads(raw)).files[0].path == "a.txt"


class CopyingStore(FileStore):
    """A store whose files cannot be read in place, like S3."""

    def local_path(self, key: str) -> Path | None:
        return None


def test_a_damaged_local_copy_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CopyingStore(tmp_path / "store")
    monkeypatch.setattr("stages.artifacts.addresses.open_store", lambda uri: store)
    ref = make_artifact(store, tmp_path)
    copy = fetch(ref, tmp_path / "cache") / "a.txt"
    copy.write_text("stale")
    assert (fetch(ref, tmp_path / "cache") / "a.txt").read_text() == "alpha"


def test_a_damaged_artifact_is_no_hit_and_is_removed(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_artifact(store, tmp_path)
    assert find_intact(store, "tokens", "f" * 64) is not None
    store.delete(f"artifacts/tokens/{'f' * 64}/a.txt")
    assert find_intact(store, "tokens", "f" * 64) is None
    assert "a.txt is missing" in caplog.text
    assert "It is removed and built again." in caplog.text
    assert find_manifest(store, "tokens", "f" * 64) is None


def with_an_unlisted_file(root: Path) -> tuple[ArtifactRef, Path]:
    """An artifact whose files are copied or linked next to the cache, because something else lies in its folder."""
    store = FileStore(root / "store")
    ref = make_artifact(store, root)
    store.write_bytes(f"artifacts/tokens/{'f' * 64}/more.txt", b"theirs")
    return ref, root / "cache" / "tokens" / ref.digest / "a.txt"


def test_workers_that_share_a_cache_do_not_meet_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, copy = with_an_unlisted_file(tmp_path)
    link = os.link

    def after_another_worker(source: Path, target: Path) -> None:
        copy.unlink(missing_ok=True)
        link(tmp_path / "store" / "artifacts" / "tokens" / ("f" * 64) / "a.txt", copy)
        link(source, target)

    monkeypatch.setattr(os, "link", after_another_worker)
    assert (fetch(ref, tmp_path / "cache") / "a.txt").read_text() == "alpha"
    assert sorted(path.name for path in copy.parent.rglob("*")) == ["a.txt", "b.bin", "inner"]


def test_a_cache_on_another_disk_changes_no_file_that_another_worker_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, copy = with_an_unlisted_file(tmp_path)
    copy.parent.mkdir(parents=True)
    copy.write_text("stale")

    read: list[tuple[str, IO[str]]] = []

    def another_disk(source: Path, target: Path) -> None:
        if not copy.exists():
            copy.write_text("other")
        read.append((copy.read_text(), copy.open()))
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", another_disk)
    assert (fetch(ref, tmp_path / "cache") / "a.txt").read_text() == "alpha"
    for content, file in read:
        with file:
            assert file.read() == content
    assert sorted(path.name for path in copy.parent.rglob("*")) == ["a.txt", "b.bin", "inner"]


def flip_a_bit(store: Store, key: str) -> None:
    data = bytearray(store.read_bytes(key))
    data[0] ^= 1
    store.write_bytes(key, bytes(data))


def test_what_a_reader_found_damaged_is_no_hit_any_more_though_its_size_is_right(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    flip_a_bit(store, f"artifacts/tokens/{'f' * 64}/a.txt")
    assert find_intact(store, "tokens", "f" * 64) is not None
    with pytest.raises(DamagedArtifactError, match=r"a\.txt does not have the content"):
        fetch(ref, tmp_path / "cache")
    assert is_doubted(store, "tokens", "f" * 64)
    assert find_intact(store, "tokens", "f" * 64) is None
    assert list(store.list("artifacts")) == []


def test_a_doubt_that_proves_wrong_is_forgotten(store: Store, tmp_path: Path) -> None:
    ref = make_artifact(store, tmp_path)
    flip_a_bit(store, f"artifacts/tokens/{'f' * 64}/a.txt")
    with pytest.raises(DamagedArtifactError):
        read_file(ref, "a.txt")
    flip_a_bit(store, f"artifacts/tokens/{'f' * 64}/a.txt")
    assert find_intact(store, "tokens", "f" * 64) is not None
    assert not is_doubted(store, "tokens", "f" * 64)


def test_of_eight_publishers_at_once_one_wins_where_the_server_can_and_the_artifact_is_whole(
    store: Store, tmp_path: Path
) -> None:
    """Without a lease; with it there is one on every server, as test_lease_s3 shows."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "a.txt").write_text("alpha")
    start = threading.Barrier(8)

    def build(number: int) -> tuple[str, str]:
        files = upload_files(store, tmp_path / "output", kind="tokens", fingerprint="f" * 64)
        mine = manifest(files).model_copy(update={"metrics": {"builder": float(number)}, "digest": f"{number}" * 64})
        start.wait()
        return mine.digest, publish(store, mine).digest

    with ThreadPoolExecutor(max_workers=8) as pool:
        results = list(pool.map(build, range(8)))
    found = find_manifest(store, "tokens", "f" * 64)
    assert found is not None
    verify(store, found, hashes=True)
    winners = [mine for mine, published in results if mine == published]
    assert found.digest in winners
    if not isinstance(store, S3Store) or "swift" not in os.environ.get("PYTEST_CURRENT_TEST", ""):
        assert winners == [found.digest]
        assert {published for _, published in results} == {found.digest}
