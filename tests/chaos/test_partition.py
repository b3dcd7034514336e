"""The two machines of a training no longer reach each other, while both still reach Ray's head and the store.

Nothing is dead then, so Ray has nothing to notice: each worker waits in a collective for the other.
The row of docs/DRILLS.md ("Cluster and services") is what this test prints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.config.graph import Stage
from tests.chaos.cluster import Cluster, ray_cluster
from tests.chaos.namespaces import missing_for_namespaces
from tests.chaos.run_records import forget, history_of, manifest_of, starts_of, wait_checkpoint, wait_start
from tests.chaos.stack import REPOSITORY

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.integration, pytest.mark.timeout(1800)]

DAGS = [Path(__file__).with_name("chaos_dags.py"), REPOSITORY / "dags" / "llm_pipeline.py"]
NUM_STEPS, CHECKPOINT_EVERY, STALL_SECONDS = 40, 4, 30
TOKENS_A_STEP = 4 * 128
"Of the recipe `tiny`."
OVERRIDES: dict[str, Any] = {
    "pretrain.max_tokens": NUM_STEPS * TOKENS_A_STEP,
    "execution.pretrain.num_workers": 2,
    "execution.pretrain.checkpoint_every": CHECKPOINT_EVERY,
    "execution.pretrain.stall_seconds": STALL_SECONDS,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing_for_namespaces():
        pytest.skip(reason)
    with ray_cluster(tmp_path_factory.mktemp("apart"), DAGS, names=("one", "two"), head_cpus=0) as made:
        yield made


def test_the_workers_of_a_training_no_longer_reach_each_other(cluster: Cluster):
    stack, machines = cluster.stack, cluster.machines.values()
    undisturbed = stack.trigger(
        "llm_pipeline", stage=Stage.PRETRAIN, recipe="tiny", last_stage="pretrain", overrides=OVERRIDES
    )
    assert undisturbed.finish(600) == "success"
    before = manifest_of(undisturbed, Stage.PRETRAIN)
    forget(stack.store, before)
    row = stack.trigger("slow", stage=Stage.PRETRAIN, overrides=OVERRIDES)
    assert wait_start(row, 1)["workers"] == 2
    wait_checkpoint(row, before.fingerprint, step=2 * CHECKPOINT_EVERY)

    for machine in machines:
        machine.isolate()
    apart_at = time.time()
    stack.wait("the stall is noticed", lambda: "made no progress for" in row.task_log(), seconds=300)
    to_notice = time.time() - apart_at
    for machine in machines:
        machine.isolate(False)
    again = wait_start(row, 2)
    to_go_on = again["at"] - apart_at

    assert row.finish(600) == "success"
    assert row.task()["try_number"] == 2
    assert "the stacks of all threads of process" in row.task_log()
    assert again["step"] % CHECKPOINT_EVERY == 1, "not from a checkpoint"
    assert again["step"] > 2 * CHECKPOINT_EVERY
    after = manifest_of(row, Stage.PRETRAIN)
    assert [entry["step"] for entry in history_of(stack.store, after)] == list(range(1, NUM_STEPS + 1))
    print(starts_of(row))
    print(
        f"noticed {to_notice:.0f} s after the partition (stall_seconds {STALL_SECONDS}), goes on after {to_go_on:.0f} s"
    )
    assert after.digest == before.digest
