"""The policy's and the critic's losses against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch

from stages.losses.policy import entropy, ppo_policy_loss, ppo_value_loss, truncated_weights


def test_ppo_at_the_old_policy_has_no_kl_and_clips_nothing() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    terms = ppo_policy_loss(
        logprobs_N=logprobs,
        old_logprobs_N=logprobs.detach(),
        advantages_N=torch.tensor([1.0, -2.0, 0.5]),
        clip_range=0.2,
        dual_clip=3.0,
    )
    assert terms.loss_sum.item() == pytest.approx(-(1.0 - 2.0 + 0.5))
    # The policy gradient: minus the advantage for each log-probability.
    assert torch.autograd.grad(terms.loss_sum, logprobs)[0].tolist() == [-1.0, 2.0, -0.5]
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


def test_the_value_loss_starts_as_half_the_squared_error_with_its_slope() -> None:
    values = torch.tensor([2.0, -1.0], requires_grad=True)
    loss = ppo_value_loss(
        values_N=values, old_values_N=values.detach(), returns_N=torch.tensor([0.5, 0.0]), clip_range=0.2
    )
    assert loss.item() == pytest.approx((1.5**2 + 1.0**2) / 2)
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([1.5, -1.0])


def test_a_value_that_went_its_way_beyond_the_range_is_held_and_one_that_went_wrong_is_not() -> None:
    # Both moved by 0.5 and are clipped to 0.2; the first goes towards its return of 3, the second away from its 0.
    values = torch.tensor([1.5, 1.5], requires_grad=True)
    loss = ppo_value_loss(
        values_N=values, old_values_N=torch.ones(2), returns_N=torch.tensor([3.0, 0.0]), clip_range=0.2
    )
    assert loss.item() == pytest.approx((1.8**2 + 1.5**2) / 2)
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([0.0, 1.5])


def test_entropy_of_a_uniform_row_is_ln_v_and_most() -> None:
    logits = torch.zeros(1, 8, requires_grad=True)
    assert entropy(logits).item() == pytest.approx(math.log(8))
    assert torch.autograd.grad(entropy(logits).sum(), logits)[0].abs().max().item() == pytest.approx(0, abs=1e-6)


def test_entropy_and_its_slope_by_hand() -> None:
    # Probabilities 3/4 and 1/4. A logit moves the entropy by -p (ln p + H): 3/16 ln 3 down, and the other way round.
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    found = entropy(logits)
    assert found.item() == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    slope = 3 / 16 * math.log(3)
    assert torch.autograd.grad(found.sum(), logits)[0][0].tolist() == pytest.approx([-slope, slope])


def surrogate(ratios: list[float], advantages: list[float], **settings: float):
    logprobs = torch.tensor(ratios).log().requires_grad_()
    terms = ppo_policy_loss(
        logprobs_N=logprobs,
        old_logprobs_N=torch.zeros(len(ratios)),
        advantages_N=torch.tensor(advantages),
        clip_range=0.2,
        **settings,  # type: ignore[arg-type]
    )
    (gradient,) = torch.autograd.grad(terms.loss_sum, logprobs)
    return terms.loss_sum.item(), terms.clipped_sum.item(), gradient.tolist()


def test_clip_higher_leaves_room_above_and_none_below() -> None:
    # A=+1: 1.25 is free up to 1.28, 1.5 is clipped there; A=-1 at 0.7: max(0.7, 0.8), clipped below as ever
    loss, clipped, gradient = surrogate([1.25, 1.5, 0.7], [1.0, 1.0, -1.0], clip_range_high=0.28)
    assert loss == pytest.approx(-1.25 - 1.28 + 0.8)
    assert clipped == 2
    assert gradient == pytest.approx([-1.25, 0.0, 0.0])
    assert surrogate([1.25], [1.0])[0] == pytest.approx(-1.2)


def test_dual_clip_bounds_what_a_token_with_a_negative_advantage_costs() -> None:
    # A=-2: at ratio 5 the loss would be 10, at most 3 x 2 = 6 without a gradient; at 2 it is 4; A=+1 is untouched
    loss, clipped, gradient = surrogate([5.0, 2.0, 0.9], [-2.0, -2.0, 1.0], dual_clip=3.0)
    assert loss == pytest.approx(6.0 + 4.0 - 0.9)
    assert clipped == 1
    assert gradient == pytest.approx([0.0, 4.0, -0.9])
    assert surrogate([5.0], [-2.0])[0] == pytest.approx(10.0)


def test_weights_count_in_the_loss_and_not_in_the_counts() -> None:
    loss, clipped, gradient = surrogate([1.5, 1.1], [1.0, 2.0], weights_N=torch.tensor([3.0, 0.5]))  # type: ignore[arg-type]
    assert loss == pytest.approx(-3 * 1.2 - 0.5 * 2.2)
    assert clipped == 1
    assert gradient == pytest.approx([0.0, -0.5 * 2.2])
    value = ppo_value_loss(
        values_N=torch.tensor([2.0, 1.0]),
        old_values_N=torch.tensor([2.0, 1.0]),
        returns_N=torch.tensor([0.0, 0.0]),
        clip_range=0.2,
        weights_N=torch.tensor([0.5, 2.0]),
    )
    assert value.item() == pytest.approx(0.5 * (0.5 * 4 + 2 * 1))


def test_importance_weights_are_ratios_that_are_cut_above() -> None:
    logprobs = torch.tensor([0.5, 0.2, 0.9]).log().requires_grad_()
    weights = truncated_weights(logprobs_N=logprobs, sampler_logprobs_N=torch.tensor([0.4, 0.4, 0.1]).log(), most=2.0)
    assert weights.tolist() == pytest.approx([1.25, 0.5, 2.0])
    assert not weights.requires_grad, "a weight is data"
