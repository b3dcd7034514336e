"""Relays a job's log into the task log: each line once, without colour codes, progress made readable.

Ray's tail always starts at the first byte, so after a reconnect the lines already shown are skipped by counting.
Lines written by stages.job.logs are shown as text, without run, stage and try, because the task log belongs to those.
A flood is cut: a note says how many lines are left out, and the last lines of a job are always shown.
"""

import json
import re
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from stages.config.heard import position, quiet_seconds, seconds_left
from stages.config.text import duration

PROGRESS = "ATHANOR_PROGRESS "
MLFLOW_RUN = "ATHANOR_MLFLOW_RUN "
MAX_LINE = 4000
LINES_PER_SECOND = 100.0
LINES_AT_ONCE = 2000
"""Lines that a job may show in a burst, such as those written while no triggerer ran."""
SHORTAGE = "waiting for capacity: "
"""Of a line by which `stages.job.workers` says that the workers find no room."""
_KEPT_LINES = 40
"""Last lines of a flood, shown if the job ends in it: they usually have the reason."""

_ORIGIN = re.compile(r" \[run=\S* stage=\S*(?: try=\d+)?(?: rank=(\d+))?\](?= |$)")
"""How stages.job.logs ends a line; Ray may append how often other processes logged the same."""
_JSON_LINE = re.compile(r"\{\"time\": \".*\}")
_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
_SHOWN_ALREADY = {"run", "stage", "done", "total", "unit", "rate", "rate_unit", "eta_seconds", "at"}


class LogRelay:
    """Feed it pieces of the log; it hands complete lines to `show`.

    `seen` counts the lines taken so far, hidden ones too. `settled` counts those shown, or counted in a note about
    lines left out; pass it as `skip` to continue after a restart.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        *,
        skip: int = 0,
        progress_seconds: float = 10.0,
        lines_per_second: float = LINES_PER_SECOND,
        lines_at_once: int = LINES_AT_ONCE,
        on_mlflow_run: Callable[[dict[str, Any]], None] = lambda run: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.seen = self.settled = skip
        self.mlflow_run: dict[str, Any] | None = None
        self.progress: dict[str, Any] | None = None
        self.shortages = 0
        """Lines that told of a job whose workers wait for room."""
        self._show = show
        self._on_mlflow_run = on_mlflow_run
        self._progress_seconds = progress_seconds
        self._progress_shown_at = float("-inf")
        self._clock, self._wall_clock = clock, wall_clock
        self._position = 0
        self._partial = ""
        self._rate, self._burst = lines_per_second, lines_at_once
        self._allowance, self._allowed_at = float(lines_at_once), clock()
        self._omitted = 0
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)

    @property
    def burst(self) -> float:
        """Lines shown recently beyond the sustained rate."""
        return max(0.0, self._burst - self._allowance - (self._clock() - self._allowed_at) * self._rate)

    def restart(self) -> None:
        """The log starts again at its first byte."""
        self._position, self._partial = 0, ""

    def feed(self, text: str) -> None:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._take(line)

    def finish(self, whole: str) -> None:
        """Take what is still missing from the complete log, including a last line without a newline."""
        self.restart()
        self.feed(whole if whole.endswith("\n") or not whole else f"{whole}\n")
        self._end_flood(last_lines=True)

    def _take(self, line: str) -> None:
        self._position += 1
        if self._position <= self.seen:
            return
        self.seen = self._position
        line = _ANSI.sub("", line).rstrip("\r").rsplit("\r", 1)[-1]
        if PROGRESS in line:
            self._take_progress(line)
        elif MLFLOW_RUN in line:
            self._take_mlflow_run(line)
        else:
            self.shortages += SHORTAGE in line
            self._take_text(_readable(line))
        if not self._omitted:
            self.settled = self.seen

    def _take_text(self, line: str) -> None:
        if len(line) > MAX_LINE:
            line = f"{line[:MAX_LINE]} … ({len(line) - MAX_LINE} more characters)"
        now = self._clock()
        self._allowance = min(self._burst, self._allowance + (now - self._allowed_at) * self._rate)
        self._allowed_at = now
        # In a flood, wait until a second's worth may be shown instead of letting single lines through.
        if self._allowance < (min(self._rate, self._burst) if self._omitted else 1):
            self._omitted += 1
            self._kept.append(line)
            return
        if self._omitted:
            self._end_flood(last_lines=False)
        self._allowance -= 1
        self._show(line)

    def _end_flood(self, *, last_lines: bool) -> None:
        kept = list(self._kept) if last_lines else []
        if left_out := self._omitted - len(kept):
            self._show(
                f"… {left_out} lines are left out here: more than {self._rate:g} a second. "
                "Ray's log of the job has them all."
            )
        for line in kept:
            self._show(line)
        self._omitted = 0
        self._kept.clear()
        self.settled = self.seen

    def _take_progress(self, line: str) -> None:
        progress = _json_after(PROGRESS, line)
        numbers = [] if progress is None else [progress.get("done"), progress.get("total")]
        if progress is None or not all(isinstance(number, int | float) for number in numbers):
            self._show(line[:MAX_LINE])
            return
        self.progress = progress
        now, finished = self._clock(), progress["done"] >= progress["total"]
        if finished or now - self._progress_shown_at >= self._progress_seconds:
            self._progress_shown_at = now
            self._show(readable_progress(progress, now=self._wall_clock()))

    def _take_mlflow_run(self, line: str) -> None:
        run = _json_after(MLFLOW_RUN, line)
        if run is None or "run_id" not in run:
            self._show(line[:MAX_LINE])
            return
        self.mlflow_run = run
        self._on_mlflow_run(run)


def _readable(line: str) -> str:
    """A line of stages.job.logs in either format without its run and stage; other lines as they are."""
    if (found := _JSON_LINE.search(line)) and (entry := _object(found[0])) and "message" in entry:
        rank = f" [rank={entry['rank']}]" if "rank" in entry else ""
        first, *rest = str(entry["message"]).split("\n")
        rest += str(entry["exception"]).split("\n") if "exception" in entry else []
        shown = f"{entry['time']} {entry.get('level', ''):<7} {entry.get('logger', '')}: {first}{rank}"
        return "\n".join([line[: found.start()] + shown + line[found.end() :], *rest])
    return _ORIGIN.sub(lambda origin: f" [rank={origin[1]}]" if origin[1] else "", line)


def readable_progress(progress: dict[str, Any], *, now: float = 0.0) -> str:
    """`pretrain 120/500 steps (24 %), 7800 tokens/s, 1 min 03 s left, loss 4.2`; what was said long before `now` (in
    seconds since 1970) is marked as such."""
    parts = [f"{progress.get('stage', 'progress')} {position(progress)}"]
    if progress.get("rate"):
        parts.append(f"{progress['rate']:.4g} {progress.get('rate_unit', '')}".rstrip())
    if left := seconds_left(progress, now=now):
        parts.append(f"{duration(left)} left")
    parts.extend(f"{name} {_short(value)}" for name, value in progress.items() if name not in _SHOWN_ALREADY)
    if quiet := quiet_seconds(progress, now=now):
        parts.append(f"reported {duration(quiet)} ago")
    return ", ".join(parts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _json_after(marker: str, line: str) -> dict[str, Any] | None:
    return _object(line.split(marker, 1)[1])


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
