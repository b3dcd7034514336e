"""Preference rows of the common formats, detected from their fields, as pairs of responses to one prompt."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any, TypeGuard

from stages.config.sources import PreferenceFormat
from stages.data.pairs import labels
from stages.data.pairs.cells import number_of
from stages.data.pairs.labels import Coding, Sides, Verdict
from stages.data.pairs.reasons import joined, reason_of
from stages.data.pairs.shapes import is_empty
from stages.data.pairs.turns import Message, Unusable, as_conversation, plain_text, read_turns, with_system

_PROMPTS = ("prompt", "instruction", "question")
_OTHER_PROMPTS = ("query", "history", "context", "post", "input")
"""Names of a prompt where there is none of the others, next to which they are what the question is about."""
_CONTEXTS = ("input", "context")
_RESPONSES = ("responses", "completions", "answers")
_TEXTS = ("response", "text", "content", "answer", "completion")
_SCORES = ("score", "rating", "overall_score", "fine-grained_score")
_ONE_RESPONSE = ("completion", "response", "answer", "output")
_SIDE = re.compile(
    r"(response|answer|output|completion|conversation|candidate|option|summary|text|reply|human_ref)_?([abAB0-9])"
)
_MARKS = (("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))
_SIDE_SCORES = ("score", "rating", "reward")
_ONE_HOT = ("winner_model_", "winner_")
_YES = frozenset(
    (
        "true",
        "yes",
        "1",
        "desirable",
        "desired",
        "good",
        "positive",
        "chosen",
        "accepted",
        "thumbs_up",
        "thumbsup",
        "up",
        "upvote",
    )
)
_NO = frozenset(
    (
        "false",
        "no",
        "0",
        "-1",
        "undesirable",
        "undesired",
        "bad",
        "negative",
        "rejected",
        "thumbs_down",
        "thumbsdown",
        "down",
        "downvote",
    )
)
_TURNS = (("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant"))


@dataclass(frozen=True)
class Preference:
    """Two responses to one prompt; people or a rule preferred the first."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    reason: str = ""
    """Why, in the words of those who preferred it."""
    changes: tuple[str, ...] = ()
    """What was decided on the way, such as that annotators disagreed."""


@dataclass(frozen=True)
class Labelled:
    """One response to a prompt, which was found good or bad without another one next to it."""

    prompt: tuple[Message, ...]
    response: str
    is_good: bool
    reason: str = ""


def fits(shape: PreferenceFormat, values: Mapping[str, Any]) -> bool:
    """Whether a row says what this format needs."""
    return _fits(shape, _filled(values))


def fitting_formats(values: Mapping[str, Any], *, by_name: bool = True) -> list[PreferenceFormat]:
    """Every format that rows with these fields fit; `by_name`, empty fields count where the others fit nothing."""
    filled = _filled(values)
    for found in (filled, values) if by_name and len(filled) < len(values) else (filled,):
        if shapes := [shape for shape in PreferenceFormat if _fits(shape, found)]:
            return shapes
    return []


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_empty(value)}


def _fits(shape: PreferenceFormat, values: Mapping[str, Any]) -> bool:
    asks = any(name in values for name in _PROMPTS)
    asks_somehow = asks or any(name in values for name in _OTHER_PROMPTS)
    has_both = "chosen" in values and "rejected" in values
    both = [values[name] for name in ("chosen", "rejected") if name in values]
    match shape:
        case PreferenceFormat.PAIR:
            return has_both and (asks or (asks_somehow and not _are_transcripts(both)))
        case PreferenceFormat.TRANSCRIPTS:
            are_texts = has_both and all(isinstance(side, str) for side in both)
            return are_texts and not asks and (not asks_somehow or _are_transcripts(both))
        case PreferenceFormat.DIALOGUES:
            return has_both and not asks and all(isinstance(side, list) for side in both)
        case PreferenceFormat.RANKED:
            return asks and any(isinstance(values.get(name), list) for name in _RESPONSES)
        case PreferenceFormat.PAIRWISE:
            return not has_both and _fits_pairwise(values, asks=asks_somehow)
        case PreferenceFormat.LABELLED:
            has_response = any(name in values for name in _ONE_RESPONSE)
            return asks and has_response and "label" in values and not both and sides_of(values) is None


