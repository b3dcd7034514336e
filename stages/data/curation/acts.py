"""The acts of curation, one after another over all documents; `stages/curate.py` says in which order.

An act hands out work by unit or by shard to functions that need the workbench only, and then decides what no unit can
know: which documents are over the cap, which are extra copies. Decisions work on columns (`marks.py`), never on texts.
"""

from collections.abc import Callable, Sequence

import numpy as np

from stages.config.errors import DataError
from stages.data.curation import account, marks, planted, seen
from stages.data.curation.carried import carry_heldout
from stages.data.curation.dedup import clusters, match_bucket
from stages.data.curation.extract import Extracted, extract, refuse_bad_sources, set_aside
from stages.data.curation.findings import Curation
from stages.data.curation.ledger import Amount, verify_chain
from stages.data.curation.passes import PassResult, Shard, count_published, filter_shard, finish_shard
from stages.data.curation.workbench import SPLITS
from stages.data.sources import readers
from stages.data.sources.records import SourceDocument, stable_hash
from stages.data.sources.storage import unread_by_reason

# Shards depend on the sources alone, so the published files do not depend on the number of processes.
_SHARD_BYTES = 2_000_000
_MAX_SHARDS = 64
_ORIGINAL_CHARACTERS = (900, 4000)


def recall(curation: Curation) -> None:
    """Load what earlier increments have seen."""
    seen.require_same_signatures(curation.bench)
    curation.seen = seen.seen_keys(curation.bench.previous)


def go_without(curation: Curation) -> None:
    """A run that reads no documents has none to judge; what was seen before stays what it was."""
    recall(curation)
    for path in seen.index_files(curation.bench.previous):
        curation.bench.publish_bytes(f"index/{path.name}", path.read_bytes())
    curation.published = {split: Amount() for split in SPLITS}


def read(curation: Curation) -> None:
    """Read all sources, a process a unit; refuse sources that are mostly unreadable."""
    config, size = curation.bench.config, 0
    with curation.timed("read"):
        found = readers.survey(config)
        curation.unread = {source: unread_by_reason(unread) for source, unread in found.unread.items()}
        tasks = [(unit, number, curation.bench) for number, unit in enumerate(found.units)]

        def report(done: int, result: Extracted) -> None:
            nonlocal size
            size += result.step.entered.bytes
            curation.progress(done, len(tasks), unit="part", phase="read", megabytes=size / 1e6)

        curation.units = curation.pool.run(extract, tasks, report)
    refuse_bad_sources(curation.units, config)
    if not any(len(unit.documents) for unit in curation.units):
        reasons = account.losses(unit.step for unit in curation.units)
        raise DataError(
            f"documents={list(config.documents)}: nothing could be read, dropped by reason: {reasons}",
            advice="Check the sources; docs/CURATION.md lists the formats that are understood.",
        )


def mark(curation: Curation) -> None:
    """Mark what was seen before, extra exact copies, and what is over the cap; remember what is judged now."""
    with curation.timed("read"):
        parts = [unit.documents for unit in curation.units]
        documents = marks.joined(parts)
        column = marks.mark(documents, max_bytes=curation.bench.config.max_bytes, seen=curation.seen)
        curation.marks = marks.parted(column, parts)
        seen.write_keys(curation.bench, curation.seen, marks.judged(documents, column))


def plant(curation: Curation) -> None:
    """Add documents with a known fault as one more unit, to measure what the filters find."""
    config, bench = curation.bench.config, curation.bench
    with curation.timed("read"):
        curation.planted = planted.plant(config.planted, config.seed, _originals(curation))
        documents = [entry.document for entry in curation.planted]
        curation.units.append(set_aside(planted.SOURCE, len(curation.units), documents, bench))
        curation.marks.append(np.zeros(len(documents), dtype=np.uint8))


def _originals(curation: Curation) -> list[SourceDocument]:
    """Real training documents of middle length, drawn by seed, of which near duplicates are planted."""
    config, (shortest, longest) = curation.bench.config, _ORIGINAL_CHARACTERS
    drawn: list[tuple[int, int, int]] = []
    for number, (unit, column) in enumerate(zip(curation.units, curation.marks, strict=True)):
        documents = unit.documents
        fits = (documents.sizes >= shortest) & (documents.sizes < longest) & ~documents.heldout
        for index in np.flatnonzero(fits & (column == marks.Mark.NONE)).tolist():
            drawn.append((stable_hash(config.seed, "original", int(documents.draws[index])), number, index))
    places = [(number, index) for _, number, index in sorted(drawn)[: config.planted]]
    rows = {number: list(curation.bench.rows("documents", number)) for number, _ in places}
    return [SourceDocument(**rows[number][index]) for number, index in places]


