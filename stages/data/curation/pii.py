"""Personal data and secrets out of text: patterns, check digits and context, one placeholder per type, counted.

Each finder yields passages; where two overlap, the one that stands first in the list of finders counts. What the
finders must not touch is as much a part of them as what they find: code, versions, numbers, tables.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.config.pii import PiiConfig
from stages.data.curation.pii_contacts import find_emails, find_ip_addresses, find_logins
from stages.data.curation.pii_numbers import find_cards, find_ibans, find_social_security_numbers
from stages.data.curation.pii_phones import find_phones
from stages.data.curation.pii_secrets import find_private_keys, find_secrets
from stages.data.curation.pii_spans import Finder, Found


@dataclass(frozen=True)
class Scrubbed:
    """A text without personal data, and how many of each type were replaced."""

    text: str
    counts: Counter[str]


# The switch of each finder, in the order in which they may claim a passage.
_FINDERS: tuple[tuple[str, Finder], ...] = (
    ("secrets", find_private_keys),
    ("logins", find_logins),
    ("secrets", find_secrets),
    ("emails", find_emails),
    ("ibans", find_ibans),
    ("cards", find_cards),
    ("social_security_numbers", find_social_security_numbers),
    ("phones", find_phones),
    ("ip_addresses", find_ip_addresses),
)


class Scrubber:
    """Replaces the types of personal data that are switched on; the same text always gives the same result."""

    def __init__(self, config: PiiConfig | None = None, *, enabled: bool = True) -> None:
        config = config or PiiConfig()
        self._finders = [find for switch, find in _FINDERS if getattr(config, switch)] if enabled else []

    def scrub(self, text: str) -> Scrubbed:
        """Replace what is found by placeholders such as <EMAIL>."""
        chosen = _disjoint(found for find in self._finders for found in find(text))
        if not chosen:
            return Scrubbed(text, Counter())
        parts: list[str] = []
        reached = 0
        for found in chosen:
            parts += (text[reached : found.start], f"<{found.kind}>")
            reached = found.end
        return Scrubbed("".join((*parts, text[reached:])), Counter(found.kind for found in chosen))


def _disjoint(found: Iterable[Found]) -> Sequence[Found]:
    """The passages in the order of the text; one that overlaps an earlier claim is left out."""
    chosen: list[Found] = []
    for passage in found:
        place = bisect(chosen, passage)
        clear_before = place == 0 or chosen[place - 1].end <= passage.start
        if clear_before and (place == len(chosen) or passage.end <= chosen[place].start):
            chosen.insert(place, passage)
    return chosen


_ALL = Scrubber()


def scrub(text: str) -> Scrubbed:
    """Replace all types that need no model, whatever a run has switched on: for samples that people look at."""
    return _ALL.scrub(text)
