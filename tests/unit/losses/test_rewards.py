"""Shaped rewards against arithmetic that a reader can redo by hand."""

import pytest
import torch

from stages.losses.rewards import normalised_score, shaped_rewards


def test_scores_are_measured_in_spreads_from_the_mean() -> None:
    assert normalised_score(3.0, mean=1.0, std=4.0) == pytest.approx(0.5)
    assert normalised_score(1.0, mean=1.0, std=0.0) == 0.0


def test_the_score_is_paid_on_the_last_token_and_kl_on_every_one() -> None:
    rewards = shaped_rewards(
        logprobs_R=torch.tensor([-1.0, -1.0]), ref_logprobs_R=torch.tensor([-2.0, -1.5]), score=3.0, kl_coefficient=0.1
    )
    assert rewards.tolist() == pytest.approx([-0.1, 3.0 - 0.05])
