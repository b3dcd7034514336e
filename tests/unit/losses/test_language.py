"""Measures of next-token prediction against arithmetic that a reader can redo by hand."""

import math

import pytest
import torch

from stages.losses.language import bits_per_byte, perplexity, router_balance_loss, z_loss


def test_perplexity_and_bits() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert bits_per_byte(math.log(2) * 24, num_bytes=8) == pytest.approx(3.0)


def test_z_loss_is_the_square_of_the_log_normaliser_with_its_slope() -> None:
    # A model that starts with even logits of 0 over V = 8 tokens has log Z = ln 8.
    log_normaliser = torch.tensor([math.log(8), -0.5], dtype=torch.float64, requires_grad=True)
    loss = z_loss(log_normaliser)
    assert loss.item() == pytest.approx(math.log(8) ** 2 + 0.25)
    assert torch.autograd.grad(loss, log_normaliser)[0].tolist() == pytest.approx([2 * math.log(8), -1.0])


def test_the_router_balance_loss_weighs_each_expert_by_its_load() -> None:
    # Two tokens, one layer, two experts: 2 (0.75 x 1 + 0.25 x 0) + 2 (0.5 x 1 + 0.5 x 0); the slope is 2 f.
    probabilities = torch.tensor([[[0.75, 0.25]], [[0.5, 0.5]]], requires_grad=True)
    loss = router_balance_loss(probabilities, torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(1.5 + 1.0)
    assert torch.autograd.grad(loss, probabilities)[0].flatten().tolist() == [2.0, 0.0, 2.0, 0.0]
