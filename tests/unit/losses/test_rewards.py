"""Shaped rewards against arithmetic that a reader can redo by hand."""

import pytest
import torch

from stages.losses.rewards import aggregated_scores, normalised_score, score_spreads, shaped_rewards


def test_scores_are_measured_in_spreads_from_the_mean() -> None:
    assert normalised_score(3.0, mean=1.0, std=4.0) == pytest.approx(0.5)
    assert normalised_score(1.0, mean=1.0, std=0.0) == 0.0


def test_the_score_is_paid_on_the_last_token_and_kl_on_every_one() -> None:
    rewards = shaped_rewards(
        logprobs_R=torch.tensor([-1.0, -1.0]), ref_logprobs_R=torch.tensor([-2.0, -1.5]), score=3.0, kl_coefficient=0.1
    )
    assert rewards.tolist() == pytest.approx([-0.1, 3.0 - 0.05])


def test_an_ensemble_becomes_one_score_by_hand() -> None:
    # Two responses, three members: (1, 2, 6) and (2, 2, 2). Means 3 and 2; variance of the first (4 + 1 + 9) / 3.
    scores = torch.tensor([[1.0, 2.0], [2.0, 2.0], [6.0, 2.0]])
    spread = (14 / 3) ** 0.5
    assert score_spreads(scores).tolist() == pytest.approx([spread, 0.0])
    assert aggregated_scores(scores, how="mean").tolist() == [3.0, 2.0]
    assert aggregated_scores(scores, how="minimum").tolist() == [1.0, 2.0]
    lower = aggregated_scores(scores, how="lower", spread_coefficient=0.5)
    assert lower.tolist() == pytest.approx([3 - 0.5 * spread, 2.0])
