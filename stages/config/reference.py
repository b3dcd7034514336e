"""`python -m stages.config.reference`: docs/CONFIGURATION.md on standard output, written from the config classes.

A field's help is the string under it, so the page can only be out of date by not being written again; a test compares.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

import stages.config
from stages.config.base import Config
from stages.config.help import field_help
from stages.config.pipeline import PipelineConfig

_RECORDS = "stages.config.request"
"""Records that the parts write for each other; a user never sets them."""
_INTRODUCTION = """# Configuration reference

<!-- written by `make reference` from the strings under the fields in stages/config; change those, not this page -->

A run is configured in two steps. The trigger form ([PipelineParams](#pipelineparams)) names a recipe, sources and a few
choices. `resolve` turns it into one complete [PipelineConfig](#pipelineconfig), from the recipe's function in
[stages/config/recipes.py](../stages/config/recipes.py) and `overrides`, which set any field of the tables below by its
dotted path: `{"sft.optimizer.learning_rate": 0.0002, "execution.sft.micro_batch_size": 4}`.

A stage's own part decides its result and is in its fingerprint; `execution.<stage>` decides only how the stage runs.
Defaults are those of the classes; a recipe may set others. Unknown fields are refused."""

_WORDS = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", NoneType: "none", Any: "any"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def page() -> str:
    """Return the page, the forms first, then the parts of a PipelineConfig as they are met in it."""
    paths = _paths(PipelineConfig)
    forms = sorted((cls for cls in _all_configs() if cls.__name__.endswith("Params")), key=_order_of_forms)
    blocks = [_INTRODUCTION, "## The forms of the DAGs", *map(_section, forms), "## The configuration of a run"]
    blocks += [_section(cls, paths) for cls in paths]
    return "\n\n".join(blocks) + "\n"


def _order_of_forms(form: type[Config]) -> tuple[bool, str]:
    return form.__name__ != "PipelineParams", form.__name__


def _all_configs() -> list[type[Config]]:
    """Every config class of this package; importing its modules makes them known to their base."""
    for module in pkgutil.iter_modules(stages.config.__path__, "stages.config."):
        if module.name != __name__:
            importlib.import_module(module.name)

    def below(cls: type[Config]) -> Iterator[type[Config]]:
        for child in cls.__subclasses__():
            yield child
            yield from below(child)

    return [cls for cls in dict.fromkeys(below(Config)) if cls.__module__.startswith("stages.config.")]


def _paths(root: type[Config]) -> dict[type[Config], list[str]]:
    """Where each class stands in a configuration, as dotted paths; its base classes follow it, with no path."""
    paths: dict[type[Config], list[str]] = {}

    def visit(cls: type[Config], path: str) -> None:
        paths.setdefault(cls, []).append(path)
        for name, field in cls.model_fields.items():
            for part in _configs_in(field.annotation):
                visit(part, f"{path}.{name}" if path else name)

    visit(root, "")
    for cls in list(paths):
        for base in _bases(cls):
            paths.setdefault(base, [])
    return paths


def _configs_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [] if annotation.__module__ == _RECORDS else [annotation]
    return [cls for argument in get_args(annotation) for cls in _configs_in(argument)]


def _bases(cls: type[Config]) -> list[type[Config]]:
    return [base for base in cls.__mro__[1:] if issubclass(base, Config) and base is not Config]


def _section(cls: type[Config], paths: dict[type[Config], list[str]] | None = None) -> str:
    """One class: where it is set, what it is for, and a row for each field that is not described at a base class."""
    lines = [f"### {cls.__name__}", "", " ".join((cls.__doc__ or "").split())]
    fields = dict(cls.model_fields)
    if paths is not None:
        if places := [f"`{path}`" for path in paths[cls] if path]:
            lines += ["", "Set at " + ", ".join(places) + "."]
        if bases := [base for base in _bases(cls) if base in paths]:
            lines += [
                "",
                "Has all fields of " + ", ".join(f"[{base.__name__}](#{_anchor(base)})" for base in bases) + ".",
            ]
            fields = {name: field for name, field in fields.items() if name in cls.__annotations__}
    if fields:
        lines += ["", "| field | type | default | allowed | meaning |", "|---|---|---|---|---|"]
        schemas = cls.model_json_schema()["properties"]
        texts = field_help(cls)
        lines += [_row(name, field, schemas[name], texts[name]) for name, field in fields.items()]
    return "\n".join(lines)


def _row(name: str, field: FieldInfo, schema: Mapping[str, Any], text: str) -> str:
    cells = (f"`{name}`", _offered(field, schema), _default(field), _allowed(field), _escaped(text))
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Markdown takes `<EMAIL>` for a tag, except between backticks, where every second part of the text is."""
    parts = text.split("`")
    return "`".join(part if place % 2 else part.replace("<", "&lt;") for place, part in enumerate(parts))


def _offered(field: FieldInfo, schema: Mapping[str, Any]) -> str:
    """The type, or the part of it that the form offers."""
    return ", ".join(f"`{value}`" for value in schema["enum"]) if "enum" in schema else _type(field.annotation)


def _type(annotation: Any) -> str:
    """A type as a reader who knows no Python would say it; choices are listed, config classes are links."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin in (tuple, list):
        parts = [_type(part) for part in arguments if part is not Ellipsis]
        return f"list of {parts[0]}" if origin is list or Ellipsis in arguments else f"({', '.join(parts)})"
    if origin is dict:
        return f"{_type(arguments[0])} to {_type(arguments[1])}"
    if annotation in _WORDS:
        return _WORDS[annotation]
    if issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if issubclass(annotation, Config) and annotation.__module__ != _RECORDS:
        return f"[{annotation.__name__}](#{_anchor(annotation)})"
    return annotation.__name__


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Config):
        return "its defaults"
    if value is None or value in ("", (), [], {}):
        return "none" if value is None else "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple | list):
        return ", ".join(f"`{entry}`" for entry in value)
    return f"`{value.value if isinstance(value, Enum) else value}`"


def _allowed(field: FieldInfo) -> str:
    bounds = []
    for rule in field.metadata:
        bounds += [f"{sign} {getattr(rule, name)}" for name, sign in _BOUNDS.items() if hasattr(rule, name)]
        if least := getattr(rule, "min_length", None):
            bounds.append(f"length >= {least}")
        if most := getattr(rule, "max_length", None):
            bounds.append(f"length <= {most}")
        if pattern := getattr(rule, "pattern", None):
            bounds.append(f"matches `{pattern}`")
    return ", ".join(bounds)


def _anchor(cls: type[Config]) -> str:
    return cls.__name__.lower()


if __name__ == "__main__":
    sys.stdout.write(page())
