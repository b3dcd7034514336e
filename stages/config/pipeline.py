"""The complete, frozen configuration of one run, and the request that each stage gets out of it."""

from typing import Any

from pydantic import Field

from stages.config.base import Config
from stages.config.closing import EvaluateConfig, PromoteConfig, ReportConfig
from stages.config.collect import RateConfig, RespondConfig
from stages.config.curate import CurateConfig
from stages.config.execution import ExecutionConfig
from stages.config.graph import Alignment, Stage
from stages.config.tokens import TokenizeConfig
from stages.config.train import DPOConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig

CONFIG_CLASSES: dict[Stage, type[Config]] = {
    Stage.CURATE: CurateConfig,
    Stage.TOKENIZE: TokenizeConfig,
    Stage.PRETRAIN: PretrainConfig,
    Stage.SFT: SFTConfig,
    Stage.REWARD: RewardConfig,
    Stage.PPO: PPOConfig,
    Stage.DPO: DPOConfig,
    Stage.EVALUATE: EvaluateConfig,
    Stage.PROMOTE: PromoteConfig,
    Stage.REPORT: ReportConfig,
    Stage.RESPOND: RespondConfig,
    Stage.RATE: RateConfig,
}


class Executions(Config):
    """How each stage runs."""

    curate: ExecutionConfig = ExecutionConfig()
    tokenize: ExecutionConfig = ExecutionConfig()
    pretrain: ExecutionConfig = ExecutionConfig()
    sft: ExecutionConfig = ExecutionConfig()
    reward: ExecutionConfig = ExecutionConfig()
    ppo: ExecutionConfig = ExecutionConfig()
    dpo: ExecutionConfig = ExecutionConfig()
    evaluate: ExecutionConfig = ExecutionConfig()
    promote: ExecutionConfig = ExecutionConfig()
    report: ExecutionConfig = ExecutionConfig()


class PipelineConfig(Config):
    """Everything that decides a run."""

    recipe: str
    """Recipe that it started from."""
    run_name: str
    """What people call the run."""
    alignment: Alignment = Alignment.BOTH
    """How the SFT model is aligned."""
    last_stage: Stage = Stage.REPORT
    """Later stages are skipped."""
    base_model: str = ""
    """Model to start from; empty = pretrain from scratch."""
    dry_run: bool = False
    """End after the plan; no stage runs."""
    experiment: str = Field(default="athanor", min_length=1)
    """MLflow experiment."""
    curate: CurateConfig
    tokenize: TokenizeConfig
    pretrain: PretrainConfig
    sft: SFTConfig
    reward: RewardConfig
    ppo: PPOConfig
    dpo: DPOConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    report: ReportConfig = ReportConfig()
    execution: Executions = Executions()
    """Resources and layout by stage; never part of a fingerprint."""

    def stage_config(self, stage: Stage) -> Config:
        """Return the part that belongs to `stage`."""
        return getattr(self, stage.value)

    def stage_execution(self, stage: Stage) -> ExecutionConfig:
        return getattr(self.execution, stage.value)

    def stage_sources(self, stage: Stage) -> tuple[str, ...]:
        """Return the outside data that a stage reads; its identity is established by the job, where the data is."""
        match stage:
            case Stage.CURATE:
                return self.curate.outside_sources
            case Stage.TOKENIZE | Stage.SFT | Stage.EVALUATE if self.base_model:
                return (self.base_model,)
            case _:
                return ()


def stage_config_from_json(stage: Stage, data: dict[str, Any]) -> Config:
    """Validate a stage's config again on the other side of the wire."""
    return CONFIG_CLASSES[stage].model_validate(data)
