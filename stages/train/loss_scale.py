"""Dynamic loss scaling for float16, whose gradients would vanish otherwise (Micikevicius et al. 2018,
arXiv:1710.03740).

The loss is multiplied by a power of two and the gradients divided by it. A gradient that overflows costs its step and
halves the scale; after many good steps it doubles. The numbers are those of torch.amp.GradScaler, but for the start,
which is low enough not to waste the first steps.
"""

import torch
from torch import Tensor

# GradScaler starts at 2**16, and the first steps of a run overflow until it has halved often enough.
_START = 2.0**13
_GOOD_STEPS = 2000


class LossScale:
    """The scale and how long it has been good; without float16 it stays 1."""

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        self.value = _START if dynamic else 1.0
        self._good_steps = 0

    def update(self, *, overflowed: bool) -> None:
        if not self._dynamic:
            return
        # Powers of two only: scaling and unscaling change exponents and no bits of the gradient.
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value /= 2
        elif self._good_steps == _GOOD_STEPS:
            self.value, self._good_steps = self.value * 2, 0

    def state(self) -> Tensor:
        return torch.tensor([self.value, self._good_steps], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Continue from a saved scale, unless this run or the one that saved does not scale."""
        if self._dynamic and float(state[0]) != 1.0:
            self.value, self._good_steps = float(state[0]), int(state[1])
