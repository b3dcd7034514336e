"""Shaped rewards against arithmetic that a reader can redo by hand."""

import numpy as np
import pytest
import torch

from stages.losses.rewards import (
    Moments,
    aggregated_scores,
    merged_moments,
    normalised_score,
    overlong_penalty,
    score_spreads,
    shaped_rewards,
)


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


def test_the_penalty_for_length_is_linear_over_the_last_tokens() -> None:
    shares = [overlong_penalty(length, max_length=100, grace=20) for length in (1, 80, 81, 90, 100, 120)]
    assert shares == pytest.approx([0.0, 0.0, 0.05, 0.5, 1.0, 1.0])


def test_running_moments_are_those_of_everything_seen() -> None:
    values = np.random.default_rng(0).normal(loc=1e6, size=60)
    moments = Moments(0, 0.0, 0.0)
    for part in (values[:1], values[1:20], values[20:]):
        moments = merged_moments(moments, part.tolist())
    assert (moments.count, moments.mean) == (60, pytest.approx(values.mean()))
    assert moments.std == pytest.approx(values.std(), rel=1e-9)
    assert Moments(0, 0.0, 0.0).std == 0.0
