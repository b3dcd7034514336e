"""Tracking, lineage and promotion against a real MLflow server, outages included."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest

from infra.components import mlflow_server as mlflow_component
from infra.ports import any_free
from operators.rollback import roll_back
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import read_manifest
from stages.artifacts.store import Store
from stages.config.closing import Approval, PromoteConfig, Promotion, Verdict
from stages.config.forms import RollbackParams
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, RunInfo
from stages.lineage.__main__ import main as lineage_main
from stages.promote import run as promote
from stages.tracking.__main__ import main as replay_main
from stages.tracking.client import artifact_uri_of_model, connect, registered_versions
from stages.tracking.spool import SPOOL_NAME
from stages.tracking.tracker import Tracker, record_hit
from tests.comparisons import TIE, WORSE, compared, win_over_start, with_comparisons
from tests.pipeline_records import (
    EVALUATION,
    RAW_DATA,
    RAW_DIGEST,
    ROLE_OF,
    WHOLE_RUN,
    context_for,
    fingerprint_of,
    publish_artifact,
    publish_run,
    refs_for,
    request_for,
    run_info,
)
from tests.servers import running

pytestmark = pytest.mark.integration

_numbers = count()


@dataclass
class Tracked:
    """A pipeline run whose stages are tracked for real; each test has its own experiment and run."""

    root: Path
    store: Store
    run: RunInfo
    made: dict[Stage, ArtifactRef] = field(default_factory=dict)

    @property
    def client(self) -> Any:
        return connect()

    @property
    def experiment_id(self) -> str:
        return self.client.get_experiment_by_name(self.run.experiment).experiment_id

    def tracker(self, stage: Stage, *, salt: str = "") -> Tracker:
        request = request_for(stage, self.store, refs_for(stage, self.made), run=self.run)
        tracker = Tracker(request, self.root / f"spool-{stage.value}-{next(_numbers)}")
        tags = {"airflow.task_id": stage.value, "airflow.dag_id": "llm_pipeline", "git.commit": "c0ffee"}
        tracker.start(fingerprint=fingerprint_of(stage, salt), params={"optimizer.learning_rate": "0.001"}, tags=tags)
        return tracker

    def finish(self, stage: Stage, tracker: Tracker, *, salt: str = "", history: str = "", **fields: Any):
        """Publish as the runner does: files, then tracking, then the manifest with MLflow's ids."""
        folder = self.root / f"content-{stage.value}-{next(_numbers)}"
        folder.mkdir()
        (folder / "content").write_text(stage.value + salt)
        if history:
            (folder / "history.jsonl").write_text(history)
        if stage is Stage.CURATE:
            fields["sources"] = (RAW_DATA,)
        inputs = refs_for(stage, self.made)
        scratch = open_store((self.root / "unpublished").as_uri())
        _, manifest = publish_artifact(scratch, stage, inputs, folder, salt=salt, **fields)
        ids = tracker.finish(manifest, history=history)
        fields |= {"mlflow_run_id": ids[0], "mlflow_model_id": ids[1]}
        self.made[stage], _ = publish_artifact(self.store, stage, inputs, folder, salt=salt, **fields)
        return ids

    def build(self, *stages: Stage) -> None:
        for stage in stages:
            self.finish(stage, self.tracker(stage), metrics={"eval/loss": 2.0})

    def children(self, stage: Stage) -> list[Any]:
        query = f"tags.`athanor.run_id` = '{self.run.run_id}' and tags.`lineage.stage` = '{stage.value}'"
        return list(self.client.search_runs([self.experiment_id], query))

    def points(self, run_id: str | None, key: str) -> list[tuple[int, float]]:
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, key))


