"""Instruction and preference rows that users bring: told by their fields, adapted, counted by reason and source."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.sources import InstructionFormat, PreferenceFormat, Source
from stages.data.curation.extract import refuse_bad_share
from stages.data.curation.ledger import Step
from stages.data.pairs import instructions, preferences
from stages.data.pairs.trees import conversations_of
from stages.data.pairs.turns import Conversation, Unusable, opening
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, is_drawn
from stages.data.sources.rows import ROW_SUFFIXES, Row, read_hub, read_rows

_LOOKED_AT = 100
"""Rows of a file whose fields decide about its format."""

Record = tuple[str, Row | BadRecord]
Shape = TypeVar("Shape", InstructionFormat, PreferenceFormat)


@dataclass
class SourceAccount:
    """What one source held and what became of it."""

    step: Step = field(default_factory=lambda: Step("read"))
    unreadable: Step = field(default_factory=lambda: Step("read"))
    formats: set[str] = field(default_factory=set)
    changes: Counter[str] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        return {
            "formats": sorted(self.formats),
            "in": self.step.entered.documents,
            "kept": self.step.kept.documents,
            "dropped": {reason: amount.documents for reason, amount in sorted(self.step.dropped.items())},
            "changed": dict(sorted(self.changes.items())),
        }


@dataclass(frozen=True)
class _Outcome:
    """One row of ours, or a reason, with the share of the given row's bytes that it stands for."""

    key: str
    size: int
    row: dict[str, Any] | None
    reason: str = ""
    sample: str = ""
    changes: tuple[str, ...] = ()


def given_instructions(
    sources: Iterable[Source], config: CurateConfig, steps: list[Step], accounts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Conversations of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _instructions, config, steps, accounts)


def given_preferences(
    sources: Iterable[Source], config: CurateConfig, steps: list[Step], accounts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Preference pairs of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _preferences, config, steps, accounts)


Adapter = Callable[[str, list[Record], Iterator[Record], Source, SourceAccount, CurateConfig], Iterator[_Outcome]]


