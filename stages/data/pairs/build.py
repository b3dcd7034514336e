"""Instruction, preference and prompt rows: capped, without duplicates, toxic answers or personal data."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config.curate import DERIVED
from stages.config.errors import DataError
from stages.config.sources import Source
from stages.data.curation.carried import carried_pairs
from stages.data.curation.ledger import PairsAccount, Step, verify_chain
from stages.data.curation.pii import Scrubber
from stages.data.curation.toxicity import toxicity_scorer
from stages.data.curation.workbench import SPLITS, Workbench
from stages.data.pairs import derive, given
from stages.data.pairs.reasons import joined
from stages.data.pairs.turns import text_fields
from stages.data.sources.records import Symbol, source_of, stable_hash, utf8_size

Row = dict[str, Any]


@dataclass
class _Kind:
    """One kind of rows on its way: the rows, their account so far, and what is taken over as it is."""

    name: str
    sources: tuple[str, ...]
    carried: list[Row]
    rows: list[Row] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The account of each given source."""

    @property
    def is_derived(self) -> bool:
        return DERIVED in self.sources

    @property
    def is_given(self) -> bool:
        return any(source != DERIVED for source in self.sources)

    @property
    def published(self) -> list[Row]:
        return [*self.carried, *self.rows]


def build_pairs(units: int, bench: Workbench) -> PairsAccount:
    """Publish instructions/ and preferences/; both files of a kind exist even when they are empty. unpaired/ and
    prompts/ exist where sources of single responses or prompt sets are given, or were in the previous data.

    `units` is how many units have set symbols aside. Rows of the previous data come first; a new row that is among them
    already is dropped.
    """
    config = bench.config
    unique, wrong = Step("unique_symbols"), Step("wrong_answers")
    questions: list[derive.Question] = []
    if DERIVED in config.instructions + config.preferences:
        questions = derive.distinct_questions(_symbols(units, bench), config, unique)
    prepared = _Preparation(bench)

    asked = _Kind("instructions", config.instructions, carried_pairs(bench.previous, "instructions"))
    if asked.is_derived:
        asked.steps = [unique]
        asked.rows = [derive.instruction(question) for question in questions]
    if asked.is_given or not asked.is_derived:
        read: list[Step] = []
        asked.rows += given.given_instructions(
            _given(config.instruction_sources), config, read, asked.given, made=_made(bench, asked.name)
        )
        asked.steps = _one_chain(read, asked.steps)
    prepared.run(asked, answer=_answers, limit=config.max_instructions)
    _publish(asked, bench)  # before preferences are read: a useless source of instructions is told at once

    given_sources = _given(config.preference_sources)
    of_pairs = tuple(source.uri for source in config.preference_sources if not source.is_unpaired)
    paired = _Kind("preferences", of_pairs, carried_pairs(bench.previous, "preferences"))
    if paired.is_derived:
        paired.steps = [unique, wrong]
        paired.rows = derive.preferences(questions, config, wrong)
    if paired.is_given or not paired.is_derived:
        read = []
        sources = [source for source in given_sources if not source.is_unpaired]
        paired.rows += given.given_preferences(sources, config, read, paired.given, made=_made(bench, paired.name))
        paired.steps = _one_chain(read, paired.steps)
    prepared.run(paired, answer=lambda row: row["chosen"], limit=config.max_preferences)
    _publish(paired, bench)

    alone = tuple(source for source in given_sources if source.is_unpaired)
    single = _Kind("unpaired", tuple(source.uri for source in alone), carried_pairs(bench.previous, "unpaired"))
    if single.sources or single.carried:
        single.rows = given.given_unpaired(alone, config, single.steps, single.given)
        # As of pairs: a bad response may be toxic, which is what it is there for.
        prepared.run(single, answer=lambda row: row["response"] * row["label"], limit=config.max_preferences)
        _publish(single, bench)

    posed = _Kind("prompts", config.prompts, carried_pairs(bench.previous, "prompts"))
    if posed.sources or posed.carried:
        posed.rows = given.given_prompts(config.prompt_sources, config, posed.steps, posed.given)
        prepared.run(posed, answer=lambda row: "\n".join(row["reference"]), limit=config.max_prompts)
        _publish(posed, bench)

    kinds = (asked, paired, *(kind for kind in (single, posed) if kind.steps))
    return PairsAccount(
        prompts=posed.steps,
        instructions=asked.steps,
        preferences=paired.steps,
        unpaired=single.steps,
        published=_sizes({kind.name: kind.published for kind in kinds}),
        kinds=dict(sorted(Counter(row["kind"] for row in paired.published).items())),
        pii=dict(sorted(prepared.pii.items())),
        carried=_sizes({kind.name: kind.carried for kind in kinds}),
        sources={kind.name: kind.given for kind in kinds},
    )


