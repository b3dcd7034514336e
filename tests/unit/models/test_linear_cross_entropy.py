"""The fused loss against plain autograd, z-loss included."""

import pytest
import torch
from torch.nn import functional as F

from stages.models import linear_cross_entropy as fused


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_loss_and_gradients_are_those_of_autograd(coefficient: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fused, "_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(10, 6, generator=generator), torch.randn(7, 6, generator=generator)
    targets = torch.randint(0, 7, (10,), generator=generator)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    result = fused.linear_cross_entropy(ours[0], ours[1], targets, z_coefficient=coefficient)
    (2.5 * result.loss_sum).backward()

    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    logits = plain[0] @ plain[1].T
    z_sum = logits.logsumexp(-1).square().sum()
    (2.5 * (F.cross_entropy(logits, targets, reduction="sum") + coefficient * z_sum)).backward()

    expected = F.cross_entropy(logits, targets, reduction="sum") + coefficient * z_sum
    torch.testing.assert_close(result.loss_sum, expected.detach())
    torch.testing.assert_close(result.z_sum, z_sum.detach() if coefficient else torch.tensor(0.0))
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_z_loss_pulls_the_normaliser_towards_one():
    """With logits (c, c) the gradient of log^2 Z is 2 log Z / 2 for each: down where Z > 1."""
    hidden = torch.ones(1, 1)
    weight = torch.full((2, 1), 3.0, requires_grad=True)
    with_z = fused.linear_cross_entropy(hidden, weight, torch.tensor([0]), z_coefficient=1.0)
    (gradient,) = torch.autograd.grad(with_z.loss_sum, weight)
    log_z = 3.0 + torch.tensor(2.0).log()
    torch.testing.assert_close(gradient[:, 0], torch.stack([log_z - 0.5, log_z + 0.5]))
