"""Airflow's trigger forms, generated from `stages.config.forms`: titles, help, choices and defaults are written there.

Only the layout of the long form, sections and their fields, is written here."""

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from airflow.sdk.definitions.param import Param, ParamsDict
from pydantic.fields import FieldInfo

from stages.config.base import Choice, Config
from stages.config.estimate import model_size
from stages.config.execution import ExecutionConfig
from stages.config.forms import PipelineParams
from stages.config.graph import Stage, trained_stages
from stages.config.help import field_help
from stages.config.markdown import plain
from stages.config.pipeline import PipelineConfig
from stages.config.recipes import RECIPES
from stages.config.selection import first_stages
from stages.config.text import compact
from stages.config.train import TrainConfig

# The sections of `llm_pipeline`'s form and their fields, in the order in which they are shown.
_SECTIONS = {
    "Run": ("recipe", "run_name"),
    "Data": ("documents", "instructions", "preferences", "prompts", "benchmarks"),
    "Model and alignment": ("base_model", "continue_pretraining", "previous_data", "alignment"),
    "AI feedback": ("ai_feedback", "constitution_prompts", "principles", "critic"),
    "Synthesis": ("synthesis", "synthesis_sources", "generator"),
    "Reward model": ("reward_model", "reward_base", "train_reward"),
    "Judges": ("gold_scorer", "gold_model", "judge"),
    "Course of the run": ("first_stage", "last_stage", "seed", "review_made_data", "promotion", "dry_run"),
    "Gates": ("override_gates", "override_reason"),
    "Changes to the recipe": ("overrides",),
}

_EMPTY_ALLOWED = ("string", "array", "object")


class _Schema(dict[str, Any]):
    """The schema of a param. Airflow copies all params deeply for every task of a DAG, a quarter of the time that
    reading the DAG took; nothing changes a schema once the form is made, so its copies share it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Schema":
        return self


def trigger_form() -> ParamsDict:
    """Return the params of `llm_pipeline`."""
    form = _form(PipelineParams, _SECTIONS)
    recipe = form.get_param("recipe")
    # Proposals and no enum: for an unknown recipe, `resolve` suggests the one that was probably meant.
    recipe.schema["examples"] = list(RECIPES)
    recipe.schema["description_md"] += f"\n\n{recipe_table()}"
    form.get_param("first_stage").schema["examples"] = [stage.value for stage in first_stages()]
    return form


def form_of(model: type[Config], *, section: str) -> ParamsDict:
    """Return the params of a DAG whose fields stand in one section, in the order of their class."""
    return _form(model, {section: tuple(model.model_fields)})


def _form(model: type[Config], sections: Mapping[str, Sequence[str]]) -> ParamsDict:
    schema = model.model_json_schema()
    definitions, texts = schema.get("$defs", {}), field_help(model)
    form = {
        name: _param(
            model.model_fields[name],
            _resolved(schema["properties"][name], definitions),
            section=section,
            text=texts[name],
        )
        for section, names in sections.items()
        for name in names
    }
    if missing := model.model_fields.keys() - form.keys():
        raise ValueError(f"{model.__name__}: no section has the fields {', '.join(sorted(missing))}; add them to one")
    return ParamsDict(form)


def form_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was filled in: the form sends empty fields as null, which means the default."""
    return {name: value for name, value in params.items() if value is not None}


def _param(field: FieldInfo, schema: dict[str, Any], *, section: str, text: str) -> Param:
    default = field.get_default(call_default_factory=True, validated_data={})
    kind = schema["type"]
    settings = {key: value for key, value in schema.items() if key not in ("default", "description", "examples")}
    settings |= {"title": field.title, "section": section, "description_md": _help(field, text)}
    if kind in _EMPTY_ALLOWED and not default:
        # Airflow's form requires a value unless null is allowed.
        settings["type"] = [kind, "null"]
    if isinstance(field.annotation, type) and issubclass(field.annotation, Choice):
        settings["values_display"] = {value: field.annotation(value).label for value in schema["enum"]}
    if field.examples and kind == "string":
        settings["examples"] = list(field.examples)
    return Param(default.value if isinstance(default, Enum) else default, schema=_Schema(settings))


def recipe_table() -> str:
    """What an untouched field means: the main settings of every recipe as a Markdown table."""
    configs = {name: recipe() for name, recipe in RECIPES.items()}
    columns = [_main_settings(config) for config in configs.values()]
    lines = ["| |" + "".join(f" {plain(name)} |" for name in configs), "|---|" + "---|" * len(configs)]
    lines += [f"| {name} |" + "".join(f" {column[name]} |" for column in columns) for name in columns[0]]
    return "\n".join(lines)


def _main_settings(config: PipelineConfig) -> dict[str, str]:
    model, curate = config.pretrain.model, config.curate
    limit = f", at most {compact(curate.max_bytes)}B" if curate.max_bytes else ""
    size = model_size(config.pretrain, config.tokenize.vocab_size)
    made = f"{size} parameters: {model.num_layers} layers of {model.hidden_size}"
    vocabulary = "the model's vocabulary" if config.base_model else f"{config.tokenize.vocab_size} in the vocabulary"
    return {
        "model": plain(config.base_model) or made,
        "documents": f"{', '.join(curate.documents)}{limit}, filtered as {curate.profile}",
        "pairs": f"{curate.max_instructions} instructions, {curate.max_preferences} preferences at most",
        "tokens": f"{vocabulary}, {config.tokenize.sequence_length} of context",
        **{spec.stage.value: _summary(config, spec.stage) for spec in trained_stages()},
        "workers": _workers(config.execution.pretrain),
    }


def _summary(config: PipelineConfig, stage: Stage) -> str:
    train = config.stage_config(stage)
    assert isinstance(train, TrainConfig)
    return train.summary()


def _workers(execution: ExecutionConfig) -> str:
    device = "GPU" if execution.gpus_per_worker else "CPU core"
    number = execution.gpus_per_worker or execution.cpus_per_worker
    each = f"{number:g} {device}{'s' if number > 1 else ''}"
    workers = execution.train_workers
    return f"{workers} of {each}, {execution.engine}" if workers else f"the job's own, {each}"


def _help(field: FieldInfo, text: str) -> str:
    """The field's docstring, with its examples if it is a list: as `examples` in the schema, they would be an enum.

    Bold instead of code: the form draws code in boxes that are taller than a line and hide the neighbouring lines.
    """
    if field.examples and field.annotation is not str:
        text += f" Examples: {', '.join(f'`{example}`' for example in field.examples)}."
    return re.sub("`([^`]+)`", lambda code: f"**{plain(code[1])}**", text)


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a `$ref`, which Airflow's form does not follow, by the schema that it refers to."""
    reference = schema.get("$ref")
    return dict(definitions[reference.rsplit("/", 1)[1]] if reference else schema)
