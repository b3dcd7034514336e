"""From raw sources to curated text: read, filter, deduplicate, scrub, hold out, derive pairs, account for every loss.

Three passes over the documents: units are read, shards are filtered and signed, shards are finished. Between them this
process decides what no shard can know: which documents are over the cap and which are extra copies.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.config.curate import DERIVED, INSTALLED_DOCS, NEW_BYTES, NEW_PAIRS, CurateConfig
from stages.config.errors import DataError
from stages.config.pipeline import PREVIOUS
from stages.data.curation import planted, seen
from stages.data.curation.carried import carry_heldout
from stages.data.curation.dedup_keys import Candidate, extra_copies
from stages.data.curation.extract import Extracted, documents_file, extract, refuse_bad_sources, store_documents
from stages.data.curation.ledger import Amount, Step, dropped_by_reason, verify_chain
from stages.data.curation.passes import PassResult, Shard, filter_shard, finish_shard
from stages.data.curation.pool import Pool, process_pool
from stages.data.pairs.build import PairsResult, build_pairs
from stages.data.sources import readers
from stages.data.sources.records import SourceDocument, read_lines, stable_hash
from stages.data.sources.storage import open_decompressed
from stages.job.context import StageContext, StageOutcome

_SHARD_BYTES = 2_000_000
_MAX_SHARDS = 64
_ORIGINAL_CHARACTERS = range(900, 4000)


def run(context: StageContext) -> StageOutcome:
    """Write documents/, instructions/, preferences/, index/, ledger.json and planted.json.

    With an input `previous`, documents are those that it and its predecessors have not seen; its held-out documents and
    all of its pairs are taken over.
    """
    config = context.config
    assert isinstance(config, CurateConfig)
    workers = max(1, int(context.execution.cpus_per_worker))
    with process_pool(workers) as pool:
        return Curation(context, config, pool).run()


class Curation:
    """One execution of the stage: what the passes found out, until it is written down."""

    def __init__(self, context: StageContext, config: CurateConfig, pool: Pool) -> None:
        self._context, self._config, self._pool = context, config, pool
        self._folder: Path = context.work_dir
        self._output: Path = context.output_dir
        self._words = _word_list(config)
        self._seconds: dict[str, float] = {}
        self._marks: dict[int, dict[int, str]] = {}
        self._previous = context.input_dir(PREVIOUS) if PREVIOUS in context.inputs else None
        self._seen: frozenset[str] = frozenset()
        self._carried = Amount()

    def run(self) -> StageOutcome:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._previous is not None:
            seen.require_same_signatures(self._previous, self._config)
            self._seen = seen.seen_keys(self._previous)
        units, seeds = self._read()
        pairs = self._pool.submit(
            build_pairs,
            self._config,
            len(units) - bool(seeds),
            self._words,
            self._folder,
            self._output,
            self._previous,
        )
        shards = self._shards(units)
        filtered = self._filter(shards)
        finished = self._finish(filtered)
        steps = _merged([result.step for result in units], filtered, finished, self._config)
        self._verify(steps)
        if self._previous is not None:
            self._carried = carry_heldout(self._previous, self._output)
        return self._conclude(units, steps, filtered, finished, seeds, pairs.result())

    def _read(self) -> tuple[list[Extracted], list[planted.Planted]]:
        """First pass; the planted documents become the last unit."""
        started = time.monotonic()
        plan = readers.plan(self._config)
        tasks = [(unit, number, self._config, self._folder) for number, unit in enumerate(plan)]
        size = 0

        def report(done: int, result: Extracted) -> None:
            nonlocal size
            size += result.step.entered.bytes
            self._context.progress(done, len(tasks), unit="part", phase="read", megabytes=size / 1e6)

        units = self._pool.run(extract, tasks, report)
        refuse_bad_sources(units, self._config)
        if not any(result.candidates for result in units):
            reasons = _losses(result.step for result in units)
            raise DataError(
                f"documents={list(self._config.documents)}: nothing could be read, dropped by reason: {reasons}",
                advice="Check the sources; docs/CURATION.md lists the formats that are understood.",
            )
        self._marks = _marks(units, self._config.max_bytes, self._seen)
        seen.write_keys(self._output, self._seen, _judged(units, self._marks), self._config)
        seeds = planted.plant(self._config.planted, self._config.seed, self._originals(units))
        if seeds:
            units.append(self._store_planted([entry.document for entry in seeds], number=len(units)))
        self._seconds["read"] = time.monotonic() - started
        return units, seeds

    def _originals(self, units: Sequence[Extracted]) -> list[SourceDocument]:
        """Real training documents of middle length, drawn by seed, of which near duplicates are planted."""
        drawn = sorted(
            (stable_hash(self._config.seed, "original", draw), place.shard, place.index)
            for result in units
            for place, size, draw in zip(result.candidates, result.sizes, result.draws, strict=True)
            if size in _ORIGINAL_CHARACTERS
            and not place.heldout
            and place.index not in self._marks.get(place.shard, {})
        )[: self._config.planted]
        rows = {shard: list(read_lines(documents_file(self._folder, shard))) for _, shard, _ in drawn}
        return [SourceDocument(**rows[shard][index]) for _, shard, index in drawn]

    def _store_planted(self, documents: list[SourceDocument], *, number: int) -> Extracted:
        step = Step("read")
        for document in documents:
            step.entered.add(len(document.text.encode()))
            step.kept.add(len(document.text.encode()))
        return store_documents(planted.SOURCE, number, documents, step, self._config, self._folder)

    def _shards(self, units: Sequence[Extracted]) -> list[Shard]:
        """Consecutive units of about 2 MB together, at most 64 shards."""
        total = sum(sum(result.sizes) for result in units)
        limit = max(_SHARD_BYTES, total // _MAX_SHARDS)
        groups: list[list[int]] = [[]]
        size = 0
        for number, result in enumerate(units):
            if size >= limit:
                groups.append([])
                size = 0
            groups[-1].append(number)
            size += sum(result.sizes)
        return [
            Shard(number, tuple(group), {unit: self._marks[unit] for unit in group if unit in self._marks})
            for number, group in enumerate(groups)
        ]

    def _filter(self, shards: Sequence[Shard]) -> list[PassResult]:
        started = time.monotonic()
        tasks = [(shard, self._config, self._words, self._folder) for shard in shards]
        results = self._pool.run(filter_shard, tasks, self._reporter("filter", len(tasks)))
        self._seconds["filter"] = time.monotonic() - started
        return results

    def _reporter(self, phase: str, total: int) -> Any:
        documents = 0

        def report(done: int, result: PassResult) -> None:
            nonlocal documents
            documents += result.steps[0].entered.documents
            self._context.progress(done, total, unit="shard", phase=phase, documents=documents)

        return report

    def _finish(self, filtered: Sequence[PassResult]) -> list[PassResult]:
        started = time.monotonic()
        marked: dict[int, dict[int, str]] = {}
        if self._config.near_duplicates:
            for (place, index), reason in self._near_copies(filtered).items():
                marked.setdefault(place, {})[index] = reason
        output = self._output / "documents"
        tasks = [(shard, marked.get(shard, {}), self._config, self._folder, output) for shard in range(len(filtered))]
        results = self._pool.run(finish_shard, tasks, self._reporter("finish", len(tasks)))
        self._seconds["finish"] = time.monotonic() - started
        return results

    def _near_copies(self, filtered: Sequence[PassResult]) -> dict[seen.Place, str]:
        """All but the best-ranked document of every MinHash cluster; all of a cluster of which one was seen before."""
        from stages.data.curation.dedup import clusters, match_bucket

        tasks = [(bucket, self._config, self._folder) for bucket in range(self._config.minhash_buckets)]
        self._pool.run(match_bucket, tasks, lambda done, result: None)
        cluster_of = clusters(self._config, self._folder)
        candidates = [entry for result in filtered for entry in result.candidates]
        extra = extra_copies(
            Candidate(entry.shard, entry.index, str(cluster_of[place]), entry.heldout, entry.planted)
            for entry in candidates
            if (place := (entry.shard, entry.index)) in cluster_of
        )
        planted_places = frozenset((entry.shard, entry.index) for entry in candidates if entry.planted)
        known = self._match_seen(planted_places)
        known_clusters = {cluster_of[place] for place in known if place in cluster_of}
        known |= {place for place, cluster in cluster_of.items() if cluster in known_clusters} - planted_places
        return dict.fromkeys(extra, "near_duplicate") | dict.fromkeys(known, "near_duplicate_of_seen")

    def _match_seen(self, planted_places: frozenset[seen.Place]) -> set[seen.Place]:
        """Documents like those of earlier increments; all signatures, old and new, go into the artifact."""
        tasks = [
            (bucket, self._config, self._folder, planted_places, self._previous, self._output)
            for bucket in range(self._config.minhash_buckets)
        ]
        found: set[seen.Place] = set()
        for places in self._pool.run(seen.match_seen, tasks, lambda done, result: None):
            found |= places
        return found

    def _verify(self, steps: Sequence[Step]) -> None:
        """The account conserves, the files hold what it says, and something is left to train on."""
        verify_chain(steps)
        written = Amount()
        for split in ("train", "heldout"):
            written.merge(count_published(self._output / "documents" / split))
        if written != steps[-1].kept:
            raise DataError(
                f"the published files hold {written.to_dict()}, the ledger says {steps[-1].kept.to_dict()}",
                advice="The disk of the Ray job may be damaged or full; free space and retry.",
            )
        if self._previous is None and not any((self._output / "documents" / "train").glob("*.jsonl.gz")):
            raise DataError(
                f"no training document is left, dropped by reason: {_losses(steps)}",
                advice="Loosen what dropped most (profile, language, heldout_fraction) or give more data.",
            )

    def _conclude(
        self,
        units: Sequence[Extracted],
        steps: Sequence[Step],
        filtered: Sequence[PassResult],
        finished: Sequence[PassResult],
        seeds: Sequence[planted.Planted],
        pairs: PairsResult,
    ) -> StageOutcome:
        dropped: dict[str, str] = {}
        texts: dict[str, str] = {}
        pii: Counter[str] = Counter()
        for result in [*filtered, *finished]:
            dropped |= {key: where for key, where in result.planted_dropped.items() if not where.startswith("planted/")}
            texts |= result.planted_texts
            pii.update(result.pii)
        found = planted.score(seeds, dropped, texts)
        published = {
            split: count_published(self._output / "documents" / split).to_dict() for split in ("train", "heldout")
        }
        ledger = {
            "documents": {
                "sources": _by_source(units),
                "steps": [step.to_dict() for step in steps],
                "dropped": dropped_by_reason(steps),
                "published": published,
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
            "published_pairs": pairs.published,
            "carried": self._carried_ledger(pairs),
            "pii": {"documents": dict(sorted(pii.items())), "pairs": pairs.pii},
            "planted": found,
            "thresholds": self._config.quality.model_dump(mode="json"),
            "notes": _notes(self._config, carried=self._previous is not None),
        }
        _write_json(self._output / "ledger.json", ledger)
        _write_json(self._output / "planted.json", found)
        return StageOutcome(metrics=self._metrics(steps, published, pairs, found), ledger=ledger)

    def _metrics(
        self,
        steps: Sequence[Step],
        published: dict[str, dict[str, int]],
        pairs: PairsResult,
        found: dict[str, dict[str, Any]],
    ) -> dict[str, float]:
        """Numbers for MLflow; times are here alone, for files must not depend on them."""
        entered = steps[0].entered
        numbers: dict[str, float] = {
            "curate/documents_in": entered.documents,
            "curate/bytes_in": entered.bytes,
            "curate/documents_kept": steps[-1].kept.documents,
            "curate/bytes_kept": steps[-1].kept.bytes,
            "curate/bytes_train": published["train"]["bytes"],
            "curate/bytes_heldout": published["heldout"]["bytes"],
            "curate/megabytes_per_second": entered.bytes / 1e6 / max(1e-9, sum(self._seconds.values())),
        }
        numbers |= {f"curate/dropped_{step.name}": step.entered.documents - step.kept.documents for step in steps}
        numbers |= {f"curate/{name.replace('/', '_')}": count for name, count in pairs.published.items()}
        numbers |= {f"curate/seconds_{phase}": seconds for phase, seconds in self._seconds.items()}
        if self._previous is not None:
            new = steps[-1].kept.documents
            numbers |= {
                NEW_BYTES: published["train"]["bytes"],
                "curate/documents_new": new,
                NEW_PAIRS: sum(pairs.published.values()) - sum(pairs.carried.values()),
            }
        if total := sum(entry["planted"] for entry in found.values()):
            numbers["curate/planted_found"] = sum(entry["found"] for entry in found.values()) / total
        return {name: float(value) for name, value in numbers.items()}

    def _carried_ledger(self, pairs: PairsResult) -> dict[str, Any]:
        """What was taken over from the previous data, beside what the steps account for."""
        if self._previous is None:
            return {}
        return {
            "from": self._context.inputs[PREVIOUS].fingerprint,
            "documents_seen": len(self._seen),
            "documents/heldout": self._carried.to_dict(),
            **pairs.carried,
        }


def _word_list(config: CurateConfig) -> tuple[str, ...]:
    if config.toxicity != "word-list":
        return ()
    entries = readers.data_files(config.toxicity_word_list, ("",))
    with open_decompressed(entries[0].uri) as stream:
        return tuple(stream.read().decode("utf-8-sig", "replace").splitlines())


def _marks(units: Sequence[Extracted], max_bytes: int, known: frozenset[str]) -> dict[int, dict[int, str]]:
    """What earlier increments, the cap and exact copies take, as reason by unit and index."""
    marks: dict[int, dict[int, str]] = {}
    for result in units:
        for entry in result.candidates:
            if entry.key in known:
                marks.setdefault(entry.shard, {})[entry.index] = "seen_before"
    for place, index in extra_copies(entry for result in units for entry in result.candidates):
        marks.setdefault(place, {}).setdefault(index, "exact_duplicate")
    for place, index in _over_cap(units, max_bytes, marks):
        marks.setdefault(place, {})[index] = "over_max_bytes"
    return marks


def _judged(units: Sequence[Extracted], marks: dict[int, dict[int, str]]) -> set[str]:
    """Keys of all documents but those that the cap left out."""
    return {
        entry.key
        for result in units
        for entry in result.candidates
        if marks.get(entry.shard, {}).get(entry.index) != "over_max_bytes"
    }


def _over_cap(units: Sequence[Extracted], limit: int, marks: dict[int, dict[int, str]]) -> list[tuple[int, int]]:
    """Places beyond `limit` bytes of distinct documents, in the order of the draw."""
    if not limit:
        return []
    drawn = sorted(
        (draw, place.shard, place.index, size)
        for result in units
        for place, size, draw in zip(result.candidates, result.sizes, result.draws, strict=True)
        if place.index not in marks.get(place.shard, {})
    )
    over: list[tuple[int, int]] = []
    total = 0
    for _, shard, index, size in drawn:
        total += size
        if total > limit:
            over.append((shard, index))
    return over


def _merged(
    read: Sequence[Step], filtered: Sequence[PassResult], finished: Sequence[PassResult], config: CurateConfig
) -> list[Step]:
    """One account for all units and shards."""
    columns = [list(read), *zip(*(result.steps for result in filtered), strict=True)]
    columns += zip(*(result.steps for result in finished), strict=True)
    merged: list[Step] = []
    for column in columns:
        total = Step(column[0].name)
        for step in column:
            total.merge(step, samples=config.samples_per_reason)
        merged.append(total)
    return merged


def _by_source(units: Sequence[Extracted]) -> dict[str, dict[str, Any]]:
    sources: dict[str, Step] = {}
    for result in units:
        sources.setdefault(result.source, Step("read")).merge(result.step, samples=0)
    return {
        source: {
            "in": step.entered.to_dict(),
            "kept": step.kept.to_dict(),
            "dropped": {reason: amount.to_dict() for reason, amount in sorted(step.dropped.items())},
        }
        for source, step in sources.items()
    }


def _losses(steps: Any) -> dict[str, int]:
    losses: Counter[str] = Counter()
    for step in steps:
        losses.update({f"{step.name}/{reason}": amount.documents for reason, amount in step.dropped.items()})
    return dict(losses.most_common())


def _notes(config: CurateConfig, *, carried: bool) -> list[str]:
    """What a reader of the ledger might else be surprised by."""
    notes = ["Planted documents measure the filters; they are counted under planted and never published."]
    if DERIVED in config.instructions + config.preferences:
        notes.append("Derived pairs come from docstrings; their labels are derived, not judged by people.")
        if INSTALLED_DOCS not in config.documents and not carried:
            notes.append("Pairs are 'derived' but documents has no 'installed-docs', so there are none.")
    return notes


def count_published(folder: Path) -> Amount:
    """Documents and bytes of text in published files, by reading them."""
    amount = Amount()
    for path in sorted(folder.glob("*.jsonl.gz")):
        with open_decompressed(str(path)) as stream:
            for line in stream:
                amount.add(len(json.loads(line)["text"].encode()))
    return amount


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