def _given(sources: Iterable[Source]) -> list[Source]:
    return [source for source in sources if source.uri != DERIVED]


def _made(bench: Workbench, kind: str) -> dict[str, Path]:
    """The files with rows of a kind that stages of this run have made, by the name of the source."""
    return {name: folder / f"{kind}.jsonl" for name, folder in bench.made.items()}


def _one_chain(read: Sequence[Step], derived: Sequence[Step]) -> list[Step]:
    """The account of given rows followed by that of derived ones: what one of them does not touch passes through it."""
    if not derived:
        return list(read)
    steps = deepcopy([*read, *derived])  # instructions and preferences share a step
    entering, passed = derived[0].entered, read[-1].kept
    for step, others in [*((step, entering) for step in steps[: len(read)]),
                         *((step, passed) for step in steps[len(read) :])]:  # fmt: skip
        step.entered.merge(others)
        step.kept.merge(others)
    return steps


def _publish(kind: _Kind, bench: Workbench) -> None:
    _verify(kind)
    for split, rows in _by_split(kind.published).items():
        shown = ({key: value for key, value in row.items() if key != "heldout"} for row in rows)
        bench.publish(f"{kind.name}/{split}", shown)


def _symbols(units: int, bench: Workbench) -> Iterator[Symbol]:
    for number in range(units):
        for row in bench.rows("symbols", number):
            yield Symbol(**row)


