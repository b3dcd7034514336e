"""MLflow tracking that never stops training: events go to a spool file, one background thread delivers them.

Surprising on purpose:
- Importing this module is cheap. mlflow, which takes seconds to import, is imported by the background thread, and in
  stages that import torch only after their first metric: two imports at once slow each other down.
- The spool file is the queue. It grows while MLflow is away and is replayed afterwards; an event that is sent twice
  because an answer was lost is recognised (see stages.tracking.session). What is undelivered when the job ends goes to
  `runs/<run id>/<stage>/mlflow-spool.jsonl` in the store, from where the stage's next attempt, a closing stage of the
  run, or `python -m stages.tracking <run id>` delivers it.
"""

import http.client
import json
import logging
import os
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from stages.artifacts.addresses import open_store, run_key
from stages.config.mlflow import authorization, tracking_server
from stages.config.request import ArtifactRef, Manifest, StageRequest
from stages.tracking.client import now_ms, stage_tag
from stages.tracking.deliverer import Deliverer
from stages.tracking.events import FailEvent, FileEvent, FinishEvent, MetricsEvent, StartEvent
from stages.tracking.spool import SPOOL_NAME, Spool, leave_spool, set_aside

_FINISH_SECONDS = 30.0
_FAIL_SECONDS = 10.0

logger = logging.getLogger(__name__)


