"""Log-probabilities without kept logits equal those with them, and so do their gradients."""

import pytest
import torch
from torch import Tensor

from stages.losses.policy import entropy
from stages.models.linear_logprobs import linear_logprobs


def plain(hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_NV = hidden_NH @ weight_VH.T / temperature
    return logits_NV.log_softmax(-1).gather(1, targets_N[:, None])[:, 0], entropy(logits_NV)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_ones(temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2500, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets, scale = torch.randint(0, 50, (2500,)), torch.randn(2500)
    expected, expected_entropies = plain(hidden, weight, targets, temperature)
    logprobs, entropies = linear_logprobs(hidden, weight, targets, temperature=temperature, with_entropy=True)
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, rtol=1e-5, atol=1e-5)
    weights = torch.randn(2500)
    for mine, theirs in (
        ((logprobs * scale).sum(), (expected * scale).sum()),
        ((entropies * weights).sum(), (expected_entropies * weights).sum()),
        ((logprobs * scale + entropies * weights).sum(), (expected * scale + expected_entropies * weights).sum()),
    ):
        pairs = zip(
            *(torch.autograd.grad(of, (hidden, weight), retain_graph=True) for of in (mine, theirs)), strict=True
        )
        for gradient, expected_gradient in pairs:
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_no_target_gives_no_logprob_and_no_gradient() -> None:
    hidden, weight = torch.randn(0, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    logprobs, _ = linear_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long))
    logprobs.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
