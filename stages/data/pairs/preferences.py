"""Preference rows of the common formats, detected from their fields, as pairs of responses to one prompt."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeGuard

from stages.config.sources import PreferenceFormat
from stages.data.pairs.turns import Message, Unusable, as_conversation, plain_text, read_turns, with_system

_PROMPTS = ("prompt", "instruction", "question")
_RESPONSES = ("responses", "completions", "answers")
_TEXTS, _SCORES = ("response", "text", "content", "answer", "completion"), ("score", "rating", "overall_score")
_TURNS = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt; people or a rule preferred the first."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


def fitting_formats(values: Mapping[str, Any]) -> list[PreferenceFormat]:
    """Every format that rows with these fields fit."""
    asks = any(name in values for name in _PROMPTS)
    both = [values[name] for name in ("chosen", "rejected") if name in values]
    fits = {
        PreferenceFormat.PAIR: asks and len(both) == 2,
        PreferenceFormat.TRANSCRIPTS: not asks and len(both) == 2 and all(isinstance(side, str) for side in both),
        PreferenceFormat.DIALOGUES: not asks and len(both) == 2 and all(isinstance(side, list) for side in both),
        PreferenceFormat.RANKED: asks and any(isinstance(values.get(name), list) for name in _RESPONSES),
    }
    return [shape for shape in PreferenceFormat if fits[shape]]


def to_preferences(shape: PreferenceFormat, values: Mapping[str, Any]) -> list[Preference | str]:
    """The pairs of a row, and a reason for each that is unusable. Only ranked lists give more than one outcome.

    Raises Unusable when the row as a whole cannot be read.
    """
    match shape:
        case PreferenceFormat.RANKED:
            return list(_ranked(values))
        case PreferenceFormat.TRANSCRIPTS:
            sides = [_transcript(values.get(name)) for name in ("chosen", "rejected")]
        case PreferenceFormat.PAIR | PreferenceFormat.DIALOGUES:
            sides = [_side(values.get(name)) for name in ("chosen", "rejected")]
    return [_paired(_common_prompt(sides, values), sides[0].answer, sides[1].answer)]


@dataclass(frozen=True)
class _Side:
    """A response, and the turns before it as far as this side has them."""

    before: tuple[Message, ...]
    answer: str


def _side(side: object) -> _Side:
    """A text, a message, or a dialogue that ends with the response."""
    if isinstance(side, Mapping):
        side = [side]
    if not isinstance(side, list):
        return _Side((), plain_text(side))
    if not side:
        raise Unusable("side_missing")
    turns = read_turns(side, role="role", text="content")
    if turns[-1]["role"] != "assistant":
        raise Unusable("no_response")
    return _Side(tuple(turns[:-1]), turns[-1]["content"])


def _transcript(text: object) -> _Side:
    if not isinstance(text, str) or not text.strip():
        raise Unusable("side_missing")
    turns = split_transcript(text)
    head = 1 if turns and turns[0]["role"] == "system" else 0
    if len(turns) < head + 2 or turns[head]["role"] != "user":
        raise Unusable("no_prompt")
    if turns[-1]["role"] != "assistant":
        raise Unusable("no_response")
    return _Side(tuple(turns[:-1]), turns[-1]["content"])


def split_transcript(text: str) -> list[Message]:
    """Turns of an hh-rlhf transcript of `Human:` and `Assistant:`; empty when it is not a transcript.

    Text before the first of them is what the assistant was told, so it is the system message.
    """
    body = "\n\n" + text.lstrip("\n")
    places = sorted((start, role, mark) for mark, role in _TURNS for start in _starts(body, mark))
    starts = [start for start, _, _ in places]
    preamble = body[: starts[0]].strip() if places else ""
    return [
        *([{"role": "system", "content": preamble}] if preamble else []),
        *(
            {"role": role, "content": body[start + len(mark) : end].strip()}
            for (start, role, mark), end in zip(places, [*starts[1:], len(body)], strict=False)
        ),
    ]


def _starts(text: str, mark: str) -> Iterator[int]:
    start = text.find(mark)
    while start >= 0:
        yield start
        start = text.find(mark, start + 1)


def _common_prompt(sides: Sequence[_Side], values: Mapping[str, Any]) -> list[Message]:
    """The turns before both responses: those of the dialogues, which must be the same, or the row's own prompt.
    The row's own system message comes first in either case."""
    asked = _asked(values)
    before = list(sides[0].before)
    if list(sides[1].before) != before:
        raise Unusable("prompts_differ")
    if before and asked and asked[-1]["content"] != before[-1]["content"]:
        raise Unusable("prompts_differ")
    return with_system(before or asked, values)


