"""The gold scorer's score of each sampled answer: a reward model that no model of the run was trained with.

One that was trained on the run's tokens reads the very ids that were sampled. A given one may have a tokenizer of its
own: then it reads prompt and answer as text, by its own chat template.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from stages.config.errors import ConfigError
from stages.data.pairs.turns import Unusable
from stages.data.tokens.packing import TokenSequence, prompt_and_response
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.builtin.sampled import Answer, Sampler
from stages.judge.forward import Forward
from stages.judge.heldout import EMPTY, NO_TEMPLATE, NO_TEXT, TOO_LONG, Skipped, measurable
from stages.judge.suite import Measurement, Score, Subject

GOLD = "gold"
"""Name of the suite."""


@dataclass(frozen=True)
class ForeignScorer:
    """A gold scorer with a tokenizer of its own."""

    model: nn.Module
    tokenizer: LoadedTokenizer
    end_id: int
    """What ends an assistant's turn."""
    context_length: int

    def read(self, answer: Answer) -> TokenSequence:
        """Return prompt and answer in its own tokens; raises Skipped where it cannot read them. An answer that did not
        end gets no end token."""
        chat = answer.prompt.chat
        if chat is None:
            raise Skipped(NO_TEXT)
        messages = [*chat.messages, {"role": "assistant", "content": answer.text}]
        try:
            encoded = self.tokenizer.chat().encode(messages, tools=chat.tools, turns={len(messages) - 1})
        except Unusable as error:
            raise Skipped(error.reason) from error
        except ConfigError as error:
            raise Skipped(NO_TEMPLATE) from error
        targets = np.flatnonzero(encoded.loss_mask)
        ids = encoded.ids[targets]
        ends = np.flatnonzero(ids == self.end_id)
        ids = ids[: ends[0] + int(answer.ended)] if len(ends) else ids
        if not len(ids):
            raise Skipped(EMPTY)
        if int(targets[0]) + len(ids) > self.context_length:
            raise Skipped(TOO_LONG)
        return prompt_and_response(encoded.ids[: targets[0]], ids)


class ForeignScores(Facts):
    """What `RewardScores` is for a scorer that reads the run's tokens."""

    def __init__(
        self,
        sampler: Sampler,
        forward: Forward,
        scorer: Callable[[], ForeignScorer],
        scorer_identity: str,
        *,
        name: str = GOLD,
    ) -> None:
        self._sampler, self._forward, self._scorer = sampler, forward, scorer
        told = digest_of(name, sampler.items, **sampler.settings, scorer=scorer_identity, reads="text")
        super().__init__(name, "score", "higher", told)

    def __len__(self) -> int:
        return len(self._sampler)

    def measure(self, subject: Subject) -> Measurement:
        found, scorer = self._sampler.of(subject), self._scorer()
        skipped = Counter(found.skipped)
        kept = measurable(found.answers, scorer.read, skipped)
        values = self._forward.scores(scorer.model, [ids for _, ids in kept], pad_id=scorer.tokenizer.pad_id)
        scores = [
            Score(answer.prompt.id, float(value), tokens=len(answer.ids), response=answer.text)
            for (answer, _), value in zip(kept, values, strict=True)
        ]
        return measurement(scores, skipped)
