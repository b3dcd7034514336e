"""Data that stages of the run make: curated without being named, and refused where nothing would read it."""

from collections.abc import Iterable
from typing import Any

from stages.config.errors import ConfigError
from stages.config.forms import PipelineParams
from stages.config.graph import GRAPH, INSTRUCTIONS, PREFERENCES, Stage, makers_of
from stages.config.pipeline import PipelineConfig
from stages.config.selection import needed_data


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


def check_made_data(config: PipelineConfig, stage: Stage, fields: Iterable[str], *, chosen: str) -> None:
    """Raise ConfigError where no stage of the run reads what `stage` makes, or it has more workers than it can use;
    `chosen` is the choice of the field that asks for the stage."""
    asked_by, needed = GRAPH[stage].asked_by, needed_data(config.read_for, has_base_model=bool(config.base_model))
    for field in fields:
        if field not in needed:
            raise ConfigError(
                f"{asked_by}={chosen!r} makes {field}, and no stage of this run reads {field}",
                advice=f"Choose what {asked_by} makes by the stages of the run, or set {asked_by}=off.",
            )
    if (workers := config.stage_execution(stage).num_workers) > 1:
        raise ConfigError(
            f"execution.{stage.value}.num_workers={workers}: this stage asks its models in one process",
            advice="Use 1 for a worker of its own, such as one with a GPU, or 0.",
        )
