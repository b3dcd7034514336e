"""`scores.parquet`: every score of an evaluation, one row for each model and item, and the responses next to it.

It lies in the evaluation's artifact, so that any two models can be compared later, also with models of other runs that
were measured on the same items.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stages.config.errors import DataError
from stages.judge.suite import Score

if TYPE_CHECKING:
    import pyarrow

SCORES, RESPONSES = "scores.parquet", "responses.parquet"
_COLUMNS = ("suite", "item", "cluster", "role", "value", "tokens", "response_digest")


@dataclass(frozen=True)
class Column:
    """The scores of one role on one suite, ordered by item."""

    items: np.ndarray
    clusters: np.ndarray
    values: np.ndarray


def response_digest(text: str) -> str:
    """SHA-256 of a response, the key of `responses.parquet`."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_scores(folder: Path, measured: Mapping[tuple[str, str], Iterable[Score]]) -> None:
    """Write the scores by (suite, role), and each different response once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        (suite, one.item, one.cluster or one.item, role, one.value, one.tokens, one.response)
        for (suite, role), scores in measured.items()
        for one in scores
    ]
    responses = {response_digest(text): text for *_, text in rows if text}
    digests = [response_digest(text) if text else "" for *_, text in rows]
    columns = [list(column) for column in zip(*rows, strict=True)][:-1] if rows else [[] for _ in range(6)]
    types = (pa.string(), pa.string(), pa.string(), pa.string(), pa.float64(), pa.int64(), pa.string())
    arrays = [pa.array(values, type=kind) for values, kind in zip([*columns, digests], types, strict=True)]
    pq.write_table(pa.table(dict(zip(_COLUMNS, arrays, strict=True))), folder / SCORES)
    table = {"digest": pa.array(list(responses), pa.string()), "response": pa.array(list(responses.values()))}
    pq.write_table(pa.table(table), folder / RESPONSES)


class ScoreTable:
    """Reads a `scores.parquet`; raises DataError for a file that is none."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        advice = "Clear the evaluate task to build it again."
        try:
            self._table: pyarrow.Table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} holds no scores: {error}", advice=advice) from error
        if missing := [name for name in _COLUMNS if name not in self._table.column_names]:
            raise DataError(f"{path} has no column {', '.join(missing)}", advice=advice)

    def suites(self) -> list[str]:
        return sorted(self._table["suite"].unique().to_pylist())

    def column(self, suite: str, role: str) -> Column:
        """Return what one role got on one suite; empty where it was not measured."""
        import pyarrow.compute as pc

        chosen = self._table.filter((pc.field("suite") == suite) & (pc.field("role") == role)).sort_by("item")
        return Column(
            items=np.asarray(chosen["item"].to_pylist(), dtype=object),
            clusters=np.asarray(chosen["cluster"].to_pylist(), dtype=object),
            values=chosen["value"].to_numpy(),
        )
