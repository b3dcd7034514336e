"""How many floating-point operations a loss needs: what `train/mfu` and the benchmarks count.

Two for each weight and token; four for each pair of positions that attention compares, per layer and unit of width;
three times that with the backward pass. Recomputed activations, reference models, rollouts, norms and the optimizer are
not counted, so the figure is useful work. Kaplan et al. 2020 (arXiv:2001.08361), section
2.1, with attention counted where it happens: within documents, below the diagonal.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from stages.data.tokens.packing import Packed

_WITH_BACKWARD = 3


@dataclass(frozen=True)
class FlopCounter:
    """The sizes of one model that the count depends on."""

    trunk_weights: int
    """In matrices that every token is multiplied with; of experts, those that a token is sent to."""
    head_weights: int
    """In the output matrix, which is applied to targets only."""
    attention_width: int
    """Layers times heads times their size."""

    @staticmethod
    def of(model: nn.Module) -> "FlopCounter":
        config: Any = model.config
        trunk: nn.Module = model.base_model  # type: ignore[assignment]
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        matrices = [weight for weight in trunk.parameters() if weight.ndim >= 2 and weight is not embedding]
        head = model.get_output_embeddings() or getattr(model, "score", None)  # type: ignore[operator]
        return FlopCounter(
            trunk_weights=sum(_met(weight, config) for weight in matrices),
            head_weights=0 if head is None else head.weight.numel(),
            attention_width=_attention_width(config),
        )

    def training(self, batch: Packed) -> float:
        """Return the operations of forward and backward pass on a micro-batch."""
        starts, ends, shared_starts, shared_ends = batch.spans_D4.unbind(1)
        own, past = ends - starts, shared_ends - shared_starts
        compared = int((own * past + own * (own + 1) // 2).sum())
        weights = self.trunk_weights * batch.num_tokens + self.head_weights * batch.num_targets
        return float(_WITH_BACKWARD * (2 * weights + 4 * self.attention_width * compared))


def _attention_width(config: Any) -> int:
    """Return layers times width; 0 for a model without attention."""
    num_heads = getattr(config, "num_attention_heads", 0)
    if not num_heads:
        return 0
    return config.num_hidden_layers * num_heads * (getattr(config, "head_dim", None) or config.hidden_size // num_heads)


def _met(weight: nn.Parameter, config: Any) -> int:
    """Return how many of a matrix's weights one token is multiplied with; experts are tensors of three dimensions."""
    if weight.ndim == 3:
        return weight.numel() // weight.shape[0] * config.num_experts_per_tok
    return weight.numel()
