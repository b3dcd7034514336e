"""Sampler against trainer: the log-probabilities that generation computed, compared with those of the update.

Generation computes with a cache, left padding and perhaps another engine; the update with packed rows. Both should
agree on the tokens that were drawn. Where they do not, the samples are those of another policy.

Shape legend: R tokens of one response, N tokens of all responses.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from stages.config.errors import ConfigError
from stages.config.rollouts import SamplerConfig
from stages.losses.divergence import k3
from stages.losses.policy import truncated_weights
from stages.train.rollout.sampling import Sampled

logger = logging.getLogger(__name__)

_RATIO, _KL = "ppo/sampler_ratio", "ppo/sampler_kl"


def agreement(samples: Sequence[Sampled]) -> dict[str, float]:
    """Return the mean ratio of both probabilities and the mean divergence of the sampler from the trainer, a token;
    nothing where the sampler told none."""
    told = [sample for sample in samples if sample.sampler_logprobs_R is not None]
    if not told:
        return {}
    trainer_N = torch.from_numpy(np.concatenate([sample.logprobs_R for sample in told])).double()
    sampler_N = torch.from_numpy(np.concatenate([sample.sampler_logprobs_R for sample in told])).double()  # type: ignore[arg-type]
    # Tokens were drawn from the sampler's distribution, so that is the p of KL(p||q).
    return {
        _RATIO: float((trainer_N - sampler_N).exp().mean()),
        _KL: float(k3(sampler_N - trainer_N).mean()),
    }


def check(found: dict[str, float], limits: SamplerConfig, *, is_main: bool) -> None:
    """Warn, or raise ConfigError, when a rollout's numbers are above the limits."""
    if not found:
        return
    ratio, kl = found[_RATIO], found[_KL]
    # Written so that NaN is above every limit.
    if abs(ratio - 1) <= limits.max_ratio_error and kl <= limits.max_kl:
        return
    message = (
        f"sampler and trainer disagree: mean ratio {ratio:.4g} (limit 1 +- {limits.max_ratio_error:g}), divergence "
        f"{kl:.4g} nats a token (limit {limits.max_kl:g})"
    )
    advice = (
        "Use precision=fp32, or weight the loss with ppo.sampler.truncation=2. If the difference is known and "
        "accepted, raise ppo.sampler.max_kl and ppo.sampler.max_ratio_error."
    )
    if limits.above == "fail":
        raise ConfigError(message, advice=advice)
    if is_main:  # of many workers one says so
        logger.warning("%s. %s", message, advice)


def sampler_weights(sample: Sampled, *, most: float) -> np.ndarray:
    """Return the truncated importance weight of each token of a response."""
    if sample.sampler_logprobs_R is None:
        raise ConfigError(
            f"ppo.sampler.truncation={most} needs the sampler's log-probabilities, and this one gives none",
            advice="Use ppo.sampler.truncation=0, or a sampler that returns log-probabilities.",
        )
    weights_R = truncated_weights(
        logprobs_N=torch.from_numpy(sample.logprobs_R),
        sampler_logprobs_N=torch.from_numpy(sample.sampler_logprobs_R),
        most=most,
    )
    return weights_R.numpy()
