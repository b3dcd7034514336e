"""Lists that a table keeps as text: cells of a CSV, or columns of JSON. They are read where a format needs a list.

A text that may be an answer is left alone, even when it is JSON; only turns, which no answer looks like, are read, and
the root of a tree.
"""

import ast
import json
from collections.abc import Mapping
from typing import Any

from stages.data.sources.rows import is_too_deep, parse_json

LISTS = frozenset(
    (
        "messages",
        "conversations",
        "conversation",
        "dialogue",
        "dialog",
        "chat",
        "turns",
        "data",
        "instances",
        "history",
        "responses",
        "completions",
        "answers",
        "summaries",
        "scores",
        "ranks",
        "ranking",
        "ratings",
        "labels",
        "votes",
        "preferences",
        "annotations",
        "individual_preferences",
    )
)
"""Fields in which the formats know lists or objects and no text of their own."""
_TURNS = frozenset(("prompt", "chosen", "rejected", "completion", "response", "context"))
"""Fields that hold a text or turns."""
_LONGEST_LITERAL = 2**20
"""Python's own notation takes a hundred times its size in memory while it is read."""


def unpacked(values: dict[str, Any]) -> dict[str, Any]:
    """The row with its lists as lists; the row itself when it has none in text."""
    found: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            if name in LISTS:
                found[name] = _value(value)
            elif name in _TURNS or _is_side(name):
                made = _value(value)
                if are_turns(made) or (isinstance(made, dict) and made.keys() & {"content", "replies"}):
                    found[name] = made
                elif isinstance(made, list) and all(isinstance(text, str | None) for text in made):
                    texts[name] = made
    # The arena's table has a list of prompts and as many answers of each side; a single list is somebody's answer.
    if "prompt" in texts and len(texts) > 2 and len(set(map(len, texts.values()))) == 1:
        found |= texts
    return {**values, **found} if found else values


def _is_side(name: str) -> bool:
    return name[-1:].lower() in ("a", "b", "0", "1", "2") and name.lower().startswith(("conversation", "response"))


def are_turns(value: object) -> bool:
    """Whether this is a list of messages, each with a role and a text."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in value)


def _value(text: str) -> Any:
    """The list or object that a text spells as JSON, or as Python prints it; else the text."""
    try:
        made = parse_json(text)
    except (ValueError, RecursionError):
        if len(text) > _LONGEST_LITERAL:
            return text
        try:
            made = ast.literal_eval(text.strip())
            json.dumps(made)  # Python knows more than a ledger can show: bytes, sets, complex numbers
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return text
    return made if isinstance(made, list | dict) and not is_too_deep(made) else text


def number_of(value: object) -> float | None:
    """A number, or a text that spells one; None for anything else, such as `N/A` or NaN."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if value.is_integer() else value
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        return None
    return value
