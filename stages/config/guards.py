"""Guards of reinforcement learning: signs of a reward that is gamed, each with a limit to warn at and one to stop at.

All of it decides results and enters fingerprints: a field that is added is marked `AddedLater` (`stages.config.base`).
"""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from stages.config.base import Config

PREFIX = "ppo/guard/"
"""How the metrics of guards begin: `<prefix><name>` is what one measured, `<prefix><name>_level` what came of it."""
GOOD_STEP = f"{PREFIX}good_step"
"""Metric: the step whose weights sampled the last rollout within all limits to stop at."""


class GuardConfig(Config):
    """Limits of one guard. Beyond one of them, `patience` times in a row, the guard warns or stops the training."""

    warn: float = Field(default=0.0, ge=0)
    """Limit to warn at; 0 = never."""
    stop: float = Field(default=0.0, ge=0)
    """Limit to end the training at, with the best weights from before; 0 = never. Needs `eval_every`, because
    evaluations are what it goes back to."""
    patience: int = Field(default=2, ge=1)
    """Times in a row beyond a limit until it counts: rollouts, for `gold` evaluations."""

    what: ClassVar[str] = ""
    """What is measured, with its unit, for messages and the report."""
    looks_at: ClassVar[str] = "rollouts"
    is_floor: ClassVar[bool] = False
    """Whether a limit is broken from above."""

    @property
    def on(self) -> bool:
        return bool(self.warn or self.stop)

    def breaks(self, value: float, limit: float) -> bool:
        """Whether a value is beyond a limit, which 0 is not; what is no number is."""
        return bool(limit) and not (value >= limit if self.is_floor else value <= limit)

    @model_validator(mode="after")
    def _warns_first(self) -> Self:
        if self.warn and self.stop and self.breaks(self.warn, self.stop):
            where = "below" if self.is_floor else "above"
            raise ValueError(
                f"stop={self.stop:g} would end the training before warn={self.warn:g} warns; use a stop {where} "
                f"{self.warn:g}, or warn=0"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if not self.on and value != field.default:
                raise ValueError(
                    f"{name}={value} needs a limit, got warn=0 and stop=0; set one of them, or leave {name} at "
                    f"{field.default}"
                )
        return self


class _Share(GuardConfig):
    """A guard of a share, from 0 to 1."""

    @model_validator(mode="after")
    def _can_be_exceeded(self) -> Self:
        for name in ("warn", "stop"):
            if (value := getattr(self, name)) >= 1:
                raise ValueError(f"{name}={value:g} is a share that nothing exceeds; use less than 1, or 0 for never")
        return self


class GoldGuard(GuardConfig):
    """The gold score falls: how far it is below its best, in spreads of the first evaluation's gold scores. Needs a
    gold scorer with the policy's tokenizer."""

    what: ClassVar[str] = "gold score below its best (spreads of the first evaluation)"
    looks_at: ClassVar[str] = "evaluations"


class KLGuard(GuardConfig):
    """Distance to the reference, in nats a response: a budget."""

    what: ClassVar[str] = "KL to the reference (nats a response)"


class LengthGuard(GuardConfig):
    """Mean response length as a factor of the first rollout's: 2 is twice as long or half as long."""

    what: ClassVar[str] = "response length against the first rollout (factor, longer or shorter)"

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        for name in ("warn", "stop"):
            if 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(
                    f"{name}={value:g} is no factor that a change could stay below; use more than 1, such as 2 for "
                    "twice or half the length, or 0 for never"
                )
        return self


class RepetitionGuard(_Share):
    """Share of a response's n-grams that it has said before, averaged over the rollout."""

    ngram: int = Field(default=4, ge=1)
    """Tokens of an n-gram."""

    what: ClassVar[str] = "repeated n-grams (share)"


class EntropyGuard(GuardConfig):
    """Entropy of the policy where it samples, in nats a token: a floor."""

    what: ClassVar[str] = "entropy (nats a token)"
    is_floor: ClassVar[bool] = True


class UnfinishedGuard(_Share):
    """Share of responses that are cut off at `max_response_length`."""

    what: ClassVar[str] = "unfinished responses (share)"


class GroupsGuard(_Share):
    """Share of prompts whose responses all have the same score, so that a group teaches nothing. Needs
    `estimator.responses_per_prompt` of at least 2."""

    what: ClassVar[str] = "groups without variance of scores (share)"


class GuardsConfig(Config):
    """What is watched while a policy is optimised; all are off by default."""

    gold: GoldGuard = GoldGuard()
    """Fall of the gold score."""
    kl: KLGuard = KLGuard()
    """Budget of divergence from the reference."""
    length: LengthGuard = LengthGuard()
    """Drift of the length of responses."""
    repetition: RepetitionGuard = RepetitionGuard()
    """Repetition within responses."""
    entropy: EntropyGuard = EntropyGuard()
    """Floor of the entropy."""
    unfinished: UnfinishedGuard = UnfinishedGuard()
    """Responses without an end."""
    groups: GroupsGuard = GroupsGuard()
    """Groups whose scores do not differ."""

    @property
    def configured(self) -> dict[str, GuardConfig]:
        """Those with a limit, by name."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: guard for name, guard in found.items() if guard.on}

    @property
    def stopping(self) -> str:
        """Path and value of the first limit to stop at; empty when none of them stops."""
        return next((f"guards.{name}.stop={one.stop:g}" for name, one in self.configured.items() if one.stop), "")