class NullTracker:
    """Tracks nothing: for workers other than the first."""

    def start(self, *, fingerprint: str, params: dict[str, str], tags: dict[str, str]) -> None: ...
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def log_artifact(self, path: Path, name: str, *, parent: bool = False) -> None: ...
    def log_text(self, text: str, name: str, *, parent: bool = False) -> None: ...
    def wait_run_id(self, timeout: float) -> str | None:
        return None

    def finish(self, manifest: Manifest, *, history: str = "") -> tuple[str | None, str | None]:
        return None, None

    def fail(self, message: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """One stage's MLflow run. Every method returns at once, except that `finish`, `fail` and `close` wait a while."""

    def __init__(self, request: StageRequest, spool_dir: Path) -> None:
        self._request, self._spool_dir = request, spool_dir
        self._spool = Spool(spool_dir / SPOOL_NAME)
        self._start: StartEvent | None = None
        self._deliverer: Deliverer | None = None

    def start(self, *, fingerprint: str, params: dict[str, str], tags: dict[str, str]) -> None:
        """Begin to track. Without MLFLOW_TRACKING_URI nothing is tracked, and one warning says so."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            logger.warning(
                "MLFLOW_TRACKING_URI is not set: stage %s is not tracked in MLflow", self._request.stage.value
            )
            return
        self._start = StartEvent(fingerprint=fingerprint, params=params, tags=tags, time=now_ms())
        self._spool.append(self._start)
        self._deliverer = Deliverer(self._request, self._spool)
        self._deliverer.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue the metrics of one optimizer step; they reach MLflow in batches, two seconds later at most."""
        if self._deliverer:
            values = {key: float(value) for key, value in metrics.items()}
            self._spool.append(MetricsEvent(step=step, values=values, time=now_ms()))
            self._deliverer.may_import.set()

    def log_artifact(self, path: Path, name: str, *, parent: bool = False) -> None:
        """Queue a copy of `path` as artifact `name` of this run, or of the pipeline run."""
        self._attach_file(lambda copy: shutil.copyfile(path, copy), name, parent=parent)

    def log_text(self, text: str, name: str, *, parent: bool = False) -> None:
        """Queue `text` as artifact `name` of this run, or of the pipeline run."""
        self._attach_file(lambda copy: copy.write_text(text, encoding="utf-8"), name, parent=parent)

    def _attach_file(self, write: Callable[[Path], object], name: str, *, parent: bool) -> None:
        if self._deliverer is None:
            return
        copy = self._spool_dir / f"attachment-{time.monotonic_ns()}"
        try:
            write(copy)
        except OSError as error:  # a full disk costs tracking and not the stage
            logger.error("the file %s for MLflow is lost: %s", name, error)
            return
        self._spool.append(FileEvent(name=name, parent=parent, attachment=copy.name))

    def wait_run_id(self, timeout: float) -> str | None:
        """Return the child run's id as soon as it exists, None when it does not within `timeout` seconds."""
        if self._deliverer is None:
            return None
        self._deliverer.may_import.set()
        self._deliverer.attached.wait(timeout)
        return self._deliverer.session.run_id if self._deliverer.session else None

    def finish(self, manifest: Manifest, *, history: str = "") -> tuple[str | None, str | None]:
        """End the run FINISHED and return (MLflow run id, LoggedModel id or None).

        `history` has the metrics of every step as JSON lines, and fills in what other processes did not deliver.
        Waits up to 30 s for delivery. When MLflow stays away, ids that are not known yet are None, the spool is left
        in the store, and a warning says so.
        """
        if self._deliverer is None:
            return None, None
        self._spool.append(FinishEvent(manifest=manifest, history=history, time=now_ms()))
        self._deliver_or_leave(_FINISH_SECONDS)
        session = self._deliverer.session
        return (session.run_id, session.model_id) if session else (None, None)

    def fail(self, message: str) -> None:
        """End the run FAILED; a later attempt of the stage continues it."""
        if self._deliverer:
            self._spool.append(FailEvent(message=message, time=now_ms()))
            self._deliver_or_leave(_FAIL_SECONDS)

    def close(self) -> None:
        """Deliver what is queued and leave the run RUNNING: for a worker whose run the job's own process ends."""
        if self._deliverer:
            self._deliver_or_leave(_FAIL_SECONDS)

    def _deliver_or_leave(self, seconds: float) -> None:
        if self._deliverer is None or self._start is None:
            return
        if not self._deliverer.drain(seconds):
            self._deliverer.abandon()
        delivery = self._deliverer.delivery
        refused, files = (delivery.refused(), delivery.postponed) if delivery else ([], [])
        if delivery:
            delivery.postponed = []
        left = [*files, *self._spool.undelivered()]
        if not left and not refused:
            return
        store, run_id = open_store(self._request.store_uri), self._request.run.run_id
        key = run_key(run_id, self._request.stage, SPOOL_NAME)
        set_aside(store, key, refused)
        if not left:
            return
        if not isinstance(left[0], StartEvent):
            left.insert(0, self._start)
        leave_spool(store, key, self._request, left, folder=self._spool.folder)
        logger.warning(
            "MLflow did not take %d events within %.0f s (%s); they wait in %s/%s and are delivered by the next "
            "attempt, a closing stage of this run, or `python -m stages.tracking %s`",
            len(left),
            seconds,
            self._deliverer.problem or ("its storage took no files" if files else "no answer yet"),
            store.root_uri,
            key,
            run_id,
        )


def record_hit(request: StageRequest, artifact: ArtifactRef) -> None:
    """Note on the pipeline run that a stage hit, so that its lineage is complete; a failure is a warning.

    One HTTP request instead of the client library, whose import would take longer than the rest of a hit.
    """
    server = tracking_server()
    if not server or request.run.parent_run_id is None:
        return
    record = {
        "hit": True,
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "mlflow_run_id": artifact.mlflow_run_id,
    }
    body = {"run_id": request.run.parent_run_id, "key": stage_tag(request.stage.value), "value": json.dumps(record)}
    call = urllib.request.Request(
        f"{server.rstrip('/')}/api/2.0/mlflow/runs/set-tag",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    if login := authorization():
        call.add_header("Authorization", login)
    try:
        with urllib.request.urlopen(call, timeout=5):
            pass
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError and HTTPError are OSErrors
        logger.warning("MLflow was not told that stage %s hit: %s", request.stage.value, error)
