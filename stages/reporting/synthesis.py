"""A page for people to read: rows that were accepted, and what was dropped, with the reason.

Rules cannot tell a right response from a wrong one. Autoescaping is on: all texts are a model's, or outside data.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from stages.config.text import printable
from stages.data.synthesis.account import Account
from stages.data.synthesis.work import Draft

MOST_SHOWN = 30
"""Rows of each kind on the page, spread evenly over all."""
_LONGEST = 2000


def synthesis_page(
    drafts: Sequence[Draft], account: Account, ledger: Mapping[str, Any], *, run_name: str, accepted: str
) -> str:
    """Return the page; its own content policy forbids scripts and requests."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = _short
    template = environment.from_string(files("stages.reporting").joinpath("synthesis.html.jinja").read_text("utf-8"))
    kept = [draft for draft in drafts if draft.outcome == accepted]
    gone = [draft for draft in drafts if draft.outcome != accepted]
    page = template.render(
        run_name=run_name,
        ledger=ledger,
        steps={name: step for name, step in account.steps().items() if step.entered},
        kept=_sample(kept),
        num_kept=len(kept),
        gone=_sample(gone),
        num_gone=len(gone),
        ACCEPTED=accepted,
    )
    return printable(page)


def _sample(drafts: Sequence[Draft]) -> list[Draft]:
    number = min(MOST_SHOWN, len(drafts))
    return [drafts[place * len(drafts) // number] for place in range(number)]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
