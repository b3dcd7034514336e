"""Items of a benchmark, read from rows whose fields tell the format. A row that is no item is counted with a reason.

A benchmark of which a part is missing is another benchmark: more than a few such rows, or a damaged file, is an error
that names them.
"""

import math
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from stages.config.benchmarks import Benchmark, BenchmarkFormat
from stages.config.errors import DataError
from stages.data.pairs.cells import number_of
from stages.data.sources.records import BadRecord, Row
from stages.data.sources.rows import parse_json

MOST_BAD = 0.05
"""Largest share of rows that are no items."""
_ROWS_SHOWN = 5
_LOOKED_AT = 100
Item = TypeVar("Item")


@dataclass(frozen=True)
class Option:
    """One of the texts to choose from, each with what comes before it."""

    context: str
    text: str


@dataclass(frozen=True)
class ChoiceItem:
    """Which option is right? Several may be."""

    id: str
    options: tuple[Option, ...]
    gold: tuple[int, ...]
    cluster: str = ""


@dataclass(frozen=True)
class ContinuationItem:
    """How likely is this text after that one?"""

    id: str
    context: str
    continuation: str
    cluster: str = ""


@dataclass(frozen=True)
class AnswerItem:
    """What does the model write, and is it one of the expected answers?"""

    id: str
    question: str
    answers: tuple[str, ...]
    cluster: str = ""


@dataclass(frozen=True)
class PromptItem:
    """A request that a model should refuse, or that it should not."""

    id: str
    prompt: str
    harmful: bool
    cluster: str = ""


AnyItem = ChoiceItem | ContinuationItem | AnswerItem | PromptItem


@dataclass(frozen=True)
class Items:
    """All usable items of a benchmark, in the order of the rows."""

    format: BenchmarkFormat
    items: tuple[AnyItem, ...]
    bad: Mapping[str, int]
    """Rows that are no items, by reason."""


class NoItemError(Exception):
    """Why a row is no item; the message is the reason that is counted."""


def read_items(benchmark: Benchmark, rows: Iterable[tuple[str, Row | BadRecord]]) -> Items:
    """Turn rows into items; raises DataError for a benchmark that cannot be used."""
    where = f"benchmark {benchmark.uri!r}"
    readable: list[tuple[str, Row]] = []
    bad: list[tuple[str, str]] = []
    for name, row in rows:
        if isinstance(row, Row):
            readable.append((f"{name}:{row.number}" if name else str(row.number), row))
        elif row.lost:
            raise DataError(
                f"{where} is damaged at {row.id} ({row.reason}): {row.sample}",
                advice="Write the file again: part of a benchmark is another benchmark.",
            )
        else:
            bad.append((row.id, row.reason))
    if not readable:
        raise DataError(
            f"{where} holds no row that can be read{_shown(bad)}",
            advice="Give a file with at least one item, in UTF-8.",
        )
    form = benchmark.format or detected_format(where, [row for _, row in readable])
    items: list[AnyItem] = []
    seen: set[str] = set()
    for key, row in readable:
        try:
            item = _as_item(form, row.values, key)
            if item.id in seen:
                raise NoItemError("duplicate_id")
        except NoItemError as error:
            bad.append((key, str(error)))
            continue
        seen.add(item.id)
        items.append(item)
    if not items or len(bad) > MOST_BAD * (len(items) + len(bad)):
        raise DataError(
            f"{where}, read as {form.value}: {len(bad)} of {len(items) + len(bad)} rows are no items{_shown(bad)}",
            advice=f"Correct the rows, or leave them out. {FORMATS_HELP[form]}",
        )
    return Items(form, tuple(evenly_spaced(items, benchmark.limit)), Counter(reason for _, reason in bad))


def evenly_spaced(items: Sequence[Item], limit: int) -> list[Item]:
    """At most `limit` items from all parts of the benchmark; all where it is 0."""
    if not limit or len(items) <= limit:
        return list(items)
    return [items[int(place)] for place in np.linspace(0, len(items) - 1, num=limit).astype(int)]


