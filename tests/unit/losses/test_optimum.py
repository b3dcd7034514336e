"""The known optimum of a three-armed bandit, which every kind of alignment must reach."""

import pytest
import torch

from stages.config.preferences import SigmoidLoss
from stages.losses.divergence import k1
from stages.losses.policy import ppo_policy_loss
from stages.losses.preference import preference_loss
from tests.unit.losses.test_preference import pairs_of


@pytest.mark.parametrize("method", ["dpo", "ppo"])
def test_both_alignments_reach_the_known_optimum(method: str) -> None:
    """Rewards (1, 0, -1), reference (.2, .5, .3), beta .5: p* is proportional to p_ref exp(r / beta)."""
    rewards, reference, beta = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.2, 0.5, 0.3]), 0.5
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.02)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for _ in range(4000):
        logprobs = logits.log_softmax(0)
        if method == "ppo":
            # exact expectation of the penalised reward over three actions: score minus KL, as shaped_rewards pays it
            advantage = (rewards - beta * k1(logprobs - reference.log())).detach()
            baseline = (logprobs.exp().detach() * advantage).sum()
            terms = ppo_policy_loss(
                logprobs_N=logprobs, old_logprobs_N=logprobs.detach(), advantages_N=advantage - baseline, clip_range=0.2
            )
            assert terms.clipped_sum.item() == 0
            loss = -(logprobs.exp() * (advantage - baseline)).sum()
        else:
            loss = torch.zeros(())
            for a, b in pairs:
                preferred = torch.sigmoid(rewards[a] - rewards[b])
                for first, second, share in ((a, b, preferred), (b, a, 1 - preferred)):
                    ours, theirs = (
                        (of[first : first + 1], of[second : second + 1]) for of in (logprobs, reference.log())
                    )
                    terms = preference_loss(SigmoidLoss(beta=beta), pairs_of(*ours, *theirs))
                    loss = loss + share * terms.loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0).tolist() == pytest.approx([0.732165, 0.247720, 0.020115], abs=2e-3)