def filter_documents(curation: Curation) -> None:
    """Drop what is marked and what the filters reject, a process a shard."""
    with curation.timed("filter"):
        tasks = [(shard, curation.bench) for shard in _shards(curation)]
        curation.filtered = curation.pool.run(filter_shard, tasks, _reporter(curation, "filter", len(tasks)))
    curation.near_marks = [np.zeros(len(result.heldout), dtype=np.uint8) for result in curation.filtered]


def _shards(curation: Curation) -> list[Shard]:
    """Consecutive units of about 2 MB together, at most 64 shards."""
    sizes = [unit.documents.num_bytes for unit in curation.units]
    limit = max(_SHARD_BYTES, sum(sizes) // _MAX_SHARDS)
    groups: list[list[int]] = [[]]
    filled = 0
    for number, size in enumerate(sizes):
        if filled >= limit:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += size
    return [
        Shard(number, tuple(group), tuple(curation.marks[unit] for unit in group))
        for number, group in enumerate(groups)
    ]


def _reporter(curation: Curation, phase: str, total: int) -> Callable[[int, PassResult], None]:
    documents = 0

    def report(done: int, result: PassResult) -> None:
        nonlocal documents
        documents += result.steps[0].entered.documents
        curation.progress(done, total, unit="shard", phase=phase, documents=documents)

    return report


def match_near_copies(curation: Curation) -> None:
    """Mark near duplicates over all shards, and near copies of what earlier increments have seen."""
    bench, filtered = curation.bench, curation.filtered
    with curation.timed("finish"):
        buckets = range(bench.config.minhash_buckets)
        curation.pool.run(match_bucket, [(bucket, bench) for bucket in buckets])
        cluster_of = clusters([len(result.heldout) for result in filtered], bench)
        # A document is known when it agrees with an earlier one in any bucket.
        flags = [result.planted for result in filtered]
        known = [np.zeros(len(column), dtype=bool) for column in flags]
        for found in curation.pool.run(seen.match_seen, [(bucket, flags, bench) for bucket in buckets]):
            known = [before | now for before, now in zip(known, found, strict=True)]
        column = marks.near_copies(
            np.concatenate(cluster_of),
            np.concatenate(known),
            heldout=np.concatenate([result.heldout for result in filtered]),
            planted=np.concatenate(flags),
        )
        curation.near_marks = marks.parted(column, cluster_of)


def finish(curation: Curation) -> None:
    """Drop near copies and planted documents, scrub personal data, publish the rest, a process a shard."""
    with curation.timed("finish"):
        tasks = [(shard, column, curation.bench) for shard, column in enumerate(curation.near_marks)]
        curation.finished = curation.pool.run(finish_shard, tasks, _reporter(curation, "finish", len(tasks)))


def verify(curation: Curation) -> None:
    """The account conserves, the published files hold what it says, and something is left to train on."""
    samples = curation.bench.config.samples_per_reason
    curation.steps = account.merged_steps(curation.units, curation.filtered, curation.finished, samples=samples)
    verify_chain(curation.steps)
    # Counted from the files and not from what was written, so that a damaged disk is noticed here.
    kept, written = curation.steps[-1].kept, Amount()
    for split in SPLITS:
        curation.published[split] = _published(curation, curation.bench.published_documents(split))
        written.merge(curation.published[split])
    if written != kept:
        raise DataError(
            f"the published files hold {written.to_dict()}, the ledger says {kept.to_dict()}",
            advice="The disk of the Ray job may be damaged or full; free space and retry.",
        )
    if curation.bench.previous is None and not curation.published["train"].documents:
        raise DataError(
            f"no training document is left, dropped by reason: {account.losses(curation.steps)}",
            advice="Loosen what dropped most (profile, language, heldout_fraction) or give more data.",
        )


def _published(curation: Curation, names: Sequence[str]) -> Amount:
    """What published files hold, read back once by the processes of the pool."""
    total = Amount()
    for amount in curation.pool.run(count_published, [(name, curation.bench) for name in names]):
        total.merge(amount)
    return total


def carry(curation: Curation) -> None:
    """Take over the held-out documents of the previous data, which the steps do not count."""
    curation.carried = carry_heldout(curation.bench)
    curation.published["heldout"].merge(curation.carried)