def _asked(values: Mapping[str, Any]) -> list[Message]:
    """The row's own prompt: a text, a transcript without its last answer, or messages."""
    prompt = next((values[name] for name in _PROMPTS if values.get(name) is not None), None)
    if prompt is None:
        return []
    if isinstance(prompt, list):
        messages = read_turns(prompt, role="role", text="content")
    else:
        text = plain_text(prompt)
        # With text in front, only the place left for the answer tells a transcript from a question that quotes one.
        is_transcript = text.startswith("Human:") or ("\n\nHuman:" in text and text.endswith("\n\nAssistant:"))
        messages = split_transcript(text) if is_transcript else []
        if messages and messages[-1] == {"role": "assistant", "content": ""}:
            messages = messages[:-1]
        messages = messages or ([{"role": "user", "content": text}] if text else [])
    return messages


def _paired(prompt: Sequence[Message], chosen: str, rejected: str) -> Preference | str:
    if not chosen or not rejected:
        return "side_missing"
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"]:
        return "no_prompt"
    if chosen == rejected:
        return "equal_sides"
    try:
        whole = as_conversation([*prompt, {"role": "assistant", "content": chosen}])
    except Unusable as error:
        return error.reason
    return Preference(whole.messages[:-1], chosen, rejected)


def _ranked(values: Mapping[str, Any]) -> Iterator[Preference | str]:
    """All ordered pairs, k (k - 1) / 2 of k responses; two with the same rank are a tie, not a pair."""
    responses = next((values[name] for name in _RESPONSES if isinstance(values.get(name), list)), [])
    if len(responses) < 2:
        raise Unusable("one_response")
    ranks = _ranks(values, responses)
    texts = [plain_text(_named(entry, _TEXTS) if isinstance(entry, Mapping) else entry) for entry in responses]
    prompt = with_system(_asked(values), values)
    order = sorted(range(len(texts)), key=lambda place: ranks[place])
    for better, worse in combinations(order, 2):
        yield "tie" if ranks[better] == ranks[worse] else _paired(prompt, texts[better], texts[worse])


def _ranks(values: Mapping[str, Any], responses: Sequence[Any]) -> list[float]:
    """One number for each response, lowest for the best.

    `ranking` lists places, best first; `ranks` are 1 for the best; of `scores` higher is better. Ranks and scores may
    also be fields of the responses.
    """
    count = len(responses)
    if (ranking := values.get("ranking")) is not None:
        if not isinstance(ranking, list) or not all(map(_is_number, ranking)) or sorted(ranking) != list(range(count)):
            raise Unusable("malformed_ranking")
        return [float(ranking.index(place)) for place in range(count)]
    inside = [entry if isinstance(entry, Mapping) else {} for entry in responses]
    for found, sign in (
        (values.get("ranks"), 1.0),
        (values.get("scores"), -1.0),
        ([entry.get("rank") for entry in inside], 1.0),
        ([_named(entry, _SCORES) for entry in inside], -1.0),
    ):
        if isinstance(found, list) and len(found) == count:
            numbers = [value if sign > 0 else -value for value in found if _is_number(value)]
            if len(numbers) == count:
                return numbers
    raise Unusable("no_ranking")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _named(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)