def _are_transcripts(sides: Sequence[Any]) -> bool:
    """Whether both sides have their own prompt, whatever stands next to them."""
    return all(isinstance(side, list) or (isinstance(side, str) and "Human:" in side) for side in sides)


def _fits_pairwise(values: Mapping[str, Any], *, asks: bool) -> bool:
    sides = sides_of(values)
    if sides is None or not (asks or all(isinstance(values[name], list) for name in sides.names)):
        return False
    return labels.has_label(values) or bool(_one_hot(values, sides)) or bool(_side_scores(values, sides))


def sides_of(values: Mapping[str, Any]) -> Sides | None:
    """The fields of exactly two responses that are named alike, such as `response_a` and `response_b`."""
    return _sides_among(tuple(values))


@lru_cache(maxsize=1024)
def _sides_among(names: tuple[str, ...]) -> Sides | None:
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if part := _SIDE.fullmatch(name):
            found.setdefault(part[1], {})[part[2]] = name
    for marked in found.values():
        for marks in _MARKS:
            if marked.keys() == set(marks):
                return Sides((marked[marks[0]], marked[marks[1]]), marks)
    return None


def to_preferences(
    shape: PreferenceFormat, values: Mapping[str, Any], coding: Coding | None = None
) -> list[Preference | str]:
    """The pairs of a row, and a reason for each that is unusable. Only ranked lists give more than one outcome.

    `coding` says how the labels of pairwise rows are written. Raises Unusable when the row as a whole cannot be read.
    """
    match shape:
        case PreferenceFormat.RANKED:
            return list(_ranked(values))
        case PreferenceFormat.PAIRWISE:
            return [_judged(values, coding or Coding(numbers=labels.numbers_in([values])))]
        case PreferenceFormat.TRANSCRIPTS:
            sides = [_transcript(values.get(name)) for name in ("chosen", "rejected")]
        case PreferenceFormat.PAIR | PreferenceFormat.DIALOGUES:
            sides = [_side(values.get(name)) for name in ("chosen", "rejected")]
        case PreferenceFormat.LABELLED:
            raise AssertionError("a labelled response is no pair: see to_labelled and stages.data.pairs.partners")
    return [_paired(_common_prompt(sides, values), sides[0].answer, sides[1].answer, reason_of(values))]


def _judged(values: Mapping[str, Any], coding: Coding) -> Preference | str:
    """Two responses with what annotators or scores say of them."""
    names = sides_of(values)
    if names is None:
        raise Unusable("side_missing")
    verdicts = _verdicts(values, names, coding)
    verdict = labels.majority(verdicts)
    if verdict is Verdict.TIE:
        return "tie"
    asked = values.get("prompt")
    if isinstance(asked, list) and all(isinstance(part, str) for part in asked):
        # The arena's lists of prompts, with as many answers of each side.
        sides = [_last(_interleaved(asked, values[name])) for name in names.names]
        prompt = _common_prompt(sides, {**values, "prompt": None})
    else:
        sides = [_side(values[name]) for name in names.names]
        prompt = _common_prompt(sides, values)
    better, worse = sides if verdict is Verdict.FIRST else sides[::-1]
    changes = ("annotators_disagreed",) if len(set(verdicts)) > 1 else ()
    reasons = [reason_of(values)]
    for name in labels.SEVERAL:
        entries = values.get(name)
        listed = entries.values() if isinstance(entries, Mapping) else entries if isinstance(entries, list) else ()
        reasons += [reason_of(entry) for entry in listed if isinstance(entry, Mapping)]
    return _paired(prompt, better.answer, worse.answer, joined(reasons), changes)