def _given(
    sources: Iterable[Source],
    adapt: Adapter,
    config: CurateConfig,
    steps: list[Step],
    accounts: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    total = Step("read")
    made: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        account = SourceAccount()
        for name, records in _tables(source, number):
            head = list(islice(records, _LOOKED_AT))
            for outcome in adapt(name, head, chain(head, records), source, account, config):
                made += _counted(outcome, account, config)
        total.merge(account.step, samples=config.samples_per_reason)
        accounts[source.uri] = account.to_dict()
        refuse_bad_share(source.uri, account.unreadable, config)
    steps.append(total)
    return made


def _tables(source: Source, number: int) -> Iterator[tuple[str, Iterator[Record]]]:
    """The files of a source, whose formats may differ, each with its rows and their ids."""
    if source.uri.startswith("hf://"):
        rows = read_hub(source.uri)
        yield source.uri, ((row.id if isinstance(row, BadRecord) else f"{number}/:{row.number}", row) for row in rows)
        return
    for stored in data_files(source.uri, ROW_SUFFIXES):
        yield stored.name, _rows_of(stored.uri, stored.name, number)


def _rows_of(uri: str, name: str, number: int) -> Iterator[Record]:
    for row in read_rows(uri, name):
        yield f"{number}/{row.id if isinstance(row, BadRecord) else f'{name}:{row.number}'}", row


def _counted(outcome: _Outcome, account: SourceAccount, config: CurateConfig) -> list[dict[str, Any]]:
    account.step.entered.add(outcome.size)
    account.changes.update(outcome.changes)
    if outcome.row is None:
        samples = config.samples_per_reason
        account.step.drop(outcome.reason, outcome.key, outcome.sample, outcome.size, samples=samples)
        return []
    account.step.kept.add(outcome.size)
    return [outcome.row]


def _unreadable(key: str, record: BadRecord, account: SourceAccount) -> _Outcome:
    account.unreadable.entered.add(record.size)
    account.unreadable.drop(record.reason, key, record.sample, record.size, samples=1)
    return _Outcome(key, record.size, None, record.reason, record.sample)


def _format(
    name: str, head: Sequence[Record], source: Source, formats: type[Shape], fitting: Callable[[Any], list[Shape]]
) -> Shape | None:
    """The format that the source is said to have, or the only one that fits the fields of a file's first rows.

    None when none of these rows can be read; raises DataError when no format or more than one fits.
    """
    if source.format:
        return formats(source.format)
    values: dict[str, Any] = {}
    for _, record in head:
        for field_name, value in record.values.items() if isinstance(record, Row) else ():
            if value is not None and not values.get(field_name):  # an empty list of turns does not tell their fields
                values[field_name] = value
    if not any(isinstance(record, Row) for _, record in head):
        return None
    found = fitting(values)
    if len(found) == 1:
        return found[0]
    what = f"fit {' and '.join(found)}" if found else f"fit none of the formats {', '.join(formats)}"
    example = f"{source.uri}#format={next(iter(found or formats))}"
    raise DataError(
        f"source {source.uri!r}: the fields of {name} {what}; found: {', '.join(sorted(values)) or 'none'}",
        advice=f"Say which it is behind the source, as in {example}"
        + ("." if found else ", or rename the fields; docs/DATA.md lists what each format needs."),
    )


def _instructions(
    name: str,
    head: list[Record],
    records: Iterator[Record],
    source: Source,
    account: SourceAccount,
    config: CurateConfig,
) -> Iterator[_Outcome]:
    shape = _format(name, head, source, InstructionFormat, instructions.fitting_formats)
    if shape:
        account.formats.add(shape)
    if shape is InstructionFormat.OASST:
        yield from _joined(records, source, account, config)
        return
    for key, record in records:
        if isinstance(record, BadRecord) or shape is None:
            assert isinstance(record, BadRecord)
            yield _unreadable(key, record, account)
            continue
        account.unreadable.entered.add(record.size)
        try:
            made = instructions.to_conversation(shape, record.values)
        except Unusable as error:
            yield _Outcome(key, record.size, None, error.reason, str(record.values))
        else:
            yield _Outcome(key, record.size, _instruction_row(key, made, source, config), changes=made.changes)


def _joined(
    records: Iterator[Record], source: Source, account: SourceAccount, config: CurateConfig
) -> Iterator[_Outcome]:
    """A table of messages is read whole, for a reply may stand before what it replies to."""
    rows: dict[str, Row] = {}
    for key, record in records:
        if isinstance(record, BadRecord):
            yield _unreadable(key, record, account)
        else:
            account.unreadable.entered.add(record.size)
            rows[key] = record
    for made in conversations_of([(key, row.values) for key, row in rows.items()]):
        row, size = rows[made.key], rows[made.key].size
        if made.conversation is None:
            yield _Outcome(made.key, size, None, made.reason, str(row.values))
        else:
            ours = _instruction_row(made.key, made.conversation, source, config)
            yield _Outcome(made.key, size, ours, changes=made.conversation.changes)


def _instruction_row(key: str, made: Conversation, source: Source, config: CurateConfig) -> dict[str, Any]:
    messages = [dict(message) for message in made.messages]
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", opening(messages))
    return {"id": key, "messages": messages, "group": source.uri, "origin": "given", "heldout": heldout}


def _preferences(
    name: str,
    head: list[Record],
    records: Iterator[Record],
    source: Source,
    account: SourceAccount,
    config: CurateConfig,
) -> Iterator[_Outcome]:
    shape = _format(name, head, source, PreferenceFormat, preferences.fitting_formats)
    if shape:
        account.formats.add(shape)
    for key, record in records:
        if isinstance(record, BadRecord) or shape is None:
            assert isinstance(record, BadRecord)
            yield _unreadable(key, record, account)
            continue
        account.unreadable.entered.add(record.size)
        try:
            found = preferences.to_preferences(shape, record.values)
        except Unusable as error:
            found = [error.reason]
        share, rest = divmod(record.size, len(found))
        for place, made in enumerate(found):
            size, ours = share + (rest if place == 0 else 0), f"{key}/{place}" if len(found) > 1 else key
            if isinstance(made, str):
                yield _Outcome(ours, size, None, made, str(record.values))
            else:
                yield _Outcome(ours, size, _preference_row(ours, made, source, config))


def _preference_row(key: str, made: preferences.Preference, source: Source, config: CurateConfig) -> dict[str, Any]:
    prompt = [dict(message) for message in made.prompt]
    return {
        "id": key,
        "prompt": prompt,
        "chosen": made.chosen,
        "rejected": made.rejected,
        "kind": "given",
        "group": source.uri,
        "origin": "given",
        "heldout": is_drawn(config.heldout_fraction, config.seed, "heldout", opening(prompt)),
    }
