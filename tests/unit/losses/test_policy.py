"""The policy's and the critic's losses against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch

from stages.losses.policy import entropy, ppo_policy_loss, ppo_value_loss


def test_ppo_at_the_old_policy_has_no_kl_and_clips_nothing() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5])
    terms = ppo_policy_loss(
        logprobs_N=logprobs, old_logprobs_N=logprobs, advantages_N=torch.tensor([1.0, -2.0, 0.5]), clip_range=0.2
    )
    assert terms.loss_sum.item() == pytest.approx(-(1.0 - 2.0 + 0.5))
    assert terms.clipped_sum.item() == 0
    assert terms.approx_kl_sum.item() == 0


def test_ppo_clips_by_hand() -> None:
    # A=+1: min(1.5, 1.2) = 1.2 (clipped); A=+1: min(0.5, 0.8) = 0.5; A=-1: max(0.5, 0.8) = 0.8 (clipped)
    ratios = torch.tensor([1.5, 0.5, 0.5])
    terms = ppo_policy_loss(
        logprobs_N=ratios.log(),
        old_logprobs_N=torch.zeros(3),
        advantages_N=torch.tensor([1.0, 1.0, -1.0]),
        clip_range=0.2,
    )
    assert terms.loss_sum.item() == pytest.approx(-1.2 - 0.5 + 0.8)
    assert terms.clipped_sum.item() == 2


def test_value_loss_takes_the_worse_of_clipped_and_free() -> None:
    # free error (2 - 0)^2 = 4, clipped prediction 1 + 0.2 = 1.2, error 1.44: the larger counts, halved
    loss = ppo_value_loss(
        values_N=torch.tensor([2.0]), old_values_N=torch.tensor([1.0]), returns_N=torch.tensor([0.0]), clip_range=0.2
    )
    assert loss.item() == pytest.approx(2.0)


def test_entropy_of_a_uniform_row_is_ln_v() -> None:
    assert entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
