"""Keys, manifests and names that somebody made up to reach what is not theirs."""

import contextlib
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operators.dispatch import job_command
from operators.operator import ENTRYPOINT
from operators.prepare import load_config
from stages.artifacts.addresses import open_store
from stages.artifacts.folder import FileStore
from stages.artifacts.manifests import fetch, read_manifest, upload_files
from stages.artifacts.s3 import S3Store
from stages.artifacts.store import Store, read_json, write_json
from stages.config.errors import ConfigError, DamagedArtifactError, DataError, ExitCode
from stages.config.graph import Stage
from stages.config.recipes import tiny
from stages.config.request import FileEntry, RunInfo, run_folder, safe_run_id
from stages.config.resolve import resolve
from stages.job.runner import run_stage
from stages.job.scratch import scratch_folder
from tests.damaged import NO_RECORD
from tests.pipeline_records import request_for, tampered
from tests.unit.artifacts.test_manifests import make_artifact

OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "a//etc/passwd", "a/..", ".", "", "a/./b", "a\0b", "artifacts/"]


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The S3 store points at nothing: a key that is refused is refused before anything is sent."""
    if request.param == "file":
        return open_store((tmp_path / "store").as_uri())
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr("boto3.DEFAULT_SESSION", None)  # it would keep these keys for the tests that follow
    return open_store("s3://bucket/prefix")


@pytest.mark.parametrize("key", OUTSIDE)
def test_no_key_leads_out_of_the_store(store: Store, key: str, tmp_path: Path) -> None:
    assert isinstance(store, FileStore | S3Store)
    (tmp_path / "x").write_text("theirs")
    for reach in (store.exists, store.size, store.read_bytes, store.delete, lambda k: store.write_bytes(k, b"")):
        with pytest.raises(ConfigError, match="leaves the store"):
            reach(key)
    with pytest.raises(ConfigError, match="leaves the store"):
        store.put_if_absent(key, b"")
    with pytest.raises(ConfigError, match="leaves the store"):
        store.download(key, tmp_path / "copy")
    assert (tmp_path / "x").read_text() == "theirs"


def test_no_link_leads_out_of_a_folder_store(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("theirs")
    (tmp_path / "store" / "runs").mkdir(parents=True)
    (tmp_path / "store" / "runs" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "store" / "runs" / "file").symlink_to(tmp_path / "outside" / "secret")
    for key in ("runs/link/secret", "runs/file"):
        for reach in (store.read_bytes, store.delete, store.local_path, lambda k: store.write_bytes(k, b"ours")):
            with pytest.raises(ConfigError, match="through a link"):
                reach(key)
    assert (tmp_path / "outside" / "secret").read_text() == "theirs"


def test_no_link_makes_one_object_stand_for_another(tmp_path: Path) -> None:
    """Otherwise deleting the one, because it is damaged, deletes the other."""
    store = open_store((tmp_path / "store").as_uri())
    store.write_bytes("artifacts/tokens/a/x", b"theirs")
    (tmp_path / "store" / "artifacts" / "tokens" / "b").symlink_to(tmp_path / "store" / "artifacts" / "tokens" / "a")
    (tmp_path / "store" / "artifacts" / "tokens" / "a" / "y").symlink_to(tmp_path / "store/artifacts/tokens/a/x")
    for key in ("artifacts/tokens/b", "artifacts/tokens/b/x", "artifacts/tokens/a/y"):
        with pytest.raises(ConfigError, match="through a link"):
            store.delete(key)
    assert list(store.list("artifacts")) == ["artifacts/tokens/a/x"]
    assert [entry.key for entry in store.listing()] == ["artifacts/tokens/a/x"]


def test_what_is_no_regular_file_is_no_object(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "store" / "runs" / "folder").mkdir(parents=True)
    (tmp_path / "store" / "runs" / "file").write_text("x")
    os.mkfifo(tmp_path / "store" / "runs" / "pipe")
    with pytest.raises(ConfigError, match="not a regular file"):  # it would wait for a writer for ever
        store.read_bytes("runs/pipe")
    for key in ("runs/folder", "runs/file/x", "runs/nothing"):
        with pytest.raises(FileNotFoundError):
            store.read_bytes(key)
    assert list(store.list("runs")) == ["runs/file"]
    assert [entry.key for entry in store.listing()] == ["runs/file"]
    with pytest.raises(ConfigError, match="more than 255 bytes"):
        store.read_bytes(f"runs/{'x' * 300}")


def test_a_socket_is_no_object(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "store" / "runs").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        with contextlib.chdir(tmp_path / "store" / "runs"):  # the address of a socket is short
            listener.bind("socket")
        with pytest.raises(ConfigError, match="not a regular file"):
            store.read_bytes("runs/socket")


@pytest.mark.parametrize("key", ["runs/" + "x" * 222, "runs/" + "ä" * 120, "runs/" + "/".join(["x" * 200] * 25)])
def test_a_name_that_no_folder_can_hold_is_refused_before_anything_is_written(tmp_path: Path, key: str) -> None:
    """While it is written, an object has a longer name."""
    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "x").write_text("x")
    for write in (store.write_bytes, store.put_if_absent):
        with pytest.raises(ConfigError, match=r"more than \d+ bytes"):
            write(key, b"x")
    with pytest.raises(ConfigError, match=r"more than \d+ bytes"):
        store.upload(tmp_path / "x", key)
    assert not (tmp_path / "store").exists()
    store.write_bytes("runs/" + "x" * 221, b"x")


def test_a_path_that_is_too_long_is_refused_when_it_is_read(tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    for read in (store.exists, store.size, store.read_bytes, store.delete):
        with pytest.raises(ConfigError, match=r"more than \d+ bytes"):
            read("runs/" + "/".join(["x" * 200] * 25))


NO_RECORDS = [
    *NO_RECORD,
    b'{"stage": "sft", "sources": [[]], "inputs": []}',
    b'{"stage": "gremlins"}',
    b'{"field_of_another_version": 1}',
]


@pytest.mark.parametrize("record", NO_RECORDS)
def test_a_request_that_is_none_ends_its_job_as_data_and_is_named(
    tmp_path: Path, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path.as_uri())
    store.write_bytes("runs/r/sft/config.json", record)
    uri = f"{store.root_uri}/runs/r/sft/config.json"
    assert run_stage(uri, lambda stage: pytest.fail("nothing to run")) == ExitCode.DATA
    assert f"{uri} is not a valid StageRequest" in caplog.text
    assert "one version of Athanor in Airflow and on the cluster" in caplog.text
    assert "Delete it" not in caplog.text


@pytest.mark.parametrize(
    "changes", [{"seed": "x"}, {"gremlin": 1}, {"optimizer": {"learning_rate": "Infinity"}}, {"loss": 7}]
)
def test_settings_that_no_stage_has_end_its_job_as_config(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(tmp_path.as_uri())
    request = request_for(Stage.DPO, store, {}, tiny().dpo).model_dump(mode="json")
    request["config"] |= changes
    write_json(store, "runs/manual-1/dpo/config.json", request)
    uri = f"{store.root_uri}/runs/manual-1/dpo/config.json"
    assert run_stage(uri, lambda stage: pytest.fail("nothing to run")) == ExitCode.CONFIG
    assert "the stored configuration of dpo is not valid: " in caplog.text


@pytest.mark.parametrize("record", NO_RECORDS)
def test_a_configuration_of_a_run_that_is_none_is_named_and_not_retried(tmp_path: Path, record: bytes) -> None:
    store = open_store(tmp_path.as_uri())
    store.write_bytes("runs/r/pipeline.json", record)
    with pytest.raises(DataError, match=r"runs/r/pipeline\.json is not a valid PipelineConfig"):
        load_config(store, RunInfo(run_id="r", name="n"))


@pytest.mark.parametrize("record", [record for record in NO_RECORD if record != b"{}"])
def test_json_that_is_none_is_named(tmp_path: Path, record: bytes) -> None:
    store = open_store(tmp_path.as_uri())
    store.write_bytes("retrain/n.json", record)
    with pytest.raises(DataError, match=r"retrain/n\.json "):
        read_json(store, "retrain/n.json")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "Infinity", "-inf", "1e999", 1e999])
@pytest.mark.parametrize("path", ["sft.optimizer.learning_rate", "dpo.beta", "execution.sft.stall_seconds"])
def test_no_setting_is_infinite(path: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        resolve({"recipe": "tiny", "overrides": {path: value}})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": [{"path": "/etc/cron.d/job", "size": 1, "sha256": "0" * 64}]}, "leaves the artifact"),
        ({"files": [{"path": "../../x", "size": 1, "sha256": "0" * 64}]}, "leaves the artifact"),
        ({"files": [{"path": "a\\..\\b", "size": 1, "sha256": "0" * 64}]}, "leaves the artifact"),
        ({"kind": "/etc"}, "not a folder name"),
        ({"kind": "../.."}, "not a folder name"),
        ({"digest": "/root"}, "not a folder name"),
        ({"fingerprint": ".."}, "not a folder name"),
    ],
)
def test_a_manifest_cannot_write_outside_the_cache(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri())
    assert isinstance(store, FileStore)
    ref = make_artifact(store, tmp_path)
    tampered(ref, **changes)
    with pytest.raises(DamagedArtifactError, match=says):
        fetch(ref, tmp_path / "cache")


def test_files_that_were_changed_together_with_the_manifest_are_noticed(tmp_path: Path) -> None:
    """Whoever may write to the store can rewrite a manifest; the digest that Airflow carries tells."""
    store = open_store((tmp_path / "store").as_uri())
    assert isinstance(store, FileStore)
    ref = make_artifact(store, tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "a.txt").write_text("evil")
    files = upload_files(store, tmp_path / "evil", kind="tokens", fingerprint="f" * 64)
    kept = [entry for entry in read_manifest(ref).files if entry.path != "a.txt"]
    tampered(ref, files=[entry.model_dump() for entry in (*files, *kept)])
    with pytest.raises(DamagedArtifactError, match="the run expects"):
        fetch(ref, tmp_path / "cache")


def test_usual_paths_of_files_stay_possible() -> None:
    for path in ("a", "a/b.bin", "documents/train/0.jsonl.gz", "..a", "a..b", ".hidden"):
        assert FileEntry(path=path, size=0, sha256="").path == path


def test_a_scratch_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp/athanor-<uid> can be made by anybody on the machine."""
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    with scratch_folder() as folder:
        assert folder.parent == tmp_path / "scratch"
    assert (tmp_path / "scratch").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "scratch").stat().st_uid + 1)
    with pytest.raises(ConfigError, match="belongs to user"), scratch_folder():
        pass


