"""The reward model's equations against arithmetic that a reader can redo by hand."""

import math
from typing import Any

import pytest
import torch

from stages.losses.reward import bradley_terry_loss, calibration_error, pair_accuracy, score_centering_loss


def test_equal_scores_cost_ln_2_a_pair() -> None:
    scores = torch.tensor([1.5, -3.0])
    assert bradley_terry_loss(scores, scores).item() == pytest.approx(2 * math.log(2))


def test_bradley_terry_by_hand() -> None:
    # -log(1 / (1 + e^-2)) = log(1 + e^-2)
    loss = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)))


def test_swapping_the_sides_gives_one_minus_accuracy_and_ties_count_half() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 3.0, 0.0, 4.0])
    assert pair_accuracy(chosen, rejected).item() == 2.5
    assert pair_accuracy(rejected, chosen).item() == 4 - 2.5


def test_calibration_error_by_hand() -> None:
    # odds of 3 to 1 (confidence 0.75, the bin from 0.75 to 0.8): right in 3 of 4 pairs would be calibrated, half are
    # not: |0.75 - 0.5| on these 4. A margin of 40 is certain and right: no gap on that 1.
    three_to_one = math.log(3) + 1e-3
    margins = torch.tensor([three_to_one, three_to_one, -three_to_one, -three_to_one, 40.0])
    assert calibration_error(margins) == pytest.approx(4 / 5 * 0.25, abs=1e-3)


def test_a_pair_without_preference_counts_as_wrong_with_even_odds() -> None:
    assert calibration_error(torch.zeros(3)) == pytest.approx(0.5)


def test_a_margin_asks_for_so_much_more_of_the_difference() -> None:
    # Scores 3 and 1, margin 2: -log sigmoid(0) = ln 2; margin 0: log(1 + e^-2). Both together:
    chosen, rejected = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 1.0])
    loss = bradley_terry_loss(chosen, rejected, margins_P=torch.tensor([2.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(1 + math.exp(-2)))


def gradients(**options: Any) -> tuple[list[float], list[float]]:
    """Of the loss of two pairs whose scores are equal."""
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    bradley_terry_loss(chosen, rejected, **options).backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    return chosen.grad.tolist(), rejected.grad.tolist()


def test_gradients_at_equal_scores_by_hand() -> None:
    # The derivative of -log sigmoid(d - m) is -sigmoid(m - d): -1/2 without a margin, -e/(1 + e) with margin 1.
    assert gradients() == ([-0.5, -0.5], [0.5, 0.5])
    with_margin = math.e / (1 + math.e)
    found = gradients(margins_P=torch.tensor([1.0, 0.0]))
    assert found[0] == pytest.approx([-with_margin, -0.5])
    assert found[1] == pytest.approx([with_margin, 0.5])
    # Smoothing: (1 - e) of it and e of the exchanged pair: -0.5 x 0.9 + 0.5 x 0.1 = -0.4.
    assert gradients(label_smoothing=0.1)[0] == pytest.approx([-0.4, -0.4])
    assert gradients(weights_P=torch.tensor([0.25, 3.0]))[0] == pytest.approx([-0.125, -1.5])


def test_label_smoothing_by_hand_and_where_it_is_least() -> None:
    # Difference 2, smoothing 0.2: 0.8 log(1 + e^-2) + 0.2 log(1 + e^2).
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.0]), label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * math.log(1 + math.exp(-2)) + 0.2 * math.log(1 + math.exp(2)))
    # A model that knows of 20 % exchanged labels is sure to 80 %: the difference ln(0.8 / 0.2) has no gradient.
    best = torch.tensor([math.log(4)], requires_grad=True)
    bradley_terry_loss(best, torch.zeros(1), label_smoothing=0.2).backward()
    assert best.grad is not None
    assert best.grad.item() == pytest.approx(0.0, abs=1e-6)


def test_the_exchanged_side_of_smoothing_has_no_margin() -> None:
    # Equal scores, margin 1, smoothing 0.25: 0.75 log(1 + e) + 0.25 ln 2.
    zeros = torch.zeros(1)
    loss = bradley_terry_loss(zeros, zeros, margins_P=torch.ones(1), label_smoothing=0.25)
    assert loss.item() == pytest.approx(0.75 * math.log(1 + math.e) + 0.25 * math.log(2))


def test_a_ranking_of_k_with_its_weights_costs_as_much_as_one_pair() -> None:
    # Four responses with equal scores have six pairs, each of which counts 1 / (4 choose 2): ln 2 in all.
    scores = torch.zeros(6)
    assert bradley_terry_loss(scores, scores, weights_P=torch.full((6,), 1 / 6)).item() == pytest.approx(math.log(2))


def test_centring_by_hand_and_weighted() -> None:
    chosen, rejected = torch.tensor([2.0, 1.0]), torch.tensor([1.0, -1.0])
    assert score_centering_loss(chosen, rejected).item() == 9.0
    assert score_centering_loss(chosen, rejected, weights_P=torch.tensor([0.5, 7.0])).item() == 4.5


def test_centring_pulls_both_scores_alike_and_not_at_all_at_the_start() -> None:
    # The slope is 2 w (r_c + r_r): 2 x 0.5 x 3 for the first pair; scores of a head of zeros stay where they are.
    chosen = torch.tensor([2.0, 0.0], requires_grad=True)
    rejected = torch.tensor([1.0, 0.0], requires_grad=True)
    loss = score_centering_loss(chosen, rejected, weights_P=torch.tensor([0.5, 7.0]))
    assert [slope.tolist() for slope in torch.autograd.grad(loss, [chosen, rejected])] == [[3.0, 0.0], [3.0, 0.0]]