@pytest.fixture
def tracked(mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracked:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return make_tracked(tmp_path)


def make_tracked(root: Path) -> Tracked:
    name = f"e{os.getpid()}-{next(_numbers)}"
    return Tracked(root, open_store((root / "store").as_uri()), run_info(f"manual-{name}", experiment=name))


def test_a_stage_is_a_child_run_with_params_metrics_inputs_and_a_model(tracked: Tracked, capfd) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN)
    tracker = tracked.tracker(Stage.SFT)
    for step in range(1, 6):
        tracker.log({"train/loss": 3.0 - step / 10}, step)
    run_id = tracker.wait_run_id(120)
    run_id_again, model_id = tracked.finish(Stage.SFT, tracker, metrics={"eval/loss": 2.5, "train/loss": 2.5})
    assert run_id == run_id_again
    run = tracked.client.get_run(run_id)
    parent = tracked.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert (run.info.run_name, run.info.status, parent.data.tags["athanor.run_id"]) == (
        "sft",
        "FINISHED",
        tracked.run.run_id,
    )
    assert "lineage.stage" not in parent.data.tags
    assert run.data.params == {"optimizer.learning_rate": "0.001"}
    assert tracked.points(run_id, "train/loss") == [(step, 3.0 - step / 10) for step in range(1, 6)]
    assert tracked.points(run_id, "eval/loss") == [(5, 2.5)]
    assert run.data.metrics["cost/wall_seconds"] == 90.0
    [dataset] = run.inputs.dataset_inputs
    assert dataset.dataset.digest == tracked.made[Stage.TOKENIZE].digest[:32]
    assert {tag.key: tag.value for tag in dataset.tags}["digest.sha256"] == tracked.made[Stage.TOKENIZE].digest
    [model_input] = run.inputs.model_inputs
    assert model_input.model_id == tracked.made[Stage.PRETRAIN].mlflow_model_id
    [output] = run.outputs.model_outputs
    assert output.model_id == model_id
    shown = capfd.readouterr().out
    assert f'ATHANOR_MLFLOW_RUN {{"run_id": "{run_id}", "experiment_id": "{tracked.experiment_id}"}}' in shown


def test_run_and_model_carry_the_lineage_tags_of_the_manifest(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN, Stage.SFT)
    ref = tracked.made[Stage.SFT]
    model = tracked.client.get_logged_model(ref.mlflow_model_id)
    run = tracked.client.get_run(ref.mlflow_run_id)
    for tags in (model.tags, run.data.tags):
        assert tags["lineage.fingerprint"] == ref.fingerprint
        assert tags["lineage.digest"] == ref.digest
        assert tags["lineage.parent.model"] == tracked.made[Stage.PRETRAIN].fingerprint
        assert tags["lineage.dataset.tokens"] == tracked.made[Stage.TOKENIZE].digest
        assert tags["artifact.uri"] == ref.uri
        assert tags["airflow.task_id"] == "sft"
        assert tags["git.commit"] == "c0ffee"
    assert (str(model.status), model.name, model.source_run_id) == ("READY", "demo-sft", ref.mlflow_run_id)
    assert {metric.key: metric.value for metric in model.metrics}["eval/loss"] == 2.0
    assert ref.mlflow_model_id not in [entry.model_id for entry in run.inputs.model_inputs]


def test_raw_data_is_a_dataset_that_can_be_searched_by_digest(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE)
    found = tracked.client.search_runs([tracked.experiment_id], f"dataset.digest = '{RAW_DIGEST[:32]}'")
    assert [run.info.run_name for run in found] == ["curate"]


def test_the_pipeline_run_knows_every_stage_and_has_its_lineage_graph(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE)
    parent_id = tracked.client.get_run(tracked.made[Stage.CURATE].mlflow_run_id).data.tags["mlflow.parentRunId"]
    hit = tracked.made[Stage.TOKENIZE]
    built = json.loads(tracked.client.get_run(parent_id).data.tags["athanor.stage.tokenize"])
    assert built == {"hit": False, "uri": hit.uri, "fingerprint": hit.fingerprint, "mlflow_run_id": hit.mlflow_run_id}
    known = tracked.run.model_copy(update={"parent_run_id": parent_id})
    record_hit(request_for(Stage.TOKENIZE, tracked.store, {}, run=known), hit)
    assert json.loads(tracked.client.get_run(parent_id).data.tags["athanor.stage.tokenize"]) == built | {"hit": True}
    names = {entry.path for entry in tracked.client.list_artifacts(parent_id, "lineage")}
    assert names >= {"lineage/tokenize.svg", "lineage/tokenize.json", "lineage/tokenize.md"}


