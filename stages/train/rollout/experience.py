"""Experience: scored responses as token sequences that carry all that the update needs.

Shape legend: R tokens of one response, N response tokens of all sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.config.estimators import GAE
from stages.config.rollouts import LossOver, PPOConfig
from stages.data.tokens.packing import TokenSequence, prompt_and_response
from stages.losses.advantages import explained_variance
from stages.losses.rewards import shaped_rewards
from stages.train.rollout.advantages import Estimate, estimate, mean_total
from stages.train.rollout.agreement import sampler_weights
from stages.train.rollout.sampling import Sampled

FIELDS = (
    "old_logprobs",
    "advantages",
    "old_values",
    "returns",
    "ref_logprobs",
    "kl_coefficients",
    "loss_weights",
    "policy_weights",
)
"""Names of the values per token. Values and returns are there with a critic; the reference and the coefficient with the
penalty in the loss; weights where tokens do not all count alike, for all losses and for those of the policy alone."""


@dataclass(frozen=True)
class Experience:
    """One rollout, ready for the update; the same on every rank."""

    sequences: list[TokenSequence]
    mean_reward: float
    """Sum of a response's shaped rewards, averaged over responses."""


def to_experience(
    samples: Sequence[Sampled],
    rewards: Sequence[float],
    *,
    config: PPOConfig,
    kl_coefficient: float,
    baseline: float | None = None,
    policy_learns: bool = True,
) -> Experience:
    """Turn samples into sequences with advantages; `rewards` are what they earn, `baseline` what earlier rollouts
    earned; the policy does not learn while the critic warms up.

    Rewards are per token, a score is per response. The score is paid on the last token, once the whole response is
    known; each token pays on its own for what it departs from the reference. Which earlier token earned the score is
    for the estimator to say.
    """
    # The KL that counts is that of the sampled tokens, against the frozen start; as a reward it is fixed with the
    # rollout, so the update does not differentiate it.
    paid = kl_coefficient if config.kl_place == "reward" else 0.0
    shaped = [
        shaped_rewards(
            logprobs_R=torch.from_numpy(sample.logprobs_R),
            ref_logprobs_R=torch.from_numpy(sample.ref_logprobs_R),
            score=reward,
            kl_coefficient=paid,
        )
        for sample, reward in zip(samples, rewards, strict=True)
    ]
    estimates = estimate(config.estimator, samples, shaped, baseline=baseline)
    sequences = [
        _to_sequence(sample, result, config, kl_coefficient=kl_coefficient, policy_learns=policy_learns)
        for sample, result in zip(samples, estimates, strict=True)
    ]
    return Experience(sequences, mean_total(shaped))


def _to_sequence(
    sample: Sampled, result: Estimate, config: PPOConfig, *, kl_coefficient: float, policy_learns: bool
) -> TokenSequence:
    # Prompt tokens get zeros, which no loss reads: the loss mask is 0 there.
    fields = {"old_logprobs": sample.logprobs_R, "advantages": result.advantages_R}
    if sample.values_R is not None and result.returns_R is not None:
        fields |= {"old_values": sample.values_R, "returns": result.returns_R}
    length = len(sample.response)
    if config.kl_place == "loss":
        # The coefficient of this rollout comes along: an adaptive one may have moved on when the update is resumed.
        fields |= {"ref_logprobs": sample.ref_logprobs_R, "kl_coefficients": np.full(length, kl_coefficient)}
    match config.loss_over:
        case LossOver.TOKENS:
            pass
        case LossOver.SEQUENCES:
            fields["loss_weights"] = np.full(length, 1 / length)
        case LossOver.FIXED_LENGTH:
            fields["loss_weights"] = np.full(length, 1 / config.max_response_length)
    if config.sampler.truncation:
        fields["policy_weights"] = sampler_weights(sample, most=config.sampler.truncation)
    if isinstance(config.estimator, GAE) and config.estimator.critic_warmup_rollouts:
        # In the batch and not a switch of the objective: the loss is a function of what the batch holds.
        fields["policy_weights"] = fields.get("policy_weights", np.ones(length)) * float(policy_learns)
    return prompt_and_response(sample.prompt, sample.response, fields)


def describe(samples: Sequence[Sampled]) -> dict[str, float]:
    """Return a rollout's own numbers, averaged over responses."""
    spreads = [sample.spread for sample in samples if sample.spread is not None]
    parts = {f"ppo/score/{name}": [sample.parts[name] for sample in samples] for name in samples[0].parts}
    # A scorer without a value stands in with another one: how often must be seen.
    parts |= {
        f"ppo/score_failed/{name}": [float(name in sample.failed) for sample in samples]
        for name in sorted({name for sample in samples for name in sample.failed})
    }
    return {
        **{name: float(np.mean(values)) for name, values in parts.items()},
        "ppo/score": float(np.mean([sample.score for sample in samples])),
        "ppo/kl": float(np.mean([sample.kl for sample in samples])),
        "ppo/response_length": float(np.mean([len(sample.response) for sample in samples])),
        "ppo/finished": float(np.mean([sample.finished for sample in samples])),
        **({"ppo/score_spread": float(np.mean(spreads))} if spreads else {}),
    }


def critic_quality(sequences: Sequence[TokenSequence]) -> dict[str, float]:
    """Return how much of the returns' variance the critic predicted; nothing without a critic."""
    if "returns" not in sequences[0].fields:
        return {}
    # Fields hold zeros for prompt tokens, which would count as perfectly predicted.
    mask = np.concatenate([sequence.loss_mask for sequence in sequences]) == 1
    returns_N, values_N = (
        np.concatenate([sequence.fields[name] for sequence in sequences])[mask] for name in ("returns", "old_values")
    )
    return {"ppo/explained_variance": explained_variance(returns_N, values_N)}


def to_tensors(sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Flatten a rollout for a checkpoint: a kill in the middle of its updates resumes with the same samples."""
    if not sequences:
        return {}
    # One long array each, and the lengths to cut it: checkpoints hold few tensors, not thousands.
    flat = {
        "lengths": np.array([len(sequence.ids) for sequence in sequences]),
        "ids": np.concatenate([sequence.ids for sequence in sequences]),
        "loss_mask": np.concatenate([sequence.loss_mask for sequence in sequences]),
        **{name: np.concatenate([sequence.fields[name] for sequence in sequences]) for name in sequences[0].fields},
    }
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in flat.items()}


def from_tensors(tensors: Mapping[str, Tensor]) -> list[TokenSequence]:
    """Invert `to_tensors`; other tensors of the objective may lie next to the rollout's."""
    if "lengths" not in tensors:
        return []
    fields = [name for name in FIELDS if name in tensors]
    cuts = np.cumsum(tensors["lengths"].numpy())[:-1]
    split = {name: np.split(tensors[name].numpy(), cuts) for name in ("ids", "loss_mask", *fields)}
    return [
        TokenSequence(split["ids"][i], split["loss_mask"][i], {name: split[name][i] for name in fields})
        for i in range(len(tensors["lengths"]))
    ]
