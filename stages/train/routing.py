"""Keeps the experts of a mixture evenly busy, with a loss that does not depend on how a step is cut up.

The usual balancing loss multiplies, for each expert, the share of tokens that it got with the probability that it had.
Taken over a micro-batch, as most trainers do, that share depends on the layout and on whether the micro-batch happens
to be about one thing. Here it is the share over all tokens of the *whole step before*, over all ranks: the loss then is
a sum over tokens, and every layout gives the same gradient. In the first step all shares are equal.

Shape legend: K tokens, L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from stages.data.tokens.packing import Packed
from stages.losses.language import router_balance_loss
from stages.models.experts import Routing
from stages.models.forward import TrunkOutput, run_trunk
from stages.train.engine import LossOutput
from stages.train.objective import Step

_LOAD = "router_load"
"""Prefix of the loads among an objective's tensors."""


class RouterBalance:
    """The balancing loss, and the load of the last step that it needs."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self.load_LE: Tensor | None = None
        """Assignments a token in the last step; None before the first one."""

    def loss_sum(self, logits_KLE: Tensor) -> Tensor:
        """Return the balancing loss, times its coefficient, summed over tokens."""
        if self.load_LE is None:
            self.load_LE = self._even(logits_KLE)
        load_LE = self.load_LE.to(logits_KLE.device)
        return self._routing.coefficient * router_balance_loss(logits_KLE.float().softmax(-1), load_LE)

    def _even(self, logits_KLE: Tensor) -> Tensor:
        num_layers, num_experts = logits_KLE.shape[1:]
        return torch.full((num_layers, num_experts), self._routing.num_chosen / num_experts)

    def count(self, logits_KLE: Tensor) -> Tensor:
        """Return how many tokens each expert got, shape (L, E)."""
        # The model's own choice once more: transformers returns the logits but not which experts it took.
        chosen = logits_KLE.detach().topk(self._routing.num_chosen, dim=-1).indices
        return torch.zeros_like(logits_KLE, dtype=torch.float32).scatter_(-1, chosen, 1.0).sum(0)

    def observe(self, counts_LE: Tensor) -> Tensor:
        """Take in the counts of a whole step, over all ranks; return the load of each expert, where 1 is an even
        share."""
        # Divided by what was counted, and not by the number of tokens: a rank that kept others company counted none.
        num_chosen, num_experts = self._routing.num_chosen, counts_LE.shape[-1]
        self.load_LE = (counts_LE * num_chosen / counts_LE.sum(dim=-1, keepdim=True)).float()
        return self.load_LE * (num_experts / num_chosen)


class Balancing:
    """The balancing losses of all models that an objective trains, by their names; nothing where none is a mixture."""

    def __init__(self, **routings: Routing | None) -> None:
        self._balances = {name: RouterBalance(routing) for name, routing in routings.items() if routing}

    def run_trunk(self, parts: nn.ModuleDict, name: str, batch: Packed, noise_BTH: Tensor | None = None) -> TrunkOutput:
        """Run the trunk of one model, so that its output can be given to `added_to`."""
        return run_trunk(parts[name], batch, noise_BTH=noise_BTH, with_router_logits=name in self._balances)

    def added_to(self, output: LossOutput, **trunks: TrunkOutput) -> LossOutput:
        """Return the output with the balancing losses, which are sums over all tokens, and the experts' counts."""
        if not self._balances:
            return output
        losses, counts, num_tokens = [], [], 0
        for name, balance in self._balances.items():
            logits_KLE = trunks[name].router_logits_KLE
            assert logits_KLE is not None
            num_tokens = len(logits_KLE)
            # All models of an objective see the same batch, so one number of tokens holds for all.
            losses.append(balance.loss_sum(logits_KLE))
            counts.append(balance.count(logits_KLE).flatten())
        loss_sum = torch.stack(losses).sum()
        pair = torch.stack([loss_sum.detach(), loss_sum.new_tensor(float(num_tokens))])
        metrics = output.metrics | {"train/router_loss": pair}
        return output._replace(metrics=metrics, token_loss_sum=loss_sum, counts=torch.cat(counts))

    def watching(self, step: Step) -> Step:
        """Have the counts of the step come back here, as the loads that the next one needs."""
        return replace(step, observe=self._observe) if self._balances else step

    def _observe(self, counts: Tensor) -> dict[str, float]:
        """Return the busiest and the idlest expert's load of any layer, where 1 is an even share."""
        loads = [(balance, balance.load_LE) for balance in self._balances.values() if balance.load_LE is not None]
        parts = counts.split([load_LE.numel() for _, load_LE in loads])
        relative = [
            balance.observe(part.view_as(load_LE)) for (balance, load_LE), part in zip(loads, parts, strict=True)
        ]
        flat = torch.cat([load_LE.flatten() for load_LE in relative])
        return {"train/expert_load_max": float(flat.max()), "train/expert_load_min": float(flat.min())}

    def state_dict(self) -> dict[str, Tensor]:
        loads = {name: balance.load_LE for name, balance in self._balances.items()}
        return {f"{_LOAD}/{name}": load for name, load in loads.items() if load is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, balance in self._balances.items():
            balance.load_LE = state.get(f"{_LOAD}/{name}")
