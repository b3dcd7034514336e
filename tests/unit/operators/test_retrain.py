"""Whether to retrain and with what: a real store and folder, a small server for the registry."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import Asset

from operators.prepare import params_key
from operators.retrain import Go, Skip, announced_data, decide, read_watermark, record
from stages.artifacts.addresses import open_store
from stages.artifacts.store import write_json
from stages.config.errors import ConfigError, StageError
from stages.config.forms import RetrainParams
from stages.config.resolve import resolve

CHAMPION_PARAMS = {"recipe": "tiny", "run_name": "athanor", "seed": 7, "overrides": {"sft.num_epochs": 1}}


class World:
    def __init__(self, root: Path) -> None:
        self.raw = root / "raw"
        self.raw.mkdir()
        self.store = open_store((root / "store").as_uri())
        self.champion: dict[str, Any] | None = {
            "version": "3",
            "tags": [
                {"key": "artifact.uri", "value": "file:///s/artifacts/dpo-model/ab"},
                {"key": "airflow.run_id", "value": "manual__2026-01-01T00:00:00+00:00"},
            ],
        }
        write_json(self.store, params_key("manual__2026-01-01T00-00-00-00-00"), CHAMPION_PARAMS)

    def decide(self, *announced: str, **params: Any) -> Skip | Go:
        return decide(RetrainParams(**params), announced=announced)

    def go(self, *announced: str, **params: Any) -> Go:
        verdict = self.decide(*announced, **params)
        assert isinstance(verdict, Go), verdict
        return verdict


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path)

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if world.champion else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"model_version": world.champion}).encode())

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("ARTIFACT_STORE", world.store.root_uri)
    monkeypatch.setenv("ATHANOR_RETRAIN_WATCH", world.raw.as_uri())
    yield world
    server.shutdown()
    server.server_close()


def test_new_documents_continue_from_the_champion_with_the_settings_of_its_run(world: World):
    (world.raw / "a.txt").write_text("text")
    conf = world.go(overrides={"sft.seed": 1}).conf
    assert conf == {
        **CHAMPION_PARAMS,
        "base_model": "models:/athanor-aligned/3",
        "continue_pretraining": True,
        "previous_data": "models:/athanor-aligned/3",
        "documents": [world.raw.as_uri()],
        "instructions": [],
        "preferences": [],
        "overrides": {"sft.num_epochs": 1, "pretrain.max_epochs": 4.0, "sft.seed": 1},
    }
    assert resolve(conf).pretrain.max_epochs == 4


def test_what_a_retraining_went_through_with_is_not_new_and_what_failed_is(world: World):
    (world.raw / "a.txt").write_text("text")
    first = world.go()
    assert world.go().conf == first.conf  # the first one failed: nothing was remembered
    record("athanor", first.watermark.model_dump())
    assert world.decide() == Skip(
        f"Nothing new: {world.raw.as_uri()} is as the last retraining saw it, and no preference data came."
    )
    assert world.go(force=True).reason == "asked for by `force`"
    (world.raw / "b.txt").write_text("more")
    assert "has changed (2 objects, 8 bytes)" in world.go().reason


def test_announced_preference_data_waits_until_a_retraining_has_gone_through(world: World):
    (world.raw / "a.txt").write_text("text")
    record("athanor", world.go().watermark.model_dump())
    assert world.go("file:///p/1").conf["preferences"] == ["file:///p/1"]  # and that run fails
    verdict = world.go("file:///p/2")
    assert verdict.conf["preferences"] == ["file:///p/1", "file:///p/2"]
    world.go("file:///p/3")  # announced while that one trains
    record("athanor", verdict.watermark.model_dump())
    assert read_watermark(world.store, "athanor").pending == ("file:///p/3",)
    last = world.go("file:///p/1")
    assert last.conf["preferences"] == ["file:///p/3"]
    record("athanor", last.watermark.model_dump())
    assert isinstance(world.decide("file:///p/2"), Skip)


def test_no_champion_and_no_text_are_reasons_to_skip(world: World):
    assert world.decide() == Skip(f"{world.raw.as_uri()} is empty.")
    world.champion = None
    verdict = world.decide("file:///p/1")
    assert isinstance(verdict, Skip)
    assert "models:/athanor-aligned@champion does not exist" in verdict.reason
    assert read_watermark(world.store, "athanor").pending == ("file:///p/1",)


def test_what_cannot_be_decided_is_an_error(world: World, monkeypatch: pytest.MonkeyPatch):
    (world.raw / "a.txt").write_text("text")
    world.store.delete(params_key("manual__2026-01-01T00-00-00-00-00"))
    with pytest.raises(ConfigError, match=r"models:/athanor-aligned/3 was made by run .*, which left no runs/"):
        world.decide()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(StageError, match="could not be looked up"):
        world.decide()
    monkeypatch.delenv("ATHANOR_RETRAIN_WATCH")
    with pytest.raises(ConfigError, match="documents is empty and ATHANOR_RETRAIN_WATCH is not set"):
        world.decide()


def test_addresses_come_from_the_events_of_the_asset():
    events = {
        Asset("llm/preferences"): [
            SimpleNamespace(extra={"uri": "file:///p/1"}),
            SimpleNamespace(extra={}),
        ],
        Asset("llm/raw-documents"): [SimpleNamespace(extra={"uri": "file:///raw"})],
    }
    assert announced_data(events, "llm/preferences") == ["file:///p/1"]
