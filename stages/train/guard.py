"""Whether a step may change the weights: not when it is not finite, nor, on request, when it is a spike.

The rule is OLMo-core's skip-step: loss or gradient norm more than `spike_factor` standard deviations above the mean of
the last `spike_window` steps. Spikes enter the window too, so a level that stays is accepted after a while. The numbers
judged are global ones, so every rank decides alike.
"""

import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from stages.config.errors import NonFiniteError
from stages.config.train import OptimizerConfig

# One or two come with an unlucky batch; five mean that weights or data are broken and no step will be finite again.
_MAX_NON_FINITE_IN_A_ROW = 5


class StepGuard:
    """Judges steps, counts those that it refuses, and remembers both for a checkpoint."""

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._non_finite_in_a_row = 0
        self._num_skipped = 0
        self._num_spikes = 0

    def judging(self, *, loss: float, step: int) -> Callable[[float], bool]:
        """Return what judges step `step`, once its gradient norm is known; to be asked once.

        It raises NonFiniteError after too many steps in a row that are not finite.
        """

        def accepts(grad_norm: float) -> bool:
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                self._refuse_non_finite(step)
                return False
            self._non_finite_in_a_row = 0
            return not self._is_spike(loss, grad_norm)

        return accepts

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        if not self._config.spike_window:
            return False
        # Judged before the values enter the window: a spike must not raise the mean that it is compared with.
        is_spike = self._above(self._losses, loss) or self._above(self._grad_norms, grad_norm)
        for values, value in ((self._losses, loss), (self._grad_norms, grad_norm)):
            values.append(value)
            del values[: -self._config.spike_window]
        self._num_spikes += is_spike
        self._num_skipped += is_spike
        return is_spike

    def _above(self, values: list[float], value: float) -> bool:
        """Half a window is needed before anything counts as a spike."""
        if len(values) < max(2, self._config.spike_window // 2):
            return False
        return value - fmean(values) > self._config.spike_factor * stdev(values)

    def _refuse_non_finite(self, step: int) -> None:
        self._num_skipped += 1
        self._non_finite_in_a_row += 1
        if self._non_finite_in_a_row >= _MAX_NON_FINITE_IN_A_ROW:
            raise NonFiniteError(
                f"loss or gradient was not finite in {self._non_finite_in_a_row} steps in a row, up to step {step}",
                advice=f"Lower optimizer.learning_rate (now {self._config.learning_rate}) or use precision=fp32.",
            )

    @property
    def metrics(self) -> dict[str, float]:
        """Steps so far that changed nothing, and how many of them were spikes."""
        return {"train/skipped_steps": float(self._num_skipped), "train/spike_steps": float(self._num_spikes)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "non_finite_in_a_row": self._non_finite_in_a_row,
            "num_skipped": self._num_skipped,
            "num_spikes": self._num_spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses, self._grad_norms = list(state["losses"]), list(state["grad_norms"])
        self._non_finite_in_a_row = state["non_finite_in_a_row"]
        self._num_skipped, self._num_spikes = state["num_skipped"], state["num_spikes"]
