"""The templates of this folder: autoescaping is on, because model output and raw data are untrusted."""

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@cache
def template(name: str) -> "Template":
    """Return a template, which may import the others by their names."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    room = files("stages.reporting")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: room.joinpath(name).read_text("utf-8")),
    )
    environment.filters["drawing"] = Markup  # only for what we draw, texts in it are escaped
    return environment.get_template(name)
