"""What an increment takes over from the data before it: held-out documents, instruction pairs, preference pairs."""

from pathlib import Path
from typing import Any

from stages.config.graph import PROMPTS
from stages.data.curation.ledger import Amount
from stages.data.curation.workbench import SPLITS, Workbench, published_documents, published_rows


def carry_heldout(bench: Workbench) -> Amount:
    """Copy the held-out documents, so that models of all increments are measured on them; return how many."""
    carried = Amount()
    if bench.previous is None:
        return carried
    names = published_documents(bench.previous, "heldout")
    rows = [row for name in names for row in published_rows(bench.previous, name)]
    for row in rows:
        carried.add(len(row["text"].encode()))
    if rows:
        bench.publish("documents/heldout/carried", rows)
    return carried


def carried_pairs(previous: Path | None, name: str) -> list[dict[str, Any]]:
    """The published rows of `instructions`, `preferences`, `prompts` or `unpaired`, marked with the split that they
    belong to; most data has none of the last two."""
    if previous is None or (name in (PROMPTS, "unpaired") and not (previous / name).is_dir()):
        return []
    return [
        {**row, "heldout": split == "heldout"}
        for split in SPLITS
        for row in published_rows(previous, f"{name}/{split}.jsonl.gz")
    ]
