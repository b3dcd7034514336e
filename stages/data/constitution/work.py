"""Respond, criticise, revise, compare: what is done with a few prompts, and the record of it.

Each step asks for all prompts at once, so that models can compute in batches. Random numbers depend on what is asked
and on the step alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from stages.config.constitution import ConstitutionConfig
from stages.config.principles import Constitution, Principle
from stages.data.constitution.acceptance import (
    ACCEPTED,
    Attempt,
    cleaned,
    unusable_response,
    verdict_on,
    whole_sentences,
)
from stages.data.constitution.asking import critique_messages, question_of, revision_messages
from stages.data.constitution.draws import compared_by, drawn_principles
from stages.data.constitution.prompts import Prompt
from stages.data.pairs.turns import Message

REVISED, NO_ROUND = "revised", "no_round_accepted"
FIRST, SECOND = "first", "second"
"""Outcomes of a comparison: which response is better."""
_RESPONSE, _OTHER_RESPONSE, _ROUNDS = 0, 1, 2
"""Steps; each round has two, from `_ROUNDS` on."""


@dataclass(frozen=True)
class Asked:
    """One text to be written."""

    messages: Sequence[Message]
    step: int
    """Of the work on a prompt, for random numbers of its own."""
    temperature: float
    max_tokens: int


@dataclass(frozen=True)
class Written:
    """A text; or none, and the reason why."""

    text: str
    ended: bool = True
    """False where it was cut off at its longest."""
    reason: str = ""


class Writer(Protocol):
    """A model that writes, of this process or behind an endpoint."""

    def write(self, asked: Sequence[Asked]) -> list[Written]:
        """Return one text for each, in order."""
        ...


@dataclass(frozen=True)
class Match:
    """Two responses to one question."""

    question: str
    first: str
    second: str
    principle: Principle


@dataclass(frozen=True)
class Found:
    """What both orders of a question say."""

    outcome: str
    """`first` or `second`, or the reason why neither is preferred."""
    placed_first: int = 0
    """In how many of the orders what stood first was preferred."""
    asked: int = 0


class Comparer(Protocol):
    """Whatever compares two responses by a principle, in both orders."""

    def compare(self, matches: Sequence[Match]) -> list[Found]:
        """Return one finding for each, in order."""
        ...


@dataclass
class Round:
    """One critique and one revision."""

    principle: str
    area: str
    before: str
    """The response, or the revision of an earlier round, that is criticised."""
    critique: str
    revision: str
    outcome: str


@dataclass
class Comparison:
    """Two sampled responses compared by a principle."""

    principle: str
    area: str
    second: str
    outcome: str
    placed_first: int = 0
    asked: int = 0


@dataclass
class Worked:
    """All that was made of one prompt."""

    id: str
    source: str
    messages: tuple[Message, ...]
    response: str
    outcome: str = ""
    rounds: list[Round] = field(default_factory=list)
    comparison: Comparison | None = None

    @property
    def accepted(self) -> list[Round]:
        return [one for one in self.rounds if one.outcome == ACCEPTED]

    @property
    def revision(self) -> str:
        """The last accepted revision; empty when there is none."""
        return self.accepted[-1].revision if self.accepted else ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Worked":
        comparison = data["comparison"]
        return cls(
            **{
                **data,
                "messages": tuple(data["messages"]),
                "rounds": [Round(**one) for one in data["rounds"]],
                "comparison": Comparison(**comparison) if comparison else None,
            }
        )


@dataclass(frozen=True)
class Work:
    """What a constitution is applied with."""

    config: ConstitutionConfig
    constitution: Constitution
    responder: Writer
    critic: Writer
    comparer: Comparer
    declines: Callable[[str], bool]

    def on(self, prompts: Sequence[Prompt]) -> list[Worked]:
        """Work through prompts; a record for each, in order."""
        responses = self._respond(prompts, _RESPONSE)
        made = [
            Worked(prompt.id, prompt.source, prompt.messages, one.text)
            for prompt, one in zip(prompts, responses, strict=True)
        ]
        for one, written in zip(made, responses, strict=True):
            one.outcome = written.reason or unusable_response(written.text, ended=written.ended, config=self.config)
        usable = [(prompt, one) for prompt, one in zip(prompts, made, strict=True) if not one.outcome]
        for round_number in range(self.config.rounds):
            self._round(usable, round_number)
        for _, one in usable:
            one.outcome = REVISED if one.accepted else NO_ROUND
        if self.config.makes_pairs and self.config.comparisons:
            self._compare(usable)
        return made

    def _respond(self, prompts: Sequence[Prompt], step: int) -> list[Written]:
        length, temperature = self.config.max_response_length, self.config.temperature
        found = self.responder.write([Asked(prompt.messages, step, temperature, length) for prompt in prompts])
        return [Written(one.text.strip(), one.ended, one.reason) for one in found]

    def _round(self, usable: Sequence[tuple[Prompt, Worked]], round_number: int) -> None:
        config, step = self.config, _ROUNDS + 2 * round_number
        principles = [
            drawn_principles(self.constitution, prompt, seed=config.seed, number=config.rounds)[round_number]
            for prompt, _ in usable
        ]
        before = [one.revision or one.response for _, one in usable]
        critiques = self.critic.write(
            [
                Asked(
                    critique_messages(prompt, response, principle),
                    step,
                    config.critic_temperature,
                    config.max_critique_length,
                )
                for (prompt, _), response, principle in zip(usable, before, principles, strict=True)
            ]
        )
        said = [one.text.strip() if one.ended else whole_sentences(one.text) for one in critiques]
        open_places = [place for place, text in enumerate(said) if text]
        revisions = self.critic.write(
            [
                Asked(
                    revision_messages(usable[place][0], before[place], said[place], principles[place]),
                    step + 1,
                    config.critic_temperature,
                    config.max_response_length,
                )
                for place in open_places
            ]
        )
        written = dict(zip(open_places, revisions, strict=True))
        for place, ((prompt, one), principle) in enumerate(zip(usable, principles, strict=True)):
            revised = written.get(place, Written("", reason=critiques[place].reason))
            attempt = Attempt(prompt, principle, before[place], said[place], cleaned(revised.text), revised.ended)
            outcome = revised.reason or verdict_on(attempt, config, declines=self.declines)
            one.rounds.append(
                Round(principle.id, principle.area.value, before[place], said[place], attempt.revision, outcome)
            )

    def _compare(self, usable: Sequence[tuple[Prompt, Worked]]) -> None:
        others = self._respond([prompt for prompt, _ in usable], _OTHER_RESPONSE)
        open_pairs: list[tuple[Comparison, Match]] = []
        for (prompt, one), other in zip(usable, others, strict=True):
            principle = compared_by(self.constitution, prompt, seed=self.config.seed)
            assert principle is not None, "prompts without a principle are refused before"
            outcome = other.reason or unusable_response(other.text, ended=other.ended, config=self.config)
            if not outcome and other.text == one.response:
                outcome = "equal_responses"
            one.comparison = Comparison(principle.id, principle.area.value, other.text, outcome)
            if not outcome:
                match = Match(question_of(prompt), one.response, other.text, principle)
                open_pairs.append((one.comparison, match))
        found = self.comparer.compare([match for _, match in open_pairs])
        for (comparison, _), finding in zip(open_pairs, found, strict=True):
            comparison.outcome = finding.outcome
            comparison.placed_first, comparison.asked = finding.placed_first, finding.asked
