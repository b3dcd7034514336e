"""Spools that somebody else wrote, values that MLflow refuses, servers that say no: against a real MLflow server."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from stages.artifacts.addresses import run_key
from stages.artifacts.folder import FileStore
from stages.artifacts.s3_client import StoreError
from stages.config.errors import Category, StageError
from stages.config.graph import Stage
from stages.config.request import SourceEntry, SourceKind
from stages.tracking.__main__ import main as replay_main
from stages.tracking.client import connect
from stages.tracking.delivery import replay
from stages.tracking.registry import Registry, outage_is_infrastructure
from stages.tracking.spool import read_spool
from stages.tracking.tracker import Tracker
from tests.answering import answering
from tests.integration.test_mlflow import Tracked, make_tracked
from tests.pipeline_records import fingerprint_of, refs_for, request_for

pytestmark = pytest.mark.integration

SPOOL, ASIDE = "mlflow-spool.jsonl", "mlflow-spool.refused.jsonl"


@pytest.fixture
def tracked(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return make_tracked(tmp_path)


def plant(tracked: Tracked, stage: Stage, *lines: dict[str, Any] | str, **of_run: Any) -> str:
    """Write a spool as somebody with the bucket could; `of_run` changes what it says about its run."""
    request = request_for(stage, tracked.store, {}, run=tracked.run.model_copy(update=of_run))
    start = {"type": "start", "fingerprint": fingerprint_of(stage), "params": {}, "tags": {}, "time": 1}
    texts = [line if isinstance(line, str) else json.dumps(line) for line in (start, *lines)]
    key = run_key(tracked.run.run_id, stage, SPOOL)
    tracked.store.write_bytes(key, "\n".join([request.model_dump_json(), *texts]).encode() + b"\n")
    return key


def deliver(tracked: Tracked) -> int:
    return replay_main([tracked.run.run_id, "--store", tracked.store.root_uri])


def aside(tracked: Tracked, stage: Stage) -> list[dict[str, str]]:
    key = run_key(tracked.run.run_id, stage, ASIDE)
    return [json.loads(line) for line in tracked.store.read_bytes(key).splitlines()]


def files_of(run_id: str) -> list[str]:
    return [entry.path for entry in connect().list_artifacts(run_id)]


def test_a_planted_spool_sends_no_file_of_this_machine(tracked: Tracked, tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text("password")
    stolen = [
        {"type": "file", "path": "/proc/self/environ", "name": "environ.txt", "parent": False},
        {"type": "file", "path": str(tmp_path / "secrets.json"), "name": "secrets.json", "parent": False},
        {"type": "file", "attachment": "../../secrets.json", "name": "attached.json", "parent": False},
        {"type": "file", "attachment": "secrets.json", "name": "beside.json", "parent": False},
        {"type": "file", "content": "aGVsbG8=", "name": "../../out.txt", "parent": False},
        {"type": "file", "content": "aGVsbG8=", "name": "run.sh", "parent": False},
        {"type": "file", "content": "aGVsbG8=", "name": "hello.txt", "parent": False},
    ]
    key = plant(tracked, Stage.EVALUATE, *stolen)
    assert deliver(tracked) == 0
    [run] = tracked.children(Stage.EVALUATE)
    assert files_of(run.info.run_id) == ["hello.txt"]
    assert not tracked.store.exists(key)
    assert len(aside(tracked, Stage.EVALUATE)) == 6


def test_a_planted_spool_reaches_no_other_run(tracked: Tracked, tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    victim = make_tracked(tmp_path / "victim")
    victim.build(Stage.CURATE)
    parent = victim.client.get_run(victim.made[Stage.CURATE].mlflow_run_id).data.tags["mlflow.parentRunId"]
    before = victim.client.get_run(parent).data.tags
    line = {"type": "file", "content": "ZXZpbA==", "name": "report.html", "parent": True}
    plant(tracked, Stage.SFT, line, parent_run_id=parent, experiment=victim.run.experiment)
    assert deliver(tracked) == 0
    assert "report.html" not in files_of(parent)
    assert victim.client.get_run(parent).data.tags == before
    plant(tracked, Stage.SFT, line, run_id=victim.run.run_id, parent_run_id=parent, experiment=victim.run.experiment)
    assert deliver(tracked) == 0
    assert "report.html" not in files_of(parent)
    assert victim.children(Stage.SFT) == []
    assert "another folder" in aside(tracked, Stage.SFT)[-1]["reason"]


def test_a_planted_spool_sets_no_tag_that_decides_and_finishes_nothing_that_was_not_published(
    tracked: Tracked, tmp_path: Path
) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN)
    manifest = json.loads(tracked.store.read_bytes(f"{key_of(tracked, Stage.PRETRAIN)}/manifest.json"))
    forged = manifest | {"digest": "f" * 64, "metrics": {"eval/loss": 0.0}}
    start = {"type": "start", "fingerprint": fingerprint_of(Stage.PRETRAIN), "params": {}, "time": 1}
    plant(
        tracked,
        Stage.PRETRAIN,
        start | {"tags": {"mlflow.parentRunId": "0" * 32}},
        start | {"tags": {"athanor.run_id": "other"}},
        {"type": "finish", "manifest": forged, "history": "", "time": 2},
        {"type": "finish", "manifest": forged | {"kind": "sft-model"}, "history": "", "time": 2},
    )
    assert deliver(tracked) == 0
    [run] = tracked.children(Stage.PRETRAIN)
    assert run.data.tags["mlflow.parentRunId"] != "0" * 32
    assert run.data.metrics["eval/loss"] == 2.0
    assert run.data.tags["lineage.digest"] == tracked.made[Stage.PRETRAIN].digest
    assert len(aside(tracked, Stage.PRETRAIN)) == 4


def key_of(tracked: Tracked, stage: Stage) -> str:
    return tracked.made[stage].uri.removeprefix(f"{tracked.store.root_uri}/")


def test_damaged_lines_are_set_aside_and_hold_up_nothing(tracked: Tracked, caplog) -> None:
    lines = [
        "not json",
        "[" * 100_000,
        '{"type": "metrics", "step": ' + "9" * 5000 + "}",
        '{"type": "invented"}',
        "\0",
        {"type": "metrics", "step": 1, "values": {"train/loss": 1.5}, "time": 1_700_000_000_000},
        '{"type": "metrics", "step": 2, "values": {"train/loss": NaN}, "time": 1700000000000}',
    ]
    plant(tracked, Stage.SFT, *lines)
    with caplog.at_level(logging.ERROR):
        assert deliver(tracked) == 0
    [run] = tracked.children(Stage.SFT)
    assert [step for step, _ in tracked.points(run.info.run_id, "train/loss")] == [1, 2]
    assert len(aside(tracked, Stage.SFT)) == 5
    assert ASIDE in caplog.text


@pytest.mark.parametrize("content", [b"", b"\n", b"not json\n", b'{"stage": "sft"}\n', b"\xff\xfe\n", b"[]\n{}\n"])
def test_a_spool_without_a_request_is_set_aside_and_the_next_one_delivered(tracked: Tracked, content: bytes) -> None:
    broken = run_key(tracked.run.run_id, Stage.CURATE, SPOOL)
    tracked.store.write_bytes(broken, content)
    plant(tracked, Stage.SFT)
    assert deliver(tracked) == 0
    assert len(tracked.children(Stage.SFT)) == 1
    assert not tracked.store.exists(broken)


def test_a_long_source_costs_nothing_else(tracked: Tracked) -> None:
    uri = "s3://bucket/" + "department-of-very-long-names/" * 17 + "x" * 12
    source = SourceEntry(role="documents", kind=SourceKind.DATA, uri=uri, digest="5eed" + "0" * 60)
    run_id = finish_with(tracked, Stage.CURATE, metrics={"curate/documents": 7.0}, sources=(source,))
    run = tracked.client.get_run(run_id)
    assert run.data.metrics["curate/documents"] == 7.0
    assert run.data.tags["lineage.digest"]
    [dataset] = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source)["uri"] == uri
    shown = {tag.key: tag.value for tag in dataset.tags}["artifact.uri"]
    assert len(shown) <= 500
    assert f"cut: {len(uri)} characters" in shown
    parent = tracked.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert json.loads(parent.data.tags["athanor.stage.curate"])["mlflow_run_id"] == run_id


def finish_with(tracked: Tracked, stage: Stage, *, params: dict[str, str] | None = None, **fields: Any) -> str:
    request = request_for(stage, tracked.store, refs_for(stage, tracked.made), run=tracked.run)
    tracker = Tracker(request, tracked.root / f"spool-of-{stage.value}")
    tracker.start(fingerprint=fingerprint_of(stage), params=params or {}, tags={"airflow.task_id": stage.value})
    folder = tracked.root / f"made-{stage.value}"
    folder.mkdir()
    (folder / "content").write_text("x")
    from tests.pipeline_records import publish_artifact

    _, manifest = publish_artifact(tracked.store, stage, refs_for(stage, tracked.made), folder, **fields)
    run_id, _ = tracker.finish(manifest)
    assert run_id
    return run_id


def test_odd_and_long_params_are_cut_and_kept_whole_and_a_hundred_sources_all_get_their_tag(tracked: Tracked) -> None:
    params = {
        "weights.s3://b/a?x#y": "1",
        "a//b": "2",
        "../up": "3",
        "long": "x" * 20_000,
        "k" * 400: "4",
        "nul": "a\0b",
        "half": "a\ud800b",
    } | {f"many.{number}": "y" * 4990 + "ü" for number in range(250)}
    sources = tuple(
        SourceEntry(role="documents", kind=SourceKind.DATA, uri=f"file:///data/{number}", digest=f"{number:064}")
        for number in range(150)
    )
    run_id = finish_with(tracked, Stage.CURATE, params=params, sources=sources)
    run = tracked.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == len(params)
    assert (run.data.params["weights.s3:/-/b/a-x-y"], run.data.params["-/up"]) == ("1", "3")
    assert "cut: 20000 characters" in run.data.params["long"]
    assert len([key for key in run.data.tags if key.startswith("lineage.dataset.source.")]) == 150
    assert len(run.inputs.dataset_inputs) == 150
    path = tracked.client.download_artifacts(run_id, "shortened-values.json", str(tracked.root))
    assert json.loads(Path(path).read_text())["param long"] == "x" * 20_000


def test_a_deleted_experiment_is_told_as_what_it_is(tracked: Tracked, caplog, monkeypatch) -> None:
    tracked.build(Stage.CURATE)
    tracked.client.delete_experiment(tracked.experiment_id)
    monkeypatch.setattr("stages.tracking.tracker._FINISH_SECONDS", 60.0)
    with caplog.at_level(logging.WARNING):
        tracked.finish(Stage.TOKENIZE, tracked.tracker(Stage.TOKENIZE))
    assert "was deleted" in caplog.text
    assert f"mlflow experiments restore --experiment-id {tracked.experiment_id}" in caplog.text
    assert "does not answer" not in caplog.text
    with pytest.raises(StageError, match="was deleted") as caught, outage_is_infrastructure():
        Registry("demo", tracked.run.experiment)
    assert caught.value.category is Category.CONFIG
    assert deliver(tracked) == 1
    tracked.client.restore_experiment(tracked.experiment_id)
    assert deliver(tracked) == 0
    [run] = tracked.children(Stage.TOKENIZE)
    assert run.info.status == "FINISHED"


def test_a_run_that_is_deleted_while_its_stage_works_is_told_and_its_rest_waits(tracked: Tracked, caplog) -> None:
    tracker = tracked.tracker(Stage.CURATE)
    run_id = tracker.wait_run_id(120)
    assert run_id
    tracked.client.delete_run(run_id)
    with caplog.at_level(logging.WARNING):
        tracker.log({"train/loss": 1.0}, 1)
        tracked.finish(Stage.CURATE, tracker)
    assert f"mlflow runs restore --run-id {run_id}" in caplog.text
    tracked.client.restore_run(run_id)
    assert deliver(tracked) == 0
    assert tracked.client.get_run(run_id).info.status == "FINISHED"
    assert tracked.points(run_id, "train/loss") == [(1, 1.0)]


def test_a_deleted_pipeline_run_is_replaced(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE)
    parent = tracked.client.get_run(tracked.made[Stage.CURATE].mlflow_run_id).data.tags["mlflow.parentRunId"]
    tracked.client.delete_run(parent)
    tracked.run = tracked.run.model_copy(update={"parent_run_id": parent})
    tracked.build(Stage.TOKENIZE)
    tags = tracked.client.get_run(tracked.made[Stage.TOKENIZE].mlflow_run_id).data.tags
    assert tags["mlflow.parentRunId"] != parent


def test_a_run_that_a_replay_made_ends_though_its_spool_has_no_end(tracked: Tracked) -> None:
    measured = {"type": "metrics", "step": 1, "values": {"train/loss": 1.5}, "time": 1_700_000_000_000}
    plant(tracked, Stage.SFT, measured)
    plant(tracked, Stage.CURATE, measured, {"type": "fail", "message": "boom", "time": 2})
    tracked.build(Stage.TOKENIZE)
    plant(tracked, Stage.TOKENIZE, measured)
    running = tracked.tracker(Stage.EVALUATE)
    assert running.wait_run_id(120)
    plant(tracked, Stage.EVALUATE, measured)
    assert deliver(tracked) == 0
    ends = {
        stage: run.info.status
        for stage in (Stage.SFT, Stage.CURATE, Stage.TOKENIZE, Stage.EVALUATE)
        for run in tracked.children(stage)
    }
    assert list(ends.values()) == ["KILLED", "FAILED", "FINISHED", "RUNNING"]


@dataclass
class Storage:
    """What stands in front of MLflow answers every upload of a file with this status; 0 where it lets them pass."""

    status: int = 0


@pytest.fixture
def storage(tracked: Tracked, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """MLflow works, but for its storage of files."""
    storage = Storage()

    class InFront(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.command == "PUT" and storage.status:
                self._answer(storage.status, b"{}")
                return
            kind = {"Content-Type": self.headers.get("Content-Type") or "application/json"}
            found = httpx.request(self.command, mlflow_server + self.path, content=body, headers=kind, timeout=30)
            self._answer(found.status_code, found.content)

        do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    with answering(InFront) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        yield storage


@pytest.mark.parametrize("status", [500, 507, 403])
def test_files_that_the_storage_does_not_take_wait_and_hold_up_nothing(
    tracked: Tracked, storage: Storage, status: int, caplog
) -> None:
    storage.status = status
    tracker = tracked.tracker(Stage.CURATE)
    tracker.log_text("hello", "note.txt")
    tracker.log({"train/loss": 1.0}, 1)
    with caplog.at_level(logging.WARNING):
        run_id, _ = tracked.finish(Stage.CURATE, tracker)
    assert tracked.client.get_run(run_id).info.status == "FINISHED"
    assert tracked.points(run_id, "train/loss") == [(1, 1.0)]
    assert "storage did not take note.txt" in caplog.text
    assert deliver(tracked) == 1
    storage.status = 0
    assert deliver(tracked) == 0
    assert "note.txt" in files_of(str(run_id))
    assert tracked.client.get_run(run_id).info.status == "FINISHED"


def test_a_file_that_the_storage_never_takes_is_set_aside_whole(tracked: Tracked, storage: Storage) -> None:
    storage.status = 400
    tracker = tracked.tracker(Stage.CURATE)
    tracker.log_text("hello", "note.txt")
    run_id, _ = tracked.finish(Stage.CURATE, tracker)
    assert deliver(tracked) == 0
    assert tracked.client.get_run(run_id).info.status == "FINISHED"
    [kept] = aside(tracked, Stage.CURATE)
    assert "HTTP 400" in kept["reason"]
    assert json.loads(kept["what"])["content"] == "aGVsbG8="


def test_files_of_earlier_attempts_stay_in_the_store_until_they_are_taken(
    tracked: Tracked, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine's MLflow may need more than the usual 10 s for what it does take.
    monkeypatch.setattr("stages.tracking.tracker._FAIL_SECONDS", 120.0)
    storage.status = 500
    first = tracked.tracker(Stage.CURATE)
    first.log_text("hello", "note.txt")
    first.fail("boom")
    key = run_key(tracked.run.run_id, Stage.CURATE, SPOOL)
    assert [event.type for event in read_spool(tracked.store, key).events] == ["start", "file"]
    for _ in range(2):  # attempts that are killed as soon as they have begun
        assert tracked.tracker(Stage.CURATE).wait_run_id(120)
        assert [event.type for event in read_spool(tracked.store, key).events] == ["start", "file"]
    storage.status = 0
    run_id = tracked.tracker(Stage.CURATE).wait_run_id(120)
    assert files_of(str(run_id)) == ["note.txt"]
    assert not tracked.store.exists(key)


class Hiccup(FileStore):
    """A store that does not answer for some keys."""

    broken: tuple[str, ...] = ()

    def read_bytes(self, key: str) -> bytes:
        if key in self.broken:
            raise StoreError("the object store did not answer")
        return super().read_bytes(key)


def hiccup(tracked: Tracked, *keys: str) -> Hiccup:
    store = Hiccup(Path(tracked.store.root_uri.removeprefix("file://")))
    store.broken = keys
    return store


def test_a_spool_that_the_store_does_not_give_holds_up_no_other(tracked: Tracked) -> None:
    [one, other] = [plant(tracked, stage) for stage in (Stage.CURATE, Stage.SFT)]
    assert replay(hiccup(tracked, one), tracked.run.run_id) == [one]
    assert not tracked.store.exists(other)
    assert len(tracked.children(Stage.SFT)) == 1
    assert deliver(tracked) == 0


def test_a_finish_waits_while_the_store_does_not_give_its_manifest(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE)
    kept = f"{key_of(tracked, Stage.CURATE)}/manifest.json"
    manifest = json.loads(tracked.store.read_bytes(kept))
    key = plant(tracked, Stage.CURATE, {"type": "finish", "manifest": manifest, "history": "", "time": 2})
    assert replay(hiccup(tracked, kept), tracked.run.run_id) == [key]
    assert deliver(tracked) == 0


def test_a_closing_stage_is_tracked_though_the_store_does_not_give_what_others_left(
    tracked: Tracked, monkeypatch, caplog
) -> None:
    keys = [plant(tracked, stage) for stage in (Stage.CURATE, Stage.EVALUATE)]
    monkeypatch.setattr("stages.tracking.deliverer.open_store", lambda _uri: hiccup(tracked, *keys))
    with caplog.at_level(logging.WARNING):
        run_id, _ = tracked.finish(Stage.EVALUATE, tracked.tracker(Stage.EVALUATE))
    assert tracked.client.get_run(str(run_id)).info.status == "FINISHED"
    assert "the object store did not answer" in caplog.text
    assert all(tracked.store.exists(key) for key in keys)
