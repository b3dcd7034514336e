"""From the form of `compare_alignment` to one configuration for what is shared and one for each combination.

Every combination is resolved as a run of its own would be, so whatever cannot be trained is refused before anything is.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from stages.config.base import Config
from stages.config.closing import Promotion
from stages.config.compare import Combination, CompareParams
from stages.config.errors import ConfigError
from stages.config.forms import GoldScorer
from stages.config.graph import GOLD_MODEL, GRAPH, REWARD_MODEL, Alignment, Stage
from stages.config.nested import dotted, dotted_once
from stages.config.pipeline import PipelineConfig
from stages.config.resolve import resolve

_DECIDED = {
    "alignment": "It follows from methods.",
    "last_stage": "Every method is trained and evaluated.",
    "train_reward": "A reward model is trained in every comparison, or given by reward_model.",
    "promotion": "Nothing is promoted by a comparison.",
    "promote.promotion": "Nothing is promoted by a comparison.",
    "review_made_data": "A comparison asks no person. Make the data in a run of llm_pipeline with a review first: the "
    "comparison finds what was made with the same settings.",
    "dry_run": "Set it in the form of llm_pipeline, for one of the methods.",
}
"""What overrides must not set, and why."""


@dataclass(frozen=True)
class Expanded:
    """A comparison, ready to run."""

    shared: PipelineConfig
    """What is built once: its stages up to the aligning ones."""
    combinations: tuple[Combination, ...]
    configs: tuple[PipelineConfig, ...]
    """One for each combination, in the same order."""


def expand(params: CompareParams) -> Expanded:
    """Resolve every combination; raises ConfigError that names the combination, the field and what to do."""
    overrides = dotted_once(params.overrides, "overrides")
    for path, why in _DECIDED.items():
        if path in overrides:
            raise ConfigError(f"overrides: {path!r} cannot be set in a comparison; got {overrides[path]!r}", advice=why)
    stages = list(dict.fromkeys(map(params.stage_of, params.methods)))
    shared = _resolved(params, Alignment(stages[0].value) if len(stages) == 1 else Alignment.BOTH, overrides)
    if not (Stage.GOLD in shared.selected or GOLD_MODEL in shared.given_models):
        raise ConfigError(
            f"gold_scorer={shared.gold_scorer.value!r}: a comparison needs a scorer that no method is trained with",
            advice="Leave gold_scorer out of the overrides, which trains one, or give gold_model.",
        )
    combinations, configs = [], []
    for method, beta, seed in itertools.product(params.methods, params.betas, params.seeds):
        stage = params.stage_of(method)
        config = _config_of(params, method, beta, seed, overrides)
        named = {"method": method, "stage": stage, "beta": beta, "seed": seed}
        combinations.append(Combination(**named, **_turned(config.stage_config(stage), shared.stage_config(stage))))
        configs.append(config)
    return Expanded(shared, tuple(combinations), tuple(configs))


def strength_path(stage: Stage) -> str:
    """The setting of a stage that a beta fills; raises ConfigError for a stage without one."""
    if not (path := GRAPH[stage].strength):
        raise ConfigError(
            f"{stage.value} has no setting that keeps its model to its start, so it has no beta",
            advice="Compare other methods.",
        )
    return f"{stage.value}.{path}"


def _config_of(params: CompareParams, method: str, beta: float, seed: int, overrides: dict[str, Any]) -> PipelineConfig:
    stage = params.stage_of(method)
    settings, filled = params.settings_of(method), {strength_path(stage): beta, f"{stage.value}.seed": seed}
    for path in filled:
        if path in {*settings, *overrides}:
            raise ConfigError(
                f"{method}: {path!r} is set by {'variants' if path in settings else 'overrides'}, and the comparison "
                "sets it too",
                advice="Leave it out: betas and seeds say which values it gets.",
            )
    if both := sorted(settings.keys() & overrides.keys()):
        raise ConfigError(
            f"{both[0]!r} stands in overrides and in variants of {method!r}; which one counts?",
            advice="Set it in one of them.",
        )
    try:
        return _resolved(params, Alignment(stage.value), {**overrides, **settings, **filled})
    except ConfigError as error:
        raise ConfigError(f"{method}, beta {beta:g}, seed {seed}: {error.message}", advice=error.advice) from None


def _resolved(params: CompareParams, alignment: Alignment, overrides: dict[str, Any]) -> PipelineConfig:
    given = {name for name in (GOLD_MODEL, REWARD_MODEL) if overrides.get(name) or getattr(params, name, "")}
    gold = {} if GOLD_MODEL in given or "gold_scorer" in overrides else {"gold_scorer": GoldScorer.TRAIN}
    return resolve(
        {
            "run_name": params.run_name,
            "recipe": params.recipe,
            "seed": params.seed,
            "gold_model": params.gold_model,
            "judge": params.judge,
            "alignment": alignment,
            # The proxy that reward hacking is read from, also where no method of the comparison learns from it.
            "train_reward": REWARD_MODEL not in given,
            "last_stage": Stage.EVALUATE,
            "promotion": Promotion.NEVER,
            "overrides": overrides,
            **gold,
        }
    )


def _turned(config: Config, usual: Config) -> dict[str, Any]:
    """How much there is to turn: the settings of a training, and those that are not as in all trainings of its
    stage."""
    ours, theirs = ({path: value for path, value in dotted(one).items() if path != "seed"} for one in (config, usual))
    changed = [f"{path}={value}" for path, value in ours.items() if path not in theirs or theirs[path] != value]
    return {"settings": len(ours), "changed": tuple(changed)}
