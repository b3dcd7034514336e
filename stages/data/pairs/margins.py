"""By how much a chosen response is better, where a row says so: the difference of two ratings, or a field of its own.

A margin is in the unit of the source's ratings; the reward model's config says what a unit is worth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.config.errors import DataError
from stages.config.sources import RATINGS, Source
from stages.data.pairs.cells import number_of
from stages.data.pairs.sides import Preference

_STEMS = ("score", "rating", "reward")
NONE, CONTRADICTS = "no_margin", "margin_below_zero"


@dataclass(frozen=True)
class Margin:
    """How much better the chosen response is, never below 0, and what was decided on the way."""

    value: float
    changes: tuple[str, ...] = ()


def margin_of(asked: str, made: Preference, values: Mapping[str, Any]) -> Margin:
    """Return what a row says under `asked`, a source's `margin=`; a row that says nothing has margin 0, and is counted.

    A field is taken without its sign, which says in many tables which response is better. A difference of ratings has a
    meaning of its own when it is below 0: the raters' choice contradicts their ratings, and the margin is 0.
    """
    found = made.gap if asked == RATINGS else number_of(values.get(asked))
    if found is None or not math.isfinite(found):
        return Margin(0.0, (NONE,))
    if asked == RATINGS and found < 0:
        return Margin(0.0, (CONTRADICTS,))
    return Margin(abs(float(found)))


def require_margins(source: Source, *, kept: int, without: int) -> None:
    """Raise DataError for a source none of whose pairs has the margin that it was given with."""
    if source.margin and kept and without >= kept:
        raise DataError(
            f"source {source.uri!r}: margin={source.margin!r} is in none of its {kept} pairs",
            advice=f"Use margin={RATINGS} where the rows rate both responses (docs/DATA.md), the name of a field with "
            "a number, or no margin=.",
        )


def gap_of_sides(values: Mapping[str, Any]) -> float | None:
    """The difference of the ratings of `chosen` and `rejected`, such as of `score_chosen` and `score_rejected`."""
    for stem in _STEMS:
        for name in ("{side}_{stem}", "{stem}_{side}", "{side}-{stem}"):
            chosen, rejected = (
                number_of(values.get(name.format(side=side, stem=stem))) for side in ("chosen", "rejected")
            )
            if chosen is not None and rejected is not None:
                return chosen - rejected
    return None
