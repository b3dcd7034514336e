"""The fields of `evaluate_model`."""

from typing import Any

from pydantic import Field

from stages.config.base import Config


class EvaluationParams(Config):
    """What is measured, on what, by which judge."""

    model: str = Field(
        default="models:/athanor-aligned@champion", title="Model", min_length=1, examples=["models:/athanor-sft/3"]
    )
    """Model to evaluate: `models:/name@alias`, an artifact URI, or a Hugging Face directory."""
    data: str = Field(default="", title="Data")
    """Held-out data: a `tokens` artifact, or a model or anything else that was made from one. Empty: that of the
    model's own run."""
    reward: str = Field(default="", title="Reward model", examples=["models:/athanor-reward@candidate"])
    """Reward model that scores the answers. Empty: the one that the model was trained with, if any."""
    recipe: str = Field(default="demo", title="Recipe")
    """Recipe whose evaluation settings and resources count."""
    overrides: dict[str, Any] = Field(default_factory=dict, title="Overrides")
    """Changes to the recipe by dotted path, as JSON: `{"evaluate.max_prompts": 512}`."""
