"""Settings of the two stages of `collect_preferences`: `respond` and `rate`."""

from pydantic import Field

from stages.config.base import Config


class RespondConfig(Config):
    """Sampled responses to prompts."""

    prompts: tuple[str, ...] = ()
    """Prompts to answer; empty = held-out prompts of the `tokens` artifact."""
    num_prompts: int = Field(default=20, ge=1)
    """Maximum number of prompts, spread evenly over those available."""
    num_responses: int = Field(default=2, ge=2, le=4)
    """Responses to each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_response_length: int = Field(default=48, ge=1)
    """Maximum tokens per response."""
    seed: int = Field(default=0, ge=0)
    """Sampling follows from it."""


class RateConfig(Config):
    """What makes one set of preferences another: what people answered."""

    answers_digest: str
    """Hash over all answers, including those that gave no pair (sha256, hex)."""
