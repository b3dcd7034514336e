"""People in the loop over Airflow's REST API, with a real Airflow, Ray and MLflow: decisions and ratings."""

from typing import Any

import pytest

from stages.artifacts import read_file, read_manifest
from tests.live_stack import LiveStack

pytestmark = [pytest.mark.live, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

TINY = {"recipe": "tiny", "alignment": "dpo", "promotion": "approval"}


def ask(stack: LiveStack, run_name: str, **params: Any) -> str:
    return stack.trigger("llm_pipeline", **{**TINY, "run_name": run_name, **params})


def test_a_rejected_model_stays_candidate_with_all_evidence_and_an_approved_one_becomes_champion(
    people_stack: LiveStack,
) -> None:
    stack, name = people_stack, "decided"
    run_id = ask(stack, name)
    stack.wait_state("llm_pipeline", run_id, "approve", "awaiting_input")
    question = stack.question("llm_pipeline", run_id, "approve")
    assert question["subject"] == "decided: promote the DPO model to champion?"
    assert "decided\\-aligned has no champion yet" in question["body"]
    stack.answer("llm_pipeline", run_id, "approve", "Reject", comment="it rambles")
    assert stack.wait_end("llm_pipeline", run_id) == "success"
    states = {task.task_id: task.state for task in stack.api.tasks("llm_pipeline", run_id)}
    assert (states["promote"], states["report"]) == ("success", "success")
    assert stack.aliased(f"{name}-aligned", "champion") is None
    candidate = stack.aliased(f"{name}-aligned", "candidate")
    assert candidate is not None
    told = {key: candidate.get(f"approval.{key}") for key in ("verdict", "by", "comment")}
    assert told == {"verdict": "rejected", "by": "admin", "comment": "it rambles"}

    # Asked again, the person thinks otherwise: clearing `approve` asks anew, and what was built is not built again.
    cleared = {"dry_run": False, "task_ids": ["approve"], "dag_run_id": run_id, "include_downstream": True}
    stack.api.call("POST", "dags/llm_pipeline/clearTaskInstances", json={**cleared, "only_failed": False})
    stack.wait_state("llm_pipeline", run_id, "approve", "awaiting_input")
    question = stack.question("llm_pipeline", run_id, "approve")
    assert "has no champion yet" in question["body"], "the registered model exists by now, its alias does not"
    stack.answer("llm_pipeline", run_id, "approve", "Approve", comment=None)
    assert stack.wait_end("llm_pipeline", run_id) == "success"
    champion = stack.aliased(f"{name}-aligned", "champion")
    assert champion is not None
    assert champion["approval.verdict"] == "approved"
    assert "approval.comment" not in champion
    promotion = read_manifest(stack.xcom("llm_pipeline", run_id, "promote")["uri"])
    assert promotion.config["approval"]["by"] == "admin"


def test_nobody_answering_in_time_is_a_rejection_that_says_so(people_stack: LiveStack) -> None:
    hours = {"promote.approval_timeout_hours": 0.0005}
    run_id = ask(people_stack, "silent", overrides=hours)
    assert people_stack.wait_end("llm_pipeline", run_id) == "success"
    assert people_stack.xcom("llm_pipeline", run_id, "approve")["verdict"] == "timed_out"
    assert people_stack.aliased("silent-aligned", "champion") is None
    candidate = people_stack.aliased("silent-aligned", "candidate")
    assert candidate is not None
    assert candidate["approval.verdict"] == "timed_out"


def test_ratings_become_an_artifact_and_an_asset_event(people_stack: LiveStack) -> None:
    stack, dag = people_stack, "collect_preferences"
    if stack.aliased("decided-aligned", "candidate") is None:
        assert stack.wait_end("llm_pipeline", ask(stack, "decided", promotion="never")) == "success"
    run_id = stack.trigger(dag, run_name="decided", num_prompts=3, num_responses=2)
    for index in range(3):
        stack.wait_state(dag, run_id, "rate", "awaiting_input", map_index=index)
    assert stack.question(dag, run_id, "rate", 0)["options"] == ["A", "B", "Tie", "Skip"]
    stack.answer(dag, run_id, "rate", "A", map_index=0, reasons=["helpful"], comment="shorter")
    stack.answer(dag, run_id, "rate", "Tie", map_index=1, reasons=[], comment=None)
    stack.answer(dag, run_id, "rate", "B", map_index=2, reasons=None, comment=None)
    assert stack.wait_end(dag, run_id) == "success"
    made = stack.xcom(dag, run_id, "publish")
    manifest = read_manifest(made["uri"])
    assert manifest.ledger["questions"] == {"asked": 3, "answered": 2, "tie": 1, "skipped": 0, "unanswered": 0}
    assert [entry.role for entry in manifest.inputs] == ["responses", "model"]
    assert len(read_file(made["uri"], "preferences.jsonl").splitlines()) == 2
    events = stack.api.call("GET", "assets/events", params={"source_dag_id": dag, "source_run_id": run_id})
    (event,) = events["asset_events"]
    assert (event["name"], event["extra"]["uri"], event["extra"]["digest"], event["extra"]["pairs"]) == (
        "llm/preferences",
        made["uri"],
        made["digest"],
        2,
    )
