"""A process that lost its lease writes no checkpoint, and says why."""

from pathlib import Path

import pytest
import torch

from stages.lease import LeaseLostError
from stages.store import open_store
from stages.train.checkpoint import Checkpoint, Checkpointer
from stages.train.objective import ObjectiveState


def test_a_checkpoint_is_not_published_by_a_process_that_lost_its_lease(tmp_path: Path):
    store, held = open_store(tmp_path.as_uri()), [True]

    def check() -> None:
        if not held[0]:
            raise LeaseLostError("another process builds")

    checkpointer = Checkpointer(store, "f" * 64, keep=2, rank=0, before_publishing=check)
    checkpointer.save(Checkpoint(1, {"w": torch.ones(2)}, ObjectiveState(), []))
    checkpointer.wait()
    held[0] = False
    checkpointer.save(Checkpoint(2, {"w": torch.zeros(2)}, ObjectiveState(), []))
    with pytest.raises(LeaseLostError, match="another process builds"):
        checkpointer.wait()
    latest = checkpointer.latest()
    assert latest is not None
    assert latest.step == 1
