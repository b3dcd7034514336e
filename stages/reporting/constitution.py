"""A page for people to read: what the model said, how it was criticised and revised, what was accepted and what not.

Rules cannot tell a right critique from a wrong one. Autoescaping is on: all texts are a model's, or outside data.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from stages.config.principles import Constitution
from stages.config.text import printable
from stages.data.constitution.acceptance import ACCEPTED
from stages.data.constitution.work import FIRST, SECOND, Worked

MOST_SHOWN = 60
"""Prompts on the page, spread evenly over all that have a record."""


def constitution_page(
    worked: Sequence[Worked], constitution: Constitution, counted: Mapping[str, Any], *, run_name: str
) -> str:
    """Return the page; its own content policy forbids scripts and requests."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("stages.reporting").joinpath("constitution.html.jinja").read_text("utf-8"))
    page = template.render(
        run_name=run_name,
        constitution=constitution,
        principles={principle.id: principle for principle in constitution.principles},
        counted=counted,
        steps=("responses", "rounds", "comparisons"),
        shown=sample(worked, at_most=MOST_SHOWN),
        total=len(worked),
        ACCEPTED=ACCEPTED,
        preferred=(FIRST, SECOND),
    )
    return printable(page)


def sample(worked: Sequence[Worked], *, at_most: int) -> list[Worked]:
    """Spread evenly over the prompts in the order of their draw, which is random: accepted and dropped as they come."""
    number = min(at_most, len(worked))
    return [worked[place * len(worked) // number] for place in range(number)]
