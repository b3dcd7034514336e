"""Held-out language: bits per byte of documents, which any two models have in common, and the perplexity of rows.

Bits per byte counts the text alone. The first token is predicted from the begin token, or the end token where there is
no begin, so that every model predicts all of the text; the token that ends a document is no text. A document longer
than a window is read in windows, each beginning with the last token of the one before, as lm-evaluation-harness does.
"""

import hashlib
from collections import Counter

import numpy as np

from stages.data.tokens.packing import TokenSequence, collate
from stages.judge.builtin.facts import Facts, digest_of, measurement
from stages.judge.forward import Forward
from stages.judge.heldout import EMPTY, TOO_LONG, Heldout
from stages.judge.suite import Measurement, Score, Subject
from stages.losses.language import bits_per_byte


class Language(Facts):
    """Bits per byte, by document."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._documents, self._forward = heldout.documents, forward
        self._window = heldout.tokens.sequence_length
        items = [[one.id, one.text] for one in heldout.documents]
        super().__init__("language", "bits_per_byte", "lower", digest_of("language", items, window=self._window))

    def __len__(self) -> int:
        return len(self._documents)

    def measure(self, subject: Subject) -> Measurement:
        window = max(2, min(self._window, subject.context_length))
        encoded = subject.tokenizer.encode_texts([one.text for one in self._documents])
        skipped: Counter[str] = Counter()
        pieces, owners = [], []
        lengths = np.zeros(len(self._documents), dtype=np.int64)
        for number, ids in enumerate(encoded):
            text_ids = ids[int(subject.tokenizer.bos_id >= 0) : -1]
            lengths[number] = len(text_ids)
            begin = subject.tokenizer.bos_id if subject.tokenizer.bos_id >= 0 else subject.tokenizer.eos_id
            windows = _windows(np.concatenate([[begin], text_ids]), window)
            pieces += windows
            owners += [number] * len(windows)
        sums = np.zeros(len(self._documents))
        # In the order of the owners: the sum of a document's windows does not depend on how they were batched.
        np.add.at(sums, owners, -self._forward.logprobs(subject.model, pieces))
        scores = []
        for one, loss, tokens in zip(self._documents, sums.tolist(), lengths.tolist(), strict=True):
            if tokens:
                scores.append(Score(one.id, bits_per_byte(loss, num_bytes=one.num_bytes), tokens=tokens))
            else:
                skipped[EMPTY] += 1
        return measurement(scores, skipped)


def _windows(ids: np.ndarray, window: int) -> list[TokenSequence]:
    """Cut ids into sequences of at most `window` tokens that predict each token but the first exactly once."""
    return [
        TokenSequence(part, np.ones(len(part), dtype=np.int64))
        for start in range(0, max(len(ids) - 1, 0), window - 1)
        if len(part := ids[start : start + window]) > 1
    ]


class RowLosses(Facts):
    """Negative log-likelihood of rows of the run's tokens, in nats: what perplexity is made of. Only for models that
    have the run's tokenizer."""

    def __init__(self, heldout: Heldout, forward: Forward) -> None:
        self._heldout, self._forward = heldout, forward
        told = digest_of(
            "rows",
            [int(number) for number in heldout.row_numbers],
            data=_content(heldout),
            row_length=heldout.tokens.sequence_length,
        )
        super().__init__("rows", "loss", "lower", told)

    def __len__(self) -> int:
        return len(self._heldout.row_numbers)

    def measure(self, subject: Subject) -> Measurement:
        numbers = [int(number) for number in self._heldout.row_numbers]
        if any(len(piece.ids) > subject.context_length for number in numbers for piece in self._heldout.rows[number]):
            # Perplexities compare over the same rows only, so that of some rows would say nothing.
            return measurement([], Counter({TOO_LONG: len(numbers)}))
        size = self._forward.budget.max_rows
        scores = []
        for start in range(0, len(numbers), size):
            rows = [self._heldout.rows[number] for number in numbers[start : start + size]]
            batch = collate(rows)
            sums = self._forward.logprobs_of(subject.model, [batch])
            ends = np.cumsum([len(row) for row in rows])
            targets = [sum(len(piece.ids) - 1 for piece in row) for row in rows]
            for number, part, count in zip(numbers[start:], np.split(sums, ends[:-1]), targets, strict=False):
                scores.append(Score(f"row-{number}", float(-part.sum()), tokens=count))
        return measurement(scores, Counter())


def _content(heldout: Heldout) -> str:
    """Hash over the ids of the measured rows."""
    told = hashlib.sha256()
    for number in heldout.row_numbers:
        for piece in heldout.rows[int(number)]:
            told.update(piece.ids.astype(np.int64).tobytes() + b"|")
    return told.hexdigest()
