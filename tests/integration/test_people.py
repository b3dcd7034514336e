"""People in the loop over Airflow's REST API, on a whole live stack: decisions and ratings."""

import pytest

from stages.artifacts.manifests import read_file, read_manifest
from stages.config.graph import Stage
from tests.live_stack import COLLECT, PIPELINE, LiveStack

pytestmark = [
    pytest.mark.live,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("first_run"),  # so that the stages of all runs here exist already
]


def test_a_rejected_model_stays_candidate_with_all_evidence_and_an_approved_one_becomes_champion(
    live: LiveStack,
) -> None:
    name = "decided"
    run_id = live.pipeline(name, promotion="approval")
    live.wait_state(PIPELINE, run_id, "approve", "awaiting_input")
    question = live.question(PIPELINE, run_id, "approve")
    assert question["subject"] == "decided: promote the DPO model to champion?"
    assert "decided\\-aligned has no champion yet" in question["body"]

    # As long as nobody answers, the run is not through: late, which the webhook is told while it still waits.
    live.wait("a notice that the run is late", lambda: "late" in live.inbox.about(run_id), seconds=120)
    assert live.states(PIPELINE, run_id)["approve"] == "awaiting_input"
    (late,) = [told for told in live.inbox.messages if (told["event"], told.get("run_id")) == ("late", run_id)]
    assert late["dag_id"] == PIPELINE

    live.answer(PIPELINE, run_id, "approve", "Reject", comment="it rambles")
    assert live.wait_end(PIPELINE, run_id) == "success"
    states = live.states(PIPELINE, run_id)
    assert (states["promote"], states["report"]) == ("success", "success")
    assert live.aliased(f"{name}-aligned", "champion") is None
    candidate = live.aliased(f"{name}-aligned", "candidate")
    assert candidate is not None
    told = {key: candidate.get(f"approval.{key}") for key in ("verdict", "by", "comment")}
    assert told == {"verdict": "rejected", "by": "admin", "comment": "it rambles"}

    # Asked again, the person thinks otherwise: clearing `approve` asks anew, and what was built is not built again.
    cleared = {"dry_run": False, "task_ids": ["approve"], "dag_run_id": run_id, "include_downstream": True}
    live.api.call("POST", f"dags/{PIPELINE}/clearTaskInstances", json={**cleared, "only_failed": False})
    live.wait_state(PIPELINE, run_id, "approve", "awaiting_input")
    question = live.question(PIPELINE, run_id, "approve")
    assert "has no champion yet" in question["body"], "the registered model exists by now, its alias does not"
    live.answer(PIPELINE, run_id, "approve", "Approve", comment=None)
    assert live.wait_end(PIPELINE, run_id) == "success"
    champion = live.aliased(f"{name}-aligned", "champion")
    assert champion is not None
    assert champion["approval.verdict"] == "approved"
    assert "approval.comment" not in champion
    promotion = read_manifest(live.artifact(run_id, Stage.PROMOTE))
    assert promotion.config["approval"]["by"] == "admin"
    hits = {name for name, row in live.rows(run_id).items() if row.state == "hit"}
    assert {"pretrain", "sft", "reward", "dpo", "evaluate"} <= hits


def test_nobody_answering_in_time_is_a_rejection_that_says_so(live: LiveStack) -> None:
    run_id = live.pipeline("silent", promotion="approval", overrides={"promote.approval_timeout_hours": 0.0005})
    assert live.wait_end(PIPELINE, run_id) == "success"
    assert live.xcom(PIPELINE, run_id, "approve")["verdict"] == "timed_out"
    assert live.aliased("silent-aligned", "champion") is None
    candidate = live.aliased("silent-aligned", "candidate")
    assert candidate is not None
    assert candidate["approval.verdict"] == "timed_out"


def test_ratings_become_an_artifact_and_an_asset_event(live: LiveStack) -> None:
    prompts = ["What is a river?", "Say hello.", "Name a colour."]
    run_id = live.trigger(COLLECT, prompts=prompts, num_responses=2, max_response_length=8)
    for index in range(3):
        live.wait_state(COLLECT, run_id, "rate", "awaiting_input", map_index=index)
    question = live.question(COLLECT, run_id, "rate", 0)
    assert question["options"] == ["A", "B", "Tie", "Skip"]
    assert question["subject"] == "Which response is better: What is a river?"
    live.answer(COLLECT, run_id, "rate", "A", map_index=0, reasons=["helpful"], comment="shorter")
    live.answer(COLLECT, run_id, "rate", "Tie", map_index=1, reasons=[], comment=None)
    live.answer(COLLECT, run_id, "rate", "B", map_index=2, reasons=None, comment=None)
    assert live.wait_end(COLLECT, run_id) == "success"
    made = live.xcom(COLLECT, run_id, "publish")
    manifest = read_manifest(made["uri"])
    assert manifest.ledger["questions"] == {"asked": 3, "answered": 2, "tie": 1, "skipped": 0, "unanswered": 0}
    assert [entry.role for entry in manifest.inputs] == ["responses", "model"]
    assert len(read_file(made["uri"], "preferences.jsonl").splitlines()) == 2
    events = live.api.call("GET", "assets/events", params={"source_dag_id": COLLECT, "source_run_id": run_id})
    (event,) = events["asset_events"]
    assert (event["name"], event["extra"]["uri"], event["extra"]["digest"], event["extra"]["pairs"]) == (
        "llm/preferences",
        made["uri"],
        made["digest"],
        2,
    )
