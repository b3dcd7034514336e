"""Which guards of a training warned or stopped it, when and why."""

from collections.abc import Mapping
from typing import Any

from stages.config.graph import trained_stages
from stages.config.guards import PREFIX
from stages.reporting.figures import Figure, figure_data
from stages.reporting.line_plot import Series, line_plot
from stages.reporting.story import Story
from stages.reporting.tables import Table, num, text

_WORDS = {"warn": "warned", "stop": "stopped the training"}


def guards_table(story: Story) -> Table | None:
    """A row for each guard and what came of it; None for a run whose trainings had no guards."""
    rows, notes = [], []
    for spec in trained_stages():
        manifest = story.manifests.get(spec.role)
        guards = manifest.ledger.get("guards") if manifest is not None else None
        if manifest is None or not isinstance(guards, Mapping):
            continue
        events = guards.get("events") or []
        for event in events:
            rows.append(
                (
                    text(f"{spec.label}: {event['guard']}"),
                    text(_WORDS.get(event["level"], event["level"])),
                    num(event["step"]),
                    num(event["times"]),
                    num(event["value"]),
                    num(event["limit"]),
                    text(event["why"]),
                )
            )
        if not events:
            rows.append((text(f"{spec.label}: all"), text("neither warned nor stopped"), *[text("")] * 5))
        if guards.get("stopped"):
            made = manifest.ledger.get("steps")
            taken = manifest.ledger.get("model_step", made)
            notes.append(f"{spec.label} ended after step {made}; its model is that of step {taken}.")
    head = ("guard", "what it did", "first at step", "times", "measured", "limit", "why")
    return Table("Guards", head, tuple(rows), " ".join(notes)) if rows else None


def figures(story: Story) -> list[Figure]:
    """What each guard measured over the steps of its training."""
    found = []
    for spec in trained_stages():
        history = story.histories.get(spec.role) or []
        for key in sorted({key for row in history for key in row if _is_measure(key)}):
            title = f"{spec.label} guard {key.removeprefix(PREFIX)}"
            found.append(_figure(title, key, history))
    return [figure for figure in found if figure is not None]


def _is_measure(key: str) -> bool:
    return key.startswith(PREFIX) and not key.endswith(("_level", "_step"))


def _figure(title: str, key: str, history: list[dict[str, Any]]) -> Figure | None:
    points = tuple((float(row["step"]), float(row[key])) for row in history if row.get(key) is not None)
    svg = line_plot([Series("measured", points, 1)], label=title)
    return Figure(title, svg, (("measured", 1),), figure_data(title, ("step", "measured"), points)) if svg else None
