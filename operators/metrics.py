"""Stages as metrics of Airflow, which `[metrics]` sends to StatsD, Datadog or OpenTelemetry, and so to Prometheus.

    athanor.stage.<stage>.built, .hit                         counters of tasks
    athanor.stage.<stage>.failed.<category>                   counter of attempts that failed
    athanor.stage.<stage>.work                                time of the job that built the artifact
    athanor.stage.<stage>.wait                                rest of the task's time: queues, placement, dispatch
    athanor.stage.<stage>.wall_seconds, .productive_seconds   counters over all attempts; their ratio is the goodput
    athanor.stage.<stage>.cpu_seconds, .gpu_seconds           counters of what all attempts spent

The stage is part of the name because plain StatsD has no tags; where there are tags, `dag_id` is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk.observability import stats

from operators.failures import StageFailed
from stages.config.request import StageResult


def name_of(stage: str, what: str) -> str:
    return f"athanor.stage.{stage}.{what}"


def count_finished(result: StageResult, *, ti: Any) -> None:
    """Tell of a stage whose artifact is there."""
    stage, tags = result.stage.value, {"dag_id": ti.dag_id}
    stats.incr(name_of(stage, "hit" if result.hit else "built"), tags=tags)
    work = timedelta(seconds=result.wall_seconds)
    if not result.hit:
        stats.timing(name_of(stage, "work"), work, tags=tags)
    if ti.start_date is not None:
        wait = max(timedelta(), datetime.now(UTC) - ti.start_date - work)
        stats.timing(name_of(stage, "wait"), wait, tags=tags)
    if result.cost is not None:
        for what in ("wall_seconds", "productive_seconds", "cpu_seconds", "gpu_seconds"):
            stats.incr(name_of(stage, what), round(getattr(result.cost, what)), tags=tags)


@contextmanager
def failures_counted(stage: str, *, ti: Any) -> Iterator[None]:
    """Count the failure that passes through, by its category."""
    try:
        yield
    except StageFailed as error:
        stats.incr(name_of(stage, f"failed.{error.category.value}"), tags={"dag_id": ti.dag_id})
        raise
