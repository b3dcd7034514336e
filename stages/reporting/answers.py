"""The same prompt answered by every model of a run: stage by stage, with what each one says differently.

A model is compared with the one that it started from, such as PPO with SFT. Texts are untrusted and
escaped by the template; they are cut into pieces here, never put together with mark-up.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from stages.config.graph import GRAPH, aligned_models, language_models
from stages.reporting.line_plot import number
from stages.reporting.names import in_order, name_of, start_of
from stages.reporting.story import Story

LONGEST_SHOWN = 700
"""Characters; of a longer answer the beginning is shown, and all of it on a click."""
_FOLDED_TO = 400
_MOST_WORDS = 1000
"""Comparing takes time that grows with the square of them."""
_MOSTLY_NEW = 0.6
"""Of the words: from here on marks would cover the answer and tell nothing."""
_SAID = re.compile(r"\w+|[^\w\s]")
_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A part of an answer; `is_new` when the model that this one started from did not say it there."""

    text: str
    is_new: bool = False


@dataclass(frozen=True)
class Answer:
    """What one model said."""

    model: str
    pieces: tuple[Piece, ...]
    score: str
    change: str
    """How it differs from the answer of the model that it started from; empty for the first model."""
    beginning: str = ""
    """Of an answer that is folded; empty for one that is shown whole."""

    @property
    def response(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Sample:
    """One prompt and all answers to it."""

    prompt: str
    answers: tuple[Answer, ...]


def samples(story: Story) -> list[Sample]:
    """The prompts with the answers of every model, in the order of the pipeline; those that alignment changed most come
    first, because the others look alike."""
    rows = sorted(story.samples, key=lambda row: _changed(row, story), reverse=True)
    return [_sample(row, story) for row in rows[: story.max_samples]]


def are_sorted(story: Story) -> bool:
    """Whether the order says something."""
    return len(story.samples) > 1 and any(_changed(row, story) for row in story.samples)


def _changed(row: Mapping[str, Any], story: Story) -> float:
    """Share of the words, 0 to 1, that an aligned model says and its start does not, or the other way round; of several
    aligned models the largest."""
    responses: dict[str, str] = {str(role): str(text) for role, text in (row.get("responses") or {}).items()}
    most = 0.0
    for spec in aligned_models():
        start = start_of(spec.role, story) or _started_from(spec.role, responses)
        if spec.role in responses and start in responses:
            ours, theirs = (Counter(_SAID.findall(responses[role])) for role in (spec.role, start))
            both = ours.total() + theirs.total()
            most = max(most, 1 - 2 * (ours & theirs).total() / both if both else 0.0)
    return most


def _sample(row: Mapping[str, Any], story: Story) -> Sample:
    responses: dict[str, str] = {str(role): str(text) for role, text in (row.get("responses") or {}).items()}
    scores = row.get("scores") or {}
    answers = []
    for role in in_order(responses):
        start = _started_from(role, responses)
        pieces, change = _compared(responses[role], responses[start], name_of(start, story)) if start else (None, "")
        text = responses[role]
        answers.append(
            Answer(
                model=name_of(role, story),
                pieces=pieces or (Piece(text),),
                score=number(score) if (score := scores.get(role)) is not None else "",
                change=change,
                beginning=f"{text[:_FOLDED_TO].rstrip()}…" if len(text) > LONGEST_SHOWN else "",
            )
        )
    return Sample(prompt=str(row.get("prompt", "")), answers=tuple(answers))


def _started_from(role: str, responses: Mapping[str, str]) -> str:
    """Role of the nearest earlier model that answered; empty for the first one."""
    spec = next((spec for spec in language_models() if spec.role == role), None)
    while spec is not None:
        before = dict(spec.inputs).get("model")
        if before is None:
            return ""
        spec = GRAPH[before]
        if spec.role in responses:
            return spec.role
    return ""


def _compared(text: str, before: str, name: str) -> tuple[tuple[Piece, ...] | None, str]:
    if text == before:
        return None, f"the same as {name}"
    if not text or not before:
        return None, ""
    words, earlier = _WORDS.findall(text), _WORDS.findall(before)
    if max(len(words), len(earlier)) > _MOST_WORDS:
        return None, f"another answer than that of {name}"
    blocks = SequenceMatcher(None, earlier, words, autojunk=False).get_matching_blocks()
    kept = {position for block in blocks for position in range(block.b, block.b + block.size)}
    said = [position for position, word in enumerate(words) if not word.isspace()]
    if len(said) - len(kept.intersection(said)) > _MOSTLY_NEW * len(said):
        return None, f"another answer than that of {name}"
    return _pieces(words, kept), f"changed from {name}, new words are marked"


def _pieces(words: list[str], kept: set[int]) -> tuple[Piece, ...]:
    """The words, neighbours of one kind joined, with the spaces between them."""
    pieces: list[Piece] = []
    for position, word in enumerate(words):
        is_new = position not in kept
        if word.isspace():  # a space is new between new words only, whether or not there was one before
            is_new = 0 < position < len(words) - 1 and not {position - 1, position + 1} & kept
        if pieces and pieces[-1].is_new == is_new:
            pieces[-1] = Piece(pieces[-1].text + word, is_new)
        else:
            pieces.append(Piece(word, is_new))
    return tuple(pieces)
