"""MLflow tracking that never stops training: events go to a spool file, one background thread delivers them.

Surprising on purpose:
- Importing this module is cheap. mlflow, which takes seconds to import, is imported by the background thread, and in
  stages that import torch only after their first metric: two imports at once slow each other down.
- The spool file is the queue. While MLflow is away it grows; afterwards it is replayed, each event once as far as
  anybody can tell (see stages.mlflow_session). What is undelivered when the job ends goes to
  `runs/<run id>/<stage>/mlflow-spool.jsonl` in the store, from where the stage's next attempt, a closing stage of the
  run, or `python -m stages.tracking <run id>` delivers it.
"""

import argparse
import base64
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stages.artifacts import artifact_uri, run_key
from stages.config.errors import ConfigError, StageError
from stages.config.graph import GRAPH, Stage
from stages.config.request import ArtifactRef, Manifest, StageRequest
from stages.lineage import ancestors_of_unpublished, to_json, to_markdown, to_svg
from stages.mlflow_client import MLFLOW_RUN_MARKER, REFUSALS, connect, now_ms, stage_tag
from stages.mlflow_session import MlflowSession, Point
from stages.spool import SPOOL_NAME, Event, Spool, leave_spool, read_spool
from stages.store import Store, open_store

_FLUSH_SECONDS = 2.0
_IMPORT_GRACE_SECONDS = 15.0
_FINISH_SECONDS = 30.0
_FAIL_SECONDS = 10.0
_MAX_BACKOFF_SECONDS = 30.0
_HISTORY = "history.jsonl"
_CLOSING = (Stage.EVALUATE, Stage.PROMOTE, Stage.REPORT)

logger = logging.getLogger(__name__)


