"""What suites ask of a model on token ids: sums of log-probabilities and scores, in batches that bound the memory.

A sequence without targets sums to 0. Results that are not finite are returned as they are: a suite skips such an item
and says so.

Shape legend: S segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from stages.data.tokens.packing import Packed, RowBudget, TokenSequence, lay_out
from stages.models.forward import segment_logprobs, segment_scores
from stages.models.precision import autocast


def _silent() -> None: ...


@dataclass(frozen=True)
class Forward:
    """Runs models of this process on packed sequences."""

    device: torch.device
    budget: RowBudget
    """Tokens that pass through a model at once; a longer sequence passes alone."""
    beat: Callable[[], None] = field(default=_silent)
    """Called after every batch, so that a slow evaluation does not look like one that hangs."""

    def logprobs(self, model: nn.Module, sequences: Sequence[TokenSequence]) -> np.ndarray:
        """Return the log-probability of each sequence's targets together, in nats."""
        return self._joined(segment_logprobs, model, self.batches(sequences))

    def logprobs_of(self, model: nn.Module, batches: Sequence[Packed]) -> np.ndarray:
        """As `logprobs`, for batches that the caller has laid out, segment by segment."""
        return self._joined(segment_logprobs, model, batches)

    def scores(self, scorer: nn.Module, sequences: Sequence[TokenSequence], *, pad_id: int) -> np.ndarray:
        """Return the reward model's score of each sequence."""
        return self._joined(segment_scores, scorer, self.batches(sequences), pad_id=pad_id)

    def batches(self, sequences: Sequence[TokenSequence]) -> list[Packed]:
        longest = max((len(sequence.ids) for sequence in sequences), default=0)
        budget = RowBudget(max(self.budget.row_length, longest), self.budget.max_rows)
        return [lay_out(part) for part in budget.cut(sequences)]

    def _joined(
        self, compute: Callable[..., Any], model: nn.Module, batches: Sequence[Packed], **options: Any
    ) -> np.ndarray:
        found = [np.empty(0)]
        for batch in batches:
            with torch.no_grad(), autocast(self.device):
                values_S = compute(model, batch.to(self.device), **options)
            found.append(values_S.double().cpu().numpy())
            self.beat()
        return np.concatenate(found)
