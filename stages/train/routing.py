"""Keeps the experts of a mixture evenly busy, with a loss that does not depend on how a step is cut up.

The usual balancing loss multiplies, for each expert, the share of tokens that it got with the probability that it had.
Taken over a micro-batch, as most trainers do, that share depends on the layout and on whether the micro-batch happens
to be about one thing. Here it is the share over all tokens of the *whole step before*, over all ranks: the loss then is
a sum over tokens, and every layout gives the same gradient. In the first step all shares are equal.

Shape legend: K tokens, L layers, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stages.losses import router_balance_loss


@dataclass(frozen=True)
class Routing:
    """How a model sends tokens to experts."""

    num_chosen: int
    """Experts a token."""
    coefficient: float
    """Weight of the balancing loss, the model's own."""


def routing_of(model: nn.Module) -> Routing | None:
    """Describe a mixture-of-experts model of transformers; None for a model that comes without a balancing loss."""
    config = model.config
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if coefficient is None or "router_logits" not in (model._can_record_outputs or {}):  # type: ignore[operator]
        return None
    return Routing(num_chosen=config.num_experts_per_tok, coefficient=coefficient)  # type: ignore[union-attr, arg-type]


class RouterBalance:
    """The balancing loss, and the load of the last step that it needs."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._load_LE: Tensor | None = None

    def loss_sum(self, logits_KLE: Tensor) -> Tensor:
        """Return the balancing loss, times its coefficient, summed over tokens."""
        if self._load_LE is None:
            self._load_LE = self._even(logits_KLE)
        load_LE = self._load_LE.to(logits_KLE.device)
        return self._routing.coefficient * router_balance_loss(logits_KLE.float().softmax(-1), load_LE)

    def _even(self, logits_KLE: Tensor) -> Tensor:
        num_layers, num_experts = logits_KLE.shape[1:]
        return torch.full((num_layers, num_experts), self._routing.num_chosen / num_experts)

    def count(self, logits_KLE: Tensor) -> Tensor:
        """Return how many tokens each expert got, shape (L, E)."""
        chosen = logits_KLE.detach().topk(self._routing.num_chosen, dim=-1).indices
        return torch.zeros_like(logits_KLE, dtype=torch.float32).scatter_(-1, chosen, 1.0).sum(0)

    def observe(self, counts_LE: Tensor) -> dict[str, float]:
        """Take in the counts of a whole step, over all ranks; return the busiest and the idlest expert's load, where 1
        is an even share."""
        num_chosen, num_experts = self._routing.num_chosen, counts_LE.shape[-1]
        self._load_LE = (counts_LE * num_chosen / counts_LE.sum(dim=-1, keepdim=True)).float()
        relative_LE = self._load_LE * (num_experts / num_chosen)
        return {
            "train/expert_load_max": float(relative_LE.max()),
            "train/expert_load_min": float(relative_LE.min()),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._load_LE is None else {"router_load": self._load_LE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._load_LE = state.get("router_load")
