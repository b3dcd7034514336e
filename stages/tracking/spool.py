"""The queue between a stage and MLflow, as a file of JSON lines.

One thread appends, another reads. What the job could not deliver is left in the store as `mlflow-spool.jsonl`, whose
first line is the stage's request, so that another process can deliver it later.
"""

import base64
import json
import logging
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.artifacts.store import Store
from stages.config.request import StageRequest

SPOOL_NAME = "mlflow-spool.jsonl"
_EVENTS_PER_READ = 500

Event = dict[str, Any]
"""`type` is start, metrics, file, finish or fail; `time` is in milliseconds since the epoch."""

logger = logging.getLogger(__name__)


class Spool:
    """`append` on one side, `next_events` and `acknowledge` on the other; events are on disk, not in memory."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._lock = threading.Lock()
        self._file = path.open("ab")
        self._end = self._read = self._file.tell()

    def append(self, event: Event) -> None:
        """Append; a full disk loses the event and never stops training."""
        line = json.dumps(event).encode() + b"\n"
        try:
            with self._lock:
                self._file.write(line)
                self._file.flush()
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
        events = []
        with self._path.open("rb") as file:
            file.seek(position)
            while position < end and len(events) < limit:
                line = file.readline()
                position += len(line)
                events.append((json.loads(line), position))
        return events

    def acknowledge(self, position: int) -> None:
        with self._lock:
            self._read = max(self._read, position)

    def undelivered(self) -> list[Event]:
        return [event for event, _ in self.next_events(limit=sys.maxsize)]


def leave_spool(store: Store, key: str, request: StageRequest, events: Iterable[Event]) -> None:
    """Write undelivered events to the store, attachments included, after those of earlier attempts."""
    lines = store.read_bytes(key).splitlines() if store.exists(key) else [request.model_dump_json().encode()]
    for event in events:
        if "path" in event:
            content = base64.b64encode(Path(event["path"]).read_bytes()).decode()
            event = {name: value for name, value in event.items() if name != "path"} | {"content": content}
        lines.append(json.dumps(event).encode())
    store.write_bytes(key, b"\n".join(lines) + b"\n")


def read_spool(store: Store, key: str) -> tuple[StageRequest, list[Event]]:
    """Return what `leave_spool` wrote."""
    first, *rest = store.read_bytes(key).splitlines()
    return StageRequest.model_validate_json(first), [json.loads(line) for line in rest]
