"""Many short jobs through the operator, in one mapped task, while scheduler and triggerer are killed."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tests.chaos.stack import ChaosStack, Row


@dataclass(frozen=True)
class Report:
    """What happened; overhead is a task's time from start to end without its job's time in Ray."""

    count: int
    wall_seconds: float
    median_overhead: float
    p95_overhead: float
    slowest_overhead: float

    def __str__(self) -> str:
        return (
            f"{self.count} jobs in {self.wall_seconds:.0f} s; overhead per task: median {self.median_overhead:.1f} s, "
            f"p95 {self.p95_overhead:.1f} s, slowest {self.slowest_overhead:.1f} s"
        )


def run_mapped(stack: ChaosStack, count: int, *, slots: int = 4, kills: int = 2, seconds: float = 600) -> Report:
    """Run `count` jobs, killing scheduler and triggerer `kills` times; assert that all are green and none doubled."""
    stack.airflow.ensure_pool("few", slots=slots, description="as many jobs at a time")
    started = time.monotonic()
    row = stack.trigger("mapped", "lines:1", count=count)
    for kill in range(kills):
        share = (kill + 1) * count // (kills + 2)
        stack.wait(f"{share} of {count} jobs submitted", lambda: len(row.jobs()) >= share, seconds=seconds)  # noqa: B023
        for name in ("triggerer", "scheduler"):
            stack.kill(name)
            stack.start(name)
    stack.wait("the mapped run ends", lambda: row.run_state() in ("success", "failed"), seconds=seconds)
    wall = time.monotonic() - started
    return _checked(row, stack, count, wall)


def _checked(row: Row, stack: ChaosStack, count: int, wall: float) -> Report:
    jobs = {int(job["metadata"]["airflow.map_index"]): job for job in row.jobs()}
    assert len(row.jobs()) == len(jobs) == count, "a task without a job, or with more than one"
    assert set(row.statuses()) == {"SUCCEEDED"}
    answer = stack.airflow.call("GET", f"{row.path}/taskInstances", params={"limit": 1000, "task_id": "curate"})
    tasks = {task["map_index"]: task for task in answer["task_instances"] if task["task_id"] == "curate"}
    assert {task["state"] for task in tasks.values()} == {"success"}
    assert tasks.keys() == jobs.keys()
    overheads = sorted(_overhead(tasks[index], jobs[index]) for index in jobs)
    return Report(
        count=count,
        wall_seconds=wall,
        median_overhead=statistics.median(overheads),
        p95_overhead=overheads[math.ceil(0.95 * count) - 1],
        slowest_overhead=overheads[-1],
    )


def _overhead(task: dict[str, Any], job: dict[str, Any]) -> float:
    first, last = (datetime.fromisoformat(task[name].replace("Z", "+00:00")) for name in ("start_date", "end_date"))
    return (last - first).total_seconds() - (job["end_time"] - job["start_time"]) / 1000
