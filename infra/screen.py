"""Shows a run: as a live table in a terminal, otherwise as one plain line per event."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.run_state import Row, Snapshot
from stages.config.decision_table import ARROWS, label_of
from stages.config.evaluation import CHAMPION_ROLE, REWARD_SUITE, SuiteResult, SuiteScore
from stages.config.graph import language_models
from stages.config.text import duration, one_line, printable

PLAIN_EVERY_SECONDS = 15.0
WAITING_EVERY_SECONDS = 60.0
STYLES = {
    "built": "green",
    "hit": "cyan",
    "success": "green",
    "running": "yellow",
    "deferred": "yellow",
    "awaiting_input": "bold magenta",
}
STYLES |= {"failed": "bold red", "upstream_failed": "red", "up_for_retry": "magenta", "skipped": "dim"}
WORDS = {
    "none": "waiting",
    "scheduled": "queued",
    "deferred": "running",
    "success": "done",
    "up_for_retry": "retrying",
    "awaiting_input": "waits for you",
}


class Screen(Protocol):
    """Takes snapshots until the run ends."""

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None): ...
    def show(self, snapshot: Snapshot) -> None: ...


def duration_of(seconds: float | None) -> str:
    """Empty while it is unknown."""
    return "" if seconds is None else duration(seconds)


def word(row: Row) -> str:
    return "running" if row.works else WORDS.get(row.state, row.state.replace("_", " "))


def rate(progress: Mapping[str, Any]) -> str:
    value = progress.get("rate")
    if not isinstance(value, int | float):
        return ""
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} {progress.get('rate_unit', '')}".strip()


def heard(row: Row) -> str:
    """What stands in place of a rate and numbers that nobody has confirmed for a while."""
    return f"nothing heard for {duration(row.quiet)}" if row.works and row.quiet else ""


def shown_lines(snapshot: Snapshot) -> list[str]:
    """Names of runs and DAGs are what others chose."""
    return [printable(line) for line in snapshot.waiting.lines]


def open_screen(console: Console) -> Screen:
    return LiveScreen(console) if console.is_terminal else PlainScreen(console)


class LiveScreen:
    """One table, redrawn in place."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._live.stop()

    def show(self, snapshot: Snapshot) -> None:
        table = Table(box=None, header_style="dim")
        for name, justify in (("stage", "left"), ("state", "left"), ("", "left"), ("%", "right")):
            table.add_column(name, justify=justify, no_wrap=True)  # pyright: ignore[reportArgumentType]
        for name in ("rate", "ETA", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("now", no_wrap=True, overflow="ellipsis")
        for row in snapshot.rows:
            if row.needs_a_line:
                table.add_row(*self._cells(row))
        elapsed = Text(f"{duration(time.monotonic() - self._begin)} so far", style="dim")
        waiting = [Text(line, style="yellow", overflow="fold") for line in shown_lines(snapshot)]
        self._live.update(Group(table, *waiting, elapsed))

    def _cells(self, row: Row) -> list[Any]:
        fraction = row.fraction
        bar = "" if fraction is None and not row.works else ProgressBar(total=1.0, completed=fraction or 0.0, width=18)
        return [
            row.name,
            Text(word(row), style=STYLES.get(row.state, "")),
            bar,
            "" if fraction is None else f"{fraction:.0%}",
            "" if row.quiet else rate(row.progress),
            duration_of(row.left),
            duration_of(row.seconds),
            heard(row) or row.key_metric,
        ]


class PlainScreen:
    """For logs and pipes: a line when a task changes its state, and every 15 s one for each running task."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._states: dict[str, str] = {}
        self._said_at: dict[str, float] = {}
        self._reason, self._reason_said_at = "", float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def show(self, snapshot: Snapshot) -> None:
        for row in snapshot.rows:
            now = time.monotonic()
            known = self._states.get(row.name, "waiting")
            changed = word(row) != known
            due = row.works and now - self._said_at.get(row.name, now) > PLAIN_EVERY_SECONDS
            if changed or (due and row.fraction is not None):
                self._console.print(self._line(row), markup=False, highlight=False, soft_wrap=True)
                self._said_at[row.name] = now
            self._states[row.name] = word(row)
        self._say_waiting(snapshot)

    def _say_waiting(self, snapshot: Snapshot) -> None:
        """Why nothing happens: when the reason changes, and once a minute, since those who hold a slot get on."""
        now, reason = time.monotonic(), snapshot.waiting.reason
        if reason and (reason != self._reason or now - self._reason_said_at > WAITING_EVERY_SECONDS):
            for line in shown_lines(snapshot):
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._reason_said_at = now
        self._reason = reason

    def _line(self, row: Row) -> str:
        parts = [f"{row.name:<10} {word(row):<9}"]
        if row.works and row.fraction is not None:
            eta = duration_of(row.left)
            parts += [f"{row.fraction:4.0%}", "" if row.quiet else rate(row.progress), f"ETA {eta}" if eta else ""]
            parts.append(heard(row))
        elif row.seconds is not None and row.state in ("hit", "built", "success", "failed"):
            parts.append(duration_of(row.seconds))
        parts.append("" if heard(row) else row.key_metric)
        return "  ".join(part for part in parts if part)


def summary_table(snapshot: Snapshot) -> Table:
    """Per stage: time of the task and of the job's own work, hit or built, key metric."""
    table = Table(header_style="dim")
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("work", justify="right", style="dim")
    table.add_column("result")
    table.add_column("key metric", overflow="fold")
    for row in (row for row in snapshot.stages if row.state != "upstream_failed"):
        worked = row.result.wall_seconds if row.result and row.state == "built" else None
        table.add_row(
            row.name,
            duration_of(row.seconds) if row.state in ("hit", "built", "failed") else "",
            duration_of(worked),
            Text(word(row), style=STYLES.get(row.state, "")),
            row.key_metric,
        )
    return table


def suites_table(suites: Mapping[str, SuiteResult], *, at_most: int = 8) -> Table | None:
    """What each model got on each suite, with its 95 % interval, as on the report's page; None without any suite.

    Suites with a level of chance come first, and the run's own reward model, which PPO was trained against, last.
    """
    roles = [*(spec.role for spec in language_models()), CHAMPION_ROLE]
    measured = {name: suite for name, suite in suites.items() if suite.roles.keys() & set(roles)}
    shown = [role for role in roles if any(role in suite.roles for suite in measured.values())]
    if not shown:
        return None
    order = sorted(measured, key=lambda name: _place(name, measured[name]))
    left = len(order) - at_most
    more = f"; {left} more suites are in the report" if left > 0 else ""
    caption = f"with 95 % intervals; green is better than chance{more}"
    table = Table(box=None, header_style="dim", caption=caption, caption_justify="left")
    table.add_column("suite", overflow="fold")
    for role in shown:
        table.add_column(label_of(role), justify="right")
    for name in order[:at_most]:
        suite = measured[name]
        title = f"{name}, {suite.metric}{ARROWS[suite.better]}"
        table.add_row(Text(printable(title)), *(_score_cell(suite, suite.roles.get(role)) for role in shown))
    return table


def _place(name: str, suite: SuiteResult) -> int:
    return 2 if name == REWARD_SUITE or not suite.better else int(suite.chance is None)


def _score_cell(suite: SuiteResult, score: SuiteScore | None) -> Text:
    if score is None or score.value is None:
        return Text("–")
    interval = "" if score.low is None or score.high is None else f" [{score.low:.3g}, {score.high:.3g}]"
    return Text(f"{score.value:.3g}{interval}", style="green" if suite.is_above_chance(score) else "")


def gate_lines(snapshot: Snapshot) -> list[str]:
    """How many checks the gates made, and which of them a person let pass."""
    records = [row.gate for row in snapshot.gates if row.gate is not None]
    if not records:
        return []
    checks = sum(len(record.checks) for record in records)
    failures = sum(len(record.failures) for record in records)
    lines = [f"{len(records)} gates: {checks} checks, {failures} failed"]
    return lines + [
        printable(f"  {record.stage.value} is passed over: {check.in_words()}")
        for record in records
        if record.override
        for check in record.failures
    ]


def samples_panels(samples: Sequence[Mapping[str, Any]], *, count: int = 3) -> list[Panel]:
    """Prompts with the answer of every model of the run."""
    panels = []
    for sample in samples[:count]:
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for model, response in sample["responses"].items():
            table.add_row(str(model), Text(_shortened(str(response))))
        panels.append(Panel(table, title=Text(_shortened(sample["prompt"], 200)), title_align="left"))
    return panels


def _shortened(text: str, limit: int = 400) -> str:
    text = one_line(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
