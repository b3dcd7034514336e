"""First pass of curation, one process per unit: write documents and symbols aside, account for the rest."""

from dataclasses import dataclass
from pathlib import Path

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.data.curation.dedup_keys import Candidate, text_key
from stages.data.curation.ledger import Step
from stages.data.sources import readers
from stages.data.sources.readers import Unit
from stages.data.sources.records import BadRecord, SourceDocument, Symbol, stable_hash, utf8_size, write_lines

# Reasons that mean "could not be read", as opposed to "was read and is of no use".
HARMLESS = frozenset({"empty_text"})


@dataclass(frozen=True)
class Extracted:
    """What one unit gave; its texts lie in files, its documents' places and keys come along."""

    source: str
    step: Step
    candidates: tuple[Candidate, ...]
    sizes: tuple[int, ...]
    draws: tuple[int, ...]
    """A hash of seed and id per document: the order in which `max_bytes` takes documents."""


def documents_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.documents.jsonl"


def symbols_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.symbols.jsonl"


def extract(unit: Unit, number: int, config: CurateConfig, folder: Path) -> Extracted:
    """Read one unit. Symbols are no documents: they take no part in the account of documents."""
    step = Step("read")
    documents: list[SourceDocument] = []
    symbols: list[Symbol] = []
    for record in readers.read(unit, config):
        if isinstance(record, Symbol):
            symbols.append(record)
            continue
        size = record.size if isinstance(record, BadRecord) else utf8_size(record.text)
        step.entered.add(size)
        if isinstance(record, BadRecord):
            step.drop(record.reason, record.id, record.sample, size, samples=config.samples_per_reason)
        else:
            step.kept.add(size)
            documents.append(record)
    write_lines(symbols_file(folder, number), symbols)
    return store_documents(unit.source, number, documents, step, config, folder)


def store_documents(
    source: str, number: int, documents: list[SourceDocument], step: Step, config: CurateConfig, folder: Path
) -> Extracted:
    """Write documents aside as unit `number`."""
    write_lines(documents_file(folder, number), documents)
    candidates = tuple(
        Candidate(number, index, text_key(entry.text), entry.heldout, bool(entry.planted))
        for index, entry in enumerate(documents)
    )
    sizes = tuple(utf8_size(entry.text) for entry in documents)
    draws = tuple(stable_hash(config.seed, "cap", entry.id) for entry in documents)
    return Extracted(source, step, candidates, sizes, draws)


def refuse_bad_sources(results: list[Extracted], config: CurateConfig) -> None:
    """Raise DataError for a source with too large a share of unreadable records."""
    for source in dict.fromkeys(result.source for result in results):
        step = Step("read")
        for result in results:
            if result.source == source:
                step.merge(result.step, samples=1)
        refuse_bad_share(source, step, config)


def refuse_bad_share(source: str, step: Step, config: CurateConfig) -> None:
    """Raise DataError when more than `max_bad_fraction` of what came in could not be read."""
    bad = {reason: amount.documents for reason, amount in step.dropped.items() if reason not in HARMLESS}
    share = sum(bad.values()) / max(1, step.entered.documents)
    if share > config.max_bad_fraction:
        samples = "; ".join(f"{reason}: {rows[0]['id']}" for reason, rows in sorted(step.samples.items()) if rows)
        raise DataError(
            f"source {source!r}: {sum(bad.values())} of {step.entered.documents} records ({share:.1%}) are unreadable "
            f"{dict(sorted(bad.items()))}, allowed are max_bad_fraction={config.max_bad_fraction:.1%}. {samples}",
            advice="Repair the source, or raise curate.max_bad_fraction.",
        )
