"""From records to MLflow: what becomes of each event, and the later delivery of what a stage had to leave."""

import base64
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.artifacts.addresses import artifact_key, artifact_uri
from stages.artifacts.manifests import load_manifest
from stages.artifacts.store import Store
from stages.config import mlflow_limits as limits
from stages.config.errors import DamagedArtifactError, DataError, StageError
from stages.config.graph import GRAPH
from stages.config.request import Manifest, RunInfo, StageRequest
from stages.lineage.graph import ancestors_of_unpublished
from stages.lineage.views import to_json, to_markdown, to_svg
from stages.tracking.client import connect
from stages.tracking.events import Event, FailEvent, FileEvent, FinishEvent, MetricsEvent, StartEvent, to_line
from stages.tracking.session import MlflowSession, Point
from stages.tracking.spool import (
    SPOOL_NAME,
    LeftSpool,
    Refused,
    attached,
    read_spool,
    set_aside,
    set_aside_whole,
    write_spool,
)
from stages.tracking.trouble import Trouble, explain, is_unreachable, trouble_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where events come from: the spool of this process, or one that lies in the store, which others can write to."""

    store: Store
    folder: Path | None = None
    """Of this process's spool, with its attachments; None for a spool in the store."""


class Delivery:
    """Events of one stage on their way to MLflow, and what MLflow did not take of them."""

    def __init__(self, session: MlflowSession, request: StageRequest, origin: Origin) -> None:
        self._session, self._request, self.origin = session, request, origin
        self._refused: list[Refused] = []
        self._fingerprint = ""
        self.problem_lasts = False
        """The last problem is one that a person must solve; waiting for it is in vain."""
        self.postponed: list[FileEvent] = []
        """Files that MLflow's storage did not take while MLflow itself answers."""

    def refused(self) -> list[Refused]:
        """Return what MLflow did not take, each once."""
        taken = [*self._refused, *self._session.refused]
        self._refused.clear()
        self._session.refused.clear()
        return taken

    def deliver(
        self, events: Iterable[tuple[Event, int]], acknowledge: Callable[[int], None] = lambda position: None
    ) -> str | None:
        """Deliver events in order, metrics together; return the problem when MLflow takes none at present.

        What MLflow refuses for good is left out and told, so that it does not hold up the rest.
        """
        from mlflow.exceptions import MlflowException

        for group in _grouped(events):
            event = group[0][0]
            try:
                self._deliver_group([event for event, _ in group])
            except DataError as error:  # the record itself is wrong
                self._refuse(event, error.message)
            except (MlflowException, OSError, StageError) as error:
                trouble = trouble_of(error)
                self.problem_lasts = trouble is Trouble.LASTING
                if trouble is not Trouble.REFUSAL or isinstance(event, StartEvent):
                    return explain(error)
                self._refuse(event, explain(error))
                if isinstance(event, FinishEvent):
                    self._session.end(time_ms=event.time)
            acknowledge(group[-1][1])
        return None

    def _refuse(self, event: Event, reason: str) -> None:
        logger.error("MLflow does not get an event of type %s: %s", event.type, reason)
        self._refused.append(Refused(to_line(event).decode(), reason))

    def _deliver_group(self, group: list[Event]) -> None:
        event, session = group[0], self._session
        if session.run_id is None and not isinstance(event, StartEvent):
            raise DataError(f"an event of type {event.type} came before the start of its stage")
        match event:
            case StartEvent():
                self._fingerprint = event.fingerprint
                session.attach(fingerprint=event.fingerprint, params=event.params, tags=event.tags, time_ms=event.time)
            case MetricsEvent():
                session.log_points(
                    Point(limits.key(key), value, one.step, one.time)
                    for one in group
                    if isinstance(one, MetricsEvent)
                    for key, value in one.values.items()
                )
            case FileEvent():
                self._deliver_file(event)
            case FinishEvent():
                manifest, uri = self._finished(event.manifest)
                session.finish(manifest, uri=uri, history=event.history, time_ms=event.time)
                _log_lineage(session, manifest, uri)
            case FailEvent():
                session.fail(event.message, time_ms=event.time)

    def _deliver_file(self, event: FileEvent) -> None:
        content = attached(event, self.origin.folder)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "content"
            path.write_bytes(content)
            try:
                self._session.log_file(path, event.name, parent=event.parent)
            except Exception as error:
                if is_unreachable(error):
                    raise
                whole = {"attachment": None, "content": base64.b64encode(content).decode()}
                kept = event.model_copy(update=whole)
                if trouble_of(error) is Trouble.REFUSAL:
                    self._refuse(kept, explain(error))
                    return
                logger.error("MLflow's storage did not take %s, the rest is logged: %s", event.name, explain(error))
                self.postponed.append(kept)

    def _finished(self, manifest: Manifest) -> tuple[Manifest, str]:
        """Return the manifest to tell of, and its address.

        A process knows what it made. Of a spool in the store only the name of the artifact is believed: what it is
        stands in the store, where it was published after the event was written.
        """
        spec, store = GRAPH[self._request.stage], self.origin.store
        uri = artifact_uri(store, spec.kind, manifest.fingerprint)
        if self.origin.folder is not None:
            return manifest, uri
        if (manifest.stage, manifest.kind, manifest.fingerprint) != (spec.stage, spec.kind, self._fingerprint):
            raise DataError(f"the stage that began did not make {manifest.kind}/{manifest.fingerprint}")
        try:
            published = load_manifest(store, artifact_key(spec.kind, manifest.fingerprint))
        except FileNotFoundError:
            raise DataError(f"{uri} was never published, or it was removed") from None
        except DamagedArtifactError as error:
            raise DataError(error.message) from None
        if published.digest != manifest.digest:
            raise DataError(f"{uri} was published by another attempt, with other content")
        return published, uri