INJECTIONS = [
    "a; touch x",
    "$(touch x)",
    "`touch x`",
    "../x",
    "a/b",
    "{{ 7 * 7 }}",
    "' OR 1=1 --",
    "a\nb",
    "a\n",
    "-rf",
    ".",
]


@pytest.mark.parametrize("name", INJECTIONS)
def test_a_run_name_holds_nothing_that_anybody_could_obey(name: str) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        resolve({"recipe": "tiny", "run_name": name})


@pytest.mark.parametrize(
    "path", ["__class__", "sft.__init__", "sft.__dict__.x", "curate.__class__.__name__", "given", "sft..seed"]
)
def test_an_override_sets_fields_of_the_configuration_and_nothing_else(path: str) -> None:
    with pytest.raises(ConfigError):
        resolve({"recipe": "tiny", "overrides": {path: "x"}})


@pytest.mark.parametrize("folder_of", [lambda name: run_folder(name, name), safe_run_id])
@pytest.mark.parametrize("name", ["..", ".", "...", "../../x", "a/../b", "a b", "$(x)", "a'b", ".\n"])
def test_a_run_id_is_one_folder(folder_of: Callable[[str], str], name: str) -> None:
    """Airflow's own rule for run ids, which an administrator may change, allows dots. Older folders have no hash."""
    made = folder_of(name)
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", made)
    assert made.strip(".")


@pytest.mark.parametrize("root", ["s3://b/a b", "s3://b/$(touch x)", "s3://b/;touch x", "s3://b/`x`", "s3://b/'x'"])
def test_a_store_uri_is_one_word_of_the_jobs_command(root: str, tmp_path: Path) -> None:
    import shlex

    uri = f"{root}/runs/r/sft/config.json"
    command = job_command(ENTRYPOINT, uri, digest="f" * 64)
    assert shlex.split(command)[-4:] == ["python", "-m", "stages", uri]
