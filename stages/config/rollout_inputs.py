"""What reinforcement learning needs of its run: a setting that reads what the run does not have is refused."""

from stages.config.errors import ConfigError
from stages.config.graph import GOLD_MODEL, Stage
from stages.config.pipeline import PipelineConfig


def refuse_what_rollouts_lack(config: PipelineConfig) -> None:
    """Raise ConfigError for settings of PPO whose scorer or data the run does not have."""
    if Stage.PPO not in config.selected:
        return
    patience, mixed = config.ppo.gold_patience, config.ppo.pretraining_coefficient
    has_gold = GOLD_MODEL in config.given_roles(Stage.PPO) or Stage.GOLD in config.stage_inputs(Stage.PPO).values()
    if patience and not has_gold:
        raise ConfigError(
            f"ppo.gold_patience={patience} needs a gold scorer, and this run has none",
            advice="Use gold_scorer=train, give a gold_model with the policy's tokenizer, or set ppo.gold_patience=0.",
        )
    if mixed and not (config.curate.documents or config.previous_data):
        raise ConfigError(
            f"ppo.pretraining_coefficient={mixed} needs documents, and this run reads none",
            advice="Give documents, or set ppo.pretraining_coefficient=0.",
        )