def _by_split(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        found["heldout" if row["heldout"] else "train"].append(row)
    return found


def _sizes(kinds: Mapping[str, list[Row]]) -> dict[str, int]:
    """Rows of every kind and split, as `preferences/heldout`."""
    return {f"{name}/{split}": len(part) for name, rows in kinds.items() for split, part in _by_split(rows).items()}


def _texts(row: Row) -> list[str]:
    """All texts of a row but the rater's reason."""
    return [holder[key] for holder, key in _fields(row) if holder is not row or key != "reason"]


def _identity(row: Row) -> tuple[str, ...]:
    """What tells a row from another: its texts, and the label of a single response, of which people may differ."""
    return (*_texts(row), *([str(row["label"])] if "label" in row else []))


def _answers(row: Row) -> str:
    said = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    return "\n".join(holder[key] for turn in said for holder, key in text_fields(turn))


def _size(row: Row) -> int:
    return sum(map(utf8_size, _texts(row)))


def fair_shares(wanted: Mapping[str, int], limit: int) -> dict[str, int]:
    """Share `limit` equally. What one source does not need goes to the others; the largest get the remainder."""
    shares: dict[str, int] = {}
    for place, source in enumerate(sorted(wanted, key=lambda name: (wanted[name], name))):
        shares[source] = min(wanted[source], (limit - sum(shares.values())) // (len(wanted) - place))
    return shares


class _Preparation:
    """What every row passes before it is published."""

    def __init__(self, bench: Workbench) -> None:
        self._config = bench.config
        self._scorer = toxicity_scorer(bench.config.toxicity, bench.words)
        self._scrubber = Scrubber(bench.config.pii, enabled=bench.config.scrub_pii)
        self.pii: Counter[str] = Counter()
        """Personal data that was replaced, by type."""

    def run(self, kind: _Kind, *, answer: Callable[[Row], str], limit: int) -> None:
        """Drop duplicates, rows over the cap and toxic answers, then scrub personal data; appends a step for each.

        The cap comes before the two expensive steps, so a few rows less than the limit may be published.
        """
        rows = sorted(kind.rows, key=lambda row: stable_hash(self._config.seed, "order", row["id"]))
        repeated = self._repeated(rows, kind.carried)
        _gather_reasons(rows, repeated)
        rows = self._keep(rows, "duplicates", repeated, kind.steps)
        rows = self._keep(rows, "cap", self._over(rows, limit), kind.steps)
        scores = self._scorer.scores([answer(row) for row in rows]) if self._scorer else [0.0] * len(rows)
        toxic = ["toxic" if score >= self._config.toxicity_threshold else "" for score in scores]
        rows = self._keep(rows, "toxicity", toxic, kind.steps)
        kind.rows = self._scrubbed(rows, kind.steps)

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
        """Carried rows are already scrubbed, perhaps of fewer types: both are compared as they would be published."""
        known = {tuple(map(self._published, _identity(row))) for row in carried}
        seen: set[tuple[str, ...]] = set()
        reasons: list[str] = []
        for row in rows:
            texts = _identity(row)
            is_known = bool(known) and (tuple(map(self._published, texts)) in known)
            reasons.append("seen_before" if is_known else "duplicate" if texts in seen else "")
            seen.add(texts)
        return reasons

    def _published(self, text: str) -> str:
        return self._scrubber.scrub(text).text

    def _over(self, rows: list[Row], limit: int) -> list[str]:
        """The cap of each split is shared among the sources, so that a large one does not crowd out a small one."""
        found: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        for row in rows:
            found[row["heldout"]][source_of(row)] += 1
        limits = {False: limit, True: self._config.max_heldout_pairs}
        # Rows come in the order of the draw, so the first ones of each source fill its share.
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
            before, compared = _size(row), _compared(row)
            step.entered.add(before)
            for holder, name in _fields(row):
                result = self._scrubber.scrub(holder[name])
                holder[name] = result.text
                self.pii.update(result.counts)
            step.rewritten += before - _size(row)
            # A response is compared with this, and was never shown what stands in its place.
            if compared and compared != _compared(row):
                step.drop("personal_reference", row["id"], "", _size(row), samples=self._config.samples_per_reason)
                continue
            if "chosen" in row and row["chosen"] == row["rejected"]:  # the two differed in personal data only
                step.drop("equal_sides", row["id"], row["chosen"], _size(row), samples=self._config.samples_per_reason)
                continue
            step.kept.add(_size(row))
            kept.append(row)
        steps.append(step)
        return kept


def _gather_reasons(rows: Sequence[Row], repeated: Sequence[str]) -> None:
    """A pair that several raters preferred alike is kept once, with what each of them said."""
    kept: dict[tuple[str, ...], Row] = {}
    for row, dropped in zip(rows, repeated, strict=True):
        if "chosen" not in row or dropped == "seen_before":
            continue
        first = kept.setdefault(tuple(_texts(row)), row)
        if first is not row and "reason" in row:
            first["reason"] = joined([*first.get("reason", "").split("\n"), *row["reason"].split("\n")])


def _fields(row: Row) -> list[tuple[Any, Any]]:
    """Every text of a row as (holder, key), so that it can be replaced."""
    turns = row.get("messages") or row["prompt"]
    named = ("chosen", "rejected", "response", "reason")
    sides: list[tuple[Any, Any]] = [(row, name) for name in named if name in row]
    sides += [(row[name], place) for name in ("reference", "tests") for place in range(len(row.get(name, ())))]
    sides += [(row, "schema")] if row.get("schema") else []
    return [place for turn in turns for place in text_fields(turn)] + sides


def _compared(row: Row) -> tuple[str, ...]:
    """What responses to a prompt are compared with."""
    return (*row.get("reference", ()), *row.get("tests", ()), row.get("schema", "")) if "reference" in row else ()


def _verify(kind: _Kind) -> None:
    """Raise DataError unless the account conserves and given sources leave at least one row."""
    steps, rows = kind.steps, kind.rows
    first = next(index for index, step in enumerate(steps) if step.name == "duplicates")
    # Two chains: between them symbols become rows, or a given row becomes several pairs, so bytes differ.
    verify_chain(steps[:first])
    verify_chain(steps[first:])
    before = steps[first - 1].kept.documents if first else 0
    if before != steps[first].entered.documents or len(rows) != steps[-1].kept.documents:
        raise DataError(
            f"the ledger of {kind.name} does not conserve: {before} rows were made, "
            f"{steps[first].entered.documents} prepared, {len(rows)} published of {steps[-1].kept.documents}",
            advice="This is a defect of curation, not of the data; please report it with ledger.json.",
        )
    if kind.is_given and not any(row["origin"] == "given" for row in kind.published):
        losses = {reason: amount.documents for step in steps for reason, amount in step.dropped.items()}
        raise DataError(
            f"{kind.name}={list(kind.sources)}: no row is left of the given sources, dropped by reason: {losses}",
            advice="Check the shape of the rows; docs/DATA.md lists those that are understood.",
        )
