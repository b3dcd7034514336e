"""A judge as suites: how often it agrees with known pairs, and whether it prefers each model's answers to the start's.

All models are compared with one opponent, the model that the aligned ones started from. So two of them, a candidate and
a champion too, compare item by item with one judge's verdicts, and a new model costs questions about itself alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from stages.config.judging import JudgeConfig
from stages.data.tokens.encoding import Chat
from stages.data.tokens.views import evenly
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.builtin.sampled import Answers, Sampler
from stages.judge.heldout import NO_TEXT, Heldout, PairItem
from stages.judge.length_control import LengthControlled, length_controlled
from stages.judge.pairwise import MENDABLE, Agreement, Judge, Match, Verdict, agreement, verdicts
from stages.judge.prompts import prompt_digest
from stages.judge.suite import Measurement, Score, Subject

JUDGE, AGREEMENT = "judge", "judge_agreement"
"""Names of the suites."""
_LEAST_PROMPTS, _LEAST_P = 20, 0.025
"""What proves a judge: it must not be able to do as well by guessing. Of fewer prompts an interval says nothing; that
of one right verdict is 1 to 1."""
NO_OPPONENT = "no_answer_to_compare_with"

_PLACES = {0: "second", 1: "both", 2: "first"}
"""How often the judge preferred what stood first, in words: kept as what it said about an item."""


class JudgeAgreement(Facts):
    """Of held-out preference pairs: 1 where the judge prefers what was chosen, in both orders, 0.5 for a tie."""

    def __init__(self, heldout: Heldout, judge: Judge, *, max_pairs: int) -> None:
        chosen = [heldout.pairs[int(place)] for place in evenly(len(heldout.pairs), at_most=max_pairs)]
        self._pairs, self._judge = chosen, judge
        told = digest_of(AGREEMENT, [pair.id for pair in chosen], judge=judge.identity)
        super().__init__(AGREEMENT, "accuracy", "higher", told, chance=0.5)

    def __len__(self) -> int:
        return len(self._pairs)

    def measure(self, subject: Subject) -> Measurement:
        del subject  # the judge itself
        readable = [pair for pair in self._pairs if pair.chosen.chat is not None and pair.rejected.chat is not None]
        skipped = Counter({NO_TEXT: len(self._pairs) - len(readable)})
        found = verdicts(self._judge, [_known(pair) for pair in readable])
        scores = []
        for pair, verdict in zip(readable, found, strict=True):
            if verdict.value is None:
                skipped[verdict.reason] += 1
            else:
                told = _PLACES[verdict.placed_first] if verdict.asked == 2 else ""
                scores.append(Score(pair.id, verdict.value, cluster=pair.cluster, response=told))
        return _final(measurement(scores, +skipped))


class JudgeWins(Facts):
    """1 where the judge prefers a model's answer to the start's in both orders, 0 where it prefers the other, else
    0.5."""

    def __init__(
        self,
        sampler: Sampler,
        judge: Judge,
        *,
        max_items: int,
        opponent: Callable[[], Subject],
        opponent_identity: str,
    ) -> None:
        self._sampler, self._judge, self._opponent = sampler, judge, opponent
        self._chosen = {sampler.prompts[int(place)].id for place in evenly(len(sampler), at_most=max_items)}
        self._against: dict[str, str] | None = None
        told = digest_of(
            JUDGE,
            [sampler.items, sorted(self._chosen)],  # an answer depends on its prompt's place among all
            **sampler.settings,
            judge=judge.identity,
            opponent=opponent_identity,
        )
        super().__init__(JUDGE, "win_rate", "higher", told, chance=0.5)

    def __len__(self) -> int:
        return len(self._chosen)

    def measure(self, subject: Subject) -> Measurement:
        answers = self._sampler.of(subject)
        if self._against is None:
            self._against = _texts(self._sampler.of(self._opponent()))
        mine = [answer for answer in answers.answers if answer.prompt.id in self._chosen]
        open_answers = [answer for answer in mine if answer.prompt.id in self._against]
        skipped = Counter({NO_OPPONENT: len(mine) - len(open_answers)})
        found = verdicts(
            self._judge,
            [Match(_question(one.prompt), one.text, self._against[one.prompt.id]) for one in open_answers],
        )
        scores = []
        for answer, verdict in zip(open_answers, found, strict=True):
            if verdict.value is None:
                skipped[verdict.reason] += 1
            else:
                scores.append(Score(answer.prompt.id, verdict.value, tokens=len(answer.ids), response=answer.text))
        skipped += _unanswered(answers, self._chosen)
        return _final(measurement(scores, +skipped))


def facts_of(measured: Mapping[tuple[str, str], Measurement], *, start: str, settings: JudgeConfig) -> dict[str, Any]:
    """Return what is published next to the verdicts: who judges, how often it agrees with known pairs, and win rates at
    equal length by role; empty without a judge.

    `measured` is by role and suite; `start` is the role of the opponent.
    """
    if not any(suite in (JUDGE, AGREEMENT) for _, suite in measured):
        return {}
    known = next((found for (_, suite), found in measured.items() if suite == AGREEMENT), Measurement())
    agreed = agreement([_verdict(score) for score in known.scores], [score.cluster for score in known.scores])
    against = {score.item: len(score.response) for score in _scores(measured, start)}
    controlled = {
        role: asdict(found)
        for role in sorted({role for role, suite in measured if suite == JUDGE and role != start})
        if (found := _at_equal_length(_scores(measured, role), against)) is not None
    }
    return {
        "endpoint": settings.endpoint,
        "model": settings.model,
        "method": "generation" if settings.endpoint else settings.method,
        "prompt_digest": prompt_digest(settings.prompt),
        "agreement": {} if agreed is None else {**asdict(agreed), "skipped": dict(known.skipped)},
        "better_than_chance": agreed is not None and is_better_than_chance(agreed),
        "least_prompts": _LEAST_PROMPTS,
        "against": start,
        "length_controlled": controlled,
    }


def is_better_than_chance(agreed: Agreement) -> bool:
    """Whether the agreement proves that a judge does not guess."""
    return agreed.clusters >= _LEAST_PROMPTS and agreed.p <= _LEAST_P and agreed.low > 0.5


def _at_equal_length(scores: Sequence[Score], against: Mapping[str, int]) -> LengthControlled | None:
    """Lengths are in characters, because models may have different tokenizers."""
    common = [score for score in scores if score.item in against]
    return length_controlled(
        np.array([score.value for score in common]),
        np.array([len(score.response) for score in common], dtype=np.float64),
        np.array([against[score.item] for score in common], dtype=np.float64),
        np.array([score.cluster or score.item for score in common], dtype=object),
    )


def silent_judge(measured: Mapping[tuple[str, str], Measurement], *, start: str) -> dict[str, str]:
    """Return why a judge gave no verdict on any model, as `left_out` says it; empty where it gave one, or is none. That
    the start's answers are as good as themselves is no verdict."""
    asked = [found for (role, suite), found in measured.items() if suite == JUDGE and role != start]
    if not asked or any(found.scores for found in asked):
        return {}
    reasons = sorted({reason for found in asked for reason in found.skipped})
    return {f"suite {JUDGE}": f"the judge gave no verdict: {', '.join(reasons) or 'there is nothing to judge'}"}


