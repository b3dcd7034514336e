"""The background thread that takes a stage's events from its spool to MLflow."""

import json
import logging
import threading
import time

from stages.artifacts.addresses import open_store, run_key
from stages.artifacts.store import Store
from stages.config.errors import DataError, StageError
from stages.config.graph import GRAPH
from stages.config.request import StageRequest
from stages.tracking.client import MLFLOW_RUN_MARKER, connect
from stages.tracking.delivery import Delivery, Origin, numbered, replay, settle
from stages.tracking.events import FileEvent, MetricsEvent
from stages.tracking.session import MlflowSession
from stages.tracking.spool import SPOOL_NAME, Spool, read_spool, set_aside_whole
from stages.tracking.trouble import explain

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 2.0
_IMPORT_GRACE_SECONDS = 15.0
_MAX_BACKOFF_SECONDS = 30.0


class Deliverer(threading.Thread):
    """Takes events from the spool to MLflow, in order, until the process ends."""

    def __init__(self, request: StageRequest, spool: Spool) -> None:
        super().__init__(name="mlflow", daemon=True)
        self._request, self._spool = request, spool
        self._wake = threading.Event()
        self._delivered = threading.Condition()
        self._is_draining = self._is_abandoned = self._is_hopeless = False
        self.may_import = threading.Event()
        self.attached = threading.Event()
        self.session: MlflowSession | None = None
        self.delivery: Delivery | None = None
        self.problem = ""

    def run(self) -> None:
        try:
            spec = GRAPH[self._request.stage]
            if spec.trains or spec.frozen_models:  # its libraries are loading; MLflow's would slow them down
                self.may_import.wait(_IMPORT_GRACE_SECONDS)
            # one warning of ours instead of one from urllib3 for every attempt
            logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
            self.session = MlflowSession(self._request, connect())
            origin = Origin(open_store(self._request.store_uri), self._spool.folder)
            self.delivery = Delivery(self.session, self._request, origin)
            self._deliver_until_abandoned(self.session, self.delivery)
        except Exception as error:  # a bug in tracking must not end a stage that works; its traceback is logged
            self.problem = f"{type(error).__name__}: {error}"
            logger.exception("tracking in MLflow stopped; the stage continues")

    def drain(self, seconds: float) -> bool:
        """Wait until everything is delivered; False when it is not within `seconds`, when a person must act first, or
        when the thread has died."""
        self._is_draining, self._is_hopeless = True, False
        self.may_import.set()
        self._wake.set()
        deadline = time.monotonic() + seconds
        with self._delivered:
            while not (self._is_done or self._is_hopeless) and self.is_alive() and time.monotonic() < deadline:
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

    def _deliver_until_abandoned(self, session: MlflowSession, delivery: Delivery) -> None:
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
                problem = delivery.deliver(self._spool.next_events(), self._spool.acknowledge)
            else:
                problem = self._attach(session, delivery)
                delay = 0.0
            if problem:
                backoff = min(max(1.0, 2 * backoff), _MAX_BACKOFF_SECONDS)
                delay = 1.0 if self._is_draining else backoff
                self._report_outage(problem, lasts=delivery.problem_lasts)
                self._is_hopeless = delivery.problem_lasts
            else:
                backoff = 0.0
                self._report_recovery()
                with self._delivered:
                    self._delivered.notify_all()
                if self._is_draining and not self._spool.is_delivered:
                    delay = 0.0

    def _attach(self, session: MlflowSession, delivery: Delivery) -> str | None:
        """Deliver the start event, then what earlier attempts left, before anything of this attempt."""
        problem = delivery.deliver(self._spool.next_events(limit=1), self._spool.acknowledge)
        if problem or session.run_id is None:
            return problem or "the start of this stage could not be read from the spool"
        ids = {"run_id": session.run_id, "experiment_id": session.experiment_id}
        print(MLFLOW_RUN_MARKER, json.dumps(ids), flush=True)  # noqa: T201 - the job's log is the channel to Airflow
        try:
            self._take_up_leftovers(session, delivery.origin.store)
        except (StageError, OSError) as error:
            logger.warning("what earlier attempts left for MLflow waits in the store: %s", explain(error))
        self.attached.set()
        return None

    def _report_outage(self, problem: str, *, lasts: bool) -> None:
        if lasts and problem != self.problem:
            logger.error("MLflow takes nothing of this stage; metrics wait in a spool file, it goes on: %s", problem)
        elif not self.problem:
            logger.warning("MLflow does not answer; metrics wait in a spool file, the stage goes on: %s", problem)
        self.problem = problem

    def _report_recovery(self) -> None:
        if self.problem:
            logger.info("MLflow answers again; waiting events were delivered")
        self.problem = ""

    def _take_up_leftovers(self, session: MlflowSession, store: Store) -> None:
        """Deliver what earlier attempts left in the store; closing stages, which run alone, do so for the whole run."""
        run = self._request.run
        own = run_key(run.run_id, self._request.stage, SPOOL_NAME)
        if store.exists(own):
            try:
                left = read_spool(store, own)
            except DataError as error:
                set_aside_whole(store, own, error.message)
            else:
                measured = [event for event in left.events if isinstance(event, MetricsEvent | FileEvent)]
                delivery = Delivery(session, self._request, Origin(store))
                if delivery.deliver(numbered(measured)) is None:
                    settle(store, own, left, delivery)
        if GRAPH[self._request.stage].closing:
            replay(store, run.run_id, run=run)
