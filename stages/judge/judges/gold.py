"""The gold scorer's score of each sampled answer: a reward model that no model of the run was trained with.

One that was trained on the run's tokens reads the very ids that were sampled. A given one may have a tokenizer of its
own: then it reads prompt and answer as text, by its own chat template.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from stages.config.errors import ConfigError
from stages.data.pairs.turns import Unusable
from stages.data.tokens.encoding import Chat
from stages.data.tokens.packing import TokenSequence, prompt_and_response
from stages.data.tokens.tokenizer import LoadedTokenizer
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.builtin.replies import win
from stages.judge.builtin.sampled import Answer, Sampler
from stages.judge.forward import Forward
from stages.judge.heldout import EMPTY, NO_TEMPLATE, NO_TEXT, TOO_LONG, Heldout, PairItem, Reply, Skipped, measurable
from stages.judge.suite import Measurement, Score, Subject

GOLD = "gold"
AGREEMENT = "gold_agreement"
"""Names of the suites."""


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
        return self.encoded(Chat(messages, chat.tools), ended=answer.ended)

    def read_reply(self, reply: Reply) -> TokenSequence:
        """Return a known conversation in its own tokens; raises Skipped where it cannot read it."""
        if reply.chat is None:
            raise Skipped(NO_TEXT)
        return self.encoded(reply.chat, ended=True)

    def encoded(self, chat: Chat, *, ended: bool) -> TokenSequence:
        """Encode a conversation whose last message is the answer."""
        messages = chat.messages
        try:
            encoded = self.tokenizer.chat().encode(messages, tools=chat.tools, turns={len(messages) - 1})
        except Unusable as error:
            raise Skipped(error.reason) from error
        except ConfigError as error:
            raise Skipped(NO_TEMPLATE) from error
        targets = np.flatnonzero(encoded.loss_mask)
        ids = encoded.ids[targets]
        ends = np.flatnonzero(ids == self.end_id)
        ids = ids[: ends[0] + int(ended)] if len(ends) else ids
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


class GoldAgreement(Facts):
    """Of held-out preference pairs: 1 where the gold scorer, the subject, scores the chosen reply higher, 0.5 for a
    tie."""

    def __init__(
        self,
        heldout: Heldout,
        pairs: Sequence[PairItem],
        forward: Forward,
        foreign: Callable[[], ForeignScorer] | None,
    ) -> None:
        """`pairs` are those of `heldout` that it is asked about; `foreign` opens a scorer that has a tokenizer of its
        own."""
        self._heldout, self._pairs, self._forward, self._foreign = heldout, pairs, forward, foreign
        items = [pair.id for pair in pairs]
        super().__init__(AGREEMENT, "accuracy", "higher", digest_of(AGREEMENT, items), chance=0.5)

    def __len__(self) -> int:
        return len(self._pairs)

    def measure(self, subject: Subject) -> Measurement:
        skipped: Counter[str] = Counter()
        foreign = self._foreign() if self._foreign else None

        def read(pair: PairItem) -> tuple[TokenSequence, TokenSequence]:
            if foreign is None:
                return pair.chosen.tokens, pair.rejected.tokens
            return foreign.read_reply(pair.chosen), foreign.read_reply(pair.rejected)

        kept = measurable(self._pairs, read, skipped)
        pad_id = self._heldout.tokens.pad_id if foreign is None else foreign.tokenizer.pad_id
        found = self._forward.scores(subject.model, [side for _, sides in kept for side in sides], pad_id=pad_id)
        margins = found[0::2] - found[1::2]
        scores = [
            Score(pair.id, win(float(margin)), cluster=pair.cluster)
            for (pair, _), margin in zip(kept, margins, strict=True)
        ]
        return measurement(scores, skipped)
