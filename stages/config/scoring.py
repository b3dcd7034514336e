"""What settings of the stages that learn from pairs ask of others: margins and reasons of the sources, and of PPO that
it reads an ensemble."""

from stages.config.curate import DERIVED
from stages.config.errors import ConfigError
from stages.config.graph import PREFERENCES, Stage
from stages.config.pipeline import PipelineConfig
from stages.config.preferences import PairsConfig, RewardConfig
from stages.config.sources import parse_source


def refuse_margins_without_effect(config: PipelineConfig) -> None:
    """Raise ConfigError for margins that count and come from nowhere, and for a source's that count nowhere."""
    with_margin = [line for line in config.curate.preferences if parse_source(line).margin]
    stages = [stage for stage in (Stage.REWARD, Stage.GOLD) if stage in config.selected]
    counting: dict[Stage, float] = {}
    for stage in stages:
        train = config.stage_config(stage)
        assert isinstance(train, RewardConfig)
        if train.margin:
            counting[stage] = train.margin
    # Earlier data brings its own pairs, whose margins only the job sees.
    if counting and not with_margin and not config.previous_data:
        stage, margin = next(iter(counting.items()))
        raise ConfigError(
            f"{stage}.margin={margin:g} needs a source of {PREFERENCES} with margins, got "
            f"{list(config.curate.preferences)}",
            advice=f"Say where a source has them, as in data.jsonl#margin=ratings, or set {stage}.margin=0.",
        )
    if with_margin and stages and not counting:
        raise ConfigError(
            f"{PREFERENCES}: margin= of {with_margin[0]!r} counts nowhere, because {stages[0]}.margin=0",
            advice=f"Set {stages[0]}.margin, such as 1.0, or leave margin= out.",
        )


def refuse_reasons_of_nobody(config: PipelineConfig) -> None:
    """Raise ConfigError for reasons where all pairs are derived, which nobody preferred for a reason."""
    if config.previous_data or any(source.uri != DERIVED for source in config.curate.preference_sources):
        return
    for stage in config.selected:
        train = config.stage_config(stage)
        if isinstance(train, PairsConfig) and train.reasons:
            raise ConfigError(
                f"{stage}.reasons={[area.value for area in train.reasons]} needs a source of {PREFERENCES} with "
                f"reasons, got {list(config.curate.preferences)}, whose pairs have none",
                advice=f"Give pairs whose field `reasons` has these words, or leave {stage}.reasons out.",
            )


def refuse_aggregation_of_one(config: PipelineConfig) -> None:
    """Raise ConfigError for an aggregation of the members of an ensemble where the run trains a single reward model,
    and for settings of a reward model that PPO does not read."""
    if Stage.PPO not in config.selected:
        return
    ppo = config.ppo
    asked = {"aggregation": ppo.aggregation != "mean", "score_scale": ppo.score_scale != "rollout"}
    for name in (name for name, is_asked in asked.items() if is_asked):
        if not config.scored_by_model:
            raise ConfigError(
                f"ppo.{name}={getattr(ppo, name)} is about a reward model, and ppo.scorer={ppo.scorer.kind} reads none",
                advice=f"Leave ppo.{name} out, or use a scorer with a reward model.",
            )
    if asked["aggregation"] and Stage.REWARD in config.selected and config.reward.ensemble_size == 1:
        raise ConfigError(
            f"ppo.aggregation={ppo.aggregation} needs an ensemble, and reward.ensemble_size=1",
            advice="Set reward.ensemble_size, such as 4, or use ppo.aggregation=mean.",
        )
