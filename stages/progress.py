"""How far a stage is: a marked line in the job's log for Airflow, and `progress.json` in the store for everybody else.

Storage is written from a thread of its own, about once a second, so a slow store never slows the work. The file also
carries the cost so far, which is how the cost of an attempt that was killed is not forgotten. Without progress for
`stall_seconds` the watchdog ends the process.
"""

import json
import logging
import resource
import threading
import time

from stages.artifacts import run_key
from stages.config.errors import EXIT_CODES, Category
from stages.config.graph import Stage
from stages.config.request import Cost, Failure
from stages.store import Store, read_json, write_json
from stages.watchdog import Watchdog

MARKER = "ATHANOR_PROGRESS"
_INTERVAL_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Progress:
    """Call it with `done` and `total`; it rate-limits itself."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        stage: Stage,
        *,
        num_gpus: float = 0.0,
        printed_only: bool = False,
        stall_seconds: float = 0.0,
    ) -> None:
        """`printed_only` is for workers: their lines reach the job's log, its own process writes the file."""
        self._store, self._run_id, self._stage, self._printed_only = store, run_id, stage, printed_only
        self._key = run_key(run_id, stage, "progress.json")
        self._failure_key = run_key(run_id, stage, "failure.json")
        self.watchdog = Watchdog(stall_seconds, on_stall=self._record_stall)
        self._num_gpus = num_gpus
        self._before = self._cost_of_earlier_attempts()
        self._started = time.monotonic()
        self._latest: dict[str, object] = {}
        self._printed_at = 0.0
        self._first: tuple[float, float] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_until_stopped, name="progress", daemon=True)
        if not printed_only:
            self._thread.start()

    def __call__(self, done: float, total: float, unit: str = "step", **numbers: float | str) -> None:
        """Report position; `rate`, `rate_unit` may be given, otherwise the rate of `unit` since the first call is
        used."""
        self.watchdog.beat()
        now = time.monotonic()
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
            **{name: round(value, 5) if isinstance(value, float) else value for name, value in numbers.items()},
        }
        if now - self._printed_at >= _INTERVAL_SECONDS or done >= total:
            self._printed_at = now
            print(MARKER, json.dumps(self._latest), flush=True)  # noqa: T201 - the job's log is the channel

    def cost(self) -> Cost:
        """Return what all attempts have spent so far."""
        usage, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
        wall = time.monotonic() - self._started
        return Cost(
            wall_seconds=round(self._before.wall_seconds + wall, 3),
            cpu_seconds=round(
                self._before.cpu_seconds + usage.ru_utime + usage.ru_stime + children.ru_utime + children.ru_stime, 3
            ),
            gpu_seconds=round(self._before.gpu_seconds + wall * self._num_gpus, 3),
            # Not the sum: a forked child counts its parent's pages as its own.
            peak_memory_bytes=max(self._before.peak_memory_bytes, usage.ru_maxrss * 1024, children.ru_maxrss * 1024),
            attempts=self._before.attempts + 1,
        )

    def close(self) -> None:
        self.watchdog.close()
        if self._printed_only:
            return
        self._stop.set()
        self._thread.join(timeout=10)
        self._write()

    def _cost_of_earlier_attempts(self) -> Cost:
        if not self._store.exists(self._key):
            return Cost(attempts=0)
        return Cost.model_validate(read_json(self._store, self._key)["cost"])

    def _record_stall(self, silent: float) -> int:
        """Leave the last words of a process that hangs, and return its exit code; the store may hang as well."""
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
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._write()

    def _write(self) -> None:
        try:
            write_json(self._store, self._key, {**self._latest, "cost": self.cost().model_dump()})
        except Exception as error:  # noqa: BLE001 - a courtesy: whatever the store's client raises, the work goes on
            logger.warning("progress was not written: %s", error)
