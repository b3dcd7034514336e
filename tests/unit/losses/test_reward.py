"""The reward model's equations against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch

from stages.losses.reward import bradley_terry_loss, calibration_error, pair_accuracy


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
