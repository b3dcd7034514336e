"""Log-probabilities of chosen tokens without ever keeping their logits.

As in linear_cross_entropy.py, but each token's gradient is known only when the loss over all of them is: the backward
pass forms each chunk of logits again, which costs one matrix product instead of memory for all logits.

Shape legend: N targets, C targets of a chunk, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from stages.losses.policy import entropy
from stages.models.linear_cross_entropy import chunks


def linear_logprobs(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """Return log softmax(hidden @ weight.T / temperature)[target] and the entropy of that distribution in nats, each of
    shape (N,) and in float32; entropies are 0 and without gradient unless asked for."""
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    return _LinearLogprobs.apply(hidden_NH, weight_VH, targets_N, dtype, temperature, with_entropy)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        dtype: torch.dtype,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtype, ctx.temperature = dtype, temperature
        low_VH = weight_VH.detach().to(dtype)
        logprobs_N = torch.empty(len(hidden_NH), dtype=torch.float32, device=hidden_NH.device)
        norms_N = torch.empty_like(logprobs_N)
        entropies_N = torch.zeros_like(logprobs_N)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for chunk in chunks(len(hidden_NH), len(weight_VH), hidden_NH.device):
                # The product in low precision, everything after it in float32: log-probabilities are differences of
                # large numbers.
                logits_CV = (hidden_NH[chunk].detach().to(dtype) @ low_VH.T).float().div_(temperature)
                norms_N[chunk] = logits_CV.logsumexp(-1)
                logprobs_N[chunk] = logits_CV.gather(1, targets_N[chunk, None])[:, 0] - norms_N[chunk]
                if with_entropy:
                    entropies_N[chunk] = entropy(logits_CV)
        # Numbers a token are kept, from which the backward pass forms softmax again without a second logsumexp.
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, norms_N, entropies_N)
        ctx.set_materialize_grads(False)  # most losses use no entropy, and its gradient costs another pass over logits
        if not with_entropy:
            ctx.mark_non_differentiable(entropies_N)
        return logprobs_N, entropies_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, norms_N, entropies_N = ctx.saved_tensors
        grad_N, grad_entropy_N = grad_outputs
        grad_N = torch.zeros_like(norms_N) if grad_N is None else grad_N / ctx.temperature
        low_VH = weight_VH.detach().to(ctx.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for chunk in chunks(len(hidden_NH), len(weight_VH), hidden_NH.device):
                chunk_CH = hidden_NH[chunk].detach().to(ctx.dtype)
                logits_CV = (chunk_CH @ low_VH.T).float().div_(ctx.temperature)
                logprobs_CV = logits_CV.sub_(norms_N[chunk, None])
                added_CV = None
                if grad_entropy_N is not None:
                    # d entropy / d logits = -softmax * (log softmax + entropy), times the gradient that comes in
                    added_CV = logprobs_CV.exp() * (logprobs_CV + entropies_N[chunk, None])
                    added_CV.mul_(-grad_entropy_N[chunk, None] / ctx.temperature)
                # d log p[target] / d logits = onehot(target) - softmax, likewise
                grad_CV = logprobs_CV.exp_().mul_(-grad_N[chunk, None])
                grad_CV.scatter_add_(1, targets_N[chunk, None], grad_N[chunk, None])
                low_CV = (grad_CV if added_CV is None else grad_CV.add_(added_CV)).to(ctx.dtype)
                grad_hidden_NH[chunk] = low_CV @ low_VH
                grad_weight_VH += low_CV.T @ chunk_CH
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None