def _verdicts(values: Mapping[str, Any], sides: Sides, coding: Coding) -> list[Verdict]:
    """What each annotator says, or the scores; raises Unusable when nothing is said."""
    found, is_signed = labels.labels_of(values)
    if sides.names[0].startswith("human_ref") and not coding.first:
        coding = Coding(first="1", second="0")  # the Stanford data: 1 when the first is preferred
    if found:
        return [coding.verdict(label, sides, values, is_signed=is_signed) for label in found]
    if one_hot := _one_hot(values, sides):
        return [one_hot]
    if scores := _side_scores(values, sides):
        first, second = scores
        return [Verdict.TIE if first == second else Verdict.FIRST if first > second else Verdict.SECOND]
    raise Unusable("no_label")


def _one_hot(values: Mapping[str, Any], sides: Sides) -> Verdict | None:
    """The arena's `winner_model_a`, `winner_model_b` and `winner_tie`, of which one is 1."""
    for stem in _ONE_HOT:
        said = [_truth(values.get(f"{stem}{mark}")) for mark in sides.marks]
        if None not in said:
            return Verdict.TIE if said[0] == said[1] else Verdict.FIRST if said[0] else Verdict.SECOND
    return None


def _side_scores(values: Mapping[str, Any], sides: Sides) -> list[float] | None:
    for stem in _SIDE_SCORES:
        scores = [number_of(values.get(f"{stem}_{mark}")) for mark in sides.marks]
        numbers = [score for score in scores if score is not None]
        if len(numbers) == 2:
            return numbers
    return None


def _truth(value: object) -> bool | None:
    """What a label of one response says; None when it is not known."""
    if isinstance(value, bool):
        return value
    number = number_of(value)
    word = str(int(number)) if number in (0, 1, -1) else str(value).strip().lower().replace(" ", "_").replace("-", "_")
    return True if word in _YES else False if word in _NO else None


def to_labelled(values: Mapping[str, Any]) -> Labelled:
    """A row of Kahneman-Tversky optimisation: a prompt, one response, and whether it is good.

    Raises Unusable with the reason why it cannot be one.
    """
    label = values.get("label")
    if is_empty(label):
        raise Unusable("no_label")
    is_good = _truth(label)
    if is_good is None:
        raise Unusable("unknown_label")
    side = _side(_named(values, _ONE_RESPONSE))
    if not side.answer:
        raise Unusable("side_missing")
    prompt = _answered(_common_prompt([side, side], values), side.answer)
    return Labelled(prompt, side.answer, is_good, reason_of(values))


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
    return _last(turns)


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
    before = list(sides[0].before)
    if list(sides[1].before) != before:
        raise Unusable("prompts_differ")
    if not before:
        return with_system(_asked(values), values)
    asked = _read_prompt(_named(values, _PROMPTS))
    if asked and asked[-1]["content"] != before[-1]["content"]:
        raise Unusable("prompts_differ")
    return with_system(before, values)


def _asked(values: Mapping[str, Any]) -> list[Message]:
    """The row's own prompt, with what it is about below it."""
    prompt = _named(values, _PROMPTS)
    if prompt is None:
        return _read_prompt(_named(values, _OTHER_PROMPTS))
    messages = _read_prompt(prompt)
    contexts = [plain_text(values[name]) for name in _CONTEXTS if isinstance(values.get(name), str)]
    if len(messages) == 1 and isinstance(prompt, str):
        return [{"role": "user", "content": "\n\n".join(part for part in (messages[0]["content"], *contexts) if part)}]
    return messages


def _read_prompt(prompt: object) -> list[Message]:
    """A text, a transcript without its last answer, or messages, as messages."""
    if isinstance(prompt, Mapping):  # WebGPT's question
        prompt = _named(prompt, ("full_text", "text", "content"))
    if prompt is None:
        return []
    if isinstance(prompt, list):
        return read_turns(prompt, role="role", text="content")
    text = plain_text(prompt)
    # With text in front, only the place left for the answer tells a transcript from a question that quotes one.
    is_transcript = text.startswith("Human:") or ("\n\nHuman:" in text and text.endswith("\n\nAssistant:"))
    messages = split_transcript(text) if is_transcript else []
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]
    return messages or ([{"role": "user", "content": text}] if text else [])