class NullTracker:
    """Tracks nothing: for workers other than the first."""

    def start(self, *, fingerprint: str, params: dict[str, str], tags: dict[str, str]) -> None: ...
    def log(self, metrics: dict[str, float], step: int) -> None: ...
    def log_artifact(self, path: Path, name: str, *, parent: bool = False) -> None: ...
    def log_text(self, text: str, name: str, *, parent: bool = False) -> None: ...
    def wait_run_id(self, timeout: float) -> str | None:
        return None

    def finish(self, manifest: Manifest, *, model_dir: Path | None) -> tuple[str | None, str | None]:
        return None, None

    def fail(self, message: str) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """One stage's MLflow run. Every method returns at once, except that `finish`, `fail` and `close` wait a while."""

    def __init__(self, request: StageRequest, spool_dir: Path) -> None:
        self._request, self._spool_dir = request, spool_dir
        self._spool = Spool(spool_dir / SPOOL_NAME)
        self._start: Event = {}
        self._deliverer: _Deliverer | None = None

    def start(self, *, fingerprint: str, params: dict[str, str], tags: dict[str, str]) -> None:
        """Begin to track. Without MLFLOW_TRACKING_URI nothing is tracked, which is said once."""
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            logger.warning(
                "MLFLOW_TRACKING_URI is not set: stage %s is not tracked in MLflow", self._request.stage.value
            )
            return
        self._start = {"type": "start", "fingerprint": fingerprint, "params": params, "tags": tags, "time": now_ms()}
        self._spool.append(self._start)
        self._deliverer = _Deliverer(self._request, self._spool)
        self._deliverer.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Queue the metrics of one optimizer step; they reach MLflow in batches, two seconds later at most."""
        if self._deliverer:
            values = {key: float(value) for key, value in metrics.items()}
            self._spool.append({"type": "metrics", "step": step, "values": values, "time": now_ms()})
            self._deliverer.may_import.set()

    def log_artifact(self, path: Path, name: str, *, parent: bool = False) -> None:
        """Queue a copy of `path` as artifact `name` of this run, or of the pipeline run."""
        if self._deliverer:
            copy = self._new_attachment()
            shutil.copyfile(path, copy)
            self._spool.append({"type": "file", "path": str(copy), "name": name, "parent": parent})

    def log_text(self, text: str, name: str, *, parent: bool = False) -> None:
        """Queue `text` as artifact `name` of this run, or of the pipeline run."""
        if self._deliverer:
            copy = self._new_attachment()
            copy.write_text(text, encoding="utf-8")
            self._spool.append({"type": "file", "path": str(copy), "name": name, "parent": parent})

    def _new_attachment(self) -> Path:
        return self._spool_dir / f"attachment-{time.monotonic_ns()}"

    def wait_run_id(self, timeout: float) -> str | None:
        """Return the child run's id as soon as it exists, None when it does not within `timeout` seconds."""
        if self._deliverer is None:
            return None
        self._deliverer.may_import.set()
        self._deliverer.attached.wait(timeout)
        return self._deliverer.session.run_id if self._deliverer.session else None

    def finish(self, manifest: Manifest, *, model_dir: Path | None) -> tuple[str | None, str | None]:
        """End the run FINISHED and return (MLflow run id, LoggedModel id or None).

        Waits up to 30 s for delivery. When MLflow stays away, ids that are not known yet are None, the spool is left
        in the store, and a warning says so.
        """
        if self._deliverer is None:
            return None, None
        history = model_dir / _HISTORY if model_dir else None
        text = history.read_text(encoding="utf-8") if history and history.is_file() else ""
        self._spool.append(
            {"type": "finish", "manifest": manifest.model_dump(mode="json"), "history": text, "time": now_ms()}
        )
        self._deliver_or_leave(_FINISH_SECONDS)
        session = self._deliverer.session
        return (session.run_id, session.model_id) if session else (None, None)

    def fail(self, message: str) -> None:
        """End the run FAILED; a later attempt of the stage takes it up again."""
        if self._deliverer:
            self._spool.append({"type": "fail", "message": message, "time": now_ms()})
            self._deliver_or_leave(_FAIL_SECONDS)

    def close(self) -> None:
        """Deliver what is queued and leave the run RUNNING: for a worker whose run the job's own process ends."""
        if self._deliverer:
            self._deliver_or_leave(_FAIL_SECONDS)

    def _deliver_or_leave(self, seconds: float) -> None:
        if self._deliverer is None or self._deliverer.drain(seconds):
            return
        left = self._spool.undelivered()
        if left and left[0]["type"] != "start":
            left.insert(0, self._start)
        store, run_id = open_store(self._request.store_uri), self._request.run.run_id
        key = run_key(run_id, self._request.stage, SPOOL_NAME)
        leave_spool(store, key, self._request, left)
        logger.warning(
            "MLflow did not take %d events within %.0f s (%s); they wait in %s/%s and are delivered by the next "
            "attempt, a closing stage of this run, or `python -m stages.tracking %s`",
            len(left),
            seconds,
            self._deliverer.problem or "no answer yet",
            store.root_uri,
            key,
            run_id,
        )


