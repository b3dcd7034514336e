"""Instruction data that a model writes, from the form to the configuration, and what is refused there."""

from typing import Any

from stages.config.endpoints import check_endpoint, is_endpoint
from stages.config.errors import ConfigError
from stages.config.forms import PipelineParams
from stages.config.graph import GENERATOR, INSTRUCTIONS, REWARD_MODEL, SYNTHESIS, Stage
from stages.config.made_data import check_made_data
from stages.config.pipeline import SYNTHESIS_SOURCES, PipelineConfig
from stages.config.places import check_source
from stages.config.synthesis import Synthesis


def apply_synthesis(tree: dict[str, Any], params: PipelineParams) -> None:
    """Put what the form says into the settings of the stage."""
    settings = tree[Stage.SYNTHESIZE.value]
    settings["method"] = params.synthesis.value
    if params.synthesis_sources:
        settings["sources"] = params.synthesis_sources
    if is_endpoint(params.generator):
        settings["generator"]["endpoint"] = params.generator


def refuse_closed_synthesis(config: PipelineConfig) -> None:
    """Raise ConfigError where sources or the endpoint lie where none may."""
    made = config.synthesize
    if made.method is Synthesis.OFF:
        return
    if made.generator.endpoint:
        check_endpoint(made.generator.endpoint, field=GENERATOR, with_key=made.generator.has_key)
    for source in made.parsed_sources:
        check_source(source.uri, field=SYNTHESIS_SOURCES)


def refuse_useless_synthesis(config: PipelineConfig) -> None:
    """Rows must come from something, and a stage of the run must learn from them."""
    made = config.synthesize
    if made.method is Synthesis.OFF:
        return
    asked = f"{SYNTHESIS}={made.method.value!r}"
    if not made.sources:
        raise ConfigError(
            f"{asked} starts from rows, and {SYNTHESIS_SOURCES} is empty",
            advice=f"Give {SYNTHESIS_SOURCES}: {made.method.label.split(':')[1].strip()}.",
        )
    if made.scorer.kind == "reward_model" and REWARD_MODEL not in config.given_models:
        raise ConfigError(
            f"synthesize.scorer.kind='reward_model' needs a given {REWARD_MODEL}: that of this run is made later",
            advice=f"Give {REWARD_MODEL}, or choose another scorer.",
        )
    check_made_data(config, Stage.SYNTHESIZE, (INSTRUCTIONS,), chosen=made.method.value)
