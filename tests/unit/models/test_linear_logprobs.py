"""Log-probabilities without kept logits equal those with them, and so do their gradients."""

import pytest
import torch
from torch import Tensor

from stages.losses.policy import entropy
from stages.models.linear_logprobs import linear_logprobs


def plain(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_NV = hidden_NH @ weight_VH.T / temperature
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0], entropy(logits_NV).sum()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_ones(temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, scale = torch.randint(0, 50, (2500,)), torch.randn(2500)
    expected, expected_entropy = plain(hidden, weight, targets, temperature)
    expected_grads = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
    logprobs, entropy_sum = linear_logprobs(hidden, weight, targets, temperature=temperature, with_entropy=True)
    grads = torch.autograd.grad((logprobs * scale).sum(), (hidden, weight))
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_sum, expected_entropy, rtol=1e-4, atol=1e-3)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_target_gives_no_logprob_and_no_gradient() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logprobs, _ = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
