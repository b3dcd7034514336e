"""Losses and measures of reward models.

Shape legend: P pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(chosen_scores_P: Tensor, rejected_scores_P: Tensor) -> Tensor:
    """Return sum over pairs of -log sigmoid(r_chosen - r_rejected).

    Bradley & Terry 1952; Ouyang et al. 2022 (arXiv:2203.02155), eq. 1. Equal scores give ln 2 a pair.
    """
    # Not log(sigmoid(x)): in float32 a difference of -100 gives log(0), and a gradient of NaN.
    return -F.logsigmoid(chosen_scores_P - rejected_scores_P).sum()


def score_centering_loss(chosen_scores_P: Tensor, rejected_scores_P: Tensor) -> Tensor:
    """Return sum of (r_chosen + r_rejected)^2, which fixes the free offset of scores (Eisenstein et al. 2023,
    arXiv:2312.09244)."""
    return (chosen_scores_P + rejected_scores_P).square().sum()


def pair_accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return the sum over pairs of 1 where chosen is higher, one half for a tie."""
    # Half a tie: a model that scores everything alike, as one with a head of zeros does, must show 0.5 and not 0.
    return (chosen_P > rejected_P).float().sum() + 0.5 * (chosen_P == rejected_P).float().sum()


def calibration_error(margins_P: Tensor, *, num_bins: int = 10) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the probability that the preferred answer of a pair
    is the chosen one.

    Guo et al. 2017 (arXiv:1706.04599), eq. 5, with equal-width bins. The preferred answer has at least even odds, so
    the bins cover [0.5, 1].
    """
    confidence_P = torch.sigmoid(margins_P.abs())
    correct_P = (margins_P > 0).float()
    # A confidence of exactly 1 (the sigmoid saturates in float32 above a margin of about 17) belongs to the last bin.
    bins_P = ((confidence_P - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    error = 0.0
    for index in range(num_bins):
        inside_P = bins_P == index
        if inside_P.any():
            gap = (confidence_P[inside_P].mean() - correct_P[inside_P].mean()).abs()
            error += float(gap) * float(inside_P.float().mean())
    return error
