"""Tables of the report as plain data; the template turns them into HTML and escapes every text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stages.reporting.line_plot import number


@dataclass(frozen=True)
class Cell:
    """One cell; `share` (0 to 1) draws a bar behind the text, `detail` stands below it, small."""

    text: str
    is_number: bool = False
    is_best: bool = False
    is_code: bool = False
    share: float | None = None
    is_worst: bool = False
    detail: str = ""


@dataclass(frozen=True)
class Table:
    """A table whose first column heads its rows."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def text(value: object) -> Cell:
    return Cell(str(value))


def code(value: object) -> Cell:
    return Cell(str(value), is_code=True)


def num(value: float | None, *, best: bool = False, share: float | None = None) -> Cell:
    return Cell(number(value), is_number=True, is_best=best, share=share)


def shown(value: str, *, share: float | None = None) -> Cell:
    """A number that is already spelled, with its unit."""
    return Cell(value, is_number=True, share=share)


def total_row(cells: Iterable[Cell]) -> tuple[Cell, ...]:
    return tuple(Cell(cell.text, cell.is_number, is_best=True) for cell in cells)


def best_of(values: Sequence[float | None], *, higher: bool) -> float | None:
    """The best measured value, None when fewer than two were measured."""
    measured = [value for value in values if value is not None]
    if len(measured) < 2:
        return None
    return max(measured) if higher else min(measured)
