"""The gold scorer next to a training: what a scorer that no training sees makes of the responses of each evaluation.

It reads responses that were sampled anyway and draws no random numbers, so the training is the same bit for bit with it
and without it. Its scores enter no reward; on request the training ends when they fall while those of the reward model
rise (over-optimisation, Gao et al. 2022, https://arxiv.org/abs/2210.10760).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.data.tokens.packing import prompt_and_response
from stages.train.engine import Engine
from stages.train.plan import share
from stages.train.rollout.sampling import Sampled
from stages.train.rollout.scoring import Scorer

GOLD_SCORE, GOLD_SPREAD = "eval/gold_score", "eval/gold_score_std"
STATE = "gold_scores"
"""Name of its numbers in checkpoints; a training without a gold scorer has none."""


class GoldWatch:
    """A `Watch`: scores the responses of evaluations and counts those in a row at which gold fell while the proxy
    rose."""

    def __init__(self, scorer: Scorer, *, patience: int) -> None:
        """`patience` evaluations in a row of that kind end the training; 0 never does."""
        self._scorer, self._patience = scorer, patience
        self._before: tuple[float, float] | None = None
        self._falls = 0

    def after_rollout(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        return {}  # the policy learns from these; gold is for what it does not

    def after_evaluation(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Return mean and spread of the gold scores, the same on every rank; `samples` are the whole evaluation, on
        every rank."""
        everything = np.arange(len(samples))
        mine = share(everything, rank=engine.rank, world_size=engine.world_size)
        # A rank without a response scores one all the same, for the collectives, and it is not counted.
        chosen = [samples[int(number)] for number in (mine if len(mine) else everything[:1])]
        scores = self._scorer.scores(engine, [prompt_and_response(one.prompt, one.response) for one in chosen])
        numbered = list(zip(mine.tolist(), [score.value for score in scores[: len(mine)]], strict=True))
        golds = [score for _, score in sorted(engine.gather(numbered))]
        gold = float(np.mean(golds))
        self._compare(float(np.mean([sample.score for sample in samples])), gold)
        return {GOLD_SCORE: gold, GOLD_SPREAD: float(np.std(golds)), "eval/gold_falls": float(self._falls)}

    def _compare(self, proxy: float, gold: float) -> None:
        if self._before is not None:
            rose, fell = proxy > self._before[0], gold < self._before[1]
            self._falls = self._falls + 1 if rose and fell else 0
        self._before = (proxy, gold)

    @property
    def ends(self) -> bool:
        """Whether training should end here: a function of the evaluations so far, so a resume decides alike."""
        return 0 < self._patience <= self._falls

    def reason(self) -> str:
        """Say why training ends, with the numbers."""
        proxy, gold = self._before or (float("nan"), float("nan"))
        return (
            f"the gold score fell (to {gold:.4g}) while the score rose (to {proxy:.4g}) in {self._falls} evaluations "
            f"in a row (ppo.gold_patience={self._patience})"
        )

    @property
    def ledger(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {STATE: {"before": self._before and list(self._before), "falls": self._falls}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state[STATE]["before"]
        self._before, self._falls = before and (before[0], before[1]), state[STATE]["falls"]
