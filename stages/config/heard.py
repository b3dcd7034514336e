"""How far a stage says that it is, and how long ago it said so: what is old is shown as old, without a time of arrival.

For the dictionaries that `stages.job.progress` prints and stores. They tell when they were made (`at`), by the clock of
the machine that did the work, so differences below QUIET_SECONDS may be those of two clocks.
"""

from collections.abc import Mapping
from typing import Any

from stages.config.text import duration

JOB_RECORD = "progress.json"
"""Of the job's own process, in the folder of its run and stage."""
QUIET_SECONDS = 30.0
"""A stage reports about once a second, and each step of a large model takes no longer than this as a rule."""


def worker_record(rank: int) -> str:
    """Name of a training worker's record."""
    return f"workers/{rank}.json"


REPORTS = (worker_record(0), JOB_RECORD)
"""Where to look for progress, in this order: the first worker does the work, where there are workers."""


def quiet_seconds(progress: Mapping[str, Any], *, now: float) -> float:
    """Seconds since the report was made, at a time in seconds since 1970; 0 while they are few or unknown."""
    at = _number(progress.get("at"))
    quiet = 0.0 if at is None else now - at
    return quiet if quiet > QUIET_SECONDS else 0.0


def seconds_left(progress: Mapping[str, Any], *, now: float) -> float | None:
    """The estimate as it stands now; None when there is none, or when its time is over."""
    eta, done, total = (_number(progress.get(name)) for name in ("eta_seconds", "done", "total"))
    if eta is None or (done is not None and total is not None and done >= total):
        return None
    left = eta - quiet_seconds(progress, now=now)
    return left if left > 0 else None


def position(progress: Mapping[str, Any]) -> str:
    """`120/500 steps (24 %)`; empty when there was no report yet."""
    done, total = _number(progress.get("done")), _number(progress.get("total"))
    if done is None or total is None:
        return ""
    percent = f" ({100 * done / total:.0f} %)" if total else ""
    return f"{done:g}/{total:g} {progress.get('unit', 'step')}s{percent}"


def standing(progress: Mapping[str, Any], *, now: float) -> str:
    """`120/500 steps (24 %), 3 min 20 s left`, or how long nothing was heard."""
    left, quiet = seconds_left(progress, now=now), quiet_seconds(progress, now=now)
    parts = [position(progress) or "no progress reported yet"]
    if left is not None:
        parts.append(f"{duration(left)} left")
    if quiet:
        parts.append(f"nothing heard for {duration(quiet)}")
    return ", ".join(parts)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
