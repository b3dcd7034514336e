"""What MLflow learns about one stage, synchronously; `stages.tracking.tracker` runs it in a thread of its own.

Surprising on purpose: every method may be repeated after a lost answer. What exists is looked up first, and metric
points carry the time at which they were measured, by which MLflow recognises a repeated one. What MLflow refuses for
good is left out alone and listed in `refused`: one bad value never costs the others.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from stages.config import mlflow_limits as limits
from stages.config.graph import GRAPH
from stages.config.request import ArtifactRef, Manifest, StageRequest
from stages.lineage.tags import input_tags, is_dataset, is_model, lineage_tags, slug
from stages.tracking.client import (
    clean_tags,
    dataset_input,
    find_model,
    find_or_create_experiment,
    log_file,
    model_name,
    stage_tag,
    tag_filter,
)
from stages.tracking.spool import Refused
from stages.tracking.trouble import Trouble, explain, trouble_of
from stages.tracking.writer import Writer

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

logger = logging.getLogger(__name__)

_PARENT_TAG = "mlflow.parentRunId"


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time_ms` is when it was measured."""

    key: str
    value: float
    step: int
    time_ms: int


@dataclass
class _Logged:
    """The points that MLflow already has, so that an attempt that resumes at an earlier step logs none twice."""

    steps: dict[str, set[int]] = field(default_factory=dict)
    latest: dict[str, Point] = field(default_factory=dict)

    def has(self, point: Point) -> bool:
        return point.step in self.steps.get(point.key, ())

    def add(self, point: Point) -> None:
        self.steps.setdefault(point.key, set()).add(point.step)
        if point.key not in self.latest or point.step >= self.latest[point.key].step:
            self.latest[point.key] = point


