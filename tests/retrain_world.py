"""A champion, raw text and a store, as `retrain` meets them: real folders, a small server for the registry."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from operators.prepare import params_key
from operators.retrain import Go, Skip, decide
from stages.artifacts.addresses import open_store
from stages.artifacts.store import write_json
from stages.config.forms import RetrainParams
from tests.answering import answering

CHAMPION_PARAMS = {
    "recipe": "tiny",
    "run_name": "athanor",
    "seed": 7,
    "override_gates": ["evaluate"],
    "override_reason": "a person read its answers",
    "overrides": {"sft.num_epochs": 1},
}


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

    monkeypatch.setenv("ARTIFACT_STORE", world.store.root_uri)
    monkeypatch.setenv("ATHANOR_RETRAIN_WATCH", world.raw.as_uri())
    with answering(Registry) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield world
