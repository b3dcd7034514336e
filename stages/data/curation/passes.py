"""Second and third pass of curation, one process per shard: datatrove blocks between reading a file and writing one.

Between the passes only columns travel: which documents are extra copies is decided once, over all shards.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from stages.data.curation import dedup
from stages.data.curation.filters import Accounted, document_filters
from stages.data.curation.ledger import Amount, Step
from stages.data.curation.marks import Mark
from stages.data.curation.pii import Scrubber
from stages.data.curation.workbench import SPLITS, Workbench

_PUBLISHED = ("source", "group", "path", "symbol")


@dataclass(frozen=True)
class Shard:
    """Consecutive units that one process filters, and the marks of each unit's documents."""

    number: int
    units: tuple[int, ...]
    marks: tuple[np.ndarray, ...]


@dataclass
class PassResult:
    """The account of one shard's pass, and what decisions over all shards must know of the documents that it kept."""

    steps: list[Step]
    heldout: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    planted: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))
    planted_dropped: dict[str, str] = field(default_factory=dict)
    """Which `step/reason` took a planted document, by its id."""
    planted_texts: dict[str, str] = field(default_factory=dict)
    """The final texts of the planted documents that no filter took, by id."""
    pii: Counter[str] = field(default_factory=Counter)


class RowReader(PipelineStep):
    """Rows of an earlier pass as datatrove documents, each with its mark."""

    type, name = "READER", "rows"

    def __init__(self, rows: Iterable[dict[str, Any]], marks: np.ndarray) -> None:
        super().__init__()
        self.rows, self.marks = rows, marks.tolist()

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        for row, mark in zip(self.rows, self.marks, strict=True):
            yield Document(text=row.pop("text"), id=row.pop("id"), metadata={**row, "mark": Mark(mark)})


class Marked(BaseFilter):
    """Drops the documents that a decision over all shards has marked so."""

    name = "marked"

    def __init__(self, mark: Mark) -> None:
        super().__init__()
        self.mark = mark

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (False, self.mark.reason) if doc.metadata["mark"] is self.mark else True


class PiiScrubber(BaseFilter):
    """Replaces personal data; drops nothing."""

    name = "pii"

    def __init__(self, counts: Counter[str], scrubber: Scrubber) -> None:
        super().__init__()
        self.counts, self.scrubber = counts, scrubber

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        result = self.scrubber.scrub(doc.text)
        doc.text = result.text
        if not doc.metadata["planted"]:
            self.counts.update(result.counts)
        return True


class PlantedOut(BaseFilter):
    """Takes the planted documents out at the very end; what is left of them shows what the filters missed."""

    name = "planted"

    def __init__(self, texts: dict[str, str]) -> None:
        super().__init__()
        self.texts = texts

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if doc.metadata["planted"]:
            self.texts[doc.id] = doc.text
            return False, "planted"
        return True


def filter_shard(shard: Shard, bench: Workbench) -> PassResult:
    """Apply the cap, exact duplicates and the filters of documents; then sign what is left for MinHash."""
    blocks: dict[str, list[BaseFilter]] = {
        "cap": [Marked(Mark.OVER_MAX_BYTES)],
        "exact_duplicates": [Marked(Mark.EXACT_DUPLICATE), Marked(Mark.SEEN_BEFORE)],
        **document_filters(bench.config, bench.words),
    }
    result = PassResult([Step(name) for name in blocks])
    rows = (row for unit in shard.units for row in bench.rows("documents", unit))
    reader = RowReader(rows, np.concatenate(shard.marks))
    flags: list[tuple[bool, bool]] = []
    kept = _set_aside(_chain(reader, blocks, result, bench), shard.number, flags, bench)
    # Everything up to here is lazy: the last consumer pulls one document at a time through all blocks.
    if bench.config.near_duplicates:
        dedup.signature_block(bench).run(kept, shard.number)
    else:
        for _ in kept:
            pass
    result.heldout, result.planted = np.array(flags, dtype=bool).reshape(-1, 2).T
    return result


def _chain(
    reader: RowReader, blocks: Mapping[str, list[BaseFilter]], result: PassResult, bench: Workbench
) -> Iterator[Document]:
    documents = reader.run()
    for step, filters in zip(result.steps, blocks.values(), strict=True):
        documents = Accounted(step, filters, bench.config.samples_per_reason, result.planted_dropped).run(documents)
    return documents


def _set_aside(
    documents: Iterable[Document], shard: int, flags: list[tuple[bool, bool]], bench: Workbench
) -> Iterator[Document]:
    """Set each document aside on its way to the signatures; appends whether it is held out, and whether planted."""
    with bench.row_writer("kept", shard) as write:
        for document in documents:
            metadata = {name: document.metadata[name] for name in (*_PUBLISHED, "heldout", "planted")}
            write({"id": document.id, "text": document.text, **metadata})
            flags.append((document.metadata["heldout"], bool(document.metadata["planted"])))
            yield document


def finish_shard(shard: int, marks: np.ndarray, bench: Workbench) -> PassResult:
    """Drop near duplicates and planted documents, scrub personal data, publish the rest."""
    texts, pii = dict[str, str](), Counter[str]()
    blocks: dict[str, list[BaseFilter]] = {
        "near_duplicates": [Marked(Mark.NEAR_DUPLICATE), Marked(Mark.NEAR_DUPLICATE_OF_SEEN)],
        "pii": [PiiScrubber(pii, Scrubber(bench.config.pii, enabled=bench.config.scrub_pii))],
        "planted": [PlantedOut(texts)],
    }
    result = PassResult([Step(name) for name in blocks], planted_texts=texts, pii=pii)
    # A shard's rows fit in memory: shards are bounded by _SHARD_BYTES, except for single large units.
    rows: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for document in _chain(RowReader(bench.rows("kept", shard), marks), blocks, result, bench):
        split = "heldout" if document.metadata["heldout"] else "train"
        provenance = {name: document.metadata[name] for name in _PUBLISHED}
        rows[split].append({"id": document.id, "text": document.text, **provenance})
    for split, lines in rows.items():
        if lines:
            bench.publish(f"documents/{split}/{shard:05d}", lines)
    return result


def count_published(name: str, bench: Workbench) -> Amount:
    """Documents and bytes of text in one published file, by reading it back."""
    amount = Amount()
    for row in bench.published_rows(name):
        amount.add(len(row["text"].encode()))
    return amount
