"""Which areas the reasons of pairs and single responses name, next to their tokens: one bit each, 0 for none."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.config.errors import DataError
from stages.config.principles import Area
from stages.data.pairs.reasons import areas_of

FILE = "reasons.npy"
UNNAMED = "none"
"""In the place of an area, for what names none."""


class ReasonsWriter:
    """Collects the areas of rows in the order in which they are written."""

    def __init__(self) -> None:
        self._bits: list[int] = []

    def append(self, row: Mapping[str, Any]) -> None:
        self._bits.append(bits_of(areas_of(row.get("reason", ""))))

    def write(self, folder: Path) -> dict[str, Any]:
        """Write them and return their account; nothing where no row names an area, so that other data's tokens are
        what they were."""
        if not any(self._bits):
            return {}
        bits = np.asarray(self._bits, dtype=np.uint8)
        np.save(folder / FILE, bits)
        return {"reasons": counts_of(bits)}


def bits_of(areas: Iterable[Area]) -> int:
    """Return areas as a number; that of each is fixed by its place in the class."""
    places = list(Area)
    return sum(1 << places.index(area) for area in set(areas))


def names_any(bits: np.ndarray, areas: Sequence[Area]) -> np.ndarray:
    """Return for each row whether it names one of these areas; of no areas, every row will do."""
    return (bits & bits_of(areas)) > 0 if areas else np.ones(len(bits), dtype=bool)


def by_area(bits: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each area which rows name it, and which name none. A row may name several."""
    return {**{area.value: names_any(bits, [area]) for area in Area}, UNNAMED: bits == 0}


def counts_of(bits: np.ndarray) -> dict[str, int]:
    """Return how many rows name each area, and how many none."""
    counts = Counter({name: int(mask.sum()) for name, mask in by_area(bits).items()})
    return {name: count for name, count in counts.items() if count}


def of_reasons(
    indices: np.ndarray, bits: np.ndarray, areas: Sequence[Area], *, one: str, what: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return those of the indices whose row names one of these areas, and their account; `bits` are those of the
    indices, `one` is what the ledger counts. Raises DataError when no row does."""
    named = names_any(bits, areas)
    _require_named(int(named.sum()), bits, areas, what)
    kept = indices[named]
    counts = {f"{one}_of_the_reasons": len(kept), f"{one}_of_other_reasons": len(bits) - len(kept)}
    return kept, {**counts, "reasons": counts_of(bits[named])}


def _require_named(left: int, bits: np.ndarray, areas: Sequence[Area], what: str) -> None:
    """Raise DataError when no row names one of the areas; `bits` are those of the rows that might have."""
    if left:
        return
    named = ", ".join(f"{name} ({count})" for name, count in counts_of(bits).items())
    raise DataError(
        f"reasons={[area.value for area in areas]}: none of the {len(bits)} {what} names one of them; "
        f"they name {named}",
        advice="Choose reasons that are named, leave reasons empty, or bring pairs whose field `reasons` has these "
        "words. Tokens of an earlier version have no reasons: delete that artifact, and the run makes it again.",
    )