class MlflowSession:
    """The MLflow side of one stage: `attach` first, then metrics and files, then `finish` or `fail`."""

    def __init__(self, request: StageRequest, client: "MlflowClient", *, is_live: bool = True) -> None:
        """`is_live=False` where the stage is over and only its records are delivered: its run is not RUNNING."""
        self._request, self._client = request, client
        self._is_live = is_live
        self._writer = Writer(client)
        self._logged = _Logged()
        self._fingerprint = ""
        self.experiment_id = ""
        self.parent_run_id: str | None = None
        self.run_id: str | None = None
        self.model_id: str | None = None

    def attach(self, *, fingerprint: str, params: Mapping[str, str], tags: Mapping[str, str], time_ms: int) -> None:
        """Find this stage's child run or create it; retries of the stage share one run, told apart by try number."""
        request, self._fingerprint = self._request, fingerprint
        self.experiment_id = find_or_create_experiment(self._client, request.run.experiment)
        self.parent_run_id = self._claimed_parent() or self._find_or_create_parent(time_ms)
        edges = input_tags(request.inputs, ())
        identity = {"lineage.stage": request.stage.value, "lineage.fingerprint": fingerprint}
        all_tags = self._writer.fitting({**edges, **tags, **identity, "athanor.run_id": request.run.run_id})
        if commit := tags.get("git.commit"):
            all_tags["mlflow.source.git.commit"] = commit
        run = self._find_run(identity)
        if run is None:
            run = self._client.create_run(
                self.experiment_id,
                start_time=time_ms,
                run_name=request.stage.value,
                tags={**all_tags, _PARENT_TAG: self.parent_run_id},
            )
            if not self._is_live:  # unless a record says how it ended
                self._client.set_terminated(run.info.run_id, "KILLED", end_time=time_ms)
            known_params: dict[str, str] = {}
        else:
            known_params = run.data.params
            if self._is_live:
                self._client.update_run(run.info.run_id, status="RUNNING")
            self._log_batch(run.info.run_id, tags=all_tags)
            self._remember(run.info.run_id, run.data.metrics)
        run_id = run.info.run_id
        self._log_params(run_id, params, known_params)
        self._log_inputs(run_id)
        if GRAPH[request.stage].trains:
            with self._writer.attempt("the model of this run"):
                self.model_id = self._find_or_create_model(run_id, all_tags).model_id
        self.run_id = run_id

    @property
    def refused(self) -> list[Refused]:
        """What MLflow did not take so far; whoever keeps it elsewhere clears the list."""
        return self._writer.refused

    def log_points(self, points: Iterable[Point]) -> None:
        """Log the points that MLflow does not have yet."""
        new = [point for point in points if not self._logged.has(point)]
        for start in range(0, len(new), limits.METRICS_PER_CALL):
            part = new[start : start + limits.METRICS_PER_CALL]
            self._log_batch(self._known_run(), points=part)
            for point in part:
                self._logged.add(point)

    def log_file(self, path: Path, name: str, *, parent: bool) -> None:
        """Store a file as artifact `name` of the child run or of the parent."""
        run_id = self.parent_run_id if parent else self.run_id
        if run_id is None:
            raise AssertionError("log_file before attach")
        log_file(self._client, run_id, path, name)

    def finish(self, manifest: Manifest, *, uri: str, history: str, time_ms: int) -> None:
        """Log what is known only at the end, make the model READY, and end the run.

        `history` (JSON lines of step and metrics, which checkpoints carry) fills in what a killed attempt had measured
        but not delivered.
        """
        run_id = self._known_run()
        self._log_batch(run_id, tags=self._writer.fitting(lineage_tags(manifest, uri)))
        self._log_source_inputs(run_id, manifest)
        self._fill_in(history, time_ms)
        final = self._final_points(manifest)
        if is_model(manifest.kind):
            self._finish_model(manifest, uri, final)
        else:
            self._log_batch(run_id, points=final)
        self._writer.keep_shortened(run_id)
        self.end(time_ms=time_ms)
        if self.parent_run_id:
            record = {"hit": False, "uri": uri, "fingerprint": manifest.fingerprint, "mlflow_run_id": run_id}
            with self._writer.attempt("the entry on the pipeline run", even_lasting=True):
                self._client.set_tag(self.parent_run_id, stage_tag(manifest.stage.value), json.dumps(record))

    def end(self, *, time_ms: int) -> None:
        """Set the run FINISHED, whatever else MLflow refused."""
        self._client.set_terminated(self._known_run(), "FINISHED", end_time=time_ms)

    def fail(self, message: str, *, time_ms: int) -> None:
        """End the run FAILED; the next attempt sets it RUNNING again."""
        run_id = self._known_run()
        self._client.set_terminated(run_id, "FAILED", end_time=time_ms)
        self._log_batch(run_id, tags=self._writer.fitting({"athanor.failure": message}))
        self._writer.keep_shortened(run_id)
        if self.model_id:
            with self._writer.attempt("the end of the model"):
                self._client.finalize_logged_model(self.model_id, "FAILED")

    def _known_run(self) -> str:
        if self.run_id is None:
            raise AssertionError("the MLflow session was used before attach")
        return self.run_id

    def _claimed_parent(self) -> str | None:
        """Return the pipeline run that the request names, if it is there and is of this run: what a request in the
        store says may have been written to reach another run."""
        from mlflow.exceptions import MlflowException

        run = self._request.run
        if run.parent_run_id is None:
            return None
        try:
            found = self._client.get_run(run.parent_run_id)
        except MlflowException as error:
            if trouble_of(error) is Trouble.OUTAGE:
                raise
            logger.warning("MLflow's run %s, the pipeline run, is not used: %s", run.parent_run_id, explain(error))
            return None
        is_ours = found.data.tags.get("athanor.run_id") == run.run_id and _PARENT_TAG not in found.data.tags
        if is_ours and found.info.experiment_id == self.experiment_id and found.info.lifecycle_stage == "active":
            return run.parent_run_id
        logger.warning(
            "MLflow's run %s is not the pipeline run of %s, or it was deleted", run.parent_run_id, run.run_id
        )
        return None

    def _find_run(self, tags: Mapping[str, str]) -> "Run | None":
        wanted = {**tags, "athanor.run_id": self._request.run.run_id}
        found = self._client.search_runs(
            [self.experiment_id], tag_filter(wanted), order_by=["attributes.start_time ASC"]
        )
        return found[0] if found else None

    def _find_or_create_parent(self, time_ms: int) -> str:
        """For a pipeline run that started while MLflow was down: the first stage that reaches it makes the parent."""
        run = self._request.run
        found = self._client.search_runs([self.experiment_id], tag_filter({"athanor.run_id": run.run_id}))
        airflow = clean_tags({"airflow.dag_id": run.dag_id, "airflow.run_id": run.airflow_run_id})
        for candidate in found:
            known = candidate.data.tags
            # Before folders had names of their own, runs of other DAGs and with similar ids shared the first tag.
            if "lineage.stage" not in known and all(known.get(key, value) == value for key, value in airflow.items()):
                return candidate.info.run_id
        tags = {"athanor.run_id": run.run_id, **airflow}
        created = self._client.create_run(
            self.experiment_id, start_time=time_ms, run_name=run.name, tags=clean_tags(tags)
        )
        return created.info.run_id

    def _remember(self, run_id: str, keys: Iterable[str]) -> None:
        for key in keys:
            for metric in self._client.get_metric_history(run_id, key):
                self._logged.add(Point(key, metric.value, metric.step, metric.timestamp))

    def _log_params(self, run_id: str, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        """Params in MLflow are immutable, so an attempt adds missing ones only and logs what differs."""
        from mlflow.entities import Param

        given = self._writer.fitting_params(params)
        for key in sorted(given.keys() & known.keys()):
            if given[key] != known[key]:
                logger.info("MLflow keeps the first attempt's %s=%s, this attempt has %s", key, known[key], given[key])
        self._writer.log_items(run_id, [Param(key, value) for key, value in given.items() if key not in known])

    def _log_inputs(self, run_id: str) -> None:
        from mlflow.entities import LoggedModelInput

        datasets = [
            dataset_input(ref.kind, ref.uri, ref.digest, context=role)
            for role, ref in self._request.inputs.items()
            if is_dataset(ref.kind)
        ]
        model_ids = dict.fromkeys(self._model_id_of(ref) for ref in self._request.inputs.values() if is_model(ref.kind))
        models = [LoggedModelInput(model_id) for model_id in model_ids if model_id]
        self._writer.log_inputs(run_id, [*datasets, *models])

    def _model_id_of(self, ref: ArtifactRef) -> str | None:
        model = find_model(self._client, self.experiment_id, ref.fingerprint)
        return model.model_id if model else ref.mlflow_model_id

    def _log_source_inputs(self, run_id: str, manifest: Manifest) -> None:
        sources = [
            dataset_input(slug(source.uri), source.uri, source.digest, context="source") for source in manifest.sources
        ]
        self._writer.log_inputs(run_id, sources)

    def _find_or_create_model(self, run_id: str, tags: Mapping[str, str]) -> "LoggedModel":
        found = find_model(self._client, self.experiment_id, self._fingerprint, source_run_id=run_id)
        return found or self._client.create_logged_model(
            self.experiment_id,
            name=model_name(self._request.run.name, self._request.stage.value),
            source_run_id=run_id,
            tags={**tags, "mlflow.model.isExternal": "true"},
            model_type=self._request.stage.value,
        )

    def _fill_in(self, history: str, time_ms: int) -> None:
        points = []
        for line in history.splitlines():
            try:
                values = json.loads(line)
                step = int(values.pop("step"))
                numbers = {limits.key(key): float(value) for key, value in values.items() if _is_number(value)}
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                self._writer.refuse(line, f"not a line of a history: {type(error).__name__}")
                continue
            points.extend(Point(key, value, step, time_ms) for key, value in numbers.items())
        missing = {point.key for point in points if not self._logged.has(point)}
        self._remember(self._known_run(), missing)  # a worker process may have logged to this run as well
        self.log_points(points)

    def _final_points(self, manifest: Manifest) -> list[Point]:
        """Metrics and cost at the last logged step; a value that is already the latest is not repeated."""
        step = max((point.step for point in self._logged.latest.values()), default=0)
        made = int(datetime.fromisoformat(manifest.created_at).timestamp() * 1000)
        cost = {f"cost/{key}": float(value) for key, value in manifest.cost.model_dump().items()}
        points = []
        for name, value in {**manifest.metrics, **cost}.items():
            key = limits.key(name)
            latest = self._logged.latest.get(key)
            points.append(latest if latest and _same(latest.value, value) else Point(key, value, step, made))
        return points

    def _finish_model(self, manifest: Manifest, uri: str, final: list[Point]) -> None:
        from mlflow.entities import LoggedModelOutput

        run_id, model_id = self._known_run(), self.model_id
        if model_id is None:  # MLflow refused to make it, which is noted; the run has its numbers all the same
            self._log_batch(run_id, points=final)
            return
        with self._writer.attempt("the tags of the model"):
            self._client.set_logged_model_tags(model_id, self._writer.fitting(lineage_tags(manifest, uri)))
        self._log_batch(run_id, points=final, model_id=model_id)
        with self._writer.attempt("the end of the model"):
            self._client.finalize_logged_model(model_id, "READY")
        outputs = self._client.get_run(run_id).outputs
        # A second log_outputs of the same model is refused by MLflow, so a re-attached run looks first.
        if not outputs or model_id not in [output.model_id for output in outputs.model_outputs]:
            step = max((point.step for point in final), default=0)
            with self._writer.attempt("the model as output of the run"):
                self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])

    def _log_batch(
        self,
        run_id: str,
        *,
        points: Iterable[Point] = (),
        tags: Mapping[str, str] | None = None,
        model_id: str | None = None,
    ) -> None:
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(
                point.key,
                point.value,
                timestamp=point.time_ms,
                step=point.step,
                model_id=model_id,
                run_id=run_id if model_id else None,
            )
            for point in points
        ]
        self._writer.log_items(run_id, [*metrics, *(RunTag(key, value) for key, value in (tags or {}).items())])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
