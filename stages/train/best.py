"""Which step was the best on held-out data: a function of the metrics so far, so a resume need not remember it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from stages.config.errors import ConfigError
from stages.config.train import TrainConfig


@dataclass(frozen=True)
class BestBy:
    """A held-out metric, its good direction, and how often it is measured."""

    metric: str
    highest: bool
    every: int

    @staticmethod
    def of(config: TrainConfig) -> "BestBy | None":
        """None when the last weights are wanted."""
        if not config.best_metric:
            return None
        return BestBy(config.best_metric, config.best_is == "highest", config.eval_every)

    def step(self, history: Iterable[Mapping[str, Any]]) -> int | None:
        """Return the best step, the earliest of equals; None before the first evaluation.

        Raises ConfigError when an evaluation did not measure the metric.
        """
        best: tuple[float, int] | None = None
        for row in history:
            if row["step"] % self.every == 0 or self.metric in row:
                goodness = self._goodness(row)
                if best is None or goodness > best[0]:
                    best = goodness, row["step"]
        return best[1] if best else None

    def _goodness(self, row: Mapping[str, Any]) -> float:
        if self.metric not in row:
            measured = ", ".join(sorted(name for name in row if name.startswith("eval/"))) or "nothing"
            raise ConfigError(
                f"best_metric={self.metric!r} is not measured by this stage's evaluation, which measures: {measured}",
                advice="Name one of these, or leave best_metric empty for the last weights.",
            )
        value = float(row[self.metric])
        # NaN compares false with everything and would stay the best for ever if it came first.
        return -math.inf if math.isnan(value) else value if self.highest else -value


class Fallback(Protocol):
    """Which step's weights become the model where something went wrong on the way, whatever is the best otherwise."""

    @property
    def tripped(self) -> bool:
        """Whether it did."""
        ...

    def step(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the step to go back to; None when there is none and the last weights are the model."""
        ...

    def kept(self, history: Sequence[Mapping[str, Any]]) -> set[int]:
        """Return the steps that may yet be gone back to, by the metrics so far; their checkpoints are kept."""
        ...
