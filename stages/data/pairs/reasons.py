"""Why a rater preferred a response: tags and words that came with a row, as one text."""

from collections.abc import Iterable, Mapping
from typing import Any

from stages.config.principles import Area

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


_LONGEST_TAG = 3
"""Words of a tag at most; a line with more between its commas is a comment."""


def areas_of(reason: str) -> tuple[Area, ...]:
    """The areas that a published reason names: a line of tags has them as whole tags, in any case. In a comment the
    words may mean anything ("not honest"), so none is read there."""
    tags: set[str] = set()
    for line in reason.split("\n"):
        entries = [entry.strip().lower() for entry in line.split(",")]
        tags |= set(entries) if _are_tags(entries) else set()
    return tuple(area for area in Area if area.value in tags)


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
    return [", ".join(texts)] if _are_tags(texts) else texts


def _are_tags(texts: Iterable[str]) -> bool:
    return all(len(text.split()) <= _LONGEST_TAG for text in texts)
