"""The known optimum of a three-armed bandit, which every kind of alignment must reach, and where another one is meant
its own."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.config.preference_losses import (
    EXOLoss,
    HingeLoss,
    IPOLoss,
    LengthNormalizedLoss,
    PairLoss,
    RobustLoss,
    SigmoidLoss,
    SimPOLoss,
)
from stages.losses.divergence import k1
from stages.losses.policy import ppo_policy_loss
from stages.losses.preference import preference_loss
from tests.unit.losses.test_preference import pairs_of

REWARDS, REFERENCE, BETA = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.2, 0.5, 0.3]), 0.5
OPTIMUM = [0.732165, 0.247720, 0.020115]
"""Proportional to p_ref exp(r / beta)."""


def preferred(a: int, b: int) -> float:
    """Bradley-Terry: how often people prefer arm a to arm b."""
    return float(torch.sigmoid(REWARDS[a] - REWARDS[b]))


def learnt(loss: PairLoss, share: Callable[[int, int], float], reference: Tensor = REFERENCE) -> list[float]:
    """The policy that minimises the loss where each pair of arms is compared equally often, a won with `share`."""
    logits = reference.double().log().requires_grad_()
    log_reference = logits.detach().clone()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def loss_sum() -> Tensor:
        logprobs, total = logits.log_softmax(0), torch.zeros((), dtype=torch.float64)
        for a in range(len(reference)):
            for b in range(a + 1, len(reference)):
                for first, second, weight in ((a, b, share(a, b)), (b, a, 1 - share(a, b))):
                    sides = [of[arm : arm + 1] for of in (logprobs, log_reference) for arm in (first, second)]
                    total = total + weight * preference_loss(loss, pairs_of(*sides)).loss_sum
        optimizer.zero_grad()
        total.backward()
        return total

    optimizer.step(loss_sum)
    return logits.softmax(0).tolist()


def distance(found: list[float], expected: list[float]) -> float:
    """Total variation."""
    return sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / 2


@pytest.mark.parametrize(
    "loss", [SigmoidLoss(beta=BETA), LengthNormalizedLoss(beta=BETA), RobustLoss(beta=BETA)], ids=lambda it: it.kind
)
def test_losses_of_the_bradley_terry_model_reach_the_known_optimum(loss: PairLoss) -> None:
    """Robust smoothing does so from labels of which it knows that a share is flipped."""
    e = loss.label_smoothing if isinstance(loss, RobustLoss) else 0.0
    assert distance(learnt(loss, lambda a, b: (1 - e) * preferred(a, b) + e * preferred(b, a)), OPTIMUM) < 0.01


def test_ipo_weighs_the_reference_by_how_often_an_arm_wins() -> None:
    """Azar et al. 2023: p is proportional to p_ref exp((share of wins against an arm drawn evenly) / tau), by eq. 17
    over all pairs; a comparison with itself is won half of the time."""
    wins = [(0.5 + sum(preferred(a, b) for b in range(3) if b != a)) / 3 for a in range(3)]
    weights = REFERENCE * torch.exp(torch.tensor(wins) / BETA)
    assert distance(learnt(IPOLoss(beta=BETA), preferred), (weights / weights.sum()).tolist()) < 1e-4


def test_two_arms_of_hinge_exo_and_simpo_end_where_their_own_equations_say() -> None:
    """The ratio of two arms that follows from the margin at which the slopes of both labels cancel, for 3 of 4 wins."""
    reference, share = torch.tensor([0.4, 0.6]), 0.75

    def odds(loss: PairLoss) -> float:
        first, second = learnt(loss, lambda a, b: share, reference)
        return first / second

    smoothing = 0.1
    # Hinge: beyond a margin of 1 only the losing label has a slope. 1 / beta is the log-ratio there.
    assert odds(HingeLoss(beta=0.5)) == pytest.approx(2 / 3 * math.exp(1 / 0.5), rel=1e-3)
    # EXO: the choice is proportional to (1 - e)^p e^(1 - p), so the margin is (2 p - 1) ln((1 - e) / e) = ln 9 / 2.
    expected = 2 / 3 * math.exp(math.log(9) / 2 / 0.5)
    assert odds(EXOLoss(beta=0.5, label_smoothing=smoothing)) == pytest.approx(expected, rel=1e-3)
    # SimPO, with x = e^margin and g = e^gamma: p / (g + x) = (1 - p) x / (1 + x g), so x^2 - 2 g x - 3 = 0 here.
    g = math.exp(0.5)
    x = g + math.sqrt(g * g + 3)
    assert odds(SimPOLoss(beta=2.0, gamma=0.5)) == pytest.approx(x ** (1 / 2.0), rel=1e-3)


def test_ppo_reaches_the_known_optimum() -> None:
    rewards, reference, beta = REWARDS, REFERENCE, BETA
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    for _ in range(4000):
        logprobs = logits.log_softmax(0)
        # exact expectation of the penalised reward over three actions: score minus KL, as shaped_rewards pays it
        advantage = (rewards - beta * k1(logprobs - reference.log())).detach()
        baseline = (logprobs.exp().detach() * advantage).sum()
        terms = ppo_policy_loss(
            logprobs_N=logprobs, old_logprobs_N=logprobs.detach(), advantages_N=advantage - baseline, clip_range=0.2
        )
        assert terms.clipped_sum.item() == 0
        loss = -(logprobs.exp() * (advantage - baseline)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0).tolist() == pytest.approx(OPTIMUM, abs=2e-3)
