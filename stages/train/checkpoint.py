"""Resumable state in the store: written in the background, record last, damaged ones skipped.

Layout: `checkpoints/<fingerprint>/step-00000100/{engine-00000-of-00002,...,objective}.safetensors, history.jsonl,
checkpoint.json`. Every process writes the pieces that it holds into a file of its own; the record says which file holds
which part of which tensor, so that any engine reads it on any number of processes. Nothing is pickled. Saving copies
the tensors and returns; a thread writes them while training continues.
"""

import hashlib
import json
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file

from stages.artifacts.manifests import hash_file
from stages.artifacts.store import Store, write_json
from stages.config.errors import ConfigError, DataError, StageError
from stages.train.best import BestBy, Fallback
from stages.train.objective import ObjectiveState
from stages.train.ranks import Processes
from stages.train.shards import Box, Piece, Readable, SavedState, StoredPiece

logger = logging.getLogger(__name__)

_RECORD = "checkpoint.json"
_STEP = re.compile(r"/step-([0-9]{8,15})/checkpoint\.json")
_DAMAGE = (
    ValueError,
    LookupError,
    OSError,
    TypeError,
    AttributeError,
    RecursionError,
    SafetensorError,
    ConfigError,
)
"""What a malformed record or file raises; ConfigError, when it names a file outside its folder."""


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps, to be saved."""

    step: int
    engine: dict[str, Piece]
    """The pieces that this process saves; those of all processes tile the tensors."""
    objective: ObjectiveState
    guard: dict[str, Any]
    """What the loop remembers of skipped steps."""
    history: list[dict[str, Any]]
    """Metrics of all logged steps, for the model's history file."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that was found intact."""

    step: int
    engine: SavedState
    objective: ObjectiveState
    guard: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class _File:
    """What the record says of a file; `pieces` is empty but for engines' files."""

    name: str
    sha256: str
    pieces: dict[str, dict[str, Any]]


