"""The DAG's shape and policy, for every alignment, last stage and starting point."""

from itertools import pairwise, product

import pytest
from airflow.sdk import TriggerRule

from dags.llm_pipeline import llm_pipeline
from operators.failures import MAX_RETRIES, StageRetryPolicy
from operators.gates import GateOperator
from operators.operator import StageOperator
from stages.config.gates import gate_name
from stages.config.graph import GRAPH, Alignment, Stage, gated_stages, pipeline_stages
from stages.config.selection import Way, selected_stages

STAGES = {stage: llm_pipeline.task_dict[stage.value] for stage in pipeline_stages()}
GATES = {stage: llm_pipeline.task_dict[gate_name(stage)] for stage in gated_stages()}
OPTIONAL = {stage for stage, spec in GRAPH.items() if spec.scores or spec.aligned or spec.asked_by}
LIGHT = {Stage.TOKENIZE, Stage.PROMOTE, Stage.REPORT}


def test_every_stage_is_a_task_of_its_own_name_between_resolve_and_close():
    gates = set(map(gate_name, gated_stages()))
    assert set(llm_pipeline.task_ids) == {"resolve", "plan", "review", "approve", "close", *pipeline_stages(), *gates}
    assert {stage: task.stage for stage, task in STAGES.items() if isinstance(task, StageOperator)} == {
        stage: stage.value for stage in pipeline_stages()
    }
    assert [task.task_id for task in llm_pipeline.roots] == ["resolve"]
    assert [task.task_id for task in llm_pipeline.leaves] == ["close"]


def test_the_drawing_is_the_one_of_the_docstring():
    trunk = ["resolve", "plan", "convert", "constitution", "review", "curate", "tokenize", "pretrain", "sft"]
    end = ["evaluate", "approve", "promote", "report", "close"]
    for way in ([*trunk, "reward", "ppo", *end], [*trunk, "dpo", *end]):
        for before, after in pairwise(way):
            assert after in llm_pipeline.task_dict[before].get_flat_relative_ids(upstream=False), (before, after)
    assert "tokenize" in STAGES[Stage.CONVERT].get_flat_relative_ids(upstream=False)
    assert STAGES[Stage.CONVERT].upstream_task_ids == {"plan"}
    makers = (Stage.CONSTITUTION, Stage.SYNTHESIZE)
    assert [STAGES[stage].upstream_task_ids for stage in makers] == [{"convert"}, {"convert"}]
    assert llm_pipeline.task_dict["review"].upstream_task_ids == {"gate_constitution", "gate_synthesize"}
    assert STAGES[Stage.CURATE].upstream_task_ids == {"review"}
    beside = STAGES[Stage.DPO].get_flat_relative_ids(upstream=True)
    assert not {"reward", "ppo"} & beside
    # no arrow that only repeats a way through other tasks
    for task in llm_pipeline.tasks:
        below = [
            llm_pipeline.task_dict[name].get_flat_relative_ids(upstream=False) for name in task.downstream_task_ids
        ]
        assert not task.downstream_task_ids & set().union(*below), task.task_id


def test_nothing_reads_what_a_stage_published_before_its_gate_has_let_it_pass():
    for stage, gate in GATES.items():
        assert isinstance(gate, GateOperator)
        judges = {"gate_gold"} if stage is Stage.REWARD else set()  # a reward model is asked for what gold likes
        assert (gate.stage, gate.upstream_task_ids) == (stage.value, {stage.value, *judges})
        assert STAGES[stage].downstream_task_ids == {gate.task_id}
        assert gate.outlets == []
    after = {stage: task.upstream_task_ids for stage, task in STAGES.items()}
    assert after[Stage.TOKENIZE] == {"gate_curate"}
    assert after[Stage.PPO] == {"gate_reward"}
    assert after[Stage.EVALUATE] == {"gate_ppo", "gate_dpo"}
    assert llm_pipeline.task_dict["approve"].upstream_task_ids == {"gate_evaluate"}


def test_a_gate_that_loads_a_model_waits_for_the_quota_and_the_others_do_not():
    assert {stage: gate.pool for stage, gate in GATES.items()} == {
        stage: "gpu" if GRAPH[stage].trains else "default_pool" for stage in gated_stages()
    }


def test_every_input_of_every_stage_is_finished_before_it_starts():
    for stage, task in STAGES.items():
        upstream = task.get_flat_relative_ids(upstream=True)
        assert {source.value for _, source in GRAPH[stage].inputs} <= upstream, stage


@pytest.mark.parametrize(("alignment", "has_base_model"), product(Alignment, (True, False)))
def test_a_run_may_end_anywhere_and_what_it_does_not_ask_for_is_skipped(alignment: Alignment, has_base_model: bool):
    for last in pipeline_stages():
        given = frozenset({"base_model"} if has_base_model else ())
        selected = selected_stages(Way(alignment, last, given=given))
        for stage in selected:
            missing = {source for _, source in GRAPH[stage].inputs} - selected
            assert missing <= {Stage.PRETRAIN} | OPTIONAL, (stage, last)
        if last in (Stage.EVALUATE, Stage.PROMOTE, Stage.REPORT):
            assert (Stage.PPO in selected) == (alignment in (Alignment.PPO, Alignment.BOTH))
            assert (Stage.DPO in selected) == (alignment in (Alignment.DPO, Alignment.BOTH))
            assert (Stage.REWARD in selected) == (alignment in (Alignment.PPO, Alignment.BOTH))
        assert (Stage.PRETRAIN in selected) <= (not has_base_model)


def test_skipped_tasks_let_the_rest_run_and_failed_ones_do_not():
    asking = [llm_pipeline.task_dict[name] for name in ("review", "approve")]
    assert {task.trigger_rule for task in (*STAGES.values(), *GATES.values(), *asking)} == {TriggerRule.NONE_FAILED}


def test_close_runs_whatever_happened_and_alone_decides_about_the_run():
    close = llm_pipeline.task_dict["close"]
    assert close.is_teardown
    assert close.trigger_rule == TriggerRule.ALL_DONE_SETUP_SUCCESS
    assert close.on_failure_fail_dagrun


def test_policy_owner_retries_timeouts_pools_tags_and_documentation():
    assert llm_pipeline.doc_md
    assert llm_pipeline.doc_md.startswith("From raw text")
    assert {"llm", "ray"} <= set(llm_pipeline.tags)
    for task in llm_pipeline.tasks:
        assert task.owner == "athanor"
        assert task.retries == MAX_RETRIES
        assert isinstance(task.retry_policy, StageRetryPolicy)
    for stage, task in STAGES.items():
        assert isinstance(task, StageOperator)
        assert task.timeout is not None
        assert task.deferrable
        assert task.pool == ("gpu" if GRAPH[stage].heavy else "default_pool")
    assert {stage for stage in STAGES if not GRAPH[stage].heavy} == LIGHT
    for name in ("resolve", "plan", "close"):
        assert llm_pipeline.task_dict[name].execution_timeout is not None


def test_models_and_documents_are_announced_as_assets():
    announced = {stage: [asset.name for asset in STAGES[stage].outlets] for stage in pipeline_stages()}
    assert announced == {stage: [spec.asset] if spec.asset else [] for stage, spec in GRAPH.items() if stage in STAGES}


def test_the_story_fits_on_one_screen():
    from pathlib import Path

    assert len(Path(llm_pipeline.fileloc).read_text().splitlines()) < 100
