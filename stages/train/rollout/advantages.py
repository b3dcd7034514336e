"""How much better each token did than expected: estimators of advantages, one `match` over them.

An estimator sees a whole rollout, because statistics for whitening and baselines over the responses to one prompt
(`Sampled.group`) are taken over all ranks' responses.

Shape legend: R tokens of one response, N tokens of all responses, G responses to one prompt, S responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import torch
from torch import Tensor

from stages.config.estimators import GAE, GRPO, RLOO, Estimator, Reinforce
from stages.losses.advantages import gae, group_relative, leave_one_out, rewards_to_go, whiten
from stages.train.rollout.sampling import Sampled


@dataclass(frozen=True)
class Estimate:
    """Per token of one response."""

    advantages_R: np.ndarray
    returns_R: np.ndarray | None
    """What the critic should have predicted; None without one."""


def estimate(
    estimator: Estimator, samples: Sequence[Sampled], rewards: Sequence[Tensor], *, baseline: float | None = None
) -> list[Estimate]:
    """Return the estimate of each response. `rewards` holds each response's rewards per token, shape (R,); `baseline`
    is what earlier rollouts earned on average, None before there are any."""
    match estimator:
        case GAE():
            return _by_gae(estimator, samples, rewards)
        case RLOO():
            by_response = _by_group(samples, rewards, leave_one_out)
            return _without_critic(by_response, whitened=estimator.whiten)
        case GRPO():

            def relative(rewards_G: np.ndarray) -> np.ndarray:
                return group_relative(rewards_G, divide_by_std=estimator.divide_by_std)

            return _without_critic(_by_group(samples, rewards, relative), whitened=False)
        case Reinforce():
            if estimator.baseline == "batch" or baseline is None:
                baseline = mean_total(rewards)
            to_go = [rewards_to_go(rewards_R) - baseline for rewards_R in rewards]
            return _without_critic(to_go, whitened=estimator.whiten)
        case _:
            assert_never(estimator)


def mean_total(rewards: Sequence[Tensor]) -> float:
    """Return what a response earned in all, averaged over responses."""
    return float(np.mean([float(rewards_R.sum()) for rewards_R in rewards]))


def _by_gae(estimator: GAE, samples: Sequence[Sampled], rewards: Sequence[Tensor]) -> list[Estimate]:
    raw = []
    for sample, rewards_R in zip(samples, rewards, strict=True):
        assert sample.values_R is not None, "GAE needs a critic"
        # The critic's predictions at sampling time: those of the update would chase their own targets.
        values_R = torch.from_numpy(sample.values_R)
        raw.append(gae(rewards_R=rewards_R, values_R=values_R, gamma=estimator.gamma, gae_lambda=estimator.gae_lambda))
    # Returns are left as they are, because the critic predicts rewards in their own unit.
    advantages = _whitened([one.advantages_R for one in raw]) if estimator.whiten else [one.advantages_R for one in raw]
    return [
        Estimate(advantages_R.numpy(), one.returns_R.numpy()) for advantages_R, one in zip(advantages, raw, strict=True)
    ]


def _by_group(
    samples: Sequence[Sampled], rewards: Sequence[Tensor], compare: Callable[[np.ndarray], np.ndarray]
) -> list[Tensor]:
    """Compare what the responses to one prompt earned in all; every token of a response gets the same."""
    # The whole response is one action: which token earned the reward is not asked, so nothing has to be learned for it.
    totals_S = np.array([float(rewards_R.double().sum()) for rewards_R in rewards])
    groups_S = np.array([sample.group for sample in samples])
    better_S = np.empty_like(totals_S)
    for group in np.unique(groups_S):
        better_S[groups_S == group] = compare(totals_S[groups_S == group])
    return [torch.full_like(rewards_R, float(better)) for rewards_R, better in zip(rewards, better_S, strict=True)]


def _without_critic(advantages: list[Tensor], *, whitened: bool) -> list[Estimate]:
    chosen = _whitened(advantages) if whitened else advantages
    return [Estimate(advantages_R.numpy(), returns_R=None) for advantages_R in chosen]


def _whitened(advantages: list[Tensor]) -> list[Tensor]:
    # Statistics of all tokens of the rollout, not of a minibatch: an advantage does not depend on its neighbours in
    # the update.
    everything_N = torch.cat(advantages)
    mean, std = float(everything_N.mean()), float(everything_N.std(unbiased=False))
    return [whiten(advantages_R, mean=mean, std=std) for advantages_R in advantages]
