"""The update: the loss of a micro-batch of experience, the same for every estimator of advantages.

Without a critic there are no value terms anywhere.

Shape legend: N targets of a micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.config.estimators import GAE
from stages.config.rollouts import LossOver, PPOConfig
from stages.data.tokens.packing import Packed
from stages.losses.divergence import k2, k3
from stages.losses.policy import ppo_policy_loss, ppo_value_loss
from stages.models.forward import TokenLogprobs, target_logprobs, target_positions, target_values
from stages.train.engine import LossOutput
from stages.train.rollout.documents import document_loss_sums, responses_of
from stages.train.routing import Balancing

Recorded = dict[str, Tensor]
"""What the rollout recorded of each response token, by the names of `experience.FIELDS`."""


def update_units(config: PPOConfig, batch: Packed) -> float:
    """Return what the loss of a micro-batch is summed over: tokens of responses, or responses."""
    responses = responses_of(batch)
    if config.loss_over is LossOver.TOKENS:
        return float(responses.num_targets)
    return float(len(responses.segment_ids_BT[target_positions(responses)].unique()))


def update_loss(config: PPOConfig, parts: nn.ModuleDict, batch: Packed, balancing: Balancing) -> LossOutput:
    """Return the clipped surrogate, with whatever the settings add to it, summed over tokens or responses."""
    trunks = {name: balancing.run_trunk(parts, name, batch) for name in parts}
    responses = responses_of(batch)
    where = target_positions(responses)
    # In the order in which the models give theirs.
    recorded = {name: values_BT[where] for name, values_BT in batch.fields.items()}
    # The same temperature as in sampling: the ratio compares the distributions that tokens were drawn from.
    tokens = target_logprobs(
        parts["policy"], responses, temperature=config.temperature, with_entropy=True, trunk=trunks["policy"]
    )
    policy = _policy_terms(config, tokens, recorded)
    count = policy.loss_sum.new_tensor(float(len(tokens.logprobs_N)))
    units = policy.loss_sum.new_tensor(update_units(config, batch))
    loss_sum, metrics = policy.loss_sum, {name: torch.stack([value, count]) for name, value in policy.counts.items()}
    # A loss is averaged over what it sums over, all else over tokens; the loop divides by those of the whole step.
    metrics |= {name: torch.stack([value.detach(), units]) for name, value in policy.losses.items()}
    if isinstance(config.estimator, GAE):
        value_sum = ppo_value_loss(
            values_N=target_values(parts["critic"], responses, trunks["critic"]),
            old_values_N=recorded["old_values"],
            returns_N=recorded["returns"],
            clip_range=config.estimator.value_clip_range,
            weights_N=recorded.get("loss_weights"),
        )
        loss_sum = loss_sum + config.estimator.value_coefficient * value_sum
        metrics["ppo/value_loss"] = torch.stack([value_sum.detach(), units])
    documents = document_loss_sums(parts["policy"], batch, trunks["policy"])
    if documents is not None:
        loss_sum = loss_sum + config.pretraining_coefficient * documents[0]
        metrics["ppo/pretraining_loss"] = documents[1]
    return balancing.added_to(LossOutput(loss_sum, metrics), **trunks)


class _PolicyTerms(NamedTuple):
    loss_sum: Tensor
    losses: dict[str, Tensor]
    """Its parts, before their coefficients."""
    counts: dict[str, Tensor]
    """Sums over tokens without gradient."""


def _policy_terms(config: PPOConfig, tokens: TokenLogprobs, recorded: Recorded) -> _PolicyTerms:
    """The surrogate, the penalty for leaving the reference if it is paid here, and the bonus for entropy."""
    assert tokens.entropies_N is not None
    weights_N = _weights(recorded)
    surrogate = ppo_policy_loss(
        logprobs_N=tokens.logprobs_N,
        old_logprobs_N=recorded["old_logprobs"],
        advantages_N=recorded["advantages"],
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        dual_clip=config.dual_clip,
        weights_N=weights_N,
    )
    loss_sum, losses = surrogate.loss_sum, {"ppo/policy_loss": surrogate.loss_sum}
    if config.kl_place == "loss":
        estimator = k2 if config.kl_estimator == "k2" else k3
        divergence_N = estimator(tokens.logprobs_N - recorded["ref_logprobs"])
        losses["ppo/kl_loss"] = _weighted_sum(divergence_N, weights_N)
        loss_sum = loss_sum + _weighted_sum(recorded["kl_coefficients"] * divergence_N, weights_N)
    entropies_N = tokens.entropies_N
    if config.entropy_coefficient:
        loss_sum = loss_sum - config.entropy_coefficient * _weighted_sum(entropies_N, weights_N)
    counts = {
        "ppo/clip_fraction": surrogate.clipped_sum,
        "ppo/approx_kl": surrogate.approx_kl_sum,
        "ppo/entropy": entropies_N.detach().sum(),
    }
    return _PolicyTerms(loss_sum, losses, counts)


def _weights(recorded: Recorded) -> Tensor | None:
    """What each token's policy loss counts; None where all count alike."""
    found = [recorded[name] for name in ("loss_weights", "policy_weights") if name in recorded]
    return torch.stack(found).prod(0) if found else None


def _weighted_sum(values_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return (values_N if weights_N is None else values_N * weights_N).sum()
