"""From the spool to MLflow: the background thread of a stage, and the later delivery of what it had to leave."""

import base64
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stages.artifacts.addresses import artifact_uri, open_store, run_key
from stages.artifacts.store import Store
from stages.config.errors import StageError
from stages.config.graph import GRAPH
from stages.config.request import Manifest, StageRequest
from stages.lineage.graph import ancestors_of_unpublished
from stages.lineage.views import to_json, to_markdown, to_svg
from stages.tracking.client import MLFLOW_RUN_MARKER, REFUSALS, connect, explain, metric_key
from stages.tracking.session import MlflowSession, Point
from stages.tracking.spool import SPOOL_NAME, Event, Spool, read_spool

_FLUSH_SECONDS = 2.0
_IMPORT_GRACE_SECONDS = 15.0
_MAX_BACKOFF_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Deliverer(threading.Thread):
    """Takes events from the spool to MLflow, in order, until the process ends."""

    def __init__(self, request: StageRequest, spool: Spool) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._request, self._spool = request, spool
        self._wake = threading.Event()
        self._delivered = threading.Condition()
        self._is_draining = self._is_abandoned = False
        self.may_import = threading.Event()
        self.attached = threading.Event()
        self.session: MlflowSession | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            spec = GRAPH[self._request.stage]
            if spec.trains or spec.frozen_models:  # its libraries are loading; MLflow's would slow them down
                self.may_import.wait(_IMPORT_GRACE_SECONDS)
            # one warning of ours instead of one from urllib3 for every attempt
            logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
            self.session = MlflowSession(self._request, connect())
            self._deliver_until_abandoned(self.session)
        except Exception as error:  # a bug in tracking must not end a stage that works; its traceback is logged
            self.problem = f"{type(error).__name__}: {error}"
            logger.exception("tracking in MLflow stopped; the stage continues")

    def drain(self, seconds: float) -> bool:
        """Wait until everything is delivered; False when it is not within `seconds` or the thread has died."""
        self._is_draining = True
        self.may_import.set()
        self._wake.set()
        deadline = time.monotonic() + seconds
        with self._delivered:
            while not self._is_done and self.is_alive() and time.monotonic() < deadline:
                self._delivered.wait(min(0.2, max(0.0, deadline - time.monotonic())))
        self._is_draining = False
        return self._is_done

    @property
    def _is_done(self) -> bool:
        return self._spool.is_delivered and self.attached.is_set()

    def abandon(self) -> None:
        """Deliver nothing more: what is left is delivered from the spool in the store."""
        self._is_abandoned = True
        self._wake.set()

    def _deliver_until_abandoned(self, session: MlflowSession) -> None:
        backoff = delay = 0.0
        while True:
            self._wake.wait(delay)
            self._wake.clear()
            if self._is_abandoned:
                return
            delay = _FLUSH_SECONDS
            if self._spool.is_delivered:
                continue
            if self.attached.is_set():
                problem = deliver(session, self._request, self._spool.next_events(), self._spool.acknowledge)
            else:
                problem = self._attach(session)
                delay = 0.0
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

    def _attach(self, session: MlflowSession) -> str | None:
        """Deliver the start event, then what earlier attempts left, before anything of this attempt."""
        problem = deliver(session, self._request, self._spool.next_events(limit=1), self._spool.acknowledge)
        if problem:
            return problem
        ids = {"run_id": session.run_id, "experiment_id": session.experiment_id}
        print(MLFLOW_RUN_MARKER, json.dumps(ids), flush=True)  # noqa: T201 - the job's log is the channel to Airflow
        self._take_up_leftovers(session)
        self.attached.set()
        return None

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
        if GRAPH[self._request.stage].closing:
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
        event = group[0][0]
        try:
            _deliver_group(session, request, [event for event, _ in group])
        except MlflowException as error:
            if error.error_code not in REFUSALS or event["type"] == "start":
                return explain(error)
            logger.error("MLflow refused an event of type %s, it is dropped: %s", event["type"], error)
            if event["type"] == "finish":
                session.end(time_ms=event["time"])
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
                Point(metric_key(key), value, event["step"], event["time"])
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
