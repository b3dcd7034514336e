"""Which of several equal documents stays, so that held-out text has no found duplicate in training.

Held out before training before planted, then by order; the same rule serves exact duplicates (key = hash of the text)
and near duplicates (key = cluster).
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class Candidate:
    """What deduplication must know of a document. `shard` and `index` are its place."""

    shard: int
    index: int
    key: str
    heldout: bool
    planted: bool

    @property
    def rank(self) -> tuple[bool, bool, int, int]:
        return (self.planted, not self.heldout, self.shard, self.index)


def text_key(text: str) -> str:
    """Hash of the text without regard to case and white space."""
    simplified = _SPACES.sub(" ", text.lower()).strip()
    return hashlib.blake2b(simplified.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def extra_copies(candidates: Iterable[Candidate]) -> set[tuple[int, int]]:
    """Places of all but the best-ranked document of each key."""
    best: dict[str, Candidate] = {}
    extra: set[tuple[int, int]] = set()
    for candidate in candidates:
        other = best.get(candidate.key)
        if other is None:
            best[candidate.key] = candidate
            continue
        loser = max(candidate, other, key=lambda entry: entry.rank)
        best[candidate.key] = other if loser is candidate else candidate
        extra.add((loser.shard, loser.index))
    return extra
