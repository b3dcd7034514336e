"""Settings of the closing stages: evaluation, promotion, report."""

from pydantic import Field

from stages.config.base import Config
from stages.config.params import Promotion


class EvaluateConfig(Config):
    """Every model of the run on the same held-out data."""

    max_documents_tokens: int = Field(default=200_000, ge=1)
    """Held-out document tokens that perplexity is measured on."""
    max_instructions: int = Field(default=256, ge=1)
    """Held-out conversations that response loss is measured on."""
    max_preferences: int = Field(default=512, ge=1)
    """Held-out pairs that preference accuracy is measured on."""
    max_prompts: int = Field(default=128, ge=1)
    """Held-out prompts that every model answers for scores and win rates."""
    num_samples: int = Field(default=12, ge=1)
    """Prompts whose answers are shown side by side."""
    max_response_length: int = Field(default=48, ge=1)
    """Tokens of an answer at most."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature for scores and win rates; the samples that are shown are greedy."""
    seed: int = Field(default=0, ge=0)
    """Sampling follows from it."""


class PromoteConfig(Config):
    """Registration in MLflow."""

    run_name: str = Field(default="athanor", min_length=1)
    """Prefix of the registered model names."""
    promotion: Promotion = Promotion.AUTO
    """`auto` moves the alias `champion` when the aligned model wins; `never` registers candidates only."""
    min_win_rate: float = Field(default=0.5, ge=0, le=1)
    """Win rate against SFT that an aligned model needs to become champion."""


class ReportConfig(Config):
    """The page that tells the run's story."""

    title: str = "Athanor"
    """Heading of the page."""
    max_samples: int = Field(default=12, ge=1)
    """Prompts shown side by side."""
