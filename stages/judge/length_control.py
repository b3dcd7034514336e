"""The win rate that a model would have if its responses were as long as its opponent's.

Judges prefer long answers. As AlpacaEval 2 does (Dubois et al. 2024, https://arxiv.org/abs/2404.04475, eq. 1), the
verdicts are explained by a logistic regression on an intercept and on the difference in length; without the second the
intercept alone gives the win rate (eq. 2). Their third term, the difficulty of a prompt, needs many models'
verdicts and is left out.

Shape legend: N verdicts, R resamples, G clusters, 2 coefficients (intercept, length).
"""

from dataclasses import dataclass

import numpy as np

RIDGE = 1e-3
"""Weight of the squared coefficients, in verdicts: keeps them finite where the lengths alone explain every verdict."""
_STEPS, _RESAMPLES, _SEED = 50, 1000, 20_240
_LARGEST_STEP = 2.0
_FEWEST = 4
"""Verdicts below which two coefficients are no summary."""


@dataclass(frozen=True)
class LengthControlled:
    """Win rate at equal length, with its 95 % interval by a bootstrap over clusters."""

    win_rate: float
    low: float
    high: float
    per_length: float
    """Coefficient of the length: above 0, longer responses won more often."""


def length_controlled(
    wins_N: np.ndarray, lengths_N: np.ndarray, against_N: np.ndarray, clusters: np.ndarray
) -> LengthControlled | None:
    """Return the win rate at equal length; `wins_N` holds 1, 0.5 or 0, the lengths are those of both responses.

    None for so few verdicts that two coefficients say nothing.
    """
    if len(wins_N) < _FEWEST:
        return None
    features_N2 = np.column_stack([np.ones(len(wins_N)), _bounded(lengths_N - against_N)])
    fitted_2 = _fit(features_N2, wins_N.astype(np.float64), np.ones((1, len(wins_N))))[0]
    names, index_N = np.unique(clusters.astype(str), return_inverse=True)
    rng = np.random.default_rng(_SEED)
    drawn_RG = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES).astype(np.float64)
    rates_R = _sigmoid(_fit(features_N2, wins_N.astype(np.float64), drawn_RG[:, index_N])[:, 0])
    low, high = np.quantile(rates_R, [0.025, 0.975])
    return LengthControlled(
        win_rate=float(_sigmoid(fitted_2[0])), low=float(low), high=float(high), per_length=float(fitted_2[1])
    )


def _bounded(difference_N: np.ndarray) -> np.ndarray:
    """tanh of the difference in its own spread, so that one rambling response decides nothing (eq. 1 there)."""
    spread = difference_N.std()
    return np.tanh(difference_N / spread) if spread > 0 else np.zeros(len(difference_N))


def _fit(features_N2: np.ndarray, wins_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Newton's method for all resamples at once; a resample is a weight for every verdict."""
    coefficients_R2 = np.zeros((len(weights_RN), 2))
    products_N4 = (features_N2[:, :, None] * features_N2[:, None, :]).reshape(-1, 4)
    for _ in range(_STEPS):
        rates_RN = _sigmoid(coefficients_R2 @ features_N2.T)
        gradient_R2 = (weights_RN * (wins_N - rates_RN)) @ features_N2 - RIDGE * coefficients_R2
        curvature_R22 = (weights_RN * rates_RN * (1 - rates_RN) @ products_N4).reshape(-1, 2, 2) + RIDGE * np.eye(2)
        step_R2 = np.linalg.solve(curvature_R22, gradient_R2[:, :, None])[:, :, 0]
        # Where a line separates all verdicts the curvature vanishes and a full step would leave the finite numbers.
        size_R1 = np.linalg.norm(step_R2, axis=1, keepdims=True)
        coefficients_R2 += step_R2 * np.minimum(1.0, _LARGEST_STEP / np.maximum(size_R1, 1e-12))
        if np.abs(step_R2).max() < 1e-9:
            break
    return coefficients_R2


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -60, 60)))
