"""What a response is worth: scorers, today the reward model.

A scorer gives each response one number (its score) and knows in which unit such numbers count as rewards.

Shape legend: S sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from stages.data.tokens.packing import Packed, RowBudget, TokenSequence
from stages.losses.rewards import normalised_score
from stages.models.forward import segment_scores
from stages.models.lora import start_of
from stages.train.engine import Engine
from stages.train.rollout.inference import infer_each


class Scorer(Protocol):
    """Judges responses; may keep state, which becomes part of the checkpoint."""

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[float]:
        """Return the score of each sequence; the targets of its loss mask are the response, the rest is the prompt.

        Every rank calls it for its own sequences, so a scorer may compute with sharded models.
        """
        ...

    def rewards(self, scores: Sequence[float]) -> list[float]:
        """Return a rollout's scores in the unit of rewards; a scorer may take its scale from the first rollout."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """JSON values, by names that no other part of the objective uses."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class ScoreScale:
    """Mean and spread of the first rollout's scores: rewards are in units of how much SFT answers differ."""

    mean: float
    std: float

    @staticmethod
    def of(scores: Sequence[float]) -> "ScoreScale":
        values = np.array(scores)
        return ScoreScale(float(values.mean()), float(values.std()))


class RewardModel:
    """The trained reward model, frozen, and the scale of its scores.

    The scale is that of the first rollout and stays: a moving one would take away the growth that training is about.
    """

    def __init__(self, frozen: nn.Module | None, *, pad_id: int, budget: RowBudget) -> None:
        """`frozen` None means that the critic without its adapter is the reward model."""
        self._frozen, self._pad_id, self._budget = frozen, pad_id, budget
        self._scale: ScoreScale | None = None

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[float]:
        found: list[float] = []
        for _, scores_S in infer_each(engine, self._score, sequences, self._budget):
            found += scores_S.float().cpu().tolist()
        return found

    def _score(self, parts: nn.ModuleDict, batch: Packed) -> Tensor:
        # The score is read at the end of the response, where the model has seen all of it.
        if self._frozen is not None:
            return segment_scores(self._frozen, batch, pad_id=self._pad_id)
        with start_of(parts["critic"], None) as reward:
            return segment_scores(reward, batch, pad_id=self._pad_id)

    def rewards(self, scores: Sequence[float]) -> list[float]:
        # Scores of a Bradley-Terry model have no unit of their own, while `kl_coefficient` weighs them against nats.
        scale = self._scale = self._scale or ScoreScale.of(scores)
        return [normalised_score(score, mean=scale.mean, std=scale.std) for score in scores]

    def state_dict(self) -> dict[str, Any]:
        # A resumed run must not take its scale from a later rollout, which has drifted.
        return {"scale": None if self._scale is None else [self._scale.mean, self._scale.std]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scale = None if state["scale"] is None else ScoreScale(*state["scale"])
