"""Prompts of judges, one file each; a published file never changes, because verdicts are kept under its digest."""

import hashlib
from importlib.resources import files

from stages.config.judging import PLACES, SHIPPED_PROMPTS


def prompt_text(name_or_text: str) -> str:
    """Return a shipped prompt by its name, or the text that was given instead."""
    return _shipped(name_or_text) if name_or_text in SHIPPED_PROMPTS else name_or_text


def refusal_prompt() -> str:
    """What a judge is asked about refusals; its answers are two statements about one response."""
    return _shipped("refusal-v1")


def prompt_digest(name_or_text: str) -> str:
    """SHA-256 of the prompt's text."""
    return hashlib.sha256(prompt_text(name_or_text).encode()).hexdigest()


def filled(template: str, *, question: str, first: str, second: str) -> str:
    """Put the texts in; a text that spells a place out stays as it is."""
    texts = dict(zip(PLACES, (question, first, second), strict=True))
    places = sorted(PLACES, key=template.index)
    parts, rest = [], template
    for place in places:
        before, _, rest = rest.partition(place)
        parts += [before, texts[place]]
    return "".join([*parts, rest])


def _shipped(name: str) -> str:
    return files("stages.judge.prompts").joinpath(f"{name}.txt").read_text(encoding="utf-8")
