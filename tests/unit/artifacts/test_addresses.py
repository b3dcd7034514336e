"""Addresses of stores: every character counts, and what is no store is refused in a sentence."""

import json
from pathlib import Path

import pytest

from stages.artifacts.addresses import open_store, split_artifact_uri
from stages.artifacts.folder import FileStore
from stages.artifacts.s3 import S3Store
from stages.config.errors import ConfigError
from tests.places import SHARED

ADDRESSES = SHARED / "cases" / "world" / "13_addresses.json"


@pytest.mark.parametrize("prefix", ["exp#1", "exp?v=2", "a/b c", "100%", "a%23b", "ü", "", "a/@b:c"])
def test_every_character_of_a_prefix_counts(prefix: str) -> None:
    store = open_store(f"s3://bucket/{prefix}")
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == ("bucket", prefix)
    again, key = split_artifact_uri(f"{store.root_uri}/artifacts/tokens/f")
    assert (again.root_uri, key) == (store.root_uri, "artifacts/tokens/f")


def test_every_character_of_a_folder_counts(tmp_path: Path) -> None:
    for name in ("exp#1", "exp?v=2", "a b", "100%", "%41", "ü"):
        folder = tmp_path / name
        for address in (folder.as_uri(), f"file://{tmp_path}/{name}" if "%" not in name else folder.as_uri()):
            store = open_store(address)
            assert isinstance(store, FileStore)
            assert store.root == folder
            assert open_store(store.root_uri).root_uri == store.root_uri


@pytest.mark.skipif(not ADDRESSES.is_file(), reason=f"the inputs from the field are not in {ADDRESSES.parent}")
def test_addresses_from_the_field_are_not_cut() -> None:
    for address in json.loads(ADDRESSES.read_text())["artifact_store"]:
        assert open_store(address).root_uri == address


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/data",
        "s3://",
        "s3:///prefix",
        "file://",
        "file://data",
        "file://host/data",
        "http://x/y",
        "s3://a b/c",
        "s3://bucket/a\nb",
        "s3://buc\tket/a",
        "file:///a\x00b",
        "s3://bucket/a/../b",
        "s3://bucket/.",
        "s3://b�/x",
    ],
)
def test_what_is_no_store_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="ARTIFACT_STORE"):
        open_store(address)


@pytest.mark.parametrize("address", ["s3://key:hunter2@bucket/x", "s3://hunter2@bucket", "s3://key:hunter2/x@bucket"])
def test_a_login_in_a_store_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(ConfigError, match="a user or a password") as told:
        open_store(address)
    assert "hunter2" not in str(told.value) + told.value.advice
