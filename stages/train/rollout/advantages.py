"""How much better each token did than expected: estimators of advantages, one `match` over them.

An estimator sees a whole rollout, because statistics for whitening and baselines over the responses to one prompt
(`Sampled.group`) are taken over all ranks' responses.

Shape legend: R tokens of one response, N tokens of all responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from stages.losses.advantages import gae, whiten
from stages.train.rollout.sampling import Sampled


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation with a critic, whitened over the rollout."""

    gamma: float
    gae_lambda: float


Estimator = GAE  # a union, as soon as there is an estimator without a critic


@dataclass(frozen=True)
class Estimate:
    """Per token of one response."""

    advantages_R: np.ndarray
    returns_R: np.ndarray | None
    """What the critic should have predicted; None without one."""


def estimate(estimator: Estimator, samples: Sequence[Sampled], rewards: Sequence[Tensor]) -> list[Estimate]:
    """Return the estimate of each response. `rewards` holds each response's rewards per token, shape (R,)."""
    match estimator:
        case GAE():
            return _by_gae(estimator, samples, rewards)
        case _:
            assert_never(estimator)


def _by_gae(estimator: GAE, samples: Sequence[Sampled], rewards: Sequence[Tensor]) -> list[Estimate]:
    raw = []
    for sample, rewards_R in zip(samples, rewards, strict=True):
        assert sample.values_R is not None, "GAE needs a critic"
        # The critic's predictions at sampling time: those of the update would chase their own targets.
        values_R = torch.from_numpy(sample.values_R)
        raw.append(gae(rewards_R=rewards_R, values_R=values_R, gamma=estimator.gamma, gae_lambda=estimator.gae_lambda))
    # Statistics of all tokens of the rollout, not of a minibatch: an advantage does not depend on its neighbours in
    # the update. Returns are left as they are, because the critic predicts rewards in their own unit.
    everything_N = torch.cat([one.advantages_R for one in raw])
    mean, std = float(everything_N.mean()), float(everything_N.std(unbiased=False))
    return [
        Estimate(whiten(one.advantages_R, mean=mean, std=std).numpy(), returns_R=one.returns_R.numpy()) for one in raw
    ]
