"""What keeps a component of the local stack from being healthy, in words."""

import json
from typing import Any

import pytest

from infra.health import Health, ray_missing
from infra.layout import Layout, StackRecord, StackSecrets
from infra.ports import PREFERRED, any_free
from infra.supervisor import ProgramState
from tests.answering import Asked, answering_json


def test_a_stranger_that_answers_with_a_page_is_not_healthy(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers_with_a_page(url: str, token: str, *, agent_url: str) -> None:
        json.loads("<html>")

    monkeypatch.setattr("infra.health.ray_missing", answers_with_a_page)
    record = StackRecord(stack_id="abc", ports=dict(PREFERRED), runtime_dir=str(tmp_path), artifact_store="file:///s")
    health = Health(record, StackSecrets.load_or_generate(Layout(tmp_path)))
    ray = ProgramState("ray", "RUNNING", pid=1, started_at=0, why="")
    assert health.round([ray]) == {"ray": "does not answer yet (JSONDecodeError)"}


def test_a_head_without_its_agent_cannot_run_jobs() -> None:
    nodes = {"data": {"result": {"result": [{"state": "ALIVE"}]}}}
    answers: dict[str, tuple[int, Any]] = {
        "/api/v0/nodes": (200, nodes),
        "/api/local_raylet_healthz": (200, "success"),
    }

    def answer(asked: Asked) -> tuple[int, Any]:
        return answers[asked.path] if asked.authorization == "Bearer secret" else (401, {})

    with answering_json(answer) as url:
        assert ray_missing(url, "secret", agent_url=url) is None
        nowhere = f"http://127.0.0.1:{any_free()}"
        missing = f"its agent, which starts jobs, does not answer at {nowhere} (ConnectError)"
        assert ray_missing(url, "secret", agent_url=nowhere) == missing
        answers["/api/local_raylet_healthz"] = (503, "")
        assert ray_missing(url, "secret", agent_url=url) == "its agent, which starts jobs, answers 503"
        nodes["data"]["result"]["result"] = [{"state": "DEAD"}]
        assert ray_missing(url, "secret", agent_url=url) == "its node has not joined yet"
