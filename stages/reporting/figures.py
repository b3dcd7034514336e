"""A figure and the numbers behind it: a table on a click, and all of them as CSV in a link that needs no network."""

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stages.reporting.line_plot import number

_MOST_SHOWN, _MOST_LINKED = 20, 5_000
"""Rows of the table, and of the CSV: a page of many figures is mailed and must stay a few megabytes."""
_FORMULA = re.compile(r"^[=+\-@\t\r]")
"""Spreadsheets run texts that begin so."""


@dataclass(frozen=True)
class FigureData:
    """The numbers that a figure was drawn from."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """A selection, spelled for people, first and last included."""
    num_rows: int
    csv: str
    """`data:` address of the rows in full precision."""
    file: str
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its legend (name, colour number)."""

    title: str
    svg: str
    legend: tuple[tuple[str, int], ...]
    data: FigureData | None = None


def figure_data(name: str, head: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> FigureData | None:
    """Return what stands behind a figure; None without rows."""
    if not rows:
        return None
    shown, linked = _chosen(rows, _MOST_SHOWN), _chosen(rows, _MOST_LINKED)
    notes = []
    if len(shown) < len(rows):
        notes.append(f"{len(shown)} of {len(rows):,} rows.")
    if len(linked) < len(rows):
        notes.append(f"The file has {len(linked):,} of them; all are in the artifact.")
    return FigureData(
        head=tuple(head),
        rows=tuple(tuple(cell if isinstance(cell, str) else number(cell, 4) for cell in row) for row in shown),
        num_rows=len(rows),
        csv=f"data:text/csv;charset=utf-8;base64,{base64.b64encode(_csv(head, linked).encode()).decode()}",
        file=f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:80] or 'figure'}.csv",
        note=" ".join(notes),
    )


def _chosen(rows: Sequence[Sequence[str | float | None]], at_most: int) -> Sequence[Sequence[str | float | None]]:
    if len(rows) <= at_most:
        return rows
    stride = (len(rows) - 1) / (at_most - 1)
    return [rows[round(position * stride)] for position in range(at_most)]


def _csv(head: Sequence[str], rows: Sequence[Sequence[str | float | None]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_harmless(name) for name in head])
    writer.writerows([["" if cell is None else _harmless(cell) for cell in row] for row in rows])
    return out.getvalue()


def _harmless(cell: str | float) -> str:
    if isinstance(cell, str):
        return f"'{cell}" if _FORMULA.match(cell) else cell
    if not math.isfinite(cell):  # of a step that training skipped and still logged
        return str(cell)
    return repr(float(cell)) if cell != int(cell) else str(int(cell))