def test_files_and_texts_become_artifacts_of_the_stage_or_of_the_pipeline_run(tracked: Tracked, tmp_path: Path) -> None:
    page = tmp_path / "some.html"
    page.write_text("<p>ok</p>")
    tracker = tracked.tracker(Stage.CURATE)
    tracker.log_artifact(page, "report.html", parent=True)
    tracker.log_text("hello", "notes/hello.txt")
    page.unlink()
    run_id, _ = tracked.finish(Stage.CURATE, tracker)
    parent_id = tracked.client.get_run(run_id).data.tags["mlflow.parentRunId"]
    assert "report.html" in [entry.path for entry in tracked.client.list_artifacts(parent_id)]
    assert [entry.path for entry in tracked.client.list_artifacts(run_id, "notes")] == ["notes/hello.txt"]


def test_a_retried_stage_keeps_its_run_and_logs_no_step_twice(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE)
    first = tracked.tracker(Stage.PRETRAIN)
    for step in range(1, 8):
        first.log({"train/loss": 10.0 - step}, step)
    run_id = first.wait_run_id(120)
    first.fail("RuntimeError: boom")
    failed = tracked.client.get_run(run_id)
    assert (failed.info.status, failed.data.tags["athanor.failure"]) == ("FAILED", "RuntimeError: boom")
    second = tracked.tracker(Stage.PRETRAIN)
    assert second.wait_run_id(120) == run_id
    assert tracked.client.get_run(run_id).info.status == "RUNNING"
    for step in range(5, 11):  # resumed from the checkpoint of step 4
        second.log({"train/loss": 10.0 - step}, step)
    _, model_id = tracked.finish(Stage.PRETRAIN, second)
    assert tracked.points(run_id, "train/loss") == [(step, 10.0 - step) for step in range(1, 11)]
    assert len(tracked.children(Stage.PRETRAIN)) == 1
    models = tracked.client.search_logged_models([tracked.experiment_id])
    assert [(model.model_id, str(model.status)) for model in models] == [(model_id, "READY")]
    assert tracked.client.get_run(run_id).info.status == "FINISHED"


def test_finishing_the_same_stage_again_adds_nothing(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN)
    before = tracked.made[Stage.PRETRAIN]
    tracked.build(Stage.PRETRAIN)
    after = tracked.made[Stage.PRETRAIN]
    assert (after.mlflow_run_id, after.mlflow_model_id) == (before.mlflow_run_id, before.mlflow_model_id)
    run = tracked.client.get_run(after.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert "athanor.failure" not in run.data.tags
    assert len(run.outputs.model_outputs) == len(run.inputs.dataset_inputs) == 1
    assert tracked.points(after.mlflow_run_id, "eval/loss") == [(0, 2.0)]


def test_keys_that_mlflow_would_refuse_are_made_to_fit(tracked: Tracked) -> None:
    tracker = tracked.tracker(Stage.CURATE)
    tracker.log({"k" * 300: 1.0}, 1)  # longer than MLflow's limit
    tracker.log_text("hello", "note.txt")
    run_id, _ = tracked.finish(Stage.CURATE, tracker, metrics={"reward/accuracy_odd?kind": 0.5, "k" * 300: 1.0})
    run = tracked.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert "note.txt" in [entry.path for entry in tracked.client.list_artifacts(run_id)]
    assert len([key for key in run.data.metrics if key.startswith("kkk")]) == 1
    assert tracked.points(run_id, "reward/accuracy_odd-kind") == [(1, 0.5)]


def test_what_mlflow_refuses_for_good_costs_nothing_else_and_is_kept(tracked: Tracked, monkeypatch, caplog) -> None:
    monkeypatch.setattr("stages.config.mlflow_limits.KEY", 400)  # as if this MLflow allowed less than it should
    monkeypatch.setattr("stages.config.mlflow_limits.key", lambda name: name)
    tracker = tracked.tracker(Stage.CURATE)
    tracker.log({"k" * 300: 1.0, "train/loss": 2.0}, 1)
    run_id, _ = tracked.finish(Stage.CURATE, tracker, metrics={"eval/loss": 0.5, "odd?key": 1.0})
    run = tracked.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["train/loss"], run.data.metrics["eval/loss"]) == (2.0, 0.5)
    assert caplog.text.count("the rest is logged") == 2
    kept = tracked.store.read_bytes(f"runs/{tracked.run.run_id}/curate/mlflow-spool.refused.jsonl").splitlines()
    assert len(kept) == 2


