"""What the report says about gates: which let the run go on, which did not, and who let one pass that failed."""

from dataclasses import dataclass
from typing import Any

from stages.config.graph import GRAPH
from stages.config.nested import dotted
from stages.reporting.line_plot import number
from stages.reporting.shapes import GateFound
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, code, shown, text

_FAILED = "failed"


@dataclass(frozen=True)
class GateView:
    """One gate with all that it compared; open on the page when it failed."""

    name: str
    summary: str
    failed: bool
    checks: Table
    tables: tuple[Table, ...]

    @property
    def is_open(self) -> bool:
        return self.failed


def _in_order(story: Story) -> list[tuple[str, GateFound]]:
    order = [stage.value for stage in GRAPH]
    return sorted(story.gates.items(), key=lambda found: order.index(found[0]) if found[0] in order else len(order))


def gates_table(story: Story) -> Table | None:
    """One row for each gate of the run."""
    if not story.gates:
        return None
    rows = []
    for stage, gate in _in_order(story):
        failures = [check for check in gate.checks if check.outcome == _FAILED]
        worst = "; ".join(f"{check.name}: {check.found}, allowed: {check.allowed}" for check in failures)
        by = gate.override
        rows.append(
            (
                text(stage),
                Cell(gate.outcome, is_best=gate.outcome == "passed", is_worst=gate.outcome == _FAILED),
                shown(str(sum(check.outcome == "passed" for check in gate.checks))),
                shown(str(len(failures))),
                shown(str(sum(check.outcome == "skipped" for check in gate.checks))),
                text(worst or "–"),
                text(f"{by.by or 'an unnamed user'}: {by.reason}" if by else "–"),
                text(gate.at.replace("T", " ")[:16]),
            )
        )
    head = ("gate after", "outcome", "passed", "failed", "skipped", "what failed", "let pass by", "at (UTC)")
    return Table("Gates of the run", head, tuple(rows), "As recorded in the run's folder of the store.")


def gate_checks(story: Story) -> list[GateView]:
    """Every gate with its checks."""
    return [_view(stage, gate) for stage, gate in _in_order(story)]


def _view(stage: str, gate: GateFound) -> GateView:
    rows = tuple(
        (
            code(check.name),
            Cell(check.outcome, is_best=check.outcome == "passed", is_worst=check.outcome == _FAILED),
            text(check.found or "–"),
            text(check.allowed or "–"),
            text(check.advice or "–"),
        )
        for check in gate.checks
    )
    count = {outcome: sum(check.outcome == outcome for check in gate.checks) for outcome in ("failed", "passed")}
    tables = [_numbers(name, found) for name, found in gate.tables.items()]
    return GateView(
        name=f"After {stage}",
        summary=", ".join(f"{many} {outcome}" for outcome, many in count.items() if many) or "no checks",
        failed=gate.outcome == _FAILED,
        checks=Table(f"Checks after {stage}", ("check", "outcome", "found", "allowed", "what to do"), rows),
        tables=tuple(table for table in tables if table),
    )


def _numbers(name: str, found: Any) -> Table | None:
    """Numbers by group, such as a reward model's accuracy by source: rows of equal keys as a table, others flat."""
    caption = name.replace("_", " ").capitalize()
    if isinstance(found, dict) and found and all(isinstance(row, dict) for row in found.values()):
        keys = list(dict.fromkeys(key for row in found.values() for key in row))
        rows = tuple((text(label), *(_value(row.get(key)) for key in keys)) for label, row in found.items())
        return Table(caption, ("", *(str(key).replace("_", " ") for key in keys)), rows)
    if isinstance(found, list) and found and all(isinstance(row, dict) for row in found):
        keys = list(dict.fromkeys(key for row in found for key in row))
        rows = tuple(tuple(_value(row.get(key)) for key in keys) for row in found)
        return Table(caption, tuple(str(key).replace("_", " ") for key in keys), rows)
    flat = dotted(found) if isinstance(found, dict) else {}
    rows = tuple((text(key), _value(value)) for key, value in flat.items())
    return Table(caption, ("", "value"), rows) if rows else None


def _value(value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return shown(number(float(value)))
    return text("–" if value is None else value)
