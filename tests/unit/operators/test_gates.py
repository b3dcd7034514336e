"""The task `gate_<stage>`: what it decides without a job, with one, and again; red, passed over, killed, retried."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException

from operators.dispatch import watch_settings
from operators.failures import (
    GateFailed,
    StageConfigFailed,
    StageFailed,
    StageInfrastructureFailed,
    StagePreempted,
    StageRetryPolicy,
)
from operators.gates import GateOperator, Recorded, _earlier, judged, pointless, tell_mlflow
from operators.prepare import PIPELINE_RECORD, build_request, pipeline_key
from stages.artifacts.addresses import open_store
from stages.artifacts.store import Store, read_json, write_json
from stages.config.curate import NEW_BYTES, NEW_PAIRS
from stages.config.errors import Category
from stages.config.execution import LOCAL_CPUS
from stages.config.gate_records import (
    NO_PAIRS,
    WANT_OF_COMPUTE,
    Findings,
    GateRecord,
    GateRequest,
    Outcome,
    asked_of,
    failed,
    findings_key,
    gate_key,
    passed,
    skipped,
)
from stages.config.gates import GatesConfig
from stages.config.graph import BASE_MODEL, GRAPH, REWARD_MODEL, Stage, gated_stages
from stages.config.pipeline import PREVIOUS
from stages.config.request import ArtifactRef, Failure, RunInfo, sha256_of
from stages.config.resolve import resolve
from stages.judge.gates.acceptance import unaccepted
from tests.gate_world import publish_good
from tests.ray_stand_in import Job, StandInRay
from tests.task_state import Memory

FOUND = Findings(
    checks=(passed("reload", "outputs differ by 0"),), metrics={"accept/accuracy_low": 0.6, "accept/balanced_low": 0.7}
)
WITHOUT_JOBS = {"overrides": {"gates.recompute": False}, "override_reason": "a smoke test"}


class TaskInstance:
    dag_id, run_id, map_index, try_number, start_date = "llm_pipeline", "manual__1", -1, 1, None

    def __init__(self, task_id: str, xcoms: dict[str, Any]) -> None:
        self.task_id, self.xcoms = task_id, xcoms

    def xcom_pull(self, task_ids: str) -> Any:
        return self.xcoms.get(task_ids)

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[key] = value


class World:
    """A store with a run that is as it should be, and a Ray head that the test plays."""

    def __init__(self, home: Path, ray: StandInRay) -> None:
        self.home, self.ray = home, ray
        self.store: Store = open_store((home / "store").as_uri())
        self.made: dict[Stage, ArtifactRef] = {}
        self.values: dict[str, Any] = {"recipe": "tiny"}
        self.given: dict[str, ArtifactRef] = {}
        self.state = Memory()

    def publish(self, **changed: dict[str, Any]) -> None:
        self.made = publish_good(self.store, self.home, changed={Stage(name): it for name, it in changed.items()})

    def gate(self, stage: Stage, **settings: Any) -> Any:
        """Run the task of a stage's gate to its end."""
        if not self.made:
            self.publish()
        config = resolve(self.values).with_given(self.given)
        stored = config.model_dump_json().encode()
        self.store.write_bytes(pipeline_key("r"), stored)
        run = RunInfo(run_id="r", name="n", records={PIPELINE_RECORD: sha256_of(stored)})
        xcoms: dict[str, Any] = {made.value: ref.model_dump(mode="json") for made, ref in self.made.items()}
        xcoms["resolve"] = run.model_dump(mode="json")
        operator = GateOperator(stage=stage, deferrable=False, poll_interval=0.05, **settings)
        return operator.execute(
            {
                "ti": TaskInstance(operator.task_id, xcoms),
                "dag_run": SimpleNamespace(clear_number=0, triggering_user_name="ada"),
                "task_state_store": self.state,
            }
        )

    def record(self, stage: Stage) -> GateRecord:
        return GateRecord.model_validate(read_json(self.store, gate_key("r", stage)))

    def when_submitted(self, act: Callable[[Job], None]) -> threading.Thread:
        def play() -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                if started := [job for job in self.ray.jobs.values() if job.status == "RUNNING"]:
                    act(started[0])
                    return
                time.sleep(0.02)

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        return thread

    def job_finds(self, stage: Stage, findings: Findings) -> threading.Thread:
        """Play `python -m stages.gate` as it ends."""

        def end(job: Job) -> None:
            request = GateRequest.model_validate(read_json(self.store, gate_key("r", stage, "config.json")))
            assert request.submission_id == job.submission_id
            for key in (findings_key(request), gate_key("r", stage, "result.json")):
                write_json(self.store, key, findings.model_dump(mode="json"))
            job.driver_exit_code, job.status = 0, "SUCCEEDED"

        return self.when_submitted(end)


