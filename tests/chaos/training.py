"""Real pretraining on a Ray Train worker, which in its first attempt hangs after step 9.

`python -m tests.chaos.training <config uri>`. The test kills the worker there, or leaves it to the watchdog.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from stages.job.context import StageContext, StageOutcome
from stages.tracking.tracker import NullTracker
from tests.chaos.job import note_pid, pretrain_by

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
    from stages.pretrain import prepare
    from stages.train.run import train_on_worker

    if context.request.try_number == 1:
        context = dataclasses.replace(context, tracker=NeverReturns(context))
    return train_on_worker(context, prepare)


if __name__ == "__main__":
    sys.exit(pretrain_by("tests.chaos.training"))
