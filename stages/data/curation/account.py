"""The numbers of a finished curation: its ledger for ledger.json, its metrics for MLflow, its losses for messages."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stages.config.curate import DERIVED, INSTALLED_DOCS, NEW_BYTES, NEW_PAIRS, CurateConfig
from stages.data.curation import planted
from stages.data.curation.extract import Extracted
from stages.data.curation.findings import Curation
from stages.data.curation.ledger import Amount, PairsAccount, Step, dropped_by_reason
from stages.data.curation.passes import PassResult

PlantedScore = Mapping[str, Mapping[str, Any]]


def merged_steps(
    units: Sequence[Extracted], filtered: Sequence[PassResult], finished: Sequence[PassResult], *, samples: int
) -> list[Step]:
    """One account for all units and shards."""
    # Column by column: the step `read` of all units, then each step of the two passes of all shards.
    columns = [[unit.step for unit in units], *zip(*(result.steps for result in filtered), strict=True)]
    columns += zip(*(result.steps for result in finished), strict=True)
    merged: list[Step] = []
    for column in columns:
        total = Step(column[0].name)
        for step in column:
            total.merge(step, samples=samples)
        merged.append(total)
    return merged


def losses(steps: Iterable[Step]) -> dict[str, int]:
    """Dropped documents as `step/reason`, the most frequent reason first."""
    counts: Counter[str] = Counter()
    for step in steps:
        counts.update({f"{step.name}/{reason}": amount.documents for reason, amount in step.dropped.items()})
    return dict(counts.most_common())


def planted_score(curation: Curation) -> dict[str, dict[str, Any]]:
    """What the filters found of the planted documents, by kind."""
    dropped: dict[str, str] = {}
    texts: dict[str, str] = {}
    for result in [*curation.filtered, *curation.finished]:
        dropped |= {key: where for key, where in result.planted_dropped.items() if not where.startswith("planted/")}
        texts |= result.planted_texts
    return planted.score(curation.planted, dropped, texts)


def ledger(curation: Curation, pairs: PairsAccount, found: PlantedScore, *, previous: str) -> dict[str, Any]:
    """Everything that was counted, as JSON. `previous` is the fingerprint of the data before, empty without any."""
    config = curation.bench.config
    pii: Counter[str] = Counter()
    for result in curation.finished:
        pii.update(result.pii)
    return {
        "documents": {
            "sources": _by_source(curation.units),
            **({"unread": curation.unread} if curation.unread else {}),
            "steps": [step.to_dict() for step in curation.steps],
            "dropped": dropped_by_reason(curation.steps),
            "published": {split: amount.to_dict() for split, amount in curation.published.items()},
        },
        "instructions": {
            "steps": [step.to_dict() for step in pairs.instructions],
            "sources": pairs.sources["instructions"],
        },
        "preferences": {
            "steps": [step.to_dict() for step in pairs.preferences],
            "sources": pairs.sources["preferences"],
            "kinds": pairs.kinds,
        },
        **_unpaired(pairs),
        **({"prompts": _prompts(pairs)} if pairs.prompts else {}),
        "published_pairs": pairs.published,
        "carried": _carried(curation, pairs, previous) if previous else {},
        "pii": {"documents": dict(sorted(pii.items())), "pairs": pairs.pii},
        "planted": found,
        "thresholds": config.quality.model_dump(mode="json"),
        "notes": _notes(config, carried=bool(previous)),
    }


def _unpaired(pairs: PairsAccount) -> dict[str, Any]:
    """Only where there are some, so that the ledgers of all other data stay as they were."""
    if not pairs.unpaired:
        return {}
    steps = [step.to_dict() for step in pairs.unpaired]
    return {"unpaired": {"steps": steps, "sources": pairs.sources["unpaired"]}}


def _prompts(pairs: PairsAccount) -> dict[str, Any]:
    return {"steps": [step.to_dict() for step in pairs.prompts], "sources": pairs.sources["prompts"]}


def _by_source(units: Sequence[Extracted]) -> dict[str, dict[str, Any]]:
    sources: dict[str, Step] = {}
    for unit in units:
        sources.setdefault(unit.source, Step("read")).merge(unit.step, samples=0)
    return {
        source: {
            "in": step.entered.to_dict(),
            "kept": step.kept.to_dict(),
            "dropped": {reason: amount.to_dict() for reason, amount in sorted(step.dropped.items())},
        }
        for source, step in sources.items()
    }


def _carried(curation: Curation, pairs: PairsAccount, previous: str) -> dict[str, Any]:
    """What was taken over from the previous data, which the steps do not count."""
    return {
        "from": previous,
        "documents_seen": len(curation.seen),
        "documents/heldout": curation.carried.to_dict(),
        **pairs.carried,
    }


def _notes(config: CurateConfig, *, carried: bool) -> list[str]:
    """What might otherwise surprise a reader of the ledger."""
    if not config.documents:
        return ["The run reads no documents: nothing is pretrained, and no pairs are derived from them."]
    notes = ["Planted documents measure the filters; they are counted under planted and never published."]
    if DERIVED in config.instructions + config.preferences:
        notes.append("Derived pairs come from docstrings; their labels are derived, not judged by people.")
        if INSTALLED_DOCS not in config.documents and not carried:
            notes.append("Pairs are 'derived' but documents has no 'installed-docs', so there are none.")
    return notes


def metrics(curation: Curation, pairs: PairsAccount, found: PlantedScore) -> dict[str, float]:
    """Numbers for MLflow. Times are only here, because the files must not depend on them."""
    steps, published, seconds = curation.steps, curation.published, curation.seconds
    entered, kept = (steps[0].entered, steps[-1].kept) if steps else (Amount(), Amount())
    numbers: dict[str, float] = {
        "curate/documents_in": entered.documents,
        "curate/bytes_in": entered.bytes,
        "curate/documents_kept": kept.documents,
        "curate/bytes_kept": kept.bytes,
        "curate/bytes_train": published["train"].bytes,
        "curate/bytes_heldout": published["heldout"].bytes,
        "curate/megabytes_per_second": entered.bytes / 1e6 / max(1e-9, sum(seconds.values())),
    }
    numbers |= {f"curate/dropped_{step.name}": step.entered.documents - step.kept.documents for step in steps}
    numbers |= {f"curate/{name.replace('/', '_')}": count for name, count in pairs.published.items()}
    numbers |= {f"curate/seconds_{phase}": spent for phase, spent in seconds.items()}
    if curation.bench.previous is not None:
        numbers |= {
            NEW_BYTES: published["train"].bytes,
            "curate/documents_new": kept.documents,
            NEW_PAIRS: sum(pairs.published.values()) - sum(pairs.carried.values()),
        }
    if total := sum(entry["planted"] for entry in found.values()):
        numbers["curate/planted_found"] = sum(entry["found"] for entry in found.values()) / total
    return {name: float(value) for name, value in numbers.items()}
