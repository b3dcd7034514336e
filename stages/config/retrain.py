"""The few fields of `retrain`; everything else comes from the run that made the champion."""

from typing import Any

from pydantic import Field

from stages.config.base import Config


class RetrainParams(Config):
    """What one run of `retrain` is asked to do."""

    run_name: str = Field(default="athanor", title="Run name", min_length=1)
    """Whose champion is retrained: `<name>-aligned@champion`. The candidate gets the same name."""
    documents: str = Field(default="", title="Documents")
    """Prefix of raw text, `file://` or `s3://`. Empty: what `ATHANOR_RETRAIN_WATCH` says."""
    preferences: list[str] = Field(default_factory=list, title="Preferences")
    """New preference data, besides what the asset `llm/preferences` announced."""
    max_epochs: float = Field(default=4.0, title="Epochs", gt=0)
    """Times that each new token is seen at most in continued pretraining."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the settings of the champion's run, by dotted path."""
    force: bool = Field(default=False, title="Force")
    """Retrain even if the listing is that of the last retraining."""
