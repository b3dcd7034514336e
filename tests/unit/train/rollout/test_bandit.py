"""The known optimum of a three-armed bandit, which every estimator of advantages must reach.

Rewards (1, 0, -1), reference (.2, .5, .3), beta .5: p* is proportional to p_ref exp(r / beta). Expectations are exact:
every pair of responses that the policy could give is there, weighted by its probability, so nothing is drawn.
"""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.config.estimators import GAE, GRPO, RLOO, Reinforce
from stages.losses.divergence import k2, k3
from stages.losses.policy import ppo_policy_loss, ppo_value_loss
from stages.losses.rewards import shaped_rewards
from stages.train.rollout.advantages import estimate
from stages.train.rollout.sampling import Sampled

REWARDS, REFERENCE, BETA = (1.0, 0.0, -1.0), torch.tensor([0.2, 0.5, 0.3]), 0.5
OPTIMUM = [0.732165, 0.247720, 0.020115]
GROUP = 2
GROUPS = list(itertools.product(range(3), repeat=GROUP))
ARMS = torch.tensor(GROUPS).flatten()


def optimum(beta: float) -> list[float]:
    weights = REFERENCE * (torch.tensor(REWARDS) / beta).exp()
    return (weights / weights.sum()).tolist()


def distance(found: list[float], expected: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / 2


def test_the_optimum_is_the_closed_form() -> None:
    assert optimum(BETA) == pytest.approx(OPTIMUM, abs=1e-6)


def responses(logprobs: Tensor, value: float) -> list[Sampled]:
    """Each response of each group: one token, the arm."""
    return [
        Sampled(
            prompt=np.array([9]),
            response=np.array([arm]),
            group=number // GROUP,
            logprobs_R=logprobs[arm : arm + 1].numpy(),
            ref_logprobs_R=REFERENCE.log()[arm : arm + 1].numpy(),
            values_R=np.array([value], dtype=np.float32),
            score=REWARDS[arm],
            finished=True,
        )
        for number, arm in enumerate(ARMS.tolist())
    ]


def trained(estimator: Any, *, divergence: Any = None, steps: int = 150) -> list[float]:
    """Policy and critic from the reference; with `divergence` the penalty is paid in the loss, else in the reward."""
    logits, value = REFERENCE.log().clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([logits, value], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        logprobs = logits.log_softmax(0)
        fixed = logprobs.detach()
        # The probability of the whole group, shared among its responses.
        weights = fixed[torch.tensor(GROUPS)].sum(1).exp().repeat_interleave(GROUP) / GROUP
        paid = [
            shaped_rewards(
                logprobs_R=fixed[arm : arm + 1],
                ref_logprobs_R=REFERENCE.log()[arm : arm + 1],
                score=REWARDS[arm],
                kl_coefficient=0.0 if divergence else BETA,
            )
            for arm in range(3)
        ]
        samples = responses(fixed, value.item())
        estimates = estimate(estimator, samples, [paid[arm] for arm in ARMS.tolist()])
        terms = ppo_policy_loss(
            logprobs_N=logprobs[ARMS],
            old_logprobs_N=fixed[ARMS],
            advantages_N=torch.from_numpy(np.concatenate([one.advantages_R for one in estimates])),
            clip_range=0.2,
            weights_N=weights,
        )
        assert (terms.clipped_sum.item(), terms.approx_kl_sum.item()) == (0, 0)
        loss = terms.loss_sum
        if divergence:
            loss = loss + BETA * (weights * divergence(logprobs[ARMS] - REFERENCE.log()[ARMS])).sum()
        if isinstance(estimator, GAE):
            returns = torch.tensor([float(one.returns_R[0]) for one in estimates if one.returns_R is not None])
            old = value.detach().expand(len(ARMS))
            loss = loss + ppo_value_loss(
                values_N=value.expand(len(ARMS)), old_values_N=old, returns_N=returns, clip_range=9.0, weights_N=weights
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return logits.softmax(0).tolist()


@pytest.mark.parametrize(
    "estimator",
    [
        GAE(whiten=False),
        RLOO(responses_per_prompt=GROUP),
        GRPO(responses_per_prompt=GROUP),
        GRPO(responses_per_prompt=GROUP, divide_by_std=False),
        Reinforce(whiten=False),
    ],
    ids=["ppo", "rloo", "grpo", "dr_grpo", "reinforce"],
)
def test_every_estimator_reaches_the_optimum_with_the_penalty_in_the_reward(estimator: Any) -> None:
    assert distance(trained(estimator), OPTIMUM) < 0.01


@pytest.mark.parametrize("estimator", [RLOO(responses_per_prompt=GROUP), Reinforce(whiten=False)], ids=["rloo", "r"])
def test_k2_in_the_loss_reaches_the_same_optimum(estimator: Any) -> None:
    assert distance(trained(estimator, divergence=k2), OPTIMUM) < 0.01


def test_k3_in_the_loss_reaches_the_optimum_of_the_reverse_divergence() -> None:
    """Maximising r p - beta KL(ref||p) gives p = beta ref / (z - r), with z so that it sums to 1: z = 1.140695."""
    z = 1.140695
    expected = [BETA * share / (z - reward) for share, reward in zip(REFERENCE.tolist(), REWARDS, strict=True)]
    assert sum(expected) == pytest.approx(1.0, abs=1e-4)
    assert expected == pytest.approx([0.710, 0.219, 0.070], abs=1e-3)
    found = trained(RLOO(responses_per_prompt=GROUP), divergence=k3)
    assert distance(found, expected) < 0.01
    assert distance(found, OPTIMUM) > 0.04


def test_a_group_mean_that_holds_the_response_itself_makes_a_penalty_in_the_loss_stronger() -> None:
    """GRPO's advantages are (G - 1) / G of the leave-one-out ones, so beta is that much larger: 1 for pairs."""
    found = trained(GRPO(responses_per_prompt=GROUP, divide_by_std=False), divergence=k2)
    assert distance(found, optimum(BETA * GROUP / (GROUP - 1))) < 0.01
    assert distance(found, OPTIMUM) > 0.05
