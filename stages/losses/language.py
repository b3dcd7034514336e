"""Losses and measures of next-token prediction.

Shape legend: N counted tokens, E experts, L layers.
"""

import math

from torch import Tensor


def z_loss(log_normaliser_N: Tensor) -> Tensor:
    """Return sum of log^2 Z, which keeps logits from drifting off together. PaLM (arXiv:2204.02311), section 5."""
    return log_normaliser_N.square().sum()


def router_balance_loss(probabilities_NLE: Tensor, load_LE: Tensor) -> Tensor:
    """Return the sum over tokens of E sum_e f_e p_e, averaged over layers: the fewer tokens the busy experts get, the
    lower.

    Fedus et al. 2021 (arXiv:2101.03961), eq. 4 to 6, for K experts a token: `load_LE` holds f_e, assignments a token,
    so that its rows sum to K and a token costs K where the load is even, as in transformers. f_e carries no gradient.
    """
    num_layers, num_experts = load_LE.shape
    # The load is a count of a hard top-k choice, without a gradient: the probabilities carry it, weighted by the load.
    return num_experts / num_layers * (probabilities_NLE * load_LE.detach()).sum()


def perplexity(mean_loss: float) -> float:
    """exp of a mean token loss in nats; infinite instead of an overflow for very large losses."""
    # The largest double is about exp(709.8).
    return math.exp(mean_loss) if mean_loss < 700 else math.inf


def bits_per_byte(loss_sum: float, *, num_bytes: int) -> float:
    """Total loss in nats over the bytes of the text that it predicts: comparable across tokenizers."""
    return loss_sum / math.log(2) / num_bytes
