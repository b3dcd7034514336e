"""From scores in the scorer's unit to what a response is paid: running scale, clipping, penalties for its form."""

from collections.abc import Sequence
from typing import Any

from stages.config.rollouts import PPOConfig
from stages.losses.rewards import Moments, merged_moments, overlong_penalty
from stages.train.rollout.sampling import Sampled

STATE = "reward_moments"
"""Name of the running statistics in checkpoints; a training without them has none."""


class Payment:
    """What the config says about scores, and the statistics behind a running scale."""

    def __init__(self, config: PPOConfig) -> None:
        self._config = config
        self._moments = Moments(0, 0.0, 0.0)

    def paid(self, samples: Sequence[Sampled], scores: Sequence[float]) -> list[float]:
        """Return what each response earns, before any penalty for leaving the reference."""
        config = self._config
        if config.reward_scaling == "running":
            # This rollout is among what it is measured by, so the first one has a scale too. Only the spread is taken
            # out: without the mean, baselines and critic see whether responses get better.
            self._moments = merged_moments(self._moments, scores)
            scores = [score / (self._moments.std + 1e-8) for score in scores]
        if config.reward_clip:
            scores = [min(max(score, -config.reward_clip), config.reward_clip) for score in scores]
        return [score - self._penalty(sample) for sample, score in zip(samples, scores, strict=True)]

    def _penalty(self, sample: Sampled) -> float:
        config = self._config
        # A response that was cut off may have a good score so far: without the penalty the policy learns not to end.
        penalty = 0.0 if sample.finished else config.missing_eos_penalty
        if config.overlong_tokens:
            penalty += config.overlong_penalty * overlong_penalty(
                len(sample.response), max_length=config.max_response_length, grace=config.overlong_tokens
            )
        return penalty

    def state_dict(self) -> dict[str, Any]:
        return {STATE: list(self._moments)} if self._config.reward_scaling == "running" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if STATE in state:
            self._moments = Moments(*state[STATE])
