"""Store addresses and run ids: an address is a store or a sentence, and two runs never share a folder."""

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from operators.given import given_artifact
from stages.artifacts.addresses import artifact_uri, open_store, split_artifact_uri
from stages.artifacts.folder import FileStore
from stages.artifacts.store import check_key
from stages.config.errors import StageError
from stages.config.request import RunInfo, run_folder
from tests.fuzz.cases import cases, confined, outcome

_ADDRESSES = st.one_of(
    st.text(max_size=40),
    st.builds(
        "{}://{}{}".format,
        st.sampled_from(["file", "s3", "S3", "http", "hf", "models", "", "file:"]),
        st.sampled_from(["", "bucket", "user:hunter2@bucket", "[::1]", "a b", "BUCKET", "..", "bucket:80", "ü"]),
        st.text(alphabet="/.ab #?%&=\\:@~\0é\n", max_size=20),
    ),
)
_NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=20)


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "ARTIFACT_STORE"):
        monkeypatch.delenv(name, raising=False)


@cases
@given(_ADDRESSES)
@example("s3://user:hunter2@bucket/prefix")
@example("s3://bucket/a#b?c")
def test_any_address_is_a_store_or_a_sentence(tmp_path: Path, address: str) -> None:
    with confined(tmp_path):
        store = outcome(lambda: open_store(address))
    if isinstance(store, StageError):
        assert "://user:hunter2@" not in address or "hunter2" not in store.message
        return
    assert open_store(store.root_uri).root_uri == store.root_uri
    assert "hunter2" not in store.root_uri


@cases
@given(_ADDRESSES)
def test_any_address_of_an_artifact_is_refused_in_a_sentence(tmp_path: Path, address: str) -> None:
    if address.startswith("s3://"):
        return  # asked of a server
    with confined(tmp_path):
        outcome(lambda: given_artifact(address, field="base_model"))


@cases
@given(_NAMES.filter(lambda name: name not in (".", "..")))
@example("a#b")
@example("a?b%20c d")
def test_a_folder_store_keeps_its_address_whatever_its_name(tmp_path: Path, name: str) -> None:
    root = tmp_path / name
    if len(os.fsencode(name)) > 200:
        return
    store = FileStore(root)
    again = open_store(store.root_uri)
    assert isinstance(again, FileStore)
    assert again.root == root
    found, key = split_artifact_uri(artifact_uri(store, "tokens", "f" * 64))
    assert isinstance(found, FileStore)
    assert (found.root, key) == (root, f"artifacts/tokens/{'f' * 64}")
    assert open_store(f"file://{quote(str(root))}").root_uri == store.root_uri


@cases
@given(st.text(alphabet="ab/.\\\0#?% ", max_size=20))
def test_no_key_leads_out_of_a_store(tmp_path: Path, key: str) -> None:
    root = tmp_path / "store"
    if isinstance(outcome(lambda: check_key(key, root.as_uri())), StageError):
        return
    assert Path(os.path.normpath(root / key)).is_relative_to(root)


@cases
@given(st.lists(st.tuples(st.sampled_from(["llm_pipeline", "retrain", "a/b"]), st.text(max_size=300)), max_size=4))
@example([("a", "nightly+2026"), ("a", "nightly:2026"), ("a", "nightly~2026"), ("b", "nightly-2026")])
@example([("a", "b/c"), ("a/b", "c"), ("", ""), (".", "..")])
def test_no_two_runs_share_a_folder(runs: list[tuple[str, str]]) -> None:
    folders = {run: run_folder(*run) for run in runs}
    assert len(set(map(str.casefold, folders.values()))) == len(set(runs))
    for folder in folders.values():
        check_key(f"runs/{folder}/owner.json", "file:///store")
        assert RunInfo(run_id=folder, name="nightly").run_id == folder
        assert len(os.fsencode(folder)) < 200
