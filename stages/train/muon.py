"""Muon for matrices and AdamW for the rest behind one optimizer, whose state looks like any other's.

Not `torch.optim.Muon`: it takes neither the stacked matrices of experts nor the shards of FSDP, and rounds to bfloat16
in float32 runs too, where layouts must agree. On plain matrices both make the same updates, as a test verifies.
"""

import math
from typing import Any

import torch
from torch import Tensor

# Jordan et al. 2024: chosen for a steep slope at 0, which lifts small singular values in few steps. They do not
# converge to 1 then, but stay between 0.7 and 1.2, which trains as well.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2
"""Moonlight (arXiv:2502.16982, section 2.2): updates as large as AdamW's usually are."""


class Muon(torch.optim.Optimizer):
    """Groups with `muon` True are updated by Muon, the others by fused AdamW; `state` and `param_groups` hold both."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        dtype: torch.dtype,
    ) -> None:
        """`dtype` is that of the orthogonalisation's products."""
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._momentum, self._dtype = momentum, dtype
        others = self._others()
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused) if others else None

    def _others(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if not group["muon"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, rate=group["lr"], decay=group["weight_decay"])
        if self._adamw is not None:
            # Shared anew in every step: loading a checkpoint replaces state and groups by new objects.
            self._adamw.state, self._adamw.param_groups = self.state, self._others()
            self._adamw.step()

    def _update(self, parameter: Tensor, *, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient, momentum = parameter.grad, state["momentum"]
        assert gradient is not None
        # Nesterov: the direction looks one step ahead of the momentum.
        momentum.lerp_(gradient, 1 - self._momentum)
        direction = _orthogonal(gradient.lerp(momentum, self._momentum), self._dtype)
        # An orthogonal m x n matrix has an RMS of 1/sqrt(max(m, n)): this makes updates of every shape equally large.
        scale = _RMS_OF_ADAMW * math.sqrt(max(parameter.shape[-2:]))
        parameter.mul_(1 - rate * decay).add_(direction.to(parameter.dtype), alpha=-rate * scale)


def _orthogonal(update: Tensor, dtype: torch.dtype) -> Tensor:
    """As `orthogonalised`; every rank gathers a sharded matrix, whose singular values no shard knows, and keeps its
    part."""
    if not hasattr(update, "device_mesh"):
        return orthogonalised(update, dtype)
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(update, DTensor)
    # Every rank computes the whole: the same work on all, but no second collective to send results around.
    whole = orthogonalised(update.full_tensor(), dtype)
    everywhere = [Replicate()] * update.device_mesh.ndim
    return DTensor.from_local(whole, update.device_mesh, everywhere, run_check=False).redistribute(
        placements=update.placements
    )


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the nearest matrix with equal singular values, roughly: five steps of a quintic Newton-Schulz iteration.

    Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Singular values end between 0.7 and 1.2. A stack of
    matrices, as experts have, is taken one by one.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(dtype)
    # The Gram matrix is formed on the shorter side, where it costs less.
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    # The Frobenius norm is at least the largest singular value: all are at most 1, where the iteration is stable.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
