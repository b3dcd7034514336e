"""Instruction and preference rows, derived or given: capped, without duplicates, toxic answers or personal data."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.config.curate import DERIVED, CurateConfig
from stages.config.errors import DataError
from stages.data.curation.carried import carried_pairs
from stages.data.curation.extract import symbols_file
from stages.data.curation.ledger import Step, verify_chain
from stages.data.curation.passes import toxicity_scorer, write_published
from stages.data.curation.pii import scrub
from stages.data.pairs import derive, given
from stages.data.sources.records import Symbol, read_lines, source_of, stable_hash, utf8_size

Row = dict[str, Any]


@dataclass(frozen=True)
class PairsResult:
    """The accounts of both kinds, and how many rows were published."""

    instructions: list[Step]
    preferences: list[Step]
    published: dict[str, int]
    kinds: dict[str, int]
    pii: dict[str, int]
    carried: dict[str, int]
    """Rows taken over from the previous data, part of `published`."""
    sources: dict[str, dict[str, Any]]
    """For `instructions` and `preferences`: the account of each given source."""


def build_pairs(
    config: CurateConfig, units: int, words: tuple[str, ...], folder: Path, output: Path, previous: Path | None
) -> PairsResult:
    """Write instructions/ and preferences/ under `output`; both files of a kind exist even when they are empty.

    Rows of `previous` come first; a new row that is among them already is dropped.
    """
    pii: Counter[str] = Counter()
    published: dict[str, int] = {}
    unique = Step("unique_symbols")
    questions: list[derive.Question] = []
    if DERIVED in config.instructions + config.preferences:
        questions = derive.distinct_questions(_symbols(units, folder), config, unique)
    prepared = _Preparation(config, words, pii)
    sources: dict[str, dict[str, Any]] = {"instructions": {}, "preferences": {}}
    carried = {name: carried_pairs(previous, name) if previous else [] for name in ("instructions", "preferences")}

    made: list[Step] = [unique] if DERIVED in config.instructions else []
    if DERIVED in config.instructions:
        rows = [derive.instruction(question) for question in questions]
    else:
        rows = given.given_instructions(config.instruction_sources, config, made, sources["instructions"])
    rows = prepared.run(rows, _answers, config.max_instructions, made, carried["instructions"])
    published |= _publish("instructions", rows, config.instructions, made, output, carried["instructions"])

    wrong = Step("wrong_answers")
    paired: list[Step] = [unique, wrong] if DERIVED in config.preferences else []
    if DERIVED in config.preferences:
        rows = derive.preferences(questions, config, wrong)
    else:
        rows = given.given_preferences(config.preference_sources, config, paired, sources["preferences"])
    rows = prepared.run(rows, lambda row: row["chosen"], config.max_preferences, paired, carried["preferences"])
    published |= _publish("preferences", rows, config.preferences, paired, output, carried["preferences"])
    kinds = dict(sorted(Counter(row["kind"] for row in [*carried["preferences"], *rows]).items()))
    taken_over = {
        f"{name}/{split}": sum(row["heldout"] is heldout for row in rows)
        for name, rows in carried.items()
        for split, heldout in (("train", False), ("heldout", True))
    }
    return PairsResult(made, paired, published, kinds, dict(sorted(pii.items())), taken_over, sources)


def _symbols(units: int, folder: Path) -> Iterator[Symbol]:
    for number in range(units):
        for row in read_lines(symbols_file(folder, number)):
            yield Symbol(**row)


def _texts(row: Row) -> list[str]:
    if "messages" in row:
        return [turn["content"] for turn in row["messages"]]
    return [*(turn["content"] for turn in row["prompt"]), row["chosen"], row["rejected"]]


def _answers(row: Row) -> str:
    return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "assistant")


def _size(row: Row) -> int:
    return sum(map(utf8_size, _texts(row)))


def fair_shares(wanted: Mapping[str, int], limit: int) -> dict[str, int]:
    """Share `limit` equally; what one source does not need goes to the others, the last odd ones to the largest."""
    shares: dict[str, int] = {}
    for place, source in enumerate(sorted(wanted, key=lambda name: (wanted[name], name))):
        shares[source] = min(wanted[source], (limit - sum(shares.values())) // (len(wanted) - place))
    return shares


class _Preparation:
    """What every row passes before it is published."""

    def __init__(self, config: CurateConfig, words: tuple[str, ...], pii: Counter[str]) -> None:
        self._config, self._pii = config, pii
        self._scorer = toxicity_scorer(config.toxicity, words)

    def run(
        self, rows: list[Row], answer: Callable[[Row], str], limit: int, steps: list[Step], carried: Sequence[Row]
    ) -> list[Row]:
        """Duplicates, cap, toxicity of the answer to be learned, personal data. Appends its steps.

        The cap comes before the two dear steps, so a few rows less than the limit may be published.
        """
        order = sorted(rows, key=lambda row: stable_hash(self._config.seed, "order", row["id"]))
        rows = self._keep(order, "duplicates", self._repeated(order, carried), steps)
        rows = self._keep(rows, "cap", self._over(rows, limit), steps)
        scores = self._scorer.scores([answer(row) for row in rows]) if self._scorer else [0.0] * len(rows)
        toxic = ["toxic" if score >= self._config.toxicity_threshold else "" for score in scores]
        rows = self._keep(rows, "toxicity", toxic, steps)
        return self._scrubbed(rows, steps)

    def _keep(self, rows: list[Row], name: str, reasons: list[str], steps: list[Step]) -> list[Row]:
        step = Step(name)
        kept: list[Row] = []
        for row, reason in zip(rows, reasons, strict=True):
            size = _size(row)
            step.entered.add(size)
            if reason:
                text = " | ".join(_texts(row))
                step.drop(reason, row["id"], text, size, samples=self._config.samples_per_reason)
            else:
                step.kept.add(size)
                kept.append(row)
        steps.append(step)
        return kept

    def _repeated(self, rows: list[Row], carried: Sequence[Row]) -> list[str]:
        """Carried rows were published, so they compare with what a new row would be published as."""
        known = {tuple(_texts(row)) for row in carried}
        seen: set[tuple[str, ...]] = set()
        reasons: list[str] = []
        for row in rows:
            texts = tuple(_texts(row))
            is_known = bool(known) and (tuple(map(self._published, texts)) in known)
            reasons.append("seen_before" if is_known else "duplicate" if texts in seen else "")
            seen.add(texts)
        return reasons

    def _published(self, text: str) -> str:
        return scrub(text).text if self._config.scrub_pii else text

    def _over(self, rows: list[Row], limit: int) -> list[str]:
        """The cap of each half is shared among the sources, so that a large one does not crowd out a small one."""
        found: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        for row in rows:
            found[row["heldout"]][source_of(row)] += 1
        limits = {False: limit, True: self._config.max_heldout_pairs}
        left = {heldout: fair_shares(counts, limits[heldout]) for heldout, counts in found.items()}
        reasons: list[str] = []
        for row in rows:
            mine, source = left[row["heldout"]], source_of(row)
            mine[source] -= 1
            reasons.append("over_cap" if mine[source] < 0 else "")
        return reasons

    def _scrubbed(self, rows: list[Row], steps: list[Step]) -> list[Row]:
        step = Step("pii")
        kept: list[Row] = []
        for row in rows:
            before = _size(row)
            step.entered.add(before)
            if self._config.scrub_pii:
                for holder, name in _fields(row):
                    result = scrub(holder[name])
                    holder[name] = result.text
                    self._pii.update(result.counts)
            step.rewritten += before - _size(row)
            if "chosen" in row and row["chosen"] == row["rejected"]:  # they differed in a number that is gone now
                step.drop("equal_sides", row["id"], row["chosen"], _size(row), samples=self._config.samples_per_reason)
                continue
            step.kept.add(_size(row))
            kept.append(row)
        steps.append(step)
        return kept


def _fields(row: Row) -> list[tuple[dict[str, str], str]]:
    """Every text of a row as (holder, key), for replacing."""
    turns = row.get("messages") or row["prompt"]
    sides = [] if "messages" in row else [(row, "chosen"), (row, "rejected")]
    return [(turn, "content") for turn in turns] + sides


def _publish(
    name: str, rows: list[Row], sources: tuple[str, ...], steps: list[Step], output: Path, carried: list[Row]
) -> dict[str, int]:
    """Verify the account and write both halves, carried rows first; given sources that leave nothing are an error."""
    rows_from = next(index for index, step in enumerate(steps) if step.name == "duplicates")
    verify_chain(steps[:rows_from])
    verify_chain(steps[rows_from:])
    before = steps[rows_from - 1].kept.documents if rows_from else 0
    if before != steps[rows_from].entered.documents or len(rows) != steps[-1].kept.documents:
        raise DataError(
            f"the ledger of {name} does not conserve: {before} rows were made, "
            f"{steps[rows_from].entered.documents} prepared, {len(rows)} published of {steps[-1].kept.documents}",
            advice="This is a defect of curation, not of the data; please report it with ledger.json.",
        )
    if sources and DERIVED not in sources and not rows and not carried:
        losses = {reason: amount.documents for step in steps for reason, amount in step.dropped.items()}
        raise DataError(
            f"{name}={list(sources)}: no row is left, dropped by reason: {losses}",
            advice="Check the shape of the rows; docs/CURATION.md lists those that are understood.",
        )
    counts: dict[str, int] = {}
    for split, heldout in (("train", False), ("heldout", True)):
        half = [
            {key: value for key, value in row.items() if key != "heldout"}
            for row in [*carried, *rows]
            if row["heldout"] is heldout
        ]
        write_published(output / name / f"{split}.jsonl.gz", half)
        counts[f"{name}/{split}"] = len(half)
    return counts
