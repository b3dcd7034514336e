"""What the built-in suites have in common: their facts, and how a measurement is put together."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stages.artifacts.manifests import canonical_json
from stages.judge.heldout import NOT_FINITE
from stages.judge.suite import Better, Measurement, Score

_VERSION = 1
"""Raise it when the same model and items would now get another value: kept measurements then no longer count."""


@dataclass
class Facts:
    """Name, metric and identity of a suite; the suites add how they measure."""

    name: str
    metric: str
    better: Better
    digest: str
    chance: float | None = None


def digest_of(name: str, items: Sequence[Any], **settings: Any) -> str:
    """Return the digest of a suite from what its items are and what decides their values."""
    told = {"suite": name, "version": _VERSION, "items": items, "settings": settings}
    return hashlib.sha256(canonical_json(told)).hexdigest()


def measurement(scores: Iterable[Score], skipped: Counter[str]) -> Measurement:
    """Put a measurement together; a value that is no finite number is a reason to skip the item."""
    found = Measurement(skipped=skipped)
    for score in scores:
        if math.isfinite(score.value):
            found.scores.append(score)
        else:
            found.skipped[NOT_FINITE] += 1
    return found
