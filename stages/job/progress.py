"""How far a stage is and what it spent: a marked line in the job's log for Airflow, records in the store for the rest.

The job's process writes `progress.json`, each training worker a `workers/<rank>.json`. A thread writes them about once
a second, so a slow store never slows the work. They continue the record of the previous attempt, so the cost of an
attempt that was killed still counts. Without progress for `stall_seconds` the watchdog ends the process.
"""

import json
import logging
import resource
import threading
import time

from pydantic import ConfigDict, Field

from stages.artifacts.addresses import run_key
from stages.artifacts.store import Store, write_json
from stages.config.base import Config
from stages.config.errors import EXIT_CODES, Category, ConfigError, DataError
from stages.config.graph import Stage
from stages.config.heard import JOB_RECORD, REPORTS
from stages.config.records import parse_record
from stages.config.request import Cost, Failure
from stages.job.watchdog import Watchdog

MARKER = "ATHANOR_PROGRESS"
_WORKERS = "workers"
_INTERVAL_SECONDS = 1.0
_FOLLOWERS_INTERVAL_SECONDS = 15.0
"""Of workers other than the first, whose records are read for their cost only."""

logger = logging.getLogger(__name__)


class ProgressRecord(Config):
    """What is read of `progress.json` and `workers/<rank>.json`; the rest of it is for people."""

    model_config = ConfigDict(extra="ignore")

    done: float | None = None
    total: float = 0.0
    unit: str = "step"
    at: float | None = None
    """When it was reported, in seconds since 1970; the record itself is written again and again."""
    reached: dict[str, float] = Field(default_factory=dict)
    """How far any attempt has come, by phase."""
    cost: Cost | None = None


def read_record(store: Store, key: str) -> ProgressRecord:
    """Read one record; empty when there is none. A damaged one is named and counts as none: the work continues."""
    try:
        return parse_record(ProgressRecord, store.read_bytes(key), f"{store.root_uri}/{key}")
    except FileNotFoundError:
        return ProgressRecord()
    except (ConfigError, DataError) as error:  # the key holds a run id, which another record may have made up
        logger.warning("%s. What it says about progress and cost is ignored.", error.message)
        return ProgressRecord()


def read_progress(store: Store, run_id: str, stage: Stage) -> ProgressRecord:
    """Return the latest report of the process that does the work: the first worker, else the job; empty before there is
    one."""
    for name in REPORTS:
        found = read_record(store, run_key(run_id, stage, name))
        if found.done is not None:
            return found
    return ProgressRecord()


