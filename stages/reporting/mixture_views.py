"""What the report says about sources: which gave how much, why rows were left out, and how training mixed them."""

from collections.abc import Mapping
from typing import Any

from stages.config.graph import trained_stages
from stages.reporting.line_plot import number
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, num, shown, text


def reasons(lost: Mapping[str, float]) -> str:
    """`empty response 3, tool role 1`, the commonest first."""
    ordered = sorted(lost.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason.replace('_', ' ')} {number(count)}" for reason, count in ordered if count) or "–"


def sources_table(story: Story) -> Table | None:
    """Given sources of conversations and pairs, as curate read them."""
    manifest = story.manifests.get("curated")
    rows: list[tuple[Cell, ...]] = []
    for part in ("instructions", "preferences", "unpaired"):
        found = ((manifest.ledger.get(part) or {}).get("sources") if manifest else None) or {}
        for source, account in found.items():
            rows.append(
                (
                    text(source),
                    text(f"{part}: {', '.join(account['formats']) or '–'}"),
                    num(account["in"]),
                    num(account["kept"], share=account["kept"] / account["in"] if account["in"] else 0.0),
                    text(reasons(account["dropped"])),
                    text(reasons(account["changed"])),
                )
            )
    head = ("source", "read as", "in", "kept", "dropped", "changed")
    return Table("Given sources", head, tuple(rows)) if rows else None


def mixture_table(story: Story) -> Table | None:
    """Which source gave which share of training, asked and realised."""
    rows: list[tuple[Cell, ...]] = []
    for spec in trained_stages():
        manifest = story.manifests.get(spec.role)
        mixture = (manifest.ledger.get("mixture") if manifest else None) or {}
        sources: Mapping[str, Mapping[str, Any]] = mixture.get("sources") or {}
        for source, share in sources.items() if len(sources) > 1 else ():
            rows.append(
                (
                    text(f"{spec.label}: {source}"),
                    shown(_percent(share["asked"])),
                    shown(_percent(share["realised"]), share=share["realised"]),
                    text(mixture["unit"]),
                    num(share["examples"]),
                    num(share["distinct"]),
                    num(share["epochs"]),
                    num(share["target_tokens"]),
                )
            )
    head = ("source", "asked", "realised", "of", "examples trained", "distinct", "passes", "tokens trained")
    note = "Without a weight, sources are trained on as often as their rows are there."
    return Table("Mixture of sources in training", head, tuple(rows), note) if rows else None


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"
