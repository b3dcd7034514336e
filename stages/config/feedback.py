"""Data by a constitution, from the form to the configuration: where prompts come from, and who reads what is made."""

from typing import Any

from stages.config.endpoints import check_endpoint, is_endpoint
from stages.config.errors import ConfigError
from stages.config.forms import PipelineParams
from stages.config.graph import AI_FEEDBACK, CRITIC, GRAPH, INSTRUCTIONS, PREFERENCES, Stage, makers_of
from stages.config.pipeline import CONSTITUTION_PROMPTS, PipelineConfig
from stages.config.places import check_source
from stages.config.principles import PRINCIPLES, SHIPPED
from stages.config.selection import needed_data


def apply_feedback(tree: dict[str, Any], params: PipelineParams) -> None:
    """Put what the form says into the settings of the stage."""
    settings = tree[Stage.CONSTITUTION.value]
    settings["makes"] = params.ai_feedback.value
    if params.constitution_prompts:
        settings["prompts"] = params.constitution_prompts
    if params.principles:
        settings["principles"] = params.principles
    if is_endpoint(params.critic):
        settings["critic"]["endpoint"] = params.critic


def refuse_closed_feedback(config: PipelineConfig) -> None:
    """Raise ConfigError where prompts, principles or the endpoint of the critic lie where none may."""
    made = config.constitution
    if not made.makes.fields:
        return
    if made.critic.endpoint:
        check_endpoint(made.critic.endpoint, field=CRITIC, with_key=bool(made.critic.api_key_env))
    if made.principles != SHIPPED:
        check_source(made.principles, field=PRINCIPLES)
    for source in made.prompt_sources:
        check_source(source.uri, field=CONSTITUTION_PROMPTS)


def add_made_data(tree: dict[str, Any], params: PipelineParams) -> None:
    """What a stage of the run makes is curated with the rest, without a person having to name it; one who does, to give
    it a weight, is right."""
    for field in (INSTRUCTIONS, PREFERENCES):
        lines = tree[Stage.CURATE.value][field]
        if not isinstance(lines, list):
            continue  # what is no list of sources is refused where sources are read
        named = {line.partition("#")[0] for line in lines if isinstance(line, str)}
        for name, stage in makers_of(field).items():
            makes = stage in params.selected_until(Stage.REPORT) and field in params.makes(stage)
            if makes and name not in named:
                lines.append(name)
            elif name in named and not makes:
                asked_by = GRAPH[stage].asked_by
                raise ConfigError(
                    f"{field}: {name!r} is what the stage {name} makes, and {asked_by}="
                    f"{getattr(params, asked_by).value!r} makes no {field}",
                    advice=f"Choose what {asked_by} makes, or leave {name!r} out of {field}.",
                )


def refuse_useless_feedback(config: PipelineConfig) -> None:
    """Prompts must come from somewhere, and what is made of them must be what a stage of the run learns from."""
    made = config.constitution
    if not made.makes.fields:
        return
    if not made.prompts:
        raise ConfigError(
            f"{AI_FEEDBACK}={made.makes.value!r} needs prompts, and {CONSTITUTION_PROMPTS} is empty",
            advice=f"Give {CONSTITUTION_PROMPTS}, or set {AI_FEEDBACK}=off.",
        )
    # A run that ends with its data makes what a run to the end would go on with.
    last = GRAPH[config.last_stage]
    stages = config.selected if last.trains or last.closing else config.selected_until(Stage.REPORT)
    needed = needed_data(stages, has_base_model=bool(config.base_model))
    for field in made.makes.fields:
        if field not in needed:
            raise ConfigError(
                f"{AI_FEEDBACK}={made.makes.value!r} makes {field}, and no stage of this run reads {field}",
                advice=f"Choose what {AI_FEEDBACK} makes by the stages of the run, or set {AI_FEEDBACK}=off.",
            )
    if (workers := config.execution.constitution.num_workers) > 1:
        raise ConfigError(
            f"execution.constitution.num_workers={workers}: this stage asks its models in one process",
            advice="Use 1 for a worker of its own, such as one with a GPU, or 0.",
        )
