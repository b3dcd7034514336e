"""Resumable state in the store: written beside the training, manifest last, damaged ones passed over.

Layout: `checkpoints/<fingerprint>/step-00000100/{engine,objective}.safetensors, history.jsonl, checkpoint.json`.
Nothing is pickled. Saving copies the tensors and returns; a thread writes them while training goes on.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from stages.config.errors import StageError
from stages.store import Store, write_json
from stages.train.objective import ObjectiveState

logger = logging.getLogger(__name__)

_RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps."""

    step: int
    engine: dict[str, Tensor]
    objective: ObjectiveState
    guard: dict[str, Any]
    """What the loop remembers of skipped steps."""
    history: list[dict[str, Any]]
    """Metrics of all logged steps, for the model's history file."""


class Checkpointer:
    """Saves and finds the checkpoints of one fingerprint; only rank 0 writes."""

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        keep: int,
        rank: int,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """`before_publishing` raises when this process may not write any more."""
        self._store, self._keep, self._rank = store, keep, rank
        self._before_publishing = before_publishing
        self._prefix = f"checkpoints/{fingerprint}"
        self._writer: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing; waits for the one before. Raises what went wrong in it."""
        self.wait()
        if self._rank == 0:
            self._writer = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
            self._writer.start()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            if isinstance(problem, StageError):
                raise problem
            raise StageError(f"a checkpoint could not be written: {problem}", advice="Look at the store.") from problem

    def latest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint; a damaged one is named in the log and the one before is used."""
        for step in reversed(self._steps()):
            try:
                return self._read(step)
            except (ValueError, KeyError, OSError) as error:
                logger.warning("checkpoint %s/%s is damaged and passed over: %s", self._prefix, _folder(step), error)
        return None

    def _steps(self) -> list[int]:
        records = [key for key in self._store.list(self._prefix) if key.endswith(_RECORD)]
        return sorted(int(key.split("/")[-2].removeprefix("step-")) for key in records)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            self._before_publishing()
            folder = f"{self._prefix}/{_folder(checkpoint.step)}"
            lines = "".join(json.dumps(row) + "\n" for row in checkpoint.history)
            files = {
                "engine.safetensors": save(checkpoint.engine),
                "objective.safetensors": save(checkpoint.objective.tensors),
                "history.jsonl": lines.encode(),
            }
            record = {
                "step": checkpoint.step,
                "objective": checkpoint.objective.numbers,
                "guard": checkpoint.guard,
                "sha256": {},
            }
            for name, data in files.items():
                self._store.write_bytes(f"{folder}/{name}", data)
                record["sha256"][name] = hashlib.sha256(data).hexdigest()
            write_json(self._store, f"{folder}/{_RECORD}", record)
            for old in self._steps()[: -self._keep]:
                self._store.delete(f"{self._prefix}/{_folder(old)}/{_RECORD}")
                self._store.delete(f"{self._prefix}/{_folder(old)}")
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._problem = error

    def _read(self, step: int) -> Checkpoint:
        folder = f"{self._prefix}/{_folder(step)}"
        record = json.loads(self._store.read_bytes(f"{folder}/{_RECORD}"))
        files = {}
        for name, expected in record["sha256"].items():
            files[name] = self._store.read_bytes(f"{folder}/{name}")
            if hashlib.sha256(files[name]).hexdigest() != expected:
                raise ValueError(f"{name} does not have the recorded sha256")
        return Checkpoint(
            step=record["step"],
            engine=load(files["engine.safetensors"]),
            objective=ObjectiveState(record["objective"], load(files["objective.safetensors"])),
            guard=record["guard"],
            history=[json.loads(line) for line in files["history.jsonl"].splitlines()],
        )


def _folder(step: int) -> str:
    return f"step-{step:08d}"
