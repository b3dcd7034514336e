"""The queue between a stage and MLflow, as a file of JSON lines.

One thread appends, another reads. What the job could not deliver is left in the store as `mlflow-spool.jsonl`, whose
first line is the stage's request, so that another process can deliver it later. That process believes the file no more
than it must: a line that is no record of its run is set aside in `mlflow-spool.refused.jsonl`, with the reason.
"""

import base64
import json
import logging
import os
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.artifacts.addresses import run_key
from stages.artifacts.store import Store
from stages.config.errors import DataError
from stages.config.records import parse_record
from stages.config.request import StageRequest
from stages.tracking.events import Event, FileEvent, from_line, to_line

SPOOL_NAME = "mlflow-spool.jsonl"
REFUSED_NAME = "mlflow-spool.refused.jsonl"
_EVENTS_PER_READ = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refused:
    """What MLflow will not get: a line of a spool, or one value of an event, and the reason."""

    what: str
    reason: str


@dataclass(frozen=True)
class LeftSpool:
    """A spool in the store, as far as it can be believed."""

    request: StageRequest
    events: tuple[Event, ...]
    refused: tuple[Refused, ...]


class Spool:
    """`append` on one side, `next_events` and `acknowledge` on the other; events are on disk, not in memory."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        path.touch()
        self._file = path.open("r+b", buffering=0)
        self._end = self._read = self._told = self._file.seek(0, os.SEEK_END)

    @property
    def folder(self) -> Path:
        """Where the attachments of its events lie."""
        return self._path.parent

    def append(self, event: Event) -> None:
        """Append; a full disk loses the event and never stops training."""
        line = to_line(event) + b"\n"
        try:
            with self._lock:
                self._file.seek(self._end)  # over what a full disk took of a line before it refused the rest
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
                self._end += len(line)
        except OSError as error:
            logger.error("an event for MLflow is lost, %s cannot be written: %s", self._path, error)

    @property
    def is_delivered(self) -> bool:
        with self._lock:
            return self._read >= self._end

    def next_events(self, limit: int = _EVENTS_PER_READ) -> list[tuple[Event, int]]:
        """Return undelivered events, each with the position to acknowledge once it is delivered."""
        with self._lock:
            position, end = self._read, self._end
        events: list[tuple[Event, int]] = []
        with self._path.open("rb") as file:
            file.seek(position)
            while position < end and len(events) < limit:
                line = file.readline()
                position = position + len(line) if line.endswith(b"\n") else end  # a damaged disk may cut the file
                try:
                    events.append((from_line(line), position))
                except DataError as error:
                    self._report_lost(position, error.message)
                    if events:  # acknowledged with the event before it
                        events[-1] = (events[-1][0], position)
                    else:
                        self.acknowledge(position)
        return events

    def _report_lost(self, position: int, reason: str) -> None:
        if position > self._told:  # events before it are read again while MLflow is away
            logger.error("an event for MLflow is lost, it cannot be read: %s", reason)
            self._told = position

    def acknowledge(self, position: int) -> None:
        with self._lock:
            self._read = max(self._read, position)

    def undelivered(self) -> list[Event]:
        return [event for event, _ in self.next_events(limit=sys.maxsize)]


def attached(event: FileEvent, folder: Path | None) -> bytes:
    """Return the content of a file event; `folder` is that of the spool on this worker, None for one in the store.

    Raises DataError when it names a file and there is no folder, or when the file is not a plain one.
    """
    if event.content is not None:
        return base64.b64decode(event.content)
    path = folder / str(event.attachment) if folder else None
    if path is None or path.is_symlink() or not path.is_file():
        raise DataError(f"the file {event.name!r} is not there: a spool in the store has the content in the line")
    return path.read_bytes()


def leave_spool(
    store: Store, key: str, request: StageRequest, events: Iterable[Event], *, folder: Path | None = None
) -> None:
    """Write undelivered events to the store, attachments included, after those of earlier attempts."""
    lines = [request.model_dump_json().encode()]
    if store.exists(key):
        before = store.read_bytes(key).splitlines()
        try:
            _owner(store, key, before[0] if before else b"")
            lines = before
        except DataError as error:
            set_aside(store, key, [Refused(_text(line), error.message) for line in before])
    for event in events:
        if isinstance(event, FileEvent) and event.content is None:
            try:
                content = base64.b64encode(attached(event, folder)).decode()
            except (DataError, OSError) as error:
                logger.error("the file %s for MLflow is lost: %s", event.name, error)
                continue
            event = event.model_copy(update={"attachment": None, "content": content})
        lines.append(to_line(event))
    store.write_bytes(key, b"\n".join(lines) + b"\n")


def write_spool(store: Store, key: str, request: StageRequest, events: Iterable[Event]) -> None:
    """Write a spool to the store in place of what is there; its files carry their content."""
    store.write_bytes(key, b"\n".join([request.model_dump_json().encode(), *map(to_line, events)]) + b"\n")


def read_spool(store: Store, key: str) -> LeftSpool:
    """Return what `leave_spool` wrote; raises DataError when it is not the spool of the stage whose folder it is in."""
    first, *rest = store.read_bytes(key).splitlines() or [b""]
    request = _owner(store, key, first)
    events: list[Event] = []
    refused: list[Refused] = []
    for line in rest:
        try:
            event = from_line(line)
            if isinstance(event, FileEvent) and event.content is None:
                raise DataError(f"the file {event.name!r} has no content; a spool in the store names no other files")
            events.append(event)
        except DataError as error:
            refused.append(Refused(_text(line), error.message))
    return LeftSpool(request, tuple(events), tuple(refused))


def set_aside(store: Store, key: str, refused: Iterable[Refused]) -> None:
    """Keep what MLflow does not get next to the spool `key`, with the reasons, and say so in the log."""
    lines = [json.dumps({"reason": entry.reason, "what": entry.what}).encode() for entry in refused]
    if not lines:
        return
    aside = f"{key.rpartition('/')[0]}/{REFUSED_NAME}"
    before = store.read_bytes(aside).splitlines() if store.exists(aside) else []
    store.write_bytes(aside, b"\n".join([*before, *lines]) + b"\n")
    first = json.loads(lines[0])["reason"]
    logger.error(
        "MLflow does not get %d records or values of %s; they are kept in %s/%s. The first reason: %s",
        len(lines),
        key,
        store.root_uri,
        aside,
        first,
    )


def set_aside_whole(store: Store, key: str, reason: str) -> None:
    """Set every line of a spool aside and remove it."""
    set_aside(store, key, [Refused(_text(line), reason) for line in store.read_bytes(key).splitlines()])
    store.delete(key)


def _owner(store: Store, key: str, first: bytes) -> StageRequest:
    """Return the request on a spool's first line, which must be of the run and the stage whose folder it lies in."""
    where = f"{store.root_uri}/{key}"
    request = parse_record(StageRequest, first, f"the first line of {where}")
    if run_key(request.run.run_id, request.stage, SPOOL_NAME) != key:
        raise DataError(
            f"{where} says that it is of stage {request.stage.value} of run {request.run.run_id!r}, which has another "
            "folder"
        )
    return request


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace")
