"""What the stage `compare` finds: the content of `comparison.json`, from which its page is drawn."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import Field

from stages.config.base import Config
from stages.config.compare import Combination
from stages.config.memory import TrainingMemory
from stages.config.request import Cost

LEVEL = 0.95
"""Of every interval."""


class Estimate(Config):
    """A number with the range that it is known to, over the held-out prompts."""

    value: float
    low: float
    high: float
    items: int = 0

    @property
    def is_above_zero(self) -> bool:
        """With the whole interval."""
        return self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high < 0


class ComparedModel(Config):
    """One combination: what it cost and what it reached, or why it has no result."""

    number: int
    combination: Combination
    failure: str = ""
    gold: Estimate | None = None
    """Mean score by the gold scorer."""
    gold_gain: Estimate | None = None
    """Gold score of its answer minus that of its start's, prompt by prompt."""
    gold_gain_sd: float | None = None
    """The same in standard deviations of the start's gold scores."""
    gold_win_rate: Estimate | None = None
    """Share of prompts where the gold scorer prefers its answer to its start's; ties count one half."""
    judge_win_rate: Estimate | None = None
    """The same by the judge, where the comparison has one."""
    proxy_gain: Estimate | None = None
    """Gain by the reward model, prompt by prompt: what reinforcement learning optimises."""
    proxy_gain_sd: float | None = None
    """The same in standard deviations of the start's reward scores."""
    kl: Estimate | None = None
    """Sampled KL to its start, in nats a response."""
    response_length: float | None = None
    """Tokens of an answer, on average."""
    steps: int | None = None
    """Optimizer steps."""
    memory: TrainingMemory | None = None
    cost: Cost = Cost()
    uri: str = ""
    """Of the model."""

    @property
    def gap(self) -> float | None:
        """How much more the proxy rose than gold, both in standard deviations of the start's scores."""
        if self.proxy_gain_sd is None or self.gold_gain_sd is None:
            return None
        return self.proxy_gain_sd - self.gold_gain_sd

    @property
    def is_hacked(self) -> bool:
        """Whether the proxy rose while gold fell, both for sure."""
        rose = self.proxy_gain is not None and self.proxy_gain.is_above_zero
        return rose and self.gold_gain is not None and self.gold_gain.is_below_zero


class Versus(Config):
    """One method against another, by gold, at the same betas and seeds and on the same prompts."""

    method: str
    against: str
    win_rate: Estimate
    pairs: int = Field(ge=1)
    """Pairs of models that are compared."""


class Comparison(Config):
    """All of it."""

    title: str
    start: str = ""
    """Role of the model that every method started from."""
    level: float = LEVEL
    models: tuple[ComparedModel, ...] = ()
    versus: tuple[Versus, ...] = ()
    reward_accuracy: float | None = None
    """Of the reward model, on held-out pairs."""
    gold_agreement: Estimate | None = None
    """How often the gold scorer prefers what people preferred."""
    judge: str = ""
    """Model that judges; empty without one."""
    judge_is_proven: bool = True


@dataclass(frozen=True)
class Spread:
    """A number over the seeds of one setting."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Setting:
    """One method at one beta, over its seeds."""

    method: str
    beta: float
    models: tuple[ComparedModel, ...]

    @property
    def name(self) -> str:
        return f"{self.method}, beta {self.beta:g}"

    @property
    def measured(self) -> tuple[ComparedModel, ...]:
        return tuple(model for model in self.models if not model.failure)

    @property
    def failed(self) -> int:
        return len(self.models) - len(self.measured)

    @property
    def gold_gain(self) -> Spread | None:
        return spread(model.gold_gain.value for model in self.measured if model.gold_gain)


def settings_of(comparison: Comparison) -> list[Setting]:
    """The settings of a comparison, in its order."""
    found: dict[tuple[str, float], list[ComparedModel]] = {}
    for model in comparison.models:
        found.setdefault((model.combination.method, model.combination.beta), []).append(model)
    return [Setting(method, beta, tuple(models)) for (method, beta), models in found.items()]


def best_settings(settings: Sequence[Setting]) -> list[Setting]:
    """Each method at the beta with the highest mean gain by gold; one without any result at its first beta."""
    by_method: dict[str, list[Setting]] = {}
    for setting in settings:
        by_method.setdefault(setting.method, []).append(setting)
    return [max(found, key=_mean_gain) for found in by_method.values()]


def _mean_gain(setting: Setting) -> float:
    return -math.inf if setting.gold_gain is None else setting.gold_gain.mean


def spread(values: Iterable[float]) -> Spread | None:
    """Mean, sample standard deviation and range; None without values."""
    found = list(values)
    if not found:
        return None
    deviation = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), deviation, min(found), max(found), len(found))
