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
from stages.data.pairs.margins import gap_of_sides
from stages.data.pairs.reasons import joined, reason_of
from stages.data.pairs.shapes import is_empty
from stages.data.pairs.sides import (
    OTHER_PROMPTS,
    PROMPTS,
    Preference,
    answered,
    asked_of,
    common_prompt,
    first_named,
    interleaved,
    last_turn,
    paired,
    side_of,
    transcript_of,
)
from stages.data.pairs.turns import Message, Unusable, plain_text, with_system

_RESPONSES = ("responses", "completions", "answers")
_TEXTS = ("response", "text", "content", "answer", "completion")
_SCORES = ("score", "rating", "overall_score", "fine-grained_score")
_ONLY_NAMED = (PreferenceFormat.UNPAIRED,)
"""Its rows are those of another format: which one is meant is for people to say."""
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
        if shapes := [shape for shape in PreferenceFormat if _fits(shape, found) and shape not in _ONLY_NAMED]:
            return shapes
    return []


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not is_empty(value)}


def _fits(shape: PreferenceFormat, values: Mapping[str, Any]) -> bool:
    asks = any(name in values for name in PROMPTS)
    asks_somehow = asks or any(name in values for name in OTHER_PROMPTS)
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
        case PreferenceFormat.LABELLED | PreferenceFormat.UNPAIRED:
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
            sides = [transcript_of(values.get(name)) for name in ("chosen", "rejected")]
        case PreferenceFormat.PAIR | PreferenceFormat.DIALOGUES:
            sides = [side_of(values.get(name)) for name in ("chosen", "rejected")]
        case PreferenceFormat.LABELLED | PreferenceFormat.UNPAIRED:
            raise AssertionError("a labelled response is no pair: see to_labelled and stages.data.pairs.partners")
    prompt, gap = common_prompt(sides, values), gap_of_sides(values)
    return [paired(prompt, sides[0].answer, sides[1].answer, reason_of(values), gap=gap)]


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
        sides = [last_turn(interleaved(asked, values[name])) for name in names.names]
        prompt = common_prompt(sides, {**values, "prompt": None})
    else:
        sides = [side_of(values[name]) for name in names.names]
        prompt = common_prompt(sides, values)
    better, worse = sides if verdict is Verdict.FIRST else sides[::-1]
    changes = ("annotators_disagreed",) if len(set(verdicts)) > 1 else ()
    reasons = [reason_of(values)]
    for name in labels.SEVERAL:
        entries = values.get(name)
        listed = entries.values() if isinstance(entries, Mapping) else entries if isinstance(entries, list) else ()
        reasons += [reason_of(entry) for entry in listed if isinstance(entry, Mapping)]
    return paired(prompt, better.answer, worse.answer, joined(reasons), changes, gap=_gap(values, names))


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


def _gap(values: Mapping[str, Any], sides: Sides) -> float | None:
    """How far two responses are apart: by their scores, or by the mean of signed strengths."""
    if scores := _side_scores(values, sides):
        return abs(scores[0] - scores[1])
    found, is_signed = labels.labels_of(values)
    strengths = [number for number in map(number_of, found) if number is not None] if is_signed else []
    return abs(sum(strengths) / len(strengths)) if strengths else None


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
    side = side_of(first_named(values, _ONE_RESPONSE))
    if not side.answer:
        raise Unusable("side_missing")
    prompt = answered(common_prompt([side, side], values), side.answer)
    return Labelled(prompt, side.answer, is_good, reason_of(values))


def _ranked(values: Mapping[str, Any]) -> Iterator[Preference | str]:
    """All ordered pairs, k (k - 1) / 2 of k responses; two with the same rank are a tie, not a pair."""
    responses = next((values[name] for name in _RESPONSES if isinstance(values.get(name), list)), [])
    if len(responses) < 2:
        raise Unusable("one_response")
    ranked = _ranks(values, responses)
    ranks = ranked.places
    texts = [plain_text(first_named(entry, _TEXTS) if isinstance(entry, Mapping) else entry) for entry in responses]
    # A critique of one response is a reason only for the pairs that it is in.
    said = [reason_of(entry) if isinstance(entry, Mapping) else "" for entry in responses]
    prompt, whole = with_system(asked_of(values), values), reason_of(values)
    order = sorted(range(len(texts)), key=lambda place: ranks[place])
    for better, worse in combinations(order, 2):
        if ranks[better] == ranks[worse]:
            yield "tie"
            continue
        critiques = [
            f"{what}: {said[place]}" if said[place] else "" for what, place in (("chosen", better), ("rejected", worse))
        ]
        gap = ranks[worse] - ranks[better] if ranked.are_ratings else None
        yield paired(prompt, texts[better], texts[worse], joined([whole, *critiques]), gap=gap)


@dataclass(frozen=True)
class _Ranks:
    places: list[float]
    """One number for each response, lowest for the best."""
    are_ratings: bool
    """Whether their differences say how much better one is: those of scores do, those of places do not."""


def _ranks(values: Mapping[str, Any], responses: Sequence[Any]) -> _Ranks:
    """The ranks of the responses.

    `ranking` lists places, best first; `ranks` are 1 for the best; of `scores` higher is better. Ranks and scores may
    also be fields of the responses, and UltraFeedback's annotations are scores by their mean.
    """
    count = len(responses)
    if (ranking := values.get("ranking")) is not None:
        if not isinstance(ranking, list) or not all(map(_is_number, ranking)) or sorted(ranking) != list(range(count)):
            raise Unusable("malformed_ranking")
        return _Ranks([float(ranking.index(place)) for place in range(count)], are_ratings=False)
    inside = [entry if isinstance(entry, Mapping) else {} for entry in responses]
    for found, sign in (
        (values.get("ranks"), 1.0),
        (values.get("scores"), -1.0),
        (values.get("ratings"), -1.0),
        ([entry.get("rank") for entry in inside], 1.0),
        ([first_named(entry, _SCORES) for entry in inside], -1.0),
        ([_mean_rating(entry.get("annotations")) for entry in inside], -1.0),
    ):
        if isinstance(found, list) and len(found) == count:
            numbers = [number if sign > 0 else -number for number in map(number_of, found) if number is not None]
            if len(numbers) == count:
                return _Ranks(numbers, are_ratings=sign < 0)
    raise Unusable("no_ranking")


def _mean_rating(annotations: object) -> float | None:
    """The mean of an UltraFeedback response's ratings by aspect; those that are `N/A` do not count."""
    if not isinstance(annotations, Mapping):
        return None
    # A list has the ratings of several annotators, or of several statements of the response.
    entries = [one for entry in annotations.values() for one in (entry if isinstance(entry, list) else [entry])]
    ratings = [number_of(first_named(entry, ("Rating", "rating"))) for entry in entries if isinstance(entry, Mapping)]
    numbers = [rating for rating in ratings if rating is not None]
    try:
        return sum(numbers) / len(numbers) if numbers else None
    except OverflowError:  # JSON can spell larger numbers than there are floating-point ones
        return None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
