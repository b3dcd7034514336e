"""Requests to a training, answered at step boundaries: save and stop (SIGTERM), or save because a node will go.

All ranks ask at the same step and get the same answer, which costs one small collective a step when there are several.
A node's departure is known to Ray Train, whose question is a barrier over all workers: rank 0's clock says when to ask.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
import torch.distributed as dist

from stages.job.context import StageContext
from stages.job.stopping import StopNotice, postponing

logger = logging.getLogger(__name__)

_DEPARTURE_SECONDS = 5.0
"""Between questions about departing nodes; a spot machine is announced 30 s ahead or more."""


class Ask(IntEnum):
    """What to do now; the most pressing one of all processes counts."""

    NOTHING = 0
    LOOK = 1
    """Ask Ray Train whether a node will go; never returned."""
    SAVE = 2
    """Save and continue: Ray Train restarts the workers from the newest checkpoint when the node has gone."""
    END = 3
    """Save and end with category `preempted`."""


@contextmanager
def stop_flag(context: StageContext) -> Iterator[threading.Event]:
    """A flag that is set when the job is asked to stop: by a signal in its own process, by its notice in a worker."""
    flag = threading.Event()
    if threading.current_thread() is threading.main_thread():
        with postponing(flag.set):
            yield flag
    elif context.fence is not None and os.environ.get("RANK", "0") == "0":
        with StopNotice(context.store, context.fence).watched(flag):
            yield flag
    else:
        yield flag


def node_departs() -> bool:
    """Whether Ray drains a node of this training; every worker must call it at the same step. A training in the job's
    own process is told by SIGTERM alone."""
    if not dist.is_initialized():
        return False
    from ray.train import get_preemption_info

    return get_preemption_info() is not None


def most_pressing(mine: Ask, device: torch.device) -> Ask:
    """Agree over all processes, also those that compute one share of the data together; each must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    pressing = torch.tensor(int(mine), device=device)
    dist.all_reduce(pressing, op=dist.ReduceOp.MAX)
    return Ask(int(pressing))


def wait_for_all() -> None:
    """Return when every process of the training is here."""
    if dist.is_initialized():
        dist.barrier()


class Interruption:
    """Asked once a step, in every process."""

    def __init__(
        self,
        device: torch.device,
        stop: threading.Event,
        *,
        agree: Callable[[Ask, torch.device], Ask] = most_pressing,
        departs: Callable[[], bool] = node_departs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device, self._stop = device, stop
        self._agree, self._departs, self._clock = agree, departs, clock
        self._next_look = clock() + _DEPARTURE_SECONDS
        self._has_saved = False

    def asked(self) -> Ask:
        """Return what all processes do now."""
        answer = self._agree(self._mine(), self._device)
        return self._look() if answer is Ask.LOOK else answer

    def _mine(self) -> Ask:
        if self._stop.is_set():
            return Ask.END
        is_due = not self._has_saved and self._clock() >= self._next_look
        return Ask.LOOK if is_due else Ask.NOTHING

    def _look(self) -> Ask:
        self._next_look = self._clock() + _DEPARTURE_SECONDS
        if not self._departs():
            return Ask.NOTHING
        self._has_saved = True
        logger.warning("a node of this training is about to go: saving a checkpoint now")
        return Ask.SAVE
