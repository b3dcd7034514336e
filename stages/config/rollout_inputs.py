"""What reinforcement learning needs of its run: a setting that reads what the run does not have is refused."""

from stages.config.errors import ConfigError
from stages.config.graph import GOLD_MODEL, Stage
from stages.config.pipeline import PipelineConfig


def refuse_what_rollouts_lack(config: PipelineConfig) -> None:
    """Raise ConfigError for settings of PPO whose scorer or data the run does not have."""
    if Stage.PPO not in config.selected:
        return
    watching, mixed = config.ppo.needs_gold, config.ppo.pretraining_coefficient
    has_gold = GOLD_MODEL in config.given_roles(Stage.PPO) or Stage.GOLD in config.stage_inputs(Stage.PPO).values()
    if watching and not has_gold:
        off = watching.split("=")[0]
        raise ConfigError(
            f"ppo.{watching} needs a gold scorer, and this run has none",
            advice=f"Use gold_scorer=train, give a gold_model with the policy's tokenizer, or set ppo.{off}=0.",
        )
    if mixed and not (config.curate.documents or config.previous_data):
        raise ConfigError(
            f"ppo.pretraining_coefficient={mixed} needs documents, and this run reads none",
            advice="Give documents, or set ppo.pretraining_coefficient=0.",
        )
