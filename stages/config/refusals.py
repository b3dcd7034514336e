"""What a run that is valid field by field is refused for, before anything starts."""

from stages.config.benchmarks import LM_EVAL
from stages.config.combinations import contradictions
from stages.config.curate import DERIVED, INSTALLED_DOCS
from stages.config.endpoints import check_endpoint
from stages.config.errors import ConfigError
from stages.config.feedback import refuse_closed_feedback, refuse_useless_feedback
from stages.config.forms import PipelineParams
from stages.config.graph import (
    BENCHMARKS,
    DATA_FIELDS,
    GRAPH,
    INSTRUCTIONS,
    PREFERENCES,
    REWARD_BASE,
    Stage,
    pipeline_stages,
    trained_stages,
)
from stages.config.pipeline import PipelineConfig
from stages.config.places import check_source
from stages.config.review import ReviewConfig
from stages.config.rollout_inputs import refuse_what_rollouts_lack
from stages.config.scorers import endpoints_of
from stages.config.scoring import refuse_aggregation_of_one, refuse_margins_without_effect, refuse_reasons_of_nobody
from stages.config.selection import learns_from_scores, needed_data
from stages.config.suites import check_suites
from stages.config.synthetic import refuse_closed_synthesis, refuse_useless_synthesis
from stages.config.train import TrainConfig
from stages.config.unpaired import refuse_unused


def check_end(params: PipelineParams) -> None:
    """Raise ConfigError where the last stage is none of the run's."""
    if params.last_stage not in params.selected:
        allowed = params.selected_until(Stage.REPORT)
        names = ", ".join(stage for stage in pipeline_stages() if stage in allowed)
        start = f"base_model={params.base_model!r}"
        if params.first_stage:
            start += f" and first_stage={params.first_stage.value!r}"
        raise ConfigError(
            f"last_stage={params.last_stage.value!r} is not part of a run with alignment={params.alignment.value!r} "
            f"and {start} ({params.skipped.get(params.last_stage, 'it is a stage of another DAG')}); allowed: {names}",
            advice="Choose another last stage or another alignment.",
        )


def check_run(config: PipelineConfig) -> None:
    """Raise ConfigError where parts of a valid configuration do not go together; whatever needs no look outside."""
    _refuse_closed_places(config)
    _refuse_nothing_to_read(config)
    _refuse_unread_prompts(config)
    _refuse_underivable(config)
    refuse_useless_feedback(config)
    refuse_useless_synthesis(config)
    _refuse_settings_of_no_review(config)
    _refuse_uncuttable(config)
    _refuse_contradictions(config)
    refuse_unused(config)
    check_suites(config)
    refuse_what_rollouts_lack(config)
    refuse_margins_without_effect(config)
    refuse_reasons_of_nobody(config)
    refuse_aggregation_of_one(config)


def _refuse_closed_places(config: PipelineConfig) -> None:
    """Jobs check again: they run where the data is, and their environment may open other folders."""
    for address, field in config.curate.outside_sources.items():
        if address != INSTALLED_DOCS:
            check_source(address, field=field)
    refuse_closed_feedback(config)
    refuse_closed_synthesis(config)
    for address in config.evaluate.outside_benchmarks:
        if not address.startswith(LM_EVAL):
            check_source(address, field=BENCHMARKS)
    if endpoint := config.evaluate.judge.endpoint:
        check_endpoint(endpoint, field="judge", with_key=config.evaluate.judge.has_key, for_judges=True)
    if any(learns_from_scores(GRAPH[stage]) for stage in config.selected):
        for field, asked in endpoints_of(config.ppo.scorer, "ppo.scorer").items():
            check_endpoint(asked.endpoint, field=f"{field}.endpoint", with_key=asked.has_key, for_judges=True)
    for field, address in {**config.given_models, "previous_data": config.previous_data}.items():
        if address and not address.startswith("models:/"):
            check_source(address, field=field)