def _scores(measured: Mapping[tuple[str, str], Measurement], role: str) -> list[Score]:
    found = measured.get((role, JUDGE))
    return found.scores if found else []


def _verdict(score: Score) -> Verdict:
    placed = next((number for number, words in _PLACES.items() if words == score.response), 0)
    return Verdict(score.value, placed_first=placed, asked=2 if score.response else 0)


def _known(pair: PairItem) -> Match:
    chosen, rejected = pair.chosen.chat, pair.rejected.chat
    assert chosen is not None
    assert rejected is not None
    prompt = Chat(chosen.messages[:-1], chosen.tools)
    return Match(as_text(prompt), str(chosen.messages[-1]["content"]), str(rejected.messages[-1]["content"]))


def _question(prompt: Any) -> str:
    return as_text(prompt.chat) if prompt.chat is not None else prompt.text


def as_text(chat: Chat) -> str:
    """A prompt as a judge reads it: the question alone, or the whole conversation with who said what."""
    if len(chat.messages) == 1:
        return str(chat.messages[0]["content"])
    return "\n\n".join(f"{str(message['role']).capitalize()}: {message['content']}" for message in chat.messages)


def _texts(answers: Answers) -> dict[str, str]:
    return {answer.prompt.id: answer.text for answer in answers.answers}


def _unanswered(answers: Answers, chosen: set[str]) -> Counter[str]:
    """Reasons of the prompts that the model did not answer; which of them are among the chosen is not known, so they
    are counted by the reasons in their order, up to the number that is missing."""
    missing = len(chosen) - sum(answer.prompt.id in chosen for answer in answers.answers)
    counted: Counter[str] = Counter()
    for reason, count in answers.skipped.items():
        counted[reason] = min(count, missing)
        missing -= counted[reason]
    return counted


def _final(found: Measurement) -> Measurement:
    found.is_final = not any(reason in found.skipped for reason in MENDABLE)
    return found
