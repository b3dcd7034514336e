"""What the drills on whole trainings read of a run, and how they have it trained again."""

from __future__ import annotations

import json
from typing import Any

from stages.artifacts.addresses import artifact_key, run_key
from stages.artifacts.manifests import MANIFEST, find_intact
from stages.artifacts.store import Store, read_json
from stages.config.graph import GRAPH, Stage
from stages.config.request import Manifest, StageResult, run_folder
from tests.chaos.stack import Row


def key_of(row: Row, stage: Stage, name: str) -> str:
    return run_key(run_folder(row.dag_id, row.run_id), stage, name)


def manifest_of(row: Row, stage: Stage) -> Manifest:
    """Of what a stage of the run made or found."""
    store = row.stack.store
    result = StageResult.model_validate(read_json(store, key_of(row, stage, "result.json")))
    manifest = find_intact(store, GRAPH[stage].kind, result.artifact.fingerprint)
    assert manifest is not None
    return manifest


def forget(store: Store, manifest: Manifest) -> None:
    """Whoever needs the artifact builds it again."""
    store.delete(f"{artifact_key(manifest.kind, manifest.fingerprint)}/{MANIFEST}")


def history_of(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """The metrics of every step."""
    key = f"{artifact_key(manifest.kind, manifest.fingerprint)}/history.jsonl"
    return [json.loads(line) for line in store.read_bytes(key).splitlines()]


def states_of(row: Row) -> dict[str, str]:
    """Of all tasks of the run."""
    return {task.task_id: task.state for task in row.stack.airflow.tasks(row.dag_id, row.run_id)}


def jobs_of(row: Row) -> list[str]:
    """Ids of the Ray jobs of the row's stage that the cluster knows."""
    return [job["submission_id"] for job in row.jobs() if job["metadata"]["airflow.task_id"] == row.stage]


def wait_checkpoint(row: Row, fingerprint: str, *, step: int) -> None:
    """Until the training has saved itself at that step or later."""
    store, folder = row.stack.store, f"checkpoints/{fingerprint}"

    def saved() -> bool:
        steps = [key.split("/")[-2] for key in store.list(folder) if key.endswith("/checkpoint.json")]
        return any(int(name.removeprefix("step-")) >= step for name in steps)

    row.stack.wait(f"a checkpoint of step {step}", saved, seconds=300)


def starts_of(row: Row) -> list[dict[str, Any]]:
    """The notes of tests/chaos/slow.py, oldest first."""
    store, folder = row.stack.store, key_of(row, Stage.PRETRAIN, "x").rpartition("/")[0]
    notes = [read_json(store, key) for key in store.list(folder) if "/start-" in key]
    return sorted(notes, key=lambda note: note["at"])


def wait_start(row: Row, number: int, *, seconds: float = 300) -> dict[str, Any]:
    """The first step after the workers' `number`th start."""

    def started() -> list[dict[str, Any]]:
        return starts_of(row)[number - 1 : number]

    return row.stack.wait(f"start {number} of the workers", started, seconds=seconds)[0]
