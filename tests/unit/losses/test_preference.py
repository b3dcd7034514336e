"""Preference losses against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch
from torch import Tensor

from stages.config.preferences import SigmoidLoss
from stages.losses.preference import PairLogprobs, preference_loss


def pairs_of(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> PairLogprobs:
    lengths = torch.ones_like(chosen)
    return PairLogprobs(chosen, rejected, lengths, lengths, ref_chosen, ref_rejected)


ONE_PAIR = pairs_of(*(torch.tensor([value]) for value in (-1.0, -4.0, -3.0, -2.0)))
"""Implicit rewards of 2 and -2, times beta."""


def test_dpo_with_policy_equal_to_reference_costs_ln_2() -> None:
    logprobs = torch.tensor([-4.0, -7.0])
    terms = preference_loss(SigmoidLoss(), pairs_of(logprobs, logprobs - 1, logprobs, logprobs - 1))
    assert terms.loss_sum.item() == pytest.approx(2 * math.log(2))


def test_dpo_by_hand() -> None:
    # margin = 0.5 * ((-1 - -3) - (-4 - -2)) = 0.5 * (2 + 2) = 2; loss = log(1 + e^-2)
    terms = preference_loss(SigmoidLoss(beta=0.5), ONE_PAIR)
    assert terms.loss_sum.item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert (terms.chosen_rewards_P - terms.rejected_rewards_P).item() == pytest.approx(2.0)


def test_label_smoothing_mixes_both_directions() -> None:
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    terms = preference_loss(SigmoidLoss(beta=0.5, label_smoothing=0.1), ONE_PAIR)
    assert terms.loss_sum.item() == pytest.approx(expected)


def test_a_pair_that_is_hopelessly_wrong_still_has_a_finite_loss_and_gradient() -> None:
    chosen = torch.tensor([-3000.0], requires_grad=True)
    zeros = torch.zeros(1)
    terms = preference_loss(SigmoidLoss(beta=1.0), pairs_of(chosen, zeros, zeros, zeros))
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == pytest.approx(3000.0)
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-1.0)
