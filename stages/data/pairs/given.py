"""Instruction and preference rows that users bring: detect the format, adapt the rows, count losses by source."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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
from stages.data.pairs.turns import Conversation, Unusable, opening, tools_of
from stages.data.sources.hub import read_hub
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, is_drawn
from stages.data.sources.rows import Row, read_rows
from stages.data.sources.storage import ROW_SUFFIXES, Unread, unread_by_reason

_LOOKED_AT = 100
"""The format of a file is detected from the fields of this many rows."""

Record = tuple[str, Row | BadRecord]
Shape = TypeVar("Shape", InstructionFormat, PreferenceFormat)


@dataclass
class SourceAccount:
    """What one source held and what became of it."""

    step: Step = field(default_factory=lambda: Step("read"))
    unreadable: Step = field(default_factory=lambda: Step("read"))
    formats: set[str] = field(default_factory=set)
    changes: Counter[str] = field(default_factory=Counter)
    unread: tuple[Unread, ...] = ()
    """Its files that were passed over."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "formats": sorted(self.formats),
            "in": self.step.entered.documents,
            "kept": self.step.kept.documents,
            "dropped": {reason: amount.documents for reason, amount in sorted(self.step.dropped.items())},
            "changed": dict(sorted(self.changes.items())),
            **({"unread": unread_by_reason(self.unread)} if self.unread else {}),
        }


@dataclass(frozen=True)
class _Outcome:
    """One row in our shape, or the reason why there is none, with its share of the given row's bytes."""

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


@dataclass(frozen=True)
class _Table:
    """One file of a source, or a dataset: all its rows with their ids, and the first of them for a second look."""

    name: str
    head: list[Record]
    rows: Iterator[Record]
    """All rows, those of `head` included."""
    source: Source
    account: SourceAccount


Adapter = Callable[[_Table, CurateConfig], Iterator[_Outcome]]


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
        for table in _tables(source, number, account):
            for outcome in adapt(table, config):
                made += _counted(outcome, account, config)
        total.merge(account.step, samples=config.samples_per_reason)
        accounts[source.uri] = account.to_dict()
        refuse_bad_share(source.uri, account.unreadable, config)
    steps.append(total)
    return made


def _tables(source: Source, number: int, account: SourceAccount) -> Iterator[_Table]:
    """The files of a source, which may differ in format."""
    if source.uri.startswith("hf://"):
        named = [(source.uri, "", read_hub(source.uri))]
    else:
        found = data_files(source.uri, ROW_SUFFIXES)
        account.unread = found.unread
        named = ((stored.name, stored.name, read_rows(stored)) for stored in found.files)
    for name, prefix, rows in named:
        records = _with_ids(rows, prefix, number)
        head = list(islice(records, _LOOKED_AT))
        yield _Table(name, head, chain(head, records), source, account)


def _with_ids(rows: Iterable[Row | BadRecord], name: str, number: int) -> Iterator[Record]:
    for row in rows:
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
    account.unreadable.lost += record.lost
    account.unreadable.drop(record.reason, key, record.sample, record.size, samples=1)
    return _Outcome(key, record.size, None, record.reason, record.sample)


def _format(table: _Table, formats: type[Shape], fitting: Callable[[Any], list[Shape]]) -> Shape | None:
    """The format named after the source, or the only one that fits the fields of the table's first rows.

    None when none of these rows can be read; raises DataError when no format or more than one fits.
    """
    source = table.source
    if source.format:
        return formats(source.format)
    values: dict[str, Any] = {}
    for _, record in table.head:
        for field_name, value in record.values.items() if isinstance(record, Row) else ():
            # Later rows fill in what is empty: an empty list of turns does not show the fields of a turn.
            if value is not None and not values.get(field_name):
                values[field_name] = value
    if not any(isinstance(record, Row) for _, record in table.head):
        return None
    found = fitting(values)
    if len(found) == 1:
        return found[0]
    what = f"fit {' and '.join(found)}" if found else f"fit none of the formats {', '.join(formats)}"
    example = f"{source.uri}#format={next(iter(found or formats))}"
    raise DataError(
        f"source {source.uri!r}: the fields of {table.name} {what}; found: {', '.join(sorted(values)) or 'none'}",
        advice=f"Name the format after the source, as in {example}"
        + ("." if found else ", or rename the fields; docs/DATA.md lists what each format needs."),
    )