def test_what_a_killed_attempt_did_not_deliver_comes_from_the_history(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE)
    tracker = tracked.tracker(Stage.PRETRAIN)
    tracker.log({"train/loss": 7.0}, 3)
    history = "".join(json.dumps({"step": step, "train/loss": 10.0 - step}) + "\n" for step in (1, 2, 3))
    run_id, _ = tracked.finish(Stage.PRETRAIN, tracker, history=history)
    assert tracked.points(run_id, "train/loss") == [(1, 9.0), (2, 8.0), (3, 7.0)]


def test_a_worker_process_and_the_job_share_one_run(tracked: Tracked) -> None:
    tracked.build(Stage.CURATE, Stage.TOKENIZE)
    job = tracked.tracker(Stage.PRETRAIN)
    run_id = job.wait_run_id(120)
    worker = tracked.tracker(Stage.PRETRAIN)
    worker.log({"train/loss": 1.0}, 1)
    worker.close()
    assert tracked.client.get_run(run_id).info.status == "RUNNING"
    history = json.dumps({"step": 1, "train/loss": 1.0}) + "\n"
    assert tracked.finish(Stage.PRETRAIN, job, history=history)[0] == run_id
    assert tracked.points(run_id, "train/loss") == [(1, 1.0)]
    assert len(tracked.children(Stage.PRETRAIN)) == 1


def test_ten_thousand_points_of_values_that_are_not_finite_or_repeat_arrive(tracked: Tracked) -> None:
    tracker = tracked.tracker(Stage.CURATE)
    for step in range(2500):
        tracker.log({"a": float(step), "b": 1.0, "c": float("nan"), "d": float("inf")}, step)
    run_id, _ = tracked.finish(Stage.CURATE, tracker)
    assert tracked.points(run_id, "a") == [(step, float(step)) for step in range(2500)]
    assert len(tracked.points(run_id, "b")) == len(tracked.points(run_id, "c")) == 2500


# ------------------------------------------------------------- outages


