"""Why a rater preferred a response: tags and words that came with a row, as one text."""

from collections.abc import Iterable, Mapping
from typing import Any

NAMES = (
    "reasons",
    "reason",
    "rationale",
    "rationales",
    "reasoning",
    "critique",
    "explanation",
    "justification",
    "comment",
    "comments",
    "feedback",
)
"""Fields in which raters, people or models, say why; `reasons` and `comment` are those of collect_preferences."""


def reason_of(values: Mapping[str, Any]) -> str:
    """What a row says of its choice, each thing once and on a line of its own; empty when it says nothing."""
    return joined(line for name in NAMES for line in _lines(values.get(name)))


def joined(lines: Iterable[str]) -> str:
    """Lines that differ, in their order, as UTF-8: half a character in a comment is no reason to lose a pair."""
    return "\n".join(dict.fromkeys(line.encode("utf-8", "replace").decode() for line in lines if line))


def _lines(value: object) -> Iterable[str]:
    """A text as it is; tags of a list on one line, longer texts of a list one by one; nothing of anything else."""
    if isinstance(value, str):
        return [value.strip()]
    if not isinstance(value, list):
        return []
    texts = [entry.strip() for entry in value if isinstance(entry, str)]
    are_tags = all(len(text.split()) <= 3 for text in texts)
    return [", ".join(texts)] if are_tags else texts
