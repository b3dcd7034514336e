"""Real pretraining on a Ray Train worker, which in its first attempt hangs after step 9.

`python -m tests.chaos.training <config uri>`. The test kills the worker there, or leaves it to the watchdog.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time

from stages import pretrain
from stages.context import StageContext, StageOutcome
from stages.runner import run_stage
from stages.tracking import NullTracker
from tests.chaos.job import note_pid

HANGS_AT = 10


class NeverReturns(NullTracker):
    """A call out of the training loop that blocks for ever, as a collective or a store may."""

    def __init__(self, context: StageContext) -> None:
        self._context = context

    def log(self, metrics: dict[str, float], step: int) -> None:
        if step == HANGS_AT:
            note_pid(self._context.request, self._context.store, "worker")
            self.hang_for_ever()

    def hang_for_ever(self) -> None:
        while True:
            time.sleep(1)


def body(context: StageContext) -> StageOutcome:
    from stages.train.run import train_on_worker

    if context.request.try_number == 1:
        context = dataclasses.replace(context, tracker=NeverReturns(context))
    return train_on_worker(context)


def run(context: StageContext) -> StageOutcome:
    from stages.train.launch import launch
    from tests.chaos import training  # by its name, which a worker can import, unlike __main__

    return launch(context, training.body)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stdout)
    pretrain.run = run
    sys.exit(run_stage(sys.argv[1]))