class Progress:
    """Call it with `done` and `total` as often as you like; it prints and writes at most once a second."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        stage: Stage,
        *,
        record: str | None = JOB_RECORD,
        num_gpus: float = 0.0,
        stall_seconds: float = 0.0,
    ) -> None:
        """`record=None` only prints."""
        self._store, self._run_id, self._stage, self._record = store, run_id, stage, record
        self._failure_key = run_key(run_id, stage, "failure.json")
        self.watchdog = Watchdog(stall_seconds, on_stall=self._record_stall)
        self._num_gpus = num_gpus
        # as the previous attempt left it
        earlier = read_record(store, self._key) if record else ProgressRecord()
        self._before = earlier.cost or Cost(attempts=0)
        self._reached = earlier.reached
        self._productive = 0.0
        self._started = self._advanced_at = time.monotonic()
        self._latest: dict[str, object] = {}
        self._printed_at = 0.0
        self._first: tuple[float, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_until_stopped, name="progress", daemon=True)
        if record:
            self._thread.start()

    def begin(self) -> None:
        """The work begins: the time before, imports and loading, does not count as productive."""
        self._advanced_at = time.monotonic()

    def __call__(self, done: float, total: float, unit: str = "step", **numbers: float | str) -> None:
        """Report the position; give `rate` and `rate_unit`, else the rate of `unit` since the first call is used."""
        self.watchdog.beat()
        now = time.monotonic()
        self._count(done, f"{unit} {numbers.get('phase', '')}".rstrip(), now)
        if self._first is None or done < self._first[1]:
            self._first = (now, done)
        seconds, units = now - self._first[0], done - self._first[1]
        pace = units / seconds if seconds > 0 else 0.0
        eta = (total - done) / pace if pace > 0 else None
        self._latest = {
            "run": self._run_id,
            "stage": self._stage.value,
            "done": done,
            "total": total,
            "unit": unit,
            "rate": round(pace, 3),
            "rate_unit": f"{unit}s/s",
            "eta_seconds": None if eta is None else round(eta, 1),
            "at": round(time.time(), 1),
            **{name: round(value, 5) if isinstance(value, float) else value for name, value in numbers.items()},
        }
        if now - self._printed_at >= _INTERVAL_SECONDS or done >= total:
            self._printed_at = now
            print(MARKER, json.dumps(self._latest), flush=True)  # noqa: T201 - the job's log is the channel

    def cost(self) -> Cost:
        """Return what all attempts have spent so far, training workers included."""
        job = self._own_cost()
        records = self._store.list(run_key(self._run_id, self._stage, _WORKERS))
        workers = [read_record(self._store, key).cost for key in records]
        processes = (job, *filter(None, workers))
        return job.model_copy(
            update={
                "productive_seconds": round(sum(cost.productive_seconds for cost in processes), 3),
                "cpu_seconds": round(sum(cost.cpu_seconds for cost in processes), 3),
                "peak_memory_bytes": max(cost.peak_memory_bytes for cost in processes),
            }
        )

    def _count(self, done: float, phase: str, now: float) -> None:
        """The time since the last report was productive if no attempt has been this far before."""
        if done > self._reached.get(phase, 0.0):
            self._reached = {**self._reached, phase: done}  # a copy, because the thread may be writing the old one
            self._productive += now - self._advanced_at
        self._advanced_at = now

    def _own_cost(self) -> Cost:
        usage, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.monotonic() - self._started
        return Cost(
            wall_seconds=round(self._before.wall_seconds + wall, 3),
            productive_seconds=round(self._before.productive_seconds + self._productive, 3),
            cpu_seconds=round(
                self._before.cpu_seconds + usage.ru_utime + usage.ru_stime + children.ru_utime + children.ru_stime, 3
            ),
            gpu_seconds=round(self._before.gpu_seconds + wall * self._num_gpus, 3),
            # The maximum, not the sum: a forked child counts its parent's pages as its own.
            peak_memory_bytes=max(self._before.peak_memory_bytes, usage.ru_maxrss * 1024, children.ru_maxrss * 1024),
            attempts=self._before.attempts + 1,
        )

    def close(self) -> None:
        self.watchdog.close()
        if not self._record:
            return
        self._stop.set()
        self._thread.join(timeout=10)
        self._write()

    @property
    def _key(self) -> str:
        assert self._record
        return run_key(self._run_id, self._stage, self._record)

    def _record_stall(self, silent: float) -> int:
        """Write failure.json for a process that hangs and return its exit code. The store may hang as well, so the
        write gets ten seconds in a thread of its own."""
        where = self._latest and f" after {self._latest['unit']} {self._latest['done']:g} of {self._latest['total']:g}"
        failure = Failure(
            category=Category.STALLED,
            message=f"{self._stage.value} made no progress for {silent:.0f} s{where or ''}.",
            advice="The stacks of all threads are in the job's log. The retry resumes from the newest checkpoint; "
            f"raise execution.{self._stage.value}.stall_seconds if nothing hangs and the stage is that slow.",
        )
        logger.error("%s %s", failure.message, failure.advice)
        writer = threading.Thread(
            target=write_json, args=(self._store, self._failure_key, failure.model_dump(mode="json")), daemon=True
        )
        writer.start()
        writer.join(timeout=10)
        return EXIT_CODES[Category.STALLED]

    def _write_until_stopped(self) -> None:
        leads = self._record in REPORTS
        while not self._stop.wait(_INTERVAL_SECONDS if leads else _FOLLOWERS_INTERVAL_SECONDS):
            self._write()

    def _write(self) -> None:
        try:
            record = {**self._latest, "reached": self._reached, "cost": self._own_cost().model_dump()}
            write_json(self._store, self._key, record)
        except Exception as error:  # noqa: BLE001 - whatever the store's client raises, the work continues
            logger.warning("progress was not written: %s", error)
