"""The DAG of the drills: `resolve` and a real pretraining, in a store and circumstances of its parameters'."""

import os
import sys
from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, chain, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict

from operators.failures import MAX_RETRIES, StageRetryPolicy
from operators.operator import StageOperator
from stages.config.graph import Stage

RETRY_AFTER = timedelta(seconds=1)
TRAINING = {
    # weights and optimizer state take 30 MiB, so that a checkpoint goes up in two parts
    "pretrain.model.hidden_size": 256,
    "pretrain.model.intermediate_size": 768,
    "pretrain.model.num_layers": 3,
    "pretrain.max_tokens": 64 * 4 * 24,
}
EXECUTION = {"checkpoint_every": 8, "stall_seconds": 300}

with DAG(
    dag_id="drill",
    schedule=None,
    params=ParamsDict({"store": "", "tokens": {}, "before": "", "execution": {}}),
    default_args={
        "retries": MAX_RETRIES,
        "retry_delay": RETRY_AFTER,
        "retry_policy": StageRetryPolicy(first_delay=RETRY_AFTER, longest_delay=RETRY_AFTER),
    },
) as drill:

    @task
    def resolve() -> dict:
        from operators.run import start_run

        context: Any = get_current_context()
        given = context["params"]
        os.environ["ARTIFACT_STORE"] = given["store"]  # a store of the run's own: what others built is no hit
        execution = {f"execution.pretrain.{name}": value for name, value in {**EXECUTION, **given["execution"]}.items()}
        return start_run({**context, "params": {"recipe": "tiny", "overrides": {**TRAINING, **execution}}})

    @task
    def tokenize() -> dict:
        """The artifact that the test has made."""
        context: Any = get_current_context()
        return context["params"]["tokens"]

    pretrain = StageOperator(
        stage=Stage.PRETRAIN,
        store_uri="{{ params.store }}",
        entrypoint="{{ params.before }} " + sys.executable + " -m stages {config_uri}",
        outlets=[],
    )
    chain(resolve(), tokenize(), pretrain)
