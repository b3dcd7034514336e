"""What the report says about data and means: the ledger with its samples, planted documents, cost, configuration."""

import re
from dataclasses import dataclass
from typing import Any

from stages.config.graph import GRAPH
from stages.config.nested import dotted
from stages.config.request import Cost, Manifest
from stages.config.text import byte_size, duration
from stages.reporting.mixture_views import reasons
from stages.reporting.story import Story
from stages.reporting.tables import Cell, Table, code, num, shown, text, total_row

_OFFENSIVE = re.compile(r"toxic|profan|offens|abus|hate", re.IGNORECASE)


@dataclass(frozen=True)
class Dropped:
    """One reason of loss; samples of offensive documents arrive here masked."""

    step: str
    reason: str
    documents: int
    size: str
    samples: tuple[tuple[str, str], ...]
    """(id, text)."""
    is_masked: bool


@dataclass(frozen=True)
class Account:
    """One ledger: the steps, the reasons, and whether the sums conserve."""

    name: str
    summary: str
    conserves: bool
    steps: Table
    dropped: tuple[Dropped, ...]


def accounts(story: Story) -> list[Account]:
    """The ledgers of `curate`: documents, instructions, preferences, single labelled responses, prompts."""
    manifest = story.manifests.get("curated")
    if manifest is None:
        return []
    found = []
    for name in ("documents", "instructions", "preferences", "unpaired", "prompts"):
        steps = (manifest.ledger.get(name) or {}).get("steps") or []
        if steps:
            found.append(_account(name, steps))
    return found


def _account(name: str, steps: list[dict[str, Any]]) -> Account:
    entered, left = _count(steps[0]["in"]), _count(steps[-1]["kept"])
    lost = sum(_count(amount) for step in steps for amount in step["dropped"].values())
    rows = [
        (
            text(_words(step["step"])),
            num(_count(step["in"])),
            num(sum(_count(amount) for amount in step["dropped"].values())),
            num(_count(step["kept"]), share=_count(step["kept"]) / entered if entered else 0.0),
            shown(byte_size(_size(step["kept"]))),
        )
        for step in steps
    ]
    dropped = [_dropped(step, reason, amount) for step in steps for reason, amount in step["dropped"].items()]
    dropped.sort(key=lambda loss: -loss.documents)
    return Account(
        name=name,
        summary=f"{entered:,} in = {left:,} kept + {lost:,} dropped",
        conserves=entered == left + lost,
        steps=Table(f"{name.capitalize()} step by step", ("step", "in", "dropped", "kept", "bytes kept"), tuple(rows)),
        dropped=tuple(dropped),
    )


def _dropped(step: dict[str, Any], reason: str, amount: Any) -> Dropped:
    all_offensive = bool(_OFFENSIVE.search(step["step"]) or _OFFENSIVE.search(reason))
    samples, is_masked = [], False
    for row in (step.get("samples") or {}).get(reason) or []:
        name, sample = str(row["id"]), str(row["text"])
        # a planted insult that the filter missed shows up under `planted`, and its id tells what it is
        hide = all_offensive or bool(_OFFENSIVE.search(name))
        is_masked |= hide
        samples.append((name, mask(sample) if hide else sample))
    return Dropped(
        step=_words(step["step"]),
        reason=_words(reason),
        documents=_count(amount),
        size=byte_size(_size(amount)),
        samples=tuple(samples),
        is_masked=is_masked,
    )


def mask(offensive: str) -> str:
    """Hide every word and keep its length, so that a reader sees the shape of a text and none of its content."""
    return re.sub(r"\S", "█", offensive)


def _count(amount: Any) -> int:
    return int(amount["documents"] if isinstance(amount, dict) else amount)


def _size(amount: Any) -> int:
    return int(amount.get("bytes", 0)) if isinstance(amount, dict) else 0


def _words(name: str) -> str:
    return name.replace("_", " ")


def planted_table(story: Story) -> Table | None:
    """Labelled documents that were mixed in, and what became of them."""
    manifest = story.manifests.get("curated")
    planted = (manifest.ledger.get("planted") if manifest else None) or {}
    if not planted:
        return None
    rows = tuple(
        (
            text(_words(kind)),
            num(entry.get("planted")),
            num(entry.get("found"), share=(entry.get("found") or 0) / (entry.get("planted") or 1)),
            num(entry.get("missed")),
            num(entry.get("dropped_elsewhere")),
        )
        for kind, entry in planted.items()
    )
    return Table(
        "Planted documents: found and missed",
        ("kind", "planted", "found", "missed", "dropped by another step"),
        rows,
        "Planted documents measure the filters and are never published.",
    )