def _refuse_nothing_to_read(config: PipelineConfig) -> None:
    """What a stage of the run trains on must come from somewhere: from a source, or from the data before."""
    if config.previous_data:
        return
    for name, stage in _needed(config).items():
        if not getattr(config.curate, name):
            raise ConfigError(
                f"{name} is empty, and {stage} has nothing to work on without",
                advice=f"Give {name}, or leave {stage} out of the run (first_stage, last_stage, alignment).",
            )
    if Stage.CURATE in config.selected and not any(getattr(config.curate, name) for name in DATA_FIELDS):
        raise ConfigError(
            f"{', '.join(DATA_FIELDS)} are all empty: there is nothing to measure the model on",
            advice="Give at least one of them; part of it is held out (curate.heldout_fraction).",
        )


def _needed(config: PipelineConfig) -> dict[str, str]:
    return needed_data(config.selected, has_base_model=bool(config.base_model), prompt_fields=config.ppo.prompt_fields)


def _refuse_unread_prompts(config: PipelineConfig) -> None:
    """Prompt sets are there for reinforcement learning alone."""
    if not config.curate.prompts or Stage.CURATE not in config.selected:
        return
    learners = [stage.value for stage in config.selected_until(Stage.REPORT) if learns_from_scores(GRAPH[stage])]
    if not learners or config.ppo.prompts_from == INSTRUCTIONS:
        why = f"ppo.prompts_from={INSTRUCTIONS}" if learners else f"alignment={config.alignment.value} has no ppo"
        raise ConfigError(
            f"prompts={list(config.curate.prompts)} are given and {why}: no stage answers them",
            advice="Leave prompts empty, or use ppo.prompts_from=prompts in a run with ppo.",
        )


def _refuse_underivable(config: PipelineConfig) -> None:
    """Pairs are derived from documentation; other documents need instructions and preferences of their own, or those
    of the data before them."""
    if config.previous_data or INSTALLED_DOCS in config.curate.documents:
        return
    for name in (INSTRUCTIONS, PREFERENCES):
        needed_by = _needed(config).get(name)
        if needed_by and DERIVED in getattr(config.curate, name):
            raise ConfigError(
                f"{name}={DERIVED!r} needs {INSTALLED_DOCS!r} among documents; got {list(config.curate.documents)}",
                advice=f"Give {name} as files, or previous_data, or stop before {needed_by} with last_stage.",
            )


def _refuse_settings_of_no_review(config: PipelineConfig) -> None:
    if config.reviewed:
        return
    for name, field in ReviewConfig.model_fields.items():
        if (value := getattr(config.review, name)) != field.default:
            raise ConfigError(
                f"review.{name}={value!r} has no effect: no person reads made data in this run",
                advice=f"Switch review_made_data on in a run that makes data, or leave review.{name} out.",
            )


def _refuse_uncuttable(config: PipelineConfig) -> None:
    """A model that this run makes has the shape that the configuration says; workers look at given ones."""
    model = config.pretrain.model
    for stage in _selected_to_train(config) if not config.base_model else ():
        if REWARD_BASE in config.given_roles(stage):
            continue
        execution = config.stage_execution(stage)
        for name in ("num_heads", "num_kv_heads", "intermediate_size"):
            if getattr(model, name) % execution.tensor_parallel:
                raise ConfigError(
                    f"execution.{stage}.tensor_parallel={execution.tensor_parallel} does not divide "
                    f"pretrain.model.{name}={getattr(model, name)}",
                    advice="Use a divisor of the model's query heads, key and value heads and feed-forward width.",
                )
        if execution.pipeline_parallel > model.num_layers:
            raise ConfigError(
                f"execution.{stage}.pipeline_parallel={execution.pipeline_parallel} is more than "
                f"pretrain.model.num_layers={model.num_layers}",
                advice=f"Use at most {model.num_layers}.",
            )


def _refuse_contradictions(config: PipelineConfig) -> None:
    experts = 0 if config.base_model else config.pretrain.model.num_experts
    for stage in _selected_to_train(config):
        train = config.stage_config(stage)
        assert isinstance(train, TrainConfig)
        for what, advice in contradictions(stage.value, train, config.stage_execution(stage), experts=experts):
            raise ConfigError(what, advice=advice)


def _selected_to_train(config: PipelineConfig) -> list[Stage]:
    return [spec.stage for spec in trained_stages() if spec.stage in config.selected]
