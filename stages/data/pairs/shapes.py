"""Which format each row of a table has: mostly that of its first rows, and where a row does not fit it, its own."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

Shape = TypeVar("Shape")
Found = TypeVar("Found", covariant=True)


class Fitting(Protocol[Found]):
    """Every format that a row fits: by what it says or, `by_name`, where that fits none, by what its fields are
    called."""

    def __call__(self, values: Mapping[str, Any], *, by_name: bool = True) -> Sequence[Found]: ...


Fits = Callable[[Shape, Mapping[str, Any]], bool]
"""Whether a row fits one format by what it says; cheap, because nearly every row has that of its table."""


@dataclass(frozen=True)
class Misfit:
    """Why a row has no format."""

    reason: str
    why: str


@dataclass(frozen=True)
class Shapes(Generic[Shape]):
    """What the first rows of a table show."""

    fits: Fits[Shape]
    fitting: Fitting[Shape]
    usual: Shape | None
    """The format that was named after the source, or the only one that the first rows fit together; None when they are
    mixed or fit none."""
    seen: frozenset[Shape]
    """Formats that single rows showed."""
    fields: Mapping[str, Any]
    """Every field of the first rows with one of its values."""
    usual_fields: frozenset[str]
    """Fields of those among the first rows that have the usual format."""
    is_stated: bool
    ambiguous: tuple[Shape, ...] = ()
    """All formats that the first rows fit, when no single row decides between them."""

    def of(self, values: Mapping[str, Any]) -> Shape | Misfit:
        """The format of one row: the usual one where it fits, else the only one that fits."""
        if self.usual is not None and self.fits(self.usual, values):
            return self.usual
        found = self.fitting(values, by_name=False)
        if self.usual is not None and self.usual in found:
            return self.usual
        if len(found) > 1:
            found = [shape for shape in found if shape in self.seen] or found
        if len(found) == 1:
            return found[0]
        filled = sorted(name for name, value in values.items() if not is_empty(value))
        if self.usual is not None and (self.is_stated if found else self._lacks(values, filled)):
            return self.usual
        shown = f"fields: {', '.join(filled) or 'none'}"
        if found:
            return Misfit("ambiguous_shape", f"fits {' and '.join(map(str, found))}; {shown}")
        return Misfit("unknown_shape", shown)

    def _lacks(self, values: Mapping[str, Any], filled: Sequence[str]) -> bool:
        """Whether a row is one of its table in which something is empty. Its format then says what is missing."""
        has_some = any(name in self.usual_fields for name in filled)
        return self.usual_fields.issuperset(filled) or (has_some and self.usual in self.fitting(values))


def is_empty(value: object) -> bool:
    """Whether a field says nothing: tables have a column for every field of any row."""
    return not value and (value is None or isinstance(value, str | list | dict))


def shapes_of(
    head: Iterable[Mapping[str, Any]], fits: Fits[Shape], fitting: Fitting[Shape], *, stated: Shape | None
) -> Shapes[Shape]:
    """What a table's first rows show; `stated` is the format that its source names."""
    rows = list(head)
    fields: dict[str, Any] = {}
    for values in rows:
        for name, value in values.items():
            # Later rows fill in what is empty: an empty list of turns does not show the fields of a turn.
            if value is not None and not fields.get(name):
                fields[name] = value
    each = [fitting(values, by_name=False) for values in rows]
    single = {found[0] for found in each if len(found) == 1}
    together = fitting(fields) if rows else ()
    ambiguous: tuple[Shape, ...] = ()
    if stated is not None:
        usual, seen = stated, {stated}
    elif len(together) == 1:
        usual, seen = together[0], {together[0]}
    else:
        usual, seen = next(iter(single)) if len(single) == 1 else None, single
        ambiguous = () if single else tuple(together)
    own = [values for values, found in zip(rows, each, strict=True) if usual in found] or rows
    return Shapes(
        fits=fits,
        fitting=fitting,
        usual=usual,
        seen=frozenset(seen),
        fields=fields,
        usual_fields=frozenset(name for values in own for name, value in values.items() if not is_empty(value)),
        is_stated=stated is not None,
        ambiguous=ambiguous,
    )
