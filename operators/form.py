"""The trigger form, generated from PipelineParams: titles, help, choices and defaults are typed there only."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from airflow.sdk.definitions.param import Param, ParamsDict
from pydantic.fields import FieldInfo

from stages.config.base import Config
from stages.config.evaluation import EvaluationParams
from stages.config.params import PipelineParams
from stages.config.recipes import RECIPES
from stages.config.retrain import RetrainParams

# Sections of the form, in the order of the class's fields; a field that is not named belongs to the one before it.
_SECTION_STARTS = {
    "recipe": "Run",
    "documents": "Data",
    "base_model": "Model and alignment",
    "last_stage": "Course of the run",
    "overrides": "Changes to the recipe",
}

_EMPTY_ALLOWED = ("string", "array", "object")


def trigger_form() -> ParamsDict:
    """Return the params of `llm_pipeline`."""
    form = _form_of(PipelineParams, _SECTION_STARTS)
    # Proposals rather than an enum: `resolve` answers an unknown recipe with the one that was probably meant.
    form["recipe"].schema["examples"] = list(RECIPES)
    return ParamsDict(form)


def retrain_form() -> ParamsDict:
    """Return the params of `retrain`; all have defaults, for nobody fills in the form of a scheduled run."""
    return ParamsDict(_form_of(RetrainParams, {"run_name": "Run"}))


def evaluation_form() -> ParamsDict:
    """Return the params of `evaluate_model`."""
    return ParamsDict(_form_of(EvaluationParams, {"model": "Evaluation"}))


def _form_of(model: type[Config], section_starts: Mapping[str, str]) -> dict[str, Param]:
    schema = model.model_json_schema()
    form: dict[str, Param] = {}
    section = ""
    for name, field in model.model_fields.items():
        section = section_starts.get(name, section)
        form[name] = _param(field, _flat(schema["properties"][name], schema.get("$defs", {})), section=section)
    return form


def form_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """What was filled in: the form's empty fields come as null and mean the default."""
    return {name: value for name, value in params.items() if value is not None}


def _param(field: FieldInfo, schema: dict[str, Any], *, section: str) -> Param:
    default = field.get_default(call_default_factory=True, validated_data={})
    kind = schema["type"]
    settings = {key: value for key, value in schema.items() if key not in ("default", "description", "examples")}
    settings |= {"title": field.title, "section": section, "description_md": _help(field)}
    if kind in _EMPTY_ALLOWED and not default:
        # Airflow's form insists on a value unless null is allowed.
        settings["type"] = [kind, "null"]
    if field.examples and kind == "string":
        settings["examples"] = list(field.examples)
    return Param(default.value if isinstance(default, Enum) else default, **settings)


def _help(field: FieldInfo) -> str:
    """The field's docstring; examples of lists are told here, because the form would allow nothing else."""
    text = field.description or ""
    if field.examples and field.annotation is not str:
        text += f" Examples: {', '.join(f'`{example}`' for example in field.examples)}."
    return text


def _flat(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Airflow's form does not follow `$ref`: put the referred schema in its place."""
    reference = schema.get("$ref")
    return dict(definitions[reference.rsplit("/", 1)[1]] if reference else schema)
