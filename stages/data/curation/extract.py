"""First pass of curation, one process per unit: set documents and symbols aside, account for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.data.curation.ledger import Step
from stages.data.curation.marks import Documents, describe
from stages.data.curation.workbench import Workbench
from stages.data.sources import readers
from stages.data.sources.readers import Unit
from stages.data.sources.records import BadRecord, SourceDocument, Symbol, utf8_size

# Reasons that mean "was read and is of no use", as opposed to "could not be read".
HARMLESS = frozenset({"empty_text"})


@dataclass(frozen=True)
class Extracted:
    """What one unit gave. The texts are on the workbench; only the columns that decisions need come along."""

    source: str
    step: Step
    documents: Documents


def extract(unit: Unit, number: int, bench: Workbench) -> Extracted:
    """Read one unit and set it aside as unit `number`.

    Symbols are not documents: they take no part in the account of documents.
    """
    step = Step("read")
    documents: list[SourceDocument] = []
    symbols: list[Symbol] = []
    for record in readers.read(unit, bench.config):
        if isinstance(record, Symbol):
            symbols.append(record)
            continue
        size = record.size if isinstance(record, BadRecord) else utf8_size(record.text)
        step.entered.add(size)
        if isinstance(record, BadRecord):
            step.lost += record.lost
            step.drop(record.reason, record.id, record.sample, size, samples=bench.config.samples_per_reason)
        else:
            step.kept.add(size)
            documents.append(record)
    bench.write_rows("symbols", number, symbols)
    bench.write_rows("documents", number, documents)
    return Extracted(unit.source, step, describe(documents, seed=bench.config.seed))


def set_aside(source: str, number: int, documents: Sequence[SourceDocument], bench: Workbench) -> Extracted:
    """Set documents that were made here aside as unit `number`, as if they had been read."""
    step = Step("read")
    for document in documents:
        size = utf8_size(document.text)
        step.entered.add(size)
        step.kept.add(size)
    bench.write_rows("documents", number, documents)
    return Extracted(source, step, describe(documents, seed=bench.config.seed))


def refuse_bad_sources(results: Sequence[Extracted], config: CurateConfig) -> None:
    """Raise DataError for a source with too large a share of unreadable records."""
    for source in dict.fromkeys(result.source for result in results):
        step = Step("read")
        for result in results:
            if result.source == source:
                step.merge(result.step, samples=1)
        refuse_bad_share(source, step, config)


def refuse_bad_share(source: str, step: Step, config: CurateConfig) -> None:
    """Raise DataError when more than `max_bad_fraction` of what came in could not be read.

    By records; and a file that is lost, which counts as one of them, also by its bytes.
    """
    bad = {reason: amount.documents for reason, amount in step.dropped.items() if reason not in HARMLESS}
    share = sum(bad.values()) / max(1, step.entered.documents)
    share_lost = step.lost / max(1, step.entered.bytes)
    if max(share, share_lost) <= config.max_bad_fraction:
        return
    samples = "; ".join(f"{reason}: {rows[0]['id']}" for reason, rows in sorted(step.samples.items()) if rows)
    what = f"{sum(bad.values())} of {step.entered.documents} records ({share:.1%}) are unreadable"
    if share <= config.max_bad_fraction:
        what = f"{step.lost} of {step.entered.bytes} bytes ({share_lost:.1%}) are in files that cannot be read"
    raise DataError(
        f"source {source!r}: {what} {dict(sorted(bad.items()))}, "
        f"allowed are max_bad_fraction={config.max_bad_fraction:.1%}. {samples}",
        advice="Repair the source, or raise curate.max_bad_fraction.",
    )
