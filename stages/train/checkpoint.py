"""Resumable state in the store: written beside the training, manifest last, damaged ones passed over.

Layout: `checkpoints/<fingerprint>/step-00000100/{engine,objective}.safetensors, history.jsonl, checkpoint.json`.
Nothing is pickled. Saving copies the tensors and returns; a thread writes them while training goes on.
"""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from stages.config.errors import DataError, StageError
from stages.store import Store, write_json
from stages.train.best import BestBy
from stages.train.objective import ObjectiveState

logger = logging.getLogger(__name__)

_RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps."""

    step: int
    engine: dict[str, Tensor]
    objective: ObjectiveState
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
        best: BestBy | None = None,
        trained_on: Mapping[str, str] | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep the `keep` newest and the best; `trained_on` names what a resumed training must share with the one that
        saved; `before_publishing` raises when this process may not write any more."""
        self._store, self._keep, self._rank = store, keep, rank
        self._best, self._trained_on = best, dict(trained_on or {})
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
        """Return the newest intact checkpoint; a damaged one is named in the log and the one before is used.

        Raises DataError when it comes from a training on something else.
        """
        for step in reversed(self._steps()):
            try:
                return self._read(step)
            except (ValueError, KeyError, OSError) as error:
                logger.warning("checkpoint %s/%s is damaged and passed over: %s", self._prefix, _folder(step), error)
        return None

    def is_best(self, step: int, history: list[dict[str, Any]]) -> bool:
        """Whether this step's weights would become the model if nothing better came."""
        return self._best is not None and self._best.step(history) == step

    def best(self, history: list[dict[str, Any]]) -> Checkpoint | None:
        """Return the best step's checkpoint; None when the last weights are the ones."""
        step = self._best.step(history) if self._best else None
        if step is None or step == history[-1]["step"]:
            return None
        try:
            return self._read(step)
        except (ValueError, KeyError, OSError) as error:
            raise DataError(
                f"the best checkpoint, {self._prefix}/{_folder(step)}, is damaged: {error}",
                advice=f"Delete {self._store.root_uri}/{self._prefix} to train anew.",
            ) from error

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
            record = {"step": checkpoint.step, "objective": checkpoint.objective.numbers, "sha256": {}}
            record["trained_on"] = self._trained_on
            for name, data in files.items():
                self._store.write_bytes(f"{folder}/{name}", data)
                record["sha256"][name] = hashlib.sha256(data).hexdigest()
            write_json(self._store, f"{folder}/{_RECORD}", record)
            self._remove_superseded(checkpoint.history)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._problem = error

    def _remove_superseded(self, history: list[dict[str, Any]]) -> None:
        best = self._best.step(history) if self._best else None
        for old in self._steps()[: -self._keep]:
            if old != best:
                self._store.delete(f"{self._prefix}/{_folder(old)}/{_RECORD}")
                self._store.delete(f"{self._prefix}/{_folder(old)}")

    def _read(self, step: int) -> Checkpoint:
        folder = f"{self._prefix}/{_folder(step)}"
        record = json.loads(self._store.read_bytes(f"{folder}/{_RECORD}"))
        self._require_same_origin(record["trained_on"], folder)
        files = {}
        for name, expected in record["sha256"].items():
            files[name] = self._store.read_bytes(f"{folder}/{name}")
            if hashlib.sha256(files[name]).hexdigest() != expected:
                raise ValueError(f"{name} does not have the recorded sha256")
        return Checkpoint(
            step=record["step"],
            engine=load(files["engine.safetensors"]),
            objective=ObjectiveState(record["objective"], load(files["objective.safetensors"])),
            history=[json.loads(line) for line in files["history.jsonl"].splitlines()],
        )

    def _require_same_origin(self, before: Mapping[str, str], folder: str) -> None:
        names = sorted(before.keys() | self._trained_on.keys())
        changes = [
            f"{name} was {_short(before.get(name))}, is {_short(self._trained_on.get(name))}"
            for name in names
            if before.get(name) != self._trained_on.get(name)
        ]
        if changes:
            raise DataError(
                f"checkpoint {folder} was trained on something else: {'; '.join(changes)}",
                advice=f"Bring back what it was trained on to go on with it, or delete "
                f"{self._store.root_uri}/{self._prefix} to train on the new from the start.",
            )


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:12]


def _folder(step: int) -> str:
    return f"step-{step:08d}"
