"""Cross-entropy of a linear layer without ever keeping its logits.

The gradient is formed together with the loss, chunk by chunk, so memory is one chunk of logits instead of all of them,
and each logit is touched while it is still in cache. (Idea: Wijmans et al. 2024, arXiv:2411.09009; Liger Kernel.)

Shape legend: N targets, H hidden size, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stages.losses.language import z_loss

_CHUNK = 1024
_CPU_LOGITS = 1 << 22
"""16 MB of float32: a larger chunk does not stay in a processor's caches and takes a third longer."""


def chunks(length: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Cut targets into pieces whose logits may exist at once."""
    size = min(_CHUNK, max(1, _CPU_LOGITS // vocab_size)) if device.type == "cpu" else _CHUNK
    return [slice(start, start + size) for start in range(0, length, size)]


class CrossEntropy(NamedTuple):
    """Sums over targets, in float32."""

    loss_sum: Tensor
    """Cross-entropy in nats, plus `z_coefficient` times `z_sum`."""
    z_sum: Tensor
    """Squared log-normalisers, without gradient; 0 where the coefficient is 0."""


def linear_cross_entropy_sum(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
    """Return the sum over targets of -log softmax(hidden @ weight.T)[target], in float32 and nats."""
    return linear_cross_entropy(hidden_NH, weight_VH, targets_N).loss_sum


def linear_cross_entropy(
    hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, *, z_coefficient: float = 0.0
) -> CrossEntropy:
    """Return the cross-entropy of softmax(hidden @ weight.T), with a z-loss when its coefficient is not 0."""
    device = hidden_NH.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
    return CrossEntropy(*_LinearCrossEntropySum.apply(hidden_NH, weight_VH, targets_N, dtype, z_coefficient))


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, dtype: torch.dtype, z_coefficient: float
    ) -> tuple[Tensor, Tensor]:
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        low_VH = weight_VH.detach().to(dtype)
        grad_hidden_NH = torch.empty_like(hidden_NH) if needs_grad else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        z_sum = torch.zeros_like(total)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for chunk in chunks(len(hidden_NH), len(weight_VH), hidden_NH.device):
                chunk_CH = hidden_NH[chunk].detach().to(dtype)
                targets_C = targets_N[chunk, None]
                logits_CV = chunk_CH @ low_VH.T
                grad_CV = torch.softmax(logits_CV, -1, dtype=torch.float32)
                # The largest logit's share is at least 1 / V, so unlike the target's it tells the normaliser exactly.
                log_norm_C1 = logits_CV.amax(-1, keepdim=True).float() - grad_CV.amax(-1, keepdim=True).log()
                total += (log_norm_C1 - logits_CV.gather(1, targets_C)).sum()
                if z_coefficient:
                    z_sum += z_loss(log_norm_C1)
                if grad_hidden_NH is None or grad_weight_VH is None:
                    continue
                if z_coefficient:  # d log^2 Z / d logits = 2 log Z softmax
                    grad_CV.mul_(1 + 2 * z_coefficient * log_norm_C1)
                # d loss / d logits = softmax - onehot(target)
                grad_CV.scatter_add_(1, targets_C, torch.full_like(targets_C, -1, dtype=grad_CV.dtype))
                low_CV = grad_CV.to(dtype)
                grad_hidden_NH[chunk] = low_CV @ low_VH
                grad_weight_VH += low_CV.T @ chunk_CH
        if grad_hidden_NH is not None and grad_weight_VH is not None:
            ctx.save_for_backward(grad_hidden_NH, grad_weight_VH.to(weight_VH.dtype))
        if z_coefficient:
            total += z_coefficient * z_sum
        ctx.mark_non_differentiable(z_sum)
        return total, z_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        # A sum over targets has one incoming gradient for all of them, so it may scale what forward has computed.
        grad_hidden_NH, grad_weight_VH = ctx.saved_tensors
        return grad_hidden_NH * grad_outputs[0], grad_weight_VH * grad_outputs[0], None, None, None