class Checkpointer:
    """Saves and finds the checkpoints of one fingerprint; all processes of a training use one each, together."""

    def __init__(
        self,
        store: Store,
        fingerprint: str,
        *,
        keep: int,
        processes: Processes,
        best: BestBy | None = None,
        fallback: Fallback | None = None,
        trained_on: Mapping[str, str] | None = None,
        before_publishing: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep the `keep` newest, the best, and what `fallback` may go back to.

        `trained_on` names what a resumed training must share with the one that saved; `before_publishing` raises when
        this process may not write any more.
        """
        self._store, self._keep, self._processes = store, keep, processes
        self._best, self._fallback, self._trained_on = best, fallback, dict(trained_on or {})
        self._before_publishing = before_publishing
        self._prefix = f"checkpoints/{fingerprint}"
        self._writer: threading.Thread | None = None
        self._problem: BaseException | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Start writing; waits for the one before. Raises what went wrong in it."""
        self.wait()
        self._writer = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._writer.start()

    def wait(self) -> None:
        """Return when nothing is being written any more; raises what went wrong in writing."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._problem is not None:
            problem, self._problem = self._problem, None
            if isinstance(problem, StageError):
                raise problem
            raise StageError(f"a checkpoint could not be written: {problem}", advice="Look at the store.") from problem

    def latest(self) -> SavedCheckpoint | None:
        """Return the newest checkpoint that all processes find intact; a damaged one is named in the log and the one
        before is used.

        Raises DataError when it comes from a training on something else.
        """
        # Rank 0's list for all: the others may have listed the store a moment earlier.
        for step in reversed(self._processes.gather(self._steps())[0]):
            found = problem = None
            try:
                found = self._read(step)
            except _DAMAGE as error:
                problem = str(error) or type(error).__name__
            # One process that cannot read its pieces is enough: all ranks resume from the same step.
            problems = [text for text in self._processes.gather(problem) if text is not None]
            if found is not None and not problems:
                return found
            logger.warning("checkpoint %s/%s is damaged and passed over: %s", self._prefix, _folder(step), problems[0])
        return None

    def is_best(self, step: int, history: list[dict[str, Any]]) -> bool:
        """Whether this step's weights would become the model if nothing better came."""
        return step in self._wanted(history)

    def best(self, history: list[dict[str, Any]]) -> SavedCheckpoint | None:
        """Return the best step's checkpoint; None when the last weights are the ones."""
        decides = self._fallback if self._fallback is not None and self._fallback.tripped else self._best
        step = decides.step(history) if decides is not None else None
        if step is None or step == history[-1]["step"]:
            return None
        try:
            return self._read(step)
        except _DAMAGE as error:
            raise DataError(
                f"the best checkpoint, {self._prefix}/{_folder(step)}, is damaged: {error}",
                advice=f"Delete {self._store.root_uri}/{self._prefix} to train anew.",
            ) from error

    def _wanted(self, history: list[dict[str, Any]]) -> set[int]:
        """The steps that may become the model, by the metrics so far."""
        best = self._best.step(history) if self._best is not None else None
        kept = self._fallback.kept(history) if self._fallback is not None else set()
        return kept | ({best} if best is not None else set())

    def _steps(self) -> list[int]:
        found = (_STEP.fullmatch(key.removeprefix(self._prefix)) for key in self._store.list(self._prefix))
        return sorted(int(step[1]) for step in found if step)

    def _write(self, checkpoint: Checkpoint) -> None:
        """Write this process's file; when all have, the main process writes the record."""
        file: _File | None = None
        try:
            self._before_publishing()
            file = self._write_pieces(checkpoint)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._problem = error
        try:
            files = self._processes.gather_to_main(file)
            if self._processes.rank == 0:
                self._finish(checkpoint, [file for file in files if file is not None], expected=len(files))
        except BaseException as error:  # noqa: BLE001
            self._problem = self._problem or error

    def _write_pieces(self, checkpoint: Checkpoint) -> _File:
        name = f"engine-{self._processes.rank:05d}-of-{self._processes.size:05d}.safetensors"
        tensors = {key: piece.tensor.contiguous() for key, piece in checkpoint.engine.items()}
        pieces = {
            key: {**asdict(piece.box), "dtype": str(piece.tensor.dtype).removeprefix("torch.")}
            for key, piece in checkpoint.engine.items()
        }
        with tempfile.TemporaryDirectory(prefix="athanor-checkpoint-") as scratch:
            path = Path(scratch, name)
            save_file(tensors, path)
            self._store.upload(path, f"{self._prefix}/{_folder(checkpoint.step)}/{name}")
            return _File(name, hash_file(path), pieces)

    def _finish(self, checkpoint: Checkpoint, files: list[_File], *, expected: int) -> None:
        """Write what only the main process knows, then the record, and delete what is too old."""
        if len(files) < expected:
            raise StageError(
                f"{expected - len(files)} of {expected} processes could not write their part of a checkpoint",
                advice="Look at their logs and at the store.",
            )
        folder = f"{self._prefix}/{_folder(checkpoint.step)}"
        lines = "".join(json.dumps(row) + "\n" for row in checkpoint.history)
        for name, data in {
            "objective.safetensors": save(checkpoint.objective.tensors),
            "history.jsonl": lines.encode(),
        }.items():
            self._store.write_bytes(f"{folder}/{name}", data)
            files.append(_File(name, hashlib.sha256(data).hexdigest(), {}))
        record = {
            "step": checkpoint.step,
            "objective": checkpoint.objective.numbers,
            "guard": checkpoint.guard,
            "files": [asdict(file) for file in files],
            "trained_on": self._trained_on,
        }
        write_json(self._store, f"{folder}/{_RECORD}", {"record": record, "sha256": _digest(record)})
        self._remove_superseded(checkpoint.history)

    def _remove_superseded(self, history: list[dict[str, Any]]) -> None:
        wanted = self._wanted(history)
        for old in self._steps()[: -self._keep]:
            if old not in wanted:
                # The record first: without it a half-deleted folder is no checkpoint.
                self._store.delete(f"{self._prefix}/{_folder(old)}/{_RECORD}")
                self._store.delete(f"{self._prefix}/{_folder(old)}")

    def _read(self, step: int) -> SavedCheckpoint:
        """Verify this process's share of the files, and the small ones; the others when something is read from them."""
        folder = f"{self._prefix}/{_folder(step)}"
        stored = json.loads(self._store.read_bytes(f"{folder}/{_RECORD}"))
        record = stored["record"]
        if _digest(record) != stored["sha256"]:
            raise ValueError(f"{_RECORD} does not have the sha256 that it names")
        if record["step"] != step:
            raise ValueError(f"{_RECORD} is of step {record['step']!r}")
        self._require_same_origin(record["trained_on"], folder)
        files = [_File(**entry) for entry in record["files"]]
        opened = _OpenedFiles(self._store, folder, {file.name: file.sha256 for file in files})
        # Together the processes verify every file once; a file that is read across layouts is verified when opened.
        shards = [file for file in files if file.pieces]
        for file in shards[self._processes.rank :: self._processes.size]:
            opened.path(file.name)
        pieces: dict[str, list[StoredPiece]] = {}
        for file in shards:
            for key, placed in file.pieces.items():
                box = Box(tuple(placed["shape"]), tuple(placed["offsets"]), tuple(placed["sizes"]))
                dtype = getattr(torch, placed["dtype"])
                pieces.setdefault(key, []).append(StoredPiece(box, dtype, partial(opened.tensor, file.name, key)))
        return SavedCheckpoint(
            step=record["step"],
            engine=SavedState(pieces),
            objective=ObjectiveState(record["objective"], load(opened.path("objective.safetensors").read_bytes())),
            guard=record["guard"],
            history=[json.loads(line) for line in opened.path("history.jsonl").read_text().splitlines()],
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
                advice=f"Bring back what it was trained on to continue with it, or delete "
                f"{self._store.root_uri}/{self._prefix} to train on the new from the start.",
            )


def _digest(record: dict[str, Any]) -> str:
    """Hash over the record's values: a bit that flips in a cursor would go unnoticed in JSON."""
    as_read = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest[:12]


class _OpenedFiles:
    """The files of one checkpoint, brought here once, verified, and mapped into memory."""

    def __init__(self, store: Store, folder: str, sha256: dict[str, str]) -> None:
        self._store, self._folder, self._sha256 = store, folder, sha256
        self._scratch = tempfile.TemporaryDirectory(prefix="athanor-checkpoint-")
        self._paths: dict[str, Path] = {}
        self._mapped: dict[str, Any] = {}

    def path(self, name: str) -> Path:
        """Raises ValueError when the content is not the recorded one."""
        if name not in self._paths:
            key = f"{self._folder}/{name}"
            path = self._store.local_path(key)
            if path is None:
                path = Path(self._scratch.name, name)
                self._store.download(key, path)
            if hash_file(path) != self._sha256[name]:
                raise ValueError(f"{name} does not have the recorded sha256")
            self._paths[name] = path
        return self._paths[name]

    def tensor(self, name: str, key: str) -> Readable:
        if name not in self._mapped:
            self._mapped[name] = safe_open(self.path(name), framework="pt")
        stored = self._mapped[name].get_slice(key)
        return stored if stored.get_shape() else self._mapped[name].get_tensor(key)


def _folder(step: int) -> str:
    return f"step-{step:08d}"
