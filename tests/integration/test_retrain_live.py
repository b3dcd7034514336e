"""`retrain` and `evaluate_model` on a whole live stack: what scheduler, triggerer and watcher do with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.airflow_api import AirflowApiError
from infra.layout import Layout
from infra.rollback import rollback
from infra.stack import Stack, StackError
from operators.retrain import read_watermark
from operators.watcher import list_prefix
from stages.artifacts.addresses import open_store
from stages.artifacts.manifests import fetch, read_file, read_manifest
from stages.artifacts.store import read_json
from stages.config.graph import Stage
from stages.judge.scores import ScoreTable
from stages.lineage.graph import ancestors
from tests.live_stack import EVALUATE, PIPELINE, RETRAIN, LiveStack
from tests.raw_text import a_document_of, jsonl, prose

pytestmark = [pytest.mark.live, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

CHAMPION = "athanor-aligned"
NEW_DOCUMENTS = 20


@dataclass(frozen=True)
class Retraining:
    """What came of a file that was dropped into the watched prefix."""

    before: dict[str, str]
    """Tags of the champion of before."""
    run_id: str
    state: str
    pipeline_run_id: str


def tags_of(live: LiveStack, name: str, alias: str) -> dict[str, str]:
    tags = live.aliased(name, alias)
    assert tags is not None, f"{name}@{alias} does not exist"
    return tags


@pytest.fixture(scope="module")
def retrained(live: LiveStack, first_run: str, tmp_path_factory: pytest.TempPathFactory) -> Retraining:
    before = tags_of(live, CHAMPION, "champion")
    live.wait("the runs of retrain so far", lambda: not live.runs(RETRAIN, state=["queued", "running"]))
    known = {run["dag_run_id"] for run in live.runs(RETRAIN)}

    curated = fetch(live.artifact(first_run, Stage.CURATE), tmp_path_factory.mktemp("curated"))
    aside = live.incoming.with_name("monday.jsonl")
    aside.write_text(jsonl([a_document_of(curated), *(prose(seed) for seed in range(NEW_DOCUMENTS))]))
    aside.rename(live.incoming / aside.name)

    def started() -> list[str]:
        return [run["dag_run_id"] for run in live.runs(RETRAIN) if run["dag_run_id"] not in known]

    (run_id,) = live.wait("a run of retrain by itself", started, seconds=60)
    state = live.wait_end(RETRAIN, run_id, seconds=600)
    return Retraining(before, run_id, state, f"retrain__{run_id}")


def test_a_file_in_the_watched_prefix_starts_a_run_by_an_asset_event(live: LiveStack, retrained: Retraining) -> None:
    assert retrained.state == "success"
    states = live.states(RETRAIN, retrained.run_id)
    assert states == dict.fromkeys(("decide", "train", "remember"), "success") | {"set_aside": "skipped"}
    (run,) = [run for run in live.runs(RETRAIN) if run["dag_run_id"] == retrained.run_id]
    assert run["run_type"] == "asset_triggered"
    events = live.api.call("GET", f"dags/{RETRAIN}/dagRuns/{retrained.run_id}/upstreamAssetEvents")["asset_events"]
    (event,) = [event for event in events if event["name"] == "llm/raw-documents"]
    seen = list_prefix(live.incoming.as_uri())
    assert (seen.num_objects, event["extra"]["payload"]["digest"]) == (1, seen.digest)
    watermark = read_watermark(open_store(live.record.artifact_store), "athanor")
    assert watermark.documents == seen.digest
    assert not watermark.pending


def test_the_run_that_it_starts_begins_at_the_champion(live: LiveStack, retrained: Retraining) -> None:
    (run,) = [run for run in live.runs(PIPELINE) if run["dag_run_id"] == retrained.pipeline_run_id]
    assert run["state"] == "success"
    assert run["conf"]["documents"] == [live.incoming.as_uri()]
    assert run["conf"]["base_model"].startswith(f"models:/{CHAMPION}/")
    assert run["conf"]["recipe"] == "tiny", "what the champion's run was given counts on"
    built = {name for name, row in live.rows(retrained.pipeline_run_id).items() if row.state == "built"}
    assert {"curate", "tokenize", "pretrain", "sft", "reward", "dpo", "evaluate", "promote", "report"} == built


def test_only_the_new_documents_are_curated(live: LiveStack, retrained: Retraining) -> None:
    manifest = read_manifest(live.artifact(retrained.pipeline_run_id, Stage.CURATE))
    documents = manifest.ledger["documents"]
    assert set(documents["sources"]) == {live.incoming.as_uri(), "planted"}, "no document of the champion's data"
    assert documents["sources"][live.incoming.as_uri()]["in"]["documents"] == NEW_DOCUMENTS + 1
    assert documents["dropped"]["exact_duplicates/seen_before"]["documents"] == 1
    new = manifest.metrics["curate/documents_new"]
    assert NEW_DOCUMENTS / 2 < new <= NEW_DOCUMENTS


def test_the_candidate_has_the_old_champion_as_parent(live: LiveStack, first_run: str, retrained: Retraining) -> None:
    champion = retrained.before["lineage.fingerprint"]
    assert champion == live.artifact(first_run, Stage.DPO).fingerprint
    pretrain = read_manifest(live.artifact(retrained.pipeline_run_id, Stage.PRETRAIN))
    assert {entry.role: entry.fingerprint for entry in pretrain.inputs}["base_model"] == champion
    assert tags_of(live, "athanor-base", "candidate")["lineage.parent.base_model"] == champion
    candidate = tags_of(live, CHAMPION, "candidate")
    assert candidate["lineage.fingerprint"] == live.artifact(retrained.pipeline_run_id, Stage.DPO).fingerprint
    assert candidate["lineage.started_from"] == champion
    family = {node.id for node in ancestors([candidate["artifact.uri"]]).nodes}
    assert {live.artifact(first_run, stage).fingerprint for stage in (Stage.DPO, Stage.CURATE)} <= family


def record_of(live: LiveStack, run_id: str) -> dict[str, Any]:
    """promotion.json of a pipeline run."""
    return json.loads(read_file(live.artifact(run_id, Stage.PROMOTE), "promotion.json"))


def test_champion_and_candidate_are_compared_on_the_same_items(
    live: LiveStack, retrained: Retraining, tmp_path: Path
) -> None:
    evaluation = live.artifact(retrained.pipeline_run_id, Stage.EVALUATE)
    inputs = {entry.role: entry.fingerprint for entry in read_manifest(evaluation).inputs}
    assert inputs["champion"] == retrained.before["lineage.fingerprint"]
    table = ScoreTable(fetch(evaluation, tmp_path) / "scores.parquet")
    ours, theirs = (table.column("pairs", role) for role in ("dpo", "champion"))
    assert len(ours.items) > 4
    assert list(ours.items) == list(theirs.items)

    record = record_of(live, retrained.pipeline_run_id)
    (ruling,) = record["rulings"]
    found = ruling["primary"]["compared"]
    assert (record["comparison"], ruling["opponent"], found["suite"]) == ("champion", "champion", "pairs")
    assert record["previous_champion"]["fingerprint"] == retrained.before["lineage.fingerprint"]
    assert found["difference"] == pytest.approx(float(ours.values.mean() - theirs.values.mean()))
    assert found["low"] <= found["difference"] <= found["high"]
    assert (found["items"], found["level"]) == (len(ours.items), 0.05)
    tags = tags_of(live, CHAMPION, "candidate")
    assert float(tags["decision.low"]) == found["low"]
    assert int(tags["decision.items"]) == found["items"]
    assert tags["evaluation.uri"] == evaluation.uri


def test_the_end_of_a_run_is_told(live: LiveStack, retrained: Retraining) -> None:
    live.wait("notices", lambda: "success" in live.inbox.about(retrained.run_id), seconds=60)
    live.wait("notices", lambda: "success" in live.inbox.about(retrained.pipeline_run_id), seconds=60)


def backfill(live: LiveStack, **days: str) -> bool:
    """Whether Airflow took it; with SQLite it refuses while anybody else writes."""
    try:
        live.api.call("POST", "backfills", json={"dag_id": RETRAIN, **days, "max_active_runs": 3})
    except AirflowApiError as error:
        if "503 Database is locked" in str(error):
            return False
        raise
    return True


def test_there_is_no_catching_up_and_a_backfill_finds_nothing_new(live: LiveStack, retrained: Retraining) -> None:
    pipelines = len(live.runs(PIPELINE))
    by_cron = live.runs(RETRAIN, run_type="scheduled")
    assert len(by_cron) in (1, 2), "daily since the first of January, of which one is made up for"
    days = {"from_date": "2026-03-01T00:00:00Z", "to_date": "2026-03-04T00:00:00Z"}
    live.wait("Airflow's SQLite is free for a backfill", lambda: backfill(live, **days), seconds=60)

    def filled() -> list[dict[str, Any]]:
        runs = live.runs(RETRAIN, run_type="backfill")
        return runs if len(runs) == 3 and all(run["state"] in ("success", "failed") for run in runs) else []

    runs = live.wait("three backfilled days", filled)
    assert {run["state"] for run in runs} == {"success"}
    for run in runs:
        states = live.states(RETRAIN, run["dag_run_id"])
        assert states == dict.fromkeys(("decide", "train", "remember", "set_aside"), "skipped")
    assert len(live.runs(PIPELINE)) == pipelines


def test_a_retrained_model_that_is_worse_is_not_promoted(live: LiveStack, retrained: Retraining) -> None:
    """A learning rate of 0.3 ruins the alignment; how well replies are predicted tells."""
    before = tags_of(live, CHAMPION, "champion")
    new = live.home / "more"
    new.mkdir()
    (new / "tuesday.jsonl").write_text(jsonl([prose(100 + seed) for seed in range(NEW_DOCUMENTS)]))
    rule = {"promote.margin": 0.0, "promote.primary": ["responses"]}
    ruin = {"dpo.optimizer.learning_rate": 0.3}
    run_id = live.trigger(RETRAIN, run_name="athanor", documents=new.as_uri(), overrides={**rule, **ruin})
    assert live.wait_end(RETRAIN, run_id, seconds=900) == "success", "a model that is not promoted is no failure"

    pipeline_run_id = f"retrain__{run_id}"
    record = record_of(live, pipeline_run_id)
    found = record["rulings"][0]["primary"]["compared"]
    assert (record["promoted"], record["comparison"], found["suite"]) == (False, "champion", "responses")
    assert found["low"] > 0, "nats per byte have risen for sure"
    assert "it is not shown to be better" in record["reason"]
    assert tags_of(live, CHAMPION, "champion")["lineage.fingerprint"] == before["lineage.fingerprint"]
    candidate = tags_of(live, CHAMPION, "candidate")
    assert candidate["lineage.fingerprint"] == live.artifact(pipeline_run_id, Stage.DPO).fingerprint
    assert (candidate["decision.promoted"], candidate["decision.suite"]) == ("false", "responses")


def test_a_rollback_makes_the_champion_of_before_champion_again(live: LiveStack, retrained: Retraining) -> None:
    told: list[str] = []
    stack = Stack(Layout(live.home), say=told.append)
    retaken = tags_of(live, CHAMPION, "champion")
    assert retaken["lineage.fingerprint"] == live.artifact(retrained.pipeline_run_id, Stage.DPO).fingerprint
    assert rollback(stack, run_name="athanor", reason="it forgot its manners") == 0
    assert "is champion again" in told[0]
    now = tags_of(live, CHAMPION, "champion")
    assert now["lineage.fingerprint"] == retrained.before["lineage.fingerprint"]
    assert live.aliased(CHAMPION, "previous") is None
    store = open_store(live.record.artifact_store)
    (key,) = store.list(f"rollbacks/{CHAMPION}")
    record = read_json(store, key)
    assert (record["reason"], record["by"]) == ("it forgot its manners", "admin")
    assert record["to_fingerprint"] == retrained.before["lineage.fingerprint"]
    with pytest.raises(StackError, match="has no previous champion"):
        rollback(stack, run_name="athanor", reason="once more")


def test_any_model_is_measured_again(live: LiveStack, first_run: str) -> None:
    reward = live.artifact(first_run, Stage.REWARD)
    given = {"recipe": "tiny", "model": "models:/athanor-sft@candidate", "reward": reward.uri}
    run_id = live.trigger(EVALUATE, **given, overrides={"evaluate.max_prompts": 3})
    assert live.wait_end(EVALUATE, run_id) == "success"
    tags = tags_of(live, "athanor-sft", "candidate")
    assert tags["evaluation.reward_fingerprint"] == reward.fingerprint
    measured = read_manifest(live.xcom(EVALUATE, run_id, "evaluate")["uri"])
    assert float(tags["eval/perplexity"]) == pytest.approx(measured.metrics["sft/eval/perplexity"])


def test_a_model_that_is_not_there_ends_the_run_with_the_field_and_a_notice(live: LiveStack, tmp_path: Path) -> None:
    run_id = live.trigger(EVALUATE, model="models:/nobody-aligned@champion")
    assert live.wait_end(EVALUATE, run_id) == "failed"
    log = live.api.call("GET", f"dags/{EVALUATE}/dagRuns/{run_id}/taskInstances/resolve/logs/1")
    assert "model='models:/nobody-aligned@champion' is not registered in MLflow" in str(log)
    live.wait("a notice of the failure", lambda: "failure" in live.inbox.about(run_id), seconds=60)


def test_a_wrong_field_of_retrain_is_refused_before_the_run_starts(live: LiveStack) -> None:
    with pytest.raises(AirflowApiError, match="max_epochs"):
        live.trigger(RETRAIN, max_epochs="often")
