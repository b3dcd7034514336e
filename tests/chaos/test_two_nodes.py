"""Training over two machines that share only the network and an S3 server, one of which is cut off and comes back.

The numbers of docs/DRILLS.md ("Cluster and services") are what these tests print."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra.processes import is_zombie
from stages.config.graph import Stage
from tests.chaos.cluster import Cluster, ray_cluster
from tests.chaos.namespaces import missing_for_namespaces
from tests.chaos.run_records import (
    forget,
    history_of,
    jobs_of,
    manifest_of,
    starts_of,
    states_of,
    wait_checkpoint,
    wait_start,
)
from tests.chaos.stack import REPOSITORY, Row

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(2400)]

DAGS = [Path(__file__).with_name("chaos_dags.py"), REPOSITORY / "dags" / "llm_pipeline.py"]
NUM_STEPS, CHECKPOINT_EVERY = 200, 4
TOKENS_A_STEP = 4 * 128
"Of the recipe `tiny`."
TRAINED = (Stage.PRETRAIN, Stage.SFT, Stage.REWARD, Stage.PPO, Stage.DPO)
ELASTIC = {"num_workers": 2, "min_workers": 1, "checkpoint_every": CHECKPOINT_EVERY, "stall_seconds": 300}
OVERRIDES: dict[str, Any] = {
    "pretrain.max_tokens": NUM_STEPS * TOKENS_A_STEP,
    "pretrain.precision": "fp32",  # in bf16, sums over one worker and over two differ in the fourth digit
    **{f"execution.{stage.value}.{name}": value for stage in TRAINED for name, value in ELASTIC.items()},
}
LIMIT_SECONDS = 400
"After which training must go on; a minute on an idle machine."


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing_for_namespaces():
        pytest.skip(reason)
    with ray_cluster(tmp_path_factory.mktemp("two"), DAGS, names=("worker",), head_cpus=1) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Row:
    """The whole pipeline, every training stage on both nodes."""
    row = cluster.stack.trigger(
        "llm_pipeline",
        stage=Stage.PRETRAIN,
        recipe="tiny",
        last_stage="evaluate",
        overrides=OVERRIDES,
    )
    row.finish(900)
    assert row.run_state() == "success", states_of(row)
    return row


def test_the_whole_pipeline_runs_with_a_worker_on_each_node(cluster: Cluster, undisturbed: Row):
    jobs = {job["metadata"]["airflow.task_id"]: job["submission_id"] for job in undisturbed.jobs()}
    for stage in TRAINED:
        assert cluster.workers_by_node(jobs[stage.value]) == [1, 1], stage
    assert len(history_of(cluster.stack.store, manifest_of(undisturbed, Stage.PRETRAIN))) == NUM_STEPS


def test_a_node_is_cut_off_in_the_middle_of_pretraining_and_comes_back(cluster: Cluster, undisturbed: Row):
    stack, machine, node = cluster.stack, cluster.machines["worker"], cluster.nodes["worker"]
    before = manifest_of(undisturbed, Stage.PRETRAIN)
    expected = history_of(stack.store, before)
    forget(stack.store, before)
    row = stack.trigger("slow", stage=Stage.PRETRAIN, overrides=OVERRIDES)
    first = wait_start(row, 1, seconds=240)
    assert (first["workers"], first["step"]) == (2, 1)
    wait_checkpoint(row, before.fingerprint, step=5 * CHECKPOINT_EVERY)
    assert node.process is not None
    everything = psutil.Process(node.process.pid).children(recursive=True)
    on_the_node = [process for process in everything if "RayTrainWorker" in " ".join(process.cmdline())]
    assert len(on_the_node) == 1

    machine.cut()
    cut_at = time.time()
    alone = wait_start(row, 2, seconds=LIMIT_SECONDS)
    to_go_on = alone["at"] - cut_at
    assert alone["workers"] == 1
    assert alone["step"] % CHECKPOINT_EVERY == 1, "not from a checkpoint"
    assert alone["step"] > 5 * CHECKPOINT_EVERY

    machine.mend()
    stack.wait("Ray on the machine that was cut off learns that it was given up, and ends", lambda: node.has_ended)
    stack.wait("its training worker ends", lambda: all(is_zombie(process) for process in on_the_node))
    node.start()  # as Kubernetes or systemd does
    back_at = time.time()
    together = wait_start(row, 3, seconds=LIMIT_SECONDS)
    to_grow = together["at"] - back_at
    assert together["workers"] == 2
    assert together["step"] % CHECKPOINT_EVERY == 1, "not from a checkpoint"
    assert together["step"] > alone["step"]

    assert row.finish(900) == "success"
    assert row.run_state() == "success"
    print(jobs_of(row), starts_of(row))
    history = history_of(stack.store, manifest_of(row, Stage.PRETRAIN))
    assert [entry["step"] for entry in history] == list(range(1, NUM_STEPS + 1)), "a step is missing or doubled"
    differences = [abs(a["train/loss"] - b["train/loss"]) for a, b in zip(history, expected, strict=True)]
    print(f"goes on alone {to_go_on:.1f} s after the cut at step {alone['step']}, on both {to_grow:.1f} s after")
    print(f"the node's return at step {together['step']}; largest difference of a loss {max(differences):.2e}")
    assert max(differences) < 1e-5