@contextmanager
def serving(port: int, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    (home / "artifacts").mkdir(parents=True, exist_ok=True)
    component = mlflow_component(port=port, home=home)
    with running(
        component.name,
        component.command,
        log=home / "server.log",
        environment=component.environment,
        answers=lambda: httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success,
    ) as process:
        yield process


def kill(process: subprocess.Popen[bytes]) -> None:
    """As a machine that loses power: the server's process group, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, Path]:
    """Port and home of a server that a test starts and kills itself."""
    port = any_free()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    return port, tmp_path / "mlflow"


@pytest.mark.slow
def test_an_outage_in_the_middle_loses_and_doubles_nothing(outage: tuple[int, Path], tmp_path: Path) -> None:
    tracked = make_tracked(tmp_path)
    with serving(*outage) as process:
        tracked.build(Stage.CURATE, Stage.TOKENIZE)
        tracker = tracked.tracker(Stage.PRETRAIN)
        for step in range(1, 51):
            tracker.log({"train/loss": float(step)}, step)
        run_id = tracker.wait_run_id(120)
        assert run_id
        kill(process)
    started = time.monotonic()
    for step in range(51, 101):
        tracker.log({"train/loss": float(step)}, step)
    assert time.monotonic() - started < 1.0
    with serving(*outage):
        assert tracked.finish(Stage.PRETRAIN, tracker)[0] == run_id
        assert tracked.points(run_id, "train/loss") == [(step, float(step)) for step in range(1, 101)]
        assert tracked.client.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow
def test_stages_that_end_during_an_outage_are_delivered_later(
    outage: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.tracking.tracker._FINISH_SECONDS", 2.0)
    by_hand, by_stage = (tmp_path / name for name in ("hand", "stage"))
    by_hand.mkdir()
    by_stage.mkdir()
    hand, closing = make_tracked(by_hand), make_tracked(by_stage)
    for stage in (Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN):
        tracker = hand.tracker(stage)
        tracker.log({"train/loss": 1.5}, 1)
        tracker.log_text("hello", "note.txt")
        assert hand.finish(stage, tracker) == (None, None)
    closing.finish(Stage.CURATE, closing.tracker(Stage.CURATE))
    assert len(waiting(hand)) == 3
    assert len(waiting(closing)) == 1
    monkeypatch.setattr("stages.tracking.tracker._FINISH_SECONDS", 30.0)
    with serving(*outage):
        for _ in range(2):  # the second time there is nothing left to deliver
            assert replay_main([hand.run.run_id, "--store", hand.store.root_uri]) == 0
            assert waiting(hand) == []
        check_delivered(hand)
        closing.build(Stage.EVALUATE)  # a closing stage takes up what earlier stages of its run left
        assert [run.info.status for run in closing.children(Stage.CURATE)] == ["FINISHED"]
        assert waiting(closing) == []


def waiting(tracked: Tracked) -> list[str]:
    return [key for key in tracked.store.list("runs") if key.endswith(SPOOL_NAME)]


def check_delivered(tracked: Tracked) -> None:
    for stage in (Stage.CURATE, Stage.TOKENIZE, Stage.PRETRAIN):
        [run] = tracked.children(stage)
        assert run.info.status == "FINISHED"
        assert tracked.points(run.info.run_id, "train/loss") == [(1, 1.5)]
        assert "note.txt" in [entry.path for entry in tracked.client.list_artifacts(run.info.run_id)]
    [model] = tracked.client.search_logged_models([tracked.experiment_id])
    assert str(model.status) == "READY"
    tracked.build(Stage.SFT)  # its input has no MLflow ids in its manifest; the model is found by fingerprint
    sft = tracked.client.get_run(tracked.made[Stage.SFT].mlflow_run_id)
    assert [entry.model_id for entry in sft.inputs.model_inputs] == [model.model_id]


# ----------------------------------------------------------- promotion


WIN = win_over_start(EVALUATION, level=0.025)
"""PPO is clearly better than its SFT model, and there is no champion."""


def promote_run(root: Path, *, salt: str = "", evaluation: Any = WIN, without=frozenset(), name: str, **config: Any):
    store, made = publish_run(root, salt=salt, evaluation=evaluation, without=without)
    settings = PromoteConfig(run_name=name, **config)
    request = request_for(
        Stage.PROMOTE, store, refs_for(Stage.PROMOTE, made), settings, run_info(f"r{next(_numbers)}", experiment=name)
    )
    tracker = Tracker(request, root / f"spool-{next(_numbers)}")
    tracker.start(fingerprint=fingerprint_of(Stage.PROMOTE, salt), params={}, tags={})
    context = context_for(request, store, settings, root, tracker)
    outcome = promote(context)
    context.progress.close()
    tracker.close()
    return json.loads((context.output_dir / "promotion.json").read_text()), outcome, made


@pytest.fixture
def name(mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    return f"demo{os.getpid()}.{next(_numbers)}"


def aliases(model: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in connect().get_registered_model(model).aliases.items()}


def test_the_first_run_registers_every_role_and_makes_a_champion(name: str, tmp_path: Path) -> None:
    record, outcome, made = promote_run(tmp_path, name=name)
    assert (record["promoted"], record["chosen"], record["comparison"]) == (True, "ppo", "start")
    assert {key: outcome.metrics[f"promotion/{key}"] for key in ("difference", "difference_low", "items")} == {
        "difference": 0.06,
        "difference_low": 0.03,
        "items": 400.0,
    }
    assert outcome.metrics["promotion/new_versions"] == 6.0
    by_role = {model["role"]: model for model in record["models"]}
    assert {role: model["name"] for role, model in by_role.items()} == {
        "base": f"{name}-base",
        "sft": f"{name}-sft",
        "reward": f"{name}-reward",
        "gold": f"{name}-gold",
        "ppo": f"{name}-aligned",
        "dpo": f"{name}-aligned",
    }
    chosen = by_role["ppo"]["version"]
    assert aliases(f"{name}-aligned") == {"candidate": chosen, "champion": chosen}
    assert aliases(f"{name}-sft") == {"candidate": by_role["sft"]["version"]}
    version: Any = connect().get_model_version(f"{name}-aligned", chosen)
    assert version.source == f"models:/{by_role['ppo']['model_id']}"
    assert version.tags["alignment"] == "ppo"
    assert version.tags["lineage.parent.reward"] == made[Stage.REWARD].fingerprint
    assert version.tags["eval/score_mean"] == "0.3"
    assert version.tags["evaluation.data_digest"] == "d" * 64
    assert version.tags["evaluation.uri"] == made[Stage.EVALUATE].uri
    decided = {key: version.tags[f"decision.{key}"] for key in ("promoted", "by", "suite", "against", "difference")}
    assert decided == {"promoted": "true", "by": "start", "suite": "pairs", "against": "sft", "difference": "0.06"}
    numbers = {key: version.tags[f"decision.{key}"] for key in ("low", "high", "p", "items", "needed_items", "level")}
    assert [float(value) for value in numbers.values()] == [0.03, 0.09, 0.001, 400, 120, 0.025]
    assert artifact_uri_of_model(f"models:/{name}-aligned@champion") == made[Stage.PPO].uri
    model: Any = connect().get_logged_model(by_role["ppo"]["model_id"])
    assert {metric.key: metric.value for metric in model.metrics}["eval/win_rate"] == 0.71
    assert {metric.dataset_name for metric in model.metrics} == {"held-out"}


def test_promoting_again_makes_no_second_version_and_moves_nothing(name: str, tmp_path: Path) -> None:
    first, _, _ = promote_run(tmp_path, name=name)
    second, outcome, _ = promote_run(tmp_path, name=name)
    assert outcome.metrics["promotion/new_versions"] == 0.0
    assert [model["version"] for model in second["models"]] == [model["version"] for model in first["models"]]
    assert (second["promoted"], second["comparison"]) == (True, "same_model")
    assert "previous" not in aliases(f"{name}-aligned")
    assert len(connect().search_model_versions(f"name = '{name}-aligned'")) == 2


def against_champion(name: str, version: str, ref: ArtifactRef, **numbers: Any) -> dict[str, Any]:
    """An evaluation that measured this champion next to PPO."""
    champion = {"name": f"{name}-aligned", "version": version, "fingerprint": ref.fingerprint, "digest": ref.digest}
    comparisons = (compared(level=0.025, **numbers), compared("dpo", level=0.025, **WORSE))
    return with_comparisons(EVALUATION, *comparisons, champion={**champion, "uri": ref.uri})


def version_of(record: dict[str, Any], role: str = "ppo") -> str:
    return next(model["version"] for model in record["models"] if model["role"] == role)


def test_a_better_model_dethrones_the_champion_and_a_tie_does_not(name: str, tmp_path: Path) -> None:
    first, _, made = promote_run(tmp_path, name=name)
    old = version_of(first)
    tie = against_champion(name, old, made[Stage.PPO], **TIE)
    worse, _, _ = promote_run(tmp_path, name=name, salt="b", evaluation=tie)
    assert (worse["promoted"], worse["comparison"]) == (False, "champion")
    assert worse["rulings"][0]["primary"]["compared"]["needed_items"] == TIE["needed_items"]
    assert aliases(f"{name}-aligned")["champion"] == old
    assert aliases(f"{name}-aligned")["candidate"] == version_of(worse) != old
    tags = connect().get_model_version(f"{name}-aligned", version_of(worse)).tags
    assert (tags["decision.promoted"], tags["decision.p"]) == ("false", "0.4")

    win = against_champion(name, old, made[Stage.PPO])
    better, _, _ = promote_run(tmp_path, name=name, salt="c", evaluation=win)
    new = version_of(better)
    assert (better["promoted"], better["previous_champion"]["version"]) == (True, old)
    assert aliases(f"{name}-aligned") == {"candidate": new, "champion": new, "previous": old}


def test_a_champion_that_changed_after_the_evaluation_stays(name: str, tmp_path: Path) -> None:
    first, _, made = promote_run(tmp_path, name=name)
    elsewhere = against_champion(name, "77", made[Stage.DPO])
    record, _, _ = promote_run(tmp_path, name=name, salt="b", evaluation=elsewhere)
    assert (record["promoted"], record["comparison"]) == (False, "none")
    assert "it was compared with version 77" in record["reason"]
    assert aliases(f"{name}-aligned")["champion"] == version_of(first)


def test_a_rollback_gives_the_title_back_and_keeps_it_from_the_model_until_a_person_says_otherwise(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _, made = promote_run(tmp_path, name=name)
    old = version_of(first)
    win = against_champion(name, old, made[Stage.PPO])
    new = version_of(promote_run(tmp_path, name=name, salt="b", evaluation=win)[0])
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "store").as_uri())
    done = roll_back(RollbackParams(run_name=name, reason="it insults people"), by="ada")
    assert (done["from_version"], done["to_version"]) == (new, old)
    assert aliases(f"{name}-aligned") == {"candidate": new, "champion": old}
    assert connect().get_model_version(f"{name}-aligned", new).tags["rollback.reason"] == "it insults people"

    again, _, _ = promote_run(tmp_path, name=name, salt="b", evaluation=win)
    assert again["promoted"] is False
    assert "rolled back (it insults people)" in again["reason"]
    approval = Approval(verdict=Verdict.APPROVED, by="ada", at="2026-11-24T09:30:15+00:00", comment="repaired")
    approved = {"promotion": Promotion.APPROVAL, "approval": approval}
    promote_run(tmp_path, name=name, salt="b", evaluation=win, **approved)
    assert aliases(f"{name}-aligned") == {"candidate": new, "champion": new, "previous": old}
    tags = connect().get_model_version(f"{name}-aligned", new).tags
    assert "rollback.reason" not in tags
    assert (tags["decision.by"], tags["approval.comment"]) == ("person", "repaired")


def test_never_registers_candidates_only(name: str, tmp_path: Path) -> None:
    record, _, _ = promote_run(tmp_path, name=name, promotion=Promotion.NEVER)
    assert record["promoted"] is False
    assert set(aliases(f"{name}-aligned")) == {"candidate"}


def test_a_run_without_alignment_registers_what_it_has(name: str, tmp_path: Path) -> None:
    without = frozenset({Stage.REWARD, Stage.GOLD, Stage.PPO, Stage.DPO})
    record, _, _ = promote_run(tmp_path, name=name, without=without)
    assert (record["promoted"], record["chosen"]) == (False, None)
    assert [model["role"] for model in record["models"]] == ["base", "sft"]


def test_a_takedown_lists_the_registered_versions_made_from_raw_data(name: str, tmp_path: Path, capsys) -> None:
    _, _, made = promote_run(tmp_path, name=name)
    store = made[Stage.CURATE].uri.rpartition("/artifacts/")[0]
    assert lineage_main(["descendants", RAW_DIGEST, "--store", store]) == 0
    shown = capsys.readouterr().out
    for role in ("base", "sft", "reward"):
        assert f"- {name}-{role} version 1 (candidate)" in shown
    every = registered_versions([made[Stage.PPO].fingerprint, made[Stage.DPO].fingerprint])
    found = [entry for entry in every if entry[0].startswith(f"{name}-")]  # other tests share the server
    assert [(model, set(marks)) for model, _, marks in found if marks] == [
        (f"{name}-aligned", {"candidate", "champion"})
    ]
    assert lineage_main(["ancestors", f"models:/{name}-aligned@champion"]) == 0
    assert RAW_DIGEST in capsys.readouterr().out


def test_every_stage_of_the_graph_can_be_tracked(tracked: Tracked) -> None:
    assert set(ROLE_OF) | {Stage.REPORT} == set(WHOLE_RUN)
    tracked.build(*WHOLE_RUN)
    for stage in WHOLE_RUN:
        [run] = tracked.children(stage)
        assert run.info.status == "FINISHED"
        manifest = read_manifest(tracked.made[stage])
        assert (manifest.mlflow_model_id is not None) == GRAPH[stage].trains
