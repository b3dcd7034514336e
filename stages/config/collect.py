"""Preferences from people: the form of `collect_preferences`, and the settings of its two stages."""

import re

from pydantic import Field, field_validator

from stages.config.base import Config


class CollectParams(Config):
    """What one run of `collect_preferences` is asked to do."""

    run_name: str = Field(default="athanor", title="Run name", min_length=1, max_length=64)
    """Whose candidate is rated when no model is named: `<run name>-aligned`, alias `candidate`."""
    model: str = Field(default="", title="Model", examples=["models:/athanor-aligned@candidate"])
    """Model whose responses are rated: `models:/name@alias`, `models:/name/version` or the URI of an artifact. Empty:
    the candidate of the run name."""
    prompts: list[str] = Field(default_factory=list, title="Prompts", examples=["What does `sorted` do?"])
    """One prompt a line. Empty: held-out prompts of the data that the model was trained with."""
    num_prompts: int = Field(default=20, title="Number of prompts", ge=1, le=1000)
    """Prompts to put before people; with two responses each, also the number of pairs at most."""
    num_responses: int = Field(default=2, title="Responses per prompt", ge=2, le=4)
    """Two are compared; three or four are ranked from best to worst, and every ordered pair of a ranking counts."""
    temperature: float = Field(default=1.0, title="Temperature", gt=0)
    """Of the sampling; low values give responses that hardly differ."""
    max_response_length: int = Field(default=48, title="Longest response", ge=1)
    """Tokens of a response at most."""
    answer_hours: float = Field(default=168.0, title="Hours to answer", gt=0)
    """A question that nobody has answered by then counts as unanswered; the others are published."""
    seed: int = Field(default=0, title="Seed", ge=0, le=2**31 - 1)
    """Sampling and the order in which responses are shown follow from it."""

    @field_validator("run_name")
    @classmethod
    def _run_name_is_safe(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError(
                f"run_name={value!r} may hold letters, digits, '.', '_' and '-' only and starts with a letter or digit"
            )
        return value


class RespondConfig(Config):
    """Sampled responses to prompts."""

    prompts: tuple[str, ...] = ()
    """Prompts to answer; empty = held-out prompts of the `tokens` artifact."""
    num_prompts: int = Field(default=20, ge=1)
    """Prompts at most, spread evenly over those there are."""
    num_responses: int = Field(default=2, ge=2, le=4)
    """Responses to each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_response_length: int = Field(default=48, ge=1)
    """Tokens of a response at most."""
    seed: int = Field(default=0, ge=0)
    """Sampling follows from it."""


class RateConfig(Config):
    """What makes one set of preferences another: what people answered."""

    answers_digest: str
    """Hash over all answers, those that became no pair included (sha256, hex)."""
