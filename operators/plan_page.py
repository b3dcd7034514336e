"""The plan as people read it: lines of equal columns for the task log, Markdown for MLflow."""

from collections.abc import Sequence

from operators.plan import Plan, StagePlan, Verdict
from stages.config.graph import GRAPH
from stages.config.markdown import plain, table
from stages.config.text import byte_size, compact, duration

_HEADINGS = ("stage", "plan", "parameters", "tokens", "FLOPs", "memory a worker", "time", "cost")
_UNKNOWN = "unknown"


def as_table(plan: Plan) -> list[str]:
    """Return lines for the log: the table, then why, stage by stage."""
    rows = _rows(plan)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_title(plan)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines += _models(plan)
    return lines + [line for stage in plan.stages for line in _notes(stage)] + [*plan.remarks, total(plan)]


def as_markdown(plan: Plan) -> str:
    """Return a page; reasons name settings and addresses, which whoever triggers a run may choose."""
    header, *rows = ([plain(cell) for cell in row] for row in _rows(plan))
    notes = [f"- {plain(line)}" for stage in plan.stages for line in _notes(stage)]
    notes += [f"- {plain(line)}" for line in plan.remarks]
    models = [f"- {plain(line)}" for line in _models(plan)]
    given = ["## Given models", "", *models, ""] if models else []
    return "\n".join(
        [f"# {plain(_title(plan))}", "", table(header, rows), "", total(plan), "", *given, "## Why", "", *notes, ""]
    )


def _models(plan: Plan) -> list[str]:
    """What is known of each given model, and what will probably go wrong with it."""
    return [
        line for facts in plan.models for line in (facts.summary(), *(f"WARNING: {text}" for text in facts.warnings))
    ]


def _title(plan: Plan) -> str:
    return f"Plan of recipe {plan.recipe}" + (", and nothing else: this is a dry run" if plan.dry_run else "")


def _rows(plan: Plan) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [_HEADINGS, *map(_row, plan.stages)]
    priced = any(stage.estimate and stage.estimate.cost is not None for stage in plan.stages)
    return rows if priced else [row[:-1] for row in rows]


def _row(stage: StagePlan) -> Sequence[str]:
    took = stage.estimate
    if took is None:
        return (stage.stage.value, stage.verdict.value, "", "", "", "", "", "")
    trains = took.flops is not None or took.tokens is not None
    return (
        stage.stage.value,
        stage.verdict.value,
        compact(took.parameters) if took.parameters is not None else (_UNKNOWN if trains else ""),
        compact(took.tokens) if took.tokens is not None else "",
        compact(took.flops) if took.flops is not None else (_UNKNOWN if trains else ""),
        byte_size(took.memory_bytes) if took.memory_bytes is not None else _UNKNOWN,
        duration(took.seconds) if took.seconds is not None else _UNKNOWN,
        f"{took.cost:.2f}" if took.cost is not None else _UNKNOWN,
    )


def _notes(stage: StagePlan) -> list[str]:
    basis = f" ({'; '.join(stage.estimate.basis)})" if stage.estimate and stage.estimate.basis else ""
    return [f"{stage.stage.value}: {stage.verdict.value}, {stage.why}{basis}"]


def waits(plan: Plan) -> str:
    """Say which stage will wait for a slot of the pool while others have it; empty when none of them runs."""
    heavy = [stage.stage for stage in plan.stages if GRAPH[stage.stage].heavy and stage.verdict is not Verdict.HIT]
    if not heavy:
        return ""
    return (
        f"Other runs have jobs on the cluster. Unless the pool `gpu` has another free slot, {heavy[0].value} waits at "
        "`queued` until they end"
    )


def total(plan: Plan) -> str:
    """Time of what runs, one stage after the other; what hits if nothing changed is left out."""
    running = [stage for stage in plan.stages if stage.verdict in (Verdict.RUN, Verdict.UNKNOWN)]
    times = [stage.estimate.seconds for stage in running if stage.estimate]
    known = [seconds for seconds in times if seconds is not None]
    missing = f", and what {len(times) - len(known)} of them take is unknown" if len(known) < len(times) else ""
    costs = [stage.estimate.cost for stage in running if stage.estimate and stage.estimate.cost is not None]
    price = f", cost {sum(costs):.2f}" if costs else ""
    return f"{len(running)} of {len(plan.stages)} stages run: {duration(sum(known))}{missing}{price}."
