"""Experience: scored responses as token sequences that carry all that the update needs.

Shape legend: R tokens of one response, N response tokens of all sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stages.config.estimators import Estimator
from stages.data.tokens.packing import TokenSequence, prompt_and_response
from stages.losses.advantages import explained_variance
from stages.losses.rewards import shaped_rewards
from stages.train.rollout.advantages import Estimate, estimate, mean_total
from stages.train.rollout.sampling import Sampled

FIELDS = ("old_logprobs", "advantages", "old_values", "returns")
"""Names of the values per token; the last two are there with a critic only."""


@dataclass(frozen=True)
class Shaping:
    """How a response's score and its distance to the reference become rewards per token."""

    kl_coefficient: float
    missing_eos_penalty: float


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
    shaping: Shaping,
    estimator: Estimator,
    baseline: float | None = None,
) -> Experience:
    """Turn samples into sequences with advantages; `rewards` are their scores in the unit of rewards, `baseline` what
    earlier rollouts earned.

    Rewards are per token, a score is per response. The score is paid on the last token, once the whole response is
    known; each token pays on its own for what it departs from the reference. Which earlier token earned the score is
    for the estimator to say.
    """
    shaped = []
    for sample, reward in zip(samples, rewards, strict=True):
        # A response that was cut off may have a good score so far: without the penalty the policy learns not to end.
        score = reward - (0.0 if sample.finished else shaping.missing_eos_penalty)
        # The KL that counts is that of the sampled tokens, against the frozen start; it is fixed with the rollout, so
        # the update sees it as reward and does not differentiate it.
        shaped.append(
            shaped_rewards(
                logprobs_R=torch.from_numpy(sample.logprobs_R),
                ref_logprobs_R=torch.from_numpy(sample.ref_logprobs_R),
                score=score,
                kl_coefficient=shaping.kl_coefficient,
            )
        )
    estimates = estimate(estimator, samples, shaped, baseline=baseline)
    sequences = [_to_sequence(sample, result) for sample, result in zip(samples, estimates, strict=True)]
    return Experience(sequences, mean_total(shaped))


def _to_sequence(sample: Sampled, result: Estimate) -> TokenSequence:
    # Prompt tokens get zeros, which no loss reads: the loss mask is 0 there.
    fields = {"old_logprobs": sample.logprobs_R, "advantages": result.advantages_R}
    if sample.values_R is not None and result.returns_R is not None:
        fields |= {"old_values": sample.values_R, "returns": result.returns_R}
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
