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
    """Return log softmax(hidden @ weight.T / temperature)[target], shape (N,), in float32, and the sum of the
    distributions' entropies, without gradient and 0 unless asked for."""
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
        entropy_sum = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for chunk in chunks(len(hidden_NH), len(weight_VH), hidden_NH.device):
                # The product in low precision, everything after it in float32: log-probabilities are differences of
                # large numbers.
                logits_CV = (hidden_NH[chunk].detach().to(dtype) @ low_VH.T).float().div_(temperature)
                norms_N[chunk] = logits_CV.logsumexp(-1)
                logprobs_N[chunk] = logits_CV.gather(1, targets_N[chunk, None])[:, 0] - norms_N[chunk]
                if with_entropy:
                    entropy_sum += entropy(logits_CV).sum()
        # One number a token is kept, from which the backward pass forms softmax again without a second logsumexp.
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, norms_N)
        ctx.mark_non_differentiable(entropy_sum)
        return logprobs_N, entropy_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, targets_N, norms_N = ctx.saved_tensors
        grad_N = grad_outputs[0] / ctx.temperature
        low_VH = weight_VH.detach().to(ctx.dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH)
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for chunk in chunks(len(hidden_NH), len(weight_VH), hidden_NH.device):
                chunk_CH = hidden_NH[chunk].detach().to(ctx.dtype)
                logits_CV = (chunk_CH @ low_VH.T).float().div_(ctx.temperature)
                # d log p[target] / d logits = onehot(target) - softmax, times the gradient that comes in
                grad_CV = logits_CV.sub_(norms_N[chunk, None]).exp_().mul_(-grad_N[chunk, None])
                grad_CV.scatter_add_(1, targets_N[chunk, None], grad_N[chunk, None])
                low_CV = grad_CV.to(ctx.dtype)
                grad_hidden_NH[chunk] = low_CV @ low_VH
                grad_weight_VH += low_CV.T @ chunk_CH
        return grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype), None, None, None, None