def detected_format(where: str, rows: Sequence[Row]) -> BenchmarkFormat:
    """The format that the fields of the first rows show; raises DataError when they show none."""
    fields = {name for row in rows[:_LOOKED_AT] for name, value in row.values.items() if value not in (None, "")}
    for form, needed in _NEEDED.items():
        if all(any(name in fields for name in names) for names in needed):
            return form
    raise DataError(
        f"{where} has the fields {sorted(fields)}, which are those of no format",
        advice=" ".join(FORMATS_HELP.values()),
    )


def _shown(bad: Sequence[tuple[str, str]]) -> str:
    if not bad:
        return ""
    rows = ", ".join(f"row {key}: {reason}" for key, reason in bad[:_ROWS_SHOWN])
    return f" ({rows}{', ...' if len(bad) > _ROWS_SHOWN else ''})"


_QUERY = ("query", "question", "prompt", "ctx", "context")
_CHOICES = ("choices", "options", "endings")
_GOLD = ("gold", "answer", "label", "answerKey", "target")
_QUESTION = ("question", "query", "prompt", "input")
_ANSWERS = ("answer", "answers", "target", "output")

_NEEDED: dict[BenchmarkFormat, tuple[tuple[str, ...], ...]] = {
    # A benchmark of choices has what one of answers has, and more, so it comes first.
    BenchmarkFormat.TRUTHFULQA: (("Question",), ("Best Answer",), ("Incorrect Answers",)),
    BenchmarkFormat.REFUSALS: (("prompt",), ("harmful",)),
    BenchmarkFormat.CHOICES: (_QUERY, _CHOICES),
    BenchmarkFormat.CONTINUATION: (("context",), ("continuation",)),
    BenchmarkFormat.ANSWERS: (_QUESTION, _ANSWERS),
}
FORMATS_HELP: dict[BenchmarkFormat, str] = {
    BenchmarkFormat.TRUTHFULQA: "truthfulqa: Question, Best Answer, Incorrect Answers (separated by semicolons).",
    BenchmarkFormat.REFUSALS: "refusals: prompt, harmful (true or false).",
    BenchmarkFormat.CHOICES: "choices: query, choices (a list of at least two texts), gold (a place, from 0, a letter, "
    "or the text of a choice).",
    BenchmarkFormat.CONTINUATION: "continuation: context, continuation.",
    BenchmarkFormat.ANSWERS: "answers: question, answer (a text or a list of texts).",
}


def _as_item(form: BenchmarkFormat, values: Mapping[str, Any], key: str) -> AnyItem:
    given = next((values[name] for name in ("id", "item_id", "doc_id") if values.get(name) not in (None, "")), key)
    cluster = "" if values.get("cluster") is None else str(values["cluster"])
    common = {"id": str(given), "cluster": cluster}
    match form:
        case BenchmarkFormat.CHOICES:
            item = _choice(values, common)
        case BenchmarkFormat.TRUTHFULQA:
            item = _truthful(values, common)
        case BenchmarkFormat.CONTINUATION:
            item = _continuation(values, common)
        case BenchmarkFormat.ANSWERS:
            question, answers = _text(values, _QUESTION, "question"), _answers(values)
            item = AnswerItem(question=question, answers=answers, **common)
        case BenchmarkFormat.REFUSALS:
            prompt, harmful = _text(values, ("prompt",), "prompt"), _truth(values.get("harmful"))
            item = PromptItem(prompt=prompt, harmful=harmful, **common)
    try:
        "".join(_texts_of(item)).encode()
    except UnicodeEncodeError:  # half a character, which JSON can spell and UTF-8 cannot
        raise NoItemError("invalid_utf8") from None
    return item


def _texts_of(item: AnyItem) -> Iterable[str]:
    yield from (item.id, item.cluster)
    match item:
        case ChoiceItem():
            yield from (text for option in item.options for text in (option.context, option.text))
        case ContinuationItem():
            yield from (item.context, item.continuation)
        case AnswerItem():
            yield from (item.question, *item.answers)
        case PromptItem():
            yield item.prompt