class _Deliverer(threading.Thread):
    """Takes events from the spool to MLflow, in order, until the process ends."""

    def __init__(self, request: StageRequest, spool: Spool) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._request, self._spool = request, spool
        self._wake = threading.Event()
        self._delivered = threading.Condition()
        self._is_draining = False
        self.may_import = threading.Event()
        self.attached = threading.Event()
        self.session: MlflowSession | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            if GRAPH[self._request.stage].trains or self._request.stage is Stage.EVALUATE:
                self.may_import.wait(_IMPORT_GRACE_SECONDS)
            self.session = MlflowSession(self._request, connect())
            self._deliver_forever(self.session)
        except (
            Exception
        ) as error:  # a mistake in tracking must not end a stage that works; it is told with its traceback
            self.problem = f"{type(error).__name__}: {error}"
            logger.exception("tracking in MLflow stopped; the stage goes on")

    def drain(self, seconds: float) -> bool:
        """Wait until everything is delivered; False when it is not within `seconds` or the thread has died."""
        self._is_draining = True
        self.may_import.set()
        self._wake.set()
        deadline = time.monotonic() + seconds
        with self._delivered:
            while not self._spool.is_delivered and self.is_alive() and time.monotonic() < deadline:
                self._delivered.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        self._is_draining = False
        return self._spool.is_delivered

    def _deliver_forever(self, session: MlflowSession) -> None:
        backoff = delay = 0.0
        while True:
            self._wake.wait(delay)
            self._wake.clear()
            delay = _FLUSH_SECONDS
            if self._spool.is_delivered:
                continue
            problem = deliver(session, self._request, self._spool.next_events(), self._spool.acknowledge)
            if session.run_id and not self.attached.is_set():
                self._announce(session)
            if problem:
                backoff = min(max(1.0, 2 * backoff), _MAX_BACKOFF_SECONDS)
                delay = 1.0 if self._is_draining else backoff
                self._report_outage(problem)
            else:
                backoff = 0.0
                self._report_recovery()
                with self._delivered:
                    self._delivered.notify_all()
                if self._is_draining and not self._spool.is_delivered:
                    delay = 0.0

    def _announce(self, session: MlflowSession) -> None:
        ids = {"run_id": session.run_id, "experiment_id": session.experiment_id}
        print(MLFLOW_RUN_MARKER, json.dumps(ids), flush=True)  # noqa: T201 - the job's log is the channel to Airflow
        self._take_up_leftovers(session)
        self.attached.set()

    def _report_outage(self, problem: str) -> None:
        if not self.problem:
            logger.warning("MLflow does not answer; metrics wait in a spool file, the stage goes on: %s", problem)
        self.problem = problem

    def _report_recovery(self) -> None:
        if self.problem:
            logger.info("MLflow answers again; waiting events were delivered")
        self.problem = ""

    def _take_up_leftovers(self, session: MlflowSession) -> None:
        """Deliver what earlier attempts left in the store; closing stages, which run alone, do so for the whole run."""
        store, run_id = open_store(self._request.store_uri), self._request.run.run_id
        own = run_key(run_id, self._request.stage, SPOOL_NAME)
        if store.exists(own):
            _, events = read_spool(store, own)
            measured = [event for event in events if event["type"] in ("metrics", "file")]
            if deliver(session, self._request, _numbered(measured)) is None:
                store.delete(own)
        if self._request.stage in _CLOSING:
            replay(store, run_id)


def deliver(
    session: MlflowSession,
    request: StageRequest,
    events: Iterable[tuple[Event, int]],
    acknowledge: Callable[[int], None] = lambda position: None,
) -> str | None:
    """Deliver events in order, metrics together; return the problem when MLflow is not reachable.

    What MLflow refuses for good is dropped with an error in the log, so that it does not hold up the rest.
    """
    from mlflow.exceptions import MlflowException

    for group in _grouped(events):
        try:
            _deliver_group(session, request, [event for event, _ in group])
        except MlflowException as error:
            if error.error_code not in REFUSALS or group[0][0]["type"] == "start":
                return f"{error.error_code}: {str(error)[:300]}"
            logger.error("MLflow refused an event of type %s, it is dropped: %s", group[0][0]["type"], error)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        acknowledge(group[-1][1])
    return None


def _grouped(events: Iterable[tuple[Event, int]]) -> Iterator[list[tuple[Event, int]]]:
    """Neighbouring metrics in one group, everything else alone."""
    group: list[tuple[Event, int]] = []
    for event, position in events:
        if group and (event["type"] != "metrics" or group[-1][0]["type"] != "metrics"):
            yield group
            group = []
        group.append((event, position))
    if group:
        yield group


def _numbered(events: Iterable[Event]) -> list[tuple[Event, int]]:
    return [(event, number) for number, event in enumerate(events)]


