"""What the tasks of a comparison hand each other, and what becomes of a combination that fails."""

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException

from operators.compare import (
    AlignedEvaluationOperator,
    AlignOperator,
    comparison_request,
    expanded_tasks,
    reason_of_failure,
    store_comparison,
)
from operators.failures import StageConfigFailed
from operators.prepare import load_config, pipeline_key
from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store, write_json
from stages.config.compare import CompareConfig, CompareParams
from stages.config.errors import DataError
from stages.config.expansion import expand
from stages.config.graph import Stage
from stages.config.request import ArtifactRef, Failure, RunInfo, sha256_of

RUN = RunInfo(run_id="manual-1", name="comparison", dag_id="compare_alignment")


def artifact(name: str) -> dict[str, Any]:
    return ArtifactRef(kind="k", uri=f"file:///s/{name}", fingerprint=name, digest=name).model_dump(mode="json")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store((tmp_path / "store").as_uri())


@pytest.fixture
def run(store: Store) -> RunInfo:
    """What `resolve` leaves: two methods at one beta, with one seed."""
    params = CompareParams(recipe="tiny")
    found = expand(params)
    stored = found.shared.model_dump_json().encode()
    store.write_bytes(pipeline_key(RUN.run_id), stored)
    known = RUN.model_copy(update={"records": {"pipeline.json": sha256_of(stored)}})
    return store_comparison(store, known, params, found.combinations, list(found.configs))


class Task:
    def __init__(self, returned: dict[str, Any], map_index: int = 0) -> None:
        self.returned, self.map_index = returned, map_index

    def xcom_pull(self, *, task_ids: str, map_indexes: int | None = None) -> Any:
        return self.returned.get(task_ids if map_indexes is None else f"{task_ids}[{map_indexes}]")


def test_each_combination_has_its_stage_its_folder_and_its_configuration(store: Store, run: RunInfo) -> None:
    dpo, ppo = expanded_tasks(store, run)
    assert (dpo["stage"], ppo["stage"]) == ("dpo", "ppo")
    assert (dpo["name"], ppo["name"]) == ("dpo, beta 0.1, seed 0", "ppo, beta 0.1, seed 0")
    for number, told in enumerate((dpo, ppo)):
        operator = AlignOperator(combination=told, task_id="align")
        own = operator._run({})
        assert own.run_id == f"{run.run_id}.{number}"
        assert operator._run_of_instance(Task({}, number), own) == own
        assert Stage(told["stage"]) in load_config(store, own).selected
        assert operator.outlets == []  # no news for those who wait for aligned models


def test_a_configuration_that_something_changed_is_not_used(store: Store, run: RunInfo) -> None:
    own = AlignOperator(combination=expanded_tasks(store, run)[0], task_id="align")._run({})
    store.write_bytes(pipeline_key(own.run_id), store.read_bytes(pipeline_key(own.run_id)) + b" ")
    with pytest.raises(DataError, match="is not what the first task of the run wrote"):
        load_config(store, own)


def test_an_evaluation_reads_the_model_of_its_own_combination(store: Store, run: RunInfo) -> None:
    told = expanded_tasks(store, run)[1]
    operator = AlignedEvaluationOperator(combination=told, task_id="evaluate")
    assert operator.stage == "evaluate"
    ti = Task({"align[0]": artifact("dpo"), "align[1]": artifact("ppo"), "sft": artifact("sft")}, map_index=1)
    assert operator._made_by(ti, Stage.PPO)["fingerprint"] == "ppo"
    assert operator._made_by(ti, Stage.SFT)["fingerprint"] == "sft"


def test_without_a_model_there_is_nothing_to_evaluate(store: Store, run: RunInfo) -> None:
    operator = AlignedEvaluationOperator(combination=expanded_tasks(store, run)[1], task_id="evaluate")
    with pytest.raises(AirflowSkipException, match=r"align \[1\] left no model"):
        operator._made_by(Task({"align[0]": artifact("dpo")}, map_index=1), Stage.PPO)


def test_the_page_is_asked_for_whatever_has_a_result(store: Store, run: RunInfo) -> None:
    failure = Failure(category="non_finite", message="5 steps in a row\nhad no number", advice="Lower the rate.")
    write_json(store, run_key(f"{run.run_id}.1", Stage.PPO, "failure.json"), failure.model_dump(mode="json"))
    request = comparison_request(store, run, models={0: artifact("m")}, evaluations={0: artifact("e")})
    assert {role: ref.fingerprint for role, ref in request.inputs.items()} == {"model.0": "m", "evaluation.0": "e"}
    config = CompareConfig.model_validate(request.config)
    assert config.failures == {1: "ppo failed (non_finite): 5 steps in a row had no number"}
    assert [one.method for one in config.combinations] == ["dpo", "ppo"]
    assert request.stage is Stage.COMPARE


def test_a_model_whose_evaluation_failed_says_so(store: Store, run: RunInfo) -> None:
    models = {0: artifact("m0"), 1: artifact("m1")}
    request = comparison_request(store, run, models=models, evaluations={0: artifact("e")})
    failures = CompareConfig.model_validate(request.config).failures
    assert failures == {1: "evaluate ended without a result and recorded no reason; see the log of its task"}


def test_nothing_to_compare_is_an_error_with_every_reason(store: Store, run: RunInfo) -> None:
    with pytest.raises(StageConfigFailed, match=r"dpo, beta 0.1, seed 0: dpo ended .*ppo, beta 0.1, seed 0: ppo ended"):
        comparison_request(store, run, models={}, evaluations={})


def test_a_record_of_a_failure_that_cannot_be_read_is_no_second_failure(store: Store, run: RunInfo) -> None:
    store.write_bytes(run_key(f"{run.run_id}.0", Stage.DPO, "failure.json"), b"{")
    assert "its record cannot be read" in reason_of_failure(store, run, 0, Stage.DPO)
