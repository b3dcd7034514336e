"""Real pretraining, with a pause after every logged step, so that there is time for faults; MLflow sees all of it.

`python -m tests.chaos.slow <config uri>`. Each start of the workers leaves a note of its first step in the store.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import Any

from stages.artifacts.addresses import run_key
from stages.artifacts.store import write_json
from stages.job.context import StageContext, StageOutcome
from tests.chaos.job import note_pid, pretrain_by

PAUSE_SECONDS = 1.0


class Paced:
    """A tracker with a pause in `log`; everything else is the tracker's own."""

    def __init__(self, context: StageContext) -> None:
        self._context, self._tracker = context, context.tracker
        self._is_noted = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tracker, name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._tracker.log(metrics, step)
        if not self._is_noted:
            self._is_noted = True
            note_start(self._context, step)
        time.sleep(PAUSE_SECONDS)


def note_start(context: StageContext, step: int) -> None:
    request, now = context.request, time.time()
    note_pid(request, context.store, "worker")
    note = {"step": step, "workers": int(os.environ.get("WORLD_SIZE", "1")), "at": now, "job": request.submission_id}
    write_json(context.store, run_key(request.run.run_id, request.stage, f"start-{now:.3f}.json"), note)


def body(context: StageContext) -> StageOutcome:
    from stages.pretrain import prepare
    from stages.train.run import train_on_worker

    return train_on_worker(dataclasses.replace(context, tracker=Paced(context)), prepare)


if __name__ == "__main__":
    sys.exit(pretrain_by("tests.chaos.slow"))
