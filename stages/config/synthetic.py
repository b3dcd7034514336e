"""Instruction data that a model writes, from the form to the configuration, and what is refused there."""

from typing import Any

from stages.config.endpoints import check_endpoint, is_endpoint
from stages.config.errors import ConfigError
from stages.config.forms import PipelineParams
from stages.config.graph import GENERATOR, GRAPH, INSTRUCTIONS, REWARD_MODEL, SYNTHESIS, Stage
from stages.config.pipeline import SYNTHESIS_SOURCES, PipelineConfig
from stages.config.places import check_source
from stages.config.selection import needed_data
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
        check_endpoint(made.generator.endpoint, field=GENERATOR, with_key=bool(made.generator.api_key_env))
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
    # A run that ends with its data makes what a run to the end would go on with.
    last = GRAPH[config.last_stage]
    stages = config.selected if last.trains or last.closing else config.selected_until(Stage.REPORT)
    if INSTRUCTIONS not in needed_data(stages, has_base_model=bool(config.base_model)):
        raise ConfigError(
            f"{asked} makes {INSTRUCTIONS}, and no stage of this run reads {INSTRUCTIONS}",
            advice=f"Choose another course of the run, or set {SYNTHESIS}=off.",
        )
    if (workers := config.execution.synthesize.num_workers) > 1:
        raise ConfigError(
            f"execution.synthesize.num_workers={workers}: this stage asks its model in one process",
            advice="Use 1 for a worker of its own, such as one with a GPU, or 0.",
        )
