"""Data by a constitution, from the form to the configuration: where prompts and principles come from."""

from typing import Any

from stages.config.endpoints import check_endpoint, is_endpoint
from stages.config.errors import ConfigError
from stages.config.forms import PipelineParams
from stages.config.graph import AI_FEEDBACK, CRITIC, Stage
from stages.config.made_data import check_made_data
from stages.config.pipeline import CONSTITUTION_PROMPTS, PipelineConfig
from stages.config.places import check_source
from stages.config.principles import PRINCIPLES, SHIPPED


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
        check_endpoint(made.critic.endpoint, field=CRITIC, with_key=made.critic.has_key)
    if made.principles != SHIPPED:
        check_source(made.principles, field=PRINCIPLES)
    for source in made.prompt_sources:
        check_source(source.uri, field=CONSTITUTION_PROMPTS)


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
    check_made_data(config, Stage.CONSTITUTION, made.makes.fields, chosen=made.makes.value)
