"""From the score of a response to rewards for its tokens.

Shape legend: R tokens of one response, M members of an ensemble, S responses.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from stages.config.rollouts import Aggregation
from stages.losses.divergence import k1


def normalised_score(score: float, *, mean: float, std: float) -> float:
    """Return a reward model's score in units of the spread of reference answers' scores.

    Bradley-Terry fixes neither origin nor scale of scores, but `kl_coefficient` weighs nats against them. Ziegler et
    al. 2019 (arXiv:1909.08593), section 2, normalise to the same end.
    """
    return (score - mean) / (std + 1e-8)


def aggregated_scores(scores_MS: Tensor, *, how: Aggregation, spread_coefficient: float = 0.0) -> Tensor:
    """Return one score for each response from those of the members of an ensemble, shape (S,).

    Coste et al. 2023 (arXiv:2310.02743): the mean is eq. 3, the minimum eq. 4; "lower" is eq. 5 with the standard
    deviation in the place of the variance, so that the result scales with the scores.
    """
    match how:
        case "mean":
            return scores_MS.mean(dim=0)
        case "minimum":
            return scores_MS.amin(dim=0)
        case "lower":
            return scores_MS.mean(dim=0) - spread_coefficient * score_spreads(scores_MS)


def score_spreads(scores_MS: Tensor) -> Tensor:
    """Return the standard deviation of the members' scores of each response, shape (S,)."""
    return scores_MS.std(dim=0, correction=0)


def shaped_rewards(*, logprobs_R: Tensor, ref_logprobs_R: Tensor, score: float, kl_coefficient: float) -> Tensor:
    """Penalty for leaving the reference on every token, the score on the last.

    Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Stiennon et al. 2020 (arXiv:2009.01325).
    """
    # k1 and not k3: as a reward on sampled tokens only k1 has the gradient of the KL divergence as its expectation.
    rewards_R = -kl_coefficient * k1(logprobs_R - ref_logprobs_R)
    rewards_R[-1] += score
    return rewards_R


def overlong_penalty(length: int, *, max_length: int, grace: int) -> float:
    """Return how much of the penalty a response of that length deserves: 0 up to `grace` tokens before the limit, from
    there in equal steps up to 1 at the limit. Soft overlong punishment of DAPO, Yu et al. 2025 (arXiv:2503.14476),
    eq. 13, without its sign."""
    return min(max((length - (max_length - grace)) / grace, 0.0), 1.0)


class Moments(NamedTuple):
    """Number, mean and sum of squared distances from it."""

    count: int
    mean: float
    squares: float

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def merged_moments(before: Moments, values: Sequence[float]) -> Moments:
    """Return the moments of what was seen before and of more values. Chan, Golub and LeVeque 1983, "Algorithms for
    computing the sample variance": nothing is subtracted that is nearly equal."""
    count = len(values)
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    total, shift = before.count + count, mean - before.mean
    return Moments(
        total,
        before.mean + shift * count / total,
        before.squares + squares + shift**2 * before.count * count / total,
    )
