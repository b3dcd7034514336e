"""A process that lost its lease publishes nothing: no checkpoint, and no file of a worker."""

from pathlib import Path

import pytest
import torch

from stages.artifacts.addresses import open_store
from stages.artifacts.lease import LeaseLostError, Owner, acquire
from stages.config.graph import Stage
from stages.config.recipes import tiny
from stages.job.context import StageContext, StageOutcome
from stages.job.workers import _on_worker
from stages.train.checkpoint import Checkpoint, Checkpointer
from stages.train.objective import ObjectiveState
from stages.train.ranks import Processes
from stages.train.shards import Box, Piece
from tests.pipeline_records import request_for, run_info

IDENTITY = "f" * 64


def test_a_checkpoint_is_not_published_by_a_process_that_lost_its_lease(tmp_path: Path):
    store, held = open_store(tmp_path.as_uri()), [True]

    def check() -> None:
        if not held[0]:
            raise LeaseLostError("another process builds")

    checkpointer = Checkpointer(store, IDENTITY, keep=2, processes=Processes(), before_publishing=check)
    checkpointer.save(Checkpoint(1, {"w": Piece(Box.whole((2,)), torch.ones(2))}, ObjectiveState(), {}, []))
    checkpointer.wait()
    held[0] = False
    checkpointer.save(Checkpoint(2, {"w": Piece(Box.whole((2,)), torch.zeros(2))}, ObjectiveState(), {}, []))
    with pytest.raises(LeaseLostError, match="another process builds"):
        checkpointer.wait()
    latest = checkpointer.latest()
    assert latest is not None
    assert latest.step == 1


def write_a_model(context: StageContext) -> StageOutcome:
    (context.output_dir / "model.safetensors").write_text("weights")
    return StageOutcome(metrics={"train/loss": 1.0})


def test_a_worker_uploads_while_its_job_holds_the_lease_and_not_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ATHANOR_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    store = open_store((tmp_path / "store").as_uri())
    request = request_for(Stage.SFT, store, {}, tiny().sft, run_info())
    request = request.model_copy(update={"submission_id": "athanor-sft-0123-1"})
    lease = acquire(store, kind="sft-model", fingerprint=IDENTITY, owner=Owner.of(request))
    assert lease is not None
    arguments = {
        "request": request.model_dump(mode="json"),
        "fingerprint": IDENTITY,
        "sources": [],
        "fence": lease.fence.model_dump(),
        "functions": [f"{__name__}:write_a_model"],
    }
    sent = _on_worker(arguments)
    assert sent is not None
    assert [file["path"] for file in sent["files"]] == ["model.safetensors"]

    store.delete("artifacts")
    retry = request.model_copy(update={"submission_id": "athanor-sft-0123-2"})
    assert acquire(store, kind="sft-model", fingerprint=IDENTITY, owner=Owner.of(retry)) is not None
    with pytest.raises(LeaseLostError, match="athanor-sft-0123-2"):
        _on_worker(arguments)
    assert list(store.list("artifacts")) == []