def _deliver_group(session: MlflowSession, request: StageRequest, group: list[Event]) -> None:
    event = group[0]
    match event["type"]:
        case "start":
            session.attach(
                fingerprint=event["fingerprint"], params=event["params"], tags=event["tags"], time_ms=event["time"]
            )
        case "metrics":
            session.log_points(
                Point(key, value, event["step"], event["time"])
                for event in group
                for key, value in event["values"].items()
            )
        case "file" if "content" in event:
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "content"
                path.write_bytes(base64.b64decode(event["content"]))
                session.log_file(path, event["name"], parent=event["parent"])
        case "file":
            session.log_file(Path(event["path"]), event["name"], parent=event["parent"])
        case "finish":
            manifest = Manifest.model_validate(event["manifest"])
            uri = artifact_uri(open_store(request.store_uri), manifest.kind, manifest.fingerprint)
            session.finish(manifest, uri=uri, history=event["history"], time_ms=event["time"])
            _log_lineage(session, manifest, uri)
        case "fail":
            session.fail(event["message"], time_ms=event["time"])
        case other:
            raise AssertionError(f"unknown event {other!r} in the spool")


def _log_lineage(session: MlflowSession, manifest: Manifest, uri: str) -> None:
    """Draw where the artifact came from, on the pipeline run; so a run that stops early has its graph, too."""
    try:
        graph = ancestors_of_unpublished(manifest, uri)
    except StageError as error:
        logger.warning("no lineage graph of %s: %s", uri, error.message)
        return
    with tempfile.TemporaryDirectory() as scratch:
        for ending, text in (("svg", to_svg(graph)), ("json", to_json(graph)), ("md", to_markdown(graph))):
            path = Path(scratch) / f"{manifest.stage.value}.{ending}"
            path.write_text(text, encoding="utf-8")
            session.log_file(path, f"lineage/{path.name}", parent=True)


def replay(store: Store, run_id: str) -> list[str]:
    """Deliver what stages of a run left undelivered; return the keys that are still waiting."""
    waiting = []
    for key in [key for key in store.list(f"runs/{run_id}") if key.endswith(f"/{SPOOL_NAME}")]:
        request, events = read_spool(store, key)
        problem = deliver(MlflowSession(request, connect()), request, _numbered(events))
        if problem is None:
            store.delete(key)
            logger.info("%s was delivered to MLflow", key)
        else:
            waiting.append(key)
            logger.warning("%s waits for MLflow: %s", key, problem)
    return waiting


def record_hit(request: StageRequest, artifact: ArtifactRef) -> None:
    """Note on the pipeline run that a stage hit, so that its lineage is complete; a failure is a warning.

    One HTTP request instead of the client library, whose import would take longer than the rest of a hit.
    """
    base = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not base.startswith("http") or request.run.parent_run_id is None:
        return
    record = {
        "hit": True,
        "uri": artifact.uri,
        "fingerprint": artifact.fingerprint,
        "mlflow_run_id": artifact.mlflow_run_id,
    }
    body = {"run_id": request.run.parent_run_id, "key": stage_tag(request.stage.value), "value": json.dumps(record)}
    call = urllib.request.Request(
        f"{base.rstrip('/')}/api/2.0/mlflow/runs/set-tag",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    if authorization := _authorization():
        call.add_header("Authorization", authorization)
    try:
        with urllib.request.urlopen(call, timeout=5):
            pass
    except OSError as error:  # URLError and HTTPError are OSErrors
        logger.warning("MLflow was not told that stage %s hit: %s", request.stage.value, error)


def _authorization() -> str:
    """The two ways of MLflow's own client to authenticate, from the same variables."""
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return f"Bearer {token}" if token else ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m stages.tracking",
        description="Deliver to MLflow what stages of a run could not deliver themselves.",
    )
    parser.add_argument("run_id", help="run id as it is spelled under runs/ in the store")
    parser.add_argument("--store", default=os.environ.get("ARTIFACT_STORE", ""), help="root of the object store")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)-7s %(message)s", stream=sys.stdout)
    try:
        if not options.store:
            raise ConfigError(
                "no store given", advice="Set ARTIFACT_STORE or give --store file:///folder or s3://bucket/prefix."
            )
        return 1 if replay(open_store(options.store), options.run_id) else 0
    except StageError as error:
        sys.stderr.write(f"error: {error.message}\n{error.advice}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
