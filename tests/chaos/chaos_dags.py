"""DAGs of the chaos rows: `resolve` and one stage that behaves as the run's parameters say, under several settings."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, chain, get_current_context, task
from airflow.sdk.definitions.param import ParamsDict

from operators.failures import MAX_RETRIES, StageRetryPolicy
from operators.operator import StageOperator
from stages.config.graph import Stage

CHECKPOINT_EVERY = 4
JOB = sys.executable + " -m tests.chaos.job {config_uri} {{ params.behaviour }}"
SLOW = sys.executable + " -m tests.chaos.slow {config_uri}"
TRAINING = sys.executable + " -m tests.chaos.training {config_uri}"
DEFAULTS = {
    "retries": MAX_RETRIES,
    "retry_delay": timedelta(seconds=1),  # of attempts that die without a word
    "retry_policy": StageRetryPolicy(first_delay=timedelta(seconds=1), longest_delay=timedelta(seconds=1)),
}


def note_pid(context: dict) -> None:
    """Where the test finds the task's process."""
    folder = Path(os.environ["CHAOS_PIDS"])
    ti = context["ti"]
    name = f"{ti.dag_id}--{ti.run_id}--{ti.map_index}--{ti.try_number}.json".replace(":", "_").replace("+", "_")
    (folder / name).write_text(json.dumps({"pid": os.getpid()}))


def die_after_the_first_success(context: dict, result: Any) -> None:
    """The outcome has been processed, and Airflow does not know yet."""
    if context["ti"].try_number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def run_info(**form: Any) -> dict:
    from operators.run import start_run

    context: Any = get_current_context()
    overrides = {"execution.curate.max_retries": context["params"].get("max_retries", 2)}
    form = {"recipe": "tiny", **form, "overrides": {**overrides, **form.get("overrides", {})}}
    return start_run({**context, "params": form})


def chaos_dag(dag_id: str, **settings: Any) -> DAG:
    with DAG(
        dag_id=dag_id,
        schedule=None,
        params=ParamsDict({"behaviour": "lines:5", "max_retries": 2}),
        default_args=DEFAULTS,
    ) as dag:

        @task
        def resolve() -> dict:
            return run_info()

        chain(resolve(), StageOperator(stage=Stage.CURATE, entrypoint=JOB, pre_execute=note_pid, **settings))
    return dag


deferred = chaos_dag("deferred")
waiting = chaos_dag("waiting", deferrable=False)
timed = chaos_dag("timed", timeout=timedelta(seconds=15))
limited = chaos_dag("limited", deferrable=False, execution_timeout=timedelta(seconds=15))
unnoted = chaos_dag("unnoted", post_execute=die_after_the_first_success)
lossy = chaos_dag("lossy", ray_conn_id="ray_lossy")
late = chaos_dag("late", ray_conn_id="ray_late")
flaky = chaos_dag("flaky", ray_conn_id="ray_flaky")
cut = chaos_dag("cut", ray_conn_id="ray_cut")
gone = chaos_dag("gone", ray_conn_id="ray_gone", unreachable_seconds=15)

with DAG(
    dag_id="training",
    schedule=None,
    params=ParamsDict({"behaviour": "", "tokens": {}, "seed": 0, "stall_seconds": 0}),
    default_args=DEFAULTS,
) as training:

    @task(task_id="resolve")
    def resolve_training() -> dict:
        context: Any = get_current_context()
        settings = {
            "num_workers": 1,
            "checkpoint_every": CHECKPOINT_EVERY,
            "stall_seconds": context["params"]["stall_seconds"],
        }
        overrides = {f"execution.pretrain.{name}": value for name, value in settings.items()}
        return run_info(seed=context["params"]["seed"], overrides=overrides)

    @task
    def tokenize() -> dict:
        """The artifact that the test has made."""
        context: Any = get_current_context()
        return context["params"]["tokens"]

    chain(resolve_training(), tokenize(), StageOperator(stage=Stage.PRETRAIN, entrypoint=TRAINING, outlets=[]))

with DAG(
    dag_id="slow",
    schedule=None,
    params=ParamsDict({"behaviour": "", "overrides": {}, "seed": 0}),
    default_args=DEFAULTS,
) as slow:

    @task(task_id="resolve")
    def resolve_slow() -> dict:
        """What `llm_pipeline` of the same overrides builds, at a pace that leaves time for faults."""
        context: Any = get_current_context()
        params = context["params"]
        return run_info(seed=params["seed"], last_stage="pretrain", overrides=params["overrides"])

    chain(
        resolve_slow(),
        StageOperator(stage=Stage.CURATE, outlets=[]),
        StageOperator(stage=Stage.TOKENIZE, outlets=[]),
        StageOperator(stage=Stage.PRETRAIN, entrypoint=SLOW, outlets=[]),
    )

with DAG(
    dag_id="mapped",
    schedule=None,
    params=ParamsDict({"behaviour": "lines:1", "count": 12}),
    max_active_tasks=64,
    default_args=DEFAULTS,
) as mapped:

    @task(task_id="resolve")
    def resolve_mapped() -> dict:
        return run_info()

    @task
    def intervals() -> list[float]:
        """As many as there shall be jobs."""
        context: Any = get_current_context()
        return [1.0] * context["params"]["count"]

    many = StageOperator.partial(
        task_id="curate", stage=Stage.CURATE, entrypoint=JOB, pool="few", outlets=[], pre_execute=note_pid
    ).expand(poll_interval=intervals())
    chain(resolve_mapped(), many)