def _choice(values: Mapping[str, Any], common: Mapping[str, str]) -> ChoiceItem:
    query = _text(values, _QUERY, "query")
    choices, letters = _choices(_value(values, _CHOICES))
    if len(choices) < 2:
        raise NoItemError("one_choice" if choices else "missing_choices")
    if any(not choice.strip() for choice in choices):
        raise NoItemError("empty_choice")
    if len(set(choices)) < len(choices):
        raise NoItemError("repeated_choice")
    gold = _gold(_value(values, _GOLD), choices, letters)
    return ChoiceItem(options=tuple(Option(query, choice) for choice in choices), gold=gold, **common)


def _choices(found: Any) -> tuple[list[str], list[str]]:
    """The texts, and the letters or numbers that stand for them."""
    if isinstance(found, str):
        found = _list(found)
    if isinstance(found, Mapping):  # as ARC has them: {"text": [...], "label": [...]}
        texts, letters = found.get("text"), found.get("label")
        if isinstance(texts, list) and isinstance(letters, list) and len(texts) == len(letters):
            return [str(text) for text in texts], [str(letter) for letter in letters]
        found = list(found.values())
    if not isinstance(found, list):
        raise NoItemError("missing_choices")
    if any(not isinstance(choice, str | int | float) for choice in found):
        raise NoItemError("missing_choices")
    return [str(choice) for choice in found], []


def _gold(found: Any, choices: Sequence[str], letters: Sequence[str]) -> tuple[int, ...]:
    if isinstance(found, str) and found.lstrip().startswith("["):
        found = _list(found)
    if isinstance(found, list):
        places = tuple(sorted({place for one in found for place in _gold(one, choices, letters)}))
        if not places:
            raise NoItemError("missing_gold")
        return places
    if found is None or (isinstance(found, str) and not found.strip()):
        raise NoItemError("missing_gold")
    if isinstance(found, str):
        for names in (letters, choices, list(string.ascii_uppercase[: len(choices)])):
            if found.strip() in names:
                return (names.index(found.strip()),)
    place = number_of(found)
    if place is None or math.inf in (place, -place) or place != int(place):
        raise NoItemError("gold_is_no_choice")
    if not 0 <= place < len(choices):
        raise NoItemError("gold_out_of_range")
    return (int(place),)


def _truthful(values: Mapping[str, Any], common: Mapping[str, str]) -> ChoiceItem:
    """As TruthfulQA's MC1: its best answer among the incorrect ones."""
    question, best = _text(values, ("Question",), "query"), _text(values, ("Best Answer",), "gold")
    wrong = [text.strip() for text in str(values.get("Incorrect Answers") or "").split(";") if text.strip()]
    choices = [best.strip(), *(text for text in dict.fromkeys(wrong) if text != best.strip())]
    if len(choices) < 2:
        raise NoItemError("one_choice")
    return ChoiceItem(options=tuple(Option(f"Q: {question}\nA:", choice) for choice in choices), gold=(0,), **common)


def _continuation(values: Mapping[str, Any], common: Mapping[str, str]) -> ContinuationItem:
    context = values.get("context")
    if not isinstance(context, str):  # an empty one is allowed: the text is then measured from its beginning
        raise NoItemError("missing_context")
    return ContinuationItem(context=context, continuation=_text(values, ("continuation",), "continuation"), **common)


def _answers(values: Mapping[str, Any]) -> tuple[str, ...]:
    found = _value(values, _ANSWERS)
    if isinstance(found, Mapping):  # as TriviaQA and SQuAD have them
        found = found.get("aliases") or found.get("text") or found.get("value")
    given = found if isinstance(found, list) else [found]
    answers = tuple(str(one).strip() for one in given if isinstance(one, str | int | float) and str(one).strip())
    if not answers:
        raise NoItemError("missing_answer")
    return answers


def _truth(found: Any) -> bool:
    match str(found).strip().lower():
        case "true" | "1" | "yes" | "harmful":
            return True
        case "false" | "0" | "no" | "harmless":
            return False
        case _:
            raise NoItemError("missing_harmful")


def _value(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)


def _text(values: Mapping[str, Any], names: Sequence[str], what: str) -> str:
    found = _value(values, names)
    if not isinstance(found, str) or not found.strip():
        raise NoItemError(f"missing_{what}")
    return found


def _list(text: str) -> Any:
    """What a cell of a table spells as JSON; the text itself where it is none."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return text
