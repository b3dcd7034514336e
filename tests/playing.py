"""The stages of a run in this process: what Airflow does between the tasks, without Airflow and Ray."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from operators.prepare import build_request
from stages.__main__ import verb_of
from stages.artifacts.store import Store
from stages.config.graph import Stage, pipeline_stages
from stages.config.pipeline import Executions, PipelineConfig
from stages.config.request import ArtifactRef, RunInfo
from stages.job.runner import execute

ONE_THREAD = {f"execution.{stage}.cpus_per_worker": 1 for stage in Executions.model_fields}
"""Overrides for stages beside other processes: threads of torch that wait for each other there cost a multiple."""


def play(
    store: Store, config: PipelineConfig, name: str, *, only: Collection[Stage] | None = None
) -> dict[Stage, ArtifactRef]:
    """Those of the selected stages that are in `only`, or all; what the store has is not made again."""
    run, done = RunInfo(run_id=name, name=name), dict[Stage, ArtifactRef]()
    for stage in pipeline_stages():
        if stage in config.selected and (only is None or stage in only):
            request = build_request(stage, run=run, store=store, config=config, upstream=done)
            done[stage] = execute(request, store, verb_of).artifact
    return done


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Scratch space in `home`, and no MLflow server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("ATHANOR_SCRATCH", str(home / "scratch"))
        yield
