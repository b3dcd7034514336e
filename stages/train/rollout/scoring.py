"""What a response is worth: scorers, today the reward model.

A scorer gives each response one number (its score) and knows in which unit such numbers count as rewards.

Shape legend: S sequences, M members of an ensemble.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stages.config.rollouts import Aggregation
from stages.data.tokens.packing import Packed, RowBudget, TokenSequence
from stages.losses.rewards import aggregated_scores, normalised_score, score_spreads
from stages.models.forward import segment_scores
from stages.models.lora import start_of
from stages.train.engine import Engine
from stages.train.rollout.inference import infer_each


class Score(NamedTuple):
    """What a scorer says of one response."""

    value: float
    spread: float | None = None
    """How far those are apart whose scores make up the value; None where there is only one."""


class Scorer(Protocol):
    """Judges responses; may keep state, which becomes part of the checkpoint."""

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[Score]:
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


@dataclass(frozen=True)
class Reading:
    """How the scores of a reward model, or of the members of an ensemble, are read."""

    aggregation: Aggregation = "mean"
    spread_coefficient: float = 0.0
    offsets: tuple[float, ...] = ()
    """What is taken from each member's score, in the order of members. Bradley-Terry leaves the offset of scores open:
    without it, the minimum would be that of the member whose scores are low everywhere."""

    def scores(self, scores_MS: Tensor) -> list[Score]:
        """Make one score of the members'."""
        if self.offsets:
            scores_MS = scores_MS - scores_MS.new_tensor(self.offsets)[:, None]
        if len(scores_MS) == 1:
            return [Score(value) for value in scores_MS[0].tolist()]
        values_S = aggregated_scores(scores_MS, how=self.aggregation, spread_coefficient=self.spread_coefficient)
        both = zip(values_S.tolist(), score_spreads(scores_MS).tolist(), strict=True)
        return [Score(value, spread) for value, spread in both]


class RewardModel:
    """The trained reward model, frozen, or an ensemble, and the scale of its scores.

    The scale is that of the first rollout, unless one is given, and stays: a moving one would take away the growth that
    training is about.
    """

    def __init__(
        self,
        frozen: nn.Module | None,
        *,
        pad_id: int,
        budget: RowBudget,
        further: Sequence[nn.Module] = (),
        reading: Reading = Reading(),
        scale: ScoreScale | None = None,
    ) -> None:
        """`frozen` None means that the critic without its adapter is the reward model; `further` are the other members
        of its ensemble."""
        self._frozen, self._pad_id, self._budget = frozen, pad_id, budget
        self._further, self._reading, self._scale = tuple(further), reading, scale

    def scores(self, engine: Engine, sequences: Sequence[TokenSequence]) -> list[Score]:
        found: list[Score] = []
        for _, scores_MS in infer_each(engine, self._score, sequences, self._budget):
            found += self._reading.scores(scores_MS.float().cpu())
        return found

    def _score(self, parts: nn.ModuleDict, batch: Packed) -> Tensor:
        # The score is read at the end of the response, where the model has seen all of it.
        further = [segment_scores(member, batch, pad_id=self._pad_id) for member in self._further]
        if self._frozen is not None:
            return torch.stack([segment_scores(self._frozen, batch, pad_id=self._pad_id), *further])
        with start_of(parts["critic"], None) as reward:
            return torch.stack([segment_scores(reward, batch, pad_id=self._pad_id), *further])

    def rewards(self, scores: Sequence[float]) -> list[float]:
        # Scores of a Bradley-Terry model have no unit of their own, while `kl_coefficient` weighs them against nats.
        scale = self._scale = self._scale or ScoreScale.of(scores)
        return [normalised_score(score, mean=scale.mean, std=scale.std) for score in scores]

    def state_dict(self) -> dict[str, Any]:
        # A resumed run must not take its scale from a later rollout, which has drifted.
        return {"scale": None if self._scale is None else [self._scale.mean, self._scale.std]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scale = None if state["scale"] is None else ScoreScale(*state["scale"])
