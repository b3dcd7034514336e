"""What a model says to the held-out prompts, sampled once, and what is measured of it.

Prompts share their random numbers across models, so that scores and win rates compare answers to the same draws. A
reward model reads its own tokens: the answer of a model with another tokenizer is encoded again from its text.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from stages.data.tokens.packing import TokenSequence, prompt_and_response
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.forward import Forward
from stages.judge.heldout import TOO_LONG, Heldout, Prompt, Skipped, measurable
from stages.judge.suite import Measurement, Score, Subject
from stages.models.build import positions_of

_GRAM = 4
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Answer:
    """What one model said to one prompt."""

    prompt: Prompt
    ids: np.ndarray
    """In its own tokens, the end token included where it was reached."""
    text: str
    ended: bool
    tokens: TokenSequence | None
    """Prompt and answer in the run's tokens, where the model has them."""


@dataclass
class Answers:
    """The answers of one model, and the prompts that it could not answer."""

    answers: list[Answer]
    skipped: Counter[str]


class Sampler:
    """Asks a model the prompts, once for all suites that need its answers."""

    def __init__(
        self,
        heldout: Heldout,
        prompts: Sequence[Prompt],
        *,
        max_response_length: int,
        temperature: float,
        seed: int,
        beat: Callable[[], None],
    ) -> None:
        self.heldout, self.prompts = heldout, prompts
        self.settings = {"max_response_length": max_response_length, "temperature": temperature, "seed": seed}
        self.items = [prompt.id for prompt in prompts]
        self._length, self._temperature, self._beat = max_response_length, temperature, beat
        self._known: tuple[str, Answers] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def of(self, subject: Subject) -> Answers:
        if self._known is None or self._known[0] != subject.identity:
            self._known = (subject.identity, self._ask(subject))
        return self._known[1]

    def _ask(self, subject: Subject) -> Answers:
        skipped: Counter[str] = Counter()
        asked = measurable(
            self.prompts,
            lambda one: self.heldout.prompt_ids(one, subject, max_response_length=self._length),
            skipped,
        )
        answerer = subject.answerer(self._length, self._temperature)
        found: list[np.ndarray] = []
        for start in range(0, len(asked), answerer.batch_size):
            part = asked[start : start + answerer.batch_size]
            found += answerer.batch([ids for _, ids in part], numbers=[prompt.number for prompt, _ in part])
            self._beat()
        shared = self.heldout.reads_tokens(subject)
        return Answers(
            [
                Answer(
                    prompt,
                    ids,
                    subject.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=True).strip(),
                    ended=bool(len(ids)) and int(ids[-1]) == answerer.sampling.eos_id,
                    tokens=prompt_and_response(asked_ids, ids) if shared else None,
                )
                for (prompt, asked_ids), ids in zip(asked, found, strict=True)
            ],
            skipped,
        )


class RewardScores(Facts):
    """The reward model's score of each answer."""

    def __init__(
        self,
        sampler: Sampler,
        forward: Forward,
        scorer: Callable[[], nn.Module],
        scorer_identity: str,
        *,
        name: str = "score",
    ) -> None:
        self._sampler, self._forward, self._scorer = sampler, forward, scorer
        # The scorer reads the run's tokens, and answers of others are encoded with the run's chat template.
        reads = sampler.heldout.tokenizer.digest
        told = digest_of(name, sampler.items, **sampler.settings, scorer=scorer_identity, reads=reads)
        super().__init__(name, "score", "higher", told)

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        heldout, skipped = self._sampler.heldout, Counter(found.skipped)
        scorer: Any = self._scorer()
        limit = positions_of(scorer)  # it may read less than the model that it scores

        def read(answer: Answer) -> TokenSequence:
            tokens = answer.tokens
            if tokens is None:
                tokens = heldout.as_answered(answer.prompt, answer.text, ended=answer.ended)
            if limit is not None and len(tokens.ids) > limit:
                raise Skipped(TOO_LONG)
            return tokens

        kept = measurable(found.answers, read, skipped)
        values = self._forward.scores(scorer, [tokens for _, tokens in kept], pad_id=heldout.tokens.pad_id)
        return measurement([_score(one, value) for (one, _), value in zip(kept, values, strict=True)], skipped)


class Repetition(Facts):
    """Share of an answer's 4-grams of words that stood in it before; 0 where it has fewer than four words."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        super().__init__(
            "repetition", "repeated_4_grams", "lower", digest_of("repetition", sampler.items, **sampler.settings)
        )

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        scores = [_score(answer, repeated_share(answer.text)) for answer in found.answers]
        return measurement(scores, Counter(found.skipped))


class Length(Facts):
    """UTF-8 bytes of each answer; its tokens stand next to them."""

    def __init__(self, sampler: Sampler, *, name: str = "length") -> None:
        self._sampler = sampler
        super().__init__(name, "bytes", "", digest_of(name, sampler.items, **sampler.settings))

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        scores = [_score(answer, len(answer.text.encode("utf-8", "surrogatepass"))) for answer in found.answers]
        return measurement(scores, Counter(found.skipped))


class Divergence(Facts):
    """log p - log p_start of each whole answer: the sampled KL to the model that this one was aligned from, in nats."""

    def __init__(self, sampler: Sampler, forward: Forward, start: Callable[[], Subject], start_identity: str) -> None:
        self._sampler, self._forward, self._start = sampler, forward, start
        super().__init__("kl", "nats", "", digest_of("kl", sampler.items, **sampler.settings, start=start_identity))

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found = self._sampler.of(subject)
        sequences = [answer.tokens for answer in found.answers if answer.tokens is not None]
        batches = self._forward.batches(sequences)
        ours, theirs = (self._forward.logprobs_of(one.model, batches) for one in (subject, self._start()))
        scores = [_score(answer, gain) for answer, gain in zip(found.answers, ours - theirs, strict=True)]
        return measurement(scores, Counter(found.skipped))


def _score(answer: Answer, value: float) -> Score:
    return Score(answer.prompt.id, float(value), tokens=len(answer.ids), response=answer.text)


def repeated_share(text: str) -> float:
    """Return the share of 4-grams of words that stood in the text before."""
    words = _WORD.findall(text.lower())
    grams = [tuple(words[start : start + _GRAM]) for start in range(len(words) - _GRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