def _paired(
    prompt: Sequence[Message], chosen: str, rejected: str, reason: str = "", changes: tuple[str, ...] = ()
) -> Preference | str:
    if not chosen or not rejected:
        return "side_missing"
    try:
        asked = _answered(prompt, chosen)
    except Unusable as error:
        return error.reason
    return "equal_sides" if chosen == rejected else Preference(asked, chosen, rejected, reason, changes)


def _answered(prompt: Sequence[Message], answer: str) -> tuple[Message, ...]:
    """The prompt as it is trained on; raises Unusable when this answer cannot follow it."""
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"]:
        raise Unusable("no_prompt")
    return as_conversation([*prompt, {"role": "assistant", "content": answer}]).messages[:-1]


def _last(turns: Sequence[Message]) -> _Side:
    return _Side(tuple(turns[:-1]), turns[-1]["content"])


def _interleaved(asked: Sequence[str], answers: object) -> list[Message]:
    if not isinstance(answers, list) or len(answers) != len(asked) or not asked:
        raise Unusable("malformed_turn")
    turns: list[Message] = []
    for question, answer in zip(asked, answers, strict=True):
        turns.append({"role": "user", "content": plain_text(question)})
        turns.append({"role": "assistant", "content": plain_text(answer)})
    return turns


def _ranked(values: Mapping[str, Any]) -> Iterator[Preference | str]:
    """All ordered pairs, k (k - 1) / 2 of k responses; two with the same rank are a tie, not a pair."""
    responses = next((values[name] for name in _RESPONSES if isinstance(values.get(name), list)), [])
    if len(responses) < 2:
        raise Unusable("one_response")
    ranks = _ranks(values, responses)
    texts = [plain_text(_named(entry, _TEXTS) if isinstance(entry, Mapping) else entry) for entry in responses]
    # A critique of one response is a reason only for the pairs that it is in.
    said = [reason_of(entry) if isinstance(entry, Mapping) else "" for entry in responses]
    prompt, whole = with_system(_asked(values), values), reason_of(values)
    order = sorted(range(len(texts)), key=lambda place: ranks[place])
    for better, worse in combinations(order, 2):
        if ranks[better] == ranks[worse]:
            yield "tie"
            continue
        critiques = [
            f"{what}: {said[place]}" if said[place] else "" for what, place in (("chosen", better), ("rejected", worse))
        ]
        yield _paired(prompt, texts[better], texts[worse], joined([whole, *critiques]))


def _ranks(values: Mapping[str, Any], responses: Sequence[Any]) -> list[float]:
    """One number for each response, lowest for the best.

    `ranking` lists places, best first; `ranks` are 1 for the best; of `scores` higher is better. Ranks and scores may
    also be fields of the responses, and UltraFeedback's annotations are scores by their mean.
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
        (values.get("ratings"), -1.0),
        ([entry.get("rank") for entry in inside], 1.0),
        ([_named(entry, _SCORES) for entry in inside], -1.0),
        ([_mean_rating(entry.get("annotations")) for entry in inside], -1.0),
    ):
        if isinstance(found, list) and len(found) == count:
            numbers = [number if sign > 0 else -number for number in map(number_of, found) if number is not None]
            if len(numbers) == count:
                return numbers
    raise Unusable("no_ranking")


def _mean_rating(annotations: object) -> float | None:
    """The mean of an UltraFeedback response's ratings by aspect; those that are `N/A` do not count."""
    if not isinstance(annotations, Mapping):
        return None
    # A list has the ratings of several annotators, or of several statements of the response.
    entries = [one for entry in annotations.values() for one in (entry if isinstance(entry, list) else [entry])]
    ratings = [number_of(_named(entry, ("Rating", "rating"))) for entry in entries if isinstance(entry, Mapping)]
    numbers = [rating for rating in ratings if rating is not None]
    try:
        return sum(numbers) / len(numbers) if numbers else None
    except OverflowError:  # JSON can spell larger numbers than there are floating-point ones
        return None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _named(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((entry[name] for name in names if not is_empty(entry.get(name))), None)
