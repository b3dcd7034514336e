"""The loss of KTO against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch
from torch import Tensor

from stages.losses.kto import ExampleLogprobs, desirable_loss, kl_baseline, kto_loss


def examples(log_ratios: list[float], desirable: list[float]) -> ExampleLogprobs:
    """Responses of four tokens, to which the reference gives -8."""
    reference = torch.full((len(log_ratios),), -8.0)
    policy = (reference + torch.tensor(log_ratios)).requires_grad_()
    return ExampleLogprobs(policy, reference, torch.full_like(reference, 4.0), torch.tensor(desirable))


def loss_of(logprobs: ExampleLogprobs, *, kl: float, beta: float = 0.5, up: float = 1.0, down: float = 1.0) -> Tensor:
    kl_E = torch.full_like(logprobs.reference_E, kl)
    return kto_loss(logprobs, kl_E=kl_E, beta=beta, desirable_weight=up, undesirable_weight=down).loss_sum


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_at_the_reference_an_example_costs_half_its_weight() -> None:
    logprobs = examples([0.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    loss = loss_of(logprobs, kl=0.0, beta=0.4, up=3.0, down=2.0)
    assert loss.item() == pytest.approx(3.0 / 2 + 2 * 2.0 / 2)
    (slopes,) = torch.autograd.grad(loss, [logprobs.policy_E])
    # the sigmoid's slope of 1/4, times weight and beta: up for the desirable one, down for the others
    assert slopes.tolist() == pytest.approx([-3.0 * 0.4 / 4, 2.0 * 0.4 / 4, 2.0 * 0.4 / 4])


def test_by_hand_away_from_the_reference() -> None:
    # beta (log-ratio - z0) = 0.5 (3 - 1) = 1 for the desirable, 0.5 (1 - -2) = 1.5 for the undesirable one
    logprobs = examples([3.0, -2.0], [1.0, 0.0])
    loss = loss_of(logprobs, kl=1.0, up=2.0)
    assert loss.item() == pytest.approx(2 * (1 - sigmoid(1.0)) + (1 - sigmoid(1.5)))
    (slopes,) = torch.autograd.grad(loss, [logprobs.policy_E])
    expected = [-2 * 0.5 * sigmoid(1.0) * sigmoid(-1.0), 0.5 * sigmoid(1.5) * sigmoid(-1.5)]
    assert slopes.tolist() == pytest.approx(expected)


def test_a_higher_baseline_asks_more_of_desirable_and_less_of_undesirable_responses() -> None:
    for desirable, sign in ((1.0, 1), (0.0, -1)):
        before, after = (loss_of(examples([0.5], [desirable]), kl=kl).item() for kl in (0.0, 2.0))
        assert sign * (after - before) > 0


def test_the_baseline_is_the_mean_log_ratio_of_mismatches_and_never_below_zero() -> None:
    assert kl_baseline(6.0, 4) == 1.5
    assert kl_baseline(-6.0, 4) == 0.0


def test_the_loss_is_a_sum_over_examples() -> None:
    whole = loss_of(examples([0.3, -1.0, 2.0], [1.0, 0.0, 1.0]), kl=0.7).item()
    parts = loss_of(examples([0.3], [1.0]), kl=0.7) + loss_of(examples([-1.0, 2.0], [0.0, 1.0]), kl=0.7)
    assert whole == pytest.approx(parts.item())


def test_the_supervised_term_counts_tokens_of_desirable_responses_alone() -> None:
    logprobs = examples([0.0, 0.0, 2.0], [1.0, 0.0, 1.0])
    loss = desirable_loss(logprobs)
    assert loss.item() == pytest.approx(8 / 4 + 6 / 4)
    assert torch.autograd.grad(loss, [logprobs.policy_E])[0].tolist() == [-1 / 4, 0.0, -1 / 4]


def test_hopeless_and_perfect_examples_have_finite_losses_and_gradients() -> None:
    logprobs = examples([-3000.0, 3000.0, 3000.0, -3000.0], [1.0, 0.0, 1.0, 0.0])
    loss = loss_of(logprobs, kl=0.0)
    (slopes,) = torch.autograd.grad(loss, [logprobs.policy_E])
    assert loss.item() == pytest.approx(2.0)
    assert bool(slopes.isfinite().all())


def test_an_arm_ends_where_as_many_labels_pull_up_as_down() -> None:
    """Without a baseline, a share p of good labels on a response at log-ratio h: p and 1 - p times the same slope, so
    for p above one half h grows, below it falls, and at one half nothing moves, wherever h is."""
    for share, sign in ((0.7, -1), (0.5, 0), (0.3, 1)):
        for log_ratio in (-1.0, 0.0, 1.5):
            good, bad = examples([log_ratio], [1.0]), examples([log_ratio], [0.0])
            slope = sum(
                weight * torch.autograd.grad(loss_of(of, kl=0.0), [of.policy_E])[0].item()
                for of, weight in ((good, share), (bad, 1 - share))
            )
            assert (slope > 1e-9) - (slope < -1e-9) == sign
