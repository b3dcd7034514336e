"""How a mixture of experts routes tokens: which layers route, and what balance costs."""

from dataclasses import dataclass

from torch import nn


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