def _entered(table: _Table, shape: Shape | None) -> Iterator[tuple[str, Row | _Outcome]]:
    """Count every row; one that cannot be read comes as its outcome.

    Raises DataError at a readable row of a table whose format is not known, because its first rows are unreadable.
    """
    for key, record in table.rows:
        if isinstance(record, BadRecord):
            yield key, _unreadable(key, record, table.account)
        elif shape is None:
            uri = table.source.uri
            raise DataError(
                f"source {uri!r}: none of the first {_LOOKED_AT} rows of {table.name} can be read "
                f"({_first_reason(table)}), so the format of the later ones is not known",
                advice=f"Check the file, or name the format after the source: {uri}#format=...",
            )
        else:
            table.account.unreadable.entered.add(record.size)
            yield key, record


def _first_reason(table: _Table) -> str:
    return next((record.reason for _, record in table.head if isinstance(record, BadRecord)), "nothing")


def _instructions(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    source, account = table.source, table.account
    shape = _format(table, InstructionFormat, instructions.fitting_formats)
    if shape:
        account.formats.add(shape)
    if shape is InstructionFormat.OASST:
        yield from _joined(table, config)
        return
    for key, record in _entered(table, shape):
        if isinstance(record, _Outcome):
            yield record
            continue
        assert shape is not None
        try:
            made = instructions.to_conversation(shape, record.values)
            tools = tools_of(record.values)
        except Unusable as error:
            yield _Outcome(key, record.size, None, error.reason, str(record.values))
        else:
            yield _Outcome(
                key, record.size, {**_instruction_row(key, made, source, config), **tools}, changes=made.changes
            )


def _joined(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    """A table of messages is read whole, because a reply may come before the message that it answers."""
    rows: dict[str, Row] = {}
    for key, record in _entered(table, InstructionFormat.OASST):
        if isinstance(record, _Outcome):
            yield record
        else:
            rows[key] = record
    for made in conversations_of([(key, row.values) for key, row in rows.items()]):
        row, size = rows[made.key], rows[made.key].size
        if made.conversation is None:
            yield _Outcome(made.key, size, None, made.reason, str(row.values))
        else:
            ours = _instruction_row(made.key, made.conversation, table.source, config)
            yield _Outcome(made.key, size, ours, changes=made.conversation.changes)


def _instruction_row(key: str, made: Conversation, source: Source, config: CurateConfig) -> dict[str, Any]:
    messages = [dict(message) for message in made.messages]
    heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", opening(messages))
    return {"id": key, "messages": messages, "group": source.uri, "origin": "given", "heldout": heldout}


def _preferences(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    source, account = table.source, table.account
    shape = _format(table, PreferenceFormat, preferences.fitting_formats)
    if shape:
        account.formats.add(shape)
    for key, record in _entered(table, shape):
        if isinstance(record, _Outcome):
            yield record
            continue
        assert shape is not None
        try:
            found, tools = preferences.to_preferences(shape, record.values), tools_of(record.values)
        except Unusable as error:
            found, tools = [error.reason], {}
        share, rest = divmod(record.size, len(found))
        for place, made in enumerate(found):
            size, ours = share + (rest if place == 0 else 0), f"{key}/{place}" if len(found) > 1 else key
            if isinstance(made, str):
                yield _Outcome(ours, size, None, made, str(record.values))
            else:
                yield _Outcome(ours, size, {**_preference_row(ours, made, source, config), **tools})


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
