"""Guards next to a training: what each measures, when one warns or stops, and which weights a stopped training returns.

They read samples and metrics that are there anyway and draw no random numbers, so a training is the same bit for bit
with guards and without, up to where one stops it. What they decide follows from their state, which is in checkpoints.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from stages.config.guards import GOOD_STEP, PREFIX, GuardConfig
from stages.config.rollouts import PPOConfig
from stages.train.best import BestBy
from stages.train.engine import Engine
from stages.train.rollout.gold import GOLD_SCORE, GOLD_SPREAD
from stages.train.rollout.sampling import Sampled

logger = logging.getLogger(__name__)

STATE = "guards"
"""Name of their numbers in checkpoints; a training without guards has none."""

Level = Literal["warn", "stop"]
_LEVELS: tuple[Level, ...] = ("warn", "stop")
_SAME_SCORE = 1e-6


def repeated_share(response: np.ndarray, *, ngram: int) -> float:
    """Return the share of n-grams that the response has said before, seq-rep-n of Welleck et al. 2019
    (https://arxiv.org/abs/1908.04319); 0 for one that is shorter than an n-gram."""
    ids = response.tolist()
    grams = [tuple(ids[start : start + ngram]) for start in range(len(ids) - ngram + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def drift(length: float, first: float) -> float:
    """Return by which factor a length differs from the first one, longer or shorter: 1 is the same."""
    return max(length / first, first / length)


def sampled_entropy(samples: Sequence[Sampled]) -> float:
    """Return the entropy of the policy in nats a token, estimated from the tokens that it drew: unbiased."""
    return -float(np.mean(np.concatenate([sample.logprobs_R for sample in samples])))


def share_without_variance(samples: Sequence[Sampled]) -> float:
    """Return the share of groups whose responses all have the same score."""
    groups: dict[int, list[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group, []).append(sample.score)
    return float(np.mean([max(scores) - min(scores) <= _SAME_SCORE for scores in groups.values()]))


class Streak:
    """How often in a row one guard was beyond each of its limits."""

    def __init__(self, guard: GuardConfig) -> None:
        self._guard = guard
        self.beyond: dict[Level, int] = dict.fromkeys(_LEVELS, 0)

    def look(self, value: float) -> list[Level]:
        """Count one more value; return the levels whose patience ends with it."""
        ended: list[Level] = []
        for level in _LEVELS:
            broken = self._guard.breaks(value, getattr(self._guard, level))
            self.beyond[level] = self.beyond[level] + 1 if broken else 0
            if self.beyond[level] == self._guard.patience:
                ended.append(level)
        return ended

    @property
    def level(self) -> int:
        """0 within the limits or patient, 1 warns, 2 stops."""
        return max((n for n, level in enumerate(_LEVELS, 1) if self.beyond[level] >= self._guard.patience), default=0)


class GuardWatch:
    """A `Watch`: the guards of a config, each with its streak, and what they have said."""

    def __init__(self, config: PPOConfig) -> None:
        self._config, self._guards = config, config.guards.configured
        self._of_rollouts = [name for name, guard in self._guards.items() if guard.looks_at == "rollouts"]
        self._of_evaluations = [name for name in self._guards if name not in self._of_rollouts]
        self._streaks = {name: Streak(guard) for name, guard in self._guards.items()}
        self._rollouts = self._evaluations = 0
        self._first_length: float | None = None
        self._best_gold: float | None = None
        self._gold_spread = 1.0
        self._good_step = 0
        self._said: dict[str, dict[str, Any]] = {}
        """Events by guard and level; one that comes again is counted."""
        self._stopped = ""

    def after_rollout(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Measure a rollout, whose metrics every step over it logs."""
        step = self._rollouts * self._config.steps_per_rollout
        self._rollouts += 1
        values = {name: self._measured(name, samples, metrics) for name in self._of_rollouts}
        found = self._judged(values, step=step, is_main=engine.is_main)
        if not self._is_beyond:
            self._good_step = step
        return found | {GOOD_STEP: float(self._good_step)}

    def after_evaluation(
        self, engine: Engine, samples: Sequence[Sampled], metrics: Mapping[str, float]
    ) -> dict[str, float]:
        """Compare the gold score with its best so far; the gold scorer has looked before."""
        self._evaluations += 1
        # The evaluation of the step that a guard ended training with tells nothing about where to go.
        if not self._of_evaluations or self._stopped:
            return {}
        gold = metrics[GOLD_SCORE]
        if self._best_gold is None:
            self._best_gold, self._gold_spread = gold, metrics[GOLD_SPREAD] or 1.0
        self._best_gold = max(self._best_gold, gold)
        config = self._config
        step = min(self._evaluations * config.eval_every, config.num_rollouts * config.steps_per_rollout)
        values = dict.fromkeys(self._of_evaluations, (self._best_gold - gold) / self._gold_spread)
        return self._judged(values, step=step, is_main=engine.is_main)

    def _measured(self, name: str, samples: Sequence[Sampled], metrics: Mapping[str, float]) -> float:
        match name:
            case "kl":
                return metrics["ppo/kl"]
            case "length":
                length = metrics["ppo/response_length"]
                self._first_length = self._first_length or length
                return drift(length, self._first_length)
            case "repetition":
                ngram = self._config.guards.repetition.ngram
                return float(np.mean([repeated_share(sample.response, ngram=ngram) for sample in samples]))
            case "entropy":
                return sampled_entropy(samples)
            case "unfinished":
                return 1 - metrics["ppo/finished"]
            case "groups":
                return share_without_variance(samples)
            case _:
                raise AssertionError(name)

    def _judged(self, values: Mapping[str, float], *, step: int, is_main: bool) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, value in values.items():
            for level in self._streaks[name].look(value):
                words = self._say(name, level, value, step=step)
                if is_main:
                    logger.warning("guard %s", words)
            found |= {f"{PREFIX}{name}": value, f"{PREFIX}{name}_level": float(self._streaks[name].level)}
        return found

    def _say(self, name: str, level: Level, value: float, *, step: int) -> str:
        guard = self._guards[name]
        limit = getattr(guard, level)
        path = f"ppo.guards.{name}.{level}"
        side = "below" if guard.is_floor else "above"
        often = f"{guard.patience} {guard.looks_at} in a row" if guard.patience > 1 else f"one of the {guard.looks_at}"
        words = f"{name}: {guard.what} is {value:.4g}, {side} {path}={limit:g} in {often}"
        event = self._said.setdefault(
            f"{name}/{level}",
            {
                "guard": name,
                "level": level,
                "step": step,
                "value": value if math.isfinite(value) else None,
                "limit": limit,
                "times": 0,
                "why": words,
            },
        )
        event["times"] += 1
        event["last_step"] = step
        if level == "stop" and not self._stopped:
            self._stopped = words
        return words

    @property
    def _is_beyond(self) -> bool:
        """Whether a rollout's guard is beyond its limit to stop at, patient or not."""
        return any(self._streaks[name].beyond["stop"] for name in self._of_rollouts)

    @property
    def good_step(self) -> float:
        """The step up to which weights may be trusted: all, unless the newest rollout is beyond a limit."""
        return self._good_step if self._is_beyond else math.inf

    @property
    def ends(self) -> bool:
        return bool(self._stopped)

    def reason(self) -> str:
        return f"guard {self._stopped}"

    @property
    def ledger(self) -> dict[str, Any]:
        return {STATE: {"stopped": self._stopped, "events": list(self._said.values())}}

    def state_dict(self) -> dict[str, Any]:
        return {
            STATE: {
                "rollouts": self._rollouts,
                "evaluations": self._evaluations,
                "first_length": self._first_length,
                "best_gold": self._best_gold,
                "gold_spread": self._gold_spread,
                "good_step": self._good_step,
                "said": {key: dict(event) for key, event in self._said.items()},
                "stopped": self._stopped,
                "beyond": {name: dict(streak.beyond) for name, streak in self._streaks.items()},
            }
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = state[STATE]
        self._rollouts, self._evaluations = mine["rollouts"], mine["evaluations"]
        self._first_length, self._best_gold = mine["first_length"], mine["best_gold"]
        self._gold_spread, self._good_step = mine["gold_spread"], mine["good_step"]
        self._said = {key: dict(event) for key, event in mine["said"].items()}
        self._stopped = mine["stopped"]
        for name, beyond in mine["beyond"].items():
            self._streaks[name].beyond = dict(beyond)


@dataclass(frozen=True)
class BeforeGuards:
    """A `Fallback`: the best evaluated step among those whose weights were within the limits to stop at."""

    guards: GuardWatch
    by: BestBy | None
    """What is the best; None is the last."""
    config: PPOConfig

    @property
    def tripped(self) -> bool:
        return self.guards.ends

    def step(self, history: Sequence[Mapping[str, Any]]) -> int | None:
        return self._best(history, self.guards.good_step)

    def kept(self, history: Sequence[Mapping[str, Any]]) -> set[int]:
        """Return the best step up to each rollout that the next ones may yet turn out to be the last good one."""
        # Of the history alone: the guards may have moved on while a checkpoint is written.
        good, newest = int(history[-1][GOOD_STEP]), history[-1]["step"]
        bounds = [*range(good, newest, self.config.steps_per_rollout), math.inf]
        return {step for bound in bounds if (step := self._best(history, bound)) is not None}

    def _best(self, history: Iterable[Mapping[str, Any]], bound: float) -> int | None:
        rows = [row for row in history if row["step"] <= bound]
        if self.by is not None:
            return self.by.step(rows)
        return max((row["step"] for row in rows if row["step"] % self.config.eval_every == 0), default=None)
