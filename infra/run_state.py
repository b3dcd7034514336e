"""What a pipeline run is doing: task states from Airflow's REST API, progress and results from the object store."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from infra.airflow_api import AirflowApi, AirflowApiError, TaskState
from infra.waiting import Waiting, WaitWatch
from stages.config.errors import DataError
from stages.config.gate_records import GATE_RECORD, GateRecord
from stages.config.gates import gate_name
from stages.config.graph import GRAPH, Stage, gated_stages, pipeline_stages
from stages.config.heard import REPORTS, quiet_seconds, seconds_left
from stages.config.records import Record, parse_object, parse_record
from stages.config.request import Failure, StageResult, run_folder

DAG_ID = "llm_pipeline"
_NUMBERS = frozenset({"done", "total", "rate", "eta_seconds", "at"})
_ASK_AGAIN_SECONDS = 10.0
"""Why a run waits changes slowly, and asking takes several requests."""
_LARGEST_SHOWN = 1e18
ACTIVE = (
    "queued",
    "scheduled",
    "running",
    "deferred",
    "awaiting_input",
    "up_for_retry",
    "up_for_reschedule",
    "restarting",
)


_READY = ("scheduled", "queued")


def task_order() -> tuple[str, ...]:
    """Return the tasks of `llm_pipeline` in the order of the graph; `approve` stands before what it decides about."""
    gates = _gates()
    names = [name for stage in pipeline_stages() for name in (stage.value, gates.get(stage, "")) if name]
    names.insert(names.index(Stage.PROMOTE), "approve")
    return ("resolve", "plan", *names, "close")


def _gates() -> dict[Stage, str]:
    return {stage: gate_name(stage) for stage in gated_stages()}


class Reads(Protocol):
    """The part of an object store that following a run needs."""

    def exists(self, key: str) -> bool: ...
    def read_bytes(self, key: str) -> bytes: ...


@dataclass(frozen=True)
class Row:
    """One task of the run, as the screen shows it."""

    name: str
    state: str
    "Airflow's word for it, or `hit` and `built` for a stage that succeeded."
    seconds: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    result: StageResult | None = None
    failure: Failure | None = None
    gate: GateRecord | None = None
    """The outcome, for a gate."""
    try_number: int = 1
    quiet: float = 0.0
    """Seconds without a report of progress; 0 while they are few, or before the first report."""
    left: float | None = None
    """Seconds until it is done, as far as that is known now."""

    @property
    def needs_a_line(self) -> bool:
        """A gate that waits or is passed is not worth one on a screen that is redrawn."""
        is_quiet = self.state in ("none", "success", "skipped", "scheduled", "queued", "upstream_failed")
        return not (self.name in _gates().values() and is_quiet and not (self.gate and self.gate.override))

    @property
    def works(self) -> bool:
        """Whether it has begun and not ended; after its job has ended, a deferred task is queued once more. An old
        report, such as that of an attempt that was interrupted, says nothing about now."""
        ends = self.state in ("queued", "scheduled") and bool(self.progress) and not self.quiet
        return ends or self.state in ("running", "deferred")

    @property
    def fraction(self) -> float | None:
        """How far, 0 to 1, or None when unknown."""
        if self.state in ("hit", "built", "success"):
            return 1.0
        total = self.progress.get("total")
        return min(1.0, self.progress.get("done", 0) / total) if total else None

    @property
    def key_metric(self) -> str:
        """The most telling numbers of this stage, from its result or, while it runs, from its progress."""
        if self.gate:
            return self.gate.summary()
        if self.result:
            return GRAPH[self.result.stage].summary(self.result.metrics)
        plain = ("stage", "done", "total", "unit", "rate", "rate_unit", "eta_seconds", "at", "cost")
        numbers = [(k, v) for k, v in self.progress.items() if k not in plain and isinstance(v, int | float)]
        return ", ".join(f"{name} {value:.4g}" for name, value in numbers[:2])


@dataclass(frozen=True)
class Snapshot:
    """The run at one moment."""

    state: str
    rows: tuple[Row, ...]
    waiting: Waiting = field(default_factory=Waiting)
    """Why it does not go on; without lines while it does."""

    @property
    def finished(self) -> bool:
        return self.state in ("success", "failed")

    @property
    def stages(self) -> list[Row]:
        return [row for row in self.rows if row.name in pipeline_stages()]

    @property
    def gates(self) -> list[Row]:
        """Those that have decided."""
        return [row for row in self.rows if row.gate is not None]


class RunWatch:
    """Follows one run; results are read once, since they never change."""

    def __init__(self, api: AirflowApi, store: Reads, run_id: str, *, airflow_url: str = "") -> None:
        """`airflow_url` is the address for a browser, where it is another than that of the API."""
        self.api = api
        self.run_id = run_id
        self._store = store
        self._folder = f"runs/{run_folder(DAG_ID, run_id)}"
        self._results: dict[str, StageResult] = {}
        self._passed: dict[str, GateRecord] = {}
        self._waits = WaitWatch(
            api,
            DAG_ID,
            run_id,
            airflow_url=airflow_url or api.url,
            progress=lambda dag_id, run, task: self._progress(f"runs/{run_folder(dag_id, run)}", task),
        )
        self._waiting, self._asked_at = Waiting(), float("-inf")

    def snapshot(self) -> Snapshot:
        # the run's state first: if it says finished, the task states read after it are final
        state = self.api.run_state(DAG_ID, self.run_id)
        tasks = self.api.tasks(DAG_ID, self.run_id)
        place = {name: number for number, name in enumerate(task_order())}
        tasks.sort(key=lambda task: place.get(task.task_id, len(place)))
        rows = tuple(self._row(task) for task in tasks)
        waiting = [task for task, row in zip(tasks, rows, strict=True) if row.state in _READY and not row.works]
        works = any(row.works or row.state == "awaiting_input" for row in rows)
        return Snapshot(state, rows, self._why(state, waiting, works=works))

    def _why(self, state: str, waiting: list[TaskState], *, works: bool) -> Waiting:
        if state != "queued" and not waiting:
            self._waiting, self._asked_at = Waiting(), float("-inf")
        elif time.monotonic() - self._asked_at >= _ASK_AGAIN_SECONDS:
            self._asked_at = time.monotonic()
            self._waiting = self._waits.explain(state, waiting, works=works)
        return self._waiting

    def _row(self, task: TaskState) -> Row:
        state = task.state
        result = failure = gate = None
        progress: dict[str, Any] = {}
        if task.task_id in pipeline_stages():
            if state == "success" and (result := self._result(task.task_id)):
                state = "hit" if result.hit else "built"
            elif state in ACTIVE:
                progress = self._progress(self._folder, task.task_id)
            elif state == "failed":
                failure = self._record(Failure, task.task_id, "failure.json")
        elif task.task_id in _gates().values() and state in ("success", "failed"):
            gate = self._gate(task.task_id, final=state == "success")
            failure = self._record(Failure, task.task_id, "failure.json") if state == "failed" else None
        return Row(
            task.task_id,
            state,
            seconds=_seconds(task),
            progress=progress,
            result=result,
            failure=failure,
            gate=gate,
            try_number=task.try_number,
            quiet=quiet_seconds(progress, now=time.time()),
            left=seconds_left(progress, now=time.time()),
        )

    def _progress(self, folder: str, stage: str) -> dict[str, Any]:
        """What the first training worker reports, else the job."""
        found = (self._reported(f"{folder}/{stage}/{name}") for name in REPORTS)
        return next((report for report in found if "done" in report), {})

    def _reported(self, key: str) -> dict[str, Any]:
        """The numbers and words of a progress record; what is neither cannot be shown."""
        data, name = self._read_key(key), key.rpartition("/")[2]
        try:
            found = parse_object(data, name) if data is not None else {}
        except DataError:
            return {}
        shown = {key: value for key, value in found.items() if isinstance(value, str) or _is_shown_number(value)}
        return {key: value for key, value in shown.items() if key not in _NUMBERS or not isinstance(value, str)}

    def _result(self, stage: str) -> StageResult | None:
        if stage not in self._results and (found := self._record(StageResult, stage, "result.json")):
            self._results[stage] = found
        return self._results.get(stage)

    def _gate(self, task_id: str, *, final: bool) -> GateRecord | None:
        if task_id in self._passed:
            return self._passed[task_id]
        found = self._record(GateRecord, task_id, GATE_RECORD)
        if found and final:
            self._passed[task_id] = found
        return found

    def _record(self, kind: type[Record], stage: str, name: str) -> Record | None:
        """A record of the run; None while there is none, and for a damaged one, of which the task's log tells."""
        data = self._read(stage, name)
        try:
            return None if data is None else parse_record(kind, data, name)
        except DataError:
            return None

    def _read(self, stage: str, name: str) -> bytes | None:
        return self._read_key(f"{self._folder}/{stage}/{name}")

    def _read_key(self, key: str) -> bytes | None:
        try:
            return self._store.read_bytes(key)
        except FileNotFoundError:
            return None

    def parameters(self) -> dict[str, Any]:
        """The RunInfo that `resolve` returned; empty when it failed."""
        try:
            entry = self.api.call(
                "GET", f"{self._path('resolve')}/xcomEntries/return_value", params={"stringify": False}
            )
        except AirflowApiError:
            return {}
        return entry["value"] if isinstance(entry["value"], dict) else {}

    def plan_key(self) -> str | None:
        """Where the store has the plan as a page; None before there is one."""
        key = f"{self._folder}/plan.md"
        return key if self._store.exists(key) else None

    def links(self, task_id: str) -> dict[str, str]:
        """The task's buttons in the Airflow UI: name -> address."""
        found = self.api.call("GET", f"{self._path(task_id)}/links")["extra_links"]
        return {name: url for name, url in found.items() if url}

    def last_errors(self, row: Row, count: int = 3) -> list[str]:
        """The last error messages of a failed task's log, for failures before there was a job."""
        log = self.api.call(
            "GET", f"{self._path(row.name)}/logs/{row.try_number}", headers={"Accept": "application/json"}
        )["content"]
        return errors_of(log)[-count:]

    def _path(self, task_id: str) -> str:
        return f"dags/{DAG_ID}/dagRuns/{self.run_id}/taskInstances/{task_id}"


def errors_of(log: Iterable[object]) -> list[str]:
    """The error messages of a task's log, as Airflow's API returns it."""
    errors = []
    for entry in log:
        if not isinstance(entry, dict) or entry.get("level") not in ("error", "critical"):
            continue
        details = [f"{detail['exc_type']}: {detail['exc_value']}" for detail in entry.get("error_detail") or ()]
        errors.append(details[-1] if details else str(entry.get("event", "")))
    return errors


def _is_shown_number(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST_SHOWN  # NaN is not


def _seconds(task: TaskState) -> float | None:
    if task.started is None:
        return None
    start = datetime.fromisoformat(task.started)
    end = datetime.fromisoformat(task.ended) if task.ended else datetime.fromtimestamp(time.time(), UTC)
    return max(0.0, (end - start).total_seconds())
