"""A judge that compares two responses: asked in both orders, believed only where both agree.

Models prefer what stands first or second (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.4). So each
pair is asked about twice with the places exchanged; a preference for a place is a tie. How often the judge agrees with
preference pairs that are known is measured by the same procedure.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from stages.judge.statistics import interval, p_of_chance

UNCLEAR, CUT, TOO_LONG = "judge_unclear", "judge_cut_off", "judge_context_too_short"
NOT_FINITE = "judge_not_finite"
GARBAGE, REFUSED, AWAY, BUDGET = "judge_answered_garbage", "judge_refused", "judge_away", "judge_budget_spent"
UNUSABLE = "judge_unusable"
"""Reasons for which there is no verdict."""
MENDABLE = frozenset((AWAY, BUDGET, UNUSABLE, REFUSED, GARBAGE))
"""Those that an operator can mend without a change of what the digest covers: a key, an address, a server. Then what
was not answered is asked again by the next evaluation."""

_MARKED = re.compile(r"\[\[\s*(A|B|C|TIE)\s*\]\]", re.IGNORECASE)
_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_LETTER = re.compile(
    r"(?:(?:the )?better answer|answer|verdict|winner)?\s*(?:is)?\s*:?\s*(?:answer\s+)?(A|B|TIE)", re.IGNORECASE
)


class Preferred(StrEnum):
    """Which of two responses a judge prefers, by their places in the question."""

    FIRST = "first"
    SECOND = "second"
    NEITHER = "neither"


@dataclass(frozen=True)
class Question:
    """What a judge is asked: two responses to one prompt, in one order."""

    prompt: str
    first: str
    second: str


Answer = Preferred | str
"""What the judge prefers, or the reason why it did not say."""


class Judge(Protocol):
    """Whatever compares two responses."""

    @property
    def identity(self) -> str:
        """Hash over all that decides its answers: the model, how it is asked, the prompt's text."""
        ...

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all questions, in order; never an exception over one of them."""
        ...


class JudgeAwayError(Exception):
    """The judge cannot be asked now; the message says why."""


@dataclass(frozen=True)
class Match:
    """Two responses to one prompt, of which the first is to be judged."""

    prompt: str
    response: str
    opponent: str


@dataclass(frozen=True)
class Verdict:
    """What both orders together say."""

    value: float | None
    """1 where the response is preferred in both orders, 0 where the opponent is, else 0.5; None without an answer."""
    reason: str = ""
    """Why there is no value."""
    placed_first: int = 0
    """In how many of the orders the judge preferred what stood first."""
    asked: int = 0
    """Orders in which the judge preferred one of both."""


def verdicts(judge: Judge, matches: Sequence[Match]) -> list[Verdict]:
    """Judge each match in both orders; equal responses are a tie without a question."""
    open_matches = [match for match in matches if match.response != match.opponent]
    questions = [
        question
        for match in open_matches
        for question in (
            Question(match.prompt, match.response, match.opponent),
            Question(match.prompt, match.opponent, match.response),
        )
    ]
    answers = judge.ask(questions) if questions else []
    both = iter(zip(answers[0::2], answers[1::2], strict=True))
    return [
        Verdict(0.5) if match.response == match.opponent else _agreed(*next(both))  # one for each open match
        for match in matches
    ]


def _agreed(forward: Answer, backward: Answer) -> Verdict:
    for answer in (forward, backward):
        if not isinstance(answer, Preferred):
            return Verdict(None, reason=answer)
    placed_first = [forward, backward].count(Preferred.FIRST)
    asked = 2 - [forward, backward].count(Preferred.NEITHER)
    won = forward is Preferred.FIRST and backward is Preferred.SECOND
    lost = forward is Preferred.SECOND and backward is Preferred.FIRST
    return Verdict(1.0 if won else 0.0 if lost else 0.5, placed_first=placed_first, asked=asked)


@dataclass(frozen=True)
class Agreement:
    """How often a judge prefers what was preferred before: its own accuracy, published next to its verdicts."""

    accuracy: float
    """Ties count one half."""
    low: float
    high: float
    """Of a 95 % interval over prompts."""
    items: int
    clusters: int
    """Different prompts."""
    p: float
    """How often a judge that guesses would agree at least so much."""
    decided: float
    """Share of the items that are no ties."""
    accuracy_decided: float | None
    """Of those alone; None where all are ties."""
    first_place: float | None
    """Share of preferences for what stood first: 0.5 for a judge without a preference for a place."""
    skipped: dict[str, int]


def agreement(found: Sequence[Verdict], clusters: Sequence[str]) -> Agreement | None:
    """Sum up the verdicts on pairs whose first response was preferred before; None where none of them has a value."""
    skipped = Counter(verdict.reason for verdict in found if verdict.value is None)
    judged = [(verdict, cluster) for verdict, cluster in zip(found, clusters, strict=True) if verdict.value is not None]
    values = np.array([verdict.value for verdict, _ in judged], dtype=np.float64)
    prompts = np.array([cluster for _, cluster in judged], dtype=object)
    known = interval(values, prompts)
    if known is None:
        return None
    decided = values[values != 0.5]
    return Agreement(
        accuracy=known.value,
        low=known.low,
        high=known.high,
        items=known.items,
        clusters=len(set(prompts.tolist())),
        p=p_of_chance(values, prompts, chance=0.5),
        decided=len(decided) / len(values),
        accuracy_decided=float(decided.mean()) if len(decided) else None,
        first_place=first_place([verdict for verdict, _ in judged]),
        skipped=dict(skipped),
    )


def first_place(found: Sequence[Verdict]) -> float | None:
    """Share of a judge's preferences that went to what stood first; None where it had none."""
    asked = sum(verdict.asked for verdict in found)
    return sum(verdict.placed_first for verdict in found) / asked if asked else None


def read_verdict(written: str) -> Preferred | None:
    """Return the preference that a judge wrote, None where it cannot be told.

    A mark such as `[[A]]` counts wherever it stands, the last one if there are several; a bare letter only as the whole
    answer, because an `A` in a sentence is usually an article.
    """
    text = _THOUGHT.sub("", written).strip()
    marks = _MARKED.findall(text)
    letter = _LETTER.fullmatch(text.strip(" \n*_`.\"'()[]"))
    said = marks[-1] if marks else letter[1] if letter else ""
    return {"A": Preferred.FIRST, "B": Preferred.SECOND, "C": Preferred.NEITHER, "TIE": Preferred.NEITHER}.get(
        said.upper()
    )
