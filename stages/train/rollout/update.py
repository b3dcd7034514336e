"""The update: the loss of a micro-batch of experience, the same for every estimator of advantages.

Without a critic among the trained parts, the value terms are absent everywhere.

Shape legend: N targets of a micro-batch.
"""

import torch
from torch import Tensor, nn

from stages.config.estimators import GAE, Estimator
from stages.config.rollouts import PPOConfig
from stages.data.tokens.packing import Packed
from stages.losses.policy import ppo_policy_loss, ppo_value_loss
from stages.models.forward import TrunkOutput, target_logprobs, target_positions, target_values
from stages.train.engine import LossOutput
from stages.train.routing import Balancing


def update_loss(config: PPOConfig, parts: nn.ModuleDict, batch: Packed, balancing: Balancing) -> LossOutput:
    """Return the clipped surrogate, with the value loss where there is a critic, summed over response tokens."""
    trunks = {name: balancing.run_trunk(parts, name, batch) for name in parts}
    # What the rollout recorded of the response tokens, in the order in which the models give theirs.
    where = target_positions(batch)
    old = {name: values_BT[where] for name, values_BT in batch.fields.items()}
    # The same temperature as in sampling: the ratio compares the distributions that tokens were drawn from.
    tokens = target_logprobs(
        parts["policy"], batch, temperature=config.temperature, with_entropy=True, trunk=trunks["policy"]
    )
    policy = ppo_policy_loss(
        logprobs_N=tokens.logprobs_N,
        old_logprobs_N=old["old_logprobs"],
        advantages_N=old["advantages"],
        clip_range=config.clip_range,
    )
    value_sum = _value_loss_sum(config.estimator, parts, batch, old, trunks)
    sums = {
        "ppo/policy_loss": policy.loss_sum.detach(),
        "ppo/value_loss": None if value_sum is None else value_sum.detach(),
        "ppo/clip_fraction": policy.clipped_sum,
        "ppo/approx_kl": policy.approx_kl_sum,
        "ppo/entropy": tokens.entropy_sum,
    }
    # All are sums over response tokens; the loop divides by those of the whole step, on all ranks.
    count = policy.loss_sum.new_tensor(float(len(tokens.logprobs_N)))
    metrics = {name: torch.stack([value, count]) for name, value in sums.items() if value is not None}
    loss_sum = policy.loss_sum
    if value_sum is not None and isinstance(config.estimator, GAE):
        loss_sum = loss_sum + config.estimator.value_coefficient * value_sum
    return balancing.added_to(LossOutput(loss_sum, metrics), **trunks)


def _value_loss_sum(
    estimator: Estimator, parts: nn.ModuleDict, batch: Packed, old: dict[str, Tensor], trunks: dict[str, TrunkOutput]
) -> Tensor | None:
    if not isinstance(estimator, GAE):
        return None
    return ppo_value_loss(
        values_N=target_values(parts["critic"], batch, trunks["critic"]),
        old_values_N=old["old_values"],
        returns_N=old["returns"],
        clip_range=estimator.value_clip_range,
    )