def tokens_table(story: Story) -> Table | None:
    """The ledger of `tokenize`."""
    manifest = story.manifests.get("tokens")
    if manifest is None or not manifest.ledger:
        return None
    rows = []
    for split, items in manifest.ledger.items():
        for item, counts in items.items() if isinstance(items, dict) else ():
            if not isinstance(counts, dict):
                continue
            lost = {key.removeprefix("dropped."): value for key, value in counts.items() if key.startswith("dropped.")}
            cut = {"cut to fit": counts["cut"]} if counts.get("cut") else {}
            rows.append(
                (
                    text(f"{split} {item}"),
                    num(counts.get("in", counts.get("documents"))),
                    num(counts.get("kept", counts.get("documents"))),
                    num(sum(lost.values())),
                    text(reasons({**lost, **cut})),
                    num(counts.get("tokens")),
                    num(counts.get("target_tokens")),
                    num(sum(value for key, value in counts.items() if key.startswith("dropped_tokens."))),
                )
            )
    head = ("what", "in", "kept", "dropped", "why", "tokens", "of them trained", "tokens dropped")
    return Table("Tokens", head, tuple(rows)) if rows else None


def stages_in_order(story: Story) -> list[Manifest]:
    """Manifests of the run in the order of the pipeline."""
    order = list(GRAPH)
    return sorted(story.manifests.values(), key=lambda manifest: order.index(manifest.stage))


def cost_table(story: Story) -> Table | None:
    """What each stage spent, all attempts together."""
    manifests = stages_in_order(story)
    if not manifests:
        return None
    wall = sum(manifest.cost.wall_seconds for manifest in manifests)
    rows: list[tuple[Cell, ...]] = [
        (
            text(manifest.stage.value),
            shown(duration(manifest.cost.wall_seconds), share=manifest.cost.wall_seconds / wall if wall else None),
            shown(_goodput([manifest.cost])),
            shown(duration(manifest.cost.cpu_seconds)),
            shown(duration(manifest.cost.gpu_seconds)),
            shown(byte_size(manifest.cost.peak_memory_bytes)),
            num(manifest.cost.attempts),
        )
        for manifest in manifests
    ]
    costs = [manifest.cost for manifest in manifests]
    totals = (
        text("total"),
        shown(duration(wall)),
        shown(_goodput(costs)),
        shown(duration(sum(cost.cpu_seconds for cost in costs))),
        shown(duration(sum(cost.gpu_seconds for cost in costs))),
        shown(byte_size(max(cost.peak_memory_bytes for cost in costs))),
        num(sum(cost.attempts for cost in costs)),
    )
    return Table(
        "Cost by stage",
        ("stage", "wall time", "goodput", "CPU time", "GPU time", "peak memory", "attempts"),
        (*rows, total_row(totals)),
        "What building each artifact cost, all attempts together, also where this run found it already built. "
        "Goodput is the part of the wall time that moved the stage further than any attempt before: start, loading, "
        "waiting, saving the result and what was done again are the rest. "
        "The total of memory is the highest peak; the report itself is not in it.",
    )


def _goodput(costs: list[Cost]) -> str:
    wall = sum(cost.wall_seconds for cost in costs)
    return f"{sum(cost.productive_seconds for cost in costs) / wall:.0%}" if wall else "-"


def registered_table(story: Story) -> Table | None:
    """Versions in the model registry."""
    if story.promotion is None or not story.promotion.models:
        return None
    rows = tuple(
        (
            text(model.name),
            num(float(model.version)),
            text(model.role),
            text("new" if model.is_new else "registered before"),
            code(model.model_id),
        )
        for model in story.promotion.models
    )
    return Table("Registered models", ("name", "version", "made by", "", "MLflow model"), rows)


def artifacts_table(story: Story) -> Table | None:
    """Where everything lies and what identifies it."""
    roles = {manifest.fingerprint: role for role, manifest in story.manifests.items()}
    rows = tuple(
        (
            text(manifest.kind),
            code(manifest.fingerprint[:16]),
            code(manifest.digest[:16]),
            code(manifest.mlflow_run_id or "–"),
            code(story.uris[roles[manifest.fingerprint]]),
        )
        for manifest in stages_in_order(story)
    )
    return Table("Artifacts", ("kind", "fingerprint", "digest", "MLflow run", "where"), rows) if rows else None


def settings(story: Story) -> list[Table]:
    """The configuration of each stage, flat."""
    found = []
    for manifest in stages_in_order(story):
        rows = tuple((code(key), code(str(value))) for key, value in dotted(manifest.config).items())
        if rows:
            found.append(Table(manifest.stage.value, ("setting", "value"), rows))
    return found
