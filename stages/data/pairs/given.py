"""Instruction, preference and prompt rows that users bring: detect the format, adapt the rows, count losses by source.

A table mostly has one format, which its first rows show. A row that does not fit it is read as what it is, or dropped
as a bad row whose number and fields the ledger names.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

from stages.config.curate import CurateConfig
from stages.config.errors import DataError
from stages.config.sources import InstructionFormat, PreferenceFormat, PromptFormat, Source
from stages.data.curation.extract import refuse_bad_share
from stages.data.curation.ledger import Step
from stages.data.pairs import instructions, preferences, prompt_rows
from stages.data.pairs.cells import unpacked
from stages.data.pairs.labels import Coding, labels_of, numbers_in
from stages.data.pairs.margins import NONE, margin_of, require_margins
from stages.data.pairs.partners import pairs_of
from stages.data.pairs.preferences import Labelled, sides_of
from stages.data.pairs.reasons import joined
from stages.data.pairs.shapes import Fits, Fitting, Misfit, Shapes, shapes_of
from stages.data.pairs.sides import Preference
from stages.data.pairs.trees import conversations_of
from stages.data.pairs.turns import Conversation, Unusable, opening, tools_of
from stages.data.sources.hub import read_hub
from stages.data.sources.readers import data_files
from stages.data.sources.records import BadRecord, Row, is_drawn
from stages.data.sources.rows import read_rows
from stages.data.sources.storage import ROW_SUFFIXES, Unread, unread_by_reason
from stages.data.sources.streams import Stored

_NOTHING: Mapping[str, Any] = {}
_LOOKED_AT = 100
"""The format of a file is detected from the fields of this many rows."""

_NONE_MADE: Mapping[str, Path] = {}

Record = tuple[str, Row | BadRecord]
Shape = TypeVar("Shape", InstructionFormat, PreferenceFormat, PromptFormat)


@dataclass
class SourceAccount:
    """What one source held and what became of it."""

    step: Step = field(default_factory=lambda: Step("read"))
    unreadable: Step = field(default_factory=lambda: Step("read"))
    formats: Counter[str] = field(default_factory=Counter)
    """Rows of each format."""
    changes: Counter[str] = field(default_factory=Counter)
    unread: tuple[Unread, ...] = ()
    """Its files that were passed over."""
    labelled: list[tuple[str, int, Labelled]] = field(default_factory=list)
    """Responses of all its files, with their keys and sizes, that look for one of the other label."""
    misfit: DataError | None = None
    """The first of its files whose first rows fit no format."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "formats": dict(sorted(self.formats.items())),
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
    sources: Iterable[Source],
    config: CurateConfig,
    steps: list[Step],
    accounts: dict[str, dict[str, Any]],
    *,
    made: Mapping[str, Path] = _NONE_MADE,
) -> list[dict[str, Any]]:
    """Conversations of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _instructions, config, steps, accounts, made)


def given_preferences(
    sources: Iterable[Source],
    config: CurateConfig,
    steps: list[Step],
    accounts: dict[str, dict[str, Any]],
    *,
    made: Mapping[str, Path] = _NONE_MADE,
) -> list[dict[str, Any]]:
    """Preference pairs of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _preferences, config, steps, accounts, made)


def given_unpaired(
    sources: Iterable[Source], config: CurateConfig, steps: list[Step], accounts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Single labelled responses of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _unpaired, config, steps, accounts)


