"""What keeps a component of the local stack from being healthy, in words."""

import json

import pytest

from infra.health import Health
from infra.layout import Layout, StackRecord, StackSecrets
from infra.ports import PREFERRED
from infra.supervisor import ProgramState


def test_a_stranger_that_answers_with_a_page_is_not_healthy(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers_with_a_page(url: str, token: str) -> None:
        json.loads("<html>")

    monkeypatch.setattr("infra.health.ray_missing", answers_with_a_page)
    record = StackRecord(stack_id="abc", ports=dict(PREFERRED), runtime_dir=str(tmp_path), artifact_store="file:///s")
    health = Health(record, StackSecrets.load_or_generate(Layout(tmp_path)))
    ray = ProgramState("ray", "RUNNING", pid=1, started_at=0, why="")
    assert health.round([ray]) == {"ray": "does not answer yet (JSONDecodeError)"}
