"""How reinforcement learning reads its reward model, as its settings and the model's own statistics say."""

from pathlib import Path
from typing import Any

from stages.config.errors import ConfigError
from stages.config.rollouts import PPOConfig
from stages.models.folder import read_settings
from stages.train.rollout.scoring import Reading, ScoreScale
from stages.train.scores import FILE


def reading_of(config: PPOConfig, folder: Path, *, size: int) -> Reading:
    """Return how the `size` members of a reward model are read; raises ConfigError for an aggregation of only one."""
    if size == 1:
        if config.aggregation != "mean":
            raise ConfigError(
                f"ppo.aggregation={config.aggregation} needs an ensemble of reward models, and this one has one member",
                advice="Train one with reward.ensemble_size, such as 4, or use ppo.aggregation=mean.",
            )
        return Reading()
    members = _statistics(folder).get("members", [])
    means = [_of(member, folder)["mean"] for member in members] if len(members) == size else []
    # Each is brought to the mean of all, so that the mean of the members stays what it is.
    offsets = tuple(mean - sum(means) / size for mean in means)
    return Reading(config.aggregation, config.spread_coefficient, offsets)


def scale_of(config: PPOConfig, folder: Path) -> ScoreScale | None:
    """Return the scale that the model's own statistics give; None where the first rollout gives it. Raises ConfigError
    for a model without statistics, or whose scores are all alike."""
    if config.score_scale == "rollout":
        return None
    found = _of(_statistics(folder), folder)
    scale = ScoreScale(float(found["mean"]), float(found["std"]))
    if not scale.std > 0:
        raise ConfigError(
            f"ppo.score_scale=model, and the scores of {folder} have no spread", advice="Use ppo.score_scale=rollout."
        )
    return scale


def _statistics(folder: Path) -> dict[str, Any]:
    return read_settings(folder / FILE) if (folder / FILE).is_file() else {}


def _of(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Statistics of held-out answers, or of training ones where none are held out."""
    found = told.get("heldout") or told.get("train")
    if not isinstance(found, dict) or not {"mean", "std"} <= found.keys():
        raise ConfigError(
            f"{folder} has no statistics of its scores ({FILE}): it was made by an earlier version, or elsewhere",
            advice="Train the reward model again, or use ppo.score_scale=rollout.",
        )
    return found