@pytest.fixture
def world(tmp_path: Path, ray: StandInRay, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("AIRFLOW_CONN_RAY_DEFAULT", json.dumps(ray.connection))
    monkeypatch.setenv("ARTIFACT_STORE", (tmp_path / "store").as_uri())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return World(tmp_path, ray)


@pytest.mark.parametrize("stage", [Stage.CURATE, Stage.TOKENIZE, Stage.EVALUATE])
def test_what_is_recorded_needs_no_job(world: World, stage: Stage):
    answer = world.gate(stage)
    record = world.record(stage)
    assert (answer["outcome"], answer["job"], world.ray.posts) == ("passed", "none", [])
    assert (record.outcome, record.failures, record.artifact) == (Outcome.PASSED, (), world.made[stage])
    assert record.bounds == resolve(world.values).gates.bounds_of(stage)


@pytest.mark.parametrize(
    "stage", [stage for stage in gated_stages() if stage is not Stage.CURATE and not GRAPH[stage].asked_by]
)
def test_without_jobs_every_gate_decides_by_what_is_recorded(world: World, stage: Stage):
    world.values |= {**WITHOUT_JOBS, "gold_scorer": "train"}
    assert world.gate(stage)["outcome"] == "passed"
    assert world.ray.posts == []
    left_out = [check for check in world.record(stage).checks if check.name == "recomputed"]
    assert len(left_out) == GRAPH[stage].trains
    for check in left_out:
        assert check.found == (
            "reload, probes and acceptance are left out: gates.recompute is off, because a smoke test"
        )


def test_without_jobs_a_reward_model_is_not_accepted_and_that_is_said(world: World):
    overrides = {"gates.recompute": False, "gates.bounds": list(GatesConfig().bounds)}
    world.values |= {"overrides": overrides, "override_reason": "a smoke test"}
    world.gate(Stage.REWARD)
    found = {check.name: check for check in world.record(Stage.REWARD).checks}
    assert found["accept/accuracy_low"].outcome is Outcome.SKIPPED
    assert "a smoke test" in found["accept/accuracy_low"].found


def test_a_model_is_examined_by_one_job_and_a_repeated_run_starts_none(world: World):
    world.job_finds(Stage.SFT, FOUND)
    assert world.gate(Stage.SFT)["job"] == world.ray.posts[0]
    (job,) = world.ray.jobs.values()
    assert " python -m stages.gate " in job.entrypoint
    assert job.entrypoint.endswith("/runs/r/gate_sft/config.json")
    assert job.body["metadata"]["athanor.stage"] == "gate_sft"
    assert FOUND.checks[0] in world.record(Stage.SFT).checks
    world.state = Memory()  # another run
    assert world.gate(Stage.SFT)["job"] == "kept"
    assert len(world.ray.jobs) == 1
    assert FOUND.checks[0] in world.record(Stage.SFT).checks


@pytest.mark.parametrize(("gpus", "reserved"), [(0, (None, None)), (0.5, (3, 0.5)), (2, (3, 1))])
def test_a_gate_reserves_the_gpu_that_it_measures_on(
    world: World, gpus: float, reserved: tuple[float | None, float | None]
):
    world.values["overrides"] = {"execution.sft.gpus_per_worker": gpus, "execution.sft.cpus_per_worker": 3}
    world.job_finds(Stage.SFT, FOUND)
    world.gate(Stage.SFT)
    (job,) = world.ray.jobs.values()
    assert (job.body.get("entrypoint_num_cpus"), job.body.get("entrypoint_num_gpus")) == reserved


@pytest.mark.parametrize("stage", [stage for stage in gated_stages() if GRAPH[stage].trains])
def test_a_process_that_has_trained_the_model_answers_what_its_gate_asks(world: World, stage: Stage):
    world.publish()
    world.values |= {"gold_scorer": "train"} if stage is Stage.GOLD else {}
    config, run = resolve(world.values), RunInfo(run_id="r", name="n")
    request = build_request(stage, run=run, store=world.store, config=config, upstream=dict(world.made))
    asked = asked_of(request, world.made[stage])
    assert asked is not None
    write_json(world.store, findings_key(asked), FOUND.model_dump(mode="json"))
    assert world.gate(stage)["job"] == "kept"
    assert world.ray.posts == []
    assert FOUND.checks[0] in world.record(stage).checks


def test_a_given_reward_model_is_accepted_or_not_before_ppo(world: World):
    world.publish()
    world.given = {REWARD_MODEL: world.made.pop(Stage.REWARD)}
    world.values |= {"reward_model": "models:/theirs/1", "overrides": {"gates.bounds": list(GatesConfig().bounds)}}
    world.job_finds(Stage.REWARD, FOUND)
    assert world.gate(Stage.REWARD)["job"] == world.ray.posts[0]
    request = GateRequest.model_validate(read_json(world.store, gate_key("r", Stage.REWARD, "config.json")))
    assert (request.artifact, request.is_given) == (world.given[REWARD_MODEL], True)
    assert request.inputs == {"tokens": world.made[Stage.TOKENIZE], "model": world.made[Stage.SFT]}

    record = world.record(Stage.REWARD)
    assert record.is_given
    assert "given" in {check.name for check in record.checks}
    world.state = Memory()
    world.values["overrides"] = {"gates.bounds": ["reward: accept/balanced_low > 0.8"]}
    with pytest.raises(GateFailed, match=r"accept/balanced_low: 0\.7; allowed: > 0\.8"):
        world.gate(Stage.REWARD)


def test_without_pairs_a_given_reward_model_is_not_judged_by_them_and_that_is_said(world: World):
    """A run that only reinforces reads no pairs; it is another matter where one trains a reward model."""
    none = unaccepted(NO_PAIRS)
    world.publish()
    reward = world.made[Stage.REWARD]
    world.values["overrides"] = {"gates.bounds": list(GatesConfig().bounds)}
    world.job_finds(Stage.REWARD, none)
    with pytest.raises(GateFailed, match=f"not measured: {NO_PAIRS}"):
        world.gate(Stage.REWARD)
    world.state, world.given = Memory(), {REWARD_MODEL: reward}
    world.values |= {"reward_model": "models:/theirs/1"}
    world.job_finds(Stage.REWARD, none)
    world.gate(Stage.REWARD)
    found = {check.name: check for check in world.record(Stage.REWARD).checks}
    assert found["accept/accuracy_low"].outcome is Outcome.SKIPPED
    assert "give some" in found["accept/accuracy_low"].found


@pytest.mark.parametrize("values", [{"alignment": "dpo"}, {"last_stage": "sft"}])
def test_a_given_reward_model_that_nothing_learns_from_is_not_examined(world: World, values: dict[str, Any]):
    world.publish()
    config = resolve({"recipe": "tiny", **values}).with_given({REWARD_MODEL: world.made[Stage.REWARD]})
    assert config.given_instead(Stage.REWARD) is None


def test_it_is_not_asked_where_it_could_not_answer(world: World):
    def asked(stage: Stage) -> Any:
        config = resolve(world.values)
        run = RunInfo(run_id="r", name="n")
        return build_request(stage, run=run, store=world.store, config=config, upstream=dict(world.made)).gate

    world.publish()
    assert asked(Stage.CURATE) is None
    world.values["gold_scorer"] = "train"
    assert asked(Stage.REWARD) is None, "the gold scorer may not be trained yet"
    assert asked(Stage.GOLD) is not None
    world.values = {"recipe": "tiny", **WITHOUT_JOBS}
    assert asked(Stage.SFT) is None


@pytest.mark.parametrize(
    ("overrides", "reserved"),
    [
        ({}, 1),
        ({"execution.sft.cpus_per_worker": 2}, 2),
        ({"execution.sft.cpus_per_worker": 8}, 2),  # the machine has two
        ({"execution.sft.cpus_per_worker": 2, "execution.sft.num_workers": 1}, None),  # its workers reserve them
        ({"execution.sft.entrypoint_cpus": 3}, 3),
    ],
)
def test_on_one_machine_jobs_take_turns_on_its_cores(
    world: World, overrides: dict[str, Any], reserved: float | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(LOCAL_CPUS, "2")
    world.values["overrides"] = overrides
    world.job_finds(Stage.SFT, FOUND)
    world.gate(Stage.SFT)
    (job,) = world.ray.jobs.values()
    assert job.body.get("entrypoint_num_cpus") == reserved


def test_for_its_turn_a_job_waits_as_long_as_its_task_may(world: World, monkeypatch: pytest.MonkeyPatch):
    world.publish()
    config, run = resolve(world.values), RunInfo(run_id="r", name="n")

    def patience(stage: Stage) -> float:
        request = build_request(stage, run=run, store=world.store, config=config, upstream=dict(world.made))
        return watch_settings(request, poll_interval=1, unreachable_seconds=1, progress_seconds=1).capacity_seconds

    assert patience(Stage.SFT) == 3600
    monkeypatch.setenv(LOCAL_CPUS, "2")
    assert patience(Stage.SFT) == 0
    assert patience(Stage.TOKENIZE) == 3600, "light work takes no turns"


def test_another_bound_asks_no_job_again_and_other_content_does(world: World):
    world.job_finds(Stage.REWARD, FOUND)
    world.gate(Stage.REWARD)
    world.state = Memory()
    world.values["overrides"] = {"gates.bounds": ["reward: accept/accuracy_low > 0.59"]}
    assert world.gate(Stage.REWARD)["job"] == "kept"
    world.values["overrides"] = {"gates.bounds": ["reward: accept/accuracy_low > 0.61"]}
    with pytest.raises(GateFailed, match=r"accept/accuracy_low: 0\.6; allowed: > 0\.61"):
        world.gate(Stage.REWARD)
    assert len(world.ray.jobs) == 1
    world.values["overrides"] = {"gates.max_pairs": 32}
    world.job_finds(Stage.REWARD, FOUND)
    world.gate(Stage.REWARD)
    assert len(world.ray.jobs) == 2


def test_runs_that_share_a_model_keep_their_records_apart_in_mlflow(world: World, monkeypatch: pytest.MonkeyPatch):
    """A hit belongs to the run of MLflow that built it, whichever run asks."""
    files: dict[tuple[str, str], str] = {}

    class Server:
        def __init__(self, tracking_uri: str) -> None: ...

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *exception: object) -> None: ...

        def set_tag(self, run_id: str, key: str, value: str) -> None: ...

        def log_text(self, run_id: str, name: str, text: str) -> None:
            files[run_id, name] = text

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setattr("operators.mlflow.MlflowServer", Server)
    world.publish()
    artifact = world.made[Stage.SFT].model_copy(update={"mlflow_run_id": "built"})
    at = "2026-11-29T00:00:00+00:00"
    for run_id, outcome in (("a", Outcome.FAILED), ("b", Outcome.PASSED)):
        record = GateRecord(stage=Stage.SFT, artifact=artifact, outcome=outcome, at=at)
        tell_mlflow(RunInfo(run_id=run_id, name="n"), record)
    kept = {name: GateRecord.model_validate_json(text).outcome for (_, name), text in files.items()}
    assert kept == {"gate-a.json": Outcome.FAILED, "gate-b.json": Outcome.PASSED, "gate.json": Outcome.PASSED}


def test_a_damaged_finding_is_measured_again(world: World, caplog: pytest.LogCaptureFixture):
    world.job_finds(Stage.SFT, FOUND)
    world.gate(Stage.SFT)
    (key,) = world.store.list("gates")
    world.store.write_bytes(key, b"{")
    world.state = Memory()
    world.job_finds(Stage.SFT, FOUND)
    assert world.gate(Stage.SFT)["outcome"] == "passed"
    assert len(world.ray.jobs) == 2
    assert "It is measured again." in caplog.text


def test_a_failed_gate_says_both_numbers_what_to_do_and_keeps_its_evidence(world: World):
    broken = {**world_ledger(), "heldout": {}}
    broken["train"] = {**broken["train"], "documents": {"documents": 4, "bytes": 500, "tokens": 200}}
    world.publish(tokenize={"ledger": broken})
    with pytest.raises(GateFailed) as caught:
        world.gate(Stage.TOKENIZE)
    told = str(caught.value)
    assert "ledger_train_documents: 4 (train documents tokenized); allowed: 5 (published by curate)" in told
    assert f"All evidence is in {world.store.root_uri}/runs/r/gate_tokenize/gate.json." in told
    assert "override_gates=tokenize and override_reason" in told
    assert StageRetryPolicy().evaluate(caught.value, 1, 10).action.value == "fail"
    record = world.record(Stage.TOKENIZE)
    assert record.outcome is Outcome.FAILED
    assert "ledger_train_documents" in {check.name for check in record.failures}
    failure = Failure.model_validate(read_json(world.store, gate_key("r", Stage.TOKENIZE, "failure.json")))
    assert (failure.category, failure.message in told) == (Category.DATA, True)


@pytest.mark.parametrize(("new_bytes", "outcome"), [(0.0, Outcome.PASSED), (1e6, Outcome.FAILED)])
def test_a_retraining_without_anything_new_meets_no_bounds(world: World, new_bytes: float, outcome: Outcome):
    """It ends with curate and is a success, whatever a run that trains would have to show."""
    world.publish()
    config = resolve({"recipe": "tiny", "overrides": {"gates.bounds": ["curate: curate/documents_kept >= 100"]}})
    given = config.with_given({PREVIOUS: world.made[Stage.CURATE]})
    request = GateRequest.model_construct(stage=Stage.CURATE, artifact=world.made[Stage.CURATE])
    metrics = {NEW_BYTES: new_bytes, NEW_PAIRS: 0.0, "curate/documents_kept": 3.0}
    for one, expected in ((given, outcome), (config, Outcome.FAILED)):
        known = Recorded(request, (), metrics)
        record = judged(known, one.gates, Findings(), job="none", by="", pointless=pointless(one, known))
        assert record.outcome is expected
        assert [check.name for check in record.checks] == ["curate/documents_kept"]


def world_ledger() -> dict[str, Any]:
    from tests.gate_world import TOKENS

    return dict(TOKENS)


def test_a_person_lets_a_failed_gate_pass_and_that_is_recorded(world: World, caplog: pytest.LogCaptureFixture):
    world.values |= {"overrides": {"gates.bounds": ["curate: curate/documents_kept >= 1e6"]}}
    with pytest.raises(GateFailed, match=r"curate/documents_kept: 10; allowed: >= 1e\+06"):
        world.gate(Stage.CURATE)
    assert world.store.exists(gate_key("r", Stage.CURATE, "failure.json"))
    world.values |= {"override_gates": ["curate"], "override_reason": "a small corpus is enough here"}
    answer = world.gate(Stage.CURATE)
    record = world.record(Stage.CURATE)
    assert record.outcome is Outcome.FAILED
    assert record.override is not None
    assert (record.override.by, record.override.reason) == ("ada", "a small corpus is enough here")
    assert "passed by ada: a small corpus is enough here" in answer["summary"]
    assert "gate_curate failed and is passed over" in caplog.text
    assert not world.store.exists(gate_key("r", Stage.CURATE, "failure.json"))


def test_an_override_of_another_gate_lets_nothing_pass(world: World):
    world.values |= {"overrides": {"gates.bounds": ["curate: curate/documents_kept >= 1e6"]}}
    world.values |= {"override_gates": ["reward"], "override_reason": "few pairs"}
    with pytest.raises(GateFailed):
        world.gate(Stage.CURATE)


def test_a_gate_that_passes_is_not_recorded_as_overridden(world: World):
    world.values |= {"override_gates": ["all"], "override_reason": "in case"}
    world.gate(Stage.CURATE)
    assert world.record(Stage.CURATE).override is None


def test_what_the_job_found_wrong_stops_the_run(world: World):
    wrong = failed("reload", "outputs differ by 1", "up to 1e-5", "Report it.")
    world.job_finds(Stage.DPO, Findings(checks=(wrong,)))
    with pytest.raises(GateFailed, match="reload: outputs differ by 1; allowed: up to 1e-5"):
        world.gate(Stage.DPO)


def test_what_was_wrong_and_is_put_right_turns_the_gate_green(world: World):
    """The repaired artifact has the content that the manifest always named, so nothing else tells the two apart."""
    damaged = failed("files", "model.safetensors has other bytes", "those of the manifest", "Clear dpo.")
    world.job_finds(Stage.DPO, Findings(checks=(damaged,)))
    with pytest.raises(GateFailed, match=r"files: model\.safetensors has other bytes"):
        world.gate(Stage.DPO)
    world.state = Memory()
    world.job_finds(Stage.DPO, FOUND)
    assert world.gate(Stage.DPO)["outcome"] == "passed"
    assert len(world.ray.jobs) == 2
    world.state = Memory()
    assert world.gate(Stage.DPO)["job"] == "kept"


def test_what_was_left_out_for_want_of_compute_is_asked_again(world: World):
    left = Findings(checks=(skipped("heldout_again", f"512 of them take 9e+99 {WANT_OF_COMPUTE}"),))
    world.job_finds(Stage.SFT, left)
    world.gate(Stage.SFT)
    world.state = Memory()
    world.job_finds(Stage.SFT, FOUND)
    assert world.gate(Stage.SFT)["job"] != "kept"


def test_what_is_recorded_wrong_stops_the_run_before_any_job(world: World):
    world.publish(sft={"ledger": {"conversations": 7}})
    with pytest.raises(GateFailed, match=r"ledger_conversations: 7 .*; allowed: 8") as caught:
        world.gate(Stage.SFT)
    assert world.ray.posts == []
    assert "1 of" in str(caught.value)
    found = {check.name: check for check in world.record(Stage.SFT).checks}
    assert found["recomputed"].outcome is Outcome.SKIPPED


def dying(world: World, stage: Stage, category: Category) -> Callable[[Job], None]:
    def die(job: Job) -> None:
        told = Failure(category=category, message="config.json names no architecture.", advice="Build it again.")
        write_json(world.store, gate_key("r", stage, "failure.json"), told.model_dump(mode="json"))
        job.driver_exit_code, job.status = 4, "FAILED"

    return die


def test_a_job_that_no_retry_can_help_is_a_failed_check_that_a_person_may_pass(world: World):
    world.values["overrides"] = {"gates.bounds": list(GatesConfig().bounds)}
    world.when_submitted(dying(world, Stage.REWARD, Category.DATA))
    with pytest.raises(GateFailed, match=r"recomputed: config\.json names no architecture\."):
        world.gate(Stage.REWARD)
    (check,) = world.record(Stage.REWARD).failures
    assert (check.name, check.advice) == ("recomputed", "Build it again.")
    world.values |= {"override_gates": ["reward"], "override_reason": "known"}
    world.when_submitted(dying(world, Stage.REWARD, Category.DATA))
    assert "passed by ada: known" in world.gate(Stage.REWARD)["summary"]
    assert len(world.ray.jobs) == 2


def test_a_failed_record_is_put_aside_and_not_replaced(world: World):
    world.values |= {"overrides": {"gates.bounds": ["curate: curate/documents_kept >= 1e6"]}}
    for _ in range(2):
        with pytest.raises(GateFailed):
            world.gate(Stage.CURATE)
    world.values["overrides"] = {}
    for _ in range(2):
        world.gate(Stage.CURATE)
    names = {key.rpartition("/")[2] for key in world.store.list("runs/r/gate_curate")}
    assert names >= {"gate.json", "gate-1.json", "gate-2.json"}
    assert "gate-3.json" not in names
    earlier = GateRecord.model_validate(read_json(world.store, gate_key("r", Stage.CURATE, "gate-2.json")))
    assert [check.name for check in earlier.failures] == ["curate/documents_kept"]
    assert world.record(Stage.CURATE).outcome is Outcome.PASSED


def test_an_artifact_that_is_not_what_the_stage_published_is_red_and_not_an_error(world: World):
    world.publish()
    ref = world.made[Stage.CURATE]
    world.made[Stage.CURATE] = ref.model_copy(update={"digest": "0" * 64})
    with pytest.raises(GateFailed, match=f"manifest: {ref.uri} has content {ref.digest[:12]}, the run expects 000000"):
        world.gate(Stage.CURATE)


def test_a_model_made_from_another_reference_than_the_runs_is_red(world: World):
    world.publish()
    world.values |= WITHOUT_JOBS
    other = world.made[Stage.PRETRAIN]
    world.made[Stage.SFT] = other  # as if the run had another SFT model than DPO has read
    with pytest.raises(GateFailed, match=r"input_model: made from content .*; allowed: the run's model has content"):
        world.gate(Stage.DPO)


def test_a_reward_model_is_asked_about_by_the_runs_gold_scorer(world: World):
    def asked(stage: Stage) -> GateRequest:
        world.job_finds(stage, FOUND).join(0)
        world.state = Memory()
        world.gate(stage)
        return GateRequest.model_validate(read_json(world.store, gate_key("r", stage, "config.json")))

    assert asked(Stage.REWARD).gold is None
    world.values["gold_scorer"] = "train"
    found = asked(Stage.REWARD)
    assert found.gold is not None
    assert (found.gold.digest, found.gold.kind) == (world.made[Stage.GOLD].digest, "gold-model")
    assert asked(Stage.GOLD).gold is None
    assert len(world.ray.jobs) == 3  # with a gold scorer the same reward model is examined again


def test_a_run_that_starts_from_a_champion_asks_about_the_reward_model_that_this_was_trained_with(world: World):
    world.publish()
    champion = world.made[Stage.PPO]
    world.values |= {"base_model": champion.uri, "train_reward": True}
    world.given = {BASE_MODEL: champion}
    config = resolve(world.values).with_given(world.given)
    assert _earlier(config, Stage.REWARD) == world.made[Stage.REWARD].model_copy(
        update={"mlflow_run_id": None, "mlflow_model_id": None}
    )
    assert _earlier(config, Stage.GOLD) is _earlier(config, Stage.SFT) is None
    assert _earlier(config.with_given({BASE_MODEL: world.made[Stage.DPO]}), Stage.REWARD) is None
    assert _earlier(config.with_given({}), Stage.REWARD) is None
    world.store.delete(f"{champion.uri.removeprefix(world.store.root_uri + '/')}/manifest.json")
    assert _earlier(config, Stage.REWARD) is None


def test_a_reward_model_that_lost_clearly_is_red_in_the_record(world: World):
    world.publish()
    worse = {"accept/earlier_accuracy": 0.9, "accept/gain": -0.2, "accept/gain_low": -0.3, "accept/gain_high": -0.1}
    known = Recorded(GateRequest(stage=Stage.REWARD, run=RunInfo(run_id="r", name="n"), store_uri="file:///s",
                                 artifact=world.made[Stage.REWARD]), ())  # fmt: skip
    record = judged(known, GatesConfig(bounds=()), Findings(metrics=worse), job="j", by="ada")
    assert [check.name for check in record.failures] == ["earlier_reward_model"]


def test_a_gate_of_a_stage_that_the_run_does_without_skips_itself(world: World):
    world.values["alignment"] = "dpo"
    with pytest.raises(AirflowSkipException, match="ppo is not part of this run: alignment=dpo"):
        world.gate(Stage.PPO)
    world.values["dry_run"] = True
    with pytest.raises(AirflowSkipException, match="dry run"):
        world.gate(Stage.CURATE)


def test_without_an_artifact_there_is_nothing_to_decide_about(world: World):
    world.publish()
    del world.made[Stage.SFT]
    with pytest.raises(StageConfigFailed, match="task 'sft' left no artifact"):
        world.gate(Stage.SFT)


def test_a_job_that_fails_is_retried_like_any_other(world: World):
    def die(job: Job) -> None:
        told = Failure(category=Category.OUT_OF_MEMORY, message="out of memory", advice="Less.")
        write_json(world.store, gate_key("r", Stage.SFT, "failure.json"), told.model_dump(mode="json"))
        job.driver_exit_code, job.status = 5, "FAILED"

    world.when_submitted(die)
    with pytest.raises(StageFailed, match="out of memory") as caught:
        world.gate(Stage.SFT)
    assert caught.value.retryable
    world.job_finds(Stage.SFT, FOUND)
    assert world.gate(Stage.SFT)["outcome"] == "passed"
    assert len(world.ray.jobs) == 2


def test_a_success_without_a_record_means_another_store(world: World):
    world.when_submitted(lambda job: setattr(job, "status", "SUCCEEDED"))
    with pytest.raises(StageInfrastructureFailed, match=r"gate_sft/result\.json does not exist\. Check that Airflow"):
        world.gate(Stage.SFT)


def test_the_next_attempt_attaches_to_the_job_of_the_one_before(world: World, monkeypatch: pytest.MonkeyPatch):
    submitted = threading.Event()
    world.when_submitted(lambda job: submitted.set())

    def lose(*_: Any, **__: Any) -> None:
        assert submitted.wait(20)
        raise RuntimeError("the task's process is gone")

    with monkeypatch.context() as patch:
        patch.setattr(GateOperator, "_wait", lose)
        with pytest.raises(RuntimeError):
            world.gate(Stage.SFT)
    assert world.ray.stops == []
    world.job_finds(Stage.SFT, FOUND)
    assert world.gate(Stage.SFT)["outcome"] == "passed"
    assert len(world.ray.jobs) == 1


def test_a_killed_gate_stops_its_job(world: World, monkeypatch: pytest.MonkeyPatch):
    """As Airflow's task runner does: SIGTERM calls `on_kill` of the operator that runs."""
    running: list[GateOperator] = []
    waits = GateOperator._wait

    def note(self: GateOperator, *arguments: Any) -> Any:
        running.append(self)
        return waits(self, *arguments)

    def on_signal(signum: int, frame: Any) -> None:
        running[0].on_kill()

    def kill(job: Job) -> None:
        time.sleep(0.3)  # until the task waits
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(GateOperator, "_wait", note)
    monkeypatch.setattr(GateOperator, "_is_still_wanted", lambda self, ti: False)
    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        world.when_submitted(kill)
        with pytest.raises(StagePreempted):
            world.gate(Stage.SFT)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(world.ray.stops) == 1


def test_a_deferred_gate_reads_what_the_run_stored_again_when_it_resumes(world: World):
    """What travels through the trigger lacks the digests of the run's records; a changed configuration is refused."""
    from operators.dispatch import Carried
    from operators.ray.submission import Submission

    world.values |= WITHOUT_JOBS
    world.gate(Stage.SFT)
    run = RunInfo(run_id="r", name="n", records={PIPELINE_RECORD: "0" * 64})
    carried = Carried(
        run=run,
        submission=Submission("athanor-gate_sft-1", 1, 1),
        reattached=False,
        max_retries=2,
        micro_batch_size=4,
        links={},
    )
    event = {
        "submission_id": "athanor-gate_sft-1",
        "status": "SUCCEEDED",
        "message": "",
        "error_type": None,
        "exit_code": 0,
        "carry": carried.to_json(),
    }
    context = {
        "ti": TaskInstance("gate_sft", {"resolve": run.model_dump(mode="json")}),
        "dag_run": SimpleNamespace(clear_number=0, triggering_user_name=None),
        "task_state_store": world.state,
    }
    with pytest.raises(StageFailed, match="is not what the first task of the run wrote"):
        GateOperator(stage=Stage.SFT).execute_complete(context, event)
