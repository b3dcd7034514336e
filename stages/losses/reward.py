"""Losses and measures of reward models.

Shape legend: P pairs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bradley_terry_loss(
    chosen_scores_P: Tensor,
    rejected_scores_P: Tensor,
    *,
    margins_P: Tensor | None = None,
    label_smoothing: float = 0.0,
    weights_P: Tensor | None = None,
) -> Tensor:
    """Return sum over pairs of -log sigmoid(r_chosen - r_rejected - m), times the pairs' weights.

    Bradley & Terry 1952; Ouyang et al. 2022 (arXiv:2203.02155), eq. 1, whose factor 1 / (K choose 2) is the weight of
    each pair of a ranking of K responses. Margins m: Touvron et al. 2023 (arXiv:2307.09288), eq. 2. With
    `label_smoothing` e, a pair counts 1 - e as it is and e with its sides exchanged, as in conservative DPO (Mitchell
    2023); the margin is that of the stated preference and is left out of the exchanged side. Equal scores without
    margins give ln 2 a pair.
    """
    differences_P = chosen_scores_P - rejected_scores_P
    # Not log(sigmoid(x)): in float32 a difference of -100 gives log(0), and a gradient of NaN.
    losses_P = -F.logsigmoid(differences_P if margins_P is None else differences_P - margins_P)
    if label_smoothing:
        losses_P = (1 - label_smoothing) * losses_P - label_smoothing * F.logsigmoid(-differences_P)
    return (losses_P if weights_P is None else weights_P * losses_P).sum()


def score_centering_loss(
    chosen_scores_P: Tensor, rejected_scores_P: Tensor, *, weights_P: Tensor | None = None
) -> Tensor:
    """Return sum of (r_chosen + r_rejected)^2, times the pairs' weights, which fixes the free offset of scores.
    Eisenstein et al. 2023 (arXiv:2312.09244), eq. 2."""
    squares_P = (chosen_scores_P + rejected_scores_P).square()
    return (squares_P if weights_P is None else weights_P * squares_P).sum()


def pair_accuracy(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """Return the sum over pairs of 1 where chosen is higher, one half for a tie."""
    # Half a tie: a model that scores everything alike, as one with a head of zeros does, must show 0.5 and not 0.
    return (chosen_P > rejected_P).float().sum() + 0.5 * (chosen_P == rejected_P).float().sum()


def calibration_error(margins_P: Tensor, *, num_bins: int = 10) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the probability that the preferred answer of a pair
    is the chosen one.

    Guo et al. 2017 (arXiv:1706.04599), eq. 3, with equal-width bins. The preferred answer has at least even odds, so
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
