"""What an increment takes over from the data before it: held-out documents, instruction pairs, preference pairs."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.data.curation.ledger import Amount
from stages.data.curation.passes import write_published


def carry_heldout(previous: Path, output: Path) -> Amount:
    """Copy the held-out documents, so that models of all increments are measured on them; return how many."""
    rows = [row for path in sorted((previous / "documents" / "heldout").glob("*.jsonl.gz")) for row in _rows(path)]
    carried = Amount()
    for row in rows:
        carried.add(len(row["text"].encode()))
    if rows:
        write_published(output / "documents" / "heldout" / "carried.jsonl.gz", rows)
    return carried


def carried_pairs(previous: Path, name: str) -> list[dict[str, Any]]:
    """The published rows of `instructions` or `preferences`, marked with the half that they belong to."""
    return [
        {**row, "heldout": split == "heldout"}
        for split in ("train", "heldout")
        for row in _rows(previous / name / f"{split}.jsonl.gz")
    ]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
