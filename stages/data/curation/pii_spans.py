"""What the finders of personal data share: a found passage, and what stands around it."""

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Found(NamedTuple):
    """A passage of a text that is personal data or a secret, and its type, which names the placeholder."""

    start: int
    end: int
    kind: str


Finder = Callable[[str], Iterator[Found]]
"""Yields what it finds in a text, in the order of the text."""


def before(text: str, start: int, characters: int) -> str:
    """The characters in front of a place, at most so many."""
    return text[max(0, start - characters) : start]


def inside_url(text: str, start: int) -> bool:
    """Whether a place lies in a URL, whose numbers are ids."""
    words = before(text, start, 300).split()
    # The last word touches the place only if no white space stands between.
    if not words or text[start - 1].isspace():
        return False
    return "://" in words[-1] or words[-1].lower().lstrip("(<[\"'").startswith("www.")
