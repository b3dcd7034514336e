"""Second and third pass of curation, one process per shard: datatrove blocks between reading a file and writing one.

Between the passes only numbers travel: which documents are extra copies is decided once, over all shards.
"""

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter

from stages.config.curate import CurateConfig
from stages.data.curation import dedup
from stages.data.curation.dedup_keys import Candidate
from stages.data.curation.extract import documents_file
from stages.data.curation.filters import Accounted, LanguageId, Toxicity, quality_filters, word_tokenizer
from stages.data.curation.ledger import Amount, Step
from stages.data.curation.pii import scrub
from stages.data.curation.toxicity import ClassifierScorer, ToxicityScorer, WordListScorer
from stages.data.sources.records import read_lines

FILTER_STEPS = ("cap", "exact_duplicates", "language", "quality", "toxicity")
FINISH_STEPS = ("near_duplicates", "pii", "planted")
_PUBLISHED = ("source", "group", "path", "symbol")


@dataclass(frozen=True)
class Shard:
    """Consecutive units that one process filters; `marks` says per unit which documents to drop, and why."""

    number: int
    units: tuple[int, ...]
    marks: dict[int, dict[int, str]]


@dataclass
class PassResult:
    """The account of one shard's pass."""

    steps: list[Step]
    candidates: list[Candidate] = field(default_factory=list)
    planted_dropped: dict[str, str] = field(default_factory=dict)
    planted_texts: dict[str, str] = field(default_factory=dict)
    pii: Counter[str] = field(default_factory=Counter)
    published: dict[str, Amount] = field(default_factory=dict)


class ShardReader(PipelineStep):
    """Reads a shard's documents from the first pass."""

    type, name = "READER", "units"

    def __init__(self, shard: Shard, folder: Path) -> None:
        super().__init__()
        self.shard, self.folder = shard, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        for unit in self.shard.units:
            marks = self.shard.marks.get(unit, {})
            for index, row in enumerate(read_lines(documents_file(self.folder, unit))):
                row["mark"] = marks.get(index, "")
                yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)


class FileReader(PipelineStep):
    """Reads what the second pass kept; marks documents by their place in it."""

    type, name = "READER", "kept"

    def __init__(self, path: Path, marked: dict[int, str]) -> None:
        super().__init__()
        self.path, self.marked = path, marked

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        for index, row in enumerate(read_lines(self.path)):
            row["mark"] = self.marked.get(index, "")
            yield Document(text=row.pop("text"), id=row.pop("id"), metadata=row)


class Marked(BaseFilter):
    """Drops the documents that a decision over all shards has marked with this reason."""

    name = "marked"

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return (False, self.reason) if doc.metadata["mark"] == self.reason else True


class PiiScrubber(BaseFilter):
    """Replaces personal data; drops nothing."""

    name = "pii"

    def __init__(self, counts: Counter[str], *, enabled: bool) -> None:
        super().__init__()
        self.counts, self.enabled = counts, enabled

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if self.enabled:
            result = scrub(doc.text)
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


@lru_cache(maxsize=1)
def toxicity_scorer(kind: str, words: tuple[str, ...]) -> ToxicityScorer | None:
    """One scorer per process; the classifier takes seconds to import."""
    match kind:
        case "classifier":
            return ClassifierScorer()
        case "word-list":
            return WordListScorer(words)
        case _:
            return None


def filter_shard(shard: Shard, config: CurateConfig, words: tuple[str, ...], folder: Path) -> PassResult:
    """Cap, exact duplicates, language, quality, toxicity; then MinHash signatures of what is left."""
    result = PassResult([Step(name) for name in FILTER_STEPS])
    scorer = toxicity_scorer(config.toxicity, words)
    blocks: tuple[list[BaseFilter], ...] = (
        [Marked("over_max_bytes")],
        [Marked("exact_duplicate"), Marked("seen_before")],
        [LanguageId(config.language, config.min_language_score)],
        quality_filters(config.quality, word_tokenizer(config)),
        [Toxicity(scorer, config.toxicity_threshold)] if scorer else [],
    )
    kept = _chain(ShardReader(shard, folder), blocks, result, config, shard.number)
    kept = _written(kept, kept_file(folder, shard.number), shard.number, result.candidates)
    if config.near_duplicates:
        dedup.signature_block(config, folder).run(kept, shard.number)
    else:
        for _ in kept:
            pass
    return result


def kept_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.kept.jsonl"


def _chain(
    reader: PipelineStep, blocks: tuple[list[BaseFilter], ...], result: PassResult, config: CurateConfig, rank: int
) -> Any:
    documents = reader.run(None, rank)
    for step, filters in zip(result.steps, blocks, strict=True):
        block = Accounted(step, filters, config.samples_per_reason, result.planted_dropped)
        documents = block.run(documents, rank)
    return documents


def _written(documents: Any, path: Path, shard: int, candidates: list[Candidate]) -> Iterator[Document]:
    """Write each document on its way to the signatures, and note its place."""
    with path.open("w", encoding="utf-8") as file:
        for index, document in enumerate(documents):
            metadata = {name: document.metadata[name] for name in (*_PUBLISHED, "heldout", "planted")}
            file.write(json.dumps({"id": document.id, "text": document.text, **metadata}) + "\n")
            heldout, planted = document.metadata["heldout"], bool(document.metadata["planted"])
            candidates.append(Candidate(shard, index, "", heldout, planted))
            yield document


def finish_shard(shard: int, marked: dict[int, str], config: CurateConfig, folder: Path, output: Path) -> PassResult:
    """Near duplicates and planted documents out, personal data scrubbed, the rest published under `output`."""
    result = PassResult([Step(name) for name in FINISH_STEPS])
    blocks: tuple[list[BaseFilter], ...] = (
        [Marked("near_duplicate"), Marked("near_duplicate_of_seen")],
        [PiiScrubber(result.pii, enabled=config.scrub_pii)],
        [PlantedOut(result.planted_texts)],
    )
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "heldout": []}
    for document in _chain(FileReader(kept_file(folder, shard), marked), blocks, result, config, shard):
        split = "heldout" if document.metadata["heldout"] else "train"
        provenance = {name: document.metadata[name] for name in _PUBLISHED}
        rows[split].append({"id": document.id, "text": document.text, **provenance})
    for split, lines in rows.items():
        if lines:
            write_published(output / split / f"{shard:05d}.jsonl.gz", lines)
    return result


def write_published(path: Path, rows: list[dict[str, Any]]) -> None:
    """Gzipped JSON lines whose bytes depend on the rows alone: no time and no file name in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
        with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
