"""The task `plan`: what a run would do, told before anything is built."""

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from operators.plan import Plan, make_plan
from stages.config.estimate import (
    Devices,
)
from stages.config.request import RunInfo

if TYPE_CHECKING:
    from stages.artifacts.store import Store

logger = logging.getLogger(__name__)


_DEVICE_VARIABLES: dict[str, tuple[str, Callable[[float], float]]] = {
    "ATHANOR_GPU_TFLOPS": ("gpu_flops", lambda value: value * 1e12),
    "ATHANOR_CPU_CORE_GFLOPS": ("cpu_core_flops", lambda value: value * 1e9),
    "ATHANOR_GPU_HOUR_PRICE": ("gpu_hour_price", lambda value: value),
    "ATHANOR_CPU_HOUR_PRICE": ("cpu_hour_price", lambda value: value),
}


def devices_from_environment() -> Devices:
    """Speed and prices as this installation knows them; a value that is no number is named and left out."""
    devices = Devices()
    for name, (field, scale) in _DEVICE_VARIABLES.items():
        if not (text := os.environ.get(name)):
            continue
        try:
            devices = Devices.model_validate({**devices.model_dump(), field: scale(float(text))})
        except ValueError:
            logger.warning("%s=%r is not a usable number; the plan goes on without it.", name, text)
    return devices


def _who_is_before_us(run: RunInfo, plan: Plan, store: "Store") -> list[str]:
    """Whose Ray jobs the heavy stages will have to wait for, as far as a task can know: see operators.ray.holders.

    Without an answer of Ray the plan is complete all the same.
    """
    from operators.plan_page import waits
    from operators.ray.holders import as_lines, holders
    from operators.ray.hook import DEFAULT_CONN_ID, RayJobHook

    if plan.dry_run or not waits(plan):
        return []
    try:
        with RayJobHook(DEFAULT_CONN_ID) as hook:
            others = holders(hook.list_jobs(), besides=(run.dag_id, run.airflow_run_id))
        lines = as_lines(others, store=store, airflow_url=run.airflow_url.split("/dags/")[0])
    except Exception as error:  # noqa: BLE001 - a courtesy: whatever is wrong with Ray, its first task tells
        logger.info("Whether other runs hold the cluster is unknown: %s: %s", type(error).__name__, error)
        return []
    return [f"{waits(plan)}:", *(f"  {line}" for line in lines)] if lines else []


def plan_run(context: Any, *, resolve_task_id: str = "resolve") -> bool:
    """Show the plan in the task's log, keep it in the store and in MLflow; return whether the run goes on after it.

    A plan that cannot be made stops a dry run, which has no other purpose, and is a warning in any other run.
    """
    from operators.failures import RunIncomplete, as_stage_failures
    from operators.mlflow import log_plan
    from operators.plan_page import as_markdown, as_table, total
    from operators.prepare import load_config
    from stages.artifacts.addresses import open_default_store

    run = RunInfo.model_validate(context["ti"].xcom_pull(task_ids=resolve_task_id))
    with as_stage_failures():
        store = open_default_store()
        config = load_config(store, run)
    try:
        plan = make_plan(config, run=run, store=store, devices=devices_from_environment())
        page = as_markdown(plan)
        store.write_bytes(f"runs/{run.run_id}/plan.md", page.encode())
        store.write_bytes(f"runs/{run.run_id}/plan.json", plan.model_dump_json(indent=1).encode())
    except Exception as error:
        if config.dry_run:
            raise RunIncomplete(f"The plan could not be made: {type(error).__name__}: {error}") from error
        logger.warning("No plan, the run goes on without: %s: %s", type(error).__name__, error)
        return True
    for line in as_table(plan):
        logger.info("%s", line)
    for line in _who_is_before_us(run, plan, store):
        logger.info("%s", line)
    log_plan(run, page=page, data=plan.model_dump_json(indent=1), summary=total(plan), dry_run=plan.dry_run)
    return not plan.dry_run
