"""What a label says of two responses: the first is better, the second, or neither; and what several labels say.

A number is a place. Whether places are counted from 0 or from 1 follows from the names of the responses or, where these
are letters, from the labels that a table shows. What stays unclear is refused, because a wrong guess would train the
opposite.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from stages.data.pairs.cells import number_of
from stages.data.pairs.turns import Unusable

SINGLE = (
    "better_response_id",
    "better_response",
    "better",
    "winner",
    "overall_preference",
    "preference_strength",
    "preference",
    "preferred",
    "label",
    "choice",
    "verdict",
    "judgment",
    "judgement",
    "vote",
    "chosen",
    "selected",
)
"""Fields with the one label of a row, which goes before those of single annotators."""
SEVERAL = ("labels", "preferences", "votes", "annotations", "individual_preferences", "judgments", "judgements")
"""Fields with a label of each annotator: a list, or an object by annotator."""
_COLUMN = re.compile(r"(label|vote|preference|choice|annotator|annotation|rater|judge)_?\d+(_(label|vote|preference))?")
_SIGNED = frozenset(("overall_preference", "preference_strength", "score"))
"""HelpSteer's strengths: below zero the first response is better."""
_TIES = frozenset(
    (
        "tie",
        "tied",
        "draw",
        "equal",
        "equally",
        "same",
        "both",
        "neither",
        "none",
        "bothbad",
        "both_bad",
        "both_good",
        "bothgood",
        "c",
        "a=b",
        "b=a",
        "no_preference",
    )
)
_FIRST, _SECOND = (
    frozenset(("first", "left", "a>b", "a>>b", "b<a", "b<<a")),
    frozenset(("second", "right", "b>a", "b>>a", "a<b", "a<<b")),
)
_KINDS = re.compile(r"(response|model|answer|output|completion|assistant|option|candidate|conversation|text)[_ ]?")


class Verdict(StrEnum):
    """Which of two responses is better."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"


@dataclass(frozen=True)
class Sides:
    """The names of the fields that hold the two responses, and what tells them apart, such as `a` and `b`."""

    names: tuple[str, str]
    marks: tuple[str, str]


@dataclass(frozen=True)
class Coding:
    """How labels are written in a table."""

    first: str = ""
    """What says that the first response is better, where the source says so itself."""
    second: str = ""
    numbers: frozenset[float] = frozenset()
    """The numbers among the labels of the first rows."""

    def verdict(self, label: object, sides: Sides, values: Mapping[str, Any], *, is_signed: bool = False) -> Verdict:
        """What one label says; raises Unusable when it says nothing that is known."""
        number = number_of(label)
        word = _word(label)
        if self.first:
            for mark, verdict in ((self.first, Verdict.FIRST), (self.second, Verdict.SECOND)):
                if word == _word(mark) or (number is not None and number == number_of(mark)):
                    return verdict
            if number is not None:
                raise Unusable("unknown_label")
        if number is not None:
            return self._by_number(number, sides, is_signed=is_signed)
        if isinstance(label, bool):
            raise Unusable("unclear_label")
        return _by_word(word, sides, values)

    def _by_number(self, number: float, sides: Sides, *, is_signed: bool) -> Verdict:
        if is_signed:
            return Verdict.TIE if number == 0 else Verdict.FIRST if number < 0 else Verdict.SECOND
        start = self._counted_from(sides)
        if start is None:
            raise Unusable("unclear_label" if 0 <= number <= 2 else "unknown_label")
        if start == 1 and number in (0, 1.5):
            return Verdict.TIE
        # Between two places lies how sure a judge was, as in AlpacaEval: 1.2 is nearer to the first.
        if not start <= number <= start + 1 or number == start + 0.5:
            raise Unusable("unknown_label")
        return Verdict.FIRST if number < start + 0.5 else Verdict.SECOND

    def _counted_from(self, sides: Sides) -> int | None:
        """The number of the first place; None where neither names nor labels show it."""
        shows_zero, shows_two = 0 in self.numbers, 2 in self.numbers
        match sides.marks:
            case ("0", _):
                return 0
            case ("1", _):
                return 0 if shows_zero and not shows_two and self.numbers <= {0, 1} else 1
            case _ if shows_zero == shows_two:  # 0, 1 and 2: one of them is a tie; only 1: it may be either place
                return None
            case _:
                return 0 if shows_zero else 1


def _word(label: object) -> str:
    """A label without the marks that judges put around it."""
    return re.sub(r"[\s\[\]()\"'.]+", " ", str(label)).strip().lower()


def _by_word(word: str, sides: Sides, values: Mapping[str, Any]) -> Verdict:
    word = word.removesuffix(" is better").removesuffix(" wins")
    bare = _KINDS.sub("", word, count=1)
    for place, verdict in enumerate((Verdict.FIRST, Verdict.SECOND)):
        mark, name = sides.marks[place].lower(), sides.names[place].lower()
        told = values.get(f"model_{sides.marks[place]}")  # the arena's winners may be called by their model
        if word and (word == name or bare == mark or (isinstance(told, str) and word == told.strip().lower())):
            return verdict
    if word in _FIRST or word in _SECOND:
        return Verdict.FIRST if word in _FIRST else Verdict.SECOND
    if word.replace(" ", "_") in _TIES or word.partition(" ")[0] in _TIES:
        return Verdict.TIE
    raise Unusable("unknown_label")


def has_label(values: Mapping[str, Any]) -> bool:
    """Whether a row has a field that could say which of its two responses is better."""
    return any(name in values for name in (*SINGLE, *SEVERAL)) or any(_COLUMN.fullmatch(name) for name in values)


def labels_of(values: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """The labels of a row, none of them empty, and whether they are signed strengths."""
    for name in SINGLE:
        if isinstance(values.get(name), list | Mapping):
            return _flat(values[name]), name in _SIGNED
        if not _is_empty(values.get(name)):
            return [values[name]], name in _SIGNED
    for name in SEVERAL:
        if isinstance(values.get(name), list | Mapping):
            is_signed = name == "individual_preferences"
            return _flat(values[name]), is_signed
        if not _is_empty(values.get(name)):
            return [values[name]], False
    return [value for name, value in values.items() if _COLUMN.fullmatch(name) and not _is_empty(value)], False


def _flat(labels: object) -> list[Any]:
    """One label of each annotator, who may have given an object with the label in it."""
    entries: Sequence[Any] = list(labels.values()) if isinstance(labels, Mapping) else list(labels)  # type: ignore[call-overload]
    found = [_inner(entry) if isinstance(entry, Mapping) else entry for entry in entries]
    return [label for label in found if not _is_empty(label)]


def _inner(entry: Mapping[str, Any]) -> Any:
    return next((entry[name] for name in (*SINGLE, "score", "value") if not _is_empty(entry.get(name))), None)


def _is_empty(value: object) -> bool:
    return value is None or value == "" or value == [] or value == {} or value != value


def numbers_in(rows: Iterable[Mapping[str, Any]]) -> frozenset[float]:
    """The numbers among the labels of some rows."""
    return frozenset(_numbers(rows))


def _numbers(rows: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    for values in rows:
        for label in labels_of(values)[0]:
            if (number := number_of(label)) is not None:
                yield number


def majority(verdicts: Sequence[Verdict]) -> Verdict:
    """What most annotators said; a draw for the most votes is a tie."""
    (first, most), *others = Counter(verdicts).most_common()
    return Verdict.TIE if any(count == most for _, count in others) else first