def _grouped(events: Iterable[tuple[Event, int]]) -> Iterator[list[tuple[Event, int]]]:
    """Neighbouring metrics in one group, everything else alone."""
    group: list[tuple[Event, int]] = []
    for event, position in events:
        if group and not (isinstance(event, MetricsEvent) and isinstance(group[-1][0], MetricsEvent)):
            yield group
            group = []
        group.append((event, position))
    if group:
        yield group


def numbered(events: Iterable[Event]) -> list[tuple[Event, int]]:
    return [(event, number) for number, event in enumerate(events)]


def _log_lineage(session: MlflowSession, manifest: Manifest, uri: str) -> None:
    """Draw where the artifact came from, on the pipeline run; so a run that stops early has its graph, too."""
    try:
        graph = ancestors_of_unpublished(manifest, uri)
    except (StageError, OSError, ValueError) as error:
        logger.warning("no lineage graph of %s: %s", uri, explain(error))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for ending, text in (("svg", to_svg(graph)), ("json", to_json(graph)), ("md", to_markdown(graph))):
            path = Path(scratch) / f"{manifest.stage.value}.{ending}"
            path.write_text(text, encoding="utf-8")
            try:
                session.log_file(path, f"lineage/{path.name}", parent=True)
            except Exception as error:
                if is_unreachable(error):
                    raise
                logger.warning("the lineage graph of %s is not in MLflow: %s", uri, explain(error))
                return


def replay(store: Store, run_id: str, *, run: RunInfo | None = None) -> list[str]:
    """Deliver what stages of a run left undelivered; return the keys that are still waiting.

    `run` is what Airflow says of the run, where it is known; otherwise each spool says it. One spool that cannot be
    delivered does not hold up the others.
    """
    keys = [key for key in store.list(f"runs/{run_id}") if key.endswith(f"/{SPOOL_NAME}")]
    if not keys:
        return []
    client, waiting = connect(), []
    for key in keys:
        try:
            problem = _replay_one(store, key, run, client)
        except (OSError, StageError) as error:
            problem = explain(error)
        if problem is not None:
            waiting.append(key)
            logger.warning("%s waits for MLflow: %s", key, problem)
    return waiting


def _replay_one(store: Store, key: str, run: RunInfo | None, client: "MlflowClient") -> str | None:
    try:
        left = read_spool(store, key)
    except DataError as error:
        set_aside_whole(store, key, error.message)
        return None
    request = left.request.model_copy(update={"run": run or left.request.run})
    delivery = Delivery(MlflowSession(request, client, is_live=False), request, Origin(store))
    problem = delivery.deliver(numbered(left.events))
    if problem is not None:
        return problem
    settle(store, key, left, delivery)
    if delivery.postponed:
        return f"{len(delivery.postponed)} files were not taken by MLflow's storage"
    logger.info("%s was delivered to MLflow", key)
    return None


def settle(store: Store, key: str, left: LeftSpool, delivery: Delivery) -> None:
    """Leave of a spool that was delivered only the files that MLflow's storage did not take; at no moment are they
    nowhere."""
    set_aside(store, key, [*left.refused, *delivery.refused()])
    if delivery.postponed:
        start = [event for event in left.events if isinstance(event, StartEvent)][-1:]
        write_spool(store, key, left.request, [*start, *delivery.postponed])
    else:
        store.delete(key)