def given_prompts(
    sources: Iterable[Source], config: CurateConfig, steps: list[Step], accounts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Prompts of all sources in our shape; appends the step `read` and fills the accounts."""
    return _given(sources, _prompts, config, steps, accounts)


@dataclass(frozen=True)
class _Table:
    """One file of a source, or a dataset: all its rows with their ids, and the first of them for a second look."""

    name: str
    head: list[Record]
    rows: Iterator[Record]
    """All rows, those of `head` included."""
    source: Source
    account: SourceAccount
    is_alone: bool
    """Whether the source has no other table."""


Adapter = Callable[[_Table, CurateConfig], Iterator[_Outcome]]


def _given(
    sources: Iterable[Source],
    adapt: Adapter,
    config: CurateConfig,
    steps: list[Step],
    accounts: dict[str, dict[str, Any]],
    made_here: Mapping[str, Path] = _NONE_MADE,
) -> list[dict[str, Any]]:
    total = Step("read")
    made: list[dict[str, Any]] = []
    for number, source in enumerate(sources):
        account = SourceAccount()
        for table in _tables(source, number, account, made_here.get(source.uri)):
            for outcome in adapt(table, config):
                made += _counted(outcome, account, config)
        for outcome in _partnered(source, account, config):
            made += _counted(outcome, account, config)
        if account.misfit and not account.formats:
            raise account.misfit
        require_margins(source, kept=account.step.kept.documents, without=account.changes[NONE])
        total.merge(account.step, samples=config.samples_per_reason)
        accounts[source.uri] = account.to_dict()
        refuse_bad_share(source.uri, account.unreadable, config)
    steps.append(total)
    return made


def _tables(source: Source, number: int, account: SourceAccount, made: Path | None) -> Iterator[_Table]:
    """The files of a source, which may differ in format; of one that the run has `made`, that file."""
    if made is not None:
        stored = Stored(str(made.resolve()), made.name, made.stat().st_size)
        named, count = [(stored.name, stored.name, read_rows(stored))], 1
    elif source.uri.startswith("hf://"):
        named, count = [(source.uri, "", read_hub(source.uri))], 1
    else:
        found = data_files(source.uri, ROW_SUFFIXES)
        account.unread, count = found.unread, len(found.files)
        named = ((stored.name, stored.name, read_rows(stored)) for stored in found.files)
    for name, prefix, rows in named:
        records = _with_ids(rows, prefix, number)
        head = list(islice(records, _LOOKED_AT))
        yield _Table(name, head, chain(head, records), source, account, is_alone=count == 1)


def _with_ids(rows: Iterable[Row | BadRecord], name: str, number: int) -> Iterator[Record]:
    for row in rows:
        if isinstance(row, BadRecord):
            yield f"{number}/{row.id}", row
        else:
            values = unpacked(row.values)
            yield f"{number}/{name}:{row.number}", row if values is row.values else replace(row, values=values)


def _counted(outcome: _Outcome, account: SourceAccount, config: CurateConfig) -> list[dict[str, Any]]:
    account.step.entered.add(outcome.size)
    reason, sample = outcome.reason, outcome.sample
    if outcome.row is not None and not _is_utf8(outcome.row):
        reason, sample = "invalid_utf8", "the text holds a lone surrogate"  # which JSON can spell and UTF-8 cannot
    if reason:
        account.step.drop(reason, outcome.key, sample, outcome.size, samples=config.samples_per_reason)
        return []
    assert outcome.row is not None
    account.changes.update(outcome.changes)
    account.step.kept.add(outcome.size)
    return [outcome.row]


def _is_utf8(row: Mapping[str, Any]) -> bool:
    turns = row.get("messages") or row["prompt"]
    try:
        sides = (row.get(name) for name in ("chosen", "rejected", "response", "schema"))
        for text in (*(turn["content"] for turn in turns), *sides, *row.get("reference", ()), *row.get("tests", ())):
            if isinstance(text, str):
                text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unreadable(key: str, record: BadRecord, account: SourceAccount) -> _Outcome:
    account.unreadable.entered.add(record.size)
    account.unreadable.lost += record.lost
    account.unreadable.drop(record.reason, key, record.sample, record.size, samples=1)
    return _Outcome(key, record.size, None, record.reason, record.sample)


def _misfit(key: str, row: Row, found: Misfit, account: SourceAccount) -> _Outcome:
    """A row that fits no format: it counts as a bad one, and the ledger says which row it is and what it has."""
    why = f"row {row.number}: {found.why}"
    account.unreadable.entered.add(row.size)
    account.unreadable.drop(found.reason, f"{key} ({found.why})", why, row.size, samples=1)
    return _Outcome(key, row.size, None, found.reason, why)


def _shapes(table: _Table, formats: type[Shape], fits: Fits[Shape], fitting: Fitting[Shape]) -> Shapes[Shape]:
    """What the first rows of the table show.

    Raises DataError when they fit several formats and no single row decides, or when the only table of a source fits
    none; of other tables the error waits until it is clear that the whole source fits none.
    """
    source, account = table.source, table.account
    head = [record.values for _, record in table.head if isinstance(record, Row)]
    found = shapes_of(head, fits, fitting, stated=formats(source.format) if source.format else None)
    if found.seen or not head:
        return found
    what = (
        f"fit {' and '.join(found.ambiguous)}" if found.ambiguous else f"fit none of the formats {', '.join(formats)}"
    )
    example = f"{source.uri}#format={next(iter(found.ambiguous or formats))}"
    error = DataError(
        f"source {source.uri!r}: the fields of {table.name} {what}; found: {', '.join(sorted(found.fields)) or 'none'}",
        advice=f"Name the format after the source, as in {example}"
        + ("." if found.ambiguous else ", or rename the fields; docs/DATA.md lists what each format needs."),
    )
    if found.ambiguous or table.is_alone:
        raise error
    account.misfit = account.misfit or error
    return found


@dataclass(frozen=True)
class _Shaped(Generic[Shape]):
    """A row with its id and its format."""

    key: str
    row: Row
    shape: Shape


def _shaped(table: _Table, shapes: Shapes[Shape]) -> Iterator[_Shaped[Shape] | _Outcome]:
    """Every row with its format; one that cannot be read or has no format comes as its outcome."""
    account = table.account
    for key, record in table.rows:
        if isinstance(record, BadRecord):
            yield _unreadable(key, record, account)
            continue
        shape = shapes.of(record.values)
        if isinstance(shape, Misfit):
            yield _misfit(key, record, shape, account)
            continue
        account.unreadable.entered.add(record.size)
        account.formats[shape.value] += 1
        yield _Shaped(key, record, shape)


def _instructions(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    messages: dict[str, Row] = {}
    for shaped in _shaped(table, _shapes(table, InstructionFormat, instructions.fits, instructions.fitting_formats)):
        if isinstance(shaped, _Outcome):
            yield shaped
        elif shaped.shape is InstructionFormat.OASST:
            messages[shaped.key] = shaped.row
        else:
            yield from _conversations(shaped, table.source, config)
    yield from _joined(messages, table.source, config)


def _conversations(shaped: _Shaped[InstructionFormat], source: Source, config: CurateConfig) -> Iterator[_Outcome]:
    row = shaped.row
    try:
        found, tools = instructions.to_conversations(shaped.shape, row.values), tools_of(row.values)
    except Unusable as error:
        found, tools = [error], {}
    for key, size, made in _shared(shaped.key, row.size, found):
        if isinstance(made, Unusable):
            yield _Outcome(key, size, None, made.reason, str(row.values))
        else:
            ours = {**_instruction_row(key, made, source, config), **tools}
            yield _Outcome(key, size, ours, changes=made.changes)


Made = TypeVar("Made")


def _shared(key: str, size: int, found: Sequence[Made]) -> Iterator[tuple[str, int, Made]]:
    """What became of one row, each part with an id of its own and its share of the row's bytes."""
    share, rest = divmod(size, len(found))
    for place, made in enumerate(found):
        yield f"{key}/{place}" if len(found) > 1 else key, share + (rest if place == 0 else 0), made


def _joined(rows: Mapping[str, Row], source: Source, config: CurateConfig) -> Iterator[_Outcome]:
    """The messages of a table are joined at its end, because a reply may come before the message that it answers."""
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


def _prompts(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    for shaped in _shaped(table, _shapes(table, PromptFormat, prompt_rows.fits, prompt_rows.fitting_formats)):
        if isinstance(shaped, _Outcome):
            yield shaped
            continue
        key, row = shaped.key, shaped.row
        try:
            made, tools = prompt_rows.to_prompt(shaped.shape, row.values), tools_of(row.values)
        except Unusable as error:
            yield _Outcome(key, row.size, None, error.reason, str(row.values))
            continue
        heldout = is_drawn(config.heldout_fraction, config.seed, "heldout", opening(made.messages))
        ours = {"id": key, **made.to_dict(), "group": table.source.uri, "origin": "given", "heldout": heldout, **tools}
        yield _Outcome(key, row.size, ours)


def _preferences(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    source, account = table.source, table.account
    shapes = _shapes(table, PreferenceFormat, preferences.fits, preferences.fitting_formats)
    head = [record.values for _, record in table.head if isinstance(record, Row)]
    numbers = numbers_in(values for values in head if sides_of(values))
    coding = Coding(source.first, source.second, numbers)
    _require_clear_labels(table, shapes, coding)
    for shaped in _shaped(table, shapes):
        if isinstance(shaped, _Outcome):
            yield shaped
            continue
        row = shaped.row
        try:
            tools = tools_of(row.values)
            if shaped.shape is PreferenceFormat.LABELLED:
                if tools:  # its partner would need the same ones
                    raise Unusable("labelled_with_tools")
                account.labelled.append((shaped.key, row.size, preferences.to_labelled(row.values)))
                continue
            found = preferences.to_preferences(shaped.shape, row.values, coding)
        except Unusable as error:
            found, tools = [error.reason], {}
        for key, size, made in _shared(shaped.key, row.size, found):
            if isinstance(made, str):
                yield _Outcome(key, size, None, made, str(row.values))
            else:
                yield _preferred(key, size, made, source, config, values=row.values, more=tools)


def _require_clear_labels(table: _Table, shapes: Shapes[PreferenceFormat], coding: Coding) -> None:
    """Raise DataError when the first rows have labels that may mean either response."""
    for _, record in table.head:
        if not isinstance(record, Row) or shapes.of(record.values) is not PreferenceFormat.PAIRWISE:
            continue
        try:
            preferences.to_preferences(PreferenceFormat.PAIRWISE, record.values, coding)
        except Unusable as error:
            sides, uri = sides_of(record.values), table.source.uri
            if error.reason == "unclear_label" and sides:
                label = labels_of(record.values)[0][0]
                raise DataError(
                    f"source {uri!r}: label {label!r} of row {record.number} of {table.name} may mean "
                    f"{sides.names[0]} or {sides.names[1]}",
                    advice=f"Say after the source which label means the first and which the second response, as in "
                    f"{uri}#first=0&second=1 or {uri}#first=1&second=0.",
                ) from None


def _partnered(source: Source, account: SourceAccount, config: CurateConfig) -> Iterator[_Outcome]:
    """Labelled responses find their partners when the whole source is read: they may be in different files."""
    sizes = {key: size for key, size, _ in account.labelled}
    for made in pairs_of([(key, labelled) for key, _, labelled in account.labelled]):
        if made.pair is None:
            yield _Outcome(made.key, sizes[made.key], None, made.reason, made.sample)
        else:
            yield _preferred(made.key, sizes[made.key], made.pair, source, config)
    account.labelled.clear()


def _reason(source: Source, said: str) -> dict[str, str]:
    """What a rater said, and what the source says of all its rows; no field where neither says anything."""
    reason = joined([", ".join(source.area.split("+")), *said.split("\n")])
    return {"reason": reason} if reason else {}


def _preferred(
    key: str,
    size: int,
    made: Preference,
    source: Source,
    config: CurateConfig,
    *,
    values: Mapping[str, Any] = _NOTHING,
    more: Mapping[str, Any] = _NOTHING,
) -> _Outcome:
    """A pair in our shape, with its margin where the source has one; `values` is the row that it comes from."""
    margin = margin_of(source.margin, made, values) if source.margin else None
    ours = {**_preference_row(key, made, source, config), **more, **({"margin": margin.value} if margin else {})}
    return _Outcome(key, size, ours, changes=(*made.changes, *(margin.changes if margin else ())))


def _preference_row(key: str, made: Preference, source: Source, config: CurateConfig) -> dict[str, Any]:
    prompt = [dict(message) for message in made.prompt]
    return {
        "id": key,
        "prompt": prompt,
        "chosen": made.chosen,
        "rejected": made.rejected,
        "kind": "given",
        "group": source.uri,
        "origin": "given",
        **_reason(source, made.reason),
        "heldout": is_drawn(config.heldout_fraction, config.seed, "heldout", opening(prompt)),
    }


def _unpaired(table: _Table, config: CurateConfig) -> Iterator[_Outcome]:
    shapes = _shapes(table, PreferenceFormat, preferences.fits, preferences.fitting_formats)
    for shaped in _shaped(table, shapes):
        if isinstance(shaped, _Outcome):
            yield shaped
            continue
        key, row = shaped.key, shaped.row
        try:
            if shaped.shape is not PreferenceFormat.UNPAIRED:
                raise Unusable("not_labelled")
            found, tools = preferences.to_labelled(row.values), tools_of(row.values)
        except Unusable as error:
            yield _Outcome(key, row.size, None, error.reason, str(row.values))
            continue
        prompt = [dict(message) for message in found.prompt]
        ours = {
            "id": key,
            "prompt": prompt,
            "response": found.response,
            "label": found.is_good,
            "group": table.source.uri,
            "origin": "given",
            **_reason(table.source, found.reason),
            "heldout": is_drawn(config.heldout_fraction, config.seed, "heldout", opening(prompt)),
            **tools,
        }
        yield _Outcome(key, row.size, ours)
