"""Held-out replies of others: how likely a model finds them, and which of two it finds likelier.

All of it is counted by byte of the reply, so models with different tokenizers compare. `preferences` is the exception:
the implicit reward of DPO, relative to the model that this one was aligned from, which has the same tokenizer.
"""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from stages.data.tokens.packing import TokenSequence, lay_out, split_by_rows
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.forward import Forward
from stages.judge.heldout import EMPTY, Heldout, PairItem, Reply, Skipped, measurable
from stages.judge.suite import Measurement, Score, Subject


class Responses(Facts):
    """Negative log-likelihood of the held-out reply, in nats a byte."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._heldout, self._forward = heldout, forward
        items = [[one.id, one.num_bytes, sorted(one.turns)] for one in heldout.conversations]
        super().__init__("responses", "nats_per_byte", "lower", digest_of("responses", items))

    def __len__(self) -> int:
        return len(self._heldout.conversations)

    def measure(self, subject: Subject) -> Measurement:
        skipped: Counter[str] = Counter()
        kept = measurable(self._heldout.conversations, lambda one: _read(self._heldout, one, subject), skipped)
        sums = self._forward.logprobs(subject.model, [sequence for _, sequence in kept])
        scores = [
            Score(one.id, float(-logprob) / one.num_bytes, cluster=one.cluster, tokens=_targets(sequence))
            for (one, sequence), logprob in zip(kept, sums, strict=True)
        ]
        return measurement(scores, skipped)


class Pairs(Facts):
    """Whether a model finds the chosen reply likelier by byte than the rejected one; ties count one half."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._heldout, self._forward = heldout, forward
        super().__init__("pairs", "accuracy", "higher", digest_of("pairs", _told(heldout.pairs)), chance=0.5)

    def __len__(self) -> int:
        return len(self._heldout.pairs)

    def measure(self, subject: Subject) -> Measurement:
        skipped: Counter[str] = Counter()

        def read(pair: PairItem) -> tuple[TokenSequence, TokenSequence]:
            return _read(self._heldout, pair.chosen, subject), _read(self._heldout, pair.rejected, subject)

        kept = measurable(self._heldout.pairs, read, skipped)
        sums = self._forward.logprobs(subject.model, [side for _, sides in kept for side in sides])
        scores = []
        for (pair, sides), chosen, rejected in zip(kept, sums[0::2], sums[1::2], strict=True):
            margin = chosen / pair.chosen.num_bytes - rejected / pair.rejected.num_bytes
            scores.append(Score(pair.id, win(margin), cluster=pair.cluster, tokens=sum(map(_targets, sides))))
        return measurement(scores, skipped)


class Margins:
    """log p(chosen) - log p(rejected) of a model and of its start, computed once for the suites that need it."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._heldout, self._forward = heldout, forward
        self._known: tuple[tuple[str, str], np.ndarray] | None = None

    def of(self, subject: Subject, start: Subject) -> np.ndarray:
        """Return the margin of each pair relative to the start, in nats."""
        key = (subject.identity, start.identity)
        if self._known is None or self._known[0] != key:
            self._known = (key, self._compute(subject, start))
        return self._known[1]

    def _compute(self, subject: Subject, start: Subject) -> np.ndarray:
        pairs = self._heldout.pairs
        groups = [(len(pair.chosen.tokens.ids), len(pair.rejected.tokens.ids)) for pair in pairs]
        budget = self._forward.budget
        batches = [
            lay_out([side.tokens for i in part for side in (pairs[i].chosen, pairs[i].rejected)])
            for part in split_by_rows(groups, row_length=budget.row_length, max_rows=budget.max_rows)
        ]
        gains = self._forward.logprobs_of(subject.model, batches) - self._forward.logprobs_of(start.model, batches)
        return gains[0::2] - gains[1::2]


class Preferences(Facts):
    """Whether a model prefers the chosen reply more than its start does; ties count one half."""

    def __init__(self, heldout: Heldout, margins: Margins, start: Callable[[], Subject], start_identity: str) -> None:
        self._pairs, self._margins, self._start = heldout.pairs, margins, start
        told = digest_of("preferences", _told(heldout.pairs), start=start_identity)
        super().__init__("preferences", "accuracy", "higher", told, chance=0.5)

    def __len__(self) -> int:
        return len(self._pairs)

    def measure(self, subject: Subject) -> Measurement:
        margins = self._margins.of(subject, self._start())
        scores = [
            Score(pair.id, win(one), cluster=pair.cluster) for pair, one in zip(self._pairs, margins, strict=True)
        ]
        return measurement(scores, Counter())


class PreferenceMargins(Facts):
    """The same comparison as a number: how much more, in nats."""

    def __init__(self, heldout: Heldout, margins: Margins, start: Callable[[], Subject], start_identity: str) -> None:
        self._pairs, self._margins, self._start = heldout.pairs, margins, start
        told = digest_of("preference_margins", _told(heldout.pairs), start=start_identity)
        super().__init__("preference_margins", "nats", "higher", told)

    def __len__(self) -> int:
        return len(self._pairs)

    def measure(self, subject: Subject) -> Measurement:
        margins = self._margins.of(subject, self._start())
        scores = [
            Score(pair.id, float(one), cluster=pair.cluster) for pair, one in zip(self._pairs, margins, strict=True)
        ]
        return measurement(scores, Counter())


class RewardMargins(Facts):
    """Score of the chosen reply minus that of the rejected one; the subject is a reward model."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._heldout, self._forward = heldout, forward
        super().__init__("reward_margins", "margin", "higher", digest_of("reward_margins", _told(heldout.pairs)))

    def __len__(self) -> int:
        return len(self._heldout.pairs)

    def measure(self, subject: Subject) -> Measurement:
        pairs = self._heldout.pairs
        sides = [side.tokens for pair in pairs for side in (pair.chosen, pair.rejected)]
        found = self._forward.scores(subject.model, sides, pad_id=self._heldout.tokens.pad_id)
        margins = found[0::2] - found[1::2]
        scores = [Score(pair.id, float(one), cluster=pair.cluster) for pair, one in zip(pairs, margins, strict=True)]
        return measurement(scores, Counter())


def win(margin: float) -> float:
    """1 above zero, 0 below, one half for a tie; NaN stays NaN."""
    return 0.5 * (float(np.sign(margin)) + 1.0)


def _read(heldout: Heldout, reply: Reply, subject: Subject) -> TokenSequence:
    if not reply.num_bytes:
        raise Skipped(EMPTY)
    return heldout.sequence(reply, subject)


def _targets(sequence: TokenSequence) -> int:
    return int(sequence.loss_mask.sum())


def _told(pairs: Sequence[PairItem]) -> list[list[object]]:
    return [[pair.id, pair.chosen.num_bytes, pair.rejected.num_bytes] for pair in pairs]
